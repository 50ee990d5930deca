"""Network calls of one fixed shape, filled with the tiles of all images that are in flight.

At one shape and one number of threads a tile's result does not depend on what else is in the call, or where (law 3): a
call may hold tiles of several images, at several noise levels. So a thousand thumbnails cost a thousand tiles, not a
thousand calls that are mostly padding, and no byte knows of its neighbours.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

Network = Callable[[list[Tensor]], list[Tensor]]  # (size, C, h, w) each, in and out


@dataclass(eq=False)
class Member:
    """A thread that asks. seconds: of network calls, each shared out evenly among the tiles in it."""

    seconds: float = 0.0


@dataclass(eq=False)
class _Asked:
    """What one `ask` waits for. waits: its thread sleeps and counts as waiting, which ends with its last tile: it is
    about to ask for more, though it may not be awake yet."""

    member: Member
    left: int
    waits: bool = False


@dataclass(eq=False)
class _Request:
    asked: _Asked
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...] = ()
    error: Exception | None = None


class Exchange:
    """Where the threads at work on images leave their tiles and find the results.

    A call is made when it is full, or when all members wait and nobody is left to fill it: then zeros do. It runs in
    the thread of some member, and one at a time: a GPU is one. On a CPU several lanes run as many calls side by side,
    each on num_threads of its own; they change the speed, never the bytes. networks: by the name that `ask` gives.
    """

    def __init__(self, networks: Mapping[str, Network], *, size: int, lanes: int = 1, num_threads: int = 1) -> None:
        self._networks, self._size, self._lanes = networks, size, lanes
        self._beside = None
        if lanes > 1:
            set_threads = partial(torch.set_num_threads, num_threads)
            self._beside = ThreadPoolExecutor(lanes - 1, thread_name_prefix="lane", initializer=set_threads)
        self._queues: dict[str, deque[_Request]] = {name: deque() for name in networks}
        self._changed = threading.Condition()
        self._device = threading.Semaphore(lanes)
        self._members = self._waiting = 0
        self.num_calls = self.num_padded = 0

    @contextmanager
    def member(self) -> Iterator[Member]:
        """Take part for the body: others wait for this thread's tiles, so it must not be long without asking."""
        with self._changed:
            self._members += 1
        try:
            yield Member()
        finally:
            with self._changed:
                self._members -= 1
                self._changed.notify_all()  # those who wait may be all of them now

    def ask(self, member: Member, name: str, tiles: Sequence[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
        """Return what a network gives for each tile, (C, h, w) each, in and out. What a call raises, all in it get."""
        asked = _Asked(member, len(tiles))
        requests = [_Request(asked, inputs) for inputs in tiles]
        with self._changed:
            self._queues[name].extend(requests)
            self._changed.notify_all()
        while True:
            batches: list[list[_Request]] = []
            with self._changed:
                while asked.left:
                    name = max(self._queues, key=lambda key: len(self._queues[key]))
                    queue = self._queues[name]
                    if len(queue) >= self._size or (queue and self._waiting + 1 >= self._members):
                        batches.append([queue.popleft() for _ in range(min(self._size, len(queue)))])
                        while len(batches) < self._lanes and len(queue) >= self._size:
                            batches.append([queue.popleft() for _ in range(self._size)])
                        break
                    self._waiting += 1
                    asked.waits = True
                    try:
                        self._changed.wait()
                    finally:
                        self._no_longer_waits(asked)
            if not batches:
                break
            self._run_all(name, batches)
        for request in requests:
            if request.error is not None:
                raise request.error
        return [request.outputs for request in requests]

    def _no_longer_waits(self, asked: _Asked) -> None:
        if asked.waits:
            asked.waits = False
            self._waiting -= 1

    def _run_all(self, name: str, batches: list[list[_Request]]) -> None:
        """Run the first batch in this thread and the others beside it."""
        first, *others = batches
        beside = [self._beside.submit(self._run, name, batch) for batch in others] if self._beside is not None else []
        try:
            self._run(name, first)
        finally:
            for future in beside:
                future.result()

    def _run(self, name: str, batch: list[_Request]) -> None:
        error: Exception | None = RuntimeError("the thread that made this network call was interrupted")
        try:
            with self._device:
                started = time.perf_counter()
                rows = [request.inputs for request in batch]
                # Zeros of the inputs' own shape fill the call, but scalars (noise levels) are repeated: 0 is no level.
                filler = tuple(torch.zeros_like(x) if x.ndim else x for x in rows[0])
                rows += [filler] * (self._size - len(batch))
                results = self._networks[name]([torch.stack(column) for column in zip(*rows, strict=True)])
                if results[0].is_cuda:
                    torch.cuda.synchronize()
                seconds = (time.perf_counter() - started) / len(batch)
            with self._changed:
                self.num_calls += 1
                self.num_padded += self._size - len(batch)
                for index, request in enumerate(batch):
                    request.outputs = tuple(result[index] for result in results)
                    request.asked.member.seconds += seconds
            error = None
        except Exception as raised:
            error = raised
        finally:
            with self._changed:
                for request in batch:
                    request.error = error
                    request.asked.left -= 1
                    if not request.asked.left:
                        self._no_longer_waits(request.asked)
                self._changed.notify_all()

"""The batches of one rank, in step order, decoded ahead: in a thread of its own, or by data workers on Ray.

Both give the same arrays: a step's pairs are a function of the step, so that a worker which dies and comes again
decodes the same ones. The data workers are plain Ray actors and not a Ray Data pipeline, which was measured (2.60, two
workers, a batch a block, in order): its scheduler takes 0.6 to 1 CPU of the rank while that computes and 10 ms a batch,
keeps 5 KB of books a step, and lists all blocks at the start. The actors take 0.002 CPU and 2 ms, and keep nothing.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from pipelines.engine import MAX_DEATHS
from pipelines.manifest import load_manifest
from pipelines.reader import Fed, PairIndex, PairReader

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class FeedConfig:
    """What a rank is fed: the steps first..last-1, of each the pairs `share` of its batch.

    pairs: a manifest that stays (`pinned_uri`), as data workers read it again. batch_size: of all ranks together;
    share: indices 0..batch_size-1 in it. channels: those that the model reads.
    """

    pairs: str
    split: str
    seed: int
    channels: int
    batch_size: int
    share: range
    first: int
    last: int


def positions(config: FeedConfig, step: int) -> range:
    """Return the positions in the seeded order that this rank trains in a step."""
    start = step * config.batch_size
    return range(start + config.share.start, start + config.share.stop)


def feed_in_thread(config: FeedConfig, index: PairIndex, *, ahead: int = 4) -> Iterator[Fed]:
    """Yield a batch per step, decoded up to `ahead` steps before it is asked for (codecs free the GIL).

    Raises what the reader raised, whatever it was. The thread ends with the generator, or when that is closed.
    """
    decoder = Decoder(config, index)
    pool = ThreadPoolExecutor(1, "feed")
    try:
        for batch in _in_order(config, lambda step: pool.submit(decoder.decode, step), ahead=ahead):
            yield batch.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def feed_from_ray(config: FeedConfig, index_ref: Any, *, num_data_workers: int, ahead: int = 4) -> Iterator[Fed]:
    """Yield a batch per step, decoded by `num_data_workers` Ray actors up to `ahead` steps before it is asked for.

    index_ref: ObjectRef of the PairIndex. The workers run on the rank's node, in logical CPUs that the rank holds for
    them (`bundle_cpus`): they ask for none, and so never wait for one. At most max(ahead, 2 * num_data_workers) + 2
    batches are in the object store. A worker that is killed is started again, up to MAX_DEATHS times; what the decoder
    raised is raised here. The workers end with the generator.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor: Any = ray.remote(num_cpus=0, max_restarts=MAX_DEATHS, max_task_retries=MAX_DEATHS, scheduling_strategy=here)(
        RemoteDecoder
    )
    workers = [actor.remote(config, [index_ref]) for _ in range(num_data_workers)]
    try:
        for ref in _in_order(
            config,
            lambda step: workers[step % num_data_workers].decode.remote(step),
            ahead=max(ahead, 2 * num_data_workers),
        ):
            yield _fetch(ref)
    finally:
        workers.clear()  # Ray ends an actor of which no handle is left; that ray.kill did is told as a failure


def _fetch(ref: Any) -> Fed:
    """Return a batch that is writable, and no longer holds the object store's memory; raise what its worker raised."""
    import ray
    from ray.exceptions import RayTaskError

    try:
        hr, lr, corrupt = ray.get(ref)
    except RayTaskError as error:
        raise error.cause from None
    return Fed(hr.copy(), lr.copy(), corrupt)


class Decoder:
    """Decodes steps; the set is opened by the first, so that a set which cannot be read is an error of that step."""

    def __init__(self, config: FeedConfig, index: PairIndex) -> None:
        self.config, self.index = config, index
        self.reader: PairReader | None = None

    def decode(self, step: int) -> Fed:
        """Return the batch of a step."""
        config = self.config
        if self.reader is None:
            manifest = load_manifest(config.pairs)
            self.reader = PairReader(config.pairs, manifest, config.split, seed=config.seed, index=self.index)
        return self.reader.tolerant_batch(positions(config, step), channels=config.channels)


class RemoteDecoder(Decoder):
    """A Decoder whose index lies in the object store: [its reference], as Ray warns of one that comes by itself."""

    def __init__(self, config: FeedConfig, index: list[Any]) -> None:
        import ray

        super().__init__(config, ray.get(index[0]))


def _in_order(config: FeedConfig, submit: Callable[[int], T], *, ahead: int) -> Iterator[T]:
    """Yield what `submit` returned for each step, in order, once `ahead` more steps were submitted."""
    window: deque[T] = deque()
    for step in range(config.first, config.last):
        window.append(submit(step))
        if len(window) > ahead:
            yield window.popleft()
    while window:
        yield window.popleft()

"""Why a run ends before its work does, and how its workers are told: what is done is kept, the rest stays for later.

The engine asks `Stop.reason` before each unit. Workers in other processes look for a marker, one small object, before
they begin a unit; `marked` puts it there while the driver waits for the units in flight.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, Literal

from pipelines import storage

Reason = Literal["", "sigterm", "max_hours", "error_budget"]
POLL_S = 0.2
_NOTE = b"\nSIGTERM: the units in flight are finished and recorded; a second one ends the run at once\n"


def keep_handler() -> Callable[[], None]:
    """Return a function that puts back the SIGTERM handler of now, where Python code had set one: Ray sets its own."""
    mine = signal.getsignal(signal.SIGTERM)

    def put_back() -> None:
        if callable(mine) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, mine)

    return put_back


@contextlib.contextmanager
def marked(stop: "Stop", uri: str) -> Iterator[None]:
    """Watch `stop` for the time of the body: when it has a reason the marker is put at `uri`. It goes at the end."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(POLL_S):
            if stop.reason:
                with contextlib.suppress(OSError):  # a store that is away for a moment: tried again
                    storage.publish(uri, stop.reason.encode())
                    return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if stop.reason:
            with contextlib.suppress(OSError):  # it is of this run's fence alone: one that stays stops nobody
                storage.delete(uri)


def is_marked(uri: str) -> bool:
    """Return whether the marker is there. One request; a store that does not answer stops nothing."""
    try:
        return storage.exists(uri)
    except OSError:
        return False


class Stop:
    """Tells whether a run is to end early. As a context manager it listens for SIGTERM and starts the clock.

    max_hours: from entry on; None: no deadline. Only the main thread can listen for signals, another one does not.
    The first SIGTERM is a wish; the handler that was there before is then back in place, so a second one acts as usual.
    """

    def __init__(self, *, max_hours: float | None = None) -> None:
        if max_hours is not None and not max_hours > 0:
            raise ValueError(f"max_hours ({max_hours}) must be above 0; leave it out for no limit")
        self.max_hours = max_hours
        self._reason: Reason = ""
        self._deadline: float | None = None
        self._listens = False
        self._before: Any = signal.SIG_DFL

    @property
    def reason(self) -> Reason:
        """Why the run is to end, "" while it is not. The first reason stays."""
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self.ask("max_hours")
        return self._reason

    def ask(self, reason: Reason) -> None:
        """End the run for this reason, unless it has one already."""
        if not self._reason:
            self._reason = reason

    def __enter__(self) -> "Stop":
        if self.max_hours is not None:
            self._deadline = time.monotonic() + self.max_hours * 3600
        if threading.current_thread() is threading.main_thread():
            self._before = signal.getsignal(signal.SIGTERM)
            signal.signal(signal.SIGTERM, self._handle)
            self._listens = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._listens:
            self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.ask("sigterm")
        self._restore()
        with contextlib.suppress(OSError):  # not print: what it writes to may be in the middle of a print
            os.write(2, _NOTE)

    def _restore(self) -> None:
        self._listens = False
        # None stands for a handler that C code had installed: it cannot be put back.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if self._before is None else self._before)

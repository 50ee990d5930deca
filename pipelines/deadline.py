"""A time limit for one asset, in any thread, and the end of the process where even that cannot stop it.

A watchdog thread, one per process, raises a private exception in a thread whose time is up; the `with` turns it into
`Refused`. Python delivers such an exception only between two bytecodes, so code that hangs in C is not reached: where
the body has not left `grace` seconds later, the process is ended. The trail of `pipelines.attempts` then makes the
asset a dead letter on a later try. Where the hanging code holds the interpreter's lock the watchdog cannot run either:
for that, `faulthandler`'s timer, which needs no lock, stands `grace` seconds behind the watchdog's next step.
"""

import ctypes
import faulthandler
import io
import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import cast

from pipelines.images import Refused

_STDERR = 2
_raise_in_thread = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_ulong, ctypes.py_object)(
    ("PyThreadState_SetAsyncExc", ctypes.pythonapi)
)


class _TimeUp(BaseException):
    """Not an Exception: what handles any of those must not swallow it."""


@dataclass(eq=False)
class _Limit:
    thread: int
    seconds: float
    grace: float
    deadline: float
    fired: bool = False


class _Watch:
    """What the threads and the watchdog share. Only locks of C's: an interrupt could leave one in Python held.

    `nudge` is held but for the moment in which the watchdog is to look at once. (SimpleQueue.get with a timeout was
    rejected: in Python 3.11 it sometimes waits for ever where the time is up between its two looks.)
    """

    lock = threading.Lock()
    nudge = threading.Lock()
    running: dict[int, _Limit] = {}
    wakes_at = math.inf
    dog: threading.Thread | None = None


def time_limit(seconds: float, *, grace: float = 60.0) -> AbstractContextManager[None]:
    """Return a context manager that raises Refused (decode, time_limit) when its body takes more than `seconds`.

    That is so whatever the body was about to return or raise then. A body that is still there `grace` seconds after
    it was interrupted ends the process (exit status 1, tracebacks on stderr), and so does code that does not let go of
    the interpreter's lock for `grace` seconds while the watchdog waits for it. Works in any thread; does not nest
    (RuntimeError). Takes faulthandler's one `dump_traceback_later`. Raises ValueError unless both are above 0.
    """
    for name, value in (("seconds", seconds), ("grace", grace)):
        if not 0 < value < threading.TIMEOUT_MAX / 2:
            raise ValueError(f"{name}={value}: must be above 0 and finite; 60 is usual")
    return cast(AbstractContextManager[None], _TimeLimit(_steps(seconds, grace)))


def _steps(seconds: float, grace: float) -> Iterator[None]:
    """Arm, yield to the body, disarm. The watchdog fires once, and then inside this `try` or the body."""
    if threading.get_ident() in _Watch.running:
        raise RuntimeError("time_limit does not nest: this thread is in one already")
    _start_watchdog()
    limit = _Limit(threading.get_ident(), seconds, grace, time.monotonic() + seconds)
    try:
        with _Watch.lock:
            _Watch.running[limit.thread] = limit
            if limit.deadline < _Watch.wakes_at:
                _set_alarm()  # from here: the body may take the lock of the interpreter before the watchdog has had it
                if _Watch.nudge.locked():
                    _Watch.nudge.release()
        yield
        with _Watch.lock:
            del _Watch.running[limit.thread]
        if limit.fired:
            time.sleep(0)  # if the interrupt is still to come, then now: Python looks for one after each call
    except _TimeUp:
        pass
    finally:
        with _Watch.lock:
            _Watch.running.pop(limit.thread, None)
    if limit.fired:
        raise Refused("decode", "time_limit", f"not done after {seconds:g} s")


class _TimeLimit:
    """A context manager that runs no bytecode of its own outside the `try` of the generator.

    An interrupt may come with the first bytecode of a function, before any `try` in it: an `__exit__` in Python would
    let it out. A generator, resumed, is inside its `try` from its first bytecode on. So both methods are C's and only
    resume it: `__next__`, and for `__exit__`, which is given arguments, IOBase's, which calls `close` without any.
    """

    def __init__(self, steps: Iterator[None]) -> None:
        self._steps = steps

    @property
    def __enter__(self):  # type: ignore[no-untyped-def]
        return self._steps.__next__

    @property
    def __exit__(self):  # type: ignore[no-untyped-def]
        return _Closing(self._steps).__exit__


class _Closing(io.IOBase):
    closed = True  # for IOBase's finalizer, which would close it again

    def __init__(self, steps: Iterator[None]) -> None:
        self.close = partial(next, steps, None)  # type: ignore[method-assign]


def _start_watchdog() -> None:
    if _Watch.dog is None or not _Watch.dog.is_alive():  # not alive: this process was forked
        with _Watch.lock:
            if _Watch.dog is None or not _Watch.dog.is_alive():
                _Watch.wakes_at = math.inf
                _Watch.dog = threading.Thread(target=_watch, name="time-limit", daemon=True)
                _Watch.dog.start()


def _watch() -> None:
    """Sleep until the next deadline, or until a nearer one is set."""
    while True:
        wait = -1 if _Watch.wakes_at == math.inf else max(0.0, _Watch.wakes_at - time.monotonic())
        _Watch.nudge.acquire(timeout=wait)
        with _Watch.lock:
            now = time.monotonic()
            for limit in list(_Watch.running.values()):
                if limit.fired and now >= limit.deadline + limit.grace:
                    _end_process(limit)
                if not limit.fired and now >= limit.deadline:
                    limit.fired = True
                    _raise_in_thread(limit.thread, _TimeUp)
            _set_alarm()


def _set_alarm() -> None:
    """Say when the watchdog must look next, and set the timer that goes off where it cannot. Called under the lock."""
    limits = _Watch.running.values()
    _Watch.wakes_at = min((item.deadline + item.grace * item.fired for item in limits), default=math.inf)
    if not limits:
        return faulthandler.cancel_dump_traceback_later()
    late = max(0.0, _Watch.wakes_at - time.monotonic()) + max(item.grace for item in limits)
    faulthandler.dump_traceback_later(late, exit=True, file=_STDERR)


def _end_process(limit: _Limit) -> None:
    message = f"time_limit: thread {limit.thread} cannot be stopped, {limit.grace:g} s after its {limit.seconds:g} s"
    os.write(_STDERR, f"{message}; the process ends\n".encode())
    faulthandler.dump_traceback(_STDERR, all_threads=True)
    os._exit(1)

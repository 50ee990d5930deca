"""A queue to a server that may be slow or away: sent in order by a thread of its own, and nothing waits for it."""

import threading
import time
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Generic, TypeVar

from mlflow.exceptions import MlflowException

from pipelines.engine import say
from pipelines.mlflow_store import hide_passwords

T = TypeVar("T")

FIRST_PAUSE_S, LAST_PAUSE_S = 1.0, 60.0  # after the first error, doubled up to the second
KEEP_EVERY_S = 30.0
BATCH = 1000  # items that send() may choose from
MAX_WAITING = 100_000  # reports of 8 metrics each take 36 MB
_REFUSALS = {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "BAD_REQUEST"}
_STORES = {"botocore", "boto3", "urllib3", "azure", "google", "sqlalchemy"}


class Outbox(Generic[T]):
    """Hands what is put in to `send`, in order, from a daemon thread. put() never waits and never raises.

    send: takes some of what waits, oldest first, and returns how many. What it raises while a server is out of reach
    is said once and tried again after growing pauses. Anything else (a refusal, an error of ours) it would raise again:
    that ends the sending, and is kept in `refusal`. keep: takes what waits to a safe place, now and then while it is
    not sent, and [] when all is sent after that.
    """

    def __init__(
        self, what: str, send: Callable[[list[T]], int], *, keep: Callable[[list[T]], None] = lambda rest: None
    ) -> None:
        self.refusal: Exception | None = None
        self._what, self._send, self._keep = what, send, keep
        self._waiting: deque[T] = deque()
        self._lock, self._keeping = threading.Lock(), threading.Lock()
        self._some, self._closing, self._left = threading.Event(), threading.Event(), threading.Event()
        self._errors = 0  # since something was sent
        self._kept: float | None = None  # when, if the safe place holds anything
        self._thread = threading.Thread(target=self._run, name=f"outbox of {what}", daemon=True)
        self._thread.start()

    def put(self, *items: T) -> None:
        """Append items."""
        with self._lock:
            self._waiting.extend(items)
        self._some.set()

    def rest(self) -> list[T]:
        """Return what waits."""
        with self._lock:
            return list(self._waiting)

    def secure(self) -> None:
        """Keep what waits, now, where it could not be sent at once. An error of the safe place is said."""
        if self._errors:
            self._take_to_safety()
            self._kept = time.monotonic()

    def close(self, timeout_s: float) -> list[T]:
        """Give what waits this long to be sent; return what still waits. The thread does nothing more afterwards."""
        self._closing.set()
        self._some.set()
        self._thread.join(timeout_s)
        self._left.set()
        return self.rest()

    def _run(self) -> None:
        pause = FIRST_PAUSE_S
        while (batch := self._next()) and not self._left.is_set():
            try:
                count = self._send(batch)
            except Exception as error:
                if self._left.is_set():
                    return
                self._errors += 1
                if not _may_pass(error):
                    self.refusal = error
                    say(f"MLflow refuses {self._what}: {first_line(error)}; the training goes on, they are kept")
                    return self._hold()
                if self._errors == 1:
                    say(f"MLflow does not take {self._what}: {first_line(error)}; the training goes on, they wait")
                self._thin()
                if self._kept is None or time.monotonic() - self._kept >= KEEP_EVERY_S:
                    self.secure()
                if self._closing.wait(pause):
                    time.sleep(min(pause, 0.2))  # the last tries
                pause = min(2 * pause, LAST_PAUSE_S)
            else:
                if self._left.is_set():
                    return
                self._sent(count)
                pause = FIRST_PAUSE_S

    def _next(self) -> list[T]:
        """Return the oldest that wait, after waiting for one; none when it is closed and all is sent."""
        while True:
            self._some.clear()
            with self._lock:
                batch = list(islice(self._waiting, BATCH))
            if batch or self._closing.is_set():
                return batch
            self._some.wait()

    def _sent(self, count: int) -> None:
        with self._lock:
            for _ in range(count):
                self._waiting.popleft()
        if self._errors:
            say(f"MLflow takes {self._what} again, after {self._errors} errors")
            self._errors = 0
        if self._kept is not None and not self.rest():
            self._take_to_safety()
            self._kept = None

    def _take_to_safety(self) -> None:
        try:
            with self._keeping:  # or an older list could be kept after a newer one
                self._keep(self.rest())
        except OSError as error:
            say(f"{self._what} that wait for MLflow could not be kept in a file: {first_line(error)}")

    def _hold(self) -> None:
        """Keep what still comes in, until it is closed."""
        self.secure()
        while not self._closing.wait(KEEP_EVERY_S):
            self._thin()
            self.secure()

    def _thin(self) -> None:
        """Let every second go where too many wait: a curve stays whole, at half its resolution.

        Only the thread that sends removes anything: what it is sending are the oldest.
        """
        with self._lock:
            if (count := len(self._waiting)) > MAX_WAITING:
                self._waiting = deque(islice(self._waiting, 0, None, 2))
                say(f"{count} {self._what} wait for MLflow: every second one was let go, to bound the memory")


def _may_pass(error: Exception) -> bool:
    """Return whether the same request may go through later: the server is out of reach, busy or broken.

    A login that is refused may pass too: somebody renews it. A 404 of a proxy is ENDPOINT_NOT_FOUND, and passes.
    """
    if isinstance(error, MlflowException):
        return error.error_code not in _REFUSALS
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _STORES


def first_line(error: Exception) -> str:
    """Return an error in a line, its end with it: that is where requests names the cause."""
    text = hide_passwords(f"{type(error).__name__}: {error}".partition("\n")[0])
    return text if len(text) <= 300 else f"{text[:120]} ... {text[-170:]}"

"""Which errors of an object store pass by themselves, and the patience for them: backoff with full jitter, bounded.

A try that fails in passing (5xx, throttled, reset, timed out, cut short) is made again; what the store has decided
(403, 404, 412, other 4xx) is raised at once, as it came. The clients' own retries are switched off in `stores`:
three layers of five tries each, of half a minute, would be an hour for one dead request.
"""

import errno
import logging
import random
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
_LOG = logging.getLogger(__name__)
_CHANCE = random.SystemRandom()  # not the global generator, which is a training's; nor one that forks would share


@dataclass(frozen=True, slots=True)
class Settings:
    """How patient we are. No try begins later than `total_s` after the first; a try itself ends by the two timeouts."""

    tries: int = 6
    total_s: float = 60.0
    first_s: float = 0.5  # the longest pause after the first try; it doubles with each, up to longest_s
    longest_s: float = 10.0
    connect_s: float = 10.0
    read_s: float = 30.0  # without one byte of an answer


settings = Settings()  # replaced by tests; read at each call

# 409 is another writer busy with the same key; S3 says try again. A body that arrived damaged is sent again, too.
TRANSIENT_CODES = frozenset({
    "SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "RequestTimeoutException", "OperationAborted",
    "ConditionalRequestConflict", "Throttling", "ThrottlingException", "ThrottledException", "TooManyRequests",
    "RequestThrottledException", "RequestLimitExceeded", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch",
})  # fmt: skip
TRANSIENT_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504, 509})
TRANSIENT_ERRNOS = frozenset({
    errno.EBUSY, errno.EAGAIN, errno.ETIMEDOUT, errno.EREMOTEIO, errno.EPIPE, errno.ECONNRESET, errno.ECONNREFUSED,
    errno.ECONNABORTED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.ENETRESET, socket.EAI_AGAIN,
})  # fmt: skip
# Most of these are no OSError. By name: who never raised one need not import its package.
TRANSIENT_TYPES = frozenset({
    "botocore.exceptions.ConnectionError", "botocore.exceptions.HTTPClientError",
    "botocore.exceptions.IncompleteReadError", "botocore.exceptions.ChecksumError",
    "botocore.exceptions.FlexibleChecksumError", "botocore.parsers.ResponseParserError",
    "aiohttp.client_exceptions.ClientConnectionError", "aiohttp.client_exceptions.ClientPayloadError",
    "http.client.IncompleteRead", "http.client.RemoteDisconnected", "urllib3.exceptions.ProtocolError",
    "urllib3.exceptions.TimeoutError",
})  # fmt: skip
# They descend from one of the above: a certificate does not mend itself, and an object that changed (which s3fs
# reports as EBUSY) does not change back.
PERMANENT_TYPES = frozenset({
    "botocore.exceptions.SSLError", "aiohttp.client_exceptions.ClientSSLError", "s3fs.utils.FileExpired",
})  # fmt: skip


def call(action: Callable[[], T], what: str) -> T:
    """Return what `action` returns, tried again while it fails in passing.

    Raises TransientError, which names `what` and the last error, when patience ends; any other error at once.
    """
    patience, began, number = settings, time.monotonic(), 0
    while True:
        number += 1
        try:
            return action()
        except Exception as error:
            if not is_transient(error):
                raise
            pause = _CHANCE.uniform(0, min(patience.longest_s, patience.first_s * 2 ** (number - 1)))
            spent = time.monotonic() - began
            if number >= patience.tries or spent + pause > patience.total_s:
                raise TransientError(number, spent, error, what) from error
            _LOG.info("%s: try %d failed and is made again in %.1f s: %s", what, number, pause, describe(error))
        time.sleep(pause)


def is_transient(error: BaseException) -> bool:
    """Return whether the same request may succeed a moment later. False for a TransientError: it has been tried."""
    types = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__}
    if isinstance(error, TransientError) or types & PERMANENT_TYPES:
        return False
    if types & TRANSIENT_TYPES:
        return True
    status, code = answer(error)
    if status or code:  # the store has spoken: what s3fs makes of it (EIO for each code that it does not know) is less
        return code in TRANSIENT_CODES or status in TRANSIENT_STATUSES
    if isinstance(error, (TimeoutError, ConnectionError)):
        return True
    return isinstance(error, OSError) and error.errno in TRANSIENT_ERRNOS


def answer(error: BaseException) -> tuple[int, str]:
    """Return the HTTP status and the code (as "SlowDown") with which a store refused, 0 and "" where it said none."""
    for link in _causes(error):
        response = getattr(link, "response", None)
        if isinstance(response, dict):  # botocore's ClientError, which s3fs keeps as the cause of its own error
            code = str(response.get("Error", {}).get("Code", ""))
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return int(status or (code if code.isdigit() else 0)), code
    for name in ("status", "status_code", "code"):  # of aiohttp, Azure and gcsfs; not of a cause, where aiohttp gives
        value = getattr(error, name, None)  # the code 400 to an answer of the store that broke off
        if isinstance(value, int) and 400 <= value < 600:
            return value, ""
    return 0, ""


def is_refused_condition(error: BaseException) -> bool:
    """Return whether a store refused because the object is not, or is, what the request made its condition."""
    status, code = answer(error)
    return status == 412 or code == "PreconditionFailed" or isinstance(error, FileExistsError)


def describe(error: BaseException) -> str:
    """Return kind and text of an error, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


class TransientError(OSError):
    """A store did not do what was asked, in passing, as often as we are ready to ask. Its cause is the last error."""

    def __init__(self, tries: int, seconds: float, last: BaseException | str, what: str) -> None:
        reason = last if isinstance(last, str) else describe(last)
        super().__init__(errno.EAGAIN, f"failed {tries} times in {seconds:.1f} s, the last time with {reason}", what)
        self._given = (tries, seconds, reason, what)

    def __reduce__(self) -> tuple[type["TransientError"], tuple[int, float, str, str]]:
        return type(self), self._given

"""Laws of pipelines.retries: what passes is tried again within bounds, what a store has decided is raised at once."""

import copy
import errno
import http.client
import socket
import statistics
from types import SimpleNamespace

import aiohttp
import pytest
from aiohttp.http_exceptions import ContentLengthError
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError
from fsspec.exceptions import FSTimeoutError
from s3fs.errors import ERROR_CODE_TO_EXCEPTION, translate_boto_error
from s3fs.utils import FileExpired

from pipelines import retries, storage
from pipelines.retries import Settings, TransientError, is_transient

URL = {"endpoint_url": "http://store"}


def s3(status, code):
    """The error that s3fs raises where the store answers with that status and code."""
    response = {"Error": {"Code": code, "Message": "m"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return translate_boto_error(boto.ClientError(response, "GetObject"))


def broken_off():
    error = aiohttp.ClientPayloadError("Response payload is not completed")
    error.__cause__ = ContentLengthError("Not enough data")  # which says 400, of no answer of the store
    return error


PASSES = [
    s3(503, "SlowDown"), s3(503, "ServiceUnavailable"), s3(503, "503"), s3(500, "InternalError"), s3(500, "500"),
    s3(502, "502"), s3(504, "504"), s3(504, "GatewayTimeout"), s3(429, "TooManyRequests"), s3(400, "RequestTimeout"),
    s3(409, "ConditionalRequestConflict"), s3(409, "OperationAborted"), s3(400, "IncompleteBody"),
    boto.EndpointConnectionError(**URL), boto.ConnectTimeoutError(**URL), boto.ReadTimeoutError(**URL),
    boto.ConnectionClosedError(**URL), boto.ResponseStreamingError(error="cut"), boto.HTTPClientError(error="?"),
    boto.IncompleteReadError(actual_bytes=1, expected_bytes=2), ResponseParserError("no XML"), broken_off(),
    aiohttp.ServerDisconnectedError(), aiohttp.ClientOSError(errno.ECONNRESET, "reset"), FSTimeoutError(),
    http.client.IncompleteRead(b""), ConnectionResetError(errno.ECONNRESET, "reset"), ConnectionRefusedError(),
    ConnectionAbortedError(), BrokenPipeError(), TimeoutError(), OSError(errno.ETIMEDOUT, "late"),
    OSError(errno.EBUSY, "busy"), OSError(errno.EREMOTEIO, "?"), socket.gaierror(socket.EAI_AGAIN, "again"),
    aiohttp.ClientResponseError(SimpleNamespace(real_url="u"), (), status=503),
]  # fmt: skip
STAYS = [
    s3(403, "AccessDenied"), s3(403, "403"), s3(403, "SignatureDoesNotMatch"), s3(403, "RequestTimeTooSkewed"),
    s3(404, "NoSuchKey"), s3(404, "404"), s3(404, "NoSuchBucket"), s3(404, "NoSuchUpload"), s3(412, "412"),
    s3(412, "PreconditionFailed"), s3(400, "InvalidArgument"), s3(400, "400"), s3(400, "ExpiredToken"),
    s3(416, "InvalidRange"), s3(405, "MethodNotAllowed"), s3(400, "a code that s3fs does not know"),
    s3(501, "NotImplemented"), FileExpired("a.png", "etag"), storage.Changed("a.png"), FileNotFoundError("a"),
    boto.SSLError(endpoint_url="u", error="certificate"), boto.NoCredentialsError(), FileExistsError("a"),
    boto.ParamValidationError(report="r"), OSError(errno.ENOSPC, "full"), PermissionError("a"), KeyError("a"),
    ValueError("a"), TransientError(6, 1.0, TimeoutError(), "a"), socket.gaierror(socket.EAI_NONAME, "no such host"),
    aiohttp.ClientResponseError(SimpleNamespace(real_url="u"), (), status=404),
]  # fmt: skip


@pytest.mark.parametrize("error", PASSES, ids=repr)
def test_what_passes_by_itself_is_transient(error):
    assert is_transient(error)


@pytest.mark.parametrize("error", STAYS, ids=repr)
def test_what_was_decided_or_is_our_own_fault_is_not(error):
    assert not is_transient(error)


def test_of_the_answers_that_s3fs_knows_those_of_4xx_stay_but_for_the_few_that_ask_for_another_try():
    codes = {code for code in ERROR_CODE_TO_EXCEPTION if is_transient(s3(400, code))}
    assert codes == {
        "SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "OperationAborted", "IncompleteBody",
        "BadDigest",
    }  # fmt: skip


class Clock:
    """Time that passes only in `sleep`, and `takes` seconds in each try."""

    def __init__(self, takes=0.0):
        self.now, self.takes, self.pauses = 100.0, takes, []

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.pauses.append(seconds)
        self.now += seconds


def fail(clock, *errors):
    left = list(errors)

    def action():
        clock.now += clock.takes
        if left:
            raise left.pop(0)
        return "done"

    return action


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(retries, "time", found)
    return found


def test_an_action_is_tried_until_it_succeeds(clock):
    assert retries.call(fail(clock, TimeoutError(), s3(503, "SlowDown"), ConnectionResetError()), "a") == "done"
    assert len(clock.pauses) == 3


def test_what_stays_is_raised_at_once_and_as_it_came(clock):
    error = s3(403, "AccessDenied")
    with pytest.raises(PermissionError) as caught:
        retries.call(fail(clock, TimeoutError(), error, TimeoutError()), "a")
    assert caught.value is error and len(clock.pauses) == 1


def test_the_number_of_tries_is_bounded_and_the_error_tells_what_how_often_and_why(clock):
    last = s3(503, "SlowDown")
    with pytest.raises(storage.TransientError) as caught:
        retries.call(fail(clock, *[TimeoutError()] * 5, last, KeyError("a seventh try")), "bucket/a.png")
    assert isinstance(caught.value, OSError) and caught.value.__cause__ is last
    assert "failed 6 times in" in str(caught.value) and "'bucket/a.png'" in str(caught.value)
    assert caught.value.filename == "bucket/a.png" and len(clock.pauses) == 5


def test_no_try_begins_after_the_time_is_up(monkeypatch):
    for takes, tries in ((31.0, 2), (7.0, 9), (61.0, 1)):
        clock = Clock(takes)
        monkeypatch.setattr(retries, "time", clock)
        monkeypatch.setattr(retries, "settings", Settings(tries=100, total_s=60.0, first_s=0.0))
        with pytest.raises(TransientError, match=f"failed {tries} times"):
            retries.call(fail(clock, *[TimeoutError()] * 100), "a")
        assert clock.now - 100 <= 60 + takes


def test_pauses_grow_from_the_first_to_the_longest_with_full_jitter(monkeypatch):
    patience = Settings(tries=7, total_s=1e9, first_s=0.5, longest_s=4.0)
    monkeypatch.setattr(retries, "settings", patience)
    rounds = []
    for _ in range(400):
        clock = Clock()
        monkeypatch.setattr(retries, "time", clock)
        with pytest.raises(TransientError):
            retries.call(fail(clock, *[TimeoutError()] * 7), "a")
        rounds.append(clock.pauses)
    for pauses, longest in zip(zip(*rounds, strict=True), (0.5, 1.0, 2.0, 4.0, 4.0, 4.0), strict=True):
        # Uniform over [0, longest]: a mean of 400 lies within 5 standard errors, 5 longest / sqrt(12 * 400).
        assert statistics.fmean(pauses) == pytest.approx(longest / 2, abs=0.073 * longest)
        assert 0 <= min(pauses) < 0.1 * longest and 0.9 * longest < max(pauses) <= longest


def test_calls_within_calls_do_not_multiply(clock):
    asked = []

    def inner():
        asked.append(1)
        raise TimeoutError

    with pytest.raises(TransientError):
        retries.call(lambda: retries.call(inner, "inner"), "outer")
    assert len(asked) == Settings().tries


def test_the_error_survives_the_way_between_processes():
    error = TransientError(6, 12.34, s3(503, "SlowDown"), "bucket/a.png")
    twin = copy.copy(error)
    assert (type(twin), str(twin), twin.errno, twin.filename) == (
        TransientError,
        str(error),
        errno.EAGAIN,
        "bucket/a.png",
    )

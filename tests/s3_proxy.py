"""A proxy that stands in front of the S3 server and breaks what a rule tells it to break, as networks and stores do.

    with s3_proxy.serve(s3.endpoint_url, lambda method, path, count: "busy" if count == 3 else "pass") as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint_url)

The Host header goes through as it came: the signatures of the requests are of it, and the server checks them.
"""

import contextlib
import http.client
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

# pass   the request and its answer go through
# busy   503 SlowDown                       error    500 InternalError              denied  403 AccessDenied
# reset  the connection is reset instead of an answer; the server has not seen the request
# lost   the server carries the request out, then the connection is reset
# cut    the answer ends in the middle of its body (of a body of one byte or none: before it)
# slow   the request waits for `slow_s`, then goes through
FAULTS = ("pass", "busy", "error", "denied", "reset", "lost", "cut", "slow")
REFUSALS = {"busy": (503, "SlowDown"), "error": (500, "InternalError"), "denied": (403, "AccessDenied")}
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "expect"}

Rule = Callable[[str, str, int], str]


class Proxy(ThreadingHTTPServer):
    """`rule(method, path, count)` names the fault of a request; `seen` has (method, path, fault) of each, in order."""

    daemon_threads = True

    def __init__(self, upstream: str, rule: Rule, slow_s: float) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        place = urlsplit(upstream)
        self.upstream = (place.hostname or "", place.port or 80)
        self.endpoint_url = f"http://127.0.0.1:{self.server_address[1]}"
        self.rule, self.slow_s = rule, slow_s
        self.seen: list[tuple[str, str, str]] = []
        self.closing, self._lock = threading.Event(), threading.Lock()

    def fault(self, method: str, path: str) -> str:
        with self._lock:
            fault = self.rule(method, path, len(self.seen))
            assert fault in FAULTS, fault
            self.seen.append((method, path, fault))
        return fault

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up, or a server that is gone, is no news here."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def relay(self) -> None:
        body = self._body()
        fault = self.server.fault(self.command, self.path)
        if fault in REFUSALS:
            return self._refuse(*REFUSALS[fault])
        if fault == "reset":
            return self._reset()
        if fault == "slow":
            self.server.closing.wait(self.server.slow_s)
        status, reason, headers, content = self._ask(body)
        if fault == "lost":
            return self._reset()
        self._answer(status, reason, headers, content, cut=fault == "cut")

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = relay

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while length := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(length))
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            pass
        return b"".join(pieces)

    def _ask(self, body: bytes) -> tuple[int, str, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(*self.server.upstream, timeout=60)
        with contextlib.closing(connection):
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in HOP_BY_HOP | {"content-length"}:
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.reason, answer.getheaders(), answer.read()

    def _answer(self, status: int, reason: str, headers: list[tuple[str, str]], content: bytes, *, cut: bool) -> None:
        self.send_response_only(status, reason)
        for name, value in headers:
            if name.lower() not in HOP_BY_HOP | ({"content-length"} if self.command != "HEAD" else set()):
                self.send_header(name, value)
        if self.command != "HEAD" and status not in (204, 304):
            self.send_header("Content-Length", str(len(content)))
        if cut and len(content) < 2:
            return self._reset()
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection |= cut

    def _refuse(self, status: int, code: str) -> None:
        body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>injected</Message></Error>'.encode()
        content = b"" if self.command == "HEAD" else body
        self._answer(status, "Refused", [("Content-Type", "application/xml")], content, cut=False)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.wfile.close()
        self.connection.close()  # with a linger of 0: RST, not FIN
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


def randomly(share: float, *, seed: int, faults: Sequence[str] = ("busy", "error", "reset", "lost", "cut")) -> Rule:
    """Return a rule that gives that share of the requests one of the faults; the n-th request's is always the same."""

    def rule(method: str, path: str, count: int) -> str:
        chance = random.Random(f"{seed} {count}")
        return chance.choice(faults) if chance.random() < share else "pass"

    return rule


@contextlib.contextmanager
def serve(upstream: str, rule: Rule, *, slow_s: float = 30.0) -> Iterator[Proxy]:
    """A proxy before `upstream`, for as long as the block runs. `proxy.rule` may be replaced at any time."""
    proxy = Proxy(upstream, rule, slow_s)
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.closing.set()
        proxy.shutdown()
        thread.join()
        proxy.server_close()

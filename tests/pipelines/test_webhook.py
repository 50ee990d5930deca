"""Laws of pipelines.webhook: one POST that the other side can verify; what goes wrong is said, and harms nothing."""

import hashlib
import hmac
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pipelines import webhook

DOCUMENT = {"event": "promoted", "model": "diffsr", "now": 2, "checks": [{"text": "ä ± ≥"}]}


class Receiver:
    """A real HTTP server: `answers` are given one by one, the last one on and on; `requests` are what came."""

    def __init__(self):
        self.answers, self.requests, self.location = [200], [], ""
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.requests.append((self.command, self.path, dict(self.headers), body))
                answers = receiver.answers
                answer = answers.pop(0) if len(answers) > 1 else answers[0]
                if answer == "hang":
                    receiver.released.wait(20)
                    return
                if answer == "garbage":
                    self.wfile.write(b"what?\r\n\r\n")
                    return
                self.send_response(answer)
                if receiver.location:
                    self.send_header("Location", receiver.location)
                self.end_headers()

            def do_GET(self):
                receiver.requests.append(("GET", self.path, {}, b""))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *words):
                pass

        self.released = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hooks/s3cr3t?token=abc"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def receiver(monkeypatch):
    monkeypatch.setattr(webhook, "PAUSE_S", 0.01)
    monkeypatch.setattr(webhook, "TIMEOUT_S", 1.0)
    monkeypatch.delenv("DIFFSR_WEBHOOK_SECRET", raising=False)
    found = Receiver()
    yield found
    found.released.set()
    found.server.shutdown()
    found.server.server_close()


def test_one_post_of_the_document_as_json(receiver, capsys):
    assert webhook.send(receiver.url, DOCUMENT)
    [(method, path, headers, body)] = receiver.requests
    assert (method, path) == ("POST", "/hooks/s3cr3t?token=abc") and json.loads(body) == DOCUMENT
    assert headers["Content-Type"] == "application/json" and "X-Diffsr-Signature" not in {*map(str.title, headers)}
    assert capsys.readouterr().err == ""


def test_a_secret_signs_the_very_bytes_that_are_sent(receiver, monkeypatch):
    monkeypatch.setenv("DIFFSR_WEBHOOK_SECRET", "Jefe")
    assert webhook.send(receiver.url, DOCUMENT)
    [(_, _, headers, body)] = receiver.requests
    signature = next(value for name, value in headers.items() if name.lower() == "x-diffsr-signature")
    assert signature == "sha256=" + hmac.new(b"Jefe", body, hashlib.sha256).hexdigest()
    # RFC 4231, test case 2.
    known = "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
    assert webhook.signature(b"what do ya want for nothing?", "Jefe") == known


@pytest.mark.parametrize("passing", [500, 503, 429, "hang"])
def test_what_fails_in_passing_is_tried_again(receiver, passing):
    receiver.answers = [passing, 204]
    assert webhook.send(receiver.url, DOCUMENT)
    assert len(receiver.requests) == 2 and receiver.requests[0][3] == receiver.requests[1][3]


@pytest.mark.parametrize(
    ("answer", "tries", "why"),
    [(503, 3, "HTTP 503"), (404, 1, "HTTP 404"), (401, 1, "HTTP 401"), ("garbage", 1, "BadStatusLine")],
)
def test_what_goes_on_failing_is_a_warning_that_keeps_the_address_secret(receiver, capsys, answer, tries, why):
    receiver.answers = [answer]
    assert not webhook.send(receiver.url, DOCUMENT)
    said = capsys.readouterr().err
    assert len(receiver.requests) == tries and said.startswith("warning: webhook at http://127.0.0.1:")
    assert why in said and "s3cr3t" not in said and "abc" not in said and said.count("\n") == 1


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirection_is_not_followed_as_it_would_lose_the_body(receiver, capsys, code):
    receiver.answers, receiver.location = [code], receiver.url
    assert not webhook.send(receiver.url, DOCUMENT)
    assert [request[0] for request in receiver.requests] == ["POST"] and f"HTTP {code}" in capsys.readouterr().err


def test_a_host_that_is_not_there_is_a_warning_after_three_tries(monkeypatch, capsys):
    monkeypatch.setattr(webhook, "PAUSE_S", 0.01)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert not webhook.send(f"http://127.0.0.1:{port}/", DOCUMENT)
    said = capsys.readouterr().err
    assert "ConnectionRefusedError, try 3" in said


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "ftp://host/x", "host/path", "", "http://", "https:///path", "http://[::1/", "http://a b/",
     "http://host:99999/", "http://host:x/", "http://host:0/", "http://host/\n", "http://höst/", "http://me:pw@host/"],
)  # fmt: skip
def test_only_an_http_address_without_a_password_is_one(url):
    with pytest.raises(ValueError, match=r"^webhook \(.*must.*; ") as found:
        webhook.check_webhook(url)
    assert "pw" not in str(found.value) and "passwd" not in str(found.value)


def test_an_http_address_is_one():
    for url in (None, "http://127.0.0.1:8080/x?y=z", "https://hooks.example.com", "http://[::1]:80/"):
        webhook.check_webhook(url)

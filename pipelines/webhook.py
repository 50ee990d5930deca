"""Telling another program of a verdict: one POST of JSON, signed where there is a secret. It never fails a job."""

import hmac
import json
import os
import time
from collections.abc import Mapping
from email.message import Message
from hashlib import sha256
from http.client import HTTPException
from typing import IO, Any, NoReturn
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from pipelines import retries
from pipelines.config import check
from pipelines.engine import say

SECRET = "DIFFSR_WEBHOOK_SECRET"  # environment variable
SIGNATURE = "X-DiffSR-Signature"  # header: "sha256=" and the HMAC-SHA256 of the body, in hex
TRIES = 3
TIMEOUT_S = 10.0  # without one byte of an answer
PAUSE_S = 1.0  # after the first try; it doubles


def check_webhook(url: str | None) -> None:
    """Raise ValueError for what is no http(s) address. The address itself is not shown: it may be a secret."""
    if url is None:
        return
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        fits = fits and url.isascii() and url.isprintable() and " " not in url
    except ValueError:
        fits = False
    shown = url.partition(":")[0][:20]
    check(fits, "webhook", f"{shown}:...", "must be an http or https address", "use https://HOST/PATH")
    check("@" not in parts.netloc, "webhook", f"{shown}:...", "must carry no user or password",
          f"sign the body instead: set {SECRET}")  # fmt: skip


def place_of(url: str) -> str:
    """Return scheme, host and port of an address: the path and the query of a hook are often its secret."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def send(url: str, document: Mapping[str, Any]) -> bool:
    """POST the document as JSON; return whether the other side took it (2xx). What fails is said, never raised.

    What fails in passing is tried again, three times in all: the other side may hear of the same verdict twice, and
    knows it by the run_id in it. A redirection is not followed: it would turn the POST into a GET.
    """
    body = json.dumps(document).encode()
    headers = {"Content-Type": "application/json", "User-Agent": "diffsr"}
    if secret := os.environ.get(SECRET):
        headers[SIGNATURE] = f"sha256={signature(body, secret)}"
    opener = build_opener(_NoRedirect)
    for number in range(1, TRIES + 1):
        try:
            with opener.open(Request(url, data=body, headers=headers, method="POST"), timeout=TIMEOUT_S):
                return True
        except (OSError, HTTPException, ValueError) as error:
            reason = getattr(error, "reason", None)  # of a URLError: what the socket said
            cause = reason if isinstance(reason, Exception) else error
            if number < TRIES and retries.is_transient(cause):
                time.sleep(PAUSE_S * 2 ** (number - 1))
                continue
            why = f"HTTP {error.code}" if isinstance(error, HTTPError) else type(cause).__name__
            say(f"warning: webhook at {place_of(url)} took no verdict ({why}, try {number}); the verdict stands")
            return False
    raise AssertionError("the last try returns")


def signature(body: bytes, secret: str) -> str:
    """Return the HMAC-SHA256 of a body in hex (RFC 2104)."""
    return hmac.new(secret.encode(), body, sha256).hexdigest()


class _NoRedirect(HTTPRedirectHandler):
    def redirect_request(self, req: Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str) -> NoReturn:
        raise HTTPError(req.full_url, code, msg, headers if isinstance(headers, Message) else Message(), fp)

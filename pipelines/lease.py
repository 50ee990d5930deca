"""The right to write one output: `<output>/_diffsr/lease.json` and one file per fence under `fences/`.

A run creates the next fence file (create-if-absent decides a race) and renews lease.json while it lives. Both hold the
same document; lease.json counts when it is of the newest fence, otherwise the holder of that fence is just entering.
A lease that is not renewed in time is dead, and at once when its process was one of this machine (the same boot and
pid namespace: containers share host names and pids) and is gone or another by now. A newer fence shuts an older holder
out: it asks `check` before each write to the ledger, and its workers ask a `Fence` before they replace an object.

A store may refuse to create what is there and still let two through that ask at the same moment (Swift does): the
last stays. So on a store the fence is read again after a moment and with each check, and must hold our document.
Whether the store refuses at all is tried out once per output and kept in store.json, as {"conditional_create": true};
where it does not, each run says what to do about it.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from pipelines import storage
from pipelines.engine import say

SETTLE_S = 1.0  # after which a fence on a store is read again; a rival's request has ended by then, or meets ours
KEPT_FENCES = 16  # of which only the newest counts; the others show a person who held the output before

Content = bytes | str | os.PathLike[str]


def publish_fenced(uri: str, content: Content, fence: "Fence") -> None:
    """Store `content` (bytes, or the path of a local file, which is streamed) as `publish` does, under a fence.

    A first publish is create-if-absent and needs no more. What replaces an object, or is too large for a store to
    create (CREATE_BYTES), is written after a look at the fence. Raises LeaseHeld, with nothing written, where a newer
    run has the output; OSError as `publish`.
    """
    if isinstance(content, bytes):
        creatable = len(content) <= storage.CREATE_BYTES or storage.is_local(uri)
        if not (creatable and storage.create(uri, content)):
            fence.check()
            storage.publish(uri, content)
    else:
        creatable = os.stat(content).st_size <= storage.CREATE_BYTES or storage.is_local(uri)
        if not (creatable and storage.create_file(uri, content)):
            fence.check()
            storage.publish_file(uri, content)


class LeaseHeld(RuntimeError):
    """Another run holds the output."""


@dataclass(frozen=True, slots=True)
class Fence:
    """What a worker needs to know of the lease under which it works: the output and the number of the fence."""

    output: str
    fence: int

    def check(self) -> None:
        """Raise LeaseHeld when a newer fence exists. Costs a listing of a few names."""
        root = storage.join(self.output, storage.OWN_FOLDER)
        if (newest := _newest(root)) > self.fence:
            raise LeaseHeld(
                f"fence {self.fence} of {root} is no longer the newest ({newest} is); the newer run goes on"
            )


class Lease:
    """A context manager that takes the lease, renews it every expiry_s / 4 and gives it back.

    Raises LeaseHeld on entry when another run is alive. `fence` grows by one with each holder. Who follows a holder
    that was killed also removes the half-written files that it left in the output.
    """

    def __init__(self, output: str, *, run_id: str, expiry_s: float = 60.0) -> None:
        self.output = output
        self.root = storage.join(output, storage.OWN_FOLDER)
        self.run_id, self.expiry_s = run_id, expiry_s
        self.fence = 0
        self._uri = storage.join(self.root, "lease.json")
        self._token = secrets.token_hex(8)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "Lease":
        # The fence before the holder: whoever enters between the two has created the very fence that we then ask for.
        newest = self._newest()
        last = self._last()
        held = _alive(last)
        if held is not None:
            raise LeaseHeld(
                f"output ({self.root}) is held by run {held['run_id']} on {held['host']}, process {held['pid']}; "
                f"wait for it to end (its lease runs {held['expires'] - time.time():.0f} s unless renewed)"
            )
        self._warn_of_a_store_that_replaces()  # before anything is taken: it may fail
        self.fence = newest + 1
        document = self._document(expires=time.time() + self.expiry_s)
        # False may come from our own request, sent again after a lost answer (S3): then what is there is ours.
        if not storage.create(self._fence_uri(self.fence), document) and self._read(self.fence) != document:
            raise LeaseHeld(f"output ({self.root}) was taken by another run at this moment; wait for it to end")
        if not storage.is_local(self.root):
            time.sleep(SETTLE_S)
            if not self._is_ours():
                raise LeaseHeld(f"output ({self.root}) was taken by another run at this moment; wait for it to end")
        if self._newest() > self.fence:  # we have slept since our first look, and old fences have been removed
            storage.delete(self._fence_uri(self.fence))
            raise LeaseHeld(f"output ({self.root}) was taken by another run meanwhile; wait for it to end")
        storage.publish(self._uri, document)
        self._thread.start()
        if last and last["expires"]:  # it was never given back: its holder may have died in the middle of a file
            storage.sweep(self.output)
        self._forget_old_fences()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        if self._newest() == self.fence and self._is_ours():
            storage.publish(self._uri, self._document(expires=0.0))

    def holder(self) -> dict[str, Any] | None:
        """Return the document of a live lease, or None."""
        return _alive(self._last())

    def check(self) -> None:
        """Raise LeaseHeld when another run has taken over."""
        if self._newest() != self.fence or not self._is_ours():
            raise LeaseHeld(f"run {self.run_id} lost its lease on {self.root}; the newer run goes on")

    def _forget_old_fences(self) -> None:
        with contextlib.suppress(OSError):  # what may not be removed harms nobody
            for fence in _fences(self.root):
                if fence <= self.fence - KEPT_FENCES:
                    storage.delete(self._fence_uri(fence))

    def _warn_of_a_store_that_replaces(self) -> None:
        if storage.is_local(self.root):
            return
        uri = storage.join(self.root, "store.json")
        if storage.exists(uri):
            honoured = json.loads(storage.read_bytes(uri))["conditional_create"]
        else:
            honoured = storage.honours_create(self.root)
            storage.publish(uri, json.dumps({"conditional_create": honoured}).encode())
        if not honoured:
            say(
                f"warning: the store of {self.output} replaces an object that was to be created only if absent "
                "(If-None-Match: *), so two runs that start at the same moment are not kept apart; let one scheduler "
                f"start one run at a time, or use a store that honours it, then remove {uri}"
            )

    def _newest(self) -> int:
        return _newest(self.root)

    def _is_ours(self) -> bool:
        """Return whether the document in our fence file is ours; a local one that is newest cannot be another's."""
        return storage.is_local(self.root) or json.loads(self._read(self.fence))["token"] == self._token

    def _last(self) -> dict[str, Any] | None:
        """Return the document of the newest holder, alive or not; None before the first."""
        newest = self._newest()
        if not newest:
            return None
        document: dict[str, Any] = json.loads(storage.read_bytes(self._uri)) if storage.exists(self._uri) else {}
        return document if document.get("fence") == newest else json.loads(self._read(newest))

    def _fence_uri(self, fence: int) -> str:
        return storage.join(self.root, "fences", f"{fence:010d}")

    def _read(self, fence: int) -> bytes:
        return storage.read_bytes(self._fence_uri(fence))

    def _document(self, *, expires: float) -> bytes:
        document = {
            "run_id": self.run_id,
            "fence": self.fence,
            "expires": expires,
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
            "token": self._token,
        }
        return json.dumps(document).encode()

    def _beat(self) -> None:
        while not self._stop.wait(self.expiry_s / 4):
            try:
                if self._newest() != self.fence or not self._is_ours():
                    return
                storage.publish(self._uri, self._document(expires=time.time() + self.expiry_s))
            except OSError as error:  # a store that is away for a moment must not end the renewal for good
                say(f"lease: {self._uri} could not be renewed and is tried again: {error}")


def _fences(root: str) -> list[int]:
    return [int(name) for name in storage.list_names(storage.join(root, "fences"))]


def _newest(root: str) -> int:
    return max(_fences(root), default=0)


def _machine() -> str:
    """Return the boot of this kernel and our pid namespace in it, "" where /proc does not tell both."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> int | None:
    """Return when a process started, in clock ticks since the boot; None where /proc does not tell."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])  # field 22; the second, a name in brackets, may hold anything


def _alive(document: dict[str, Any] | None) -> dict[str, Any] | None:
    return document if document and document["expires"] > time.time() and not _is_gone(document) else None


def _is_gone(holder: dict[str, Any]) -> bool:
    """Return whether the holder was a process that this one could see, and has ended. When in doubt it has not."""
    if holder["host"] != socket.gethostname() or not holder.get("machine") or holder["machine"] != _machine():
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's
        pass
    return _started(holder["pid"]) not in (None, holder["started"])

"""The right to write one output: `<output>/_diffsr/lease.json` and one file per fence under `fences/`.

A run creates the next fence file (create-if-absent decides a race) and renews lease.json while it lives. A lease that
is not renewed in time is dead, and at once when its process was on this machine and is gone. A newer fence shuts an
older holder out: it asks `check` before each write to the ledger.
"""

import json
import os
import socket
import threading
import time
from types import TracebackType
from typing import Any

from pipelines import storage


class LeaseHeld(RuntimeError):
    """Another run holds the output."""


class Lease:
    """A context manager that takes the lease, renews it every expiry_s / 4 and gives it back.

    Raises LeaseHeld on entry when another run is alive. `fence` grows by one with each holder.
    """

    def __init__(self, output: str, *, run_id: str, expiry_s: float = 60.0) -> None:
        self.root = storage.join(output, "_diffsr")
        self.run_id, self.expiry_s = run_id, expiry_s
        self.fence = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "Lease":
        held = self.holder()
        if held is not None:
            raise LeaseHeld(
                f"output ({self.root}) is held by run {held['run_id']} on {held['host']}, process {held['pid']}; "
                f"wait for it to end (its lease runs {held['expires'] - time.time():.0f} s unless renewed)"
            )
        self.fence = self._newest() + 1
        if not storage.create(storage.join(self.root, "fences", f"{self.fence:010d}"), self.run_id.encode()):
            raise LeaseHeld(f"output ({self.root}) was taken by another run at this moment; wait for it to end")
        self._write(expires=time.time() + self.expiry_s)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        if self._newest() == self.fence:
            self._write(expires=0.0)

    def holder(self) -> dict[str, Any] | None:
        """Return the document of a live lease, or None."""
        uri = storage.join(self.root, "lease.json")
        if not storage.exists(uri):
            return None
        document: dict[str, Any] = json.loads(storage.read_bytes(uri))
        if document["expires"] <= time.time():
            return None
        here = document["host"] == socket.gethostname()
        return None if here and not _alive(int(document["pid"])) else document

    def check(self) -> None:
        """Raise LeaseHeld when another run has taken over."""
        if self._newest() != self.fence:
            raise LeaseHeld(f"run {self.run_id} lost its lease on {self.root}; the newer run goes on")

    def _newest(self) -> int:
        return max(map(int, storage.list_names(storage.join(self.root, "fences"))), default=0)

    def _write(self, *, expires: float) -> None:
        document = {
            "run_id": self.run_id,
            "fence": self.fence,
            "expires": expires,
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        storage.publish(storage.join(self.root, "lease.json"), json.dumps(document).encode())

    def _beat(self) -> None:
        while not self._stop.wait(self.expiry_s / 4):
            if self._newest() != self.fence:
                return
            self._write(expires=time.time() + self.expiry_s)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

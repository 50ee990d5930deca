"""Sidecars: `<result>.json` beside each result says where it comes from, what made it, and how good it is.

It says all that a receipt does, so a result whose receipt was lost can be taken up again (`verify`, or the next run).
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from pipelines import storage

UNCERTAINTY = ".uncertainty.png"  # behind the key of a result: its map, 16-bit grey


class Written(NamedTuple):
    """A file that is to be published: SHA-256 and size."""

    sha256: str
    bytes: int


def uncertainty_key(out_key: str) -> str:
    """Return the key of a result's uncertainty map."""
    return out_key + UNCERTAINTY


def describe(out_key: str, files: Mapping[str, Written]) -> dict[str, Any]:
    """Return what a sidecar says of the files of a result, by key: the image at out_key, and its map if any."""
    described: dict[str, Any] = {"key": out_key, "sha256": files[out_key].sha256, "bytes": files[out_key].bytes}
    if (beside := uncertainty_key(out_key)) in files:
        described["uncertainty"] = {"key": beside, "sha256": files[beside].sha256}
    return described


class Sidecar:
    """A sidecar's document. Raises LookupError, TypeError or ValueError for one that is not of our shape."""

    def __init__(self, document: dict[str, Any]) -> None:
        source, output = document["source"], document["output"]
        self.source_key, self.etag = str(source["key"]), str(source["etag"])
        self.size, self.source_sha256 = int(source["size"]), str(source["sha256"])
        self.out_key, self.out_sha256, self.out_bytes = str(output["key"]), str(output["sha256"]), int(output["bytes"])
        self.model, self.fingerprint = str(document["model"]["digest"]), str(document["fingerprint"])
        self.metrics = {str(name): float(value) for name, value in document["metrics"].items()}
        self.verdict, self.message = str(document["quality"]["verdict"]), str(document["quality"]["message"])
        beside = output.get("uncertainty")
        self.files = {self.out_key: self.out_sha256}
        if beside is not None:
            self.files[str(beside["key"])] = str(beside["sha256"])

    @property
    def keys(self) -> set[str]:
        """The objects that it speaks for."""
        return set(self.files)

    def outcome(self) -> dict[str, Any]:
        """Return the fields of a receipt that says that this result is done."""
        verdict = "" if self.verdict == "pass" else self.verdict
        return {"status": "done", "out_key": self.out_key, "out_sha256": self.out_sha256, "out_bytes": self.out_bytes,
                "metrics": self.metrics, "stage": "quality" if verdict else "", "reason": verdict,
                "message": self.message}  # fmt: skip


def read_sidecar(uri: str) -> Sidecar | None:
    """Return the sidecar of the result at `uri`, None where it is missing, damaged or somebody else's."""
    try:
        return Sidecar(json.loads(storage.read_bytes(f"{uri}.json")))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None
    except (ValueError, LookupError, TypeError, RecursionError, AttributeError):  # not JSON, or not of our shape
        return None

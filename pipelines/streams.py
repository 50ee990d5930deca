"""Contents that are read from their beginning to their end, and are those of the etag they were listed with."""

import contextlib
import errno
import hashlib
import io
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from fsspec.implementations.local import LocalFileSystem

from pipelines import retries
from pipelines.stores import Changed, Uri, open_filesystem, open_object

CHUNK_BYTES = 1 << 20
_BLOCK_BYTES = 4 << 20  # of one request to an object store


@dataclass(frozen=True, slots=True)
class StoredObject:
    """One listed object: `key` is its path under the listed root, with "/"; `etag` changes with its bytes; `size` is
    in bytes. A local file's etag is the BLAKE2b-128 of its content, or "unreadable" where it could not be read.
    """

    key: str
    etag: str
    size: int


def read_listed(uri: Uri, etag: str) -> bytes:
    """Return the content of an object that was listed with `etag`. Raises Changed, FileNotFoundError or OSError."""
    return b"".join(stream_listed(uri, etag))


def stream_listed(uri: Uri, etag: str | None) -> Iterator[bytes]:
    """Yield the content in pieces of 1 MiB; None: whatever its etag is now. Raises Changed, FileNotFoundError, OSError.

    Changed is raised before the first piece where the store names an etag (what follows is then of that etag, also
    after a broken connection, or ends in Changed), after the last one where only the content tells: what was yielded
    counts when the iterator has ended.
    """
    file, found, digest = _open_stream(uri)
    with file:
        if found is None or etag is None or found == etag:
            while piece := file.read(CHUNK_BYTES):
                digest.update(piece)
                yield piece
            found = found or digest.hexdigest()
    if etag is not None and found != etag:
        raise Changed(f"{os.fspath(uri)} was listed with etag {etag} and has {found} now")


def look_up(uri: Uri) -> StoredObject:
    """Return one object as a listing would, its key the URI; etag "unreadable" and size 0 where it cannot be read."""
    with contextlib.suppress(OSError, ValueError, ImportError):  # gone, a folder, a bad name, no package for its kind
        file, etag, digest = _open_stream(uri)
        with file:
            if etag is not None:
                return StoredObject(os.fspath(uri), etag, int(file.details["size"]))  # type: ignore[attr-defined]
            length = 0
            while piece := file.read(CHUNK_BYTES):
                digest.update(piece)
                length += len(piece)
        return StoredObject(os.fspath(uri), digest.hexdigest(), length)
    return StoredObject(os.fspath(uri), "unreadable", 0)


def named_etag(info: dict[str, Any]) -> str | None:
    """Return the etag in what a store says of an object, None where it names none."""
    etag = info.get("ETag") or info.get("etag")
    return str(etag).strip('"') if etag else None


def _open_stream(uri: Uri) -> tuple[IO[bytes], str | None, Any]:
    """Return an object opened for one reading, the etag that its store names (None: its content tells), and the hash
    that is the etag of such a content."""
    filesystem, path = open_filesystem(uri)
    if isinstance(filesystem, LocalFileSystem):
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would block for ever, /dev/zero never end
            raise OSError(errno.EINVAL, "is no regular file", path)
        return open(path, "rb"), None, hashlib.blake2b(digest_size=16)
    if "memory" in filesystem.protocol:  # its files are shared, their position too
        return io.BytesIO(retries.call(lambda: filesystem.cat_file(path), path)), None, hashlib.sha256()
    file: Any = open_object(filesystem, path, block_bytes=_BLOCK_BYTES)
    if file.details["type"] != "file":
        raise IsADirectoryError(errno.EISDIR, "is a folder", path)
    return file, named_etag(file.details), hashlib.sha256()

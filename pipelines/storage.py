"""Objects behind URIs: list, read, publish atomically, create if absent. Folders of this machine and s3:// alike.

A URI is a local path (absolute, relative or `file://`), `s3://bucket/prefix`, or anything else that fsspec opens. It
is taken literally: no `~`, no globs, no fsspec chains, so any name that a listing yields can be read back. S3
endpoint and credentials come from the environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...). Nothing is cached:
what another process has written is seen by the next call. A store that fails in passing is asked again (`retries`);
when it goes on failing, each function here that asks one raises TransientError, which is an OSError.
"""

import contextlib
import hashlib
import io
import os
import secrets
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO

from fsspec.implementations.local import LocalFileSystem

from pipelines import retries
from pipelines.listing import OWN_FOLDER, list_other, names_other, names_s3
from pipelines.listing import list_local as _list_local
from pipelines.listing import list_s3 as _list_s3
from pipelines.local_files import TEMPORARY, sweep_local
from pipelines.local_files import put_local as _put_local
from pipelines.retries import TransientError
from pipelines.stores import Changed, Uri, is_local, is_s3, open_filesystem, open_object
from pipelines.streams import StoredObject, look_up, read_listed, stream_listed
from pipelines.transfers import PART_BYTES, create_other, fetch, upload, upload_file
from pipelines.transfers import create_s3 as _create_s3

__all__ = [
    "CREATE_BYTES", "OWN_FOLDER", "Changed", "StoredObject", "TransientError", "Uri", "absolute", "content_etag",
    "create", "create_file", "delete", "digest_bytes", "exists", "honours_create", "is_folder", "is_local", "join",
    "list_names", "list_objects", "look_up", "open_file", "open_filesystem", "publish", "publish_file", "read_bytes",
    "read_listed", "size", "stream_listed", "sweep",
]  # fmt: skip

CREATE_BYTES = PART_BYTES  # of the largest object that a store creates only where there is nothing


def join(uri: Uri, *parts: str) -> str:
    """Return `uri` with `parts` below it, each a literal name or key. Raises ValueError for a part with ".."."""
    joined = os.fspath(uri)
    for part in parts:
        if ".." in part.split("/"):
            raise ValueError(f"part={part!r}: must not contain '..', it would leave {uri}; rename the object")
        joined = f"{joined.rstrip('/')}/{part}"
    return joined


def absolute(uri: Uri) -> str:
    """Return a URI that means the same in every process: a relative local path becomes absolute."""
    text = os.fspath(uri)
    return text if "://" in text else os.path.abspath(text)


def list_objects(uri: Uri, *, suffixes: frozenset[str] | None = None) -> Iterator[StoredObject]:
    """Return an iterator over the objects below `uri`, in a fixed order, streamed folder by folder or page by page.

    Only names that end in one of `suffixes` (".png", either case) are hashed and yielded, all if None. Our own folder
    at the top, our temporary files, S3 folder markers, and what is no regular file are left out. Symbolic links are
    followed, but each real folder is listed once. Raises ValueError at the call for a root that is not there.
    """
    wanted = tuple(suffix.lower() for suffix in suffixes) if suffixes is not None else ("",)
    if not all(suffix.startswith(".") for suffix in suffixes or ()):
        raise ValueError(f"suffixes={sorted(suffixes or ())}: each must begin with a dot, like '.png'")
    filesystem, root = open_filesystem(uri)
    if isinstance(filesystem, LocalFileSystem):
        found = _list_local(root, wanted) if os.path.isdir(root) else None
    elif is_s3(filesystem):
        found = _list_s3(filesystem, root, wanted)
    else:
        is_folder = retries.call(partial(filesystem.isdir, root), root)
        found = list_other(filesystem, root, wanted) if is_folder else None
    if found is None:
        raise ValueError(f"uri={os.fspath(uri)!r}: must be a folder or prefix that exists; create it or correct it")
    return found


def read_bytes(uri: Uri) -> bytes:
    """Return the content of one object, of one moment. Raises FileNotFoundError."""
    filesystem, path = open_filesystem(uri)
    return Path(path).read_bytes() if isinstance(filesystem, LocalFileSystem) else fetch(filesystem, path)


def open_file(uri: Uri, *, block_bytes: int = 5 * 2**20) -> IO[bytes]:
    """Return an object opened for reading at any place of it. Raises FileNotFoundError, and Changed while it is read.

    block_bytes: what a store is asked for at a time; small for a few small reads, far apart.
    """
    filesystem, path = open_filesystem(uri)
    if isinstance(filesystem, LocalFileSystem):
        return open(path, "rb")
    return open_object(filesystem, path, block_bytes=block_bytes)


def size(uri: Uri) -> int | None:
    """Return the size of an object in bytes, None where there is none (a folder is none)."""
    filesystem, path = open_filesystem(uri)
    try:
        if isinstance(filesystem, LocalFileSystem):
            return os.stat(path).st_size if os.path.isfile(path) else None
        info = retries.call(partial(filesystem.info, path), path)
    except FileNotFoundError:
        return None
    return int(info["size"]) if info["type"] == "file" else None


def exists(uri: Uri) -> bool:
    """Return whether there is an object (a folder is none)."""
    return size(uri) is not None


def is_folder(uri: Uri) -> bool:
    """Return whether there is a folder, or on an object store anything below this prefix."""
    filesystem, path = open_filesystem(uri)
    return (
        os.path.isdir(path)
        if isinstance(filesystem, LocalFileSystem)
        else bool(retries.call(partial(filesystem.isdir, path), path))
    )


def delete(uri: Uri) -> None:
    """Remove one object; a missing one is fine."""
    filesystem, path = open_filesystem(uri)
    with contextlib.suppress(FileNotFoundError):
        if isinstance(filesystem, LocalFileSystem):
            os.unlink(path)
        else:
            retries.call(partial(filesystem.rm_file, path), path)


def sweep(uri: Uri) -> None:
    """Remove the temporary files that killed writers left below `uri`. A writer that is still alive gets an OSError."""
    filesystem, root = open_filesystem(uri)
    if isinstance(filesystem, LocalFileSystem):  # an upload to an object store leaves no object before its end
        sweep_local(root)


def publish(uri: Uri, data: bytes) -> None:
    """Store `data`, replacing what was there: a reader sees the old content or the new, whole, also after a crash.

    Missing local folders are made. A failure (disk full) raises OSError; the old content stays, no temporary file does.
    """
    filesystem, path = open_filesystem(uri)
    if isinstance(filesystem, LocalFileSystem):
        _put_local(path, io.BytesIO(data), replace=True)
    else:
        upload(filesystem, path, data)


def publish_file(uri: Uri, local_path: Uri) -> None:
    """`publish` the content of a file on this machine, streamed (S3: in parts) and left where it is."""
    filesystem, path = open_filesystem(uri)
    if isinstance(filesystem, LocalFileSystem):
        with open(local_path, "rb") as source:
            _put_local(path, source, replace=True)
    else:
        upload_file(filesystem, path, os.fspath(local_path))


def create(uri: Uri, data: bytes) -> bool:
    """Store `data` only where there is nothing. Return True if we did, False if something else was there.

    Of concurrent callers with different data one at most gets True on a machine's own disk, and on an S3 store that
    decides in one step, as AWS does. Others look first (measured on Swift: of four at the same moment up to four get
    True and the last stays): who must know waits and reads it back, as the lease does. On S3 who finds just `data` gets
    True as well: a request whose answer was lost is sent again, and refused because of its own object.
    """
    filesystem, path = open_filesystem(uri)
    if isinstance(filesystem, LocalFileSystem):
        return _put_local(path, io.BytesIO(data), replace=False)
    return (_create_s3 if is_s3(filesystem) else create_other)(filesystem, path, data)


def create_file(uri: Uri, local_path: Uri) -> bool:
    """`create` with the content of a file on this machine, left where it is; on a store of at most CREATE_BYTES.

    Raises ValueError for a larger one: uploads in parts are not refused by every store that refuses a whole one.
    """
    filesystem, path = open_filesystem(uri)
    with open(local_path, "rb") as source:
        if isinstance(filesystem, LocalFileSystem):
            return _put_local(path, source, replace=False)
        length = os.fstat(source.fileno()).st_size
        if length > CREATE_BYTES:
            raise ValueError(f"local_path={os.fspath(local_path)!r} ({length} bytes): must have at most {CREATE_BYTES} "
                             "bytes to be created; see that nothing is there, then publish_file")  # fmt: skip
        return create(uri, source.read())


def honours_create(uri: Uri) -> bool:
    """Return whether the store refuses to `create` below `uri` what is there, instead of replacing it.

    An S3 store is tried out: a probe object is created twice and removed. One that ignores the condition (gateways and
    older servers do) replaces the first with the second. Other kinds of store: False, `create` is two requests there.
    """
    filesystem, _ = open_filesystem(uri)
    if isinstance(filesystem, LocalFileSystem):
        return True
    if not is_s3(filesystem):
        return False
    probe, first, second = (secrets.token_hex(8) for _ in range(3))
    place = join(uri, TEMPORARY + probe)  # a name that no listing shows, should we be killed before it is removed
    try:
        return create(place, first.encode()) and not create(place, second.encode())
    finally:
        delete(place)


def content_etag(data: bytes) -> str:
    """Return the etag that a local file with this content is listed with."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def list_names(uri: Uri) -> list[str]:
    """Return the sorted keys below `uri`, none where there is no such folder; reads no content. For our own folders."""
    filesystem, root = open_filesystem(uri)
    if isinstance(filesystem, LocalFileSystem):
        found = [os.path.join(folder, name) for folder, _, names in os.walk(root) for name in names]
        keys = [os.path.relpath(path, root).replace(os.sep, "/") for path in found]
    else:
        keys = (names_s3 if is_s3(filesystem) else names_other)(filesystem, root)
    return sorted(key for key in keys if not key.rpartition("/")[2].startswith(TEMPORARY))


def digest_bytes(data: bytes) -> str:
    """Return the SHA-256 of `data`, 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()

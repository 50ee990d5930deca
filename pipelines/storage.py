"""Objects behind URIs: list, read, publish atomically, create if absent. Folders of this machine and s3:// alike.

A URI is a local path (absolute, relative or `file://`), `s3://bucket/prefix`, or anything else that fsspec opens. It
is taken literally: no `~`, no globs, no fsspec chains, so any name that a listing yields can be read back. S3
endpoint and credentials come from the environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...). Nothing is cached:
what another process has written is seen by the next call.
"""

import contextlib
import errno
import hashlib
import io
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

Uri = str | os.PathLike[str]
OWN_FOLDER = "_diffsr"
_TEMPORARY = ".tmp-"
_TEMPORARY_NAME = re.compile(re.escape(_TEMPORARY) + "[0-9a-f]{16}")
_BUCKET = re.compile(r"[A-Za-z0-9.\-_]{1,255}(/|$)|arn:")
_CHUNK_BYTES = 1 << 20
_BLOCK_BYTES = 4 << 20  # of one request to an object store


@dataclass(frozen=True, slots=True)
class StoredObject:
    """One listed object: `key` is its path under the listed root, with "/"; `etag` changes with its bytes; `size` is
    in bytes. A local file's etag is the BLAKE2b-128 of its content, or "unreadable" where it could not be read.
    """

    key: str
    etag: str
    size: int


def open_filesystem(uri: Uri) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of `uri` and the path in it, without a trailing slash.

    Raises ValueError for an empty URI or a name that the store cannot have, ImportError without a package for its kind.
    """
    text = os.fspath(uri)
    if not text:
        raise ValueError("uri='': must name a folder or an object; for the current folder write '.'")
    protocol, separator, path = text.partition("://")
    if not separator or protocol == "file" or "/" in protocol:  # "/" as in /archive/strange:/name
        return fsspec.filesystem("file"), os.path.abspath(text.removeprefix("file://"))
    options: dict[str, Any] = {"use_listings_cache": False}
    if protocol in ("s3", "s3a"):
        if not _BUCKET.match(path):  # botocore would raise an error of its own kind
            raise ValueError(f"uri={text!r}: must name a bucket, of letters, digits and .-_; correct it")
        if "?versionId=" in path:
            raise ValueError(f"uri={text!r}: s3fs reads '?versionId=' as a version, not as a name; rename the object")
        # Part of fsspec's instance key: without it a process that changes the endpoint would keep the old one.
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        options |= {"endpoint_url": endpoint} if endpoint else {}
    return (filesystem := fsspec.filesystem(protocol, **options)), filesystem._strip_protocol(text)


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
    elif "s3" in filesystem.protocol:
        found = _list_s3(filesystem, root, wanted)
    else:
        found = _list_other(filesystem, root, wanted) if filesystem.isdir(root) else None
    if found is None:
        raise ValueError(f"uri={os.fspath(uri)!r}: must be a folder or prefix that exists; create it or correct it")
    return found


def read_bytes(uri: Uri) -> bytes:
    """Return the content of one object. Raises FileNotFoundError."""
    filesystem, path = open_filesystem(uri)
    return Path(path).read_bytes() if isinstance(filesystem, LocalFileSystem) else filesystem.cat_file(path)


def open_file(uri: Uri, *, block_bytes: int = 5 * 2**20) -> IO[bytes]:
    """Return an object opened for reading at any place of it. Raises FileNotFoundError.

    block_bytes: what a store is asked for at a time; small for a few small reads, far apart.
    """
    filesystem, path = open_filesystem(uri)
    if isinstance(filesystem, LocalFileSystem):
        return open(path, "rb")
    file: IO[bytes] = filesystem.open(path, "rb", block_size=block_bytes)
    return file


def size(uri: Uri) -> int | None:
    """Return the size of an object in bytes, None where there is none (a folder is none)."""
    filesystem, path = open_filesystem(uri)
    try:
        if isinstance(filesystem, LocalFileSystem):
            return os.stat(path).st_size if os.path.isfile(path) else None
        info = filesystem.info(path)
    except FileNotFoundError:
        return None
    return int(info["size"]) if info["type"] == "file" else None


def exists(uri: Uri) -> bool:
    """Return whether there is an object (a folder is none)."""
    return size(uri) is not None


def delete(uri: Uri) -> None:
    """Remove one object; a missing one is fine."""
    filesystem, path = open_filesystem(uri)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path) if isinstance(filesystem, LocalFileSystem) else filesystem.rm_file(path)


def sweep(uri: Uri) -> None:
    """Remove the temporary files that killed writers left below `uri`. A writer that is still alive gets an OSError."""
    filesystem, root = open_filesystem(uri)
    if isinstance(filesystem, LocalFileSystem):  # an upload to an object store leaves no object before its end
        for folder, _, names in os.walk(root):
            for name in filter(_TEMPORARY_NAME.fullmatch, names):
                with contextlib.suppress(OSError):  # what cannot be removed is never listed, and harms nobody
                    os.unlink(os.path.join(folder, name))


def publish(uri: Uri, data: bytes) -> None:
    """Store `data`, replacing what was there: a reader sees the old content or the new, whole, also after a crash.

    Missing local folders are made. A failure (disk full) raises OSError; the old content stays, no temporary file does.
    """
    filesystem, path = open_filesystem(uri)
    if isinstance(filesystem, LocalFileSystem):
        _put_local(path, io.BytesIO(data), replace=True)
    else:
        filesystem.pipe_file(path, data)  # an S3 object appears when its upload is complete


def publish_file(uri: Uri, local_path: Uri) -> None:
    """`publish` the content of a file on this machine, streamed (S3: in parts) and left where it is."""
    filesystem, path = open_filesystem(uri)
    if isinstance(filesystem, LocalFileSystem):
        with open(local_path, "rb") as source:
            _put_local(path, source, replace=True)
    else:
        filesystem.put_file(os.fspath(local_path), path)


def create(uri: Uri, data: bytes) -> bool:
    """Store `data` only where there is nothing. Return True if we did, False if something was there.

    Of any number of concurrent callers one at most gets True. On S3 a request whose answer was lost is sent again by
    the client and then meets its own object: who must know after a False reads it back.
    """
    filesystem, path = open_filesystem(uri)
    if isinstance(filesystem, LocalFileSystem):
        return _put_local(path, io.BytesIO(data), replace=False)
    if "s3" in filesystem.protocol:
        return _create_s3(filesystem, path, data)
    # Not atomic: two processes may both find nothing. Enough for memory://, which the tests use from one thread.
    if filesystem.exists(path):
        return False
    filesystem.pipe_file(path, data)
    return True


class Changed(OSError):
    """The object is not the one that was listed."""


def read_listed(uri: Uri, etag: str) -> bytes:
    """Return the content of an object that was listed with `etag`. Raises Changed, FileNotFoundError or OSError."""
    return b"".join(stream_listed(uri, etag))


def stream_listed(uri: Uri, etag: str | None) -> Iterator[bytes]:
    """Yield the content in pieces of 1 MiB; None: whatever its etag is now. Raises Changed, FileNotFoundError, OSError.

    Changed is raised before the first piece where the store names an etag (what follows is then of that etag), after
    the last one where only the content tells: what was yielded counts when the iterator has ended.
    """
    file, found, digest = _open_stream(uri)
    with file:
        if found is None or etag is None or found == etag:
            while piece := file.read(_CHUNK_BYTES):
                digest.update(piece)
                yield piece
            found = found or digest.hexdigest()
    if etag is not None and found != etag:
        raise Changed(f"{os.fspath(uri)} was listed with etag {etag} and has {found} now")


def look_up(uri: Uri) -> StoredObject:
    """Return one object as a listing would, its key the URI; etag "unreadable" and size 0 where it cannot be read."""
    try:
        file, etag, digest = _open_stream(uri)
        with file:
            if etag is not None:
                return StoredObject(os.fspath(uri), etag, int(file.details["size"]))  # type: ignore[attr-defined]
            length = 0
            while piece := file.read(_CHUNK_BYTES):
                digest.update(piece)
                length += len(piece)
        return StoredObject(os.fspath(uri), digest.hexdigest(), length)
    except (OSError, ValueError, ImportError):  # gone, a folder, a bad name, no package for its protocol
        return StoredObject(os.fspath(uri), "unreadable", 0)


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
        keys = [path.removeprefix(f"{root}/") for path in filesystem.find(root)]
    return sorted(key for key in keys if not key.rpartition("/")[2].startswith(_TEMPORARY))


def digest_bytes(data: bytes) -> str:
    """Return the SHA-256 of `data`, 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def _create_s3(filesystem: Any, path: str, data: bytes) -> bool:
    for _ in range(5):
        try:
            filesystem.pipe_file(path, data, mode="create")
            return True
        except FileExistsError:
            return False
        except OSError as error:
            # Stores that answer 412 without naming the condition come as an OSError, with botocore's error as cause.
            code = getattr(error.__cause__, "response", {}).get("Error", {}).get("Code")
            if code in ("PreconditionFailed", "412"):
                return False
            if code != "ConditionalRequestConflict":  # 409: another writer is busy with this key; S3 says try again
                raise
    raise OSError(errno.EBUSY, "still in conflict with another writer after 5 attempts", path)


def _put_local(path: str, source: IO[bytes], *, replace: bool) -> bool:
    """Write `source` beside `path`, flush it to the disk, then rename (or, if not `replace`, link) it into place."""
    folder = os.path.dirname(path)
    _make_folder(folder)
    temporary = os.path.join(folder, _TEMPORARY + secrets.token_hex(8))
    try:
        # Not tempfile: its 0600 would make published objects unreadable to others; 0666 obeys the umask.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with open(descriptor, "wb") as out:
            shutil.copyfileobj(source, out, _CHUNK_BYTES)
            out.flush()
            os.fsync(descriptor)
        (os.replace if replace else os.link)(temporary, path)
    except FileExistsError:
        if replace:
            raise
        return False
    except OSError as error:
        if error.filename is None:  # as of a full disk: of what, the system does not say
            raise OSError(error.errno, error.strerror, path) from error
        raise
    finally:
        Path(temporary).unlink(missing_ok=True)
    _sync_folder(folder)
    return True


def _make_folder(folder: str) -> None:
    if not os.path.isdir(folder):
        _make_folder(os.path.dirname(folder))
        os.makedirs(folder, exist_ok=True)
        _sync_folder(os.path.dirname(folder))


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_wanted(key: str, wanted: tuple[str, ...]) -> bool:
    name = key.rpartition("/")[2]
    return name.lower().endswith(wanted) and not name.startswith(_TEMPORARY) and not key.startswith(OWN_FOLDER + "/")


def _list_local(root: str, wanted: tuple[str, ...]) -> Iterator[StoredObject]:
    real_root = os.path.realpath(root)
    pending, seen = [("", real_root)], set()
    while pending:
        prefix, folder = pending.pop()
        # A link into the root adds nothing, a link out of it is followed once: no loop, and no key twice for a folder.
        linked = folder != os.path.normpath(os.path.join(real_root, prefix))
        if folder in seen or (linked and os.path.commonpath([folder, real_root]) == real_root):
            continue
        seen.add(folder)
        with os.scandir(folder) as entries:
            ordered = sorted(entries, key=lambda entry: entry.name)
        for entry in ordered:
            key = prefix + entry.name
            if _is_wanted(key, wanted) and (os.path.isfile(entry.path) or _is_dangling(entry.path)):
                yield from _local_object(key, entry.path)
        for entry in reversed(ordered):  # os.path, as the entry's own methods raise for a link to itself
            if os.path.isdir(entry.path) and prefix + entry.name != OWN_FOLDER:
                pending.append((f"{prefix}{entry.name}/", os.path.realpath(entry.path)))


def _is_dangling(path: str) -> bool:
    """Return whether a link leads nowhere: somebody's image was meant, and reading it will say what is wrong."""
    return os.path.islink(path) and not os.path.exists(path)


def _local_object(key: str, path: str) -> Iterator[StoredObject]:
    """Yield a file with the hash of its content, nothing if it has just gone. What cannot be read, a worker reports."""
    found = look_up(path)
    if found.etag != "unreadable" or os.path.lexists(path):
        yield StoredObject(key, found.etag, found.size)


def _open_stream(uri: Uri) -> tuple[IO[bytes], str | None, Any]:
    """Return an object opened for one reading, the etag that its store names (None: its content tells), and the hash
    that is the etag of such a content. Reads after the first are of the same etag (S3: If-Match)."""
    filesystem, path = open_filesystem(uri)
    if isinstance(filesystem, LocalFileSystem):
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would block for ever, /dev/zero never end
            raise OSError(errno.EINVAL, "is no regular file", path)
        return open(path, "rb"), None, hashlib.blake2b(digest_size=16)
    if "memory" in filesystem.protocol:  # its files are shared, their position too
        return io.BytesIO(filesystem.cat_file(path)), None, hashlib.sha256()
    file = filesystem.open(path, "rb", block_size=_BLOCK_BYTES, cache_type="readahead")
    if file.details["type"] != "file":
        raise IsADirectoryError(errno.EISDIR, "is a folder", path)
    return file, _named_etag(file.details), hashlib.sha256()


def _named_etag(info: dict[str, Any]) -> str | None:
    """Return the etag in what a store says of an object, None where it names none."""
    etag = info.get("ETag") or info.get("etag")
    return str(etag).strip('"') if etag else None


def _list_s3(filesystem: Any, root: str, wanted: tuple[str, ...]) -> Iterator[StoredObject] | None:
    """Return the objects in the order of their keys, a page of 1,000 in memory at a time; None for an empty prefix."""
    bucket, prefix, _ = filesystem.split_path(root)
    prefix += "/" if prefix else ""
    try:
        first = filesystem.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix)
    except FileNotFoundError:
        return None
    if prefix and not first.get("Contents"):
        return None

    def pages() -> Iterator[StoredObject]:
        page = first
        while True:
            for item in page.get("Contents", ()):
                key, length = item["Key"][len(prefix) :], int(item["Size"])
                if _is_wanted(key, wanted) and (length or not item["Key"].endswith("/")):
                    yield StoredObject(key, item["ETag"].strip('"'), length)
            if not page.get("IsTruncated"):
                return
            token = page["NextContinuationToken"]
            page = filesystem.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, ContinuationToken=token)

    return pages()


def _list_other(filesystem: Any, root: str, wanted: tuple[str, ...]) -> Iterator[StoredObject]:
    for folder, folders, files in filesystem.walk(root, detail=True):
        for name in sorted(folders):
            folders[name] = folders.pop(name)  # walk goes down in the order of this dict
        for name in sorted(files):
            path = f"{folder.rstrip('/')}/{name}"
            key = path[len(root.rstrip("/")) + 1 :]
            if _is_wanted(key, wanted):
                info = files[name]
                etag = _named_etag(info) or digest_bytes(filesystem.cat_file(path))
                yield StoredObject(key, etag, int(info["size"]))

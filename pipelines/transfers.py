"""Whole objects to and from an object store: large ones in parts, and objects where there is nothing yet."""

import contextlib
import errno
import hashlib
import mimetypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from pipelines import retries
from pipelines.stores import Changed, is_s3, open_object

PART_BYTES = 32 << 20  # what is larger goes in parts, each of them tried again for itself
_MOST_PARTS = 10_000
_SENDERS = 4
_REREADS = 5
_SLOWEST_BYTES_S = 64 << 10  # an upload below this rate is one that hangs; nothing else would end it

Read = Callable[[int, int], bytes]  # (start, length): that piece of what is uploaded


def upload(filesystem: Any, path: str, data: bytes) -> None:
    """Store `data`, replacing what was there; it appears when it is complete. Raises OSError."""
    if is_s3(filesystem) and len(data) > PART_BYTES:
        _upload_parts(filesystem, path, len(data), lambda start, length: data[start : start + length])
    else:
        retries.call(partial(_put, filesystem, path, data), path)


def upload_file(filesystem: Any, path: str, local_path: str) -> None:
    """`upload` the content of a file on this machine; four parts of it at most are in memory."""
    if not is_s3(filesystem):
        retries.call(partial(filesystem.put_file, local_path, path), path)
        return
    with open(local_path, "rb") as file:
        read = partial(_read_at, file.fileno())
        size = os.fstat(file.fileno()).st_size
        if size > PART_BYTES:
            _upload_parts(filesystem, path, size, read)
        else:
            upload(filesystem, path, read(0, size))


def create_s3(filesystem: Any, path: str, data: bytes) -> bool:
    """Store `data` where there is nothing; return whether what is there is ours. One request: the store decides.

    A request whose answer is lost is sent again, by us or unseen by the HTTP client (aiohttp does, once) or a proxy on
    the way, and is then refused because of its own object. So whoever is refused looks at what is there.
    """

    def once() -> bool:
        try:
            # In one piece: not every store that honours the condition does so for an upload in parts.
            _put(filesystem, path, data, mode="create", chunksize=max(len(data), PART_BYTES))
            return True
        except OSError as error:
            # FileExistsError, or an OSError of another kind from stores that answer 412 without naming the condition.
            if retries.is_refused_condition(error):
                return _is_content(filesystem, path, data)
            raise

    return retries.call(once, path)


def create_other(filesystem: Any, path: str, data: bytes) -> bool:
    """As `create_s3` for a store of another kind, but not atomic: two processes may both find nothing."""
    if retries.call(partial(filesystem.exists, path), path):
        return False
    upload(filesystem, path, data)
    return True


def fetch(filesystem: Any, path: str) -> bytes:
    """Return the content of one object, of one moment. Raises FileNotFoundError, also for a folder."""
    if not is_s3(filesystem):
        return retries.call(partial(filesystem.cat_file, path), path)  # type: ignore[no-any-return]
    for _ in range(_REREADS):
        with contextlib.suppress(Changed):  # as a lease is, every few seconds
            return _fetch_once(filesystem, path)
    return _fetch_once(filesystem, path)


def _fetch_once(filesystem: Any, path: str) -> bytes:
    with open_object(filesystem, path, block_bytes=PART_BYTES) as opened:
        file: Any = opened
        if file.details["type"] != "file":
            raise FileNotFoundError(errno.ENOENT, "is a folder", path)
        pieces = [(start, min(start + PART_BYTES, file.size)) for start in range(0, file.size, PART_BYTES)]
        if len(pieces) < 2:
            return b"".join(file.cache.fetcher(*piece) for piece in pieces)
        with ThreadPoolExecutor(_SENDERS) as pool:
            return b"".join(pool.map(lambda piece: file.cache.fetcher(*piece), pieces))


def _put(filesystem: Any, path: str, data: bytes, **options: Any) -> None:
    if is_s3(filesystem):
        kind, _ = mimetypes.guess_type(path, strict=False)
        options |= {"ContentType": kind} if kind else {}
        options["timeout"] = _limit_s(len(data))
    filesystem.pipe_file(path, data, **options)


def _upload_parts(filesystem: Any, path: str, size: int, read: Read) -> None:
    bucket, key, _ = filesystem.split_path(path)
    length = max(PART_BYTES, -(-size // _MOST_PARTS))
    place: dict[str, Any] = {"Bucket": bucket, "Key": key}
    kind, _ = mimetypes.guess_type(path, strict=False)

    def ask(method: str, **options: Any) -> Any:
        return retries.call(partial(filesystem.call_s3, method, **place, **options), path)

    def send(number: int) -> dict[str, Any]:
        piece = read(number * length, length)
        answer = ask("upload_part", PartNumber=number + 1, Body=piece, timeout=_limit_s(len(piece)))
        return {"PartNumber": number + 1, "ETag": answer["ETag"]}

    begun = ask("create_multipart_upload", **({"ContentType": kind} if kind else {}))
    place["UploadId"] = begun["UploadId"]
    pool = ThreadPoolExecutor(_SENDERS)
    try:
        parts = list(pool.map(send, range(-(-size // length))))
        try:
            ask("complete_multipart_upload", MultipartUpload={"Parts": parts})
        except FileNotFoundError:  # some stores forget an upload once it is complete, and its answer may have been lost
            if retries.call(partial(filesystem.info, path), path).get("ETag") != _etag_of_parts(parts):
                raise
    except BaseException:
        pool.shutdown(cancel_futures=True)
        with contextlib.suppress(Exception):  # what stays is invisible, and the first error is the one that matters
            filesystem.call_s3("abort_multipart_upload", **place)
        raise
    finally:
        pool.shutdown()


def _is_content(filesystem: Any, path: str, data: bytes) -> bool:
    try:
        found = filesystem.info(path)
        return found["type"] == "file" and int(found["size"]) == len(data) and filesystem.cat_file(path) == data
    except FileNotFoundError as error:
        raise ConnectionError(f"{path} was there a moment ago and has gone") from error  # so it is created once more


def _etag_of_parts(parts: list[dict[str, Any]]) -> str:
    digests = b"".join(bytes.fromhex(part["ETag"].strip('"')) for part in parts)
    return f'"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{len(parts)}"'


def _read_at(descriptor: int, start: int, length: int) -> bytes:
    """Return exactly that piece of a file; raises OSError for a file that has been cut since."""
    pieces, end = [], start + length
    while start < end and (piece := os.pread(descriptor, end - start, start)):
        pieces.append(piece)
        start += len(piece)
    return b"".join(pieces)


def _limit_s(num_bytes: int) -> float:
    """Return how long an upload may take in seconds; the client's own limits do not see a store that takes nothing."""
    return retries.settings.connect_s + retries.settings.read_s + num_bytes / _SLOWEST_BYTES_S

"""File systems behind URIs, and files of theirs that are read with patience and never mix two contents."""

import os
import re
from collections.abc import Callable
from functools import partial
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipelines import retries

Uri = str | os.PathLike[str]
_BUCKET = re.compile(r"[A-Za-z0-9.\-_]{1,255}(/|$)|arn:")


class Changed(OSError):
    """The object is not the one that was listed."""


def open_filesystem(uri: Uri) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the file system of `uri` and the path in it, without a trailing slash.

    An S3 file system makes each request once: who calls it directly takes `retries.call` along.
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
        options["config_kwargs"] = {
            "connect_timeout": retries.settings.connect_s,
            "read_timeout": retries.settings.read_s,
            "retries": {"total_max_attempts": 1},
        }
        # Part of fsspec's instance key: without it a process that changes the endpoint would keep the old one.
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        options |= {"endpoint_url": endpoint} if endpoint else {}
    filesystem = fsspec.filesystem(protocol, **options)
    if is_s3(filesystem):
        filesystem.retries = 1  # s3fs would wrap five tries of its own around botocore's
    return filesystem, filesystem._strip_protocol(text)


def is_local(uri: Uri) -> bool:
    """Return whether `uri` names a place in the file system of this machine."""
    return isinstance(open_filesystem(uri)[0], LocalFileSystem)


def is_s3(filesystem: fsspec.AbstractFileSystem) -> bool:
    """Return whether a file system speaks S3."""
    return "s3" in filesystem.protocol


def open_object(filesystem: fsspec.AbstractFileSystem, path: str, *, block_bytes: int) -> IO[bytes]:
    """Return an object of a store opened for reading at any place of it. All reads are of the content that it has now.

    Each request is tried again as `retries` says, and goes on where the last one ended. Reading raises Changed where
    the content has been replaced since (S3: If-Match), FileNotFoundError where it has been removed.
    """
    opened = partial(filesystem.open, path, "rb", block_size=block_bytes, cache_type="readahead")
    file: Any = retries.call(opened, path)
    if hasattr(file, "cache"):  # one buffered by fsspec; memory:// has another kind
        file.cache.fetcher = _patient(file.cache.fetcher, file.size, path)
    return file  # type: ignore[no-any-return]


def _patient(fetch: Callable[[int, int], bytes], size: int, path: str) -> Callable[[int, int], bytes]:
    def once(start: int, end: int) -> bytes:
        try:
            data = fetch(start, end)
        except OSError as error:
            # s3fs raises FileExpired only for one wording of the refusal.
            if retries.is_refused_condition(error) or type(error).__name__ == "FileExpired":
                raise Changed(f"{path} was replaced while it was read") from error
            raise
        if len(data) != min(end, size) - start:  # fsspec would take it for the end of the file
            raise ConnectionError(f"{len(data)} bytes came of {min(end, size) - start} at {start}")
        return data

    return lambda start, end: retries.call(partial(once, start, end), path)

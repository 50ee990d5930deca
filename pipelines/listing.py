"""The kinds of listing behind `storage.list_objects` and `storage.list_names`: local folders, S3, any other store."""

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

from pipelines import retries
from pipelines.local_files import TEMPORARY
from pipelines.streams import StoredObject, look_up, named_etag

OWN_FOLDER = "_diffsr"


def list_local(root: str, wanted: tuple[str, ...]) -> Iterator[StoredObject]:
    """Yield the files below a folder, each folder's names sorted, whose names end in one of `wanted` (lower case)."""
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


def list_s3(filesystem: Any, root: str, wanted: tuple[str, ...]) -> Iterator[StoredObject] | None:
    """Return the objects in the order of their keys, a page of 1,000 in memory at a time; None for an empty prefix."""
    bucket, prefix, _ = filesystem.split_path(root)
    prefix += "/" if prefix else ""
    pages = _pages(filesystem, bucket, prefix)
    try:
        first = next(pages)
    except FileNotFoundError:
        return None
    if prefix and not first:
        return None

    def found() -> Iterator[StoredObject]:
        page: list[dict[str, Any]] | None = first
        while page is not None:
            for item in page:
                key = item["Key"][len(prefix) :]
                if _is_wanted(key, wanted) and not _is_marker(item):
                    yield StoredObject(key, item["ETag"].strip('"'), int(item["Size"]))
            page = next(pages, None)

    return found()


def list_other(filesystem: Any, root: str, wanted: tuple[str, ...]) -> Iterator[StoredObject]:
    """Yield the objects of a store of another kind, folder by folder; an etag that it does not name is the SHA-256."""
    for path, info in _walk(filesystem, root):
        key = path[len(root.rstrip("/")) + 1 :]
        if _is_wanted(key, wanted):
            etag = named_etag(info)
            if etag is None:
                etag = look_up(filesystem.unstrip_protocol(path)).etag
            yield StoredObject(key, etag, int(info["size"]))


def names_s3(filesystem: Any, root: str) -> list[str]:
    """Return the keys below a prefix, none where there is no such prefix. Raises FileNotFoundError for no bucket."""
    bucket, prefix, _ = filesystem.split_path(root)
    prefix += "/" if prefix else ""
    pages = _pages(filesystem, bucket, prefix)
    return [item["Key"][len(prefix) :] for page in pages for item in page if not _is_marker(item)]


def names_other(filesystem: Any, root: str) -> list[str]:
    """Return the keys below a folder of a store of another kind, none where there is no such folder."""
    return [path.removeprefix(f"{root}/") for path in retries.call(partial(filesystem.find, root), root)]


def _pages(filesystem: Any, bucket: str, prefix: str) -> Iterator[list[dict[str, Any]]]:
    place = {"Bucket": bucket, "Prefix": prefix}
    while True:
        page = retries.call(partial(filesystem.call_s3, "list_objects_v2", **place), f"{bucket}/{prefix}")
        yield page.get("Contents", [])
        if not page.get("IsTruncated"):
            return
        place["ContinuationToken"] = page["NextContinuationToken"]


def _walk(filesystem: Any, folder: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the files of a folder by name, then those of its folders. fsspec's own walk omits a folder that fails."""
    try:
        found = retries.call(partial(filesystem.ls, folder, detail=True), folder)
    except FileNotFoundError:  # its last object has just gone, and the folder with it
        return
    ordered = sorted(((info["name"].rstrip("/"), info["type"], info) for info in found), key=lambda item: item[0])
    yield from ((path, info) for path, kind, info in ordered if kind != "directory")
    for path, kind, _ in ordered:
        if kind == "directory" and path != folder.rstrip("/"):
            yield from _walk(filesystem, path)


def _is_wanted(key: str, wanted: tuple[str, ...]) -> bool:
    name = key.rpartition("/")[2]
    return name.lower().endswith(wanted) and not name.startswith(TEMPORARY) and not key.startswith(OWN_FOLDER + "/")


def _is_marker(item: dict[str, Any]) -> bool:
    """Return whether an S3 object only stands for a folder."""
    return item["Key"].endswith("/") and not int(item["Size"])


def _is_dangling(path: str) -> bool:
    """Return whether a link leads nowhere: somebody's image was meant, and reading it will say what is wrong."""
    return os.path.islink(path) and not os.path.exists(path)


def _local_object(key: str, path: str) -> Iterator[StoredObject]:
    """Yield a file with the hash of its content, nothing if it has just gone. What cannot be read, a worker reports."""
    found = look_up(path)
    if found.etag != "unreadable" or os.path.lexists(path):
        yield StoredObject(key, found.etag, found.size)

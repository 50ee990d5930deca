"""What lies in an upscaled output: every object with its size, told by a listing alone, and what sidecars say of it."""

import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from pipelines import storage
from pipelines.local_files import TEMPORARY
from pipelines.sidecars import Sidecar, read_sidecar, uncertainty_key

T = TypeVar("T")
NUM_READERS = 8
SCHEMA = pa.schema([("key", pa.string()), ("size", pa.int64())])
BATCH = 65_536
_TEMPORARY = re.compile(re.escape(TEMPORARY) + "[0-9a-f]{16}")
_CHUNK_BYTES = 2**20


def list_sizes(output: str) -> pa.Table:
    """Return SCHEMA of all below the output but our own folder and half-written files; no content is read.

    Objects become Python objects only batch by batch. Raises ValueError for a prefix of a store with nothing in it.
    """
    filesystem, root = storage.open_filesystem(output)
    if isinstance(filesystem, LocalFileSystem):
        found = ((key, size) for key, size in _walk(root) if not key.startswith(f"{storage.OWN_FOLDER}/"))
        items = ((key, size) for key, size in found if not _TEMPORARY.fullmatch(key.rpartition("/")[2]))
    else:  # a store names etag and size in its listing, so this hashes nothing
        items = ((item.key, item.size) for item in storage.list_objects(output))
    return _table(items)


def list_leftovers(output: str) -> pa.Table:
    """Return SCHEMA of the half-written files that killed writers left below the output, in our own folder too."""
    filesystem, root = storage.open_filesystem(output)
    if not isinstance(filesystem, LocalFileSystem):  # an upload to an object store leaves no object before its end
        return SCHEMA.empty_table()
    return _table((key, size) for key, size in _walk(root) if _TEMPORARY.fullmatch(key.rpartition("/")[2]))


def sha256_of(uri: str) -> str | None:
    """Return the SHA-256 of an object, read in pieces; None where there is none. Raises OSError of the store."""
    digest = hashlib.sha256()
    try:
        with storage.open_file(uri) as file:
            while piece := file.read(_CHUNK_BYTES):
                digest.update(piece)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None
    return digest.hexdigest()


def has_maps(output: str, sidecar: Sidecar) -> bool:
    """Return whether what a sidecar names beside its result, an uncertainty map or nothing, is there as it was made."""
    beside = {key: sha256 for key, sha256 in sidecar.files.items() if key != sidecar.out_key}
    if beside.keys() - {uncertainty_key(sidecar.out_key)}:  # somebody else's place
        return False
    return all(sha256_of(storage.join(output, key)) == sha256 for key, sha256 in beside.items())


def sidecar_of(output: str, key: str) -> Sidecar | None:
    """Return the sidecar of the result `key` where it is one of ours and names that result."""
    try:
        sidecar = read_sidecar(storage.join(output, key))
    except ValueError:  # a name that the store does not take
        return None
    ours = sidecar is not None and sidecar.out_key == key and sidecar.source_key and sidecar.fingerprint
    return sidecar if ours else None


def proven(output: str, key: str) -> Sidecar | None:
    """Return the sidecar of the result `key` where the result is there, whole, as it describes it."""
    sidecar = sidecar_of(output, key)
    if sidecar is None or sha256_of(storage.join(output, key)) != sidecar.out_sha256:
        return None
    return sidecar if has_maps(output, sidecar) else None


def each(function: Callable[[Any], T], items: Iterable[Any]) -> list[T]:
    """Return what the function gives for each item, in order; several objects are asked for at a time."""
    with ThreadPoolExecutor(NUM_READERS) as pool:
        return list(pool.map(function, items))


def _walk(root: str) -> Iterator[tuple[str, int]]:
    """Yield (key, bytes) of the regular files; links to folders are followed, each real folder once."""
    seen = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        prefix = os.path.relpath(folder, root).replace(os.sep, "/") + "/" if folder != root else ""
        for name in names:
            try:
                found = os.stat(os.path.join(folder, name))
            except OSError:  # just gone, or a link that leads nowhere
                continue
            if stat.S_ISREG(found.st_mode):
                yield prefix + name, found.st_size


def _table(items: Iterator[tuple[str, int]]) -> pa.Table:
    batches: list[pa.RecordBatch] = []
    keys: list[str] = []
    sizes: list[int] = []

    def flush() -> None:
        batches.append(pa.record_batch([pa.array(keys, pa.string()), pa.array(sizes, pa.int64())], schema=SCHEMA))
        keys.clear()
        sizes.clear()

    for key, size in items:
        keys.append(key.encode(errors="backslashreplace").decode())  # Parquet and Arrow hold UTF-8 alone
        sizes.append(size)
        if len(keys) == BATCH:
            flush()
    flush()
    return pa.Table.from_batches(batches, schema=SCHEMA).sort_by("key")

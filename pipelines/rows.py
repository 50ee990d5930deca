"""The rows of a committed pair set in stored order, and the opening of its shards.

`pairs` is everywhere a set's folder or one of its manifests; shards are found below `root_of(pairs)`.
"""

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.manifest import Manifest, Shard, columns_that_decide, root_of, rows_that_count

AHEAD = 8  # shards that are read at the same time
ALTERED = "it was altered: delete it, and run make_pairs.py, which makes it again"


def iter_pairs(
    pairs: str, manifest: Manifest, split: str, *, columns: list[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a split that count in stored order, blobs still encoded, each with its `place` for `read_pair`.

    columns: read only these (and those that decide). Raises ValueError for a shard that is missing or was altered.
    """
    for shard in manifest.sorted_shards():
        if not shard.splits.get(split):
            continue
        wanted = None if columns is None else {*columns, *columns_that_decide(shard)}
        with open_verified(pairs, shard) as file:
            for group, _, table in iter_groups(file, wanted):
                rows = rows_that_count(table, shard, split=split)
                for number, row in zip(rows.tolist(), table.take(rows).to_pylist(), strict=True):
                    yield {**row, "place": f"{shard.name}#{group}#{number}"}


def iter_tables(pairs: str, manifest: Manifest, columns: list[str]) -> Iterator[pa.Table]:
    """Yield these columns and `split` of the rows that count, a table per shard, by the shards' names.

    For what looks at every row and no pixel: a few columns are read, of several shards at the same time. Only a
    shard's size is checked, as its hash would need all of its bytes: who trains or scores checks that.
    Raises ValueError for a shard that is missing, of another size or no Parquet file.
    """
    root = root_of(pairs)
    wanted = [*dict.fromkeys([*columns, "split"])]
    with ThreadPoolExecutor(AHEAD) as pool:
        ahead: deque[Future[pa.Table]] = deque()
        for shard in manifest.sorted_shards():
            if len(ahead) == AHEAD:
                yield ahead.popleft().result()
            ahead.append(pool.submit(_read_columns, root, shard, wanted))
        while ahead:
            yield ahead.popleft().result()


def _read_columns(root: str, shard: Shard, columns: list[str]) -> pa.Table:
    with open_shard(root, shard, block_bytes=2**18) as handle:
        if (size := handle.seek(0, 2)) != shard.bytes:
            raise ValueError(f"shard ({shard.name}) must have {shard.bytes} bytes, not {size}; {ALTERED}")
        try:
            file = pq.ParquetFile(handle, page_checksum_verification=True)
            table = file.read(columns=sorted({*columns, *columns_that_decide(shard)}), use_threads=False)
        except pa.ArrowInvalid as error:
            raise ValueError(f"shard ({shard.name}) must be a Parquet file of pairs; {ALTERED}: {error}") from error
    rows = rows_that_count(table, shard)
    table = table.select(columns)
    return table if len(rows) == table.num_rows else table.take(rows)


def read_pair(pairs: str, place: str) -> tuple[bytes, bytes]:
    """Return the encoded (hr, lr) of the row at a `place`."""
    name, group, number = place.rsplit("#", 2)
    return _row_group(storage.join(root_of(pairs), name), int(group))[int(number)]


@lru_cache(maxsize=4)
def _row_group(uri: str, group: int) -> list[tuple[bytes, bytes]]:
    with storage.open_file(uri) as handle:
        file = pq.ParquetFile(handle, page_checksum_verification=True)
        columns = file.read_row_group(group, columns=["hr", "lr"]).to_pydict()
    return list(zip(columns["hr"], columns["lr"], strict=True))


@contextmanager
def checked(name: str) -> Iterator[None]:
    """Raise ValueError for a page whose checksum is wrong; any other OSError is the store's."""
    try:
        yield
    except OSError as error:
        if "page integrity" not in str(error):
            raise
        raise ValueError(f"shard ({name}) must be whole; {ALTERED}") from error


@contextmanager
def open_shard(root: str, shard: Shard, *, block_bytes: int = 5 * 2**20) -> Iterator[Any]:
    try:
        handle = storage.open_file(storage.join(root, shard.name), block_bytes=block_bytes)
    except FileNotFoundError:
        raise ValueError(
            f"shard ({shard.name}) must lie below {root}; it is missing: run make_pairs.py again"
        ) from None
    with handle:
        yield handle


@contextmanager
def open_verified(pairs: str, shard: Shard) -> Iterator[pq.ParquetFile]:
    """Give the shard, open, once its hash was found right; it streams through, and is never in memory whole."""
    with open_shard(root_of(pairs), shard) as handle:
        if hashlib.file_digest(handle, "sha256").hexdigest() != shard.sha256:
            raise ValueError(f"shard ({shard.name}) must have sha256 {shard.sha256}; {ALTERED}")
        yield pq.ParquetFile(handle)


def iter_groups(file: pq.ParquetFile, columns: set[str] | None) -> Iterator[tuple[int, int, pa.Table]]:
    """Yield (number, first row, table) of each row group."""
    first_row = 0
    for number in range(file.num_row_groups):
        table = file.read_row_group(number, columns=None if columns is None else sorted(columns))
        yield number, first_row, table
        first_row += table.num_rows


def find_pairs(pairs: str, shard: str, pair_ids: set[str]) -> dict[str, tuple[bytes, bytes]]:
    """Return the encoded (hr, lr) of these pairs of a shard, by pair id; only their row groups are read."""
    found = {}
    with checked(shard), storage.open_file(storage.join(root_of(pairs), shard)) as handle:
        file = pq.ParquetFile(handle, page_checksum_verification=True)
        for group in range(file.num_row_groups):
            ids = file.read_row_group(group, columns=["pair_id"])["pair_id"].to_pylist()
            if pair_ids.isdisjoint(ids):
                continue
            blobs = file.read_row_group(group, columns=["hr", "lr"])
            for row, name in enumerate(ids):
                if name in pair_ids:
                    found[name] = (blobs["hr"][row].as_py(), blobs["lr"][row].as_py())
    return found

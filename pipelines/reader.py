"""Reading a committed pair set: decoded pairs in a seeded order for training, rows in stored order for scoring.

`pairs` is everywhere a set's folder or one of its manifests; shards are found below `root_of(pairs)`.
"""

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.blobs import decode_blob
from pipelines.images import Refused
from pipelines.manifest import Manifest, Shard, columns_that_decide, root_of, rows_that_count

AHEAD = 8  # shards of which columns are read at the same time


class Group(NamedTuple):
    """A row group: number of its shard, its number in it, and the shard's row that it begins with."""

    shard: int
    number: int
    first_row: int


_REMEDY = "it was altered: delete it, and run make_pairs.py, which makes it again"


class PairReader:
    """Decoded pairs of one split in a seeded order: a pure function of (manifest, split, seed, position).

    Row groups are permuted each epoch, and the rows inside windows of a few row groups: epoch-exact (every pair once),
    with bounded memory: 2 * window_groups row groups, and 12 bytes per pair for the order. Position k of an unbounded
    sequence is pair k modulo the epoch: a resume needs only a number.
    """

    def __init__(self, pairs: str, manifest: Manifest, split: str, *, seed: int, window_groups: int = 4) -> None:
        self.pairs, self.split, self.seed, self.window_groups = pairs, split, seed, window_groups
        self.recipe = manifest.recipe
        self.shards = [shard for shard in manifest.sorted_shards() if shard.splits.get(split)]
        self.num_pairs = manifest.num_pairs(split)
        if not self.num_pairs:
            raise ValueError(f"split ({split}) of {pairs} must hold pairs; it holds none: add sources or other shares")
        # Each shard is streamed once for its hash and the row numbers that count; then row group by row group.
        self._groups: list[Group] = []
        self._rows: list[np.ndarray] = []
        for number, shard in enumerate(self.shards):
            with _open_verified(pairs, shard) as file:
                for group, first_row, table in _iter_groups(file, columns_that_decide(shard)):
                    self._groups.append(Group(number, group, first_row))
                    self._rows.append(rows_that_count(table, shard, split=split).astype(np.int32))
        found = sum(map(len, self._rows))
        if found != self.num_pairs:
            raise ValueError(f"split ({split}) of {pairs} must hold {self.num_pairs} pairs, not {found}: make it again")
        self._open = lru_cache(maxsize=8)(self._open_lazily)
        self._blobs = lru_cache(maxsize=2 * window_groups)(self._read_blobs)
        self._order: tuple[int, np.ndarray] | None = None

    def pair(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (hr, lr) HWC of the sequence's element `position`, samples as they are stored; grey stays (H, W, 1).

        Raises ValueError for a blob that is damaged.
        """
        epoch, within = divmod(position, self.num_pairs)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self._epoch_order(epoch))
        number, row = map(int, self._order[1][within])
        try:
            hr, lr = map(decode_blob, self._blobs(number)[row])
        except Refused as error:
            group = self._groups[number]
            place = f"shard ({self.shards[group.shard].name}) row {group.first_row + row}"
            raise ValueError(f"{place} must hold blobs that can be decoded ({error}); make the set again") from error
        return hr, lr

    def batch(self, positions: range, *, channels: int = 3) -> tuple[np.ndarray, np.ndarray]:
        """Return (hr, lr) (B, H, W, channels) for these positions; grey is repeated into all channels.

        uint8 where all samples are; otherwise float32 in levels of 255, by the range that means black to white: 0 to
        255 of uint8, otherwise the recipe's value_range, or all of an integer type's. Samples outside are not clipped.
        Raises ValueError for a pair of another number of channels, and for floats of a recipe without value_range.
        """
        rows = [self.pair(position) for position in positions]
        for hr_channels, lr_channels in {(hr.shape[2], lr.shape[2]) for hr, lr in rows}:
            if {hr_channels, lr_channels} - {1, channels}:
                found = f"{hr_channels} channels"
                if lr_channels != hr_channels:
                    found = f"{found} in HR and {lr_channels} in LR"
                raise ValueError(
                    f"pairs of {self.pairs} have {found}: the model reads {channels}; choose another preset"
                )
        sides = list(zip(*rows, strict=True))
        if any(image.dtype != np.uint8 for side in sides for image in side):
            sides = [tuple(self._levels(image) for image in side) for side in sides]
        hr, lr = (np.stack([np.broadcast_to(x, (*x.shape[:2], channels)) for x in side]) for side in sides)
        return hr, lr

    def _levels(self, pixels: np.ndarray) -> np.ndarray:
        """Return float32 levels of 255; those of uint8 are exactly its samples."""
        kept = self.recipe.get("value_range")
        if pixels.dtype == np.uint8:
            low, high = 0.0, 255.0
        elif kept is not None:
            low, high = kept
        elif pixels.dtype.kind in "iu":
            low, high = float(np.iinfo(pixels.dtype).min), float(np.iinfo(pixels.dtype).max)
        else:
            raise ValueError(
                f"value_range (None) of {self.pairs} must be given for {pixels.dtype} samples, the values that mean "
                "black and white; make the set again with --value-range"
            )
        return (pixels.astype(np.float32) - np.float32(low)) * np.float32(255.0 / (high - low))

    def _epoch_order(self, epoch: int) -> np.ndarray:
        """Return (num_pairs, 2) int32: the number of a row group, and a row in it."""
        generator = np.random.default_rng([self.seed, epoch])
        groups = generator.permutation(len(self._groups))
        parts = []
        for start in range(0, len(groups), self.window_groups):
            numbers = groups[start : start + self.window_groups]
            rows = [self._rows[number] for number in numbers]
            window = np.empty((sum(map(len, rows)), 2), np.int32)
            window[:, 0] = np.repeat(numbers, [len(r) for r in rows])
            window[:, 1] = np.concatenate(rows)
            parts.append(window[generator.permutation(len(window))])
        return np.concatenate(parts)

    def _open_lazily(self, number: int) -> pq.ParquetFile:
        handle = storage.open_file(storage.join(root_of(self.pairs), self.shards[number].name))
        return pq.ParquetFile(handle, page_checksum_verification=True)

    def _read_blobs(self, number: int) -> list[tuple[bytes, bytes]]:
        group = self._groups[number]
        columns = self._open(group.shard).read_row_group(group.number, columns=["hr", "lr"]).to_pydict()
        return list(zip(columns["hr"], columns["lr"], strict=True))


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
        with _open_verified(pairs, shard) as file:
            for group, _, table in _iter_groups(file, wanted):
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
    with _open(root, shard, block_bytes=2**18) as handle:
        if (size := handle.seek(0, 2)) != shard.bytes:
            raise ValueError(f"shard ({shard.name}) must have {shard.bytes} bytes, not {size}; {_REMEDY}")
        try:
            file = pq.ParquetFile(handle, page_checksum_verification=True)
            table = file.read(columns=sorted({*columns, *columns_that_decide(shard)}), use_threads=False)
        except pa.ArrowInvalid as error:
            raise ValueError(f"shard ({shard.name}) must be a Parquet file of pairs; {_REMEDY}: {error}") from error
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
def _open(root: str, shard: Shard, *, block_bytes: int = 5 * 2**20) -> Iterator[Any]:
    try:
        handle = storage.open_file(storage.join(root, shard.name), block_bytes=block_bytes)
    except FileNotFoundError:
        raise ValueError(
            f"shard ({shard.name}) must lie below {root}; it is missing: run make_pairs.py again"
        ) from None
    with handle:
        yield handle


@contextmanager
def _open_verified(pairs: str, shard: Shard) -> Iterator[pq.ParquetFile]:
    """Give the shard, open, once its hash was found right; it streams through, and is never in memory whole."""
    with _open(root_of(pairs), shard) as handle:
        if hashlib.file_digest(handle, "sha256").hexdigest() != shard.sha256:
            raise ValueError(f"shard ({shard.name}) must have sha256 {shard.sha256}; {_REMEDY}")
        yield pq.ParquetFile(handle)


def _iter_groups(file: pq.ParquetFile, columns: set[str] | None) -> Iterator[tuple[int, int, pa.Table]]:
    """Yield (number, first row, table) of each row group."""
    first_row = 0
    for number in range(file.num_row_groups):
        table = file.read_row_group(number, columns=None if columns is None else sorted(columns))
        yield number, first_row, table
        first_row += table.num_rows


def find_pairs(pairs: str, shard: str, pair_ids: set[str]) -> dict[str, tuple[bytes, bytes]]:
    """Return the encoded (hr, lr) of these pairs of a shard, by pair id; only their row groups are read."""
    found = {}
    with storage.open_file(storage.join(root_of(pairs), shard)) as handle:
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

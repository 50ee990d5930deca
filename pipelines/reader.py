"""Reading a committed pair set for training: decoded pairs of one split in a seeded order.

`pairs` is everywhere a set's folder or one of its manifests; shards are found below `root_of(pairs)`.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.blobs import decode_blob
from pipelines.images import Refused
from pipelines.manifest import Manifest, Shard, columns_that_decide, root_of, rows_that_count
from pipelines.rows import AHEAD, checked, iter_groups, open_verified


class Group(NamedTuple):
    """A row group: number of its shard, its number in it, and the shard's row that it begins with."""

    shard: int
    number: int
    first_row: int


class PairIndex(NamedTuple):
    """Where the pairs of a split lie: its row groups, and of each the int32 numbers of the rows that count."""

    groups: list[Group]
    rows: list[np.ndarray]


class Fed(NamedTuple):
    """A batch: hr and lr (B, H, W, channels), and what is wrong with each row that another one stands in for."""

    hr: np.ndarray
    lr: np.ndarray
    corrupt: tuple[str, ...]


_COLUMNS = ("hr", "lr", "split", "pair_id", "source_key")
MAX_CORRUPT = 100  # rows that follow each other: more are no accident


def read_index(pairs: str, manifest: Manifest, split: str) -> PairIndex:
    """Return `read_indices` of one split."""
    return read_indices(pairs, manifest, (split,))[split]


def read_indices(pairs: str, manifest: Manifest, splits: tuple[str, ...]) -> dict[str, PairIndex]:
    """Verify every shard of these splits, several at a time, and return where the rows of each are that count.

    A shard is streamed once for its hash; then only the columns that decide are read. Raises ValueError for a shard
    that is missing, was altered or lacks a column, and for a split that holds no pairs or not those of the manifest.
    """
    for split in splits:
        if not manifest.num_pairs(split):
            raise ValueError(f"split ({split}) of {pairs} must hold pairs; it holds none: add sources or other shares")
    indices = {split: PairIndex([], []) for split in splits}
    numbers = {split: {shard.name: n for n, shard in enumerate(_shards_of(manifest, split))} for split in splits}
    shards = [shard for shard in manifest.sorted_shards() if any(shard.name in names for names in numbers.values())]
    with ThreadPoolExecutor(AHEAD) as pool:
        parts = [(shard, pool.submit(_index_shard, pairs, shard, splits)) for shard in shards]
        try:
            for shard, part in parts:
                for split, group, first_row, rows in part.result():
                    indices[split].groups.append(Group(numbers[split][shard.name], group, first_row))
                    indices[split].rows.append(rows)
        finally:
            pool.shutdown(cancel_futures=True)
    for split, index in indices.items():
        wanted, found = manifest.num_pairs(split), sum(map(len, index.rows))
        if found != wanted:
            raise ValueError(f"split ({split}) of {pairs} must hold {wanted} pairs, not {found}: make it again")
    return indices


def _shards_of(manifest: Manifest, split: str) -> list[Shard]:
    return [shard for shard in manifest.sorted_shards() if shard.splits.get(split)]


def _index_shard(pairs: str, shard: Shard, splits: tuple[str, ...]) -> list[tuple[str, int, int, np.ndarray]]:
    """Return (split, number, first row, rows that count) of each row group, for those of the splits that it holds."""
    found = []
    with open_verified(pairs, shard) as file:
        lacking = [column for column in _COLUMNS if column not in file.schema_arrow.names]
        if lacking:
            raise ValueError(
                f"shard ({shard.name}) must have the columns {', '.join(_COLUMNS)}; it lacks {', '.join(lacking)}; "
                "make the set again"
            )
        for group, first_row, table in iter_groups(file, columns_that_decide(shard)):
            for split in splits:
                if shard.splits.get(split):
                    rows = rows_that_count(table, shard, split=split).astype(np.int32)
                    found.append((split, group, first_row, rows))
    return found


class PairReader:
    """Decoded pairs of one split in a seeded order: a pure function of (manifest, split, seed, position).

    Row groups are permuted each epoch, and the rows inside windows of a few row groups: epoch-exact (every pair once),
    with bounded memory: 2 * window_groups row groups, and 12 bytes per pair for the order. Position k of an unbounded
    sequence is pair k modulo the epoch: a resume needs only a number.
    """

    def __init__(
        self,
        pairs: str,
        manifest: Manifest,
        split: str,
        *,
        seed: int,
        window_groups: int = 4,
        index: PairIndex | None = None,
    ) -> None:
        """Take the index of this very split, and open no shard before a row group is read; or make it."""
        self.pairs, self.split, self.seed, self.window_groups = pairs, split, seed, window_groups
        self.recipe = manifest.recipe
        self.shards = _shards_of(manifest, split)
        self.num_pairs = manifest.num_pairs(split)
        self._groups, self._rows = read_index(pairs, manifest, split) if index is None else index
        assert sum(map(len, self._rows)) == self.num_pairs > 0
        self._open = lru_cache(maxsize=8)(self._open_lazily)
        self._blobs = lru_cache(maxsize=2 * window_groups)(self._read_blobs)
        self._order: tuple[int, np.ndarray] | None = None

    def pair(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (hr, lr) HWC of the sequence's element `position`, samples as they are stored; grey stays (H, W, 1).

        Raises ValueError for a blob that is damaged.
        """
        try:
            return self._decode(position)
        except Refused as error:
            place = self._place(position)
            raise ValueError(f"{place} must hold blobs that can be decoded ({error}); make the set again") from error

    def batch(self, positions: range, *, channels: int = 3) -> tuple[np.ndarray, np.ndarray]:
        """Return (hr, lr) (B, H, W, channels) for these positions; grey is repeated into all channels.

        uint8 where all samples are; otherwise float32 in levels of 255, by the range that means black to white: 0 to
        255 of uint8, otherwise the recipe's value_range, or all of an integer type's. Samples outside are not clipped.
        Raises ValueError for a pair of another number of channels, and for floats of a recipe without value_range.
        """
        rows = [self.pair(position) for position in positions]
        for hr, lr in rows:
            if fault := _other_channels(hr, lr, channels):
                raise ValueError(f"pairs of {self.pairs} have {fault}; choose another preset")
        return self._stack(rows, channels)

    def tolerant_batch(self, positions: range, *, channels: int = 3) -> Fed:
        """Return the batch of these positions, the next whole row of the epoch standing in for each corrupt one.

        Corrupt: a blob that cannot be decoded, a pair of another size than the set's, or of channels that the model
        does not read. What stands in depends on the data alone, and comes in its own turn too.
        Raises ValueError where MAX_CORRUPT rows follow each other; an altered shard is no matter of rows, and raises.
        """
        corrupt: list[str] = []
        rows = [self._whole(position, channels, corrupt) for position in positions]
        return Fed(*self._stack(rows, channels), tuple(corrupt))

    def _whole(self, position: int, channels: int, corrupt: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the first whole pair from this position on; name in `corrupt` the row that it stands in for."""
        epoch, within = divmod(position, self.num_pairs)
        tried = min(MAX_CORRUPT, self.num_pairs)
        for further in range(tried):
            candidate = epoch * self.num_pairs + (within + further) % self.num_pairs
            try:
                hr, lr = self._decode(candidate)
                fault = self._other_size(hr, lr) or _other_channels(hr, lr, channels)
            except Refused as error:
                fault = str(error)
            if not fault:
                return hr, lr
            if candidate == position:
                corrupt.append(f"{self._place(position)}: {fault}")
        raise ValueError(
            f"pairs ({self.pairs}) must not have {tried} corrupt rows in a row; the first is {corrupt[-1]}; "
            "make the set again, or choose another preset"
        )

    def _other_size(self, hr: np.ndarray, lr: np.ndarray) -> str:
        """Return what is wrong with the shapes of a pair of this set, or nothing."""
        if hr.ndim != 3 or lr.ndim != 3:
            return f"samples must be HWC, not {hr.shape} and {lr.shape}"
        scale = self.recipe["scale"]
        side = self.recipe.get("patch", hr.shape[0])
        sides = (side, side, side // scale, side // scale)
        found = (*hr.shape[:2], *lr.shape[:2])
        return "" if found == sides else f"HR and LR must be {side} and {side // scale} px, not {found}"

    def _locate(self, position: int) -> tuple[int, int]:
        """Return (number of the row group, row in it)."""
        epoch, within = divmod(position, self.num_pairs)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self._epoch_order(epoch))
        number, row = map(int, self._order[1][within])
        return number, row

    def _place(self, position: int) -> str:
        number, row = self._locate(position)
        group = self._groups[number]
        return f"shard ({self.shards[group.shard].name}) row {group.first_row + row}"

    def _decode(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (hr, lr) as they are stored. Raises Refused for a blob that is damaged."""
        number, row = self._locate(position)
        hr, lr = self._blobs(number)[row]
        if hr is None or lr is None:
            raise Refused("decode", "corrupt", "there is no blob")
        return decode_blob(hr), decode_blob(lr)

    def _stack(self, rows: list[tuple[np.ndarray, np.ndarray]], channels: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the pairs as a batch, in levels."""
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
        with checked(self.shards[group.shard].name):
            columns = self._open(group.shard).read_row_group(group.number, columns=["hr", "lr"]).to_pydict()
        return list(zip(columns["hr"], columns["lr"], strict=True))


def _other_channels(hr: np.ndarray, lr: np.ndarray, channels: int) -> str:
    """Return why a model of so many channels cannot read this pair, or nothing."""
    hr_channels, lr_channels = hr.shape[2], lr.shape[2]
    if not {hr_channels, lr_channels} - {1, channels}:
        return ""
    found = f"{hr_channels} channels"
    if lr_channels != hr_channels:
        found = f"{found} in HR and {lr_channels} in LR"
    return f"{found}: the model reads {channels}"

"""Reading a committed pair set: decoded pairs in a seeded order for training, rows in stored order for scoring."""

import io
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.blobs import decode_blob
from pipelines.manifest import Manifest, Shard

Group = tuple[int, int]  # number of the shard, number of the row group in it


class PairReader:
    """Decoded pairs of one split in a seeded order: a pure function of (manifest, split, seed, position).

    Row groups are permuted each epoch, and the rows inside windows of a few row groups: epoch-exact (every pair once),
    with bounded memory. Position k of an unbounded sequence is pair k modulo the epoch: a resume needs only a number.
    """

    def __init__(self, pairs: str, manifest: Manifest, split: str, *, seed: int, window_groups: int = 4) -> None:
        self.pairs, self.split, self.seed, self.window_groups = pairs, split, seed, window_groups
        self.shards = sorted((s for s in manifest.shards if s.splits.get(split)), key=lambda s: s.name)
        self.num_pairs = manifest.num_pairs(split)
        if not self.num_pairs:
            raise ValueError(f"split ({split}) of {pairs} must hold pairs; it holds none: add sources or other shares")
        # Each shard is read once, whole, for its hash and the row numbers that count; then row group by row group.
        self._index: dict[Group, list[int]] = {}
        for number, shard in enumerate(self.shards):
            file = _open_shard(pairs, shard)
            for group in range(file.num_row_groups):
                self._index[number, group] = self._rows_that_count(file, group, shard)
        self._open = lru_cache(maxsize=8)(self._open_lazily)
        self._blobs = lru_cache(maxsize=2 * window_groups)(self._read_blobs)
        self._order: tuple[int, list[tuple[Group, int]]] | None = None

    def pair(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (hr, lr) uint8 HWC of the sequence's element `position`; grey stays (H, W, 1)."""
        epoch, within = divmod(position, self.num_pairs)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self._epoch_order(epoch))
        group, row = self._order[1][within]
        hr, lr = self._blobs(group)[row]
        return decode_blob(hr), decode_blob(lr)

    def batch(self, positions: range, *, channels: int = 3) -> tuple[np.ndarray, np.ndarray]:
        """Return (hr, lr) uint8 (B, H, W, channels) for these positions; grey is repeated into all channels.

        Raises ValueError for a pair of another number of channels.
        """
        rows = [self.pair(position) for position in positions]
        found = {image.shape[2] for row in rows for image in row} - {1, channels}
        if found:
            raise ValueError(
                f"pairs of {self.pairs} have {found.pop()} channels: the model reads {channels}; choose another preset"
            )
        hr, lr = ([np.broadcast_to(x, (*x.shape[:2], channels)) for x in side] for side in zip(*rows, strict=True))
        return np.stack(hr), np.stack(lr)

    def _epoch_order(self, epoch: int) -> list[tuple[Group, int]]:
        generator = np.random.default_rng([self.seed, epoch])
        groups = list(self._index)
        groups = [groups[i] for i in generator.permutation(len(groups))]
        order: list[tuple[Group, int]] = []
        for start in range(0, len(groups), self.window_groups):
            window = [(g, row) for g in groups[start : start + self.window_groups] for row in self._index[g]]
            order += [window[i] for i in generator.permutation(len(window))]
        return order

    def _rows_that_count(self, file: pq.ParquetFile, group: int, shard: Shard) -> list[int]:
        columns = file.read_row_group(group, columns=["split", "source_key"]).to_pydict()
        dropped = set(shard.dropped_sources)
        rows = enumerate(zip(columns["split"], columns["source_key"], strict=True))
        return [row for row, (split, key) in rows if split == self.split and key not in dropped]

    def _open_lazily(self, number: int) -> pq.ParquetFile:
        handle = storage.open_file(storage.join(self.pairs, self.shards[number].name))
        return pq.ParquetFile(handle, page_checksum_verification=True)

    def _read_blobs(self, group: Group) -> list[tuple[bytes, bytes]]:
        columns = self._open(group[0]).read_row_group(group[1], columns=["hr", "lr"]).to_pydict()
        return list(zip(columns["hr"], columns["lr"], strict=True))


def iter_pairs(
    pairs: str, manifest: Manifest, split: str, *, columns: list[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a split in stored order, blobs still encoded, each with its `place` for `read_pair`.

    columns: read only these. Raises ValueError for a shard that was altered.
    """
    wanted = None if columns is None else sorted({*columns, "split", "source_key"})
    for shard in sorted(manifest.shards, key=lambda s: s.name):
        file = _open_shard(pairs, shard)
        for group in range(file.num_row_groups):
            for number, row in enumerate(file.read_row_group(group, columns=wanted).to_pylist()):
                if row["split"] == split and row["source_key"] not in shard.dropped_sources:
                    yield {**row, "place": f"{shard.name}#{group}#{number}"}


def read_pair(pairs: str, place: str) -> tuple[bytes, bytes]:
    """Return the encoded (hr, lr) of the row at a `place`."""
    name, group, number = place.rsplit("#", 2)
    return _row_group(storage.join(pairs, name), int(group))[int(number)]


@lru_cache(maxsize=4)
def _row_group(uri: str, group: int) -> list[tuple[bytes, bytes]]:
    with storage.open_file(uri) as handle:
        file = pq.ParquetFile(handle, page_checksum_verification=True)
        columns = file.read_row_group(group, columns=["hr", "lr"]).to_pydict()
    return list(zip(columns["hr"], columns["lr"], strict=True))


def _open_shard(pairs: str, shard: Shard) -> pq.ParquetFile:
    data = storage.read_bytes(storage.join(pairs, shard.name))
    if storage.digest_bytes(data) != shard.sha256:
        raise ValueError(f"shard ({shard.name}) must have sha256 {shard.sha256}; it was altered: make it again")
    return pq.ParquetFile(io.BytesIO(data))

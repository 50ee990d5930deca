"""What is in a pair set, in numbers: of one patch when it is made, of the whole set when it is committed.

Samples of every type are measured on one scale, levels of 255: 0 is the low and 255 the high end of the value range.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image

from pipelines.manifest import SPLITS

BINS = 32
# What `aggregate` reads. With `hr` and `lr` as well it also counts the bytes of the blobs, which reads the whole set.
COLUMNS = ["split", "source_key", "hr_h", "hr_w", "hr_channels", "hr_dtype", "source_format", "source_profile"]
COLUMNS += ["mean", "deviation", "histogram"]
SAMPLE_COLUMNS = ["pair_id", "split"]
SAMPLE_PAIRS = 24


def measure(pixels: NDArray[Any], *, value_range: tuple[float, float]) -> dict[str, list[Any]]:
    """Return mean and deviation per channel in levels of 255, and histogram, channel after channel, BINS counts each.

    pixels: HWC, uint8, uint16 or float32. The bins are equal parts of the value range; samples outside of it fall into
    the first and the last one. Integers are summed exactly. Raises ValueError for another type or shape, a range that
    is not one, and floats that are not finite: a caller leaves out what is not valid.
    """
    low, high = value_range
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"value_range is {value_range}: must be two finite numbers, the lower first")
    if pixels.ndim != 3 or 0 in pixels.shape or pixels.dtype not in (np.uint8, np.uint16, np.float32):
        raise ValueError(f"pixels: {pixels.dtype} {pixels.shape}; must be uint8, uint16 or float32, HWC, not empty")
    if pixels.dtype == np.float32:
        return _measure_floats(pixels, low, high)
    means, deviations, histogram = [], [], []
    unit, count = 255 / (high - low), pixels.shape[0] * pixels.shape[1]
    for counts in _counts(pixels):
        level, square, bins = _levels(counts.size, low, high)
        total, squares = int(counts @ level), int(counts @ square)
        means.append((total / count - low) * unit)
        deviations.append(math.sqrt(count * squares - total * total) / count * unit)  # exact before the root
        histogram += np.bincount(bins, weights=counts, minlength=BINS).astype(int).tolist()
    return {"mean": means, "deviation": deviations, "histogram": histogram}


def _counts(pixels: NDArray[Any]) -> Iterable[NDArray[np.int64]]:
    """Yield how often each level occurs, channel by channel. Pillow counts grey and RGB in a third of NumPy's time."""
    if pixels.dtype == np.uint8 and pixels.shape[2] in (1, 3):
        image = Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels))
        yield from np.array(image.histogram()).reshape(-1, 256)
        return
    for channel in range(pixels.shape[2]):
        yield np.bincount(pixels[:, :, channel].ravel(), minlength=256)


@lru_cache(maxsize=16)
def _levels(num: int, low: float, high: float) -> tuple[NDArray[np.int64], ...]:
    """Return the levels 0..num-1, their squares and their bins."""
    level = np.arange(num)
    return level, level * level, np.clip(np.floor((level - low) * BINS / (high - low)), 0, BINS - 1).astype(np.int64)


def _measure_floats(pixels: NDArray[Any], low: float, high: float) -> dict[str, list[Any]]:
    if not np.isfinite(pixels).all():
        raise ValueError("pixels: some are not finite; leave out what is not valid")
    share = (pixels.reshape(-1, pixels.shape[2]).astype(np.float64) - low) / (high - low)  # (N, C), 0..1
    bins = np.clip(np.floor(share * BINS), 0, BINS - 1).astype(np.int64)
    histogram = [np.bincount(column, minlength=BINS).tolist() for column in bins.T]
    return {
        "mean": (share.mean(axis=0) * 255).tolist(),
        "deviation": (share.std(axis=0) * 255).tolist(),
        "histogram": [count for counts in histogram for count in counts],
    }


@dataclass(frozen=True, kw_only=True)
class SplitStatistics:
    """One split. Bytes are those of the blobs, None where the tables did not hold them."""

    pairs: int
    sources: int
    hr_megapixels: float
    hr_bytes: int | None
    lr_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Colours:
    """All HR pixels of one number of channels: mean and deviation in levels of 255, BINS counts for each channel."""

    pixels: int
    mean: list[float]
    deviation: list[float]
    histogram: list[list[int]]


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """A pair set in numbers. Everything but `splits` and `colours` counts pairs; sizes are HR height x width."""

    splits: dict[str, SplitStatistics]
    sizes: dict[str, int]
    channels: dict[str, int]
    dtypes: dict[str, int]
    formats: dict[str, int]
    profiles: dict[str, int]
    colours: dict[str, Colours]

    @property
    def pairs(self) -> int:
        """Pairs of all splits."""
        return sum(split.pairs for split in self.splits.values())

    def to_json(self) -> dict[str, Any]:
        """Return it as plain dicts, lists and numbers: equal sets give equal ones."""
        return asdict(self)


class _Pool(NamedTuple):
    """Pixels, and per channel their mean, the sum of squared distances from it, and their histogram."""

    pixels: int
    mean: NDArray[np.float64]  # (C,)
    squares: NDArray[np.float64]  # (C,)
    histogram: NDArray[np.int64]  # (C, BINS)


def aggregate(tables: Iterable[pa.Table]) -> Statistics:
    """Return the statistics of the rows of these tables, of COLUMNS at least: one table a shard, all rows that count.

    Means and deviations are pooled exactly from those of the pairs (law of total variance), each weighted by its
    pixels. A source is counted once for each table that it is in: its pairs lie in one shard. Raises ValueError for a
    split that there is not.
    """
    splits = {split: Counter[str]() for split in SPLITS}
    counted: dict[str, Counter[str]] = {name: Counter() for name in ("sizes", "channels", "dtypes", "formats")}
    counted["profiles"] = Counter()
    pools: dict[int, _Pool] = {}
    has_bytes = True
    for table in tables:
        if table.num_rows:
            has_bytes = has_bytes and {"hr", "lr"} <= set(table.column_names)
            _count_splits(table, splits)
            _count_kinds(table, counted)
            _pool_colours(table, pools)
    return Statistics(
        splits={
            split: SplitStatistics(
                pairs=found["pairs"],
                sources=found["sources"],
                hr_megapixels=found["pixels"] / 1e6,
                hr_bytes=found["hr"] if has_bytes else None,
                lr_bytes=found["lr"] if has_bytes else None,
            )
            for split, found in splits.items()
        },
        colours={
            str(channels): Colours(
                pixels=pool.pixels,
                mean=pool.mean.tolist(),
                deviation=np.sqrt(pool.squares / pool.pixels).tolist(),
                histogram=pool.histogram.tolist(),
            )
            for channels, pool in sorted(pools.items())
        },
        **{name: dict(sorted(counter.items())) for name, counter in counted.items()},
    )


def _count_splits(table: pa.Table, splits: dict[str, Counter[str]]) -> None:
    pixels = pc.multiply(table["hr_h"].cast(pa.int64()), table["hr_w"].cast(pa.int64()))
    measured = pa.table({"split": table["split"], "pixels": pixels})
    for name in ("hr", "lr"):
        if name in table.column_names:
            measured = measured.append_column(name, pc.binary_length(table[name]).cast(pa.int64()))
    sums = [(name, "sum") for name in measured.column_names[1:]]
    for row in measured.group_by("split").aggregate([([], "count_all"), *sums]).to_pylist():
        if row["split"] not in splits:
            raise ValueError(f"split ({row['split']!r}) must be one of {', '.join(SPLITS)}; make the set again")
        splits[row["split"]].update({name: row[f"{name}_sum"] for name, _ in sums} | {"pairs": row["count_all"]})
    sources = table.select(["split", "source_key"]).group_by(["split", "source_key"]).aggregate([])
    for row in sources["split"].value_counts().to_pylist():
        splits[row["values"]]["sources"] += row["counts"]


def _count_kinds(table: pa.Table, counted: dict[str, Counter[str]]) -> None:
    columns = {
        "channels": "hr_channels",
        "dtypes": "hr_dtype",
        "formats": "source_format",
        "profiles": "source_profile",
    }
    for name, column in columns.items():
        for row in table[column].value_counts().to_pylist():
            counted[name][str(row["values"])] += row["counts"]
    for row in table.group_by(["hr_h", "hr_w"]).aggregate([([], "count_all")]).to_pylist():
        counted["sizes"][f"{row['hr_h']}x{row['hr_w']}"] += row["count_all"]


def _pool_colours(table: pa.Table, pools: dict[int, _Pool]) -> None:
    """Add the rows of a table to the pools, one for each number of channels."""
    columns = table.select(["hr_h", "hr_w", "hr_channels", "mean", "deviation", "histogram"])
    for batch in columns.to_batches(max_chunksize=1 << 16):
        for channels in sorted(pc.unique(batch["hr_channels"]).to_pylist()):
            rows = batch.filter(pc.equal(batch["hr_channels"], channels))
            pool = _pool(rows, channels)
            pools[channels] = _merge(pools[channels], pool) if channels in pools else pool


def _pool(rows: pa.RecordBatch, channels: int) -> _Pool:
    pixels = rows["hr_h"].to_numpy().astype(np.int64) * rows["hr_w"].to_numpy()  # (N,)
    mean, deviation = (_values(rows[name]).reshape(-1, channels).astype(np.float64) for name in ("mean", "deviation"))
    histogram = _values(rows["histogram"]).reshape(-1, channels * BINS).sum(axis=0, dtype=np.int64)
    pooled = pixels @ mean / pixels.sum()
    squares = pixels @ (deviation**2 + (mean - pooled) ** 2)
    return _Pool(int(pixels.sum()), pooled, squares, histogram.reshape(channels, BINS))


def _values(column: pa.ListArray) -> NDArray[Any]:
    return np.asarray(column.flatten().to_numpy(zero_copy_only=False))


def _merge(a: _Pool, b: _Pool) -> _Pool:
    """Return the pool of both. Chan et al., "Updating formulae and a pairwise algorithm", 1979."""
    pixels, apart = a.pixels + b.pixels, b.mean - a.mean
    squares = a.squares + b.squares + apart**2 * (a.pixels * b.pixels / pixels)
    return _Pool(pixels, a.mean + apart * (b.pixels / pixels), squares, a.histogram + b.histogram)


def choose(tables: Iterable[pa.Table], *, num: int = SAMPLE_PAIRS, split: str = "train") -> pa.Table | None:
    """Return the rows of a split with the smallest pair ids, in that order, with the columns that the tables have.

    A pair id is a hash, so this is a fair sample, and one that the order of the shards does not change. None where the
    split is empty. Tables hold SAMPLE_COLUMNS at least.
    """
    chosen: pa.Table | None = None
    for table in tables:
        # The ids alone are filtered and sorted: only the chosen rows are copied, with whatever blobs they have.
        rows = pc.indices_nonzero(pc.equal(table["split"], split))
        smallest = table.take(rows.take(pc.sort_indices(table["pair_id"].take(rows))[:num]))
        both = smallest if chosen is None else pa.concat_tables([chosen, smallest])
        chosen = both.take(pc.sort_indices(both["pair_id"])[:num])
    return chosen if chosen is not None and chosen.num_rows else None

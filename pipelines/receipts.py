"""Tables of receipts (RECEIPT_SCHEMA) as numbers, by Arrow: a night may have a million rows."""

from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

MOST_EXAMPLES = 3
MOST_ATTENTION = 200
MOST_MESSAGE = 500  # characters of an example


@dataclass(frozen=True)
class Example:
    """One asset that failed, and what was said of it."""

    key: str
    message: str


@dataclass(frozen=True)
class Failure:
    """The assets that failed for one reason: how many, and the first of them by key."""

    stage: str
    reason: str
    count: int
    examples: list[Example]


@dataclass(frozen=True)
class Distribution:
    """A metric over the assets where it was measured and is finite; percentiles interpolate linearly."""

    count: int
    mean: float
    min: float
    p1: float
    p5: float
    p50: float
    p95: float
    p99: float
    max: float


def metric(rows: pa.Table, name: str) -> pa.ChunkedArray:
    """Return one metric of each row, null where it has none."""
    return pc.map_lookup(rows["metrics"], query_key=pa.scalar(name), occurrence="first")


def attention(rows: pa.Table) -> list[dict[str, Any]]:
    """Return at most MOST_ATTENTION assets to look at: rejected before review, the lowest LR-PSNR first."""
    graded = rows.filter(pc.is_in(rows["reason"], value_set=pa.array(["review", "rejected"])))
    names = ["key", "out_key", "reason", "message"]
    table = graded.select(names).append_column("lr_psnr", metric(graded, "lr_psnr"))
    table = table.append_column("colour_drift", metric(graded, "colour_drift"))
    order = pc.sort_indices(table, sort_keys=[("reason", "ascending"), ("lr_psnr", "ascending"), ("key", "ascending")])
    found: list[dict[str, Any]] = table.take(order[:MOST_ATTENTION]).to_pylist()
    return found


def latest(rows: pa.Table) -> pa.Table:
    """Return the last row of each key: an asset that was lost and done again in one run is one asset."""
    order = pa.array(np.arange(rows.num_rows))
    last = pa.table({"key": rows["key"], "order": order}).group_by("key").aggregate([("order", "max")])["order_max"]
    return rows if len(last) == rows.num_rows else rows.filter(pc.is_in(order, value_set=last))


def failures(dead: pa.Table) -> list[Failure]:
    """Return the dead letters by stage and reason, the most frequent first."""
    order = pc.sort_indices(dead, sort_keys=[("stage", "ascending"), ("reason", "ascending"), ("key", "ascending")])
    kinds = dead.select(["stage", "reason"]).take(order).group_by(["stage", "reason"], use_threads=False)
    found, start = [], 0
    for kind in kinds.aggregate([([], "count_all")]).to_pylist():  # in the order of the sorted rows
        few = dead.select(["key", "message"]).take(order[start : start + min(MOST_EXAMPLES, kind["count_all"])])
        examples = [Example(row["key"], row["message"][:MOST_MESSAGE]) for row in few.to_pylist()]
        found.append(Failure(kind["stage"], kind["reason"], kind["count_all"], examples))
        start += kind["count_all"]
    return sorted(found, key=lambda failed: -failed.count)


def distribution(values: pa.ChunkedArray) -> Distribution | None:
    """Return how a metric is distributed, None where it was measured nowhere."""
    numbers = values.drop_null().to_numpy()
    numbers = numbers[np.isfinite(numbers)]
    if not len(numbers):
        return None
    at = np.percentile(numbers, [0, 1, 5, 50, 95, 99, 100])
    return Distribution(len(numbers), float(numbers.mean()), *map(float, at))


def digest(rows: pa.Table) -> str:
    """Return a hash of all (key, etag), whatever their order."""
    hasher = blake2b(digest_size=16)
    sorted_rows = rows.select(["key", "etag"]).sort_by("key")
    for chunk in pc.binary_join_element_wise(sorted_rows["key"], sorted_rows["etag"], "", "\0").chunks:
        ends = np.frombuffer(chunk.buffers()[1], np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
        hasher.update(memoryview(chunk.buffers()[2] or b"")[int(ends[0]) : int(ends[-1])])
    return hasher.hexdigest()


def total(rows: pa.Table, name: str) -> float:
    """Return the sum of a metric over the rows where it was measured and is finite."""
    values = metric(rows, name)
    return float(pc.sum(values.filter(pc.is_finite(values))).as_py() or 0.0)


def counts(values: pa.ChunkedArray) -> dict[str, int]:
    """Return how often each value occurs, the most frequent first."""
    found = {pair["values"]: pair["counts"] for pair in pc.value_counts(values).to_pylist()}
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def count(flags: pa.ChunkedArray) -> int:
    """Return how many are true."""
    return int(pc.sum(flags).as_py() or 0)

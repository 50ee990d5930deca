"""What a night would take, told before it begins: output megapixels, device time, hours and cost.

Megapixels come from the headers of a few assets, device time from what earlier nights recorded (or a measurement).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.ledger import Ledger

SAMPLE = 24  # headers that are read
LEAST_RECEIPTS, MOST_RECEIPTS = 5, 1000  # that a calibration is taken from, the newest
_SUFFIX = r"(?s)\A.*?(?P<suffix>\.[^./]*)?\z"


class Calibration(NamedTuple):
    """Seconds of device time per output megapixel, and a clause that says where the number comes from."""

    seconds_per_megapixel: float
    origin: str


class NightForecast(NamedTuple):
    """A sentence for a person, and the numbers in it."""

    text: str
    metrics: dict[str, float]


def calibrate(output: str, *, recipe: str, model: str, measure: Callable[[], float]) -> Calibration:
    """Return the calibration of a recipe (its fingerprint) and a model (its digest) on the devices used so far.

    Total device_s over total megapixels of the newest receipts: what an image costs follows its size, and the totals
    let no small one weigh like a large one. measure, for a ledger that has too few: returns seconds per megapixel.
    """
    for _ in range(10):
        try:
            seconds, megapixels, count = _recorded(Ledger(output), recipe=recipe, model=model)
            break
        except FileNotFoundError:  # compacted under our hands
            continue
    else:
        count = 0
    if count >= LEAST_RECEIPTS:
        return Calibration(seconds / megapixels, f"as the newest {count} results of this recipe and model took")
    return Calibration(measure(), "as measured now: the ledger has too few results of this recipe and model")


def forecast_night(
    rows: pa.Table,
    *,
    megapixels_of: Callable[[dict[str, Any]], float | None],
    calibration: Calibration,
    num_workers: int,
    device_hour_price: float,
) -> NightForecast:
    """Return what all `rows` (key, etag, size, ...) would take, from SAMPLE of them that lie evenly in the list.

    megapixels_of: the OUTPUT megapixels of a row, by its header; None for one that cannot be read, which will be a
    dead letter and costs nothing. Scaled by bytes, those of each suffix by what was found for it where any was.
    metrics: sampled, unreadable, megapixels, megapixels_margin (one standard error), seconds_per_megapixel,
    device_hours, hours (wall time of num_workers devices that are always busy), cost.
    """
    count = min(SAMPLE, rows.num_rows)
    places = [(2 * index + 1) * rows.num_rows // (2 * count) for index in range(count)]  # the middles of equal parts
    sample = rows.take(pa.array(places, pa.int64())).to_pylist()
    found = [megapixels_of(row) for row in sample]
    megapixels, margin = _scaled(rows, sample, [value or 0.0 for value in found])
    device_hours = megapixels * calibration.seconds_per_megapixel / 3600
    unreadable = sum(value is None for value in found)
    metrics = {
        "sampled": float(count),
        "unreadable": float(unreadable),
        "megapixels": megapixels,
        "megapixels_margin": margin,
        "seconds_per_megapixel": calibration.seconds_per_megapixel,
        "device_hours": device_hours,
        "hours": device_hours / num_workers,
        "cost": device_hours * device_hour_price,
    }
    if not count:
        return NightForecast("nothing to do", metrics)
    text = (
        f"judged by {count} of them ({unreadable} cannot be read): about {megapixels:,.1f} output megapixels "
        f"(+- {margin:,.1f}), {duration(device_hours)} of device time at {calibration.seconds_per_megapixel:.3g} s per "
        f"megapixel ({calibration.origin}), {duration(metrics['hours'])} with num_workers {num_workers}"
    )
    return NightForecast(text + (f", cost {metrics['cost']:.2f}" if device_hour_price else ""), metrics)


def duration(hours: float) -> str:
    """Return a time in the unit that a person would use."""
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min" if hours * 60 >= 1 else f"{hours * 3600:.1f} s"


def _scaled(rows: pa.Table, sample: list[dict[str, Any]], megapixels: list[float]) -> tuple[float, float]:
    """Return (megapixels of all rows, standard error of that) by ratio to bytes, one ratio per suffix sampled."""
    if len(sample) == rows.num_rows:
        return sum(megapixels), 0.0
    totals = pa.table({"suffix": _suffixes(rows["key"]), "size": pc.max_element_wise(rows["size"], 1)})
    by_suffix = totals.group_by("suffix").aggregate([("size", "sum"), ("size", "count")]).to_pylist()
    suffixes = _suffixes(pa.chunked_array([[row["key"] for row in sample]], pa.string())).to_pylist()
    sizes, values = np.array([max(row["size"], 1) for row in sample], np.float64), np.array(megapixels)
    groups = {suffix: np.array([other == suffix for other in suffixes]) for suffix in set(suffixes)}
    overall = values.sum() / sizes.sum()
    ratios = {suffix: values[group].sum() / sizes[group].sum() for suffix, group in groups.items()}
    total = sum(row["size_sum"] * ratios.get(row["suffix"], overall) for row in by_suffix)
    residuals = values - sizes * np.array([ratios[suffix] for suffix in suffixes])
    spread = math.sqrt(float((residuals**2).sum()) / max(1, len(sample) - len(groups)))
    unseen = 1 - len(sample) / rows.num_rows
    return float(total), rows.num_rows * spread * math.sqrt(unseen / len(sample))


def _suffixes(keys: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the lower-case suffix of each key, ".jpg", "" for none."""
    return pc.utf8_lower(pc.struct_field(pc.extract_regex(keys, _SUFFIX), "suffix"))


def _recorded(ledger: Ledger, *, recipe: str, model: str) -> tuple[float, float, int]:
    """Return (device seconds, output megapixels, number of receipts) of the newest results."""
    seconds = megapixels = 0.0
    count = 0
    for table in ledger.newest(["recipe", "model", "status", "metrics"]):
        ours = pc.and_(pc.equal(table["recipe"], recipe), pc.equal(table["model"], model))
        rows = table.filter(pc.and_(ours, pc.equal(table["status"], "done")))
        for metrics in rows.slice(0, MOST_RECEIPTS)["metrics"].to_pylist():
            row = dict(metrics or ())
            if row.get("device_s", 0.0) > 0 and row.get("megapixels", 0.0) > 0:
                seconds, megapixels, count = seconds + row["device_s"], megapixels + row["megapixels"], count + 1
            if count == MOST_RECEIPTS:
                return seconds, megapixels, count
    return seconds, megapixels, count

"""Where the marks of the report's plots go: plain numbers, which templates draw as SVG in the colours of the page."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pipelines.curve import Curve

BINS = 48
TICKS = 6  # about as many as can be read on a phone
COLOURS, LETTER_PX = 6, 7.2
SHAPES = (  # within 6 px of the middle, about equally heavy
    "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0Z",
    "M-4.5 -4.5H4.5V4.5H-4.5Z",
    "M0 -6.2L6.2 0L0 6.2L-6.2 0Z",
    "M0 -5.8L5.8 4.6H-5.8Z",
    "M0 5.8L5.8 -4.6H-5.8Z",
)


def ticks(low: float, high: float, *, number: int = TICKS) -> list[float]:
    """Return round values (1, 2 or 5 times a power of ten apart) within [low, high], at most about number of them."""
    if not high > low:
        return [low]
    rough = (high - low) / number
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{k * step:.12g}") for k in range(first, last + 1)]


def log_ticks(low: float, high: float, *, number: int = TICKS) -> list[float]:
    """Return powers of ten within [low, high], with 2 and 5 times them while there are few. low: above 0."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [float(f"{f * 10.0**p:.12g}") for p in powers for f in factors if low <= f * 10.0**p <= high]
        if len(found) <= number + 2:
            break
    return found


def plain(value: float) -> str:
    """Return a tick or a cost with no more digits than it needs: at most 4, and no exponent."""
    if value == 0:
        return "0"
    digits = max(0, 3 - math.floor(math.log10(abs(value))))
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


@dataclass(frozen=True)
class Axis:
    """Values from low to high on px from start to end."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)


def curve_plot(curve: "Curve", *, width: int, height: int) -> dict[str, Any]:
    """Return series, marks, labels and ticks of quality against device time in a box of width x height px.

    Points that differ in their start level alone cost the same: they lie along that. A point without a time above 0 or
    without the measure has no place and is only counted, as `missing`.
    """
    dial = curve.is_dial
    drawn = [index for index, point in enumerate(curve.points) if _has_place(point, curve.measure)]
    missing = len(curve.points) - len(drawn)
    if not drawn:
        return {"series": [], "missing": missing}
    places = [point.start_level if dial else point.device_s_per_mp for point in (curve.points[i] for i in drawn)]
    found = [curve.points[index].summary[curve.measure] for index in drawn]
    bottom, top = min(i.low for i in found), max(i.high for i in found)
    room = 0.08 * (top - bottom) or max(1e-3 * abs(top), 1e-3)
    x = Axis(min(places) / 1.25, max(places) * 1.25, 58, width - 16, log=True)
    if dial:
        x = Axis(min(places) - 0.05, max(places) + 0.05, 58, width - 16)
    y = Axis(bottom - room, top + room, height - 44, 14)
    numbers: dict[tuple[str, str], int] = {}
    for point in curve.points:
        numbers.setdefault((point.choice.sampler, point.choice.grid), len(numbers))
    marks = [
        {
            "index": index,
            "series": numbers[point.choice.sampler, point.choice.grid],
            "x": x(place),
            "y": y(interval.mean),
            "low": y(interval.low),
            "high": y(interval.high),
            "text": f"{point.start_level:g}" if dial else str(point.choice.num_steps),
            "role": curve.role(index),
        }
        for index, place, interval in zip(drawn, places, found, strict=True)
        for point in [curve.points[index]]
    ]
    return {
        "width": width,
        "height": height,
        "left": x.start,
        "right": x.end,
        "top": y.end,
        "bottom": y.start,
        "x_ticks": [(x(value), plain(value)) for value in (ticks if dial else log_ticks)(x.low, x.high)],
        "y_ticks": [(y(value), plain(value)) for value in ticks(y.low, y.high)],
        "series": [
            {
                "label": f"{sampler}, {grid}",
                "colour": number % COLOURS,
                "shape": SHAPES[number % len(SHAPES)],
                "line": " ".join(f"{mark['x']},{mark['y']}" for mark in by_cost),
                "marks": by_cost,
            }
            for (sampler, grid), number in numbers.items()
            for by_cost in [sorted((m for m in marks if m["series"] == number), key=lambda m: (m["x"], m["index"]))]
        ],
        "labels": _labels(marks, x, y, unit="" if dial else " steps"),
        "missing": missing,
    }


def _has_place(point: Any, measure: str) -> bool:
    return (
        measure in point.summary
        and all(math.isfinite(end) for end in point.summary[measure])
        and 0 < point.device_s_per_mp < math.inf
    )


def _labels(marks: Sequence[Mapping[str, Any]], x: Axis, y: Axis, *, unit: str) -> list[dict[str, Any]]:
    """Return the texts beside marks where they hide no mark and no other text: knee and chosen first.

    One for which no place is free is left out: it is in the mark's tooltip and in the table.
    """
    taken = [(mark["x"] - 6, mark["y"] - 6, mark["x"] + 6, mark["y"] + 6) for mark in marks]
    for a, b in pairwise(sorted(marks, key=lambda m: (m["series"], m["x"], m["index"]))):
        if a["series"] == b["series"]:  # the line between them, as small boxes
            steps = np.linspace(0, 1, 2 + int(math.hypot(b["x"] - a["x"], b["y"] - a["y"]) / 4))[:, None]
            line = np.array([a["x"], a["y"]]) + steps * np.array([b["x"] - a["x"], b["y"] - a["y"]])
            taken += [(x_px - 1, y_px - 1, x_px + 1, y_px + 1) for x_px, y_px in line.tolist()]
    labels = []
    for mark in sorted(marks, key=lambda m: (not m["role"], m["x"], m["index"])):
        text = f"{mark['text']}{unit}: {mark['role']}" if mark["role"] else mark["text"]
        wide = LETTER_PX * len(text)
        far, up = (13, 15) if mark["role"] else (9, 11)
        places = [(-wide / 2, -up), (-wide / 2, up + 9), (-far - wide, -up + 5), (far, up + 4), (far, -up + 5),
                  (-far - wide, up + 4), (far, 4), (-far - wide, 4), (-wide, -up - 12), (-wide, up + 22)]  # fmt: skip
        boxes = [(mark["x"] + dx, mark["y"] + dy - 10, mark["x"] + dx + wide, mark["y"] + dy + 2) for dx, dy in places]
        inside = [b for b in boxes if b[0] > x.start and b[2] < x.end + 16 and b[1] > y.end - 10 and b[3] < y.start]
        free = [box for box in inside if not any(_overlap(box, other) for other in taken)]
        if free or (mark["role"] and inside):
            box = (free or inside)[0]
            taken.append(box)
            labels.append({"x": round(box[0], 1), "y": round(box[3] - 2, 1), "text": text, "role": mark["role"]})
    return labels


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def distributions(values: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return histograms and quantiles of each method's values on one axis, in a box of BINS x 100 each.

    values: method -> finite values. The highest bar of all methods is 100 high, so the methods can be compared.
    """
    every = np.concatenate([np.asarray(found, np.float64) for found in values.values()])
    low, high = float(every.min()), float(every.max())
    if not high - low > 1e-9 * max(abs(low), abs(high)):  # all alike: one bar in the middle
        low, high = low - 0.5, high + 0.5
    counts = {method: np.histogram(found, BINS, (low, high))[0] for method, found in values.items()}
    highest = max(int(found.max()) for found in counts.values())

    def at(value: float) -> float:
        return round((value - low) / (high - low) * BINS, 2)

    methods = {}
    for method, found in values.items():
        if not len(found):
            continue
        quantiles = [float(q) for q in np.quantile(found, (0.05, 0.25, 0.5, 0.75, 0.95))]
        heights = [(i, 100 - 100 * n / highest) for i, n in enumerate(counts[method]) if n]
        methods[method] = {
            "bars": "".join(f"M{i} 100V{top:.1f}H{i + 1}V100Z" for i, top in heights),
            "quantiles": quantiles,
            "places": [at(quantile) for quantile in quantiles],
            "mean": float(np.mean(found)),
            "mean_at": at(float(np.mean(found))),
            "count": len(found),
        }
    return {
        "methods": methods,
        "ticks": [(f"{100 * at(value) / BINS:.1f}", plain(value)) for value in ticks(low, high)],
    }

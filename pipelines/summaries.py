"""The scores of an evaluation in numbers that a registry holds: means, and the ends of their intervals."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.evaluated import Evaluation
from pipelines.intervals import Interval, mean_interval


def scored_methods(rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return the methods that gave at least one image a score."""
    return {row["method"] for row in rows if not row["reason"]}


def lost(rows: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return key -> the first row that says why, of each image that a method has no score for.

    A method that has none at all is out of the comparison: it takes no image from the others.
    """
    alive = scored_methods(rows)
    return {row["key"]: row for row in reversed(rows) if row["reason"] and (row["method"] in alive or not alive)}


def summarise(
    rows: Sequence[Mapping[str, Any]], methods: Sequence[str], measures: Sequence[str]
) -> dict[str, dict[str, Interval]]:
    """Return method -> measure -> mean and 95 % interval over the images that none of them has `lost`.

    What none has is left out, and a measure with a value that is not finite, which makes no mean.
    """
    dead = lost(rows)
    found: dict[str, dict[str, Interval]] = {}
    for method in methods:
        own = [row for row in rows if row["method"] == method and not row["reason"] and row["key"] not in dead]
        values = {name: [row[name] for row in own if row.get(name) is not None] for name in measures}
        finite = {name: of_it for name, of_it in values.items() if of_it and all(map(math.isfinite, of_it))}
        found[method] = {name: mean_interval(of_it) for name, of_it in finite.items()}
    return found


def metrics_of(evaluation: Evaluation) -> tuple[dict[str, float], dict[str, float]]:
    """Return the means and the measures of the set by flat names, `<method>_<measure>`, and the ends of intervals."""
    means: dict[str, float] = {}
    ends: dict[str, float] = {}
    for method, measures in evaluation.summary.items():
        for name, found in measures.items():
            means[f"{method}_{name}"] = found.mean
            ends |= {f"{method}_{name}_low": found.low, f"{method}_{name}_high": found.high}
    means |= {f"{method}_{name}": value for method, of_it in evaluation.sets.items() for name, value in of_it.items()}
    seconds = [row["seconds"] for row in evaluation.rows if row["method"] == "model" and not row["reason"]]
    return means | ({"seconds_per_image": sum(seconds) / len(seconds)} if seconds else {}), ends

"""The scores of an evaluation in numbers that a registry holds: means, and the ends of their intervals."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.evaluated import Evaluation
from pipelines.intervals import Interval, mean_interval


def summarise(
    rows: Sequence[Mapping[str, Any]], methods: Sequence[str], measures: Sequence[str]
) -> dict[str, dict[str, Interval]]:
    """Return method -> measure -> mean and 95 % interval over the images that every method has a score for.

    What none has is left out, and a measure with a value that is not finite, which makes no mean.
    """
    dead = {row["key"] for row in rows if row["reason"]}
    found: dict[str, dict[str, Interval]] = {}
    for method in methods:
        own = [row for row in rows if row["method"] == method and row["key"] not in dead]
        values = {name: [row[name] for row in own if row.get(name) is not None] for name in measures}
        found[method] = {
            name: mean_interval(of_it) for name, of_it in values.items() if of_it and all(map(math.isfinite, of_it))
        }
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

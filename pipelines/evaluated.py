"""What an evaluation found, as plain values: what its report is made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipelines.intervals import Interval

if TYPE_CHECKING:  # a curve is drawn from what it says of itself
    from pipelines.curve import Curve


def judged(rows: Sequence[Mapping[str, Any]], methods: Sequence[str]) -> list["Judged"]:
    """Return one entry an image, in the order of the rows. A method without a row has no score, and no reason."""
    found: dict[str, Judged] = {}
    for row in rows:
        if row["method"] not in methods:
            continue
        image = found.setdefault(row["key"], Judged(key=row["key"]))
        if row["reason"]:
            image.failures[row["method"]] = (row["reason"], row.get("message") or "")
        else:
            image.scores[row["method"]] = row
    return list(found.values())


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One image: the rows of the methods that were scored on it, and (reason, message) of the others."""

    key: str
    scores: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    failures: dict[str, tuple[str, str]] = field(default_factory=dict)

    def score(self, method: str, measure: str) -> float | None:
        """Return a score, or None for what was not measured."""
        value = self.scores.get(method, {}).get(measure)
        return None if value is None else float(value)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One image of the contact sheets.

    why: the group that it is shown in, such as "worst PSNR-Y" or "seeded sample". crops: "lr", each method and "hr" ->
    PNG, all of one size in px: LR is enlarged by repeating its pixels. uncertainty: PNG of that size, the standard
    deviation over samples in colours, or None.
    """

    key: str
    why: str
    crops: Mapping[str, bytes]
    uncertainty: bytes | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Methods, what was measured of each on each image, and what is shown of it.

    methods: name -> label, in order. rows: one an image and method: key, method, reason (empty when scored), message
    and the measures, None where one does not apply. measures: those of each image, of `MEASURES`. summary: method ->
    measure -> mean and 95 % interval. sets: method -> measure of `SET_MEASURES` -> value.
    """

    title: str
    methods: Mapping[str, str]
    rows: Sequence[Mapping[str, Any]]
    measures: Sequence[str]
    summary: Mapping[str, Mapping[str, Interval]]
    sets: Mapping[str, Mapping[str, float]]
    pictures: Sequence[Picture]
    curve: "Curve | None"
    provenance: Mapping[str, str]

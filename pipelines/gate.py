"""The promotion gate as a pure function: scores, rules and facts in, a verdict with reasons out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pipelines.intervals import Interval, paired_interval
from pipelines.measures import MEASURES
from pipelines.rules import Floor, Latency, Primary, Rules

CHALLENGER, CHAMPION, BICUBIC = "challenger", "champion", "bicubic"
Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Signature:
    """What a job relies on when the alias moves to another model: the scale, the channels and what it takes in."""

    scale: int
    channels_in: int
    channels_out: int
    takes: str = "image"

    def __str__(self) -> str:
        return f"x{self.scale}, {self.takes} of {self.channels_in} channels to {self.channels_out}"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the rows do not say: the number of images in the frozen set, and the two models' signatures.

    champion None is a first promotion: bicubic is the opponent, as one that loses to bicubic is no champion.
    """

    num_images: int
    challenger: Signature
    champion: Signature | None

    @property
    def opponent(self) -> str:
        """The method with which the challenger is compared."""
        return BICUBIC if self.champion is None else CHAMPION


class Check(NamedTuple):
    """One rule applied: its name, whether it holds, and the numbers in a sentence."""

    rule: str
    holds: bool
    text: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The checks, one per rule, and gains: metric -> how much the challenger's images are better, with its interval."""

    checks: tuple[Check, ...]
    gains: Mapping[str, Interval]

    @property
    def passed(self) -> bool:
        """Whether the challenger may become the champion."""
        return all(check.holds for check in self.checks)

    def lines(self) -> list[str]:
        """Return one line per check."""
        return [f"{'holds' if check.holds else 'FAILS'}  {check.rule}: {check.text}" for check in self.checks]


class _Scores:
    """The rows of the images that both have, by method, in the order of the keys."""

    def __init__(self, rows: Sequence[Row], opponent: str) -> None:
        self.opponent = opponent
        found = {
            method: {row["key"]: row for row in rows if row["method"] == method and not row["reason"]}
            for method in (CHALLENGER, opponent)
        }
        self.alone = {method: found[method].keys() - found[other].keys() for method, other in _crossed(found)}
        self.keys = sorted(found[CHALLENGER].keys() & found[opponent].keys())
        self.pairs = {method: [found[method][key] for key in self.keys] for method in found}
        self.repeated = sum(row["method"] in found for row in rows) - len(
            {(row["key"], row["method"]) for row in rows if row["method"] in found}
        )

    def values(self, method: str, metric: str) -> list[float] | None:
        """Return a metric of each image, None where one of them has it not or it is not finite."""
        found = [row.get(metric) for row in self.pairs[method]]
        values = [float(value) for value in found if value is not None and math.isfinite(value)]
        return values if values and len(values) == len(found) else None

    def both(self, metric: str) -> tuple[list[float], list[float]] | None:
        """Return a metric of the challenger and of the opponent."""
        first, second = self.values(CHALLENGER, metric), self.values(self.opponent, metric)
        return None if first is None or second is None else (first, second)


def judge(rows: Sequence[Row], rules: Rules, facts: Facts) -> Verdict:
    """Return the verdict on long rows, one per image and method; methods but the two compared do not count.

    Every rule has its check, also where another has failed; one that cannot be judged for want of scores fails.
    """
    scores = _Scores(rows, facts.opponent)
    checks = [_signature(facts), _same_images(scores), _dead(scores, rules.max_dead, facts), _finite(scores)]
    gains = {}
    for metric in dict.fromkeys([rules.primary.metric, *rules.guarded]):
        if (both := scores.both(metric)) is not None:
            better = both if MEASURES[metric].better == "higher" else both[::-1]
            gains[metric] = paired_interval(*better, level=rules.primary.level)
    checks.append(_improves(scores, rules.primary, gains))
    checks += [_not_worse(name, margin, rules.primary.level, gains) for name, margin in rules.guarded.items()]
    checks += [_floor(scores, name, floor) for name, floor in rules.floors.items()]
    checks.append(_latency(scores, rules.latency, facts))
    return Verdict(checks=tuple(checks), gains=gains)


def number(value: float, metric: str, *, signed: bool = False) -> str:
    """Return a value of a metric with its digits and unit."""
    measure = MEASURES[metric]
    text = f"{value:{'+' if signed else ''}.{measure.digits}f}"
    return f"{text} {measure.unit}".rstrip()


def _crossed(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    first, second = found
    return [(first, second), (second, first)]


def _signature(facts: Facts) -> Check:
    if facts.champion is None:
        return Check("same signature", True, f"{facts.challenger}; no champion to differ from")
    same = facts.challenger == facts.champion
    text = f"{facts.challenger}, as the champion"
    if not same:
        text = f"{facts.challenger}, champion {facts.champion}: what runs on it would break; register another name"
    return Check("same signature", same, text)


def _same_images(scores: _Scores) -> Check:
    first, second = (len(scores.alone[method]) for method in (CHALLENGER, scores.opponent))
    text = f"{len(scores.keys)} images scored by both, {first} by challenger alone, {second} by {scores.opponent} alone"
    if examples := sorted([*scores.alone[CHALLENGER], *scores.alone[scores.opponent]]):
        text += f", such as {examples[0]!r}"
    if scores.repeated:
        text += f"; {scores.repeated} rows are there twice"
    return Check("same images", bool(scores.keys) and not examples and not scores.repeated, text)


def _dead(scores: _Scores, most: int, facts: Facts) -> Check:
    seen = set(scores.keys).union(*scores.alone.values())
    dead = facts.num_images - len(seen)
    return Check(
        "all scored", 0 <= dead <= most, f"{dead} of {facts.num_images} images without a score, at most {most}"
    )


def _finite(scores: _Scores) -> Check:
    wrong = [
        f"{name} of {method} in {row['key']!r}"
        for method, rows in scores.pairs.items()
        for row in rows
        for name, value in row.items()
        if isinstance(value, float) and not math.isfinite(value)
    ]
    return Check(
        "finite", not wrong, f"values that are not finite: {len(wrong)}" + (f", such as {wrong[0]}" if wrong else "")
    )


def _improves(scores: _Scores, primary: Primary, gains: Mapping[str, Interval]) -> Check:
    name, rule = primary.metric, f"{primary.metric} improves"
    if name not in gains:
        return _unmeasured(rule, name)
    first, second = (float(np.mean(scores.values(method, name) or [math.nan])) for method in scores.pairs)
    gain, sure, enough = gains[name], primary.require_significance, len(scores.keys) > 1
    text = (
        f"{number(first, name)}, {scores.opponent} {number(second, name)}: gain {_interval(gain, name)} at "
        f"{100 * primary.level:.4g} %; {'the low end' if sure else 'the mean'} must be above "
        f"{number(primary.min_gain, name, signed=True)}"
    )
    if sure and not enough:
        text += "; one image shows no spread, so nothing is significant"
    return Check(rule, (gain.low if sure else gain.mean) > primary.min_gain and (enough or not sure), text)


def _not_worse(name: str, margin: float, level: float, gains: Mapping[str, Interval]) -> Check:
    rule = f"{name} no worse"
    if name not in gains:
        return _unmeasured(rule, name)
    text = f"gain {_interval(gains[name], name)} at {100 * level:.4g} %; the low end must reach {number(-margin, name)}"
    return Check(rule, gains[name].low >= -margin, text)


def _floor(scores: _Scores, name: str, floor: Floor) -> Check:
    rule, values = f"{name} floor", scores.values(CHALLENGER, name)
    if values is None:
        return _unmeasured(rule, name)
    found = sorted(values)[int(floor.quantile * len(values))]  # that share may be below
    below = sum(value < floor.per_image_min for value in values)
    what = f"{100 * floor.quantile:.4g} % quantile" if floor.quantile else "worst"
    worst = scores.keys[int(np.argmin(values))]
    text = (
        f"{what} {number(found, name)}, floor {number(floor.per_image_min, name)}; {below} of {len(values)} images are "
        f"below, the lowest is {worst!r} with {number(min(values), name)}"
    )
    return Check(rule, found >= floor.per_image_min, text)


def _latency(scores: _Scores, latency: Latency, facts: Facts) -> Check:
    name, values = latency.metric, scores.values(CHALLENGER, latency.metric)
    others = values if facts.champion is None else scores.values(CHAMPION, name)
    if values is None or others is None:
        return _unmeasured("latency", name)
    mean, other = float(np.mean(values)), float(np.mean(others))
    text, holds = f"{number(mean, name)}", True
    if facts.champion is None:
        text += "; no champion to compare with"
    elif latency.max_ratio is not None:
        ratio = mean / other if other else math.inf if mean else 1.0
        holds = ratio <= latency.max_ratio
        text += f", champion {number(other, name)}: {ratio:.2f} times, at most {latency.max_ratio:.4g}"
    if latency.max_absolute is not None:
        holds = holds and mean <= latency.max_absolute
        text += f"; at most {number(latency.max_absolute, name)}"
    return Check("latency", holds, text)


def _unmeasured(rule: str, name: str) -> Check:
    return Check(rule, False, f"{name} is not a number in every image of both, so this cannot be judged")


def _interval(gain: Interval, name: str) -> str:
    low, high = (number(end, name, signed=True).removesuffix(MEASURES[name].unit).strip() for end in gain[1:])
    return f"{number(gain.mean, name, signed=True)} [{low}, {high}]"

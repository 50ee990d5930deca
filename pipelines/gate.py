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
NOT_FINITE = "nan"  # reason of a row whose result had NaN or infinite values
MOST_NAMES, MOST_MESSAGE = 5, 200  # images that a text names, and characters of a message that it quotes
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
    """The rows of the two: scored by key, lost by key (those with a reason), and pairs, the images that both scored."""

    def __init__(self, rows: Sequence[Row], opponent: str) -> None:
        self.opponent = opponent
        own = {method: [row for row in rows if row["method"] == method] for method in (CHALLENGER, opponent)}
        self.scored = {m: {row["key"]: row for row in found if not row["reason"]} for m, found in own.items()}
        self.lost = {m: {row["key"]: row for row in found if row["reason"]} for m, found in own.items()}
        first, second = (self.scored[method].keys() for method in own)
        self.alone = {CHALLENGER: sorted(first - second), opponent: sorted(second - first)}
        self.keys = sorted(first & second)
        self.pairs = {method: [self.scored[method][key] for key in self.keys] for method in own}
        self.repeated = sum(len(found) - len({row["key"] for row in found}) for found in own.values())

    def values(self, method: str, metric: str) -> list[float] | None:
        """Return a metric of each image of both, None where one of them has it not or it is not finite."""
        return _numbers(self.pairs[method], metric)

    def names(self, keys: Sequence[str], *methods: str) -> str:
        """Return the first keys as a text, and the reason and message of the first, as one of the methods has it."""
        row = next((self.lost[method][keys[0]] for method in methods if keys[0] in self.lost[method]), None)
        why = "no row" if row is None else f"{row['reason']}: {str(row['message'])[:MOST_MESSAGE]!r}"
        more = "".join(f", {key!r}" for key in keys[1:MOST_NAMES])
        rest = f" and {len(keys) - MOST_NAMES} more" if len(keys) > MOST_NAMES else ""
        return f"{keys[0]!r} ({why}){more}{rest}"

    def both(self, metric: str) -> tuple[list[float], list[float]] | None:
        """Return a metric of the challenger and of the opponent."""
        first, second = self.values(CHALLENGER, metric), self.values(self.opponent, metric)
        return None if first is None or second is None else (first, second)


def judge(rows: Sequence[Row], rules: Rules, facts: Facts) -> Verdict:
    """Return the verdict on long rows, one per image and method; methods but the two compared do not count.

    Every rule has its check, also where another has failed; one that cannot be judged for want of scores fails. What
    the opponent alone could not score is no fault of the challenger: it is named, and left out of what is paired.
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
    """Return a value of a metric with its digits and unit; signed, as a difference, with two digits more."""
    measure = MEASURES[metric]
    text = f"{value:+.{measure.digits + 2}f}" if signed else f"{value:.{measure.digits}f}"
    return f"{text} {measure.unit}".rstrip()


def _numbers(rows: Sequence[Row], metric: str) -> list[float] | None:
    found = [row.get(metric) for row in rows]
    values = [float(value) for value in found if value is not None and math.isfinite(value)]
    return values if values and len(values) == len(found) else None


def _signature(facts: Facts) -> Check:
    if facts.champion is None:
        return Check("same signature", True, f"{facts.challenger}; no champion to differ from")
    same = facts.challenger == facts.champion
    text = f"{facts.challenger}, as the champion"
    if not same:
        text = f"{facts.challenger}, champion {facts.champion}: what runs on it would break; register another name"
    return Check("same signature", same, text)


def _same_images(scores: _Scores) -> Check:
    opponent = scores.opponent
    left_out, lost = scores.alone[CHALLENGER], scores.alone[opponent]
    text = f"{len(scores.keys)} images scored by both, {len(left_out)} by challenger alone, {len(lost)} by {opponent} "
    text += "alone"
    if lost:
        text += f"; challenger lost {scores.names(lost, CHALLENGER)}"
    if left_out:
        text += f"; {opponent} lost, and they are not compared: {scores.names(left_out, opponent)}"
    if scores.repeated:
        text += f"; {scores.repeated} rows are there twice"
    return Check("same images", bool(scores.keys) and not lost and not scores.repeated, text)


def _dead(scores: _Scores, most: int, facts: Facts) -> Check:
    seen = set(scores.keys).union(*scores.alone.values())
    dead = facts.num_images - len(seen)
    text = f"{dead} of {facts.num_images} images without a score, at most {most}"
    if known := sorted(set().union(*scores.lost.values()) - seen):
        text += f": {scores.names(known, CHALLENGER, scores.opponent)}"
    return Check("all scored", 0 <= dead <= most, text)


def _finite(scores: _Scores) -> Check:
    """Values of what is compared and of all that the challenger made; a result that was NaN has a reason and no values.

    Such results of the opponent are counted, and refuse nobody: no successor could ever pass.
    """
    everything = {CHALLENGER: scores.scored[CHALLENGER].values(), scores.opponent: scores.pairs[scores.opponent]}
    wrong = [
        f"{name} of {method} in {row['key']!r}"
        for method, rows in everything.items()
        for row in rows
        for name, value in row.items()
        if isinstance(value, float) and not math.isfinite(value)
    ]
    first, second = (
        sorted(key for key, row in lost.items() if row["reason"] == NOT_FINITE) for lost in scores.lost.values()
    )
    wrong += [f"the result of challenger in {key!r}" for key in first]
    text = f"values that are not finite: {len(wrong)}" + (f", such as {wrong[0]}" if wrong else "")
    if second:
        text += f"; results of {scores.opponent} that are not finite, which refuses nobody: {len(second)}, such as "
        text += repr(second[0])
    return Check("finite", not wrong, text)


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
    bound = number(0.0 - margin, name, signed=True)
    text = f"gain {_interval(gains[name], name)} at {100 * level:.4g} %; the low end must reach {bound}"
    return Check(rule, gains[name].low >= -margin, text)


def _floor(scores: _Scores, name: str, floor: Floor) -> Check:
    rows = sorted(scores.scored[CHALLENGER].values(), key=lambda row: str(row["key"]))  # also what is not compared
    rule, values = f"{name} floor", _numbers(rows, name)
    if values is None:
        return _unmeasured(rule, name)
    found = sorted(values)[int(floor.quantile * len(values))]  # that share may be below
    below = sum(value < floor.per_image_min for value in values)
    what = f"{100 * floor.quantile:.4g} % quantile" if floor.quantile else "worst"
    worst = rows[int(np.argmin(values))]["key"]
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

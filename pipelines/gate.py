"""The promotion rules as a pure function: scores in, verdict with reasons out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What a challenger must show. Metrics are row names without their method; dB and seconds.

    primary must rise by min_gain over the champion (over bicubic when there is none yet); every other metric of
    `guarded` may fall by its margin at most; lr_psnr must reach its floor; latency may grow by a factor at most.
    """

    primary: str = "psnr_y"
    min_gain: float = 0.0
    guarded: Mapping[str, float]
    lr_psnr_floor: float = 45.0
    max_latency_ratio: float = 2.0


class Check(NamedTuple):
    """One rule applied: its name, whether it holds, and the numbers in a sentence."""

    rule: str
    holds: bool
    text: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """promoted is true when every check holds."""

    checks: tuple[Check, ...]

    @property
    def promoted(self) -> bool:
        """Whether the challenger may become the champion."""
        return all(check.holds for check in self.checks)

    def lines(self) -> list[str]:
        """Return one line per check."""
        return [f"{'holds' if check.holds else 'FAILS'}  {check.rule}: {check.text}" for check in self.checks]


def judge(
    challenger: Sequence[Mapping[str, Any]], champion: Sequence[Mapping[str, Any]] | None, rules: Rules
) -> Verdict:
    """Return the verdict on scored rows of the same images in the same order; champion None is a first promotion.

    A first challenger is compared with the bicubic scores in its own rows: one that loses to bicubic is no champion.
    """
    scored = [row for row in challenger if not row["reason"]]
    unscored = len(challenger) - len(scored)
    checks = [
        Check("all scored", not unscored and bool(scored), f"{unscored} of {len(challenger)} images have no score")
    ]
    if not scored:
        return Verdict(checks=tuple(checks))
    values = [value for row in scored for name, value in row.items() if name.startswith("model_")]
    finite = all(math.isfinite(value) for value in values)
    checks.append(Check("finite", finite, f"{sum(not math.isfinite(v) for v in values)} scores are not finite"))
    against = "bicubic" if champion is None else "champion"
    if champion is None:
        other = [
            {f"model_{k.removeprefix('bicubic_')}": v for k, v in row.items() if k.startswith("bicubic_")}
            for row in scored
        ]
    else:
        by_key = {row["key"]: row for row in champion if not row["reason"]}
        missing = sum(row["key"] not in by_key for row in scored)
        extra = len(by_key.keys() - {row["key"] for row in challenger})
        text = f"{missing} images have no champion score, {extra} no row of the challenger"
        checks.append(Check("same images", not missing and not extra, text))
        if missing:
            return Verdict(checks=tuple(checks))
        other = [dict(by_key[row["key"]]) for row in scored]
    gain = _mean(scored, rules.primary) - _mean(other, rules.primary)
    checks.append(
        Check(
            f"{rules.primary} improves",
            gain > rules.min_gain,
            f"{_mean(scored, rules.primary):.3f} against {against} {_mean(other, rules.primary):.3f}, "
            f"gain {gain:+.3f}, more than {rules.min_gain:+.3f} is asked",
        )
    )
    for name, margin in rules.guarded.items():
        change = _mean(scored, name) - _mean(other, name)
        checks.append(
            Check(f"{name} holds", change >= -margin, f"change {change:+.4f}, at least {-margin:+.4f} is asked")
        )
    worst = min(float(row["model_lr_psnr"]) for row in scored)
    checks.append(
        Check(
            "lr_psnr floor", worst >= rules.lr_psnr_floor, f"worst {worst:.2f} dB, floor {rules.lr_psnr_floor:.2f} dB"
        )
    )
    if champion is not None:
        ratio = sum(row["seconds"] for row in scored) / max(1e-9, sum(row["seconds"] for row in other))
        checks.append(
            Check(
                "latency", ratio <= rules.max_latency_ratio, f"{ratio:.2f} times, at most {rules.max_latency_ratio:.2f}"
            )
        )
    return Verdict(checks=tuple(checks))


def _mean(rows: Sequence[Mapping[str, Any]], metric: str) -> float:
    return sum(float(row[f"model_{metric}"]) for row in rows) / len(rows)

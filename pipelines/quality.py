"""The quality gate: one asset's measures against thresholds are pass, review or rejected."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pipelines.config import check

Grade = Literal["pass", "review", "rejected"]
_WORST_FIRST: tuple[Grade, ...] = ("rejected", "review", "pass")


@dataclass(frozen=True)
class Thresholds:
    """What is too bad to pass unseen, and what is not published as the model made it.

    LR-PSNR in dB, where less is worse; colour drift in levels of 255, where more is worse. A value that is exactly a
    threshold has not crossed it. Raises ValueError for values out of range or in the wrong order.
    """

    review_lr_psnr: float = 40.0
    reject_lr_psnr: float = 12.0
    review_colour_drift: float = 2.0
    reject_colour_drift: float = 16.0

    def __post_init__(self) -> None:
        for name, high in (("lr_psnr", 100.0), ("colour_drift", 255.0)):
            for field in (f"review_{name}", f"reject_{name}"):
                value = getattr(self, field)
                remedy = f"use {getattr(Thresholds, field):g}"
                check(0 <= value <= high, field, value, f"must be from 0 to {high:g}", remedy)
        check(
            self.reject_lr_psnr <= self.review_lr_psnr, "reject_lr_psnr", self.reject_lr_psnr,
            f"must be at most review_lr_psnr ({self.review_lr_psnr})", "what is rejected is worse than what is reviewed"
        )  # fmt: skip
        check(
            self.reject_colour_drift >= self.review_colour_drift, "reject_colour_drift", self.reject_colour_drift,
            f"must be at least review_colour_drift ({self.review_colour_drift})",
            "what is rejected is worse than what is reviewed",
        )  # fmt: skip


class Verdict(NamedTuple):
    """The worst grade that a metric got, and which metrics crossed which thresholds; "" for pass."""

    verdict: Grade
    message: str


def judge(metrics: Mapping[str, float], thresholds: Thresholds) -> Verdict:
    """Return the verdict on one asset: metrics lr_psnr (dB) and colour_drift (levels of 255).

    What was not measured is not judged; what is not a number is rejected.
    """
    found: list[tuple[Grade, str]] = []
    for name, unit, low_is_bad in (("lr_psnr", "dB", True), ("colour_drift", "levels of 255", False)):
        if name not in metrics:
            continue
        value = metrics[name]
        if math.isnan(value):
            found.append(("rejected", f"{name} is not a number"))
            continue
        word = "below" if low_is_bad else "above"
        limits: tuple[tuple[Grade, float], ...] = (
            ("rejected", getattr(thresholds, f"reject_{name}")),
            ("review", getattr(thresholds, f"review_{name}")),
        )
        for grade, limit in limits:
            if value < limit if low_is_bad else value > limit:
                found.append((grade, f"{name} {_shown(value, limit)} {unit} is {word} {limit:g} ({grade})"))
                break
    found.sort(key=lambda fault: _WORST_FIRST.index(fault[0]))  # a stable sort: metrics keep their order
    return Verdict(found[0][0], "; ".join(text for _, text in found)) if found else Verdict("pass", "")


def _shown(value: float, limit: float) -> str:
    """Return the value in two decimals, in full where those would say that it is the limit."""
    short = f"{value:.2f}"
    return repr(value) if float(short) == limit else short

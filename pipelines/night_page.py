"""A night as one HTML page that needs nothing else and asks for nothing, and its numbers as words."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipelines.contact_sheet import DOUBT_LEVELS, Group
from pipelines.images import REASONS
from pipelines.pages import pages

if TYPE_CHECKING:  # the night writes its page, so it imports this module
    from pipelines.night import Night

GRADES = {  # by the name of Night's number: the label, and the class of its colour
    "passed": ("passed", "good"),
    "review": ("to review", "warn"),
    "rejected": ("rejected, bicubic instead", "low"),
    "skipped": ("skipped", "idle"),
    "dead": ("dead letters", "bad"),
}
MEASURES = {  # unit, and the percentiles to show: those of the worse side
    "lr_psnr": ("LR-PSNR", "dB", ("min", "p1", "p5", "p50", "mean")),
    "colour_drift": ("colour drift", "levels of 255", ("mean", "p50", "p95", "p99", "max")),
    "uncertainty": ("uncertainty", "levels of 255", ("mean", "p50", "p95", "p99", "max")),
}
STAGE_LABELS = {"read": "reading", "decode": "decoding", "device": "device", "encode": "encoding", "publish": "writing"}


def write_night(night: "Night", groups: Sequence[Group], attention: Sequence[Mapping[str, Any]]) -> str:
    """Return the HTML text. What is empty has no section. attention: rows to review, as `receipts.attention`."""
    environment = pages()
    environment.filters |= {"amount": amount, "duration": duration, "share": share, "count": "{:,}".format}
    shown = {strip.key for group in groups for strip in group.strips}
    return environment.get_template("night.html").render(
        night=night,
        title=_title(night),
        grades=[(name, *words, getattr(night, name)) for name, words in GRADES.items() if getattr(night, name)],
        measures=[(*MEASURES[name], found) for name, found in night.measures.items()],
        stages=[(STAGE_LABELS[name], night.stage_s[name], part) for name, part in night.stage_shares.items()],
        most=max((failed.count for failed in night.failures), default=1),
        reasons=REASONS,
        groups=groups,
        anchors={key: f"asset-{number}" for number, key in enumerate(sorted(shown), 1)},
        doubt_levels=DOUBT_LEVELS,
        attention=attention,
        settings=dict(_flat(night.settings)),
    )


def plural(count: int, noun: str) -> str:
    """Return such as "1,203 assets"."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def amount(value: float | None) -> str:
    """Return three digits of a number, all of those before the point; a dash for None."""
    if value is None:
        return "–"
    if abs(value) >= 99.95 or value == round(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.2f}" if abs(value) >= 0.0995 else f"{value:.2g}"


def duration(seconds: float) -> str:
    """Return such as "0.4 s", "3 min 20 s", "2 h 5 min" or "3 d 4 h"."""
    if seconds < 59.5:
        return f"{amount(seconds)} s"
    for size, unit, part, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        rounded = round(seconds / part) * part
        if rounded >= size:
            rest = rounded % size // part
            return f"{rounded // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    raise AssertionError(seconds)


def share(part: float) -> str:
    """Return such as "4.2 %" for 0.042: never 0 % or 100 % for what is some or not all."""
    percent = 100 * part
    if 0 < percent < 0.1:
        return "< 0.1 %"
    if 99.9 < percent < 100:
        return "> 99.9 %"
    return f"{percent:.0f} %" if percent in (0, 100) else f"{percent:.1f} %"


def _title(night: "Night") -> str:
    if night.done == night.inputs:
        return f"All {plural(night.inputs, 'asset')} upscaled" if night.inputs > 1 else "1 asset upscaled"
    return f"{night.done:,} of {plural(night.inputs, 'asset')} upscaled"


def _flat(settings: Mapping[str, Any], above: str = "") -> list[tuple[str, Any]]:
    """Return settings by dotted names."""
    found: list[tuple[str, Any]] = []
    for name, value in settings.items():
        path = f"{above}{name}"
        found += (
            _flat(value, f"{path}.") if isinstance(value, Mapping) else [(path, "none" if value is None else value)]
        )
    return found

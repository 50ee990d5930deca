"""The rules of promotion, as a file: what a challenger must show to become the champion.

A rules file is YAML, strictly read: what is not a rule, not a metric or not a number of the right kind is an error.
Without one `Rules()` holds. `to_yaml` writes those that held beside each verdict, explained: a file to start from.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from pipelines.config import check, from_mapping
from pipelines.measures import FROM_ROWS, MEASURES, MeterSettings

MOST_CHARACTERS = 20_000  # of a rules file; a page is enough
# What promotion can measure, with every file that it takes (it takes no classifier), of which more or less is better.
METRICS = tuple(
    name
    for name in (*MeterSettings(niqe="FILE", lpips="FOLDER").measures, *FROM_ROWS)
    if MEASURES[name].better != "none"
)


@dataclass(frozen=True, kw_only=True)
class Primary:
    """The metric that must improve by more than min_gain, in its own unit, lower or higher being better.

    require_significance: not only the mean, also the bad end of the paired bootstrap interval of `level` must.
    """

    metric: str = "psnr_y"
    min_gain: float = 0.0
    require_significance: bool = True
    level: float = 0.95

    def __post_init__(self) -> None:
        _check_metric("primary.metric", self.metric)
        check(0.5 <= self.level < 1, "primary.level", self.level, "must be from 0.5 to below 1", "use 0.95")


@dataclass(frozen=True, kw_only=True)
class Floor:
    """What images must reach: at most the share `quantile` of them is below per_image_min; 0 is every image."""

    per_image_min: float
    quantile: float = 0.0

    def __post_init__(self) -> None:
        check(0 <= self.quantile < 1, "quantile", self.quantile, "must be from 0 to below 1", "use 0 for every image")


@dataclass(frozen=True, kw_only=True)
class Latency:
    """The mean cost of the challenger: at most max_ratio times the champion's, and at most max_absolute (None: any)."""

    metric: str = "device_s_per_mp"
    max_ratio: float | None = 2.0
    max_absolute: float | None = None

    def __post_init__(self) -> None:
        _check_metric("latency.metric", self.metric)
        lower = MEASURES[self.metric].better == "lower"
        check(lower, "latency.metric", self.metric, "must be a cost: lower is better", "use device_s_per_mp")
        for name in ("max_ratio", "max_absolute"):
            value = getattr(self, name)
            check(value is None or value > 0, f"latency.{name}", value, "must be above 0", "use null for no ceiling")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """All that is asked of a challenger. guarded: metric -> how much worse the champion's images may become, at the
    bad end of the paired interval of the primary's level. max_dead: images of the set that neither of the two scored.
    """

    primary: Primary = field(default_factory=Primary)
    guarded: Mapping[str, float] = field(default_factory=lambda: {"ssim": 0.005})
    floors: Mapping[str, Floor] = field(default_factory=lambda: {"lr_psnr": Floor(per_image_min=45.0)})
    latency: Latency = field(default_factory=Latency)
    max_dead: int = 0

    def __post_init__(self) -> None:
        for name, margin in self.guarded.items():
            _check_metric("guarded", name)
            check(margin >= 0, f"guarded.{name}", margin, "must be at least 0", "use 0 for no worse at all")
        for name in self.floors:
            _check_metric("floors", name)
            higher = MEASURES[name].better == "higher"
            check(higher, "floors", name, "must be a metric of which more is better", "guard this one instead")
        check(self.max_dead >= 0, "max_dead", self.max_dead, "must be at least 0", "use 0")

    def metrics(self) -> tuple[str, ...]:
        """Return every metric that the rules ask for, once."""
        return tuple(dict.fromkeys([self.primary.metric, *self.guarded, *self.floors, self.latency.metric]))


def parse_rules(text: str, *, name: str = "rules") -> Rules:
    """Return the rules of a YAML text; what it leaves out is as in `Rules()`. name: of the file, for the error.

    A section replaces its default as a whole where its names are metrics (guarded, floors). Raises ValueError.
    """
    check(len(text) <= MOST_CHARACTERS, name, f"{len(text)} characters", "is no rules file", "give a page of YAML")
    try:
        document = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        why = " ".join(str(error).split())[:300]
        raise ValueError(f"{name} must be plain YAML: {why}; correct it") from None
    try:
        return _rules({} if document is None else document)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def to_yaml(rules: Rules) -> str:
    """Return the rules as a file, explained; `parse_rules` reads it back to equal rules."""
    primary, latency = rules.primary, rules.latency
    return f"""\
# What a challenger must show to become the champion: the rules of DiffSR's gate. `promote.py --rules FILE` reads such a
# file. All differences are paired, image by image, with the champion's (bicubic's where there is no champion yet).

# The metric that must improve by more than min_gain, in its own unit. With require_significance the bad end of the
# paired bootstrap interval of this level must, else the mean.
primary:
  metric: {primary.metric}
  min_gain: {_text(primary.min_gain)}
  require_significance: {_text(primary.require_significance)}
  level: {_text(primary.level)}

# Metrics that may not get worse by more than a margin, at the bad end of the interval.
guarded: {"{}" if not rules.guarded else ""}
{"".join(f"  {name}: {_text(margin)}{chr(10)}" for name, margin in rules.guarded.items())}
# What the challenger's images must reach. quantile 0: every image; 0.05: all but the worst 5 %.
floors: {"{}" if not rules.floors else ""}
{"".join(_floor(name, floor) for name, floor in rules.floors.items())}
# Its mean cost, at most so many times the champion's (no ratio to bicubic is asked), and at most so much; null: any.
latency:
  metric: {latency.metric}
  max_ratio: {_text(latency.max_ratio)}
  max_absolute: {_text(latency.max_absolute)}

# Images of the set that may be left unscored by both, such as files that cannot be read. One that the challenger alone
# could not do refuses always; one that the champion alone could not do is named, and left out of what is compared.
max_dead: {rules.max_dead}
""".replace(": \n", ":\n")


def _rules(document: object) -> Rules:
    """Return the rules of a mapping. Raises ValueError, naming the place."""
    sections = {"primary": Primary, "latency": Latency}
    names = ("primary", "guarded", "floors", "latency", "max_dead")
    values: dict[str, Any] = {}
    for name, value in _mapping("it", document).items():
        check(name in names, str(name), value, "is not a rule", f"use one of {', '.join(names)}")
        if name in sections:
            values[name] = _section(sections[name], name, value)
        elif name == "guarded":
            values[name] = {
                str(key): _number(f"guarded.{key}", margin) for key, margin in _mapping(name, value).items()
            }
        elif name == "floors":
            values[name] = {str(key): _section(Floor, f"floors.{key}", f) for key, f in _mapping(name, value).items()}
        else:
            whole = isinstance(value, int) and not isinstance(value, bool)
            check(whole, name, value, "must be a whole number", "write digits, like 0")
            values[name] = value
    return Rules(**values)


def _section(kind: type[Any], name: str, value: object) -> Any:
    """Return a dataclass of what stands under a name, checked as the settings of a job are."""
    try:
        return from_mapping(kind, _mapping(name, value))
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(name) else f"{name}.{error}") from None


def _mapping(name: str, value: object) -> Mapping[Any, Any]:
    check(isinstance(value, dict), name, value, "must hold `name: value` lines", "see the rules.yaml beside a verdict")
    assert isinstance(value, dict)
    return value


def _number(name: str, value: object) -> float:
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")
    check(fits, name, value, "must be a finite number", "write digits, like 0.005")
    assert isinstance(value, (int, float))
    return float(value)


def _check_metric(name: str, metric: str) -> None:
    check(metric in METRICS, name, metric, f"must be one of {', '.join(METRICS)}", "use one of them")


def _floor(name: str, floor: Floor) -> str:
    return f"  {name}:\n    per_image_min: {_text(floor.per_image_min)}\n    quantile: {_text(floor.quantile)}\n"


def _text(value: object) -> str:
    """Return a number, a truth or nothing as YAML reads it."""
    return str(yaml.safe_dump(value)).splitlines()[0]


class _Loader(yaml.SafeLoader):
    """YAML in which a name given twice is an error: the second would win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key) for key, _ in node.value]
        for name in names:
            check(names.count(name) == 1, str(name), "twice", "must be given once", "remove one of them")
        return dict(super().construct_mapping(node, deep=deep))

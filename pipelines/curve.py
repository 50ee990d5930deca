"""The quality-cost curve: one model at several samplers, grids, steps and starts, its measures against device time.

The same points are the search of an inference schedule: the one that is chosen is stored in the model's folder.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from diffsr_core.checkpoint import SCHEDULE
from diffsr_core.sampling import SamplingRecipe
from diffsr_core.search import Better, GridChoice, knee, rank
from pipelines import storage
from pipelines.config import check, fingerprint
from pipelines.datasets import Dataset
from pipelines.engine import say
from pipelines.intervals import Interval, mean_interval
from pipelines.measures import FROM_ROWS, MEASURES, SET_MEASURES, MeterSettings, set_measures
from pipelines.models import ResolvedModel, store_sampling
from pipelines.scoring import Contender, Running, Scores, score_dataset

CURVE_FILES = ("curve.json", "curve.md")
FORMAT = 1  # of the records: another one is measured again
METHOD = "model"
KNOWN = MEASURES | SET_MEASURES


@dataclass(frozen=True, kw_only=True)
class Point:
    """A candidate and what was measured of it: means over the images, and seconds per output megapixel.

    device_s_per_mp: those of network calls; seconds_per_mp: those of the whole drawing, by the clock.
    """

    choice: GridChoice
    start_level: float
    summary: Mapping[str, Interval]
    device_s_per_mp: float
    seconds_per_mp: float

    def recipe(self, base: SamplingRecipe) -> SamplingRecipe:
        """Return `base` with this schedule."""
        return replace(base, **_schedule(self))


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The points, best first; knee and chosen are indices into them. data: digest of what they were measured on."""

    points: Sequence[Point]
    measure: str
    better: Better
    knee: int
    chosen: int
    data: str = ""

    @property
    def is_dial(self) -> bool:
        """Whether the points differ in where they start alone, and so cost the same."""
        choices = {(point.choice.sampler, point.choice.grid, point.choice.num_steps) for point in self.points}
        return len(choices) == 1 < len({point.start_level for point in self.points})

    def role(self, index: int) -> str:
        """Return what a point is called: "knee" where costs differ, "chosen", both, or nothing."""
        called = {"chosen": self.chosen} if self.is_dial else {"knee": self.knee, "chosen": self.chosen}
        return " and ".join(name for name, at in called.items() if at == index)

    def recipe(self, base: SamplingRecipe) -> SamplingRecipe:
        """Return `base` with the chosen schedule."""
        return self.points[self.chosen].recipe(base)


def check_pick(pick: str) -> None:
    """Raise ValueError for a rule that `measure_curve` does not know."""
    known = pick in ("best", "knee") or _within(pick) is not None
    check(known, "pick", pick, "must be best, knee, or how far from the best the cheapest may lie", "use best, or 0.05")


def measure_curve(
    candidates: Sequence[GridChoice],
    dataset: Dataset,
    model: ResolvedModel,
    recipe: SamplingRecipe,
    *,
    measure: str,
    meter: MeterSettings,
    output: str,
    running: Running,
    pick: str = "best",
    labels: Mapping[str, int] | None = None,
) -> Curve:
    """Return the curve of a model on a data set; write curve.json and curve.md, best first.

    candidates: choices, which start where the recipe does, or Candidates, which say where. measure: a name
    that is better higher or lower; its mean over the images ranks the candidates, of equal ones the fewer steps first.
    pick: what is chosen: the `best`, the `knee`, or with a number the cheapest that is within it of the best, in the
    measure's unit. Each finished candidate is kept below the output: a search that was killed goes on. One that fails
    on images that others do is left out, aloud: means over different images cannot be compared.
    Raises ValueError for an unknown measure or pick, and when no image can be scored.
    """
    check(measure in KNOWN, "measure", measure, f"must be one of {', '.join(KNOWN)}", "use psnr_y")
    better = KNOWN[measure].better
    check(better != "none", "measure", measure, "must be one that is better higher or lower", "use psnr_y")
    measured = meter.inception is not None if measure in SET_MEASURES else measure in (*meter.measures, *FROM_ROWS)
    check(measured, "measure", measure, "must be among what is measured", "name it, or give its weights")
    check_pick(pick)
    assert better != "none"
    found: list[tuple[Point, int]] = []
    for candidate in candidates:
        tried = replace(recipe, **asdict(candidate))
        key = {"format": FORMAT, "model": model.digest, "data": dataset.digest, "recipe": asdict(tried),
               "meter": meter.identity(), "labels": labels and dict(labels), "use_gpu": running.use_gpu}  # fmt: skip
        place = storage.join(output, storage.OWN_FOLDER, "curve", f"{fingerprint(key)}.json")
        kept = _recorded(place, candidate)
        if kept is None:
            contender = Contender.of(model, tried, method=METHOD, output=output)
            scores = score_dataset(
                dataset, [contender], meter=meter, running=running, labels=labels, label=f"curve {_name(candidate)}",
            )  # fmt: skip
            kept = _point(candidate, tried.start_level, scores)
            if kept is None:
                continue
            storage.publish(place, json.dumps({**_as_json(kept[0]), "images": kept[1]}, indent=1).encode())
        check(
            measure in kept[0].summary,
            "measure",
            measure,
            "fits no image of the set, or needs more of them",
            "use another",
        )
        found.append(kept)
    most = max((images for _, images in found), default=0)
    for point, images in found:
        if images < most:
            say(f"curve: {_name(point.choice)} is left out: it fails on {most - images} images that others do")
    points = [point for point, images in found if images == most]
    if not points:
        raise ValueError(f"dataset ({dataset.source}) must hold at least one image that can be scored; it holds none")
    curve = _curve(points, measure, better, pick=pick, data=dataset.digest)
    table = to_markdown(curve)
    say(table)
    document = to_document(curve) | {"pick": pick, "model": model.digest, "recipe": asdict(recipe)}
    for name, text in zip(CURVE_FILES, (json.dumps(document, indent=1), table), strict=True):
        storage.publish(storage.join(output, name), text.encode())
    return curve


def _curve(points: list[Point], measure: str, better: Better, *, pick: str, data: str) -> Curve:
    order = rank([point.choice for point in points], [point.summary[measure].mean for point in points], better=better)
    ranked = tuple(points[index] for index in order)
    costs = [point.device_s_per_mp for point in ranked]
    values = [point.summary[measure].mean for point in ranked]
    at, chosen, within = knee(costs, values, better=better), 0, _within(pick)
    if pick == "knee":
        chosen = at
    elif within is not None:
        near = [index for index, value in enumerate(values) if abs(value - values[0]) <= within]
        chosen = min(near, key=lambda index: costs[index])  # of equal costs the better
    return Curve(points=ranked, measure=measure, better=better, knee=at, chosen=chosen, data=data)


def _within(pick: str) -> float | None:
    try:
        value = float(pick)
    except ValueError:
        return None
    return value if 0 <= value < float("inf") else None


def _point(choice: GridChoice, start_level: float, scores: Scores) -> tuple[Point, int] | None:
    """Return what the scores say of a candidate and over how many images; None, aloud, where none could be scored.

    What is of the whole set, as FID against the originals, has no interval.
    """
    scored = [row for row in scores.rows if not row["reason"]]
    if not scored:
        why = f"{scores.rows[0]['reason']}, {scores.rows[0]['message']}" if scores.rows else "there is none"
        say(f"curve: {_name(choice)} is left out: no image could be scored, the first because of {why}")
        return None
    summary = {}
    for name in MEASURES:
        values = [row[name] for row in scored if row.get(name) is not None]
        wrong = [value for value in values if not math.isfinite(value)]
        if wrong:
            raise ValueError(f"{name} ({wrong[0]}) of {_name(choice)} must be a number; leave that candidate out")
        if values:
            summary[name] = mean_interval(values)
    sets = set_measures(scores.features, reference=None, note=lambda _: None) if scores.features else {}
    summary |= {name: Interval(value, value, value) for name, value in sets.get(METHOD, {}).items()}
    megapixels = sum(row["megapixels"] for row in scored)
    point = Point(
        choice=choice,
        start_level=start_level,
        summary=summary,
        device_s_per_mp=sum(row["device_s"] for row in scored) / megapixels,
        seconds_per_mp=sum(row["seconds"] for row in scored) / megapixels,
    )
    return point, len(scored)


def _recorded(place: str, choice: GridChoice) -> tuple[Point, int] | None:
    """Return what an earlier search has kept of a candidate, None where it has nothing that can be read."""
    try:
        kept = json.loads(storage.read_bytes(place))
        point = Point(
            choice=choice,
            start_level=float(kept["start_level"]),
            summary={name: Interval(*map(float, values)) for name, values in kept["summary"].items()},
            device_s_per_mp=float(kept["device_s_per_mp"]),
            seconds_per_mp=float(kept["seconds_per_mp"]),
        )
        return point, int(kept["images"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        say(f"curve: {place} cannot be read ({error}), so {_name(choice)} is measured again")
        return None


def to_document(curve: Curve) -> dict[str, Any]:
    """Return what curve.json holds of the curve; intervals are [mean, low, high]."""
    return {"measure": curve.measure, "better": curve.better, "data": curve.data, "knee": curve.knee,
            "chosen": curve.chosen, "points": [_as_json(point) for point in curve.points]}  # fmt: skip


def to_markdown(curve: Curve) -> str:
    """Return the table, best first, with the means of what was measured; knee and chosen are marked."""
    names = [name for name in KNOWN if any(name in point.summary for point in curve.points)]
    shown = [KNOWN[name] for name in names if name not in FROM_ROWS]
    heads = [measure.label + (f" ({measure.unit})" if measure.unit else "") for measure in shown]
    lines = [
        f"| sampler | grid | steps | start | {' | '.join(heads)} | device s/MP | s/MP | |",
        "|---|---|---:|---:|" + "---:|" * (len(shown) + 2) + "---|",
    ]
    for index, point in enumerate(curve.points):
        cells = [point.choice.sampler, point.choice.grid, str(point.choice.num_steps), f"{point.start_level:g}"]
        for measure in shown:
            found = point.summary.get(measure.name)
            cells.append("" if found is None else f"{found.mean:.{measure.digits}f}")
        cells += [f"{point.device_s_per_mp:.3g}", f"{point.seconds_per_mp:.3g}"]
        cells.append(curve.role(index))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def store_schedule(model: ResolvedModel, curve: Curve) -> str:
    """Store the chosen schedule, with its evidence, as `pipelines.models.store_sampling` does; return where it is."""
    point = curve.points[curve.chosen]
    value, low, high = point.summary[curve.measure]
    evidence = {"model": model.digest, "data": curve.data, "measure": curve.measure, "value": value,
                "interval": [low, high], "device_s_per_mp": point.device_s_per_mp}  # fmt: skip
    return store_sampling(model, {**_schedule(point), "evidence": evidence})


def _schedule(point: Point) -> dict[str, Any]:
    """Return the schedule of a point as the fields of a SamplingRecipe."""
    fields: dict[str, Any] = {**asdict(point.choice), "start_level": float(point.start_level)}
    return {name: fields[name] for name in SCHEDULE}


def _as_json(point: Point) -> dict[str, Any]:
    return {**_schedule(point), "device_s_per_mp": point.device_s_per_mp, "seconds_per_mp": point.seconds_per_mp,
            "summary": {name: list(interval) for name, interval in point.summary.items()}}  # fmt: skip


def _name(choice: GridChoice) -> str:
    start = getattr(choice, "start_level", 0.0)
    return f"{choice.sampler} {choice.grid} {choice.num_steps} steps" + (f" from {start:g}" if start else "")

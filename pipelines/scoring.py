"""How models and baselines score on a data set: the machinery that evaluation, schedule search and promotion share.

Rows are long, one per image and method: key, method, reason ("" where it was scored), message, the measures, and what
drawing the image took: seconds, device_s (of network calls) and megapixels (of the result). An image that cannot be
read is a row with a reason for each method, never the end of the job.
"""

import copy
import io
import json
import time
from base64 import b64decode, b64encode
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from diffsr_core.checkpoint import model_from_files
from diffsr_core.family import SuperResolver, regression_of
from diffsr_core.pixels import bicubic, lanczos
from diffsr_core.sampling import SamplingRecipe
from diffsr_core.tiling import tiles
from diffsr_core.upscaler import NotFiniteError, Upscaler
from pipelines.comparisons import Made, detailed_crops
from pipelines.datasets import Dataset, Loaded, Loader
from pipelines.engine import check_engine, map_actors, progress
from pipelines.images import Refused
from pipelines.measures import Features, Meter, MeterSettings
from pipelines.models import ResolvedModel, load_files, publish_model
from pipelines.stills import check_channels

INTERPOLATIONS = {"bicubic": bicubic, "lanczos": lanczos}
BASELINES = (*INTERPOLATIONS, "regression")
FEATURES = "features"  # of a row on its way to the driver


@dataclass(frozen=True, kw_only=True)
class Contender:
    """Who is scored, by the name of `method` in the rows: an interpolation, or a model's samples, or its regression.

    model: URI of its folder; recipe: the fields of its SamplingRecipe. Plain values: it travels to the workers.
    """

    method: str
    model: str | None = None
    recipe: Mapping[str, Any] | None = None
    regression: bool = False

    @staticmethod
    def of(
        model: ResolvedModel, recipe: SamplingRecipe, *, method: str, output: str, regression: bool = False
    ) -> "Contender":
        """Return a model as a contender; its files are copied below `output`, once, for the workers."""
        uri = publish_model(model, output)
        return Contender(method=method, model=uri, recipe=asdict(recipe), regression=regression)


@dataclass(frozen=True, kw_only=True)
class Running:
    """Where it is done: by Ray Data actors (`ray`), one CPU and perhaps a GPU each, or a plain loop (`local`)."""

    engine: str
    num_workers: int = 1
    use_gpu: bool = False


class Scores(NamedTuple):
    """Rows sorted by key and then by method as given; features by method, in the order of the keys."""

    rows: list[dict[str, Any]]
    features: dict[str, list[Features]]


class Drawer:
    """Makes the image of one contender."""

    def __init__(self, contender: Contender, *, scale: int, device: str) -> None:
        self.scale, self.upscaler = scale, None
        self.interpolate = INTERPOLATIONS[contender.method] if contender.model is None else None
        if contender.model is not None:
            network: SuperResolver = model_from_files(load_files(contender.model))[0]
            recipe = SamplingRecipe(**contender.recipe or {})
            if contender.regression:
                network, recipe = regression_of(network), replace(recipe, num_samples=1, choice="first")
            self.upscaler = Upscaler(network, recipe, device=device, regression=False)
            self._warm_up()

    def __call__(self, loaded: Loaded) -> Made:
        """Return what it makes of an LR image. Raises Refused."""
        started = time.perf_counter()
        if self.interpolate is not None:
            return Made(self.interpolate(loaded.lr, self.scale), seconds=time.perf_counter() - started)
        assert self.upscaler is not None
        check_channels(self.upscaler, loaded.lr.shape[2])
        recipe, (height, width) = self.upscaler.recipe, loaded.lr.shape[:2]
        count = recipe.num_samples if recipe.num_samples > 1 else 0
        whole = self.upscaler if recipe.choice != "first" else self._sample(0)
        try:
            found = whole(loaded.lr, digest=loaded.digest)
            seconds = time.perf_counter() - started  # the other samples are drawn for sigma alone, and cost no night
            drawn = [found.sr] * (recipe.choice == "first" and count > 0)
            drawn += [self._sample(k)(loaded.lr, digest=loaded.digest).sr for k in range(len(drawn), count)]
        except NotFiniteError as error:
            raise Refused("score", "nan", str(error)) from None
        samples = cast(NDArray[np.uint8], np.stack(drawn)) if drawn else None
        plan = tiles(max(height, recipe.tile), max(width, recipe.tile), tile=recipe.tile, halo=recipe.halo)
        return Made(
            cast(NDArray[np.uint8], found.sr),
            samples=samples,
            uncertainty=None if samples is None else _deviation(samples),
            seams=plan if max(height, width) <= recipe.window else None,
            seconds=seconds,
            device_s=found.seconds,
        )

    def _sample(self, index: int, **changes: Any) -> Upscaler:
        """Return the upscaler that draws one of the samples alone."""
        assert self.upscaler is not None
        other = copy.copy(self.upscaler)
        other.recipe = replace(other.recipe, sample_index=index, num_samples=1, choice="first", **changes)
        if other.model.denoiser is not None:
            other.grid = other.grid_from(other.recipe.start_level)
        return other

    def _warm_up(self) -> None:
        """Make a call of each network: the first pays for torch's own start, which is no image's."""
        assert self.upscaler is not None
        one = self._sample(0, num_steps=1)
        with suppress(NotFiniteError):
            one(np.zeros((1, 1, one.model.config.encoder.lr_channels), np.uint8), digest="")


class Scorer:
    """Scores images; built once per process from plain arguments."""

    def __init__(
        self,
        *,
        contenders: Sequence[Mapping[str, Any]],
        loader: Mapping[str, Any],
        meter: Mapping[str, Any],
        device: str = "cpu",
    ) -> None:
        self.load = Loader(**loader)
        scale = self.load.scale
        self.meter = Meter(MeterSettings(**meter), scale=scale)
        self.drawers = {each["method"]: Drawer(Contender(**each), scale=scale, device=device) for each in contenders}

    def __call__(self, item: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return a row per method; where a network gives features, one of method "hr" as well, with nothing else.

        An item with a `side` is not measured: its one row has the crops of this side (HR px) in `crops`.
        """
        if item.get("side"):
            return [{"key": item["key"], "crops": self._crops(item)}]
        rows: list[dict[str, Any]] = [
            {"key": item["key"], "method": method, "reason": "", "message": ""} for method in self.drawers
        ]
        try:
            loaded = self.load(item)
        except Refused as refused:
            return [row | {"reason": refused.reason, "message": refused.message} for row in rows]
        for row in rows:
            try:
                made = self.drawers[row["method"]](loaded)
            except Refused as refused:
                row |= {"reason": refused.reason, "message": refused.message}
                continue
            seconds, megapixels = made.seconds, made.sr.shape[0] * made.sr.shape[1] / 1e6
            row |= self.meter(
                made.sr, lr=loaded.lr, hr=loaded.hr, seams=made.seams, samples=made.samples, label=item.get("label")
            )
            row |= {"seconds": seconds, "device_s": made.device_s, "megapixels": megapixels}
            row |= {"seconds_per_mp": seconds / megapixels, "device_s_per_mp": made.device_s / megapixels}
            row |= self._features(made.sr)
        if features := self._features(loaded.hr):
            rows.append({"key": item["key"], "method": "hr", **features})
        return rows

    def _crops(self, item: Mapping[str, Any]) -> dict[str, str]:
        try:
            loaded = self.load(item)
            images = {method: drawer(loaded) for method, drawer in self.drawers.items()}
        except Refused:
            return {}
        crops = detailed_crops(loaded, images, scale=self.load.scale, side=item["side"])
        return {name: b64encode(png).decode() for name, png in crops.items()}

    def _features(self, image: NDArray[np.uint8]) -> dict[str, list[str]]:
        features = self.meter.features(image)
        if features is None:
            return {}
        return {FEATURES: [b64encode(part.astype(np.float32).tobytes()).decode() for part in features]}


def _deviation(samples: NDArray[Any]) -> NDArray[np.float32]:
    """Return the deviation over samples (K, H, W, C) per pixel, (H, W), in levels, as the upscaler's uncertainty."""
    return np.asarray(np.sqrt(samples.astype(np.float32).var(axis=0).mean(axis=2)), np.float32)


class ScoringActor:
    """The Ray Data face of a Scorer."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.scorer = Scorer(**arguments)

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        return {"rows": json.dumps(self.scorer(json.loads(row["item"])))}


def score_dataset(
    dataset: Dataset,
    contenders: Sequence[Contender],
    *,
    meter: MeterSettings,
    running: Running,
    label: str,
    labels: Mapping[str, int] | None = None,
) -> Scores:
    """Return the rows of every image and contender. labels: class of each key, for top-1 and top-5."""
    work = [asdict(item) | {"label": (labels or {}).get(item.key)} for item in dataset.items]
    rows = list(_scored(work, dataset, contenders, meter, running, label))
    order = {method: index for index, method in enumerate([*(each.method for each in contenders), "hr"])}
    rows.sort(key=lambda row: (str(row["key"]), order[row["method"]]))
    features: dict[str, list[Features]] = {}
    for row in rows:
        if (packed := row.pop(FEATURES, None)) is not None:
            parts = (np.frombuffer(b64decode(part), np.float32) for part in packed)
            features.setdefault(row["method"], []).append(Features(*parts))
    return Scores([row for row in rows if row["method"] != "hr"], features)


def to_parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return rows as a Parquet file."""
    columns = dict.fromkeys(name for row in rows for name in row)  # the first image may be one without a score
    sink = io.BytesIO()
    pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in columns}), sink)
    return sink.getvalue()


def draw_pictures(
    dataset: Dataset,
    contenders: Sequence[Contender],
    keys: Collection[str],
    *,
    side: int,
    running: Running,
    label: str,
) -> dict[str, dict[str, bytes]]:
    """Return PNG crops, `side` HR px each way, of these keys by name: see `detailed_crops`. What was scored is drawn
    once more, as it was; an image that could not be scored is left out."""
    work = [asdict(item) | {"side": side} for item in dataset.items if item.key in keys]
    rows = _scored(work, dataset, contenders, MeterSettings(names=()), running, label)
    found = {row["key"]: {name: b64decode(png) for name, png in row["crops"].items()} for row in rows}
    return {key: crops for key, crops in found.items() if crops}


def _scored(
    work: list[dict[str, Any]],
    dataset: Dataset,
    contenders: Sequence[Contender],
    meter: MeterSettings,
    running: Running,
    label: str,
) -> Iterator[dict[str, Any]]:
    arguments = {
        "contenders": [asdict(each) for each in contenders],
        "loader": dataset.loader(),
        "meter": asdict(meter),
        "device": "cuda" if running.use_gpu else "cpu",
    }
    check_engine(running.engine, running.num_workers)
    for rows in progress(_run(work, arguments, running), total=len(work), label=label):
        yield from rows


def _run(work: list[dict[str, Any]], arguments: dict[str, Any], running: Running) -> Iterator[list[dict[str, Any]]]:
    if running.engine == "local":
        yield from map(Scorer(**arguments), work)
        return
    items = [{"item": json.dumps(item)} for item in work]
    placing: dict[str, Any] = {"num_workers": running.num_workers, "use_gpu": running.use_gpu}
    for row in map_actors(items, ScoringActor, {"arguments": arguments}, **placing):
        yield json.loads(row["rows"])

"""The rows of few_steps.py: the models, how each row draws an image, in what time, and where results are kept."""

import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image

from diffsr_core.checkpoint import SAMPLING, SCHEDULE, load_model, schedule_from_files
from diffsr_core.degradation import Degradation, crop_to_multiple
from diffsr_core.family import SuperResolver, regression_of
from diffsr_core.pixels import bicubic, to_model_range
from diffsr_core.resize import upscale
from diffsr_core.sampler import LANGEVIN_CORRECTIONS
from diffsr_core.sampling import SamplingRecipe
from diffsr_core.upscaler import Upscaler
from tests.benchmarks.few_steps_scores import (
    ANCESTRAL,
    CONTROL,
    FROM,
    MEAN,
    NUM_SAMPLES,
    REGRESSION,
    SCALE,
    STUDENT,
    Draw,
    Measures,
    Pair,
    Pixels,
    published,
    sharpened,
)

LATE_LEVEL = 0.5
STARTS = (0.0, 0.2, 0.3, 0.4, 0.5, 0.7, 0.8, 0.9)  # of a student that was trained to be drawn from any
MEASURED = 2  # raise it when what is measured changes: what was kept before is then measured again

Key = TypeVar("Key")
Source = Literal["bicubic", "projected", "regression", "sharpened", "teacher", "distilled", "student"]


class Model(NamedTuple):
    """A network, and the digest of its folder."""

    network: SuperResolver
    digest: str


@dataclass(frozen=True)
class Row:
    """One way to draw. calls: of the denoiser, per image."""

    name: str
    source: Source
    calls: int = 0
    recipe: SamplingRecipe = SamplingRecipe(num_steps=1, micro_batch=1)

    @property
    def varies(self) -> bool:
        """Whether two samples of one LR differ."""
        return self.source in ("teacher", "distilled", "student")


def load_models(student: Path, teacher: Path, distilled: Path | None) -> dict[str, Model]:
    """Return the models by source. Raises ValueError for one of another scale, kind or encoder than the student's."""
    folders = {"student": student, "teacher": teacher} | ({"distilled": distilled} if distilled else {})
    models: dict[str, Model] = {}
    for name, folder in folders.items():
        network, document = load_model(folder)
        config = network.config
        if config.scale != SCALE or config.denoiser is None or not config.encoder.regresses:
            raise ValueError(
                f"{name} ({folder}) must be a diffusion model of scale {SCALE} on an encoder that regresses"
            )
        if config.one_step != (name != "teacher"):
            wanted = "the diffusion model" if name == "teacher" else "trained to draw in one step"
            raise ValueError(f"{name} ({folder}) must be {wanted}; look at the folders that were given")
        models[name] = Model(network, str(document["digest"]))
    own = models["student"].network.encoder.state_dict()
    for name, model in models.items():
        theirs = model.network.encoder.state_dict()
        # An average of weights that never moved may differ in the last bit.
        if own.keys() != theirs.keys() or not all(torch.allclose(own[k], theirs[k], rtol=1e-4, atol=1e-6) for k in own):
            raise ValueError(f"{name} ({folders[name]}) must have the student's encoder; train both on one regression")
    return models


def rows_of(models: Mapping[str, Model], teacher: Path) -> list[Row]:
    """Return the rows of the tables; that of the schedule search where the teacher has a sampling.json.

    Raises ValueError for a schedule that was searched for another network.
    """
    one = Row("", "teacher").recipe

    def drawn(name: str, source: Source, steps: int, **how: Any) -> Row:
        recipe = replace(one, num_steps=steps, **how)
        corrections = recipe.corrections
        if corrections is None:
            corrections = LANGEVIN_CORRECTIONS if recipe.sampler == "langevin" else 0
        return Row(name, source, recipe.num_samples * (steps + corrections * (steps - 1)), recipe)

    rows = [
        Row("bicubic", "bicubic"),
        Row("bicubic, projected", "projected"),
        Row(REGRESSION, "regression"),
        Row(CONTROL, "sharpened"),
        drawn(ANCESTRAL, "teacher", 100, sampler="ddpm"),
        *(drawn(f"teacher, DDIM {steps}", "teacher", steps) for steps in (50, 20, 8, 4, 2, 1)),
        *(drawn(f"teacher, DPM-Solver++(2M) {n}", "teacher", n, sampler="dpmpp-2m", grid="log_snr") for n in (8, 4)),
        *(drawn(f"teacher, ResShift {n}", "teacher", n, sampler="resshift", grid="resshift") for n in (8, 4)),
        drawn(f"teacher, DDIM 4 from the regression at {LATE_LEVEL:g}", "teacher", 4, start_level=LATE_LEVEL),
    ]
    if (teacher / SAMPLING).is_file():
        found = schedule_from_files({SAMPLING: (teacher / SAMPLING).read_bytes()})
        assert found is not None
        if found["evidence"]["model"] != models["teacher"].digest:
            raise ValueError(f"{SAMPLING} ({teacher}) is of another network; search its schedule again, or delete it")
        own = {name: found[name] for name in SCHEDULE if name != "num_steps"}
        name = f"teacher, searched: {own['sampler']} {found['num_steps']} on {own['grid']} from {own['start_level']:g}"
        rows.append(drawn(name, "teacher", found["num_steps"], **own))
    if "distilled" in models:
        rows.append(drawn("distilled (SinSR's loss), 1 step", "distilled", 1))
    own_level = models["student"].network.config.start_level
    usual = {"start_level": own_level or 0.0}
    rows.append(drawn(STUDENT, "student", 1, **usual))
    rows.append(drawn(f"{STUDENT}, bf16", "student", 1, precision="bf16", **usual))
    rows.append(drawn(MEAN, "student", 1, num_samples=NUM_SAMPLES, choice="mean", **usual))
    starts = [level for level in STARTS if level != own_level] if own_level is not None else []
    rows += [drawn(f"{FROM} {level:g}", "student", 1, start_level=level) for level in starts]
    return rows


def read_pairs(folder: Path, *, limit: int | None = None) -> list[Pair]:
    """Return the first images of a folder by name, cut to multiples of 4. Raises ValueError for a folder without."""
    files = sorted(path for path in folder.glob("*.png"))[:limit]
    if not files:
        raise ValueError(f"folder ({folder}) must hold PNG images; name another with its flag")
    pairs, degradation = [], Degradation("bicubic", SCALE)
    for path in files:
        hr = np.ascontiguousarray(crop_to_multiple(np.asarray(Image.open(path).convert("RGB")), SCALE))
        digest = hashlib.sha256(repr(hr.shape).encode() + hr.tobytes()).hexdigest()
        pairs.append(Pair(path.name, hr, degradation.apply(hr, seed=0), digest))
    return pairs


def drawing(row: Row, models: Mapping[str, Model], *, tile: int, num_threads: int, gain: float = 0.0) -> Draw:
    """Return the function that draws. tile: LR px, the side that the whole LR fits in. gain: the control's.

    A sample of a row that takes the mean of K draws reads the next K noises.
    """
    if row.source == "bicubic":
        return lambda lr, _: bicubic(lr, SCALE)
    if row.source == "projected":
        return lambda lr, _: published(upscale(to_model_range(lr), SCALE), lr)
    plain = row.source in ("regression", "sharpened")
    network = regression_of(models["student"].network) if plain else models[row.source].network
    stride = network.config.lr_stride
    tile, window = (-(-size // stride) * stride for size in (max(tile, network.config.lr_smallest), max(tile, 512)))
    recipe = replace(row.recipe, tile=tile, halo=0, window=window, margin=0, num_threads=num_threads)
    upscalers: dict[int, Upscaler] = {}

    def draw(lr: Pixels, sample: int) -> Pixels:
        if sample not in upscalers:
            own = replace(recipe, sample_index=sample * recipe.num_samples)
            upscalers[sample] = Upscaler(network, own, regression=False)
        sr: Any = upscalers[sample](lr, digest=hashlib.sha256(lr.tobytes()).hexdigest()).sr
        made: Pixels = sharpened(sr, lr, gain=gain) if row.source == "sharpened" else sr
        return made

    return draw


class Cache:
    """Results by what decides them, one small JSON file each, so that a killed run goes on."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    def of(self, key: Mapping[str, Any], compute: Callable[[], Measures]) -> Measures:
        """Return what is kept under the key, or what compute gives, which is then kept."""
        text = json.dumps({"measured": MEASURED, "torch": torch.__version__, **key}, sort_keys=True)
        path = self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
        if path.is_file():
            kept: Measures = json.loads(path.read_text())["found"]
            return kept
        found = compute()
        path.with_suffix(".part").write_text(json.dumps({"key": key, "found": found}))
        os.replace(path.with_suffix(".part"), path)
        return found


def key_of(row: Row, models: Mapping[str, Model], pair: Pair, *, gain: float) -> dict[str, Any]:
    """Return what decides the scores of a row on an image to their printed digits, beside the files of the metrics."""
    digest = {"bicubic": "", "projected": "", "regression": "student", "sharpened": "student"}.get(
        row.source, row.source
    )
    return {
        "model": models[digest].digest if digest else "",
        "source": row.source,
        "recipe": asdict(row.recipe),
        "image": pair.digest,
        "gain": gain,
    }


def seconds_of(draws: Mapping[Key, Draw], *, rounds: int, budget_s: float) -> dict[Key, float]:
    """Return the median seconds of one 256x256 output of each, all in turn; one over the budget runs three times."""
    lr = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    taken: dict[Key, list[float]] = {name: [] for name in draws}
    for draw in draws.values():
        draw(lr, 0)  # weights are packed at the first call
    for _ in range(rounds):
        for name, draw in draws.items():
            if len(taken[name]) < 3 or sum(taken[name]) < budget_s:
                started = time.perf_counter()
                draw(lr, 0)
                taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in taken.items()}

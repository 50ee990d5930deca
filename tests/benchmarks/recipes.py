"""What each choice of a recipe gives: one small SRDiff, one choice at a time against the paper's; prints recipes.md.

    taskset -c 0 nice python -m tests.benchmarks.recipes --output build/recipes > tests/benchmarks/recipes.md
    python -m tests.benchmarks.recipes --output build/recipes --runs reference v best

One process, one thread. A run that has ended is a line of <output>/runs.jsonl and is not done again; the encoder, which
all runs share, is kept beside it. With the same settings the numbers are the same on every run, but for the seconds.
"""

import argparse
import datetime
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffsr_core import presets
from diffsr_core.degradation import Degradation
from diffsr_core.family import ModelConfig, SuperResolver
from diffsr_core.recipe import StageRecipe, TrainingRecipe
from diffsr_core.schedule import Schedule
from diffsr_core.training import Trainer
from diffsr_core.validation import ValidationRecipe, validate
from pipelines.config import fingerprint
from pipelines.demo import ARCHIVE, HELD_OUT, precision
from tests.benchmarks.steps import cpu_name

Pixels = NDArray[np.uint8]
Point = dict[str, dict[str, float]]  # raw and average -> name -> value

PATCH_PX, SCALE, MOST_PER_IMAGE, FLAT = 64, 4, 200, 4.0  # FLAT: levels of standard deviation
LOSS, X0_ERROR, PSNR = "val_loss", "val_x0_error", "val_psnr_sample"

_NANO = presets.get("nano-x4")
_PAPER = presets.get("srdiff-df2k-x4")
ENCODER_STAGE = replace(_NANO.recipe.stages[0], num_steps=800)
REFERENCE_MODEL = replace(
    _NANO.model,
    schedule=Schedule(name="cosine", num_timesteps=100),
    anchor="bicubic",
    residual_scale=2.0,
    residual_clip=True,
    told="step",
    prediction="eps",
)
BEST_MODEL = replace(REFERENCE_MODEL, prediction="x_0", told="noise_level")
DIRECT: dict[str, Any] = {"anchor": "zero", "residual_scale": 1.0}
ANCHORED: dict[str, Any] = {"anchor": "regression", "residual_scale": 10.0, "residual_clip": False}
REFERENCE_STAGE = _PAPER.recipe.stages[-1]  # L1, 2e-4, halved once
BEST_STAGE = _NANO.recipe.stages[-1]  # L1, 1e-3, warm-up, cosine
ADAM: dict[str, Any] = {"optimizer": "adam", "betas": (0.9, 0.999)}  # the paper's


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training. share: of the steps of a whole one."""

    model: ModelConfig = REFERENCE_MODEL
    stage: StageRecipe = REFERENCE_STAGE
    share: float = 1.0


RUNS = {
    "reference": Run(),
    "v": Run(model=replace(REFERENCE_MODEL, prediction="v")),
    "x_0": Run(model=replace(REFERENCE_MODEL, prediction="x_0")),
    "min_snr": Run(stage=replace(REFERENCE_STAGE, loss="l2", weighting="min_snr")),
    "rate": Run(stage=BEST_STAGE),
    "told": Run(model=replace(REFERENCE_MODEL, told="noise_level")),
    "direct": Run(model=replace(REFERENCE_MODEL, **DIRECT)),
    "anchored": Run(model=replace(REFERENCE_MODEL, **ANCHORED)),
    "best": Run(model=BEST_MODEL, stage=BEST_STAGE),
    "best_half": Run(model=BEST_MODEL, stage=BEST_STAGE, share=0.5),
    "best_direct": Run(model=replace(BEST_MODEL, **DIRECT), stage=BEST_STAGE),
    "best_anchored": Run(model=replace(BEST_MODEL, **ANCHORED), stage=BEST_STAGE),
}


class Row(NamedTuple):
    """A row of the table: what it says, the run, and which weights of it are looked at."""

    label: str
    run: str
    weights: str = "raw"


ROWS = (
    Row("reference: SRDiff's recipe", "reference"),
    Row("v instead of eps", "v"),
    Row("x_0 instead of eps", "x_0"),
    Row("min-SNR weights, L2", "min_snr"),
    Row("average of the weights (EMA)", "reference", "average"),
    Row("rate 1e-3, warm-up, cosine", "rate"),
    Row("told the noise level, not the step", "told"),
    Row("direct: no residual", "direct"),
    Row("residual of the regression, x10", "anchored"),
    Row("best: x_0, EMA, rate, noise level", "best", "average"),
    Row("best, in half of the steps", "best_half", "average"),
    Row("best, direct", "best_direct", "average"),
    Row("best, residual of the regression", "best_anchored", "average"),
)
HEAD = (
    "choice", "images to the reference's loss", "final loss", "images to its x_0 error", "final x_0 error",
    "images to its PSNR", "sample PSNR, dB", "ms a step",
)  # fmt: skip
PAGE = """# What each choice of a recipe gives

Printed by `{command}` on {date}.
{cpu}, 1 thread, torch {torch}, {precision}.

One network in every row: SRDiff's at LR resolution ({weights:.1f} M weights) beside an RRDB that was trained once,
{encoder_steps} steps, and is frozen; {steps} steps of {batch} patches of {patch} px, x4, the same ones in the same
order. {source}: {num_train} patches to train, {num_val} to validate, of other pictures, looked at
every {every} steps.

{head}
|{rule}
{rows}

*Reference*: as the paper trains: eps of the residual against bicubic, x2, T = 100, told t, L1, Adam 2e-4 that is halved
once, the weights as they are at the end. Every other row changes one thing, but *best*.
*Loss*: mean absolute error of eps at fixed noise and levels, whatever the network predicts; it compares rows that
diffuse the same x_0. *x_0 error*: the same of the image, in units of [-1, 1]; a residual that is scaled up has more
signal at one level of noise, so between residuals of different scale only the samples compare. *Sample*: DDIM in
{sampling} steps. *Images to*: at the first look that is at least as good as the best look of the reference by that
measure, whose own row says when that was; - where it never is. *ms*: CPU time of a step.

{headlines}
"""


class Data(NamedTuple):
    """Patches (N, PATCH_PX, PATCH_PX, 3) and their LR, uint8; digest: of all."""

    hr: Pixels
    lr: Pixels
    val_hr: Pixels
    val_lr: Pixels
    digest: str


def photographs(folder: Path | None) -> tuple[list[Path], list[Path]]:
    """Return files to train on and to validate on: of scikit-image, or every sixteenth of a folder held out."""
    if folder is None:
        data = Path(str(files("skimage") / "data"))
        return [data / name for name in ARCHIVE], [data / name for name in HELD_OUT]
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if len(found) < 2:
        raise SystemExit(f"--data ({folder}) must hold two pictures or more; give another folder")
    return [path for i, path in enumerate(found) if i % 16], found[::16]


def cut(paths: Sequence[Path], *, most: int) -> tuple[Pixels, Pixels]:
    """Return the patches that are not flat, at most `most` of an image, drawn from the grid over it, and their LR."""
    degradation = Degradation("bicubic", SCALE)
    hr: list[Pixels] = []
    for path in paths:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        corners = itertools.product(*(range(0, size - PATCH_PX + 1, PATCH_PX) for size in pixels.shape[:2]))
        patches = [pixels[y : y + PATCH_PX, x : x + PATCH_PX] for y, x in corners]
        rough = [patch for patch in patches if patch.std() >= FLAT]
        picked = np.random.default_rng(0).permutation(len(rough))[:most]
        hr += [rough[i] for i in sorted(picked)]
    if not hr:
        raise SystemExit(f"{len(paths)} pictures must hold a patch of {PATCH_PX} px that is not flat; give others")
    lr = [degradation.apply(patch, seed=0) for patch in hr]
    return np.stack(hr), np.stack([patch.astype(np.uint8) for patch in lr])


def read_data(folder: Path | None, *, num_val: int) -> Data:
    """Return the data; num_val patches to validate on, spread evenly over those of the pictures held out."""
    train, held_out = photographs(folder)
    hr, lr = cut(train, most=MOST_PER_IMAGE)
    val_hr, val_lr = cut(held_out, most=MOST_PER_IMAGE)
    picked = np.linspace(0, len(val_hr) - 1, min(num_val, len(val_hr))).round().astype(int)
    parts = (hr, lr, val_hr[picked], val_lr[picked])
    return Data(*parts, hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest())


def to_tensor(pixels: Pixels) -> Tensor:
    """Return (B, C, H, W) in [-1, 1] for pixels (B, H, W, C)."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def batches(data: Data, *, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches without end, each epoch in an order of its own; the same for every run."""
    order = (i for epoch in itertools.count() for i in np.random.default_rng(epoch).permutation(len(data.hr)))
    while True:
        picked = list(itertools.islice(order, size))
        yield to_tensor(data.hr[picked]), to_tensor(data.lr[picked])


def recipe_of(stage: StageRecipe, *, batch: int, num_steps: int, paper: bool) -> TrainingRecipe:
    """Return what a run trains by: no augmentation, one seed; paper: its optimizer."""
    stages = (replace(stage, num_steps=num_steps),)
    recipe = TrainingRecipe(stages=stages, batch_size=batch, augmentation="none", precision=precision())  # type: ignore[arg-type]
    return replace(recipe, **ADAM) if paper else recipe


def trained_encoder(data: Data, folder: Path, *, num_steps: int, batch: int) -> dict[str, Tensor]:
    """Return the encoder's weights, from the folder or trained now."""
    recipe = recipe_of(ENCODER_STAGE, batch=batch, num_steps=num_steps, paper=False)
    config = replace(REFERENCE_MODEL, denoiser=None, anchor="regression")
    key = fingerprint({"data": data.digest, "model": asdict(config), "recipe": asdict(recipe)})
    path = folder / f"encoder-{key[:16]}.safetensors"
    if not path.exists():
        torch.manual_seed(0)
        trainer = Trainer(SuperResolver(config), recipe)
        for hr, lr in itertools.islice(batches(data, size=batch), num_steps):
            trainer.train_step(hr, lr)
        weights = {name.removeprefix("encoder."): value.contiguous() for name, value in trainer.ema.items()}
        part = path.with_suffix(".part")
        save_file(weights, part)
        part.rename(path)
    return load_file(path)


def trained(
    run: Run, data: Data, encoder: Mapping[str, Tensor], *, recipe: TrainingRecipe, every: int, look: ValidationRecipe
) -> dict[str, Any]:
    """Return the looks at a run: {points: [[step, {raw, average}], ...], ms: CPU time of a step}."""
    torch.manual_seed(0)
    model = SuperResolver(run.model)
    model.encoder.load_state_dict(encoder)
    trainer = Trainer(model, recipe)
    averaged = SuperResolver(run.model)
    pairs = to_tensor(data.val_hr), to_tensor(data.val_lr)
    points: list[tuple[int, Point]] = []
    seconds = 0.0
    for hr, lr in itertools.islice(batches(data, size=recipe.batch_size), recipe.num_steps):
        began = time.process_time()
        trainer.train_step(hr, lr)
        seconds += time.process_time() - began
        if trainer.step % every == 0 or trainer.done:
            averaged.load_state_dict(trainer.ema)
            looks = {"raw": trainer.model, "average": averaged}
            found = {name: validate(x, *pairs, stage="diffusion", recipe=look).metrics for name, x in looks.items()}
            points.append((trainer.step, {k: {n: v[n] for n in (LOSS, X0_ERROR, PSNR)} for k, v in found.items()}))
    return {"points": points, "ms": seconds / recipe.num_steps * 1e3, "skipped": trainer.skipped}


class Curves:
    """The looks at the runs that are done, and what the table asks of them."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.done: dict[str, dict[str, Any]] = {}

    def of(self, row: Row, name: str) -> list[tuple[int, float]]:
        """Return (images, value) of every look."""
        return [(step * self.batch, point[row.weights][name]) for step, point in self.done[row.run]["points"]]

    def images_to(self, row: Row, name: str, target: Row) -> int | None:
        """Return the images at the first look at least as good as target's best; None where there is none."""
        better = 1 if name == PSNR else -1
        best = max(better * value for _, value in self.of(target, name))
        return next((images for images, value in self.of(row, name) if better * value >= best), None)

    def row(self, row: Row) -> str:
        """Return the Markdown row."""
        cells = [row.label]
        same = all(getattr(RUNS[row.run].model, x) == getattr(REFERENCE_MODEL, x) for x in ("anchor", "residual_scale"))
        for name, form in ((LOSS, ".4f"), (X0_ERROR, ".5f"), (PSNR, ".2f")):
            images = self.images_to(row, name, ROWS[0])
            told = same or name != LOSS
            cells += [f"{images:,}" if images and told else "-", f"{self.of(row, name)[-1][1]:{form}}" if told else "-"]
        skipped = self.done[row.run]["skipped"]
        label = f"{self.done[row.run]['ms']:.0f}" + (f" ({skipped} skipped)" if skipped else "")
        return f"| {' | '.join([*cells, label])} |"

    def headlines(self) -> Iterator[str]:
        """Yield what the table is for, as far as the runs are there."""
        rows = {row.run: row for row in ROWS if row.weights == "average" or row.run != "reference"}
        rows["reference"] = ROWS[0]
        for name in ("best", "best_half"):
            if name in self.done:
                yield self._against(rows[name], ROWS[0], LOSS, "loss; the goal is at most 50 %")
        for residual, direct in (("reference", "direct"), ("best", "best_direct")):
            if residual in self.done and direct in self.done:
                gain = self.of(rows[residual], PSNR)[-1][1] - self.of(rows[direct], PSNR)[-1][1]
                yield f"* Residual against direct, {residual}: {gain:+.2f} dB of the sample (claimed: +0.5 dB)."
                yield self._against(rows[residual], rows[direct], PSNR, "PSNR (claimed: twice the speed, 50 %)")

    def _against(self, row: Row, target: Row, name: str, what: str) -> str:
        own, theirs = self.images_to(row, name, target), self.images_to(target, name, target)
        assert theirs is not None
        reached = "never reaches" if own is None else f"needs {own:,} images, {own / theirs:.0%}, to reach"
        return f"* *{row.label}* {reached} what *{target.label}* reaches in {theirs:,}: its best {what}."


def main() -> None:
    """Print recipes.md, or the rows of the runs that are named."""
    parser = argparse.ArgumentParser(description="What each choice of a training recipe gives.")
    parser.add_argument("--output", type=Path, default=Path("build/recipes"), help="where runs are kept")
    parser.add_argument("--runs", nargs="+", choices=tuple(RUNS), default=tuple(RUNS), metavar="RUN",
                        help=f"of {', '.join(RUNS)}; the reference is always one")  # fmt: skip
    parser.add_argument("--data", type=Path, help="folder of pictures; default: those of scikit-image")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--encoder-steps", type=int, default=ENCODER_STAGE.num_steps)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--every", type=int, default=100, help="steps between looks")
    parser.add_argument("--val-patches", type=int, default=32)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    batch, output = arguments.batch, arguments.output
    output.mkdir(parents=True, exist_ok=True)
    data = read_data(arguments.data, num_val=arguments.val_patches)
    encoder = trained_encoder(data, output, num_steps=arguments.encoder_steps, batch=batch)
    look, kept = ValidationRecipe(), output / "runs.jsonl"
    lines = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    before, curves = {line["key"]: line for line in lines}, Curves(batch)
    for name, run in RUNS.items():
        if name not in (*arguments.runs, "reference"):
            continue
        recipe = recipe_of(
            run.stage, batch=batch, num_steps=max(1, round(arguments.steps * run.share)), paper=run.stage != BEST_STAGE
        )
        key = fingerprint(
            {"model": asdict(run.model), "recipe": asdict(recipe), "look": asdict(look), "every": arguments.every,
             "data": data.digest, "encoder_steps": arguments.encoder_steps}
        )  # fmt: skip
        if key not in before:
            began = time.monotonic()
            result = trained(run, data, encoder, recipe=recipe, every=arguments.every, look=look)
            before[key] = {"key": key, "run": name, **result}
            with kept.open("a") as file:
                file.write(json.dumps(before[key]) + "\n")
            last = before[key]["points"][-1][1]
            print(f"{name}: {last}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        curves.done[name] = before[key]
    print(
        PAGE.format(
            command=" ".join(["python -m tests.benchmarks.recipes", *sys.argv[1:]]),
            date=datetime.date.today(),
            cpu=cpu_name(),
            torch=torch.__version__,
            precision=precision(),
            weights=_NANO.params / 1e6,
            encoder_steps=arguments.encoder_steps,
            steps=arguments.steps,
            batch=batch,
            patch=PATCH_PX,
            source="Photographs of scikit-image" if arguments.data is None else f"Pictures of {arguments.data.name}",
            num_train=f"{len(data.hr):,}",
            num_val=len(data.val_hr),
            every=arguments.every,
            sampling=look.num_steps,
            head=f"| {' | '.join(HEAD)} |",
            rule="---|" * len(HEAD),
            rows="\n".join(curves.row(row) for row in ROWS if row.run in curves.done),
            headlines="\n".join(curves.headlines()),
        )
    )


if __name__ == "__main__":
    main()

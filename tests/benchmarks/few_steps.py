"""What a model that draws in one step gives for what it costs; prints few_steps.md.

    python -m tests.benchmarks.few_steps --student RUN/model --teacher RUN/model > tests/benchmarks/few_steps.md

The student was trained to draw in one step, the teacher is the diffusion model of the same network, and both are
anchored on one regression; `TABLE=1 infra/shipped/train.sh` makes the models and the page. What an image scored is
kept in --cache: a run that was killed goes on. Seconds are measured again by every run.
"""

import argparse
import datetime
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from pipelines.measures import Meter, MeterSettings, files_digest
from tests.benchmarks.few_steps_rows import (
    LATE_LEVEL,
    Cache,
    Model,
    Row,
    drawing,
    key_of,
    load_models,
    read_pairs,
    rows_of,
    seconds_of,
)
from tests.benchmarks.few_steps_scores import (
    CONTROL,
    NUM_OCTAVES,
    NUM_SAMPLES,
    REGRESSION,
    SCALE,
    STUDENT,
    Pair,
    Scores,
    find_gain,
    score,
    verdicts,
)
from tests.benchmarks.steps import cpu_name

DATA = Path(__file__).resolve().parents[2] / "../shared/data"
TIMED_TILE = 64  # LR px: the output is 256x256
PRECISIONS: tuple[Literal["float32", "bf16"], ...] = ("float32", "bf16")
NAMES = ("psnr_y", "ssim_y", "lr_psnr", "spectral_error", "niqe", "sigma")
# (title, measure, digits)
COLUMNS = (
    ("PSNR-Y, dB", "psnr_y", 2),
    ("SSIM-Y", "ssim_y", 4),
    ("NIQE", "niqe", 2),
    ("LR-PSNR, dB", "lr_psnr", 1),
    ("spectral error, dB", "spectral_error", 2),
    *((f"{0.5 / 2 ** (k + 1):g}-{0.5 / 2**k:g}", f"octave_{k}", 1) for k in range(NUM_OCTAVES)),
    ("HF energy", "texture", 3),
    ("σ", "sigma", 2),
)
PAGE = """# A model that draws in one step: quality and cost

Printed by `{command}` on {date}.
{cpu}, threads: {threads}, torch {torch}. Models: {models}.

Calls: of the denoiser, per image; each image is one patch of the network. The LR is the bicubic reduction by {scale},
rounded to 8 bits. Every row but *bicubic* is projected onto its LR, rounded to 8 bits, and then measured: PSNR-Y and
SSIM-Y on BT.601 luma rounded as in MATLAB, NIQE with BasicSR's statistics, spectral error and energies on luma as it
is, all inside a border of {scale} px. Columns named by cycles per px: the mean difference of the radial spectrum from
HR's in that octave, dB; below 0 is too weak, and the first two lie above the LR's Nyquist. HF energy: that of
x - up(down(x)), of all images together, over HR's. σ: standard deviation over {samples} samples, mean over pixels and
channels, levels of 255; everything else is the mean over those samples. Seconds: one 256x256 output (64x64 LR) from
pixels to pixels, projection included, one patch a call, the median of 3 to {rounds} runs in turn, all in this run.
{notes}
{tables}

## What the numbers say

{verdicts}
"""


def main() -> None:
    """Print few_steps.md."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    models = load_models(arguments.student, arguments.teacher, arguments.distilled)
    rows = rows_of(models, arguments.teacher)
    settings = MeterSettings(names=NAMES, border=SCALE, niqe=str(arguments.niqe))
    meter, cache = Meter(settings, scale=SCALE), Cache(arguments.cache / files_digest([str(arguments.niqe)])[:8])
    sets = {"Set5": read_pairs(arguments.set5), "BSD100": read_pairs(arguments.bsd100, limit=arguments.images)}
    found, gains = dict[str, dict[str, Scores]](), dict[str, float]()
    for name, pairs in sets.items():
        found[name], gains[name] = measured(name, pairs, rows, models, meter, cache, num_threads=arguments.threads)
    seconds = timed(rows, models, gain=gains["Set5"], num_threads=arguments.threads, rounds=arguments.rounds)
    tables = [
        f"## {name}, {len(pairs)} images\n\nThe sharpened control's gain is {gains[name]:.3f}.\n\n"
        + table(found[name], seconds)
        for name, pairs in sets.items()
    ]
    said = verdicts(found, seconds)
    print(
        PAGE.format(
            command=_command(arguments),
            date=datetime.date.today(),
            cpu=cpu_name(),
            threads=arguments.threads,
            torch=torch.__version__,
            models=", ".join(f"{source} `{model.digest[:12]}`" for source, model in models.items()),
            scale=SCALE,
            samples=NUM_SAMPLES,
            rounds=arguments.rounds,
            notes=notes(rows, models),
            tables="\n\n".join(tables),
            verdicts="\n".join(f"* **{'Yes' if v.holds else 'No'}.** {v.claim}. {v.evidence}." for v in said),
        )
    )


def measured(
    name: str,
    pairs: Sequence[Pair],
    rows: Sequence[Row],
    models: Mapping[str, Model],
    meter: Meter,
    cache: Cache,
    *,
    num_threads: int,
) -> tuple[dict[str, Scores], float]:
    """Return the scores of a set by row, in the order of rows, and the gain of its sharpened control.

    The student comes first: its energy is what the control is sharpened to.
    """
    found: dict[str, Scores] = {}
    gain = 0.0
    for row in sorted(rows, key=lambda row: (row.name != STUDENT, row.source != "sharpened")):
        if row.name == CONTROL:
            gain = gain_of(pairs, rows, models, cache, energy=found[STUDENT].total("energy"), num_threads=num_threads)
        own, images, began = gain if row.name == CONTROL else 0.0, [], time.monotonic()
        for pair in pairs:
            draw = drawing(row, models, tile=max(pair.lr.shape[:2]), num_threads=num_threads, gain=own)
            key = key_of(row, models, pair, gain=own)
            count = NUM_SAMPLES if row.varies else 1
            images.append(cache.of(key, partial(score, draw, pair, meter, num_samples=count)))
        found[row.name] = Scores(row.calls, images)
        print(f"{name}: {row.name}: {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
    return {row.name: found[row.name] for row in rows}, gain


def gain_of(
    pairs: Sequence[Pair],
    rows: Sequence[Row],
    models: Mapping[str, Model],
    cache: Cache,
    *,
    energy: float,
    num_threads: int,
) -> float:
    """Return the gain that sharpens the set's regressions to this energy; a kept one where there is one."""
    regression = next(row for row in rows if row.name == REGRESSION)

    def compute() -> dict[str, float]:
        images = [
            (drawing(regression, models, tile=max(pair.lr.shape[:2]), num_threads=num_threads)(pair.lr, 0), pair.lr)
            for pair in pairs
        ]
        gain, reached = find_gain(images, energy)
        return {"gain": gain, "reached": reached}

    asked = {"student": models["student"].digest, "images": [pair.digest for pair in pairs], "energy": energy}
    return cache.of({**asked, "recipe": asdict(regression.recipe)}, compute)["gain"]


def timed(
    rows: Sequence[Row], models: Mapping[str, Model], *, gain: float, num_threads: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Return the seconds of one 256x256 output by row and precision."""
    draws = {}
    for row in rows:
        for precision in PRECISIONS:
            if precision == "bf16" and row.source in ("bicubic", "projected"):
                continue  # no network
            if precision != row.recipe.precision == "bf16":
                continue
            own = replace(row, recipe=replace(row.recipe, precision=precision))
            draws[row.name, precision] = drawing(own, models, tile=TIMED_TILE, num_threads=num_threads, gain=gain)
    taken = seconds_of(draws, rounds=rounds, budget_s=10.0)
    return {
        row.name: {precision: taken[row.name, precision] for precision in PRECISIONS if (row.name, precision) in taken}
        for row in rows
    }


def table(found: Mapping[str, Scores], seconds: Mapping[str, Mapping[str, float]]) -> str:
    """Return the Markdown table of a set."""
    titles = ["row", "calls", *(title for title, _, _ in COLUMNS), *(f"s, {precision}" for precision in PRECISIONS)]
    lines = [f"| {' | '.join(titles)} |", "|---|" + "---:|" * (len(titles) - 1)]
    for name, scores in found.items():
        cells = [_cell(scores.mean(measure), digits) for _, measure, digits in COLUMNS]
        cells += [_cell(seconds[name].get(precision, math.nan), 3) for precision in PRECISIONS]
        lines.append(f"| {name} | {scores.calls} | {' | '.join(cells)} |")
    return "\n".join(lines)


def notes(rows: Sequence[Row], models: Mapping[str, Model]) -> str:
    """Return what the reader must know of single rows, those that are missing included."""
    lines = [
        f"*From the regression at {LATE_LEVEL:g}*: the reverse process starts at that noise level, not at pure noise.",
        "*Sharpened*: the control. The band above the LR's Nyquist of the regression, one gain for the set, by which "
        "it has the student's HF energy (found by bisection, to 0.1 %); then projected as the others are.",
        *_start_note(models),
        "*ResShift*: its sampler on its grid, with a teacher that was trained on another schedule.",
    ]
    if not any(row.name.startswith("teacher, searched") for row in rows):
        lines.append("No row of a searched schedule: the teacher's folder has no sampling.json.")
    if "distilled" not in models:
        lines.append("No row of a distilled model: none was given.")
    return "\n".join(["", *(f"* {line}" for line in lines), ""])


def _start_note(models: Mapping[str, Model]) -> list[str]:
    own = models["student"].network.config.start_level
    if own is None:
        return []
    return [
        "*Student*: one network, which starts from noise (0) for the most texture and towards 1 from its regression; "
        f"where no level is named, from its own, {own:g}."
    ]


def _command(arguments: argparse.Namespace) -> str:
    """Return the command without the folders, which are of this machine."""
    distilled = " --distilled DISTILLED" if arguments.distilled else ""
    counts = f"--images {arguments.images} --threads {arguments.threads} --rounds {arguments.rounds}"
    return f"python -m tests.benchmarks.few_steps --student STUDENT --teacher TEACHER{distilled} {counts}"


def _cell(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What a model that draws in one step gives for what it costs.")
    parser.add_argument("--student", type=Path, required=True, help="model folder, trained to draw in one step")
    parser.add_argument("--teacher", type=Path, required=True, help="model folder, the diffusion model")
    parser.add_argument("--distilled", type=Path, help="model folder, distilled from the teacher")
    parser.add_argument("--set5", type=Path, default=DATA / "test/set5")
    parser.add_argument("--bsd100", type=Path, default=DATA / "test/bsd100")
    parser.add_argument("--images", type=int, default=20, help="of BSD100, the first by name")
    parser.add_argument("--niqe", type=Path, default=DATA / "niqe/niqe_pris_params.npz")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9, help="of timing")
    parser.add_argument("--cache", type=Path, default=Path("build/few_steps"), help="where results are kept")
    arguments = parser.parse_args()
    if arguments.images < 1 or arguments.threads < 1 or arguments.rounds < 3:
        parser.error("--images and --threads must be at least 1, --rounds at least 3")
    if arguments.threads > (os.cpu_count() or 1):
        parser.error(f"--threads ({arguments.threads}) must be at most {os.cpu_count()}, the cores of this machine")
    return arguments


if __name__ == "__main__":
    main()

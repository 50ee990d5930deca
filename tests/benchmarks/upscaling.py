"""The whole upscale job against the bare network, and the steps and overlap of others; prints upscaling.md.

    python -m tests.benchmarks.upscaling --model runs/1/model > tests/benchmarks/upscaling.md
    python -m tests.benchmarks.upscaling --model runs/1/model --images 40 --rounds 1

Job and bare loop run on one core, in turn, as processes of their own. The bare loop holds all tiles of all images as
tensors and does nothing but the network calls that these images need: no file, no noise, no projection, no measure.
"""

import argparse
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffsr_core.checkpoint import load_model
from diffsr_core.degradation import Degradation
from diffsr_core.pixels import to_model_range
from diffsr_core.sampling import SamplingRecipe
from diffsr_core.tiling import padded_size, tiles
from diffsr_core.upscaler import Upscaler

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "../shared/data"
FOLDERS = ("test/bsd100", "train/faces")
# What users run today, as their code does it: steps of one sample, and the tiling rule of Real-ESRGAN (tile + 2 pad).
SR3_STEPS, SRDIFF_STEPS = 2000, 100
PAGE = """# The upscale job against the bare network

Printed by `{command}` on {date}. {cpu}, one core of it for each contender.

{num} real images, reduced by 4 (bicubic) and upscaled by 4 again: {source:.2f} MP in, {output:.1f} MP out.
{weights:.1f} M weights, {steps} steps (DDIM), tiles of {tile} with a halo of {halo} LR px, {micro} in a call, float32.
Rounds: {rounds}; seconds are medians.

| contender | s | of it start | assets/s after start | output MP/s after start | of the bare loop |
|---|---:|---:|---:|---:|---:|
{rows}

Start: the same command over one image; subtracted where it says "after start". The bare loop makes {calls:,} calls
of the network, all full, with the tiles of all images side by side in memory, and nothing else. The job reads, decodes,
makes the noise, projects, encodes, decodes and measures again, hashes, publishes with sidecars, keeps the ledger and
writes the report; it fills its calls with the tiles of the images that are in flight.

## What others would spend on the same images

| rule | steps of one sample | network calls, relative | area computed per area kept |
|---|---:|---:|---:|
{others}

SR3's and SRDiff's public code samples with the steps that it was trained with; neither has tiles. Real-ESRGAN's rule is
tile and pad on every side; ours writes to the border without padding. Steps are those of the sampler; what a step costs
is the network's own.
"""


def main() -> None:
    """Print the page."""
    parser = argparse.ArgumentParser(description="The upscale job against the bare network.")
    parser.add_argument("--model", required=True, help="model folder of scale 4")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    recipe = SamplingRecipe(num_steps=arguments.steps)
    if arguments.bare:
        print(json.dumps(bare(Path(arguments.model), Path(arguments.bare), recipe)))
        return
    with tempfile.TemporaryDirectory(prefix="diffsr-bench-") as folder:
        print(measure(arguments, recipe, Path(folder)))


def bare(model: Path, source: Path, recipe: SamplingRecipe) -> dict[str, float]:
    """Return the seconds and the number of the network calls that the images below source need."""
    upscaler = Upscaler(load_model(model)[0], recipe)
    config, size = upscaler.model.config, recipe.micro_batch
    cut = list[torch.Tensor]()
    for path in sorted(source.iterdir()):
        lr = to_model_range(np.asarray(Image.open(path).convert("RGB")))
        bottom, right = (padded_size(n, tile=recipe.tile, stride=config.lr_stride) - n for n in lr.shape[2:])
        canvas = torch.nn.functional.pad(lr, (0, right, 0, bottom), mode="replicate")
        plan = tiles(*canvas.shape[2:], tile=recipe.tile, halo=recipe.halo)
        cut += [canvas[0, :, t.top : t.top + recipe.tile, t.left : t.left + recipe.tile] for t in plan]
    cut += [torch.zeros_like(cut[0])] * (-len(cut) % size)
    batches = [torch.stack(cut[k : k + size]) for k in range(0, len(cut), size)]
    torch.set_num_threads(recipe.num_threads)
    grid = upscaler.grid.tolist()[:-1]
    channels, height, width = config.diffused_shape(recipe.tile, recipe.tile)
    x_t, calls, started = torch.randn(size, channels, height, width), 0, time.perf_counter()
    for batch in batches:
        features, _ = upscaler._encode([batch])
        for level in grid:
            upscaler._predict([features, x_t, torch.full((size,), level)])
            calls += 1
        calls += 1
    return {"seconds": time.perf_counter() - started, "calls": calls}


def measure(arguments: argparse.Namespace, recipe: SamplingRecipe, folder: Path) -> str:
    """Run all contenders in turn and return the page."""
    source, one = folder / "source", folder / "one"
    for target, count in ((source, arguments.images), (one, 1)):
        target.mkdir()
        write_images(target, count)
    pixels = sum(np.prod(Image.open(path).size) for path in source.iterdir()) / 1e6
    names = ("bare loop", "job, engine local", "job, Ray, 1 worker")
    seconds: dict[tuple[str, str], list[float]] = {(name, where): [] for name in names for where in ("all", "one")}
    calls = 0.0
    for number in range(arguments.rounds):
        found = json.loads(last_line(bare_command(arguments, source)))
        calls = found["calls"]
        seconds["bare loop", "all"].append(found["seconds"])
        seconds["bare loop", "one"].append(0.0)
        for name, flags in ((names[1], ["--engine", "local"]), (names[2], ["--num-workers", "1"])):
            for where, place in (("one", one), ("all", source)):
                output = folder / f"{name[5:8]}-{where}-{number}".replace(",", "")
                began = time.perf_counter()
                last_line(job_command(arguments, place, output) + flags)
                seconds[name, where].append(time.perf_counter() - began)
                shutil.rmtree(output)
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    base = medians["bare loop", "all"]
    rows = []
    for name in names:
        whole, start = medians[name, "all"], medians[name, "one"]
        net, count = whole - start, arguments.images - (name != "bare loop")
        share = count / arguments.images
        speeds = f"{count / net:.2f} | {16 * pixels * share / net:.3f} | {base * share / net:.2f}"
        rows.append(f"| {name} | {whole:.1f} | {start:.1f} | {speeds} |")
    area = (recipe.tile / (recipe.tile - 2 * recipe.halo)) ** 2
    others = [
        f"| this run | {recipe.num_steps} | 1 | {area:.2f} in an image, {mean_overlap(source, recipe):.2f} on these |",
        f"| SRDiff's code | {SRDIFF_STEPS} | {SRDIFF_STEPS / recipe.num_steps:.0f} | whole images only |",
        f"| SR3's unofficial code | {SR3_STEPS} | {SR3_STEPS / recipe.num_steps:.0f} | whole images only |",
        "| Real-ESRGAN, tile 400, pad 10 | 1 | | 1.10 |",
        f"| Real-ESRGAN, tile {recipe.tile - 2 * recipe.halo}, pad {recipe.halo} | 1 | | {area:.2f} |",
    ]
    model = load_model(Path(arguments.model))[0]
    return PAGE.format(
        command="python -m tests.benchmarks.upscaling --model MODEL",
        date=datetime.date.today(),
        cpu=next(line.split(": ")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")),
        num=arguments.images, source=pixels, output=16 * pixels, steps=recipe.num_steps, tile=recipe.tile,
        weights=sum(p.numel() for p in model.parameters()) / 1e6, halo=recipe.halo, micro=recipe.micro_batch,
        rounds=arguments.rounds, rows="\n".join(rows), calls=int(calls), others="\n".join(others),
    )  # fmt: skip


def mean_overlap(source: Path, recipe: SamplingRecipe) -> float:
    """Return the area of all tiles over the area of the images."""
    computed = kept = 0
    for path in source.iterdir():
        width, height = Image.open(path).size
        plan = tiles(max(height, recipe.tile), max(width, recipe.tile), tile=recipe.tile, halo=recipe.halo)
        computed, kept = computed + len(plan) * recipe.tile**2, kept + height * width
    return computed / kept


def write_images(folder: Path, count: int) -> None:
    """Write the first `count` images of FOLDERS, reduced by 4, as PNG."""
    paths = [path for name in FOLDERS for path in sorted((DATA / name).rglob("*")) if path.suffix in (".png", ".jpg")]
    for index, path in enumerate(paths[:count]):
        pixels = np.asarray(Image.open(path).convert("RGB"))
        height, width = (side // 4 * 4 for side in pixels.shape[:2])
        lr = Degradation("bicubic", 4).apply(pixels[:height, :width], seed=0)
        Image.fromarray(lr).save(folder / f"{index:04d}.png")


def bare_command(arguments: argparse.Namespace, source: Path) -> list[str]:
    """Return the command of the bare loop."""
    return [sys.executable, "-m", "tests.benchmarks.upscaling", "--model", arguments.model, "--bare", str(source),
            "--steps", str(arguments.steps)]  # fmt: skip


def job_command(arguments: argparse.Namespace, source: Path, output: Path) -> list[str]:
    """Return the command of the job, without its engine."""
    return [sys.executable, str(ROOT / "jobs/upscale.py"), "--source", str(source), "--output", str(output), "--model",
            arguments.model, "--steps", str(arguments.steps), "--no-track"]  # fmt: skip


def last_line(command: list[str]) -> str:
    """Run a command on one core, and return the last line of what it says. Raises SystemExit where it fails."""
    environment: dict[str, Any] = {**os.environ, "OMP_NUM_THREADS": "1"}
    core = str(max(os.sched_getaffinity(0)))
    done = subprocess.run(["taskset", "-c", core, *command], capture_output=True, text=True, cwd=ROOT, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return done.stdout.rstrip().splitlines()[-1]


if __name__ == "__main__":
    main()

"""The whole upscale job against the bare network, and the steps and overlap of others; prints upscaling.md.

    python -m tests.benchmarks.upscaling > tests/benchmarks/upscaling.md
    python -m tests.benchmarks.upscaling --images 20 --full-size --precision bf16 --model runs/1/model --steps 4

Job and bare loop run on one core, in turn, as processes of their own. The bare loop holds all tiles of all images as
tensors and does nothing but the network calls that these images need: no file, no noise, no projection, no measure. The
floor is the same job with a model that is bicubic and computes next to nothing.
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

from diffsr_core.checkpoint import model_files, model_from_files, save_files
from diffsr_core.degradation import Degradation
from diffsr_core.family import ModelConfig, SuperResolver
from diffsr_core.networks.edsr import EDSRConfig
from diffsr_core.pixels import to_model_range
from diffsr_core.sampling import SamplingRecipe
from diffsr_core.tiling import padded_size, tiles
from diffsr_core.upscaler import Upscaler
from pipelines.models import resolve

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "../shared/data"
FOLDERS = ("test/bsd100", "train/faces")
# What users run today, as their code does it: steps of one sample, and the tiling rule of Real-ESRGAN (tile + 2 pad).
SR3_STEPS, SRDIFF_STEPS = 2000, 100
PAGE = """# The upscale job against the bare network

Printed by `{command}` on {date}. {cpu}, one core of it for each contender.

{num} real images, {origin}: {source:.2f} MP in, {output:.1f} MP out.
{model}: {weights:.2f} M weights, {steps} steps (DDIM), tiles of {tile} with a halo of {halo} LR px, {micro} in a call,
{precision}. Rounds: {rounds}; seconds are medians.

| contender | s | of it start | assets/s after start | output MP/s after start | of the bare loop |
|---|---:|---:|---:|---:|---:|
{rows}

Start: the same command over one image; subtracted where it says "after start". The bare loop makes {calls:,} calls
of the network, all full, with the tiles of all images side by side in memory, and nothing else. The job reads, decodes,
makes the noise, projects, encodes, decodes and measures again, hashes, publishes with sidecars, keeps the ledger and
writes the report; it fills its calls with the tiles of the images that are in flight.

## What others would spend on the same images

| rule | steps of one sample | calls, relative | s of a network of this size | area computed per area kept |
|---|---:|---:|---:|---:|
{others}

SR3's and SRDiff's public code samples with the steps that it was trained with; neither has tiles. Real-ESRGAN's rule is
tile and pad on every side; ours writes to the border without padding. Steps are those of the sampler; what a step costs
is the network's own; the seconds are those of this network's calls, as often as the others make them, and not measured.
"""


def main() -> None:
    """Print the page."""
    parser = argparse.ArgumentParser(description="The upscale job against the bare network.")
    parser.add_argument("--model", default="pretrained:diffsr-x4", help="model of scale 4")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--full-size", action="store_true", help="upscale the images as they are")
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    recipe = SamplingRecipe(num_steps=arguments.steps, precision=arguments.precision)
    if arguments.bare:
        print(json.dumps(bare(arguments.model, Path(arguments.bare), recipe)))
        return
    with tempfile.TemporaryDirectory(prefix="diffsr-bench-") as folder:
        print(measure(arguments, recipe, Path(folder)))


def model_of(ref: str) -> SuperResolver:
    """Return the network of a model reference."""
    return model_from_files(resolve(ref).files)[0]


def write_floor(folder: Path) -> None:
    """Write a model that is bicubic: a regression whose residual is zero, of one feature."""
    network = SuperResolver(ModelConfig(encoder=EDSRConfig(num_features=1, num_blocks=1), anchor="regression"))
    weights = network.state_dict()
    save_files(folder, model_files(network.config, weights, weights, preset="anchored-x4-regression", card=""))


def bare(model: str, source: Path, recipe: SamplingRecipe) -> dict[str, float]:
    """Return the seconds and the number of the network calls that the images below source need, and the denoiser's."""
    upscaler = Upscaler(model_of(model), recipe)
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
    x_t, calls, of_denoiser, started = torch.randn(size, channels, height, width), 0, 0.0, time.perf_counter()
    for batch in batches:
        features, _ = upscaler._encode([batch])
        began = time.perf_counter()
        for level in grid:
            upscaler._predict([features, x_t, torch.full((size,), level)])
            calls += 1
        calls += 1
        of_denoiser += time.perf_counter() - began
    return {"seconds": time.perf_counter() - started, "calls": calls, "denoiser_s": of_denoiser}


def measure(arguments: argparse.Namespace, recipe: SamplingRecipe, folder: Path) -> str:
    """Run all contenders in turn and return the page."""
    source, one = folder / "source", folder / "one"
    for target, count in ((source, arguments.images), (one, 1)):
        target.mkdir()
        write_images(target, count, full_size=arguments.full_size)
    write_floor(folder / "floor")
    pixels = sum(np.prod(Image.open(path).size) for path in source.iterdir()) / 1e6
    names = ("bare loop", "job, engine local", "job, Ray, 1 worker", "bicubic only, engine local")
    flags = {
        names[1]: ["--model", arguments.model, "--engine", "local"],
        names[2]: ["--model", arguments.model, "--num-workers", "1"],
        names[3]: ["--model", str(folder / "floor"), "--engine", "local"],
    }
    seconds: dict[tuple[str, str], list[float]] = {(name, where): [] for name in names for where in ("all", "one")}
    calls = denoiser_s = 0.0
    for number in range(arguments.rounds):
        found = json.loads(last_line(bare_command(arguments, source)))
        calls, denoiser_s = found["calls"], found["denoiser_s"]
        seconds["bare loop", "all"].append(found["seconds"])
        seconds["bare loop", "one"].append(0.0)
        for index, (name, own) in enumerate(flags.items()):
            for where, place in (("one", one), ("all", source)):
                output = folder / f"{index}-{where}-{number}"
                began = time.perf_counter()
                last_line(job_command(arguments, place, output) + own)
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
    overlap = mean_overlap(source, recipe)
    others = [f"| this run | {recipe.num_steps} | 1 | {base:.0f} | {area:.2f} in an image, {overlap:.2f} on these |"]
    for name, steps in (("SRDiff's code", SRDIFF_STEPS), ("SR3's unofficial code", SR3_STEPS)):
        more = steps / recipe.num_steps
        others.append(f"| {name} | {steps} | {more:.0f} | {base + (more - 1) * denoiser_s:,.0f} | whole images only |")
    others += [
        "| Real-ESRGAN, tile 400, pad 10 | 1 | | | 1.10 |",
        f"| Real-ESRGAN, tile {recipe.tile - 2 * recipe.halo}, pad {recipe.halo} | 1 | | | {area:.2f} |",
    ]
    return PAGE.format(
        command=" ".join(["python -m tests.benchmarks.upscaling", *sys.argv[1:]]),
        origin="as they are" if arguments.full_size else "reduced by 4 (bicubic) and upscaled by 4 again",
        model=arguments.model, precision=recipe.precision,
        date=datetime.date.today(),
        cpu=next(line.split(": ")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")),
        num=arguments.images, source=pixels, output=16 * pixels, steps=recipe.num_steps, tile=recipe.tile,
        weights=sum(p.numel() for p in model_of(arguments.model).parameters()) / 1e6, halo=recipe.halo,
        micro=recipe.micro_batch,
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


def write_images(folder: Path, count: int, *, full_size: bool) -> None:
    """Write the first `count` images of FOLDERS as PNG, reduced by 4 unless full_size."""
    paths = [path for name in FOLDERS for path in sorted((DATA / name).rglob("*")) if path.suffix in (".png", ".jpg")]
    for index, path in enumerate(paths[:count]):
        pixels = np.asarray(Image.open(path).convert("RGB"))
        height, width = (side // 4 * 4 for side in pixels.shape[:2])
        lr = pixels if full_size else Degradation("bicubic", 4).apply(pixels[:height, :width], seed=0)
        Image.fromarray(lr).save(folder / f"{index:04d}.png")


def bare_command(arguments: argparse.Namespace, source: Path) -> list[str]:
    """Return the command of the bare loop."""
    return [sys.executable, "-m", "tests.benchmarks.upscaling", "--model", arguments.model, "--bare", str(source),
            "--steps", str(arguments.steps), "--precision", arguments.precision]  # fmt: skip


def job_command(arguments: argparse.Namespace, source: Path, output: Path) -> list[str]:
    """Return the command of the job, without its engine."""
    return [sys.executable, str(ROOT / "jobs/upscale.py"), "--source", str(source), "--output", str(output),
            "--steps", str(arguments.steps), "--precision", arguments.precision, "--no-track"]  # fmt: skip


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

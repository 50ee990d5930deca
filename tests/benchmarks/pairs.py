"""The whole pairs job against a bare Pillow loop and against img2dataset; prints pairs.md.

    python -m tests.benchmarks.pairs --img2dataset /path/to/its/venv/bin/python > tests/benchmarks/pairs.md
    python -m tests.benchmarks.pairs --crops 300 --rounds 1

Everyone reads the same files on two processes, in turn (A B C, A B C), and the medians count. What a run costs before
its first image (Ray's start, imports, opening and committing a set) is measured as a run over two of the files; so each
contender has its seconds with that and without.
"""

import argparse
import datetime
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PHOTOGRAPHS = ROOT / "../shared/data/train/photos_open"
CROP_PX, PATCH_PX, SCALE, NUM_PROCESSES = 512, 256, 4, 2
START_FILES = 2
SIDES = ("hr_h", "hr_w")
PAGE = """# The pairs job against a bare loop

Printed by `{command}` on {date}. {cpu}, {cpus} CPUs.

{num} crops of 512 px of real photographs, half of them JPEG and half PNG, {megabytes} MB; x4, patches of 256 px,
lossless WebP of method 0. Two processes each, in turn, rounds: {rounds}; seconds are medians (and the range).

{head}
|{rule}
{rows}

*Start*: the same command over two of the files; it is subtracted where it says "after". MP are of the HR images that
were written: what the job drops as flat or as a duplicate is read, but counts as nothing delivered. *Job is faster by*:
its MP/s over the contender's; the goals are 0.85 of the bare loop and 1.2 of img2dataset.

The bare loop reads with Pillow, cuts, resizes with Pillow's bicubic, encodes both sides and writes one Parquet file per
process. It has no ledger, no receipts, no colour management, no limits, no hashes, no splits, no statistics, no seed.

{img2dataset}
"""
IMG2DATASET = """img2dataset reads the same files by file:// addresses with two processes of four threads, hashes and
decodes them, and encodes the whole picture again without loss into Parquet: as WebP (OpenCV offers no method 0, so it
is slower, for smaller files) and as PNG of level 1. It cuts no patches, makes no LR, applies no colour profile, drops
no duplicates, and ends with exit code 0 whatever it failed to read."""
HEAD = (
    "contender", "s", "of it start", "images/s", "images/s after start", "MP/s per core", "MP/s per core after start",
    "HR images written", "HR MP", "MB", "job is faster by", "after start",
)  # fmt: skip


class Run(NamedTuple):
    """One run of one contender: seconds on the wall, HR images and HR megapixels in what it wrote, bytes of that."""

    seconds: float
    num_patches: int
    megapixels: float
    num_bytes: int


class Contender(NamedTuple):
    """call(files, output) -> the command lines that are started together, and the column with the HR pictures."""

    name: str
    commands: Callable[[list[Path], Path], list[list[str]]]
    sides: tuple[str, str]


def cut(photographs: Sequence[Path], folder: Path, *, num_crops: int) -> list[Path]:
    """Write crops of CROP_PX in turn as JPEG (quality 95) and PNG; return the files.

    The photographs give some 400 crops that do not overlap. Mirrored and turned they are other pictures to every codec
    and to the search for duplicates, and as hard as before; so all eight positions are used before a crop is one short.
    """
    files: list[Path] = []
    turns: list[Image.Transpose | None] = [None, *Image.Transpose]
    for turn in turns:
        for photograph in photographs:
            with Image.open(photograph) as image:
                whole = image.convert("RGB")
            for y in range(0, whole.height - CROP_PX + 1, CROP_PX):
                for x in range(0, whole.width - CROP_PX + 1, CROP_PX):
                    if len(files) == num_crops:
                        return files
                    crop = whole.crop((x, y, x + CROP_PX, y + CROP_PX))
                    crop = crop if turn is None else crop.transpose(turn)
                    path = folder / f"{len(files):05d}{'.png' if len(files) % 2 else '.jpg'}"
                    options: dict[str, Any] = {"compress_level": 4} if len(files) % 2 else {"quality": 95}
                    crop.save(path, **options)
                    files.append(path)
    raise ValueError(f"--crops {num_crops}: must be at most {len(files)}, which is what the photographs give")


def bare(listing: str, output: str) -> None:
    """Write one Parquet file of the pairs of the listed files: Pillow's decode, bicubic resize and WebP, no more."""
    columns: dict[str, list[bytes | int]] = {"hr": [], "lr": [], "hr_h": [], "hr_w": []}
    for name in Path(listing).read_text().splitlines():
        with Image.open(name) as image:
            pixels = np.asarray(image.convert("RGB"))
        for y in range(0, pixels.shape[0] - PATCH_PX + 1, PATCH_PX):
            for x in range(0, pixels.shape[1] - PATCH_PX + 1, PATCH_PX):
                hr = Image.fromarray(pixels[y : y + PATCH_PX, x : x + PATCH_PX])
                lr = hr.resize((PATCH_PX // SCALE, PATCH_PX // SCALE), Image.Resampling.BICUBIC)
                columns["hr"].append(_webp(hr))
                columns["lr"].append(_webp(lr))
                columns["hr_h"].append(hr.height)
                columns["hr_w"].append(hr.width)
    pq.write_table(pa.table(columns), output, compression="NONE")


def _webp(image: Image.Image) -> bytes:
    out = pa.BufferOutputStream()
    image.save(out, "WEBP", lossless=True, method=0, exact=True)
    return bytes(out.getvalue())


def pillow_commands(files: list[Path], output: Path) -> list[list[str]]:
    """Return the command lines of the bare loop, each process with every second file."""
    output.mkdir()
    commands = []
    for index in range(NUM_PROCESSES):
        listing = output / f"{index}.txt"
        listing.write_text("\n".join(map(str, files[index::NUM_PROCESSES])))
        code = "import sys; from tests.benchmarks.pairs import bare; bare(*sys.argv[1:])"
        commands.append([sys.executable, "-c", code, str(listing), str(output / f"{index}.parquet")])
    return commands


def job_contender(flags: Sequence[str]) -> Contender:
    """Return the pairs job of this checkout, on Ray, its work packed into four units per worker."""

    def commands(files: list[Path], output: Path) -> list[list[str]]:
        job = [sys.executable, str(ROOT / "jobs/make_pairs.py"), "--source", str(files[0].parent)]
        job += ["--output", str(output), "--scale", str(SCALE), "--patch", str(PATCH_PX)]
        unit_megabytes = sum(path.stat().st_size for path in files) / 2**20 / (4 * NUM_PROCESSES)
        job += ["--engine", "ray", "--num-workers", str(NUM_PROCESSES), "--unit-megabytes", f"{unit_megabytes:.3f}"]
        return [[*job, *flags]]

    return Contender("pairs job", commands, SIDES)


def img2dataset_contender(python: str, format: str) -> Contender:
    """Return img2dataset with lossless re-encoding at full size. OpenCV takes a WebP quality above 100 as lossless."""

    def commands(files: list[Path], output: Path) -> list[list[str]]:
        listing = output.with_suffix(".txt")
        listing.write_text("\n".join(path.as_uri() for path in files))
        options = {
            "url_list": listing,
            "output_folder": output,
            "output_format": "parquet",
            "processes_count": NUM_PROCESSES,
            "thread_count": 4,  # a local disk does not wait: more of them only take turns
            "resize_mode": "no",
            "encode_format": format,
            "encode_quality": {"webp": 101, "png": 1}[format],
            "number_sample_per_shard": max(1, -(-len(files) // (4 * NUM_PROCESSES))),
        }
        flags = [f"--{name}={value}" for name, value in options.items()]
        return [[python, "-c", "from img2dataset.main import main; main()", *flags]]

    return Contender(f"img2dataset, {format}", commands, ("height", "width"))


def timed(contender: Contender, files: list[Path], folder: Path) -> Run:
    """Run a contender on all files of one folder, into a new folder. Raises RuntimeError for one that fails."""
    output = Path(tempfile.mkdtemp(dir=folder)) / "out"
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "PYTHONPATH": str(ROOT)}
    commands = contender.commands(files, output)
    with (folder / "log.txt").open("w+") as log:
        started = time.monotonic()
        running = [subprocess.Popen(c, stdout=log, stderr=log, cwd=folder, env=environment) for c in commands]
        codes = [process.wait() for process in running]
        seconds = time.monotonic() - started
        log.seek(0)
        if any(codes):
            raise RuntimeError(f"{contender.name}: exit codes {codes}\n{log.read()[-3000:]}")
    num_patches, pixels, num_bytes = 0, 0, 0
    for path in sorted(output.rglob("*.parquet")):
        if "_diffsr" not in path.parts and path.name != "dead_letters.parquet":
            table = pq.read_table(path, columns=list(contender.sides))
            heights, widths = (table[name].to_numpy() for name in contender.sides)
            num_patches += table.num_rows
            pixels += int((heights.astype(np.int64) * widths).sum())
            num_bytes += path.stat().st_size
    return Run(seconds, num_patches, pixels / 1e6, num_bytes)


def median(runs: Sequence[Run]) -> Run:
    """Return the run of median seconds; what was written is the same in all."""
    assert len({run[1:3] for run in runs}) == 1, runs
    return runs[0]._replace(seconds=statistics.median(run.seconds for run in runs))


def row(name: str, runs: Sequence[Run], starts: Sequence[Run], *, job: tuple[float, float] | None, num: int) -> str:
    """Return a contender's row. job: MP/s of the job, whole and without the start, None for its own row."""
    whole, start = median(runs), median(starts)
    spread = sorted(run.seconds for run in runs)
    rates = rates_of(runs, starts)
    ratios = ["-", "-"] if job is None else [f"{ours / theirs:.2f}" for ours, theirs in zip(job, rates, strict=True)]
    cells = [
        name,
        f"{whole.seconds:.1f} ({spread[0]:.1f} to {spread[-1]:.1f})",
        f"{start.seconds:.1f}",
        f"{num / whole.seconds:.1f}",
        f"{num / whole.megapixels * rates[1]:.1f}",
        *(f"{rate / NUM_PROCESSES:.2f}" for rate in rates),
        f"{whole.num_patches:,}",
        f"{whole.megapixels:.0f}",
        f"{whole.num_bytes / 1e6:.0f}",
        *ratios,
    ]
    return f"| {' | '.join(cells)} |"


def rates_of(runs: Sequence[Run], starts: Sequence[Run]) -> tuple[float, float]:
    """Return HR megapixels delivered per second: of the whole run, and of what comes after its start.

    The latter is NaN where so few files were read that the start took as long.
    """
    whole, start = median(runs), median(starts)
    seconds = whole.seconds - start.seconds
    return whole.megapixels / whole.seconds, (
        whole.megapixels - start.megapixels
    ) / seconds if seconds > 0 else math.nan


def main() -> None:
    """Print pairs.md."""
    parser = argparse.ArgumentParser(description="The pairs job against a Pillow loop and img2dataset.")
    parser.add_argument("--crops", type=int, default=2000, help="files; 10 at least")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--img2dataset", metavar="PYTHON", help="the interpreter of an environment that has it")
    parser.add_argument("--photographs", type=Path, default=PHOTOGRAPHS, help="folder of .jpg files")
    parser.add_argument("--job-flags", default="", help="further flags of make_pairs, in one string")
    arguments = parser.parse_args()
    contenders = [job_contender(arguments.job_flags.split()), Contender("bare Pillow loop", pillow_commands, SIDES)]
    if arguments.img2dataset:
        contenders += [img2dataset_contender(arguments.img2dataset, format) for format in ("webp", "png")]
    runs: dict[str, list[Run]] = {contender.name: [] for contender in contenders}
    starts: dict[str, list[Run]] = {contender.name: [] for contender in contenders}
    with tempfile.TemporaryDirectory(prefix="diffsr-bench-") as name:
        folder = Path(name)
        for part in ("all", "start"):
            (folder / part).mkdir()
        photographs = sorted(arguments.photographs.glob("*.jpg"))
        files = cut(photographs, folder / "all", num_crops=arguments.crops)
        few = [Path(shutil.copy(path, folder / "start")) for path in files[:START_FILES]]
        megabytes = sum(path.stat().st_size for path in files) / 1e6
        for number in range(arguments.rounds):
            for contender in contenders:
                starts[contender.name].append(timed(contender, few, folder))
                runs[contender.name].append(timed(contender, files, folder))
                for out in folder.glob("tmp*"):
                    shutil.rmtree(out)
                print(f"round {number + 1}: {contender.name}: {runs[contender.name][-1]}", file=sys.stderr, flush=True)
    typed = ["PYTHON" if word == arguments.img2dataset else word for word in sys.argv[1:]]
    from tests.benchmarks.steps import cpu_name  # here: it brings torch, which the bare loop must not wait for

    job = rates_of(runs[contenders[0].name], starts[contenders[0].name])
    rows = [
        row(c.name, runs[c.name], starts[c.name], job=None if c is contenders[0] else job, num=len(files))
        for c in contenders
    ]
    print(PAGE.format(
        command=shlex.join(["python", "-m", "tests.benchmarks.pairs", *typed]), head=f"| {' | '.join(HEAD)} |",
        rule="---|" * len(HEAD),
        date=datetime.date.today(), cpu=cpu_name(), cpus=os.cpu_count(), num=len(files), megabytes=round(megabytes),
        rounds=arguments.rounds, rows="\n".join(rows),
        img2dataset=IMG2DATASET if arguments.img2dataset else "img2dataset was left out: no `--img2dataset PYTHON`.",
    ))  # fmt: skip


if __name__ == "__main__":
    main()

"""The pairs or the upscale job over what is too large: peak memory of every process; exits 1 beyond the limit.

    python -m tests.soak.memory
    python -m tests.soak.memory --megapixels 20 --pngs 2000 --engines local
    python -m tests.soak.memory --job upscale

Pairs: three corpora, each with both engines: a TIFF of 300 megapixels in strips (not compressed, 900 MB), the same in
deflated tiles, and 200,000 PNGs of 32 px. Upscale: the two TIFFs to twice their size (1,200 megapixels) in a plain
loop, by a model folder whose network is an interpolation, so that each published pixel is known beforehand
(`projected`). All is made here, block by block, in a temporary folder (--folder: where; 3 GB, upscale 13 GB).
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from diffsr_core.family import ModelConfig
from diffsr_core.networks.interpolation import InterpolationConfig
from tests.jobs.tiny import model_folder
from tests.soak.large import write_large, write_pngs
from tests.soak.projected import Compared, compare
from tests.soak.watch import Ran, run_job

LIMIT_BYTES = {"pairs": 2 << 30, "upscale": 3 << 30}
NUM_WORKERS, SCALE = 2, 2
STUB = ModelConfig(encoder=InterpolationConfig(scale=SCALE))
BIG_TIFF = (b"II+\0", b"MM\0+")
TIFFS = {"TIFF in strips": False, "TIFF in deflated tiles": True}
LEAST_LR_PSNR, MOST_LEVELS = 50.0, 1
HEAD = {
    "pairs": "| corpus | MB | engine | s | done/skipped/dead | worker MiB | job MiB | within 2 GiB, none dead |\n"
    "|---|---|---|---|---|---|---|---|",
    "upscale": "| corpus | MB | engine | window px | s | output | worker MiB | job MiB | LR-PSNR dB "
    "| places compared, most levels off, samples that differ | within 3 GiB, as expected |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|",
}


def within(ran: Ran, job: str) -> bool:
    """Return whether every process stayed below the limit, and no input was lost on the way."""
    return ran.most_bytes <= LIMIT_BYTES[job] and not ran.summary["dead"]


def mebibytes(ran: Ran) -> str:
    """Return the cells of the workers' peaks and the job's own."""
    return f"{' '.join(f'{size / 2**20:.0f}' for size in ran.worker_bytes)} | {ran.job_bytes / 2**20:.0f}"


def pairs(folder: Path, what: str, arguments: argparse.Namespace) -> bool:
    """Run the pairs job over one corpus with each engine; print the rows, return whether the limits hold."""
    source = folder / what.replace(" ", "-")
    source.mkdir()
    if what in TIFFS:
        write_large(source / "a.tif", arguments.megapixels, tiled=TIFFS[what])
        flags = ["--scale", "4", "--patch", "256"]
    else:
        write_pngs(source, arguments.pngs)
        what, flags = f"{arguments.pngs:,} {what}", ["--scale", "2", "--patch", "16"]
    megabytes = sum(path.stat().st_size for path in source.rglob("*.*")) / 1e6
    good = True
    for engine in arguments.engines or ["local", "ray"]:
        output = folder / f"{source.name}-{engine}"
        ran = run_job("make_pairs", source, output, [*flags, *engine_flags(engine, arguments)], num_workers=NUM_WORKERS)
        counts = "/".join(str(ran.summary[name]) for name in ("done", "skipped", "dead"))
        verdict = "yes" if within(ran, "pairs") else "NO"
        print(
            f"| {what} | {megabytes:.0f} | {engine} | {ran.seconds:.0f} | {counts} | {mebibytes(ran)} | {verdict} |",
            flush=True,
        )
        good = good and within(ran, "pairs")
    return good


def upscale(folder: Path, what: str, arguments: argparse.Namespace) -> bool:
    """Upscale one TIFF with each engine and look at the result; print the rows, return whether all is as it must be."""
    source, model = folder / what.replace(" ", "-"), model_folder(folder / "model", STUB)
    source.mkdir()
    write_large(source / "a.tif", arguments.megapixels, tiled=TIFFS[what])
    megabytes, good = (source / "a.tif").stat().st_size / 1e6, True
    flags = ["--model", str(model), "--steps", "1", "--window", str(arguments.window), "--no-track"]
    for engine in arguments.engines or ["local"]:
        output = folder / f"{source.name}-{engine}"
        ran = run_job("upscale", source, output, [*flags, *engine_flags(engine, arguments)], num_workers=NUM_WORKERS)
        found = compare(source / "a.tif", output / "a.tif", scale=SCALE, window=arguments.window)
        sidecar = json.loads((output / "a.tif.json").read_text())
        fits = within(ran, "upscale") and is_expected(output / "a.tif", sidecar, found)
        made = f"{sidecar['metrics']['megapixels']:.0f} MP, {sidecar['output']['bytes'] / 1e6:.0f} MB"
        print(
            f"| {what} | {megabytes:.0f} | {engine} | {arguments.window} | {ran.seconds:.0f} | {made} "
            f"| {mebibytes(ran)} | {sidecar['metrics']['lr_psnr']:.1f} "
            f"| {found.windows}, {found.most_levels}, {100 * found.share:.3f} % | {'yes' if fits else 'NO'} |",
            flush=True,
        )
        good = good and fits
        shutil.rmtree(output)
    shutil.rmtree(source)
    return good


def is_expected(path: Path, sidecar: dict[str, dict[str, object]], found: Compared) -> bool:
    """Return whether a published file is whole, as faithful as law 4 wants, BigTIFF where it must be, and right."""
    size = path.stat().st_size
    with path.open("rb") as file:
        big = file.read(4) in BIG_TIFF
    faithful = float(str(sidecar["metrics"]["lr_psnr"])) >= LEAST_LR_PSNR and sidecar["quality"]["verdict"] == "pass"
    whole = size == sidecar["output"]["bytes"] and (big or size < 2**32)
    return faithful and whole and found.most_levels <= MOST_LEVELS


def engine_flags(engine: str, arguments: argparse.Namespace) -> list[str]:
    """Return the flags of an engine, and those of the person."""
    workers = [] if engine == "local" else ["--num-workers", str(NUM_WORKERS)]
    return ["--engine", engine, *workers, *arguments.job_flags.split()]


def main() -> int:
    """Print the table; return the exit code."""
    parser = argparse.ArgumentParser(description="Peak memory of a job over what is too large.")
    parser.add_argument("--job", default="pairs", choices=["pairs", "upscale"])
    parser.add_argument("--megapixels", type=float, default=300, help="of each TIFF, 4 to 3")
    parser.add_argument("--pngs", type=int, default=200_000)
    parser.add_argument("--corpora", nargs="+", choices=[*TIFFS, "small PNGs"], help="default: all of the job")
    parser.add_argument("--engines", nargs="+", choices=["local", "ray"], help="default: both, of upscale local")
    parser.add_argument("--window", type=int, default=512, help="of upscale, in LR px; the job's own default")
    parser.add_argument("--folder", type=Path, help="where the corpora are made, and removed; the system's default")
    parser.add_argument("--job-flags", default="", help="further flags of the job, in one string")
    arguments = parser.parse_args()
    run = {"pairs": pairs, "upscale": upscale}[arguments.job]
    print(HEAD[arguments.job], flush=True)
    good = True
    with tempfile.TemporaryDirectory(prefix="diffsr-soak-", dir=arguments.folder) as name:
        for what in arguments.corpora or [*TIFFS, *(["small PNGs"] if arguments.job == "pairs" else [])]:
            good = run(Path(name), what, arguments) and good
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())

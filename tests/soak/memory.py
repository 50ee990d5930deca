"""The pairs job over what is too large: peak memory of every process; prints a table, exits 1 beyond the limit.

    python -m tests.soak.memory
    python -m tests.soak.memory --megapixels 20 --pngs 2000 --engines local

Three corpora, each with both engines: a TIFF of 300 megapixels in strips (not compressed, 900 MB), the same in deflated
tiles, and 200,000 PNGs of 32 px. All are made here, block by block, in a temporary folder (--folder: where; 3 GB).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil

from tests import hostile
from tests.tiff import write_tiff

ROOT = Path(__file__).resolve().parents[2]
LIMIT_BYTES = 2 << 30
ROWS_PX, TILE_PX, PNG_PX, NUM_WORKERS = 64, 512, 32, 2
PNGS_A_FOLDER = 1000


class Ran(NamedTuple):
    """What a job did: its summary, the seconds, its peak in bytes, and those of its workers (its own, if local)."""

    summary: dict[str, object]
    seconds: float
    job_bytes: int
    worker_bytes: list[int]


def texture(side: int) -> np.ndarray:
    """Return uint8 (side, side, 3): soft patches with noise, so that it is neither flat nor quickly compressed."""
    rng = np.random.default_rng(5)
    soft = np.asarray(hostile.picture(5, side, side), np.int16)
    noisy: np.ndarray = np.clip(soft + rng.integers(-12, 13, soft.shape), 0, 255).astype(np.uint8)
    return noisy


def strips(height: int, width: int) -> Iterator[np.ndarray]:
    """Yield the rows of a large picture, ROWS_PX at a time, no two alike."""
    wide = np.tile(texture(1024), (1, -(-width // 1024) + 1, 1))
    for index, y in enumerate(range(0, height, ROWS_PX)):
        shift, row = 37 * index % 1024, (y // 1024 * 17 + y) % (1024 - ROWS_PX)
        yield np.ascontiguousarray(wide[row : row + min(ROWS_PX, height - y), shift : shift + width])


def tiles(height: int, width: int) -> Iterator[np.ndarray]:
    """Yield the tiles of a large picture, TILE_PX square."""
    base = texture(2 * TILE_PX)
    for index in range(-(-height // TILE_PX) * -(-width // TILE_PX)):
        y, x = 31 * index % TILE_PX, 67 * index % TILE_PX
        yield np.ascontiguousarray(base[y : y + TILE_PX, x : x + TILE_PX])


def write_pngs(folder: Path, num: int) -> None:
    """Write `num` small PNGs, all different, a thousand in a folder."""
    rng = np.random.default_rng(6)
    for index in range(num):
        place = folder / f"{index // PNGS_A_FOLDER:03d}"
        if index % PNGS_A_FOLDER == 0:
            place.mkdir(parents=True)
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        pixels = coarse.repeat(PNG_PX // 4, axis=0).repeat(PNG_PX // 4, axis=1)
        rows = b"".join(b"\0" + row.tobytes() for row in pixels)
        (place / f"{index:06d}.png").write_bytes(hostile.png_of(PNG_PX, PNG_PX, bits=8, colour=2, rows=rows))


def peak_bytes(pid: int) -> int:
    """Return the most memory that a living process has ever held (resident), 0 if it has gone."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


class Watch(threading.Thread):
    """Keeps the peak and the last title of every process below one, until that one has ended."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.root = psutil.Process(pid)
        self.peaks: dict[int, int] = {}
        self.titles: dict[int, str] = {}

    def run(self) -> None:
        """Sample ten times a second: the kernel keeps the peak, so that only the last moments can be missed."""
        with suppress(psutil.NoSuchProcess):
            while self.root.status() != psutil.STATUS_ZOMBIE:
                for process in [self.root, *self.root.children(recursive=True)]:
                    with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                        self.titles[process.pid] = (process.cmdline() or [""])[0]
                        self.peaks[process.pid] = max(self.peaks.get(process.pid, 0), peak_bytes(process.pid))
                time.sleep(0.1)


def run_job(source: Path, output: Path, flags: list[str]) -> Ran:
    """Run the pairs job and watch it. Raises RuntimeError where it fails."""
    command = [sys.executable, str(ROOT / "jobs/make_pairs.py"), "--source", str(source), "--output", str(output)]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{output.parent}/mlflow.db"}
    with (output.parent / "log.txt").open("w+") as log:
        started = time.monotonic()
        job = subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        watch = Watch(job.pid)
        watch.start()
        out, _ = job.communicate()
        seconds = time.monotonic() - started
        watch.join()
        log.seek(0)
        if job.returncode:
            raise RuntimeError(f"{' '.join([*command, *flags])}: exit code {job.returncode}\n{log.read()[-3000:]}")
    own = watch.peaks[job.pid]
    workers = [peak for pid, peak in watch.peaks.items() if watch.titles[pid].startswith("ray::")]
    return Ran(json.loads(out.splitlines()[-1]), seconds, own, sorted(workers, reverse=True)[:NUM_WORKERS] or [own])


def row(what: str, engine: str, ran: Ran, *, megabytes: float) -> str:
    """Return a row of the table; MiB of each process."""
    counts = "/".join(str(ran.summary[name]) for name in ("done", "skipped", "dead"))
    workers = " ".join(f"{size / 2**20:.0f}" for size in ran.worker_bytes)
    verdict = "yes" if within(ran) else "NO"
    return (
        f"| {what} | {megabytes:.0f} | {engine} | {ran.seconds:.0f} | {counts} | {workers} | "
        f"{ran.job_bytes / 2**20:.0f} | {verdict} |"
    )


def within(ran: Ran) -> bool:
    """Return whether every process stayed below the limit, and no input was lost on the way."""
    return max(ran.job_bytes, *ran.worker_bytes) <= LIMIT_BYTES and not ran.summary["dead"]


def main() -> int:
    """Print the table; return the exit code."""
    parser = argparse.ArgumentParser(description="Peak memory of the pairs job over what is too large.")
    parser.add_argument("--megapixels", type=int, default=300, help="of each TIFF, 4 to 3")
    parser.add_argument("--pngs", type=int, default=200_000)
    parser.add_argument("--engines", nargs="+", default=["local", "ray"], choices=["local", "ray"])
    parser.add_argument("--folder", type=Path, help="where the corpora are made, and removed; the system's default")
    parser.add_argument("--job-flags", default="", help="further flags of make_pairs, in one string")
    arguments = parser.parse_args()
    height = round((arguments.megapixels * 1e6 * 3 / 4) ** 0.5)
    width = round(arguments.megapixels * 1e6 / height)
    print("| corpus | MB | engine | s | done/skipped/dead | worker MiB | job MiB | within 2 GiB, none dead |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    good = True
    with tempfile.TemporaryDirectory(prefix="diffsr-soak-", dir=arguments.folder) as name:
        folder = Path(name)
        for what in ("TIFF in strips", "TIFF in deflated tiles", "small PNGs"):
            source = folder / what.replace(" ", "-")
            source.mkdir()
            flags = ["--scale", "2", "--patch", "16"] if what == "small PNGs" else ["--scale", "4", "--patch", "256"]
            if what == "small PNGs":
                write_pngs(source, arguments.pngs)
                what = f"{arguments.pngs:,} {what}"
            elif "tiles" in what:
                blocks = tiles(height, width)
                write_tiff(source / "a.tif", blocks, height=height, width=width, tile=TILE_PX, deflate=True)
            else:
                write_tiff(source / "a.tif", strips(height, width), height=height, width=width)
            megabytes = sum(path.stat().st_size for path in source.rglob("*.*")) / 1e6
            for engine in arguments.engines:
                workers = [] if engine == "local" else ["--num-workers", str(NUM_WORKERS)]
                output = folder / f"{source.name}-{engine}"
                ran = run_job(source, output, [*flags, "--engine", engine, *workers, *arguments.job_flags.split()])
                print(row(what, engine, ran, megabytes=megabytes), flush=True)
                good = good and within(ran)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())

"""Planning a night over a million objects of which a thousand are new; prints the page plan.md.

    python -m tests.benchmarks.plan > tests/benchmarks/plan.md

The listing is a Parquet list with etag and size, the ledger has a receipt of every other object in 200 segments, as
`Ledger.append` writes them. Each row is measured in a process of its own: wall time and peak resident memory of all
that a run does before its first unit, of compacting the ledger, and of whole nights in which nothing is new, at two
sizes, from which 10 million are extrapolated.
"""

import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.corpus import Corpus
from pipelines.lease import Lease
from pipelines.ledger import Ledger, Receipt, pack, save_plan
from pipelines.storage import digest_bytes, publish
from pipelines.work import Work, forecast, run
from tests.soak.watch import peak_bytes

NUM_OBJECTS, NUM_NEW, NUM_SEGMENTS = 1_000_000, 1_000, 200
NIGHT_SEGMENTS = 50  # as many as a ledger has on most nights: more than 64 are compacted
SMALLER, LARGER = 250_000, 10_000_000  # the second size that is measured, and the size that is extrapolated
LIMIT_S, LIMIT_MIB = 60, 1536  # of a night over NUM_OBJECTS in which nothing is new
RECIPE = digest_bytes(b"recipe")[:32]
BATCH = 50_000


def key_of(index: int) -> str:
    """Return the URI of an object: 60 bytes, in folders of a thousand."""
    return f"s3://archive-of-photographs/2026/{index // 1000:05d}/IMG_{index:09d}.jpg"


def write_list(path: Path, count: int) -> None:
    """Write the Parquet list: uri, etag, size."""
    schema = pa.schema([("uri", pa.string()), ("etag", pa.string()), ("size", pa.int64())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, count, BATCH):
            indices = range(start, min(start + BATCH, count))
            etags = [digest_bytes(str(index).encode())[:32] for index in indices]
            sizes = [200_000 + index * 7919 % 3_000_000 for index in indices]
            writer.write_table(pa.table([[key_of(index) for index in indices], etags, sizes], schema=schema))


def write_ledger(output: str, count: int, *, segments: int, but_each: int | None) -> None:
    """Append a receipt of every object, but each `but_each`-th if that is given, in so many segments."""
    ledger, step = Ledger(output), count // segments
    for number, start in enumerate(range(0, count, step)):
        receipts = [
            Receipt(
                key=key_of(index),
                etag=f"given:{digest_bytes(str(index).encode())[:32]}",
                size=200_000 + index * 7919 % 3_000_000,
                recipe=RECIPE,
                status="done",
                out_key=f"data/{index // 40:024x}.parquet",
                out_sha256=digest_bytes(str(index // 40).encode()),
                out_bytes=60_000_000,
                metrics={"pairs_train": 12.0, "dropped_flat": 1.0},
                started=1.79e9 + index,
                seconds=0.25,
                run_id=f"pairs-{number:08d}",
                unit_id=f"{index // 40:024x}",
                fence=number + 1,
            )
            for index in range(start, start + step)
            if but_each is None or index % but_each
        ]
        ledger.append(receipts, fence=number + 1, number=0)
    last = {"run_id": "last night", "fence": segments, "expires": 0.0, "host": "", "pid": 1}
    publish(f"{ledger.root}/fences/{segments:010d}", json.dumps(last).encode())


class NoWorker:
    """Stands for a model that a night with nothing to do must not load."""

    def __init__(self) -> None:
        raise AssertionError("a worker was built")

    def __call__(self, rows: list[dict[str, Any]], enter: object) -> NoReturn:
        raise AssertionError("a unit was begun")


def files_of(output: str) -> dict[str, int]:
    """Return all files below the output but the lease's, with the time of their last change."""
    paths = [Path(folder, name) for folder, _, names in os.walk(output) for name in names]
    return {
        str(path): path.stat().st_mtime_ns for path in paths if "fence" not in str(path) and "lease" not in str(path)
    }


def no_op(root: str) -> dict[str, float]:
    """Run a night in which nothing is new; return its seconds and counts. Raises where it writes anything."""
    work = Work(listing=Corpus(source=f"{root}/list.parquet").listing, output=f"{root}/out", recipe=RECIPE)
    before, started = files_of(work.output), time.perf_counter()
    with Lease(work.output, run_id="night") as lease:
        outcome = run(work, make=NoWorker, arguments={}, engine="local", num_workers=1, run_id="night", lease=lease,
                      label="night")  # fmt: skip
    seconds = time.perf_counter() - started
    if files_of(work.output) != before or outcome.inputs:
        raise AssertionError("a night with nothing new has written")
    return {"todo": outcome.inputs, "unchanged": outcome.unchanged, "total_s": seconds}


def measure(root: str, what: str) -> dict[str, float]:
    """Do one thing and return seconds by step, counts, and peak_mib of this process."""
    fence = NUM_SEGMENTS + 1
    work = Work(
        listing=Corpus(source=f"{root}/list.parquet").listing,
        output=f"{root}/empty" if what == "first" else f"{root}/out",
        recipe=RECIPE,
        sets=True,
    )
    result: dict[str, float] = {}
    started = time.perf_counter()
    if what == "no-op":
        result |= no_op(root)
    elif what == "compact":
        Ledger(work.output).compact(fence=fence)
        result["segments"] = len(Ledger(work.output).segments())
    elif what != "nothing":
        ahead = forecast(work)
        result |= {"forecast_s": time.perf_counter() - started, "todo": ahead.todo, "unchanged": ahead.unchanged}
        units = pack(ahead.rows, recipe=work.recipe, model=work.model, unit_bytes=work.unit_bytes)
        plan = save_plan(Ledger(f"{root}/plans"), units, recipe=work.recipe, model=work.model, fence=fence)
        result["units"] = plan.num_units
    result.setdefault("total_s", time.perf_counter() - started)
    return {**result, "peak_mib": peak_bytes(os.getpid()) / 2**20}


def measured(root: str, what: str) -> dict[str, float]:
    """Return what `measure` finds in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.plan", root, what]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def cells(found: dict[str, float]) -> str:
    """Return the cells of a row after its label."""
    counts = [f"{found[name]:,.0f}" if name in found else "" for name in ("todo", "units")]
    seconds = [f"{found[name]:.1f}" if name in found else "" for name in ("forecast_s", "total_s")]
    return f"{' | '.join([*counts, *seconds])} | {found['peak_mib']:,.0f}"


def extrapolated(small: dict[str, float], large: dict[str, float], name: str) -> float:
    """Return a number at LARGER objects, on the line through those at SMALLER and NUM_OBJECTS."""
    slope = (large[name] - small[name]) / (NUM_OBJECTS - SMALLER)
    return large[name] + slope * (LARGER - NUM_OBJECTS)


def measure_nights(count: int, *, segments: int) -> dict[str, float]:
    """Return what a night over so many ledgered objects takes, nothing of them new."""
    with tempfile.TemporaryDirectory(prefix="diffsr-plan-") as root:
        write_list(Path(root) / "list.parquet", count)
        write_ledger(f"{root}/out", count, segments=segments, but_each=None)
        return measured(root, "no-op")


def main() -> None:
    """Print plan.md; with two arguments, a root and what to measure, the JSON of one measurement."""
    if len(sys.argv) == 3:
        print(json.dumps(measure(sys.argv[1], sys.argv[2])))
        return
    rows = []
    with tempfile.TemporaryDirectory(prefix="diffsr-plan-") as root:
        write_list(Path(root) / "list.parquet", NUM_OBJECTS)
        but_each = NUM_OBJECTS // NUM_NEW
        write_ledger(f"{root}/out", NUM_OBJECTS, segments=NUM_SEGMENTS, but_each=but_each)
        cases = {
            "the imports alone": "nothing",
            "1,000 of 1,000,000 are new": "night",
            "the first night: no ledger, all are new": "first",
            "compaction of the ledger": "compact",
            "1,000 are new, after the compaction": "night",
        }
        rows += [f"| {label} | {cells(measured(root, what))} |" for label, what in cases.items()]
    small, large = (measure_nights(count, segments=NIGHT_SEGMENTS) for count in (SMALLER, NUM_OBJECTS))
    rows += [f"| a night, nothing new of {count:,} | {cells(found)} |"
             for count, found in ((SMALLER, small), (NUM_OBJECTS, large))]  # fmt: skip
    far = {name: extrapolated(small, large, name) for name in ("total_s", "peak_mib")}
    met = large["total_s"] < LIMIT_S and large["peak_mib"] < LIMIT_MIB
    print(f"""# Planning for a million objects

Printed by `python -m tests.benchmarks.plan` on {datetime.date.today()}, on two shared cores of an AMD EPYC.

A Parquet list of {NUM_OBJECTS:,} URIs with etag and size, and a ledger with a receipt of each but {NUM_NEW:,}, in
{NUM_SEGMENTS} segments on a local disk. Forecast: list, read the ledger, compare. In all: pack into units and save the
plan too. Peak: resident memory of the process. The last rows are whole nights, `work.run` under its lease, of a ledger
that knows every object, in {NIGHT_SEGMENTS} segments: no worker is built, and no file but the lease's changes.

| what | to do | units | forecast, s | in all, s | peak, MiB |
|---|---|---|---|---|---|
{chr(10).join(rows)}

The goal of a night with nothing new over {NUM_OBJECTS:,} is {LIMIT_S} s and {LIMIT_MIB:,} MiB:
{"met" if met else "MISSED"}. On the line through the two sizes, {LARGER:,} objects take {far["total_s"]:.0f} s and
{far["peak_mib"] / 1024:.1f} GiB (not measured); the time to list a bucket, 1,000 objects a request, comes on top.""")


if __name__ == "__main__":
    main()

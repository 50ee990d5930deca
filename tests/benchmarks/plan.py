"""Planning a night over a million objects of which a thousand are new; prints the page plan.md.

    python -m tests.benchmarks.plan > tests/benchmarks/plan.md

The listing is a Parquet list with etag and size, the ledger has a receipt of every other object in 200 segments, as
`Ledger.append` writes them. Each row is measured in a process of its own: wall time and peak resident memory of all
that a run does before its first unit and, last, of compacting the ledger.
"""

import datetime
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.corpus import Corpus
from pipelines.ledger import Ledger, Receipt, pack, save_plan
from pipelines.storage import digest_bytes
from pipelines.work import Work, forecast

NUM_OBJECTS, NUM_NEW, NUM_SEGMENTS = 1_000_000, 1_000, 200
RECIPE = digest_bytes(b"recipe")[:32]
BATCH = 50_000


def key_of(index: int) -> str:
    """Return the URI of an object: 60 bytes, in folders of a thousand."""
    return f"s3://archive-of-photographs/2026/{index // 1000:05d}/IMG_{index:09d}.jpg"


def write_list(path: Path) -> None:
    """Write the Parquet list: uri, etag, size."""
    schema = pa.schema([("uri", pa.string()), ("etag", pa.string()), ("size", pa.int64())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, NUM_OBJECTS, BATCH):
            indices = range(start, min(start + BATCH, NUM_OBJECTS))
            etags = [digest_bytes(str(index).encode())[:32] for index in indices]
            sizes = [200_000 + index * 7919 % 3_000_000 for index in indices]
            writer.write_table(pa.table([[key_of(index) for index in indices], etags, sizes], schema=schema))


def write_ledger(output: str) -> None:
    """Append a receipt of every object but each (NUM_OBJECTS / NUM_NEW)-th, in NUM_SEGMENTS segments."""
    ledger, step = Ledger(output), NUM_OBJECTS // NUM_SEGMENTS
    for number, start in enumerate(range(0, NUM_OBJECTS, step)):
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
            if index % (NUM_OBJECTS // NUM_NEW)
        ]
        ledger.append(receipts, fence=number + 1, number=0)


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
    if what == "compact":
        Ledger(work.output).compact(fence=fence)
        result["segments"] = len(Ledger(work.output).segments())
    elif what != "nothing":
        ahead = forecast(work)
        result |= {"forecast_s": time.perf_counter() - started, "todo": ahead.todo, "unchanged": ahead.unchanged}
        units = pack(ahead.rows, recipe=work.recipe, model=work.model, unit_bytes=work.unit_bytes)
        plan = save_plan(Ledger(f"{root}/plans"), units, recipe=work.recipe, model=work.model, fence=fence)
        result["units"] = plan.num_units
    result["total_s"] = time.perf_counter() - started
    return {**result, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def main() -> None:
    """Print plan.md; with two arguments, a root and what to measure, the JSON of one measurement."""
    if len(sys.argv) == 3:
        print(json.dumps(measure(sys.argv[1], sys.argv[2])))
        return
    rows = []
    with tempfile.TemporaryDirectory(prefix="diffsr-plan-") as root:
        write_list(Path(root) / "list.parquet")
        write_ledger(f"{root}/out")
        cases = {
            "the imports alone": "nothing",
            "1,000 of 1,000,000 are new": "night",
            "the first night: no ledger, all are new": "first",
            "compaction of the ledger": "compact",
            "1,000 are new, after the compaction": "night",
        }
        for label, what in cases.items():
            command = [sys.executable, "-m", "tests.benchmarks.plan", root, what]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            cells = [f"{found[name]:,.0f}" if name in found else "" for name in ("todo", "units")]
            seconds = [f"{found[name]:.1f}" if name in found else "" for name in ("forecast_s", "total_s")]
            rows.append(f"| {label} | {' | '.join([*cells, *seconds])} | {found['peak_mib']:,.0f} |")
    print(f"""# Planning for a million objects

Printed by `python -m tests.benchmarks.plan` on {datetime.date.today()}, on two shared cores of an AMD EPYC.

A Parquet list of {NUM_OBJECTS:,} URIs with etag and size, and a ledger with a receipt of each but {NUM_NEW:,}, in
{NUM_SEGMENTS} segments on a local disk. Forecast: list, read the ledger, compare. In all: pack into units and save the
plan too. Peak: resident memory of the process. The goal of the second row is 60 s and 1,536 MiB.

| what | to do | units | forecast, s | in all, s | peak, MiB |
|---|---|---|---|---|---|
{chr(10).join(rows)}""")


if __name__ == "__main__":
    main()

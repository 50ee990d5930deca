"""What a pairs run would take, judged from a few images of its work list: pairs, bytes, time and cost."""

import time
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.patches import PairsWorker

SAMPLE = 12


class Estimate(NamedTuple):
    """A sentence for a person, and the numbers in it."""

    text: str
    metrics: dict[str, float]


def estimate(rows: pa.Table, worker: PairsWorker, *, num_workers: int, cpu_hour_price: float) -> Estimate:
    """Return what all `rows` (PLAN_SCHEMA) would take, from SAMPLE of them that lie evenly in the list.

    Scaled by source bytes, as the work follows them better than the number of files. Reads the sample; writes nothing.
    """
    count = min(SAMPLE, rows.num_rows)
    places = [index * rows.num_rows // count for index in range(count)]
    sample = rows.take(places).to_pylist() if count else []
    pairs = out_bytes = read_bytes = dead = 0
    started = time.perf_counter()
    for row, made in worker.preview(sample):
        read_bytes += row["size"]
        if made is None:
            dead += 1
            continue
        pairs += len(made)
        out_bytes += sum(len(pair["hr"]) + len(pair["lr"]) for pair in made)
    seconds = time.perf_counter() - started
    share = (pc.sum(rows["size"]).as_py() or 0) / read_bytes if read_bytes else 0.0
    cpu_hours = seconds * share / 3600
    metrics = {
        "sampled": float(count),
        "pairs": round(pairs * share),
        "shard_bytes": round(out_bytes * share),
        "cpu_hours": cpu_hours,
        "hours": cpu_hours / num_workers,
        "cost": cpu_hours * cpu_hour_price,
    }
    if not count:
        return Estimate("nothing to do", metrics)
    text = (
        f"judged by {count} of them ({dead} cannot be read): about {metrics['pairs']:.0f} pairs, "
        f"{metrics['shard_bytes'] / 1e6:.1f} MB of shards, {_duration(cpu_hours)} of CPU, "
        f"{_duration(metrics['hours'])} with num_workers {num_workers}"
    )
    return Estimate(text + (f", cost {metrics['cost']:.2f}" if cpu_hour_price else ""), metrics)


def _duration(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min" if hours * 60 >= 1 else f"{hours * 3600:.1f} s"

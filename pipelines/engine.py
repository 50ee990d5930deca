"""Where units run: a plain loop, or actors of Ray Data. The worker is the same object; only its carrier differs."""

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Protocol, TypeVar

from pipelines.attempts import Attempts
from pipelines.ledger import Plan, Receipt

T = TypeVar("T")


Enter = Callable[[str], None]
MAX_DEATHS = 10  # of a Ray actor and of the task it dies in; `attempts` finds the asset that kills long before


class Worker(Protocol):
    """Does one unit: rows of the plan in, one receipt per row out. Built once per process from plain arguments.

    It calls `enter(key)` before each asset, which raises Refused for one that has killed its worker before.
    """

    def __call__(self, rows: list[dict[str, Any]], enter: Enter) -> list[Receipt]: ...


def say(text: str) -> None:
    """Tell the person what goes on; stdout belongs to the JSON summary."""
    print(text, file=sys.stderr, flush=True)


def progress(items: Iterable[T], *, total: int, label: str) -> Iterator[T]:
    """Yield the items while a line on stderr counts them: a live bar on a terminal, a line every 5 s in a log."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        yield from track(items, total=total, description=label, console=Console(stderr=True))
        return
    start = shown = time.monotonic()
    for count, item in enumerate(items, 1):
        yield item
        if time.monotonic() - shown > 5:
            shown = time.monotonic()
            say(f"{label}: {count} of {total}, {shown - start:.0f} s")


def check_engine(engine: str, num_workers: int) -> None:
    """Raise ValueError for workers that a plain loop would not have."""
    if engine == "local" and num_workers != 1:
        raise ValueError(f"num_workers ({num_workers}) must be 1 with engine local; use --engine ray")


@contextmanager
def cluster(*, num_cpus: int) -> Iterator[None]:
    """Connect to the cluster that RAY_ADDRESS names (a submitted job), else start a private Ray, for the body only.

    num_cpus: logical CPUs that the job needs, data workers included. A private Ray gets that many; a cluster that has
    fewer may be about to grow, so the wait is said, and Ray ends it after half an hour without progress.
    """
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.ERROR)
        available = int(ray.cluster_resources().get("CPU", 0))  # type: ignore[no-untyped-call]
        if available < num_cpus:
            say(f"the cluster has {available} of the {num_cpus} CPUs that this needs: it waits until the cluster grows")
    else:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            object_store_memory=256 * 2**20,
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    try:
        yield
    finally:
        ray.shutdown()


def do_unit(worker: Worker, plan: Plan, index: int) -> list[Receipt]:
    """Return the receipts of one unit, its attempts on record while it runs."""
    rows = plan.unit(index)
    attempts = Attempts(plan.root, rows[0]["unit_id"])
    receipts = worker(rows, attempts.enter)
    attempts.leave()
    return receipts


class UnitActor:
    """The Ray Data face of a worker: row {index} -> row {receipts as JSON}. Heavy bytes never pass through here."""

    def __init__(self, make: Callable[..., Worker], arguments: dict[str, Any], plan_uri: str) -> None:
        self.worker = make(**arguments)
        self.plan = Plan(plan_uri)

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        receipts = do_unit(self.worker, self.plan, int(row["index"]))
        return {"receipts": json.dumps([asdict(receipt) for receipt in receipts])}


def run_units(
    plan: Plan,
    indices: Sequence[int],
    *,
    make: Callable[..., Worker],
    arguments: dict[str, Any],
    engine: str,
    num_workers: int,
    use_gpu: bool = False,
) -> Iterator[list[Receipt]]:
    """Yield the receipts of each unit as it ends. make: a worker class; arguments: its plain keyword arguments."""
    check_engine(engine, num_workers)
    if engine == "local":
        worker = make(**arguments)
        for index in indices:
            yield do_unit(worker, plan, index)
        return
    rows = [{"index": index} for index in indices]
    fields = {"make": make, "arguments": arguments, "plan_uri": plan.uri}
    for row in map_actors(rows, UnitActor, fields, num_workers=num_workers, use_gpu=use_gpu):
        yield [Receipt(**receipt) for receipt in json.loads(row["receipts"])]


def map_actors(
    rows: list[dict[str, Any]], actor: type, arguments: dict[str, Any], *, num_workers: int, use_gpu: bool = False
) -> Iterator[dict[str, Any]]:
    """Yield the rows that a pool of Ray Data actors makes of `rows`, one block each, as they end.

    from_items with a block per row: read_parquet of a small plan gives one block, which would run on one actor only.
    """
    size = min(num_workers, len(rows))
    with cluster(num_cpus=size + 1):
        import ray

        with warnings.catch_warnings():
            # Ray deprecates its bag of actor options, and 2.60 has no other place yet to bound an actor's restarts.
            warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
            mapped = ray.data.from_items(rows, override_num_blocks=min(len(rows), 4096)).map(
                actor,
                fn_constructor_kwargs=arguments,
                compute=ray.data.ActorPoolStrategy(size=size),
                num_cpus=1,
                num_gpus=1 if use_gpu else None,
                max_restarts=MAX_DEATHS,
                max_task_retries=MAX_DEATHS,
            )
        yield from mapped.iter_rows()

"""Where units run: a plain loop, or actors of Ray Data. The worker is the same object; only its carrier differs."""

import json
import logging
import os
import sys
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from typing import Any, Protocol, TypeVar

from pipelines import storage
from pipelines.attempts import Attempts
from pipelines.ledger import Plan, Receipt
from pipelines.stopping import Stop, is_marked, keep_handler, marked

T = TypeVar("T")


MAX_DEATHS = 10  # of a Ray actor and of the task it dies in; `attempts` finds the asset that kills long before


class Enter(Protocol):
    """Called with the key of an asset before it is begun; raises Refused for one that has killed its worker before.

    careful: the unit has killed its process before; assets are then to be done one at a time, or the wrong one is
    blamed.
    """

    @property
    def careful(self) -> bool: ...

    def __call__(self, key: str) -> None: ...


class Worker(Protocol):
    """Does one unit: rows of the plan in, one receipt per row out. Built once per process from plain arguments."""

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

    put_back = keep_handler()
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
    put_back()  # Ray's handler of SIGTERM would end the driver before the units in flight are recorded
    try:
        yield
    finally:
        ray.shutdown()


def do_unit(worker: Worker, plan: Plan, index: int) -> tuple[list[Receipt], bool]:
    """Return the receipts of one unit, and whether it killed a process before; attempts are on record while it runs."""
    rows = plan.unit(index)
    attempts = Attempts(plan.root, rows[0]["unit_id"])
    receipts = worker(rows, attempts)
    attempts.leave()
    return receipts, attempts.careful


class UnitActor:
    """The Ray Data face of a worker: row {index} -> row {receipts as JSON}. Heavy bytes never pass through here.

    A unit that comes after the stop marker is not begun, and gives no receipts.
    """

    def __init__(self, make: Callable[..., Worker], arguments: dict[str, Any], plan_uri: str, marker: str) -> None:
        self.worker = make(**arguments)
        self.plan = Plan(plan_uri)
        self.marker, self.stopped = marker, False
        self.name, self.begun = uuid.uuid4().hex, 0

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        self.stopped = self.stopped or is_marked(self.marker)  # once seen it is asked for no more
        if self.stopped:
            return {"receipts": "[]", "actor": self.name, "begun": self.begun, "died": False}
        self.begun += 1
        receipts, died = do_unit(self.worker, self.plan, int(row["index"]))
        text = json.dumps([asdict(receipt) for receipt in receipts])
        return {"receipts": text, "actor": self.name, "begun": self.begun, "died": died}


def run_units(
    plan: Plan,
    indices: Sequence[int],
    *,
    make: Callable[..., Worker],
    arguments: dict[str, Any],
    engine: str,
    num_workers: int,
    use_gpu: bool = False,
    stop: Stop,
    marker: str,
) -> Iterator[list[Receipt]]:
    """Yield the receipts of each unit as it ends; when `stop` has a reason the units in flight are the last.

    make: a worker class; arguments: its plain keyword arguments; marker: URI of the object that tells actors to stop.
    """
    check_engine(engine, num_workers)
    if engine == "local":
        worker = make(**arguments)
        for index in indices:
            if stop.reason:
                return
            yield do_unit(worker, plan, index)[0]
        return
    rows = [{"index": index} for index in indices]
    fields = {"make": make, "arguments": arguments, "plan_uri": plan.uri, "marker": marker}
    # Thousands of units may follow the stop, and Ray takes 8 ms to pass each by. So the driver leaves when every actor
    # has said that it begins no more, and all that those have begun has come in. One that died is waited for in vain.
    ended: Counter[str] = Counter()
    stopped: dict[str, int] = {}
    mapped = map_actors(rows, UnitActor, fields, num_workers=num_workers, use_gpu=use_gpu)
    died = False
    with marked(stop, marker), closing(mapped):
        for row in mapped:
            died = died or row["died"]
            if receipts := json.loads(row["receipts"]):
                ended[row["actor"]] += 1
                yield [Receipt(**receipt) for receipt in receipts]
            else:
                stopped[row["actor"]] = row["begun"]
            if len(stopped) == min(num_workers, len(rows)) and all(ended[name] == stopped[name] for name in stopped):
                break
    if died:  # in the middle of a file, perhaps; no worker is left that could be at work on one
        storage.sweep(plan.root.rpartition("/")[0])


def map_actors(
    rows: list[dict[str, Any]], actor: type, arguments: dict[str, Any], *, num_workers: int, use_gpu: bool = False
) -> Generator[dict[str, Any], None, None]:
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

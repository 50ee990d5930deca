"""The flow that pairs and upscale share: list, compare with the ledger, pack, plan, run, receipts, commit."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import storage
from pipelines.corpus import read_source as read_source
from pipelines.engine import Worker, progress, run_units, say
from pipelines.lease import Lease
from pipelines.ledger import GONE, Ledger, Plan, Receipt, accounted, open_plans, pack, save_plan

FLUSH_S = 5.0
STATE = ("key", "etag", "recipe", "model", "status", "reason", "fence")  # what tells whether an asset is work


class BudgetExceeded(RuntimeError):
    """More assets became dead letters than the error budget allows; what was done is kept. counts: the run so far."""

    def __init__(self, message: str, counts: dict[str, int]) -> None:
        super().__init__(message)
        self.counts = counts


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is to be done. recipe is the fingerprint of all settings that decide the bytes, model the model's digest.

    listing returns what there is, LISTING_SCHEMA sorted by key. sets: the output holds a set per recipe, side by side:
    receipts and plans of other recipes are left alone and count for nothing here. Otherwise there is one result per
    key, and its latest receipt decides. max_gone_share: known sources that are listed no more get a receipt `gone`,
    unless they are more than this share: then the source is the wrong one, and nothing is done. None: they stay.
    """

    listing: Callable[[], pa.Table]
    output: str
    recipe: str
    model: str = ""
    unit_bytes: int = 64 * 2**20
    max_dead_share: float = 0.2
    retry_dead: bool = False
    limit: int | None = None
    sets: bool = False
    max_gone_share: float | None = None

    def latest(self) -> pa.Table:
        """Return columns STATE of the latest receipts that count for this work."""
        return Ledger(self.output).latest(STATE, recipe=self.recipe if self.sets else None)


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a run would do: assets listed, unchanged (the ledger has them), to do (new or changed, within the limit),
    and their bytes; rows is the work itself, keys are those of the listing, sorted."""

    listed: int
    unchanged: int
    todo: int
    todo_bytes: int
    rows: pa.Table
    keys: pa.ChunkedArray


@dataclass(kw_only=True)
class Outcome:
    """What a run did, counted over this run's assets; unchanged assets are those that the ledger already had."""

    inputs: int = 0
    done: int = 0
    skipped: int = 0
    dead: int = 0
    unchanged: int = 0
    resumed_units: int = 0


def forecast(work: Work, *, fence: int | None = None) -> Forecast:
    """List what there is and return what is not accounted for. Writes nothing.

    fence: of the run that asks; what it has already done itself does not count as unchanged.
    """
    listing = work.listing()
    found = accounted(listing, work.latest(), recipe=work.recipe, model=work.model, retry_dead=work.retry_dead)
    rows = listing.filter(pc.invert(found["known"]))
    if work.limit is not None:
        rows = rows.slice(0, work.limit)
    before = found["known"] if fence is None else pc.and_(found["known"], pc.not_equal(found["fence"], fence))
    return Forecast(
        listed=listing.num_rows,
        unchanged=_count(before),
        todo=rows.num_rows,
        todo_bytes=int(pc.sum(rows["size"]).as_py() or 0),
        rows=rows,
        keys=listing["key"],
    )


def run(
    work: Work,
    *,
    make: Callable[..., Worker],
    arguments: dict[str, Any],
    engine: str,
    num_workers: int,
    use_gpu: bool = False,
    run_id: str,
    lease: Lease,
    label: str,
) -> Outcome:
    """Do the work under the lease: first what an interrupted run left, then the difference. Raises BudgetExceeded."""
    ledger, outcome = Ledger(work.output), Outcome()
    writer = _Writer(ledger, lease, run_id)

    def execute(plan: Plan, indices: list[int]) -> None:
        if indices:
            batches = run_units(
                plan,
                indices,
                make=make,
                arguments=arguments,
                engine=engine,
                num_workers=num_workers,
                use_gpu=use_gpu,
            )
            planned = outcome.inputs + plan.num_assets(indices)
            _collect(progress(batches, total=len(indices), label=label), work, writer, outcome, planned=planned)

    for plan in open_plans(ledger):
        if (plan.recipe, plan.model) == (work.recipe, work.model):
            left = _units_left(plan, ledger)
            if work.limit is not None and plan.num_assets(left) > work.limit:
                say(f"{label}: an interrupted plan is larger than limit ({work.limit}) and is given up")
                storage.delete(plan.uri)
                continue
            if left and not _holds(plan, left, work.listing()):
                say(f"{label}: sources of an interrupted plan have changed since; the rest of it is planned anew")
                storage.delete(plan.uri)
                continue
            say(f"{label}: an interrupted plan is continued, {len(left)} of {plan.num_units} units are left")
            outcome.resumed_units += len(left)
            execute(plan, left)
        elif work.sets:  # of another set: continued when that is asked for again
            continue
        storage.delete(plan.uri)  # finished, or made for other settings: its assets are found again by the difference
    if work.limit is not None:
        work = replace(work, limit=max(0, work.limit - outcome.inputs))
    ahead = forecast(work, fence=lease.fence)
    outcome.unchanged = ahead.unchanged
    if work.max_gone_share is not None:
        writer.add(_gone(work, ahead.keys, work.max_gone_share))
        writer.flush()
    if ahead.todo:
        units = pack(ahead.rows, recipe=work.recipe, model=work.model, unit_bytes=work.unit_bytes)
        plan = save_plan(ledger, units, recipe=work.recipe, model=work.model, fence=lease.fence)
        say(f"{label}: {ahead.todo} new or changed of {ahead.listed} assets, in {plan.num_units} units")
        execute(plan, list(range(plan.num_units)))
        storage.delete(plan.uri)
    elif not ahead.listed:
        say(f"{label}: the source holds no object with the name of an image")
    elif work.limit is None:
        say(f"{label}: nothing to do, all {ahead.listed} assets are accounted for")
    _check_ledger(outcome, work, ahead.keys)
    lease.check()
    ledger.compact(fence=lease.fence)
    return outcome


def _count(flags: pa.ChunkedArray) -> int:
    return int(pc.sum(flags).as_py() or 0)


def _units_left(plan: Plan, ledger: Ledger) -> list[int]:
    """Return the units without a receipt since the plan was made."""
    rows = ledger.rows(["unit_id", "fence"])
    since = rows.filter(pc.greater_equal(rows["fence"], plan.fence))
    ended = set(pc.unique(since["unit_id"]).to_pylist())
    return [index for index, unit_id in enumerate(plan.unit_ids()) if unit_id not in ended]


def _holds(plan: Plan, indices: list[int], listing: pa.Table) -> bool:
    """Return whether every asset of these units is still listed as it was planned."""
    planned = pa.concat_tables([plan.file.read_row_group(index, columns=["key", "etag"]) for index in indices])
    place = pc.index_in(planned["key"], value_set=listing["key"])
    same = _count(pc.fill_null(pc.equal(listing["etag"].take(place), planned["etag"]), False))
    return same == int(planned.num_rows)


def _collect(
    batches: Iterator[list[Receipt]], work: Work, writer: "_Writer", outcome: Outcome, *, planned: int
) -> None:
    """Take the receipts of a plan. The budget is that of all planned assets, so the order they end in is no matter."""
    try:
        for receipts in batches:
            writer.add(receipts)
            for receipt in receipts:
                outcome.inputs += 1
                setattr(outcome, receipt.status, getattr(outcome, receipt.status) + 1)
            _check_budget(outcome.dead, planned, outcome, work)
    finally:
        writer.flush()


def _check_budget(dead: int, total: int, outcome: Outcome, work: Work) -> None:
    if dead > max(1, work.max_dead_share * total):  # one bad file never fails a job (law 1)
        raise BudgetExceeded(
            f"dead letters ({dead} of {total}) must stay within max_dead_share ({work.max_dead_share}); read their "
            "reasons in the ledger, mend the cause, then retry what failed",
            {"inputs": outcome.inputs, "done": outcome.done, "skipped": outcome.skipped, "dead": outcome.dead},
        )


def _gone(work: Work, listed: pa.ChunkedArray, max_share: float) -> list[Receipt]:
    """Return a receipt for each known source that is listed no more. Raises ValueError where they are too many."""
    latest = work.latest()
    known = latest.filter(pc.not_equal(latest["reason"], GONE))
    absent = known.filter(pc.invert(pc.is_in(known["key"], value_set=listed)))
    lost, had = (_count(pc.equal(table["status"], "done")) for table in (absent, known))
    # Dead letters may go: to take rotten files away is a remedy. That one source goes is allowed, that all go is not.
    if lost > max(1, max_share * had) or (lost == had > 0 and max_share < 1):
        raise ValueError(
            f"sources that are gone ({lost} of {had}) must be at most max_gone_share ({max_share}) of those that were "
            "done; correct --source, or allow it with --max-gone-share 1"
        )
    gone = absent.select(["key", "etag"]).to_pylist()
    fields: dict[str, Any] = {
        "size": 0,
        "recipe": work.recipe,
        "model": work.model,
        "status": "skipped",
        "stage": "list",
    }
    return [Receipt(**row, **fields, reason=GONE, message="it is listed no more") for row in gone]


def _check_ledger(outcome: Outcome, work: Work, listed: pa.ChunkedArray) -> None:
    """Judge all that the ledger holds of what is listed: a rerun does not wash a systematic failure away."""
    latest = work.latest()
    ours = latest.filter(pc.and_(pc.equal(latest["recipe"], work.recipe), pc.equal(latest["model"], work.model)))
    ours = ours.filter(pc.is_in(ours["key"], value_set=listed))
    _check_budget(_count(pc.equal(ours["status"], "dead")), ours.num_rows, outcome, work)


class _Writer:
    """Appends receipts in segments, at most one every FLUSH_S seconds, each under a checked lease."""

    def __init__(self, ledger: Ledger, lease: Lease, run_id: str) -> None:
        self.ledger, self.lease, self.run_id = ledger, lease, run_id
        self.buffer: list[Receipt] = []
        self.number = ledger.next_number(lease.fence)
        self.flushed = time.monotonic()

    def add(self, receipts: list[Receipt]) -> None:
        self.buffer += [replace(receipt, run_id=self.run_id, fence=self.lease.fence) for receipt in receipts]
        if time.monotonic() - self.flushed > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        if self.buffer:
            self.lease.check()
            self.ledger.append(self.buffer, fence=self.lease.fence, number=self.number)
            self.number += 1
            self.buffer = []
        self.flushed = time.monotonic()

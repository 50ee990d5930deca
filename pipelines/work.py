"""The flow that pairs and upscale share: list, compare with the ledger, pack, plan, run, receipts, commit."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import storage
from pipelines.accounting import WHY, accounted
from pipelines.corpus import read_source as read_source
from pipelines.engine import Worker, progress, run_units, say
from pipelines.lease import Lease
from pipelines.ledger import GONE, Ledger, Plan, Receipt, open_plans, pack, save_plan, units_left
from pipelines.selection import select
from pipelines.stopping import Stop

FLUSH_S = 5.0
# What tells whether an asset is work.
STATE = ("key", "etag", "recipe", "model", "status", "reason", "attempts", "fence")


class BudgetExceeded(RuntimeError):
    """More assets became dead letters than the error budget allows; what was done is kept.

    counts: the run so far; outcome: all that a Work's run counted, None of another job.
    """

    def __init__(self, message: str, counts: dict[str, int], outcome: "Outcome | None" = None) -> None:
        super().__init__(message)
        self.counts, self.outcome = counts, outcome


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is to be done. recipe is the fingerprint of all settings that decide the bytes, model the model's digest.

    listing returns what there is, LISTING_SCHEMA sorted by key. sets: the output holds a set per recipe, side by side:
    receipts and plans of other recipes are left alone and count for nothing here. Otherwise there is one result per
    key, and its latest receipt decides. max_gone_share: known sources that are listed no more get a receipt `gone`,
    unless they are more than this share: then the source is the wrong one, and nothing is done. None: they stay.
    retry_dead: dead letters are work again; only_failed: they and what was skipped are, and nothing else.
    include, exclude: shell patterns, as in `selection`; what they leave out is as if it were not listed, but not gone.
    """

    listing: Callable[[], pa.Table]
    output: str
    recipe: str
    model: str = ""
    unit_bytes: int = 64 * 2**20
    max_dead_share: float = 0.2
    retry_dead: bool = False
    only_failed: bool = False
    limit: int | None = None
    sets: bool = False
    max_gone_share: float | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def latest(self) -> pa.Table:
        """Return columns STATE of the latest receipts that count for this work."""
        return Ledger(self.output).latest(STATE, recipe=self.recipe if self.sets else None)


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a run would do: assets listed (and selected), unchanged (the ledger has them, its dead letters too), to do
    within the limit, and their bytes.

    counts, bytes: of all that is listed, by why it is work or none, one of WHY: `unchanged` is there without `failed`,
    the dead letters that stay dead. rows: the work itself, key, etag, size, attempts. keys: of what is listed, sorted;
    present: of what lies in the source, whether it is selected or not.
    """

    listed: int
    unchanged: int
    todo: int
    todo_bytes: int
    counts: dict[str, int]
    bytes: dict[str, int]
    rows: pa.Table
    keys: pa.ChunkedArray
    present: pa.ChunkedArray

    @property
    def reasons(self) -> str:
        """Such as "5 new, 2 changed, 90 unchanged": of all that is listed."""
        return ", ".join(f"{count:,} {why}" for why, count in self.counts.items() if count)


@dataclass(kw_only=True)
class Outcome:
    """What a run did, counted over this run's assets; unchanged assets are those that the ledger already had.

    stopped: why it ended before its work did (`Stop.reason`), "" if it did not; left: assets of its plans that it had
    not begun by then.
    """

    inputs: int = 0
    done: int = 0
    skipped: int = 0
    dead: int = 0
    unchanged: int = 0
    resumed_units: int = 0
    stopped: str = ""
    left: int = 0


def forecast(work: Work, *, fence: int | None = None) -> Forecast:
    """List what there is and return what is not accounted for. Writes nothing.

    fence: of the run that asks; what it has already done itself does not count as unchanged.
    """
    source = work.listing()
    listing = select(source, include=work.include, exclude=work.exclude)
    settings = {"recipe": work.recipe, "model": work.model}
    found = accounted(listing, work.latest(), **settings, retry_dead=work.retry_dead, fence=fence,
                      retry_skipped=work.only_failed)  # fmt: skip
    sums = pa.table({"why": found["why"], "size": listing["size"]}).group_by("why")
    by = {row["why"]: row for row in sums.aggregate([("size", "sum"), ("size", "count")]).to_pylist()}
    rows = listing.append_column("attempts", found["attempts"]).filter(pc.invert(found["known"]))
    if work.only_failed:
        rows = rows.filter(pc.equal(found.filter(pc.invert(found["known"]))["why"], "retried"))
    if work.limit is not None:
        rows = rows.slice(0, work.limit)
    before = found["known"] if fence is None else pc.and_(found["known"], pc.not_equal(found["fence"], fence))
    return Forecast(
        listed=listing.num_rows,
        unchanged=_count(before),
        todo=rows.num_rows,
        todo_bytes=int(pc.sum(rows["size"]).as_py() or 0),
        counts={why: by[why]["size_count"] if why in by else 0 for why in WHY},
        bytes={why: by[why]["size_sum"] if why in by else 0 for why in WHY},
        rows=rows,
        keys=listing["key"],
        present=source["key"],
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
    stop: Stop | None = None,
) -> Outcome:
    """Do the work under the lease: first what an interrupted run left, then the difference. Raises BudgetExceeded.

    When `stop` has a reason, also that of an exceeded budget, no further unit is begun; those in flight are finished
    and recorded, and what is left of the plan stays for the next run.
    """
    ledger, outcome, stop = Ledger(work.output), Outcome(), stop or Stop()
    writer = _Writer(ledger, lease, run_id)
    marker = storage.join(ledger.root, f"stop-{lease.fence:010d}")

    def execute(plan: Plan, indices: list[int]) -> int:
        """Return how many assets were not begun."""
        total, before = plan.num_assets(indices), outcome.inputs
        if indices and not stop.reason:
            batches = run_units(
                plan,
                indices,
                make=make,
                arguments=arguments,
                engine=engine,
                num_workers=num_workers,
                use_gpu=use_gpu,
                stop=stop,
                marker=marker,
            )
            shown = progress(batches, total=len(indices), label=label)
            _collect(shown, work, writer, outcome, planned=before + total, stop=stop)
        left = total - (outcome.inputs - before)
        outcome.left += left
        return left

    for plan in open_plans(ledger):
        if (plan.recipe, plan.model) == (work.recipe, work.model):
            left = units_left(plan, ledger)
            if work.limit is not None and plan.num_assets(left) > work.limit:
                say(f"{label}: an interrupted plan is larger than limit ({work.limit}) and is given up")
                storage.delete(plan.uri)
                continue
            if left and not _holds(plan, left, work):
                say(f"{label}: sources of an interrupted plan have changed since; the rest of it is planned anew")
                storage.delete(plan.uri)
                continue
            say(f"{label}: an interrupted plan is continued, {len(left)} of {plan.num_units} units are left")
            outcome.resumed_units += len(left)
            if execute(plan, left):
                continue
        elif work.sets:  # of another set: continued when that is asked for again
            continue
        storage.delete(plan.uri)  # finished, or made for other settings: its assets are found again by the difference
    if stop.reason:
        return _stopped(outcome, stop, label)
    if work.limit is not None:
        work = replace(work, limit=max(0, work.limit - outcome.inputs))
    ahead = forecast(work, fence=lease.fence)
    outcome.unchanged = ahead.unchanged
    if work.max_gone_share is not None:
        writer.add(_gone(work, ahead.present, work.max_gone_share))
        writer.flush()
    if ahead.todo:
        units = pack(ahead.rows, recipe=work.recipe, model=work.model, unit_bytes=work.unit_bytes)
        plan = save_plan(ledger, units, recipe=work.recipe, model=work.model, fence=lease.fence)
        say(f"{label}: {ahead.todo} of {ahead.listed} assets in {plan.num_units} units; {ahead.reasons}")
        if not execute(plan, list(range(plan.num_units))):
            storage.delete(plan.uri)
    elif not ahead.listed:
        say(f"{label}: the source holds no object with the name of an image")
    elif work.only_failed:
        say(f"{label}: nothing to do, no dead letter or skipped asset is of these settings and this model")
    elif work.limit is None:
        say(f"{label}: nothing to do, all {ahead.listed} assets are accounted for")
    _check_ledger(outcome, work, ahead.keys)
    lease.check()
    if outcome.left:  # who asked for the end waits for it: the next run compacts
        return _stopped(outcome, stop, label)
    ledger.compact(fence=lease.fence)
    return outcome


def _stopped(outcome: Outcome, stop: Stop, label: str) -> Outcome:
    outcome.stopped = stop.reason
    say(f"{label}: ended early ({stop.reason}); {outcome.left} assets of the plan are left for the next run")
    return outcome


def _count(flags: pa.ChunkedArray) -> int:
    return int(pc.sum(flags).as_py() or 0)


def _holds(plan: Plan, indices: list[int], work: Work) -> bool:
    """Return whether every asset of these units is still listed, and selected, as it was planned."""
    listing = select(work.listing(), include=work.include, exclude=work.exclude)
    planned = pa.concat_tables([plan.file.read_row_group(index, columns=["key", "etag"]) for index in indices])
    place = pc.index_in(planned["key"], value_set=listing["key"])
    same = _count(pc.fill_null(pc.equal(listing["etag"].take(place), planned["etag"]), False))
    return same == int(planned.num_rows)


def _collect(
    batches: Iterator[list[Receipt]], work: Work, writer: "_Writer", outcome: Outcome, *, planned: int, stop: Stop
) -> None:
    """Take the receipts of a plan. The budget is that of all planned assets, so the order they end in is no matter."""
    try:
        for receipts in batches:
            writer.add(receipts)
            for receipt in receipts:
                outcome.inputs += 1
                setattr(outcome, receipt.status, getattr(outcome, receipt.status) + 1)
            if _is_over(outcome.dead, planned, work):
                stop.ask("error_budget")
    finally:
        writer.flush()
    if _is_over(outcome.dead, planned, work):
        outcome.stopped, outcome.left = stop.reason, planned - outcome.inputs
    _check_budget(outcome.dead, planned, outcome, work)


def _is_over(dead: int, total: int, work: Work) -> bool:
    return dead > max(1, work.max_dead_share * total)  # one bad file never fails a job (law 1)


def _check_budget(dead: int, total: int, outcome: Outcome, work: Work) -> None:
    if _is_over(dead, total, work):
        raise BudgetExceeded(
            f"dead letters ({dead} of {total}) must stay within max_dead_share ({work.max_dead_share}); read their "
            "reasons in the ledger, mend the cause, then retry what failed",
            {"inputs": outcome.inputs, "done": outcome.done, "skipped": outcome.skipped, "dead": outcome.dead},
            outcome,
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

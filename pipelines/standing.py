"""Where an upscaled output stands: what the ledger counts, the last runs, who is at work, and what failed and why."""

import time
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.accounting import retryable
from pipelines.engine import say
from pipelines.lease import Lease
from pipelines.ledger import Ledger, open_plans, units_left
from pipelines.runs import Summary

EXAMPLES, RUNS = 3, 5  # dead letters named per reason; runs that are told
_COLUMNS = ("key", "status", "stage", "reason", "message", "attempts")


def status(output: str, *, limit: int | None = None) -> Summary:
    """Return the counts of the latest receipts; say them by reason, with at most `limit` examples of each (3).

    metrics: `<status>_<reason>` counts, retryable (dead letters that the next run tries again), plans, units,
    units_left of the plans that are not committed.
    """
    ledger = Ledger(output)
    latest = ledger.latest(_COLUMNS)
    counts = {name: _count(pc.equal(latest["status"], name)) for name in ("done", "skipped", "dead")}
    metrics: dict[str, float] = {}
    for group in _groups(latest):
        reason = group["reason"] or ("pass" if group["status"] == "done" else "none")
        metrics[f"{group['status']}_{reason}"] = metrics.get(f"{group['status']}_{reason}", 0.0) + group["key_count"]
        if group["status"] == "done":
            say(f"done  {reason}: {group['key_count']}")
        else:
            _say_group(group, latest, EXAMPLES if limit is None else limit)
    metrics["retryable"] = float(_count(retryable(latest)))
    say(f"status: {counts}; {metrics['retryable']:.0f} dead letters are tried again by the next run")
    _say_runs(ledger)
    plans = open_plans(ledger)
    left = [len(units_left(plan, ledger)) for plan in plans]
    metrics |= {"plans": float(len(plans)), "units": float(sum(plan.num_units for plan in plans))}
    metrics["units_left"] = float(sum(left))
    for plan, number in zip(plans, left, strict=True):
        say(f"a plan of fence {plan.fence}: {plan.num_units - number} of {plan.num_units} units are done")
    holder = Lease(output, run_id="status").holder()
    say(f"status: run {holder['run_id']} on {holder['host']} is at work" if holder else "status: no run is at work")
    return Summary(job="upscale status", run_id="none", status="done", inputs=latest.num_rows, done=counts["done"],
                   skipped=counts["skipped"], dead=counts["dead"], metrics=metrics)  # fmt: skip


def _count(flags: pa.ChunkedArray) -> int:
    return int(pc.sum(flags).as_py() or 0)


def _groups(latest: pa.Table) -> list[dict[str, Any]]:
    """Return status, stage, reason and key_count, the most frequent first."""
    grouped = latest.group_by(["status", "stage", "reason"]).aggregate([("key", "count")])
    rows: list[dict[str, Any]] = grouped.to_pylist()
    return sorted(rows, key=lambda row: (row["status"], -row["key_count"], row["stage"], row["reason"]))


def _say_group(group: dict[str, Any], latest: pa.Table, limit: int) -> None:
    say(f"{group['status']}  {group['stage']}/{group['reason']}: {group['key_count']}")
    if group["status"] == "dead":
        same = [pc.equal(latest[name], group[name]) for name in ("status", "stage", "reason")]
        rows = latest.filter(pc.and_(same[0], pc.and_(same[1], same[2]))).slice(0, limit)
        for row in rows.to_pylist():
            say(f"      {row['key']!r} (try {row['attempts']}): {row['message']}")


def _say_runs(ledger: Ledger) -> None:
    """Say the last runs that left receipts; those that a compaction replaced are no more told."""
    rows = ledger.rows(["run_id", "status", "started", "fence"])
    begun = rows.filter(pc.greater(rows["started"], 0.0)).group_by("run_id").aggregate([("started", "min")])
    when = dict(zip(begun["run_id"].to_pylist(), begun["started_min"].to_pylist(), strict=True))
    counts = rows.group_by(["run_id", "fence", "status"]).aggregate([("status", "count")]).to_pylist()
    runs: dict[tuple[int, str], dict[str, int]] = {}
    for row in counts:
        runs.setdefault((row["fence"], row["run_id"]), {})[row["status"]] = row["status_count"]
    for (_, run_id), found in sorted(runs.items())[-RUNS:]:
        at = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(when[run_id])) if run_id in when else "no time"
        say(f"run {run_id} ({at}): " + ", ".join(f"{found[name]} {name}" for name in sorted(found)))

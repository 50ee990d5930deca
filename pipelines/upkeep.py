"""The verbs that look after an upscaled output: status, verify, gc. They need the ledger, no source and no model."""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import storage
from pipelines.assets import read_sidecar
from pipelines.config import check
from pipelines.engine import say
from pipelines.lease import Lease
from pipelines.ledger import OUTPUT_LOST, Ledger, Receipt
from pipelines.runs import Summary, new_run_id


def status(output: str) -> Summary:
    """Return the counts of the latest receipts; say each asset that is not done, and who is at work."""
    table = Ledger(output).latest(["key", "status", "stage", "reason", "message"])
    for row in table.filter(pc.not_equal(table["status"], "done")).to_pylist():
        say(f"{row['status']}  {row['key']!r}  {row['stage']}/{row['reason']}: {row['message']}")
    holder = Lease(output, run_id="status").holder()
    found = {item["values"]: item["counts"] for item in pc.value_counts(table["status"]).to_pylist()}
    counts = {name: found.get(name, 0) for name in ("done", "skipped", "dead")}
    say(f"status: {counts}; " + (f"run {holder['run_id']} is at work" if holder else "no run is at work"))
    return Summary(job="upscale status", run_id="none", status="done", inputs=table.num_rows, **counts)


def verify(output: str, *, dry_run: bool) -> Summary:
    """Hash every output that the ledger claims; what is lost becomes work for the next run, and the exit code 1.

    Lost is an output that is missing or altered, or whose sidecar does not name it. dry_run: record nothing.
    """
    run_id = new_run_id("verify")
    with Lease(output, run_id=run_id) as lease:
        ledger = Ledger(output)
        rows = [row for row in ledger.latest().to_pylist() if row["status"] == "done"]
        lost = []
        for row in rows:
            if flaw := _flaw(output, row):
                fields = {name: row[name] for name in Receipt.__dataclass_fields__}
                fields |= {"status": "dead", "stage": "verify", "reason": OUTPUT_LOST, "message": flaw}
                fields |= {"metrics": dict(row["metrics"]), "run_id": run_id, "fence": lease.fence}
                lost.append(Receipt(**fields))
                say(f"verify: lost: {flaw}")
        if lost and not dry_run:
            lease.check()
            ledger.append(lost, fence=lease.fence, number=0)
    say(f"verify: {len(rows) - len(lost)} of {len(rows)} outputs are as recorded, {len(lost)} are lost")
    if lost:
        say("verify: " + ("nothing was recorded (dry run)" if dry_run else "run again to redo what is lost"))
    return Summary(job="upscale verify", run_id=run_id, status="done", inputs=len(rows), done=len(rows) - len(lost),
                   dead=len(lost), exit_code=1 if lost else 0)  # fmt: skip


def _flaw(output: str, row: dict[str, Any]) -> str:
    """Return what is wrong with the output of a receipt, "" for nothing."""
    uri, key, recorded = storage.join(output, row["out_key"]), row["out_key"], row["out_sha256"]
    try:
        found = storage.digest_bytes(storage.read_bytes(uri))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return f"{key!r} is missing"
    if found != recorded:
        return f"{key!r} is {found}, not {recorded}"
    sidecar = read_sidecar(uri)
    if sidecar is None:
        return f"the sidecar of {key!r} is missing or damaged"
    return "" if sidecar.out_sha256 == recorded else f"the sidecar of {key!r} names {sidecar.out_sha256}"


def gc(output: str, *, delete: bool) -> Summary:
    """List, or delete, what this output's receipts once named and no current receipt does. Nothing else is touched.

    Raises ValueError for an output without receipts.
    """
    rule = "must have a ledger with receipts, which tell what is ours"
    check(Ledger(output).rows(["key"]).num_rows > 0, "output", output, rule, "correct --output")
    run_id = new_run_id("gc")
    with Lease(output, run_id=run_id):
        ledger = Ledger(output)
        latest = ledger.latest(["status", "out_key"])
        named = _objects(ledger.rows(["out_key"]))
        current = _objects(latest.filter(pc.equal(latest["status"], "done")))
        found = [item.key for item in storage.list_objects(output)]
        orphans = sorted((named - current).intersection(found))
        for key in sorted(set(found) - named):
            say(f"gc: {key!r} is not ours, left alone")
        for key in orphans:
            say(f"gc: {'deletes' if delete else 'would delete'} {key!r}")
            if delete:
                storage.delete(storage.join(output, key))
    return Summary(job="upscale gc", run_id=run_id, status="done", inputs=len(orphans),
                   done=len(orphans) if delete else 0)  # fmt: skip


def _objects(receipts: pa.Table) -> set[str]:
    """Return the keys of the results that receipts name, and of their sidecars."""
    keys = set(pc.unique(receipts["out_key"]).to_pylist()) - {""}
    return keys | {f"{key}.json" for key in keys}

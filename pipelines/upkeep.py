"""The verbs that look after an upscaled output: status, verify, gc. They need the ledger, no source and no model."""

from typing import Any

from pipelines import storage
from pipelines.assets import read_sidecar
from pipelines.config import check
from pipelines.engine import say
from pipelines.lease import Lease
from pipelines.ledger import OUTPUT_LOST, Ledger, Receipt
from pipelines.runs import Summary, new_run_id


def status(output: str) -> Summary:
    """Return the counts of the latest receipts; say each asset that is not done, and who is at work."""
    rows = Ledger(output).latest().to_pylist()
    for row in rows:
        if row["status"] != "done":
            say(f"{row['status']}  {row['key']!r}  {row['stage']}/{row['reason']}: {row['message']}")
    holder = Lease(output, run_id="status").holder()
    counts = {name: sum(row["status"] == name for row in rows) for name in ("done", "skipped", "dead")}
    say(f"status: {counts}; " + (f"run {holder['run_id']} is at work" if holder else "no run is at work"))
    return Summary(job="upscale status", run_id="none", status="done", inputs=len(rows), **counts)


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
    check(Ledger(output).rows().num_rows > 0, "output", output, "must have a ledger with receipts, which tell what is "
          "ours", "correct --output")  # fmt: skip
    run_id = new_run_id("gc")
    with Lease(output, run_id=run_id):
        ledger = Ledger(output)
        named = _objects(ledger.rows().to_pylist())
        current = _objects([row for row in ledger.latest().to_pylist() if row["status"] == "done"])
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


def _objects(rows: list[dict[str, Any]]) -> set[str]:
    """Return the keys of the results that receipts name, and of their sidecars."""
    keys = {row["out_key"] for row in rows if row["out_key"]}
    return keys | {f"{key}.json" for key in keys}

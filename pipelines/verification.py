"""Are the results of an output what the ledger says? What is lost becomes work, what it does not know is adopted."""

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from fsspec.implementations.local import LocalFileSystem

from pipelines import storage
from pipelines.config import check
from pipelines.engine import say
from pipelines.findings import Findings, Repairs
from pipelines.inventory import each, has_maps, list_sizes, proven, sha256_of
from pipelines.lease import Lease
from pipelines.ledger import OUTPUT_LOST, Ledger, Receipt
from pipelines.runs import Summary, new_run_id
from pipelines.sidecars import Sidecar, read_sidecar

BATCH = 10_000  # rows that are Python objects at a time
_KEPT = ("key", "etag", "size", "recipe", "model", "out_key", "out_sha256", "out_bytes", "attempts")


def verify(output: str, *, dry_run: bool, quick: bool = False) -> Summary:
    """Compare every output that the ledger claims with what is there, and mend the ledger; exit code 1 for losses.

    Lost is an output that is missing or altered, or whose sidecar or uncertainty map is not the one it came with: it
    becomes work for the next run. An output that no receipt knows, whose sidecar is ours and whose hash fits, is
    adopted: a ledger that was lost is made again from what is there. Heads come from one listing; quick: no more than
    those are looked at, so nothing is hashed and nothing adopted. dry_run: record nothing.

    metrics: adopted, unreadable (the store did not give them now: neither recorded as lost nor as fine), bytes.
    """
    filesystem, root = storage.open_filesystem(output)
    there = not isinstance(filesystem, LocalFileSystem) or os.path.isdir(root)
    check(there, "output", output, "must be a folder that exists", "correct --output")
    run_id = new_run_id("verify")
    with Lease(output, run_id=run_id) as lease:
        ledger = Ledger(output)
        present, latest = list_sizes(output), ledger.latest([*_KEPT, "status"])
        rows = latest.filter(pc.equal(latest["status"], "done"))
        writer, told = Repairs(ledger, lease, dry_run=dry_run), Findings("verify")
        lost = unreadable = 0
        for row, verdict, flaw in _flaws(output, rows, present, quick=quick):
            told(verdict, flaw)
            lost, unreadable = lost + (verdict == "lost"), unreadable + (verdict == "unreadable")
            if verdict == "lost":
                fields = {name: row[name] for name in _KEPT}
                writer.add(Receipt(**fields, status="dead", stage="verify", reason=OUTPUT_LOST, message=flaw))
        adopted = 0
        for sidecar in [] if quick else _adoptable(output, ledger, latest, present):
            told("adopted", f"{sidecar.out_key!r}, which no receipt knew")
            adopted += 1
            writer.add(_adoption(sidecar))
        writer.flush()
        told.end()
    num_bytes = float(pc.sum(rows["out_bytes"]).as_py() or 0)
    fine = rows.num_rows - lost - unreadable
    say(f"verify: {fine} of {rows.num_rows} outputs are as recorded, {lost} are lost, {adopted} adopted")
    if lost or adopted:
        say("verify: " + ("nothing was recorded (dry run)" if dry_run else "run again to redo what is lost"))
    return Summary(job="upscale verify", run_id=run_id, status="done", inputs=rows.num_rows, done=fine, dead=lost,
                   metrics={"adopted": float(adopted), "unreadable": float(unreadable), "bytes": num_bytes},
                   exit_code=1 if lost or unreadable else 0)  # fmt: skip


def _flaws(output: str, rows: pa.Table, present: pa.Table, *, quick: bool) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Yield (receipt, "lost" or "unreadable", what is wrong) of each result that is not as recorded."""
    place = pc.index_in(rows["out_key"], value_set=present["key"])
    rows = rows.append_column("found", present["size"].take(place))
    has = pc.is_in(pc.binary_join_element_wise(rows["out_key"], ".json", ""), value_set=present["key"])
    rows = rows.append_column("has_sidecar", has)
    if quick:
        rows = rows.filter(pc.invert(pc.and_(pc.fill_null(pc.equal(rows["found"], rows["out_bytes"]), False), has)))
    for start in range(0, rows.num_rows, BATCH):
        batch = rows.slice(start, BATCH).to_pylist()
        for row, (verdict, flaw) in zip(batch, each(partial(_flaw, output), batch), strict=True):
            if verdict:
                yield row, verdict, flaw


def _flaw(output: str, row: dict[str, Any]) -> tuple[str, str]:
    key, recorded = row["out_key"], row["out_sha256"]
    if row["found"] is None:
        return "lost", f"{key!r} is missing"
    if row["found"] != row["out_bytes"]:
        return "lost", f"{key!r} has {row['found']} bytes, not {row['out_bytes']}"
    if not row["has_sidecar"]:
        return "lost", f"the sidecar of {key!r} is missing or damaged"
    uri = storage.join(output, key)
    try:
        if (found := sha256_of(uri)) != recorded:
            return "lost", f"{key!r} is {found}, not {recorded}"
        sidecar = read_sidecar(uri)
        if sidecar is None:
            return "lost", f"the sidecar of {key!r} is missing or damaged"
        if sidecar.out_sha256 != recorded:
            return "lost", f"the sidecar of {key!r} names {sidecar.out_sha256}"
        return ("", "") if has_maps(output, sidecar) else ("lost", f"the uncertainty map of {key!r} is not as recorded")
    except OSError as error:  # a store that is away says nothing about the result
        return "unreadable", f"{key!r} cannot be read now: {error}"


def _adoptable(output: str, ledger: Ledger, latest: pa.Table, present: pa.Table) -> Iterator[Sidecar]:
    """Yield the sidecars of results that no receipt names and whose source has no better one: none, or that of a
    failure with the same content."""
    sidecars = present["key"].filter(pc.ends_with(present["key"], ".json"))
    results = pc.utf8_slice_codeunits(sidecars, 0, -5)
    named = ledger.rows(["out_key"])["out_key"]
    unknown = results.filter(
        pc.and_(pc.is_in(results, value_set=present["key"]), pc.invert(pc.is_in(results, value_set=named)))
    )
    for start in range(0, len(unknown), BATCH):
        found_here = each(partial(proven, output), unknown.slice(start, BATCH).to_pylist())
        found = [sidecar for sidecar in found_here if sidecar is not None]
        place = pc.index_in(pa.array([sidecar.source_key for sidecar in found], pa.string()), value_set=latest["key"])
        for sidecar, index in zip(found, place.to_pylist(), strict=True):
            dead = index is not None and latest["status"][index].as_py() == "dead"
            if index is None or (dead and latest["etag"][index].as_py() == sidecar.etag):
                yield sidecar


def _adoption(sidecar: Sidecar) -> Receipt:
    return Receipt(key=sidecar.source_key, etag=sidecar.etag, size=sidecar.size, recipe=sidecar.fingerprint,
                   model=sidecar.model, **sidecar.outcome())  # fmt: skip

"""The verbs that look after an upscaled output: status, verify, gc. They need the ledger, no source and no model."""

from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import storage
from pipelines.config import check
from pipelines.engine import say
from pipelines.findings import SHOWN, Findings, Repairs
from pipelines.inventory import each, list_leftovers, list_sizes, proven, sidecar_of
from pipelines.lease import Lease
from pipelines.ledger import GONE, Ledger, Receipt, open_plans
from pipelines.runs import Summary, new_run_id
from pipelines.sidecars import UNCERTAINTY
from pipelines.standing import status as status
from pipelines.verification import verify as verify

CLAIM = ("key", "etag", "size", "recipe", "model", "status", "reason", "out_key")


def gc(output: str, *, delete: bool, source_keys: pa.ChunkedArray | None = None) -> Summary:
    """List, or delete, what is of no use: only what our receipts name or our sidecars prove to be ours.

    Superseded: named by an earlier receipt, and replaced by a later result. Gone: of a source that is not among
    source_keys (all of them, None: not asked); on delete it gets a receipt of that. Orphans: with a valid sidecar,
    named by no receipt. Temporary: half-written files, trails and markers of dead runs.

    Raises ValueError for an output without receipts, where all sources are gone, and for more orphans than results:
    a ledger that was lost is mended by verify. metrics: the counts of each kind, and their bytes.
    """
    rule = "must have a ledger with receipts, which tell what is ours"
    check(Ledger(output).rows(["key"]).num_rows > 0, "output", output, rule, "correct --output")
    run_id = new_run_id("gc")
    with Lease(output, run_id=run_id) as lease:
        ledger, present = Ledger(output), list_sizes(output)
        latest = ledger.latest(CLAIM)
        gone = _gone(latest, source_keys)
        kept = pa.concat_tables([latest.filter(pc.equal(latest["status"], "done")), _only_results(ledger, latest)])
        kept = kept.filter(pc.invert(_in(kept["key"], gone["key"])))
        loose = present.filter(pc.invert(_in(present["key"], _objects(kept["out_key"], UNCERTAINTY))))["key"]
        found = _superseded(output, loose, ledger.rows(["out_key"])["out_key"])
        kinds = dict.fromkeys(found, "superseded")
        kinds |= dict.fromkeys(set(_objects(gone["out_key"], UNCERTAINTY).to_pylist()).intersection(found), "gone")
        orphans = _orphans(output, loose.filter(pc.invert(_in(loose, pa.array(found, pa.string())))))
        kinds |= dict.fromkeys(orphans, "orphans")
        refused = len(orphans) > max(SHOWN, kept.num_rows)
        check(not (delete and refused), "orphans", len(orphans), f"must not outnumber the {kept.num_rows} results",
              "run verify first, which adopts what a lost ledger knew")  # fmt: skip
        leftovers, ours = list_leftovers(output), pa.array(list(kinds), pa.string())
        temporary = [*leftovers["key"].to_pylist(), *_stale(ledger, lease)]
        told = Findings("gc")
        for key in loose.filter(pc.invert(_in(loose, ours))).slice(0, SHOWN + 1).to_pylist():
            told("not ours", f"{key!r} is not ours, left alone")
        for key in [*sorted(kinds), *temporary]:
            told("deletes" if delete else "would delete", f"{key!r}" + f" ({kinds.get(key, 'temporary')})")
        told.end()
        if delete:
            writer = Repairs(ledger, lease, dry_run=False)
            for row in gone.select(["key", "etag", "size", "recipe", "model"]).to_pylist():
                message = "it is listed no more"
                writer.add(Receipt(**row, status="skipped", stage="list", reason=GONE, message=message))
            writer.flush()  # before the objects go: killed in between, they are superseded and go the next time
            lease.check()
            images, sidecars = _split(sorted(kinds))
            for keys in (images, sidecars, temporary):  # the sidecar, which proves that the rest is ours, comes last
                each(storage.delete, [storage.join(output, key) for key in keys])
    sizes = present.filter(_in(present["key"], ours))["size"]
    counts = {kind: float(sum(of == kind for of in kinds.values())) for kind in ("superseded", "gone", "orphans")}
    num_bytes = float((pc.sum(sizes).as_py() or 0) + (pc.sum(leftovers["size"]).as_py() or 0))
    count = len(kinds) + len(temporary)
    say(f"gc: {count} objects, {num_bytes / 1e6:.1f} MB, " + ("are deleted" if delete else "would go with --delete"))
    return Summary(job="upscale gc", run_id=run_id, status="done", inputs=count, done=count if delete else 0,
                   metrics={**counts, "temporary": float(len(temporary)), "bytes": num_bytes})  # fmt: skip


def _in(keys: pa.ChunkedArray, those: pa.Array | pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.is_in(keys, value_set=those)


def _objects(keys: pa.ChunkedArray, *further: str) -> pa.ChunkedArray:
    """Return the keys of results, of their sidecars, and with further suffixes."""
    named = keys.filter(pc.not_equal(keys, ""))
    made = [named, *(pc.binary_join_element_wise(named, suffix, "") for suffix in (".json", *further))]
    return pa.chunked_array([chunk for column in made for chunk in column.chunks], pa.string())


def _split(keys: list[str]) -> tuple[list[str], list[str]]:
    return [key for key in keys if not key.endswith(".json")], [key for key in keys if key.endswith(".json")]


def _gone(latest: pa.Table, source_keys: pa.ChunkedArray | None) -> pa.Table:
    """Return the receipts whose source is not there any more. Raises ValueError where that is all of them."""
    known = latest.filter(pc.not_equal(latest["reason"], GONE))
    if source_keys is None:
        return known.slice(0, 0)
    gone = known.filter(pc.invert(_in(known["key"], source_keys)))
    check(gone.num_rows < known.num_rows or not known.num_rows, "source", f"none of {known.num_rows} known keys",
          "must hold some of what was upscaled", "correct --source")  # fmt: skip
    return gone


def _only_results(ledger: Ledger, latest: pa.Table) -> pa.Table:
    """Return the last results of sources that are dead letters by now: rotten since, or failed by a newer model.

    They are the only ones there are: a dead letter supersedes nothing.
    """
    dead = latest.filter(pc.equal(latest["status"], "dead"))
    rows = ledger.rows(CLAIM)
    done = rows.filter(pc.and_(pc.equal(rows["status"], "done"), _in(rows["key"], dead["key"])))
    last = done.group_by("key").aggregate([("order", "max")])["order_max"]
    return done.filter(pc.is_in(done["order"], value_set=last)).select(latest.column_names)


def _superseded(output: str, loose: pa.ChunkedArray, history: pa.ChunkedArray) -> list[str]:
    """Return which loose objects earlier receipts name, and the uncertainty maps that their sidecars do."""
    found = loose.filter(_in(loose, _objects(history))).to_pylist()
    maps = set(loose.filter(pc.ends_with(loose, UNCERTAINTY)).to_pylist())
    images = [key.removesuffix(".json") for key in found if key.endswith(".json")]
    images = [key for key in images if key + UNCERTAINTY in maps]
    named = {name for sidecar in each(partial(sidecar_of, output), images) if sidecar for name in sidecar.keys}
    return [*found, *sorted((maps & named) - set(found))]


def _orphans(output: str, unknown: pa.ChunkedArray) -> list[str]:
    """Return the unknown objects that a sidecar of ours describes, and that sidecar, also when it stands alone."""
    keys = set(unknown.to_pylist())
    images = [key.removesuffix(".json") for key in sorted(keys) if key.endswith(".json")]
    found: list[str] = []
    for key, whole in zip(images, each(partial(proven, output), images), strict=True):
        if whole is not None:
            found += [*whole.keys, f"{key}.json"]
        elif key not in keys and sidecar_of(output, key) is not None:  # its writer was killed between the two
            found.append(f"{key}.json")
    return [key for key in found if key in keys]


def _stale(ledger: Ledger, lease: Lease) -> list[str]:
    """Return the trails of units that no plan holds, and the stop markers of other runs, as keys of the output."""
    held = {f"{unit_id}.json" for plan in open_plans(ledger) for unit_id in plan.unit_ids()}
    trails = [name for name in storage.list_names(storage.join(ledger.root, "attempts")) if name not in held]
    mine = f"stop-{lease.fence:010d}"
    marks = [name for name in storage.list_names(ledger.root) if name.startswith("stop-") and name != mine]
    return [f"{storage.OWN_FOLDER}/{name}" for name in [*(f"attempts/{name}" for name in trails), *marks]]

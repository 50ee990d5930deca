"""The end of a pairs run: what the ledger says becomes the manifest, the card, the dead letters and MLflow's data set.

The manifest comes last: until it is there, a reader sees the set of the run before. A run that finds nothing new
writes nothing.
"""

import io
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.blobs import decode_blob
from pipelines.card import DeadLetters, contact_sheet, write_card
from pipelines.commit import build_manifest, publish_manifest
from pipelines.config import fingerprint
from pipelines.engine import say
from pipelines.lease import Lease
from pipelines.ledger import GONE, OUTPUT_LOST, Ledger, Receipt
from pipelines.manifest import SPLITS, Manifest, load_manifest
from pipelines.rows import find_pairs, iter_tables
from pipelines.statistics import COLUMNS, SAMPLE_COLUMNS, aggregate, choose

CARD, DEAD_LETTERS = "card.html", "dead_letters.parquet"
_MARK, _LOGGED = "_diffsr/committed.json", "_diffsr/logged"
_LETTER = ["key", "etag", "size", "stage", "reason", "message", "attempts"]
_COLUMNS = [*_LETTER, "recipe", "status", "fence", "metrics"]


def publish_set(output: str, recipe: dict[str, Any], *, lease: Lease) -> Manifest:
    """Commit the set of a recipe, if its ledger has changed since it was committed, and return its manifest."""
    ledger = Ledger(output)
    receipts = ledger.latest(columns=_COLUMNS, recipe=fingerprint(recipe))
    mark = {"recipe": fingerprint(recipe), "fence": pc.max(receipts["fence"]).as_py() or 0}  # a run has its own fence
    if (committed := _committed(output, mark)) is None:
        committed = _publish(output, recipe, ledger, receipts, lease)
        storage.publish(storage.join(output, _MARK), json.dumps(mark).encode())
    return committed


def report_lost_shards(output: str, recipe: dict[str, Any], *, lease: Lease) -> None:
    """Record the sources whose shard is not there any more as lost: the run that follows makes their pairs again."""
    ledger = Ledger(output)
    receipts = ledger.latest(["key", "etag", "size", "recipe", "status", "out_key"], recipe=fingerprint(recipe))
    there = pa.array([f"data/{name}" for name in storage.list_names(storage.join(output, "data"))], pa.string())
    absent = pc.invert(pc.is_in(receipts["out_key"], value_set=there))
    lost = receipts.filter(pc.and_(pc.equal(receipts["status"], "done"), absent)).drop_columns(["status", "order"])
    if lost.num_rows:
        say(
            f"pairs: {len(pc.unique(lost['out_key']))} shards are missing: their {lost.num_rows} sources are read again"
        )
        verdict: dict[str, Any] = {"status": "dead", "stage": "verify", "reason": OUTPUT_LOST, "fence": lease.fence}
        verdict |= {"run_id": lease.run_id, "message": "its shard is missing"}
        lease.check()
        made = [Receipt(**row, **verdict) for row in lost.to_pylist()]
        ledger.append(made, fence=lease.fence, number=ledger.next_number(lease.fence))


def publish_dead_letters(output: str, receipts: pa.Table) -> None:
    """Write the table of the sources that could not be used, sorted by key: what a person reads after a bad night."""
    letters = receipts.filter(pc.equal(receipts["status"], "dead")).select(_LETTER).sort_by("key")
    sink = io.BytesIO()
    pq.write_table(letters.combine_chunks(), sink, compression="zstd")
    storage.publish(storage.join(output, DEAD_LETTERS), sink.getvalue())


def publish_failure(output: str, recipe: dict[str, Any], *, lease: Lease) -> None:
    """Write the dead letters of a run that exceeded its error budget; the set stays as it was."""
    lease.check()
    storage.delete(storage.join(output, _MARK))  # they are not those of the committed set: it is to write its own again
    publish_dead_letters(output, Ledger(output).latest(_COLUMNS, recipe=fingerprint(recipe)))


def _committed(output: str, mark: dict[str, Any]) -> Manifest | None:
    """Return the manifest of the last commit if it was one of this mark, and is whole."""
    uri = storage.join(output, _MARK)
    if not storage.exists(uri) or json.loads(storage.read_bytes(uri)) != mark:
        return None
    if not all(storage.exists(storage.join(output, name)) for name in ("manifest.json", CARD, DEAD_LETTERS)):
        return None
    return load_manifest(output)


def _publish(output: str, recipe: dict[str, Any], ledger: Ledger, receipts: pa.Table, lease: Lease) -> Manifest:
    """Build and write everything; receipts are the latest of each source."""
    manifest, duplicates = build_manifest(output, ledger, recipe)
    is_gone = pc.equal(receipts["reason"], GONE)
    num_gone, receipts = pc.sum(is_gone).as_py() or 0, receipts.filter(pc.invert(is_gone))
    statuses = {row["values"]: row["counts"] for row in pc.value_counts(receipts["status"]).to_pylist()}
    if duplicates.num_across:
        example = " and ".join(map(repr, duplicates.examples[0].source_keys))
        say(f"pairs: {duplicates.num_across} near copies lie across splits, such as in {example}; {CARD} has more")
    card = write_card(
        title="DiffSR pair set",
        manifest=manifest,
        statistics=aggregate(iter_tables(output, manifest, list(COLUMNS))),
        sources={**statuses, "gone": num_gone},
        drops=_dropped(receipts),
        dead=_dead(receipts),
        duplicates=duplicates,
        contact_sheet=contact_sheet(_sample(output, manifest), value_range=recipe["value_range"]),
        provenance={},
    )
    lease.check()
    publish_dead_letters(output, receipts)
    storage.publish(storage.join(output, CARD), card.encode())
    publish_manifest(output, manifest)
    return manifest


def _dropped(receipts: pa.Table) -> dict[str, int]:
    """Return how many patches the sources gave up, by reason."""
    metrics = receipts["metrics"].combine_chunks()
    table = pa.table({"name": metrics.keys, "count": metrics.items})
    sums = table.group_by("name").aggregate([("count", "sum")]).to_pylist()
    return {row["name"]: int(row["count_sum"]) for row in sums if row["name"].startswith("dropped_")}


def _dead(receipts: pa.Table) -> list[DeadLetters]:
    """Return the dead letters by stage and reason, each with its first source as the example."""
    letters = receipts.filter(pc.equal(receipts["status"], "dead")).select(_LETTER).sort_by("key")
    groups = letters.group_by(["stage", "reason"], use_threads=False)
    found = groups.aggregate([("key", "count"), ("key", "first"), ("message", "first")]).to_pylist()
    return [
        DeadLetters(row["reason"], row["stage"], row["key_count"], row["key_first"], row["message_first"])
        for row in found
    ]


def _sample(output: str, manifest: Manifest) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the decoded pairs (hr, lr) that stand for the training split."""
    named = (
        table.append_column("shard", pa.array([shard.name] * table.num_rows, pa.string()))
        for shard, table in zip(
            manifest.sorted_shards(), iter_tables(output, manifest, list(SAMPLE_COLUMNS)), strict=True
        )
    )
    chosen = choose(named)
    wanted = [] if chosen is None else chosen.select(["shard", "pair_id"]).to_pylist()
    found: dict[str, tuple[bytes, bytes]] = {}
    for name in sorted({row["shard"] for row in wanted}):
        ids = {row["pair_id"] for row in wanted if row["shard"] == name}
        found |= find_pairs(output, name, ids)
    blobs = [found[row["pair_id"]] for row in wanted]
    return [(decode_blob(hr), decode_blob(lr)) for hr, lr in blobs]


def track_set(output: str, manifest: Manifest) -> None:
    """Log the set to MLflow as a run and a data set, unless that was done."""
    uri = storage.join(output, _LOGGED)
    if storage.exists(uri) and storage.read_bytes(uri).decode() == manifest.digest:
        return
    from pipelines import tracking  # seconds to import, and a run that finds nothing new does not need it

    tracking.connect()
    tracking.log_set(
        output,
        manifest,
        metrics={f"pairs_{split}": float(manifest.num_pairs(split)) for split in SPLITS},
        artifacts=[storage.join(output, name) for name in ("manifest.json", CARD, DEAD_LETTERS)],
        params=manifest.recipe,
    )
    storage.publish(uri, manifest.digest.encode())

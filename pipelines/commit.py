"""Committing a pair set: what the ledger says is there becomes a manifest, without the near copies in it.

A pure function of the ledger, the shards and the recipe, whichever runs made them and wherever they were killed.
The driver holds no pixel and no Python object per row. Measured: 650 bytes per receipt, and 170 per pair while near
copies are looked for (10 million pairs: 1.7 GB and two minutes, half of them for the search).
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import storage
from pipelines.config import fingerprint
from pipelines.duplicates import matches_across, near_duplicates
from pipelines.ledger import Ledger
from pipelines.manifest import SPLITS, Manifest, Shard, pinned_uri
from pipelines.rows import iter_tables

NUM_EXAMPLES = 20


class Match(NamedTuple):
    """Two pairs of different splits that look alike; distance: bits in which their perceptual hashes differ."""

    pair_ids: tuple[str, ...]
    source_keys: tuple[str, ...]
    splits: tuple[str, ...]
    distance: int


class Duplicates(NamedTuple):
    """What the commit found: pairs dropped by split, pairs of pairs across splits that count, the closest of them."""

    dropped: dict[str, int]
    num_across: int
    examples: list[Match]


class Scan(NamedTuple):
    """Every pair of a set's counting rows, by shard and row: arrays (N,), and where each shard begins (shards + 1,)."""

    hashes: np.ndarray  # int64, 0 where there is none
    hashed: np.ndarray  # bool
    splits: np.ndarray  # int8, index into SPLITS
    starts: np.ndarray


def current_shards(ledger: Ledger, recipe: str) -> list[Shard]:
    """Return the shards in which sources count, by name, without splits; recipe is a fingerprint.

    A source counts in the shard of its latest receipt of this recipe, if that is `done`; in the shards of its earlier
    receipts it is dropped. A shard that was made again is described by its latest receipts. Receipts of other recipes
    are of other sets.
    """
    rows = ledger.rows(columns=["key", "recipe", "status", "out_key", "out_sha256", "out_bytes"])
    ours = pc.equal(rows["recipe"], recipe)
    by_age = np.argsort(rows["order"].filter(ours).to_numpy(), kind="stable")
    keys, key_names = _codes(rows["key"].filter(ours))  # column by column: the whole table twice would be the peak
    outs, out_names = _codes(rows["out_key"].filter(ours))
    done = pc.equal(rows["status"], "done").filter(ours).to_numpy()[by_age]
    keys, outs, place = keys[by_age], outs[by_age], np.flatnonzero(ours.to_numpy())[by_age]

    latest = _last(keys, len(key_names))  # row of the latest receipt of each key
    counts = done & done[latest][keys] & (outs[latest][keys] == outs)
    current = np.zeros(len(out_names), bool)
    current[outs[counts]] = True

    made = np.flatnonzero(done)
    described = np.zeros(len(out_names), np.int64)
    described[outs[made]] = place[made]  # the last assignment stays: the latest receipt that names the shard
    stale = made[~counts[made] & current[outs[made]]]
    dropped = np.unique(outs[stale].astype(np.int64) * len(key_names) + keys[stale])  # one of each (shard, source)
    dropped_keys = key_names.take(pa.array(dropped % max(1, len(key_names))))

    numbers = np.flatnonzero(current)
    table = rows.select(["out_key", "out_bytes", "out_sha256"]).take(pa.array(described[numbers]))
    begins = np.searchsorted(dropped // max(1, len(key_names)), [numbers, numbers + 1]).T
    return sorted(
        (
            Shard(name=row["out_key"], bytes=row["out_bytes"], sha256=row["out_sha256"], splits={},
                  dropped_sources=sorted(dropped_keys[begin:end].to_pylist()))
            for row, (begin, end) in zip(table.to_pylist(), begins.tolist(), strict=True)
        ),
        key=lambda shard: shard.name,
    )  # fmt: skip


def build_manifest(output: str, ledger: Ledger, recipe: dict[str, Any]) -> tuple[Manifest, Duplicates]:
    """Return the manifest of what is there now, and what was found of duplicates.

    With recipe["duplicates"] == "set" a pair is dropped when it is a near copy of an earlier one of its split that
    counts, by (shard name, row); pairs across splits are never dropped, only reported. Shards of which nothing is left
    are left out. Raises ValueError for a shard that is missing or was altered.
    """
    shards = current_shards(ledger, fingerprint(recipe))
    scan = _scan(output, Manifest(recipe=recipe, shards=shards))
    copies = np.zeros(len(scan.hashes), bool)
    if recipe["duplicates"] == "set":
        for split in range(len(SPLITS)):
            where = np.flatnonzero(scan.hashed & (scan.splits == split))
            copies[where[near_duplicates(scan.hashes[where], recipe["hash_distance"]) >= 0]] = True

    dropped_pairs = _pair_ids(output, recipe, shards, scan, copies)
    made = []
    for number, shard in enumerate(shards):
        rows = slice(*scan.starts[number : number + 2])
        counts = np.bincount(scan.splits[rows][~copies[rows]], minlength=len(SPLITS)).tolist()
        if any(counts):
            splits = dict(zip(SPLITS, counts, strict=True))
            made.append(replace(shard, splits=splits, dropped_pairs=dropped_pairs.get(number, [])))
    counts = np.bincount(scan.splits[copies], minlength=len(SPLITS)).tolist()
    num_across, examples = _across(output, recipe, shards, scan, ~copies)
    return Manifest(recipe=recipe, shards=made), Duplicates(
        dict(zip(SPLITS, counts, strict=True)), num_across, examples
    )


def publish_manifest(output: str, manifest: Manifest) -> str:
    """Store the manifest under its digest, then as the newest; return the URI under which it stays."""
    uri, data = pinned_uri(output, manifest), manifest.to_bytes()
    storage.publish(uri, data)
    storage.publish(storage.join(output, "manifest.json"), data)
    return uri


def _codes(column: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """Return (int32 codes, the distinct values): code[i] says which value row i has."""
    encoded = column.combine_chunks().dictionary_encode()
    return encoded.indices.to_numpy(), encoded.dictionary


def _last(codes: np.ndarray, num_codes: int) -> np.ndarray:
    """Return the last row of each code; every code occurs."""
    rows = np.zeros(num_codes, np.int64)
    rows[codes] = np.arange(len(codes))  # of assignments to one place the last one stays
    return rows


def _scan(output: str, manifest: Manifest) -> Scan:
    hashes, hashed, splits = [np.empty(0, np.int64)], [np.empty(0, bool)], [np.empty(0, np.int8)]
    for table in iter_tables(output, manifest, ["phash"]):
        hashes.append(table["phash"].fill_null(0).to_numpy())
        hashed.append(table["phash"].is_valid().to_numpy())
        splits.append(pc.index_in(table["split"], value_set=pa.array(SPLITS)).fill_null(-1).to_numpy().astype(np.int8))
    starts = np.cumsum([len(part) for part in splits])
    assert all((part >= 0).all() for part in splits), f"splits must be {SPLITS}"
    return Scan(np.concatenate(hashes), np.concatenate(hashed), np.concatenate(splits), starts)


def _tables_of(
    output: str, recipe: dict[str, Any], shards: list[Shard], scan: Scan, positions: np.ndarray, columns: list[str]
) -> Iterator[tuple[int, np.ndarray, pa.Table]]:
    """Yield (number, rows, table) of each shard in which there are some of the sorted positions: read again for names.

    To keep all names from the first reading would cost 50 bytes more for every pair of the set.
    """
    numbers = np.searchsorted(scan.starts, positions, side="right") - 1
    wanted = np.unique(numbers)
    manifest = Manifest(recipe=recipe, shards=[shards[number] for number in wanted])
    for number, table in zip(wanted.tolist(), iter_tables(output, manifest, columns), strict=True):
        yield number, positions[numbers == number] - scan.starts[number], table


def _pair_ids(
    output: str, recipe: dict[str, Any], shards: list[Shard], scan: Scan, copies: np.ndarray
) -> dict[int, list[str]]:
    """Return the sorted pair_ids of the copies, by the number of their shard."""
    found = {}
    for number, rows, table in _tables_of(output, recipe, shards, scan, np.flatnonzero(copies), ["pair_id"]):
        names = table["pair_id"].take(rows)
        assert pc.sum(pc.is_in(table["pair_id"], value_set=names.combine_chunks())).as_py() == len(rows), (
            f"a pair_id of shard {shards[number].name} is in it twice: to drop one would drop both"
        )
        found[number] = sorted(names.to_pylist())
    return found


def _across(
    output: str, recipe: dict[str, Any], shards: list[Shard], scan: Scan, kept: np.ndarray
) -> tuple[int, list[Match]]:
    """Return how many pairs of kept pairs of different splits are near copies, and the closest."""
    places, counts = [], []  # one of each (split, hash): where copies are kept there may be very many
    for split in range(len(SPLITS)):
        where = np.flatnonzero(scan.hashed & kept & (scan.splits == split))
        _, first, count = np.unique(scan.hashes[where], return_index=True, return_counts=True)
        places.append(where[first])
        counts.append(count)
    place, count = np.concatenate(places), np.concatenate(counts)
    hashes = scan.hashes[place]
    a, b = matches_across(hashes, scan.splits[place], recipe["hash_distance"]).T
    distances = np.bitwise_count((hashes[a] ^ hashes[b]).view(np.uint64))
    lower, upper = np.minimum(place[a], place[b]), np.maximum(place[a], place[b])
    closest = np.lexsort((upper, lower, distances))[:NUM_EXAMPLES]

    named: dict[int, dict[str, str]] = {}
    positions = np.unique(np.concatenate([lower[closest], upper[closest]]))
    columns = ["pair_id", "source_key"]
    for number, rows, table in _tables_of(output, recipe, shards, scan, positions, columns):
        found = table.take(rows).to_pylist()
        named |= dict(zip((rows + scan.starts[number]).tolist(), found, strict=True))
    examples = []
    for match in closest.tolist():
        two = [named[int(lower[match])], named[int(upper[match])]]
        ids, sources, splits = (tuple(pair[name] for pair in two) for name in (*columns, "split"))
        examples.append(Match(ids, sources, splits, int(distances[match])))
    return int((count[a] * count[b]).sum()), examples

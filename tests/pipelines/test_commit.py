"""Laws of pipelines.commit: what counts is what the ledger says last, without near copies, whatever the history was."""

import dataclasses
import itertools

import duckdb
import numpy as np
import pytest

from pipelines import storage
from pipelines.commit import NUM_EXAMPLES, build_manifest, current_shards, publish_manifest
from pipelines.config import fingerprint
from pipelines.ledger import GONE, Ledger, Receipt
from pipelines.manifest import SPLITS, load_manifest
from pipelines.rows import iter_pairs, iter_tables
from tests.pipelines.tiny_sets import RECIPE, HandSet, make_row, manifest_of

OURS, OTHERS = fingerprint(RECIPE), "another recipe"


def build(hand):
    return build_manifest(str(hand.root), hand.ledger, hand.recipe)


def goes(hand, *keys):
    """Record that these sources are listed no more."""
    hand.receipts(*keys, status="skipped", stage="list", reason=GONE)


def counting(hand, manifest):
    """Return the (key, patch number) of every row that a reader of this manifest gets."""
    rows = [row for split in SPLITS for row in iter_pairs(str(hand.root), manifest, split)]
    return sorted((row["source_key"], row["source_etag"], row["crop"]["x"] // 16) for row in rows)


def by_duckdb(hand, manifest):
    """Count the pairs of each split as a stranger does, who has the shards and the manifest's JSON."""
    publish_manifest(str(hand.root), manifest)
    return dict(
        duckdb.sql(
            f"""with shard as (select unnest(shards) as s from read_json('{hand.root}/manifest.json')),
                     pair as (select * from read_parquet('{hand.root}/data/*.parquet', filename = true))
                select split, count(*) from pair join shard on filename = '{hand.root}/' || s.name
                where not list_contains(s.dropped_sources::varchar[], source_key)
                  and not list_contains(s.dropped_pairs::varchar[], pair_id) group by all"""
        ).fetchall()
    )


def by_dicts(rows, recipe):
    """The semantics over Python dicts, row by row: what `current_shards` must give. rows: oldest first."""
    ours = [row for row in rows if row["recipe"] == recipe]
    latest = {row["key"]: row for row in ours}
    done = [row for row in ours if row["status"] == "done"]
    made = {row["out_key"]: row for row in done}
    kept, dropped = set(), {name: set() for name in made}
    for row in done:
        current = latest[row["key"]]
        if current["status"] == "done" and current["out_key"] == row["out_key"]:
            kept.add(row["out_key"])
        else:
            dropped[row["out_key"]].add(row["key"])
    return [(name, made[name]["out_bytes"], made[name]["out_sha256"], sorted(dropped[name])) for name in sorted(kept)]


@pytest.mark.parametrize("seed", range(8))
def test_the_shards_are_those_that_a_walk_over_every_receipt_finds(tmp_path, seed):
    generator = np.random.default_rng(seed)
    ledger, keys = Ledger(str(tmp_path)), [f"k{n}" for n in range(8)]
    for number in range(int(generator.integers(1, 7))):
        made = []
        for _ in range(int(generator.integers(1, 9))):
            status = generator.choice(["done", "done", "done", "skipped", "dead"])
            out = {"out_key": f"data/{generator.choice(list('abcd'))}", "out_bytes": int(generator.integers(1 << 40)),
                   "out_sha256": f"{generator.integers(99)}"}  # fmt: skip
            if status != "done" and generator.random() < 0.5:  # the other half as of an output that was lost
                out = {}
            made.append(Receipt(key=str(generator.choice(keys)), etag="", size=1, status=str(status), **out,
                                recipe=[OURS, OURS, OTHERS][generator.integers(3)]))  # fmt: skip
        ledger.append(made, fence=1, number=number)
    shards = current_shards(ledger, OURS)
    wanted = by_dicts(ledger.rows().to_pylist(), OURS)
    assert [(s.name, s.bytes, s.sha256, s.dropped_sources) for s in shards] == wanted
    assert all(shard.splits == {} and shard.dropped_pairs == [] for shard in shards)


def test_an_empty_ledger_and_one_of_other_recipes_are_an_empty_set(tmp_path):
    hand = HandSet(tmp_path)
    for _ in range(2):
        manifest, duplicates = build(hand)
        assert manifest == manifest_of() and duplicates == ({"train": 0, "val": 0, "test": 0}, 0, [])
        hand.receipts("x", recipe=OTHERS, out_key="data/nowhere.parquet")


def test_a_source_edited_and_edited_back_counts_once_as_it_was(tmp_path):
    hand = HandSet(tmp_path)
    first = [make_row(key, n) for key in "xy" for n in range(3)]
    hand.shard("a", first)
    assert counting(hand, build(hand)[0]) == [(k, "etag", n) for k in "xy" for n in range(3)]
    hand.shard("b", [make_row("x", n, etag="new") for n in range(2)])
    after = [("x", "new", 0), ("x", "new", 1), *[("y", "etag", n) for n in range(3)]]
    assert counting(hand, build(hand)[0]) == after
    hand.shard("a", first)  # both edited back: the same unit, so the same shard again
    manifest, _ = build(hand)
    assert counting(hand, manifest) == [(k, "etag", n) for k in "xy" for n in range(3)]
    assert [shard.name for shard in manifest.shards] == ["data/a.parquet"]
    hand.shard("b", [make_row("x", n, etag="new") for n in range(2)])
    assert counting(hand, build(hand)[0]) == after
    hand.shard("c", first[:3])  # x alone edited back, so in another unit
    manifest, _ = build(hand)
    assert counting(hand, manifest) == [(k, "etag", n) for k in "xy" for n in range(3)]
    assert {shard.name: shard.dropped_sources for shard in manifest.shards} == {
        "data/a.parquet": ["x"], "data/c.parquet": []}  # fmt: skip


@pytest.mark.parametrize("status", ["dead", "skipped"])
def test_a_source_that_rots_or_goes_drops_its_rows_and_leaves_the_rest(tmp_path, status):
    hand = HandSet(tmp_path)
    hand.shard("a", [make_row(key, n) for key in "xyz" for n in range(2)])
    hand.shard("b", [make_row("w")])
    hand.receipts("y", status=status)
    goes(hand, "w", "z")
    manifest, _ = build(hand)
    assert counting(hand, manifest) == [("x", "etag", 0), ("x", "etag", 1)]
    assert [shard.name for shard in manifest.shards] == ["data/a.parquet"]  # b is left out: nothing of it counts
    storage.delete(tmp_path / "data" / "b.parquet")
    assert build(hand)[0] == manifest  # nor is it read


def test_a_set_of_another_recipe_stands_beside_and_changes_nothing(tmp_path):
    hand = HandSet(tmp_path)
    hand.shard("a", [make_row(key, n) for key in "xy" for n in range(2)])
    before, _ = build(hand)
    old = publish_manifest(str(tmp_path), before)
    other = HandSet(tmp_path, {**RECIPE, "scale": 2})
    other.shard("b", [make_row("x", etag="new")])
    other.receipts("y", status="dead")
    manifest, _ = build(other)
    publish_manifest(str(tmp_path), manifest)
    assert build(hand)[0] == before == load_manifest(old)
    assert load_manifest(str(tmp_path)) == manifest and manifest.recipe["scale"] == 2
    assert counting(other, manifest) == [("x", "new", 0)]


def near_copies(rows, distance=2):
    """The rows dropped of (split, hash) by brute force: near a kept earlier one of the same split."""
    kept, dropped = [], []
    for number, (split, value) in enumerate(rows):
        alike = (n for n in kept if rows[n][0] == split and None not in (value, rows[n][1])
                 and ((value ^ rows[n][1]) % 2**64).bit_count() <= distance)  # fmt: skip
        (dropped if any(True for _ in alike) else kept).append(number)
    return kept, dropped


def crowded(hand, seed=0, shards=5, sources=3, patches=4):
    """Fill a set with patches whose hashes lie close; return the rows in the order of (shard, row)."""
    generator = np.random.default_rng(seed)
    rows = []
    for name in "abcdefgh"[:shards]:
        of_shard = []
        for key in range(sources):
            split = SPLITS[generator.integers(3)]
            for n in range(patches):
                value = int(generator.integers(6)) * 0x0F0F0F0F0F0F0F0F ^ int(generator.integers(4)) - 2
                none = generator.random() < 0.2
                signed = (value + 2**63) % 2**64 - 2**63
                of_shard.append(make_row(f"{name}{key}", n, split=split, phash=None if none else signed))
        rows += of_shard
        hand.shard(name, of_shard)
    return rows


@pytest.mark.parametrize("seed", range(4))
def test_near_copies_in_a_split_are_dropped_by_shard_and_row_and_across_splits_are_told(tmp_path, seed):
    hand = HandSet(tmp_path)
    rows = crowded(hand, seed)
    manifest, duplicates = build(hand)
    kept, dropped = near_copies([(row["split"], row["phash"]) for row in rows])
    assert dropped and any(rows[n]["phash"] is None for n in kept)
    assert {p for s in manifest.shards for p in s.dropped_pairs} == {rows[n]["pair_id"] for n in dropped}
    assert duplicates.dropped == {s: sum(rows[n]["split"] == s for n in dropped) for s in SPLITS}
    counted = {split: sum(rows[n]["split"] == split for n in kept) for split in SPLITS}
    assert {split: manifest.num_pairs(split) for split in SPLITS} == counted
    assert by_duckdb(hand, manifest) == {split: count for split, count in counted.items() if count}
    across = [
        (((rows[i]["phash"] ^ rows[j]["phash"]) % 2**64).bit_count(), i, j)
        for i, j in itertools.combinations(kept, 2)
        if rows[i]["split"] != rows[j]["split"] and None not in (rows[i]["phash"], rows[j]["phash"])
    ]
    across = sorted(match for match in across if match[0] <= 2)
    assert duplicates.num_across == len(across)
    assert [(m.distance, m.pair_ids, m.source_keys, m.splits) for m in duplicates.examples] == [
        (distance, *(tuple(rows[n][name] for n in (i, j)) for name in ("pair_id", "source_key", "split")))
        for distance, i, j in across[:NUM_EXAMPLES]
    ]


@pytest.mark.parametrize("mode", ["image", "unit", "keep"])
def test_without_duplicates_set_every_pair_stays_and_those_across_splits_are_told_all_the_same(tmp_path, mode):
    hand = HandSet(tmp_path, {**RECIPE, "duplicates": mode})
    rows = [make_row(f"{n:02d}", split="val" if n < 9 else "train", phash=7 if n % 3 else 6) for n in range(30)]
    hand.shard("a", rows[:17])
    hand.shard("b", rows[17:])
    manifest, duplicates = build(hand)
    assert by_duckdb(hand, manifest) == {"val": 9, "train": 21} and duplicates.dropped == dict.fromkeys(SPLITS, 0)
    assert duplicates.num_across == 9 * 21  # each pair of a val and a train patch, though all are of two hashes
    assert [example.distance for example in duplicates.examples] == [0, 0, 1, 1]  # one for each pair of hashes


def test_a_copy_counts_again_when_its_original_goes(tmp_path):
    hand = HandSet(tmp_path)
    hand.shard("a", [make_row("original", phash=0b1111)])
    hand.shard("b", [make_row("copy", phash=0b1110), make_row("other", phash=-1)])
    assert counting(hand, build(hand)[0]) == [("original", "etag", 0), ("other", "etag", 0)]
    goes(hand, "original")
    assert counting(hand, build(hand)[0]) == [("copy", "etag", 0), ("other", "etag", 0)]
    hand.shard("0", [make_row("earlier", phash=0b1111)])
    manifest, _ = build(hand)
    assert counting(hand, manifest) == [("earlier", "etag", 0), ("other", "etag", 0)]
    assert [shard.name for shard in manifest.shards] == ["data/0.parquet", "data/b.parquet"]


def test_copies_of_a_file_under_two_names_keep_one(tmp_path):
    hand = HandSet(tmp_path)
    hand.shard("a", [make_row(key, n, phash=255 << 8 * n) for key in "xy" for n in range(3)])
    assert counting(hand, build(hand)[0]) == [("x", "etag", n) for n in range(3)]


def test_two_pairs_of_one_name_in_a_shard_are_never_dropped_for_one(tmp_path):
    hand = HandSet(tmp_path)
    hand.shard("a", [{**make_row(key, phash=5), "pair_id": "same"} for key in "xy"])
    with pytest.raises(AssertionError, match="to drop one would drop both"):
        build(hand)


def test_the_manifest_is_a_function_of_what_is_there_not_of_how_it_came(tmp_path):
    first, second = HandSet(tmp_path / "one"), HandSet(tmp_path / "two")
    crowded(first)
    manifest, duplicates = build(first)
    receipts = [Receipt(**{name: row[name] for name in Receipt.__dataclass_fields__} | {"metrics": {}})
                for row in first.ledger.rows().to_pylist()]  # fmt: skip
    order = np.random.default_rng(5).permutation(len(receipts))
    for number, position in enumerate(order):  # one at a time, in another order, and every third twice
        receipt = dataclasses.replace(receipts[position], fence=number, run_id=f"run {number}")
        second.ledger.append([receipt] * (1 + (number % 3 == 0)), fence=number, number=0)
    for shard in manifest.shards:
        storage.publish(tmp_path / "two" / shard.name, storage.read_bytes(tmp_path / "one" / shard.name))
    assert build(second) == (manifest, duplicates) and build(second)[0].to_bytes() == manifest.to_bytes()


@pytest.mark.parametrize("flaw", ["missing", "shorter", "no Parquet"])
def test_a_shard_that_is_not_as_its_receipt_says_is_named_and_nothing_is_committed(tmp_path, flaw):
    hand = HandSet(tmp_path)
    for name in "abc":
        hand.shard(name, [make_row(f"{name}{n}") for n in range(3)])
    path = tmp_path / "data" / "b.parquet"
    data = path.read_bytes()
    path.unlink()
    if flaw != "missing":
        path.write_bytes(data[:-1] if flaw == "shorter" else bytes(len(data)))
    with pytest.raises(ValueError, match=r"shard \(data/b.parquet\)"):
        build(hand)


def test_a_kill_between_the_two_writes_leaves_the_older_set_the_newest(tmp_path, monkeypatch):
    hand = HandSet(tmp_path)
    hand.shard("a", [make_row("x")])
    old, _ = build(hand)
    publish_manifest(str(tmp_path), old)
    hand.shard("b", [make_row("y")])
    new, _ = build(hand)

    class Killed(BaseException):
        pass

    publish, written = storage.publish, []

    def once(uri, data):
        if written:
            raise Killed
        written.append(uri)
        publish(uri, data)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "publish", once)
        with pytest.raises(Killed):
            publish_manifest(str(tmp_path), new)
    assert load_manifest(str(tmp_path)) == old and load_manifest(written[0]) == new
    assert publish_manifest(str(tmp_path), new) == written[0] and load_manifest(str(tmp_path)) == new


def test_tables_hold_the_rows_that_count_and_the_columns_that_were_asked_for(tmp_path):
    hand = HandSet(tmp_path)
    rows = crowded(hand)
    goes(hand, "a1", "c0")
    manifest, _ = build(hand)
    tables = list(iter_tables(str(tmp_path), manifest, ["mean", "pair_id"]))
    assert all(table.column_names == ["mean", "pair_id", "split"] for table in tables)
    assert [shard.splits for shard in manifest.shards] == [
        {split: table["split"].to_pylist().count(split) for split in SPLITS} for table in tables
    ]
    dropped = {pair for shard in manifest.shards for pair in shard.dropped_pairs}
    left = [row["pair_id"] for row in rows if row["source_key"] not in ("a1", "c0") and row["pair_id"] not in dropped]
    assert [pair for table in tables for pair in table["pair_id"].to_pylist()] == left

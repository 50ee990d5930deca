"""Laws of pipelines.ledger: the latest receipt is the truth, work is a set difference, units are named by content."""

import random
import time
import tracemalloc

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pipelines import ledger as module
from pipelines import storage
from pipelines.accounting import accounted
from pipelines.ledger import (
    LEAST_BYTES,
    LISTING_SCHEMA,
    OUTPUT_LOST,
    RECEIPT_SCHEMA,
    Ledger,
    Receipt,
    list_table,
    open_plans,
    pack,
    save_plan,
)

HOSTILE = ["line\nbreak.png", "tab\t.png", "Füße 図 🦆.png", "it's.png", 'quo"te.png', "back\\slash.png", " .png"]
HOSTILE += ["a,b;c.png", "%00.png", "-x.png", "‮rtl.png", "e\u0301.png", "\u00e9.png", "x" * 900 + ".png"]


def receipt(key, etag="e1", *, recipe="r1", model="m1", status="done", reason="", **fields):
    return Receipt(key=key, etag=etag, size=5, recipe=recipe, model=model, status=status, reason=reason, **fields)


def listing(*rows):
    return pa.Table.from_pylist([dict(zip(("key", "etag", "size"), row, strict=True)) for row in rows], LISTING_SCHEMA)


def difference(found, latest, **settings):
    """The rows of a listing that are not accounted for, as a plan takes them."""
    table = accounted(found, latest, **settings)
    return found.append_column("attempts", table["attempts"]).filter(pc.invert(table["known"])).sort_by("key")


def work_of(ledger, found, *, recipe="r1", model="m1", retry_dead=False):
    rows = difference(found, ledger.latest(), recipe=recipe, model=model, retry_dead=retry_dead)
    return list(zip(rows["key"].to_pylist(), rows["etag"].to_pylist(), strict=True))


@pytest.fixture
def ledger(tmp_path):
    return Ledger(str(tmp_path / "out"))


@pytest.fixture
def soon(monkeypatch):
    """A ledger is compacted at more than 8 segments."""
    monkeypatch.setattr(module, "MAX_SEGMENTS", 8)


def test_an_empty_ledger_has_no_rows_and_everything_is_work(ledger):
    assert ledger.latest().num_rows == 0 and open_plans(ledger) == []
    assert work_of(ledger, listing(("b", "e1", 1), ("a", "e1", 1))) == [("a", "e1"), ("b", "e1")]


def test_the_latest_receipt_of_a_key_wins_across_segments_and_inside_one(ledger):
    ledger.append([receipt("a", "e9"), receipt("b", "e1"), receipt("b", "e2")], fence=10, number=0)
    ledger.append([receipt("a", "e1"), receipt("c", "e1")], fence=9, number=11)  # written later, but of an older fence
    ledger.append([receipt("c", "e0")], fence=9, number=2)
    ledger.append([receipt("d", "e5", metrics={"lr_psnr": 51.5, "x": 1.0})], fence=10, number=1)
    latest = {row["key"]: row for row in ledger.latest().to_pylist()}
    assert {key: row["etag"] for key, row in latest.items()} == {"a": "e9", "b": "e2", "c": "e1", "d": "e5"}
    assert dict(latest["d"]["metrics"]) == {"lr_psnr": 51.5, "x": 1.0}
    assert ledger.rows().num_rows == 7  # append-only: nothing is lost


def test_every_field_of_a_receipt_survives_the_ledger(ledger):
    full = Receipt(
        key="k", etag="e", size=2**40, recipe="r", model="m", status="dead", out_key="o", out_sha256="s",
        out_bytes=2**41, metrics={"a": 0.5}, attempts=3, stage="decode", reason="corrupt", message="why\n",
        started=1.5, seconds=2.5, run_id="run", unit_id="unit", fence=7,
    )  # fmt: skip
    ledger.append([full], fence=7, number=0)
    (row,) = ledger.rows().drop_columns(["order"]).to_pylist()
    assert Receipt(**{**row, "metrics": dict(row["metrics"])}) == full
    assert set(row) == set(Receipt.__dataclass_fields__)


@pytest.mark.parametrize(
    ("found", "settings", "expected"),
    [
        (("a", "e1", 5), {}, []),
        (("a", "e2", 5), {}, [("a", "e2")]),
        (("new", "e1", 5), {}, [("new", "e1")]),
        (("a", "e1", 5), {"recipe": "r2"}, [("a", "e1")]),
        (("a", "e1", 5), {"model": "m2"}, [("a", "e1")]),
    ],
    ids=["unchanged", "other content", "new key", "other recipe", "other model"],
)
def test_work_is_what_no_receipt_of_the_same_content_recipe_and_model_accounts_for(ledger, found, settings, expected):
    ledger.append([receipt("a")], fence=1, number=0)
    assert work_of(ledger, listing(found), **settings) == expected


@pytest.mark.parametrize("field", ["etag", "recipe", "model"])
def test_a_change_taken_back_is_work_again_because_the_output_holds_the_other(ledger, field):
    for fence, value in enumerate(("e1" if field == "etag" else f"{field[0]}1", "other"), 1):
        ledger.append([receipt("a", **{field: value})], fence=fence, number=0)
    assert work_of(ledger, listing(("a", "e1", 5))) == [("a", "e1")]
    ledger.append([receipt("a")], fence=3, number=0)
    assert work_of(ledger, listing(("a", "e1", 5))) == []


def test_dead_stays_dead_until_retry_and_skipped_stays_skipped(ledger):
    ledger.append([receipt("bad", status="dead", reason="corrupt"), receipt("no", status="skipped")], fence=1, number=0)
    found = listing(("bad", "e1", 5), ("no", "e1", 5))
    assert work_of(ledger, found) == []
    assert work_of(ledger, found, retry_dead=True) == [("bad", "e1")]
    assert work_of(ledger, listing(("bad", "e2", 5))) == [("bad", "e2")]  # mended


def test_a_lost_output_is_work_at_once(ledger):
    ledger.append([receipt("a"), receipt("b")], fence=1, number=0)
    ledger.append([receipt("a", status="dead", reason=OUTPUT_LOST)], fence=2, number=0)
    assert work_of(ledger, listing(("a", "e1", 5), ("b", "e1", 5))) == [("a", "e1")]


K = LEAST_BYTES  # sizes below are in multiples of what an object counts at least


def units_of(found, *, recipe="r", model="m", unit_bytes=10 * K):
    rows = difference(found, RECEIPT_SCHEMA.empty_table(), recipe=recipe, model=model, retry_dead=False)
    return [unit.to_pylist() for unit in pack(rows, recipe=recipe, model=model, unit_bytes=unit_bytes)]


def random_rows(count=200, seed=3):
    generator = random.Random(seed)
    sizes = [generator.choice([0, 1, K, 3 * K + 1, 30 * K]) for _ in range(count)]
    return [(f"folder/{i:04d}.png", f"{generator.random():.9f}", size) for i, size in enumerate(sizes)]


def test_units_partition_the_work_and_close_as_soon_as_they_reach_their_size():
    rows = random_rows()
    units = units_of(listing(*rows))
    assert [(row["key"], row["etag"], row["size"]) for unit in units for row in unit] == rows
    assert len(units) > 10
    for unit in units:
        assert len({row["unit_id"] for row in unit}) == 1
        assert sum(max(row["size"], K) for row in unit[:-1]) < 10 * K
    assert all(sum(max(row["size"], K) for row in unit) >= 10 * K for unit in units[:-1])


def test_an_object_counts_at_least_16_kib_so_that_tiny_ones_are_many_units():
    units = units_of(listing(*((f"{i:04d}", "1", 5) for i in range(1000))), unit_bytes=64 * 2**14)
    assert [len(unit) for unit in units] == [64] * 15 + [40]


def test_a_unit_that_reaches_its_size_exactly_is_closed():
    assert [
        len(unit) for unit in units_of(listing(("a", "1", 6 * K), ("b", "1", 4 * K), ("c", "1", 10 * K), ("d", "1", 1)))
    ] == [2, 1, 1]


def test_units_do_not_depend_on_the_order_of_the_listing():
    rows = random_rows()
    shuffled = random.Random(1).sample(rows, len(rows))
    assert shuffled != rows
    assert units_of(listing(*shuffled)) == units_of(listing(*rows))


def test_a_unit_id_names_its_keys_contents_recipe_and_model():
    base, more = [("a", "1", 9), ("b", "2", 9)], {}
    cases = {
        "base": (base, more),
        "key": ([("a", "1", 9), ("c", "2", 9)], more),
        "etag": ([("a", "1", 9), ("b", "3", 9)], more),
        "fewer": (base[:1], more),
        "recipe": (base, {"recipe": "x"}),
        "model": (base, {"model": "x"}),
        "swapped": (base, {"recipe": "m", "model": "r"}),
        "moved border": ([("a", "1", 9), ("b2", "", 9)], more),
    }
    ids = {name: units_of(listing(*rows), **options)[0][0]["unit_id"] for name, (rows, options) in cases.items()}
    assert len(set(ids.values())) == len(cases)
    assert units_of(listing(*base))[0][0]["unit_id"] == ids["base"]


def test_a_saved_plan_is_read_back_unit_by_unit_until_it_is_deleted(ledger):
    found = listing(*random_rows(), *((key, "e", 50) for key in HOSTILE))
    expected = units_of(found, unit_bytes=50 * K)
    rows = difference(found, ledger.latest(), recipe="r", model="m", retry_dead=False)
    save_plan(ledger, pack(rows, recipe="r", model="m", unit_bytes=50 * K), recipe="r", model="m", fence=4)
    (plan,) = open_plans(ledger)
    assert (plan.recipe, plan.model, plan.fence) == ("r", "m", 4)
    assert (plan.num_units, plan.num_assets(range(plan.num_units))) == (len(expected), 200 + len(HOSTILE))
    assert [plan.unit(index) for index in range(plan.num_units)] == expected
    assert plan.unit_ids() == [unit[0]["unit_id"] for unit in expected]
    storage.delete(plan.uri)
    assert open_plans(ledger) == []


def test_duckdb_reads_the_segments_and_finds_the_same_latest_receipts(ledger):
    generator, keys = random.Random(5), [*HOSTILE, *(f"{i}.png" for i in range(100))]
    for fence in (1, 2, 12):
        for number in (0, 1, 10):
            chosen = generator.sample(keys, 60) + generator.sample(keys, 20)
            ledger.append(
                [receipt(key, f"{generator.random()}", metrics={"lr_psnr": generator.random()}) for key in chosen],
                fence=fence, number=number,
            )  # fmt: skip
    rows = duckdb.sql(
        f"""select key, etag, metrics['lr_psnr'] from read_parquet('{ledger.root}/ledger/*.parquet')
        qualify row_number() over (partition by key order by filename desc, file_row_number desc) = 1"""
    ).fetchall()
    ours = [(row["key"], row["etag"], dict(row["metrics"])["lr_psnr"]) for row in ledger.latest().to_pylist()]
    assert len(ours) == len(set(keys)) and sorted(ours) == sorted(rows)


def many(ledger, *, segments=14, seed=9):
    """Append segments with everything that history knows: changes, recipes, deaths, moves from object to object."""
    generator = random.Random(seed)
    for number in range(segments):
        rows = []
        for _ in range(5):
            status = generator.choice(["done", "done", "dead"])
            rows.append(
                receipt(
                    generator.choice([*HOSTILE, "a", "b", "c"]), generator.choice("xyz"), status=status,
                    recipe=generator.choice(["r1", "r2"]), model=generator.choice(["m1", "m2"]),
                    out_key=generator.choice(["o1", "o2", "o3"]) if status == "done" else "", fence=number // 4 + 1,
                    metrics={"number": float(number)}, unit_id=f"u{number}",
                )
            )  # fmt: skip
        ledger.append(rows, fence=number // 4 + 1, number=number % 4)


def readings(ledger):
    """Return all that anybody reads of a ledger, without the positions."""
    tables = [ledger.latest(), ledger.latest(recipe="r1"), ledger.latest(recipe="r2")]
    history, last = ledger.rows(), {}
    for row in history.to_pylist():
        last[row["key"], row["recipe"], row["model"], row["out_key"]] = {**row, "order": 0}
    return [table.drop_columns(["order"]).to_pylist() for table in tables], last


@pytest.mark.parametrize("deletes", [0, 1, 6, None], ids=["at once", "after one delete", "after six", "never"])
def test_a_compaction_killed_anywhere_leaves_a_ledger_that_reads_the_same(ledger, soon, monkeypatch, deletes):
    class Killed(BaseException):
        pass

    many(ledger)
    before, old, honest, count = readings(ledger), ledger.segments(), storage.delete, [0]

    def delete(uri):
        if count[0] == deletes:
            raise Killed
        count[0] += 1
        honest(uri)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "delete", delete)
        if deletes is None:
            assert ledger.compact(fence=9)
        else:
            with pytest.raises(Killed):
                ledger.compact(fence=9)
    assert len(ledger.segments()) == (1 if deletes is None else len(old) + 1 - deletes)
    assert readings(ledger) == before
    ledger.append([receipt("a", "new")], fence=10, number=0)
    assert {row["etag"] for row in ledger.latest().to_pylist() if row["key"] == "a"} == {"new"}
    assert ledger.compact(fence=10) == (deletes in (0, 1, 6))
    keys = {key for key, recipe, *_ in before[1] if recipe == "r1"} | {"a"}
    assert set(ledger.latest(["key"], recipe="r1")["key"].to_pylist()) == keys


def test_a_compaction_killed_before_it_is_published_changes_nothing(ledger, soon, monkeypatch):
    many(ledger)
    before = ledger.segments(), readings(ledger)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ledger.compact(fence=8)
    assert (ledger.segments(), readings(ledger)) == before


def test_few_segments_and_those_of_a_newer_holder_are_not_compacted(ledger, soon):
    many(ledger, segments=8)
    assert ledger.compact(fence=99) is False and len(ledger.segments()) == 8
    ledger.append([receipt("a")], fence=12, number=0)
    assert ledger.compact(fence=11) is False and len(ledger.segments()) == 9
    assert ledger.compact(fence=12) is True and len(ledger.segments()) == 1


def test_a_reader_beside_a_compaction_reads_all_of_it(ledger, soon, monkeypatch):
    many(ledger)
    before, honest, calls = readings(ledger), module._read_segment, []

    def late(uri, *, columns):
        calls.append(uri)
        if len(calls) == 3:
            monkeypatch.setattr(module, "_read_segment", honest)
            ledger.compact(fence=9)
        return honest(uri, columns=columns)

    monkeypatch.setattr(module, "_read_segment", late)
    assert readings(ledger) == before and len(ledger.segments()) == 1


def test_a_listing_that_saw_neither_the_old_nor_the_compacted_segments_is_made_again(ledger, monkeypatch):
    many(ledger)
    before, honest, calls = readings(ledger), storage.list_names, []
    monkeypatch.setattr(
        storage, "list_names", lambda uri: calls.append(uri) or honest(uri)[: 3 if len(calls) == 1 else 999]
    )
    assert readings(ledger) == before


def test_columns_are_read_as_asked_and_recipes_apart(ledger):
    ledger.append([receipt("a", "e1", recipe="r1"), receipt("b", "e1", recipe="r1")], fence=1, number=0)
    ledger.append([receipt("a", "e2", recipe="r2")], fence=2, number=0)
    assert ledger.rows(["etag"]).to_pylist() == [{"etag": e, "order": i} for i, e in enumerate(("e1", "e1", "e2"))]
    assert ledger.latest(["etag"]).to_pylist() == [{"etag": "e1", "order": 1}, {"etag": "e2", "order": 2}]
    assert ledger.latest(["etag"], recipe="r1").to_pylist() == [{"etag": "e1", "order": 0}, {"etag": "e1", "order": 1}]
    assert ledger.latest(["etag"], recipe="r3").num_rows == 0


def test_hostile_keys_are_compared_as_they_are(ledger):
    found = listing(*((key, "e1", 5) for key in HOSTILE))
    assert sorted(work_of(ledger, found)) == sorted((key, "e1") for key in HOSTILE)
    ledger.append([receipt(key) for key in HOSTILE], fence=1, number=0)
    assert work_of(ledger, found) == []


def test_a_listing_is_sorted_and_keeps_names_that_are_not_utf8_as_escapes(tmp_path):
    source = tmp_path / "source"
    for name in ("b.png", "a.png", "z/a.png", "line\nbreak.png"):
        storage.publish(storage.join(str(source), name), name.encode())
    (source / "note.txt").write_bytes(b"")
    rotten = b"\xff.png"
    with open(bytes(source) + b"/" + rotten, "wb") as file:
        file.write(b"x")
    found = list_table(str(source), suffixes=frozenset({".png"}))
    assert found.schema == LISTING_SCHEMA
    assert found["key"].to_pylist() == ["\\udcff.png", "a.png", "b.png", "line\nbreak.png", "z/a.png"]
    assert found["size"].to_pylist() == [1, 5, 5, 14, 7]
    assert found["etag"][1].as_py() == storage.content_etag(b"a.png")


def test_a_listing_longer_than_its_buffer_is_whole(monkeypatch):
    objects = [storage.StoredObject(f"{i:06d}", "e", i) for i in range(65_536 * 2 + 3)]
    monkeypatch.setattr(module.storage, "list_objects", lambda *_, **__: iter(objects))
    assert list_table("any")["key"].to_pylist() == [item.key for item in objects]


def test_a_hundred_thousand_receipts_are_appended_in_seconds(ledger):
    rows = [receipt(f"{i:07d}.png", metrics={"lr_psnr": 50.0}) for i in range(100_000)]
    started = time.monotonic()
    ledger.append(rows, fence=1, number=0)
    assert time.monotonic() - started < 8  # 0.8 s on an idle core; 45 s when each field copied the receipt
    assert ledger.latest().num_rows == 100_000


def test_a_hundred_thousand_assets_are_compared_in_seconds_without_becoming_python_objects(ledger):
    count = 100_000
    keys = pa.array([f"folder/{i:07d}.png" for i in range(count)])
    texts = {field.name: pa.array([""] * count) for field in RECEIPT_SCHEMA if field.type == "string"}
    texts |= {"key": keys, "etag": pa.array(["e1"] * count), "recipe": pa.array(["r1"] * count)}
    columns = [texts.get(field.name, pa.nulls(count, field.type)) for field in RECEIPT_SCHEMA]
    path = f"{ledger.root}/ledger/0000000001-000000.parquet"
    storage.publish(path, b"")
    pq.write_table(pa.table(columns, schema=RECEIPT_SCHEMA), path)
    etags = pa.array(["e1" if i % 100 else "e2" for i in range(count)])
    found = pa.table([keys, etags, pa.array([10] * count)], schema=LISTING_SCHEMA)
    tracemalloc.start()
    started = time.monotonic()
    rows = difference(found, ledger.latest(), recipe="r1", model="", retry_dead=False)
    seconds, (_, peak) = time.monotonic() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert rows["key"].to_pylist() == [f"folder/{i:07d}.png" for i in range(0, count, 100)]
    assert seconds < 5 and peak < 60 * 2**20

"""Laws of pipelines.accounting: each listed asset has one reason to be work or none, and tries are counted."""

import random
from collections import Counter

import pyarrow as pa
import pytest

from pipelines.accounting import MAX_TRIES, WHY, accounted
from pipelines.ledger import GONE, LISTING_SCHEMA, OUTPUT_LOST, RECEIPT_SCHEMA, Ledger, Receipt, pack, save_plan
from pipelines.ledger import units_left as left_of
from pipelines.work import Work, forecast

DEAD = {"status": "dead", "stage": "decode", "reason": "corrupt"}
TRANSIENT = {"status": "dead", "stage": "read", "reason": "io_transient"}
LOST = {"status": "dead", "stage": "verify", "reason": OUTPUT_LOST}
VANISHED = {"status": "skipped", "stage": "list", "reason": GONE}


def receipt(key, etag="e1", *, recipe="r1", model="m1", status="done", **fields):
    return Receipt(key=key, etag=etag, size=5, recipe=recipe, model=model, status=status, **fields)


def listing(*rows):
    return pa.Table.from_pylist([dict(zip(("key", "etag", "size"), row, strict=True)) for row in rows], LISTING_SCHEMA)


def judged(tmp_path, *receipts, etag="e1", retry_dead=False):
    """Return (why, attempts) of key a after these receipts, one night each."""
    ledger = Ledger(str(tmp_path / "out"))
    for fence, found in enumerate(receipts, 1):
        ledger.append([found, receipt("other", "e9", **DEAD)], fence=fence, number=0)
    table = accounted(listing(("a", etag, 5)), ledger.latest(), recipe="r1", model="m1", retry_dead=retry_dead)
    (row,) = table.to_pylist()
    assert row["known"] == (row["why"] in ("failed", "unchanged")) and table["attempts"].type == pa.int32()
    return row["why"], row["attempts"]


@pytest.mark.parametrize(
    ("receipts", "settings", "expected"),
    [
        ([], {}, ("new", 1)),
        ([receipt("a")], {}, ("unchanged", 1)),
        ([receipt("a", status="skipped", reason="large")], {}, ("unchanged", 1)),
        ([receipt("a", reason="rejected")], {"retry_dead": True}, ("unchanged", 1)),
        ([receipt("a")], {"etag": "e2"}, ("changed", 1)),
        ([receipt("a", **DEAD, attempts=2)], {"etag": "e2"}, ("changed", 1)),
        ([receipt("a", **LOST)], {"etag": "e2"}, ("changed", 1)),
        ([receipt("a", recipe="r2")], {}, ("outdated", 1)),
        ([receipt("a", model="m2")], {}, ("outdated", 1)),
        ([receipt("a", model="m2", **DEAD, attempts=5)], {"retry_dead": True}, ("outdated", 1)),
        ([receipt("a", model="m2", **LOST)], {}, ("outdated", 1)),
        ([receipt("a"), receipt("a", **LOST)], {}, ("lost", 1)),
        ([receipt("a"), receipt("a", **VANISHED)], {}, ("new", 1)),
        ([receipt("a", **DEAD)], {}, ("failed", 2)),
        ([receipt("a", **DEAD)], {"retry_dead": True}, ("retried", 2)),
        ([receipt("a", **DEAD, attempts=7)], {"retry_dead": True}, ("retried", 8)),
        ([receipt("a", **TRANSIENT)], {}, ("retried", 2)),
        ([receipt("a", **TRANSIENT, attempts=2)], {}, ("retried", 3)),
        ([receipt("a", **TRANSIENT, attempts=3)], {}, ("failed", 4)),
        ([receipt("a", **TRANSIENT, attempts=3)], {"retry_dead": True}, ("retried", 4)),
        ([receipt("a", **TRANSIENT, attempts=3)], {"etag": "e2"}, ("changed", 1)),
        ([receipt("a", **TRANSIENT, attempts=2), receipt("a", attempts=3)], {}, ("unchanged", 1)),
    ],
)
def test_the_latest_receipt_says_why_and_which_try_it_is(tmp_path, receipts, settings, expected):
    assert judged(tmp_path, *receipts, **settings) == expected


def test_three_tries_in_all():
    assert MAX_TRIES == 3


def test_the_forecast_counts_every_listed_asset_once_with_its_bytes_and_a_limit_cuts_only_the_rows(tmp_path):
    generator, rows, expected, sizes = random.Random(2), [], Counter(), Counter()
    makes = {
        "new": lambda key: None,
        "changed": lambda key: receipt(key, "e0"),
        "outdated": lambda key: receipt(key, model="m0"),
        "lost": lambda key: receipt(key, **LOST),
        "retried": lambda key: receipt(key, **TRANSIENT),
        "failed": lambda key: receipt(key, **DEAD),
        "unchanged": receipt,
    }
    assert tuple(makes) == WHY
    receipts = []
    for index in range(300):
        why, key, size = generator.choice(WHY), f"{index:03d}.png", generator.randrange(1000)
        rows.append((key, "e1", size))
        receipts += [made] if (made := makes[why](key)) else []
        expected[why] += 1
        sizes[why] += size
    output = str(tmp_path / "out")
    Ledger(output).append(receipts, fence=1, number=0)
    for limit in (None, 7):
        work = Work(listing=lambda: listing(*rows), output=output, recipe="r1", model="m1", limit=limit)
        ahead = forecast(work)
        assert (ahead.counts, ahead.bytes) == (expected, sizes) and tuple(ahead.counts) == WHY
        assert ahead.unchanged == expected["unchanged"] + expected["failed"]
        assert ahead.todo == ahead.rows.num_rows == (7 if limit else 300 - ahead.unchanged)
        tries = {row["key"]: row["attempts"] for row in ahead.rows.to_pylist()}
        transient = {made.key for made in receipts if made.reason == "io_transient"}
        assert tries == {key: 2 if key in transient else 1 for key in tries}


def test_an_excluded_asset_is_not_listed_but_not_gone_either(tmp_path):
    rows = [("a/1.png", "e1", 1), ("a/2.jpg", "e1", 10), ("b/3.png", "e1", 100)]
    output = str(tmp_path / "out")
    work = Work(
        listing=lambda: listing(*rows), output=output, recipe="r1", model="m1", include=("*.png",), exclude=("b/*",)
    )
    ahead = forecast(work)
    assert (ahead.listed, ahead.keys.to_pylist(), ahead.todo_bytes) == (1, ["a/1.png"], 1)
    assert ahead.present.to_pylist() == [row[0] for row in rows] and sum(ahead.counts.values()) == 1


def test_a_plan_carries_the_tries_and_tells_its_units_without_a_receipt_since(tmp_path):
    ledger = Ledger(str(tmp_path / "out"))
    ledger.append([receipt("a", **TRANSIENT, attempts=2)], fence=1, number=0)
    found = listing(("a", "e1", 2**14), ("b", "e1", 2**14))
    table = accounted(found, ledger.latest(), recipe="r1", model="m1", retry_dead=False)
    rows = found.append_column("attempts", table["attempts"])
    units = list(pack(rows, recipe="r1", model="m1", unit_bytes=1))
    plan = save_plan(ledger, units, recipe="r1", model="m1", fence=2)
    assert [(row["key"], row["attempts"]) for index in (0, 1) for row in plan.unit(index)] == [("a", 3), ("b", 1)]
    assert left_of(plan, ledger) == [0, 1]
    ledger.append([receipt("a", unit_id=plan.unit_ids()[0], fence=1)], fence=1, number=1)  # of an earlier run
    assert left_of(plan, ledger) == [0, 1]
    ledger.append([receipt("b", unit_id=plan.unit_ids()[1], fence=2)], fence=2, number=0)
    assert left_of(plan, ledger) == [0]


def test_an_empty_ledger_and_an_empty_listing_are_judged_too():
    table = accounted(listing(), RECEIPT_SCHEMA.empty_table(), recipe="r", model="m", retry_dead=False)
    assert table.num_rows == 0
    found = accounted(listing(("a", "e", 1)), RECEIPT_SCHEMA.empty_table(), recipe="r", model="m", retry_dead=False)
    assert found.select(["known", "why", "attempts"]).to_pylist() == [{"known": False, "why": "new", "attempts": 1}]

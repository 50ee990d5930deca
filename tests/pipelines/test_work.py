"""Laws of pipelines.work: every asset once, killed anywhere the rerun ends as a clean run does, budgets stop."""

import errno
import json
import os
from functools import partial

import pytest

from pipelines import storage
from pipelines import work as module
from pipelines.corpus import read_source
from pipelines.images import Refused
from pipelines.lease import Lease, LeaseHeld
from pipelines.ledger import GONE, LEAST_BYTES, Ledger, Receipt, list_table, open_plans
from pipelines.work import BudgetExceeded, Work, forecast, run

SIZE = 10
THREE = 3 * LEAST_BYTES  # unit_bytes for units of three small assets


class Killed(BaseException):
    """A kill -9 as far as a test inside one process can play it: nothing in the code may catch it."""


class FakeWorker:
    """Writes each source reversed below the output; `before` and `after` are called with the row around the write."""

    def __init__(self, *, work, source, before=None, after=None, seen=None):
        self.work, self.source, self.before, self.after = work, source, before, after
        self.seen = [] if seen is None else seen

    def __call__(self, rows, enter):
        self.seen.append(rows[0]["unit_id"])
        return [self.asset(row) for row in rows]

    def asset(self, row):
        fields = {**row, "recipe": self.work.recipe, "model": self.work.model}
        if self.before:
            self.before(row)
        try:
            data = read_source(self.source, row)
            if data.startswith(b"bad"):
                raise Refused("decode", "corrupt", "bad bytes")
        except Refused as refused:
            return Receipt(**fields, status="dead", stage=refused.stage, reason=refused.reason, message=refused.message)
        if data.startswith(b"skip"):
            return Receipt(**fields, status="skipped", stage="crop", reason="no_patch")
        out = f"{row['key']}.out"
        storage.publish(storage.join(self.work.output, out), data[::-1])
        receipt = Receipt(**fields, status="done", out_key=out, out_bytes=len(data))
        if self.after:
            self.after(row)
        return receipt


class Bench:
    """A source folder, an output folder, and runs of the fake worker between them."""

    def __init__(self, root, count=10):
        self.root, self.source, self.output = root, root / "source", root / "out"
        for index in range(count):
            self.put(f"{index:02d}.png", f"asset {index:04d}")

    def put(self, name, text):
        path = self.source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
        return path

    def work(self, **changes):
        listing = partial(list_table, str(self.source), suffixes=frozenset({".png"}))
        fields = {"listing": listing, "output": str(self.output), "recipe": "r", "model": "m", "unit_bytes": THREE}
        return Work(**{**fields, **changes})

    def run(self, *, before=None, after=None, seen=None, **changes):
        work = self.work(**changes)
        with Lease(work.output, run_id="run") as lease:
            arguments = {"work": work, "source": str(self.source), "before": before, "after": after, "seen": seen}
            return run(
                work, make=FakeWorker, arguments=arguments, engine="local", num_workers=1,
                run_id=f"run-{lease.fence}", lease=lease, label="test",
            )  # fmt: skip

    def tree(self):
        paths = [path for path in self.output.rglob("*") if path.is_file() and "_diffsr" not in path.parts]
        return {str(path.relative_to(self.output)): path.read_bytes() for path in paths}

    def accounts(self):
        """Return what the ledger says, without the fields that name the run."""
        rows = Ledger(str(self.output)).latest().to_pylist()
        kept = ("key", "etag", "size", "recipe", "model", "status", "out_key", "out_bytes", "stage", "reason")
        assert len({row["key"] for row in rows}) == len(rows)
        return sorted(tuple(row[name] for name in kept) for row in rows)

    def status(self):
        return {row[0]: row[5] for row in self.accounts()}

    def num_plans(self):
        return len(open_plans(Ledger(str(self.output))))


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


@pytest.fixture
def clean(tmp_path):
    """What an undisturbed run makes of the same ten sources: (tree, accounts with the same etags, unit ids)."""
    other, seen = Bench(tmp_path / "clean"), []
    other.run(seen=seen)
    return other.tree(), other.accounts(), seen


def counted(outcome):
    return {name: value for name, value in vars(outcome).items() if value}


def dies_at(number, *, counter=None):
    counter = [0] if counter is None else counter

    def hook(row):
        counter[0] += 1
        if counter[0] > number:
            raise Killed

    return hook


def test_a_clean_run_does_everything_once_and_a_rerun_does_nothing(bench, clean):
    seen = []
    assert counted(bench.run(seen=seen)) == {"inputs": 10, "done": 10}
    assert bench.tree() == {f"{i:02d}.png.out": f"asset {i:04d}".encode()[::-1] for i in range(10)}
    assert (bench.tree(), bench.accounts(), seen) == clean and len(seen) == 4
    before = sorted(bench.output.rglob("*"))
    assert counted(bench.run(seen=seen)) == {"unchanged": 10}
    assert len(seen) == 4 and bench.num_plans() == 0
    assert [p for p in sorted(bench.output.rglob("*")) if p.parent.name != "fences"] == [
        p for p in before if p.parent.name != "fences"
    ]


@pytest.mark.parametrize("flushed", [True, False], ids=["receipts kept", "receipts lost"])
@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("number", [0, 1, 4, 6, 9])
def test_killed_at_any_asset_a_rerun_ends_as_a_clean_run(bench, clean, monkeypatch, number, where, flushed):
    first, second = [], []
    with monkeypatch.context() as patch:
        if not flushed:
            patch.setattr(module._Writer, "flush", lambda self: None)
        with pytest.raises(Killed):
            bench.run(**{where: dies_at(number)}, seen=first)
    assert bench.num_plans() == 1
    kept = (number // 3) * 3 if flushed else 0
    assert Ledger(str(bench.output)).rows().num_rows == kept
    outcome = bench.run(seen=second)
    assert (outcome.inputs, outcome.done, outcome.unchanged) == (10 - kept, 10 - kept, kept)
    assert outcome.resumed_units == len(second)
    assert (bench.tree(), bench.accounts()) == clean[:2]
    assert first[: kept // 3] + second == clean[2]  # resumed with the same units, the finished ones not again
    assert Ledger(str(bench.output)).rows().num_rows == 10 and bench.num_plans() == 0


@pytest.mark.parametrize("point", ["append", "delete"])
def test_killed_at_the_ledger_or_at_the_commit_a_rerun_ends_as_a_clean_run(bench, clean, monkeypatch, point):
    delete = storage.delete

    def kill(first, *_, **__):
        if point == "append" or "/plans/" in first:
            raise Killed
        delete(first)

    seen = []
    with monkeypatch.context() as patch:
        target = (Ledger, "append") if point == "append" else (module.storage, "delete")
        patch.setattr(*target, kill)
        with pytest.raises(Killed):
            bench.run(seen=seen)
    assert bench.num_plans() == 1 and seen == clean[2]
    outcome = bench.run(seen=seen)
    assert outcome.done == (10 if point == "append" else 0)
    assert seen == (clean[2] * 2 if point == "append" else clean[2])
    assert (bench.tree(), bench.accounts(), bench.num_plans()) == (*clean[:2], 0)


def test_killed_again_and_again_it_still_ends_as_a_clean_run(bench, clean):
    for _ in range(20):
        try:
            bench.run(after=dies_at(3))
            break
        except Killed:
            pass
    else:
        pytest.fail("it never ended")
    assert (bench.tree(), bench.accounts()) == clean[:2]
    assert Ledger(str(bench.output)).rows().num_rows == 10


def test_an_interrupted_plan_is_finished_before_new_sources_are_packed(bench, clean):
    first, second = [], []
    with pytest.raises(Killed):
        bench.run(after=dies_at(4), seen=first)
    bench.put("00-new.png", "asset new!")  # would shift every unit if the work were packed again
    outcome = bench.run(seen=second)
    assert first[:1] + second[:3] == clean[2] and len(second) == 4 and second[3] not in clean[2]
    assert (outcome.inputs, outcome.unchanged, outcome.resumed_units) == (8, 3, 3)


def test_a_plan_for_other_settings_is_dropped_and_its_assets_are_done_under_the_new(bench):
    with pytest.raises(Killed):
        bench.run(after=dies_at(4))
    assert counted(bench.run(model="m2")) == {"inputs": 10, "done": 10}
    rows = Ledger(str(bench.output)).latest().to_pylist()
    assert [row["model"] for row in rows] == ["m2"] * 10 and bench.num_plans() == 0


def test_after_a_b_a_an_interrupted_plan_is_resumed_although_its_units_were_done_long_ago(bench):
    seen = []
    bench.run(model="a", seen=seen)
    bench.run(model="b")
    with pytest.raises(Killed):
        bench.run(model="a", after=dies_at(4))
    again = []
    assert bench.run(model="a", seen=again).resumed_units == 3
    assert again == seen[1:]


def test_a_set_of_another_recipe_stands_beside_and_its_receipts_are_found_again(bench):
    assert counted(bench.run(recipe="a", sets=True)) == {"inputs": 10, "done": 10}
    assert counted(bench.run(recipe="b", sets=True)) == {"inputs": 10, "done": 10}
    bench.put("03.png", "asset edit")
    assert counted(bench.run(recipe="a", sets=True)) == {"inputs": 1, "done": 1, "unchanged": 9}
    assert counted(bench.run(recipe="b", sets=True)) == {"inputs": 1, "done": 1, "unchanged": 9}
    assert counted(bench.run(recipe="a", sets=True)) == {"unchanged": 10}
    assert counted(bench.run(recipe="a")) == {"inputs": 10, "done": 10}  # one result per key: b's hides it


def test_an_interrupted_plan_of_another_set_is_left_in_place_and_continued_when_it_is_asked_for(bench):
    first, second = [], []
    with pytest.raises(Killed):
        bench.run(recipe="a", sets=True, after=dies_at(4), seen=first)
    assert counted(bench.run(recipe="b", sets=True)) == {"inputs": 10, "done": 10}
    assert bench.num_plans() == 1
    outcome = bench.run(recipe="a", sets=True, seen=second)
    assert counted(outcome) == {"inputs": 7, "done": 7, "unchanged": 3, "resumed_units": 3}
    assert bench.num_plans() == 0 and len(set(first + second)) == 4


def test_the_budget_of_a_set_counts_no_dead_letters_of_another(bench):
    for index in range(10):
        bench.put(f"{index:02d}.png", "bad bytes!")
    bench.run(recipe="a", sets=True, max_dead_share=1.0)
    for index in range(10):
        bench.put(f"{index:02d}.png", "good bytes")
    assert bench.run(recipe="b", sets=True, max_dead_share=0.0).done == 10


def test_what_is_listed_no_more_gets_one_receipt_and_is_work_again_when_it_is_back(bench):
    bench.run(max_gone_share=0.5)
    content = (bench.source / "03.png").read_bytes()
    (bench.source / "03.png").unlink()
    for _ in range(2):
        assert counted(bench.run(max_gone_share=0.5)) == {"unchanged": 9}
    rows = [row for row in Ledger(str(bench.output)).rows().to_pylist() if row["reason"] == GONE]
    assert [(row["key"], row["status"], row["stage"]) for row in rows] == [("03.png", "skipped", "list")]
    (bench.source / "03.png").write_bytes(content)
    assert counted(bench.run(max_gone_share=0.5)) == {"inputs": 1, "done": 1, "unchanged": 9}


def test_a_bucket_that_rotates_is_judged_night_by_night_and_the_wrong_bucket_before_any_work(bench):
    bench.run(max_gone_share=0.3)
    for night in range(6):
        for number in (0, 1):
            (bench.source / f"{2 * night + number:02d}.png").unlink()
            bench.put(f"{10 + 2 * night + number:02d}.png", f"good {night} {number}")
        assert bench.run(max_gone_share=0.3).done == 2
    for path in bench.source.iterdir():
        path.unlink()
    bench.put("other.png", "good bytes")
    seen = []
    with pytest.raises(ValueError, match="max_gone_share"):
        bench.run(max_gone_share=0.3, seen=seen)
    assert not seen
    assert bench.run(max_gone_share=1.0).done == 1


def test_dead_letters_that_are_gone_count_for_no_budget(bench):
    for index in range(5):
        bench.put(f"{index:02d}.png", "bad bytes!")
    bench.run(max_dead_share=1.0)
    with pytest.raises(BudgetExceeded):
        bench.run(max_dead_share=0.2)
    for index in range(5):
        (bench.source / f"{index:02d}.png").unlink()
    bench.run(max_dead_share=0.2)


def test_a_run_that_ends_well_compacts_a_ledger_of_many_segments_and_a_rerun_does_nothing(bench, monkeypatch):
    monkeypatch.setattr(module, "FLUSH_S", -1.0)
    monkeypatch.setattr("pipelines.ledger.MAX_SEGMENTS", 25)
    ledger = Ledger(str(bench.output))
    for night in range(3):
        assert len(ledger.segments()) == 10 * night
        for index in range(10):
            bench.put(f"{index:02d}.png", f"night {night:04d}")
        assert bench.run(unit_bytes=1).done == 10
    assert len(ledger.segments()) == 1 and ledger.rows().num_rows == 10
    before = bench.accounts()
    assert counted(bench.run()) == {"unchanged": 10}
    assert bench.accounts() == before


def test_receipts_carry_the_run_and_the_fence(bench):
    bench.run()
    bench.put("zz.png", "asset more")
    bench.run()
    rows = Ledger(str(bench.output)).latest().to_pylist()
    assert {(row["run_id"], row["fence"]) for row in rows} == {("run-1", 1), ("run-2", 2)}
    assert [row["key"] for row in rows if row["fence"] == 2] == ["zz.png"]


def test_a_run_that_lost_its_lease_writes_no_receipts(bench):
    def usurp(row):
        storage.create(storage.join(str(bench.output), "_diffsr", "fences", f"{2:010d}"), b"{}")

    with pytest.raises(LeaseHeld, match="lost its lease"):
        bench.run(before=usurp)
    assert Ledger(str(bench.output)).rows().num_rows == 0


def test_receipts_are_written_while_the_run_goes_on(bench, monkeypatch):
    monkeypatch.setattr(module, "FLUSH_S", -1.0)
    counts = []
    bench.run(before=lambda row: counts.append(Ledger(str(bench.output)).rows().num_rows))
    assert counts == [0, 0, 0, 3, 3, 3, 6, 6, 6, 9]
    assert len(Ledger(str(bench.output)).segments()) == 4


def test_new_changed_and_unchanged_sources_are_told_apart(bench):
    bench.run()
    bench.put("03.png", "asset edit")
    bench.put("deep/er.png", "asset deep")
    seen = forecast(bench.work())
    assert (seen.listed, seen.todo, seen.unchanged, seen.todo_bytes) == (11, 2, 9, 2 * SIZE)
    assert seen.rows["key"].to_pylist() == ["03.png", "deep/er.png"]
    assert counted(bench.run()) == {"inputs": 2, "done": 2, "unchanged": 9}
    assert bench.tree()["03.png.out"] == b"asset edit"[::-1]


def test_a_forecast_writes_nothing(bench):
    assert forecast(bench.work()).todo == 10
    assert not bench.output.exists()


def test_a_source_that_vanishes_takes_its_output_and_its_account_nowhere(bench, clean):
    bench.run()
    (bench.source / "03.png").unlink()
    assert counted(bench.run()) == {"unchanged": 9}
    assert (bench.tree(), bench.accounts()) == clean[:2]


def test_one_bad_file_is_a_dead_letter_and_the_rest_is_done(bench):
    bench.put("05.png", "bad bytes!")
    bench.put("06.png", "skip this!")
    assert counted(bench.run()) == {"inputs": 10, "done": 8, "dead": 1, "skipped": 1}
    assert {key for key, status in bench.status().items() if status != "done"} == {"05.png", "06.png"}
    assert counted(bench.run()) == {"unchanged": 10}  # dead stays dead


def test_retry_takes_the_dead_and_only_them(bench):
    bench.put("05.png", "bad bytes!")
    bench.run()
    seen = []
    outcome = bench.run(retry_dead=True, max_dead_share=1.0, seen=seen)
    assert counted(outcome) == {"inputs": 1, "dead": 1, "unchanged": 9} and len(seen) == 1


def test_a_source_changed_after_the_listing_is_a_dead_letter_and_the_next_run_takes_the_new_content(bench):
    def edit(row):
        if row["key"] == "04.png":
            bench.put("04.png", "asset edit")

    assert counted(bench.run(before=edit)) == {"inputs": 10, "done": 9, "dead": 1}
    (row,) = [row for row in Ledger(str(bench.output)).latest().to_pylist() if row["status"] == "dead"]
    assert (row["key"], row["stage"], row["reason"]) == ("04.png", "read", "source_changed")
    assert "04.png.out" not in bench.tree()
    assert counted(bench.run()) == {"inputs": 1, "done": 1, "unchanged": 9}
    assert bench.tree()["04.png.out"] == b"asset edit"[::-1]


def test_a_source_gone_after_the_listing_is_missing_and_is_taken_when_it_is_back_with_other_content(bench):
    assert bench.run(before=lambda row: (bench.source / "04.png").unlink(missing_ok=True)).dead == 1
    row = next(row for row in bench.accounts() if row[5] == "dead")
    assert (row[0], row[-2:]) == ("04.png", ("read", "missing"))
    bench.put("04.png", "asset back")
    assert counted(bench.run()) == {"inputs": 1, "done": 1, "unchanged": 9}


def test_a_store_that_fails_to_give_a_source_makes_it_a_dead_letter(bench, monkeypatch):
    def broken(uri, etag):
        raise OSError(errno.EIO, "the disk is tired")

    monkeypatch.setattr(storage, "read_listed", broken)
    with pytest.raises(Refused) as caught:
        read_source(str(bench.source), {"key": "00.png", "etag": "e"})
    assert (caught.value.stage, caught.value.reason) == ("read", "io_error")
    assert "the disk is tired" in caught.value.message


@pytest.mark.parametrize("key", ["a/../b.png", "nul\0.png"])
def test_a_key_that_no_store_of_ours_takes_is_a_dead_letter_and_no_crash(bench, key):
    with pytest.raises(Refused) as caught:
        read_source(str(bench.source), {"key": key, "etag": "e"})
    assert (caught.value.stage, caught.value.reason) == ("read", "bad_name")


def test_a_name_that_is_not_utf8_is_a_dead_letter_and_the_rest_is_done(bench):
    with open(os.fsencode(bench.source) + b"/\xff\xfe.png", "wb") as file:
        file.write(b"asset 1234")
    assert counted(bench.run()) == {"inputs": 11, "done": 10, "dead": 1}
    (row,) = [row for row in bench.accounts() if row[5] == "dead"]
    assert (row[0], row[-1]) == ("\\udcff\\udcfe.png", "name_not_utf8")
    assert counted(bench.run()) == {"unchanged": 11}


def test_too_many_dead_letters_stop_the_run_and_keep_what_was_done(tmp_path):
    bench = Bench(tmp_path, count=40)
    for index in range(0, 40, 2):
        bench.put(f"{index:02d}.png", "bad bytes!")
    with pytest.raises(BudgetExceeded, match="17 of 40") as caught:
        bench.run(unit_bytes=1, max_dead_share=0.4)
    assert caught.value.counts == {"inputs": 33, "done": 16, "skipped": 0, "dead": 17}  # 0.4 of all that was planned
    assert len(bench.accounts()) == 33 and len(bench.tree()) == 16 and bench.num_plans() == 1
    assert counted(bench.run(unit_bytes=1, max_dead_share=0.5)) == {
        "inputs": 7, "done": 4, "dead": 3, "unchanged": 33, "resumed_units": 7,
    }  # fmt: skip
    assert len(bench.accounts()) == 40


@pytest.mark.parametrize(("num_bad", "stops"), [(2, False), (3, True), (10, True)])
def test_the_error_budget_is_that_of_all_planned_assets_and_a_rerun_does_not_wash_it_away(bench, num_bad, stops):
    for index in range(num_bad):
        bench.put(f"{index:02d}.png", "bad bytes!")
    if stops:
        with pytest.raises(BudgetExceeded) as caught:
            bench.run(unit_bytes=1)
        assert caught.value.counts["inputs"] == len(bench.accounts()) == 3  # the bad ones come first
        for _ in range(2):
            with pytest.raises(BudgetExceeded):
                bench.run(unit_bytes=1)
        bench.run(unit_bytes=1, max_dead_share=1.0)
    else:
        assert bench.run(unit_bytes=1).dead == num_bad
    assert len(bench.accounts()) == 10


def test_a_limit_does_the_first_assets_and_calls_the_others_neither_done_nor_unchanged(bench):
    assert counted(bench.run(limit=4)) == {"inputs": 4, "done": 4}
    assert sorted(bench.tree()) == [f"{i:02d}.png.out" for i in range(4)]
    assert counted(bench.run(limit=4)) == {"inputs": 4, "done": 4, "unchanged": 4}
    seen = forecast(bench.work(limit=1))
    assert (seen.listed, seen.todo, seen.unchanged) == (10, 1, 8)
    assert counted(bench.run()) == {"inputs": 2, "done": 2, "unchanged": 8}


def test_a_limit_holds_for_an_interrupted_plan_too(bench, clean, capsys):
    with pytest.raises(Killed):
        bench.run(after=dies_at(4))
    assert counted(bench.run(limit=2)) == {"inputs": 2, "done": 2, "unchanged": 3}
    assert "given up" in capsys.readouterr().err and bench.num_plans() == 0
    bench.run()
    assert (bench.tree(), bench.accounts()) == clean[:2]


def test_a_resumed_plan_uses_up_the_limit(bench):
    with pytest.raises(Killed):
        bench.run(limit=6, after=dies_at(4))
    outcome = bench.run(limit=5)
    assert (outcome.inputs, outcome.resumed_units, len(bench.tree())) == (5, 1, 8)


def test_the_counts_of_a_run_and_its_rest_add_up_to_the_listing(bench):
    with pytest.raises(Killed):
        bench.run(after=dies_at(4))
    outcome = bench.run()
    assert outcome.inputs + outcome.unchanged == 10 and outcome.inputs == outcome.done == 7


def test_an_empty_source_is_nothing_to_do(tmp_path):
    (tmp_path / "source").mkdir()
    assert counted(Bench(tmp_path, count=0).run()) == {}


def test_a_source_that_is_not_there_is_an_error_and_not_an_empty_one(tmp_path):
    with pytest.raises(ValueError, match="must be a folder"):
        Bench(tmp_path, count=0).run()


def test_what_the_run_keeps_for_itself_is_never_taken_for_a_source(bench):
    inside = bench.work(output=str(bench.source))
    arguments = {"work": inside, "source": str(bench.source)}
    with Lease(inside.output, run_id="run") as lease:
        run(inside, make=FakeWorker, arguments=arguments, engine="local", num_workers=1, run_id="r",
            lease=lease, label="t")  # fmt: skip
    storage.publish(storage.join(inside.output, "_diffsr", "x.png"), b"ours")
    assert forecast(inside).listed == 10
    assert json.loads((bench.source / "_diffsr" / "lease.json").read_bytes())["fence"] == 1


def test_an_interrupted_plan_whose_sources_have_changed_is_planned_anew(bench):
    with pytest.raises(Killed):
        bench.run(after=dies_at(4))
    for index in range(3, 10):
        bench.put(f"{index:02d}.png", f"good anew {index}")
    outcome = bench.run(max_dead_share=0.0)
    assert outcome.dead == 0 and outcome.resumed_units == 0 and bench.num_plans() == 0

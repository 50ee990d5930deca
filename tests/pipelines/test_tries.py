"""Laws of work over several nights: what a store did not give is tried again, thrice in all; patterns choose."""

import pytest

from pipelines.images import Refused
from pipelines.ledger import Ledger
from tests.pipelines.test_work import Bench, Killed, counted, dies_at


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


class Store:
    """Refuses the named keys; remembers which were asked for."""

    def __init__(self, *keys, reason="io_transient"):
        self.keys, self.reason, self.asked = keys, reason, []

    def __call__(self, row):
        self.asked.append((row["key"], row["attempts"]))
        if row["key"] in self.keys:
            raise Refused("read", self.reason, "503, again and again")


class Guarded(Bench):
    """A bench whose worker refuses what the store refuses."""

    def night(self, store, **changes):
        from tests.pipelines import test_work as module

        honest = module.read_source
        module.read_source = lambda source, row: store(row) or honest(source, row)
        try:
            return counted(self.run(**changes))
        finally:
            module.read_source = honest

    def tries(self):
        rows = sorted(Ledger(str(self.output)).rows().to_pylist(), key=lambda row: row["order"])
        return [row["attempts"] for row in rows if row["key"] == "05.png"]


def test_what_a_store_did_not_give_is_tried_thrice_and_then_waits_for_retry_failed(tmp_path):
    bench, store = Guarded(tmp_path), Store("05.png")
    assert bench.night(store) == {"inputs": 10, "done": 9, "dead": 1}
    for _ in range(2):
        assert bench.night(store) == {"inputs": 1, "dead": 1, "unchanged": 9}
    assert bench.tries() == [1, 2, 3] and store.asked[10:] == [("05.png", 2), ("05.png", 3)]
    assert bench.night(store) == {"unchanged": 10}
    assert bench.night(store, retry_dead=True) == {"inputs": 1, "dead": 1, "unchanged": 9}
    assert bench.night(store) == {"unchanged": 10} and bench.tries() == [1, 2, 3, 4]
    bench.put("05.png", "asset edit")
    assert bench.night(store) == {"inputs": 1, "dead": 1, "unchanged": 9} and bench.tries()[4:] == [1]
    assert bench.night(Store()) == {"inputs": 1, "done": 1, "unchanged": 9} and bench.tries()[4:] == [1, 2]


@pytest.mark.parametrize("reason", ["io_error", "corrupt", "missing"])
def test_other_dead_letters_are_not_tried_by_themselves(tmp_path, reason):
    bench, store = Guarded(tmp_path), Store("05.png", reason=reason)
    bench.night(store)
    assert bench.night(store) == {"unchanged": 10} and bench.tries() == [1]


def test_a_killed_night_counts_no_try_twice(tmp_path):
    bench, store = Guarded(tmp_path), Store("05.png")
    bench.night(store)
    with pytest.raises(Killed):
        bench.night(store, before=dies_at(0))
    assert bench.night(store) == {"inputs": 1, "dead": 1, "unchanged": 9, "resumed_units": 1}
    assert bench.tries() == [1, 2]


def test_patterns_choose_what_a_night_does_and_what_is_left_out_is_neither_done_nor_gone(bench):
    assert counted(bench.run(include=("0[0-4].png",), exclude=("*2*",))) == {"inputs": 4, "done": 4}
    assert counted(bench.run(max_gone_share=0.0)) == {"inputs": 6, "done": 6, "unchanged": 4}
    assert counted(bench.run(include=("00.png",), max_gone_share=0.0)) == {"unchanged": 1}
    assert counted(bench.run(max_gone_share=0.0)) == {"unchanged": 10}


def test_an_interrupted_plan_that_holds_what_is_now_excluded_is_planned_anew(bench):
    with pytest.raises(Killed):
        bench.run(after=dies_at(4))
    outcome = bench.run(exclude=("07.png",))
    assert (outcome.resumed_units, outcome.done, bench.num_plans()) == (0, 6, 0)
    assert "07.png.out" not in bench.tree() and len(bench.tree()) == 9


def test_an_interrupted_plan_of_what_is_still_chosen_is_continued(bench):
    with pytest.raises(Killed):
        bench.run(after=dies_at(4))
    assert bench.run(exclude=("00.png",)).resumed_units == 3


def test_a_night_with_nothing_to_do_writes_nothing_but_its_lease_and_builds_no_worker(bench, monkeypatch):
    bench.run()

    def stamps():
        paths = [path for path in bench.output.rglob("*") if path.is_file()]
        return {str(p): p.stat().st_mtime_ns for p in paths if "fences" not in p.parts and p.name != "lease.json"}

    before = stamps()
    monkeypatch.setattr("tests.pipelines.test_work.FakeWorker.__init__", lambda *_, **__: pytest.fail("built"))
    assert counted(bench.run()) == {"unchanged": 10} and stamps() == before

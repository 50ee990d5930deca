"""Laws of pipelines.stopping: a run that is asked to end keeps what it did, and the next one does exactly the rest."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines import storage
from pipelines.engine import UnitActor
from pipelines.lease import Lease
from pipelines.ledger import LEAST_BYTES, LISTING_SCHEMA, Ledger, Receipt, open_plans
from pipelines.stopping import Stop, is_marked, marked
from pipelines.work import BudgetExceeded, Work, run

COUNT = 40


class SleepyWorker:
    """Publishes one object per asset after a while; `act` is called with the key first."""

    def __init__(self, *, output, seconds=0.0, bad=(), act=None):
        self.output, self.seconds, self.bad, self.act = output, seconds, bad, act

    def __call__(self, rows, enter):
        return [self.asset(row) for row in rows]

    def asset(self, row):
        if self.act:
            self.act(row["key"])
        time.sleep(self.seconds)
        if row["key"] in self.bad:
            return Receipt(**row, recipe="r", status="dead", stage="decode", reason="corrupt")
        storage.publish(storage.join(self.output, row["key"]), row["key"].encode())
        return Receipt(**row, recipe="r", status="done", out_key=row["key"])


class Forbidden:
    def __init__(self, **_):
        raise AssertionError("no worker is to be built")


def listing():
    keys = [f"{index:02d}.png" for index in range(COUNT)]
    return pa.table([keys, ["e"] * COUNT, [5] * COUNT], schema=LISTING_SCHEMA)


def night(output, *, stop=None, make=SleepyWorker, engine="local", num_workers=1, max_dead_share=0.2, **arguments):
    work = Work(listing=listing, output=str(output), recipe="r", unit_bytes=LEAST_BYTES, max_dead_share=max_dead_share)
    with Lease(work.output, run_id="night") as lease:
        return run(
            work, make=make, arguments={"output": work.output, **arguments} if make is SleepyWorker else {},
            engine=engine, num_workers=num_workers, run_id=f"n{lease.fence}", lease=lease, label="test", stop=stop,
        )  # fmt: skip


def objects(output):
    return sorted(path.name for path in Path(output).glob("*.png"))


def receipts(output):
    return sorted(Ledger(str(output)).rows(["key"])["key"].to_pylist())


def markers(output):
    return list(Path(output).glob("_diffsr/stop-*"))


def check_the_rest(output, begun):
    """The plan is kept; a second night does what was not begun, nothing twice, and then nothing is left to do."""
    assert len(open_plans(Ledger(str(output)))) == 1 and receipts(output) == objects(output)
    again = night(output)
    assert (again.resumed_units, again.done, again.stopped, again.left) == (COUNT - begun, COUNT - begun, "", 0)
    assert receipts(output) == objects(output) == listing()["key"].to_pylist()
    assert night(output, make=SleepyWorker, act=pytest.fail).inputs == 0 and not open_plans(Ledger(str(output)))


def test_the_first_reason_stays_and_no_hours_are_no_deadline():
    with Stop() as stop:
        assert stop.reason == ""
        stop.ask("error_budget")
        stop.ask("sigterm")
        assert stop.reason == "error_budget"


def test_hours_count_from_entry():
    stop = Stop(max_hours=0.2 / 3600)
    time.sleep(0.3)
    assert stop.reason == ""
    with stop:
        assert stop.reason == ""
        time.sleep(0.3)
        assert stop.reason == "max_hours"


@pytest.mark.parametrize("hours", [0, -1, float("nan")])
def test_hours_that_are_none_are_refused(hours):
    with pytest.raises(ValueError, match="max_hours .* must be above 0"):
        Stop(max_hours=hours)


def test_the_handler_of_before_is_back_after_the_body_and_after_the_first_signal():
    calls = []
    before = signal.signal(signal.SIGTERM, lambda *_: calls.append(1))
    try:
        mine = signal.getsignal(signal.SIGTERM)
        with Stop():
            assert signal.getsignal(signal.SIGTERM) != mine
        assert signal.getsignal(signal.SIGTERM) is mine
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert (stop.reason, calls) == ("sigterm", []) and signal.getsignal(signal.SIGTERM) is mine
            os.kill(os.getpid(), signal.SIGTERM)
            assert calls == [1]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_another_thread_than_the_main_one_keeps_the_clock_and_touches_no_signal():
    found, before = [], signal.getsignal(signal.SIGTERM)

    def body():
        with Stop(max_hours=1e-12) as stop:
            found.append((stop.reason, signal.getsignal(signal.SIGTERM) is before))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert found == [("max_hours", True)]


def test_a_second_sigterm_ends_the_process_at_once():
    code = "import time; from pipelines.stopping import Stop\nwith Stop():\n print('in', flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout.readline() == b"in\n"
    child.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert child.poll() is None
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=10) == -signal.SIGTERM
    assert b"a second one ends the run" in child.stderr.read()


def test_sigterm_finishes_the_unit_in_flight_and_leaves_the_rest_to_the_next_night(tmp_path):
    def act(key):
        if key == "05.png":
            os.kill(os.getpid(), signal.SIGTERM)

    with Stop() as stop:
        outcome = night(tmp_path, stop=stop, act=act)
    assert (outcome.done, outcome.stopped, outcome.left) == (6, "sigterm", COUNT - 6)
    check_the_rest(tmp_path, 6)


def test_the_deadline_ends_a_night_and_the_next_one_continues_its_plan(tmp_path):
    with Stop(max_hours=0.35 / 3600) as stop:
        outcome = night(tmp_path, stop=stop, seconds=0.1)
    assert outcome.stopped == "max_hours" and 1 <= outcome.done <= 5 and outcome.left == COUNT - outcome.done
    check_the_rest(tmp_path, outcome.done)


def test_a_stop_during_a_continued_plan_adds_no_second_plan(tmp_path):
    for begun in (3, 6):
        stop = Stop()

        def act(key, stop=stop, last=f"{begun - 1:02d}.png"):
            if key == last:
                stop.ask("sigterm")

        outcome = night(tmp_path, stop=stop, act=act)
        assert (outcome.done, outcome.left, outcome.stopped) == (3, COUNT - begun, "sigterm")
    check_the_rest(tmp_path, 6)


def test_a_stop_before_the_first_unit_builds_no_worker(tmp_path):
    stop = Stop()
    stop.ask("max_hours")
    assert night(tmp_path, stop=stop, make=Forbidden).inputs == 0 and objects(tmp_path) == []


def test_a_stop_that_comes_when_all_is_done_stops_nothing(tmp_path):
    stop = Stop()
    outcome = night(tmp_path, stop=stop, act=lambda key: stop.ask("sigterm") if key == "39.png" else None)
    assert (outcome.done, outcome.stopped, outcome.left) == (COUNT, "", 0) and not open_plans(Ledger(str(tmp_path)))


def test_an_exceeded_budget_tells_what_is_left(tmp_path):
    with pytest.raises(BudgetExceeded) as caught:
        night(tmp_path, bad=[f"{index:02d}.png" for index in range(0, COUNT, 2)])
    found = caught.value.outcome
    assert (found.dead, found.done, found.stopped, found.left) == (9, 8, "error_budget", COUNT - 17)
    assert caught.value.counts == {"inputs": 17, "done": 8, "skipped": 0, "dead": 9}


def test_a_marker_is_there_while_the_body_drains_and_gone_afterwards(tmp_path):
    stop, uri = Stop(), str(tmp_path / "stop-1")
    with marked(stop, uri):
        time.sleep(0.5)
        assert not is_marked(uri)
        stop.ask("sigterm")
        deadline = time.monotonic() + 5
        while not is_marked(uri):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert Path(uri).read_text() == "sigterm"
    assert not is_marked(uri)


def test_an_actor_begins_no_unit_after_the_marker_and_asks_no_more(tmp_path, monkeypatch):
    stop = Stop()
    stop.ask("sigterm")
    night(tmp_path, stop=Stop(), max_dead_share=1.0, act=None)
    plan_uri = tmp_path / "_diffsr" / "plans" / "p.parquet"
    from pipelines import ledger as module

    rows = listing().append_column("attempts", pa.array([1] * COUNT, pa.int32()))
    monkeypatch.setattr(module.uuid, "uuid4", lambda: type("U", (), {"hex": "p"}))
    units = module.pack(rows, recipe="r", model="", unit_bytes=LEAST_BYTES)
    module.save_plan(Ledger(str(tmp_path)), units, recipe="r", model="", fence=9)
    marker, done = str(tmp_path / "_diffsr" / "stop-9"), []
    actor = UnitActor(SleepyWorker, {"output": str(tmp_path), "act": done.append}, str(plan_uri), marker)
    assert [row["key"] for row in json.loads(actor({"index": 3})["receipts"])] == ["03.png"]
    storage.publish(marker, b"sigterm")
    assert json.loads(actor({"index": 4})["receipts"]) == []
    monkeypatch.setattr(storage, "exists", lambda uri: pytest.fail("asked again"))
    assert json.loads(actor({"index": 5})["receipts"]) == [] and done == ["03.png"]


def test_sigterm_on_ray_records_what_was_in_flight_and_nothing_is_done_twice(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # where Ray's workers find this module
    ended = threading.Event()

    def kill_after_the_third():
        while not ended.wait(0.05):
            if len(objects(tmp_path)) >= 3:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    threading.Thread(target=kill_after_the_third, daemon=True).start()
    with Stop() as stop:
        try:
            outcome = night(tmp_path, stop=stop, engine="ray", num_workers=2, seconds=0.3)
        finally:
            ended.set()
    assert outcome.stopped == "sigterm" and 3 <= outcome.done < COUNT - 5
    assert outcome.left == COUNT - outcome.done and not markers(tmp_path)
    check_the_rest(tmp_path, outcome.done)

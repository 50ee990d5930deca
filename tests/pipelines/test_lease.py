"""Laws of pipelines.lease: one holder at a time, fences grow, the dead are replaced and the replaced are shut out."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipelines import lease as lease_module
from pipelines import storage
from pipelines.lease import Lease, LeaseHeld

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import sys, time
from pipelines.lease import Lease
with Lease(sys.argv[1], run_id="victim", expiry_s=600):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def output(tmp_path):
    return str(tmp_path / "out")


def document(output):
    return json.loads(storage.read_bytes(storage.join(output, "_diffsr", "lease.json")))


def wait_until(condition, *, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


@pytest.fixture
def heartless(monkeypatch):
    monkeypatch.setattr(Lease, "_beat", lambda self: None)


def test_of_two_holders_at_once_the_second_is_refused_and_told_who_holds(output):
    with Lease(output, run_id="first") as lease:
        with pytest.raises(LeaseHeld, match="held by run first"), Lease(output, run_id="second"):
            pytest.fail("two runs held one output")
        lease.check()
        assert lease.holder()["run_id"] == "first"
    assert lease.holder() is None


def test_after_release_the_next_fence_is_higher(output):
    fences = []
    for _ in range(3):
        with Lease(output, run_id="run") as lease:
            fences.append(lease.fence)
    assert fences == [1, 2, 3]


def test_a_run_that_fails_gives_the_lease_back(output):
    with pytest.raises(KeyboardInterrupt), Lease(output, run_id="first"):
        raise KeyboardInterrupt
    with Lease(output, run_id="second") as lease:
        assert lease.fence == 2


def test_outputs_do_not_share_a_lease(output, tmp_path):
    with Lease(output, run_id="first"), Lease(str(tmp_path / "other"), run_id="second") as other:
        assert other.fence == 1


def test_an_expired_lease_is_taken_over_and_its_holder_is_shut_out(output, heartless):
    with Lease(output, run_id="old", expiry_s=0.05) as old:
        old.check()
        with pytest.raises(LeaseHeld), Lease(output, run_id="early"):
            pytest.fail("the lease had not expired")
        time.sleep(0.06)
        new = Lease(output, run_id="new")
        new.__enter__()
        assert new.fence == old.fence + 1
        with pytest.raises(LeaseHeld, match="old lost its lease"):
            old.check()
        new.check()
    # The old holder has left its context: that must not have released the new one's lease.
    assert document(output)["fence"] == new.fence
    with pytest.raises(LeaseHeld, match="held by run new"), Lease(output, run_id="third"):
        pytest.fail("the old holder released the lease of the new one")


def test_a_late_renewal_by_a_shut_out_holder_does_not_hide_the_new_one(output, heartless):
    with Lease(output, run_id="old", expiry_s=0.01) as old:
        stale = old._document(expires=0.0)
        time.sleep(0.02)
        with Lease(output, run_id="new") as new:
            storage.publish(storage.join(output, "_diffsr", "lease.json"), stale)
            assert new.holder()["run_id"] == "new"


def test_the_lease_of_a_killed_process_of_this_machine_is_taken_at_once(output):
    command = [sys.executable, "-c", HOLD, output]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as victim:
        assert victim.stdout is not None and victim.stdout.readline() == b"held\n"
        with pytest.raises(LeaseHeld, match="held by run victim"), Lease(output, run_id="heir"):
            pytest.fail("the victim was alive")
        victim.kill()
        victim.wait()
        started = time.monotonic()
        with Lease(output, run_id="heir") as lease:
            assert lease.fence == 2
    assert time.monotonic() - started < 1


def test_the_lease_of_another_machine_is_respected_until_it_expires(output, heartless, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("socket.gethostname", lambda: "elsewhere")
        patch.setattr("os.getpid", lambda: 2**22 + 1)  # no such process here, which must not matter
        Lease(output, run_id="far", expiry_s=0.3).__enter__()
    with pytest.raises(LeaseHeld, match="far on elsewhere"), Lease(output, run_id="near"):
        pytest.fail("the far run may be alive")
    time.sleep(0.3)
    with Lease(output, run_id="near") as lease:
        assert lease.fence == 2


@pytest.mark.parametrize("machine", ["another boot pid:[1]", ""])
def test_a_pid_of_another_boot_or_namespace_or_of_nowhere_known_proves_nothing(output, heartless, monkeypatch, machine):
    with monkeypatch.context() as patch:
        patch.setattr(lease_module, "_machine", lambda: machine)
        patch.setattr("os.getpid", lambda: 2**22 + 1)  # no such process here, under the same host name
        Lease(output, run_id="container", expiry_s=600).__enter__()
        if machine:
            patch.setattr(lease_module, "_machine", lambda: "this boot pid:[1]")
        with pytest.raises(LeaseHeld, match="held by run container"), Lease(output, run_id="near"):
            pytest.fail("the run in the other container may be alive")


def test_a_pid_that_another_process_has_by_now_is_not_the_holder(output, heartless, monkeypatch):
    started = lease_module._started
    with monkeypatch.context() as patch:
        patch.setattr(lease_module, "_started", lambda pid: started(pid) - 1)
        Lease(output, run_id="ended", expiry_s=600).__enter__()
    with Lease(output, run_id="next") as lease:
        assert lease.fence == 2


def test_the_start_of_a_process_is_read_past_a_hostile_name(monkeypatch):
    with subprocess.Popen(["sleep", "60"]) as child:
        first, again = (lease_module._started(child.pid) for _ in "ab")
        stat = Path(f"/proc/{child.pid}/stat").read_text()
        child.kill()
    ticks = float(Path("/proc/uptime").read_text().split()[0]) * os.sysconf("SC_CLK_TCK")
    assert first == again and -1 <= ticks - first < 6000  # whole ticks: the clock may be one behind
    assert lease_module._started(2**22 + 1) is None
    monkeypatch.setattr(Path, "read_text", lambda self, errors: stat.replace("(sleep)", "(a) b (1 2 3)"))
    assert lease_module._started(1) == first


def test_a_run_killed_while_it_enters_does_not_block_the_output(output, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("os.getpid", lambda: 2**22 + 1)
        patch.setattr(storage, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            Lease(output, run_id="cut short", expiry_s=600).__enter__()
    with Lease(output, run_id="next") as lease:
        assert lease.fence == 2


@pytest.mark.parametrize("round_", range(5))
def test_of_eight_that_ask_at_one_moment_exactly_one_wins(output, round_):
    barrier, release, won, refused = threading.Barrier(8), threading.Event(), [], []

    def contend(number):
        barrier.wait()
        try:
            with Lease(output, run_id=f"run-{number}") as lease:
                won.append(lease.fence)
                release.wait(5)
                lease.check()
        except LeaseHeld:
            refused.append(number)

    threads = [threading.Thread(target=contend, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(won) + len(refused) == 8)
    assert (won, len(refused)) == ([1], 7)
    release.set()
    for thread in threads:
        thread.join()


def test_a_rival_that_enters_after_our_look_at_the_holder_keeps_the_lease(output, monkeypatch):
    rival, look = Lease(output, run_id="rival"), Lease._last

    def looked(self):
        found = look(self)
        if self is not rival:
            rival.__enter__()
        return found

    monkeypatch.setattr(Lease, "_last", looked)
    with pytest.raises(LeaseHeld, match="at this moment"), Lease(output, run_id="late"):
        pytest.fail("two runs hold one output")
    rival.check()
    rival.__exit__(None, None, None)


def test_a_rival_that_has_its_fence_but_no_lease_file_yet_keeps_the_lease(output, monkeypatch):
    publish, seen = storage.publish, []

    def slowly(uri, data):
        if not seen:
            seen.append(uri)
            with pytest.raises(LeaseHeld, match="held by run rival"), Lease(output, run_id="late"):
                pytest.fail("two runs hold one output")
        publish(uri, data)

    monkeypatch.setattr(storage, "publish", slowly)
    with Lease(output, run_id="rival") as rival:
        assert len(seen) == 1
        rival.check()


def test_a_fence_of_our_own_whose_answer_was_lost_is_ours(output, monkeypatch):
    create = storage.create
    monkeypatch.setattr(storage, "create", lambda uri, data: create(uri, data) and False)
    with Lease(output, run_id="run") as lease:
        assert (lease.fence, lease.holder()["run_id"]) == (1, "run")


def test_the_heart_renews_a_lease_beyond_its_expiry(output):
    with Lease(output, run_id="long", expiry_s=0.2) as lease:
        first = lease.holder()["expires"]
        wait_until(lambda: document(output)["expires"] > first + 0.4)
        assert lease.holder()["run_id"] == "long"
        with pytest.raises(LeaseHeld), Lease(output, run_id="second"):
            pytest.fail("the holder was alive")


def test_one_failed_renewal_does_not_stop_the_heart(output, monkeypatch, capsys):
    publish, failed = storage.publish, threading.Event()

    def flaky(uri, data):
        if threading.current_thread() is not threading.main_thread() and not failed.is_set():
            failed.set()
            raise OSError("the store is away")
        publish(uri, data)

    monkeypatch.setattr(storage, "publish", flaky)
    with Lease(output, run_id="long", expiry_s=0.2) as lease:
        first = document(output)["expires"]
        wait_until(lambda: document(output)["expires"] > first + 0.1)
        assert failed.is_set() and lease.holder() is not None
    assert "could not be renewed" in capsys.readouterr().err


def test_the_heart_of_a_shut_out_holder_stops(output):
    with Lease(output, run_id="old", expiry_s=0.1) as old:
        storage.create(storage.join(output, "_diffsr", "fences", f"{2:010d}"), b"{}")
        old._thread.join(5)
        assert not old._thread.is_alive()
        before = storage.read_bytes(storage.join(output, "_diffsr", "lease.json"))
    assert storage.read_bytes(storage.join(output, "_diffsr", "lease.json")) == before


@pytest.mark.parametrize("died", [True, False], ids=["killed", "gave it back"])
def test_who_follows_a_killed_holder_removes_its_half_written_files_and_no_other(output, died):
    left = ["data/.tmp-0123456789abcdef", "_diffsr/ledger/.tmp-fedcba9876543210"]
    kept = ["data/a.parquet", ".tmp-of-the-user", ".tmp-0123456789abcdef0"]
    with Lease(output, run_id="first") as lease:
        died_with = storage.read_bytes(lease._uri)
        for name in left + kept:
            storage.publish(storage.join(output, name), b"x")
    if died:
        document = {**json.loads(died_with), "expires": time.time() - 1}
        storage.publish(lease._uri, json.dumps(document).encode())
    with Lease(output, run_id="second"):
        present = [name for name in left + kept if storage.exists(storage.join(output, name))]
    assert present == (kept if died else left + kept)

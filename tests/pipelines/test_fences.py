"""Laws of the fences of pipelines.lease: old ones go, the newest counts, and who is behind it replaces nothing."""

import json
import os
import time
import uuid

import pytest

from pipelines import lease as lease_module
from pipelines import storage
from pipelines.lease import KEPT_FENCES, Fence, Lease, LeaseHeld, publish_fenced


@pytest.fixture
def output(tmp_path):
    return str(tmp_path / "out")


def document(output):
    return json.loads(storage.read_bytes(storage.join(output, "_diffsr", "lease.json")))


def fences(output):
    return [int(name) for name in storage.list_names(storage.join(output, "_diffsr", "fences"))]


def test_old_fences_are_removed_and_the_newest_still_counts(output):
    for number in range(1, KEPT_FENCES + 6):
        with Lease(output, run_id="night") as held:
            assert held.fence == number
    assert fences(output) == list(range(6, KEPT_FENCES + 6))


def test_a_run_that_slept_through_many_nights_after_its_look_takes_no_removed_fence(output, monkeypatch):
    look, slept = Lease._last, []

    def looked(self):
        found = look(self)
        if self.run_id == "sleeper" and not slept:
            slept.append(True)
            for _ in range(KEPT_FENCES + 3):
                with Lease(output, run_id="night"):
                    pass
            Lease(output, run_id="newest").__enter__()
        return found

    monkeypatch.setattr(Lease, "_last", looked)
    with pytest.raises(LeaseHeld, match="meanwhile"), Lease(output, run_id="sleeper"):
        pytest.fail("it held a fence below the newest")
    assert document(output)["run_id"] == "newest" and min(fences(output)) > 1


def test_a_fence_travels_and_is_shut_out_by_a_newer_one_alone(output):
    with Lease(output, run_id="first") as held:
        fence = Fence(*json.loads(json.dumps([output, held.fence])))
        fence.check()
    fence.check()  # given back, and nobody has come since
    with Lease(output, run_id="second"), pytest.raises(LeaseHeld, match="fence 1 of .*the newest"):
        fence.check()


@pytest.mark.parametrize("as_file", [False, True], ids=["bytes", "file"])
def test_a_shut_out_worker_replaces_nothing(output, tmp_path, as_file):
    def content(data):
        (tmp_path / "local").write_bytes(data)
        return tmp_path / "local" if as_file else data

    uri, old, new = f"{output}/deep/a.png", Fence(output, 1), Fence(output, 2)
    storage.create(f"{output}/_diffsr/fences/{2:010d}", b"{}")
    publish_fenced(uri, content(b"first"), new)
    with pytest.raises(LeaseHeld):
        publish_fenced(uri, content(b"late"), old)
    assert storage.read_bytes(uri) == b"first"
    publish_fenced(uri, content(b"second"), new)
    assert storage.read_bytes(uri) == b"second" and os.listdir(f"{output}/deep") == ["a.png"]


def test_a_store_without_atomic_creation_is_warned_of_and_this_is_kept(capsys, monkeypatch):
    monkeypatch.setattr(lease_module, "SETTLE_S", 0.01)
    output = f"memory://{uuid.uuid4().hex}"
    for _ in range(2):
        with Lease(output, run_id="night"):
            assert json.loads(storage.read_bytes(f"{output}/_diffsr/store.json")) == {"conditional_create": False}
        assert "let one scheduler start one run at a time" in capsys.readouterr().err
        monkeypatch.setattr(storage, "honours_create", lambda uri: pytest.fail("it was probed twice"))


def test_a_fence_on_a_store_that_a_rival_replaced_meanwhile_is_the_rivals(monkeypatch):
    output = f"memory://{uuid.uuid4().hex}"
    rival = json.dumps({"token": "rival", "fence": 1}).encode()
    monkeypatch.setattr(time, "sleep", lambda seconds: storage.publish(f"{output}/_diffsr/fences/{1:010d}", rival))
    with pytest.raises(LeaseHeld, match="at this moment"), Lease(output, run_id="late"):
        pytest.fail("two runs hold one output")
    assert storage.read_bytes(f"{output}/_diffsr/fences/{1:010d}") == rival
    assert not storage.exists(f"{output}/_diffsr/lease.json")

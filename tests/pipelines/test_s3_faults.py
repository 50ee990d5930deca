"""Laws of storage and lease before a store that breaks: the Swift S3 server behind a proxy that injects faults."""

import contextlib
import hashlib
import json
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import s3fs

from pipelines import lease, retries, storage, transfers
from pipelines.lease import Fence, Lease, LeaseHeld, publish_fenced
from tests import s3_proxy
from tests.s3_server import S3Server

pytestmark = pytest.mark.s3
QUICK = retries.Settings(tries=10, total_s=20.0, first_s=0.01, longest_s=0.05, connect_s=2.0, read_s=5.0)
HASTY = replace(QUICK, tries=3, total_s=1.0, read_s=0.3)
Ask = Callable[[], object]


@pytest.fixture(scope="module")
def bucket(s3: S3Server) -> str:
    s3fs.S3FileSystem(endpoint_url=s3.endpoint_url, use_listings_cache=False).mkdir("faults")
    return "s3://faults"


@pytest.fixture
def prefix(bucket: str) -> str:
    return f"{bucket}/{uuid.uuid4().hex}"


@pytest.fixture(scope="module")
def front(s3: S3Server) -> Iterator[s3_proxy.Proxy]:
    with s3_proxy.serve(s3.endpoint_url, lambda *_: "pass") as found:
        yield found


@pytest.fixture
def proxy(front: s3_proxy.Proxy, monkeypatch: pytest.MonkeyPatch) -> s3_proxy.Proxy:
    """All requests of the test go through it; it breaks nothing until the test says what."""
    front.rule, front.seen = lambda *_: "pass", []
    monkeypatch.setenv("AWS_ENDPOINT_URL", front.endpoint_url)
    monkeypatch.setattr(retries, "settings", QUICK)
    monkeypatch.setattr(lease, "SETTLE_S", 0.2)
    return front


def noise(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)


def first(fault: str, method: str, *, times: int = 1) -> s3_proxy.Rule:
    """The first requests of a method meet a fault."""
    left = [times]

    def rule(asked: str, path: str, count: int) -> str:
        if asked == method and left[0]:
            left[0] -= 1
            return fault
        return "pass"

    return rule


def visit(root: str, folder: Path) -> dict[str, Any]:
    """Use every operation of storage below `root`; return all that it gave."""
    contents = {f"d{number % 3}/{number} ü.png": noise(number, 1500 * number) for number in range(5)}
    contents["large.bin"] = noise(99, 11 << 20)  # three parts
    created = [storage.create(f"{root}/{key}", data) for key, data in contents.items() if key != "large.bin"]
    again = [storage.create(f"{root}/{key}", data + b"!") for key, data in contents.items() if key != "large.bin"]
    storage.publish(f"{root}/d0/0 ü.png", b"replaced")
    (folder / "large.bin").write_bytes(contents["large.bin"])
    storage.publish_file(f"{root}/large.bin", folder / "large.bin")
    storage.delete(f"{root}/d1/1 ü.png")
    storage.delete(f"{root}/never there")
    listed = list(storage.list_objects(root))
    with storage.open_file(f"{root}/large.bin", block_bytes=1 << 20) as file:
        sampled = [(file.seek(place), file.read(1000)) for place in (9 << 20, 3, 6 << 20)]
    missing = f"{root}/missing.png"
    asks: list[Ask] = [lambda: storage.read_bytes(missing), lambda: list(storage.stream_listed(missing, None))]
    for ask in asks:
        with pytest.raises(FileNotFoundError):
            ask()
    return {
        "created": (created, again),
        "listed": [(item.key, item.etag, item.size) for item in listed],
        "names": storage.list_names(root),
        "read": {item.key: storage.read_bytes(f"{root}/{item.key}") for item in listed},
        "streamed": {item.key: storage.read_listed(f"{root}/{item.key}", item.etag) for item in listed},
        "looked up": [replace(storage.look_up(f"{root}/{item.key}"), key=item.key) == item for item in listed],
        "sizes": [storage.size(f"{root}/{item.key}") for item in listed] + [storage.size(missing)],
        "exists": [storage.exists(f"{root}/{name}") for name in ("large.bin", "d0", "d1/1 ü.png")],
        "sampled": sampled,
        "none": storage.list_names(f"{root}/none"),
    }


def test_with_a_fifth_of_the_requests_broken_every_operation_gives_what_it_gives_without(
    prefix: str, proxy: s3_proxy.Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers, "PART_BYTES", 5 << 20)
    expected = visit(f"{prefix}/clean", tmp_path)
    assert expected["created"] == ([True] * 5, [False] * 5) and all(expected["looked up"])
    assert expected["exists"] == [True, False, False] and len(expected["listed"]) == 5
    num_clean = len(proxy.seen)
    proxy.rule = s3_proxy.randomly(0.2, seed=1)
    assert visit(f"{prefix}/broken", tmp_path) == expected
    faults = [fault for _, _, fault in proxy.seen[num_clean:]]
    assert len(faults) > 1.1 * num_clean and set(faults) == {"pass", "busy", "error", "reset", "lost", "cut"}


@pytest.mark.parametrize("fault", ["busy", "error", "reset", "lost", "cut", "slow"])
def test_what_the_client_raises_for_each_fault_passes_and_a_refusal_or_an_absence_stays(
    fault: str, prefix: str, proxy: s3_proxy.Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "settings", HASTY)
    filesystem, path = storage.open_filesystem(f"{prefix}/a.png")
    filesystem.pipe_file(path, bytes(100_000))
    asks: dict[str, Ask] = {
        "GET": lambda: filesystem.call_s3("list_objects_v2", Bucket="faults"),
        "HEAD": lambda: filesystem.info(path),
        "PUT": lambda: filesystem.pipe_file(path, b"x"),
        "DELETE": lambda: filesystem.rm_file(path),
    }
    for method, ask in asks.items():
        for broken, passes in ((fault, True), ("denied", False)):
            # Twice: aiohttp itself asks once more where a connection that it has kept open is gone.
            proxy.rule, before = first(broken, method, times=2), len(proxy.seen)
            with pytest.raises(Exception) as caught:
                ask()
            assert retries.is_transient(caught.value) is passes, (method, broken, caught.value)
            assert len(proxy.seen) <= before + (2 if broken in ("reset", "lost", "cut") else 1)  # none below ours else
    with pytest.raises(FileNotFoundError) as missing:
        filesystem.cat_file(f"{path}.no")
    assert not retries.is_transient(missing.value)


def test_a_refusal_is_asked_for_once(prefix: str, proxy: s3_proxy.Proxy) -> None:
    proxy.rule = lambda *_: "denied"
    uri = f"{prefix}/a.png"
    asks: list[Ask] = [lambda: storage.read_bytes(uri), lambda: storage.publish(uri, b""), lambda: storage.size(uri)]
    asks += [lambda: storage.list_names(prefix), lambda: storage.delete(uri), lambda: storage.create(uri, b"")]
    for number, ask in enumerate(asks, 1):
        with pytest.raises(PermissionError):
            ask()
        assert len(proxy.seen) == number


def test_a_read_that_is_cut_goes_on_where_it_was(prefix: str, proxy: s3_proxy.Proxy) -> None:
    data, uri = noise(5, 17 << 20), f"{prefix}/a.bin"
    storage.publish(uri, data)
    (listed,) = storage.list_objects(prefix)
    proxy.rule = lambda method, _, count: ("cut", "reset", "pass")[count % 3] if method == "GET" else "pass"
    num_before, digest = len(proxy.seen), hashlib.sha256()
    for piece in storage.stream_listed(uri, listed.etag):
        digest.update(piece)
    assert digest.digest() == hashlib.sha256(data).digest()
    assert [fault for method, _, fault in proxy.seen[num_before:] if method == "GET"].count("cut") >= 3


def test_a_stream_of_an_object_that_is_replaced_ends_in_changed_and_mixes_nothing(
    prefix: str, proxy: s3_proxy.Proxy
) -> None:
    old, uri = noise(6, 9 << 20), f"{prefix}/a.bin"
    storage.publish(uri, old)
    (listed,) = storage.list_objects(prefix)
    ends: list[tuple[Ask, type[OSError]]] = [(lambda: storage.publish(uri, noise(7, 9 << 20)), storage.Changed)]
    ends += [(lambda: storage.delete(uri), FileNotFoundError)]
    for end, error in ends:
        proxy.rule = lambda *_: "pass"
        storage.publish(uri, old)
        stream = storage.stream_listed(uri, listed.etag)
        came = next(stream)
        end()
        proxy.rule = first("cut", "GET")
        with pytest.raises(error):
            for piece in stream:
                came += piece
        assert old.startswith(came) and 1 << 20 <= len(came) < len(old)
    proxy.rule = lambda *_: "pass"
    storage.publish(uri, old)
    with storage.open_file(uri, block_bytes=1 << 20) as file:
        assert file.read(10) == old[:10]
        storage.publish(uri, noise(7, 9 << 20))
        with pytest.raises(storage.Changed):
            file.read()
    with pytest.raises(storage.Changed, match="was listed with"):
        next(storage.stream_listed(uri, listed.etag))


def test_a_create_whose_answer_is_lost_is_ours_exactly_once(prefix: str, proxy: s3_proxy.Proxy) -> None:
    proxy.rule = first("lost", "PUT")
    assert storage.create(f"{prefix}/lease", b"first") is True
    assert [fault for method, _, fault in proxy.seen if method == "PUT"] == ["lost", "pass"]
    proxy.rule = first("lost", "PUT", times=3)
    assert storage.create(f"{prefix}/stubborn", b"first") is True
    proxy.rule = first("lost", "PUT")
    assert storage.create(f"{prefix}/lease", b"other") is False  # ours was refused, and what is there is not ours
    assert storage.read_bytes(f"{prefix}/lease") == b"first"


def test_of_four_that_ask_for_the_lease_at_one_moment_one_holds_it_although_answers_are_lost(
    prefix: str, proxy: s3_proxy.Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This very server lets several through that create one object at the same moment."""
    proxy.rule = lambda method, _, count: "lost" if method == "PUT" and count % 3 else "pass"
    barrier, done, won = threading.Barrier(4), threading.Barrier(4), []

    def contend(number: int) -> None:
        held = Lease(prefix, run_id=f"run {number}")
        storage.list_names(prefix)  # each thread has its own client, made before the race
        barrier.wait(20)
        with contextlib.suppress(LeaseHeld):
            held.__enter__()
            held.check()
            won.append(held)
        done.wait(20)

    threads = [threading.Thread(target=contend, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (holder,) = won
    assert (holder.holder() or {})["run_id"] == holder.run_id
    document = json.loads(storage.read_bytes(f"{prefix}/_diffsr/fences/0000000001"))
    storage.publish(f"{prefix}/_diffsr/fences/0000000001", json.dumps({**document, "token": "a rival's"}).encode())
    with pytest.raises(LeaseHeld, match="lost its lease"):
        holder.check()  # its request arrived later than we waited: the object that stayed decides
    before = storage.read_bytes(f"{prefix}/_diffsr/lease.json")
    holder.__exit__(None, None, None)
    assert storage.read_bytes(f"{prefix}/_diffsr/lease.json") == before


@pytest.mark.parametrize("death", ["refused", "busy", "slow"])
def test_a_dead_store_is_a_transient_error_within_the_bound(
    death: str, prefix: str, proxy: s3_proxy.Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "settings", HASTY)
    if death == "refused":
        with socket.socket() as unheard:
            unheard.bind(("127.0.0.1", 0))
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unheard.getsockname()[1]}")
    else:
        proxy.rule = lambda *_: death
    uri = f"{prefix}/a.png"
    asks: list[Ask] = [lambda: storage.read_bytes(uri), lambda: storage.publish(uri, b""), lambda: storage.delete(uri)]
    asks += [lambda: storage.list_names(prefix), lambda: storage.size(uri), lambda: storage.create(uri, b"")]
    assert storage.open_filesystem(uri)[0].s3  # the client itself takes a moment to be made
    for number, ask in enumerate(asks[: 3 if death == "slow" else 6], 1):
        start = time.monotonic()
        with pytest.raises(storage.TransientError, match=r"failed [23] times in") as caught:
            ask()
        assert time.monotonic() - start < 3.0 and isinstance(caught.value, OSError)
        assert death != "busy" or len(proxy.seen) == 3 * number


def test_an_upload_in_parts_survives_a_lost_answer_to_each_of_its_requests(
    prefix: str, proxy: s3_proxy.Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfers, "PART_BYTES", 5 << 20)
    data, asked = noise(8, 11 << 20), set()

    def once_each(method: str, path: str, count: int) -> str:
        fault = "pass" if (method, path) in asked else "lost"
        asked.add((method, path))
        return fault

    proxy.rule = once_each
    (tmp_path / "a.bin").write_bytes(data)
    storage.publish_file(f"{prefix}/a.bin", tmp_path / "a.bin")
    storage.publish(f"{prefix}/b.bin", data[::-1])
    proxy.rule = lambda *_: "pass"
    assert storage.read_bytes(f"{prefix}/a.bin") == data == storage.read_bytes(f"{prefix}/b.bin")[::-1]
    assert storage.list_names(prefix) == ["a.bin", "b.bin"]


def test_a_store_is_probed_once_per_output_and_one_that_replaces_is_warned_of_each_time(
    prefix: str, proxy: s3_proxy.Proxy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert storage.honours_create(prefix) is True and storage.list_names(prefix) == []
    put = transfers._put
    for output, honoured in ((f"{prefix}/good", True), (f"{prefix}/bad", False)):
        if not honoured:  # the header is signed, so no proxy can take it away
            monkeypatch.setattr(transfers, "_put", lambda store, path, data, **_: put(store, path, data))
        for night in range(2):
            before = len(proxy.seen)
            with Lease(output, run_id="night"):
                assert json.loads(storage.read_bytes(f"{output}/_diffsr/store.json")) == {
                    "conditional_create": honoured
                }
            probes = [path for method, path, _ in proxy.seen[before:] if method == "PUT" and ".tmp-" in path]
            assert len(probes) == (0 if night else 2)
            said = capsys.readouterr().err
            assert ("let one scheduler start one run at a time" in said) is not honoured
        assert [name for name in storage.list_names(f"{output}/_diffsr") if "fences" not in name] == [
            "lease.json", "store.json",
        ]  # fmt: skip
    filesystem, path = storage.open_filesystem(prefix)
    assert not any(".tmp-" in name for name in filesystem.find(path))


def test_the_lease_holds_and_is_given_back_with_a_fifth_of_the_requests_broken(
    prefix: str, proxy: s3_proxy.Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.rule = s3_proxy.randomly(0.2, seed=3)
    monkeypatch.setattr(lease, "KEPT_FENCES", 2)
    for night in range(1, 4):
        with Lease(prefix, run_id=f"night {night}") as held:
            held.check()
            assert held.fence == night
            if night > 1:
                continue
            with pytest.raises(LeaseHeld, match=f"held by run night {night}"):
                Lease(prefix, run_id="second").__enter__()
        assert held.holder() is None
    assert storage.list_names(f"{prefix}/_diffsr/fences") == ["0000000002", "0000000003"]


def test_what_replaces_an_object_is_written_under_the_newest_fence_alone(
    prefix: str, proxy: s3_proxy.Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "CREATE_BYTES", 1 << 20)
    large = tmp_path / "large.tif"
    large.write_bytes(noise(9, 2 << 20))
    (tmp_path / "small.png").write_bytes(b"small")
    storage.create(f"{prefix}/_diffsr/fences/{7:010d}", b"{}")
    old, new = Fence(prefix, 6), Fence(prefix, 7)
    publish_fenced(f"{prefix}/a.png", b"absent, so the fence does not matter", old)
    publish_fenced(f"{prefix}/b.png", tmp_path / "small.png", old)
    before = storage.list_names(prefix), storage.read_bytes(f"{prefix}/a.png")
    cases: list[tuple[str, lease.Content]] = [("a.png", b"b"), ("a.png", tmp_path / "small.png"), ("a.png", large)]
    cases += [("new.tif", large), ("new.tif", bytes(2 << 20))]  # no store is asked to create what is so large
    for name, content in cases:
        with pytest.raises(LeaseHeld, match="fence 6 of"):
            publish_fenced(f"{prefix}/{name}", content, old)
        assert (storage.list_names(prefix), storage.read_bytes(f"{prefix}/a.png")) == before
    for _, content in cases[:3]:
        publish_fenced(f"{prefix}/a.png", content, new)
        expected = content if isinstance(content, bytes) else Path(content).read_bytes()
        assert storage.read_bytes(f"{prefix}/a.png") == expected

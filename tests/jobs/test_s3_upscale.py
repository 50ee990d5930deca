"""Upscaling on a real S3 server that fails now and then, and keys that only an object store has."""

import json
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import s3fs

from pipelines import lease, retries, storage
from pipelines.ledger import Ledger
from tests import s3_proxy
from tests.core.tiny import ANCHORED
from tests.jobs.conftest import Ran, png, tree
from tests.jobs.tiny import NIGHT, model_folder, outcomes, waves
from tests.s3_server import S3Server

pytestmark = pytest.mark.s3
QUICK = retries.Settings(tries=8, total_s=20.0, first_s=0.01, longest_s=0.05, connect_s=2.0, read_s=5.0)
EACH = ("--unit-megabytes", 0.05)  # units of three images


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"), ANCHORED)


@pytest.fixture(scope="module")
def bucket(s3: S3Server) -> str:
    s3fs.S3FileSystem(endpoint_url=s3.endpoint_url, use_listings_cache=False).mkdir("upscaled")
    return "s3://upscaled"


@pytest.fixture
def prefix(bucket: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(lease, "SETTLE_S", 0.1)
    return f"{bucket}/{uuid.uuid4().hex}"


@pytest.fixture
def proxy(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3_proxy.Proxy]:
    """All requests of the test go through it; it breaks nothing until the test says what."""
    with s3_proxy.serve(s3.endpoint_url, lambda *_: "pass") as front:
        monkeypatch.setenv("AWS_ENDPOINT_URL", front.endpoint_url)
        monkeypatch.setattr(retries, "settings", QUICK)
        yield front


@pytest.fixture
def flags(model: Path, prefix: str) -> list[object]:
    return ["--source", f"{prefix}/in", "--output", f"{prefix}/out", "--model", model, *NIGHT]


@pytest.fixture
def night(flags: list[object], call: Callable[..., Ran]) -> Callable[..., Ran]:
    return lambda *further: call("upscale", *flags, *further)


def put(prefix: str, pictures: dict[str, bytes]) -> None:
    for name, data in pictures.items():
        storage.publish(f"{prefix}/in/{name}", data)


def published(prefix: str) -> dict[str, bytes]:
    """Return what lies below the output but our own bookkeeping."""
    names = [name for name in storage.list_names(f"{prefix}/out") if not name.startswith("_diffsr/")]
    return {name: storage.read_bytes(f"{prefix}/out/{name}") for name in names}


def told(left: dict[str, bytes]) -> dict[str, Any]:
    """Return pictures as bytes and sidecars without the etag, in which stores differ."""
    found: dict[str, Any] = {}
    for name, data in left.items():
        found[name] = data
        if name.endswith(".json"):
            found[name] = json.loads(data)
            found[name]["source"].pop("etag")
    return found


def test_with_a_tenth_of_the_requests_broken_a_night_leaves_the_bytes_of_a_folder(
    prefix: str, proxy: s3_proxy.Proxy, night: Callable[..., Ran], call: Callable[..., Ran], model: Path, tmp_path: Path
) -> None:
    pictures = {f"{index}.png": png(waves(10, 8 + index, phase=index)) for index in range(5)}
    pictures |= {"deep/er/8.png": png(waves(8, 8)), "rotten.png": png(waves(30, 30))[:200]}
    put(prefix, pictures)
    for name, data in pictures.items():
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    maps = ["--samples", 2, *EACH]
    local = ["--source", tmp_path / "in", "--output", tmp_path / "out", "--model", model, *NIGHT, *maps]
    assert call("upscale", *local).code == 0
    proxy.rule = s3_proxy.randomly(0.1, seed=7)
    done = night(*maps)
    proxy.rule = lambda *_: "pass"
    assert (done.code, done.summary["done"], done.summary["dead"]) == (0, 6, 1), done.stderr
    faults = [fault for _, _, fault in proxy.seen if fault != "pass"]
    assert len(faults) >= 10 and len(set(faults)) >= 4
    assert told(published(prefix)) == told(tree(tmp_path / "out"))
    assert outcomes(f"{prefix}/out") == outcomes(tmp_path / "out")
    before = len(proxy.seen)
    again = night(*maps)
    assert (again.code, again.summary["inputs"], again.summary["unchanged"]) == (0, 0, 7)
    writes = [path for method, path, _ in proxy.seen[before:] if method not in ("GET", "HEAD")]
    assert all("lease.json" in path or "/fences/" in path for path in writes), writes


def test_a_source_that_cannot_be_read_for_long_is_tried_in_the_next_two_nights_and_then_waits_for_a_person(
    prefix: str,
    proxy: s3_proxy.Proxy,
    flags: list[object],
    night: Callable[..., Ran],
    call: Callable[..., Ran],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put(prefix, {f"{index}.png": png(waves(8, 8, phase=index)) for index in range(3)})
    monkeypatch.setattr(retries, "settings", retries.Settings(tries=2, total_s=2, first_s=0.01, longest_s=0.02))
    proxy.rule = lambda method, path, _: (
        "busy" if method == "GET" and path.split("?")[0].endswith("in/1.png") else "pass"
    )
    first = night()
    assert (first.code, first.summary["done"], first.summary["dead"]) == (0, 2, 1), first.stderr
    for attempts in (1, 2, 3):
        rows = Ledger(f"{prefix}/out").latest(["key", "stage", "reason", "attempts"]).to_pylist()
        (row,) = (row for row in rows if row["key"] == "1.png")
        assert (row["stage"], row["reason"], row["attempts"]) == ("read", "io_transient", attempts)
        again = night()
        assert again.summary["inputs"] == (1 if attempts < 3 else 0), again.stderr
        assert again.summary["unchanged"] == (2 if attempts < 3 else 3)
    proxy.rule = lambda *_: "pass"
    asked = call("upscale", "retry-failed", *flags)
    assert (asked.code, asked.summary["done"], asked.summary["unchanged"]) == (0, 1, 2), asked.stderr


def test_names_that_only_a_store_has_are_carried_or_refused_and_never_leave_the_output(
    bucket: str, prefix: str, night: Callable[..., Ran], call: Callable[..., Ran]
) -> None:
    store = s3fs.S3FileSystem(use_listings_cache=False)
    good = [
        "n" * 900 + ".png", "line\nbreak.png", "tab\t.png", "naïve 日本 \U0001f6f0.png", " spaces  .png", 
        "a#b?c=d&e.png", "[glob]*.png", "%2e%2e%41.png", "back\\slash.png",
    ]  # fmt: skip
    bad = ["up/../../../escaped.png", "../sideways.png", "a/./b.png", "/leading.png", "a//b.png"]
    base = prefix.removeprefix("s3://upscaled/")
    longest = "l" * (1024 - len(f"{base}/in/.png")) + ".png"  # which the output's prefix makes too long
    bad.append(longest)
    written = []
    for index, name in enumerate([*good, *bad]):
        body = png(waves(8, 8, phase=index))
        try:
            store.call_s3("put_object", Bucket="upscaled", Key=f"{base}/in/{name}", Body=body)
            written.append(name)
        except OSError:  # a name that this very server does not take
            continue
    listed = {item.key for item in storage.list_objects(f"{prefix}/in")}
    assert listed == set(written) and len(listed) >= 10, set(written) ^ listed
    before = everything(store, "upscaled")
    done = night("--max-dead-share", 1)
    assert done.code == 0, done.stderr
    found = outcomes(f"{prefix}/out")
    assert set(found) == listed
    for name in listed & set(good):
        assert found[name] == ("done", ""), name
    for name in listed & set(bad):
        assert found[name] in {("done", ""), ("dead", "bad_name")}, (name, found[name])
    assert found[longest] == ("dead", "bad_name")
    assert {name for name in listed if ".." in name.split("/")} <= {k for k, v in found.items() if v[1] == "bad_name"}
    new = everything(store, "upscaled") - before
    assert new and all(key.startswith(f"{base}/out/") for key in new), new
    assert night().summary["inputs"] == 0


def everything(store: s3fs.S3FileSystem, bucket: str) -> set[str]:
    found, place = set[str](), {"Bucket": bucket}
    while True:
        page = store.call_s3("list_objects_v2", **place)
        found |= {item["Key"] for item in page.get("Contents", [])}
        if not page.get("IsTruncated"):
            return found
        place["ContinuationToken"] = page["NextContinuationToken"]

"""Pairs, training and upscaling against a real S3 server: nothing but the URIs differs."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import s3fs

from diffsr_core.degradation import Degradation
from pipelines import corpus, storage
from pipelines.ledger import Ledger
from tests.jobs.conftest import PAIRS_FLAGS, Ran, photograph, png, run, tree
from tests.s3_server import S3Server

pytestmark = pytest.mark.s3


@pytest.fixture(scope="module")
def bucket(s3: S3Server, archive: Path, inbox: Path) -> str:
    """A bucket with the archive and the inbox in it."""
    store = s3fs.S3FileSystem(endpoint_url=s3.endpoint_url, use_listings_cache=False)
    store.mkdir("nightly")
    store.put(f"{archive}/", "nightly/archive/", recursive=True)
    for path in inbox.rglob("*.png"):
        if "\n" not in path.name:
            store.put_file(str(path), f"nightly/inbox/{path.relative_to(inbox)}")
    return "s3://nightly"


def fetched(uri: str, folder: Path) -> dict[str, bytes]:
    store = s3fs.S3FileSystem(use_listings_cache=False)
    store.get(uri.removeprefix("s3://"), str(folder), recursive=True)
    return tree(folder)


def test_pairs_on_s3_are_those_of_a_folder(bucket: str, pairs: Path, tmp_path: Path, call: Callable[..., Ran]) -> None:
    flags = ["--source", f"{bucket}/archive", "--output", f"{bucket}/pairs", "--engine", "local", *PAIRS_FLAGS]
    done = call("make_pairs", *flags)
    assert (done.code, done.summary["done"], done.summary["dead"]) == (0, 6, 1), done.stderr
    found = json.loads(fetched(f"{bucket}/pairs", tmp_path / "pairs")["manifest.json"])
    assert found["pairs"] == json.loads((pairs / "manifest.json").read_text())["pairs"]
    again = call("make_pairs", *flags)
    assert (again.summary["inputs"], again.summary["unchanged"]) == (0, 7)


def test_lists_twins_and_objects_too_large_for_memory_are_read_from_s3(
    bucket: str, tmp_path: Path, call: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "SPOOL_BYTES", 10_000)  # each of the photographs is larger
    source, flags = f"{bucket}/twins", ["--engine", "local", "--patch", 64, "--no-track", "--max-dead-share", 1]
    for name in ("astronaut.png", "coffee.png", "rocket.jpg"):
        hr = photograph(name, 128)
        storage.publish(f"{source}/hr/{name}.png", png(hr))
        if name != "rocket.jpg":
            storage.publish(f"{source}/lr/{name}.png", png(Degradation("bicubic", 4).apply(hr, seed=0)))
    (tmp_path / "list.txt").write_text(f"{source}/hr/coffee.png.png\n{source}/hr/none.png\n")
    twins = ["--source", f"{source}/hr", "--lr-source", f"{source}/lr", "--output", f"{bucket}/twin-pairs"]
    listed = ["--source", tmp_path / "list.txt", "--output", f"{bucket}/listed"]
    for words, what in ((twins, ("done", "done", "no_twin")), (listed, ("done", "missing"))):
        done = call("make_pairs", *words, *flags)
        assert done.code == 0, done.stderr
        rows = Ledger(str(words[-1])).latest().sort_by("key").to_pylist()
        assert tuple(row["reason"] or row["status"] for row in rows) == what


def test_upscaling_a_bucket_on_ray_gives_the_bytes_of_a_folder_and_a_rerun_is_free(
    bucket: str, inbox: Path, trained: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    flags = ["--model", trained / "model", "--steps", "2", "--tile", "32"]
    on_s3 = ["--source", f"{bucket}/inbox", "--output", f"{bucket}/outbox", *flags]
    done = run("upscale", *on_s3, "--num-workers", 2, "--unit-megabytes", 0.001)
    assert (done.code, done.summary["done"], done.summary["dead"]) == (0, 4, 1), done.stderr
    call("upscale", "--source", inbox, "--output", tmp_path / "out", "--engine", "local", *flags)
    remote, local = fetched(f"{bucket}/outbox", tmp_path / "remote"), tree(tmp_path / "out")
    pictures = {name for name in local if name.endswith(".png") and "\n" not in name}
    assert {name: remote[name] for name in pictures} == {name: local[name] for name in pictures}
    again = call("upscale", *on_s3, "--engine", "local")
    assert (again.summary["inputs"], again.summary["unchanged"]) == (0, 5)
    verified = call("upscale", "verify", *on_s3)
    assert (verified.summary["inputs"], verified.summary["dead"]) == (4, 0)


def test_training_reads_pairs_from_s3_and_leaves_its_model_there(
    bucket: str, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    flags = ["--batch-size", "4", "--encoder-steps", "2", "--steps", "2"]
    done = call("train", "--pairs", f"{bucket}/pairs", "--output", f"{bucket}/run", "--engine", "local", *flags)
    assert done.code == 0, done.stderr
    assert set(fetched(f"{bucket}/run/model", tmp_path / "m")) == {
        "README.md", "config.json", "ema.safetensors", "model.safetensors",
    }  # fmt: skip

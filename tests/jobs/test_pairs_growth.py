"""A pair set over time: it grows with its source, loses nothing by it, and says what it holds, in MLflow too."""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines import tracking
from pipelines.manifest import SPLITS, load_manifest
from pipelines.pairs import PairsConfig, make_pairs
from pipelines.reader import PairReader
from pipelines.rows import iter_pairs
from tests.jobs.conftest import PAIRS_FLAGS, Ran, photograph, png, tree

PATCH, CELLS = 16, 4  # each source of 32 px holds so many patches
FLAGS = ["--engine", "local", "--patch", PATCH, "--no-track"]
SHARES = {"val": 0.3, "test": 0.2}


def put(source: Path, *names: str, seed: int = 0) -> None:
    """Write noise, another picture for another name or seed."""
    source.mkdir(exist_ok=True)
    for name in names:
        generator = np.random.default_rng([seed, *name.encode()])
        (source / name).write_bytes(png(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)))


def make(root: Path, **changes: Any) -> dict[str, Any]:
    """Run the job from root/source to root/set; return its summary."""
    fields = {"source": str(root / "source"), "output": str(root / "set"), "patch": PATCH, "engine": "local"}
    fields |= {"track": False, "val_share": SHARES["val"], "test_share": SHARES["test"]}
    return vars(make_pairs(PairsConfig(**{**fields, **changes})))


def rows(pairs: Path | str) -> list[dict[str, Any]]:
    manifest = load_manifest(str(pairs))
    return [row for split in SPLITS for row in iter_pairs(str(pairs), manifest, split)]


def sources(pairs: Path | str) -> Counter[str]:
    """Return how many pairs count of each source."""
    return Counter(row["source_key"] for row in rows(pairs))


def expected_split(data: bytes) -> str:
    """Return the split of a file: where its SHA-256 lies in [0, 1)."""
    place = int(hashlib.sha256(data).hexdigest(), 16) / 2**256
    return "val" if place < SHARES["val"] else "test" if place < SHARES["val"] + SHARES["test"] else "train"


def test_a_source_keeps_its_split_whatever_comes_and_goes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    put(source, *(f"{index}.png" for index in range(40)))
    make(tmp_path)
    first = {row["source_key"]: row["split"] for row in rows(tmp_path / "set")}
    assert set(first.values()) == set(SPLITS) and len(first) == 40
    assert first == {key: expected_split((source / key).read_bytes()) for key in first}
    put(source, *(f"new {index}.png" for index in range(20)))
    for index in range(0, 40, 3):
        (source / f"{index}.png").unlink()
    (source / "1.png").rename(source / "renamed.png")
    make(tmp_path, unit_megabytes=0.01)
    second = {row["source_key"]: row["split"] for row in rows(tmp_path / "set")}
    assert set(second) == {path.name for path in source.iterdir()}
    assert {key: first[key] for key in first.keys() & second.keys()}.items() <= second.items()
    assert second["renamed.png"] == first["1.png"]  # the content decides, not the name


def test_a_source_that_turns_over_day_by_day_is_not_taken_for_the_wrong_one(tmp_path: Path) -> None:
    source = tmp_path / "source"
    put(source, *(f"{index:02d}.png" for index in range(10)))
    make(tmp_path)
    for day in range(6):
        for index in (2 * day, 2 * day + 1):
            (source / f"{index:02d}.png").unlink()
            put(source, f"{index + 10:02d}.png")
        assert make(tmp_path)["inputs"] == 2
        assert sources(tmp_path / "set") == {path.name: CELLS for path in source.iterdir()}


def test_the_wrong_source_is_refused_before_any_work_and_leaves_the_set_as_it_was(
    tmp_path: Path, call: Callable[..., Ran]
) -> None:
    put(tmp_path / "source", *(f"a{index}.png" for index in range(8)))
    put(tmp_path / "other", *(f"b{index}.png" for index in range(30)))
    flags = ["--output", tmp_path / "set", *FLAGS]
    assert call("make_pairs", "--source", tmp_path / "source", *flags).code == 0
    before = tree(tmp_path / "set")
    wrong = call("make_pairs", "--source", tmp_path / "other", *flags)
    assert wrong.code == 1 and "max_gone_share (0.5)" in wrong.stderr and "correct --source" in wrong.stderr
    assert tree(tmp_path / "set") == before
    right = call("make_pairs", "--source", tmp_path / "source", *flags)
    assert (right.code, right.summary["inputs"]) == (0, 0) and tree(tmp_path / "set") == before
    meant = call("make_pairs", "--source", tmp_path / "other", *flags, "--max-gone-share", 1)
    assert (meant.code, meant.summary["done"]) == (0, 30)
    assert set(sources(tmp_path / "set")) == {path.name for path in (tmp_path / "other").iterdir()}


def jpeg(pixels: np.ndarray, quality: int) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "JPEG", quality=quality, subsampling=0)
    return sink.getvalue()


def near_copy(pixels: np.ndarray, *, split: str) -> bytes:
    """Return a JPEG of the pixels, of a quality that happens to fall into this split."""
    return next(
        data for data in (jpeg(pixels, quality) for quality in range(98, 60, -1)) if expected_split(data) == split
    )


def test_a_near_copy_in_one_split_does_not_count_until_its_original_goes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    pixels = photograph("astronaut.png", 128)
    original = png(pixels)
    (source / "a original.png").write_bytes(original)
    (source / "b copy.jpg").write_bytes(near_copy(pixels, split=expected_split(original)))
    (source / "c other.png").write_bytes(png(photograph("coffee.png", 128)))
    settings = {"patch": 64, "hash_distance": 6, "min_deviation": 0.0}
    assert make(tmp_path, **settings)["done"] == 3
    assert sources(tmp_path / "set") == {"a original.png": 4, "c other.png": 4}
    assert sum(len(shard.dropped_pairs) for shard in load_manifest(str(tmp_path / "set")).shards) == 4
    named = f"{tmp_path}/set/manifests/{load_manifest(str(tmp_path / 'set')).digest}.json"
    (source / "a original.png").unlink()
    assert make(tmp_path, **settings)["inputs"] == 0
    assert sources(tmp_path / "set") == {"b copy.jpg": 4, "c other.png": 4}
    (source / "a original.png").write_bytes(original)
    make(tmp_path, **settings)
    assert sum(sources(tmp_path / "set").values()) == 8
    assert sources(named) == {"a original.png": 4, "c other.png": 4}  # what was committed first
    beside = {"duplicates": "image"}
    make(tmp_path, **settings, **beside)
    assert sum(sources(tmp_path / "set").values()) == 12


def test_near_copies_across_splits_count_and_are_reported(tmp_path: Path, call: Callable[..., Ran]) -> None:
    source = tmp_path / "source"
    source.mkdir()
    pixels = photograph("chelsea.png", 128)
    (source / "train.jpg").write_bytes(near_copy(pixels, split="train"))
    (source / "val.jpg").write_bytes(near_copy(pixels, split="val"))
    (source / "other.png").write_bytes(png(photograph("coffee.png", 128)))
    flags = ["--source", source, "--output", tmp_path / "set", "--engine", "local", "--no-track", "--patch", 64]
    flags += ["--hash-distance", 6, "--val-share", SHARES["val"], "--test-share", SHARES["test"], "--min-deviation", 0]
    done = call("make_pairs", *flags)
    assert sources(tmp_path / "set") == {"train.jpg": 4, "val.jpg": 4, "other.png": 4}
    assert (
        "near copies lie across splits" in done.stderr and "'train.jpg'" in done.stderr and "'val.jpg'" in done.stderr
    )
    card = (tmp_path / "set" / "card.html").read_text()
    assert 'id="leaks"' in card and "train.jpg" in card and "val.jpg" in card
    (source / "val.jpg").unlink()
    clean = call("make_pairs", *flags)
    assert "across splits" not in clean.stderr and 'id="leaks"' not in (tmp_path / "set" / "card.html").read_text()


def test_the_manifest_of_before_reads_the_very_pairs_of_before(tmp_path: Path) -> None:
    source, pairs = tmp_path / "source", str(tmp_path / "set")
    put(source, *(f"{index}.png" for index in range(12)))
    make(tmp_path, unit_megabytes=0.01)
    named = f"{pairs}/manifests/{load_manifest(pairs).digest}.json"

    def sequence(of: str) -> list[bytes]:
        reader = PairReader(of, load_manifest(of), "train", seed=3)
        return [b"".join(side.tobytes() for side in reader.pair(k)) for k in range(2 * reader.num_pairs)]

    before = sequence(pairs)
    put(source, "1.png", "12.png", "13.png", seed=1)
    (source / "2.png").unlink()
    make(tmp_path, unit_megabytes=0.01)
    make(tmp_path, degradation="noise", codec="png")
    assert sequence(named) == before != sequence(pairs)
    assert make(tmp_path, unit_megabytes=0.01)["inputs"] == 0  # back to the first recipe, and still grown
    assert sequence(named) == before and set(sources(pairs)) == {path.name for path in source.iterdir()}


def test_a_dry_run_tells_counts_bytes_time_and_cost_and_writes_nothing(
    tmp_path: Path, call: Callable[..., Ran]
) -> None:
    source, output = tmp_path / "source", tmp_path / "set"
    put(source, *(f"{index}.png" for index in range(9)))
    (source / "rotten.png").write_bytes(b"rotten")
    flags = ["--source", source, "--output", output, *FLAGS]
    planned = call("make_pairs", *flags, "--dry-run", "--cpu-hour-price", 50)
    size = sum(path.stat().st_size for path in source.iterdir())
    found = planned.summary["metrics"]
    assert (planned.code, planned.summary["status"], planned.summary["inputs"]) == (0, "planned", 10)
    assert not output.exists()
    assert (found["source_bytes"], found["sampled"], found["pairs"]) == (size, 10, 9 * CELLS)  # all were looked at
    assert found["cost"] == pytest.approx(50 * found["cpu_hours"]) and 0 < found["hours"] < 0.1
    for told in ("10 of 10 images", f"{size / 1e6:.1f} MB", f"about {9 * CELLS} pairs", "1 cannot be read", "cost"):
        assert told in planned.stderr, told
    assert call("make_pairs", *flags).code == 0
    blobs = sum(len(row["hr"]) + len(row["lr"]) for row in rows(output))
    assert found["shard_bytes"] == blobs
    put(source, "new.png")
    before = tree(output), sorted(output.rglob("*"))
    more = call("make_pairs", *flags, "--dry-run")
    assert (more.summary["inputs"], more.summary["unchanged"], more.summary["metrics"]["pairs"]) == (1, 10, CELLS)
    assert (tree(output), sorted(output.rglob("*"))) == before


def test_mlflow_knows_the_set_once_and_a_training_names_the_very_same(
    archive: Path, pairs: Path, trained: Path, call: Callable[..., Ran]
) -> None:
    client = tracking.connect()
    experiment = client.get_experiment_by_name(tracking.EXPERIMENT)
    digest = load_manifest(str(pairs)).digest

    def runs_of(name: str) -> list[Any]:
        found = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'", max_results=500)
        return [run for run in found if any(i.dataset.digest == digest[:32] for i in run.inputs.dataset_inputs)]

    (of_set,) = runs_of("pairs")
    assert of_set.data.tags[tracking.PAIRS_DIGEST] == digest and of_set.info.status == "FINISHED"
    counts = json.loads((pairs / "manifest.json").read_text())["pairs"]
    assert of_set.data.metrics == {f"pairs_{split}": float(count) for split, count in counts.items()}
    assert of_set.data.params["patch"] == "32" and of_set.data.params["degradation"] == "bicubic"
    files = {entry.path for entry in client.list_artifacts(of_set.info.run_id)}
    assert files == {"manifest.json", "card.html", "dead_letters.parquet", "environment.txt"}
    card = client.download_artifacts(of_set.info.run_id, "card.html")
    assert Path(card).read_bytes() == (pairs / "card.html").read_bytes()
    again = call("make_pairs", "--source", archive, "--output", pairs, "--engine", "local", *PAIRS_FLAGS)
    assert (again.code, again.summary["inputs"]) == (0, 0) and len(runs_of("pairs")) == 1
    preset = json.loads((trained / "model/config.json").read_text())["preset"]
    of_model = runs_of(f"train {preset}")[0]
    (one,), (other,) = of_set.inputs.dataset_inputs, of_model.inputs.dataset_inputs
    assert dict(one.dataset) == dict(other.dataset)
    assert json.loads(one.dataset.source)["url"] == f"{pairs}/manifests/{digest}.json"

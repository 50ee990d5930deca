"""The laws of the pairs job."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines.cli import parse
from pipelines.ledger import Ledger
from pipelines.manifest import SPLITS, load_manifest
from pipelines.reader import PairReader
from tests.jobs.conftest import PAIRS_FLAGS, Ran, photograph, png, run, tree


def test_every_input_is_accounted_for_and_a_rotten_one_has_a_reason(archive: Path, pairs: Path) -> None:
    rows = {row["key"]: row for row in Ledger(str(pairs)).latest().to_pylist()}
    assert set(rows) == {path.name for path in archive.iterdir()}
    dead = [row for row in rows.values() if row["status"] == "dead"]
    assert [(row["key"], row["stage"], row["reason"]) for row in dead] == [("rotten.png", "decode", "truncated")]


def test_a_rerun_changes_no_byte_and_says_so(archive: Path, pairs: Path, call: Callable[..., Ran]) -> None:
    before = tree(pairs)
    again = call("make_pairs", "--source", archive, "--output", pairs, "--engine", "local", *PAIRS_FLAGS)
    assert again.code == 0
    assert (again.summary["inputs"], again.summary["unchanged"]) == (0, 7)
    assert "nothing to do" in again.stderr
    assert tree(pairs) == before


def test_a_dry_run_counts_and_writes_nothing(archive: Path, tmp_path: Path, call: Callable[..., Ran]) -> None:
    output = tmp_path / "set"
    planned = call("make_pairs", "--source", archive, "--output", output, "--dry-run", *PAIRS_FLAGS)
    assert (planned.code, planned.summary["status"], planned.summary["inputs"]) == (0, "planned", 7)
    assert not output.exists()


def test_ray_and_a_plain_loop_make_the_same_bytes(archive: Path, pairs: Path, tmp_path: Path) -> None:
    # Other units than the fixture's one: the shards differ, the pairs must not.
    flags = ["--unit-megabytes", "0.02", *PAIRS_FLAGS]
    on_ray = run("make_pairs", "--source", archive, "--output", tmp_path / "ray", "--num-workers", 2, *flags)
    assert on_ray.code == 0, on_ray.stderr
    alone = run("make_pairs", "--source", archive, "--output", tmp_path / "local", "--engine", "local", *flags)
    assert alone.code == 0, alone.stderr
    assert len(list((tmp_path / "ray" / "data").iterdir())) > 1
    assert tree(tmp_path / "ray") == tree(tmp_path / "local")
    ids = [
        pq.read_table(path, columns=["pair_id"])["pair_id"].to_pylist() for path in (tmp_path / "ray/data").iterdir()
    ]
    one = [pq.read_table(path, columns=["pair_id"])["pair_id"].to_pylist() for path in (pairs / "data").iterdir()]
    assert sorted(sum(ids, [])) == sorted(sum(one, []))


def test_a_systematic_failure_exceeds_the_budget_and_exits_3(tmp_path: Path, call: Callable[..., Ran]) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "good.png").write_bytes(png(photograph("coffee.png")))
    for index in range(3):
        (source / f"{index}.png").write_bytes(b"<html>not found</html>")
    failed = call("make_pairs", "--source", source, "--output", tmp_path / "set", "--engine", "local", *PAIRS_FLAGS)
    assert failed.code == 3
    assert (failed.summary["status"], failed.summary["dead"]) == ("failed", 3)
    assert "max_dead_share (0.2)" in failed.stderr


def test_another_recipe_is_a_set_beside_the_old_one(archive: Path, tmp_path: Path, call: Callable[..., Ran]) -> None:
    flags = ["--source", archive, "--output", tmp_path / "set", "--engine", "local", *PAIRS_FLAGS]
    assert call("make_pairs", *flags).code == 0
    old, before = json.loads((tmp_path / "set/manifest.json").read_text()), tree(tmp_path / "set/data")
    other = call("make_pairs", *flags, "--degradation", "bilinear")
    assert (other.code, other.summary["inputs"], other.summary["unchanged"]) == (0, 7, 0)
    new = json.loads((tmp_path / "set/manifest.json").read_text())
    assert new["digest"] != old["digest"] and new["recipe"]["degradation"] == "bilinear"
    assert {name: data for name, data in tree(tmp_path / "set/data").items() if name in before} == before
    assert load_manifest(str(tmp_path / f"set/manifests/{old['digest']}.json")).num_pairs("train") > 0
    again = call("make_pairs", *flags)  # back again: nothing is made twice
    assert (again.code, again.summary["inputs"], again.summary["unchanged"]) == (0, 0, 7)
    assert json.loads((tmp_path / "set/manifest.json").read_text()) == old


@pytest.mark.parametrize("broken", ["missing", "empty"])
def test_a_source_without_images_is_said_clearly(tmp_path: Path, call: Callable[..., Ran], broken: str) -> None:
    source = tmp_path / "source"
    if broken == "empty":
        source.mkdir()
    done = call("make_pairs", "--source", source, "--output", tmp_path / "set", "--engine", "local", *PAIRS_FLAGS)
    if broken == "missing":
        assert done.code == 1 and str(source) in done.stderr
    else:
        assert done.code == 0 and done.summary["inputs"] == 0
    shutil.rmtree(tmp_path / "set", ignore_errors=True)


def test_a_failure_leaves_the_dead_letters_and_no_set(tmp_path: Path, call: Callable[..., Ran]) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "good.png").write_bytes(png(photograph("coffee.png")))
    for index in range(3):
        (source / f"{index}.png").write_bytes(b"<html>not found</html>")
    flags = ["--source", source, "--output", tmp_path / "set", "--engine", "local"]
    assert call("make_pairs", *flags, *PAIRS_FLAGS).code == 3
    assert not (tmp_path / "set" / "manifest.json").exists()
    letters = pq.read_table(tmp_path / "set" / "dead_letters.parquet").to_pylist()
    assert [(row["key"], row["stage"], row["reason"]) for row in letters] == [
        (f"{index}.png", "sniff", "not_an_image") for index in range(3)
    ]
    assert call("make_pairs", *flags, *PAIRS_FLAGS).code == 3  # a rerun does not wash the failure away
    assert call("make_pairs", *flags, *PAIRS_FLAGS, "--max-dead-share", "1").code == 0


def test_a_file_that_kills_its_worker_on_ray_becomes_a_dead_letter(archive: Path, tmp_path: Path) -> None:
    # A codec that crashes: the decoder of this test's worker ends its process at one file's size.
    victim = (archive / "coins.png").stat().st_size
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import os, sys\n"
        "class Trap:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'pipelines.patches':\n"
        "            sys.meta_path.remove(self)\n"
        "            import pipelines.images as images\n"
        "            decode = images.decode_file\n"
        "            def trap(file, *words, **options):\n"
        f"                if file.seek(0, 2) == {victim}: os._exit(9)\n"
        "                file.seek(0)\n"
        "                return decode(file, *words, **options)\n"
        "            images.decode_file = trap\n"
        "sys.meta_path.insert(0, Trap())\n"
    )
    flags = ["--source", archive, "--output", tmp_path / "set", "--num-workers", 1, *PAIRS_FLAGS]
    done = run("make_pairs", *flags, "--max-dead-share", "0.5", env={"PYTHONPATH": str(folder)})
    assert done.code == 0, done.stderr
    rows = {row["key"]: row for row in Ledger(str(tmp_path / "set")).latest().to_pylist()}
    assert (rows["coins.png"]["status"], rows["coins.png"]["reason"]) == ("dead", "worker_died")
    assert sum(row["status"] == "done" for row in rows.values()) == 5


def test_a_shard_that_was_lost_is_made_again(archive: Path, tmp_path: Path, call: Callable[..., Ran]) -> None:
    flags = ["--source", archive, "--output", tmp_path / "set", "--engine", "local", *PAIRS_FLAGS]
    assert call("make_pairs", *flags).code == 0
    before = tree(tmp_path / "set")
    (shard,) = (tmp_path / "set" / "data").iterdir()
    shard.unlink()
    again = call("make_pairs", *flags)
    assert (again.code, again.summary["done"], again.summary["unchanged"]) == (0, 6, 1)
    assert "1 shards are missing: their 6 sources are read again" in again.stderr
    manifest = load_manifest(str(tmp_path / "set"))
    assert {split: manifest.num_pairs(split) for split in SPLITS} == json.loads(before["manifest.json"])["pairs"]
    reader = PairReader(str(tmp_path / "set"), manifest, "train", seed=0)
    assert reader.pair(0)[0].shape[:2] == (32, 32)


def test_dead_letters_are_those_of_the_set_after_another_recipe_failed(
    archive: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    flags = ["--source", archive, "--output", tmp_path / "set", "--engine", "local", *PAIRS_FLAGS]
    assert call("make_pairs", *flags).code == 0
    letters = (tmp_path / "set" / "dead_letters.parquet").read_bytes()
    assert call("make_pairs", *flags, "--max-megapixels", "0.001").code == 3
    assert (tmp_path / "set" / "dead_letters.parquet").read_bytes() != letters
    assert call("make_pairs", *flags).code == 0
    assert (tmp_path / "set" / "dead_letters.parquet").read_bytes() == letters


@pytest.mark.parametrize("value", ["0,inf", "a,b", "5", "5,1", "1,2,3"])
def test_a_wrong_range_is_told_by_its_name(value: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("make_pairs", ["--source", "a", "--output", "b", "--value-range", value])
    assert caught.value.code == 2
    assert "error: value_range (" in capfd.readouterr().err

"""The laws of the upscale job: once each, the same bytes, nothing lost."""

import errno
import json
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import storage, upscaling
from pipelines.lease import Lease
from pipelines.ledger import Ledger
from pipelines.upscaling import VERBS
from tests.jobs.conftest import Ran, photograph, png, run, run_until_killed, tree

FLAGS = ["--steps", "2", "--tile", "32", "--halo", "8"]


@pytest.fixture(scope="module")
def outbox(inbox: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("outbox") / "out"
    flags = ["--source", inbox, "--output", output, "--model", trained / "model", "--engine", "local", *FLAGS]
    done = run("upscale", *flags)
    assert (done.code, done.summary["done"], done.summary["dead"]) == (0, 5, 1), done.stderr
    return output


def test_each_input_is_done_or_dead_with_a_reason(inbox: Path, outbox: Path) -> None:
    rows = {row["key"]: row for row in Ledger(str(outbox)).latest().to_pylist()}
    assert set(rows) == {str(path.relative_to(inbox)) for path in inbox.rglob("*") if path.is_file()}
    assert {row["reason"] for row in rows.values() if row["status"] == "dead"} == {"truncated"}


def test_the_output_mirrors_the_source_at_four_times_the_size(inbox: Path, outbox: Path) -> None:
    for path in inbox.rglob("*.png"):
        if path.name != "rotten.png":
            before, after = Image.open(path), Image.open(outbox / path.relative_to(inbox))
            assert after.size == (before.size[0] * 4, before.size[1] * 4)
            assert after.mode == before.mode
            sidecar = json.loads(Path(f"{outbox / path.relative_to(inbox)}.json").read_text())
            assert sidecar["synthetic"] is True and sidecar["metrics"]["lr_psnr"] >= 50


def test_a_rerun_is_free_and_changes_no_byte(
    inbox: Path, outbox: Path, trained: Path, call: Callable[..., Ran]
) -> None:
    before, stamps = tree(outbox), {path: path.stat().st_mtime_ns for path in outbox.rglob("*.png")}
    flags = ["--source", inbox, "--output", outbox, "--model", trained / "model", "--engine", "local", *FLAGS]
    again = call("upscale", *flags)
    assert (again.code, again.summary["inputs"], again.summary["unchanged"]) == (0, 0, 6)
    assert tree(outbox) == before
    assert {path: path.stat().st_mtime_ns for path in outbox.rglob("*.png")} == stamps


def test_the_bytes_do_not_depend_on_workers_units_or_calls_in_flight(
    inbox: Path, outbox: Path, trained: Path, tmp_path: Path
) -> None:
    flags = ["--source", inbox, "--model", trained / "model", *FLAGS]
    on_ray = run(
        "upscale",
        "--output",
        tmp_path / "ray",
        "--num-workers",
        2,
        "--batch-size",
        3,
        "--unit-megabytes",
        0.001,
        *flags,
    )
    assert on_ray.code == 0, on_ray.stderr
    assert tree(tmp_path / "ray") == tree(outbox)


def test_killed_on_ray_and_started_again_it_leaves_what_a_clean_run_leaves(trained: Path, tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for index in range(10):
        (source / f"{index}.png").write_bytes(png(photograph("astronaut.png", 40 + index)))
    flags = ["--source", source, "--model", trained / "model", "--unit-megabytes", 0.001, *FLAGS]
    clean, killed = tmp_path / "clean", tmp_path / "killed"
    assert run("upscale", "--output", clean, "--engine", "local", *flags).code == 0
    run_until_killed("upscale", "--output", killed, "--num-workers", 1, *flags, when=lambda: any(killed.glob("*.png")))
    time.sleep(1)  # what Ray's workers still had in hand may land: it must not matter
    again = run("upscale", "--output", killed, "--engine", "local", *flags)
    assert again.code == 0, again.stderr
    assert tree(killed) == tree(clean)
    assert [row["status"] for row in Ledger(str(killed)).latest().to_pylist()] == ["done"] * 10


def test_a_new_a_changed_and_a_touched_source_are_told_apart(
    inbox: Path, outbox: Path, trained: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    shutil.copytree(inbox, source)
    shutil.copytree(outbox, output)
    flags = ["--source", source, "--output", output, "--model", trained / "model", "--engine", "local", *FLAGS]
    (source / "alpha.png").touch()
    (source / "grey.png").write_bytes(png(photograph("coins.png", 20)))
    (source / "new.png").write_bytes(png(photograph("chelsea.png", 16)))
    done = call("upscale", *flags)
    assert (done.summary["done"], done.summary["unchanged"]) == (2, 5)
    assert Image.open(output / "grey.png").size == (80, 80)


def test_verify_finds_a_lost_and_an_altered_output_and_run_redoes_them(
    inbox: Path, outbox: Path, trained: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    output = tmp_path / "out"
    shutil.copytree(outbox, output)
    before = tree(output)
    (output / "grey.png").unlink()
    (output / "alpha.png").write_bytes(b"altered")
    (output / "odd size.png.json").unlink()
    (output / "line\nbreak 'ü.png.json").write_bytes((output / "grey.png.json").read_bytes())
    damaged, receipts = tree(output), Ledger(str(output)).rows().num_rows
    found = call("upscale", "verify", "--output", output, "--dry-run")
    assert (found.code, found.summary["inputs"], found.summary["dead"]) == (1, 5, 4)
    assert "nothing was recorded" in found.stderr and repr("line\nbreak 'ü.png") in found.stderr
    assert (tree(output), Ledger(str(output)).rows().num_rows) == (damaged, receipts)
    found = call("upscale", "verify", "--output", output)
    assert (found.code, found.summary["inputs"], found.summary["dead"]) == (1, 5, 4)
    # A sidecar that names another source is taken at its word, so the person who put it there has to remove it.
    (output / "line\nbreak 'ü.png.json").unlink()
    flags = ["--source", inbox, "--output", output, "--model", trained / "model", "--engine", "local", *FLAGS]
    redone = call("upscale", *flags)
    assert redone.summary["done"] == 4
    assert tree(output) == before
    assert call("upscale", "verify", "--output", output).code == 0


def test_retry_failed_redoes_dead_letters_only(
    inbox: Path, outbox: Path, trained: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    output = tmp_path / "out"
    shutil.copytree(outbox, output)
    flags = ["--source", inbox, "--output", output, "--model", trained / "model", "--engine", "local", *FLAGS]
    again = call("upscale", "retry-failed", *flags, "--max-dead-share", "1")
    assert (again.summary["inputs"], again.summary["dead"], again.summary["unchanged"]) == (1, 1, 5)


def test_gc_deletes_what_a_receipt_once_named_only_when_told_and_nothing_of_others(
    trained: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    (source / "a.png").write_bytes(png(photograph("coffee.png", 16)))
    flags = ["--source", source, "--output", output, "--model", trained / "model", "--engine", "local", *FLAGS]
    assert call("upscale", *flags).summary["done"] == 1
    assert call("upscale", *flags, "--format", "webp").summary["done"] == 1  # a.png is of no use from now on
    for name in ("original.png", "original.png.json", "a.png.txt"):
        (output / name).write_bytes(b"somebody else's")
    before, gc = tree(output), ["gc", "--output", output]
    for words in (gc, [*gc, "--delete", "--dry-run"]):
        listed = call("upscale", *words)
        assert (listed.code, listed.summary["inputs"], listed.summary["done"]) == (0, 2, 0)
        assert "'original.png' is not ours, left alone" in listed.stderr and "would delete 'a.png'" in listed.stderr
        assert tree(output) == before
    assert call("upscale", *gc, "--delete").summary["done"] == 2
    assert tree(output) == {name: data for name, data in before.items() if name not in ("a.png", "a.png.json")}


def test_gc_refuses_a_folder_without_a_ledger(tmp_path: Path, call: Callable[..., Ran]) -> None:
    (tmp_path / "original.png").write_bytes(b"precious")
    refused = call("upscale", "gc", "--output", tmp_path, "--delete")
    assert refused.code == 1 and "must have a ledger" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["original.png"]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("source", "output"), [("a", "a"), ("a", "a/out"), ("a/in", "a"), ("link", "a/out"), ("a", "link"), ("a", "a/b/..")]
)
def test_an_output_that_is_not_apart_from_its_source_is_refused_untouched(
    tmp_path: Path, call: Callable[..., Ran], verb: str, source: str, output: str
) -> None:
    (tmp_path / "a" / "in").mkdir(parents=True)
    (tmp_path / "a" / "in" / "a.png").write_bytes(b"precious")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    words = ["--source", tmp_path / source, "--output", tmp_path / output, "--model", "models:/nobody/1", "--delete"]
    refused = call("upscale", verb, *words)
    assert refused.code == 1
    assert f"output ('{storage.absolute(tmp_path / output)}') must lie apart from source" in refused.stderr
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "a.png", "in", "link"]


@pytest.mark.parametrize(
    ("source", "output", "apart"),
    [
        ("s3://b/a", "s3://b/a/", False),
        ("s3://b/a", "s3a://b/a/out", False),
        ("s3://b/a//in", "s3://b/a", False),
        ("s3://b", "s3://b/out", False),
        ("file:///a", "/a/out", False),
        ("memory://a/in", "memory:///a", False),
        ("s3://b/a", "s3://b/another", True),
        ("s3://b/a", "s3://c/a", True),
        ("s3://b/a", "/b/a", True),
    ],
)
def test_prefixes_of_a_store_are_apart_name_by_name(source: str, output: str, apart: bool) -> None:
    with nullcontext() if apart else pytest.raises(ValueError, match="must lie apart from source"):
        upscaling._check_apart(source, output)


@pytest.mark.parametrize("verb", ["run", "plan", "retry-failed"])
def test_a_verb_that_reads_the_source_asks_for_it(tmp_path: Path, call: Callable[..., Ran], verb: str) -> None:
    refused = call("upscale", verb, "--output", tmp_path / "out", "--model", "models:/nobody/1")
    assert refused.code == 1 and "source (None) must be given; use --source URI" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_status_counts_without_a_source(outbox: Path, call: Callable[..., Ran]) -> None:
    found = call("upscale", "status", "--output", outbox)
    assert (found.code, found.summary["done"], found.summary["dead"]) == (0, 5, 1)


def test_two_nights_never_run_at_once(inbox: Path, trained: Path, tmp_path: Path, call: Callable[..., Ran]) -> None:
    output = tmp_path / "out"
    flags = ["--source", inbox, "--output", output, "--model", trained / "model", "--engine", "local", *FLAGS]
    with Lease(str(output), run_id="the other night"):
        refused = call("upscale", *flags)
    assert refused.code == 5 and "the other night" in refused.stderr
    assert tree(output) == {}


def test_a_plan_counts_and_writes_nothing(inbox: Path, trained: Path, tmp_path: Path, call: Callable[..., Ran]) -> None:
    flags = ["--source", inbox, "--output", tmp_path / "out", "--model", trained / "model", *FLAGS]
    planned = call("upscale", "plan", *flags)
    assert (planned.summary["status"], planned.summary["inputs"]) == ("planned", 6)
    assert not (tmp_path / "out").exists()


def test_another_format_appends_its_extension_so_that_names_never_collide(
    trained: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    pixels = photograph("coffee.png", 16)
    (source / "a.png").write_bytes(png(pixels))
    Image.fromarray(pixels).save(source / "a.jpg", quality=95)
    output = tmp_path / "out"
    flags = ["--source", source, "--output", output, "--model", trained / "model", "--engine", "local", *FLAGS]
    assert call("upscale", *flags, "--format", "webp").summary["done"] == 2
    assert {name for name in tree(output) if not name.endswith(".json")} == {"a.png.webp", "a.jpg.webp"}


def test_a_result_never_takes_the_place_of_another_sources_result(
    trained: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    Image.fromarray(photograph("coffee.png", 16)).save(source / "a.jpg", quality=95)
    (source / "a.jpg.png").write_bytes(png(photograph("coffee.png", 16)))
    output = tmp_path / "out"
    flags = ["--source", source, "--output", output, "--model", trained / "model", "--engine", "local", *FLAGS]
    done = call("upscale", *flags, "--format", "png")
    assert (done.summary["done"], done.summary["dead"]) == (1, 1)
    rows = {row["key"]: (row["status"], row["reason"]) for row in Ledger(str(output)).latest().to_pylist()}
    assert rows == {"a.jpg": ("dead", "key_taken"), "a.jpg.png": ("done", "")}


def test_a_source_of_a_later_night_never_overwrites_an_earlier_result(
    trained: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    pixels = photograph("coffee.png", 16)
    Image.fromarray(pixels).save(source / "a.bmp")
    flags = ["--source", source, "--output", output, "--model", trained / "model", "--engine", "local", *FLAGS]
    assert call("upscale", *flags).summary["done"] == 1
    first = tree(output)
    (source / "a.bmp.png").write_bytes(png(pixels))
    assert call("upscale", *flags).summary["dead"] == 1
    assert tree(output) == first
    rows = {row["key"]: (row["status"], row["reason"]) for row in Ledger(str(output)).latest().to_pylist()}
    assert rows == {"a.bmp": ("done", ""), "a.bmp.png": ("dead", "key_taken")}


@pytest.mark.parametrize("damage", [b"", b"\xff{", b"[]", b'{"source": 1}', b"[" * 100_000])
def test_a_damaged_sidecar_is_replaced(trained: Path, tmp_path: Path, call: Callable[..., Ran], damage: bytes) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    output.mkdir()
    (source / "a.png").write_bytes(png(photograph("coffee.png", 16)))
    (output / "a.png.json").write_bytes(damage)
    flags = ["--source", source, "--output", output, "--model", trained / "model", "--engine", "local", *FLAGS]
    done = call("upscale", *flags)
    assert (done.code, done.summary["done"]) == (0, 1), done.stderr
    assert json.loads((output / "a.png.json").read_bytes())["source"]["key"] == "a.png"


def test_a_name_that_the_output_cannot_hold_is_a_dead_letter(
    trained: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    names = ["x" * 251 + ".png", "y" * 248 + ".bmp", "folder.png", "file/a.png", "good.png"]  # at most 255 bytes each
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photograph("coffee.png", 16)).save(source / name)
    (output / "folder.png").mkdir(parents=True)
    (output / "file").write_bytes(b"in the way")
    flags = ["--source", source, "--output", output, "--model", trained / "model", "--engine", "local", *FLAGS]
    done = call("upscale", *flags, "--max-dead-share", 1)
    assert done.code == 0, done.stderr
    rows = {row["key"]: (row["status"], row["reason"]) for row in Ledger(str(output)).latest().to_pylist()}
    assert rows == {name: ("done", "") if name == "good.png" else ("dead", "bad_name") for name in names}


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
def test_a_store_that_is_full_or_away_fails_the_job(
    trained: Path, tmp_path: Path, call: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, fault: int
) -> None:
    source, output, publish = tmp_path / "in", tmp_path / "out", storage.publish
    source.mkdir()
    (source / "a.png").write_bytes(png(photograph("coffee.png", 16)))

    def faulty(uri: str, data: bytes) -> None:
        if uri.endswith("a.png.json"):
            raise OSError(fault, "the store is at fault")
        publish(uri, data)

    monkeypatch.setattr(storage, "publish", faulty)
    flags = ["--source", source, "--output", output, "--model", trained / "model", "--engine", "local", *FLAGS]
    failed = call("upscale", *flags)
    assert failed.code == 1 and "the store is at fault" in failed.stderr
    assert Ledger(str(output)).rows().num_rows == 0


def test_a_model_of_the_registry_is_resolved_once_to_a_version(
    trained: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    (source / "a.png").write_bytes(png(photograph("coffee.png", 16)))
    flags = ["--source", source, "--output", output, "--engine", "local", *FLAGS]
    done = call("upscale", "--model", "models:/tested/1", *flags)
    assert done.code == 0, done.stderr
    model = json.loads((output / "a.png.json").read_text())["model"]
    assert (model["name"], model["version"]) == ("tested", 1)
    assert model["digest"] == json.loads((trained / "model" / "config.json").read_text())["digest"]
    missing = call("upscale", "--model", "models:/tested@nobody", *flags)
    assert missing.code == 1 and "models:/tested@nobody" in missing.stderr


def test_alpha_is_kept_and_grey_stays_grey(outbox: Path) -> None:
    alpha = np.asarray(Image.open(outbox / "alpha.png"))[:, :, 3]
    assert alpha[0, 0] < 20 and alpha[0, -1] > 210
    assert Image.open(outbox / "grey.png").mode == "L"

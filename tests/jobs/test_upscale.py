"""The laws of the upscale job: once each, the same bytes, nothing lost."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.lease import Lease
from pipelines.ledger import Ledger
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
    flags = ["--source", inbox, "--output", output, "--model", trained / "model", "--engine", "local", *FLAGS]
    (output / "grey.png").unlink()
    (output / "alpha.png").write_bytes(b"altered")
    found = call("upscale", "verify", *flags)
    assert (found.summary["inputs"], found.summary["dead"]) == (5, 2)
    redone = call("upscale", *flags)
    assert redone.summary["done"] == 2
    assert tree(output) == before


def test_retry_failed_redoes_dead_letters_only(
    inbox: Path, outbox: Path, trained: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    output = tmp_path / "out"
    shutil.copytree(outbox, output)
    flags = ["--source", inbox, "--output", output, "--model", trained / "model", "--engine", "local", *FLAGS]
    again = call("upscale", "retry-failed", *flags, "--max-dead-share", "1")
    assert (again.summary["inputs"], again.summary["dead"], again.summary["unchanged"]) == (1, 1, 5)


def test_gc_lists_orphans_and_deletes_only_when_told(outbox: Path, tmp_path: Path, call: Callable[..., Ran]) -> None:
    output = tmp_path / "out"
    shutil.copytree(outbox, output)
    (output / "orphan.png").write_bytes(b"left by nobody")
    flags = ["--source", tmp_path, "--output", output]
    assert call("upscale", "gc", *flags).summary["inputs"] == 1
    assert (output / "orphan.png").exists()
    assert call("upscale", "gc", *flags, "--delete").summary["done"] == 1
    assert tree(output) == tree(outbox)


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

"""The upscale job when the model, the disk, the clock or another run fails it: what is done is kept, the rest left."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines import assets, kinds, local_files, scenes, stills, storage
from pipelines.ledger import Ledger
from tests.core.tiny import ANCHORED
from tests.jobs.conftest import ROOT, Ran, script, tree
from tests.jobs.tiny import NIGHT, broken_folder, model_folder, outcomes, receipts, waves, write_png, write_waves

EACH = ("--unit-megabytes", 0.001)  # every image is a unit


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"), ANCHORED)


@pytest.fixture
def flags(model: Path, tmp_path: Path) -> list[object]:
    """Of a night from tmp_path/in to tmp_path/out."""
    return ["--source", tmp_path / "in", "--output", tmp_path / "out", "--model", model, *NIGHT]


def test_a_model_that_gives_nan_ends_the_night_over_budget_and_keeps_what_there_was(
    tmp_path: Path, flags: list[object], call: Callable[..., Ran]
) -> None:
    write_waves(tmp_path / "in", 2)
    assert call("upscale", *flags).code == 0
    before = tree(tmp_path / "out")
    write_waves(tmp_path / "in", 6)
    failed = call("upscale", *flags, "--model", broken_folder(tmp_path / "broken"), *EACH)
    assert (failed.code, failed.summary["status"]) == (3, "failed") and "max_dead_share (0.2)" in failed.stderr
    assert failed.summary["dead"] == 2 < 6  # the first past the one that is always allowed: it ends early
    assert set(outcomes(tmp_path / "out").values()) == {("dead", "nan")}
    assert tree(tmp_path / "out") == before  # nothing of it was published
    mended = call("upscale", *flags)
    assert (mended.code, mended.summary["done"]) == (0, 6), mended.stderr
    assert {name: tree(tmp_path / "out")[name] for name in before} == before


def test_an_error_budget_keeps_what_is_done_and_says_so_in_the_report(
    tmp_path: Path, flags: list[object], call: Callable[..., Ran]
) -> None:
    write_waves(tmp_path / "in", 4)
    for index in range(4, 10):
        (tmp_path / "in" / f"{index:02d}.png").write_bytes(b"<html>not found</html>")
    failed = call("upscale", *flags, *EACH)
    counts = {name: failed.summary[name] for name in ("inputs", "done", "dead")}
    assert (failed.code, counts) == (3, {"inputs": 7, "done": 4, "dead": 3})
    assert len(tree(tmp_path / "out")) == 8
    (report,) = (tmp_path / "out" / "_diffsr" / "reports").iterdir()
    night = json.loads((report / "summary.json").read_text())
    assert (night["stopped"], night["left"], night["failures"][0]["reason"]) == ("error_budget", 3, "not_an_image")
    allowed = call("upscale", *flags, *EACH, "--max-dead-share", 1)
    assert (allowed.code, allowed.summary["inputs"], allowed.summary["dead"]) == (0, 3, 3), allowed.stderr
    assert {status for status, _ in outcomes(tmp_path / "out").values()} == {"done", "dead"}


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("name", ["03.png", "03.png.json"])
def test_a_disk_that_is_full_or_away_ends_the_job_with_nothing_half_published_and_a_rerun_completes(
    tmp_path: Path,
    flags: list[object],
    call: Callable[..., Ran],
    monkeypatch: pytest.MonkeyPatch,
    fault: int,
    name: str,
) -> None:
    write_waves(tmp_path / "in", 5, height=8, width=8)
    put = local_files.put_local

    def faulty(path: str, source: Any, *, replace: bool) -> bool:
        if path == str(tmp_path / "out" / name):
            raise OSError(fault, os.strerror(fault), path)
        return put(path, source, replace=replace)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "_put_local", faulty)
        failed = call("upscale", *flags, *EACH)
    assert failed.code == 1 and os.strerror(fault) in failed.stderr
    left = set(tree(tmp_path / "out"))
    assert "03.png" not in left and {"00.png", "01.png", "02.png"} <= left and not any(".tmp" in each for each in left)
    assert set(outcomes(tmp_path / "out").values()) == {("done", "")}  # what was done is told
    again = call("upscale", *flags, *EACH)
    assert (again.code, again.summary["done"]) == (0, 2), again.stderr
    assert set(receipts(tmp_path / "out")) == {f"{index:02d}.png" for index in range(5)}


# A file may grow to so many bytes and no further, as on a disk that is full: an error of the kernel, not of ours.
# Forks itself for each format, so that the imports are paid once.
SMALL_DISK = """
import os, resource, sys, torch
from pipelines import assets, cli, upscaling
folder, limit, formats, *flags = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
for name in formats.split(","):
    if (pid := os.fork()) == 0:
        os._exit(cli.run_job("upscale", [*flags, "--output", f"{folder}/{name}", "--format", name]))
    if (code := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])) != 1:
        sys.exit(f"{name} ended with {code}")
"""


def test_where_the_kernel_takes_no_more_bytes_the_job_fails_and_the_image_is_work_again(
    tmp_path: Path, model: Path, flags: list[object], call: Callable[..., Ran]
) -> None:
    write_waves(tmp_path / "in", 2, height=8, width=8)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    write_png(tmp_path / "in" / "zz large.png", noise)
    limit = max(path.stat().st_size for path in model.iterdir()) + 1000
    formats, words = ("png", "tiff", "webp"), [*flags, *EACH, "--tile", 64, "--steps", 1, "--quality", 100]
    command = [sys.executable, "-c", SMALL_DISK, tmp_path, limit, ",".join(formats), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("error: [Errno") == 3 and not list(tmp_path.glob("diffsr-*")), done.stderr
    for name in formats:
        assert len(tree(tmp_path / name)) == 4 and set(outcomes(tmp_path / name).values()) == {("done", "")}
        assert call("upscale", *words, "--output", tmp_path / name, "--format", name).summary["done"] == 1
        assert len(tree(tmp_path / name)) == 6


def test_sigterm_finishes_the_image_in_flight_and_a_second_run_waits_for_the_first_and_does_the_rest(
    tmp_path: Path, flags: list[object], call: Callable[..., Ran]
) -> None:
    write_waves(tmp_path / "in", 60, height=8, width=8)
    command = script("upscale", *flags, *EACH)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").glob("*.png")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    second = call("upscale", *flags, *EACH)
    assert second.code == 5 and "is held by run upscale-" in second.stderr
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    summary = json.loads(out.splitlines()[-1])
    assert (process.returncode, summary["status"]) == (0, "stopped"), err
    assert summary["done"] + summary["metrics"]["left"] == 60 and summary["metrics"]["left"] > 0
    assert "sigterm" in err and len(tree(tmp_path / "out")) == 2 * summary["done"]
    assert len(receipts(tmp_path / "out")) == summary["done"]
    rest = call("upscale", *flags, *EACH, "--batch-size", 4)
    assert (rest.code, rest.summary["done"]) == (0, 60 - summary["done"]), rest.stderr
    assert {status for status, _ in outcomes(tmp_path / "out").values()} == {"done"}


def test_max_hours_end_a_night_whose_rest_is_that_of_the_next(
    tmp_path: Path, flags: list[object], call: Callable[..., Ran]
) -> None:
    write_waves(tmp_path / "in", 6, height=8, width=8)
    stopped = call("upscale", *flags, *EACH, "--max-hours", 1e-9)
    assert (stopped.code, stopped.summary["status"], stopped.summary["inputs"]) == (0, "stopped", 0)
    assert "max_hours" in stopped.stderr and not list((tmp_path / "out").glob("*.png"))
    assert call("upscale", *flags, *EACH, "--max-hours", 1).summary["done"] == 6


def test_a_run_that_lost_its_lease_replaces_no_result_and_writes_no_receipt(
    tmp_path: Path, flags: list[object], call: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_waves(tmp_path / "in", 1)
    assert call("upscale", *flags).code == 0
    before, told = tree(tmp_path / "out"), Ledger(str(tmp_path / "out")).rows().to_pylist()
    drawn = kinds.draw

    def draw_late(*words: Any, **named: Any) -> Any:
        take_over(tmp_path / "out")
        return drawn(*words, **named)

    monkeypatch.setattr(assets, "draw", draw_late)
    zombie = call("upscale", *flags, "--seed", 5)
    assert zombie.code == 5 and "is no longer the newest" in zombie.stderr
    assert tree(tmp_path / "out") == before
    assert Ledger(str(tmp_path / "out")).rows().to_pylist() == told


def take_over(output: Path) -> None:
    """Leave what is there after another run has come, taken the next fence and gone again."""
    held = json.loads((output / "_diffsr/lease.json").read_bytes())
    taken = {**held, "fence": held["fence"] + 1, "expires": 0.0, "run_id": "newer"}
    (output / f"_diffsr/fences/{taken['fence']:010d}").write_text(json.dumps(taken))
    (output / "_diffsr/lease.json").write_text(json.dumps(taken))


def test_an_object_that_takes_too_long_to_decode_is_one_dead_letter(
    tmp_path: Path, flags: list[object], call: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_waves(tmp_path / "in", 3)
    opened = scenes.open_scene

    def slow(original: Any, **named: Any) -> Any:
        if original.size == (tmp_path / "in" / "01.png").stat().st_size:
            for _ in range(1000):
                time.sleep(0.01)
        return opened(original, **named)

    (tmp_path / "in" / "01.png").write_bytes((tmp_path / "in" / "01.png").read_bytes() + b"longer than the others")
    monkeypatch.setattr(stills, "open_scene", slow)
    done = call("upscale", *flags, "--max-seconds", 0.5)
    assert (done.code, done.summary["done"]) == (0, 2), done.stderr
    assert outcomes(tmp_path / "out")["01.png"] == ("dead", "time_limit")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")])
def test_what_does_not_fit_into_memory_is_a_dead_letter_and_never_another_shape(
    tmp_path: Path, flags: list[object], call: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    write_waves(tmp_path / "in", 2)
    write_png(tmp_path / "in" / "wide.png", waves(8, 40))
    drawn = kinds.draw

    def draw(upscaler: Any, pixels: Any, *words: Any, **named: Any) -> Any:
        if pixels.shape[1] == 40:
            raise error
        return drawn(upscaler, pixels, *words, **named)

    monkeypatch.setattr(assets, "draw", draw)
    done = call("upscale", *flags)
    assert (done.code, done.summary["done"]) == (0, 2), done.stderr
    assert outcomes(tmp_path / "out")["wide.png"] == ("dead", "oom")

"""The upscale job when it is killed at named moments: the set is whole, each image once.

`tests/soak/kills.py` kills at random moments.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest

from pipelines import assets
from tests.core.tiny import ANCHORED
from tests.jobs.conftest import ROOT, Ran, run_until_killed, tree
from tests.jobs.tiny import NIGHT, SAMPLING, model_folder, receipts, write_waves

UNITS = ("--samples", 2, "--unit-megabytes", 0.04)  # of three images, the second of the rest
# It dies just before it puts the n-th file of this name in its place.
MOMENTS = {
    "before any image": ("*.png.json", 0),
    "between a sidecar and its map": ("*/01.png.uncertainty.png", 0),
    "between a map and its image": ("*/01.png", 0),
    "between images and their receipts": ("*/ledger/*", 0),
    "in the second unit": ("*/04.png", 0),
    "between the receipts and the report": ("*/night.html", 0),
}

# Forks itself for each moment, so that the imports are paid once. A trial ends by kill -9 just before the file gets
# its name: what was written before is there, and this one lies half done beside its place.
KILLER = """
import fnmatch, itertools, json, os, pandas, signal, sys, torch  # pandas: pyarrow would import it in each
from pipelines import assets, cli, upscaling, work
work.FLUSH_S = -1.0  # receipts after each unit
folder, moments, *flags = sys.argv[1:]
for number, (pattern, count) in enumerate(json.loads(moments)):
    if (pid := os.fork()) == 0:
        left = itertools.count(-count)
        def guarded(function):
            def call(source, target):
                if fnmatch.fnmatch(target, pattern) and next(left) == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(source, target)
            return call
        os.replace, os.link = guarded(os.replace), guarded(os.link)
        os._exit(cli.run_job("upscale", [*flags, "--output", f"{folder}/{number}"]))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code != -signal.SIGKILL:
        sys.exit(f"{pattern} was never written, exit code {code}")
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"), ANCHORED)


@pytest.fixture(scope="module")
def killed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `in`, and the outputs of runs that were killed, numbered as MOMENTS."""
    folder = tmp_path_factory.mktemp("killed")
    write_waves(folder / "in", 5)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    moments = json.dumps(list(MOMENTS.values()))
    words = [folder, moments, "--source", folder / "in", "--model", model, *NIGHT, *UNITS]
    command = [sys.executable, "-c", KILLER, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def night(killed: Path, model: Path, call: Callable[..., Ran]) -> Callable[[Path], Ran]:
    flags = ["--source", killed / "in", "--model", model, *NIGHT, *UNITS]
    return lambda output: call("upscale", *flags, "--output", output)


@pytest.fixture(scope="module")
def clean(killed: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run leaves that nobody kills."""
    from pipelines.cli import run_job

    output = tmp_path_factory.mktemp("clean") / "out"
    words = ["--source", killed / "in", "--model", model, *NIGHT, *UNITS, "--output", output]
    assert run_job("upscale", list(map(str, words))) == 0
    return tree(output)


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_moment_and_started_again_it_leaves_what_a_clean_run_leaves(
    killed: Path, clean: dict[str, bytes], night: Callable[[Path], Ran], moment: str
) -> None:
    output = killed / f"{list(MOMENTS).index(moment)}"
    there = {path.name: path.stat().st_mtime_ns for path in images(output)}
    published = {name for name in tree(output) if not name.startswith(".tmp-")}
    assert expected(moment)(there.keys(), published), (moment, published)
    told = receipts(output)
    again = night(output)
    assert again.code == 0, again.stderr
    assert tree(output) == clean
    found = receipts(output)
    assert {key: row["status"] for key, row in found.items()} == dict.fromkeys(names(killed), "done")
    adopted = there.keys() - told.keys()
    for key, row in found.items():  # what was whole is not put through the network again, nor written
        assert ("device_s" in row["metrics"]) == (key not in adopted), key
        assert row["metrics"]["lr_psnr"] > 50
    assert {path.name: path.stat().st_mtime_ns for path in images(output) if path.name in there} == there
    assert not [path for path in output.rglob(".tmp-*")]


def images(output: Path) -> list[Path]:
    return [path for path in output.glob("*.png") if "uncertainty" not in path.name]


def names(killed: Path) -> list[str]:
    return [path.name for path in (killed / "in").iterdir()]


def expected(moment: str) -> Callable[[Collection[str], Collection[str]], bool]:
    """Return what must hold of (the images that are there, all that is published) at a moment."""
    rules: dict[str, Callable[[Collection[str], Collection[str]], bool]] = {
        "before any image": lambda there, left: not there and not left,
        "between a sidecar and its map": lambda there, left: "01.png.json" in left and "01.png" not in there,
        "between a map and its image": lambda there, left: "01.png.uncertainty.png" in left and "01.png" not in there,
        "between images and their receipts": lambda there, left: len(there) == 3,
        "in the second unit": lambda there, left: 3 <= len(there) < 5 and "04.png" not in there,
        "between the receipts and the report": lambda there, left: len(there) == 5,
    }
    return rules[moment]


def test_a_rerun_of_a_finished_night_touches_no_file_and_builds_no_worker(
    killed: Path, clean: dict[str, bytes], tmp_path: Path, night: Callable[[Path], Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    assert night(output).code == 0
    before = stamps(output)
    monkeypatch.setattr(assets.UpscaleWorker, "__init__", refuse)
    monkeypatch.setattr(assets, "draw", refuse)
    again = night(output)
    assert (again.code, again.summary["inputs"], again.summary["unchanged"]) == (0, 0, len(clean) // 3), again.stderr
    assert stamps(output) == before and tree(output) == clean


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("a night with nothing to do began to work")


def stamps(output: Path) -> dict[str, int]:
    """Return when each file and folder was changed, but those of the lease."""
    lease = {"lease.json", "fences"}
    return {
        str(path.relative_to(output)): path.stat().st_mtime_ns
        for path in output.rglob("*")
        if not lease & {path.name, path.parent.name} and path.name != "_diffsr"
    }


@pytest.mark.ray
def test_killed_on_ray_and_started_again_it_leaves_what_a_clean_run_leaves(
    model: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    source, clean, output = tmp_path / "in", tmp_path / "clean", tmp_path / "killed"
    write_waves(source, 30)
    flags = ["--source", source, "--model", model, "--unit-megabytes", 0.001]
    assert call("upscale", "--output", clean, *flags, *NIGHT).code == 0
    on_ray = ["--output", output, "--num-workers", 2, "--no-track", *flags, *SAMPLING]
    run_until_killed("upscale", *on_ray, when=lambda: any(output.glob("*.png")))
    time.sleep(1)  # what Ray's workers still had in hand may land: it must not matter
    assert len(images(output)) < 30
    again = call("upscale", "--output", output, *flags, *NIGHT)
    assert again.code == 0, again.stderr
    assert tree(output) == tree(clean)
    assert [row["status"] for row in receipts(output).values()] == ["done"] * 30

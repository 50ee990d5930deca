"""The pairs job when it is killed, when two of it run at once, and when one has lost its lease: the set is whole.

`tests/soak/kills.py` kills at random moments; here it is every file that a run writes.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines import publication, storage
from pipelines.corpus import Corpus
from pipelines.ledger import Ledger
from pipelines.patches import PairsWorker
from tests.jobs.conftest import PAIRS_FLAGS, ROOT, Ran, photograph, png, run_until_killed, script, tree

FLAGS = ["--engine", "local", "--patch", 16, "--no-track"]


def put(source: Path, count: int) -> None:
    """Write noise of 32 px, another for each."""
    source.mkdir()
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        (source / f"{index}.png").write_bytes(png(pixels))


# Forks itself for each trial, so that the imports are paid once. A trial ends by kill -9 just before its k-th file
# gets its name: the file before is there and this one lies half done beside its place.
KILLER = """
import itertools, os, pandas, signal, sys  # pandas: pyarrow would import it in each
from pipelines import cli, pairs, work
work.FLUSH_S = -1.0  # receipts after each unit: more moments that differ
flags, folder = sys.argv[2:], sys.argv[1]
for number in itertools.count():
    if (pid := os.fork()) == 0:
        left = itertools.count(-number)
        def guarded(function):
            def call(*words):
                if next(left) == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*words)
            return call
        os.replace, os.link = guarded(os.replace), guarded(os.link)
        os._exit(cli.run_job("make_pairs", [*flags, "--output", f"{folder}/{number:02d}"]))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code != -signal.SIGKILL:
        sys.exit(code)
"""


def test_killed_before_any_of_its_files_a_resumed_run_leaves_the_set_of_a_clean_one(
    tmp_path: Path, call: Callable[..., Ran]
) -> None:
    put(tmp_path / "source", 4)
    (tmp_path / "source" / "rotten.png").write_bytes(b"\\x89PNG\\r\\n\\x1a\\n rotten")
    flags = list(map(str, ["--source", tmp_path / "source", "--unit-megabytes", 0.06, *FLAGS]))
    assert call("make_pairs", *flags, "--output", tmp_path / "clean").code == 0
    clean, letters = tree(tmp_path / "clean"), accounts(tmp_path / "clean")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", KILLER, str(tmp_path / "killed"), *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    trials = sorted((tmp_path / "killed").iterdir())
    assert len(trials) > 12
    seen = {frozenset(what_is_there(trial)) for trial in trials}
    for moment in ({"data"}, {"data", "ledger"}, {"data", "ledger", "card.html"}, {"manifests"}):
        assert any(moment <= there and "manifest.json" not in there for there in seen), (moment, seen)
    assert {"data"} in ({*there & {"data", "ledger"}} for there in seen)  # between a shard and its receipt
    for trial in trials:
        assert call("make_pairs", *flags, "--output", trial).code == 0
        assert tree(trial) == clean, trial.name
        assert accounts(trial) == letters


def what_is_there(output: Path) -> list[str]:
    places = ("data", "manifests", "_diffsr/ledger", "manifest.json", "card.html", "dead_letters.parquet")
    return [
        place.rpartition("/")[2]
        for place in places
        if (path := output / place).is_file()
        or path.is_dir()
        and any(".tmp-" not in file.name for file in path.iterdir())
    ]


def accounts(output: Path) -> dict[str, tuple[str, str]]:
    return {row["key"]: (row["status"], row["reason"]) for row in Ledger(str(output)).latest().to_pylist()}


@pytest.mark.ray
def test_killed_on_ray_and_continued_without_it_the_set_is_that_of_a_clean_run(
    tmp_path: Path, call: Callable[..., Ran]
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for index in range(24):
        (source / f"{index:02d}.png").write_bytes(png(photograph("astronaut.png", 96 + 8 * index)))
    flags = ["--source", source, "--unit-megabytes", "0.05", "--no-track", *PAIRS_FLAGS]
    assert call("make_pairs", "--output", tmp_path / "clean", "--engine", "local", *flags).code == 0
    killed = tmp_path / "killed"
    run_until_killed("make_pairs", "--output", killed, *flags, when=lambda: len(list(killed.glob("data/*"))) >= 2)
    assert not (killed / "manifest.json").exists()
    again = call("make_pairs", "--output", killed, "--engine", "local", *flags)
    assert again.code == 0 and "an interrupted plan is continued" in again.stderr, again.stderr
    assert tree(killed) == tree(tmp_path / "clean")


def test_of_two_runs_at_once_the_second_is_turned_away_and_the_first_is_whole(
    tmp_path: Path, call: Callable[..., Ran]
) -> None:
    put(tmp_path / "source", 60)
    flags = ["--source", tmp_path / "source", "--unit-megabytes", 0.01, *FLAGS]
    first = subprocess.Popen(script("make_pairs", "--output", tmp_path / "set", *flags), stderr=subprocess.PIPE)
    fence = tmp_path / "set/_diffsr/fences/0000000001"
    deadline = time.monotonic() + 60
    while not fence.exists():
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    second = call("make_pairs", "--output", tmp_path / "set", *flags)
    assert second.code == 5 and "is held by run pairs-" in second.stderr and second.summary["status"] == "failed"
    _, err = first.communicate(timeout=100)
    assert first.returncode == 0, err
    assert call("make_pairs", "--output", tmp_path / "clean", *flags).code == 0
    assert tree(tmp_path / "set") == tree(tmp_path / "clean")


def take_over(output: Path) -> None:
    """Leave what is there after another run has come, taken the next fence and gone again, while this one slept."""
    held = json.loads((output / "_diffsr/lease.json").read_bytes())
    taken = {**held, "fence": held["fence"] + 1, "expires": 0.0, "run_id": "newer"}
    storage.create(f"{output}/_diffsr/fences/{taken['fence']:010d}", json.dumps(taken).encode())


@pytest.mark.parametrize("moment", ["at its first unit", "before its commit", "over its error budget"])
def test_a_run_that_lost_its_lease_writes_no_receipt_and_no_set(
    tmp_path: Path, call: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    source, output = tmp_path / "source", tmp_path / "set"
    put(source, 6)
    flags = ["--source", source, *FLAGS]
    owner, name = {
        "at its first unit": (PairsWorker, "__call__"), "before its commit": (publication, "build_manifest"),
        "over its error budget": (Corpus, "listing"),
    }[moment]  # fmt: skip
    if moment == "over its error budget":
        for index in range(3):
            (source / f"rotten {index}.png").write_bytes(b"rotten")
        assert call("make_pairs", *flags, "--output", output).code == 3
        (output / "dead_letters.parquet").unlink()
    receipts = accounts(output)
    real = getattr(owner, name)

    def slow(*words: Any, **named: Any) -> Any:
        take_over(output)
        return real(*words, **named)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, slow)
        zombie = call("make_pairs", *flags, "--output", output)
    assert zombie.code == 5 and "lost its lease" in zombie.stderr
    assert {place.partition("/")[0] for place in tree(output)} <= {"data"}
    assert moment == "before its commit" or accounts(output) == receipts
    for folder in (output, tmp_path / "clean"):
        assert call("make_pairs", *flags, "--output", folder, "--max-dead-share", 1).code == 0
    assert tree(output) == tree(tmp_path / "clean")

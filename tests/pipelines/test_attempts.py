"""The laws of attempts: an asset that kills its worker becomes a dead letter, and nothing else does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.attempts import Attempts
from pipelines.images import Refused

UNIT = """
import os, sys
from pipelines.attempts import Attempts
from pipelines.images import Refused
attempts = Attempts(sys.argv[1], "unit")
for key in "abcd":
    try:
        attempts(key)
    except Refused as refused:
        print(key, refused.reason)
        continue
    if key in sys.argv[2]:
        os._exit(9)
    print(key, "done")
attempts.leave()
"""


def attempt(root: Path, killers: str) -> tuple[int, list[str]]:
    done = subprocess.run([sys.executable, "-c", UNIT, str(root), killers], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout.split("\n")[:-1]


def test_an_asset_that_kills_its_worker_is_refused_and_the_rest_is_done(tmp_path: Path) -> None:
    attempts = [attempt(tmp_path, "c") for _ in range(4)]
    assert [code for code, _ in attempts] == [9, 9, 9, 0]
    assert attempts[-1][1] == ["a done", "b done", "c worker_died", "d done"]
    assert not list(tmp_path.rglob("*.json"))


def test_two_killers_in_one_unit_are_both_found(tmp_path: Path) -> None:
    codes = [attempt(tmp_path, "bd")[0] for _ in range(6)]
    assert codes[-1] == 0 and codes.count(9) == 5


def test_a_process_that_is_killed_once_condemns_nothing(tmp_path: Path) -> None:
    assert attempt(tmp_path, "b")[0] == 9
    assert attempt(tmp_path, "b")[0] == 9  # as if two nights had been killed from outside, at the same asset
    assert attempt(tmp_path, "") == (0, ["a done", "b done", "c done", "d done"])


def test_a_first_attempt_leaves_one_mark_and_none_when_it_is_done(tmp_path: Path) -> None:
    attempts = Attempts(str(tmp_path), "unit")
    marks = list(tmp_path.rglob("*.json"))
    stamp = os.stat(marks[0]).st_mtime_ns
    attempts("a")
    assert len(marks) == 1 and os.stat(marks[0]).st_mtime_ns == stamp
    attempts.leave()
    assert not list(tmp_path.rglob("*.json"))


def test_the_refusal_names_what_happened(tmp_path: Path) -> None:
    for _ in range(3):
        attempt(tmp_path, "a")
    with pytest.raises(Refused) as caught:
        Attempts(str(tmp_path), "unit")("a")
    assert (caught.value.stage, caught.value.reason) == ("run", "worker_died")


def test_only_a_unit_that_killed_its_process_is_careful(tmp_path: Path) -> None:
    first = Attempts(str(tmp_path), "unit")
    assert not first.careful
    assert Attempts(str(tmp_path), "unit").careful and not Attempts(str(tmp_path), "other").careful
    Attempts(str(tmp_path), "unit").leave()
    assert not Attempts(str(tmp_path), "unit").careful

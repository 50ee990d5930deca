"""The upscale job over hostile content and names: the good are done, each bad one is one dead letter, nothing else.

The oracles are the corpus itself (`tests/hostile.py`), and Pillow for the real files.
"""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.images import REASONS, SUFFIXES
from tests import hostile
from tests.jobs.conftest import ROOT, Ran, tree
from tests.jobs.tiny import NIGHT, bicubic_folder, outcomes, receipts, waves, write_png, write_waves

NASTY = ROOT.parent / "shared" / "data" / "nasty"
needs_nasty = pytest.mark.skipif(not NASTY.is_dir(), reason="the real hostile files are not beside this checkout")
needs_rasterio = pytest.mark.skipif(find_spec("rasterio") is None, reason="the extra geo is not installed")
FLAGS = ("--steps", 1, "--tile", 32, "--halo", 0, "--consistency", "off", "--format", "png")
LIMITS = ("--max-megapixels", 0.02, "--max-raster-megapixels", 0.02, "--max-dead-share", 1)
RUN = """
import json, os, sys
from pipelines.cli import run_job
from tests.soak.watch import peak_bytes
code = run_job("upscale", sys.argv[1:])
print(json.dumps({"code": code, "peak_bytes": peak_bytes(os.getpid())}))
"""


@dataclass(frozen=True)
class Night:
    """A night over hostile files, in a process of its own: its folder with `in` and `out`, and what it left."""

    folder: Path
    summary: dict[str, Any]
    peak_bytes: int
    ledger: dict[str, dict[str, Any]]
    expected: dict[str, hostile.Expected]


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bicubic_folder(tmp_path_factory.mktemp("stub"))


@pytest.fixture(scope="module")
def made(stub: Path, tmp_path_factory: pytest.TempPathFactory) -> Night:
    """The corpus made in code, with ten small good pictures to each bad file."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "in").mkdir()
    expected = hostile.make(folder / "in")
    bad = sum(not isinstance(what, str) for what in expected.values())
    good = sum(isinstance(what, str) for what in expected.values())
    write_waves(folder / "in" / "good", 10 * bad - good, height=8, width=8)
    return ran(folder, stub, expected)


def ran(folder: Path, stub: Path, expected: dict[str, hostile.Expected]) -> Night:
    words = ["--source", folder / "in", "--output", folder / "out", "--model", stub, *NIGHT, *FLAGS, *LIMITS]
    command = [sys.executable, "-c", RUN, *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
    (folder / "here").mkdir()
    done = subprocess.run(
        command, env=environment, cwd=folder / "here", capture_output=True, text=True, errors="replace", timeout=200
    )
    assert done.returncode == 0, done.stderr
    summary, end = map(json.loads, done.stdout.splitlines()[-2:])
    assert end["code"] == 0, done.stderr
    return Night(folder, summary, end["peak_bytes"], receipts(folder / "out"), expected)


def assert_accounted(night: Night) -> None:
    """Each listed file has one receipt, each dead one a coded reason, each done one exactly its two objects."""
    counts = {"done": 0, "skipped": 0, "dead": 0}
    published = set[str]()
    for key, row in night.ledger.items():
        counts[row["status"]] += 1
        if row["status"] == "done":
            published |= {row["out_key"], f"{row['out_key']}.json"}
        else:
            assert row["reason"] in REASONS and row["stage"] and row["message"], key
    assert {name: night.summary[name] for name in counts} == counts
    assert set(tree(night.folder / "out")) == published
    # Nothing beside the prefix: not in the scratch folder, not where the process ran.
    assert sorted(os.listdir(night.folder)) == ["here", "in", "out"] and not os.listdir(night.folder / "here")
    assert not list((night.folder / "out").rglob(".tmp-*"))


@needs_rasterio
def test_of_hostile_files_among_ten_times_as_many_good_ones_each_becomes_what_is_expected(made: Night) -> None:
    found = {key: (row["status"], row["reason"]) for key, row in made.ledger.items()}
    expected = {}
    for name, what in made.expected.items():  # what gives no pairs can be upscaled, and a float picture is none
        expected[name] = hostile.DONE if what == hostile.SKIPPED else what
    expected["float.tif"] = frozenset({"unsupported_mode"})
    assert hostile.unexpected(expected, found) == {}
    assert {status for key, (status, _) in found.items() if key.startswith("good/")} == {"done"}
    bad = sum(row["status"] == "dead" for row in made.ledger.values())
    assert bad >= 25 and len(found) >= 10 * bad
    assert_accounted(made)


@needs_rasterio
def test_good_pictures_among_hostile_ones_have_the_bytes_that_they_have_alone(
    made: Night, stub: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    names = ["00.png", "57.png", "120.png"]
    for name in names:
        write_png(tmp_path / "in" / "good" / name, np.asarray(Image.open(made.folder / "in" / "good" / name)))
    words = ["--source", tmp_path / "in", "--output", tmp_path / "out", "--model", stub, *NIGHT, *FLAGS, *LIMITS]
    assert call("upscale", *words).summary["done"] == 3
    among = tree(made.folder / "out")
    assert tree(tmp_path / "out") == {
        name: among[name] for each in names for name in (f"good/{each}", f"good/{each}.json")
    }


@needs_rasterio
def test_hostile_files_cost_no_memory(made: Night) -> None:
    assert made.peak_bytes < 2**30


@needs_rasterio
def test_sizes_of_what_was_done_are_four_times_those_that_pillow_sees(made: Night) -> None:
    compared = 0
    for key, row in made.ledger.items():
        if row["status"] == "done" and not key.startswith("good/") and key not in hostile.DEEP:
            with (
                Image.open(made.folder / "in" / key) as before,
                Image.open(made.folder / "out" / row["out_key"]) as after,
            ):
                turned = before.getexif().get(274, 1) > 4
                assert after.size == tuple(4 * side for side in (before.size[::-1] if turned else before.size)), key
                assert after.format == "PNG", key
            compared += 1
    assert compared >= 60


@needs_nasty
@needs_rasterio
def test_of_real_hostile_files_each_has_one_receipt_and_what_is_done_is_what_pillow_opens(
    stub: Path, tmp_path: Path
) -> None:
    found = sorted(path for path in NASTY.rglob("*") if path.is_file() and path.suffix.lower() in SUFFIXES)
    assert len(found) > 700
    for path in found[::12]:  # the whole of them is 700 files; the pairs job reads all
        copy = tmp_path / "in" / path.relative_to(NASTY)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    night = ran(tmp_path, stub, {})
    assert set(night.ledger) == {str(path.relative_to(NASTY)) for path in found[::12]}
    assert_accounted(night)
    done = {key for key, row in night.ledger.items() if row["status"] == "done"}
    assert len(done) >= 30
    for key in done:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(tmp_path / "in" / key) as image:
                turned, size = image.getexif().get(274, 1) > 4, image.size
        with Image.open(tmp_path / "out" / night.ledger[key]["out_key"]) as after:
            assert after.size == tuple(4 * side for side in (size[::-1] if turned else size)), key


def test_a_name_that_the_output_cannot_hold_is_a_dead_letter(
    stub: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    names = ["x" * 251 + ".png", "y" * 248 + ".bmp", "folder.png", "file/a.png", "good.png"]  # at most 255 bytes each
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(waves(8, 8)).save(source / name)
    (output / "folder.png").mkdir(parents=True)
    (output / "file").write_bytes(b"in the way")
    words = ["--source", source, "--output", output, "--model", stub, *NIGHT]
    done = call("upscale", *words, "--max-dead-share", 1)
    assert done.code == 0, done.stderr
    assert outcomes(output) == {name: ("done", "") if name == "good.png" else ("dead", "bad_name") for name in names}


def test_links_that_leave_the_source_are_read_and_their_results_stay_below_the_output(
    stub: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    write_png(tmp_path / "elsewhere" / "a.png", waves(8, 8))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "in" / "folder").symlink_to(tmp_path / "elsewhere")
    before = tree(tmp_path / "elsewhere")
    words = ["--source", tmp_path / "in", "--output", tmp_path / "out", "--model", stub, *NIGHT]
    assert call("upscale", *words).summary["done"] == 2
    assert tree(tmp_path / "elsewhere") == before
    assert {name for name in tree(tmp_path / "out") if name.endswith("png")} == {"link.png", "folder/a.png"}

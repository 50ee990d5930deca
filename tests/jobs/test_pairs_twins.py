"""Pairs of real LR-HR twins: what lies on each other is paired pixel for pixel, what does not is refused with a reason.

HR are photographs; LR are made of them by Pillow, as by another camera: another kernel, gain, noise, or a shift.
"""

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.blobs import decode_blob
from pipelines.images import REASONS
from pipelines.ledger import Ledger
from pipelines.manifest import SPLITS, load_manifest
from pipelines.pairs import PairsConfig, make_pairs
from pipelines.reader import PairReader
from pipelines.rows import iter_pairs
from pipelines.runs import Summary
from tests.jobs.conftest import PHOTOGRAPHS, ROOT, Ran, photograph, png

SPACENET = ROOT.parent / "shared" / "data" / "satellite" / "spacenet"
needs_spacenet = pytest.mark.skipif(not SPACENET.is_dir(), reason="the real twins are not beside this checkout")
SIDE, PATCH = 192, 64


@dataclass(frozen=True)
class Made:
    """What a run left: its summary, the rows that count, and the latest receipt of each key."""

    summary: Summary
    rows: list[dict[str, Any]]
    ledger: dict[str, dict[str, Any]]

    def reason(self, key: str) -> tuple[str, str]:
        return self.ledger[key]["stage"], self.ledger[key]["reason"]


def made(root: Path, **settings) -> Made:
    fields = {"source": str(root / "hr"), "lr_source": str(root / "lr"), "output": str(root / "set"), "scale": 4}
    fields |= {"patch": PATCH, "engine": "local", "track": False, "val_share": 0.0, "test_share": 0.0}
    summary = make_pairs(PairsConfig(**{**fields, "max_dead_share": 1.0, **settings}))
    manifest = load_manifest(str(root / "set"))
    rows = [row for split in SPLITS for row in iter_pairs(str(root / "set"), manifest, split)]
    ledger = {row["key"]: row for row in Ledger(str(root / "set")).latest().to_pylist()}
    assert {row["source_key"] for row in rows} == {k for k, row in ledger.items() if row["status"] == "done"}
    assert all(not row["reason"] or row["reason"] in REASONS for row in ledger.values())
    return Made(summary, rows, ledger)


def other_camera(hr: np.ndarray, scale: int, *, seed: int = 0) -> np.ndarray:
    """Return HWC or HW pixels as another camera sees them: Lanczos, 0.9 of the light, noise of 2 levels of 255."""
    size = (hr.shape[1] // scale, hr.shape[0] // scale)
    seen = np.asarray(Image.fromarray(hr).resize(size, Image.Resampling.LANCZOS)).astype(float)
    noise = np.random.default_rng(seed).normal(0, 2, seen.shape)
    return np.clip(np.rint(0.9 * seen + 5 + noise), 0, 255).astype(np.uint8)


def shifted(name: str, right_px: int) -> tuple[np.ndarray, np.ndarray]:
    """Return HR, and LR of a quarter of its size whose content lies so many HR px further to the right."""
    whole = photograph(name, SIDE + 32)[16:-16]
    return whole[:, 16:-16], other_camera(whole[:, 16 - right_px : 16 - right_px + SIDE], 4)


def write(root: Path, key: str, hr: np.ndarray | None, lr: np.ndarray | None, *, lr_key: str = "") -> None:
    for folder, name, pixels in (("hr", key, hr), ("lr", lr_key or key, lr)):
        if pixels is not None:
            (root / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (root / folder / name).write_bytes(png(pixels))


def archive(root: Path, scale: int, names: tuple[str, ...] = PHOTOGRAPHS) -> None:
    """Write the twins of photographs, of which two are grey."""
    for seed, name in enumerate(names):
        hr = photograph(name, SIDE)
        write(root, Path(name).with_suffix(".png").name, hr, other_camera(hr, scale, seed=seed))


def assert_twins(rows: list[dict[str, Any]], root: Path, scale: int, lr_name: Callable[[str], str] = str) -> None:
    """HR and LR are crops of the two files, of one and the same place."""
    for row in rows:
        y, x, h, w = (row["crop"][name] for name in "yxhw")
        hr, lr = (Image.open(root / "hr" / row["source_key"]), Image.open(root / "lr" / lr_name(row["source_key"])))
        found = [np.squeeze(decode_blob(row[name])) for name in ("hr", "lr")]
        np.testing.assert_array_equal(found[0], np.asarray(hr)[y : y + h, x : x + w])
        low = tuple(slice(start // scale, (start + side) // scale) for start, side in ((y, h), (x, w)))
        np.testing.assert_array_equal(found[1], np.asarray(lr)[low])
        assert (row["lr_h"], row["lr_w"]) == found[1].shape[:2] == (h // scale, w // scale)
        assert (json.loads(row["degradation"]), row["degradation_seed"]) == ({"name": "twin", "scale": scale}, 0)


@pytest.mark.parametrize("scale", [2, 4])
def test_good_twins_are_paired_with_exactly_the_pixels_of_both_files(tmp_path: Path, scale: int) -> None:
    archive(tmp_path, scale)
    run = made(tmp_path, scale=scale)
    assert (run.summary.done, run.summary.dead) == (6, 0)
    assert len(run.rows) == 6 * 9  # the whole grid of each
    assert_twins(run.rows, tmp_path, scale)
    assert max(dict(row["metrics"])["misalignment_px"] for row in run.ledger.values()) < 0.1
    reader = PairReader(str(tmp_path / "set"), load_manifest(str(tmp_path / "set")), "train", seed=0)
    hr, lr = reader.batch(range(54))
    assert (hr.shape, lr.shape) == ((54, PATCH, PATCH, 3), (54, PATCH // scale, PATCH // scale, 3))
    assert hr.dtype == lr.dtype == np.uint8
    boxes = hr.reshape(54, PATCH // scale, scale, PATCH // scale, scale, 3).mean(axis=(2, 4))
    error = np.abs(0.9 * boxes + 5 - lr).mean(axis=(1, 2, 3))
    assert error.max() < 12  # the two sides of a pair belong together; of different pairs they differ by 40


def test_what_is_no_twin_is_refused_with_its_reason_and_the_others_go_on(
    tmp_path: Path, call: Callable[..., Ran]
) -> None:
    hr = {name: photograph(name, SIDE) for name in PHOTOGRAPHS}
    sharp = hr["astronaut.png"]
    write(tmp_path, "good.png", sharp, other_camera(sharp, 4))
    write(tmp_path, "quarter.png", *shifted("chelsea.png", 1))
    write(tmp_path, "shifted.png", *shifted("coffee.png", 8))
    write(tmp_path, "shifted back.png", *shifted("rocket.jpg", -8))
    write(tmp_path, "unrelated.png", hr["camera.png"], other_camera(hr["coins.png"], 4))
    write(tmp_path, "turned.png", hr["coins.png"], np.rot90(other_camera(hr["coins.png"], 4)))
    write(tmp_path, "flat.png", hr["coffee.png"][::-1], np.full((48, 48, 3), 90, np.uint8))
    write(tmp_path, "wrong size.png", sharp[::-1], other_camera(sharp[::-1], 2))
    write(tmp_path, "alone.png", sharp[:, ::-1], None)
    write(tmp_path, "rotten.png", hr["chelsea.png"][::-1], other_camera(hr["chelsea.png"][::-1], 4))
    rotten = (tmp_path / "lr" / "rotten.png").read_bytes()
    (tmp_path / "lr" / "rotten.png").write_bytes(rotten[: len(rotten) // 2])
    write(tmp_path, "nobody's.png", None, hr["camera.png"][:48, :48])
    flags = ["--source", tmp_path / "hr", "--lr-source", tmp_path / "lr", "--output", tmp_path / "set", "--no-track"]
    flags += ["--engine", "local", "--patch", PATCH, "--max-dead-share", 1]
    done = call("make_pairs", *flags)
    assert (done.code, done.summary["done"], done.summary["dead"]) == (0, 2, 8), done.stderr
    assert "1 of 10 objects" in done.stderr and "are the LR twin of no HR object" in done.stderr
    letters = {row["key"]: row for row in pq.read_table(tmp_path / "set/dead_letters.parquet").to_pylist()}
    assert {key: (row["stage"], row["reason"]) for key, row in letters.items()} == {
        "shifted.png": ("twin", "misaligned"), "shifted back.png": ("twin", "misaligned"),
        "unrelated.png": ("twin", "unrelated"), "turned.png": ("twin", "unrelated"), "flat.png": ("twin", "unrelated"),
        "wrong size.png": ("twin", "scale_mismatch"), "alone.png": ("twin", "no_twin"),
        "rotten.png": ("decode", "truncated"),
    }  # fmt: skip
    assert "+2.0" in letters["shifted.png"]["message"] and "-2.0" in letters["shifted back.png"]["message"]
    ledger = {row["key"]: dict(row["metrics"]) for row in Ledger(str(tmp_path / "set")).latest().to_pylist()}
    assert abs(ledger["quarter.png"]["misalignment_px"] - 0.25) < 0.06 and ledger["good.png"]["misalignment_px"] < 0.06
    lenient = call("make_pairs", *flags, "--max-misalignment", 2.5)
    assert (lenient.summary["done"], lenient.summary["dead"]) == (4, 6)
    strict = call("make_pairs", *flags, "--max-misalignment", 0.15)
    assert (strict.summary["done"], strict.summary["dead"]) == (1, 9)


def test_a_twin_that_appears_or_changes_is_work_and_nothing_else_is(tmp_path: Path) -> None:
    archive(tmp_path, 4, ("astronaut.png", "camera.png", "coins.png"))
    (tmp_path / "lr" / "coins.png").unlink()
    first = made(tmp_path)
    assert first.reason("coins.png") == ("twin", "no_twin") and first.summary.done == 2
    assert made(tmp_path).summary.inputs == 0
    hr = photograph("coins.png", SIDE)
    write(tmp_path, "coins.png", None, other_camera(hr, 4, seed=5))
    second = made(tmp_path)
    assert (second.summary.inputs, second.summary.done, second.summary.unchanged) == (1, 1, 2)
    assert len(second.rows) == len(first.rows) + 9
    write(tmp_path, "coins.png", None, other_camera(hr, 4, seed=6))
    third = made(tmp_path)
    assert (third.summary.inputs, third.summary.done, third.summary.unchanged) == (1, 1, 2)
    assert len(third.rows) == len(second.rows)
    assert_twins(third.rows, tmp_path, 4)  # of the new LR
    unchanged = {row["pair_id"] for row in first.rows}
    assert {row["pair_id"] for row in third.rows if row["source_key"] != "coins.png"} == unchanged
    turned = photograph("camera.png", SIDE)[::-1]
    write(tmp_path, "camera.png", turned, None)
    fourth = made(tmp_path)
    assert fourth.summary.inputs == 1 and fourth.reason("camera.png")[0] == "twin"
    (tmp_path / "lr" / "coins.png").unlink()
    fifth = made(tmp_path)
    assert fifth.summary.inputs == 1 and fifth.reason("coins.png") == ("twin", "no_twin")
    assert {row["source_key"] for row in fifth.rows} == {"astronaut.png"}


@pytest.mark.parametrize(("pattern", "twin"), [
    ("{folder}{stem}x4{suffix}", lambda key: key.replace(".png", "x4.png")),
    ("{stem}_low.png", lambda key: key.rpartition("/")[2].replace(".png", "_low.png")),
    ("low/{key}", lambda key: f"low/{key}"),
])  # fmt: skip
def test_a_pattern_says_where_the_twin_lies(tmp_path: Path, pattern: str, twin: Callable[[str], str]) -> None:
    for seed, key in enumerate(("a.png", "deep/er/b.png")):
        hr = photograph(PHOTOGRAPHS[seed], SIDE)
        write(tmp_path, key, hr, other_camera(hr, 4, seed=seed), lr_key=twin(key))
    run = made(tmp_path, lr_name=pattern)
    assert run.summary.done == 2
    assert_twins(run.rows, tmp_path, 4, twin)


def test_patches_in_which_a_twin_shows_nothing_are_dropped_and_odd_borders_left_over(tmp_path: Path) -> None:
    hr = photograph("astronaut.png", SIDE + 3)  # three rows and columns more than LR covers
    lr = other_camera(hr[:SIDE, :SIDE], 4)
    alpha = np.full((48, 48, 1), 255, np.uint8)
    alpha[20, 20] = 0  # in the middle cell of the grid
    write(tmp_path, "a.png", hr, np.concatenate([lr, alpha], axis=2))
    run = made(tmp_path)
    assert len(run.rows) == 8 and (64, 64) not in {(row["crop"]["y"], row["crop"]["x"]) for row in run.rows}
    assert dict(run.ledger["a.png"]["metrics"])["dropped_invalid"] == 1


def test_a_jpeg_twin_is_its_decoded_pixels(tmp_path: Path) -> None:
    hr = photograph("chelsea.png", SIDE)
    write(tmp_path, "a.png", hr, None)
    sink = io.BytesIO()
    Image.fromarray(other_camera(hr, 4)).save(sink, "JPEG", quality=70)
    (tmp_path / "lr").mkdir()
    (tmp_path / "lr" / "a.jpg").write_bytes(sink.getvalue())
    run = made(tmp_path, lr_name="{stem}.jpg")
    assert len(run.rows) == 9 and {row["lr_codec"] for row in run.rows} == {"webp"}
    assert_twins(run.rows, tmp_path, 4, lambda key: "a.jpg")


@pytest.mark.parametrize("flags", [["--degradation", "jpeg"], ["--lr-name", "same.png"], ["--lr-name", "{nothing}"]])
def test_settings_that_contradict_twins_are_bad_arguments(
    tmp_path: Path, call: Callable[..., Ran], flags: list[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        call("make_pairs", "--source", tmp_path, "--lr-source", tmp_path, "--output", tmp_path / "set", *flags)
    assert stopped.value.code == 2 and not (tmp_path / "set").exists()


@pytest.fixture
def satellite(tmp_path: Path) -> Path:
    """A panchromatic HR of 0.5 m (uint16) and a multispectral LR of 1 m (float64, four bands), under one name."""
    for folder, name in (("hr", "pan1.tif"), ("lr", "ms1.tif")):
        (tmp_path / folder).mkdir()
        shutil.copy(SPACENET / name, tmp_path / folder / "scene.tif")
    return tmp_path


@needs_spacenet
def test_real_twins_of_two_sensors_are_paired_in_their_own_samples(satellite: Path) -> None:
    rasterio = pytest.importorskip("rasterio")
    settings = {"scale": 2, "patch": 64, "value_range": (0.0, 2047.0)}
    refused = made(satellite, **settings)  # their grids agree to 0.03 px; what they show is 0.6 px apart
    assert refused.reason("scene.tif") == ("twin", "misaligned")
    run = made(satellite, max_misalignment=1.0, **settings)
    assert run.summary.done == 1 and 60 < len(run.rows) <= 81
    assert 0.5 < dict(run.ledger["scene.tif"]["metrics"])["misalignment_px"] < 0.7
    with rasterio.open(SPACENET / "pan1.tif") as pan, rasterio.open(SPACENET / "ms1.tif") as ms:
        hr, lr = np.moveaxis(pan.read(), 0, 2), np.moveaxis(ms.read(), 0, 2)
    for row in run.rows:
        y, x = row["crop"]["y"], row["crop"]["x"]
        found = decode_blob(row["hr"]), decode_blob(row["lr"])
        assert [side.dtype for side in found] == [np.uint16, np.float32]
        np.testing.assert_array_equal(found[0], hr[y : y + 64, x : x + 64])
        np.testing.assert_array_equal(found[1], lr[y // 2 : y // 2 + 32, x // 2 : x // 2 + 32].astype(np.float32))
    manifest = load_manifest(str(satellite / "set"))
    levels = PairReader(str(satellite / "set"), manifest, "train", seed=0).batch(range(60), channels=4)
    assert [side.shape for side in levels] == [(60, 64, 64, 4), (60, 32, 32, 4)]
    assert all(side.dtype == np.float32 and 20 < side.mean() < 200 for side in levels)
    one = made(satellite, max_misalignment=1.0, bands=(1,), **settings)
    assert {decode_blob(row["lr"]).shape for row in one.rows} == {(32, 32, 1)}


@needs_spacenet
def test_twins_whose_georeferences_disagree_are_refused_whatever_their_pixels_say(satellite: Path) -> None:
    rasterio = pytest.importorskip("rasterio")
    with rasterio.open(satellite / "lr" / "scene.tif", "r+") as twin:
        twin.transform = twin.transform @ rasterio.Affine.translation(0, 1)  # a row of LR
    run = made(satellite, scale=2, value_range=(0.0, 2047.0), max_misalignment=0.9)
    assert run.reason("scene.tif") == ("twin", "misaligned")


@needs_spacenet
def test_float_twins_need_a_value_range_as_float_images_do(satellite: Path) -> None:
    run = made(satellite, scale=2, patch=64, max_misalignment=1.0)
    assert run.reason("scene.tif") == ("decode", "no_value_range")

"""The pairs job against hostile corpora, one made in code and a real one: all is accounted for, the good is paired.

Pillow, used as a person would use it, is the oracle of what is good and of its pixels; imagecodecs of 16-bit PNG.
"""

import os
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from pipelines.blobs import decode_blob
from pipelines.images import REASONS
from pipelines.ledger import Ledger
from pipelines.manifest import SPLITS, load_manifest
from pipelines.pairs import PairsConfig, make_pairs
from pipelines.rows import iter_pairs
from pipelines.runs import Summary
from tests import hostile
from tests.jobs.conftest import ROOT, Ran, photograph, png

NASTY = ROOT.parent / "shared" / "data" / "nasty"
IMAGES = (
    ".png .jpg .jpeg .jpe .jfif .webp .tif .tiff .bmp .gif .ppm .pgm .pbm .pnm .jp2 .avif .heic .jxl .psd .dng .cr2"
)
PATCH, MOST = 16, 4
needs_nasty = pytest.mark.skipif(not NASTY.is_dir(), reason="the real hostile files are not beside this checkout")
needs_rasterio = pytest.mark.skipif(find_spec("rasterio") is None, reason="the extra geo is not installed")


@dataclass(frozen=True)
class Made:
    """What a run left: its summary, the ledger by key, and the rows of its set by source."""

    source: Path
    output: Path
    summary: Summary
    ledger: dict[str, dict]
    rows: dict[str, list[dict]]


def made(source: Path, output: Path, **settings) -> Made:
    fields = {"engine": "local", "track": False, "min_deviation": 0.0, "duplicates": "keep", "max_dead_share": 1.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of broken metadata
        summary = make_pairs(PairsConfig(source=str(source), output=str(output), **{**fields, **settings}))
    rows: dict[str, list[dict]] = {}
    manifest = load_manifest(str(output))
    for split in SPLITS:
        for row in iter_pairs(str(output), manifest, split):
            rows.setdefault(row["source_key"], []).append(row)
    ledger = Ledger(str(output)).rows().to_pylist()
    assert len(ledger) == len({row["key"] for row in ledger}), "a source has two receipts"
    return Made(source, output, summary, {row["key"]: row for row in ledger}, rows)


def letters(output: Path) -> list[tuple[str, str, str]]:
    """Return (key, stage, reason) of the dead letters as they lie in their table."""
    table = pq.read_table(output / "dead_letters.parquet").to_pylist()
    assert all(row["message"] and row["reason"] in REASONS for row in table)
    return [(row["key"], row["stage"], row["reason"]) for row in table]


def assert_accounted(run: Made) -> None:
    """Each source has one receipt, each dead one a letter; the set holds the done ones and no other."""
    status = Counter(row["status"] for row in run.ledger.values())
    summary = run.summary
    assert (summary.done, summary.skipped, summary.dead) == tuple(status[name] for name in ("done", "skipped", "dead"))
    assert (summary.inputs, summary.exit_code) == (len(run.ledger), 0)
    dead = sorted((k, r["stage"], r["reason"]) for k, r in run.ledger.items() if r["status"] == "dead")
    assert letters(run.output) == dead
    assert set(run.rows) == {key for key, row in run.ledger.items() if row["status"] == "done"}
    for key, row in run.ledger.items():
        count = sum(value for name, value in row["metrics"] if name.startswith("pairs_"))
        assert count == len(run.rows.get(key, [])), key
        assert (row["status"] == "done") == (not row["reason"]), key


def assert_crops(rows: list[dict], pixels: np.ndarray) -> None:
    """Every HR is the crop of HWC `pixels` that its row names."""
    for row in rows:
        y, x, h, w = (row["crop"][name] for name in "yxhw")
        np.testing.assert_array_equal(decode_blob(row["hr"]), pixels[y : y + h, x : x + w], err_msg=row["source_key"])


@dataclass(frozen=True)
class Seen:
    """A picture as a person with Pillow sees it: upright pixels HWC, and where it is opaque."""

    pixels: np.ndarray
    opaque: np.ndarray
    profile: bool

    def num_patches(self, side: int) -> int:
        """Return how many cells of the grid are opaque."""
        rows, columns = (length // side for length in self.opaque.shape)
        cells = self.opaque[: rows * side, : columns * side].reshape(rows, side, columns, side)
        return int(cells.all(axis=(1, 3)).sum())


def seen(path: Path) -> Seen | None:
    """Return the picture of a file that holds one frame of 8-bit grey or RGB, None for any other file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(path) as image:
                if getattr(image, "n_frames", 1) != 1 or image.format == "JPEG2000" or _bits(path, image) > 8:
                    return None
                profile = "icc_profile" in image.info
                image.load()
                upright = ImageOps.exif_transpose(image)
        except Exception:  # whatever Pillow says of a file that it cannot read
            return None
    if upright.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "YCbCr"):
        return None
    transparent = upright.has_transparency_data
    alpha = np.asarray(upright.convert("RGBA"))[:, :, 3] if transparent else None
    target = ("L" if upright.mode in ("1", "L", "LA") else "RGB") + "A" * transparent
    pixels = np.atleast_3d(np.asarray(upright if upright.mode == target else upright.convert(target)))
    pixels = pixels[:, :, :-1] if transparent else pixels
    return Seen(pixels, np.ones(pixels.shape[:2], bool) if alpha is None else alpha == 255, profile)


def _bits(path: Path, image: Image.Image) -> int:
    """Return the bits of a sample as the file says it; Pillow's mode hides some."""
    if image.format == "PNG":
        return path.read_bytes()[24]  # of IHDR
    if image.format == "TIFF":
        whole = set(image.tag_v2.get(339, (1,))) == {1}  # Pillow shows signed bytes as if they were not
        return max(image.tag_v2.get(258, (1,))) if whole else 32
    if image.format == "PPM":
        return max(
            (int(a[1]).bit_length() for a in (tile[3] for tile in image.tile) if isinstance(a, tuple)), default=8
        )
    return 8


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, hostile.Expected]]:
    folder = tmp_path_factory.mktemp("hostile")
    return folder, hostile.make(folder)


@pytest.fixture(scope="module")
def own(corpus, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The run over the corpus that is made in code."""
    return made(corpus[0], tmp_path_factory.mktemp("own") / "set", patch=32, min_deviation=2.0)


@pytest.fixture(scope="module")
def nasty(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The run over the real files."""
    output = tmp_path_factory.mktemp("nasty") / "set"
    return made(NASTY, output, patch=PATCH, max_per_image=MOST, max_megapixels=20.0)


def test_each_file_made_to_be_hostile_becomes_what_is_expected_of_it(corpus, own: Made) -> None:
    _, expected = corpus
    assert set(own.ledger) == set(expected)
    assert hostile.unexpected(expected, {k: (r["status"], r["reason"]) for k, r in own.ledger.items()}) == {}
    assert_accounted(own)


def test_upright_patches_of_every_mode_and_orientation_have_the_pixels_that_pillow_shows(corpus, own: Made) -> None:
    folder, expected = corpus
    compared = 0
    for key, rows in own.rows.items():
        if key in hostile.DEEP or (picture := seen(folder / key)) is None or picture.profile:
            continue
        assert len(rows) == min(64, picture.num_patches(32)), key
        assert_crops(rows, picture.pixels)
        compared += 1
    assert compared >= 60
    for key in (key for key in own.rows if key.startswith("orientation")):
        (first,) = [row for row in own.rows[key] if (row["crop"]["y"], row["crop"]["x"]) == (0, 0)]
        corner = decode_blob(first["hr"])[: hostile.CORNER - 1, : hostile.CORNER - 1].astype(int)
        assert np.abs(corner - hostile.RED).max() < 30, key


@needs_nasty
def test_every_listed_file_of_the_real_hostile_corpus_has_one_receipt(nasty: Made) -> None:
    listed = {
        os.path.relpath(os.path.join(folder, name), NASTY)
        for folder, _, names in os.walk(NASTY)
        for name in names
        if name.lower().endswith(tuple(IMAGES.split()))
    }
    assert set(nasty.ledger) == listed and len(listed) > 700
    assert_accounted(nasty)


@needs_nasty
def test_every_real_file_that_pillow_opens_is_paired_with_the_pixels_that_it_shows(nasty: Made) -> None:
    compared = num_patches = 0
    for key, row in nasty.ledger.items():
        if (picture := seen(NASTY / key)) is None or picture.profile and row["reason"] == "bad_profile":
            continue
        if np.prod(picture.opaque.shape) > 20e6:
            assert row["reason"] == "too_large", key
            continue
        count = min(MOST, picture.num_patches(PATCH))
        assert row["status"] == ("done" if count else "skipped"), (key, row["reason"], row["message"])
        rows = nasty.rows.get(key, [])
        assert len(rows) == count, key
        if not picture.profile:
            assert_crops(rows, picture.pixels)
            compared += bool(rows)
            num_patches += len(rows)
    assert compared > 400 and num_patches > 1000


@needs_nasty
def test_no_real_file_that_pillow_cannot_open_is_paired(nasty: Made) -> None:
    for key in (key for key in nasty.rows if not key.endswith(".jp2")):  # of which Pillow has another library
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(NASTY / key) as image:  # raises for what is no image
                assert getattr(image, "n_frames", 1) == 1, key
                image.load()


@needs_nasty
@needs_rasterio
def test_pairs_of_16_bit_png_have_the_samples_that_another_decoder_reads(nasty: Made) -> None:
    imagecodecs = pytest.importorskip("imagecodecs")
    deep = sorted(path for path in (NASTY / "pngsuite" / "pngsuite").glob("*16.png") if path.name[0] != "x")
    assert len(deep) > 20
    compared = 0
    for path in deep:
        data = path.read_bytes()
        key = str(path.relative_to(NASTY))
        pixels = np.atleast_3d(imagecodecs.png_decode(data))
        assert pixels.dtype == np.uint16
        if data[25] & 4 or b"tRNS" in data:
            continue  # with an alpha: some patches are transparent
        rows = nasty.rows[key]
        assert len(rows) == MOST and {row["hr_dtype"] for row in rows} == {"uint16"}
        assert {row["hr_codec"] for row in rows} == {"npy+zstd"}
        assert_crops(rows, pixels)
        compared += 1
    assert compared > 15


@needs_nasty
def test_all_orientations_of_one_real_picture_give_the_same_patches(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(1, 9):
        with Image.open(NASTY / "exif_orientation" / f"Landscape_{number}.jpg") as image:
            image.reduce(4).save(source / f"Landscape_{number}.jpg", quality=95, exif=image.getexif())
    run = made(source, tmp_path / "set", patch=128)
    patches = {
        (key, row["crop"]["y"], row["crop"]["x"]): decode_blob(row["hr"]).astype(np.int16)
        for key, rows in run.rows.items()
        for row in rows
    }
    places = sorted({place[1:] for place in patches})
    assert len(places) == 6 and len(patches) == 8 * 6

    def share(one: np.ndarray, other: np.ndarray) -> float:
        """How much of two patches differs by more than JPEG does."""
        return float((np.abs(one - other).max(axis=2) > 24).mean())

    for (key, *place), pixels in patches.items():  # their own numbers are written on them
        assert share(pixels, patches["Landscape_1.jpg", *place]) < 0.1, (key, place)
    mirrored = [share(patches["Landscape_1.jpg", *p], patches["Landscape_1.jpg", *p][:, ::-1]) for p in places]
    assert min(mirrored) > 0.3


def test_the_eight_orientations_of_lossless_files_give_equal_patches(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    upright = Image.fromarray(photograph("coffee.png", 96)[:64])
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # orientation: the Image.Transpose that undoes it
    for number in range(1, 9):
        exif = Image.Exif()
        exif[274] = number
        stored = upright if number == 1 else upright.transpose(Image.Transpose(back[number]))
        stored.save(source / f"{number}.png", exif=exif)
    run = made(source, tmp_path / "set", patch=32)
    found = {key: [row["hr_sha256"] for row in rows] for key, rows in run.rows.items()}
    assert len(found) == 8 and len(set(map(tuple, found.values()))) == 1 and len(found["1.png"]) == 6
    assert_crops(run.rows["6.png"], np.asarray(upright))


def test_over_the_error_budget_the_letters_are_there_and_the_set_is_not(
    corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., Ran]
) -> None:
    folder, expected = corpus
    monkeypatch.chdir(tmp_path)  # where the files that try to run a command would leave a trace
    flags = ["--source", folder, "--output", "set", "--engine", "local", "--patch", 32, "--max-megapixels", 20]
    failed = call("make_pairs", *flags, "--no-track")
    dead = {key for key, what in expected.items() if not isinstance(what, str)}
    assert (failed.code, failed.summary["status"], failed.summary["dead"]) == (3, "failed", len(dead))
    assert {key for key, _, _ in letters(tmp_path / "set")} == dead
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["_diffsr", "data", "dead_letters.parquet"]
    allowed = call("make_pairs", *flags, "--no-track", "--max-dead-share", 1)
    assert (allowed.code, allowed.summary["inputs"], allowed.summary["unchanged"]) == (0, 0, len(expected))
    assert {key for key, _, _ in letters(tmp_path / "set")} == dead
    assert os.listdir(tmp_path) == ["set"]


def test_who_takes_the_rotten_files_away_has_mended_the_cause(tmp_path: Path, call: Callable[..., Ran]) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "good.png").write_bytes(png(photograph("coffee.png")))
    for index in range(3):
        (source / f"{index}.png").write_bytes(b"<html>not found</html>")
    flags = ["--source", source, "--output", tmp_path / "set", "--engine", "local", "--patch", 32, "--no-track"]
    assert call("make_pairs", *flags).code == 3
    for index in range(3):
        (source / f"{index}.png").unlink()
    mended = call("make_pairs", *flags)
    assert mended.code == 0, mended.stderr
    assert letters(tmp_path / "set") == []

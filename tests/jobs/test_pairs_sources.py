"""Where the pairs job takes its images from, and what it makes of them: lists, rasters, colour profiles, whole images.

Pixels are judged by decoders that the job does not use for them (rasterio, imagecodecs, Pillow) and by closed forms.
"""

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffsr_core.degradation import Degradation
from pipelines.blobs import decode_blob
from pipelines.ledger import Ledger
from pipelines.manifest import SPLITS, load_manifest
from pipelines.pairs import PairsConfig, make_pairs
from pipelines.reader import PairReader
from pipelines.rows import iter_pairs
from pipelines.runs import Summary
from tests.icc import PRIMARIES_XY, rgb_profile, rgb_to_xyz_d50, srgb_curve
from tests.jobs.conftest import ROOT, Ran, photograph, png

SATELLITE = ROOT.parent / "shared" / "data" / "satellite"
needs_rasters = pytest.mark.skipif(not SATELLITE.is_dir(), reason="the real rasters are not beside this checkout")


@dataclass(frozen=True)
class Made:
    """What a run left: its summary, the rows that count, the latest receipt of each key, and where the set lies."""

    summary: Summary
    rows: list[dict[str, Any]]
    ledger: dict[str, dict[str, Any]]
    output: str

    def reader(self) -> PairReader:
        return PairReader(self.output, load_manifest(self.output), "train", seed=0)

    def hr(self, key: str) -> np.ndarray:
        """Return the HR of the one pair of a source."""
        (blob,) = [row["hr"] for row in self.rows if row["source_key"] == key]
        return decode_blob(blob)

    def outcome(self, key: str) -> tuple[str, str, str]:
        return tuple(self.ledger[key][name] for name in ("status", "stage", "reason"))


def made(source: Path, output: Path, **settings) -> Made:
    fields = {
        "engine": "local",
        "track": False,
        "patch": 32,
        "val_share": 0.0,
        "test_share": 0.0,
        "max_dead_share": 1.0,
    }
    summary = make_pairs(PairsConfig(source=str(source), output=str(output), **{**fields, **settings}))
    manifest = load_manifest(str(output))
    rows = [row for split in SPLITS for row in iter_pairs(str(output), manifest, split)]
    ledger = {row["key"]: row for row in Ledger(str(output)).latest(recipe=None).to_pylist()}
    return Made(summary, rows, ledger, str(output))


def crop_of(row: dict[str, Any], pixels: np.ndarray) -> np.ndarray:
    """Return what a row's crop cuts out of HWC pixels."""
    y, x, h, w = (row["crop"][name] for name in "yxhw")
    return pixels[y : y + h, x : x + w]


def assert_lr_is_degraded_hr(row: dict[str, Any]) -> None:
    """LR is the core's degradation of HR, bit for bit, by the columns of the row alone."""
    hr, lr = decode_blob(row["hr"]), decode_blob(row["lr"])
    again = Degradation(**json.loads(row["degradation"])).apply(hr, seed=row["degradation_seed"])
    assert again.dtype == lr.dtype and np.array_equal(again, lr)


def raster(path: Path, bands: list[int] | None = None) -> np.ndarray:
    """Return the samples HWC as rasterio reads them."""
    rasterio = pytest.importorskip("rasterio")
    with rasterio.open(path) as dataset:
        return np.moveaxis(dataset.read(bands), 0, 2)


def only(folder: Path, *paths: Path) -> Path:
    """Return a folder with copies of these files."""
    folder.mkdir()
    for path in paths:
        shutil.copy(path, folder)
    return folder


def pictures(folder: Path, count: int) -> list[Path]:
    """Write 64 px crops of a photograph, one another's neighbours."""
    folder.mkdir(parents=True)
    whole = photograph("astronaut.png", 384)
    for index in range(count):
        y, x = divmod(index, 6)
        (folder / f"{index}.png").write_bytes(png(whole[64 * y : 64 * y + 64, 64 * x : 64 * x + 64]))
    return [folder / f"{index}.png" for index in range(count)]


def test_a_text_list_names_its_images_in_every_way_and_what_is_missing_is_a_dead_letter(
    tmp_path: Path, call: Callable[..., Ran]
) -> None:
    files = pictures(tmp_path / "images", 5)
    lines = ["images/0.png", str(files[1]), files[2].as_uri(), "images/0.png", "", "# images/4.png", "images/gone.png"]
    lines += ["http://localhost/3.png", "images"]
    (tmp_path / "list.txt").write_text("\n".join(lines) + "\n")
    flags = ["--output", tmp_path / "set", "--engine", "local", "--patch", 32, "--no-track", "--max-dead-share", 1]
    done = call("make_pairs", "--source", tmp_path / "list.txt", *flags)
    assert (done.code, done.summary["inputs"], done.summary["done"], done.summary["dead"]) == (0, 6, 3, 3), done.stderr
    dead = pq.read_table(tmp_path / "set/dead_letters.parquet").to_pylist()
    assert {(row["key"], row["stage"], row["reason"]) for row in dead} == {
        ("images/gone.png", "read", "missing"), ("http://localhost/3.png", "read", "bad_name"),
        ("images", "read", "io_error"),
    }  # fmt: skip
    shutil.copy(files[3], tmp_path / "images/gone.png")
    again = call("make_pairs", "--source", tmp_path / "list.txt", *flags)
    assert (again.summary["inputs"], again.summary["done"], again.summary["unchanged"]) == (1, 1, 5)


def test_of_a_parquet_list_only_what_has_another_etag_is_done_again(tmp_path: Path) -> None:
    files = pictures(tmp_path / "images", 8)
    listing = tmp_path / "list.parquet"

    def write(etags: list[str | None]) -> None:
        uris = [f"images/{path.name}" if index % 2 else str(path) for index, path in enumerate(files[:4])]
        sizes = [path.stat().st_size if index else None for index, path in enumerate(files[:4])]
        pq.write_table(pa.table({"uri": uris, "etag": pa.array(etags, pa.string()), "size": sizes}), listing)

    write(["a", "b", "c", None])
    first = made(listing, tmp_path / "set")
    assert (first.summary.inputs, first.summary.done) == (4, 4)
    before = {row["pair_id"] for row in first.rows if not row["source_key"].endswith("1.png")}
    for index in (1, 2, 3):  # the second says so by its etag, the third does not, of the fourth the store is asked
        shutil.copy(files[4 + index], files[index])
    write(["a", "new", "c", None])
    second = made(listing, tmp_path / "set")
    assert (second.summary.inputs, second.summary.unchanged) == (2, 2)
    changed = {row["source_key"] for row in second.rows} - {str(files[0]), str(files[2])}
    assert changed == {"images/1.png", "images/3.png"}
    kept = {row["pair_id"] for row in second.rows if row["source_key"] in (str(files[0]), str(files[2]))}
    assert kept < before
    for row in second.rows:
        if row["source_key"] in changed:
            pixels = np.asarray(Image.open(tmp_path / row["source_key"]))
            np.testing.assert_array_equal(decode_blob(row["hr"]), crop_of(row, pixels))


@needs_rasters
@pytest.mark.parametrize(("name", "side"), [("s2_l2a_cog_29RKH/B04.tif", 128), ("rioxarray/test_rpcs.tif", 32)])
def test_a_16_bit_geotiff_gives_uint16_pairs_without_the_patches_that_touch_nodata(
    tmp_path: Path, name: str, side: int
) -> None:
    source = only(tmp_path / "source", SATELLITE / name)
    settings = {"patch": side, "value_range": (0.0, 10000.0), "min_deviation": 0.0, "duplicates": "keep"}
    run = made(source, tmp_path / "set", **settings)
    pixels = raster(SATELLITE / name)
    rows, columns = (range(0, length - side + 1, side) for length in pixels.shape[:2])
    grid = [(y, x) for y in rows for x in columns]
    whole = {(y, x) for y, x in grid if pixels[y : y + side, x : x + side].all()}  # 0 is nodata
    assert {(row["crop"]["y"], row["crop"]["x"]) for row in run.rows} == whole and len(run.rows) == len(whole) > 20
    (receipt,) = run.ledger.values()
    assert dict(receipt["metrics"]).get("dropped_invalid", 0) == len(grid) - len(whole)
    assert (len(whole) < len(grid)) == (name == "rioxarray/test_rpcs.tif")
    for row in run.rows[::5]:
        hr = decode_blob(row["hr"])
        np.testing.assert_array_equal(hr, crop_of(row, pixels))
        assert (hr.dtype, row["hr_dtype"], row["hr_channels"]) == (np.uint16, "uint16", 1)
        assert row["hr_codec"] == row["lr_codec"] == "npy+zstd"
        assert_lr_is_degraded_hr(row)
        np.testing.assert_allclose(row["mean"], [hr.mean() * 255 / 10000], rtol=1e-5)
        np.testing.assert_allclose(row["deviation"], [hr.std() * 255 / 10000], rtol=1e-5)
    reader = run.reader()
    hr, lr = reader.batch(range(4), channels=3)  # levels of 255, grey in three channels
    stored = np.stack([reader.pair(position)[0] for position in range(4)]).astype(np.float32)
    assert hr.dtype == lr.dtype == np.float32 and lr.shape == (4, side // 4, side // 4, 3)
    np.testing.assert_allclose(hr, np.repeat(stored * (255 / 10000), 3, axis=3), rtol=1e-6)
    assert 5 < hr.mean() < 250


@needs_rasters
@pytest.mark.parametrize(
    ("bands", "codec"), [((), "npy+zstd"), ((3, 2, 1), "webp"), ((4,), "png"), ((4, 1), "npy+zstd")]
)
def test_of_four_bands_those_are_taken_that_were_asked_for(tmp_path: Path, bands: tuple[int, ...], codec: str) -> None:
    naip = SATELLITE / "naip" / "m_4709963_se_14_1_20200831.tif"
    run = made(only(tmp_path / "source", naip), tmp_path / "set", patch=64, bands=bands, max_per_image=5)
    pixels = raster(naip, list(bands) or None)
    assert len(run.rows) == 5
    for row in run.rows:
        np.testing.assert_array_equal(decode_blob(row["hr"]), crop_of(row, pixels))
        assert (row["hr_codec"], row["hr_dtype"], row["hr_channels"]) == (codec, "uint8", pixels.shape[2])
        assert len(row["mean"]) == pixels.shape[2]
        assert_lr_is_degraded_hr(row)
    channels = pixels.shape[2]
    assert run.reader().batch(range(5), channels=channels)[0].shape == (5, 64, 64, channels)
    if channels not in (1, 3):
        with pytest.raises(ValueError, match=f"{channels} channels"):
            run.reader().batch(range(5), channels=3)


@needs_rasters
def test_floats_need_a_value_range_and_a_band_that_is_not_there_is_refused(tmp_path: Path) -> None:
    dem = SATELLITE / "landsat7" / "olinda_dem_utm25s.tif"
    source = only(tmp_path / "source", dem)
    assert made(source, tmp_path / "set").outcome(dem.name) == ("dead", "decode", "no_value_range")
    assert made(source, tmp_path / "two", bands=(2,)).outcome(dem.name) == ("dead", "decode", "missing_band")
    run = made(source, tmp_path / "set", value_range=(0.0, 100.0))  # another recipe: it is tried again
    assert run.outcome(dem.name)[0] == "done" and len(run.rows) > 4
    pixels = raster(dem)
    for row in run.rows:
        hr = decode_blob(row["hr"])
        np.testing.assert_array_equal(hr, crop_of(row, pixels))
        assert hr.dtype == np.float32
        assert_lr_is_degraded_hr(row)
    levels, _ = run.reader().batch(range(len(run.rows)), channels=1)
    np.testing.assert_allclose(
        levels.mean(), np.mean([decode_blob(row["hr"]).mean() for row in run.rows]) * 2.55, rtol=1e-4
    )


def test_jpeg_2000_of_another_encoder_gives_the_samples_that_went_into_it(tmp_path: Path) -> None:
    pytest.importorskip("rasterio")
    imagecodecs = pytest.importorskip("imagecodecs")
    source = tmp_path / "source"
    source.mkdir()
    deep = photograph("coffee.png", 96).astype(np.uint16) * 16 + 7
    stored = {"deep.jp2": deep, "grey.jp2": photograph("coins.png", 96)[:, :, None]}
    for name, pixels in stored.items():
        (source / name).write_bytes(imagecodecs.jpeg2k_encode(np.squeeze(pixels), level=0, reversible=True))
    run = made(source, tmp_path / "set", value_range=(0.0, 4095.0), min_deviation=0.0)
    assert len(run.rows) == 18
    for row in run.rows:
        pixels = stored[row["source_key"]]
        np.testing.assert_array_equal(decode_blob(row["hr"]), crop_of(row, pixels))
        assert (row["source_format"], row["hr_dtype"]) == ("JPEG 2000", str(pixels.dtype))


def in_srgb(pixels: np.ndarray, space: str) -> np.ndarray:
    """Return uint8 pixels of an RGB space in sRGB, from the definitions of both: no colour management library."""
    encoded = pixels / 255
    light = encoded ** (563 / 256) if space == "Adobe RGB" else srgb_curve(encoded)
    to_srgb = np.linalg.inv(rgb_to_xyz_d50(PRIMARIES_XY["sRGB"])) @ rgb_to_xyz_d50(PRIMARIES_XY[space])
    light = np.clip(light @ to_srgb.T, 0, 1)
    return 255 * np.where(light <= 0.04045 / 12.92, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("space", ["Display P3", "Adobe RGB"])
def test_a_wide_picture_is_converted_to_srgb_and_kept_as_it_is_in_its_native_space(tmp_path: Path, space: str) -> None:
    pixels = photograph("coffee.png", 64)
    source = tmp_path / "source"
    source.mkdir()
    Image.fromarray(pixels).save(source / "wide.png", icc_profile=rgb_profile(space))
    Image.fromarray(pixels[::-1]).save(source / "plain.png")
    run = made(source, tmp_path / "set", patch=64)
    assert run.outcome("wide.png")[0] == "done"
    expected = in_srgb(pixels, space)
    assert np.abs(run.hr("wide.png") - expected).max() <= 2 and np.abs(pixels - expected).max() > 10
    np.testing.assert_array_equal(run.hr("plain.png"), pixels[::-1])
    assert {row["source_key"]: row["source_profile"] for row in run.rows} == {"wide.png": space, "plain.png": ""}
    native = made(source, tmp_path / "native", patch=64, working_space="native")
    np.testing.assert_array_equal(native.hr("wide.png"), pixels)
    assert {row["source_profile"] for row in native.rows} == {space, ""}
    (tmp_path / "space.icc").write_bytes(rgb_profile(space))
    wide = made(source, tmp_path / "wide", patch=64, working_space=str(tmp_path / "space.icc"))
    np.testing.assert_array_equal(wide.hr("wide.png"), pixels)
    assert np.abs(in_srgb(wide.hr("plain.png"), space) - pixels[::-1]).max() <= 3
    spaces = [load_manifest(str(tmp_path / name)).recipe["working_space"] for name in ("set", "native", "wide")]
    assert spaces[:2] == ["srgb", "native"] and spaces[2].startswith("icc:") and str(tmp_path) not in spaces[2]


def test_an_image_that_is_one_patch_and_needs_no_change_keeps_its_bytes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    whole = photograph("astronaut.png", 384)
    cells = iter(whole[y : y + 64, x : x + 64] for y in range(0, 384, 64) for x in range(0, 384, 64))

    def write(name: str, image: Image.Image, **options: Any) -> None:
        out = io.BytesIO()
        image.save(out, name.rpartition(".")[2].replace("jpg", "jpeg"), **options)
        (source / name).write_bytes(out.getvalue())

    turned = Image.Exif()
    turned[274] = 6
    srgb, wide = rgb_profile("sRGB"), rgb_profile("Display P3")
    kept = {"a.png": {}, "b.jpg": {"quality": 80}, "c.webp": {"quality": 70}, "srgb.png": {"icc_profile": srgb}}
    for name, options in kept.items():
        write(name, Image.fromarray(next(cells)), **options)
    write("grey.jpg", Image.fromarray(next(cells)).convert("L"), quality=90)
    changed = {"turned.jpg": {"exif": turned}, "wide.png": {"icc_profile": wide}, "a.bmp": {}, "a.tiff": {}}
    for name, options in changed.items():
        write(name, Image.fromarray(next(cells)), **options)
    write("palette.png", Image.fromarray(next(cells)).quantize(200))
    write("larger.png", Image.fromarray(whole[100:164, 100:165]))
    run = made(source, tmp_path / "set", patch=64)
    codecs = {"png": "png", "jpg": "jpeg", "webp": "webp"}
    assert {row["source_key"] for row in run.rows} == {path.name for path in source.iterdir()}
    for row in run.rows:
        name = row["source_key"]
        if name in {*kept, "grey.jpg"}:
            assert row["hr"] == (source / name).read_bytes() and row["hr_codec"] == codecs[name.rpartition(".")[2]], (
                name
            )
        else:
            assert row["hr"] != (source / name).read_bytes() and row["hr_codec"] == "webp", name
        with Image.open(source / name) as image:
            assert row["source_format"] == image.format
        shown = np.asarray(Image.open(io.BytesIO(row["hr"])).convert("L" if row["hr_channels"] == 1 else "RGB"))
        np.testing.assert_array_equal(np.squeeze(decode_blob(row["hr"])), shown)  # by any image library
        assert_lr_is_degraded_hr(row)


def test_patches_of_a_reduced_image_are_its_bicubic_and_their_crops_say_where_they_lie(tmp_path: Path) -> None:
    image = photograph("coffee.png", 200)[:, :136]
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(png(image))
    run = made(tmp_path / "in", tmp_path / "out", reductions=(1, 2), min_deviation=0.0, duplicates="keep")
    sides = [row["crop"]["h"] for row in run.rows]
    assert sides.count(32) == (200 // 32) * (136 // 32) and sides.count(64) == (100 // 32) * (68 // 32)
    assert len({row["pair_id"] for row in run.rows}) == len(run.rows) == len(sides)
    for row in run.rows:
        crop, hr = crop_of(row, image), decode_blob(row["hr"])
        assert row["crop"]["h"] == row["crop"]["w"] and hr.shape == (32, 32, 3)
        wanted = crop if row["crop"]["h"] == 32 else Degradation("bicubic", 2).apply(crop, seed=0)
        assert np.array_equal(hr, wanted)
        assert_lr_is_degraded_hr(row)
    assert {row["split"] for row in run.rows} == {"train"}


def test_as_many_patches_are_taken_of_each_reduction_and_one_that_is_too_small_gives_none(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(png(photograph("coffee.png", 200)[:, :136]))
    settings = {"min_deviation": 0.0, "duplicates": "keep", "crops": "random", "max_per_image": 3}
    run = made(tmp_path / "in", tmp_path / "out", reductions=(1, 3, 8), **settings)
    assert sorted(row["crop"]["h"] for row in run.rows) == [32, 32, 32, 96, 96, 96]


def test_a_set_without_reductions_is_the_set_that_it_was_before_there_were_any(tmp_path: Path) -> None:
    space = PairsConfig(source="in", output="out").space()
    assert "reductions" not in PairsConfig(source="in", output="out").recipe(space)
    assert PairsConfig(source="in", output="out", reductions=(2,)).recipe(space)["reductions"] == [2]
    for wrong in ((), (0,), (2, 2), (17,)):
        with pytest.raises(ValueError, match="reductions .* must be whole numbers from 1 to 16, once each"):
            PairsConfig(source="in", output="out", reductions=wrong)
    with pytest.raises(ValueError, match="reductions .* must be 1 with lr_source"):
        PairsConfig(source="in", output="out", lr_source="lr", reductions=(2,))

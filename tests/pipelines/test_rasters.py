"""Laws of pipelines.rasters: windows of a raster are the stored samples, valid where they are, whatever the format."""

import base64
import io
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from pipelines import images, rasters
from pipelines.corpus import Original
from pipelines.images import REASONS, Refused
from pipelines.profiles import WorkingSpace
from pipelines.rasters import RasterScene
from pipelines.scenes import SceneSettings, open_scene

rasterio = pytest.importorskip("rasterio", reason="rasters need the extra geo")
DATA = Path(__file__).resolve().parents[2] / "../shared/data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="real rasters (../shared/data) are not here")
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
PLACE = rasterio.Affine(10, 0, 500000, 0, -10, 4600000)
PLAIN = rasterio.Affine.identity()


def opened(data, **settings):
    if isinstance(data, Path):
        return open_scene(Original("", data.stat().st_size, None, str(data)), settings=SceneSettings(**settings))
    return open_scene(Original("", len(data), data, None), settings=SceneSettings(**settings))


def whole(scene):
    return scene.window(0, 0, scene.height, scene.width)


def refusal(data, **settings):
    with pytest.raises(Refused) as caught, opened(data, **settings) as scene:
        whole(scene)
    assert caught.value.reason in REASONS
    return caught.value


def noise(*shape, dtype="uint16"):
    random = np.random.default_rng(5)
    if np.dtype(dtype).kind == "f":
        return random.normal(0, 1000, shape).astype(dtype)
    return random.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


@pytest.mark.filterwarnings("ignore")
def raster(samples, *, driver="GTiff", transform=PLACE, mask=None, colormap=None, **options):
    """Return the bytes of a raster of CHW samples."""
    count, height, width = samples.shape
    options |= {"crs": "EPSG:32633", "transform": transform} if transform != PLAIN else {}
    with rasterio.MemoryFile() as memory:
        with (
            rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
            memory.open(
                driver=driver,
                width=width,
                height=height,
                count=count,
                dtype=samples.dtype,
                **options,
            ) as dataset,
        ):
            if colormap:
                dataset.write_colormap(1, colormap)
            dataset.write(samples)
            if mask is not None:
                dataset.write_mask(mask)
        return memory.read()


def file_of(image, format, **options):
    out = io.BytesIO()
    image.save(out, format=format, **options)
    return out.getvalue()


def png16(samples, *chunks):
    """Return a PNG of uint16 HWC samples, by hand: Pillow writes none with colours."""
    height, width, channels = samples.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    parts = [header, *chunks, b"IDAT" + zlib.compress(rows), b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts
    )


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int8", "float32", "float64"])
@pytest.mark.parametrize("layout", [{}, {"tiled": True, "blockxsize": 16, "blockysize": 16}, {"interleave": "band"}])
@pytest.mark.parametrize("compress", ["none", "deflate"])
def test_windows_are_the_stored_samples_and_only_signed_and_float_become_float32(dtype, layout, compress):
    samples = noise(4, 50, 70, dtype=dtype)
    with opened(raster(samples, photometric="MINISBLACK", compress=compress, **layout)) as scene:
        assert isinstance(scene, RasterScene) and (scene.height, scene.width, scene.channels) == (50, 70, 4)
        assert scene.dtype == (dtype if dtype in ("uint8", "uint16") else "float32") and not scene.kept
        assert scene.transform == (10, 0, 500000, 0, -10, 4600000) and scene.format == "TIFF"
        for y, x, h, w in ((0, 0, 50, 70), (7, 13, 20, 31), (49, 69, 1, 1)):
            pixels, valid = scene.window(y, x, h, w)
            want = np.moveaxis(samples[:, y : y + h, x : x + w], 0, 2).astype(scene.dtype)
            np.testing.assert_array_equal(pixels, want)
            assert pixels.dtype == scene.dtype and pixels.flags.c_contiguous and valid is None
        with pytest.raises(ValueError, match="must not be empty, and lie inside"):
            scene.window(0, 60, 10, 11)


@pytest.mark.parametrize("dtype", ["int32", "uint32", "complex64"])
def test_what_float32_does_not_hold_is_refused(dtype):
    assert refusal(raster(np.ones((1, 8, 8), dtype))).reason == "unsupported_mode"


def test_bands_choose_and_order_and_one_that_is_not_there_or_is_alpha_is_refused():
    samples = noise(4, 20, 30)
    data = raster(samples, photometric="RGB", alpha="YES")
    with opened(data, bands=(3, 1)) as scene:
        np.testing.assert_array_equal(whole(scene)[0], np.moveaxis(samples[[2, 0]], 0, 2))
    with opened(data) as scene:
        assert scene.channels == 3
    for bands in ((5,), (1, 4)):
        assert refusal(data, bands=bands).reason == "missing_band"
    with opened(file_of(Image.fromarray(noise(9, 9, 3, dtype="uint8")), "TIFF"), bands=(2,)) as scene:
        assert scene.channels == 1


def test_alpha_and_internal_mask_hide_what_is_not_full():
    samples = noise(4, 20, 30)
    samples[3] = 65535
    samples[3, 4, 5], samples[3, 6, 7] = 65534, 0
    with opened(raster(samples, photometric="RGB", alpha="YES")) as scene:
        np.testing.assert_array_equal(whole(scene)[1], samples[3] == 65535)
        assert scene.window(7, 8, 5, 5)[1] is None
    mask = np.full((20, 30), 255, np.uint8)
    mask[3:5, 2:9] = 0
    with opened(raster(noise(3, 20, 30, dtype="uint8"), mask=mask)) as scene:
        np.testing.assert_array_equal(whole(scene)[1], mask == 255)


def test_nodata_is_a_pixel_all_of_whose_unsigned_or_one_of_whose_other_samples_has_it():
    samples = np.full((2, 6, 6), 7, np.uint16)
    samples[:, 1, 1] = 0
    samples[0, 2, 2] = 0
    with opened(raster(samples, nodata=0)) as scene:
        valid = whole(scene)[1]
        assert not valid[1, 1] and valid.sum() == 35
    with opened(raster(samples, nodata=0), bands=(1,)) as scene:
        assert whole(scene)[1].sum() == 34
    with opened(raster(samples.astype(np.int16), nodata=0)) as scene:
        assert whole(scene)[1].sum() == 34


def test_what_is_not_finite_is_not_valid_nor_is_what_overflows():
    samples = np.ones((2, 5, 5), np.float64)
    samples[0, 1, 1], samples[1, 2, 2], samples[1, 3, 3] = np.nan, np.inf, 1e300
    with opened(raster(samples)) as scene:
        valid = whole(scene)[1]
        assert [tuple(at) for at in np.argwhere(~valid)] == [(1, 1), (2, 2), (3, 3)]


def test_a_palette_of_classes_and_samples_of_few_bits_are_no_brightness():
    classes = noise(1, 9, 9, dtype="uint8") % 4
    assert refusal(raster(classes, colormap={0: (0, 0, 0), 1: (255, 0, 0)})).reason == "unsupported_mode"
    assert refusal(raster(classes, nbits=2)).reason == "unsupported_mode"


# What a photograph of more than max_pixels is: the same picture as below it.
PHOTO = noise(45, 64, 3, dtype="uint8")
RGB = Image.fromarray(PHOTO)
INK = Image.fromarray(noise(45, 64, 4, dtype="uint8"), "CMYK")


def tiffs():
    white = ImageFileDirectory_v2()
    white[262] = 0
    exif = Image.Exif()
    files = {
        "rgb": file_of(RGB, "TIFF"),
        "grey": file_of(RGB.convert("L"), "TIFF", compression="tiff_lzw"),
        "white is zero": file_of(RGB.convert("L"), "TIFF", tiffinfo=white),
        "deflate": file_of(RGB, "TIFF", compression="tiff_adobe_deflate"),
        "jpeg, no chroma": file_of(RGB.convert("L"), "TIFF", compression="jpeg"),
        "cmyk": file_of(INK, "TIFF"),
        "cmyk jpeg": file_of(INK, "TIFF", compression="jpeg"),
        "rgba": file_of(RGB.convert("RGBA"), "TIFF"),
        "sRGB": file_of(RGB, "TIFF", icc_profile=SRGB),
        "another profile": file_of(RGB, "TIFF", icc_profile=SRGB.replace(b"rXYZ", b"????").replace(b"bXYZ", b"rXYZ")
                                   .replace(b"????", b"bXYZ")),
        "grey of another profile": file_of(RGB.convert("L"), "TIFF", icc_profile=SRGB.replace(b"rXYZ", b"????")
                                           .replace(b"bXYZ", b"rXYZ").replace(b"????", b"bXYZ")),
    }  # fmt: skip
    for orientation in range(2, 9):
        exif[274] = orientation
        files[f"orientation {orientation}"] = file_of(RGB, "TIFF", exif=exif)
    return files


@pytest.mark.parametrize("name", tiffs())
def test_a_photograph_read_by_window_is_the_one_that_is_decoded_whole(name):
    data = tiffs()[name]
    with opened(data) as picture, opened(data, max_pixels=1) as scene:
        assert isinstance(scene, RasterScene) and not isinstance(picture, RasterScene)
        assert (scene.height, scene.width, scene.profile) == (picture.height, picture.width, picture.profile)
        assert scene.transform is None
        for window in ((0, 0, scene.height, scene.width), (3, 5, 17, 11), (scene.height - 9, 1, 9, 20)):
            np.testing.assert_array_equal(scene.window(*window)[0], picture.window(*window)[0])
        with opened(data, max_pixels=1, bands=(1,)) as first:
            np.testing.assert_array_equal(whole(first)[0], whole(picture)[0][:, :, :1])


def test_a_photograph_that_is_not_read_by_window_stays_too_large():
    for data in (
        file_of(RGB.quantize(9), "TIFF"),
        file_of(RGB.convert("1"), "TIFF"),
        file_of(RGB.convert("LAB"), "TIFF"),
    ):
        refused = refusal(data, max_pixels=1)
        assert refused.reason == "too_large" and "not by window, either" in refused.message


def test_sixteen_bits_stay_sixteen_bits_in_png_tiff_and_ppm():
    grey, colour = noise(33, 47, 1), noise(33, 47, 3)
    ppm = b"P6\n# made by hand\n47 33\n65535\n" + colour.astype(">u2").tobytes()
    files = [(png16(grey), grey), (png16(colour), colour), (ppm, colour)]
    files.append((raster(np.moveaxis(colour, 2, 0), transform=PLAIN), colour))
    files.append((file_of(Image.fromarray(grey[:, :, 0]), "TIFF"), grey))
    for data, want in files:
        with opened(data) as scene:
            np.testing.assert_array_equal(scene.window(3, 4, 20, 30)[0], want[3:23, 4:34])
            assert scene.dtype == np.uint16 and scene.transform is None
        assert refusal(data[:-40]).reason in ("truncated", "corrupt")
    with opened(png16(np.dstack([colour, grey]))) as scene:
        np.testing.assert_array_equal(whole(scene)[1], grey[:, :, 0] == 65535)


def test_a_16_bit_png_is_turned_upright_and_limited_as_it_is_decoded_whole():
    exif = Image.Exif()
    exif[274] = 6
    colour = noise(33, 47, 3)
    data = png16(colour, b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0"))
    with opened(data) as scene:
        np.testing.assert_array_equal(whole(scene)[0], np.rot90(colour, 3))
        np.testing.assert_array_equal(scene.window(2, 3, 9, 8)[0], np.rot90(colour, 3)[2:11, 3:11])
    assert refusal(data, max_pixels=33 * 47 - 1).reason == "too_large"


def test_a_profile_on_16_bits_needs_imagecodecs_or_native(monkeypatch):
    swapped = SRGB.replace(b"rXYZ", b"????").replace(b"bXYZ", b"rXYZ").replace(b"????", b"bXYZ")
    colour = noise(20, 30, 3)
    for icc, changes in ((SRGB, False), (swapped, True)):
        data = png16(colour, b"iCCPx\0\0" + zlib.compress(icc))
        with opened(data, space=WorkingSpace("native")) as scene:
            np.testing.assert_array_equal(whole(scene)[0], colour)
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "imagecodecs", None)
            if changes:
                assert refusal(data).reason == "profile_16bit"
            else:
                np.testing.assert_array_equal(whole(opened(data))[0], colour)
        if changes:
            pytest.importorskip("imagecodecs", reason="16-bit profiles need the extra scans")
            with opened(data) as scene:
                want, _ = whole(
                    opened(file_of(Image.fromarray((colour >> 8).astype(np.uint8)), "PNG", icc_profile=icc))
                )
                assert np.abs((whole(scene)[0] >> 8).astype(int) - want).mean() < 2 and scene.profile


def test_a_profile_that_fits_no_channels_is_refused_and_native_reads_them():
    icc = base64.b64encode(SRGB).decode()
    for samples in (noise(4, 9, 9), noise(3, 9, 9, dtype="float32")):
        data = raster(samples, photometric="MINISBLACK", SOURCE_ICC_PROFILE=icc)
        refused = refusal(data)
        assert refused.reason == "unsupported_mode" and "native" in refused.message
        with opened(data, space=WorkingSpace("native")) as scene:
            np.testing.assert_array_equal(whole(scene)[0], np.moveaxis(samples, 0, 2))
            assert scene.profile.startswith("sRGB")
    assert refusal(png16(noise(9, 9, 3), b"iCCPx\0\0" + zlib.compress(b"rotten"))).reason == "bad_profile"


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("count", [1, 3])
def test_jpeg_2000_is_read_by_window(dtype, count):
    samples = noise(count, 60, 90, dtype=dtype)
    data = raster(
        samples, driver="JP2OpenJPEG", codec="JP2", quality=100, reversible=True, blockxsize=64, blockysize=64
    )
    with opened(data) as scene:
        np.testing.assert_array_equal(scene.window(5, 6, 50, 70)[0], np.moveaxis(samples[:, 5:55, 6:76], 0, 2))
        assert scene.format == "JPEG 2000" and scene.transform is not None
    assert refusal(data, max_raster_pixels=60 * 90 - 1).reason == "too_large"
    for keep in (20, 90, 200, len(data) // 2):
        assert refusal(data[:keep]).reason in ("truncated", "corrupt")
    assert b"colr\1\0\0\0\0\0" in data  # the colour space, 16 or 17
    assert refusal(data.replace(b"colr\1\0\0\0\0\0", b"colr\1\0\0\0\0\1")).reason == "unsupported_mode"
    with pytest.raises(Refused, match="unsupported_format"):
        images.decode(data)


def test_a_profile_in_jpeg_2000_is_converted():
    samples = noise(3, 30, 40, dtype="uint8")
    data = raster(samples, driver="JP2OpenJPEG", codec="JP2", quality=100, reversible=True, transform=PLAIN)
    swapped = SRGB.replace(b"rXYZ", b"????").replace(b"bXYZ", b"rXYZ").replace(b"????", b"bXYZ")
    at, head = data.index(b"colr") - 4, data.index(b"jp2h") - 4
    colr = struct.pack(">I", 11 + len(swapped)) + b"colr\2\0\0" + swapped
    size = int.from_bytes(data[head : head + 4], "big") + len(colr) - 15
    changed = data[:head] + struct.pack(">I", size) + data[head + 4 : at] + colr + data[at + 15 :]
    same = file_of(Image.fromarray(np.moveaxis(samples, 0, 2)), "PNG", icc_profile=swapped)
    with opened(changed) as scene, opened(same) as want:
        np.testing.assert_array_equal(whole(scene)[0], whole(want)[0])
        assert scene.profile == want.profile != "" and (whole(scene)[0] != np.moveaxis(samples, 0, 2)).any()


def test_signed_bytes_are_never_taken_for_unsigned_ones():
    samples = noise(1, 9, 9, dtype="int8")
    with opened(raster(samples, transform=PLAIN)) as scene:
        np.testing.assert_array_equal(whole(scene)[0], np.moveaxis(samples, 0, 2).astype(np.float32))


def test_unnamed_samples_beside_the_colours_are_no_channel_of_a_photograph_but_are_of_a_georeferenced_one():
    samples = noise(4, 9, 9, dtype="uint8")
    plain = raster(samples, photometric="RGB", alpha="NO", transform=PLAIN)
    for max_pixels in (1, 1000):
        with opened(plain, max_pixels=max_pixels) as scene:
            np.testing.assert_array_equal(whole(scene)[0], np.moveaxis(samples[:3], 0, 2))
        with opened(plain, max_pixels=max_pixels, bands=(4,)) as scene:
            np.testing.assert_array_equal(whole(scene)[0], np.moveaxis(samples[3:], 0, 2))
    with opened(raster(samples, photometric="RGB", alpha="NO")) as scene:
        assert scene.channels == 4
    nameless = bytearray(plain)
    nameless[plain.index(struct.pack("<HHI", 338, 3, 1))] ^= 3  # the tag of the extra samples is now an unknown one
    assert refusal(bytes(nameless), max_pixels=1).reason == "too_large"


def test_bands_without_a_name_beside_grey_are_bands():
    samples = noise(5, 9, 9, dtype="uint8")
    with opened(raster(samples, photometric="MINISBLACK", alpha="NO", transform=PLAIN)) as scene:
        np.testing.assert_array_equal(whole(scene)[0], np.moveaxis(samples, 0, 2))


def test_more_pages_than_one_are_refused_and_overviews_and_masks_are_none(tmp_path):
    pages = file_of(Image.fromarray(noise(9, 9, 1)[:, :, 0]), "TIFF", save_all=True, append_images=[RGB])
    assert refusal(pages).reason == "multipage"
    path = tmp_path / "a.tif"
    path.write_bytes(raster(noise(1, 64, 64), mask=np.full((64, 64), 255, np.uint8)))
    with rasterio.open(path, "r+") as dataset:
        dataset.build_overviews([2, 4])
    with opened(path) as scene:
        assert (scene.height, whole(scene)[1]) == (64, None)


def test_too_many_channels_and_blocks_that_are_no_windows_are_refused():
    assert refusal(raster(noise(300, 4, 4, dtype="uint8"))).reason == "too_many_channels"
    with opened(raster(noise(300, 4, 4, dtype="uint8")), bands=(300,)) as scene:
        assert scene.channels == 1
    bomb = raster(np.zeros((1, 6000, 6000), np.uint16), tiled=True, blockxsize=6000 // 16 * 16 + 16, blockysize=6016,
                  compress="deflate")  # fmt: skip
    assert refusal(bomb, max_pixels=1000).reason == "too_large"
    with opened(bomb) as scene:
        assert scene.window(5990, 5990, 10, 10)[0].sum() == 0


def test_a_damaged_block_is_a_refusal_of_its_window_alone(tmp_path):
    data = bytearray(raster(noise(1, 64, 64), tiled=True, blockxsize=32, blockysize=32, compress="deflate"))
    path = tmp_path / "damaged.tif"
    path.write_bytes(bytes(data[:-600]))  # the last tile is cut
    with opened(path) as scene:
        assert scene.window(0, 0, 32, 32)[0].shape == (32, 32, 1)
        with pytest.raises(Refused) as caught:
            scene.window(32, 32, 32, 32)
    assert caught.value.reason in ("truncated", "corrupt") and "damaged" not in caught.value.message


def test_no_side_file_is_read(tmp_path):
    (tmp_path / "a.tif").write_bytes(raster(noise(1, 8, 8), transform=PLAIN))
    (tmp_path / "a.tfw").write_text("1\n0\n0\n-1\n5\n5\n")
    (tmp_path / "a.tif.aux.xml").write_text("<PAMDataset><GeoTransform>1,2,0,3,0,4</GeoTransform></PAMDataset>")
    with Path(tmp_path / "a.tif.msk").open("wb") as side:
        side.write(raster(np.zeros((1, 8, 8), np.uint8), transform=PLAIN, INTERNAL_MASK_FLAGS_1="2"))
    with opened(tmp_path / "a.tif") as scene:
        assert scene.transform is None and whole(scene)[1] is None


def test_without_rasterio_it_says_what_to_install(monkeypatch):
    data = raster(noise(1, 8, 8))
    monkeypatch.setitem(sys.modules, "rasterio", None)
    refused = refusal(data)
    assert refused.reason == "needs_rasterio" and "diffsr[geo]" in refused.message


def test_memory_is_that_of_a_window_and_not_of_the_raster(monkeypatch):
    reads = []
    scene = opened(raster(noise(3, 300, 400), tiled=True, blockxsize=64, blockysize=64))
    original = scene._read
    monkeypatch.setattr(scene, "_read", lambda rows, columns: reads.append((rows, columns)) or original(rows, columns))
    scene.window(10, 20, 30, 40)
    assert reads == [((10, 40), (20, 60))] and scene._whole is None
    assert rasters._OPTIONS["GDAL_CACHEMAX"] == 128 << 20


@needs_data
def test_real_rasters_open_with_their_types_places_and_masks():
    folder = DATA / "satellite"
    with opened(folder / "s2_l2a_cog_29RKH/B02.tif") as scene:
        assert scene.dtype == np.uint16 and scene.transform[0] > 0
        assert "nodata" in scene._dataset.mask_flag_enums[0][0].name
    with opened(folder / "landsat7/L7_ETMs.tif") as scene:
        assert (scene.channels, scene.dtype) == (6, np.uint8)
    with (
        opened(folder / "rasterio_tests/RGB.byte.tif") as scene,
        rasterio.open(folder / "rasterio_tests/RGB.byte.tif") as d,
    ):
        np.testing.assert_array_equal(whole(scene)[1], d.dataset_mask() == 255)
        np.testing.assert_array_equal(whole(scene)[0], np.moveaxis(d.read(), 0, 2))
    with opened(folder / "spacenet/pan1.tif") as pan, opened(folder / "spacenet/ms1.tif") as ms:
        assert pan.transform[0] * 2 == pytest.approx(ms.transform[0], rel=1e-3)

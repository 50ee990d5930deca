"""Laws of pipelines.scenes: any image is windows of a scene or a reasoned refusal; windows are the whole."""

import io
import warnings
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms

from pipelines import blobs, images, rasters, scenes
from pipelines.corpus import Original
from pipelines.images import REASONS, Refused
from pipelines.profiles import WorkingSpace, colour_space, srgb_profile
from pipelines.scenes import PictureScene, SceneSettings, open_scene
from tests.icc import cmyk_profile, rgb_profile

DATA = Path(__file__).resolve().parents[2] / "../shared/data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the hostile corpus (../shared/data) is not here")
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def original(data, path=None):
    return Original("0" * 64, len(data), None if path else data, str(path) if path else None)


def opened(data, **settings):
    return open_scene(original(data), settings=SceneSettings(**settings))


def whole(scene):
    return scene.window(0, 0, scene.height, scene.width)


def refusal(data, **settings):
    with pytest.raises(Refused) as caught:
        opened(data, **settings)
    assert caught.value.reason in REASONS
    return caught.value


def photo(height=40, width=56, *, colours=3):
    y, x = np.mgrid[0:height, 0:width]
    channels = [4 * x, 5 * y, 255 - 2 * x - y][:colours]
    noise = np.random.default_rng(7).integers(0, 9, (height, width, colours))
    return np.clip(np.stack(channels, axis=-1) * 0.9 + noise, 0, 255).astype(np.uint8)


def file_of(image, format, **options):
    out = io.BytesIO()
    image.save(out, format=format, **options)
    return out.getvalue()


RGB = Image.fromarray(photo())
GREY = RGB.convert("L")
TURN = Image.Exif()
TURN[274] = 6


def p3():
    """Return a profile that is not sRGB: its primaries, turned round."""
    made = bytearray(SRGB)
    red, blue = made.index(b"rXYZ"), made.index(b"bXYZ")
    made[red : red + 4], made[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(made)


PICTURES = {  # name: (file, channels, kept)
    "rgb png": (file_of(RGB, "PNG"), 3, True),
    "grey png": (file_of(GREY, "PNG"), 1, True),
    "rgb jpeg": (file_of(RGB, "JPEG"), 3, True),
    "grey jpeg": (file_of(GREY, "JPEG"), 1, True),
    "rgb webp": (file_of(RGB, "WEBP"), 3, True),
    "png that is sRGB and says so": (file_of(RGB, "PNG", icc_profile=SRGB), 3, True),
    "png of another profile": (file_of(RGB, "PNG", icc_profile=p3()), 3, False),
    "turned jpeg": (file_of(RGB, "JPEG", exif=TURN), 3, False),
    "opaque rgba png": (file_of(RGB.convert("RGBA"), "PNG"), 3, False),
    "png with a transparent colour": (file_of(RGB, "PNG", transparency=(1, 2, 3)), 3, False),
    "palette": (file_of(RGB.quantize(16), "PNG"), 3, False),
    "one bit": (file_of(GREY.convert("1"), "PNG"), 1, False),
    "tiff": (file_of(RGB, "TIFF"), 3, False),
    "bmp": (file_of(RGB, "BMP"), 3, False),
    "gif": (file_of(RGB.quantize(16), "GIF"), 3, False),
    "ppm": (file_of(RGB, "PPM"), 3, False),
    "cmyk jpeg": (file_of(RGB.convert("CMYK"), "JPEG"), 3, False),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_what_decode_gives_and_kept_only_where_the_file_decodes_to_the_window(name):
    data, channels, kept = PICTURES[name]
    with opened(data) as scene:
        pixels, valid = whole(scene)
        assert (scene.channels, scene.kept, scene.dtype, scene.transform) == (channels, kept, np.uint8, None)
        assert pixels.shape == (scene.height, scene.width, channels) and pixels.flags.c_contiguous and valid is None
        if name != "png of another profile":
            np.testing.assert_array_equal(pixels, images.decode(data).pixels)
        if kept:
            np.testing.assert_array_equal(pixels, blobs.decode_blob(data))


@pytest.mark.parametrize("name", ["rgb png", "png of another profile", "turned jpeg", "grey jpeg"])
def test_any_window_is_cut_from_the_whole(name):
    with opened(PICTURES[name][0]) as scene:
        pixels, _ = whole(scene)
        for y, x, h, w in ((0, 0, 1, 1), (3, 5, 20, 11), (scene.height - 7, scene.width - 9, 7, 9)):
            found, _ = scene.window(y, x, h, w)
            np.testing.assert_array_equal(found, pixels[y : y + h, x : x + w])
            assert found.flags.c_contiguous
        for y, x, h, w in ((0, 0, 0, 1), (-1, 0, 2, 2), (0, 0, scene.height + 1, 1), (0, scene.width, 1, 1)):
            with pytest.raises(ValueError, match="must not be empty, and lie inside"):
                scene.window(y, x, h, w)


def test_a_profile_is_converted_recorded_and_left_alone_in_native():
    data = PICTURES["png of another profile"][0]
    stored = images.decode(data).pixels
    with opened(data) as scene, opened(data, space=WorkingSpace("native")) as native:
        want = ImageCms.profileToProfile(
            Image.fromarray(stored), io.BytesIO(p3()), ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
        np.testing.assert_array_equal(whole(scene)[0], np.asarray(want))
        np.testing.assert_array_equal(whole(native)[0], stored)
        assert scene.profile == native.profile != "" and native.kept and not scene.kept
    assert refusal(file_of(RGB, "PNG", icc_profile=b"rotten")).reason == "bad_profile"
    assert refusal(file_of(RGB, "TIFF", icc_profile=b"rotten")).reason == "bad_profile"  # which is never kept


def test_alpha_is_the_mask_of_what_is_valid_and_no_channel():
    alpha = np.full((40, 56), 255, np.uint8)
    alpha[5, 6], alpha[30, 40] = 254, 0
    for format in ("PNG", "WEBP", "TIFF"):
        lossless = {"lossless": True, "exact": True} if format == "WEBP" else {}
        with opened(file_of(Image.fromarray(np.dstack([photo(), alpha])), format, **lossless)) as scene:
            pixels, valid = whole(scene)
            np.testing.assert_array_equal(valid, alpha == 255)
            np.testing.assert_array_equal(pixels, photo())
            assert scene.window(6, 7, 20, 20)[1] is None and scene.channels == 3 and not scene.kept


def test_bands_choose_and_order_channels_and_one_that_is_not_there_is_refused():
    with opened(PICTURES["rgb png"][0], bands=(3, 1)) as scene:
        np.testing.assert_array_equal(whole(scene)[0], photo()[:, :, [2, 0]])
        assert not scene.kept
    with opened(PICTURES["rgb png"][0], bands=(1, 2, 3)) as scene:
        assert scene.kept
    assert refusal(PICTURES["rgb png"][0], bands=(4,)).reason == "missing_band"
    assert refusal(PICTURES["grey png"][0], bands=(1, 2)).reason == "missing_band"
    for bands in ((0,), (1, 1), tuple(range(1, 400))):
        with pytest.raises(ValueError, match="bands"):
            SceneSettings(bands=bands)
    with pytest.raises(ValueError, match="max_pixels=0"):
        SceneSettings(max_pixels=0)


def test_a_spooled_file_gives_the_same_as_one_in_memory(tmp_path):
    for name, (data, _, _) in PICTURES.items():
        path = tmp_path / "spool"
        path.write_bytes(data)
        with opened(data) as one, open_scene(original(data, path), settings=SceneSettings()) as other:
            np.testing.assert_array_equal(whole(one)[0], whole(other)[0], err_msg=name)


def test_the_header_is_judged_before_anything_is_decoded(monkeypatch):
    monkeypatch.setattr(images, "_to_grey_or_rgb", lambda image: pytest.fail("decoded"))
    for name in ("rgb png", "rgb jpeg", "rgb webp", "bmp", "gif", "ppm"):
        assert refusal(PICTURES[name][0], max_pixels=40 * 56 - 1).reason == "too_large"
    assert refusal(PICTURES["tiff"][0], max_pixels=1, max_raster_pixels=40 * 56 - 1).reason == "too_large"


def test_what_is_no_image_is_refused_by_its_bytes_with_its_whole_size():
    assert refusal(b"").reason == "empty_file"
    page = refusal(b"<html>404" + bytes(100))
    assert page.reason == "not_an_image" and page.message.startswith("109 bytes")
    assert refusal(b"%!PS-Adobe-3.0 EPSF-3.0\n").reason == "unsupported_format"
    assert refusal(b"<VRTDataset rasterXSize='1' rasterYSize='1'></VRTDataset>").reason == "not_an_image"
    assert refusal(b"GDAL_WMS<Service name='TMS'/>").reason == "not_an_image"


@needs_data
@pytest.mark.parametrize("max_pixels", [4_000_000, 1])
def test_every_hostile_file_is_a_scene_or_a_refusal_with_a_known_reason(max_pixels):
    pytest.importorskip("rasterio")
    settings = SceneSettings(max_pixels=max_pixels, max_raster_pixels=50_000_000)
    counts = {}
    files = [path for folder in ("nasty", "satellite") for path in sorted((DATA / folder).rglob("*.*"))]
    for path in files if max_pixels > 1 else [path for path in files if path.suffix.lower()[:4] == ".tif"]:
        data = path.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with open_scene(original(data), settings=settings) as scene:
                    outcome = type(scene).__name__
                    for y in range(0, scene.height, 512):
                        h = min(512, scene.height - y)
                        pixels, valid = scene.window(y, 0, h, scene.width)
                        assert pixels.shape == (h, scene.width, scene.channels) and pixels.dtype == scene.dtype
                        assert valid is None or (valid.shape == (h, scene.width) and not valid.all())
            except Refused as refused:
                assert (outcome := refused.reason) in REASONS
                assert str(path) not in refused.message and "/vsimem" not in refused.message
        counts[outcome] = counts.get(outcome, 0) + 1
    assert counts["RasterScene"] > 90 and (max_pixels == 1 or counts["PictureScene"] > 600)
    assert counts.get("corrupt", 0) >= 3 and counts["unsupported_mode"] >= 4


def test_a_picture_scene_is_a_scene():
    scene: scenes.Scene = opened(PICTURES["rgb png"][0])
    assert isinstance(scene, PictureScene)


NATIVE = WorkingSpace("native")


def test_what_the_output_will_carry_is_beside_the_scene():
    exif = Image.Exif()
    exif[271], exif[274] = "Maker", 6
    with opened(file_of(RGB, "JPEG", exif=exif, icc_profile=p3(), xmp=b"<x/>"), space=NATIVE) as scene:
        assert scene.icc == p3() and scene.exif == exif.tobytes()[6:] and scene.xmp == b"<x/>"
        assert scene.mode == "RGB" and scene.exif_transposed and not scene.has_alpha
        assert (scene.height, scene.width) == (56, 40) and scene.alpha(0, 0, 1, 1) is None
    with opened(file_of(RGB, "PNG"), space=NATIVE) as scene:
        assert (scene.icc, scene.exif, scene.xmp, scene.exif_transposed) == (None, None, None, False)


@pytest.mark.parametrize("name", ["native", "srgb"])
def test_the_profile_to_embed_is_that_of_the_pixels_given_out(name):
    space = WorkingSpace(name)
    for data, want in (
        (PICTURES["png of another profile"][0], p3() if name == "native" else srgb_profile()),
        (PICTURES["rgb png"][0], None),
        (PICTURES["cmyk jpeg"][0], None),
        (file_of(RGB.convert("CMYK"), "JPEG", icc_profile=cmyk_profile()), srgb_profile()),
    ):
        with opened(data, space=space) as scene:
            assert scene.icc == want
    with opened(file_of(GREY, "PNG", icc_profile=rgb_profile("Adobe RGB")), space=space) as scene:
        assert colour_space(scene.icc) == "GRAY" and scene.channels == 1
    with opened(PICTURES["rgb png"][0], space=WorkingSpace.parse("x", p3())) as scene:
        assert scene.icc == p3()
    with opened(PICTURES["png of another profile"][0], space=space, bands=(3, 2, 1)) as scene:
        assert scene.icc is None and scene.profile


@pytest.mark.parametrize("name", ["grey", "rgb", "palette", "transparent colour", "rgb of 16 bits", "tiff of 16 bits"])
def test_alpha_is_cut_by_window_as_the_pixels_are(name):
    samples = np.random.default_rng(2).integers(0, 65536, (40, 56, 4), np.uint16)
    eight = Image.fromarray((samples >> 8).astype(np.uint8))
    data, want = {
        "grey": lambda: (file_of(eight.convert("LA"), "PNG"), samples[..., 3] >> 8),
        "rgb": lambda: (file_of(eight, "PNG"), samples[..., 3] >> 8),
        "palette": lambda: (
            file_of(RGB.quantize(4), "PNG", transparency=b"\0\x50\xa0\xff"),
            np.array([0, 0x50, 0xA0, 0xFF])[np.array(RGB.quantize(4))],
        ),
        "transparent colour": lambda: (
            file_of(RGB, "PNG", transparency=tuple(map(int, photo()[5, 6]))),
            np.where((photo() == photo()[5, 6]).all(axis=2), 0, 255),
        ),
        "rgb of 16 bits": lambda: (imagecodecs.png_encode(samples), samples[..., 3]),
        "tiff of 16 bits": lambda: (tiff_of(samples, alpha="unassalpha"), samples[..., 3]),
    }[name]()
    with opened(data, space=NATIVE) as scene:
        assert scene.has_alpha
        for y, x, h, w in ((0, 0, 40, 56), (7, 9, 20, 31), (39, 55, 1, 1)):
            found = scene.alpha(y, x, h, w)
            assert found.dtype == scene.dtype and found.flags.c_contiguous
            np.testing.assert_array_equal(found, want[y : y + h, x : x + w])
        with pytest.raises(ValueError, match="must not be empty, and lie inside"):
            scene.alpha(0, 0, 41, 1)


def tiff_of(samples, *, alpha, pages=1, **options):
    out = io.BytesIO()
    with tifffile.TiffWriter(out) as writer:
        for _ in range(pages):
            writer.write(samples, photometric="rgb", extrasamples=[alpha] if alpha else None, metadata=None, **options)
    return out.getvalue()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_associated_alpha_gives_the_colours_back_in_8_and_16_bits(dtype):
    top = np.iinfo(dtype).max
    straight = np.random.default_rng(3).integers(0, top, (40, 56, 3), dtype, endpoint=True)
    alpha = np.broadcast_to(np.linspace(0, top, 56).round().astype(dtype), (40, 56))
    multiplied = np.round(straight * (alpha[:, :, None] / top)).astype(dtype)
    data = tiff_of(np.dstack([multiplied, alpha]), alpha="assocalpha")
    with opened(data, space=NATIVE) as scene, opened(data, space=NATIVE, max_pixels=1) as windowed:
        assert isinstance(windowed, rasters.RasterScene)
        np.testing.assert_array_equal(whole(windowed)[0], whole(scene)[0])
        np.testing.assert_array_equal(scene.alpha(0, 0, 40, 56), alpha)
        error = np.abs(whole(scene)[0].astype(float) - straight)[:, 1:]
        assert (error <= (0.5 if dtype == np.uint16 else 1) * top / alpha[:, 1:, None] + 1).all()
        np.testing.assert_array_equal(whole(scene)[0][:, 55], straight[:, 55])


def test_a_transparent_colour_of_16_bits_is_alpha():
    samples = np.arange(12, dtype=np.uint16).reshape(3, 4, 1) * 5000
    data = imagecodecs.png_encode(samples)
    key = b"tRNS" + (10_000).to_bytes(2, "big")
    part = b"\0\0\0\2" + key + zlib.crc32(key).to_bytes(4, "big")
    with opened(data[:33] + part + data[33:], space=NATIVE) as scene:
        np.testing.assert_array_equal(scene.alpha(0, 0, 3, 4), np.where(samples[..., 0] == 10_000, 0, 65535))
        np.testing.assert_array_equal(scene.alpha(1, 0, 2, 4), np.full((2, 4), 65535))


def test_16_bit_files_say_what_they_are():
    samples = np.random.default_rng(2).integers(0, 65536, (40, 56, 3), np.uint16)
    tags = [(271, 2, 0, "Maker", True), (274, 3, 1, 6, True), (700, 1, 4, b"<x/>", True)]
    with opened(tiff_of(samples, alpha=None, iccprofile=p3(), extratags=tags), space=NATIVE) as scene:
        read = Image.Exif()
        read.load(scene.exif)
        assert scene.icc == p3() and read[271] == "Maker" and scene.xmp == b"<x/>"
        assert scene.mode == "RGB;16" and scene.exif_transposed and scene.dtype == np.uint16
        np.testing.assert_array_equal(whole(scene)[0], np.rot90(samples, 3))
    with opened(imagecodecs.png_encode(np.ascontiguousarray(samples[..., 0])), space=NATIVE) as scene:
        assert (scene.mode, scene.icc, scene.exif, scene.has_alpha) == ("L;16", None, None, False)


def test_the_first_page_is_read_where_that_is_asked_for():
    frames = {"save_all": True, "append_images": [RGB.transpose(Image.Transpose.FLIP_TOP_BOTTOM)]}
    deep = np.random.default_rng(2).integers(0, 65536, (40, 56, 3), np.uint16)
    for data, want in (
        (file_of(RGB, "TIFF", **frames), photo()),
        (file_of(RGB, "PNG", **frames), photo()),
        (tiff_of(deep, alpha=None, pages=2), deep),
    ):
        assert refusal(data).reason in ("multipage", "animated")
        with opened(data, first_page=True) as scene:
            np.testing.assert_array_equal(whole(scene)[0], want)
            assert not scene.kept

"""Laws of pipelines.images: each file is a picture or a reasoned refusal; colour, alpha and profile survive."""

import io
import pickle
import struct
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from pipelines import images
from pipelines.images import Refused

NASTY = Path(__file__).resolve().parents[2] / "../shared/data/nasty"
needs_corpus = pytest.mark.skipif(not NASTY.is_dir(), reason="the hostile corpus (../shared/data/nasty) is not here")


def photo(height=40, width=56, *, colours=3):
    """Return a smooth uint8 HWC picture with a little noise: no symmetry, so that every turn of it differs."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [4 * x, 5 * y, 255 - 2 * x - y][:colours]
    noise = np.random.default_rng(7).integers(0, 9, (height, width, colours))
    return np.clip(np.stack(channels, axis=-1) * 0.9 + noise, 0, 255).astype(np.uint8)


def file_of(image, format, **options):
    out = io.BytesIO()
    image.save(out, format=format, **options)
    return out.getvalue()


def refusal(data, **options):
    with pytest.raises(Refused) as caught:
        images.decode(data, **options)
    assert caught.value.reason in images.REASONS
    return caught.value


def srgb():
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def chunk(part):
    return struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part))


def png_claiming(width, height, *, bits=8, samples=bytes(100)):
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(chunk, (header, b"IDAT" + zlib.compress(samples), b"IEND")))


ALPHA = photo(colours=1)[:, :, 0]
RGB = Image.fromarray(photo())
GREY = RGB.convert("L")
MODES = {  # name: (file, channels of the colour, has alpha, mode as stored)
    "grey png": (file_of(GREY, "PNG"), 1, False, "L"),
    "grey jpeg": (file_of(GREY, "JPEG"), 1, False, "L"),
    "grey + alpha": (file_of(Image.merge("LA", [GREY, GREY]), "PNG"), 1, True, "LA"),
    "one bit": (file_of(GREY.convert("1"), "PNG"), 1, False, "1"),
    "one bit with a transparent colour": (file_of(GREY.convert("1"), "PNG", transparency=0), 1, True, "1"),
    "grey with a transparent colour": (file_of(GREY, "PNG", transparency=200), 1, True, "L"),
    "fax": (file_of(GREY.convert("1"), "TIFF", compression="group4"), 1, False, "1"),
    "rgb png": (file_of(RGB, "PNG"), 3, False, "RGB"),
    "rgb jpeg": (file_of(RGB, "JPEG"), 3, False, "RGB"),
    "rgb webp": (file_of(RGB, "WEBP"), 3, False, "RGB"),
    "rgb bmp": (file_of(RGB, "BMP"), 3, False, "RGB"),
    "rgb ppm": (file_of(RGB, "PPM"), 3, False, "RGB"),
    "rgb with a transparent colour": (file_of(RGB, "PNG", transparency=(1, 2, 3)), 3, True, "RGB"),
    "opaque rgba": (file_of(RGB.convert("RGBA"), "PNG"), 3, True, "RGBA"),
    "rgba tiff": (file_of(RGB.convert("RGBA"), "TIFF"), 3, True, "RGBA"),
    "palette": (file_of(RGB.quantize(16), "PNG"), 3, False, "P"),
    "palette with transparency": (file_of(RGB.quantize(16), "PNG", transparency=b"\0\x80"), 3, True, "P"),
    "still gif": (file_of(RGB.quantize(16), "GIF"), 3, False, "P"),
    "cmyk": (file_of(RGB.convert("CMYK"), "JPEG"), 3, False, "CMYK"),
    "ycbcr tiff": (file_of(RGB.convert("YCbCr"), "TIFF"), 3, False, "YCbCr"),
    "lab": (file_of(Image.new("LAB", (56, 40), (128, 128, 128)), "TIFF"), 3, False, "LAB"),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_becomes_8_bit_grey_or_rgb_with_its_alpha_beside_it(name):
    data, colours, has_alpha, mode = MODES[name]
    found = images.decode(data)
    assert (found.pixels.shape, found.pixels.dtype, found.mode) == ((40, 56, colours), np.uint8, mode)
    assert (found.alpha is not None) == has_alpha
    assert not has_alpha or (found.alpha.shape, found.alpha.dtype) == ((40, 56), np.uint8)


def test_palette_and_transparent_colour_give_the_samples_they_stand_for():
    indexed = RGB.quantize(16)
    index = np.array(indexed)
    colours = np.array(indexed.getpalette("RGB")).reshape(-1, 3)
    found = images.decode(file_of(indexed, "PNG", transparency=b"\0\x80"))
    np.testing.assert_array_equal(found.pixels, colours[index])
    np.testing.assert_array_equal(found.alpha, np.where(index == 0, 0, np.where(index == 1, 128, 255)))
    grey = images.decode(file_of(GREY, "PNG", transparency=200))
    np.testing.assert_array_equal(grey.alpha, np.where(np.array(GREY) == 200, 0, 255))


def sixteen_bit_files():
    words = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    return {
        "grey png": file_of(Image.fromarray(words), "PNG"),
        "grey tiff": file_of(Image.fromarray(words), "TIFF"),
        "float tiff": file_of(Image.fromarray(words.astype(np.float32)), "TIFF"),
        "rgb png": png_claiming(8, 8, bits=16, samples=(b"\0" + bytes(range(48))) * 8),
        "rgb ppm": b"P6 8 8 65535\n" + bytes(8 * 8 * 6),
        "10-bit text ppm": b"P3 1 1 1023\n0 512 1023\n",
    }


@pytest.mark.parametrize("name", sixteen_bit_files())
def test_more_than_8_bits_is_refused_and_never_reduced(name):
    assert refusal(sixteen_bit_files()[name]).reason == "unsupported_mode"


@pytest.mark.parametrize("name", ["Landscape", "Portrait"])
@needs_corpus
def test_all_eight_orientations_are_one_picture(name):
    files = [(NASTY / f"exif_orientation/{name}_{number}.jpg").read_bytes() for number in range(1, 9)]

    def distance(a, b):  # in levels; the number of the orientation is drawn into each picture, and each was compressed
        return np.abs(a[::4, ::4].astype(int) - b[::4, ::4]).mean()

    upright = images.decode(files[0])
    wrong = min(distance(upright.pixels, turn(upright.pixels)) for turn in (np.fliplr, np.flipud))
    assert not upright.exif_transposed and wrong > 30
    for data in files[1:]:
        found = images.decode(data)
        assert found.exif_transposed and found.pixels.shape == upright.pixels.shape
        assert distance(found.pixels, upright.pixels) < 5


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_orientation_is_applied_in_every_format(format):
    turns = {2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: np.swapaxes(a, 0, 1)}
    turns |= {6: lambda a: np.rot90(a, 3), 7: lambda a: np.rot90(np.swapaxes(a, 0, 1), 2), 8: np.rot90}
    lossless = {"lossless": True} if format == "WEBP" else {}
    stored = images.decode(file_of(RGB, format, **lossless)).pixels
    for orientation, turn in turns.items():
        exif = Image.Exif()
        exif[274] = orientation
        found = images.decode(file_of(RGB, format, exif=exif, **lossless))
        np.testing.assert_array_equal(found.pixels, turn(stored))
        assert found.exif_transposed


@needs_corpus
def test_every_hostile_file_is_a_picture_or_a_refusal_with_a_known_reason():
    counts = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for path in sorted(NASTY.rglob("*.*")):
            try:
                outcome = images.decode(path.read_bytes(), max_pixels=4_000_000).format
            except Refused as refused:
                assert (outcome := refused.reason) in images.REASONS
            counts[outcome] = counts.get(outcome, 0) + 1
    assert refusal((NASTY / "pillow/tiff_16bit_RGB.tiff").read_bytes()).reason == "unsupported_mode"
    assert counts["PNG"] > 400 and counts["TIFF"] > 40 and counts["JPEG"] > 60
    assert min(counts[name] for name in ("corrupt", "truncated", "animated", "multipage", "unsupported_mode")) >= 4


@pytest.mark.parametrize("name", ["rgb png", "rgb jpeg", "rgb webp", "rgb bmp", "rgba tiff", "rgb ppm", "palette"])
def test_a_file_cut_anywhere_is_refused(name):
    data = MODES[name][0]
    for keep in (0.05, 0.1, 0.3, 0.5, 0.7, 0.9):
        assert refusal(data[: int(len(data) * keep)]).reason in ("truncated", "corrupt"), keep
    if name not in ("rgb webp", "rgba tiff"):  # a WebP and the index at the end of a TIFF do not say what they miss
        assert refusal(data[: int(len(data) * 0.7)]).reason == "truncated"


def test_what_is_no_image_is_told_by_its_bytes_not_its_name():
    assert refusal(b"").reason == "empty_file"
    assert refusal(b"<!DOCTYPE html><html><body>404 Not Found").reason == "not_an_image"  # as saved in a.jpg
    for data in (b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\0\0\0\x20ftypheic" + bytes(40)):
        assert refusal(data).reason == "unsupported_format"


def test_a_bomb_header_is_refused_without_allocating():
    tracemalloc.start()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert refusal(png_claiming(60_000, 60_000)).reason == "too_large"
        assert refusal(png_claiming(11_000, 9_000), max_pixels=98_999_999).reason == "too_large"
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 5_000_000


def test_our_limit_rules_exactly_and_pillow_neither_warns_nor_objects_below_it(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for name in ("rgb png", "rgb jpeg", "rgb webp", "rgb bmp", "rgba tiff", "rgb ppm", "still gif"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert images.decode(MODES[name][0], max_pixels=40 * 56).pixels.shape == (40, 56, 3)
    assert Image.MAX_IMAGE_PIXELS == 40 * 56
    assert refusal(MODES["rgb png"][0], max_pixels=40 * 56 - 1).reason == "too_large"


def test_a_header_that_no_memory_can_hold_is_a_refusal():
    assert refusal(png_claiming(95_000_000, 1)).reason == "oom"


def test_a_text_chunk_bomb_is_corrupt():
    bomb = chunk(b"zTXtcomment\0\0" + zlib.compress(bytes(80 << 20)))
    whole = MODES["rgb png"][0]
    assert refusal(whole[:33] + bomb + whole[33:]).reason == "corrupt"


def test_more_than_one_frame_or_page_is_refused():
    frames = {"save_all": True, "append_images": [Image.fromarray(photo()[::-1])]}
    for format in ("GIF", "PNG", "WEBP"):
        assert refusal(file_of(RGB, format, **frames)).reason == "animated"
    assert refusal(file_of(RGB, "TIFF", **frames)).reason == "multipage"


@pytest.mark.parametrize(("tag", "values"), [
    (33550, (0.5, 0.5, 0.0)), (33922, (0.0, 0.0, 0.0, 7.0, 46.0, 0.0)), (34264, (1.0,) * 16), (34735, (1, 1, 0, 0)),
])  # fmt: skip
def test_a_tiff_that_says_where_it_lies_on_earth_is_refused(tag, values):
    tags = ImageFileDirectory_v2()
    tags.tagtype[tag] = 3 if tag == 34735 else 12  # unsigned shorts, doubles
    tags[tag] = values
    refused = refusal(file_of(RGB, "TIFF", tiffinfo=tags))
    assert (refused.stage, refused.reason) == ("decode", "georeferenced")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_icc_profile_is_given_out_byte_for_byte(format):
    profile = srgb()
    found = images.decode(file_of(RGB, format, icc_profile=profile))
    assert found.icc == profile and found.format == format


def test_cmyk_with_a_profile_is_never_given_out_with_that_profile():
    found = images.decode(file_of(RGB.convert("CMYK"), "TIFF"))
    assert found.icc is None and found.mode == "CMYK"
    refused = refusal(file_of(RGB.convert("CMYK"), "TIFF", icc_profile=srgb()))  # an RGB profile: cannot be applied
    assert refused.reason == "corrupt"


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_alpha_and_hidden_colours_are_given_out_as_stored(format):
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    found = images.decode(file_of(Image.fromarray(np.dstack([photo(), ALPHA])), format, **options))
    np.testing.assert_array_equal(found.alpha, ALPHA)
    np.testing.assert_array_equal(found.pixels, photo())


def test_a_refusal_travels_between_processes():
    refused = pickle.loads(pickle.dumps(Refused("decode", "corrupt", "why")))
    assert (refused.stage, refused.reason, refused.message) == ("decode", "corrupt", "why")


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_avif_of_8_bits_is_read_and_grey_stays_grey(mode):
    image = RGB.convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(ALPHA))
    pixels = np.array(image)
    found = images.decode(file_of(image, "AVIF", quality=100, subsampling="4:4:4" if mode != "L" else "4:0:0"))
    colours = {"L": 1, "RGB": 3, "RGBA": 3}[mode]
    assert (found.format, found.pixels.shape, found.alpha is not None) == ("AVIF", (40, 56, colours), mode == "RGBA")
    assert np.abs(found.pixels.astype(int) - np.atleast_3d(pixels)[:, :, :colours]).max() <= 4
    assert mode != "RGBA" or np.abs(found.alpha.astype(int) - ALPHA).max() <= 4


def test_avif_that_pillow_would_reduce_or_take_for_srgb_is_refused():
    data = file_of(RGB, "AVIF")
    at = data.index(b"av1C") + 6
    deep = data[:at] + bytes([data[at] | 0x40]) + data[at + 1 :]
    assert refusal(deep).reason == "unsupported_mode"
    at = data.index(b"colrnclx") + 8
    assert refusal(data[:at] + b"\0\x0c" + data[at + 2 :]).reason == "unsupported_mode"  # Display P3, and no profile
    assert refusal(data[: len(data) // 2]).reason in ("truncated", "corrupt")
    assert refusal(data, max_pixels=40 * 56 - 1).reason == "too_large"
    assert images.decode(data).exif_transposed is False
    exif = Image.Exif()
    exif[274] = 6
    assert images.decode(file_of(RGB, "AVIF", exif=exif)).pixels.shape == (56, 40, 3)


def test_the_first_page_or_frame_is_read_where_that_is_asked_for():
    frames = {"save_all": True, "append_images": [Image.fromarray(photo()[::-1])]}
    for format in ("GIF", "PNG", "WEBP", "TIFF", "AVIF"):
        data = file_of(RGB, format, **frames)
        found = images.decode_file(io.BytesIO(data), format, max_pixels=10**6, first_page=True)
        assert np.abs(found.pixels.astype(int) - photo()).mean() < 12, format
        assert refusal(data).reason in ("animated", "multipage")

"""Laws of pipelines.encoders: what goes into a sheet is in the file, and the file says of itself what it was told."""

import errno
import io
import struct
import zlib

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from pipelines import encoders, images, metadata
from pipelines.encoders import FORMATS, check_fits, encode, open_published
from pipelines.images import REASONS, Refused
from pipelines.profiles import colour_space
from pipelines.sheets import Sheet
from tests.icc import rgb_profile

XMP = metadata.output_xmp(
    None, source_type=metadata.TRAINED_COMPOSITE, software="DiffSR", model="m", recipe="r", method="diffusion"
)
LOSSLESS = ("PNG", "TIFF")


def pixels(height=40, width=56, channels=3, dtype=np.uint8):
    """Return a smooth HWC picture with a little noise, over the whole range of its samples."""
    y, x = np.mgrid[0:height, 0:width]
    ramps = np.stack([x / max(1, width - 1), y / max(1, height - 1), 1 - x / max(1, width)][:channels], axis=-1)
    noise = np.random.default_rng(7).uniform(0, 0.02, (height, width, channels))
    return (np.clip(ramps * 0.98 + noise, 0, 1) * np.iinfo(dtype).max).astype(dtype)


def sheet_of(samples, *, spool_bytes=0):
    sheet = Sheet(*samples.shape, samples.dtype, spool_bytes=spool_bytes)
    sheet.write(0, 0, samples)
    return sheet


def written(path, samples, alpha=None, *, format, quality=95, icc=None, exif=None, xmp=None, spool_bytes=0):
    """Encode arrays to `path`, return the bytes of the file."""
    with sheet_of(samples, spool_bytes=spool_bytes) as colour:
        beside = None if alpha is None else sheet_of(alpha[:, :, None], spool_bytes=spool_bytes)
        encode(path, colour, beside, format=format, quality=quality, icc=icc, exif=exif, xmp=xmp)
    return path.read_bytes()


def published(path, step=7):
    with open_published(path) as file:
        found = [file.rows(top, min(file.height, top + step)) for top in range(0, file.height, step)]
        assert found[0].shape[1:] == (file.width, file.channels)
        return np.concatenate(found)


def camera(height=40, width=56):
    exif = Image.Exif()
    exif[271], exif[272], exif[274], exif[306] = "Maker", "Model", 6, "2021:02:03 04:05:06"
    exif[282] = exif[283] = 300.0
    exif[296] = 2
    exif.get_ifd(34665).update({36867: "2021:02:03 04:05:06", 40962: 5, 40963: 4, 37500: b"notes" * 9})
    exif.get_ifd(34853).update({1: "N", 2: (46.0, 30.0, 5.5)})
    return metadata.output_exif(exif.tobytes(), height=height, width=width)


@pytest.mark.parametrize("format", LOSSLESS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("has_alpha", [False, True])
def test_lossless_is_lossless_for_every_reader_from_memory_and_from_a_scratch_file(
    tmp_path, format, dtype, channels, has_alpha
):
    for height, width in ((1, 1), (7, 3), (127, 300)):
        colour = pixels(height, width, channels, dtype)
        alpha = np.random.default_rng(1).integers(0, np.iinfo(dtype).max, (height, width), dtype) if has_alpha else None
        path = tmp_path / "a"
        data = written(path, colour, alpha, format=format)
        assert written(tmp_path / "b", colour, alpha, format=format, spool_bytes=1 << 30) == data
        found = imagecodecs.png_decode(data) if format == "PNG" else tifffile.imread(path)
        want = colour if alpha is None else np.dstack([colour, alpha])
        np.testing.assert_array_equal(found.reshape(height, width, -1), want)
        np.testing.assert_array_equal(published(path), colour)
        assert found.dtype == dtype
        if dtype == np.uint8:
            decoded = images.decode(data)
            np.testing.assert_array_equal(decoded.pixels, colour)
            assert (decoded.alpha is None) == (alpha is None)
            assert alpha is None or (decoded.alpha == alpha).all()


@pytest.mark.parametrize("format", LOSSLESS)
def test_a_ramp_of_16_bits_keeps_its_levels(tmp_path, format):
    ramp = np.linspace(0, 65535, 300 * 200).round().astype(np.uint16).reshape(200, 300, 1)
    colour = np.concatenate([ramp, ramp[::-1], ramp[:, ::-1]], axis=2)
    data = written(tmp_path / "a", colour, format=format)
    found = imagecodecs.png_decode(data) if format == "PNG" else tifffile.imread(tmp_path / "a")
    assert len(np.unique(found[:, :, 0])) == len(np.unique(ramp)) > 50_000
    np.testing.assert_array_equal(published(tmp_path / "a"), colour)


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "AVIF"])
@pytest.mark.parametrize("channels", [1, 3])
def test_lossy_formats_are_close_of_full_colour_and_read_the_same_by_rows(tmp_path, format, channels):
    colour = pixels(120, 160, channels)
    for quality, most in ((95, 12), (100, 0 if format == "WEBP" else 6)):
        data = written(tmp_path / "a", colour, format=format, quality=quality)
        decoded = images.decode(data)
        assert decoded.format == format and decoded.pixels.shape[2] == (3 if format == "WEBP" else channels)
        assert np.abs(decoded.pixels.astype(int) - colour).max() <= most
        np.testing.assert_array_equal(published(tmp_path / "a"), decoded.pixels)
    if format == "JPEG" and channels == 3:
        with Image.open(io.BytesIO(data)) as image:
            assert [component[1:3] for component in image.layer] == [(1, 1)] * 3
    sharp = np.zeros((32, 32, 3), np.uint8)
    sharp[:, ::2, 0] = 200  # a pattern that colours of half the resolution would wash out
    data = written(tmp_path / "b", sharp, format=format, quality=99)
    if format != "WEBP":  # whose lossy kind has no other
        assert np.abs(images.decode(data).pixels.astype(int) - sharp).mean() < 8


@pytest.mark.parametrize("format", ["WEBP", "AVIF"])
@pytest.mark.parametrize("channels", [1, 3])
def test_alpha_and_the_colours_behind_it_survive_lossy_formats(tmp_path, format, channels):
    colour = pixels(channels=channels)
    alpha = np.zeros((40, 56), np.uint8)
    alpha[:, 20:] = 255
    alpha[5:9] = 128
    decoded = images.decode(written(tmp_path / "a", colour, alpha, format=format, quality=100))
    assert np.abs(decoded.alpha.astype(int) - alpha).max() <= (0 if format == "WEBP" else 3)
    assert np.abs(decoded.pixels.astype(int) - colour).max() <= (0 if format == "WEBP" else 6)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["Display P3", "Adobe RGB"])
def test_the_profile_is_embedded_byte_for_byte(tmp_path, format, name):
    profile = rgb_profile(name)
    data = written(tmp_path / "a", pixels(), format=format, icc=profile, exif=camera(), xmp=XMP)
    assert images.decode(data).stored_icc == profile
    with Image.open(io.BytesIO(data)) as image:
        assert image.info["icc_profile"] == profile
    big = profile + np.random.default_rng(0).bytes(200_000)  # of more than one JPEG segment
    big = len(big).to_bytes(4, "big") + big[4:]
    assert images.decode(written(tmp_path / "a", pixels(), format=format, icc=big)).stored_icc == big


@pytest.mark.parametrize("format", FORMATS)
def test_grey_never_carries_a_profile_for_colours_nor_colours_one_for_grey(tmp_path, format):
    data = written(tmp_path / "a", pixels(channels=1), format=format, icc=rgb_profile("Adobe RGB"))
    decoded = images.decode(data)
    assert colour_space(decoded.stored_icc) == ("RGB" if decoded.pixels.shape[2] == 3 else "GRAY")


@pytest.mark.parametrize("format", FORMATS)
def test_exif_and_xmp_are_in_the_file_as_given(tmp_path, format):
    exif = camera()
    data = written(tmp_path / "a", pixels(), format=format, icc=rgb_profile("Display P3"), exif=exif, xmp=XMP)
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        found = image.getexif()
        assert {tag: found[tag] for tag in (271, 272, 306)} == {271: "Maker", 272: "Model", 306: "2021:02:03 04:05:06"}
        assert found.get(274, 1) == 1 and (found[282], found[296]) == (300.0, 2)
        details = found.get_ifd(34665)
        assert (details[40962], details[40963], details[36867]) == (56, 40, "2021:02:03 04:05:06")
        assert b"notes" * 9 in data and 40961 not in details  # which libvips would have made up
        assert found.get_ifd(34853)[2] == (46.0, 30.0, 5.5)
        assert metadata.stored_xmp(image.info) == XMP
    decoded = images.decode(data)
    assert decoded.xmp == XMP and metadata.is_upscaled(decoded.xmp) and not decoded.exif_transposed
    if format == "TIFF":
        assert metadata.resolution(decoded.exif) == pytest.approx(300 / 25.4)
        assert tifffile.TiffFile(io.BytesIO(data)).pages[0].tags[700].value == XMP
    else:
        assert decoded.exif == (metadata.without_orientation(exif) if format == "AVIF" else exif)


@pytest.mark.parametrize("order", ["<", ">"])
def test_exif_of_either_byte_order_becomes_the_tags_of_a_tiff(tmp_path, order):
    exif = Image.Exif()
    exif.endian = order
    exif[271], exif[282], exif[283], exif[296] = "Maker", 300.5, 300.5, 2
    exif.get_ifd(34665).update({33434: 0.004, 36867: "2021:02:03 04:05:06", 34855: 800})
    data = written(tmp_path / "a", pixels(), format="TIFF", exif=exif.tobytes()[6:])
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        tags = {tag.name: tag.value for tag in file.pages[0].tags.values()}
        assert (tags["Make"], len(file.pages)) == ("Maker", 1)
        assert tags["ExifTag"]["ISOSpeedRatings"] == 800 and tags["ExifTag"]["ExposureTime"] == pytest.approx(0.004)
        above, below = tags["XResolution"]
        assert above / below == pytest.approx(300.5, rel=1e-6) and tags["ResolutionUnit"] == 2


@pytest.mark.parametrize("format", FORMATS)
def test_the_same_input_gives_the_same_bytes_and_they_tell_no_time(tmp_path, format):
    alpha = None if format == "JPEG" else pixels(channels=1)[:, :, 0]
    options = {"format": format, "icc": rgb_profile("sRGB"), "exif": camera(), "xmp": XMP}
    first, second = (written(tmp_path / name, pixels(), alpha, **options) for name in "ab")
    assert first == second
    assert b"tIME" not in first and first.count(b"2021:02:03 04:05:06") >= 2
    plain = written(tmp_path / "c", pixels(), format=format)
    with Image.open(io.BytesIO(plain)) as image:
        assert not {306, 305, 36867} & set(image.getexif()) and "xmp" not in image.info


def test_the_chunks_of_a_png_are_these_and_their_sums_hold(tmp_path):
    data = written(tmp_path / "a", pixels(), format="PNG", icc=rgb_profile("sRGB"), exif=camera(), xmp=XMP)
    at, names = 8, []
    while at < len(data):
        size = struct.unpack_from(">I", data, at)[0]
        part = data[at + 4 : at + 8 + size]
        assert zlib.crc32(part) == struct.unpack_from(">I", data, at + 8 + size)[0]
        names.append(part[:4].decode())
        at += size + 12
    assert list(dict.fromkeys(names)) == ["IHDR", "iCCP", "eXIf", "iTXt", "pHYs", "IDAT", "IEND"]


def test_a_tiff_is_tiled_deflated_and_big_only_where_it_must_be(tmp_path, monkeypatch):
    for big in (False, True):
        monkeypatch.setattr(encoders, "_BIG_TIFF_BYTES", 0 if big else 3 << 30)
        data = written(tmp_path / "a", pixels(300, 700), format="TIFF", icc=rgb_profile("sRGB"), exif=camera(), xmp=XMP)
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            page = file.pages[0]
            assert file.is_bigtiff == big and page.is_tiled and page.compression == 8 and page.predictor == 2
            assert page.tags[34675].value == rgb_profile("sRGB") and page.tags[700].value == XMP
            assert page.tags["ExifTag"].value["PixelXDimension"] == 56
            np.testing.assert_array_equal(page.asarray(), pixels(300, 700))
        np.testing.assert_array_equal(published(tmp_path / "a", 100), pixels(300, 700))


LIMITS = {
    "JPEG side": ("format_limit", "JPEG", {"width": 65_501}),
    "WebP side": ("format_limit", "WEBP", {"height": 16_384}),
    "PNG side": ("format_limit", "PNG", {"width": 1_000_001}),
    "AVIF side": ("format_limit", "AVIF", {"width": 16_385}),
    "AVIF size": ("format_limit", "AVIF", {"width": 16_000, "height": 16_000}),
    "JPEG alpha": ("alpha", "JPEG", {"has_alpha": True}),
    "JPEG depth": ("depth_limit", "JPEG", {"dtype": np.uint16}),
    "WebP depth": ("depth_limit", "WEBP", {"dtype": np.dtype("uint16")}),
    "AVIF depth": ("depth_limit", "AVIF", {"dtype": "uint16"}),
}
PLAIN = {"height": 100, "width": 100, "channels": 3, "dtype": np.uint8, "has_alpha": False}


@pytest.mark.parametrize("name", LIMITS)
def test_what_a_format_cannot_hold_is_refused_with_a_way_out(name):
    reason, format, changes = LIMITS[name]
    with pytest.raises(Refused) as caught:
        check_fits(format, **PLAIN | changes)
    assert (caught.value.stage, caught.value.reason) == ("encode", reason) and reason in REASONS
    assert "tiff" in caught.value.message
    check_fits("TIFF", **PLAIN | changes)


def test_the_limits_are_those_of_the_encoders(tmp_path):
    for format, side in (("JPEG", 65_500), ("WEBP", 16_383), ("AVIF", 16_384), ("PNG", 1_000_000), ("TIFF", 1_000_001)):
        data = written(tmp_path / "a", np.full((1, side, 1), 77, np.uint8), format=format)
        assert images.decode(data).pixels.shape[:2] == (1, side)
        assert published(tmp_path / "a").shape[:2] == (1, side)


def test_what_jpeg_cannot_hold_of_metadata_is_refused_before_it_is_written(tmp_path):
    for options in ({"xmp": bytes(65_505)}, {"exif": b"MM\0*" + bytes(65_600)}):
        with pytest.raises(Refused) as caught:
            written(tmp_path / "a", pixels(), format="JPEG", **options)
        assert caught.value.reason == "format_limit" and not (tmp_path / "a").exists()


def test_mistakes_of_a_person_are_told_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="must be one of"):
        check_fits("GIF", **PLAIN)
    with pytest.raises(ValueError, match="channels"):
        check_fits("PNG", **PLAIN | {"channels": 4})
    for quality in (0, 101):
        with pytest.raises(ValueError, match="quality"):
            written(tmp_path / "a", pixels(), format="PNG", quality=quality)
    with pytest.raises(ValueError, match="alpha"):
        written(tmp_path / "a", pixels(), np.zeros((40, 55), np.uint8), format="PNG")
    assert not (tmp_path / "a").exists()


def test_formats_are_kept_or_png_and_have_their_extensions():
    sources = [*FORMATS, "BMP", "GIF", "PPM", "JPEG 2000"]
    assert [encoders.output_format(name) for name in sources] == [*FORMATS, "PNG", "PNG", "PNG", "PNG"]
    assert [encoders.extension(name) for name in FORMATS] == [".png", ".jpg", ".webp", ".tif", ".avif"]


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_is_an_error_of_the_disk(format):
    samples = np.random.default_rng(0).integers(0, 255, (300, 300, 3), np.uint8)
    with sheet_of(samples) as colour, pytest.raises(OSError) as caught:
        encode("/dev/full", colour, None, format=format, quality=90, icc=None, exif=None, xmp=None)
    assert caught.value.errno == errno.ENOSPC


def test_published_rows_ascend_may_overlap_and_a_damaged_file_is_refused(tmp_path):
    colour = pixels(600, 64)
    for format in LOSSLESS:
        data = written(tmp_path / "a", colour, format=format)
        with open_published(tmp_path / "a") as file:
            for top, bottom in ((0, 9), (3, 9), (3, 40), (30, 300), (299, 600), (598, 600)):
                np.testing.assert_array_equal(file.rows(top, bottom), colour[top:bottom])
            with pytest.raises(ValueError, match="above"):
                file.rows(0, 1)
            with pytest.raises(ValueError, match="must not be empty"):
                file.rows(599, 601)
        (tmp_path / "b").write_bytes(data[: len(data) // 2])
        with pytest.raises(Refused) as caught:
            published(tmp_path / "b")
        assert (caught.value.stage, caught.value.reason) == ("decode", "corrupt")

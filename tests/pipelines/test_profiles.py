"""Laws of pipelines.profiles: the colours are those of the formulas, and what is sRGB already stays bit for bit."""

import pickle
import struct
import sys

import numpy as np
import pytest
from PIL import Image, ImageCms

from pipelines import profiles
from pipelines.images import REASONS, Refused
from pipelines.profiles import WorkingSpace
from tests.icc import cmyk_profile, rgb_profile

# Primaries as ICC stores them, adapted to D50 (columns of the matrix to XYZ): published by Lindbloom, and Apple.
ADOBE = ((0.60974, 0.20528, 0.14919), (0.31111, 0.62567, 0.06322), (0.01947, 0.06087, 0.74457))
P3 = ((0.51512, 0.29198, 0.15710), (0.24120, 0.69225, 0.06657), (-0.00105, 0.04189, 0.78407))
SRGB = ((0.43607, 0.38515, 0.14307), (0.22249, 0.71687, 0.06061), (0.01392, 0.09708, 0.71410))
G18, G22 = 461 / 256, 563 / 256  # as an ICC curve can store 1.8 and 2.2
CUBE = np.stack(np.meshgrid(*[np.arange(0, 256, 15)] * 3, indexing="ij"), axis=-1).astype(np.uint8).reshape(18, 324, 3)


def s15(*values):
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def icc_of(primaries, gamma, *, space=b"RGB ", name="a test profile"):
    """Return an ICC 2.1 profile made by hand: a gamma, and for RGB three primaries (columns of `primaries`)."""
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags = {b"wtpt": b"XYZ \0\0\0\0" + s15(0.9642, 1, 0.8249)}
    text = name.encode() + b"\0"
    tags[b"desc"] = b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78 + (-len(text) - 78) % 4)
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    else:
        for letter, column in zip((b"r", b"g", b"b"), zip(*primaries, strict=True), strict=True):
            tags[letter + b"XYZ"] = b"XYZ \0\0\0\0" + s15(*column)
            tags[letter + b"TRC"] = curve
    at, table, body = 132 + 12 * len(tags), b"", b""
    for tag, data in tags.items():
        table += tag + struct.pack(">II", at + len(body), len(data))
        body += data
    kind = b"mntr" + space + b"XYZ "
    head = struct.pack(">I4sI", at + len(body), b"test", 0x02100000) + kind + bytes(12) + b"acsp" + bytes(28)
    return head + s15(0.9642, 1, 0.8249) + bytes(48) + struct.pack(">I", len(tags)) + table + body


def encode_srgb(linear):
    linear = np.clip(linear, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def to_srgb(pixels, primaries, gamma, top):
    """Return the sRGB levels by the formulas: gamma, matrix to XYZ (D50), matrix from XYZ, sRGB's curve."""
    linear = (pixels / top) ** gamma
    return top * encode_srgb(linear @ (np.linalg.inv(SRGB) @ primaries).T)


def refusal(call, *arguments):
    with pytest.raises(Refused) as caught:
        call(*arguments)
    assert caught.value.reason in REASONS
    return caught.value


@pytest.mark.parametrize(("primaries", "gamma"), [(ADOBE, G22), (P3, G22), (SRGB, G18)])
def test_8_bit_colours_are_those_of_the_formulas_within_two_levels(primaries, gamma):
    found = WorkingSpace().convert(CUBE, icc_of(primaries, gamma))
    difference = np.abs(found - to_srgb(CUBE, primaries, gamma, 255))
    assert difference.max() < 2 and difference.mean() < 0.4
    assert np.abs(found.astype(int) - CUBE).max() > 15  # of this test: there was something to convert


@pytest.mark.parametrize("primaries", [ADOBE, P3])
def test_16_bit_colours_are_those_of_the_formulas_within_half_an_8_bit_level(primaries):
    pytest.importorskip("imagecodecs", reason="16-bit profiles need the extra scans")
    pixels = CUBE.astype(np.uint16) * 257
    found = WorkingSpace().convert(pixels, icc_of(primaries, G22))
    assert found.dtype == np.uint16
    light = pixels.min(axis=2) > 2000  # a gamma has an infinite slope at black, lcms2 a finite one
    assert np.abs(found - to_srgb(pixels, primaries, G22, 65535))[light].max() < 128
    assert len(np.unique(found)) > 1000


def test_grey_is_converted_by_its_own_curve_and_by_the_neutral_axis_of_an_rgb_profile():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    want = 255 * encode_srgb((ramp / 255) ** G18)
    for icc in (icc_of((), G18, space=b"GRAY"), icc_of(P3, G18)):
        found = WorkingSpace().convert(ramp, icc)
        assert found.shape == ramp.shape and np.abs(found - want).max() < 2
    assert np.abs(want - ramp).max() > 10
    pytest.importorskip("imagecodecs", reason="16-bit profiles need the extra scans")
    words = np.arange(0, 65536, 7, dtype=np.uint16).reshape(1, -1, 1)
    for icc in (icc_of((), G18, space=b"GRAY"), icc_of(P3, G18)):
        found = WorkingSpace().convert(words, icc)
        wide = words > 2000
        assert np.abs(found - 65535 * encode_srgb((words / 65535) ** G18))[wide].max() < 64


def test_a_window_is_converted_to_the_bytes_that_the_whole_has_and_twice_the_same():
    icc, space = icc_of(P3, G22), WorkingSpace()
    pixels = np.random.default_rng(3).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    whole = space.convert(pixels, icc)
    np.testing.assert_array_equal(space.convert(pixels[10:30, 7:50], icc), whole[10:30, 7:50])
    profiles._transform.cache_clear()
    np.testing.assert_array_equal(space.convert(pixels, bytes(bytearray(icc))), whole)


def test_srgb_by_any_profile_that_is_it_within_one_level_is_the_very_same_array():
    made = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    ramp = CUBE[:, :, :1]
    for space in (WorkingSpace(), WorkingSpace.parse("srgb"), WorkingSpace.parse("native")):
        assert space.convert(CUBE, None) is CUBE and space.convert(CUBE, made) is CUBE
        assert space.convert(ramp, made) is ramp and space.convert(ramp, None) is ramp
    assert WorkingSpace().convert(CUBE, icc_of(SRGB, G22)) is not CUBE  # a plain gamma is not sRGB's curve


def test_native_converts_nothing_at_all():
    assert WorkingSpace.parse("native").convert(CUBE, icc_of(P3, G22)) is CUBE


def test_another_working_space_is_the_way_back_and_its_own_profile_changes_nothing():
    icc = icc_of(ADOBE, G22)
    space = WorkingSpace.parse("adobe.icc", icc)
    assert space.convert(CUBE, icc) is CUBE and space.name.startswith("icc:") and len(space.name) == 68
    there = space.convert(CUBE, None)  # no profile is sRGB
    back = WorkingSpace().convert(there, icc)
    assert np.abs(there.astype(int) - CUBE).max() > 20
    assert np.abs(back.astype(int) - CUBE)[(CUBE > 30).all(axis=2)].max() <= 3
    assert pickle.loads(pickle.dumps(space)) == space


@pytest.mark.parametrize(("text", "icc"), [
    ("sRGB!", None), ("srgb", icc_of(P3, G22)), ("a.icc", b"nothing"), ("a.icc", icc_of((), G22, space=b"GRAY")),
])  # fmt: skip
def test_what_is_no_working_space_is_a_mistake_of_a_person(text, icc):
    with pytest.raises(ValueError, match="working_space="):
        WorkingSpace.parse(text, icc)


def test_a_damaged_profile_and_one_for_other_channels_are_refused():
    good = icc_of(P3, G22)
    for icc in (b"x", good[:100], good[:200], good[:128] + bytes(len(good) - 128), icc_of((), G22, space=b"GRAY")):
        assert refusal(WorkingSpace().convert, CUBE, icc).reason == "bad_profile"
    assert refusal(profiles.profile_name, b"x" * 400).reason == "bad_profile"
    assert refusal(profiles.cmyk_to_srgb, np.zeros((2, 2, 4), np.uint8), good).reason == "bad_profile"


def test_16_bits_without_imagecodecs_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    pixels = CUBE.astype(np.uint16)
    refused = refusal(WorkingSpace().convert, pixels, icc_of(P3, G22))
    assert refused.reason == "profile_16bit" and "diffsr[scans]" in refused.message
    assert WorkingSpace().convert(pixels, profiles.srgb_profile()) is pixels


def test_the_name_is_the_description_and_none_for_no_profile():
    assert profiles.profile_name(icc_of(P3, G22, name="Display\tP3")) == "DisplayP3"
    assert profiles.profile_name(None) == "" and profiles.profile_name(b"") == ""


def test_the_srgb_profile_carries_no_time_and_opens():
    assert profiles.srgb_profile()[24:36] == bytes(12)
    assert profiles.colour_space(profiles.srgb_profile()) == "RGB"


def test_ink_without_a_profile_is_pillows_formula():
    ink = np.random.default_rng(1).integers(0, 256, (5, 7, 4), dtype=np.uint8)
    want = np.asarray(Image.fromarray(ink, "CMYK").convert("RGB"))
    np.testing.assert_array_equal(profiles.cmyk_to_srgb(ink, None), want)


def test_the_profile_that_fits_has_the_same_curve_on_the_neutral_axis():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    adobe = rgb_profile("Adobe RGB")
    grey = profiles.fitting_profile(adobe, 1)
    back = profiles.fitting_profile(grey, 3)
    assert [profiles.colour_space(icc) for icc in (grey, back)] == ["GRAY", "RGB"]
    assert profiles.profile_name(grey) == profiles.profile_name(back) == "Adobe RGB"
    want = WorkingSpace().convert(np.repeat(ramp[:, :, None], 3, axis=2), adobe)[:, :, 1].astype(int)
    assert np.abs(want - WorkingSpace().convert(ramp[:, :, None], grey)[:, :, 0]).max() <= 1
    spread = WorkingSpace().convert(np.repeat(ramp[:, :, None], 3, axis=2), back).astype(int)
    assert np.abs(spread - want[:, :, None]).max() <= 1 and np.abs(want - ramp).max() > 2
    assert profiles.fitting_profile(adobe, 3) is adobe and profiles.fitting_profile(grey, 1) is grey


def test_a_profile_that_fits_no_way_is_none_and_a_damaged_one_refused():
    adobe = rgb_profile("Adobe RGB")
    assert [profiles.fitting_profile(icc, n) for icc, n in ((None, 3), (adobe, 2), (cmyk_profile(), 3))] == [None] * 3
    assert refusal(profiles.fitting_profile, b"rotten", 3).reason == "bad_profile"

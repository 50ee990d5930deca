"""Laws of blobs: every sample comes back, in formats that others read."""

import io

import numpy as np
import pytest
from PIL import Image

from pipelines.blobs import codec_of, decode_blob, encode_blob
from pipelines.images import Refused

RANDOM = np.random.default_rng(7)


@pytest.mark.parametrize("codec", ["webp", "png"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_every_sample_and_its_type_come_back(codec, channels, dtype):
    noise = RANDOM.integers(0, 127, (33, 47, channels)).astype(dtype) * (1 if dtype != "float32" else np.float32(0.37))
    for pixels in (noise, noise[::2, ::3], noise[:1, :1], noise[:, :, ::-1]):
        back = decode_blob(encode_blob(pixels, codec))
        assert back.dtype == pixels.dtype
        np.testing.assert_array_equal(back, pixels)


@pytest.mark.parametrize(("channels", "codec", "format"), [(1, "webp", "PNG"), (3, "webp", "WEBP"), (3, "png", "PNG")])
def test_eight_bits_are_a_file_that_any_library_opens(channels, codec, format):
    pixels = RANDOM.integers(0, 256, (9, 11, channels), dtype=np.uint8)
    assert codec_of(pixels, codec) == format.lower()
    image = Image.open(io.BytesIO(encode_blob(pixels, codec)))
    assert image.format == format
    np.testing.assert_array_equal(np.atleast_3d(np.asarray(image)), pixels)


def test_a_damaged_blob_is_refused():
    for pixels in (np.zeros((4, 4, 5), np.uint16), RANDOM.integers(0, 256, (9, 9, 3), dtype=np.uint8)):
        data = encode_blob(pixels, "png")
        for bad in (data[: len(data) // 2], data[:20] + b"\x00" * 8 + data[28:]):
            with pytest.raises(Refused):
                decode_blob(bad)


def test_a_mistaken_array_is_a_value_error():
    for pixels in (np.zeros((4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8), np.zeros((4, 4, 3), np.complex64)):
        with pytest.raises(ValueError, match="HWC"):
            encode_blob(pixels, "png")
    with pytest.raises(ValueError, match="webp"):
        encode_blob(np.zeros((4, 4, 3), np.uint8), "jpeg")

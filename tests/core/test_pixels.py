"""Laws of pixels: 8 and 16 bits go into the model's range and come back as they were."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from diffsr_core.pixels import bicubic, peak, to_model_range, to_pixels


@pytest.mark.parametrize(("dtype", "white"), [(np.uint8, 255), (np.uint16, 65535)])
def test_the_peak_is_white(dtype: type, white: int) -> None:
    assert peak(dtype) == peak(np.dtype(dtype)) == white


@pytest.mark.parametrize("dtype", ["i2", "f4", "u4", "?", ">u2"])
def test_samples_of_another_type_are_refused_with_the_remedy(dtype: str) -> None:
    pixels = np.zeros((2, 3, 1), dtype)
    for use in (lambda: peak(dtype), lambda: to_model_range(pixels), lambda: to_pixels(torch.zeros(1, 1, 2, 3), dtype)):
        with pytest.raises(
            ValueError, match=rf"pixels \({re.escape(str(np.dtype(dtype)))}\) must be uint8 or uint16; convert"
        ):
            use()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_every_level_comes_back_and_the_ends_are_exact(dtype: type) -> None:
    white = peak(dtype)
    levels = np.arange(white + 1, dtype=dtype).reshape(16, -1, 1).repeat(3, axis=2)
    x = to_model_range(levels)
    assert x.shape == (1, 3, 16, (white + 1) // 16) and x.dtype == torch.float32
    assert (float(x.min()), float(x.max())) == (-1.0, 1.0)
    assert np.abs(x[0, 0].double().numpy() - (levels[:, :, 0] / (white / 2) - 1)).max() < 2**-23
    back = to_pixels(x, dtype)
    assert back.dtype == dtype and np.array_equal(back, levels)


def test_the_same_tone_in_8_and_16_bits_is_the_same_value() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    assert torch.allclose(to_model_range(levels), to_model_range(levels.astype(np.uint16) * 257), atol=2**-23)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_what_lies_outside_is_clipped_and_halves_go_to_the_even_level(dtype: type) -> None:
    white = peak(dtype)
    assert to_pixels(torch.tensor([-3.0, 3.0]).view(1, 1, 1, 2), dtype).ravel().tolist() == [0, white]
    halves = np.arange(min(white, 5000)) + 0.5
    x = torch.from_numpy(halves / (white / 2) - 1).view(1, 1, 1, -1)
    exact = (x.numpy().ravel() + 1) * (white / 2) == halves
    assert exact.sum() > 50 and np.array_equal(to_pixels(x, dtype).ravel()[exact], np.rint(halves)[exact])


@pytest.mark.parametrize("view", ["negative", "column-major", "read-only"])
def test_the_layout_in_memory_does_not_matter(view: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 65536, (5, 7, 3)).astype(np.uint16)
    turned = {
        "negative": pixels[::-1, ::-1].copy()[::-1, ::-1],
        "column-major": np.asfortranarray(pixels),
        "read-only": pixels.copy(),
    }[view]
    turned.flags.writeable = view != "read-only"
    assert torch.equal(to_model_range(turned), to_model_range(pixels))
    assert np.array_equal(bicubic(turned, 2), bicubic(pixels, 2))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_bicubic_is_that_of_pillow_in_floating_point(dtype: type) -> None:
    # Flavour C is bicubic with a = -0.5; upwards Pillow's mode F is the same kernel. Only the border differs.
    white = peak(dtype)
    pixels = np.random.default_rng(1).integers(white // 4, white - white // 4, (24, 20, 1)).astype(dtype)
    oracle = np.asarray(Image.fromarray(pixels[:, :, 0].astype(np.float32)).resize((80, 96), Image.Resampling.BICUBIC))
    found = bicubic(pixels, 4)
    assert found.dtype == dtype and found.shape == (96, 80, 1)
    off = np.abs(found[12:-12, 12:-12, 0] - oracle[12:-12, 12:-12].clip(0, white).astype(float))
    assert off.max() <= 0.51


@pytest.mark.parametrize("level", [0, 77, 65535])
def test_bicubic_keeps_a_constant(level: int) -> None:
    for dtype in (np.uint8, np.uint16):
        value = min(level, peak(dtype))
        assert np.array_equal(bicubic(np.full((3, 5, 1), value, dtype), 4), np.full((12, 20, 1), value, dtype))

"""Laws of several samples of one image: their mean, their best, how far they are apart; and of 16 bits beside 8."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from diffsr_core.consistency import project
from diffsr_core.degradation import Degradation
from diffsr_core.family import ModelConfig, SuperResolver
from diffsr_core.metrics import downscaled_sr, lr_psnr
from diffsr_core.pixels import Pixels, bicubic, peak, to_model_range, to_pixels
from diffsr_core.resize import upscale
from diffsr_core.sampling import SamplingRecipe
from diffsr_core.upscaler import NotFiniteError, Upscaled, Upscaler
from tests.core import tiny

# Anchored on bicubic, so that what random weights add is some levels, and nothing is clipped.
SR3 = replace(tiny.SR3, anchor="bicubic", residual_scale=10.0)
SRDIFF = replace(tiny.SRDIFF, residual_scale=10.0)
# In space-to-depth, the cheapest to draw from; an eps that random weights tell leaves much to the noise.
DEPTH = replace(tiny.ANCHORED, anchor="bicubic", prediction="eps", residual_clip=True)
RECIPE = SamplingRecipe(sampler="ddpm", num_steps=2, tile=8, halo=2, micro_batch=2, window=8, margin=4)
kinds = pytest.mark.parametrize("dtype", [np.uint8, np.uint16])


def picture(height: int, width: int, *, channels: int = 3, dtype: type = np.uint8) -> Pixels:
    y, x = np.mgrid[0:height, 0:width]
    waves = [0.5 + 0.3 * np.sin(x / (3 + c)) * np.cos(y / (5 - c)) for c in range(channels)]
    pixels: Pixels = np.rint(np.stack(waves, axis=2) * peak(dtype)).astype(dtype)
    return pixels


def lr_of_a_photograph(dtype: type, scale: int = 4) -> Pixels:
    """The 32 px LR that D makes of a photograph; with 16 bits, of tones between the 8-bit levels too."""
    hr: Pixels = pytest.importorskip("skimage.data").astronaut()[0:128, 160:288]
    if dtype == np.uint16:
        grain = np.random.default_rng(0).integers(0, 257, hr.shape)
        hr = (hr.astype(np.int64) * 256 + grain).clip(0, 65535).astype(np.uint16)
    return Degradation("bicubic", scale).apply(hr, seed=0)


@functools.cache
def model_of(config: ModelConfig, seed: int = 1) -> SuperResolver:
    return tiny.model_of(config, seed=seed)


def upscaled(pixels: Pixels, config: ModelConfig = DEPTH, **changes: object) -> Upscaled:
    recipe = replace(RECIPE, **changes)  # type: ignore[arg-type]
    return Upscaler(model_of(config), recipe)(pixels, digest="a")


@functools.cache
def single(width: int, index: int, channels: int = 3, dtype: type = np.uint8, consistency: str = "exact") -> Pixels:
    """One sample of a picture 5 px high, drawn alone."""
    pixels = picture(5, width, channels=channels, dtype=dtype)
    return upscaled(pixels, sample_index=index, consistency=consistency).sr


# --- mean, best, deviation ---


@kinds
@pytest.mark.parametrize("count", [2, 4, 5])
def test_the_mean_is_the_rounded_mean_of_the_single_samples(count: int, dtype: type) -> None:
    pixels = picture(5, 14, dtype=dtype)  # two windows
    expected = np.rint(np.mean([single(14, index, dtype=dtype) for index in range(count)], axis=0, dtype=np.float64))
    found = upscaled(pixels, num_samples=count, choice="mean").sr
    assert found.dtype == dtype and np.array_equal(found, expected)


@kinds
@pytest.mark.parametrize("channels", [1, 3])
def test_the_uncertainty_is_the_deviation_of_the_samples_in_levels_of_255(channels: int, dtype: type) -> None:
    pixels = picture(5, 14, channels=channels, dtype=dtype)
    samples = np.stack([single(14, index, channels, dtype) for index in range(4)]) * (255 / peak(dtype))
    expected = np.sqrt(np.var(samples, axis=0).mean(axis=2))
    for choice in ("first", "best"):
        found = upscaled(pixels, num_samples=4, choice=choice).uncertainty
        assert found is not None and found.dtype == np.float32 and found.shape == (20, 56)
        assert np.abs(found - expected).max() < 1e-4 * expected.max()
    assert expected.max() > 0.5  # there is something to be uncertain about


def test_one_sample_has_no_uncertainty_and_a_sampler_without_randomness_has_none_either() -> None:
    assert upscaled(picture(9, 9)).uncertainty is None
    still = replace(RECIPE, num_samples=3, sampler="ddim", num_steps=1)
    found = Upscaler(model_of(DEPTH), still)
    found.model.predict = lambda x_t, level, features: x_t  # type: ignore[method-assign]
    found.model.restore = lambda x_0, condition: condition.anchor  # type: ignore[method-assign]
    deviation = found(picture(5, 14), digest="a").uncertainty
    assert deviation is not None and not deviation.any()


@pytest.mark.parametrize("sample_index", [0, 5])
def test_the_first_does_not_know_how_many_are_drawn_after_it(sample_index: int) -> None:
    pixels = picture(5, 14)
    one = upscaled(pixels, sample_index=sample_index)
    more = upscaled(pixels, sample_index=sample_index, num_samples=3)
    assert np.array_equal(one.sr, more.sr) and np.array_equal(one.regression, more.regression)
    if sample_index:
        three = [single(14, index) for index in (5, 6, 7)]
        mean = upscaled(pixels, sample_index=sample_index, num_samples=3, choice="mean").sr
        assert np.array_equal(mean, np.rint(np.mean(three, axis=0)))


def error_before_projection(pixels: Pixels, sr: Pixels) -> float:
    return float(np.square(downscaled_sr(pixels, sr, scale=4) - pixels).sum())


@pytest.mark.parametrize("first", [0, 4])
def test_the_best_is_the_one_that_keeps_to_the_lr_most_in_all_windows_together(first: int) -> None:
    pixels, indices = picture(5, 20), range(first, first + 3)  # three windows
    errors = [error_before_projection(pixels, single(20, index, consistency="off")) for index in indices]
    close = np.partition(errors, 1)[:2]
    assert close[1] > 1.001 * close[0]  # 8-bit rounding does not decide
    best = upscaled(pixels, num_samples=3, choice="best", sample_index=first)
    assert np.array_equal(best.sr, single(20, indices[int(np.argmin(errors))]))


def test_the_best_of_the_image_is_not_the_best_of_each_window() -> None:
    # In each window another sample is the best; one is the second best everywhere, and of least error in sum.
    found = Upscaler(model_of(DEPTH), replace(RECIPE, num_samples=3, choice="best", consistency="off", window=24))
    pixels = np.full((8, 48, 3), 100, np.uint8)
    offsets = {0: (0.0, 0.4), 1: (0.4, 0.0), 2: (0.1, 0.1)}  # sample -> offset in the left and right window

    def sampled(canvas: object, index: int) -> Tensor:
        window = windows[len(calls) // 3]
        calls.append(index)
        height, width = found.windows(8, 48)[window].shape
        return torch.full((1, 3, 4 * height, 4 * width), 100 / 127.5 - 1 + offsets[index][window])

    calls, windows = list[int](), (0, 1)
    found._sampled = sampled  # type: ignore[method-assign, assignment]
    sr = found(pixels, digest="a").sr
    assert calls == [0, 1, 2] * 2
    assert np.unique(sr).tolist() == [round(100 + 0.1 * 127.5)]


def test_the_regression_is_the_same_whatever_is_drawn() -> None:
    pixels = picture(5, 14)
    found = [upscaled(pixels, num_samples=k, choice=c).regression for k, c in ((1, "first"), (3, "mean"), (3, "best"))]
    assert all(image is not None and np.array_equal(image, found[0]) for image in found)


# --- 16 bits ---


@pytest.mark.parametrize("config", [SR3, SRDIFF, tiny.ANCHORED, tiny.RRDB_TWIN], ids=["sr3", "srdiff", "a", "twin"])
def test_the_result_has_the_type_of_the_input(config: ModelConfig) -> None:
    narrow, wide = picture(7, 9), picture(7, 9, dtype=np.uint16)
    for pixels in (narrow, wide):
        found = upscaled(pixels, config, consistency="off")
        assert found.sr.dtype == pixels.dtype and found.sr.shape == (28, 36, 3)
        assert found.regression is None or found.regression.dtype == pixels.dtype
    off = upscaled(wide, config, consistency="off").sr / 257 - upscaled(narrow, config, consistency="off").sr
    assert np.abs(off).mean() < 1.5  # one picture; the LR are half a level apart


@pytest.mark.parametrize("consistency", ["exact", "off"])
def test_a_ramp_of_16_bits_keeps_more_than_10_000_levels(consistency: str) -> None:
    ramp = np.linspace(0, 65535, 3000).astype(np.uint16)[None, :, None].repeat(2, axis=0)
    recipe = replace(RECIPE, num_steps=1, window=1024, margin=32, tile=32, micro_batch=4, consistency=consistency)  # type: ignore[arg-type]
    found = Upscaler(model_of(DEPTH), recipe)
    # The network stays, its last word is all but silenced: what random weights say is no ramp.
    found.model.restore = functools.partial(  # type: ignore[method-assign]
        lambda restore, x_0, condition: restore(1e-4 * x_0, condition), found.model.restore
    )
    sr = found(ramp, digest="a").sr
    assert sr.dtype == np.uint16 and sr.shape == (8, 12000, 1)
    assert len(np.unique(sr)) > 10_000
    line = sr[4, 8:-8, 0].astype(int)
    assert np.abs(line - np.linspace(0, 65535, 12000)[8:-8]).max() < 40  # that is 0.15 levels of 255


# --- faithful to the LR ---


@pytest.mark.parametrize("config", [SR3, SRDIFF], ids=["sr3", "srdiff"])
@pytest.mark.parametrize(("dtype", "mean"), [(np.uint8, 55.0), (np.uint16, 65.0)])
def test_the_lr_is_kept_as_the_law_says(config: ModelConfig, dtype: type, mean: float) -> None:
    scores = []
    for lr in (lr_of_a_photograph(dtype), Degradation("bicubic", 4).apply(picture(96, 64, dtype=dtype), seed=0)):
        recipe = {"tile": 16, "halo": 4, "window": 64}
        free, kept = (upscaled(lr, config, consistency=mode, **recipe).sr for mode in ("off", "exact"))
        assert lr_psnr(lr, free, scale=4) < 45
        scores.append(lr_psnr(lr, kept, scale=4))
    assert min(scores) >= 50 and np.mean(scores) >= mean


@pytest.mark.parametrize("place", ["encoder", "denoiser"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_an_error_and_no_picture(place: str, value: float) -> None:
    model = tiny.model_of(DEPTH)
    with torch.no_grad():
        next(getattr(model, place).parameters()).fill_(value)
    found = Upscaler(model, RECIPE, in_flight=2)
    for _ in range(2):
        with pytest.raises(NotFiniteError):
            found(picture(5, 14), digest="a")


@kinds
@pytest.mark.parametrize("mode", ["exact", "interval", "off"])
def test_the_fallback_is_bicubic_projected(mode: str, dtype: type) -> None:
    lr = lr_of_a_photograph(dtype)
    found = Upscaler(model_of(DEPTH), replace(RECIPE, consistency=mode, window=16, margin=32))  # type: ignore[arg-type]
    whole = np.empty((128, 128, 3), dtype)
    for w in found.windows(32, 32):
        core = found.fallback(lr[w.top : w.bottom, w.left : w.right], w)
        whole[4 * w.core_top : 4 * w.core_bottom, 4 * w.core_left : 4 * w.core_right] = core
    if mode == "off":
        assert np.abs(whole.astype(int) - bicubic(lr, 4).astype(int)).max() <= 1
        return
    x = to_model_range(lr)
    step = 1 / peak(dtype)  # half of the quantisation of the LR
    projected = project(upscale(x, 4), x, scale=4, iterations=6, mode=mode, half_step=step)
    assert np.array_equal(whole, to_pixels(projected, dtype))
    assert lr_psnr(lr, whole, scale=4) > lr_psnr(lr, bicubic(lr, 4), scale=4) + 10

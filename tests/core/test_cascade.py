"""Laws of cascades: what the stages called by hand give, and images out of nothing."""

from dataclasses import replace

import numpy as np
import pytest

from diffsr_core.cascade import Cascade
from diffsr_core.family import ModelConfig
from diffsr_core.metrics import lr_psnr
from diffsr_core.networks.interpolation import InterpolationConfig
from diffsr_core.pixels import Pixels
from diffsr_core.sampling import SamplingRecipe
from diffsr_core.upscaler import Upscaler
from tests.benchmarks.cascade import SIZE, blob, family, fitted
from tests.core.tiny import DDPM, MODELS, RRDB_TWIN, SEED3, SR3, SRDIFF, model_of

RECIPE = SamplingRecipe(sampler="ddpm", num_steps=2, tile=8, halo=2, micro_batch=2)
DOUBLE = replace(SR3, encoder=InterpolationConfig(scale=2))


def stage(config: ModelConfig, **changes: object) -> Upscaler:
    consistency = "off" if config.scale == 1 else "exact"
    return Upscaler(model_of(config), replace(RECIPE, **{"consistency": consistency, **changes}))  # type: ignore[arg-type]


def picture(height: int, width: int, channels: int = 3) -> Pixels:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([128 + 60 * np.sin((x + 2 * y) / (4 + c)) for c in range(channels)], axis=2).astype(np.uint8)


def test_the_scale_is_the_product_of_the_stages() -> None:
    for configs, scale in (((SR3,), 4), ((DOUBLE, SR3), 8), ((DDPM, DOUBLE, DOUBLE), 4), ((DDPM,), 1)):
        cascade = Cascade([stage(config) for config in configs])
        assert cascade.scale == scale and type(cascade.scale) is int
    assert Cascade([stage(DOUBLE), stage(SR3)]).upscale(picture(3, 5), digest="a").shape == (24, 40, 3)
    assert Cascade([stage(DOUBLE), stage(SR3)]).upscale(picture(1, 1, 1), digest="a").shape == (8, 8, 1)


@pytest.mark.parametrize("configs", [(DOUBLE, SRDIFF), (SRDIFF, RRDB_TWIN), (MODELS["deblur"], DOUBLE)])
def test_a_cascade_is_its_stages_called_by_hand_each_on_noise_of_its_own(configs: tuple[ModelConfig, ...]) -> None:
    pixels = picture(7, 9)
    first, second = (stage(config) for config in configs)
    middle = first(pixels, digest="a stage 0").sr
    expected = second(middle, digest="a stage 1").sr
    assert np.array_equal(Cascade([first, second]).upscale(pixels, digest="a"), expected)
    if second.model.denoiser is not None:
        assert not np.array_equal(second(middle, digest="a stage 0").sr, expected)


def test_each_stage_has_its_own_steps_and_keeps_to_its_own_input() -> None:
    pixels = picture(6, 6)
    calls = []
    mild = replace(DOUBLE, anchor="bicubic", residual_scale=10.0)  # random weights, that clip nothing
    stages = [stage(mild, num_steps=5), stage(mild, num_steps=2)]
    for index, each in enumerate(stages):
        assert each.model.denoiser is not None
        each.model.denoiser.register_forward_pre_hook(lambda module, inputs, index=index: calls.append(index))
    found = Cascade(stages).upscale(pixels, digest="a")
    assert (calls.count(0), calls.count(1)) == (5, 2 * 2)  # one tile of 6 px padded; four of 12 px, two a call
    assert calls == sorted(calls)
    middle = stages[0](pixels, digest="a stage 0").sr
    assert lr_psnr(middle, found, scale=2) > 50 and lr_psnr(pixels, middle, scale=2) > 50
    assert lr_psnr(pixels, found, scale=4) > 45


def test_an_image_out_of_nothing_is_a_function_of_its_name_alone() -> None:
    def generate(name: str, *, in_flight: int = 1, **changes: object) -> Pixels:
        stages = [stage(DDPM, **changes), stage(DOUBLE)]
        return Cascade([Upscaler(s.model, s.recipe, in_flight=in_flight) for s in stages]).generate(8, 10, name=name)

    first = generate("a")
    assert first.shape == (16, 20, 3) and first.dtype == np.uint8 and first.std() > 10
    assert np.array_equal(first, generate("a")) and np.array_equal(first, generate("a", in_flight=3))
    others = [generate("b"), generate("a", seed=1), generate("a", sample_index=1), generate("a", num_steps=3)]
    assert len({image.tobytes() for image in [first, *others]}) == 5


def test_what_is_generated_does_not_hang_on_the_blank_that_gives_the_size() -> None:
    base, second = stage(DDPM), stage(DOUBLE)
    found = Cascade([base, second]).generate(8, 8, name="a")
    assert np.array_equal(base(picture(8, 8), digest="a stage 0").sr, base(255 - picture(8, 8), digest="a stage 0").sr)
    assert np.array_equal(second(base(picture(8, 8), digest="a stage 0").sr, digest="a stage 1").sr, found)


def test_a_sample_below_the_tile_is_the_corner_of_one_that_fills_it() -> None:
    base = Cascade([stage(DDPM)])
    assert np.array_equal(base.generate(3, 5, name="a"), base.generate(8, 8, name="a")[:3, :5])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Cascade([])
    with pytest.raises(ValueError, match="makes 1 channels and the next reads 3"):
        Cascade([stage(SEED3), stage(SR3)])
    with pytest.raises(ValueError, match="makes 3 channels and the next reads 4"):
        Cascade([stage(SR3), stage(MODELS["sr3-edges"])])  # nobody makes its edges
    with pytest.raises(ValueError, match="later stage reads no image"):
        Cascade([stage(DOUBLE), stage(DDPM)])  # it would forget what the first has made
    for config in (SR3, SRDIFF, RRDB_TWIN):
        with pytest.raises(ValueError, match="reads an image .*use upscale"):
            Cascade([stage(config)]).generate(8, 8, name="a")
    with pytest.raises(ValueError, match="reads no image.*use generate"):
        Cascade([stage(DDPM), stage(DOUBLE)]).upscale(picture(8, 8), digest="a")


# --- the measure of tests/benchmarks/cascade.py, that shows generation by trained models ---


def test_the_measure_of_generated_blobs_finds_what_was_drawn() -> None:
    drawn = ((2.0, 4.0, 9.5, 100.0), (1.5, 11.25, 7.0, -80.0), (3.0, 8.0, 8.0, 60.0))
    for width, y, x, height in drawn:
        pixels = np.rint(128 + height * blob(width, y, x)).astype(np.uint8)[..., None]
        fit = fitted(pixels)
        assert (fit.width_px, fit.y_px, fit.x_px) == pytest.approx((width, y, x), abs=1e-6)
        assert fit.height == pytest.approx(height, rel=0.02) and fit.explained > 0.999


def test_the_measure_tells_two_blobs_and_noise_from_one() -> None:
    rng = np.random.default_rng(0)
    two = 128 + 90 * (blob(2.0, 4.0, 4.0) + blob(2.0, 12.0, 12.0))
    noise = rng.integers(0, 256, (SIZE, SIZE))
    for image in (two, noise, np.full((SIZE, SIZE), 77)):
        assert fitted(image.astype(np.uint8)[..., None]).explained < 0.8


def test_the_family_of_the_benchmark_has_its_statistics() -> None:
    images = family(4000, seed=0).numpy()[:, 0]
    assert np.abs(images).max() <= 0.75 + 1e-6
    bright = images[:, 0, 0] < 0  # the corner is ground
    assert bright.mean() == pytest.approx(0.7, abs=0.03)
    peaks = images.reshape(4000, -1)
    places = np.where(bright, peaks.argmax(axis=1), peaks.argmin(axis=1))
    for centre in (places // SIZE, places % SIZE):
        assert centre.mean() == pytest.approx(7.5, abs=0.15) and centre.std() == pytest.approx(8 / 12**0.5, abs=0.15)

"""Laws of the upscaler that hold for every kind of model, every sampler and every grid."""

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from diffsr_core.family import ModelConfig, SuperResolver
from diffsr_core.manipulation import draw
from diffsr_core.metrics import lr_psnr
from diffsr_core.noise import gaussian, noise_key
from diffsr_core.pixels import Pixels, to_model_range, to_pixels
from diffsr_core.sampler import SAMPLERS, default_grid, last, sample
from diffsr_core.sampling import SamplingRecipe
from diffsr_core.schedule import GRIDS, sampling_grid
from diffsr_core.upscaler import Upscaler, threads
from tests.core.tiny import ANCHORED, DIFFUSIONS, MODELS, ONE_PASS_TWIN, RRDB_TWIN, SEED3, SR3, SRDIFF

RECIPE = SamplingRecipe(num_steps=2, tile=8, halo=2, micro_batch=2)
every_kind = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)


def model_of(config: ModelConfig) -> SuperResolver:
    """Weights that keep the size of what goes through them, the zero-initialised ones included."""
    torch.manual_seed(1)
    model = SuperResolver(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.kaiming_normal_(parameter)
    return model


def upscaler(config: ModelConfig, *, in_flight: int = 1, **changes: object) -> Upscaler:
    consistency = "off" if config.scale == 1 else "exact"
    recipe = replace(RECIPE, **{"consistency": consistency, **changes})  # type: ignore[arg-type]
    return Upscaler(model_of(config), recipe, in_flight=in_flight)


def picture(height: int, width: int, channels: int, *, seed: int = 0) -> Pixels:
    y, x = np.mgrid[0:height, 0:width]
    waves = [128 + 60 * np.sin(x / (3 + c) + seed) * np.cos(y / (4 + c) - seed) for c in range(channels)]
    return np.stack(waves, axis=2).astype(np.uint8)


def whole(config: ModelConfig, **changes: object) -> Upscaler:
    """An upscaler whose one tile is an image of 16 px."""
    return upscaler(config, tile=16, halo=0, micro_batch=1, **changes)


@every_kind
@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 19)])
def test_every_kind_makes_any_size_and_leaves_its_input_alone(config: ModelConfig, height: int, width: int) -> None:
    pixels = picture(height, width, config.encoder.lr_channels)
    kept = pixels.copy()
    found = upscaler(config)(pixels, digest="a")
    assert found.sr.shape == (height * config.scale, width * config.scale, config.encoder.channels)
    assert found.sr.dtype == np.uint8
    assert (found.regression is not None) == config.encoder.regresses
    assert found.regression is None or found.regression.shape == found.sr.shape
    assert np.array_equal(pixels, kept)


@every_kind
def test_the_bytes_of_every_kind_are_its_own_whatever_runs_beside(config: ModelConfig) -> None:
    pixels = picture(11, 14, config.encoder.lr_channels)
    first = upscaler(config)(pixels, digest="a")
    busy = upscaler(config, in_flight=3)
    busy(picture(5, 17, config.encoder.lr_channels, seed=3), digest="b")
    with threads(2):
        again = busy(pixels, digest="a")
    assert again.sr.tobytes() == first.sr.tobytes()
    assert again.regression is first.regression is None or np.array_equal(again.regression, first.regression)
    other = busy(pixels, digest="b").sr
    assert (other.tobytes() == first.sr.tobytes()) == (config.denoiser is None)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("config", DIFFUSIONS.values(), ids=DIFFUSIONS)
@torch.inference_mode()
def test_a_whole_tile_is_the_sampler_on_the_untiled_model(config: ModelConfig, sampler: str) -> None:
    pixels = picture(16, 16, config.encoder.lr_channels)
    tiled = whole(config, sampler=sampler, consistency="off", seed=5, sample_index=2)
    model = tiled.model  # with its weights laid as a convolution wants them, which moves the last bits
    condition = model.condition(to_model_range(pixels))
    channels, height, width = model.diffused_shape(16, 16)
    key = noise_key(5, "a", 2)
    x_0 = last(
        sample(
            model.denoise(condition.features),
            sampling_grid(config.schedule, 2, family=default_grid(sampler)),
            noise=lambda step: gaussian(key, channels=channels, height=height, width=width, step=step),
            sampler=sampler,
            clip=config.residual_clip,
        )
    )
    expected = to_pixels(model.restore(x_0, condition).clamp(-1, 1)).astype(int)
    assert np.abs(tiled(pixels, digest="a").sr - expected).max() <= 1  # sums that round to the two sides of a half


# --- a denoiser that knows the answer ---


class Oracle:
    """In the place of a model's network: says that x_0 is one wave, and keeps what it was asked."""

    def __init__(self, upscaler: Upscaler) -> None:
        assert upscaler.model.config.prediction == "x_0"
        shape = upscaler.model.diffused_shape(16, 16)
        self.x_0 = 0.5 * torch.sin(torch.arange(math.prod(shape)) / 7).view(1, *shape)
        self.levels: list[float] = []
        self.states: list[Tensor] = []
        upscaler.model.predict = self.predict  # type: ignore[method-assign]

    def predict(self, x_t: Tensor, noise_level: Tensor, features: Tensor) -> Tensor:
        self.levels.append(float(noise_level[0]))
        self.states.append(x_t.clone())
        return self.x_0


LATE = replace(SRDIFF, prediction="x_0", residual_clip=False)


@pytest.mark.parametrize("start_level", [0.0, 0.5])
@pytest.mark.parametrize(("sampler", "grid"), list(product(SAMPLERS, ("auto", *GRIDS))))
def test_every_sampler_on_every_grid_ends_at_the_x_0_that_the_denoiser_knows(
    sampler: str, grid: str, start_level: float
) -> None:
    found = whole(LATE, sampler=sampler, grid=grid, start_level=start_level, num_steps=4, consistency="off")
    oracle = Oracle(found)
    pixels = picture(16, 16, 3)
    with torch.inference_mode():
        expected = to_pixels(found.model.restore(oracle.x_0, found.model.condition(to_model_range(pixels))))
    assert np.abs(found(pixels, digest="a").sr.astype(int) - expected).max() <= 1
    levels = sampling_grid(
        LATE.schedule, 4, family=default_grid(sampler) if grid == "auto" else grid, start=start_level
    )
    asked = [a for a, count in zip(levels[:-1], (1, 6, 6, 6), strict=True) for _ in range(count)]
    assert oracle.levels == pytest.approx(asked if sampler == "langevin" else levels[:-1].tolist(), rel=1e-6)
    assert start_level == 0 or levels[0] == start_level


def test_corrections_are_passed_through_and_change_the_image() -> None:
    for corrections, calls in ((None, 4), (0, 4), (1, 7), (3, 13)):
        found = whole(LATE, sampler="ddim", corrections=corrections, num_steps=4)
        oracle = Oracle(found)
        found(picture(16, 16, 3), digest="a")
        assert len(oracle.levels) == calls
    images = [whole(SRDIFF, corrections=k)(picture(16, 16, 3), digest="a").sr.tobytes() for k in (None, 0, 1, 2)]
    assert images[0] == images[1] and len(set(images)) == 3


@pytest.mark.parametrize("config", [LATE, replace(ANCHORED, told="step")], ids=["on bicubic", "anchored"])
@pytest.mark.parametrize("level", [0.2, 0.5, 0.9])
@torch.inference_mode()
def test_a_late_start_begins_at_the_regression_noised_to_its_level(config: ModelConfig, level: float) -> None:
    found = whole(config, start_level=level, num_steps=2, seed=9, sample_index=1, consistency="off")
    oracle = Oracle(found)
    pixels = picture(16, 16, 3)
    found(pixels, digest="a")
    lr = to_model_range(pixels)
    condition = found.model.condition(lr)
    target = found.model.target(found.model.encoder(lr)[1], condition)
    channels, height, width = found.model.diffused_shape(16, 16)
    eps = gaussian(noise_key(9, "a", 1), channels=channels, height=height, width=width, step=0)
    assert oracle.levels[0] == pytest.approx(level, rel=1e-6)
    assert (oracle.states[0] - (level * target + math.sqrt(1 - level**2) * eps)).abs().max() < 1e-5
    assert bool(target.abs().max() > 0.1) == (config is LATE)  # of an anchored model, the regression is x_0 = 0


@pytest.mark.parametrize("level", [0.2, 0.5, 0.95])
def test_a_late_start_whose_noise_is_seen_through_gives_the_regression_back(level: float) -> None:
    found = whole(replace(LATE, prediction="eps"), start_level=level, num_steps=2, consistency="off")
    channels, height, width = found.model.diffused_shape(16, 16)
    eps = gaussian(noise_key(0, "a", 0), channels=channels, height=height, width=width, step=0)
    found.model.predict = lambda x_t, noise_level, features: eps  # type: ignore[method-assign]
    image = found(picture(16, 16, 3), digest="a")
    assert image.regression is not None and image.regression.std() > 5
    assert np.abs(image.sr.astype(int) - image.regression).max() <= 1


# --- tiles ---


@pytest.mark.parametrize("kernel", ["bicubic", "bilinear"])
def test_the_features_of_an_interpolation_do_not_know_of_tiles(kernel: str) -> None:
    config = replace(SEED3, encoder=replace(SEED3.encoder, kernel=kernel))
    pixels = picture(40, 48, 1)
    features = []
    for tile, halo in ((40, 0), (8, 0), (16, 4)):
        with upscaler(config, tile=tile, halo=halo).opened(pixels, digest="a") as canvas:
            features.append(canvas.condition.features)
    assert features[0].shape == (1, 1, 160, 192)
    assert torch.equal(features[0], model_of(config).encoder(to_model_range(pixels))[0])
    assert torch.equal(features[0], features[1]) and torch.equal(features[0], features[2])


def test_tiles_of_a_network_without_attention_do_not_matter_beyond_its_reach() -> None:
    # The simple SR3's network with three levels looks 22 px far, which is 6 px of the LR, and normalises by fixed
    # statistics; a group norm or attention looks at the whole window.
    pixels = picture(40, 40, 1)
    images = [
        upscaler(SEED3, tile=tile, halo=halo, num_steps=1, consistency="off")(pixels, digest="a").sr.astype(int)
        for tile, halo in ((40, 0), (20, 6), (32, 8), (8, 0))
    ]
    assert images[0].std() > 20
    assert np.abs(images[0] - images[1]).max() <= 1 and np.abs(images[0] - images[2]).max() <= 1
    assert np.abs(images[0] - images[3]).max() > 3  # the measure sees a seam where there is one


@every_kind
def test_every_kind_works_on_the_smallest_tile_that_it_allows(config: ModelConfig) -> None:
    pixels = picture(3, 5, config.encoder.lr_channels)
    least = config.lr_smallest
    found = upscaler(config, tile=least, halo=0, num_steps=1)(pixels, digest="a")
    assert found.sr.shape == (3 * config.scale, 5 * config.scale, config.encoder.channels)


def test_a_tile_below_the_smallest_is_refused_and_the_remedy_is_one_that_works() -> None:
    assert (ANCHORED.lr_stride, ANCHORED.lr_smallest) == (2, 4)
    with pytest.raises(ValueError, match=r"tile \(2\) must be at least 4 for this model; use that"):
        upscaler(ANCHORED, tile=2, halo=0)


# --- channels ---


@pytest.mark.parametrize("name", ["sr3", "srdiff", "anchored", "4-bands", "16-bands", "rrdb-twin", "one-pass-twin"])
def test_grey_goes_into_a_colour_model_and_comes_out_grey(name: str) -> None:
    found = upscaler(MODELS[name])(picture(9, 12, 1), digest="a")
    assert found.sr.shape == (36, 48, 1)
    assert lr_psnr(picture(9, 12, 1), found.sr, scale=4) > 25  # random weights clip; a wrong channel gives 10


@every_kind
def test_a_wrong_number_of_channels_is_refused_with_the_right_one(config: ModelConfig) -> None:
    encoder = config.encoder
    wrong = {2, 5, 17, encoder.lr_channels + 1} - {encoder.lr_channels}
    if encoder.extra_channels:
        wrong |= {1, encoder.channels}  # grey has no maps
    for channels in sorted(wrong):
        with pytest.raises(ValueError, match=rf"channels \({channels}\) must be {encoder.lr_channels}"):
            upscaler(config)(picture(4, 4, channels), digest="a")


@pytest.mark.parametrize("name", ["sr3-edges", "srdiff-edges", "on-seed3"])
def test_extra_channels_are_seen_and_are_no_part_of_the_image(name: str) -> None:
    config = MODELS[name]
    pixels = picture(9, 12, config.encoder.lr_channels)
    other = pixels.copy()
    other[:, :, 3:] = 255 - other[:, :, 3:]
    found, changed = (upscaler(config)(image, digest="a").sr for image in (pixels, other))
    assert found.shape == (36, 48, 3) and (found != changed).mean() > 0.1
    assert lr_psnr(pixels[:, :, :3], found, scale=4) > 25


# --- what cannot be run ---


@pytest.mark.parametrize("config", [SR3, SEED3, MODELS["ddpm"]], ids=["sr3", "seed3", "ddpm"])
def test_a_late_start_without_a_regression_is_refused_before_any_image(config: ModelConfig) -> None:
    with pytest.raises(ValueError, match=r"start_level \(0\.5\) must be 0.*regression"):
        upscaler(config, start_level=0.5)


def test_a_late_start_outside_the_levels_of_the_grid_is_refused_before_any_image() -> None:
    for level, sampler in ((1e-6, "ddim"), (0.9999999, "ddim"), (0.99, "resshift")):
        with pytest.raises(ValueError, match=r"start \(.*must be 0 or from"):
            upscaler(replace(LATE, schedule=SR3.schedule), start_level=level, sampler=sampler, num_steps=1)


@pytest.mark.parametrize("name", ["ddpm", "deblur"])
def test_exact_consistency_at_scale_1_is_refused_with_the_remedy(name: str) -> None:
    with pytest.raises(ValueError, match=r"consistency \(exact\).*scale 1.*use off"):
        upscaler(MODELS[name], consistency="exact")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"grid": "sigmoid"}, r"grid \('sigmoid'\).*auto, uniform, log_snr"),
        ({"precision": "fp16"}, r"precision \('fp16'\).*float32, bf16"),
        ({"consistency": "Exact"}, r"consistency \('Exact'\).*exact, interval, low-band, off"),
        ({"start_level": 1.0}, r"start_level \(1\.0\).*below 1"),
        ({"start_level": -0.1}, r"start_level \(-0\.1\)"),
        ({"start_level": math.nan}, r"start_level \(nan\)"),
        ({"corrections": -1}, r"corrections \(-1\) must be at least 0"),
        ({"corrections": 0, "sampler": "langevin"}, r"corrections \(0\) must be at least 1"),
        ({"consistency_iterations": -1}, r"consistency_iterations \(-1\) must be at least 0"),
        ({"sample_index": -1}, r"sample_index \(-1\) must be at least 0"),
    ],
)
def test_a_recipe_that_would_fail_at_its_first_image_is_refused_before_it(
    fields: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingRecipe(**fields)  # type: ignore[arg-type]


# --- several samples of one image ---


@pytest.mark.parametrize("start_level", [0.0, 0.4])
def test_samples_drawn_together_are_those_drawn_one_by_one(start_level: float) -> None:
    pixels, recipe = picture(9, 12, 3), {"sampler": "ddpm", "start_level": start_level}
    together = upscaler(SRDIFF, **recipe)
    calls: list[None] = []
    together.model.encoder.register_forward_pre_hook(lambda module, inputs: calls.append(None))
    found = draw(together, pixels, count=3, digest="a")
    assert len(calls) == 2  # four tiles, two a call: encoded once
    for index, image in enumerate(found):
        assert np.array_equal(image, upscaler(SRDIFF, sample_index=index, **recipe)(pixels, digest="a").sr)
    assert len({image.tobytes() for image in found}) == 3


@pytest.mark.parametrize("config", [RRDB_TWIN, ONE_PASS_TWIN], ids=["rrdb", "one pass"])
def test_a_regression_has_no_samples(config: ModelConfig) -> None:
    with pytest.raises(ValueError, match="no denoiser"):
        draw(upscaler(config), picture(8, 8, 3), count=1, digest="a")

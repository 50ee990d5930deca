"""Laws of images between images: the line and the arc, their ends, the dial of the level, what lies outside a mask."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from diffsr_core.degradation import Degradation
from diffsr_core.family import ModelConfig
from diffsr_core.manipulation import fuse_content, interpolate, slerp
from diffsr_core.metrics import lr_psnr
from diffsr_core.noise import gaussian, noise_key
from diffsr_core.pixels import Pixels, to_model_range, to_pixels
from diffsr_core.sampler import Noise, last, sample
from diffsr_core.sampling import SamplingRecipe
from diffsr_core.schedule import Schedule
from diffsr_core.upscaler import Upscaler
from tests.core.tiny import MODELS, RRDB_TWIN, SR3, SRDIFF, model_of

# x_0 is the image itself, nothing is clipped: what a known denoiser makes of it can be written down.
PLAIN = replace(SR3, schedule=Schedule(name="linear", num_timesteps=2000), prediction="x_0", residual_clip=False)
RECIPE = SamplingRecipe(num_steps=3, tile=8, halo=2, micro_batch=2, consistency="off")
SPREAD = 0.4


def field(seed: int, *, deviation: float = 1.0) -> Tensor:
    return deviation * torch.randn(1, 3, 200, 200, generator=torch.Generator().manual_seed(seed))


def hr_picture(seed: int = 0, *, height: int = 36, width: int = 48) -> Pixels:
    y, x = np.mgrid[0:height, 0:width]
    waves = [128 + 80 * np.sin(x / (5 + c) + seed) * np.cos(y / (7 - c) + 2 * seed) for c in range(3)]
    return np.stack(waves, axis=2).astype(np.uint8)


LR = Degradation("bicubic", 4).apply(hr_picture(), seed=0)
FIRST, SECOND = hr_picture(0), hr_picture(1)
MASK = np.zeros((36, 48), dtype=bool)
MASK[4:20, 8:24] = True
SQUARES = (hr_picture(0, height=64, width=64), hr_picture(1, height=64, width=64))  # 16 px of LR: one tile
SQUARE_LR = Degradation("bicubic", 4).apply(SQUARES[0], seed=0)


def upscaler(config: ModelConfig = PLAIN, **changes: object) -> Upscaler:
    return Upscaler(model_of(config), replace(RECIPE, **changes))  # type: ignore[arg-type]


def with_denoiser(found: Upscaler, function: Callable[[Tensor, float], Tensor]) -> Upscaler:
    """The upscaler whose network is this function, (x_t, level) -> x_0, pixel by pixel."""
    found.model.predict = lambda x_t, level, features: function(x_t, float(level[0]))  # type: ignore[method-assign]
    return found


def ideal(x_t: Tensor, a: float) -> Tensor:
    """E[x_0 | x_t] where each value is Gaussian with mean 0 and deviation SPREAD."""
    return a * SPREAD**2 / (a * a * SPREAD**2 + 1 - a * a) * x_t


def difference(one: Pixels, other: Pixels) -> float:
    return float(np.abs(one.astype(float) - other).mean())


# --- slerp ---


@pytest.mark.parametrize("weight", [0.1, 0.5, 0.8])
def test_the_arc_keeps_the_deviation_of_independent_noise_and_the_line_does_not(weight: float) -> None:
    first, second = field(0), field(1)
    line = math.sqrt((1 - weight) ** 2 + weight**2)  # 0.7071 halfway
    assert float(torch.lerp(first, second, weight).std()) == pytest.approx(line, abs=0.01)
    assert float(slerp(first, second, weight).std()) == pytest.approx(1, abs=0.01)


def test_between_fields_of_one_norm_the_norm_is_kept_exactly_and_the_angle_is_shared_by_weight() -> None:
    first, second = field(0).double(), field(1).double() + field(0).double()
    second = second * (first.norm() / second.norm())

    def angle(a: Tensor, b: Tensor) -> float:
        return math.acos(float((a * b).sum() / (a.norm() * b.norm())))

    for weight in (0.0, 0.25, 0.5, 0.9, 1.0):
        point = slerp(first, second, weight)
        assert float(point.norm() / first.norm()) == pytest.approx(1, abs=1e-12)
        assert angle(first, point) == pytest.approx(weight * angle(first, second), abs=1e-6)


def test_a_quarter_of_a_turn_is_cosine_and_sine() -> None:
    first, second = torch.tensor([1.0, 0, 0, 0]).view(1, 1, 2, 2), torch.tensor([0, 0, 0, 1.0]).view(1, 1, 2, 2)
    for weight in (0.2, 0.5, 0.7):
        turned = math.cos(weight * math.pi / 2) * first + math.sin(weight * math.pi / 2) * second
        assert torch.allclose(slerp(first, second, weight), turned, atol=1e-7)


def test_the_ends_of_the_arc_are_the_fields_themselves() -> None:
    first, second = field(0), field(1, deviation=3.0)
    assert torch.equal(slerp(first, second, 0.0), first) and torch.equal(slerp(first, second, 1.0), second)
    assert slerp(first, second, 0.5).dtype == torch.float32


def test_between_parallel_fields_the_arc_is_the_line() -> None:
    first = field(0)
    assert torch.equal(slerp(first, first, 0.3), first)
    assert torch.allclose(slerp(first, 3 * first, 0.25), 1.5 * first)
    zero = torch.zeros_like(first)
    assert torch.allclose(slerp(first, zero, 0.25), 0.75 * first) and torch.equal(slerp(zero, zero, 0.5), zero)
    nearly = first + 1e-4 * field(1)
    assert torch.allclose(slerp(first, nearly, 0.5), (first + nearly) / 2, atol=1e-6)


# --- interpolation ---


def noise_of(index: int, digest: str, *, seed: int = 4) -> Noise:
    """The noise of one sample of a square canvas, (step) -> (1, 3, 64, 64)."""
    key = noise_key(seed, digest, index)
    return lambda step: gaussian(key, channels=3, height=64, width=64, step=step)


def on_one_tile(config: ModelConfig = PLAIN, **changes: object) -> Upscaler:
    return upscaler(config, tile=16, halo=0, micro_batch=1, seed=4, **changes)


def first_states(run: Callable[[Upscaler], object]) -> list[Tensor]:
    """The states that the network sees first, one for each image that is made in one step."""
    states: list[Tensor] = []

    def see(x_t: Tensor, a: float) -> Tensor:
        states.append(x_t.clone())
        return x_t

    run(with_denoiser(on_one_tile(num_steps=1), see))
    return states


@pytest.mark.parametrize("level", [0.3, 0.8])
def test_the_network_is_given_images_on_a_line_under_noise_on_an_arc(level: float) -> None:
    weights = (0.0, 0.4, 0.5, 1.0)
    states = first_states(
        lambda found: interpolate(found, SQUARE_LR, *SQUARES, weights=weights, level=level, digest="a")
    )
    x_0 = [to_model_range(image) for image in SQUARES]
    z = [noise_of(index, "a manipulated")(0) for index in (0, 1)]
    for weight, x_t in zip(weights, states, strict=True):
        expected = level * ((1 - weight) * x_0[0] + weight * x_0[1])
        expected = expected + math.sqrt(1 - level**2) * slerp(z[0], z[1], weight)
        assert float((x_t - expected).abs().max()) < 1e-5


@pytest.mark.parametrize("level", [0.3, 0.8])
def test_an_image_and_itself_keep_their_contrast_at_every_weight_and_the_noise_its_deviation(level: float) -> None:
    image, weights = SQUARES[0], (0.0, 0.25, 0.5, 0.75, 1.0)
    states = first_states(
        lambda found: interpolate(found, SQUARE_LR, image, image, weights=weights, level=level, digest="a")
    )
    x_0 = to_model_range(image)
    for weight, x_t in zip(weights, states, strict=True):
        noise = slerp(*(noise_of(index, "a manipulated")(0) for index in (0, 1)), weight)
        gain = float(((x_t - math.sqrt(1 - level**2) * noise) * x_0).sum() / x_0.square().sum())
        assert gain == pytest.approx(level, abs=1e-5)  # an arc between the noised images gave up to 1.41 times it
        assert float((x_t - level * x_0).std()) == pytest.approx(math.sqrt(1 - level**2), rel=0.02)
    assert len({state.numpy().tobytes() for state in states}) == 5  # other noise at each weight


def test_noising_takes_other_noise_than_the_samples_were_made_of() -> None:
    # A sample holds its own noise: under that again it would not be an image at the level that the network is told.
    everywhere = np.ones((64, 64), dtype=bool)
    states = first_states(
        lambda found: interpolate(found, SQUARE_LR, *SQUARES, weights=(0.0, 1.0), level=0.1, digest="a")
    ) + first_states(lambda found: fuse_content(found, SQUARE_LR, *SQUARES, everywhere, level=0.1, digest="a"))
    made = [noise_of(index, "a")(step) for index in range(3) for step in range(4)]
    bound = 4.5 / math.sqrt(made[0].numel())
    for x_t, image in zip(states, (SQUARES[0], SQUARES[1], SQUARES[1]), strict=True):
        noise = x_t - 0.1 * to_model_range(image)
        assert float(noise.std()) == pytest.approx(math.sqrt(0.99), rel=0.03)
        for other in made:
            assert abs(float((noise * other).mean())) < bound


@pytest.mark.parametrize(
    ("name", "sampler"), [("sr3", "ddpm"), ("srdiff", "ddim"), ("srdiff", "ddpm"), ("anchored", "langevin")]
)
@torch.inference_mode()
def test_an_end_is_that_image_denoised_alone_each_step_by_noise_of_its_own(name: str, sampler: str) -> None:
    config = MODELS[name]
    found = on_one_tile(config, sampler=sampler, num_steps=4)
    ends = interpolate(found, SQUARE_LR, *SQUARES, weights=(0.0, 0.5, 1.0), level=0.5, digest="a")
    condition = found.model.condition(to_model_range(SQUARE_LR))
    channels, height, width = found.model.diffused_shape(16, 16)
    first = noise_key(4, "a manipulated", 0)

    def drawn(key: Tensor, step: int) -> Tensor:
        return gaussian(key, channels=channels, height=height, width=width, step=step)

    for index in (0, 1):
        start = drawn(noise_key(4, "a manipulated", index), 0)
        states = sample(
            found.model.denoise(condition.features),
            found.grid_from(0.5),
            noise=lambda step, start=start: drawn(first, step) if step else start,  # type: ignore[misc]
            sampler=sampler,
            clip=config.residual_clip,
            start=found.model.target(to_model_range(SQUARES[index]), condition),
        )
        expected = to_pixels(found.model.restore(last(states), condition).clamp(-1, 1)).astype(int)
        assert np.abs(ends[2 * index] - expected).max() <= 1  # sums that round to the two sides of a half
    assert np.array_equal(ends[0], fuse_content(found, SQUARE_LR, SQUARES[0], SQUARES[1], np.zeros((64, 64), bool),
                                                level=0.5, digest="a"))  # fmt: skip
    assert len({image.tobytes() for image in ends}) == 3


def test_the_passage_leaves_the_first_and_nears_the_second_step_by_step() -> None:
    weights = np.linspace(0, 1, 7).tolist()
    found = interpolate(
        with_denoiser(upscaler(), ideal), LR, FIRST, SECOND, weights=weights, level=0.95, digest="a"
    )  # fmt: skip
    left, near = [difference(image, found[0]) for image in found], [difference(image, found[-1]) for image in found]
    assert left[0] == 0 and near[-1] == 0 and left[-1] > 20
    assert left == sorted(set(left)) and near == sorted(set(near), reverse=True)


def test_the_level_is_a_dial_from_what_the_images_are_to_what_the_lr_says() -> None:
    def ends(level: float) -> list[Pixels]:
        return interpolate(
            with_denoiser(upscaler(), ideal), LR, FIRST, SECOND, weights=(0.0, 1.0), level=level, digest="a"
        )

    off = [difference(ends(level)[0], FIRST) for level in (0.9999, 0.9, 0.7, 0.4)]
    assert off[0] < 2 and off == sorted(off)
    assert difference(ends(0.9999)[1], SECOND) < 2
    # Near noise, what is made of two images under one noise is one image.
    apart = [
        difference(*(fuse_content(with_denoiser(upscaler(), ideal), LR, image, image, MASK, level=level, digest="a")
                     for image in (FIRST, SECOND)))
        for level in (0.9999, 0.7, 0.1, 0.01)
    ]  # fmt: skip
    assert apart == sorted(apart, reverse=True) and apart[0] > 0.95 * difference(FIRST, SECOND) and apart[-1] < 1


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp-2m", "langevin", "resshift"])
def test_every_sampler_interpolates_and_is_a_pure_function(sampler: str) -> None:
    def run(in_flight: int) -> list[bytes]:
        found = Upscaler(model_of(SRDIFF), replace(RECIPE, sampler=sampler), in_flight=in_flight)
        images = interpolate(found, LR, FIRST, SECOND, weights=(0.2, 0.7), level=0.4, digest="a")
        return [image.tobytes() for image in images]

    assert run(1) == run(3) and len(set(run(1))) == 2


# --- fusion ---


@pytest.mark.parametrize("name", ["sr3", "srdiff", "anchored"])
def test_an_empty_mask_takes_nothing_and_a_full_one_everything(name: str) -> None:
    def fused(source: Pixels, donor: Pixels, mask: np.ndarray) -> Pixels:
        return fuse_content(upscaler(MODELS[name]), LR, source, donor, mask, level=0.6, digest="a")

    nothing, everything = np.zeros_like(MASK), np.ones_like(MASK)
    assert np.array_equal(fused(FIRST, SECOND, nothing), fused(FIRST, FIRST, MASK))
    assert np.array_equal(fused(FIRST, SECOND, everything), fused(SECOND, SECOND, MASK))
    assert not np.array_equal(fused(FIRST, SECOND, nothing), fused(FIRST, SECOND, everything))


def test_the_donor_comes_inside_the_mask_and_the_source_stays_outside() -> None:
    fused = fuse_content(with_denoiser(upscaler(), ideal), LR, FIRST, SECOND, MASK, level=0.9999, digest="a")
    for inside, image in ((MASK, SECOND), (~MASK, FIRST)):
        assert np.abs(fused[inside].astype(int) - image[inside]).mean() < 2
    assert np.abs(fused[MASK].astype(int) - FIRST[MASK]).mean() > 30


def test_the_lr_of_the_source_holds_after_the_fusion() -> None:
    exact = with_denoiser(upscaler(consistency="exact"), lambda x_t, a: ideal(x_t, a).clamp(-1, 1))
    free = with_denoiser(upscaler(), ideal)
    fused = [
        fuse_content(each, LR, FIRST, SECOND, MASK, level=0.99, digest="a") for each in (free, exact)
    ]  # fmt: skip
    assert lr_psnr(LR, fused[0], scale=4) < 30 and lr_psnr(LR, fused[1], scale=4) >= 45
    between = interpolate(exact, LR, FIRST, SECOND, weights=(0.5,), level=0.9, digest="a")
    assert lr_psnr(LR, between[0], scale=4) >= 45


def test_a_grey_lr_and_grey_images_are_changed_by_a_colour_model() -> None:
    grey = hr_picture()[:, :, :1]
    lr = Degradation("bicubic", 4).apply(grey, seed=0)
    fused = fuse_content(with_denoiser(upscaler(), ideal), lr, grey, 255 - grey, MASK, level=0.9999, digest="a")
    assert fused.shape == grey.shape and difference(fused[~MASK], grey[~MASK]) < 2


# --- what cannot be done ---


@pytest.mark.parametrize("level", [0.0, 1.0, -0.5, 1.5, math.nan])
def test_a_level_outside_is_refused(level: float) -> None:
    with pytest.raises(ValueError, match="level"):
        interpolate(upscaler(), LR, FIRST, SECOND, weights=(0.5,), level=level, digest="a")
    with pytest.raises(ValueError, match="level"):
        fuse_content(upscaler(), LR, FIRST, SECOND, MASK, level=level, digest="a")


@pytest.mark.parametrize("weight", [-0.01, 1.01, math.nan])
def test_a_weight_outside_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="weight"):
        interpolate(upscaler(), LR, FIRST, SECOND, weights=(0.5, weight), digest="a")


def test_images_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be 4 times the LR, \(36, 48\)"):
        interpolate(upscaler(), LR, FIRST, SECOND[:-1], weights=(0.5,), digest="a")
    with pytest.raises(ValueError, match=r"has 2 channels: it must have 3"):
        interpolate(upscaler(), LR, FIRST, SECOND[:, :, :2], weights=(0.5,), digest="a")
    for source, donor, mask in ((FIRST, SECOND[1:], MASK), (FIRST, SECOND, MASK[1:]), (FIRST[:, :, :1], SECOND, MASK)):
        with pytest.raises(ValueError, match="must be of one size"):
            fuse_content(upscaler(), LR, source, donor, mask, digest="a")
    small = (FIRST[:32], SECOND[:32], MASK[:32])
    with pytest.raises(ValueError, match="must be 4 times the LR"):
        fuse_content(upscaler(), LR, *small, digest="a")


def test_a_regression_cannot_change_an_image() -> None:
    with pytest.raises(ValueError, match="no denoiser"):
        interpolate(upscaler(RRDB_TWIN), LR, FIRST, SECOND, weights=(0.5,), digest="a")
    with pytest.raises(ValueError, match="no denoiser"):
        fuse_content(upscaler(RRDB_TWIN), LR, FIRST, SECOND, MASK, digest="a")

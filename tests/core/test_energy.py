"""Laws of the energy score: its closed form, that it is proper, and who is trained."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from diffsr_core.energy import EnergyScore, distance
from diffsr_core.family import ModelConfig, SuperResolver
from diffsr_core.objectives import objective_of
from diffsr_core.recipe import StageRecipe
from diffsr_core.sampler import sample
from diffsr_core.schedule import sampling_grid
from diffsr_core.training import Trainer
from tests.core.runs import recipe_of
from tests.core.tiny import ANCHORED, DIFFUSIONS, ON_SEED3, PLAIN, RRDB_TWIN, SR3, SRDIFF, model_of, pair

Array = npt.NDArray[np.float64]

LEVEL = torch.full((2,), 0.5)  # not read without a start_level
TINY = 1e-4
# One step of an eps-network is refused.
STABLE = {name: replace(c, prediction="x_0") if c.prediction == "eps" else c for name, c in DIFFUSIONS.items()}
FLAT = replace(SR3, prediction="x_0", residual_clip=False)  # x_0 is the image itself


def stage_of(diversity: float = 1.0) -> StageRecipe:
    return StageRecipe(name="energy", num_steps=1, learning_rate=1.0, diversity=diversity)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def noises(model: SuperResolver, lr: Tensor, *, seed: int = 1) -> Tensor:
    return normal(len(lr), 2, *model.diffused_shape(*lr.shape[2:]), seed=seed)


# --- the distance ---


def mean_of_windows(power: Array, side: int) -> Array:
    stride = max(1, side // 2)
    windows: Array = sliding_window_view(power, (side, side), axis=(1, 2))[:, ::stride, ::stride].mean(axis=(3, 4))
    return windows


def doubled(image: Array) -> Array:
    """Each axis twice as long: a new sample lies a quarter beside an old one, and the border is repeated."""
    for axis in (2, 3):
        size = image.shape[axis]
        before = image.take(np.maximum(np.arange(size) - 1, 0), axis)
        after = image.take(np.minimum(np.arange(size) + 1, size - 1), axis)
        stacked = np.stack([0.75 * image + 0.25 * before, 0.75 * image + 0.25 * after], axis=axis + 1)
        image = stacked.reshape(*image.shape[:axis], 2 * size, *image.shape[axis + 1 :])
    return image


def distance_by_hand(difference: Tensor) -> float:
    """The mean of the lengths over windows of 1, 3, 8 and 24 px in the image and in its three finest octaves."""
    low = difference.double().numpy()
    octaves = [low]
    while min(low.shape[2:]) >= 16 and len(octaves) < 4:
        height, width = (side // 2 * 2 for side in low.shape[2:])
        cropped = low[:, :, :height, :width]
        low = (cropped[:, :, ::2] + cropped[:, :, 1::2]) / 2
        low = (low[:, :, :, ::2] + low[:, :, :, 1::2]) / 2
        octaves.append(cropped - doubled(low))
    lengths = [
        np.sqrt(mean_of_windows(np.square(band).sum(axis=1), side) + TINY**2).mean()
        for band in octaves
        for side in (1, 3, 8, 24)
        if side <= min(band.shape[2:])
    ]
    return float(np.mean(lengths))


@pytest.mark.parametrize(
    ("shape", "windows"),
    [
        ((2, 3, 2, 9), [1]),
        ((2, 3, 8, 9), [3]),
        ((2, 3, 15, 40), [3]),
        ((1, 1, 16, 16), [3, 3]),
        ((2, 4, 35, 67), [4, 4, 3]),
        ((1, 3, 65, 130), [4, 4, 4, 3]),
    ],
)
def test_the_distance_is_the_mean_length_over_its_views(shape: tuple[int, int, int, int], windows: list[int]) -> None:
    difference = normal(*shape) * torch.linspace(0.1, 0.3, shape[0])[:, None, None, None] + 0.1
    by_hand = [distance_by_hand(image[None]) for image in difference]
    assert distance(difference).tolist() == pytest.approx(by_hand, rel=1e-5)
    # What is constant is in the image itself alone: no octave holds any of it.
    flat = distance(torch.full((1, *shape[1:]), -0.3))
    expected = (windows[0] * 0.3 * math.sqrt(shape[1]) + sum(windows[1:]) * TINY) / sum(windows)
    assert float(flat) == pytest.approx(expected, rel=1e-5)


def test_the_distance_is_a_seminorm_but_for_the_tiny() -> None:
    a, b = normal(1, 3, 40, 33, seed=1), normal(1, 3, 40, 33, seed=2)
    assert float(distance(0 * a)) == pytest.approx(TINY, rel=1e-5)
    for factor in (0.1, 0.5, 7.0):
        assert float(distance(factor * a)) == pytest.approx(factor * float(distance(a)), rel=1e-5)
    assert torch.equal(distance(-a), distance(a))
    assert float(distance(a)) + float(distance(b)) > float(distance(a + b)) > 0.5 * float(distance(a))


def test_each_image_has_a_distance_of_its_own() -> None:
    images = normal(3, 3, 32, 24) * torch.tensor([0.1, 1.0, 3.0])[:, None, None, None]
    alone = [float(distance(image[None])) for image in images]
    assert distance(images).tolist() == pytest.approx(alone, rel=1e-5)


def test_the_gradient_of_the_distance_is_finite_at_zero_and_a_direction_elsewhere() -> None:
    zero = torch.zeros(1, 3, 32, 32, requires_grad=True)
    distance(zero).backward()  # type: ignore[no-untyped-call]
    assert zero.grad is not None and torch.equal(zero.grad, torch.zeros_like(zero))
    for size in (1e-6, 1e-3, 1.0):
        x = (normal(1, 3, 32, 32) * size).requires_grad_()
        distance(x).backward()  # type: ignore[no-untyped-call]
        assert x.grad is not None and bool(x.grad.isfinite().all())
        # A function of degree 1 is its gradient times its place; below the tiny it is a square, whose part is less.
        share = float((x.detach() * x.grad).sum()) / float(distance(x.detach()))
        assert 0 < share < 1 + 1e-5
    assert share == pytest.approx(1, rel=1e-4)


# --- the loss ---


def keep(x_T: Tensor, _: int) -> Tensor:
    return x_T


@torch.no_grad()
def score_by_hand(model: SuperResolver, hr: Tensor, lr: Tensor, eps: Tensor, *, start: float, weight: float) -> float:
    """The score of one image's two samples, as the sampler draws them from a level on."""
    config = model.config
    features, image = model.encoder(lr)
    condition = model.condition_of(lr, features, image)
    grid = sampling_grid(config.schedule, 1, start=start)
    late = (image - condition.anchor) * config.residual_scale
    begin = torch.nn.functional.pixel_unshuffle(late, config.space_to_depth) if start else None
    images = []
    for z in eps.unbind(1):
        (state,) = sample(model.denoise(condition.features), grid, noise=partial(keep, z), clip=False, start=begin)
        residual = torch.nn.functional.pixel_shuffle(state[0], config.space_to_depth) / config.residual_scale
        images.append(condition.anchor + residual)
    fidelity = sum(distance_by_hand(image - hr) for image in images) / 2
    return fidelity - weight / 2 * distance_by_hand(images[0] - images[1])


@pytest.mark.parametrize("diversity", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("config", [PLAIN, ANCHORED, ON_SEED3], ids=["plain", "anchored", "v"])
@torch.no_grad()
def test_the_loss_is_that_of_two_samples_in_one_step_of_ddim(config: ModelConfig, diversity: float) -> None:
    config = replace(config, residual_clip=False)
    model = model_of(config).eval()
    hr, lr = pair(config, lr_size=(8, 8))
    eps = noises(model, lr)
    expected = score_by_hand(model, hr, lr, eps, start=0.0, weight=diversity)
    assert float(EnergyScore(model, stage_of(diversity))(hr, lr, LEVEL, eps)) == pytest.approx(expected, rel=1e-4)


LATE = {
    "plain": replace(PLAIN, one_step=True, start_level=0.7),
    "v": replace(ON_SEED3, one_step=True, start_level=0.0),
    # An anchor that is not the regression: a late start is not from zero.
    "bicubic": replace(SRDIFF, prediction="x_0", one_step=True, start_level=0.3, residual_clip=False),
}


@pytest.mark.parametrize("config", LATE.values(), ids=LATE)
@torch.no_grad()
def test_with_a_start_level_each_image_is_drawn_from_its_own_level_by_which_its_diversity_falls(
    config: ModelConfig,
) -> None:
    model = model_of(config).eval()
    hr, lr = pair(config, lr_size=(8, 8), count=3)
    eps, levels = noises(model, lr), [0.05, 0.5, 0.9]
    parts = [
        score_by_hand(model, hr[i : i + 1], lr[i : i + 1], eps[i : i + 1], start=a, weight=0.8 * (1 - a * a))
        for i, a in enumerate(levels)
    ]
    loss = float(EnergyScore(model, stage_of(0.8))(hr, lr, torch.tensor(levels), eps))
    assert loss == pytest.approx(sum(parts) / 3, rel=1e-4)


@pytest.mark.parametrize("config", [PLAIN, SR3], ids=["plain", "sr3"])
@torch.no_grad()
def test_the_loss_is_a_mean_over_images_alike_in_both_draws_that_reads_no_level(config: ModelConfig) -> None:
    config = replace(config, prediction="x_0")
    model = model_of(config)
    hr, lr = pair(config, lr_size=(8, 8), count=3)
    eps = noises(model, lr)
    score = EnergyScore(model, stage_of(0.7))
    loss = float(score(hr, lr, torch.full((3,), 0.5), eps))
    parts = [float(score(hr[i : i + 1], lr[i : i + 1], LEVEL[:1], eps[i : i + 1])) for i in range(3)]
    assert loss == pytest.approx(sum(parts) / 3, rel=1e-5)
    assert loss == pytest.approx(float(score(hr, lr, torch.full((3,), 0.9), eps.flip(1))), rel=1e-6)
    other = eps.clone()
    other[:, 1] *= -1
    assert loss != pytest.approx(float(score(hr, lr, torch.full((3,), 0.5), other)), rel=1e-6)


class Law(torch.nn.Module):
    """A denoiser whose draws are what a function makes of noise."""

    def __init__(self, law: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.law = law

    def forward(self, x_t: Tensor, position: Tensor, condition: Tensor) -> Tensor:
        return self.law(x_t)


def score_of(law: Callable[[Tensor], Tensor], hr: Tensor, *, diversity: float) -> Tensor:
    """The score of draws from a law, whatever the LR."""
    model = model_of(FLAT)
    model.denoiser = Law(law)
    eps = normal(len(hr), 2, *hr.shape[1:], seed=7)
    levels = torch.full((len(hr),), 0.5)
    score: Tensor = EnergyScore(model, stage_of(diversity))(hr, torch.zeros(len(hr), 3, 16, 16), levels, eps)
    return score


@pytest.mark.parametrize("diversity", [0.3, 0.6, 0.9, 1.0])
def test_the_best_spread_is_that_of_hr_times_a_known_share_by_diversity(diversity: float) -> None:
    # HR is m + sigma n, a draw m + s n': sqrt(s^2 + sigma^2) - diversity / 2 sqrt(2) s, which is convex in s, is least
    # at s = sigma diversity / sqrt(2 - diversity^2), and that is sigma for 1.
    sigma, mean = 0.2, 0.1
    hr = mean + sigma * normal(64, 3, 64, 64, seed=3)
    best = sigma * diversity / math.sqrt(2 - diversity**2)
    slopes = []
    for share in (0.96, 1.04):
        s = torch.tensor(share * best, requires_grad=True)
        score_of(lambda x, s=s: mean + s * x, hr, diversity=diversity).backward()  # type: ignore[misc, no-untyped-call]
        assert s.grad is not None
        slopes.append(float(s.grad))
    assert slopes[0] < 0 < slopes[1]


def test_without_diversity_any_spread_costs() -> None:
    hr = 0.2 * normal(16, 3, 64, 64, seed=3)
    scores = [float(score_of(lambda x, s=s: s * x, hr, diversity=0.0)) for s in (0.0, 0.02, 0.05, 0.1, 0.2)]  # type: ignore[misc]
    assert scores == sorted(scores) and scores[0] < 0.98 * scores[2]


def test_of_all_laws_that_of_hr_has_the_least_score() -> None:
    # Grey texture of a grain of two pixels: the others have its mean, or its variance, or its grain, but not its law.
    def grains(x: Tensor) -> Tensor:
        return 0.1 * torch.nn.functional.interpolate(x[:, :1, ::2, ::2], scale_factor=2).expand(-1, 3, -1, -1)

    hr = grains(normal(32, 3, 64, 64, seed=3))
    others: dict[str, Callable[[Tensor], Tensor]] = {
        "the median": lambda x: 0 * x,
        "no grain": lambda x: 0.1 * x[:, :1].expand(-1, 3, -1, -1),
        "coloured": lambda x: 0.1 * torch.nn.functional.interpolate(x[:, :, ::2, ::2], scale_factor=2),
        "smooth": lambda x: 0.2 * torch.nn.functional.avg_pool2d(grains(x) * 10, 3, stride=1, padding=1),
        "brighter": lambda x: grains(x) + 0.03,
        "stronger": lambda x: 1.2 * grains(x),
        "one picture": lambda x: grains(x[:1]).expand(len(x), -1, -1, -1),
        "two values": lambda x: 0.1 * grains(x).sign(),
    }
    least = float(score_of(grains, hr, diversity=1.0))
    scores = {name: float(score_of(law, hr, diversity=1.0)) for name, law in others.items()}
    assert {name: score for name, score in scores.items() if score < 1.002 * least} == {}


# --- who is trained ---


@pytest.mark.parametrize("config", STABLE.values(), ids=STABLE)
def test_the_gradient_reaches_every_parameter_of_the_denoiser_and_the_encoder_stays(config: ModelConfig) -> None:
    model = model_of(config)
    hr, lr = pair(config, lr_size=(8, 8))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    score = EnergyScore(model, stage_of()).train()
    score(hr, lr, LEVEL, noises(model, lr)).backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}
    denoiser = {n for n, _ in model.named_parameters() if n.startswith("denoiser.")}
    assert reached == denoiser == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, value in model.state_dict().items():  # running statistics too
        assert not name.startswith("encoder.") or torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SRDIFF, r"prediction \(eps\) must be v or x_0, in which one step is stable; use x_0"),
        (RRDB_TWIN, r"stage \(energy\) needs a denoiser, and this model has none; use stage regression"),
    ],
)
def test_a_model_that_cannot_draw_in_one_step_is_refused(config: ModelConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EnergyScore(model_of(config), stage_of())
    with pytest.raises(ValueError, match=message):
        Trainer(model_of(config), recipe_of("energy", num_steps=1))


@pytest.mark.parametrize("diversity", [-0.1, 1.1, math.nan])
def test_a_diversity_out_of_range_is_refused(diversity: float) -> None:
    with pytest.raises(ValueError, match=r"diversity \(.*\) must be from 0 to 1; 1 draws with HR's own variety"):
        stage_of(diversity)


def test_the_stage_that_an_objective_is_of_is_the_energy_score() -> None:
    objective = objective_of(model_of(PLAIN), stage_of(), teacher=None)
    assert isinstance(objective, EnergyScore)
    assert stage_of().in_one_step and not replace(stage_of(), name="diffusion").in_one_step

"""Laws of the energy score: its closed form, that it is proper, who is trained, and that texture is learned."""

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

from diffsr_core import memory
from diffsr_core.augmentation import Drawn, draw, noise_shape
from diffsr_core.energy import EnergyScore, distance
from diffsr_core.family import ModelConfig, SuperResolver
from diffsr_core.memory import LiveBytes, plan_memory
from diffsr_core.networks.edsr import EDSRConfig
from diffsr_core.networks.film import FiLMConfig
from diffsr_core.networks.interpolation import InterpolationConfig
from diffsr_core.objectives import objective_of
from diffsr_core.recipe import StageRecipe, TrainingRecipe
from diffsr_core.sampler import last, sample
from diffsr_core.schedule import sampling_grid
from diffsr_core.training import Trainer
from diffsr_core.validation import ValidationRecipe, validate, validation_loss
from tests.core.runs import batch, bits, new_model, recipe_of, train
from tests.core.test_resume import halves_are_the_whole
from tests.core.test_training import gradient_of
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


# --- its draws ---

FOUR = recipe_of("energy", num_steps=9, batch_size=4, seed=3, crop_px=16)


def drawn(recipe: TrainingRecipe = FOUR, *, step: int = 2, indices: range = range(4)) -> Drawn:
    hr, lr = pair(PLAIN, lr_size=(8, 8), count=4)
    chosen = list(indices)
    return draw(hr[chosen], lr[chosen], config=PLAIN, recipe=recipe, step=step, indices=chosen)


def test_each_image_has_two_noises_of_its_own() -> None:
    eps = drawn().eps
    assert eps.shape == (4, *noise_shape(PLAIN, FOUR.stages[0], 4, 4)) == (4, 2, 48, 4, 4)
    every = eps.flatten(0, 1).flatten(1)
    assert float((every @ every.T / every.shape[1] - torch.eye(8)).abs().max()) < 0.2  # none is another's twin


def test_what_is_drawn_is_a_function_of_seed_step_and_index_and_the_images_are_those_of_every_stage() -> None:
    whole, again = drawn(), drawn()
    share = drawn(indices=range(1, 3))
    diffusion = drawn(replace(FOUR, stages=(replace(FOUR.stages[0], name="diffusion"),)))
    for name in Drawn._fields:
        assert torch.equal(getattr(whole, name), getattr(again, name))
        assert torch.equal(getattr(whole, name)[1:3], getattr(share, name))
        assert name == "eps" or torch.equal(getattr(whole, name), getattr(diffusion, name))
    assert torch.equal(whole.eps[:, 0], diffusion.eps)
    for other in (drawn(step=3), drawn(replace(FOUR, seed=4))):
        assert not bool((other.eps == whole.eps).any())


# --- the training ---


@pytest.mark.parametrize("config", [PLAIN, replace(SR3, prediction="v")], ids=["plain", "v"])
def test_an_energy_stage_resumes_bit_for_bit(config: ModelConfig) -> None:
    stages = ("regression", "energy") if config is PLAIN else ("energy", "energy")
    recipe = recipe_of(*stages, num_steps=2, batch_size=3, micro_batch=2, ema_half_lives_images=(20, 1))
    halves_are_the_whole(lambda seed: Trainer(new_model(config, seed=seed), recipe), at=3, end=4)


def test_an_energy_stage_moves_the_denoiser_alone() -> None:
    trainer = Trainer(model_of(PLAIN), recipe_of("energy", num_steps=2))
    start = bits(trainer.ema)
    train(trainer, to=2)
    for found in (bits(trainer.model.state_dict()), bits(trainer.ema)):
        assert {name for name in start if found[name] == start[name]} == {n for n in start if n.startswith("encoder.")}


def test_its_gradient_does_not_depend_on_the_micro_batch_or_the_workers() -> None:
    free = recipe_of("energy", num_steps=1, batch_size=5, gradient_clip=1e9)
    whole = gradient_of(free, config=PLAIN)
    for micro_batch in (1, 2, 5):
        parts = gradient_of(replace(free, micro_batch=micro_batch), config=PLAIN)
        assert float((whole - parts).abs().max()) < 1e-6 * float(whole.norm())
    shares = torch.stack([gradient_of(free, rank=rank, world=2, config=PLAIN) for rank in range(2)])
    assert float((shares.mean(dim=0) - whole).abs().max()) < 1e-6 * float(whole.norm())
    assert float((shares[0] - shares[1]).norm()) > 1e-2 * float(whole.norm())


def test_half_precision_has_about_the_gradient_of_float32() -> None:
    recipe = recipe_of("energy", num_steps=1, batch_size=4, gradient_clip=1e9)
    full, half = (gradient_of(replace(recipe, precision=p), config=PLAIN) for p in ("float32", "bf16"))
    assert float(torch.cosine_similarity(full, half, dim=0)) > 0.99 and not torch.equal(full, half)


SMALL = ModelConfig(
    encoder=InterpolationConfig(scale=1),
    denoiser=FiLMConfig(channels=3, condition_channels=3, hidden=16, num_blocks=1),
    residual_scale=5.0,
    residual_clip=False,
    told="noise_level",
    prediction="x_0",
)
SHIFT = 0.05  # of HR, which the LR does not show
ROUGHNESS = {-0.5: 0.05, 0.5: 0.15}  # deviation of HR's texture by the brightness of the LR


def textured(step: int) -> tuple[Tensor, Tensor]:
    """Four LR of one brightness each, and HR with a texture of which they tell the roughness and nothing else."""
    lr = torch.tensor([*ROUGHNESS] * 2)[:, None, None, None].expand(4, 3, 16, 16)
    rough = torch.tensor([*ROUGHNESS.values()] * 2)[:, None, None, None]
    return lr + SHIFT + rough * normal(4, 3, 16, 16, seed=1000 + step), lr


def trained(diversity: float, *, num_steps: int, config: ModelConfig = SMALL) -> SuperResolver:
    stage = StageRecipe(name="energy", num_steps=num_steps, learning_rate=1e-2, diversity=diversity)
    recipe = TrainingRecipe(stages=(stage,), batch_size=4, ema_half_lives_images=(100,), optimizer="adam")
    trainer = Trainer(new_model(config, seed=0), recipe)
    for step in range(num_steps):
        trainer.train_step(*textured(step))
    trainer.model.load_state_dict(trainer.ema)
    return trainer.model.eval()


@torch.no_grad()
def mean_and_spread(model: SuperResolver, brightness: float, *, start: float = 0.0) -> tuple[float, float]:
    """The mean of one-step samples for an LR of one brightness, and their deviation over the noise."""
    lr = torch.full((128, 3, 16, 16), brightness)
    features, image = model.encoder(lr)
    condition = model.condition_of(lr, features, image)
    x_T = normal(128, 3, 16, 16, seed=5)
    grid = sampling_grid(model.config.schedule, 1, start=start)
    late = model.target(image, condition) if start else None
    x_0 = last(sample(model.denoise(condition.features), grid, noise=lambda _: x_T, clip=False, start=late))
    images = model.restore(x_0, condition)[:, :, 3:-3, 3:-3]  # the padding of convolutions is seen at the border
    return float(images.mean()), float(images.var(dim=0).mean().sqrt())


def test_draws_have_the_texture_of_hr_by_what_the_lr_says_of_it_and_a_regression_has_none() -> None:
    drawing, regression = trained(1.0, num_steps=150), trained(0.0, num_steps=80)
    for brightness, roughness in ROUGHNESS.items():
        for model in (drawing, regression):
            assert mean_and_spread(model, brightness)[0] == pytest.approx(brightness + SHIFT, abs=0.15 * roughness)
        assert mean_and_spread(drawing, brightness)[1] == pytest.approx(roughness, rel=0.15)
        assert mean_and_spread(regression, brightness)[1] < 0.1 * roughness


DIAL = replace(
    SMALL,
    encoder=EDSRConfig(scale=1, num_features=4, num_blocks=1),
    denoiser=FiLMConfig(channels=3, condition_channels=4, hidden=16, num_blocks=1),
    anchor="regression",
    one_step=True,
    start_level=0.7,
)


def test_where_a_sample_starts_is_a_dial_from_the_texture_of_hr_to_none() -> None:
    model = trained(1.0, num_steps=400, config=DIAL)
    for brightness, roughness in ROUGHNESS.items():
        for start in (0.0, 0.5, 0.7, 0.9):
            gamma = 1 - start * start
            mean, spread = mean_and_spread(model, brightness, start=start)
            assert mean == pytest.approx(brightness + SHIFT, abs=0.15 * roughness)
            assert spread == pytest.approx(roughness * gamma / math.sqrt(2 - gamma**2), abs=0.25 * roughness)


# --- beside the training ---


def test_the_validation_of_an_energy_stage_is_one_step_of_ddim_whatever_its_recipe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of(PLAIN).eval()
    hr, lr = pair(PLAIN)
    asked: list[float] = []

    def predict(x_t: Tensor, noise_level: Tensor, features: Tensor) -> Tensor:
        asked.extend(noise_level.tolist())
        return torch.full_like(x_t, 1.5)

    monkeypatch.setattr(model, "predict", predict)
    recipe = ValidationRecipe(sampler="ddpm", grid="resshift", num_steps=4)
    loss = validation_loss(model, hr, lr, stage="energy", recipe=recipe)
    with torch.no_grad():
        expected = float((model.encoder(lr)[1] + 0.15 - hr).abs().mean())
    assert loss == pytest.approx(expected, rel=1e-5)
    assert asked == pytest.approx([PLAIN.schedule.noise_levels[-1]] * 2)
    metrics = validate(model, hr, lr, stage="energy", recipe=recipe).metrics
    assert metrics["val_loss"] == loss and "val_psnr_sample" in metrics and "val_x0_error" not in metrics
    assert set(asked) == set(asked[:1])


def bytes_of_a_step(config: ModelConfig, *, side: int) -> tuple[int, int]:
    """Most that lives within a step of two images on a CPU, by the planner's sum; and what the planner says of it."""
    recipe = recipe_of("energy", num_steps=1, batch_size=2)
    with torch.device("meta"):
        shapes = SuperResolver(config).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    planned = memory._step_bytes(shapes, recipe, recipe.stages[0], side=side, world=1, teacher=None, device="cpu")
    model = model_of(config).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    objective = objective_of(model, recipe.stages[0], teacher=None).train()
    like = memory._inputs(model, recipe.stages[0], count=2, side=side)
    inputs = [torch.full(x.shape, 0.5) * normal(*x.shape) for x in like]
    with torch.no_grad():
        objective(*inputs)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    with LiveBytes() as live:
        memory.backward(objective(*inputs))
    return 2 * sum(x.nbytes for x in inputs) + live.peak + 2 * live.largest, planned


@pytest.mark.parametrize("name", ["plain", "anchored", "sr3"])
def test_the_plan_of_its_memory_is_near_the_peak_of_a_real_step(name: str) -> None:
    real, planned = bytes_of_a_step(STABLE[name], side=32)
    assert real <= planned <= 1.05 * real


def test_its_plan_has_the_denoisers_gradients_and_more_activations_than_a_diffusion_of_one_draw() -> None:
    plans = {name: plan_memory(PLAIN, recipe_of(name, num_steps=1), patch_px=32) for name in ("energy", "diffusion")}
    energy, diffusion = plans["energy"], plans["diffusion"]
    assert energy.gradients_bytes == diffusion.gradients_bytes == energy.optimizer_bytes // 2
    assert energy.parameters_bytes == diffusion.parameters_bytes
    assert 1.3 * diffusion.activations_bytes < energy.activations_bytes
    both = plan_memory(PLAIN, recipe_of("diffusion", "energy", num_steps=1), patch_px=32)
    assert both == energy


def test_images_of_the_training_fit_its_loss() -> None:
    trainer = Trainer(model_of(PLAIN), recipe_of("energy", num_steps=1, batch_size=2))
    found = trainer.draw(0, *batch(0, config=PLAIN))
    with torch.no_grad():
        expected = float(EnergyScore(model_of(PLAIN), trainer.stage)(*found))
    assert trainer.optimise(found)["loss"] == pytest.approx(expected, rel=1e-5)

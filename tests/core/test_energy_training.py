"""Laws of training by the energy score: its draws, resuming, that texture is learned, validation and memory."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffsr_core import memory
from diffsr_core.augmentation import Drawn, draw, noise_shape
from diffsr_core.energy import EnergyScore
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
from tests.core.test_energy import STABLE, normal
from tests.core.test_resume import halves_are_the_whole
from tests.core.test_training import gradient_of
from tests.core.tiny import PLAIN, SR3, model_of, pair

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

"""Laws of the look at a model in training: its errors compare models, its scores are of the images that it shows."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from diffsr_core.family import ModelConfig, Prediction, SuperResolver
from diffsr_core.metrics import lr_psnr, psnr, ssim
from diffsr_core.networks.sr3 import SR3Config
from diffsr_core.objective import Objective
from diffsr_core.pixels import Pixels, to_pixels
from diffsr_core.recipe import StageRecipe
from diffsr_core.resize import upscale
from diffsr_core.sampler import SAMPLERS, noise_scales
from diffsr_core.schedule import sampling_grid
from diffsr_core.validation import ValidationRecipe, validate, validation_loss, validation_x0_error
from tests.core.tiny import (
    ANCHORED,
    DDPM,
    DIFFUSIONS,
    MODELS,
    ON_SEED3,
    RRDB_TWIN,
    SEED3,
    SR3,
    SRDIFF,
    bands,
    model_of,
    pair,
)

RECIPE = ValidationRecipe()
KINDS: tuple[Prediction, ...] = ("eps", "x_0", "v")

Answer = Callable[[Tensor, Tensor, Tensor], Tensor]  # x_t, a, b -> x_0, a and b broadcastable


def stage_of(config: ModelConfig) -> str:
    return "regression" if config.denoiser is None else "diffusion"


def answering(config: ModelConfig, answer: Answer) -> tuple[SuperResolver, list[tuple[Tensor, Tensor]]]:
    """A model whose denoiser says what `answer` does, in its own kind of prediction; and what it was asked."""
    model, asked = model_of(config), []

    def predict(x_t: Tensor, noise_level: Tensor, features: Tensor) -> Tensor:
        asked.append((x_t, noise_level))
        a = noise_level.double()[:, None, None, None]
        b = (1 - a * a).sqrt()
        x_0 = answer(x_t.double(), a, b)
        eps = (x_t - a * x_0) / b
        return {"eps": eps, "x_0": x_0, "v": a * eps - b * x_0}[config.prediction].float()

    model.predict = predict  # type: ignore[method-assign]
    return model, asked


@torch.no_grad()
def target(config: ModelConfig, hr: Tensor, lr: Tensor) -> Tensor:
    model = model_of(config).eval()
    return model.target(hr, model.condition(lr)).double()


def panels(strip: Pixels, count: int) -> list[Pixels]:
    return np.split(strip, count, axis=1)


def sampled(strip: Pixels) -> Pixels:
    """The picture before the last, of square patches."""
    return panels(strip, strip.shape[1] // strip.shape[0])[-2].astype(np.int16)


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_of_eps_is_the_loss_whatever_is_predicted(kind: Prediction) -> None:
    config = replace(ANCHORED, prediction=kind)
    hr, lr = pair(config)
    x_0, error = target(config, hr, lr), 0.03
    model, asked = answering(config, lambda x_t, a, b: x_0 - b / a * error)
    assert validation_loss(model, hr, lr, stage="diffusion", recipe=RECIPE) == pytest.approx(error, rel=1e-4)
    assert validation_loss(model, hr, lr, stage="joint", recipe=RECIPE) == pytest.approx(error, rel=1e-4)
    ratio = np.mean([math.sqrt(1 - a * a) / a for a in (float(level[0]) for _, level in asked[:8])])
    assert validation_x0_error(model, hr, lr, recipe=RECIPE) == pytest.approx(error * ratio / 10, rel=1e-4)
    metrics = validate(model, hr, lr, stage="diffusion", recipe=RECIPE).metrics
    assert metrics["val_loss"] == validation_loss(model, hr, lr, stage="diffusion", recipe=RECIPE)
    assert metrics["val_x0_error"] == validation_x0_error(model, hr, lr, recipe=RECIPE)


@pytest.mark.parametrize("config", [SR3, SRDIFF, ANCHORED, ON_SEED3], ids=["zero", "bicubic", "regression", "v"])
def test_an_error_of_the_image_is_the_x0_error_whatever_the_anchor_and_the_scale(config: ModelConfig) -> None:
    config = replace(config, residual_clip=False)
    hr, lr = pair(config)
    x_0 = target(config, hr + 0.1, lr)
    model, _ = answering(config, lambda x_t, a, b: x_0)
    assert validation_x0_error(model, hr, lr, recipe=RECIPE) == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_x0_error_is_that_of_the_clipped_x0_and_the_loss_is_not(kind: Prediction) -> None:
    config = replace(SRDIFF, prediction=kind)
    hr, lr = pair(config)
    x_0 = target(config, hr, lr)
    model, asked = answering(config, lambda x_t, a, b: torch.full_like(x_t, 5.0))
    expected = float((1 - x_0).mean()) / 2
    assert validation_x0_error(model, hr, lr, recipe=RECIPE) == pytest.approx(expected, rel=1e-4)
    ratio = np.mean([a / math.sqrt(1 - a * a) for a in (float(level[0]) for _, level in asked)])
    loss = validation_loss(model, hr, lr, stage="diffusion", recipe=RECIPE)
    assert loss == pytest.approx(float((5 - x_0).mean()) * ratio, rel=1e-4)


@pytest.mark.parametrize(
    ("num_timesteps", "num_levels", "expected"),
    [(1000, 4, [125, 375, 625, 875]), (100, 8, [6, 18, 31, 43, 56, 68, 81, 93]), (100, 1, [50]), (2, 4, [0, 0, 1, 1])],
)
def test_the_levels_are_those_of_evenly_spaced_steps(num_timesteps: int, num_levels: int, expected: list[int]) -> None:
    config = replace(SRDIFF, schedule=replace(SRDIFF.schedule, num_timesteps=num_timesteps))
    model, asked = answering(config, lambda x_t, a, b: x_t)
    recipe = ValidationRecipe(num_levels=num_levels)
    validation_loss(model, *pair(config), stage="diffusion", recipe=recipe)
    found = [float(level[0]) for _, level in asked]
    assert found == pytest.approx(config.schedule.noise_levels[expected].tolist(), rel=1e-6)


def test_the_noise_is_normal_and_of_the_seed_the_pair_and_the_level() -> None:
    hr, lr = pair(SR3, lr_size=(16, 16), count=3)
    draws: dict[tuple[int, int, int], Tensor] = {}
    for seed in (0, 1):
        model, asked = answering(SR3, lambda x_t, a, b: x_t)
        validation_loss(model, hr, lr, stage="diffusion", recipe=ValidationRecipe(seed=seed, num_levels=2))
        for i, (x_t, level) in enumerate(asked):
            a = level[:, None, None, None]
            draws |= {(seed, i, k): eps for k, eps in enumerate((x_t - a * hr) / (1 - a * a).sqrt())}
    assert len(draws) == 12
    every = torch.stack([eps.flatten() for eps in draws.values()])
    assert every.mean(dim=1).abs().max() < 0.05 and (every.std(dim=1) - 1).abs().max() < 0.05
    assert (torch.corrcoef(every) - torch.eye(12)).abs().max() < 0.05


@pytest.mark.parametrize("config", [SR3, SRDIFF, ANCHORED, ON_SEED3], ids=["sr3", "srdiff", "anchored", "on-seed3"])
def test_what_is_said_of_a_pair_depends_on_no_other_pair_on_no_order_and_on_no_chunk(config: ModelConfig) -> None:
    model, (hr, lr) = model_of(config), pair(config, lr_size=(8, 8), count=5)
    recipe = ValidationRecipe(sampler="ddpm", num_steps=2)
    together = validate(model, hr, lr, stage="diffusion", recipe=recipe, chunk=5)
    alone = [validate(model, hr[k : k + 1], lr[k : k + 1], stage="diffusion", recipe=recipe) for k in range(5)]
    turned = validate(model, hr.flip(0), lr.flip(0), stage="diffusion", recipe=recipe, chunk=2)
    for name in ("val_loss", "val_x0_error"):
        assert turned.metrics[name] == pytest.approx(together.metrics[name], rel=1e-5)
        assert np.mean([each.metrics[name] for each in alone]) == pytest.approx(together.metrics[name], rel=1e-5)
    assert len(turned.strips) == len(together.strips) == 5
    for strip, other, (_, (single,)) in zip(together.strips, turned.strips[::-1], alone, strict=True):
        assert np.abs(sampled(strip) - sampled(other)).max() <= 1
        assert np.abs(sampled(strip) - sampled(single)).max() <= 1


def test_the_loss_of_a_regression_is_that_of_its_image() -> None:
    hr, lr = pair(RRDB_TWIN, count=3)
    with torch.no_grad():
        expected = float((model_of(RRDB_TWIN).encoder(lr)[1] - hr).abs().mean())
    assert validation_loss(model_of(RRDB_TWIN), hr, lr, stage="regression", recipe=RECIPE) == pytest.approx(expected)
    metrics = validate(model_of(RRDB_TWIN), hr, lr, stage="regression", recipe=RECIPE, chunk=2).metrics
    assert metrics["val_loss"] == pytest.approx(expected) and "val_x0_error" not in metrics


def test_the_loss_of_a_distillation_is_that_of_one_step_from_the_noisiest_level() -> None:
    hr, lr = pair(SRDIFF)
    model, asked = answering(SRDIFF, lambda x_t, a, b: torch.full_like(x_t, 0.3))
    expected = float((upscale(lr, 4) + 0.15 - hr).abs().mean())
    recipe = ValidationRecipe(sampler="langevin", grid="resshift", num_steps=4)
    loss = validation_loss(model, hr, lr, stage="distillation", recipe=recipe)
    assert loss == pytest.approx(expected, rel=1e-4)
    levels = [float(level[0]) for _, level in asked]
    assert levels == pytest.approx([SRDIFF.schedule.noise_levels[-1]], rel=1e-6)
    metrics, strips = validate(model, hr, lr, stage="distillation", recipe=recipe)
    assert metrics["val_loss"] == loss and "val_x0_error" not in metrics and len(asked) == 3
    step = to_pixels(upscale(lr, 4)[:1] + 0.15).astype(np.int16)
    assert np.abs(panels(strips[0], 4)[2] - step).max() <= 1


@pytest.mark.parametrize("config", [*MODELS.values(), bands(2)], ids=[*MODELS, "2-bands"])
def test_the_scores_are_those_of_the_strips_and_the_strips_hold_the_methods_in_order(config: ModelConfig) -> None:
    hr, lr = pair(config, count=3)
    stage, encoder = stage_of(config), config.encoder
    metrics, strips = validate(model_of(config), hr, lr, stage=stage, recipe=RECIPE, chunk=2)
    conditioned = encoder.condition_channels > 0
    methods = [*["bicubic"] * conditioned, *["regression"] * encoder.regresses, *["sample"] * (stage == "diffusion")]
    shown = 3 if encoder.channels >= 3 else 1
    assert [strip.shape for strip in strips] == [(hr.shape[2], hr.shape[3] * (len(methods) + 1), shown)] * 3

    scores = ["psnr", *["ssim"] * (encoder.scale > 1), *["lr_psnr"] * (config not in (SEED3, MODELS["deblur"]))]
    expected = ["val_loss", *["val_x0_error"] * (stage == "diffusion")]
    expected += [f"val_{score}_{method}" for method in methods for score in scores if conditioned]
    assert list(metrics) == expected

    rows = [panels(strip, len(methods) + 1) for strip in strips]
    inputs = [to_pixels(x[None]) for x in lr[:, : encoder.channels]]
    for k, row in enumerate(rows):
        assert np.array_equal(row[-1], to_pixels(hr[k : k + 1])[:, :, :shown])
        bicubic = to_pixels(upscale(lr[k : k + 1, : encoder.channels], config.scale))[:, :, :shown]
        assert not conditioned or np.array_equal(row[0], bicubic)
    with torch.no_grad():
        regression = to_pixels(model_of(config).eval().encoder(lr[:2])[1][:1])[:, :, :shown]
    assert not encoder.regresses or np.array_equal(rows[0][methods.index("regression")], regression)
    if encoder.channels != shown:
        return
    for index, method in enumerate(methods if conditioned else []):
        found = {
            "psnr": [psnr(row[-1], row[index]) for row in rows],
            "ssim": [ssim(row[-1], row[index]) for row in rows if "ssim" in scores],
            "lr_psnr": [lr_psnr(x, row[index], scale=config.scale) for x, row in zip(inputs, rows, strict=True)],
        }
        for score in scores:
            assert metrics[f"val_{score}_{method}"] == pytest.approx(np.mean(found[score]), abs=1e-9)


def test_all_channels_are_scored_and_not_only_those_that_are_shown() -> None:
    config = bands(4)
    hr, lr = pair(config, count=1)
    metrics, _ = validate(model_of(config), hr, lr, stage="diffusion", recipe=RECIPE)
    bicubic, wanted = to_pixels(upscale(lr, 4)), to_pixels(hr)
    assert metrics["val_psnr_bicubic"] == pytest.approx(psnr(bicubic, wanted), abs=1e-9)
    assert metrics["val_ssim_bicubic"] == pytest.approx(ssim(bicubic, wanted), abs=1e-9)
    assert metrics["val_psnr_bicubic"] != pytest.approx(psnr(bicubic[:, :, :3], wanted[:, :, :3]), abs=1e-2)


def test_a_denoiser_that_knows_the_answer_scores_100_db_and_errs_by_nothing() -> None:
    hr, lr = pair(ANCHORED)
    x_0 = target(ANCHORED, hr, lr)
    model, _ = answering(ANCHORED, lambda x_t, a, b: x_0)
    metrics = validate(model, hr, lr, stage="diffusion", recipe=RECIPE).metrics
    assert metrics["val_psnr_sample"] == 100 and metrics["val_ssim_sample"] == pytest.approx(1)
    assert metrics["val_psnr_regression"] < 60
    assert metrics["val_loss"] < 1e-4 and metrics["val_x0_error"] < 1e-6


def test_a_sample_of_no_condition_is_shown_beside_the_hr_and_not_scored_against_it() -> None:
    hr, lr = pair(DDPM, lr_size=(8, 8))
    model, _ = answering(DDPM, lambda x_t, a, b: torch.full_like(x_t, 0.25))
    metrics, strips = validate(model, hr, lr, stage="diffusion", recipe=RECIPE)
    assert list(metrics) == ["val_loss", "val_x0_error"]
    grey = np.full((8, 8, 3), round(1.25 * 127.5), np.uint8)
    for strip, image in zip(strips, hr, strict=True):
        assert np.array_equal(strip, np.concatenate([grey, to_pixels(image[None])], axis=1))


def test_in_a_regression_stage_the_denoiser_is_not_asked() -> None:
    model = model_of(SRDIFF)
    model.predict = None  # type: ignore[method-assign, assignment]
    assert "val_psnr_sample" not in validate(model, *pair(SRDIFF), stage="regression", recipe=RECIPE).metrics


@pytest.mark.parametrize("config", DIFFUSIONS.values(), ids=DIFFUSIONS)
@torch.inference_mode()
def test_a_sample_is_ddim_from_seeded_noise(config: ModelConfig) -> None:
    hr, lr = pair(config, lr_size=(8, 8))
    model, asked = model_of(config).eval(), []
    predict = model.predict

    def recorded(x_t: Tensor, noise_level: Tensor, features: Tensor) -> Tensor:
        asked.append(x_t)
        return predict(x_t, noise_level, features)

    model.predict = recorded  # type: ignore[method-assign]
    recipe = ValidationRecipe(num_steps=3, seed=7, num_levels=1)
    strips = validate(model, hr, lr, stage="diffusion", recipe=recipe).strips
    condition, x = model.condition(lr), asked[1]
    assert len(asked) == 4 and abs(float(x.std()) - 1) < 0.2
    levels = sampling_grid(config.schedule, 3).tolist()
    for a, a_next in zip(levels[:-1], levels[1:], strict=True):
        b = math.sqrt(1 - a * a)
        out = predict(x, torch.full((len(lr),), a), condition.features)
        x_0 = {"eps": (x - b * out) / a, "x_0": out, "v": a * x - b * out}[config.prediction]
        x_0 = x_0.clamp(-1, 1) if config.residual_clip else x_0
        x = a_next * x_0 + math.sqrt(1 - a_next**2) * (x - a * x_0) / b
    shown = 3 if config.encoder.channels >= 3 else 1
    for strip, image in zip(strips, model.restore(x, condition), strict=True):
        assert np.abs(sampled(strip) - to_pixels(image[None])[:, :, :shown].astype(np.int16)).max() <= 1


def test_each_step_of_an_ancestral_sampler_gets_noise_of_its_own() -> None:
    hr, lr = pair(SR3, lr_size=(16, 16))
    model, asked = answering(SR3, lambda x_t, a, b: torch.zeros_like(x_t))
    validate(model, hr, lr, stage="diffusion", recipe=ValidationRecipe(sampler="ddpm", num_steps=3, num_levels=1))
    (x, _), *later = asked[1:]
    draws, levels = [x], sampling_grid(SR3.schedule, 3).tolist()
    for a_t, a_s, (x_s, _) in zip(levels[:-2], levels[1:-1], later, strict=True):
        tau, _ = noise_scales("ddpm", a_t, a_s)
        draws.append((x_s - math.sqrt(1 - a_s**2 - tau**2) * x / math.sqrt(1 - a_t**2)) / tau)
        x = x_s
    every = torch.stack([z.flatten() for z in draws])
    assert (every.std(dim=1) - 1).abs().max() < 0.05
    assert (torch.corrcoef(every) - torch.eye(3)).abs().max() < 0.05


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("grid", ["auto", "uniform"])
def test_every_sampler_draws_the_same_twice_and_another_for_another_seed(sampler: str, grid: str) -> None:
    hr, lr = pair(SR3, lr_size=(4, 4), count=1)
    model = model_of(SR3)

    def draw(seed: int) -> Pixels:
        recipe = ValidationRecipe(sampler=sampler, grid=grid, num_steps=3, seed=seed, num_levels=1)
        return sampled(validate(model, hr, lr, stage="diffusion", recipe=recipe).strips[0])

    assert np.array_equal(draw(0), draw(0))
    assert not np.array_equal(draw(0), draw(1))


@pytest.mark.parametrize("stage", ["diffusion", "regression", "distillation"])
def test_every_module_gets_its_own_mode_back_also_after_an_error(stage: str) -> None:
    model = model_of(ON_SEED3)
    model.train()
    model.encoder.eval()
    hr, lr = pair(ON_SEED3)
    before, state = [module.training for module in model.modules()], torch.random.get_rng_state()
    assert any(before) and not all(before)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    validate(model, hr, lr, stage=stage, recipe=RECIPE)
    validation_loss(model, hr, lr, stage=stage, recipe=RECIPE)
    validation_x0_error(model, hr, lr, recipe=RECIPE)
    with pytest.raises(ValueError, match="steps"):
        validate(model, hr, lr, stage="diffusion", recipe=ValidationRecipe(num_steps=5000))
    assert [module.training for module in model.modules()] == before
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_model_in_training_is_looked_at_in_eval_mode() -> None:
    assert isinstance(SR3.denoiser, SR3Config)
    config = replace(SR3, denoiser=replace(SR3.denoiser, dropout=0.5))
    hr, lr = pair(config)
    model = model_of(config)
    expected = validation_loss(model.eval(), hr, lr, stage="diffusion", recipe=RECIPE)
    assert validation_loss(model.train(), hr, lr, stage="diffusion", recipe=RECIPE) == expected


def test_training_goes_on_after_a_look_at_sizes_that_it_has_not_seen() -> None:
    hr, lr = pair(ANCHORED, lr_size=(10, 6))
    model = model_of(ANCHORED)
    validate(model, hr, lr, stage="joint", recipe=RECIPE)
    objective = Objective(model, StageRecipe(name="joint", num_steps=1, learning_rate=1e-3))
    noise_level, eps = torch.full((2,), 0.5), torch.zeros(2, 48, 10, 6)
    objective(hr, lr, noise_level, eps).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_perceptual_distance_is_of_the_pixels_shown_and_averaged_over_the_pairs() -> None:
    hr, lr = pair(SRDIFF, count=3)
    seen = []

    def distance(sr: Tensor, wanted: Tensor) -> Tensor:
        assert sr.shape == wanted.shape and sr.shape[1:] == hr.shape[1:] and sr.abs().max() <= 1
        seen.append(sr)
        return (sr - wanted).square().mean(dim=(1, 2, 3))

    metrics, strips = validate(model_of(SRDIFF), hr, lr, stage="diffusion", recipe=RECIPE, perceptual=distance, chunk=2)
    assert [len(sr) for sr in seen] == [2, 2, 2, 1, 1, 1]
    for index, method in enumerate(("bicubic", "regression", "sample")):
        rows = [panels(strip, 4) for strip in strips]
        squares = [np.square(row[index].astype(np.float64) - row[-1]).mean() / 127.5**2 for row in rows]
        assert metrics[f"val_lpips_{method}"] == pytest.approx(np.mean(squares), rel=1e-5)


def test_the_perceptual_distance_is_asked_of_three_channels_only() -> None:
    def refuses(sr: Tensor, wanted: Tensor) -> Tensor:
        raise AssertionError

    for config in (bands(1), bands(4)):
        hr, lr = pair(config)
        metrics = validate(model_of(config), hr, lr, stage="diffusion", recipe=RECIPE, perceptual=refuses).metrics
        assert "val_psnr_sample" in metrics and not any("lpips" in name for name in metrics)


def test_a_patch_below_the_window_of_ssim_has_no_ssim() -> None:
    model = model_of(MODELS["deblur"])
    small, large = (pair(MODELS["deblur"], lr_size=(side, 12)) for side in (10, 11))
    assert "val_ssim_regression" not in validate(model, *small, stage="regression", recipe=RECIPE).metrics
    assert "val_ssim_regression" in validate(model, *large, stage="regression", recipe=RECIPE).metrics


def test_a_recipe_that_cannot_be_is_refused_by_name() -> None:
    for wrong, message in (
        ({"sampler": "euler"}, r"sampler \('euler'\) must be one of ddim"),
        ({"grid": "even"}, r"grid \('even'\) must be one of auto"),
        ({"num_steps": 0}, r"num_steps \(0\) must be at least 1"),
        ({"num_levels": 0}, r"num_levels \(0\) must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            ValidationRecipe(**wrong)
    assert np.array_equal(RECIPE.grid_of(SRDIFF.schedule), sampling_grid(SRDIFF.schedule, 4))
    with pytest.raises(ValueError, match="steps"):
        ValidationRecipe(num_steps=101).grid_of(SRDIFF.schedule)


def test_what_a_model_does_not_have_is_refused_by_name() -> None:
    hr, lr = pair(SRDIFF)
    for config, stage, message in (
        (SRDIFF, "adversarial", r"stage \('adversarial'\) must be one of regression"),
        (SR3, "regression", "needs an encoder that regresses"),
        (RRDB_TWIN, "diffusion", r"stage \(diffusion\) needs a denoiser"),
        (RRDB_TWIN, "distillation", r"stage \(distillation\) needs a denoiser"),
    ):
        with pytest.raises(ValueError, match=message):
            validation_loss(model_of(config), hr, lr, stage=stage, recipe=RECIPE)
        with pytest.raises(ValueError, match=message):
            validate(model_of(config), hr, lr, stage=stage, recipe=RECIPE)
    with pytest.raises(ValueError, match="needs a denoiser"):
        validation_x0_error(model_of(RRDB_TWIN), hr, lr, recipe=RECIPE)
    for some, others in ((hr[:0], lr[:0]), (hr, lr[:1])):
        with pytest.raises(ValueError, match="they must be pairs"):
            validate(model_of(SRDIFF), some, others, stage="diffusion", recipe=RECIPE)

"""Laws of the quick look: its scores are those of the images that it shows, and its sample is the sampler's."""

import math

import numpy as np
import pytest
import torch

from diffsr_core.family import ModelConfig
from diffsr_core.metrics import psnr
from diffsr_core.resize import upscale
from diffsr_core.schedule import sampling_grid
from diffsr_core.upscaler import to_pixels
from diffsr_core.validation import sample_batch, validate
from tests.core.tiny import DDPM, DIFFUSIONS, MODELS, SRDIFF, model_of, pair


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_the_scores_are_those_of_the_strips_and_the_strips_hold_the_methods_in_order(config: ModelConfig) -> None:
    hr, lr = pair(config, count=3)
    with_sample = config.denoiser is not None
    metrics, strips = validate(model_of(config), hr, lr, with_sample=with_sample)
    conditioned = config.encoder.condition_channels > 0
    names = [*["bicubic"] * conditioned, *["regression"] * config.encoder.regresses, *["sample"] * with_sample]
    assert list(metrics) == [f"val_psnr_{name}" for name in names if conditioned]
    height, width, channels = hr.shape[2], hr.shape[3], config.encoder.channels
    assert [strip.shape for strip in strips] == [(height, width * (len(names) + 1), channels)] * 3
    panels = [np.split(strip, len(names) + 1, axis=1) for strip in strips]
    for index, name in enumerate(names if conditioned else []):
        expected = np.mean([psnr(row[-1], row[index]) for row in panels])
        assert metrics[f"val_psnr_{name}"] == pytest.approx(expected, abs=1e-9)
    for k, row in enumerate(panels):
        assert np.array_equal(row[-1], to_pixels(hr[k : k + 1]))
        assert not conditioned or np.array_equal(row[0], to_pixels(upscale(lr[k : k + 1, :channels], config.scale)))
    with torch.no_grad():
        assert not config.encoder.regresses or np.array_equal(
            panels[0][1], to_pixels(model_of(config).eval().encoder(lr)[1][:1])
        )


def test_a_denoiser_that_knows_the_answer_scores_100_db() -> None:
    config = DIFFUSIONS["anchored"]
    hr, lr = pair(config)
    model = model_of(config).eval()
    with torch.no_grad():
        x_0 = model.target(hr, model.condition(lr))
    model.predict = lambda x_t, noise_level, features: x_0  # type: ignore[method-assign]
    assert validate(model, hr, lr, with_sample=True).metrics["val_psnr_sample"] == 100
    assert validate(model, hr, lr, with_sample=True).metrics["val_psnr_regression"] < 60


def test_a_sample_of_no_condition_is_shown_beside_the_hr_and_not_scored_against_it() -> None:
    hr, lr = pair(DDPM)
    model = model_of(DDPM)
    metrics, strips = validate(model, hr, lr, with_sample=True, num_steps=2, seed=3)
    samples = sample_batch(model.eval(), lr, num_steps=2, seed=3)
    assert metrics == {}
    for strip, sample, image in zip(strips, samples, hr, strict=True):
        assert np.array_equal(strip, np.concatenate([to_pixels(sample[None]), to_pixels(image[None])], axis=1))
    assert validate(model, hr, lr, with_sample=False).metrics == {}


def test_without_a_sample_the_denoiser_is_not_asked() -> None:
    model = model_of(SRDIFF)
    model.predict = None  # type: ignore[method-assign, assignment]
    assert "val_psnr_sample" not in validate(model, *pair(SRDIFF), with_sample=False).metrics


@pytest.mark.parametrize("config", DIFFUSIONS.values(), ids=DIFFUSIONS)
@torch.inference_mode()
def test_a_sample_is_ddim_from_seeded_noise(config: ModelConfig) -> None:
    _, lr = pair(config)
    model = model_of(config).eval()
    condition = model.condition(lr)
    shape = model.diffused_shape(lr.shape[2], lr.shape[3])
    x = torch.randn((len(lr), *shape), generator=torch.Generator().manual_seed(7))
    levels = sampling_grid(config.schedule, 3).tolist()
    for a, a_next in zip(levels[:-1], levels[1:], strict=True):
        b = math.sqrt(1 - a * a)
        out = model.predict(x, torch.full((len(lr),), a), condition.features)
        x_0 = {"eps": (x - b * out) / a, "x_0": out, "v": a * x - b * out}[config.prediction]
        x_0 = x_0.clamp(-1, 1) if config.residual_clip else x_0
        x = a_next * x_0 + math.sqrt(1 - a_next**2) * (x - a * x_0) / b
    found = sample_batch(model, lr, num_steps=3, seed=7)
    assert (found - model.restore(x, condition)).abs().max() < 1e-3
    assert not torch.equal(found, sample_batch(model, lr, num_steps=3, seed=8))
    assert torch.equal(found, sample_batch(model, lr, num_steps=3, seed=7))

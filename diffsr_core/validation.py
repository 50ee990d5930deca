"""A look at a model while it trains: errors that can be compared, scores of fixed pairs, and their pictures.

Noise is keyed by the seed and the pair's HR pixels: what is said of a pair does not depend on its place, on the other
pairs, or on the device.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean
from typing import NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from diffsr_core.family import Condition, SuperResolver, amplitudes, x0_and_eps
from diffsr_core.metrics import lr_psnr, psnr, ssim
from diffsr_core.noise import noise_key
from diffsr_core.pixels import Pixels, to_model_range, to_pixels
from diffsr_core.recipe import IN_ONE_STEP, StageName
from diffsr_core.resize import upscale
from diffsr_core.sampler import last, sample
from diffsr_core.sampling import ONE_STEP, SamplingRecipe
from diffsr_core.schedule import Schedule, Table

Perceptual = Callable[[Tensor, Tensor], Tensor]  # sr, hr (B, 3, H, W) in [-1, 1] -> distance (B,)

_SSIM_WINDOW_PX = 11


@dataclass(frozen=True, kw_only=True)
class ValidationRecipe:
    """How a sample is drawn, as in SamplingRecipe, and at how many noise levels the denoiser is asked.

    Raises ValueError for an unknown name or a number below 1.
    """

    sampler: str = "ddim"
    grid: str = "uniform"
    num_steps: int = 4
    seed: int = 0
    num_levels: int = 8

    def __post_init__(self) -> None:
        _ = self._sampling  # which checks its part
        if self.num_levels < 1:
            raise ValueError(f"num_levels ({self.num_levels}) must be at least 1; use 8")

    @property
    def _sampling(self) -> SamplingRecipe:
        return SamplingRecipe(sampler=self.sampler, grid=self.grid, num_steps=self.num_steps)

    def grid_of(self, schedule: Schedule, *, start: float = 0.0) -> Table:
        """Return the noise levels of a sample. Raises ValueError, as sampling_grid does."""
        return self._sampling.grid_of(schedule, start=start)


class Validation(NamedTuple):
    """metrics: means over the pairs, by name. strips: one picture a pair, uint8 (H, W times the methods, 1 or 3)."""

    metrics: dict[str, float]
    strips: list[Pixels]


@torch.inference_mode()
def validation_loss(
    model: SuperResolver, hr: Tensor, lr: Tensor, *, stage: str, recipe: ValidationRecipe, chunk: int = 8
) -> float:
    """Return the mean absolute error of what a stage trains, at fixed noise: hr (B, C, H, W), lr (B, C + E, h, w).

    diffusion, joint: of eps, at num_levels levels of the schedule, t = (i + 1/2) T / num_levels rounded down. It is one
    number for predictions of eps, x_0 and v, and so compares models of one schedule that diffuse the same x_0.
    regression: of the encoder's image. distillation, energy: of the image that one DDIM step gives.
    chunk: pairs that go through the networks at once. Raises ValueError for a stage that this model does not have, or
    no pairs.
    """
    _check(model, hr, lr, stage)
    with _evaluating(model):
        parts = _parts(model, hr, lr, chunk)
        return fmean(x for part in parts for x in _errors(model, part, stage=stage, recipe=recipe)["val_loss"].tolist())


@torch.inference_mode()
def validation_x0_error(
    model: SuperResolver, hr: Tensor, lr: Tensor, *, recipe: ValidationRecipe, chunk: int = 8
) -> float:
    """Return the mean absolute error of x_0 / residual_scale, in units of [-1, 1], at the levels of validation_loss.

    Where no residual was clipped it is that of the image, and so compares models of any anchor and scale. x_0 is
    clipped where the model's sampler clips it: with an eps prediction the noisiest levels would otherwise decide.
    Raises as validation_loss.
    """
    _check(model, hr, lr, "diffusion")
    with _evaluating(model):
        parts = _parts(model, hr, lr, chunk)
        return fmean(x for part in parts for x in _diffusion_errors(model, part, recipe)["val_x0_error"].tolist())


@torch.inference_mode()
def validate(
    model: SuperResolver,
    hr: Tensor,
    lr: Tensor,
    *,
    stage: str,
    recipe: ValidationRecipe,
    perceptual: Perceptual | None = None,
    chunk: int = 8,
) -> Validation:
    """Return val_loss, val_x0_error (stages diffusion and joint), and each method's scores on pairs in [-1, 1].

    Methods, in the order of the strips, HR last: `bicubic` where the model reads an LR, `regression` where it
    regresses, and `sample` but for stage regression, when it would be noise; in stages distillation and
    energy it is the one step.
    Scores are of the uint8 pixels that are shown, over all channels, borders included: val_psnr_<method> and
    val_lr_psnr_<method> in dB, val_ssim_<method>, val_lpips_<method> by `perceptual`, which gets the model's device.
    Left out: SSIM below its window of 11 px; LR-PSNR at scale 1 and beside an encoder whose kernel is not bicubic, as
    it measures by a bicubic downscale; LPIPS but for 3 channels; all of them for a model that reads no LR, whose
    samples resemble no HR. Strips show the first 3 channels, of fewer than 3 the first. Raises as validation_loss.
    """
    _check(model, hr, lr, stage)
    encoder = model.config.encoder
    found: dict[str, list[float]] = defaultdict(list)
    strips: list[Pixels] = []
    with _evaluating(model):
        for part in _parts(model, hr, lr, chunk):
            for name, errors in _errors(model, part, stage=stage, recipe=recipe).items():
                found[name] += errors.tolist()
            images = _images(model, part, stage=stage, recipe=recipe)
            pixels = {name: _pixels(batch) for name, batch in {**images, "hr": part.hr}.items()}
            strips += [np.concatenate(row, axis=1) for row in zip(*map(_shown, pixels.values()), strict=True)]
            for method in images if encoder.condition_channels else ():
                for name, scores in _scores(model, part, pixels[method], pixels["hr"], perceptual).items():
                    found[f"val_{name}_{method}"] += scores
    return Validation({name: fmean(values) for name, values in found.items()}, strips)


class _Part(NamedTuple):
    """Pairs that go through the networks at once, encoded; names key the noise of each."""

    hr: Tensor
    lr: Tensor
    image: Tensor
    condition: Condition
    names: list[bytes]


def _parts(model: SuperResolver, hr: Tensor, lr: Tensor, size: int) -> Iterator[_Part]:
    device = next(model.parameters()).device
    for hr_part, lr_part in zip(torch.split(hr, size), torch.split(lr, size), strict=True):
        names = [pixels.tobytes() for pixels in _pixels(hr_part)]
        inputs = lr_part.to(device)
        features, image = model.encoder(inputs)
        yield _Part(hr_part.to(device), inputs, image, model.condition_of(inputs, features, image), names)


def _images(model: SuperResolver, part: _Part, *, stage: str, recipe: ValidationRecipe) -> dict[str, Tensor]:
    """Return each method's images (B, C, H, W)."""
    encoder, images = model.config.encoder, {}
    if encoder.condition_channels:
        images["bicubic"] = upscale(part.lr[:, : encoder.channels], encoder.scale)
    if encoder.regresses:
        images["regression"] = part.image
    if stage != "regression":
        images["sample"] = (_in_one_step if stage in IN_ONE_STEP else _sample)(model, part, recipe)
    return images


def _scores(
    model: SuperResolver, part: _Part, sr: list[Pixels], hr: list[Pixels], perceptual: Perceptual | None
) -> dict[str, list[float]]:
    """Return the scores of one method's pixels by name, a number a pair."""
    encoder = model.config.encoder
    scores = {"psnr": [psnr(a, b) for a, b in zip(hr, sr, strict=True)]}
    if min(hr[0].shape[:2]) >= _SSIM_WINDOW_PX:
        scores["ssim"] = [ssim(a, b) for a, b in zip(hr, sr, strict=True)]
    if encoder.scale > 1 and getattr(encoder, "kernel", "bicubic") == "bicubic":
        lr = _pixels(part.lr[:, : encoder.channels])
        scores["lr_psnr"] = [lr_psnr(a, b, scale=encoder.scale) for a, b in zip(lr, sr, strict=True)]
    if perceptual is not None and encoder.channels == 3:
        a, b = (torch.cat([to_model_range(pixels) for pixels in batch]).to(part.hr.device) for batch in (sr, hr))
        scores["lpips"] = perceptual(a, b).tolist()
    return scores


def _errors(model: SuperResolver, part: _Part, *, stage: str, recipe: ValidationRecipe) -> dict[str, Tensor]:
    """Return the errors (B,) of a stage by name."""
    if stage == "regression":
        return {"val_loss": _distance(part.image, part.hr)}
    if stage in IN_ONE_STEP:
        return {"val_loss": _distance(_in_one_step(model, part, recipe), part.hr)}
    return _diffusion_errors(model, part, recipe)


def _diffusion_errors(model: SuperResolver, part: _Part, recipe: ValidationRecipe) -> dict[str, Tensor]:
    config, features = model.config, part.condition.features
    x_0 = model.target(part.hr, part.condition)
    of_eps, of_x0 = [], []
    for i in range(recipe.num_levels):
        t = (2 * i + 1) * config.schedule.num_timesteps // (2 * recipe.num_levels)
        noise_level = torch.full((len(x_0),), float(config.schedule.noise_levels[t]), device=x_0.device)
        a, b = amplitudes(noise_level, x_0.dtype)
        eps = _noise(part.names, i, x_0.shape[1:], seed=recipe.seed).to(x_0.device)
        x_t = a * x_0 + b * eps
        prediction = model.predict(x_t, noise_level, features)
        x_0_hat, eps_hat = x0_and_eps(prediction, x_t, noise_level, kind=config.prediction)
        of_eps.append(_distance(eps_hat, eps))
        of_x0.append(_distance(x_0_hat.clamp(-1, 1) if config.residual_clip else x_0_hat, x_0))
    return {
        "val_loss": torch.stack(of_eps).mean(dim=0),
        "val_x0_error": torch.stack(of_x0).mean(dim=0) / config.residual_scale,
    }


def _in_one_step(model: SuperResolver, part: _Part, recipe: ValidationRecipe) -> Tensor:
    """Return what a model of one step gives from where it starts; of the recipe it has the seed alone."""
    return _sample(model, part, replace(recipe, **ONE_STEP), start_level=model.config.start_level or 0.0)


def _sample(model: SuperResolver, part: _Part, recipe: ValidationRecipe, *, start_level: float = 0.0) -> Tensor:
    """Return one sample for each pair, untiled: (B, C, H, W)."""
    shape = torch.Size(model.diffused_shape(part.lr.shape[2], part.lr.shape[3]))
    states = sample(
        model.denoise(part.condition.features),
        recipe.grid_of(model.config.schedule, start=start_level),
        noise=lambda step: _noise(part.names, step, shape, seed=recipe.seed).to(part.lr.device),
        sampler=recipe.sampler,
        clip=model.config.residual_clip,
        start=model.target(part.image, part.condition) if start_level else None,
    )
    return model.restore(last(states), part.condition)


def _noise(names: list[bytes], index: int, shape: torch.Size, *, seed: int) -> Tensor:
    """Return normal noise (B, *shape) on the CPU, a function of the seed, each name and the index."""
    draws = []
    for name in names:
        low, high = noise_key(seed, name, index)
        draws.append(torch.randn(shape, generator=torch.Generator().manual_seed(high << 32 | low)))
    return torch.stack(draws)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean absolute difference (B,)."""
    return (a - b).abs().mean(dim=(1, 2, 3))


def _pixels(images: Tensor) -> list[Pixels]:
    return [to_pixels(image[None]) for image in images]


def _shown(batch: list[Pixels]) -> list[Pixels]:
    return [pixels[:, :, : 3 if pixels.shape[2] >= 3 else 1] for pixels in batch]


@contextmanager
def _evaluating(model: SuperResolver) -> Iterator[None]:
    """Hold every module in eval mode, then give each its own mode back: in training a frozen encoder has another."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


def _check(model: SuperResolver, hr: Tensor, lr: Tensor, stage: str) -> None:
    if stage not in get_args(StageName):
        raise ValueError(f"stage ({stage!r}) must be one of {', '.join(get_args(StageName))}; use one of them")
    if stage == "regression" and not model.config.encoder.regresses:
        raise ValueError("stage (regression) needs an encoder that regresses; use stage diffusion")
    if stage != "regression" and model.denoiser is None:
        raise ValueError(f"stage ({stage}) needs a denoiser, and this model has none; use stage regression")
    if not len(hr) == len(lr) > 0:
        raise ValueError(f"hr and lr hold {len(hr)} and {len(lr)} images: they must be pairs, at least one; give both")

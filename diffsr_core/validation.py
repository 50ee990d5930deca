"""A quick look at a model while it trains: PSNR of a few patches, and a picture."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffsr_core.family import SuperResolver, x0_and_eps
from diffsr_core.metrics import psnr
from diffsr_core.resize import upscale
from diffsr_core.sampler import last, sample
from diffsr_core.schedule import sampling_grid
from diffsr_core.upscaler import Pixels, to_pixels


class Validation(NamedTuple):
    """metrics: PSNR in dB (RGB, mean over the patches); strips: one (H, 4 W, 3) picture a patch."""

    metrics: dict[str, float]
    strips: list[Pixels]


@torch.inference_mode()
def validate(
    model: SuperResolver, hr: Tensor, lr: Tensor, *, with_sample: bool, num_steps: int = 4, seed: int = 0
) -> Validation:
    """Return the scores of bicubic, regression and a sample on pairs in [-1, 1]; strips in that order, HR last.

    with_sample: False while the denoiser has not been trained, when a sample would be noise.
    """
    model.eval()
    _, regression = model.encoder(lr)
    images = {"bicubic": upscale(lr, model.config.scale), "regression": regression}
    if with_sample:
        images["sample"] = sample_batch(model, lr, num_steps=num_steps, seed=seed)
    pixels = {name: [to_pixels(image[None]) for image in batch] for name, batch in {**images, "hr": hr}.items()}
    metrics = {
        f"val_psnr_{name}": float(np.mean([psnr(a, b) for a, b in zip(pixels["hr"], pixels[name], strict=True)]))
        for name in images
    }
    return Validation(metrics, [np.concatenate(row, axis=1) for row in zip(*pixels.values(), strict=True)])


def sample_batch(model: SuperResolver, lr: Tensor, *, num_steps: int, seed: int) -> Tensor:
    """Return one DDIM sample for each lr (B, 3, h, w), untiled: (B, 3, H, W)."""
    condition = model.condition(lr)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn((len(lr), *model.diffused_shape(lr.shape[2], lr.shape[3])), generator=generator).to(lr.device)

    def denoise(x_t: Tensor, noise_level: float) -> tuple[Tensor, Tensor]:
        level = torch.full((len(lr),), noise_level, device=lr.device)
        prediction = model.predict(x_t, level, condition.features)
        return x0_and_eps(prediction, x_t, level, kind=model.config.prediction)

    grid = sampling_grid(model.config.schedule, num_steps)
    states = sample(denoise, grid, noise=lambda step: start, clip=model.config.residual_clip)
    return model.restore(last(states), condition)

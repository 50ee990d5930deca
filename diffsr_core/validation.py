"""A quick look at a model while it trains: PSNR of a few patches, and a picture."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffsr_core.family import SuperResolver
from diffsr_core.metrics import psnr
from diffsr_core.resize import upscale
from diffsr_core.sampler import last, sample
from diffsr_core.schedule import sampling_grid
from diffsr_core.upscaler import Pixels, to_pixels


class Validation(NamedTuple):
    """metrics: PSNR in dB (RGB, mean over the patches); strips: one picture a patch, (H, W times the methods, C)."""

    metrics: dict[str, float]
    strips: list[Pixels]


@torch.inference_mode()
def validate(
    model: SuperResolver, hr: Tensor, lr: Tensor, *, with_sample: bool, num_steps: int = 4, seed: int = 0
) -> Validation:
    """Return the scores of bicubic, of the regression if there is one, and of a sample on pairs in [-1, 1].

    Strips are in that order, HR last.

    with_sample: False while the denoiser has not been trained, when a sample would be noise.
    """
    model.eval()
    encoder, images = model.config.encoder, {}
    if encoder.condition_channels:
        images["bicubic"] = upscale(lr[:, : encoder.channels], encoder.scale)
    if encoder.regresses:
        images["regression"] = model.encoder(lr)[1]
    if with_sample:
        images["sample"] = sample_batch(model, lr, num_steps=num_steps, seed=seed)
    pixels = {name: [to_pixels(image[None]) for image in batch] for name, batch in {**images, "hr": hr}.items()}
    metrics = {
        f"val_psnr_{name}": float(np.mean([psnr(a, b) for a, b in zip(pixels["hr"], pixels[name], strict=True)]))
        for name in images
        if encoder.condition_channels  # a sample of no condition resembles none of them
    }
    return Validation(metrics, [np.concatenate(row, axis=1) for row in zip(*pixels.values(), strict=True)])


def sample_batch(model: SuperResolver, lr: Tensor, *, num_steps: int, seed: int) -> Tensor:
    """Return one DDIM sample for each lr (B, C, h, w), untiled: (B, C, H, W)."""
    condition = model.condition(lr)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn((len(lr), *model.diffused_shape(lr.shape[2], lr.shape[3])), generator=generator).to(lr.device)
    grid = sampling_grid(model.config.schedule, num_steps)
    denoise = model.denoise(condition.features)
    states = sample(denoise, grid, noise=lambda step: start, clip=model.config.residual_clip)
    return model.restore(last(states), condition)

"""What chance adds to a sample: symmetry, crop, a worse condition, noise level and noise.

Each sample's draws are a pure function of (seed, step, index in the global batch): a resume needs no generator's state,
and any number of workers draws the same.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffsr_core.blur import gaussian_kernel
from diffsr_core.family import ModelConfig
from diffsr_core.recipe import StageRecipe, TrainingRecipe
from diffsr_core.schedule import sample_noise_levels


class Drawn(NamedTuple):
    """hr (b, C, H, W) and lr (b, C + E, h, w) in [-1, 1], noise_level (b,), eps in the shape of x_0.

    eps is (b, 0) in a stage that diffuses nothing, (b, 2, *shape of x_0) in an energy stage, which draws twice.
    """

    hr: Tensor
    lr: Tensor
    noise_level: Tensor
    eps: Tensor

    def to(self, device: torch.device) -> "Drawn":
        """Return the tensors on a device; for a copy to a GPU the host does not wait."""
        if device.type == "cpu":
            return self
        return Drawn(*(x.pin_memory().to(device, non_blocking=True) for x in self))


def draw(
    hr: Tensor, lr: Tensor, *, config: ModelConfig, recipe: TrainingRecipe, step: int, indices: Sequence[int]
) -> Drawn:
    """Return the samples as step `step` trains them. hr, lr: stored pairs; indices: theirs in the global batch."""
    generator, scale, own = torch.Generator(), config.scale, config.encoder.channels
    stage = recipe.stage_at(step)[0]
    samples = []
    for high, low, index in zip(hr, lr, indices, strict=True):
        generator.manual_seed(step_seed(recipe.seed, step, index))
        if recipe.crop_px is not None:
            assert recipe.crop_px % scale == 0 and recipe.crop_px <= high.shape[1], "checked before training"
            high, low = crop(high, low, side=recipe.crop_px // scale, scale=scale, generator=generator)
        high, low = augment(high, low, generator=generator, symmetries=recipe.augmentation)
        if recipe.condition_blur_px or recipe.condition_noise:
            worse = soil(low[:own], recipe.condition_blur_px, recipe.condition_noise, generator=generator)
            low = torch.cat([worse, low[own:]])
        level = sample_noise_levels(config.schedule, 1, generator=generator, continuous=config.told != "step")
        shape = noise_shape(config, stage, low.shape[1], low.shape[2])
        samples.append((high, low, level[0], torch.randn(shape, generator=generator)))
    return Drawn(*(torch.stack(column) for column in zip(*samples, strict=True)))


def noise_shape(config: ModelConfig, stage: StageRecipe, lr_height: int, lr_width: int) -> tuple[int, ...]:
    """Return the shape of one image's eps in a stage."""
    return (0,) if stage.name == "regression" else (*stage.noises, *config.diffused_shape(lr_height, lr_width))


def step_seed(seed: int, step: int, index: int) -> int:
    """Return a 63-bit seed that differs for each (seed, step, index)."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + index * 0x94D049BB133111EB) % 2**64
    mixed = (mixed ^ (mixed >> 31)) * 0xD6E8FEB86659FD93 % 2**64
    return (mixed ^ (mixed >> 32)) >> 1


def augment(
    hr: Tensor, lr: Tensor, *, generator: torch.Generator, symmetries: str = "dihedral"
) -> tuple[Tensor, Tensor]:
    """Return a pair (C, H, W), (C', h, w) under one symmetry drawn for both.

    symmetries: `none`, `flip` (left to right), or `dihedral` (all eight of the square; patches must then be square).
    """
    pick = int(torch.randint(8, (), generator=generator))
    if symmetries == "none":
        return hr, lr

    def turn(image: Tensor) -> Tensor:
        if symmetries == "dihedral":
            image = torch.rot90(image, pick % 4, dims=(1, 2))
        return image.flip(2) if pick >= 4 else image

    return turn(hr), turn(lr)


def crop(hr: Tensor, lr: Tensor, *, side: int, scale: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the same square of both, `side` LR pixels wide, at a place drawn evenly."""
    y, x = (int(torch.randint(size - side + 1, (), generator=generator)) for size in lr.shape[1:])
    low = lr[:, y : y + side, x : x + side]
    return hr[:, y * scale : (y + side) * scale, x * scale : (x + side) * scale], low


def soil(image: Tensor, blur_px: float, noise: float, *, generator: torch.Generator) -> Tensor:
    """Return image (C, h, w) in [-1, 1] under a blur, then noise, of strengths drawn from 0 to these."""
    sigma, deviation = torch.rand(2, generator=generator).tolist()
    if blur_px:
        image = gaussian_blur(image, sigma * blur_px)
    if noise:
        image = image + torch.randn(image.shape, generator=generator) * (deviation * noise / 127.5)
    return image


def gaussian_blur(image: Tensor, sigma_px: float) -> Tensor:
    """Return image (C, H, W) under a Gaussian of this standard deviation, the border repeated; 0 changes nothing."""
    kernel = torch.from_numpy(gaussian_kernel((sigma_px, sigma_px))).to(image)
    padded = nn.functional.pad(image[:, None], (len(kernel) // 2,) * 4, mode="replicate")
    return nn.functional.conv2d(padded, kernel[None, None])[:, 0]

"""What else an LR image may have been, images between images, and the content of one denoised into another.

The last two noise an HR image up to some level, change it there, and denoise under the condition of one LR image. The
level is a dial: near 1 the images stay what they are, near 0 only the LR is left of them. Source: Li et al. 2021, 4.4.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffsr_core.pixels import Pixels
from diffsr_core.upscaler import Canvas, Upscaler


def slerp(first: Tensor, second: Tensor, weight: float) -> Tensor:
    """Return the point at `weight` (0 to 1) of the great arc from first to second, two fields of noise (1, C, h, w).

    Not the straight line: halfway between two independent Gaussian fields that has 0.707 of their deviation, a level
    of noise that the network is not told of. Images do lie on lines: the arc between two noised images as wholes keeps
    the noise, and raises the contrast by up to 1.41 where the images agree. Source: Shoemake 1985.
    """
    a, b = first.double().flatten(), second.double().flatten()
    angle = torch.acos((a @ b / (a.norm() * b.norm())).clamp(-1, 1))
    if not float(torch.sin(angle)) > 1e-6:  # parallel, or one of them zero: the arc is the line
        return torch.lerp(first, second, weight)
    shares = torch.sin(torch.tensor([1 - weight, weight], dtype=torch.float64) * angle) / torch.sin(angle)
    return float(shares[0]) * first + float(shares[1]) * second


@torch.inference_mode()
def draw(upscaler: Upscaler, pixels: Pixels, *, count: int, digest: str) -> list[Pixels]:
    """Return samples 0 to count - 1 of one LR image, uint8 (h, w, C): what else it may have been. Encodes it once."""
    with upscaler.opened(pixels, digest=digest) as canvas:
        return [upscaler.drawn(canvas, index) for index in range(count)]


@torch.inference_mode()
def interpolate(
    upscaler: Upscaler,
    pixels: Pixels,
    first: Pixels,
    second: Pixels,
    *,
    weights: Sequence[float],
    level: float = 0.3,
    digest: str,
) -> list[Pixels]:
    """Return an image for each weight, from what resembles first (0) to what resembles second (1).

    pixels: the LR, uint8 (h, w, C), that conditions them all; first, second: uint8 (H, W, C), for instance two samples
    of it. level: noise level, 0 (all noise) to 1 (clean), at which they are mixed: the images along the line between
    them, their noise along the arc. Raises ValueError for a weight or level out of range.
    """
    _check("level", level, 0.0, 1.0)
    for weight in weights:
        _check("weight", weight, 0.0, 1.0)
    with upscaler.opened(pixels, digest=_own_noise(digest)) as canvas:
        x_0, other_x_0 = (upscaler.target(image, canvas) for image in (first, second))
        z, other_z = (canvas.noise_of(index)(0) for index in (0, 1))
        mixed = [(torch.lerp(x_0, other_x_0, weight), slerp(z, other_z, weight)) for weight in weights]
        return [_denoised(upscaler, canvas, image, noise, level) for image, noise in mixed]


@torch.inference_mode()
def fuse_content(
    upscaler: Upscaler,
    pixels: Pixels,
    source: Pixels,
    donor: Pixels,
    mask: npt.NDArray[np.bool_],
    *,
    level: float = 0.3,
    digest: str,
) -> Pixels:
    """Return source with the masked region of donor, made one picture by denoising under the LR of the source.

    pixels: the LR, uint8 (h, w, C); source, donor: uint8 (H, W, C); mask: (H, W), true where donor is taken. level:
    noise level at which the paste is denoised; lower joins better and keeps less of the donor. Raises ValueError for
    sizes that differ or a level out of range.
    """
    _check("level", level, 0.0, 1.0)
    if source.shape != donor.shape or mask.shape != source.shape[:2]:
        raise ValueError(
            f"source {source.shape}, donor {donor.shape} and mask {mask.shape} must be of one size; crop them alike"
        )
    pasted = np.where(mask[:, :, None], donor, source)
    with upscaler.opened(pixels, digest=_own_noise(digest)) as canvas:
        fused: Pixels = _denoised(upscaler, canvas, upscaler.target(pasted, canvas), canvas.noise_of(0)(0), level)
        return fused


def _own_noise(digest: str) -> str:
    """Return a digest whose noise is not that of the image's samples: noising needs what x_0 does not hold already."""
    return f"{digest} manipulated"


def _denoised(upscaler: Upscaler, canvas: Canvas, x_0: Tensor, noise: Tensor, level: float) -> Any:
    """Return the image that the recipe's sampler makes of x_0 under this noise, from the level on."""
    drawn = canvas.noise_of(0)
    made = upscaler.run(canvas, upscaler.grid_from(level), noise=lambda step: drawn(step) if step else noise, start=x_0)
    return upscaler.publishable(upscaler.model.restore(made, canvas.condition), canvas)


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low < value < high and not (name == "weight" and low <= value <= high):
        raise ValueError(f"{name} ({value}) must be between {low:g} and {high:g}; choose a value within")

"""Projection of a super-resolved image onto those that shrink to its LR (law 4)."""

import math
from typing import Literal

import torch
from torch import Tensor

from diffsr_core.resize import downscale, round_trip, upscale

Consistency = Literal["exact", "interval", "low-band", "off"]
CONSISTENCIES: tuple[str, ...] = ("exact", "interval", "low-band", "off")
MOMENTUM = 0.8  # of the shift from the second round on: a first step may be far, and none is repeated blindly
LOW_BAND = 2.0  # LR px: standard deviation of the Gaussian through which low-band sees the residual


def project(
    sr: Tensor, lr: Tensor, *, scale: int, iterations: int, mode: str = "exact", half_step: float = 1 / 255
) -> Tensor:
    """Return sr moved towards the images whose downscale is lr: (N, C, H, W) in [-1, 1], dtype of sr, differentiable.

    It is clip(sr + upscale(u)), u an image of LR size. Every two iterations are a round: x <- clip(sr + upscale(u)),
    u <- u + two steps of r(lr - downscale(x)), then momentum. The second step is made at LR size, where it is the same:
    both resizes are linear. Keeping u, not x, remembers what was clipped away: in dark areas six iterations come
    within 1.5 dB of six of x <- clip(x + upscale(r(lr - downscale(x)))), elsewhere as near, in 1/2 to 2/3 of the time.
    None return the clipped input. A pixel is moved by what lies less than 4 LR px away per iteration (low-band: 10): a
    window needs that margin. mode says what r leaves of the residual: `exact` all; `interval` what is beyond half_step,
    the quantisation of lr (1/255 for 8 bits), as an lr that was rounded is no reason to move; `low-band` what a
    Gaussian lets through: tone and colour follow the LR, its noise and its JPEG blocks do not; `off` nothing.
    sr: (N, C, H, W), lr: (N, C, H / scale, W / scale), both in [-1, 1].
    Raises ValueError for sizes that do not fit the scale, types that differ, another mode, or negative iterations.
    Source: Irani and Peleg, "Improving resolution by image registration", 1991 (iterative back-projection); momentum
    on the dual of a projection onto an intersection: Beck and Teboulle, "Fast gradient-based algorithms", 2009.
    """
    if iterations < 0:
        raise ValueError(f"iterations is {iterations}: it must be 0 or more; 0 switches the projection off")
    if mode not in CONSISTENCIES:
        raise ValueError(f"mode ({mode!r}) must be one of {', '.join(CONSISTENCIES)}; use one of them")
    if (*lr.shape[:-2], lr.shape[-2] * scale, lr.shape[-1] * scale) != tuple(sr.shape):
        raise ValueError(
            f"sr has shape {tuple(sr.shape)}: it must be {scale} times lr, whose shape is {tuple(lr.shape)}, with the "
            "same batch and channels; check the scale and the crop"
        )
    if sr.dtype != lr.dtype:
        raise ValueError(f"sr is {sr.dtype} and lr is {lr.dtype}: both must be of one type; convert lr to that of sr")
    image = origin = sr.clamp(-1.0, 1.0)
    shift = ahead = torch.zeros_like(lr)
    left = first = 0 if mode == "off" else iterations
    while left:
        steps, momentum = 2 - left % 2, 0.0 if left == first else MOMENTUM
        left -= steps
        before, shift = shift, ahead + _steps(lr - downscale(image, scale), scale, steps, mode, half_step)
        ahead = shift + momentum * (shift - before)
        image = (origin + upscale(ahead if left else shift, scale)).clamp_(-1.0, 1.0)
    return image


def _steps(residual: Tensor, scale: int, count: int, mode: str, half_step: float) -> Tensor:
    """Return the sum of so many steps from this residual, LR size, as if nothing were clipped between them."""
    total = step = _wanted(residual, mode, half_step)
    for _ in range(count - 1):
        residual = residual - round_trip(step, scale)
        step = _wanted(residual, mode, half_step)
        total = total + step
    return total


def _wanted(residual: Tensor, mode: str, half_step: float) -> Tensor:
    if mode == "interval":
        return residual - residual.clamp(-half_step, half_step)
    return _low_band(residual) if mode == "low-band" else residual


def _low_band(residual: Tensor) -> Tensor:
    """Return it (N, C, h, w) after the Gaussian, its border repeated: shifted sums, in the same order everywhere."""
    radius = math.ceil(3 * LOW_BAND)
    weights = [math.exp(-0.5 * (k / LOW_BAND) ** 2) for k in range(-radius, radius + 1)]
    for axis in (2, 3):
        padding = (0, 0, radius, radius) if axis == 2 else (radius, radius, 0, 0)
        padded = torch.nn.functional.pad(residual, padding, mode="replicate")
        shifted = [padded.narrow(axis, k, residual.shape[axis]) for k in range(2 * radius + 1)]
        total = shifted[0] * (weights[0] / sum(weights))
        for part, weight in zip(shifted[1:], weights[1:], strict=True):
            total = total + part * (weight / sum(weights))
        residual = total
    return residual

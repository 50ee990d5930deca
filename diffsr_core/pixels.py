"""Pixels and the model's range: uint8 or uint16 (H, W, C) here, float (1, C, H, W) in [-1, 1] there."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffsr_core.resize import upscale

Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]


def peak(dtype: npt.DTypeLike) -> int:
    """Return the level of white. Raises ValueError for samples that are neither uint8 nor uint16."""
    if np.dtype(dtype) not in (np.dtype(np.uint8), np.dtype(np.uint16)):
        raise ValueError(f"pixels ({np.dtype(dtype)}) must be uint8 or uint16; convert them")
    return int(np.iinfo(np.dtype(dtype)).max)


def to_model_range(pixels: Pixels) -> Tensor:
    """Return (1, C, H, W) float32 in [-1, 1] for uint8 or uint16 (H, W, C). Raises ValueError for another type."""
    half = peak(pixels.dtype) / 2
    samples = pixels.astype(np.int32) if pixels.dtype == np.uint16 else np.array(pixels)
    return torch.from_numpy(samples).permute(2, 0, 1)[None].float() / half - 1


def to_pixels(image: Tensor, dtype: npt.DTypeLike = np.uint8) -> Any:
    """Return (H, W, C) of uint8 or uint16 for (1, C, H, W) in [-1, 1]; rounds half to even, clips.

    Raises ValueError for another type.
    """
    white = peak(dtype)
    rounded = ((image[0] + 1) * (white / 2)).round().clamp(0, white)
    wide = torch.uint8 if white == 255 else torch.int32
    return rounded.to(wide).permute(1, 2, 0).cpu().numpy().astype(dtype, copy=False)


def bicubic(pixels: Pixels, scale: int) -> Any:
    """Return (H * scale, W * scale, C) in the type of the pixels: the flavour-C bicubic baseline."""
    return to_pixels(upscale(to_model_range(pixels).double(), scale), pixels.dtype)


def lanczos(pixels: Pixels, scale: int) -> Any:
    """Return (H * scale, W * scale, C) in the type of the pixels: the Lanczos baseline, of three lobes."""
    return to_pixels(upscale(to_model_range(pixels).double(), scale, kernel="lanczos3"), pixels.dtype)

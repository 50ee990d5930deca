"""Recipes that make the low-resolution image from the high-resolution one."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffsr_core.resize import Kernel, downscale_pixels

# The implemented recipes and the kernel with which each one shrinks.
DEGRADATIONS: Mapping[str, Kernel] = MappingProxyType({"bicubic": "bicubic", "bilinear": "bilinear"})


def crop_to_multiple(hr: NDArray[Any], scale: int) -> NDArray[Any]:
    """Return the view of HW or HWC pixels from the top left whose sides are multiples of scale (MATLAB's modcrop).

    Raises ValueError for a scale below 1 or an image smaller than one scale.
    """
    if scale < 1:
        raise ValueError(f"scale is {scale}: it must be a whole number of at least 1; 2, 3, 4 and 8 are usual")
    height, width = hr.shape[0] // scale * scale, hr.shape[1] // scale * scale
    if height == 0 or width == 0:
        raise ValueError(
            f"hr is {hr.shape[0]}x{hr.shape[1]} px: each side must be at least scale {scale}; leave this image out"
        )
    return hr[:height, :width]


def _to_integer(values: NDArray[np.float64], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return values rounded once, halves away from zero as MATLAB does (numpy rounds them to even), and clipped."""
    clipped = np.clip(values, 0.0, float(np.iinfo(dtype).max))
    whole = np.floor(clipped)
    # Not floor(x + 0.5): that sum rounds the largest number below one half up to 1.
    return (whole + (clipped - whole >= 0.5)).astype(dtype)


@dataclass(frozen=True)
class Degradation:
    """A named recipe with its scale. Raises ValueError for a name that is not in DEGRADATIONS or a scale below 2."""

    name: str
    scale: int

    def __post_init__(self) -> None:
        if self.name not in DEGRADATIONS:
            raise ValueError(
                f"degradation is {self.name!r}: it must be one of {', '.join(sorted(DEGRADATIONS))}; choose one of them"
            )
        if isinstance(self.scale, bool) or not isinstance(self.scale, int) or self.scale < 2:
            raise ValueError(
                f"scale is {self.scale!r}: it must be a whole number of at least 2; 2, 3, 4 and 8 are usual"
            )

    def to_json(self) -> str:
        """Return the canonical JSON text: sorted keys, no spaces, equal for equal recipes."""
        return json.dumps({"name": self.name, "scale": self.scale}, sort_keys=True, separators=(",", ":"))

    def apply(self, hr: NDArray[Any], *, seed: int) -> NDArray[Any]:
        """Return the LR pixels, HW or HWC in the type of hr, a function of (recipe, hr, seed) alone.

        hr: uint8 or uint16 pixels whose sides are multiples of the scale. Float64 throughout, one rounding at the end,
        halves away from zero. The two recipes of today draw nothing, so the seed does not change their result.
        Raises ValueError for another type or size. Source: MATLAB's imresize of a double image, then im2uint8.
        """
        if hr.dtype not in (np.uint8, np.uint16):
            raise ValueError(f"hr is {hr.dtype}: it must be uint8 or uint16; convert it with its own range in mind")
        return _to_integer(downscale_pixels(hr, self.scale, kernel=DEGRADATIONS[self.name]), hr.dtype)

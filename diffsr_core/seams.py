"""Seams: how much of the cutting into windows is left to see in a stitched SR."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffsr_core.metrics import psnr
from diffsr_core.tiling import Window

# Gradients on each side of a seam that it is compared with, in LR px.
_REACH = 4


class SeamDifference(NamedTuple):
    """Tiled against untiled, next to the seams: the largest difference in 0..255, and the PSNR in dB."""

    largest: float
    psnr: float


def seam_ratio(sr: NDArray[Any], plan: Sequence[Window], *, scale: int, max_value: float = 255.0) -> float:
    """Return how much steeper an HW or HWC image is across its seams than beside them: about 1 where none can be seen.

    The mean of |x[p] - x[p - 1]| over all seams p, rows and columns, and all channels, over its mean at p - 4 .. p + 4
    LR px. The neighbours lie whole LR px away, where an up-sampler's own period of `scale` px is in the same phase.
    Both means count as at least 1/3 of a level of 255, what rounding alone makes, so a flat image without seams has 1.
    An image cut nowhere has 1. plan: windows of tiling.windows, in LR px; the upscaler's is of its padded canvas, so an
    image that was cropped from that needs one of its own size.
    Raises ValueError for an image that the plan does not fit, or windows so narrow that every line is a seam.
    """
    seams: list[NDArray[np.float64]] = []
    beside: list[NDArray[np.float64]] = []
    for axis, cuts in enumerate(_cuts(sr, plan, scale)):
        along = np.moveaxis(sr, axis, 0)
        near = {cut + step for cut in cuts for step in range(-_REACH, _REACH + 1)}
        near = {line for line in near if 0 < line < len(along) // scale} - set(cuts)
        if cuts and not near:
            raise ValueError("plan cuts at every LR px, so there is nothing beside its seams; take wider cores")
        for lines, steps in ((cuts, seams), (sorted(near), beside)):
            for line in lines:
                before, after = along[line * scale - 1].astype(np.float64), along[line * scale].astype(np.float64)
                steps.append(np.abs(after - before).ravel())
    if not seams:
        return 1.0
    rounding = max_value / 255.0 / 3.0
    steep, usual = (max(float(np.concatenate(steps).mean()), rounding) for steps in (seams, beside))
    return steep / usual


def seam_difference(
    tiled: NDArray[Any], untiled: NDArray[Any], plan: Sequence[Window], *, scale: int, max_value: float = 255.0
) -> SeamDifference:
    """Return how far a tiled HW or HWC image lies from the same image made whole, over one LR px on each side.

    A plan without seams gives (0, 100). Raises ValueError for shapes that differ or that the plan does not fit.
    """
    if tiled.shape != untiled.shape:
        raise ValueError(f"shapes are {tiled.shape} and {untiled.shape}: both must be one; compare the same crop")
    near = np.zeros(tiled.shape[:2], dtype=bool)
    for axis, cuts in enumerate(_cuts(tiled, plan, scale)):
        for cut in cuts:
            np.moveaxis(near, axis, 0)[(cut - 1) * scale : (cut + 1) * scale] = True
    if not near.any():
        return SeamDifference(0.0, 100.0)
    first, second = (np.atleast_3d(x)[near] for x in (tiled, untiled))
    largest = np.max(np.abs(first.astype(np.float64) - second.astype(np.float64)))
    return SeamDifference(float(largest) * 255.0 / max_value, psnr(first, second, max_value=max_value))


def _cuts(sr: NDArray[Any], plan: Sequence[Window], scale: int) -> tuple[list[int], list[int]]:
    """Return the LR rows and columns at which a core begins, but for the first."""
    height, width = max(w.core_bottom for w in plan), max(w.core_right for w in plan)
    if sr.ndim not in (2, 3) or sr.shape[:2] != (height * scale, width * scale):
        raise ValueError(
            f"sr has shape {sr.shape}: the plan covers {height}x{width} LR px at scale {scale}; "
            f"pass an HW or HWC image of {height * scale}x{width * scale} px, or the plan of this image"
        )
    return sorted({w.core_top for w in plan} - {0}), sorted({w.core_left for w in plan} - {0})

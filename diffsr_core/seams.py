"""Seams: how much of the cutting into tiles is left to see in a stitched SR."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffsr_core.metrics import psnr
from diffsr_core.tiling import Tile, Window

# Gradients on each side of a seam that it is compared with, in LR px.
_REACH = 4


class SeamDifference(NamedTuple):
    """Tiled against untiled, next to the seams: the largest difference in 0..255, and the PSNR in dB."""

    largest: float
    psnr: float


def seam_ratio(sr: NDArray[Any], plan: Sequence[Tile], *, scale: int, max_value: float = 255.0) -> float:
    """Return how much steeper an HW or HWC image is across its seams than beside them: about 1 where none can be seen.

    The mean of |x[p] - x[p - 1]| over all seams p, rows and columns, and all channels, over its mean at p - 4 .. p + 4
    LR px. The neighbours lie whole LR px away, where an up-sampler's own period of `scale` px is in the same phase.
    Both means count as at least 1/3 of a level of 255, what rounding alone makes, so a flat image without seams has 1.
    An image cut nowhere has 1. plan: tiling.tiles, in LR px; the upscaler's is of its padded canvas, so an
    image that was cropped from that needs one of its own size.
    Raises ValueError for an image that the plan does not fit, or tiles so narrow that every line is a seam.
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
    tiled: NDArray[Any], untiled: NDArray[Any], plan: Sequence[Tile], *, scale: int, max_value: float = 255.0
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


def owners(plan: Sequence[Tile | Window]) -> NDArray[np.intp]:
    """Return which tile or window of a plan made each LR px, (height, width): its index.

    Raises ValueError for a plan that leaves a px to nobody.
    """
    owner = np.full((max(p.core_bottom for p in plan), max(p.core_right for p in plan)), -1, dtype=np.intp)
    for index, part in enumerate(plan):
        owner[part.core_top : part.core_bottom, part.core_left : part.core_right] = index
    if (owner < 0).any():
        raise ValueError(f"plan leaves {int((owner < 0).sum())} LR px to nobody: its cores must partition the image")
    return owner


@dataclass
class ResidualSeams:
    """How much steeper residuals are where the owner changes than beside it, pooled over images: 1 without a seam.

    A residual is R = A.SR - LR of an SR that was not projected, A the downscale of law 4 (metrics.downscaled_sr). The
    picture, whose own edges hide a step of some levels from `seam_ratio`, cancels in it. What is left follows its
    texture, of which photographs have more in the middle (1.08 times the steps of the rest, without a seam), so a cut
    is compared with what lies within 4 LR px. Where R is white with a deviation s, tiles that are off by offsets of a
    deviation d give a ratio of sqrt(1 + (d / s)^2): each difference of neighbours has the variance 2 s^2, to which a
    cut adds 2 d^2. Of n independent differences the ratio's relative deviation is 0.76 / sqrt(n), 0.5 % at 20,000; real
    ones are not independent: 12 photographs with 23,000 had a deviation of 9 %, and JPEG's own lines 8 px apart 1.07.
    So what tiling adds is the quotient of this ratio by that of the same images made whole, at the same cuts.
    num_seams, num_beside: differences seen; seams, beside: their absolute values summed, levels of 255.
    """

    num_seams: int = 0
    num_beside: int = 0
    seams: float = 0.0
    beside: float = 0.0

    def add(self, residual: NDArray[Any], owner: NDArray[Any], *, max_value: float = 255.0) -> None:
        """Count one image's residual, (h, w) or (h, w, C) in the levels of its LR; owner: (h, w), see `owners`.

        Raises ValueError for sizes that differ.
        """
        if residual.ndim not in (2, 3) or residual.shape[:2] != owner.shape:
            raise ValueError(
                f"residual has shape {residual.shape}: it must have the size of owner, {owner.shape}, in LR px; "
                "pass A.SR - LR, and the owners of an image of that size"
            )
        for axis in (0, 1):
            steps = np.abs(np.diff(np.moveaxis(residual.astype(np.float64), axis, 0), axis=0)) * (255.0 / max_value)
            cut = np.diff(np.moveaxis(owner, axis, 0), axis=0) != 0
            near = cut.copy()
            for reach in range(1, min(_REACH, len(cut) - 1) + 1):
                near[reach:] |= cut[:-reach]
                near[:-reach] |= cut[reach:]
            near &= ~cut
            self.num_seams += steps[cut].size
            self.num_beside += steps[near].size
            self.seams += float(steps[cut].sum())
            self.beside += float(steps[near].sum())

    @property
    def ratio(self) -> float:
        """The mean across the cuts over the mean beside them. 1 without a cut, and where there is no residual at all.

        Raises ValueError where there is nothing beside the cuts.
        """
        if not self.num_seams:
            return 1.0
        if not self.num_beside:
            raise ValueError("owner changes at every LR px, so there is nothing beside its seams; take wider cores")
        steep, usual = self.seams / self.num_seams, self.beside / self.num_beside
        if usual == 0.0:
            return math.inf if steep else 1.0
        return steep / usual


def _cuts(sr: NDArray[Any], plan: Sequence[Tile], scale: int) -> tuple[list[int], list[int]]:
    """Return the LR rows and columns at which a core begins, but for the first."""
    height, width = max(w.core_bottom for w in plan), max(w.core_right for w in plan)
    if sr.ndim not in (2, 3) or sr.shape[:2] != (height * scale, width * scale):
        raise ValueError(
            f"sr has shape {sr.shape}: the plan covers {height}x{width} LR px at scale {scale}; "
            f"pass an HW or HWC image of {height * scale}x{width * scale} px, or the plan of this image"
        )
    return sorted({w.core_top for w in plan} - {0}), sorted({w.core_left for w in plan} - {0})

"""What the stub network's result must be, computed without our code: bicubic moved onto the LR, in float64.

The stub interpolates and has no weights, so each published pixel is known: MATLAB's bicubic (Keys, a = -0.5, stretched
when it shrinks), then the projection, clipped and rounded. rasterio reads both files.
"""

import random
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import rasterio
from rasterio.errors import NotGeoreferencedWarning
from rasterio.windows import Window

CONTEXT_PX, SIDE_PX = 48, 96  # of the source, around what is compared and what is compared; a step reads 4 px
ITERATIONS = 6


class Compared(NamedTuple):
    """Windows compared, the largest difference in levels, and the share of samples that differ at all."""

    windows: int
    most_levels: int
    share: float


def matrix(before: int, after: int) -> np.ndarray:
    """Return (after, before) float64: MATLAB's imresize along one axis, the border mirrored with its edge."""
    scale = after / before
    stretch = min(1.0, scale)
    centres = (np.arange(after) + 0.5) / scale - 0.5
    found = np.zeros((after, before))
    reach = int(np.ceil(2 / stretch)) + 1
    for row, centre in enumerate(centres):
        at = np.arange(int(np.floor(centre)) - reach, int(np.floor(centre)) + reach + 1)
        d = np.abs((at - centre) * stretch)
        near, far = 1.5 * d**3 - 2.5 * d**2 + 1, -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
        weights = np.where(d <= 1, near, np.where(d < 2, far, 0))
        folded = at % (2 * before)
        np.add.at(found[row], np.where(folded < before, folded, 2 * before - 1 - folded), weights / weights.sum())
    return found


def expected(lr: np.ndarray, scale: int) -> np.ndarray:
    """Return uint8 (H * scale, W * scale, C) for an LR crop uint8 (H, W, C)."""
    height, width = lr.shape[:2]
    up_y, up_x = matrix(height, height * scale), matrix(width, width * scale)
    down_y, down_x = matrix(height * scale, height), matrix(width * scale, width)

    def resized(image: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        moved: np.ndarray = np.einsum("yi,ijc,xj->yxc", rows, image, columns, optimize=True)
        return moved

    wanted = lr.astype(np.float64)
    image = resized(wanted, up_y, up_x).clip(0, 255)
    for _ in range(ITERATIONS):
        image = (image + resized(wanted - resized(image, down_y, down_x), up_y, up_x)).clip(0, 255)
    rounded: np.ndarray = np.rint(image).astype(np.uint8)
    return rounded


def places(height: int, width: int, *, window: int, count: int, seed: int = 0) -> list[tuple[int, int]]:
    """Return (y, x) of what is compared: two corners, where windows of the job meet, and places by chance."""
    chance = random.Random(seed)
    found = [(0, 0), (height - SIDE_PX, width - SIDE_PX)]
    for _ in range(count):
        y, x = (chance.randrange(1, max(2, side // window)) * window for side in (height, width))
        found.append((y - SIDE_PX // 2, x - SIDE_PX // 2))
        found.append((chance.randrange(height - SIDE_PX), chance.randrange(width - SIDE_PX)))
    return found


def compare(source: Path, published: Path, *, scale: int, window: int, count: int = 8) -> Compared:
    """Return how far windows of the published file are from what is expected. Raises ValueError for another size."""
    most, differing, samples = 0, 0, 0
    warnings.simplefilter("ignore", NotGeoreferencedWarning)
    with rasterio.open(source) as before, rasterio.open(published) as after:
        if (after.height, after.width, after.count) != (before.height * scale, before.width * scale, before.count):
            raise ValueError(f"{published}: {after.height} x {after.width} x {after.count}")
        plan = places(before.height, before.width, window=window, count=count)
        for y, x in plan:
            top, left = max(0, y - CONTEXT_PX), max(0, x - CONTEXT_PX)
            bottom, right = min(before.height, y + SIDE_PX + CONTEXT_PX), min(before.width, x + SIDE_PX + CONTEXT_PX)
            lr = before.read(window=Window(left, top, right - left, bottom - top)).transpose(1, 2, 0)
            rows, columns = (slice((at - first) * scale, (at - first + SIDE_PX) * scale)
                             for at, first in ((y, top), (x, left)))  # fmt: skip
            wanted = expected(lr, scale)[rows, columns].astype(np.int16)
            area = Window(x * scale, y * scale, SIDE_PX * scale, SIDE_PX * scale)
            off = np.abs(after.read(window=area).transpose(1, 2, 0) - wanted)
            most, differing, samples = max(most, int(off.max())), differing + int((off > 0).sum()), samples + off.size
    return Compared(len(plan), most, differing / samples)

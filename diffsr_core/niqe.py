"""NIQE: how far an image's local statistics lie from those of pristine photographs, without a reference."""

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffsr_core.metrics import inside, rgb_to_y, window_mean
from diffsr_core.resize import downscale_pixels

_BLOCK_PX = 96
_ROUNDING = 1e-9


class Pristine(NamedTuple):
    """The statistics of pristine photographs: mean (36,), covariance (36, 36), and the window (7, 7) they are of."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]
    window: NDArray[np.float64]


def niqe(pixels: NDArray[Any], pristine: Pristine, *, max_value: float = 255.0, border: int = 0) -> float:
    """Return the NIQE of an HW or RGB HWC image in 0..max_value: 0 or more, 3..6 for good photographs, lower is better.

    Measured on Y (grey as it is) rounded to 0..255, in whole blocks of 96x96 px from the top left of what is inside the
    border, at full and half size (bicubic, flavour C). A flat block has no shape: as in MATLAB's code its alpha counts
    as 0.2 in the mean, the rest of it is left out. Raises ValueError for another number of channels, fewer than two
    blocks that are not flat, or a window that is no product of one window per axis.
    Source: Mittal, Soundararajan, Bovik, "Making a completely blind image quality analyzer", 2013, and its MATLAB code.
    """
    taps = pristine.window.sum(axis=0)
    if not np.allclose(np.outer(taps, taps), pristine.window, rtol=0, atol=1e-9):
        raise ValueError(
            "window is not the outer product of one window that sums to 1: it must be, as the released Gaussian of "
            "7x7 px is; check the parameter file"
        )
    kept = inside(pixels, border, max_value=max_value, smallest=_BLOCK_PX) * (255.0 / max_value)
    grey = kept.reshape(kept.shape[:2]) if kept.shape[2:] in ((), (1,)) else rgb_to_y(kept)
    luma = np.rint(grey)
    down, across = (side // _BLOCK_PX for side in luma.shape)
    luma = luma[: down * _BLOCK_PX, : across * _BLOCK_PX]

    scales = []
    if down * across >= 2:
        for image, size in ((luma, _BLOCK_PX), (downscale_pixels(luma, 2), _BLOCK_PX // 2)):
            blocks = _normalised(image, taps).reshape(down, size, across, size).swapaxes(1, 2)
            scales.append(_features(blocks.reshape(-1, size, size)))
    features = np.concatenate(scales, axis=1) if scales else np.empty((0, 1))
    whole = features[~np.isnan(features).any(axis=1)]
    if len(whole) < 2:
        raise ValueError(
            f"pixels has shape {pixels.shape}: inside the border of {border} px there must be at least two blocks of "
            f"{_BLOCK_PX}x{_BLOCK_PX} px that are not flat, found {len(whole)}; NIQE cannot score this image"
        )
    distance = pristine.mean.reshape(-1) - np.nanmean(features, axis=0)
    inverse = np.linalg.pinv((pristine.covariance + np.cov(whole, rowvar=False)) / 2)
    return float(np.sqrt(distance @ inverse @ distance))


def aggd(x: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return shape alpha, left scale and right scale, (B,) each, of the asymmetric generalised Gaussian fit to (B, N).

    A density of exp(-(-x / left)^alpha) below 0 and exp(-(x / right)^alpha) above; alpha is one of 0.2, 0.201 .. 10.
    A row without a negative or without a positive value has alpha 0.2, and NaN for the scale of each missing side.
    Source: Lasmar, Stitou, Berthoumieu, "Multiscale skewed heavy tailed model for texture analysis", 2009.
    """
    shapes, ratios, _, scale = _gamma_tables()
    square, negative, positive = x * x, x < 0, x > 0
    with np.errstate(divide="ignore", invalid="ignore"):
        left = np.sqrt((square * negative).sum(axis=1) / negative.sum(axis=1))
        right = np.sqrt((square * positive).sum(axis=1) / positive.sum(axis=1))
        skew = left / right
        ratio = np.abs(x).mean(axis=1) ** 2 / square.mean(axis=1)
        ratio *= (skew**3 + 1) * (skew + 1) / (skew**2 + 1) ** 2
    nearest = np.searchsorted((ratios[1:] + ratios[:-1]) / 2, ratio)
    nearest[np.isnan(ratio)] = 0
    return shapes[nearest], left * scale[nearest], right * scale[nearest]


@lru_cache(maxsize=1)
def _gamma_tables() -> tuple[NDArray[np.float64], ...]:
    """Return alpha and, with G its gamma function: G(2/a)^2 / (G(1/a) G(3/a)), G(2/a) / G(1/a), sqrt(G(1/a) / G(3/a)).

    The first of these rises with alpha, so it can be looked up.
    """
    alpha = np.arange(200, 10001) / 1000.0
    one, two, three = (np.array([math.gamma(k / a) for a in alpha]) for k in (1, 2, 3))
    return alpha, two * two / (one * three), two / one, np.sqrt(one / three)


def _normalised(image: NDArray[np.float64], taps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the image less its local mean, over its local deviation plus 1; the edge sample is repeated outside."""
    padded = np.pad(image, len(taps) // 2, mode="edge")
    mean = window_mean(padded, taps)
    deviation = np.sqrt(np.abs(window_mean(padded * padded, taps) - mean * mean))
    difference = image - mean
    # In flat areas this is 0 or what rounding left, whose sign the fit would count: up to 0.4 of a score on Set5, and
    # another score on another machine. The released code leaves it in.
    difference[np.abs(difference) < _ROUNDING] = 0.0
    normalised: NDArray[np.float64] = difference / (deviation + 1.0)
    return normalised


def _features(blocks: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (B, 18) of blocks (B, h, w): shape and scale of the values, then four of the products with a neighbour."""
    shapes, _, mean_factor, _ = _gamma_tables()
    rows = blocks.reshape(len(blocks), -1)
    alpha, left, right = aggd(rows)
    found = [alpha, (left + right) / 2]
    for shift in ((0, 1), (1, 0), (1, 1), (1, -1)):
        # The neighbour beyond the border is that of the block's other side, as in MATLAB's circshift.
        neighbours = np.roll(blocks, shift, axis=(1, 2)).reshape(rows.shape)
        alpha, left, right = aggd(rows * neighbours)
        mean = (right - left) * mean_factor[np.searchsorted(shapes, alpha)]
        found += [alpha, mean, left, right]
    return np.stack(found, axis=1)

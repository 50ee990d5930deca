"""Colour drift: how far the colours of a published SR have moved from those of its LR."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffsr_core.metrics import downscaled_sr

# Linear sRGB to CIE XYZ (IEC 61966-2-1), and the white of D65 for the 2 degree observer.
_XYZ = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
_WHITE = np.array([0.95047, 1.0, 1.08883])


def channel_bias(lr: NDArray[Any], sr: NDArray[Any], *, scale: int) -> NDArray[np.float64]:
    """Return by how much each channel of the SR is too bright: float64 (C,), mean of downscaled SR minus LR, 0..255.

    No border is left out; any number of channels. Raises ValueError as metrics.downscaled_sr does.
    """
    difference = downscaled_sr(lr, sr, scale=scale) - lr
    bias: NDArray[np.float64] = np.atleast_3d(difference).mean(axis=(0, 1)) * (255.0 / np.iinfo(lr.dtype).max)
    return bias


def lr_delta_e(lr: NDArray[Any], sr: NDArray[Any], *, scale: int) -> float:
    """Return the mean CIEDE2000 difference between the LR and the downscaled SR, both taken as sRGB; 1 is just seen.

    Grey counts as R = G = B; no border is left out. The rounding of the LR alone gives about 0.2.
    Raises ValueError for other than 1 or 3 channels, and as metrics.downscaled_sr does.
    """
    small = np.atleast_3d(downscaled_sr(lr, sr, scale=scale))
    if small.shape[2] not in (1, 3):
        raise ValueError(f"sr has {small.shape[2]} channels: it must have 1 or 3; measure bands with channel_bias")
    peak = float(np.iinfo(lr.dtype).max)
    first, second = (
        rgb_to_lab(np.broadcast_to(x, (*x.shape[:2], 3)) / peak) for x in (np.atleast_3d(lr), np.clip(small, 0.0, peak))
    )
    return float(np.mean(delta_e(first, second)))


def rgb_to_lab(rgb: NDArray[Any]) -> NDArray[np.float64]:
    """Return CIE L*a*b* (..., 3) of sRGB (..., 3) in 0..1, white D65, 2 degree observer; L is in 0..100.

    Source: IEC 61966-2-1 and CIE 15.
    """
    linear = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    ratio = linear @ _XYZ.T / _WHITE
    x, y, z = np.moveaxis(np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio * (29 / 6) ** 2 / 3 + 4 / 29), -1, 0)
    return np.stack([116.0 * y - 16.0, 500.0 * (x - y), 200.0 * (y - z)], axis=-1)


def delta_e(first: NDArray[Any], second: NDArray[Any]) -> NDArray[np.float64]:
    """Return the CIEDE2000 colour difference of two arrays of L*a*b* (..., 3), with kL = kC = kH = 1: (...).

    Source: Sharma, Wu, Dalal, "The CIEDE2000 color-difference formula", 2005, equations 2 to 22.
    """
    (light1, a1, b1), (light2, a2, b2) = np.moveaxis(first, -1, 0), np.moveaxis(second, -1, 0)
    mean_chroma7 = ((np.hypot(a1, b1) + np.hypot(a2, b2)) / 2) ** 7
    stretch = 1.5 - 0.5 * np.sqrt(mean_chroma7 / (mean_chroma7 + 25.0**7))
    chroma1, chroma2 = np.hypot(stretch * a1, b1), np.hypot(stretch * a2, b2)
    hue1, hue2 = np.arctan2(b1, stretch * a1) % (2 * np.pi), np.arctan2(b2, stretch * a2) % (2 * np.pi)

    # The shorter way round. A grey has no hue: what is taken for it falls out, its chroma is a factor of d_hue.
    turn = hue2 - hue1
    turn = np.where(np.abs(turn) > np.pi, turn - np.sign(turn) * 2 * np.pi, turn)
    hue = hue1 + turn / 2
    light, chroma = (light1 + light2) / 2, (chroma1 + chroma2) / 2

    weight = 1 - 0.17 * np.cos(hue - np.deg2rad(30)) + 0.24 * np.cos(2 * hue)
    weight += 0.32 * np.cos(3 * hue + np.deg2rad(6)) - 0.20 * np.cos(4 * hue - np.deg2rad(63))
    scale_light = 1 + 0.015 * (light - 50) ** 2 / np.sqrt(20 + (light - 50) ** 2)
    scale_chroma, scale_hue = 1 + 0.045 * chroma, 1 + 0.015 * chroma * weight
    blue = ((np.rad2deg(hue) % 360 - 275) / 25) ** 2
    rotation = -2 * np.sqrt(chroma**7 / (chroma**7 + 25.0**7)) * np.sin(np.deg2rad(60) * np.exp(-blue))

    d_light = (light2 - light1) / scale_light
    d_chroma = (chroma2 - chroma1) / scale_chroma
    d_hue = 2 * np.sqrt(chroma1 * chroma2) * np.sin(turn / 2) / scale_hue
    square = d_light**2 + d_chroma**2 + d_hue**2 + rotation * d_chroma * d_hue
    difference: NDArray[np.float64] = np.sqrt(np.maximum(square, 0.0))
    return difference

"""Pixel metrics of the super-resolution literature on numpy arrays, in float64."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffsr_core.resize import downscale_pixels

_WINDOW_PX = 11
_SIGMA_PX = 1.5


def rgb_to_y(pixels: NDArray[Any]) -> NDArray[np.float64]:
    """Return the BT.601 luma of HWC RGB in 0..255: float64 (H, W) in 16..235, not rounded.

    Rounding Y to uint8, as some published tables do, costs 0.09 dB at 38 dB; that is left to the caller.
    Raises ValueError for anything but three channels. Source: MATLAB's rgb2ycbcr.
    """
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"pixels has shape {pixels.shape}: it must be (H, W, 3) RGB; a grey image is its own Y")
    red, green, blue = (pixels[..., channel].astype(np.float64) for channel in range(3))
    luma: NDArray[np.float64] = 16.0 + (65.481 * red + 128.553 * green + 24.966 * blue) / 255.0
    return luma


def psnr(a: NDArray[Any], b: NDArray[Any], *, max_value: float = 255.0, border: int = 0, cap: float = 100.0) -> float:
    """Return the peak signal-to-noise ratio of HW or HWC images in dB, over all channels, at most cap.

    border: px left out at each side (the tables of the literature leave out `scale`).
    Raises ValueError for shapes that differ or a border that leaves nothing.
    """
    first, second = _inner(a, b, border, smallest=1)
    mse = float(np.mean(np.square(first - second)))
    if mse == 0.0:
        return cap
    return min(cap, float(10.0 * np.log10(max_value * max_value / mse)))


def ssim(a: NDArray[Any], b: NDArray[Any], *, border: int = 0) -> float:
    """Return the mean structural similarity of HW or HWC images in 0..255, the mean over channels, in -1..1.

    Gaussian window of 11 px and sigma 1.5, only where it lies inside the image, K1 = 0.01, K2 = 0.03.
    Raises ValueError for shapes that differ or fewer than 11 px inside the border.
    Source: Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment", 2004, and its ssim_index.m.
    """
    x, y = _inner(a, b, border, smallest=_WINDOW_PX)
    c1, c2 = (0.01 * 255.0) ** 2, (0.03 * 255.0) ** 2
    mean_x, mean_y = _window_mean(x), _window_mean(y)
    var_x = _window_mean(x * x) - mean_x * mean_x
    var_y = _window_mean(y * y) - mean_y * mean_y
    cov = _window_mean(x * y) - mean_x * mean_y
    above = (2.0 * mean_x * mean_y + c1) * (2.0 * cov + c2)
    below = (mean_x * mean_x + mean_y * mean_y + c1) * (var_x + var_y + c2)
    # Each channel has the same number of windows, so the mean over all is the mean of the channels' means.
    return float(np.mean(above / below))


def lr_psnr(lr: NDArray[Any], sr: NDArray[Any], *, scale: int) -> float:
    """Return how well the published SR keeps to its LR, in dB, at most 100 (law 4).

    It is the PSNR between the integer LR and the float64 bicubic downscale (flavour C, not rounded) of the decoded SR,
    over all channels; the peak is that of the integer type. lr: (h, w[, C]), sr: (h * scale, w * scale[, C]).
    Raises ValueError unless both are of one unsigned integer type and the sizes fit the scale.
    """
    if lr.dtype != sr.dtype or lr.dtype.kind != "u":
        raise ValueError(
            f"lr is {lr.dtype} and sr is {sr.dtype}: both must be of one unsigned integer type; "
            "measure the decoded file, not the network's float output"
        )
    if (lr.shape[0] * scale, lr.shape[1] * scale, *lr.shape[2:]) != sr.shape:
        raise ValueError(
            f"sr has shape {sr.shape}: it must be {scale} times lr, whose shape is {lr.shape}, with the same channels; "
            "check the scale and the crop"
        )
    return psnr(lr, downscale_pixels(sr, scale), max_value=float(np.iinfo(lr.dtype).max))


def _inner(
    a: NDArray[Any], b: NDArray[Any], border: int, *, smallest: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return both images in float64 without their border."""
    if a.shape != b.shape or a.ndim not in (2, 3):
        raise ValueError(f"shapes are {a.shape} and {b.shape}: both must be one HW or HWC shape; crop or convert first")
    if border < 0 or min(a.shape[:2]) - 2 * border < smallest:
        raise ValueError(
            f"border is {border} px: of {a.shape[0]}x{a.shape[1]} px it must leave at least {smallest} px each way; "
            "take a smaller border or a larger image"
        )
    inside = np.s_[border : a.shape[0] - border, border : a.shape[1] - border]
    return a[inside].astype(np.float64), b[inside].astype(np.float64)


def _window_mean(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the Gaussian-weighted mean of each window that lies inside the image, as two passes of 11 slices."""
    offset = np.arange(_WINDOW_PX) - _WINDOW_PX // 2
    window = np.exp(-np.square(offset) / (2.0 * _SIGMA_PX**2))
    window /= window.sum()
    height, width = x.shape[0] - _WINDOW_PX + 1, x.shape[1] - _WINDOW_PX + 1
    rows = np.zeros((height, *x.shape[1:]))
    for k, weight in enumerate(window):
        rows += weight * x[k : k + height]
    out = np.zeros((height, width, *x.shape[2:]))
    for k, weight in enumerate(window):
        out += weight * rows[:, k : k + width]
    return out

"""Metrics of the super-resolution literature on numpy arrays, in float64.

What all share: HW or HWC images, every channel counts alike, black is 0 and white is max_value (255 unless told).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffsr_core.resize import downscale_pixels

_WINDOW_PX = 11
_SIGMA_PX = 1.5
# Wang 2003, table in section 3.2, finest first. They sum to 1.0001 and are used as printed.
_SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
# Four halvings, odd sides rounded up, must leave one window.
_SMALLEST_MS_SSIM_PX = (_WINDOW_PX - 1) * 16 + 1


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
    Raises ValueError for shapes that differ, a border that leaves nothing, or integer pixels above max_value.
    """
    first, second = _pair(a, b, border, max_value, smallest=1)
    mse = float(np.mean(np.square(first - second)))
    if mse == 0.0:
        return cap
    return min(cap, float(10.0 * np.log10(max_value * max_value / mse)))


def ssim(a: NDArray[Any], b: NDArray[Any], *, max_value: float = 255.0, border: int = 0) -> float:
    """Return the mean structural similarity of HW or HWC images, the mean over channels, in -1..1.

    Gaussian window of 11 px and sigma 1.5, only where it lies inside the image, K1 = 0.01, K2 = 0.03.
    Raises ValueError as psnr does, and for fewer than 11 px inside the border.
    Source: Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment", 2004, and its ssim_index.m.
    """
    luminance, structure = _similarity(*_pair(a, b, border, max_value, smallest=_WINDOW_PX), max_value)
    # Each channel has the same number of windows, so the mean over all is the mean of the channels' means.
    return float(np.mean(luminance * structure))


def ms_ssim(a: NDArray[Any], b: NDArray[Any], *, max_value: float = 255.0, border: int = 0) -> float:
    """Return the multi-scale structural similarity of HW or HWC images, the mean over channels, in 0..1.

    Five scales, each half of the one before (mean of 2x2 px; an odd side repeats its last sample first). Luminance
    counts at the coarsest alone; a negative mean, which has no real power, counts as 0. Windows as in ssim.
    Raises ValueError as psnr does, and for fewer than 161 px inside the border.
    Source: Wang, Simoncelli, Bovik, "Multi-scale structural similarity", 2003, equation 7, and its msssim.m.
    """
    x, y = _pair(a, b, border, max_value, smallest=_SMALLEST_MS_SSIM_PX)
    product = 1.0
    for level, weight in enumerate(_SCALE_WEIGHTS):
        if level:
            x, y = _halved(x), _halved(y)
        luminance, structure = _similarity(x, y, max_value)
        term = structure if level < len(_SCALE_WEIGHTS) - 1 else luminance * structure
        product = product * np.maximum(term.mean(axis=(0, 1)), 0.0) ** weight
    return float(np.mean(product))


def lr_psnr(lr: NDArray[Any], sr: NDArray[Any], *, scale: int) -> float:
    """Return how well the published SR keeps to its LR, in dB, at most 100 (law 4).

    It is the PSNR between the integer LR and the float64 bicubic downscale (flavour C, not rounded) of the decoded SR,
    over all channels, no border left out; the peak is that of the integer type. lr: (h, w[, C]), sr: (h * scale,
    w * scale[, C]). Raises ValueError unless both are of one unsigned integer type and the sizes fit the scale.
    """
    return psnr(lr, downscaled_sr(lr, sr, scale=scale), max_value=float(np.iinfo(lr.dtype).max))


def consistency_mse(lr: NDArray[Any], sr: NDArray[Any], *, scale: int) -> float:
    """Return the mean squared error behind lr_psnr in the range 0..1, at least 1e-10; SR3's tables show it times 1e5.

    Raises ValueError as lr_psnr does. Source: Saharia et al., "Image super-resolution via iterative refinement", 2021.
    """
    return float(10.0 ** (-lr_psnr(lr, sr, scale=scale) / 10.0))


def downscaled_sr(lr: NDArray[Any], sr: NDArray[Any], *, scale: int) -> NDArray[np.float64]:
    """Return the float64 downscale of sr, in the shape and range of lr, neither rounded nor clipped.

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
    return downscale_pixels(sr, scale)


def diversity(samples: NDArray[Any], *, max_value: float = 255.0) -> float:
    """Return diversity sigma of K samples of one LR: the mean over pixels and channels of the deviation over K, 0..255.

    samples: (K, H, W[, C]). The deviation is that of the population (divisor K): quote K with it, K = 2 gives 0.71 of
    the limit and K = 10 0.95. Raises ValueError for fewer than two samples.
    Source: Lugmayr et al., "SRFlow", 2020; Li et al., "SRDiff", 2021.
    """
    if samples.ndim not in (3, 4) or samples.shape[0] < 2:
        raise ValueError(
            f"samples has shape {samples.shape}: it must be (K, H, W) or (K, H, W, C) with K of at least 2; "
            "stack several samples of one LR, made with different seeds"
        )
    return float(np.mean(np.std(samples, axis=0, dtype=np.float64))) * 255.0 / max_value


def radial_spectrum(image: NDArray[Any]) -> NDArray[np.float64]:
    """Return the power of an HW or HWC image by frequency: float64 (min(H, W) // 2,), the mean over channels.

    Entry k - 1 is the mean over the ring of frequencies nearest to k / min(H, W) cycles per px. The image is first cut
    out by a Hann window, as its borders do not fit together, and freed of its mean under it: a constant does not count.
    White noise of variance v has power v at every frequency. Raises ValueError for another shape or a side below 2 px.
    """
    if image.ndim not in (2, 3) or min(image.shape[:2]) < 2:
        raise ValueError(f"image has shape {image.shape}: it must be HW or HWC of at least 2 px each way")
    height, width = image.shape[:2]
    side = min(height, width)
    window = np.outer(*(np.square(np.sin(np.pi * (np.arange(n) + 0.5) / n)) for n in (height, width)))
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :])
    ring = np.rint(radius * side).astype(np.int64).ravel()
    planes = np.atleast_3d(image).astype(np.float64).transpose(2, 0, 1)
    power = np.zeros(ring.size)
    for plane in planes:
        centred = plane - (window * plane).sum() / window.sum()
        power += np.square(np.abs(np.fft.fft2(window * centred))).ravel()
    rings = np.bincount(ring, weights=power) / np.bincount(ring)
    spectrum: NDArray[np.float64] = rings[1 : side // 2 + 1] / (np.square(window).sum() * len(planes))
    return spectrum


def spectral_error(sr: NDArray[Any], hr: NDArray[Any], *, max_value: float = 255.0, border: int = 0) -> float:
    """Return how far the radial power spectra of two HW or HWC images lie apart, in dB: the mean of |difference|.

    Every frequency from 1 / min(H, W) to 0.5 cycles per px counts alike; radial_spectrum tells which are too weak.
    Power below that of rounding to 8 bits counts as that, or a clear sky would decide. Blind to where things are: use
    it beside psnr. Raises ValueError as psnr does, and for fewer than 2 px inside the border.
    """
    floor = (max_value / 255.0) ** 2 / 12.0
    first, second = (np.maximum(radial_spectrum(x), floor) for x in _pair(sr, hr, border, max_value, smallest=2))
    return float(np.mean(np.abs(10.0 * np.log10(first / second))))


def window_mean(x: NDArray[np.float64], window: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the weighted mean of each window that lies inside the image: (H - k + 1, W - k + 1[, C]).

    window: (k,), the weights along each axis, which sum to 1. Two passes of k slices.
    """
    size = len(window)
    height, width = x.shape[0] - size + 1, x.shape[1] - size + 1
    rows = np.zeros((height, *x.shape[1:]))
    for k, weight in enumerate(window):
        rows += weight * x[k : k + height]
    out = np.zeros((height, width, *x.shape[2:]))
    for k, weight in enumerate(window):
        out += weight * rows[:, k : k + width]
    return out


def inside(image: NDArray[Any], border: int, *, max_value: float, smallest: int) -> NDArray[np.float64]:
    """Return an HW or HWC image in float64 without its border.

    Raises ValueError for a border that leaves less than smallest px each way, or integer pixels above max_value.
    """
    height, width = image.shape[:2]
    if border < 0 or min(height, width) - 2 * border < smallest:
        raise ValueError(
            f"border is {border} px: of {height}x{width} px it must leave at least {smallest} px each way; "
            "take a smaller border or a larger image"
        )
    # Floats may overshoot; integers above the peak are of another range, and their score would mean nothing.
    if image.dtype.kind in "iu" and image.max() > max_value:
        raise ValueError(
            f"max_value is {max_value:g}: the {image.dtype} pixels reach {image.max()}; pass the peak of their range"
        )
    return image[border : height - border, border : width - border].astype(np.float64)


def _pair(
    a: NDArray[Any], b: NDArray[Any], border: int, max_value: float, *, smallest: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return both images in float64 without their border."""
    if a.shape != b.shape or a.ndim not in (2, 3):
        raise ValueError(f"shapes are {a.shape} and {b.shape}: both must be one HW or HWC shape; crop or convert first")
    first, second = (inside(x, border, max_value=max_value, smallest=smallest) for x in (a, b))
    return first, second


def _similarity(
    x: NDArray[np.float64], y: NDArray[np.float64], max_value: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the maps of SSIM's luminance term, and of its contrast and structure terms together."""
    offset = np.arange(_WINDOW_PX) - _WINDOW_PX // 2
    window = np.exp(-np.square(offset) / (2.0 * _SIGMA_PX**2))
    window /= window.sum()
    c1, c2 = (0.01 * max_value) ** 2, (0.03 * max_value) ** 2
    mean_x, mean_y = window_mean(x, window), window_mean(y, window)
    var_x = window_mean(x * x, window) - mean_x * mean_x
    var_y = window_mean(y * y, window) - mean_y * mean_y
    cov = window_mean(x * y, window) - mean_x * mean_y
    luminance = (2.0 * mean_x * mean_y + c1) / (mean_x * mean_x + mean_y * mean_y + c1)
    return luminance, (2.0 * cov + c2) / (var_x + var_y + c2)


def _halved(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the means of 2x2 px; an odd side repeats its last sample."""
    padding = [(0, x.shape[0] % 2), (0, x.shape[1] % 2)] + [(0, 0)] * (x.ndim - 2)
    even = np.pad(x, padding, mode="edge")
    mean: NDArray[np.float64] = (even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2]) / 4.0
    return mean

"""Are two images of an archive twins, the same scene at two resolutions, and do they lie on each other?

A pair whose LR is not made from its HR teaches a model whatever stands between the two: a shift becomes blur, another
scene becomes noise. Measured against each other are the gradients of the grey images, which know neither gain nor
offset and little of gamma. Whitening the spectrum, as phase correlation does, was measured and left: on photographs
shifted by up to 3 px the largest error was 0.003 px without it, 0.018 px with noise of 5 levels of 255, and over 1 px
with it.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffsr_core.resize import downscale_pixels
from pipelines.images import Refused

Transform = tuple[float, float, float, float, float, float]

# Windows are at most so large: enough for a hundredth of a px, and HR stays below 17 MP.
_WINDOW_PX, _HR_WINDOW_PX = 1024, 4096
# Of 150 to 250 pairs of unrelated photographs (BSDS500) the best similarity was 0.90 at 16 px, 0.76 at 24, 0.82 at 32,
# 0.62 at 64 and 0.39 at 128 (wallpapers: 0.53 at 256 for one near-abstract of 46, 0.22 at 512), and what passes must
# still not be shifted; the worst of true twins at 128 px 0.80 with noise of 10 levels, 0.87 with JPEG 30, 0.56 with a
# blur of 1.5 px, 0.48 with gamma 2.2, noise of 20 levels and JPEG 20 at once; a panchromatic band against the mean of
# four others 0.93, against each 0.65 to 0.87. An infrared band against a visible one can be below 0.1: no twin of it.
_LEAST_SIMILARITY, _FULL_TRUST_PX, _MOST_SIMILARITY = 0.4, 128, 0.8
_LEAST_PX = 16
_NEWTON_STEPS = 6
# Pixels of two grids that are told to be equal may differ in size by this share; what adds up is an offset.
_SIZE_TOLERANCE = 0.01


class Alignment(NamedTuple):
    """How LR lies on HR. dy, dx: LR px by which the content of LR lies below and right of that of HR.

    similarity: correlation of the gradients after the shift is taken out, 1 for equal, about 0 for unrelated images,
    NaN where both are flat and there is nothing to compare.
    """

    dy: float
    dx: float
    similarity: float


def twin_window(hr_size: tuple[int, int], lr_size: tuple[int, int], *, scale: int) -> tuple[int, int, int, int]:
    """Return the central window (y, x, h, w), in LR px, that check_twins compares; times the scale it is HR's.

    Sizes are (height, width) in px. At most 1024 px a side, and 4096 px in HR. Up to scale - 1 rows and columns of HR
    beyond the last LR pixel are left over.
    Raises Refused (scale_mismatch) where HR is not scale times LR; ValueError for a scale below 1.
    """
    if scale < 1:
        raise ValueError(f"scale is {scale}: it must be a whole number of at least 1; 2, 3, 4 and 8 are usual")
    for hr_side, lr_side in zip(hr_size, lr_size, strict=True):
        if lr_side < 1 or not 0 <= hr_side - scale * lr_side < scale:
            raise Refused(
                "twin",
                "scale_mismatch",
                f"HR of {hr_size[0]} x {hr_size[1]} px and LR of {lr_size[0]} x {lr_size[1]} px (rows x columns): HR "
                f"must be {scale} times LR, or up to {scale - 1} px more",
            )
    most = min(_WINDOW_PX, max(_LEAST_PX, _HR_WINDOW_PX // scale))
    height, width = min(lr_size[0], most), min(lr_size[1], most)
    return (lr_size[0] - height) // 2, (lr_size[1] - width) // 2, height, width


def check_twins(
    hr: NDArray[Any],
    lr: NDArray[Any],
    *,
    scale: int,
    max_shift: float = 0.5,
    hr_valid: NDArray[np.bool_] | None = None,
    lr_valid: NDArray[np.bool_] | None = None,
) -> Alignment:
    """Return how LR lies on HR, from the central window of both; images cut to twin_window already are used whole.

    hr (H, W, C) and lr (h, w, C): uint8, uint16 or float, of any value ranges; valid: HW masks. Samples that are not
    valid or not finite do not count. Equal numbers of channels, or 1 in one of them (panchromatic against
    multispectral); means over the channels are compared, HR after the flavour-C downscale. One shift for the whole:
    a rotation or a parallax shows as a lower similarity. max_shift: length in LR px.
    The similarity must be 0.4, and 0.4 * sqrt(128 / side), at most 0.8, where the geometric mean of the sides of the
    window is below 128 px: small unrelated images resemble each other by chance. Flat is an image whose standard
    deviation is at most half a level (float: 1e-6 of the largest absolute value). Two flat images pass with NaN, as do
    two of which nothing counts: no shift can harm them.
    Raises Refused, stage twin: scale_mismatch (as twin_window), channel_mismatch, unrelated (also where only one is
    flat, or LR is below 16 px), misaligned (shift above max_shift). Raises ValueError for a max_shift that is not 0 or
    more, or a scale below 1.
    """
    if not max_shift >= 0:
        raise ValueError(f"max_shift is {max_shift}: it must be 0 LR px or more; 0.5 is the default")
    y, x, height, width = twin_window((hr.shape[0], hr.shape[1]), (lr.shape[0], lr.shape[1]), scale=scale)
    if hr.shape[2] != lr.shape[2] and 1 not in (hr.shape[2], lr.shape[2]):
        message = f"{hr.shape[2]} channels in HR, {lr.shape[2]} in LR: they must be equal, or one must be 1"
        raise Refused("twin", "channel_mismatch", message)
    if min(height, width) < _LEAST_PX:
        message = f"LR of {height} x {width} px is too small to tell: at least {_LEAST_PX} px a side"
        raise Refused("twin", "unrelated", message)
    low = (slice(y, y + height), slice(x, x + width))
    high = (slice(y * scale, (y + height) * scale), slice(x * scale, (x + width) * scale))
    # A sample that does not count is NaN: it spreads over the kernel, and so marks all that it would touch.
    with np.errstate(invalid="ignore"):
        reduced = downscale_pixels(_with_gaps(hr[high], hr_valid, high), scale).mean(axis=2)
        grey = _with_gaps(lr[low], lr_valid, low).mean(axis=2, dtype=np.float64)
    counted = np.isfinite(reduced) & np.isfinite(grey)
    flat = _is_flat(reduced[counted], hr.dtype), _is_flat(grey[counted], lr.dtype)
    if all(flat):
        return Alignment(0.0, 0.0, math.nan)
    if any(flat):
        raise Refused("twin", "unrelated", f"{'HR' if flat[0] else 'LR'} is flat and the other is not")
    found = align(reduced, grey)
    trust = math.sqrt(_FULL_TRUST_PX / math.sqrt(height * width))
    least = min(_MOST_SIMILARITY, _LEAST_SIMILARITY * max(1.0, trust))
    if not found.similarity >= least:
        message = f"similarity {found.similarity:.2f}, at least {least:.2f} for {height} x {width} px of LR"
        raise Refused("twin", "unrelated", message)
    _check_shift(found.dy, found.dx, max_shift)
    return found


def check_transforms(
    hr_transform: Transform, lr_transform: Transform, *, scale: int, lr_size: tuple[int, int], max_shift: float = 0.5
) -> tuple[float, float]:
    """Return (dy, dx), in LR px, by which the grid of LR lies off that of HR where that is most: at a corner of LR.

    Transforms (a, b, c, d, e, f) of one and the same coordinate system: x = a column + b row + c, y = d column + e row
    + f. lr_size: (height, width) in px.
    Raises Refused, stage twin: scale_mismatch where a pixel of LR is not scale pixels of HR, in size and direction,
    within 1 %; misaligned where the offset is longer than max_shift.
    """
    a, b, c, d, e, f = lr_transform
    determinant = a * e - b * d
    if determinant == 0:
        raise Refused("twin", "scale_mismatch", f"LR's transform {lr_transform} has pixels of no area")

    def offset(row: float, column: float) -> tuple[float, float]:
        """At a place in LR px: where LR has the ground that HR has there, less that place."""
        a_hr, b_hr, c_hr, d_hr, e_hr, f_hr = hr_transform
        x = (a_hr * column + b_hr * row) * scale + c_hr - c
        y = (d_hr * column + e_hr * row) * scale + f_hr - f
        return (a * y - d * x) / determinant - row, (e * x - b * y) / determinant - column

    origin = offset(0, 0)
    for step in (offset(1, 0), offset(0, 1)):
        # Written so that a NaN is refused.
        if not math.dist(step, origin) <= _SIZE_TOLERANCE:
            sizes = [math.sqrt(abs(t[0] * t[4] - t[1] * t[3])) for t in (lr_transform, hr_transform)]
            message = f"pixels of {sizes[0]:.6g} in LR and {sizes[1]:.6g} in HR: not {scale} to 1 in each direction"
            raise Refused("twin", "scale_mismatch", message)
    corners = [offset(row, column) for row in (0, lr_size[0]) for column in (0, lr_size[1])]
    dy, dx = max(corners, key=lambda corner: math.hypot(*corner))
    _check_shift(dy, dx, max_shift)
    return dy, dx


def align(reference: NDArray[np.float64], moved: NDArray[np.float64]) -> Alignment:
    """Return by how much `moved` (H, W) lies below and right of `reference` (H, W), up to a quarter of the sides.

    The maximum of the correlation of the gradients under a Hann window, first in whole px, then on their common part by
    Newton's method on the trigonometric interpolation. Not finite samples do not count.
    """
    first, second = (_gradient(np.where(np.isfinite(x), x, np.nan)) for x in (reference, moved))
    counted = np.isfinite(first) & np.isfinite(second)
    first, second = np.where(counted, first, 0), np.where(counted, second, 0)
    height, width = first.shape
    correlation = np.fft.ifft2(_cross_spectrum(first, second)[0]).real
    rows, columns = (np.fft.fftfreq(side, 1 / side) for side in (height, width))
    correlation[np.abs(rows) > height // 4] = -np.inf
    correlation[:, np.abs(columns) > width // 4] = -np.inf
    peak_y, peak_x = np.unravel_index(np.argmax(correlation), correlation.shape)
    dy, dx = int(rows[peak_y]), int(columns[peak_x])
    spectrum, energy = _cross_spectrum(_overlap(first, -dy, -dx), _overlap(second, dy, dx))
    rest_y, rest_x, peak = _maximum(spectrum)
    return Alignment(dy + rest_y, dx + rest_x, peak / energy if energy > 0 else 0.0)


def _with_gaps(x: NDArray[Any], valid: NDArray[np.bool_] | None, window: tuple[slice, slice]) -> NDArray[Any]:
    if valid is None or valid[window].all():
        return x
    return np.where(valid[window][:, :, None], x, np.float32(np.nan))


def _is_flat(samples: NDArray[np.float64], dtype: np.dtype[Any]) -> bool:
    if samples.size == 0:
        return True
    return bool(samples.std() <= (0.5 if dtype.kind in "ui" else 1e-6 * np.abs(samples).max()))


def _check_shift(dy: float, dx: float, max_shift: float) -> None:
    shift = math.hypot(dy, dx)
    if not shift <= max_shift:
        down, right = (round(value, 2) + 0.0 for value in (dy, dx))  # + 0.0: no -0.00
        message = (
            f"LR lies {down:+.2f} px down and {right:+.2f} px right of HR: {shift:.2f} LR px, at most {max_shift:g}"
        )
        raise Refused("twin", "misaligned", message)


def _gradient(x: NDArray[np.float64]) -> NDArray[np.complex128]:
    """Return central differences, along x + i along y, of x smoothed by (1 2 1) / 4 each way: (H - 4, W - 4)."""
    for _ in range(2):
        # The smoothing passes noise and the aliasing of sharp sensors on less: the error was three times as large.
        x = ((x[:-2] + x[2:]) / 4 + x[1:-1] / 2).T
    return (x[1:-1, 2:] - x[1:-1, :-2]) + 1j * (x[2:, 1:-1] - x[:-2, 1:-1])


def _cross_spectrum(
    first: NDArray[np.complex128], second: NDArray[np.complex128]
) -> tuple[NDArray[np.complex128], float]:
    """Return the spectrum of the correlation under a Hann window, and the value at a peak of full agreement."""
    window = np.multiply.outer(*(np.sin(np.pi * (np.arange(side) + 0.5) / side) ** 2 for side in first.shape))
    a, b = first * window, second * window
    energy = math.sqrt(float(np.square(np.abs(a)).sum()) * float(np.square(np.abs(b)).sum()))
    return np.conj(np.fft.fft2(a)) * np.fft.fft2(b), energy


def _overlap(x: NDArray[Any], dy: int, dx: int) -> NDArray[Any]:
    """Return the part of x that starts dy and dx px in, or ends so far before its end where they are negative."""
    return x[max(0, dy) : x.shape[0] + min(0, dy), max(0, dx) : x.shape[1] + min(0, dx)]


def _maximum(spectrum: NDArray[np.complex128]) -> tuple[float, float, float]:
    """Return where within 1 px of 0 the correlation of this spectrum is largest, and how large."""
    fy, fx = (2 * np.pi * np.fft.fftfreq(side) for side in spectrum.shape)
    dy = dx = 0.0
    for _ in range(_NEWTON_STEPS):
        turned = spectrum * np.exp(1j * fy * dy)[:, None] * np.exp(1j * fx * dx)
        slope_y, slope_x = -float((turned.imag.sum(axis=1) * fy).sum()), -float((turned.imag.sum(axis=0) * fx).sum())
        yy, xx = -float((turned.real.sum(axis=1) * fy**2).sum()), -float((turned.real.sum(axis=0) * fx**2).sum())
        yx = -float(((turned.real * fx).sum(axis=1) * fy).sum())
        determinant = yy * xx - yx * yx
        if not (yy < 0 and determinant > 0):  # no summit: only edges of one direction, or no likeness at all
            break
        dy = min(1.0, max(-1.0, dy - (xx * slope_y - yx * slope_x) / determinant))
        dx = min(1.0, max(-1.0, dx - (yy * slope_x - yx * slope_y) / determinant))
    turned = spectrum * np.exp(1j * fy * dy)[:, None] * np.exp(1j * fx * dx)
    return dy, dx, float(turned.real.sum()) / spectrum.size

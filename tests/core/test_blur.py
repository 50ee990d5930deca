"""Laws of the blur kernels and of their convolution."""

import math

import numpy as np
import pytest
import scipy.ndimage
from hypothesis import given, settings
from hypothesis import strategies as st

from diffsr_core.blur import convolve, gaussian_kernel, sinc_kernel


@pytest.mark.parametrize("sigma", [0.3, 1.0, 1.6, 2.7])
def test_gaussian_blur_sums_to_one_and_is_that_of_scipy(sigma: float) -> None:
    kernel = gaussian_kernel((sigma, sigma))
    assert kernel.sum() == pytest.approx(1, abs=1e-14) and kernel.shape[0] % 2 == 1
    x = np.random.default_rng(0).random((21, 34, 2))
    expected = scipy.ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="reflect", truncate=4)
    assert np.abs(convolve(x, kernel) - expected).max() < 1e-12


@pytest.mark.parametrize(("first", "second", "angle"), [(3.0, 1.0, 0.0), (3.0, 1.0, 0.6), (1.2, 2.5, 2.0)])
def test_anisotropic_kernel_has_the_covariance_of_its_axes(first: float, second: float, angle: float) -> None:
    kernel = gaussian_kernel((first, second), angle=angle)
    y, x = np.mgrid[: kernel.shape[0], : kernel.shape[1]] - kernel.shape[0] // 2
    c, s = math.cos(angle), math.sin(angle)
    turn = np.array([[c, -s], [s, c]])
    found = [[(kernel * a * b).sum() for b in (x, y)] for a in (x, y)]
    assert np.allclose(found, turn @ np.diag([first**2, second**2]) @ turn.T, atol=0.02)


def test_no_blur_is_the_identity_and_one_axis_blurs_alone() -> None:
    assert gaussian_kernel((0.0, 0.0)).tolist() == [[1.0]]
    assert np.count_nonzero(gaussian_kernel((2.0, 0.0)).sum(axis=1)) == 1


@settings(max_examples=25, deadline=None)
@given(height=st.integers(1, 9), width=st.integers(1, 9), channels=st.integers(1, 16), radius=st.integers(0, 5))
def test_convolution_is_that_of_scipy_with_a_mirrored_border(height, width, channels, radius) -> None:
    draw = np.random.default_rng(1)
    x, kernel = draw.random((height, width, channels)), draw.random((2 * radius + 1, 2 * radius + 1))
    expected = scipy.ndimage.convolve(x, kernel[:, :, None], mode="reflect")
    assert np.abs(convolve(x, kernel) - expected).max() < 1e-11


@pytest.mark.parametrize("cutoff", [1.0, 1.5, 2.2])
def test_sinc_passes_below_its_cutoff_and_stops_above(cutoff: float) -> None:
    kernel = sinc_kernel(cutoff, radius=40)
    x = np.arange(-40, 41)
    gain = {share: float((kernel * np.cos(share * cutoff * x)).sum()) for share in (0, 0.6, 1.3)}
    assert gain[0] == pytest.approx(1, abs=1e-12)
    assert gain[0.6] == pytest.approx(1, abs=0.08) and gain[1.3] == pytest.approx(0, abs=0.08)

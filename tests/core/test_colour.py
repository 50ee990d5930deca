"""Laws of the colour metrics."""

import numpy as np
import pytest

from diffsr_core.colour import channel_bias, delta_e, lr_delta_e, rgb_to_lab
from diffsr_core.resize import downscale_pixels

# Sharma, Wu, Dalal 2005, table 1: pairs that tell a right implementation from a wrong one, and their difference.
SHARMA = [
    ((50.0, 2.6772, -79.7751), (50.0, 0.0, -82.7485), 2.0425),
    ((50.0, 3.1571, -77.2803), (50.0, 0.0, -82.7485), 2.8615),
    ((50.0, -1.3802, -84.2814), (50.0, 0.0, -82.7485), 1.0000),
    ((50.0, 0.0, 0.0), (50.0, -1.0, 2.0), 2.3669),
    ((50.0, 2.4900, -0.0010), (50.0, -2.4900, 0.0009), 7.1792),
    ((50.0, 2.4900, -0.0010), (50.0, -2.4900, 0.0010), 7.1792),
    ((50.0, 2.4900, -0.0010), (50.0, -2.4900, 0.0011), 7.2195),
    ((50.0, -0.0010, 2.4900), (50.0, 0.0011, -2.4900), 4.7461),
    ((50.0, 2.5, 0.0), (50.0, 0.0, -2.5), 4.3065),
    ((50.0, 2.5, 0.0), (73.0, 25.0, -18.0), 27.1492),
    ((50.0, 2.5, 0.0), (58.0, 24.0, 15.0), 19.4535),
    ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
    ((22.7233, 20.0904, -46.6940), (23.0331, 14.9730, -42.5619), 2.0373),
    ((2.0776, 0.0795, -1.1350), (0.9033, -0.0636, -0.5514), 0.9082),
]


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def halves(sr: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(downscale_pixels(sr, 2)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("first", "second", "expected"), SHARMA)
def test_ciede2000_has_its_published_values_both_ways(
    first: tuple[float, ...], second: tuple[float, ...], expected: float
) -> None:
    assert float(delta_e(np.array(first), np.array(second))) == pytest.approx(expected, abs=5e-5)
    assert float(delta_e(np.array(second), np.array(first))) == pytest.approx(expected, abs=5e-5)


def test_lab_of_white_black_and_grey_is_on_the_axis() -> None:
    lab = rgb_to_lab(np.array([[1.0, 1, 1], [0, 0, 0], [0.5, 0.5, 0.5]]))
    assert lab[:, 0] == pytest.approx([100, 0, 53.3890], abs=1e-3)
    assert np.abs(lab[:, 1:]).max() < 0.02  # the matrix of the standard is rounded to six digits


def test_lab_and_ciede2000_are_those_of_scikit_image() -> None:
    color = pytest.importorskip("skimage.color")
    a, b = (pixels(60, 70, 3, seed=seed) / 255 for seed in (1, 2))
    b[:20] = np.clip(a[:20] + 0.01, 0, 1)  # near colours, and greys, whose hue is not defined
    a[20:25] = a[20:25, :, :1]
    # scikit-image rounds two constants of CIE 15: 0.008856 for (6 / 29)^3 and 7.787 for (29 / 6)^2 / 3.
    assert rgb_to_lab(a) == pytest.approx(color.rgb2lab(a), abs=2e-4)
    ours = delta_e(rgb_to_lab(a), rgb_to_lab(b))
    assert ours == pytest.approx(color.deltaE_ciede2000(rgb_to_lab(a), rgb_to_lab(b)), abs=1e-9)
    assert delta_e(rgb_to_lab(a), rgb_to_lab(a)).max() == 0.0


def test_bias_is_by_how_much_each_channel_is_too_bright() -> None:
    lr = np.full((6, 8, 3), 100, dtype=np.uint8)
    sr = np.full((24, 32, 3), 100, dtype=np.uint8) + np.array([5, 0, -20]).astype(np.uint8)
    assert channel_bias(lr, sr, scale=4) == pytest.approx([5, 0, -20], abs=1e-9)
    assert channel_bias(lr.astype(np.uint16) * 257, sr.astype(np.uint16) * 257, scale=4) == pytest.approx([5, 0, -20])
    assert channel_bias(lr[..., 0], sr[..., 2], scale=4) == pytest.approx([-20], abs=1e-9)
    bands = pixels(8, 8, 7)
    assert channel_bias(bands, np.repeat(np.repeat(bands, 2, 0), 2, 1), scale=2).shape == (7,)


def test_bias_does_not_see_noise_without_a_mean() -> None:
    sr = pixels(40, 40, 3)
    assert np.abs(channel_bias(halves(sr), sr, scale=2)).max() < 0.1


def test_drift_is_the_difference_of_the_two_colours() -> None:
    color = pytest.importorskip("skimage.color")
    one, other = np.array([120, 90, 60], dtype=np.uint8), np.array([128, 90, 55], dtype=np.uint8)
    expected = float(color.deltaE_ciede2000(color.rgb2lab(one / 255), color.rgb2lab(other / 255)))
    lr, sr = np.full((5, 4, 3), one), np.full((10, 8, 3), other)
    assert 1 < expected < 10
    assert lr_delta_e(lr, sr, scale=2) == pytest.approx(expected, abs=1e-6)
    deep = lr_delta_e(lr.astype(np.uint16) * 257, sr.astype(np.uint16) * 257, scale=2)
    assert deep == pytest.approx(expected, abs=1e-6)


def test_drift_of_an_image_from_its_own_downscale_is_that_of_rounding() -> None:
    sr = np.asarray(pytest.importorskip("skimage.data").astronaut())[:128, :128]
    assert 0 < lr_delta_e(halves(sr), sr, scale=2) < 0.3
    cast = np.clip(sr.astype(np.int64) + [12, 0, -12], 0, 255).astype(np.uint8)
    assert lr_delta_e(halves(sr), cast, scale=2) > 2
    # The downscale overshoots at 0 and 255: that is clipped, not turned into a colour that is none.
    edge = np.zeros((16, 16, 3), dtype=np.uint8)
    edge[:, 8:] = 255
    assert downscale_pixels(edge, 2).max() > 257
    assert lr_delta_e(halves(edge), edge, scale=2) < 0.01


def test_grey_counts_as_three_equal_channels() -> None:
    lr, sr = pixels(6, 6), pixels(12, 12, seed=1)
    expected = lr_delta_e(np.dstack([lr] * 3), np.dstack([sr] * 3), scale=2)
    assert lr_delta_e(lr, sr, scale=2) == lr_delta_e(lr[..., None], sr[..., None], scale=2) == expected > 0


def test_mistakes_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="sr has 4 channels"):
        lr_delta_e(pixels(4, 4, 4), pixels(8, 8, 4), scale=2)
    with pytest.raises(ValueError, match="it must be 2 times lr"):
        channel_bias(pixels(4, 4, 3), pixels(8, 9, 3), scale=2)
    with pytest.raises(ValueError, match="lr is uint8 and sr is float64"):
        lr_delta_e(pixels(4, 4), pixels(8, 8) / 255, scale=2)

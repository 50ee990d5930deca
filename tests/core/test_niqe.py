"""Laws of NIQE."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffsr_core.niqe import Pristine, aggd, niqe

DATA = Path(__file__).parents[2] / "../shared/data"
needs_parameters = pytest.mark.skipif(
    not (DATA / "niqe/niqe_pris_params.npz").is_file(), reason="no parameters of NIQE in ../shared/data"
)


@pytest.fixture(scope="module")
def pristine() -> Pristine:
    with np.load(DATA / "niqe/niqe_pris_params.npz", allow_pickle=False) as file:
        return Pristine(file["mu_pris_param"][0], file["cov_pris_param"], file["gaussian_window"])


def stand_in(window: np.ndarray | None = None) -> Pristine:
    taps = np.exp(-np.square(np.arange(-3, 4)) / (2 * (7 / 6) ** 2))
    taps /= taps.sum()
    return Pristine(np.zeros(36), np.eye(36), np.outer(taps, taps) if window is None else window)


def image(name: str) -> np.ndarray:
    return np.asarray(Image.open(DATA / name).convert("RGB"))


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize(
    ("alpha", "left", "right"), [(2.0, 3.0, 3.0), (1.0, 0.5, 0.5), (2.0, 1.0, 2.0), (0.7, 4.0, 1.0)]
)
def test_the_fit_finds_the_distribution_that_was_drawn_from(alpha: float, left: float, right: float) -> None:
    # |x / scale|^alpha is Gamma(1 / alpha) on each side; a side weighs what its scale is. 2 is Gauss, 1 is Laplace.
    rng = np.random.default_rng(1)
    size = rng.gamma(1 / alpha, 1.0, 400_000) ** (1 / alpha)
    sides = np.where(rng.random(size.size) < left / (left + right), -left, right)
    found = aggd((size * sides)[None])
    assert [float(value[0]) for value in found] == pytest.approx([alpha, left, right], rel=0.015)


def test_the_fit_is_the_nearest_of_the_table() -> None:
    special = pytest.importorskip("scipy.special")
    x = np.random.default_rng(2).standard_t(4, (20, 500)) + 0.3
    alpha, left, right = aggd(x)
    table = np.arange(0.2, 10.001, 0.001)
    ratios = special.gamma(2 / table) ** 2 / (special.gamma(1 / table) * special.gamma(3 / table))
    for row, a, low, high in zip(x, alpha, left, right, strict=True):
        std_low, std_high = (np.sqrt(np.mean(side**2)) for side in (row[row < 0], row[row > 0]))
        g = std_low / std_high
        ratio = np.mean(np.abs(row)) ** 2 / np.mean(row**2) * (g**3 + 1) * (g + 1) / (g**2 + 1) ** 2
        expected = table[np.argmin(np.abs(ratios - ratio))]
        factor = np.sqrt(special.gamma(1 / expected) / special.gamma(3 / expected))
        assert (a, low, high) == pytest.approx((expected, std_low * factor, std_high * factor), rel=1e-9)


def test_a_row_of_one_sign_has_no_shape_and_no_scale_on_the_other_side() -> None:
    alpha, left, right = aggd(np.array([[0.0, 0, 0], [1, 2, 3], [-1, -2, -3]]))
    assert alpha.tolist() == [0.2] * 3
    assert np.isnan(left).tolist() == [True, True, False]
    assert np.isnan(right).tolist() == [True, False, True]


@needs_parameters
def test_the_score_of_the_baboon_is_that_of_matlab(pristine: Pristine) -> None:
    # MATLAB R2021a with the release of the authors: 5.72957338, as documented in BasicSR's niqe.py for this very file.
    assert niqe(image("matlab/C_baboon_x4/gt_baboon.png"), pristine) == pytest.approx(5.72957338, abs=2e-6)


@needs_parameters
def test_photographs_score_well_and_blur_and_noise_spoil_them(pristine: Pristine) -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    clean = []
    for k in range(1, 9):
        photo = image(f"test/bsd100/img_{k:03}.png")
        clean.append(niqe(photo, pristine))
        blurred = np.rint(ndimage.gaussian_filter(photo.astype(np.float64), (2.0, 2.0, 0))).astype(np.uint8)
        rough = np.clip(photo + np.random.default_rng(k).normal(0, 25, photo.shape), 0, 255).astype(np.uint8)
        assert niqe(blurred, pristine) > clean[-1] + 0.5
        assert niqe(rough, pristine) > clean[-1] + 0.5
    assert min(clean) > 2 and max(clean) < 5


@needs_parameters
def test_the_score_does_not_depend_on_the_range_and_border_is_a_crop(pristine: Pristine) -> None:
    photo = image("test/bsd100/img_001.png")
    score = niqe(photo, pristine)
    assert niqe(photo.astype(np.uint16) * 257, pristine, max_value=65535) == pytest.approx(score, abs=1e-9)
    assert niqe(photo / 255, pristine, max_value=1) == pytest.approx(score, abs=1e-9)
    assert niqe(photo, pristine, border=10) == niqe(photo[10:-10, 10:-10], pristine)
    assert niqe(photo[:, :, :1], pristine) == niqe(photo[:, :, 0], pristine) != score
    height, width = (side // 96 * 96 for side in photo.shape[:2])
    assert niqe(photo[:height, :width], pristine) == score


def half_flat() -> np.ndarray:
    """Noise in the first of three blocks and most of the second; the rest, the window's reach included, is flat."""
    pixels = noise(96, 288) // 2
    pixels[:, 180:] = 90
    return pixels


def test_a_flat_block_is_left_out_but_for_its_alpha() -> None:
    # Golden: BasicSR's formulas with scipy's gamma and convolve, on this image and this stand-in.
    assert niqe(half_flat(), stand_in()) == pytest.approx(4.682199797050651, abs=1e-9)


def test_flat_areas_do_not_let_rounding_decide() -> None:
    pixels = np.tile(half_flat(), (2, 1)).astype(np.float64)
    pixels[40:150, 20:100] = 33
    score = niqe(pixels, stand_in())
    for level in (1, 7, 64, 101):
        assert niqe(pixels + level, stand_in()) == pytest.approx(score, abs=1e-9)


def test_mistakes_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="at least two blocks.*found 0"):
        niqe(noise(96, 191), stand_in())
    with pytest.raises(ValueError, match="at least two blocks.*found 0"):
        niqe(np.full((300, 300), 7, dtype=np.uint8), stand_in())
    with pytest.raises(ValueError, match="border is -1 px"):
        niqe(noise(200, 200), stand_in(), border=-1)
    with pytest.raises(ValueError, match="at least 96 px"):
        niqe(noise(95, 500), stand_in())
    with pytest.raises(ValueError, match="max_value is 1: the uint8 pixels"):
        niqe(noise(200, 200), stand_in(), max_value=1)
    with pytest.raises(ValueError, match="must be .H, W, 3. RGB"):
        niqe(noise(200, 200, 4), stand_in())
    with pytest.raises(ValueError, match="window is not the outer product"):
        niqe(noise(200, 200), stand_in(np.eye(7) / 7))

"""Laws of the seam measures."""

import numpy as np
import pytest

from diffsr_core.seams import seam_difference, seam_ratio
from diffsr_core.tiling import Window, windows

TILE, HALO, SCALE = 24, 4, 4
PLAN = windows(40, 56, tile=TILE, halo=HALO)  # cores meet at row 20 and at columns 20 and 36
ROWS, COLUMNS = 40 * SCALE, 56 * SCALE


def ramp(slope: float) -> np.ndarray:
    """An image that rises by slope per px, along both axes."""
    return slope * (np.arange(ROWS)[:, None] + np.arange(COLUMNS)[None, :])


def offset(height: float) -> np.ndarray:
    """A canvas whose windows alternate between 0 and height: each seam is a step of that height."""
    out = np.zeros((ROWS, COLUMNS))
    tops, lefts = sorted({w.core_top for w in PLAN}), sorted({w.core_left for w in PLAN})
    for w in PLAN:
        odd = (tops.index(w.core_top) + lefts.index(w.core_left)) % 2
        out[w.core_top * SCALE : w.core_bottom * SCALE, w.core_left * SCALE : w.core_right * SCALE] = height * odd
    return out


def texture(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(128, 20, shape)


def test_the_plan_of_these_tests_has_the_seams_that_they_assume() -> None:
    assert sorted({w.core_top for w in PLAN}) == [0, 20]
    assert sorted({w.core_left for w in PLAN}) == [0, 20, 36]


@pytest.mark.parametrize("slope", [1.0, 2.5, -1.5])
def test_a_ramp_without_seams_has_ratio_one(slope: float) -> None:
    assert seam_ratio(ramp(slope), PLAN, scale=SCALE) == pytest.approx(1.0, abs=1e-12)


def test_the_step_of_an_offset_window_adds_to_the_gradient() -> None:
    # On a ramp of 2 per px the steps of the checkerboard give |2 + 6| or |2 - 6|: along the one row + - + over 20, 16
    # and 20 LR px, along the two columns + - and - + over 20 and 20.
    image = ramp(2.0) + offset(6.0)
    up, down = 2.0 + 6.0, 6.0 - 2.0
    along_row = SCALE * (20 * up + 16 * down + 20 * up)
    along_columns = SCALE * (20 * up + 20 * down) + SCALE * (20 * down + 20 * up)
    length = COLUMNS + 2 * ROWS
    assert seam_ratio(image, PLAN, scale=SCALE) == pytest.approx((along_row + along_columns) / length / 2.0, abs=1e-9)


def test_on_a_flat_image_a_step_counts_against_rounding() -> None:
    flat = np.full((ROWS, COLUMNS, 3), 90, dtype=np.uint8)
    assert seam_ratio(flat, PLAN, scale=SCALE) == 1.0
    stepped = flat + offset(1.0).astype(np.uint8)[..., None]
    assert seam_ratio(stepped, PLAN, scale=SCALE) == pytest.approx(3.0, abs=1e-12)
    deep = stepped.astype(np.uint16) * 257
    assert seam_ratio(deep, PLAN, scale=SCALE, max_value=65535) == pytest.approx(3.0, abs=1e-12)


def test_texture_without_seams_has_a_ratio_of_about_one_and_an_offset_raises_it() -> None:
    image = texture(ROWS, COLUMNS, 3)
    assert seam_ratio(image, PLAN, scale=SCALE) == pytest.approx(1.0, abs=0.05)
    assert seam_ratio(image + offset(30.0)[..., None], PLAN, scale=SCALE) > 1.3


def test_an_upsampler_with_a_period_of_its_own_makes_no_seam() -> None:
    # Nearest neighbour has all its gradients at whole LR px, where every seam lies.
    small = texture(40, 56)
    image = np.repeat(np.repeat(small, SCALE, axis=0), SCALE, axis=1)
    assert seam_ratio(image, PLAN, scale=SCALE) == pytest.approx(1.0, abs=0.15)


def test_a_seam_is_compared_with_four_lr_px_on_each_side() -> None:
    # Steps of 3 per LR px, near the seams of either axis; 40 further off, in the first LR px that is not compared.
    steps = {axis: np.full(size * SCALE, 3.0) for axis, size in ((0, 40), (1, 56))}
    steps[0][[15 * SCALE, 25 * SCALE]] = steps[1][[15 * SCALE, 25 * SCALE, 31 * SCALE, 41 * SCALE]] = 40.0
    image = np.cumsum(steps[0])[:, None] + np.cumsum(steps[1])[None, :]
    assert seam_ratio(image, PLAN, scale=SCALE) == pytest.approx(1.0, abs=1e-12)
    steps[1][16 * SCALE] = 40.0
    image = np.cumsum(steps[0])[:, None] + np.cumsum(steps[1])[None, :]
    beside = (8 * COLUMNS * 3 + ROWS * (15 * 3 + 40)) / (8 * COLUMNS + 16 * ROWS)
    assert seam_ratio(image, PLAN, scale=SCALE) == pytest.approx(3.0 / beside, abs=1e-12)


def test_steps_elsewhere_are_no_seams() -> None:
    image = ramp(2.0)
    image[:, 10 * SCALE :] += 50
    assert seam_ratio(image, PLAN, scale=SCALE) == pytest.approx(1.0, abs=1e-12)


def test_an_image_cut_nowhere_has_no_seam() -> None:
    whole = windows(40, 40, tile=40, halo=4)
    image = texture(160, 160)
    assert seam_ratio(image, whole, scale=SCALE) == 1.0
    assert seam_difference(image, image + 9, whole, scale=SCALE) == (0.0, 100.0)


def test_the_difference_is_measured_next_to_the_seams_alone() -> None:
    image = texture(ROWS, COLUMNS, 3)
    assert seam_difference(image, image, PLAN, scale=SCALE) == (0.0, 100.0)
    far = image.copy()
    far[: 19 * SCALE, : 19 * SCALE] += 50
    assert seam_difference(far, image, PLAN, scale=SCALE) == (0.0, 100.0)
    near = image.copy()
    near[:, 20 * SCALE - 1] += 5
    found = seam_difference(near, image, PLAN, scale=SCALE)
    # The band: 2 LR px about one row and two columns, whose crossings count once.
    band = 2 * SCALE * (COLUMNS + 2 * ROWS) - 2 * (2 * SCALE) ** 2
    assert found.largest == pytest.approx(5, abs=1e-9)
    assert found.psnr == pytest.approx(10 * np.log10(255**2 / (25 * ROWS / band)), abs=1e-9)


def test_the_difference_of_unsigned_pixels_does_not_wrap() -> None:
    low, high = np.zeros((ROWS, COLUMNS), dtype=np.uint16), np.full((ROWS, COLUMNS), 65535, dtype=np.uint16)
    for pair in ((low, high), (high, low)):
        assert seam_difference(*pair, PLAN, scale=SCALE, max_value=65535) == pytest.approx((255.0, 0.0), abs=1e-9)


def test_mistakes_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="the plan covers 40x56 LR px at scale 4"):
        seam_ratio(texture(ROWS, COLUMNS + 1), PLAN, scale=SCALE)
    with pytest.raises(ValueError, match="shapes are"):
        seam_difference(texture(ROWS, COLUMNS), texture(ROWS, COLUMNS, 3), PLAN, scale=SCALE)
    strips = [Window(0, k, 0, 4, k, k + 1) for k in range(8)]
    with pytest.raises(ValueError, match="cuts at every LR px"):
        seam_ratio(texture(8, 16), strips, scale=2)

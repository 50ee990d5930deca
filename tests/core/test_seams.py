"""Laws of the seam measures."""

import math

import numpy as np
import pytest

from diffsr_core.resize import downscale_pixels
from diffsr_core.seams import ResidualSeams, owners, seam_difference, seam_ratio
from diffsr_core.tiling import Tile, tiles, windows

TILE, HALO, SCALE = 24, 4, 4
PLAN = tiles(40, 56, tile=TILE, halo=HALO)  # cores meet at row 20 and at columns 20 and 36
ROWS, COLUMNS = 40 * SCALE, 56 * SCALE


def ramp(slope: float) -> np.ndarray:
    """An image that rises by slope per px, along both axes."""
    return slope * (np.arange(ROWS)[:, None] + np.arange(COLUMNS)[None, :])


def offset(height: float) -> np.ndarray:
    """A canvas whose tiles alternate between 0 and height: each seam is a step of that height."""
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


def test_the_step_of_an_offset_tile_adds_to_the_gradient() -> None:
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
    whole = tiles(40, 40, tile=40, halo=4)
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
    strips = [Tile(0, k, 0, 4, k, k + 1) for k in range(8)]
    with pytest.raises(ValueError, match="cuts at every LR px"):
        seam_ratio(texture(8, 16), strips, scale=2)


# --- residuals ---

STRIDE = 48


def pooled(offset: float, *, num_images: int = 8, deviation: float = 1.5, normal: bool = False) -> ResidualSeams:
    """White residuals whose tiles of 48 px are off: by turns up and down (a chessboard), or by normal numbers."""
    pool, rng = ResidualSeams(), np.random.default_rng(0)
    plan = tiles(5 * STRIDE + 16, 6 * STRIDE + 16, tile=64, halo=8)
    owner = owners(plan)
    for _ in range(num_images):
        board = (np.arange(5)[:, None] + np.arange(6)[None, :]).ravel() % 2 - 0.5
        levels = offset * (rng.normal(size=len(plan)) if normal else board)
        pool.add(rng.normal(0, deviation, owner.shape) + levels[owner], owner)
    return pool


def test_the_owners_are_the_cores() -> None:
    owner = owners(PLAN)
    assert owner.shape == (40, 56) and sorted(np.unique(owner)) == list(range(len(PLAN)))
    for index, t in enumerate(PLAN):
        assert (owner[t.core_top : t.core_bottom, t.core_left : t.core_right] == index).all()
    assert len(np.unique(owners(windows(40, 56, side=16, margin=3)))) == 12
    with pytest.raises(ValueError, match="leaves 320 LR px to nobody"):
        owners([PLAN[0], *PLAN[2:]])  # a core of 20 x 16


def test_residuals_without_offsets_have_ratio_one() -> None:
    pool = pooled(0.0, num_images=20)
    assert pool.num_seams > 20_000 and pool.ratio == pytest.approx(1.0, abs=0.015)


@pytest.mark.parametrize("offset", [0.5, 1.0, 2.0, 4.0])
def test_a_chessboard_of_offsets_gives_the_mean_of_a_folded_normal(offset: float) -> None:
    # E|d| of d normal with mean m and deviation s; here s^2 = 2 * 1.5^2, neighbours' noise being independent.
    s = 1.5 * math.sqrt(2)
    folded = s * math.sqrt(2 / math.pi) * math.exp(-(offset**2) / (2 * s * s)) + offset * math.erf(
        offset / s / math.sqrt(2)
    )
    pool = pooled(offset, num_images=10)
    assert pool.ratio == pytest.approx(folded / (s * math.sqrt(2 / math.pi)), abs=0.02)


@pytest.mark.parametrize(("offset", "ratio"), [(0.5, 1.054), (1.0, 1.202), (2.0, 1.667)])
def test_normal_offsets_of_half_a_level_to_two_are_seen(offset: float, ratio: float) -> None:
    assert ratio == pytest.approx(math.sqrt(1 + (offset / 1.5) ** 2), abs=5e-4)  # the law in the docstring
    assert pooled(offset, num_images=40, normal=True).ratio == pytest.approx(ratio, rel=0.04)


def test_a_step_that_the_picture_hides_is_seen_in_the_residual() -> None:
    rng = np.random.default_rng(2)
    owner = np.kron(owners(PLAN), np.ones((SCALE, SCALE), int))
    plain, residual = texture(ROWS, COLUMNS).clip(0, 255), ResidualSeams()
    lr = downscale_pixels(plain, SCALE)
    made = plain + rng.normal(0, 1.5, plain.shape) + 2.0 * (owner % 2)
    residual.add(downscale_pixels(made, SCALE) - lr, owners(PLAN))
    assert seam_ratio(made, PLAN, scale=SCALE) < 1.05 and residual.ratio > 1.5


def test_pooling_adds_the_differences_of_all_channels_in_levels_of_255() -> None:
    residual = np.random.default_rng(0).normal(0, 1, (40, 56, 3))
    one, both = ResidualSeams(), ResidualSeams()
    one.add(residual, owners(PLAN))
    for part in (residual[:, :, :1], residual[:, :, 1] * 257, residual[:, :, 2:]):
        both.add(part, owners(PLAN), max_value=65535 if part.ndim == 2 else 255)
    assert (one.num_seams, one.num_beside) == (both.num_seams, both.num_beside)
    assert one.num_seams == 3 * (56 + 2 * 40) and one.num_beside == 8 * one.num_seams
    assert one.ratio == pytest.approx(both.ratio, rel=1e-12)
    steps = np.concatenate([np.abs(residual[20] - residual[19]).ravel(),
                            *(np.abs(residual[:, k] - residual[:, k - 1]).ravel() for k in (20, 36))])  # fmt: skip
    assert one.seams == pytest.approx(steps.sum(), rel=1e-12)


def test_nothing_to_compare_is_one_or_an_error() -> None:
    pool = ResidualSeams()
    pool.add(texture(8, 8), np.zeros((8, 8), int))
    assert pool.ratio == 1.0
    flat = ResidualSeams()
    flat.add(np.zeros((40, 56)), owners(PLAN))
    assert flat.ratio == 1.0
    flat.add(1.0 * (owners(PLAN) % 2), owners(PLAN))
    assert flat.ratio == math.inf
    every = ResidualSeams()
    every.add(texture(4, 4), np.arange(16).reshape(4, 4))
    with pytest.raises(ValueError, match="nothing beside"):
        _ = every.ratio
    with pytest.raises(ValueError, match=r"residual has shape \(8, 9\).*\(8, 8\)"):
        pool.add(texture(8, 9), np.zeros((8, 8), int))


def test_a_seam_of_a_residual_is_compared_with_four_lr_px_on_each_side() -> None:
    # Steps of 3 per LR px; 40 in the first that is not compared, or in the last that is.
    for further, expected in ((5, 1.0), (4, 3.0 / (3.0 + 37.0 / 8))):
        steps = np.full(40, 3.0)
        steps[[20 - further, 20 + further]] = 40.0, 3.0
        pool = ResidualSeams()
        pool.add(np.repeat(np.cumsum(steps)[:, None], 8, axis=1), np.repeat((np.arange(40) // 20)[:, None], 8, axis=1))
        assert pool.ratio == pytest.approx(expected, rel=1e-12) and pool.num_seams == 8

"""Laws of the recipes that make the LR."""

import json
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffsr_core.degradation import DEGRADATIONS, Degradation, crop_to_multiple
from diffsr_core.resize import downscale_pixels

BABOON = Path(__file__).parents[2] / "../shared/data/matlab/C_baboon_x4"


def random_pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.skipif(not BABOON.is_dir(), reason="no MATLAB pair in ../shared/data/matlab/C_baboon_x4")
def test_bicubic_is_matlab_bit_for_bit() -> None:
    hr, lr = (np.asarray(Image.open(BABOON / name)) for name in ("gt_baboon.png", "lq_baboon_x4.png"))
    assert np.array_equal(Degradation("bicubic", 4).apply(hr, seed=0), lr)


@pytest.mark.parametrize("name", sorted(DEGRADATIONS))
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_result_is_the_downscale_rounded_once_and_clipped(name: str, dtype: type) -> None:
    top = np.iinfo(dtype).max
    hr = np.where(random_pixels(48, 36, 3) > 100, top, 0).astype(dtype)
    hr[:24] = np.repeat(hr[:24:6], 6, axis=0)  # broad steps, so that bicubic overshoots on both sides
    small = downscale_pixels(hr, 3, kernel=DEGRADATIONS[name])
    assert (name == "bicubic") == bool(small.max() > top + 1 and small.min() < -1)
    lr = Degradation(name, 3).apply(hr, seed=0)
    assert lr.dtype == dtype and lr.shape == (16, 12, 3)
    assert np.abs(lr - np.clip(small, 0, top)).max() <= 0.5


def test_halves_are_rounded_away_from_zero() -> None:
    # The triangle of a halving has weights (1, 3, 3, 1) / 8: over stripes of 20 and 21 each sum is exactly 20.5.
    stripes = np.tile(np.array([20, 21], dtype=np.uint8), (8, 4))
    small = downscale_pixels(stripes, 2, kernel="bilinear")
    assert np.all(small[:, 1:-1] == 20.5)
    assert np.all(Degradation("bilinear", 2).apply(stripes, seed=0)[:, 1:-1] == 21)


def test_seed_and_repetition_do_not_change_a_recipe_that_draws_nothing() -> None:
    hr = random_pixels(32, 24, 3)
    before = hr.copy()
    for name in DEGRADATIONS:
        first = Degradation(name, 4).apply(hr, seed=0)
        assert np.array_equal(first, Degradation(name, 4).apply(hr, seed=99))
    assert np.array_equal(hr, before)


def test_recipes_differ() -> None:
    hr = random_pixels(32, 24, 3)
    results = {Degradation(name, 4).apply(hr, seed=0).tobytes() for name in DEGRADATIONS}
    assert len(results) == len(DEGRADATIONS) == 2


def test_grey_is_one_channel_of_colour() -> None:
    hr = random_pixels(16, 16, 3)
    recipe = Degradation("bicubic", 2)
    assert np.array_equal(recipe.apply(hr[..., 1], seed=0), recipe.apply(hr, seed=0)[..., 1])


def test_json_is_canonical() -> None:
    text = Degradation("bicubic", 4).to_json()
    assert text == '{"name":"bicubic","scale":4}'
    assert Degradation(**json.loads(text)) == Degradation("bicubic", 4)


def test_a_recipe_is_a_value() -> None:
    recipe = Degradation("bicubic", 4)
    assert len({recipe, Degradation("bicubic", 4), Degradation("bicubic", 2)}) == 2
    with pytest.raises(FrozenInstanceError):
        recipe.scale = 3  # type: ignore[misc]


def test_crop_keeps_the_top_left_and_divides() -> None:
    hr = random_pixels(21, 30, 3)
    assert np.array_equal(crop_to_multiple(hr, 4), hr[:20, :28])
    assert np.array_equal(crop_to_multiple(hr[:20, :28, 0], 4), hr[:20, :28, 0])
    assert Degradation("bicubic", 4).apply(crop_to_multiple(hr, 4), seed=0).shape == (5, 7, 3)


def test_mistakes_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="degradation is 'jpg': it must be one of bicubic, bilinear"):
        Degradation("jpg", 4)
    for scale in (1, 0, True, 4.0):
        with pytest.raises(ValueError, match=f"scale is {scale}: it must be a whole number"):
            Degradation("bicubic", scale)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="height is 10 px: it must be a positive multiple of scale 4; crop"):
        Degradation("bicubic", 4).apply(random_pixels(10, 8, 3), seed=0)
    with pytest.raises(ValueError, match="hr is float64"):
        Degradation("bicubic", 4).apply(np.zeros((8, 8, 3)), seed=0)
    with pytest.raises(ValueError, match="hr is 3x9 px"):
        crop_to_multiple(random_pixels(3, 9, 3), 4)

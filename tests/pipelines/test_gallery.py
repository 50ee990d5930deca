"""Laws of the pictures of an evaluation: which images are shown, and that each crop is what it says."""

import io

import numpy as np
import pytest
from PIL import Image

from diffsr_core.pixels import bicubic, lanczos
from pipelines.comparisons import UNCERTAINTY, Made, detailed_crops
from pipelines.datasets import Loaded
from pipelines.gallery import choose, drawn


def rows(**scores):
    count = len(next(iter(scores.values())))
    return [
        {"key": f"{i:02d}", "method": method, "reason": "", **{name: values[i] for name, values in scores.items()}}
        for i in range(count)
        for method in ("bicubic", "model")
    ]


def test_the_worst_of_the_model_come_first_by_what_is_better_lower_or_higher_then_a_sample():
    db = [30.0 + i for i in range(30)]
    chosen = choose(rows(psnr_y=db, niqe=[float(i % 7) for i in range(30)]), seed=0)
    why = [f"{reason}: {key}" for key, reason in chosen.items()]
    assert why[:4] == [f"worst PSNR-Y: {i:02d}" for i in range(4)]
    assert why[4:8] == [f"worst NIQE: {i:02d}" for i in (6, 13, 20, 27)]  # lower is better
    assert 1 <= len(why) - 8 <= 8 and set(chosen.values()) == {"worst PSNR-Y", "worst NIQE", "seeded sample"}


def test_what_was_not_scored_is_not_shown_and_no_image_twice():
    table = rows(psnr_y=[1.0, 2.0, 3.0])
    table[1]["reason"] = "corrupt"  # the model's first
    assert list(choose(table, seed=0)) == ["01", "02"]


def test_a_sample_depends_on_key_and_seed_alone():
    keys = [f"k{i}" for i in range(100)]
    some = drawn(keys, 10, seed=0)
    assert some == drawn(keys[::-1], 10, seed=0) != drawn(keys, 10, seed=1)
    assert set(drawn(keys[:50], 10, seed=0)) >= set(some) & set(keys[:50])  # others gone, those that were stay
    assert len(drawn(keys, 500, seed=0)) == 100


def pixels(png: bytes) -> np.ndarray:
    return np.atleast_3d(np.asarray(Image.open(io.BytesIO(png))))


@pytest.mark.parametrize("channels", [1, 3])
def test_crops_are_the_same_square_of_every_image_where_hr_has_most_detail(channels):
    hr = np.full((64, 96, channels), 90, np.uint8)
    hr[40:56, 64:80] = np.random.default_rng(0).integers(0, 256, (16, 16, channels))
    lr = hr[::4, ::4].copy()
    deviation = np.zeros((64, 96), np.float32)
    made = {
        "bicubic": Made(bicubic(lr, 4)),
        "a model, v2": Made(lanczos(lr, 4), uncertainty=deviation),
    }
    crops = detailed_crops(Loaded(lr, hr, "d"), made, scale=4, side=34)
    assert list(crops) == ["lr", "bicubic", "a model, v2", "hr", UNCERTAINTY]
    shown = {name: pixels(png) for name, png in crops.items()}
    assert {image.shape[:2] for image in shown.values()} == {(32, 32)}
    places = [(y, x) for y in range(33) for x in range(65) if np.array_equal(hr[y : y + 32, x : x + 32], shown["hr"])]
    y, x = places[0]
    assert len(places) == 1 and y % 4 == x % 4 == 0 and 24 <= y <= 40 and 48 <= x <= 64  # all of the noise is in it
    assert np.array_equal(made["bicubic"].sr[y : y + 32, x : x + 32], shown["bicubic"])
    assert np.array_equal(lr[y // 4 : y // 4 + 8, x // 4 : x // 4 + 8].repeat(4, 0).repeat(4, 1), shown["lr"])
    assert len({tuple(colour) for colour in shown[UNCERTAINTY].reshape(-1, 3)}) == 1


def test_an_image_smaller_than_the_square_is_shown_whole():
    hr = np.random.default_rng(0).integers(0, 256, (20, 28, 3), np.uint8)
    crops = detailed_crops(Loaded(hr[::4, ::4], hr, "d"), {"bicubic": Made(hr)}, scale=4, side=192)
    assert pixels(crops["hr"]).shape == (20, 20, 3)

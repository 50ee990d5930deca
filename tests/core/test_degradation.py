"""Laws of the recipes that make the LR."""

import hashlib
import json
import math
import pickle
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffsr_core.degradation import DEGRADATIONS, Degradation, Draws, crop_to_multiple
from diffsr_core.resize import downscale_pixels

BABOON = Path(__file__).parents[2] / "../shared/data/matlab/C_baboon_x4"


DRAWING = sorted(set(DEGRADATIONS) - {"bicubic", "bilinear"})
# What remains of `real` at scale 1 when each step is told to do nothing.
IDLE = {"blur": 0, "blur_2": 0, "anisotropic": 0, "sinc": 0, "sinc_last": 0, "resize": 1, "resize_2": 1}
IDLE |= {"noise": 0, "noise_2": 0, "shot": 0}


def random_pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def identity(pixels: np.ndarray, quality: int) -> np.ndarray:
    return pixels


def coarse(pixels: np.ndarray, quality: int) -> np.ndarray:
    """A codec that keeps the fewer levels the lower the quality."""
    step = 1 + (100 - quality) // 8
    return (pixels // step * step).astype(np.uint8)


def lr_of(name: str, hr: np.ndarray, *, scale: int = 1, seed: int = 0, **changes: object) -> np.ndarray:
    return Degradation(name, scale, changes).apply(hr, seed=seed, jpeg=identity)


@pytest.mark.skipif(not BABOON.is_dir(), reason="no MATLAB pair in ../shared/data/matlab/C_baboon_x4")
def test_bicubic_is_matlab_bit_for_bit() -> None:
    hr, lr = (np.asarray(Image.open(BABOON / name)) for name in ("gt_baboon.png", "lq_baboon_x4.png"))
    assert np.array_equal(Degradation("bicubic", 4).apply(hr, seed=0), lr)


@pytest.mark.parametrize("name", ["bicubic", "bilinear"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_result_is_the_downscale_rounded_once_and_clipped(name: str, dtype: type) -> None:
    top = np.iinfo(dtype).max
    hr = np.where(random_pixels(48, 36, 3) > 100, top, 0).astype(dtype)
    hr[:24] = np.repeat(hr[:24:6], 6, axis=0)  # broad steps, so that bicubic overshoots on both sides
    small = downscale_pixels(hr, 3, kernel=name)
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
    for name in ("bicubic", "bilinear"):
        first = Degradation(name, 4).apply(hr, seed=0)
        assert np.array_equal(first, Degradation(name, 4).apply(hr, seed=99))
    assert np.array_equal(hr, before)


def test_a_recipe_that_draws_nothing_makes_no_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffsr_core.degradation.Draws", None)
    for name in ("bicubic", "bilinear"):
        assert Degradation(name, 2).apply(random_pixels(8, 8, 3), seed=0).shape == (4, 4, 3)


@pytest.mark.parametrize("name", ["bicubic", "bilinear", "blur-bicubic"])
@pytest.mark.parametrize("channels", [None, 1, 4])
def test_floats_are_computed_in_float64_and_neither_rounded_nor_clipped(name: str, channels: int | None) -> None:
    shape = (24, 36) if channels is None else (24, 36, channels)
    hr = np.where(random_pixels(*shape) > 100, 5e4, 7.25).astype(np.float32)
    hr[:12] = -3.3e-3  # a broad step, so that bicubic overshoots
    changes = {"blur": 1.6, "anisotropic": 0} if name == "blur-bicubic" else {}
    x = np.atleast_3d(hr).astype(np.float64)
    if changes:
        x = scipy.ndimage.gaussian_filter(x, (1.6, 1.6, 0), mode="reflect", truncate=4)
    expected = downscale_pixels(x, 3, kernel="bilinear" if name == "bilinear" else "bicubic")
    lr = Degradation(name, 3, changes).apply(hr, seed=0)
    assert lr.dtype == np.float32 and lr.shape == (8, 12, *shape[2:])
    if changes:
        assert np.abs(lr.reshape(expected.shape) - expected).max() < 5e4 * 1e-6
    else:
        assert np.array_equal(lr.reshape(expected.shape), expected.astype(np.float32))
        assert np.any(lr % 1 != 0) and (name == "bicubic") == bool(lr.min() < -100)


@pytest.mark.parametrize("name", ["noise", "jpeg", "real"])
def test_recipes_with_levels_of_255_refuse_floats_and_say_what_to_use(name: str) -> None:
    with pytest.raises(
        ValueError, match=f"^hr is float32: {name} must have .*levels are of 255.*use bicubic, bilinear"
    ):
        Degradation(name, 2).apply(np.zeros((8, 8, 3), np.float32), seed=0, jpeg=identity)


def test_recipes_differ() -> None:
    hr = random_pixels(32, 24, 3)
    results = {Degradation(name, 4).apply(hr, seed=0, jpeg=coarse).tobytes() for name in DEGRADATIONS}
    assert sorted(DEGRADATIONS) == ["bicubic", "bilinear", "blur-bicubic", "jpeg", "noise", "real"]
    assert len(results) == len(DEGRADATIONS)


def test_blur_bicubic_is_the_blur_of_scipy_then_bicubic() -> None:
    hr = random_pixels(32, 48, 3)
    blurred = scipy.ndimage.gaussian_filter(hr.astype(float), (1.6, 1.6, 0), mode="reflect", truncate=4)
    lr = lr_of("blur-bicubic", hr, scale=4, blur=1.6, anisotropic=0)
    assert np.abs(lr - np.clip(downscale_pixels(blurred, 4), 0, 255)).max() <= 0.5 + 1e-9
    assert np.array_equal(lr_of("blur-bicubic", hr, scale=4, blur=0), Degradation("bicubic", 4).apply(hr, seed=0))


@pytest.mark.parametrize(("dtype", "unit"), [(np.uint8, 1), (np.uint16, 257)])
def test_noise_has_the_mean_and_the_variance_that_its_settings_say(dtype: type, unit: int) -> None:
    for level in (90, 160):
        hr = np.full((256, 192, 3), level * unit, dtype=dtype)
        error = (lr_of("noise", hr, noise=6, shot=0.5).astype(float) - hr) / unit
        expected = 6**2 + 0.5 * level + (1 / 12 if unit == 1 else 0)
        # Three standard errors of the mean and of the variance of 147,456 samples.
        assert abs(error.mean()) < 3 * math.sqrt(expected / error.size)
        assert error.var() == pytest.approx(expected, rel=3 * math.sqrt(2 / error.size))
        assert abs(np.corrcoef(error[..., 0].ravel(), error[..., 1].ravel())[0, 1]) < 0.015


def test_grey_noise_is_the_same_in_every_channel_and_colour_noise_is_not() -> None:
    hr = np.full((16, 16, 4), 128, np.uint8)
    grey, colour = lr_of("noise", hr, noise=9, grey=1), lr_of("noise", hr, noise=9, grey=0)
    assert np.array_equal(grey, np.repeat(grey[..., :1], 4, axis=2)) and grey.std() > 5
    assert len({colour[..., channel].tobytes() for channel in range(4)}) == 4


def test_no_noise_at_scale_1_is_the_identity() -> None:
    hr = random_pixels(7, 9, 3)
    assert np.array_equal(lr_of("noise", hr, noise=0), hr)


def test_jpeg_through_an_identity_codec_is_bicubic_and_at_scale_1_the_image() -> None:
    hr = random_pixels(16, 24, 3)
    assert np.array_equal(lr_of("jpeg", hr, scale=4), Degradation("bicubic", 4).apply(hr, seed=0))
    assert np.array_equal(lr_of("jpeg", hr), hr)
    deep = np.random.default_rng(0).integers(0, 65536, (9, 5), dtype=np.uint16)
    assert np.array_equal(lr_of("jpeg", deep), np.floor(deep / 257 + 0.5) * 257)  # JPEG sees 8 bits


def test_jpeg_gives_the_codec_every_quality_of_its_range_and_returns_what_it_gives() -> None:
    asked: list[int] = []

    def codec(pixels: np.ndarray, quality: int) -> np.ndarray:
        asked.append(quality)
        assert pixels.shape == (4, 6, 1) and pixels.dtype == np.uint8
        return 255 - pixels

    hr = random_pixels(4, 6)
    for seed in range(60):
        lr = Degradation("jpeg", 1, {"quality": [40, 43]}).apply(hr, seed=seed, jpeg=codec)
        assert np.array_equal(lr, 255 - hr)
    assert set(asked) == {40, 41, 42, 43}


def test_real_with_each_step_idle_is_the_image() -> None:
    hr = random_pixels(9, 15, 3)
    for seed in range(8):
        assert np.array_equal(lr_of("real", hr, seed=seed, **IDLE), hr)


@pytest.mark.parametrize("change", [{"blur": 1}, {"blur_2": 1}, {"sinc": 1}, {"sinc_last": 1}, {"resize": 0.5},
                                    {"resize_2": 0.5}, {"noise": 9}, {"noise_2": 9}, {"shot": 1}])  # fmt: skip
def test_each_step_of_real_does_its_part(change: dict[str, float]) -> None:
    hr = random_pixels(16, 16, 3)
    assert np.abs(lr_of("real", hr, **{**IDLE, **change}).astype(int) - hr).max() > 3


def test_real_goes_through_jpeg_twice_in_different_orders() -> None:
    hr, before, orders = random_pixels(32, 32, 3), [], set()

    def codec(pixels: np.ndarray, quality: int) -> np.ndarray:
        before.append(pixels.shape[:2])
        return pixels

    for seed in range(40):
        before.clear()
        recipe = Degradation("real", 4, {"resize": [0.6, 0.9], "resize_2": 0.7})
        assert recipe.apply(hr, seed=seed, jpeg=codec).shape == (8, 8, 3)
        first, second = before
        assert second in ((8, 8), (6, 6))
        orders.add((first == (32, 32), second == (8, 8)))
    assert len(orders) == 4


def test_the_place_of_a_blur_among_the_steps_of_real_does_not_change_its_strength() -> None:
    # A point keeps the spread of its blur, 2 HR px = 1 LR px, whether it is blurred before or after it is reduced.
    hr = np.zeros((64, 64), np.uint16)
    hr[31:33, 31:33] = 60_000
    x = np.arange(32) - 15.5
    spread = []
    for seed in range(12):
        # The first resize goes to somewhere between the LR and the HR size; nothing else but the blur does anything.
        lr = lr_of("real", hr, scale=2, seed=seed, **{**IDLE, "blur": 2}).astype(float)
        spread.append(math.sqrt((lr.sum(axis=0) * x**2).sum() / lr.sum()))
    assert max(spread) - min(spread) < 0.25 and np.mean(spread) == pytest.approx(1, abs=0.2)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(DRAWING),
    scale=st.integers(1, 5),
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    channels=st.sampled_from([0, 1, 2, 3, 7, 16]),
    dtype=st.sampled_from([np.uint8, np.uint16]),
    seed=st.integers(0, 2**63 - 1),
)
def test_any_size_and_number_of_channels_gives_its_lr_and_gives_it_again(name, scale, size, channels, dtype, seed):
    shape = (size[0] * scale, size[1] * scale, *([channels] if channels else []))
    hr = np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)
    recipe = Degradation(name, scale)
    if name in ("jpeg", "real") and channels not in (0, 1, 3):
        with pytest.raises(ValueError, match="must have 1 or 3 channels"):
            recipe.apply(hr, seed=seed, jpeg=coarse)
        return
    lr = recipe.apply(hr, seed=seed, jpeg=coarse)
    assert lr.dtype == dtype and lr.shape == (*size, *shape[2:])
    recorded = Degradation(**json.loads(recipe.to_json()))
    assert np.array_equal(recorded.apply(hr, seed=seed, jpeg=coarse), lr)


@pytest.mark.parametrize("name", DRAWING)
def test_another_seed_gives_other_pixels_and_the_order_of_images_does_not_matter(name: str) -> None:
    recipe, one, two = Degradation(name, 2), random_pixels(32, 32, 3), random_pixels(48, 32, 1)
    before = one.copy()
    forth = [recipe.apply(hr, seed=seed, jpeg=coarse) for hr, seed in ((one, 5), (two, 6))]
    back = [recipe.apply(hr, seed=seed, jpeg=coarse) for hr, seed in ((two, 6), (one, 5))]
    assert np.array_equal(forth[0], back[1]) and np.array_equal(forth[1], back[0])
    assert len({recipe.apply(one, seed=seed, jpeg=coarse).tobytes() for seed in range(6)}) > 3
    assert np.array_equal(one, before)


def test_draws_are_those_of_the_first_release() -> None:
    # A recorded seed must give its pixels in another process, on another machine, with another numpy.
    draws = Draws(7)
    assert [draws.uniform(0, 1) for _ in range(3)] == [0.2045391877181828, 0.9352209223434329, 0.6007997500710189]
    assert (
        hashlib.sha256(lr_of("noise", random_pixels(8, 8, 3), seed=7).tobytes()).hexdigest()[:16] == "edd50b8abb4b644d"
    )


def test_uniform_draws_fill_their_range_evenly() -> None:
    draws = Draws(0)
    found = np.array([draws.uniform(2, 4) for _ in range(4000)])
    assert 2 <= found.min() < 2.01 and 3.99 < found.max() < 4
    assert found.mean() == pytest.approx(3, abs=3 * 2 / math.sqrt(12 * 4000))
    assert [draws.chance(0), draws.chance(1), draws.uniform(3, 3)] == [False, True, 3]


def test_grey_is_one_channel_of_colour() -> None:
    hr = random_pixels(16, 16, 3)
    recipe = Degradation("bicubic", 2)
    assert np.array_equal(recipe.apply(hr[..., 1], seed=0), recipe.apply(hr, seed=0)[..., 1])


def test_json_of_a_recipe_without_settings_is_its_name_and_scale() -> None:
    # Manifests, fingerprints and data-set digests that exist hold this text.
    text = Degradation("bicubic", 4).to_json()
    assert text == '{"name":"bicubic","scale":4}'
    assert Degradation(**json.loads(text)) == Degradation("bicubic", 4)


@pytest.mark.parametrize("name", DRAWING)
def test_json_writes_out_every_setting_and_gives_the_recipe_again(name: str) -> None:
    document = json.loads(Degradation(name, 4).to_json())
    assert document["settings"].keys() == DEGRADATIONS[name].keys()
    assert Degradation(**document) == Degradation(name, 4) == pickle.loads(pickle.dumps(Degradation(name, 4)))


def test_equal_recipes_have_equal_json() -> None:
    texts = {Degradation("jpeg", 4, {"quality": value}).to_json() for value in (50, 50.0, [50, 50], (50.0, 50))}
    assert texts == {'{"name":"jpeg","scale":4,"settings":{"quality":[50.0,50.0]}}'}


def test_a_recipe_is_read_from_its_name_or_from_json() -> None:
    assert Degradation.parse("noise", 2) == Degradation("noise", 2)
    text = '{"name": "noise", "settings": {"noise": [25, 25]}}'
    assert Degradation.parse(text, 1) == Degradation("noise", 1, {"noise": 25})
    for wrong in ("{", '{"settings": {}}', '{"name": "noise", "seed": 1}', '{"name": "noise", "settings": 5}'):
        with pytest.raises(ValueError, match=r"^degradation is '.*: .*correct it$"):
            Degradation.parse(wrong, 2)


def test_a_recipe_is_a_value() -> None:
    recipe = Degradation("bicubic", 4)
    assert len({recipe, Degradation("bicubic", 4), Degradation("bicubic", 2)}) == 2
    assert len({Degradation("jpeg", 4), Degradation("jpeg", 4), Degradation("jpeg", 4, {"quality": 9})}) == 2
    with pytest.raises(FrozenInstanceError):
        recipe.scale = 3  # type: ignore[misc]


def test_crop_keeps_the_top_left_and_divides() -> None:
    hr = random_pixels(21, 30, 3)
    assert np.array_equal(crop_to_multiple(hr, 4), hr[:20, :28])
    assert np.array_equal(crop_to_multiple(hr[:20, :28, 0], 4), hr[:20, :28, 0])
    assert Degradation("bicubic", 4).apply(crop_to_multiple(hr, 4), seed=0).shape == (5, 7, 3)


def test_mistakes_are_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match="degradation is 'jpg': it must be one of bicubic, bilinear, blur-bicubic, jpeg"
    ):
        Degradation("jpg", 4)
    for name in (None, 4, ["bicubic"], {"name": "bicubic"}):
        with pytest.raises(ValueError, match=r"degradation is .*: it must be one of bicubic"):
            Degradation(name, 4)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"degradation is .*: it must be one of bicubic"):
            Degradation.parse(json.dumps({"name": name}), 4)
    for scale in (1, 0, True, 4.0):
        with pytest.raises(ValueError, match=f"scale is {scale}: it must be a whole number"):
            Degradation("bicubic", scale)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="height is 10 px: it must be a positive multiple of scale 4; crop"):
        Degradation("bicubic", 4).apply(random_pixels(10, 8, 3), seed=0)
    with pytest.raises(ValueError, match="hr is float64"):
        Degradation("bicubic", 4).apply(np.zeros((8, 8, 3)), seed=0)
    with pytest.raises(ValueError, match="hr is 3x9 px"):
        crop_to_multiple(random_pixels(3, 9, 3), 4)
    with pytest.raises(ValueError, match="scale is 0: it must be a whole number of at least 1 for noise"):
        Degradation("noise", 0)
    wrong = ({"sigma": 1}, {"noise": [9, 1]}, {"noise": [1, 2, 3]}, {"noise": "9"}, {"noise": 256}, {"grey": [0, 1]})
    for given_wrong in (*wrong, {"noise": float("nan")}, {"noise": True}, {"grey": 2}, {"shot": []}):
        with pytest.raises(ValueError, match=r"^(setting|noise|grey|shot) is .*: it must be .*; (correct it|choose)"):
            Degradation("noise", 2, given_wrong)
    with pytest.raises(ValueError, match="one that bicubic has: none"):
        Degradation("bicubic", 2, {"blur": 1})
    for name in ("jpeg", "real"):
        with pytest.raises(ValueError, match=f"jpeg is None: {name} must have a JPEG codec; pass one"):
            Degradation(name, 2).apply(random_pixels(4, 4, 3), seed=0)
    with pytest.raises(ValueError, match=r"jpeg gave uint8 of shape \(2, 2\): it must give uint8 of shape \(2, 2, 3\)"):
        Degradation("jpeg", 2).apply(random_pixels(4, 4, 3), seed=0, jpeg=lambda pixels, quality: pixels[..., 0])
    for shape in ((4, 4, 17), (4,), (1, 4, 4, 3), (4, 4, 0)):
        with pytest.raises(ValueError, match="hr has shape"):
            Degradation("noise", 2).apply(random_pixels(*shape), seed=0)
    with pytest.raises(ValueError, match="width is 9 px: it must be a positive multiple of scale 2"):
        Degradation("real", 2).apply(random_pixels(8, 9, 3), seed=0, jpeg=identity)


@pytest.mark.parametrize("name", sorted(DEGRADATIONS))
def test_what_a_recipe_says_of_itself_is_read_back(name):
    recipe = Degradation(name, 4)
    assert Degradation.parse(recipe.to_json(), 4) == recipe
    with pytest.raises(ValueError, match="scale is 2"):
        Degradation.parse(recipe.to_json(), 2)

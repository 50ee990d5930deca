"""Laws of pipelines.twins: twins pass with their measured shift, everything else is refused with the reason."""

import io
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage.registration import phase_cross_correlation

from diffsr_core.degradation import Degradation, crop_to_multiple
from diffsr_core.resize import downscale_pixels
from pipelines.images import Refused
from pipelines.twins import align, check_transforms, check_twins, twin_window

DATA = Path(__file__).resolve().parents[2] / "../shared/data"
PHOTOGRAPHS, SPACENET, SET5 = DATA / "train/bsds200", DATA / "satellite/spacenet", DATA / "matlab/A_set5_x4"
needs_photographs = pytest.mark.skipif(
    not PHOTOGRAPHS.is_dir(), reason="no photographs in ../shared/data/train/bsds200"
)
needs_spacenet = pytest.mark.skipif(not SPACENET.is_dir(), reason="no rasters in ../shared/data/satellite/spacenet")
needs_set5 = pytest.mark.skipif(not SET5.is_dir(), reason="no MATLAB pairs in ../shared/data/matlab")


def scene(height=256, width=320, *, channels=3, seed=0):
    """Return uint8 HWC with structure at every size, as photographs have: a spectrum that falls as 1 / f."""
    draw = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)) + 1 / width
    planes = [np.fft.irfft2(np.fft.rfft2(draw.normal(size=(height, width))) / frequency) for _ in range(channels)]
    grey = planes[0] / planes[0].std()
    mixed = np.stack([grey + 0.3 * plane / plane.std() for plane in planes], axis=2)
    return np.clip(128 + 45 * mixed, 0, 255).astype(np.uint8)


def photographs(count):
    files = sorted(PHOTOGRAPHS.glob("*.jpg"))
    return [np.asarray(Image.open(path).convert("RGB"))[:320, :320] for path in files[:: len(files) // count][:count]]


def shifted(x, dy, dx):
    """Return x (HW) moved down and right by the shift theorem, its border wrapped around."""
    fy, fx = (np.fft.fftfreq(side) for side in x.shape)
    return np.fft.ifft2(np.fft.fft2(x) * np.exp(-2j * np.pi * (fy[:, None] * dy + fx * dx))).real


def reason(hr, lr, **settings):
    with pytest.raises(Refused) as caught:
        check_twins(hr, lr, **settings)
    assert caught.value.stage == "twin"
    return caught.value.reason, caught.value.message


def lr_of(hr, scale):
    return Degradation("bicubic", scale).apply(crop_to_multiple(hr, scale), seed=0)


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_the_downscale_of_an_image_is_its_twin_without_shift_and_with_full_similarity(scale):
    hr = scene(scale * 64 + scale - 1, scale * 80)
    lr = hr if scale == 1 else lr_of(hr, scale)
    found = check_twins(hr, lr, scale=scale, max_shift=0.01)
    assert math.hypot(found.dy, found.dx) < 0.005 and found.similarity > 0.999


@needs_set5
def test_matlab_twins_of_set5_pass():
    for path in sorted((SET5 / "HR").iterdir()):
        hr, lr = (np.asarray(Image.open(p).convert("RGB")) for p in (path, SET5 / "LR" / f"{path.stem}x4.png"))
        assert check_twins(hr, lr, scale=4, max_shift=0.005).similarity > 0.999


@needs_photographs
@pytest.mark.parametrize(("deviation", "error"), [(0, 0.01), (5, 0.05)])
def test_known_subpixel_shifts_of_photographs_are_found_as_well_as_by_scikit_image(deviation, error):
    draw = np.random.default_rng(1)
    for hr in photographs(8):
        dy, dx = draw.uniform(-3, 3, 2)
        x = hr.mean(axis=2)
        moved = downscale_pixels(shifted(x, 2 * dy, 2 * dx), 2)[4:-4, 4:-4]
        moved = moved + draw.normal(size=moved.shape) * deviation
        whole = np.clip(np.round(0.7 * moved + 20), 0, 255).astype(np.uint8)
        found = check_twins(hr[8:-8, 8:-8], whole[:, :, None], scale=2, max_shift=5)
        assert math.hypot(found.dy - dy, found.dx - dx) < error
        oracle = phase_cross_correlation(whole, downscale_pixels(x, 2)[4:-4, 4:-4], upsample_factor=50)[0]
        assert np.hypot(*(oracle - (found.dy, found.dx))) < 0.15


def test_a_shift_is_positive_down_and_right():
    x = scene(channels=1)[..., 0].astype(float)
    found = align(x[20:-20, 20:-20], x[15:-25, 27:-13])
    assert (found.dy, found.dx) == pytest.approx((5, -7), abs=0.01) and found.similarity > 0.999


def test_gain_offset_gamma_noise_and_jpeg_leave_twins_twins():
    hr = scene(512, 512)
    lr = lr_of(hr, 4)
    noisy = lr + np.random.default_rng(0).normal(0, 10, lr.shape)
    sink = io.BytesIO()
    Image.fromarray(lr).save(sink, "JPEG", quality=30)
    changed = {
        "gain": (lr * 0.3 + 90).astype(np.uint8),
        "deep": (lr.astype(np.uint16) * 90 + 7),
        "float": (lr / 7 - 1000).astype(np.float32),
        "gamma": (255 * (lr / 255) ** 2.2).astype(np.uint8),
        "noise": np.clip(noisy, 0, 255).astype(np.uint8),
        "jpeg": np.asarray(Image.open(sink)),
    }
    for name, low in changed.items():
        found = check_twins(hr, low, scale=4, max_shift=0.1)
        assert found.similarity > 0.8, name


@needs_photographs
def test_unrelated_photographs_of_one_size_are_never_twins():
    images = photographs(20)
    reasons = []
    for hr, other in zip(images, images[1:] + images[:1], strict=True):
        reasons.append(reason(hr, lr_of(other, 2), scale=2)[0])
    assert set(reasons) <= {"unrelated", "misaligned"} and reasons.count("unrelated") >= 19


def test_chance_is_not_taken_for_likeness_in_small_images():
    twins = [scene(64, 64, seed=seed) for seed in range(40)]
    for hr, other in zip(twins, twins[1:], strict=False):
        assert reason(hr, lr_of(other, 2), scale=2)[0] in ("unrelated", "misaligned")
        assert check_twins(hr, lr_of(hr, 2), scale=2).similarity > 0.99
    assert "at least 0.80 for 32 x 32 px" in reason(twins[0], lr_of(twins[1], 2), scale=2)[1]
    assert "too small to tell" in reason(twins[0][:30], lr_of(twins[0], 2)[:15], scale=2)[1]


def test_a_shift_above_the_limit_is_refused_with_its_numbers():
    hr = scene(512, 512)
    lr = lr_of(hr, 2)[:, 3:]
    assert reason(hr[:, :-6], lr, scale=2) == (
        "misaligned",
        "LR lies +0.00 px down and -3.00 px right of HR: 3.00 LR px, at most 0.5",
    )
    assert check_twins(hr[:, :-6], lr, scale=2, max_shift=3.1).dx == pytest.approx(-3, abs=0.01)


@pytest.mark.parametrize(("height", "width"), [(255, 256), (258, 256), (256, 320), (128, 128)])
def test_other_sizes_than_scale_times_lr_are_a_scale_mismatch(height, width):
    hr, lr = scene(height, width), lr_of(scene(256, 256), 2)
    assert reason(hr, lr, scale=2)[0] == "scale_mismatch"


def test_channels_must_be_equal_or_one():
    hr, lr = scene(), lr_of(scene(), 2)
    assert check_twins(hr, lr[..., :1], scale=2).similarity > 0.8
    assert check_twins(hr[..., :1], lr, scale=2).similarity > 0.8
    assert reason(hr, lr[..., :2], scale=2)[0] == "channel_mismatch"


@needs_spacenet
def test_a_satellite_twin_has_the_shift_that_scikit_image_measures():
    rasterio = pytest.importorskip("rasterio")
    with rasterio.open(SPACENET / "pan1.tif") as pan, rasterio.open(SPACENET / "ms1.tif") as bands:
        hr, lr = pan.read().transpose(1, 2, 0), bands.read().transpose(1, 2, 0)
        grids = check_transforms(tuple(pan.transform)[:6], tuple(bands.transform)[:6], scale=2, lr_size=lr.shape[:2])
    found = check_twins(hr, lr.astype(np.float32), scale=2, max_shift=1)
    oracle = phase_cross_correlation(
        lr.mean(axis=2), downscale_pixels(hr, 2)[..., 0], upsample_factor=100, normalization=None
    )[0]
    assert (found.dy, found.dx) == pytest.approx(tuple(oracle), abs=0.05) and found.similarity > 0.9
    # The two grids agree to 0.02 px, the two pictures do not.
    assert math.hypot(*grids) < 0.03 and reason(hr, lr, scale=2)[0] == "misaligned"


def test_flat_images_have_no_shift_and_one_flat_image_has_no_twin():
    flat, hr = np.full((64, 64, 3), 77, np.uint8), scene(64, 64)
    found = check_twins(flat, np.full((32, 32, 3), 12, np.uint8), scale=2)
    assert (found.dy, found.dx) == (0, 0) and math.isnan(found.similarity)
    assert reason(flat, lr_of(hr, 2), scale=2) == ("unrelated", "HR is flat and the other is not")
    assert reason(hr, flat[:32, :32].astype(np.float32), scale=2) == ("unrelated", "LR is flat and the other is not")
    assert math.isnan(check_twins(hr, lr_of(hr, 2), scale=2, lr_valid=np.zeros((32, 32), bool)).similarity)


def test_samples_that_are_not_valid_or_not_finite_do_not_count():
    hr = scene(512, 512)
    lr = lr_of(hr, 2)
    gaps = np.ones((512, 512), bool)
    gaps[100:220, 60:300] = False
    spoiled = np.where(gaps[..., None], hr, 255).astype(np.uint8)
    whole, without = check_twins(spoiled, lr, scale=2), check_twins(spoiled, lr, scale=2, hr_valid=gaps)
    assert whole.similarity < 0.99 < 0.999 < without.similarity and math.hypot(*without[:2]) < 0.01
    holed = np.where(gaps[::2, ::2, None], lr, np.nan).astype(np.float32)
    assert check_twins(hr, holed, scale=2).similarity > 0.999
    with warnings.catch_warnings(action="error"):
        assert check_twins(hr, np.where(np.isnan(holed), np.inf, holed), scale=2).similarity > 0.999
    marked = np.where(gaps[::2, ::2, None], lr, 0).astype(np.uint8)
    assert check_twins(hr, marked, scale=2, lr_valid=gaps[::2, ::2]).similarity > 0.999


def test_the_window_is_central_bounded_and_all_that_is_read():
    assert twin_window((256, 200), (64, 50), scale=4) == (0, 0, 64, 50)
    assert twin_window((4099, 8000), (1024, 2000), scale=4) == (0, 488, 1024, 1024)
    assert twin_window((6000, 400), (3000, 200), scale=2) == (988, 0, 1024, 200)
    assert twin_window((80_000, 80_007), (10_000, 10_000), scale=8) == (4744, 4744, 512, 512)
    hr = np.zeros((2400, 200, 1), np.uint8)
    hr[:] = scene(2400, 200, channels=1)
    lr = lr_of(hr, 2)
    y, x, height, width = twin_window(hr.shape[:2], lr.shape[:2], scale=2)
    inner = hr[2 * y : 2 * (y + height), 2 * x : 2 * (x + width)]
    hr[: 2 * y], lr[y + height :] = 0, 255
    assert check_twins(hr, lr, scale=2) == check_twins(inner, lr[y : y + height, x : x + width], scale=2)


def test_equal_inputs_give_equal_bits():
    hr = scene(300, 260)
    assert check_twins(hr, lr_of(hr, 2), scale=2) == check_twins(hr.copy(), lr_of(hr, 2), scale=2)


def test_grids_of_the_same_ground_have_no_offset_and_others_that_of_their_worst_corner():
    hr = (0.5, 0.0, 1000.0, 0.0, -0.5, 2000.0)
    assert check_transforms(hr, (1.0, 0.0, 1000.0, 0.0, -1.0, 2000.0), scale=2, lr_size=(300, 200)) == (0, 0)
    # LR starts 0.3 m to the west and 0.4 m to the north: its content lies 0.3 px to the right and 0.4 px down.
    moved = (1.0, 0.0, 999.7, 0.0, -1.0, 2000.4)
    assert check_transforms(hr, moved, scale=2, lr_size=(300, 200), max_shift=0.6) == pytest.approx((0.4, 0.3))
    wide = (1.001, 0.0, 1000.0, 0.0, -1.0, 2000.0)
    assert check_transforms(hr, wide, scale=2, lr_size=(300, 200)) == pytest.approx((0, -200 * (1 - 1 / 1.001)))


def test_a_rotated_grid_is_measured_in_its_own_pixels():
    c, s = math.cos(0.6), math.sin(0.6)
    hr, lr = (0.5 * c, 0.5 * s, 10.0, 0.5 * s, -0.5 * c, 20.0), (c, s, 10.0 - 0.25 * c, s, -c, 20.0 - 0.25 * s)
    assert check_transforms(hr, lr, scale=2, lr_size=(64, 64)) == pytest.approx((0, 0.25))


@pytest.mark.parametrize(
    ("lr", "reason"),
    [
        ((2.0, 0, 1000.0, 0, -2.0, 2000.0), "scale_mismatch"),
        ((1.0, 0, 1000.0, 0, 1.0, 2000.0), "scale_mismatch"),
        ((0.0, 1.0, 1000.0, 1.0, 0.0, 2000.0), "scale_mismatch"),
        ((0.0, 0, 1000.0, 0, -1.0, 2000.0), "scale_mismatch"),
        ((math.nan, 0, 1000.0, 0, -1.0, 2000.0), "scale_mismatch"),
        ((1.0, 0, 1000.6, 0, -1.0, 2000.0), "misaligned"),
        ((1.0, 0, math.nan, 0, -1.0, 2000.0), "scale_mismatch"),
        ((1.005, 0, 1000.0, 0, -1.0, 2000.0), "misaligned"),
    ],
)
def test_grids_of_other_pixels_or_places_are_refused(lr, reason):
    with pytest.raises(Refused) as caught:
        check_transforms((0.5, 0.0, 1000.0, 0.0, -0.5, 2000.0), lr, scale=2, lr_size=(300, 200))
    assert (caught.value.stage, caught.value.reason) == ("twin", reason)


def test_mistakes_of_a_person_are_value_errors():
    hr = scene(64, 64)
    for wrong in (-0.1, math.nan):
        with pytest.raises(ValueError, match="max_shift is .*: it must be 0 LR px or more"):
            check_twins(hr, lr_of(hr, 2), scale=2, max_shift=wrong)
    with pytest.raises(ValueError, match="scale is 0: it must be a whole number"):
        twin_window((4, 4), (4, 4), scale=0)

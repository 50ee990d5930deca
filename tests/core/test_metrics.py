"""Laws of the pixel metrics."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffsr_core.metrics import lr_psnr, psnr, rgb_to_y, ssim
from diffsr_core.resize import downscale_pixels, resize

DATA = Path(__file__).parents[2] / "../shared/data"
needs_published = pytest.mark.skipif(
    not ((DATA / "published").is_dir() and (DATA / "matlab").is_dir()),
    reason="no published tables or MATLAB pairs in ../shared/data",
)


def random_pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def rounded(x: np.ndarray) -> np.ndarray:
    return np.floor(np.clip(x, 0, 255) + 0.5)


def published_bicubic(lr: np.ndarray, scale: int) -> np.ndarray:
    """Return the up-sampled RGB of the published tables: uint8 after each pass.

    Their border is replicated and ours mirrored: the same inside the border of `scale` px that the tables leave out.
    """
    planes = torch.from_numpy(lr.transpose(2, 0, 1)[None].astype(np.float64))
    height, width = planes.shape[2:]
    rows = torch.from_numpy(rounded(resize(planes, (height * scale, width)).numpy()))
    return rounded(resize(rows, (height * scale, width * scale))[0].numpy()).transpose(1, 2, 0)


def test_luma_has_its_closed_form_values() -> None:
    corners = np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]]], dtype=np.uint8)
    assert rgb_to_y(corners)[0] == pytest.approx([16, 235, 16 + 65.481, 16 + 128.553, 16 + 24.966], abs=1e-12)


def test_psnr_has_its_closed_form_values() -> None:
    a = np.full((8, 8, 3), 100, dtype=np.uint8)
    assert psnr(a, a + np.uint8(1)) == pytest.approx(20 * np.log10(255), abs=1e-12)
    assert psnr(a, a - np.uint8(10)) == pytest.approx(20 * np.log10(25.5), abs=1e-12)
    assert psnr(a / 255, a / 255 + 0.1, max_value=1.0) == pytest.approx(20, abs=1e-9)


def test_psnr_is_capped() -> None:
    a = random_pixels(8, 8).astype(np.float64)
    assert psnr(a, a) == 100.0
    assert psnr(a, a + 1e-6) == 100.0
    assert psnr(a, a + 1, cap=30.0) == 30.0


def test_border_is_left_out_of_every_side() -> None:
    a = random_pixels(20, 24, 3)
    b = a.copy()
    b[:3], b[-3:], b[:, :3], b[:, -3:] = 0, 0, 0, 0
    assert psnr(a, b, border=3) == 100.0 and ssim(a, b, border=3) == 1.0
    assert psnr(a, b, border=2) < 40 and ssim(a, b, border=2) < 1.0


@pytest.mark.parametrize("shape", [(40, 52), (33, 28, 3), (11, 11, 1)])
def test_ssim_is_that_of_scikit_image_on_the_valid_area(shape: tuple[int, ...]) -> None:
    structural_similarity = pytest.importorskip("skimage.metrics").structural_similarity
    a = random_pixels(*shape)
    b = np.clip(a + np.random.default_rng(1).normal(0, 25, shape), 0, 255)
    _, full = structural_similarity(
        a.astype(np.float64),
        b,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=255,
        channel_axis=2 if len(shape) == 3 else None,
        full=True,
    )
    assert ssim(a, b) == pytest.approx(full[5:-5, 5:-5].mean(), abs=1e-9)


def test_ssim_of_constants_is_their_luminance_term() -> None:
    a, b = np.full((16, 16), 50.0), np.full((16, 16), 150.0)
    c1 = (0.01 * 255) ** 2
    assert ssim(a, b) == pytest.approx((2 * 50 * 150 + c1) / (50**2 + 150**2 + c1), abs=1e-9)


@needs_published
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_published_bicubic_scores_of_set5_are_reproduced_per_image(scale: int) -> None:
    with open(DATA / f"published/result_Set5_SRF_{scale}.csv", newline="") as file:
        table = {row["image"]: row for row in csv.DictReader(file)}
    folder = DATA / f"matlab/B_set5_x{scale}"
    assert len(table) == 5
    for name, row in table.items():
        hr, lr = (np.asarray(Image.open(folder / kind / f"{name}.png").convert("RGB")) for kind in ("HR", "LR"))
        y = rounded(rgb_to_y(hr))
        up = rounded(rgb_to_y(published_bicubic(lr, scale)))
        assert psnr(y, up, border=scale) == pytest.approx(float(row["PSNR_Bicubic"]), abs=1e-4)
        assert ssim(y, up, border=scale) == pytest.approx(float(row["SSIM_Bicubic"]), abs=1e-5)


def test_lr_psnr_is_measured_against_the_unrounded_downscale() -> None:
    sr = random_pixels(32, 48, 3)
    small = downscale_pixels(sr, 4)
    lr = rounded(small).astype(np.uint8)
    expected = 10 * np.log10(255**2 / np.mean(np.square(lr - small)))
    assert 50 < expected < 100
    assert lr_psnr(lr, sr, scale=4) == pytest.approx(expected, abs=1e-9)
    deep = (sr.astype(np.uint16) * 257, rounded(small).astype(np.uint16) * 257)
    assert lr_psnr(deep[1], deep[0], scale=4) == pytest.approx(expected, abs=1e-6)


def test_lr_psnr_of_a_constant_is_the_cap_and_falls_by_its_offset() -> None:
    lr, sr = np.full((4, 5), 77, dtype=np.uint8), np.full((16, 20), 77, dtype=np.uint8)
    assert lr_psnr(lr, sr, scale=4) == 100.0
    assert lr_psnr(lr + np.uint8(3), sr, scale=4) == pytest.approx(20 * np.log10(255 / 3), abs=1e-9)


def test_mistakes_are_refused_by_name() -> None:
    a = random_pixels(12, 12, 3)
    with pytest.raises(ValueError, match="shapes are"):
        psnr(a, a[:-1])
    with pytest.raises(ValueError, match="border is 6 px"):
        psnr(a, a, border=6)
    with pytest.raises(ValueError, match="border is 1 px.*at least 11 px"):
        ssim(a, a, border=1)
    with pytest.raises(ValueError, match=r"pixels has shape \(12, 12\)"):
        rgb_to_y(a[..., 0])
    with pytest.raises(ValueError, match="lr is uint8 and sr is float64"):
        lr_psnr(a[:3, :3], a.astype(np.float64), scale=4)
    with pytest.raises(ValueError, match="it must be 4 times lr"):
        lr_psnr(a, a, scale=4)

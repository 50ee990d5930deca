"""Laws of the pixel metrics."""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffsr_core.metrics import (
    consistency_mse,
    diversity,
    lr_psnr,
    ms_ssim,
    psnr,
    radial_spectrum,
    rgb_to_y,
    spectral_error,
    ssim,
)
from diffsr_core.resize import downscale_pixels, imresize

DATA = Path(__file__).parents[2] / "../shared/data"
needs_published = pytest.mark.skipif(
    not ((DATA / "published").is_dir() and (DATA / "matlab").is_dir()),
    reason="no published tables or MATLAB pairs in ../shared/data",
)


def random_pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def noisy(a: np.ndarray, deviation: float, *, peak: float = 255.0) -> np.ndarray:
    return np.clip(a + np.random.default_rng(1).normal(0, deviation, a.shape), 0, peak)


def photo() -> np.ndarray:
    return np.asarray(pytest.importorskip("skimage.data").astronaut())


def nchw(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.atleast_3d(image).astype(np.float64).transpose(2, 0, 1)[None])


def rounded(x: np.ndarray) -> np.ndarray:
    return np.floor(np.clip(x, 0, 255) + 0.5)


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


def test_psnr_and_ssim_of_rgb_and_of_y_are_those_of_scikit_image_and_torchmetrics() -> None:
    skimage = pytest.importorskip("skimage.metrics")
    torchmetrics = pytest.importorskip("torchmetrics.functional.image")
    hr = photo()[:96, 100:220]
    sr = noisy(hr, 9).round().astype(np.uint8)
    for a, b in ((hr, sr), (rgb_to_y(hr), rgb_to_y(sr))):
        assert psnr(a, b) == pytest.approx(skimage.peak_signal_noise_ratio(a, b, data_range=255), abs=1e-9)
        theirs = torchmetrics.peak_signal_noise_ratio(nchw(a), nchw(b), data_range=255.0)
        assert psnr(a, b) == pytest.approx(float(theirs), abs=1e-5)
        # torchmetrics mirrors the image at its border; what lies inside is compared.
        assert ssim(a, b) == pytest.approx(float(structure_map(nchw(a), nchw(b))[0].mean()), abs=1e-9)


@pytest.mark.parametrize("metric", [psnr, ssim, ms_ssim, spectral_error])
def test_scores_do_not_depend_on_how_the_range_is_stored(metric: Callable[..., float]) -> None:
    a = photo()[:200, :190]
    b = noisy(a, 12).round().astype(np.uint8)
    expected = metric(a, b)
    deep = [image.astype(np.uint16) * 257 for image in (a, b)]
    assert metric(*deep, max_value=65535) == pytest.approx(expected, rel=1e-9)
    assert metric(a / 255, b / 255, max_value=1) == pytest.approx(expected, rel=1e-9)


def structure_map(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return torchmetrics' maps of SSIM and of its contrast and structure, where the window lies inside the image."""
    update = pytest.importorskip("torchmetrics.functional.image.ssim")._ssim_update
    structure = update(x, y, data_range=255.0, return_contrast_sensitivity=True)[1]
    return update(x, y, data_range=255.0, return_full_image=True)[1][..., 5:-5, 5:-5], structure


@pytest.mark.parametrize("shape", [(161, 176), (181, 163), (192, 176)])
def test_ms_ssim_is_the_product_over_scales_of_what_torchmetrics_measures_at_each(shape: tuple[int, int]) -> None:
    a = rgb_to_y(photo())[: shape[0], 100 : 100 + shape[1]]
    b = noisy(a, 30)
    x, y = nchw(a), nchw(b)
    product = 1.0
    for level, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        whole, structure = structure_map(x, y)
        product *= float((whole if level == 4 else structure).mean()) ** weight
        pad = (0, x.shape[3] % 2, 0, x.shape[2] % 2)
        halve = torch.nn.functional.avg_pool2d
        x, y = (halve(torch.nn.functional.pad(z, pad, mode="replicate"), 2) for z in (x, y))
    assert 0.5 < product < 0.95
    assert ms_ssim(a, b) == pytest.approx(product, abs=1e-9)


def test_ms_ssim_of_torchmetrics_differs_by_the_border_of_its_coarsest_scale_alone() -> None:
    # It mirrors the image there, where Wang's code takes no window; the larger the image, the less that is.
    measure = pytest.importorskip("torchmetrics.functional.image")
    a = rgb_to_y(photo())
    b = noisy(a, 30)
    theirs = float(measure.multiscale_structural_similarity_index_measure(nchw(a), nchw(b), data_range=255.0))
    assert ms_ssim(a, b) == pytest.approx(theirs, abs=2e-3)


def test_ms_ssim_of_constants_is_the_luminance_term_of_the_coarsest_scale() -> None:
    a, b = np.full((161, 170, 2), 50.0), np.full((161, 170, 2), 150.0)
    c1 = (0.01 * 255) ** 2
    assert ms_ssim(a, b) == pytest.approx(((2 * 50 * 150 + c1) / (50**2 + 150**2 + c1)) ** 0.1333, abs=1e-9)


def test_ms_ssim_is_one_for_equals_zero_for_opposites_and_the_mean_over_channels() -> None:
    a = photo()[:170, :170]
    b = noisy(a, 20)
    assert ms_ssim(a, a) == 1.0
    assert ms_ssim(a, 255.0 - a) == 0.0
    assert ms_ssim(a, b) == pytest.approx(np.mean([ms_ssim(a[..., c], b[..., c]) for c in range(3)]), abs=1e-12)


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
        up = rounded(rgb_to_y(imresize(lr, scale, flavour="B")))
        assert psnr(y, up, border=scale) == pytest.approx(float(row["PSNR_Bicubic"]), abs=1e-4)
        assert ssim(y, up, border=scale) == pytest.approx(float(row["SSIM_Bicubic"]), abs=6e-6)


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


def test_consistency_is_the_squared_error_behind_lr_psnr_in_unit_range() -> None:
    lr, sr = np.full((4, 5), 77, dtype=np.uint8), np.full((16, 20), 77, dtype=np.uint8)
    assert consistency_mse(lr + np.uint8(3), sr, scale=4) == pytest.approx((3 / 255) ** 2, rel=1e-9)
    assert consistency_mse(lr, sr, scale=4) == pytest.approx(1e-10)


def test_diversity_is_the_mean_deviation_over_the_samples() -> None:
    # Two samples that differ by d deviate by d / 2; the mean is over pixels and channels.
    samples = np.full((2, 4, 6, 3), 100, dtype=np.uint8)
    samples[1, ..., 0] += 30
    samples[1, ..., 1] -= 12
    assert diversity(samples) == pytest.approx((15 + 6 + 0) / 3, abs=1e-12)
    assert diversity(samples / 255, max_value=1) == pytest.approx(7, abs=1e-12)
    assert diversity(samples[:, :, :, 2]) == 0.0
    many = np.random.default_rng(0).normal(128, 9, (200, 30, 30))
    assert diversity(many) == pytest.approx(9, rel=0.01)


@pytest.mark.parametrize("shape", [(64, 64), (96, 61, 3), (33, 120)])
def test_the_spectrum_of_white_noise_is_its_variance_at_every_frequency(shape: tuple[int, ...]) -> None:
    noise = np.random.default_rng(3).normal(50, 7, (24, *shape))
    spectrum = np.mean([radial_spectrum(x) for x in noise], axis=0)
    assert spectrum.shape == (min(shape[:2]) // 2,)
    assert spectrum[:4] == pytest.approx(np.full(4, 49), rel=0.35)
    assert spectrum[4:] == pytest.approx(np.full(len(spectrum) - 4, 49), rel=0.15)


def test_the_spectrum_of_a_wave_lies_at_its_frequency() -> None:
    rows, columns = np.mgrid[:64, :64]
    for cycles in (5, 20, 32):
        for phase in (rows, columns):
            spectrum = radial_spectrum(100 + 50 * np.cos(2 * np.pi * cycles * (phase + 0.5 * (cycles != 32)) / 64))
            assert np.argmax(spectrum) == cycles - 1
    diagonal = radial_spectrum(np.cos(2 * np.pi * (12 * rows + 16 * columns) / 64))
    assert np.argmax(diagonal) == 20 - 1


def test_the_spectrum_does_not_see_a_constant() -> None:
    image = random_pixels(40, 50, 3).astype(np.float64)
    assert radial_spectrum(image + 60) == pytest.approx(radial_spectrum(image), rel=1e-9)
    assert spectral_error(np.full((32, 32), 90.0), np.full((32, 32), 10.0)) == 0.0


def test_spectral_error_of_a_scaled_image_is_the_gain_in_db() -> None:
    noise = np.random.default_rng(4).normal(0, 30, (64, 80, 3))
    assert spectral_error(noise, noise) == 0.0
    for gain in (0.5, 2.0):
        assert spectral_error(128 + gain * noise, 128 + noise) == pytest.approx(abs(20 * np.log10(gain)), abs=1e-9)


def test_the_spectrum_of_a_gaussian_blur_is_its_transfer_function() -> None:
    # |exp(-2 pi^2 sigma^2 f^2)|^2 of the power is left: nothing at low frequencies is lost, 21 dB at the highest.
    size, sigma = 192, 0.7
    f = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None, :])
    noise = np.random.default_rng(5).normal(0, 60, (size, size))
    blurred = np.fft.ifft2(np.fft.fft2(noise) * np.exp(-2 * np.pi**2 * sigma**2 * f**2)).real
    rings = np.arange(1, size // 2 + 1) / size
    expected = 10 * np.log10(np.exp(-4 * np.pi**2 * sigma**2 * rings**2))
    got = 10 * np.log10(radial_spectrum(blurred) / radial_spectrum(noise))
    assert got == pytest.approx(expected, abs=0.35)
    assert spectral_error(blurred, noise) == pytest.approx(-expected.mean(), abs=0.1)


def test_power_below_the_rounding_of_eight_bits_does_not_count() -> None:
    faint = np.random.default_rng(6).normal(0, 0.05, (64, 64))
    assert spectral_error(128 + faint, np.full((64, 64), 128.0)) == 0.0
    assert spectral_error(128 + 40 * faint, np.full((64, 64), 128.0)) == pytest.approx(10 * np.log10(4 * 12), abs=1.0)


def test_mistakes_are_refused_by_name() -> None:
    a = random_pixels(12, 12, 3)
    with pytest.raises(ValueError, match="shapes are"):
        psnr(a, a[:-1])
    with pytest.raises(ValueError, match="border is 6 px"):
        psnr(a, a, border=6)
    with pytest.raises(ValueError, match="border is 1 px.*at least 11 px"):
        ssim(a, a, border=1)
    with pytest.raises(ValueError, match="at least 161 px"):
        ms_ssim(np.zeros((160, 300)), np.zeros((160, 300)))
    with pytest.raises(ValueError, match="max_value is 255: the uint16 pixels reach 3084"):
        psnr(a.astype(np.uint16), np.full_like(a, 12, dtype=np.uint16) * 257)
    with pytest.raises(ValueError, match="samples has shape"):
        diversity(a[None])
    with pytest.raises(ValueError, match="image has shape"):
        radial_spectrum(a[:1])
    with pytest.raises(ValueError, match=r"pixels has shape \(12, 12\)"):
        rgb_to_y(a[..., 0])
    with pytest.raises(ValueError, match="lr is uint8 and sr is float64"):
        lr_psnr(a[:3, :3], a.astype(np.float64), scale=4)
    with pytest.raises(ValueError, match="it must be 4 times lr"):
        lr_psnr(a, a, scale=4)

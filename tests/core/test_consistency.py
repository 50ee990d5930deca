"""Laws of the projection onto the LR."""

import numpy as np
import pytest
import torch

from diffsr_core.consistency import CONSISTENCIES, LOW_BAND, project
from diffsr_core.degradation import Degradation
from diffsr_core.metrics import lr_psnr
from diffsr_core.resize import downscale, upscale


def photographs() -> list[np.ndarray]:
    astronaut = pytest.importorskip("skimage.data").astronaut()
    return [astronaut[y : y + 128, x : x + 128] for y, x in ((0, 160), (100, 200), (300, 40), (384, 384))]


def to_model(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)[None] / 127.5 - 1


def to_pixels(x: torch.Tensor) -> np.ndarray:
    return ((x[0].permute(1, 2, 0).double() + 1) * 127.5).round().clamp(0, 255).numpy().astype(np.uint8)


def noisy_start(lr: torch.Tensor, scale: int) -> torch.Tensor:
    up = upscale(lr, scale)
    return up + torch.randn(up.shape, generator=torch.Generator().manual_seed(0)) * (8 / 127.5)


@pytest.mark.parametrize("scale", [2, 4])
def test_six_iterations_bring_a_bicubic_lr_to_50_db_after_rounding(scale: int) -> None:
    for hr in photographs():
        lr = Degradation("bicubic", scale).apply(hr, seed=0)
        start = noisy_start(to_model(lr), scale)
        assert lr_psnr(lr, to_pixels(start), scale=scale) < 45
        assert lr_psnr(lr, to_pixels(project(start, to_model(lr), scale=scale, iterations=6)), scale=scale) >= 50


def test_each_iteration_comes_closer() -> None:
    hr = photographs()[1]
    lr = Degradation("bicubic", 4).apply(hr, seed=0)
    start = noisy_start(to_model(lr), 4)
    scores = [lr_psnr(lr, to_pixels(project(start, to_model(lr), scale=4, iterations=n)), scale=4) for n in range(6)]
    assert scores == sorted(scores)
    assert scores[5] > scores[0] + 10


def back_projection(sr: torch.Tensor, lr: torch.Tensor, *, iterations: int) -> torch.Tensor:
    """As published: every iteration is made of the image, and clipped."""
    x = sr.clamp(-1, 1)
    for _ in range(iterations):
        x = (x + upscale(lr - downscale(x, 4), 4)).clamp(-1, 1)
    return x


def off(sr: torch.Tensor, lr: torch.Tensor) -> float:
    return float((downscale(sr, 4) - lr).square().mean().sqrt())


def test_two_iterations_without_clipping_are_back_projections_and_more_come_nearer() -> None:
    lr = to_model(photographs()[0])[:, :, ::4, ::4] * 0.5
    sr = noisy_start(lr, 4)
    for n in (1, 2):
        assert (project(sr, lr, scale=4, iterations=n) - back_projection(sr, lr, iterations=n)).abs().max() < 1e-6
    assert off(project(sr, lr, scale=4, iterations=6), lr) < 0.8 * off(back_projection(sr, lr, iterations=6), lr)
    assert off(project(sr, lr, scale=4, iterations=12), lr) < 0.2 / 255


def test_where_much_is_clipped_it_comes_as_near_as_back_projection() -> None:
    lr = (to_model(photographs()[0])[:, :, ::4, ::4] - 0.8).clamp(-1, 1)
    sr = noisy_start(lr, 4)
    assert (sr < -1).float().mean() > 0.15
    assert off(project(sr, lr, scale=4, iterations=6), lr) < 1.1 * off(back_projection(sr, lr, iterations=6), lr)


def test_a_constant_image_stays() -> None:
    sr, lr = torch.full((1, 3, 32, 32), 0.3), torch.full((1, 3, 8, 8), 0.3)
    assert (project(sr, lr, scale=4, iterations=5) - sr).abs().max() < 1e-6


def test_a_constant_offset_is_taken_back_in_one_iteration() -> None:
    sr, lr = torch.full((1, 3, 32, 32), 0.5), torch.full((1, 3, 8, 8), 0.3)
    assert (project(sr, lr, scale=4, iterations=1) - 0.3).abs().max() < 1e-6


def test_no_iteration_returns_the_clipped_input() -> None:
    sr = torch.linspace(-2, 2, 256).view(1, 1, 16, 16)
    lr = torch.zeros(1, 1, 4, 4)
    assert torch.equal(project(sr, lr, scale=4, iterations=0), sr.clamp(-1, 1))


def test_result_is_within_the_model_range_and_the_input_is_left_alone() -> None:
    sr = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2
    lr = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    before = sr.clone()
    assert project(sr, lr, scale=4, iterations=3).abs().max() <= 1
    assert torch.equal(sr, before)


@pytest.mark.parametrize("mode", CONSISTENCIES)
def test_an_image_does_not_change_with_its_batch(mode: str) -> None:
    sr = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.3
    lr = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 0.3
    whole = project(sr, lr, scale=4, iterations=3, mode=mode)
    for n in range(3):
        assert torch.equal(whole[n : n + 1], project(sr[n : n + 1], lr[n : n + 1], scale=4, iterations=3, mode=mode))
    assert torch.equal(whole, sr.clamp(-1, 1)) == (mode == "off")


@pytest.mark.parametrize(("mode", "low", "high"), [("exact", 2, 4), ("interval", 2, 4), ("low-band", 7, 10)])
@pytest.mark.parametrize("iterations", [1, 2])
def test_a_pixel_is_moved_only_by_what_lies_within_four_lr_px_per_iteration(
    iterations: int, mode: str, low: int, high: int
) -> None:
    sr = torch.randn(1, 1, 192, 192, generator=torch.Generator().manual_seed(0)).double() * 0.3
    lr = torch.zeros(1, 1, 48, 48).double()
    other = sr.clone()
    other[0, 0, 96, 96] += 0.5
    one, two = (project(x, lr, scale=4, iterations=iterations, mode=mode) for x in (sr, other))
    reach = ((one != two)[0, 0].nonzero() - 96).abs().max() / 4
    assert low * iterations < reach < high * iterations


# --- interval: the quantisation of the LR is no reason to move ---


def rounded(x: torch.Tensor, white: int) -> torch.Tensor:
    return ((x + 1) * (white / 2)).round() / (white / 2) - 1


@pytest.mark.parametrize("white", [255, 65535])
def test_interval_leaves_an_image_whose_downscale_rounds_to_the_lr(white: int) -> None:
    hr = (to_model(photographs()[0]) * 0.9).double()
    lr = rounded(downscale(hr, 4), white)
    keywords = {"scale": 4, "iterations": 4, "half_step": 1 / white}
    assert (project(hr, lr, mode="interval", **keywords) - hr).abs().max() < 1e-12  # type: ignore[arg-type]
    assert not torch.equal(project(hr, lr, mode="exact", **keywords), hr)  # type: ignore[arg-type]


def test_interval_ends_within_half_a_step_of_the_lr() -> None:
    lr = rounded(to_model(photographs()[1]) * 0.8, 255).double()[:, :, :48, :48]
    start = noisy_start(lr.float(), 4).double() + 0.05
    off = [
        (downscale(project(start, lr, scale=4, iterations=n, mode="interval"), 4) - lr).abs().max() * 127.5
        for n in (0, 20, 80)
    ]
    assert off[0] > 6 and off[1] < 0.7 and off[2] < 0.51


# --- low-band: tone and colour of the LR, not its noise ---


def test_low_band_takes_a_constant_offset_back_in_one_iteration() -> None:
    tones = torch.tensor([0.3, -0.2, 0.6]).view(1, 3, 1, 1)
    sr, lr = torch.full((1, 3, 32, 20), 0.5), tones.expand(1, 3, 8, 5)
    assert (project(sr, lr, scale=4, iterations=1, mode="low-band") - tones).abs().max() < 1e-6


def test_low_band_does_not_take_a_checkerboard_of_the_lr_on() -> None:
    y, x = torch.meshgrid(torch.arange(24), torch.arange(24), indexing="ij")
    lr = (0.1 * (-1.0) ** (x + y)).expand(1, 3, 24, 24)
    sr = torch.zeros(1, 3, 96, 96)
    taken = {
        mode: float(downscale(project(sr, lr, scale=4, iterations=6, mode=mode), 4)[:, :, 8:16, 8:16].std() / lr.std())
        for mode in ("exact", "low-band")
    }
    assert taken["exact"] > 0.8 and taken["low-band"] < 1e-3


@pytest.mark.parametrize("period", [4.0, 8.0, 16.0, 32.0])
def test_low_band_takes_on_of_a_wave_what_its_gaussian_lets_through(period: float) -> None:
    # A Gaussian of deviation s passes exp(-2 (pi s / period)^2) of a wave, cut off at 3 s; one iteration from zero.
    wave = 0.2 * torch.cos(2 * np.pi * torch.arange(128, dtype=torch.float64) / period)
    lr = wave.expand(1, 1, 12, 128)
    sr = torch.zeros(1, 1, 48, 512, dtype=torch.float64)
    found, exact = (
        project(sr, lr, scale=4, iterations=1, mode=mode)[0, 0, 24, 128:384] for mode in ("low-band", "exact")
    )
    gain = float((found * exact).sum() / exact.square().sum())
    assert gain == pytest.approx(np.exp(-2 * (np.pi * LOW_BAND / period) ** 2), abs=0.006)


def test_off_is_the_clipped_input_whatever_the_iterations() -> None:
    sr = torch.linspace(-2, 2, 256).view(1, 1, 16, 16)
    assert torch.equal(project(sr, torch.ones(1, 1, 4, 4), scale=4, iterations=9, mode="off"), sr.clamp(-1, 1))


@pytest.mark.parametrize("mode", CONSISTENCIES)
@pytest.mark.parametrize("size", [(1, 1), (2, 9), (7, 3)])
def test_every_mode_works_on_any_size(mode: str, size: tuple[int, int]) -> None:
    sr, lr = torch.full((2, 3, 4 * size[0], 4 * size[1]), 0.5), torch.full((2, 3, *size), 0.25)
    found = project(sr, lr, scale=4, iterations=3, mode=mode)
    assert found.shape == sr.shape and float(found.std()) < 1e-6


@pytest.mark.parametrize("mode", CONSISTENCIES)
def test_gradient_passes_through(mode: str) -> None:
    sr = (torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double() * 0.2).requires_grad_()
    lr = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: project(x, lr, scale=2, iterations=2, mode=mode), (sr,))


def test_mistakes_are_refused_by_name() -> None:
    sr, lr = torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 4, 4)
    with pytest.raises(ValueError, match="iterations is -1"):
        project(sr, lr, scale=4, iterations=-1)
    with pytest.raises(ValueError, match=r"mode \('strict'\) must be one of exact, interval, low-band, off"):
        project(sr, lr, scale=4, iterations=1, mode="strict")
    with pytest.raises(ValueError, match="it must be 2 times lr"):
        project(sr, lr, scale=2, iterations=1)
    with pytest.raises(ValueError, match="sr is torch.float32 and lr is torch.float64"):
        project(sr, lr.double(), scale=4, iterations=1)

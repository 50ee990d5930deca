"""Laws of the projection onto the LR."""

import numpy as np
import pytest
import torch

from diffsr_core.consistency import project
from diffsr_core.degradation import Degradation
from diffsr_core.metrics import lr_psnr
from diffsr_core.resize import upscale


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


def test_an_image_does_not_change_with_its_batch() -> None:
    sr = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.3
    lr = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 0.3
    whole = project(sr, lr, scale=4, iterations=3)
    for n in range(3):
        assert torch.equal(whole[n : n + 1], project(sr[n : n + 1], lr[n : n + 1], scale=4, iterations=3))


@pytest.mark.parametrize("iterations", [1, 2])
def test_a_pixel_is_moved_only_by_what_lies_within_four_lr_px_per_iteration(iterations: int) -> None:
    sr = torch.randn(1, 1, 96, 96, generator=torch.Generator().manual_seed(0)) * 0.3
    lr = torch.zeros(1, 1, 24, 24)
    other = sr.clone()
    other[0, 0, 48, 48] += 0.5
    moved = (project(sr, lr, scale=4, iterations=iterations) != project(other, lr, scale=4, iterations=iterations))[
        0, 0
    ]
    reach = (moved.nonzero() - 48).abs().max()
    assert 8 * iterations < reach < 16 * iterations


def test_gradient_passes_through() -> None:
    sr = (torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double() * 0.2).requires_grad_()
    lr = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: project(x, lr, scale=2, iterations=2), (sr,))


def test_mistakes_are_refused_by_name() -> None:
    sr, lr = torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 4, 4)
    with pytest.raises(ValueError, match="iterations is -1"):
        project(sr, lr, scale=4, iterations=-1)
    with pytest.raises(ValueError, match="it must be 2 times lr"):
        project(sr, lr, scale=2, iterations=1)
    with pytest.raises(ValueError, match="sr is torch.float32 and lr is torch.float64"):
        project(sr, lr.double(), scale=4, iterations=1)

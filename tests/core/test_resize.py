"""Laws of the resizing in MATLAB's convention."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffsr_core.metrics import psnr, rgb_to_y
from diffsr_core.resize import downscale, downscale_pixels, kernel_value, resize, resize_weights, upscale

DATA = Path(__file__).parents[2] / "../shared/data"
needs_matlab = pytest.mark.skipif(not (DATA / "matlab").is_dir(), reason="no MATLAB pairs in ../shared/data/matlab")
needs_set5 = pytest.mark.skipif(not (DATA / "test/set5").is_dir(), reason="no Set5 in ../shared/data/test/set5")


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def image(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def test_kernel_has_its_closed_form_values() -> None:
    at = torch.tensor([0.0, 0.5, -0.5, 1.0, 1.5, 2.0, 2.5], dtype=torch.float64)
    assert kernel_value(at, "bicubic").tolist() == [1.0, 0.5625, 0.5625, 0.0, -0.0625, 0.0, 0.0]
    assert kernel_value(at, "bilinear").tolist() == [1.0, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0]


def test_taps_of_a_doubling_are_those_computed_by_hand() -> None:
    # Output 0 of 2 -> 4 lies at source -0.25: taps at distances 1.75, 0.75, 0.25, 1.25 of samples -2 -1 0 1 (mirrored).
    indices, weights = resize_weights(2, 4)
    assert indices[0].tolist() == [1, 0, 0, 1]
    assert weights[0].tolist() == [-0.0234375, 0.2265625, 0.8671875, -0.0703125]


def test_taps_of_a_halving_are_those_computed_by_hand() -> None:
    # Output 1 of 8 -> 4 lies at source 2.5; the widened kernel is 0.5 k(d / 2) at d = 3.5, 2.5, 1.5, 0.5 and mirrored.
    indices, weights = resize_weights(8, 4)
    side = [-0.01171875, -0.03515625, 0.11328125, 0.43359375]
    assert indices[1].tolist() == [1, 0, 0, 1, 2, 3, 4, 5, 6][1:]
    assert weights[1].tolist() == side + side[::-1]
    assert resize_weights(8, 4, kernel="bilinear")[1][1].tolist() == [0.125, 0.375, 0.375, 0.125]


def test_resize_is_the_separable_sum_of_its_taps() -> None:
    x = image(2, 3, 11, 7)
    matrices = []
    for in_size, out_size in ((11, 5), (7, 17)):
        indices, weights = resize_weights(in_size, out_size)
        matrices.append(torch.zeros(out_size, in_size, dtype=torch.float64).scatter_add_(1, indices, weights))
    expected = torch.einsum("ah,nchw,bw->ncab", matrices[0], x, matrices[1])
    assert torch.allclose(resize(x, (5, 17)), expected, rtol=0, atol=1e-14)


@needs_matlab
def test_matlab_lr_of_baboon_is_reproduced_bit_for_bit() -> None:
    folder = DATA / "matlab/C_baboon_x4"
    small = downscale_pixels(pixels(folder / "gt_baboon.png"), 4)
    rounded = np.floor(np.clip(small, 0, 255) + 0.5).astype(np.uint8)
    assert np.array_equal(rounded, pixels(folder / "lq_baboon_x4.png"))


@needs_set5
@pytest.mark.parametrize(("scale", "published"), [(2, 33.66), (3, 30.39), (4, 28.42)])
def test_bicubic_reaches_the_published_psnr_of_set5(scale: int, published: float) -> None:
    # The protocol of the SRCNN code: Y rounded to uint8, LR left in float, output rounded to uint8, border = scale.
    scores = []
    for path in sorted((DATA / "test/set5").glob("*.png")):
        y = np.floor(rgb_to_y(pixels(path)) + 0.5)
        y = y[: y.shape[0] // scale * scale, : y.shape[1] // scale * scale]
        up = upscale(downscale(torch.from_numpy(y)[None, None], scale), scale)[0, 0].numpy()
        scores.append(psnr(y, np.floor(np.clip(up, 0, 255) + 0.5), border=scale))
    assert len(scores) == 5
    assert np.mean(scores) == pytest.approx(published, abs=0.005)


@pytest.mark.parametrize("kernel", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(3, 5), (40, 28), (160, 84), (57, 13)])
def test_constants_are_preserved(kernel: str, size: tuple[int, int]) -> None:
    x = torch.full((1, 2, 40, 28), 0.7, dtype=torch.float64)
    assert (resize(x, size, kernel=kernel) - 0.7).abs().max() < 1e-14


@pytest.mark.parametrize(("out_size", "margin"), [(16, 3), (256, 12), (32, 3), (100, 5)])
def test_linear_ramps_are_preserved_away_from_the_border(out_size: int, margin: int) -> None:
    ramp = torch.arange(64, dtype=torch.float64).view(1, 1, 64, 1)
    got = resize(ramp, (out_size, 1))[0, 0, margin:-margin, 0]
    expected = (torch.arange(out_size, dtype=torch.float64) + 0.5) * 64 / out_size - 0.5
    assert (got - expected[margin:-margin]).abs().max() < 1e-11


def test_a_mirrored_image_is_resized_to_the_mirrored_result() -> None:
    x = image(1, 1, 24, 32)
    for scaled in (lambda a: downscale(a, 4), lambda a: upscale(a, 3)):
        assert torch.allclose(scaled(x.flip(2, 3)), scaled(x).flip(2, 3), rtol=0, atol=1e-14)


def test_images_do_not_change_with_the_batch_or_the_layout() -> None:
    x = image(5, 3, 36, 44, dtype=torch.float32)
    for scaled in (lambda a: downscale(a, 4), lambda a: upscale(a, 4)):
        whole = scaled(x)
        assert torch.equal(whole, torch.cat([scaled(one[None]) for one in x]))
        assert torch.equal(whole, scaled(x.contiguous(memory_format=torch.channels_last)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [2, 3, 4, 7])
def test_a_window_with_its_halo_gives_the_bits_of_the_whole(scale: int, dtype: torch.dtype) -> None:
    x = image(1, 1, 16 * scale, 16 * scale, dtype=dtype)
    inner = slice(2 * scale, 14 * scale)
    assert torch.equal(downscale(x, scale)[..., 4:12, 4:12], downscale(x[..., inner, inner], scale)[..., 2:10, 2:10])
    kept, within = slice(20 * scale, 30 * scale), slice(2 * scale, 12 * scale)
    assert torch.equal(upscale(x, scale)[..., kept, kept], upscale(x[..., 18:32, 18:32], scale)[..., within, within])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_type_is_kept_and_narrow_types_cost_one_rounding(dtype: torch.dtype) -> None:
    x = image(1, 2, 16, 16).to(dtype)
    got = downscale(x, 4)
    assert got.dtype == dtype
    assert (got.double() - downscale(x.double(), 4)).abs().max() <= 2 * torch.finfo(dtype).eps


def test_gradient_is_that_of_finite_differences() -> None:
    x = image(1, 1, 8, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: upscale(downscale(a, 2), 3), (x,))


def test_taps_first_made_in_inference_mode_serve_a_later_gradient() -> None:
    with torch.inference_mode():
        upscale(image(1, 1, 19, 23), 2)
    x = image(1, 1, 19, 23).requires_grad_()
    upscale(x, 2).sum().backward()
    assert x.grad is not None and float(x.grad.sum()) == pytest.approx(19 * 23 * 4)


def test_pixels_are_resized_as_their_tensor() -> None:
    hwc = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    expected = downscale(torch.from_numpy(hwc.astype(np.float64)).permute(2, 0, 1)[None], 4)[0].permute(1, 2, 0)
    assert np.array_equal(downscale_pixels(hwc, 4), expected.numpy())
    assert np.array_equal(downscale_pixels(hwc[..., 1], 4), expected.numpy()[..., 1])


@pytest.mark.parametrize(("shape", "name"), [((1, 1, 10, 8), "height is 10 px"), ((1, 1, 8, 10), "width is 10 px")])
def test_a_side_that_the_scale_does_not_divide_is_refused_by_name(shape: tuple[int, ...], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: it must be a positive multiple of scale 4; crop"):
        downscale(torch.zeros(shape), 4)


def test_other_mistakes_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="kernel is 'lanczos'"):
        resize(torch.zeros(1, 1, 4, 4), (2, 2), kernel="lanczos")
    with pytest.raises(ValueError, match="scale is 0"):
        upscale(torch.zeros(1, 1, 4, 4), 0)
    with pytest.raises(ValueError, match="x is torch.uint8"):
        resize(torch.zeros(1, 1, 4, 4, dtype=torch.uint8), (2, 2))
    with pytest.raises(ValueError, match="out_size is 0"):
        resize(torch.zeros(1, 1, 4, 4), (0, 2))

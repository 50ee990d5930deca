"""Laws of the resizing in MATLAB's convention."""

import hashlib
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffsr_core.metrics import psnr, rgb_to_y
from diffsr_core.resize import (
    _exact_dtype,
    adjoint,
    downscale,
    downscale_pixels,
    imresize,
    rescale,
    resize,
    resize_pixels,
    round_trip,
    upscale,
)
from diffsr_core.taps import kernel_value, phase_taps, resize_weights

DATA = Path(__file__).parents[2] / "../shared/data"
needs_matlab = pytest.mark.skipif(not (DATA / "matlab").is_dir(), reason="no MATLAB pairs in ../shared/data/matlab")
needs_set5 = pytest.mark.skipif(not (DATA / "test/set5").is_dir(), reason="no Set5 in ../shared/data/test/set5")


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


sides = st.integers(1, 23)
scales = st.builds(Fraction, st.integers(1, 9), st.integers(1, 9))
kernels = st.sampled_from(["bicubic", "bilinear"])
NARROW = {(2, "bicubic"), (4, "bicubic"), (2, "bilinear"), (4, "bilinear"), (8, "bilinear"), (16, "bilinear")}


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


def test_taps_beyond_the_border_are_mirrored_or_replicated() -> None:
    assert resize_weights(3, 6)[0][:2].tolist() == [[1, 0, 0, 1], [0, 0, 1, 2]]
    assert resize_weights(3, 6, border="replicate")[0][:2].tolist() == [[0, 0, 0, 1], [0, 0, 1, 2]]


def matlab_matrix(size: int, scale: float, kernel: str) -> np.ndarray:
    """contributions() of imresize.m, written again as loops in floating point, 1-based as there."""

    def value(x: float) -> float:
        d = abs(x)
        if kernel == "bilinear":
            return max(0.0, 1 - d)
        return (1.5 * d**3 - 2.5 * d**2 + 1) if d <= 1 else (-0.5 * d**3 + 2.5 * d**2 - 4 * d + 2) if d <= 2 else 0.0

    shrink = min(scale, 1.0)
    width = (4 if kernel == "bicubic" else 2) / shrink
    mirrored = [*range(size), *reversed(range(size))]
    matrix = np.zeros((math.ceil(size * scale - 1e-9), size))
    for row in range(matrix.shape[0]):
        u = (row + 1) / scale + 0.5 * (1 - 1 / scale)
        left = math.floor(u - width / 2)
        for tap in range(left, left + math.ceil(width) + 2):
            matrix[row, mirrored[(tap - 1) % (2 * size)]] += shrink * value(shrink * (u - tap))
    return matrix / matrix.sum(axis=1, keepdims=True)


@settings(max_examples=60, deadline=None)
@given(height=sides, width=sides, scale=scales, kernel=kernels)
def test_rescale_is_imresize_of_matlab_for_any_rational_scale(height, width, scale, kernel) -> None:
    x = image(1, 2, height, width)
    rows, columns = (matlab_matrix(size, float(scale), kernel) for size in (height, width))
    got = rescale(x, scale, kernel=kernel)
    assert got.shape[2:] == (math.ceil(height * scale), math.ceil(width * scale))
    assert np.abs(got.numpy() - rows @ x.numpy() @ columns.T).max() < 1e-12


def test_rescale_places_the_outputs_by_the_scale_and_resize_by_the_sizes() -> None:
    # 41 px at scale 1/2 are 21: output 5 lies at 2 * 5.5 - 0.5 by the scale, at 41 / 21 * 5.5 - 0.5 by the sizes.
    ramp = torch.arange(41, dtype=torch.float64).view(1, 1, 41, 1)
    assert float(rescale(ramp, Fraction(1, 2))[0, 0, 5, 0]) == pytest.approx(10.5, abs=1e-12)
    assert float(resize(ramp, (21, 1))[0, 0, 5, 0]) == pytest.approx(41 / 21 * 5.5 - 0.5, abs=0.01)


@pytest.mark.parametrize("scale", [1, 2, 3, 5])
def test_rescale_by_a_whole_number_or_its_inverse_has_the_bits_of_upscale_and_downscale(scale: int) -> None:
    x = image(2, 3, 15, 30 * scale, dtype=torch.float32)
    assert torch.equal(rescale(x, scale), upscale(x, scale))
    y = image(1, 2, 7 * scale, 4 * scale, dtype=torch.float32)
    assert torch.equal(rescale(y, Fraction(1, scale)), downscale(y, scale))


@pytest.mark.parametrize(
    ("dtype", "digest"), [(torch.float32, "fd50aa7b94943f4b"), (torch.float64, "56cd6aeadfaf38ea")]
)
def test_bits_are_those_of_the_first_release(dtype: torch.dtype, digest: str) -> None:
    # Made by this project's commit fee97fe: published files depend on these bits.
    x = ((torch.arange(2 * 3 * 24 * 36) * 7919) % 1009).reshape(2, 3, 24, 36).to(dtype) / 1009
    made = (downscale(x, 4), upscale(x, 3), resize(x, (17, 50)), downscale(x, 2, kernel="bilinear"))
    assert hashlib.sha256(b"".join(y.numpy().tobytes() for y in made)).hexdigest()[:16] == digest


PUBLISHED = [("A_set5_x4", 4, "{}x4.png"), *((f"B_set5_x{scale}", scale, "{}.png") for scale in (2, 3, 4))]


@needs_matlab
@pytest.mark.parametrize(("folder", "scale", "lr_name"), PUBLISHED)
def test_published_files_are_reproduced_bit_for_bit_by_their_flavour_alone(folder, scale, lr_name) -> None:
    files = sorted((DATA / "matlab" / folder / "HR").iterdir())
    assert len(files) == 5
    for path in files:
        hr, lr = pixels(path), pixels(path.parents[1] / "LR" / lr_name.format(path.stem))
        same = {flavour: np.array_equal(imresize(hr, Fraction(1, scale), flavour=flavour), lr) for flavour in "ABC"}
        assert same == {flavour: flavour == folder[0] for flavour in "ABC"}, path.name


@needs_matlab
def test_matlab_lr_of_baboon_is_reproduced_bit_for_bit_by_flavour_c_alone() -> None:
    folder = DATA / "matlab/C_baboon_x4"
    hr, lr = pixels(folder / "gt_baboon.png"), pixels(folder / "lq_baboon_x4.png")
    same = {flavour: np.array_equal(imresize(hr, Fraction(1, 4), flavour=flavour), lr) for flavour in "ABC"}
    assert same == {"A": False, "B": False, "C": True}
    assert np.array_equal(np.floor(np.clip(downscale_pixels(hr, 4), 0, 255) + 0.5), lr)


@settings(max_examples=20, deadline=None)
@given(height=sides, width=sides, scale=scales, flavour=st.sampled_from("ABC"), dtype=st.sampled_from(["u1", "u2"]))
def test_imresize_keeps_type_and_channels_and_a_flat_image(height, width, scale, flavour, dtype) -> None:
    flat = np.full((height, width, 5), 200, dtype=dtype)
    got = imresize(flat, scale, flavour=flavour)
    assert got.dtype == flat.dtype and got.shape == (math.ceil(height * scale), math.ceil(width * scale), 5)
    assert (got == 200).all() and np.array_equal(imresize(flat[..., 0], scale, flavour=flavour), got[..., 0])


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


@settings(max_examples=80, deadline=None)
@given(size=st.tuples(sides, sides), to=st.tuples(sides, sides), channels=st.integers(1, 5), kernel=kernels)
def test_the_adjoint_of_resize_is_its_exact_transpose(size, to, channels, kernel) -> None:
    x, y = 2 * image(2, channels, *size) - 1, 2 * image(2, channels, *to).flip(0, 3) - 1
    left = (resize(x, to, kernel=kernel) * y).sum()
    assert abs(left - (x * adjoint(y, size, kernel=kernel)).sum()) < 1e-10


@settings(max_examples=80, deadline=None)
@given(size=st.tuples(sides, sides), scale=scales, channels=st.integers(1, 5), kernel=kernels)
def test_the_adjoint_of_rescale_is_its_exact_transpose(size, scale, channels, kernel) -> None:
    x = 2 * image(1, channels, *size) - 1
    made = rescale(x, scale, kernel=kernel)
    y = 2 * image(*made.shape).flip(1, 3) - 1
    assert abs((made * y).sum() - (x * adjoint(y, size, kernel=kernel, scale=scale)).sum()) < 1e-10


def test_the_adjoint_of_a_row_is_the_transposed_matrix_computed_by_hand() -> None:
    # The halving of 4 px by the triangle, mirrored at both ends, is [[4, 3, 1, 0], [0, 1, 3, 4]] / 8.
    y = torch.tensor([8.0, 800.0], dtype=torch.float64).view(1, 1, 2, 1)
    assert adjoint(y, (4, 1), kernel="bilinear").flatten().tolist() == [4.0, 103.0, 301.0, 400.0]
    assert torch.equal(adjoint(y, (2, 1)), y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_gradient_is_the_adjoint_bit_for_bit_and_its_gradient_is_resize(dtype: torch.dtype) -> None:
    x, y = image(2, 3, 9, 14).to(dtype).requires_grad_(), image(2, 3, 21, 5).to(dtype).requires_grad_()
    (gradient,) = torch.autograd.grad(resize(x, (21, 5)), x, y)
    assert torch.equal(gradient, adjoint(y, (9, 14))) and gradient.dtype == dtype
    (back,) = torch.autograd.grad(adjoint(y, (9, 14)), y, x)
    assert torch.equal(back, resize(x, (21, 5)))


@pytest.mark.parametrize("kernel", ["bicubic", "bilinear", "lanczos3"])
@pytest.mark.parametrize("scale", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("size", [(1, 2), (5, 9), (24, 17)])
def test_a_round_trip_is_both_resizes_and_so_is_its_gradient(scale: int, kernel: str, size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    found, expected = (
        round_trip(x, scale, kernel=kernel),
        downscale(upscale(x, scale, kernel=kernel), scale, kernel=kernel),
    )
    assert (found - expected).abs().max() < 1e-14
    weights = torch.randn_like(found)
    gradients = [torch.autograd.grad((y * weights).sum(), x)[0] for y in (found, expected)]
    assert (gradients[0] - gradients[1]).abs().max() < 1e-14


def test_a_window_of_a_round_trip_has_the_bits_of_the_whole() -> None:
    x = torch.randn(1, 3, 40, 50)
    window = round_trip(x[:, :, 7:31, 11:40], 4)
    assert torch.equal(window[:, :, 4:-4, 4:-4], round_trip(x, 4)[:, :, 11:27, 15:36])


def test_the_gradient_does_not_change_with_the_batch() -> None:
    y = image(4, 3, 9, 11, dtype=torch.float32)
    assert torch.equal(adjoint(y, (36, 44)), torch.cat([adjoint(one[None], (36, 44)) for one in y]))


def test_gradient_of_the_gradient_is_that_of_finite_differences() -> None:
    x = image(1, 1, 5, 4).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda a: rescale(a, Fraction(3, 2)).pow(2), (x,))


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
    assert np.array_equal(resize_pixels(hwc, (3, 4)), expected.numpy())


@settings(max_examples=150, deadline=None)
@given(
    scale=st.integers(1, 8),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    channels=st.sampled_from([0, 1, 2, 3, 5]),
    dtype=st.sampled_from(["u1", "u2", "f4", "f8"]),
    kernel=kernels,
)
def test_pixels_are_reduced_to_the_bits_of_the_tensor(scale, size, channels, dtype, kernel) -> None:
    shape = (size[0] * scale, size[1] * scale, *([channels] if channels else []))
    draw = np.random.default_rng(scale)
    x = (
        draw.normal(0, 300, shape).astype(dtype)
        if dtype[0] == "f"
        else draw.choice([0, 1, 254, 255], shape).astype(dtype)
    )
    planes = torch.from_numpy(np.atleast_3d(x).astype(np.float64)).permute(2, 0, 1)[None].contiguous()
    expected = downscale(planes, scale, kernel=kernel)[0].permute(1, 2, 0).contiguous().numpy()
    got = downscale_pixels(x, scale, kernel=kernel)
    assert got.dtype == np.float64 and got.shape == (*size, *shape[2:])
    assert got.tobytes() == expected.tobytes()
    assert downscale_pixels(x[::-1, ::-1], scale, kernel=kernel).flags.c_contiguous


def test_blocks_of_rows_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).integers(0, 65536, (400, 36, 3), dtype=np.uint16)
    whole = downscale_pixels(x, 4)
    monkeypatch.setattr("diffsr_core.resize._BLOCK_SAMPLES", 1)
    assert np.array_equal(downscale_pixels(x, 4), whole)


def test_pixels_at_scale_1_are_a_copy() -> None:
    x = np.ones((3, 4))
    assert np.array_equal(downscale_pixels(x, 1), x) and not np.shares_memory(downscale_pixels(x, 1), x)


@pytest.mark.parametrize("kernel", ["bicubic", "bilinear"])
@pytest.mark.parametrize("scale", [2, 3, 4, 5, 8, 16])
def test_narrow_sums_are_taken_only_where_they_are_exact(scale: int, kernel: str) -> None:
    # Exact in rationals: every partial sum of the largest pixels, whatever their order, fits 24 bits.
    weights = phase_taps(scale, scale, kernel=kernel).weights
    step = math.lcm(*(Fraction(weight).denominator for weight in weights))
    fits = 255 * sum(abs(Fraction(weight)) for weight in weights) * step < 2**24
    assert (_exact_dtype(np.dtype(np.uint8), weights) == np.float32) <= fits
    assert (_exact_dtype(np.dtype(np.uint8), weights) == np.float32) == ((scale, kernel) in NARROW)
    assert _exact_dtype(np.dtype(np.uint16), weights) == _exact_dtype(np.dtype(np.int8), weights) == np.float64


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
    for scale in (0, Fraction(-1, 2), 0.5, True):
        with pytest.raises(ValueError, match=r"^scale is .*: it must be a positive Fraction or whole number; write Fr"):
            rescale(torch.zeros(1, 1, 4, 4), scale)
    with pytest.raises(ValueError, match="y is 2x3 px: it must have the size that scale 1/2 makes of 4x4 px"):
        adjoint(torch.zeros(1, 1, 2, 3), (4, 4), scale=Fraction(1, 2))
    with pytest.raises(ValueError, match="y is torch.int64"):
        adjoint(torch.zeros(1, 1, 2, 2, dtype=torch.int64), (4, 4))
    with pytest.raises(ValueError, match="border is 'wrap'"):
        resize_weights(4, 2, border="wrap")
    with pytest.raises(ValueError, match="flavour is 'D'"):
        imresize(np.zeros((4, 4), np.uint8), Fraction(1, 2), flavour="D")
    with pytest.raises(ValueError, match="pixels is float64"):
        imresize(np.zeros((4, 4)), Fraction(1, 2))
    with pytest.raises(ValueError, match=r"pixels has shape \(4,\)"):
        downscale_pixels(np.zeros(4), 2)


def test_lanczos_is_pillows_away_from_the_border() -> None:
    x = image(1, 1, 40, 48)
    for size in ((120, 144), (10, 12)):
        ours = resize(x, size, kernel="lanczos3")[0, 0].numpy()
        theirs = Image.fromarray(x[0, 0].numpy().astype(np.float32)).resize(size[::-1], Image.Resampling.LANCZOS)
        margin = 12 if size[0] > 40 else 3  # Pillow leaves out what lies beyond the border, MATLAB mirrors it
        inner = (slice(margin, -margin), slice(margin, -margin))
        assert np.allclose(ours[inner], np.asarray(theirs)[inner], atol=2e-6)


def test_lanczos_has_its_closed_form_values() -> None:
    at = torch.tensor([0.0, 1.0, -2.0, 3.0, 3.5, 1.5], dtype=torch.float64)
    middle = math.sin(1.5 * math.pi) / (1.5 * math.pi) * math.sin(0.5 * math.pi) / (0.5 * math.pi)
    assert np.allclose(kernel_value(at, "lanczos3").numpy(), [1, 0, 0, 0, 0, middle], atol=1e-15)

"""Antialiased bicubic, bilinear and Lanczos resizing in the convention of MATLAB's imresize, and its adjoint.

Three flavours of "MATLAB bicubic" are in use. On tensors this is flavour C: float arithmetic throughout, a symmetric
border, and rounding, if any, is the caller's; `imresize` has all three, on pixels. Each output value is a fixed
sequence of IEEE multiplications and additions over its taps: no matrix product, no fused or atomic sum, so its bits do
not depend on batch, tile or thread. The gradient is such a sequence too, over the transposed taps.
"""

import math
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffsr_core.taps import (
    Border,
    Kernel,
    checked_scale,
    phase_taps,
    resize_weights,
    round_trip_taps,
    transpose_taps,
)

Flavour = Literal["A", "B", "C"]

# Samples that a pass makes at once: 0.5 MiB of float64 stay in the cache.
_BLOCK_SAMPLES = 1 << 16


def resize(x: Tensor, size: tuple[int, int], *, kernel: Kernel = "bicubic") -> Tensor:
    """Return x (N, C, H, W) resized to (N, C, *size), same dtype and device, differentiable, not clipped.

    A size that is already right returns x itself. Float32 and float64 are computed as they are, narrower floats in
    float32. The dimension with the smaller scale goes first, rows first where equal, as in MATLAB.
    Raises ValueError for an x that is not a floating-point NCHW tensor, or a size below 1.
    """
    _check_image(x)
    height, width = size
    plans = (_Plan(x.shape[2], height, kernel), _Plan(x.shape[3], width, kernel))
    return _separable(x, plans, rows_first=height * x.shape[3] <= width * x.shape[2])


def rescale(x: Tensor, scale: Fraction | int, *, kernel: Kernel = "bicubic") -> Tensor:
    """Return x (N, C, H, W) as MATLAB's imresize(x, scale): (N, C, ceil(H * scale), ceil(W * scale)); see resize.

    The taps follow the scale, not the quotient of the sizes. Raises ValueError for an x that is not a floating-point
    NCHW tensor, or a scale that is not a positive Fraction or whole number.
    """
    _check_image(x)
    ratio = checked_scale(scale)
    plans = [_Plan(size, math.ceil(size * ratio), kernel, ratio) for size in x.shape[2:]]
    return _separable(x, (plans[0], plans[1]), rows_first=True)


def adjoint(
    y: Tensor, size: tuple[int, int], *, kernel: Kernel = "bicubic", scale: Fraction | int | None = None
) -> Tensor:
    """Return A* y (N, C, *size), where A is resize from size to that of y (N, C, h, w), or rescale by the scale given.

    <A x, y> = <x, A* y> for all x; the gradient of resize is this, and its gradient is resize. Same dtype as y.
    Raises ValueError for a y that is not a floating-point NCHW tensor, a size below 1, or a y that the scale would not
    give.
    """
    _check_image(y, "y")
    ratio = None if scale is None else checked_scale(scale)
    if ratio is not None and tuple(math.ceil(side * ratio) for side in size) != tuple(y.shape[2:]):
        raise ValueError(
            f"y is {y.shape[2]}x{y.shape[3]} px: it must have the size that scale {ratio} makes of "
            f"{size[0]}x{size[1]} px; check the size, or leave the scale out"
        )
    plans = (_Plan(size[0], y.shape[2], kernel, ratio), _Plan(size[1], y.shape[3], kernel, ratio))
    columns_last = y.shape[2] * size[1] <= y.shape[3] * size[0]
    return _separable(y, plans, rows_first=not columns_last, transposed=True)


def downscale(x: Tensor, scale: int, *, kernel: Kernel = "bicubic") -> Tensor:
    """Return x (N, C, H, W) reduced to (N, C, H / scale, W / scale) with the antialiased kernel; see resize.

    Raises ValueError for a scale below 1, or a height or width that is not a multiple of it.
    """
    _check_scale(scale)
    height, width = x.shape[-2:]
    check_divisible(height, width, scale)
    return resize(x, (height // scale, width // scale), kernel=kernel)


def upscale(x: Tensor, scale: int, *, kernel: Kernel = "bicubic") -> Tensor:
    """Return x (N, C, H, W) enlarged to (N, C, H * scale, W * scale), not clipped; see resize.

    Raises ValueError for a scale below 1.
    """
    _check_scale(scale)
    return resize(x, (x.shape[-2] * scale, x.shape[-1] * scale), kernel=kernel)


def round_trip(x: Tensor, scale: int, *, kernel: Kernel = "bicubic") -> Tensor:
    """Return downscale(upscale(x)), (N, C, H, W), within rounding: one pass a dimension, and nothing of the large size.

    Raises ValueError for a scale below 1.
    """
    _check_image(x)
    _check_scale(scale)
    plans = [_Plan(size, size, kernel, Fraction(scale), round_trip=True) for size in x.shape[2:]]
    return _separable(x, (plans[0], plans[1]), rows_first=True)


def resize_pixels(pixels: NDArray[Any], size: tuple[int, int], *, kernel: Kernel = "bicubic") -> NDArray[np.float64]:
    """Return HW or HWC pixels resized to size, float64 in their own range, neither rounded nor clipped; see resize.

    Raises ValueError for another number of dimensions, or a size below 1.
    """
    with torch.no_grad():
        return _to_pixels(resize(_to_tensor(pixels), size, kernel=kernel), pixels.ndim)


def downscale_pixels(pixels: NDArray[Any], scale: int, *, kernel: Kernel = "bicubic") -> NDArray[np.float64]:
    """Return the float64 downscale of HW or HWC pixels, in the range of the pixels, neither rounded nor clipped.

    The bits of downscale on their float64 tensor in less than half its time; of a large image only a block of rows at a
    time is float64. Raises ValueError for another number of dimensions, and as downscale does.
    """
    _check_pixels(pixels)
    _check_scale(scale)
    height, width = pixels.shape[:2]
    check_divisible(height, width, scale)
    if scale == 1:
        return np.array(pixels, dtype=np.float64, order="C")
    channels = math.prod(pixels.shape[2:])
    rows, columns = phase_taps(height, scale, kernel=kernel), phase_taps(width, scale, kernel=kernel)
    samples = (columns.gathered[:, :, None] * channels + np.arange(channels)).reshape(scale, -1)
    lines = pixels.reshape(height, width * channels)
    out = np.empty((height // scale, width // scale * channels))
    halo, step = rows.gathered.shape[1] - len(out), max(8, _BLOCK_SAMPLES // max(1, width * channels))
    dtype = _exact_dtype(pixels.dtype, rows.weights)
    for top in range(0, len(out), step):
        part = out[top : top + step]
        down = lines[rows.gathered[:, top : top + len(part) + halo]].astype(dtype, copy=False)
        reduced = _weighted_sum([down[p, i : i + len(part)] for p, i in rows.phases], rows.weights)
        across = np.take(reduced, samples, axis=1).astype(np.float64, copy=False)
        starts = [(p, i * channels) for p, i in columns.phases]
        part[:] = _weighted_sum([across[:, p, i : i + part.shape[1]] for p, i in starts], columns.weights)
    return out.reshape(height // scale, width // scale, *pixels.shape[2:])


def imresize(
    pixels: NDArray[Any], scale: Fraction | int, *, kernel: Kernel = "bicubic", flavour: Flavour = "C"
) -> NDArray[Any]:
    """Return MATLAB's imresize(pixels, scale) as published files have it: HW or HWC in the type of the pixels.

    flavour: "A" and "B" round to integers between the two passes, rows first; B replicates the border instead of
    mirroring it. "C" rounds once, at the end (imresize of a double image, then im2uint8). In natural images A and C
    differ in 10 to 15 % of the samples, by 1.
    Raises ValueError for pixels that are not uint8 or uint16 HW or HWC, another flavour, and as rescale does.
    """
    if pixels.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"pixels is {pixels.dtype}: it must be uint8 or uint16; resize floats with resize_pixels")
    if flavour not in ("A", "B", "C"):
        raise ValueError(f"flavour is {flavour!r}: it must be A, B or C; C is the default")
    x, ratio = _to_tensor(pixels), checked_scale(scale)
    border: Border = "replicate" if flavour == "B" else "symmetric"
    with torch.no_grad():
        for _ in range(2):
            # The transpose lets one pass serve both dimensions.
            x = _pass(x, _Plan(x.shape[2], math.ceil(x.shape[2] * ratio), kernel, ratio, border)).mT
            if flavour != "C":
                x = torch.from_numpy(round_pixels(x.numpy(), pixels.dtype).astype(np.float64))
    return round_pixels(_to_pixels(x, pixels.ndim), pixels.dtype)


def round_pixels(values: NDArray[np.float64], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return values rounded once, halves away from zero as MATLAB does (numpy rounds them to even), and clipped."""
    clipped = np.clip(values, 0.0, float(np.iinfo(dtype).max))
    whole = np.floor(clipped)
    # Not floor(x + 0.5): that sum rounds the largest number below one half up to 1.
    return (whole + (clipped - whole >= 0.5)).astype(dtype)


def check_divisible(height: int, width: int, scale: int) -> None:
    """Raise ValueError unless both sides, in px, are positive multiples of the scale."""
    for name, value in (("height", height), ("width", width)):
        if value % scale or value == 0:
            raise ValueError(
                f"{name} is {value} px: it must be a positive multiple of scale {scale}; "
                "crop the image first (degradation.crop_to_multiple)"
            )


def _check_scale(scale: int) -> None:
    if scale < 1:
        raise ValueError(f"scale is {scale}: it must be a whole number of at least 1; 2, 3, 4 and 8 are usual")


def _check_image(x: Tensor, name: str = "x") -> None:
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(
            f"{name} is {x.dtype} of shape {tuple(x.shape)}: it must be a floating-point (N, C, H, W) tensor; "
            "convert pixels with .to(torch.float32) and add the missing dimensions"
        )


def _check_pixels(pixels: NDArray[Any]) -> None:
    if pixels.ndim not in (2, 3):
        raise ValueError(f"pixels has shape {pixels.shape}: it must be HW or HWC; pass one image at a time")


def _exact_dtype(dtype: np.dtype[Any], weights: tuple[float, ...]) -> type[np.floating[Any]]:
    """Return the type for the weighted sums of pixels of a type: the narrowest that has the bits of float64.

    uint8 times weights that are whole multiples of 2**-15 (scales 2 and 4, bilinear 8): products and sums below 2**9
    need no more than the 24 bits of float32, so nothing is ever rounded, and half the bytes take half the time.
    """
    whole = all((weight * 2**15).is_integer() for weight in weights)
    return np.float32 if dtype == np.uint8 and whole and 255 * sum(map(abs, weights)) < 2**9 else np.float64


def _weighted_sum(samples: list[NDArray[Any]], weights: tuple[float, ...]) -> NDArray[Any]:
    """Return the sum of samples times weights, one after the other as in _Pass."""
    total = samples[0] * weights[0]
    product = np.empty_like(total)
    for sample, weight in zip(samples[1:], weights[1:], strict=True):
        np.multiply(sample, weight, out=product)
        total += product
    return total


def _to_tensor(pixels: NDArray[Any]) -> Tensor:
    _check_pixels(pixels)
    planes = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(planes, dtype=np.float64))[None]


def _to_pixels(x: Tensor, ndim: int) -> NDArray[np.float64]:
    planes: NDArray[np.float64] = x[0].numpy()
    return planes[0] if ndim == 2 else np.ascontiguousarray(planes.transpose(1, 2, 0))


class _Plan(NamedTuple):
    """One pass along one dimension."""

    in_size: int
    out_size: int
    kernel: Kernel
    scale: Fraction | None = None
    border: Border = "symmetric"
    round_trip: bool = False  # enlarged by the scale, and reduced again

    @property
    def is_identity(self) -> bool:
        return self.in_size == self.out_size and self.scale in (None, 1)

    def taps(self) -> tuple[Tensor, Tensor]:
        """Return indices and weights, (out_size, K) each."""
        if self.round_trip and self.scale is not None:
            return round_trip_taps(self.in_size, int(self.scale), kernel=self.kernel)
        return resize_weights(self.in_size, self.out_size, kernel=self.kernel, scale=self.scale, border=self.border)


def _separable(x: Tensor, plans: tuple[_Plan, _Plan], *, rows_first: bool, transposed: bool = False) -> Tensor:
    """Return x after both passes, or after their transposes, in its own dtype."""
    out = x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)
    for dim in (2, 3) if rows_first else (3, 2):
        # Columns are resized as the rows of the transpose, which copies whole rows: 2 to 4 times faster, same bits.
        plan = plans[dim - 2]
        out = _pass(out, plan, transposed) if dim == 2 else _pass(out.mT, plan, transposed).mT
    return out.to(x.dtype).contiguous()


def _pass(x: Tensor, plan: _Plan, transposed: bool = False) -> Tensor:
    if plan.is_identity:
        return x
    if not (torch.is_grad_enabled() and x.requires_grad):  # autograd's own wrapping costs as much as a small image
        return _Pass.forward(x, plan, transposed)
    passed: Tensor = _Pass.apply(x, plan, transposed)  # type: ignore[no-untyped-call]
    return passed


class _Pass(torch.autograd.Function):
    """A plan along the rows of (N, C, H, W), tap by tap, in blocks that stay in the cache.

    At 2048 px a projection takes 0.6 of its time in whole images; 0.8 where the heap keeps the memory of these.
    Autograd would record each tap and add its gradient into a new zero tensor, on CUDA with atomics; the gradient is
    the transposed pass instead. Two dense float32 matrix products were measured against the taps (one thread, 3
    channels, ms): 512 -> 128 px 2.3 taps, 3.3 products; 128 -> 512 px 3.7, 3.1; 256 -> 64 px 0.6, 0.3; 1024 -> 256 px
    12, 22. With backward 6.0, 6.6; 6.8, 6.5; 1.6, 0.8; 24, 47. A product's bits depend on batch, tile and thread count
    (law 3), so the taps stay.
    """

    @staticmethod
    def forward(x: Tensor, plan: _Plan, transposed: bool) -> Tensor:
        indices, weights = _taps(plan, transposed, x.dtype, x.device)
        x = x.contiguous()
        size, row = len(indices[0]), max(1, x[:, :, 0].numel())
        out = x.new_empty(*x.shape[:2], size, x.shape[3])
        height = size if x.is_cuda else max(8, _BLOCK_SAMPLES // row)
        for block in (slice(top, top + height) for top in range(0, size, height)):
            rows = out[:, :, block]
            tap = x.index_select(2, indices[0][block])
            torch.mul(tap, weights[0][block], out=rows)
            for index, weight in zip(indices[1:], weights[1:], strict=True):
                # Not addcmul: a fused multiply-add rounds once in vector lanes and twice in the scalar tail.
                rows.add_(torch.index_select(x, 2, index[block], out=tap).mul_(weight[block]))
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, _Plan, bool], output: Tensor) -> None:
        _, ctx.plan, ctx.transposed = inputs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return _pass(grad_outputs[0], ctx.plan, not ctx.transposed), None, None


@lru_cache(maxsize=256)
def _taps(
    plan: _Plan, transposed: bool, dtype: torch.dtype, device: torch.device
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return the taps on a device: K indices (out_size,), K weights (out_size, 1). Kept: a copy stalls the device."""
    with torch.inference_mode(False), torch.no_grad():
        indices, weights = plan.taps()
        if transposed:
            indices, weights = transpose_taps(indices, weights, plan.in_size)
        return (
            tuple(column.contiguous().to(device) for column in indices.T),
            tuple(column[:, None].contiguous().to(device=device, dtype=dtype) for column in weights.T),
        )

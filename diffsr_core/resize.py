"""Antialiased bicubic and bilinear resizing in the convention of MATLAB's imresize, flavour C.

Three flavours of "MATLAB bicubic" are in use. This is the one of float arithmetic throughout and a symmetric border;
rounding, if any, is the caller's and happens once. Each output value is a fixed sequence of IEEE multiplications and
additions over its taps: no matrix product, no fused or atomic sum, so its bits do not depend on batch, tile or thread.
"""

import math
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Kernel = Literal["bicubic", "bilinear"]

# Width of each kernel before it is widened.
_SUPPORT_PX: dict[str, int] = {"bicubic": 4, "bilinear": 2}


def kernel_value(x: Tensor, kernel: Kernel) -> Tensor:
    """Return the kernel at distance x, in source px: Keys' cubic with a = -0.5, or the triangle.

    Raises ValueError for another name. Source: R. Keys, "Cubic convolution interpolation", 1981, equation 15.
    """
    d = x.abs()
    if kernel == "bicubic":
        near = (1.5 * d - 2.5) * d * d + 1.0
        far = ((-0.5 * d + 2.5) * d - 4.0) * d + 2.0
        return torch.where(d <= 1, near, torch.where(d <= 2, far, torch.zeros_like(d)))
    if kernel == "bilinear":
        return (1.0 - d).clamp_min(0.0)
    raise ValueError(f"kernel is {kernel!r}: it must be one of {sorted(_SUPPORT_PX)}; choose one of them")


@lru_cache(maxsize=256)
def resize_weights(in_size: int, out_size: int, *, kernel: Kernel = "bicubic") -> tuple[Tensor, Tensor]:
    """Return the taps of each output position: indices int64 (out_size, K) and weights float64 (out_size, K).

    Each row of weights sums to 1 and keeps straight lines straight when it enlarges or shrinks by a whole number. The
    kernel is widened by in_size / out_size when that is over 1; indices beyond the border are mirrored (edge sample
    repeated). The tensors are shared between callers: do not write into them.
    Raises ValueError for a size below 1 or another kernel name. Source: contributions() in MATLAB's imresize.m.
    """
    for name, value in (("in_size", in_size), ("out_size", out_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}: a side must be at least 1 px; check the size that was asked for")
    if kernel not in _SUPPORT_PX:
        raise ValueError(f"kernel is {kernel!r}: it must be one of {sorted(_SUPPORT_PX)}; choose one of them")
    # Tensors born in inference mode could not take part in a later backward pass, and these outlive the call.
    with torch.inference_mode(False), torch.no_grad():
        # Centres and distances are whole multiples of 1 / (2 out_size) source px. As integers they are exact, so equal
        # phases have equal weights wherever they lie, and a window gets the bits of the whole.
        support, widest = _SUPPORT_PX[kernel], max(in_size, out_size)
        centre = (2 * torch.arange(out_size) + 1) * in_size - out_size
        left = torch.div(centre - support * widest, 2 * out_size, rounding_mode="floor")
        position = left[:, None] + torch.arange(math.ceil(support * widest / out_size) + 2)
        distance = (centre[:, None] - position * (2 * out_size)).to(torch.float64) / (2 * widest)
        weights = kernel_value(distance, kernel)
        weights = weights / weights.sum(dim=1, keepdim=True)
        indices = position % (2 * in_size)
        indices = torch.where(indices < in_size, indices, 2 * in_size - 1 - indices)
        used = (weights != 0).any(dim=0)
        return indices[:, used].contiguous(), weights[:, used].contiguous()


def resize(x: Tensor, size: tuple[int, int], *, kernel: Kernel = "bicubic") -> Tensor:
    """Return x (N, C, H, W) resized to (N, C, *size), same dtype and device, differentiable, not clipped.

    A size that is already right returns x itself. Float32 and float64 are computed as they are, narrower floats in
    float32. The dimension with the smaller scale goes first, rows first where equal, as in MATLAB. The backward pass
    adds with atomics on CUDA; the forward pass does not.
    Raises ValueError for an x that is not a floating-point NCHW tensor, or a size below 1.
    """
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(
            f"x is {x.dtype} of shape {tuple(x.shape)}: it must be a floating-point (N, C, H, W) tensor; "
            "convert pixels with .to(torch.float32) and add the missing dimensions"
        )
    height, width = size
    out = x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)
    rows_first = height * x.shape[3] <= width * x.shape[2]
    for dim in (2, 3) if rows_first else (3, 2):
        # Columns are resized as the rows of the transpose, which copies whole rows: 2 to 4 times faster, same bits.
        out = _resize_rows(out, height, kernel) if dim == 2 else _resize_rows(out.mT, width, kernel).mT
    return out.to(x.dtype).contiguous()


def downscale(x: Tensor, scale: int, *, kernel: Kernel = "bicubic") -> Tensor:
    """Return x (N, C, H, W) reduced to (N, C, H / scale, W / scale) with the antialiased kernel; see resize.

    Raises ValueError for a scale below 1, or a height or width that is not a multiple of it.
    """
    _check_scale(scale)
    height, width = x.shape[-2:]
    _check_divisible(height, width, scale)
    return resize(x, (height // scale, width // scale), kernel=kernel)


def upscale(x: Tensor, scale: int, *, kernel: Kernel = "bicubic") -> Tensor:
    """Return x (N, C, H, W) enlarged to (N, C, H * scale, W * scale), not clipped; see resize.

    Raises ValueError for a scale below 1.
    """
    _check_scale(scale)
    return resize(x, (x.shape[-2] * scale, x.shape[-1] * scale), kernel=kernel)


def downscale_pixels(pixels: NDArray[Any], scale: int, *, kernel: Kernel = "bicubic") -> NDArray[np.float64]:
    """Return the float64 downscale of HW or HWC pixels, in the range of the pixels, neither rounded nor clipped.

    Raises ValueError for another number of dimensions, and as downscale does.
    """
    if pixels.ndim not in (2, 3):
        raise ValueError(f"pixels has shape {pixels.shape}: it must be HW or HWC; pass one image at a time")
    planes = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    x = torch.from_numpy(np.ascontiguousarray(planes, dtype=np.float64))[None]
    with torch.no_grad():
        small: NDArray[np.float64] = downscale(x, scale, kernel=kernel)[0].numpy()
    return small[0] if pixels.ndim == 2 else np.ascontiguousarray(small.transpose(1, 2, 0))


def _check_scale(scale: int) -> None:
    if scale < 1:
        raise ValueError(f"scale is {scale}: it must be a whole number of at least 1; 2, 3, 4 and 8 are usual")


def _check_divisible(height: int, width: int, scale: int) -> None:
    for name, value in (("height", height), ("width", width)):
        if value % scale or value == 0:
            raise ValueError(
                f"{name} is {value} px: it must be a positive multiple of scale {scale}; "
                "crop the image first (degradation.crop_to_multiple)"
            )


def _resize_rows(x: Tensor, out_size: int, kernel: Kernel) -> Tensor:
    """Return x (N, C, H, W) with out_size rows, tap by tap: the memory is two outputs, whatever the number of taps."""
    if x.shape[2] == out_size:
        return x
    indices, weights = _taps(x.shape[2], out_size, kernel, x.dtype, x.device)
    x = x.contiguous()
    out = x.index_select(2, indices[0]).mul_(weights[0])
    for index, weight in zip(indices[1:], weights[1:], strict=True):
        # Not addcmul: a fused multiply-add rounds once in vector lanes and twice in the scalar tail.
        out.add_(x.index_select(2, index).mul_(weight))
    return out


@lru_cache(maxsize=256)
def _taps(
    in_size: int, out_size: int, kernel: Kernel, dtype: torch.dtype, device: torch.device
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return the taps on a device: K indices (out_size,), K weights (out_size, 1). Kept: a copy stalls the device."""
    with torch.inference_mode(False), torch.no_grad():
        indices, weights = resize_weights(in_size, out_size, kernel=kernel)
        return (
            tuple(column.contiguous().to(device) for column in indices.T),
            tuple(column[:, None].contiguous().to(device=device, dtype=dtype) for column in weights.T),
        )

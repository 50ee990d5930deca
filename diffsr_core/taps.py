"""Taps of a separable resize: which samples each output reads, and how much of each, as MATLAB's imresize has it."""

import math
from fractions import Fraction
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Kernel = Literal["bicubic", "bilinear", "lanczos3"]
Border = Literal["symmetric", "replicate"]

# Width of each kernel before it is widened.
_SUPPORT_PX: dict[str, int] = {"bicubic": 4, "bilinear": 2, "lanczos3": 6}


def kernel_value(x: Tensor, kernel: Kernel) -> Tensor:
    """Return the kernel at distance x, in source px: Keys' cubic with a = -0.5, the triangle, or Lanczos'
    window of three lobes. Raises ValueError for another name.

    Source: R. Keys, "Cubic convolution interpolation", 1981, equation 15; C. Duchon, "Lanczos filtering", 1979.
    """
    d = x.abs()
    if kernel == "bicubic":
        near = (1.5 * d - 2.5) * d * d + 1.0
        far = ((-0.5 * d + 2.5) * d - 4.0) * d + 2.0
        return torch.where(d <= 1, near, torch.where(d <= 2, far, torch.zeros_like(d)))
    if kernel == "bilinear":
        return (1.0 - d).clamp_min(0.0)
    if kernel == "lanczos3":
        return torch.where(d < 3, torch.sinc(d) * torch.sinc(d / 3), torch.zeros_like(d))
    raise ValueError(f"kernel is {kernel!r}: it must be one of {sorted(_SUPPORT_PX)}; choose one of them")


@lru_cache(maxsize=256)
def resize_weights(
    in_size: int,
    out_size: int,
    *,
    kernel: Kernel = "bicubic",
    scale: Fraction | None = None,
    border: Border = "symmetric",
) -> tuple[Tensor, Tensor]:
    """Return the taps of each output position: indices int64 (out_size, K) and weights float64 (out_size, K).

    scale: what places the outputs and, below 1, widens the kernel; out_size / in_size where it is None. MATLAB uses the
    scale that was given, even where rounding up out_size made the quotient another.
    Each row of weights sums to 1, and but for lanczos3 keeps straight lines straight when it enlarges or shrinks by a
    whole number.
    Indices beyond the border are mirrored (edge sample repeated), or clamped with "replicate". The tensors are shared
    between callers: do not write into them.
    Raises ValueError for a size below 1, a scale of 0 or less, or another kernel or border.
    Source: contributions() in MATLAB's imresize.m.
    """
    for name, value in (("in_size", in_size), ("out_size", out_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}: a side must be at least 1 px; check the size that was asked for")
    if kernel not in _SUPPORT_PX:
        raise ValueError(f"kernel is {kernel!r}: it must be one of {sorted(_SUPPORT_PX)}; choose one of them")
    if border not in ("symmetric", "replicate"):
        raise ValueError(f"border is {border!r}: it must be symmetric or replicate; choose one of them")
    ratio = Fraction(out_size, in_size) if scale is None else checked_scale(scale)
    up, down = ratio.numerator, ratio.denominator
    # Tensors born in inference mode could not take part in a later backward pass, and these outlive the call.
    with torch.inference_mode(False), torch.no_grad():
        # Centres and distances are whole multiples of 1 / (2 up) source px. As integers they are exact, so equal
        # phases have equal weights wherever they lie, and a window gets the bits of the whole.
        support, widest = _SUPPORT_PX[kernel], max(up, down)
        centre = (2 * torch.arange(out_size) + 1) * down - up
        left = torch.div(centre - support * widest, 2 * up, rounding_mode="floor")
        position = left[:, None] + torch.arange(math.ceil(support * widest / up) + 2)
        distance = (centre[:, None] - position * (2 * up)).to(torch.float64) / (2 * widest)
        weights = kernel_value(distance, kernel)
        weights = weights / weights.sum(dim=1, keepdim=True)
        mirrored = position % (2 * in_size)
        mirrored = torch.where(mirrored < in_size, mirrored, 2 * in_size - 1 - mirrored)
        indices = mirrored if border == "symmetric" else position.clamp(0, in_size - 1)
        used = (weights != 0).any(dim=0)
        return indices[:, used].contiguous(), weights[:, used].contiguous()


class PhaseTaps(NamedTuple):
    """The taps of a reduction by a whole number, over samples that are first gathered phase by phase.

    gathered: int64 (scale, groups), indices: row p holds every scale-th sample of the mirrored line from its p-th on,
    so that a tap of all outputs is one contiguous block. phases: (p, start) of the block of each tap; weights: its
    weight. Output i is the sum, in this order, of weight * line[gathered[p, start + i]].
    """

    gathered: NDArray[np.int64]
    phases: tuple[tuple[int, int], ...]
    weights: tuple[float, ...]


@lru_cache(maxsize=256)
def phase_taps(in_size: int, scale: int, *, kernel: Kernel = "bicubic") -> PhaseTaps:
    """Return the taps from in_size to in_size / scale samples: those of resize_weights in their order, bit for bit.

    All outputs have the same phase, and so the same weights. The array is shared between callers and read-only.
    Raises ValueError as resize_weights does.
    """
    # Output 2 of 5 has no tap beyond the border: there the indices are the positions.
    indices, weights = resize_weights(5 * scale, 5, kernel=kernel)
    first, last = int(indices[2, 0]), int(indices[2, -1])
    position = first + np.arange(scale)[:, None] + scale * np.arange(in_size // scale + (last - first) // scale)
    mirrored = (position - 2 * scale) % (2 * in_size)
    gathered = np.where(mirrored < in_size, mirrored, 2 * in_size - 1 - mirrored)
    gathered.flags.writeable = False
    phases = tuple(((index - first) % scale, (index - first) // scale) for index in indices[2].tolist())
    return PhaseTaps(gathered, phases, tuple(weights[2].tolist()))


def round_trip_taps(size: int, scale: int, *, kernel: Kernel = "bicubic") -> tuple[Tensor, Tensor]:
    """Return the taps of enlarging size samples by a whole number and reducing them again: as resize_weights gives.

    Outputs away from the border have the same weights, bit for bit, wherever they lie. Raises ValueError as it does.
    """
    (far, down), (near, up) = (
        resize_weights(a, b, kernel=kernel) for a, b in ((size * scale, size), (size, size * scale))
    )
    place = torch.arange(size)[:, None]
    offsets, weights = (near[far] - place[:, :, None]).flatten(1), (down[:, :, None] * up[far]).flatten(1)
    reach = int(offsets.abs().max())
    total = torch.zeros(size, 2 * reach + 1, dtype=torch.float64)
    for offset, weight in zip(offsets.T, weights.T, strict=True):  # one at a time: the order of a scatter is its own
        total[place[:, 0], offset + reach] += weight
    return (place + torch.arange(-reach, reach + 1)).clamp(0, size - 1), total


def transpose_taps(indices: Tensor, weights: Tensor, in_size: int) -> tuple[Tensor, Tensor]:
    """Return the taps of the transposed matrix, indices and weights (in_size, K'): what each input sample receives.

    Rows with fewer than K' taps are filled up with weights of 0.
    """
    order = indices.flatten().argsort(stable=True)
    receiver = indices.flatten()[order]
    count = receiver.bincount(minlength=in_size)
    column = torch.arange(len(order)) - (count.cumsum(0) - count)[receiver]
    shape = (in_size, int(count.max()))
    back_indices, back_weights = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.float64)
    back_indices[receiver, column] = order // indices.shape[1]
    back_weights[receiver, column] = weights.flatten()[order]
    return back_indices, back_weights


def checked_scale(scale: Fraction | int) -> Fraction:
    """Return the scale as a Fraction.

    Raises ValueError for 0 or less, and for a float: 0.3 is a fraction of 2**54, whose ceil surprises.
    """
    if isinstance(scale, bool) or not isinstance(scale, (Fraction, int)) or scale <= 0:
        raise ValueError(f"scale is {scale!r}: it must be a positive Fraction or whole number; write Fraction(3, 10)")
    return Fraction(scale)

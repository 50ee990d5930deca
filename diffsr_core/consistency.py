"""Projection of a super-resolved image onto those that shrink to its LR (law 4)."""

from torch import Tensor

from diffsr_core.resize import downscale, upscale


def project(sr: Tensor, lr: Tensor, *, scale: int, iterations: int) -> Tensor:
    """Return sr moved towards the images whose downscale is lr: (N, C, H, W) in [-1, 1], dtype of sr, differentiable.

    Each iteration is x <- clip(x + upscale(lr - downscale(x))); none returns the clipped input. A pixel is moved by
    what lies less than 4 LR px away per iteration: a tile needs that halo, or the projection runs after stitching.
    sr: (N, C, H, W), lr: (N, C, H / scale, W / scale), both in [-1, 1].
    Raises ValueError for sizes that do not fit the scale, types that differ, or a negative number of iterations.
    Source: Irani and Peleg, "Improving resolution by image registration", 1991 (iterative back-projection).
    """
    if iterations < 0:
        raise ValueError(f"iterations is {iterations}: it must be 0 or more; 0 switches the projection off")
    if (*lr.shape[:-2], lr.shape[-2] * scale, lr.shape[-1] * scale) != tuple(sr.shape):
        raise ValueError(
            f"sr has shape {tuple(sr.shape)}: it must be {scale} times lr, whose shape is {tuple(lr.shape)}, with the "
            "same batch and channels; check the scale and the crop"
        )
    if sr.dtype != lr.dtype:
        raise ValueError(f"sr is {sr.dtype} and lr is {lr.dtype}: both must be of one type; convert lr to that of sr")
    x = sr.clamp(-1.0, 1.0)
    for _ in range(iterations):
        x = (x + upscale(lr - downscale(x, scale), scale)).clamp(-1.0, 1.0)
    return x

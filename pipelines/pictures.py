"""An encoded image in, an encoded SR image out: decoding, alpha, projection, encoding and the per-asset measures."""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from diffsr_core.metrics import lr_psnr
from diffsr_core.upscaler import Upscaler, bicubic
from pipelines import storage
from pipelines.images import Picture, Refused, decode, encode, extension, output_format


class UpscaledPicture(NamedTuple):
    """The encoded result, its format and the source's, and metrics (lr_psnr in dB, colour_drift in levels of 255)."""

    data: bytes
    format: str
    source_format: str
    metrics: dict[str, float]


def target_format(source_format: str, wanted: str) -> str:
    """Return the format an image is written in: `wanted`, or with `keep` its own where we can write it."""
    return output_format(source_format) if wanted == "keep" else wanted.upper()


def upscale_picture(
    upscaler: Upscaler, data: bytes, *, format: str = "keep", quality: int = 95, max_pixels: int = 1_500_000
) -> UpscaledPicture:
    """Return the SR of an encoded image. Noise is keyed by the content's digest. Raises Refused.

    Alpha is enlarged by bicubic, colour by the model; grey stays grey; the ICC profile is kept, but a grey picture's is
    not written into a WebP, which has no grey. lr_psnr is measured on the decoded published file (law 4). What does not
    fit into memory is Refused (law 3), never tried in another shape.
    """
    try:
        return _upscale(upscaler, data, format=format, quality=quality, max_pixels=max_pixels)
    except (MemoryError, RuntimeError) as error:
        # torch has a type of its own for CUDA only; on a CPU it is a RuntimeError with these words.
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            raise Refused("upscale", "oom", f"{type(error).__name__}: {error}"[:300]) from error
        raise


def _upscale(upscaler: Upscaler, data: bytes, *, format: str, quality: int, max_pixels: int) -> UpscaledPicture:
    picture = decode(data, max_pixels=max_pixels)
    scale = upscaler.model.config.scale
    chosen = target_format(picture.format, format)
    if picture.alpha is not None and chosen == "JPEG":
        raise Refused("encode", "alpha", "JPEG cannot store its transparency; choose png, webp or tiff")
    check_channels(upscaler, picture.pixels)
    sr = upscaler(picture.pixels, digest=storage.digest_bytes(data)).sr
    alpha = None if picture.alpha is None else bicubic(picture.alpha[:, :, None], scale)[:, :, 0]
    icc = None if chosen == "WEBP" and sr.shape[2] == 1 else picture.icc
    enlarged = replace(picture, pixels=sr, alpha=alpha, icc=icc, format=chosen)
    encoded = encode(enlarged, format=chosen, quality=quality)
    published = decode(encoded, max_pixels=sr.shape[0] * sr.shape[1])
    lr = np.broadcast_to(picture.pixels, (*picture.pixels.shape[:2], published.pixels.shape[2]))  # WebP has no grey
    metrics = {
        "lr_psnr": lr_psnr(lr, published.pixels, scale=scale),
        "colour_drift": float(np.abs(means(published) - means(picture)).max()),
    }
    return UpscaledPicture(encoded, chosen, picture.format, metrics)


def check_channels(upscaler: Upscaler, pixels: np.ndarray[Any, Any]) -> None:
    """Raise Refused for an image whose channels the model does not read."""
    try:
        upscaler.check_channels(pixels)
    except ValueError as error:
        raise Refused("upscale", "channels", str(error)) from None


def means(picture: Picture) -> np.ndarray[Any, Any]:
    """Return each channel's mean, 0..255."""
    return np.asarray(picture.pixels.reshape(-1, picture.pixels.shape[2]).mean(axis=0))


def output_key(key: str, source_format: str, wanted: str) -> str:
    """Return the output key: the source's own when the format is kept, else with the new extension appended.

    `a.jpg` and `a.png` can then never collide.
    """
    chosen = target_format(source_format, wanted)
    return key if chosen == source_format else key + extension(chosen)

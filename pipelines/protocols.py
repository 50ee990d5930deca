"""The protocols of the literature: how a published table prepared its images, and what it measured."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.images import Refused


@dataclass(frozen=True, kw_only=True)
class Framing:
    """How HR is cut out of a photograph: its centre square, of `crop` px or the largest, resampled to `side`."""

    crop: int | None = None
    side: int
    filter: Literal["area", "bilinear"] = "area"


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What a table fixes. border: px left out of the metrics at each side, None for the scale. source: whose it is."""

    scale: int
    degradation: str = "bicubic"
    framing: Framing | None = None
    border: int | None = 0
    metrics: tuple[str, ...]
    samples: int = 1
    source: str


PROTOCOLS = {
    "sr3-faces-16-128": Protocol(
        scale=8, framing=Framing(side=128), metrics=("psnr", "ssim", "lr_psnr"),
        source="Saharia et al. 2021, table 1 (CelebA-HQ; its consistency in MSE x 1e5 is 10 ** (5 - LR-PSNR / 10))",
    ),
    "sr3-64-256": Protocol(
        scale=4, framing=Framing(side=256), metrics=("psnr", "ssim", "lr_psnr"),
        source="Saharia et al. 2021, table 2 (ImageNet; --inception adds its FID and IS, --classifier top-1 and top-5)",
    ),
    "srdiff-celeba-x8": Protocol(
        scale=8, framing=Framing(crop=178, side=160, filter="bilinear"), samples=10,
        metrics=("psnr", "ssim", "lr_psnr", "sigma"), source="Li et al. 2021 (SRDiff), CelebA; with --lpips its LPIPS",
    ),
    "srdiff-df2k-x4": Protocol(
        scale=4, samples=10, metrics=("psnr", "ssim", "lr_psnr", "sigma"),
        source="Li et al. 2021 (SRDiff), DIV2K; with --lpips its LPIPS",
    ),
    **{
        f"classic-x{scale}-y": Protocol(
            scale=scale, border=None, metrics=("psnr_y", "ssim_y"),
            source=f"the x{scale} tables of Set5, Set14, BSD100 and Urban100: Y, a border of the scale left out",
        )
        for scale in (2, 3, 4)
    },
}  # fmt: skip


def framed(pixels: NDArray[np.uint8], framing: Framing) -> NDArray[np.uint8]:
    """Return the framed HR image, uint8 (side, side, C). Raises Refused where the photograph is too small for it."""
    height, width, channels = pixels.shape
    crop = framing.crop or min(height, width)
    if min(height, width) < max(crop, framing.side):
        raise Refused(
            "score", "too_small", f"{height}x{width} px: the protocol wants {max(crop, framing.side)} px each way"
        )
    top, left = (height - crop) // 2, (width - crop) // 2
    square = pixels[top : top + crop, left : left + crop]
    if crop == framing.side:
        return np.ascontiguousarray(square)
    kernel = Image.Resampling.BOX if framing.filter == "area" else Image.Resampling.BILINEAR
    image = Image.fromarray(square if channels == 3 else square[:, :, 0])
    resized = np.asarray(image.resize((framing.side, framing.side), kernel))
    return resized if channels == 3 else resized[:, :, None]

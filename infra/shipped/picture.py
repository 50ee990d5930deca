"""Draws the README's picture: LR, bicubic, a model's result and HR of one part of a photograph; prints their scores.

    python -m infra.shipped.picture PHOTO tests/data/shipped.png --model pretrained:diffsr-x4 --part 60,330,256,300

The photograph is halved first, so that HR is sharp to the pixel; LR is the bicubic reduction of the part.
"""

import argparse
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffsr_core.checkpoint import model_from_files
from diffsr_core.degradation import Degradation, crop_to_multiple
from diffsr_core.metrics import psnr, rgb_to_y, spectral_error
from diffsr_core.pixels import bicubic
from diffsr_core.upscaler import Upscaler
from pipelines.models import resolve
from pipelines.sampling import SamplingConfig

GAP_PX = 6


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description="Draw LR, bicubic, result and HR of a part of a photograph.")
    parser.add_argument("photo", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", default="pretrained:diffsr-x4")
    parser.add_argument(
        "--part", default="60,330,256,300", help="top, left, height, width of HR, of the halved photograph"
    )
    arguments = parser.parse_args()
    model = resolve(arguments.model)
    network, _ = model_from_files(model.files)
    scale = network.config.scale
    top, left, height, width = map(int, arguments.part.split(","))
    photo = crop_to_multiple(np.asarray(Image.open(arguments.photo).convert("RGB")), 2)
    halved = Degradation("bicubic", 2).apply(np.ascontiguousarray(photo), seed=0)
    hr = np.ascontiguousarray(crop_to_multiple(halved[top : top + height, left : left + width], scale))
    lr = Degradation("bicubic", scale).apply(hr, seed=0)
    sr = Upscaler(network, SamplingConfig().sampling(model.sampling))(
        lr, digest=hashlib.sha256(lr.tobytes()).hexdigest()
    ).sr
    enlarged = bicubic(lr, scale)
    gap = np.full((len(hr), GAP_PX, 3), 255, np.uint8)
    parts = [lr.repeat(scale, axis=0).repeat(scale, axis=1), gap, enlarged, gap, sr, gap, hr]
    Image.fromarray(np.concatenate(parts, axis=1)).save(arguments.output, optimize=True)
    for name, image in (("bicubic", enlarged), (model.label, sr)):
        print(f"{name}: PSNR-Y {_psnr_y(image, hr, scale):.2f} dB, spectral error {_error(image, hr, scale):.1f} dB")


def _psnr_y(image: Any, hr: Any, border: int) -> float:
    return psnr(rgb_to_y(image).round(), rgb_to_y(hr).round(), border=border)


def _error(image: Any, hr: Any, border: int) -> float:
    return spectral_error(rgb_to_y(image), rgb_to_y(hr), border=border)


if __name__ == "__main__":
    main()

"""Scores of a model on a folder of pictures that need no learned network: PSNR, NIQE, spectral error, LR-PSNR.

    python -m tests.benchmarks.scores MODEL PICTURES --pristine niqe_pris_params.npz --steps 16

The pictures are HR; their LR is made by bicubic. Means over all of them, RGB, PSNR without a border of `scale` pixels.
"""

import argparse
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import numpy as np
import torch

from diffsr_core.checkpoint import model_from_files
from diffsr_core.degradation import Degradation, crop_to_multiple
from diffsr_core.metrics import lr_psnr, psnr, spectral_error
from diffsr_core.niqe import niqe
from diffsr_core.pixels import Pixels, to_model_range, to_pixels
from diffsr_core.resize import upscale
from diffsr_core.sampling import SamplingRecipe
from diffsr_core.upscaler import Upscaler
from pipelines import storage
from pipelines.blobs import decode_blob
from pipelines.models import resolve
from pipelines.perceptual import read_pristine

NAMES = ("PSNR", "NIQE", "spectral error", "LR-PSNR")


def main() -> None:
    """Print a row for HR, bicubic, the model's regression and its sample."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.scores", description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="folder, URI or models:/NAME/VERSION")
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--pristine", required=True, help="NIQE's statistics, .npz")
    parser.add_argument("--steps", type=int, default=16, help="of DDIM on the uniform grid")
    parser.add_argument("--limit", type=int, default=100)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, _ = model_from_files(resolve(arguments.model).files)
    recipe = SamplingRecipe(sampler="ddim", grid="uniform", num_steps=arguments.steps, tile=128, halo=8, micro_batch=1)
    upscaler, pristine, scale = Upscaler(model, recipe), read_pristine(arguments.pristine), model.config.scale
    found: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    for path in sorted(arguments.pictures.iterdir())[: arguments.limit]:
        data = path.read_bytes()
        hr = crop_to_multiple(decode_blob(data), scale)
        lr = Degradation("bicubic", scale).apply(hr, seed=0)
        for name, sr in {**_results(upscaler, lr, digest=storage.digest_bytes(data)), "HR": hr}.items():
            spectral = spectral_error(sr, hr)
            found[name].append((psnr(hr, sr, border=scale), niqe(sr, pristine), spectral, lr_psnr(lr, sr, scale=scale)))
    print(f"| method | {' | '.join(NAMES)} |\n|---|{'---:|' * len(NAMES)}")
    for name in ("HR", "bicubic", "regression", "sample"):
        if name in found:
            print(f"| {name} | {' | '.join(f'{fmean(column):.3f}' for column in zip(*found[name], strict=True))} |")


@torch.inference_mode()
def _results(upscaler: Upscaler, lr: Pixels, *, digest: str) -> dict[str, Pixels]:
    x = to_model_range(np.ascontiguousarray(lr))
    model = upscaler.model
    images = {"bicubic": to_pixels(upscale(x, model.config.scale))}
    if model.config.encoder.regresses:
        images["regression"] = to_pixels(model.encoder(x)[1])
    return {**images, "sample": upscaler(lr, digest=digest).sr}


if __name__ == "__main__":
    main()

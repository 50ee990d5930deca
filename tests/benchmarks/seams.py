"""What cutting into tiles and windows leaves to see, by halo and margin, and what it costs; prints seams.md.

    python -m tests.benchmarks.seams --model runs/1/model > tests/benchmarks/seams.md

Real photographs are taken as LR and not projected, which would hide a seam. Compared are the residual's steps across
the
cuts with those beside them (`seams.ResidualSeams`), the result with the same image in one tile, and with a grid that
lies half a stride elsewhere. A small SR3, with GroupNorm and attention, is trained here for a few minutes.
"""

import argparse
import datetime
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

from diffsr_core import upscaler as upscaler_module
from diffsr_core.checkpoint import load_model
from diffsr_core.family import ModelConfig, SuperResolver
from diffsr_core.metrics import downscaled_sr, psnr
from diffsr_core.networks.interpolation import InterpolationConfig
from diffsr_core.networks.sr3 import SR3Config
from diffsr_core.recipe import StageRecipe, TrainingRecipe
from diffsr_core.resize import downscale
from diffsr_core.sampling import SamplingRecipe
from diffsr_core.schedule import Schedule
from diffsr_core.seams import ResidualSeams, owners
from diffsr_core.tiling import Tile, Window, tiles, windows
from diffsr_core.training import Trainer
from diffsr_core.upscaler import Upscaler

DATA = Path(__file__).resolve().parents[2] / "../shared/data"
HALOS, MARGINS, SIDE = (0, 4, 8, 16), (0, 8, 16, 32), 160
SR3 = ModelConfig(
    encoder=InterpolationConfig(scale=4),
    denoiser=SR3Config(hidden=32, multipliers=(1, 2, 2), num_blocks=1, attention_factors=(4,), num_groups=8),
    schedule=Schedule(num_timesteps=1000),
    anchor="bicubic",
    told="noise_level",
    prediction="v",
)
HEAD = (
    "| {what} | cuts compared | residual seam ratio | of one tile, there | quotient | dB to one tile | dB to the "
    "shifted grid | area computed/kept |\n|---|---:|---:|---:|---:|---:|---:|---:|\n"
)
PAGE = """# Seams

Printed by `python -m tests.benchmarks.seams --model MODEL` on {date}.

{num} photographs of {side} x {side} px taken as LR, x4, DDIM in {steps} steps, no projection. *Residual seam
ratio*: steps of
the residual A.SR - LR across the cuts over those beside them. Photographs are not white (the JPEG grid alone gives
1.07 on
its lines), so it is divided by what the same lines give in the image made in one tile: 1 where nothing is to be
seen, and
{half:.2f} where tiles are off by half a level of 255. The goals: at most 1.03 over at least 20,000 differences, and
45 dB to
the grid shifted by half a stride.

## Tiles inside a window ({model}, tile 64)

{inside}
## Windows ({model}, tile 64, halo 8, window 64)

An image that fits into one window (512 LR px by default) has none of these; the area is that of a window of 512.

{between}
## A small SR3, with GroupNorm and attention, trained at 16 LR px

{sr3_steps} steps of 8 patches, so it is no good model; what counts is how it changes with the tile. Statistics of
GroupNorm and the reach of
attention are those of the tile: with another tile it is another function. Its own training size is where it should be
used.

{sr3}"""


def main() -> None:
    """Print the page."""
    parser = argparse.ArgumentParser(description="What tiles and windows leave to see.")
    parser.add_argument("--model", required=True, help="model folder of scale 4")
    parser.add_argument("--images", type=int, default=6)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--sr3-steps", type=int, default=400)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    base = SamplingRecipe(num_steps=arguments.steps, consistency="off", micro_batch=1)
    model, images = load_model(Path(arguments.model))[0], photographs(arguments.images, SIDE)
    whole = [run(model, replace(base, tile=SIDE, halo=0), image) for image in images]
    inside, half = "", 1.0
    for halo in HALOS:
        recipe = replace(base, halo=halo, micro_batch=4)
        row, level = compared(model, recipe, images, whole, cuts=tiles(SIDE, SIDE, tile=64, halo=halo))
        inside += f"| halo {halo} | {row} | {(64 / (64 - 2 * halo)) ** 2:.2f} |\n"
        half = level
    between = ""
    for margin in MARGINS:
        recipe = replace(base, window=64, margin=margin, micro_batch=4)
        row, _ = compared(model, recipe, images, whole, cuts=windows(SIDE, SIDE, side=64, margin=margin), shift=False)
        between += f"| margin {margin} | {row} | {((512 + 2 * margin) / 512) ** 2:.2f} |\n"
    sr3, images = trained(arguments.sr3_steps), photographs(arguments.images, 48)
    whole, rows = [run(sr3, replace(base, tile=48, halo=0), image) for image in images], ""
    for tile, halo in ((16, 0), (16, 4), (32, 4), (32, 8)):
        recipe = replace(base, tile=tile, halo=halo)
        row, _ = compared(sr3, recipe, images, whole, cuts=tiles(48, 48, tile=tile, halo=halo))
        rows += f"| tile {tile}, halo {halo} | {row} | {(tile / (tile - 2 * halo)) ** 2:.2f} |\n"
    name = f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M weights, anchored"
    print(PAGE.format(date=datetime.date.today(), num=arguments.images, side=SIDE, steps=arguments.steps, half=half,
                      inside=HEAD.format(what="tiles") + inside, between=HEAD.format(what="windows") + between,
                      sr3=HEAD.format(what="tiles") + rows, sr3_steps=arguments.sr3_steps, model=name))  # fmt: skip


def run(model: SuperResolver, recipe: SamplingRecipe, image: np.ndarray) -> np.ndarray:
    """Return the SR; its noise is that of the image, whatever the recipe cuts."""
    found: np.ndarray = Upscaler(model, recipe)(image, digest=str(int(image.sum()))).sr
    return found


def compared(
    model: SuperResolver,
    recipe: SamplingRecipe,
    images: Sequence[np.ndarray],
    whole: Sequence[np.ndarray],
    *,
    cuts: Sequence[Tile | Window],
    shift: bool = True,
) -> tuple[str, float]:
    """Return the cells of a row, and the ratio that tiles off by half a level would have."""
    seams, without, planted = ResidualSeams(), ResidualSeams(), ResidualSeams()
    to_whole, to_shifted = list[float](), list[float]()
    owner = owners(cuts)
    offsets = np.random.default_rng(0).normal(0, 0.5, owner.max() + 1)
    for image, alone in zip(images, whole, strict=True):
        made = run(model, recipe, image)
        residual = downscaled_sr(image, made, scale=4) - image
        seams.add(residual, owner)
        uncut = downscaled_sr(image, alone, scale=4) - image
        without.add(uncut, owner)
        planted.add(uncut + offsets[owner][:, :, None], owner)
        to_whole.append(psnr(made, alone))
        if shift:
            half = (recipe.tile - 2 * recipe.halo) // 2
            with patch.object(upscaler_module, "tiles", partial(tiles, shift=half)):
                to_shifted.append(psnr(made, run(model, recipe, image)))
    shifted = f"{min(to_shifted):.1f} to {max(to_shifted):.1f}" if shift else ""
    ratios = f"{seams.ratio:.3f} | {without.ratio:.3f} | {seams.ratio / without.ratio:.3f}"
    cells = f"{seams.num_seams:,} | {ratios} | {min(to_whole):.1f} to {max(to_whole):.1f} | {shifted}"
    return cells, planted.ratio / without.ratio


def photographs(count: int, side: int) -> list[np.ndarray]:
    """Return squares from the middle of BSD100's first images, uint8 HWC."""
    found = []
    for path in sorted((DATA / "test/bsd100").rglob("*.png"))[:count]:
        pixels = np.asarray(Image.open(path).convert("RGB"))
        top, left = ((size - side) // 2 for size in pixels.shape[:2])
        found.append(np.ascontiguousarray(pixels[top : top + side, left : left + side]))
    return found


def trained(num_steps: int) -> SuperResolver:
    """Return the small SR3 after so many steps on patches of 64 px of photographs."""
    torch.manual_seed(0)
    stage = StageRecipe(name="diffusion", num_steps=num_steps, learning_rate=1e-3, loss="l2")
    recipe = TrainingRecipe(stages=(stage,), batch_size=8, augmentation="none", ema_half_lives_images=(800,))
    trainer = Trainer(SuperResolver(SR3), recipe)
    for hr in patches(num_steps, recipe.batch_size):
        trainer.train_step(hr, downscale(hr, 4))
    trainer.model.load_state_dict(trainer.ema)
    return trainer.model.to(memory_format=torch.contiguous_format)


def patches(num_steps: int, batch_size: int) -> Iterator[Any]:
    """Yield batches of patches of 64 px, in [-1, 1]."""
    rng = np.random.default_rng(0)
    paths = sorted((DATA / "train/photos_open").rglob("*.*"))
    pictures = [np.asarray(Image.open(p).convert("RGB").reduce(2)) for p in paths if p.suffix in (".png", ".jpg")]
    for _ in range(num_steps):
        batch = []
        for index in rng.integers(0, len(pictures), batch_size):
            height, width = pictures[index].shape[:2]
            y, x = rng.integers(0, height - 64), rng.integers(0, width - 64)
            batch.append(torch.from_numpy(pictures[index][y : y + 64, x : x + 64].copy()).permute(2, 0, 1))
        yield torch.stack(batch).float() / 127.5 - 1


if __name__ == "__main__":
    main()

"""Generation by a cascade, small: a plain DDPM draws 8x8 images, an SR3 makes them 16x16; prints cascade.md.

    python -m tests.benchmarks.cascade > tests/benchmarks/cascade.md

The family is known: one Gaussian blob of 2 px standard deviation at a place uniform in the middle 8 px; it is bright on
dark in 70 % of the images and dark on bright in the others. So what is generated can be measured: whether it is one
blob (the share of its variance that the best blob explains), how wide that blob is, where it lies and of which mode.
"""

import datetime
import time
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffsr_core.cascade import Cascade
from diffsr_core.family import ModelConfig, SuperResolver
from diffsr_core.networks.interpolation import InterpolationConfig
from diffsr_core.networks.sr3 import SR3Config
from diffsr_core.pixels import to_pixels
from diffsr_core.recipe import StageRecipe, TrainingRecipe
from diffsr_core.resize import downscale
from diffsr_core.sampling import SamplingRecipe
from diffsr_core.schedule import Schedule
from diffsr_core.training import Trainer
from diffsr_core.upscaler import Upscaler

SIZE, WIDTH_PX, BRIGHT_SHARE, CENTRES_PX = 16, 2.0, 0.7, (3.5, 11.5)
NUM_STEPS, NUM_IMAGES = (1500, 600), 300  # of training: the base, and the second model, whose task is easier

NETWORK = SR3Config(
    channels=1, condition_channels=0, hidden=16, multipliers=(1, 2), num_blocks=1, attention_factors=(), num_groups=4
)
BASE = ModelConfig(
    encoder=InterpolationConfig(scale=1, channels=1, kernel="none"),
    denoiser=NETWORK,
    schedule=Schedule(num_timesteps=1000),
    anchor="zero",
    residual_scale=1.0,
    told="noise_level",
    prediction="v",
)
ENLARGER = replace(
    BASE, encoder=InterpolationConfig(scale=2, channels=1), denoiser=replace(NETWORK, condition_channels=1)
)

Pixels = npt.NDArray[np.uint8]


def profiles(width_px: npt.ArrayLike, centre: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return (..., SIZE) Gaussians of height 1 for widths and centres (...) in px."""
    width_px, centre = np.broadcast_arrays(np.asarray(width_px, np.float64), np.asarray(centre, np.float64))
    return np.exp(-((np.arange(SIZE) - centre[..., None]) ** 2) / (2 * width_px[..., None] ** 2))


def blob(width_px: float, y: npt.ArrayLike, x: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return (..., SIZE, SIZE) blobs of height 1 at the places (...) in px."""
    return profiles(width_px, y)[..., :, None] * profiles(width_px, x)[..., None, :]


def family(count: int, *, seed: int) -> Tensor:
    """Return (count, 1, SIZE, SIZE) images of the family, from -0.75 to 0.75."""
    rng = np.random.default_rng(seed)
    y, x = rng.uniform(*CENTRES_PX, (2, count))
    sign = np.where(rng.random(count) < BRIGHT_SHARE, 1.0, -1.0)
    images = sign[:, None, None] * (1.5 * blob(WIDTH_PX, y, x) - 0.75)
    return torch.from_numpy(images).float()[:, None]


class Fit(NamedTuple):
    """The blob nearest to an image: explained is the share of the image's variance, widths and places in px."""

    explained: float
    width_px: float
    y_px: float
    x_px: float
    height: float


def fitted(pixels: Pixels) -> Fit:
    """Return the blob on a flat ground that is nearest to the pixels (SIZE, SIZE, 1), by search over a grid."""
    widths, places = np.arange(0.8, 4.01, 0.1), np.arange(0, SIZE - 0.99, 0.25)
    image = pixels[:, :, 0].astype(np.float64)
    image -= image.mean()
    # A blob is a column times a row, and so is its product with the image; a ground of zero mean leaves that alone.
    lines = profiles(widths[:, None], places)
    products = np.einsum("wyi,ij,wxj->wyx", lines, image, lines, optimize=True)
    squares, sums = (lines**2).sum(axis=2), lines.sum(axis=2)
    norms = squares[:, :, None] * squares[:, None] - (sums[:, :, None] * sums[:, None]) ** 2 / image.size
    explained = products**2 / norms / max(float((image**2).sum()), 1e-12)
    best = np.unravel_index(explained.argmax(), explained.shape)
    width, y, x = widths[best[0]], places[best[1]], places[best[2]]
    return Fit(*(float(value) for value in (explained[best], width, y, x, products[best] / norms[best])))


def trained(config: ModelConfig, *, num_steps: int) -> SuperResolver:
    """Return a model trained on the family: at half its size without a condition, or from half its size."""
    torch.manual_seed(0)
    stage = StageRecipe(name="diffusion", num_steps=max(num_steps, 1), learning_rate=2e-3, loss="l2")
    recipe = TrainingRecipe(stages=(stage,), batch_size=32, augmentation="none", ema_half_lives_images=(5000,))
    trainer = Trainer(SuperResolver(config), recipe)
    for step in range(num_steps):
        hr = family(recipe.batch_size, seed=step)
        lr = downscale(hr, 2)
        trainer.train_step(lr if config.scale == 1 else hr, lr)
    trainer.model.load_state_dict(trainer.ema)
    return trainer.model.to(memory_format=torch.contiguous_format)


def generated(num_steps: tuple[int, int], *, count: int) -> list[Pixels]:
    """Return images of a cascade whose models were trained for so many steps each. A tile is the whole image."""
    half = SIZE // 2
    base = SamplingRecipe(sampler="ddpm", num_steps=25, tile=half, halo=0, micro_batch=1, consistency="off")
    enlarging = replace(base, num_steps=8, consistency="exact")
    cascade = Cascade(
        [
            Upscaler(trained(BASE, num_steps=num_steps[0]), base),
            Upscaler(trained(ENLARGER, num_steps=num_steps[1]), enlarging),
        ]
    )
    return [cascade.generate(half, half, name=f"image {index}") for index in range(count)]


def row(name: str, images: list[Pixels]) -> str:
    """Return the Markdown row of a set of images."""
    fits = [fitted(image) for image in images]
    alike = [fit for fit in fits if fit.explained > 0.95]
    cells = [f"{len(alike) / len(fits):.1%}", f"{np.median([fit.explained for fit in fits]):.3f}"]
    if len(alike) > len(fits) / 10:
        bright = [fit.height > 0 for fit in alike]
        centres = np.array([(fit.y_px, fit.x_px) for fit in alike])
        cells += [
            f"{np.mean(bright):.1%}",
            f"{np.mean([fit.width_px for fit in alike]):.2f} ± {np.std([fit.width_px for fit in alike]):.2f}",
            f"{np.mean([abs(fit.height) for fit in alike]):.0f} ± {np.std([abs(fit.height) for fit in alike]):.0f}",
            " / ".join(f"{centre:.2f}" for centre in centres.mean(axis=0)),
            " / ".join(f"{spread:.2f}" for spread in centres.std(axis=0)),
        ]
    else:
        cells += ["-"] * 5
    pixels = np.stack(images).astype(np.float64)
    return f"| {name} | " + " | ".join([*cells, f"{pixels.mean():.1f}", f"{pixels.std():.1f}"]) + " |"


def main() -> None:
    """Print cascade.md."""
    torch.set_num_threads(1)
    began = time.monotonic()
    truth = [to_pixels(image[None]) for image in family(NUM_IMAGES, seed=10**6)]
    rows = [
        row("the family itself", truth),
        row("untrained", generated((0, 0), count=NUM_IMAGES // 8)),
        row(f"trained, {NUM_STEPS[0]} and {NUM_STEPS[1]} steps", generated(NUM_STEPS, count=NUM_IMAGES)),
    ]
    error = (BRIGHT_SHARE * (1 - BRIGHT_SHARE) / NUM_IMAGES) ** 0.5
    low, high = CENTRES_PX
    columns = ("images", "one blob", "median explained", "bright", "width, px", "height", "centre y / x, px")
    columns += ("its deviation", "mean", "deviation")
    print(f"""# Generation by a cascade of two models

Printed by `python -m tests.benchmarks.cascade` on {datetime.date.today()} in {time.monotonic() - began:.0f} s; \
the same numbers on every run.

A DDPM without a condition draws 8x8 (25 ancestral steps), an SR3 makes 16x16 of it (8 steps), each on noise of its own.
The family: one blob of {WIDTH_PX:g} px standard deviation and 191 levels, {BRIGHT_SHARE:.0%} bright on dark, its \
centre uniform from {low:g} to {high:g} px
(deviation {(high - low) / 12**0.5:.2f}). One blob: the nearest blob explains more than 95 % of the image's variance; \
the columns to its right are of
those images. {NUM_IMAGES} images a row, an eighth of them untrained; \
the error of a share of {NUM_IMAGES} is {error:.1%}.

| {" | ".join(columns)} |
|{"---|" * len(columns)}
{chr(10).join(rows)}""")


if __name__ == "__main__":
    main()

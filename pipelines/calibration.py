"""How long the network takes and how much memory, measured: what forecasts and the number in flight rest on."""

from dataclasses import replace

import numpy as np
import torch

from diffsr_core.family import SuperResolver
from diffsr_core.memory import LiveBytes
from diffsr_core.sampling import SamplingRecipe
from diffsr_core.upscaler import Upscaler


def seconds_per_megapixel(network: SuperResolver, recipe: SamplingRecipe, *, device: str) -> float:
    """Return the seconds of network calls per output megapixel of an image of 2 x 2 tiles, for the whole recipe.

    One step is measured, after a call that warms up, and multiplied: a forecast should not take as long as an image.
    """
    side = 2 * recipe.tile - 2 * recipe.halo
    pixels = np.full((side, side, network.config.encoder.lr_channels), 128, np.uint8)
    least = 2 if recipe.sampler == "langevin" else 1
    seconds = list[float]()
    for num_steps in (least, least, least + 1):
        upscaler = Upscaler(network, replace(recipe, num_steps=num_steps, num_samples=1, choice="first"), device=device)
        plan = upscaler.windows(side, side)
        blocks = ((w, pixels[w.top : w.bottom, w.left : w.right]) for w in plan)
        seconds.append(sum(upscaler.window(block, w, digest="calibration").seconds for w, block in blocks))
    per_step = max(0.0, seconds[2] - seconds[1])
    total = recipe.num_samples * (seconds[1] + per_step * (recipe.num_steps - least))
    return total / (side * side * network.config.scale**2 / 1e6)


def planned_in_flight(upscaler: Upscaler, *, share: float) -> int:
    """Return how many windows fit into a share of the memory that is free now: at least 1, at most two calls' tiles.

    So many thumbnails of one tile fill a call while others come and go; more would wait. What is resident was 1.7 times
    the tensors of `window_bytes`: numpy's copies, and what the allocator keeps.
    """
    most = 2 * upscaler.recipe.micro_batch
    if torch.device(upscaler.device).type == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        import psutil

        free = psutil.virtual_memory().available
    return max(1, min(most, int(free * share / (2 * window_bytes(upscaler)))))


@torch.inference_mode()
def window_bytes(upscaler: Upscaler) -> int:
    """Return the bytes of tensors at the peak of a whole window, by one step at one tile and at four.

    The network's call is the same at any size, the canvases grow with the area.
    """
    recipe, channels = upscaler.recipe, upscaler.model.config.encoder.lr_channels
    peaks = list[int]()
    for side in (recipe.tile, 2 * recipe.tile):
        with LiveBytes() as counted, upscaler.opened(np.zeros((side, side, channels), np.uint8), digest="") as canvas:
            image = canvas.regression
            if upscaler.model.denoiser is not None:
                x_0 = upscaler.run(canvas, upscaler.grid[[0, -1]], noise=canvas.noise_of(0))
                image = upscaler.model.restore(x_0, canvas.condition)
            upscaler.publishable(torch.nan_to_num(image), canvas)
        peaks.append(counted.peak)
    per_px = max(1.0, (peaks[1] - peaks[0]) / (3 * recipe.tile**2))
    area = (recipe.window + 2 * recipe.margin) ** 2
    return int(peaks[0] + per_px * max(0, area - recipe.tile**2))

"""One LR image in, one SR image out: shared by the upscale, evaluate and promote jobs and the pyfunc model."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffsr_core.consistency import project
from diffsr_core.family import Condition, SuperResolver, x0_and_eps
from diffsr_core.noise import gaussian, noise_key
from diffsr_core.resize import upscale
from diffsr_core.sampler import SAMPLERS, last, sample
from diffsr_core.schedule import sampling_grid
from diffsr_core.tiling import Window, fuse, padded_size, windows

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class SamplingRecipe:
    """All that decides the bytes of an output beside the model and the input.

    tile and halo are LR pixels; micro_batch windows are one network call; consistency `exact` projects onto the LR.
    num_threads is part of it because 1 and 2 threads do not give the same bytes.
    """

    sampler: str = "ddim"
    num_steps: int = 8
    seed: int = 0
    sample_index: int = 0
    tile: int = 64
    halo: int = 8
    micro_batch: int = 4
    num_threads: int = 1
    precision: Literal["float32", "bf16"] = "float32"
    consistency: Literal["exact", "off"] = "exact"
    consistency_iterations: int = 6

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler ({self.sampler!r}) is not available; use one of: {', '.join(SAMPLERS)}")
        for name in ("num_steps", "tile", "micro_batch", "num_threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1; use 1 or more")
        if self.halo < 0 or self.tile <= 2 * self.halo:
            raise ValueError(f"halo ({self.halo}) must be from 0 to less than half the tile ({self.tile})")


class Upscaled(NamedTuple):
    """SR pixels, and the regression network's own (both projected alike): (H, W, C) uint8, C as the input's."""

    sr: Pixels
    regression: Pixels


def to_model_range(pixels: Pixels) -> Tensor:
    """Return (1, C, H, W) float32 in [-1, 1] for uint8 (H, W, C)."""
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None].float() / 127.5 - 1


def to_pixels(image: Tensor) -> Pixels:
    """Return uint8 (H, W, C) for (1, C, H, W) in [-1, 1]; rounds half to even, clips."""
    rounded = ((image[0] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return rounded.permute(1, 2, 0).cpu().numpy()


def bicubic(pixels: Pixels, scale: int) -> Pixels:
    """Return uint8 (H * scale, W * scale, C): the flavour-C bicubic baseline."""
    return to_pixels(upscale(to_model_range(pixels).double(), scale))


class Upscaler:
    """A model and a recipe. Calling it is a pure function of the LR pixels and the digest.

    in_flight: micro-batches that run at once; changes the speed and the memory, never the bytes.
    """

    def __init__(
        self, model: SuperResolver, recipe: SamplingRecipe, *, device: str = "cpu", in_flight: int = 1
    ) -> None:
        stride = model.config.lr_stride
        for name, value in (("tile", recipe.tile), ("halo", recipe.halo)):
            if value % stride:
                raise ValueError(f"{name} ({value}) must be a multiple of the model's stride ({stride})")
        self.model = model.eval().to(device)
        self.recipe = recipe
        self.device = device
        self.in_flight = in_flight
        if model.denoiser is not None:
            self.grid = sampling_grid(model.config.schedule, recipe.num_steps)

    @torch.inference_mode()
    def __call__(self, pixels: Pixels, *, digest: str) -> Upscaled:
        """Return the SR of uint8 pixels (h, w, 1 or 3). digest names the content: it keys the noise."""
        height, width, channels = pixels.shape
        lr = to_model_range(pixels).to(self.device)
        recipe, stride = self.recipe, self.model.config.lr_stride
        right = padded_size(width, tile=recipe.tile, stride=stride) - width
        bottom = padded_size(height, tile=recipe.tile, stride=stride) - height
        canvas = torch.nn.functional.pad(lr.expand(1, 3, height, width), (0, right, 0, bottom), mode="replicate")
        plan = windows(canvas.shape[2], canvas.shape[3], tile=recipe.tile, halo=recipe.halo)
        with threads(recipe.num_threads), ThreadPoolExecutor(self.in_flight) as pool:
            condition, regression = self._condition(canvas, plan, pool)
            image = regression
            if self.model.denoiser is not None:
                x_0 = self._sample(canvas, condition, plan, pool, noise_key(recipe.seed, digest, recipe.sample_index))
                image = self.model.restore(x_0, condition)
            return Upscaled(self._publishable(image, lr, channels), self._publishable(regression, lr, channels))

    def _condition(self, canvas: Tensor, plan: list[Window], pool: ThreadPoolExecutor) -> tuple[Condition, Tensor]:
        @torch.inference_mode()  # thread-local: each worker of the pool must ask for it
        def encode(inputs: list[Tensor]) -> list[Tensor]:
            with self._autocast():
                features, image = self.model.encoder(inputs[0])
            return [features, image.float()]

        features, image = fuse(
            encode, [canvas], plan, tile=self.recipe.tile, micro_batch=self.recipe.micro_batch, pool=pool
        )
        return self.model.condition_of(canvas, features, image), image

    def _sample(
        self, canvas: Tensor, condition: Condition, plan: list[Window], pool: ThreadPoolExecutor, key: tuple[int, int]
    ) -> Tensor:
        recipe, config = self.recipe, self.model.config
        channels, height, width = self.model.diffused_shape(canvas.shape[2], canvas.shape[3])

        def noise(step: int) -> Tensor:
            return gaussian(key, channels=channels, height=height, width=width, step=step, device=self.device)

        def denoise(x_t: Tensor, noise_level: float) -> tuple[Tensor, Tensor]:
            level = torch.full((recipe.micro_batch,), noise_level, device=self.device)

            @torch.inference_mode()
            def predict(inputs: list[Tensor]) -> list[Tensor]:
                with self._autocast():
                    return [self.model.predict(inputs[1], level, inputs[0]).float()]

            (prediction,) = fuse(
                predict,
                [condition.features, x_t],
                plan,
                tile=recipe.tile,
                micro_batch=recipe.micro_batch,
                pool=pool,
            )
            return x0_and_eps(prediction, x_t, level[:1], kind=config.prediction)

        return last(sample(denoise, self.grid, noise=noise, sampler=recipe.sampler, clip=config.residual_clip))

    def _publishable(self, image: Tensor, lr: Tensor, channels: int) -> Pixels:
        scale = self.model.config.scale
        image = image[:, :, : lr.shape[2] * scale, : lr.shape[3] * scale].clamp(-1, 1)
        if channels == 1:
            image = image.mean(dim=1, keepdim=True)
        if self.recipe.consistency == "exact":
            image = project(image, lr, scale=scale, iterations=self.recipe.consistency_iterations)
        return to_pixels(image)

    def _autocast(self) -> torch.autocast:
        enabled = self.recipe.precision == "bf16"
        return torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16, enabled=enabled)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run the body with this many intra-operator threads, then restore what was set."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

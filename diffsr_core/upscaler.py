"""One LR image in, one SR image out: shared by the upscale, evaluate and promote jobs and the pyfunc model."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffsr_core.consistency import project
from diffsr_core.family import Condition, ModelConfig, SuperResolver, x0_and_eps
from diffsr_core.noise import gaussian, noise_key
from diffsr_core.prepared import prepared
from diffsr_core.resize import upscale
from diffsr_core.sampler import SAMPLERS, Denoise, Noise, default_grid, last, sample
from diffsr_core.schedule import GRIDS, Schedule, Table, sampling_grid
from diffsr_core.tiling import Window, fuse, padded_size, windows

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class SamplingRecipe:
    """All that decides the bytes of an output beside the model and the input.

    grid: family of the noise levels, `auto` for the sampler's own. start_level: 0 starts from noise, above 0 from the
    regression noised to that level. corrections: Langevin steps after each step, None for the sampler's own number.
    tile and halo are LR pixels; micro_batch windows are one network call; consistency `exact` projects onto the LR.
    num_threads is part of it because 1 and 2 threads do not give the same bytes.
    """

    sampler: str = "ddim"
    grid: str = "auto"
    num_steps: int = 8
    start_level: float = 0.0
    corrections: int | None = None
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
        for name, known in (
            ("sampler", SAMPLERS),
            ("grid", ("auto", *GRIDS)),
            ("precision", ("float32", "bf16")),
            ("consistency", ("exact", "off")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} ({getattr(self, name)!r}) must be one of {', '.join(known)}; use one of them")
        if not 0 <= self.start_level < 1:
            raise ValueError(f"start_level ({self.start_level}) must be from 0 to below 1; use 0 or about 0.5")
        least = {"sample_index": 0, "consistency_iterations": 0, "corrections": int(self.sampler == "langevin")}
        for name in ("num_steps", "tile", "micro_batch", "num_threads", *least):
            value, low = getattr(self, name), least.get(name, 1)
            if value is not None and value < low:
                raise ValueError(f"{name} ({value}) must be at least {low}; use {low} or more")
        if self.halo < 0 or self.tile <= 2 * self.halo:
            raise ValueError(f"halo ({self.halo}) must be from 0 to less than half the tile ({self.tile})")

    def grid_of(self, schedule: Schedule, *, start: float) -> Table:
        """Return the noise levels from `start` (0: from pure noise) to 1. Raises ValueError, as sampling_grid does."""
        family = default_grid(self.sampler) if self.grid == "auto" else self.grid
        return sampling_grid(schedule, self.num_steps, family=family, start=start)

    def check_fits(self, config: ModelConfig) -> None:
        """Raise ValueError for settings that do not fit this model."""
        stride = config.lr_stride
        for name, value in (("tile", self.tile), ("halo", self.halo)):
            if value % stride:
                raise ValueError(
                    f"{name} ({value}) must be a multiple of the model's stride ({stride}); "
                    f"use tile {max(config.lr_smallest, 4 * stride)} and halo {stride}"
                )
        if self.tile < config.lr_smallest:
            raise ValueError(f"tile ({self.tile}) must be at least {config.lr_smallest} for this model; use that")
        if config.scale == 1 and self.consistency != "off":
            raise ValueError("consistency (exact) must be off at scale 1, where it would give the input back; use off")
        if self.start_level and not config.encoder.regresses:
            raise ValueError(f"start_level ({self.start_level}) must be 0: the model has no regression to start from")
        if config.denoiser is not None:
            self.grid_of(config.schedule, start=self.start_level)


class Upscaled(NamedTuple):
    """SR pixels, and the regression network's own where there is one (both projected alike): (H, W, C) uint8."""

    sr: Pixels
    regression: Pixels | None


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


class Canvas(NamedTuple):
    """One LR image, padded to whole windows and encoded: all that a sampler asks for. (1, channels, height, width)."""

    lr: Tensor  # as it came, not padded
    condition: Condition
    regression: Tensor
    denoise: Denoise
    noise_of: Callable[[int], Noise]  # sample index -> (step -> z)


class Upscaler:
    """A model and a recipe. Calling it is a pure function of the LR pixels and the digest.

    in_flight: micro-batches that run at once; changes the speed and the memory, never the bytes.
    """

    def __init__(
        self, model: SuperResolver, recipe: SamplingRecipe, *, device: str = "cpu", in_flight: int = 1
    ) -> None:
        recipe.check_fits(model.config)
        self.model = prepared(model, precision=recipe.precision, device=device)
        self.recipe = recipe
        self.device = device
        self.in_flight = in_flight
        if model.denoiser is not None:
            self.grid = self.grid_from(recipe.start_level)

    def grid_from(self, level: float) -> Table:
        """Return the recipe's grid from this noise level (0: from pure noise) to 1."""
        return self.recipe.grid_of(self.model.config.schedule, start=level)

    @torch.inference_mode()
    def __call__(self, pixels: Pixels, *, digest: str) -> Upscaled:
        """Return the SR of uint8 pixels (h, w, C). digest names the content: it keys the noise."""
        with self.opened(pixels, digest=digest) as canvas:
            if self.model.denoiser is None:
                image = self.publishable(canvas.regression, canvas)
                return Upscaled(image, image)
            sr = self.drawn(canvas, self.recipe.sample_index)
            regresses = self.model.config.encoder.regresses
            return Upscaled(sr, self.publishable(canvas.regression, canvas) if regresses else None)

    def drawn(self, canvas: Canvas, sample_index: int) -> Pixels:
        """Return one sample of an opened image, uint8 (H, W, C). Raises ValueError for a model without a denoiser."""
        noise = canvas.noise_of(sample_index)
        start = self.model.target(canvas.regression, canvas.condition) if self.recipe.start_level else None
        x_0 = self.run(canvas, self.grid, noise=noise, start=start)
        return self.publishable(self.model.restore(x_0, canvas.condition), canvas)

    def check_channels(self, pixels: Pixels) -> None:
        """Raise ValueError for an image whose channels this model does not read; grey serves for any colours."""
        encoder, found = self.model.config.encoder, pixels.shape[2]
        if found != encoder.lr_channels and (found != 1 or encoder.extra_channels):
            raise ValueError(f"channels ({found}) must be {encoder.lr_channels} for this model; convert the image")

    @contextmanager
    def opened(self, pixels: Pixels, *, digest: str) -> Iterator[Canvas]:
        """Encode an image, and hold the threads that work on it. Raises ValueError for channels that do not fit."""
        self.check_channels(pixels)
        lr = to_model_range(pixels).to(self.device)
        recipe, wanted = self.recipe, self.model.config.encoder.lr_channels
        inputs = self._padded(lr.expand(1, wanted, -1, -1), *lr.shape[2:], scale=1)
        plan = windows(inputs.shape[2], inputs.shape[3], tile=recipe.tile, halo=recipe.halo)
        with threads(recipe.num_threads), ThreadPoolExecutor(self.in_flight) as pool:
            condition, regression = self._condition(inputs, plan, pool)

            def noise_of(sample_index: int) -> Noise:
                if self.model.denoiser is None:
                    raise ValueError("model has no denoiser: it must have one to draw samples; use a diffusion model")
                key = noise_key(recipe.seed, digest, sample_index)
                channels, height, width = self.model.diffused_shape(inputs.shape[2], inputs.shape[3])
                return lambda step: gaussian(
                    key, channels=channels, height=height, width=width, step=step, device=self.device
                )

            yield Canvas(lr, condition, regression, self._denoise(condition, plan, pool), noise_of)

    def run(self, canvas: Canvas, grid: Table, *, noise: Noise, start: Tensor | None = None) -> Tensor:
        """Return the x_0 that the recipe's sampler reaches; see `sampler.sample`."""
        states = sample(
            canvas.denoise,
            grid,
            noise=noise,
            sampler=self.recipe.sampler,
            clip=self.model.config.residual_clip,
            corrections=self.recipe.corrections,
            start=start,
        )
        return last(states)

    def target(self, pixels: Pixels, canvas: Canvas) -> Tensor:
        """Return the x_0 of an HR image, uint8 (H, W, 1 or C), on the canvas.

        Raises ValueError for another size or number of channels.
        """
        scale, channels = self.model.config.scale, self.model.config.encoder.channels
        if pixels.shape[2] not in (1, channels):
            raise ValueError(f"image has {pixels.shape[2]} channels: it must have {channels}, or 1; convert it")
        wanted = (canvas.lr.shape[2] * scale, canvas.lr.shape[3] * scale)
        if pixels.shape[:2] != wanted:
            raise ValueError(f"image is {pixels.shape[:2]} px: it must be {scale} times the LR, {wanted}; resize it")
        hr = to_model_range(pixels).to(self.device).expand(1, channels, -1, -1)
        return self.model.target(self._padded(hr, *canvas.lr.shape[2:], scale=scale), canvas.condition)

    def publishable(self, image: Tensor, canvas: Canvas) -> Pixels:
        """Return the uint8 pixels (H, W, C) of an image on the canvas: cropped, projected onto the LR, rounded."""
        scale, encoder, lr = self.model.config.scale, self.model.config.encoder, canvas.lr
        image = image[:, :, : lr.shape[2] * scale, : lr.shape[3] * scale].clamp(-1, 1)
        if lr.shape[1] < encoder.channels:  # a grey image that was given to each channel
            image = image.mean(dim=1, keepdim=True)
        if self.recipe.consistency == "exact":
            own = lr[:, : image.shape[1]]
            image = project(image, own, scale=scale, iterations=self.recipe.consistency_iterations)
        return to_pixels(image)

    def _padded(self, image: Tensor, lr_height: int, lr_width: int, *, scale: int) -> Tensor:
        """Return the image on a canvas of whole tiles and strides, its border repeated."""
        tile, stride = self.recipe.tile, self.model.config.lr_stride
        right = (padded_size(lr_width, tile=tile, stride=stride) - lr_width) * scale
        bottom = (padded_size(lr_height, tile=tile, stride=stride) - lr_height) * scale
        return torch.nn.functional.pad(image, (0, right, 0, bottom), mode="replicate")

    def _condition(self, inputs: Tensor, plan: list[Window], pool: ThreadPoolExecutor) -> tuple[Condition, Tensor]:
        @torch.inference_mode()  # thread-local: each worker of the pool must ask for it
        def encode(batch: list[Tensor]) -> list[Tensor]:
            with self._autocast():
                features, image = self.model.encoder(batch[0])
            return [features, image.float()]

        if self.model.config.encoder.regresses:
            features, image = fuse(
                encode, [inputs], plan, tile=self.recipe.tile, micro_batch=self.recipe.micro_batch, pool=pool
            )
        else:  # an interpolation is exact on the whole, and costs no more there
            features, image = self.model.encoder(inputs)
        return self.model.condition_of(inputs, features, image), image

    def _denoise(self, condition: Condition, plan: list[Window], pool: ThreadPoolExecutor) -> Denoise:
        recipe, kind = self.recipe, self.model.config.prediction

        def denoise(x_t: Tensor, noise_level: float) -> tuple[Tensor, Tensor]:
            level = torch.full((recipe.micro_batch,), noise_level, device=self.device)

            @torch.inference_mode()
            def predict(batch: list[Tensor]) -> list[Tensor]:
                with self._autocast():
                    return [self.model.predict(batch[1], level, batch[0]).float()]

            canvases = [condition.features, x_t]
            (prediction,) = fuse(predict, canvases, plan, tile=recipe.tile, micro_batch=recipe.micro_batch, pool=pool)
            return x0_and_eps(prediction, x_t, level[:1], kind=kind)

        return denoise

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

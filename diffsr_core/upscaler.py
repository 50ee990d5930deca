"""LR in, SR out, window by window: shared by the upscale, evaluate and promote jobs and the pyfunc model."""

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffsr_core.batching import Exchange, Member
from diffsr_core.consistency import project
from diffsr_core.family import Condition, SuperResolver, x0_and_eps
from diffsr_core.noise import gaussian, noise_key
from diffsr_core.pixels import Pixels, peak, to_model_range, to_pixels
from diffsr_core.prepared import prepared
from diffsr_core.resize import downscale, upscale
from diffsr_core.sampler import Denoise, Noise, last, sample
from diffsr_core.sampling import SamplingRecipe
from diffsr_core.schedule import Table
from diffsr_core.tiling import Tile, Window, fuse, padded_size, tiles, windows


class NotFiniteError(ArithmeticError):
    """The network gave NaN or an infinity."""


class Upscaled(NamedTuple):
    """SR pixels, the regression network's own where asked for, both (H, W, C) in the type of the LR and projected
    alike, of more than one sample the standard deviation, (H, W) float32 in levels of 255, and the seconds of network
    calls."""

    sr: Pixels
    regression: Pixels | None
    uncertainty: npt.NDArray[np.float32] | None = None
    seconds: float = 0.0


class Drawn(NamedTuple):
    """What a window gives, of its core only. samples: those that may be published, (h, w, C) each: one, or all K where
    the best is chosen, which only the whole image can tell. errors: squared error of each to the LR, before the
    projection, summed over the core; 0 unless the best is chosen. seconds: of network calls."""

    samples: list[Pixels]
    errors: list[float]
    regression: Pixels | None
    uncertainty: npt.NDArray[np.float32] | None
    seconds: float


class Canvas(NamedTuple):
    """One LR block, padded to whole tiles and encoded: all that a sampler asks for. (1, channels, height, width)."""

    lr: Tensor  # as it came, not padded
    white: int  # the level of white in it, 255 or 65535
    condition: Condition
    regression: Tensor
    denoise: Denoise
    noise_of: Callable[[int], Noise]  # sample index -> (step -> z)
    member: Member


class Upscaler:
    """A model and a recipe. Calling it is a pure function of the LR pixels and the digest.

    Any number of threads may use one: their tiles share network calls. in_flight: windows that a call of the object
    works on at once; lanes: network calls that run side by side on a CPU, each on recipe.num_threads; like the threads,
    they change the speed and the memory, never the bytes. regression: whether its image is given too, which costs one
    more projection.
    """

    def __init__(
        self,
        model: SuperResolver,
        recipe: SamplingRecipe,
        *,
        device: str = "cpu",
        in_flight: int = 1,
        lanes: int = 1,
        regression: bool = True,
    ) -> None:
        recipe.check_fits(model.config)
        self.model = prepared(model, precision=recipe.precision, device=device)
        self.recipe = recipe
        self.device = device
        self.in_flight = in_flight
        self.gives_regression = regression and model.config.encoder.regresses
        networks = {"encode": self._encode, "denoise": self._predict}
        self.exchange = Exchange(networks, size=recipe.micro_batch, lanes=lanes, num_threads=recipe.num_threads)
        if model.denoiser is not None:
            self.grid = self.grid_from(recipe.start_level)

    def grid_from(self, level: float) -> Table:
        """Return the recipe's grid from this noise level (0: from pure noise) to 1."""
        return self.recipe.grid_of(self.model.config.schedule, start=level)

    def windows(self, height: int, width: int) -> list[Window]:
        """Return the windows of an LR image of this size."""
        recipe = self.recipe
        return windows(height, width, side=recipe.window, margin=recipe.margin, least=recipe.tile)

    def __call__(self, pixels: Pixels, *, digest: str) -> Upscaled:
        """Return the SR of uint8 or uint16 pixels (h, w, C). digest names the content: it keys the noise.

        Raises ValueError for channels that do not fit, NotFiniteError.
        """
        plan = self.windows(*pixels.shape[:2])

        def run(window: Window) -> Drawn:
            block = pixels[window.top : window.bottom, window.left : window.right]
            return self.window(block, window, digest=digest)

        if self.in_flight == 1 or len(plan) == 1:
            return self._joined(plan, map(run, plan), pixels)
        with ThreadPoolExecutor(self.in_flight) as pool:
            return self._joined(plan, pool.map(run, plan), pixels)

    @torch.inference_mode()
    def window(self, pixels: Pixels, window: Window, *, digest: str) -> Drawn:
        """Return what a window gives. pixels: all that it reads, (*window.shape, C). Raises as calling the object."""
        recipe, scale = self.recipe, self.model.config.scale
        rows, columns = (slice(s.start * scale, s.stop * scale) for s in window.inner)
        with self.opened(pixels, digest=digest, top=window.top, left=window.left) as canvas:

            def core(image: Tensor) -> Any:
                return np.ascontiguousarray(self.publishable(image, canvas)[rows, columns])

            errors, samples = list[float](), list[Any]()
            if self.model.denoiser is None:
                only = core(canvas.regression)
                return Drawn([only], [0.0], only, None, canvas.member.seconds)
            mean, square = np.float32(0), np.float32(0)
            for index in range(recipe.num_samples):
                image = self._sampled(canvas, recipe.sample_index + index)
                errors.append(self._error(image, canvas, window) if recipe.choice == "best" else 0.0)
                pixels_of_it = core(image)
                if index == 0 or recipe.choice == "best":
                    samples.append(pixels_of_it)
                if recipe.num_samples > 1:  # Welford's running mean and squares: one pass, no cancellation
                    level = pixels_of_it.astype(np.float32)
                    step = level - mean
                    mean = mean + step / np.float32(index + 1)
                    square = square + step * (level - mean)
            deviation = None
            if recipe.num_samples > 1:
                variance = np.asarray(square / np.float32(recipe.num_samples), np.float32).mean(axis=2)
                deviation = np.sqrt(variance) * np.float32(255 / canvas.white)
            if recipe.choice == "mean":
                samples = [np.rint(mean).astype(samples[0].dtype)]
            regression = core(canvas.regression) if self.gives_regression else None
            return Drawn(samples, errors, regression, deviation, canvas.member.seconds)

    def drawn(self, canvas: Canvas, sample_index: int) -> Any:
        """Return one sample of an opened image, (H, W, C). Raises ValueError for a model without a denoiser."""
        return self.publishable(self._sampled(canvas, sample_index), canvas)

    def fallback(self, pixels: Pixels, window: Window) -> Any:
        """Return bicubic, projected as the recipe says, of a window's core: what a rejected result is replaced by."""
        scale, white = self.model.config.scale, peak(pixels.dtype)
        lr = to_model_range(pixels)
        rows, columns = (slice(s.start * scale, s.stop * scale) for s in window.inner)
        projected = self._projected(upscale(lr, scale), lr, white)
        return np.ascontiguousarray(to_pixels(projected, pixels.dtype)[rows, columns])

    def check_channels(self, channels: int) -> None:
        """Raise ValueError for a number of channels that this model does not read; grey serves for any colours."""
        encoder = self.model.config.encoder
        if channels != encoder.lr_channels and (channels != 1 or encoder.extra_channels):
            raise ValueError(f"channels ({channels}) must be {encoder.lr_channels} for this model; convert the image")

    @contextmanager
    def opened(self, pixels: Pixels, *, digest: str, top: int = 0, left: int = 0) -> Iterator[Canvas]:
        """Encode a block of an image that begins at (top, left), and take part in the network calls for the body.

        Raises ValueError for channels that do not fit.
        """
        self.check_channels(pixels.shape[2])
        lr = to_model_range(pixels).to(self.device)
        recipe, wanted = self.recipe, self.model.config.encoder.lr_channels
        inputs = self._padded(lr.expand(1, wanted, -1, -1), *lr.shape[2:], scale=1)
        plan = tiles(inputs.shape[2], inputs.shape[3], tile=recipe.tile, halo=recipe.halo)
        with threads(recipe.num_threads), self.exchange.member() as member:
            condition, regression = self._condition(inputs, plan, member)

            def noise_of(sample_index: int) -> Noise:
                if self.model.denoiser is None:
                    raise ValueError("model has no denoiser: it must have one to draw samples; use a diffusion model")
                key = noise_key(recipe.seed, digest, sample_index)
                channels, height, width = self.model.diffused_shape(inputs.shape[2], inputs.shape[3])
                y0, x0 = (value * height // inputs.shape[2] for value in (top, left))
                return lambda step: gaussian(
                    key, channels=channels, height=height, width=width, step=step, y0=y0, x0=x0, device=self.device
                )

            denoise = self._denoise(condition, plan, member)
            yield Canvas(lr, peak(pixels.dtype), condition, regression, denoise, noise_of, member)

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
        """Return the x_0 of an HR image, uint8 or uint16 (H, W, 1 or C), on the canvas.

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

    def publishable(self, image: Tensor, canvas: Canvas) -> Any:
        """Return the pixels (H, W, C) of an image on the canvas: cropped, projected onto the LR, rounded."""
        dtype = np.uint8 if canvas.white == 255 else np.uint16
        return to_pixels(self._projected(self._cropped(image, canvas), canvas.lr, canvas.white), dtype)

    def _sampled(self, canvas: Canvas, sample_index: int) -> Tensor:
        noise = canvas.noise_of(sample_index)
        x_0 = self.run(canvas, self.grid, noise=noise, start=self._start(canvas) if self.recipe.start_level else None)
        return self.model.restore(x_0, canvas.condition)

    def _start(self, canvas: Canvas) -> Tensor:
        """Return the x_0 of the regression: 0 where it is the anchor itself."""
        if canvas.regression is canvas.condition.anchor:
            return torch.zeros((), device=self.device)
        return self.model.target(canvas.regression, canvas.condition)

    def _cropped(self, image: Tensor, canvas: Canvas) -> Tensor:
        """Return an image without the canvas's padding, in [-1, 1], of as many channels as the LR. Raises NotFinite."""
        scale, lr = self.model.config.scale, canvas.lr
        image = image[:, :, : lr.shape[2] * scale, : lr.shape[3] * scale]
        if not all(map(math.isfinite, image.aminmax())):  # of numbers that are none too; 20 times faster than isfinite
            raise NotFiniteError("the network gave values that are no numbers; look at the model's weights")
        image = image.clamp(-1, 1)
        # A grey image was given to each channel.
        return image.mean(dim=1, keepdim=True) if lr.shape[1] < self.model.config.encoder.channels else image

    def _projected(self, image: Tensor, lr: Tensor, white: int) -> Tensor:
        recipe, scale = self.recipe, self.model.config.scale
        if recipe.consistency == "off":
            return image.clamp(-1, 1)
        own, iterations = lr[:, : image.shape[1]], recipe.consistency_iterations
        return project(image, own, scale=scale, iterations=iterations, mode=recipe.consistency, half_step=1 / white)

    def _error(self, image: Tensor, canvas: Canvas, window: Window) -> float:
        """Return the squared error to the LR of an image before its projection, summed over the window's core."""
        image = self._cropped(image, canvas)
        off = downscale(image, self.model.config.scale).double() - canvas.lr[:, : image.shape[1]].double()
        return float(off[:, :, *window.inner].square().sum())

    def _joined(self, plan: list[Window], parts: Iterable[Drawn], pixels: Pixels) -> Upscaled:
        scale = self.model.config.scale
        height, width = pixels.shape[0] * scale, pixels.shape[1] * scale
        sheets: list[Any] = []
        errors, seconds, regression, uncertainty = np.zeros(0), 0.0, None, None
        for window, part in zip(plan, parts, strict=True):
            if not sheets:
                shape = (height, width, part.samples[0].shape[2])
                sheets = [np.empty(shape, pixels.dtype) for _ in part.samples]
                errors = np.zeros(len(part.errors))
                regression = None if part.regression is None else np.empty(shape, pixels.dtype)
                uncertainty = None if part.uncertainty is None else np.empty(shape[:2], np.float32)
            rows = slice(window.core_top * scale, window.core_bottom * scale)
            columns = slice(window.core_left * scale, window.core_right * scale)
            for sheet, made in zip(sheets, part.samples, strict=True):
                sheet[rows, columns] = made
            errors += part.errors
            seconds += part.seconds
            if regression is not None:
                regression[rows, columns] = part.regression
            if uncertainty is not None:
                uncertainty[rows, columns] = part.uncertainty
        return Upscaled(sheets[int(errors.argmin()) if len(sheets) > 1 else 0], regression, uncertainty, seconds)

    def _padded(self, image: Tensor, lr_height: int, lr_width: int, *, scale: int) -> Tensor:
        """Return the image on a canvas of whole tiles and strides, its border repeated."""
        tile, stride = self.recipe.tile, self.model.config.lr_stride
        right = (padded_size(lr_width, tile=tile, stride=stride) - lr_width) * scale
        bottom = (padded_size(lr_height, tile=tile, stride=stride) - lr_height) * scale
        return torch.nn.functional.pad(image, (0, right, 0, bottom), mode="replicate")

    def _condition(self, inputs: Tensor, plan: list[Tile], member: Member) -> tuple[Condition, Tensor]:
        if self.model.config.encoder.regresses:

            def ask(batch: Any) -> Any:
                return self.exchange.ask(member, "encode", batch)

            features, image = fuse(ask, [inputs], plan, tile=self.recipe.tile)
        else:  # an interpolation is exact on the whole, and costs no more there
            features, image = self.model.encoder(inputs)
        return self.model.condition_of(inputs, features, image), image

    def _denoise(self, condition: Condition, plan: list[Tile], member: Member) -> Denoise:
        recipe, kind = self.recipe, self.model.config.prediction

        def denoise(x_t: Tensor, noise_level: float) -> tuple[Tensor, Tensor]:
            level = torch.tensor(noise_level, device=self.device)

            def ask(batch: Any) -> Any:
                return self.exchange.ask(member, "denoise", [(*tile, level) for tile in batch])

            (prediction,) = fuse(ask, [condition.features, x_t], plan, tile=recipe.tile)
            return x0_and_eps(prediction, x_t, level[None], kind=kind)

        return denoise

    @torch.inference_mode()  # thread-local, as autocast is: the call may run in any member's thread
    def _encode(self, batch: list[Tensor]) -> list[Tensor]:
        with self._autocast():
            features, image = self.model.encoder(batch[0])
        return [features, image.float()]

    @torch.inference_mode()
    def _predict(self, batch: list[Tensor]) -> list[Tensor]:
        features, x_t, level = batch
        with self._autocast():
            return [self.model.predict(x_t, level, features).float()]

    def _autocast(self) -> torch.autocast:
        enabled = self.recipe.precision == "bf16"
        return torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16, enabled=enabled)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run the body with this many intra-operator threads in this thread, then restore what was set."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

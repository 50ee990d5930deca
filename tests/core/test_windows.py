"""Laws of windows: they partition the image, and what is made of a pixel does not show where they lie."""

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffsr_core.family import ModelConfig, SuperResolver
from diffsr_core.metrics import psnr
from diffsr_core.noise import gaussian, noise_key
from diffsr_core.pixels import Pixels, bicubic
from diffsr_core.sampling import SamplingRecipe
from diffsr_core.tiling import Window, windows
from diffsr_core.upscaler import Upscaler
from tests.core.tiny import ANCHORED, RRDB_TWIN, SEED3, SR3, SRDIFF

# On bicubic, told x_0: a denoiser that says 0 gives bicubic, and any other can be written down.
PLAIN = replace(SR3, anchor="bicubic", prediction="x_0", residual_clip=False)
RECIPE = SamplingRecipe(num_steps=2, tile=16, halo=4, micro_batch=4, window=16, margin=4, consistency="off")
Predict = Callable[[Tensor, Tensor, Tensor], Tensor]


def model_of(config: ModelConfig) -> SuperResolver:
    """Weights that keep the size of what goes through them, the zero-initialised ones included."""
    torch.manual_seed(1)
    model = SuperResolver(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.kaiming_normal_(parameter)
    return model


def upscaler(config: ModelConfig = PLAIN, *, in_flight: int = 1, **changes: object) -> Upscaler:
    return Upscaler(model_of(config), replace(RECIPE, **changes), in_flight=in_flight)  # type: ignore[arg-type]


def stubbed(predict: Predict, **changes: Any) -> Upscaler:
    found = upscaler(**changes)
    found.model.predict = predict  # type: ignore[method-assign]
    return found


def pointwise(x_t: Tensor, level: Tensor, features: Tensor) -> Tensor:
    """A network that looks at one pixel: its noise and its condition."""
    return 0.2 * torch.tanh(x_t + features) + 0.1 * level[:, None, None, None] * features


def nothing(x_t: Tensor, level: Tensor, features: Tensor) -> Tensor:
    return torch.zeros_like(x_t)


def picture(height: int, width: int, channels: int = 3) -> Pixels:
    y, x = np.mgrid[0:height, 0:width]
    waves = [128 + 70 * np.sin(x / (3 + c)) * np.cos(y / (5 - c)) for c in range(channels)]
    noise = np.random.default_rng(0).normal(0, 8, (height, width, channels))
    return (np.stack(waves, axis=2) + noise).clip(0, 255).astype(np.uint8)


# --- the grid ---


@pytest.mark.parametrize(("side", "margin", "least"), [(1, 0, 0), (8, 0, 8), (8, 3, 8), (16, 32, 12), (64, 8, 64)])
def test_the_cores_partition_every_size_on_an_absolute_grid_and_keep_their_margin(
    side: int, margin: int, least: int
) -> None:
    for height, width in ((1, 1), (side, side), (side + 1, 3 * side - 1), (129, 70)):
        covered = np.zeros((height, width), int)
        plan = windows(height, width, side=side, margin=margin, least=least)
        for w in plan:
            covered[w.core_top : w.core_bottom, w.core_left : w.core_right] += 1
            assert w.core_top % side == w.core_left % side == 0
            for size, low, core_low, core_high, high in (
                (height, w.top, w.core_top, w.core_bottom, w.bottom),
                (width, w.left, w.core_left, w.core_right, w.right),
            ):
                assert 0 <= low <= core_low < core_high <= high <= size
                assert core_low - low >= min(margin, core_low) and high - core_high == min(margin, size - core_high)
                assert high - low >= min(least, size)
                assert (core_low - low) in (margin, core_low, least)  # all on the model's stride
        assert (covered == 1).all()
        assert [(w.core_top, w.core_left) for w in plan] == sorted((w.core_top, w.core_left) for w in plan)


def test_a_window_says_what_is_read_and_where_its_core_lies_in_it() -> None:
    read = np.arange(40 * 50).reshape(40, 50)
    for w in windows(40, 50, side=16, margin=5):
        block = read[w.top : w.bottom, w.left : w.right]
        assert block.shape == w.shape
        assert np.array_equal(block[w.inner], read[w.core_top : w.core_bottom, w.core_left : w.core_right])


def test_an_image_of_one_window_does_not_know_of_the_margin() -> None:
    assert (
        windows(16, 16, side=16, margin=4) == windows(16, 16, side=16, margin=0) == windows(16, 16, side=99, margin=7)
    )
    pixels = picture(16, 13)
    found = {upscaler(ANCHORED, window=side, margin=margin)(pixels, digest="a").sr.tobytes()
             for side, margin in ((16, 0), (16, 4), (64, 0), (64, 32))}  # fmt: skip
    assert len(found) == 1


# --- what is made of a pixel ---


@pytest.mark.parametrize(
    ("config", "shape"), [(PLAIN, (3, 4)), (SEED3, (1, 4)), (ANCHORED, (48, 1))], ids=["sr3", "grey", "depth"]
)
def test_the_noise_of_a_pixel_is_that_of_its_place_in_the_image(config: ModelConfig, shape: tuple[int, int]) -> None:
    channels, factor = shape
    found = upscaler(config)
    key = noise_key(0, "a", 2)
    whole = gaussian(key, channels=channels, height=48 * factor, width=60 * factor, step=1)
    for w in found.windows(48, 60):
        block = picture(48, 60, config.encoder.channels)[w.top : w.bottom, w.left : w.right]
        with torch.inference_mode(), found.opened(block, digest="a", top=w.top, left=w.left) as canvas:
            noise = canvas.noise_of(2)(1)
        rows, columns = w.shape[0] * factor, w.shape[1] * factor
        seen = noise[:, :, :rows, :columns]
        there = whole[:, :, w.top * factor : w.bottom * factor, w.left * factor : w.right * factor]
        assert torch.equal(seen, there)


@pytest.mark.parametrize(
    ("sampler", "consistency", "margin"),
    [("ddim", "off", 4), ("ddpm", "off", 4), ("langevin", "off", 4), ("ddpm", "exact", 32), ("ddim", "interval", 32)],
)
def test_a_network_within_the_margin_gives_the_bytes_of_the_image_made_at_once(
    sampler: str, consistency: str, margin: int
) -> None:
    pixels, recipe = picture(40 if margin == 32 else 70, 53), {"sampler": sampler, "consistency": consistency}
    whole = stubbed(pointwise, window=80, **recipe)(pixels, digest="a").sr
    for side in (16, 48):
        found = stubbed(pointwise, window=side, margin=margin, **recipe)(pixels, digest="a").sr
        assert np.array_equal(found, whole)
    assert whole.std() > 20 and not np.array_equal(whole, bicubic(pixels, 4))


def test_a_network_beyond_the_margin_shows_the_windows() -> None:
    pixels = picture(70, 45)
    whole, cut = (stubbed(pointwise, window=side, margin=0)(pixels, digest="a").sr.astype(int) for side in (80, 16))
    assert np.abs(whole - cut).max() > 1


def test_a_convolutional_network_within_the_margin_is_within_a_level() -> None:
    # Two steps of a network that looks 6 px far, see test_canvas: windows are not joined between steps.
    pixels = picture(56, 44, 1)
    images = [
        upscaler(SEED3, window=window, margin=margin, tile=24, halo=8)(pixels, digest="a").sr.astype(int)
        for window, margin in ((64, 0), (24, 12), (24, 0))
    ]
    assert np.abs(images[0] - images[1]).max() <= 1
    assert np.abs(images[0] - images[2]).max() > 3


@pytest.mark.parametrize("width", [120, 90])  # the second window's core is 36 or 6 px wide; a tile is 84
def test_a_network_like_srdiff_with_the_full_halo_and_margin_is_above_60_db_to_the_image_made_at_once(
    width: int,
) -> None:
    # It looks at most 36 px far (test_upscaler), and one step is made: nothing reaches across a margin of as much.
    pixels, steps = picture(40, width), {"num_steps": 1}
    whole = upscaler(ANCHORED, window=width, tile=width, halo=0, **steps)(pixels, digest="a")
    found = upscaler(ANCHORED, window=84, tile=84, halo=36, margin=36, **steps)(pixels, digest="a")
    cut = upscaler(ANCHORED, window=84, tile=84, halo=36, margin=0, **steps)(pixels, digest="a")
    for one, other in zip(whole[:2], found[:2], strict=True):
        assert psnr(one, other) > 60
    assert psnr(whole.sr, cut.sr) < 60  # the measure sees a window where there is one


@pytest.mark.parametrize("config", [SRDIFF, ANCHORED, RRDB_TWIN], ids=["srdiff", "anchored", "regression"])
def test_windows_in_flight_do_not_change_a_byte(config: ModelConfig) -> None:
    pixels = picture(20, 17)
    one, three = (upscaler(config, in_flight=count)(pixels, digest="a") for count in (1, 3))
    assert one.sr.tobytes() == three.sr.tobytes()
    assert (one.regression is None) == (three.regression is None)
    assert one.regression is None or np.array_equal(one.regression, three.regression)


@pytest.mark.parametrize(
    ("height", "width", "consistency"),
    [(h, w, mode) for h, w in ((1, 1), (7, 3), (63, 129)) for mode in ("exact", "interval", "low-band", "off")]
    + [(127, 129, "exact"), (128, 1000, "exact")],
)
def test_a_constant_field_comes_back_constant_to_its_last_row(height: int, width: int, consistency: str) -> None:
    pixels = np.broadcast_to(np.array([0, 127, 255], np.uint8), (height, width, 3))
    found = stubbed(nothing, window=128, margin=32, tile=64, halo=8, num_steps=1, consistency=consistency)
    off = found(pixels, digest="a").sr.astype(int) - np.array([0, 127, 255])
    assert off.shape == (4 * height, 4 * width, 3) and np.abs(off).max() <= 1


# --- memory ---


class Largest(TorchDispatchMode):
    """Keeps the size of the largest tensor that is made, in values."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_a_window_costs_the_same_in_any_image() -> None:
    block = picture(24, 24)
    found = stubbed(nothing, consistency="exact", num_samples=2, choice="best", window=24, tile=24, num_steps=1)
    costs = []
    # The middle of 48 x 48 px and of 4 gigapixels: the window is all that is given, and all that is made.
    for place in (16, 65536 - 16 * 3):
        window = Window(place - 4, place + 20, place - 4, place + 20, place, place + 16, place, place + 16)
        found.window(block, window, digest="a")
        with Largest() as largest:
            found.window(block, window, digest="a")
        tracemalloc.start()
        drawn = found.window(block, window, digest="a")
        costs.append((largest.numel, tracemalloc.get_traced_memory()[1]))
        tracemalloc.stop()
        assert [sample.shape for sample in drawn.samples] == [(64, 64, 3)] * 2
    assert 0 < costs[0][0] == costs[1][0] <= 8 * (4 * 24) ** 2 * 3
    assert costs[1][1] == pytest.approx(costs[0][1], rel=0.1) and costs[1][1] < 4 << 20

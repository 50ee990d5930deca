"""Whether a device gives the same bytes whatever runs beside, in whatever order: law 3, with the settings of the jobs.

TF32 stays as torch has it, since that is what a job runs. No byte may differ.
"""

import random
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from diffsr_core import presets
from diffsr_core.batching import Member
from diffsr_core.family import Condition, ModelConfig
from diffsr_core.pixels import Pixels
from diffsr_core.sampler import Denoise
from diffsr_core.sampling import SamplingRecipe
from diffsr_core.tiling import Tile
from diffsr_core.upscaler import Upscaler, threads
from tests.benchmarks.gpu_cases import Case, Section, Verdict, model_of, picture
from tests.core import tiny

PRECISIONS: tuple[Literal["float32", "bf16"], ...] = ("float32", "bf16")


class Scene(NamedTuple):
    """A model, how it is sampled, and pictures: the first is looked at, the others run beside it."""

    name: str
    config: ModelConfig
    recipe: SamplingRecipe
    pictures: tuple[Pixels, ...]
    device: str

    def upscaler(self, kind: type[Upscaler] = Upscaler, *, in_flight: int = 1) -> Upscaler:
        """Return a new upscaler of the scene."""
        return kind(model_of(self.config), self.recipe, device=self.device, in_flight=in_flight)

    def of(self, upscaler: Upscaler, index: int = 0) -> bytes:
        """Return all that a picture gives."""
        made = upscaler(self.pictures[index], digest=str(index))
        return made.sr.tobytes() + (b"" if made.regression is None else made.regression.tobytes())


class Reversed(Upscaler):
    """The tiles are asked for from the last to the first."""

    def _condition(self, inputs: Tensor, plan: list[Tile], member: Member) -> tuple[Condition, Tensor]:
        return super()._condition(inputs, self.order(plan), member)

    def _denoise(self, condition: Condition, plan: list[Tile], member: Member) -> Denoise:
        return super()._denoise(condition, self.order(plan), member)

    def order(self, plan: list[Tile]) -> list[Tile]:
        """Return the tiles in the order of this kind."""
        return plan[::-1]


class Shuffled(Reversed):
    """The tiles are asked for in an order that only a seed explains."""

    def order(self, plan: list[Tile]) -> list[Tile]:
        return random.Random(5).sample(plan, len(plan))


def section(device: str) -> Section:
    """Return the cases of determinism."""
    cases = []
    for scene in scenes(device):
        laws = (
            ("in_flight", any_in_flight),
            ("neighbours", any_neighbours),
            ("repeated", repeated),
            ("tile order", any_tile_order),
            ("place in a call", any_place),
        )
        cases += [
            Case(f"{law}: {scene.name}", partial(judged, f"{law}: {scene.name}", run, scene)) for law, run in laws
        ]
    return Section("Determinism", cases)


def scenes(device: str) -> list[Scene]:
    """Return what is looked at: one step and several, each in both precisions."""
    sizes: list[tuple[int, ...]] = [(200, 300), (64, 64), (31, 200, 1), (129, 70), (300, 40)]
    models: list[tuple[str, ModelConfig, dict[str, Any]]]
    common: dict[str, Any]
    if device == "cpu":
        sizes = [(20, 30), (16, 16), (9, 20, 1)]
        models = [("anchored", tiny.MODELS["anchored"], {"num_steps": 2})]
        # 4, not 3: torch's Mish on a CPU gives the last elements of a tensor, if they fill no vector, other bits.
        common = {"window": 24, "margin": 8, "tile": 16, "halo": 4, "micro_batch": 4}
    else:
        models = [
            ("anchored-x4", presets.get("anchored-x4").model, {"num_steps": 1}),
            ("nano-x4", presets.get("nano-x4").model, {"num_steps": 3, "sampler": "ddpm"}),
        ]
        common = {"window": 128, "margin": 24, "tile": 64, "halo": 8, "micro_batch": 16}
    pictures = tuple(picture(*size, seed=index) for index, size in enumerate(sizes))
    return [
        Scene(f"{name}, {precision}", config, SamplingRecipe(precision=precision, **common, **own), pictures, device)
        for name, config, own in models
        for precision in PRECISIONS
    ]


def judged(name: str, law: Any, scene: Scene) -> list[Verdict]:
    """Return the verdict on pairs of bytes of which none may differ."""
    pairs = list(law(scene))
    differing = sum(count_differing(a, b) for a, b in pairs)
    total = sum(len(a) for a, _ in pairs)
    return [Verdict(name, f"{differing:,} of {total:,} bytes differ", "0", differing == 0)]


def count_differing(a: bytes, b: bytes) -> int:
    """Return how many bytes differ."""
    assert len(a) == len(b)
    one, two = (torch.frombuffer(bytearray(x), dtype=torch.uint8) for x in (a, b))
    return int((one != two).sum())


def any_in_flight(scene: Scene) -> Iterable[tuple[bytes, bytes]]:
    """Yield the picture from one window at a time and from several."""
    alone = scene.of(scene.upscaler())
    for in_flight in (2, 4):
        yield alone, scene.of(scene.upscaler(in_flight=in_flight))


def any_neighbours(scene: Scene) -> Iterable[tuple[bytes, bytes]]:
    """Yield each picture by itself, and from threads that share one upscaler, in two orders."""
    alone = [scene.of(scene.upscaler(), index) for index in range(len(scene.pictures))]
    shared = scene.upscaler(in_flight=2)
    for order in (list(range(len(alone))), list(range(len(alone)))[::-1]):
        with ThreadPoolExecutor(len(order)) as pool:
            together = list(pool.map(partial(scene.of, shared), order))
        yield from ((alone[index], made) for index, made in zip(order, together, strict=True))


def repeated(scene: Scene) -> Iterable[tuple[bytes, bytes]]:
    """Yield the picture again from the same upscaler, after others, and from a new one."""
    first = scene.upscaler()
    once = scene.of(first)
    yield once, scene.of(first)
    for index in range(1, len(scene.pictures)):
        scene.of(first, index)
    yield once, scene.of(first)
    yield once, scene.of(scene.upscaler())


def any_tile_order(scene: Scene) -> Iterable[tuple[bytes, bytes]]:
    """Yield the picture and that of other orders of its tiles."""
    once = scene.of(scene.upscaler())
    for kind in (Reversed, Shuffled):
        yield once, scene.of(scene.upscaler(kind))


def any_place(scene: Scene) -> Iterable[tuple[bytes, bytes]]:
    """Yield what the denoiser makes of one tile, first in a call and at each other place, beside other tiles."""
    upscaler, size = scene.upscaler(), scene.recipe.micro_batch
    generator, side = torch.Generator().manual_seed(6), scene.recipe.tile
    config = scene.config
    lr = torch.rand(1, config.encoder.lr_channels, side, side, generator=generator) * 2 - 1
    shapes = (tuple(model_of(config).condition(lr).features.shape[1:]), config.diffused_shape(side, side))
    batch = [torch.randn(size, *shape, generator=generator).to(scene.device) for shape in shapes]
    batch.append(torch.rand(size, generator=generator).to(scene.device))

    def made(place: int) -> bytes:
        rolled = [torch.roll(x, place, dims=0) for x in batch]
        return bytes(upscaler._predict(rolled)[0][place].cpu().numpy().tobytes())

    with threads(scene.recipe.num_threads):
        found = [made(place) for place in range(size)]
    for other in found[1:]:
        yield found[0], other

"""Megapixels a second of the upscaler, and how much of the device that uses.

Utilisation is against the best 3x3 convolution of the same type in the same run, channels_last. FLOPs are those of the
tiles that the image needs; what fills a call up counts as nothing. `network`: of the time within network calls alone;
`all`: of the whole call, with noise, projection, and the copies. Their quotient is what the network waits for.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffsr_core import presets
from diffsr_core.batching import Exchange, Network
from diffsr_core.consistency import project
from diffsr_core.family import ModelConfig, SuperResolver
from diffsr_core.noise import gaussian, noise_key
from diffsr_core.pixels import to_model_range, to_pixels
from diffsr_core.resize import upscale
from diffsr_core.sampling import SamplingRecipe
from diffsr_core.tiling import padded_size, tiles, windows
from diffsr_core.upscaler import Upscaler
from tests.benchmarks.gpu_cases import Case, Cells, Section, model_of, picture, tf32
from tests.benchmarks.training_gpu import now

STEPS = {"anchored-x4": 1, "nano-x4": 4}
HEAD = ("model", "steps", "type", "how", "micro_batch", "MP/s", "utilisation, network", "utilisation, all")
BESIDE_HEAD = ("beside the network, one window", "ms")
IN_FLIGHT = 2
# (channels, side px, images) of the convolutions that a device may be best at.
PEAKS = {"cuda": ((256, 128, 32), (512, 64, 32), (64, 64, 256)), "cpu": ((64, 32, 1),)}


class Kind(NamedTuple):
    """How numbers are held: the recipe's precision, and whether convolutions may round float32 to TF32."""

    name: str
    precision: str
    tf32: bool


# torch lets convolutions use TF32, and no job says otherwise: that is the float32 of a recipe today.
KINDS = (Kind("float32", "float32", False), Kind("float32 (TF32)", "float32", True), Kind("bf16", "bf16", True))


class Load(NamedTuple):
    """What is upscaled, and for how long at least."""

    size: tuple[int, int]
    recipe: dict[str, int]
    micro_batches: tuple[int, ...]
    seconds: float


LOADS = {
    "cuda": Load((768, 1024), {"window": 512, "margin": 24, "tile": 64, "halo": 8}, (4, 16, 64), 1.0),
    "cpu": Load((12, 20), {"window": 16, "margin": 4, "tile": 16, "halo": 4}, (2,), 0.0),
}


def section(device: str) -> Section:
    """Return the cases of speed."""
    load, cases = LOADS[device], []
    for how, kind, micro_batch in ways(device):
        # On a CPU one will do: tracing takes longer than all the rest.
        for name in STEPS if device == "cuda" or how == "eager" else ("anchored-x4",):
            label = f"speed of {name}, {kind.name}, {how}, micro_batch {micro_batch}"
            takes = 60.0 if how == "compiled" else 10.0
            cases.append(Case(label, partial(speed, name, kind, how, micro_batch, device), takes))
    note = f"in_flight {IN_FLIGHT}; LR {load.size[0]} x {load.size[1]} px; ddim; projection exact, 6 iterations."
    left_out = (
        "\nCUDA graphs and TF32 are left out on a CPU; torch.compile only traces there." if device == "cpu" else ""
    )
    return Section("Speed of upscaling", cases, HEAD, note + left_out)


def ways(device: str) -> list[tuple[str, Kind, int]]:
    """Return (how, kind, micro_batch) in the order of their cost: what compiles comes last."""
    exact, fast, narrow = KINDS
    sizes = LOADS[device].micro_batches
    kinds = KINDS if device == "cuda" else (exact, narrow)
    found = [("eager", kind, size) for kind in kinds for size in sizes]
    if device == "cuda":
        found += [("graphs", kind, size) for kind in (fast, narrow) for size in sizes]
    return [*found, ("compiled", narrow, sizes[-1])]


def yardsticks_section(device: str) -> Section:
    """Return the case of the yardsticks."""
    head = ("3x3 convolution, TFLOP/s", *(f"{shape[0]} channels" for shape in PEAKS[device]))
    return Section("Yardsticks", [Case("yardsticks", partial(yardsticks, device))], head)


def beside_section(device: str) -> Section:
    """Return the case of what a window costs beside the network."""
    return Section("Beside the network", [Case("beside the network", partial(beside, device))], BESIDE_HEAD)


def speed(name: str, kind: Kind, how: str, micro_batch: int, device: str) -> list[Cells]:
    """Measure one way of upscaling one picture, again and again for the load's seconds."""
    load, config = LOADS[device], presets.get(name).model
    recipe = SamplingRecipe(
        num_steps=STEPS[name],
        micro_batch=micro_batch,
        precision="bf16" if kind.precision == "bf16" else "float32",
        **load.recipe,  # type: ignore[arg-type]
    )
    pixels = picture(*load.size)
    with tf32(kind.tf32):
        upscaler = Upscaler(model_of(config), recipe, device=device, regression=False)
        hasten(upscaler, how, device)
        for upscaler.in_flight in (1, IN_FLIGHT):  # what compiles or records does so in this thread
            upscaler(pixels, digest="speed")
        began, count, network_s = now(device), 0, 0.0
        while count == 0 or now(device) - began < load.seconds:
            network_s += upscaler(pixels, digest="speed").seconds
            count += 1
        seconds = (now(device) - began) / count
        best = peak(kind.precision, kind.tf32, device)
    flops = flops_of(config, recipe, load.size)
    megapixels = load.size[0] * load.size[1] * config.scale**2 / 1e6
    shares = (flops / (took * best) for took in (network_s / count, seconds))
    texts = (name, str(STEPS[name]), kind.name, how, str(micro_batch), f"{megapixels / seconds:.3g}")
    return [Cells((*texts, *(f"{share:.1%}" for share in shares)))]


def hasten(upscaler: Upscaler, how: str, device: str) -> None:
    """Have the networks compiled, or recorded as CUDA graphs, in the place of eager ones."""
    if how == "compiled":
        backend = "inductor" if device == "cuda" else "eager"
        for part in (upscaler.model.encoder, upscaler.model.denoiser):
            if part is not None:
                part.compile(backend=backend, dynamic=False)
    elif how == "graphs":
        networks: dict[str, Network] = {"encode": Recorded(upscaler._encode), "denoise": Recorded(upscaler._predict)}
        upscaler.exchange = Exchange(networks, size=upscaler.recipe.micro_batch)


class Recorded:
    """A network of one fixed shape as a CUDA graph: what the host launches one by one is launched as one."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []

    @torch.inference_mode()
    def __call__(self, batch: list[Tensor]) -> list[Tensor]:
        """Return what the network gives. Calls come one at a time, as the exchange makes them."""
        if self.graph is None:
            self._record(batch)
        assert self.graph is not None
        for held, given in zip(self.inputs, batch, strict=True):
            held.copy_(given)
        self.graph.replay()
        return [output.clone() for output in self.outputs]

    def _record(self, batch: list[Tensor]) -> None:
        self.inputs = [x.clone() for x in batch]
        beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):  # tables and plans of cuDNN are made before the recording
            for _ in range(3):
                self.network(self.inputs)
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.outputs = self.network(self.inputs)
        self.graph = graph


@lru_cache
def peak(precision: str, allowed: bool, device: str) -> float:
    """Return FLOP/s of the best 3x3 convolution of this type."""
    return max(convolution(shape, precision, allowed, device) for shape in PEAKS[device])


@lru_cache
def convolution(shape: tuple[int, int, int], precision: str, allowed: bool, device: str) -> float:
    """Return FLOP/s of a 3x3 convolution (channels, side px, images), channels_last: the best of five times."""
    channels, side, images = shape
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    conv = nn.Conv2d(channels, channels, 3, padding=1, device=device, dtype=dtype)
    conv = conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(images, channels, side, side, device=device, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    repeats = 10 if device == "cuda" else 1
    best = 0.0
    with tf32(allowed), torch.inference_mode():
        conv(x)
        for _ in range(5):
            began = now(device)
            for _ in range(repeats):
                conv(x)
            took = now(device) - began
            best = max(best, repeats * 2 * 9 * channels**2 * images * side**2 / took)
    return best


def yardsticks(device: str) -> list[Cells]:
    """Return what the convolutions reach, by type and channels."""
    rows = []
    for kind in KINDS:
        each = (convolution(shape, kind.precision, kind.tf32, device) / 1e12 for shape in PEAKS[device])
        rows.append(Cells((kind.name, *(f"{value:.3g}" for value in each))))
    return rows


@lru_cache
def flops_of(config: ModelConfig, recipe: SamplingRecipe, size: tuple[int, int]) -> int:
    """Return the FLOPs of the tiles of an image of this LR size."""
    side, num_tiles = recipe.tile, 0
    for window in windows(*size, side=recipe.window, margin=recipe.margin, least=side):
        height, width = (padded_size(length, tile=side, stride=config.lr_stride) for length in window.shape)
        num_tiles += len(tiles(height, width, tile=side, halo=recipe.halo))
    with torch.device("meta"), torch.inference_mode():
        model = SuperResolver(config).eval()
        lr, x_t = (torch.empty(1, *shape) for shape in ((3, side, side), config.diffused_shape(side, side)))
        with FlopCounterMode(display=False) as once:
            features, _ = model.encoder(lr)
        with FlopCounterMode(display=False) as each:
            model.predict(x_t, torch.empty(1), features)
    return int(num_tiles * (once.get_total_flops() + recipe.num_steps * each.get_total_flops()))


def beside(device: str) -> list[Cells]:
    """Measure what a window of a recipe costs beside its network calls: noise, projection, pixels there and back."""
    load = LOADS[device]
    side = load.recipe["window"] + 2 * load.recipe["margin"]
    pixels = picture(side, side)
    lr = to_model_range(pixels).to(device)
    sr = upscale(lr, 4)
    key = noise_key(0, "speed", 0)
    parts: dict[str, Callable[[], object]] = {
        "noise, 48 channels": lambda: gaussian(key, channels=48, height=side, width=side, step=0, device=device),
        "projection, 6 iterations": lambda: project(sr, lr, scale=4, iterations=6),
        "LR to the device": lambda: to_model_range(pixels).to(device),
        "SR to pixels": lambda: to_pixels(sr),
    }
    rows = []
    for name, part in parts.items():
        part()
        began = now(device)
        repeats = 5 if device == "cuda" else 1
        for _ in range(repeats):
            part()
        rows.append(Cells((f"{name}, {side} px", f"{(now(device) - began) / repeats * 1e3:,.1f}")))
    return rows

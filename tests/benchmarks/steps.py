"""One step of every denoiser against one large convolution of as many FLOPs; prints the tables of steps.md.

    python -m tests.benchmarks.steps --compile > tests/benchmarks/steps.md
    python -m tests.benchmarks.steps sr3-lite-16-128 srdiff-df2k-x4

All on one thread, as a recipe is by default, and in CPU seconds of that thread: on an idle machine these are the
seconds on the wall, and on a shared one they leave out what others took. The variants of a network are run in turn,
each with its convolution, two to eight times; each reports its best.
"""

import argparse
import copy
import datetime
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffsr_core import presets
from diffsr_core.family import DENOISERS, ModelConfig, SuperResolver, x0_and_eps
from diffsr_core.networks.sr3 import SR3Config
from diffsr_core.pixels import to_pixels
from diffsr_core.prepared import prepared
from diffsr_core.sampler import default_grid, last, sample
from diffsr_core.schedule import sampling_grid

LITE = "sr3-lite-16-128"
SECONDS_A_NETWORK = 8.0  # of repeating all variants in turn: at least twice, at most eight times
LARGE_GFLOPS = 1000  # from here on only the first and the last variant are run
VARIANTS = ("float32 NCHW", "float32 channels_last", "float32 prepared", "bf16 channels_last", "bf16 prepared")
CONV_CHANNELS, CONV_SIZE_PX = 256, 128
CONV_GFLOPS = 2 * 9 * CONV_CHANNELS**2 * CONV_SIZE_PX**2 / 1e9


class Measured(NamedTuple):
    """Per variant: the least seconds of the network and of the convolution beside it, and the network's output."""

    gflops: float
    seconds: dict[str, float]
    conv_seconds: dict[str, float]
    outputs: dict[str, Tensor]

    def psnr(self, name: str) -> float:
        """Return the PSNR of a variant's output against the plain one, dB; the range is that of the plain output."""
        plain = self.outputs[VARIANTS[0]]
        mse = (self.outputs[name].float() - plain).square().mean()
        return float(10 * torch.log10((plain.max() - plain.min()) ** 2 / mse))


def denoiser_of(config: ModelConfig) -> nn.Module:
    """Return the denoiser in eval mode, its weights random, and none of them zero as training would begin."""
    assert config.denoiser is not None
    torch.manual_seed(0)
    denoiser: nn.Module = DENOISERS[config.denoiser.kind][1](config.denoiser).eval()
    for module in denoiser.modules():
        if isinstance(module, nn.Conv2d) and not module.weight.any():
            module.reset_parameters()
    return denoiser


def inputs_of(preset: presets.Preset) -> tuple[Tensor, Tensor, Tensor]:
    """Return (x_t, position, condition) of one patch of the preset, a batch of one."""
    config, denoiser = preset.model, preset.model.denoiser
    assert denoiser is not None
    size = preset.patch // config.space_to_depth
    shrunk = size // getattr(denoiser, "condition_scale", 1)
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(1, denoiser.channels, size, size, generator=generator)
    condition = torch.rand(1, denoiser.condition_channels, shrunk, shrunk, generator=generator)
    return x_t, torch.tensor([0.7 if config.told == "amplitude" else 40.0]), 2 * condition - 1


def gflops_of(network: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    """Return the GFLOPs of one call, a multiplication and an addition being two; nothing is computed."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        copy.deepcopy(network).to("meta")(*(tensor.to("meta") for tensor in inputs))
    return float(counter.get_total_flops()) / 1e9


def variant_of(network: nn.Module, name: str) -> nn.Module:
    """Return what a variant calls; the plain ones are the network itself, so that they hold no second copy."""
    precision, how = name.split()
    if how == "prepared":
        return prepared(network, precision="bf16" if precision == "bf16" else "float32")
    return network if how == "NCHW" else copy.deepcopy(network).to(memory_format=torch.channels_last)


def call(network: nn.Module, inputs: tuple[Tensor, ...], *, name: str) -> Tensor:
    """Return the network's output as float32, under the autocast that the variant's precision asks for."""
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=name.startswith("bf16")):
        out: Tensor = network(*inputs)
        return out.float()


def measured(network: nn.Module, inputs: tuple[Tensor, ...]) -> Measured:
    """Return what each variant and its convolution take, run in turn."""
    gflops = gflops_of(network, inputs)
    names = VARIANTS if gflops < LARGE_GFLOPS else (VARIANTS[0], VARIANTS[-1])
    networks = {name: variant_of(network, name) for name in names}
    yardsticks = {
        name: (conv.to(dtype), pixels.to(dtype))
        for name in names
        for dtype in [torch.bfloat16 if name.startswith("bf16") else torch.float32]
        for conv, pixels in [large_convolution()]
    }
    result = Measured(gflops, {}, {}, {})
    began, rounds = time.monotonic(), 0
    while rounds < 2 or (rounds < 8 and time.monotonic() - began < SECONDS_A_NETWORK):
        for name in names:
            started = time.thread_time()
            result.outputs[name] = call(networks[name], inputs, name=name)
            ended = time.thread_time()
            conv, pixels = yardsticks[name]
            for _ in range(2):
                before = time.thread_time()
                with torch.inference_mode():
                    conv(pixels)
                took = time.thread_time() - before
                result.conv_seconds[name] = min(took, result.conv_seconds.get(name, math.inf))
            result.seconds[name] = min(ended - started, result.seconds.get(name, math.inf))
        rounds += 1
    return result


def large_convolution() -> tuple[nn.Conv2d, Tensor]:
    """Return a 3x3 convolution of CONV_CHANNELS channels and its input, channels_last."""
    torch.manual_seed(2)
    conv = nn.Conv2d(CONV_CHANNELS, CONV_CHANNELS, 3, padding=1).to(memory_format=torch.channels_last)
    pixels = torch.randn(1, CONV_CHANNELS, CONV_SIZE_PX, CONV_SIZE_PX)
    return conv, pixels.contiguous(memory_format=torch.channels_last)


def utilisation(result: Measured, name: str) -> float:
    """Return the seconds that the convolution would take for as many FLOPs, over those that the network took."""
    return result.conv_seconds[name] * result.gflops / CONV_GFLOPS / result.seconds[name]


def row(name: str, result: Measured) -> str:
    """Return the row of one preset: ms and utilisation of every variant, and the gain of the last over the first."""
    cells = [
        f"{result.seconds[v] * 1e3:,.0f} ({utilisation(result, v):.0%})" if v in result.seconds else "-"
        for v in VARIANTS
    ]
    gain = result.seconds[VARIANTS[0]] / result.seconds[VARIANTS[-1]]
    return f"| {name} | {result.gflops:,.1f} | {' | '.join(cells)} | {gain:.2f}x | {result.psnr(VARIANTS[-1]):.1f} |"


def sample_psnr(preset: presets.Preset, network: nn.Module) -> float:
    """Return the PSNR in dB between the 8-bit images of a sample of four steps: prepared bf16 against plain float32."""
    x_t, _, condition = inputs_of(preset)
    model = SuperResolver(preset.model)
    grid = sampling_grid(preset.model.schedule, 4, family=default_grid("ddim"))
    images = []
    for name in (VARIANTS[0], VARIANTS[-1]):
        model.denoiser = variant_of(network, name)

        def denoise(x: Tensor, noise_level: float, *, bf16: bool = name.startswith("bf16")) -> tuple[Tensor, Tensor]:
            level = torch.tensor([noise_level])
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                prediction = model.predict(x, level, condition).float()
            return x0_and_eps(prediction, x, level, kind=preset.model.prediction)

        with torch.inference_mode():
            images.append(to_pixels(last(sample(denoise, grid, noise=lambda _: x_t))).astype(float))
    mse = float(((images[0] - images[1]) ** 2).mean())
    return 10 * math.log10(255**2 / mse) if mse else math.inf


def hard_figure(flavour: str, preset: presets.Preset) -> str:
    """Return the rows of one flavour of the 98 M network: the gain per variant, and how near the results are."""
    network, inputs = denoiser_of(preset.model), inputs_of(preset)
    result = measured(network, inputs)
    image_db = sample_psnr(preset, network)
    plain = result.seconds[VARIANTS[0]]
    return "\n".join(
        f"| {flavour} | {name} | {taken * 1e3:.0f} | {plain / taken:.2f}x | {utilisation(result, name):.0%} | "
        f"{'-' if name == VARIANTS[0] else f'{result.psnr(name):.1f}'} | "
        f"{f'{image_db:.1f}' if name == VARIANTS[-1] else '-'} |"
        for name, taken in result.seconds.items()
    )


def compile_line(preset: presets.Preset) -> str:
    """Return what torch.compile takes and gives: the channels_last network, bf16, its weights frozen into it."""
    network, inputs = denoiser_of(preset.model), inputs_of(preset)
    inputs = tuple(t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in inputs)
    fast = torch.compile(variant_of(network, "bf16 channels_last"), options={"freezing": True})
    began = time.monotonic()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        fast(*inputs)
        compiling = time.monotonic() - began
        taken = math.inf
        for _ in range(8):
            started = time.thread_time()
            fast(*inputs)
            taken = min(taken, time.thread_time() - started)
    return f"{taken * 1e3:.0f} ms a step, after {compiling:.0f} s of compilation (on the wall)"


def cpu_name() -> str:
    """Return the processor's name, and which of the instructions that matter here it has."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    flags = next(line.split() for line in lines if line.startswith("flags"))
    return f"{name} ({', '.join(f for f in ('avx512f', 'avx512_bf16', 'amx_bf16') if f in flags) or 'no AVX-512'})"


def main() -> None:
    """Print steps.md, or the rows of the presets that are named."""
    parser = argparse.ArgumentParser(description="One step of every denoiser against one large convolution.")
    parser.add_argument("presets", nargs="*", help=f"of {', '.join(presets.PRESETS)}; all when none is named")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile too: minutes, a C++ compiler")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    lite = presets.get(LITE)
    assert isinstance(lite.model.denoiser, SR3Config)
    published = replace(
        lite, model=replace(lite.model, told="noise_level", denoiser=replace(lite.model.denoiser, released=False))
    )
    print(f"""# One step of every denoiser

Printed by `python -m tests.benchmarks.steps{" --compile" if arguments.compile else ""}` on {datetime.date.today()}.
{cpu_name()}, 1 thread, torch {torch.__version__}.

Milliseconds of CPU time per step (a batch of one, the preset's patch), and in brackets the utilisation: the time that
as many FLOPs take in one large convolution over the network's own. That convolution is 3x3, channels_last, of the same
type, in the same run; {CONV_CHANNELS} to {CONV_CHANNELS} channels
at {CONV_SIZE_PX} px. A multiplication and an addition are two FLOPs.
Weights are random, and none of them zero. bf16 is under autocast. *prepared*: channels_last, weights cast and packed
once. PSNR is against float32 NCHW; a prediction's range is that of the latter. The image is of four steps of ddim from
noise with these random weights: what trained ones give was not measured.

## {lite.params / 1e6:.0f} M at 16 to 128: twice as fast, and alike

| flavour | variant | ms | against plain | utilisation | PSNR of the prediction, dB | PSNR of a 4-step image, dB |
|---|---|---|---|---|---|---|
{hard_figure("released", lite)}
{hard_figure("published", published)}
""")
    if arguments.compile:
        print(f"torch.compile of the released flavour, bf16 with frozen weights: {compile_line(lite)}.\n")
    print(f"""## Every preset

| preset | GFLOPs | {" | ".join(VARIANTS)} | gain | PSNR, dB |
|---|---|{"---|" * len(VARIANTS)}---|---|""")
    for name in arguments.presets or presets.PRESETS:
        preset = presets.get(name)
        print(row(name, measured(denoiser_of(preset.model), inputs_of(preset))), flush=True)
    print("\n*gain*: bf16 prepared against float32 NCHW; the PSNR is of the same two.")


if __name__ == "__main__":
    main()

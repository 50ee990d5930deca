"""One training step of the large presets on a GPU: samples per second, and how much of it they use; prints its page.

    python -m tests.benchmarks.training_gpu --compile > tests/benchmarks/training_gpu.md
    python -m tests.benchmarks.training_gpu --device cpu --presets nano-x4 --batch 2 --steps 3   # tries the code

It needs no Ray, no pairs and no network: images and weights are random.
"""

import argparse
import datetime
import gc
import itertools
import sys
import time
from dataclasses import replace
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from diffsr_core import presets
from diffsr_core.family import SuperResolver
from diffsr_core.resize import downscale
from diffsr_core.training import Trainer, fit
from tests.benchmarks.steps import cpu_name

PRESETS = ("srdiff-df2k-x4", "sr3-lite-16-128", "anchored-x4")
WARM_STEPS = 5
MATRIX_SIDE = {"cuda": 8192, "cpu": 1024}
HEAD = (
    "preset", "weights", "batch", "TFLOP of a step", "GiB", "samples/s, step", "utilisation", "samples/s, loop",
    "utilisation", "waiting",
)  # fmt: skip
PAGE = """# Training on one GPU

Printed by `{command}` on {date}.
{device}, torch {torch}, bf16.

{head}
|{rule}
{rows}

*Step*: forward, backward, clipping, optimizer and average, a batch that is already on the device. *Loop*: `fit`, which
draws noise and symmetries on the CPU in a thread beside, and copies them; *waiting* is the share of its time in which
the step waited for that. *Utilisation*: FLOPs of the model's forward and backward pass, as torch counts them, over what
products of two bf16 matrices ({side} x {side}) do in that time: {peak:.4g} TFLOP/s, the best of this run. A frozen
encoder counts with its forward pass only. The goal is 40 % for sr3-lite-16-128.
"""


class Timed(NamedTuple):
    """Of one preset: FLOPs of a step, seconds of a step by itself and in the loop, of which it waited for its batch."""

    weights: int
    flops: int
    step_s: float
    loop_s: float
    waited_s: float
    memory_gib: float


def peak(device: str, side: int) -> float:
    """Return the FLOP/s of the best of some products of two bf16 matrices (side, side)."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(8):
        began = now(device)
        for _ in range(10):
            a @ b
        best = max(best, 10 * 2 * side**3 / (now(device) - began))
    return best


def now(device: str) -> float:
    """Return the time at which the device has done what it was given, in seconds."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(name: str, *, device: str, batch: int, num_steps: int, compiled: bool) -> Timed:
    """Return what the last stage of a preset takes on random images, after WARM_STEPS."""
    preset = presets.get(name)
    stage = replace(preset.recipe.stages[-1], num_steps=WARM_STEPS + 2 * num_steps)
    # Random images teach nothing, and a step that is skipped would be a cheaper one.
    recipe = replace(preset.recipe, stages=(stage,), batch_size=batch, precision="bf16", spike_factor=1e9)
    torch.manual_seed(0)
    hr = torch.rand(batch, preset.model.encoder.channels, preset.patch, preset.patch) * 2 - 1
    lr = downscale(hr, preset.model.scale)
    flops = flops_of(Trainer(SuperResolver(preset.model), recipe, device=device), hr, lr)
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trainer = Trainer(SuperResolver(preset.model), recipe, device=device, compiled=compiled)
    drawn = trainer.draw(0, hr, lr)
    for _ in range(WARM_STEPS):
        trainer.optimise(drawn)
    began = now(device)
    for _ in range(num_steps):
        trainer.optimise(drawn)
    step_s = (now(device) - began) / num_steps
    began = now(device)
    waited_s = sum(metrics["waited_s"] for metrics in fit(trainer, itertools.repeat((hr, lr)))) / num_steps
    loop_s = (now(device) - began) / num_steps
    assert trainer.skipped == 0
    weights = sum(parameter.numel() for parameter in trainer.model.parameters())
    memory_gib = 0.0 if device == "cpu" else torch.cuda.max_memory_allocated() / 2**30
    return Timed(weights, flops, step_s, loop_s, waited_s, memory_gib)


def flops_of(trainer: Trainer, hr: torch.Tensor, lr: torch.Tensor) -> int:
    """Return the FLOPs of a step, forward and backward. The trainer is not compiled: torch counts no fused kernel."""
    with FlopCounterMode(display=False) as counter:
        trainer.optimise(trainer.draw(0, hr, lr))
    return int(counter.get_total_flops())


def row(name: str, result: Timed, *, batch: int, peak_flops: float) -> str:
    """Return a preset's row."""
    cells = [name, f"{result.weights / 1e6:.1f} M", str(batch), f"{result.flops / 1e12:.3g}"]
    cells.append(f"{result.memory_gib:.1f}" if result.memory_gib else "-")
    for seconds in (result.step_s, result.loop_s):
        cells += [f"{batch / seconds:,.1f}", f"{result.flops / seconds / peak_flops:.1%}"]
    return f"| {' | '.join([*cells, f'{result.waited_s / result.loop_s:.1%}'])} |"


def main() -> None:
    """Print training_gpu.md."""
    parser = argparse.ArgumentParser(description="One training step of the large presets on a GPU.")
    parser.add_argument("--presets", nargs="+", default=PRESETS, metavar="NAME")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--compile", action="store_true", help="measure each with torch.compile too")
    parser.add_argument("--autotune", action="store_true", help="let cuDNN try its algorithms, which the job does not")
    parser.add_argument("--device", choices=tuple(MATRIX_SIDE), default="cuda", help="cpu tries the code")
    arguments = parser.parse_args()
    device, side = arguments.device, MATRIX_SIDE[arguments.device]
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU; --device cpu --presets nano-x4 --batch 2 --steps 3 tries the code")
    torch.backends.cudnn.benchmark = arguments.autotune
    peak_flops = peak(device, side)
    rows = []
    for name in arguments.presets:
        for compiled in (False, True) if arguments.compile else (False,):
            result = timed(name, device=device, batch=arguments.batch, num_steps=arguments.steps, compiled=compiled)
            label = f"{name}, compiled" if compiled else name
            rows.append(row(label, result, batch=arguments.batch, peak_flops=peak_flops))
            print(rows[-1], file=sys.stderr, flush=True)
    print(
        PAGE.format(
            command=" ".join(["python -m tests.benchmarks.training_gpu", *sys.argv[1:]]),
            date=datetime.date.today(),
            device=cpu_name() if device == "cpu" else torch.cuda.get_device_name(),
            torch=torch.__version__,
            head=f"| {' | '.join(HEAD)} |",
            rule="---|" * len(HEAD),
            rows="\n".join(rows),
            side=side,
            peak=peak_flops / 1e12,
        )
    )


if __name__ == "__main__":
    main()

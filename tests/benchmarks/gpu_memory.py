"""What a training step takes, against what was planned: peak bytes of tensors, per preset.

On a GPU the peak is the allocator's, torch.cuda.max_memory_allocated; on a CPU it is that of tensors which live,
LiveBytes, which sees no copies within convolutions. Both begin before the weights are made.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch

from diffsr_core import presets
from diffsr_core.family import SuperResolver
from diffsr_core.memory import LiveBytes, plan_memory
from diffsr_core.recipe import TrainingRecipe
from diffsr_core.resize import downscale
from diffsr_core.training import Trainer
from tests.benchmarks.gpu_cases import Case, Section, Verdict, free_memory

LOWEST, HIGHEST = 0.9, 1.3
# Preset, images of a step, precision: many weights, and many activations.
RUNS = {
    "cuda": (("sr3-lite-16-128", 32, "bf16"), ("anchored-x4", 64, "float32")),
    "cpu": (("nano-x4", 2, "float32"), ("nano-x4", 2, "bf16")),
}


class Peak:
    """Bytes at most, once its body has ended."""

    num_bytes = 0


def section(device: str) -> Section:
    """Return the cases of the plan of memory."""
    cases = [
        Case(f"memory of {name}, {batch} images, {precision}", partial(planned, name, batch, precision, device))
        for name, batch, precision in RUNS[device]
    ]
    return Section("Memory planned", cases)


def planned(name: str, batch: int, precision: str, device: str) -> list[Verdict]:
    """Compare the plan of a preset's last stage with two real steps of it: the second has the optimizer's state."""
    preset = presets.get(name)
    recipe = replace(preset.recipe, stages=preset.recipe.stages[-1:], batch_size=batch, precision=precision)  # type: ignore[arg-type]
    plan = plan_memory(preset.model, recipe, patch_px=preset.patch, device=device)
    hr = torch.rand(batch, preset.model.encoder.channels, preset.patch, preset.patch) * 2 - 1
    real = taken(preset, recipe, hr, device)
    ratio = plan.total_bytes / real
    return [
        Verdict(
            f"memory of {name}, {batch} images, {precision}",
            f"plan {plan.total_bytes / 2**20:,.0f} MiB, real {real / 2**20:,.0f} MiB: {ratio:.2f}",
            f"{LOWEST} to {HIGHEST}",
            LOWEST <= ratio <= HIGHEST,
        )
    ]


def taken(preset: presets.Preset, recipe: TrainingRecipe, hr: torch.Tensor, device: str) -> int:
    """Return the bytes at the peak of two steps, with all beside them that the plan counts."""
    lr = downscale(hr, preset.model.scale)
    free_memory()
    with peak_bytes(device) as peak:
        trainer = Trainer(SuperResolver(preset.model), recipe, device=device)
        through = copy.deepcopy(trainer.model)  # validation looks at the average through a whole model
        drawn = trainer.draw(0, hr, lr)
        for step in (1, 2):
            following = trainer.draw(step, hr, lr)  # the next batch lies beside this one
            trainer.optimise(drawn)
            drawn = following
        del through, drawn, following, trainer
    return peak.num_bytes


@contextmanager
def peak_bytes(device: str) -> Iterator[Peak]:
    """Count the bytes of what the body makes."""
    peak = Peak()
    if device == "cpu":
        with LiveBytes() as live:
            yield peak
        peak.num_bytes = live.peak
        return
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    yield peak
    peak.num_bytes = torch.cuda.max_memory_allocated() - before

"""What a training worker is told: its settings, and the company that it trains in."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from diffsr_core.family import ModelConfig
from diffsr_core.recipe import TrainingRecipe
from diffsr_core.validation import ValidationRecipe

Report = Callable[[dict[str, float]], None]


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What the loop needs to know; the job's config holds more. init, teacher: URIs of model folders, or None.

    looked_at: the fixed validation pairs, hr and lr (B, H, W, channels) in levels of 255, or None without any.
    threads: intra-operator threads of a CPU worker. lpips: folder of its weight files.
    """

    pairs: str
    output: str
    preset: str
    model: ModelConfig
    recipe: TrainingRecipe
    validation: ValidationRecipe
    looked_at: tuple[np.ndarray, np.ndarray] | None
    lpips: str | None
    init: str | None
    teacher: str | None
    data_licence: str | None
    weights_licence: str | None
    checkpoint_every: int
    keep: int
    log_every: int
    max_corrupt_share: float
    threads: int
    sharded: bool = False
    compiled: bool = False
    checkpointed: bool = False


@dataclass(frozen=True, kw_only=True)
class Workers:
    """The company a worker trains in: its rank among world, and how they act together. Alone by default.

    local_world: workers on this machine. report: takes a report, of every rank. tell: takes a line for the person.
    summed: sums a vector over all workers. wrap: as in Trainer.
    """

    report: Report
    tell: Callable[[str], None]
    rank: int = 0
    world: int = 1
    local_world: int = 1
    device: str = "cpu"
    summed: Callable[[Tensor], Tensor] = lambda values: values
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module

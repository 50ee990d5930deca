"""What the parts of gpu_check share: verdicts, cases that fail one by one, and models and pictures of no file."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from diffsr_core.family import ModelConfig, SuperResolver
from diffsr_core.pixels import Pixels


class Verdict(NamedTuple):
    """A row of the table on top. passed None: said, not judged."""

    check: str
    result: str
    limit: str
    passed: bool | None


class Cells(NamedTuple):
    """A row of a section's own table: measured, not judged."""

    texts: tuple[str, ...]


class Case(NamedTuple):
    """A piece that may fail by itself. takes_s: what it may take on a GPU; it does not begin with less time left."""

    name: str
    run: Callable[[], Sequence[Verdict | Cells]]
    takes_s: float = 15.0


class Section(NamedTuple):
    """Cases under one title. head: of the section's own table; without one, its cases are judged."""

    title: str
    cases: list[Case]
    head: tuple[str, ...] = ()
    note: str = ""


class Clock:
    """Seconds since it was made, of a budget."""

    def __init__(self, budget_s: float) -> None:
        self.budget_s, self._began = budget_s, time.monotonic()

    @property
    def used_s(self) -> float:
        """Seconds used."""
        return time.monotonic() - self._began


def outcome(case: Case, clock: Clock, *, judged: bool) -> list[Verdict | Cells]:
    """Return what a case gives, or the row that says why it gives nothing; it never raises an Exception."""
    if clock.used_s + case.takes_s > clock.budget_s:
        why = f"not run: {clock.used_s:.0f} of {clock.budget_s:.0f} s are used, it may take {case.takes_s:.0f} s"
        # What was to be proved and was not is no proof; a speed that was not measured is only missing.
        return [Verdict(case.name, why, "runs", False if judged else None)]
    free_memory()
    try:
        return list(case.run())
    except Exception as error:  # reported, and counted as failed: the other cases must not be lost
        lines = str(error).splitlines() or [""]
        what = f"raised {type(error).__name__}: {lines[0][:160]}"
    return [Verdict(case.name, what, "runs", False)]


def free_memory() -> None:
    """Give a GPU's memory back that nothing needs any longer: upscalers are cycles, errors held their frames."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Run the body with TF32 in convolutions and products, or without. For all threads; then as it was."""
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolutions.allow_tf32, products.allow_tf32
    convolutions.allow_tf32 = products.allow_tf32 = allowed
    try:
        yield
    finally:
        convolutions.allow_tf32, products.allow_tf32 = before


def model_of(config: ModelConfig) -> SuperResolver:
    """Return a model in eval mode of random weights, none of whose convolutions is zero, as training would begin."""
    torch.manual_seed(0)
    model = SuperResolver(config).eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and not module.weight.any():
            module.reset_parameters()
    return model


def picture(height: int, width: int, channels: int = 3, *, seed: int = 0) -> Pixels:
    """Return (height, width, channels) uint8: waves and grain."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [128 + 90 * np.sin(x / (5 + c) + seed) * np.cos(y / (7 + 2 * c)) for c in range(channels)]
    return (np.stack(waves, axis=2) + rng.normal(0, 6, (height, width, channels))).clip(0, 255).astype(np.uint8)

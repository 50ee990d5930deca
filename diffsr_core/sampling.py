"""All that decides the bytes of an output beside the model and the input."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from diffsr_core.consistency import CONSISTENCIES, Consistency
from diffsr_core.family import ModelConfig
from diffsr_core.sampler import SAMPLERS, default_grid
from diffsr_core.schedule import GRIDS, Schedule, Table, sampling_grid

CHOICES = ("first", "mean", "best")


# What a model is sampled with that was trained for one step; it says itself where that starts.
ONE_STEP: Mapping[str, Any] = MappingProxyType({"sampler": "ddim", "grid": "uniform", "num_steps": 1})


def one_step_of(config: ModelConfig) -> dict[str, Any]:
    """Return the settings of a model that was trained for one step."""
    return {**ONE_STEP, "start_level": config.start_level or 0.0}


@dataclass(frozen=True, kw_only=True)
class SamplingRecipe:
    """How a result is drawn.

    grid: family of the noise levels, `auto` for the sampler's own. start_level: 0 starts from noise, above 0 from the
    regression noised to that level. corrections: Langevin steps after each step, None for the sampler's own number.
    num_samples are drawn, from sample_index on; choice says what becomes of them: the `first`, their `mean`, or the
    `best`, which keeps to the LR most before the projection. window and margin (LR px) bound the memory: an image
    larger than a window is made window by window, each read with the margin. tile and halo (LR px) are the network's
    own patches inside a window, joined at every step; micro_batch tiles are one network call. consistency: see
    `consistency.project`. num_threads is part of it because 1 and 2 threads do not give the same bytes.
    """

    sampler: str = "ddim"
    grid: str = "auto"
    num_steps: int = 8
    start_level: float = 0.0
    corrections: int | None = None
    seed: int = 0
    sample_index: int = 0
    num_samples: int = 1
    choice: Literal["first", "mean", "best"] = "first"
    window: int = 512
    margin: int = 24
    tile: int = 64
    halo: int = 8
    micro_batch: int = 4
    num_threads: int = 1
    precision: Literal["float32", "bf16"] = "float32"
    consistency: Consistency = "exact"
    consistency_iterations: int = 6

    def __post_init__(self) -> None:
        for name, known in (
            ("sampler", SAMPLERS),
            ("grid", ("auto", *GRIDS)),
            ("precision", ("float32", "bf16")),
            ("consistency", CONSISTENCIES),
            ("choice", CHOICES),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} ({getattr(self, name)!r}) must be one of {', '.join(known)}; use one of them")
        if not 0 <= self.start_level < 1:
            raise ValueError(f"start_level ({self.start_level}) must be from 0 to below 1; use 0 or about 0.5")
        least = {"sample_index": 0, "consistency_iterations": 0, "margin": 0}
        least["corrections"] = int(self.sampler == "langevin")
        for name in ("num_steps", "num_samples", "window", "tile", "micro_batch", "num_threads", *least):
            value, low = getattr(self, name), least.get(name, 1)
            if value is not None and value < low:
                raise ValueError(f"{name} ({value}) must be at least {low}; use {low} or more")
        if self.micro_batch > 1 and self.micro_batch % 2:
            raise ValueError(
                f"micro_batch ({self.micro_batch}) must be 1 or even: vector kernels give the last of an odd number of "
                f"tiles other bits than the first; use {self.micro_batch + 1}"
            )
        if self.halo < 0 or self.tile <= 2 * self.halo:
            raise ValueError(f"halo ({self.halo}) must be from 0 to less than half the tile ({self.tile})")
        if self.window < self.tile:
            raise ValueError(f"window ({self.window}) must be at least the tile ({self.tile}); use {8 * self.tile}")
        if self.choice != "first" and self.num_samples == 1:
            raise ValueError(
                f"choice ({self.choice}) needs num_samples of 2 or more, not 1; use first, or more samples"
            )

    @property
    def label(self) -> str:
        """What a person calls it, for example `ddim 8 steps` or `ddim 1 step from 0.6`."""
        start = f" from {self.start_level:g}" if self.start_level else ""
        return f"{self.sampler} {self.num_steps} step{'s' * (self.num_steps > 1)}{start}"

    def grid_of(self, schedule: Schedule, *, start: float) -> Table:
        """Return the noise levels from `start` (0: from pure noise) to 1. Raises ValueError, as sampling_grid does."""
        family = default_grid(self.sampler) if self.grid == "auto" else self.grid
        return sampling_grid(schedule, self.num_steps, family=family, start=start)

    def check_fits(self, config: ModelConfig) -> None:
        """Raise ValueError for settings that do not fit this model."""
        stride = config.lr_stride
        for name, usual in (
            ("tile", max(config.lr_smallest, -(-self.tile // stride) * stride)),
            ("halo", self.halo // stride * stride or (stride if self.tile > 2 * stride else 0)),
            ("window", -(-self.window // stride) * stride),
            ("margin", -(-self.margin // stride) * stride),
        ):
            if getattr(self, name) % stride:
                raise ValueError(
                    f"{name} ({getattr(self, name)}) must be a multiple of the model's stride ({stride}); use {usual}"
                )
        if self.tile < config.lr_smallest:
            raise ValueError(f"tile ({self.tile}) must be at least {config.lr_smallest} for this model; use that")
        if config.scale == 1 and self.consistency != "off":
            raise ValueError(
                f"consistency ({self.consistency}) must be off at scale 1, where it would give the input back; use off"
            )
        if config.one_step and config.denoiser is not None:
            self._check_one_step(config)
        if self.start_level and not config.encoder.regresses:
            raise ValueError(f"start_level ({self.start_level}) must be 0: the model has no regression to start from")
        if self.num_samples > 1 and config.denoiser is None:
            raise ValueError(f"num_samples ({self.num_samples}) must be 1: the model has no denoiser to draw with")
        if config.denoiser is not None:
            self.grid_of(config.schedule, start=self.start_level)

    def _check_one_step(self, config: ModelConfig) -> None:
        asked = {name: getattr(self, name) for name in ONE_STEP if name != "grid"}  # its grid is one level
        if asked.items() - ONE_STEP.items():
            raise ValueError(
                f"sampler and num_steps ({self.sampler}, {self.num_steps}) must be ddim and 1: this model was trained "
                "to draw in one step; leave them out"
            )
        if self.start_level and config.start_level is None:
            raise ValueError(
                f"start_level ({self.start_level}) must be 0: this model was trained to draw from noise alone; leave "
                "it out"
            )

"""The sampling settings that evaluate, promote, upscale and manipulate share: their flags, checked once."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from diffsr_core.checkpoint import SCHEDULE
from diffsr_core.consistency import Consistency
from diffsr_core.sampling import SamplingRecipe
from pipelines.config import check


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How a sample is drawn. What is left out of sampler, grid, steps, start_level and consistency is the model's own,
    or usual."""

    sampler: str | None = field(default=None, metadata={"group": "sampling"})
    """Solver of the reverse process: ddim, ddpm, sr3, dpmpp-2m, resshift or langevin.

    Left out: that of the schedule stored with the model, else ddim.
    """
    grid: str | None = None
    """Noise levels it visits: uniform, log_snr, karras, linear, resshift, or auto for the sampler's own.

    Left out: those of the model's schedule, else auto.
    """
    steps: int | None = None
    """Steps of that grid: network calls per image (langevin asks more). Left out: as the model's schedule, else 8."""
    start_level: float | None = None
    """0 starts from noise; above 0 from the model's regression noised to this level, which saves steps. Of a model of
    one step it is the dial: 0 has the most texture, towards 1 there is least.

    Left out: as the model's schedule or the model itself says, else 0.
    """
    seed: int = 0
    """Noise seed."""
    consistency: Consistency | None = None
    """Projection onto the LR: exact, interval (within its rounding), low-band (tone only: JPEG, noise), off.

    Left out: as the model's training allows: exact for a bicubic LR, else low-band.
    """
    window: int = 512
    """Side in LR pixels of what is made at once of a larger image; bounds the memory."""
    margin: int = 24
    """LR pixels around a window that are computed and not written."""
    tile: int = 64
    """Side of the network's own patches in a window, in LR pixels."""
    halo: int = 8
    """LR pixels around a tile's core that are computed and not written; joined at every step."""
    micro_batch: int = 4
    """Tiles in one network call; part of what decides the bytes."""
    num_threads: int = 1
    """Threads of one network call; part of what decides the bytes."""
    precision: Literal["float32", "bf16"] = "float32"
    """Arithmetic of the network; bf16 is faster where the processor has it, and gives other bytes."""

    def __post_init__(self) -> None:
        check(self.steps is None or self.steps >= 1, "steps", self.steps, "must be at least 1", "use 4 to 100")
        check(self.tile >= 1, "tile", self.tile, "must be at least 1", "use 64")
        most = (self.tile - 1) // 2
        check(0 <= self.halo <= most, "halo", self.halo, f"must be from 0 to less than half the tile ({self.tile})",
              f"use {min(8, most)}")  # fmt: skip
        check_seed(self.seed)
        self.sampling()

    def sampling(self, own: Mapping[str, Any] | None = None) -> SamplingRecipe:
        """Return the sampling recipe. own: what the model says, checkpoint.own_schedule; a given setting wins."""
        given = {"sampler": self.sampler, "grid": self.grid, "num_steps": self.steps, "start_level": self.start_level,
                 "consistency": self.consistency}  # fmt: skip
        chosen = {name: own[name] for name in (*SCHEDULE, "consistency") if name in own} if own else {}
        chosen |= {name: value for name, value in given.items() if value is not None}
        return SamplingRecipe(
            **chosen,
            seed=self.seed,
            window=max(self.window, self.tile),
            margin=self.margin,
            tile=self.tile,
            halo=self.halo,
            micro_batch=self.micro_batch,
            num_threads=self.num_threads,
            precision=self.precision,
        )


def check_seed(seed: int) -> None:
    """Raise ValueError for a seed that a generator could not take."""
    check(0 <= seed < 2**63, "seed", seed, "must be from 0 to 2**63 - 1", "use 0")

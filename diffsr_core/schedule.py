"""Noise schedules as float64 tables, noise levels for training, and grids for sampling.

Notation (code -> paper): alphas_cumprod -> gamma (SR3) or alpha-bar (DDPM); noise_level -> sqrt(alphas_cumprod), the
amplitude of the signal, 1 = clean. t counts 0..T-1; t = 0 has been noised once.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

Table = npt.NDArray[np.float64]


def cosine_betas(num_timesteps: int, *, offset: float = 0.008, max_beta: float = 0.999) -> Table:
    """Return (T,) betas of the cosine schedule (Nichol and Dhariwal 2021, eq. 17; SRDiff uses T = 100)."""
    angle = (np.arange(num_timesteps + 1, dtype=np.float64) / num_timesteps + offset) / (1 + offset) * (math.pi / 2)
    alphas_cumprod = np.cos(angle) ** 2
    betas: Table = np.minimum(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], max_beta)
    return betas


def linear_betas(num_timesteps: int, *, first: float = 1e-6, last: float = 1e-2) -> Table:
    """Return (T,) betas that rise linearly; the defaults are those of the public SR3 code with T = 2000."""
    return np.linspace(first, last, num_timesteps, dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A forward process x_t = sqrt(ab_t) x_0 + sqrt(1 - ab_t) eps, by name, so that it can be written into a model."""

    name: Literal["cosine", "linear"] = "cosine"
    num_timesteps: int = 1000

    def __post_init__(self) -> None:
        if self.name not in ("cosine", "linear"):
            raise ValueError(f"schedule name ({self.name!r}) is unknown; use one of: cosine, linear")
        if self.num_timesteps < 2:
            raise ValueError(f"num_timesteps ({self.num_timesteps}) must be at least 2; SRDiff uses 100, SR3 2000")

    @cached_property
    def alphas_cumprod(self) -> Table:
        """(T,) float64, strictly falling from nearly 1 to nearly 0."""
        betas = (cosine_betas if self.name == "cosine" else linear_betas)(self.num_timesteps)
        return np.cumprod(1 - betas, dtype=np.float64)

    @property
    def noise_levels(self) -> Table:
        """(T,) float64: sqrt(alphas_cumprod)."""
        levels: Table = self.alphas_cumprod**0.5
        return levels


def sample_noise_levels(schedule: Schedule, count: int, *, generator: torch.Generator) -> torch.Tensor:
    """Return (count,) float32 noise levels: t uniform, then gamma uniform in (gamma_t, gamma_{t-1}).

    This is SR3's p(gamma) (Saharia et al. 2021, sec. 2.4), drawn for each sample: the network then knows every level
    between the steps and can be sampled on any grid. The public code draws one t per batch; that is not repeated here.
    """
    upper = torch.from_numpy(np.concatenate([[1.0], schedule.alphas_cumprod[:-1]]))
    lower = torch.from_numpy(schedule.alphas_cumprod)
    t = torch.randint(schedule.num_timesteps, (count,), generator=generator)
    share = torch.rand(count, generator=generator, dtype=torch.float64)
    return torch.sqrt(lower[t] + share * (upper[t] - lower[t])).float()


def sampling_grid(schedule: Schedule, num_steps: int) -> Table:
    """Return (num_steps + 1,) noise levels from nearly pure noise to exactly 1 (clean), strictly rising.

    Neighbours of this grid are the steps of a sampler; nothing recomputes t - 1 from t. Raises ValueError when there
    are more steps than the schedule has.
    """
    if not 1 <= num_steps <= schedule.num_timesteps:
        raise ValueError(
            f"steps ({num_steps}) must be between 1 and the schedule's {schedule.num_timesteps}; use a number within"
        )
    # Trailing spacing: it always starts at the last step, where training ends, and with N = T it is every step.
    t = np.rint(schedule.num_timesteps * (1 - np.arange(num_steps) / num_steps)).astype(np.int64) - 1
    return np.concatenate([schedule.noise_levels[t], np.ones(1)])


def step_of_noise_level(schedule: Schedule, noise_level: torch.Tensor) -> torch.Tensor:
    """Return the step t (float32) whose table entry is nearest to each noise level: for networks that are told t."""
    table = torch.from_numpy(schedule.noise_levels).to(noise_level.device)
    return (table[None] - noise_level.double()[:, None]).abs().argmin(dim=1).float()

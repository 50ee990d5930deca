"""Noise schedules as float64 tables, noise levels for training, and grids for sampling.

Notation (code -> paper): alphas_cumprod -> gamma (SR3) or alpha-bar (DDPM); noise_level -> sqrt(alphas_cumprod), the
amplitude a of the signal, 1 = clean; b = sqrt(1 - a^2) that of the noise. t counts 0..T-1; t = 0 has been noised once.
"""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

Table = npt.NDArray[np.float64]

GRIDS = ("uniform", "log_snr", "karras", "linear", "resshift")
_RHO = 7.0  # Karras et al. 2022, table 1
_KAPPA, _POWER = 2.0, 0.3  # Yue et al. 2023 (ResShift), sec. 2.2 and 4.1
_FIRST_BETA, _LAST_BETA = 1e-6, 1e-2


def cosine_betas(num_timesteps: int, *, offset: float = 0.008, max_beta: float = 0.999) -> Table:
    """Return (T,) betas of the cosine schedule (Nichol and Dhariwal 2021, eq. 17; SRDiff uses T = 100)."""
    angle = (np.arange(num_timesteps + 1, dtype=np.float64) / num_timesteps + offset) / (1 + offset) * (math.pi / 2)
    alphas_cumprod = np.cos(angle) ** 2
    betas: Table = np.minimum(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], max_beta)
    return betas


def linear_betas(num_timesteps: int, *, first: float = _FIRST_BETA, last: float = _LAST_BETA) -> Table:
    """Return (T,) betas that rise linearly; the defaults are those of the public SR3 code with T = 2000."""
    return np.linspace(first, last, num_timesteps, dtype=np.float64)


def resshift_levels(num_timesteps: int) -> Table:
    """Return (T,) falling noise levels of ResShift's chain of T steps (Yue et al. 2023, eq. 9-10, kappa 2, p 0.3).

    sqrt(eta) goes from 0.02, or from 0.1 in 4 steps or fewer, to 0.99, as the two published models have it.
    """
    last, first = _ends_of_root_eta(num_timesteps)
    return _levels_of_root_eta(_chain_of_root_eta(num_timesteps, last=last, first=first)[::-1])


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A forward process x_t = sqrt(ab_t) x_0 + sqrt(1 - ab_t) eps, by name, so that it can be written into a model.

    first_beta and last_beta belong to `linear`: SR3's public code has 1e-6 to 1e-2 (T = 2000), DDPM 1e-4 to 0.02
    (T = 1000), Palette at test time 1e-4 to 0.09 (T = 1000). `resshift` is ResShift's chain (see resshift_levels), that
    of its published models with T = 15 and T = 4. Raises ValueError for a table that float32 cannot serve.
    """

    name: Literal["cosine", "linear", "resshift"] = "cosine"
    num_timesteps: int = 1000
    first_beta: float = _FIRST_BETA
    last_beta: float = _LAST_BETA

    def __post_init__(self) -> None:
        if self.name not in ("cosine", "linear", "resshift"):
            raise ValueError(f"schedule name ({self.name!r}) is unknown; use one of: cosine, linear, resshift")
        if self.num_timesteps < 2:
            raise ValueError(f"num_timesteps ({self.num_timesteps}) must be at least 2; SRDiff uses 100, SR3 2000")
        betas = (self.first_beta, self.last_beta)
        if self.name != "linear" and betas != (_FIRST_BETA, _LAST_BETA):
            raise ValueError(
                f"first_beta and last_beta {betas} must be left out with {self.name}; they shape only linear"
            )
        # Below 1e-7 float32 cannot tell the first level from clean.
        if not 1e-7 <= self.first_beta <= self.last_beta < 1:
            raise ValueError(f"first_beta and last_beta {betas} must rise within 1e-7 and 1; DDPM uses 1e-4 and 0.02")
        if self.noise_levels[-1] < 1e-30:
            raise ValueError(
                f"last_beta ({self.last_beta}) with num_timesteps ({self.num_timesteps}) ends at noise level "
                f"{self.noise_levels[-1]:.1g}, it must be at least 1e-30 (float32 divides by it); use fewer or smaller"
            )

    @cached_property
    def alphas_cumprod(self) -> Table:
        """(T,) float64, strictly falling from nearly 1 to nearly 0."""
        if self.name == "resshift":
            levels = resshift_levels(self.num_timesteps)
            return levels * levels
        if self.name == "cosine":
            betas = cosine_betas(self.num_timesteps)
        else:
            betas = linear_betas(self.num_timesteps, first=self.first_beta, last=self.last_beta)
        return np.cumprod(1 - betas, dtype=np.float64)

    @property
    def noise_levels(self) -> Table:
        """(T,) float64: sqrt(alphas_cumprod)."""
        levels: Table = self.alphas_cumprod**0.5
        return levels


def sample_noise_levels(
    schedule: Schedule, count: int, *, generator: torch.Generator, continuous: bool = True
) -> torch.Tensor:
    """Return (count,) float32 noise levels: t uniform, then gamma uniform in (gamma_t, gamma_{t-1}).

    This is SR3's p(gamma) (Saharia et al. 2021, sec. 2.4), drawn for each sample: the network then knows every level
    between the steps and can be sampled on any grid. The public code draws one t per batch; that is not repeated here.
    continuous=False stops at t and returns the table's own levels: DDPM and SRDiff as published, told a whole step.
    """
    upper = torch.from_numpy(np.concatenate([[1.0], schedule.alphas_cumprod[:-1]]))
    lower = torch.tensor(schedule.alphas_cumprod)
    t = torch.randint(schedule.num_timesteps, (count,), generator=generator)
    if not continuous:
        return torch.tensor(schedule.noise_levels)[t].float()
    share = torch.rand(count, generator=generator, dtype=torch.float64)
    return torch.sqrt(lower[t] + share * (upper[t] - lower[t])).float()


def step_of_noise_level(schedule: Schedule, noise_level: torch.Tensor) -> torch.Tensor:
    """Return the position t (float32, 0 to T - 1) of each noise level (B,): for networks that are told a step.

    Exactly t at the table's entry t, as rounded to noise_level's dtype; between two entries linear in the angle
    acos(a); clamped outside. Along a cosine schedule the angle is what grows evenly with t, along a linear one it
    nearly is near the clean end; and unlike log-SNR it is finite at both ends.
    """
    table = _level_table(schedule, noise_level.device, noise_level.dtype)
    before = len(table) - 1 - torch.searchsorted(table.flip(0), noise_level.contiguous())  # the last entry not noisier
    before = before.clamp(0, len(table) - 2)
    angle, low, high = (torch.acos(a.double()) for a in (noise_level, table[before], table[before + 1]))
    return (before + ((angle - low) / (high - low)).clamp(0, 1)).float()


@lru_cache(maxsize=16)
def _level_table(schedule: Schedule, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Return the noise levels on a device. Kept: a copy at every step of a sampler would stall the device."""
    with torch.inference_mode(False):
        return torch.tensor(schedule.noise_levels).to(device, dtype)


def sampling_grid(schedule: Schedule, num_steps: int, *, family: str = "uniform", start: float = 0.0) -> Table:
    """Return (num_steps + 1,) noise levels from nearly pure noise to exactly 1 (clean), strictly rising.

    Neighbours of this grid are the steps of a sampler; nothing recomputes t - 1 from t. By family:
        uniform   entries of the schedule's table, evenly spaced from its last
        log_snr   even in log(a / b), from the last entry of the table to its first
        karras    even in (b / a)^(1/7) over the same levels (Karras et al. 2022, eq. 5)
        linear    num_steps linear betas from first_beta up, that end where the table ends; SR3 searched among short
                  schedules of its own (sec. 2.4) and published none
        resshift  ResShift's chain of num_steps (see resshift_levels), its ends clipped to the table's
    start: a late start. The grid begins exactly at this level, and num_steps are spread anew over what is cleaner: they
    are what a sampling costs, wherever it starts. 0 starts at the family's noisiest level.
    Only `uniform` is bound to the table; the others cut one continuous path and may have more steps than T.
    Raises ValueError for an unknown family, too few or too many steps, or a start outside the family's levels.
    """
    if family not in GRIDS:
        raise ValueError(f"grid ({family!r}) is unknown; use one of: {', '.join(GRIDS)}")
    if num_steps < 1:
        raise ValueError(
            f"steps ({num_steps}) must be at least 1; a schedule of {schedule.num_timesteps} has that many"
        )
    table = schedule.noise_levels
    first, last = float(table[-1]), float(table[0])
    if family == "resshift":
        noisiest, cleanest = _levels_of_root_eta(_ends_of_root_eta(num_steps)).tolist()
        first, last = max(first, noisiest), min(last, cleanest)
    if start != 0 and not table[-1] <= start < last:
        raise ValueError(
            f"start ({start}) must be 0 or from {table[-1]:.4g} to below {last:.8g}, the levels of the {family} grid; "
            "use 0 to start from noise"
        )
    first = start or first
    if family == "uniform":
        levels = _table_levels(table, num_steps, first=first)
    elif family == "linear":
        levels = _linear_levels(num_steps, first=first, first_beta=schedule.first_beta)
    else:
        levels = _even_levels(family, num_steps, first=first, last=last)
    levels[0] = first  # exactly, where a way there and back has rounded
    return np.concatenate([levels, np.ones(1)])


def eta_of_noise_level(noise_level: float) -> float:
    """Return ResShift's eta in [0, 1) of a noise level in (0, 1]: that of (1 - eta) x_0 + kappa sqrt(eta) eps, kappa 2.

    The level fixes q = b / a = kappa r / (1 - r^2) with r = sqrt(eta), and of the two roots one lies in [0, 1).
    """
    q = _sigma(noise_level)
    return (2 * q / (_KAPPA + math.sqrt(_KAPPA**2 + 4 * q * q))) ** 2


def _ends_of_root_eta(num_steps: int) -> Table:
    return np.array([0.99, 0.1 if num_steps <= 4 else 0.02])


def _chain_of_root_eta(num_steps: int, *, last: float, first: float) -> Table:
    """Return (num_steps,) sqrt(eta), falling from last to first."""
    share = np.linspace(0, 1, num_steps)
    roots: Table = first * (last / first) ** ((1 - share) ** _POWER)
    return roots


def _levels_of_root_eta(root: Table) -> Table:
    """Return the noise levels of sqrt(eta): ResShift's state divided by sqrt(a^2 + b^2) is x_t."""
    a = 1 - root * root
    levels: Table = a / np.sqrt(a * a + (_KAPPA * root) ** 2)
    return levels


def _sigma(noise_level: float) -> float:
    """Return b / a: the noise beside a signal of amplitude 1 (Karras et al. 2022)."""
    return math.sqrt(1 - noise_level**2) / noise_level


def _table_levels(table: Table, num_steps: int, *, first: float) -> Table:
    most = int((table > first).sum()) + 1
    if num_steps > most:
        raise ValueError(
            f"steps ({num_steps}) must be between 1 and {most}, those of the schedule from noise level {first:.4g}; "
            "use fewer, or a grid that is not bound to them (log_snr)"
        )
    # Trailing spacing: it always starts at the last step, where training ends, and with N = T it is every step.
    t = np.rint(most * (1 - np.arange(num_steps) / num_steps)).astype(np.int64) - 1
    return table[t]


def _even_levels(family: str, num_steps: int, *, first: float, last: float) -> Table:
    share = np.linspace(0, 1, num_steps)  # of the way from first to last
    if family == "log_snr":
        sigma = _sigma(first) * (_sigma(last) / _sigma(first)) ** share
    elif family == "karras":
        sigma = (_sigma(first) ** (1 / _RHO) * (1 - share) + _sigma(last) ** (1 / _RHO) * share) ** _RHO
    else:
        high, low = math.sqrt(eta_of_noise_level(first)), math.sqrt(eta_of_noise_level(last))
        return _levels_of_root_eta(_chain_of_root_eta(num_steps, last=high, first=low))
    levels: Table = 1 / np.sqrt(1 + sigma * sigma)
    return levels


def _linear_levels(num_steps: int, *, first: float, first_beta: float) -> Table:
    wanted = 2 * math.log(first)  # log gamma of the last beta, which bisection finds
    # With so many steps, or so clean a start, that constant betas of first_beta go too far, the betas are constant.
    low = first_beta = min(first_beta, -math.expm1(wanted / num_steps))
    high = 1 - 2**-53  # the float64 before 1: a beta of 1 has no logarithm
    for _ in range(60):  # more halvings than a float64 has bits
        middle = (low + high) / 2
        if np.log1p(-np.linspace(middle, first_beta, num_steps)).sum() > wanted:
            low = middle
        else:
            high = middle
    log_alphas = np.log1p(-np.linspace(low, first_beta, num_steps))
    levels: Table = np.exp(0.5 * np.cumsum(log_alphas[::-1])[::-1])
    return levels

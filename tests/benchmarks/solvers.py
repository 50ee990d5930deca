"""Every solver against the ideal denoiser of a problem with a known answer; prints the table of solvers.md.

    python -m tests.benchmarks.solvers > tests/benchmarks/solvers.md

The problem is a super-resolution of two pixels into one: LR is their mean y, what is diffused is the detail
d = (left - right) / 2. The prior of the pair is a mixture of three Gaussians (a falling edge, a flat patch, a rising
edge), so that p(d | y) is a mixture of three again, and the posterior mean of d given a noisy d is exact.
"""

import datetime
import math
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.special import ndtr, ndtri

from diffsr_core.sampler import Denoise, last, sample
from diffsr_core.schedule import Schedule, sampling_grid

SR3 = Schedule(name="linear", num_timesteps=2000)
SRDIFF = Schedule(name="cosine", num_timesteps=100)
STEPS = (4, 8, 15, 25, 50, 100)
Y = 0.05

# (weight, means of left and right, their variances, their correlation)
PRIOR = (
    (0.35, (0.45, -0.35), (0.012, 0.018), 0.4),
    (0.25, (0.05, 0.03), (0.004, 0.006), 0.9),
    (0.40, (-0.55, 0.60), (0.020, 0.030), -0.2),
)

# (sampler, grid, corrections)
ROWS = (
    ("ddim", "uniform", 0),
    ("ddim", "log_snr", 0),
    ("ddim", "log_snr", 1),
    ("ddim", "karras", 0),
    ("ddim", "linear", 0),
    ("ddim", "resshift", 0),
    ("ddpm", "uniform", 0),
    ("ddpm", "log_snr", 0),
    ("ddpm", "linear", 0),
    ("sr3", "uniform", 0),
    ("sr3", "log_snr", 0),
    ("sr3", "linear", 0),
    ("sr3", "resshift", 0),
    ("resshift", "resshift", 0),
    ("resshift", "uniform", 0),
    ("dpmpp-2m", "log_snr", 0),
    ("dpmpp-2m", "karras", 0),
    ("dpmpp-2m", "uniform", 0),
    ("dpmpp-2m", "resshift", 0),
    ("dpmpp-2m", "linear", 0),
    ("langevin", "uniform", 5),
    ("langevin", "log_snr", 5),
)


class Mixture(NamedTuple):
    """A one-dimensional Gaussian mixture: weights, means and standard deviations, each (3, 1) float64."""

    weights: Tensor
    means: Tensor
    stds: Tensor

    def cdf(self, x: Tensor) -> Tensor:
        """Return (n,) probabilities of less than x (n,)."""
        return (self.weights * ndtr((x - self.means) / self.stds)).sum(0)

    def quantiles(self, count: int) -> Tensor:
        """Return the (count,) quantiles at (i + 1/2) / count, to about 1e-5."""
        x = torch.linspace(-2, 2, 200_001, dtype=torch.float64)
        return torch.from_numpy(np.interp((np.arange(count) + 0.5) / count, self.cdf(x).numpy(), x.numpy()))

    def log_density(self, x: Tensor, *, noise_level: float = 1.0) -> Tensor:
        """Return (n,) log densities of a x_0 + b eps at x (n,), up to a constant."""
        return torch.logsumexp(self._log_parts(x, noise_level), 0)

    def denoise(self, x_t: Tensor, noise_level: float) -> tuple[Tensor, Tensor]:
        """Return E[x_0 | x_t] and E[eps | x_t], each (n,): the ideal denoiser."""
        a, b2 = noise_level, 1 - noise_level**2
        shares = torch.softmax(self._log_parts(x_t, a), 0)
        gain = a * self.stds**2 / ((a * self.stds) ** 2 + b2)
        x_0 = (shares * (self.means + gain * (x_t - a * self.means))).sum(0)
        return x_0, (x_t - a * x_0) / math.sqrt(b2)

    def _log_parts(self, x: Tensor, a: float) -> Tensor:
        variance = (a * self.stds) ** 2 + 1 - a * a
        return torch.log(self.weights) - 0.5 * torch.log(variance) - 0.5 * (x - a * self.means) ** 2 / variance


def detail_given(y: float) -> Mixture:
    """Return p(d | y) in closed form: condition each Gaussian on its mean pixel, weigh it by how well it explains y."""
    mean_of, detail_of = np.array([0.5, 0.5]), np.array([0.5, -0.5])
    parts = []
    for weight, means, variances, correlation in PRIOR:
        off = correlation * math.sqrt(variances[0] * variances[1])
        covariance = np.array([[variances[0], off], [off, variances[1]]])
        surprise, of_y = y - mean_of @ np.array(means), mean_of @ covariance @ mean_of
        shared = detail_of @ covariance @ mean_of
        parts.append(
            (
                weight * math.exp(-(surprise**2) / (2 * of_y)) / math.sqrt(of_y),
                detail_of @ np.array(means) + shared / of_y * surprise,
                math.sqrt(detail_of @ covariance @ detail_of - shared**2 / of_y),
            )
        )
    weights, means_, stds = torch.tensor(parts, dtype=torch.float64).T[:, :, None]
    return Mixture(weights / weights.sum(), means_, stds)


@cache
def normal_quantiles(count: int) -> Tensor:
    """Return (count,) quantiles of the standard normal: a sample without a sampling error."""
    return ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)


def stratified_noise(index: int, *, count: int) -> Tensor:
    """Return normal quantiles, shuffled by the index; in order for the start, which is then exactly normal."""
    if index == 0:
        return normal_quantiles(count)
    return normal_quantiles(count)[torch.randperm(count, generator=torch.Generator().manual_seed(index))]


def distance(
    sampler: str,
    grid: str,
    num_steps: int,
    *,
    schedule: Schedule = SR3,
    corrections: int | None = None,
    count: int = 20_000,
    start: float = 0.0,
    denoise: Denoise | None = None,
) -> float:
    """Return the Wasserstein-1 distance between what a solver reaches and p(d | y): the mean |difference| of quantiles.

    start: a late start at this noise level from the posterior mean, which is what a regression network learns.
    """
    truth = detail_given(Y)
    reached = last(
        sample(
            denoise or truth.denoise,
            sampling_grid(schedule, num_steps, family=grid, start=start),
            noise=lambda index: stratified_noise(index, count=count),
            sampler=sampler,
            clip=False,
            corrections=corrections,
            start=(truth.weights * truth.means).sum() if start else None,
        )
    )
    return float((reached.sort().values - truth.quantiles(count)).abs().mean())


def table(schedule: Schedule) -> str:
    """Return the Markdown table of every row and number of steps."""
    lines = [f"| solver | grid | {' | '.join(f'N = {n}' for n in STEPS)} |", "|---|---|" + "---|" * len(STEPS)]
    for sampler, grid, corrections in ROWS:
        cells = [f"{distance(sampler, grid, n, schedule=schedule, corrections=corrections):.4f}" for n in STEPS]
        beside = f" + {corrections} Langevin" if corrections and sampler != "langevin" else ""
        lines.append(f"| {sampler}{beside} | {grid} | {' | '.join(cells)} |")
    return "\n".join(lines)


def late_table() -> str:
    """Return the Markdown table of late starts: 2M on log_snr from the posterior mean."""
    levels = (0.0, 0.1, 0.2, 0.4, 0.7)
    lines = [
        f"| N | {' | '.join(f'start {a}' if a else 'from noise' for a in levels)} |",
        "|---|" + "---|" * len(levels),
    ]
    for num_steps in (4, 8, 15, 25):
        cells = [f"{distance('dpmpp-2m', 'log_snr', num_steps, start=a):.4f}" for a in levels]
        lines.append(f"| {num_steps} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Print solvers.md."""
    torch.set_num_threads(1)
    spread = float(detail_given(Y).quantiles(20_000).std())
    print(f"""# Solvers against the ideal denoiser

Printed by `python -m tests.benchmarks.solvers` on {datetime.date.today()}; the same numbers on every run.

Wasserstein-1 distance to p(d | y) of a super-resolution of two pixels into one (see solvers.py), 20 000 stratified
samples, float64, no clipping; lower is better. p(d | y) has three modes and a standard deviation of {spread:.3f}. N is
the number of steps; with K Langevin corrections a step the denoiser is called N + K (N - 1) times (`langevin`: K = 5).
An ideal denoiser makes no error of its own: a trained network does, and may rank the solvers otherwise.

## SR3's linear schedule, T = 2000

{table(SR3)}

## SRDiff's cosine schedule, T = 100

{table(SRDIFF)}

## A late start from the posterior mean, dpmpp-2m, SR3's schedule

{late_table()}
""")


if __name__ == "__main__":
    main()

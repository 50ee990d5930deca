"""The reverse process: one step formula, and samplers that are generators of states.

    x_s = a_s x_0 + sqrt(b_s^2 - tau^2) eps + nu z          a = noise level, b = sqrt(1 - a^2)

from a noisier level t to a cleaner level s. What a sampler puts into it:

    ddim       tau = nu = 0 (Song et al. 2021, DDIM)
    ddpm       tau = nu, tau^2 = (1 - gamma_s) / (1 - gamma_t) (1 - gamma_t / gamma_s), beta-tilde (Ho et al. 2020)
    sr3        the same mean, but nu^2 = 1 - gamma_t / gamma_s (Saharia et al. 2021, alg. 2): DDPM's variance beta
    resshift   tau = nu, tau^2 = b_s^2 (1 - eta_s / eta_t) (Yue et al. 2023, eq. 7, divided by sqrt(a^2 + b^2) at s)
    dpmpp-2m   tau = nu = 0, x_0 drawn on from the step before, eps recomputed from it (Lu et al. 2022, alg. 2)

Langevin dynamics is the same formula from a level to itself (`langevin_step`): a corrector that any sampler may have
beside it (Song et al. 2021, SDE, alg. 2-3). The sampler `langevin` has nothing else: it only rescales x between levels.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from diffsr_core.schedule import Table, eta_of_noise_level

Denoise = Callable[[Tensor, float], tuple[Tensor, Tensor]]  # (x_t, noise level) -> (x_0, eps)
Noise = Callable[[int], Tensor]  # index -> z, the shape of x_t; 0 is the initial state

SAMPLERS = ("ddim", "ddpm", "sr3", "dpmpp-2m", "resshift", "langevin")
# 5 corrections at a rate of 0.3 leave 17 % of a level's surplus of noise: what 15 steps of the uniform grid need.
LANGEVIN_CORRECTIONS = 5
LANGEVIN_RATE = 0.3


def default_grid(sampler: str) -> str:
    """Return the family of `sampling_grid` that a sampler is meant for. Raises ValueError for an unknown sampler."""
    _check_sampler(sampler)
    return {"dpmpp-2m": "log_snr", "resshift": "resshift"}.get(sampler, "uniform")


def noise_scales(sampler: str, a_t: float, a_s: float) -> tuple[float, float]:
    """Return (tau, nu) of the step from noise level a_t to a_s > a_t. Raises ValueError for an unknown sampler."""
    _check_sampler(sampler)
    if sampler in ("ddim", "dpmpp-2m", "langevin"):
        return 0.0, 0.0
    gamma_t, gamma_s = a_t * a_t, a_s * a_s
    if sampler == "resshift":
        tau = math.sqrt((1 - gamma_s) * (1 - eta_of_noise_level(a_s) / eta_of_noise_level(a_t)))
    else:
        tau = math.sqrt((1 - gamma_s) / (1 - gamma_t) * (1 - gamma_t / gamma_s))
    if sampler != "sr3" or a_s == 1.0:
        return tau, tau  # at the clean end tau = 0: no sampler adds noise there (SR3, alg. 2: z = 0 at t = 1)
    return tau, math.sqrt(1 - gamma_t / gamma_s)


def reverse_step(x_0: Tensor, eps: Tensor, *, a_s: float, tau: float, nu: float, z: Tensor | None) -> Tensor:
    """Return x_s by the formula above; scalars in float64, tensors as they come. At the clean end it is x_0 itself."""
    x_s = x_0 if a_s == 1 else a_s * x_0
    if rest := math.sqrt(max(0.0, 1 - a_s * a_s - tau * tau)):
        x_s = x_s + rest * eps
    return x_s if z is None else x_s + nu * z


def langevin_step(x_0: Tensor, eps: Tensor, *, a: float, z: Tensor, rate: float = LANGEVIN_RATE) -> Tensor:
    """Return x + d score + sqrt(2 d) z of the x at level a that x_0 and eps explain: score = -eps / b, d = rate b^2.

    x - rate b eps = a x_0 + sqrt(b^2 - tau^2) eps with tau^2 = b^2 (1 - (1 - rate)^2), so that it is `reverse_step` to
    the same level. Its noise is a little more than tau: discretised Langevin dynamics ends at a noise variance of
    b^2 / (1 - rate / 2), an error that shrinks with b (Song and Ermon 2019, alg. 1; alpha_i = 2 d).
    """
    b = math.sqrt(1 - a * a)
    return reverse_step(x_0, eps, a_s=a, tau=b * math.sqrt(rate * (2 - rate)), nu=b * math.sqrt(2 * rate), z=z)


def sample(
    denoise: Denoise,
    grid: Table,
    *,
    noise: Noise,
    sampler: str = "ddim",
    clip: bool = True,
    corrections: int | None = None,
    start: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (x_s, x_0 as predicted) after each step of the grid; the last x_s is the sample.

    clip: x_0 is clipped to [-1, 1] at each step and eps recomputed from it, as both references do: with an eps
    prediction an early error is otherwise multiplied by b/a, up to 151 on SR3's schedule.
    corrections: Langevin steps after each step but the last, by default 5 for `langevin` and 0 for the others. With N
    steps and K corrections denoise is called N + K (N - 1) times.
    start: an x_0 from which a late start begins, noised to grid[0]; without it x begins as noise alone. A number, as a
    tensor without axes, stands for an image of it.
    noise: index 0 is the start, i + 1 step i of 0..N-1, N + 1 + i K + k its correction k of 0..K-1: none comes twice.
    Raises ValueError, with the first state, for an unknown sampler or a number of corrections that it cannot have.
    """
    _check_sampler(sampler)
    least = 1 if sampler == "langevin" else 0
    num_corrections = corrections if corrections is not None else LANGEVIN_CORRECTIONS * least
    if num_corrections < least:
        raise ValueError(
            f"corrections ({num_corrections}) must be at least {least} with {sampler}; use {least} or more"
        )

    def predict(x_t: Tensor, a_t: float) -> tuple[Tensor, Tensor]:
        x_0, eps = denoise(x_t, a_t)
        if clip:
            x_0 = x_0.clamp(-1, 1)
            eps = _eps_of(x_t, x_0, a_t)
        return x_0, eps

    levels = grid.tolist()
    num_steps = len(levels) - 1
    x_t = noise(0)
    if start is not None:
        x_t = math.sqrt(1 - levels[0] * levels[0]) * x_t
        x_t = x_t + levels[0] * start
    before: tuple[Tensor, float] | None = None  # x_0 and level of the step before
    for i, (a_t, a_s) in enumerate(pairwise(levels)):
        x_0, eps = predict(x_t, a_t)
        if sampler == "langevin" and a_s < 1:
            x_t = a_s / a_t * x_t  # the signal is now that of level s; the corrections take the noise down to it
        else:
            target = x_0
            if sampler == "dpmpp-2m" and a_s < 1 and before is not None:
                target = _extrapolated(x_0, *before, a_t=a_t, a_s=a_s)
                eps = _eps_of(x_t, target, a_t)
            tau, nu = noise_scales(sampler, a_t, a_s)
            x_t = reverse_step(target, eps, a_s=a_s, tau=tau, nu=nu, z=noise(i + 1) if nu > 0 else None)
        before = x_0, a_t
        for k in range(num_corrections if a_s < 1 else 0):
            z = noise(num_steps + 1 + i * num_corrections + k)
            x_t = langevin_step(*predict(x_t, a_s), a=a_s, z=z)
        yield x_t, x_0


def last(states: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the final x of a sampler's states."""
    x = torch.empty(0)
    for x, _ in states:  # noqa: B007 - the last one is wanted
        pass
    return x


def _eps_of(x_t: Tensor, x_0: Tensor, a_t: float) -> Tensor:
    return (x_t - a_t * x_0) / math.sqrt(1 - a_t * a_t)


def _extrapolated(x_0: Tensor, x_0_before: Tensor, a_before: float, *, a_t: float, a_s: float) -> Tensor:
    """Return the x_0 of DPM-Solver++(2M) for the step t -> s: D = x_0 + h / (2 h_before) (x_0 - x_0_before).

    h is the step in lambda = log(a / b). Not clipped: it is a point on a line, not a prediction.
    """
    lambda_before, lambda_t, lambda_s = (math.log(a / math.sqrt(1 - a * a)) for a in (a_before, a_t, a_s))
    return x_0 + (lambda_s - lambda_t) / (2 * (lambda_t - lambda_before)) * (x_0 - x_0_before)


def _check_sampler(sampler: str) -> None:
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler ({sampler!r}) is unknown; use one of: {', '.join(SAMPLERS)}")

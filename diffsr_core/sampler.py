"""The reverse process: one step formula, and samplers that are generators of states.

    x_s = a_s x_0 + sqrt(b_s^2 - tau^2) eps + nu z          a = noise level, b = sqrt(1 - a^2)

from a noisier level t to a cleaner level s. DDIM: tau = nu = 0. DDPM: tau = nu, tau^2 the posterior variance
(beta-tilde). SR3 as published: the same mean, but nu^2 = 1 - gamma_t / gamma_s (Saharia et al. 2021, eq. 11).
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from diffsr_core.schedule import Table

Denoise = Callable[[Tensor, float], tuple[Tensor, Tensor]]  # (x_t, noise level) -> (x_0, eps)
Noise = Callable[[int], Tensor]  # step -> z, the shape of x_t; step 0 is the initial state

SAMPLERS = ("ddim", "ddpm", "sr3")


def noise_scales(sampler: str, a_t: float, a_s: float) -> tuple[float, float]:
    """Return (tau, nu) of the step from noise level a_t to a_s > a_t. Raises ValueError for an unknown sampler."""
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler ({sampler!r}) is unknown; use one of: {', '.join(SAMPLERS)}")
    if sampler == "ddim":
        return 0.0, 0.0
    gamma_t, gamma_s = a_t * a_t, a_s * a_s
    tau = math.sqrt((1 - gamma_s) / (1 - gamma_t) * (1 - gamma_t / gamma_s))
    if sampler == "ddpm" or a_s == 1.0:
        return tau, tau  # at the clean end tau = 0: no sampler adds noise there (SR3, alg. 2: z = 0 at t = 1)
    return tau, math.sqrt(1 - gamma_t / gamma_s)


def reverse_step(x_0: Tensor, eps: Tensor, *, a_s: float, tau: float, nu: float, z: Tensor | None) -> Tensor:
    """Return x_s by the formula above; scalars in float64, tensors as they come."""
    x_s = a_s * x_0 + math.sqrt(max(0.0, 1 - a_s * a_s - tau * tau)) * eps
    return x_s if z is None else x_s + nu * z


def sample(
    denoise: Denoise, grid: Table, *, noise: Noise, sampler: str = "ddim", clip: bool = True
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (x_s, x_0 as predicted) after each step of the grid; the last x_s is the sample.

    clip: x_0 is clipped to [-1, 1] at each step and eps recomputed from it, as both references do: with an eps
    prediction an early error is otherwise multiplied by b/a, up to 151 on SR3's schedule.
    """
    x_t = noise(0)
    for i, (a_t, a_s) in enumerate(zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True)):
        x_0, eps = denoise(x_t, a_t)
        if clip:
            x_0 = x_0.clamp(-1, 1)
            eps = (x_t - a_t * x_0) / math.sqrt(1 - a_t * a_t)
        tau, nu = noise_scales(sampler, a_t, a_s)
        x_t = reverse_step(x_0, eps, a_s=a_s, tau=tau, nu=nu, z=noise(i + 1) if nu > 0 else None)
        yield x_t, x_0


def last(states: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the final x of a sampler's states."""
    x = torch.empty(0)
    for x, _ in states:  # noqa: B007 - the last one is wanted
        pass
    return x

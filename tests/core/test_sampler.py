"""Laws of the reverse process: closed forms, the textbook formulas in float64, and a prior with a known answer."""

import math
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from diffsr_core.family import x0_and_eps
from diffsr_core.sampler import SAMPLERS, default_grid, langevin_step, last, noise_scales, reverse_step, sample
from diffsr_core.schedule import GRIDS, Schedule, sampling_grid

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
KINDS = ("eps", "x_0", "v")


def random_levels(count: int) -> list[tuple[float, float]]:
    """Pairs (a_t, a_s), a_t < a_s < 1."""
    rng = np.random.default_rng(5)
    return [tuple(sorted(pair)) for pair in rng.uniform(0.01, 0.999, (count, 2)).tolist()]  # type: ignore[misc]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noise_of(shape: tuple[int, ...]) -> Callable[[int], Tensor]:
    return lambda step: normal(*shape, seed=1000 + step)


def known(x_0: Tensor) -> Callable[[Tensor, float], tuple[Tensor, Tensor]]:
    """A denoiser that knows x_0."""
    return lambda x_t, a: (x_0, (x_t - a * x_0) / math.sqrt(1 - a * a))


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("num_steps", [1, 2, 5, 100])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_denoiser_that_knows_x_0_gets_exactly_x_0(sampler: str, num_steps: int, clip: bool) -> None:
    x_0 = normal(1, 3, 4, 4, seed=0).clamp(-1, 1)
    grid = sampling_grid(Schedule(num_timesteps=100), num_steps)
    states = list(sample(known(x_0), grid, noise=noise_of((1, 3, 4, 4)), sampler=sampler, clip=clip))
    assert len(states) == num_steps
    assert torch.equal(states[-1][0], x_0)


def test_with_x_0_known_every_ddim_state_lies_on_the_line_to_the_start() -> None:
    x_0, start = normal(2, 2, seed=0).clamp(-1, 1), normal(2, 2, seed=1000)
    grid = sampling_grid(Schedule(num_timesteps=100), 7)
    eps = (start - grid[0] * x_0) / math.sqrt(1 - grid[0] ** 2)
    for (x_s, _), a in zip(sample(known(x_0), grid, noise=noise_of((2, 2))), grid[1:], strict=True):
        assert torch.allclose(x_s, a * x_0 + math.sqrt(max(0, 1 - a * a)) * eps, atol=1e-12)


def test_ddpm_is_the_gaussian_posterior_q_of_x_s_given_x_t_and_x_0() -> None:
    # Independent: Bayes' rule for two Gaussians, precision by precision, not the formula with alphas and betas.
    for a_t, a_s in random_levels(200):
        x_0, x_t = normal(8, seed=1), normal(8, seed=2)
        ratio = a_t / a_s  # q(x_t | x_s) = N(ratio x_s, 1 - ratio^2);  q(x_s | x_0) = N(a_s x_0, 1 - a_s^2)
        prior, likelihood = 1 / (1 - a_s**2), ratio**2 / (1 - ratio**2)
        variance = 1 / (prior + likelihood)
        mean = variance * (prior * a_s * x_0 + likelihood * x_t / ratio)
        eps = (x_t - a_t * x_0) / math.sqrt(1 - a_t**2)
        tau, nu = noise_scales("ddpm", a_t, a_s)
        assert tau == nu
        assert nu**2 == pytest.approx(variance, rel=1e-9)
        assert torch.allclose(reverse_step(x_0, eps, a_s=a_s, tau=tau, nu=nu, z=None), mean, rtol=1e-9, atol=1e-9)
        z = normal(8, seed=3)
        moved = reverse_step(x_0, eps, a_s=a_s, tau=tau, nu=nu, z=z)
        assert torch.allclose(moved, mean + math.sqrt(variance) * z, rtol=1e-9, atol=1e-9)


def test_ddim_keeps_eps_and_adds_no_noise() -> None:
    for a_t, a_s in random_levels(50):
        x_0, eps = normal(8, seed=1), normal(8, seed=2)
        assert noise_scales("ddim", a_t, a_s) == (0.0, 0.0)
        expected = a_s * x_0 + math.sqrt(1 - a_s**2) * eps
        assert torch.allclose(reverse_step(x_0, eps, a_s=a_s, tau=0.0, nu=0.0, z=None), expected, atol=1e-14)


def test_sr3_has_the_posterior_mean_and_the_forward_variance() -> None:
    for a_t, a_s in random_levels(200):
        tau, nu = noise_scales("sr3", a_t, a_s)
        assert tau == noise_scales("ddpm", a_t, a_s)[0]
        assert nu**2 == pytest.approx(1 - (a_t / a_s) ** 2, rel=1e-12)
        assert nu > tau  # beta > beta-tilde
        x_0, eps, z = normal(8, seed=1), normal(8, seed=2), normal(8, seed=3)
        mean = reverse_step(x_0, eps, a_s=a_s, tau=tau, nu=tau, z=None)  # that of DDPM, proved above
        found = reverse_step(x_0, eps, a_s=a_s, tau=tau, nu=nu, z=z)
        assert torch.allclose(found, mean + math.sqrt(1 - (a_t / a_s) ** 2) * z, atol=1e-12)


def test_sr3s_algorithm_2_is_the_step_formula() -> None:
    # Saharia et al. 2021, alg. 2, line 4, in alphas; DDPM's (Ho et al. 2020, alg. 2) differs in the variance alone.
    for a_t, a_s in random_levels(200):
        x_t, eps, z = normal(8, seed=1), normal(8, seed=2), normal(8, seed=3)
        alpha, gamma = (a_t / a_s) ** 2, a_t**2
        mean = (x_t - (1 - alpha) / math.sqrt(1 - gamma) * eps) / math.sqrt(alpha)
        x_0 = (x_t - math.sqrt(1 - gamma) * eps) / a_t
        tau, nu = noise_scales("sr3", a_t, a_s)
        found = reverse_step(x_0, eps, a_s=a_s, tau=tau, nu=nu, z=z)
        assert torch.allclose(found, mean + math.sqrt(1 - alpha) * z, rtol=1e-8, atol=1e-8)


def test_ddpm_is_ddim_with_eta_1() -> None:
    # Song et al. 2021 (DDIM), eq. 12 and 16: sigma(eta) scales the noise and is taken off the direction to x_t.
    for a_t, a_s in random_levels(200):
        sigma = math.sqrt((1 - a_s**2) / (1 - a_t**2)) * math.sqrt(1 - a_t**2 / a_s**2)
        x_0, eps, z = normal(8, seed=1), normal(8, seed=2), normal(8, seed=3)
        expected = a_s * x_0 + math.sqrt(1 - a_s**2 - sigma**2) * eps + sigma * z
        tau, nu = noise_scales("ddpm", a_t, a_s)
        assert torch.allclose(reverse_step(x_0, eps, a_s=a_s, tau=tau, nu=nu, z=z), expected, atol=1e-12)


def test_resshift_is_the_papers_posterior_divided_by_the_size_of_its_state() -> None:
    # Yue et al. 2023, eq. 7, on the residual u = x - y_LR with u_t = (1 - eta_t) r + kappa sqrt(eta_t) eps.
    rng = np.random.default_rng(7)
    for _ in range(200):
        eta_s, eta_t = sorted(rng.uniform(1e-4, 0.98, 2).tolist())
        size_t, size_s = (math.hypot(1 - eta, 2 * math.sqrt(eta)) for eta in (eta_t, eta_s))
        r, x_t, z = normal(8, seed=1), normal(8, seed=2), normal(8, seed=3)
        u_t = x_t * size_t
        mean = eta_s / eta_t * u_t + (eta_t - eta_s) / eta_t * r
        variance = 2**2 * eta_s / eta_t * (eta_t - eta_s)
        a_t, a_s = (1 - eta_t) / size_t, (1 - eta_s) / size_s
        eps = (x_t - a_t * r) / math.sqrt(1 - a_t**2)
        tau, nu = noise_scales("resshift", a_t, a_s)
        assert tau == nu and nu * size_s == pytest.approx(math.sqrt(variance), rel=1e-9)
        found = reverse_step(r, eps, a_s=a_s, tau=tau, nu=nu, z=z)
        assert torch.allclose(found * size_s, mean + math.sqrt(variance) * z, rtol=1e-9, atol=1e-9)


def tilted(x_t: Tensor, a: float) -> tuple[Tensor, Tensor]:
    """A denoiser whose x_0 moves along the way, unlike one that knows it."""
    x_0 = torch.tanh(x_t + a)
    return x_0, (x_t - a * x_0) / math.sqrt(1 - a * a)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 10])
def test_the_multistep_solver_is_the_published_dpm_solver_pp_2m(num_steps: int) -> None:
    # Lu et al. 2022, alg. 2: x = sigma_s / sigma_t x - alpha_s (e^-h - 1) D with D = (1 + 1/2r) x_0 - 1/2r x_0 before,
    # r = h before / h; first order on the first step, and on the last, where h is infinite.
    grid = sampling_grid(Schedule(num_timesteps=100), num_steps, family="log_snr")
    x = normal(8, seed=1000)
    before = h_before = None
    states = []
    for i, (a_t, a_s) in enumerate(pairwise(grid.tolist())):
        sigma_t, sigma_s = math.sqrt(1 - a_t**2), math.sqrt(1 - a_s**2)
        x_0 = tilted(x, a_t)[0]
        d = x_0
        if i == num_steps - 1:
            x = x_0
        else:
            h = math.log(a_s / sigma_s) - math.log(a_t / sigma_t)
            if before is not None:
                ratio = h_before / h
                d = (1 + 1 / (2 * ratio)) * x_0 - 1 / (2 * ratio) * before
            x = sigma_s / sigma_t * x - a_s * math.expm1(-h) * d
            before, h_before = x_0, h
        states.append((x, x_0))
    found = sample(tilted, grid, noise=noise_of((8,)), sampler="dpmpp-2m", clip=False)
    for (x_s, x_0), (wanted_x, wanted_x_0) in zip(found, states, strict=True):
        assert torch.allclose(x_s, wanted_x, atol=1e-10) and torch.allclose(x_0, wanted_x_0, atol=1e-10)


@pytest.mark.parametrize("rate", [0.01, 0.3, 1.0])
def test_a_langevin_step_follows_the_score_and_adds_its_noise(rate: float) -> None:
    # Song and Ermon 2019, alg. 1: x + d score + sqrt(2 d) z, here with d = rate b^2 and score = -eps / b.
    for a, _ in random_levels(50):
        x, z = normal(8, seed=1), normal(8, seed=3)
        x_0, eps = tilted(x, a)
        d = rate * (1 - a * a)
        expected = x + d * (-eps / math.sqrt(1 - a * a)) + math.sqrt(2 * d) * z
        assert torch.allclose(langevin_step(x_0, eps, a=a, z=z, rate=rate), expected, atol=1e-12)


def test_annealed_langevin_keeps_x_in_units_of_the_signal_between_its_levels() -> None:
    grid = np.array([0.2, 0.5, 0.9, 1.0])
    states = sample(tilted, grid, noise=noise_of((8,)), sampler="langevin", clip=False, corrections=2)
    x = normal(8, seed=1000)
    for i, (a_t, a_s) in enumerate(((0.2, 0.5), (0.5, 0.9))):
        x = a_s * (x / a_t)  # x / a is the state of the variance-exploding process of Song and Ermon
        for k in range(2):
            x = langevin_step(*tilted(x, a_s), a=a_s, z=normal(8, seed=1000 + 4 + 2 * i + k))
        assert torch.allclose(next(states)[0], x, atol=1e-12)
    assert torch.allclose(next(states)[0], tilted(x, 0.9)[0], atol=1e-12)


def test_edm_preconditioning_at_sigma_data_1_is_the_v_prediction() -> None:
    # Karras et al. 2022, table 1: D = c_skip x + c_out F(c_in x) of x = x_t / a, sigma = b / a; with F = -v.
    level = torch.linspace(0.01, 0.999, 50, dtype=torch.float64)
    a = level[:, None, None, None]
    sigma = (1 - a**2).sqrt() / a
    v, x_t = normal(50, 2, 3, 3, seed=1), normal(50, 2, 3, 3, seed=2)
    c_skip, c_out, c_in = 1 / (sigma**2 + 1), sigma / (sigma**2 + 1).sqrt(), 1 / (sigma**2 + 1).sqrt()
    assert torch.allclose(c_in * x_t / a, x_t, atol=1e-12)  # the network sees x_t itself
    assert torch.allclose(c_skip * x_t / a + c_out * -v, x0_and_eps(v, x_t, level, kind="v")[0], atol=1e-12)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_sampler_adds_noise_at_the_clean_end(sampler: str) -> None:
    for a_t, _ in random_levels(20):
        assert noise_scales(sampler, a_t, 1.0) == (0.0, 0.0)


@pytest.mark.parametrize("t", [1, 10, 500, 1999])
def test_the_posterior_variance_is_that_of_the_public_sr3_code(t: int) -> None:
    path = GOLDEN / "sr3_unofficial_tiny.io.safetensors"
    if not path.is_file():
        pytest.skip("the golden tensors of the reference implementations lie beside the checkout, not in it: none here")
    from safetensors.torch import load_file

    levels = Schedule(name="linear", num_timesteps=2000).noise_levels
    tau, _ = noise_scales("ddpm", float(levels[t]), float(levels[t - 1]))
    assert math.log(tau**2) == pytest.approx(float(load_file(path)[f"reverse_logvar_t{t}"]), abs=1e-5)


def gaussian_denoiser(mean: float, std: float) -> Callable[[Tensor, float], tuple[Tensor, Tensor]]:
    """The exact posterior mean of x_0 ~ N(mean, std^2) given x_t, and its eps."""

    def denoise(x_t: Tensor, a: float) -> tuple[Tensor, Tensor]:
        b2 = 1 - a * a
        x_0 = mean + a * std**2 / (a * a * std**2 + b2) * (x_t - a * mean)
        return x_0, (x_t - a * x_0) / math.sqrt(b2)

    return denoise


@pytest.mark.parametrize(("mean", "std"), [(0.3, 0.5), (-2.0, 0.1), (0.0, 3.0)])
def test_ddim_transports_the_normal_law_to_a_gaussian_prior(mean: float, std: float) -> None:
    # For a Gaussian prior the probability flow is affine, z -> mean + std z: two points give both moments exactly.
    def moments(num_steps: int) -> tuple[float, float]:
        points = torch.tensor([0.0, 1.0], dtype=torch.float64)
        grid = sampling_grid(Schedule(name="cosine", num_timesteps=4000), num_steps)
        end = last(sample(gaussian_denoiser(mean, std), grid, noise=lambda step: points, clip=False))
        return float(end[0]), float(end[1] - end[0])

    m, s = moments(4000)
    assert m == pytest.approx(mean, abs=2e-3)
    assert s == pytest.approx(std, rel=0.01)
    errors = [abs(moments(n)[1] - std) for n in (10, 40, 160)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]  # a first-order solver: four times the steps, a quarter the error


@pytest.mark.parametrize("sampler", ["ddpm", "sr3"])
def test_ancestral_sampling_reaches_the_moments_of_a_gaussian_prior(sampler: str) -> None:
    mean, std, count = 0.4, 0.5, 40_000
    grid = sampling_grid(Schedule(name="cosine", num_timesteps=1000), 250)
    end = last(
        sample(gaussian_denoiser(mean, std), grid, noise=noise_of((count,)), sampler=sampler, clip=False),
    )
    assert float(end.mean()) == pytest.approx(mean, abs=5 * std / math.sqrt(count))
    assert float(end.std()) == pytest.approx(std, rel=0.02)


def test_each_step_asks_for_its_own_noise_and_only_when_it_is_used() -> None:
    grid = sampling_grid(Schedule(num_timesteps=100), 5)
    for sampler, expected in (("ddim", [0]), ("ddpm", [0, 1, 2, 3, 4]), ("sr3", [0, 1, 2, 3, 4])):
        asked: list[int] = []

        def noise(step: int, asked: list[int] = asked) -> Tensor:
            asked.append(step)
            return normal(3, seed=step)

        last(sample(known(torch.zeros(3, dtype=torch.float64)), grid, noise=noise, sampler=sampler))
        assert asked == expected


@pytest.mark.parametrize("corrections", [0, 1, 3])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_noise_is_asked_for_twice_and_the_denoiser_is_called_as_often_as_promised(
    sampler: str, corrections: int
) -> None:
    if sampler == "langevin" and not corrections:
        return  # refused, as proved below
    asked: Counter[int] = Counter()
    levels: Counter[float] = Counter()

    def noise(index: int) -> Tensor:
        asked[index] += 1
        return normal(3, seed=index)

    def denoise(x_t: Tensor, a: float) -> tuple[Tensor, Tensor]:
        levels[a] += 1
        return tilted(x_t, a)

    grid = sampling_grid(Schedule(num_timesteps=100), 5)
    last(sample(denoise, grid, noise=noise, sampler=sampler, corrections=corrections))
    assert max(asked.values()) == 1
    assert [index for index in sorted(asked) if index > 5] == list(range(6, 6 + 4 * corrections))
    assert [levels[a] for a in grid.tolist()] == [1, *[1 + corrections] * 4, 0]
    assert levels.total() == 5 + corrections * 4


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_only_langevin_corrects_unless_it_is_asked_for(sampler: str) -> None:
    grid = sampling_grid(Schedule(num_timesteps=100), 5)
    usual = 5 if sampler == "langevin" else 0
    default, asked, more = (
        last(sample(tilted, grid, noise=noise_of((8,)), sampler=sampler, corrections=corrections))
        for corrections in (None, usual, usual + 1)
    )
    assert torch.equal(default, asked) and not torch.equal(default, more)


@pytest.mark.parametrize(("sampler", "corrections", "least"), [("ddim", -1, 0), ("langevin", 0, 1)])
def test_a_number_of_corrections_that_a_sampler_cannot_have_is_an_error(
    sampler: str, corrections: int, least: int
) -> None:
    states = sample(tilted, np.array([0.1, 1.0]), noise=noise_of((8,)), sampler=sampler, corrections=corrections)
    with pytest.raises(ValueError, match=rf"corrections \({corrections}\) must be at least {least} with {sampler}"):
        next(states)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_late_start_is_the_image_noised_to_the_first_level(sampler: str) -> None:
    image = normal(8, seed=5)
    grid = sampling_grid(Schedule(num_timesteps=100), 3, family=default_grid(sampler), start=0.6)
    seen: list[Tensor] = []

    def denoise(x_t: Tensor, a: float) -> tuple[Tensor, Tensor]:
        seen.append(x_t)
        return tilted(x_t, a)

    last(sample(denoise, grid, noise=noise_of((8,)), sampler=sampler, start=image))
    assert torch.allclose(seen[0], 0.6 * image + 0.8 * normal(8, seed=1000), atol=1e-14)


def test_a_start_without_axes_is_an_image_of_that_number() -> None:
    grid = sampling_grid(Schedule(num_timesteps=100), 3, start=0.6)
    ends = [
        last(sample(tilted, grid, noise=noise_of((8,)), start=start))
        for start in (torch.tensor(0.3), torch.full((8,), 0.3))
    ]
    assert torch.equal(*ends)


def test_at_the_clean_end_the_state_is_x_0_itself_whatever_eps_says() -> None:
    x_0 = normal(8, seed=1)
    assert reverse_step(x_0, torch.full((8,), torch.nan), a_s=1.0, tau=0.0, nu=0.0, z=None) is x_0


def test_every_sampler_has_a_grid_that_suits_it() -> None:
    grids = {sampler: default_grid(sampler) for sampler in SAMPLERS}
    assert set(grids.values()) <= set(GRIDS)
    assert (grids["dpmpp-2m"], grids["resshift"], grids["ddim"]) == ("log_snr", "resshift", "uniform")
    with pytest.raises(ValueError, match=r"'heun'"):
        default_grid("heun")


def test_the_denoiser_is_called_once_a_step_with_the_levels_of_the_grid() -> None:
    grid = sampling_grid(Schedule(num_timesteps=100), 5)
    seen: list[float] = []

    def denoise(x_t: Tensor, a: float) -> tuple[Tensor, Tensor]:
        seen.append(a)
        return known(torch.zeros(3, dtype=torch.float64))(x_t, a)

    last(sample(denoise, grid, noise=noise_of((3,))))
    assert seen == grid[:-1].tolist()


def test_clipping_bounds_x_0_and_takes_eps_from_the_clipped_one() -> None:
    wild = torch.tensor([5.0, -7.0, 0.25], dtype=torch.float64)
    start = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    grid = np.array([0.1, 0.6, 1.0])
    bounded = torch.tensor([1.0, -1.0, 0.25], dtype=torch.float64)
    (x_s, x_0), (end, _) = sample(known(wild), grid, noise=lambda step: start, clip=True)
    assert torch.equal(x_0, bounded)
    eps = (start - 0.1 * bounded) / math.sqrt(1 - 0.01)
    assert torch.allclose(x_s, 0.6 * bounded + 0.8 * eps, atol=1e-14)
    assert torch.equal(end, bounded)
    (_, x_0), (end, _) = sample(known(wild), grid, noise=lambda step: start, clip=False)
    assert torch.equal(x_0, wild) and torch.equal(end, wild)


def test_a_correction_clips_as_the_steps_do() -> None:
    wild, start = torch.full((8,), 9.0, dtype=torch.float64), normal(8, seed=1000)
    grid = np.array([0.1, 0.6, 1.0])
    states = (sample(known(x_0), grid, noise=noise_of((8,)), corrections=1) for x_0 in (wild, wild.clamp(-1, 1)))
    (clipped, _), (bounded, _) = (next(each) for each in states)
    assert torch.allclose(clipped, bounded, atol=1e-14) and not torch.allclose(clipped, start)


@pytest.mark.parametrize("kind", KINDS)
def test_x_0_and_eps_are_found_again_from_every_kind_of_prediction(kind: str) -> None:
    x_0, eps = normal(50, 2, 3, 3, seed=1), normal(50, 2, 3, 3, seed=2)
    level = torch.linspace(0.01, 0.999, 50, dtype=torch.float64)
    a = level[:, None, None, None]
    b = (1 - a**2).sqrt()
    prediction = {"eps": eps, "x_0": x_0, "v": a * eps - b * x_0}[kind]
    found_x_0, found_eps = x0_and_eps(prediction, a * x_0 + b * eps, level, kind=kind)
    assert torch.allclose(found_x_0, x_0, atol=1e-11) and torch.allclose(found_eps, eps, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_the_prediction_x_0_and_eps_explain_x_t(kind: str) -> None:
    prediction, x_t = normal(50, 2, 3, 3, seed=1), normal(50, 2, 3, 3, seed=2)
    level = torch.linspace(0.01, 0.999, 50, dtype=torch.float64)
    x_0, eps = x0_and_eps(prediction, x_t, level, kind=kind)
    a = level[:, None, None, None]
    assert torch.allclose(a * x_0 + (1 - a**2).sqrt() * eps, x_t, atol=1e-11)


def test_an_unknown_sampler_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'heun'.*ddim, ddpm, sr3"):
        noise_scales("heun", 0.1, 0.2)

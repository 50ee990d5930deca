"""Laws of the noise schedules, the noise levels of training, and the sampling grids."""

import math

import numpy as np
import pytest
import torch

from diffsr_core.schedule import (
    Schedule,
    cosine_betas,
    linear_betas,
    sample_noise_levels,
    sampling_grid,
    step_of_noise_level,
)

SRDIFF = Schedule(name="cosine", num_timesteps=100)
SR3 = Schedule(name="linear", num_timesteps=2000)
SCHEDULES = [SRDIFF, SR3, Schedule(name="cosine", num_timesteps=1000), Schedule(name="cosine", num_timesteps=2)]


def test_the_cosine_schedule_of_100_steps_has_the_published_ends() -> None:
    # Facts of Nichol and Dhariwal's eq. 17 at T = 100, s = 0.008, betas clipped at 0.999, to the digits given.
    assert cosine_betas(100)[0] == pytest.approx(6.3e-4, rel=0.01)
    assert SRDIFF.alphas_cumprod[-2] == pytest.approx(2.4e-4, rel=0.02)
    assert SRDIFF.alphas_cumprod[-1] == pytest.approx(2.4e-7, rel=0.02)
    assert cosine_betas(100)[-1] == 0.999  # the clip; without it the last level would be 0 and eps undefined


def test_the_cosine_schedule_is_the_ratio_of_squared_cosines() -> None:
    def f(t: float) -> float:
        return math.cos((t / 100 + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in range(99):  # the last beta is clipped
        assert SRDIFF.alphas_cumprod[t] == pytest.approx(f(t + 1) / f(0), rel=1e-12)


def test_the_linear_schedule_of_2000_steps_ends_where_sr3_does() -> None:
    betas = linear_betas(2000)
    assert (betas[0], betas[-1]) == (1e-6, 1e-2)
    assert np.allclose(np.diff(betas), (1e-2 - 1e-6) / 1999, rtol=1e-9)
    assert SR3.alphas_cumprod[-1] == pytest.approx(4.39e-5, rel=1e-3)
    gamma = 1.0
    for beta in betas.tolist():
        gamma *= 1 - beta
    assert SR3.alphas_cumprod[-1] == pytest.approx(gamma, rel=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_table_is_float64_and_falls_strictly_between_1_and_0(schedule: Schedule) -> None:
    table = schedule.alphas_cumprod
    assert table.dtype == np.float64 and table.shape == (schedule.num_timesteps,)
    assert (np.diff(table) < 0).all() and table[-1] > 0 and table[0] < 1
    assert np.allclose(schedule.noise_levels**2, table, rtol=1e-14, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_grid_rises_strictly_from_the_last_step_to_exactly_1(schedule: Schedule) -> None:
    for num_steps in {1, 2, 3, 7, 8, 25, 99, 100, 333, schedule.num_timesteps - 1, schedule.num_timesteps}:
        if num_steps > schedule.num_timesteps:
            continue
        grid = sampling_grid(schedule, num_steps)
        assert grid.shape == (num_steps + 1,)
        assert (np.diff(grid) > 0).all()
        assert grid[0] == schedule.noise_levels[-1]
        assert grid[-1] == 1.0
        assert np.isin(grid[:-1], schedule.noise_levels).all()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_grid_of_all_steps_is_every_step(schedule: Schedule) -> None:
    grid = sampling_grid(schedule, schedule.num_timesteps)
    assert np.array_equal(grid, [*schedule.noise_levels[::-1], 1.0])


def test_a_grid_of_a_divisor_takes_every_nth_step() -> None:
    assert np.array_equal(sampling_grid(SRDIFF, 4), [*SRDIFF.noise_levels[[99, 74, 49, 24]], 1.0])


def test_training_levels_follow_sr3s_piecewise_uniform_law() -> None:
    # p(gamma): t uniform, then uniform between gamma_t and gamma_{t-1}; so each interval holds a T-th of the levels,
    # and within an interval the share of the way is uniform. Bounds: six standard deviations of the binomial count.
    schedule = Schedule(name="linear", num_timesteps=20)
    count = 100_000
    levels = sample_noise_levels(schedule, count, generator=torch.Generator().manual_seed(3))
    assert levels.shape == (count,) and levels.dtype == torch.float32
    gamma = levels.double().numpy() ** 2
    edges = np.concatenate([schedule.alphas_cumprod[::-1], [1.0]])
    # float32 moves gamma by up to 1.2e-7, a tenth of the first interval (1e-6): that one is counted with the next.
    assert gamma.min() >= edges[0] - 2e-7 and gamma.max() <= 1 + 2e-7
    edges = np.delete(edges, -2)
    edges[0], edges[-1] = 0, 2
    counts, _ = np.histogram(gamma, edges)
    share = np.full(19, 1 / 20)
    share[-1] = 2 / 20
    assert (np.abs(counts - count * share) < 6 * np.sqrt(count * share * (1 - share))).all()
    low, high = schedule.alphas_cumprod[19], schedule.alphas_cumprod[18]
    way = (gamma[gamma < high] - low) / (high - low)
    for quarter in range(4):
        expected = len(way) / 4
        inside = ((way >= quarter / 4) & (way < (quarter + 1) / 4)).sum()
        assert abs(inside - expected) < 6 * math.sqrt(expected * 3 / 4)


def test_between_two_far_steps_it_is_gamma_that_is_uniform_not_its_root() -> None:
    schedule = Schedule(name="cosine", num_timesteps=2)  # gamma: 1, then 0.49, then 0.0005
    count = 40_000
    gamma = sample_noise_levels(schedule, count, generator=torch.Generator().manual_seed(5)).double().numpy() ** 2
    for low, high in zip(schedule.alphas_cumprod, [1.0, schedule.alphas_cumprod[0]], strict=True):
        way = (gamma[(gamma >= low) & (gamma < high)] - low) / (high - low)
        counts, _ = np.histogram(way, 10, (0, 1))
        assert (np.abs(counts - count / 20) < 6 * math.sqrt(count / 20)).all()


def test_training_levels_differ_within_a_batch_and_repeat_with_the_generator() -> None:
    first = sample_noise_levels(SRDIFF, 64, generator=torch.Generator().manual_seed(1))
    again = sample_noise_levels(SRDIFF, 64, generator=torch.Generator().manual_seed(1))
    other = sample_noise_levels(SRDIFF, 64, generator=torch.Generator().manual_seed(2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len(first.unique()) == 64


@pytest.mark.parametrize("schedule", [SRDIFF, Schedule(name="linear", num_timesteps=50)], ids=str)
def test_the_step_of_a_level_is_the_nearest_one_of_the_table(schedule: Schedule) -> None:
    table = torch.from_numpy(schedule.noise_levels)
    assert step_of_noise_level(schedule, table).tolist() == list(range(schedule.num_timesteps))
    nearer_first = table[:-1] + 0.4 * (table[1:] - table[:-1])
    nearer_second = table[:-1] + 0.6 * (table[1:] - table[:-1])
    assert step_of_noise_level(schedule, nearer_first).tolist() == list(range(schedule.num_timesteps - 1))
    assert step_of_noise_level(schedule, nearer_second).tolist() == list(range(1, schedule.num_timesteps))
    assert step_of_noise_level(schedule, torch.tensor([1.0])).dtype == torch.float32


def test_an_unknown_schedule_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'sigmoid'.*cosine, linear"):
        Schedule(name="sigmoid")  # type: ignore[arg-type]


@pytest.mark.parametrize("num_timesteps", [-1, 0, 1])
def test_a_schedule_of_fewer_than_two_steps_is_an_error(num_timesteps: int) -> None:
    with pytest.raises(ValueError, match=rf"num_timesteps \({num_timesteps}\)"):
        Schedule(num_timesteps=num_timesteps)


@pytest.mark.parametrize("num_steps", [-1, 0, 101])
def test_a_grid_that_the_schedule_cannot_give_is_an_error(num_steps: int) -> None:
    with pytest.raises(ValueError, match=rf"steps \({num_steps}\).*100"):
        sampling_grid(SRDIFF, num_steps)

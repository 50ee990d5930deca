"""Laws of the noise schedules, the noise levels of training, and the sampling grids."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from diffsr_core.schedule import (
    GRIDS,
    Schedule,
    _level_table,
    cosine_betas,
    eta_of_noise_level,
    linear_betas,
    sample_noise_levels,
    sampling_grid,
    step_of_noise_level,
)

SRDIFF = Schedule(name="cosine", num_timesteps=100)
SR3 = Schedule(name="linear", num_timesteps=2000)
DDPM = Schedule(name="linear", num_timesteps=1000, first_beta=1e-4, last_beta=0.02)
CHAIN, SHORT_CHAIN = (Schedule(name="resshift", num_timesteps=count) for count in (15, 4))
SCHEDULES = [
    SRDIFF,
    SR3,
    Schedule(name="cosine", num_timesteps=1000),
    Schedule(name="cosine", num_timesteps=2),
    DDPM,
    CHAIN,
    SHORT_CHAIN,
]
CONTINUOUS = [family for family in GRIDS if family != "uniform"]


def sigma(noise_level: np.ndarray) -> np.ndarray:
    """b / a."""
    return np.sqrt(1 - noise_level**2) / noise_level


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


def test_whole_steps_are_drawn_uniformly_and_are_entries_of_the_table() -> None:
    count = 20_000
    levels = sample_noise_levels(SRDIFF, count, generator=torch.Generator().manual_seed(7), continuous=False)
    assert levels.dtype == torch.float32
    table = torch.from_numpy(SRDIFF.noise_levels).float()
    t = step_of_noise_level(SRDIFF, levels)
    assert torch.equal(table[t.long()], levels) and torch.equal(t, t.round())
    counts = torch.bincount(t.long(), minlength=100)
    assert ((counts - count / 100).abs() < 6 * math.sqrt(count / 100)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_the_step_of_an_entry_of_the_table_is_exact_alone_and_in_a_batch(
    schedule: Schedule, dtype: torch.dtype
) -> None:
    table = torch.from_numpy(schedule.noise_levels).to(dtype)
    t = step_of_noise_level(schedule, table)
    assert t.dtype == torch.float32 and t.tolist() == list(range(schedule.num_timesteps))
    for i in {0, 1, schedule.num_timesteps // 2, schedule.num_timesteps - 1}:
        assert step_of_noise_level(schedule, table[i : i + 1]).tolist() == [i]
    assert step_of_noise_level(schedule, table[:3].repeat_interleave(2)[::2]).tolist() == list(range(len(table[:3])))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_the_step_of_a_level_falls_with_it_without_jumps_and_stays_within_the_table(schedule: Schedule) -> None:
    levels = torch.cos(torch.linspace(0, math.pi / 2, 20_001, dtype=torch.float64))
    t = step_of_noise_level(schedule, levels).double()
    assert (t.diff() >= 0).all()
    assert t[0] == 0 and t[-1] == schedule.num_timesteps - 1
    inside = (levels < schedule.noise_levels[0]) & (levels > schedule.noise_levels[-1])
    assert (t[inside] > 0).all() and (t[inside].diff() > 0).all()
    angles = np.arccos(schedule.noise_levels)
    assert np.allclose(t.numpy(), np.interp(torch.acos(levels).numpy(), angles, np.arange(len(angles))), atol=2e-4)


def test_the_table_is_put_on_a_device_once_and_serves_sampling_training_and_other_schedules() -> None:
    levels = torch.linspace(0.05, 0.99, 9)
    _level_table.cache_clear()
    with torch.inference_mode():  # first, as a sampler does: what it keeps must still serve where gradients are taken
        found = [step_of_noise_level(schedule, levels).tolist() for schedule in (SRDIFF, SR3, SRDIFF, SR3)]
    assert found[0] == found[2] != found[1] == found[3]
    assert (_level_table.cache_info().misses, _level_table.cache_info().hits) == (2, 2)
    assert not _level_table(SRDIFF, levels.device, levels.dtype).is_inference()
    learned = levels.clone().requires_grad_()
    step_of_noise_level(SRDIFF, learned).sum().backward()
    assert learned.grad is not None and bool((learned.grad < 0).all())
    assert step_of_noise_level(Schedule(name="cosine", num_timesteps=100), levels).tolist() == found[0]


def test_along_the_cosine_schedule_the_step_is_its_formula_also_between_the_entries() -> None:
    t = torch.arange(1, 196, dtype=torch.float64) / 2  # whole and half steps; the last beta is clipped
    clean = math.cos(0.008 / 1.008 * math.pi / 2)
    levels = torch.cos(((t + 1) / 100 + 0.008) / 1.008 * math.pi / 2) / clean
    assert torch.allclose(
        step_of_noise_level(SRDIFF, levels).double(), t, atol=1e-2
    )  # even in the level: 0.06 off at 0.5


@pytest.mark.parametrize("start", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("family", GRIDS)
@pytest.mark.parametrize("schedule", [SRDIFF, SR3, DDPM, Schedule(name="resshift", num_timesteps=80)], ids=str)
def test_a_grid_of_any_family_rises_strictly_within_training_to_exactly_1(
    schedule: Schedule, family: str, start: float
) -> None:
    for num_steps in (1, 2, 3, 4, 5, 15, 40):
        grid = sampling_grid(schedule, num_steps, family=family, start=start)
        assert grid.shape == (num_steps + 1,) and grid.dtype == np.float64
        assert (np.diff(grid) > 0).all() and grid[-1] == 1.0
        assert grid[0] == start if start else grid[0] >= schedule.noise_levels[-1]
        if family != "linear":  # its betas begin at first_beta, whatever the table's first
            assert grid[-2] <= schedule.noise_levels[0] * (1 + 1e-12)


@pytest.mark.parametrize("family", CONTINUOUS)
def test_only_the_uniform_grid_is_bound_to_the_steps_of_the_table(family: str) -> None:
    grid = sampling_grid(SRDIFF, 250, family=family)
    assert grid.shape == (251,) and (np.diff(grid) > 0).all()


def test_a_late_uniform_grid_is_that_of_a_schedule_which_ends_there() -> None:
    start = float(SRDIFF.noise_levels[59])
    assert np.array_equal(sampling_grid(SRDIFF, 4, start=start), [*SRDIFF.noise_levels[[59, 44, 29, 14]], 1.0])
    assert np.array_equal(sampling_grid(SRDIFF, 60, start=start), [*SRDIFF.noise_levels[59::-1], 1.0])
    between = (start + float(SRDIFF.noise_levels[60])) / 2  # an entry more is cleaner than this
    assert np.array_equal(sampling_grid(SRDIFF, 61, start=between), [between, *SRDIFF.noise_levels[59::-1], 1.0])


@pytest.mark.parametrize("schedule", [SRDIFF, SR3, DDPM, CHAIN], ids=str)
def test_log_snr_and_karras_are_even_in_their_variable_over_the_levels_of_training(schedule: Schedule) -> None:
    ends = schedule.noise_levels[[-1, 0]]
    for family, variable in (("log_snr", lambda x: -np.log(x)), ("karras", lambda x: x ** (1 / 7))):
        grid = sampling_grid(schedule, 12, family=family)
        assert np.allclose(grid[[0, -2]], ends, rtol=1e-12)
        steps = np.diff(variable(sigma(grid[:-1])))
        assert np.allclose(steps, steps[0], rtol=1e-6)
    # Karras et al. 2022, eq. 5, at the third of 12.
    low, high = sigma(ends[1]), sigma(ends[0])
    third = (high ** (1 / 7) + 2 / 11 * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    assert sigma(sampling_grid(schedule, 12, family="karras")[2]) == pytest.approx(third, rel=1e-9)


@pytest.mark.parametrize(
    ("num_steps", "last_beta"),
    [
        (2000, 0.0100),
        (1000, 0.0199),
        (500, 0.0396),
        (250, 0.0782),
        (100, 0.188),
        (50, 0.351),
        (25, 0.610),
        (20, 0.711),
        (15, 0.839),
        (10, 0.970),
    ],
)
def test_the_linear_grid_has_the_last_betas_computed_for_sr3s_search(num_steps: int, last_beta: float) -> None:
    # Golden: the N-step linear schedules from 1e-6 that end at SR3's last gamma, found by an independent script.
    grid = sampling_grid(SR3, num_steps, family="linear")
    betas = (1 - (grid[:-1] / grid[1:]) ** 2)[::-1]
    assert betas[-1] == pytest.approx(last_beta, rel=4e-3)
    assert betas[0] == pytest.approx(1e-6, rel=1e-6)
    assert np.allclose(np.diff(betas), (betas[-1] - betas[0]) / (num_steps - 1), rtol=1e-5)
    assert grid[0] ** 2 == pytest.approx(SR3.alphas_cumprod[-1], rel=1e-12)
    assert np.prod(1 - linear_betas(num_steps, last=betas[-1])) == pytest.approx(SR3.alphas_cumprod[-1], rel=1e-9)


def test_the_linear_grid_of_all_steps_is_the_linear_schedule() -> None:
    assert np.allclose(sampling_grid(SR3, 2000, family="linear"), sampling_grid(SR3, 2000), rtol=1e-12)
    assert np.allclose(sampling_grid(DDPM, 1000, family="linear"), sampling_grid(DDPM, 1000), rtol=1e-9)


def test_so_many_linear_steps_from_so_clean_a_start_that_first_beta_is_too_large_have_constant_betas() -> None:
    grid = sampling_grid(SRDIFF, 1000, family="linear", start=0.9996)
    assert grid[0] == 0.9996 and np.allclose(grid[1:] / grid[:-1], 0.9996 ** (-1 / 1000), rtol=1e-12)


RESSHIFT_LEVELS = [
    (15, ".0100 .0956 .184 .275 .367 .458 .546 .631 .709 .781 .843 .896 .940 .973 .9992"),
    (4, ".010 .266 .574 .980"),
]


@pytest.mark.parametrize("schedule", [SR3, None], ids=["grid", "schedule"])
@pytest.mark.parametrize(("num_steps", "levels"), RESSHIFT_LEVELS)
def test_the_resshift_grid_and_schedule_are_the_published_chain_as_noise_levels(
    num_steps: int, levels: str, schedule: Schedule | None
) -> None:
    if schedule is None:
        schedule = Schedule(name="resshift", num_timesteps=num_steps)
        found = schedule.noise_levels
    else:
        found = sampling_grid(schedule, num_steps, family="resshift")[:-1][::-1]
    # Golden: sqrt(gamma) of the published eta (kappa 2, p 0.3), found by an independent script, to the digits given.
    assert np.allclose(found[::-1], [float(level) for level in levels.split()], atol=6e-4)
    # Independent: the paper's own recursion, eq. 9 and 10, with kappa sqrt(eta) / (1 - eta) as the ratio b / a.
    first = 0.02 if num_steps == 15 else 0.1
    base = math.exp(math.log(0.99 / first) / (num_steps - 1))
    root_eta = [first * base ** (((t / (num_steps - 1)) ** 0.3) * (num_steps - 1)) for t in range(num_steps)]
    ratio = [2 * r / (1 - r * r) for r in root_eta]
    assert np.allclose(sigma(found), ratio, rtol=1e-9)


@pytest.mark.parametrize("schedule", [CHAIN, SHORT_CHAIN], ids=str)
def test_on_resshifts_schedule_the_uniform_grid_of_all_steps_is_the_chain_and_so_is_the_resshift_grid(
    schedule: Schedule,
) -> None:
    count = schedule.num_timesteps
    assert np.array_equal(sampling_grid(schedule, count), [*schedule.noise_levels[::-1], 1.0])
    assert np.allclose(sampling_grid(schedule, count, family="resshift"), sampling_grid(schedule, count), rtol=1e-12)


def test_a_model_of_resshifts_chain_trains_on_the_levels_of_the_chain() -> None:
    levels = sample_noise_levels(CHAIN, 3000, generator=torch.Generator().manual_seed(5), continuous=False)
    assert torch.equal(levels.unique(), torch.from_numpy(CHAIN.noise_levels).float().flip(0))
    between = sample_noise_levels(CHAIN, 3000, generator=torch.Generator().manual_seed(5))
    t = step_of_noise_level(CHAIN, levels).long()
    above = torch.tensor([1.0, *CHAIN.noise_levels[:-1].tolist()])[t]  # SR3's p(gamma), drawn between the neighbours
    assert bool(((levels <= between) & (between <= above)).all()) and len(between.unique()) > 2900


def test_the_resshift_grid_ends_where_training_does() -> None:
    narrow = Schedule(name="linear", num_timesteps=50, first_beta=1e-2, last_beta=0.1)
    assert np.allclose(sampling_grid(narrow, 15, family="resshift")[[0, -2]], narrow.noise_levels[[-1, 0]], rtol=1e-12)


def test_eta_solves_resshifts_ratio_of_noise_to_signal() -> None:
    for level in (1e-9, 0.01, 0.3, 0.7, 0.999, 1 - 1e-9):
        eta = eta_of_noise_level(level)
        assert 0 < eta < 1
        assert math.sqrt(1 - level**2) * (1 - eta) == pytest.approx(2 * math.sqrt(eta) * level, rel=1e-6)
    assert eta_of_noise_level(1.0) == 0.0


def test_linear_betas_are_those_asked_for() -> None:
    betas = 1 - DDPM.alphas_cumprod[1:] / DDPM.alphas_cumprod[:-1]
    assert np.allclose(betas, np.linspace(1e-4, 0.02, 1000)[1:], rtol=1e-9)
    assert DDPM.alphas_cumprod[-1] == pytest.approx(4.04e-5, rel=1e-2)  # Ho et al. 2020: L_T is about 1e-5 bits
    palette = Schedule(name="linear", num_timesteps=1000, first_beta=1e-4, last_beta=0.09)
    assert palette.alphas_cumprod[-1] == pytest.approx(6.6e-21, rel=1e-2)
    assert (palette.alphas_cumprod < SR3.alphas_cumprod[-1]).sum() == 532  # steps noisier than SR3 has ever seen


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "linear", "first_beta": 0.0}, r"\(0\.0, 0\.01\).*1e-7"),
        ({"name": "linear", "last_beta": 1.0}, r"\(1e-06, 1\.0\)"),
        ({"name": "linear", "first_beta": 0.02}, r"\(0\.02, 0\.01\) must rise"),
        ({"name": "cosine", "last_beta": 0.02}, r"left out with cosine"),
        ({"name": "resshift", "first_beta": 1e-4}, r"left out with resshift"),
        ({"name": "linear", "last_beta": 0.5}, r"last_beta \(0\.5\).*1e-30"),
    ],
)
def test_betas_that_give_no_schedule_are_an_error(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(**fields)


@pytest.mark.parametrize("start", [-0.1, 1e-5, 0.9999, 1.0])
@pytest.mark.parametrize("family", GRIDS)
def test_a_start_outside_the_levels_of_training_is_an_error(family: str, start: float) -> None:
    with pytest.raises(ValueError, match=rf"start \({start}\) must be 0 or"):
        sampling_grid(SRDIFF, 4, family=family, start=start)


def test_an_unknown_grid_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'cubic'.*uniform, log_snr, karras, linear, resshift"):
        sampling_grid(SRDIFF, 4, family="cubic")


@pytest.mark.parametrize("family", CONTINUOUS)
def test_a_grid_of_no_steps_is_an_error(family: str) -> None:
    with pytest.raises(ValueError, match=r"steps \(0\) must be at least 1"):
        sampling_grid(SRDIFF, 0, family=family)


def test_a_late_uniform_grid_of_more_steps_than_are_left_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"steps \(61\).*1 and 60"):
        sampling_grid(SRDIFF, 61, start=float(SRDIFF.noise_levels[59]))


def test_an_unknown_schedule_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'sigmoid'.*cosine, linear, resshift"):
        Schedule(name="sigmoid")  # type: ignore[arg-type]


@pytest.mark.parametrize("num_timesteps", [-1, 0, 1])
def test_a_schedule_of_fewer_than_two_steps_is_an_error(num_timesteps: int) -> None:
    with pytest.raises(ValueError, match=rf"num_timesteps \({num_timesteps}\)"):
        Schedule(num_timesteps=num_timesteps)


@pytest.mark.parametrize("num_steps", [-1, 0, 101])
def test_a_grid_that_the_schedule_cannot_give_is_an_error(num_steps: int) -> None:
    with pytest.raises(ValueError, match=rf"steps \({num_steps}\).*100"):
        sampling_grid(SRDIFF, num_steps)

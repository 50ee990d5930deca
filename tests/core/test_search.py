"""Laws of the search for an inference schedule, and of the knee of its curve."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from diffsr_core.sampler import SAMPLERS, default_grid
from diffsr_core.schedule import GRIDS, Schedule, sampling_grid
from diffsr_core.search import Better, Candidate, GridChoice, choices, front, knee, rank, with_starts
from tests.benchmarks.solvers import distance

POOL = choices(SAMPLERS, GRIDS, (4, 8, 15))
BETTER: list[Better] = ["higher", "lower"]


@pytest.mark.parametrize("better", BETTER)
@given(scores=st.lists(st.sampled_from([-2.5, 0.0, 1.0, math.inf]), min_size=len(POOL), max_size=len(POOL)))
@settings(max_examples=50, deadline=None)
def test_all_choices_come_back_best_first_and_ties_go_to_fewer_steps(scores: list[float], better: Better) -> None:
    order = rank(POOL, scores, better=better)
    assert sorted(order) == list(range(len(POOL)))
    for one, two in zip(order[:-1], order[1:], strict=True):
        assert scores[one] >= scores[two] if better == "higher" else scores[one] <= scores[two]
        if scores[one] == scores[two]:
            assert (POOL[one].num_steps, one) < (POOL[two].num_steps, two)


def test_every_pair_is_a_choice_but_the_multistep_solver_off_even_log_snr() -> None:
    pairs = {(choice.sampler, choice.grid) for choice in POOL}
    every = {(sampler, grid) for sampler in SAMPLERS for grid in GRIDS}
    assert every - pairs == {("dpmpp-2m", grid) for grid in ("uniform", "linear", "resshift")}
    assert all((sampler, default_grid(sampler)) in pairs for sampler in SAMPLERS)
    assert len(POOL) == len(pairs) * 3 == len(set(POOL))
    assert choices(["ddim", "ddim"], ["uniform"], [4, 4]) == [GridChoice("ddim", "uniform", 4)]


def test_every_choice_is_a_grid_that_the_schedule_can_give() -> None:
    for choice in POOL:
        grid = sampling_grid(Schedule(num_timesteps=100), choice.num_steps, family=choice.grid)
        assert len(grid) == choice.num_steps + 1


def test_every_choice_is_begun_at_every_level_once() -> None:
    found = with_starts(POOL[:2], (0.0, 0.5, 0.0))
    expected = [(choice, level) for choice in POOL[:2] for level in (0.0, 0.5)]
    assert [(GridChoice(c.sampler, c.grid, c.num_steps), c.start_level) for c in found] == expected
    for level in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="start_level.*from 0 to below 1"):
            Candidate("ddim", "uniform", 4, level)
    with pytest.raises(ValueError, match="num_steps"):
        Candidate("ddim", "uniform", 0, 0.5)


def test_the_search_finds_the_second_order_solver_against_an_ideal_denoiser() -> None:
    pool = choices(("ddim", "ddpm", "sr3", "dpmpp-2m"), ("uniform", "log_snr"), (8, 15))
    order = rank(pool, [distance(c.sampler, c.grid, c.num_steps, count=2000) for c in pool], better="lower")
    assert pool[order[0]] == GridChoice("dpmpp-2m", "log_snr", 15)
    assert pool[order[-1]].sampler == "ddpm" and pool[order[-1]].num_steps == 8


def test_a_score_that_is_no_number_is_an_error_that_names_the_choice() -> None:
    with pytest.raises(ValueError, match=r"score \(nan\).*'ddim', grid='uniform', num_steps=4"):
        rank(choices(["ddim"], ["uniform"], [4]), [math.nan], better="higher")


def test_a_search_of_nothing_or_of_what_does_not_belong_together_is_an_error() -> None:
    for scores in ([], [1.0]):
        with pytest.raises(ValueError, match=r"choices \(0\)"):
            rank([], scores, better="higher")
    with pytest.raises(ValueError, match=r"scores \(1\) must be one for each of the choices"):
        rank(POOL, [1.0], better="higher")
    with pytest.raises(ValueError, match=r"1 in all.*log_snr"):
        choices(["dpmpp-2m"], ["uniform"], [8])
    with pytest.raises(ValueError, match=r"better \('none'\)"):
        rank(POOL, [1.0] * len(POOL), better="none")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("heun", "uniform", 8), r"sampler \('heun'\).*ddim"),
        (("ddim", "cubic", 8), r"grid \('cubic'\).*log_snr"),
        (("ddim", "uniform", 0), r"num_steps \(0\).*at least 1"),
    ],
)
def test_an_unknown_choice_is_an_error(fields: tuple[str, str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GridChoice(*fields)


# The knee.


@pytest.mark.parametrize("power", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("better", BETTER)
def test_of_a_power_of_the_log_cost_the_knee_is_where_calculus_puts_it(power: float, better: Better) -> None:
    x = np.linspace(0, 1, 1001)  # above the line by x^p - x, which is most at p^(1 / (1 - p))
    values = 30 + 5 * x**power
    index = knee(np.exp(3 * x).tolist(), (values if better == "higher" else -values).tolist(), better=better)
    assert abs(x[index] - power ** (1 / (1 - power))) <= 1e-3


def test_the_knee_of_the_papers_figure_is_the_papers() -> None:
    x = np.linspace(0, 1, 10)  # Satopaa et al. 2011, figure 2: y = -1 / (x + 0.1) + 5 has its knee at 0.22
    assert round(float(x[knee(np.exp(x).tolist(), (-1 / (x + 0.1) + 5).tolist(), better="higher")]), 2) == 0.22


def test_cost_counts_by_its_logarithm() -> None:
    costs, values = [1.0, 10.0, 100.0, 1000.0], [0.0, 5.0, 9.0, 10.0]  # above the line: 0, 1/6, 7/30, 0
    assert knee(costs, values, better="higher") == 2
    assert knee([1.0, 1.5, 100.0, 1000.0], values, better="higher") == 1  # 0.5 - log 1.5 / log 1000 = 0.44


points = st.tuples(st.floats(0.01, 1000), st.floats(-50, 50))
POINTS = st.lists(points, min_size=1, max_size=12)


def by_geometry(costs: list[float], values: list[float]) -> list[float]:
    """The oracle: distances above the chord, by the cross product, of points that nothing dominates; else -inf."""
    x, y = np.log(costs), np.asarray(values)
    kept = [not any((x[j] <= x[i]) & (y[j] >= y[i]) & ((x[j] < x[i]) | (y[j] > y[i])) for j in range(len(x)))
            for i in range(len(x))]  # fmt: skip
    first, last = min(np.flatnonzero(kept), key=lambda i: x[i]), max(np.flatnonzero(kept), key=lambda i: x[i])
    if x[first] == x[last]:
        return [0.0 if k else -math.inf for k in kept]
    u, v = (x - x[first]) / (x[last] - x[first]), (y - y[first]) / (y[last] - y[first])
    cross = np.cross(np.array([[1.0, 1.0, 0.0]]), np.stack([u, v, np.zeros_like(u)], axis=1))[:, 2]
    return [float(d) / math.sqrt(2) if k else -math.inf for d, k in zip(cross, kept, strict=True)]


@given(found=POINTS)
@settings(max_examples=200, deadline=None)
def test_the_knee_is_on_the_front_and_nothing_lies_farther_above_the_line(found: list[tuple[float, float]]) -> None:
    costs, values = [cost for cost, _ in found], [value for _, value in found]
    spread = sorted({*costs}), sorted({*values})
    assume(all(b - a > 1e-3 for each in spread for a, b in zip(each[:-1], each[1:], strict=True)))
    above = by_geometry(costs, values)
    index = knee(costs, values, better="higher")
    assert index in front(costs, values, better="higher")
    assert above[index] >= max(above) - 1e-6


@given(found=POINTS, seed=st.integers(0, 99), factor=st.sampled_from([0.25, 4.0]), shift=st.sampled_from([-8.0, 8.0]))
@settings(max_examples=100, deadline=None)
def test_units_and_order_do_not_move_the_knee(
    found: list[tuple[float, float]], seed: int, factor: float, shift: float
) -> None:
    found = [(round(cost, 2), round(value, 1)) for cost, value in found]
    costs, values = [cost for cost, _ in found], [value for _, value in found]
    point = found[knee(costs, values, better="higher")]
    order = np.random.default_rng(seed).permutation(len(found))
    assert found[order[knee([costs[i] for i in order], [values[i] for i in order], better="higher")]] == point
    assert found[knee([factor * cost for cost in costs], values, better="higher")] == point
    assert found[knee(costs, [-factor * value + shift for value in values], better="lower")] == point


def test_values_that_fall_again_are_off_the_front_and_do_not_move_the_knee() -> None:
    costs, values = [1.0, 2.0, 4.0, 8.0], [20.0, 28.0, 29.5, 30.0]
    assert front(costs, values, better="higher") == [0, 1, 2, 3] and knee(costs, values, better="higher") == 1
    bad_costs, bad_values = [*costs, 1.5, 3.0, 16.0, 5000.0, 8.0], [*values, 19.0, 27.0, 29.9, 30.0, 30.0]
    assert front(bad_costs, bad_values, better="higher") == [0, 1, 2, 3]
    assert knee(bad_costs, bad_values, better="higher") == 1


def test_without_a_bend_the_knee_is_the_cheapest_of_the_front() -> None:
    assert knee([3.0], [7.0], better="lower") == 0
    assert knee([9.0, 3.0], [31.0, 30.0], better="higher") == 1
    assert knee([3.0, 9.0], [31.0, 30.0], better="higher") == 0  # the dearer is worse: a front of one
    line = [16.0, 8.0, 4.0, 2.0, 1.0], [0.1 * 4, 0.1 * 3, 0.1 * 2, 0.1, 0.0]  # straight, but for rounding: 1e-16
    assert knee(*line, better="higher") == 4
    assert knee([1.0, 2.0, 4.0], [30.0, 30.1, 32.0], better="higher") == 0  # all gain comes last: a bend the wrong way
    assert knee([2.0, 2.0, 2.0], [1.0, 3.0, 3.0], better="higher") == 1  # equal points: the first
    assert knee([1.0, math.nextafter(1.0, 2)], [1.0, math.nextafter(1.0, 2)], better="higher") == 0


@pytest.mark.parametrize(
    ("costs", "values", "message"),
    [
        ([], [], r"values \(0\)"),
        ([1.0], [1.0, 2.0], r"values \(2\) must be one for each of the costs \(1\)"),
        ([1.0, 0.0], [1.0, 2.0], r"point \(0.0, 2.0\) must have a cost above 0"),
        ([-1.0], [1.0], "cost above 0"),
        ([math.nan], [1.0], "cost above 0"),
        ([math.inf], [1.0], "cost above 0"),
        ([1.0], [math.nan], "finite value"),
        ([1.0], [-math.inf], "finite value"),
    ],
)
def test_points_that_have_no_place_are_an_error(costs: list[float], values: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        knee(costs, values, better="higher")

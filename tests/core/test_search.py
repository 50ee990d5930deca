"""Laws of the search for an inference schedule."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffsr_core.sampler import SAMPLERS, default_grid
from diffsr_core.schedule import GRIDS, Schedule, sampling_grid
from diffsr_core.search import GridChoice, choices, search
from tests.benchmarks.solvers import distance

POOL = choices(SAMPLERS, GRIDS, (4, 8, 15))


@pytest.mark.parametrize("maximise", [True, False])
@given(scores=st.lists(st.sampled_from([-2.5, 0.0, 1.0, math.inf]), min_size=len(POOL), max_size=len(POOL)))
@settings(max_examples=50, deadline=None)
def test_all_scores_come_back_best_first_and_ties_go_to_fewer_steps(scores: list[float], maximise: bool) -> None:
    given_scores = dict(zip(POOL, scores, strict=True))
    found = search(given_scores.__getitem__, POOL, maximise=maximise)
    assert {each.choice: each.score for each in found} == given_scores and len(found) == len(POOL)
    for one, two in zip(found[:-1], found[1:], strict=True):
        better, worse = (one.score, two.score) if maximise else (two.score, one.score)
        assert better >= worse
        if one.score == two.score:
            assert (one.choice.num_steps, POOL.index(one.choice)) < (two.choice.num_steps, POOL.index(two.choice))


def test_the_objective_is_asked_once_a_candidate() -> None:
    asked: list[GridChoice] = []
    search(lambda choice: asked.append(choice) or 0.0, POOL, maximise=True)  # type: ignore[func-returns-value]
    assert asked == POOL


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


def test_the_search_finds_the_second_order_solver_against_an_ideal_denoiser() -> None:
    found = search(
        lambda choice: distance(choice.sampler, choice.grid, choice.num_steps, count=2000),
        choices(("ddim", "ddpm", "sr3", "dpmpp-2m"), ("uniform", "log_snr"), (8, 15)),
        maximise=False,
    )
    assert found[0].choice == GridChoice("dpmpp-2m", "log_snr", 15)
    assert found[-1].choice.sampler == "ddpm" and found[-1].choice.num_steps == 8


def test_a_score_that_is_no_number_is_an_error_that_names_the_choice() -> None:
    with pytest.raises(ValueError, match=r"score \(nan\).*'ddim', grid='uniform', num_steps=4"):
        search(lambda _: math.nan, POOL, maximise=True)


def test_a_search_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="candidates"):
        search(lambda _: 0.0, [], maximise=True)
    with pytest.raises(ValueError, match=r"1 in all.*log_snr"):
        choices(["dpmpp-2m"], ["uniform"], [8])


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

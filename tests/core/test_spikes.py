"""Laws of a step that would throw the weights off: it is skipped and counted, or it stops the training."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffsr_core.training import DivergedError, Trainer, TrainerState
from tests.core.runs import batch, new_model, recipe_of, share_of, tensors_of, train
from tests.core.tiny import MODELS, SR3

Spoil = Callable[[Tensor], Tensor]
POISONS: dict[str, Spoil] = {
    "a nan": lambda hr: hr.index_put(tuple(torch.tensor([[1], [2], [3], [4]])), torch.tensor(math.nan)),
    "an inf": lambda hr: hr.index_put(tuple(torch.tensor([[1], [2], [3], [4]])), torch.tensor(math.inf)),
    "all nan": lambda hr: hr * math.nan,
}


def step_with(trainer: Trainer, spoil: Spoil) -> dict[str, float]:
    hr, lr = share_of(trainer, trainer.step)
    return trainer.train_step(spoil(hr), lr)


def sr3_trainer(**fields: Any) -> Trainer:
    return Trainer(new_model(SR3, seed=0), recipe_of("diffusion", num_steps=40, **fields))


@pytest.mark.parametrize("stage", ["regression", "diffusion"])
@pytest.mark.parametrize("poison", POISONS)
def test_a_step_that_is_not_finite_leaves_every_tensor_as_it_was_and_counts(stage: str, poison: str) -> None:
    trainer = Trainer(new_model(seed=0), recipe_of(stage, num_steps=9, micro_batch=1))
    train(trainer, to=2)
    before, counters = tensors_of(trainer), trainer.state().counters
    report = step_with(trainer, POISONS[poison])
    assert report["skipped"] == 1 and not math.isfinite(report["gradient_norm"])
    assert report["learning_rate"] == trainer.recipe.stages[0].rate_at(2)
    assert tensors_of(trainer) == before
    assert trainer.state().counters == {**counters, "step": 3, "skipped": 1, "skipped_in_a_row": 1}
    assert train(trainer, to=4)[0]["skipped"] == 0
    assert trainer.state().counters["skipped"] == 1 and trainer.state().counters["skipped_in_a_row"] == 0
    assert all(bool(value.isfinite().all()) for value in trainer.state().weights.values())


@pytest.mark.parametrize(("name", "stage"), [("seed3", "diffusion"), ("on-seed3", "joint"), ("on-seed3", "regression")])
@pytest.mark.parametrize("micro_batch", [None, 1])
def test_a_skipped_step_leaves_running_statistics_as_they_were(name: str, stage: str, micro_batch: int | None) -> None:
    config = MODELS[name]
    trainer = Trainer(new_model(config, seed=0), recipe_of(stage, num_steps=4, micro_batch=micro_batch))
    train(trainer, to=1)
    before = tensors_of(trainer)
    hr, lr = batch(1, config=config)
    assert trainer.train_step(hr * math.nan, lr * math.nan)["skipped"] == 1
    assert tensors_of(trainer) == before


def bright(trainer: Trainer) -> dict[str, float]:
    """A step whose gradient is scaled by 1000: the loss is linear in what the objective returns."""
    objective = trainer.objective
    trainer.objective = lambda *args: objective(*args) * 1000  # type: ignore[assignment]
    try:
        return trainer.train_step(*share_of(trainer, trainer.step))
    finally:
        trainer.objective = objective


def test_a_spike_is_known_by_the_mean_of_20_norms_and_not_before() -> None:
    trainer = sr3_trainer()
    train(trainer, to=19)
    assert bright(trainer)["skipped"] == 0  # the 20th step: no mean yet
    trainer = sr3_trainer()
    train(trainer, to=20)
    before, counters = tensors_of(trainer), trainer.state().counters
    report = bright(trainer)
    assert report["skipped"] == 1 and report["gradient_norm"] > 10 * counters["norm_mean"]
    assert tensors_of(trainer) == before
    assert trainer.state().counters == {**counters, "step": 21, "skipped": 1, "skipped_in_a_row": 1}
    assert all(one["skipped"] == 0 for one in train(trainer, to=23))


def test_while_the_rate_rises_no_norm_is_a_spike() -> None:
    trainer = sr3_trainer()
    (stage,) = trainer.recipe.stages
    trainer.recipe = replace(trainer.recipe, stages=(replace(stage, warmup_share=0.75),))  # 30 of 40 steps
    train(trainer, to=29)
    assert bright(trainer)["skipped"] == 0
    trainer = sr3_trainer()
    trainer.recipe = replace(trainer.recipe, stages=(replace(stage, warmup_share=0.75),))
    train(trainer, to=30)
    assert bright(trainer)["skipped"] == 1


@pytest.mark.parametrize(("factor", "skipped"), [(0.99, 1), (1.01, 0)])
def test_a_spike_is_above_its_factor_of_the_mean(factor: float, skipped: int) -> None:
    calm = sr3_trainer()
    norms = [report["gradient_norm"] for report in train(calm, to=20)]
    assert calm.state().counters["norm_mean"] == pytest.approx(sum(norms) / 20, rel=1e-12)
    state = calm.state()
    norm = bright(calm)["gradient_norm"]
    spike_factor = factor * norm / (sum(norms) / 20)
    trainer = sr3_trainer(spike_factor=spike_factor)
    trainer.load_state(state)
    assert bright(trainer) == {**bright(trainer_at(state)), "skipped": skipped}


def trainer_at(state: TrainerState) -> Trainer:
    trainer = sr3_trainer()
    trainer.load_state(state)
    return trainer


def test_a_stage_judges_by_its_own_norms() -> None:
    trainer = Trainer(new_model(seed=0), recipe_of("regression", "diffusion", num_steps=20))
    train(trainer, to=20)
    assert trainer.state().counters["norm_count"] == 0 and bright(trainer)["skipped"] == 0


@pytest.mark.parametrize("allowed", [0, 2])
def test_more_skipped_steps_in_a_row_than_allowed_stop_the_training_with_the_numbers(allowed: int) -> None:
    trainer = sr3_trainer(max_skipped_steps=allowed)
    train(trainer, to=2)
    before = tensors_of(trainer)
    for _ in range(allowed):
        assert step_with(trainer, POISONS["all nan"])["skipped"] == 1
    message = (
        rf"gradient norm \(nan, loss nan\) is not finite at step {2 + allowed}, {allowed + 1} steps in a row; lower"
    )
    with pytest.raises(DivergedError, match=message):
        step_with(trainer, POISONS["all nan"])
    assert tensors_of(trainer) == before and trainer.step == 2 + allowed


def test_skipped_steps_that_are_not_in_a_row_do_not_stop_it() -> None:
    trainer = sr3_trainer(max_skipped_steps=1)
    for _ in range(4):
        step_with(trainer, POISONS["a nan"])
        train(trainer, to=trainer.step + 1)
    assert trainer.step == 8 and trainer.state().counters["skipped"] == 4


def test_the_policy_stop_stops_at_the_first_with_its_numbers() -> None:
    trainer = sr3_trainer(on_spike="stop", spike_factor=3.0)
    train(trainer, to=20)
    before = tensors_of(trainer)
    message = (
        r"gradient norm \(\d+\.?\d*, loss \d+\.?\d*\) is above 3 times its mean \(0\.\d+\) at step 20, 1 steps in a row"
    )
    with pytest.raises(DivergedError, match=message):
        bright(trainer)
    assert tensors_of(trainer) == before and trainer.step == 20


@pytest.mark.parametrize("stop", [2, 8])
@pytest.mark.parametrize("poison", POISONS)
def test_what_follows_a_step_that_stopped_the_training_is_as_if_it_had_not_been(stop: int, poison: str) -> None:
    recipe = recipe_of("regression", "diffusion", num_steps=6, on_spike="stop")
    whole, trainer = Trainer(new_model(seed=0), recipe), Trainer(new_model(seed=0), recipe)
    reports = train(whole, to=12)
    train(trainer, to=stop)
    with pytest.raises(DivergedError):
        step_with(trainer, POISONS[poison])
    assert train(trainer, to=12) == reports[stop:]
    assert tensors_of(trainer) == tensors_of(whole)


@pytest.mark.parametrize("loss", [math.inf, -math.inf])
def test_a_finite_gradient_under_an_infinite_loss_is_not_taken(loss: float) -> None:
    trainer = sr3_trainer()
    train(trainer, to=1)
    before, objective = tensors_of(trainer), trainer.objective
    trainer.objective = lambda *args: objective(*args) + loss  # type: ignore[assignment]
    assert trainer.train_step(*share_of(trainer, 1))["skipped"] == 1
    assert tensors_of(trainer) == before


def test_fp16_halves_its_loss_scale_down_to_1_before_it_counts_a_skipped_step() -> None:
    trainer = sr3_trainer(precision="fp16", max_skipped_steps=1)
    for k in range(15):
        assert trainer.state().counters["loss_scale"] == 2.0 ** (15 - k)
        assert step_with(trainer, POISONS["all nan"])["skipped"] == 1
    assert trainer.state().counters["loss_scale"] == 1 and trainer.state().counters["skipped"] == 0
    assert step_with(trainer, POISONS["all nan"])["skipped"] == 1
    assert trainer.state().counters["skipped"] == 1
    with pytest.raises(DivergedError, match="at step 16, 2 steps in a row"):
        step_with(trainer, POISONS["all nan"])


def test_fp16_doubles_its_loss_scale_after_2000_good_steps_and_its_gradient_does_not_know() -> None:
    trainer = sr3_trainer(precision="fp16", gradient_clip=1e9)
    train(trainer, to=1)
    state = trainer.state()
    state = state._replace(counters={**state.counters, "good_steps": 1999})
    at_2_15, at_2_14 = (sr3_trainer(precision="fp16") for _ in range(2))
    at_2_15.load_state(state)
    at_2_14.load_state(state._replace(counters={**state.counters, "loss_scale": 2.0**14, "good_steps": 0}))
    first, second = train(at_2_15, to=2), train(at_2_14, to=2)
    assert first[0]["gradient_norm"] == pytest.approx(second[0]["gradient_norm"], rel=1e-3)
    assert at_2_15.state().counters["loss_scale"] == 2.0**16 and at_2_15.state().counters["good_steps"] == 0
    assert at_2_14.state().counters["loss_scale"] == 2.0**14 and at_2_14.state().counters["good_steps"] == 1

"""Laws of a training's state: a run that was interrupted is the run, whatever its recipe."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from diffsr_core.family import ModelConfig, SuperResolver
from diffsr_core.networks.sr3 import SR3Config
from diffsr_core.recipe import TrainingRecipe
from diffsr_core.training import Trainer, TrainerState
from tests.core.runs import RECIPE, batch, new_model, recipe_of, share_of, snapshot, stored, train
from tests.core.tiny import ANCHORED, ON_SEED3, SEED3, SR3, model_of

Whole = tuple[list[TrainerState], list[dict[str, float]], Trainer]


@pytest.fixture(scope="module")
def whole() -> Whole:
    """The run that nothing interrupts: its state before each step, what each step said, and its end."""
    trainer = Trainer(new_model(seed=0), RECIPE)
    states, reports = [], []
    while not trainer.done:
        states.append(stored(trainer))
        reports.append(trainer.train_step(*batch(trainer.step)))
    return states, reports, trainer


@pytest.mark.parametrize("interrupted", [0, 1, 4, 5, 6, 7, 11])
def test_a_run_interrupted_at_any_step_ends_bit_for_bit_like_one_that_was_not(whole: Whole, interrupted: int) -> None:
    states, reports, uninterrupted = whole
    assert len(states) == 12
    resumed = Trainer(new_model(seed=99), RECIPE)
    resumed.load_state(states[interrupted])
    assert resumed.step == interrupted
    assert train(resumed, to=12) == reports[interrupted:]
    assert resumed.done
    assert snapshot(resumed) == snapshot(uninterrupted)
    assert len(resumed.state().optimizer) == 3 * sum(1 for _ in resumed.model.denoiser.parameters())  # type: ignore[union-attr, misc]


def test_the_state_of_a_finished_run_is_that_of_a_finished_run(whole: Whole) -> None:
    _, _, uninterrupted = whole
    resumed = Trainer(new_model(seed=99), RECIPE)
    resumed.load_state(stored(uninterrupted))
    assert resumed.done and snapshot(resumed) == snapshot(uninterrupted)


def test_a_state_that_was_loaded_is_a_copy(whole: Whole) -> None:
    states, reports, _ = whole
    first, second = Trainer(new_model(seed=1), RECIPE), Trainer(new_model(seed=2), RECIPE)
    first.load_state(states[8])
    second.load_state(first.state())
    train(first, to=10)
    assert train(second, to=12) == reports[8:]


def with_dropout(config: ModelConfig, share: float) -> ModelConfig:
    assert isinstance(config.denoiser, SR3Config)
    return replace(config, denoiser=replace(config.denoiser, dropout=share))


WIDE = replace(SR3, denoiser=SR3Config(hidden=32, multipliers=(1, 2), num_blocks=1, attention_factors=(2,)))
TWO = recipe_of("regression", "diffusion", num_steps=4)
ONE = recipe_of("diffusion", num_steps=6)
RUNS: dict[str, tuple[ModelConfig, TrainingRecipe]] = {
    "dropout": (with_dropout(SR3, 0.2), replace(ONE, condition_blur_px=1.0)),
    "running statistics": (SEED3, replace(ONE, condition_noise=20.0)),
    "both, in two stages": (with_dropout(ON_SEED3, 0.2), recipe_of("regression", "joint", num_steps=3)),
    "half-lives": (ANCHORED, replace(TWO, batch_size=5, ema_half_lives_images=(4, 1, 2))),
    "micro-batches": (ANCHORED, replace(TWO, batch_size=5, micro_batch=2)),
    "micro-batches with dropout": (with_dropout(SR3, 0.2), replace(ONE, batch_size=5, micro_batch=2)),
    "adam with decay": (ANCHORED, replace(TWO, optimizer="adam", weight_decay=0.1)),
    "adamw with decay": (ANCHORED, replace(TWO, optimizer="adamw", weight_decay=0.1)),
    "bf16": (ANCHORED, replace(TWO, precision="bf16")),
    "fp16": (SR3, replace(ONE, precision="fp16")),
    "crop": (SR3, replace(ONE, crop_px=8)),
    "many channels": (WIDE, replace(ONE, batch_size=1)),
}


def halves_are_the_whole(new: Callable[[int], Trainer], *, at: int, end: int) -> None:
    """Fail unless a run taken up at step `at`, with another seed's weights before, is the run to `end`."""
    whole, first, second = new(0), new(0), new(99)
    reports = train(whole, to=end)
    train(first, to=at)
    second.load_state(stored(first))
    torch.manual_seed(12345)  # another process: nothing may hang on the global generator
    assert train(second, to=end) == reports[at:]
    assert snapshot(second) == snapshot(whole)


@pytest.mark.parametrize(("config", "recipe"), RUNS.values(), ids=RUNS)
def test_five_steps_a_checkpoint_and_another_are_six(config: ModelConfig, recipe: TrainingRecipe) -> None:
    halves_are_the_whole(lambda seed: Trainer(new_model(config, seed=seed), recipe), at=5, end=6)


def test_a_run_whose_activations_are_computed_again_resumes_and_is_the_run_that_kept_them() -> None:
    halves_are_the_whole(lambda seed: Trainer(new_model(seed=seed), TWO, checkpointed=True), at=3, end=6)
    frugal, usual = Trainer(new_model(seed=0), TWO, checkpointed=True), Trainer(new_model(seed=0), TWO)
    assert train(frugal, to=6) == train(usual, to=6)
    assert snapshot(frugal) == snapshot(usual)


def test_a_distillation_that_follows_another_stage_resumes() -> None:
    teacher = model_of(ANCHORED, seed=5)
    recipe = recipe_of("diffusion", "distillation", num_steps=3, batch_size=5, ema_half_lives_images=(20, 1))

    def new(_: int) -> Trainer:
        student = SuperResolver(ANCHORED)
        student.load_state_dict(teacher.state_dict())
        return Trainer(student, recipe, teacher=teacher)

    halves_are_the_whole(new, at=4, end=6)


def spoiled(trainer: Trainer, *, to: int, bad: set[int]) -> list[dict[str, float]]:
    """As train, where some batches hold a NaN."""
    reports = []
    for step in range(trainer.step, to):
        hr, lr = share_of(trainer, step)
        reports.append(trainer.train_step(hr * (math.nan if step in bad else 1.0), lr))
    return reports


@pytest.mark.parametrize("precision", ["float32", "fp16"])
@pytest.mark.parametrize("at", [2, 3, 5])
def test_what_was_skipped_before_an_interruption_is_known_after_it(precision: str, at: int) -> None:
    recipe = recipe_of("diffusion", num_steps=7, precision=precision, max_skipped_steps=2)
    bad = {1, 2, 4}
    whole, first, second = (Trainer(new_model(SR3, seed=seed), recipe) for seed in (0, 0, 99))
    reports = spoiled(whole, to=7, bad=bad)
    spoiled(first, to=at, bad=bad)
    second.load_state(stored(first))
    assert repr(spoiled(second, to=7, bad=bad)) == repr(reports[at:])  # a NaN is not equal to itself
    assert snapshot(second) == snapshot(whole)
    counters = second.state().counters
    assert counters["norm_count"] == 4
    good = [report["gradient_norm"] for report in reports if not report["skipped"]]
    assert counters["norm_mean"] == pytest.approx(sum(good) / 4, rel=1e-12)
    if precision == "float32":
        assert counters["skipped"] == 3
    else:  # which lowers its loss scale first
        assert counters["loss_scale"] == 2.0**12 and counters["skipped"] == 0


def test_the_optimizer_keeps_the_layout_of_the_weights() -> None:
    first, second = (Trainer(new_model(SR3, seed=seed), ONE) for seed in (0, 99))
    train(first, to=1)
    second.load_state(stored(first))
    moments = [(weight, entry["exp_avg"]) for weight, entry in second.optimizer.state.items()]
    assert len(moments) == len(second.parameters)
    assert all(moment.stride() == weight.stride() for weight, moment in moments)


def test_a_state_of_other_half_lives_is_refused() -> None:
    state = stored(Trainer(new_model(seed=0), RECIPE))
    with pytest.raises(KeyError):
        Trainer(new_model(seed=0), replace(RECIPE, ema_half_lives_images=(20, 30))).load_state(state)

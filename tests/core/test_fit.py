"""Laws of the loop: it is the plain one with the next batch drawn ahead, and it leaves nothing behind."""

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from torch import Tensor

from diffsr_core import training
from diffsr_core.training import DivergedError, Trainer, fit
from tests.core.runs import new_model, recipe_of, share_of, snapshot, train

RECIPE = recipe_of("regression", "diffusion", num_steps=3)


def batches(
    trainer: Trainer, *, count: int | None = None, taken: list[int] | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """The shares from where the trainer is, to its end or `count` of them; taken notes each that is asked for."""
    for step in range(trainer.step, trainer.recipe.num_steps if count is None else trainer.step + count):
        if taken is not None:
            taken.append(step)
        yield share_of(trainer, step)


def drawing_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("draw")]


def test_the_loop_is_the_plain_loop_bit_for_bit_over_a_change_of_stage() -> None:
    plain, looped = Trainer(new_model(seed=0), RECIPE), Trainer(new_model(seed=0), RECIPE)
    reports = list(fit(looped, batches(looped)))
    assert all(report.pop("waited_s") >= 0 for report in reports)
    assert reports == train(plain, to=6)
    assert looped.done and snapshot(looped) == snapshot(plain)
    assert drawing_threads() == []


def test_the_loop_continues_where_the_trainer_is_and_does_nothing_at_the_end() -> None:
    plain, looped = Trainer(new_model(seed=0), RECIPE), Trainer(new_model(seed=0), RECIPE)
    for trainer in (plain, looped):
        train(trainer, to=5)
    assert len(list(fit(looped, batches(looped)))) == 1
    train(plain, to=6)
    assert snapshot(looped) == snapshot(plain)
    assert list(fit(looped, iter(()))) == []


def test_exactly_one_batch_is_drawn_ahead_and_none_beyond_the_last() -> None:
    trainer = Trainer(new_model(seed=0), recipe_of("regression", num_steps=4))
    taken: list[int] = []
    for done, _ in enumerate(fit(trainer, batches(trainer, count=9, taken=taken)), start=1):
        time.sleep(0.05)  # it has the time to draw more, and does not
        assert taken == list(range(min(done + 1, 4)))


def test_what_it_waited_for_a_batch_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(new_model(seed=0), recipe_of("regression", num_steps=4))
    third_is_awaited, readings, now = threading.Event(), [], 0.0

    def clock() -> float:
        readings.append(now)
        if len(readings) == 5:  # two for each step
            third_is_awaited.set()
        return readings[-1]

    def slow() -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal now
        for number, pair in enumerate(batches(trainer)):
            if number == 2:
                assert third_is_awaited.wait(60)
                now = 7.0
            yield pair

    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=clock))
    assert [report["waited_s"] for report in fit(trainer, slow())] == [0, 0, 7, 0]


def test_what_the_batches_raise_comes_out_after_the_steps_that_were_whole() -> None:
    trainer = Trainer(new_model(seed=0), RECIPE)

    def broken() -> Iterator[tuple[Tensor, Tensor]]:
        yield from batches(trainer, count=2)
        raise OSError("the bucket is gone")

    seen = []
    with pytest.raises(OSError, match="the bucket is gone"):
        for report in fit(trainer, broken()):
            seen.append(report["loss"])
    assert len(seen) == trainer.step == 2
    assert drawing_threads() == []


def test_batches_that_end_too_early_are_an_error_that_says_so() -> None:
    trainer = Trainer(new_model(seed=0), RECIPE)
    with pytest.raises(ValueError, match="batches must last for 6 steps, and ended before step 3; give one for each"):
        list(fit(trainer, batches(trainer, count=3)))
    assert trainer.step == 3 and drawing_threads() == []


def test_a_batch_of_another_size_than_the_share_is_an_error() -> None:
    trainer = Trainer(new_model(seed=0), RECIPE)
    hr, lr = share_of(trainer, 0)
    for wrong in ((hr[:1], lr[:1]), (hr.repeat(2, 1, 1, 1), lr.repeat(2, 1, 1, 1))):
        with pytest.raises(ValueError, match="zip"):
            list(fit(trainer, iter([wrong])))


def test_a_training_that_diverges_leaves_no_thread() -> None:
    trainer = Trainer(new_model(seed=0), recipe_of("regression", num_steps=9, on_spike="stop"))
    with pytest.raises(DivergedError):
        list(fit(trainer, ((hr * float("nan"), lr) for hr, lr in batches(trainer))))
    assert drawing_threads() == []


def test_a_consumer_that_leaves_early_leaves_no_thread_and_a_trainer_that_goes_on() -> None:
    plain, trainer = Trainer(new_model(seed=0), RECIPE), Trainer(new_model(seed=0), RECIPE)
    loop = fit(trainer, batches(trainer))
    next(loop)
    next(loop)
    assert drawing_threads() != []
    loop.close()  # type: ignore[attr-defined]
    assert drawing_threads() == [] and trainer.step == 2
    train(trainer, to=6)
    train(plain, to=6)
    assert snapshot(trainer) == snapshot(plain)

"""Laws of the averages of the weights: their closed form, where they begin, and what they leave alone."""

import math

import pytest
import torch
from torch import Tensor, nn

from diffsr_core.averages import Averages
from diffsr_core.recipe import StageRecipe, TrainingRecipe
from diffsr_core.training import Trainer
from tests.core.runs import batch, bits, new_model, recipe_of, train
from tests.core.tiny import SEED3


class Walk(nn.Module):
    """A weight that moves, one that is frozen, and a running statistic."""

    statistic: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.moving = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.frozen = nn.Parameter(torch.zeros(3, dtype=torch.float64), requires_grad=False)
        self.register_buffer("statistic", torch.zeros((), dtype=torch.int64))


def decay(half_life: int, *, update: int, num_images: int) -> float:
    """Of the update's number, from 0: (1 + n) / (10 + n) while the average is young."""
    return min(math.pow(0.5, num_images / half_life), (1 + update) / (10 + update))


def test_each_average_is_its_own_weighted_sum_of_all_weights_so_far() -> None:
    # ema_n = prod d_k w_0 + sum_j (1 - d_j) prod_{k > j} d_k w_j, d_k = min(2^(-images / half-life), (1 + k)/(10 + k)).
    walk = Walk()
    averages = Averages(walk, (8, 2, 100))
    steps = torch.randn(60, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = [torch.zeros(3, dtype=torch.float64)]
    for update, step in enumerate(steps):
        with torch.no_grad():
            walk.moving.add_(step)
            walk.frozen.add_(step)
            walk.statistic.add_(1)
        weights.append(walk.moving.detach().clone())
        averages.update(num_images=4, num_updates=update + 1)
    for half_life in (8, 2, 100):
        decays = [decay(half_life, update=k, num_images=4) for k in range(60)]
        wanted = weights[0]
        for past, weight in zip(decays, weights[1:], strict=True):
            wanted = past * wanted + (1 - past) * weight
        found = averages.by_half_life[half_life]
        assert torch.allclose(found["moving"], wanted, rtol=1e-12, atol=1e-12)
        assert torch.equal(found["frozen"], weights[0])  # no stage's average moves what the stage does not train
        assert int(found["statistic"]) == 60
    assert averages.first is averages.by_half_life[8]
    assert len({tuple(average["moving"].tolist()) for average in averages.by_half_life.values()}) == 3


@pytest.mark.parametrize("half_life", [1, 7, 50])
def test_an_old_average_forgets_half_in_its_half_life_however_it_is_cut_into_steps(half_life: int) -> None:
    walk = Walk()
    nn.init.ones_(walk.moving)
    averages = Averages(walk, (half_life,))
    nn.init.zeros_(walk.moving)
    for _ in range(half_life):
        averages.update(num_images=1, num_updates=10**9)
    assert averages.first["moving"].tolist() == pytest.approx([0.5] * 3, rel=1e-9)


def test_the_average_of_constant_weights_comes_closer_by_the_closed_form() -> None:
    # With a rate of 0 the weights stay w, so ema_n - w = (ema_0 - w) prod decay_k.
    recipe = TrainingRecipe(
        stages=(StageRecipe(name="regression", num_steps=9, learning_rate=0.0),),
        batch_size=4,
        ema_half_lives_images=(2, 16),
    )
    trainer = Trainer(new_model(seed=0), recipe)
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    for average in trainer.averages.by_half_life.values():
        for value in average.values():
            value.add_(1)
    gaps = {2: 1.0, 16: 1.0}
    for k in range(9):
        trainer.train_step(*batch(0, size=4))
        for half_life, average in trainer.averages.by_half_life.items():
            gaps[half_life] *= decay(half_life, update=k, num_images=4)
            for name, value in weights.items():
                expected = gaps[half_life] if name.startswith("encoder.") else 1.0
                assert torch.allclose(average[name] - value, torch.tensor(expected), atol=1e-6), (k, name)
    assert bits(trainer.model.state_dict()) == bits(weights)


def test_every_average_begins_anew_with_a_stage_at_the_first_one_of_the_stage_before() -> None:
    recipe = recipe_of("regression", "diffusion", num_steps=3, batch_size=5, ema_half_lives_images=(20, 1))
    trainer = Trainer(new_model(seed=0), recipe)
    train(trainer, to=2)
    first, second = (bits(average) for average in trainer.averages.by_half_life.values())
    assert first != second != bits(trainer.model.state_dict()) != first
    train(trainer, to=3)
    start = bits(trainer.model.state_dict())
    assert [bits(average) for average in trainer.averages.by_half_life.values()] == [start, start]
    train(trainer, to=5)
    kept = {name for name in start if name.startswith("encoder.")}
    ends = [bits(average) for average in trainer.averages.by_half_life.values()]
    assert all({name for name in end if end[name] == start[name]} == kept for end in ends)


def test_the_average_of_running_statistics_is_the_statistics_themselves() -> None:
    trainer = Trainer(new_model(SEED3, seed=0), recipe_of("diffusion", num_steps=4, ema_half_lives_images=(20, 3)))
    start = bits(trainer.model.state_dict())
    train(trainer, to=3)
    buffers = {name for name, _ in trainer.model.named_buffers()}
    assert len(buffers) == 12
    weights = bits(trainer.model.state_dict())
    assert all(weights[name] != start[name] for name in weights)
    for average in trainer.averages.by_half_life.values():
        ema = bits(average)
        assert all((ema[name] == weights[name]) == (name in buffers) for name in weights)
        assert {int(average[name]) for name in buffers if name.endswith("num_batches_tracked")} == {3}


def test_loading_takes_over_each_average_and_wants_every_one() -> None:
    walk = Walk()
    saved = {half_life: {name: value + half_life for name, value in walk.state_dict().items()} for half_life in (5, 9)}
    averages = Averages(walk, (9, 5))
    averages.load(saved)
    for half_life in (5, 9):
        assert bits(averages.by_half_life[half_life]) == bits(saved[half_life])
    saved[5]["moving"] += 1
    assert averages.by_half_life[5]["moving"].tolist() == [5.0] * 3  # copies
    with pytest.raises(KeyError):
        Averages(walk, (9, 7)).load(saved)

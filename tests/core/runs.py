"""Tiny trainings, and their states through the bytes of a checkpoint: what the tests of the trainer share."""

import torch
from safetensors.torch import load, save
from torch import Tensor

from diffsr_core.family import ModelConfig, SuperResolver
from diffsr_core.recipe import StageRecipe, TrainingRecipe
from diffsr_core.training import Trainer, TrainerState
from tests.core.tiny import ANCHORED, pair

RECIPE = TrainingRecipe(
    stages=(
        StageRecipe(name="regression", num_steps=6, learning_rate=1e-3),
        StageRecipe(name="diffusion", num_steps=6, learning_rate=2e-3),
    ),
    batch_size=2,
    ema_half_lives_images=(20,),
)


def new_model(config: ModelConfig = ANCHORED, *, seed: int) -> SuperResolver:
    """A model as a training begins with it: its last layers are zero."""
    torch.manual_seed(seed)
    return SuperResolver(config)


def batch(step: int, *, size: int = 2, config: ModelConfig = ANCHORED) -> tuple[Tensor, Tensor]:
    """A global batch that is a function of the step."""
    return pair(config, lr_size=(4, 4), count=size, seed=step)


def share_of(trainer: Trainer, step: int) -> tuple[Tensor, Tensor]:
    """What this worker trains of the batch of a step."""
    hr, lr = batch(step, size=trainer.recipe.batch_size, config=trainer.model.config)
    return hr[trainer.share.start : trainer.share.stop], lr[trainer.share.start : trainer.share.stop]


def recipe_of(*names: str, num_steps: int, learning_rate: float = 1e-3, **fields: object) -> TrainingRecipe:
    """A recipe of stages alike; fields are the recipe's."""
    stages = tuple(
        StageRecipe(name=name, num_steps=num_steps, learning_rate=learning_rate)  # type: ignore[arg-type]
        for name in names
    )
    return TrainingRecipe(**{"stages": stages, "batch_size": 2, "ema_half_lives_images": (20,), **fields})  # type: ignore[arg-type]


def train(trainer: Trainer, *, to: int) -> list[dict[str, float]]:
    """What each step says, from where the trainer is to step `to`."""
    return [trainer.train_step(*share_of(trainer, step)) for step in range(trainer.step, to)]


def bits(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: value.contiguous().numpy().tobytes() for name, value in tensors.items()}


def stored(trainer: Trainer) -> TrainerState:
    """The whole state through bytes, as a checkpoint keeps it."""

    def through_bytes(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return load(save({name: value.clone(memory_format=torch.contiguous_format) for name, value in values.items()}))

    state = trainer.state()
    averages = {half_life: through_bytes(average) for half_life, average in state.averages.items()}
    return TrainerState(through_bytes(state.weights), averages, through_bytes(state.optimizer), dict(state.counters))


def tensors_of(trainer: Trainer) -> list[dict[str, bytes]]:
    """The bits of the weights, of every average, and of the optimizer."""
    state = stored(trainer)
    return [bits(state.weights), *map(bits, state.averages.values()), bits(state.optimizer)]


def snapshot(trainer: Trainer) -> tuple[list[dict[str, bytes]], dict[str, int | float]]:
    """All that a resume needs, so that equal snapshots are equal trainers."""
    return tensors_of(trainer), dict(trainer.state().counters)

"""Laws of the optimisation step: what a stage trains, what a gradient does not depend on, and what it learns."""

from dataclasses import replace
from functools import partialmethod

import pytest
import torch
from torch import Tensor

from diffsr_core.distillation import Distillation
from diffsr_core.family import ModelConfig
from diffsr_core.networks.sr3 import SR3Config
from diffsr_core.recipe import TrainingRecipe
from diffsr_core.training import Trainer
from tests.core.runs import RECIPE, batch, bits, new_model, recipe_of, share_of, snapshot, train
from tests.core.tiny import ANCHORED, MODELS, SR3, SRDIFF, model_of


def test_dropout_is_on_in_training_and_a_function_of_seed_step_and_rank_alone() -> None:
    def loss(dropout: float, *, global_seed: int = 0, rank: int = 0, seed: int = 0) -> float:
        # One image, whose draws no seed and no rank changes, is all that a worker has.
        assert isinstance(SR3.denoiser, SR3Config)
        config = replace(SR3, denoiser=replace(SR3.denoiser, dropout=dropout))
        trainer = Trainer(model_of(config), recipe_of("diffusion", num_steps=2, seed=seed), rank=rank, world=2)
        hr, lr = batch(0, size=1, config=config)
        drawn = Trainer(model_of(config), recipe_of("diffusion", num_steps=2), world=2).draw(0, hr, lr)
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        found = trainer.optimise(drawn)["loss"]
        assert torch.equal(state, torch.get_rng_state())
        return found

    assert loss(0.2) == loss(0.2, global_seed=5)
    assert loss(0.0) == loss(0.0, seed=1) == loss(0.0, rank=1)
    assert len({loss(0.0), loss(0.2), loss(0.2, seed=1), loss(0.2, rank=1)}) == 4


def test_another_seed_or_rank_is_another_run() -> None:
    def losses(seed: int, rank: int) -> list[float]:
        recipe = replace(RECIPE, batch_size=4, seed=seed)
        trainer = Trainer(new_model(seed=0), recipe, rank=rank, world=2)
        return [trainer.train_step(*batch(step))["loss"] for step in range(4)]

    first = losses(0, 0)
    assert first == losses(0, 0) != losses(1, 0) and first != losses(0, 1)


def test_a_stage_trains_its_own_part_and_hands_its_average_on() -> None:
    trainer = Trainer(new_model(seed=0), RECIPE)
    start = bits(trainer.model.state_dict())
    for step in range(6):
        assert trainer.stage == RECIPE.stages[0]
        trainer.train_step(*batch(step))
    assert trainer.stage == RECIPE.stages[1]
    after_first = bits(trainer.model.state_dict())
    assert after_first == bits(trainer.ema)  # the encoder that the diffusion builds on is the averaged one
    assert trainer.state().optimizer == {}  # and its optimizer begins anew
    train(trainer, to=12)
    end = bits(trainer.model.state_dict())
    for name in start:
        in_encoder = name.startswith("encoder.")
        assert (start[name] != after_first[name]) == in_encoder, name
        assert (after_first[name] != end[name]) == (not in_encoder), name
    assert all((bits(trainer.ema)[name] == end[name]) == name.startswith("encoder.") for name in end)


def test_equal_stages_are_two_stages() -> None:
    trainer = Trainer(new_model(seed=0), recipe_of("regression", "regression", num_steps=2))
    train(trainer, to=2)
    state = trainer.state()
    assert state.optimizer == {} and state.counters["step"] == 2  # a new optimizer
    assert state.counters["norm_mean"] == state.counters["norm_count"] == 0
    assert bits(trainer.model.state_dict()) == bits(trainer.ema)  # that starts at the average


def test_a_stage_of_no_steps_is_passed_over() -> None:
    stages = (RECIPE.stages[0], replace(RECIPE.stages[1], num_steps=0), RECIPE.stages[1])
    with_it, without = (Trainer(new_model(seed=0), replace(RECIPE, stages=s)) for s in (stages, RECIPE.stages))
    assert train(with_it, to=12) == train(without, to=12)
    assert with_it.done and snapshot(with_it) == snapshot(without)


def test_a_joint_stage_moves_every_weight_of_both_parts_and_of_their_average() -> None:
    # In a new network there are zeros, behind which nothing has a gradient.
    trainer = Trainer(model_of(SRDIFF), recipe_of("joint", num_steps=2))
    start = bits(trainer.ema)
    train(trainer, to=2)
    for found in (bits(trainer.model.state_dict()), bits(trainer.ema)):
        assert [name for name in start if found[name] == start[name]] == []


def test_a_distillation_moves_the_denoiser_alone_and_needs_a_teacher() -> None:
    teacher, student = model_of(ANCHORED), model_of(ANCHORED)
    recipe = recipe_of("distillation", num_steps=2)
    with pytest.raises(ValueError, match=r"stage \(distillation\) needs a teacher, and there is none; give a trained"):
        Trainer(student, recipe)
    trainer = Trainer(student, recipe, teacher=teacher)
    assert isinstance(trainer.objective, Distillation)
    start = bits(teacher.state_dict())
    train(trainer, to=2)
    end = bits(trainer.model.state_dict())
    assert {name for name in start if end[name] == start[name]} == {n for n in start if n.startswith("encoder.")}
    assert bits(teacher.state_dict()) == start


def test_each_step_has_the_rate_of_its_stage_and_there_is_none_behind_the_last() -> None:
    trainer = Trainer(new_model(seed=0), RECIPE)
    wanted = [stage.rate_at(step) for stage in RECIPE.stages for step in range(6)]
    assert [report["learning_rate"] for report in train(trainer, to=12)] == wanted
    with pytest.raises(IndexError):
        trainer.learning_rate()


def test_wrap_is_given_each_stages_objective() -> None:
    seen: list[str] = []

    def wrap(module: torch.nn.Module) -> torch.nn.Module:
        seen.append(module.stage.name)  # type: ignore[union-attr, arg-type]
        return module

    train(Trainer(new_model(seed=0), RECIPE, wrap=wrap), to=12)
    assert seen == ["regression", "diffusion"]


# --- the gradient ---


def gradient_of(recipe: TrainingRecipe, *, rank: int = 0, world: int = 1, config: ModelConfig = ANCHORED) -> Tensor:
    """The gradient that a worker's first step gives to the optimizer: its first moment, as nothing is remembered."""
    trainer = Trainer(model_of(config), replace(recipe, betas=(0.0, 0.9)), rank=rank, world=world)
    trainer.train_step(*share_of(trainer, 0))
    moments = trainer.state().optimizer
    return torch.cat([value.flatten() for name, value in sorted(moments.items()) if name.endswith(".exp_avg")])


FREE = recipe_of("joint", num_steps=1, batch_size=5, gradient_clip=1e9)


@pytest.mark.parametrize("stage", ["regression", "diffusion", "joint"])
@pytest.mark.parametrize("world", [2, 3, 5])
def test_the_mean_of_the_workers_gradients_is_the_gradient_of_one(world: int, stage: str) -> None:
    recipe = recipe_of(stage, num_steps=1, batch_size=5, gradient_clip=1e9)
    alone = gradient_of(recipe)
    together = torch.stack([gradient_of(recipe, rank=rank, world=world) for rank in range(world)]).mean(dim=0)
    assert float((together - alone).abs().max()) < 1e-6 and float(alone.abs().max()) > 1e-2


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 4, 5, 6])
def test_the_gradient_and_the_loss_do_not_depend_on_the_micro_batch(micro_batch: int) -> None:
    recipe = replace(FREE, micro_batch=micro_batch)
    whole, parts = gradient_of(FREE), gradient_of(recipe)
    assert float((whole - parts).abs().max()) < 1e-6 * float(whole.norm())
    first, second = (train(Trainer(model_of(ANCHORED), r), to=1)[0]["loss"] for r in (FREE, recipe))
    assert first == pytest.approx(second, rel=1e-6)


def test_the_gradient_is_clipped_to_its_norm_and_its_norm_reported_before() -> None:
    free, clipped = gradient_of(FREE), gradient_of(replace(FREE, gradient_clip=1e-3))
    assert float(clipped.norm()) == pytest.approx(1e-3, rel=1e-3)
    assert torch.allclose(clipped / 1e-3, free / free.norm(), atol=1e-5)
    (report,) = train(Trainer(model_of(ANCHORED), replace(FREE, gradient_clip=1e-3)), to=1)
    assert report["gradient_norm"] == pytest.approx(float(free.norm()), rel=1e-5) and float(free.norm()) > 1e-2


def test_weights_decay_as_their_optimizer_has_it() -> None:
    # adamw: w - lr (decay w + m / (sqrt(v) + eps)); adam: m and v are of g + decay w. In one step m / sqrt(v) = 1.
    def after(optimizer: str, decay: float) -> Tensor:
        recipe = replace(FREE, optimizer=optimizer, weight_decay=decay)  # type: ignore[arg-type]
        trainer = Trainer(model_of(ANCHORED), recipe)
        train(trainer, to=1)
        return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

    start = torch.cat([p.detach().flatten() for p in model_of(ANCHORED).parameters()])
    plain = after("adam", 0.0)
    assert torch.equal(plain, after("adamw", 0.0))
    rate = FREE.stages[0].rate_at(0)
    assert torch.allclose(after("adamw", 0.5), plain - rate * 0.5 * start, atol=1e-7)
    pulled = after("adam", 1e4) - start  # so much that the gradient is nothing beside it
    assert torch.allclose(pulled[start.abs() > 0.01], -rate * start[start.abs() > 0.01].sign(), rtol=1e-2)


@pytest.mark.parametrize(
    ("fields", "world", "message"),
    [
        ({"batch_size": 2}, 3, r"batch_size \(2\) must be at least 1 for each of 3 workers; use fewer of them"),
        ({"batch_size": 5, "micro_batch": 1}, 2, r"batch_size \(5\) must be a multiple of 2 sharded workers"),
    ],
)
def test_a_batch_that_cannot_be_shared_out_is_refused(fields: dict[str, int], world: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trainer(new_model(seed=0), replace(RECIPE, **fields), world=world, sharded=True)  # type: ignore[arg-type]


# --- what is learned ---

LEARNS = {
    "regression": ("rrdb-twin", "one-pass-twin"),
    "diffusion": ("sr3", "srdiff", "anchored", "seed3", "ddpm", "released", "deblur", "sr3-edges", "16-bands"),
    "joint": ("srdiff", "on-seed3"),
}


def learned(config: ModelConfig, recipe: TrainingRecipe, **fields: bool) -> float:
    """The loss of a fixed batch at fixed levels after a training on it, as a share of the loss before."""
    trainer = Trainer(new_model(config, seed=0), recipe, **fields)  # type: ignore[arg-type]
    hr, lr = batch(0, size=4, config=config)
    shape = trainer.model.diffused_shape(4, 4) if config.denoiser is not None else (0,)
    eps = torch.randn((4, *shape), generator=torch.Generator().manual_seed(0))

    def loss() -> float:
        with torch.no_grad():  # with the statistics of the batch; those of training lag behind so few steps
            return float(trainer.objective(hr, lr, torch.tensor([0.2, 0.5, 0.7, 0.9]), eps))

    before = loss()
    for _ in range(recipe.num_steps):
        assert trainer.train_step(hr, lr)["skipped"] == 0
    return loss() / before


def learning(stage: str, **fields: object) -> TrainingRecipe:
    return recipe_of(stage, num_steps=25, batch_size=4, learning_rate=1e-2, augmentation="none", **fields)


@pytest.mark.parametrize(("stage", "name"), [(stage, name) for stage, names in LEARNS.items() for name in names])
def test_every_kind_of_model_learns_a_fixed_batch(stage: str, name: str) -> None:
    assert learned(MODELS[name], learning(stage)) < 0.98  # exactly 1 with a rate of 0


@pytest.mark.parametrize("name", ["sr3", "rrdb-twin"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_about_as_much(name: str, precision: str) -> None:
    stage = "regression" if name == "rrdb-twin" else "diffusion"
    full, half = (learned(MODELS[name], learning(stage, precision=p)) for p in ("float32", precision))
    assert half < 0.98 and half == pytest.approx(full, abs=0.05)


def test_a_compiled_training_is_the_training_to_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    # Traced, and not compiled by a C++ compiler, which takes half a minute of a core, and then gives 1e-5 too.
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    recipe = recipe_of("regression", num_steps=3)
    config = MODELS["rrdb-twin"]
    compiled, usual = Trainer(model_of(config), recipe, compiled=True), Trainer(model_of(config), recipe)
    for first, second in zip(train(compiled, to=3), train(usual, to=3), strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
    assert compiled.objective._compiled_call_impl is not None
    assert list(compiled.state().weights) == list(usual.state().weights)  # no prefix of the compiler

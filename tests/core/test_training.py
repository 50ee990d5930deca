"""Laws of the optimisation step: a resumed run is the run, closed forms of its averages and rates, its refusals."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from diffsr_core.family import ModelConfig, SuperResolver
from diffsr_core.networks.sr3 import SR3Config
from diffsr_core.objective import StageRecipe
from diffsr_core.training import DivergedError, Trainer, TrainingRecipe, step_seed
from tests.core.tiny import ANCHORED, MODELS, ON_SEED3, SEED3, SR3, SRDIFF, pair

RECIPE = TrainingRecipe(
    stages=(
        StageRecipe(name="regression", num_steps=6, learning_rate=1e-3),
        StageRecipe(name="diffusion", num_steps=6, learning_rate=2e-3),
    ),
    batch_size=2,
    ema_half_life_images=20,
)
State = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], dict[str, int]]


def model_of(config: ModelConfig = ANCHORED, *, seed: int) -> SuperResolver:
    torch.manual_seed(seed)
    return SuperResolver(config)


def batch(step: int, *, size: int = 2, config: ModelConfig = ANCHORED) -> tuple[Tensor, Tensor]:
    """A batch that is a function of the step."""
    return pair(config, lr_size=(4, 4), count=size, seed=step)


def recipe_of(*names: str, num_steps: int, learning_rate: float = 1e-3, **fields: object) -> TrainingRecipe:
    stages = tuple(
        StageRecipe(name=name, num_steps=num_steps, learning_rate=learning_rate)  # type: ignore[arg-type]
        for name in names
    )
    return TrainingRecipe(stages=stages, batch_size=2, ema_half_life_images=20, **fields)  # type: ignore[arg-type]


def with_dropout(config: ModelConfig, share: float) -> ModelConfig:
    assert isinstance(config.denoiser, SR3Config)
    return replace(config, denoiser=replace(config.denoiser, dropout=share))


def bits(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: value.contiguous().numpy().tobytes() for name, value in tensors.items()}


def stored(trainer: Trainer) -> State:
    """The whole state through bytes, as a checkpoint keeps it."""
    tensors, counters = trainer.state()

    def through_bytes(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return load(save({name: value.detach().clone().contiguous() for name, value in values.items()}))

    return through_bytes(trainer.model.state_dict()), through_bytes(trainer.ema), through_bytes(tensors), counters


def snapshot(trainer: Trainer) -> tuple[dict[str, bytes], dict[str, bytes], dict[str, bytes], dict[str, int]]:
    weights, ema, tensors, counters = stored(trainer)
    return bits(weights), bits(ema), bits(tensors), counters


@pytest.fixture(scope="module")
def whole() -> tuple[list[State], list[dict[str, float]], Trainer]:
    """The run that nothing interrupts: its state before each step, what each step said, and its end."""
    trainer = Trainer(model_of(seed=0), RECIPE)
    states, reports = [], []
    while not trainer.done:
        states.append(stored(trainer))
        reports.append(trainer.train_step(*batch(trainer.step)))
    return states, reports, trainer


@pytest.mark.parametrize("interrupted", [1, 4, 5, 6, 7, 11])
def test_a_run_interrupted_at_any_step_ends_bit_for_bit_like_one_that_was_not(
    whole: tuple[list[State], list[dict[str, float]], Trainer], interrupted: int
) -> None:
    states, reports, uninterrupted = whole
    assert len(states) == 12
    resumed = Trainer(model_of(seed=99), RECIPE)
    resumed.load_state(*states[interrupted])
    assert resumed.step == interrupted
    for step in range(interrupted, 12):
        assert resumed.train_step(*batch(step)) == reports[step]
    assert resumed.done
    assert snapshot(resumed) == snapshot(uninterrupted)
    assert len(snapshot(resumed)[2]) == 3 * sum(1 for _ in resumed.model.denoiser.parameters())  # type: ignore[union-attr]


DROPPING = {
    "dropout": (with_dropout(SR3, 0.2), ("diffusion",)),
    "batch-norm": (SEED3, ("diffusion",)),
    "both, in three stages": (with_dropout(ON_SEED3, 0.2), ("regression", "joint", "diffusion")),
}


@pytest.mark.parametrize(("config", "stages"), DROPPING.values(), ids=DROPPING)
def test_six_steps_are_three_a_checkpoint_and_three_with_dropout_and_running_statistics(
    config: ModelConfig, stages: tuple[str, ...]
) -> None:
    recipe = recipe_of(*stages, num_steps=6 // len(stages), condition_blur_px=1.0)
    whole = Trainer(model_of(config, seed=0), recipe)
    reports = [whole.train_step(*batch(step, config=config)) for step in range(6)]
    first = Trainer(model_of(config, seed=0), recipe)
    for step in range(3):
        first.train_step(*batch(step, config=config))
    second = Trainer(model_of(config, seed=99), recipe)
    second.load_state(*stored(first))
    torch.manual_seed(12345)  # another process: nothing may hang on the global generator
    again = [second.train_step(*batch(step, config=config)) for step in range(3, 6)]
    assert again == reports[3:]
    assert snapshot(second) == snapshot(whole)


def test_dropout_is_on_in_training_and_a_function_of_seed_step_and_rank_alone() -> None:
    def loss(dropout: float, *, global_seed: int = 0, **fields: int) -> float:
        rank = fields.pop("rank", 0)
        recipe = recipe_of("diffusion", num_steps=2, **fields)
        trainer = Trainer(model_of(with_dropout(SR3, dropout), seed=0), recipe, rank=rank)
        torch.manual_seed(global_seed)
        for parameter in trainer.model.parameters():  # a new SR3 network predicts 0, whatever is dropped
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
        state = torch.get_rng_state()
        found = trainer.train_step(*batch(0, config=SR3))["loss"]
        assert torch.equal(state, torch.get_rng_state())
        return found

    assert loss(0.2) == loss(0.2, global_seed=5)
    assert len({loss(0.0), loss(0.2), loss(0.2, seed=1), loss(0.2, rank=1)}) == 4


def test_another_seed_or_rank_is_another_run(whole: tuple[list[State], list[dict[str, float]], Trainer]) -> None:
    _, reports, _ = whole
    for trainer in (Trainer(model_of(seed=0), replace(RECIPE, seed=1)), Trainer(model_of(seed=0), RECIPE, rank=1)):
        assert [trainer.train_step(*batch(step)) for step in range(4)] != reports[:4]


def test_a_stage_trains_its_own_part_and_hands_its_average_on() -> None:
    trainer = Trainer(model_of(seed=0), RECIPE)
    start = bits(trainer.model.state_dict())
    for step in range(6):
        assert trainer.stage == RECIPE.stages[0]
        trainer.train_step(*batch(step))
    assert trainer.stage == RECIPE.stages[1]
    after_first = bits(trainer.model.state_dict())
    assert after_first == bits(trainer.ema)  # the encoder that the diffusion builds on is the averaged one
    assert trainer.state()[0] == {}  # and its optimizer begins anew
    for step in range(6, 12):
        trainer.train_step(*batch(step))
    end = bits(trainer.model.state_dict())
    for name in start:
        in_encoder = name.startswith("encoder.")
        assert (start[name] != after_first[name]) == in_encoder, name
        assert (after_first[name] != end[name]) == (not in_encoder), name
    assert all((bits(trainer.ema)[name] == end[name]) == name.startswith("encoder.") for name in end)


def test_the_average_of_constant_weights_comes_closer_by_the_closed_form() -> None:
    # With a rate of 0 the weights stay w, so ema_n - w = (ema_0 - w) prod decay_k, decay_k = min(d, (1 + k)/(10 + k)).
    recipe = TrainingRecipe(
        stages=(StageRecipe(name="regression", num_steps=9, learning_rate=0.0),),
        batch_size=4,
        ema_half_life_images=2,
    )
    trainer = Trainer(model_of(seed=0), recipe)
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.ema = {name: value + 1 for name, value in weights.items()}
    gap = 1.0
    for k, decay in enumerate([1 / 10, 2 / 11, 1 / 4, 1 / 4, 1 / 4]):  # a batch of 4 is two half-lives: d = 1/4
        trainer.train_step(*batch(0))
        gap *= decay
        for name, value in weights.items():
            expected = gap if name.startswith("encoder.") else 1.0
            assert torch.allclose(trainer.ema[name] - value, torch.tensor(expected), atol=1e-6), (k, name)
    assert bits(trainer.model.state_dict()) == bits(weights)


def test_the_average_of_running_statistics_is_the_statistics_themselves() -> None:
    trainer = Trainer(model_of(SEED3, seed=0), recipe_of("diffusion", num_steps=4))
    start = bits(trainer.model.state_dict())
    for step in range(3):
        trainer.train_step(*batch(step, config=SEED3))
    buffers = {name for name, _ in trainer.model.named_buffers()}
    assert len(buffers) == 12
    weights, ema = bits(trainer.model.state_dict()), bits(trainer.ema)
    assert all((ema[name] == weights[name]) == (name in buffers) for name in weights)
    assert all(weights[name] != start[name] for name in weights)
    assert {int(trainer.ema[name]) for name in buffers if name.endswith("num_batches_tracked")} == {3}


def rates(stage: StageRecipe, *, after: int = 0) -> list[float]:
    """The learning rate of every step of a stage that follows `after` steps of another."""
    before = StageRecipe(name="diffusion", num_steps=after, learning_rate=99.0)
    trainer = Trainer(model_of(SR3, seed=0), TrainingRecipe(stages=(before, stage), batch_size=2))
    found = []
    for step in range(after, after + stage.num_steps):
        trainer.step = step
        found.append(trainer.learning_rate())
    return found


def stage_of(decay: str, **fields: object) -> StageRecipe:
    return StageRecipe(name="diffusion", num_steps=1000, learning_rate=2.0, decay=decay, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("after", [0, 70])
def test_cosine_warms_up_linearly_and_falls_along_a_half_cosine_to_5_percent(after: int) -> None:
    found = rates(stage_of("cosine", warmup_share=0.1), after=after)
    assert found[:101] == pytest.approx([2.0 * min(1, (k + 1) / 100) for k in range(101)], rel=1e-12)
    assert found[550] == pytest.approx(2.0 * (0.05 + 0.95 / 2), rel=1e-12)  # half of the way down
    assert found[325] == pytest.approx(2.0 * (0.05 + 0.95 * (1 + math.sqrt(0.5)) / 2), rel=1e-12)
    assert found[999] == pytest.approx(2.0 * 0.05, rel=1e-3)
    assert found[100:] == sorted(found[100:], reverse=True)


def test_constant_warms_up_and_stays() -> None:
    # SR3: 10 000 of 1 000 000 steps of warm-up, here 10 of 1000.
    found = rates(stage_of("constant", warmup_share=0.01))
    assert found == pytest.approx([2.0 * min(1, (k + 1) / 10) for k in range(1000)], rel=1e-12)


def test_without_a_warm_up_the_first_step_has_the_full_rate() -> None:
    # SRDiff's pre-training: one rate, from its first step to its last.
    assert rates(stage_of("constant", warmup_share=0.0)) == [2.0] * 1000


@pytest.mark.parametrize(("plateaus", "spans"), [(1, [1000]), (2, [500, 500]), (3, [334, 333, 333])])
def test_halving_is_a_staircase_of_equal_spans(plateaus: int, spans: list[int]) -> None:
    found = rates(stage_of("halving", plateaus=plateaus, warmup_share=0.0))
    assert found == [2.0 / 2**i for i, span in enumerate(spans) for _ in range(span)]


def test_there_is_no_rate_behind_the_last_step() -> None:
    trainer = Trainer(model_of(seed=0), RECIPE)
    trainer.step = 12
    with pytest.raises(IndexError):
        trainer.learning_rate()


def test_a_stage_of_one_step_has_its_full_rate() -> None:
    recipe = TrainingRecipe(stages=(StageRecipe(name="regression", num_steps=1, learning_rate=3.0),), batch_size=1)
    assert Trainer(model_of(seed=0), recipe).learning_rate() == 3.0


@pytest.mark.parametrize("stage_step", [2, 8])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_step_that_diverges_leaves_everything_as_it_was(
    whole: tuple[list[State], list[dict[str, float]], Trainer], stage_step: int, poison: float
) -> None:
    states, reports, uninterrupted = whole
    trainer = Trainer(model_of(seed=0), RECIPE)
    trainer.load_state(*states[stage_step])
    before = snapshot(trainer)
    hr, lr = batch(stage_step)
    poisoned = hr.clone()
    poisoned[1, 2, 3, 4] = poison
    with pytest.raises(DivergedError, match=rf"not finite at step {stage_step}; lower the learning rate"):
        trainer.train_step(poisoned, lr)
    assert snapshot(trainer) == before
    for step in range(stage_step, 12):  # and nothing of the poison is left in what comes after
        assert trainer.train_step(*batch(step)) == reports[step]
    assert snapshot(trainer) == snapshot(uninterrupted)


@pytest.mark.parametrize("name", ["seed3", "on-seed3"])
def test_a_step_that_diverges_leaves_running_statistics_as_they_were(name: str) -> None:
    config = MODELS[name]
    trainer = Trainer(model_of(config, seed=0), recipe_of("diffusion" if name == "seed3" else "joint", num_steps=4))
    trainer.train_step(*batch(0, config=config))
    before = snapshot(trainer)
    hr, lr = batch(1, config=config)
    with pytest.raises(DivergedError):
        trainer.train_step(hr * math.nan, lr * math.nan)
    assert snapshot(trainer) == before


LEARNS = {
    "regression": ("rrdb-twin", "one-pass-twin"),
    "diffusion": ("sr3", "srdiff", "anchored", "seed3", "ddpm", "released", "deblur", "sr3-edges", "16-bands"),
    "joint": ("srdiff", "on-seed3"),
}


@pytest.mark.parametrize(("stage", "name"), [(stage, name) for stage, names in LEARNS.items() for name in names])
def test_every_kind_of_model_learns_a_fixed_batch(stage: str, name: str) -> None:
    config = MODELS[name]
    recipe = recipe_of(stage, num_steps=25, learning_rate=1e-2, augmentation="none")
    trainer = Trainer(model_of(config, seed=0), recipe)
    hr, lr = batch(0, size=4, config=config)
    shape = trainer.model.diffused_shape(4, 4) if config.denoiser is not None else (0,)
    eps = torch.randn((4, *shape), generator=torch.Generator().manual_seed(0))

    def loss() -> float:
        with torch.no_grad():  # with the statistics of the batch; those of training lag behind so few steps
            return float(trainer.objective(hr, lr, torch.tensor([0.2, 0.5, 0.7, 0.9]), eps))

    before = loss()
    for _ in range(25):
        trainer.train_step(hr, lr)
    assert loss() < 0.98 * before  # exactly 1 with a rate of 0


def test_equal_stages_are_two_stages() -> None:
    trainer = Trainer(model_of(seed=0), recipe_of("regression", "regression", num_steps=2))
    for step in range(2):
        trainer.train_step(*batch(step))
    assert trainer.state() == ({}, {"step": 2})  # a new optimizer
    assert bits(trainer.model.state_dict()) == bits(trainer.ema)  # that starts at the average


def test_a_joint_stage_moves_every_weight_of_both_parts_and_of_their_average() -> None:
    trainer = Trainer(model_of(SRDIFF, seed=0), recipe_of("joint", num_steps=2))
    for parameter in trainer.model.parameters():  # a new network holds zeros, behind which nothing has a gradient
        torch.nn.init.normal_(parameter, std=0.1)
    trainer.ema = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    start = bits(trainer.ema)
    for step in range(2):
        trainer.train_step(*batch(step, config=SRDIFF))
    for found in (bits(trainer.model.state_dict()), bits(trainer.ema)):
        assert [name for name in start if found[name] == start[name]] == []


def test_the_gradient_is_clipped_to_its_norm() -> None:
    # Adam's first step divides by the gradient's own size, so clipping is read from the moments: m_1 = 0.1 g.
    recipe = replace(RECIPE, gradient_clip=1e-3)
    trainer = Trainer(model_of(seed=0), recipe)
    report = trainer.train_step(*batch(0))
    tensors, _ = trainer.state()
    moments = torch.cat([value.flatten() for name, value in tensors.items() if name.endswith(".exp_avg")])
    assert report["gradient_norm"] > 1e-2
    assert float(moments.norm()) == pytest.approx(0.1 * 1e-3, rel=1e-3)


def test_wrap_is_given_each_stages_objective() -> None:
    seen: list[str] = []

    def wrap(module: torch.nn.Module) -> torch.nn.Module:
        seen.append(module.stage.name)
        return module

    trainer = Trainer(model_of(seed=0), RECIPE, wrap=wrap)
    for step in range(12):
        trainer.train_step(*batch(step))
    assert seen == ["regression", "diffusion"]


def test_the_seed_of_a_step_is_one_of_its_own() -> None:
    seeds = {step_seed(s, step, rank) for s in range(10) for step in range(200) for rank in range(20)}
    assert len(seeds) == 10 * 200 * 20
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"augmentation": "rotate"}, r"augmentation \('rotate'\) must be none, flip or dihedral; use one of them"),
        ({"stages": ()}, r"stages \(0\) and batch_size \(16\) must be at least 1"),
        ({"batch_size": 0}, r"batch_size \(0\) must be at least 1; use 1 or more"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_when_it_is_written(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingRecipe(**{"stages": RECIPE.stages, "batch_size": 16, **fields})  # type: ignore[arg-type]

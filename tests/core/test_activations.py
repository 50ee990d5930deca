"""Checkpointed activations: the same numbers from less memory."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from diffsr_core import activations
from diffsr_core.family import ModelConfig, SuperResolver
from diffsr_core.objective import Objective
from diffsr_core.recipe import StageRecipe
from tests.core import tiny

_DIFFUSION = StageRecipe(name="diffusion", num_steps=1, learning_rate=1e-3)
_DROPOUT = replace(tiny.SR3, denoiser=replace(tiny._UNET, dropout=0.5))
_PLAIN_SEED3 = replace(tiny.SEED3, denoiser=replace(tiny._SEED3, blocks="plain", embedding_position="between"))
# The others of tiny.MODELS differ in channels alone, and in scale.
_NAMES = ("sr3", "srdiff", "anchored", "seed3", "on-seed3", "rrdb-twin", "one-pass-twin", "released", "plain")
MODELS = {**{name: tiny.MODELS[name] for name in _NAMES}, "dropout": _DROPOUT, "plain seed3": _PLAIN_SEED3}


def stage_of(config: ModelConfig) -> StageRecipe:
    """The stage that trains all that the model has."""
    if config.denoiser is None:
        return replace(_DIFFUSION, name="regression")
    return replace(_DIFFUSION, name="joint") if config.encoder.regresses else _DIFFUSION


def loss_of(model: SuperResolver, stage: StageRecipe) -> Tensor:
    hr, lr = tiny.pair(model.config, lr_size=(4, 4) if model.config.scale > 1 else (8, 8))
    torch.manual_seed(3)
    eps = torch.empty(0)
    if model.denoiser is not None:
        eps = torch.randn(2, *model.diffused_shape(*lr.shape[2:]))
    loss: Tensor = Objective(model, stage).train()(hr, lr, torch.tensor([0.4, 0.9]), eps)
    return loss


@contextmanager
def saved_bytes() -> Iterator[list[int]]:
    """What autograd keeps for the backward pass, in bytes, views of one storage counted once."""
    kept: dict[int, tuple[int, object]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), storage)
        return tensor

    total: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield total
    total.append(sum(size for size, _ in kept.values()))


@pytest.mark.parametrize("name", MODELS)
def test_loss_gradients_and_running_statistics_are_those_of_the_model_as_it_was_bit_for_bit(name: str) -> None:
    stage = stage_of(MODELS[name])
    plain, checkpointed = tiny.model_of(MODELS[name]), tiny.model_of(MODELS[name])
    activations.checkpoint_activations(checkpointed)
    for _ in range(2):  # the second sees the running statistics and the generator that the first left
        with saved_bytes() as much:
            loss = loss_of(plain, stage)
        loss.backward()  # type: ignore[no-untyped-call]
        drawn = torch.get_rng_state()
        with saved_bytes() as little:
            again = loss_of(checkpointed, stage)
        again.backward()  # type: ignore[no-untyped-call]
        assert torch.equal(again, loss)
        assert torch.equal(torch.get_rng_state(), drawn)
        assert little[0] < much[0]
    gradients = {k: p.grad for k, p in plain.named_parameters() if p.grad is not None}
    assert gradients, "nothing was trained"
    for key, parameter in checkpointed.named_parameters():
        assert (parameter.grad is None) == (key not in gradients)
        assert parameter.grad is None or torch.equal(parameter.grad, gradients[key]), key
    state = checkpointed.state_dict()
    assert list(state) == list(plain.state_dict())
    assert all(torch.equal(state[key], value) for key, value in plain.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_units_are_repeated_blocks_that_lie_side_by_side(name: str) -> None:
    model = tiny.model_of(MODELS[name])
    found = activations.units(model)
    inside = [module for unit in found for module in unit.modules()]
    assert len({id(module) for module in inside}) == len(inside), "one lies within another, or is there twice"
    kinds = {type(unit).__name__ for unit in found} - {"ConvBlock", "FiLMBlock"}
    assert kinds <= {"Sequential", "ResidualBlock", "Block", "Attention", "BigGANDown", "BigGANUp", "PlainBlock"}


def test_units_are_as_many_as_the_networks_have() -> None:
    counts = {name: len(activations.units(tiny.model_of(config))) for name, config in MODELS.items()}
    assert counts["rrdb-twin"] == 2  # blocks of the trunk
    assert counts["srdiff"] == 2 + 2 * 2 + 2 + 2  # trunk, downs, middle, ups
    assert counts["anchored"] == counts["srdiff"] + 1  # the merge
    assert counts["seed3"] == counts["plain seed3"] == 2 + 2
    assert counts["plain"] == 2 + 2  # the encoder's, the denoiser's
    # Two levels of one block: down 1 + resampling, 1 + attention; middle 3; up 2 with attention, resampling, 2.
    assert counts["sr3"] == (1 + 1 + 2) + 3 + (2 * 2 + 1 + 2)
    assert counts["released"] == counts["sr3"] - 2  # whose resampling is a single convolution


def test_without_gradients_nothing_is_kept_or_changed() -> None:
    plain, checkpointed = tiny.model_of(_DROPOUT).eval(), tiny.model_of(_DROPOUT).eval()
    activations.checkpoint_activations(checkpointed)
    _, lr = tiny.pair(_DROPOUT, lr_size=(8, 8))
    x_t, level = torch.ones(2, *plain.diffused_shape(8, 8)), torch.tensor([0.5, 0.6])
    with torch.no_grad(), saved_bytes() as kept:
        expected = plain.predict(x_t, level, plain.condition(lr).features)
        assert torch.equal(checkpointed.predict(x_t, level, checkpointed.condition(lr).features), expected)
    assert kept == [0]


def test_a_copy_recomputes_by_its_own_weights() -> None:
    model = tiny.model_of(tiny.SRDIFF)
    activations.checkpoint_activations(model)
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        nn.init.zeros_(parameter)
    loss_of(twin, _DIFFUSION).backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is None for parameter in model.parameters())
    plain = tiny.model_of(tiny.SRDIFF)
    plain.load_state_dict(twin.state_dict())
    assert torch.equal(loss_of(plain, _DIFFUSION), loss_of(twin, _DIFFUSION))


def test_a_second_call_changes_nothing() -> None:
    model = tiny.model_of(tiny.SR3)
    activations.checkpoint_activations(model)
    before = [vars(unit)["forward"] for unit in activations.units(model)]
    activations.checkpoint_activations(model)
    assert [vars(unit)["forward"] for unit in activations.units(model)] == before


def test_running_statistics_are_the_models_own_again_after_a_recomputation_that_is_cut_short() -> None:
    model = tiny.model_of(tiny.SEED3)
    own = [(name, buffer.data_ptr()) for name, buffer in model.named_buffers()]
    activations.checkpoint_activations(model)
    loss_of(model, _DIFFUSION).backward()  # type: ignore[no-untyped-call]
    assert own and [(name, buffer.data_ptr()) for name, buffer in model.named_buffers()] == own

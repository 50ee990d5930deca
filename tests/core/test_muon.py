"""Laws of Muon: what its matrices become, a step by hand, Adam for the rest, and its state in a training."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from diffsr_core.family import ModelConfig
from diffsr_core.muon import Muon, orthogonalised
from diffsr_core.training import Trainer
from tests.core.runs import new_model, recipe_of, stored, train
from tests.core.test_resume import halves_are_the_whole
from tests.core.test_training import learned, learning
from tests.core.tiny import ANCHORED, PLAIN, RRDB_TWIN, SR3, model_of

Array = npt.NDArray[np.float64]

SHAPES = [(8, 8), (6, 40), (40, 6), (3, 4), (1, 9), (9, 1)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def polynomial(values: Array) -> Array:
    """Five times a x + b x^3 + c x^5 with Jordan's coefficients, of what is divided by its norm."""
    x: Array = values / np.linalg.norm(values)
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    return x


def orthogonalised_by_hand(matrix: Array) -> Array:
    """The polynomial of the singular values between the singular vectors."""
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    found: Array = (u * polynomial(s)) @ v
    return found


# --- the matrix ---


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e6])
def test_singular_vectors_stay_and_singular_values_come_near_one(shape: tuple[int, int], size: float) -> None:
    u, _, v = torch.linalg.svd(normal(*shape), full_matrices=False)
    s = torch.linspace(2, 0.3, min(shape), dtype=torch.float64)
    found = orthogonalised(((u * s) @ v * size).float())
    assert found.shape == shape and found.dtype == torch.float32
    values = torch.linalg.svdvals(found)
    assert float(values.min()) > 0.65 and float(values.max()) < 1.25
    between = (u.T @ found.double() @ v.T).numpy()
    assert np.abs(between - np.diag(polynomial(s.numpy()))).max() < 3e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_a_transposed_matrix_gives_the_transpose_and_its_sign_counts_and_its_size_does_not(
    shape: tuple[int, int],
) -> None:
    matrix = normal(*shape).float()
    found = orthogonalised(matrix)
    assert torch.allclose(orthogonalised(matrix.T), found.T, atol=1e-5)
    assert torch.allclose(orthogonalised(-3 * matrix), -found, atol=1e-3)


def test_of_a_matrix_of_one_direction_one_direction_is_left_and_of_none_none() -> None:
    u, v = normal(5, seed=1), normal(12, seed=2)
    found = orthogonalised(torch.outer(u, v).float()).double()
    expected = torch.outer(u / u.norm(), v / v.norm()) * float(polynomial(np.ones(1))[0])
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.equal(orthogonalised(torch.zeros(4, 7)), torch.zeros(4, 7))


# --- the step ---


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (4, 40), (40, 4), (1, 3, 1, 1)])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_weight_follows_the_rule_by_hand(shape: tuple[int, ...], decay: float) -> None:
    start = normal(*shape)
    parameter = start.float().requires_grad_()
    optimizer = Muon([parameter], lr=0.0, weight_decay=decay)
    momentum, expected = np.zeros(shape), start.numpy()
    for step, rate in enumerate((0.1, 0.05, 0.2, 0.1)):  # as a recipe's decay sets it
        gradient = normal(*shape, seed=step + 1)
        parameter.grad = gradient.float()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        momentum = 0.95 * momentum + 0.05 * gradient.numpy()
        ahead = 0.05 * gradient.numpy() + 0.95 * momentum
        matrix = ahead.reshape(shape[0], -1)
        update = 0.2 * np.sqrt(max(matrix.shape)) * orthogonalised_by_hand(matrix)
        expected = expected * (1 - rate * decay) - rate * update.reshape(shape)
    assert np.abs(parameter.detach().numpy() - expected).max() < 2e-3 * np.abs(expected - start.numpy()).max()


@pytest.mark.parametrize("shape", [(64, 64), (16, 16, 3, 3), (200, 10)])
def test_updates_have_about_the_size_of_adams_whatever_the_shape_and_the_gradient(shape: tuple[int, ...]) -> None:
    for size in (1e-3, 1e3):
        parameter = torch.zeros(shape, requires_grad=True)
        parameter.grad = normal(*shape).float() * size
        Muon([parameter], lr=0.5).step()
        assert float(parameter.detach().square().mean().sqrt()) == pytest.approx(0.5 * 0.2, rel=0.25)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_what_is_no_matrix_follows_adamw(decay: float) -> None:
    starts = [normal(7), normal(1), normal()]
    mine, its = ([start.clone().requires_grad_() for start in starts] for _ in range(2))
    settings = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": decay}
    optimizers = Muon(mine, **settings), torch.optim.AdamW(its, **settings)  # type: ignore[arg-type]
    for step in range(30):
        for optimizer, parameters in zip(optimizers, (mine, its), strict=True):
            for number, parameter in enumerate(parameters):
                parameter.grad = normal(*parameter.shape, seed=100 * number + step) * 10.0 ** (step % 3)
            optimizer.step()
        for a, b in zip(mine, its, strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)
    assert all(float((a - start).detach().abs().max()) > 0.02 for a, start in zip(mine, starts, strict=True))


def test_the_weight_decays_beside_the_gradient_and_not_through_it() -> None:
    # Decoupled: the difference that decay makes to one step is rate * decay * weight, whatever the gradient.
    for shape in ((5, 6), (6,)):
        start, gradient, after = normal(*shape), normal(*shape, seed=1), []
        for decay in (0.0, 0.4):
            parameter = start.clone().requires_grad_()
            parameter.grad = gradient
            Muon([parameter], lr=0.1, weight_decay=decay).step()
            after.append(parameter.detach())
        assert torch.allclose(after[0] - after[1], 0.1 * 0.4 * start, atol=1e-12)


def test_a_gradient_of_zero_moves_nothing_and_no_gradient_leaves_no_state() -> None:
    parameters = [normal(4, 5).float(), normal(4, 2, 3, 3).float(), normal(6).float(), normal(3, 3).float()]
    starts = [parameter.clone() for parameter in parameters]
    for parameter in parameters[:3]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = Muon(parameters, lr=0.1)
    for _ in range(3):
        optimizer.step()
    assert all(torch.equal(parameter, start) for parameter, start in zip(parameters, starts, strict=True))
    assert set(optimizer.state) == set(parameters[:3])
    for parameter in parameters[:3]:  # and what follows is as if nothing had been
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(bool(parameter.isfinite().all()) for parameter in parameters)
    assert torch.equal(parameters[3], starts[3]) and not torch.equal(parameters[0], starts[0])


def test_the_layout_of_a_weight_changes_nothing() -> None:
    start, found = normal(6, 4, 3, 3).float(), []
    for layout in (torch.contiguous_format, torch.channels_last):
        parameter = start.clone(memory_format=layout).requires_grad_()
        optimizer = Muon([parameter], lr=0.1)
        for step in range(3):
            parameter.grad = normal(6, 4, 3, 3, seed=step).float().to(memory_format=layout)
            optimizer.step()
        assert optimizer.state[parameter]["momentum"].stride() == parameter.stride()
        found.append(parameter.detach())
    assert torch.allclose(found[0], found[1], atol=1e-6) and not torch.equal(found[0], start)


# --- in a training ---

TWO = recipe_of("regression", "diffusion", num_steps=4, optimizer="muon", weight_decay=0.1)


@pytest.mark.parametrize("config", [PLAIN, ANCHORED], ids=["plain", "anchored"])
@pytest.mark.parametrize("at", [3, 4, 6])
def test_a_run_with_muon_resumes_bit_for_bit(config: ModelConfig, at: int) -> None:
    halves_are_the_whole(lambda seed: Trainer(new_model(config, seed=seed), TWO), at=at, end=8)


def test_its_state_is_a_momentum_for_a_matrix_and_adams_for_the_rest_in_the_layout_of_the_weights() -> None:
    recipe = recipe_of("diffusion", num_steps=3, optimizer="muon")
    first, second = (Trainer(new_model(SR3, seed=seed), recipe) for seed in (0, 99))
    train(first, to=2)
    state = stored(first)
    kinds: dict[int, set[str]] = {}
    for name in state.optimizer:
        index, key = name.split(".")
        kinds.setdefault(int(index), set()).add(key)
    assert kinds == {
        index: {"momentum"} if parameter.ndim > 1 else {"step", "exp_avg", "exp_avg_sq"}
        for index, parameter in enumerate(first.parameters)
    }
    second.load_state(state)
    for parameter, entry in second.optimizer.state.items():
        assert all(value.stride() == parameter.stride() for key, value in entry.items() if key != "step")
        assert "step" not in entry or float(entry["step"]) == 2


@pytest.mark.parametrize(("config", "stage"), [(PLAIN, "diffusion"), (RRDB_TWIN, "regression")])
def test_it_learns_a_fixed_batch(config: ModelConfig, stage: str) -> None:
    assert learned(config, learning(stage, optimizer="muon")) < 0.98  # exactly 1 with a rate of 0


def test_beside_the_matrices_a_trainings_first_step_is_that_of_adamw_and_the_matrices_step_by_its_rate() -> None:
    rate = 1e-2
    recipe = recipe_of("diffusion", num_steps=1, optimizer="muon", learning_rate=rate, weight_decay=0.5)
    start = [parameter.detach().clone() for parameter in model_of(PLAIN).denoiser.parameters()]  # type: ignore[union-attr]
    mine, its = (Trainer(model_of(PLAIN), replace(recipe, optimizer=name)) for name in ("muon", "adamw"))
    for trainer in (mine, its):
        train(trainer, to=1)
    for ours, other, before in zip(mine.parameters, its.parameters, start, strict=True):
        if ours.ndim < 2:
            assert torch.allclose(ours, other, rtol=1e-6, atol=1e-8)
            continue
        update = (before * (1 - rate * 0.5) - ours.detach()).flatten(1).double()
        largest = float(torch.linalg.svdvals(update)[0]) / (rate * 0.2 * max(update.shape) ** 0.5)
        assert 0.65 < largest < 1.25 and not torch.allclose(ours, other, atol=1e-4)


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one, which is what sharding asks for."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    yield
    dist.destroy_process_group()


def test_sharded_workers_which_hold_parts_of_matrices_are_refused(alone: None) -> None:
    recipe = recipe_of("regression", num_steps=1)
    with pytest.raises(ValueError, match=r"optimizer \(muon\) needs whole matrices, and sharded.*; use adamw"):
        Trainer(model_of(RRDB_TWIN), replace(recipe, optimizer="muon"), sharded=True)
    train(Trainer(model_of(RRDB_TWIN), recipe, sharded=True), to=1)  # another optimizer is not

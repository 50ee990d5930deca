"""Laws of what a training step does to its batch: symmetries, the blur of the condition, and the noise levels."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from diffsr_core.family import ModelConfig, SuperResolver
from diffsr_core.objective import StageRecipe
from diffsr_core.training import Trainer, TrainingRecipe, augment, gaussian_blur
from tests.core.tiny import MODELS, SEED3, SR3, pair


def symmetries(image: Tensor) -> list[Tensor]:
    """The eight symmetries of the square by transposition and flips, without a rotation."""
    return [torch.flip(base, dims) for base in (image, image.mT) for dims in ([], [1], [2], [1, 2])]


def numbered(count: int) -> tuple[Tensor, Tensor]:
    """Each HR pixel holds the index of its LR pixel, and its own."""
    lr = torch.arange(3 * 4 * 4, dtype=torch.float32).view(1, 3, 4, 4).expand(count, 3, 4, 4)
    hr = lr.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    return hr + torch.arange(256).view(16, 16) / 1000, lr


@pytest.mark.parametrize(("name", "used"), [("none", {0}), ("flip", {0, 2}), ("dihedral", set(range(8)))])
def test_augmentation_turns_hr_and_lr_alike_and_uses_all_its_symmetries(name: str, used: set[int]) -> None:
    hr, lr = numbered(200)
    turned_hr, turned_lr = augment(hr, lr, generator=torch.Generator().manual_seed(0), symmetries=name)
    counts = [0] * 8
    for big, small in zip(turned_hr, turned_lr, strict=True):
        (which,) = [k for k, image in enumerate(symmetries(lr[0])) if torch.equal(image, small)]
        assert torch.equal(big, symmetries(hr[0])[which])
        counts[which] += 1
    assert {which for which, count in enumerate(counts) if count} == used
    assert min(counts[which] for which in used) >= 0.3 * 200 / len(used)
    again = augment(hr, lr, generator=torch.Generator().manual_seed(0), symmetries=name)
    assert torch.equal(again[0], turned_hr) and torch.equal(again[1], turned_lr)


def test_patches_that_are_not_square_can_be_flipped() -> None:
    hr, lr = (image[:, :, : image.shape[2] // 2] for image in numbered(20))
    turned_hr, turned_lr = augment(hr, lr, generator=torch.Generator().manual_seed(0), symmetries="flip")
    assert turned_hr.shape == hr.shape and turned_lr.shape == lr.shape


def test_the_draws_after_an_augmentation_do_not_depend_on_its_kind() -> None:
    drawn = set()
    for name in ("none", "flip", "dihedral"):
        generator = torch.Generator().manual_seed(0)
        augment(*numbered(5), generator=generator, symmetries=name)
        drawn.add(float(torch.rand(1, generator=generator)))
    assert len(drawn) == 1


# --- the blur of the condition ---


def image_of(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_a_blur_of_sigma_0_changes_nothing() -> None:
    image = image_of(3, 5, 7)
    assert torch.equal(gaussian_blur(image, 0.0), image)
    assert torch.equal(gaussian_blur(image, 1e-30), image)  # nor one that is next to nothing


@pytest.mark.parametrize("sigma", [0.2, 0.5, 1.0, 1.7, 3.0])
@pytest.mark.parametrize("shape", [(3, 16, 9), (1, 1, 1), (2, 3, 20)])
def test_a_blur_is_scipys(sigma: float, shape: tuple[int, int, int]) -> None:
    image = image_of(*shape)
    wanted = gaussian_filter(image.numpy(), sigma, mode="nearest", axes=(1, 2))
    assert np.abs(gaussian_blur(image, sigma).numpy() - wanted).max() < 1e-13


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.5])
def test_a_blur_keeps_constants_and_the_sum_of_what_lies_inside(sigma: float) -> None:
    constant = torch.full((2, 6, 9), 0.3, dtype=torch.float64)
    assert torch.allclose(gaussian_blur(constant, sigma), constant, atol=1e-14)
    inside = torch.zeros(1, 40, 40, dtype=torch.float64)
    inside[0, 12:28, 12:28] = image_of(16, 16)
    assert float(gaussian_blur(inside, sigma).sum()) == pytest.approx(float(inside.sum()), abs=1e-11)


def seen_by_the_objective(config: ModelConfig, steps: int, **fields: object) -> list[tuple[Tensor, ...]]:
    """The arguments (hr, lr, noise level, eps) of every call of the objective."""
    stage = StageRecipe(name="diffusion", num_steps=steps, learning_rate=0.0)
    recipe = TrainingRecipe(stages=(stage,), batch_size=8, augmentation="none", **fields)  # type: ignore[arg-type]
    trainer = Trainer(SuperResolver(config), recipe)
    calls: list[tuple[Tensor, ...]] = []
    objective = trainer.objective
    trainer.objective = lambda *args: calls.append(args) or objective(*args)  # type: ignore[assignment]
    for _ in range(steps):
        trainer.train_step(*pair(config, lr_size=(4, 4), count=8))
    return calls


def test_only_the_lr_is_blurred_and_each_sample_by_its_own_sigma_up_to_the_limit() -> None:
    hr, lr = pair(SR3, lr_size=(4, 4), count=8)
    sigmas = []
    for found_hr, found_lr, _, _ in seen_by_the_objective(SR3, 2, condition_blur_px=2.0):
        assert torch.equal(found_hr, hr)
        for before, after in zip(lr, found_lr, strict=True):
            candidates = torch.linspace(0, 2.0, 201).tolist()  # within 1/200 px of any
            errors = [float((gaussian_blur(before, sigma) - after).abs().max()) for sigma in candidates]
            assert min(errors) < 0.01
            sigmas.append(candidates[int(np.argmin(errors))])
    assert len(set(sigmas)) > 10 and min(sigmas) < 0.5 and max(sigmas) > 1.5  # 16 draws, uniform


def test_the_channels_that_come_beside_the_image_are_never_blurred() -> None:
    config = MODELS["srdiff-edges"]
    _, lr = pair(config, lr_size=(4, 4), count=8)
    ((_, found, _, _),) = seen_by_the_objective(config, 1, condition_blur_px=2.0)
    assert found.shape == lr.shape == (8, 5, 4, 4)
    assert torch.equal(found[:, 3:], lr[:, 3:])
    assert int(((found[:, :3] - lr[:, :3]).abs().amax(dim=(1, 2, 3)) > 1e-3).sum()) >= 6  # some draw next to no blur


def test_without_a_blur_the_lr_is_what_came() -> None:
    ((_, found, _, _),) = seen_by_the_objective(SR3, 1)
    assert torch.equal(found, pair(SR3, lr_size=(4, 4), count=8)[1])


# --- the noise ---


def test_a_network_that_is_told_the_step_is_trained_at_the_tables_levels_alone() -> None:
    table = torch.from_numpy(SEED3.schedule.noise_levels).float()
    levels = torch.cat([level for _, _, level, _ in seen_by_the_objective(SEED3, 6)])
    assert bool(torch.isin(levels, table).all()) and len(levels.unique()) > 40  # 48 draws among 1000


def test_a_network_that_is_told_the_level_is_trained_between_them_too() -> None:
    table = torch.from_numpy(SR3.schedule.noise_levels).float()
    levels = torch.cat([level for _, _, level, _ in seen_by_the_objective(SR3, 6)])
    assert not bool(torch.isin(levels, table).any()) and len(levels.unique()) == 48
    assert float(levels.min()) >= float(table[-1]) and float(levels.max()) <= 1


def test_every_sample_of_every_step_has_a_level_and_noise_of_its_own() -> None:
    noise = torch.stack([eps for _, _, _, eps in seen_by_the_objective(SR3, 4)]).flatten(0, 1)
    assert noise.shape == (32, 3, 16, 16)
    correlation = torch.corrcoef(noise.flatten(1)) - torch.eye(32)
    assert float(correlation.abs().max()) < 0.15  # 4.2 standard deviations of 1/sqrt(768)
    assert float(noise.mean()) == pytest.approx(0, abs=0.03) and float(noise.std()) == pytest.approx(1, abs=0.03)

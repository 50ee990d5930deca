"""Laws of what chance adds to a sample: symmetry, crop, blur and noise of the condition, noise level and noise."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from diffsr_core.augmentation import Drawn, augment, crop, draw, gaussian_blur, soil, step_seed
from diffsr_core.family import ModelConfig
from diffsr_core.recipe import StageRecipe, TrainingRecipe
from tests.core.tiny import ANCHORED, MODELS, SEED3, SR3, pair


def symmetries(image: Tensor) -> list[Tensor]:
    """The eight symmetries of the square by transposition and flips, without a rotation."""
    return [torch.flip(base, dims) for base in (image, image.mT) for dims in ([], [1], [2], [1, 2])]


def numbered() -> tuple[Tensor, Tensor]:
    """Each HR pixel holds the index of its LR pixel, and its own."""
    lr = torch.arange(3 * 4 * 4, dtype=torch.float32).view(3, 4, 4)
    hr = lr.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)
    return hr + torch.arange(256).view(16, 16) / 1000, lr


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("name", "used"), [("none", {0}), ("flip", {0, 2}), ("dihedral", set(range(8)))])
def test_augmentation_turns_hr_and_lr_alike_and_uses_all_its_symmetries(name: str, used: set[int]) -> None:
    hr, lr = numbered()
    counts = [0] * 8
    for seed in range(200):
        big, small = augment(hr, lr, generator=seeded(seed), symmetries=name)
        (which,) = [k for k, image in enumerate(symmetries(lr)) if torch.equal(image, small)]
        assert torch.equal(big, symmetries(hr)[which])
        counts[which] += 1
        again = augment(hr, lr, generator=seeded(seed), symmetries=name)
        assert torch.equal(again[0], big) and torch.equal(again[1], small)
    assert {which for which, count in enumerate(counts) if count} == used
    assert min(counts[which] for which in used) >= 0.3 * 200 / len(used)


def test_patches_that_are_not_square_can_be_flipped() -> None:
    hr, lr = (image[:, : image.shape[1] // 2] for image in numbered())
    shapes = [[image.shape for image in augment(hr, lr, generator=seeded(k), symmetries="flip")] for k in range(20)]
    assert all(found == [hr.shape, lr.shape] for found in shapes)


def test_the_draws_after_an_augmentation_do_not_depend_on_its_kind() -> None:
    drawn = set()
    for name in ("none", "flip", "dihedral"):
        generator = seeded(0)
        augment(*numbered(), generator=generator, symmetries=name)
        drawn.add(float(torch.rand(1, generator=generator)))
    assert len(drawn) == 1


# --- the crop ---


@pytest.mark.parametrize("side", [1, 2, 3, 4])
def test_a_crop_is_the_same_square_of_both_and_every_offset_occurs_alike(side: int) -> None:
    hr, lr = numbered()
    counts: dict[tuple[int, int], int] = {}
    for seed in range(400):
        high, low = crop(hr, lr, side=side, scale=4, generator=seeded(seed))
        assert low.shape == (3, side, side) and high.shape == (3, 4 * side, 4 * side)
        y, x = divmod(int(low[0, 0, 0]), 4)
        assert torch.equal(low, lr[:, y : y + side, x : x + side])
        assert torch.equal(high, hr[:, 4 * y : 4 * (y + side), 4 * x : 4 * (x + side)])
        counts[y, x] = counts.get((y, x), 0) + 1
    places = 5 - side
    assert counts.keys() == {(y, x) for y in range(places) for x in range(places)}
    assert min(counts.values()) >= 0.3 * 400 / places**2


def test_a_crop_of_a_patch_that_is_not_square_reaches_its_far_end() -> None:
    hr, lr = (image[:, : image.shape[1] // 2] for image in numbered())
    lows = [crop(hr, lr, side=2, scale=4, generator=seeded(seed))[1] for seed in range(60)]
    assert {int(low[0, 0, 0]) for low in lows} == {0, 1, 2}


@pytest.mark.parametrize("symmetry", ["none", "dihedral"])
def test_a_recipes_crop_is_in_hr_pixels_and_comes_before_the_symmetry(symmetry: str) -> None:
    hr, lr = (image[None].expand(8, -1, -1, -1) for image in numbered())
    found = drawn(ANCHORED, hr, lr, crop_px=8, augmentation=symmetry)
    assert found.hr.shape == (8, 3, 8, 8) and found.lr.shape == (8, 3, 2, 2) and found.eps.shape == (8, 48, 2, 2)
    means = torch.nn.functional.avg_pool2d(found.hr.floor(), 4)
    assert torch.equal(means, found.lr)  # each LR pixel is above its own HR pixels
    assert len({tuple(low.flatten().tolist()) for low in found.lr}) > 4


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


def drawn(
    config: ModelConfig, hr: Tensor, lr: Tensor, *, step: int = 0, stage: str = "diffusion", **fields: object
) -> Drawn:
    """What is drawn for a whole batch; fields are the recipe's, which turns nothing."""
    stages = (StageRecipe(name=stage, num_steps=100, learning_rate=0.0),)  # type: ignore[arg-type]
    recipe = TrainingRecipe(**{"stages": stages, "batch_size": len(hr), "augmentation": "none", **fields})  # type: ignore[arg-type]
    return draw(hr, lr, config=config, recipe=recipe, step=step, indices=range(len(hr)))


def draws(config: ModelConfig, steps: int, **fields: object) -> list[Drawn]:
    """What several steps draw for the same eight pairs."""
    hr, lr = pair(config, lr_size=(4, 4), count=8)
    return [drawn(config, hr, lr, step=step, **fields) for step in range(steps)]  # type: ignore[arg-type]


def test_only_the_lr_is_blurred_and_each_sample_by_its_own_sigma_up_to_the_limit() -> None:
    hr, lr = pair(SR3, lr_size=(4, 4), count=8)
    sigmas = []
    for found in draws(SR3, 2, condition_blur_px=2.0):
        assert torch.equal(found.hr, hr)
        for before, after in zip(lr, found.lr, strict=True):
            candidates = torch.linspace(0, 2.0, 201).tolist()  # within 1/200 px of any
            errors = [float((gaussian_blur(before, sigma) - after).abs().max()) for sigma in candidates]
            assert min(errors) < 0.01
            sigmas.append(candidates[int(np.argmin(errors))])
    assert len(set(sigmas)) > 10 and min(sigmas) < 0.5 and max(sigmas) > 1.5  # 16 draws, uniform


def test_only_the_lr_gets_noise_white_and_of_a_deviation_even_from_0_to_the_limit() -> None:
    hr, lr = torch.zeros(400, 3, 16, 16), torch.zeros(400, 3, 16, 16)
    found = drawn(MODELS["deblur"], hr, lr, condition_noise=51.0)
    assert torch.equal(found.hr, hr)
    noise = found.lr * 127.5  # levels of 255
    deviations = noise.flatten(1).std(dim=1)
    white = noise / deviations[:, None, None, None]
    assert float(white.mean()) == pytest.approx(0, abs=0.01) and float((white**4).mean()) == pytest.approx(3, abs=0.05)
    assert float((white[..., 1:] * white[..., :-1]).mean()) == pytest.approx(0, abs=0.01)
    assert float((white[:, 1:] * white[:, :-1]).mean()) == pytest.approx(0, abs=0.01)
    ranks = (deviations.sort().values / 51.0 - (torch.arange(400) + 0.5) / 400).abs()
    assert float(ranks.max()) < 1.63 / 20  # Kolmogorov and Smirnov: 1 % of even distributions are further off


def test_the_noise_is_not_blurred() -> None:
    image = torch.full((1, 64, 64), 0.25)
    found = soil(image, 8.0, 100.0, generator=seeded(3)) - image
    assert abs(float((found[..., 1:] * found[..., :-1]).mean())) < 0.05 * float(found.var())


def test_the_channels_that_come_beside_the_image_are_never_made_worse() -> None:
    config = MODELS["srdiff-edges"]
    _, lr = pair(config, lr_size=(4, 4), count=8)
    for fields in ({"condition_blur_px": 2.0}, {"condition_noise": 50.0}):
        (found,) = draws(config, 1, **fields)
        assert found.lr.shape == lr.shape == (8, 5, 4, 4)
        assert torch.equal(found.lr[:, 3:], lr[:, 3:])
        changed = (found.lr[:, :3] - lr[:, :3]).abs().amax(dim=(1, 2, 3)) > 1e-3
        assert int(changed.sum()) >= 6  # some draw next to nothing


def test_without_blur_noise_crop_and_symmetry_the_pair_is_what_came() -> None:
    (found,) = draws(SR3, 1)
    hr, lr = pair(SR3, lr_size=(4, 4), count=8)
    assert torch.equal(found.hr, hr) and torch.equal(found.lr, lr)


# --- the noise ---


def test_a_network_that_is_told_the_step_is_trained_at_the_tables_levels_alone() -> None:
    table = torch.from_numpy(SEED3.schedule.noise_levels).float()
    levels = torch.cat([found.noise_level for found in draws(SEED3, 6)])
    assert bool(torch.isin(levels, table).all()) and len(set(levels.tolist())) > 40  # 48 draws among 1000


def test_a_network_that_is_told_the_level_is_trained_between_them_too() -> None:
    table = torch.from_numpy(SR3.schedule.noise_levels).float()
    levels = torch.cat([found.noise_level for found in draws(SR3, 6)])
    assert not bool(torch.isin(levels, table).any()) and len(set(levels.tolist())) == 48
    assert float(levels.min()) >= float(table[-1]) and float(levels.max()) <= 1


def test_every_sample_of_every_step_has_a_level_and_noise_of_its_own() -> None:
    noise = torch.stack([found.eps for found in draws(SR3, 4)]).flatten(0, 1)
    assert noise.shape == (32, 3, 16, 16)
    correlation = torch.corrcoef(noise.flatten(1)) - torch.eye(32)
    assert float(correlation.abs().max()) < 0.15  # 4.2 standard deviations of 1/sqrt(768)
    assert float(noise.mean()) == pytest.approx(0, abs=0.03) and float(noise.std()) == pytest.approx(1, abs=0.03)


def test_a_stage_that_diffuses_nothing_draws_no_noise() -> None:
    (found,) = draws(ANCHORED, 1, stage="regression")
    assert found.eps.shape == (8, 0) and found.noise_level.shape == (8,)


# --- what a draw depends on ---

FIELDS: dict[str, object] = {"crop_px": 8, "augmentation": "dihedral", "condition_blur_px": 1.0, "condition_noise": 9.0}


@pytest.mark.parametrize("stage", ["regression", "diffusion"])
@pytest.mark.parametrize("world", [2, 3, 7])
def test_any_number_of_workers_draws_the_samples_of_one(world: int, stage: str) -> None:
    hr, lr = pair(ANCHORED, lr_size=(4, 4), count=7)
    stages = (StageRecipe(name=stage, num_steps=9, learning_rate=0.0),)  # type: ignore[arg-type]
    recipe = TrainingRecipe(stages=stages, batch_size=7, **FIELDS)  # type: ignore[arg-type]
    shares = [recipe.share(rank, world) for rank in range(world)]
    alone = draw(hr, lr, config=ANCHORED, recipe=recipe, step=5, indices=range(7))
    parts = [
        draw(hr[s.start : s.stop], lr[s.start : s.stop], config=ANCHORED, recipe=recipe, step=5, indices=s)
        for s in shares
    ]
    for whole, pieces in zip(alone, zip(*parts, strict=True), strict=True):
        assert torch.equal(torch.cat(pieces), whole)


def test_a_draw_is_a_function_of_seed_step_and_index_and_of_no_global_generator() -> None:
    hr, lr = (images[:1].expand(3, -1, -1, -1) for images in pair(ANCHORED, lr_size=(4, 4)))
    state = torch.get_rng_state()
    first = drawn(ANCHORED, hr, lr, **FIELDS)  # type: ignore[arg-type]
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(12345)
    again = drawn(ANCHORED, hr, lr, **FIELDS)  # type: ignore[arg-type]
    assert all(map(torch.equal, first, again))
    others = [drawn(ANCHORED, hr, lr, step=1, **FIELDS), drawn(ANCHORED, hr, lr, seed=1, **FIELDS)]  # type: ignore[arg-type]
    levels = torch.cat([first.noise_level, *(other.noise_level for other in others)])
    assert len(set(levels.tolist())) == 9  # one for each index, step and seed


def test_the_seed_of_a_sample_is_its_own_in_the_32_bits_that_torch_reads() -> None:
    # torch's CPU generator takes 32 bits: among n samples n (n - 1) / 2^33 pairs draw alike, as by chance.
    seeds = [step_seed(s, step, index) for s in range(10) for step in range(200) for index in range(20)]
    assert len(set(seeds)) == len(seeds) == 40_000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert len({seed % 2**32 for seed in seeds}) >= 40_000 - 2  # 0.19 expected


def test_a_number_of_pairs_that_is_not_the_shares_is_refused() -> None:
    hr, lr = pair(ANCHORED, lr_size=(4, 4), count=3)
    recipe = TrainingRecipe(stages=(StageRecipe(name="regression", num_steps=1, learning_rate=0.0),), batch_size=4)
    with pytest.raises(ValueError, match="zip"):
        draw(hr, lr, config=ANCHORED, recipe=recipe, step=0, indices=range(4))

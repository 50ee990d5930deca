"""Laws of the named models: their sizes, counted without memory, and that each of them fits its own recipe."""

from functools import cache
from typing import Any

import pytest
import torch

from diffsr_core import presets
from diffsr_core.family import SuperResolver
from diffsr_core.networks.interpolation import InterpolationConfig
from diffsr_core.networks.one_pass import OnePassConfig
from diffsr_core.networks.rrdb import RRDBConfig
from diffsr_core.networks.sr3 import SR3Config
from diffsr_core.networks.srdiff import SRDiffConfig
from diffsr_core.objective import Objective
from diffsr_core.schedule import Schedule

# Published sizes: SR3's table A.1, SRDiff's section 4.1 (12 M) and its shipped settings (25.3 M), the public SR3 code.
PUBLISHED = [
    ("sr3-16-128", 550e6, 0.05),
    ("sr3-64-256", 625e6, 0.05),
    ("sr3-64-512", 625e6, 0.05),
    ("sr3-256-1024", 150e6, 0.05),
    ("sr3-lite-16-128", 97_807_491, 0.0),
    ("srdiff-celeba-x8", 12.0e6, 0.005),
    ("srdiff-df2k-x4", 25.3e6, 0.005),
]
# First channels, multipliers, residual blocks, dropout: SR3's table A.1.
SR3_TABLE = {
    "sr3-16-128": (128, (1, 2, 4, 8, 8), 3, 0.2),
    "sr3-64-256": (128, (1, 2, 4, 4, 8, 8), 3, 0.0),
    "sr3-64-512": (64, (1, 2, 4, 8, 8, 16, 16), 3, 0.0),
    "sr3-256-1024": (16, (1, 2, 4, 8, 16, 32, 32, 32), 2, 0.0),
}
TWINS = [name for name in presets.names() if name.endswith(presets.TWIN)]


@cache
def model_of(name: str) -> SuperResolver:
    """The model without its numbers."""
    with torch.device("meta"):
        return SuperResolver(presets.get(name).model)


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_has_the_parameters_that_it_says(name: str) -> None:
    assert count(model_of(name)) == presets.get(name).params
    assert (model_of(name).denoiser is None) == (name in TWINS)


@pytest.mark.parametrize(("name", "published", "tolerance"), PUBLISHED)
def test_a_published_model_has_its_published_size(name: str, published: float, tolerance: float) -> None:
    assert presets.get(name).params == pytest.approx(published, rel=tolerance)


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_fits_each_stage_of_its_recipe_and_its_patches_fit_the_network(name: str) -> None:
    preset = presets.get(name)
    model = model_of(name)
    trained = set()
    for stage in preset.recipe.stages:
        Objective(model, stage)
        trained |= {parameter for parameter, p in model.named_parameters() if p.requires_grad}
        assert stage.num_steps > 0 and stage.learning_rate > 0
    assert trained == {parameter for parameter, _ in model.named_parameters()}
    assert preset.patch % (preset.model.scale * preset.model.lr_stride) == 0
    assert preset.note


@pytest.mark.parametrize(("name", "row"), SR3_TABLE.items(), ids=SR3_TABLE)
def test_sr3_is_that_of_its_table(name: str, row: tuple[object, ...]) -> None:
    preset = presets.get(name)
    denoiser = preset.model.denoiser
    assert isinstance(denoiser, SR3Config) and isinstance(preset.model.encoder, InterpolationConfig)
    assert (denoiser.hidden, denoiser.multipliers, denoiser.num_blocks, denoiser.dropout) == row
    small, large = (int(side) for side in name.removeprefix("sr3-").split("-"))
    assert preset.patch == large and preset.model.scale * small == large
    assert [large // factor for factor in denoiser.attention_factors] == [16]
    # Section 2.4 and appendix A: 10 000 of 1 000 000 steps of warm-up, then 1e-4 (the regression 1e-5, by its MSE).
    for recipe, rate, loss in (
        (preset.recipe, 1e-4, "l1"),
        (presets.get(name + presets.TWIN).recipe, 1e-5, "l2"),
    ):
        (stage,) = recipe.stages
        assert (recipe.batch_size, stage.num_steps, stage.warmup_share * stage.num_steps) == (256, 1_000_000, 10_000)
        assert (stage.learning_rate, stage.decay, stage.loss) == (rate, "constant", loss)


SR3_LINEAR = ("linear", 2000, 1e-6, 1e-2)  # the public code's; the paper gives no betas
SRDIFF_COSINE = ("cosine", 100, 6.3e-4, 0.999)
DDPM_LINEAR = ("linear", 1000, 1e-4, 2e-2)
AS_SR3 = ("zero", 1.0, "noise_level", "eps", "bicubic")
AS_SRDIFF = ("bicubic", 2.0, "step", "eps", None)
AS_SEED3 = ("zero", 1.0, "step", "x_0", "bilinear")
# (name, steps, first and last beta), (anchor, residual_scale, told, prediction, kernel), blur in px, batch,
# augmentation, then each stage: (name, steps, learning rate, decay, spans of one rate, steps of warm-up).
ONE_RATE_1M = ("diffusion", 1_000_000, 1e-4, "constant", 1)
PRETRAINED = ("regression", 100_000, 2e-4, "constant", 1, 0)
DIGITS = ("diffusion", 4700, 3e-4, "cosine", 1, 235)
FIDELITY = {
    "sr3-16-128": (SR3_LINEAR, AS_SR3, 0.0, 256, "flip", (*ONE_RATE_1M, 10_000)),
    "sr3-64-256": (SR3_LINEAR, AS_SR3, 1.0, 256, "flip", (*ONE_RATE_1M, 10_000)),  # a cascade's stage: blurred
    "sr3-64-512": (SR3_LINEAR, AS_SR3, 0.0, 256, "flip", (*ONE_RATE_1M, 10_000)),
    "sr3-256-1024": (SR3_LINEAR, AS_SR3, 1.0, 256, "flip", (*ONE_RATE_1M, 10_000)),
    # The public code: the amplitude itself, batches of 4, no warm-up.
    "sr3-lite-16-128": (
        SR3_LINEAR, ("zero", 1.0, "amplitude", "eps", "bicubic"), 0.0, 4, "flip", (*ONE_RATE_1M, 0)
    ),
    "srdiff-celeba-x8": (
        SRDIFF_COSINE, AS_SRDIFF, 0.0, 32, "none", PRETRAINED, ("diffusion", 300_000, 2e-4, "halving", 3, 0)
    ),
    "srdiff-df2k-x4": (
        SRDIFF_COSINE, AS_SRDIFF, 0.0, 64, "none", PRETRAINED, ("diffusion", 400_000, 2e-4, "halving", 2, 0)
    ),
    **{
        name: (DDPM_LINEAR, AS_SEED3, 0.0, 64, "none", DIGITS)
        for name in ("seed3-8-32", "seed3-8-32-between", "seed3-8-32-after", "seed3-8-32-plain", "seed3-32-128",
                     "seed3-32-128-plain")
    },
}  # fmt: skip


@pytest.mark.parametrize(("name", "row"), FIDELITY.items(), ids=FIDELITY)
def test_a_published_model_is_noised_told_and_trained_as_published(name: str, row: tuple[Any, ...]) -> None:
    (kind, num_timesteps, *betas), kind_of, blur_px, batch_size, augmentation, *stages = row
    model, recipe = presets.get(name).model, presets.get(name).recipe
    ends = (
        1 - model.schedule.alphas_cumprod[0],
        1 - model.schedule.alphas_cumprod[-1] / model.schedule.alphas_cumprod[-2],
    )
    assert (model.schedule.name, model.schedule.num_timesteps) == (kind, num_timesteps)
    assert ends == pytest.approx(betas, rel=0.01)
    kernel = getattr(model.encoder, "kernel", None)
    assert (model.anchor, model.residual_scale, model.told, model.prediction, kernel) == kind_of
    assert (model.residual_clip, model.anchor_gain, model.space_to_depth) == (True, 1.0, 1)
    assert (recipe.condition_blur_px, recipe.batch_size, recipe.augmentation) == (blur_px, batch_size, augmentation)
    assert [
        (each.name, each.num_steps, each.learning_rate, each.decay, each.plateaus, each.warmup_share * each.num_steps)
        for each in recipe.stages
    ] == stages
    assert {(each.loss, each.weighting) for each in recipe.stages} == {("l1", "none")}


def test_resshift_has_the_published_chain_and_training() -> None:
    # Yue et al. 2023 and its journal version: x_0 predicted, MSE, 5e-5 after 5000 steps of warm-up, EMA 0.999.
    preset = presets.get("resshift-x4")
    model, recipe = preset.model, preset.recipe
    (stage,) = recipe.stages
    assert model.schedule == Schedule(name="resshift", num_timesteps=15)
    assert (model.anchor, model.prediction, model.told) == ("bicubic", "x_0", "noise_level")
    assert isinstance(model.denoiser, SR3Config) and model.denoiser.condition_channels == 3  # up(x_LR) beside x_t
    assert (stage.num_steps, stage.learning_rate, stage.loss, stage.decay) == (400_000, 5e-5, "l2", "cosine")
    assert stage.warmup_share * stage.num_steps == 5000 and (recipe.optimizer, recipe.batch_size) == ("adamw", 64)
    assert 0.5 ** (recipe.batch_size / recipe.ema_half_lives_images[0]) == pytest.approx(0.999, abs=2e-5)
    assert 40e6 < preset.params < 120e6


@pytest.mark.parametrize("name", presets.names())
def test_a_note_says_the_cost_that_the_recipe_has_and_a_score_or_that_there_is_none(name: str) -> None:
    preset = presets.get(name)
    steps = " + ".join(f"{stage.num_steps:,}" for stage in preset.recipe.stages)
    assert f"{steps} steps of {preset.recipe.batch_size}" in preset.note
    assert " dB" in preset.note or "no score" in preset.note
    assert "\n" not in preset.note and not preset.note.endswith(".")  # one clause of a model card


def test_every_published_preset_has_its_row() -> None:
    assert set(FIDELITY) == {name for name in presets.PRESETS if name.startswith(("sr3-", "srdiff-", "seed3-"))}


@pytest.mark.parametrize(
    ("name", "blocks", "features", "multipliers"),
    [("srdiff-celeba-x8", 8, 32, (1, 2, 2, 4)), ("srdiff-df2k-x4", 17, 64, (1, 2, 3, 4))],
)
def test_srdiff_is_that_of_its_settings(name: str, blocks: int, features: int, multipliers: tuple[int, ...]) -> None:
    encoder, denoiser = presets.get(name).model.encoder, presets.get(name).model.denoiser
    assert isinstance(encoder, RRDBConfig) and isinstance(denoiser, SRDiffConfig)
    assert (encoder.num_blocks, encoder.num_features) == (blocks, features)
    assert (denoiser.hidden, denoiser.multipliers, denoiser.full_resolution_skip) == (64, multipliers, False)


@pytest.mark.parametrize("name", TWINS)
def test_a_twin_is_the_regression_of_its_model(name: str) -> None:
    full, twin = presets.get(name.removesuffix(presets.TWIN)), presets.get(name)
    assert twin.model.denoiser is None and twin.model.scale == full.model.scale and twin.patch == full.patch
    assert [stage.name for stage in twin.recipe.stages] == ["regression"]
    assert (twin.recipe.batch_size, twin.recipe.augmentation) == (full.recipe.batch_size, full.recipe.augmentation)
    if full.model.encoder.regresses:  # its encoder, trained as its first stage was
        assert twin.model.encoder == full.model.encoder
        assert twin.recipe.stages == full.recipe.stages[:1]
        assert count(model_of(name)) == count(model_of(name.removesuffix(presets.TWIN)).encoder)
    else:  # its denoiser's network, which reads the interpolated LR in place of x_t, and no condition
        encoder = twin.model.encoder
        assert isinstance(encoder, OnePassConfig) and encoder.network.condition_channels == 0
        assert encoder.kernel == full.model.encoder.kernel  # type: ignore[union-attr]
        weights, of_full = (
            {key: tuple(p.shape) for key, p in network.named_parameters()}
            for network in (model_of(name).encoder.network, model_of(name.removesuffix(presets.TWIN)).denoiser)  # type: ignore
        )
        (first,) = (key for key in weights if weights[key] != of_full[key])  # the rest is the same, name for name
        assert weights.keys() == of_full.keys()
        assert weights[first][1] * 2 == of_full[first][1]


def test_what_does_not_regress_has_no_twin() -> None:
    assert "ddpm-64" in presets.names() and "ddpm-64-regression" not in presets.names()
    assert presets.get("ddpm-64").model.encoder.condition_channels == 0
    with pytest.raises(ValueError, match="'ddpm-64-regression'"):
        presets.get("ddpm-64-regression")


def test_an_unknown_preset_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'sr4'.*nano-x4, nano-x4-regression"):
        presets.get("sr4")
    with pytest.raises(ValueError, match="unknown"):
        presets.get("nano-x4-regression-regression")


def test_every_name_is_there_once_and_gets_a_model_of_its_own() -> None:
    names = presets.names()
    assert len(set(names)) == len(names) == 2 * len(presets.PRESETS) - 1
    assert len({repr(presets.get(name).model) for name in names}) == len(names)

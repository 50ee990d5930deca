"""Laws of what is minimised: closed forms of the losses, one weight of the x_0 error, and who is trained by whom."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffsr_core.family import ModelConfig, SuperResolver
from diffsr_core.objective import Objective, min_snr_weight
from diffsr_core.recipe import StageRecipe
from diffsr_core.resize import upscale
from diffsr_core.schedule import Schedule, sample_noise_levels
from tests.core.tiny import (
    ANCHORED,
    DDPM,
    DIFFUSIONS,
    MODELS,
    ON_SEED3,
    ONE_PASS_TWIN,
    SEED3,
    SR3,
    SRDIFF,
    model_of,
    pair,
)

KINDS = ("eps", "x_0", "v")
LEVELS = torch.tensor([0.3, 0.9])
JOINT = {name: config for name, config in DIFFUSIONS.items() if config.encoder.regresses}


def stage(name: str, **fields: object) -> StageRecipe:
    return StageRecipe(name=name, num_steps=1, learning_rate=1.0, **fields)  # type: ignore[arg-type]


def noise(model: SuperResolver, *, lr_size: tuple[int, int] = (8, 4), seed: int = 1) -> Tensor:
    shape = model.diffused_shape(*lr_size)
    return torch.randn((2, *shape), generator=torch.Generator().manual_seed(seed))


def error(difference: Tensor, loss: str) -> Tensor:
    return difference.abs() if loss == "l1" else difference**2


# --- the numbers ---


@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_mean_error_of_the_prediction(kind: str, loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(ANCHORED, anchor="bicubic", prediction=kind, residual_scale=2.0)
    model = model_of(config)
    hr, lr = pair(config)
    eps = noise(model)
    x_0 = torch.nn.functional.pixel_unshuffle((hr - upscale(lr, 4)) * 2.0, 4)
    a = LEVELS[:, None, None, None]
    b = (1 - a**2).sqrt()
    wanted = {"eps": eps, "x_0": x_0, "v": a * eps - b * x_0}[kind]
    features = model.encoder(lr)[0]
    wrong = torch.zeros_like(x_0)

    def predict(found_x_t: Tensor, noise_level: Tensor, found_features: Tensor) -> Tensor:
        assert torch.allclose(found_x_t, a * x_0 + b * eps, atol=1e-6)
        assert torch.equal(noise_level, LEVELS) and torch.equal(found_features, features)
        return wanted + wrong

    monkeypatch.setattr(model, "predict", predict)
    objective = Objective(model, stage("diffusion", loss=loss))
    for offset in (0.0, 0.25, -2.0):
        wrong.zero_()
        wrong[:, :24] = offset  # half of the channels
        expected = {"l1": abs(offset), "l2": offset**2}[loss] / 2
        assert float(objective(hr, lr, LEVELS, eps)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("loss", ["l1", "l2"])
@torch.no_grad()
def test_the_regression_loss_is_the_mean_error_of_the_encoders_image(loss: str) -> None:
    for config in (SRDIFF, ONE_PASS_TWIN):
        model = model_of(config)
        hr, lr = pair(config)
        expected = error(model.encoder(lr)[1] - hr, loss).mean()
        found = Objective(model, stage("regression", loss=loss))(hr, lr, LEVELS, torch.empty(0))
        assert float(found) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
@torch.no_grad()
def test_the_joint_loss_is_the_diffusion_loss_and_the_weighted_regression_loss(weight: float) -> None:
    model = model_of(ANCHORED)
    hr, lr = pair(ANCHORED)
    eps = noise(model)
    regression, diffusion, joint = (
        float(Objective(model, stage(name, loss="l2", regression_weight=weight))(hr, lr, LEVELS, eps))
        for name in ("regression", "diffusion", "joint")
    )
    assert joint == pytest.approx(diffusion + weight * regression, rel=1e-6)
    assert diffusion > 0 and regression > 0


def test_the_min_snr_weight_of_every_kind_is_one_weight_of_the_error_in_x_0() -> None:
    # An error d in x_0 is one of a/b d in eps and of d/b in v, since x_t is given.
    a = torch.linspace(0.01, 0.9999, 200, dtype=torch.float64)
    b = (1 - a**2).sqrt()
    wanted = torch.minimum(a**2 / b**2, torch.tensor(5.0))
    assert torch.allclose(min_snr_weight(a, kind="x_0"), wanted, rtol=1e-9)
    assert torch.allclose(min_snr_weight(a, kind="eps") * (a / b) ** 2, wanted, rtol=1e-9)
    assert torch.allclose(min_snr_weight(a, kind="v") / b**2, wanted, rtol=1e-9)
    assert float(wanted.min()) < 1e-3 and float(wanted.max()) == 5  # both sides of the cap


@pytest.mark.parametrize(("kind", "noisy", "clean"), [("eps", 1.0, 0.0), ("x_0", 0.0, 5.0), ("v", 0.0, 0.0)])
def test_the_min_snr_weight_has_its_limits_at_both_ends(kind: str, noisy: float, clean: float) -> None:
    found = min_snr_weight(torch.tensor([1e-20, 1.0]), kind=kind)
    assert found.tolist() == pytest.approx([noisy, clean], abs=1e-30)


def test_training_draws_levels_that_float32_cannot_tell_from_clean() -> None:
    # Why the limit above matters: SR3's first interval ends so close to 1 that 3 in 100 000 levels are it.
    levels = sample_noise_levels(
        Schedule(name="linear", num_timesteps=2000), 500_000, generator=torch.Generator().manual_seed(0)
    )
    assert int((levels == 1).sum()) > 0
    assert all(bool(min_snr_weight(levels, kind=kind).isfinite().all()) for kind in KINDS)


def test_with_min_snr_all_three_kinds_have_the_same_loss_for_the_same_error(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {}
    a = LEVELS[:, None, None, None]
    b = (1 - a**2).sqrt()
    for kind in KINDS:
        model = model_of(replace(SR3, prediction=kind))
        hr, lr = pair(SR3)
        eps = noise(model)
        wrong_x_0 = hr + torch.tensor([0.1, 0.4])[:, None, None, None]
        wrong_eps = (a * hr + b * eps - a * wrong_x_0) / b
        said = {"eps": wrong_eps, "x_0": wrong_x_0, "v": a * wrong_eps - b * wrong_x_0}[kind]
        monkeypatch.setattr(model, "predict", lambda *_, said=said: said)
        losses[kind] = float(Objective(model, stage("diffusion", loss="l2", weighting="min_snr"))(hr, lr, LEVELS, eps))
    # By hand: SNR = 0.09/0.91 at 0.3; 0.81/0.19 = 4.26 at 0.9, below the cap too.
    expected = (0.09 / 0.91 * 0.01 + 0.81 / 0.19 * 0.16) / 2
    assert losses == pytest.approx(dict.fromkeys(KINDS, expected), rel=1e-4)


# --- who is trained ---


def reached(model: SuperResolver) -> set[str]:
    return {n for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}


def names(model: SuperResolver, *prefixes: str) -> set[str]:
    return {n for n, _ in model.named_parameters() if n.startswith(prefixes)}


def backward(model: SuperResolver, recipe: StageRecipe, *, seed: int = 0) -> Objective:
    config = model.config
    hr, lr = pair(config, lr_size=(8, 8), seed=seed)
    eps = noise(model, lr_size=(8, 8)) if config.denoiser is not None else torch.empty(0)
    objective = Objective(model, recipe).train()
    objective(hr, lr, LEVELS, eps).backward()
    return objective


@pytest.mark.parametrize("config", DIFFUSIONS.values(), ids=DIFFUSIONS)
def test_the_diffusion_stage_reaches_every_parameter_of_the_denoiser_and_no_other(config: ModelConfig) -> None:
    model = model_of(config)
    backward(model, stage("diffusion"))
    assert reached(model) == names(model, "denoiser.")
    # An optimizer and DistributedDataParallel go by this.
    assert {n for n, p in model.named_parameters() if p.requires_grad} == names(model, "denoiser.")


@pytest.mark.parametrize("name", [name for name, config in MODELS.items() if config.encoder.regresses])
def test_the_regression_stage_reaches_every_parameter_of_the_encoder_and_no_other(name: str) -> None:
    model = model_of(MODELS[name])
    backward(model, stage("regression"))
    assert reached(model) == names(model, "encoder.")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == names(model, "encoder.")


@pytest.mark.parametrize("config", JOINT.values(), ids=JOINT)
def test_the_joint_stage_reaches_every_parameter_of_both(config: ModelConfig) -> None:
    model = model_of(config)
    backward(model, stage("joint"))
    assert reached(model) == names(model, "encoder.", "denoiser.")


def test_the_diffusion_loss_of_a_joint_stage_reaches_the_encoder_through_its_features_alone() -> None:
    for anchor in ("regression", "bicubic", "zero"):
        model = model_of(replace(ANCHORED, anchor=anchor))
        backward(model, stage("joint", regression_weight=0.0))
        found = reached(model)
        assert names(model, "denoiser.") | names(model, "encoder.conv_first", "encoder.trunk") == found
    # The features of a one-pass encoder are the interpolated LR, and its image, the anchor, is detached.
    model = model_of(ON_SEED3)
    backward(model, stage("joint", regression_weight=0.0))
    assert reached(model) == names(model, "denoiser.")


def test_a_stage_frees_what_the_stage_before_it_froze() -> None:
    model = model_of(ANCHORED)
    for name, free in (
        ("diffusion", ["denoiser."]),
        ("regression", ["encoder."]),
        ("joint", ["denoiser.", "encoder."]),
    ):
        Objective(model, stage(name))
        assert {n for n, p in model.named_parameters() if p.requires_grad} == names(model, *free)


def running(model: SuperResolver, part: str) -> dict[str, bytes]:
    return {n: b.numpy().tobytes() for n, b in model.named_buffers() if n.startswith(part)}


def test_a_frozen_encoder_keeps_its_running_statistics_and_what_it_says() -> None:
    model = model_of(ON_SEED3)
    backward(model, stage("regression"))  # so that the statistics are not the initial ones
    before = running(model, "encoder.")
    _, lr = pair(ON_SEED3, lr_size=(8, 8))
    with torch.no_grad():
        said = model.eval().condition(lr).anchor
        seen: list[Tensor] = []
        target = model.target
        model.target = lambda hr, condition: seen.append(condition.anchor) or target(hr, condition)  # type: ignore
    backward(model, stage("diffusion"))
    assert before == running(model, "encoder.")
    assert torch.equal(seen[0], said)  # by the running statistics, not by the batch's
    backward(model, stage("joint"))
    after = running(model, "encoder.")
    assert before.keys() == after.keys() and all(before[name] != after[name] for name in before)


def test_the_running_statistics_of_a_denoiser_move_while_it_is_trained_and_not_while_it_is_evaluated() -> None:
    model = model_of(SEED3)
    before = running(model, "denoiser.")
    assert len(before) == 3 * 4  # mean, variance, count of two norms in two blocks
    objective = backward(model, stage("diffusion"))
    after = running(model, "denoiser.")
    assert all(before[name] != after[name] for name in before)
    hr, lr = pair(SEED3, lr_size=(8, 8))
    objective.eval()(hr, lr, LEVELS, noise(model, lr_size=(8, 8)))
    assert running(model, "denoiser.") == after


def test_an_evaluated_objective_moves_nothing_in_any_stage() -> None:
    model = model_of(ON_SEED3)
    hr, lr = pair(ON_SEED3, lr_size=(8, 8))
    before = running(model, "")
    for name in ("regression", "diffusion", "joint"):
        with torch.no_grad():
            Objective(model, stage(name)).eval()(hr, lr, LEVELS, noise(model, lr_size=(8, 8)))
    assert running(model, "") == before


@pytest.mark.parametrize(
    ("config", "name", "message"),
    [
        (ONE_PASS_TWIN, "diffusion", r"stage \(diffusion\) needs a denoiser.*use stage regression"),
        (ONE_PASS_TWIN, "joint", r"stage \(joint\) needs a denoiser.*use stage regression"),
        (SR3, "regression", r"stage \(regression\) needs an encoder that regresses; use stage diffusion"),
        (SR3, "joint", r"stage \(joint\) needs an encoder that regresses; use stage diffusion"),
        (DDPM, "regression", r"needs an encoder that regresses"),
    ],
)
def test_a_stage_that_does_not_fit_the_model_is_refused(config: ModelConfig, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(model_of(config), stage(name))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "both"}, r"stage name \('both'\) must be one of regression, diffusion, joint, "),
        ({"loss": "huber"}, r"stage loss \('huber'\) must be one of l1, l2; use"),
        ({"weighting": "snr", "loss": "l2"}, r"stage weighting \('snr'\) must be one of none, min_snr; use"),
        ({"decay": "step"}, r"stage decay \('step'\) must be one of cosine, constant, halving; use"),
        ({"weighting": "min_snr"}, r"weighting \(min_snr\) is that of the squared error, not of l1; use loss l2"),
        ({"num_steps": -1}, r"num_steps \(-1\) must be at least 0 and finite"),
        ({"learning_rate": -1e-4}, r"learning_rate \(-0.0001\) must be at least 0 and finite"),
    ],
)
def test_a_stage_that_cannot_be_is_refused_when_it_is_written(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StageRecipe(**{"name": "diffusion", "num_steps": 1, "learning_rate": 1e-3, **fields})  # type: ignore[arg-type]

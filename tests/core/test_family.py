"""Laws of the model family: what is diffused, how it becomes an image again, and what each loss teaches."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffsr_core.family import ModelConfig, SuperResolver
from diffsr_core.networks.rrdb import RRDBConfig
from diffsr_core.networks.srdiff import SRDiffConfig
from diffsr_core.resize import upscale
from diffsr_core.schedule import Schedule
from diffsr_core.training import Objective

ENCODER = RRDBConfig(scale=4, num_features=4, num_blocks=2, head="pixel_shuffle")
ANCHORS = ("zero", "bicubic", "regression")
KINDS = ("eps", "x_0", "v")


def config_of(*, space_to_depth: int = 4, **fields: object) -> ModelConfig:
    denoiser = SRDiffConfig(
        channels=3 * space_to_depth**2,
        hidden=4,
        multipliers=(1, 2),
        condition_channels=ENCODER.condition_channels,
        condition_scale=4 // space_to_depth,
    )
    return ModelConfig(encoder=ENCODER, denoiser=denoiser, space_to_depth=space_to_depth, **fields)  # type: ignore[arg-type]


def model_of(config: ModelConfig) -> SuperResolver:
    """A model none of whose layers is zero, so that nothing is equal by accident."""
    torch.manual_seed(7)
    model = SuperResolver(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def pair(*, amplitude: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(2, 3, 32, 16, generator=generator) * 2 - 1) * amplitude, torch.rand(
        2, 3, 8, 4, generator=generator
    ) * 2 - 1


def levels() -> Tensor:
    return torch.tensor([0.3, 0.9])


@pytest.mark.parametrize("space_to_depth", [1, 2, 4])
@pytest.mark.parametrize("anchor", ANCHORS)
@torch.no_grad()
def test_restore_inverts_target_where_nothing_is_clipped(anchor: str, space_to_depth: int) -> None:
    for clip, scale, amplitude in ((False, 10.0, 3.0), (True, 2.0, 0.49)):
        model = model_of(
            config_of(anchor=anchor, space_to_depth=space_to_depth, residual_scale=scale, residual_clip=clip)
        )
        difference, lr = pair(amplitude=amplitude)
        condition = model.condition(lr)
        hr = condition.anchor + difference
        x_0 = model.target(hr, condition)
        assert tuple(x_0.shape[1:]) == model.diffused_shape(8, 4)
        assert x_0.shape == (2, 3 * space_to_depth**2, 32 // space_to_depth, 16 // space_to_depth)
        assert (model.restore(x_0, condition) - hr).abs().max() < 1e-5
        assert x_0.abs().max() == pytest.approx(scale * amplitude, rel=0.02)


@torch.no_grad()
def test_a_clipped_residual_comes_back_as_its_bound() -> None:
    model = model_of(config_of(residual_scale=2.0, residual_clip=True))
    _, lr = pair(amplitude=1)
    condition = model.condition(lr)
    x_0 = model.target(condition.anchor + 0.75, condition)
    assert torch.equal(x_0, torch.ones_like(x_0))
    assert torch.allclose(model.restore(x_0, condition), condition.anchor + 0.5, atol=1e-6)


@torch.no_grad()
def test_what_is_diffused_lies_where_its_pixel_lies() -> None:
    # Space-to-depth by 4: channel 16 c + 4 (y mod 4) + x mod 4 at (y // 4, x // 4).
    model = model_of(config_of(anchor="zero", residual_scale=1.0, residual_clip=False))
    _, lr = pair(amplitude=1)
    hr = torch.zeros(2, 3, 32, 16)
    hr[1, 2, 4 * 5 + 3, 4 * 2 + 1] = 1
    (place,) = model.target(hr, model.condition(lr)).nonzero().tolist()
    assert place == [1, 16 * 2 + 4 * 3 + 1, 5, 2]


@torch.no_grad()
def test_each_anchor_is_what_its_name_says() -> None:
    _, lr = pair(amplitude=1)
    zero, bicubic, regression = (model_of(config_of(anchor=anchor)).condition(lr).anchor for anchor in ANCHORS)
    assert torch.equal(zero, torch.zeros(2, 3, 32, 16))
    assert torch.equal(bicubic, upscale(lr, 4))
    assert torch.equal(regression, model_of(config_of(anchor="regression")).encoder(lr)[1])
    assert not torch.equal(regression, bicubic)


@torch.no_grad()
def test_an_untrained_pixel_shuffle_regression_is_exactly_bicubic() -> None:
    torch.manual_seed(0)
    model = SuperResolver(ModelConfig(encoder=ENCODER, anchor="regression"))
    _, lr = pair(amplitude=1)
    assert torch.equal(model.condition(lr).anchor, upscale(lr, 4))


def forward_process(model: SuperResolver, hr: Tensor, lr: Tensor, eps: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """x_t and what the denoiser should say, from the definitions."""
    x_0 = torch.nn.functional.pixel_unshuffle((hr - upscale(lr, 4)) * 2.0, 4)
    a = levels()[:, None, None, None]
    b = (1 - a**2).sqrt()
    return a * x_0 + b * eps, {"eps": eps, "x_0": x_0, "v": a * eps - b * x_0}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_mean_absolute_error_of_the_prediction(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(config_of(anchor="bicubic", prediction=kind, residual_clip=False))
    hr, lr = pair(amplitude=0.2)
    eps = torch.randn((2, *model.diffused_shape(8, 4)), generator=torch.Generator().manual_seed(1))
    x_t, wanted = forward_process(model, hr, lr, eps, kind)
    features = model.encoder(lr)[0]

    def predict(found_x_t: Tensor, noise_level: Tensor, found_features: Tensor) -> Tensor:
        assert torch.allclose(found_x_t, x_t, atol=1e-6)
        assert torch.equal(noise_level, levels()) and torch.equal(found_features, features)
        return wanted + offset

    monkeypatch.setattr(model, "predict", predict)
    for offset in (0.0, 0.25, -2.0):
        assert float(model.diffusion_loss(hr, lr, levels(), eps)) == pytest.approx(abs(offset), abs=1e-6)


@torch.no_grad()
def test_the_regression_loss_is_the_mean_absolute_error_of_the_encoders_image() -> None:
    model = model_of(config_of())
    hr, lr = pair(amplitude=1)
    expected = (model.encoder(lr)[1] - hr).abs().mean()
    assert float(model.regression_loss(hr, lr)) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("stage", ["regression", "diffusion"])
def test_the_gradient_reaches_every_parameter_of_its_stage_and_no_other(stage: str) -> None:
    denoiser = replace(config_of().denoiser, full_resolution_skip=True)  # type: ignore[type-var]
    model = model_of(replace(config_of(anchor="regression", prediction="x_0"), denoiser=denoiser))
    hr, lr = pair(amplitude=1)
    eps = torch.randn((2, *model.diffused_shape(8, 4)), generator=torch.Generator().manual_seed(1))
    Objective(model, stage)(hr, lr, levels(), eps).backward()
    for name, parameter in model.named_parameters():
        mine = name.startswith("encoder.") == (stage == "regression")
        reached = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert reached == mine, name
        assert parameter.requires_grad == mine, name  # an optimizer and DistributedDataParallel go by this


def test_the_diffusion_loss_leaves_the_encoder_alone_whoever_calls_it() -> None:
    model = model_of(config_of(anchor="regression"))
    hr, lr = pair(amplitude=1)
    model.diffusion_loss(hr, lr, levels(), torch.ones(2, *model.diffused_shape(8, 4))).backward()
    assert all(p.requires_grad and p.grad is None for p in model.encoder.parameters())


@torch.no_grad()
def test_a_network_that_is_told_the_level_is_told_its_angle_over_1000(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Tensor] = []
    model = model_of(config_of(told="noise_level"))
    monkeypatch.setattr(model.denoiser, "forward", lambda x_t, position, features: told.append(position) or x_t)
    model.predict(torch.zeros(3, 48, 8, 4), torch.tensor([1.0, 0.5**0.5, 0.0]), torch.zeros(3, 4, 8, 4))
    assert torch.allclose(told[0], torch.tensor([0.0, 500.0, 1000.0]), atol=1e-3)


@torch.no_grad()
def test_a_network_that_is_told_the_step_is_told_the_nearest_one(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Tensor] = []
    schedule = Schedule(num_timesteps=100)
    model = model_of(config_of(told="step", schedule=schedule))
    monkeypatch.setattr(model.denoiser, "forward", lambda x_t, position, features: told.append(position) or x_t)
    model.predict(
        torch.zeros(2, 48, 8, 4), torch.from_numpy(schedule.noise_levels[[3, 99]]).float(), torch.zeros(2, 4, 8, 4)
    )
    assert told[0].tolist() == [3.0, 99.0]


@pytest.mark.parametrize(
    ("scale", "space_to_depth"),
    [(1, 1), (2, 1), (2, 2), (3, 3), (4, 1), (4, 2), (4, 4), (6, 1), (6, 3), (6, 6), (8, 4)],
)
def test_an_lr_size_on_the_stride_gives_the_denoiser_sizes_on_its_own(scale: int, space_to_depth: int) -> None:
    for levels_of_unet in (1, 2, 3, 4):
        config = ModelConfig(
            encoder=replace(ENCODER, scale=scale),
            denoiser=SRDiffConfig(multipliers=(1,) * levels_of_unet, condition_scale=scale // space_to_depth),
            space_to_depth=space_to_depth,
        )
        of_unet = 2 ** (levels_of_unet - 1)
        fitting = [lr for lr in range(1, 65) if lr * (scale // space_to_depth) % of_unet == 0]
        assert config.lr_stride == fitting[0]
    assert replace(config, denoiser=None).lr_stride == 1

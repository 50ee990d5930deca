"""Laws of the model family: its four places for every kind of model, and the parts that it refuses to join."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffsr_core import presets
from diffsr_core.family import ModelConfig, amplitudes, x0_and_eps
from diffsr_core.networks.interpolation import InterpolationConfig
from diffsr_core.networks.rrdb import RRDBConfig
from diffsr_core.networks.srdiff import SRDiffConfig
from diffsr_core.resize import upscale
from diffsr_core.schedule import Schedule
from tests.core.tiny import (
    ANCHORED,
    DDPM,
    DIFFUSIONS,
    MODELS,
    ONE_PASS_TWIN,
    RRDB_TWIN,
    SR3,
    SRDIFF,
    bands,
    model_of,
    pair,
)

ANCHORS = ("zero", "bicubic", "regression")
KINDS = ("eps", "x_0", "v")
ENCODER = ANCHORED.encoder
every_diffusion = pytest.mark.parametrize("config", DIFFUSIONS.values(), ids=DIFFUSIONS)


def config_of(*, space_to_depth: int = 4, **fields: object) -> ModelConfig:
    """The anchored model with some of its choices made otherwise."""
    denoiser = SRDiffConfig(
        channels=3 * space_to_depth**2,
        hidden=4,
        multipliers=(1, 2),
        condition_channels=ENCODER.condition_channels,
        condition_scale=4 // space_to_depth,
    )
    return ModelConfig(encoder=ENCODER, denoiser=denoiser, space_to_depth=space_to_depth, **fields)  # type: ignore[arg-type]


# --- what is diffused, and back ---


@pytest.mark.parametrize("space_to_depth", [1, 2, 4])
@pytest.mark.parametrize("anchor", ANCHORS)
@torch.no_grad()
def test_restore_inverts_target_where_nothing_is_clipped(anchor: str, space_to_depth: int) -> None:
    for clip, scale, amplitude in ((False, 10.0, 3.0), (True, 2.0, 0.49)):
        config = config_of(anchor=anchor, space_to_depth=space_to_depth, residual_scale=scale, residual_clip=clip)
        model = model_of(config)
        condition = model.condition(pair(config)[1])
        difference = (torch.rand(2, 3, 32, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1) * amplitude
        hr = condition.anchor + difference
        x_0 = model.target(hr, condition)
        assert tuple(x_0.shape[1:]) == model.diffused_shape(8, 4)
        assert x_0.shape == (2, 3 * space_to_depth**2, 32 // space_to_depth, 16 // space_to_depth)
        assert (model.restore(x_0, condition) - hr).abs().max() < 1e-5
        assert x_0.abs().max() == pytest.approx(scale * amplitude, rel=0.02)


@torch.no_grad()
def test_a_clipped_residual_comes_back_as_its_bound() -> None:
    model = model_of(config_of(residual_scale=2.0, residual_clip=True))
    condition = model.condition(pair(ANCHORED)[1])
    for sign in (1, -1):
        x_0 = model.target(condition.anchor + sign * 0.75, condition)
        assert torch.equal(x_0, sign * torch.ones_like(x_0))
        assert torch.allclose(model.restore(x_0, condition), condition.anchor + sign * 0.5, atol=1e-6)


@torch.no_grad()
def test_what_is_diffused_lies_where_its_pixel_lies() -> None:
    # Space-to-depth by 4: channel 16 c + 4 (y mod 4) + x mod 4 at (y // 4, x // 4).
    model = model_of(config_of(anchor="zero", residual_scale=1.0, residual_clip=False))
    hr = torch.zeros(2, 3, 32, 16)
    hr[1, 2, 4 * 5 + 3, 4 * 2 + 1] = 1
    (place,) = model.target(hr, model.condition(pair(ANCHORED)[1])).nonzero().tolist()
    assert place == [1, 16 * 2 + 4 * 3 + 1, 5, 2]


@every_diffusion
@torch.no_grad()
def test_every_kind_of_model_goes_from_lr_to_x_0_and_back_to_an_image(config: ModelConfig) -> None:
    model = model_of(config).eval()
    stride = config.lr_stride
    hr, lr = pair(config, lr_size=(2 * stride, 3 * stride))
    condition = model.condition(lr)
    x_0 = model.target(hr, condition)
    assert tuple(x_0.shape[1:]) == model.diffused_shape(2 * stride, 3 * stride)
    found_x_0, found_eps = model.denoise(condition.features)(x_0, 0.7)
    assert found_x_0.shape == found_eps.shape == x_0.shape
    assert torch.allclose(0.7 * found_x_0 + math.sqrt(0.51) * found_eps, x_0, atol=1e-5)
    assert model.restore(found_x_0, condition).shape == hr.shape == condition.anchor.shape
    assert found_x_0.isfinite().all() and float(found_x_0.std()) > 0


# --- the four places, kind by kind ---


@torch.no_grad()
def test_sr3_diffuses_the_hr_image_itself_beside_the_bicubic_lr() -> None:
    model = model_of(SR3)
    hr, lr = pair(SR3)
    condition = model.condition(lr)
    assert torch.equal(condition.features, upscale(lr, 4))
    assert torch.equal(condition.anchor, torch.zeros_like(hr))
    assert torch.equal(model.target(hr, condition), hr) and torch.equal(model.restore(hr, condition), hr)


@torch.no_grad()
def test_srdiff_diffuses_twice_the_residual_of_bicubic_clipped_beside_the_rrdb_features() -> None:
    model = model_of(SRDIFF)
    hr, lr = pair(SRDIFF)
    condition = model.condition(lr)
    x_0 = model.target(hr, condition)
    assert torch.equal(condition.features, torch.cat(model.encoder.features(lr)[2::3], dim=1))  # type: ignore[operator]
    assert torch.equal(condition.anchor, upscale(lr, 4))
    assert torch.allclose(x_0, ((hr - upscale(lr, 4)) * 2).clamp(-1, 1), atol=1e-6)


@torch.no_grad()
def test_each_anchor_is_what_its_name_says() -> None:
    _, lr = pair(ANCHORED)
    zero, bicubic, regression = (model_of(config_of(anchor=anchor)).condition(lr).anchor for anchor in ANCHORS)
    assert torch.equal(zero, torch.zeros(2, 3, 32, 16))
    assert torch.equal(bicubic, upscale(lr, 4))
    assert torch.equal(regression, model_of(config_of(anchor="regression")).encoder(lr)[1])
    assert not torch.allclose(regression, bicubic, atol=0.01)


@pytest.mark.parametrize("config", [RRDB_TWIN, ONE_PASS_TWIN, replace(RRDB_TWIN, anchor="zero")])
@torch.no_grad()
def test_without_a_denoiser_the_anchor_is_the_image_of_the_encoder(config: ModelConfig) -> None:
    model = model_of(config)
    _, lr = pair(config)
    assert model.denoiser is None
    assert torch.equal(model.condition(lr).anchor, model.encoder(lr)[1])


@torch.no_grad()
def test_a_plain_ddpm_does_not_see_the_lr() -> None:
    model = model_of(DDPM)
    hr, lr = pair(DDPM)
    conditions = [model.condition(image) for image in (lr, torch.full_like(lr, torch.nan))]
    for condition in conditions:
        assert condition.features.shape == (2, 0, 8, 4)
        assert torch.equal(condition.anchor, torch.zeros_like(hr))
        assert torch.equal(model.target(hr, condition), hr)
    outputs = [model.denoise(condition.features)(hr, 0.5)[0] for condition in conditions]
    assert torch.equal(*outputs)


@torch.no_grad()
def test_at_scale_1_the_anchor_is_the_lr_bit_for_bit() -> None:
    config = MODELS["deblur"]
    model = model_of(config)
    hr, lr = pair(config)
    condition = model.condition(lr)
    assert torch.equal(condition.anchor, lr)
    assert torch.equal(model.target(hr, condition), (2 * (hr - lr)).clamp(-1, 1))


@pytest.mark.parametrize("name", ["sr3-edges", "srdiff-edges", "on-seed3"])
@torch.no_grad()
def test_extra_channels_are_read_and_never_returned(name: str) -> None:
    config = MODELS[name]
    model = model_of(config).eval()
    _, lr = pair(config, lr_size=(8, 8))
    other = lr.clone()
    other[:, config.encoder.channels :] *= -1
    first, second = model.condition(lr), model.condition(other)
    assert first.anchor.shape == (2, 3, 32, 32)
    assert torch.equal(first.anchor, second.anchor) == (config.anchor != "regression")
    x_t = torch.ones(2, 3, 32, 32)
    outputs = [model.denoise(condition.features)(x_t, 0.5)[0] for condition in (first, second)]
    assert not torch.equal(*outputs)


@pytest.mark.parametrize("count", [1, 4, 16])
@torch.no_grad()
def test_each_band_is_anchored_on_its_own(count: int) -> None:
    model = model_of(bands(count))
    _, lr = pair(bands(count))
    alone = torch.cat([upscale(lr[:, i : i + 1], 4) for i in range(count)], dim=1)
    assert torch.equal(model.condition(lr).anchor, alone)


@torch.no_grad()
def test_the_anchor_gain_is_the_bicubic_of_pixels_over_256() -> None:
    # SRDiff's released weights saw up(pixels / 256) with the model range still made by 2 x - 1.
    pixels = torch.randint(0, 256, (2, 3, 8, 4), generator=torch.Generator().manual_seed(0))
    for gain, divisor in ((1.0, 255), (255 / 256, 256)):
        anchor = model_of(replace(SRDIFF, anchor_gain=gain)).condition(pixels / 255 * 2 - 1).anchor
        wanted = upscale(pixels.double() / divisor, 4) * 2 - 1
        assert (anchor - wanted).abs().max() < 1e-6


# --- what the network is told, and what it predicts ---


def told(config: ModelConfig, levels: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    seen: list[Tensor] = []
    model = model_of(config)
    monkeypatch.setattr(model.denoiser, "forward", lambda x_t, position, features: seen.append(position) or x_t)
    model.predict(torch.zeros(len(levels), 3, 8, 8), levels, torch.zeros(len(levels), 3, 8, 8))
    return seen[0]


def test_a_network_that_is_told_the_level_is_told_its_angle_over_1000(monkeypatch: pytest.MonkeyPatch) -> None:
    found = told(replace(SR3, told="noise_level"), torch.tensor([1.0, 0.5**0.5, 0.0]), monkeypatch)
    assert torch.allclose(found, torch.tensor([0.0, 500.0, 1000.0]), atol=1e-3)


def test_a_network_that_is_told_the_amplitude_is_told_the_level_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = torch.tensor([1.0, 0.3, 1e-4])
    assert torch.equal(told(replace(SR3, told="amplitude"), levels, monkeypatch), levels)


def test_a_network_that_is_told_the_step_is_told_exactly_t(monkeypatch: pytest.MonkeyPatch) -> None:
    for schedule in (Schedule(num_timesteps=100), Schedule(name="linear", num_timesteps=2000)):
        levels = torch.from_numpy(schedule.noise_levels).float()
        found = told(replace(SR3, told="step", schedule=schedule), levels, monkeypatch)
        assert found.tolist() == list(range(schedule.num_timesteps))


@pytest.mark.parametrize("kind", KINDS)
def test_denoise_is_the_prediction_converted_at_one_level_for_the_batch(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(replace(SR3, prediction=kind))
    x_t, out = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    features = torch.zeros(2, 3, 8, 8)

    def predict(*found: Tensor) -> Tensor:
        assert all(torch.equal(a, b) for a, b in zip(found, (x_t, torch.full((2,), 0.6), features), strict=True))
        return out

    monkeypatch.setattr(model, "predict", predict)
    x_0, eps = model.denoise(features)(x_t, 0.6)
    wanted = {
        "eps": ((x_t - 0.8 * out) / 0.6, out),
        "x_0": (out, (x_t - 0.6 * out) / 0.8),
        "v": (0.6 * x_t - 0.8 * out, 0.8 * x_t + 0.6 * out),
    }[kind]
    assert torch.allclose(x_0, wanted[0], atol=1e-5) and torch.allclose(eps, wanted[1], atol=1e-5)


def test_v_is_edm_preconditioning_with_unit_data_and_the_sign_turned() -> None:
    # Karras et al. 2022, table 1 with sigma_data 1: D(y, sigma) = c_skip y + c_out F(c_in y), y = x_t / a, v = -F.
    generator = torch.Generator().manual_seed(0)
    x_t, network = torch.randn(2, 40, 3, 4, 4, generator=generator, dtype=torch.float64).unbind()
    level = torch.linspace(0.01, 0.999, 40, dtype=torch.float64)
    sigma = ((1 - level**2).sqrt() / level)[:, None, None, None]
    y = x_t / level[:, None, None, None]
    c_skip, c_out, c_in = 1 / (sigma**2 + 1), sigma / (sigma**2 + 1).sqrt(), 1 / (sigma**2 + 1).sqrt()
    assert torch.allclose(c_in * y, x_t, atol=1e-12)  # so F is asked about the very x_t
    x_0, eps = x0_and_eps(-network, x_t, level, kind="v")
    assert torch.allclose(x_0, c_skip * y + c_out * network, atol=1e-12)
    assert torch.allclose(eps, (y - x_0) / sigma, atol=1e-9)


def test_the_amplitudes_are_those_of_float64_even_at_the_cleanest_levels() -> None:
    levels = torch.cat([1 - 2.0 ** -torch.arange(2, 24), torch.tensor([1.0, 0.9999995])])
    a, b = amplitudes(levels, torch.float32)
    assert a.shape == b.shape == (24, 1, 1, 1)
    assert torch.allclose(b.double().flatten(), (1 - levels.double() ** 2).sqrt(), rtol=1e-6, atol=0)


# --- which parts fit ---


@pytest.mark.parametrize(
    ("scale", "space_to_depth"),
    [(1, 1), (2, 1), (2, 2), (3, 3), (4, 1), (4, 2), (4, 4), (6, 1), (6, 3), (6, 6), (8, 4)],
)
def test_an_lr_size_on_the_stride_gives_the_denoiser_sizes_on_its_own(scale: int, space_to_depth: int) -> None:
    for levels_of_unet in (1, 2, 3, 4):
        config = ModelConfig(
            encoder=replace(ENCODER, scale=scale),
            denoiser=SRDiffConfig(
                channels=3 * space_to_depth**2,
                multipliers=(1,) * levels_of_unet,
                condition_channels=4,
                condition_scale=scale // space_to_depth,
            ),
            space_to_depth=space_to_depth,
        )
        of_unet = 2 ** (levels_of_unet - 1)
        fitting = [lr for lr in range(1, 65) if lr * (scale // space_to_depth) % of_unet == 0]
        assert config.lr_stride == fitting[0]
    assert replace(config, denoiser=None).lr_stride == 1


def test_the_stride_of_the_encoder_counts_too() -> None:
    # The encoder's own U-Net has three levels at 4 times the LR size (stride 1), the denoiser five (stride 4).
    deep = replace(MODELS["on-seed3"].denoiser, multipliers=(1, 1, 1, 1, 1))  # type: ignore[type-var]
    assert MODELS["on-seed3"].lr_stride == 1
    assert replace(MODELS["on-seed3"], denoiser=deep).lr_stride == 4
    seven = replace(MODELS["on-seed3"].encoder.network, widths=(4,) * 7)  # type: ignore[union-attr]
    assert replace(MODELS["on-seed3"], encoder=replace(MODELS["on-seed3"].encoder, network=seven)).lr_stride == 16


@pytest.mark.parametrize(
    ("name", "smallest"),
    [("nano-x4", 4), ("srdiff-celeba-x8", 2), ("srdiff-df2k-x4", 4), ("sr3-16-128", 2), ("nano-x4-regression", 1)],
)
def test_the_smallest_lr_window_is_a_multiple_of_the_stride_that_gives_the_denoiser_its_smallest(
    name: str, smallest: int
) -> None:
    # By hand: twice the stride of the U-Net (2 or 8), in diffused pixels, of which an LR pixel has 1, 8, or 4.
    config = presets.get(name).model
    assert config.lr_smallest == smallest and config.lr_smallest % config.lr_stride == 0


@pytest.mark.parametrize(
    ("base", "fields", "message"),
    [
        (ANCHORED, {"space_to_depth": 3}, r"space_to_depth \(3\) must divide the scale \(4\); use 1 or the scale"),
        (ANCHORED, {"space_to_depth": 0}, r"space_to_depth \(0\)"),
        (ANCHORED, {"space_to_depth": 2}, r"denoiser channels \(48\) must be 12 .*set it so"),
        (SRDIFF, {"encoder": replace(SRDIFF.encoder, channels=4)}, r"denoiser channels \(3\) must be 4"),
        (SRDIFF, {"encoder": replace(ENCODER, num_blocks=5)}, r"condition_channels \(4\) must be 8"),
        (SR3, {"encoder": InterpolationConfig(scale=4, extra_channels=2)}, r"condition_channels \(3\) must be 5"),
        (SR3, {"encoder": InterpolationConfig(scale=1, kernel="none")}, r"condition_channels \(3\) must be 0"),
        (SRDIFF, {"encoder": replace(ENCODER, scale=2)}, r"condition_scale \(4.*scale \(2\); change"),
        (SR3, {"encoder": RRDBConfig(num_features=3, num_blocks=2)}, r"feature_scale \(1\).*change space_to_depth"),
        (SR3, {"anchor": "regression"}, r"anchor \(regression\) needs.*not interpolation; use bicubic"),
        (DDPM, {"anchor": "bicubic"}, r"anchor \(bicubic\) reads the LR.*use zero"),
        (SR3, {"anchor_gain": 255 / 256}, r"anchor_gain \(0.996\d*\) is of the bicubic anchor, not zero; use 1"),
        (SR3, {"anchor": "nearest"}, r"anchor \('nearest'\) must be one of zero, bicubic, regression"),
        (SR3, {"told": "sigma"}, r"told \('sigma'\) must be one of noise_level, amplitude, step"),
        (SR3, {"prediction": "epsilon"}, r"prediction \('epsilon'\) must be one of eps, x_0, v"),
        (SR3, {"residual_scale": 0.0}, r"residual_scale \(0.0\) must be positive"),
        (SRDIFF, {"anchor_gain": math.nan}, r"anchor_gain \(nan\) must be positive and finite"),
    ],
)
def test_parts_that_do_not_fit_are_refused_with_the_remedy(
    base: ModelConfig, fields: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(base, **fields)  # type: ignore[arg-type]

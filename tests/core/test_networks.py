"""Laws of the networks: the released architectures, number for number, and the presets' sizes."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffsr_core import presets
from diffsr_core.family import SuperResolver
from diffsr_core.networks.blocks import SinusoidalEmbedding
from diffsr_core.networks.rrdb import RRDBConfig, RRDBNet
from diffsr_core.networks.srdiff import SRDiffConfig, SRDiffUNet

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
MODELS = ["srdiff_tiny_celeba_x8", "srdiff_tiny_df2k_x4"]

# The released files' names -> ours, in this order.
UNET_NAMES = [
    (r"block([12])\.block\.1", r"conv\1"),
    (r"mlp\.1\.", "embed."),
    ("res_conv", "skip"),
    (r"(downs\.\d\.2)\.conv\.1", r"\1"),
    (r"(ups\.\d\.2)\.conv\.0", r"\1"),
    ("cond_proj", "condition"),
    (r"^mlp\.0", "embedding.1"),
    (r"^mlp\.2", "embedding.3"),
    ("mid_block1", "middle.0"),
    ("mid_block2", "middle.1"),
    (r"final_conv\.0\.block\.1", "final.0"),
    (r"final_conv\.1", "final.1"),
]


def rrdb_name(name: str) -> str:
    name = re.sub(
        r"RRDB_trunk\.(\d+)\.RDB(\d)\.conv(\d)",
        lambda m: f"trunk.{m[1]}.{int(m[2]) - 1}.convs.{int(m[3]) - 1}",
        name,
    )
    return re.sub(r"upconv(\d)", lambda m: f"upconvs.{int(m[1]) - 1}", name).replace("HRconv", "hr_conv")


def unet_name(name: str) -> str:
    for pattern, ours in UNET_NAMES:
        name = re.sub(pattern, ours, name)
    return name


def golden(name: str) -> tuple[RRDBNet, SRDiffUNet, dict[str, Tensor]]:
    """Both networks with the released weights, and the tensors that the reference implementation made of them."""
    if not (GOLDEN / f"{name}.json").is_file():
        pytest.skip("the golden tensors of the reference implementations lie beside the checkout, not in it: none here")
    settings = json.loads((GOLDEN / f"{name}.json").read_text())
    encoder = RRDBConfig(
        scale=settings["scale"], num_features=settings["rrdb_num_feat"], num_blocks=settings["rrdb_num_block"]
    )
    rrdb = RRDBNet(encoder)
    unet = SRDiffUNet(
        SRDiffConfig(
            hidden=settings["hidden_size"],
            multipliers=tuple(settings["dim_mults"]),
            condition_channels=encoder.condition_channels,
            condition_scale=settings["scale"],
        )
    )
    weights = load_file(GOLDEN / f"{name}.weights.safetensors")
    for prefix, module, ours in (("rrdb.", rrdb, rrdb_name), ("denoise_fn.", unet, unet_name)):
        module.load_state_dict({ours(k[len(prefix) :]): v for k, v in weights.items() if k.startswith(prefix)})
    return rrdb.eval(), unet.eval(), load_file(GOLDEN / f"{name}.io.safetensors")


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_encoder_gives_the_features_and_image_of_the_reference(name: str) -> None:
    rrdb, _, io = golden(name)
    maps = rrdb.features(io["lr"])
    assert len(maps) == rrdb.config.num_blocks + 1 == sum(key.startswith("rrdb_feature_") for key in io)
    for i, found in enumerate(maps):
        assert (found - io[f"rrdb_feature_{i}"]).abs().max() < 1e-5
    features, image = rrdb(io["lr"])
    assert (image.clamp(-1, 1) - io["rrdb_output"]).abs().max() < 1e-5
    assert torch.equal(features, torch.cat(maps[2::3], dim=1))
    assert features.shape[1] == rrdb.config.condition_channels


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_unet_gives_the_output_of_the_reference(name: str) -> None:
    _, unet, io = golden(name)
    # The condition comes from the golden features: an error of our encoder cannot hide here.
    maps = [io[f"rrdb_feature_{i}"] for i in range(sum(key.startswith("rrdb_feature_") for key in io))]
    found = unet(io["x_t"], io["t"], torch.cat(maps[2::3], dim=1))
    assert (found - io["unet_output"]).abs().max() < 1e-5


@pytest.mark.parametrize("name", presets.names())
def test_a_preset_has_the_parameters_that_it_says(name: str) -> None:
    preset = presets.get(name)
    with torch.device("meta"):
        model = SuperResolver(preset.model)
    assert sum(p.numel() for p in model.parameters()) == preset.params
    assert (model.denoiser is None) == name.endswith("-regression")


@pytest.mark.parametrize(("name", "published"), [("srdiff-celeba-x8", 12.0e6), ("srdiff-df2k-x4", 25.3e6)])
def test_a_published_model_has_its_published_size(name: str, published: float) -> None:
    assert presets.get(name).params == pytest.approx(published, rel=0.005)


def test_an_unknown_preset_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'sr4'.*nano-x4, nano-x4-regression"):
        presets.get("sr4")
    with pytest.raises(ValueError, match="unknown"):
        presets.get("nano-x4-regression-regression")


def test_a_twin_is_the_same_encoder_without_the_diffusion_stage() -> None:
    for name in presets.PRESETS:
        full, twin = presets.get(name), presets.get(f"{name}-regression")
        assert twin.model.encoder == full.model.encoder and twin.model.denoiser is None
        assert [stage.name for stage in full.stages] == ["regression", "diffusion"]
        assert twin.stages == full.stages[:1]


def test_a_position_becomes_sines_then_cosines_of_falling_frequencies() -> None:
    position = torch.tensor([0.0, 1.0, 37.5])
    found = SinusoidalEmbedding(8)(position)
    frequency = torch.tensor([10000.0 ** (-i / 3) for i in range(4)])
    angle = position[:, None] * frequency
    assert torch.allclose(found, torch.cat([angle.sin(), angle.cos()], dim=1), atol=1e-5)


@pytest.mark.parametrize("scale", [2, 4, 8])
@torch.no_grad()
def test_the_nearest_head_enlarges_by_its_scale(scale: int) -> None:
    net = RRDBNet(RRDBConfig(scale=scale, num_features=4, num_blocks=2))
    features, image = net(torch.zeros(2, 3, 5, 7))
    assert image.shape == (2, 3, 5 * scale, 7 * scale) and features.shape == (2, 4, 5, 7)


@pytest.mark.parametrize("scale", [1, 3, 6, 16])
def test_the_nearest_head_refuses_a_scale_that_is_no_power_of_two(scale: int) -> None:
    with pytest.raises(ValueError, match=rf"scale \({scale}\).*pixel_shuffle"):
        RRDBConfig(scale=scale)


@torch.no_grad()
def test_the_full_resolution_skip_is_read_only_when_asked_for() -> None:
    # With the up path silenced, nothing but the merge can carry the condition of the first level to the output.
    for skip in (False, True):
        torch.manual_seed(0)
        config = SRDiffConfig(
            channels=3,
            hidden=8,
            multipliers=(1, 2),
            condition_channels=4,
            condition_scale=1,
            full_resolution_skip=skip,
        )
        net = SRDiffUNet(config)
        up = net.ups[0][2]  # type: ignore[index]
        torch.nn.init.zeros_(up.weight)
        x, t = torch.randn(1, 3, 8, 8), torch.zeros(1)
        outputs = [net(x, t, torch.full((1, 4, 8, 8), value)) for value in (0.0, 1.0)]
        assert torch.equal(*outputs) != skip


def test_an_odd_condition_scale_is_refused_as_its_sizes_would_not_meet() -> None:
    with pytest.raises(ValueError, match=r"condition_scale \(3\)"):
        SRDiffConfig(condition_scale=3)

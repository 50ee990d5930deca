"""Laws of the networks: the released architectures, number for number, and the traits that are settings."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffsr_core.importers import import_srdiff
from diffsr_core.networks.blocks import SinusoidalEmbedding
from diffsr_core.networks.rrdb import RRDBConfig, RRDBNet
from diffsr_core.networks.srdiff import SRDiffConfig, SRDiffUNet

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
MODELS = ["srdiff_tiny_celeba_x8", "srdiff_tiny_df2k_x4"]


def golden(name: str) -> tuple[RRDBNet, SRDiffUNet, dict[str, Tensor]]:
    """Both networks with the released weights, and the tensors that the reference implementation made of them."""
    if not (GOLDEN / f"{name}.json").is_file():
        pytest.skip("the golden tensors of the reference implementations lie beside the checkout, not in it: none here")
    encoder, denoiser, weights = import_srdiff(load_file(GOLDEN / f"{name}.weights.safetensors"))
    assert encoder is not None and isinstance(denoiser, SRDiffConfig)
    rrdb, unet = RRDBNet(encoder), SRDiffUNet(denoiser)
    torch.nn.ModuleDict({"encoder": rrdb, "denoiser": unet}).load_state_dict(weights)
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


@pytest.mark.parametrize("scale", [3, 6, 16])
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


@pytest.mark.parametrize("multipliers", [(1,), (1, 2), (1, 2, 2), (1, 2, 2, 4)], ids=len)
@torch.no_grad()
def test_the_unet_takes_its_smallest_size_and_says_so_of_a_smaller_one(multipliers: tuple[int, ...]) -> None:
    config = SRDiffConfig(hidden=4, multipliers=multipliers, condition_channels=4, condition_scale=1)
    assert config.smallest == 2 * config.stride == 2 ** len(multipliers)
    net = SRDiffUNet(config)

    def run(height: int, width: int) -> tuple[int, ...]:
        return tuple(net(torch.zeros(1, 3, height, width), torch.zeros(1), torch.zeros(1, 4, height, width)).shape)

    least, less = config.smallest, config.smallest - config.stride
    assert run(least, 3 * config.stride) == (1, 3, least, 3 * config.stride)
    for size in ((less, least), (least, less)):
        with pytest.raises(ValueError, match=rf"\({size[0]}, {size[1]}\) px: each side must be at least {least}; use"):
            run(*size)

"""Laws of the encoders: what they read and return, for any scale, channels and size, and what they refuse."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffsr_core.family import ENCODERS
from diffsr_core.networks.encoder import EncoderConfig
from diffsr_core.networks.interpolation import Interpolation, InterpolationConfig
from diffsr_core.networks.one_pass import OnePass, OnePassConfig
from diffsr_core.networks.rrdb import RRDBConfig, RRDBNet
from diffsr_core.networks.seed3 import Seed3Config
from diffsr_core.networks.sr3 import SR3Config
from diffsr_core.networks.srdiff import SRDiffConfig
from diffsr_core.resize import upscale

SR3 = SR3Config(condition_channels=0, hidden=4, multipliers=(1, 2), num_blocks=1, attention_factors=(), num_groups=2)
SEED3 = Seed3Config(channels=3, condition_channels=0, widths=(4, 6, 8), embedding_dim=8)


def lr_of(config: EncoderConfig, height: int, width: int, *, count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, config.lr_channels, height, width, generator=generator) * 2 - 1


def encoder_of(config: EncoderConfig) -> torch.nn.Module:
    """An encoder in eval mode none of whose layers is zero."""
    torch.manual_seed(0)
    network = ENCODERS[config.kind][1](config)  # type: ignore[attr-defined]
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network.eval()


def configs(scale: int, channels: int, extra: int) -> list[EncoderConfig]:
    """Every kind of encoder that this scale allows."""
    fields = {"scale": scale, "channels": channels, "extra_channels": extra}
    networks = [replace(base, channels=channels, condition_channels=extra) for base in (SR3, SEED3)]  # type: ignore[type-var]
    heads = ["pixel_shuffle", "nearest"] if scale in (1, 2, 4, 8) else ["pixel_shuffle"]
    return [
        *(InterpolationConfig(**fields, kernel=kernel) for kernel in ("bicubic", "bilinear")),  # type: ignore[arg-type]
        *(OnePassConfig(**fields, network=network) for network in networks),  # type: ignore[arg-type]
        *(RRDBConfig(**fields, num_features=2, num_blocks=5, head=head) for head in heads),  # type: ignore[arg-type]
    ]


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    scale=st.sampled_from([1, 2, 3, 4, 5, 8]),
    channels=st.integers(1, 16),
    extra=st.integers(0, 3),
    size=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
@torch.no_grad()
def test_features_and_image_have_the_shapes_that_the_settings_say(
    scale: int, channels: int, extra: int, size: tuple[int, int]
) -> None:
    for config in configs(scale, channels, extra):
        height, width = (side * config.lr_stride for side in size)
        features, image = encoder_of(config)(lr_of(config, height, width))
        per_lr = config.feature_scale
        assert features.shape == (2, config.condition_channels, height * per_lr, width * per_lr), config
        assert image.shape == (2, channels, height * scale, width * scale), config
        assert features.isfinite().all() and image.isfinite().all()


@torch.no_grad()
def test_an_encoder_reads_all_its_channels_and_no_other_image_of_the_batch() -> None:
    for config in configs(4, 2, 1):
        network = encoder_of(config)
        lr = lr_of(config, 4, 4)
        before = network(lr)
        for channel in range(3):
            other = lr.clone()
            other[1, channel] *= -1
            for name, old, new in zip(("features", "image"), before, network(other), strict=True):
                # Interpolation returns the image's own channels alone; all else mixes them.
                apart = name == "image" and config.kind == "interpolation" and channel == 2  # type: ignore[attr-defined]
                assert torch.equal(old[1], new[1]) == apart, (config, name, channel)
                assert torch.equal(old[0], new[0])


@pytest.mark.parametrize("kernel", ["bicubic", "bilinear"])
def test_interpolation_is_the_resize_and_its_image_the_first_channels(kernel: str) -> None:
    config = InterpolationConfig(scale=3, channels=2, extra_channels=2, kernel=kernel)  # type: ignore[arg-type]
    lr = lr_of(config, 4, 5)
    features, image = Interpolation(config)(lr)
    assert torch.equal(features, upscale(lr, 3, kernel=kernel))  # type: ignore[arg-type]
    assert torch.equal(image, features[:, :2])
    assert list(Interpolation(config).parameters()) == []
    assert not config.regresses


def test_no_condition_is_no_channels_and_an_image_of_zeros_whatever_comes() -> None:
    config = InterpolationConfig(scale=1, kernel="none")
    assert config.condition_channels == 0 and config.lr_channels == 3
    features, image = Interpolation(config)(torch.full((2, 3, 4, 5), torch.nan))
    assert features.shape == (2, 0, 4, 5) and torch.equal(image, torch.zeros(2, 3, 4, 5))


@pytest.mark.parametrize("network", [SR3, SEED3], ids=["sr3", "seed3"])
@torch.no_grad()
def test_one_pass_is_its_network_on_the_interpolated_lr_beside_the_extra_channels(network: SR3Config) -> None:
    config = OnePassConfig(scale=2, extra_channels=2, kernel="bilinear", network=replace(network, condition_channels=2))
    model = encoder_of(config)
    assert isinstance(model, OnePass) and config.regresses
    lr = lr_of(config, 4, 4)
    features, image = model(lr)
    up = upscale(lr, 2, kernel="bilinear")
    assert torch.equal(features, up)
    assert torch.equal(image, model.network(up[:, :3], torch.zeros(2), up[:, 3:]))


@pytest.mark.parametrize(
    ("scale", "levels", "stride"), [(4, 2, 1), (4, 3, 1), (4, 4, 2), (4, 5, 4), (3, 3, 4), (6, 3, 2)]
)
def test_the_stride_of_one_pass_is_the_smallest_that_its_network_takes(scale: int, levels: int, stride: int) -> None:
    config = OnePassConfig(scale=scale, network=replace(SR3, multipliers=(1,) * levels))
    assert config.lr_stride == stride
    assert [lr for lr in range(1, 9) if lr * scale % 2 ** (levels - 1) == 0][0] == stride


@torch.no_grad()
def test_an_untrained_pixel_shuffle_regression_is_exactly_bicubic() -> None:
    config = RRDBConfig(scale=4, extra_channels=1, num_features=4, num_blocks=2, head="pixel_shuffle")
    lr = lr_of(config, 5, 7)
    assert torch.equal(RRDBNet(config)(lr)[1], upscale(lr[:, :3], 4))


@pytest.mark.parametrize("num_blocks", [2, 3, 5, 8, 17])
@torch.no_grad()
def test_the_condition_of_rrdb_is_every_third_map_and_the_trunk_sum_counts(num_blocks: int) -> None:
    config = RRDBConfig(scale=1, num_features=2, num_blocks=num_blocks)
    network = encoder_of(config)
    lr = lr_of(config, 3, 4)
    maps = network.features(lr)  # type: ignore[operator]
    assert len(maps) == num_blocks + 1
    features, image = network(lr)
    assert torch.equal(features, torch.cat([maps[i] for i in range(2, num_blocks + 1, 3)], dim=1))
    assert features.shape[1] == config.condition_channels and image.shape == lr.shape


@pytest.mark.parametrize(
    ("build", "fields", "message"),
    [
        (RRDBConfig, {"scale": 0}, r"scale \(0\) must be at least 1; 1 is restoration"),
        (RRDBConfig, {"scale": 3}, r"scale \(3\) must be 1, 2, 4 or 8.*head=pixel_shuffle"),
        (RRDBConfig, {"num_blocks": 1}, r"num_blocks \(1\) must be at least 2.*use 2"),
        (RRDBConfig, {"channels": 17}, r"channels \(17\) must be from 1 to 16; split"),
        (InterpolationConfig, {"channels": 0}, r"channels \(0\) must be from 1 to 16"),
        (InterpolationConfig, {"extra_channels": -1}, r"extra_channels \(-1\) must be 0 or more; use 0"),
        (InterpolationConfig, {"kernel": "lanczos"}, r"kernel \('lanczos'\) must be bicubic, bilinear or none"),
        (InterpolationConfig, {"kernel": "none"}, r"scale \(4\) must be 1.*use kernel=bicubic"),
        (InterpolationConfig, {"kernel": "none", "scale": 1, "extra_channels": 2}, r"extra_channels \(2\) 0 without"),
        (OnePassConfig, {"network": replace(SR3, condition_channels=3)}, r"reads 3 \+ 3 channels: .* 3 and the 0"),
        (OnePassConfig, {"network": SR3, "channels": 1}, r"reads 3 \+ 0 channels: .* 1 and the 0"),
        (OnePassConfig, {"network": SR3, "extra_channels": 1}, r"reads 3 \+ 0 channels: .* 3 and the 1"),
        (OnePassConfig, {"network": SR3, "scale": -2}, r"scale \(-2\)"),
        (OnePassConfig, {"network": SRDiffConfig()}, r"network \(SRDiffConfig\) must be of kind sr3 or seed3"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_with_the_remedy(
    build: type[EncoderConfig], fields: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(**fields)  # type: ignore[arg-type]

"""Laws of SR3's U-Net: the published sizes, each layer's formula, and the released variation number for number."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from diffsr_core.importers import import_sr3
from diffsr_core.networks.blocks import SinusoidalEmbedding
from diffsr_core.networks.sr3 import Attention, Block, Resampling, SR3Config, SR3UNet

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
NAME = "sr3_unofficial_tiny"

TINY = SR3Config(hidden=16, multipliers=(1, 2, 2), num_blocks=1, attention_factors=(2,), num_groups=4)
RELEASED = replace(TINY, released=True)

PUBLISHED = [
    # Table A.1 of the paper, attention at 16x16.
    (SR3Config(dropout=0.2), 550e6, 560_719_107),
    (SR3Config(multipliers=(1, 2, 4, 4, 8, 8), attention_factors=(16,)), 625e6, 617_118_467),
    (SR3Config(hidden=64, multipliers=(1, 2, 4, 8, 8, 16, 16), attention_factors=(32,)), 625e6, 609_802_371),
    (
        SR3Config(
            hidden=16, multipliers=(1, 2, 4, 8, 16, 32, 32, 32), num_blocks=2, attention_factors=(64,), num_groups=16
        ),
        150e6,
        148_746_931,
    ),
]
PUBLIC_CODE = [
    # Its two released files, counted on that code.
    (SR3Config(hidden=64, num_blocks=2, released=True), 97_807_491),
    (
        SR3Config(
            hidden=64,
            multipliers=(1, 2, 4, 8, 16),
            num_blocks=1,
            attention_factors=(),
            num_groups=16,
            released=True,
        ),
        155_334_339,
    ),
]


def count(config: SR3Config) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in SR3UNet(config).parameters())


def net_of(config: SR3Config, *, seed: int = 0) -> SR3UNet:
    """A network none of whose layers is zero, so that nothing is equal by accident; in eval mode."""
    torch.manual_seed(seed)
    net = SR3UNet(config)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net.eval()


def inputs(config: SR3Config, *, batch: int = 2, height: int = 8, width: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(batch, config.channels, height, width, generator=generator)
    condition = torch.randn(batch, config.condition_channels, height, width, generator=generator)
    top = 1.0 if config.released else 1000.0
    return x_t, torch.linspace(0.1, 0.9, batch) * top, condition


def golden() -> tuple[SR3UNet, dict[str, Tensor]]:
    if not (GOLDEN / f"{NAME}.json").is_file():
        pytest.skip("the golden tensors of the reference implementations lie beside the checkout, not in it: none here")
    settings = json.loads((GOLDEN / f"{NAME}.json").read_text())
    released = import_sr3(load_file(GOLDEN / f"{NAME}.weights.safetensors"), num_groups=settings["norm_groups"])
    assert isinstance(released.denoiser, SR3Config)
    net = SR3UNet(released.denoiser)
    net.load_state_dict({name.removeprefix("denoiser."): value for name, value in released.weights.items()})
    return net.eval(), load_file(GOLDEN / f"{NAME}.io.safetensors")


@pytest.mark.parametrize(("config", "published", "ours"), PUBLISHED)
def test_a_published_network_is_within_five_percent_of_its_published_size(
    config: SR3Config, published: float, ours: int
) -> None:
    assert count(config) == ours == pytest.approx(published, rel=0.05)


@pytest.mark.parametrize(("config", "counted"), PUBLIC_CODE)
def test_a_released_network_has_the_parameters_of_the_public_code(config: SR3Config, counted: int) -> None:
    assert count(config) == counted


@torch.no_grad()
def test_the_released_network_gives_the_output_of_the_reference() -> None:
    net, io = golden()
    condition, x_t = io["net_input"].chunk(2, dim=1)
    found = net(x_t, io["net_noise_level"][:, 0], condition)
    assert (found - io["net_output"]).abs().max() < 1e-5


@pytest.mark.parametrize("resampling", [None, "down", "up"])
@pytest.mark.parametrize("config", [TINY, RELEASED])
@torch.no_grad()
def test_a_block_is_its_formula(config: SR3Config, resampling: Resampling | None) -> None:
    torch.manual_seed(0)
    block = Block(8, 16, config=config, resampling=resampling).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    w = dict(block.named_parameters())
    x, embedding = torch.randn(2, 8, 6, 4) * 1e-3, torch.randn(2, config.embedding_dim)  # small, so that eps counts

    def resized(x: Tensor) -> Tensor:
        if resampling == "down":
            return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
        return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3) if resampling == "up" else x

    def norm_silu(x: Tensor, name: str) -> Tensor:
        grouped = x.reshape(2, 4, -1)
        eps = 1e-5 if config.released else 1e-6
        mean, var = grouped.mean(2, keepdim=True), grouped.var(2, keepdim=True, unbiased=False)
        x = ((grouped - mean) / torch.sqrt(var + eps)).reshape(x.shape)
        x = x * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]
        return x * torch.sigmoid(x)

    h = F.conv2d(resized(norm_silu(x, "norm1")), w["conv1.weight"], w["conv1.bias"], padding=1)
    h = h + (embedding @ w["embed.weight"].T + w["embed.bias"])[:, :, None, None]
    h = F.conv2d(norm_silu(h, "norm2"), w["conv2.weight"], w["conv2.bias"], padding=1)
    skip = F.conv2d(resized(x), w["skip.weight"], w["skip.bias"])
    wanted = skip + h if config.released else (skip + h) / math.sqrt(2)
    found = block(x, embedding)
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("config", [TINY, RELEASED])
@torch.no_grad()
def test_attention_is_softmax_over_all_pixels_by_one_over_the_root_of_the_channels(config: SR3Config) -> None:
    torch.manual_seed(0)
    layer = Attention(16, config=config)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 16, 3, 5)
    q, k, v = layer.qkv(layer.norm(x)).reshape(2, 3, 16, 15).unbind(1)
    attention = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / 4, dim=2)
    h = layer.out(torch.einsum("bij,bcj->bci", attention, v).reshape(x.shape))
    wanted = x + h if config.released else (x + h) / math.sqrt(2)
    assert (layer(x, torch.empty(0)) - wanted).abs().max() < 1e-4
    assert (layer.qkv.bias is None) == config.released


@torch.no_grad()
def test_what_is_published_starts_as_skips_over_root_two_and_predicts_zero() -> None:
    torch.manual_seed(0)
    x, embedding = torch.randn(1, 16, 4, 4), torch.randn(1, TINY.embedding_dim)
    for layer in (Block(16, 16, config=TINY), Attention(16, config=TINY)):
        assert torch.allclose(layer(x, embedding), x / math.sqrt(2))
    assert torch.equal(SR3UNet(TINY)(*inputs(TINY)), torch.zeros(2, 3, 8, 12))
    assert SR3UNet(RELEASED)(*inputs(RELEASED)).abs().max() > 0


@pytest.mark.parametrize("factors", [(), (1,), (4,), (1, 2, 4)])
def test_attention_is_at_the_asked_levels_and_always_in_the_middle(factors: tuple[int, ...]) -> None:
    config = replace(TINY, attention_factors=factors, num_blocks=2)
    with torch.device("meta"):
        net = SR3UNet(config)
    widths = {1: 16, 2: 32, 4: 32}
    found = sorted(m.out.in_channels for way in (net.downs, net.ups) for m in way.modules() if isinstance(m, Attention))
    assert found == sorted(widths[f] for f in factors for _ in range(2 + 3))  # num_blocks down, one more up
    assert sum(isinstance(m, Attention) for m in net.middle.modules()) == 1


@pytest.mark.parametrize("config", [TINY, RELEASED])
@torch.no_grad()
def test_the_embedding_is_its_formula(config: SR3Config) -> None:
    # Released: one step short of the lowest frequency, and no activation at the end, of which DDPM has one.
    net, (_, position, _) = net_of(config), inputs(config)
    w = dict(net.embedding.named_parameters())
    angle = position[:, None] * torch.tensor([10.0 ** (-4 * k / (8 if config.released else 7)) for k in range(8)])
    hidden = F.silu(torch.cat([angle.sin(), angle.cos()], dim=1) @ w["0.weight"].T + w["0.bias"])
    wanted = hidden @ w["2.weight"].T + w["2.bias"]
    found = net.embedding(net.sines(position))
    assert found.shape == (2, config.embedding_dim)
    assert torch.allclose(found, wanted if config.released else F.silu(wanted), atol=1e-5)


@torch.no_grad()
def test_the_published_embedding_tells_apart_levels_that_the_public_codes_cannot() -> None:
    # Two of 100 levels, by their angles, are farther apart than the public code's most distant ones are of 2000.
    def distance(embedding: SinusoidalEmbedding, a: float, b: float) -> float:
        return float((embedding(torch.tensor([a])) - embedding(torch.tensor([b]))).norm())

    published = distance(SinusoidalEmbedding(64), 500.0, 510.0)
    assert published > 2 * distance(SinusoidalEmbedding(64, endpoint=False), 0.0, 1.0)


@pytest.mark.parametrize("config", [TINY, RELEASED])
@pytest.mark.parametrize(("height", "width"), [(4, 4), (4, 20), (12, 8)])
@torch.no_grad()
def test_any_size_that_is_a_multiple_of_the_stride_keeps_its_size(config: SR3Config, height: int, width: int) -> None:
    assert config.stride == 4
    x_t, position, condition = inputs(config, height=height, width=width)
    assert net_of(config)(x_t, position, condition).shape == x_t.shape


@torch.no_grad()
def test_without_condition_channels_it_is_a_plain_ddpm() -> None:
    config = replace(TINY, channels=1, condition_channels=0)
    net = net_of(config)
    x_t, position, nothing = inputs(config)
    assert nothing.shape[1] == 0 and net.first.in_channels == 1
    assert net(x_t, position, nothing).shape == x_t.shape


@pytest.mark.parametrize("config", [TINY, RELEASED, replace(TINY, channels=2, condition_channels=5)])
@torch.no_grad()
def test_the_output_depends_on_every_input_and_no_other_image_of_the_batch(config: SR3Config) -> None:
    net = net_of(config)
    x_t, position, condition = inputs(config)
    found = net(x_t, position, condition)
    assert (net(x_t[:1], position[:1], condition[:1]) - found[:1]).abs().max() < 1e-5
    assert (net(x_t.flip(0), position, condition) - found).abs().max() > 1e-3
    assert (net(x_t, position.flip(0), condition) - found).abs().max() > 1e-3
    for channel in range(config.condition_channels):
        other = condition.clone()
        other[:, channel] = 0
        assert (net(x_t, position, other) - found).abs().max() > 1e-3


@pytest.mark.parametrize("config", [TINY, RELEASED])
@torch.no_grad()
def test_one_position_and_one_condition_serve_the_whole_batch(config: SR3Config) -> None:
    net = net_of(config)
    x_t, position, condition = inputs(config)
    wanted = net(x_t, position[:1].expand(2), condition[:1].expand(2, -1, -1, -1))
    assert (net(x_t, position[:1], condition[:1]) - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("config", [TINY, RELEASED])
@torch.no_grad()
def test_dropout_is_for_training_alone(config: SR3Config) -> None:
    net, arguments = net_of(replace(config, dropout=0.5)), inputs(config)
    assert torch.equal(net(*arguments), net_of(config)(*arguments))
    net.train()
    assert not torch.equal(net(*arguments), net(*arguments))
    plain = net_of(config).train()
    assert torch.equal(plain(*arguments), plain(*arguments))


@pytest.mark.parametrize("config", [TINY, RELEASED, replace(TINY, multipliers=(1, 1, 2, 4), condition_channels=0)])
def test_the_gradient_reaches_every_parameter(config: SR3Config) -> None:
    net = net_of(config)
    net(*inputs(config, width=8)).square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_training_leaves_the_zero_start() -> None:
    # Zero convolutions hide what is before them for a step or two, not for ever.
    torch.manual_seed(0)
    net, arguments = SR3UNet(TINY), inputs(TINY)
    before = {name: value.clone() for name, value in net.named_parameters()}
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        (net(*arguments) - arguments[0]).abs().mean().backward()
        optimizer.step()
    assert [name for name, value in net.named_parameters() if torch.equal(value, before[name])] == []


@pytest.mark.parametrize("config", [TINY, RELEASED])
@torch.no_grad()
def test_the_memory_format_that_comes_in_goes_through_and_changes_no_number(config: SR3Config) -> None:
    net, arguments = net_of(config), inputs(config)
    wanted = net(*arguments)
    assert wanted.is_contiguous()
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    formats = []
    for module in net.modules():
        if isinstance(module, Block | Attention):
            module.register_forward_hook(
                lambda _, __, out: formats.append(out.is_contiguous(memory_format=torch.channels_last))
            )
    x_t, position, condition = arguments
    found = net(x_t.contiguous(memory_format=torch.channels_last), position, condition)
    assert all(formats) and len(formats) > 10
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("config", [TINY, RELEASED])
@torch.no_grad()
def test_bfloat16_by_autocast_or_of_the_whole_network_is_close_to_float32(config: SR3Config) -> None:
    net, arguments = net_of(config), inputs(config, height=16, width=16)
    x_t, position, condition = arguments
    wanted = net(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [net(*arguments)]
    found.append(net.bfloat16()(x_t.bfloat16(), position, condition.bfloat16()))
    for image in found:
        assert image.dtype == torch.bfloat16
        assert (image.float() - wanted).square().mean().sqrt() < 0.02 * wanted.square().mean().sqrt()


def test_the_released_variation_has_other_names_and_the_same_face() -> None:
    nets = [SR3UNet(config) for config in (TINY, RELEASED)]
    names = [set(net.state_dict()) for net in nets]
    assert names[0] != names[1]
    assert nets[0](*inputs(TINY)).shape == nets[1](*inputs(RELEASED)).shape


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"channels": 0}, r"channels \(0\) must be at least 1"),
        ({"condition_channels": -1}, r"condition_channels \(-1\) must be at least 0"),
        ({"hidden": 2, "num_groups": 1}, r"hidden \(2\) must be at least 4"),
        ({"hidden": 5, "num_groups": 5}, r"hidden \(5\) must be even"),
        ({"num_blocks": 0}, r"num_blocks \(0\) must be at least 1"),
        ({"multipliers": ()}, r"multipliers \(\(\)\)"),
        ({"multipliers": (1, 0)}, r"multipliers \(\(1, 0\)\)"),
        ({"num_groups": 0}, r"num_groups \(0\)"),
        ({"num_groups": 3}, r"hidden \(16\) must be a multiple of num_groups \(3\)"),
        ({"dropout": 1.0}, r"dropout \(1.0\)"),
        ({"attention_factors": (8,)}, r"attention_factors \(\(8,\)\) must be among the levels' factors \[1, 2, 4\]"),
    ],
)
def test_a_setting_that_cannot_be_is_an_error_that_names_it(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **fields)  # type: ignore[arg-type]

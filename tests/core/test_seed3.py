"""Laws of the simple SR3 and of its plain baseline: their sizes and their numbers."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffsr_core.networks.seed3 import Seed3Config, Seed3UNet

BEFORE, BETWEEN, AFTER, PLAIN = KINDS = [
    Seed3Config(embedding_position="before"),
    Seed3Config(embedding_position="between"),
    Seed3Config(embedding_position="after"),
    Seed3Config(blocks="plain", embedding_position="between"),
]
Images = tuple[Tensor, Tensor, Tensor]
NAMES = ["before", "between", "after", "plain"]
every_kind = pytest.mark.parametrize("config", KINDS, ids=NAMES)


def small(config: Seed3Config) -> Seed3Config:
    """The same kind with five levels still, and other numbers of channels everywhere, so that none is confused."""
    return replace(config, channels=2, condition_channels=3, widths=(4, 6, 10, 8, 12), embedding_dim=8)


def network(config: Seed3Config) -> Seed3UNet:
    """A network as alive as a trained one: no level fades, and no normalisation is still at its initial 0 and 1."""
    torch.manual_seed(0)
    net = Seed3UNet(config)
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.5, 0.5)
            module.momentum = 1.0  # the running statistics become those of the one batch below
    with torch.no_grad():
        net(*inputs(config, seed=2))
    return net


def inputs(config: Seed3Config, *, batch: int = 3, height: int = 32, width: int = 48, seed: int = 1) -> Images:
    generator = torch.Generator().manual_seed(seed)
    x_t = torch.randn(batch, config.channels, height, width, generator=generator)
    condition = torch.randn(batch, config.condition_channels, height, width, generator=generator)
    return x_t, torch.tensor([0.0, 17.0, 999.0])[:batch], condition


# --- the size, counted on paper from the listing ---


def linear(fan_in: int, fan_out: int) -> int:
    return (fan_in + 1) * fan_out


def conv(fan_in: int, fan_out: int, size: int) -> int:
    return (fan_in * size * size + 1) * fan_out


def count(config: Seed3Config) -> int:
    """Weights of a network: each term is one line of the source's listing, with its own letters."""
    e, w = config.embedding_dim, config.widths
    total = linear(e, e) + conv(config.condition_channels + config.channels, w[0], 3) + conv(w[0], config.channels, 1)
    for i, o in zip(w[:-1], w[1:], strict=True):
        if config.blocks == "plain":
            two_norms = 2 * 2 * o
            total += linear(e, o) + conv(i, o, 3) + conv(o, o, 3) + two_norms + conv(o, o, 4)
        else:
            t = i if config.embedding_position == "before" else o
            total += linear(e, t) + conv(i, o, 1) + conv(i, o, 3) + conv(o, o, 3)
    for i, o in zip(w[:0:-1], w[-2::-1], strict=True):
        if config.blocks == "plain":
            two_norms = 2 * 2 * o
            total += linear(e, o) + conv(2 * i, o, 3) + conv(o, o, 3) + two_norms + conv(o, o, 4)
        else:
            t = 2 * i if config.embedding_position == "before" else o
            skip = conv(i, i, 2) + conv(i, o, 1)
            norms = 2 * 2 * i + 2 * o
            total += linear(e, t) + skip + norms + conv(2 * i, 2 * i, 2) + conv(2 * i, o, 3) + conv(o, o, 3)
    return total


@every_kind
def test_a_network_has_the_weights_that_its_listing_has(config: Seed3Config) -> None:
    for other in (config, small(config), replace(config, embedding_dim=128, channels=3, condition_channels=3)):
        with torch.device("meta"):
            net = Seed3UNet(other)
        assert sum(p.numel() for p in net.parameters()) == count(other)


def test_the_published_networks_have_these_many_weights() -> None:
    assert [count(config) for config in KINDS] == [63_898_017, 63_834_657, 63_834_657, 62_438_177]


# --- the numbers: the source's listing once more, as plain functions of the weights by name ---


class Listing:
    """The network as functions: no modules, and the arithmetic of each layer written out where torch allows it."""

    def __init__(self, net: Seed3UNet) -> None:
        self.weights, self.config, self.training = net.state_dict(), net.config, net.training

    def __call__(self, x_t: Tensor, position: Tensor, condition: Tensor) -> Tensor:
        half = self.config.embedding_dim // 2
        angle = position[:, None] * torch.tensor([10000.0 ** (-i / (half - 1)) for i in range(half)])
        t = self.linear("embedding.1", torch.cat([angle.sin(), angle.cos()], dim=1)).clamp(min=0)
        x = self.conv("conv0", torch.cat([condition, x_t], dim=1))
        down, up = (self.plain, self.plain) if self.config.blocks == "plain" else (self.biggan_down, self.biggan_up)
        residuals = []
        for i in range(len(self.config.widths) - 1):
            x = down(f"downs.{i}.", x, t)
            residuals.append(x)
        for i, residual in enumerate(reversed(residuals)):
            x = up(f"ups.{i}.", torch.cat([x, residual], dim=1), t)
        return self.conv("output", x)

    def biggan_down(self, name: str, x: Tensor, t: Tensor) -> Tensor:
        skip = self.mean_of_four(self.conv(f"{name}skip", x))
        x = self.conv(f"{name}conv1", self.embed(name, x, t, "before").clamp(min=0))
        x = self.conv(f"{name}conv2", self.embed(name, x, t, "between").clamp(min=0))
        # Here `after` is added before the pooling, in the network behind it: pooling keeps a constant.
        return self.mean_of_four(self.embed(name, x, t, "after")) + skip * 0.5**0.5

    def biggan_up(self, name: str, x: Tensor, t: Tensor) -> Tensor:
        skip = self.conv(f"{name}skip", self.four_of_one(f"{name}skip_upsample", x[:, : x.shape[1] // 2]))
        x = self.norm(f"{name}norm1", self.embed(name, x, t, "before")).clamp(min=0)
        x = self.conv(f"{name}conv1", self.four_of_one(f"{name}upsample", x))
        x = self.norm(f"{name}norm2", self.embed(name, x, t, "between")).clamp(min=0)
        return self.embed(name, self.conv(f"{name}conv2", x), t, "after") + skip * 0.5**0.5

    def plain(self, name: str, x: Tensor, t: Tensor) -> Tensor:
        x = self.norm(f"{name}norm1", self.conv(f"{name}conv1", x).clamp(min=0))
        x = x + self.linear(f"{name}embed.linear", t).clamp(min=0)[:, :, None, None]
        x = self.norm(f"{name}norm2", self.conv(f"{name}conv2", x).clamp(min=0))
        resample = F.conv2d if name.startswith("downs") else F.conv_transpose2d
        return resample(x, *self.pair(f"{name}resample"), stride=2, padding=1)

    def embed(self, name: str, x: Tensor, t: Tensor, here: str) -> Tensor:
        if here != self.config.embedding_position:
            return x
        return x + self.linear(f"{name}embed.linear", t).clamp(min=0)[:, :, None, None]

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        return self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]

    def linear(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.pair(name)
        return x @ weight.T + bias

    def conv(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.pair(name)
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)

    def norm(self, name: str, x: Tensor) -> Tensor:
        gain, offset = (v[:, None, None] for v in self.pair(name))
        mean, var = (self.weights[f"{name}.running_{v}"][:, None, None] for v in ("mean", "var"))
        if self.training:
            mean = x.mean(dim=(0, 2, 3), keepdim=True)
            var = (x - mean).square().mean(dim=(0, 2, 3), keepdim=True)
        return (x - mean) / (var + 1e-5).sqrt() * gain + offset

    @staticmethod
    def mean_of_four(x: Tensor) -> Tensor:
        return (x[..., ::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, ::2] + x[..., 1::2, 1::2]) / 4

    def four_of_one(self, name: str, x: Tensor) -> Tensor:
        """A transposed 2x2 convolution of stride 2: each pixel becomes four that overlap with no other."""
        weight, bias = self.pair(name)
        four = torch.einsum("bihw,ioyx->bohywx", x, weight)
        return four.reshape(len(x), weight.shape[1], 2 * x.shape[2], 2 * x.shape[3]) + bias[:, None, None]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@every_kind
@torch.no_grad()
def test_a_network_computes_what_its_listing_computes(config: Seed3Config, training: bool) -> None:
    net = network(small(config)).train(training)
    listing, x = Listing(net), inputs(net.config)
    expected = listing(*x)
    found = net(*x)
    assert found.shape == x[0].shape and expected.std() > 0.05
    assert (found - expected).abs().max() < 3e-5 * expected.abs().max()


@every_kind
def test_the_gradient_reaches_every_weight(config: Seed3Config) -> None:
    # With running statistics: those of a batch take each convolution's bias away again, so its gradient is rightly 0.
    net = network(small(config)).eval()
    net(*inputs(net.config)).square().mean().backward()
    silent = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-3]
    assert silent == []


@every_kind
@torch.no_grad()
def test_a_sample_depends_on_its_batch_while_training_and_never_after(config: Seed3Config) -> None:
    net = network(small(config))
    x = inputs(net.config)
    alone = [v[:1] for v in x]
    net.eval()
    assert (net(*x)[:1] - net(*alone)).abs().max() < 1e-4
    net.train()
    assert (net(*x)[:1] - net(*alone)).abs().max() > 0.1


@every_kind
@torch.no_grad()
def test_sizes_are_multiples_of_the_stride_and_no_other(config: Seed3Config) -> None:
    net = network(small(config)).eval()
    assert net.config.stride == 16 and replace(net.config, widths=(4, 8)).stride == 2
    x_t, position, condition = inputs(net.config, batch=1, height=16, width=80)
    assert net(x_t, position, condition).shape == x_t.shape
    for crop in (slice(8), slice(15)):
        with pytest.raises(ValueError, match=r"size \((8|15) x 80\) must be a multiple of the stride \(16\)"):
            net(x_t[:, :, crop], position, condition[:, :, crop])
    with pytest.raises(ValueError, match=r"size \(16 x 72\)"):
        net(x_t[..., :72], position, condition[..., :72])


@torch.no_grad()
def test_a_network_of_no_condition_reads_only_what_is_diffused() -> None:
    net = network(replace(small(BEFORE), condition_channels=0)).eval()
    x = inputs(net.config)
    assert x[2].shape[1] == 0 and sum(p.numel() for p in net.parameters()) == count(net.config)
    assert (net(*x) - Listing(net)(*x)).abs().max() < 1e-4


def test_the_defaults_are_the_published_settings() -> None:
    assert Seed3Config() == BEFORE
    assert (BEFORE.kind, BEFORE.blocks, BEFORE.stride) == ("seed3", "biggan", 16)


WRONG = [
    ({"kind": "sr3"}, r"kind \('sr3'\) must be one of seed3"),
    ({"blocks": "bigan"}, r"blocks \('bigan'\) must be one of biggan, plain"),
    ({"embedding_position": "last"}, r"embedding_position \('last'\) must be one of before, between, after"),
    ({"blocks": "plain"}, r"embedding_position \('before'\) must be 'between' when blocks is 'plain'"),
    ({"channels": 0}, r"channels \(0\) must be at least 1"),
    ({"condition_channels": -1}, r"condition_channels \(-1\) must be 0 \(no condition\) or more"),
    ({"widths": (64,)}, r"widths \(\(64,\)\) must be two or more"),
    ({"widths": (64, 0)}, r"widths \(\(64, 0\)\) must be two or more"),
    ({"embedding_dim": 33}, r"embedding_dim \(33\) must be even"),
    ({"embedding_dim": 2}, r"embedding_dim \(2\) must be even and at least 4"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG, ids=[str(settings) for settings, _ in WRONG])
def test_a_wrong_setting_is_refused_by_name_value_and_rule(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Seed3Config(**settings)  # type: ignore[arg-type]

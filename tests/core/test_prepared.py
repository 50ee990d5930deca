"""Laws of a prepared network: the results of the network it was made from, whatever it was asked before."""

from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from diffsr_core.networks.rrdb import RRDBConfig, RRDBNet
from diffsr_core.networks.sr3 import SR3Config, SR3UNet
from diffsr_core.networks.srdiff import SRDiffConfig, SRDiffUNet
from diffsr_core.prepared import PackedConv, prepared

Precision = Literal["float32", "bf16"]
SR3 = SR3Config(hidden=32, multipliers=(1, 2, 2), num_blocks=1, attention_factors=(2,), num_groups=8)
SRDIFF = SRDiffConfig(hidden=16, multipliers=(1, 2), condition_channels=6, condition_scale=4)
RRDB = RRDBConfig(scale=4, num_features=8, num_blocks=2)


def network_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    network = {"sr3": lambda: SR3UNet(SR3), "srdiff": lambda: SRDiffUNet(SRDIFF), "rrdb": lambda: RRDBNet(RRDB)}[name]()
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and not module.weight.any():
            module.reset_parameters()
    return network.eval()


def inputs_of(name: str, size: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(2, 3, size, size, generator=generator)
    if name == "rrdb":
        return (x,)
    channels, shrunk = (3, size) if name == "sr3" else (6, size // 4)
    return x, torch.tensor([40.0, 300.0]), torch.randn(2, channels, shrunk, shrunk, generator=generator)


def ask(network: nn.Module, inputs: tuple[Tensor, ...], *, precision: Precision) -> Tensor:
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        out = network(*inputs)
    return (out if isinstance(out, Tensor) else out[1]).float()


def psnr(found: Tensor, wanted: Tensor) -> float:
    return float(10 * torch.log10((wanted.max() - wanted.min()) ** 2 / (found - wanted).square().mean().clamp(1e-30)))


@pytest.mark.parametrize("name", ["sr3", "srdiff", "rrdb"])
@pytest.mark.parametrize(("precision", "least_db"), [("float32", 110), ("bf16", 40)])
def test_a_prepared_network_gives_the_results_of_the_plain_one(
    name: str, precision: Precision, least_db: float
) -> None:
    network, inputs = network_of(name), inputs_of(name, 16)
    before = [parameter.clone() for parameter in network.parameters()]
    fast = prepared(network, precision=precision)
    assert psnr(ask(fast, inputs, precision=precision), ask(network, inputs, precision="float32")) > least_db
    assert all(map(torch.equal, before, network.parameters()))  # and leaves that one as it was
    assert not any(type(module) is nn.Conv2d for module in fast.modules())


def test_its_casts_are_those_of_autocast() -> None:
    network, inputs = network_of("sr3"), inputs_of("sr3", 16)
    wanted = ask(network.to(memory_format=torch.channels_last), inputs, precision="bf16")
    assert psnr(ask(prepared(network, precision="bf16"), inputs, precision="bf16"), wanted) > 80


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_its_bits_do_not_depend_on_the_shapes_that_came_before(precision: Precision) -> None:
    network = network_of("sr3")
    fresh, busy = prepared(network, precision=precision), prepared(network, precision=precision)
    wanted = ask(fresh, inputs_of("sr3", 16), precision=precision)
    for size in (64, 8, 16):
        found = ask(busy, inputs_of("sr3", size), precision=precision)
    assert torch.equal(found, wanted)


def test_weights_are_packed_again_only_for_another_shape() -> None:
    conv = PackedConv(nn.Conv2d(4, 6, 3, padding=1))
    with torch.inference_mode():
        kept = [id(conv(torch.randn(1, 4, size, size)) is not None and conv.packed) for size in (8, 8, 12, 12, 8)]
        assert conv.packed is not None and conv.packed[0] == (1, 4, 8, 8)
    assert kept[0] == kept[1] and kept[2] == kept[3] and kept[1] != kept[2]


def test_a_prepared_network_that_has_run_can_be_prepared_again() -> None:
    fast, inputs = prepared(network_of("sr3"), precision="bf16"), inputs_of("sr3", 16)
    wanted = ask(fast, inputs, precision="bf16")
    assert torch.equal(ask(prepared(fast, precision="bf16"), inputs, precision="bf16"), wanted)

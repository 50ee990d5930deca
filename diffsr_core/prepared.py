"""A network made ready to be asked many times: what `nn.Conv2d` and autocast do at every call is done once."""

import copy
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


def prepared(network: Network, *, precision: Literal["float32", "bf16"], device: str = "cpu") -> Network:
    """Return a copy in eval mode, for inference: channels_last; bf16 weights cast, and on a CPU packed, once.

    It is called under the autocast of its precision, and makes the same casts. Its bits depend on the weights, the
    input and its shape alone. The gain of packing is that of a small batch: 10 % at one image of 128 px, none at four.
    """
    network = copy.deepcopy(network).eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if precision == "bf16":
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                module.to(torch.bfloat16)
    if torch.device(device).type == "cpu" and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        for parent in list(network.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Conv2d):
                    setattr(parent, name, PackedConv(child))
    return network


class PackedConv(nn.Module):
    """A convolution whose weights lie as oneDNN computes with them; `nn.Conv2d` lays them so again at every call.

    They are packed anew when x comes in another shape: for another they can be 20 times slower, and the bits would
    depend on what ran before.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        zeros = conv.padding_mode == "zeros"
        self.margin = [] if zeros else conv._reversed_padding_repeated_twice
        self.margin_mode = conv.padding_mode
        self.how = ((0, 0) if self.margin else conv.padding, conv.stride, conv.dilation, conv.groups)
        self.weight, self.bias = conv.weight.detach(), conv.bias
        self.packed: tuple[torch.Size, Tensor] | None = None  # one tuple, so that threads see both of one call

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "packed": None}  # which nothing can copy

    def forward(self, x: Tensor) -> Tensor:
        if self.margin:
            x = nn.functional.pad(x, self.margin, mode=self.margin_mode)
        x = x.to(self.weight.dtype, memory_format=torch.channels_last)  # the kernel takes no other for these weights
        packed = self.packed
        if packed is None or packed[0] != x.shape:
            weight = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *self.how, x.shape)
            packed = self.packed = (x.shape, weight)
        out: Tensor = torch.ops.mkldnn._convolution_pointwise(x, packed[1], self.bias, *self.how, "none", [], "")
        return out

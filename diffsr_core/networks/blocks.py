"""Layers that the networks share."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

Padding = Literal["zeros", "reflect"]


class SinusoidalEmbedding(nn.Module):
    """Position (B,) -> (B, dim): sines then cosines at frequencies from 1 down to 1/10000 (Vaswani et al. 2017).

    endpoint: as in `numpy.linspace`, whether 1/10000 itself is the last frequency; DDPM takes it, WaveGrad does not.
    """

    def __init__(self, dim: int, *, endpoint: bool = True) -> None:
        super().__init__()
        self.dim = dim
        self.endpoint = endpoint

    def forward(self, position: Tensor) -> Tensor:
        half = self.dim // 2
        exponent = torch.arange(half, device=position.device, dtype=torch.float32) / (half - self.endpoint)
        angle = position.float()[:, None] * torch.exp(exponent * -math.log(10000.0))
        return torch.cat([angle.sin(), angle.cos()], dim=1)


def conv3(in_channels: int, out_channels: int, *, stride: int = 1, padding_mode: Padding = "zeros") -> nn.Conv2d:
    """Return a 3x3 convolution that keeps the size (or divides it by the stride)."""
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, padding_mode=padding_mode)


class ResidualBlock(nn.Module):
    """SRDiff's residual block: conv, Mish, + embedding, conv, Mish, + skip; no normalisation; reflection padding."""

    def __init__(self, in_channels: int, out_channels: int, *, embedding_dim: int) -> None:
        super().__init__()
        self.conv1 = conv3(in_channels, out_channels, padding_mode="reflect")
        self.conv2 = conv3(out_channels, out_channels, padding_mode="reflect")
        self.embed = nn.Linear(embedding_dim, out_channels)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = nn.functional.mish(self.conv1(x))
        h = h + self.embed(nn.functional.mish(embedding))[:, :, None, None]
        out: Tensor = nn.functional.mish(self.conv2(h)) + self.skip(x)
        return out

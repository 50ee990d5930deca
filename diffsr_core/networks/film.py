"""EDSR's residual network as a denoiser: each block is told the noise level by a scale and a shift of its features.

At one resolution throughout, which in space-to-depth by the scale is that of the LR: its cost is that of the regression
network beside it. Source of the modulation: Perez et al. 2018 (FiLM), arXiv:1709.07871.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from diffsr_core.networks.blocks import SinusoidalEmbedding, conv3


@dataclass(frozen=True, kw_only=True)
class FiLMConfig:
    """Settings. channels: of what is diffused (3, or 3 * f^2 in space-to-depth by f)."""

    kind: Literal["film"] = "film"
    channels: int = 48
    condition_channels: int = 64
    hidden: int = 64
    num_blocks: int = 8

    def __post_init__(self) -> None:
        for name, value in (
            ("channels", self.channels),
            ("condition_channels", self.condition_channels),
            ("num_blocks", self.num_blocks),
        ):
            if value < 1:
                raise ValueError(f"{name} ({value}) must be at least 1; without a condition use an sr3 denoiser")
        if self.hidden < 4 or self.hidden % 2:
            raise ValueError(f"hidden ({self.hidden}) must be even and at least 4: the embedding is sines and cosines")

    @property
    def stride(self) -> int:
        """Sizes of what is diffused must be multiples of this."""
        return 1


class FiLMBlock(nn.Module):
    """x + conv(relu(film(conv(x)))), film(h) = h (1 + scale) + shift."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.conv1 = conv3(hidden, hidden)
        self.conv2 = conv3(hidden, hidden)
        self.film = nn.Linear(hidden, 2 * hidden)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.film(embedding)[:, :, None, None].chunk(2, dim=1)
        h = torch.addcmul(shift, self.conv1(x), 1 + scale).relu_()
        out: Tensor = self.conv2(h).add_(x)
        return out


class FiLMNet(nn.Module):
    """(x_t (B, C, h, w), position (B,), condition (B, F, h, w)) -> prediction (B, C, h, w)."""

    def __init__(self, config: FiLMConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden
        self.embedding = nn.Sequential(SinusoidalEmbedding(hidden), nn.Linear(hidden, hidden), nn.SiLU())
        self.first = conv3(config.channels + config.condition_channels, hidden)
        self.blocks = nn.ModuleList(FiLMBlock(hidden) for _ in range(config.num_blocks))
        self.trunk = conv3(hidden, hidden)
        self.last = conv3(hidden, config.channels)
        with torch.no_grad():
            for block in self.blocks:
                block.conv2.weight.mul_(0.3)  # type: ignore[union-attr,operator]

    def forward(self, x_t: Tensor, position: Tensor, condition: Tensor) -> Tensor:
        embedding = self.embedding(position)
        first = self.first(torch.cat([x_t, condition.to(x_t.dtype)], dim=1))
        h = first
        for block in self.blocks:
            h = block(h, embedding)
        out: Tensor = self.last(first + self.trunk(h))
        return out

"""A plain residual network at LR resolution, as encoder and, by itself, as regression.

Source: Lim et al. 2017 (EDSR), arXiv:1707.02921, sec. 3: no normalisation. The image is enlarged by one pixel shuffle
and added to bicubic, so that nothing runs at HR resolution.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from diffsr_core.networks.blocks import conv3
from diffsr_core.networks.encoder import EncoderConfig
from diffsr_core.resize import upscale


@dataclass(frozen=True, kw_only=True)
class EDSRConfig(EncoderConfig):
    """Settings of the network."""

    kind: Literal["edsr"] = "edsr"
    num_features: int = 64
    num_blocks: int = 12

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("num_features", self.num_features), ("num_blocks", self.num_blocks)):
            if value < 1:
                raise ValueError(f"{name} ({value}) must be at least 1; use 64 features and 12 blocks")

    @property
    def feature_scale(self) -> int:
        """Feature pixels per LR pixel along one axis."""
        return 1

    @property
    def condition_channels(self) -> int:
        """Channels of the condition: the last feature map, from which the image is made."""
        return self.num_features


class ConvBlock(nn.Module):
    """x + conv(relu(conv(x)))."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.conv1 = conv3(num_features, num_features)
        self.conv2 = conv3(num_features, num_features)

    def forward(self, x: Tensor) -> Tensor:
        # In place, as nothing else reads a convolution's output: 10 % of a block's time on a CPU.
        out: Tensor = self.conv2(self.conv1(x).relu_()).add_(x)
        return out


class EDSR(nn.Module):
    """LR (B, C + E, h, w) in [-1, 1] -> (features (B, F, h, w), image (B, C, h * scale, w * scale), not clipped)."""

    def __init__(self, config: EDSRConfig) -> None:
        super().__init__()
        self.config = config
        features = config.num_features
        self.first = conv3(config.lr_channels, features)
        self.blocks = nn.Sequential(*(ConvBlock(features) for _ in range(config.num_blocks)))
        self.trunk = conv3(features, features)
        self.last = conv3(features, config.channels * config.scale**2)
        nn.init.zeros_(self.last.weight)  # the untrained network is then exactly bicubic
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]
        with torch.no_grad():  # a sum of many blocks then begins at about the size of one of them
            for block in self.blocks:
                block.conv2.weight.mul_(0.3)  # type: ignore[union-attr,operator]

    def forward(self, lr: Tensor) -> tuple[Tensor, Tensor]:
        first = self.first((lr + 1) / 2)
        features = first + self.trunk(self.blocks(first))
        residual = nn.functional.pixel_shuffle(self.last(features), self.config.scale)
        return features, residual + upscale(lr[:, : self.config.channels], self.config.scale)

"""The RRDB network: SRDiff's condition encoder and, by itself, the regression baseline.

Source: Wang et al. 2018 (ESRGAN), sec. 3.1, as SRDiff (Li et al. 2021) uses it: growth nf/2, residual scale 0.2.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from diffsr_core.networks.blocks import conv3
from diffsr_core.networks.encoder import EncoderConfig
from diffsr_core.resize import upscale


@dataclass(frozen=True, kw_only=True)
class RRDBConfig(EncoderConfig):
    """Settings of the network.

    head: `nearest` is the published one (nearest x2 and a convolution, log2(scale) times, all at growing resolution);
    `pixel_shuffle` computes everything at LR resolution and adds the bicubic image: 16 times cheaper at scale 4.
    """

    kind: Literal["rrdb"] = "rrdb"
    num_features: int = 32
    num_blocks: int = 8
    head: Literal["nearest", "pixel_shuffle"] = "nearest"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_blocks < 2:
            raise ValueError(
                f"num_blocks ({self.num_blocks}) must be at least 2: the condition is every third map; use 2"
            )
        if self.head == "nearest" and self.scale not in (1, 2, 4, 8):
            raise ValueError(f"scale ({self.scale}) must be 1, 2, 4 or 8 for the nearest head; use head=pixel_shuffle")

    @property
    def feature_scale(self) -> int:
        """Feature pixels per LR pixel along one axis."""
        return 1

    @property
    def condition_channels(self) -> int:
        """Channels of the condition: every third of the num_blocks + 1 feature maps, beginning with the third."""
        return self.num_features * ((self.num_blocks + 1) // 3)


class DenseBlock(nn.Module):
    """Five convolutions, each of which sees all that came before; the result is added at 0.2."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        growth = num_features // 2
        self.convs = nn.ModuleList(
            conv3(num_features + i * growth, growth if i < 4 else num_features) for i in range(5)
        )

    def forward(self, x: Tensor) -> Tensor:
        seen = x
        for conv in self.convs[:-1]:
            seen = torch.cat([seen, nn.functional.leaky_relu(conv(seen), 0.2)], dim=1)
        out: Tensor = self.convs[-1](seen) * 0.2 + x
        return out


class RRDBNet(nn.Module):
    """LR (B, C + E, h, w) in [-1, 1] -> (features (B, F, h, w), image (B, C, h * scale, w * scale), not clipped)."""

    def __init__(self, config: RRDBConfig) -> None:
        super().__init__()
        self.config = config
        nf = config.num_features
        self.conv_first = conv3(config.lr_channels, nf)
        self.trunk = nn.ModuleList(nn.Sequential(*(DenseBlock(nf) for _ in range(3))) for _ in range(config.num_blocks))
        self.trunk_conv = conv3(nf, nf)
        if config.head == "nearest":
            self.upconvs = nn.ModuleList(conv3(nf, nf) for _ in range(config.scale.bit_length() - 1))
            self.hr_conv = conv3(nf, nf)
            self.conv_last = conv3(nf, config.channels)
        else:
            self.conv_last = conv3(nf, config.channels * config.scale**2)
            nn.init.zeros_(self.conv_last.weight)  # the untrained network is then exactly bicubic
            nn.init.zeros_(self.conv_last.bias)  # type: ignore[arg-type]

    def features(self, lr: Tensor) -> list[Tensor]:
        """Return num_blocks + 1 maps (B, nf, h, w): each block's output, then the trunk's sum."""
        first = self.conv_first((lr + 1) / 2)
        maps = []
        h = first
        for block in self.trunk:
            h = block(h) * 0.2 + h
            maps.append(h)
        return [*maps, first + self.trunk_conv(h)]

    def forward(self, lr: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.features(lr)
        return torch.cat(maps[2::3], dim=1), self.image(maps[-1], lr)

    def image(self, h: Tensor, lr: Tensor) -> Tensor:
        """Return the regression image (B, C, h * scale, w * scale) from the last feature map."""
        if self.config.head == "pixel_shuffle":
            residual: Tensor = nn.functional.pixel_shuffle(self.conv_last(h), self.config.scale)
            return residual + upscale(lr[:, : self.config.channels], self.config.scale)
        for conv in self.upconvs:
            h = nn.functional.leaky_relu(conv(nn.functional.interpolate(h, scale_factor=2, mode="nearest")), 0.2)
        image: Tensor = self.conv_last(nn.functional.leaky_relu(self.hr_conv(h), 0.2))
        return image * 2 - 1

"""SRDiff's conditional noise predictor, at image resolution as published or in space-to-depth.

Source: Li et al. 2021, arXiv:2104.14951, sec. 3.3 and the released weights' shapes.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from diffsr_core.networks.blocks import ResidualBlock, SinusoidalEmbedding, conv3


@dataclass(frozen=True, kw_only=True)
class SRDiffConfig:
    """Settings of the U-Net.

    channels: of what is diffused (3, or 3 * f^2 in space-to-depth by f). condition_scale: diffused pixels per LR pixel
    along one axis. full_resolution_skip: the published network stores the first level's features and never reads
    them; True reads them (a better network, but released weights no longer fit).
    """

    kind: Literal["srdiff"] = "srdiff"
    channels: int = 3
    hidden: int = 64
    multipliers: tuple[int, ...] = (1, 2, 2, 4)
    condition_channels: int = 96
    condition_scale: int = 8
    full_resolution_skip: bool = False

    def __post_init__(self) -> None:
        for name, value in (("channels", self.channels), ("condition_channels", self.condition_channels)):
            if value < 1:
                raise ValueError(f"{name} ({value}) must be at least 1; without a condition use an sr3 denoiser")
        if self.hidden < 4 or self.hidden % 2:
            raise ValueError(f"hidden ({self.hidden}) must be even and at least 4: the embedding is sines and cosines")
        if self.multipliers[:1] != (1,) or min(self.multipliers) < 1:
            raise ValueError(f"multipliers ({self.multipliers}) must be positive and begin with 1; use (1, 2)")
        if self.condition_scale < 1 or (self.condition_scale > 1 and self.condition_scale % 2):
            raise ValueError(
                f"condition_scale ({self.condition_scale}) must be 1 or even, as its transposed convolution pads by "
                "half; use space-to-depth by the scale, which makes it 1"
            )

    @property
    def stride(self) -> int:
        """Sizes of what is diffused must be multiples of this."""
        return int(2 ** (len(self.multipliers) - 1))

    @property
    def smallest(self) -> int:
        """Sizes must be at least this: reflection needs two pixels at the coarsest level."""
        return 2 * self.stride


class SRDiffUNet(nn.Module):
    """(x_t (B, C, h, w), position (B,), condition (B, F, h / s, w / s)) -> prediction (B, C, h, w)."""

    def __init__(self, config: SRDiffConfig) -> None:
        super().__init__()
        self.config = config
        dim, s = config.hidden, config.condition_scale
        widths = [dim * m for m in config.multipliers]
        self.embedding = nn.Sequential(
            SinusoidalEmbedding(dim), nn.Linear(dim, dim * 4), nn.Mish(), nn.Linear(dim * 4, dim)
        )
        self.condition = (
            conv3(config.condition_channels, dim)
            if s == 1
            else nn.ConvTranspose2d(config.condition_channels, dim, 2 * s, s, s // 2)
        )
        self.downs = nn.ModuleList()
        for i, (fan_in, width) in enumerate(zip([config.channels, *widths], widths, strict=False)):
            last = i == len(widths) - 1
            self.downs.append(
                nn.ModuleList(
                    [
                        ResidualBlock(fan_in, width, embedding_dim=dim),
                        ResidualBlock(width, width, embedding_dim=dim),
                        nn.Identity() if last else conv3(width, width, stride=2, padding_mode="reflect"),
                    ]
                )
            )
        self.middle = nn.ModuleList(ResidualBlock(widths[-1], widths[-1], embedding_dim=dim) for _ in range(2))
        self.ups = nn.ModuleList(
            nn.ModuleList(
                [
                    ResidualBlock(2 * wide, narrow, embedding_dim=dim),
                    ResidualBlock(narrow, narrow, embedding_dim=dim),
                    nn.ConvTranspose2d(narrow, narrow, 4, 2, 1),
                ]
            )
            for wide, narrow in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.merge = ResidualBlock(2 * dim, dim, embedding_dim=dim) if config.full_resolution_skip else None
        self.final = nn.ModuleList([conv3(dim, dim, padding_mode="reflect"), nn.Conv2d(dim, config.channels, 1)])

    def forward(self, x_t: Tensor, position: Tensor, condition: Tensor) -> Tensor:
        if min(x_t.shape[2:]) < self.config.smallest:
            raise ValueError(
                f"x_t is {tuple(x_t.shape[2:])} px: each side must be at least {self.config.smallest}; "
                "use a larger tile or patch"
            )
        embedding = self.embedding(position)
        h, skips = x_t, []
        for i, level in enumerate(self.downs):
            block1, block2, down = _level(level)
            h = block2(block1(h, embedding), embedding)
            if i == 0:  # 4 % (CelebA) to 13 % (DF2K) of a step; kept between steps it would take 2.7 times the memory
                h = h + self.condition(condition)
            skips.append(h)
            h = down(h)
        for block in self.middle:
            h = block(h, embedding)
        for level in self.ups:
            block1, block2, up = _level(level)
            h = up(block2(block1(torch.cat([h, skips.pop()], dim=1), embedding), embedding))
        if self.merge is not None:
            h = self.merge(torch.cat([h, skips.pop()], dim=1), embedding)
        out: Tensor = self.final[1](nn.functional.mish(self.final[0](h)))
        return out


def _level(modules: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module]:
    assert isinstance(modules, nn.ModuleList)
    block1, block2, resample = modules
    return block1, block2, resample

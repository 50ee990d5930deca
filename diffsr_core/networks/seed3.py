"""The simple SR3: a small BigGAN-block U-Net told the step t, and the plain U-Net that is its baseline.

Source: B. Xia, "Super-resolution via diffusion method" (UCLA CS188, 2024), as its listing computes it; the blocks are
those of Brock et al. 2018 (BigGAN) with the skip divided by sqrt(2) of Saharia et al. 2021 (SR3), sec. 2.3.
Two traits of the listing are kept: the features at full resolution are not handed across, and the first block of the
way up is handed the very map that it starts from.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, relu

from diffsr_core.networks.blocks import SinusoidalEmbedding, conv3

Blocks = Literal["biggan", "plain"]
Position = Literal["before", "between", "after"]


@dataclass(frozen=True, kw_only=True)
class Seed3Config:
    """Settings of the network; the defaults are the published ones for 32x32.

    channels: of what is diffused. embedding_dim: the published networks use the image size. embedding_position: where a
    block adds the embedding, seen from its two 3x3 convolutions; plain blocks know only `between`.
    """

    kind: Literal["seed3"] = "seed3"
    channels: int = 1
    condition_channels: int = 1
    widths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    embedding_dim: int = 32
    blocks: Blocks = "biggan"
    embedding_position: Position = "before"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("kind", self.kind, ("seed3",)),
            ("blocks", self.blocks, get_args(Blocks)),
            ("embedding_position", self.embedding_position, get_args(Position)),
        ):
            if value not in known:
                raise ValueError(f"{name} ({value!r}) must be one of {', '.join(known)}")
        if self.channels < 1:
            raise ValueError(f"channels ({self.channels}) must be at least 1")
        if self.condition_channels < 0:
            raise ValueError(f"condition_channels ({self.condition_channels}) must be 0 (no condition) or more")
        if len(self.widths) < 2 or min(self.widths) < 1:
            raise ValueError(f"widths ({self.widths}) must be two or more positive numbers, such as (64, 128)")
        if self.embedding_dim < 4 or self.embedding_dim % 2:
            raise ValueError(
                f"embedding_dim ({self.embedding_dim}) must be even and at least 4: half are sines, half cosines"
            )
        if self.blocks == "plain" and self.embedding_position != "between":
            raise ValueError(
                f"embedding_position ({self.embedding_position!r}) must be 'between' when blocks is 'plain', "
                "which adds it nowhere else; set it so, or use blocks='biggan'"
            )

    @property
    def stride(self) -> int:
        """Heights and widths must be multiples of this."""
        return int(2 ** (len(self.widths) - 1))


class Embed(nn.Module):
    """Adds relu(linear(embedding)) to the map at one position of a block, and leaves the others as they are."""

    def __init__(self, embedding_dim: int, *, position: Position, before: int, behind: int) -> None:
        super().__init__()
        self.position = position
        self.linear = nn.Linear(embedding_dim, before if position == "before" else behind)

    def forward(self, x: Tensor, embedding: Tensor, *, here: Position) -> Tensor:
        return x + relu(self.linear(embedding))[:, :, None, None] if here == self.position else x


class BigGANDown(nn.Module):
    """(B, in, h, w) -> (B, out, h / 2, w / 2). Embedding `after`: behind the pooling, which keeps a constant."""

    def __init__(self, in_channels: int, out_channels: int, *, embedding_dim: int, position: Position) -> None:
        super().__init__()
        self.embed = Embed(embedding_dim, position=position, before=in_channels, behind=out_channels)
        self.conv1 = conv3(in_channels, out_channels)
        self.conv2 = conv3(out_channels, out_channels)
        self.skip = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(relu(self.embed(x, embedding, here="before")))
        h = self.conv2(relu(self.embed(h, embedding, here="between")))
        h = self.embed(avg_pool2d(h, 2), embedding, here="after")
        out: Tensor = h + avg_pool2d(self.skip(x), 2) / math.sqrt(2)
        return out


class BigGANUp(nn.Module):
    """(B, 2 * in, h, w) -> (B, out, 2h, 2w): the map from below, then the one handed across, which the skip ignores."""

    def __init__(self, in_channels: int, out_channels: int, *, embedding_dim: int, position: Position) -> None:
        super().__init__()
        both = 2 * in_channels
        self.embed = Embed(embedding_dim, position=position, before=both, behind=out_channels)
        self.norm1 = nn.BatchNorm2d(both)
        self.upsample = nn.ConvTranspose2d(both, both, 2, 2)
        self.conv1 = conv3(both, out_channels)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3(out_channels, out_channels)
        self.skip_upsample = nn.ConvTranspose2d(in_channels, in_channels, 2, 2)
        self.skip = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        below, _ = x.chunk(2, dim=1)
        h = self.upsample(relu(self.norm1(self.embed(x, embedding, here="before"))))
        h = self.embed(self.conv1(h), embedding, here="between")
        h = self.embed(self.conv2(relu(self.norm2(h))), embedding, here="after")
        out: Tensor = h + self.skip(self.skip_upsample(below)) / math.sqrt(2)
        return out


class PlainBlock(nn.Module):
    """Two convolutions, each with ReLU, then normalisation; `resample` (4x4, stride 2) halves or doubles the size."""

    def __init__(self, in_channels: int, out_channels: int, *, embedding_dim: int, resample: nn.Module) -> None:
        super().__init__()
        self.embed = Embed(embedding_dim, position="between", before=in_channels, behind=out_channels)
        self.conv1 = conv3(in_channels, out_channels)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3(out_channels, out_channels)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.resample = resample

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.embed(self.norm1(relu(self.conv1(x))), embedding, here="between")
        out: Tensor = self.resample(self.norm2(relu(self.conv2(h))))
        return out


class Seed3UNet(nn.Module):
    """(x_t (B, C, h, w), position (B,), condition (B, F, h, w)) -> prediction (B, C, h, w).

    Raises ValueError for sizes that are no multiples of the stride. Normalises over the batch while training.
    """

    def __init__(self, config: Seed3Config) -> None:
        super().__init__()
        self.config = config
        dim, widths = config.embedding_dim, config.widths
        self.embedding = nn.Sequential(SinusoidalEmbedding(dim), nn.Linear(dim, dim), nn.ReLU())
        self.conv0 = conv3(config.condition_channels + config.channels, widths[0])
        pairs = list(zip(widths, widths[1:], strict=False))
        self.downs = nn.ModuleList(_down(config, narrow, wide) for narrow, wide in pairs)
        self.ups = nn.ModuleList(_up(config, wide, narrow) for narrow, wide in reversed(pairs))
        self.output = nn.Conv2d(widths[0], config.channels, 1)

    def forward(self, x_t: Tensor, position: Tensor, condition: Tensor) -> Tensor:
        stride = self.config.stride
        if x_t.shape[2] % stride or x_t.shape[3] % stride:
            raise ValueError(
                f"size ({x_t.shape[2]} x {x_t.shape[3]}) must be a multiple of the stride ({stride}); pad the image"
            )
        embedding = self.embedding(position)
        h, across = self.conv0(torch.cat([condition, x_t], dim=1)), []
        for down in self.downs:
            h = down(h, embedding)
            across.append(h)
        for up in self.ups:
            h = up(torch.cat([h, across.pop()], dim=1), embedding)
        out: Tensor = self.output(h)
        return out


def _down(config: Seed3Config, narrow: int, wide: int) -> nn.Module:
    dim = config.embedding_dim
    if config.blocks == "biggan":
        return BigGANDown(narrow, wide, embedding_dim=dim, position=config.embedding_position)
    return PlainBlock(narrow, wide, embedding_dim=dim, resample=nn.Conv2d(wide, wide, 4, 2, 1))


def _up(config: Seed3Config, wide: int, narrow: int) -> nn.Module:
    dim = config.embedding_dim
    if config.blocks == "biggan":
        return BigGANUp(wide, narrow, embedding_dim=dim, position=config.embedding_position)
    return PlainBlock(2 * wide, narrow, embedding_dim=dim, resample=nn.ConvTranspose2d(narrow, narrow, 4, 2, 1))

"""SR3's U-Net as published, and the variation of it that the public re-implementation trained and released.

Source: Saharia et al. 2021, arXiv:2104.07636, sec. 2.4 and table A.1: the U-Net of DDPM (Ho et al. 2020) with BigGAN's
residual blocks as in Song et al. 2021 (arXiv:2011.13456) and skip paths rescaled by 1/sqrt(2). The paper says neither
where attention is nor how the noise level is embedded; attention at 16x16, resampling inside residual blocks and an
added embedding give 561, 617, 610 and 149 million parameters where it says 550, 625, 625 and 150.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from diffsr_core.networks.blocks import SinusoidalEmbedding, conv3

Resampling = Literal["down", "up"]


@dataclass(frozen=True, kw_only=True)
class SR3Config:
    """Settings of the U-Net.

    channels: of what is diffused. condition_channels: of what is concatenated before it; 0 is an unconditional DDPM.
    hidden: channels at full resolution, times `multipliers` at 1/1, 1/2, 1/4 and so on. num_blocks: residual blocks per
    level on the way down; the way up has one more. attention_factors: the levels with attention, each by the factor
    of its downsampling (the middle always has it). released: the public code's variation, that its weights need.
    """

    kind: Literal["sr3"] = "sr3"
    channels: int = 3
    condition_channels: int = 3
    hidden: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 8, 8)
    num_blocks: int = 3
    attention_factors: tuple[int, ...] = (8,)
    num_groups: int = 32
    dropout: float = 0.0
    released: bool = False

    def __post_init__(self) -> None:
        for name, least in (("channels", 1), ("condition_channels", 0), ("hidden", 4), ("num_blocks", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least {least}; raise it")
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(f"multipliers ({self.multipliers}) must be one or more positive numbers; use (1, 2, 4)")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout ({self.dropout}) must be a probability in [0, 1); SR3 uses 0.2 or 0")
        if self.hidden % 2:
            raise ValueError(f"hidden ({self.hidden}) must be even, as the embedding is half sines, half cosines")
        if self.num_groups < 1 or self.hidden % self.num_groups:
            raise ValueError(f"hidden ({self.hidden}) must be a multiple of num_groups ({self.num_groups}); use fewer")
        factors = [2**level for level in range(len(self.multipliers))]
        if not set(self.attention_factors) <= set(factors):
            raise ValueError(
                f"attention_factors ({self.attention_factors}) must be among the levels' factors {factors}"
            )

    @property
    def stride(self) -> int:
        """Sizes of what is diffused must be multiples of this."""
        return int(2 ** (len(self.multipliers) - 1))

    @property
    def embedding_dim(self) -> int:
        """Length of the embedded position."""
        return self.hidden if self.released else 4 * self.hidden


def resample(x: Tensor, resampling: Resampling | None) -> Tensor:
    """Return x (B, C, h, w) at half the size (means of 2x2), at twice the size (nearest), or as it is."""
    if resampling == "down":
        return nn.functional.avg_pool2d(x, 2)
    return nn.functional.interpolate(x, scale_factor=2, mode="nearest") if resampling == "up" else x


def normalisation(channels: int, config: SR3Config) -> nn.GroupNorm:
    """Return the group norm. As published every block halves the variance of its skip path, so at the start of training
    it is far below torch's eps of 1e-5 in the middle of the network; 1e-6 is DDPM's and Song's. Released: torch's."""
    return nn.GroupNorm(config.num_groups, channels, eps=1e-5 if config.released else 1e-6)


def ending(conv: nn.Conv2d, config: SR3Config) -> nn.Conv2d:
    """Return the convolution that ends a residual path: zero at first as published, torch's default if released."""
    if not config.released:
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


def joined(skip: Tensor, h: Tensor, config: SR3Config) -> Tensor:
    """Return (skip + h) / sqrt(2) as published, skip + h if released."""
    return skip + h if config.released else (skip + h) * math.sqrt(0.5)


class Block(nn.Module):
    """Residual block: norm, SiLU, conv, + embedding, norm, SiLU, dropout, conv; resampled on both paths, as BigGAN."""

    def __init__(
        self, in_channels: int, out_channels: int, *, config: SR3Config, resampling: Resampling | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.resampling = resampling
        self.norm1 = normalisation(in_channels, config)
        self.conv1 = conv3(in_channels, out_channels)
        self.embed = nn.Linear(config.embedding_dim, out_channels)
        self.norm2 = normalisation(out_channels, config)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = ending(conv3(out_channels, out_channels), config)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(resample(nn.functional.silu(self.norm1(x)), self.resampling))
        h = h + self.embed(embedding)[:, :, None, None]
        h = self.conv2(self.dropout(nn.functional.silu(self.norm2(h))))
        return joined(self.skip(resample(x, self.resampling)), h, self.config)


class Attention(nn.Module):
    """One head over all pixels, scaled by 1/sqrt(channels), added to its input."""

    def __init__(self, channels: int, *, config: SR3Config) -> None:
        super().__init__()
        self.config = config
        self.norm = normalisation(channels, config)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=not config.released)
        self.out = ending(nn.Conv2d(channels, channels, 1), config)

    def forward(self, x: Tensor, _embedding: Tensor) -> Tensor:
        # (B, 1, h w, 3C); no copy when x is channels_last. Fused attention wants the channels side by side.
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 1).flatten(1, 2).contiguous()[:, None]
        q, k, v = qkv.chunk(3, dim=-1)
        h = nn.functional.scaled_dot_product_attention(q, k, v)
        return joined(x, self.out(h.transpose(2, 3).reshape(x.shape)), self.config)


class Resampler(nn.Module):
    """The released code's resampling: a strided convolution down; nearest and a convolution up."""

    def __init__(self, channels: int, *, resampling: Resampling) -> None:
        super().__init__()
        self.up = resampling == "up"
        self.conv = conv3(channels, channels, stride=1 if self.up else 2)

    def forward(self, x: Tensor, _embedding: Tensor) -> Tensor:
        out: Tensor = self.conv(resample(x, "up") if self.up else x)
        return out


class Chain(nn.ModuleList):
    """Layers one after the other, each of which is told the embedding."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, embedding)
        return x


class SR3UNet(nn.Module):
    """(x_t (B, C, h, w), position (B,), condition (B, F, h, w)) -> prediction (B, C, h, w).

    h and w are multiples of `config.stride`.

    position: the noise level on a scale of about 0 to 1000, so that the embedding's sines resolve it; released:
    sqrt(alphas_cumprod) itself (whose sines are nearly straight lines: WaveGrad multiplies by 5000). A position of (1,)
    and a condition of (1, F, h, w) hold for the whole batch, and that position is embedded once.
    """

    def __init__(self, config: SR3Config) -> None:
        super().__init__()
        self.config = c = config
        self.sines = SinusoidalEmbedding(c.hidden, endpoint=not c.released)
        self.embedding = nn.Sequential(
            nn.Linear(c.hidden, 4 * c.hidden),
            nn.SiLU(),
            nn.Linear(4 * c.hidden, c.embedding_dim),
            nn.Identity() if c.released else nn.SiLU(),  # once here, not once in every block
        )
        self.first = conv3(c.condition_channels + c.channels, c.hidden)
        widths = [c.hidden * m for m in c.multipliers]
        last = len(widths) - 1

        # The first convolution and each entry of the way down leave a skip; each entry of the way up takes one.
        self.downs, skips = nn.ModuleList(), [c.hidden]
        for level, width in enumerate(widths):
            for _ in range(c.num_blocks):
                self.downs.append(Chain(self._blocks(skips[-1], level)))
                skips.append(width)
            if level < last:
                self.downs.append(Chain([self._resampler(width, "down")]))
                skips.append(width)
        bottom = widths[-1]
        self.middle = Chain(
            [Block(bottom, bottom, config=c), Attention(bottom, config=c), Block(bottom, bottom, config=c)]
        )

        self.ups, seen = nn.ModuleList(), bottom
        for level in range(last, -1, -1):
            for _ in range(c.num_blocks + 1):
                entry = Chain(self._blocks(seen + skips.pop(), level))
                self.ups.append(entry)
                seen = widths[level]
            if level > 0:
                entry.append(self._resampler(seen, "up"))
        self.last = nn.Sequential(normalisation(seen, c), nn.SiLU(), ending(conv3(seen, c.channels), c))

    def forward(self, x_t: Tensor, position: Tensor, condition: Tensor) -> Tensor:
        embedding = self.embedding(self.sines(position).to(x_t.dtype))  # the angles are float32 in any network
        h = self.first(torch.cat([condition.expand(len(x_t), -1, -1, -1), x_t], dim=1))
        skips = [h]
        for entry in self.downs:
            h = entry(h, embedding)
            skips.append(h)
        h = self.middle(h, embedding)
        for entry in self.ups:
            h = entry(torch.cat([h, skips.pop()], dim=1), embedding)
        out: Tensor = self.last(h)
        return out

    def _blocks(self, in_channels: int, level: int) -> list[nn.Module]:
        c = self.config
        width = c.hidden * c.multipliers[level]
        attention = [Attention(width, config=c)] if 2**level in c.attention_factors else []
        return [Block(in_channels, width, config=c), *attention]

    def _resampler(self, width: int, resampling: Resampling) -> nn.Module:
        if self.config.released:
            return Resampler(width, resampling=resampling)
        return Block(width, width, config=self.config, resampling=resampling)

"""SR3's regression baseline: the very U-Net of the diffusion model, run once on the interpolated LR (sec. 3)."""

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from diffsr_core.networks.encoder import EncoderConfig
from diffsr_core.networks.seed3 import Seed3Config, Seed3UNet
from diffsr_core.networks.sr3 import SR3Config, SR3UNet
from diffsr_core.resize import upscale


@dataclass(frozen=True, kw_only=True)
class OnePassConfig(EncoderConfig):
    """Settings. network: the interpolated LR takes the place of its x_t, extra channels that of its condition."""

    kind: Literal["one_pass"] = "one_pass"
    kernel: Literal["bicubic", "bilinear"] = "bicubic"
    network: SR3Config | Seed3Config

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.network, SR3Config | Seed3Config):
            raise ValueError(f"network ({type(self.network).__name__}) must be of kind sr3 or seed3; use one of them")
        reads = (self.network.channels, self.network.condition_channels)
        if reads != (self.channels, self.extra_channels):
            raise ValueError(
                f"network reads {reads[0]} + {reads[1]} channels: it must read the image's {self.channels} and the "
                f"{self.extra_channels} extra ones; set its channels and condition_channels to these"
            )

    @property
    def lr_stride(self) -> int:
        """Heights and widths of an LR window must be multiples of this."""
        return self.network.stride // math.gcd(self.network.stride, self.scale)


class OnePass(nn.Module):
    """LR (B, C + E, h, w) in [-1, 1] -> (the interpolated LR, image (B, C, H, W)), not clipped."""

    def __init__(self, config: OnePassConfig) -> None:
        super().__init__()
        self.config = config
        network = config.network
        self.network = SR3UNet(network) if isinstance(network, SR3Config) else Seed3UNet(network)

    def forward(self, lr: Tensor) -> tuple[Tensor, Tensor]:
        features = upscale(lr, self.config.scale, kernel=self.config.kernel)
        image, extra = features[:, : self.config.channels], features[:, self.config.channels :]
        return features, self.network(image, lr.new_zeros(len(lr)), extra)

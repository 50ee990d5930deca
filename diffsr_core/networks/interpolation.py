"""The encoder without weights: the interpolated LR that SR3 concatenates, or the empty condition of a plain DDPM."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from diffsr_core.networks.encoder import EncoderConfig
from diffsr_core.resize import upscale


@dataclass(frozen=True, kw_only=True)
class InterpolationConfig(EncoderConfig):
    """Settings. kernel `none` is no condition at all: only the size of the LR is read, and the scale must be 1."""

    kind: Literal["interpolation"] = "interpolation"
    kernel: Literal["bicubic", "bilinear", "none"] = "bicubic"

    regresses: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel not in ("bicubic", "bilinear", "none"):
            raise ValueError(f"kernel ({self.kernel!r}) must be bicubic, bilinear or none; use one of them")
        if self.kernel == "none" and (self.scale != 1 or self.extra_channels):
            raise ValueError(
                f"scale ({self.scale}) must be 1 and extra_channels ({self.extra_channels}) 0 without a condition; "
                "use kernel=bicubic"
            )

    @property
    def condition_channels(self) -> int:
        """Channels of the features."""
        return 0 if self.kernel == "none" else self.lr_channels


class Interpolation(nn.Module):
    """LR (B, C + E, h, w) in [-1, 1] -> (features (B, C + E or 0, H, W), image (B, C, H, W)), neither clipped."""

    def __init__(self, config: InterpolationConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, lr: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        if config.kernel == "none":
            return lr[:, :0], torch.zeros_like(lr)
        features = upscale(lr, config.scale, kernel=config.kernel)
        return features, features[:, : config.channels]

"""What every encoder's settings have: the family asks these questions and no others."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """An encoder turns the LR (B, channels + extra_channels, h, w) into features and an image (B, channels, H, W).

    channels: of the image, 1 to 16. extra_channels: maps that come with the LR, after its own channels, are read and
    not returned: edges, segments, other bands.
    """

    scale: int = 4
    channels: int = 3
    extra_channels: int = 0

    # Whether the image is a network's own rather than an interpolation.
    regresses: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.scale < 1:
            raise ValueError(f"scale ({self.scale}) must be at least 1; 1 is restoration without enlarging")
        if not 1 <= self.channels <= 16:
            raise ValueError(f"channels ({self.channels}) must be from 1 to 16; split the bands over several models")
        if self.extra_channels < 0:
            raise ValueError(f"extra_channels ({self.extra_channels}) must be 0 or more; use 0")

    @property
    def lr_channels(self) -> int:
        """Channels of the LR."""
        return self.channels + self.extra_channels

    @property
    def condition_channels(self) -> int:
        """Channels of the features."""
        return self.lr_channels

    @property
    def feature_scale(self) -> int:
        """Feature pixels per LR pixel along one axis."""
        return self.scale

    @property
    def lr_stride(self) -> int:
        """Heights and widths of an LR window must be multiples of this."""
        return 1

"""One tiny model of every kind that the family has, and images for it: what several tests of the core share."""

from dataclasses import replace

import torch
from torch import Tensor

from diffsr_core.family import ModelConfig, SuperResolver
from diffsr_core.networks.edsr import EDSRConfig
from diffsr_core.networks.film import FiLMConfig
from diffsr_core.networks.interpolation import InterpolationConfig
from diffsr_core.networks.one_pass import OnePassConfig
from diffsr_core.networks.rrdb import RRDBConfig
from diffsr_core.networks.seed3 import Seed3Config
from diffsr_core.networks.sr3 import SR3Config
from diffsr_core.networks.srdiff import SRDiffConfig
from diffsr_core.resize import downscale
from diffsr_core.schedule import Schedule

_RRDB = RRDBConfig(scale=4, num_features=4, num_blocks=2, head="pixel_shuffle")
_UNET = SR3Config(hidden=4, multipliers=(1, 2), num_blocks=1, attention_factors=(2,), num_groups=2)
_SEED3 = Seed3Config(widths=(4, 6, 8), embedding_dim=8)
_SRDIFF = SRDiffConfig(hidden=4, multipliers=(1, 2), condition_channels=4, condition_scale=4)

SR3 = ModelConfig(
    encoder=InterpolationConfig(scale=4),
    denoiser=_UNET,
    schedule=Schedule(name="linear", num_timesteps=200, last_beta=0.1),
    anchor="zero",
    residual_scale=1.0,
    told="noise_level",
)
SRDIFF = ModelConfig(encoder=replace(_RRDB, head="nearest"), denoiser=_SRDIFF, schedule=Schedule(num_timesteps=100))
ANCHORED = ModelConfig(
    encoder=_RRDB,
    denoiser=replace(_SRDIFF, channels=48, condition_scale=1, full_resolution_skip=True),
    anchor="regression",
    residual_scale=10.0,
    residual_clip=False,
    space_to_depth=4,
    told="noise_level",
    prediction="x_0",
)
PLAIN = replace(
    ANCHORED,
    encoder=EDSRConfig(scale=4, num_features=4, num_blocks=2),
    denoiser=FiLMConfig(channels=48, condition_channels=4, hidden=4, num_blocks=2),
)
SEED3 = ModelConfig(
    encoder=InterpolationConfig(scale=4, channels=1, kernel="bilinear"),
    denoiser=_SEED3,
    schedule=Schedule(name="linear", first_beta=1e-4, last_beta=2e-2),
    anchor="zero",
    residual_scale=1.0,
    prediction="x_0",
)
DDPM = replace(SR3, encoder=InterpolationConfig(scale=1, kernel="none"), denoiser=replace(_UNET, condition_channels=0))
RRDB_TWIN = replace(SRDIFF, denoiser=None, anchor="regression")
ONE_PASS_TWIN = ModelConfig(
    encoder=OnePassConfig(scale=4, network=replace(_UNET, condition_channels=0)), anchor="regression"
)
# A regression with running statistics below a diffusion with none: what a frozen encoder must keep.
ON_SEED3 = ModelConfig(
    encoder=OnePassConfig(scale=4, extra_channels=1, network=replace(_SEED3, channels=3)),
    denoiser=replace(_UNET, condition_channels=4),
    anchor="regression",
    residual_clip=False,
    told="noise_level",
    prediction="v",
)


def bands(count: int) -> ModelConfig:
    """SRDiff's kind with another number of channels."""
    return replace(SRDIFF, encoder=replace(SRDIFF.encoder, channels=count), denoiser=replace(_SRDIFF, channels=count))


MODELS = {
    "sr3": SR3,
    "srdiff": SRDIFF,
    "anchored": ANCHORED,
    "plain": PLAIN,
    "seed3": SEED3,
    "ddpm": DDPM,
    "on-seed3": ON_SEED3,
    "rrdb-twin": RRDB_TWIN,
    "one-pass-twin": ONE_PASS_TWIN,
    "deblur": ModelConfig(encoder=replace(_RRDB, scale=1), denoiser=replace(_SRDIFF, condition_scale=1)),
    "sr3-edges": replace(
        SR3, encoder=InterpolationConfig(scale=4, extra_channels=1), denoiser=replace(_UNET, condition_channels=4)
    ),
    "srdiff-edges": replace(SRDIFF, encoder=replace(SRDIFF.encoder, extra_channels=2)),
    "grey": bands(1),
    "4-bands": bands(4),
    "16-bands": bands(16),
    "released": replace(SR3, denoiser=replace(_UNET, released=True), told="amplitude"),
}
DIFFUSIONS = {name: config for name, config in MODELS.items() if config.denoiser is not None}


def model_of(config: ModelConfig, *, seed: int = 1) -> SuperResolver:
    """A model none of whose layers is zero, so that nothing is equal by accident."""
    torch.manual_seed(seed)
    model = SuperResolver(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def pair(
    config: ModelConfig, *, lr_size: tuple[int, int] = (8, 4), count: int = 2, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """HR waves (count, C, H, W), and the LR of them with maps of its own as extra channels; all within [-1, 1]."""
    encoder = config.encoder
    generator = torch.Generator().manual_seed(seed)
    height, width = (side * encoder.scale for side in lr_size)
    phase, frequency = (torch.rand(2, count, encoder.channels, 1, 1, generator=generator) * 6).unbind()
    y, x = torch.meshgrid(torch.arange(height) / 16, torch.arange(width) / 16, indexing="ij")
    hr = torch.sin(phase + frequency * x + 2 * (6 - frequency) * y) * 0.8
    extra = torch.rand(count, encoder.extra_channels, *lr_size, generator=generator) * 2 - 1
    return hr, torch.cat([downscale(hr, encoder.scale), extra], dim=1)

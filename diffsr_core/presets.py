"""Named models: data only. `get(name)` resolves a name; `<name>-regression` is the twin without a denoiser."""

from dataclasses import dataclass, replace

from diffsr_core.family import ModelConfig
from diffsr_core.networks.rrdb import RRDBConfig
from diffsr_core.networks.srdiff import SRDiffConfig
from diffsr_core.schedule import Schedule
from diffsr_core.training import StageRecipe


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A model and how it is trained. patch is in HR pixels; params counts all weights, twin_params those of the
    regression twin; note says cost and score."""

    model: ModelConfig
    stages: tuple[StageRecipe, ...]
    patch: int
    batch_size: int
    params: int
    twin_params: int
    note: str


def _srdiff(scale: int, blocks: int, features: int, multipliers: tuple[int, ...]) -> ModelConfig:
    encoder = RRDBConfig(scale=scale, num_features=features, num_blocks=blocks)
    return ModelConfig(
        encoder=encoder,
        denoiser=SRDiffConfig(
            multipliers=multipliers, condition_channels=encoder.condition_channels, condition_scale=scale
        ),
        schedule=Schedule(name="cosine", num_timesteps=100),
    )


_NANO_ENCODER = RRDBConfig(scale=4, num_features=32, num_blocks=5, head="pixel_shuffle")

PRESETS: dict[str, Preset] = {
    "srdiff-celeba-x8": Preset(
        model=_srdiff(8, 8, 32, (1, 2, 2, 4)),
        stages=(
            StageRecipe(name="regression", num_steps=100_000, learning_rate=2e-4),
            StageRecipe(name="diffusion", num_steps=300_000, learning_rate=2e-4),
        ),
        patch=160,
        batch_size=32,
        params=12_033_798,
        twin_params=1_488_003,
        note="SRDiff's CelebA 8x model; 25.38 dB / LR-PSNR 52.34 in the paper; about 30 hours on one GPU there",
    ),
    "srdiff-df2k-x4": Preset(
        model=_srdiff(4, 17, 64, (1, 2, 3, 4)),
        stages=(
            StageRecipe(name="regression", num_steps=100_000, learning_rate=2e-4),
            StageRecipe(name="diffusion", num_steps=400_000, learning_rate=2e-4),
        ),
        patch=160,
        batch_size=64,
        params=25_316_358,
        twin_params=12_381_443,
        note="SRDiff's DF2K 4x model; 27.41 dB / LR-PSNR 55.21 in the paper",
    ),
    "nano-x4": Preset(
        model=ModelConfig(
            encoder=_NANO_ENCODER,
            denoiser=SRDiffConfig(
                channels=48,
                hidden=48,
                multipliers=(1, 2),
                condition_channels=_NANO_ENCODER.condition_channels,
                condition_scale=1,
                full_resolution_skip=True,
            ),
            schedule=Schedule(name="cosine", num_timesteps=1000),
            anchor="regression",
            residual_scale=10.0,
            residual_clip=False,
            space_to_depth=4,
            told="noise_level",
            prediction="x_0",
        ),
        stages=(
            StageRecipe(name="regression", num_steps=800, learning_rate=1e-3),
            StageRecipe(name="diffusion", num_steps=800, learning_rate=1e-3),
        ),
        patch=64,
        batch_size=16,
        params=2_014_048,
        twin_params=924_016,
        note="a small SRDiff that two CPU cores train in minutes: all at LR resolution, the residual is the RRDB's own",
    ),
}


def names() -> list[str]:
    """Return every preset name, twins included."""
    return [full for name in PRESETS for full in (name, f"{name}-regression")]


def get(name: str) -> Preset:
    """Return the preset; raises ValueError that lists the names when there is none."""
    base = name.removesuffix("-regression")
    if base not in PRESETS:
        raise ValueError(f"preset ({name!r}) is unknown; use one of: {', '.join(names())}")
    preset = PRESETS[base]
    if base == name:
        return preset
    return replace(
        preset,
        params=preset.twin_params,
        model=replace(preset.model, denoiser=None, anchor="regression"),
        stages=tuple(stage for stage in preset.stages if stage.name == "regression"),
    )

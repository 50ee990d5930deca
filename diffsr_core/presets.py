"""Named models: data only. `get(name)` resolves a name; `<name>-regression` is the twin without a denoiser."""

from dataclasses import dataclass, replace

from diffsr_core.family import ModelConfig
from diffsr_core.networks.edsr import EDSRConfig
from diffsr_core.networks.film import FiLMConfig
from diffsr_core.networks.interpolation import InterpolationConfig
from diffsr_core.networks.one_pass import OnePassConfig
from diffsr_core.networks.rrdb import RRDBConfig
from diffsr_core.networks.seed3 import Seed3Config
from diffsr_core.networks.sr3 import SR3Config
from diffsr_core.networks.srdiff import SRDiffConfig
from diffsr_core.recipe import StageRecipe, TrainingRecipe
from diffsr_core.schedule import Schedule

TWIN = "-regression"


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A model and how it is trained. patch is in HR pixels; params counts all weights; note says what it is, its cost
    (steps of so many images, hours where known) and its score, where someone has published or measured one.

    regression: how the twin is trained, None where there is no twin; twin_params counts its weights.
    """

    model: ModelConfig
    recipe: TrainingRecipe
    patch: int
    params: int
    regression: StageRecipe | None
    twin_params: int = 0
    note: str


def _srdiff_model(scale: int, *, blocks: int, features: int, multipliers: tuple[int, ...]) -> ModelConfig:
    """SRDiff: RRDB features, the residual against bicubic, T = 100, told the step (Li et al. 2021)."""
    encoder = RRDBConfig(scale=scale, num_features=features, num_blocks=blocks)
    return ModelConfig(
        encoder=encoder,
        denoiser=SRDiffConfig(
            multipliers=multipliers, condition_channels=encoder.condition_channels, condition_scale=scale
        ),
        schedule=Schedule(name="cosine", num_timesteps=100),
    )


def _srdiff_recipe(num_steps: int, *, plateaus: int, batch_size: int) -> TrainingRecipe:
    """As published but for the batch of CelebA's pre-training, 64 there: one recipe has one batch."""
    diffusion = replace(_PRETRAINING, name="diffusion", num_steps=num_steps, decay="halving", plateaus=plateaus)
    return TrainingRecipe(
        stages=(_PRETRAINING, diffusion), batch_size=batch_size, augmentation="none", ema_half_lives_images=(50_000,)
    )


def _anchored_model(encoder: EDSRConfig | RRDBConfig, denoiser: FiLMConfig | SRDiffConfig) -> ModelConfig:
    """What the encoder's own image leaves is diffused, at LR resolution."""
    return ModelConfig(
        encoder=encoder,
        denoiser=denoiser,
        schedule=Schedule(name="cosine", num_timesteps=1000),
        anchor="regression",
        residual_scale=10.0,
        residual_clip=False,
        space_to_depth=encoder.scale,
        told="noise_level",
        prediction="x_0",
    )


_PRETRAINING = StageRecipe(name="regression", num_steps=100_000, learning_rate=2e-4, warmup_share=0.0, decay="constant")


def _sr3(
    small: int,
    large: int,
    *,
    hidden: int,
    multipliers: tuple[int, ...],
    blocks: int = 3,
    dropout: float = 0.0,
    condition_blur_px: float = 0.0,
    params: int,
    twin_params: int,
    note: str,
) -> Preset:
    """SR3 as published (Saharia et al. 2021, app. A): attention at 16 x 16, noise level told, x_HR itself diffused.

    The paper blurs the condition of a cascade's stages by a varying strength that it does not tell: 1 px is ours.
    """
    return Preset(
        model=ModelConfig(
            encoder=InterpolationConfig(scale=large // small),
            denoiser=SR3Config(
                hidden=hidden,
                multipliers=multipliers,
                num_blocks=blocks,
                attention_factors=(large // 16,),
                num_groups=min(32, hidden),
                dropout=dropout,
            ),
            schedule=Schedule(name="linear", num_timesteps=2000),
            anchor="zero",
            residual_scale=1.0,
            told="noise_level",
        ),
        recipe=replace(_SR3_RECIPE, condition_blur_px=condition_blur_px),
        patch=large,
        params=params,
        twin_params=twin_params,
        regression=replace(_SR3_STAGE, name="regression", learning_rate=1e-5, loss="l2"),
        note=note,
    )


_SR3_STAGE = StageRecipe(name="diffusion", num_steps=1_000_000, learning_rate=1e-4, warmup_share=0.01, decay="constant")
_SR3_RECIPE = TrainingRecipe(
    stages=(_SR3_STAGE,), batch_size=256, ema_half_lives_images=(500_000,), augmentation="flip"
)


def _seed3(
    small: int, large: int, *, channels: int, params: int, twin_params: int, note: str, **network: str
) -> Preset:
    """Xia's simple SR3 (see networks.seed3): bilinear LR, x_0 predicted, L1; T and betas are DDPM's."""
    return Preset(
        model=ModelConfig(
            encoder=InterpolationConfig(scale=large // small, channels=channels, kernel="bilinear"),
            denoiser=Seed3Config(
                channels=channels,
                condition_channels=channels,
                embedding_dim=large,
                **network,  # type: ignore[arg-type]
            ),
            schedule=Schedule(name="linear", num_timesteps=1000, first_beta=1e-4, last_beta=2e-2),
            anchor="zero",
            residual_scale=1.0,
            told="step",
            prediction="x_0",
        ),
        recipe=TrainingRecipe(
            stages=(_SEED3_STAGE,), batch_size=64, ema_half_lives_images=(5000,), augmentation="none"
        ),
        patch=large,
        params=params,
        twin_params=twin_params,
        regression=replace(_SEED3_STAGE, name="regression"),
        note=note,
    )


_SEED3_STAGE = StageRecipe(name="diffusion", num_steps=4700, learning_rate=3e-4)
# ResShift's (Yue et al. 2023; rates, batch, warm-up and steps of its journal version but for the batch, 96 there).
_RESSHIFT_STAGE = StageRecipe(
    name="diffusion", num_steps=400_000, learning_rate=5e-5, loss="l2", warmup_share=0.0125, decay="cosine"
)
_NANO_ENCODER = RRDBConfig(scale=4, num_features=32, num_blocks=5, head="pixel_shuffle")
_ANCHORED_STAGE = StageRecipe(name="diffusion", num_steps=10_000, learning_rate=3e-3, warmup_share=0.02)
_NANO_STAGE = StageRecipe(name="diffusion", num_steps=800, learning_rate=1e-3)

_PLAIN = {"blocks": "plain", "embedding_position": "between"}

PRESETS: dict[str, Preset] = {
    "sr3-16-128": _sr3(
        16, 128, hidden=128, multipliers=(1, 2, 4, 8, 8), dropout=0.2, params=560_719_107, twin_params=560_715_651,
        note="SR3's faces 16 to 128, 550 M in the paper; 1,000,000 steps of 256; 23.04 dB / SSIM 0.65, regression "
        "23.96 / 0.69",
    ),
    "sr3-64-256": _sr3(
        64, 256, hidden=128, multipliers=(1, 2, 4, 4, 8, 8), condition_blur_px=1.0,
        params=617_118_467, twin_params=617_115_011,
        note="SR3's ImageNet 64 to 256, 625 M in the paper; 1,000,000 steps of 256; FID 5.2, 26.4 dB / SSIM 0.762, "
        "regression 15.2, 27.9 / 0.801",
    ),
    "sr3-64-512": _sr3(
        64, 512, hidden=64, multipliers=(1, 2, 4, 8, 8, 16, 16), params=609_802_371, twin_params=609_800_643,
        note="SR3's faces 64 to 512, 625 M in the paper; 1,000,000 steps of 256; no score in the paper's tables",
    ),
    "sr3-256-1024": _sr3(
        256, 1024, hidden=16, multipliers=(1, 2, 4, 8, 16, 32, 32, 32), blocks=2, condition_blur_px=1.0,
        params=148_746_931, twin_params=148_746_499,
        note="SR3's last stage of the face cascade, 256 to 1024, 150 M in the paper; 1,000,000 steps of 256; no "
        "score of its own there",
    ),
    "sr3-lite-16-128": Preset(
        model=ModelConfig(
            encoder=InterpolationConfig(scale=8),
            denoiser=SR3Config(
                hidden=64, multipliers=(1, 2, 4, 8, 8), num_blocks=2, attention_factors=(8,), dropout=0.2, released=True
            ),
            schedule=Schedule(name="linear", num_timesteps=2000),
            anchor="zero",
            residual_scale=1.0,
            told="amplitude",
        ),
        recipe=replace(_SR3_RECIPE, stages=(replace(_SR3_STAGE, warmup_share=0.0),), batch_size=4),
        patch=128,
        params=97_807_491,
        twin_params=97_805_763,
        regression=replace(_SR3_STAGE, name="regression", learning_rate=1e-5, loss="l2"),
        note="the public SR3 code's 16 to 128, whose released weights fit; 1,000,000 steps of 4 (released: after "
        "640,000); 23.26 dB / SSIM 0.675 by its own account",
    ),
    "ddpm-64": Preset(
        model=ModelConfig(
            encoder=InterpolationConfig(scale=1, kernel="none"),
            denoiser=SR3Config(
                condition_channels=0, hidden=128, multipliers=(1, 2, 3, 4), num_blocks=3, attention_factors=(4, 8)
            ),
            schedule=Schedule(name="cosine", num_timesteps=1000),
            anchor="zero",
            residual_scale=1.0,
            told="noise_level",
        ),
        recipe=_SR3_RECIPE,
        patch=64,
        params=123_273_859,
        regression=None,
        note="a plain DDPM of 64 px images, the first stage of a cascade that generates; 1,000,000 steps of 256; no "
        "score: ours, not trained here",
    ),
    "srdiff-celeba-x8": Preset(
        model=_srdiff_model(8, blocks=8, features=32, multipliers=(1, 2, 2, 4)),
        recipe=_srdiff_recipe(300_000, plateaus=3, batch_size=32),
        patch=160,
        params=12_033_798,
        twin_params=1_488_003,
        regression=_PRETRAINING,
        note="SRDiff's CelebA 8x model; 100,000 + 300,000 steps of 32, about 30 hours on one GPU; 25.38 dB / SSIM "
        "0.74 / LPIPS 0.106 / LR-PSNR 52.34 in the paper",
    ),
    "srdiff-df2k-x4": Preset(
        model=_srdiff_model(4, blocks=17, features=64, multipliers=(1, 2, 3, 4)),
        recipe=_srdiff_recipe(400_000, plateaus=2, batch_size=64),
        patch=160,
        params=25_316_358,
        twin_params=12_381_443,
        regression=_PRETRAINING,
        note="SRDiff's DF2K 4x model; 100,000 + 400,000 steps of 64; 27.41 dB / SSIM 0.79 / LPIPS 0.136 / LR-PSNR "
        "55.21 in the paper",
    ),
    # In pixels, where ResShift has latents of a deviation of about 1: that of HR - bicubic is 0.12 in photographs.
    "resshift-x4": Preset(
        model=ModelConfig(
            encoder=InterpolationConfig(scale=4),
            denoiser=SR3Config(hidden=64, multipliers=(1, 2, 2, 4, 8), num_blocks=2, attention_factors=(16,)),
            schedule=Schedule(name="resshift", num_timesteps=15),
            anchor="bicubic",
            residual_scale=8.0,
            residual_clip=False,
            told="noise_level",
            prediction="x_0",
        ),
        recipe=TrainingRecipe(
            stages=(_RESSHIFT_STAGE,), batch_size=64, augmentation="flip", ema_half_lives_images=(44_000,)
        ),
        patch=256,
        params=68_899_267,
        twin_params=68_897_539,
        regression=replace(_RESSHIFT_STAGE, name="regression"),
        note="ResShift's 15-step chain in pixels; 400,000 steps of 64, not trained here, so no score; the paper's "
        "model, 174 M in latent space and 110 A100 hours: 24.90 dB / LPIPS 0.228 on ImageNet-Test 4x",
    ),
    "seed3-8-32": _seed3(
        8, 32, channels=1, params=63_898_017, twin_params=63_897_441,
        note="Xia's digits, 8 to 32: BigGAN blocks; 4,700 steps of 64 (5 epochs of MNIST); no score published, 19.96 "
        "dB / SSIM 0.915 here after 400 steps of 32"
    ),
    "seed3-8-32-between": _seed3(
        8, 32, channels=1, params=63_834_657, twin_params=63_834_081, embedding_position="between",
        note="seed3-8-32, the time embedding between the two convolutions; 4,700 steps of 64; no score published",
    ),
    "seed3-8-32-after": _seed3(
        8, 32, channels=1, params=63_834_657, twin_params=63_834_081, embedding_position="after",
        note="seed3-8-32, the time embedding after the convolutions; 4,700 steps of 64; no score published",
    ),
    "seed3-8-32-plain": _seed3(
        8, 32, channels=1, params=62_438_177, twin_params=62_437_601, **_PLAIN,
        note="seed3-8-32's baseline, a plain U-Net; 4,700 steps of 64; no score published, 21.06 dB / SSIM 0.928 here "
        "after 400 steps of 32",
    ),
    "seed3-32-128": _seed3(
        32, 128, channels=3, params=64_376_707, twin_params=64_374_979,
        note="Xia's scenes, 32 to 128: BigGAN blocks; 4,700 steps of 64; no score published"
    ),
    "seed3-32-128-plain": _seed3(
        32, 128, channels=3, params=62_732_547, twin_params=62_730_819, **_PLAIN,
        note="seed3-32-128's baseline, a plain U-Net; 4,700 steps of 64; no score published",
    ),
    "anchored-x4": Preset(
        model=_anchored_model(EDSRConfig(scale=4), FiLMConfig()),
        recipe=TrainingRecipe(
            stages=(replace(_ANCHORED_STAGE, name="regression"), _ANCHORED_STAGE),
            batch_size=16,
            optimizer="muon",
            ema_half_lives_images=(10_000,),
        ),
        patch=128,
        params=1_743_456,
        twin_params=952_688,
        regression=replace(_ANCHORED_STAGE, name="regression"),
        note="a regression and a denoiser of its residual, plain convolutions at LR resolution; 10,000 + 10,000 steps "
        "of 16, some hours of a CPU core; no score published: the shipped model is one, its card has its scores",
    ),
    "nano-x4": Preset(
        model=_anchored_model(
            _NANO_ENCODER,
            SRDiffConfig(
                channels=48,
                hidden=48,
                multipliers=(1, 2),
                condition_channels=_NANO_ENCODER.condition_channels,
                condition_scale=1,
                full_resolution_skip=True,
            ),
        ),
        recipe=TrainingRecipe(stages=(replace(_NANO_STAGE, name="regression"), _NANO_STAGE), batch_size=16),
        patch=64,
        params=2_014_048,
        twin_params=924_016,
        regression=replace(_NANO_STAGE, name="regression"),
        note="a small SRDiff, all at LR resolution, the residual is the RRDB's own; 800 + 800 steps of 16, minutes on "
        "two CPU cores; 27.31 dB after 600 + 400, bicubic 26.36, its regression 27.45",
    ),
}  # fmt: skip


def names() -> list[str]:
    """Return every preset name, twins included."""
    return [
        full
        for name, preset in PRESETS.items()
        for full in (name, name + TWIN)
        if full == name or preset.regression is not None
    ]


def get(name: str) -> Preset:
    """Return the preset; raises ValueError that lists the names when there is none."""
    if name not in names():
        raise ValueError(f"preset ({name!r}) is unknown; use one of: {', '.join(names())}")
    if name in PRESETS:
        return PRESETS[name]
    preset = PRESETS[full := name.removesuffix(TWIN)]
    assert preset.regression is not None
    cost = f"{preset.regression.num_steps:,} steps of {preset.recipe.batch_size}"
    return replace(
        preset,
        model=_twin(preset.model),
        recipe=replace(preset.recipe, stages=(preset.regression,)),
        params=preset.twin_params,
        note=f"one pass, {cost}; the regression twin of {full}: {preset.note}",
    )


def _twin(model: ModelConfig) -> ModelConfig:
    """Return the regression: the encoder by itself; where that has no weights, the denoiser's network in one pass."""
    encoder, denoiser = model.encoder, model.denoiser
    if isinstance(encoder, InterpolationConfig):
        assert isinstance(denoiser, SR3Config | Seed3Config) and encoder.kernel != "none"
        encoder = OnePassConfig(
            scale=encoder.scale,
            channels=encoder.channels,
            extra_channels=encoder.extra_channels,
            kernel=encoder.kernel,
            network=replace(denoiser, condition_channels=encoder.extra_channels),
        )
    return replace(model, encoder=encoder, denoiser=None, anchor="regression")

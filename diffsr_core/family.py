"""One family of super-resolution models that differ in four places; nothing else asks which one it serves.

    condition    what is computed once per image: features of the encoder, and the anchor image
    diffused     x_0 = (x_HR - anchor) * residual_scale, in space-to-depth by `space_to_depth`
    told         the noise level, or the step t
    back         x_0 / residual_scale + anchor

SR3 has anchor `zero` and residual_scale 1; SRDiff anchor `bicubic` and 2; the anchored models anchor `regression`: the
diffusion then has to explain only what the regression network cannot. A model without a denoiser is that regression;
an encoder without a condition makes it a plain DDPM.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from diffsr_core.consistency import Consistency
from diffsr_core.networks.edsr import EDSR, EDSRConfig
from diffsr_core.networks.film import FiLMConfig, FiLMNet
from diffsr_core.networks.interpolation import Interpolation, InterpolationConfig
from diffsr_core.networks.one_pass import OnePass, OnePassConfig
from diffsr_core.networks.rrdb import RRDBConfig, RRDBNet
from diffsr_core.networks.seed3 import Seed3Config, Seed3UNet
from diffsr_core.networks.sr3 import SR3Config, SR3UNet
from diffsr_core.networks.srdiff import SRDiffConfig, SRDiffUNet
from diffsr_core.resize import upscale
from diffsr_core.sampler import Denoise
from diffsr_core.schedule import Schedule, sampling_grid, step_of_noise_level

# By the `kind` that config.json names.
ENCODERS: dict[str, tuple[type, type[nn.Module]]] = {
    "rrdb": (RRDBConfig, RRDBNet),
    "edsr": (EDSRConfig, EDSR),
    "interpolation": (InterpolationConfig, Interpolation),
    "one_pass": (OnePassConfig, OnePass),
}
DENOISERS: dict[str, tuple[type, type[nn.Module]]] = {
    "srdiff": (SRDiffConfig, SRDiffUNet),
    "sr3": (SR3Config, SR3UNet),
    "seed3": (Seed3Config, Seed3UNet),
    "film": (FiLMConfig, FiLMNet),
}

EncoderSettings = RRDBConfig | EDSRConfig | InterpolationConfig | OnePassConfig
DenoiserSettings = SRDiffConfig | SR3Config | Seed3Config | FiLMConfig


Anchor = Literal["zero", "bicubic", "regression"]
Told = Literal["noise_level", "amplitude", "step"]
Prediction = Literal["eps", "x_0", "v"]

START_LEVEL = 0.7  # of samples in one step, unless somebody says otherwise: half of the weight that variety has at 0


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything needed to rebuild a model; written to config.json. denoiser None is the regression twin.

    told: `step` t, `noise_level` (as its angle, 0 to 1000), or `amplitude` (the level itself, as the public SR3 code).
    one_step: trained to be sampled in one step of ddim, and in no other way: from noise, or with a start_level from any
    level (see `energy`), and from this one unless somebody says otherwise.
    consistency: the projection that the LR of its training allows, unless somebody says otherwise.
    anchor_gain: 255/256 for SRDiff's released weights, whose anchor was made from pixels / 256. Raises ValueError for
    parts that do not fit one another.
    """

    encoder: EncoderSettings
    denoiser: DenoiserSettings | None = None
    schedule: Schedule = Schedule()
    anchor: Anchor = "bicubic"
    anchor_gain: float = 1.0
    residual_scale: float = 2.0
    residual_clip: bool = True
    space_to_depth: int = 1
    told: Told = "step"
    prediction: Prediction = "eps"
    one_step: bool = False
    start_level: float | None = None
    consistency: Consistency = "exact"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("anchor", self.anchor, get_args(Anchor)),
            ("told", self.told, get_args(Told)),
            ("prediction", self.prediction, get_args(Prediction)),
            ("consistency", self.consistency, get_args(Consistency)),
        ):
            if value not in known:
                raise ValueError(f"{name} ({value!r}) must be one of {', '.join(known)}")
        for name, number in (("anchor_gain", self.anchor_gain), ("residual_scale", self.residual_scale)):
            if not 0 < number < math.inf:
                raise ValueError(f"{name} ({number}) must be positive and finite; 1 changes nothing")
        if self.start_level is not None:
            self._check_start(self.start_level)
        if self.denoiser is not None:
            self._check_fit(self.denoiser)

    def _check_start(self, level: float) -> None:
        if not self.one_step or not self.encoder.regresses:
            raise ValueError(
                f"start_level ({level}) is of models of one step (one_step is {self.one_step}) whose encoder regresses "
                f"({self.encoder.kind} does{'' if self.encoder.regresses else ' not'}); leave it out"
            )
        try:
            sampling_grid(self.schedule, 1, start=level)
        except ValueError as error:
            raise ValueError(
                f"start_level ({level}) must be a level of the schedule; use {START_LEVEL}: {error}"
            ) from None

    def _check_fit(self, denoiser: DenoiserSettings) -> None:
        encoder = self.encoder
        if self.space_to_depth < 1 or encoder.scale % self.space_to_depth:
            raise ValueError(
                f"space_to_depth ({self.space_to_depth}) must divide the scale ({encoder.scale}); use 1 or the scale"
            )
        diffused = encoder.channels * self.space_to_depth**2
        for name, value, wanted in (
            ("channels", denoiser.channels, diffused),
            ("condition_channels", denoiser.condition_channels, encoder.condition_channels),
        ):
            if value != wanted:
                raise ValueError(f"denoiser {name} ({value}) must be {wanted} beside this encoder; set it so")
        enlarged = denoiser.condition_scale if isinstance(denoiser, SRDiffConfig) else 1
        if enlarged * encoder.feature_scale * self.space_to_depth != encoder.scale:
            raise ValueError(
                f"condition_scale ({enlarged}, always 1 but for srdiff) x the encoder's feature_scale "
                f"({encoder.feature_scale}) x space_to_depth ({self.space_to_depth}) must be the scale "
                f"({encoder.scale}); change space_to_depth, or srdiff's condition_scale"
            )
        if self.anchor == "regression" and not encoder.regresses:
            raise ValueError(f"anchor (regression) needs an encoder that regresses, not {encoder.kind}; use bicubic")
        if self.anchor == "bicubic" and encoder.condition_channels == 0:
            raise ValueError("anchor (bicubic) reads the LR, and this encoder has no condition; use zero")
        if self.anchor != "bicubic" and self.anchor_gain != 1.0:
            raise ValueError(f"anchor_gain ({self.anchor_gain}) is of the bicubic anchor, not {self.anchor}; use 1")

    @property
    def scale(self) -> int:
        """Output pixels per input pixel along one axis."""
        return self.encoder.scale

    @property
    def lr_stride(self) -> int:
        """Heights and widths of an LR window must be multiples of this."""
        if self.denoiser is None:
            return self.encoder.lr_stride
        stride = self.denoiser.stride * self.space_to_depth
        return math.lcm(self.encoder.lr_stride, stride // math.gcd(stride, self.scale))

    @property
    def lr_smallest(self) -> int:
        """Heights and widths of an LR window must be at least this."""
        if not isinstance(self.denoiser, SRDiffConfig):
            return self.lr_stride
        return max(self.lr_stride, math.ceil(self.denoiser.smallest * self.space_to_depth / self.scale))

    def diffused_shape(self, lr_height: int, lr_width: int) -> tuple[int, int, int]:
        """Return (channels, height, width) of x_0 for an LR image of this size."""
        assert self.denoiser is not None
        per_lr = self.scale // self.space_to_depth
        return self.denoiser.channels, lr_height * per_lr, lr_width * per_lr


class Condition(NamedTuple):
    """What the LR image says, computed once: features (B, F, h', w') and anchor (B, C, H, W) in [-1, 1]."""

    features: Tensor
    anchor: Tensor


def x0_and_eps(prediction: Tensor, x_t: Tensor, noise_level: Tensor, *, kind: str) -> tuple[Tensor, Tensor]:
    """Return (x_0, eps) from a prediction of `kind` eps, x_0 or v, all (B, C, h, w); noise_level (B,).

    a = noise_level, b = sqrt(1 - a^2): x_t = a x_0 + b eps, v = a eps - b x_0 (Salimans and Ho 2022, app. D).
    """
    a, b = amplitudes(noise_level, x_t.dtype)
    if kind == "eps":
        return (x_t - b * prediction) / a, prediction
    if kind == "x_0":
        return prediction, (x_t - a * prediction).div_(b)  # in place: on a large canvas memory costs more than numbers
    return a * x_t - b * prediction, b * x_t + a * prediction


def amplitudes(noise_level: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return (a, b), of the signal and of the noise, each (B, 1, 1, 1), for noise_level (B,)."""
    a = noise_level[:, None, None, None].to(dtype)
    return a, torch.sqrt((1 - a) * (1 + a))  # 1 - a * a loses 3 % of b^2 at SR3's cleanest level in float32


def regression_of(model: "SuperResolver") -> "SuperResolver":
    """Return the model's own regression as a model, its encoder shared. Raises ValueError where it has none.

    Its canvas is padded to the encoder's stride alone: of sizes that are no multiple of the whole model's, its last
    rows and columns are not those that the whole model begins from.
    """
    if not model.config.encoder.regresses:
        raise ValueError(f"encoder ({model.config.encoder.kind}) must regress for that; use a model whose encoder does")
    with torch.device("meta"):
        twin = SuperResolver(replace(model.config, denoiser=None, anchor="regression"))
    twin.encoder = model.encoder
    return twin


class SuperResolver(nn.Module):
    """An encoder, and a denoiser of the residual that the encoder's anchor leaves."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = ENCODERS[config.encoder.kind][1](config.encoder)
        self.denoiser = DENOISERS[config.denoiser.kind][1](config.denoiser) if config.denoiser is not None else None

    def condition(self, lr: Tensor) -> Condition:
        """Return the condition of lr (B, C + E, h, w) in [-1, 1]; the only place that runs the encoder."""
        features, image = self.encoder(lr)
        return self.condition_of(lr, features, image)

    def condition_of(self, lr: Tensor, features: Tensor, image: Tensor) -> Condition:
        """Return the condition for the encoder's outputs, when they were computed window by window."""
        if self.config.anchor == "regression" or self.denoiser is None:
            return Condition(features, image)
        if self.config.anchor == "zero":
            return Condition(features, torch.zeros_like(image))
        anchor = upscale(lr[:, : self.config.encoder.channels], self.config.scale)
        if self.config.anchor_gain != 1.0:
            anchor = (anchor + 1) * self.config.anchor_gain - 1
        return Condition(features, anchor)

    def target(self, hr: Tensor, condition: Condition) -> Tensor:
        """Return x_0 (B, C f^2, H / f, W / f) for hr (B, C, H, W) in [-1, 1]."""
        x_0 = (hr - condition.anchor) * self.config.residual_scale
        if self.config.residual_clip:
            x_0 = x_0.clamp(-1, 1)
        return nn.functional.pixel_unshuffle(x_0, self.config.space_to_depth)

    def restore(self, x_0: Tensor, condition: Condition) -> Tensor:
        """Return the image (B, C, H, W) that `target` maps to x_0 (exactly so where the residual was not clipped)."""
        residual = nn.functional.pixel_shuffle(x_0, self.config.space_to_depth)
        return residual / self.config.residual_scale + condition.anchor

    def diffused_shape(self, lr_height: int, lr_width: int) -> tuple[int, int, int]:
        """Return the config's."""
        return self.config.diffused_shape(lr_height, lr_width)

    def predict(self, x_t: Tensor, noise_level: Tensor, features: Tensor) -> Tensor:
        """Return the denoiser's output (kind `config.prediction`) for x_t (B, C, h, w) at noise_level (B,)."""
        assert self.denoiser is not None, "a regression model has no denoiser"
        if self.config.told == "step":
            position = step_of_noise_level(self.config.schedule, noise_level)
        elif self.config.told == "amplitude":
            position = noise_level
        else:
            # The angle acos(a) grows evenly along a cosine schedule; x1000 spreads it over the embedding's frequencies
            # (without a large factor a network cannot tell the levels apart, as WaveGrad's users found).
            position = torch.acos(noise_level.double().clamp(-1, 1)).float() * (1000 * 2 / math.pi)
        out: Tensor = self.denoiser(x_t, position, features)
        return out

    def denoise(self, features: Tensor) -> Denoise:
        """Return the function (x_t (B, C, h, w), noise level) -> (x_0, eps) that a sampler asks, for a whole batch."""

        def ask(x_t: Tensor, noise_level: float) -> tuple[Tensor, Tensor]:
            level = torch.full((len(x_t),), noise_level, device=x_t.device)
            return x0_and_eps(self.predict(x_t, level, features), x_t, level, kind=self.config.prediction)

        return ask

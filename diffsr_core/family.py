"""One family of super-resolution models that differ in four places; nothing else asks which one it serves.

    condition    what is computed once per image: features of the encoder, and the anchor image
    diffused     x_0 = (x_HR - anchor) * residual_scale, in space-to-depth by `space_to_depth`
    told         the noise level, or the step t
    back         x_0 / residual_scale + anchor

SR3 has anchor `zero` and residual_scale 1; SRDiff anchor `bicubic` and 2; the anchored models anchor `regression`: the
diffusion then has to explain only what the regression network cannot. A model without a denoiser is that regression.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from diffsr_core.networks.rrdb import RRDBConfig, RRDBNet
from diffsr_core.networks.srdiff import SRDiffConfig, SRDiffUNet
from diffsr_core.resize import upscale
from diffsr_core.schedule import Schedule, step_of_noise_level


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything needed to rebuild a model; written to config.json. denoiser None is the regression twin."""

    encoder: RRDBConfig
    denoiser: SRDiffConfig | None = None
    schedule: Schedule = Schedule()
    anchor: Literal["zero", "bicubic", "regression"] = "bicubic"
    residual_scale: float = 2.0
    residual_clip: bool = True
    space_to_depth: int = 1
    told: Literal["noise_level", "step"] = "step"
    prediction: Literal["eps", "x_0", "v"] = "eps"

    @property
    def scale(self) -> int:
        """Output pixels per input pixel along one axis."""
        return self.encoder.scale

    @property
    def lr_stride(self) -> int:
        """Heights and widths of an LR window must be multiples of this."""
        if self.denoiser is None:
            return 1
        stride = self.denoiser.stride * self.space_to_depth
        return stride // math.gcd(stride, self.scale)


class Condition(NamedTuple):
    """What the LR image says, computed once: features (B, F, h, w) and anchor (B, 3, H, W) in [-1, 1]."""

    features: Tensor
    anchor: Tensor


def x0_and_eps(prediction: Tensor, x_t: Tensor, noise_level: Tensor, *, kind: str) -> tuple[Tensor, Tensor]:
    """Return (x_0, eps) from a prediction of `kind` eps, x_0 or v, all (B, C, h, w); noise_level (B,).

    a = noise_level, b = sqrt(1 - a^2): x_t = a x_0 + b eps, v = a eps - b x_0 (Salimans and Ho 2022, app. D).
    """
    a = noise_level[:, None, None, None].to(x_t.dtype)
    b = torch.sqrt(1 - a * a)
    if kind == "eps":
        return (x_t - b * prediction) / a, prediction
    if kind == "x_0":
        return prediction, (x_t - a * prediction) / b
    return a * x_t - b * prediction, b * x_t + a * prediction


class SuperResolver(nn.Module):
    """An encoder, and a denoiser of the residual that the encoder's anchor leaves."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = RRDBNet(config.encoder)
        self.denoiser = SRDiffUNet(config.denoiser) if config.denoiser is not None else None

    def condition(self, lr: Tensor) -> Condition:
        """Return the condition of lr (B, 3, h, w) in [-1, 1]; the only place that runs the encoder."""
        features, image = self.encoder(lr)
        return self.condition_of(lr, features, image)

    def condition_of(self, lr: Tensor, features: Tensor, image: Tensor) -> Condition:
        """Return the condition for the encoder's outputs, when they were computed window by window."""
        if self.config.anchor == "regression" or self.denoiser is None:
            return Condition(features, image)
        anchor = upscale(lr, self.config.scale)
        return Condition(features, anchor if self.config.anchor == "bicubic" else torch.zeros_like(anchor))

    def target(self, hr: Tensor, condition: Condition) -> Tensor:
        """Return x_0 (B, 3 f^2, H / f, W / f) for hr (B, 3, H, W) in [-1, 1]."""
        x_0 = (hr - condition.anchor) * self.config.residual_scale
        if self.config.residual_clip:
            x_0 = x_0.clamp(-1, 1)
        return nn.functional.pixel_unshuffle(x_0, self.config.space_to_depth)

    def restore(self, x_0: Tensor, condition: Condition) -> Tensor:
        """Return the image (B, 3, H, W) that `target` maps to x_0 (exactly so where the residual was not clipped)."""
        residual = nn.functional.pixel_shuffle(x_0, self.config.space_to_depth)
        return residual / self.config.residual_scale + condition.anchor

    def diffused_shape(self, lr_height: int, lr_width: int) -> tuple[int, int, int]:
        """Return (channels, height, width) of x_0 for an LR image of this size."""
        assert self.config.denoiser is not None
        per_lr = self.config.scale // self.config.space_to_depth
        return self.config.denoiser.channels, lr_height * per_lr, lr_width * per_lr

    def predict(self, x_t: Tensor, noise_level: Tensor, features: Tensor) -> Tensor:
        """Return the denoiser's output (kind `config.prediction`) for x_t (B, C, h, w) at noise_level (B,)."""
        assert self.denoiser is not None, "a regression model has no denoiser"
        if self.config.told == "step":
            position = step_of_noise_level(self.config.schedule, noise_level)
        else:
            # The angle acos(a) grows evenly along a cosine schedule; x1000 spreads it over the embedding's frequencies
            # (without a large factor the network cannot tell the levels apart: models.md, WaveGrad's remark).
            position = torch.acos(noise_level.double().clamp(-1, 1)).float() * (1000 * 2 / math.pi)
        out: Tensor = self.denoiser(x_t, position, features)
        return out

    def regression_loss(self, hr: Tensor, lr: Tensor) -> Tensor:
        """Return the L1 loss of the encoder's own image (Li et al. 2021, sec. 4.1, pre-training)."""
        return nn.functional.l1_loss(self.encoder(lr)[1], hr)

    def diffusion_loss(self, hr: Tensor, lr: Tensor, noise_level: Tensor, eps: Tensor) -> Tensor:
        """Return the L1 loss of the denoiser with the encoder frozen; eps has the shape of x_0, noise_level (B,)."""
        with torch.no_grad():
            condition = self.condition(lr)
        x_0 = self.target(hr, condition)
        a = noise_level[:, None, None, None]
        b = torch.sqrt(1 - a * a)
        x_t = a * x_0 + b * eps
        wanted = {"eps": eps, "x_0": x_0, "v": a * eps - b * x_0}[self.config.prediction]
        return nn.functional.l1_loss(self.predict(x_t, noise_level, condition.features), wanted)

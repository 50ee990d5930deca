"""What each stage of training minimises."""

import torch
from torch import Tensor, nn

from diffsr_core.family import SuperResolver, amplitudes
from diffsr_core.recipe import StageRecipe

_SNR_CAP = 5.0


class Objective(nn.Module):
    """The loss of one stage as a module, so that DistributedDataParallel can wrap it. Freezes what the stage leaves."""

    def __init__(self, model: SuperResolver, stage: StageRecipe) -> None:
        super().__init__()
        if stage.in_one_step:
            raise ValueError(f"stage ({stage.name}) has a loss of its own; use objectives.objective_of")
        if stage.name != "regression" and model.denoiser is None:
            raise ValueError(f"stage ({stage.name}) needs a denoiser, and this model has none; use stage regression")
        if stage.name != "diffusion" and not model.config.encoder.regresses:
            raise ValueError(f"stage ({stage.name}) needs an encoder that regresses; use stage diffusion")
        self.model = model
        self.stage = stage
        for name, parameter in model.named_parameters():
            in_encoder = name.startswith("encoder.")
            parameter.requires_grad_(stage.name == "joint" or in_encoder == (stage.name == "regression"))

    def forward(self, hr: Tensor, lr: Tensor, noise_level: Tensor, eps: Tensor) -> Tensor:
        """Return the loss for hr (B, C, H, W), lr (B, C + E, h, w), noise_level (B,), eps in the shape of x_0."""
        # Frozen layers with running statistics (BatchNorm) must stay as they are, and so must their outputs.
        self.model.encoder.train(self.training and self.stage.name != "diffusion")
        if self.stage.name == "regression":
            return self._distance(self.model.encoder(lr)[1], hr).mean()
        with torch.set_grad_enabled(self.stage.name == "joint" and torch.is_grad_enabled()):
            features, image = self.model.encoder(lr)
            condition = self.model.condition_of(lr, features, image.detach())
        loss = self._diffusion_loss(features, self.model.target(hr, condition), noise_level, eps)
        if self.stage.name == "joint":
            loss = loss + self.stage.regression_weight * self._distance(image, hr).mean()
        return loss

    def _diffusion_loss(self, features: Tensor, x_0: Tensor, noise_level: Tensor, eps: Tensor) -> Tensor:
        a, b = amplitudes(noise_level, x_0.dtype)
        kind = self.model.config.prediction
        wanted = {"eps": eps, "x_0": x_0, "v": a * eps - b * x_0}[kind]
        prediction = self.model.predict(a * x_0 + b * eps, noise_level, features)
        loss = self._distance(prediction, wanted)
        if self.stage.weighting == "min_snr":
            loss = loss * min_snr_weight(noise_level, kind=kind)[:, None, None, None]
        return loss.mean()

    def _distance(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).abs() if self.stage.loss == "l1" else (a - b).square()


def min_snr_weight(noise_level: Tensor, *, kind: str) -> Tensor:
    """Return the weights (B,) of the squared error for a prediction of `kind` eps, x_0 or v.

    With SNR = a^2 / b^2: min(SNR, 5) / SNR, min(SNR, 5), min(SNR, 5) / (SNR + 1), which all are one weight of the
    error in x_0. Source: Hang et al. 2023, arXiv:2303.09556, eq. 7 and app.
    """
    gamma = noise_level.double().square()
    # SNR itself is infinite at a clean level, which float32 does reach: all three stay finite there.
    weight = {
        "eps": (_SNR_CAP * (1 - gamma) / gamma).clamp(max=1),
        "x_0": (gamma / (1 - gamma)).clamp(max=_SNR_CAP),
        "v": torch.minimum(gamma, _SNR_CAP * (1 - gamma)),
    }[kind]
    return weight.to(noise_level.dtype)

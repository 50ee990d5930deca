"""Training a denoiser to draw in one step, by a proper scoring rule: no teacher's trajectory, no discriminator.

f(x_t) is the x_0 that one step makes of noise, or of the regression noised to a level a, as a late start begins. Two
draws for the same LR are scored against the HR image,

    (rho(f(x_t), x_0) + rho(f(x_t'), x_0)) / 2  -  gamma / 2 * rho(f(x_t), f(x_t'))        gamma = diversity * (1 - a^2)

where rho is the mean length of the difference over many small views of the image (see `distance`). With gamma 1
this is the energy score: its expectation is least exactly where the draws have, in every view, the law that HR has
given the LR, so texture is drawn rather than averaged away. Below 1 draws are nearer to the median and less varied; at
0 it is a regression. A model with a start_level is trained at every level: where a sample starts is then the dial from
texture (0) to fidelity (towards 1), and one model has it all. Without one, all is noise.

Source: Gneiting and Raftery 2007, sec. 4.3 (energy score); De Bortoli et al. 2025, arXiv:2502.02483 (diffusion models
trained by it, and its weight below 1). The views, and the level as the weight, are ours.
"""

import torch
from torch import Tensor, nn

from diffsr_core.family import SuperResolver, amplitudes, x0_and_eps
from diffsr_core.recipe import StageRecipe
from diffsr_core.schedule import sampling_grid

_WINDOWS_PX = (1, 3, 8, 24)
_NUM_OCTAVES, _LEAST_PX = 3, 16
_TINY = 1e-4  # keeps the gradient of a length finite at 0; a hundredth of a level of 255


class EnergyScore(nn.Module):
    """The score as a module, so that DistributedDataParallel can wrap it. Trains the denoiser alone."""

    def __init__(self, model: SuperResolver, stage: StageRecipe) -> None:
        super().__init__()
        if model.denoiser is None:
            raise ValueError("stage (energy) needs a denoiser, and this model has none; use stage regression")
        if model.config.prediction == "eps":
            raise ValueError("prediction (eps) must be v or x_0, in which one step is stable; use x_0")
        if stage.weighting != "none":
            raise ValueError(
                f"weighting ({stage.weighting}) must be none in one step, whose score has its own weight by level"
            )
        self.model = model
        self.stage = stage
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("denoiser."))

    def forward(self, hr: Tensor, lr: Tensor, noise_level: Tensor, eps: Tensor) -> Tensor:
        """Return the loss for hr (B, C, H, W), lr (B, C + E, h, w), noise_level (B,) and eps (B, 2, *shape of x_0).

        eps: of two draws each. noise_level is not read where the model has no start_level: it starts at the noisiest.
        """
        model, config = self.model, self.model.config
        model.eval()  # no dropout, and running statistics as they are: what is trained is what will be sampled
        x_t, diversity = eps, self.stage.diversity * torch.ones_like(noise_level)
        with torch.no_grad():
            features, image = model.encoder(lr)
            condition = model.condition_of(lr, features, image)
            if config.start_level is None:
                noise_level = torch.full_like(noise_level, sampling_grid(config.schedule, 1).tolist()[0])
            else:
                a, b = amplitudes(noise_level, eps.dtype)
                x_t = (a * model.target(image, condition))[:, None] + b[:, None] * eps
                diversity = diversity * b.flatten().square()
        x_t, levels, features = torch.cat(x_t.unbind(1)), noise_level.repeat(2), condition.features.repeat(2, 1, 1, 1)
        x_0 = x0_and_eps(model.predict(x_t, levels, features), x_t, levels, kind=config.prediction)[0]
        images = [model.restore(draw, condition) for draw in x_0.float().chunk(2)]
        fidelity = sum((distance(image - hr) for image in images), start=torch.zeros_like(diversity)) / 2
        return (fidelity - diversity / 2 * distance(images[0] - images[1])).mean()


def distance(difference: Tensor) -> Tensor:
    """Return rho (B,), the mean length of each difference of images (B, C, H, W) over its views.

    A view is a window of 1, 3, 8 or 24 px, all channels, in the difference itself or in one of its three finest octaves
    (windows and octaves that fit into it). Small windows are short vectors, which a sum over the whole image would
    drown; large ones see where energy lies (with windows of up to 8 px alone a model drew texture in blotches). An
    octave of its own has an amplitude of its own.
    """
    bands, low = [difference], difference
    for _ in range(_NUM_OCTAVES):
        if min(low.shape[2:]) < _LEAST_PX:
            break
        smaller = nn.functional.avg_pool2d(low, 2)
        enlarged = nn.functional.interpolate(smaller, scale_factor=2, mode="bilinear", align_corners=False)
        bands.append(low[:, :, : enlarged.shape[2], : enlarged.shape[3]] - enlarged)
        low = smaller
    lengths = []
    for band in bands:
        power = band.square().sum(dim=1, keepdim=True)
        for side in (side for side in _WINDOWS_PX if side <= min(power.shape[2:])):
            mean = power if side == 1 else nn.functional.avg_pool2d(power, side, stride=max(1, side // 2))
            lengths.append((mean + _TINY**2).sqrt().mean(dim=(1, 2, 3)))
    return torch.stack(lengths).mean(dim=0)

"""One-step distillation of a trained diffusion model: SinSR's loss, for any model of the family.

    f(x_T) = the student's x_0 at the noisiest level: what `ddim` with one step makes of the noise x_T
    g(x_0) = the student's raw output at level 1, where x_t is x_0 itself, read as the noise that f would make x_0 of

    |f(x_T) - DDIM of the teacher(x_T)|^2  +  |g(DDIM of the teacher(x_T)) - x_T|^2  +  |f(sg[g(x_0)]) - x_0|^2

The first term is the distillation, the second makes the network its own inverse, and the third asks for the HR image
itself from the noise that the inverse gives it, so that the student is not bound to what its teacher can do.

g by `prediction`: an eps-network's output is noise by definition; v = a eps - b x_0 is eps at level 1; that of an
x_0-network gets a second meaning, which costs nothing, as f is never asked there (so too in the public code, whose
networks predict x_0). g by `told`: level 1 is amplitude 1, angle 0, and the first step, on which the public code is
trained too. f by residual_clip: the loss sees x_0 before the sampler clips it, for behind the clip there is no
gradient; clipped, it is only nearer to both of its targets, which are themselves within [-1, 1].

Source: Wang et al. 2023 (SinSR), arXiv:2311.14760, sec. 3.2-3.3, and its public code, which weighs the terms alike.
"""

from dataclasses import fields, replace

import torch
from torch import Tensor, nn

from diffsr_core.family import ModelConfig, SuperResolver
from diffsr_core.recipe import StageRecipe
from diffsr_core.sampler import last, sample
from diffsr_core.schedule import sampling_grid
from diffsr_core.sharding import whole

# What a student may have other than its teacher.
_OWN = ("denoiser", "told", "prediction", "one_step", "start_level", "consistency")


def student_config(teacher: ModelConfig) -> ModelConfig:
    """Return the teacher's settings for one step, x_0 in place of eps: with that it is not stable (see below)."""
    prediction = "x_0" if teacher.prediction == "eps" else teacher.prediction
    return replace(teacher, prediction=prediction, one_step=True, start_level=None)


def one_step(model: SuperResolver, x_T: Tensor, features: Tensor) -> Tensor:
    """Return f(x_T), both (B, C, h, w): the x_0 of a one-step sample, not clipped."""
    (noisiest, _) = sampling_grid(model.config.schedule, 1).tolist()
    return model.denoise(features)(x_T, noisiest)[0]


def inverse_step(model: SuperResolver, x_0: Tensor, features: Tensor) -> Tensor:
    """Return g(x_0), both (B, C, h, w): the noise that the model reads in a clean x_0."""
    return model.predict(x_0, torch.ones(len(x_0), device=x_0.device), features)


@torch.no_grad()
def teacher_target(teacher: SuperResolver, x_T: Tensor, features: Tensor, *, num_steps: int) -> Tensor:
    """Return the x_0 that the teacher makes of the noise x_T, both (B, C, h, w), in num_steps of DDIM.

    On its uniform grid, clipped as its samples are. Raises ValueError for more steps than its schedule has.
    """
    grid = sampling_grid(teacher.config.schedule, num_steps)
    return last(sample(teacher.denoise(features), grid, noise=lambda _: x_T, clip=teacher.config.residual_clip))


class Distillation(nn.Module):
    """The loss as a module, so that DistributedDataParallel can wrap it. Trains the student's denoiser alone.

    The teacher is frozen, moved to the student's device, and no submodule: no gradient, no state, nothing to wrap.
    The student's encoder must be the teacher's, weights included: both diffuse the same x_0 under the same condition,
    which is computed once. Its denoiser, what that is told and what it predicts may be others: x_T and x_0 are not.

    An eps-student is refused: its x_0 = (x_T - b eps) / a multiplies its errors by b / a, 151 on SR3's schedule and
    2000 on SRDiff's. A teacher may predict eps; its weights, read as x_0, start with f(x_T) near x_T (read as v, -x_T).

    Raises ValueError for models that do not fit each other, a weighting, or more teacher_steps than there are.
    """

    def __init__(self, student: SuperResolver, teacher: SuperResolver, stage: StageRecipe) -> None:
        super().__init__()
        if stage.weighting != "none":
            raise ValueError(f"weighting ({stage.weighting}) must be none in a distillation, which has one noise level")
        _check_fit(student.config, teacher.config)
        sampling_grid(teacher.config.schedule, stage.teacher_steps)  # refused now, not at the first step
        device = next(student.parameters()).device
        teacher = teacher.to(device).eval().requires_grad_(False)
        _check_encoder(student, teacher)
        self.model = student
        self.stage = stage
        self.teacher = (teacher,)  # a tuple, which nn.Module does not look into
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(name.startswith("denoiser."))

    def forward(self, hr: Tensor, lr: Tensor, noise_level: Tensor, eps: Tensor) -> Tensor:
        """Return the loss for hr (B, C, H, W), lr (B, C + E, h, w), and eps, the x_T, in the shape of x_0.

        noise_level is not read: f and g have one level each.
        """
        student, (teacher,) = self.model, self.teacher
        student.eval()  # no dropout, and running statistics as they are: what is trained is what will be sampled
        with torch.no_grad():
            features, anchor = condition = student.condition(lr)
            x_0 = student.target(hr, condition)
        taught = teacher_target(teacher, eps, features, num_steps=self.stage.teacher_steps)
        loss = self._distance(one_step(student, eps, features), taught)
        loss = loss + self._distance(inverse_step(student, taught, features), eps)
        # Last: autocast may keep the first copy of a weight (torch 2.13 does not), and this one has no gradient.
        with torch.no_grad():
            x_T = inverse_step(student, x_0, features)
        return loss + self._distance(one_step(student, x_T, features), x_0)

    def _distance(self, a: Tensor, b: Tensor) -> Tensor:
        return ((a - b).abs() if self.stage.loss == "l1" else (a - b).square()).mean()


def _check_fit(student: ModelConfig, teacher: ModelConfig) -> None:
    for name, config in (("student", student), ("teacher", teacher)):
        if config.denoiser is None:
            raise ValueError(f"{name} must have a denoiser, and this one is a regression; use a diffusion model")
    if student.prediction == "eps":
        raise ValueError(
            "prediction (eps) of the student must be v or x_0, in which one step is stable; use student_config"
        )
    for name in (field.name for field in fields(ModelConfig) if field.name not in _OWN):
        mine, its = getattr(student, name), getattr(teacher, name)
        if mine != its:
            raise ValueError(f"{name} ({mine}) of the student must be the teacher's ({its}); take the teacher's config")


def _check_encoder(student: SuperResolver, teacher: SuperResolver) -> None:
    its = teacher.encoder.state_dict()
    for name, value in student.encoder.state_dict().items():
        if not torch.equal(whole(value).to(its[name].device), its[name]):
            raise ValueError(f"encoder ({name}) of the student must be the teacher's; start from the teacher's weights")

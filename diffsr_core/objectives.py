"""Which loss a stage minimises."""

from torch import nn

from diffsr_core.distillation import Distillation
from diffsr_core.energy import EnergyScore
from diffsr_core.family import SuperResolver
from diffsr_core.objective import Objective
from diffsr_core.recipe import StageRecipe


def objective_of(model: SuperResolver, stage: StageRecipe, *, teacher: SuperResolver | None) -> nn.Module:
    """Return the stage's loss of this model. Raises ValueError for a model that it does not fit, or a missing teacher.

    It is called with hr (B, C, H, W), lr (B, C + E, h, w), noise_level (B,) and eps, as `augmentation.draw` gives them.
    """
    if stage.name == "energy":
        return EnergyScore(model, stage)
    if stage.name != "distillation":
        return Objective(model, stage)
    if teacher is None:
        raise ValueError("stage (distillation) needs a teacher, and there is none; give a trained model")
    return Distillation(model, teacher, stage)

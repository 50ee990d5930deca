"""The optimisation step and its state: no cluster, no files, no clock. Ray Train or a plain loop carries it.

All randomness of a step is a function of (seed, step, rank), so a resumed run needs no generator state: the same
batches give the same numbers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffsr_core.family import SuperResolver
from diffsr_core.schedule import sample_noise_levels


@dataclass(frozen=True, kw_only=True)
class StageRecipe:
    """One stage: `regression` trains the encoder by L1; `diffusion` trains the denoiser, the encoder frozen."""

    name: Literal["regression", "diffusion"]
    num_steps: int
    learning_rate: float


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """All that decides the weights beside the data. batch_size is global; lengths in steps unless named otherwise.

    The learning rate warms up linearly, then falls along a half cosine to 5 % at the end of each stage.
    """

    stages: tuple[StageRecipe, ...]
    batch_size: int
    seed: int = 0
    warmup_share: float = 0.05
    ema_half_life_images: int = 2000
    gradient_clip: float = 1.0
    precision: Literal["float32", "bf16"] = "float32"

    @property
    def num_steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.num_steps for stage in self.stages)

    def stage_at(self, step: int) -> tuple[StageRecipe, int]:
        """Return the stage that global `step` belongs to, and the step within it."""
        for stage in self.stages:
            if step < stage.num_steps:
                return stage, step
            step -= stage.num_steps
        raise IndexError("the step lies behind the last stage")


class Objective(nn.Module):
    """The loss of one stage as a module, so that DistributedDataParallel can wrap it."""

    def __init__(self, model: SuperResolver, stage: str) -> None:
        super().__init__()
        self.model = model
        self.stage = stage
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("encoder.") == (stage == "regression"))

    def forward(self, hr: Tensor, lr: Tensor, noise_level: Tensor, eps: Tensor) -> Tensor:
        if self.stage == "regression":
            return self.model.regression_loss(hr, lr)
        return self.model.diffusion_loss(hr, lr, noise_level, eps)


class DivergedError(ArithmeticError):
    """The loss or the gradient is not finite; the state before the step is intact."""


class Trainer:
    """A model, its EMA, its optimizer and the number of steps done.

    wrap turns an Objective into what is called (DistributedDataParallel on a cluster); rank keys the randomness.
    """

    def __init__(
        self,
        model: SuperResolver,
        recipe: TrainingRecipe,
        *,
        rank: int = 0,
        device: str = "cpu",
        wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
    ) -> None:
        self.model = model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.recipe, self.rank, self.device, self.wrap = recipe, rank, device, wrap
        self.step = 0
        self.ema = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self._enter_stage()

    @property
    def done(self) -> bool:
        """Whether every stage is finished."""
        return self.step >= self.recipe.num_steps

    @property
    def stage(self) -> str:
        """Name of the stage that the next step belongs to (of the last one when done)."""
        return self.recipe.stage_at(min(self.step, self.recipe.num_steps - 1))[0].name

    def _enter_stage(self) -> None:
        """Build the stage's objective and optimizer. The earlier stage's EMA becomes the weights that it left."""
        self.model.load_state_dict(self.ema)
        self.objective = self.wrap(Objective(self.model, self.stage).to(self.device))
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, betas=(0.9, 0.99), weight_decay=0.0)

    def learning_rate(self) -> float:
        """Return the learning rate of the next step."""
        stage, step = self.recipe.stage_at(self.step)
        warmup = max(1, round(self.recipe.warmup_share * stage.num_steps))
        progress = max(0.0, (step - warmup) / max(1, stage.num_steps - warmup))
        return (
            stage.learning_rate * min(1.0, (step + 1) / warmup) * (0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2)
        )

    def train_step(self, hr: Tensor, lr: Tensor) -> dict[str, float]:
        """Do one step on this rank's share of the batch, hr (b, 3, H, W) and lr (b, 3, h, w) in [-1, 1].

        Returns loss, gradient_norm, learning_rate. Raises DivergedError before any weight is touched.
        """
        generator = torch.Generator().manual_seed(step_seed(self.recipe.seed, self.step, self.rank))
        hr, lr = augment(hr.to(self.device), lr.to(self.device), generator=generator)
        levels = sample_noise_levels(self.model.config.schedule, len(hr), generator=generator)
        if self.stage == "diffusion":
            shape = self.model.diffused_shape(lr.shape[2], lr.shape[3])
            eps = torch.randn((len(hr), *shape), generator=generator)
        else:
            eps = torch.empty(0)
        rate = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(
            torch.device(self.device).type, dtype=torch.bfloat16, enabled=self.recipe.precision == "bf16"
        ):
            loss = self.objective(hr, lr, levels.to(self.device), eps.to(self.device))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.gradient_clip)
        if not (math.isfinite(float(loss.detach())) and math.isfinite(float(norm))):
            raise DivergedError(
                f"loss ({float(loss.detach())}) or gradient norm ({float(norm)}) is not finite at step {self.step}; "
                "lower the learning rate or use precision float32"
            )
        self.optimizer.step()
        self._update_ema()
        before = self.stage
        self.step += 1
        if not self.done and self.stage != before:
            self._enter_stage()
        return {"loss": float(loss.detach()), "gradient_norm": float(norm), "learning_rate": rate}

    @torch.no_grad()
    def _update_ema(self) -> None:
        within = self.recipe.stage_at(self.step)[1]
        decay = 0.5 ** (self.recipe.batch_size / self.recipe.ema_half_life_images)
        decay = min(decay, (1 + within) / (10 + within))  # early averages would otherwise be mostly initial weights
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                self.ema[name].lerp_(parameter.detach(), 1 - decay)

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Return (optimizer tensors by name, counters): with the weights and the EMA, all that a resume needs."""
        tensors = {
            f"{index}.{key}": value
            for index, entry in self.optimizer.state_dict()["state"].items()
            for key, value in entry.items()
        }
        return tensors, {"step": self.step}

    def load_state(
        self, weights: dict[str, Tensor], ema: dict[str, Tensor], tensors: dict[str, Tensor], counters: dict[str, int]
    ) -> None:
        """Continue where `state` was taken, bit for bit on the same number of workers."""
        self.step = int(counters["step"])
        self.ema = {name: value.clone().to(self.device) for name, value in ema.items()}
        self._enter_stage()
        self.model.load_state_dict(weights)
        entries: dict[int, dict[str, Any]] = {}
        for name, value in tensors.items():
            index, key = name.split(".")
            entries.setdefault(int(index), {})[key] = value.clone()
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": entries})


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return a 63-bit seed that differs for each (seed, step, rank)."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) % 2**64
    mixed = (mixed ^ (mixed >> 31)) * 0xD6E8FEB86659FD93 % 2**64
    return (mixed ^ (mixed >> 32)) >> 1


def augment(hr: Tensor, lr: Tensor, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the pairs under one of the eight symmetries of the square each; patches must be square."""
    picks = torch.randint(8, (len(hr),), generator=generator).tolist()

    def turn(image: Tensor, pick: int) -> Tensor:
        image = torch.rot90(image, pick % 4, dims=(1, 2))
        return image.flip(2) if pick >= 4 else image

    return (
        torch.stack([turn(x, k) for x, k in zip(hr, picks, strict=True)]),
        torch.stack([turn(x, k) for x, k in zip(lr, picks, strict=True)]),
    )

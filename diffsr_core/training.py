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

from diffsr_core.blur import gaussian_kernel
from diffsr_core.family import SuperResolver
from diffsr_core.objective import Objective, StageRecipe
from diffsr_core.schedule import sample_noise_levels


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """All that decides the weights beside the data. batch_size is global.

    Ours for every model, whatever its paper says: AdamW without decay and with betas 0.9 and 0.99, gradients clipped,
    an EMA of the weights as the result.

    condition_blur_px: the LR is blurred by a Gaussian whose sigma is drawn for each sample from 0 to this (LR pixels):
    the condition of a cascade's later model is a sample, softer than a photograph (Saharia et al. 2021, sec. 4.5).
    """

    stages: tuple[StageRecipe, ...]
    batch_size: int
    seed: int = 0
    augmentation: Literal["none", "flip", "dihedral"] = "dihedral"
    condition_blur_px: float = 0.0
    ema_half_life_images: int = 2000
    gradient_clip: float = 1.0
    precision: Literal["float32", "bf16"] = "float32"

    def __post_init__(self) -> None:
        if self.augmentation not in ("none", "flip", "dihedral"):
            raise ValueError(f"augmentation ({self.augmentation!r}) must be none, flip or dihedral; use one of them")
        if not self.stages or self.batch_size < 1:
            raise ValueError(
                f"stages ({len(self.stages)}) and batch_size ({self.batch_size}) must be at least 1; use 1 or more"
            )

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
    def stage(self) -> StageRecipe:
        """The stage that the next step belongs to (the last one when done)."""
        return self.recipe.stage_at(min(self.step, self.recipe.num_steps - 1))[0]

    def _enter_stage(self) -> None:
        """Build the stage's objective and optimizer. The earlier stage's EMA becomes the weights that it left."""
        self.model.load_state_dict(self.ema)
        self.objective = self.wrap(Objective(self.model, self.stage).to(self.device)).train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0, betas=(0.9, 0.99), weight_decay=0.0)

    def learning_rate(self) -> float:
        """Return the learning rate of the next step."""
        stage, step = self.recipe.stage_at(self.step)
        warmup = max(1, round(stage.warmup_share * stage.num_steps))
        progress = max(0.0, (step - warmup) / max(1, stage.num_steps - warmup))
        share = {
            "cosine": 0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2,
            "constant": 1.0,
            "halving": 0.5 ** (step * stage.plateaus // stage.num_steps),
        }[stage.decay]
        return stage.learning_rate * min(1.0, (step + 1) / warmup) * share

    def train_step(self, hr: Tensor, lr: Tensor) -> dict[str, float]:
        """Do one step on this rank's share of the batch, hr (b, C, H, W) and lr (b, C + E, h, w) in [-1, 1].

        Returns loss, gradient_norm, learning_rate. Raises DivergedError before any weight is touched.
        """
        generator = torch.Generator().manual_seed(step_seed(self.recipe.seed, self.step, self.rank))
        hr, lr = augment(
            hr.to(self.device), lr.to(self.device), generator=generator, symmetries=self.recipe.augmentation
        )
        config, own = self.model.config, self.model.config.encoder.channels
        if self.recipe.condition_blur_px:
            sigmas = torch.rand(len(lr), generator=generator) * self.recipe.condition_blur_px
            blurred = [gaussian_blur(x[:own], sigma) for x, sigma in zip(lr, sigmas.tolist(), strict=True)]
            lr = torch.cat([torch.stack(blurred), lr[:, own:]], dim=1)
        levels = sample_noise_levels(config.schedule, len(hr), generator=generator, continuous=config.told != "step")
        if self.stage.name != "regression":
            shape = self.model.diffused_shape(lr.shape[2], lr.shape[3])
            eps = torch.randn((len(hr), *shape), generator=generator)
        else:
            eps = torch.empty(0)
        rate = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        device = torch.device(self.device)
        autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.recipe.precision == "bf16")
        with autocast, torch.random.fork_rng([device] if device.type == "cuda" else []):
            # Of dropout, so that it resumes too; not the step's own seed, which would give it the bits of eps.
            torch.manual_seed(int(torch.randint(2**63 - 1, (1,), generator=generator)))
            loss = self.objective(hr, lr, levels.to(self.device), eps.to(self.device))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.gradient_clip)
        if not (math.isfinite(float(loss.detach())) and math.isfinite(float(norm))):
            for name, buffer in self.model.named_buffers():  # the forward pass moved the running statistics
                buffer.copy_(self.ema[name])
            raise DivergedError(
                f"loss ({float(loss.detach())}) or gradient norm ({float(norm)}) is not finite at step {self.step}; "
                "lower the learning rate or use precision float32"
            )
        self.optimizer.step()
        self._update_ema()
        self.step += 1
        if not self.done and self.recipe.stage_at(self.step)[1] == 0:
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
        for name, buffer in self.model.named_buffers():  # running statistics are averages already
            self.ema[name].copy_(buffer)

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


def augment(
    hr: Tensor, lr: Tensor, *, generator: torch.Generator, symmetries: str = "dihedral"
) -> tuple[Tensor, Tensor]:
    """Return the pairs, each under a symmetry drawn for it.

    symmetries: `none`, `flip` (left to right), or `dihedral` (all eight of the square; patches must then be square).
    """
    picks = torch.randint(8, (len(hr),), generator=generator).tolist()
    if symmetries == "none":
        return hr, lr

    def turn(image: Tensor, pick: int) -> Tensor:
        if symmetries == "dihedral":
            image = torch.rot90(image, pick % 4, dims=(1, 2))
        return image.flip(2) if pick >= 4 else image

    return (
        torch.stack([turn(x, k) for x, k in zip(hr, picks, strict=True)]),
        torch.stack([turn(x, k) for x, k in zip(lr, picks, strict=True)]),
    )


def gaussian_blur(image: Tensor, sigma_px: float) -> Tensor:
    """Return image (C, H, W) under a Gaussian of this standard deviation, the border repeated; 0 changes nothing."""
    kernel = torch.from_numpy(gaussian_kernel((sigma_px, sigma_px))).to(image)
    padded = nn.functional.pad(image[:, None], (len(kernel) // 2,) * 4, mode="replicate")
    return nn.functional.conv2d(padded, kernel[None, None])[:, 0]

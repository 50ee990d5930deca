"""All that decides the weights beside the data and the network: stages, and what they share. Data only."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

StageName = Literal["regression", "diffusion", "joint", "distillation", "energy"]
IN_ONE_STEP = ("distillation", "energy")
Decay = Literal["cosine", "constant", "halving"]
Optimizer = Literal["adamw", "adam", "muon"]
Precision = Literal["float32", "bf16", "fp16"]
Augmentation = Literal["none", "flip", "dihedral"]
OnSpike = Literal["skip", "stop"]


def _check_name(name: str, value: str, known: object) -> None:
    names = get_args(known)
    if value not in names:
        raise ValueError(f"{name} ({value!r}) must be one of {', '.join(names)}; use one of them")


def _check_range(name: str, value: float, low: float, high: float, *, above: bool = False) -> None:
    """Raise ValueError unless low <= value < high (above: low < value), which a NaN is not."""
    if not (low < value < high if above else low <= value < high):
        bounds = f"{'above' if above else 'at least'} {low:g}" + ("" if math.isinf(high) else f" and below {high:g}")
        raise ValueError(f"{name} ({value}) must be {bounds}{' and finite' if math.isinf(high) else ''}; change it")


@dataclass(frozen=True, kw_only=True)
class StageRecipe:
    """One stage: `regression` trains the encoder, `diffusion` the denoiser with the encoder frozen, `joint` both,
    `distillation` the denoiser to do in one step what a teacher does in teacher_steps, `energy` to draw in one step by
    the energy score.

    loss: of both parts. weighting: of the diffusion loss by noise level. regression_weight: of the encoder's own loss
    in a joint stage. diversity: of the draws of an energy stage (see `energy`). The learning rate warms up linearly
    over warmup_share of the steps, then follows decay: `cosine` to 5 %, `constant`, or `halving`, which halves it after
    each of `plateaus` equal spans. Raises ValueError.
    """

    name: StageName
    num_steps: int
    learning_rate: float
    loss: Literal["l1", "l2"] = "l1"
    weighting: Literal["none", "min_snr"] = "none"
    regression_weight: float = 1.0
    warmup_share: float = 0.05
    decay: Decay = "cosine"
    plateaus: int = 1
    teacher_steps: int = 4
    diversity: float = 1.0

    def __post_init__(self) -> None:
        _check_name("stage name", self.name, StageName)
        _check_name("stage loss", self.loss, Literal["l1", "l2"])
        _check_name("stage weighting", self.weighting, Literal["none", "min_snr"])
        _check_name("stage decay", self.decay, Decay)
        if self.weighting == "min_snr" and self.loss != "l2":
            raise ValueError(f"weighting (min_snr) is that of the squared error, not of {self.loss}; use loss l2")
        _check_range("num_steps", self.num_steps, 0, math.inf)
        _check_range("learning_rate", self.learning_rate, 0, math.inf)
        _check_range("regression_weight", self.regression_weight, 0, math.inf)
        _check_range("plateaus", self.plateaus, 1, math.inf)
        _check_range("teacher_steps", self.teacher_steps, 1, math.inf)
        if not 0 <= self.diversity <= 1:
            raise ValueError(f"diversity ({self.diversity}) must be from 0 to 1; 1 draws with HR's own variety")
        if not 0 <= self.warmup_share <= 1:
            raise ValueError(f"warmup_share ({self.warmup_share}) must be from 0 to 1; 0.05 is usual")

    @property
    def in_one_step(self) -> bool:
        """Whether the stage makes a model that is sampled in one step of ddim."""
        return self.name in IN_ONE_STEP

    @property
    def noises(self) -> tuple[int, ...]:
        """What an image's eps has before the shape of x_0: nothing, or how many the stage draws."""
        return (2,) if self.name == "energy" else ()

    def rate_at(self, step: int) -> float:
        """Return the learning rate of this stage's `step` (0-based)."""
        warmup = max(1, round(self.warmup_share * self.num_steps))
        progress = max(0.0, (step - warmup) / max(1, self.num_steps - warmup))
        share = {
            "cosine": 0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2,
            "constant": 1.0,
            "halving": 0.5 ** (step * self.plateaus // max(1, self.num_steps)),
        }[self.decay]
        return self.learning_rate * min(1.0, (step + 1) / warmup) * share


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """What all stages share. batch_size is global: it is split over the workers, and the result is theirs together.

    crop_px: HR side of a square drawn from each patch, None for all of it. condition_blur_px: the LR is blurred by a
    Gaussian whose sigma is drawn for each sample from 0 to this (LR pixels), and condition_noise likewise adds noise of
    a deviation from 0 to this (levels of 255): the condition of a cascade's later model is a sample, softer and
    dirtier than a photograph (Saharia et al. 2021, sec. 4.5; Ho et al. 2022, arXiv:2106.15282, sec. 4).
    ema_half_lives_images: one average of the weights each; the first is the model's. micro_batch: images of a
    worker's forward pass, its gradients are accumulated; None for its whole share.

    A step whose gradient is not finite, or (after a stage's warm-up) whose norm is above spike_factor times the running
    mean of the norms, is skipped (the weights stay, the step counts), more than max_skipped_steps of them in a row stop
    the training; with on_spike `stop` the first does. Raises ValueError.
    """

    stages: tuple[StageRecipe, ...]
    batch_size: int
    seed: int = 0
    augmentation: Augmentation = "dihedral"
    crop_px: int | None = None
    condition_blur_px: float = 0.0
    condition_noise: float = 0.0
    optimizer: Optimizer = "adamw"
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    ema_half_lives_images: tuple[int, ...] = (2000,)
    gradient_clip: float = 1.0
    precision: Precision = "float32"
    micro_batch: int | None = None
    on_spike: OnSpike = "skip"
    spike_factor: float = 10.0
    max_skipped_steps: int = 10

    def __post_init__(self) -> None:
        for name, known in (
            ("augmentation", Augmentation),
            ("optimizer", Optimizer),
            ("precision", Precision),
            ("on_spike", OnSpike),
        ):
            _check_name(name, getattr(self, name), known)
        if not self.stages or self.batch_size < 1:
            raise ValueError(
                f"stages ({len(self.stages)}) and batch_size ({self.batch_size}) must be at least 1; use 1 or more"
            )
        for name, least in (("crop_px", 1), ("micro_batch", 1), ("max_skipped_steps", 0)):
            value = getattr(self, name)
            if value is not None:
                _check_range(name, value, least, math.inf)
        for name in ("condition_blur_px", "condition_noise", "weight_decay"):
            _check_range(name, getattr(self, name), 0, math.inf)
        for beta in self.betas:
            _check_range("betas", beta, 0, 1)
        _check_range("gradient_clip", self.gradient_clip, 0, math.inf, above=True)
        _check_range("spike_factor", self.spike_factor, 1, math.inf, above=True)
        lives = self.ema_half_lives_images
        if not lives or min(lives) < 1 or len(set(lives)) < len(lives):
            raise ValueError(f"ema_half_lives_images {lives} must be different images, 1 or more each; use 2000")

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

    def share(self, rank: int, world: int) -> range:
        """Return the indices within a global batch that this worker trains; shares differ by at most one image."""
        return range(self.batch_size * rank // world, self.batch_size * (rank + 1) // world)

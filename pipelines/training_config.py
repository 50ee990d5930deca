"""The settings of a training: flags over the preset's model and recipe. What is left out is the preset's."""

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from diffsr_core import presets
from diffsr_core.family import START_LEVEL, ModelConfig
from diffsr_core.recipe import StageRecipe, TrainingRecipe
from diffsr_core.validation import ValidationRecipe
from pipelines.config import check
from pipelines.sampling import check_seed

_OF_RECIPE = (  # flags that stand for a field of the recipe
    ("batch_size", "batch_size"),
    ("micro_batch", "micro_batch"),
    ("optimizer", "optimizer"),
    ("weight_decay", "weight_decay"),
    ("ema_half_lives", "ema_half_lives_images"),
    ("gradient_clip", "gradient_clip"),
    ("augmentation", "augmentation"),
    ("crop", "crop_px"),
    ("condition_blur", "condition_blur_px"),
    ("condition_noise", "condition_noise"),
)
_OF_STAGES = ("learning_rate", "warmup_share", "decay", "plateaus", "loss")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a preset on a pair set. The same command again continues; when all steps are done it does nothing."""

    pairs: str = field(metadata={"unit": "URI"})
    """Pair set made by make_pairs."""
    output: str = field(metadata={"unit": "URI"})
    """Where checkpoints and the final model folder are kept."""
    preset: str = "nano-x4"
    """Model and recipe, of the README's table; with -regression its twin without a denoiser. --dry-run tells cost."""
    register: str | None = None
    """Name under which the model is registered in MLflow."""
    tune: str | None = field(default=None, metadata={"unit": "URI"})
    """YAML file of a search over any of these settings: many trainings, one winner."""
    init: str | None = field(default=None, metadata={"unit": "REF"})
    """Model to begin from instead of random weights (fine-tuning); a regression twin gives its encoder."""
    teacher: str | None = field(default=None, metadata={"unit": "REF"})
    """Diffusion model to distil into one that needs one step; training begins from its weights."""
    teacher_steps: int = 4
    """DDIM steps of the teacher that the student does in one."""
    one_step: bool = False
    """Train the denoiser to draw in one step, by the energy score: from --init, or after the encoder's stage."""
    diversity: float = 1.0
    """Of these draws from noise: 1 has HR's own variety, 0 none; less is nearer to HR and smoother."""
    start_level: float | None = None
    """Noise level from which they start unless the --start-level of a sampling says otherwise: 0 has the most texture,
    towards 1 there is least. All are trained where the encoder regresses; with --steps 0 only this changes. Left out:
    that of --init, else 0.7."""
    licence: str | None = None
    """Licence of the weights, for the model card."""
    data_licence: str | None = None
    """Licence of the training images, for the model card."""

    steps: int | None = field(default=None, metadata={"group": "recipe (default: the preset's)"})
    """Steps of the diffusion stage (of the only stage for a regression preset); 0, with --init, only validates."""
    encoder_steps: int | None = None
    """Steps of the encoder's own stage before it."""
    joint: bool = False
    """Train the encoder on in the diffusion stage, by its own loss and the denoiser's, instead of freezing it."""
    prediction: Literal["eps", "x_0", "v"] | None = None
    """What the denoiser predicts."""
    loss: Literal["l1", "l2"] | None = None
    """Distance, in every stage."""
    weighting: Literal["none", "min_snr"] | None = None
    """Weight of the diffusion loss by noise level; min_snr needs loss l2."""
    batch_size: int | None = None
    """Patches per step over all workers."""
    micro_batch: int | None = None
    """Patches of a worker's forward pass, its gradients are accumulated; default: all of the worker's share."""
    learning_rate: float | None = None
    """Peak rate of every stage."""
    warmup_share: float | None = None
    """Share of a stage's steps in which the rate rises."""
    decay: Literal["cosine", "constant", "halving"] | None = None
    """How the rate falls after it."""
    plateaus: int | None = None
    """Equal spans of a halving decay."""
    optimizer: Literal["adamw", "adam", "muon"] | None = None
    """Optimizer; muon takes other learning rates."""
    weight_decay: float | None = None
    """Its weight decay."""
    gradient_clip: float | None = None
    """Norm to which gradients are clipped."""
    ema_half_lives: tuple[int, ...] | None = field(default=None, metadata={"unit": "IMAGES,..."})
    """Half-lives of the averages of the weights; the first is the model's, the others are validated beside it."""
    augmentation: Literal["none", "flip", "dihedral"] | None = None
    """Symmetries of the pairs: none, left to right, or all eight of the square."""
    crop: int | None = field(default=None, metadata={"unit": "PIXELS"})
    """HR side of a square drawn from each patch."""
    condition_blur: float | None = field(default=None, metadata={"unit": "PIXELS"})
    """Blur of the LR in training, a sigma from 0 to this, for a stage of a cascade."""
    condition_noise: float | None = field(default=None, metadata={"unit": "LEVELS"})
    """Noise of the LR in training, a deviation from 0 to this, of 255."""
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """Arithmetic of the forward pass."""
    seed: int = 0
    """Seed of initial weights, order, noise and augmentation."""
    on_spike: Literal["skip", "stop"] = "skip"
    """What follows a gradient that is not finite, or far above its running mean."""
    spike_factor: float = 10.0
    """How far above."""
    max_skipped_steps: int = 10
    """Skipped steps in a row after which training stops."""
    max_corrupt_share: float = 0.001
    """Share of damaged rows among those read above which training stops; another row takes the place of each."""

    sampler: str = field(default="ddim", metadata={"group": "validation"})
    """Sampler of the validation."""
    grid: str = "uniform"
    """Its grid."""
    sampling_steps: int | None = None
    """Its steps; default: 4, 1 with --teacher or --one-step."""
    val_pairs: int = 16
    """Pairs of the split val that are looked at, always the same."""
    lpips: str | None = field(default=None, metadata={"unit": "FOLDER"})
    """Folder of LPIPS's weight files, on every machine; without it LPIPS is left out."""

    checkpoint_every: int = field(default=200, metadata={"group": "running"})
    """Steps between checkpoints (each with a validation and a picture)."""
    keep: int = 2
    """Checkpoints kept, beside the one with the least validation loss."""
    result: Literal["last", "best"] = "last"
    """Which checkpoint becomes the model: the last, or that with the least validation loss."""
    log_every: int = 20
    """Steps between metric reports."""
    engine: Literal["ray", "local"] = "ray"
    """Ray Train, or a plain loop in this process."""
    num_workers: int = 1
    """Training workers."""
    min_workers: int | None = None
    """Train with as few as this while the cluster has no more (elastic); default: exactly num_workers."""
    cpus_per_worker: float = 1.0
    """Logical CPUs of a worker; its whole number is its threads."""
    data_workers: int = 1
    """Processes beside each worker that read and decode its pairs (engine ray), one logical CPU each."""
    use_gpu: bool = False
    """One GPU per worker."""
    wait_for_nodes: bool = False
    """Wait for a cluster that has too few CPUs or GPUs to grow, instead of refusing."""
    strategy: Literal["ddp", "fsdp2"] = "ddp"
    """Every worker holds the model, or a share of it (for models that one GPU does not hold)."""
    compile: bool = False
    """Compile the training step with torch.compile."""
    checkpoint_activations: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, more time."""
    max_failures: int = 2
    """Worker failures after which training stops; each resumes from the newest checkpoint."""
    dry_run: bool = False
    """Say what would be trained and what memory it takes, and stop."""

    def __post_init__(self) -> None:
        names = presets.names()
        check(self.preset in names, "preset", self.preset, f"must be one of {', '.join(names)}", "use one of them")
        for name in ("batch_size", "checkpoint_every", "keep", "log_every", "num_workers", "data_workers",
                     "sampling_steps", "val_pairs", "teacher_steps"):  # fmt: skip
            value = getattr(self, name)
            check(value is None or value >= 1, name, value, "must be at least 1", "use 1 or more")
        check_seed(self.seed)
        check(self.max_failures >= 0, "max_failures", self.max_failures, "must be at least 0", "use 0 or more")
        check(self.cpus_per_worker > 0, "cpus_per_worker", self.cpus_per_worker, "must be above 0", "use 0.5 or 1")
        check(0 <= self.max_corrupt_share <= 1, "max_corrupt_share", self.max_corrupt_share, "must be from 0 to 1",
              "use 0 to stop at the first damaged row")  # fmt: skip
        check(self.condition_blur is None or 0 <= self.condition_blur <= 10, "condition_blur", self.condition_blur,
              "must be from 0 to 10", "use 0")  # fmt: skip
        check(self.condition_noise is None or 0 <= self.condition_noise <= 100, "condition_noise",
              self.condition_noise, "must be from 0 to 100", "use 0")  # fmt: skip
        self._check_stages()
        self._check_workers()
        self.model()
        self.recipe()
        self.validation()

    def _check_stages(self) -> None:
        two = len(presets.get(self.preset).recipe.stages) > 1
        check(self.steps is None or self.steps >= (0 if self.init else 1), "steps", self.steps,
              "must be at least 1, or 0 to validate the model of --init", "use 1 or more")  # fmt: skip
        check(self.encoder_steps is None or self.encoder_steps >= 0, "encoder_steps", self.encoder_steps,
              "must be at least 0", "use 0 to skip that stage")  # fmt: skip
        check(self.encoder_steps is None or two, "encoder_steps", self.encoder_steps,
              f"is of presets with an encoder stage, which {self.preset} has not", "leave it out")  # fmt: skip
        check(not self.joint or two, "joint", self.joint,
              f"needs an encoder and a denoiser to train, which {self.preset} has not", "leave it out")  # fmt: skip
        check(self.encoder_steps != 0 or self.joint or bool(self.init), "encoder_steps", self.encoder_steps,
              "would freeze a random encoder", "use 1 or more, --joint, or --init with its weights")  # fmt: skip
        if self.teacher:
            check(presets.get(self.preset).model.denoiser is not None, "teacher", self.teacher,
                  f"is of diffusion presets; {self.preset} has no denoiser", "use another preset")  # fmt: skip
            for name in ("init", "encoder_steps", "joint"):
                check(not getattr(self, name), name, getattr(self, name),
                      "has no meaning beside --teacher, whose weights come first", "leave it out")  # fmt: skip
            check(self.weighting in (None, "none"), "weighting", self.weighting,
                  "is by noise level, and a distillation has one", "leave it out")  # fmt: skip
        check(self.steps != 0 or self.encoder_steps is None, "encoder_steps", self.encoder_steps,
              "has no meaning beside --steps 0, which trains nothing", "leave it out")  # fmt: skip
        if self.one_step:
            check(presets.get(self.preset).model.denoiser is not None, "one_step", self.one_step,
                  f"is of diffusion presets; {self.preset} has no denoiser", "use another preset")  # fmt: skip
            for name in ("joint", "teacher"):
                check(not getattr(self, name), name, getattr(self, name), "is another objective than --one-step",
                      "leave out one of them")  # fmt: skip
            check(self.weighting in (None, "none"), "weighting", self.weighting,
                  "is not of the energy score, which has its own by level", "leave it out")  # fmt: skip
            check(self.loss is None, "loss", self.loss, "is not the energy score's distance", "leave it out")
            check(self.model().prediction != "eps", "prediction", self.model().prediction,
                  "must be v or x_0, in which one step is stable", "use --prediction x_0")  # fmt: skip
        check(self.one_step or self.start_level is None, "start_level", self.start_level,
              "is of --one-step", "leave it out" if self.teacher else "give that too")  # fmt: skip
        check(self.one_step or self.diversity == 1.0, "diversity", self.diversity, "is of --one-step", "give that too")
        check(0 <= self.diversity <= 1, "diversity", self.diversity, "must be from 0 to 1", "use 1")
        samples = presets.get(self.preset).model.denoiser is not None and not (self.teacher or self.one_step)
        for name, idle in (("sampler", {"ddim"}), ("grid", {"uniform"}), ("sampling_steps", {None, 1})):
            check(samples or getattr(self, name) in idle, name, getattr(self, name), "is of a validation that "
                  "samples in several steps; a regression has none, --teacher and --one-step one step of ddim",
                  "leave it out")  # fmt: skip
        halves = self.decay == "halving" or self.decay is None and any(
            stage.decay == "halving" for stage in presets.get(self.preset).recipe.stages)  # fmt: skip
        check(self.plateaus is None or halves, "plateaus", self.plateaus, "is of decay halving", "give that too")
        if not self.teacher and self.teacher_steps != 4:
            check(False, "teacher_steps", self.teacher_steps, "is of a distillation", "give --teacher, or leave it out")

    def _check_workers(self) -> None:
        check(self.engine == "ray" or self.num_workers == 1, "num_workers", self.num_workers,
              "must be 1 with engine local", "use --engine ray")  # fmt: skip
        check(self.engine == "ray" or self.strategy == "ddp", "strategy", self.strategy,
              "needs workers to share the model among, which engine local has not", "use --engine ray")  # fmt: skip
        batch = self.batch_size or presets.get(self.preset).recipe.batch_size
        check(self.num_workers <= batch, "num_workers", self.num_workers,
              f"must be at most the batch ({batch}), one patch each", f"use {batch}")  # fmt: skip
        check(self.engine == "ray" or self.min_workers is None, "min_workers", self.min_workers,
              "is of engine ray", "leave it out")  # fmt: skip
        uneven = [n for n in range(self.min_workers or self.num_workers, self.num_workers + 1) if batch % n]
        check(self.strategy == "ddp" or self.micro_batch is None or not uneven, "micro_batch", self.micro_batch,
              f"needs, with fsdp2, a batch ({batch}) that all numbers of workers divide ({uneven[:1]} does not)",
              "leave it out, or change the batch")  # fmt: skip
        muon = (self.optimizer or presets.get(self.preset).recipe.optimizer) == "muon"
        check(not (muon and self.strategy == "fsdp2"), "strategy", self.strategy,
              "splits the matrices that optimizer muon needs whole", "use --optimizer adamw")  # fmt: skip
        least = self.min_workers
        check(least is None or 1 <= least <= self.num_workers, "min_workers", least,
              f"must be from 1 to num_workers ({self.num_workers})", "use 1")  # fmt: skip

    def model(self) -> ModelConfig:
        """Return the model: the preset's with what was overridden."""
        model = presets.get(self.preset).model
        if self.one_step:
            usual = START_LEVEL if model.encoder.regresses else None
            model = replace(model, one_step=True, start_level=usual if self.start_level is None else self.start_level)
        if self.prediction is None or self.prediction == model.prediction:
            return model
        check(model.denoiser is not None, "prediction", self.prediction, f"is of a denoiser, which {self.preset} has "
              "not", "leave it out")  # fmt: skip
        return replace(model, prediction=self.prediction)

    def recipe(self) -> TrainingRecipe:
        """Return the training recipe: the preset's with what was overridden."""
        recipe = presets.get(self.preset).recipe
        changes = {theirs: getattr(self, ours) for ours, theirs in _OF_RECIPE}
        changes = {name: value for name, value in changes.items() if value is not None}
        return replace(
            recipe,
            stages=self._stages(recipe.stages),
            seed=self.seed,
            precision=self.precision,
            on_spike=self.on_spike,
            spike_factor=self.spike_factor,
            max_skipped_steps=self.max_skipped_steps,
            **changes,
        )

    def _stages(self, stages: tuple[StageRecipe, ...]) -> tuple[StageRecipe, ...]:
        common: dict[str, Any] = {name: getattr(self, name) for name in _OF_STAGES}
        common = {name: value for name, value in common.items() if value is not None}
        *first, last = stages
        if self.teacher:
            first, last = [], replace(last, name="distillation", loss="l2", teacher_steps=self.teacher_steps)
        if self.one_step:
            last = replace(last, name="energy", diversity=self.diversity)
        if self.encoder_steps is not None:
            first = [replace(stage, num_steps=self.encoder_steps) for stage in first]
        last = last if self.steps is None else replace(last, num_steps=self.steps)
        last = replace(last, name="joint") if self.joint and last.name == "diffusion" else last
        if self.steps == 0:
            first = []
        weighted: dict[str, Any] = {"weighting": self.weighting} if self.weighting else {}
        if self.weighting == "min_snr" and self.loss is None:
            weighted["loss"] = "l2"  # of which it is a weight
        return tuple(
            replace(stage, **common, **({} if stage.name == "regression" else weighted))
            for stage in [*(stage for stage in first if stage.num_steps), last]
        )

    def validation(self) -> ValidationRecipe:
        """Return how the validation samples."""
        steps = self.sampling_steps or (1 if self.teacher or self.one_step else 4)
        return ValidationRecipe(sampler=self.sampler, grid=self.grid, num_steps=steps)

    @property
    def threads(self) -> int:
        """Intra-operator threads of a CPU worker."""
        return max(1, math.floor(self.cpus_per_worker))

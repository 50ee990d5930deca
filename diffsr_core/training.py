"""The optimisation step, its state, and the loop over it: no cluster, no files. Ray Train or a plain loop carries it.

All randomness of a step is a function of (seed, step, index in the batch), so a resumed run needs no generator state:
the same batches give the same numbers. What no preset's paper says is ours for all: gradients clipped, steps that would
throw the weights off skipped, and an average of the weights as the result.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffsr_core.activations import checkpoint_activations
from diffsr_core.augmentation import Drawn, draw, step_seed
from diffsr_core.averages import Averages
from diffsr_core.family import SuperResolver
from diffsr_core.muon import Muon
from diffsr_core.objectives import objective_of
from diffsr_core.recipe import StageRecipe, TrainingRecipe
from diffsr_core.sharding import gathered, shard, split_like, synchronise, whole

AUTOCAST = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SETTLED = 20  # steps of a stage before the mean of its gradient norms says what is usual
# Of fp16: doubled after so many good steps, halved by each bad one.
_FIRST_LOSS_SCALE, _LOSS_SCALE_STEPS = 2.0**15, 2000


class DivergedError(ArithmeticError):
    """Steps had to be skipped more often than the recipe allows; the state before them is intact."""


class TrainerState(NamedTuple):
    """All that a resume needs. averages: by half-life in images. counters: numbers that JSON keeps."""

    weights: dict[str, Tensor]
    averages: dict[int, dict[str, Tensor]]
    optimizer: dict[str, Tensor]
    counters: dict[str, int | float]


def _check_shares(recipe: TrainingRecipe, world: int, *, sharded: bool) -> None:
    size = recipe.batch_size
    if size < world:
        raise ValueError(f"batch_size ({size}) must be at least 1 for each of {world} workers; use fewer of them")
    if sharded and recipe.micro_batch is not None and size % world:  # they meet in every forward pass
        raise ValueError(f"batch_size ({size}) must be a multiple of {world} sharded workers for micro_batch; round it")


class Trainer:
    """A model, its averages, its optimizer and the number of steps done.

    wrap turns an objective into what is called (DistributedDataParallel on a cluster). rank and world say which share
    of a global batch this worker trains. teacher: of distillation stages. sharded: FSDP2 over the default process
    group, instead of wrap. compiled: torch.compile. checkpointed: activations are computed again instead of kept.
    Convolutions run in channels_last, which is faster wherever it was measured; not where they are sharded.
    Raises ValueError for a batch that cannot be shared out.
    """

    def __init__(
        self,
        model: SuperResolver,
        recipe: TrainingRecipe,
        *,
        rank: int = 0,
        world: int = 1,
        device: str = "cpu",
        wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
        teacher: SuperResolver | None = None,
        sharded: bool = False,
        compiled: bool = False,
        checkpointed: bool = False,
    ) -> None:
        _check_shares(recipe, world, sharded=sharded)
        if sharded and recipe.optimizer == "muon":
            raise ValueError("optimizer (muon) needs whole matrices, and sharded workers hold parts; use adamw")
        self.model = model.to(device)
        self.teacher = None if teacher is None else teacher.to(device).eval()
        self.recipe, self.rank, self.world, self.device = recipe, rank, world, torch.device(device)
        self.wrap, self.sharded, self.compiled = wrap, sharded, compiled
        if checkpointed:
            checkpoint_activations(self.model)
        if sharded:
            shard(self.model)  # it takes contiguous weights only
        else:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.step = 0
        self.skipped = self.skipped_in_a_row = 0
        self.loss_scale, self.good_steps = _FIRST_LOSS_SCALE if recipe.precision == "fp16" else 1.0, 0
        self.averages = Averages(self.model, recipe.ema_half_lives_images)
        self._enter_stage()

    @property
    def ema(self) -> dict[str, Tensor]:
        """The average that is the model's."""
        return self.averages.first

    @property
    def done(self) -> bool:
        """Whether every stage is finished."""
        return self.step >= self.recipe.num_steps

    @property
    def stage(self) -> StageRecipe:
        """The stage that the next step belongs to (the last one when done)."""
        return self.recipe.stage_at(min(self.step, self.recipe.num_steps - 1))[0]

    @property
    def share(self) -> range:
        """The indices within a global batch that this worker trains."""
        return self.recipe.share(self.rank, self.world)

    def learning_rate(self) -> float:
        """Return the learning rate of the next step."""
        stage, step = self.recipe.stage_at(self.step)
        return stage.rate_at(step)

    def draw(self, step: int, hr: Tensor, lr: Tensor) -> Drawn:
        """Return what `optimise` takes at `step` for this worker's share of the stored pairs, on the device.

        Touches no state, so that it may run ahead in another thread.
        """
        drawn = draw(hr, lr, config=self.model.config, recipe=self.recipe, step=step, indices=self.share)
        return drawn.to(self.device)

    def train_step(self, hr: Tensor, lr: Tensor) -> dict[str, float]:
        """Return `optimise` of what is drawn for hr (b, C, H, W) and lr (b, C + E, h, w) in [-1, 1]."""
        return self.optimise(self.draw(self.step, hr, lr))

    def optimise(self, drawn: Drawn) -> dict[str, float]:
        """Do one step; all workers together, each with its share.

        Returns loss (of this share), gradient_norm (of the whole batch, before clipping), learning_rate, and skipped, 1
        for a step that left the weights as they were. Raises DivergedError, by the recipe's policy, with the weights,
        the averages and the optimizer as they were before the first of the bad steps.
        """
        rate = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._backward(drawn)
        if self.loss_scale != 1.0:
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad.div_(self.loss_scale)
        norm = float(whole(nn.utils.clip_grad_norm_(self.parameters, self.recipe.gradient_clip)))
        good = math.isfinite(norm) and not self._is_spike(norm)
        if good:
            self._accept(norm)
        else:
            self._skip(norm, loss)
        self.step += 1
        if not self.done and self.recipe.stage_at(self.step)[1] == 0:
            self._enter_stage()
        return {"loss": loss, "gradient_norm": norm, "learning_rate": rate, "skipped": float(not good)}

    def state(self) -> TrainerState:
        """Return the state, tensors whole; where they are split all workers call it, and the first one gets them."""
        first = self.rank == 0
        tensors = {
            f"{index}.{key}": value
            for index, entry in self.optimizer.state_dict()["state"].items()
            for key, value in entry.items()
        }
        return TrainerState(
            weights=gathered(self.model.state_dict(), keep=first),
            averages={k: gathered(average, keep=first) for k, average in self.averages.by_half_life.items()},
            optimizer=gathered(tensors, keep=first),
            counters={
                "step": self.step,
                "skipped": self.skipped,
                "skipped_in_a_row": self.skipped_in_a_row,
                "norm_mean": self.norm_mean,
                "norm_count": self.norm_count,
                "loss_scale": self.loss_scale,
                "good_steps": self.good_steps,
            },
        )

    def load_state(self, state: TrainerState) -> None:
        """Continue where `state` was taken: bit for bit on the same number of workers, and on any other."""
        counters = state.counters
        self.step = int(counters["step"])
        self.averages.load({k: self._placed(average) for k, average in state.averages.items()})
        self._load_weights(state.weights)
        self._build_stage()
        self.skipped, self.skipped_in_a_row = int(counters["skipped"]), int(counters["skipped_in_a_row"])
        self.norm_mean, self.norm_count = float(counters["norm_mean"]), int(counters["norm_count"])
        self.loss_scale, self.good_steps = float(counters["loss_scale"]), int(counters["good_steps"])
        entries: dict[int, dict[str, Any]] = {}
        for name, value in state.optimizer.items():
            index, key = name.split(".")
            placed = value.clone()
            if value.ndim:  # in the parameter's layout, without which each update is slower
                parameter = self.parameters[int(index)]
                placed = torch.empty_like(parameter).copy_(split_like(value, parameter))
            entries.setdefault(int(index), {})[key] = placed
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": entries})

    def _enter_stage(self) -> None:
        """Begin a stage. The earlier one's average becomes the weights that it left, and every average begins there."""
        self._load_weights(self.ema)
        self.averages.restart()
        self._build_stage()

    def _build_stage(self) -> None:
        """Build the stage's objective and optimizer for the weights as they are."""
        self.norm_mean, self.norm_count = 0.0, 0
        objective = objective_of(self.model, self.stage, teacher=self.teacher)
        if self.compiled:
            objective.compile()
        self.objective = (objective if self.sharded else self.wrap(objective)).train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "muon": Muon}[self.recipe.optimizer]
        self.optimizer = kind(self.parameters, lr=0.0, betas=self.recipe.betas, weight_decay=self.recipe.weight_decay)

    def _placed(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors where the model's lie: on its device, and split as they are."""
        return {name: split_like(tensors[name], value) for name, value in self.model.state_dict().items()}

    def _load_weights(self, weights: dict[str, Tensor]) -> None:
        self.model.load_state_dict(self._placed(weights))

    def _backward(self, drawn: Drawn) -> float:
        """Accumulate the gradients of the share, micro-batch by micro-batch; return its mean loss."""
        size = self.recipe.micro_batch or len(drawn.hr)
        precision = AUTOCAST[self.recipe.precision]
        autocast = torch.autocast(self.device.type, dtype=precision, enabled=precision != torch.float32)
        total = torch.zeros((), device=self.device)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            # Of dropout, so that it resumes too; of no sample, which would give it the bits of eps.
            torch.manual_seed(step_seed(self.recipe.seed, self.step, self.recipe.batch_size + self.rank))
            for start in range(0, len(drawn.hr), size):
                part = Drawn(*(x[start : start + size] for x in drawn))
                last = start + size >= len(drawn.hr)
                with self._synchronised(last):
                    with autocast:
                        loss = self.objective(*part)
                    total += loss.detach() * len(part.hr)
                    # Workers average their gradients: shares of unequal size still sum to the mean of the batch. An
                    # infinite loss may have a finite gradient: it must not pass for one.
                    weight = len(part.hr) * self.world / self.recipe.batch_size * self.loss_scale
                    (loss * weight * torch.where(loss.detach().isfinite(), 1.0, math.nan)).backward()
        return float(total) / len(drawn.hr)

    def _synchronised(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients meet those of the other workers in a step's last micro-batch only."""
        if self.sharded:
            synchronise(self.model, last)
            return nullcontext()
        if last or not isinstance(self.objective, nn.parallel.DistributedDataParallel):
            return nullcontext()
        return self.objective.no_sync()

    def _is_spike(self, norm: float) -> bool:
        # While the rate rises, layers that begin at zero wake up, and norms grow a hundredfold without any harm.
        settled = max(_SETTLED, round(self.stage.warmup_share * self.stage.num_steps))
        return self.norm_count >= settled and norm > self.recipe.spike_factor * self.norm_mean

    def _accept(self, norm: float) -> None:
        self.optimizer.step()
        self.skipped_in_a_row = 0
        self.norm_count += 1
        self.norm_mean += (norm - self.norm_mean) / min(self.norm_count, 100)
        within = self.recipe.stage_at(self.step)[1]
        self.averages.update(num_images=self.recipe.batch_size, num_updates=within + 1)
        self.good_steps += 1
        if self.recipe.precision == "fp16" and self.good_steps >= _LOSS_SCALE_STEPS:
            self.loss_scale, self.good_steps = self.loss_scale * 2, 0

    def _skip(self, norm: float, loss: float) -> None:
        """Leave everything as it was, or raise: the policy of the recipe. fp16 first tries a smaller loss scale."""
        for name, buffer in self.model.named_buffers():  # the forward pass moved the running statistics
            buffer.copy_(self.ema[name])
        if self.recipe.precision == "fp16" and not math.isfinite(norm) and self.loss_scale > 1:
            self.loss_scale, self.good_steps = self.loss_scale / 2, 0
            return
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.recipe.on_spike == "stop" or self.skipped_in_a_row > self.recipe.max_skipped_steps:
            above = f"above {self.recipe.spike_factor:g} times its mean ({self.norm_mean:.3g})"
            what = above if math.isfinite(norm) else "not finite"
            raise DivergedError(
                f"gradient norm ({norm:.4g}, loss {loss:.4g}) is {what} at step {self.step}, "
                f"{self.skipped_in_a_row} steps in a row; lower the learning rate or use precision float32"
            )


def fit(trainer: Trainer, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[dict[str, float]]:
    """Train to the end; yield each step's metrics, and `waited_s`, the seconds that it waited for its batch.

    batches: this worker's shares from trainer.step on, hr (b, C, H, W) and lr (b, C + E, h, w) in [-1, 1]. The next one
    is drawn, and copied to the device, in a thread beside the step. Raises DivergedError, and what batches raises.
    """
    source = iter(batches)
    last = trainer.recipe.num_steps

    def draw_next(step: int) -> Drawn:
        for hr, lr in source:
            return trainer.draw(step, hr, lr)
        raise ValueError(f"batches must last for {last} steps, and ended before step {step}; give one for each")

    with ThreadPoolExecutor(1, thread_name_prefix="draw") as pool:
        ahead = pool.submit(draw_next, trainer.step) if not trainer.done else None
        while ahead is not None:
            began = time.monotonic()
            drawn = ahead.result()
            waited = time.monotonic() - began
            following = trainer.step + 1
            ahead = pool.submit(draw_next, following) if following < last else None
            yield {**trainer.optimise(drawn), "waited_s": waited}

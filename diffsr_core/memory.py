"""How much memory a training takes, planned before it begins: its steps run on tensors that have shapes and no values.

What is planned are tensors, and an eighth for fragments. What the process holds besides (a CUDA context: about 0.5 GiB)
comes on top. Against the peak of real float32 steps on a CPU the plan was 1.04 to 1.16 times as much.
"""

import math
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from diffsr_core import activations
from diffsr_core.augmentation import noise_shape
from diffsr_core.family import ModelConfig, SuperResolver
from diffsr_core.objectives import objective_of
from diffsr_core.recipe import StageRecipe, TrainingRecipe

_NARROW = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# What the allocator cannot hand out again, as a share of all: 5 to 8 % were measured with glibc's.
_FRAGMENTS = 1 / 8
# Autocast's lists, as far as the networks use them.
_TO_NARROW = {"conv2d", "conv_transpose2d", "linear", "matmul", "scaled_dot_product_attention"}
_TO_FLOAT32 = {"cuda": {"group_norm"}, "cpu": {"pad"}}


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes of one worker at the peak of a step.

    averages_bytes: of the state, buffers included, and the model that validation looks through. activations_bytes: all
    that lives only within a step, and fragments.
    """

    parameters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    averages_bytes: int
    activations_bytes: int

    @property
    def total_bytes(self) -> int:
        """The sum."""
        parts = (self.parameters_bytes, self.gradients_bytes, self.optimizer_bytes, self.averages_bytes)
        return sum(parts) + self.activations_bytes

    def describe(self) -> str:
        """Return one line: the total and its parts, in GiB or MiB."""
        names = ("parameters", "gradients", "optimizer", "averages", "activations")
        parts = ", ".join(f"{name} {_in_words(getattr(self, f'{name}_bytes'))}" for name in names)
        return f"{_in_words(self.total_bytes)} ({parts})"


def plan_memory(
    config: ModelConfig,
    recipe: TrainingRecipe,
    *,
    patch_px: int,
    world: int = 1,
    checkpoint_activations: bool = False,
    sharded: bool = False,
    teacher: bool = False,
    device: str = "cuda",
) -> MemoryPlan:
    """Return the plan of the stage that takes most, for the worker with the largest share of the batch.

    patch_px: HR side of the stored patches, of which recipe.crop_px may take less. teacher: a frozen model of the same
    kind lies beside this one, as distillation needs. device: `cuda` or `cpu`, whose autocast differ. Raises ValueError
    for a patch that the model cannot take, and what Objective and Distillation raise.
    """
    side = recipe.crop_px or patch_px
    stride, smallest = config.lr_stride * config.scale, config.lr_smallest * config.scale
    if side % stride or side < smallest:
        raise ValueError(
            f"patch ({side} px) must be a multiple of {stride} px, at least {smallest}, for this model; crop it so"
        )
    with torch.device("meta"):
        model, beside = SuperResolver(config), SuperResolver(config) if teacher else None
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if checkpoint_activations:
        activations.checkpoint_activations(model)
    plans = []
    for stage in recipe.stages:
        step = _step_bytes(model, recipe, stage, side=side, world=world, teacher=beside, device=device)
        plans.append(_plan(model, recipe, step_bytes=step, world=world, sharded=sharded, teacher=teacher))
    return max(plans, key=lambda plan: plan.total_bytes)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, counts the bytes of tensors that calls of torch made within and that are still alive.

    live: now; peak: the most so far; largest: of a single one. A view counts as what it looks into: nothing, where that
    was there before.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = self.largest = 0
        self._seen: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for storage in _storages((args, kwargs)):
            self._seen.add(storage)  # what a call reads and no call has made was there before
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            if storage not in self._seen:
                self._seen.add(storage)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return out

    def _add(self, size: int) -> None:
        self.live += size
        self.peak, self.largest = max(self.peak, self.live), max(self.largest, size)


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    """Yield those of the tensors in nested values; packed weights have none that is told."""
    for value in tree_leaves(values):
        if isinstance(value, Tensor) and not value.is_mkldnn:
            yield value.untyped_storage()


class _OnMeta(TorchFunctionMode):
    """What the meta device lacks: a device's autocast to `narrow` (None: off), fused kernels, and values to compare."""

    def __init__(self, narrow: torch.dtype | None, *, device: str) -> None:
        super().__init__()
        self.narrow, self.wide = narrow, _TO_FLOAT32[device]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name == "equal":
            return True
        if self.narrow is not None and name in _TO_NARROW | self.wide:
            args, kwargs = _cast((args, kwargs), self.narrow if name in _TO_NARROW else torch.float32)
        if name == "mish":
            return _Mish.apply(args[0])  # type: ignore[no-untyped-call]
        if name == "scaled_dot_product_attention":  # meta would take the one that keeps a matrix of all pairs of pixels
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args)[0]
        return func(*args, **(kwargs or {}))


def backward(loss: Tensor) -> None:
    """Do what loss.backward() does, which is a function to a function mode, and the mode is off within a function: what
    is recomputed there would not be cast."""
    _engine_run_backward((loss,), (torch.ones_like(loss),), False, False, (), accumulate_grad=True)


class _Mish(torch.autograd.Function):
    """Meta spells the gradient out in nine tensors; a device has one kernel for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.empty_like(x)


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    def cast(leaf: Any) -> Any:
        return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return tree_map(cast, tree)


def _step_bytes(
    model: SuperResolver,
    recipe: TrainingRecipe,
    stage: StageRecipe,
    *,
    side: int,
    world: int,
    teacher: SuperResolver | None,
    device: str,
) -> int:
    """Return what lives within a step of the stage at most. Leaves requires_grad as the stage sets it."""
    share = math.ceil(recipe.batch_size / world)
    micro = min(share, recipe.micro_batch or share)
    inputs = _inputs(model, stage, count=micro, side=side)
    with _OnMeta(_NARROW[recipe.precision], device=device):
        objective = objective_of(model, stage, teacher=teacher).train()
        with torch.no_grad():
            objective(*inputs)  # fills the caches of tables, so that a second plan is the first one again
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        live = LiveBytes()
        with live:
            backward(objective(*inputs))
    # The whole share lies on the device, and the next one beside it. Convolutions copy their input and output at most.
    waiting = 2 * math.ceil(share / micro * _nbytes(inputs))
    return waiting + live.peak + 2 * live.largest


def _inputs(model: SuperResolver, stage: StageRecipe, *, count: int, side: int) -> tuple[Tensor, ...]:
    """Return hr, lr, noise_level and eps of `count` images."""
    encoder = model.config.encoder
    low = side // encoder.scale
    eps = noise_shape(model.config, stage, low, low)
    shapes = ((encoder.channels, side, side), (encoder.lr_channels, low, low), (), eps)
    return tuple(torch.empty((count, *shape), device="meta") for shape in shapes)


def _plan(
    model: SuperResolver, recipe: TrainingRecipe, *, step_bytes: int, world: int, sharded: bool, teacher: bool
) -> MemoryPlan:
    weights = _nbytes(model.parameters())
    trained = _nbytes(p for p in model.parameters() if p.requires_grad)
    parts = world if sharded else 1
    gradients = math.ceil(trained / parts)
    if world > 1 and not sharded:
        gradients *= 2  # DistributedDataParallel's buckets are a copy of them
    # Two averages of each gradient; Muon keeps one of a matrix's.
    single = recipe.optimizer == "muon"
    matrices = _nbytes(p for p in model.parameters() if p.requires_grad and p.ndim > 1 and single)
    optimizer = math.ceil((2 * trained - matrices) / parts)
    parameters = math.ceil(weights / parts) + (weights if teacher else 0)
    averages = len(recipe.ema_half_lives_images) * math.ceil(_nbytes(model.state_dict().values()) / parts)
    # By then what the backward pass kept is gone, but Adam on a GPU makes one more copy of what it updates.
    within = max(step_bytes + (_gathered_bytes(model) if sharded else 0), math.ceil(trained / parts))
    averages += _nbytes(model.state_dict().values())  # the first worker looks at the average through a whole model
    everything = parameters + gradients + optimizer + averages + within
    return MemoryPlan(
        parameters_bytes=parameters,
        gradients_bytes=gradients,
        optimizer_bytes=optimizer,
        averages_bytes=averages,
        activations_bytes=within + math.ceil(_FRAGMENTS * everything),
    )


def _gathered_bytes(model: SuperResolver) -> int:
    """Return what FSDP2 gathers: the weights outside units and two units' (the next is fetched), with gradients."""
    sizes = sorted(_nbytes(unit.parameters()) for unit in activations.units(model))
    outside = _nbytes(model.parameters()) - sum(sizes)
    return 2 * (outside + sum(sizes[-2:]))


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _in_words(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"

"""The plan of a training's memory: sums that are known, and bytes that a real step takes."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffsr_core import activations, memory, presets
from diffsr_core.family import ModelConfig, SuperResolver
from diffsr_core.memory import LiveBytes, MemoryPlan, plan_memory
from diffsr_core.objective import Objective
from diffsr_core.recipe import StageRecipe, TrainingRecipe
from tests.core import tiny

_STAGE = StageRecipe(name="diffusion", num_steps=1, learning_rate=1e-3)
_RECIPE = TrainingRecipe(stages=(_STAGE,), batch_size=2)
_PX = 16
_MIB = 2**20


def kind_of(config: ModelConfig) -> str:
    """The stage that trains all that the model has."""
    return "regression" if config.denoiser is None else "joint" if config.encoder.regresses else "diffusion"


def recipe_of(*kinds: str, **settings: object) -> TrainingRecipe:
    return replace(_RECIPE, stages=tuple(replace(_STAGE, name=kind) for kind in kinds), **settings)  # type: ignore[arg-type]


def on_device(device: str, narrow: torch.dtype | None) -> AbstractContextManager[object]:
    """What a step runs in: the planner's mode, or torch's own autocast."""
    if device == "meta":
        return memory._OnMeta(narrow, device="cpu")
    return torch.autocast("cpu", dtype=narrow) if narrow is not None else nullcontext()


def forward_and_backward(
    config: ModelConfig, *, device: str, checkpointed: bool = False, narrow: torch.dtype | None = None
) -> list[int]:
    """Bytes of a step of two: what autograd's hooks see, what lives behind the forward pass, the loss, the peak."""
    with torch.device(device):
        model = SuperResolver(config).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if checkpointed:
        activations.checkpoint_activations(model)
    with on_device(device, narrow):
        objective = Objective(model, replace(_STAGE, name=kind_of(config))).train()  # type: ignore[arg-type]
        like = memory._inputs(model, objective.stage, count=2, side=_PX)
        inputs = [torch.full(x.shape, 0.5, device=device) for x in like]
        with torch.no_grad():
            objective(*inputs)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        known = [*model.parameters(), *model.buffers(), *inputs]
        own = [x.untyped_storage() for x in known]
        live = LiveBytes()
        with live, hooked(own) as saved:
            loss = objective(*inputs)
        behind = live.live
        with live:
            memory.backward(loss)
    return [saved[0], behind, loss.element_size(), live.peak]


@contextmanager
def hooked(own: list[torch.UntypedStorage]) -> Iterator[list[int]]:
    """Bytes that autograd saves, each storage once, none that is `own`: by hooks, which know nothing of LiveBytes."""
    kept: dict[int, torch.UntypedStorage] = {}
    known = {storage._cdata for storage in own}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage
        return tensor

    total: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield total
    total.append(sum(storage.nbytes() for storage in kept.values()))


@pytest.mark.parametrize(
    ("name", "checkpointed"),
    [(name, False) for name in tiny.MODELS] + [(name, True) for name in ("sr3", "srdiff", "anchored", "seed3")],
)
def test_a_step_without_values_keeps_the_very_bytes_of_a_real_one(name: str, checkpointed: bool) -> None:
    config = tiny.MODELS[name]
    meta = forward_and_backward(config, device="meta", checkpointed=checkpointed)
    saved, behind, loss, peak = real = forward_and_backward(config, device="cpu", checkpointed=checkpointed)
    assert meta[:3] == real[:3]
    assert behind == saved + loss, "what lives behind the forward pass is what autograd saved, and the loss"
    assert behind <= peak <= meta[3] <= 1.05 * peak


@pytest.mark.parametrize("name", ["sr3", "anchored", "seed3", "rrdb-twin"])
def test_narrow_precision_keeps_what_autocast_keeps(name: str) -> None:
    meta = forward_and_backward(tiny.MODELS[name], device="meta", narrow=torch.bfloat16)
    real = forward_and_backward(tiny.MODELS[name], device="cpu", narrow=torch.bfloat16)
    # A CPU keeps the statistics of a narrow group norm in float32, one mean and one deviation a group.
    assert meta[0] <= real[0] <= (1.002 if name == "sr3" else 1) * meta[0]
    assert real[0] < forward_and_backward(tiny.MODELS[name], device="meta")[0]


def test_narrow_precision_spares_less_of_a_group_norm_on_a_gpu_and_more_of_a_reflection() -> None:
    recipe = recipe_of("diffusion", precision="bf16")
    for config, more, less in ((tiny.SR3, "cuda", "cpu"), (tiny.SRDIFF, "cpu", "cuda")):
        high, low = (plan_memory(config, recipe, patch_px=_PX, device=x).activations_bytes for x in (more, less))
        assert low < high < plan_memory(config, recipe_of("diffusion"), patch_px=_PX).activations_bytes


def test_live_bytes_are_those_of_storages_not_of_views_and_end_with_them() -> None:
    known = torch.zeros(1000)
    with LiveBytes() as live:
        a = torch.zeros(256)
        views = [a[:10], a.view(16, 16), known[5:]]
        assert live.live == live.peak == live.largest == 1024
        b = torch.zeros(10)
        assert (live.live, live.largest) == (1064, 1024)
        del a
        assert live.live == 1064, "the views hold it"
        del views
        assert (live.live, live.peak) == (40, 1064)
        del b
    assert (live.live, live.peak) == (0, 1064)


@pytest.mark.parametrize("name", ["nano-x4", "nano-x4-regression", "sr3-16-128", "seed3-8-32"])
def test_parameters_take_four_bytes_each_of_the_published_count(name: str) -> None:
    preset = presets.get(name)
    recipe = replace(preset.recipe, batch_size=1)
    plan = plan_memory(preset.model, recipe, patch_px=preset.patch)
    assert plan.parameters_bytes == 4 * preset.params
    assert plan.optimizer_bytes == 2 * plan.gradients_bytes
    assert 0 <= plan.averages_bytes - 2 * plan.parameters_bytes < 0.002 * plan.parameters_bytes  # buffers


def test_each_stage_trains_its_part_and_the_plan_is_that_of_the_largest() -> None:
    model = SuperResolver(tiny.ANCHORED)
    sizes = {"regression": model.encoder, "diffusion": model.denoiser, "joint": model}
    plans = {}
    for kind, part in sizes.items():
        assert part is not None
        plans[kind] = plan_memory(tiny.ANCHORED, recipe_of(kind, ema_half_lives_images=(10, 20, 30)), patch_px=_PX)
        assert plans[kind].gradients_bytes == 4 * sum(p.numel() for p in part.parameters())
        assert plans[kind].optimizer_bytes == 2 * plans[kind].gradients_bytes
        assert plans[kind].averages_bytes == (3 + 1) * plans[kind].parameters_bytes
    every = plan_memory(tiny.ANCHORED, recipe_of(*sizes, ema_half_lives_images=(10, 20, 30)), patch_px=_PX)
    assert every == max(plans.values(), key=lambda plan: plan.total_bytes) == plans["joint"]


def test_sharding_divides_all_but_the_activations_which_grow_by_what_is_gathered() -> None:
    whole = plan_memory(tiny.ANCHORED, recipe_of("joint"), patch_px=_PX)
    parts = plan_memory(tiny.ANCHORED, recipe_of("joint", batch_size=8), patch_px=_PX, world=4, sharded=True)
    for name in ("parameters_bytes", "gradients_bytes", "optimizer_bytes"):
        assert getattr(parts, name) == math.ceil(getattr(whole, name) / 4)
    assert parts.averages_bytes == math.ceil(whole.averages_bytes / 2 / 4) + whole.averages_bytes / 2  # validation's
    assert parts.activations_bytes > whole.activations_bytes


def test_workers_that_do_not_shard_hold_the_gradients_twice_and_share_the_batch() -> None:
    alone = plan_memory(tiny.SRDIFF, recipe_of("diffusion", batch_size=4), patch_px=_PX)
    beside = plan_memory(tiny.SRDIFF, recipe_of("diffusion", batch_size=7), patch_px=_PX, world=2)
    assert beside.gradients_bytes == 2 * alone.gradients_bytes
    assert beside.activations_bytes - alone.activations_bytes == math.ceil(alone.gradients_bytes / 8)  # fragments


def test_micro_batches_bound_the_activations() -> None:
    plans = [
        plan_memory(tiny.SRDIFF, recipe_of("diffusion", batch_size=16, micro_batch=micro), patch_px=_PX)
        for micro in (2, 8, None, 100)
    ]
    small, large, all_at_once, more_than_there_are = (plan.activations_bytes for plan in plans)
    assert 2 * small < large < all_at_once == more_than_there_are


def test_less_is_kept_when_activations_are_recomputed_cropped_or_narrow() -> None:
    recipe = recipe_of("diffusion", batch_size=8)

    def planned(recipe: TrainingRecipe = recipe, *, checkpointed: bool = False) -> int:
        plan = plan_memory(tiny.SRDIFF, recipe, patch_px=32, checkpoint_activations=checkpointed)
        return plan.activations_bytes

    all_of_it = planned()
    assert planned(checkpointed=True) < 0.7 * all_of_it
    assert planned(replace(recipe, crop_px=16)) < 0.3 * all_of_it
    assert planned(replace(recipe, precision="bf16")) < 0.8 * all_of_it


def test_distillation_needs_a_teacher_whose_weights_are_held_too() -> None:
    recipe = recipe_of("distillation")
    student = replace(tiny.SRDIFF, prediction="v")
    with pytest.raises(ValueError, match=r"distillation\) needs a teacher"):
        plan_memory(student, recipe, patch_px=_PX)
    plan = plan_memory(student, recipe, patch_px=_PX, teacher=True)
    alone = plan_memory(student, recipe_of("diffusion"), patch_px=_PX)
    assert plan.parameters_bytes == 2 * alone.parameters_bytes
    assert plan.gradients_bytes == alone.gradients_bytes
    # Three passes are differentiated instead of one.
    assert 2 * alone.activations_bytes < plan.activations_bytes < 4 * alone.activations_bytes


def test_a_plan_is_the_same_again_and_touches_no_generator() -> None:
    before = torch.get_rng_state()
    plans = [plan_memory(tiny.SR3, _RECIPE, patch_px=24, checkpoint_activations=True) for _ in range(2)]
    assert plans[0] == plans[1]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("patch", "rule"), [(18, "multiple of 8 px"), (8, "at least 16")])
def test_a_patch_that_the_model_cannot_take_is_refused(patch: int, rule: str) -> None:
    with pytest.raises(ValueError, match=rf"patch \({patch} px\).*{rule}"):
        plan_memory(tiny.ANCHORED, _RECIPE, patch_px=patch)


def test_a_plan_says_its_sum_and_its_parts_in_one_line() -> None:
    plan = MemoryPlan(
        parameters_bytes=8 * _MIB,
        gradients_bytes=4 * _MIB,
        optimizer_bytes=16 * _MIB,
        averages_bytes=0,
        activations_bytes=1536 * _MIB,
    )
    assert plan.total_bytes == 1564 * _MIB
    assert plan.describe() == (
        "1.53 GiB (parameters 8 MiB, gradients 4 MiB, optimizer 16 MiB, averages 0 MiB, activations 1.50 GiB)"
    )

"""FSDP2: parameters, gradients, optimizer and averages split over the workers, for presets of 500 M weights or more."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from diffsr_core.activations import units
from diffsr_core.family import SuperResolver


def shard(model: SuperResolver) -> None:
    """Split the model's parameters over all workers of the default process group, in place; all workers call it.

    Each repeated block is gathered when it is needed and freed after it. Encoder and denoiser are roots of their own,
    as they are called by themselves.
    """
    device = next(model.parameters()).device
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for unit in units(model):
        fully_shard(unit, mesh=mesh)
    for root in (model.encoder, model.denoiser):
        if root is not None and any(True for _ in root.parameters()):
            fully_shard(root, mesh=mesh)


def synchronise(model: SuperResolver, on: bool) -> None:
    """Let the next backward pass share its gradients with the other workers, or keep them for a later one."""
    for root in (model.encoder, model.denoiser):
        if isinstance(root, FSDPModule):
            root.set_requires_gradient_sync(on)


def whole(value: Tensor) -> Tensor:
    """Return a tensor that is split over the workers as a whole; all workers call it. Others pass through."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def gathered(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Return `whole` of each, detached; what was split comes to the CPU at once, one after the other.

    keep: False, where only another worker needs them, gives nothing of what was split.
    """
    found = {}
    for name, value in tensors.items():
        if not isinstance(value, DTensor):
            found[name] = value.detach()
            continue
        gathered_value = whole(value.detach())
        if keep:
            found[name] = gathered_value.cpu()
    return found


def split_like(value: Tensor, reference: Tensor) -> Tensor:
    """Return a tensor split as the reference is, where that is split and of the same shape; else whole, beside it."""
    if isinstance(value, DTensor) or not isinstance(reference, DTensor) or value.shape != reference.shape:
        return value.to(reference.device)
    with torch.no_grad():
        return distribute_tensor(value.to(reference.device), reference.device_mesh, reference.placements)

"""Gradient checkpointing: the repeated blocks keep their inputs, and compute their insides again in the backward pass.

The loss and the gradients keep their bits; a step costs about one forward pass more (Chen et al. 2016,
arXiv:1604.06174).
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from diffsr_core.family import SuperResolver
from diffsr_core.networks import seed3, sr3
from diffsr_core.networks.blocks import ResidualBlock
from diffsr_core.networks.edsr import ConvBlock
from diffsr_core.networks.film import FiLMBlock
from diffsr_core.networks.rrdb import RRDBNet

# None of them holds another.
_BLOCKS = (
    ConvBlock,
    FiLMBlock,
    ResidualBlock,
    sr3.Block,
    sr3.Attention,
    seed3.BigGANDown,
    seed3.BigGANUp,
    seed3.PlainBlock,
)


def units(model: SuperResolver) -> list[nn.Module]:
    """Return the repeated blocks of every network, outermost only, in the order in which they were made.

    They hold nearly all weights; what they leave are the first and last convolutions, the embeddings and, in some
    networks, the resampling.
    """
    found: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, RRDBNet):
            found.extend(module.trunk)
        elif isinstance(module, _BLOCKS):
            found.append(module)
    return found


def checkpoint_activations(model: SuperResolver) -> None:
    """Make every unit of the model recompute its insides, in place: names and weights stay, a second call does nothing.

    Dropout draws the same again, and running statistics are updated once. Without gradients nothing changes.
    """
    for unit in units(model):
        if "forward" not in vars(unit):
            unit.forward = _Recomputed(unit)


class _Recomputed:
    """The forward of a unit's class, checkpointed; an object, not a closure, so that a copied unit calls the copy."""

    def __init__(self, unit: nn.Module) -> None:
        self.unit = unit

    def __call__(self, *args: Any) -> Any:
        forward = type(self.unit).forward.__get__(self.unit)
        if not torch.is_grad_enabled():
            return forward(*args)
        if torch.compiler.is_compiling():  # the compiler recomputes values only, and refuses a context
            return checkpoint(forward, *args, use_reentrant=False)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=self._contexts)

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return what surrounds the forward pass, and what surrounds the recomputation."""
        return nullcontext(), _frozen_statistics(self.unit)


@contextmanager
def _frozen_statistics(unit: nn.Module) -> Iterator[None]:
    """Within it batch normalisation updates copies of its running statistics, which are then dropped.

    Not track_running_stats = False: the recomputation must save as many tensors as the forward pass did.
    """
    norms = [module for module in unit.modules() if isinstance(module, _BatchNorm)]
    buffers = [dict(norm.named_buffers()) for norm in norms]
    for norm, own in zip(norms, buffers, strict=True):
        norm._buffers.update({name: value.clone() for name, value in own.items()})
    try:
        yield
    finally:
        for norm, own in zip(norms, buffers, strict=True):
            norm._buffers.update(own)

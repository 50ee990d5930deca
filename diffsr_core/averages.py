"""Exponential moving averages of the weights, one per half-life: the first is the model that a training gives."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Averages:
    """The averages of a model's state by half-life in images."""

    def __init__(self, model: nn.Module, half_lives_images: tuple[int, ...]) -> None:
        self.model = model
        self.by_half_life: dict[int, dict[str, Tensor]] = {}
        for half_life in half_lives_images:
            self.by_half_life[half_life] = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @property
    def first(self) -> dict[str, Tensor]:
        """That of the first half-life."""
        return next(iter(self.by_half_life.values()))

    @torch.no_grad()
    def restart(self) -> None:
        """Let each average begin at the weights as they are: a new stage trains other weights."""
        for average in self.by_half_life.values():
            for name, value in self.model.state_dict().items():
                average[name].copy_(value)

    @torch.no_grad()
    def update(self, *, num_images: int, num_updates: int) -> None:
        """Move each average towards the weights by what num_images are worth. num_updates: of this stage, from 1.

        Early averages would otherwise be mostly initial weights: the decay is at most (1 + n) / (10 + n). Running
        statistics are averages already, and are copied.
        """
        for half_life, average in self.by_half_life.items():
            decay = min(0.5 ** (num_images / half_life), num_updates / (9 + num_updates))
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    average[name].lerp_(parameter.detach(), 1 - decay)
            for name, buffer in self.model.named_buffers():
                average[name].copy_(buffer)

    @torch.no_grad()
    def load(self, saved: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Take over averages of these half-lives. Raises KeyError for one that is missing."""
        for half_life, average in self.by_half_life.items():
            for name, value in average.items():
                value.copy_(saved[half_life][name])

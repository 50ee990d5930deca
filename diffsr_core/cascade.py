"""A chain of models as one: 64 -> 256 -> 1024, each with its own number of steps (Saharia et al. 2021, sec. 4.4)."""

from collections.abc import Sequence

import numpy as np

from diffsr_core.pixels import Pixels
from diffsr_core.upscaler import Upscaler


class Cascade:
    """Upscalers that feed one another. The first may be a model without a condition (a plain DDPM): then `generate`.

    Give the early, small stages many steps and the late, large ones few. Each stage projects onto its own input
    where its recipe says so, and sees windows of its recipe's tile: for a model of whole images, their own size.
    Raises ValueError for no stage, channels that do not fit, or a later stage that reads no image.
    """

    def __init__(self, stages: Sequence[Upscaler]) -> None:
        if not stages:
            raise ValueError("stages (0) must be at least one upscaler; give the models in order")
        for before, after in zip(stages[:-1], stages[1:], strict=True):
            made, read = before.model.config.encoder.channels, after.model.config.encoder.lr_channels
            if made != read:
                raise ValueError(f"a stage makes {made} channels and the next reads {read}: they must be equal")
            if not after.model.config.encoder.condition_channels:
                raise ValueError("a later stage reads no image: it must read that of the stage before; put it first")
        self.stages = tuple(stages)

    @property
    def scale(self) -> int:
        """Output pixels per input pixel along one axis."""
        return int(np.prod([stage.model.config.scale for stage in self.stages]))

    def upscale(self, pixels: Pixels, *, digest: str) -> Pixels:
        """Return the last stage's SR of uint8 pixels (h, w, C), (h * scale, w * scale, C). digest keys the noise.

        Raises ValueError when the first stage has no condition.
        """
        if not self.stages[0].model.config.encoder.condition_channels:
            raise ValueError("the first stage reads no image: it must read one to upscale it; use generate")
        return self._run(pixels, digest)

    def generate(self, height: int, width: int, *, name: str) -> Pixels:
        """Return an image out of nothing: a sample of the first stage, (height, width) px, upscaled by the others.

        Below the first stage's tile it is the corner of a sample of that size. name: what tells the samples apart, it
        keys the noise. Raises ValueError when the first stage has a condition.
        """
        first = self.stages[0].model.config.encoder
        if first.condition_channels:
            raise ValueError(f"the first stage reads an image ({first.kind}): it must read none; use upscale")
        return self._run(np.zeros((height, width, first.channels), np.uint8), name)

    def _run(self, pixels: Pixels, digest: str) -> Pixels:
        for index, stage in enumerate(self.stages):
            # Each stage has a noise of its own: the same one would print the pattern of the last onto the next.
            pixels = stage(pixels, digest=f"{digest} stage {index}").sr
        return pixels

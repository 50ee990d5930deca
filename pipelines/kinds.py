"""What the upscale job asks of a kind of asset: probe, windows, assemble, publish. Nothing else knows of images.

A kind opens the content of one object: its header is judged, and refused or passed over, before anything is decoded.
The job then reads each window, upscales it, gives it back to be assembled, and asks for the files to publish. Images
and frames are `stills`; rasters and footage come in beside them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import torch

from diffsr_core.pixels import Pixels
from diffsr_core.tiling import Window
from diffsr_core.upscaler import Drawn, NotFiniteError, Upscaler
from pipelines.corpus import Original
from pipelines.images import Refused


class PassedOver(Exception):
    """An asset that is not to be upscaled: status `skipped`, with stage, reason and message as a refusal has them."""

    def __init__(self, stage: str, reason: str, message: str) -> None:
        super().__init__(stage, reason, message)
        self.stage, self.reason, self.message = stage, reason, message


@dataclass(frozen=True, kw_only=True)
class Result:
    """What is to be published: key below the output -> file of this machine, the image itself last.

    out_key, format: of the image. method: what made it, diffusion, regression or bicubic. verdict: pass, review or
    rejected, and why. metrics go into the sidecar and the ledger. about: what the sidecar says of source and output
    beside that; notes: what could not be kept.
    """

    files: dict[str, str]
    out_key: str
    format: str
    method: str
    verdict: str
    message: str
    source_type: str
    metrics: dict[str, float]
    source: dict[str, Any]
    output: dict[str, Any]
    notes: list[str] = field(default_factory=list)


class Asset(Protocol):
    """One opened asset, to be used with `with`. noise: what keys its noise. seconds: by stage, for the ledger."""

    out_key: str
    noise: str
    seconds: dict[str, float]

    def windows(self, upscaler: Upscaler) -> Sequence[Window]:
        """Return its windows; any order may follow. Raises Refused where the result could not be written."""

    def read(self, window: Window) -> Pixels:
        """Return what a window reads, (*window.shape, C). Raises Refused."""

    def assemble(self, window: Window, drawn: Drawn) -> None:
        """Take what a window gave. Any thread, any order, each window once."""

    def finish(self, upscaler: Upscaler) -> Result:
        """Encode, measure and judge, and replace what is rejected. Raises Refused."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *error: object) -> None: ...


class Kind(Protocol):
    """Opens assets of one kind."""

    def held_bytes(self, original: Original) -> int:
        """Return about how much memory the asset in this content holds while it is open, whatever its windows need."""

    def open(self, original: Original, row: dict[str, Any]) -> Asset:
        """Return the asset in the content of a listed row. Raises Refused or PassedOver."""


def draw(upscaler: Upscaler, pixels: Pixels, window: Window, *, noise: str) -> Drawn:
    """Return what the network makes of a window. Raises Refused for numbers that are none."""
    try:
        return upscaler.window(pixels, window, digest=noise)
    except NotFiniteError as error:
        raise Refused("upscale", "nan", str(error)) from error


@contextmanager
def out_of_memory() -> Iterator[None]:
    """Turn what torch and Python raise without memory into a refusal (law 3: never another shape)."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch has a type of its own for CUDA only; on a CPU it is a RuntimeError with these words.
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            raise Refused("upscale", "oom", f"{type(error).__name__}: {error}"[:300]) from error
        raise

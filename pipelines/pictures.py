"""An encoded image in, an encoded SR image out, in memory: what the pyfunc model does, by the job's own means."""

from dataclasses import replace
from typing import NamedTuple

from diffsr_core.upscaler import Upscaler
from pipelines import storage
from pipelines.corpus import Original
from pipelines.kinds import draw, out_of_memory
from pipelines.stills import Stills, StillSettings


class UpscaledPicture(NamedTuple):
    """The encoded result, its format, and metrics (lr_psnr in dB, colour_drift in levels of 255)."""

    data: bytes
    format: str
    metrics: dict[str, float]


def upscale_picture(upscaler: Upscaler, data: bytes, *, settings: StillSettings, model: str) -> UpscaledPicture:
    """Return the SR of an encoded image: the bytes that the job would publish. model: its digest. Raises Refused."""
    kind = Stills(replace(settings, skip_upscaled=False), model=model, recipe="")
    original = Original(storage.digest_bytes(data), len(data), data, None)
    with out_of_memory(), kind.open(original, {"key": "picture"}) as asset:
        for window in asset.windows(upscaler):
            asset.assemble(window, draw(upscaler, asset.read(window), window, noise=asset.noise))
        result = asset.finish(upscaler)
        with open(result.files[result.out_key], "rb") as file:
            return UpscaledPicture(file.read(), result.format, result.metrics)

"""Pictures of what several methods make of one image, side by side: the same detailed square of each."""

import io
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffsr_core.tiling import Tile
from pipelines.contact_sheet import in_colours
from pipelines.datasets import Loaded

UNCERTAINTY = "uncertainty"


class Made(NamedTuple):
    """What a contender makes of an LR image: the SR, samples (K, H, W, C) where K are drawn, their deviation in levels
    of 255 (H, W), the tiles that it was joined of, and what the SR alone took: seconds, and those of network calls."""

    sr: NDArray[np.uint8]
    samples: NDArray[np.uint8] | None = None
    uncertainty: NDArray[np.float32] | None = None
    seams: list[Tile] | None = None
    seconds: float = 0.0
    device_s: float = 0.0


def detailed_crops(loaded: Loaded, images: Mapping[str, Made], *, scale: int, side: int) -> dict[str, bytes]:
    """Return PNGs of the square of HR whose deviation is largest, all of one size: `lr` enlarged by repeating pixels,
    each method, `hr`, and the `uncertainty` of the first method that drew several samples, in colours.

    side: in HR px, or all of a smaller image.
    """
    hr = loaded.hr
    side = min(side // scale * scale, *(size // scale * scale for size in hr.shape[:2]))
    y, x = _detailed_corner(hr, side, scale)

    def crop(image: Any) -> bytes:
        return _png(image[y : y + side, x : x + side])

    lr = loaded.lr[y // scale : (y + side) // scale, x // scale : (x + side) // scale]
    crops = {"lr": _png(lr.repeat(scale, axis=0).repeat(scale, axis=1))}
    crops |= {method: crop(made.sr) for method, made in images.items()}
    crops["hr"] = crop(hr)
    deviations = [made.uncertainty for made in images.values() if made.uncertainty is not None]
    return crops | ({UNCERTAINTY: crop(in_colours(deviations[0]))} if deviations else {})


def _png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])).save(out, "PNG")
    return out.getvalue()


def _detailed_corner(hr: NDArray[np.uint8], side: int, scale: int) -> tuple[int, int]:
    step = max(scale, side // 4 // scale * scale)
    corners = [(y, x) for y in range(0, hr.shape[0] - side + 1, step) for x in range(0, hr.shape[1] - side + 1, step)]
    return max(corners, key=lambda c: float(hr[c[0] : c[0] + side, c[1] : c[1] + side].std()))

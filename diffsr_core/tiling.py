"""Windows over an absolute grid, and per-step fusion: a function of windows becomes a function of the whole canvas.

Each window is read with a halo and only its core is written, so the cores tile the canvas once and the order of the
windows cannot matter. Windows never reach over the canvas: at the image's own border the network sees what it saw in
training, its padding. Every call has one fixed shape, short batches are filled with zeros: the bytes of the result do
not depend on how many windows there are or how many run at once (law 3).
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import NamedTuple

import torch
from torch import Tensor


class Window(NamedTuple):
    """LR pixels: the window begins at (top, left); its core is rows core_top..core_bottom, columns alike (absolute)."""

    top: int
    left: int
    core_top: int
    core_bottom: int
    core_left: int
    core_right: int


def spans(size: int, tile: int, halo: int) -> list[tuple[int, int, int]]:
    """Return (origin, core start, core stop) of the windows along one axis; the cores partition range(size).

    Raises ValueError when the size is below the tile or the halo leaves no core.
    """
    if size < tile:
        raise ValueError(f"canvas ({size}) must be at least one tile ({tile}); pad it first")
    if tile <= 2 * halo:
        raise ValueError(f"halo ({halo}) must be less than half the tile ({tile}); use at most {(tile - 1) // 2}")
    origins = list(range(0, size - tile, tile - 2 * halo)) + [size - tile]
    stops = [origin + tile - halo for origin in origins[:-1]] + [size]
    return [(o, a, b) for o, a, b in zip(origins, [0, *stops[:-1]], stops, strict=True)]


def windows(height: int, width: int, *, tile: int, halo: int) -> list[Window]:
    """Return the windows of a canvas (LR pixels), row by row."""
    return [
        Window(top, left, a, b, c, d)
        for top, a, b in spans(height, tile, halo)
        for left, c, d in spans(width, tile, halo)
    ]


def padded_size(size: int, *, tile: int, stride: int) -> int:
    """Return the canvas size for an image size: at least one tile, and a multiple of the network's stride."""
    return max(tile, -(-size // stride) * stride)


def fuse(
    function: Callable[[list[Tensor]], list[Tensor]],
    canvases: Sequence[Tensor],
    plan: Sequence[Window],
    *,
    tile: int,
    micro_batch: int,
    pool: Executor | None = None,
) -> list[Tensor]:
    """Return the canvases (1, C, H', W') that `function` gives window by window.

    canvases: (1, C, H, W) each, at an integer multiple of the plan's resolution. function gets and returns lists of
    (micro_batch, C, h, w). pool: several micro-batches in flight; the result is the same.
    """
    height, unit = max(w.core_bottom for w in plan), max(w.core_right for w in plan)
    factors = [c.shape[-1] // unit for c in canvases]

    def run(chunk: Sequence[Window]) -> list[Tensor]:
        batch = []
        for canvas, f in zip(canvases, factors, strict=True):
            rows = [canvas[0, :, w.top * f : (w.top + tile) * f, w.left * f : (w.left + tile) * f] for w in chunk]
            rows += [torch.zeros_like(rows[0])] * (micro_batch - len(rows))
            batch.append(torch.stack(rows))
        return function(batch)

    chunks = [plan[i : i + micro_batch] for i in range(0, len(plan), micro_batch)]
    outputs: list[Tensor] = []
    for chunk, results in zip(chunks, (pool.map if pool else map)(run, chunks), strict=True):
        if not outputs:
            scales = [r.shape[-1] // tile for r in results]
            outputs = [r.new_empty(1, r.shape[1], height * f, unit * f) for r, f in zip(results, scales, strict=True)]
        for out, result, f in zip(outputs, results, scales, strict=True):
            for k, w in enumerate(chunk):
                y0, y1 = (w.core_top - w.top) * f, (w.core_bottom - w.top) * f
                x0, x1 = (w.core_left - w.left) * f, (w.core_right - w.left) * f
                out[0, :, w.core_top * f : w.core_bottom * f, w.core_left * f : w.core_right * f] = result[
                    k, :, y0:y1, x0:x1
                ]
    return outputs

"""Two grids over an image: windows bound the memory, tiles inside a window are what the network is given.

A window's canvas is sampled as one image: at each step every tile is read with a halo and only its core is written, so
the cores tile the canvas once and the order of the tiles cannot matter. Tiles never reach over the canvas: at the
image's own border the network sees what it saw in training, its padding. Windows lie on an absolute grid and are read
with a margin, of which nothing is written: steps are not fused across it, so it has to be wider than the halo.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

Ask = Callable[[Sequence[tuple[Tensor, ...]]], Sequence[tuple[Tensor, ...]]]  # (C, h, w) of each tile in and out


class Tile(NamedTuple):
    """LR pixels: the tile begins at (top, left); its core is rows core_top..core_bottom, columns alike."""

    top: int
    left: int
    core_top: int
    core_bottom: int
    core_left: int
    core_right: int


class Window(NamedTuple):
    """LR pixels of the image: the core, of which the result is kept, inside what is read and sampled with it."""

    top: int
    bottom: int
    left: int
    right: int
    core_top: int
    core_bottom: int
    core_left: int
    core_right: int

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of what is read."""
        return self.bottom - self.top, self.right - self.left

    @property
    def inner(self) -> tuple[slice, slice]:
        """Rows and columns of the core in what is read."""
        rows = slice(self.core_top - self.top, self.core_bottom - self.top)
        return rows, slice(self.core_left - self.left, self.core_right - self.left)


def windows(height: int, width: int, *, side: int, margin: int, least: int = 0) -> list[Window]:
    """Return the windows of an image, row by row: cores of `side` px on an absolute grid, read `margin` px wider.

    What lies beyond the image is not read; an image of at most side px is one window. least: px below which nothing is
    read where the image has them, at most side: a thin last window is read that much wider instead of the margin, as
    the padding to a tile would be seen at the image's own border.
    """

    def along(size: int) -> list[tuple[int, int, int, int]]:
        out = []
        for a in range(0, size, side):
            b = min(a + side, size)
            before = margin if b - a + margin >= least else least
            out.append((max(0, a - before), min(b + margin, size), a, b))
        return out

    return [
        Window(*rows[:2], *columns[:2], *rows[2:], *columns[2:]) for rows in along(height) for columns in along(width)
    ]


def spans(size: int, tile: int, halo: int, *, shift: int = 0) -> list[tuple[int, int, int]]:
    """Return (origin, core start, core stop) of the tiles along one axis; the cores partition range(size).

    shift: px by which all but the outer tiles lie further left, for measuring what the place of the grid changes.
    Raises ValueError when the size is below the tile or the halo leaves no core.
    """
    if size < tile:
        raise ValueError(f"canvas ({size}) must be at least one tile ({tile}); pad it first")
    if tile <= 2 * halo:
        raise ValueError(f"halo ({halo}) must be less than half the tile ({tile}); use at most {(tile - 1) // 2}")
    stride = tile - 2 * halo
    origins = sorted({0, *range(stride - shift % stride, size - tile, stride), size - tile})
    stops = [origin + tile - halo for origin in origins[:-1]] + [size]
    return [(o, a, b) for o, a, b in zip(origins, [0, *stops[:-1]], stops, strict=True)]


def tiles(height: int, width: int, *, tile: int, halo: int, shift: int = 0) -> list[Tile]:
    """Return the tiles of a canvas (LR pixels), row by row."""
    return [
        Tile(top, left, a, b, c, d)
        for top, a, b in spans(height, tile, halo, shift=shift)
        for left, c, d in spans(width, tile, halo, shift=shift)
    ]


def padded_size(size: int, *, tile: int, stride: int) -> int:
    """Return the canvas size for an image size: at least one tile, and a multiple of the network's stride."""
    return max(tile, -(-size // stride) * stride)


def fuse(ask: Ask, canvases: Sequence[Tensor], plan: Sequence[Tile], *, tile: int) -> list[Tensor]:
    """Return the canvases (1, C, H', W') that a network gives, asked tile by tile.

    canvases: (1, C, H, W) each, at an integer multiple of the plan's resolution.
    """
    height, unit = max(t.core_bottom for t in plan), max(t.core_right for t in plan)
    factors = [c.shape[-1] // unit for c in canvases]
    inputs = [
        tuple(
            c[0, :, t.top * f : (t.top + tile) * f, t.left * f : (t.left + tile) * f]
            for c, f in zip(canvases, factors, strict=True)
        )
        for t in plan
    ]
    outputs: list[Tensor] = []
    for t, results in zip(plan, ask(inputs), strict=True):
        if not outputs:
            scales = [r.shape[-1] // tile for r in results]
            outputs = [r.new_empty(1, r.shape[0], height * f, unit * f) for r, f in zip(results, scales, strict=True)]
        for out, result, f in zip(outputs, results, scales, strict=True):
            rows = slice((t.core_top - t.top) * f, (t.core_bottom - t.top) * f)
            columns = slice((t.core_left - t.left) * f, (t.core_right - t.left) * f)
            out[0, :, t.core_top * f : t.core_bottom * f, t.core_left * f : t.core_right * f] = result[:, rows, columns]
    return outputs

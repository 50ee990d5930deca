"""Corpora that are too large for a test, written block by block: nothing of them is held."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests import hostile
from tests.tiff import write_tiff

ROWS_PX, TILE_PX, PNG_PX = 64, 512, 32
PNGS_A_FOLDER = 1000


def texture(side: int) -> np.ndarray:
    """Return uint8 (side, side, 3): soft patches with noise, so that it is neither flat nor quickly compressed."""
    rng = np.random.default_rng(5)
    soft = np.asarray(hostile.picture(5, side, side), np.int16)
    noisy: np.ndarray = np.clip(soft + rng.integers(-12, 13, soft.shape), 0, 255).astype(np.uint8)
    return noisy


def strips(height: int, width: int) -> Iterator[np.ndarray]:
    """Yield the rows of a large picture, ROWS_PX at a time, no two alike."""
    wide = np.tile(texture(1024), (1, -(-width // 1024) + 1, 1))
    for index, y in enumerate(range(0, height, ROWS_PX)):
        shift, row = 37 * index % 1024, (y // 1024 * 17 + y) % (1024 - ROWS_PX)
        yield np.ascontiguousarray(wide[row : row + min(ROWS_PX, height - y), shift : shift + width])


def tiles(height: int, width: int) -> Iterator[np.ndarray]:
    """Yield the tiles of a large picture, TILE_PX square."""
    base = texture(2 * TILE_PX)
    for index in range(-(-height // TILE_PX) * -(-width // TILE_PX)):
        y, x = 31 * index % TILE_PX, 67 * index % TILE_PX
        yield np.ascontiguousarray(base[y : y + TILE_PX, x : x + TILE_PX])


def size_of(megapixels: float) -> tuple[int, int]:
    """Return (height, width) of a picture of about that many pixels, 4 to 3."""
    height = round((megapixels * 1e6 * 3 / 4) ** 0.5)
    return height, round(megapixels * 1e6 / height)


def write_large(path: Path, megapixels: float, *, tiled: bool) -> None:
    """Write a TIFF in strips, not compressed, or in deflated tiles."""
    height, width = size_of(megapixels)
    if tiled:
        write_tiff(path, tiles(height, width), height=height, width=width, tile=TILE_PX, deflate=True)
    else:
        write_tiff(path, strips(height, width), height=height, width=width)


def write_pngs(folder: Path, num: int) -> None:
    """Write `num` small PNGs, all different, a thousand in a folder."""
    rng = np.random.default_rng(6)
    for index in range(num):
        place = folder / f"{index // PNGS_A_FOLDER:03d}"
        if index % PNGS_A_FOLDER == 0:
            place.mkdir(parents=True)
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        pixels = coarse.repeat(PNG_PX // 4, axis=0).repeat(PNG_PX // 4, axis=1)
        rows = b"".join(b"\0" + row.tobytes() for row in pixels)
        (place / f"{index:06d}.png").write_bytes(hostile.png_of(PNG_PX, PNG_PX, bits=8, colour=2, rows=rows))

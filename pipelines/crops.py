"""Where patches are cut from an image, and which split it falls into: functions of its content and the seed alone."""

from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import Any


def corners(height: int, width: int, recipe: Mapping[str, Any], *, digest: str) -> Iterator[tuple[int, int]]:
    """Yield the corners (y, x) of candidate patches of an image, in px, in the order in which they are tried.

    recipe: patch, scale, seed, max_per_image, and crops: "grid", every cell once, or "random", multiples of the scale.
    """
    side, scale, key = recipe["patch"], recipe["scale"], f"{recipe['seed']} {digest}"
    if height < side or width < side:
        return
    if recipe["crops"] == "grid":
        for cell in shuffled(num_cells(height, width, side), key):
            row, column = divmod(cell, width // side)
            yield row * side, column * side
        return
    # Twice as many as are wanted: flat ones are replaced, and an image of nothing but sky comes to an end.
    rows, columns = (height - side) // scale + 1, (width - side) // scale + 1
    drawn = (hashed(f"{key} random {index}") for index in range(2 * recipe["max_per_image"]))
    places = ((int.from_bytes(h[:8]) % rows * scale, int.from_bytes(h[8:16]) % columns * scale) for h in drawn)
    yield from dict.fromkeys(places)


def num_cells(height: int, width: int, side: int) -> int:
    """Return how many whole squares of this side the grid over an image has."""
    return (height // side) * (width // side)


def shuffled(count: int, key: str) -> Iterator[int]:
    """Yield 0 to count - 1 in an order that the key decides, in no memory: a raster may have millions of cells.

    A Feistel network is a permutation of its power of four; what falls beyond count is passed over.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    for index in range(1 << 2 * half):
        left, right = index >> half, index & mask
        for number in range(4):
            left, right = right, left ^ (int.from_bytes(hashed(f"{key} {number} {right}")[:8]) & mask)
        if (value := left << half | right) < count:
            yield value


def split_of(digest: str, *, val_share: float, test_share: float) -> str:
    """Return the split of a source from its content's hash: stable as the corpus grows; copies land together."""
    position = int(digest[:12], 16) / 16**12
    if position < val_share:
        return "val"
    return "test" if position < val_share + test_share else "train"


def hashed(text: str) -> bytes:
    """Return 64 bytes that a text decides, on any machine."""
    return blake2b(text.encode()).digest()

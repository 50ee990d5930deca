"""TIFF files of any size and depth, written block by block: the caller's blocks pass through, none is held."""

import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np

_SAMPLE_FORMATS = {"u": 1, "i": 2, "f": 3}
_SHORT, _LONG = 3, 4


def write_tiff(
    path: Path, blocks: Iterable[np.ndarray], *, height: int, width: int, tile: int = 0, deflate: bool = False
) -> None:
    """Write a little-endian TIFF of `blocks`, HWC arrays of one dtype and 1 or 3 channels, in reading order.

    tile: side of square tiles in px, a multiple of 16, those at the edges padded by the caller; 0 for strips, as high
    as the first block. Raises ValueError above 4 GiB, where this format ends, and for blocks that are too many or few.
    """
    offsets: list[int] = []
    sizes: list[int] = []
    with path.open("wb") as file:
        file.write(b"II*\0" + bytes(4))
        for block in blocks:
            if not offsets:
                rows, bands, dtype = block.shape[0], block.shape[2], block.dtype
            data = block.astype(dtype.newbyteorder("<")).tobytes()
            data = zlib.compress(data, 1) if deflate else data
            offsets.append(file.tell())
            sizes.append(len(data))
            file.write(data)
        expected = -(-height // tile) * -(-width // tile) if tile else -(-height // rows)
        if len(offsets) != expected or file.tell() > 2**32 - 2**24:
            raise ValueError(f"{len(offsets)} blocks, {file.tell()} bytes: must be {expected} blocks below 4 GiB")
        file.write(bytes(file.tell() % 2))
        sides = {322: (_LONG, [tile]), 323: (_LONG, [tile])} if tile else {278: (_LONG, [rows])}
        tags = {
            256: (_LONG, [width]),
            257: (_LONG, [height]),
            258: (_SHORT, [dtype.itemsize * 8] * bands),
            259: (_SHORT, [8 if deflate else 1]),
            262: (_SHORT, [2 if bands == 3 else 1]),
            277: (_SHORT, [bands]),
            284: (_SHORT, [1]),
            339: (_SHORT, [_SAMPLE_FORMATS[dtype.kind]] * bands),
            324 if tile else 273: (_LONG, offsets),
            325 if tile else 279: (_LONG, sizes),
            **sides,
        }
        _write_directory(file, tags)


def _write_directory(file: BinaryIO, tags: dict[int, tuple[int, list[int]]]) -> None:
    """Write the values that do not fit into an entry, the directory, and where it begins."""
    entries = b""
    for tag, (kind, values) in sorted(tags.items()):
        data = struct.pack(f"<{len(values)}{'H' if kind == _SHORT else 'I'}", *values)
        if len(data) > 4:
            data, place = struct.pack("<I", file.tell()), data
            file.write(place + bytes(len(place) % 2))
        entries += struct.pack("<HHI", tag, kind, len(values)) + data.ljust(4, b"\0")
    start = file.tell()
    file.write(struct.pack("<H", len(tags)) + entries + bytes(4))
    file.seek(4)
    file.write(struct.pack("<I", start))

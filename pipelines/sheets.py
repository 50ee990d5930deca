"""A sheet is the canvas of an output: windows are written in any order, rows are read, memory does not grow with it.

A large one is a scratch file without a name, so that nothing is left behind by a process that is killed. The file is an
uncompressed TIFF in the byte order of the machine: encoders read it as a stream, and no memory is mapped.
"""

import os
import sys
import tempfile
from typing import Self

import numpy as np

from pipelines.directories import LONG, LONG8, SHORT, Layout, directory_bytes, header_bytes, numbers

_STRIP_BYTES = 256 << 10


class Sheet:
    """Samples HWC of one dtype, zero where nothing was written yet."""

    def __init__(self, height: int, width: int, channels: int, dtype: object, *, spool_bytes: int = 64 << 20) -> None:
        """Make the sheet; one of more than `spool_bytes` lies in the folder for temporary files.

        Raises ValueError for a size below 1, and for a dtype other than uint8 and uint16.
        """
        if min(height, width, channels) < 1:
            raise ValueError(f"sheet: {height} x {width} x {channels}; every side must be at least 1")
        self.height, self.width, self.channels = height, width, channels
        self.dtype = np.dtype(dtype)  # type: ignore[call-overload]
        if self.dtype not in (np.uint8, np.uint16):
            raise ValueError(f"dtype={self.dtype}: must be uint8 or uint16")
        self._row_bytes = width * channels * self.dtype.itemsize
        self._memory: np.ndarray | None = None
        self._file = -1
        if height * self._row_bytes <= spool_bytes:
            self._memory = np.zeros((height, width, channels), self.dtype)
            return
        head = _tiff_head(height, width, channels, self.dtype)
        self._start = len(head)
        self._file = _nameless_file()
        try:
            os.pwrite(self._file, head, 0)
            os.ftruncate(self._file, self._start + height * self._row_bytes)
        except BaseException:
            self.close()
            raise

    @property
    def memory(self) -> np.ndarray | None:
        """The samples themselves, where they are in memory; None where they are in a file."""
        return self._memory

    def write(self, y: int, x: int, block: np.ndarray) -> None:
        """Put an HWC block with its first pixel at (y, x). Raises ValueError for one that does not fit, and OSError."""
        if block.ndim != 3 or block.shape[2] != self.channels or block.dtype != self.dtype:
            raise ValueError(f"block: {block.dtype} {block.shape}; must be {self.dtype} HW{self.channels}")
        h, w = block.shape[:2]
        if not (0 <= y <= y + h <= self.height and 0 <= x <= x + w <= self.width):
            raise ValueError(f"block y={y} x={x} h={h} w={w}: must lie inside {self.height} x {self.width} px")
        if self._memory is not None:
            self._memory[y : y + h, x : x + w] = block
            return
        samples = np.ascontiguousarray(block)
        at = self._start + y * self._row_bytes + x * self.channels * self.dtype.itemsize
        if w == self.width:
            _write_all(self._open(), samples.reshape(-1).view(np.uint8).data, at)
            return
        for row in range(h):
            _write_all(self._open(), samples[row].reshape(-1).view(np.uint8).data, at + row * self._row_bytes)

    def rows(self, top: int, bottom: int) -> np.ndarray:
        """Return the rows from `top` to before `bottom`, HWC, a copy. Raises ValueError for rows that are not there."""
        if not 0 <= top <= bottom <= self.height:
            raise ValueError(f"rows {top} to {bottom}: must lie inside {self.height} rows")
        if self._memory is not None:
            return self._memory[top:bottom].copy()
        rows = np.empty((bottom - top, self.width, self.channels), self.dtype)
        self._read_into(rows.reshape(-1).view(np.uint8).data, self._start + top * self._row_bytes)
        return rows

    @property
    def stream_bytes(self) -> int:
        """How long the TIFF is that `read_at` gives. Raises ValueError for a sheet in memory."""
        return self._start + self.height * self._row_bytes if self._open() >= 0 else 0

    def read_at(self, offset: int, count: int) -> bytes:
        """Return at most `count` bytes of the TIFF from `offset`, b"" at its end."""
        return os.pread(self._open(), count, offset)

    def close(self) -> None:
        """Give memory and disk back; further calls do nothing."""
        self._memory = None
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_file", -1) >= 0:
            self.close()

    def _open(self) -> int:
        if self._file < 0:
            raise ValueError("sheet: it is closed, or in memory and not in a file")
        return self._file

    def _read_into(self, view: memoryview, at: int) -> None:
        while view:
            count = os.preadv(self._open(), [view], at)
            if not count:
                raise OSError("a scratch file that has become shorter")
            view, at = view[count:], at + count


def _nameless_file() -> int:
    with tempfile.TemporaryFile(prefix="diffsr-sheet-") as file:
        return os.dup(file.fileno())


def _write_all(file: int, view: memoryview, at: int) -> None:
    while view:
        count = os.pwrite(file, view, at)
        view, at = view[count:], at + count


def _tiff_head(height: int, width: int, channels: int, dtype: np.dtype) -> bytes:
    """Return what comes before the samples: a BigTIFF of strips, whose lengths depend on the size alone."""
    layout = Layout("<" if sys.byteorder == "little" else ">", True)
    row_bytes = width * channels * dtype.itemsize
    together = max(1, _STRIP_BYTES // row_bytes)
    strips = -(-height // together)
    lengths = [together * row_bytes] * (strips - 1) + [(height - (strips - 1) * together) * row_bytes]

    def directory(start: int) -> bytes:
        offsets = [start + index * together * row_bytes for index in range(strips)]
        extra = channels - (3 if channels > 2 else 1)
        tags = {
            256: numbers(LONG, [width], layout),
            257: numbers(LONG, [height], layout),
            258: numbers(SHORT, [8 * dtype.itemsize] * channels, layout),
            259: numbers(SHORT, [1], layout),  # not compressed
            262: numbers(SHORT, [2 if channels > 2 else 1], layout),
            273: numbers(LONG8, offsets, layout),
            277: numbers(SHORT, [channels], layout),
            278: numbers(LONG, [together], layout),
            279: numbers(LONG8, lengths, layout),
        }
        if extra:
            tags[338] = numbers(SHORT, [0] * extra, layout)
        return directory_bytes(tags, layout, start=16)

    start = 16 + len(directory(0))
    return header_bytes(layout, 16) + directory(start)

"""Profile, EXIF and XMP put into the files that an encoder writes: PNG and JPEG while they stream, TIFF afterwards.

The encoder is told to write pixels only. What libvips writes itself is not what it was given: it empties the maker's
notes, claims another colour space, and leaves EXIF out of TIFF (measured with libvips 8.18).
"""

import struct
import zlib
from pathlib import Path
from typing import IO

from pipelines import directories
from pipelines.directories import EXIF, GPS, INTEROPERABILITY, UNDEFINED, Entry, Layout, Tree
from pipelines.images import Refused

_PNG_HEAD = 33  # the signature and IHDR
_JPEG_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_JPEG_ICC = b"ICC_PROFILE\0"
_SEGMENT = 65_533  # bytes in a JPEG segment beside its length
_ICC_PART = _SEGMENT - len(_JPEG_ICC) - 2
# What says how a TIFF stores its pixels, and what is given beside the EXIF.
_NOT_COPIED = frozenset([*range(254, 267), 273, 274, 277, 278, 279, 280, 281, 284, 317, *range(320, 348), 700, 34675])
_RESOLUTION = (282, 283, 296)


class Spliced:
    """A writer of a PNG or JPEG stream that puts `parts` behind its first header."""

    def __init__(self, file: IO[bytes], format: str, parts: bytes) -> None:
        self._file, self._format, self._parts = file, format, parts
        self._head = b""
        self._done = False

    def write(self, data: bytes) -> None:
        """Pass the next bytes of the stream on. Raises OSError."""
        if self._done:
            self._file.write(data)
            return
        self._head += data
        end = _PNG_HEAD
        if self._format == "JPEG":  # its JFIF segment comes first
            end = 4 + int.from_bytes(self._head[4:6], "big") if self._head[2:4] == b"\xff\xe0" else 2
        if len(self._head) >= max(6, end):
            self._file.write(self._head[:end] + self._parts + self._head[end:])
            self._done, self._head = True, b""


def png_parts(*, icc: bytes | None, exif: bytes | None, xmp: bytes | None) -> bytes:
    """Return the chunks iCCP, eXIf and iTXt of a PNG, which stand before its pixels."""
    parts = b""
    if icc:
        parts += _chunk(b"iCCP", b"ICC Profile\0\0" + zlib.compress(icc, 9))
    if exif:
        parts += _chunk(b"eXIf", exif)
    if xmp:
        parts += _chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)
    return parts


def jpeg_parts(*, icc: bytes | None, exif: bytes | None, xmp: bytes | None) -> bytes:
    """Return the segments APP1 (EXIF, XMP) and APP2 (profile) of a JPEG. Raises `Refused` for what they cannot hold."""
    parts = b""
    if exif:
        parts += _segment(0xE1, b"Exif\0\0" + exif, "EXIF")
    if xmp:
        parts += _segment(0xE1, _JPEG_XMP + xmp, "XMP")
    if icc:
        pieces = [icc[at : at + _ICC_PART] for at in range(0, len(icc), _ICC_PART)]
        if len(pieces) > 255:
            raise Refused("encode", "format_limit", f"a profile of {len(icc)} bytes does not fit into JPEG; use tiff")
        for index, piece in enumerate(pieces, 1):
            parts += _segment(0xE2, _JPEG_ICC + bytes((index, len(pieces))) + piece, "profile")
    return parts


def metadata_limit(format: str) -> int:
    """Return how many bytes of EXIF, and how many of XMP, a file of this format holds."""
    return _SEGMENT - len(_JPEG_XMP) if format == "JPEG" else 1 << 20


def add_to_tiff(path: Path, *, icc: bytes | None, exif: bytes | None, xmp: bytes | None) -> None:
    """Add the tags to the TIFF at `path`: a new directory at its end takes the place of the first one.

    Of the EXIF all tags are taken but those that describe stored pixels. Raises ValueError for a broken EXIF.
    """
    with path.open("r+b") as file:
        layout, offset = directories.read_layout(file.read(16))

        def read_at(at: int, count: int) -> bytes:
            file.seek(at)
            return file.read(count)

        tags: dict[int, Entry | Tree] = {}
        if exif:
            tags.update(_exif_tree(exif, layout))
        said = {282, 283} <= tags.keys()  # without a unit it is the inch
        written = directories.read_directory(read_at, offset, layout)[0]
        tags.update({tag: entry for tag, entry in written.items() if not (said and tag in _RESOLUTION)})
        if icc:
            tags[34675] = Entry(UNDEFINED, icc)
        if xmp:
            tags[700] = Entry(1, xmp)
        end = file.seek(0, 2)
        start = end + end % 2
        made = directories.directory_bytes(tags, layout, start=start)
        if not layout.big and start + len(made) >= 1 << 32:
            raise ValueError(f"{start + len(made)} bytes: a TIFF of 4 GiB and more must be a BigTIFF")
        file.write(bytes(start - end) + made)
        file.seek(0)
        file.write(directories.header_bytes(layout, start))


def _exif_tree(exif: bytes, target: Layout) -> Tree:
    """Return the tags of an EXIF block in the byte order of `target`, with the directories below."""
    source, offset = directories.read_layout(exif)

    def read_at(at: int, count: int) -> bytes:
        return exif[at : at + count]

    def below(entries: dict[int, Entry], *tags: int) -> Tree:
        tree: dict[int, Entry | Tree] = {}
        for tag, entry in entries.items():
            if tag in tags:
                found = directories.read_directory(read_at, directories.number(entry, source), source)[0]
                tree[tag] = below(found, *([INTEROPERABILITY] if tag == EXIF else []))
            else:
                tree[tag] = directories.reordered(entry, source, target)
        return tree

    first = directories.read_directory(read_at, offset, source)[0]
    return below({tag: entry for tag, entry in first.items() if tag not in _NOT_COPIED}, EXIF, GPS)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _segment(marker: int, data: bytes, name: str) -> bytes:
    if len(data) > _SEGMENT:
        raise Refused("encode", "format_limit", f"{name} of {len(data)} bytes does not fit into JPEG; use png or tiff")
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data

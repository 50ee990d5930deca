"""TIFF directories, which EXIF has too: read to tags with their raw values, and written back at any place.

Types and samples stay as stored; nothing is interpreted that does not have to be. TIFF 6.0, BigTIFF, EXIF 2.32.
"""

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Union

SHORT, LONG, UNDEFINED, LONG8 = 3, 4, 7, 16
EXIF, GPS, INTEROPERABILITY = 34665, 34853, 40965
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_SWAPPED = _SIZES | {5: 4, 10: 4}  # a rational is two numbers
_CODES = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q"}
_MAX_VALUE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Layout:
    """How a file writes its numbers: `order` is "<" or ">", `big` is BigTIFF's 8 bytes of offset."""

    order: str
    big: bool = False

    def pack(self, code: str, *values: int) -> bytes:
        return struct.pack(self.order + code, *values)

    def unpack(self, code: str, data: bytes, at: int = 0) -> tuple[Any, ...]:
        return struct.unpack_from(self.order + code, data, at)

    @property
    def offset_code(self) -> str:
        return "Q" if self.big else "I"

    @property
    def entry_bytes(self) -> int:
        return 20 if self.big else 12

    @property
    def count_code(self) -> str:
        return "Q" if self.big else "H"


@dataclass(frozen=True, slots=True)
class Entry:
    """The value of a tag: its TIFF type and its bytes in the order of the file; `at` is where they lie."""

    kind: int
    data: bytes
    at: int = 0

    @property
    def count(self) -> int:
        return len(self.data) // _SIZES[self.kind]


Tree = Mapping[int, Union[Entry, "Tree"]]  # a tag's value, or the directory that it points to


def read_layout(head: bytes) -> tuple[Layout, int]:
    """Return the layout that the first 16 bytes declare, and where the first directory is. Raises ValueError."""
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order is None or len(head) < 8:
        raise ValueError(f"a TIFF header: {head[:4]!r}; must begin with II or MM")
    version = struct.unpack_from(order + "H", head, 2)[0]
    if version == 42:
        return Layout(order), struct.unpack_from(order + "I", head, 4)[0]
    if version != 43 or len(head) < 16:
        raise ValueError(f"a TIFF header: version {version}; must be 42 or 43")
    return Layout(order, True), struct.unpack_from(order + "Q", head, 8)[0]


def read_directory(
    read_at: Callable[[int, int], bytes], offset: int, layout: Layout
) -> tuple[dict[int, Entry], int, int]:
    """Return the tags of the directory at `offset`, the offset of the next one (0: none), and where its table ends.

    read_at(offset, count) gives bytes, fewer at the end of the file. Raises ValueError for what is cut, has an unknown
    type, or says that it lies where there is nothing.
    """
    size, head_bytes = layout.entry_bytes, struct.calcsize("<" + layout.count_code)
    count = layout.unpack(layout.count_code, _exactly(read_at, offset, head_bytes))[0]
    if not 0 < count <= 4096:
        raise ValueError(f"a TIFF directory of {count} entries")
    tail = struct.calcsize("<" + layout.offset_code)
    table = _exactly(read_at, offset + head_bytes, count * size + tail)
    entries: dict[int, Entry] = {}
    for index in range(count):
        tag, kind, number = layout.unpack("HH" + layout.offset_code, table, index * size)
        length = _SIZES.get(kind, 0) * number
        if kind not in _SIZES or length > _MAX_VALUE_BYTES:
            raise ValueError(f"TIFF tag {tag}: type {kind}, {number} values")
        at = offset + head_bytes + index * size + size - tail
        if length > tail:
            at = layout.unpack(layout.offset_code, table, index * size + size - tail)[0]
        entries.setdefault(tag, Entry(kind, _exactly(read_at, at, length), at))
    end = offset + head_bytes + len(table)
    return entries, layout.unpack(layout.offset_code, table, count * size)[0], end


def number(entry: Entry, layout: Layout) -> int:
    """Return the first value of an entry of an unsigned type. Raises ValueError for another type, or none."""
    if entry.kind not in _CODES or not entry.count:
        raise ValueError(f"a TIFF value of type {entry.kind}; must be an unsigned integer")
    return int(layout.unpack(_CODES[entry.kind], entry.data)[0])


def numbers(kind: int, values: list[int], layout: Layout) -> Entry:
    """Return the entry of some unsigned integers."""
    return Entry(kind, layout.pack(f"{len(values)}{_CODES[kind]}", *values))


def reordered(entry: Entry, source: Layout, target: Layout) -> Entry:
    """Return the same value with its bytes in the order of another file."""
    unit = _SWAPPED[entry.kind]
    if source.order == target.order or unit == 1:
        return entry
    swapped = b"".join(entry.data[at : at + unit][::-1] for at in range(0, len(entry.data), unit))
    return Entry(entry.kind, swapped)


def directory_bytes(tree: Tree, layout: Layout, *, start: int) -> bytes:
    """Return the directory `tree`, to be put at `start`, an even offset: its table, its values, then its directories.

    It is the last of its chain. Tags are in order, and the same tree gives the same bytes.
    """
    room = struct.calcsize("<" + layout.offset_code)
    head = layout.pack(layout.count_code, len(tree))
    place = start + len(head) + len(tree) * layout.entry_bytes + room
    place += place % 2
    table, values = b"", b""
    for tag, value in sorted(tree.items()):
        if isinstance(value, Entry):
            kind, count, data = value.kind, value.count, value.data
        else:
            kind, count, data = LONG8 if layout.big else LONG, 1, b""
            child = directory_bytes(value, layout, start=place + len(values))
            data = layout.pack(layout.offset_code, place + len(values))
            values += child + bytes(len(child) % 2)
        if len(data) > room:
            data, long = layout.pack(layout.offset_code, place + len(values)), data
            values += long + bytes(len(long) % 2)
        table += layout.pack("HH" + layout.offset_code, tag, kind, count) + data.ljust(room, b"\0")
    return (head + table + bytes(room)).ljust(place - start, b"\0") + values


def header_bytes(layout: Layout, offset: int) -> bytes:
    """Return the header of a file whose first directory is at `offset`."""
    mark = b"II" if layout.order == "<" else b"MM"
    if layout.big:
        return mark + layout.pack("HHHQ", 43, 8, 0, offset)
    return mark + layout.pack("HI", 42, offset)


def _exactly(read_at: Callable[[int, int], bytes], offset: int, count: int) -> bytes:
    data = read_at(offset, count) if count else b""
    if len(data) != count:
        raise ValueError(f"a TIFF that ends before the {count} bytes at {offset}")
    return data

"""EXIF and XMP: read from the source, made true for the output, and extended by where the output comes from.

EXIF is edited where it lies, as maker's notes count their offsets from its start. XMP keeps what it says, but for the
size and orientation of the source. The same input gives the same bytes: nothing here knows the time.
"""

import struct
from collections.abc import Mapping
from typing import IO, Any
from xml.dom import minidom
from xml.parsers.expat import ExpatError, ParserCreate

from PIL import Image

from pipelines import directories
from pipelines.directories import EXIF, GPS, INTEROPERABILITY, LONG, SHORT, Entry, Layout, Tree, numbers

_IPTC = "http://cv.iptc.org/newscodes/digitalsourcetype/"
TRAINED_COMPOSITE = _IPTC + "compositeWithTrainedAlgorithmicMedia"  # a diffusion model drew what was not there
ALGORITHMICALLY_ENHANCED = _IPTC + "algorithmicallyEnhanced"  # regression and bicubic
NAMESPACE = "urn:diffsr:xmp:1.0/"
MAX_BYTES = 1 << 20
_MAX_DEPTH = 64

_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_XMLNS = "http://www.w3.org/2000/xmlns/"
_TIFF, _EXIF_NS = "http://ns.adobe.com/tiff/1.0/", "http://ns.adobe.com/exif/1.0/"
_IPTC_EXT = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
_STALE = (  # of the source's pixels, or of a part of its XMP that is not taken along
    (_TIFF, "ImageWidth"), (_TIFF, "ImageLength"), (_EXIF_NS, "PixelXDimension"), (_EXIF_NS, "PixelYDimension"),
    ("http://ns.adobe.com/xap/1.0/", "Thumbnails"), ("http://ns.adobe.com/xmp/note/", "HasExtendedXMP"),
    (_IPTC_EXT, "DigitalSourceType"),
)  # fmt: skip
_EMPTY = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="{_RDF}"></rdf:RDF></x:xmpmeta>'
_BEFORE, _AFTER = '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>', '<?xpacket end="w"?>'

_ORIENTATION, _WIDTH, _HEIGHT, _THUMBNAIL, _THUMBNAIL_BYTES = 274, 256, 257, 513, 514
_X_DIMENSION, _Y_DIMENSION, _RELATED_WIDTH, _RELATED_HEIGHT = 40962, 40963, 4097, 4098
_X_RESOLUTION, _UNIT = 282, 296
# Where stored pixels lie, and places in the source's pixels: true for no other file.
_DROPPED = frozenset([273, 279, *range(320, 348), _THUMBNAIL, _THUMBNAIL_BYTES, 37396, 41492])
# Tags of a TIFF that are EXIF's as well: description, camera, resolution, program, date, artist, rating, titles.
_FROM_TIFF = (270, 271, 272, 282, 283, 296, 305, 306, 315, 316, 18246, 33432, *range(40091, 40096), EXIF, GPS)
_LAYOUT_NOTES = (b'{"shape"', b"ImageJ=", b"<?xml", b"<OME")  # descriptions by which programs find their arrays


def stored_exif(image: Image.Image) -> bytes | None:
    """Return the EXIF of an image that Pillow has loaded, not of a TIFF: from its header on, None without one.

    A resolution that stands elsewhere in a file without EXIF becomes EXIF.
    """
    found = image.info.get("exif") or b""
    if not found and "Raw profile type exif" in image.info:  # as ImageMagick writes PNG
        found = image.getexif().tobytes()
    found = found.removeprefix(b"Exif\0\0")
    if found:
        return bytes(found)
    dpi = image.info.get("dpi")
    if not isinstance(dpi, tuple) or len(dpi) != 2 or not all(0 < float(value) < 1 << 20 for value in dpi):
        return None
    layout = Layout(">")
    tags: dict[int, Entry] = {_UNIT: numbers(SHORT, [2], layout)}
    for tag, value in zip((_X_RESOLUTION, _X_RESOLUTION + 1), dpi, strict=True):
        tags[tag] = Entry(5, layout.pack("II", round(float(value) * 1000), 1000))
    return directories.header_bytes(layout, 8) + directories.directory_bytes(tags, layout, start=8)


def stored_xmp(info: Mapping[Any, Any]) -> bytes | None:
    """Return the XMP packet in what Pillow calls the info of an image, None without one."""
    found = info.get("xmp") or info.get("XML:com.adobe.xmp")
    if isinstance(found, str):
        found = found.encode("utf-8", "replace")
    return bytes(found) if isinstance(found, bytes) and found else None


def tiff_metadata(file: IO[bytes]) -> tuple[bytes | None, bytes | None]:
    """Return EXIF made of the first directory of a TIFF, and its XMP; None for what it has not, or is broken."""

    def read_at(offset: int, count: int) -> bytes:
        file.seek(offset)
        return file.read(count)

    try:
        layout, offset = directories.read_layout(read_at(0, 16))
        tags = directories.read_directory(read_at, offset, layout)[0]
        tree: dict[int, Entry | Tree] = {tag: tags[tag] for tag in _FROM_TIFF if tag in tags and tags[tag].kind < 16}
        for tag in (EXIF, GPS):
            tree.pop(tag, None)
            if tag in tags:
                below: dict[int, Entry | Tree] = {}
                below.update(directories.read_directory(read_at, directories.number(tags[tag], layout), layout)[0])
                below.pop(INTEROPERABILITY, None)  # says of which kind a JPEG is
                if below:
                    tree[tag] = below
    except (ValueError, OverflowError, struct.error):
        return None, None
    description = tree.get(270)
    if isinstance(description, Entry) and description.data.startswith(_LAYOUT_NOTES):
        del tree[270]
    xmp = tags[700].data if 700 in tags else None
    if not tree:
        return None, xmp
    small = Layout(layout.order)
    return directories.header_bytes(small, 8) + directories.directory_bytes(tree, small, start=8), xmp


def resolution(exif: bytes | None) -> float | None:
    """Return the pixels per millimetre that the EXIF gives, None where it gives none."""
    if not exif:
        return None
    try:
        layout, offset = directories.read_layout(exif)
        tags = directories.read_directory(lambda at, count: exif[at : at + count], offset, layout)[0]
        above, below = layout.unpack("II", tags[_X_RESOLUTION].data)
        unit = directories.number(tags[_UNIT], layout) if _UNIT in tags else 2
        found = above / below / {2: 25.4, 3: 10.0}[unit]
    except (ValueError, KeyError, ArithmeticError, struct.error):
        return None
    return found if 0.001 < found < 10_000 else None


def output_exif(exif: bytes | None, *, height: int, width: int, limit_bytes: int = MAX_BYTES) -> bytes | None:
    """Return the EXIF for an output of height x width px: upright, with its size, and without the thumbnail.

    Everything else stays in its place, maker's notes too. None for None, for a broken EXIF, and for one of more than
    `limit_bytes`; the caller says so.
    """
    if not exif or len(exif) > 16 * MAX_BYTES:
        return None
    try:
        made = _Edited(exif.removeprefix(b"Exif\0\0")).made_for(height, width)
    except (ValueError, OverflowError, struct.error):
        return None
    return made if len(made) <= limit_bytes else None


def without_orientation(exif: bytes) -> bytes:
    """Return EXIF of `output_exif` without its orientation, which AVIF keeps elsewhere."""
    edited = _Edited(exif)
    _, _, end = edited.read(edited.first)
    edited.write(edited.first, end, {}, dropped=frozenset([_ORIENTATION]))
    return bytes(edited.block)


def output_xmp(
    xmp: bytes | None,
    *,
    source_type: str,
    software: str,
    model: str,
    recipe: str,
    method: str,
    limit_bytes: int = MAX_BYTES,
) -> bytes:
    """Return an XMP packet: that of the source where it can be kept, and with it what made the output.

    `source_type` is one of the two IPTC constants; the rest stands as Software, Model, Recipe and Method in NAMESPACE.
    A packet that is no UTF-8 XML, has a DOCTYPE, no RDF, or more than a megabyte, is replaced, as is one with which
    the result would have more than `limit_bytes`.
    """
    ours = {"Software": software, "Model": model, "Recipe": recipe, "Method": method}
    kept = _parsed(xmp)
    if kept is not None:
        made = _extended(kept, source_type, ours)
        if len(made) <= limit_bytes:
            return made
    return _extended(minidom.parseString(_EMPTY), source_type, ours)


def is_upscaled(xmp: bytes | None) -> bool:
    """Return whether the packet says that the image is a result of this program."""
    document = _parsed(xmp)
    return document is not None and any(
        node.namespaceURI == NAMESPACE
        for element in document.getElementsByTagName("*")
        for node in (element, *_attributes(element))
    )


def _parsed(xmp: bytes | None) -> minidom.Document | None:
    """Return the packet as a document with one rdf:RDF, None where it is none or not to be trusted."""
    if not xmp or len(xmp) > MAX_BYTES:
        return None
    try:
        packet = xmp.decode("utf-8").strip("\0 \t\r\n\ufeff").encode()
        _check_harmless(packet)
        document = minidom.parseString(packet)
    except (ValueError, ExpatError):
        return None
    return document if len(document.getElementsByTagNameNS(_RDF, "RDF")) == 1 else None


def _check_harmless(packet: bytes) -> None:
    """Raise ValueError for a document type, with which entities come, and for elements deeper than recursion goes."""
    parser, depth = ParserCreate("utf-8"), [0]

    def enter(name: str, attributes: dict[str, str]) -> None:
        depth[0] += 1
        if depth[0] > _MAX_DEPTH:
            raise ValueError(f"XMP nested more than {_MAX_DEPTH} deep")

    def leave(name: str) -> None:
        depth[0] -= 1

    def refuse(*_: object) -> None:
        raise ValueError("XMP with a document type")

    parser.StartElementHandler, parser.EndElementHandler, parser.StartDoctypeDeclHandler = enter, leave, refuse
    parser.Parse(packet, True)


def _extended(document: minidom.Document, source_type: str, ours: dict[str, str]) -> bytes:
    rdf = document.getElementsByTagNameNS(_RDF, "RDF")[0]
    about = ""
    for element in list(document.getElementsByTagName("*")):
        about = about or (element.getAttributeNS(_RDF, "about") if element.parentNode is rdf else "")
        for node in _attributes(element):
            name = (node.namespaceURI, node.localName)
            if name == (_TIFF, "Orientation"):
                node.value = "1"
            elif _is_stale(*name):
                element.removeAttributeNode(node)
        if (element.namespaceURI, element.localName) == (_TIFF, "Orientation"):
            for child in list(element.childNodes):
                element.removeChild(child)
            element.appendChild(document.createTextNode("1"))
        elif _is_stale(element.namespaceURI, element.localName) and element.parentNode is not None:
            element.parentNode.removeChild(element)
    for element in [node for node in rdf.childNodes if isinstance(node, minidom.Element)]:
        if not element.childNodes and all(node.namespaceURI == _RDF for node in _attributes(element)):
            rdf.removeChild(element)  # it said nothing else
    prefix = rdf.prefix or "rdf"
    described = document.createElementNS(_RDF, f"{prefix}:Description")
    if not rdf.prefix:
        described.setAttributeNS(_XMLNS, "xmlns:rdf", _RDF)
    described.setAttributeNS(_RDF, f"{prefix}:about", about)
    described.setAttributeNS(_XMLNS, "xmlns:Iptc4xmpExt", _IPTC_EXT)
    described.setAttributeNS(_XMLNS, "xmlns:diffsr", NAMESPACE)
    properties = [(_IPTC_EXT, "Iptc4xmpExt:DigitalSourceType", source_type)]
    for namespace, qualified, value in properties + [(NAMESPACE, f"diffsr:{key}", ours[key]) for key in ours]:
        element = document.createElementNS(namespace, qualified)
        element.appendChild(document.createTextNode(value))
        described.appendChild(element)
    rdf.appendChild(described)
    root = document.documentElement
    assert root is not None
    return (_BEFORE + root.toxml() + _AFTER).encode()


def _is_stale(namespace: str | None, name: str | None) -> bool:
    return namespace == NAMESPACE or (namespace, name) in _STALE


def _attributes(element: minidom.Element) -> list[minidom.Attr]:
    return [node for node in list(element.attributes.values()) if node.namespaceURI != _XMLNS]


class _Edited:
    """An EXIF block while it is changed in place; all of it raises ValueError for what is broken."""

    def __init__(self, exif: bytes) -> None:
        self.layout, self.first = directories.read_layout(exif)
        if self.layout.big:
            raise ValueError("EXIF in a BigTIFF layout: must be classic")
        self.block = bytearray(exif)
        self.used: list[tuple[int, int]] = [(0, 8)]

    def made_for(self, height: int, width: int) -> bytes:
        sizes = {_WIDTH: width, _HEIGHT: height}
        tags, following, end = self.read(self.first)
        self.write(self.first, end, {_ORIENTATION: (SHORT, 1)} | {tag: (LONG, sizes[tag]) for tag in sizes})
        if EXIF in tags:
            self._below(tags[EXIF], {_X_DIMENSION: (LONG, width), _Y_DIMENSION: (LONG, height)}, height, width)
        if GPS in tags:
            self._below(tags[GPS], {}, height, width)
        if following:
            self._remove_thumbnail(following)
        return bytes(self.block)

    def _below(self, pointer: Entry, changes: dict[int, tuple[int, int]], height: int, width: int) -> None:
        at = directories.number(pointer, self.layout)
        tags, _, end = self.read(at)
        self.write(at, end, changes)
        if INTEROPERABILITY in tags and changes:
            at = directories.number(tags[INTEROPERABILITY], self.layout)
            _, _, end = self.read(at)
            self.write(at, end, {_RELATED_WIDTH: (LONG, width), _RELATED_HEIGHT: (LONG, height)})

    def read(self, at: int) -> tuple[dict[int, Entry], int, int]:
        tags, following, end = directories.read_directory(self._bytes, at, self.layout)
        if any(at < stop and start < end for start, stop in self.used):
            raise ValueError(f"EXIF directory at {at}: lies over something else")
        self.used.append((at, end))
        self.used += [(entry.at, entry.at + len(entry.data)) for entry in tags.values()]
        return tags, following, end

    def _bytes(self, offset: int, count: int) -> bytes:
        return bytes(self.block[offset : offset + count])

    def write(
        self, at: int, end: int, changes: dict[int, tuple[int, int]], *, dropped: frozenset[int] = _DROPPED
    ) -> None:
        """Write the table again in its place, with changed values and dropped tags, as the last of its chain."""
        size, kept = self.layout.entry_bytes, []
        count = self.layout.unpack("H", self._bytes(at, 2))[0]
        for index in range(count):
            entry = self._bytes(at + 2 + index * size, size)
            tag = self.layout.unpack("H", entry)[0]
            if tag in changes:
                kind, value = changes[tag]
                entry = self.layout.pack("HHI" + ("H" if kind == SHORT else "I"), tag, kind, 1, value)
            if tag not in dropped:
                kept.append(entry.ljust(size, b"\0"))
        table = self.layout.pack("H", len(kept)) + b"".join(kept) + bytes(4)
        self.block[at:end] = table.ljust(end - at, b"\0")

    def _remove_thumbnail(self, at: int) -> None:
        """Blank the second directory and the picture that it points to; cut both off where nothing comes after them."""
        before = list(self.used)
        tags, _, end = self.read(at)
        parts = [(at, end), *((entry.at, entry.at + len(entry.data)) for entry in tags.values())]
        if _THUMBNAIL in tags and _THUMBNAIL_BYTES in tags:
            start = directories.number(tags[_THUMBNAIL], self.layout)
            parts.append((start, start + directories.number(tags[_THUMBNAIL_BYTES], self.layout)))
        for start, stop in parts:
            if stop > len(self.block) or any(start < last and first < stop for first, last in before):
                raise ValueError("EXIF thumbnail: lies over something else, or nowhere")
            self.block[start:stop] = bytes(stop - start)
        kept = max(stop for _, stop in before)
        if min(start for start, _ in parts) >= kept and max(stop for _, stop in parts) >= len(self.block) - 1:
            del self.block[kept:]

"""What the header of a raster says that GDAL leaves out or reads otherwise: page count, orientation, profile, colours.

TIFF, JPEG 2000 and binary 16-bit PPM are read here without a pixel; 16-bit PNG goes through Pillow, which also checks
the stream to its end. Nothing here decides whether the raster is wanted, except where it contradicts itself.
"""

import re
from dataclasses import dataclass
from typing import IO, Any

from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from pipelines.images import BAD_DATA, GEOREFERENCE, Refused, refusal
from pipelines.metadata import stored_exif, stored_xmp, tiff_metadata

GREY, RGB, CMYK = "grey", "RGB", "CMYK"
MAX_PAGES = 1000
_MAX_JP2_HEADER_BYTES = 16 << 20
_PHOTOMETRIC = {0: GREY, 1: GREY, 2: RGB, 5: CMYK, 6: RGB}  # TIFF 6.0; 6 is YCbCr, which a JPEG reader turns into RGB
_UNREAD = {-1: "missing", 3: "palette: its values name classes, and are no brightness", 8: "CIELab"}
_JPEG_COMPRESSION, _YCBCR, _DNG_VERSION = 7, 6, 50706
_REDUCED, _MASK = 1, 4  # bits of NewSubfileType: an overview, a transparency mask
_ENUMERATED = {16: RGB, 17: GREY}  # JPEG 2000 part 1, table I.10
_PNM = re.compile(rb"P([56])" + rb"(?:\s+|\s*#[^\r\n]*[\r\n])+(\d+)" * 3 + rb"\s")


@dataclass(frozen=True, kw_only=True)
class Header:
    """The samples as stored: `colours` is grey, RGB or CMYK ("" unknown), `bits` those of the widest sample.

    `orientation` is EXIF's, 1 to 8. `extras` counts samples beside the colours that are no alpha, None where the
    file does not say what they are. `sequential_bytes` is what has to be decoded before the last row of the largest
    compressed block can be read. `premultiplied` says that the colours were multiplied by the alpha. `exif` and `xmp`
    are those of the file, read from TIFF and PNG.
    """

    height: int
    width: int
    samples: int
    bits: int
    colours: str = ""
    icc: bytes | None = None
    orientation: int = 1
    extras: int | None = 0
    inverted: bool = False
    integers: bool = True
    georeferenced: bool = False
    sequential_bytes: int = 0
    premultiplied: bool = False
    exif: bytes | None = None
    xmp: bytes | None = None


def read_header(file: IO[bytes], format: str, *, max_pixels: int, first_page: bool = False) -> Header:
    """Return the header of an open TIFF, JPEG 2000, PNG or PPM file. `max_pixels` limits what PNG decodes whole.

    first_page: of more than one page or frame the first is the image, if it is no overview. Raises `Refused`, and
    nothing else, for any bytes.
    """
    try:
        if format == "TIFF":
            return _tiff(file, first_page)
        if format == "JPEG 2000":
            return _jpeg2000(file)
        return _png(file, max_pixels, first_page) if format == "PNG" else _pnm(file)
    except BAD_DATA as error:
        raise refusal(error) from error


def _tiff(file: IO[bytes], first_page: bool) -> Header:
    pages = _pages(file)
    tags = pages[0]
    if _DNG_VERSION in tags:
        raise Refused("sniff", "unsupported_format", "a DNG camera raw; develop it to TIFF first")
    full = [_number(page, 254, 0) & (_REDUCED | _MASK) for page in pages[: 1 if first_page else None]].count(0)
    if full != 1 or _number(tags, 254, 0) & (_REDUCED | _MASK):
        raise Refused("decode", "multipage", "TIFF of more than one page; split it")
    photometric, compression = _number(tags, 262, -1), _number(tags, 259, 1)
    samples, bits = _number(tags, 277, 1), max(_numbers(tags, 258, 1))
    height, width = _number(tags, 257, 0), _number(tags, 256, 0)
    if min(height, width, samples, bits) < 1:
        raise Refused("decode", "corrupt", f"{width} x {height} px of {samples} samples of {bits} bits")
    if photometric not in _PHOTOMETRIC:
        kind = _UNREAD.get(photometric, str(photometric))
        raise Refused("decode", "unsupported_mode", f"TIFF photometric interpretation {kind}")
    if photometric == _YCBCR and compression != _JPEG_COMPRESSION:
        raise Refused("decode", "unsupported_mode", f"YCbCr in TIFF compression {compression}; only JPEG's is read")
    if photometric == 5 and (samples != 4 or _number(tags, 332, 1) != 1):
        raise Refused("decode", "unsupported_mode", f"{samples} inks that are not just cyan, magenta, yellow, black")
    rows, columns = _number(tags, 323, min(height, _number(tags, 278, height))), _number(tags, 322, width)
    block = rows * columns * bits * (samples if _number(tags, 284, 1) == 1 else 1) // 8
    exif, xmp = tiff_metadata(file)
    return Header(
        height=height,
        width=width,
        samples=samples,
        bits=bits,
        colours=_PHOTOMETRIC[photometric],
        icc=bytes(tags[34675]) if 34675 in tags and tags[34675] else None,
        orientation=_orientation(tags),
        extras=_extras(tags, samples - {GREY: 1, RGB: 3, CMYK: 4}[_PHOTOMETRIC[photometric]]),
        inverted=photometric == 0,
        integers=set(_numbers(tags, 339, 1)) <= {1, 4},
        georeferenced=any(tag in tags for tag in GEOREFERENCE),
        sequential_bytes=0 if compression == 1 else block,
        premultiplied=next((kind == 1 for kind in _numbers(tags, 338) if kind in (1, 2)), False),
        exif=exif,
        xmp=xmp,
    )


def _pages(file: IO[bytes]) -> list[ImageFileDirectory_v2]:
    """Return the directories of the file in order, at most MAX_PAGES, and no loop twice."""
    file.seek(0)
    head = file.read(8)
    if 43 in head[2:4]:  # a BigTIFF, whose offsets have 8 bytes
        head += file.read(8)
    pages: list[ImageFileDirectory_v2] = []
    seen: set[int] = set()
    offset = ImageFileDirectory_v2(head).next
    while offset and offset not in seen and len(pages) < MAX_PAGES:
        seen.add(offset)
        file.seek(offset)
        page = ImageFileDirectory_v2(head)
        page.load(file)
        pages.append(page)
        offset = page.next
    if not pages:
        raise Refused("decode", "corrupt", "a TIFF without a page")
    return pages


def _numbers(tags: ImageFileDirectory_v2, tag: int, *default: int) -> tuple[Any, ...]:
    value = tags.get(tag, default)
    return value if isinstance(value, tuple) else (value,)


def _number(tags: ImageFileDirectory_v2, tag: int, default: int) -> int:
    return int(_numbers(tags, tag, default)[0])


def _extras(tags: ImageFileDirectory_v2, beside: int) -> int | None:
    kinds = _numbers(tags, 338)
    return sum(kind not in (1, 2) for kind in kinds) if len(kinds) == beside else None


def _orientation(tags: ImageFileDirectory_v2) -> int:
    """Return EXIF's orientation from its tag, else from XMP (tag 700), as Pillow does; 1 for one that is none."""
    found = tags.get(274)
    if found is None and (match := re.search(rb'tiff:Orientation(="|>)([0-9])', bytes(tags.get(700, b"")))):
        found = int(match[2])
    return found if isinstance(found, int) and found in range(1, 9) else 1


def _jpeg2000(file: IO[bytes]) -> Header:
    """Read the boxes before the codestream, then the SIZ marker that begins it (ISO 15444-1, annexes I and A.5.1)."""
    file.seek(0)
    colours, icc, start = "", None, 0
    if file.read(4) != b"\xff\x4f\xff\x51":
        colours, icc, start = _boxes(file)
    file.seek(start)
    marker = file.read(42)
    if len(marker) < 42 or marker[:4] != b"\xff\x4f\xff\x51":
        raise Refused("decode", "truncated", "a JPEG 2000 file without a codestream")
    x_end, y_end, x_start, y_start = (int.from_bytes(marker[at : at + 4], "big") for at in (8, 12, 16, 20))
    samples = int.from_bytes(marker[40:42], "big")
    bits = max((byte & 127) + 1 for byte in file.read(3 * samples)[::3])
    height, width = y_end - y_start, x_end - x_start
    if min(height, width, samples) < 1:
        raise Refused("decode", "corrupt", f"JPEG 2000 of {width} x {height} px of {samples} samples")
    return Header(height=height, width=width, samples=samples, bits=bits, colours=colours, icc=icc)


def _boxes(file: IO[bytes]) -> tuple[str, bytes | None, int]:
    """Return the colours, the profile and where the codestream starts. Raises `Refused` for colours not read."""
    colours, icc, at = "", None, 0
    while True:
        file.seek(at)
        head = file.read(16)
        if len(head) < 8:
            raise Refused("decode", "truncated", "a JPEG 2000 file without a codestream")
        size, kind, inside = int.from_bytes(head[:4], "big"), head[4:8], 8
        if size == 1:
            size, inside = int.from_bytes(head[8:16], "big"), 16
        if kind == b"jp2c":
            return colours, icc, at + inside
        if size < inside:
            raise Refused("decode", "corrupt", f"a JPEG 2000 box {kind!r} of {size} bytes")
        if kind == b"jp2h":
            file.seek(at + inside)
            colours, icc = _colr(file.read(min(size - inside, _MAX_JP2_HEADER_BYTES)))
        at += size


def _colr(header: bytes) -> tuple[str, bytes | None]:
    """Return colours and profile of the first colour specification in the contents of a jp2h box."""
    at = 0
    while at + 11 <= len(header):
        size = int.from_bytes(header[at : at + 4], "big")
        if header[at + 4 : at + 8] == b"pclr":
            raise Refused("decode", "unsupported_mode", "JPEG 2000 with a palette")
        if header[at + 4 : at + 8] == b"colr":
            if header[at + 8] in (2, 3):
                return "", header[at + 11 : at + size]
            space = int.from_bytes(header[at + 11 : at + 15], "big")
            if header[at + 8] != 1 or space not in _ENUMERATED:
                raise Refused(
                    "decode", "unsupported_mode", f"JPEG 2000 colour space {space}; only sRGB and grey are read"
                )
            return _ENUMERATED[space], None
        if size < 8:
            break
        at += size
    return "", None


def _png(file: IO[bytes], max_pixels: int, first_page: bool) -> Header:
    file.seek(0)
    image = PngImageFile(file)
    width, height = image.size
    if width * height > max_pixels:
        message = f"{width} x {height} px is more than the limit of {max_pixels} px, and a PNG has no windows"
        raise Refused("decode", "too_large", message)
    if getattr(image, "is_animated", False) and not first_page:
        raise Refused("decode", "animated", "PNG of more than one frame; extract the frames first")
    image.load()
    orientation = image.getexif().get(274, 1)
    samples = {0: 1, 2: 3, 4: 2, 6: 4}[_png_colour_type(file)]
    return Header(
        height=height,
        width=width,
        samples=samples,
        bits=16,
        colours=GREY if samples < 3 else RGB,
        icc=image.info.get("icc_profile") or None,
        orientation=orientation if orientation in range(1, 9) else 1,
        sequential_bytes=width * height * samples * 2,
        exif=stored_exif(image),
        xmp=stored_xmp(image.info),
    )


def _png_colour_type(file: IO[bytes]) -> int:
    file.seek(25)
    return file.read(1)[0]


def _pnm(file: IO[bytes]) -> Header:
    file.seek(0)
    match = _PNM.match(file.read(4096))
    if match is None:
        raise Refused("decode", "unsupported_mode", "PPM of more than 8 bits that is not binary; write it as P5 or P6")
    width, height, top = (int(group) for group in match.groups()[1:])
    samples = 1 if match[1] == b"5" else 3
    file.seek(0, 2)
    if file.tell() < match.end() + width * height * samples * 2:
        raise Refused("decode", "truncated", f"fewer bytes than {width} x {height} px need")
    return Header(
        height=height, width=width, samples=samples, bits=top.bit_length(), colours=GREY if samples == 1 else RGB
    )

"""A corpus of hostile files made in code: every mode and profile, broken bytes, bombs, and names that tools trip over.

`make(folder)` writes it and says what must become of each file. Every file shows another picture, so that none is a
duplicate of another. Also written, and in no listing: a folder and a pipe with the names of pictures, a link to itself.
"""

import io
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from tests.icc import cmyk_profile, rgb_profile
from tests.tiff import write_tiff

DONE, SKIPPED = "done", "skipped"  # it opens and gives pairs at a patch of 32 px; it opens, and there is none to take
Expected = str | frozenset[str]  # DONE, SKIPPED, or the reason codes of which a refusal has one
HEIGHT, WIDTH, CORNER = 64, 96, 12
RED = (220, 30, 30)  # the CORNER px square at the top left of every coloured picture, seen upright
DEEP = frozenset(  # more than 8 bits, or no integers: read as scenes, never as 8-bit pictures
    {"grey 16 bit.png", "rgb 16 bit.png", "grey 16 bit.tif", "rgb 16 bit.tif", "float.tif"}
)
_CUT = frozenset({"truncated", "corrupt"})
# How the stored samples come from the upright ones, by EXIF orientation.
_UNDO: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: np.swapaxes(a, 0, 1),
    6: np.rot90, 7: lambda a: np.rot90(np.swapaxes(a, 0, 1), 2), 8: lambda a: np.rot90(a, 3),
}  # fmt: skip


def make(folder: Path) -> dict[str, Expected]:
    """Write the corpus into an existing folder; return what is expected of each key of its listing.

    A name that is no UTF-8 has the key that listings give it, its bytes escaped. Root can read everything, so the
    unreadable file is made for others only.
    """
    expected: dict[str, Expected] = {}
    for name, data, outcome in [*_modes(), *_profiles(), *_orientations(), *_names(), *_sizes(), *_rotten(), *_bombs()]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
        expected[name] = outcome
    expected |= {name: _write_deep(folder, name) for name in sorted(DEEP)}
    Path(os.fsdecode(os.fsencode(folder) + b"/no utf-8 \xff.png")).write_bytes(png(9_000))
    expected["no utf-8 \\udcff.png"] = frozenset({"name_not_utf8"})
    os.mkfifo(folder / "a pipe.png")  # who opens it waits for ever
    (folder / "a link to itself.png").symlink_to("a link to itself.png")
    expected["a link to itself.png"] = frozenset({"io_error"})
    (folder / "a link to nowhere.png").symlink_to("nowhere.png")
    expected["a link to nowhere.png"] = frozenset({"missing"})
    if os.geteuid():
        (folder / "unreadable.png").write_bytes(png(9_001))
        (folder / "unreadable.png").chmod(0)
        expected["unreadable.png"] = frozenset({"io_error"})
    return expected


def unexpected(expected: dict[str, Expected], found: dict[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """Return the files of which something else has become; `found` is (status, reason code) by key, as in a ledger."""
    wrong = {}
    for name, what in expected.items():
        status, reason = found.get(name, ("missing", ""))
        if not (status == what if isinstance(what, str) else status == "dead" and reason in what):
            wrong[name] = (status, reason)
    return wrong


def picture(seed: int, height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    """Return an RGB picture of soft random patches in [60, 200], with the RED corner; another for another seed."""
    coarse = np.random.default_rng(seed).integers(60, 200, (8, 12, 3), dtype=np.uint8)
    pixels = np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR))
    pixels[:CORNER, :CORNER] = RED
    return Image.fromarray(pixels)


def save(image: Image.Image, format: str, **options: Any) -> bytes:
    """Return the bytes of an image file."""
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def png(seed: int, height: int = HEIGHT, width: int = WIDTH) -> bytes:
    """Return `picture` as PNG."""
    return save(picture(seed, height, width), "PNG")


def png_of(width: int, height: int, *, bits: int, colour: int, rows: bytes, before: bytes = b"") -> bytes:
    """Return a PNG from its parts: filtered rows (packed here), colour type 0 grey or 2 RGB; nothing is checked."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = [_chunk(header), before, _chunk(b"IDAT" + zlib.compress(rows)), _chunk(b"IEND")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _chunk(part: bytes) -> bytes:
    return struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part))


Files = Iterator[tuple[str, bytes, Expected]]


def _modes() -> Files:
    """Yield a file of every mode that 8 bits hold."""
    ramp = np.full((HEIGHT, WIDTH), 255, np.uint8)
    ramp[:, :32] = np.linspace(0, 254, HEIGHT, dtype=np.uint8)[:, None]  # opaque elsewhere, so that patches are left
    alpha = Image.fromarray(ramp)

    def with_alpha(image: Image.Image) -> Image.Image:
        image.putalpha(alpha)
        return image

    def dotted(image: Image.Image) -> Image.Image:
        image.paste(5, (0, 0, 4, 4))  # a grey that is nowhere else
        return image

    def only(image: Image.Image) -> bytes:
        index = image.getpixel((0, 0))
        assert isinstance(index, int)
        return b"\xff" * index + b"\0"  # the corner's colour is transparent, and no other

    conversions: dict[str, Callable[[Image.Image], bytes]] = {
        "one bit.png": lambda i: save(i.convert("1"), "PNG"),
        "grey.png": lambda i: save(i.convert("L"), "PNG"),
        "grey.jpg": lambda i: save(i.convert("L"), "JPEG"),
        "grey transparent colour.png": lambda i: save(dotted(i.convert("L")), "PNG", transparency=5),
        "grey alpha.png": lambda i: save(with_alpha(i.convert("L")), "PNG"),
        "palette.png": lambda i: save(i.quantize(32), "PNG"),
        "palette transparent.png": lambda i: save(i.quantize(32), "PNG", transparency=only(i.quantize(32))),
        "palette alpha.tif": lambda i: save(with_alpha(i.quantize(32)), "TIFF"),
        "palette.bmp": lambda i: save(i.quantize(32), "BMP"),
        "still.gif": lambda i: save(i.quantize(32), "GIF"),
        "rgb.png": lambda i: save(i, "PNG"),
        "rgb.jpg": lambda i: save(i, "JPEG", quality=95),
        "rgb progressive.jpg": lambda i: save(i, "JPEG", quality=95, progressive=True),
        "rgb.webp": lambda i: save(i, "WEBP", lossless=True),
        "rgb.bmp": lambda i: save(i, "BMP"),
        "rgb.ppm": lambda i: save(i, "PPM"),
        "rgb.tif": lambda i: save(i, "TIFF", compression="tiff_lzw"),
        "rgb transparent colour.png": lambda i: save(i, "PNG", transparency=RED),
        "rgba.png": lambda i: save(with_alpha(i), "PNG"),
        "rgba opaque.png": lambda i: save(i.convert("RGBA"), "PNG"),
        "rgba.tif": lambda i: save(with_alpha(i), "TIFF"),
        "rgba.webp": lambda i: save(with_alpha(i), "WEBP", lossless=True),
        "cmyk.jpg": lambda i: save(i.convert("CMYK"), "JPEG", quality=95),
        "cmyk.tif": lambda i: save(i.convert("CMYK"), "TIFF"),
        "ycbcr.tif": lambda i: save(i.convert("YCbCr"), "TIFF"),
    }
    for seed, (name, convert) in enumerate(conversions.items()):
        yield name, convert(picture(seed)), DONE
    srgb, lab = (ImageCms.createProfile(name) for name in ("sRGB", "LAB"))
    stored = ImageCms.profileToProfile(picture(100), srgb, lab, outputMode="LAB")
    assert stored is not None
    stored.info.pop("icc_profile")
    yield "lab.tif", save(stored, "TIFF"), DONE


def _profiles() -> Files:
    """Yield pictures with a colour profile: two wide spaces, sRGB itself, a press, and one that belongs to others."""
    for seed, name in enumerate(("Display P3", "Adobe RGB", "sRGB"), 200):
        yield f"{name}.png", save(picture(seed), "PNG", icc_profile=rgb_profile(name)), DONE
        yield f"{name}.jpg", save(picture(seed + 10), "JPEG", quality=95, icc_profile=rgb_profile(name)), DONE
    press = save(picture(220).convert("CMYK"), "JPEG", quality=95, icc_profile=cmyk_profile())
    yield "cmyk profile.jpg", press, DONE
    wrong = save(picture(221).convert("CMYK"), "TIFF", icc_profile=rgb_profile("sRGB"))
    yield "cmyk with an rgb profile.tif", wrong, frozenset({"bad_profile", "corrupt"})


def _orientations() -> Files:
    """Yield a JPEG and a PNG of each EXIF orientation; upright, the corner is at the top left of all of them."""
    for number, undo in _UNDO.items():
        exif = Image.Exif()
        exif[274] = number
        for seed, name, options in ((300, "JPEG", {"quality": 95}), (310, "PNG", {})):
            stored = Image.fromarray(np.ascontiguousarray(undo(np.asarray(picture(seed + number)))))
            yield f"orientation {number}.{name.lower()}", save(stored, name, exif=exif, **options), DONE


def _names() -> Files:
    """Yield good pictures with names that are hard to carry."""
    names = (
        "line\nbreak.png", "tab\t.png", "naïve 日本 \U0001f6f0.png", "cafe\u0301.png", "caf\u00e9.png", " spaces  .png",
        "quote'\"$(touch x)`;.png", "-rf.png", "%2e%2e%41.png", "a#b?c=d&e.png", "[glob]*.png", "{key}.png",
        "back\\slash.png", "s3:__colon.png", "UPPER.PNG", "two.dots..png", "n" * 240 + ".png", ".hidden.png",
        "a folder.png/inside.png", "comma,and;.png",
    )  # fmt: skip
    for seed, name in enumerate(names, 400):
        yield name, png(seed), DONE
    yield "wrong extension.png", save(picture(450), "JPEG", quality=95), DONE
    yield "wrong extension.tif", png(451), DONE


def _sizes() -> Files:
    """Yield odd sizes, and pictures of which no patch can be taken."""
    yield "odd.png", png(500, 63, 95), DONE
    yield "prime.jpg", save(picture(501, 61, 97), "JPEG", quality=95), DONE
    for seed, (height, width) in enumerate(((1, 1), (3, 7), (1, 3000), (2000, 2), (31, 31)), 510):
        yield f"{height} by {width}.png", png(seed, height, width), SKIPPED
    yield "flat.png", save(Image.new("RGB", (WIDTH, HEIGHT), (90, 120, 40)), "PNG"), SKIPPED


def _rotten() -> Files:
    """Yield what is no picture, or no longer one, or more than one."""
    for seed, name in enumerate(("png", "jpeg", "webp", "tiff"), 600):
        whole = save(picture(seed), name, **({"lossless": True} if name == "webp" else {}))
        yield f"truncated.{name}", whole[: int(len(whole) * 0.6)], _CUT
    yield "header only.png", png(610)[:33], _CUT
    broken = bytearray(png(611))
    broken[17] ^= 1  # in the width, so that the checksum of IHDR no longer holds
    yield "checksum.png", bytes(broken), _CUT
    yield "empty.png", b"", frozenset({"empty_file"})
    no_image = frozenset({"not_an_image"})
    yield "page.jpg", b"<!DOCTYPE html><html><body>404 Not Found</body></html>", no_image
    vector = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><image href="http://x/"/></svg>'
    yield "vector.png", vector, no_image
    yield "noise.png", np.random.default_rng(1).bytes(4096), no_image
    yield "zeros.jpg", bytes(4096), no_image
    other = frozenset({"unsupported_format"})
    yield "postscript.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch x) (w) file\n", other
    yield "document.png", b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n", other
    yield "photoshop.tif", b"8BPS\0\1" + bytes(40), other
    yield "heif.jpg", b"\0\0\0\x18ftypheic" + bytes(40), other
    frames = {"save_all": True, "append_images": [picture(621), picture(622)]}
    for format, name in (("GIF", "animated.gif"), ("PNG", "animated.png"), ("WEBP", "animated.webp")):
        yield name, save(picture(620), format, **frames), frozenset({"animated"})
    yield "pages.tif", save(picture(620), "TIFF", **frames), frozenset({"multipage"})


def _bombs() -> Files:
    """Yield small files that ask for much memory."""
    too_large = frozenset({"too_large"})
    yield "60000 by 60000.png", png_of(60_000, 60_000, bits=8, colour=2, rows=bytes(100)), too_large
    claims = save(picture(700), "JPEG")
    start = claims.index(b"\xff\xc0") + 5  # of the frame header: height and width
    yield "65000 by 65000.jpg", claims[:start] + struct.pack(">HH", 65_000, 65_000) + claims[start + 4 :], too_large
    text = _chunk(b"zTXtcomment\0\0" + zlib.compress(bytes(80 << 20)))
    yield "text bomb.png", png(701)[:33] + text + png(701)[33:], frozenset({"corrupt"})
    frame = struct.pack("<HH3B", 60_000, 60_000, 0, 0, 0) + b"\x2c" + struct.pack("<4HB", 0, 0, 60_000, 60_000, 0)
    yield "60000 by 60000.gif", b"GIF89a" + frame + b"\x08\x01\x01\0\x3b", too_large


def _write_deep(folder: Path, name: str) -> Expected:
    """Write one of the files of DEEP, the same picture with finer steps; return what is expected."""
    seed = 800 + sorted(DEEP).index(name)
    steps = np.random.default_rng(seed).integers(0, 99, (HEIGHT, WIDTH, 3), dtype=np.uint16)
    fine = np.asarray(picture(seed), np.uint16) * 257 + steps
    fine = fine if name.startswith("rgb") else fine[:, :, :1]
    if name == "float.tif":
        fine = (fine / 65535).astype(np.float32)
    if name.endswith(".tif"):
        write_tiff(folder / name, [fine], height=HEIGHT, width=WIDTH)
    else:
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in fine)
        colour = 2 if name.startswith("rgb") else 0
        (folder / name).write_bytes(png_of(WIDTH, HEIGHT, bits=16, colour=colour, rows=rows))
    if find_spec("rasterio") is None:
        return frozenset({"needs_rasterio"})
    return frozenset({"no_value_range"}) if name == "float.tif" else DONE

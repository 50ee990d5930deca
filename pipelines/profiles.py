"""Colour profiles: from the encoding that an ICC profile describes to the working space of a training set.

Every conversion is a function of one pixel, so a window gives the bytes that the whole picture would. A picture
without a profile is taken as sRGB, which is also the default working space; a profile that is the working space to
within one level of 255 changes no pixel. lcms2 does the mathematics: through Pillow for 8 bits, imagecodecs for 16.
"""

import hashlib
import io
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from pipelines.images import Refused

_BAD_PROFILE = (ImageCms.PyCMSError, OSError, ValueError, TypeError)  # what ImageCms raises for bytes that are none
_SPACES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # ICC colour space: Pillow mode
_NO_OPTIMIZE = 0x100  # cmsFLAGS_NOOPTIMIZE: the table that lcms2 builds otherwise is up to 3 levels of 255 wrong


@dataclass(frozen=True)
class WorkingSpace:
    """The encoding that all pixels of a set share.

    `name` goes into the recipe: "srgb", "native" (each picture keeps its own encoding) or "icc:<sha256 of icc>".
    """

    name: str = "srgb"
    icc: bytes | None = None

    @classmethod
    def parse(cls, text: str, icc: bytes | None = None) -> "WorkingSpace":
        """Return the space called `text`, "srgb" or "native", or the one that the bytes of an RGB profile describe.

        Raises ValueError for another name without a profile, for a name with one, and for a profile that is damaged,
        not RGB, or of one direction only.
        """
        if text in ("srgb", "native"):
            if icc is not None:
                raise ValueError(f"working_space={text!r}: takes no profile; give a path as working_space instead")
            return cls(text)
        if icc is None:
            raise ValueError(f"working_space={text!r}: must be 'srgb', 'native' or the path of an ICC profile")
        try:
            if colour_space(icc) != "RGB":
                raise ValueError(f"working_space={text!r}: a profile for {colour_space(icc)}; must be one for RGB")
            _levels(icc, srgb_profile(), 3)
            _levels(srgb_profile(), icc, 3)
        except Refused as refused:
            raise ValueError(f"working_space={text!r}: {refused.message}; give an RGB display profile") from refused
        return cls(f"icc:{hashlib.sha256(icc).hexdigest()}", icc)

    def convert(self, pixels: np.ndarray, icc: bytes | None) -> np.ndarray:
        """Return HWC `pixels` (uint8 or uint16, C = 1 or 3), stored in the encoding of `icc`, in this space.

        It is `pixels` itself where nothing has to change. Grey becomes the grey of this space. Raises `Refused`:
        bad_profile for a damaged profile or one for other channels than these, profile_16bit where uint16 needs
        imagecodecs and there is none.
        """
        source = icc or srgb_profile()
        target = self.icc or srgb_profile()
        channels = pixels.shape[2]
        if self.name == "native" or source == target or _is_identity(source, target, channels):
            return pixels
        if channels == 1:
            return np.take(_grey_table(source, target, pixels.dtype.str), pixels)
        return _convert_rgb(pixels, source, target)


def srgb_profile() -> bytes:
    """Return the bytes of an sRGB profile, the same at any time: lcms2's own without its time of making."""
    return _srgb_profile()


def profile_name(icc: bytes | None) -> str:
    """Return the description in a profile, "" for None, "unnamed" where it has none. Raises `Refused` (bad_profile)."""
    if not icc:
        return ""
    text = "".join(letter for letter in _open(icc).profile.profile_description or "" if letter.isprintable())
    return text.strip()[:200] or "unnamed"


def colour_space(icc: bytes) -> str:
    """Return what the profile is for, "RGB", "GRAY", "CMYK", "Lab" and so on. Raises `Refused` (bad_profile)."""
    return str(_open(icc).profile.xcolor_space).strip()


def fitting_profile(icc: bytes | None, channels: int) -> bytes | None:
    """Return the profile to be embedded with samples of so many channels in the encoding of `icc`.

    It is `icc` itself where it is for 1 channel of grey or 3 of RGB. Where it is for the other of the two, it is one
    with the same curve on the neutral axis; None where there is no such curve, and for any other number of channels.
    Raises `Refused` (bad_profile).
    """
    if not icc:
        return None
    space = colour_space(icc)
    if (space, channels) in (("GRAY", 1), ("RGB", 3)):
        return icc
    return _other_profile(icc, channels) if (space, channels) in (("GRAY", 3), ("RGB", 1)) else None


def cmyk_to_srgb(pixels: np.ndarray, icc: bytes | None) -> np.ndarray:
    """Return uint8 HW4 ink (0 none, 255 full) as uint8 HW3 sRGB: by its profile, or by Pillow's formula without one.

    The result is that of `images.decode`. Raises `Refused` (bad_profile).
    """
    image = Image.fromarray(pixels, "CMYK")
    if icc is None:
        return np.asarray(image.convert("RGB"))
    return np.asarray(ImageCms.applyTransform(image, _transform(icc, srgb_profile(), "CMYK")))


@lru_cache(maxsize=1)
def _srgb_profile() -> bytes:
    made = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return made[:24] + bytes(12) + made[36:]


@lru_cache(maxsize=64)
def _other_profile(icc: bytes, channels: int) -> bytes | None:
    """Return the RGB profile with the curve of a grey one and sRGB's primaries, or the grey one of an RGB profile."""
    tags = _tags(icc)
    curve = tags.get(b"kTRC" if channels == 3 else b"gTRC")
    if (
        curve is None
        or icc[20:24] != b"XYZ "
        or (channels == 1 and not tags.get(b"rTRC") == curve == tags.get(b"bTRC"))
    ):
        return None
    made: dict[bytes, bytes] = {name: tags[name] for name in (b"desc", b"cprt", b"wtpt", b"chad") if name in tags}
    if channels == 1:
        made[b"kTRC"] = curve
    else:
        primaries = _tags(srgb_profile())
        made |= {name: primaries[name] for name in (b"rXYZ", b"gXYZ", b"bXYZ")}
        made |= {name: curve for name in (b"rTRC", b"gTRC", b"bTRC")}
    offset = 128 + 4 + 12 * len(made)
    table, body = len(made).to_bytes(4, "big"), b""
    for name, data in made.items():
        table += name + (offset + len(body)).to_bytes(4, "big") + len(data).to_bytes(4, "big")
        body += data + bytes(-len(data) % 4)
    space = b"mntrGRAYXYZ " if channels == 1 else b"mntrRGB XYZ "
    header = (offset + len(body)).to_bytes(4, "big") + icc[4:12] + space + icc[24:84] + bytes(44)
    return header + table + body


def _tags(icc: bytes) -> dict[bytes, bytes]:
    """Return the tags of a profile that lcms2 opens (ICC.1, 7.3)."""
    count = min(int.from_bytes(icc[128:132], "big"), 1000)
    rows = [icc[132 + 12 * index : 144 + 12 * index] for index in range(count)]
    places = [(row[:4], int.from_bytes(row[4:8], "big"), int.from_bytes(row[8:12], "big")) for row in rows]
    return {name: icc[start : start + size] for name, start, size in places}


def _open(icc: bytes) -> ImageCms.ImageCmsProfile:
    try:
        return ImageCms.ImageCmsProfile(io.BytesIO(icc))
    except _BAD_PROFILE as error:
        raise Refused("decode", "bad_profile", f"{len(icc)} bytes: {error}"[:300]) from error


@lru_cache(maxsize=64)
def _transform(source: bytes, target: bytes, mode: str) -> Any:
    """Return Pillow's transform from `mode` pixels in `source` to RGB in `target`, perceptual as `images` has it."""
    if _SPACES.get(colour_space(source)) != mode:
        raise Refused("decode", "bad_profile", f"a profile for {colour_space(source)} on samples that are {mode}")
    try:
        return ImageCms.buildTransform(_open(source), _open(target), mode, "RGB")
    except _BAD_PROFILE as error:
        raise Refused("decode", "bad_profile", f"{type(error).__name__}: {error}"[:300]) from error


@lru_cache(maxsize=64)
def _is_identity(source: bytes, target: bytes, channels: int) -> bool:
    """Return whether no level moves by more than 1 of 255: all 256 of grey, or a 17 x 17 x 17 cube of colours."""
    before, after = _levels(source, target, channels)
    return int(np.abs(before.astype(int) - after).max()) <= 1


def _levels(source: bytes, target: bytes, channels: int) -> tuple[np.ndarray, np.ndarray]:
    if channels == 1:
        ramp = np.arange(256, dtype=np.uint8)
        return ramp, _grey_table(source, target, ramp.dtype.str)
    steps = np.round(np.linspace(0, 255, 17)).astype(np.uint8)
    cube = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(17, 289, 3)
    return cube, _convert_rgb(cube, source, target)


@lru_cache(maxsize=16)
def _grey_table(source: bytes, target: bytes, dtype: str) -> np.ndarray:
    """Return for each level of grey the green of its conversion: on the neutral axis red and blue are the same.

    An RGB profile on grey samples, which some editors write, stands for its own neutral axis.
    """
    side = 16 if np.dtype(dtype) == np.uint8 else 256
    ramp = np.arange(side * side).astype(dtype).reshape(side, side)
    if colour_space(source) == "RGB":
        return _convert_rgb(np.repeat(ramp[:, :, None], 3, axis=2), source, target)[:, :, 1].ravel()
    transform = _transform(source, target, "L")  # raises for a profile that is not one for grey
    if ramp.dtype == np.uint8:
        return np.asarray(ImageCms.applyTransform(Image.fromarray(ramp), transform))[:, :, 1].ravel()
    return _convert_16bit(ramp, source, target, space="gray")[:, :, 1].ravel()


def _convert_rgb(pixels: np.ndarray, source: bytes, target: bytes) -> np.ndarray:
    transform = _transform(source, target, "RGB")
    if pixels.dtype == np.uint8:
        return np.asarray(ImageCms.applyTransform(Image.fromarray(np.ascontiguousarray(pixels)), transform))
    return _convert_16bit(pixels, source, target, space="rgb")


def _convert_16bit(samples: np.ndarray, source: bytes, target: bytes, *, space: str) -> np.ndarray:
    """Return uint16 HW or HW3 `samples` as uint16 HW3 in `target`. Raises `Refused` where imagecodecs is missing."""
    if samples.dtype != np.uint16:
        raise ValueError(f"pixels: {samples.dtype}; a profile applies to uint8 or uint16")
    try:
        import imagecodecs
    except ImportError as error:
        message = "a colour profile on 16-bit samples; install it with pip install diffsr[scans], or keep the encoding"
        raise Refused("decode", "profile_16bit", f"{message} with working_space native") from error
    options: dict[str, Any] = {"colorspace": space, "outcolorspace": "rgb", "intent": 0, "flags": _NO_OPTIMIZE}
    try:
        return np.asarray(imagecodecs.cms_transform(np.ascontiguousarray(samples), source, target, **options))
    except (RuntimeError, ValueError) as error:
        raise Refused("decode", "bad_profile", f"{type(error).__name__}: {error}"[:300]) from error

"""Bytes -> pictures: 8-bit grey or RGB, with alpha, ICC profile, EXIF and XMP beside the colour.

`decode` ends in exactly two ways, a `Picture` or a `Refused` that carries a reason code from `REASONS`. It calls the
eight Pillow readers by class instead of `Image.open`: nothing else can be reached (no EPS, no Ghostscript, no
plugin), and the size in the header is judged by `max_pixels` before Pillow warns about it or a pixel is allocated.
What Pillow would quietly reduce to 8 bits is refused here; `rasters` reads it from PNG, TIFF and PPM, nobody from AVIF.
"""

import io
import re
import struct
import threading
import zlib
from dataclasses import dataclass
from typing import IO

import numpy as np
from PIL import Image, ImageCms, ImageFile, ImageOps
from PIL.AvifImagePlugin import AvifImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from pipelines.metadata import stored_exif, stored_xmp, tiff_metadata

REASONS: dict[str, str] = {
    "empty_file": "the object has no bytes",
    "not_an_image": "the first bytes are no image format that we know (a web page or a text with the name of an image)",
    "unsupported_format": "an image, but of a format that is not read here (HEIC, JPEG XL, camera raw, ...)",
    "too_large": "the header declares more pixels than the limit; nothing was decoded",
    "truncated": "the data ends before the picture does",
    "corrupt": "the data contradicts the format, or unpacks to something absurd",
    "animated": "more than one frame (GIF, APNG, WebP); a still would silently lose the others",
    "multipage": "more than one full page or view (TIFF, stereo JPEG); the first would silently lose the others",
    "unsupported_mode": "samples that 8-bit grey or RGB cannot hold (16-bit, 32-bit, float, extra bands)",
    "georeferenced": "a TIFF that says where on Earth it lies; a plain picture would silently lose that",
    "oom": "there was no memory for it",
    "worker_died": "the process that was at work on it died, more than once",
    "format_limit": "the output format cannot hold the result, its profile or its metadata; tiff can",
    "alpha": "the output format has no alpha, and the image has; choose png, webp, tiff or avif",
    "depth_limit": "the output format holds 8 bits, and the image has 16; choose png or tiff",
    "missing": "the object is listed, and not there",
    "io_transient": "the store did not give it, also when asked again; the next night tries again",
    "channels": "channels that the model does not read",
    "nan": "the network gave values that are no numbers",
    "key_taken": "the place of its result is another source, or holds the result of another one",
    "large_enough": "it is larger than what is to be enlarged",
    "already_upscaled": "its own metadata say that it is a result",
    "io_error": "the store did not give it",
    "source_changed": "the object changed between listing and reading; the next run takes the new content",
    "bad_name": "its name, or that of its result, is one that the store cannot hold",
    "name_not_utf8": "its name is no UTF-8; rename it",
    "time_limit": "the time for one image was up before it was done",
    "needs_rasterio": "a raster, and rasterio is not installed here: pip install diffsr[geo]",
    "missing_band": "the bands asked for are not all there, or one of them is the alpha",
    "too_many_channels": "more channels than one image may have here; choose bands",
    "no_value_range": "float samples and no range of values declared for them: nobody can say what white is",
    "bad_profile": "the colour profile is damaged, or made for other channels than the image has",
    "profile_16bit": "16-bit samples with a colour profile, which needs imagecodecs: pip install diffsr[scans]",
    "no_twin": "the archive of low resolution has no image of that name",
    "scale_mismatch": "the twin of low resolution does not have the size that the scale asks for",
    "channel_mismatch": "the twin of low resolution has other channels",
    "misaligned": "the twin of low resolution shows the same place, but shifted by more than the limit",
    "unrelated": "the twin of low resolution does not show the same picture",
}
# What a listing takes for an image: a format that is not read becomes a dead letter, not silence.
_READ = ".png .jpg .jpeg .jpe .jfif .webp .tif .tiff .bmp .gif .ppm .pgm .pbm .pnm"
SUFFIXES = frozenset(f"{_READ} .jp2 .avif .heic .jxl .psd .dng .cr2".split())
_READERS: dict[str, type[ImageFile.ImageFile]] = {
    reader.format: reader
    for reader in (
        PngImageFile, JpegImageFile, WebPImageFile, TiffImageFile, BmpImageFile, GifImageFile, PpmImageFile,
        AvifImageFile,
    )
}  # fmt: skip
_MAGIC = {
    rb"\x89PNG\r\n\x1a\n": "PNG",
    rb"\xff\xd8\xff": "JPEG",
    rb"RIFF....WEBP": "WEBP",
    rb"GIF8[79]a": "GIF",
    rb"(II|MM).{6}CR": "camera raw",
    rb"II[*+]\x00|MM\x00[*+]": "TIFF",
    rb"BM.{12}[\x0c\x10\x28\x34\x38\x40\x6c\x7c]\x00\x00\x00": "BMP",
    rb"P([1-6y]|F|f|0CMYK)\s": "PPM",
    rb"\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51": "JPEG 2000",
    rb"\x00\x00\x00\x0cJXL |\xff\x0a": "JPEG XL",
    rb"....ftyp(avi[fs]|(mif1|msf1|miaf).{4}(.{4}){0,3}avi[fs])": "AVIF",
    rb"....ftyp(hei|hev|mif1|msf1|miaf)": "HEIF",
    rb"8BPS|gimp xcf": "Photoshop or GIMP",
    rb"%!PS|\xc5\xd0\xd3\xc6|%PDF": "PostScript or PDF",
    rb"P7\n|DDS |qoif|\x76\x2f\x31\x01|#\?RADIANCE|FUJIFILM|\x59\xa6\x6a\x95": "PAM, DDS, QOI, HDR or raw",
}
# What Pillow raises for bad bytes, found by the hostile corpus and by fuzzing; the guarded calls are all Pillow's.
# Warning is there for a process in which somebody has turned warnings into errors.
BAD_DATA: tuple[type[Exception], ...] = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError)
BAD_DATA += (ArithmeticError, struct.error, zlib.error, ImageCms.PyCMSError, Image.DecompressionBombError, Warning)
BAD_DATA += (MemoryError,)
_TRUNCATED = re.compile(r"truncat|unexpected end|end of file|not enough|insufficient|buffer is not large", re.I)
_MODE = re.compile(r"unknown pixel mode|unknown raw mode|cannot handle \d+-|unsupported bit depth|sample format", re.I)
_GREY = ("1", "L", "LA", "La")
_COLOUR = ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB")
_SUBFILE_TYPE, _BITS_PER_SAMPLE, _DNG_VERSION, _ORIENTATION, _MPF_ENTRIES = 254, 258, 50706, 274, 0xB002
GEOREFERENCE = (33550, 33922, 34264, 34735)  # GeoTIFF 1.1: pixel scale, tie points, transformation, geo keys
_AV1_HEAD_BYTES = 1 << 16  # within which AVIF describes its images
_SRGB_PRIMARIES = (1, 2, 5, 6)  # ITU-T H.273: sRGB, unsaid, and the two of 601, which are near
_pillow_limit = threading.Lock()


class Refused(Exception):
    """A picture that is not processed: `stage` (sniff, decode, encode), `reason` (a key of `REASONS`), `message`."""

    def __init__(self, stage: str, reason: str, message: str) -> None:
        super().__init__(stage, reason, message)
        self.stage, self.reason, self.message = stage, reason, message

    def __str__(self) -> str:
        return f"{self.stage}: {self.reason}: {self.message}"


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """One decoded picture, upright.

    `pixels` is uint8 HWC with C = 1 (grey) or 3 (RGB), range [0, 255], in the encoding that `icc` describes; `alpha`
    is uint8 HW, straight (not premultiplied), or None; `format` is what was read (one of `FORMATS`, BMP, GIF, PPM);
    `mode` is Pillow's name for the samples as stored; `exif_transposed` says that an orientation was applied;
    `stored_icc` is the profile in the file, which is not `icc` where CMYK or Lab was converted; `exif` (from its TIFF
    header on) and `xmp` are those of the file, None where it has none; `other_words` names what else it says in words
    (PNG text, comments, IPTC in a JPEG), which is not given out.
    """

    pixels: np.ndarray
    alpha: np.ndarray | None
    format: str
    mode: str
    icc: bytes | None
    exif_transposed: bool
    stored_icc: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    other_words: tuple[str, ...] = ()


def identify(data: bytes) -> str:
    """Return the name of the format of `data` by its first 32 bytes, "" for none that is known."""
    return next((name for pattern, name in _MAGIC.items() if re.match(pattern, data, re.DOTALL)), "")


def sniff(data: bytes, *, size: int | None = None) -> str:
    """Return the format of `data` by its first bytes, not its name. Raises `Refused` for what is not read here.

    `size` is that of the file where `data` is only its head.
    """
    if not data:
        raise Refused("sniff", "empty_file", "0 bytes")
    name = identify(data)
    if not name:
        raise Refused("sniff", "not_an_image", f"{size or len(data)} bytes that begin with {data[:16]!r}")
    if name not in _READERS:
        raise Refused("sniff", "unsupported_format", f"{name} is not one of {', '.join(_READERS)}")
    return name


def decode(data: bytes, *, max_pixels: int = 100_000_000) -> Picture:
    """Return the picture in `data`: sniffed, fully decoded, upright, palette expanded, CMYK and Lab turned into RGB.

    CMYK and Lab with a profile go through that profile to sRGB; without one by Pillow's formula, and `icc` is then
    None, as the old profile would be wrong. Raises `Refused`, and nothing else, for any bytes.
    """
    return decode_file(io.BytesIO(data), sniff(data), max_pixels=max_pixels)


def decode_file(file: IO[bytes], format: str, *, max_pixels: int, first_page: bool = False) -> Picture:
    """Return the picture in an open file, which `sniff` says to be of this format; as `decode` otherwise.

    first_page: the first page or frame of more than one is the picture, instead of a refusal.
    """
    _raise_pillow_limit(max_pixels)
    try:
        exif, xmp = tiff_metadata(file) if format == "TIFF" else (None, None)
        monochrome = format == "AVIF" and _check_avif(file)
        file.seek(0)
        image = _READERS[format](file)
        _check_header(image, max_pixels, first_page)
        mode = image.mode
        # A TIFF is turned by Pillow while it loads; a PNG may keep its EXIF behind the pixels.
        before = image.getexif().get(_ORIENTATION, 1) if format == "TIFF" else 1
        image.load()
        orientation = before if format == "TIFF" else image.getexif().get(_ORIENTATION, 1)
        turned = orientation in range(2, 9)
        upright = ImageOps.exif_transpose(image) if turned and format != "TIFF" else image
        samples, icc = _to_grey_or_rgb(upright)
        if format != "TIFF":
            exif, xmp = stored_exif(image), stored_xmp(image.info)
    except BAD_DATA as error:
        raise refusal(error) from error
    if monochrome and samples.shape[2] > 2:  # as Pillow gives it out where it has alpha
        mode, samples = mode.replace("RGB", "L"), samples[:, :, 2:]
    colours = 1 if samples.shape[2] < 3 else 3
    pixels = np.ascontiguousarray(samples[:, :, :colours])
    alpha = np.ascontiguousarray(samples[:, :, colours]) if samples.shape[2] > colours else None
    stored_icc = image.info.get("icc_profile") or None
    return Picture(pixels, alpha, format, mode, icc, turned, stored_icc, exif, xmp, _other_words(image))


def _other_words(image: ImageFile.ImageFile) -> tuple[str, ...]:
    texts = getattr(image, "text", None) or {}
    names = [f"PNG text {str(key)[:40]!r}" for key in sorted(texts) if key != "XML:com.adobe.xmp"][:20]
    names += ["a comment"] * bool(image.info.get("comment"))
    return (*names, *(["IPTC (Photoshop)"] if image.info.get("photoshop") else []))


def dimensions(file: IO[bytes], format: str) -> tuple[int, int]:
    """Return height and width as the header of an open file of this format says, not turned; nothing is decoded.

    Raises `Refused` for a header that is none, and for a format that is not read here.
    """
    if format not in _READERS:
        raise Refused("sniff", "unsupported_format", f"{format or 'this'} is not one of {', '.join(_READERS)}")
    file.seek(0)
    try:
        width, height = _READERS[format](file).size
    except BAD_DATA as error:
        raise refusal(error) from error
    return height, width


def jpeg_codec(pixels: np.ndarray, quality: int) -> np.ndarray:
    """Return uint8 HWC pixels (C = 1 or 3) after JPEG at this quality, colours at half resolution as in most files."""
    sink = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(
        sink, "JPEG", quality=quality, subsampling="4:2:0"
    )
    return np.asarray(JpegImageFile(io.BytesIO(sink.getvalue()))).reshape(pixels.shape)


def _check_header(image: ImageFile.ImageFile, max_pixels: int, first_page: bool) -> None:
    """Raise `Refused` for what the header alone rules out: size, depth, and more frames or pages than one."""
    width, height = image.size
    if width * height > max_pixels:
        raise Refused("decode", "too_large", f"{width} x {height} px is more than the limit of {max_pixels} px")
    if isinstance(image, TiffImageFile) and _DNG_VERSION in image.tag_v2:
        raise Refused("sniff", "unsupported_format", "a DNG camera raw; develop it to TIFF first")
    if isinstance(image, TiffImageFile) and any(tag in image.tag_v2 for tag in GEOREFERENCE):
        raise Refused("decode", "georeferenced", "a GeoTIFF, whose georeference would be lost; strip it if it may be")
    bits = _sample_bits(image)
    if bits > 8 or image.mode not in _GREY + _COLOUR:
        raise Refused("decode", "unsupported_mode", f"{bits}-bit samples, Pillow mode {image.mode}")
    if first_page and not (isinstance(image, TiffImageFile) and image.tag_v2.get(_SUBFILE_TYPE, 0) & 1):
        return
    if isinstance(image, (TiffImageFile, JpegImageFile)):
        if (_full_pages(image) if isinstance(image, TiffImageFile) else _views(image)) != 1:
            raise Refused("decode", "multipage", f"{image.format} of more than one page; split it")
    elif getattr(image, "is_animated", False):
        raise Refused("decode", "animated", f"{image.format} of more than one frame; extract the frames first")


def _sample_bits(image: ImageFile.ImageFile) -> int:
    """Return the bits of a stored sample, 8 for 8 or fewer. Pillow's mode does not tell: RGB may come from 16 bits."""
    if isinstance(image, TiffImageFile):
        return int(max(8, *image.tag_v2.get(_BITS_PER_SAMPLE, (1,))))
    arguments = [tile.args for tile in image.tile]  # of the decoder: "RGB;16B" for PNG, ("RGB", maxval) for PPM
    if isinstance(image, PpmImageFile):
        return max([8] + [int(argument[1]).bit_length() for argument in arguments if isinstance(argument, tuple)])
    return 16 if isinstance(image, PngImageFile) and "16" in str(arguments) else 8


def _check_avif(file: IO[bytes]) -> bool:
    """Return whether an AVIF is grey. Raises `Refused` for what Pillow would give out as 8-bit sRGB, and is not."""
    file.seek(0)
    head = file.read(_AV1_HEAD_BYTES)
    flags = [match[1][0] for match in re.finditer(rb"av1C\x81.(.)", head, re.DOTALL)]  # AV1-ISOBMFF 2.3.3
    if any(flag & 0x60 for flag in flags):
        raise Refused("decode", "unsupported_mode", "an AVIF of 10 or 12 bits; convert it to a 16-bit PNG or TIFF")
    primaries = [int.from_bytes(match[1], "big") for match in re.finditer(rb"colrnclx(..)", head, re.DOTALL)]
    if not re.search(rb"colr(prof|rICC)", head) and any(number not in _SRGB_PRIMARIES for number in primaries):
        raise Refused("decode", "unsupported_mode", f"an AVIF of colour primaries {primaries} and without a profile")
    return bool(flags) and all(flag & 0x10 for flag in flags)


def _full_pages(image: TiffImageFile) -> int:
    """Return how many pages are not marked as reduced (thumbnails, overviews), counted up to 2; 0 if the first is."""
    if image.tag_v2.get(_SUBFILE_TYPE, 0) & 1:
        return 0
    page = 1
    while getattr(image, "is_animated", False):
        try:
            image.seek(page)
        except EOFError:
            break
        if not image.tag_v2.get(_SUBFILE_TYPE, 0) & 1:
            return 2
        page += 1
    image.seek(0)
    return 1


def _views(image: JpegImageFile) -> int:
    """Return 2 for a JPEG with further views; the previews and gain maps that cameras append are none."""
    try:
        entries = (image._getmp() or {}).get(_MPF_ENTRIES) or []
    except SyntaxError:  # a malformed index: every reader takes such a file for the plain JPEG that it starts as
        return 1
    return 2 if any(entry["Attribute"]["MPType"].startswith("Multi-Frame") for entry in entries[1:]) else 1


def _to_grey_or_rgb(image: Image.Image) -> tuple[np.ndarray, bytes | None]:
    """Return uint8 HWC samples, C = 1 to 4 (grey, grey + alpha, RGB, RGB + alpha), and the profile of the colours."""
    icc = image.info.get("icc_profile") or None
    if image.mode in ("CMYK", "LAB"):
        if icc is None:
            return np.array(image.convert("RGB")), None
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        converted = ImageCms.profileToProfile(image, io.BytesIO(icc), srgb, outputMode="RGB")
        made = srgb.tobytes()  # bytes 24 to 35 are the time of its making, which outputs must not carry
        return np.array(converted), made[:24] + bytes(12) + made[36:]
    target = ("L" if image.mode in _GREY else "RGB") + "A" * image.has_transparency_data
    return np.atleast_3d(np.array(image if image.mode == target else image.convert(target))), icc


def refusal(error: BaseException) -> Refused:
    """Return the refusal for what Pillow raised: the type and the message say which of the reasons it is."""
    message = f"{type(error).__name__}: {error}"[:300]
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return Refused("decode", "too_large", message)
    if isinstance(error, MemoryError):
        return Refused("decode", "oom", message)
    if isinstance(error, EOFError) or _TRUNCATED.search(message):
        return Refused("decode", "truncated", message)
    return Refused("decode", "unsupported_mode" if _MODE.search(message) else "corrupt", message)


def _raise_pillow_limit(max_pixels: int) -> None:
    """Let `max_pixels` rule where Pillow, too, checks. Its limit is the process's: lowering it again would race."""
    with _pillow_limit:
        if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
            Image.MAX_IMAGE_PIXELS = max_pixels

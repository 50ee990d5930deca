"""Sheets -> image files of any size, with profile, EXIF and XMP in them; and the published file read again by rows.

libvips encodes PNG, JPEG and TIFF while it reads the sheet, so that memory does not grow with the picture. WebP and
AVIF, which no library streams, go through Pillow whole; their limits are small. The same input gives the same bytes.
"""

import errno
import os
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
from PIL import Image

from pipelines import embedding, images
from pipelines.images import Refused
from pipelines.metadata import resolution, without_orientation
from pipelines.profiles import fitting_profile
from pipelines.sheets import Sheet

FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "AVIF")
_EXTENSIONS = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "TIFF": ".tif", "AVIF": ".avif"}
# Of PNG what libpng reads; of AVIF the largest width and, in pixels, the largest level of AV1; of TIFF what vips holds.
_MAX_SIDE_PX = {"PNG": 1_000_000, "JPEG": 65_500, "WEBP": 16_383, "TIFF": 100_000_000, "AVIF": 16_384}
_MAX_PIXELS = {"AVIF": 142_606_336}
_EIGHT_BITS = ("JPEG", "WEBP", "AVIF")
_BIG_TIFF_BYTES = 3 << 30  # of samples; below it no deflate grows them to 4 GiB
_TILE_PX = 256
_PNG_LEVEL, _DEFLATE_LEVEL = 4, 6  # PNG at 6: 3 % smaller in twice the time
_DEFAULT_RESOLUTION = 72 / 25.4  # px per mm, what programs take where a file does not say
_INTERPRETATIONS = {("u1", 1): "b-w", ("u1", 3): "srgb", ("u2", 1): "grey16", ("u2", 3): "rgb16"}
_LARGEST_WHOLE = 1 << 31  # px of a published WebP or AVIF; their own limits are lower


def extension(format: str) -> str:
    """Return the file name extension of an output format, with its dot. Raises ValueError for a format not written."""
    return _EXTENSIONS[_known(format)]


def output_format(source_format: str) -> str:
    """Return the format in which an image read as `source_format` is written: itself where it can be, else PNG."""
    return source_format if source_format in FORMATS else "PNG"


def check_fits(format: str, *, height: int, width: int, channels: int, dtype: object, has_alpha: bool) -> None:
    """Raise `Refused` (encode) for a result that the format cannot hold, before anything is made of it.

    format_limit: a side or size; alpha: JPEG has none; depth_limit: 16 bits. Raises ValueError for an unknown format,
    for a size below 1, and for samples that are not uint8 or uint16 of 1 or 3 channels.
    """
    kind = np.dtype(dtype)  # type: ignore[call-overload]
    if (kind.str[1:], channels) not in _INTERPRETATIONS or min(height, width) < 1:
        raise ValueError(f"{height} x {width} x {channels} {kind}: must be uint8 or uint16 of 1 or 3 channels")
    side, pixels = _MAX_SIDE_PX[_known(format)], _MAX_PIXELS.get(format)
    if max(height, width) > side:
        message = f"{width} x {height} px; {format} holds at most {side} px a side, tiff holds it"
        raise Refused("encode", "format_limit", message)
    if pixels is not None and height * width > pixels:
        message = f"{width} x {height} px; {format} holds at most {pixels} px, tiff holds it"
        raise Refused("encode", "format_limit", message)
    if has_alpha and format == "JPEG":
        raise Refused("encode", "alpha", "JPEG has no alpha, and the image has; choose png, webp, tiff or avif")
    if kind == np.uint16 and format in _EIGHT_BITS:
        raise Refused("encode", "depth_limit", f"{format} is written with 8 bits, the image has 16; choose png or tiff")


def encode(
    path: str | Path,
    colour: Sheet,
    alpha: Sheet | None,
    *,
    format: str,
    quality: int,
    icc: bytes | None,
    exif: bytes | None,
    xmp: bytes | None,
) -> None:
    """Write the picture to the file `path`: colours of 1 or 3 channels, straight alpha beside them or None.

    `quality` (1 to 100) is for JPEG (4:4:4), WebP, where 100 is lossless, and AVIF (4:4:4); PNG and TIFF (tiled,
    deflate) are lossless. `icc` describes the colours; `exif` and `xmp` are those of `metadata`, and the resolution
    in `exif` is that of the file. WebP has no grey: it becomes RGB, with a profile of the same curve. TIFF is BigTIFF
    where the samples have more than 3 GiB. Raises `Refused` as `check_fits` does, and for metadata that JPEG cannot
    hold; ValueError for a quality out of range or an alpha of another shape; OSError where the disk does not take it.
    """
    has_alpha = alpha is not None
    check_fits(
        format,
        height=colour.height,
        width=colour.width,
        channels=colour.channels,
        dtype=colour.dtype,
        has_alpha=has_alpha,
    )
    if not 1 <= quality <= 100:
        raise ValueError(f"quality={quality}: must be 1 to 100; 95 is the default")
    wanted = (colour.height, colour.width, 1, colour.dtype)
    if alpha is not None and (alpha.height, alpha.width, alpha.channels, alpha.dtype) != wanted:
        raise ValueError(f"alpha: {alpha.height} x {alpha.width} x {alpha.channels} {alpha.dtype}; must be {wanted}")
    fitting = fitting_profile(icc, 3 if format == "WEBP" else colour.channels)
    if format in ("WEBP", "AVIF"):
        _encode_whole(Path(path), colour, alpha, format=format, quality=quality, icc=fitting, exif=exif, xmp=xmp)
        return
    # The sources must outlive the image, which does not hold them: libvips would call what is no longer there.
    image, sources = _joined(colour, alpha, resolution(exif) or _DEFAULT_RESOLUTION)
    if format == "TIFF":
        samples = colour.height * colour.width * (colour.channels + has_alpha) * colour.dtype.itemsize
        _write_tiff(Path(path), image, big=samples > _BIG_TIFF_BYTES)
        del image, sources
        embedding.add_to_tiff(Path(path), icc=fitting, exif=exif, xmp=xmp)
        return
    parts = {"PNG": embedding.png_parts, "JPEG": embedding.jpeg_parts}[format](icc=fitting, exif=exif, xmp=xmp)
    with open(path, "wb") as file:
        _write_stream(file, image, format=format, quality=quality, parts=parts)
    del image, sources


def open_published(path: str | Path) -> "Published":
    """Return the colours of a file that `encode` wrote, to be read by ascending rows. Raises `Refused`."""
    with open(path, "rb") as file:
        format = images.identify(file.read(64))
        if format in ("WEBP", "AVIF"):
            file.seek(0)
            return Published(None, images.decode_file(file, format, max_pixels=_LARGEST_WHOLE).pixels)
    pyvips = _vips()
    try:
        image = pyvips.Image.new_from_file(str(path), access="sequential", fail_on="truncated")
    except pyvips.Error as error:
        raise Refused("decode", "corrupt", f"the published file: {_message(error)}") from error
    return Published(image, None)


class Published:
    """The decoded colours of a published file: sizes in px, channels 1 or 3; a WebP always has 3."""

    def __init__(self, image: Any, whole: np.ndarray | None) -> None:
        self._image, self._whole = image, whole
        self._region: Any = None
        self._top, self._kept = 0, np.empty((0, 0, 0))
        if whole is not None:
            self.height, self.width, self.channels = whole.shape
            self.dtype = whole.dtype
            whole.flags.writeable = False
            return
        self.height, self.width = image.height, image.width
        self.channels = image.bands - bool(image.hasalpha())
        self.dtype = np.dtype({"uchar": np.uint8, "ushort": np.uint16}[image.format])
        self._region = _vips().Region.new(image)

    def rows(self, top: int, bottom: int) -> np.ndarray:
        """Return rows `top` to before `bottom`, HWC without alpha, to be read only. A call may overlap the one before.

        Raises ValueError for rows that are not there or above the last call's first; `Refused` for a damaged file.
        """
        if not 0 <= top < bottom <= self.height:
            raise ValueError(f"rows {top} to {bottom}: must not be empty, and lie inside {self.height} rows")
        if self._whole is not None:
            return self._whole[top:bottom]
        if self._image is None or top < self._top:
            raise ValueError(
                f"rows from {top}: must not be above {self._top}, from where rows were read last, or closed"
            )
        again = self._kept[top - self._top :]  # of the call before, as nothing is decoded twice
        start = top + len(again)
        found = [again[: bottom - top]] if len(again) else []
        if start < bottom:
            found.append(self._decode(start, bottom))
        made = found[0] if len(found) == 1 else np.concatenate(found)
        made.flags.writeable = False
        self._top, self._kept = top, made if start < bottom else again
        return made

    def close(self) -> None:
        """Give file and memory back; no rows can be read afterwards."""
        self._image = self._region = self._whole = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _decode(self, top: int, bottom: int) -> np.ndarray:
        pyvips = _vips()
        try:
            data = self._region.fetch(0, top, self.width, bottom - top)
        except pyvips.Error as error:
            raise Refused("decode", "corrupt", f"the published file: {_message(error)}") from error
        rows = np.frombuffer(data, self.dtype).reshape(bottom - top, self.width, -1)
        return np.ascontiguousarray(rows[:, :, : self.channels])


@lru_cache(maxsize=1)
def _vips() -> Any:
    """Return pyvips, told to use one thread beside the caller's (the bytes do not depend on it) and to keep nothing."""
    os.environ.setdefault("VIPS_CONCURRENCY", "1")
    import pyvips

    pyvips.cache_set_max(0)
    return pyvips


def _known(format: str) -> str:
    if format not in FORMATS:
        raise ValueError(f"format={format!r}: must be one of {', '.join(FORMATS)}")
    return format


def _joined(colour: Sheet, alpha: Sheet | None, px_per_mm: float) -> tuple[Any, list[Any]]:
    parts = [_vips_image(sheet) for sheet in (colour, alpha) if sheet is not None]
    image = parts[0][0] if alpha is None else parts[0][0].bandjoin(parts[1][0])
    kind = _INTERPRETATIONS[colour.dtype.str[1:], colour.channels]
    return image.copy(interpretation=kind, xres=px_per_mm, yres=px_per_mm), parts


def _vips_image(sheet: Sheet) -> tuple[Any, Any]:
    """Return the sheet as an image whose rows are read in order, and its source; both must outlive the image."""
    pyvips = _vips()
    if sheet.memory is not None:
        kind = {"u1": "uchar", "u2": "ushort"}[sheet.dtype.str[1:]]
        size = (sheet.width, sheet.height, sheet.channels)
        return pyvips.Image.new_from_memory(sheet.memory.data, *size, kind), sheet.memory
    source, place = pyvips.SourceCustom(), [0]

    def read(count: int) -> bytes:
        data = sheet.read_at(place[0], count)
        place[0] += len(data)
        return data

    def seek(offset: int, whence: int) -> int:
        place[0] = offset + (0, place[0], sheet.stream_bytes)[whence]
        return place[0]

    source.on_read(read)
    source.on_seek(seek)
    return pyvips.Image.tiffload_source(source, access="sequential", fail_on="truncated"), source


def _write_stream(file: IO[bytes], image: Any, *, format: str, quality: int, parts: bytes) -> None:
    pyvips = _vips()
    writer = embedding.Spliced(file, format, parts)
    target = pyvips.TargetCustom()
    failed: list[OSError] = []

    def write(data: bytes) -> int:
        try:
            writer.write(data)
        except OSError as error:  # which libvips would not pass on
            failed.append(error)
            return -1
        return len(data)

    target.on_write(write)
    try:
        if format == "PNG":
            image.pngsave_target(target, compression=_PNG_LEVEL, filter="paeth", keep="none")
        else:
            image.jpegsave_target(target, Q=quality, subsample_mode="off", keep="none")
    except pyvips.Error as error:
        raise failed[0] if failed else _failure(error) from error
    if failed:
        raise failed[0]


def _write_tiff(path: Path, image: Any, *, big: bool) -> None:
    pyvips = _vips()
    options: dict[str, Any] = {"tile": True, "tile_width": _TILE_PX, "tile_height": _TILE_PX, "bigtiff": big}
    options |= {"compression": "deflate", "level": _DEFLATE_LEVEL, "predictor": "horizontal", "keep": "none"}
    try:
        image.tiffsave(str(path), **options)
    except pyvips.Error as error:
        raise _failure(error) from error


def _encode_whole(
    path: Path,
    colour: Sheet,
    alpha: Sheet | None,
    *,
    format: str,
    quality: int,
    icc: bytes | None,
    exif: bytes | None,
    xmp: bytes | None,
) -> None:
    samples = colour.rows(0, colour.height)
    if alpha is not None:
        samples = np.concatenate([samples, alpha.rows(0, alpha.height)], axis=2)
    image = Image.fromarray(samples[:, :, 0] if samples.shape[2] == 1 else samples)
    options: dict[str, Any] = {"quality": quality}
    if format == "WEBP":
        options |= {"lossless": quality == 100, "exact": True, "method": 4}
    else:  # of more threads the bytes might be others
        options |= {"subsampling": "4:0:0" if colour.channels == 1 else "4:4:4", "codec": "aom", "max_threads": 1}
        exif = exif and without_orientation(exif)  # else Pillow writes all of it anew
    options |= {"icc_profile": icc or b"", "exif": exif or b"", "xmp": xmp or b""}
    image.save(path, format, **options)


def _failure(error: Exception) -> OSError:
    """Return the error of the disk that libvips met; it gives it as text."""
    code = errno.ENOSPC if "No space left" in str(error) else errno.EIO
    return OSError(code, _message(error))


def _message(error: Exception) -> str:
    return " ".join(str(error).split())[:300]

"""Rasters by window: 16-bit, float, many bands, georeferenced, JPEG 2000, and TIFF of any size. Needs rasterio (GDAL).

One driver of four, chosen by the first bytes, opens the one file: no VRT, no network, no side file. What a GeoTIFF
reader passes over, and a photograph needs, is done here: orientation, white-is-zero, ink, colour profile. Memory is
that of a window and a block cache of 128 MB, for any size of the raster; the two kinds of file whose rows come only in
order (PNG, TIFF of one compressed strip) are read whole where `max_pixels` allows, and refused otherwise.
"""

import io
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, Protocol, Self

import numpy as np

from pipelines.headers import CMYK, GREY, RGB, Header, read_header
from pipelines.images import Refused, refusal
from pipelines.profiles import WorkingSpace, cmyk_to_srgb, fitting_profile, profile_name, srgb_profile

DRIVERS = {"TIFF": "GTiff", "JPEG 2000": "JP2OpenJPEG", "PNG": "PNG", "PPM": "PNM"}
MAX_CHANNELS = 256
_MAX_BLOCK_BYTES = 64 << 20
_MAX_WHOLE_BYTES_PER_PIXEL = 8  # RGB and alpha of 16 bits
_AS_STORED = ("uint8", "uint16")
_AS_FLOAT = ("int8", "int16", "float16", "float32", "float64")
_OPTIONS = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_PAM_ENABLED": "NO",
    "GDAL_GEOREF_SOURCES": "INTERNAL",
    "GDAL_CACHEMAX": 128 << 20,
    "GDAL_NUM_THREADS": 1,
    "GDAL_ERROR_ON_LIBJPEG_WARNING": "YES",
    "PROJ_NETWORK": "OFF",
}


class Source(Protocol):
    """Where the bytes are: in memory, or in a file."""

    @property
    def data(self) -> bytes | None: ...
    @property
    def path(self) -> str | None: ...


def open_file(original: Source) -> IO[bytes]:
    """Return the content as an open file, to be closed by the caller; a spooled one is not read into memory."""
    return io.BytesIO(original.data) if original.data is not None else open(str(original.path), "rb")


def open_raster(
    original: Source,
    format: str,
    *,
    max_pixels: int,
    max_raster_pixels: int,
    space: WorkingSpace,
    bands: tuple[int, ...],
    first_page: bool = False,
) -> "RasterScene":
    """Return the raster in `original`, whose first bytes say `format` (a key of DRIVERS). Raises `Refused`."""
    with open_file(original) as file:
        header = read_header(file, format, max_pixels=max_pixels, first_page=first_page)
    if header.height * header.width > max_raster_pixels:
        message = f"{header.width} x {header.height} px is more than the limit of {max_raster_pixels} px for rasters"
        raise Refused("decode", "too_large", message)
    if not bands and header.samples > MAX_CHANNELS:
        raise Refused("decode", "too_many_channels", f"{header.samples} bands; at most {MAX_CHANNELS}, choose bands")
    return RasterScene(original, header, format=format, max_pixels=max_pixels, space=space, bands=bands)


class RasterScene:
    """A raster of which windows are read; the attributes and methods are those of `scenes.Scene`.

    dtype is uint8 or uint16 as stored (12 bits stay 0 to 4095), float32 for signed and float samples. A pixel is
    valid where alpha is full, no internal mask hides it, every sample is finite, and it is not nodata: for uint8 and
    uint16, whose nodata is also a brightness, where all chosen bands have that value; for others where one has it.
    """

    kept: bool = False
    other_words: tuple[str, ...] = ()

    def __init__(
        self,
        original: Source,
        header: Header,
        *,
        format: str,
        max_pixels: int,
        space: WorkingSpace,
        bands: tuple[int, ...],
    ) -> None:
        self.format, self._header, self._space = format, header, space
        self._path = original.path or ""
        self._memory: Any = None
        self._dataset: Any = None
        self._whole: tuple[np.ndarray, np.ndarray | None, np.ndarray | None] | None = None
        try:
            with _gdal(self._path):
                self._open(original)
                self._check_samples()
                self._choose_bands(bands)
                self._check_colours()
                self._check_blocks(max_pixels)
            self._describe()
        except BaseException:
            self.close()
            raise

    def window(self, y: int, x: int, h: int, w: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the HWC pixels of a window, and bool HW which of them are valid, None for all. Raises `Refused`.

        Raises ValueError for a window that is empty or not inside.
        """
        check_window(y, x, h, w, height=self.height, width=self.width)
        samples, valid, _ = self._area(y, x, h, w)
        pixels = _turn(self._colours(np.moveaxis(samples, 0, 2)), self._orientation)
        valid = None if valid is None or valid.all() else np.ascontiguousarray(_turn(valid, self._orientation))
        return np.ascontiguousarray(pixels), valid

    def alpha(self, y: int, x: int, h: int, w: int) -> np.ndarray | None:
        """Return how opaque the pixels of a window are, HW of the pixels' dtype, full is opaque; None without alpha.

        Raises as `window` does.
        """
        check_window(y, x, h, w, height=self.height, width=self.width)
        if not self.has_alpha:
            return None
        _, valid, alpha = self._area(y, x, h, w)
        if alpha is None:  # a transparent colour, which 16-bit PNG may have
            full = np.iinfo(self.dtype).max
            alpha = np.full((h, w), full, self.dtype) if valid is None else np.where(valid, full, 0).astype(self.dtype)
            return alpha if valid is None else np.ascontiguousarray(_turn(alpha, self._orientation))
        return np.ascontiguousarray(_turn(alpha, self._orientation))

    def close(self) -> None:
        """Give the file and the memory back; further calls do nothing."""
        for resource in (self._dataset, self._memory):
            if resource is not None:
                resource.close()
        self._memory = self._whole = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _open(self, original: Source) -> None:
        import rasterio

        name = os.path.abspath(str(original.path))
        if original.data is not None:
            self._memory = rasterio.MemoryFile(original.data)
            name = self._memory.name
        if self._header.colours == CMYK:  # else GDAL makes RGB of ink by a formula, whatever the profile says
            name = f"GTIFF_RAW:{name}"
        self._dataset = rasterio.open(name, driver=DRIVERS[self.format], sharing=False)
        self.transform: tuple[float, float, float, float, float, float] | None = None
        # The other two drivers leave the place of the numbers as it is, and rasterio gives out what lay there.
        if self.format in ("TIFF", "JPEG 2000") and not self._dataset.transform.is_identity:
            a, b, c, d, e, f = map(float, self._dataset.transform[:6])
            self.transform = (a, b, c, d, e, f)
        self._plain = self.transform is None and not self._header.georeferenced
        self._orientation = self._header.orientation if self._plain else 1  # readers of georeferences pass it over
        self.height, self.width = self._header.height, self._header.width
        if self._dataset.shape != (self.height, self.width):
            raise Refused("decode", "corrupt", f"GDAL sees {self._dataset.shape} px, not {(self.height, self.width)}")
        if self._orientation > 4:
            self.height, self.width = self.width, self.height

    def _check_samples(self) -> None:
        """Set dtype; raise `Refused` for samples that GDAL gives out otherwise than stored, or that we cannot hold."""
        header, kinds = self._header, set(self._dataset.dtypes)
        roles = [interpretation.name for interpretation in self._dataset.colorinterp]
        if len(roles) != header.samples or (header.colours == CMYK and roles[0] != "cyan"):
            message = f"{header.samples} samples in a colour space that GDAL turns into {', '.join(roles[:4])}"
            raise Refused("decode", "unsupported_mode", message)
        if header.bits < 8 or (header.bits < 16 and header.inverted and header.bits != 8):
            raise Refused("decode", "unsupported_mode", f"samples of {header.bits} bits in a raster")
        if len(kinds) > 1 or not kinds <= set(_AS_STORED + _AS_FLOAT):
            message = f"samples of type {', '.join(sorted(kinds))}, which uint8, uint16 or float32 do not hold"
            raise Refused("decode", "unsupported_mode", message)
        kind = kinds.pop()
        self.dtype = np.dtype(kind if kind in _AS_STORED else np.float32)
        if self.dtype == np.float32 and (header.inverted or "alpha" in roles):
            raise Refused("decode", "unsupported_mode", f"{kind} samples with an alpha, or with white as zero")

    def _choose_bands(self, bands: tuple[int, ...]) -> None:
        """Set the bands that are read and, of the channels made of them, those that are given out."""
        dataset, header = self._dataset, self._header
        alpha = [
            index for index, role in zip(dataset.indexes, dataset.colorinterp, strict=True) if role.name == "alpha"
        ]
        available = [index for index in dataset.indexes if index not in alpha]
        wrong = [band for band in bands if band not in available]
        if wrong or not available:
            raise Refused("decode", "missing_band", f"band {wrong} asked for, of {available[:20]}; alpha {alpha}")
        photograph = self._plain and self.dtype == np.uint8 and header.colours in (GREY, RGB)
        if photograph and header.extras is None:
            raise Refused(
                "decode", "unsupported_mode", f"{header.samples} samples, of which some say not what they are"
            )
        many = header.colours == GREY and (header.extras or 0) > 1  # bands that a writer had no name for
        if photograph and not bands and header.extras and not many:  # as Pillow does: unnamed beside colours are none
            available = available[: 1 if header.colours == GREY else 3]
        self._icc = header.icc if self._space.name != "native" or header.colours == CMYK else None
        convert = bool(self._icc or self._space.icc) or header.colours == CMYK
        self._read_bands = available if convert or not bands else list(bands)
        self._given = [available.index(band) for band in bands] if convert and bands else None
        self._alpha = alpha[0] if alpha else None
        flags = [flag.name for index in self._read_bands for flag in dataset.mask_flag_enums[index - 1]]
        self._has_nodata, self._has_mask = "nodata" in flags, "per_dataset" in flags and not alpha

    def _check_colours(self) -> None:
        """Set channels and profile; raise `Refused` for a profile that cannot be applied, before any pixel is read."""
        header, channels = self._header, len(self._read_bands)
        self.profile = profile_name(header.icc)
        cmyk = header.colours == CMYK
        if cmyk and self.dtype != np.uint8:
            raise Refused("decode", "unsupported_mode", f"CMYK of {self.dtype} samples; only 8 bits are read")
        fits = self.dtype.kind == "u" and channels in (1, 3) and header.bits == 8 * self.dtype.itemsize
        if (self._icc or self._space.icc) and not (fits or cmyk):
            message = f"a colour profile cannot be applied to {channels} channels of {header.bits}-bit {self.dtype}"
            raise Refused("decode", "unsupported_mode", f"{message}; working_space native reads them as stored")
        self.channels = self._colours(np.zeros((1, 1, channels), self.dtype)).shape[2]

    def _describe(self) -> None:
        """Set what the output will carry: mode, profile of the pixels that are given out, EXIF, XMP, alpha."""
        header = self._header
        self.has_alpha = self._alpha is not None or (self.format == "PNG" and (self._has_nodata or self._has_mask))
        colours = {GREY: "L", RGB: "RGB", CMYK: "CMYK"}.get(header.colours, str(len(self._read_bands)))
        kind = "" if self.dtype.kind == "u" else self._dataset.dtypes[0]
        self.mode = f"{colours}{'A' * (self._alpha is not None)};{kind or header.bits}"
        self.exif, self.xmp = header.exif, header.xmp
        self.exif_transposed = self._orientation != 1
        stored = header.icc
        if header.colours == CMYK:
            stored = header.icc and srgb_profile()
        target = self._space.icc or (srgb_profile() if stored and self._space.name != "native" else stored)
        ordered = self._read_bands == sorted(self._read_bands) and self._given in (None, sorted(self._given or []))
        whole = self.dtype.kind == "u" and ordered
        self.icc: bytes | None = fitting_profile(target, self.channels) if whole else None

    def _check_blocks(self, max_pixels: int) -> None:
        """Raise `Refused` where one window would need too much of the file at once; read whole what has to be."""
        height, width = self._dataset.block_shapes[0]
        together = 1 if self._dataset.tags(ns="IMAGE_STRUCTURE").get("INTERLEAVE") == "BAND" else self._header.samples
        block = height * width * np.dtype(self._dataset.dtypes[0]).itemsize * together
        if max(block, self._header.sequential_bytes) <= _MAX_BLOCK_BYTES and self.format != "PNG":
            return
        pixels, samples = self.height * self.width, len(self._read_bands) + (self._alpha is not None)
        if pixels > max_pixels or samples * self.dtype.itemsize > _MAX_WHOLE_BYTES_PER_PIXEL:
            message = f"{self.width} x {self.height} px, whose rows come only in order or in blocks of {block >> 20} MB"
            raise Refused("decode", "too_large", f"{message}; store it tiled")
        self._whole = self._read((0, self._header.height), (0, self._header.width))

    def _area(self, y: int, x: int, h: int, w: int) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """Return what `_read` gives, still as stored, for a window of the upright picture."""
        rows, columns = self._stored(y, x, h, w)
        if self._whole is None:
            with _gdal(self._path):
                return self._read(rows, columns)
        area = np.s_[..., rows[0] : rows[1], columns[0] : columns[1]]
        samples, valid, alpha = self._whole
        return samples[area], None if valid is None else valid[area], None if alpha is None else alpha[area]

    def _read(
        self, rows: tuple[int, int], columns: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """Return the samples CHW of the bands that are read, bool HW which are valid, None for all, and alpha HW."""
        area = (rows, columns)
        samples = self._dataset.read(self._read_bands, window=area)
        masks: list[np.ndarray] = []
        alpha = None
        if self._alpha is not None:
            alpha = self._dataset.read(self._alpha, window=area)
            masks.append(alpha == 2**self._header.bits - 1)
            if self._header.premultiplied:
                samples = _straight(samples, alpha, full=2**self._header.bits - 1)
        if self._has_nodata:
            found = self._dataset.read_masks(self._read_bands, window=area) != 0
            masks.append(found.any(axis=0) if self.dtype.kind == "u" else found.all(axis=0))
        elif self._has_mask:
            masks.append(self._dataset.read_masks(self._read_bands[0], window=area) == 255)
        if self.dtype.kind == "f":
            with np.errstate(over="ignore"):
                samples = samples.astype(np.float32, copy=False)
            masks.append(np.isfinite(samples).all(axis=0))
        return samples, np.logical_and.reduce(masks) if masks else None, alpha

    def _colours(self, pixels: np.ndarray) -> np.ndarray:
        """Return stored HWC samples as the channels that are given out, in the working space."""
        if self._header.inverted:
            pixels = np.iinfo(self.dtype).max - pixels
        icc = self._icc
        if self._header.colours == CMYK:
            pixels, icc = cmyk_to_srgb(np.ascontiguousarray(pixels), icc), icc and srgb_profile()
        if icc or self._space.icc:
            pixels = self._space.convert(pixels, icc)
        return pixels if self._given is None else pixels[:, :, self._given]

    def _stored(self, y: int, x: int, h: int, w: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return the rows and columns in the file of a window of the upright picture."""
        if self._orientation in (3, 4, 7, 8):
            y = self.height - y - h
        if self._orientation in (2, 3, 6, 7):
            x = self.width - x - w
        rows, columns = (y, y + h), (x, x + w)
        return (columns, rows) if self._orientation > 4 else (rows, columns)


def check_window(y: int, x: int, h: int, w: int, *, height: int, width: int) -> None:
    """Raise ValueError for a window that is empty or not inside the picture."""
    if not (0 <= y < y + h <= height and 0 <= x < x + w <= width):
        raise ValueError(f"window y={y} x={x} h={h} w={w}: must not be empty, and lie inside {height} x {width} px")


def _straight(samples: np.ndarray, alpha: np.ndarray, *, full: int) -> np.ndarray:
    """Return CHW samples that were multiplied by alpha as they were before; they stay where alpha is 0.

    8 bits are rounded down, as Pillow does, so that a file is the same by window and whole.
    """
    wide = samples.astype(np.uint32) * full + (alpha // 2 if full > 255 else 0)
    return np.where(alpha > 0, np.minimum(wide // np.maximum(alpha, 1), full), samples).astype(samples.dtype)


def _turn(array: np.ndarray, orientation: int) -> np.ndarray:
    """Return stored HW or HWC samples upright: EXIF's orientation, the columns first swapped with the rows."""
    if orientation > 4:
        array = np.swapaxes(array, 0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    return array[:, ::-1] if orientation in (2, 3, 6, 7) else array


@contextmanager
def _gdal(path: str) -> Iterator[None]:
    """Run GDAL calls under our options; its errors become `Refused` with a message that names no path."""
    try:
        import rasterio
        from rasterio._err import CPLE_BaseError
        from rasterio.errors import RasterioError
    except ImportError as error:
        message = "16-bit, float, georeferenced and JPEG 2000 images need it; install it with pip install diffsr[geo]"
        raise Refused("decode", "needs_rasterio", message) from error
    try:
        with rasterio.Env(**_OPTIONS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (RasterioError, CPLE_BaseError, OSError, MemoryError) as error:
        cause: BaseException = error
        while isinstance(cause.__cause__, Exception):
            cause = cause.__cause__
        found = refusal(cause)
        message = re.sub(r"(/vsimem/)?[0-9a-f-]{32,}\S*", "file", found.message)
        for name in (path, os.path.basename(path)):
            message = message.replace(name, "file") if name else message
        raise Refused("decode", found.reason, message) from error

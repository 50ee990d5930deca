"""A scene is an image of any kind of which windows are read: a picture decoded whole, or a raster on disk.

What is 8-bit grey or RGB and within `max_pixels` is a picture (Pillow). What Pillow would reduce or cannot read is a
raster (GDAL, in the extra `geo`): 16-bit, float, more bands, a georeference, JPEG 2000, a TIFF of more pixels.
"""

from dataclasses import dataclass, field
from typing import Protocol, Self

import numpy as np

from pipelines import images, rasters
from pipelines.headers import read_header
from pipelines.images import Refused
from pipelines.profiles import WorkingSpace, fitting_profile, profile_name, srgb_profile

_HEAD_BYTES = 64
_MAX_PILLOW_SAMPLES = 4  # beside alpha it knows no more than that many bands
# Refusals of a picture after which the raster is tried; more pixels than max_pixels do no harm to TIFF only.
_GO_ON = {
    "TIFF": ("unsupported_mode", "georeferenced", "too_large", "missing_band"),
    "PNG": ("unsupported_mode",),
    "PPM": ("unsupported_mode",),
}
_KEPT_FORMATS = ("PNG", "JPEG", "WEBP")
_KEPT_PIXELS = 100_000_000  # of the decoder that reads a blob again


Transform = tuple[float, float, float, float, float, float]


class Original(rasters.Source, Protocol):
    """The content of one object, as `corpus.Original` has it."""

    @property
    def size(self) -> int: ...
    def head(self, count: int) -> bytes: ...


class Scene(Protocol):
    """One image, upright, in the working space.

    `dtype` is uint8, uint16 or float32; `format` what was read; `profile` the name of the colour profile found, ""
    for none; `kept` says that the file itself decodes, by `blobs.decode_blob`, to exactly window(0, 0, height,
    width); `transform` is the affine (a, b, c, d, e, f) of a georeferenced raster, from column and row to its map.
    `mode` names the samples as stored (Pillow's name, or one like RGBA;16); `icc` is the profile to be embedded with
    the pixels that window() gives: None with a `profile` found means that it is for other channels than these.
    `exif` begins with its TIFF header; `exif_transposed` says that an orientation was applied.
    """

    height: int
    width: int
    channels: int
    dtype: np.dtype
    format: str
    profile: str
    kept: bool
    transform: Transform | None
    mode: str
    icc: bytes | None
    exif: bytes | None
    xmp: bytes | None
    has_alpha: bool
    other_words: tuple[str, ...]
    exif_transposed: bool

    def window(self, y: int, x: int, h: int, w: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return contiguous HWC pixels and bool HW which are valid (None: all). Raises `Refused`, and ValueError for a
        window that is empty or not inside. What is not valid has pixels of no meaning."""

    def alpha(self, y: int, x: int, h: int, w: int) -> np.ndarray | None:
        """Return straight alpha HW of the dtype of the pixels, contiguous; None for an image without. Raises as
        `window` does."""

    def close(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *error: object) -> None: ...


@dataclass(frozen=True, kw_only=True)
class SceneSettings:
    """How scenes are opened.

    max_pixels: of an image that is decoded whole. max_raster_pixels: of one that is read by window.
    space: the working space. bands: of which the channels are made, 1 is the first, in this order; () is all but alpha.
    first_page: the first page or frame of a multipage or animated file is read, instead of a refusal.
    """

    max_pixels: int = 100_000_000
    max_raster_pixels: int = 10_000_000_000
    space: WorkingSpace = field(default_factory=WorkingSpace)
    bands: tuple[int, ...] = ()
    first_page: bool = False

    def __post_init__(self) -> None:
        for name in ("max_pixels", "max_raster_pixels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if any(band < 1 for band in self.bands) or len(set(self.bands)) != len(self.bands):
            raise ValueError(f"bands={self.bands}: must be different numbers from 1 on; () is all but alpha")
        if len(self.bands) > rasters.MAX_CHANNELS:
            raise ValueError(f"bands: {len(self.bands)} of them; at most {rasters.MAX_CHANNELS}")


def open_scene(original: Original, *, settings: SceneSettings) -> Scene:
    """Return the image in `original`; to be closed, or used with `with`. Raises `Refused`, and nothing else.

    Sizes are judged by the header, before anything is decoded.
    """
    head = original.head(_HEAD_BYTES)
    format = images.identify(head)
    if format == "JPEG 2000" or (format == "TIFF" and _is_raster(original, settings)):
        return _raster(original, format, settings)
    if not format or format not in rasters.DRIVERS:
        images.sniff(head, size=original.size)  # raises for what is not read here
    try:
        return PictureScene(original, format, settings=settings)
    except Refused as refused:
        if refused.reason not in _GO_ON.get(format, ()):
            raise
        first = refused
    try:
        return _raster(original, format, settings)
    except Refused as second:  # whose reason is the better one, unless it would do as a smaller picture
        if first.reason != "too_large" or second.reason != "unsupported_mode":
            raise
        raise Refused("decode", "too_large", f"{first.message}; not by window, either: {second.message}") from second


class PictureScene:
    """An 8-bit picture, decoded whole; a window is converted to the working space when it is read."""

    transform: Transform | None = None
    dtype = np.dtype(np.uint8)

    def __init__(self, original: Original, format: str, *, settings: SceneSettings) -> None:
        with rasters.open_file(original) as file:
            picture = images.decode_file(file, format, max_pixels=settings.max_pixels, first_page=settings.first_page)
        self.height, self.width, stored = picture.pixels.shape
        missing = [band for band in settings.bands if band > stored]
        if missing:
            raise Refused("decode", "missing_band", f"band {missing} asked for, of {stored}")
        self.format, self._picture, self._space = format, picture, settings.space
        self.profile = profile_name(picture.stored_icc)
        self._bands = [band - 1 for band in settings.bands or range(1, stored + 1)]
        self.channels = len(self._bands)
        self.mode, self.exif, self.xmp = picture.mode, picture.exif, picture.xmp
        self.other_words = picture.other_words
        self.has_alpha, self.exif_transposed = picture.alpha is not None, picture.exif_transposed
        probe = np.zeros((1, 1, stored), np.uint8)
        unchanged = self._space.convert(probe, picture.icc) is probe  # raises for a damaged profile
        target = picture.icc
        if self._space.name != "native":
            target = self._space.icc or (srgb_profile() if picture.icc else None)
        ordered = self._bands == sorted(self._bands)
        self.icc: bytes | None = fitting_profile(target, self.channels) if ordered else None
        self.kept = (
            unchanged
            and not settings.first_page
            and format in _KEPT_FORMATS
            and picture.mode in ("L", "RGB")
            and not picture.exif_transposed
            and picture.alpha is None
            and self._bands == list(range(stored))
            and self.height * self.width <= _KEPT_PIXELS
        )

    def window(self, y: int, x: int, h: int, w: int) -> tuple[np.ndarray, np.ndarray | None]:
        """As `Scene.window`; valid is where alpha is 255."""
        rasters.check_window(y, x, h, w, height=self.height, width=self.width)
        area = np.s_[y : y + h, x : x + w]
        pixels = self._space.convert(self._picture.pixels[area], self._picture.icc)
        if self._bands != list(range(pixels.shape[2])):
            pixels = pixels[:, :, self._bands]
        valid = None if self._picture.alpha is None else self._picture.alpha[area] == 255
        return np.ascontiguousarray(pixels), None if valid is None or valid.all() else valid

    def alpha(self, y: int, x: int, h: int, w: int) -> np.ndarray | None:
        """As `Scene.alpha`."""
        rasters.check_window(y, x, h, w, height=self.height, width=self.width)
        alpha = self._picture.alpha
        return None if alpha is None else np.ascontiguousarray(alpha[y : y + h, x : x + w])

    def close(self) -> None:
        """Give the memory back; no window can be read afterwards."""
        del self._picture

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _is_raster(original: Original, settings: SceneSettings) -> bool:
    """Return whether a TIFF holds what Pillow refuses or, as signed bytes, reads wrongly; bad headers are Pillow's."""
    with rasters.open_file(original) as file:
        try:
            header = read_header(file, "TIFF", max_pixels=settings.max_pixels, first_page=settings.first_page)
        except Refused:
            return False
    return header.bits > 8 or header.samples > _MAX_PILLOW_SAMPLES or not header.integers or header.georeferenced


def _raster(original: Original, format: str, settings: SceneSettings) -> Scene:
    return rasters.open_raster(
        original,
        format,
        max_pixels=settings.max_pixels,
        max_raster_pixels=settings.max_raster_pixels,
        space=settings.space,
        bands=settings.bands,
        first_page=settings.first_page,
    )

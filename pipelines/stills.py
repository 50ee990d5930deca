"""Images, and frames of a sequence in a folder: the kind of asset that is one picture, of any size."""

import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np

from diffsr_core.fidelity import CONTEXT, Fidelity
from diffsr_core.pixels import Pixels, bicubic
from diffsr_core.tiling import Window
from diffsr_core.upscaler import Drawn, Upscaler
from pipelines import encoders, metadata
from pipelines.corpus import Original
from pipelines.deadline import time_limit
from pipelines.embedding import metadata_limit
from pipelines.images import Refused
from pipelines.kinds import PassedOver, Result
from pipelines.probe import megapixels
from pipelines.profiles import WorkingSpace
from pipelines.provenance import version
from pipelines.quality import Thresholds, judge
from pipelines.rasters import open_file
from pipelines.scenes import Scene, SceneSettings, open_scene
from pipelines.sheets import Sheet
from pipelines.sidecars import uncertainty_key

DECODED_BYTES = 10  # per px: 4 of Pillow's, 3 of numpy's, 3 of a copy
SHEET_BYTES = 128 * 2**20  # of the sheets of an image that are not on disk
BAND_BYTES = 16 * 2**20  # of the published rows that are measured at once
UNCERTAINTY_STEPS = 256  # of a stored map (16-bit grey), in one level of 255


# The settings, and thresholds among them, that decide a result's bytes: with others, all is made again.
DECISIVE = ("format", "quality", "noise", "reject_lr_psnr", "reject_colour_drift")


@dataclass(frozen=True, kw_only=True)
class StillSettings:
    """What decides a still's bytes beside the model and how it is sampled, and what becomes of it.

    noise: keyed by the `content` of each image, or by its `folder`: then the frames of a sequence share one field, and
    what does not move in them does not flicker. max_seconds: for decoding one.
    """

    format: str = "keep"
    quality: int = 95
    noise: Literal["content", "folder"] = "content"
    first_page: bool = False
    max_megapixels: float = 100.0
    max_raster_megapixels: float = 4000.0
    skip_above_megapixels: float | None = None
    skip_upscaled: bool = True
    thresholds: Thresholds = Thresholds()
    max_seconds: float = 120.0

    def target(self, source_format: str) -> str:
        """Return the format an image is written in: the one asked for, or with `keep` its own where we write it."""
        return encoders.output_format(source_format) if self.format == "keep" else self.format.upper()

    def output_key(self, key: str, source_format: str) -> str:
        """Return the key of the result: the source's own when the format is kept, else with the new extension behind.

        `a.jpg` and `a.png` can then never collide.
        """
        chosen = self.target(source_format)
        return key if chosen == source_format else key + encoders.extension(chosen)


class Stills:
    """The kind. model, recipe: digest and fingerprint, which go into the files."""

    def __init__(self, settings: StillSettings, *, model: str, recipe: str) -> None:
        self.settings, self.model, self.recipe = settings, model, recipe

    def held_bytes(self, original: Original) -> int:
        """Return what a picture that is decoded whole takes, held by Pillow and numpy side by side, and its sheets."""
        with open_file(original) as file:
            found = megapixels(file) or 0.0
        decoded = found if found <= self.settings.max_megapixels else 0.0  # larger ones are read by window, or refused
        return int(decoded * 1e6 * DECODED_BYTES) + SHEET_BYTES

    def open(self, original: Original, row: dict[str, Any]) -> "Still":
        """Return the image in the content of a listed row. Raises Refused or PassedOver."""
        settings = self.settings
        if settings.skip_above_megapixels is not None:
            with open_file(original) as file:
                found = megapixels(file)
            if found is not None and found > settings.skip_above_megapixels:
                message = (
                    f"{found:.2f} megapixels are more than skip_above_megapixels ({settings.skip_above_megapixels:g})"
                )
                raise PassedOver("probe", "large_enough", message)
        started = time.perf_counter()
        opened = SceneSettings(
            max_pixels=int(settings.max_megapixels * 1e6),
            max_raster_pixels=int(settings.max_raster_megapixels * 1e6),
            space=WorkingSpace("native"),
            first_page=settings.first_page,
        )
        with ExitStack() as stack:
            with time_limit(settings.max_seconds):
                scene = stack.enter_context(open_scene(original, settings=opened))
            if settings.skip_upscaled and metadata.is_upscaled(scene.xmp):
                raise PassedOver("probe", "already_upscaled", "its metadata say that DiffSR made it")
            if scene.transform is not None:
                raise Refused(
                    "decode", "georeferenced", "a GeoTIFF, whose georeference would be lost; strip it if it may be"
                )
            if scene.dtype == np.float32:
                raise Refused("decode", "unsupported_mode", "float samples; a picture has 8 or 16 bits")
            stack.pop_all()
        return Still(self, scene, original, row, decode_s=time.perf_counter() - started)


class Still:
    """An opened image; see kinds.Asset."""

    def __init__(self, kind: Stills, scene: Scene, original: Original, row: dict[str, Any], *, decode_s: float) -> None:
        self.kind, self.scene, self.original, self.row = kind, scene, original, row
        self.key: str = row["key"]
        self.format = kind.settings.target(scene.format)
        self.out_key = kind.settings.output_key(self.key, scene.format)
        folder = self.key.rpartition("/")[0]
        self.noise = original.digest if kind.settings.noise == "content" else f"folder {folder}"
        self.seconds = {"decode_s": decode_s, "encode_s": 0.0}
        self._stack = ExitStack()
        self._spool_bytes = SHEET_BYTES
        self._stack.enter_context(scene)
        self._sheets: list[Sheet] = []
        self._alpha: Sheet | None = None
        self._uncertainty: Sheet | None = None
        self._errors = dict[Window, list[float]]()
        self._deviation = dict[Window, float]()
        self._lock = threading.Lock()  # windows come from several threads; a scene and a sheet know of one

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def windows(self, upscaler: Upscaler) -> list[Window]:
        """See kinds.Asset."""
        scene, scale = self.scene, upscaler.model.config.scale
        check_channels(upscaler, scene.channels)
        height, width = scene.height * scale, scene.width * scale
        encoders.check_fits(self.format, height=height, width=width, channels=scene.channels, dtype=scene.dtype,
                            has_alpha=scene.has_alpha)  # fmt: skip
        self._scale = scale
        recipe = upscaler.recipe
        num_sheets = recipe.num_samples if recipe.choice == "best" else 1
        self._spool_bytes = SHEET_BYTES // (num_sheets + 2)  # alpha and map
        if scene.has_alpha:
            self._alpha = self._sheet(1, scene.dtype)
        return upscaler.windows(scene.height, scene.width)

    def read(self, window: Window) -> Pixels:
        """See kinds.Asset."""
        with self._lock, self._timed("decode_s"):
            return self.scene.window(window.top, window.left, *window.shape)[0]

    def assemble(self, window: Window, drawn: Drawn) -> None:
        """See kinds.Asset."""
        scale, scene = self._scale, self.scene
        y, x = window.core_top * scale, window.core_left * scale
        rows, columns = (slice(s.start * scale, s.stop * scale) for s in window.inner)
        with self._lock:
            while len(self._sheets) < len(drawn.samples):
                self._sheets.append(self._sheet(drawn.samples[0].shape[2], drawn.samples[0].dtype))
            for sheet, pixels in zip(self._sheets, drawn.samples, strict=True):
                sheet.write(y, x, pixels)
            self._errors[window] = drawn.errors
            if drawn.uncertainty is not None:
                if self._uncertainty is None:
                    self._uncertainty = self._sheet(1, np.uint16)
                steps = np.rint(drawn.uncertainty * UNCERTAINTY_STEPS).clip(0, 65535).astype(np.uint16)
                self._uncertainty.write(y, x, steps[:, :, None])
                self._deviation[window] = float(drawn.uncertainty.sum(dtype=np.float64))
            if self._alpha is not None:
                with self._timed("decode_s"):
                    alpha = scene.alpha(window.top, window.left, *window.shape)
                assert alpha is not None
                self._alpha.write(y, x, bicubic(alpha[:, :, None], scale)[rows, columns])

    def finish(self, upscaler: Upscaler) -> Result:
        """See kinds.Asset. The files live as long as the asset is open."""
        settings, scene = self.kind.settings, self.scene
        path = self._nameless()
        method = "diffusion" if upscaler.model.denoiser is not None else "regression"
        sheet, notes = self._sheets[self._best()], list[str]()
        metrics = self._encoded(path, sheet, method, notes)
        verdict, message = judge(metrics, settings.thresholds)
        if verdict == "rejected":
            method, notes, self._uncertainty = "bicubic", [], None  # the map is that of what is rejected
            for window in upscaler.windows(scene.height, scene.width):
                y, x = window.core_top * self._scale, window.core_left * self._scale
                sheet.write(y, x, upscaler.fallback(self.read(window), window))
            metrics = self._encoded(path, sheet, method, notes)
        scale = self._scale
        metrics |= {
            "megapixels": scene.height * scene.width * scale**2 / 1e6,
            "source_megapixels": scene.height * scene.width / 1e6,
        }
        files, output = dict[str, str](), {"height": scene.height * scale, "width": scene.width * scale}
        if self._uncertainty is not None:
            files[uncertainty_key(self.out_key)] = self._nameless()
            with self._timed("encode_s"):
                # Marked as ours like the image: an output that becomes a source holds it, too.
                xmp = self._xmp("uncertainty", None, limit_bytes=2**16)
                encoders.encode(files[uncertainty_key(self.out_key)], self._uncertainty, None, format="PNG",
                                quality=settings.quality, icc=None, exif=None, xmp=xmp)  # fmt: skip
            total = sum(self._deviation[window] for window in sorted(self._deviation))
            metrics["uncertainty"] = total / (scene.height * scene.width * scale**2)
        return Result(
            files={**files, self.out_key: path},
            out_key=self.out_key,
            format=self.format,
            method=method,
            verdict=verdict,
            message=message,
            source_type=_source_type(method),
            metrics=metrics,
            source={"format": scene.format, "mode": scene.mode, "height": scene.height, "width": scene.width},
            output=output,
            notes=notes,
        )

    def _nameless(self) -> str:
        """Return the path of a file that lives as long as the asset is open: who is killed leaves nothing behind."""
        return f"/dev/fd/{self._stack.enter_context(tempfile.TemporaryFile(prefix='diffsr-')).fileno()}"

    def _sheet(self, channels: int, dtype: object) -> Sheet:
        height, width = self.scene.height * self._scale, self.scene.width * self._scale
        return self._stack.enter_context(Sheet(height, width, channels, dtype, spool_bytes=self._spool_bytes))

    def _best(self) -> int:
        """Return the sample whose error, over all windows, is the least; the first of one."""
        if len(self._sheets) == 1:
            return 0
        totals = np.sum([self._errors[window] for window in sorted(self._errors)], axis=0)
        return int(totals.argmin())

    def _encoded(self, path: str, sheet: Sheet, method: str, notes: list[str]) -> dict[str, float]:
        """Write the image, and return how faithful the written file is to the source."""
        scene, scale = self.scene, self._scale
        room = metadata_limit(self.format)
        height, width = scene.height * scale, scene.width * scale
        exif = metadata.output_exif(scene.exif, height=height, width=width, limit_bytes=room)
        if scene.exif and exif is None:
            notes.append("its EXIF is damaged, or too large for the format, and was left out")
        if scene.profile and scene.icc is None:
            notes.append("its colour profile does not describe these channels, and was left out")
        if scene.other_words:
            notes.append(f"{', '.join(scene.other_words)}: left out, only EXIF, XMP and the profile are kept")
        xmp = self._xmp(method, scene.xmp, limit_bytes=room)
        if scene.xmp and xmp == self._xmp(method, None, limit_bytes=room):
            notes.append("its XMP is damaged, or too large for the format, or said nothing, and was replaced")
        with self._timed("encode_s"):
            encoders.encode(path, sheet, self._alpha, format=self.format, quality=self.kind.settings.quality,
                            icc=scene.icc, exif=exif, xmp=xmp)  # fmt: skip
            return self._measured(path)

    def _xmp(self, method: str, xmp: bytes | None, *, limit_bytes: int) -> bytes:
        """Return a packet, extended by what made this file."""
        names = {"model": self.kind.model, "recipe": self.kind.recipe, "software": f"DiffSR {version()}"}
        made_by = {"source_type": _source_type(method), "method": method}
        return metadata.output_xmp(xmp, limit_bytes=limit_bytes, **made_by, **names)

    def _measured(self, path: str) -> dict[str, float]:
        """Return lr_psnr and colour_drift of the written file, decoded and read row by row."""
        scene, scale = self.scene, self._scale
        fidelity = Fidelity(scale=scale)
        with encoders.open_published(path) as published:
            row_bytes = scene.width * scale**2 * published.channels * scene.dtype.itemsize
            step = max(8, BAND_BYTES // row_bytes)
            for top in range(0, scene.height, step):
                bottom = min(top + step, scene.height)
                first, last = max(0, top - CONTEXT), min(bottom + CONTEXT, scene.height)
                with self._lock:
                    lr = scene.window(top, 0, bottom - top, scene.width)[0]
                if published.channels > lr.shape[2]:  # WebP has no grey
                    lr = np.broadcast_to(lr, (*lr.shape[:2], published.channels))
                fidelity.add(lr, published.rows(first * scale, last * scale), above=top - first)
        return {"lr_psnr": fidelity.lr_psnr, "colour_drift": fidelity.colour_drift}

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - started


def check_channels(upscaler: Upscaler, channels: int) -> None:
    """Raise Refused for an image whose channels the model does not read."""
    try:
        upscaler.check_channels(channels)
    except ValueError as error:
        raise Refused("upscale", "channels", str(error)) from None


def _source_type(method: str) -> str:
    """Return IPTC's word for how a result was made: a diffusion model adds what was not there."""
    drawn = method in ("diffusion", "uncertainty")
    return metadata.TRAINED_COMPOSITE if drawn else metadata.ALGORITHMICALLY_ENHANCED

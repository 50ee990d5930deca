"""The settings of the upscale job."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from diffsr_core.sampling import SamplingRecipe
from pipelines.config import check
from pipelines.quality import Thresholds
from pipelines.sampling import SamplingConfig
from pipelines.stills import DECISIVE

Format = Literal["keep", "png", "jpeg", "webp", "tiff", "avif"]


@dataclass(frozen=True, kw_only=True)
class UpscaleConfig(SamplingConfig):
    """Upscale every image of a bucket with a registered model, each exactly once.

    First word: run (the default), plan, status, verify, retry-failed or gc.
    """

    source: str | None = field(default=None, metadata={"unit": "URI"})
    """Folder or prefix of images, apart from the output; status, verify and gc need none."""
    output: str = field(metadata={"unit": "URI"})
    """Where the results go, mirroring the source; the ledger is kept in _diffsr/ below it."""
    model: str = field(default="models:/diffsr@champion", metadata={"unit": "REF"})
    """Model: a folder or URI, models:/name@alias or models:/name/version; an alias is resolved once."""
    include: tuple[str, ...] = field(default=(), metadata={"unit": "PATTERNS"})
    """Only keys that match one of these, like *.jpg,album/*; * crosses slashes, one without a slash is of the name."""
    exclude: tuple[str, ...] = field(default=(), metadata={"unit": "PATTERNS"})
    """No keys that match one of these."""
    skip_above_megapixels: float | None = None
    """Inputs of more are skipped: they are large already."""
    skip_upscaled: bool = True
    """Skip what says in its own metadata that DiffSR made it."""
    format: Format = field(default="keep", metadata={"group": "results"})
    """Format of the results; keep writes what came in (BMP, GIF, PPM and JPEG 2000 become PNG)."""
    quality: int = 95
    """Quality of JPEG, AVIF and lossy WebP results, 1 to 100; WebP of 100 is lossless."""
    samples: int = 1
    """Samples drawn of each image; of more than one the deviation is written beside the result."""
    choice: Literal["first", "mean", "best"] = "first"
    """What of them is published: the first, their mean, or the one that keeps to the input most by itself."""
    noise: Literal["content", "folder"] = "content"
    """What keys the noise: each image's content, or its folder, so that the frames of a sequence share it."""
    first_page: bool = False
    """Take the first page or frame of what has several, which is a dead letter otherwise."""
    review_lr_psnr: float = field(default=40.0, metadata={"unit": "DB"})
    """Results whose downscale is nearer to the input are passed, others are marked for review."""
    reject_lr_psnr: float = field(default=12.0, metadata={"unit": "DB"})
    """Below it bicubic, projected onto the input, is published instead, and says so."""
    review_colour_drift: float = field(default=2.0, metadata={"unit": "LEVELS"})
    """The same for the mean of a channel, in levels of 255: above it, review."""
    reject_colour_drift: float = field(default=16.0, metadata={"unit": "LEVELS"})
    """Above it, bicubic."""
    max_megapixels: float = 100.0
    """Larger inputs are dead letters, judged by their header, unless they can be read by window (TIFF, JPEG 2000)."""
    max_raster_megapixels: float = 4000.0
    """The same for those."""
    max_seconds: float = field(default=120.0, metadata={"group": "running"})
    """Time to decode one input; longer is a dead letter."""
    batch_size: int | None = None
    """Windows in flight per worker: speed and memory, never the bytes; left out, as many as half the memory holds."""
    unit_megabytes: float = 8.0
    """Source bytes in one unit of work."""
    max_dead_share: float = 0.2
    """Error budget: the night ends (exit 3) when more of its inputs, and more than one, are dead letters."""
    limit: int | None = None
    """Do at most this many assets."""
    max_hours: float | None = None
    """End after this time: units in flight are finished, the rest is for the next night."""
    engine: Literal["ray", "local"] = "ray"
    """Ray Data actors, or a plain loop in this process."""
    num_workers: int = 1
    """Upscaling actors, one CPU each."""
    use_gpu: bool = False
    """One GPU per actor."""
    device_hour_price: float = 0.0
    """Price of a worker's device for an hour, for forecast and summary."""
    track: bool = True
    """Log the night to MLflow."""
    quick: bool = False
    """verify: look at existence and size only, read nothing."""
    delete: bool = False
    """gc: really delete; without it gc only lists."""
    dry_run: bool = False
    """Say what would be done, and stop: run plans, verify records nothing, gc deletes nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(1 <= self.quality <= 100, "quality", self.quality, "must be from 1 to 100", "use 95")
        limits = {"max_megapixels": (1e-6, 1e6, 100), "max_raster_megapixels": (1e-6, 1e6, 4000),
                  "unit_megabytes": (1e-6, 1e6, 8), "max_seconds": (1e-3, 1e6, 120)}  # fmt: skip
        for name, (least, most, usual) in limits.items():
            value = getattr(self, name)
            check(least <= value <= most, name, value, f"must be from {least:g} to {most:g}", f"use {usual}")
        for name in ("skip_above_megapixels", "max_hours"):
            value = getattr(self, name)
            check(value is None or value > 0, name, value, "must be above 0", "leave it out for no limit")
        check(0 <= self.max_dead_share <= 1, "max_dead_share", self.max_dead_share, "must be from 0 to 1", "use 0.2")
        check(self.device_hour_price >= 0, "device_hour_price", self.device_hour_price, "must be at least 0", "use 2.5")
        check(self.num_workers >= 1, "num_workers", self.num_workers, "must be at least 1", "use 1 or more")
        for name in ("batch_size", "limit"):
            value = getattr(self, name)
            check(value is None or value >= 1, name, value, "must be at least 1", "leave it out")
        self.thresholds()

    @property
    def device(self) -> str:
        """What a worker computes on."""
        return "cuda" if self.use_gpu else "cpu"

    def thresholds(self) -> Thresholds:
        """Return the quality gate's."""
        return Thresholds(
            review_lr_psnr=self.review_lr_psnr,
            reject_lr_psnr=self.reject_lr_psnr,
            review_colour_drift=self.review_colour_drift,
            reject_colour_drift=self.reject_colour_drift,
        )

    def sampling(self, own: Mapping[str, Any] | None = None) -> SamplingRecipe:
        """Return the sampling recipe; own: what the model's folder says of it."""
        return replace(super().sampling(own), num_samples=self.samples, choice=self.choice)

    def recipe(self, own: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the settings that decide the results' bytes, beside the model: with others, all is made again."""
        return {"sampling": asdict(self.sampling(own)), "still": {name: getattr(self, name) for name in DECISIVE}}

    def admission(self) -> dict[str, Any]:
        """Return the settings that decide what becomes of an input, and no byte: what is done stays so with others."""
        names = ("first_page", "max_megapixels", "max_raster_megapixels", "skip_above_megapixels", "skip_upscaled",
                 "max_seconds", "review_lr_psnr", "review_colour_drift")  # fmt: skip
        return {name: getattr(self, name) for name in names}

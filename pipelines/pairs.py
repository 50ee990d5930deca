"""Job 1: a bucket of images becomes LR-HR pairs in Parquet, with every input accounted for."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from diffsr_core.degradation import Degradation
from pipelines import storage
from pipelines.config import check, fingerprint
from pipelines.corpus import Corpus
from pipelines.engine import check_engine, say
from pipelines.estimate import estimate
from pipelines.lease import Lease
from pipelines.manifest import FORMAT, SPLITS, Manifest
from pipelines.patches import TWIN, PairsWorker
from pipelines.profiles import WorkingSpace
from pipelines.publication import publish_failure, publish_set, report_lost_shards, track_set
from pipelines.runs import Summary, check_tracking, new_run_id
from pipelines.work import BudgetExceeded, Work, forecast, run


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """Make LR-HR training pairs from a folder, bucket or list of images. A rerun does only what is new or changed."""

    source: str = field(metadata={"unit": "URI"})
    """Folder or prefix of images; or a list of them: a .txt file of URIs, or a .parquet file with a column uri."""
    output: str = field(metadata={"unit": "URI"})
    """Where the set is kept: manifest.json, card.html, dead_letters.parquet, data/*.parquet; the ledger in _diffsr/."""
    scale: int = 4
    """HR pixels per LR pixel along one axis; 1 for pairs of one size, with a degradation that does more than resize."""
    degradation: str = "bicubic"
    """Recipe that makes LR: bicubic, bilinear, blur-bicubic, noise, jpeg or real; or JSON of a name and settings."""
    patch: int = field(default=256, metadata={"unit": "PIXELS"})
    """Side of the square HR patches; a multiple of the scale."""
    crops: Literal["grid", "random"] = "grid"
    """Where patches are cut: in a grid without overlap, or at random places, which may overlap."""
    max_per_image: int = 64
    """Patches taken from one image at most, chosen by hash; of each of its reductions as many."""
    reductions: tuple[int, ...] = (1,)
    """Patches are cut from the image reduced by each of these (1: as it is): camera images are soft in full size."""
    min_deviation: float = 2.0
    """Patches none of whose channels has a standard deviation of this (of 255) are dropped as flat."""
    duplicates: Literal["set", "image", "keep"] = "set"
    """Near copies are dropped in the whole set, within one image only, or kept."""
    hash_distance: int = field(default=2, metadata={"unit": "BITS"})
    """Patches are near copies when at most so many of the 64 bits of their perceptual hashes differ."""
    val_share: float = 0.05
    """Share of the sources that go into the split `val`."""
    test_share: float = 0.05
    """Share of the sources that go into the split `test`."""
    seed: int = 0
    """Seed of the patch choice and of the degradation."""
    codec: Literal["webp", "png"] = field(default="webp", metadata={"group": "pixels"})
    """Lossless codec of 8-bit colour patches (grey is PNG; more bits or bands are npy + zstd)."""
    working_space: str = field(default="srgb", metadata={"unit": "SPACE"})
    """Colours are converted to srgb, or to an ICC profile (its URI); native leaves them as they are."""
    bands: tuple[int, ...] = ()
    """Bands of rasters to take, counted from 1; all when left out."""
    value_range: tuple[float, ...] = field(default=(), metadata={"unit": "LOW,HIGH"})
    """Samples of more than 8 bits that mean black and white; the whole of 16 bits when left out, floats need it."""
    max_megapixels: float = 100.0
    """Larger images are dead letters, judged by their header before decoding; a TIFF is read by windows instead."""
    max_raster_megapixels: float = 4000.0
    """The limit of what is read by windows: TIFF, GeoTIFF, JPEG 2000."""
    lr_source: str | None = field(default=None, metadata={"unit": "URI", "group": "real twins"})
    """Folder or prefix of real LR twins of the images in source; no LR is made then."""
    lr_name: str = field(default="{key}", metadata={"unit": "PATTERN"})
    """Where the twin of an image lies below lr_source: {key}, or made of {folder} {stem} {suffix}, as {stem}x4.png."""
    max_misalignment: float = field(default=0.5, metadata={"unit": "LR_PIXELS"})
    """Twins that are further apart are dead letters."""
    unit_megabytes: float = field(default=64.0, metadata={"group": "running"})
    """Source bytes in one unit of work, which becomes one Parquet file."""
    max_seconds: float = 120.0
    """Time for one image; one that takes longer is a dead letter."""
    max_dead_share: float = 0.2
    """Error budget: the job fails (exit 3) when more of its inputs, and more than one, are dead letters."""
    max_gone_share: float = 0.5
    """Sources that are gone leave the set; more of them than this share, and the job fails: is it the right source?"""
    retry_failed: bool = False
    """Also try dead letters again, once what made them has been mended."""
    track: bool = True
    """Log the set to MLflow, as the data set that a training names."""
    engine: Literal["ray", "local"] = "ray"
    """Ray Data actors, or a plain loop in this process."""
    num_workers: int = 1
    """Actors, one CPU each; one more CPU is left to Ray Data."""
    cpu_hour_price: float = 0.0
    """Price of a CPU for an hour, for the cost that dry_run tells."""
    dry_run: bool = False
    """Say what would be done and what it would take, judged from a few images, and stop."""

    def __post_init__(self) -> None:
        check(self.scale >= 1, "scale", self.scale, "must be at least 1", "use 2, 3, 4 or 8")
        made_by = TWIN if self.lr_source is not None else Degradation.parse(self.degradation, self.scale).name
        check(
            self.patch >= self.scale and self.patch % self.scale == 0,
            "patch",
            self.patch,
            f"must be a multiple of scale ({self.scale})",
            f"use {max(1, self.patch // self.scale) * self.scale}",
        )
        check(0 <= self.seed < 2**63, "seed", self.seed, "must be from 0 to 2^63 - 1", "use 0")
        check(0 <= self.hash_distance <= 6, "hash_distance", self.hash_distance, "must be from 0 to 6", "use 2")
        check(self.min_deviation >= 0, "min_deviation", self.min_deviation, "must be at least 0", "use 2")
        check(self.cpu_hour_price >= 0, "cpu_hour_price", self.cpu_hour_price, "must be at least 0", "use 0.05")
        for name, usual in (("max_per_image", 64), ("num_workers", 1)):
            check(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1", f"use {usual}")
        limits = {"max_megapixels": (1e-6, 1e6, 100.0), "max_raster_megapixels": (1e-6, 1e6, 4000.0)}
        limits |= {
            "max_misalignment": (1e-6, 1e3, 0.5),
            "unit_megabytes": (1e-6, 1e6, 64),
            "max_seconds": (1e-3, 1e6, 120),
        }
        for name, (least, most, default) in limits.items():
            value = getattr(self, name)
            check(least <= value <= most, name, value, f"must be from {least:g} to {most:g}", f"use {default}")
        factors = self.reductions
        check(bool(factors) and len(set(factors)) == len(factors) and all(1 <= factor <= 16 for factor in factors),
              "reductions", factors, "must be whole numbers from 1 to 16, once each", "use 1, or 1,2")  # fmt: skip
        for name, share in (("max_dead_share", 0.2), ("max_gone_share", 0.5)):
            check(0 <= getattr(self, name) <= 1, name, getattr(self, name), "must be from 0 to 1", f"use {share}")
        for name in ("val_share", "test_share"):
            value = getattr(self, name)
            check(0 <= value < 1, name, value, "must be from 0 to less than 1", "use 0.05")
        both = self.val_share + self.test_share
        check(both < 1, "val_share + test_share", both, "must be below 1", "leave something to train on")
        check(all(band >= 1 for band in self.bands), "bands", self.bands, "must be counted from 1", "use 1,2,3")
        check(len(set(self.bands)) == len(self.bands), "bands", self.bands, "must be named once each", "use 1,2,3")
        ordered = len(self.value_range) == 2 and self.value_range[0] < self.value_range[-1]
        check(not self.value_range or ordered, "value_range", self.value_range,
              "must be two numbers, the lower first", "use 0,10000")  # fmt: skip
        check(not self.value_range or made_by not in ("noise", "jpeg", "real"), "value_range", self.value_range,
              f"must be left out with {self.degradation}, whose levels are of the whole range of the samples",
              "use bicubic, bilinear or blur-bicubic")  # fmt: skip
        if self.lr_source is not None:
            check(self.degradation == "bicubic", "degradation", self.degradation,
                  "must be left out with lr_source, whose images are the LR", "leave out one of them")  # fmt: skip
            check(factors == (1,), "reductions", factors, "must be 1 with lr_source, whose images have a size",
                  "leave it out")  # fmt: skip
        check(self.lr_name == "{key}" or self.lr_source is not None, "lr_name", self.lr_name, "needs lr_source",
              "give --lr-source")  # fmt: skip
        self.corpus()

    def corpus(self) -> Corpus:
        """Return where the images come from."""
        return Corpus(source=self.source, lr_source=self.lr_source or "", lr_name=self.lr_name)

    def space(self) -> WorkingSpace:
        """Return the working space, its profile read where it has one. Raises ValueError."""
        if self.working_space in ("srgb", "native"):
            return WorkingSpace(self.working_space)
        check(storage.exists(self.working_space), "working_space", self.working_space,
              "must be srgb, native or the URI of an ICC profile that exists", "use srgb")  # fmt: skip
        return WorkingSpace.parse(self.working_space, storage.read_bytes(self.working_space))

    def recipe(self, space: WorkingSpace) -> dict[str, Any]:
        """Return the settings that decide the pairs."""
        made_by = TWIN
        if self.lr_source is None:
            degradation = Degradation.parse(self.degradation, self.scale)
            document = {"name": degradation.name, "settings": degradation.settings}
            # Settings are written out: the defaults of another version are another recipe.
            made_by = json.dumps(document) if degradation.settings else degradation.name
        return {
            "format": FORMAT,
            **{name: getattr(self, name) for name in ("scale", "patch", "crops", "max_per_image", "min_deviation")},
            **{
                name: getattr(self, name) for name in ("duplicates", "hash_distance", "val_share", "test_share", "seed")
            },
            **{name: getattr(self, name) for name in ("codec", "max_megapixels", "max_raster_megapixels")},
            # Left out where it is what it always was, so that older sets stay what they are.
            **({} if self.reductions == (1,) else {"reductions": list(self.reductions)}),
            "degradation": made_by,
            "working_space": space.name,
            "bands": list(self.bands),
            "value_range": list(self.value_range) or None,
            "lr_source": self.lr_source is not None,
            "lr_name": self.lr_name,
            "max_misalignment": self.max_misalignment,
        }


def make_pairs(config: PairsConfig) -> Summary:
    """Run the job; return its summary. Raises ValueError, LeaseHeld or BudgetExceeded."""
    check_engine(config.engine, config.num_workers)
    if config.track and not config.dry_run:
        check_tracking()
    space, corpus = config.space(), config.corpus()
    recipe = config.recipe(space)
    arguments: dict[str, Any] = {"corpus": asdict(corpus), "output": config.output, "recipe": recipe, "icc": space.icc,
                 "max_seconds": config.max_seconds}  # fmt: skip
    work = Work(
        listing=corpus.listing,
        output=config.output,
        recipe=fingerprint(recipe),
        unit_bytes=int(config.unit_megabytes * 2**20),
        max_dead_share=config.max_dead_share,
        retry_dead=config.retry_failed,
        sets=True,
        max_gone_share=config.max_gone_share,
    )
    if config.dry_run:
        ahead = forecast(work)
        found = estimate(ahead.rows, PairsWorker(**arguments), num_workers=config.num_workers,
                         cpu_hour_price=config.cpu_hour_price)  # fmt: skip
        say(
            f"pairs: {ahead.todo} of {ahead.listed} images would be read, {ahead.todo_bytes / 1e6:.1f} MB; {found.text}"
        )
        return Summary(job="pairs", run_id="none", status="planned", inputs=ahead.todo, unchanged=ahead.unchanged,
                       metrics={"source_bytes": float(ahead.todo_bytes), **found.metrics})  # fmt: skip
    run_id = new_run_id("pairs")
    with Lease(config.output, run_id=run_id) as lease:
        report_lost_shards(config.output, recipe, lease=lease)
        try:
            outcome = run(work, make=PairsWorker, arguments=arguments, engine=config.engine,
                          num_workers=config.num_workers, run_id=run_id, lease=lease, label="pairs")  # fmt: skip
        except BudgetExceeded:
            publish_failure(config.output, recipe, lease=lease)
            raise
        manifest = publish_set(config.output, recipe, lease=lease)
        counts = {f"pairs_{split}": float(manifest.num_pairs(split)) for split in SPLITS}
        say(f"pairs: {_in_words(manifest)}; digest {manifest.digest[:12]}")
        if config.track:  # a store that is away costs no set: the next run logs it
            track_set(config.output, manifest)
    return Summary(
        job="pairs",
        run_id=run_id,
        status="done",
        inputs=outcome.inputs,
        done=outcome.done,
        skipped=outcome.skipped,
        dead=outcome.dead,
        unchanged=outcome.unchanged,
        outputs=[storage.join(config.output, name) for name in ("manifest.json", "card.html", "dead_letters.parquet")],
        metrics=counts,
    )


def _in_words(manifest: Manifest) -> str:
    return ", ".join(f"{manifest.num_pairs(split):,} {split}" for split in SPLITS) + " pairs"

"""Job 5: a bucket and a registered model become an upscaled bucket, every asset accounted for, once."""

import os
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import pyarrow.compute as pc
from fsspec.implementations.local import LocalFileSystem

from diffsr_core.checkpoint import model_from_files
from pipelines import storage, upkeep
from pipelines.assets import UpscaleWorker
from pipelines.config import check, fingerprint
from pipelines.engine import say
from pipelines.images import SUFFIXES
from pipelines.lease import Lease
from pipelines.ledger import Ledger, list_table
from pipelines.models import publish_model, resolve
from pipelines.runs import Summary, new_run_id
from pipelines.sampling import SamplingConfig
from pipelines.work import Work, forecast, run

VERBS = ("run", "plan", "status", "verify", "retry-failed", "gc")


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
    format: Literal["keep", "png", "jpeg", "webp", "tiff"] = "keep"
    """Format of the results; keep writes what came in (BMP, GIF and PPM become PNG)."""
    quality: int = 95
    """Quality of JPEG and lossy WebP results, 1 to 100."""
    max_megapixels: float = field(default=1.5, metadata={"group": "running"})
    """Larger inputs are dead letters, judged by their header; memory grows with it, 2.3 GiB per megapixel (nano-x4)."""
    batch_size: int = 1
    """Network calls in flight per worker: speed and memory, never the bytes."""
    unit_megabytes: float = 8.0
    """Source bytes in one unit of work."""
    max_dead_share: float = 0.2
    """Error budget: the job fails (exit 3) when more of its inputs, and more than one, are dead letters."""
    limit: int | None = None
    """Do at most this many assets."""
    engine: Literal["ray", "local"] = "ray"
    """Ray Data actors, or a plain loop in this process."""
    num_workers: int = 1
    """Upscaling actors, one CPU each."""
    use_gpu: bool = False
    """One GPU per actor."""
    delete: bool = False
    """gc: really delete; without it gc only lists."""
    dry_run: bool = False
    """Say what would be done, and stop: run plans, verify records nothing, gc deletes nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(1 <= self.quality <= 100, "quality", self.quality, "must be from 1 to 100", "use 95")
        check(self.max_megapixels > 0, "max_megapixels", self.max_megapixels, "must be above 0", "use 1.5")
        check(self.unit_megabytes > 0, "unit_megabytes", self.unit_megabytes, "must be above 0", "use 8")
        check(0 <= self.max_dead_share <= 1, "max_dead_share", self.max_dead_share, "must be from 0 to 1", "use 0.2")
        for name in ("batch_size", "num_workers"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1", "use 1 or more")
        check(self.limit is None or self.limit >= 1, "limit", self.limit, "must be at least 1", "leave it out for all")

    def recipe(self) -> dict[str, Any]:
        """Return the settings that decide the bytes of the results, beside the model."""
        return {
            **asdict(self.sampling()),
            "format": self.format,
            "quality": self.quality,
            "max_megapixels": self.max_megapixels,
        }


def upscale(config: UpscaleConfig, *, verb: str = "run") -> Summary:
    """Run one verb; return its summary. Raises ValueError, LeaseHeld or BudgetExceeded."""
    if config.source is not None:
        _check_apart(config.source, config.output)
    if verb == "status":
        return upkeep.status(config.output)
    if verb == "verify":
        return upkeep.verify(config.output, dry_run=config.dry_run)
    if verb == "gc":
        return upkeep.gc(config.output, delete=config.delete and not config.dry_run)
    if config.source is None:
        raise ValueError("source (None) must be given; use --source URI")
    model = resolve(config.model)
    network, _ = model_from_files(model.files)
    config.sampling().check_fits(network.config)  # before any work is planned
    recipe = config.recipe()
    work = Work(
        listing=partial(list_table, config.source, suffixes=SUFFIXES),
        output=config.output,
        recipe=fingerprint(recipe),
        model=model.digest,
        unit_bytes=int(config.unit_megabytes * 2**20),
        max_dead_share=config.max_dead_share,
        retry_dead=verb == "retry-failed",
        limit=config.limit,
    )
    say(f"upscale: {model.label}, digest {model.digest[:12]}, {config.sampler} {config.steps} steps")
    if verb == "plan" or config.dry_run:
        ahead = forecast(work)
        say(f"upscale: {ahead.todo} of {ahead.listed} assets are new or changed, {ahead.todo_bytes / 1e6:.1f} MB")
        return Summary(job="upscale", run_id="none", status="planned", inputs=ahead.todo,
                       unchanged=ahead.unchanged)  # fmt: skip
    run_id = new_run_id("upscale")
    with Lease(config.output, run_id=run_id) as lease:
        outcome = run(
            work,
            make=UpscaleWorker,
            arguments={
                "source": config.source,
                "output": config.output,
                "model_uri": publish_model(model, config.output),
                "model_name": {"name": model.name, "version": model.version, "digest": model.digest},
                "sampling": asdict(config.sampling()),
                "recipe": recipe,
                "in_flight": config.batch_size,
                "device": "cuda" if config.use_gpu else "cpu",
            },
            engine=config.engine,
            num_workers=config.num_workers,
            use_gpu=config.use_gpu,
            run_id=run_id,
            lease=lease,
            label="upscale",
        )
    return Summary(job="upscale", run_id=run_id, status="done", inputs=outcome.inputs, done=outcome.done,
                   skipped=outcome.skipped, dead=outcome.dead, unchanged=outcome.unchanged,
                   outputs=[config.output], metrics=_mean_metrics(config.output, run_id))  # fmt: skip


def _mean_metrics(output: str, run_id: str) -> dict[str, float]:
    table = Ledger(output).rows(["metrics", "run_id"])
    rows = [dict(metrics) for metrics in table.filter(pc.equal(table["run_id"], run_id))["metrics"].to_pylist()]
    names = {name for row in rows for name in row}
    return {n: sum(row[n] for row in rows if n in row) / sum(n in row for row in rows) for n in sorted(names)}


def _check_apart(source: str, output: str) -> None:
    """Raise ValueError where one lies in the other: results would become sources, and gc could meet originals."""
    first, second = _place(source), _place(output)
    shorter = min(len(first), len(second))
    check(first[:shorter] != second[:shorter], "output", output, f"must lie apart from source ({source!r})",
          "choose a folder or prefix such that neither is in the other")  # fmt: skip


def _place(uri: str) -> tuple[str, ...]:
    """Return the store of a URI and the names on the way to it, symbolic links resolved. It need not exist."""
    filesystem, path = storage.open_filesystem(uri)
    real = os.path.realpath(path) if isinstance(filesystem, LocalFileSystem) else path
    return (type(filesystem).__name__, *filter(None, real.split("/")))

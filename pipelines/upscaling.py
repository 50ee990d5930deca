"""Job 5: a bucket and a registered model become an upscaled bucket, every asset accounted for, once."""

import json
import time
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from diffsr_core.checkpoint import model_from_files
from diffsr_core.upscaler import SamplingRecipe, Upscaler
from pipelines import storage
from pipelines.config import check, fingerprint
from pipelines.engine import say
from pipelines.images import SUFFIXES, Refused
from pipelines.lease import Lease
from pipelines.ledger import OUTPUT_LOST, Ledger, Receipt
from pipelines.models import load_files, publish_model, resolve
from pipelines.pictures import output_key, upscale_picture
from pipelines.runs import Summary, new_run_id
from pipelines.sampling import check_sampling
from pipelines.work import Work, forecast, read_source, run

VERBS = ("run", "plan", "status", "verify", "retry-failed", "gc")


@dataclass(frozen=True, kw_only=True)
class UpscaleConfig:
    """Upscale every image of a bucket with a registered model, each exactly once.

    First word: run (the default), plan, status, verify, retry-failed or gc.
    """

    source: str = field(metadata={"unit": "URI"})
    """Folder or prefix of images."""
    output: str = field(metadata={"unit": "URI"})
    """Where the results go, mirroring the source; the ledger is kept in _diffsr/ below it."""
    model: str = field(default="models:/diffsr@champion", metadata={"unit": "REF"})
    """Model: a folder or URI, models:/name@alias or models:/name/version; an alias is resolved once."""
    format: Literal["keep", "png", "jpeg", "webp", "tiff"] = "keep"
    """Format of the results; keep writes what came in (BMP, GIF and PPM become PNG)."""
    quality: int = 95
    """Quality of JPEG and lossy WebP results, 1 to 100."""
    sampler: str = field(default="ddim", metadata={"group": "sampling"})
    """Solver of the reverse process."""
    steps: int = 8
    """Network calls per image."""
    seed: int = 0
    """Noise seed."""
    consistency: Literal["exact", "off"] = "exact"
    """Projection onto the LR."""
    num_threads: int = 1
    """Threads of one network call; part of what decides the bytes."""
    tile: int = 64
    """Side of a network window in LR pixels."""
    halo: int = 8
    """LR pixels around a window's core that are computed and not written."""
    max_megapixels: float = field(default=4.0, metadata={"group": "running"})
    """Larger inputs are dead letters, judged by their header before decoding."""
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
    """Say what would be done, and stop (the same as plan)."""

    def __post_init__(self) -> None:
        check_sampling(self.sampler, self.steps, self.num_threads)
        check(1 <= self.quality <= 100, "quality", self.quality, "must be from 1 to 100", "use 95")
        check(self.max_megapixels > 0, "max_megapixels", self.max_megapixels, "must be above 0", "use 4")
        check(self.unit_megabytes > 0, "unit_megabytes", self.unit_megabytes, "must be above 0", "use 8")
        check(0 <= self.max_dead_share <= 1, "max_dead_share", self.max_dead_share, "must be from 0 to 1", "use 0.2")
        for name in ("batch_size", "num_workers"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1", "use 1 or more")
        check(self.limit is None or self.limit >= 1, "limit", self.limit, "must be at least 1", "leave it out for all")
        self.sampling()

    def sampling(self) -> SamplingRecipe:
        """Return the sampling recipe; raises ValueError for a tile that its halo eats up."""
        return SamplingRecipe(
            sampler=self.sampler,
            num_steps=self.steps,
            seed=self.seed,
            tile=self.tile,
            halo=self.halo,
            num_threads=self.num_threads,
            consistency=self.consistency,
        )

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
    if verb in ("status", "verify", "gc"):
        return {"status": _status, "verify": _verify, "gc": _gc}[verb](config)
    model = resolve(config.model)
    network, _ = model_from_files(model.files)
    Upscaler(network, config.sampling())  # refuses settings that do not fit this model before any work is planned
    recipe = config.recipe()
    work = Work(
        source=config.source,
        output=config.output,
        suffixes=SUFFIXES,
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
    rows = [dict(row["metrics"]) for row in Ledger(output).rows().to_pylist() if row["run_id"] == run_id]
    names = {name for row in rows for name in row}
    return {n: sum(row[n] for row in rows if n in row) / sum(n in row for row in rows) for n in sorted(names)}


def _counts(rows: list[dict[str, Any]]) -> dict[str, int]:
    return {status: sum(row["status"] == status for row in rows) for status in ("done", "skipped", "dead")}


def _status(config: UpscaleConfig) -> Summary:
    rows = Ledger(config.output).latest().to_pylist()
    for row in rows:
        if row["status"] != "done":
            say(f"{row['status']}  {row['key']!r}  {row['stage']}/{row['reason']}: {row['message']}")
    holder = Lease(config.output, run_id="status").holder()
    counts = _counts(rows)
    say(f"status: {counts}; " + (f"run {holder['run_id']} is at work" if holder else "no run is at work"))
    return Summary(job="upscale status", run_id="none", status="done", inputs=len(rows),
                   done=counts["done"], skipped=counts["skipped"], dead=counts["dead"])  # fmt: skip


def _verify(config: UpscaleConfig) -> Summary:
    """Hash every output that the ledger claims; what is missing or altered becomes work for the next run."""
    run_id = new_run_id("verify")
    with Lease(config.output, run_id=run_id) as lease:
        ledger = Ledger(config.output)
        rows = [row for row in ledger.latest().to_pylist() if row["status"] == "done"]
        lost = []
        for row in rows:
            try:
                found = storage.digest_bytes(storage.read_bytes(storage.join(config.output, row["out_key"])))
            except FileNotFoundError:
                found = "missing"
            if found != row["out_sha256"]:
                fields = {name: row[name] for name in Receipt.__dataclass_fields__}
                message = f"{row['out_key']} is {found}, not {row['out_sha256']}"
                fields |= {"status": "dead", "stage": "verify", "reason": OUTPUT_LOST, "message": message}
                fields |= {"metrics": dict(row["metrics"]), "run_id": run_id, "fence": lease.fence}
                lost.append(Receipt(**fields))
                say(f"verify: {message}")
        if lost:
            lease.check()
            ledger.append(lost, fence=lease.fence, number=0)
    say(
        f"verify: {len(rows) - len(lost)} of {len(rows)} outputs are as recorded"
        + ("; run again to redo the rest" if lost else "")
    )
    return Summary(job="upscale verify", run_id=run_id, status="done", inputs=len(rows), done=len(rows) - len(lost),
                   dead=len(lost))  # fmt: skip


def _gc(config: UpscaleConfig) -> Summary:
    """List (with --delete: delete) objects below the output that no current receipt accounts for."""
    run_id = new_run_id("gc")
    with Lease(config.output, run_id=run_id):
        kept = {row["out_key"] for row in Ledger(config.output).latest().to_pylist() if row["status"] == "done"}
        kept |= {f"{key}.json" for key in kept}
        orphans = [item.key for item in storage.list_objects(config.output) if item.key not in kept]
        for key in orphans:
            say(f"gc: {'deletes' if config.delete else 'would delete'} {key!r}")
            if config.delete:
                storage.delete(storage.join(config.output, key))
    return Summary(job="upscale gc", run_id=run_id, status="done", inputs=len(orphans),
                   done=len(orphans) if config.delete else 0)  # fmt: skip


class UpscaleWorker:
    """Unit -> result objects and a receipt per asset; the model is loaded once."""

    def __init__(
        self,
        *,
        source: str,
        output: str,
        model_uri: str,
        model_name: dict[str, Any],
        sampling: dict[str, Any],
        recipe: dict[str, Any],
        in_flight: int,
        device: str,
    ) -> None:
        network, _ = model_from_files(load_files(model_uri))
        self.upscaler = Upscaler(network, SamplingRecipe(**sampling), device=device, in_flight=in_flight)
        self.source, self.output, self.model, self.recipe = source, output, model_name, recipe
        self.fingerprint = fingerprint(recipe)

    def __call__(self, rows: list[dict[str, Any]]) -> list[Receipt]:
        return [self._asset(row) for row in rows]

    def _asset(self, row: dict[str, Any]) -> Receipt:
        started = time.time()
        receipt = {**row, "recipe": self.fingerprint, "model": self.model["digest"], "started": started}
        try:
            result = self._publish(row)
        except Refused as refused:
            result = {"status": "dead", "stage": refused.stage, "reason": refused.reason, "message": refused.message}
        return Receipt(**receipt, **result, seconds=time.time() - started)

    def _publish(self, row: dict[str, Any]) -> dict[str, Any]:
        """Upscale one asset; write the sidecar, then the image; return the receipt's outcome. Raises Refused."""
        data = read_source(self.source, row)
        result = upscale_picture(
            self.upscaler,
            data,
            format=self.recipe["format"],
            quality=self.recipe["quality"],
            max_pixels=int(self.recipe["max_megapixels"] * 1e6),
        )
        key = output_key(row["key"], result.source_format, self.recipe["format"])
        if key != row["key"] and storage.exists(storage.join(self.source, key)):
            raise Refused("publish", "key_taken", f"its result would be {key}, which is a source itself; rename one")
        sha256 = storage.digest_bytes(result.data)
        sidecar = {
            "source": {"key": row["key"], "etag": row["etag"], "sha256": storage.digest_bytes(data)},
            "output": {"key": key, "sha256": sha256, "bytes": len(result.data), "format": result.format},
            "model": self.model,
            "recipe": self.recipe,
            "metrics": result.metrics,
            "synthetic": True,
        }
        storage.publish(
            storage.join(self.output, f"{key}.json"), json.dumps(sidecar, indent=1, sort_keys=True).encode()
        )
        storage.publish(storage.join(self.output, key), result.data)
        return {"status": "done", "out_key": key, "out_sha256": sha256, "out_bytes": len(result.data),
                "metrics": result.metrics}  # fmt: skip

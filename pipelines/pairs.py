"""Job 1: a bucket of images becomes LR-HR pairs in Parquet, with every input accounted for."""

import json
from dataclasses import dataclass, field
from typing import Any, Literal

from diffsr_core.degradation import Degradation
from pipelines import storage
from pipelines.config import check, fingerprint, to_mapping
from pipelines.engine import say
from pipelines.images import SUFFIXES
from pipelines.lease import Lease
from pipelines.ledger import Ledger
from pipelines.manifest import SPLITS, Manifest, Shard
from pipelines.patches import PairsWorker
from pipelines.runs import Summary, new_run_id
from pipelines.work import Work, forecast, run


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """Make LR-HR training pairs from a folder or bucket of images. A rerun does only what is new or changed."""

    source: str = field(metadata={"unit": "URI"})
    """Folder or prefix of images."""
    output: str = field(metadata={"unit": "URI"})
    """Where the pair set is kept: data/*.parquet, manifest.json and the ledger in _diffsr/."""
    scale: int = 4
    """HR pixels per LR pixel along one axis; 1 for pairs of one size, with a degradation that does more than resize."""
    degradation: str = "bicubic"
    """Recipe that makes LR: bicubic, bilinear, blur-bicubic, noise, jpeg or real; or JSON of a name and settings."""
    patch: int = field(default=256, metadata={"unit": "PIXELS"})
    """Side of the square HR patches; a multiple of the scale."""
    max_per_image: int = 64
    """Patches taken from one image at most, chosen by hash."""
    min_deviation: float = 2.0
    """Patches whose standard deviation (of 255) is below this are dropped as flat."""
    val_share: float = 0.05
    """Share of the sources that go into the split `val`."""
    test_share: float = 0.05
    """Share of the sources that go into the split `test`."""
    codec: Literal["webp", "png"] = "webp"
    """Lossless codec of colour patches (grey ones are PNG)."""
    seed: int = 0
    """Seed of the patch choice and of the degradation."""
    max_megapixels: float = 100.0
    """Larger images are dead letters, judged by their header before decoding."""
    unit_megabytes: float = field(default=64.0, metadata={"group": "running"})
    """Source bytes in one unit of work, which becomes one Parquet file."""
    max_dead_share: float = 0.2
    """Error budget: the job fails (exit 3) when more of its inputs, and more than one, are dead letters."""
    retry_failed: bool = False
    """Also try dead letters again, once what made them has been mended."""
    engine: Literal["ray", "local"] = "ray"
    """Ray Data actors, or a plain loop in this process."""
    num_workers: int = 1
    """Actors, one CPU each; one more CPU is left to Ray Data."""
    dry_run: bool = False
    """Say what would be done, and stop."""

    def __post_init__(self) -> None:
        check(self.scale >= 1, "scale", self.scale, "must be at least 1", "use 2, 3, 4 or 8")
        Degradation.parse(self.degradation, self.scale)
        check(
            self.patch >= self.scale and self.patch % self.scale == 0,
            "patch",
            self.patch,
            f"must be a multiple of scale ({self.scale})",
            f"use {max(1, self.patch // self.scale) * self.scale}",
        )
        check(self.max_per_image >= 1, "max_per_image", self.max_per_image, "must be at least 1", "use 1 or more")
        check(0 <= self.seed < 2**63, "seed", self.seed, "must be from 0 to 2^63 - 1", "use 0")
        check(self.num_workers >= 1, "num_workers", self.num_workers, "must be at least 1", "use 1 or more")
        check(self.unit_megabytes > 0, "unit_megabytes", self.unit_megabytes, "must be above 0", "use 64")
        check(self.max_megapixels > 0, "max_megapixels", self.max_megapixels, "must be above 0", "use 100")
        check(0 <= self.max_dead_share <= 1, "max_dead_share", self.max_dead_share, "must be from 0 to 1", "use 0.2")
        for name in ("val_share", "test_share"):
            value = getattr(self, name)
            check(0 <= value < 1, name, value, "must be from 0 to less than 1", "use 0.05")
        both = self.val_share + self.test_share
        check(both < 1, "val_share + test_share", both, "must be below 1", "leave something to train on")

    def recipe(self) -> dict[str, Any]:
        """Return the settings that decide the bytes of the set."""
        running = {"source", "output", "unit_megabytes", "max_dead_share", "retry_failed", "engine", "num_workers"}
        running.add("dry_run")
        recipe = {name: value for name, value in to_mapping(self).items() if name not in running}
        document = json.loads(Degradation.parse(self.degradation, self.scale).to_json())
        if "settings" in document:  # written out: the defaults of another version are another recipe
            recipe["degradation"] = json.dumps({name: document[name] for name in ("name", "settings")})
        return recipe


def make_pairs(config: PairsConfig) -> Summary:
    """Run the job; return its summary. Raises ValueError, LeaseHeld or BudgetExceeded."""
    recipe = config.recipe()
    work = Work(
        source=config.source,
        output=config.output,
        suffixes=SUFFIXES,
        recipe=fingerprint(recipe),
        unit_bytes=int(config.unit_megabytes * 2**20),
        max_dead_share=config.max_dead_share,
        retry_dead=config.retry_failed,
    )
    _refuse_another_recipe(config.output, recipe)
    run_id = new_run_id("pairs")
    if config.dry_run:
        ahead = forecast(work)
        say(f"pairs: {ahead.todo} of {ahead.listed} images would be read, {ahead.todo_bytes / 1e6:.1f} MB")
        return Summary(job="pairs", run_id=run_id, status="planned", inputs=ahead.todo)
    with Lease(config.output, run_id=run_id) as lease:
        outcome = run(
            work,
            make=PairsWorker,
            arguments={"source": config.source, "output": config.output, "recipe": recipe},
            engine=config.engine,
            num_workers=config.num_workers,
            run_id=run_id,
            lease=lease,
            label="pairs",
        )
        manifest = build_manifest(Ledger(config.output), recipe)
        lease.check()
        storage.publish(storage.join(config.output, "manifest.json"), manifest.to_bytes())
    counts = {f"pairs_{split}": float(manifest.num_pairs(split)) for split in SPLITS}
    say(f"pairs: {counts}; manifest {manifest.digest[:12]}")
    return Summary(
        job="pairs",
        run_id=run_id,
        status="done",
        inputs=outcome.inputs,
        done=outcome.done,
        skipped=outcome.skipped,
        dead=outcome.dead,
        unchanged=outcome.unchanged,
        outputs=[storage.join(config.output, "manifest.json")],
        metrics=counts,
    )


def _refuse_another_recipe(output: str, recipe: dict[str, Any]) -> None:
    """Raise ValueError when the output is, or was begun as, a set of other settings."""
    uri = storage.join(output, "manifest.json")
    if not storage.exists(uri):
        if set(Ledger(output).latest()["recipe"].to_pylist()) - {fingerprint(recipe)}:
            raise ValueError(
                f"output ({output}) was begun with another recipe and not finished: choose another --output"
            )
        return
    found = json.loads(storage.read_bytes(uri))["recipe"]
    differing = sorted(name for name in recipe.keys() | found.keys() if recipe.get(name) != found.get(name))
    if differing:
        was = ", ".join(f"{name}={found.get(name)}" for name in differing)
        raise ValueError(f"output ({output}) must be a set of the same recipe; it has {was}: choose another --output")


def build_manifest(ledger: Ledger, recipe: dict[str, Any]) -> Manifest:
    """Return the manifest of what the ledger says is there now.

    A source counts in the shard of its latest receipt; in the shards of its earlier ones it is dropped. A shard that
    was made again is described by its latest receipts.
    """
    ours = fingerprint(recipe)
    rows = [row for row in ledger.rows().to_pylist() if row["status"] == "done" and row["recipe"] == ours]
    latest = {row["key"]: row for row in ledger.latest().to_pylist()}
    made = {row["out_key"]: row for row in rows}
    splits = {name: dict.fromkeys(SPLITS, 0) for name in made}
    dropped: dict[str, set[str]] = {name: set() for name in made}
    for row in rows:
        current = latest[row["key"]]
        if current["status"] != "done" or current["out_key"] != row["out_key"]:
            dropped[row["out_key"]].add(row["key"])
        elif current["order"] == row["order"]:
            for name, value in row["metrics"]:
                split = name.removeprefix("pairs_")
                if split in SPLITS:
                    splits[row["out_key"]][split] += int(value)
    shards = [
        Shard(name=name, bytes=row["out_bytes"], sha256=row["out_sha256"], splits=splits[name],
              dropped_sources=sorted(dropped[name]))
        for name, row in made.items()
    ]  # fmt: skip
    return Manifest(recipe=recipe, shards=[shard for shard in shards if sum(shard.splits.values())])

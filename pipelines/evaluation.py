"""Job 3: a model and its baselines on a frozen data set; rows to Parquet, a summary, a report."""

import io
import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from diffsr_core.checkpoint import model_from_files
from diffsr_core.degradation import DEGRADATIONS
from diffsr_core.upscaler import SamplingRecipe
from pipelines import storage
from pipelines.config import check, fingerprint
from pipelines.engine import say
from pipelines.models import ResolvedModel, resolve
from pipelines.report import markdown_table, write_report
from pipelines.runs import Summary
from pipelines.sampling import check_sampling
from pipelines.scoring import BASELINES, METRICS, Dataset, open_dataset, score_dataset
from pipelines.work import BudgetExceeded

STRIPS = 8


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Score a model and its baselines on a data set. The same evaluation again is read, not computed."""

    model: str = field(metadata={"unit": "REF"})
    """Model: a folder or URI, models:/name@alias or models:/name/version."""
    dataset: str = field(metadata={"unit": "URI"})
    """Folder of HR images, or a pair set."""
    output: str = field(metadata={"unit": "URI"})
    """Where rows.parquet, summary.json, summary.md and report.html are written."""
    split: str = "test"
    """Split of a pair set that is scored."""
    degradation: str = "bicubic"
    """Recipe that makes LR from a folder's HR images."""
    baselines: tuple[str, ...] = ("bicubic", "regression")
    """What the model is compared with: bicubic, regression (the model's own regression network)."""
    sampler: str = field(default="ddim", metadata={"group": "sampling"})
    """Solver of the reverse process."""
    steps: int = 8
    """Network calls per image."""
    seed: int = 0
    """Noise seed."""
    num_threads: int = 1
    """Threads of one network call; part of what decides the bytes."""
    engine: Literal["ray", "local"] = field(default="ray", metadata={"group": "running"})
    """Ray Data actors, or a plain loop in this process."""
    num_workers: int = 1
    """Actors, one CPU each."""
    max_dead_share: float = 0.2
    """Error budget: the job fails (exit 3) when more of the images, and more than one, have no score."""
    limit: int | None = None
    """Score only the first images of the set."""
    dry_run: bool = False
    """Say what would be scored, and stop."""

    def __post_init__(self) -> None:
        check_sampling(self.sampler, self.steps, self.num_threads, seed=self.seed)
        check(self.degradation in DEGRADATIONS, "degradation", self.degradation,
              f"must be one of {', '.join(sorted(DEGRADATIONS))}", "use one of them")  # fmt: skip
        for name in self.baselines:
            check(name in BASELINES, "baselines", name, f"must be among {', '.join(BASELINES)}", "leave it out")
        check(self.num_workers >= 1, "num_workers", self.num_workers, "must be at least 1", "use 1 or more")
        check(0 <= self.max_dead_share <= 1, "max_dead_share", self.max_dead_share, "must be from 0 to 1", "use 0.2")
        check(self.limit is None or self.limit >= 1, "limit", self.limit, "must be at least 1", "leave it out for all")

    def recipe(self) -> SamplingRecipe:
        """Return the sampling recipe."""
        return SamplingRecipe(sampler=self.sampler, num_steps=self.steps, seed=self.seed, num_threads=self.num_threads)


def evaluate(config: EvaluateConfig) -> Summary:
    """Run the job; return its summary. Raises ValueError or BudgetExceeded."""
    from pipelines import tracking

    model = resolve(config.model)
    network, document = model_from_files(model.files)
    dataset = open_dataset(
        config.dataset,
        split=config.split,
        degradation=config.degradation,
        scale=network.config.scale,
        limit=config.limit,
    )
    recipe = config.recipe()
    identity = fingerprint(
        {"model": model.digest, "data": dataset.digest, "recipe": asdict(recipe), "baselines": list(config.baselines)}
    )
    uri = storage.join(config.output, "summary.json")
    if storage.exists(uri):
        found = json.loads(storage.read_bytes(uri))
        if found["identity"] == identity:
            say(f"evaluate: nothing to do, {model.label} was scored on these {len(dataset.items)} images")
            return Summary(job="evaluate", run_id=found["run_id"], status="done", unchanged=len(dataset.items),
                           outputs=found["outputs"], metrics=found["metrics"])  # fmt: skip
    say(f"evaluate: {model.label} on {len(dataset.items)} images, {recipe.sampler} {recipe.num_steps} steps")
    if config.dry_run:
        return Summary(job="evaluate", run_id="none", status="planned", inputs=len(dataset.items))
    tracking.connect()  # before the work: a store that is not there is better known at once
    rows = score_dataset(
        dataset,
        model,
        recipe,
        baselines=config.baselines,
        output=config.output,
        engine=config.engine,
        num_workers=config.num_workers,
        label="evaluate",
        num_strips=STRIPS,
    )
    metrics, table = summarise(rows, [*config.baselines, "model"])
    say(table)
    if storage.exists(uri):
        storage.delete(uri)  # of another evaluation, whose files are now replaced
    outputs = _write(config, model, dataset, rows, table, metrics, document)
    dead = sum(bool(row["reason"]) for row in rows)
    if dead > max(1, config.max_dead_share * len(rows)):  # one bad file never fails a job (law 1)
        raise BudgetExceeded(
            f"images without a score ({dead} of {len(rows)}) must stay within max_dead_share "
            f"({config.max_dead_share}); read their reasons in {outputs[0]}, mend the cause, then evaluate again",
            {"inputs": len(rows), "done": len(rows) - dead, "skipped": 0, "dead": dead},
        )
    if not metrics:
        raise ValueError(f"dataset ({config.dataset}) must hold at least one readable image; see the reason: {rows}")
    params = {**asdict(config), "model_digest": model.digest}
    with tracking.run(f"evaluate {model.label}", params=params) as run_id:
        tracking.log_evaluation(metrics, digest=dataset.digest, source=config.dataset, artifacts=outputs)
    summary = {"identity": identity, "run_id": run_id, "outputs": outputs, "metrics": metrics}
    storage.publish(uri, json.dumps(summary, indent=1).encode())  # last: an evaluation without it did not end
    return Summary(job="evaluate", run_id=run_id, status="done", inputs=len(rows),
                   done=len(rows) - dead, dead=dead, outputs=outputs, metrics=metrics)  # fmt: skip


def summarise(rows: list[dict[str, Any]], methods: list[str]) -> tuple[dict[str, float], str]:
    """Return (means by `<method>_<metric>` over the scored rows, a Markdown table)."""
    scored = [row for row in rows if not row["reason"]]
    if not scored:
        return {}, ""
    means = {
        f"{method}_{name}": sum(row[f"{method}_{name}"] for row in scored) / len(scored)
        for method in methods
        for name in METRICS
    }
    means["seconds_per_image"] = sum(row["seconds"] for row in scored) / len(scored)
    return means, markdown_table(means, methods, METRICS)


def _write(
    config: EvaluateConfig,
    model: ResolvedModel,
    dataset: Dataset,
    rows: list[dict[str, Any]],
    table: str,
    metrics: dict[str, float],
    document: dict[str, Any],
) -> list[str]:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    scored = {row["key"] for row in rows if not row["reason"]}
    strips = [
        (item.key, storage.read_bytes(storage.join(config.output, "strips", f"{index:02d}.png")))
        for index, item in enumerate(dataset.items[:STRIPS])
        if item.key in scored
    ]
    report = write_report(
        title=f"Evaluation of {model.label}",
        methods=[*config.baselines, "model"],
        metrics=metrics,
        rows=rows,
        strips=strips,
        ledger=[],
        provenance={
            "model": f"{model.label}, digest {model.digest[:16]}, preset {document['preset']}",
            "data": f"{config.dataset}, {len(dataset.items)} images, digest {dataset.digest[:16]}",
            "sampling": json.dumps(asdict(config.recipe())),
        },
    )
    files = {"rows.parquet": sink.getvalue(), "summary.md": table.encode(), "report.html": report.encode()}
    for name, data in files.items():
        storage.publish(storage.join(config.output, name), data)
    return [storage.join(config.output, name) for name in files]

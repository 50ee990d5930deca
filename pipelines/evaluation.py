"""Job 3: a model and its baselines on a frozen data set; rows to Parquet, a summary, a report."""

import io
import json
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from diffsr_core.checkpoint import model_from_files
from diffsr_core.degradation import Degradation
from diffsr_core.sampler import SAMPLERS
from diffsr_core.sampling import SamplingRecipe
from diffsr_core.schedule import GRIDS
from pipelines import storage
from pipelines.config import check, fingerprint
from pipelines.engine import say
from pipelines.models import ResolvedModel, resolve
from pipelines.report import markdown_table, write_report
from pipelines.runs import Summary
from pipelines.sampling import SamplingConfig
from pipelines.scoring import BASELINES, METRICS, Dataset, open_dataset, score_dataset
from pipelines.searching import SEARCH_FILES, candidates_of, search_schedule
from pipelines.work import BudgetExceeded

STRIPS = 8


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(SamplingConfig):
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
    """Recipe that makes LR from a folder's HR images: a name or JSON, as for make_pairs."""
    baselines: tuple[str, ...] = ("bicubic", "regression")
    """What the model is compared with: bicubic, regression (the model's own regression network)."""
    search_steps: tuple[int, ...] = field(default=(), metadata={"group": "schedule search"})
    """Numbers of steps to try, on the split val of a pair set; the best schedule found is then evaluated."""
    search_samplers: tuple[str, ...] = ("ddim", "dpmpp-2m")
    """Samplers to try."""
    search_grids: tuple[str, ...] = ("uniform", "log_snr", "karras")
    """Families of noise levels to try."""
    objective: str = "psnr_y"
    """What the search maximises: psnr, ssim, psnr_y, ssim_y or lr_psnr."""
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
        super().__post_init__()
        Degradation.parse(self.degradation, 2)  # the scale is the model's, not known yet
        for name in self.baselines:
            check(name in BASELINES, "baselines", name, f"must be among {', '.join(BASELINES)}", "leave it out")
        check(
            self.objective in METRICS, "objective", self.objective, f"must be one of {', '.join(METRICS)}", "use psnr_y"
        )
        for name, known in (("search_samplers", SAMPLERS), ("search_grids", GRIDS)):
            for value in getattr(self, name):
                check(value in known, name, value, f"must be among {', '.join(known)}", "leave it out")
        for number in self.search_steps:
            check(number >= 1, "search_steps", number, "must be at least 1 each", "use 4,8,16")
        candidates_of(self.search_samplers, self.search_grids, self.search_steps or (1,))
        check(self.num_workers >= 1, "num_workers", self.num_workers, "must be at least 1", "use 1 or more")
        check(0 <= self.max_dead_share <= 1, "max_dead_share", self.max_dead_share, "must be from 0 to 1", "use 0.2")
        check(self.limit is None or self.limit >= 1, "limit", self.limit, "must be at least 1", "leave it out for all")


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
    recipe, baselines = config.sampling(), config.baselines
    if "regression" in baselines and not network.config.encoder.regresses:
        say(f"evaluate: {model.label} has no regression network of its own, so that baseline is left out")
        baselines = tuple(name for name in baselines if name != "regression")
    methods = [*baselines, "model"]
    candidates = candidates_of(config.search_samplers, config.search_grids, config.search_steps)
    if candidates and network.denoiser is None:
        raise ValueError(f"model ({model.label}) is a regression, it has no schedule; leave out --search-steps")
    for tried in [replace(recipe, **asdict(choice)) for choice in candidates] or [recipe]:
        tried.check_fits(network.config)  # before any work is planned
    identity = fingerprint(
        {
            "model": model.digest,
            "data": dataset.digest,
            "recipe": asdict(recipe),
            "baselines": list(baselines),
            "search": [config.objective, *(asdict(choice) for choice in candidates)] if candidates else [],
        }
    )
    uri = storage.join(config.output, "summary.json")
    if storage.exists(uri):
        found = json.loads(storage.read_bytes(uri))
        if found["identity"] == identity:
            say(f"evaluate: nothing to do, {model.label} was scored on these {len(dataset.items)} images")
            return Summary(job="evaluate", run_id=found["run_id"], status="done", unchanged=len(dataset.items),
                           outputs=found["outputs"], metrics=found["metrics"])  # fmt: skip
    how = f"searching {len(candidates)} schedules" if candidates else f"{recipe.sampler} {recipe.num_steps} steps"
    say(f"evaluate: {model.label} on {len(dataset.items)} images, {how}")
    if config.dry_run:
        return Summary(job="evaluate", run_id="none", status="planned", inputs=len(dataset.items))
    tracking.connect()  # before the work: a store that is not there is better known at once
    if candidates:
        recipe = search_schedule(
            candidates,
            _held_out(config, dataset, network.config.scale),
            model,
            recipe,
            objective=config.objective,
            output=config.output,
            engine=config.engine,
            num_workers=config.num_workers,
        )
    rows = score_dataset(
        dataset,
        model,
        recipe,
        baselines=baselines,
        output=config.output,
        engine=config.engine,
        num_workers=config.num_workers,
        label="evaluate",
        num_strips=STRIPS,
    )
    metrics, table = summarise(rows, methods)
    say(table)
    searched = [storage.join(config.output, name) for name in SEARCH_FILES]
    for old in [uri] if candidates else [uri, *searched]:
        if storage.exists(old):
            storage.delete(old)  # of another evaluation, whose files are now replaced
    outputs = _write(config, model, dataset, rows, methods, table, metrics, document, recipe)
    outputs += searched if candidates else []
    dead = sum(bool(row["reason"]) for row in rows)
    if dead > max(1, config.max_dead_share * len(rows)):  # one bad file never fails a job (law 1)
        first = next(row for row in rows if row["reason"])
        raise BudgetExceeded(
            f"images without a score ({dead} of {len(rows)}) must stay within max_dead_share "
            f"({config.max_dead_share}); the first is {first['key']!r}: {first['reason']}, {first['message']}; read "
            f"all of them in {outputs[0]}, mend the cause, then evaluate again",
            {"inputs": len(rows), "done": len(rows) - dead, "skipped": 0, "dead": dead},
        )
    if not metrics:
        raise ValueError(f"dataset ({config.dataset}) must hold at least one readable image; see the reason: {rows}")
    params = {**asdict(config), "model_digest": model.digest, "sampling": asdict(recipe)}
    with tracking.run(f"evaluate {model.label}", params=params) as run_id:
        tracking.log_evaluation(metrics, digest=dataset.digest, source=config.dataset, artifacts=outputs)
    summary = {"identity": identity, "run_id": run_id, "outputs": outputs, "metrics": metrics,
               "sampling": asdict(recipe)}  # fmt: skip
    storage.publish(uri, json.dumps(summary, indent=1).encode())  # last: an evaluation without it did not end
    return Summary(job="evaluate", run_id=run_id, status="done", inputs=len(rows),
                   done=len(rows) - dead, dead=dead, outputs=outputs, metrics=metrics)  # fmt: skip


def _held_out(config: EvaluateConfig, dataset: Dataset, scale: int) -> Dataset:
    """Return what the search looks at: the split val of a pair set, else, said aloud, what is then evaluated."""
    if dataset.split not in ("", "val"):
        with suppress(ValueError):  # it holds no such pairs
            return open_dataset(config.dataset, split="val", degradation="", scale=scale, limit=config.limit)
    say("evaluate: the schedule is chosen on the images that are then scored, which flatters it a little")
    return dataset


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
    methods: list[str],
    table: str,
    metrics: dict[str, float],
    document: dict[str, Any],
    recipe: SamplingRecipe,
) -> list[str]:
    sink = io.BytesIO()
    columns = dict.fromkeys(name for row in rows for name in row)  # the first image may be one without a score
    pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in columns}), sink)
    scored = {row["key"] for row in rows if not row["reason"]}
    strips = [
        (item.key, storage.read_bytes(storage.join(config.output, "strips", f"{index:02d}.png")))
        for index, item in enumerate(dataset.items[:STRIPS])
        if item.key in scored
    ]
    report = write_report(
        title=f"Evaluation of {model.label}",
        methods=methods,
        metrics=metrics,
        rows=rows,
        strips=strips,
        ledger=[],
        provenance={
            "model": f"{model.label}, digest {model.digest[:16]}, preset {document['preset']}",
            "data": f"{config.dataset}, {len(dataset.items)} images, digest {dataset.digest[:16]}",
            "sampling": json.dumps(asdict(recipe)),
        },
    )
    files = {"rows.parquet": sink.getvalue(), "summary.md": table.encode(), "report.html": report.encode()}
    for name, data in files.items():
        storage.publish(storage.join(config.output, name), data)
    return [storage.join(config.output, name) for name in files]

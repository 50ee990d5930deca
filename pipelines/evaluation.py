"""Job 3: models and baselines on a frozen data set; rows to Parquet, a summary, a report, a study for people."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any, Literal

from pipelines import gallery, storage
from pipelines.answers import fool_rates, read_answers, to_json, to_markdown
from pipelines.classifiers import Classifier, labels_of
from pipelines.config import check, fingerprint
from pipelines.curve import CURVE_FILES, Curve, measure_curve, store_schedule
from pipelines.datasets import Dataset
from pipelines.engine import say
from pipelines.evaluated import Evaluation, Picture
from pipelines.evaluation_config import EvaluateConfig
from pipelines.evaluation_plan import Plan, dataset_of, planned
from pipelines.measures import MEASURES, set_measures
from pipelines.perceptual import read_reference
from pipelines.report import markdown_table, write_report
from pipelines.runs import Summary
from pipelines.scoring import Contender, Running, Scores, score_dataset, to_parquet
from pipelines.study import write_study
from pipelines.summaries import metrics_of, summarise
from pipelines.work import BudgetExceeded

VERBS = ("run", "fool-rate")
FILES = ("rows.parquet", "summary.md", "report.html")


def evaluate(config: EvaluateConfig, *, verb: str = "run") -> Summary:
    """Run one verb; return its summary. Raises ValueError or BudgetExceeded."""
    return _fool_rate(config) if verb == "fool-rate" else _evaluate(config)


def _evaluate(config: EvaluateConfig) -> Summary:
    plan = planned(config)
    identity, uri, count = plan.identity(config), storage.join(config.output, "summary.json"), len(plan.dataset.items)
    label = plan.model.label
    if storage.exists(uri):
        found = json.loads(storage.read_bytes(uri))
        if found["identity"] == identity:
            say(f"evaluate: nothing to do, {label} was scored on these {count} images")
            return Summary(job="evaluate", run_id=found["run_id"], status="done", unchanged=count,
                           outputs=found["outputs"], metrics=found["metrics"])  # fmt: skip
    how = f"searching {len(plan.candidates)} schedules"
    if not plan.candidates:
        how = f"{plan.recipe.sampler} {plan.recipe.num_steps} steps"
    names = ", ".join([*plan.baselines, *(rival.label for rival, _ in plan.rivals)])
    say(f"evaluate: {label} against {names or 'nothing'} on {count} images, {how}")
    if config.dry_run:
        return Summary(job="evaluate", run_id="none", status="planned", inputs=count)
    from pipelines import tracking

    tracking.connect()  # before the work: a store that is not there is better known at once
    curve = _searched(config, plan) if plan.candidates else None
    plan = replace(plan, recipe=plan.recipe if curve is None else curve.recipe(plan.recipe))
    evaluation, files = _scored(config, plan, curve)
    stored = [store_schedule(plan.model, curve)] if curve is not None and config.store else []
    metrics, intervals = metrics_of(evaluation)
    params = {**asdict(config), "model_digest": plan.model.digest, "sampling": asdict(plan.recipe)}
    with tracking.run(f"evaluate {label}", params=params) as run_id:
        tracking.log_evaluation(
            metrics | intervals, digest=plan.dataset.digest, source=plan.dataset.source, artifacts=files,
            model=plan.model,
        )  # fmt: skip
    outputs = [*files, *stored]
    summary = {"identity": identity, "run_id": run_id, "outputs": outputs, "metrics": metrics, "intervals": intervals,
               "sampling": asdict(plan.recipe), "dataset": plan.dataset.digest}  # fmt: skip
    storage.publish(uri, json.dumps(summary, indent=1).encode())  # last: an evaluation without it did not end
    dead = len({row["key"] for row in evaluation.rows if row["reason"]})
    return Summary(job="evaluate", run_id=run_id, status="done", inputs=count, done=count - dead, dead=dead,
                   outputs=outputs, metrics=metrics)  # fmt: skip


def _searched(config: EvaluateConfig, plan: Plan) -> Curve:
    """Return the curve, measured on the split val of a pair set, else, said aloud, on what is then evaluated."""
    held_out = None
    if plan.dataset.split not in ("", "val"):
        with suppress(ValueError):  # it holds no such pairs
            held_out = dataset_of(config, plan.dataset.scale, split="val")
    if held_out is None:
        say("evaluate: the schedule is chosen on the images that are then scored, which flatters it a little")
    images = held_out or plan.dataset
    return measure_curve(
        plan.candidates, images, plan.model, plan.recipe, measure=config.objective, meter=plan.meter,
        pick=config.pick, labels=_labels(config, images), output=config.output, running=config.running(),
    )  # fmt: skip


def _labels(config: EvaluateConfig, dataset: Dataset) -> dict[str, int] | None:
    """Return the class of each image, None where there is nothing to classify them with, or they have none."""
    if config.classifier is None:
        return None
    whole = dataset_of(replace(config, limit=None), dataset.scale, split=dataset.split)  # a folder's place is its class
    keys, num_classes = [item.key for item in whole.items], Classifier(config.classifier).num_classes
    return labels_of(keys, source_uri=dataset.source, num_classes=num_classes)


def _scored(config: EvaluateConfig, plan: Plan, curve: Curve | None) -> tuple[Evaluation, list[str]]:
    """Score, write the files, and return what was found and their URIs. Raises BudgetExceeded or ValueError."""
    running = config.running()
    contenders, dataset = _contenders(plan, config.output), plan.dataset
    scores = score_dataset(
        dataset, contenders, meter=plan.meter, labels=_labels(config, dataset), label="evaluate", running=running
    )
    shown = gallery.pictures(scores.rows, dataset, contenders, running, seed=config.seed)
    evaluation = _evaluation(config, plan, contenders, scores, shown, curve)
    say(table := markdown_table(evaluation.summary, evaluation.sets, evaluation.methods, evaluation.measures))
    kept = CURVE_FILES if curve is not None else ()
    for name in ("summary.json", "study.html", *CURVE_FILES):
        if name not in kept:
            storage.delete(storage.join(config.output, name))  # of another evaluation, now replaced
    files = _write(config, evaluation, scores, table) + [storage.join(config.output, name) for name in kept]
    _check_dead(config, dataset, scores.rows, files)
    if config.study:
        files.append(_study(config, dataset, contenders, scores, running))
    return evaluation, files


def _contenders(plan: Plan, output: str) -> list[Contender]:
    """Return who is scored: baselines, rivals by names of their own, and the model, last."""
    found = [
        Contender.of(plan.model, plan.recipe, method=name, output=output, regression=True)
        if name == "regression"
        else Contender(method=name)
        for name in plan.baselines
    ]
    taken = {*plan.baselines, "model", "hr"}
    for rival, recipe in plan.rivals:
        name = label = rival.label.rstrip("/").rpartition("/")[2]
        for number in range(2, len(plan.rivals) + 5):
            if name not in taken:
                break
            name = f"{label} {number}"
        taken.add(name)
        found.append(Contender.of(rival, recipe, method=name, output=output))
    return [*found, Contender.of(plan.model, plan.recipe, method="model", output=output)]


def _evaluation(
    config: EvaluateConfig,
    plan: Plan,
    contenders: Sequence[Contender],
    scores: Scores,
    pictures: Sequence[Picture],
    curve: Curve | None,
) -> Evaluation:
    model, dataset = plan.model, plan.dataset
    methods = {each.method: each.method for each in contenders} | {"model": model.label}
    reference = None if config.reference is None else read_reference(config.reference)
    measures = [name for name in MEASURES if any(row.get(name) is not None for row in scores.rows)]
    return Evaluation(
        title=f"Evaluation of {model.label}",
        methods=methods,
        rows=scores.rows,
        measures=measures,
        summary=summarise(scores.rows, list(methods), measures),
        sets=set_measures(scores.features, reference=reference) if scores.features else {},
        pictures=pictures,
        curve=curve,
        provenance={
            "model": f"{model.label}, digest {model.digest[:16]}, preset {plan.preset}",
            "data": f"{config.dataset}, {len(dataset.items)} images, digest {dataset.digest[:16]}",
            "low resolution": dataset.degradation,
            **({"protocol": f"{config.protocol}: {config.preset.source}"} if config.preset else {}),
            "sampling": json.dumps(asdict(plan.recipe)),
        },
    )


def _write(config: EvaluateConfig, evaluation: Evaluation, scores: Scores, table: str) -> list[str]:
    contents = (to_parquet(scores.rows), table.encode(), write_report(evaluation).encode())
    uris = [storage.join(config.output, name) for name in FILES]
    for uri, data in zip(uris, contents, strict=True):
        storage.publish(uri, data)
    return uris


def _check_dead(config: EvaluateConfig, dataset: Dataset, rows: list[dict[str, Any]], outputs: list[str]) -> None:
    """Raise BudgetExceeded where too many images have no score, ValueError where none has one."""
    lost = {row["key"]: row for row in reversed(rows) if row["reason"]}
    if len(lost) > max(1, config.max_dead_share * len(dataset.items)):  # one bad file never fails a job (law 1)
        first = lost[min(lost)]
        raise BudgetExceeded(
            f"images without a score ({len(lost)} of {len(dataset.items)}) must stay within max_dead_share "
            f"({config.max_dead_share}); the first is {first['key']!r}: {first['reason']}, {first['message']}; read "
            f"all of them in {outputs[0]}, mend the cause, then evaluate again",
            {"inputs": len(dataset.items), "done": len(dataset.items) - len(lost), "skipped": 0, "dead": len(lost)},
        )
    if len(lost) == len(dataset.items):
        first = lost[min(lost)]
        raise ValueError(
            f"dataset ({config.dataset}) must hold at least one readable image; {first['key']!r} is not: "
            f"{first['reason']}, {first['message']}"
        )


def _study(
    config: EvaluateConfig, dataset: Dataset, contenders: Sequence[Contender], scores: Scores, running: Running
) -> str:
    """Write the study's page; return its URI."""
    rivals = [each for each in contenders if each.model is not None]
    count = config.study_images + 1  # one is for practice
    found = gallery.trials(scores.rows, dataset, rivals, running, count=count, seed=config.seed)
    title = f"Which is the photograph? {len({trial.key for trial in found})} pairs"
    digest = fingerprint({"data": dataset.digest, "contenders": [asdict(each) for each in rivals]})
    tasks: dict[str, bool | Literal["both"]] = {"unaided": False, "lr-shown": True, "both": "both"}
    page = write_study(
        found, title=title, seed=config.seed, seconds=config.study_seconds, show_lr=tasks[config.study_task],
        digest=digest,
    )  # fmt: skip
    storage.publish(uri := storage.join(config.output, "study.html"), page.encode())
    return uri


def _fool_rate(config: EvaluateConfig) -> Summary:
    """Count the answers of a study's respondents."""
    check(bool(config.answers), "answers", config.answers, "must be given", "use --answers a.json,b.json")
    found = fool_rates(read_answers(list(config.answers)))
    table = to_markdown(found)
    say(table)
    outputs = [storage.join(config.output, name) for name in ("fool_rates.json", "fool_rates.md")]
    if not config.dry_run:
        for uri, text in zip(outputs, (to_json(found), table), strict=True):
            storage.publish(uri, text.encode())
    return Summary(job="evaluate", run_id="none", status="done", inputs=len(config.answers),
                   done=len(config.answers), outputs=[] if config.dry_run else outputs)  # fmt: skip

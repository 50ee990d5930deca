"""Job 3: models and baselines on a frozen data set; rows to Parquet, a summary, a report, a study for people."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any, Literal

from diffsr_core import checkpoint
from pipelines import gallery, provenance, storage
from pipelines.answers import fool_rates, read_answers, to_json, to_markdown
from pipelines.config import check, fingerprint
from pipelines.curve import CURVE_FILES, Curve, measure_curve, store_schedule
from pipelines.engine import say
from pipelines.evaluated import Evaluation, Picture
from pipelines.evaluation_config import EvaluateConfig
from pipelines.evaluation_plan import Plan, dataset_of, labels_for, planned
from pipelines.lease import Lease
from pipelines.measures import MEASURES, files_digest, set_measures
from pipelines.models import ResolvedModel
from pipelines.perceptual import read_reference
from pipelines.report import markdown_table, write_report
from pipelines.runs import Summary, new_run_id
from pipelines.scoring import Contender, Running, Scores, score_dataset, to_parquet
from pipelines.study import write_study
from pipelines.summaries import lost, metrics_of, scored_methods, summarise
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
    if (found := _known(uri, identity)) is not None:
        say(f"evaluate: nothing to do, {label} was scored on these {count} images")
        return Summary(job="evaluate", run_id=found["run_id"], status="done", unchanged=count,
                       outputs=found["outputs"], metrics=found["metrics"])  # fmt: skip
    how = f"searching {len(plan.candidates)} schedules" if plan.candidates else plan.recipe.label
    names = ", ".join([*plan.baselines, *(rival.label for rival, _ in plan.rivals)])
    say(f"evaluate: {label} against {names or 'nothing'} on {count} images, {how}")
    if config.dry_run:
        return Summary(job="evaluate", run_id="none", status="planned", inputs=count)
    from pipelines import tracking

    tracking.connect()  # before the work: a store that is not there is better known at once
    with Lease(config.output, run_id=new_run_id("evaluate")):
        curve = _searched(config, plan) if plan.candidates else None
        plan = replace(plan, recipe=plan.recipe if curve is None else curve.recipe(plan.recipe))
        contenders = _contenders(plan, config.output)
        evaluation, files = _scored(config, plan, contenders, curve)
        stored = [_stored(plan.model, curve)] if curve is not None and config.store else []
        metrics, intervals = metrics_of(evaluation)
        params = {**asdict(config), "model_digest": plan.model.digest, "sampling": asdict(plan.recipe)}
        params |= {"rivals": [rival.digest for rival, _ in plan.rivals]}
        with tracking.run(f"evaluate {label}", params=params) as run_id:
            tracking.log_evaluation(
                metrics | intervals, digest=plan.dataset.digest, source=plan.dataset.source, artifacts=files,
                model=plan.model,
            )  # fmt: skip
        outputs = [*files, *stored]
        summary = {"identity": identity, "run_id": run_id, "outputs": outputs, "metrics": metrics,
                   "intervals": intervals, "sampling": asdict(plan.recipe), "dataset": plan.dataset.digest,
                   "provenance": evaluation.provenance}  # fmt: skip
        storage.publish(uri, json.dumps(summary, indent=1).encode())  # last: without it an evaluation did not end
    dead = len(lost(evaluation.rows))
    return Summary(job="evaluate", run_id=run_id, status="done", inputs=count, done=count - dead, dead=dead,
                   outputs=outputs, metrics=metrics)  # fmt: skip


def _known(uri: str, identity: str) -> dict[str, Any] | None:
    """Return the summary of this very evaluation where all that it wrote is still there."""
    if not storage.exists(uri):
        return None
    try:
        found: dict[str, Any] = json.loads(storage.read_bytes(uri))
        same = found["identity"] == identity and {"run_id", "metrics"} <= found.keys()
        places = [str(place) for place in found["outputs"] if not str(place).startswith("models:/")]
    except (ValueError, KeyError, TypeError) as error:
        say(f"evaluate: {uri} cannot be read ({type(error).__name__}), so what it stood for is done again")
        return None
    return found if same and all(map(storage.exists, places)) else None


def _stored(model: ResolvedModel, curve: Curve) -> str:
    """Store the chosen schedule with the model; return the URI of its file, or the version that has it."""
    place = store_schedule(model, curve)
    return place if place.startswith("models:/") else storage.join(place, checkpoint.SAMPLING)


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
        pick=config.pick, labels=labels_for(config, images), output=config.output, running=config.running(),
    )  # fmt: skip


def _scored(
    config: EvaluateConfig, plan: Plan, contenders: Sequence[Contender], curve: Curve | None
) -> tuple[Evaluation, list[str]]:
    """Score, write the files, and return what was found and their URIs. Raises BudgetExceeded or ValueError."""
    running, dataset = config.running(), plan.dataset
    scores = score_dataset(dataset, contenders, meter=plan.meter, labels=plan.labels, label="evaluate", running=running)
    shown = gallery.pictures(scores.rows, dataset, contenders, running, seed=config.seed)
    evaluation = _evaluation(config, plan, contenders, scores, shown, curve)
    say(table := markdown_table(evaluation.summary, evaluation.sets, evaluation.methods, evaluation.measures))
    kept = CURVE_FILES if curve is not None else ()
    for name in ("summary.json", "study.html", *CURVE_FILES):
        if name not in kept:
            storage.delete(storage.join(config.output, name))  # of another evaluation, now replaced
    files = _write(config, evaluation, scores, table) + [storage.join(config.output, name) for name in kept]
    _check_dead(config, plan, scores.rows, files)
    if config.study:
        files.append(_study(config, plan, contenders, scores, running))
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
            **_origins(plan, contenders),
            "data": f"{config.dataset}, {len(dataset.items)} images, digest {dataset.digest[:16]}",
            "low resolution": dataset.degradation,
            **({"protocol": f"{config.protocol}: {config.preset.source}"} if config.preset else {}),
            "measured with": _files(config),
            "DiffSR": f"{provenance.version()}, commit {provenance.commit()}",
        },
    )


def _origins(plan: Plan, contenders: Sequence[Contender]) -> dict[str, str]:
    """Return where each model of the rows comes from, and how it was sampled."""
    models = {each.method: each for each in contenders if each.model is not None}
    named = dict(zip([name for name in models if name not in ("model", "regression")], plan.rivals, strict=True))
    named["model"] = (plan.model, plan.recipe)
    return {
        name: f"{model.ref}{f' (version {model.version})' if model.version is not None else ''}, digest "
        f"{model.digest[:16]}{f', preset {plan.preset}' if name == 'model' else ''}; {json.dumps(asdict(recipe))}"
        for name, (model, recipe) in named.items()
    }


def _files(config: EvaluateConfig) -> str:
    """Return what measured, and of which files."""
    given = {name: getattr(config, name) for name in ("niqe", "lpips", "classifier", "inception", "reference")}
    files = [f"{name} {path} ({files_digest([path])[:16]})" for name, path in given.items() if path is not None]
    border = config.meter().border
    return ", ".join([f"a border of {'the scale' if border is None else f'{border} px'}", *files])


def _write(config: EvaluateConfig, evaluation: Evaluation, scores: Scores, table: str) -> list[str]:
    contents = (to_parquet(scores.rows), table.encode(), write_report(evaluation).encode())
    uris = [storage.join(config.output, name) for name in FILES]
    for uri, data in zip(uris, contents, strict=True):
        storage.publish(uri, data)
    return uris


def _check_dead(config: EvaluateConfig, plan: Plan, rows: list[dict[str, Any]], outputs: list[str]) -> None:
    """Raise BudgetExceeded where too many images have no score, ValueError where none has one, or none of the model's.

    A rival that gave no image a score is said, and stands in no one's way.
    """
    count, alive = len(plan.dataset.items), scored_methods(rows)
    for method in dict.fromkeys(row["method"] for row in rows if alive and row["method"] not in alive):
        first = next(row for row in rows if row["method"] == method)
        message = f"{method} gave no image a score; {first['key']!r}: {first['reason']}, {first['message']}"
        if method == "model":
            raise ValueError(f"model ({plan.model.label}) must give an image a score; {message}")
        say(f"evaluate: {message}")
    dead = lost(rows)
    counts = {"inputs": count, "done": count - len(dead), "skipped": 0, "dead": len(dead)}
    if len(dead) > max(1, config.max_dead_share * count):  # one bad file never fails a job (law 1)
        worst = dead[min(dead)]
        raise BudgetExceeded(
            f"images without a score ({len(dead)} of {count}) must stay within max_dead_share "
            f"({config.max_dead_share}); the first is {worst['key']!r}, {worst['method']}: {worst['reason']}, "
            f"{worst['message']}; read all of them in {outputs[0]}, mend the cause, then evaluate again",
            counts,
        )
    if len(dead) == count:
        worst = dead[min(dead)]
        raise ValueError(
            f"dataset ({config.dataset}) must hold at least one image that can be scored; {worst['key']!r} is not: "
            f"{worst['reason']}, {worst['message']}"
        )


def _study(
    config: EvaluateConfig, plan: Plan, contenders: Sequence[Contender], scores: Scores, running: Running
) -> str:
    """Write the study's page, of every model and the regression; return its URI.

    Its digest names what respondents see: answers to the same page may be counted together, wherever it was written.
    """
    rivals = [each for each in contenders if each.model is not None]
    count = config.study_images + 1  # one is for practice
    found = gallery.trials(scores.rows, plan.dataset, rivals, running, count=count, seed=config.seed)
    pictures = [
        [trial.key, trial.method, *map(storage.digest_bytes, (trial.lr, trial.sr, trial.hr))] for trial in found
    ]
    asked = {name: getattr(config, name) for name in ("study_seconds", "study_task", "seed")}
    tasks: dict[str, bool | Literal["both"]] = {"unaided": False, "lr-shown": True, "both": "both"}
    page = write_study(
        found, title="Photograph or computer?", seed=config.seed, seconds=config.study_seconds,
        show_lr=tasks[config.study_task], digest=fingerprint({**asked, "pictures": pictures}),
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
    dead = len(found.left_out)
    return Summary(job="evaluate", run_id="none", status="done", inputs=found.num_files, done=found.num_files - dead,
                   dead=dead, outputs=[] if config.dry_run else outputs)  # fmt: skip

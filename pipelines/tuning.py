"""A search over the settings of a training: trials, run by Ray Tune or one after the other, a table, and a winner."""

import json
import math
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipelines import storage
from pipelines.config import check, fingerprint, to_mapping
from pipelines.engine import say
from pipelines.lease import Lease
from pipelines.manifest import Manifest, load_manifest, pinned_uri
from pipelines.models import load_files, publish_files, publish_model, resolve
from pipelines.preflight import check_pairs
from pipelines.ray_tuning import judge_of, run_on_tune, scheduler_of
from pipelines.runs import Summary, TrainingFailed, new_run_id
from pipelines.search_space import FIXED, SearchConfig, Trial, read_search, trial_output, trials_of
from pipelines.training import _register, _run_uri
from pipelines.training_config import TrainConfig
from pipelines.trials import Record, read_record, run_trial, score

SEARCH = "tune_run.json"
TABLE_FILES = ("tune.json", "tune.md")
_OF_IDENTITY = {"checkpoint_every", "val_pairs", "result"}  # settings that no search varies and that decide its table
_SHOWN = 10  # points of a dry run


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table. steps: done by then. metric: None without a report that has it."""

    trial: str
    status: str
    point: dict[str, Any]
    metric: float | None = None
    steps: int = 0
    seconds: float = 0.0
    reason: str = ""
    mlflow_run: str | None = None


def tune(config: TrainConfig) -> Summary:
    """Run the search that config.tune names; return its summary: inputs are trials, skipped those that were stopped.

    The same command again continues: trials with a verdict are left as they are, one that was interrupted goes on from
    its checkpoint, and so does one whose failure was not its own (a store that was away). The winner's model becomes
    that of the output, and is registered by config.register. Raises ValueError, LeaseHeld, and TrainingFailed where no
    trial is done.
    """
    assert config.tune is not None
    search, manifest = read_search(config.tune), load_manifest(config.pairs)
    _check_search(config, search, manifest)
    config = replace(config, pairs=pinned_uri(config.pairs, manifest))
    trials = _with_pairs(trials_of(config, search), manifest)
    _check_stop(config, search, trials)
    _announce(search, trials)
    if config.dry_run:
        return Summary(job="train", run_id="none", status="planned", inputs=len(trials))
    ancestors = {ref: resolve(ref) for ref in _ancestors(trials)}
    identity = _identity(config, search, manifest, {ref: model.digest for ref, model in ancestors.items()})
    with Lease(config.output, run_id=new_run_id("tune")) as lease:
        run = _read_search(config.output, identity)
        before = [name for name, record in _records(trials).items() if record.settled]
        finished = run.get("trials") == [trial.name for trial in trials] and len(before) == len(_possible(trials))
        if not finished:
            pinned = {ref: publish_model(model, config.output) for ref, model in ancestors.items()}
            known = {"identity": identity, **run}
            run = _search(config, search, [_pin(trial, pinned) for trial in trials], manifest, lease=lease, run=known)
        summary, of_winner = Summary(**run["summary"]), replace(config, output=trial_output(config, run["winner"]))
        winner = _read(_run_uri(of_winner.output))  # whose run has logged the model, and registers it
        registered = config.register is not None and _register(of_winner, lease, winner)
        if finished and not registered:
            say(f"tune: nothing to do, all {len(trials)} trials are done")
        summary.outputs.extend(winner["summary"]["outputs"][1:])
    return (
        replace(summary, inputs=0, done=0, skipped=0, dead=0, unchanged=len(trials), seconds=0.0)
        if finished
        else summary
    )


def _read(uri: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(storage.read_bytes(uri)) if storage.exists(uri) else {}
    return found


def _read_search(output: str, identity: str) -> dict[str, Any]:
    """Return what tune_run.json says: identity, mlflow_run and, at the end, trials, winner, summary; {} before."""
    run = _read(storage.join(output, SEARCH))
    if run and run["identity"] != identity or not run and storage.exists(_run_uri(output)):
        raise ValueError(
            f"output ({output}) must belong to the same search, settings and pairs; it is another's: choose another "
            "--output, or, where the set has grown, the one it began with: --pairs SET/manifests/DIGEST.json"
        )
    return run


def _check_search(config: TrainConfig, search: SearchConfig, manifest: Manifest) -> None:
    for name, only in (("num_workers", 1), ("min_workers", None), ("strategy", "ddp")):
        value = getattr(config, name)
        check(value == only, name, value, "cannot be used with --tune, where a trial is one worker",
              "leave it out; max_concurrent of the file is how many trials run at a time")  # fmt: skip
    check(config.engine == "ray" or search.max_concurrent == 1, "max_concurrent", search.max_concurrent,
          "must be 1 with engine local", "use --engine ray")  # fmt: skip
    check(not search.metric.startswith("val_") or manifest.num_pairs("val") > 0, "metric", search.metric,
          "needs pairs in the split val, and the set has none", "make the set with a --val-share above 0")  # fmt: skip
    check("val_lpips" not in search.metric or config.lpips is not None, "metric", search.metric,
          "needs LPIPS's weights", "give --lpips")  # fmt: skip
    of_samples = {"sampler", "grid", "sampling_steps"}
    check(search.metric not in ("loss", "val_loss", "val_x0_error") or not set(search.space) <= of_samples, "metric",
          search.metric, f"must depend on {' and '.join(sorted(search.space))}, and is of no sample",
          "use val_psnr_sample or val_lpips_sample")  # fmt: skip
    odd = {"loss": {"prediction", "loss", "weighting", "preset"}, "val_loss": {"preset"}}.get(search.metric, set())
    if names := sorted(odd & set(search.space)):
        say(f"tune: {search.metric} is not of one kind for every {' and '.join(names)}; val_psnr_sample would be")


def _check_stop(config: TrainConfig, search: SearchConfig, trials: list[Trial]) -> None:
    if search.stop == "asha":
        most = max(trial.recipe().stages[-1].num_steps for trial in _possible(trials).values())
        rule = f"must be below the steps of a trial's last stage ({most}), or asha stops none"
        check(config.checkpoint_every < most, "checkpoint_every", config.checkpoint_every, rule, "use less")
        check((search.grace_steps or 1) < most, "grace_steps", search.grace_steps, rule, "use less")


def _with_pairs(trials: list[Trial], manifest: Manifest) -> list[Trial]:
    """Return the trials, those that these pairs do not suit refused. Raises ValueError when all are refused."""
    refusals: dict[tuple[Any, ...], str] = {}

    def judged(trial: Trial) -> Trial:
        if trial.config is None:
            return trial
        config, recipe = trial.config, trial.config.recipe()
        key = (config.preset, recipe.batch_size, recipe.crop_px)
        if key not in refusals:
            refusals[key] = ""
            try:
                check_pairs(
                    config.pairs, manifest, model=config.model(), preset=key[0], batch_size=key[1], crop_px=key[2]
                )
            except ValueError as error:
                refusals[key] = str(error)
        return replace(trial, config=None, refusal=refusals[key]) if refusals[key] else trial

    trials = [judged(trial) for trial in trials]
    if not _possible(trials):
        raise ValueError(f"space: {trials[0].refusal}")
    return trials


def _possible(trials: list[Trial]) -> dict[str, TrainConfig]:
    return {trial.name: trial.config for trial in trials if trial.config is not None}


def _records(trials: list[Trial]) -> dict[str, Record]:
    return {name: read_record(config.output) for name, config in _possible(trials).items()}


def _ancestors(trials: list[Trial]) -> list[str]:
    found = {ref for config in _possible(trials).values() for ref in (config.init, config.teacher) if ref}
    return sorted(found)


def _pin(trial: Trial, pinned: dict[str, str]) -> Trial:
    """Return the trial with the copies that the search holds of its ancestors: an alias may move meanwhile."""
    if trial.config is None:
        return trial
    changes: dict[str, Any] = {name: pinned.get(getattr(trial.config, name)) for name in ("init", "teacher")}
    return replace(trial, config=replace(trial.config, **changes))


def _identity(config: TrainConfig, search: SearchConfig, manifest: Manifest, digests: dict[str, str]) -> str:
    """Return what a search is; it may be given more trials, and other workers."""
    of_search = {key: value for key, value in to_mapping(search).items() if key not in ("trials", "max_concurrent")}
    of_trials = {key: value for key, value in to_mapping(config).items() if key not in FIXED or key in _OF_IDENTITY}
    return fingerprint({"search": of_search, "settings": of_trials, "data": manifest.digest, "ancestors": digests})


def _announce(search: SearchConfig, trials: list[Trial]) -> None:
    say(f"tune: {len(trials)} trials, {search.direction} {search.metric}" + (", asha" if search.stop == "asha" else ""))
    for trial in trials[:_SHOWN]:
        say(f"tune: {trial.name} {_shown(trial.point)}" + (f" (refused: {trial.refusal})" if trial.refusal else ""))
    if len(trials) > _SHOWN:
        say(f"tune: and {len(trials) - _SHOWN} more")


def _shown(point: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in point.items())


def _search(
    config: TrainConfig,
    search: SearchConfig,
    trials: list[Trial],
    manifest: Manifest,
    *,
    lease: Lease,
    run: dict[str, Any],
) -> dict[str, Any]:
    """Run what has no verdict, publish table and winner; return tune_run.json with its summary, published last."""
    import mlflow

    from pipelines import tracking

    tracking.connect()
    uri, started = storage.join(config.output, SEARCH), time.monotonic()
    params = {**to_mapping(search), "preset": config.preset, "data_digest": manifest.digest}
    with tracking.run(f"search {config.preset}", run_id=run.get("mlflow_run"), params=params) as run_id:
        run = {**run, "mlflow_run": run_id}
        lease.check()
        storage.publish(uri, json.dumps(run).encode())
        configs, records = _possible(trials), _records(trials)
        _run(config, search, configs, records, parent_run=run_id, lease=lease)
        rows = _rows(search, trials)
        new = [row.status for row in rows if not (row.trial in records and records[row.trial].settled)]
        best = rows[0]
        lease.check()
        table = _publish_table(config.output, search, rows, manifest)
        say(table)
        _log(rows, config.output)
        if best.status != "done":
            raise TrainingFailed(f"all {len(rows)} trials failed, the first: {best.reason}")
        winner, model_uri = trial_output(config, best.trial), storage.join(config.output, "model")
        metrics = _read(_run_uri(winner))["summary"]["metrics"]
        mlflow.log_metrics(metrics | {f"best_{search.metric}": best.metric})
        mlflow.set_tags({f"best.{name}": str(value) for name, value in {"trial": best.trial, **best.point}.items()})
        lease.check()
        publish_files(model_uri, load_files(storage.join(winner, "model")))
    summary = Summary(
        job="train",
        run_id=run_id,
        status="done",
        inputs=len(new),
        done=new.count("done"),
        skipped=new.count("stopped"),
        dead=new.count("failed"),
        unchanged=len(rows) - len(new),
        seconds=round(time.monotonic() - started, 3),
        outputs=[model_uri],
        metrics=metrics,
    )
    run |= {"trials": [trial.name for trial in trials], "winner": best.trial}
    run["summary"] = {name: value for name, value in asdict(summary).items() if name != "exit_code"}
    lease.check()
    storage.publish(uri, json.dumps(run).encode())
    return run


def _run(
    config: TrainConfig,
    search: SearchConfig,
    configs: dict[str, TrainConfig],
    records: dict[str, Record],
    *,
    parent_run: str,
    lease: Lease,
) -> None:
    """Run the trials that have no verdict. The plain loop ends at an exception that is none; Ray Tune goes on."""
    missing = {name: trial for name, trial in configs.items() if not records[name].settled}
    scheduler = scheduler_of(search, configs, records)
    if config.engine == "ray" and missing:
        run_on_tune(missing, search, config=config, scheduler=scheduler, parent_run=parent_run, watch=lease.check)
        return
    for name, trial in missing.items():
        lease.check()
        say(f"tune: trial {name} begins")
        run_trial(trial, search.metric, parent_run=parent_run, judge=judge_of(scheduler, name))
        say(f"tune: trial {name} is {read_record(trial.output).status}")


def _rows(search: SearchConfig, trials: list[Trial]) -> list[Row]:
    """Return the table: done trials best first, then the stopped, then the failed; of equal ones the first drawn."""
    sign = 1 if search.direction == "min" else -1

    def place(row: Row) -> tuple[int, float]:
        return ["done", "stopped", "failed"].index(row.status), math.inf if row.metric is None else sign * row.metric

    return sorted((_row(search, trial) for trial in trials), key=place)


def _row(search: SearchConfig, trial: Trial) -> Row:
    if trial.config is None:
        return Row(trial=trial.name, status="failed", point=trial.point, reason=trial.refusal)
    record, uri = read_record(trial.config.output), _run_uri(trial.config.output)
    return Row(
        trial=trial.name,
        status=record.status if record.settled else "failed",
        point=trial.point,
        metric=score(trial.config, search.metric, record.reports),
        steps=int(record.reports[-1]["step"]) if record.reports else 0,
        seconds=record.seconds,
        reason=record.reason if record.settled else record.reason or "its worker ended without a word",
        mlflow_run=_read(uri).get("mlflow_run"),
    )


def _publish_table(output: str, search: SearchConfig, rows: list[Row], manifest: Manifest) -> str:
    """Write tune.json and tune.md; return the latter."""
    names = list(search.space)
    lines = [
        f"| {' | '.join(['trial', *names, search.metric, 'steps', 'seconds', 'status'])} |",
        "|---|" + "---|" * len(names) + "---:|---:|---:|---|",
    ]
    for row in rows:
        values = [str(row.point[name]) for name in names]
        metric = "" if row.metric is None else f"{row.metric:.5g}"
        status = f"{row.status}: {row.reason}" if row.reason else row.status
        cells = [row.trial, *values, metric, str(row.steps), f"{row.seconds:.1f}", status]
        lines.append(f"| {' | '.join(' '.join(cell.split()).replace('|', '/') for cell in cells)} |")
    table = "\n".join(lines) + "\n"
    document = {
        "metric": search.metric,
        "mode": search.direction,
        "data": manifest.digest,
        "trials": [asdict(row) for row in rows],
    }
    for name, text in zip(TABLE_FILES, (json.dumps(document, indent=1), table), strict=True):
        storage.publish(storage.join(output, name), text.encode())
    return table


def _log(rows: list[Row], output: str) -> None:
    """Log the table to the search's run, and mark the runs of stopped trials, which failed at nothing."""
    import mlflow

    for name in TABLE_FILES:
        mlflow.log_text(storage.read_bytes(storage.join(output, name)).decode(), name)
    for status in ("done", "stopped", "failed"):
        mlflow.log_metric(f"trials_{status}", sum(row.status == status for row in rows))
    for row in rows:
        if row.status == "stopped" and row.mlflow_run:
            mlflow.MlflowClient().set_terminated(row.mlflow_run, "KILLED")

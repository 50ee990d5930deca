"""Job 5: a bucket and a registered model become an upscaled bucket, every asset accounted for, once."""

import os
import time
from functools import partial
from typing import Any

import torch
from fsspec.implementations.local import LocalFileSystem

from diffsr_core.checkpoint import model_from_files
from diffsr_core.family import SuperResolver
from diffsr_core.sampling import SamplingRecipe
from pipelines import storage, upkeep
from pipelines.assets import UpscaleWorker
from pipelines.calibration import seconds_per_megapixel
from pipelines.config import check, fingerprint
from pipelines.engine import check_engine, say
from pipelines.forecast import calibrate, forecast_night
from pipelines.images import SUFFIXES
from pipelines.lease import Lease
from pipelines.ledger import Ledger, list_table
from pipelines.models import ResolvedModel, publish_model, resolve
from pipelines.night import Night, account, one_line, publish_night, track_night
from pipelines.probe import megapixels_at
from pipelines.runs import Summary, check_tracking, new_run_id
from pipelines.stopping import Stop
from pipelines.upscaling_config import UpscaleConfig
from pipelines.work import BudgetExceeded, Outcome, Work, forecast, run

VERBS = ("run", "plan", "status", "verify", "retry-failed", "gc")


def upscale(config: UpscaleConfig, *, verb: str = "run") -> Summary:
    """Run one verb; return its summary. Raises ValueError, LeaseHeld or BudgetExceeded."""
    if config.source is not None:
        _check_apart(config.source, config.output)
    if verb == "status":
        return upkeep.status(config.output)
    if verb == "verify":
        return upkeep.verify(config.output, dry_run=config.dry_run, quick=config.quick)
    if verb == "gc":
        keys = None if config.source is None else list_table(config.source, suffixes=SUFFIXES)["key"]
        return upkeep.gc(config.output, delete=config.delete and not config.dry_run, source_keys=keys)
    if config.source is None:
        raise ValueError("source (None) must be given; use --source URI")
    check_engine(config.engine, config.num_workers)
    if config.track and verb != "plan" and not config.dry_run:
        check_tracking()
    model = resolve(config.model)
    network, _ = model_from_files(model.files)
    sampling = config.sampling(model.sampling)
    sampling.check_fits(network.config)  # before any work is planned
    work = _work(config, model, retry_dead=verb == "retry-failed")
    say(f"upscale: {model.label}, digest {model.digest[:12]}, {sampling.label}")
    if verb == "plan" or config.dry_run:
        return _plan(config, work, network, sampling)
    return _night(config, work, model)


def _work(config: UpscaleConfig, model: ResolvedModel, *, retry_dead: bool) -> Work:
    assert config.source is not None
    return Work(
        listing=partial(list_table, config.source, suffixes=SUFFIXES),
        output=config.output,
        recipe=fingerprint(config.recipe(model.sampling)),
        model=model.digest,
        unit_bytes=int(config.unit_megabytes * 2**20),
        max_dead_share=config.max_dead_share,
        retry_dead=retry_dead,
        only_failed=retry_dead,
        limit=config.limit,
        include=config.include,
        exclude=config.exclude,
    )


def _plan(config: UpscaleConfig, work: Work, network: SuperResolver, sampling: SamplingRecipe) -> Summary:
    """Say what a night would do and take; write nothing."""
    ahead = forecast(work)
    scale, source = network.config.scale, str(config.source)

    def output_megapixels(row: dict[str, Any]) -> float | None:
        found = megapixels_at(storage.join(source, row["key"])) if ".." not in row["key"].split("/") else None
        return None if found is None else found * scale**2

    def measure() -> float:
        check(config.device == "cpu" or torch.cuda.is_available(), "use_gpu", config.use_gpu,
              "cannot be measured here, which has none, and the ledger has too few results yet",
              "run a night with --limit 10 first, or plan without it")  # fmt: skip
        return seconds_per_megapixel(network, sampling, device=config.device)

    found = forecast_night(
        ahead.rows,
        megapixels_of=output_megapixels,
        calibration=calibrate(config.output, recipe=work.recipe, model=work.model, measure=measure),
        num_workers=config.num_workers,
        device_hour_price=config.device_hour_price,
    )
    megabytes = ahead.todo_bytes / 1e6
    say(f"upscale: {ahead.todo:,} of {ahead.listed:,} assets are to do, {megabytes:,.1f} MB ({ahead.reasons})")
    say(f"upscale: {found.text}")
    metrics = {f"{reason}_assets": float(count) for reason, count in ahead.counts.items()}
    metrics |= {"source_bytes": float(ahead.todo_bytes), **found.metrics}
    return Summary(job="upscale", run_id="none", status="planned", inputs=ahead.todo, unchanged=ahead.unchanged,
                   metrics=metrics)  # fmt: skip


def _night(config: UpscaleConfig, work: Work, model: ResolvedModel) -> Summary:
    """Do the work under the lease, and leave its account: ledger, report, MLflow run."""
    run_id, started = new_run_id("upscale"), time.monotonic()
    with Lease(config.output, run_id=run_id) as lease, Stop(max_hours=config.max_hours) as stop:

        def report(outcome: Outcome) -> Night:
            rows = Ledger(config.output).of_run(run_id, fence=lease.fence)
            night = account(
                rows,
                run_id=run_id,
                source=str(config.source),
                output=config.output,
                unchanged=outcome.unchanged,
                stopped=outcome.stopped,
                left=outcome.left,
                seconds=time.monotonic() - started,
                num_workers=config.num_workers,
                device_hour_price=config.device_hour_price or None,
                recipe=work.recipe,
                model={"name": model.name or model.ref, "version": model.version or "", "digest": model.digest},
                settings=config.recipe(model.sampling),
            )
            publish_night(night, rows)
            say(one_line(night))
            if config.track:
                track_night(night)
            return night

        try:
            outcome = run(
                work,
                make=UpscaleWorker,
                arguments=_arguments(config, model, fence=lease.fence),
                engine=config.engine,
                num_workers=config.num_workers,
                use_gpu=config.use_gpu,
                run_id=run_id,
                lease=lease,
                label="upscale",
                stop=stop,
            )
        except BudgetExceeded as error:
            if error.outcome is not None and error.outcome.inputs:
                report(error.outcome)
            raise
        if not outcome.inputs:  # nothing is written, and the ledger is not read again
            night, outputs = None, [config.output]
        else:
            night = report(outcome)
            outputs = [config.output, storage.join(night.folder, "night.html")]
    metrics = {} if night is None else night.numbers()
    return Summary(
        job="upscale",
        run_id=run_id,
        status="stopped" if outcome.stopped else "done",
        inputs=outcome.inputs,
        done=outcome.done,
        skipped=outcome.skipped,
        dead=outcome.dead,
        unchanged=outcome.unchanged,
        outputs=outputs,
        metrics=metrics,
    )


def _arguments(config: UpscaleConfig, model: ResolvedModel, *, fence: int) -> dict[str, Any]:
    return {
        "source": config.source,
        "output": config.output,
        "fence": fence,
        "model_uri": publish_model(model, config.output),
        "model": model.digest,
        "recipe": config.recipe(model.sampling),
        "in_flight": config.batch_size or 0,
        "device": config.device,
        "admission": config.admission(),
        "memory_share": 0.5 / config.num_workers,
    }


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

"""Job 2: pairs -> a trained and registered model. Ray Train carries the core's loop; the same loop runs alone."""

import json
import time
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np

from diffsr_core import presets
from diffsr_core.checkpoint import CONFIG
from diffsr_core.family import ModelConfig
from diffsr_core.memory import plan_memory
from diffsr_core.recipe import TrainingRecipe
from diffsr_core.training import DivergedError
from pipelines import storage
from pipelines.ancestry import inherited
from pipelines.blobs import encode_blob
from pipelines.checkpoints import best_files, newest_files, newest_step
from pipelines.config import check, fingerprint
from pipelines.engine import say
from pipelines.feeding import feed_in_thread
from pipelines.lease import Lease
from pipelines.loop import train_loop
from pipelines.manifest import Manifest, load_manifest, pinned_uri
from pipelines.models import MODEL_FILES, publish_files, publish_model, resolve
from pipelines.perceptual import load_lpips
from pipelines.preflight import allowed_consistency, check_pairs
from pipelines.reader import PairReader, read_indices
from pipelines.runs import Summary, TrainingFailed, new_run_id
from pipelines.training_config import TrainConfig
from pipelines.worker import LoopConfig, Report, Workers

_REMEDIES = ("micro_batch", "on_spike", "spike_factor", "max_skipped_steps")


def train(config: TrainConfig, *, parent_run: str | None = None, watch: Report | None = None) -> Summary:
    """Run the job; return its summary. Raises ValueError, LeaseHeld or TrainingFailed, also for a loss that diverges.

    Training ends with a logged model and a summary in run.json; to register it is a step of its own, done once for
    each name, also later by the same command with --register. parent_run: MLflow run of a search that this is a trial
    of; watch: is given every report too, and what it raises ends the training.
    """
    if config.tune is not None:
        from pipelines.tuning import tune

        return tune(config)
    manifest, recipe, model = load_manifest(config.pairs), config.recipe(), config.model()
    config = replace(config, pairs=pinned_uri(config.pairs, manifest))  # a set that grows meanwhile changes nothing
    check_pairs(config.pairs, manifest, model=model, preset=config.preset, batch_size=recipe.batch_size,
                crop_px=recipe.crop_px)  # fmt: skip
    ancestors = {name: resolve(ref) for name in ("init", "teacher") if (ref := getattr(config, name))}
    model = inherited(config, ancestors)
    if config.steps != 0:
        model = replace(model, consistency=allowed_consistency(manifest.recipe))
    _check_validation(config, manifest, model)
    digests = {name: found.digest for name, found in ancestors.items()}
    looks = {**asdict(config.validation()), "val_pairs": config.val_pairs}  # of which the best checkpoint is chosen
    document = {"preset": config.preset, "pairs": manifest.digest, "model": asdict(model),
                "recipe": _what_counts(recipe), "validation": looks, **digests}  # fmt: skip
    if config.dry_run:
        if _read_run(config.output, document).get("summary"):
            say(f"train: nothing to train, all {recipe.num_steps} steps are done")
            return Summary(job="train", run_id="none", status="planned", unchanged=recipe.num_steps)
        _announce(config, manifest, model)
        return Summary(job="train", run_id="none", status="planned", inputs=recipe.num_steps)
    with Lease(config.output, run_id=new_run_id("train")) as lease:
        run = _read_run(config.output, document)
        if not run:
            from pipelines.reporter import unsent_uri

            storage.delete(unsent_uri(config.output))  # of a run that came to nothing
        finished = "summary" in run and run["result"] == config.result
        if not finished:
            _announce(config, manifest, model)
            loop = _loop(config, model, {name: publish_model(x, config.output) for name, x in ancestors.items()})
            known = {
                "digests": digests,
                **run,
                "identity": fingerprint(document),
                "document": document,
                "result": config.result,
                "said": _said(config),
            }
            run = _train(config, manifest, loop, lease, known, parent_run=parent_run, watch=watch)
        registered = config.register is not None and _register(config, lease, run)
        if finished and not registered:
            say(f"train: nothing to do, all {recipe.num_steps} steps are done")
        if finished and run["said"] != _said(config):
            say("train: the card is written: the licences and LPIPS of this command change nothing")
        summary = Summary(**run["summary"])
    if finished:
        return replace(summary, inputs=0, done=0, unchanged=recipe.num_steps, seconds=0.0)
    return summary


def _what_counts(recipe: TrainingRecipe) -> dict[str, Any]:
    """Return the recipe without what may differ between two commands of one run: remedies for memory and for spikes."""
    fields = asdict(recipe)
    return {name: fields[name] for name in fields if name not in _REMEDIES}


def _check_validation(config: TrainConfig, manifest: Manifest, model: ModelConfig) -> None:
    """Raise ValueError for a validation that would fail at the first checkpoint."""
    if model.denoiser is not None:
        config.validation().grid_of(model.schedule)
    empty = not manifest.num_pairs("val")
    check(not (empty and config.result == "best"), "result", config.result,
          "needs validation pairs; the split val holds none", "use last, or another set")  # fmt: skip
    if config.lpips is not None:
        lpips, channels, side = load_lpips(folder=config.lpips), model.encoder.channels, manifest.recipe["patch"]
        check(channels == 3, "lpips", config.lpips, f"is of 3 channels, not {channels}", "leave it out")
        check(side >= lpips.smallest_px, "lpips", config.lpips,
              f"needs patches of {lpips.smallest_px} px, not {side}", "leave it out, or make other pairs")  # fmt: skip


def _said(config: TrainConfig) -> list[str | None]:
    """Return what only the card shows."""
    return [config.licence, config.data_licence, config.lpips]


def _run_uri(output: str) -> str:
    return storage.join(output, "run.json")


def _read_run(output: str, document: dict[str, Any]) -> dict[str, Any]:
    """Return what run.json says: identity, mlflow_run and, when training has ended, summary; {} before the first.

    document: what decides the weights. Raises ValueError for a run of another one.
    """
    if storage.exists(storage.join(output, "tune_run.json")):
        raise ValueError(f"output ({output}) must be a training's; it is a search's: choose another --output")
    uri = _run_uri(output)
    run: dict[str, Any] = json.loads(storage.read_bytes(uri)) if storage.exists(uri) else {}
    if run and run["identity"] != fingerprint(document):
        if "summary" not in run and newest_files(output) is None:
            return {}  # it came to nothing, for want of memory for example: mended, it may begin anew
        raise ValueError(
            f"output ({output}) must belong to the same preset, settings and pairs; it is another run's"
            f"{_difference(run.get('document', {}), document)}: choose another --output, or, where the set has grown, "
            "the one it began with: --pairs SET/manifests/DIGEST.json"
        )
    return run


def _difference(before: dict[str, Any], now: dict[str, Any], path: str = "") -> str:
    """Return the first field that differs, and its two values, in words; nothing where it cannot be told."""
    now = json.loads(json.dumps(now))
    for name in before:
        old, new, place = before[name], now.get(name), f"{path}{name}"
        if isinstance(old, dict) and isinstance(new, dict):
            if found := _difference(old, new, f"{place}."):
                return found
        elif old != new:
            return f" ({place} was {json.dumps(old)}, is {json.dumps(new)})"
    return ""


def _announce(config: TrainConfig, manifest: Manifest, model: ModelConfig) -> None:
    recipe, preset = config.recipe(), presets.get(config.preset)
    parts = ", then ".join(f"{stage.num_steps} steps of {stage.name}" for stage in recipe.stages)
    say(f"train: {config.preset} ({preset.params:,} weights): {parts}; batch {recipe.batch_size}, "
        f"{manifest.num_pairs('train')} pairs")  # fmt: skip
    say(f"train: {preset.note}")
    plan = plan_memory(
        model,
        recipe,
        patch_px=recipe.crop_px or manifest.recipe["patch"],
        world=config.num_workers,
        checkpoint_activations=config.checkpoint_activations,
        sharded=config.strategy == "fsdp2",
        teacher=config.teacher is not None,
        device="cuda" if config.use_gpu else "cpu",
    )
    say(f"train: memory of a worker: {plan.describe()}")


def _loop(config: TrainConfig, model: ModelConfig, ancestors: dict[str, str]) -> LoopConfig:
    return LoopConfig(
        pairs=config.pairs,
        output=config.output,
        preset=config.preset,
        model=model,
        recipe=config.recipe(),
        validation=config.validation(),
        looked_at=None,
        lpips=config.lpips,
        init=ancestors.get("init"),
        teacher=ancestors.get("teacher"),
        data_licence=config.data_licence,
        weights_licence=config.licence,
        checkpoint_every=config.checkpoint_every,
        keep=config.keep,
        log_every=config.log_every,
        max_corrupt_share=config.max_corrupt_share,
        threads=config.threads,
        sharded=config.strategy == "fsdp2",
        compiled=config.compile,
        checkpointed=config.checkpoint_activations,
    )


def _train(
    config: TrainConfig,
    manifest: Manifest,
    loop: LoopConfig,
    lease: Lease,
    run: dict[str, Any],
    *,
    parent_run: str | None,
    watch: Report | None,
) -> dict[str, Any]:
    """Train to the end, publish and log the model; return run.json with its summary, published last."""
    from pipelines import tracking
    from pipelines.reporter import Reporter

    client = tracking.connect()
    recipe, uri = loop.recipe, _run_uri(config.output)
    params = {**asdict(config), **asdict(recipe), **run["digests"], "prediction": loop.model.prediction,
              "weights": presets.get(config.preset).params, "data_digest": manifest.digest}  # fmt: skip
    started, first = time.monotonic(), newest_step(config.output)
    name = f"train {config.preset}"
    with tracking.run(name, run_id=run.get("mlflow_run"), params=params, parent=parent_run) as run_id:
        if "mlflow_run" not in run:
            tracking.log_pairs(config.pairs, manifest, context="training")
        run = {**run, "mlflow_run": run_id}
        lease.check()
        storage.publish(uri, json.dumps(run).encode())
        with Reporter(run_id, recipe.num_steps, output=config.output) as reporter:
            metrics = _run(config, loop, lease, [reporter] if watch is None else [reporter, watch])
        files = (best_files if config.result == "best" else newest_files)(config.output)
        assert files is not None, "the loop ends with a checkpoint"
        files = {name: files[name] for name in MODEL_FILES}
        model_uri = storage.join(config.output, "model")
        lease.check()
        publish_files(model_uri, files)
        lease.check()
        # A run that was killed before its summary may have logged and registered this very model already.
        known = _find_version(client, config, run_id=run_id, digest=json.loads(files[CONFIG])["digest"])
        logged = str(known.source) if known else tracking.log_model(files, example=_example(config, manifest))
    summary = Summary(
        job="train",
        run_id=run_id,
        status="done",
        inputs=recipe.num_steps - first,
        done=recipe.num_steps - first,
        unchanged=first,
        seconds=round(time.monotonic() - started, 3),
        outputs=[model_uri, logged],
        metrics=metrics,
    )
    run["summary"] = {name: value for name, value in asdict(summary).items() if name != "exit_code"}
    run["tags"] = _tags(config, manifest, files, run["digests"])
    lease.check()
    storage.publish(uri, json.dumps(run).encode())
    return run


def _tags(config: TrainConfig, manifest: Manifest, files: dict[str, bytes], digests: dict[str, str]) -> dict[str, str]:
    """Return what the registry says of a version."""
    return {
        "diffsr.preset": config.preset,
        "diffsr.scale": str(manifest.recipe["scale"]),
        "diffsr.pairs_digest": manifest.digest,
        "diffsr.model_digest": json.loads(files[CONFIG])["digest"],
        "diffsr.data_licence": config.data_licence or "not stated",
        **{f"diffsr.{name}_digest": digest for name, digest in digests.items()},
    }


def _register(config: TrainConfig, lease: Lease, run: dict[str, Any]) -> bool:
    """Register the logged model under the name unless this run did; name the version last in the summary's outputs.

    Return whether run.json did not know of it. The registry is asked, as a kill may lie between it and run.json.
    """
    from pipelines import tracking

    assert config.register is not None
    client, before = tracking.connect(), run["summary"]["outputs"]
    lease.check()
    known = _find_version(client, config, run_id=run["mlflow_run"], digest=run["tags"]["diffsr.model_digest"])
    if known is None:
        version = tracking.register_model(before[1], config.register, tags=run["tags"])
    else:
        version = int(known.version)
    entry = f"models:/{config.register}/{version}"
    run["summary"]["outputs"] = [output for output in before if output != entry] + [entry]
    if entry in before:
        return False
    storage.publish(_run_uri(config.output), json.dumps(run).encode())
    say(f"train: registered as {entry}")
    return True


def _find_version(client: Any, config: TrainConfig, *, run_id: str, digest: str) -> Any:
    """Return the version under which this run has registered this very model, or None."""
    from pipelines import tracking

    known = None if config.register is None else tracking.find_version(client, config.register, run_id=run_id)
    return known if known is not None and known.tags.get("diffsr.model_digest") == digest else None


def _example(config: TrainConfig, manifest: Manifest) -> bytes:
    """Return an LR image of the set's size as the logged model takes it: a file of 8 bits."""
    side, channels = manifest.recipe["patch"] // manifest.recipe["scale"], _lr_channels(config)
    ramp = np.linspace(0, 255, side, dtype=np.uint8)
    return encode_blob(np.broadcast_to(ramp[:, None], (side, side, channels)).copy(), "png")


def _lr_channels(config: TrainConfig) -> int:
    return config.model().encoder.lr_channels


def _run(config: TrainConfig, loop: LoopConfig, lease: Lease, takers: list[Report]) -> dict[str, float]:
    """Carry the loop to its end, locally or on Ray Train; return the last value of each metric.

    Each report is accepted under a checked lease. Raises LeaseHeld, TrainingFailed and what the takers raise.
    """
    last: dict[str, float] = {}

    def report(metrics: dict[str, float]) -> None:
        lease.check()
        last.update({name: value for name, value in metrics.items() if name != "step"})
        for take in takers:
            take(metrics)

    manifest = load_manifest(config.pairs)
    splits = ("train", "val") if manifest.num_pairs("val") else ("train",)
    indices = read_indices(config.pairs, manifest, splits)
    if "val" in indices:
        reader = PairReader(config.pairs, manifest, "val", seed=0, index=indices["val"])
        looked_at = reader.batch(range(min(config.val_pairs, reader.num_pairs)), channels=_lr_channels(config))
        loop = replace(loop, looked_at=looked_at)
    if config.engine == "ray":
        from pipelines.ray_training import run_on_ray

        run_on_ray(config, loop, indices["train"], report)
        return last
    workers = Workers(report=report, tell=say, device="cuda" if config.use_gpu else "cpu")
    try:
        train_loop(loop, partial(feed_in_thread, index=indices["train"]), workers)
    except DivergedError as error:
        raise TrainingFailed(f"{error}, in another --output") from error
    return last

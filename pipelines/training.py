"""Job 2: pairs -> a trained and registered model. Ray Train carries the core's step; the same loop runs alone."""

import json
import math
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from diffsr_core import presets
from diffsr_core.degradation import Degradation
from diffsr_core.training import DivergedError, TrainingRecipe
from pipelines import storage
from pipelines.blobs import encode_blob
from pipelines.checkpoints import newest_files, newest_step
from pipelines.config import check, fingerprint
from pipelines.engine import cluster, say
from pipelines.lease import Lease
from pipelines.loop import LoopConfig, Pump, ray_loop, train_loop
from pipelines.manifest import Manifest, load_manifest, pinned_uri
from pipelines.models import MODEL_FILES, publish_files
from pipelines.reader import PairReader
from pipelines.runs import Summary, TrainingFailed, new_run_id
from pipelines.sampling import check_seed


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a preset on a pair set. The same command again continues; when all steps are done it does nothing."""

    pairs: str = field(metadata={"unit": "URI"})
    """Pair set made by make_pairs."""
    output: str = field(metadata={"unit": "URI"})
    """Where checkpoints and the final model folder are kept."""
    preset: str = "nano-x4"
    """Model and recipe; a name with -regression is the twin without a denoiser."""
    steps: int | None = None
    """Steps of the diffusion stage (of the only stage for a regression preset); default: the preset's."""
    encoder_steps: int | None = None
    """Steps of the encoder's own stage before it; default: the preset's."""
    joint: bool = False
    """Train the encoder on in the diffusion stage, by its own loss and the denoiser's, instead of freezing it."""
    batch_size: int | None = None
    """Patches per step over all workers; default: the preset's."""
    precision: Literal["float32", "bf16"] = "float32"
    """Arithmetic of the forward pass."""
    condition_blur: float | None = field(default=None, metadata={"unit": "PIXELS"})
    """Blur of the LR in training, a sigma from 0 to this, for a stage of a cascade; default: the preset's."""
    seed: int = 0
    """Seed of initial weights, order, noise and augmentation."""
    register: str | None = None
    """Name under which the model is registered in MLflow."""
    checkpoint_every: int = field(default=200, metadata={"group": "running"})
    """Steps between checkpoints (each with a validation and a picture)."""
    keep: int = 2
    """Checkpoints kept."""
    log_every: int = 20
    """Steps between metric reports."""
    engine: Literal["ray", "local"] = "ray"
    """Ray Train, or a plain loop in this process."""
    num_workers: int = 1
    """Training workers."""
    cpus_per_worker: float = 1.0
    """Logical CPUs of a worker."""
    use_gpu: bool = False
    """One GPU per worker."""
    max_failures: int = 2
    """Worker failures after which training stops; each resumes from the newest checkpoint."""
    dry_run: bool = False
    """Say what would be trained, and stop."""

    def __post_init__(self) -> None:
        names = presets.names()
        check(self.preset in names, "preset", self.preset, f"must be one of {', '.join(names)}", "use one of them")
        for name in ("steps", "batch_size", "checkpoint_every", "keep", "log_every", "num_workers"):
            value = getattr(self, name)
            check(value is None or value >= 1, name, value, "must be at least 1", "use 1 or more")
        check(self.encoder_steps is None or self.encoder_steps >= 0, "encoder_steps", self.encoder_steps,
              "must be at least 0", "use 0 to skip that stage")  # fmt: skip
        check_seed(self.seed)
        preset = presets.get(self.preset)
        two = len(preset.recipe.stages) > 1
        check(self.encoder_steps is None or two, "encoder_steps", self.encoder_steps,
              f"is of presets with an encoder stage, which {self.preset} has not", "leave it out")  # fmt: skip
        check(not self.joint or two, "joint", self.joint,
              f"needs an encoder and a denoiser to train, which {self.preset} has not", "leave it out")  # fmt: skip
        check(self.encoder_steps != 0 or self.joint, "encoder_steps", self.encoder_steps,
              "would freeze a random encoder", "use 1 or more, or --joint")  # fmt: skip
        check(self.condition_blur is None or 0 <= self.condition_blur <= 10, "condition_blur", self.condition_blur,
              "must be from 0 to 10", "use 0")  # fmt: skip
        check(self.max_failures >= 0, "max_failures", self.max_failures, "must be at least 0", "use 0 or more")
        check(self.cpus_per_worker > 0, "cpus_per_worker", self.cpus_per_worker, "must be above 0", "use 0.5 or 1")
        check(self.engine == "ray" or self.num_workers == 1, "num_workers", self.num_workers,
              "must be 1 with engine local", "use --engine ray")  # fmt: skip
        batch = self.recipe().batch_size
        check(batch % self.num_workers == 0, "batch_size", batch,
              f"must be a multiple of num_workers ({self.num_workers})",
              f"use {math.ceil(batch / self.num_workers) * self.num_workers}")  # fmt: skip

    def recipe(self) -> TrainingRecipe:
        """Return the training recipe: the preset's with what was overridden."""
        recipe = presets.get(self.preset).recipe
        stages = []
        for index, stage in enumerate(recipe.stages):
            last = index == len(recipe.stages) - 1
            wanted = self.steps if last else self.encoder_steps
            stage = stage if wanted is None else replace(stage, num_steps=wanted)
            stage = replace(stage, name="joint") if self.joint and stage.name == "diffusion" else stage
            stages += [stage] if stage.num_steps else []
        return replace(
            recipe,
            stages=tuple(stages),
            batch_size=self.batch_size or recipe.batch_size,
            seed=self.seed,
            precision=self.precision,
            condition_blur_px=recipe.condition_blur_px if self.condition_blur is None else self.condition_blur,
        )


def train(config: TrainConfig) -> Summary:
    """Run the job; return its summary. Raises ValueError, LeaseHeld or TrainingFailed, also for a loss that diverges.

    Training ends with a logged model and a summary in run.json; to register it is a step of its own, done once for
    each name, also later by the same command with --register.
    """
    manifest, recipe = load_manifest(config.pairs), config.recipe()
    config = replace(config, pairs=pinned_uri(config.pairs, manifest))  # a set that grows meanwhile changes nothing
    _check_pairs(config, manifest)
    identity = fingerprint({"preset": config.preset, "recipe": asdict(recipe), "data": manifest.digest})
    if config.dry_run:
        if "summary" in _read_run(config.output, identity):
            say(f"train: nothing to train, all {recipe.num_steps} steps are done")
            return Summary(job="train", run_id="none", status="planned", unchanged=recipe.num_steps)
        _announce(config, manifest)
        return Summary(job="train", run_id="none", status="planned", inputs=recipe.num_steps)
    with Lease(config.output, run_id=new_run_id("train")) as lease:
        run = _read_run(config.output, identity)
        finished = "summary" in run
        if not finished:
            _announce(config, manifest)
            run = _train(config, manifest, lease, {"identity": identity, **run})
        registered = config.register is not None and _register(config, lease, run)
        if finished and not registered:
            say(f"train: nothing to do, all {recipe.num_steps} steps are done")
        summary = Summary(**run["summary"])
    if finished:
        return replace(summary, inputs=0, done=0, unchanged=recipe.num_steps, seconds=0.0)
    return summary


def _run_uri(output: str) -> str:
    return storage.join(output, "run.json")


def _read_run(output: str, identity: str) -> dict[str, Any]:
    """Return what run.json says: identity, mlflow_run and, when training has ended, summary; {} before the first."""
    uri = _run_uri(output)
    run: dict[str, Any] = json.loads(storage.read_bytes(uri)) if storage.exists(uri) else {}
    if run and run["identity"] != identity:
        raise ValueError(
            f"output ({output}) must belong to the same preset, settings and pairs; it is another run's: choose "
            "another --output, or, where the set has grown, the one it began with: --pairs SET/manifests/DIGEST.json"
        )
    return run


def _announce(config: TrainConfig, manifest: Manifest) -> None:
    recipe, preset = config.recipe(), presets.get(config.preset)
    parts = ", then ".join(f"{stage.num_steps} steps of {stage.name}" for stage in recipe.stages)
    say(f"train: {config.preset} ({preset.params:,} weights): {parts}; batch {recipe.batch_size}, "
        f"{manifest.num_pairs('train')} pairs")  # fmt: skip


def _train(config: TrainConfig, manifest: Manifest, lease: Lease, run: dict[str, Any]) -> dict[str, Any]:
    """Train to the end, publish and log the model; return run.json with its summary, published last."""
    from pipelines import tracking

    client = tracking.connect()
    recipe, uri = config.recipe(), _run_uri(config.output)
    params = {**asdict(config), **asdict(recipe), "weights": presets.get(config.preset).params,
              "data_digest": manifest.digest}  # fmt: skip
    started, first = time.monotonic(), newest_step(config.output)
    with tracking.run(f"train {config.preset}", run_id=run.get("mlflow_run"), params=params) as run_id:
        if "mlflow_run" not in run:
            tracking.log_pairs(config.pairs, manifest, context="training")
        run = {**run, "mlflow_run": run_id}
        lease.check()
        storage.publish(uri, json.dumps(run).encode())
        metrics = _run(config, lease, tracking.Reporter(run_id, recipe.num_steps, output=config.output))
        files = newest_files(config.output)
        assert files is not None, "the loop ends with a checkpoint"
        files = {name: files[name] for name in MODEL_FILES}
        model_uri = storage.join(config.output, "model")
        lease.check()
        publish_files(model_uri, files)
        lease.check()
        # A run that was killed before its summary may have logged and registered this very model already.
        known = None if config.register is None else tracking.find_version(client, config.register, run_id=run_id)
        if known is None:
            example = _example(config, manifest)
            logged = tracking.log_model(files, example=example)
        else:
            logged = str(known.source)
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
    lease.check()
    storage.publish(uri, json.dumps(run).encode())
    return run


def _register(config: TrainConfig, lease: Lease, run: dict[str, Any]) -> bool:
    """Register the logged model under the name unless this run did; name the version last in the summary's outputs.

    Return whether run.json did not know of it. The registry is asked, as a kill may lie between it and run.json.
    """
    from pipelines import tracking

    assert config.register is not None
    client, before = tracking.connect(), run["summary"]["outputs"]
    lease.check()
    known = tracking.find_version(client, config.register, run_id=run["mlflow_run"])
    version = tracking.register_model(before[1], config.register) if known is None else int(known.version)
    entry = f"models:/{config.register}/{version}"
    run["summary"]["outputs"] = [output for output in before if output != entry] + [entry]
    if entry in before:
        return False
    storage.publish(_run_uri(config.output), json.dumps(run).encode())
    say(f"train: registered as {entry}")
    return True


def _example(config: TrainConfig, manifest: Manifest) -> bytes:
    """Return an LR image of the set as the logged model takes it: a file of 8 bits."""
    channels = presets.get(config.preset).model.encoder.lr_channels
    _, lr = PairReader(config.pairs, manifest, "train", seed=0).batch(range(1), channels=channels)
    return encode_blob(np.clip(np.round(lr[0]), 0, 255).astype(np.uint8), "png")


def _check_pairs(config: TrainConfig, manifest: Manifest) -> None:
    model = presets.get(config.preset).model
    scale, patch = manifest.recipe["scale"], manifest.recipe["patch"]
    check(
        scale == model.scale,
        "pairs scale",
        scale,
        f"must be that of {config.preset} ({model.scale})",
        "make other pairs",
    )
    stride, least = model.lr_stride * scale, model.lr_smallest * scale
    check(patch % stride == 0 and patch >= least, "pairs patch", patch,
          f"must be a multiple of {stride}, {least} at least, for {config.preset}", "make other pairs")  # fmt: skip
    recipe = manifest.recipe
    made = "twins" if recipe["lr_source"] else Degradation.parse(recipe["degradation"], scale).name
    read = getattr(model.encoder, "kernel", "none")
    if made in ("bicubic", "bilinear") and read in ("bicubic", "bilinear") and made != read:
        say(f"train: the pairs were made by {made}, and {config.preset} enlarges its condition by {read}")
    need = config.recipe().batch_size
    have = manifest.num_pairs("train")
    check(have >= need, "pairs in split train", have, f"must be at least the batch ({need})", "add sources")
    if not manifest.num_pairs("val"):
        say("train: the split val holds no pairs, so nothing is validated while training")


def _run(config: TrainConfig, lease: Lease, reporter: Any) -> dict[str, float]:
    """Carry the loop to its end, locally or on Ray Train; return the last metrics.

    Each report is accepted under a checked lease. Raises LeaseHeld, TrainingFailed and what the reporter raises.
    """

    def report(metrics: dict[str, float]) -> None:
        lease.check()
        reporter(metrics)

    loop = LoopConfig(
        pairs=config.pairs,
        output=config.output,
        preset=config.preset,
        recipe=config.recipe(),
        checkpoint_every=config.checkpoint_every,
        keep=config.keep,
        log_every=config.log_every,
        threads=max(1, int(config.cpus_per_worker)),
    )
    if config.engine == "local":
        try:
            train_loop(loop, rank=0, world=1, device="cuda" if config.use_gpu else "cpu", report=report)
        except DivergedError as error:
            raise TrainingFailed(str(error)) from error
        return dict(reporter.last)
    num_cpus = math.ceil(config.num_workers * config.cpus_per_worker)
    with cluster(num_cpus=num_cpus + 1):
        from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.torch import TorchTrainer
        from ray.util.queue import Queue

        # Reports come to the driver through a queue: only it talks to MLflow, and it shows progress as it comes.
        reports = Queue(actor_options={"num_cpus": 0})
        resources = {"CPU": config.cpus_per_worker} | ({"GPU": 1.0} if config.use_gpu else {})
        scaling = ScalingConfig(num_workers=config.num_workers, use_gpu=config.use_gpu, resources_per_worker=resources)
        trainer = TorchTrainer(
            ray_loop,
            train_loop_config={"loop": loop, "reports": reports},
            scaling_config=scaling,
            run_config=RunConfig(
                name=new_run_id("ray"),
                storage_path=_ray_storage(config.output),
                failure_config=FailureConfig(max_failures=config.max_failures),
            ),
        )
        try:
            with Pump(reports, report):
                trainer.fit()
        except TrainingFailedError as error:
            raise TrainingFailed(f"{error}; the same command continues from the newest checkpoint") from error
    return dict(reporter.last)


def _ray_storage(output: str) -> str:
    uri = storage.join(output, "_diffsr", "ray")
    return uri if "://" in uri else storage.open_filesystem(uri)[1]

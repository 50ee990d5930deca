"""The training loop that every worker runs: resume, batches, the core's step, reports, checkpoints."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from diffsr_core import presets
from diffsr_core.checkpoint import model_files
from diffsr_core.family import SuperResolver
from diffsr_core.training import DivergedError, Trainer, TrainingRecipe
from diffsr_core.validation import validate
from pipelines import storage
from pipelines.blobs import encode_blob
from pipelines.checkpoints import load_newest, save_checkpoint
from pipelines.engine import say
from pipelines.manifest import Manifest, load_manifest
from pipelines.reader import PairReader
from pipelines.runs import TrainingFailed

Report = Callable[[dict[str, float]], None]


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What the loop needs to know; the job's config holds more. threads: intra-operator threads of a CPU worker."""

    pairs: str
    output: str
    preset: str
    recipe: TrainingRecipe
    checkpoint_every: int
    keep: int
    log_every: int
    threads: int


def ray_loop(arguments: dict[str, Any]) -> None:
    """What each Ray Train worker runs: `loop` is a LoopConfig, `reports` a queue to the driver.

    A driver that wants no more of this run has closed the queue: a report then raises, and a restarted worker returns.
    A training that diverges would diverge again, so its message goes to the driver, which closes the queue.
    """
    import ray.train
    import ray.train.torch
    from ray.exceptions import RayActorError

    reports = arguments["reports"]
    try:
        reports.qsize()
    except RayActorError:
        return

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()

    def wrap(module: nn.Module) -> nn.Module:
        if world == 1:
            return module
        ids = [device] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(module, device_ids=ids)

    def report(metrics: dict[str, float]) -> None:
        if rank == 0:
            reports.put(metrics)
        ray.train.report(metrics)

    try:
        train_loop(arguments["loop"], rank=rank, world=world, device=str(device), report=report, wrap=wrap)
    except DivergedError as error:
        reports.put(str(error))
        raise


class Pump(threading.Thread):
    """For the body of a with: hands what the workers put into a queue to `report`, in a thread of the driver.

    What report raises, and a message of a worker that nothing can be gained from a retry, closes the queue (by which
    the workers know that they are to stop) and is raised at the end of the body, in place of what the body raised.
    """

    def __init__(self, reports: Any, report: Report) -> None:
        super().__init__(daemon=True)
        self.reports, self.report = reports, report
        self.error: BaseException | None = None

    def run(self) -> None:
        """Report until None comes."""
        import ray

        try:
            while (item := self.reports.get()) is not None:
                if isinstance(item, str):
                    raise TrainingFailed(item)
                self.report(item)
        except BaseException as error:
            self.error = error
            ray.kill(self.reports.actor)

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *_: object) -> None:
        from ray.exceptions import RayActorError

        with suppress(RayActorError):  # it is closed, or its machine is gone: the thread knows that too
            self.reports.put(None)
        self.join()
        if self.error is not None:
            raise self.error


def train_loop(
    config: LoopConfig,
    *,
    rank: int,
    world: int,
    device: str,
    report: Report,
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
) -> None:
    """Train to the end from the newest whole checkpoint. Rank 0 writes; every rank reports alike (a barrier).

    The reported loss is the mean over this worker's share of the batches since the last report. Where no step is left
    the newest checkpoint's report is made again: it may have been lost with the process that wrote the checkpoint.
    Raises DivergedError.
    """
    manifest, recipe = load_manifest(config.pairs), config.recipe
    torch.manual_seed(recipe.seed)
    model = SuperResolver(presets.get(config.preset).model)
    if device == "cpu":
        torch.set_num_threads(config.threads)
    trainer = Trainer(model, recipe, rank=rank, device=device, wrap=wrap)
    saved = load_newest(config.output)
    if saved is not None:
        trainer.load_state(*saved[:4])
        if rank == 0:
            say(f"train: continues at step {trainer.step}")
        if trainer.done and saved[4]:
            report(saved[4])
    share, channels = recipe.batch_size // world, model.config.encoder.lr_channels
    reader = PairReader(config.pairs, manifest, "train", seed=recipe.seed)
    first, last, size = trainer.step, recipe.num_steps, recipe.batch_size
    batches = prefetch(reader, batch_size=size, first=first, last=last, rank=rank, share=share, channels=channels)
    window = _Window()
    while not trainer.done:
        waiting = time.monotonic()
        hr, lr = next(batches)
        window.waited += time.monotonic() - waiting
        metrics = trainer.train_step(to_tensor(hr), to_tensor(lr))
        window.losses.append(metrics["loss"])
        checkpoint = trainer.step % config.checkpoint_every == 0 or trainer.done
        if checkpoint or trainer.step % config.log_every == 0:
            metrics |= {**window.means(recipe.batch_size), "step": trainer.step}
            if checkpoint and rank == 0:
                metrics = _checkpoint(config, manifest, trainer, metrics)
            report(metrics)
            window = _Window()


class _Window:
    """Means since the last report."""

    def __init__(self) -> None:
        self.started, self.waited = time.monotonic(), 0.0
        self.losses: list[float] = []

    def means(self, batch_size: int) -> dict[str, float]:
        seconds = time.monotonic() - self.started
        return {
            "loss": sum(self.losses) / len(self.losses),
            "images_per_s": len(self.losses) * batch_size / seconds,
            "data_wait_share": self.waited / seconds,
        }


def _checkpoint(
    config: LoopConfig, manifest: Manifest, trainer: Trainer, metrics: dict[str, float]
) -> dict[str, float]:
    """Validate, draw and save; return the metrics with those of the validation. The checkpoint holds them too."""
    metrics = {**metrics, **_validate(config, manifest, trainer)}
    files = model_files(
        trainer.model.config,
        trainer.model.state_dict(),
        trainer.ema,
        preset=config.preset,
        card=_card(config, manifest),
    )
    save_checkpoint(config.output, files, *trainer.state(), metrics=metrics, keep=config.keep)
    return metrics


def _validate(config: LoopConfig, manifest: Manifest, trainer: Trainer) -> dict[str, float]:
    """Validate and draw; return validation metrics."""
    if not manifest.num_pairs("val"):
        return {}
    reader = PairReader(config.pairs, manifest, "val", seed=0)
    channels = trainer.model.config.encoder.lr_channels
    hr, lr = reader.batch(range(min(16, reader.num_pairs)), channels=channels)
    model = SuperResolver(trainer.model.config)
    model.load_state_dict({name: value.cpu() for name, value in trainer.ema.items()})
    stage = trainer.recipe.stage_at(trainer.step - 1)[0].name
    result = validate(model, to_tensor(hr), to_tensor(lr), with_sample=stage != "regression")
    picture = encode_blob(np.concatenate(list(result.strips[:4]), axis=0), "png")
    storage.publish(storage.join(config.output, "samples", f"step-{trainer.step:08d}.png"), picture)
    return result.metrics


def _card(config: LoopConfig, manifest: Manifest) -> str:
    stages = ", ".join(f"{stage.name} {stage.num_steps} steps" for stage in config.recipe.stages)
    return (
        f"# {config.preset}\n\nDiffSR model, scale x{manifest.recipe['scale']}. {presets.get(config.preset).note}.\n\n"
        f"* Data: pair set {manifest.digest}, {manifest.num_pairs('train')} training pairs, "
        f"degradation {manifest.recipe['degradation']}\n* Training: {stages}; batch {config.recipe.batch_size}, "
        f"{config.recipe.precision}, seed {config.recipe.seed}\n"
        "* Output is synthetic detail: a plausible picture, not a measurement.\n"
    )


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """Return float32 (B, C, H, W) in [-1, 1] for uint8 (B, H, W, C)."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def prefetch(
    reader: PairReader,
    *,
    batch_size: int,
    first: int,
    last: int,
    rank: int,
    share: int,
    channels: int = 3,
    ahead: int = 4,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield this rank's slice of the batches of steps first..last-1, decoded ahead in a thread (codecs free the GIL).

    Raises what the reader raised, whatever it was: a thread that died silently would be waited for without end.
    """
    ready: queue.Queue[tuple[np.ndarray, np.ndarray] | BaseException] = queue.Queue(maxsize=ahead)

    def fill() -> None:
        try:
            for step in range(first, last):
                start = step * batch_size + rank * share
                ready.put(reader.batch(range(start, start + share), channels=channels))
        except BaseException as error:
            ready.put(error)

    threading.Thread(target=fill, daemon=True).start()
    for _ in range(first, last):
        item = ready.get()
        if isinstance(item, BaseException):
            raise item
        yield item

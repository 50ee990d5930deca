"""What every training worker does: resume from the newest checkpoint, and feed the core's loop."""

from collections.abc import Callable, Iterator

import torch

from diffsr_core import memory
from diffsr_core.checkpoint import model_from_files
from diffsr_core.family import SuperResolver
from diffsr_core.training import Trainer, TrainerState, fit
from pipelines.ancestry import adopt
from pipelines.checkpoints import load_newest
from pipelines.feeding import FeedConfig
from pipelines.manifest import Manifest, load_manifest
from pipelines.models import load_files
from pipelines.preflight import available_memory, check_memory
from pipelines.reader import Fed
from pipelines.session import Session
from pipelines.worker import LoopConfig, Workers

Feed = Callable[[FeedConfig], Iterator[Fed]]


def train_loop(config: LoopConfig, feed: Feed, workers: Workers) -> None:
    """Train to the end from the newest whole checkpoint. Rank 0 writes; every rank reports alike.

    The reports that led to that checkpoint are made again: they may have been lost with the process that made them.
    Raises DivergedError, TrainingFailed for more damaged rows than allowed, and ValueError.
    """
    manifest, recipe = load_manifest(config.pairs), config.recipe
    if workers.device == "cpu":
        torch.set_num_threads(config.threads)
    _check_memory(config, manifest, workers)
    saved = load_newest(config.output)
    trainer = _trainer(config, workers, state=saved and saved.state)
    session = Session(config, manifest, trainer, workers, saved)
    if saved is not None and workers.rank == 0:
        workers.tell(f"train: continues at step {trainer.step}")
    session.repeat()
    if trainer.done:
        return
    batches = feed(
        FeedConfig(
            pairs=config.pairs,
            split="train",
            seed=recipe.seed,
            channels=config.model.encoder.lr_channels,
            batch_size=recipe.batch_size,
            share=trainer.share,
            first=trainer.step,
            last=recipe.num_steps,
        )
    )
    for metrics in fit(trainer, session.tensors(batches)):
        session.add(metrics)


def _trainer(config: LoopConfig, workers: Workers, *, state: TrainerState | None) -> Trainer:
    """Return the trainer, at its first step, or where the state was taken."""
    torch.manual_seed(config.recipe.seed)
    model, teacher = SuperResolver(config.model), None
    if config.teacher is not None:
        teacher, _ = model_from_files(load_files(config.teacher))
        model.load_state_dict(teacher.state_dict())
    if config.init is not None and state is None:
        adopt(model, model_from_files(load_files(config.init))[0])
    trainer = Trainer(
        model,
        config.recipe,
        rank=workers.rank,
        world=workers.world,
        device=workers.device,
        wrap=workers.wrap,
        teacher=teacher,
        sharded=config.sharded,
        compiled=config.compiled,
        checkpointed=config.checkpointed,
    )
    if state is not None:
        trainer.load_state(state)
    return trainer


def _check_memory(config: LoopConfig, manifest: Manifest, workers: Workers) -> None:
    plan = memory.plan_memory(
        config.model,
        config.recipe,
        patch_px=config.recipe.crop_px or manifest.recipe["patch"],
        world=workers.world,
        checkpoint_activations=config.checkpointed,
        sharded=config.sharded,
        teacher=config.teacher is not None,
        device="cpu" if workers.device == "cpu" else "cuda",
    )
    gpu = workers.device != "cpu"
    available, where = available_memory(gpu)
    if workers.local_world > 1 and not gpu:
        available, where = available // workers.local_world, f"one of {workers.local_world} workers on {where}"
    flags = {
        "--checkpoint-activations": config.checkpointed,
        "--strategy fsdp2": config.sharded,
        "--precision bf16": config.recipe.precision != "float32",
        "--micro-batch": config.recipe.micro_batch == 1,
    }
    in_use = [flag for flag, used in flags.items() if used]
    check_memory(plan, available_bytes=available, where=where, in_use=in_use)

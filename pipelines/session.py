"""One worker's steps: their means between reports, validation, checkpoints. Rank 0 looks and writes; all report."""

import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffsr_core.checkpoint import model_files
from diffsr_core.family import SuperResolver
from diffsr_core.recipe import StageRecipe
from diffsr_core.training import Trainer, TrainerState
from diffsr_core.validation import validate, validation_loss
from pipelines import storage
from pipelines.blobs import encode_blob
from pipelines.checkpoints import Saved, save_checkpoint
from pipelines.manifest import Manifest
from pipelines.model_card import Cost, write_model_card
from pipelines.perceptual import load_lpips
from pipelines.reader import Fed
from pipelines.runs import TrainingFailed
from pipelines.worker import LoopConfig, Workers


class Session:
    """One worker's steps from here on: their means since the last report, reports, checkpoints."""

    def __init__(
        self, config: LoopConfig, manifest: Manifest, trainer: Trainer, workers: Workers, saved: Saved | None
    ) -> None:
        self.config, self.manifest, self.trainer, self.workers = config, manifest, trainer, workers
        before = {} if saved is None else saved.metrics
        self.saved, self.corrupt_rows = saved, before.get("corrupt_rows", 0.0)
        self.reports: list[dict[str, float]] = []  # since the last checkpoint
        self.damaged: deque[int] = deque()  # rows of each batch that was drawn and is not trained yet
        self.train_s = before.get("train_s", 0.0)
        # Rank 0 looks at the average through a model of its own.
        looks = workers.rank == 0
        self.model = SuperResolver(config.model).to(trainer.device) if looks else None
        self.lpips = load_lpips(folder=config.lpips).to(trainer.device) if looks and config.lpips else None
        self._open_window()

    @property
    def trained(self) -> StageRecipe:
        """The stage of the last step that was done."""
        return self.config.recipe.stage_at(self.trainer.step - 1)[0]

    def _open_window(self) -> None:
        self.began, self.steps, self.good, self.loss, self.waited, self.corrupt = time.monotonic(), 0, 0, 0.0, 0.0, 0

    def tensors(self, batches: Iterator[Fed]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the pairs as the core takes them; count and name rows that were damaged."""
        for fed in batches:
            for row in fed.corrupt:
                self.workers.tell(f"train: {row}; another takes its place")
            self.damaged.append(len(fed.corrupt))
            yield to_tensor(fed.hr), to_tensor(fed.lr)

    def repeat(self) -> None:
        """Make the reports that led to the newest checkpoint again; make the first where there is nothing to train."""
        if self.saved is not None:
            for report in [*self.saved.earlier, self.saved.metrics]:
                self.workers.report(report)
        elif self.trainer.done:
            self.workers.report(self._checkpoint({"step": float(self.trainer.step)}))

    def add(self, metrics: dict[str, float]) -> None:
        """Take in a step; report, and keep a checkpoint, when it is time."""
        config, step = self.config, self.trainer.step
        self.steps += 1
        self.corrupt += self.damaged.popleft()
        self.waited += metrics["waited_s"]
        if not metrics["skipped"]:
            self.good += 1
            self.loss += metrics["loss"]
        elif self.workers.rank == 0:
            self.workers.tell(f"train: step {step} skipped, its gradient's norm was {metrics['gradient_norm']:.3g}")
        checkpoint = step % config.checkpoint_every == 0 or self.trainer.done
        if not checkpoint and step % config.log_every:
            return
        report = {name: metrics[name] for name in ("gradient_norm", "learning_rate")} | self._means()
        if checkpoint:
            report = self._checkpoint(report)
            self.reports = []
        else:
            self.reports.append(report)
        self.workers.report(report)
        self._open_window()

    def _means(self) -> dict[str, float]:
        """Return the window's means over all workers. Raises TrainingFailed for too many damaged rows."""
        seconds = time.monotonic() - self.began
        self.train_s += seconds
        mine = torch.tensor([self.loss, self.good, self.waited, self.corrupt], dtype=torch.float64)
        loss, good, waited, corrupt = self.workers.summed(mine).tolist()
        self.corrupt_rows += corrupt
        images = self.trainer.step * self.config.recipe.batch_size
        allowed = max(1.0, self.config.max_corrupt_share * images) if self.config.max_corrupt_share else 0.0
        if self.corrupt_rows > allowed:
            raise TrainingFailed(
                f"damaged rows ({self.corrupt_rows:.0f} of {images} read) must be at most "
                f"{self.config.max_corrupt_share:.2%}; make the set again, or raise --max-corrupt-share"
            )
        found = {
            "step": float(self.trainer.step),
            "images_seen": float(images),
            "images_per_s": self.steps * self.config.recipe.batch_size / seconds,
            "data_wait_share": waited / self.workers.world / seconds,
            "skipped_steps": float(self.trainer.skipped),
            "corrupt_rows": self.corrupt_rows,
            "train_s": self.train_s,
        }
        if good:
            found["loss"] = loss / good
        if self.workers.device != "cpu":
            found["gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return found

    def _checkpoint(self, report: dict[str, float]) -> dict[str, float]:
        """Validate, draw and save on rank 0; return the report with the validation's metrics, which is saved too."""
        state = self.trainer.state()  # together, where the weights are split
        if self.workers.rank != 0:
            return report
        config, recipe = self.config, self.config.recipe
        average = next(iter(state.averages.values()))
        if not all(bool(value.isfinite().all()) for value in [*state.weights.values(), *average.values()]):
            raise TrainingFailed(
                f"weights must be finite, those of step {self.trainer.step} are not: the checkpoint before it is kept"
            )
        report = report | self._validate(state)
        card = write_model_card(
            preset=config.preset,
            config=config.model,
            recipe=recipe,
            manifest=self.manifest,
            num_weights=sum(weight.numel() for weight in self.trainer.model.parameters()),
            step=self.trainer.step,
            metrics=report,
            cost=Cost(
                seconds=self.train_s,
                device=_device_name(self.workers.device),
                workers=self.workers.world,
                images_per_s=report.get("images_per_s", 0.0),
            ),
            weights_licence=config.weights_licence,
            data_licence=config.data_licence,
            parent=_digest_of(config.init),
            teacher=_digest_of(config.teacher),
        )
        files = model_files(config.model, state.weights, average, preset=config.preset, card=card)
        final = self.trained == recipe.stages[-1]  # losses of other stages are of another kind
        score = report.get("val_loss") if final else None
        save_checkpoint(
            config.output, files, state, metrics=report, keep=config.keep, score=score, earlier=self.reports
        )
        return report

    def _validate(self, state: TrainerState) -> dict[str, float]:
        """Return the validation's metrics; publish its picture."""
        config, trainer = self.config, self.trainer
        if config.looked_at is None:
            return {}
        hr, lr = config.looked_at
        side = hr.shape[1] // config.model.scale
        side -= side % config.model.lr_stride  # a patch that only its crops fit
        pairs = [to_tensor(x[:, : side * scale, : side * scale]) for x, scale in ((hr, config.model.scale), (lr, 1))]
        pairs = [x.to(trainer.device) for x in pairs]
        model = self.model
        assert model is not None
        first, *others = state.averages.items()
        model.load_state_dict(first[1])
        chunk = min(8, config.recipe.micro_batch or len(trainer.share))  # what training has room for, this has too
        how: dict[str, Any] = {"stage": self.trained.name, "recipe": config.validation, "chunk": chunk}
        result = validate(model, *pairs, perceptual=self.lpips, **how)
        metrics = dict(result.metrics)
        for half_life, average in others:
            model.load_state_dict(average)
            name = f"val_loss_ema_{half_life}"
            metrics[name] = validation_loss(model, *pairs, **how)
        picture = encode_blob(np.concatenate(list(result.strips[:4]), axis=0), "png")
        storage.publish(storage.join(config.output, "samples", f"step-{trainer.step:08d}.png"), picture)
        return metrics


def _digest_of(uri: str | None) -> str | None:
    return uri and uri.rpartition("/")[2]  # publish_model names the folder by the model's digest


def _device_name(device: str) -> str:
    return "CPU" if device == "cpu" else torch.cuda.get_device_name()


def to_tensor(pixels: np.ndarray) -> Tensor:
    """Return float32 (B, C, H, W) in [-1, 1] for levels of 255 (B, H, W, C)."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1

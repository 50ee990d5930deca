"""One trial of a search: a training with a verdict, in <its output>/trial.json, and how a search may end it early."""

import json
import math
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from queue import Queue
from typing import Any, Literal

import torch

from pipelines import storage
from pipelines.lease import LeaseHeld
from pipelines.runs import Summary, TrainingFailed
from pipelines.training import train
from pipelines.training_config import TrainConfig

Judge = Callable[[dict[str, float]], bool]  # takes the progress at a checkpoint; False: the trial is to end here

_LEASE_S = 90.0  # longer than a lease outlives a killed trial of another machine; on this one it ends at once


@dataclass(kw_only=True)
class Record:
    """What is known of a trial. reports: those of its checkpoints. reason: of a failed one, or of one to be retried.

    seconds: of work, over all runs of the trial. Only a status other than running is a verdict.
    """

    status: Literal["running", "done", "stopped", "failed"] = "running"
    reason: str = ""
    seconds: float = 0.0
    reports: list[dict[str, float]] = field(default_factory=list)

    @property
    def settled(self) -> bool:
        """Whether there is a verdict."""
        return self.status != "running"


class Stopped(Exception):
    """The search wants no more of a trial."""


def read_record(output: str) -> Record:
    """Return the record of a trial, an empty one before its first checkpoint."""
    uri = storage.join(output, "trial.json")
    return Record(**json.loads(storage.read_bytes(uri))) if storage.exists(uri) else Record()


def progress(config: TrainConfig, metric: str, report: dict[str, float]) -> dict[str, float] | None:
    """Return {steps, metric} of a report, steps of the last stage, by which trials are compared while they run.

    None at the end, before the last stage (whose losses are of another kind), and without the metric.
    """
    recipe = config.recipe()
    last = recipe.stages[-1].num_steps
    steps = report["step"] - (recipe.num_steps - last)
    return {"steps": steps, metric: report[metric]} if 0 < steps < last and metric in report else None


def score(config: TrainConfig, metric: str, reports: list[dict[str, float]]) -> float | None:
    """Return the metric of the model that a training leaves (or would, had it ended here), None where there is none."""
    recipe = config.recipe()
    first = recipe.num_steps - recipe.stages[-1].num_steps
    final = [report for report in reports if report["step"] > first or report["step"] == recipe.num_steps]
    if not final:
        return None
    best = min(final, key=lambda report: report.get("val_loss", math.inf))
    return (best if config.result == "best" else final[-1]).get(metric)


def run_trial(config: TrainConfig, metric: str, *, parent_run: str, judge: Judge) -> None:
    """Train to a verdict, or on from where an earlier run was. A trial that has one is left as it is.

    A mistake in the settings, a training that fails, and too little memory are verdicts; another exception is not: it
    is noted and passes through, and the trial can be taken up again.
    """
    record = read_record(config.output)
    if record.settled:
        return
    began, before = time.monotonic(), record.seconds

    def publish(status: Literal["running", "done", "stopped", "failed"], reason: str = "") -> None:
        record.status, record.reason = status, reason
        record.seconds = round(before + time.monotonic() - began, 3)
        storage.publish(storage.join(config.output, "trial.json"), json.dumps(asdict(record)).encode())

    def add(report: dict[str, float]) -> None:
        if all(report["step"] > earlier["step"] for earlier in record.reports):
            record.reports.append({name: value for name, value in report.items() if math.isfinite(value)})

    def consult(report: dict[str, float]) -> None:
        now = progress(config, metric, report)
        if now is not None and not judge(now):
            raise Stopped

    def watch(report: dict[str, float]) -> None:
        if report["step"] % config.checkpoint_every == 0:
            add(report)
            publish("running")
            consult(record.reports[-1])

    try:
        for report in record.reports:
            consult(report)  # the judge may be another one than that of the run that was interrupted
        summary = _train(config, parent_run=parent_run, watch=watch)
    except Stopped:
        publish("stopped")
    except (ValueError, TrainingFailed, torch.OutOfMemoryError) as error:
        publish("failed", str(error).partition("\n")[0])
    except Exception as error:
        publish("running", f"{type(error).__name__}: {error}".partition("\n")[0])
        raise
    else:
        add({"step": float(config.recipe().num_steps), **summary.metrics})
        lacks = score(config, metric, record.reports) is None
        publish("failed" if lacks else "done", f"its last report has no finite {metric}" if lacks else "")


def _train(config: TrainConfig, *, parent_run: str, watch: Callable[[dict[str, float]], None]) -> Summary:
    """Run the training; wait for the lease of one that was killed on another machine."""
    deadline = time.monotonic() + _LEASE_S
    while True:
        try:
            return train(config, parent_run=parent_run, watch=watch)
        except LeaseHeld:
            if time.monotonic() > deadline:
                raise
            time.sleep(5)


class Stepper(threading.Thread):
    """A trial in steps: each `step` lets it run to where it asks its judge. The work takes that judge."""

    def __init__(self, work: Callable[[Judge], None]) -> None:
        super().__init__(daemon=True)
        self._work = work
        self._asked: Queue[dict[str, Any] | BaseException | None] = Queue()
        self._answers: Queue[bool] = Queue()

    def run(self) -> None:
        """Do the work; leave None, or what it raised."""
        try:
            self._work(self._judge)
        except BaseException as error:
            self._asked.put(error)
        else:
            self._asked.put(None)

    def _judge(self, now: dict[str, float]) -> bool:
        self._asked.put(now)
        return self._answers.get()

    def step(self) -> dict[str, Any] | None:
        """Return the next progress, None at the end; raise what the work raised."""
        if self.ident is None:
            self.start()
        else:
            self._answers.put(True)
        found = self._asked.get()
        if isinstance(found, BaseException):
            raise found
        return found

    def stop(self) -> None:
        """End the work where it asks, and wait until it has put its things in order: lease, run, record."""
        if self.is_alive():
            self._answers.put(False)
            self.join()

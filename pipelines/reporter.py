"""The reports of a training in the driver: a line now and then for the person, and all of them for MLflow.

MLflow is talked to by threads of their own, one for the numbers and one for the pictures: a server that is slow, down
or full never holds up a training, and a store that takes no pictures never holds up the numbers.
"""

import json
import re
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack

import mlflow
import numpy as np
from mlflow.entities import Metric

from pipelines import storage
from pipelines.blobs import decode_blob
from pipelines.engine import say
from pipelines.mlflow_store import impatient
from pipelines.outbox import Outbox, first_line
from pipelines.runs import TrainingFailed

MOST_METRICS = 1000  # of one request: MLflow's own limit
SHOWN = {
    "loss": "loss {:.4f}",
    "images_per_s": "{:.0f} images/s",
    "data_wait_share": "waiting {:.1%}",
    "val_loss": "val_loss {:.4f}",
    "val_psnr_bicubic": "bicubic {:.2f} dB",
    "val_psnr_regression": "regression {:.2f} dB",
    "val_psnr_sample": "sample {:.2f} dB",
}
_PICTURE = re.compile(r"step-(\d{8})\.png")
_LOGGED = re.compile(r"images/samples[+%]step[+%](\d+)[+%].*compressed")  # the last file of a picture


def unsent_uri(output: str) -> str:
    """Return where the reports of a training wait that MLflow has not got."""
    return storage.join(output, storage.OWN_FOLDER, "unsent.json")


class Reporter:
    """Takes the reports of a training, {"step": ..., "loss": ...}, a step's once; for the body of a with.

    An interrupted run is one curve: steps that MLflow has already, or that <output>/_diffsr/unsent.json holds, are
    shown and not logged again, whether this process starts late or a worker starts over. A report with val_ metrics is
    followed by the picture <output>/samples/step-<step, 8 digits>.png; pictures that MLflow lacks are made up for.

    What could not be sent waits in unsent.json for the next Reporter of the run. While MLflow is down that file is
    written every 30 s and at each report with val_ metrics, which is one of a checkpoint: a driver that is killed
    loses the reports since, and the training that goes on from the checkpoint makes those again. Raises ValueError for
    a file of another run, MlflowException where MLflow does not answer. `last`: the newest value of each metric.
    """

    def __init__(self, run_id: str, num_steps: int, *, output: str) -> None:
        self.run_id, self.num_steps, self.output = run_id, num_steps, output
        self.last: dict[str, float] = {}
        self._shown, self._closed = 0.0, False
        self._file = unsent_uri(output)
        self._client = mlflow.MlflowClient()
        self._there: set[int] | None = None
        with ExitStack() as stack:
            stack.enter_context(impatient(30))
            self._newest = _last_step(self._client, run_id)
            unsent, drawn = self._load(), self._drawn()
            self._patience = stack.pop_all()
        self._reports = Outbox[str]("reports", self._send_reports, keep=self._keep)
        self._pictures = Outbox[int]("pictures", self._send_pictures)
        self._reports.put(*unsent)
        self._pictures.put(*drawn)

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        try:
            self.close(60.0 if error is None else 5.0)
        except (TrainingFailed, OSError) as other:
            if error is None:
                raise
            error.add_note(str(other))  # what the body raised counts

    def __call__(self, metrics: Mapping[str, float]) -> None:
        """Take a report. Never waits for MLflow, never raises for it."""
        step = int(metrics["step"])
        values = {name: float(value) for name, value in metrics.items() if name != "step"}
        self.last |= values
        validated = any(name.startswith("val_") for name in values)
        if step > self._newest:
            self._newest = step
            self._reports.put(json.dumps({"step": step, "timestamp": time.time_ns() // 10**6, "metrics": values}))
            if validated:
                self._pictures.put(step)
                self._reports.secure()
        if validated or step == self.num_steps or time.monotonic() - self._shown > 5:
            self._shown = time.monotonic()
            parts = [form.format(values[name]) for name, form in SHOWN.items() if name in values]
            say(", ".join([f"train: step {step} of {self.num_steps}", *parts]))

    def close(self, timeout_s: float = 60.0) -> None:
        """Wait for what is not sent yet, and keep in unsent.json what could not be. Once: another call does nothing.

        Raises TrainingFailed where MLflow refuses the reports (a run that was deleted), OSError without that file.
        """
        if self._closed:
            return
        self._closed = True
        end = time.monotonic() + timeout_s
        rest = self._reports.close(timeout_s)
        pictures = self._pictures.close(max(0.0, end - time.monotonic()))
        self._patience.close()
        self._keep(rest)
        if pictures:
            say(f"{len(pictures)} pictures are not in MLflow; they lie in samples/ of the output")
        where = f"{len(rest)} reports of run {self.run_id} wait in {storage.OWN_FOLDER}/unsent.json of the output"
        if (refusal := self._reports.refusal) is not None:
            raise TrainingFailed(
                f"MLflow refuses the reports: {first_line(refusal)}; {where}; put that right (a deleted run: restore "
                "it), and the same command sends them"
            ) from refusal
        if rest:
            say(f"MLflow does not take reports: {where}; the same command sends them")

    def _load(self) -> list[str]:
        """Return the reports of unsent.json that MLflow has not got."""
        if not storage.exists(self._file):
            return []
        found = json.loads(storage.read_bytes(self._file))
        if found["run_id"] != self.run_id:
            raise ValueError(
                f"{self._file} must hold reports of run {self.run_id}, not of {found['run_id']}; continue that run, or "
                "delete the file and with it those reports"
            )
        reports = [report for report in found["reports"] if report["step"] > self._newest]
        self._newest = max([self._newest, *(report["step"] for report in reports)])
        return [json.dumps(report) for report in reports]

    def _keep(self, reports: list[str]) -> None:
        if reports:
            document = f'{{"run_id": {json.dumps(self.run_id)}, "reports": [\n' + ",\n".join(reports) + "\n]}\n"
            storage.publish(self._file, document.encode())
        else:
            storage.delete(self._file)

    def _send_reports(self, reports: list[str]) -> int:
        """Log as many whole reports as one request takes. Sent twice they are one: MLflow has each value once."""
        metrics: list[Metric] = []
        count = 0
        for report in map(json.loads, reports):
            if count and len(metrics) + len(report["metrics"]) > MOST_METRICS:
                break
            count += 1
            metrics += [
                Metric(sys.intern(name), value, report["timestamp"], report["step"])
                for name, value in report["metrics"].items()
            ]
        self._client.log_batch(self.run_id, metrics=metrics, synchronous=True)
        return count

    def _drawn(self) -> list[int]:
        """Return the steps of the pictures in the output."""
        names = storage.list_names(storage.join(self.output, "samples"))
        return [int(match[1]) for match in map(_PICTURE.fullmatch, names) if match]

    def _send_pictures(self, steps: list[int]) -> int:
        """Log one picture unless MLflow has it."""
        if self._there is None:
            logged = [_LOGGED.match(entry.path) for entry in self._client.list_artifacts(self.run_id, "images")]
            self._there = {int(match[1]) for match in logged if match}
        if (step := steps[0]) not in self._there:
            uri = storage.join(self.output, "samples", f"step-{step:08d}.png")
            try:
                picture = np.asarray(decode_blob(storage.read_bytes(uri)))
            except FileNotFoundError:
                say(f"the picture of step {step} is not in samples/ of the output: MLflow goes without it")
                return 1
            there, self._there = self._there, None  # of a picture that fails half way, MLflow has to be asked
            self._client.log_image(self.run_id, picture, key="samples", step=step, synchronous=True)
            self._there = there | {step}
        return 1


def _last_step(client: mlflow.MlflowClient, run_id: str) -> int:
    """Return the last step that a run has of any metric but those of the system; -1 where there is none."""
    newest = client.get_run(run_id).to_proto().data.metrics  # of each metric the value with the highest step
    return max((int(metric.step) for metric in newest if not metric.key.startswith("system/")), default=-1)

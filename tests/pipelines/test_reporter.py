"""Laws of pipelines.reporter: MLflow holds up no training, and an interrupted run is one run with one curve."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import numpy as np
import pytest
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, TEMPORARILY_UNAVAILABLE

from pipelines import outbox, tracking
from pipelines.blobs import encode_blob
from pipelines.mlflow_store import connect
from pipelines.reporter import Reporter
from pipelines.runs import TrainingFailed

DOWN = MlflowException("API request to http://me:secret@server failed: refused", TEMPORARILY_UNAVAILABLE)
DELETED = MlflowException("The run must be in the 'active' state", INVALID_PARAMETER_VALUE)


class Server:
    """What a client of MLflow does, on lists; `error` is raised by each call while it is set."""

    def __init__(self) -> None:
        self.metrics: list[Metric] = []
        self.requests: list[int] = []
        self.pictures: list[int] = []
        self.error: Exception | None = None
        self.picture_error: Exception | None = None
        self.seconds = 0.0
        self.tries = 0

    def get_run(self, run_id: str) -> Any:
        return SimpleNamespace(to_proto=lambda: SimpleNamespace(data=SimpleNamespace(metrics=self.metrics)))

    def log_batch(self, run_id: str, *, metrics: list[Metric], synchronous: bool) -> None:
        self.tries += 1
        time.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        assert len(metrics) <= 1000
        self.metrics += metrics
        self.requests.append(len(metrics))

    def list_artifacts(self, run_id: str, path: str) -> list[Any]:
        names = [f"images/samples+step+{step}+timestamp+5+uuid+compressed.webp" for step in self.pictures]
        return [SimpleNamespace(path=name) for name in names]

    def log_image(self, run_id: str, image: np.ndarray, *, key: str, step: int, synchronous: bool) -> None:
        if (error := self.picture_error or self.error) is not None:
            raise error
        assert (image.shape, key) == ((4, 4, 3), "samples")
        self.pictures.append(step)

    def steps(self, name: str = "loss") -> list[int]:
        """Steps in the order in which they came."""
        return [metric.step for metric in self.metrics if metric.key == name]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    made = Server()
    monkeypatch.setattr(mlflow, "MlflowClient", lambda: made)
    monkeypatch.setattr(outbox, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(outbox, "LAST_PAUSE_S", 0.02)
    return made


def report(step: int, **more: float) -> dict[str, float]:
    return {"step": float(step), "loss": 1 / step, "images_per_s": 2.0, "data_wait_share": 0.0, **more}


def draw(output: Path, step: int) -> None:
    """Publish a picture as the loop does before the report of a checkpoint."""
    (output / "samples").mkdir(parents=True, exist_ok=True)
    (output / "samples" / f"step-{step:08d}.png").write_bytes(encode_blob(np.zeros((4, 4, 3), np.uint8), "png"))


def until(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never held"
        time.sleep(0.01)


def unsent(output: Path) -> list[int]:
    found = json.loads((output / "_diffsr" / "unsent.json").read_text())
    return [entry["step"] for entry in found["reports"]]


def test_every_report_is_logged_once_in_order_with_its_values(server: Server, tmp_path: Path) -> None:
    before = time.time_ns() // 10**6
    with Reporter("run", 50, output=str(tmp_path)) as take:
        for step in range(1, 51):
            take(report(step, gradient_norm=2.0))
        assert take.last == {"loss": 1 / 50, "images_per_s": 2.0, "data_wait_share": 0.0, "gradient_norm": 2.0}
    assert server.steps() == server.steps("gradient_norm") == list(range(1, 51))
    assert [metric.value for metric in server.metrics if metric.key == "loss"] == [1 / step for step in range(1, 51)]
    assert all(before <= metric.timestamp <= time.time_ns() // 10**6 for metric in server.metrics)
    assert not (tmp_path / "_diffsr").exists()


def test_a_slow_server_holds_nothing_up_and_gets_many_whole_reports_in_one_request(
    server: Server, tmp_path: Path
) -> None:
    server.seconds = 0.2
    with Reporter("run", 600, output=str(tmp_path)) as take:
        started = time.monotonic()
        for step in range(1, 601):
            take(report(step, **{f"m{index}": 1.0 for index in range(17)}))  # 20 metrics each: 50 in a request
        assert time.monotonic() - started < 1.5  # one by one they would take 120 s
    assert server.steps() == list(range(1, 601))
    assert max(server.requests) == 1000 and len(server.requests) <= 20
    assert all(count % 20 == 0 for count in server.requests)


def test_a_server_that_goes_and_comes_is_said_once_each_and_nothing_is_lost(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Reporter("run", 30, output=str(tmp_path)) as take:
        take(report(1))
        until(lambda: server.steps() == [1])
        server.error = DOWN
        for step in range(2, 21):
            take(report(step))
        until(lambda: server.tries > 5)
        assert server.steps() == [1] and unsent(tmp_path)[0] == 2
        server.error = None
        until(lambda: server.steps() == list(range(1, 21)))
        until(lambda: not (tmp_path / "_diffsr" / "unsent.json").exists())
    said = capsys.readouterr().err
    assert said.count("does not take reports") == 1 and said.count("takes reports again") == 1
    assert "secret" not in said


def test_what_a_checkpoint_left_behind_is_in_the_file_before_the_training_goes_on(
    server: Server, tmp_path: Path
) -> None:
    server.error = DOWN
    take = Reporter("run", 30, output=str(tmp_path))
    take(report(1))
    until(lambda: server.tries > 1)
    for step in range(2, 9):
        take(report(step))
    draw(tmp_path, 9)
    take(report(9, val_loss=0.5))
    assert unsent(tmp_path) == list(range(1, 10))  # a kill -9 here loses nothing
    take.close(0.0)


def test_what_was_not_sent_is_sent_first_by_the_next_reporter(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Reporter("run", 9, output=str(tmp_path)) as take:
        for step in (1, 2):
            take(report(step))
        until(lambda: server.steps() == [1, 2])
        server.error = DOWN
        for step in (3, 4, 5):
            take(report(step))
        take.close(0.1)
    assert unsent(tmp_path) == [3, 4, 5] and "3 reports of run run wait" in capsys.readouterr().err
    server.error = None
    server.metrics.append(Metric("loss", 1 / 3, 1, 3))  # it had come through: only its answer was lost
    with Reporter("run", 9, output=str(tmp_path)) as take:
        for step in (4, 5, 6):  # from the checkpoint at 3
            take(report(step))
    assert server.steps() == [1, 2, 3, 4, 5, 6]
    assert not (tmp_path / "_diffsr" / "unsent.json").exists()


def test_steps_that_mlflow_has_are_shown_and_not_logged_again(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.metrics = [Metric("loss", 0.5, 1, 4), Metric("system/cpu", 9.0, 1, 70)]
    with Reporter("run", 6, output=str(tmp_path)) as take:
        take(report(4))
        for step in (5, 5, 4, 5, 6):  # a worker that starts over makes its reports again
            take(report(step))
    assert server.steps() == [4, 5, 6]
    said = capsys.readouterr().err
    assert "train: step 4 of 6, loss 0.2500, 2 images/s, waiting 0.0%\n" in said and "step 6 of 6" in said


def test_a_refusal_ends_the_sending_is_said_kept_and_raised_at_the_end(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.error = DELETED
    with pytest.raises(TrainingFailed, match=r"refuses.*'active' state.*3 reports.*unsent\.json.*restore"):  # noqa: SIM117
        with Reporter("run", 3, output=str(tmp_path)) as take:
            for step in (1, 2, 3):
                take(report(step))
            until(lambda: server.tries > 0)
            time.sleep(0.1)
    assert server.tries == 1 and unsent(tmp_path) == [1, 2, 3]
    assert capsys.readouterr().err.count("MLflow refuses reports") == 1


def test_what_the_body_raises_is_not_hidden_by_a_refusal(server: Server, tmp_path: Path) -> None:
    server.error = DELETED
    with pytest.raises(KeyError) as caught, Reporter("run", 3, output=str(tmp_path)) as take:
        take(report(1))
        raise KeyError("body")
    assert "unsent.json" in caught.value.__notes__[0] and unsent(tmp_path) == [1]


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (DOWN, True),
        (MlflowException("500"), True),
        (ConnectionResetError("reset"), True),
        (DELETED, False),
        (TypeError("ours"), False),
    ],
)
def test_only_what_may_pass_is_tried_again(server: Server, tmp_path: Path, error: Exception, passes: bool) -> None:
    server.error = error
    take = Reporter("run", 3, output=str(tmp_path))
    take(report(1))
    until(lambda: server.tries > 0)
    time.sleep(0.2)
    assert (server.tries > 2) == passes
    server.error = None
    if passes:
        take.close(5.0)
    else:
        with pytest.raises(TrainingFailed):
            take.close(5.0)
    assert server.steps() == ([1] if passes else [])


def test_pictures_that_fail_hold_no_numbers_up_and_are_made_up_for(server: Server, tmp_path: Path) -> None:
    server.picture_error = OSError("the artifact store is full")
    with Reporter("run", 9, output=str(tmp_path)) as take:
        for step in (1, 2, 3):
            draw(tmp_path, step)
            take(report(step, val_loss=0.5))
        until(lambda: server.steps() == [1, 2, 3])
        take.close(0.1)
    server.picture_error, server.pictures = None, [2]
    with Reporter("run", 9, output=str(tmp_path)) as take:
        take(report(3, val_loss=0.5))
    assert sorted(server.pictures) == [1, 2, 3] and server.steps() == [1, 2, 3]


def test_memory_is_bounded_by_letting_every_second_report_go_aloud(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(outbox, "MAX_WAITING", 100)
    server.error = DOWN
    with Reporter("run", 150, output=str(tmp_path)) as take:
        for step in range(1, 151):
            take(report(step))
        until(lambda: "every second one was let go" in capsys.readouterr().err)
        server.error = None
    assert server.steps()[0] == 1 and 74 <= len(server.steps()) <= 100 and server.steps()[-1] >= 149


def test_a_file_of_another_run_is_refused(server: Server, tmp_path: Path) -> None:
    (tmp_path / "_diffsr").mkdir()
    (tmp_path / "_diffsr" / "unsent.json").write_text('{"run_id": "other", "reports": []}')
    with pytest.raises(ValueError, match=r"must hold reports of run mine, not of other; continue that run"):
        Reporter("mine", 3, output=str(tmp_path))


def test_the_patience_that_a_person_set_stays(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    with Reporter("run", 3, output=str(tmp_path)):
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
        assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "0"
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


# A real MLflow server, a line that can be cut, and drivers that are killed.

SERVE = """
from werkzeug.serving import make_server
from mlflow.server import app
server = make_server("127.0.0.1", 0, app, threaded=True)
app.test_client().get("/api/2.0/mlflow/experiments/search?max_results=1")  # the database is made now
print(server.port, flush=True)
server.serve_forever()
"""


class Line:
    """A TCP line to a port of this machine; cut() resets what is open and refuses what is new."""

    def __init__(self, target: int) -> None:
        self.target, self.whole = target, True
        self.ends: list[socket.socket] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, _ = self.listener.accept()
            if not self.whole:
                near.close()
                continue
            far = socket.create_connection(("127.0.0.1", self.target))
            self.ends += [near, far]
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=(one, other), daemon=True).start()

    @staticmethod
    def _carry(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for end in (source, sink):
            end.close()

    def cut(self) -> None:
        self.whole = False
        for end in self.ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self.ends.clear()

    def mend(self) -> None:
        self.whole = True


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Line]:
    """The line to a real MLflow server on SQLite, which the environment names."""
    environment = {
        **os.environ,
        "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{tmp_path}/server.db",
        "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
        "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(tmp_path / "artifacts"),
        "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    try:
        made = Line(int(process.stdout.readline()))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{made.port}")
        monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
        before = mlflow.get_tracking_uri()
        yield made
        mlflow.set_tracking_uri(before)
    finally:
        process.kill()
        process.wait()


def drive(run_id: str, output: Path, last: int) -> None:
    """A driver: trains from its checkpoint, each 10 steps, to the last step; says how far it is in a file."""
    outbox.FIRST_PAUSE_S, outbox.LAST_PAUSE_S = 0.05, 0.2
    saved = output / "checkpoint"
    first = int(saved.read_text()) if saved.exists() else 0
    with Reporter(run_id, last, output=str(output)) as take:
        for step in range(max(first, 1), last + 1):  # the checkpoint's own report again: it may have been lost
            time.sleep(0.01)
            if step % 10 == 0:
                draw(output, step)
                (output / "saved").write_text(str(step))
                os.replace(output / "saved", saved)
            take(report(step, **({"val_loss": 0.5} if step % 10 == 0 else {})))
            (output / "step").write_text(str(step))
        take.close(1.0 if last < 300 else 60.0)
    os._exit(0)


def test_an_interrupted_run_on_a_real_server_is_one_curve_with_each_step_once(line: Line, tmp_path: Path) -> None:
    """Cut off and back on, killed -9, cut off till the end, and gone on with: nothing is lost, nothing is twice."""
    client, output = connect(), tmp_path / "run"
    output.mkdir()
    with tracking.run("train") as run_id:
        pass
    fork = multiprocessing.get_context("fork")

    def start(last: int) -> Any:
        process = fork.Process(target=drive, args=(run_id, output, last))
        process.start()
        return process

    def reaches(step: int) -> None:
        until(lambda: (output / "step").exists() and int((output / "step").read_text() or 0) >= step, 60)

    first = start(1000)
    reaches(25)
    line.cut()
    reaches(55)
    line.mend()
    reaches(105)
    line.cut()
    reaches(128)
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)  # cut off, from the checkpoint at 120 on
    first.join()
    line.mend()
    second = start(200)
    reaches(150)
    line.cut()
    second.join(60)
    assert second.exitcode == 0 and unsent(output)[-1] == 200
    line.mend()
    third = start(300)
    third.join(60)
    assert third.exitcode == 0 and not (output / "_diffsr" / "unsent.json").exists()
    history = client.get_metric_history(run_id, "loss")
    assert sorted((metric.step, metric.value) for metric in history) == [(n, 1 / n) for n in range(1, 301)]
    logged = [entry.path for entry in client.list_artifacts(run_id, "images") if entry.path.endswith(".webp")]
    assert sorted(int(path.split("+")[2]) for path in logged) == list(range(10, 301, 10))

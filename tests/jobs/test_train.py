"""The laws of the training job."""

import io
import json
import os
import queue
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from diffsr_core import checkpoint
from pipelines import ray_training, session, tracking, training, training_config
from pipelines.checkpoints import load_newest, save_checkpoint
from pipelines.lease import LeaseHeld
from pipelines.models import resolve
from pipelines.runs import TrainingFailed
from tests.jobs.conftest import TRAIN_FLAGS, Ran, photograph, png, run, run_until_killed


def weights(output: Path) -> dict[str, np.ndarray]:
    return load_file(output / "model" / "ema.safetensors")


def test_a_finished_run_is_not_done_again(pairs: Path, trained: Path, call: Callable[..., Ran]) -> None:
    before = (trained / "model" / "config.json").read_bytes()
    flags = ["--pairs", pairs, "--output", trained, "--engine", "local", "--register", "tested", *TRAIN_FLAGS]
    again = call("train", *flags)
    assert again.code == 0 and "nothing to do" in again.stderr
    assert (again.summary["done"], again.summary["unchanged"]) == (0, 12)
    assert (trained / "model" / "config.json").read_bytes() == before
    assert len(mlflow.MlflowClient().search_model_versions("name='tested'")) == 1


@pytest.fixture
def ended(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained run's output."""
    shutil.copytree(trained, tmp_path / "ended")
    return tmp_path / "ended"


def forget_the_summary(output: Path) -> dict[str, Any]:
    """Leave what a kill before the last write leaves; return the run's document as it was."""
    whole = json.loads((output / "run.json").read_text())
    (output / "run.json").write_text(json.dumps({name: whole[name] for name in ("identity", "mlflow_run")}))
    return whole


def test_killed_after_the_registration_it_is_not_registered_twice(
    pairs: Path, ended: Path, call: Callable[..., Ran]
) -> None:
    before = forget_the_summary(ended)
    again = call("train", "--pairs", pairs, "--output", ended, "--engine", "local", "--register", "tested",
                 *TRAIN_FLAGS)  # fmt: skip
    assert again.code == 0, again.stderr
    assert len(mlflow.MlflowClient().search_model_versions("name='tested'")) == 1
    assert again.summary["outputs"][1:] == before["summary"]["outputs"][1:]  # nor logged twice


def test_resumed_after_its_last_step_it_still_tells_its_metrics(
    pairs: Path, ended: Path, call: Callable[..., Ran]
) -> None:
    before = forget_the_summary(ended)["summary"]
    assert {"loss", "val_psnr_sample"} <= set(before["metrics"]) and (before["done"], before["unchanged"]) == (12, 0)
    again = call("train", "--pairs", pairs, "--output", ended, "--engine", "local", *TRAIN_FLAGS).summary
    assert again["metrics"]["loss"] == before["metrics"]["loss"]
    assert again["metrics"]["val_psnr_sample"] == before["metrics"]["val_psnr_sample"]
    assert (again["inputs"], again["done"], again["unchanged"]) == (0, 0, 12)


def test_a_finished_run_is_registered_when_that_is_asked_for_later(
    pairs: Path, ended: Path, call: Callable[..., Ran]
) -> None:
    flags = ["--pairs", pairs, "--output", ended, "--engine", "local", *TRAIN_FLAGS, "--register", "later"]
    for _ in range(2):
        done = call("train", *flags)
        assert (done.code, done.summary["done"], done.summary["unchanged"]) == (0, 0, 12)
        assert done.summary["outputs"][-1] == "models:/later/1"
    assert "nothing to do" in done.stderr
    (version,) = mlflow.MlflowClient().search_model_versions("name='later'")
    assert version.run_id == json.loads((ended / "run.json").read_text())["mlflow_run"]


def test_resolving_a_registered_model_leaves_nothing_behind(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert resolve("models:/tested/1").files == resolve(str(trained / "model")).files
    assert not list(tmp_path.iterdir())


def test_a_run_that_lost_its_lease_stops_at_its_next_report(
    pairs: Path, tmp_path: Path, call: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"

    def save_and_lose(*words: Any, **named: Any) -> None:
        save_checkpoint(*words, **named)
        (output / "_diffsr" / "fences" / "0000000099").write_text("{}")

    monkeypatch.setattr(session, "save_checkpoint", save_and_lose)
    lost = call("train", "--pairs", pairs, "--output", output, "--engine", "local", "--register", "lost", *TRAIN_FLAGS)
    assert lost.code == 5 and "lost its lease" in lost.stderr
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["00000004"]
    assert not (output / "model").exists() and not mlflow.MlflowClient().search_model_versions("name='lost'")


@pytest.mark.parametrize("step", ["publish_files", "log_model", "register_model"])
def test_a_run_that_lost_its_lease_after_training_writes_no_model(
    step: str, pairs: Path, ended: Path, call: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    fences = ended / "_diffsr" / "fences"

    def lose() -> None:
        (fences / "0000000099").write_text("{}")

    if step == "register_model":
        read = training._read_run
        monkeypatch.setattr(training, "_read_run", lambda *a: (lose(), read(*a))[1])
    else:
        whole = json.loads((ended / "run.json").read_text())
        (ended / "run.json").write_text(json.dumps({"identity": whole["identity"]}))  # in a new run of MLflow
        before = {"publish_files": "_run", "log_model": "publish_files"}[step]
        real = getattr(training, before)
        monkeypatch.setattr(training, before, lambda *a: (real(*a), lose())[0])
    home = training if step == "publish_files" else tracking
    monkeypatch.setattr(home, step, lambda *a, **k: pytest.fail(f"{step} was called"))
    flags = ["--pairs", pairs, "--output", ended, "--engine", "local", *TRAIN_FLAGS, "--register", "nobody's"]
    assert call("train", *flags).code == 5


def poisoned(output: Path, trained: Path) -> None:
    """Put a checkpoint with weights that are not finite where a training resumes from."""
    saved = load_newest(str(trained)) or pytest.fail("no checkpoint")
    weights = {name: value * float("nan") for name, value in saved.state.weights.items()}
    counters = {**saved.state.counters, "step": 2}
    state = saved.state._replace(weights=weights, optimizer={}, counters=counters)
    config = checkpoint.load_model(trained / "model")[0].config
    files = checkpoint.model_files(config, weights, state.averages[2000], preset="nano-x4", card="")
    save_checkpoint(str(output), files, state, metrics={"step": 2.0}, keep=2)


STRICT = ["--max-skipped-steps", "3", "--checkpoint-every", "100"]


def test_a_training_that_diverges_skips_a_while_and_fails_with_a_remedy(
    pairs: Path, trained: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    poisoned(tmp_path / "run", trained)
    flags = ["--pairs", pairs, "--output", tmp_path / "run", "--engine", "local", *TRAIN_FLAGS, *STRICT]
    failed = call("train", *flags)
    assert failed.code == 1 and failed.stderr.count("skipped, its gradient's norm was nan") == 3
    assert "is not finite at step 5, 4 steps in a row; lower the learning rate" in failed.stderr
    assert failed.summary["status"] == "failed" and "Traceback" not in failed.stderr
    assert (load_newest(str(tmp_path / "run")) or pytest.fail("none")).state.counters["step"] == 2


def test_weights_that_are_not_finite_are_never_kept(
    pairs: Path, trained: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    model = tmp_path / "broken"
    config, average = checkpoint.load_model(trained / "model")[0].config, load_file(trained / "model/ema.safetensors")
    weights = {name: torch.from_numpy(value) * float("nan") for name, value in average.items()}
    checkpoint.save_files(model, checkpoint.model_files(config, weights, weights, preset="nano-x4", card=""))
    flags = ["--pairs", pairs, "--output", tmp_path / "run", "--engine", "local", "--init", model, *TRAIN_FLAGS]
    failed = call("train", *flags, "--max-skipped-steps", 99)
    assert failed.code == 1 and "weights must be finite, those of step 4 are not" in failed.stderr
    assert load_newest(str(tmp_path / "run")) is None


def test_on_ray_a_training_that_diverges_is_not_tried_again(pairs: Path, trained: Path, tmp_path: Path) -> None:
    poisoned(tmp_path / "run", trained)
    flags = ["--pairs", pairs, "--output", tmp_path / "run", "--cpus-per-worker", 0.5, *TRAIN_FLAGS, *STRICT]
    failed = run("train", *flags)
    error = failed.stderr.rpartition("error: ")[2]
    assert failed.code == 1 and error.startswith("gradient norm (nan, loss nan)") and "lower the learning rate" in error


class Reports(queue.Queue):
    """Stands for Ray's queue."""

    actor = "its actor"


def test_an_error_of_the_driver_reaches_the_caller_and_closes_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    closed: list[str] = []
    monkeypatch.setattr(ray, "kill", closed.append)
    report_of_1 = ray_training.Message("report", {"step": 1})
    failure = ray_training.Message("failure", "diverged")
    for item, error in ((report_of_1, LeaseHeld("lost")), (failure, TrainingFailed("diverged"))):
        reports = Reports()
        reports.put(item)

        def report(metrics: Any, error: Exception = error) -> None:
            raise error

        with pytest.raises(type(error), match=str(error)), ray_training.Pump(reports, report):
            raise RuntimeError("what Ray says when the workers stop")
    assert closed == ["its actor", "its actor"]


def test_all_reports_are_taken_before_the_pump_ends() -> None:
    reports, taken = Reports(), []
    with ray_training.Pump(reports, taken.append):
        for step in range(5):
            reports.put(ray_training.Message("report", {"step": step}))
    assert [metrics["step"] for metrics in taken] == list(range(5))


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_that_no_generator_takes_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=rf"seed \({seed}\)"):
        training_config.TrainConfig(pairs="p", output="o", seed=seed)


def test_killed_and_resumed_it_ends_with_the_same_weights(pairs: Path, trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    flags = ["--pairs", pairs, "--output", output, "--engine", "local", *TRAIN_FLAGS]
    run_until_killed("train", *flags, when=(output / "checkpoints" / "00000004" / "state.json").exists)
    again = run("train", *flags)
    assert again.code == 0, again.stderr
    assert "continues at step" in again.stderr
    resumed, clean = weights(output), weights(trained)
    assert all(np.array_equal(resumed[name], clean[name]) for name in clean)


def test_other_settings_do_not_continue_a_run(pairs: Path, trained: Path, call: Callable[..., Ran]) -> None:
    flags = ["--pairs", pairs, "--output", trained, "--engine", "local", *TRAIN_FLAGS, "--seed", "7"]
    refused = call("train", *flags)
    assert refused.code == 1 and "another --output" in refused.stderr


def test_a_rotten_shard_is_refused_by_name(pairs: Path, tmp_path: Path, call: Callable[..., Ran]) -> None:
    rotten = tmp_path / "pairs"
    shutil.copytree(pairs, rotten)
    shard = next((rotten / "data").iterdir())
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    refused = call("train", "--pairs", rotten, "--output", tmp_path / "run", "--engine", "local", *TRAIN_FLAGS)
    assert refused.code == 1 and shard.name in refused.stderr and "altered" in refused.stderr


def test_mlflow_knows_what_the_run_saw_and_how_it_went(pairs: Path, trained: Path) -> None:
    version = mlflow.MlflowClient().get_model_version("tested", "1")
    record = mlflow.get_run(version.run_id)
    assert record.info.status == "FINISHED"
    assert record.data.params["preset"] == "nano-x4"
    names = {"loss", "learning_rate", "images_per_s", "data_wait_share", "val_psnr_sample", "val_psnr_bicubic"}
    assert names <= set(record.data.metrics)
    assert record.inputs.dataset_inputs[0].dataset.digest == record.data.params["data_digest"][:32]
    images = [item.path for item in mlflow.MlflowClient().list_artifacts(version.run_id, "images")]
    assert any(path.endswith(".png") for path in images)


def test_the_registered_model_serves_image_bytes_and_holds_no_pickle(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    folder = Path(mlflow.artifacts.download_artifacts("models:/tested/1"))
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix in (".pkl", ".pt", ".pth", ".bin")]
    model = mlflow.pyfunc.load_model("models:/tested/1")
    signature = model.metadata.signature
    assert signature is not None and "binary" in str(signature.inputs) and "binary" in str(signature.outputs)
    (answer,) = model.predict([png(photograph("coffee.png", 24))])
    assert Image.open(io.BytesIO(answer)).size == (96, 96)


def test_two_ray_workers_train_and_register(pairs: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    flags = ["--pairs", pairs, "--output", output, "--num-workers", 2, "--cpus-per-worker", 0.5, *TRAIN_FLAGS]
    done = run("train", *flags, "--register", "on-ray", env={"OMP_NUM_THREADS": "1"})
    assert done.code == 0, done.stderr
    assert done.summary["outputs"][-1] == "models:/on-ray/1"
    record = mlflow.get_run(mlflow.MlflowClient().get_model_version("on-ray", "1").run_id)
    assert {"loss", "data_wait_share", "val_psnr_sample"} <= set(record.data.metrics)
    assert mlflow.MlflowClient().list_artifacts(record.info.run_id, "images")
    assert not [run for run in mlflow.search_runs(search_all_experiments=True, output_format="list")
                if run.info.status == "RUNNING"]  # fmt: skip
    assert all(np.isfinite(value).all() for value in weights(output).values())
    assert os.path.exists(output / "samples" / "step-00000012.png")


def test_more_workers_than_patches_is_refused_before_anything_starts(pairs: Path, tmp_path: Path) -> None:
    done = run("train", "--pairs", pairs, "--output", tmp_path / "run", "--num-workers", 5, "--batch-size", 4)
    assert done.code == 2 and "num_workers (5) must be at most the batch (4), one patch each; use 4" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()

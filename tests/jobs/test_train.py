"""The laws of the training job."""

import io
import os
from collections.abc import Callable
from pathlib import Path

import mlflow
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

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
    import shutil

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


def test_more_workers_than_the_batch_divides_is_refused_before_anything_starts(pairs: Path, tmp_path: Path) -> None:
    done = run("train", "--pairs", pairs, "--output", tmp_path / "run", "--num-workers", 3, "--batch-size", 4)
    assert done.code == 2 and "batch_size (4)" in done.stderr and "use 6" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()

"""Laws of a night in MLflow: a run with its numbers, its errors, its report and its inputs; no server fails a night."""

import json
import time
from pathlib import Path

import mlflow
import pytest
from nights import GIVEN, dead, done, table

from pipelines import tracking
from pipelines.mlflow_store import connect
from pipelines.night import account, publish_night, track_night


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """An empty store takes MLflow seconds to make."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def client(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return connect()


def night(output: Path, *, etag="e", **changes):
    rows = [done("a", etag=etag, lr_psnr=50.0, device_s=60.0, megapixels=2.0), done("b", reason="review", lr_psnr=30.0)]
    rows += [dead("c", "decode", "corrupt", "odd"), dead("d", "st age:", "ré:ason")]
    night = account(table(rows), source=str(output / "in"), output=str(output), **GIVEN | changes)
    publish_night(night, table(rows))
    return night


def artifact(run_id: str, name: str) -> bytes:
    return Path(mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=name)).read_bytes()


def test_the_run_of_a_night_holds_its_numbers_errors_and_report(client, tmp_path):
    made = night(tmp_path, stopped="time is up", left=5)
    run_id = track_night(made)
    found = client.get_run(run_id)
    assert found.info.run_name == "upscale" and found.info.status == "FINISHED"
    metrics = found.data.metrics
    expected = {"inputs": 4, "done": 2, "review": 1, "dead": 2, "left": 5, "output_megapixels": 2.0, "seconds": 100.0}
    expected |= {"assets_per_s": 0.02, "output_megapixels_per_s": 0.02, "device_busy": 0.3, "cost": 0.06}
    expected |= {"lr_psnr_min": 30.0, "lr_psnr_p50": 40.0, "stage_s_device": 60.0, "dead_decode_corrupt": 1.0}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert metrics["dead_st age__r__ason"] == 1.0  # a name that MLflow would refuse
    assert found.data.params == {"sampler": "ddim", "seed": "0", "recipe": "f00d", "model_name": "nano",
                                 "model_version": "3", "model_digest": "d1"}  # fmt: skip
    tags = found.data.tags
    assert tags["diffsr.model_digest"] == "d1" and tags["diffsr.output"] == str(tmp_path)
    assert tags["diffsr.run_id"] == "upscale-1" and tags["diffsr.stopped"] == "time is up"
    for name in ("summary.json", "night.html"):
        assert artifact(run_id, name) == (Path(made.folder) / name).read_bytes()
    errors = json.loads(artifact(run_id, "errors.json"))["failures"]
    assert errors[0] == {
        "stage": "decode",
        "reason": "corrupt",
        "count": 1,
        "examples": [{"key": "c", "message": "odd"}],
    }


def test_the_same_inputs_are_the_same_data_set_in_every_night(client, tmp_path):
    def dataset(**changes):
        (entry,) = client.get_run(track_night(night(tmp_path, **changes))).inputs.dataset_inputs
        return entry.dataset, entry.tags[0].value

    (first, context), (again, _), (other, _) = dataset(), dataset(run_id="upscale-2"), dataset(etag="other")
    assert first.digest == again.digest != other.digest and context == "upscale" and first.name == "upscale"
    assert str(tmp_path / "in") in first.source


def test_a_server_that_is_away_is_said_within_seconds_and_fails_no_night(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
    made, began = night(tmp_path), time.monotonic()
    assert track_night(made) is None and time.monotonic() - began < 10
    said = capsys.readouterr().err
    assert "MLflow does not know of this night" in said and made.folder in said and "secret" not in said


def test_a_server_that_breaks_in_the_middle_leaves_a_failed_run_and_no_error(client, monkeypatch, tmp_path, capsys):
    def full(*_):
        raise OSError("no space left")

    made = night(tmp_path)
    monkeypatch.setattr(tracking, "_log_files", full)
    assert track_night(made) is None and "no space left" in capsys.readouterr().err
    experiment = client.get_experiment_by_name(tracking.EXPERIMENT)
    newest = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time DESC"], max_results=1)
    assert [run.info.status for run in newest] == ["FAILED"]

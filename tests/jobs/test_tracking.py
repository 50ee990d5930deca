"""Laws of pipelines.tracking: a set is logged once, a model's run names the very data set that made it, its code and
its environment; a store that does not answer is known at once."""

import json
import os
import subprocess
import time
from importlib import metadata
from pathlib import Path

import mlflow
import pytest
from mlflow.entities import Dataset, Run

from pipelines import provenance, tracking
from pipelines.manifest import Manifest, Shard
from pipelines.mlflow_store import connect


@pytest.fixture
def client(registry: str) -> mlflow.MlflowClient:
    """A client of the tests' own store."""
    return connect()


def manifest(name: str) -> Manifest:
    shard = Shard(name=f"data/{name}.parquet", bytes=5, sha256="0" * 64, splits={"train": 3})
    return Manifest(recipe={"scale": 4}, shards=[shard])


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name in ("card.html", "manifest.json", "dead_letters.parquet"):
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / name).write_bytes(name.encode())
    return tmp_path / "set"


def log(files: Path, made: Manifest) -> str:
    names = ("card.html", "manifest.json", "dead_letters.parquet")
    return tracking.log_set(
        str(files), made, metrics={"pairs_train": 3.0}, artifacts=[str(files / n) for n in names], params={"scale": 4}
    )


def dataset_of(client: mlflow.MlflowClient, run_id: str) -> tuple[Dataset, str]:
    inputs = client.get_run(run_id).inputs
    assert inputs is not None
    (found,) = inputs.dataset_inputs
    return found.dataset, str(found.tags[0].value)


def runs(client: mlflow.MlflowClient) -> list[Run]:
    experiment = client.get_experiment_by_name(tracking.EXPERIMENT)
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


def test_the_run_of_a_set_holds_its_digest_numbers_and_files(client: mlflow.MlflowClient, files: Path) -> None:
    made = manifest("one")
    found = client.get_run(log(files, made))
    assert found.info.run_name == "pairs" and found.info.status == "FINISHED"
    assert found.data.tags[tracking.PAIRS_DIGEST] == made.digest
    assert found.data.metrics == {"pairs_train": 3.0} and found.data.params == {"scale": "4"}
    dataset, context = dataset_of(client, found.info.run_id)
    assert (dataset.name, dataset.digest, context) == ("pairs", made.digest[:32], "pairs")
    assert f"{files}/manifests/{made.digest}.json" in dataset.source
    for name in ("card.html", "manifest.json", "dead_letters.parquet"):
        path = mlflow.artifacts.download_artifacts(run_id=found.info.run_id, artifact_path=name)
        assert Path(path).read_bytes() == name.encode()


@pytest.mark.parametrize("spelling", ["folder", "relative", "manifest", "immutable"])
def test_the_run_of_a_model_names_the_very_data_set_of_the_run_that_made_it(
    client: mlflow.MlflowClient, files: Path, spelling: str
) -> None:
    made = manifest(spelling)
    pairs = {
        "folder": str(files) + "/",
        "relative": os.path.relpath(files),
        "manifest": f"{files}/manifest.json",
        "immutable": f"{files}/manifests/{made.digest}.json",
    }[spelling]
    same = tracking.pairs_dataset(pairs, made).to_dict()
    assert same == tracking.pairs_dataset(str(files), made).to_dict()
    set_run = log(files, made)
    with tracking.run("train nano-x4") as model_run:
        tracking.log_pairs(pairs, made, context="training")
    of_set, of_model = dataset_of(client, set_run), dataset_of(client, model_run)
    assert dict(of_set[0]) == dict(of_model[0])
    assert (of_set[1], of_model[1]) == ("pairs", "training")


def test_a_rerun_logs_nothing_and_another_set_is_another_run_and_data_set(
    client: mlflow.MlflowClient, files: Path
) -> None:
    first = log(files, manifest("two"))
    before = len(runs(client))
    assert log(files, manifest("two")) == first and len(runs(client)) == before
    other = log(files, manifest("three"))
    assert other != first and len(runs(client)) == before + 1
    assert dataset_of(client, other)[0].digest != dataset_of(client, first)[0].digest


def test_a_run_that_did_not_finish_does_not_count_as_logged(client: mlflow.MlflowClient, files: Path) -> None:
    made = manifest("four")
    (files / "card.html").unlink()
    with pytest.raises(FileNotFoundError):
        log(files, made)
    assert tracking.find_set_run(client, made.digest) is None
    (files / "card.html").write_bytes(b"card.html")
    again = log(files, made)
    assert tracking.find_set_run(client, made.digest) == again


def test_the_run_of_a_model_is_not_taken_for_that_of_its_set(client: mlflow.MlflowClient, files: Path) -> None:
    made = manifest("five")
    with tracking.run("train nano-x4"):
        tracking.log_pairs(str(files), made, context="training")
    assert tracking.find_set_run(client, made.digest) is None


def artifact(run_id: str, name: str) -> str:
    return Path(mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=name)).read_text()


def test_a_run_names_its_code_and_its_environment(client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFSR_COMMIT", "a" * 40)
    with tracking.run("train") as run_id:
        pass
    tags = client.get_run(run_id).data.tags
    assert (tags["diffsr.commit"], tags["diffsr.version"]) == ("a" * 40, metadata.version("diffsr"))
    lines = artifact(run_id, "environment.txt").splitlines()
    assert lines[0].startswith("python 3.") and {f"torch=={metadata.version('torch')}"} <= set(lines)
    packages = lines[lines.index("") + 1 :]
    assert packages == sorted(packages, key=str.lower) and len(set(packages)) == len(packages) > 50
    assert str(Path.home()) not in "".join(lines) and str(Path.cwd()) not in "".join(lines)


def test_a_run_that_other_code_goes_on_with_names_both(
    client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    for commit in ("a", "a", "b", "a"):
        monkeypatch.setenv("DIFFSR_COMMIT", commit * 40)
        known = locals().get("run_id")
        with tracking.run("train", run_id=known, params={"seed": 1}) as run_id:
            pass
    found = client.get_run(run_id)
    assert found.data.tags["diffsr.commit"] == f"{'a' * 40} {'b' * 40} {'a' * 40}"
    assert found.data.params == {"seed": "1"} and found.info.status == "FINISHED"


def test_the_commit_is_that_of_the_checkout_which_has_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DIFFSR_COMMIT", raising=False)
    package = tmp_path / "pipelines"
    package.mkdir()
    monkeypatch.setattr(provenance, "__file__", str(package / "provenance.py"))
    (package / "__init__.py").write_text("")

    def git(*words: str) -> str:
        who = ["-c", "user.name=t", "-c", "user.email=t@t"]
        return subprocess.run(["git", "-C", tmp_path, *who, *words], check=True, capture_output=True, text=True).stdout

    assert provenance.commit() == "unknown"  # no checkout
    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "-m", "another project's")
    assert provenance.commit() == "unknown"  # a package that is installed below another project's checkout
    git("add", ".")
    git("commit", "--quiet", "-m", "package")
    head = git("rev-parse", "HEAD").strip()
    assert provenance.commit() == head
    (package / "__init__.py").write_text("changed = True")
    assert provenance.commit() == f"{head}-dirty"


def test_no_parameter_is_cut_in_silence(client: mlflow.MlflowClient) -> None:
    params = {"short": "x" * 6000, "long": "y" * 6001, **{f"p{index}": index for index in range(150)}}
    with tracking.run("train", params=params) as run_id:
        pass
    found = client.get_run(run_id).data.params
    assert len(found) == 152 and found["short"] == params["short"] and found["p149"] == "149"
    assert len(found["long"]) == 6000 and found["long"].endswith("y... (whole in params.json)")
    assert json.loads(artifact(run_id, "params.json"))["long"] == params["long"]


def test_a_run_is_nested_in_one_of_another_process(client: mlflow.MlflowClient) -> None:
    with tracking.run("search") as parent:
        pass
    with tracking.run("trial", parent=parent) as run_id:
        pass
    assert client.get_run(run_id).data.tags["mlflow.parentRunId"] == parent
    assert client.get_run(run_id).info.run_name == "trial"


def test_the_system_metrics_of_a_continued_run_go_on_where_they_ended(
    client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    name, run_id = "system/cpu_utilization_percentage", None
    counts: list[int] = []
    for _ in range(2):
        with tracking.run("train", run_id=run_id) as run_id:
            end = time.monotonic() + 20
            before = len(counts)
            while len(counts) < before + 3 and time.monotonic() < end:
                time.sleep(0.1)
                counts = [metric.step for metric in client.get_metric_history(run_id, name)]
    assert len(counts) >= 6 and sorted(counts) == list(range(len(counts)))


def test_the_error_of_the_body_is_the_one_that_is_raised_where_the_server_has_gone(
    client: mlflow.MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(status: str) -> None:
        raise ConnectionError("gone")

    with pytest.raises(KeyError, match="body") as caught, tracking.run("train"):
        monkeypatch.setattr(mlflow, "end_run", gone)
        raise KeyError("body")
    monkeypatch.undo()
    mlflow.end_run()
    assert "gone" in caught.value.__notes__[0]


def test_tags_of_a_version_are_added_and_the_others_stay(client: mlflow.MlflowClient) -> None:
    client.create_registered_model("tagged")
    client.create_model_version("tagged", "s3://bucket/model", tags={"diffsr.preset": "nano-x4", "mine": "1"})
    tracking.tag_version(client, "tagged", 1, {"diffsr.preset": "sr3-16-128", "diffsr.scale": "8"})
    found = client.get_model_version("tagged", "1").tags
    assert found == {"diffsr.preset": "sr3-16-128", "diffsr.scale": "8", "mine": "1"}


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("http://me:secret@127.0.0.1:9", r"\(http://127.0.0.1:9\) must name .* answers; .*refused.*start that server"),
        ("postgresql+psycopg2://me:secret@127.0.0.1:9/x", r"\(postgresql\+psycopg2://127.0.0.1:9/x\) must name"),
        ("file:mlruns", r"must name .*maintenance mode.*or use sqlite"),
        ("nowhere://x", r"must name .*unsupported URI.*correct the address"),
    ],
)
def test_a_store_that_does_not_answer_is_an_error_within_seconds(
    registry: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, uri: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    started = time.monotonic()
    with pytest.raises(ValueError, match=says) as caught:
        connect()
    assert "secret" not in str(caught.value)
    assert time.monotonic() - started < 10
    mlflow.set_tracking_uri(registry)


def test_a_file_that_is_no_database_is_an_error_within_seconds(
    registry: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"no database " * 100)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    started = time.monotonic()
    with pytest.raises(ValueError, match="must name an MLflow store that answers; .*not a database"):
        connect()
    assert time.monotonic() - started < 10
    mlflow.set_tracking_uri(registry)

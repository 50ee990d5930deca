"""Laws of pipelines.tracking: a set is logged once, and a model's run names the very data set that made it."""

import os
from pathlib import Path

import mlflow
import pytest
from mlflow.entities import Dataset

from pipelines import tracking
from pipelines.manifest import Manifest, Shard


@pytest.fixture
def client(registry):
    """A client of the tests' own store."""
    return tracking.connect()


def manifest(name):
    shard = Shard(name=f"data/{name}.parquet", bytes=5, sha256="0" * 64, splits={"train": 3})
    return Manifest(recipe={"scale": 4}, shards=[shard])


@pytest.fixture
def files(tmp_path):
    for name in ("card.html", "manifest.json", "dead_letters.parquet"):
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / name).write_bytes(name.encode())
    return tmp_path / "set"


def log(files, made):
    names = ("card.html", "manifest.json", "dead_letters.parquet")
    return tracking.log_set(
        str(files), made, metrics={"pairs_train": 3.0}, artifacts=[str(files / n) for n in names], params={"scale": 4}
    )


def dataset_of(client, run_id) -> tuple[Dataset, str]:
    (found,) = client.get_run(run_id).inputs.dataset_inputs
    return found.dataset, found.tags[0].value


def runs(client):
    return client.search_runs([client.get_experiment_by_name(tracking.EXPERIMENT).experiment_id])


def test_the_run_of_a_set_holds_its_digest_numbers_and_files(client, files):
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
def test_the_run_of_a_model_names_the_very_data_set_of_the_run_that_made_it(client, files, spelling):
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


def test_a_rerun_logs_nothing_and_another_set_is_another_run_and_data_set(client, files):
    first = log(files, manifest("two"))
    before = len(runs(client))
    assert log(files, manifest("two")) == first and len(runs(client)) == before
    other = log(files, manifest("three"))
    assert other != first and len(runs(client)) == before + 1
    assert dataset_of(client, other)[0].digest != dataset_of(client, first)[0].digest


def test_a_run_that_did_not_finish_does_not_count_as_logged(client, files):
    made = manifest("four")
    (files / "card.html").unlink()
    with pytest.raises(FileNotFoundError):
        log(files, made)
    assert tracking.find_set_run(client, made.digest) is None
    (files / "card.html").write_bytes(b"card.html")
    again = log(files, made)
    assert tracking.find_set_run(client, made.digest) == again


def test_the_run_of_a_model_is_not_taken_for_that_of_its_set(client, files):
    made = manifest("five")
    with tracking.run("train nano-x4"):
        tracking.log_pairs(str(files), made, context="training")
    assert tracking.find_set_run(client, made.digest) is None

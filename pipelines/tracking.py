"""MLflow: runs, data sets, logged models, versions and aliases. Nothing here unpickles (law 5)."""

import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from mlflow.data.http_dataset_source import HTTPDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from diffsr_core import checkpoint
from pipelines import storage
from pipelines.blobs import decode_blob
from pipelines.engine import say
from pipelines.manifest import Manifest, pinned_uri
from pipelines.runs import check_tracking

CHAMPION, PREVIOUS = "champion", "previous_champion"
ROLLED_BACK = "diffsr.rolled_back"  # tag of a version that was champion and was rolled back from
EXPERIMENT = "diffsr"
PAIRS_DIGEST = "diffsr.pairs_digest"  # tag of the run that made a pair set: the whole digest of its manifest


def connect() -> mlflow.MlflowClient:
    """Return a client of the store that MLFLOW_TRACKING_URI names; without one, ./mlflow.db and ./mlruns.

    A relative SQLite path is made absolute, so that workers in other folders mean the same store. Raises ValueError for
    a job of a cluster that names no store: its own folder, and a store in it, goes with the job.
    """
    check_tracking()
    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if uri.startswith("sqlite:///"):
        path = Path(uri.removeprefix("sqlite:///")).absolute()
        path.parent.mkdir(parents=True, exist_ok=True)
        uri = f"sqlite:///{path}"
        os.environ["MLFLOW_TRACKING_URI"] = uri
        mlflow.set_tracking_uri(uri)
        if mlflow.get_experiment_by_name(EXPERIMENT) is None:
            mlflow.create_experiment(EXPERIMENT, artifact_location=(path.parent / "mlruns").as_uri())
    else:
        mlflow.set_tracking_uri(uri)
    mlflow.set_experiment(EXPERIMENT)
    return mlflow.MlflowClient()


@contextmanager
def run(name: str, *, run_id: str | None = None, params: Mapping[str, Any] | None = None) -> Iterator[str]:
    """Start a run, or continue one, for the body; give its id. Parameters are logged once; an exception fails it."""
    status = "FAILED"
    active = mlflow.start_run(run_id=run_id, run_name=None if run_id else name, log_system_metrics=run_id is None)
    try:
        if run_id is None:
            mlflow.log_params({key: str(value)[:500] for key, value in (params or {}).items()})
            mlflow.set_tag("diffsr.commit", os.environ.get("DIFFSR_COMMIT", "unknown"))
        yield str(active.info.run_id)
        status = "FINISHED"
    finally:
        mlflow.end_run(status)


def _dataset(uri: str, name: str, digest: str) -> MetaDataset:
    source = HTTPDatasetSource(uri)  # type: ignore[no-untyped-call]
    return MetaDataset(source=source, name=name, digest=digest[:32])  # type: ignore[abstract]


def pairs_dataset(pairs: str, manifest: Manifest) -> MetaDataset:
    """Return the data set that stands for exactly these pairs, in the run that made them and in those that read them.

    Its source is the manifest of that name, which a growing set does not replace.
    """
    return _dataset(pinned_uri(storage.absolute(pairs), manifest), "pairs", manifest.digest)


def log_pairs(pairs: str, manifest: Manifest, *, context: str) -> None:
    """Tie the current run to exactly this pair set."""
    mlflow.log_input(pairs_dataset(pairs, manifest), context=context)


def find_set_run(client: mlflow.MlflowClient, digest: str) -> str | None:
    """Return the id of the finished run that logged the pair set of this digest, or None."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return None
    wanted = f"tags.`{PAIRS_DIGEST}` = '{digest}' and attributes.status = 'FINISHED'"
    found = client.search_runs(
        [experiment.experiment_id], wanted, order_by=["attributes.start_time ASC"], max_results=1
    )
    return str(found[0].info.run_id) if found else None


def log_set(
    pairs: str,
    manifest: Manifest,
    *,
    metrics: Mapping[str, float],
    artifacts: list[str],
    params: Mapping[str, Any],
) -> str:
    """Log a pair set as a run of its own, once, and return the run's id. artifacts: URIs of files, such as the card.

    What was logged for this digest before stays as it is.
    """
    if (known := find_set_run(mlflow.MlflowClient(), manifest.digest)) is not None:
        return known
    with run("pairs", params=params) as run_id:
        mlflow.set_tag(PAIRS_DIGEST, manifest.digest)
        log_pairs(pairs, manifest, context="pairs")
        mlflow.log_metrics(dict(metrics))
        _log_files(artifacts)
    return run_id


def _log_files(uris: list[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="diffsr-") as folder:
        for uri in uris:
            path = Path(folder) / Path(uri).name
            path.write_bytes(storage.read_bytes(uri))
            mlflow.log_artifact(str(path))


def log_model(files: Mapping[str, bytes], *, example: bytes) -> str:
    """Log a model folder with its pyfunc face under the current run; return the model's URI."""
    here = Path(__file__).resolve().parent
    with tempfile.TemporaryDirectory(prefix="diffsr-") as folder:
        home = Path(folder) / "model"  # MLflow keeps this name: resolve() finds the folder by it
        checkpoint.save_files(home, files)
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(here / "served.py"),
            artifacts={"model": str(home)},
            code_paths=[str(here), str(here.parent / "diffsr_core")],
            input_example=[example],
            pip_requirements=["torch", "numpy", "pillow", "safetensors", "fsspec"],
        )
    return str(info.model_uri)


def find_version(client: mlflow.MlflowClient, name: str, *, run_id: str) -> ModelVersion | None:
    """Return the newest version of a name that a run has registered, or None."""
    found = [entry for entry in client.search_model_versions(f"run_id='{run_id}'") if entry.name == name]
    return max(found, key=lambda entry: int(entry.version), default=None)


def register_model(uri: str, name: str) -> int:
    """Register a logged model as the next version of a name; ValueError when this store does not have the model."""
    try:
        return int(mlflow.register_model(uri, name).version)
    except MlflowException as error:
        if not _is_missing(error):
            raise
        raise ValueError(
            f"model ({uri}) must be in the store at {mlflow.get_tracking_uri()} to be registered: "
            "set MLFLOW_TRACKING_URI to the store that it was trained with"
        ) from error


def _is_missing(error: MlflowException) -> bool:
    return bool(error.error_code == "RESOURCE_DOES_NOT_EXIST")


def version_of(ref: str) -> ModelVersion:
    """Return the registry entry of `models:/name@alias` or `models:/name/version`; ValueError when there is none."""
    client = connect()
    name, at, alias = ref.removeprefix("models:/").partition("@")
    try:
        if at:
            return client.get_model_version_by_alias(name, alias)
        name, _, version = name.rpartition("/")
        return client.get_model_version(name, version)
    except MlflowException as error:
        raise ValueError(
            f"model ({ref}) must be in the registry at {mlflow.get_tracking_uri()}; it says: {error.message}"
        ) from None


def download(entry: ModelVersion, folder: str) -> str:
    """Copy the files of a registered version into a folder of this machine; return where they lie in it."""
    return str(mlflow.artifacts.download_artifacts(f"models:/{entry.name}/{entry.version}", dst_path=folder))


def alias_version(client: mlflow.MlflowClient, name: str, alias: str) -> int | None:
    """Return the version that an alias points to, or None where there is no such alias or model.

    Any other error of the registry passes through: read as "no champion" it would let any model in.
    """
    try:
        value = client.get_registered_model(name).aliases.get(alias)
    except MlflowException as error:
        if _is_missing(error):
            return None
        raise
    return None if value is None else int(value)


class Reporter:
    """Takes the training reports in the driver: logs them to a run and shows one line every few seconds.

    The run is named by its id, as MLflow's current run belongs to a thread and reports come in another one.
    """

    def __init__(self, run_id: str, num_steps: int, *, output: str) -> None:
        self.run_id, self.num_steps, self.output = run_id, num_steps, output
        self.last: dict[str, float] = {}
        self._shown = 0.0

    def __call__(self, metrics: Mapping[str, float]) -> None:
        step = int(metrics["step"])
        values = {name: float(value) for name, value in metrics.items() if name != "step"}
        self.last |= values
        mlflow.log_metrics(values, step=step, run_id=self.run_id)
        validated = {name: value for name, value in values.items() if name.startswith("val_")}
        if validated:
            uri = storage.join(self.output, "samples", f"step-{step:08d}.png")
            picture = np.asarray(decode_blob(storage.read_bytes(uri)))
            mlflow.MlflowClient().log_image(self.run_id, picture, key="samples", step=step)
        if validated or step == self.num_steps or time.monotonic() - self._shown > 5:
            self._shown = time.monotonic()
            scores = "".join(f", {name.removeprefix('val_')} {value:.2f} dB" for name, value in validated.items())
            say(
                f"train: step {step} of {self.num_steps}, loss {values['loss']:.4f}, "
                f"{values['images_per_s']:.0f} images/s, waiting {values['data_wait_share']:.1%}{scores}"
            )


def log_evaluation(metrics: Mapping[str, float], *, digest: str, source: str, artifacts: list[str]) -> None:
    """Log scores, the data set's digest and the files of an evaluation to the current run."""
    mlflow.log_metrics(dict(metrics))
    mlflow.log_input(_dataset(source, "evaluation", digest), context="evaluation")
    _log_files(artifacts)


def newest_version(client: mlflow.MlflowClient, name: str) -> int:
    """Return the highest version of a registered model that was not rolled back; ValueError when there is none."""
    found = client.search_model_versions(f"name='{name}'")
    if not found:
        raise ValueError(
            f"model ({name}) must have a registered version at {mlflow.get_tracking_uri()}; train one first"
        )
    versions = [int(entry.version) for entry in found if ROLLED_BACK not in entry.tags]
    if not versions:
        raise ValueError(
            f"model ({name}) must have a version that was not rolled back: train one, or name one with --challenger"
        )
    passed = sorted(int(entry.version) for entry in found if int(entry.version) > max(versions))
    if passed:
        names = ", ".join(f"v{version}" for version in passed)
        say(f"promote: {name} {names} was rolled back and is passed over; --challenger would name it")
    return max(versions)


def move_champion(client: mlflow.MlflowClient, name: str, version: int, *, expected: int | None, evidence: str) -> None:
    """Point the champion alias at a version and keep the old one as previous_champion.

    MLflow has no compare-and-swap for aliases: the alias is read again just before the write, and a champion that is
    not the one that was judged is a ValueError. The alias moves last: killed before, the champion is the old one with
    its evidence, previous_champion at most names it as well, and the same promotion goes through.
    """
    _check_champion(client, name, expected)
    client.set_model_version_tag(name, str(version), "diffsr.evidence", evidence)
    client.set_model_version_tag(name, str(version), "diffsr.promoted_from", str(expected))
    if expected is not None:
        client.set_registered_model_alias(name, PREVIOUS, str(expected))
    client.set_registered_model_alias(name, CHAMPION, str(version))
    if ROLLED_BACK in client.get_model_version(name, str(version)).tags:
        client.delete_model_version_tag(name, str(version), ROLLED_BACK)


def restore_champion(client: mlflow.MlflowClient, name: str, version: int, *, expected: int) -> None:
    """Give the champion alias back to the previous champion, and mark the one that loses it as rolled back.

    There is no previous champion afterwards: a second rollback must not bring the bad version back. Killed after the
    mark, the same rollback goes through; killed after the move, previous_champion names the champion itself.
    """
    _check_champion(client, name, expected)
    client.set_model_version_tag(name, str(expected), ROLLED_BACK, f"to v{version}")
    client.set_registered_model_alias(name, CHAMPION, str(version))
    client.delete_registered_model_alias(name, PREVIOUS)


def _check_champion(client: mlflow.MlflowClient, name: str, expected: int | None) -> None:
    found = alias_version(client, name, CHAMPION)
    if found != expected:
        raise ValueError(f"champion (v{found}) must still be the one that was compared (v{expected}); promote again")

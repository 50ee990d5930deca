"""MLflow: runs, data sets, logged models and their versions. Nothing here unpickles (law 5)."""

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
from mlflow.data.http_dataset_source import HTTPDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH

from diffsr_core import checkpoint
from pipelines import provenance, storage
from pipelines.manifest import Manifest, pinned_uri
from pipelines.mlflow_store import EXPERIMENT as EXPERIMENT
from pipelines.mlflow_store import connect as connect
from pipelines.mlflow_store import impatient, place
from pipelines.registry import is_missing

if TYPE_CHECKING:
    from pipelines.models import ResolvedModel
    from pipelines.night import Night

PAIRS_DIGEST = "diffsr.pairs_digest"  # tag of the run that made a pair set: the whole digest of its manifest
COMMIT = "diffsr.commit"
# What the pyfunc face imports.
PIP_REQUIREMENTS = ["torch", "numpy", "pillow", "pyarrow", "pydantic", "pydantic-settings", "pyvips[binary]", "pyyaml",
                    "safetensors", "fsspec"]  # fmt: skip
MAX_TAG = 500  # characters that every store takes
_NOT_A_NAME = re.compile(r"[^\w.\- /]", re.ASCII)  # what MLflow does not take in the name of a metric


@contextmanager
def run(
    name: str, *, run_id: str | None = None, params: Mapping[str, Any] | None = None, parent: str | None = None
) -> Iterator[str]:
    """Start a run, or continue one, for the body; give its id. An exception fails it.

    Parameters and environment.txt are logged once. The tag diffsr.commit has each commit that worked on the run, the
    first one first. System metrics go on where they ended, unless MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING is false.
    parent: id of the run that this one is nested in; it may be another process's.
    """
    active = mlflow.start_run(
        run_id=run_id,
        run_name=None if run_id else name,
        nested=parent is not None,
        parent_run_id=parent,
        log_system_metrics=False,
    )
    monitor = None
    try:
        if os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true").lower() in ("true", "1"):
            monitor = _system_metrics(active.info.run_id, resume=run_id is not None)
        _tag_code(active.data.tags)
        if run_id is None:
            _log_params(params or {})
            mlflow.log_text(provenance.environment(), "environment.txt")
        yield str(active.info.run_id)
    except BaseException as error:
        try:
            with impatient():
                mlflow.end_run("FAILED")
        except Exception as other:  # the server may be why the body failed: its error is the one that counts
            error.add_note(f"MLflow does not know that run {active.info.run_id} failed: {other}")
        raise
    else:
        mlflow.end_run("FINISHED")
    finally:
        if monitor is not None:
            with impatient():
                monitor.finish()


def _system_metrics(run_id: str, *, resume: bool) -> Any:
    """Return MLflow's monitor of this machine, started. resume: its steps go on after the last one of the run.

    MLflow's own ends at the first request that fails; this one starts over until it is finished.
    """
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    class Monitor(SystemMetricsMonitor):
        def monitor(self) -> None:
            while not self._shutdown_event.is_set():
                super().monitor()  # type: ignore[no-untyped-call]
                self._shutdown_event.wait(self.sampling_interval)

    monitor = Monitor(run_id, resume_logging=resume)  # type: ignore[no-untyped-call]
    monitor.start()  # type: ignore[no-untyped-call]
    return monitor


def _tag_code(tags: Mapping[str, str]) -> None:
    commits, now = tags.get(COMMIT, "").split(), provenance.commit()
    if commits[-1:] != [now]:
        mlflow.set_tag(COMMIT, " ".join([*commits, now]))
    mlflow.set_tag("diffsr.version", provenance.version())


def _log_params(params: Mapping[str, Any]) -> None:
    """Log parameters of the current run. Where one is too long for MLflow, all are in params.json, whole."""
    texts = {key: str(value) for key, value in params.items()}
    whole = "... (whole in params.json)"
    cut = MAX_PARAM_VAL_LENGTH - len(whole)
    short = {key: text if len(text) <= MAX_PARAM_VAL_LENGTH else text[:cut] + whole for key, text in texts.items()}
    if short != texts:
        mlflow.log_text(json.dumps(texts, indent=1), "params.json")
    mlflow.log_params(short)


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


def log_model(
    files: Mapping[str, bytes],
    *,
    example: bytes,
    tags: Mapping[str, str] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> str:
    """Log a model folder with its pyfunc face under the current run; return the model's URI.

    tags: of the logged model, shown and searched in MLflow. metadata: goes into its MLmodel file, with the model.
    """
    from pipelines.pictures import OPERATOR, usual_params  # torch, which most who log need not

    here = Path(__file__).resolve().parent
    with tempfile.TemporaryDirectory(prefix="diffsr-") as folder:
        home = Path(folder) / "model"  # MLflow keeps this name: resolve() finds the folder by it
        checkpoint.save_files(home, files)
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(here / "served.py"),
            artifacts={"model": str(home)},
            code_paths=[str(here), str(here.parent / "diffsr_core")],
            input_example=([example], usual_params(files)),
            model_config=dict(OPERATOR),
            pip_requirements=PIP_REQUIREMENTS,
            tags=dict(tags or {}),
            metadata=dict(metadata or {}),
        )
    return str(info.model_uri)


def find_version(client: mlflow.MlflowClient, name: str, *, run_id: str) -> ModelVersion | None:
    """Return the newest version of a name that a run has registered, or None."""
    found = [entry for entry in client.search_model_versions(f"run_id='{run_id}'") if entry.name == name]
    return max(found, key=lambda entry: int(entry.version), default=None)


def register_model(uri: str, name: str, *, tags: Mapping[str, str] | None = None) -> int:
    """Register a logged model as the next version of a name, tags and all; return its number.

    Raises ValueError when this store does not have the model.
    """
    try:
        return int(mlflow.register_model(uri, name, tags=dict(tags or {})).version)
    except MlflowException as error:
        if not is_missing(error):
            raise
        raise ValueError(
            f"model ({uri}) must be in the store at {place()} to be registered: "
            "set MLFLOW_TRACKING_URI to the store that it was trained with"
        ) from error


def tag_version(client: mlflow.MlflowClient, name: str, version: int, tags: Mapping[str, str]) -> None:
    """Set the tags of a version that differ from these; other tags stay."""
    before = client.get_model_version(name, str(version)).tags
    for key, value in tags.items():
        if before.get(key) != value:
            client.set_model_version_tag(name, str(version), key, value)


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
        raise ValueError(f"model ({ref}) must be in the registry at {place()}; it says: {error.message}") from None


def download(entry: ModelVersion, folder: str) -> str:
    """Copy the files of a registered version into a folder of this machine; return where they lie in it."""
    return str(mlflow.artifacts.download_artifacts(f"models:/{entry.name}/{entry.version}", dst_path=folder))


def log_evaluation(
    metrics: Mapping[str, float],
    *,
    digest: str,
    source: str,
    artifacts: list[str],
    model: "ResolvedModel | None" = None,
) -> None:
    """Log scores, the data set's digest and the files of an evaluation to the current run.

    model: whose scores they are; those of a registered version are then found beside the model, too.
    """
    data = _dataset(source, "evaluation", digest)
    model_id = None
    if model is not None and model.version is not None:
        entry = mlflow.MlflowClient().get_model_version(model.name, str(model.version))
        if (entry.source or "").startswith("models:/m-"):  # MLflow 3's version knows its logged model by this alone
            model_id = str(entry.source).removeprefix("models:/")
    named = {_NOT_A_NAME.sub("_", name): value for name, value in metrics.items()}
    mlflow.log_metrics(named, dataset=data, model_id=model_id)
    mlflow.log_input(data, context="evaluation")
    _log_files(artifacts)


def log_night(night: "Night", artifacts: list[str]) -> str:
    """Log a night as a run `upscale` of its own and return the run's id. artifacts: URIs of its report's files.

    Numbers are metrics, the dead letters by reason errors.json as well; model, recipe and settings are parameters. The
    data set is that of exactly these inputs: the same (key, etag) of a source have the same digest in every night.
    """
    source = storage.absolute(night.source)
    digest = storage.content_etag(f"{source}\0{night.inputs_digest}".encode())  # MLflow keeps one source per digest
    params = {**night.settings, "recipe": night.recipe}
    params |= {f"model_{name}": value for name, value in night.model.items()}
    with run("upscale", params=params) as run_id:
        mlflow.set_tags(
            {
                "diffsr.model_digest": night.model.get("digest", ""),
                "diffsr.output": storage.absolute(night.output),
                "diffsr.run_id": night.run_id,
                "diffsr.stopped": night.stopped[:MAX_TAG],
            }
        )
        mlflow.log_input(_dataset(source, "upscale", digest), context="upscale")
        mlflow.log_metrics({_NOT_A_NAME.sub("_", name): value for name, value in night.numbers().items()})
        mlflow.log_dict({"failures": [asdict(failed) for failed in night.failures]}, "errors.json")
        _log_files(artifacts)
    return run_id

"""How a model reference becomes files, and where a schedule that was found for it goes: a folder or URI, or an entry of
the MLflow registry."""

import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffsr_core import checkpoint
from diffsr_core.family import ModelConfig
from diffsr_core.sampling import SamplingRecipe
from pipelines import storage
from pipelines.blobs import encode_blob
from pipelines.engine import say
from pipelines.shipped import PREFIX, shipped_files

MODEL_FILES = (checkpoint.CARD, checkpoint.WEIGHTS, checkpoint.EMA, checkpoint.CONFIG)  # config.json is published last
FOLDER_FILES = (checkpoint.SAMPLING, *MODEL_FILES)  # a folder may hold the schedule that was found for its network
SCHEDULE_OF, SCHEDULE = "diffsr.schedule_of", "diffsr.schedule"  # tags: version it was found for, and what was found
SCHEDULE_DATA, SCHEDULE_MEASURE = "diffsr.schedule_data", "diffsr.schedule_measure"  # tags: on what, by what
EXAMPLE_PX = 32


@dataclass(frozen=True, kw_only=True)
class ResolvedModel:
    """A model reference, resolved once: its files, digest, and its name and version where it came from the registry.

    sampling: its own schedule, as checkpoint.own_schedule gives it.
    """

    ref: str
    files: Mapping[str, bytes]
    digest: str
    name: str = ""
    version: int | None = None
    sampling: Mapping[str, Any] | None = None

    def check_fits(self, recipe: SamplingRecipe, config: ModelConfig) -> None:
        """Raise ValueError, which names the model, for a recipe that does not fit it. config: the network's."""
        try:
            recipe.check_fits(config)
        except ValueError as error:
            raise ValueError(f"{error} (model {self.label})") from None

    @property
    def label(self) -> str:
        """What a person calls it."""
        return f"{self.name} v{self.version}" if self.version is not None else self.ref


def resolve(ref: str) -> ResolvedModel:
    """Return the model of a folder or URI, `models:/name@alias`, `models:/name/version` or `pretrained:NAME`.

    Raises ValueError for a reference that leads nowhere and for files that are missing or damaged.
    """
    if ref.startswith(PREFIX):
        return _resolved(ref, shipped_files(ref.removeprefix(PREFIX)))
    if ref.startswith("models:/"):
        from pipelines import tracking  # MLflow takes a second to import, and a folder needs none of it

        entry = tracking.version_of(ref)
        with tempfile.TemporaryDirectory(prefix="diffsr-") as folder:
            files = load_files(str(Path(tracking.download(entry, folder)) / "artifacts" / "model"))
        return _resolved(ref, files, name=entry.name, version=int(entry.version))
    files = load_files(ref)
    if not files:
        raise ValueError(f"model ({ref}) must be a folder with {checkpoint.CONFIG}; give one, or models:/NAME@ALIAS")
    return _resolved(ref, files)


def _resolved(ref: str, files: Mapping[str, bytes], *, name: str = "", version: int | None = None) -> ResolvedModel:
    """Return files that make a whole model, and a schedule of this very model if any; raises ValueError for others."""
    try:
        found, document = checkpoint.model_from_files(files)
        sampling = checkpoint.own_schedule(files, found.config)
    except ValueError as error:
        raise ValueError(f"model ({ref}) must be a whole model folder: {error}") from error
    digest = str(document["digest"])
    if sampling is not None and sampling.get("evidence", {}).get("model", digest) != digest:
        raise ValueError(
            f"model ({ref}) has a {checkpoint.SAMPLING} that was found for another network (digest "
            f"{sampling['evidence']['model']:.12}, this one's is {digest:.12}); delete it, or search the schedule again"
        )
    return ResolvedModel(ref=ref, files=files, digest=digest, name=name, version=version, sampling=sampling)


def publish_model(model: ResolvedModel, output: str) -> str:
    """Copy the files to `<output>/_diffsr/models/<digest>/`, once, and return that URI: workers need no registry.

    A schedule that was found since, which does not change the digest, is copied too.
    """
    uri = storage.join(output, "_diffsr", "models", model.digest)
    if not storage.exists(storage.join(uri, checkpoint.CONFIG)):
        publish_files(uri, model.files)
    elif _read(uri, checkpoint.SAMPLING) != model.files.get(checkpoint.SAMPLING):
        _publish_sampling(uri, model.files)
    return uri


def publish_files(uri: str, files: Mapping[str, bytes]) -> None:
    """Write a model folder, config.json last: a folder without it is none. Another network's sampling.json goes."""
    for name in MODEL_FILES:
        if name == checkpoint.CONFIG:
            _publish_sampling(uri, files)
        if name in files:
            storage.publish(storage.join(uri, name), files[name])


def _publish_sampling(uri: str, files: Mapping[str, bytes]) -> None:
    place = storage.join(uri, checkpoint.SAMPLING)
    if checkpoint.SAMPLING in files:
        storage.publish(place, files[checkpoint.SAMPLING])
    else:
        storage.delete(place)


def load_files(uri: str) -> dict[str, bytes]:
    """Return those files of a model folder that are there, by name."""
    found = {name: _read(uri, name) for name in FOLDER_FILES}
    return {name: data for name, data in found.items() if data is not None}


def _read(uri: str, name: str) -> bytes | None:
    with suppress(FileNotFoundError, NotADirectoryError):
        return storage.read_bytes(storage.join(uri, name))
    return None


def store_sampling(model: ResolvedModel, document: Mapping[str, Any]) -> str:
    """Store a schedule with its evidence, sampling.json; return where: the folder, or `models:/NAME/VERSION`.

    In a folder it is published atomically. What is in the registry does not change: there the same files with it become
    a new version, whose promotion is judged as that of any other. Storing what is there already writes nothing. Raises
    ValueError for a document that is none, and when the folder's model is another one by now.
    """
    data = checkpoint.schedule_json(document)
    what = " ".join(f"{name}={document[name]}" for name in checkpoint.SCHEDULE)
    if model.sampling is not None and _told(model.sampling) == _told(document):
        say(f"{model.label} has this schedule already: {what}")
        return model.ref if model.version is None else f"models:/{model.name}/{model.version}"
    if model.version is not None:
        return _register(model, {**model.files, checkpoint.SAMPLING: data}, document["evidence"], what)
    if resolve(model.ref).digest != model.digest:
        raise ValueError(
            f"model ({model.ref}) must be the one that was measured; it was replaced meanwhile: search again"
        )
    storage.publish(storage.join(model.ref, checkpoint.SAMPLING), data)
    say(f"{model.label} has a schedule of its own now: {what}")
    return model.ref


def _register(model: ResolvedModel, files: Mapping[str, bytes], evidence: Mapping[str, Any], what: str) -> str:
    """Return the version of these files: the one that an earlier search made, or a new one."""
    import mlflow

    from pipelines import registry, tracking

    client = tracking.connect()
    tags = {SCHEDULE_OF: str(model.version), SCHEDULE: what, SCHEDULE_DATA: evidence["data"],
            SCHEDULE_MEASURE: evidence["measure"]}  # fmt: skip
    for entry in client.search_model_versions(f"name='{model.name}'"):
        if tags.items() <= entry.tags.items():
            say(f"{model.name} v{entry.version} is {model.label} with this schedule already: {what}")
            return f"models:/{model.name}/{entry.version}"
    before = client.get_model_version(model.name, str(model.version)).tags
    judged = (registry.ROLLED_BACK, registry.EVIDENCE, registry.VERDICT, registry.PROMOTED_FROM)
    tags = {name: text for name, text in before.items() if name not in judged} | tags
    active = mlflow.active_run()
    parent = None if active is None else str(active.info.run_id)
    with tracking.run(f"schedule {model.label}", params={**evidence, "schedule": what}, parent=parent):
        uri = tracking.log_model(files, example=_example(files), tags=tags)
        version = tracking.register_model(uri, model.name, tags=tags)
    say(f"{model.label} with {what} is registered as {model.name} v{version}; promote it by its number")
    return f"models:/{model.name}/{version}"


def _example(files: Mapping[str, bytes]) -> bytes:
    """Return a small picture of as many channels as the model takes."""
    channels = checkpoint.model_from_files(files)[0].config.encoder.lr_channels
    ramp = np.linspace(0, 255, EXAMPLE_PX, dtype=np.uint8)
    return encode_blob(np.broadcast_to(ramp[:, None], (EXAMPLE_PX, EXAMPLE_PX, channels)).copy(), "png")


def _told(document: Mapping[str, Any]) -> list[Any]:
    """Return what makes two stored schedules the same: all but the time, which differs from run to run."""
    evidence = document.get("evidence", {})
    return [document.get(name) for name in checkpoint.SCHEDULE] + [
        evidence.get(n) for n in ("model", "data", "measure", "value")
    ]

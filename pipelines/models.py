"""How a model reference becomes files: a folder or URI, or an entry of the MLflow registry."""

import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from diffsr_core import checkpoint
from pipelines import storage

MODEL_FILES = (checkpoint.CARD, checkpoint.WEIGHTS, checkpoint.EMA, checkpoint.CONFIG)  # config.json is published last


@dataclass(frozen=True, kw_only=True)
class ResolvedModel:
    """A model reference, resolved once: its files, digest, and its name and version where it came from the registry."""

    ref: str
    files: Mapping[str, bytes]
    digest: str
    name: str = ""
    version: int | None = None

    @property
    def label(self) -> str:
        """What a person calls it."""
        return f"{self.name} v{self.version}" if self.version is not None else self.ref


def resolve(ref: str) -> ResolvedModel:
    """Return the model of a folder or URI, `models:/name@alias` or `models:/name/version`.

    Raises ValueError for a reference that leads nowhere and for files that are missing or damaged.
    """
    if ref.startswith("pretrained:"):
        raise ValueError(
            f"model ({ref}) must be one that exists; no model ships yet: train one, or use models:/NAME@ALIAS"
        )
    if ref.startswith("models:/"):
        from pipelines import tracking  # MLflow takes a second to import, and a folder needs none of it

        entry = tracking.version_of(ref)
        with tempfile.TemporaryDirectory(prefix="diffsr-") as folder:
            files = load_files(str(Path(tracking.download(entry, folder)) / "artifacts" / "model"))
        return ResolvedModel(
            ref=ref, files=files, digest=_digest(ref, files), name=entry.name, version=int(entry.version)
        )
    files = load_files(ref)
    if not files:
        raise ValueError(f"model ({ref}) must be a folder with {checkpoint.CONFIG}; give one, or models:/NAME@ALIAS")
    return ResolvedModel(ref=ref, files=files, digest=_digest(ref, files))


def _digest(ref: str, files: Mapping[str, bytes]) -> str:
    """Return the digest of files that make a whole model; raises ValueError for any others."""
    try:
        _, document = checkpoint.model_from_files(files)
    except ValueError as error:
        raise ValueError(f"model ({ref}) must be a whole model folder: {error}") from error
    return str(document["digest"])


def publish_model(model: ResolvedModel, output: str) -> str:
    """Copy the files to `<output>/_diffsr/models/<digest>/`, once, and return that URI: workers need no registry."""
    uri = storage.join(output, "_diffsr", "models", model.digest)
    if not storage.exists(storage.join(uri, checkpoint.CONFIG)):
        publish_files(uri, model.files)
    return uri


def publish_files(uri: str, files: Mapping[str, bytes]) -> None:
    """Write a model folder, config.json last: a folder without it is none."""
    for name in MODEL_FILES:
        if name in files:
            storage.publish(storage.join(uri, name), files[name])


def load_files(uri: str) -> dict[str, bytes]:
    """Return those files of a model folder that are there, by name."""
    found = {}
    for name in MODEL_FILES:
        with suppress(FileNotFoundError, NotADirectoryError):
            found[name] = storage.read_bytes(storage.join(uri, name))
    return found

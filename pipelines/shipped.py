"""The models that come with DiffSR, `pretrained:NAME`: folders inside the package."""

from importlib.resources import files
from importlib.resources.abc import Traversable

PREFIX = "pretrained:"


def names() -> list[str]:
    """Return the names of the models that this installation has."""
    return sorted(folder.name for folder in _root().iterdir() if folder.is_dir() and not folder.name.startswith("_"))


def shipped_files(name: str) -> dict[str, bytes]:
    """Return a model's files by name. Raises ValueError, which lists the names, when there is none."""
    if name not in names():
        known = ", ".join(PREFIX + known for known in names())
        raise ValueError(f"model ({PREFIX}{name}) must be one of those that ship; use one of them: {known}")
    return {item.name: item.read_bytes() for item in (_root() / name).iterdir() if item.is_file()}


def _root() -> Traversable:
    return files("pipelines") / "pretrained"

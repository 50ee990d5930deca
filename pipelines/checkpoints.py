"""Training checkpoints: `<output>/checkpoints/<step>/`, safetensors and JSON, whole or not there.

    config.json, model.safetensors, ema.safetensors, README.md      the model folder's files, made by the caller
    ema-<images>.safetensors    each average beside the model's EMA, by its half-life
    optimizer.safetensors
    state.json      counters, metrics, earlier reports, score, size and sha256 of each other file, the digest of it all

state.json is written last and deleted first: a checkpoint without it, or whose files are not those that it names, was
cut short or damaged. It is reported, and another one is used. Sizes are compared before any content is read.
"""

import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple

from safetensors.torch import load, save
from torch import Tensor

from diffsr_core.checkpoint import EMA, WEIGHTS
from diffsr_core.training import TrainerState
from pipelines import storage
from pipelines.engine import say

OPTIMIZER, STATE = "optimizer.safetensors", "state.json"
_BESIDE_THE_MODEL = re.compile(rf"{re.escape(OPTIMIZER)}|ema-\d+\.safetensors")
_READERS = 8  # files read at a time: an object store answers them side by side
_BLOCK_BYTES = 32 << 20  # of one request to it

Document = dict[str, Any]


class Saved(NamedTuple):
    """A checkpoint in memory: its state, and the model folder's files by name.

    metrics: those of the report that it belongs to; earlier: the reports between the checkpoint before and that one.
    """

    state: TrainerState
    metrics: dict[str, float]
    files: dict[str, bytes]
    earlier: list[dict[str, float]]


class _Damaged(Exception):
    """What is wrong with a checkpoint."""


def save_checkpoint(
    output: str,
    files: Mapping[str, bytes],
    state: TrainerState,
    *,
    metrics: Mapping[str, float],
    keep: int,
    score: float | None = None,
    earlier: Sequence[Mapping[str, float]] = (),
) -> None:
    """Publish a checkpoint, then delete all but the newest `keep` and the best one.

    files: the model folder's, made of state.weights and the first of state.averages. score: lower is better, of equal
    ones the later; one that is None or not finite is never the best. What a killed run has left of this step or of
    later ones, which training has gone back behind, is deleted too. Raises OSError when the files cannot be stored (a
    full disk), with the other checkpoints as they were; ValueError for a keep below 1.
    """
    if keep < 1:
        raise ValueError(f"keep ({keep}) must be at least 1, or nothing could be continued; use 2")
    step, lives = int(state.counters["step"]), list(state.averages)
    payload = {
        **files,
        **{_average(images): _pack(state.averages[images]) for images in lives[1:]},
        OPTIMIZER: _pack(state.optimizer),
    }
    document: Document = {
        "averages": lives,
        "counters": {name: _to_json(value) for name, value in state.counters.items()},
        "metrics": {name: _to_json(value) for name, value in metrics.items()},
        "earlier": [{name: _to_json(value) for name, value in report.items()} for report in earlier],
        "score": score if score is not None and math.isfinite(score) else None,
        "bytes": {name: len(data) for name, data in payload.items()},
        "sha256": {name: storage.digest_bytes(data) for name, data in payload.items()},
    }
    document["digest"] = _digest(document)
    root = storage.join(output, "checkpoints")
    storage.sweep(root)  # a worker killed while it wrote leaves a temporary file as large as the model
    _sweep_folders(root)
    _remove(root, step)
    _publish(root, step, {**payload, STATE: json.dumps(document, allow_nan=False).encode()})
    _prune(root, step, keep)


def load_newest(output: str) -> Saved | None:
    """Return the newest whole checkpoint, None without one; damaged newer ones are reported."""
    root = storage.join(output, "checkpoints")
    found = _first_whole(root, _newest_first(root), wanted=lambda name: True)
    if found is None:
        return None
    document, data = found
    lives = document["averages"]
    state = TrainerState(
        weights=load(data[WEIGHTS]),
        averages={lives[0]: load(data[EMA])} | {images: load(data[_average(images)]) for images in lives[1:]},
        optimizer=load(data[OPTIMIZER]),
        counters=_from_json(document["counters"]),
    )
    files = {name: content for name, content in data.items() if _is_of_model(name)}
    return Saved(state, _from_json(document["metrics"]), files, [_from_json(each) for each in document["earlier"]])


def newest_step(output: str) -> int:
    """Return the step of the newest whole checkpoint, 0 without one.

    Its files are hashed, so they are read, but never held: who is to load it anyway asks `load_newest` instead.
    """
    root = storage.join(output, "checkpoints")
    found = _first_whole(root, _newest_first(root), wanted=lambda name: False)
    return 0 if found is None else int(found[0]["counters"]["step"])


def newest_files(output: str) -> dict[str, bytes] | None:
    """Return the model folder's files of the newest whole checkpoint by name, None without one."""
    root = storage.join(output, "checkpoints")
    found = _first_whole(root, _newest_first(root), wanted=_is_of_model)
    return None if found is None else found[1]


def best_files(output: str) -> dict[str, bytes] | None:
    """Return as `newest_files`, but of the checkpoint with the lowest score, if any has one."""
    root = storage.join(output, "checkpoints")
    ranks: dict[int, float] = {}
    for step in _newest_first(root):
        ranks[step] = -math.inf  # one whose score cannot be read might be the best: it comes first, to be reported
        with suppress(_Damaged):
            ranks[step] = _rank(_document(root, step))
    found = _first_whole(root, sorted(ranks, key=lambda step: (ranks[step], -step)), wanted=_is_of_model)
    return None if found is None else found[1]


def _publish(root: str, step: int, files: Mapping[str, bytes]) -> None:
    """Store the files in their order; where one fails, none stay."""
    for name, data in files.items():
        uri = storage.join(_folder(root, step), name)
        try:
            storage.publish(uri, data)
        except OSError as error:
            with suppress(OSError):  # what cannot be deleted has no state.json, and harms nobody
                _remove(root, step)
            need = f"{name} needs {len(data):,} bytes, the checkpoint {sum(map(len, files.values())):,}"
            what = f"{error.strerror or error}: {need}"
            raise OSError(error.errno or errno.EIO, what, error.filename or uri) from error


def _prune(root: str, newest: int, keep: int) -> None:
    """Delete all but the newest `keep`, and the best, of those up to `newest` that have their files in their sizes."""
    steps = _newest_first(root)
    ranks: dict[int, float] = {}
    for step in steps:
        with suppress(_Damaged):
            ranks[step] = _rank(_measured(root, step))
    whole = [step for step in steps if step in ranks and step <= newest]
    kept = {*whole[:keep], min(whole, key=lambda step: (ranks[step], -step), default=newest)}
    for step in steps:
        if step not in kept:
            _remove(root, step)


def _remove(root: str, step: int) -> None:
    """Delete a checkpoint, or what there is of it, state.json first: what is half deleted is not taken for whole."""
    folder = _folder(root, step)
    for name in sorted(storage.list_names(folder), key=lambda name: name != STATE):
        storage.delete(storage.join(folder, name))
    if storage.is_local(folder):  # object stores have no folders
        with suppress(OSError):
            os.rmdir(folder.removeprefix("file://"))


def _sweep_folders(root: str) -> None:
    """Delete the folders that a worker killed between its last file and its folder has left: no listing names them."""
    if storage.is_local(root):
        folder = root.removeprefix("file://")
        with suppress(FileNotFoundError):
            for name in filter(str.isdecimal, os.listdir(folder)):
                with suppress(OSError):  # one with files in it stays
                    os.rmdir(os.path.join(folder, name))


def _first_whole(
    root: str, steps: Iterable[int], *, wanted: Callable[[str], bool]
) -> tuple[Document, dict[str, bytes]] | None:
    """Return state.json and the wanted files of the first whole checkpoint; say what is wrong with those before it."""
    troubles: list[str] = []
    found, instead = None, "no other is whole"
    for step in steps:
        try:
            found, instead = _read(root, step, wanted), f"checkpoint {step:08d} is used instead"
        except _Damaged as error:
            troubles.append(f"train: checkpoint {step:08d} is passed over, {error}")
            continue
        break
    for trouble in troubles:
        say(f"{trouble}; {instead}")
    return found


def _read(root: str, step: int, wanted: Callable[[str], bool]) -> tuple[Document, dict[str, bytes]]:
    """Return state.json and the wanted files; all are hashed, side by side. Raises _Damaged."""
    document, folder = _measured(root, step), _folder(root, step)

    def fetch(name: str) -> tuple[str, bytes]:
        uri = storage.join(folder, name)
        if wanted(name):
            data = storage.read_bytes(uri)
            return storage.digest_bytes(data), data
        with storage.open_file(uri, block_bytes=_BLOCK_BYTES) as file:
            return hashlib.file_digest(file, "sha256").hexdigest(), b""  # type: ignore[arg-type]

    hashes = document["sha256"]
    with ThreadPoolExecutor(_READERS) as pool:
        fetched = dict(zip(hashes, pool.map(fetch, hashes), strict=True))
    if altered := [name for name, sha256 in hashes.items() if fetched[name][0] != sha256]:
        raise _Damaged(f"{' and '.join(altered)} {'was' if len(altered) == 1 else 'were'} altered")
    return document, {name: data for name, (_, data) in fetched.items() if wanted(name)}


def _measured(root: str, step: int) -> Document:
    """Return what state.json says, its files being there in their sizes. Raises _Damaged."""
    document = _document(root, step)
    for name, expected in document["bytes"].items():
        found = storage.size(storage.join(_folder(root, step), name))
        if found != expected:
            raise _Damaged(f"{name} " + ("is missing" if found is None else f"has {found:,} of {expected:,} bytes"))
    return document


def _document(root: str, step: int) -> Document:
    """Return what state.json says. Raises _Damaged."""
    try:
        data = storage.read_bytes(storage.join(_folder(root, step), STATE))
    except FileNotFoundError:
        raise _Damaged(f"it was cut short: {STATE} is missing") from None
    try:
        document: Document = json.loads(data)
        intact = document["digest"] == _digest(document)
    except (ValueError, LookupError, TypeError, AttributeError):  # no JSON, or another document
        intact = False
    if not intact:
        raise _Damaged(f"{STATE} is damaged")
    return document


def _digest(document: Document) -> str:
    """Return the digest of what a state.json says beside it. Raises ValueError for a number that JSON has not."""
    said = {name: value for name, value in document.items() if name != "digest"}
    return storage.digest_bytes(json.dumps(said, sort_keys=True, allow_nan=False).encode())


def _to_json(value: float) -> float | str:
    """Return a number, or its name where JSON has none: "nan", "inf", "-inf"."""
    return value if math.isfinite(value) else str(float(value))


def _from_json(values: Mapping[str, int | float | str]) -> dict[str, int | float]:
    return {name: float(value) if isinstance(value, str) else value for name, value in values.items()}


def _rank(document: Document) -> float:
    return math.inf if document["score"] is None else float(document["score"])


def _newest_first(root: str) -> list[int]:
    """Return the steps of which there is something; what others put beside our folders is not ours."""
    folders = {name.partition("/")[0] for name in storage.list_names(root) if "/" in name}
    steps = [int(folder) for folder in folders if folder.isascii() and folder.isdigit()]
    return sorted((step for step in steps if f"{step:08d}" in folders), reverse=True)


def _folder(root: str, step: int) -> str:
    return storage.join(root, f"{step:08d}")


def _average(images: int) -> str:
    return f"ema-{images}.safetensors"


def _is_of_model(name: str) -> bool:
    return not _BESIDE_THE_MODEL.fullmatch(name)


def _pack(tensors: Mapping[str, Tensor]) -> bytes:
    return save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})

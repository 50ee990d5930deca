"""Training checkpoints: `<output>/checkpoints/<step>/`, safetensors and JSON, whole or not there.

state.json is written last and holds the hash of every other file: a checkpoint without it, or with another hash, was
cut short, is reported, and the one before it is used. It also keeps the metrics of the report that it belongs to.
"""

import json
from collections.abc import Mapping

from safetensors.torch import load, save
from torch import Tensor

from diffsr_core.checkpoint import EMA, WEIGHTS
from pipelines import storage
from pipelines.engine import say

OPTIMIZER, STATE = "optimizer.safetensors", "state.json"
Saved = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], dict[str, int], dict[str, float]]


def save_checkpoint(
    output: str,
    files: Mapping[str, bytes],
    optimizer: Mapping[str, Tensor],
    counters: Mapping[str, int],
    *,
    metrics: Mapping[str, float],
    keep: int,
) -> None:
    """Publish one checkpoint, then delete all but the newest `keep`."""
    folder = storage.join(output, "checkpoints", f"{counters['step']:08d}")
    payload = {**files, OPTIMIZER: save({name: value.contiguous().cpu() for name, value in optimizer.items()})}
    for name, data in payload.items():
        storage.publish(storage.join(folder, name), data)
    hashes = {name: storage.digest_bytes(data) for name, data in payload.items()}
    document = {**counters, "metrics": dict(metrics), "sha256": hashes}
    storage.publish(storage.join(folder, STATE), json.dumps(document).encode())
    names = storage.list_names(storage.join(output, "checkpoints"))
    steps = sorted({name.split("/")[0] for name in names})
    for name in names:
        if name.split("/")[0] in steps[:-keep]:
            storage.delete(storage.join(output, "checkpoints", name))


def load_newest(output: str) -> Saved | None:
    """Return (weights, EMA, optimizer tensors, counters, metrics) of the newest whole checkpoint, None without one."""
    found = newest_files(output)
    if found is None:
        return None
    counters = json.loads(found[STATE])
    del counters["sha256"]
    metrics = counters.pop("metrics", {})
    return load(found[WEIGHTS]), load(found[EMA]), load(found[OPTIMIZER]), counters, metrics


def newest_step(output: str) -> int:
    """Return the step of the newest whole checkpoint, 0 without one; costs reading it, as its hashes are checked."""
    found = newest_files(output)
    return 0 if found is None else int(json.loads(found[STATE])["step"])


def newest_files(output: str) -> dict[str, bytes] | None:
    """Return the files of the newest whole checkpoint by name; a damaged one is reported and passed over."""
    root = storage.join(output, "checkpoints")
    names = storage.list_names(root)
    for step in sorted({name.split("/")[0] for name in names}, reverse=True):
        inside = [name for name in names if name.startswith(f"{step}/")]
        found = {name.split("/")[1]: storage.read_bytes(storage.join(root, name)) for name in inside}
        if STATE not in found:
            say(f"train: checkpoint {step} was cut short and is passed over")
            continue
        try:
            hashes = json.loads(found[STATE])["sha256"]
        except (ValueError, KeyError, TypeError):
            say(f"train: checkpoint {step} is damaged ({STATE}) and is passed over")
            continue
        bad = [name for name, sha256 in hashes.items() if storage.digest_bytes(found.get(name, b"")) != sha256]
        if not bad:
            return found
        say(f"train: checkpoint {step} is damaged ({', '.join(bad)}) and is passed over")
    return None

"""A model is a folder: config.json, model.safetensors, ema.safetensors and README.md (the card). No pickle anywhere."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from diffsr_core.family import DENOISERS, ENCODERS, ModelConfig, SuperResolver
from diffsr_core.schedule import Schedule

FORMAT = 2
WEIGHTS, EMA, CONFIG, CARD = "model.safetensors", "ema.safetensors", "config.json", "README.md"


def model_files(
    config: ModelConfig, weights: Mapping[str, Tensor], ema: Mapping[str, Tensor], *, preset: str, card: str
) -> dict[str, bytes]:
    """Return the folder's files by name. The digest in config.json covers the settings and both weight files."""
    payload = {WEIGHTS: _pack(weights), EMA: _pack(ema)}
    settings = {"format": FORMAT, "preset": preset, "model": dataclasses.asdict(config)}
    document = {**settings, "digest": _digest(settings, payload)}
    return {**payload, CARD: card.encode(), CONFIG: json.dumps(document, indent=2, sort_keys=True).encode()}


def model_from_files(files: Mapping[str, bytes], *, ema: bool = True) -> tuple[SuperResolver, dict[str, Any]]:
    """Return (model in eval mode, config.json).

    Missing, foreign or damaged files are a ValueError, never random weights.
    """
    for name in (CONFIG, WEIGHTS, EMA):
        if name not in files:
            raise ValueError(f"model folder ({sorted(files)}) lacks {name}; copy the folder again, whole")
    document = _document(files[CONFIG])
    settings = {key: document[key] for key in ("format", "preset", "model")}
    found = _digest(settings, {name: files[name] for name in (WEIGHTS, EMA)})
    if found != document["digest"]:
        raise ValueError(f"model digest ({found}) must equal config.json's {document['digest']}; the files are damaged")
    model = SuperResolver(config_from_json(document["model"]))
    model.load_state_dict(load(files[EMA if ema else WEIGHTS]))
    return model.eval(), document


def save_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write the files into a folder of this machine."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def load_model(folder: Path, *, ema: bool = True) -> tuple[SuperResolver, dict[str, Any]]:
    """Return `model_from_files` of a folder of this machine."""
    names = [name for name in (CONFIG, WEIGHTS, EMA) if (folder / name).is_file()]
    return model_from_files({name: (folder / name).read_bytes() for name in names}, ema=ema)


def config_from_json(fields: Mapping[str, Any]) -> ModelConfig:
    """Return the ModelConfig that `dataclasses.asdict` and JSON made of it."""
    denoiser = fields["denoiser"]
    return ModelConfig(
        **{
            **fields,
            "encoder": _network(fields["encoder"], ENCODERS),
            "denoiser": None if denoiser is None else _network(denoiser, DENOISERS),
            "schedule": Schedule(**fields["schedule"]),
        }
    )


def _network(fields: Mapping[str, Any], known: Mapping[str, tuple[type, Any]]) -> Any:
    """Return the settings of a network, whose class its `kind` names."""
    if fields.get("kind") not in known:
        raise ValueError(f"network kind ({fields.get('kind')!r}) must be one of {', '.join(known)}; update DiffSR")
    typed: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
    if "network" in typed:
        typed["network"] = _network(typed["network"], DENOISERS)
    return known[fields["kind"]][0](**typed)


def _document(data: bytes) -> dict[str, Any]:
    try:
        document = json.loads(data)
    except ValueError as error:  # not JSON, or not even text
        raise ValueError(f"{CONFIG} is not JSON ({error}); copy the folder again, whole") from error
    if not isinstance(document, dict):
        raise ValueError(f"{CONFIG} holds a {type(document).__name__}, it must be an object; name a model folder")
    if document.get("format") != FORMAT:
        raise ValueError(f"model format ({document.get('format')}) must be {FORMAT}; use the version that wrote it")
    for key in ("preset", "model", "digest"):
        if key not in document:
            raise ValueError(f"{CONFIG} lacks {key}; copy the folder again, whole")
    return document


def _pack(tensors: Mapping[str, Tensor]) -> bytes:
    return save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})


def _digest(settings: Mapping[str, Any], payload: Mapping[str, bytes]) -> str:
    hasher = hashlib.sha256(json.dumps(settings, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(payload):
        hasher.update(hashlib.sha256(payload[name]).digest())
    return hasher.hexdigest()

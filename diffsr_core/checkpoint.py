"""A model is a folder: config.json, model.safetensors, ema.safetensors and README.md (the card). No pickle anywhere.

A released one has no ema.safetensors: its model.safetensors is the average, in half precision.

A sampling.json beside them is the schedule that was found for the network, with its evidence: no part of the digest.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from diffsr_core.family import DENOISERS, ENCODERS, ModelConfig, SuperResolver
from diffsr_core.sampling import SamplingRecipe, one_step_of
from diffsr_core.schedule import Schedule

FORMAT = 2
WEIGHTS, EMA, CONFIG, CARD = "model.safetensors", "ema.safetensors", "config.json", "README.md"
SAMPLING = "sampling.json"
SCHEDULE = {"sampler": str, "grid": str, "num_steps": int, "start_level": float}  # fields of a SamplingRecipe
EVIDENCE = {"model": str, "data": str, "measure": str, "value": float, "interval": list, "device_s_per_mp": float}


def model_files(
    config: ModelConfig, weights: Mapping[str, Tensor], ema: Mapping[str, Tensor], *, preset: str, card: str
) -> dict[str, bytes]:
    """Return the folder's files by name. The digest in config.json covers the settings and both weight files."""
    return _folder(config, {WEIGHTS: _pack(weights), EMA: _pack(ema)}, preset=preset, card=card)


def released_files(files: Mapping[str, bytes], *, card: str) -> dict[str, bytes]:
    """Return a folder's files as they are given to others: the average alone, float16, a quarter of the bytes.

    It is another model with a digest of its own, which computes in float32 as before; it cannot be resumed. A
    sampling.json is of the other digest, and left out. Raises ValueError as model_from_files.
    """
    model, document = model_from_files(files)
    halves = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    return _folder(model.config, {WEIGHTS: _pack(halves)}, preset=document["preset"], card=card)


def _folder(config: ModelConfig, payload: dict[str, bytes], *, preset: str, card: str) -> dict[str, bytes]:
    settings = {"format": FORMAT, "preset": preset, "model": dataclasses.asdict(config)}
    document = {**settings, "digest": _digest(settings, payload), "weights": sorted(payload)}
    return {**payload, CARD: card.encode(), CONFIG: json.dumps(document, indent=2, sort_keys=True).encode()}


def model_from_files(files: Mapping[str, bytes], *, ema: bool = True) -> tuple[SuperResolver, dict[str, Any]]:
    """Return (model in eval mode, config.json).

    Missing, foreign or damaged files are a ValueError, never random weights.
    """
    if CONFIG not in files:
        raise ValueError(f"model folder ({sorted(files)}) lacks {CONFIG}; copy the folder again, whole")
    document = _document(files[CONFIG])
    for name in document["weights"]:
        if name not in files:
            raise ValueError(f"model folder ({sorted(files)}) lacks {name}; copy the folder again, whole")
    settings = {key: document[key] for key in ("format", "preset", "model")}
    found = _digest(settings, {name: files[name] for name in document["weights"]})
    if found != document["digest"]:
        raise ValueError(f"model digest ({found}) must equal config.json's {document['digest']}; the files are damaged")
    model = SuperResolver(config_from_json(document["model"]))
    model.load_state_dict(load(files[EMA if ema and EMA in document["weights"] else WEIGHTS]))
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


def schedule_json(document: Mapping[str, Any]) -> bytes:
    """Return sampling.json: the fields of SCHEDULE, and `evidence` with those of EVIDENCE. Raises ValueError.

    evidence: the digests of the model and the data set, the measure, its mean and the ends of its interval, and the
    seconds of network calls per output megapixel.
    """
    data = json.dumps(document, indent=1).encode()
    schedule_from_files({SAMPLING: data})
    return data


def schedule_from_files(files: Mapping[str, bytes]) -> dict[str, Any] | None:
    """Return the document of sampling.json, None without one. Raises ValueError for one that is not as it was written.

    Whether it is of this very network is for who knows the digest to compare, with evidence.model.
    """
    if SAMPLING not in files:
        return None
    try:
        document = json.loads(files[SAMPLING])
        _check_fields("schedule", document, {**SCHEDULE, "evidence": dict})
        _check_fields("evidence", document["evidence"], EVIDENCE)
        ends = document["evidence"]["interval"]
        if len(ends) != 2 or not all(_is(float, end) for end in ends):
            raise ValueError(f"interval ({ends}) must be two numbers")
        SamplingRecipe(**{name: document[name] for name in SCHEDULE})
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{SAMPLING} is damaged: {error}; delete it, or search the schedule again") from error
    return dict(document)


def own_schedule(files: Mapping[str, bytes], config: ModelConfig) -> dict[str, Any] | None:
    """Return what a model is sampled with unless somebody says otherwise: fields of a SamplingRecipe, None if as usual.

    That is its sampling.json, or one step for a model that was trained for it; and its projection if not `exact`.
    Raises as schedule_from_files.
    """
    found = schedule_from_files(files) or (one_step_of(config) if config.one_step else {})
    if config.consistency != "exact":
        found["consistency"] = config.consistency
    return found or None


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
    if document.setdefault("weights", [EMA, WEIGHTS]) not in ([EMA, WEIGHTS], [WEIGHTS]):  # older ones do not say
        raise ValueError(f"{CONFIG} names the weights {document['weights']}, which are none; copy the folder again")
    return document


def _check_fields(name: str, found: Any, wanted: Mapping[str, type]) -> None:
    """Raise ValueError unless `found` is an object of exactly these fields, each of its type; numbers are finite."""
    if not isinstance(found, dict):
        raise ValueError(f"{name} ({type(found).__name__}) must be an object")
    if found.keys() != wanted.keys():
        raise ValueError(f"{name} ({', '.join(sorted(found))}) must have the fields {', '.join(sorted(wanted))}")
    for field, kind in wanted.items():
        if not _is(kind, found[field]):
            raise ValueError(f"{field} ({found[field]!r:.100}) must be of type {kind.__name__}")


def _is(kind: type, value: Any) -> bool:
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind and value != ""


def _pack(tensors: Mapping[str, Tensor]) -> bytes:
    return save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})


def _digest(settings: Mapping[str, Any], payload: Mapping[str, bytes]) -> str:
    hasher = hashlib.sha256(json.dumps(settings, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(payload):
        hasher.update(hashlib.sha256(payload[name]).digest())
    return hasher.hexdigest()

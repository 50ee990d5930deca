"""The models that a training begins from: a parent that it fine-tunes, a teacher that it distils."""

import json
from collections.abc import Mapping
from dataclasses import fields, replace

from diffsr_core.checkpoint import CONFIG, config_from_json
from diffsr_core.distillation import student_config
from diffsr_core.family import ModelConfig, SuperResolver
from pipelines.engine import say
from pipelines.models import ResolvedModel
from pipelines.training_config import TrainConfig


def inherited(config: TrainConfig, ancestors: Mapping[str, ResolvedModel]) -> ModelConfig:
    """Return what is trained: the preset's model, or with `init` or `teacher` among the ancestors that of these.

    Weights mean what they were trained to mean: what the denoiser predicts, is told and diffuses comes with them, and
    where that is not the preset's it is said. Only `--prediction` may ask for something else.
    Raises ValueError for an ancestor of another network.
    """
    if "teacher" in ancestors:
        return _as_taught(config, ancestors["teacher"])
    model = _as_parent(config, ancestors["init"]) if "init" in ancestors else config.model()
    if config.steps == 0:
        return model if config.start_level is None else _moved(model, config.start_level)
    start = config.model().start_level
    if config.start_level is None and None not in (start, model.start_level):
        start = model.start_level
    if config.init and config.one_step and model.one_step and start != model.start_level:
        was = "noise alone" if model.start_level is None else f"{model.start_level:g}"
        say(f"train: samples start from {'noise alone' if start is None else f'{start:g}'}, those of --init from {was}")
    return replace(model, one_step=config.one_step, start_level=start)


def _moved(model: ModelConfig, level: float) -> ModelConfig:
    """Return a model whose samples start from another level. Raises ValueError for one that has no such dial."""
    if model.start_level is None:
        trained = "draw from noise alone" if model.one_step else "be sampled in several steps"
        raise ValueError(
            f"start_level ({level}) is of a model that draws from any level, and that of --init was trained to "
            f"{trained}; train it on with --steps 1 or more"
        )
    return replace(model, start_level=level)


def _config_of(model: ResolvedModel) -> ModelConfig:
    return config_from_json(json.loads(model.files[CONFIG])["model"])


def _check_network(flag: str, config: TrainConfig, model: ResolvedModel) -> None:
    found, wanted = _config_of(model), config.model()
    if (found.encoder, found.denoiser) != (wanted.encoder, wanted.denoiser):
        raise ValueError(
            f"{flag} ({model.label}) must have the network of --preset {config.preset}; give the one that it was "
            f"trained with ({json.loads(model.files[CONFIG])['preset']})"
        )


def _as_taught(config: TrainConfig, teacher: ResolvedModel) -> ModelConfig:
    found = _config_of(teacher)
    if found.denoiser is None:
        raise ValueError(f"teacher ({teacher.label}) must have a denoiser, it is a regression; give a diffusion model")
    if found.one_step:
        raise ValueError(f"teacher ({teacher.label}) draws in one step already; give a diffusion model, or use --init")
    _check_network("teacher", config, teacher)
    student = student_config(found)
    student = replace(student, prediction=config.prediction) if config.prediction else student
    if student.prediction != found.prediction:
        say(f"train: the student predicts {student.prediction}, its teacher {found.prediction}")
    return student


def _as_parent(config: TrainConfig, parent: ResolvedModel) -> ModelConfig:
    found, wanted = _config_of(parent), config.model()
    if found.denoiser is None and wanted.denoiser is not None:  # a regression twin gives its encoder
        if found.encoder != wanted.encoder:
            raise ValueError(
                f"init ({parent.label}) must have the encoder of --preset {config.preset}; give the twin of that preset"
            )
        if config.steps == 0:
            raise ValueError(
                f"init ({parent.label}) must have a denoiser to be validated, it is a regression; give a diffusion "
                "model, or --steps 1 or more"
            )
        return wanted
    _check_network("init", config, parent)
    prediction = config.prediction or found.prediction
    changed = prediction != found.prediction
    if changed and config.steps == 0:
        raise ValueError(
            f"prediction ({config.prediction}) must be the model's own ({found.prediction}) where nothing is trained; "
            "leave it out"
        )
    if changed:
        say(f"train: {parent.label} predicts {found.prediction}, and is trained on to predict {prediction}")
    child = replace(found, prediction=prediction)
    names = [field.name for field in fields(child) if field.name not in ("one_step", "start_level", "consistency")]
    others = [name for name in names if getattr(child, name) != getattr(wanted, name)]
    if others:
        say(f"train: {', '.join(others)} as in {parent.label}, not as in the preset")
    return child


def adopt(model: SuperResolver, parent: SuperResolver) -> None:
    """Give a model the parent's weights; a parent without a denoiser gives its encoder's."""
    if parent.config.denoiser is None:
        model.encoder.load_state_dict(parent.encoder.state_dict())
    else:
        model.load_state_dict(parent.state_dict())

"""Laws of what a training takes over from the model that it begins from, beside its weights."""

import json
from dataclasses import replace
from typing import Any

import pytest

from diffsr_core import presets
from diffsr_core.checkpoint import model_files
from diffsr_core.family import ModelConfig, SuperResolver
from pipelines.ancestry import inherited
from pipelines.models import ResolvedModel
from pipelines.training_config import TrainConfig
from tests.core.tiny import PLAIN

PRESET = presets.get("anchored-x4")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "get", lambda _: replace(PRESET, model=PLAIN))


def parent(config: ModelConfig) -> ResolvedModel:
    weights = SuperResolver(config).state_dict()
    files = model_files(config, weights, weights, preset="anchored-x4", card="")
    return ResolvedModel(ref="parent", files=files, digest=json.loads(files["config.json"])["digest"])


def child(config: ModelConfig, **fields: Any) -> ModelConfig:
    settings = TrainConfig(pairs="p", output="o", preset="anchored-x4", init="parent", encoder_steps=0, **fields)
    return inherited(settings, {"init": parent(config)})


@pytest.mark.parametrize(
    ("own", "asked", "found"),
    [(None, None, 0.7), (None, 0.2, 0.2), (0.5, None, 0.5), (0.5, 0.0, 0.0), (0.0, None, 0.0)],
)
def test_a_model_of_one_step_starts_as_asked_or_as_its_parent_or_as_usual(
    own: float | None, asked: float | None, found: float
) -> None:
    config = replace(PLAIN, one_step=True, start_level=own)
    assert child(config, one_step=True, start_level=asked) == replace(PLAIN, one_step=True, start_level=found)


@pytest.mark.parametrize(("own", "said"), [(None, "0.7, those of --init from noise alone"), (0.7, ""), (0.5, "")])
def test_a_start_that_changes_unasked_is_said(own: float | None, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    child(replace(PLAIN, one_step=True, start_level=own), one_step=True)
    heard = capsys.readouterr().err
    assert said in heard and bool(said) == bool(heard)


def validated(config: ModelConfig, **fields: Any) -> ModelConfig:
    settings = TrainConfig(pairs="p", output="o", preset="anchored-x4", init="parent", steps=0, **fields)
    return inherited(settings, {"init": parent(config)})


def test_a_model_is_moved_to_another_start_without_training() -> None:
    config = replace(PLAIN, one_step=True, start_level=0.5)
    assert validated(config, one_step=True, start_level=0.2) == replace(config, start_level=0.2)
    assert validated(config, one_step=True) == config
    for old, trained in (
        (replace(PLAIN, one_step=True), "draw from noise alone"),
        (PLAIN, "be sampled in several steps"),
    ):
        message = rf"start_level \(0.2\) is of .* that of --init was trained to {trained}; train it on"
        with pytest.raises(ValueError, match=message):
            validated(old, one_step=True, start_level=0.2)


def test_a_model_of_one_step_is_nobodys_teacher() -> None:
    settings = TrainConfig(pairs="p", output="o", preset="anchored-x4", teacher="parent")
    with pytest.raises(ValueError, match="teacher .* draws in one step already; give a diffusion model, or use --init"):
        inherited(settings, {"teacher": parent(replace(PLAIN, one_step=True))})


def test_a_diffusion_trained_on_from_a_model_of_one_step_has_none_of_its_ways(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = replace(PLAIN, one_step=True, start_level=0.5)
    assert child(config, steps=3) == PLAIN
    assert capsys.readouterr().err == ""  # and nothing is said to be other than in the preset
    kept = TrainConfig(pairs="p", output="o", preset="anchored-x4", init="parent", steps=0)
    assert inherited(kept, {"init": parent(config)}) == config

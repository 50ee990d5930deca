"""What a training may begin from, and what it ends in: fine-tuning, distillation, averages, the card, the version."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image
from safetensors.numpy import load_file

from diffsr_core import presets
from diffsr_core.checkpoint import load_model
from diffsr_core.family import ModelConfig
from diffsr_core.recipe import StageRecipe, TrainingRecipe
from pipelines.cli import run_job
from pipelines.models import resolve
from pipelines.pairs import PairsConfig, make_pairs
from tests.core.tiny import MODELS
from tests.jobs.conftest import Ran
from tests.jobs.tiny import SAMPLING, waves, write_png

Call = Callable[..., Ran]
REGRESSION = StageRecipe(name="regression", num_steps=2, learning_rate=1e-3)
DIFFUSION = StageRecipe(name="diffusion", num_steps=3, learning_rate=1e-3)


def preset(model: ModelConfig, *stages: StageRecipe) -> presets.Preset:
    recipe = TrainingRecipe(stages=stages, batch_size=4, ema_half_lives_images=(8,), augmentation="none")
    return presets.Preset(model=model, recipe=recipe, patch=32, params=1, regression=REGRESSION, note="tiny")


@pytest.fixture(scope="module", autouse=True)
def fine_presets() -> Any:
    """Presets that train in a second: `fine`, a diffusion, and `fine-two`, which has an encoder's stage."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.PRESETS, "fine", preset(MODELS["sr3"], DIFFUSION))
        patch.setitem(presets.PRESETS, "fine-two", preset(MODELS["anchored"], REGRESSION, DIFFUSION))
        yield


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair set of waves."""
    folder = tmp_path_factory.mktemp("waves")
    for index in range(8):
        write_png(folder / "in" / f"{index}.png", waves(64, 64, phase=index))
    make_pairs(PairsConfig(source=str(folder / "in"), output=str(folder / "set"), scale=4, patch=32, engine="local",
                           val_share=0.5, test_share=0.0))  # fmt: skip
    return folder / "set"


def words(pairs: Path, output: Path, *more: object) -> list[object]:
    flags = ["--pairs", pairs, "--output", output, "--engine", "local", "--checkpoint-every", 100, "--val-pairs", 2]
    return [*flags, "--preset", "fine", "--log-every", 1, *more]


def averaged(output: Path) -> dict[str, np.ndarray]:
    return load_file(output / "model" / "ema.safetensors")


def apart(one: Path, other: Path) -> float:
    """The largest difference of any weight."""
    first, second = averaged(one), averaged(other)
    return max(float(np.abs(first[name] - second[name]).max()) for name in first)


def digest(output: Path) -> str:
    return resolve(str(output / "model")).digest


def registered(name: str) -> tuple[str, dict[str, str]]:
    """The run and the tags of the first version of a model."""
    version = MlflowClient().get_model_version(name, "1")
    return str(version.run_id), dict(version.tags)


@pytest.fixture(scope="module")
def parent(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model of `fine`, registered as `parent` version 1."""
    output = tmp_path_factory.mktemp("parent") / "run"
    flags = [
        "--register",
        "parent",
        "--data-licence",
        "CC0 of the waves",
        "--licence",
        "mit",
        "--ema-half-lives",
        "8,64",
    ]
    assert run_job("train", [*map(str, words(pairs, output, *flags, "--steps", 30, "--learning-rate", 3e-3))]) == 0
    return output


def test_the_model_has_a_card_and_its_version_has_tags_and_a_signature(parent: Path) -> None:
    card = (parent / "model" / "README.md").read_text()
    for said in ("license: mit", "CC0 of the waves", "PSNR", "images/s", "CPU", "1 worker"):
        assert said in card, said
    run_id, tags = registered("parent")
    assert tags["diffsr.preset"] == "fine" and tags["diffsr.scale"] == "4"
    assert tags["diffsr.data_licence"] == "CC0 of the waves"
    assert tags["diffsr.model_digest"] == digest(parent)
    assert tags["diffsr.pairs_digest"] == mlflow.get_run(run_id).data.params["data_digest"]
    signature = mlflow.models.get_model_info("models:/parent/1").signature
    assert signature is not None and "binary" in str(signature.inputs) and "binary" in str(signature.outputs)


def test_every_average_is_validated_beside_the_models(parent: Path) -> None:
    run_id, tags = registered("parent")
    found = mlflow.get_run(run_id).data.metrics
    assert np.isfinite(found["val_loss_ema_64"]) and found["val_loss_ema_64"] != found["val_loss"]
    assert "val_loss_ema_8" not in found
    assert len(list((parent / "checkpoints").glob("*/ema-64.safetensors"))) == 1


def test_a_fine_tuning_begins_with_the_parents_weights_and_names_it_everywhere(
    parent: Path, pairs: Path, tmp_path: Path, call: Call
) -> None:
    of_parent = digest(parent)
    only_looked = call("train", *words(pairs, tmp_path / "same", "--init", parent / "model", "--steps", 0))
    assert (only_looked.code, only_looked.summary["done"]) == (0, 0), only_looked.stderr
    assert {"val_loss", "val_psnr_sample"} <= set(only_looked.summary["metrics"])
    assert apart(tmp_path / "same", parent) == 0.0

    flags = words(pairs, tmp_path / "tuned", "--init", "models:/parent/1", "--steps", 2, "--register", "child")
    tuned = call("train", *flags)
    assert (tuned.code, tuned.summary["done"]) == (0, 2), tuned.stderr
    assert 0 < apart(tmp_path / "tuned", parent) < 0.05
    assert of_parent in (tmp_path / "tuned" / "model" / "README.md").read_text()
    run_id, tags = registered("child")
    assert tags["diffsr.init_digest"] == of_parent
    assert mlflow.get_run(run_id).data.params["init"] == of_parent
    again = call("train", *flags, "--init", parent / "model")  # the same weights under another name
    assert again.code == 0 and "nothing to do" in again.stderr


def test_an_output_whose_model_was_only_looked_at_is_not_continued_from_another_model(
    parent: Path, pairs: Path, tmp_path: Path, call: Call
) -> None:
    looked = call("train", *words(pairs, tmp_path / "run", "--init", parent / "model", "--steps", 0))
    assert looked.code == 0, looked.stderr
    other = call("train", *words(pairs, tmp_path / "run", "--steps", 1))
    assert other.code == 1 and "another --output" in other.stderr
    assert apart(tmp_path / "run", parent) == 0.0


@pytest.fixture(scope="module")
def twin(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained regression twin of `fine-two`."""
    output = tmp_path_factory.mktemp("twin") / "run"
    flags = words(pairs, output, "--preset", "fine-two-regression", "--steps", 3)
    assert run_job("train", [*map(str, flags)]) == 0
    return output


def test_a_twin_gives_its_encoder_and_the_encoders_stage_may_be_skipped(
    twin: Path, pairs: Path, tmp_path: Path, call: Call
) -> None:
    flags = ["--preset", "fine-two", "--init", twin / "model", "--encoder-steps", 0, "--steps", 2]
    done = call("train", *words(pairs, tmp_path / "run", *flags))
    assert (done.code, done.summary["done"]) == (0, 2), done.stderr
    given, found = averaged(twin), averaged(tmp_path / "run")
    encoder = [name for name in found if name.startswith("encoder.")]
    assert encoder and all(np.array_equal(found[name], given[name]) for name in encoder)
    assert set(given) == set(encoder) < set(found)


def test_a_twin_alone_is_no_diffusion_model_to_look_at(twin: Path, pairs: Path, tmp_path: Path, call: Call) -> None:
    flags = ["--preset", "fine-two", "--init", twin / "model", "--steps", 0]
    ran = call("train", *words(pairs, tmp_path / "run", *flags))
    assert ran.code == 1 and "denoiser" in ran.stderr and "Traceback" not in ran.stderr
    assert not (tmp_path / "run" / "model").exists()


def test_a_distilled_model_names_its_teacher_learns_and_upscales_in_one_step(
    parent: Path, pairs: Path, tmp_path: Path, call: Call
) -> None:
    flags = ["--teacher", "models:/parent/1", "--steps", 24, "--learning-rate", 3e-3, "--teacher-steps", 2]
    done = call("train", *words(pairs, tmp_path / "run", *flags, "--register", "student"))
    assert (done.code, done.summary["done"]) == (0, 24), done.stderr
    assert "24 steps of distillation" in done.stderr and "the student predicts x_0, its teacher eps" in done.stderr
    run_id, tags = registered("student")
    losses = [metric.value for metric in MlflowClient().get_metric_history(run_id, "loss")]
    assert len(losses) == 24 and np.mean(losses[-6:]) < 0.9 * np.mean(losses[:6])
    assert tags["diffsr.teacher_digest"] == digest(parent)
    assert mlflow.get_run(run_id).data.params["teacher"] == digest(parent)
    assert digest(parent) in (tmp_path / "run" / "model" / "README.md").read_text()
    assert load_model(tmp_path / "run" / "model")[0].config.prediction == "x_0"

    write_png(tmp_path / "in" / "a.png", waves(12, 10))
    places = ["--source", tmp_path / "in", "--output", tmp_path / "up", "--model", tmp_path / "run" / "model"]
    up = call("upscale", *places, "--engine", "local", *SAMPLING, "--steps", 1)
    assert (up.code, up.summary["done"]) == (0, 1), up.stderr
    assert Image.open(tmp_path / "up" / "a.png").size == (40, 48)


def test_how_a_step_is_cut_up_changes_nothing_and_what_is_learned_from_does(
    pairs: Path, tmp_path: Path, call: Call
) -> None:
    flags: dict[str, list[object]] = {
        "whole": [],
        "micro": ["--micro-batch", 1],
        "again": ["--checkpoint-activations"],
        "bf16": ["--precision", "bf16"],
        "fp16": ["--precision", "fp16"],
        "noisy": ["--condition-noise", 10],
        "crop": ["--crop", 16],
    }
    for name, more in flags.items():
        done = call("train", *words(pairs, tmp_path / name, "--steps", 12, "--learning-rate", 3e-4, *more))
        assert (done.code, done.summary["metrics"]["skipped_steps"]) == (0, 0), done.stderr
    distance = {name: apart(tmp_path / name, tmp_path / "whole") for name in flags}
    assert distance["micro"] < 1e-5 and distance["again"] < 1e-5, distance
    assert 1e-6 < distance["bf16"] < 1e-2 and 1e-7 < distance["fp16"] < 1e-2, distance
    assert distance["noisy"] > 1e-5 and distance["crop"] > 1e-5, distance


def test_the_settings_that_are_printed_are_those_that_a_file_gives(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def printed(*flags: object) -> str:
        with pytest.raises(SystemExit) as stop:
            run_job("train", [*map(str, flags), "--print-config"])
        assert stop.value.code == 0
        return capsys.readouterr().out

    given = printed(*words(pairs, tmp_path / "run", "--ema-half-lives", "8,64", "--learning-rate", 1e-5, "--joint",
                           "--preset", "fine-two", "--condition-noise", 2))  # fmt: skip
    (tmp_path / "job.yaml").write_text(given)
    assert printed("--config", tmp_path / "job.yaml") == given
    assert printed("--config", tmp_path / "job.yaml", "--seed", 3) == given.replace("seed: 0", "seed: 3")


def test_a_dry_run_tells_the_memory_and_does_nothing(pairs: Path, tmp_path: Path, call: Call) -> None:
    done = call("train", *words(pairs, tmp_path / "run", "--dry-run"))
    assert (done.code, done.summary["status"], done.summary["inputs"]) == (0, "planned", 3), done.stderr
    assert "memory of a worker: " in done.stderr and "activations" in done.stderr
    assert not (tmp_path / "run").exists()
    large = call("train", *words(pairs, tmp_path / "run", "--dry-run", "--preset", "sr3-lite-16-128"))
    assert large.code == 1 and "pairs scale (4) must be that of sr3-lite-16-128 (8)" in large.stderr

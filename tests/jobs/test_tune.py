"""The laws of a search over trainings: every point ends in one row, a rerun is free, the winner is the model."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest

from diffsr_core import checkpoint, presets
from diffsr_core.recipe import StageRecipe, TrainingRecipe
from diffsr_core.validation import ValidationRecipe, validate
from pipelines import session, storage
from pipelines.checkpoints import save_checkpoint
from pipelines.lease import Lease
from pipelines.manifest import load_manifest
from pipelines.pairs import PairsConfig, make_pairs
from pipelines.reader import PairReader
from tests.core.tiny import MODELS
from tests.jobs.conftest import Ran, run, tree
from tests.jobs.test_train import weights
from tests.jobs.tiny import model_folder, waves, write_png
from tests.pipelines.test_tuning import OF_SCHEDULE


@pytest.fixture(autouse=True)
def tiny_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = StageRecipe(name="diffusion", num_steps=4, learning_rate=1e-3)
    recipe = TrainingRecipe(stages=(stage,), batch_size=4, ema_half_lives_images=(8,), augmentation="none")
    twin = replace(stage, name="regression")
    preset = presets.Preset(model=MODELS["sr3"], recipe=recipe, patch=32, params=1, regression=twin, note="tiny")
    monkeypatch.setitem(presets.PRESETS, "tiny", preset)


@pytest.fixture(scope="module")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    for index in range(8):
        write_png(folder / "in" / f"{index}.png", waves(64, 64, phase=index))
    make_pairs(PairsConfig(source=str(folder / "in"), output=str(folder / "set"), scale=4, patch=32,
                           degradation="bicubic", engine="local", val_share=0.5, test_share=0.0))  # fmt: skip
    return folder / "set"


def flags(pairs: Path, folder: Path, text: str, *more: object) -> list[object]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "search.yaml").write_text(text)
    places = ["--pairs", pairs, "--output", folder / "out", "--tune", folder / "search.yaml", "--preset", "tiny"]
    return [*places, "--engine", "local", "--checkpoint-every", 2, "--val-pairs", 4, *more]


def rows(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "out" / "tune.json").read_text())["trials"]
    return found


def test_every_point_is_a_row_the_winner_is_registered_and_a_rerun_changes_nothing(
    small_set: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    text = "space: {learning_rate: {grid: [1e-3, 1e-6]}, crop: {grid: [32, 30]}}"  # 30 is no multiple of the scale
    words = flags(small_set, tmp_path, text)
    done = call("train", *words)
    assert (done.code, [done.summary[name] for name in ("inputs", "done", "skipped", "dead")]) == (0, [4, 2, 0, 2])
    best, second, *failed = rows(tmp_path)
    assert [row["status"] for row in (best, second, *failed)] == ["done", "done", "failed", "failed"]
    assert best["point"] == {"learning_rate": 1e-3, "crop": 32} and best["metric"] < second["metric"]
    assert all("crop (30)" in row["reason"] and row["mlflow_run"] is None for row in failed)
    assert done.summary["metrics"]["val_loss"] == best["metric"]
    model = tree(tmp_path / "out" / "model")
    assert model and model == tree(tmp_path / "out" / "trials" / best["trial"] / "model")

    parent = mlflow.get_run(done.summary["run_id"])
    assert parent.data.metrics["best_val_loss"] == best["metric"]
    assert parent.data.tags["best.learning_rate"] == "0.001" and parent.info.status == "FINISHED"
    for row in (best, second):
        trial = mlflow.get_run(row["mlflow_run"])
        assert trial.data.tags["mlflow.parentRunId"] == done.summary["run_id"]
        assert trial.data.params["learning_rate"] == str(row["point"]["learning_rate"])
    logged = {item.path for item in mlflow.MlflowClient().list_artifacts(done.summary["run_id"])}
    assert {"tune.json", "tune.md"} <= logged

    before = tree(tmp_path / "out")
    again = call("train", *words, "--register", "searched")  # also later, as for a training
    assert (again.code, again.summary["inputs"], again.summary["unchanged"]) == (0, 0, 4)
    assert again.summary["outputs"][-1] == "models:/searched/1" and again.summary["run_id"] == done.summary["run_id"]
    version = mlflow.MlflowClient().get_model_version("searched", "1")
    assert version.run_id == best["mlflow_run"] and version.tags["diffsr.preset"] == "tiny"
    after = tree(tmp_path / "out")
    assert {name for name in after if after[name] != before.get(name)} == {f"trials/{best['trial']}/run.json"}
    third = call("train", *words, "--register", "searched")
    assert tree(tmp_path / "out") == after and "nothing to do, all 4 trials" in third.stderr

    of_a_training = tmp_path / "out" / "trials" / best["trial"]
    for other in ([*words, "--steps", 3], [*words, "--output", of_a_training]):
        refused = call("train", *other)
        assert refused.code == 1 and "choose another --output" in refused.stderr


def test_an_interrupted_search_continues_where_it_was(
    small_set: Path, tmp_path: Path, call: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "{trials: 2, space: {learning_rate: {log_uniform: [1e-4, 1e-2]}}}"
    assert call("train", *flags(small_set, tmp_path / "clean", text)).code == 0
    saved = 0

    def save_and_fail(*words: Any, **named: Any) -> None:
        nonlocal saved
        save_checkpoint(*words, **named)
        saved += 1
        if saved == 3:  # the first of the second trial
            raise OSError("no space left on device")

    words = flags(small_set, tmp_path / "cut", text)
    with monkeypatch.context() as patch:
        patch.setattr(session, "save_checkpoint", save_and_fail)
        cut = call("train", *words)
    assert cut.code == 1 and "no space left" in cut.stderr
    again = call("train", *words)
    assert (again.code, again.summary["done"], again.summary["unchanged"]) == (0, 1, 1), again.stderr
    assert "continues at step 2" in again.stderr and "step 4 of 4" in again.stderr
    for clean, resumed in zip(rows(tmp_path / "clean"), rows(tmp_path / "cut"), strict=True):
        assert {**clean, "seconds": 0, "mlflow_run": ""} == {**resumed, "seconds": 0, "mlflow_run": ""}
        folders = [tmp_path / name / "out" / "trials" / clean["trial"] for name in ("clean", "cut")]
        first, second = map(weights, folders)
        assert first and all((first[name] == second[name]).all() for name in first)
    runs = mlflow.search_runs(filter_string=f"tags.`mlflow.parentRunId` = '{again.summary['run_id']}'",
                              search_all_experiments=True, output_format="list")  # fmt: skip
    assert len(runs) == 2 and {run.info.status for run in runs} == {"FINISHED"}


def test_more_trials_go_on_from_those_that_are_there(small_set: Path, tmp_path: Path, call: Callable[..., Ran]) -> None:
    text = "{trials: %d, space: {seed: {integer: [0, 1000]}}}"
    assert call("train", *flags(small_set, tmp_path, text % 1)).code == 0
    first = rows(tmp_path)[0]
    more = call("train", *flags(small_set, tmp_path, text % 2))
    assert (more.summary["done"], more.summary["unchanged"]) == (1, 1), more.stderr
    assert first in rows(tmp_path) and len(rows(tmp_path)) == 2


def test_a_search_in_which_nothing_is_done_has_failed(
    small_set: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    text = "space: {learning_rate: {grid: [1e30, 1e31]}}"
    failed = call("train", *flags(small_set, tmp_path, text, "--on-spike", "stop", "--optimizer", "adam"))
    assert failed.code == 1 and "all 2 trials failed, the first: " in failed.stderr
    assert {row["status"] for row in rows(tmp_path)} == {"failed"} and all(row["reason"] for row in rows(tmp_path))
    assert not (tmp_path / "out" / "model").exists()


def test_the_search_of_a_schedule_agrees_with_the_best_of_direct_validations(
    small_set: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    """SR3's search: a trained model, no step, every schedule validated on the same pairs at the same noise."""
    folder = model_folder(tmp_path / "model", MODELS["sr3"])
    text = OF_SCHEDULE.replace("[4, 8, 16]", "[2]")
    done = call("train", *flags(small_set, tmp_path, text, "--init", folder, "--steps", 0))
    assert (done.code, done.summary["done"]) == (0, 4), done.stderr
    reader = PairReader(str(small_set), load_manifest(str(small_set)), "val", seed=0)
    hr, lr = map(session.to_tensor, reader.batch(range(4), channels=3))
    model, _ = checkpoint.load_model(folder)
    found = {}
    for row in rows(tmp_path):
        point = row["point"]
        recipe = ValidationRecipe(sampler=point["sampler"], grid=point["grid"], num_steps=point["sampling_steps"])
        found[row["trial"]] = validate(model, hr, lr, stage="diffusion", recipe=recipe).metrics["val_ssim_sample"]
        assert row["metric"] == pytest.approx(found[row["trial"]], abs=1e-6)
    assert rows(tmp_path)[0]["trial"] == max(found, key=lambda name: found[name])
    assert len({round(value, 4) for value in found.values()}) > 2  # or the order would be a matter of luck


def test_a_dry_run_says_the_points_and_starts_nothing(
    small_set: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    done = call("train", *flags(small_set, tmp_path, "space: {batch_size: {grid: [2, 4]}}", "--dry-run"))
    assert (done.code, done.summary["status"], done.summary["inputs"]) == (0, "planned", 2)
    assert "2 trials, min val_loss" in done.stderr and "batch_size 4" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        ("space: {batch_size: {grid: [2, 0]}}", (), "space: batch_size (0) must be at least 1"),
        ("space: {batch_size: {grid: [2, 4000]}}\nmetric: val_lpips_sample", (), "needs LPIPS's weights; give --lpips"),
        ("space: {batch_size: {grid: [4000]}}", (), "must be at least the batch (4000)"),
        ("{stop: asha, space: {seed: {grid: [1, 2]}}}", ("--steps", 2), "checkpoint_every (2) must be below the steps"),
        ("{max_concurrent: 2, space: {seed: {grid: [1]}}}", (), "max_concurrent (2) must be 1 with engine local"),
    ],
)
def test_a_search_that_cannot_be_is_refused_before_anything_starts(
    text: str, more: tuple[object, ...], message: str, small_set: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    refused = call("train", *flags(small_set, tmp_path, text, *more))
    assert refused.code == 1 and message in refused.stderr and "Traceback" not in refused.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_ray_tune_gives_the_table_of_the_plain_loop_and_ends_what_it_stops_cleanly(
    pairs: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    text = "{stop: asha, grace_steps: 2, reduction_factor: 2, space: {learning_rate: {grid: [1e-9, 1e-3]}}}"
    more = ["--preset", "nano-x4-regression", "--steps", 6, "--batch-size", 2]
    plain = call("train", *flags(pairs, tmp_path / "plain", text, *more))
    words = [*flags(pairs, tmp_path / "ray", text, *more), "--engine", "ray"]
    done = run("train", *words, env={"OMP_NUM_THREADS": "1"})
    assert (done.code, done.summary["done"], done.summary["skipped"]) == (0, 1, 1), done.stderr
    assert plain.summary["skipped"] == 1
    stable = [[{**row, "seconds": 0, "mlflow_run": ""} for row in rows(tmp_path / name)] for name in ("plain", "ray")]
    assert stable[0] == stable[1]
    best, stopped = rows(tmp_path / "ray")
    assert (stopped["status"], stopped["steps"]) == ("stopped", 2)
    assert mlflow.get_run(stopped["mlflow_run"]).info.status == "KILLED"
    folder = storage.join(str(tmp_path / "ray" / "out"), "trials", stopped["trial"])
    assert json.loads(storage.read_bytes(storage.join(folder, "_diffsr", "lease.json")))["expires"] == 0.0  # given back
    assert Lease(folder, run_id="next").holder() is None and (Path(folder) / "checkpoints").is_dir()
    assert not list((tmp_path / "ray" / "out").rglob("*.pkl"))
    before = tree(tmp_path / "ray" / "out")
    again = call("train", *words)  # nothing is left to do: no Ray is started
    assert (again.summary["inputs"], again.summary["unchanged"]) == (0, 2)
    assert tree(tmp_path / "ray" / "out") == before

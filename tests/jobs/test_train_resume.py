"""Resuming a training: killed anywhere it ends as if nothing had happened, in its weights and in MLflow's curves.

Local runs live in processes forked from a server that has the imports done, and kill themselves (-9) at a named moment.
"""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import psutil
import pytest
from mlflow import MlflowClient
from safetensors.numpy import load_file

from diffsr_core import presets
from diffsr_core.recipe import StageRecipe, TrainingRecipe
from diffsr_core.training import Trainer
from pipelines import session, storage, tracking
from pipelines.cli import run_job
from tests.core.tiny import MODELS
from tests.jobs.conftest import TRAIN_FLAGS, Ran, run, run_until_killed, script, tree
from tests.jobs.test_train import forget_the_summary

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([__name__, "pipelines.training", "pipelines.reporter", "mlflow.pyfunc"])
FLAGS = ["--preset", "tiny-resumed", "--engine", "local", "--checkpoint-every", "3", "--log-every", "1"]
Curves = dict[str, list[tuple[int, float]]]


def add_preset() -> None:
    """Two stages of 4 and 6 steps, with all that draws at random: what a resume may forget is in it."""
    regression, diffusion = (StageRecipe(name="regression", num_steps=4, learning_rate=1e-3),
                             StageRecipe(name="diffusion", num_steps=6, learning_rate=1e-3))  # fmt: skip
    recipe = TrainingRecipe(stages=(regression, diffusion), batch_size=4, ema_half_lives_images=(8, 32), crop_px=16,
                            condition_noise=5.0, condition_blur_px=1.0, micro_batch=3)  # fmt: skip
    presets.PRESETS["tiny-resumed"] = presets.Preset(
        model=MODELS["anchored"], recipe=recipe, patch=32, params=1, regression=regression, note="tiny"
    )


def live(words: list[str], said: str, moment: tuple[str, str] | None) -> None:
    """Be the process of a training; die at a moment: before a call, or after it, whose label ends in a text."""

    def deadly(name: str, function: Callable[..., Any], label: Callable[..., str]) -> Callable[..., Any]:
        def called(*args: Any, **named: Any) -> Any:
            told = label(*args, **named)
            if moment and moment[0] == f"before {name}" and told.endswith(moment[1]):
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **named)
            if moment and moment[0] == f"after {name}" and told.endswith(moment[1]):
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return called

    add_preset()
    Trainer.optimise = deadly("step", Trainer.optimise, lambda self, _: f" {self.step}")  # type: ignore[method-assign]
    storage.publish = deadly("writing", storage.publish, lambda uri, _: uri)
    MlflowClient.log_batch = deadly(  # type: ignore[method-assign]
        "logging", MlflowClient.log_batch, lambda *_, **named: f" {[metric.step for metric in named['metrics']][-1:]}"
    )
    tracking.log_model = deadly("logging", tracking.log_model, lambda *_, **__: "the model")
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    os._exit(run_job("train", words))


def train_until(moment: tuple[str, str] | None, *words: object, said: Path) -> int:
    """Train in a process of its own until the moment, or to the end; return how it ended."""
    life = SERVER.Process(target=live, args=([*map(str, words), *FLAGS], str(said), moment))
    life.start()
    life.join(120)
    assert life.exitcode is not None
    return life.exitcode


def curves(run_id: str) -> Curves:
    """What MLflow has of a run that does not depend on the clock: (step, value) by metric, as they were logged."""
    found = mlflow.get_run(run_id).data.metrics
    names = {name for name in found if name.startswith("val_")} | {"loss", "gradient_norm", "learning_rate"}
    history = {name: MlflowClient().get_metric_history(run_id, name) for name in names | {"images_seen"}}
    return {name: [(metric.step, metric.value) for metric in values] for name, values in history.items()}


def mlflow_run(output: Path) -> str:
    return str(json.loads((output / "run.json").read_text())["mlflow_run"])


def model_of(output: Path) -> dict[str, bytes]:
    """The model folder but for the card, which tells what it took."""
    return {name: data for name, data in tree(output / "model").items() if name != "README.md"}


@pytest.fixture(scope="module")
def clean(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a training that nobody disturbed."""
    folder = tmp_path_factory.mktemp("clean")
    code = train_until(None, "--pairs", pairs, "--output", folder / "run", said=folder / "said")
    assert code == 0, (folder / "said").read_text()
    return folder / "run"


DEATHS = [
    ("before step", " 1"),  # nothing is kept yet
    ("before writing", "00000003/ema.safetensors"),  # a checkpoint half written, in the encoder's stage
    ("after writing", "00000003/state.json"),  # kept, and not reported
    ("before step", " 4"),  # the first step of the second stage
    ("before logging", "[5]"),
    ("before writing", "00000006/state.json"),
    ("before step", f" {np.random.default_rng().integers(6, 10)}"),  # any other
    ("after writing", "00000010/state.json"),  # no step is left
    ("before writing", "model/ema.safetensors"),
    ("after logging", "the model"),
]


def test_killed_again_and_again_its_weights_and_its_curves_are_those_of_a_run_that_was_not(
    clean: Path, pairs: Path, tmp_path: Path
) -> None:
    output, said = tmp_path / "run", tmp_path / "said"
    for moment in DEATHS:
        code = train_until(moment, "--pairs", pairs, "--output", output, said=said)
        assert code == -signal.SIGKILL, f"{moment}: {said.read_text()}"
    assert train_until(None, "--pairs", pairs, "--output", output, said=said) == 0, said.read_text()
    assert model_of(output) == model_of(clean)
    expected = curves(mlflow_run(clean))
    assert {"val_loss", "val_loss_ema_32", "val_psnr_sample"} <= set(expected)
    assert [step for step, _ in expected["loss"]] == [*range(1, 11)]
    assert [step for step, _ in expected["val_loss"]] == [3, 6, 9, 10]
    assert curves(mlflow_run(output)) == expected
    (only,) = [found for found in mlflow.search_runs(search_all_experiments=True, output_format="list")
               if found.data.params.get("output") == str(output)]  # fmt: skip
    assert only.info.status == "FINISHED"


@pytest.mark.parametrize("damage", ["state.json is missing", "optimizer.safetensors has"])
def test_a_newest_checkpoint_that_was_cut_short_is_said_and_the_one_before_it_is_used(
    damage: str, clean: Path, pairs: Path, tmp_path: Path
) -> None:
    output, said = tmp_path / "run", tmp_path / "said"
    shutil.copytree(clean, output)
    forget_the_summary(output)
    file = output / "checkpoints" / "00000010" / damage.partition(" ")[0]
    if "missing" in damage:
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size // 2)
    shutil.rmtree(output / "model")
    before = curves(mlflow_run(clean))
    assert train_until(None, "--pairs", pairs, "--output", output, said=said) == 0, said.read_text()
    told = said.read_text()
    assert "00000010" in told and damage in told and "continues at step 9" in told
    assert model_of(output) == model_of(clean)
    assert curves(mlflow_run(output)) == before  # the same run, with no step twice


@pytest.fixture
def tiny_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    """The preset of this file, in this process."""
    monkeypatch.setattr(presets, "PRESETS", dict(presets.PRESETS))
    add_preset()


def test_the_newest_and_the_best_of_the_last_stage_are_kept_and_the_best_is_published_when_asked_for(
    pairs: Path, tmp_path: Path, tiny_preset: None, call: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted = {2: 0.1, 4: 0.2, 6: 0.5, 8: 0.9, 10: 0.7}  # those of steps 2 and 4 are of the encoder's stage
    real = session.validate

    def validated(*words: Any, **named: Any) -> Any:
        result = real(*words, **named)
        return result._replace(metrics={**result.metrics, "val_loss": scripted.pop(min(scripted))})

    monkeypatch.setattr(session, "validate", validated)
    flags = ["--pairs", pairs, "--output", tmp_path / "run", *FLAGS, "--checkpoint-every", 2, "--keep", 1]
    done = call("train", *flags, "--result", "best")
    assert done.code == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["00000006", "00000010"]
    published, best, last = (load_file(tmp_path / "run" / folder / "ema.safetensors")
                             for folder in ("model", "checkpoints/00000006", "checkpoints/00000010"))  # fmt: skip
    assert all(np.array_equal(published[name], best[name]) for name in best)
    assert any(not np.array_equal(published[name], last[name]) for name in last)


def test_a_second_command_while_the_first_one_trains_leaves_it_alone(
    pairs: Path, tmp_path: Path, tiny_preset: None, call: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[int] = []
    real = session.save_checkpoint

    def save(*words: Any, **named: Any) -> None:
        real(*words, **named)
        if not ends:
            ends.append(train_until(None, "--pairs", pairs, "--output", tmp_path / "run", said=tmp_path / "said"))

    monkeypatch.setattr(session, "save_checkpoint", save)
    first = call("train", "--pairs", pairs, "--output", tmp_path / "run", *FLAGS)
    assert (first.code, first.summary["done"], ends) == (0, 10, [5]), first.stderr
    assert "is held by run" in (tmp_path / "said").read_text()


ON_RAY = [
    *TRAIN_FLAGS,
    "--steps",
    "12",
    "--val-pairs",
    "16",
    "--sampling-steps",
    "40",  # a validation takes a second or two: the moments to kill last
    "--checkpoint-every",
    "3",
    "--log-every",
    "1",
    "--cpus-per-worker",
    "0.5",
]


def close(mine: Curves, theirs: Curves, *, within: float) -> None:
    """Fail unless the curves have the same steps, each once, and values no further apart than this."""
    assert set(mine) == set(theirs)
    for name, values in mine.items():
        assert [step for step, _ in values] == [step for step, _ in theirs[name]], name
        scale = max(1.0, *(abs(value) for _, value in theirs[name]))
        apart = max(abs(a - b) for (_, a), (_, b) in zip(values, theirs[name], strict=True))
        assert apart <= within * scale, f"{name} {apart}"


def apart(one: Path, other: Path) -> float:
    """The largest difference of any weight."""
    first, second = load_file(one / "model" / "ema.safetensors"), load_file(other / "model" / "ema.safetensors")
    return max(float(np.abs(first[name] - second[name]).max()) for name in first)


def kill_a_worker(words: list[object], *, when: Callable[[], bool], timeout: float = 240) -> tuple[int, str]:
    """Run a training on Ray, and kill -9 one of its training workers as soon as `when()`; return how the job ended."""
    job = subprocess.Popen(script("train", *words), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + timeout
    while not when():
        assert job.poll() is None and time.monotonic() < deadline, "the moment to kill never came"
        time.sleep(0.005)
    workers = [process for process in psutil.Process(job.pid).children(recursive=True)
               if "TrainWorker" in " ".join(process.cmdline())]  # fmt: skip
    assert len(workers) == 2
    workers[1].kill()
    stderr = job.communicate(timeout=400)[1]
    return job.returncode, stderr


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_on_ray_a_driver_and_a_worker_may_die_and_another_number_of_workers_may_go_on(
    pairs: Path, tmp_path: Path, call: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    clean, cut, alone = (tmp_path / name for name in ("clean", "cut", "alone"))
    two = ["--pairs", pairs, "--num-workers", 2, *ON_RAY]
    done = run("train", *two, "--output", clean, timeout=400)
    assert done.code == 0, done.stderr
    expected = curves(mlflow_run(clean))
    assert [step for step, _ in expected["loss"]] == [*range(1, 19)]

    run_until_killed(
        "train", *two, "--output", cut, timeout=240, when=(cut / "checkpoints" / "00000003" / "state.json").exists
    )
    shutil.copytree(cut, alone)

    code, stderr = kill_a_worker([*two, "--output", cut],
                                 when=(cut / "checkpoints" / "00000009" / "state.json").exists)  # fmt: skip
    assert code == 0, stderr
    assert stderr.count("continues at step") == 2
    assert apart(cut, clean) <= 1e-6
    close(curves(mlflow_run(cut)), expected, within=1e-6)

    known = json.loads((alone / "run.json").read_text())
    del known["mlflow_run"]
    (alone / "run.json").write_text(json.dumps(known))  # its curve is its own
    done = call("train", "--pairs", pairs, *ON_RAY, "--output", alone, "--engine", "local", "--num-workers", 1)
    assert done.code == 0, done.stderr
    first = done.summary["unchanged"]
    assert 3 <= first < 18 and done.summary["done"] == 18 - first
    assert apart(alone, clean) <= 1e-4
    since = first - 3  # the reports that led to the checkpoint are made again
    rest = {name: [(step, value) for step, value in values if step > since] for name, values in expected.items()}
    close(curves(mlflow_run(alone)), rest, within=1e-4)

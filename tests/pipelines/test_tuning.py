"""The laws of a search's file, its points, and the verdicts of its trials."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from pipelines import trials
from pipelines.config import from_mapping
from pipelines.ray_tuning import judge_of, scheduler_of
from pipelines.runs import Summary, TrainingFailed
from pipelines.search_space import FIXED, SearchConfig, points, read_search, trials_of
from pipelines.training_config import TrainConfig
from pipelines.trials import Judge, Record, Stepper, progress, read_record, run_trial, score

# Two searches as a person writes them: one over the training, and SR3's search of a schedule for a trained model.
OF_TRAINING = """
metric: val_loss
trials: 6
stop: asha
grace_steps: 200
space:
  learning_rate: {log_uniform: [1e-4, 3e-3]}
  batch_size: {choice: [8, 16]}
  prediction: {grid: [eps, v, x_0]}
"""
OF_SCHEDULE = """
metric: val_ssim_sample
space:
  sampler: {grid: [ddim, sr3]}
  grid: {grid: [uniform, log_snr]}
  sampling_steps: {grid: [4, 8, 16]}
"""


def search(**settings: Any) -> SearchConfig:
    return from_mapping(SearchConfig, {"space": {"seed": {"grid": [0]}}, **settings})


def config(output: Path | str = "out", **settings: Any) -> TrainConfig:
    return TrainConfig(pairs="pairs", output=str(output), **settings)


@pytest.mark.parametrize(("text", "count"), [(OF_TRAINING, 18), (OF_SCHEDULE, 12)])
def test_a_file_gives_draws_times_grids(text: str, count: int, tmp_path: Path) -> None:
    (tmp_path / "search.yaml").write_text(text)
    found = trials_of(config(), read_search(str(tmp_path / "search.yaml")))
    assert len(found) == len({trial.name for trial in found}) == count
    for trial in found:
        assert trial.config is not None
        assert all(getattr(trial.config, name) == value for name, value in trial.point.items())
        assert trial.config.output.endswith(f"trials/{trial.name}") and trial.config.engine == "local"


def test_points_follow_the_seed_and_more_trials_keep_the_first() -> None:
    space = {"learning_rate": {"log_uniform": [1e-5, 1e-2]}, "val": {"uniform": [0.0, 1.0]}, "n": {"integer": [1, 3]}}
    space = {"learning_rate": space["learning_rate"], "warmup_share": space["val"], "plateaus": space["n"]}
    many = points(search(space=space, trials=200))
    assert many[:20] == points(search(space=space, trials=20)) != points(search(space=space, trials=20, seed=1))[:20]
    rates = sorted(point["learning_rate"] for point in many)
    assert rates[0] >= 1e-5 and rates[-1] <= 1e-2 and 1e-4 < rates[100] < 1e-3  # the median of log_uniform is 10**-3.5
    assert 0.4 < sorted(point["warmup_share"] for point in many)[100] < 0.6
    assert {point["plateaus"] for point in many} == {1, 2, 3}
    assert json.loads(json.dumps(many)) == many


def test_a_point_that_is_drawn_twice_is_tried_once() -> None:
    found = points(search(space={"batch_size": {"choice": [4, 8]}}, trials=50))
    assert sorted(point["batch_size"] for point in found) == [4, 8]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metrik": "loss"}, r"metrik \('loss'\) is not a setting of SearchConfig; did you mean metric\?"),
        ({"metric": "val_fid"}, r"metric \('val_fid'\) must be one of a report; use val_loss"),
        ({"metric": "val_psnr_bicubic"}, "must be one of a report"),  # the same for every trial
        ({"trials": 0}, r"trials \(0\) must be at least 1"),
        ({"trials": 3}, r"trials \(3\) must be 1 where the space is all grid"),
        ({"grace_steps": 5}, r"grace_steps \(5\) is of stop: asha"),
        ({"reduction_factor": 1.0}, r"reduction_factor \(1.0\) must be above 1"),
        ({"space": {}}, "space .* must hold a setting"),
        ({"space": {"learning_rat": {"grid": [1]}}}, r"space: learning_rat .* did you mean learning_rate\?"),
        ({"space": {"pairs": {"grid": ["a"]}}}, "space: pairs .* cannot be searched; .* judged by the same"),
        ({"space": {"batch_size": [4, 8]}}, r"space: batch_size .* write \{choice: \[a, b\]\}"),
        ({"space": {"batch_size": {"choise": [4, 8]}}}, "must be one of choice, grid, uniform, log_uniform, integer"),
        ({"space": {"batch_size": {"choice": []}}}, "must be a list of values"),
        ({"space": {"batch_size": {"choice": [4, 4]}}}, "must name each value once"),
        ({"space": {"learning_rate": {"uniform": [0.2, 0.1]}}}, "must be two numbers, the lower first"),
        ({"space": {"learning_rate": {"uniform": [True, 2]}}}, "must be two numbers"),
        ({"space": {"plateaus": {"integer": [1, 2.5]}}}, "must be two whole numbers"),
        ({"space": {"learning_rate": {"log_uniform": [0.0, 0.1]}}}, "must be above 0 for log_uniform"),
    ],
)
def test_a_mistake_in_the_file_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search(**settings)


def test_a_file_that_is_no_yaml_and_one_that_is_not_there_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("space: [")
    for name, why in (("bad.yaml", "flow"), ("none.yaml", "No such file")):
        with pytest.raises(ValueError, match=f"--tune .*{name}.* must be a file of plain YAML: .*{why}"):
            read_search(str(tmp_path / name))


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"batch_size": {"grid": [4, 0]}}, r"space: batch_size \(0\) must be at least 1"),
        ({"batch_size": {"choice": [4, "8"]}}, r"space: batch_size \('8'\) must be"),
        ({"prediction": {"grid": ["eps", "x0"]}}, r"space: prediction \('x0'\)"),
        ({"learning_rate": {"uniform": [-0.1, 0.1]}}, "space: learning_rate .*-0.1"),
        ({"sampler": {"grid": ["ddim", "euler"]}}, "space: .*euler"),
    ],
)
def test_a_value_that_no_trial_could_have_is_refused_before_any_starts(space: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trials_of(config(), search(space=space, trials=1))


def test_values_that_only_fit_together_are_tried_together_and_the_other_points_say_why() -> None:
    space = {"preset": {"grid": ["nano-x4", "nano-x4-regression"]}, "encoder_steps": {"grid": [None, 5]}}
    found = trials_of(config(preset="nano-x4-regression"), search(space=space))
    assert [trial.config is None for trial in found].count(True) == 1
    (refused,) = (trial for trial in found if trial.config is None)
    assert refused.point == {"preset": "nano-x4-regression", "encoder_steps": 5}
    assert "encoder_steps (5) is of presets with an encoder stage" in refused.refusal


def test_every_setting_is_searched_or_has_a_reason_not_to_be() -> None:
    assert set(FIXED) <= set(TrainConfig.__dataclass_fields__)
    assert not set(FIXED) & {
        "preset",
        "steps",
        "learning_rate",
        "batch_size",
        "loss",
        "sampler",
        "grid",
        "seed",
        "init",
    }


def test_trials_are_compared_by_the_steps_of_their_last_stage_and_not_at_its_end() -> None:
    settings = config(encoder_steps=4, steps=10)
    assert [progress(settings, "val_loss", {"step": step, "val_loss": 0.5}) for step in (4, 14)] == [None, None]
    assert progress(settings, "val_loss", {"step": 6, "val_loss": 0.5}) == {"steps": 2, "val_loss": 0.5}
    assert progress(settings, "val_loss", {"step": 6, "loss": 0.5}) is None


def test_the_score_is_that_of_the_model_that_is_kept() -> None:
    losses = {4: 0.1, 8: 0.3, 12: 0.4}  # step 4 is of another stage
    reports = [{"step": step, "val_loss": loss, "val_psnr_sample": 10 * loss} for step, loss in losses.items()]
    last, best = (config(encoder_steps=4, steps=8, result=result) for result in ("last", "best"))
    assert score(last, "val_psnr_sample", reports) == 4.0
    assert score(best, "val_psnr_sample", reports) == 3.0
    assert score(last, "val_loss", reports[:1]) is None


def test_asha_stops_the_worse_half_and_knows_it_again_from_records() -> None:
    """Rungs at 2, 4, 8 steps, factor 2: goes on what is no worse than the median of those that were there before."""
    configs = {name: config(steps=16, encoder_steps=4, checkpoint_every=2) for name in "abc"}
    asha = search(stop="asha", grace_steps=2, reduction_factor=2.0)
    live = scheduler_of(asha, configs, {name: Record() for name in configs})
    first, worse = judge_of(live, "a"), judge_of(live, "b")
    assert first({"steps": 2, "val_loss": 0.5}) and first({"steps": 4, "val_loss": 0.4})
    assert not worse({"steps": 2, "val_loss": 0.6})
    reports = [{"step": 6.0, "val_loss": 0.5}, {"step": 8.0, "val_loss": 0.4}]
    records = {"a": Record(status="done", reports=reports), "b": Record(), "c": Record()}
    again = scheduler_of(asha, configs, records)
    assert not judge_of(again, "b")({"steps": 2, "val_loss": 0.6})
    assert judge_of(again, "c")({"steps": 2, "val_loss": 0.3})
    assert judge_of(scheduler_of(search(), configs, records), "b")({"steps": 2, "val_loss": 9.0})


def reporting(monkeypatch: pytest.MonkeyPatch, *losses: float, error: Exception | None = None) -> list[int]:
    """Put a training in place of train() that reports losses at steps 2, 4, ...; returns the steps that were done."""
    done: list[int] = []

    def train(config: TrainConfig, *, parent_run: str, watch: Any) -> Summary:
        metrics: dict[str, float] = {}
        for step, loss in enumerate(losses, 1):
            if 2 * step not in done:
                done.append(2 * step)
                metrics = {"val_loss": loss}
                watch({"step": float(2 * step), **metrics})
        if error is not None:
            raise error
        return Summary(job="train", run_id="r", status="done", metrics=metrics)

    monkeypatch.setattr(trials, "train", train)
    return done


def go(config: TrainConfig, judge: Judge = lambda now: True) -> Record:
    run_trial(config, "val_loss", parent_run="p", judge=judge)
    return read_record(config.output)


def test_a_trial_has_one_verdict_and_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(tmp_path, preset="nano-x4-regression", steps=6, checkpoint_every=2)
    done = reporting(monkeypatch, 3.0, 2.0, 1.0)
    first = go(settings)
    assert (first.status, [report["val_loss"] for report in first.reports]) == ("done", [3.0, 2.0, 1.0])
    done.clear()
    assert go(settings) == first and done == []


def test_a_stopped_trial_ends_at_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(tmp_path, preset="nano-x4-regression", steps=6, checkpoint_every=2)
    done = reporting(monkeypatch, 3.0, 2.0, 1.0)
    asked: list[dict[str, float]] = []
    found = go(settings, lambda now: asked.append(now) or now["steps"] < 4)  # type: ignore[func-returns-value]
    assert (found.status, done, asked[-1]) == ("stopped", [2, 4], {"steps": 4.0, "val_loss": 2.0})


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (TrainingFailed("diverged"), "failed", "diverged"),
        (ValueError("crop (7) must"), "failed", "crop (7) must"),
        (OSError("the store is away"), "running", "OSError: the store is away"),
    ],
)
def test_what_is_the_trials_own_fault_is_a_verdict_and_the_rest_is_taken_up_again(
    error: Exception, status: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(tmp_path, preset="nano-x4-regression", steps=6, checkpoint_every=2)
    done = reporting(monkeypatch, 3.0, error=error)
    if status == "running":
        with pytest.raises(OSError):
            go(settings)
    else:
        go(settings)
    found = read_record(settings.output)
    assert (found.status, found.reason, len(found.reports)) == (status, reason, 1)
    again = reporting(monkeypatch, 3.0, 2.0, 1.0)
    again.extend(done)  # its checkpoint is kept
    assert go(settings).status == ("done" if status == "running" else "failed")
    assert len(read_record(settings.output).reports) == (3 if status == "running" else 1)


def test_a_metric_that_is_no_number_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reporting(monkeypatch, 3.0, 2.0, float("nan"))
    found = go(config(tmp_path, preset="nano-x4-regression", steps=6, checkpoint_every=2))
    assert (found.status, found.reason) == ("failed", "its last report has no finite val_loss")


def test_work_in_steps_runs_to_its_judge_and_stop_waits_for_its_end() -> None:
    ended = threading.Event()

    def work(judge: Judge) -> None:
        for step in range(3):
            if not judge({"steps": float(step)}):
                threading.Event().wait(0.05)
                break
        ended.set()

    whole = Stepper(work)
    assert [whole.step() for _ in range(4)] == [{"steps": 0.0}, {"steps": 1.0}, {"steps": 2.0}, None]
    whole.stop()
    ended.clear()
    cut = Stepper(work)
    assert cut.step() == {"steps": 0.0}
    cut.stop()
    assert ended.is_set()
    Stepper(work).stop()  # it never began

    def fail(judge: Judge) -> None:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        Stepper(fail).step()

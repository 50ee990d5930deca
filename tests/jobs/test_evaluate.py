"""The laws of the evaluation job."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import duckdb
import mlflow
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

from diffsr_core.checkpoint import load_model
from diffsr_core.degradation import Degradation
from diffsr_core.pixels import bicubic, lanczos
from diffsr_core.sampling import SamplingRecipe
from diffsr_core.upscaler import Upscaled, Upscaler
from pipelines import evaluation
from pipelines.cli import run_job
from pipelines.datasets import Loaded, Loader, open_dataset
from pipelines.lease import Lease
from pipelines.manifest import load_manifest
from pipelines.measures import MeterSettings
from pipelines.pairs import PairsConfig, make_pairs
from pipelines.rows import iter_pairs
from pipelines.scoring import Contender, Drawer, Running, score_dataset
from tests.core.tiny import MODELS, RRDB_TWIN
from tests.jobs.conftest import ROOT, Ran, photograph, png, run, tree
from tests.jobs.tiny import SAMPLING, broken_folder, model_folder, waves, write_png

FLAGS = ["--steps", "2", "--engine", "local"]


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three photographs and a rotten file."""
    folder = tmp_path_factory.mktemp("held-out")
    for name in ("astronaut.png", "coins.png", "rocket.jpg"):
        (folder / name).with_suffix(".png").write_bytes(png(photograph(name)))
    (folder / "rotten.png").write_bytes(b"\x89PNG\r\n\x1a\n and nothing")
    (folder / "tiny.png").write_bytes(png(photograph("coins.png", 3)))
    return folder


@pytest.fixture(scope="module")
def evaluated(trained: Path, held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one evaluation on two Ray workers."""
    output = tmp_path_factory.mktemp("evaluation") / "out"
    flags = ["--model", "models:/tested/1", "--dataset", held_out, "--output", output, "--steps", 2, "--num-workers", 2]
    done = run("evaluate", *flags, "--max-dead-share", 0.5)
    assert (done.code, done.summary["done"], done.summary["dead"]) == (0, 3, 2), done.stderr
    return output


def rows_of(output: Path) -> dict[tuple[str, str], dict]:
    return {(row["key"], row["method"]): row for row in pq.read_table(output / "rows.parquet").to_pylist()}


def scores_of(output: Path) -> pa.Table:
    """The rows without what a clock said."""
    table = pq.read_table(output / "rows.parquet")
    return table.drop([name for name in table.column_names if name.startswith(("seconds", "device_s"))])


METHODS = ("bicubic", "regression", "model")


def test_each_image_has_a_row_per_method_and_a_rotten_one_a_reason(evaluated: Path) -> None:
    rows = rows_of(evaluated)
    keys = ("astronaut.png", "coins.png", "rocket.png", "rotten.png", "tiny.png")
    assert list(rows) == [(key, method) for key in keys for method in METHODS]
    for method in METHODS:
        assert rows["rotten.png", method]["reason"] and not rows["astronaut.png", method]["reason"]
        assert rows["tiny.png", method]["reason"] == "too_small" and rows["tiny.png", method]["psnr"] is None
    assert rows["coins.png", "bicubic"]["device_s"] == 0 < rows["coins.png", "regression"]["device_s"]
    assert rows["coins.png", "model"]["megapixels"] == pytest.approx(96 * 96 / 1e6)


def test_bicubic_psnr_is_what_scikit_image_says(evaluated: Path) -> None:
    hr = photograph("astronaut.png")
    sr = bicubic(Degradation("bicubic", 4).apply(hr, seed=0), 4)
    expected = peak_signal_noise_ratio(hr[4:-4, 4:-4], sr[4:-4, 4:-4], data_range=255)
    assert rows_of(evaluated)["astronaut.png", "bicubic"]["psnr"] == pytest.approx(expected, abs=1e-9)


def test_the_summary_is_what_sql_says_of_the_rows_and_lies_in_mlflow_beside_the_model(evaluated: Path) -> None:
    summary = json.loads((evaluated / "summary.json").read_text())
    rows = pq.read_table(evaluated / "rows.parquet")
    sql = duckdb.connect()
    sql.register("r", rows)
    found = sql.sql("SELECT method, avg(psnr), avg(lr_psnr) FROM r WHERE reason = '' GROUP BY method").fetchall()
    assert {method for method, *_ in found} == set(METHODS)
    for method, mean, faithful in found:
        assert summary["metrics"][f"{method}_psnr"] == pytest.approx(mean)
        assert summary["metrics"][f"{method}_lr_psnr"] == pytest.approx(faithful)
        ends = [summary["intervals"][f"{method}_psnr_{end}"] for end in ("low", "high")]
        assert ends[0] < mean < ends[1]
    logged = mlflow.get_run(summary["run_id"])
    assert logged.data.metrics["model_psnr"] == pytest.approx(summary["metrics"]["model_psnr"])
    assert logged.data.metrics["model_psnr_low"] == pytest.approx(summary["intervals"]["model_psnr_low"])
    assert logged.inputs.dataset_inputs[0].dataset.digest == summary["dataset"][:32]
    version = mlflow.MlflowClient().get_model_version("tested", "1")
    logged_model = mlflow.get_logged_model(str(version.source).removeprefix("models:/"))
    metrics = {metric.key for metric in logged_model.metrics}
    assert {"model_psnr", "bicubic_psnr"} <= metrics


def test_the_same_evaluation_is_read_not_computed(evaluated: Path, held_out: Path, call: Callable[..., Ran]) -> None:
    before = {path: path.stat().st_mtime_ns for path in evaluated.rglob("*")}
    flags = ["--model", "models:/tested/1", "--dataset", held_out, "--output", evaluated, *FLAGS]
    again = call("evaluate", *flags)
    assert (again.code, again.summary["done"], again.summary["unchanged"]) == (0, 0, 5)
    assert {path: path.stat().st_mtime_ns for path in evaluated.rglob("*")} == before


def test_ray_and_a_plain_loop_give_the_same_scores_and_pictures(
    evaluated: Path, held_out: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    flags = ["--model", "models:/tested/1", "--dataset", held_out, "--output", tmp_path / "out", *FLAGS]
    assert call("evaluate", *flags, "--max-dead-share", 0.5).code == 0
    assert scores_of(tmp_path / "out").equals(scores_of(evaluated))
    ours, theirs = (re.findall('base64,[^"]+', (f / "report.html").read_text()) for f in (tmp_path / "out", evaluated))
    assert ours == theirs and len(ours) == 3 * 5  # LR, three methods and HR of three images


def test_a_pair_set_can_be_scored(trained: Path, pairs: Path, tmp_path: Path, call: Callable[..., Ran]) -> None:
    flags = ["--model", trained / "model", "--dataset", pairs, "--split", "val", "--output", tmp_path / "out", *FLAGS]
    done = call("evaluate", *flags, "--limit", "3")
    assert (done.code, done.summary["done"]) == (0, 3), done.stderr


def test_a_folder_without_images_and_a_model_that_is_none_are_refused(
    trained: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    flags = ["--dataset", empty, "--output", tmp_path / "out", *FLAGS]
    assert "must hold images" in call("evaluate", "--model", trained / "model", *flags).stderr
    refused = call("evaluate", "--model", empty, *flags)
    assert refused.code == 1 and "models:/NAME@ALIAS" in refused.stderr


def test_too_many_images_without_a_score_end_it_with_their_reasons_on_disk(
    trained: Path, held_out: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    flags = ["--model", trained / "model", "--dataset", held_out, "--output", tmp_path / "out", *FLAGS]
    ended = call("evaluate", *flags, "--max-dead-share", 0.3)
    assert (ended.code, ended.summary["inputs"], ended.summary["done"], ended.summary["dead"]) == (3, 5, 3, 2)
    assert "max_dead_share (0.3)" in ended.stderr and "rows.parquet" in ended.stderr
    rows = rows_of(tmp_path / "out")
    assert (
        rows["tiny.png", "model"]["reason"] == "too_small"
        and "rotten.png" in (tmp_path / "out" / "report.html").read_text()
    )
    assert not (tmp_path / "out" / "summary.json").exists()
    assert call("evaluate", *flags, "--max-dead-share", 0.4).summary["done"] == 3  # it is not taken for done


@pytest.mark.parametrize(("names", "code"), [(["a.png"], 1), (["a.png", "b.png"], 3)])
def test_a_set_without_one_readable_image_is_never_scored(
    names: list[str], code: int, trained: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    (tmp_path / "set").mkdir()
    for name in names:
        (tmp_path / "set" / name).write_bytes(b"no picture")
    flags = ["--model", trained / "model", "--dataset", tmp_path / "set", "--output", tmp_path / "out", *FLAGS]
    assert call("evaluate", *flags).code == code
    assert (tmp_path / "out" / "rows.parquet").exists() and not (tmp_path / "out" / "summary.json").exists()


@pytest.mark.parametrize("seed", ["-1", str(2**63)])
@pytest.mark.parametrize("job", ["evaluate", "promote"])
def test_a_seed_that_no_generator_takes_is_a_bad_argument(job: str, seed: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        run_job(job, ["--model", "a", "--dataset", "b", "--output", "c", f"--seed={seed}"])
    assert ended.value.code == 2 and f"seed ({seed})" in capsys.readouterr().err


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models by their names, and sets: `mixed` of colour and grey, `grey`, and `sources` of pairs."""
    folder = tmp_path_factory.mktemp("tiny")
    for name in ("sr3", "srdiff", "seed3", "4-bands", "rrdb-twin", "anchored", "deblur"):
        model_folder(folder / name, MODELS[name])
    for name, level in (("one-step", 0.7), ("from-noise", None)):
        model_folder(folder / name, replace(MODELS["anchored"], one_step=True, start_level=level))
    for name, channels in (("a.png", 3), ("b.png", 1), ("c.png", 3)):
        write_png(folder / "mixed" / name, waves(44, 40, channels=channels, phase=ord(name[0])))
    write_png(folder / "grey" / "g.png", waves(40, 44, channels=1))
    for index in range(10):
        write_png(folder / "sources" / f"{index}.png", waves(40, 40, phase=index))
    return folder


def words(tiny: Path, model: str, output: Path, *more: object, dataset: str = "mixed") -> list[object]:
    places = ["--model", tiny / model, "--dataset", tiny / dataset, "--output", output]
    return [*places, "--engine", "local", *SAMPLING, *more]


SEARCH = ["--search-steps", "1,2", "--search-grids", "uniform,karras", "--search-samplers", "ddim,dpmpp-2m"]


def test_a_search_scores_every_candidate_and_the_best_is_what_is_evaluated_and_named(
    tiny: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    output = tmp_path / "out"
    flags = words(tiny, "anchored", output, *SEARCH, "--objective", "lr_psnr", "--sampler", "sr3", dataset="grey")
    done = call("evaluate", *flags)
    assert done.code == 0 and "searching 6 schedules" in done.stderr, done.stderr
    assert "the schedule is chosen on the images that are then scored" in done.stderr  # a folder has no split val
    curve = json.loads((output / "curve.json").read_text())
    tried = [{name: each[name] for name in ("sampler", "grid", "num_steps")} for each in curve["points"]]
    expected = {("ddim", grid, steps) for grid in ("uniform", "karras") for steps in (1, 2)}
    expected |= {("dpmpp-2m", "karras", 1), ("dpmpp-2m", "karras", 2)}
    assert {tuple(each.values()) for each in tried} == expected and len(tried) == 6
    scores = [each["summary"]["lr_psnr"][0] for each in curve["points"]]
    assert curve["measure"] == "lr_psnr" and scores == sorted(scores, reverse=True) and len(set(scores)) > 1
    assert curve["chosen"] == 0 and 0 <= curve["knee"] < 6
    summary = json.loads((output / "summary.json").read_text())
    assert summary["sampling"].items() >= tried[0].items() and summary["sampling"]["tile"] == 16
    assert summary["metrics"]["model_lr_psnr"] == scores[0]
    assert {str(output / "curve.json"), str(output / "curve.md")} <= set(done.summary["outputs"])
    logged = mlflow.MlflowClient().list_artifacts(done.summary["run_id"])
    assert {"curve.json", "curve.md", "rows.parquet", "report.html"} <= {item.path for item in logged}
    best = tried[0]
    assert f"'grid': '{best['grid']}'" in mlflow.get_run(done.summary["run_id"]).data.params["sampling"]
    # The oracle: that very schedule asked for by name.
    by_name = ["--sampler", best["sampler"], "--grid", best["grid"], "--steps", best["num_steps"]]
    assert call("evaluate", *words(tiny, "anchored", tmp_path / "named", *by_name, dataset="grey")).code == 0
    assert scores_of(output).equals(scores_of(tmp_path / "named"))
    # Again: nothing is done. No search: another evaluation, and the curve's files are gone.
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    again = call("evaluate", *flags)
    assert (again.code, again.summary["done"], again.summary["unchanged"]) == (0, 0, 1)
    assert "nothing to do" in again.stderr and again.summary["outputs"] == done.summary["outputs"]
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    other = call("evaluate", *words(tiny, "anchored", output, dataset="grey"))
    assert (other.code, other.summary["done"]) == (0, 1)
    assert not [name for name in tree(output) if name.startswith("curve")] and len(other.summary["outputs"]) == 3


def test_a_stored_winner_is_what_the_model_is_sampled_with_from_then_on(
    tiny: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    model = shutil.copytree(tiny / "anchored", tmp_path / "model")
    digest = json.loads((model / "config.json").read_text())["digest"]
    small = ["--search-steps", "3,1", "--search-grids", "karras", "--search-samplers", "ddim", "--store"]
    flags = ["--dataset", tiny / "grey", "--engine", "local", "--tile", 16, "--halo", 4, "--model", model]
    done = call("evaluate", *flags, "--output", tmp_path / "out", *small, "--objective", "lr_psnr")
    assert done.code == 0, done.stderr
    stored = json.loads((model / "sampling.json").read_text())
    best = json.loads((tmp_path / "out/curve.json").read_text())["points"][0]
    assert (stored["grid"], stored["num_steps"]) == ("karras", best["num_steps"])
    assert stored["evidence"]["data"] == open_dataset(str(tiny / "grey"), scale=4).digest
    assert json.loads((model / "config.json").read_text())["digest"] == digest  # the same network
    again = call("evaluate", *flags, "--output", tmp_path / "out", *small, "--objective", "lr_psnr")
    assert (again.summary["unchanged"], again.summary["outputs"]) == (1, done.summary["outputs"])
    # Whoever names no schedule gets it, whoever names one does not.
    assert call("evaluate", *flags, "--output", tmp_path / "own").code == 0
    assert scores_of(tmp_path / "own").equals(scores_of(tmp_path / "out"))
    said = call("evaluate", *flags, "--output", tmp_path / "named", "--steps", 2, "--grid", "uniform", "--dry-run")
    assert "ddim 2 steps" in said.stderr


def test_a_model_of_one_step_is_searched_by_its_start_level_alone(
    tiny: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    model = shutil.copytree(tiny / "one-step", tmp_path / "model")
    flags = ["--dataset", tiny / "grey", "--engine", "local", "--tile", 16, "--halo", 4]
    own, search = ["--model", model, "--output", tmp_path / "out"], ["--search-start-levels", "0,0.4", "--store"]
    done = call("evaluate", *flags, *own, *search, "--objective", "lr_psnr")
    assert done.code == 0, done.stderr
    found = json.loads((tmp_path / "out/curve.json").read_text())["points"]
    assert {(p["sampler"], p["grid"], p["num_steps"], p["start_level"]) for p in found} == {
        ("ddim", "uniform", 1, 0.0), ("ddim", "uniform", 1, 0.4),
    }  # fmt: skip
    assert json.loads((model / "sampling.json").read_text())["start_level"] == found[0]["start_level"]
    for model, more, said in (
        ("one-step", ["--search-steps", "1"], ""),  # from its own level
        ("one-step", [*search[:2], "--pick", "knee"], "pick ('knee') must be best for a model of one step"),
        ("one-step", ["--search-steps", "4,8"], "search_steps ((4, 8)) must be 1 for a model of one step"),
        ("from-noise", search[:2], "start_level (0.4) must be 0: this model was trained to draw from noise alone"),
        ("anchored", search[:2], "search_start_levels ((0.0, 0.4)) needs numbers of steps"),
    ):
        asked = call("evaluate", *flags, "--model", tiny / model, "--output", tmp_path / "other", *more)
        assert said in asked.stderr and asked.code == bool(said), asked.stderr
    (point,) = json.loads((tmp_path / "other/curve.json").read_text())["points"]
    assert point["start_level"] == 0.7


def test_in_a_pair_set_the_search_looks_at_val_and_what_is_scored_is_test(
    tiny: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    made = {}
    for name, val_share in (("both", 0.4), ("no-val", 0.0)):
        made_of = PairsConfig(source=str(tiny / "sources"), output=str(tmp_path / name), scale=4, patch=32,
                              engine="local", max_per_image=1, val_share=val_share, test_share=0.4)  # fmt: skip
        make_pairs(made_of)
        made[name] = load_manifest(str(tmp_path / name))
    both = str(tmp_path / "both")
    keys = {split: {row["pair_id"] for row in iter_pairs(both, made["both"], split, columns=["pair_id"])}
            for split in ("val", "test")}  # fmt: skip
    assert keys["val"] and keys["test"] and not keys["val"] & keys["test"] and not made["no-val"].num_pairs("val")
    small = ["--search-steps", "1,2", "--search-grids", "uniform", "--search-samplers", "ddim"]
    warning = "the schedule is chosen on the images that are then scored, which flatters it a little"

    done = call("evaluate", *words(tiny, "srdiff", tmp_path / "out", *small, "--dataset", both))
    assert (done.code, done.summary["done"]) == (0, len(keys["test"])), done.stderr
    assert warning not in done.stderr and {key for key, _ in rows_of(tmp_path / "out")} == keys["test"]
    curve = json.loads((tmp_path / "out" / "curve.json").read_text())
    assert curve["data"] == open_dataset(both, split="val", scale=4).digest
    for found in curve["points"]:  # the oracle: that schedule asked for by name, on val
        output = tmp_path / f"val-{found['num_steps']}"
        flags = ["--dataset", both, "--split", "val", "--grid", "uniform", "--steps", found["num_steps"]]
        named = call("evaluate", *words(tiny, "srdiff", output, *flags))
        assert {key for key, _ in rows_of(output)} == keys["val"]
        assert named.summary["metrics"]["model_psnr_y"] == pytest.approx(found["summary"]["psnr_y"][0], abs=1e-9)

    for name, split in (("both", "val"), ("no-val", "test")):
        flags = ["--dataset", tmp_path / name, "--split", split]
        done = call("evaluate", *words(tiny, "srdiff", tmp_path / f"out-{name}", *small, *flags))
        assert done.code == 0 and warning in done.stderr, done.stderr


def test_another_objective_is_another_evaluation(tiny: Path, tmp_path: Path, call: Callable[..., Ran]) -> None:
    small = ["--search-steps", "1", "--search-grids", "uniform", "--search-samplers", "ddim"]
    for objective, done in (("psnr_y", 1), ("psnr_y", 0), ("ssim", 1)):
        flags = words(tiny, "seed3", tmp_path / "out", *small, "--objective", objective, dataset="grey")
        assert call("evaluate", *flags).summary["done"] == done


@pytest.mark.parametrize(
    ("model", "flags", "pieces"),
    [
        ("rrdb-twin", ["--search-steps", "2"], ["is a regression, it has no schedule; leave out --search-steps"]),
        ("srdiff", ["--search-steps", "2,101"], ["steps (101) must be between 1 and 100", "log_snr"]),
        ("srdiff", ["--steps", "101"], ["steps (101) must be between 1 and 100"]),
        ("anchored", ["--tile", "15"], ["tile (15) must be a multiple of the model's stride (2)"]),
        ("sr3", ["--start-level", "0.5"], ["start_level (0.5) must be 0", "no regression"]),
        ("deblur", ["--degradation", "noise"], ["consistency (exact) must be off at scale 1"]),
        ("deblur", ["--consistency", "off"], ["scale is 1", "bicubic"]),
    ],
)
def test_what_the_model_cannot_do_is_refused_before_any_work_also_in_a_dry_run(
    model: str,
    flags: list[str],
    pieces: list[str],
    tiny: Path,
    tmp_path: Path,
    call: Callable[..., Ran],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("score_dataset", "measure_curve"):
        monkeypatch.setattr(evaluation, name, lambda *a, **k: pytest.fail("work was begun"))
    for more in ([], ["--dry-run"], ["--engine", "ray"]):
        refused = call("evaluate", *words(tiny, model, tmp_path / "out", *flags, *more))
        assert refused.code == 1 and "Traceback" not in refused.stderr
        assert all(piece in refused.stderr for piece in pieces), refused.stderr
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_regression_of_its_own_loses_that_baseline_with_a_word(
    tiny: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    done = call("evaluate", *words(tiny, "sr3", tmp_path / "out"))
    assert (done.code, done.summary["done"], done.summary["dead"]) == (0, 3, 0), done.stderr
    assert "has no regression network of its own, so that baseline is left out" in done.stderr
    assert {"bicubic_psnr", "model_psnr"} <= set(done.summary["metrics"])
    assert not [name for name in done.summary["metrics"] if name.startswith("regression")]
    assert {method for _, method in rows_of(tmp_path / "out")} == {"bicubic", "model"}


@pytest.mark.parametrize(("model", "channels"), [("seed3", 1), ("4-bands", 4)])
def test_an_image_of_other_channels_is_a_row_with_that_reason_and_the_rest_is_scored(
    model: str, channels: int, tiny: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    done = call("evaluate", *words(tiny, model, tmp_path / "out", "--max-dead-share", "1"))
    assert (done.code, done.summary["done"], done.summary["dead"]) == (0, 1, 2), done.stderr
    rows = rows_of(tmp_path / "out")
    reasons = {key: row["reason"] for (key, method), row in rows.items() if method == "model"}
    assert reasons == {"a.png": "channels", "b.png": "", "c.png": "channels"}
    assert f"channels (3) must be {channels} for this model; convert the image" in rows["a.png", "model"]["message"]
    assert rows["b.png", "model"]["lr_psnr"] > 40 and rows["a.png", "model"]["lr_psnr"] is None
    # The others can do it; means are over what all could.
    assert rows["a.png", "bicubic"]["psnr"] > 20
    assert done.summary["metrics"]["bicubic_psnr"] == rows["b.png", "bicubic"]["psnr"]
    over = call("evaluate", *words(tiny, model, tmp_path / "over"))
    assert (over.code, over.summary["dead"]) == (3, 2) and "max_dead_share (0.2)" in over.stderr


def test_a_restoration_at_scale_1_is_scored_and_its_bicubic_is_the_input_itself(
    tiny: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    noise = json.dumps({"name": "noise", "settings": {"noise": [20, 20]}})
    flags = words(tiny, "deblur", tmp_path / "out", "--degradation", noise, "--consistency", "off")
    for _ in range(2):
        done = call("evaluate", *flags)
        assert done.code == 0, done.stderr
    assert done.summary["unchanged"] == 3 and done.summary["metrics"]["bicubic_lr_psnr"] == 100
    # Of noise with sigma 20 the PSNR is 20 log10(255 / 20) = 22.1 dB, a little more where pixels are clipped.
    assert 21.5 < rows_of(tmp_path / "out")["a.png", "bicubic"]["psnr"] < 24


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--objective fid", "objective ('fid') must be one of psnr, ssim, psnr_y, ssim_y, ms_ssim"),
        ("--search-steps 0", "search_steps (0) must be at least 1 each; use 4,8,16"),
        ("--search-steps 4.5", "search_steps (4.5) must be a valid integer"),
        ("--search-samplers ddim,euler", "search_samplers ('euler') must be among ddim, ddpm"),
        ("--search-grids auto", "search_grids ('auto') must be among uniform, log_snr"),
        ("--search-samplers dpmpp-2m --search-grids uniform", "dpmpp-2m needs log_snr or karras"),
        ("--metrics sigma", "metrics ('sigma') needs several samples; give --samples 4"),
        ("--degradation blurry", "degradation is 'blurry': it must be one of"),
        ('--degradation {"name":"noise","settings":{"noise":-1}}', "noise is -1: it must be"),
    ],
)
def test_a_bad_argument_is_one_line_and_exit_2(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_job("evaluate", ["--model", "a", "--dataset", "b", "--output", "c", *flags.split()])
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (2, "", 1) and message in err


def test_models_and_baselines_stand_side_by_side_each_as_if_alone(
    tiny: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    more = ["--baselines", "bicubic,lanczos,regression", "--against", f"{tiny / 'srdiff'},{tiny / 'rrdb-twin'}"]
    done = call("evaluate", *words(tiny, "anchored", tmp_path / "out", *more, dataset="grey"))
    assert done.code == 0, done.stderr
    rows = rows_of(tmp_path / "out")
    assert [method for _, method in rows] == ["bicubic", "lanczos", "regression", "srdiff", "rrdb-twin", "model"]
    measured = ("psnr", "ssim", "lr_psnr", "spectral_error")
    for other in ("srdiff", "rrdb-twin"):
        assert call("evaluate", *words(tiny, other, tmp_path / other, dataset="grey")).code == 0
        alone = rows_of(tmp_path / other)["g.png", "model"]
        assert [alone[name] for name in measured] == [rows["g.png", other][name] for name in measured]
    hr = np.asarray(Image.open(tiny / "grey/g.png"))[:, :, None]
    sr = lanczos(Degradation("bicubic", 4).apply(hr, seed=0), 4)
    expected = peak_signal_noise_ratio(hr[4:-4, 4:-4], sr[4:-4, 4:-4], data_range=255)
    assert rows["g.png", "lanczos"]["psnr"] == pytest.approx(expected, abs=1e-9)
    refused = call("evaluate", *words(tiny, "anchored", tmp_path / "x", "--against", tiny / "deblur", dataset="grey"))
    assert refused.code == 1 and "must be of the model's scale (4)" in refused.stderr


def test_lr_images_of_ones_own_are_what_is_upscaled_and_a_missing_or_wrong_one_is_a_reason(
    tiny: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    for name in ("a.png", "c.png"):
        hr = np.asarray(Image.open(tiny / "mixed" / name))
        lr = Degradation("bicubic", 4).apply(hr, seed=0)
        write_png(tmp_path / "lr" / name.replace(".png", "x4.png"), lr if name == "a.png" else lr[1:])
    twins = ["--lr-source", tmp_path / "lr", "--lr-name", "{stem}x4.png", "--max-dead-share", 1]
    done = call("evaluate", *words(tiny, "anchored", tmp_path / "out", *twins))
    assert (done.code, done.summary["done"], done.summary["dead"]) == (0, 1, 2), done.stderr
    rows = rows_of(tmp_path / "out")
    reasons = {key: row["reason"] for (key, _), row in rows.items()}
    assert reasons == {"a.png": "", "b.png": "no_twin", "c.png": "scale_mismatch"}
    assert call("evaluate", *words(tiny, "anchored", tmp_path / "made")).code == 0
    made = rows_of(tmp_path / "made")["a.png", "bicubic"]
    assert rows["a.png", "bicubic"]["psnr"] == made["psnr"]


def test_several_samples_have_a_sigma_and_an_uncertainty_map(
    tiny: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    flags = words(tiny, "anchored", tmp_path / "out", "--samples", 3, "--consistency", "off", dataset="grey")
    assert call("evaluate", *flags).code == 0
    rows = rows_of(tmp_path / "out")
    model, _ = load_model(tiny / "anchored")
    loaded = Loader(**open_dataset(str(tiny / "grey"), scale=4).loader())(
        {"key": "g.png", "etag": open_dataset(str(tiny / "grey"), scale=4).items[0].etag, "place": ""}
    )
    recipe = SamplingRecipe(num_steps=2, tile=16, halo=4, consistency="off")
    drawn = [Upscaler(model, replace(recipe, sample_index=k))(loaded.lr, digest=loaded.digest).sr for k in range(3)]
    expected = np.stack(drawn).astype(np.float64).std(axis=0).mean()
    assert rows["g.png", "model"]["sigma"] == pytest.approx(expected, abs=1e-9) and expected > 0.01
    assert rows["g.png", "bicubic"]["sigma"] is None and rows["g.png", "regression"]["sigma"] is None
    page = (tmp_path / "out/report.html").read_text()
    assert len(re.findall("base64,", page)) == 5 + 1


def test_a_protocol_frames_the_photographs_and_names_its_table(
    tiny: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    write_png(tmp_path / "in/wide.png", waves(140, 190, phase=1))
    write_png(tmp_path / "in/small.png", waves(100, 300, phase=2))
    model_folder(tmp_path / "x8", replace(RRDB_TWIN, encoder=replace(RRDB_TWIN.encoder, scale=8)))
    flags = ["--model", tmp_path / "x8", "--dataset", tmp_path / "in", "--protocol", "sr3-faces-16-128",
             "--engine", "local", *SAMPLING]  # fmt: skip
    done = call("evaluate", *flags, "--output", tmp_path / "out", "--max-dead-share", 1)
    assert (done.code, done.summary["done"], done.summary["dead"]) == (0, 1, 1), done.stderr
    rows = rows_of(tmp_path / "out")
    assert rows["small.png", "model"]["reason"] == "too_small"
    square = Image.fromarray(waves(140, 190, phase=1)[:, 25:165])
    hr = np.asarray(square.resize((128, 128), Image.Resampling.BOX))
    sr = bicubic(Degradation("bicubic", 8).apply(hr, seed=0), 8)
    expected = peak_signal_noise_ratio(hr, sr, data_range=255)  # SR3 leaves out no border
    assert rows["wide.png", "bicubic"]["psnr"] == pytest.approx(expected, abs=1e-9)
    assert "Saharia et al. 2021, table 1" in (tmp_path / "out/report.html").read_text()
    refused = call("evaluate", *words(tiny, "anchored", tmp_path / "x", "--protocol", "sr3-faces-16-128"))
    assert refused.code == 1 and "is of scale 8, not the model's (4)" in refused.stderr


def test_a_study_is_written_and_its_answers_are_counted(tiny: Path, tmp_path: Path, call: Callable[..., Ran]) -> None:
    flags = words(tiny, "anchored", tmp_path / "out", "--study", "--study-images", 2)
    done = call("evaluate", *flags)
    assert done.code == 0 and str(tmp_path / "out/study.html") in done.summary["outputs"], done.stderr
    page = (tmp_path / "out/study.html").read_text()
    assert "a.png" in page
    nothing = call("evaluate", "fool-rate", "--output", tmp_path / "rates")
    assert nothing.code == 1 and "use --answers" in nothing.stderr


DATA = ROOT.parent / "shared" / "data"
needs_benchmarks = pytest.mark.skipif(not (DATA / "test").is_dir(), reason="no Set5 and BSD100 in ../shared/data/test")
# Timofte, De Smet and Van Gool, "A+", 2014, and what the literature has copied since: Y channel, border = scale.
PUBLISHED = [("set5", 2, 33.66, None), ("set5", 3, 30.39, None), ("set5", 4, 28.42, 0.8104), ("bsd100", 4, 25.96, None)]


@needs_benchmarks
@pytest.mark.parametrize(("folder", "scale", "expected_db", "expected_ssim"), PUBLISHED)
def test_bicubic_rows_reproduce_the_published_figures(
    folder: str, scale: int, expected_db: float, expected_ssim: float | None
) -> None:
    dataset = open_dataset(str(DATA / "test" / folder), scale=scale)
    names = ("psnr_y",) if expected_ssim is None else ("psnr_y", "ssim_y")
    rows = score_dataset(dataset, [Contender(method="bicubic")], meter=MeterSettings(names=names),
                         running=Running(engine="local"), label="published").rows  # fmt: skip
    assert len(rows) == {"set5": 5, "bsd100": 100}[folder] and not any(row["reason"] for row in rows)
    assert np.mean([row["psnr_y"] for row in rows]) == pytest.approx(expected_db, abs=0.02)
    if expected_ssim is not None:
        assert np.mean([row["ssim_y"] for row in rows]) == pytest.approx(expected_ssim, abs=0.001)


def test_what_was_evaluated_is_done_again_where_its_files_are_gone_or_its_summary_is_rotten(
    tiny: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    flags = words(tiny, "anchored", tmp_path / "out", dataset="grey")
    assert call("evaluate", *flags).summary["done"] == 1
    for damage in ("report.html", "rows.parquet"):
        (tmp_path / "out" / damage).unlink()
        assert call("evaluate", *flags).summary["done"] == 1 and (tmp_path / "out" / damage).exists()
    for rotten in ("{}", "junk", '{"identity": 3, "outputs": 5}'):
        (tmp_path / "out/summary.json").write_text(rotten)
        again = call("evaluate", *flags)
        assert again.summary["done"] == 1 and "cannot be read" in again.stderr
    assert call("evaluate", *flags).summary["unchanged"] == 1


def test_a_search_that_is_asked_to_store_its_winner_afterwards_does(
    tiny: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    model = shutil.copytree(tiny / "anchored", tmp_path / "model")
    small = ["--search-steps", "1", "--search-grids", "karras", "--search-samplers", "ddim"]
    flags = ["--dataset", tiny / "grey", "--engine", "local", "--tile", 16, "--halo", 4, "--model", model]
    flags += ["--output", tmp_path / "out", *small]
    assert call("evaluate", *flags).summary["done"] == 1 and not (model / "sampling.json").exists()
    for done in (1, 0):
        assert call("evaluate", *flags, "--store").summary["done"] == done
        assert (model / "sampling.json").exists()
    (model / "sampling.json").unlink()
    assert call("evaluate", *flags, "--store").summary["done"] == 1 and (model / "sampling.json").exists()


def test_other_content_of_a_weights_file_is_another_evaluation(
    tiny: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    write_png(tmp_path / "in/a.png", waves(128, 128))
    random = np.random.default_rng(0)
    flags = ["--model", tiny / "anchored", "--dataset", tmp_path / "in", "--output", tmp_path / "out"]
    flags += ["--engine", "local", *SAMPLING, "--niqe", tmp_path / "niqe.npz", "--metrics", "niqe"]
    for done, mean in ((1, 0.0), (0, 0.0), (1, 5.0)):
        spread = random.normal(size=(36, 36)) if done else 0
        if done:
            np.savez(tmp_path / "niqe.npz", mu_pris_param=np.full((1, 36), mean), cov_pris_param=spread @ spread.T,
                     gaussian_window=np.full((7, 7), 1 / 49))  # fmt: skip
        assert call("evaluate", *flags).summary["done"] == done


def test_two_evaluations_into_one_output_do_not_run_at_once(
    tiny: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    flags = words(tiny, "anchored", tmp_path / "out", dataset="grey")
    with Lease(str(tmp_path / "out"), run_id="other"):
        held = call("evaluate", *flags)
    assert held.code == 5 and "is held by run other" in held.stderr
    assert not (tmp_path / "out/rows.parquet").exists() and call("evaluate", *flags).code == 0


def test_a_rival_that_gives_nothing_takes_no_image_from_the_others_and_such_a_model_is_an_error(
    tiny: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    broken = broken_folder(tmp_path / "broken")
    alone = call("evaluate", *words(tiny, "anchored", tmp_path / "alone", dataset="grey"))
    done = call("evaluate", *words(tiny, "anchored", tmp_path / "out", "--against", broken, dataset="grey"))
    assert (done.code, done.summary["done"], done.summary["dead"]) == (0, 1, 0), done.stderr
    assert "broken gave no image a score" in done.stderr and "nan" in done.stderr
    assert done.summary["metrics"]["model_psnr"] == alone.summary["metrics"]["model_psnr"]
    own = ["--model", broken, "--dataset", tiny / "grey", "--output", tmp_path / "x", "--engine", "local", *SAMPLING]
    failed = call("evaluate", *own)
    assert failed.code == 1 and "must give an image a score" in failed.stderr and "nan" in failed.stderr
    assert (tmp_path / "x/rows.parquet").exists() and not (tmp_path / "x/summary.json").exists()


def test_transparent_pixels_are_a_reason(tiny: Path, tmp_path: Path, call: Callable[..., Ran]) -> None:
    write_png(tmp_path / "in/a.png", waves(40, 40))
    write_png(tmp_path / "in/b.png", np.dstack([waves(40, 40), np.full((40, 40), 128, np.uint8)]))
    write_png(tmp_path / "in/c.png", np.dstack([waves(40, 40), np.full((40, 40), 255, np.uint8)]))
    flags = ["--model", tiny / "anchored", "--dataset", tmp_path / "in", "--output", tmp_path / "out"]
    done = call("evaluate", *flags, "--engine", "local", *SAMPLING)
    assert (done.summary["done"], done.summary["dead"]) == (2, 1)
    reasons = {key: row["message"] for (key, _), row in rows_of(tmp_path / "out").items()}
    assert "transparent" in reasons["b.png"] and not reasons["c.png"]


def test_costs_are_those_of_the_image_that_is_scored_however_many_samples_are_drawn_for_sigma(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []

    def draw(upscaler: Upscaler, pixels: np.ndarray, *, digest: str) -> Upscaled:
        """Each call a second of the device more than the one before."""
        drawn.append((upscaler.recipe.sample_index, upscaler.recipe.num_samples))
        return Upscaled(lanczos(pixels, 4), None, None, float(len(drawn)))

    recipe = {"num_steps": 2, "tile": 16, "halo": 4, "num_samples": 3}
    loaded = Loaded(waves(16, 16), waves(64, 64), "digest")
    for choice, expected in (("first", [(0, 1), (1, 1), (2, 1)]), ("mean", [(0, 3), (0, 1), (1, 1), (2, 1)])):
        contender = Contender(method="model", model=str(tiny / "anchored"), recipe={**recipe, "choice": choice})
        drawer = Drawer(contender, scale=4, device="cpu")
        drawn.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Upscaler, "__call__", draw)
            made = drawer(loaded)
        assert drawn == expected and made.device_s == 1 and made.samples is not None and len(made.samples) == 3


def test_the_same_study_has_one_digest_wherever_it_is_written_and_another_time_to_look_is_another_study(
    tiny: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    digests = []
    for output, seconds in (("a", 3), ("b", 3), ("c", 1)):
        flags = words(tiny, "anchored", tmp_path / output, "--study", "--study-images", 2, "--study-seconds", seconds)
        assert call("evaluate", *flags).code == 0
        page = (tmp_path / output / "study.html").read_text()
        digests.append(re.search('"study": ?"([0-9a-f]+)"', page)[1])
    assert digests[0] == digests[1] != digests[2]


def test_an_objective_that_is_not_measured_is_refused_before_any_work(
    tiny: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    flags = words(tiny, "anchored", tmp_path / "out", "--search-steps", "1,2", "--metrics", "ssim", "--dry-run")
    refused = call("evaluate", *flags)
    assert refused.code == 1 and "objective ('psnr_y') must be measured; name it in --metrics" in refused.stderr

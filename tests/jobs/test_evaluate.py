"""The laws of the evaluation job."""

import html
import io
import json
from collections.abc import Callable
from pathlib import Path

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

from diffsr_core.degradation import Degradation
from diffsr_core.pixels import bicubic
from pipelines import evaluation
from pipelines.cli import run_job
from pipelines.manifest import load_manifest
from pipelines.pairs import PairsConfig, make_pairs
from pipelines.rows import iter_pairs
from pipelines.scoring import open_dataset
from tests.core.tiny import MODELS
from tests.jobs.conftest import Ran, photograph, png, run, tree
from tests.jobs.tiny import SAMPLING, model_folder, waves, write_png

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


def test_each_image_has_a_row_and_a_rotten_one_a_reason(evaluated: Path) -> None:
    rows = {row["key"]: row for row in pq.read_table(evaluated / "rows.parquet").to_pylist()}
    assert set(rows) == {"astronaut.png", "coins.png", "rocket.png", "rotten.png", "tiny.png"}
    assert rows["rotten.png"]["reason"] and not rows["astronaut.png"]["reason"]
    assert rows["tiny.png"]["reason"] == "too_small"


def test_bicubic_psnr_is_what_scikit_image_says(evaluated: Path) -> None:
    rows = {row["key"]: row for row in pq.read_table(evaluated / "rows.parquet").to_pylist()}
    hr = photograph("astronaut.png")
    sr = bicubic(Degradation("bicubic", 4).apply(hr, seed=0), 4)
    expected = peak_signal_noise_ratio(hr[4:-4, 4:-4], sr[4:-4, 4:-4], data_range=255)
    assert rows["astronaut.png"]["bicubic_psnr"] == pytest.approx(expected, abs=1e-9)


def test_the_summary_is_the_mean_of_the_rows_and_lies_in_mlflow(evaluated: Path) -> None:
    summary = json.loads((evaluated / "summary.json").read_text())
    rows = [row for row in pq.read_table(evaluated / "rows.parquet").to_pylist() if not row["reason"]]
    for method in ("bicubic", "regression", "model"):
        mean = float(np.mean([row[f"{method}_lr_psnr"] for row in rows]))
        assert summary["metrics"][f"{method}_lr_psnr"] == pytest.approx(mean)
    logged = mlflow.get_run(summary["run_id"]).data.metrics
    assert logged["model_psnr"] == pytest.approx(summary["metrics"]["model_psnr"])


def test_the_same_evaluation_is_read_not_computed(evaluated: Path, held_out: Path, call: Callable[..., Ran]) -> None:
    before = {path: path.stat().st_mtime_ns for path in evaluated.rglob("*")}
    flags = ["--model", "models:/tested/1", "--dataset", held_out, "--output", evaluated, *FLAGS]
    again = call("evaluate", *flags)
    assert (again.code, again.summary["done"], again.summary["unchanged"]) == (0, 0, 5)
    assert {path: path.stat().st_mtime_ns for path in evaluated.rglob("*")} == before


def test_ray_and_a_plain_loop_give_the_same_scores(
    evaluated: Path, held_out: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    flags = ["--model", "models:/tested/1", "--dataset", held_out, "--output", tmp_path / "out", *FLAGS]
    assert call("evaluate", *flags, "--max-dead-share", 0.5).code == 0
    ours, theirs = (pq.read_table(path / "rows.parquet").drop(["seconds"]) for path in (tmp_path / "out", evaluated))
    assert ours.equals(theirs)


def test_the_report_is_one_file_with_every_crop(evaluated: Path) -> None:
    page = (evaluated / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "rotten.png" in page


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
    rows = {row["key"]: row["reason"] for row in pq.read_table(tmp_path / "out" / "rows.parquet").to_pylist()}
    assert rows["tiny.png"] == "too_small" and "rotten.png" in (tmp_path / "out" / "report.html").read_text()
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


def test_strips_show_lr_methods_and_hr_side_by_side(evaluated: Path) -> None:
    strip = Image.open(io.BytesIO((evaluated / "strips" / "00.png").read_bytes()))
    assert strip.size == (5 * 96, 96)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models by their names, and sets: `mixed` of colour and grey, `grey`, and `sources` of pairs."""
    folder = tmp_path_factory.mktemp("tiny")
    for name in ("sr3", "srdiff", "seed3", "4-bands", "rrdb-twin", "anchored", "deblur"):
        model_folder(folder / name, MODELS[name])
    for name, channels in (("a.png", 3), ("b.png", 1), ("c.png", 3)):
        write_png(folder / "mixed" / name, waves(44, 40, channels=channels, phase=ord(name[0])))
    write_png(folder / "grey" / "g.png", waves(40, 44, channels=1))
    for index in range(10):
        write_png(folder / "sources" / f"{index}.png", waves(40, 40, phase=index))
    return folder


def words(tiny: Path, model: str, output: Path, *more: object, dataset: str = "mixed") -> list[object]:
    places = ["--model", tiny / model, "--dataset", tiny / dataset, "--output", output]
    return [*places, "--engine", "local", *SAMPLING, *more]


def rows_of(output: Path) -> dict[str, dict]:
    return {row["key"]: row for row in pq.read_table(output / "rows.parquet").to_pylist()}


SEARCH = ["--search-steps", "1,2", "--search-grids", "uniform,karras", "--search-samplers", "ddim,dpmpp-2m"]


def test_a_search_scores_every_candidate_and_the_best_is_what_is_evaluated_and_named(
    tiny: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    output = tmp_path / "out"
    flags = words(tiny, "anchored", output, *SEARCH, "--objective", "lr_psnr", "--sampler", "sr3", dataset="grey")
    done = call("evaluate", *flags)
    assert done.code == 0 and "searching 6 schedules" in done.stderr, done.stderr
    assert "the schedule is chosen on the images that are then scored" in done.stderr  # a folder has no split val
    search = json.loads((output / "search.json").read_text())
    found = search["found"]
    tried = {(each["sampler"], each["grid"], each["num_steps"]) for each in found}
    expected = {("ddim", grid, steps) for grid in ("uniform", "karras") for steps in (1, 2)}
    assert tried == expected | {("dpmpp-2m", "karras", 1), ("dpmpp-2m", "karras", 2)} and len(found) == 6
    scores = [each["model_lr_psnr"] for each in found]
    assert search["objective"] == "lr_psnr" and scores == sorted(scores, reverse=True) and len(set(scores)) > 1
    best = {name: found[0][name] for name in ("sampler", "grid", "num_steps")}
    lines = (output / "search.md").read_text().splitlines()
    assert lines[2].startswith(f"| {best['sampler']} | {best['grid']} | {best['num_steps']} |") and len(lines) == 8
    summary = json.loads((output / "summary.json").read_text())
    assert summary["sampling"].items() >= best.items() and summary["sampling"]["tile"] == 16
    assert summary["metrics"]["model_lr_psnr"] == scores[0]
    named = html.unescape((output / "report.html").read_text())
    assert f'"sampler": "{best["sampler"]}", "grid": "{best["grid"]}", "num_steps": {best["num_steps"]}' in named
    assert {str(output / "search.json"), str(output / "search.md")} <= set(done.summary["outputs"])
    logged = mlflow.MlflowClient().list_artifacts(done.summary["run_id"])
    assert {"search.json", "search.md", "rows.parquet"} <= {item.path for item in logged}
    assert f"'grid': '{best['grid']}'" in mlflow.get_run(done.summary["run_id"]).data.params["sampling"]
    # The oracle: that very schedule asked for by name.
    by_name = ["--sampler", best["sampler"], "--grid", best["grid"], "--steps", best["num_steps"]]
    assert call("evaluate", *words(tiny, "anchored", tmp_path / "named", *by_name, dataset="grey")).code == 0
    ours, theirs = (pq.read_table(path / "rows.parquet").drop(["seconds"]) for path in (output, tmp_path / "named"))
    assert ours.equals(theirs)
    # Again: nothing is done. Another objective: another evaluation. No search: its files are gone.
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    again = call("evaluate", *flags)
    assert (again.code, again.summary["done"], again.summary["unchanged"]) == (0, 0, 1)
    assert "nothing to do" in again.stderr and again.summary["outputs"] == done.summary["outputs"]
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    other = call("evaluate", *words(tiny, "anchored", output, dataset="grey"))
    assert (other.code, other.summary["done"]) == (0, 1)
    assert not [name for name in tree(output) if name.startswith("search")] and len(other.summary["outputs"]) == 3


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
    assert warning not in done.stderr and set(rows_of(tmp_path / "out")) == keys["test"]
    search = json.loads((tmp_path / "out" / "search.json").read_text())
    assert search["data"] == open_dataset(both, split="val", degradation="", scale=4).digest
    for found in search["found"]:  # the oracle: that schedule asked for by name, on val
        output = tmp_path / f"val-{found['num_steps']}"
        flags = ["--dataset", both, "--split", "val", "--grid", "uniform", "--steps", found["num_steps"]]
        named = call("evaluate", *words(tiny, "srdiff", output, *flags))
        assert set(rows_of(output)) == keys["val"]
        assert named.summary["metrics"]["model_psnr_y"] == pytest.approx(found["model_psnr_y"], abs=1e-9)

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
    for name in ("score_dataset", "search_schedule"):
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
    assert not [name for row in rows_of(tmp_path / "out").values() for name in row if name.startswith("regression")]
    assert Image.open(io.BytesIO((tmp_path / "out" / "strips" / "00.png").read_bytes())).width == 4 * 40


@pytest.mark.parametrize(("model", "channels"), [("seed3", 1), ("4-bands", 4)])
def test_an_image_of_other_channels_is_a_row_with_that_reason_and_the_rest_is_scored(
    model: str, channels: int, tiny: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    done = call("evaluate", *words(tiny, model, tmp_path / "out", "--max-dead-share", "1"))
    assert (done.code, done.summary["done"], done.summary["dead"]) == (0, 1, 2), done.stderr
    rows = rows_of(tmp_path / "out")
    assert {key: row["reason"] for key, row in rows.items()} == {"a.png": "channels", "b.png": "", "c.png": "channels"}
    assert f"channels (3) must be {channels} for this model; convert the image" in rows["a.png"]["message"]
    assert rows["b.png"]["model_lr_psnr"] > 40 and rows["a.png"]["model_lr_psnr"] is None
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
    assert 21.5 < rows_of(tmp_path / "out")["a.png"]["bicubic_psnr"] < 24


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--objective fid", "objective ('fid') must be one of psnr, ssim, psnr_y, ssim_y, lr_psnr; use psnr_y"),
        ("--search-steps 0", "search_steps (0) must be at least 1 each; use 4,8,16"),
        ("--search-steps 4.5", "search_steps (4.5) must be a valid integer"),
        ("--search-samplers ddim,euler", "search_samplers ('euler') must be among ddim, ddpm"),
        ("--search-grids auto", "search_grids ('auto') must be among uniform, log_snr"),
        ("--search-samplers dpmpp-2m --search-grids uniform", "dpmpp-2m needs log_snr or karras"),
        ("--degradation blurry", "degradation is 'blurry': it must be one of"),
        ('--degradation {"name":"noise","settings":{"noise":-1}}', "noise is -1: it must be"),
    ],
)
def test_a_bad_argument_is_one_line_and_exit_2(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_job("evaluate", ["--model", "a", "--dataset", "b", "--output", "c", *flags.split()])
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (2, "", 1) and message in err

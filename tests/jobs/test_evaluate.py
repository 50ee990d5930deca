"""The laws of the evaluation job."""

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
from diffsr_core.upscaler import bicubic
from pipelines.cli import run_job
from tests.jobs.conftest import Ran, photograph, png, run

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

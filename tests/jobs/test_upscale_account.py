"""What a night says of itself: the quality gate in ledger, sidecar and file, its report, and its run in MLflow."""

import json
from collections.abc import Callable
from pathlib import Path

import mlflow
import numpy as np
import pytest
from PIL import Image

from diffsr_core.metrics import lr_psnr
from diffsr_core.resize import downscale_pixels
from tests.core.tiny import ANCHORED
from tests.jobs.conftest import Ran, tree
from tests.jobs.tiny import NIGHT, bicubic_folder, model_folder, outcomes, receipts, waves, write_png, write_waves


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"), ANCHORED)


@pytest.fixture
def flags(model: Path, tmp_path: Path) -> list[object]:
    return ["--source", tmp_path / "in", "--output", tmp_path / "out", "--model", model, *NIGHT]


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_what_is_rejected_is_published_as_projected_bicubic_and_labelled_everywhere(
    tmp_path: Path, flags: list[object], call: Callable[..., Ran]
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    write_png(source / "a.png", waves(20, 37))  # of several windows
    gate = ["--review-lr-psnr", 99, "--reject-lr-psnr", 99, "--window", 16, "--margin", 4]
    done = call("upscale", *flags, *gate, "--samples", 2)
    assert (done.code, done.summary["done"], done.summary["metrics"]["rejected"]) == (0, 1, 1), done.stderr
    assert "1 rejected and published as bicubic" in done.stderr
    (row,) = receipts(output).values()
    assert (row["status"], row["stage"], row["reason"]) == ("done", "quality", "rejected")
    assert "is below 99 (rejected)" in row["message"]
    sidecar = json.loads((output / "a.png.json").read_text())
    assert (sidecar["method"], sidecar["quality"]["verdict"]) == ("bicubic", "rejected")
    assert sidecar["quality"]["message"] == row["message"]
    with Image.open(output / "a.png") as image:
        xmp = image.info["xmp"]
    packet = xmp if isinstance(xmp, str) else xmp.decode()
    assert "algorithmicallyEnhanced" in packet and ">bicubic<" in packet and "diffusion" not in packet
    # The stub's results are projected bicubic themselves, and pass at the usual thresholds.
    words = [*flags, "--output", tmp_path / "stub", "--model", bicubic_folder(tmp_path / "b"), *gate[4:]]
    assert call("upscale", *words).code == 0
    found, wanted = pixels_of(output / "a.png"), pixels_of(tmp_path / "stub" / "a.png")
    assert np.abs(found.astype(int) - wanted).max() <= 1 and (found == wanted).mean() > 0.99
    assert sidecar["metrics"]["lr_psnr"] == pytest.approx(lr_psnr(waves(20, 37), found, scale=4), abs=0.01)


def test_what_is_doubtful_is_published_as_drawn_and_marked_for_review(
    tmp_path: Path, flags: list[object], call: Callable[..., Ran]
) -> None:
    write_waves(tmp_path / "in", 2)
    assert call("upscale", *flags).code == 0
    plain = tree(tmp_path / "out")
    done = call("upscale", *flags, "--output", tmp_path / "doubt", "--review-lr-psnr", 99)
    assert (done.code, done.summary["metrics"]["review"], done.summary["done"]) == (0, 2, 2)
    assert set(outcomes(tmp_path / "doubt").values()) == {("done", "review")}
    status = call("upscale", "status", "--output", tmp_path / "doubt")
    assert status.summary["metrics"]["done_review"] == 2
    for name in ("00.png", "01.png"):
        np.testing.assert_array_equal(pixels_of(tmp_path / "doubt" / name), pixels_of(tmp_path / "out" / name))
        before, after = (json.loads(files[f"{name}.json"]) for files in (plain, tree(tmp_path / "doubt")))
        assert after["quality"]["verdict"] == "review" and after["metrics"] == before["metrics"]


def test_each_consistency_is_recorded_and_does_what_it_says(
    tmp_path: Path, flags: list[object], call: Callable[..., Ran]
) -> None:
    lr = waves(18, 22)
    write_png(tmp_path / "in" / "a.png", lr)
    psnr, off_by = dict[str, float](), dict[str, float]()
    for mode in ("exact", "interval", "low-band", "off"):
        output = tmp_path / mode
        done = call("upscale", *flags, "--output", output, "--consistency", mode, "--reject-lr-psnr", 0,
                    "--reject-colour-drift", 255)  # fmt: skip
        assert done.code == 0, done.stderr
        sidecar = json.loads((output / "a.png.json").read_text())
        assert sidecar["recipe"]["sampling"]["consistency"] == mode
        sr = pixels_of(output / "a.png")
        psnr[mode] = sidecar["metrics"]["lr_psnr"]
        assert psnr[mode] == pytest.approx(lr_psnr(lr, sr, scale=4), abs=0.01), mode
        off_by[mode] = float(np.abs(downscale_pixels(sr, 4) - lr).max())
        drift = np.abs(sr.mean(axis=(0, 1)) - lr.mean(axis=(0, 1))).max()
        assert sidecar["metrics"]["colour_drift"] == pytest.approx(drift, abs=1e-9), mode
    assert psnr["exact"] >= 55 and psnr["exact"] > psnr["interval"] > psnr["low-band"] > psnr["off"]
    assert off_by["interval"] < 1.0 and off_by["off"] > 5  # half a step, and the rounding of the file


def test_the_report_of_a_night_is_there_in_one_line_one_json_and_one_page(
    tmp_path: Path, flags: list[object], call: Callable[..., Ran]
) -> None:
    write_waves(tmp_path / "in", 4)
    (tmp_path / "in" / "rotten.png").write_bytes(b"\x89PNG\r\n\x1a\n<b>rotten</b>")
    done = call("upscale", *flags, "--samples", 2, "--device-hour-price", 36)
    assert done.code == 0, done.stderr
    (folder,) = (tmp_path / "out" / "_diffsr" / "reports").iterdir()
    assert folder.name == done.summary["run_id"] and str(folder / "night.html") in done.summary["outputs"]
    night = json.loads((folder / "summary.json").read_text())
    sidecars = [json.loads(data) for name, data in tree(tmp_path / "out").items() if name.endswith(".json")]
    assert (night["inputs"], night["done"], night["dead"], night["unchanged"]) == (5, 4, 1, 0)
    assert night["output_bytes"] == sum(sidecar["output"]["bytes"] for sidecar in sidecars)
    assert night["output_megapixels"] == pytest.approx(4 * 64 * 64 / 1e6)
    assert night["measures"]["lr_psnr"]["min"] == min(sidecar["metrics"]["lr_psnr"] for sidecar in sidecars)
    rows = receipts(tmp_path / "out").values()
    assert night["device_s"] == pytest.approx(sum(row["metrics"].get("device_s", 0) for row in rows))
    assert night["cost"] == pytest.approx(night["device_s"] / 100) and 0 < night["device_busy"] < 1
    page = (folder / "night.html").read_text()
    assert page.count("data:image/png;base64") >= 4 * 3 and "rotten.png" in page and "<b>rotten" not in page
    (line,) = (line for line in done.stderr.splitlines() if "assets done" in line)
    assert "4 of 5 assets done, 1 dead letter (most: 1 × decode" in line and "cost" in line


def test_a_night_is_a_run_of_mlflow_with_its_totals_and_its_report(
    tmp_path: Path, flags: list[object], call: Callable[..., Ran]
) -> None:
    write_waves(tmp_path / "in", 2, height=8, width=8)
    words = [word for word in flags if word != "--no-track"]
    done = call("upscale", *words)
    assert done.code == 0, done.stderr
    client = mlflow.MlflowClient()
    wanted = f"tags.`diffsr.run_id` = '{done.summary['run_id']}'"
    (found,) = client.search_runs([each.experiment_id for each in client.search_experiments()], wanted)
    metrics = done.summary["metrics"]
    assert (found.info.run_name, found.info.status) == ("upscale", "FINISHED")
    assert {name: found.data.metrics[name] for name in metrics} == pytest.approx(metrics)
    files = {file.path for file in client.list_artifacts(found.info.run_id)}
    assert files >= {"summary.json", "night.html", "errors.json"}
    again = call("upscale", *words)  # nothing to do is no run
    assert again.summary["inputs"] == 0
    assert len(client.search_runs([found.info.experiment_id], f"tags.`diffsr.output` = '{tmp_path}/out'")) == 1


def test_a_server_of_mlflow_that_is_away_does_not_fail_the_night(
    tmp_path: Path, flags: list[object], call: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # the port of discard, on which nobody listens
    write_waves(tmp_path / "in", 2, height=8, width=8)
    done = call("upscale", *(word for word in flags if word != "--no-track"))
    assert (done.code, done.summary["done"]) == (0, 2), done.stderr
    assert "MLflow does not know of this night" in done.stderr and "_diffsr/reports/" in done.stderr

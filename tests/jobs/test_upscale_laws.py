"""Law 3 through the job: the bytes of every result, map and sidecar do not depend on how the night was carried out.

The sources are of many sizes and kinds, so that micro-batches hold tiles of several images and an image has tiles in
several; some have several windows. Each result has an uncertainty map, drawn from two samples.
"""

import json
import random
import subprocess
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from diffsr_core.batching import Exchange
from pipelines import assets, kinds
from pipelines.assets import UpscaleWorker
from tests.core.tiny import ANCHORED
from tests.hostile import png_of
from tests.jobs.conftest import Ran, script, tree
from tests.jobs.tiny import NIGHT, SAMPLING, model_folder, outcomes, receipts, waves, write_png

RECIPE = ("--samples", 2, "--window", 32, "--margin", 4)
SIZES = ((1, 1), (5, 30), (34, 9), (16, 16), (17, 20), (36, 20), (24, 24))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    for index, (height, width) in enumerate(SIZES):
        write_png(folder / f"{index % 3}" / f"{index}.png", waves(height, width, phase=index))
    write_png(folder / "grey.png", waves(21, 13, channels=1))
    write_png(folder / "alpha.png", waves(13, 21, channels=4))
    Image.fromarray(waves(19, 19, phase=0.5)).save(folder / "photo.jpg", quality=90)
    if find_spec("rasterio") is not None:
        ramp = np.arange(14 * 18, dtype=">u2").reshape(14, 18) * 200
        rows = b"".join(b"\0" + row.tobytes() for row in ramp)
        (folder / "deep.png").write_bytes(png_of(18, 14, bits=16, colour=0, rows=rows))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"), ANCHORED)


@pytest.fixture
def night(source: Path, model: Path, call: Callable[..., Ran]) -> Callable[..., Ran]:
    """Run the recipe of this file into an output, with further flags."""
    flags = ["--source", source, "--model", model, *NIGHT, *RECIPE]
    return lambda output, *further: call("upscale", *flags, "--output", output, *further)


@pytest.fixture(scope="module")
def clean(source: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one image after the other leaves."""
    from pipelines.cli import run_job

    output = tmp_path_factory.mktemp("clean") / "out"
    words = ["--source", source, "--model", model, *NIGHT, *RECIPE, "--output", output, "--unit-megabytes", 0.001]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assets, "BESIDE", 0)
        assert run_job("upscale", list(map(str, [*words, "--batch-size", 1]))) == 0
    left = tree(output)
    pictures = [path for path in source.rglob("*") if path.is_file()]
    assert len(left) == 3 * len(pictures) and all(row["status"] == "done" for row in receipts(output).values())
    return left


@pytest.mark.parametrize(("batch_size", "unit_megabytes"), [(1, 32), (4, 0.05), (16, 32)])
def test_the_bytes_do_not_depend_on_images_in_flight_or_units(
    clean: dict[str, bytes], tmp_path: Path, night: Callable[..., Ran], batch_size: int, unit_megabytes: float
) -> None:
    done = night(tmp_path / "out", "--batch-size", batch_size, "--unit-megabytes", unit_megabytes)
    assert done.code == 0, done.stderr
    assert tree(tmp_path / "out") == clean


def test_the_bytes_do_not_depend_on_the_order_inside_a_unit_or_on_who_waits(
    clean: dict[str, bytes], tmp_path: Path, night: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    once, sleeper = UpscaleWorker.__call__, random.Random(1)

    def shuffled(self: UpscaleWorker, rows: list[dict[str, Any]], enter: Any) -> Any:
        return once(self, sleeper.sample(rows, len(rows)), enter)

    def draw(*words: Any, **named: Any) -> Any:
        time.sleep(sleeper.random() / 50)
        return drawn(*words, **named)

    def shared(self: Exchange, name: str, batch: list[Any]) -> None:
        images.append(len({request.asked.member for request in batch}))
        call_network(self, name, batch)

    drawn, call_network, images = kinds.draw, Exchange._run, list[int]()
    monkeypatch.setattr(UpscaleWorker, "__call__", shuffled)
    monkeypatch.setattr(assets, "draw", draw)
    monkeypatch.setattr(Exchange, "_run", shared)
    assert night(tmp_path / "out", "--batch-size", 5).code == 0
    assert tree(tmp_path / "out") == clean
    assert {1, 2} <= set(images)  # calls of one image, and calls that several share


def test_the_bytes_do_not_depend_on_threads_or_the_generators_of_the_process(
    clean: dict[str, bytes], tmp_path: Path, night: Callable[..., Ran]
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(99)
    try:
        assert night(tmp_path / "out").code == 0
    finally:
        torch.set_num_threads(before)
    assert tree(tmp_path / "out") == clean


def test_several_short_nights_leave_the_bytes_of_one(
    clean: dict[str, bytes], tmp_path: Path, night: Callable[..., Ran]
) -> None:
    output, done = tmp_path / "out", list[int]()
    while not done or done[-1]:
        assert len(done) < 9
        done.append(night(output, "--limit", 5).summary["done"])
    assert (sum(done), max(done)) == (len(receipts(output)), 5)
    assert tree(output) == clean


def test_what_was_lost_or_altered_is_made_again_as_it_was(
    clean: dict[str, bytes], tmp_path: Path, night: Callable[..., Ran], call: Callable[..., Ran]
) -> None:
    output = tmp_path / "out"
    assert night(output).code == 0
    (output / "0" / "0.png").unlink()
    (output / "grey.png.uncertainty.png").unlink()
    (output / "alpha.png.json").unlink()
    (output / "photo.jpg").write_bytes(b"altered")
    assert tree(output) != clean
    found = call("upscale", "verify", "--output", output)
    assert (found.code, found.summary["dead"]) == (1, 4)
    again = night(output, "--batch-size", 16)
    assert (again.code, again.summary["inputs"], again.summary["done"]) == (0, 4, 4), again.stderr
    assert tree(output) == clean
    assert call("upscale", "verify", "--output", output).code == 0


def test_an_image_tried_again_after_its_unit_failed_has_the_bytes_of_a_clean_run(
    clean: dict[str, bytes], tmp_path: Path, night: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        calls = iter(range(100))

        def failing(*words: Any, **named: Any) -> Any:
            if next(calls) == 6:
                raise SystemExit("the process is told to go")
            return drawn(*words, **named)

        drawn = kinds.draw
        patch.setattr(assets, "draw", failing)
        with pytest.raises(SystemExit):
            night(output, "--unit-megabytes", 0.05)
    assert 0 < len(tree(output)) < len(clean)
    assert night(output, "--unit-megabytes", 0.05).code == 0
    assert tree(output) == clean
    assert {status for status, _ in outcomes(output).values()} == {"done"}


@pytest.mark.ray
def test_four_workers_on_ray_one_of_which_is_killed_leave_the_bytes_of_a_plain_loop(
    clean: dict[str, bytes], source: Path, model: Path, tmp_path: Path
) -> None:
    output, log = tmp_path / "out", tmp_path / "log"
    flags = ["--source", source, "--output", output, "--model", model, "--no-track", *SAMPLING, *RECIPE]
    command = script("upscale", *flags, "--num-workers", 4, "--batch-size", 3, "--unit-megabytes", 0.02)
    with log.open("w") as errors:
        # A session of its own: Ray kills the process group of a worker that died.
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, start_new_session=True)
        deadline = time.monotonic() + 100
        while not any(output.glob("*/*.png")):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.005)
        workers(process.pid)[0].kill()
        out, _ = process.communicate(timeout=100)
    assert process.returncode == 0, log.read_text()
    summary = json.loads(out.splitlines()[-1])
    assert (summary["done"], summary["dead"]) == (len(clean) // 3, 0)
    assert tree(output) == clean
    assert {row["status"] for row in receipts(output).values()} == {"done"}


def workers(driver: int) -> list[psutil.Process]:
    """Return the processes of Ray's actors below a driver."""
    below = psutil.Process(driver).children(recursive=True)
    return [child for child in below if "MapWorker" in " ".join(child.cmdline())]


def test_nothing_in_the_outputs_tells_when_or_by_which_run_they_were_made(clean: dict[str, bytes]) -> None:
    for name, data in clean.items():
        assert b"upscale-2" not in data and b"diffsr-" not in data, name  # a run id, a temporary folder
        if name.endswith(".json"):
            document = json.loads(data)
            assert set(document) == {
                "source", "output", "model", "recipe", "fingerprint", "method", "quality", "metrics",
                "digital_source_type", "synthetic", "notes",
            }  # fmt: skip
            names = {*document["metrics"]}
            assert names == {"lr_psnr", "colour_drift", "uncertainty", "megapixels", "source_megapixels"}

"""The laws of the importer's command: a released file becomes a model folder that serves, or an error that says why."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffsr_core.checkpoint import load_model
from tests.jobs.conftest import Ran, tree
from tests.jobs.tiny import SAMPLING, waves, write_png

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
SR3, SRDIFF = "sr3_unofficial_tiny", "srdiff_tiny_df2k_x4"


def golden(name: str) -> dict[str, torch.Tensor]:
    if not (GOLDEN / f"{name}.weights.safetensors").is_file():
        pytest.skip("the golden tensors of the reference implementations lie beside the checkout, not in it: none here")
    return load_file(GOLDEN / f"{name}.weights.safetensors")


@pytest.fixture
def released(tmp_path: Path) -> Callable[[str], Path]:
    """Write golden weights as their authors release such files: SR3's plain, SRDiff's nested beside other things."""

    def write(name: str) -> Path:
        weights: dict[str, Any] = {**golden(name), "betas": torch.zeros(3)}
        content = weights if name == SR3 else {"global_step": 7, "state_dict": {"model": weights}}
        torch.save(content, tmp_path / f"{name}.pth")
        return tmp_path / f"{name}.pth"

    return write


@pytest.mark.parametrize(
    ("name", "flags", "scale", "told"),
    [(SR3, ["--scale", 4, "--num-groups", 8], 4, "amplitude"), (SRDIFF, [], 4, "step")],
)
def test_a_released_file_becomes_a_folder_that_upscales_with_the_same_weights(
    name: str,
    flags: list[object],
    scale: int,
    told: str,
    released: Callable[[str], Path],
    tmp_path: Path,
    call: Callable[..., Ran],
) -> None:
    model = tmp_path / "model"
    done = call("import_weights", "--weights", released(name), "--output", model, *flags)
    assert (done.code, done.summary["job"], done.summary["outputs"]) == (0, "import", [str(model)]), done.stderr
    assert set(tree(model)) == {"README.md", "config.json", "model.safetensors", "ema.safetensors"}
    network, document = load_model(model)
    assert (network.config.scale, network.config.told, document["preset"]) == (scale, told, name)
    ours = sorted(float(value.double().sum()) for value in network.state_dict().values())
    assert ours == pytest.approx(sorted(float(value.double().sum()) for value in golden(name).values()), abs=1e-9)
    card = (model / "README.md").read_text()
    assert f"{name}.pth" in card and f"x{scale}" in card and "Licence" in card
    low = waves(9, 7)
    write_png(tmp_path / "in" / "a.png", low)
    places = ["--source", tmp_path / "in", "--output", tmp_path / "up", "--model", model, "--engine", "local"]
    done = call("upscale", *places, "--sampler", "sr3", *SAMPLING)
    assert (done.code, done.summary["done"], done.summary["dead"]) == (0, 1, 0), done.stderr
    assert np.asarray(Image.open(tmp_path / "up" / "a.png")).shape == (9 * scale, 7 * scale, 3)
    assert done.summary["metrics"]["lr_psnr_mean"] > 30


def test_an_import_again_gives_the_same_bytes_and_never_overwrites(
    released: Callable[[str], Path], tmp_path: Path, call: Callable[..., Ran]
) -> None:
    path = released(SRDIFF)
    for name in ("a", "b"):
        assert call("import_weights", "--weights", path, "--output", tmp_path / name).code == 0
    before = tree(tmp_path / "a")
    assert before == tree(tmp_path / "b")
    refused = call("import_weights", "--weights", path, "--output", tmp_path / "a")
    assert refused.code == 1 and "must not hold a model yet; choose another --output" in refused.stderr
    assert tree(tmp_path / "a") == before


@pytest.mark.parametrize(
    ("name", "flags", "pieces"),
    [
        (SR3, ["--num-groups", 8], ["scale must be given", "use 8 or 4"]),
        (SR3, ["--scale", 4], ["num_groups must be given", "norm_groups"]),
        (SR3, ["--scale", 4, "--num-groups", 5], ["num_groups (5)"]),
        (SRDIFF, ["--num-groups", 8], ["num_groups (8) is of SR3's networks", "have no groups; leave it out"]),
        (SRDIFF, ["--scale", 8], ["scale (8) must be that of the file, 4; leave it out"]),
    ],
)
def test_what_the_file_does_not_tell_must_be_given_and_what_it_tells_must_be_right(
    name: str,
    flags: list[object],
    pieces: list[str],
    released: Callable[[str], Path],
    tmp_path: Path,
    call: Callable[..., Ran],
) -> None:
    failed = call("import_weights", "--weights", released(name), "--output", tmp_path / "model", *flags)
    assert (failed.code, failed.summary["status"]) == (1, "failed") and "Traceback" not in failed.stderr
    assert all(piece in failed.stderr for piece in pieces), failed.stderr
    assert not (tmp_path / "model").exists()


class Hostile:
    """A pickle of this writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_a_hostile_pickle_is_refused_and_not_run(tmp_path: Path, call: Callable[..., Ran]) -> None:
    marker, path = tmp_path / "owned", tmp_path / "I640000_E37_gen.pth"
    torch.save({"denoise_fn.downs.0.weight": torch.zeros(1), "betas": Hostile(marker)}, path)
    failed = call("import_weights", "--weights", path, "--output", tmp_path / "model", "--scale", 8)
    assert failed.code == 1 and "code that comes with weights is never run" in failed.stderr
    assert not marker.exists() and not (tmp_path / "model").exists()
    torch.load(path, weights_only=False)  # the proof that the file is hostile
    assert marker.exists()


@pytest.mark.parametrize(
    ("content", "pieces"),
    [
        (None, ["No such file"]),
        ("a folder", ["directory"]),
        (b"<html>quota exceeded</html>", ["cannot be read as plain tensors", "safetensors"]),
        ({"epoch": 3}, ["must be tensors only", "epoch (int)"]),
        ({"conv.weight": torch.zeros(1)}, ["denoise_fn.downs.0.weight"]),
    ],
)
def test_what_is_no_released_file_is_one_line_without_a_traceback(
    content: Any, pieces: list[str], tmp_path: Path, call: Callable[..., Ran]
) -> None:
    path = tmp_path / "weights.pth"
    if content == "a folder":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    failed = call("import_weights", "--weights", path, "--output", tmp_path / "model")
    assert (failed.code, failed.summary["outputs"]) == (1, []) and "Traceback" not in failed.stderr
    assert all(piece in failed.stderr for piece in pieces) and failed.stderr.count("\n") == 1, failed.stderr
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("flag", ["--scale", "--num-groups"])
def test_a_number_below_one_is_a_bad_argument(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    from pipelines.cli import run_job

    with pytest.raises(SystemExit) as stop:
        run_job("import_weights", ["--weights", "a", "--output", "b", flag, "0"])
    name = flag.removeprefix("--").replace("-", "_")
    assert stop.value.code == 2 and f"{name} (0) must be at least 1" in capsys.readouterr().err


def test_the_models_config_says_what_the_network_was_told(
    released: Callable[[str], Path], tmp_path: Path, call: Callable[..., Ran]
) -> None:
    assert call("import_weights", "--weights", released(SRDIFF), "--output", tmp_path / "model").code == 0
    model = json.loads((tmp_path / "model" / "config.json").read_text())["model"]
    assert model["anchor_gain"] == 255 / 256 and model["residual_scale"] == 2.0 and model["residual_clip"] is True
    assert model["schedule"]["num_timesteps"] == 100 and model["schedule"]["name"] == "cosine"

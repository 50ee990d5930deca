"""The laws of promotion: the alias moves on evidence only."""

import json
from collections.abc import Callable
from pathlib import Path

import mlflow
import numpy as np
import pytest

from diffsr_core import checkpoint
from pipelines import tracking
from tests.jobs.conftest import Ran, photograph, png

FLAGS = ["--steps", "2", "--engine", "local"]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for name in ("astronaut.png", "chelsea.png"):
        (folder / name).write_bytes(png(photograph(name, 64)))
    return folder


def register(name: str, trained: Path, *, damage: float = 0.0) -> int:
    """Register a copy of the trained model, its regression worsened by noise on its last layer."""
    model, document = checkpoint.load_model(trained / "model")
    state = model.state_dict()
    noise = np.random.default_rng(0).standard_normal(state["encoder.conv_last.bias"].shape)
    state["encoder.conv_last.bias"] += damage * state["encoder.conv_last.bias"].new_tensor(noise)
    files = checkpoint.model_files(model.config, state, state, preset=document["preset"], card="a test's model")
    tracking.connect()
    with tracking.run(f"register {name}"):
        _, version = tracking.log_model(files, example=png(photograph("coffee.png", 16)), register=name)
    assert version is not None
    return version


def alias(name: str, which: str = "champion") -> int | None:
    return tracking.alias_version(mlflow.MlflowClient(), name, which)


def test_first_promotion_then_refusal_then_a_better_one_then_rollback(
    trained: Path, photographs: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    name = "gate"
    flags = ["--model", name, "--dataset", photographs, "--output", tmp_path / "out", *FLAGS]
    good = register(name, trained)
    # Six steps of training are no model: it may lose to bicubic by a little, and the law here is the gate's.
    lenient = ["--min-gain", "-3", "--ssim-margin", "0.2", "--max-latency-ratio", "100"]
    first = call("promote", *flags, *lenient, "--challenger", good)
    assert (first.code, alias(name)) == (0, good), first.stderr

    again = call("promote", *flags, *lenient, "--challenger", good)
    assert (again.code, again.summary["unchanged"]) == (0, 1)

    worse = register(name, trained, damage=0.5)
    refused = call("promote", *flags, "--challenger", worse, "--max-latency-ratio", "100")
    assert (refused.code, refused.summary["status"], alias(name)) == (4, "refused", good)
    assert "FAILS  psnr_y improves" in refused.stderr
    verdict = json.loads((tmp_path / "out" / f"{name}-v{worse}.json").read_text())
    assert verdict["promoted"] is False and verdict["champion"] == good

    moved = call("promote", *flags, *lenient, "--min-gain", "-100", "--ssim-margin", "2", "--lr-psnr-floor", "1")
    assert (moved.code, alias(name), alias(name, "previous_champion")) == (0, worse, good)

    back = call("promote", "--model", name, "--rollback")
    assert (back.code, alias(name), alias(name, "previous_champion")) == (0, good, worse)


def test_a_model_that_loses_to_bicubic_is_no_first_champion(
    trained: Path, photographs: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    register("hopeless", trained, damage=2.0)
    flags = ["--model", "hopeless", "--dataset", photographs, "--output", tmp_path / "out", *FLAGS]
    refused = call("promote", *flags)
    assert (refused.code, alias("hopeless")) == (4, None)


def test_the_champion_that_moved_meanwhile_is_not_overwritten(trained: Path) -> None:
    version = register("moving", trained)
    client = tracking.connect()
    tracking.move_champion(client, "moving", version, expected=None, evidence="first")
    with pytest.raises(ValueError, match="must still be the one"):
        tracking.move_champion(client, "moving", version, expected=None, evidence="second, which read no champion")


def test_nothing_to_roll_back_to_and_no_such_model_are_said(call: Callable[..., Ran], photographs: Path) -> None:
    assert "previous champion" in call("promote", "--model", "nobody", "--rollback").stderr
    missing = call("promote", "--model", "nobody", "--dataset", photographs, *FLAGS)
    assert missing.code == 1 and "registered version" in missing.stderr

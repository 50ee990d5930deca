"""The laws of promotion: the alias moves on evidence only."""

import json
from collections.abc import Callable
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow.exceptions import MlflowException

from diffsr_core import checkpoint
from diffsr_core.family import ModelConfig, SuperResolver
from diffsr_core.networks.rrdb import RRDBConfig
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
        uri = tracking.log_model(files, example=png(photograph("coffee.png", 16)))
    return tracking.register_model(uri, name)


def test_a_challenger_of_another_scale_is_refused_before_any_work(
    trained: Path, photographs: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    name, out = "scales", tmp_path / "out"
    champion = register(name, trained)
    mlflow.MlflowClient().set_registered_model_alias(name, "champion", str(champion))
    model = SuperResolver(ModelConfig(encoder=RRDBConfig(scale=2, num_features=4, num_blocks=2), anchor="regression"))
    weights = model.state_dict()
    files = checkpoint.model_files(model.config, weights, weights, preset="x2", card="a test's model")
    with tracking.run("x2"):
        uri = tracking.log_model(files, example=png(photograph("coffee.png", 16)))
    tracking.register_model(uri, name)
    failed = call("promote", "--model", name, "--dataset", photographs, "--output", out, *FLAGS)
    assert failed.code == 1 and "challenger (x2) must be of the champion's scale (x4)" in failed.stderr
    assert alias(name) == champion and not out.exists()


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
    assert (back.code, alias(name), alias(name, "previous_champion")) == (0, good, None)

    twice = call("promote", "--model", name, "--rollback")
    assert (twice.code, alias(name)) == (1, good) and "previous champion" in twice.stderr
    anything = [*lenient, "--min-gain", "-100", "--ssim-margin", "2", "--lr-psnr-floor", "1"]
    newest = call("promote", *flags, *anything)
    assert (newest.summary["unchanged"], alias(name)) == (1, good) and f"v{worse} was rolled back" in newest.stderr
    named = call("promote", *flags, *anything, "--challenger", worse)
    assert (named.code, alias(name), alias(name, "previous_champion")) == (0, worse, good)
    assert tracking.ROLLED_BACK not in mlflow.MlflowClient().get_model_version(name, str(worse)).tags


class Killed(Exception):
    pass


@pytest.fixture
def versions() -> Callable[[str, int], tuple[mlflow.MlflowClient, list[int]]]:
    """Make a registered model with empty versions."""

    def make(name: str, number: int) -> tuple[mlflow.MlflowClient, list[int]]:
        client = tracking.connect()
        client.create_registered_model(name)
        return client, [int(client.create_model_version(name, "file:///nothing").version) for _ in range(number)]

    return make


WRITES = ("set_model_version_tag", "set_registered_model_alias", "delete_registered_model_alias")


def killed_after(client: mlflow.MlflowClient, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this many writes to the registry through, and no more."""
    left = [number]

    def limited(write: Callable[..., object]) -> Callable[..., object]:
        def call(*words: object) -> object:
            if not left[0]:
                raise Killed
            left[0] -= 1
            return write(*words)

        return call

    for name in WRITES:
        monkeypatch.setattr(client, name, limited(getattr(client, name)))


@pytest.mark.parametrize("writes", range(4))
def test_a_promotion_killed_between_its_writes_goes_through_when_repeated(
    writes: int, versions: Callable, monkeypatch: pytest.MonkeyPatch, call: Callable[..., Ran]
) -> None:
    name = f"killed-promotion-{writes}"
    client, (first, second, third) = versions(name, 3)
    tracking.move_champion(client, name, first, expected=None, evidence="one")
    tracking.move_champion(client, name, second, expected=first, evidence="two")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(client, writes, patch)
        tracking.move_champion(client, name, third, expected=second, evidence="three")
    assert alias(name) == second  # the alias moves last, with its evidence
    if alias(name, "previous_champion") == second:
        refused = call("promote", "--model", name, "--rollback")
        assert (refused.code, alias(name)) == (1, second) and "cut short" in refused.stderr
    tracking.move_champion(client, name, third, expected=second, evidence="three")
    assert (alias(name), alias(name, "previous_champion")) == (third, second)


@pytest.mark.parametrize("writes", range(3))
def test_a_rollback_killed_between_its_writes_never_brings_the_bad_version_back(
    writes: int, versions: Callable, monkeypatch: pytest.MonkeyPatch, call: Callable[..., Ran]
) -> None:
    name = f"killed-rollback-{writes}"
    client, (good, bad) = versions(name, 2)
    tracking.move_champion(client, name, good, expected=None, evidence="one")
    tracking.move_champion(client, name, bad, expected=good, evidence="two")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(client, writes, patch)
        tracking.restore_champion(client, name, good, expected=bad)
    for _ in range(2):
        call("promote", "--model", name, "--rollback")
    assert alias(name) == good and tracking.newest_version(client, name) == good
    assert client.get_model_version(name, str(good)).tags["diffsr.evidence"] == "one"


def test_when_every_version_was_rolled_back_one_must_be_named(versions: Callable) -> None:
    client, (only,) = versions("rolled", 1)
    client.set_model_version_tag("rolled", str(only), tracking.ROLLED_BACK, "to v0")
    with pytest.raises(ValueError, match="--challenger"):
        tracking.newest_version(client, "rolled")


def test_a_registry_that_fails_is_not_read_as_no_champion(monkeypatch: pytest.MonkeyPatch) -> None:
    client = tracking.connect()
    assert tracking.alias_version(client, "no such model", "champion") is None

    def fails(name: str) -> None:
        raise MlflowException("the server is away")

    monkeypatch.setattr(client, "get_registered_model", fails)
    with pytest.raises(MlflowException, match="is away"):
        tracking.alias_version(client, "gate", "champion")


def test_a_job_of_a_cluster_needs_a_store_that_outlives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    tracking.connect()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(ValueError, match=r"MLFLOW_TRACKING_URI \(not set\).*RAY_ADDRESS"):
        tracking.connect()


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

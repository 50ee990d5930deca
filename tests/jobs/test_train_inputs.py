"""Bad input of a training: refused with name, value, rule and remedy, and not in the way of what is put right."""

import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from diffsr_core import presets
from diffsr_core.family import ModelConfig
from diffsr_core.recipe import StageRecipe, TrainingRecipe
from pipelines import loop
from pipelines.cli import run_job
from pipelines.manifest import Manifest
from pipelines.storage import digest_bytes
from tests.core.tiny import MODELS
from tests.jobs.conftest import Ran
from tests.jobs.tiny import model_folder
from tests.pipelines.tiny_sets import RECIPE, SIDE, make_row, manifest_of, noise, write_shard

Rows = list[dict[str, Any]]
Call = Callable[..., Ran]


@pytest.fixture(autouse=True)
def small_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Presets that train in a second: `small`, a diffusion, and `small-two`, which has an encoder's stage."""

    def preset(model: ModelConfig, *stages: StageRecipe) -> presets.Preset:
        recipe = TrainingRecipe(stages=stages, batch_size=4, ema_half_lives_images=(8,), augmentation="none")
        return presets.Preset(model=model, recipe=recipe, patch=SIDE, params=1, regression=stages[0], note="tiny")

    regression, diffusion = (StageRecipe(name="regression", num_steps=1, learning_rate=1e-3),
                             StageRecipe(name="diffusion", num_steps=3, learning_rate=1e-3))  # fmt: skip
    monkeypatch.setitem(presets.PRESETS, "small", preset(MODELS["sr3"], diffusion))
    monkeypatch.setitem(presets.PRESETS, "small-two", preset(MODELS["anchored"], regression, diffusion))


def rows_of(train: int = 12, val: int = 2) -> Rows:
    splits = ["train"] * train + ["val"] * val
    return [make_row(f"{number}.png", split=split) for number, split in enumerate(splits)]


def commit(root: Path, manifest: Manifest) -> Path:
    """Write the manifest of a set, as its newest and under its digest."""
    (root / "manifests").mkdir(parents=True, exist_ok=True)
    for place in (root / "manifest.json", root / "manifests" / f"{manifest.digest}.json"):
        place.write_bytes(manifest.to_bytes())
    return root


def pair_set(root: Path, rows: Rows, **recipe: Any) -> Path:
    """Write a committed set of one shard."""
    made = {**RECIPE, "patch": SIDE, "lr_source": False, "codec": "webp", **recipe}
    return commit(root, manifest_of(write_shard(root, "a", rows), recipe=made))


def words(pairs: Path, output: Path, *more: object) -> list[object]:
    places = ["--pairs", pairs, "--output", output, "--preset", "small", "--engine", "local"]
    return [*places, "--checkpoint-every", 9, "--val-pairs", 1, "--sampling-steps", 1, *more]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set that can be trained on: 12 pairs of train, 2 of val."""
    return pair_set(tmp_path_factory.mktemp("good"), rows_of())


def refused(ran: Ran, message: str, output: Path) -> None:
    """Fail unless the job said this on one line and has not begun anything."""
    assert ran.code == 1 and ran.summary["status"] == "failed", ran.stderr
    error = ran.stderr.rpartition("train: error: ")[2]
    assert re.search(message, error), error
    assert "Traceback" not in ran.stderr and error.count("\n") == 1
    assert not (output / "checkpoints").exists() and not (output / "model").exists()


def without_a_column(root: Path) -> Path:
    shard = write_shard(root, "a", rows_of())
    pq.write_table(pq.read_table(root / shard.name).drop_columns(["lr_w"]), root / shard.name)
    data = (root / shard.name).read_bytes()
    changed = replace(shard, bytes=len(data), sha256=digest_bytes(data))
    return commit(root, manifest_of(changed, recipe={**RECIPE, "patch": SIDE, "lr_source": False}))


def with_other_scale(root: Path) -> Path:
    return pair_set(root, [{**row, "scale": 2} if row["source_key"] == "3.png" else row for row in rows_of()])


def with_other_channels(root: Path) -> Path:
    return pair_set(root, [*rows_of(), make_row("bands.png", hr=noise(7, channels=4))])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (without_a_column, r"shard \(data/a.parquet\) must have the columns .* lacks lr_w: make the set again"),
        (with_other_scale, r"must have scale 4; of 14 rows 1 have scale 2: make the set again"),
        (with_other_channels, r"must have 3 channels or 1 channel; of 15 rows 1 have 4 channels: make them with other"),
        (lambda root: pair_set(root, rows_of(), scale=2), r"pairs scale \(2\) must be that of small \(4\); make other"),
        (lambda root: pair_set(root, rows_of(train=0)), r"split \(train\) of .* it holds none, val 2 and test 0: add"),
        (lambda root: pair_set(root, rows_of(train=3)), r"split train \(3\) must be at least the batch \(4\); add"),
        (lambda root: root, r"pairs \(.*\) must hold a manifest.json; make the set with make_pairs.py first"),
    ],
)
def test_pairs_that_cannot_be_trained_on_are_refused(
    make: Callable[[Path], Path], message: str, tmp_path: Path, call: Call
) -> None:
    refused(call("train", *words(make(tmp_path / "set"), tmp_path / "run")), message, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--crop", 32], r"crop \(32\) must be at most the patch of the pairs \(16\); use 16"),
        (["--crop", 6], r"crop \(6\) must be a multiple of 4, 4 at least, for small; use 16"),
        (["--batch-size", 13], r"pairs in split train \(12\) must be at least the batch \(13\); add sources"),
        (
            ["--lpips", "nowhere"],
            r"LPIPS needs .*nowhere/.*\.pth, which is not there; nothing is downloaded: fetch https://",
        ),
        (["--sampling-steps", 201], r"steps \(201\) must be .*200"),
        (["--init", "nowhere"], r"model \(.*nowhere\) must be a folder with config.json; give one"),
        (["--teacher", "nowhere"], r"model \(.*nowhere\) must be a folder with config.json; give one"),
        (["--teacher", "twin"], r"teacher \(.*twin\) must .*denoiser"),
        (["--teacher", "two"], r"teacher \(.*two\) must have the network of --preset small; give the one that it was"),
        (["--teacher", "small", "--teacher-steps", 201], r"steps \(201\) must be .*200"),
        (["--init", "two"], r"init \(.*two\) must have the network of --preset small; give the one that it was"),
    ],
)
def test_settings_that_the_pairs_or_the_models_do_not_allow_are_refused(
    flags: list[object], message: str, good: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, config in (("twin", replace(MODELS["sr3"], denoiser=None)), ("two", MODELS["anchored"]),
                         ("small", MODELS["sr3"])):  # fmt: skip
        if name in flags:
            model_folder(tmp_path / name, config)
    monkeypatch.chdir(tmp_path)
    refused(call("train", *words(good, tmp_path / "run", *flags)), message, tmp_path / "run")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", 0], r"steps \(0\) must be at least 1, or 0 to validate the model of --init; use 1 or more"),
        (["--max-corrupt-share", 1.5], r"max_corrupt_share \(1.5\) must be from 0 to 1; use 0 to stop at the first"),
        (["--teacher-steps", 8], r"teacher_steps \(8\) is of a distillation; give --teacher, or leave it out"),
        (["--teacher", "a", "--init", "b"], r"init \('b'\) has no meaning beside --teacher"),
        (["--teacher", "a", "--preset", "small-regression"], r"teacher \('a'\) is of diffusion presets; small-regr"),
        (["--teacher", "a", "--weighting", "min_snr"], r"weighting \('?min_snr'?\) .*"),
        (["--weighting", "min_snr", "--loss", "l1"], r"weighting \(min_snr\) is that of the squared error, not of l1"),
        (["--ema-half-lives", "8,8"], r"ema_half_lives_images \(8, 8\) must be different images, 1 or more each"),
        (["--gradient-clip", 0], r"gradient_clip \(0.0\) must be above 0 and finite"),
        (["--strategy", "fsdp2"], r"strategy \('fsdp2'\) needs workers to share the model among.*use --engine ray"),
        (["--sampler", "ddmi"], r"sampler \('?ddmi'?\) must be one of .*ddim"),
        (["--precision", "fp8"], r"precision"),
    ],
)
def test_settings_that_contradict_each_other_are_bad_arguments(
    flags: list[object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_job("train", [*map(str, words(tmp_path, tmp_path / "run", *flags))])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and re.search(message, said) and said.count("\n") == 1, said


def test_what_does_not_fit_in_memory_is_refused_with_remedies_that_then_work_in_the_same_output(
    good: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(loop, "available_memory", lambda use_gpu: (2**18, "this machine"))
        ran = call("train", *words(good, tmp_path / "run"))
    refused(ran, r"memory of a worker, .*parameters.*, must be at most the 0.00 GiB of this machine; use a smaller "
            r"--micro-batch, --checkpoint-activations", tmp_path / "run")  # fmt: skip
    done = call("train", *words(good, tmp_path / "run", "--micro-batch", 1))
    assert done.code == 0, done.stderr


def test_a_server_of_mlflow_that_is_down_is_an_error_within_seconds_and_the_same_command_works_when_it_is_up(
    good: Path, tmp_path: Path, call: Call
) -> None:
    began = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@127.0.0.1:9")
        ran = call("train", *words(good, tmp_path / "run"))
    assert time.monotonic() - began < 20
    refused(ran, r"MLFLOW_TRACKING_URI \(http://127.0.0.1:9\) must name an MLflow store that answers", tmp_path / "run")
    assert "secret" not in ran.stderr
    done = call("train", *words(good, tmp_path / "run"))
    assert done.code == 0, done.stderr


def with_damaged(rows: Rows, *numbers: int) -> Rows:
    """Return rows of which some have an LR with flipped bytes: the shard around them is whole."""

    def flipped(blob: bytes) -> bytes:
        return bytes(byte ^ 0xFF if place < 24 else byte for place, byte in enumerate(blob))

    return [{**row, "lr": flipped(row["lr"])} if number in numbers else row for number, row in enumerate(rows)]


def test_a_damaged_row_is_counted_named_and_replaced(tmp_path: Path, call: Call) -> None:
    pairs = pair_set(tmp_path / "set", with_damaged(rows_of(), 5))
    done = call("train", *words(pairs, tmp_path / "run", "--log-every", 1))  # 3 steps of 4: each row once
    assert (done.code, done.summary["done"]) == (0, 3), done.stderr
    assert done.summary["metrics"]["corrupt_rows"] == 1
    assert len(re.findall(r"shard \(data/a.parquet\) row 5: .*; another takes its place", done.stderr)) == 1


def test_more_damaged_rows_than_allowed_stop_it_with_the_numbers_and_it_goes_on_when_more_are_allowed(
    tmp_path: Path, call: Call
) -> None:
    pairs, output = pair_set(tmp_path / "set", with_damaged(rows_of(), 2, 5)), tmp_path / "run"
    ran = call("train", *words(pairs, output))
    refused(ran, r"damaged rows \(2 of 12 read\) must be at most 0.10%; make the set again, or raise --max", output)
    ran = call("train", *words(pairs, output, "--max-corrupt-share", 0, "--log-every", 1))
    refused(ran, r"damaged rows \([12] of \d+ read\) must be at most 0.00%", output)
    done = call("train", *words(pairs, output, "--max-corrupt-share", 0.2))
    assert (done.code, done.summary["metrics"]["corrupt_rows"]) == (0, 2), done.stderr


def test_another_init_may_follow_one_that_did_not_fit_in_the_same_output(
    good: Path, tmp_path: Path, call: Call
) -> None:
    wrong, right = model_folder(tmp_path / "wrong", MODELS["anchored"]), model_folder(tmp_path / "b", MODELS["sr3"])
    assert call("train", *words(good, tmp_path / "run", "--init", wrong)).code == 1
    done = call("train", *words(good, tmp_path / "run", "--init", right))
    assert done.code == 0, done.stderr

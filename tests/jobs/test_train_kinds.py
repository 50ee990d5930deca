"""The training job on other kinds of models and pairs: one channel, grey for colours, a blurred condition, scale 1."""

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from diffsr_core import checkpoint, presets
from diffsr_core.family import ModelConfig
from diffsr_core.recipe import StageRecipe, TrainingRecipe
from pipelines import session
from pipelines.checkpoints import save_checkpoint
from pipelines.ledger import Ledger
from pipelines.models import resolve
from pipelines.pairs import PairsConfig, make_pairs
from pipelines.training import TrainConfig
from tests.core.tiny import MODELS, SEED3
from tests.jobs.conftest import Ran, tree
from tests.jobs.test_train import weights
from tests.jobs.tiny import SAMPLING, waves, write_png


@pytest.fixture
def tiny_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Presets that train in a second: a tiny one of seed3's kind, one of two stages, one of scale 1."""

    def preset(model: ModelConfig, *stages: StageRecipe) -> presets.Preset:
        recipe = TrainingRecipe(stages=stages, batch_size=4, ema_half_lives_images=(8,), augmentation="none")
        return presets.Preset(model=model, recipe=recipe, patch=32, params=1, regression=regression, note="tiny")

    diffusion = StageRecipe(name="diffusion", num_steps=3, learning_rate=1e-3)
    regression = StageRecipe(name="regression", num_steps=2, learning_rate=1e-3)
    monkeypatch.setitem(presets.PRESETS, "tiny-grey", preset(SEED3, diffusion))
    monkeypatch.setitem(presets.PRESETS, "tiny-two", preset(MODELS["anchored"], regression, diffusion))
    monkeypatch.setitem(presets.PRESETS, "tiny-denoise", preset(MODELS["deblur"], regression, diffusion))


@pytest.fixture(scope="module")
def small_sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pair sets of 32 px: `grey` x4 bilinear, `colour` x4, `noisy` x1; and their sources."""
    folder = tmp_path_factory.mktemp("small")
    for index in range(8):
        write_png(folder / "in-grey" / f"{index}.png", waves(64, 64, channels=1, phase=index))
        write_png(folder / "in-colour" / f"{index}.png", waves(64, 64, phase=index))
    for name, source, scale, degradation in (
        ("grey", "in-grey", 4, "bilinear"), ("colour", "in-colour", 4, "bicubic"), ("noisy", "in-colour", 1, "noise"),
    ):  # fmt: skip
        make_pairs(PairsConfig(source=str(folder / source), output=str(folder / name), scale=scale, patch=32,
                               degradation=degradation, engine="local", val_share=0.5, test_share=0.0))  # fmt: skip
    return folder


def grey_flags(small_sets: Path, output: Path, *more: object) -> list[object]:
    flags = ["--pairs", small_sets / "grey", "--output", output, "--preset", "tiny-grey", "--engine", "local"]
    return [*flags, "--checkpoint-every", 2, "--log-every", 1, *more]


def test_a_model_of_one_channel_is_trained_resumed_scored_and_upscales_grey_only(
    small_sets: Path, tiny_presets: None, tmp_path: Path, call: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = call("train", *grey_flags(small_sets, tmp_path / "clean"))
    assert (clean.code, clean.summary["done"]) == (0, 3), clean.stderr
    assert {"loss", "val_psnr_bicubic", "val_psnr_sample"} <= set(clean.summary["metrics"])
    picture = Image.open(io.BytesIO((tmp_path / "clean" / "samples" / "step-00000003.png").read_bytes()))
    assert picture.mode == "L"

    def save_and_fail(*words: Any, **named: Any) -> None:
        save_checkpoint(*words, **named)
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(session, "save_checkpoint", save_and_fail)
        cut = call("train", *grey_flags(small_sets, tmp_path / "cut"))
    assert cut.code == 1 and "no space left" in cut.stderr
    resumed = call("train", *grey_flags(small_sets, tmp_path / "cut"))
    assert (resumed.code, resumed.summary["done"], resumed.summary["unchanged"]) == (0, 1, 2), resumed.stderr
    assert "continues at step 2" in resumed.stderr
    first, second = weights(tmp_path / "clean"), weights(tmp_path / "cut")
    assert first and all(np.array_equal(first[name], second[name]) for name in first)

    model = tmp_path / "clean" / "model"
    places = ["--model", model, "--dataset", small_sets / "grey", "--split", "val", "--output", tmp_path / "scores"]
    scored = call("evaluate", *places, "--engine", "local", *SAMPLING)
    assert scored.code == 0 and scored.summary["done"] > 0, scored.stderr
    assert np.isfinite(scored.summary["metrics"]["model_psnr"])

    write_png(tmp_path / "in" / "grey.png", waves(10, 9, channels=1))
    write_png(tmp_path / "in" / "colour.png", waves(10, 9))
    places = ["--source", tmp_path / "in", "--output", tmp_path / "up", "--model", model, "--engine", "local"]
    done = call("upscale", *places, *SAMPLING)
    assert (done.code, done.summary["done"], done.summary["dead"]) == (0, 1, 1), done.stderr
    assert set(tree(tmp_path / "up")) == {"grey.png", "grey.png.json"}
    rows = {row["key"]: row for row in Ledger(str(tmp_path / "up")).rows().to_pylist()}
    dead = rows["colour.png"]
    assert (dead["status"], dead["stage"], dead["reason"]) == ("dead", "upscale", "channels")
    assert "channels (3) must be 1" in dead["message"]


def test_the_twin_of_a_model_of_one_channel_trains_and_is_its_own_regression(
    small_sets: Path, tiny_presets: None, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    done = call("train", *grey_flags(small_sets, tmp_path / "twin", "--preset", "tiny-grey-regression"))
    assert (done.code, done.summary["done"]) == (0, 2), done.stderr
    assert resolve(str(tmp_path / "twin" / "model")).files
    assert checkpoint.load_model(tmp_path / "twin" / "model")[0].denoiser is None


def test_colour_pairs_for_a_model_of_one_channel_are_an_error_that_says_so(
    small_sets: Path, tiny_presets: None, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    flags = grey_flags(small_sets, tmp_path / "run", "--pairs", small_sets / "colour")
    failed = call("train", *flags)
    assert failed.code == 1 and "must have 1 channel; of" in failed.stderr
    assert "another preset than tiny-grey" in failed.stderr
    assert "Traceback" not in failed.stderr and not (tmp_path / "run" / "model").exists()


def test_grey_pairs_serve_a_model_of_three_channels(
    small_sets: Path, tiny_presets: None, tmp_path: Path, call: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = presets.PRESETS["tiny-grey"]
    monkeypatch.setitem(presets.PRESETS, "tiny-colour", replace(tiny, model=MODELS["sr3"]))
    done = call("train", *grey_flags(small_sets, tmp_path / "run", "--preset", "tiny-colour"))
    assert (done.code, done.summary["done"]) == (0, 3), done.stderr
    assert "pairs were made by bilinear, and tiny-colour enlarges its condition by bicubic" in done.stderr


@pytest.mark.parametrize(
    ("degradation", "preset", "said"),
    [
        ("bilinear", "tiny-grey", False),
        ("bicubic", "tiny-grey", True),
        ('{"name":"bicubic"}', "tiny-grey", True),
        ("noise", "tiny-grey", False),  # it degrades on purpose
        ("bilinear", "tiny-two", False),  # its encoder learns from the LR itself
    ],
)
def test_pairs_of_another_kernel_than_the_models_are_said_aloud(
    degradation: str, preset: str, said: bool, small_sets: Path, tiny_presets: None, tmp_path: Path,
    call: Callable[..., Ran],
) -> None:  # fmt: skip
    make_pairs(PairsConfig(source=str(small_sets / "in-grey"), output=str(tmp_path / "set"), scale=4, patch=32,
                           degradation=degradation, engine="local", val_share=0.0, test_share=0.0))  # fmt: skip
    flags = grey_flags(small_sets, tmp_path / "run", "--pairs", tmp_path / "set", "--preset", preset, "--dry-run")
    done = call("train", *flags)
    assert done.code == 0, done.stderr
    assert ("enlarges its condition by" in done.stderr) == said


def step_weights(output: Path, step: int) -> dict[str, bytes]:
    """The averaged weights of a checkpoint."""
    found = load_file(output / "checkpoints" / f"{step:08d}" / "ema.safetensors")
    return {name: value.tobytes() for name, value in found.items()}


def two_stages(small_sets: Path, output: Path, *more: object) -> list[object]:
    return grey_flags(small_sets, output, "--pairs", small_sets / "colour", "--preset", "tiny-two", "--keep", 9, *more)


def test_trained_jointly_the_encoder_moves_on_beside_the_denoiser_and_otherwise_it_stays(
    small_sets: Path, tiny_presets: None, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    for name, flags in (("frozen", []), ("joint", ["--joint"])):
        done = call("train", *two_stages(small_sets, tmp_path / name, "--steps", 4, *flags))
        assert (done.code, done.summary["done"]) == (0, 6), done.stderr
        assert f"2 steps of regression, then 4 steps of {'joint' if flags else 'diffusion'}" in done.stderr
        before, after = step_weights(tmp_path / name, 2), step_weights(tmp_path / name, 6)
        moved = {part: [key for key in before if key.startswith(part) and before[key] != after[key]]
                 for part in ("encoder.", "denoiser.")}  # fmt: skip
        assert len(moved["denoiser."]) > 20
        assert (len(moved["encoder."]) > 20) == bool(flags)
        assert flags or not moved["encoder."]
    assert step_weights(tmp_path / "frozen", 2) == step_weights(tmp_path / "joint", 2)
    refused = call("train", *two_stages(small_sets, tmp_path / "frozen", "--steps", 4, "--joint"))
    assert refused.code == 1 and "another --output" in refused.stderr


def test_jointly_from_the_first_step_there_is_one_stage(
    small_sets: Path, tiny_presets: None, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    done = call("train", *two_stages(small_sets, tmp_path / "run", "--joint", "--encoder-steps", 0))
    assert (done.code, done.summary["done"]) == (0, 3), done.stderr
    assert ": 3 steps of joint; batch" in done.stderr


@pytest.mark.parametrize(
    ("preset", "fields", "message"),
    [
        ("sr3-16-128", {"joint": True}, r"joint \(True\) needs an encoder and a denoiser.*sr3-16-128 has not; leave"),
        ("seed3-8-32", {"joint": True}, r"joint \(True\) needs an encoder.*seed3-8-32 has not; leave it out"),
        ("nano-x4-regression", {"joint": True}, r"joint \(True\) needs .*nano-x4-regression has not; leave it out"),
        ("sr3-16-128-regression", {"joint": True}, r"joint \(True\) needs .* has not; leave it out"),
        ("sr3-16-128", {"encoder_steps": 3}, r"encoder_steps \(3\) is of presets with an encoder stage.*leave it out"),
        ("seed3-8-32", {"encoder_steps": 0}, r"encoder_steps \(0\) is of presets with an encoder stage"),
        ("nano-x4-regression", {"encoder_steps": 3}, r"encoder_steps \(3\) is of presets with an encoder stage"),
        (
            "nano-x4",
            {"encoder_steps": 0},
            r"encoder_steps \(0\) would freeze a random encoder; use 1 or more, --joint, or --init",
        ),
        ("nano-x4", {"encoder_steps": -1, "joint": True}, r"encoder_steps \(-1\) must be at least 0"),
    ],
)
def test_stages_that_a_preset_has_not_are_refused(preset: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(pairs="p", output="o", preset=preset, **fields)


@pytest.mark.parametrize("preset", ["nano-x4", "srdiff-celeba-x8", "srdiff-df2k-x4"])
def test_every_preset_of_two_stages_trains_jointly(preset: str) -> None:
    stages = TrainConfig(pairs="p", output="o", preset=preset, joint=True).recipe().stages
    assert [stage.name for stage in stages] == ["regression", "joint"]
    usual = TrainConfig(pairs="p", output="o", preset=preset).recipe().stages
    assert [replace(stage, name=was.name) for stage, was in zip(stages, usual, strict=True)] == [*usual]


@pytest.mark.parametrize("preset", ["nano-x4", "anchored-x4", "seed3-8-32"])
def test_one_step_makes_the_diffusion_an_energy_stage_and_leaves_the_rest_of_the_preset(preset: str) -> None:
    usual = TrainConfig(pairs="p", output="o", preset=preset)
    config = TrainConfig(pairs="p", output="o", preset=preset, one_step=True, diversity=0.6)
    *first, last = config.recipe().stages
    assert (last.name, last.diversity) == ("energy", 0.6)
    assert (*first, replace(last, name="diffusion", diversity=1.0)) == usual.recipe().stages
    assert replace(config.recipe(), stages=usual.recipe().stages) == usual.recipe()
    start = 0.7 if usual.model().encoder.regresses else None
    assert config.model() == replace(usual.model(), one_step=True, start_level=start) and not usual.model().one_step
    assert config.validation() == replace(usual.validation(), num_steps=1)


def test_one_step_fits_a_preset_that_predicts_noise_by_another_prediction_and_may_follow_a_trained_model() -> None:
    config = TrainConfig(pairs="p", output="o", preset="sr3-16-128", one_step=True, prediction="x_0")
    assert config.model().prediction == "x_0"
    found = TrainConfig(pairs="p", output="o", one_step=True, init="a", encoder_steps=0, steps=7).recipe().stages
    assert [(stage.name, stage.num_steps, stage.diversity) for stage in found] == [("energy", 7, 1.0)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"diversity": 0.5}, r"diversity \(0.5\) is of --one-step; give that too"),
        ({"start_level": 0.5}, r"start_level \(0.5\) is of --one-step; give that too"),
        *(
            ({"one_step": True, "start_level": wrong}, r"start_level \(.*\) must be a level of the schedule; use 0.7")
            for wrong in (1.0, -0.1, 0.999999, float("nan"))
        ),
        (
            {"one_step": True, "start_level": 0.5, "preset": "sr3-16-128", "prediction": "x_0"},
            r"start_level \(0.5\) is of models of one step .* whose encoder regresses \(interpolation does not\)",
        ),
        ({"one_step": True, "diversity": 1.5}, r"diversity \(1.5\) must be from 0 to 1; use 1"),
        ({"one_step": True, "diversity": -0.1}, r"diversity \(-0.1\) must be from 0 to 1; use 1"),
        ({"one_step": True, "diversity": float("nan")}, r"diversity \(nan\) must be from 0 to 1; use 1"),
        ({"one_step": True, "preset": "nano-x4-regression"}, r"one_step \(True\) is of diffusion presets; nano-x4-reg"),
        (
            {"one_step": True, "preset": "sr3-16-128"},
            r"prediction \('?eps'?\) must be v or x_0, .*use --prediction x_0",
        ),
        ({"one_step": True, "prediction": "eps"}, r"prediction \('?eps'?\) must be v or x_0"),
        ({"one_step": True, "joint": True}, r"joint \(True\) is another objective than --one-step; leave out one"),
        ({"one_step": True, "teacher": "t"}, r"teacher \('t'\) is another objective than --one-step"),
        ({"one_step": True, "loss": "l2"}, r"loss \('?l2'?\) is not the energy score's distance; leave it out"),
        ({"one_step": True, "weighting": "min_snr"}, r"weighting \('?min_snr'?\) is not of the energy score"),
        ({"one_step": True, "sampling_steps": 4}, r"sampling_steps \(4\) is of a validation that samples in several"),
        ({"one_step": True, "sampler": "ddpm"}, r"sampler \('ddpm'\) is of a validation that samples in several"),
        ({"one_step": True, "grid": "log_snr"}, r"grid \('log_snr'\) is of a validation that samples in several"),
        ({"optimizer": "sgd"}, r"optimizer \('sgd'\) must be one of adamw, adam, muon; use one of them"),
    ],
)
def test_what_one_step_or_an_optimizer_does_not_allow_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(pairs="p", output="o", **fields)


def test_an_optimizer_replaces_that_of_the_preset_and_nothing_else() -> None:
    for preset, own, other in (("nano-x4", "adamw", "muon"), ("anchored-x4", "muon", "adam")):
        usual = TrainConfig(pairs="p", output="o", preset=preset).recipe()
        found = TrainConfig(pairs="p", output="o", preset=preset, optimizer=other).recipe()  # type: ignore[arg-type]
        assert usual.optimizer == own and found == replace(usual, optimizer=other)


def test_a_model_that_draws_in_one_step_is_trained_by_muon_after_its_encoder_and_is_scored_in_one_step(
    small_sets: Path, tiny_presets: None, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    flags = ["--one-step", "--diversity", 0.5, "--start-level", 0.4, "--optimizer", "muon"]
    done = call("train", *two_stages(small_sets, tmp_path / "run", *flags))
    assert (done.code, done.summary["done"]) == (0, 5), done.stderr
    assert "2 steps of regression, then 3 steps of energy" in done.stderr
    assert {"loss", "val_loss", "val_psnr_sample"} <= set(done.summary["metrics"])
    assert "val_x0_error" not in done.summary["metrics"]
    before, after = step_weights(tmp_path / "run", 2), step_weights(tmp_path / "run", 5)
    moved = {name.split(".")[0] for name in before if before[name] != after[name]}
    assert moved == {"denoiser"}
    model = checkpoint.load_model(tmp_path / "run" / "model")[0]
    assert model.config == replace(MODELS["anchored"], one_step=True, start_level=0.4)
    again = call("train", *two_stages(small_sets, tmp_path / "run", *flags))
    assert (again.code, again.summary["done"]) == (0, 0), again.stderr
    for other in ([*flags, "--diversity", 0.6], [*flags, "--start-level", 0.5], [*flags, "--optimizer", "adam"]):
        refused = call("train", *two_stages(small_sets, tmp_path / "run", *other))
        assert refused.code == 1 and "another --output" in refused.stderr


def test_a_patch_below_the_smallest_window_of_the_model_is_refused(
    small_sets: Path, tiny_presets: None, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    for patch, code in ((8, 1), (16, 0)):  # 2 and 4 px of LR; the stride of the model is 2
        made = tmp_path / f"set-{patch}"
        make_pairs(PairsConfig(source=str(small_sets / "in-colour"), output=str(made), scale=4, patch=patch,
                               engine="local", val_share=0.0, test_share=0.0, max_per_image=2))  # fmt: skip
        ran = call("train", *two_stages(small_sets, tmp_path / f"run-{patch}", "--pairs", made, "--steps", 1))
        assert ran.code == code, ran.stderr
        assert code == 0 or "pairs patch (8) must be a multiple of 8, 16 at least, for tiny-two" in ran.stderr


def test_a_blur_of_the_condition_changes_what_is_learned_and_is_part_of_the_run(
    small_sets: Path, tiny_presets: None, tmp_path: Path, call: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    blurred = replace(presets.PRESETS["tiny-grey"].recipe, condition_blur_px=3.0)
    monkeypatch.setitem(presets.PRESETS, "tiny-blurred", replace(presets.PRESETS["tiny-grey"], recipe=blurred))
    learned = []
    for name, flags in (
        ("none", []),
        ("given", ["--condition-blur", 3.0]),
        ("preset's", ["--preset", "tiny-blurred"]),
        ("off", ["--preset", "tiny-blurred", "--condition-blur", 0.0]),
    ):
        done = call("train", *grey_flags(small_sets, tmp_path / name, *flags))
        assert done.code == 0, done.stderr
        learned.append({key: value.tobytes() for key, value in weights(tmp_path / name).items()})
    assert learned[0] == learned[3] != learned[1] == learned[2]
    other = call("train", *grey_flags(small_sets, tmp_path / "given", "--condition-blur", 2.0))
    assert other.code == 1 and "another --output" in other.stderr


@pytest.mark.parametrize("blur", ["-0.5", "10.5"])
def test_a_blur_out_of_range_is_a_bad_argument(blur: str, capsys: pytest.CaptureFixture[str]) -> None:
    from pipelines.cli import run_job

    with pytest.raises(SystemExit) as stop:
        run_job("train", ["--pairs", "a", "--output", "b", f"--condition-blur={blur}"])
    assert stop.value.code == 2 and f"condition_blur ({blur}) must be from 0 to 10; use 0" in capsys.readouterr().err


def test_pairs_of_scale_1_train_a_restoration_that_keeps_the_size_and_is_not_projected(
    small_sets: Path, tiny_presets: None, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    flags = ["--pairs", small_sets / "noisy", "--preset", "tiny-denoise", "--engine", "local", "--checkpoint-every", 5]
    done = call("train", *flags, "--output", tmp_path / "run")
    assert (done.code, done.summary["done"]) == (0, 5), done.stderr
    write_png(tmp_path / "in" / "a.png", waves(20, 17))
    places = ["--source", tmp_path / "in", "--output", tmp_path / "up", "--model", tmp_path / "run" / "model"]
    exact = call("upscale", *places, "--engine", "local", *SAMPLING, "--consistency", "exact")
    assert exact.code == 1 and "consistency (exact) must be off at scale 1" in exact.stderr
    assert "use off" in exact.stderr and not (tmp_path / "up").exists()
    done = call("upscale", *places, "--engine", "local", *SAMPLING)
    assert (done.code, done.summary["done"], done.summary["dead"]) == (0, 1, 0), done.stderr
    assert Image.open(tmp_path / "up" / "a.png").size == (17, 20)
    wrong = call("train", *flags, "--pairs", small_sets / "colour", "--output", tmp_path / "wrong")
    assert wrong.code == 1 and "pairs scale (4) must be that of tiny-denoise (1)" in wrong.stderr

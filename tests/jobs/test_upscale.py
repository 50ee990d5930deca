"""The laws of the upscale job: once each, mirrored, and work again only when content, recipe or model changed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.lease import Lease
from tests.core.tiny import ANCHORED, RRDB_TWIN
from tests.jobs.conftest import Ran, photograph, png, tree
from tests.jobs.tiny import NIGHT, model_folder, outcomes, waves, write_png


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"), ANCHORED)


@pytest.fixture(scope="module")
def outbox(inbox: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pipelines.cli import run_job

    output = tmp_path_factory.mktemp("outbox") / "out"
    words = ["--source", inbox, "--output", output, "--model", model, *NIGHT]
    assert run_job("upscale", list(map(str, words))) == 0
    return output


@pytest.fixture
def night(model: Path, call: Callable[..., Ran]) -> Callable[..., Ran]:
    """Run a night of this file's model: source, output, further flags."""
    flags = ["--model", model, *NIGHT]
    return lambda source, output, *further: call("upscale", "--source", source, "--output", output, *flags, *further)


def test_each_input_is_done_or_dead_with_a_reason(inbox: Path, outbox: Path) -> None:
    found = outcomes(outbox)
    assert set(found) == {str(path.relative_to(inbox)) for path in inbox.rglob("*") if path.is_file()}
    assert found.pop("rotten.png") == ("dead", "truncated")
    assert set(found.values()) == {("done", "")}


def test_the_output_mirrors_the_source_at_four_times_the_size(inbox: Path, outbox: Path) -> None:
    psnr = list[float]()
    for path in inbox.rglob("*.png"):
        if path.name != "rotten.png":
            before, after = Image.open(path), Image.open(outbox / path.relative_to(inbox))
            assert after.size == (before.size[0] * 4, before.size[1] * 4)
            assert after.mode == before.mode
            sidecar = json.loads(Path(f"{outbox / path.relative_to(inbox)}.json").read_text())
            assert sidecar["synthetic"] is True and sidecar["source"]["key"] == str(path.relative_to(inbox))
            psnr.append(sidecar["metrics"]["lr_psnr"])
    assert len(psnr) == 5 and min(psnr) >= 50 and sum(psnr) / len(psnr) >= 55  # law 4: these LR were made by D


def test_alpha_is_kept_and_grey_stays_grey(outbox: Path) -> None:
    alpha = np.asarray(Image.open(outbox / "alpha.png"))[:, :, 3]
    assert alpha[0, 0] < 20 and alpha[0, -1] > 210
    assert Image.open(outbox / "grey.png").mode == "L"


def test_a_rerun_is_free_and_changes_no_byte(inbox: Path, outbox: Path, night: Callable[..., Ran]) -> None:
    before, stamps = tree(outbox), {path: path.stat().st_mtime_ns for path in outbox.rglob("*.png")}
    again = night(inbox, outbox)
    assert (again.code, again.summary["inputs"], again.summary["unchanged"]) == (0, 0, 6)
    assert tree(outbox) == before
    assert {path: path.stat().st_mtime_ns for path in outbox.rglob("*.png")} == stamps


def test_a_new_a_changed_and_a_touched_source_are_told_apart(
    inbox: Path, outbox: Path, tmp_path: Path, night: Callable[..., Ran]
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    shutil.copytree(inbox, source)
    shutil.copytree(outbox, output)
    (source / "alpha.png").touch()
    (source / "grey.png").write_bytes(png(photograph("coins.png", 20)))
    (source / "new.png").write_bytes(png(photograph("chelsea.png", 16)))
    done = night(source, output)
    assert (done.summary["done"], done.summary["unchanged"]) == (2, 5)
    assert Image.open(output / "grey.png").size == (80, 80)


def test_what_decides_the_bytes_makes_all_work_again_and_nothing_else_does(
    tmp_path: Path, night: Callable[..., Ran]
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    write_png(source / "a.png", waves(8, 8))
    other = model_folder(tmp_path / "other", ANCHORED, seed=2)
    assert night(source, output).summary["done"] == 1
    how = ["--batch-size", 2, "--unit-megabytes", 1, "--device-hour-price", 2, "--max-hours", 1, "--include", "*.png"]
    limits = ["--max-seconds", 60, "--max-megapixels", 2, "--max-dead-share", 0.5, "--review-lr-psnr", 99]
    assert night(source, output, *how, *limits, "--first-page").summary["unchanged"] == 1
    for what in (["--seed", 1], ["--consistency", "low-band"], ["--model", other], ["--reject-lr-psnr", 9]):
        assert night(source, output, *what).summary["done"] == 1, what
    back = night(source, output)  # the output holds another recipe's result, so that of the first is work again
    assert back.summary["done"] == 1


def test_a_regression_model_is_upscaled_without_noise_and_says_that_it_drew_nothing(
    tmp_path: Path, night: Callable[..., Ran]
) -> None:
    write_png(tmp_path / "in" / "a.png", waves(8, 8))
    twin = model_folder(tmp_path / "twin", RRDB_TWIN)
    for seed in (0, 1):
        assert night(tmp_path / "in", tmp_path / f"{seed}", "--model", twin, "--seed", seed).code == 0
    first, second = (np.asarray(Image.open(tmp_path / name / "a.png")) for name in "01")
    np.testing.assert_array_equal(first, second)
    sidecar = json.loads((tmp_path / "0" / "a.png.json").read_text())
    assert sidecar["method"] == "regression" and sidecar["digital_source_type"].endswith("algorithmicallyEnhanced")


def test_two_nights_never_run_at_once(inbox: Path, tmp_path: Path, night: Callable[..., Ran]) -> None:
    output = tmp_path / "out"
    with Lease(str(output), run_id="the other night"):
        refused = night(inbox, output)
    assert refused.code == 5 and "the other night" in refused.stderr
    assert tree(output) == {}


def test_another_format_appends_its_extension_so_that_names_never_collide(
    tmp_path: Path, night: Callable[..., Ran]
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    pixels = waves(16, 16)
    write_png(source / "a.png", pixels)
    Image.fromarray(pixels).save(source / "a.jpg", quality=95)
    assert night(source, output, "--format", "webp").summary["done"] == 2
    assert {name for name in tree(output) if not name.endswith(".json")} == {"a.png.webp", "a.jpg.webp"}


def test_a_result_never_takes_the_place_of_another_sources_result(tmp_path: Path, night: Callable[..., Ran]) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    write_png(source / "a.jpg.png", waves(16, 16))
    Image.fromarray(waves(16, 16)).save(source / "a.jpg", quality=95)
    done = night(source, output, "--format", "png")
    assert (done.summary["done"], done.summary["dead"]) == (1, 1)
    assert outcomes(output) == {"a.jpg": ("dead", "key_taken"), "a.jpg.png": ("done", "")}


def test_an_uncertainty_map_never_takes_the_place_of_a_result_or_of_a_source(
    tmp_path: Path, night: Callable[..., Ran]
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    for name in ("a.png", "a.png.uncertainty.png", "b.png"):
        write_png(source / name, waves(16, 16))
    assert night(source, output, "--samples", 2).summary["dead"] == 1
    assert outcomes(output) == {
        "a.png": ("dead", "key_taken"), "a.png.uncertainty.png": ("done", ""), "b.png": ("done", "")
    }  # fmt: skip
    write_png(source / "b.png.uncertainty.png", waves(16, 16))  # of a later night, where a map lies already
    before = tree(output)
    night(source, output, "--samples", 2)
    assert outcomes(output)["b.png.uncertainty.png"] == ("dead", "key_taken")
    assert tree(output) == before


def test_a_source_of_a_later_night_never_overwrites_an_earlier_result(
    tmp_path: Path, night: Callable[..., Ran]
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    Image.fromarray(waves(16, 16)).save(source / "a.bmp")
    assert night(source, output).summary["done"] == 1
    first = tree(output)
    write_png(source / "a.bmp.png", waves(16, 16))
    assert night(source, output).summary["dead"] == 1
    assert tree(output) == first
    assert outcomes(output) == {"a.bmp": ("done", ""), "a.bmp.png": ("dead", "key_taken")}


@pytest.mark.parametrize("damage", [b"", b"\xff{", b"[]", b'{"source": 1}', b"[" * 100_000])
def test_a_damaged_sidecar_is_replaced(tmp_path: Path, night: Callable[..., Ran], damage: bytes) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    write_png(source / "a.png", waves(8, 8))
    output.mkdir()
    (output / "a.png.json").write_bytes(damage)
    done = night(source, output)
    assert (done.code, done.summary["done"]) == (0, 1), done.stderr
    assert json.loads((output / "a.png.json").read_bytes())["source"]["key"] == "a.png"


def test_a_model_of_the_registry_is_resolved_once_to_a_version(
    model: Path, tmp_path: Path, night: Callable[..., Ran]
) -> None:
    from pipelines import tracking

    client = tracking.connect()
    with tracking.run("tiny"):
        files = {path.name: path.read_bytes() for path in model.iterdir()}
        version = tracking.register_model(tracking.log_model(files, example=png(waves(8, 8))), "nightly")
    client.set_registered_model_alias("nightly", "champion", str(version))
    write_png(tmp_path / "in" / "a.png", waves(8, 8))
    done = night(tmp_path / "in", tmp_path / "out", "--model", "models:/nightly@champion")
    assert done.code == 0, done.stderr
    digest = json.loads((model / "config.json").read_text())["digest"]
    (report,) = (tmp_path / "out" / "_diffsr" / "reports").glob("*/summary.json")
    named = {"name": "nightly", "version": str(version), "digest": digest}
    assert json.loads(report.read_text())["model"] == named and f"nightly v{version}" in done.stderr
    # Names move from model to model; what made the bytes is the digest alone.
    assert json.loads((tmp_path / "out" / "a.png.json").read_text())["model"] == {"digest": digest}
    same = night(tmp_path / "in", tmp_path / "out")  # the same model by its folder
    assert (same.summary["inputs"], same.summary["unchanged"]) == (0, 1)
    missing = night(tmp_path / "in", tmp_path / "out", "--model", "models:/nightly@nobody")
    assert missing.code == 1 and "models:/nightly@nobody" in missing.stderr

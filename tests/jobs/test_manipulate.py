"""The laws of the tool that looks into a model's results."""

import io
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffsr_core.metrics import lr_psnr
from diffsr_core.pixels import bicubic
from diffsr_core.sampling import SamplingRecipe
from pipelines.models import resolve
from tests.core.tiny import MODELS
from tests.jobs.conftest import Ran, tree
from tests.jobs.tiny import SAMPLING, model_folder, waves, write_png

SCALE, HEIGHT, WIDTH = 4, 12, 10


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models, an LR image, HR images of the right size and of others, and what is no image."""
    folder = tmp_path_factory.mktemp("room")
    for name in ("srdiff", "seed3", "rrdb-twin"):
        model_folder(folder / name, MODELS[name])
    model_folder(folder / "one-step", replace(MODELS["anchored"], one_step=True, start_level=0.7))
    low = waves(HEIGHT, WIDTH)
    write_png(folder / "lr.png", low)
    write_png(folder / "base.png", bicubic(low, SCALE))
    write_png(folder / "donor.png", waves(HEIGHT * SCALE, WIDTH * SCALE, phase=2.0))
    mask = np.zeros((HEIGHT * SCALE, WIDTH * SCALE, 1), np.uint8)
    mask[:24] = 255
    write_png(folder / "mask.png", mask)
    write_png(folder / "small.png", waves(20, 20))
    write_png(folder / "grey.png", waves(HEIGHT, WIDTH, channels=1))
    (folder / "rotten.png").write_bytes((folder / "donor.png").read_bytes()[:200])
    return folder


def words(room: Path, output: Path, *more: object, model: str = "srdiff") -> list[object]:
    return ["--lr", room / "lr.png", "--model", room / model, "--output", output, *SAMPLING, *more]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(path.read_bytes())))


def test_samples_differ_agree_with_the_lr_and_their_mean_and_deviation_are_those_of_the_files(
    room: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    done = call("manipulate", "samples", *words(room, tmp_path / "out", "--samples", 3))
    assert (done.code, done.summary["job"], done.summary["done"]) == (0, "manipulate", 1), done.stderr
    names = ["sample-00", "sample-01", "sample-02", "mean", "deviation"]
    assert done.summary["outputs"] == [str(tmp_path / "out" / f"{name}.png") for name in names]
    assert set(tree(tmp_path / "out")) == {f"{name}.png" for name in names} | {"samples.json"}
    drawn = np.stack([pixels(tmp_path / "out" / f"sample-{index:02d}.png") for index in range(3)]).astype(np.float64)
    assert drawn.shape == (3, HEIGHT * SCALE, WIDTH * SCALE, 3)
    assert all((drawn[i] != drawn[j]).mean() > 0.5 for i, j in ((0, 1), (1, 2), (0, 2)))
    assert np.array_equal(pixels(tmp_path / "out" / "mean.png"), np.rint(drawn.mean(axis=0)))
    deviation = drawn.std(axis=0, ddof=1)
    assert np.array_equal(pixels(tmp_path / "out" / "deviation.png"), np.rint((8 * deviation).clip(0, 255)))
    low = pixels(room / "lr.png")
    least = min(lr_psnr(low, pixels(tmp_path / "out" / f"{name}.png"), scale=SCALE) for name in names[:-1])
    assert done.summary["metrics"]["lr_psnr_min"] == pytest.approx(least) and least > 40
    assert done.summary["metrics"]["diversity"] > 1


def test_the_first_sample_is_the_image_that_the_upscale_job_publishes(
    room: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    write_png(tmp_path / "in" / "lr.png", pixels(room / "lr.png"))
    flags = ["--source", tmp_path / "in", "--output", tmp_path / "up", "--model", room / "srdiff", "--engine", "local"]
    assert call("upscale", *flags, *SAMPLING).code == 0
    assert call("manipulate", "samples", *words(room, tmp_path / "out", "--samples", 2)).code == 0
    assert np.array_equal(pixels(tmp_path / "up" / "lr.png"), pixels(tmp_path / "out" / "sample-00.png"))


def test_between_two_images_there_is_one_for_each_weight_and_the_ends_resemble_their_own(
    room: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    images = ["--first", room / "base.png", "--second", room / "donor.png"]
    flags = [*images, "--weights", "0,0.5,1", "--level", "0.99", "--consistency", "off"]
    done = call("manipulate", "interpolate", *words(room, tmp_path / "out", *flags))
    assert done.code == 0, done.stderr
    assert set(tree(tmp_path / "out")) == {
        *("weight-0.000.png", "weight-0.500.png", "weight-1.000.png"), "interpolate.json",
    }  # fmt: skip
    made = [pixels(tmp_path / "out" / f"weight-{weight}.png").astype(float) for weight in ("0.000", "0.500", "1.000")]
    first, second = (pixels(room / f"{name}.png").astype(float) for name in ("base", "donor"))

    def nearer(image: np.ndarray) -> float:
        return float(np.square(image - first).mean() - np.square(image - second).mean())

    assert nearer(made[0]) < nearer(made[1]) < nearer(made[2])
    assert "lr_psnr_min" in done.summary["metrics"]


def test_without_images_the_first_two_samples_are_joined(room: Path, tmp_path: Path, call: Callable[..., Ran]) -> None:
    assert call("manipulate", "samples", *words(room, tmp_path / "s", "--samples", 2)).code == 0
    given = ["--first", tmp_path / "s" / "sample-00.png", "--second", tmp_path / "s" / "sample-01.png"]
    for name, more in (("default", []), ("given", given)):
        assert call("manipulate", "interpolate", *words(room, tmp_path / name, "--weights", "0.5", *more)).code == 0
    default, other = (tree(tmp_path / name) for name in ("default", "given"))
    assert default["weight-0.500.png"] == other["weight-0.500.png"] and default.keys() == other.keys()


def test_a_fusion_takes_the_donor_where_the_mask_is_bright_and_a_rerun_gives_the_same_bytes(
    room: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    images = ["--base", room / "base.png", "--donor", room / "donor.png", "--mask", room / "mask.png"]
    for name in ("one", "two", "two"):
        done = call("manipulate", "fuse", *words(room, tmp_path / name, *images))
        assert done.code == 0, done.stderr
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert set(tree(tmp_path / "one")) == {"base.png", "pasted.png", "fused.png", "fuse.json"}
    base, donor, pasted = (
        pixels(path) for path in (room / "base.png", room / "donor.png", tmp_path / "one/pasted.png")
    )
    assert np.array_equal(pasted[:24], donor[:24]) and np.array_equal(pasted[24:], base[24:])
    fused = pixels(tmp_path / "one" / "fused.png")
    assert done.summary["metrics"]["lr_psnr_min"] == pytest.approx(lr_psnr(pixels(room / "lr.png"), fused, scale=SCALE))
    assert not np.array_equal(fused, pasted) and not np.array_equal(fused, base)


@pytest.mark.parametrize("verb", ["samples", "interpolate", "fuse"])
def test_the_record_says_what_made_the_images_and_a_rerun_gives_every_byte_again(
    verb: str, room: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    donor, mask, second = (str(room / f"{name}.png") for name in ("donor", "mask", "donor"))
    digests = {path: sha256(Path(path).read_bytes()).hexdigest() for path in (donor, mask)}
    settings, flags = {
        "samples": ({"samples": 2}, ["--samples", 2]),
        "interpolate": (
            {"first": None, "second": digests[second], "weights": [0.25, 1.0], "level": 0.5},
            ["--second", second, "--weights", "0.25,1", "--level", 0.5],
        ),
        "fuse": (
            {"base": None, "donor": digests[donor], "mask": digests[mask], "level": 0.3},
            ["--donor", donor, "--mask", mask],
        ),
    }[verb]  # fmt: skip
    trees = []
    for place in ("one", "two", "two"):
        done = call("manipulate", verb, *words(room, tmp_path / place, *flags, "--seed", 5))
        assert done.code == 0, done.stderr
        trees.append(tree(tmp_path / place))
    assert trees[0] == trees[1] == trees[2]  # neither the output's name nor the time is in it
    record = json.loads(trees[0].pop(f"{verb}.json"))
    recipe = SamplingRecipe(num_steps=2, tile=16, halo=4, seed=5)
    assert record == {
        "verb": verb,
        "settings": settings,
        "lr": sha256((room / "lr.png").read_bytes()).hexdigest(),
        "model": resolve(str(room / "srdiff")).digest,
        "sampling": json.loads(json.dumps(asdict(recipe))),
        "outputs": [Path(uri).name for uri in done.summary["outputs"]],
    }
    assert set(record["outputs"]) == set(trees[0])


def test_a_grey_lr_and_colour_images_or_the_other_way_round_are_served(
    room: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    images = ["--base", room / "base.png", "--donor", room / "donor.png", "--mask", room / "mask.png"]
    done = call("manipulate", "fuse", *words(room, tmp_path / "a", *images, "--lr", room / "grey.png"))
    assert done.code == 0 and pixels(tmp_path / "a" / "fused.png").ndim == 2, done.stderr
    mask = room / "mask.png"
    done = call("manipulate", "fuse", *words(room, tmp_path / "b", "--base", mask, "--donor", mask, "--mask", mask))
    assert done.code == 0 and pixels(tmp_path / "b" / "fused.png").shape[2] == 3, done.stderr


@pytest.mark.parametrize(
    ("line", "pieces"),
    [
        ("fuse --donor donor.png", ["donor and mask must be given", "--mask URI"]),
        ("fuse --mask mask.png", ["donor and mask must be given", "--donor URI"]),
        ("fuse --donor absent.png --mask mask.png", ["donor (", "absent.png) must be an image", "give another"]),
        ("fuse --donor rotten.png --mask mask.png", ["donor (", "rotten.png) must be an image", "truncated"]),
        ("fuse --donor srdiff --mask mask.png", ["donor (", "must be an image", "directory"]),
        ("fuse --donor donor.png --mask small.png", ["(20, 20)", "must be of one size"]),
        ("fuse --donor small.png --mask mask.png", ["(20, 20, 3)", "must be of one size"]),
        ("fuse --base small.png --donor small.png --mask small.png", ["(20, 20) px", "4 times the LR", "(48, 40)"]),
        ("interpolate --first small.png", ["(20, 20) px", "4 times the LR", "resize it"]),
        ("interpolate --second rotten.png", ["second (", "must be an image"]),
        ("interpolate --level 1e-9", ["level (1e-09) must suit", "choose another"]),
        ("interpolate --level 0.9999999", ["level (0.9999999) must suit", "choose another"]),
        ("samples --lr rotten.png", ["lr (", "rotten.png) must be an image"]),
        ("samples --lr absent.png", ["lr (", "absent.png) must be an image"]),
        ("samples --steps 101", ["steps (101) must be between 1 and 100", "use fewer"]),
        ("samples --model rrdb-twin", ["rrdb-twin) is a regression", "give a diffusion model"]),
        (
            "interpolate --model one-step --steps 1",
            ["one-step) draws in one step", "a diffusion model of several"],
        ),
        ("samples --model seed3", ["channels (3) must be 1", "convert the image"]),
        ("samples --model absent", ["absent) must be a folder with config.json"]),
        ("samples --samples 2 --output lr.png", ["File exists"]),
        ("samples --level 0.5", ["level (0.5) is of interpolate and fuse; leave it out"]),
        ("samples --first base.png", ["first (", "base.png) is of interpolate; leave it out"]),
        ("samples --mask mask.png", ["mask (", "mask.png) is of fuse; leave it out"]),
        ("interpolate --samples 3", ["samples (3) is of samples; leave it out"]),
        ("interpolate --base base.png", ["base (", "base.png) is of fuse; leave it out"]),
        ("interpolate --donor donor.png", ["donor (", "donor.png) is of fuse; leave it out"]),
        ("fuse --donor donor.png --mask mask.png --samples 3", ["samples (3) is of samples; leave it out"]),
        ("fuse --donor donor.png --mask mask.png --weights 0.5", ["weights ((0.5,)) is of interpolate; leave it out"]),
        ("fuse --donor donor.png --mask mask.png --second base.png", ["second (", ") is of interpolate; leave it out"]),
    ],
)
def test_a_mistake_is_one_line_without_a_traceback_and_nothing_is_written(
    line: str, pieces: list[str], room: Path, tmp_path: Path, call: Callable[..., Ran]
) -> None:
    verb, *flags = line.split()
    flags = [str(room / flag) if (room / flag).exists() or "absent" in flag else flag for flag in flags]
    before = tree(room)
    failed = call("manipulate", verb, *words(room, tmp_path / "out", *flags))
    assert (failed.code, failed.summary["status"], failed.summary["outputs"]) == (1, "failed", [])
    (error,) = [each for each in failed.stderr.splitlines() if "error: " in each]
    assert all(piece in error for piece in pieces), error
    assert "Traceback" not in failed.stderr
    assert not (tmp_path / "out").exists() and tree(room) == before


@pytest.mark.parametrize(
    ("line", "pieces"),
    [
        ("", ["verb ('') must be one of samples, interpolate, fuse"]),
        ("blend", ["verb ('blend') must be one of samples, interpolate, fuse"]),
        ("samples --samples 1", ["samples (1) must be at least 2; use 8"]),
        ("interpolate --level 0", ["level (0.0) must be between 0 and 1"]),
        ("interpolate --level 1", ["level (1.0) must be between 0 and 1"]),
        ("interpolate --weights 0,1.5", ["weights (1.5) must be from 0 to 1 each"]),
        ("interpolate --weights []", ["weights (()) must hold one or more"]),
        ("interpolate --weights 0.1001,0.1002", ["weights (", "must differ by 0.001", "leave one out"]),
        ("interpolate --weights a", ["weights ('a') must be a valid number"]),
        ("samples fuse", ["unrecognized arguments: fuse"]),
    ],
)
def test_a_bad_argument_is_exit_2_before_anything_is_read(
    line: str, pieces: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipelines.cli import run_job

    with pytest.raises(SystemExit) as stop:
        run_job("manipulate", [*line.split(), "--lr", "absent.png", "--output", str(tmp_path / "out")])
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
    assert all(piece in err for piece in pieces), err

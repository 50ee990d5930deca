"""Laws of `diffsr image`: one image, here and now, with the bytes of the night's, and nothing is replaced unasked."""

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

from diffsr_core.checkpoint import SAMPLING, schedule_json
from pipelines import cli, one_image, pictures
from pipelines.models import resolve
from pipelines.one_image import split_words
from tests import hostile, icc
from tests.core.tiny import ANCHORED
from tests.jobs.conftest import Ran, tree
from tests.jobs.tiny import NIGHT, bicubic_folder, broken_folder, model_folder, waves, write_png

TINY = ("--steps", "1", "--tile", "16", "--halo", "4", "--window", "32", "--margin", "4")
Tool = Callable[..., Ran]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"), ANCHORED)


@pytest.fixture
def image(model: Path, call: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> Tool:
    """Run the tool in this process, as `diffsr image WORDS` does; this file's model unless the words name one."""
    entry = cli.Job("pipelines.one_image", "ImageConfig", "upscale_image", "image", "image in.jpg out.png")
    if "image" not in cli.JOBS:
        monkeypatch.setitem(cli.JOBS, "image", entry)

    def run(*words: object) -> Ran:
        named = [] if "--model" in words else ["--model", str(model)]
        return call("image", *split_words([*map(str, words), *named, *TINY]))

    return run


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_png(tmp_path / "in.png", waves(12, 20))


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source of the night: metadata, profiles, alpha, grey, 16 bits, a page too many, and one of several windows."""
    folder = tmp_path_factory.mktemp("archive")
    exif = Image.Exif()
    exif[0x010E] = "a gate"
    coloured = Image.fromarray(waves(9, 14))
    coloured.save(folder / "profile.png", icc_profile=icc.rgb_profile("Display P3"), exif=exif)
    coloured.save(folder / "photo.jpg", exif=exif, quality=90)
    Image.fromarray(waves(9, 14, channels=4)).save(folder / "alpha.webp", lossless=True)
    coloured.save(folder / "old.bmp")
    coloured.save(folder / "scan.tif")
    write_png(folder / "grey.png", waves(8, 8, channels=1))
    Image.fromarray(waves(8, 8)[:, :, 0].astype(np.uint16) * 257).save(folder / "deep.png")
    write_png(folder / "large.png", waves(40, 70))
    return folder


@pytest.mark.parametrize(
    ("flags", "ending"),
    [
        ((), ""),
        (("--format", "png"), ".png"),
        (("--format", "tiff", "--samples", 2, "--choice", "mean", "--seed", 7), ".tif"),
        (("--consistency", "off", "--sampler", "ddpm"), ""),
    ],
)
def test_the_bytes_are_those_of_the_night(
    flags: tuple[object, ...], ending: str, archive: Path, model: Path, image: Tool, call: Tool, tmp_path: Path
) -> None:
    words = ["--source", archive, "--output", tmp_path / "night", "--model", model, *NIGHT, *TINY, *flags]
    assert call("upscale", *words).summary["done"] == 8
    night = {name: data for name, data in tree(tmp_path / "night").items() if not name.endswith(".json")}
    for path in sorted(archive.iterdir()):
        ours = next(name for name in sorted(night, key=len) if name.startswith(path.name))
        # Where the format changes the name of the result says it; where it does not the night may keep it, or name it.
        said = flags[2:] if "--format" in flags and path.suffix not in (ending, ".bmp") else flags
        own = image(path, tmp_path / "one" / ours, *said)
        assert own.code == 0, own.stderr
        assert own.summary["metrics"]["lr_psnr"] > 0 and own.summary["outputs"][0] == str(tmp_path / "one" / ours)
    assert tree(tmp_path / "one") == night
    assert len(night) == (16 if "--samples" in flags else 8)


def test_the_format_is_what_the_name_says_or_what_is_asked(image: Tool, small: Path, tmp_path: Path) -> None:
    for name, words, format in (
        ("a.jpeg", [], "JPEG"),
        ("a.WEBP", [], "WEBP"),
        ("a.tiff", [], "TIFF"),
        ("a.out", ["--format", "avif"], "AVIF"),
        ("a", ["--format", "keep"], "PNG"),
        ("b.jpg", ["--format", "jpeg", "--quality", "30"], "JPEG"),
    ):
        ran = image(small, tmp_path / name, *words)
        assert ran.code == 0, ran.stderr
        assert Image.open(tmp_path / name).format == format and Image.open(tmp_path / name).size == (80, 48)
        assert f"20 x 12 -> 80 x 48 px, {format}, " in ran.stderr
    assert (tmp_path / "b.jpg").stat().st_size < (tmp_path / "a.jpeg").stat().st_size


def test_the_schedule_that_is_stored_with_the_model_is_used_and_a_flag_wins(
    image: Tool, small: Path, model: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    model_folder(own, ANCHORED)
    evidence = {"model": resolve(str(own)).digest, "data": "d", "measure": "psnr", "value": 1.0, "interval": [0.0, 2.0]}
    schedule: dict[str, Any] = {"sampler": "ddpm", "grid": "linear", "num_steps": 3, "start_level": 0.25}
    (own / SAMPLING).write_bytes(schedule_json({**schedule, "evidence": {**evidence, "device_s_per_mp": 1.0}}))
    image(small, tmp_path / "stored.png", "--model", own)  # TINY says one step
    said = ["--sampler", "ddpm", "--grid", "linear", "--start-level", "0.25"]
    image(small, tmp_path / "said.png", *said)
    image(small, tmp_path / "usual.png")
    assert (tmp_path / "stored.png").read_bytes() == (tmp_path / "said.png").read_bytes()
    assert (tmp_path / "stored.png").read_bytes() != (tmp_path / "usual.png").read_bytes()


def test_a_person_reads_one_line_and_a_program_another(image: Tool, small: Path, tmp_path: Path) -> None:
    ran = image(small, tmp_path / "out.png")
    assert (ran.code, ran.summary["job"], ran.summary["status"]) == (0, "image", "done")
    assert (ran.summary["inputs"], ran.summary["done"]) == (1, 1)
    assert ran.summary["outputs"] == [str(tmp_path / "out.png")]
    (last,) = ran.stderr.splitlines()[-1:]
    lr_psnr = f"LR-PSNR {ran.summary['metrics']['lr_psnr']:.1f} dB"
    assert last.startswith(f"image: {tmp_path / 'out.png'}: 20 x 12 -> 80 x 48 px, PNG, ") and lr_psnr in last


def test_what_is_not_the_model_s_own_result_is_said(
    image: Tool, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = one_image.StillSettings

    def strict(**settings: Any) -> Any:
        return gate(**settings, thresholds=pictures.StillSettings().thresholds.__class__(100, 100))

    monkeypatch.setattr(one_image, "StillSettings", strict)
    ran = image(small, tmp_path / "out.jpg", "--quality", 5)
    assert ran.code == 0 and "bicubic is published instead: lr_psnr" in ran.stderr


def refused(ran: Ran, *words: str) -> None:
    """Assert exit code 1 and one clear line that holds the words."""
    assert ran.code == 1 and ran.summary["status"] == "failed" and "Traceback" not in ran.stderr
    (line,) = [line for line in ran.stderr.splitlines() if "error:" in line]
    for word in words:
        assert word in line, line


def test_what_is_there_stays_unless_it_is_forced(image: Tool, small: Path, tmp_path: Path) -> None:
    there = tmp_path / "out.png"
    there.write_bytes(b"precious")
    refused(image(small, there), f"output ('{there}') is there already; use --force")
    assert there.read_bytes() == b"precious"
    assert image(small, there, "--force").code == 0 and Image.open(there).size == (80, 48)
    beside = tmp_path / "two.png.uncertainty.png"
    beside.write_bytes(b"precious")
    refused(image(small, tmp_path / "two.png", "--samples", 2), str(beside), "--force")
    assert beside.read_bytes() == b"precious" and not (tmp_path / "two.png").exists()


def test_what_comes_to_lie_there_meanwhile_stays(
    image: Tool, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def meanwhile(*words: Any, **settings: Any) -> Any:
        (tmp_path / "out.png").write_bytes(b"precious")
        return pictures.upscaled(*words, **settings)

    monkeypatch.setattr(one_image, "upscaled", meanwhile)
    refused(image(small, tmp_path / "out.png"), "is there now, and was not before")
    assert (tmp_path / "out.png").read_bytes() == b"precious"


def test_a_result_that_cannot_be_finished_leaves_nothing(
    image: Tool, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*words: Any) -> None:
        raise OSError(28, "No space left on device", "out.png")

    before = set(tmp_path.iterdir())
    monkeypatch.setattr(os, "fsync", full)
    refused(image(small, tmp_path / "out.png"), "No space left")
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("words", "pieces"),
    [
        (["in.png", "in.png", "--force"], ["output", "must not be the input"]),
        (["in.png", "link.png", "--force"], ["output", "must not be the input"]),
        (["in.png", "twin.png", "--force"], ["output", "must not be the input"]),
        (["in.png", "folder"], ["output", "it is a folder"]),
        (["in.png", "new/"], ["output", "it is a folder"]),
        (["in.png", "in.png/out.png"], ["output", "must be in a folder"]),
        (["in.png", "-"], ["output", "stdout is the summary's"]),
        (["folder", "out.png"], ["input", "use diffsr upscale for folders"]),
        (["absent.png", "out.png"], ["input (absent.png) must be an image file"]),
        (["pipe.png", "out.png"], ["input (pipe.png) must be an image file"]),
        (["in.png", "out.gif"], ["output ('out.gif') must end in one of .png, .jpg", "--format"]),
        (["in.png", "out"], ["output ('out') must end in one of .png"]),
        (["in.png", "out.png", "--format", "jpeg"], ["must not end in .png", "JPEG", "use .jpg"]),
        (["in.png", "out.jpg", "--format", "keep"], ["must not end in .jpg", "PNG"]),
        (["in.png", "out.png", "--model", "nowhere"], ["model (", "must be a folder with config.json"]),
        (["in.png", "out.png", "--max-megapixels", "0.0001"], ["too_large: 20 x 12 px"]),
        (["alpha.png", "out.jpg"], ["alpha", "JPEG has no alpha"]),
        (["text.png", "out.png"], ["input (text.png) cannot be upscaled: sniff: not_an_image"]),
        (["empty.png", "out.png"], ["input (empty.png) cannot be upscaled: sniff: empty_file"]),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line_and_leaves_nothing(
    words: list[str], pieces: list[str], image: Tool, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("link.png").symlink_to("in.png")
    os.link("in.png", "twin.png")
    os.mkfifo("pipe.png")
    Path("folder").mkdir()
    write_png(Path("alpha.png"), waves(8, 8, channels=4))
    Path("text.png").write_text("<html>not here</html>")
    Path("empty.png").write_bytes(b"")
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    refused(image(*words), *pieces)
    assert {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_each_hostile_file_is_upscaled_or_refused_with_the_reason_of_the_night(
    image: Tool, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("hostile")
    stub = bicubic_folder(tmp_path_factory.mktemp("stub"))
    expected = {name: what for name, what in hostile.make(folder).items() if not isinstance(what, str)}
    expected["float.tif"] = frozenset({"unsupported_mode"})  # a raster of its own kind elsewhere
    del expected["no utf-8 \\udcff.png"]  # whose name is no word of a command line
    limits = ["--max-megapixels", "0.02", "--format", "png", "--model", stub]
    for number, (name, reasons) in enumerate(expected.items()):
        ran = image(folder / name, tmp_path / f"{number}.out", *limits)
        gone = reasons & {"io_error", "missing"}
        refused(ran, "input (")
        assert gone or any(f": {reason}: " in ran.stderr for reason in reasons), (name, reasons, ran.stderr)
    assert len(expected) > 20 and not list(tmp_path.iterdir())


def test_a_network_that_gives_no_numbers_is_one_line(image: Tool, small: Path, tmp_path: Path) -> None:
    broken = broken_folder(tmp_path / "broken")
    refused(image(small, tmp_path / "out.png", "--model", broken), "upscale: nan:")
    assert not (tmp_path / "out.png").exists()


def test_input_and_output_may_be_anywhere(
    image: Tool, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = fsspec.filesystem("memory")
    store.pipe_file("/here/in.png", small.read_bytes())
    assert image("memory://here/in.png", "memory://there/out.png").code == 0
    refused(image("memory://here/in.png", "memory://there/out.png"), "is there already")
    refused(image("memory://here/in.png", "memory://here/in.png", "--force"), "must not be the input")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(small.read_bytes())))
    assert image("-", tmp_path / "out.png").code == 0
    monkeypatch.setattr(one_image, "SPOOL_BYTES", 10)  # a large file is read where it lies
    assert image(small, tmp_path / "large.png").code == 0
    assert store.cat_file("/there/out.png") == (tmp_path / "out.png").read_bytes()
    assert (tmp_path / "large.png").read_bytes() == (tmp_path / "out.png").read_bytes()


def test_a_large_image_shows_how_far_it_is_and_a_small_one_does_not(
    image: Tool, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = list[tuple[int, str]]()

    def progress(items: Any, *, total: int, label: str) -> Any:
        counted.append((total, label))
        return items

    monkeypatch.setattr(pictures, "progress", progress)
    assert image(small, tmp_path / "small.png").code == 0 and not counted
    assert image(write_png(tmp_path / "l.png", waves(40, 70)), tmp_path / "large.png").code == 0
    ((total, label),) = counted
    assert total >= 6 and label == "image"


def test_an_image_that_is_a_result_already_is_upscaled_when_it_is_asked_for(
    image: Tool, small: Path, tmp_path: Path
) -> None:
    assert image(small, tmp_path / "once.png").code == 0
    assert image(tmp_path / "once.png", tmp_path / "twice.png").code == 0
    assert Image.open(tmp_path / "twice.png").size == (320, 192)


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        ("in.jpg out.png", "--input=in.jpg --output=out.png"),
        ("in.jpg out.png --model a", "--input=in.jpg --output=out.png --model a"),
        ("--model a in.jpg --steps 4 out.png", "--model a --input=in.jpg --steps 4 --output=out.png"),
        ("--force in.jpg --no-use-gpu out.png", "--force --input=in.jpg --no-use-gpu --output=out.png"),
        ("--steps=4 in.jpg out.png", "--steps=4 --input=in.jpg --output=out.png"),
        ("- out.png", "--input=- --output=out.png"),
        ("in.jpg --output out.png", "--input=in.jpg --output out.png"),
        ("--input=in.jpg out.png", "--input=in.jpg --output=out.png"),
        ("in.jpg out.png more.png", "--input=in.jpg --output=out.png more.png"),
        ("in.jpg", "--input=in.jpg"),
        ("--help", "--help"),
        ("--print-config in.jpg b", "--print-config --input=in.jpg --output=b"),
        ("", ""),
    ],
)
def test_the_words_that_are_no_flags_are_input_and_output(words: str, flags: str) -> None:
    assert split_words(words.split()) == flags.split()
    assert split_words(split_words(words.split())) == flags.split()


@pytest.mark.parametrize(
    ("words", "pieces"),
    [
        ("in.png", ["--output", "output"]),
        ("in.png out.png more.png", ["more.png"]),
        ("in.png out.png --quality 0", ["quality (0)", "1 to 100"]),
        ("in.png out.png --format gif", ["format ('gif')"]),
        ("in.png out.png --max-megapixels 0", ["max_megapixels (0.0)"]),
        ("in.png out.png --halo 32", ["halo (32)"]),
        ("in.png out.png --choice best", ["choice (best)"]),
    ],
)
def test_a_bad_argument_names_itself(
    words: str, pieces: list[str], image: Tool, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.parse("image", split_words(words.split()))
    assert stop.value.code == 2
    shown = capfd.readouterr().err
    for piece in pieces:
        assert piece in shown

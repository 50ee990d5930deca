"""Pictures through the upscale job: sizes, colours, depth, alpha and formats are right in the published file.

The stub network finds no residual, so each result is bicubic of its source, projected: what the job adds shows alone.
"""

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from diffsr_core.checkpoint import load_model
from diffsr_core.colour import delta_e, rgb_to_lab
from diffsr_core.pixels import bicubic
from diffsr_core.resize import downscale_pixels
from diffsr_core.sampling import SamplingRecipe
from diffsr_core.upscaler import Upscaler
from pipelines import assets
from tests import icc
from tests.core.tiny import ANCHORED
from tests.hostile import png_of
from tests.jobs.conftest import Ran, png
from tests.jobs.tiny import NIGHT, bicubic_folder, model_folder, outcomes, receipts, waves, write_png

needs_rasterio = pytest.mark.skipif(find_spec("rasterio") is None, reason="16-bit pictures need the extra geo")
Drawn = tuple[Path, np.ndarray, list[np.ndarray], list[float]]
PRO_PHOTO = ((0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001))  # ROMM RGB's primaries, here with white D65


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bicubic_folder(tmp_path_factory.mktemp("stub"))


@pytest.fixture
def night(stub: Path, tmp_path: Path, call: Callable[..., Ran]) -> Callable[..., Path]:
    """Upscale tmp_path/in with the stub and further flags; return the output."""
    flags = ["--source", tmp_path / "in", "--output", tmp_path / "out", "--model", stub, *NIGHT]

    def ran(*further: object, verb: str = "run") -> Path:
        done = call("upscale", verb, *flags, *further)
        assert done.code == 0, done.stderr
        return tmp_path / "out"

    (tmp_path / "in").mkdir()
    return ran


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.atleast_3d(np.asarray(image))


def test_a_constant_field_of_any_size_stays_one_and_has_no_border_ring(
    tmp_path: Path, night: Callable[..., Path]
) -> None:
    fields = [(1, 1, 117), (1, 1, 0), (7, 3, 255), (7, 3, 117), (127, 129, 117), (128, 1000, 117)]
    for field in fields:
        height, width, value = field
        write_png(tmp_path / "in" / f"{field}.png", np.full((height, width, 3), value, np.uint8))
    output = night("--tile", 64, "--window", 128, "--steps", 1)
    for field in fields:
        height, width, value = field
        found = pixels_of(output / f"{field}.png").astype(int)
        assert found.shape == (4 * height, 4 * width, 3)
        assert np.abs(found - value).max() <= 1, field


def test_at_the_border_a_real_network_is_as_bright_as_inside(tmp_path: Path, night: Callable[..., Path]) -> None:
    write_png(tmp_path / "in" / "flat.png", np.full((40, 50, 3), 90, np.uint8))
    model = model_folder(tmp_path / "model", ANCHORED)
    found = pixels_of(night("--model", model) / "flat.png").astype(float)
    assert found.std() > 0  # it draws something
    for border in (found[:4], found[-4:], found[:, :4], found[:, -4:]):
        assert abs(border.mean() - found[16:-16, 16:-16].mean()) <= 1


@pytest.mark.parametrize(("space", "format"), [
    ("Display P3", "png"), ("Display P3", "jpeg"), ("Adobe RGB", "tiff"), ("Adobe RGB", "webp"), ("ProPhoto", "png"),
])  # fmt: skip  # not ProPhoto as JPEG: 8 bits of YCbCr are too coarse for so wide a space
def test_colours_of_a_wide_space_are_those_of_colour_managed_bicubic(
    tmp_path: Path, night: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, space: str, format: str
) -> None:
    monkeypatch.setitem(icc.PRIMARIES_XY, "ProPhoto", PRO_PHOTO)
    profile = icc.rgb_profile(space)
    hues = np.random.default_rng(5).integers(30, 226, (6, 4, 3), dtype=np.uint8)  # a chart of 24 patches, soft between
    chart = Image.fromarray(hues).resize((36, 48), Image.Resampling.BICUBIC)
    chart.save(tmp_path / "in" / "chart.png", icc_profile=profile)
    output = night("--format", format, "--quality", 100, "--tile", 32)
    (path,) = (path for path in output.iterdir() if path.suffix in (".png", ".tif", ".jpg", ".webp"))
    with Image.open(path) as found:
        assert found.info["icc_profile"] == profile
        managed = in_srgb(found.convert("RGB"), profile)
    plain = chart.resize((144, 192), Image.Resampling.BICUBIC)
    off = delta_e(*(rgb_to_lab(image / 255) for image in (managed, in_srgb(plain, profile))))
    assert off.mean() <= 0.5 and np.percentile(off, 99) <= 2, (off.mean(), np.percentile(off, 99))
    ignored = delta_e(*(rgb_to_lab(np.asarray(image) / 255.0) for image in (plain, Image.fromarray(managed))))
    assert ignored.mean() > 1  # who loses the profile would be found out


def in_srgb(image: Image.Image, profile: bytes) -> np.ndarray:
    """Return uint8 HWC in sRGB, by LittleCMS."""
    target = ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(
        image, io.BytesIO(profile), target, renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC, outputMode="RGB"
    )
    assert converted is not None
    return np.asarray(converted)


@needs_rasterio
@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize("format", ["keep", "tiff"])
def test_a_16_bit_ramp_keeps_more_than_10000_levels(
    tmp_path: Path, night: Callable[..., Path], colours: int, format: str
) -> None:
    imagecodecs = pytest.importorskip("imagecodecs")
    ramp = np.repeat(np.linspace(500, 65_000, 48 * 64).reshape(48, 64, 1), colours, axis=2).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in ramp)
    (tmp_path / "in" / "ramp.png").write_bytes(png_of(64, 48, bits=16, colour=0 if colours == 1 else 2, rows=rows))
    output = night("--format", format, "--tile", 64, "--steps", 1)
    if format == "keep":
        found = imagecodecs.png_decode((output / "ramp.png").read_bytes())
    else:
        found = imagecodecs.imread(output / "ramp.png.tif")
    assert found.dtype == np.uint16 and np.atleast_3d(found).shape == (192, 256, colours)
    assert len(np.unique(found)) > 10_000
    expected = bicubic(ramp.astype(np.uint16), 4).astype(int)
    assert np.abs(np.atleast_3d(found) - expected)[8:-8, 8:-8].mean() < 65535 * 0.01


def test_alpha_is_upscaled_apart_and_the_colours_below_it_do_not_depend_on_it(
    tmp_path: Path, night: Callable[..., Path]
) -> None:
    colours, alpha = waves(20, 24), waves(20, 24, channels=1, phase=2.0)[:, :, 0] // 2
    alpha[:8, :8], alpha[12:, 16:] = 0, 255
    write_png(tmp_path / "in" / "with.png", np.dstack([colours, alpha]))
    write_png(tmp_path / "in" / "without.png", colours)
    write_png(tmp_path / "in" / "alpha alone.png", alpha)
    output = night("--noise", "folder")
    found = pixels_of(output / "with.png")
    np.testing.assert_array_equal(found[:, :, :3], pixels_of(output / "without.png"))  # straight, not premultiplied
    np.testing.assert_array_equal(found[:, :, 3:], bicubic(alpha[:, :, None], 4))
    assert (found[:24, :24, 3] == 0).all() and (found[56:, 72:, 3] == 255).all()


def test_every_mode_comes_out_with_the_colours_that_pillow_sees_in_it(
    tmp_path: Path, night: Callable[..., Path]
) -> None:
    picture, source = Image.fromarray(waves(24, 20)), tmp_path / "in"
    picture.convert("L").save(source / "grey.png")
    picture.convert("L").save(source / "grey.jpg", quality=98)
    picture.convert("LA").save(source / "grey alpha.png")
    picture.quantize(64).save(source / "palette.png")
    picture.quantize(64).save(source / "palette.gif")
    picture.convert("1").save(source / "one bit.png")
    picture.convert("CMYK").save(source / "cmyk.jpg", quality=98)
    picture.convert("CMYK").save(source / "cmyk.tif")
    picture.save(source / "rgb.bmp")
    output = night()
    for path in source.iterdir():
        kept = path.suffix in (".png", ".jpg", ".tif")
        with Image.open(path) as before, Image.open(output / (path.name if kept else f"{path.name}.png")) as after:
            grey = before.mode in ("1", "L", "LA")
            assert after.mode == {"LA": "LA"}.get(before.mode, "L" if grey else "RGB"), path.name
            wanted = np.atleast_3d(np.asarray(before.convert("L" if grey else "RGB")))
            found = np.atleast_3d(np.asarray(after.convert("L" if grey else "RGB"))).astype(float)
        small = found.reshape(24, 4, 20, 4, -1).mean(axis=(1, 3))
        assert np.abs(small - wanted).mean() < (16 if path.name == "one bit.png" else 4), path.name


@pytest.mark.parametrize("format", ["png", "jpeg", "webp", "tiff", "avif"])
def test_each_format_is_written_at_four_times_the_size_and_known_as_ours_when_it_comes_in_again(
    tmp_path: Path, night: Callable[..., Path], call: Callable[..., Ran], stub: Path, format: str
) -> None:
    write_png(tmp_path / "in" / "a.png", waves(8, 10))
    write_png(tmp_path / "in" / "grey.png", waves(8, 10, channels=1))
    output = night("--format", format, "--samples", 2)
    results = [path for path in output.iterdir() if path.suffix != ".json" and path.is_file()]
    assert len(results) == 4  # with their maps
    for path in results:
        with Image.open(path) as image:
            assert image.size == (40, 32)
    words = ["--source", output, "--output", tmp_path / "again", "--model", stub, *NIGHT]
    again = call("upscale", *words)
    assert (again.code, again.summary["skipped"], again.summary["inputs"]) == (0, 4, 4), again.stderr
    assert set(outcomes(tmp_path / "again").values()) == {("skipped", "already_upscaled")}
    if format == "png":
        assert call("upscale", "retry-failed", *words, "--no-skip-upscaled").summary["done"] == 4


def test_what_a_format_cannot_hold_is_refused_before_the_network_runs_and_offered_as_tiff(
    tmp_path: Path, night: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_png(tmp_path / "in" / "long.png", np.zeros((1, 4100, 3), np.uint8))
    write_png(tmp_path / "in" / "alpha.png", waves(8, 8, channels=4))
    calls = list[str]()
    monkeypatch.setattr(assets, "draw", lambda *_, **__: calls.append("drawn"))
    output = night("--format", "webp", "--include", "long.png")
    (row,) = receipts(output).values()
    assert (row["status"], row["stage"], row["reason"]) == ("dead", "encode", "format_limit")
    assert "16383" in row["message"] and "tiff" in row["message"] and not calls
    night("--format", "jpeg", "--include", "alpha.png")
    assert outcomes(output)["alpha.png"] == ("dead", "alpha") and not calls


def test_of_several_pages_or_frames_none_is_taken_or_the_first_and_it_is_said(
    tmp_path: Path, night: Callable[..., Path]
) -> None:
    frames = [Image.fromarray(waves(16, 16, phase=phase)) for phase in (0, 1, 2)]
    for name in ("frames.gif", "frames.png", "frames.webp", "pages.tif"):
        options: dict[str, Any] = {"lossless": True} if name.endswith("webp") else {}
        frames[0].save(tmp_path / "in" / name, save_all=True, append_images=frames[1:], **options)
    output = night("--max-dead-share", 1)
    assert outcomes(output) == {
        name: ("dead", "multipage" if name == "pages.tif" else "animated") for name in sorted(outcomes(output))
    }
    output = night("--first-page", verb="retry-failed")
    assert {status for status, _ in outcomes(output).values()} == {"done"}
    for name in ("frames.png", "frames.webp", "pages.tif"):
        small = pixels_of(output / name).astype(float).reshape(16, 4, 16, 4, 3).mean(axis=(1, 3))
        assert np.abs(small - np.asarray(frames[0])).mean() < 5, name


def test_what_is_large_enough_is_skipped_by_its_header(tmp_path: Path, night: Callable[..., Path]) -> None:
    write_png(tmp_path / "in" / "small.png", waves(20, 25))
    (tmp_path / "in" / "large.png").write_bytes(png(waves(20, 26))[:60])  # the pixels are not even there
    output = night("--skip-above-megapixels", 0.0005)
    assert outcomes(output) == {"small.png": ("done", ""), "large.png": ("skipped", "large_enough")}
    assert json.loads((output / "small.png.json").read_text())["source"]["height"] == 20


def test_the_eight_orientations_come_out_upright_alike_and_reset(tmp_path: Path, night: Callable[..., Path]) -> None:
    upright = Image.fromarray(waves(12, 20))
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # orientation: the Image.Transpose that undoes it
    for number in range(1, 9):
        exif = Image.Exif()
        exif[274], exif[315] = number, "Ada"
        stored = upright if number == 1 else upright.transpose(Image.Transpose(back[number]))
        stored.save(tmp_path / "in" / f"{number}.png", exif=exif)
        stored.save(tmp_path / "in" / f"{number}.jpg", exif=exif, quality=98)
    output = night()
    first = pixels_of(output / "1.png")
    for number in range(1, 9):
        np.testing.assert_array_equal(pixels_of(output / f"{number}.png"), first)
        with Image.open(output / f"{number}.jpg") as image:
            exif = image.getexif()
            assert (exif.get(274, 1), exif[315], image.size) == (1, "Ada", (80, 48))
            assert np.abs(np.asarray(image).astype(int) - first).mean() < 4


def test_other_exif_and_xmp_are_kept_and_the_file_itself_says_what_made_it(
    tmp_path: Path, night: Callable[..., Path], stub: Path
) -> None:
    exif = Image.Exif()
    exif[270], exif[33432] = "a boat", "Ada Lovelace"
    exif.get_ifd(0x8769)[36867] = "1843:10:01 00:00:00"
    title = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description xmlns:photoshop="http://ns.adobe.com/photoshop/1.0/" photoshop:City="London"/>'
        "</rdf:RDF></x:xmpmeta>"
    )
    text = PngInfo()
    text.add_itxt("XML:com.adobe.xmp", title)
    for name, options in (("a.jpg", {}), ("a.png", {"pnginfo": text}), ("a.webp", {"lossless": True})):
        Image.fromarray(waves(8, 12)).save(tmp_path / "in" / name, exif=exif, xmp=title.encode(), **options)
    output = night()
    digest = json.loads((stub / "config.json").read_text())["digest"]
    for name in ("a.jpg", "a.png", "a.webp"):
        with Image.open(output / name) as image:
            found, xmp = image.getexif(), image.info["xmp"]
            times = found.get_ifd(0x8769)
        packet = xmp if isinstance(xmp, str) else xmp.decode()
        assert (found[270], found[33432], times[36867]) == ("a boat", "Ada Lovelace", "1843:10:01 00:00:00"), name
        assert 'City="London"' in packet and "compositeWithTrainedAlgorithmicMedia" in packet, name
        assert digest in packet and "DiffSR" in packet and "diffusion" in packet, name
        sidecar = json.loads((output / f"{name}.json").read_text())
        assert sidecar["model"]["digest"] == digest and sidecar["fingerprint"] in packet


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    """A model, an LR image of several windows, three samples of it, and how far each is from the LR unprojected."""
    bold = replace(ANCHORED, residual_scale=0.5)  # so that what it draws is many levels
    folder = model_folder(tmp_path_factory.mktemp("model"), bold)
    network, _ = load_model(folder)
    lr = waves(26, 40, phase=1.0)
    digest = hashlib.sha256(png(lr)).hexdigest()
    samples, errors = list[np.ndarray](), list[float]()
    for index in range(3):
        recipe = SamplingRecipe(num_steps=2, tile=16, halo=4, window=16, margin=4, sample_index=index)
        samples.append(Upscaler(network, recipe)(lr, digest=digest).sr)
        free = Upscaler(network, replace(recipe, consistency="off"))(lr, digest=digest).sr
        errors.append(float(np.square(downscale_pixels(free, 4).astype(float) - lr).sum()))
    assert np.argmin(errors) != 0  # or the best would be the first
    return folder, lr, samples, errors


@pytest.mark.parametrize("choice", ["first", "mean", "best"])
def test_of_three_samples_the_choice_is_published_and_the_map_is_numpys_deviation(
    tmp_path: Path, night: Callable[..., Path], drawn: Drawn, choice: str
) -> None:
    model, lr, samples, errors = drawn
    write_png(tmp_path / "in" / "a.png", lr)
    flags = ["--model", model, "--samples", 3, "--choice", choice, "--window", 16, "--margin", 4]
    output = night(*flags)
    stack = np.stack(samples).astype(np.float64)
    wanted = {"first": samples[0], "mean": np.rint(stack.mean(axis=0)), "best": samples[int(np.argmin(errors))]}
    found = pixels_of(output / "a.png").astype(float)
    assert np.abs(found - wanted[choice]).max() <= (0 if choice != "mean" else 1)
    assert np.abs(found - wanted[choice]).mean() < 0.01
    deviation = np.sqrt(stack.var(axis=0).mean(axis=2))
    stored = pixels_of(output / "a.png.uncertainty.png")[:, :, 0]
    assert stored.dtype in (np.uint16, np.int32) and deviation.mean() > 1
    np.testing.assert_allclose(stored / 256, deviation, atol=1 / 256)
    sidecar = json.loads((output / "a.png.json").read_text())
    assert sidecar["metrics"]["uncertainty"] == pytest.approx(deviation.mean(), rel=1e-4)
    assert sidecar["output"]["uncertainty"]["key"] == "a.png.uncertainty.png"


def test_the_frames_of_a_folder_share_their_noise_where_that_is_asked_for(
    tmp_path: Path, night: Callable[..., Path], drawn: Drawn
) -> None:
    model, still = drawn[0], Image.fromarray(waves(16, 20))
    for folder in ("clip", "other"):
        (tmp_path / "in" / folder).mkdir()
        still.save(tmp_path / "in" / folder / "0.png", compress_level=0)
        still.save(tmp_path / "in" / folder / "1.png", compress_level=9)
    output = night("--model", model, "--noise", "folder")
    first, second, other = (pixels_of(output / name) for name in ("clip/0.png", "clip/1.png", "other/0.png"))
    np.testing.assert_array_equal(first, second)  # other file bytes, the same pixels
    assert (first != other).any()
    output = night("--model", model)  # by content: another file, another noise
    assert (pixels_of(output / "clip/0.png") != pixels_of(output / "clip/1.png")).any()

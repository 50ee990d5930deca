"""Laws of the hostile corpus: each file becomes what the corpus says, and the corpus is what it says it is."""

import io
import tracemalloc
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from pipelines import images, storage
from pipelines.corpus import Original
from pipelines.images import Refused
from pipelines.scenes import SceneSettings, open_scene
from tests import hostile, icc, tiff

needs_rasterio = pytest.mark.skipif(find_spec("rasterio") is None, reason="the extra geo is not installed")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, hostile.Expected]]:
    folder = tmp_path_factory.mktemp("hostile")
    return folder, hostile.make(folder)


def outcome(path: Path) -> str:
    """Return "opens" or the reason code of the refusal."""
    try:
        images.decode(path.read_bytes())
    except Refused as refused:
        assert refused.reason in images.REASONS
        return refused.reason
    return "opens"


def readable(expected: dict[str, hostile.Expected]) -> dict[str, hostile.Expected]:
    """Return the files that a reader can get the bytes of; the others are refused before any decoding."""
    unread = [frozenset({reason}) for reason in ("name_not_utf8", "io_error", "missing")]
    return {name: what for name, what in expected.items() if what not in unread}


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_every_file_opens_or_is_refused_for_an_acceptable_reason(corpus):
    folder, expected = corpus
    wrong = {}
    for name, what in readable(expected).items():
        acceptable = {"opens"} if isinstance(what, str) else what
        if name in hostile.DEEP:
            acceptable = {"unsupported_mode"}  # of an 8-bit picture; what a scene makes of it is the job's business
        if (found := outcome(folder / name)) not in acceptable:
            wrong[name] = (found, what)
    assert wrong == {}


@needs_rasterio
def test_as_a_scene_every_file_that_is_to_be_done_opens_and_the_others_are_refused_alike(corpus):
    folder, expected = corpus
    wrong = {}
    for name, what in readable(expected).items():
        data = (folder / name).read_bytes()
        original = Original(storage.digest_bytes(data), len(data), data, None)
        try:
            with open_scene(original, settings=SceneSettings()) as scene:
                pixels, valid = scene.window(0, 0, scene.height, scene.width)
            found = "opens"
            deep = pixels.dtype != np.uint8
            assert deep == (name in hostile.DEEP) and (valid is None or (~valid).any()), name
        except Refused as refused:
            found = refused.reason
        # A float raster opens; that its range must be declared is the job's to say.
        if found != "opens" if isinstance(what, str) or name == "float.tif" else found not in what:
            wrong[name] = (found, what)
    assert wrong == {}


def test_the_corpus_is_large_and_its_listing_is_what_it_returns(corpus):
    folder, expected = corpus
    listed = {item.key for item in storage.list_objects(str(folder), suffixes=images.SUFFIXES)}
    assert {key.encode(errors="backslashreplace").decode() for key in listed} == set(expected)
    refused = [what for what in expected.values() if not isinstance(what, str)]
    assert len(refused) >= 20 and len(expected) - len(refused) >= 60
    assert {what for what in expected.values() if isinstance(what, str)} == {hostile.DONE, hostile.SKIPPED}


def test_no_two_good_files_show_the_same_picture(corpus):
    folder, expected = corpus
    done = [name for name, what in expected.items() if what == hostile.DONE and name not in hostile.DEEP]
    small = []
    for name in done:
        grey = Image.fromarray(images.decode((folder / name).read_bytes()).pixels.mean(axis=2).astype(np.uint8))
        small.append(np.asarray(grey.resize((9, 8), Image.Resampling.BOX), np.int16))
    bits = np.diff(np.array(small), axis=2).reshape(len(done), -1) > 0
    distances = (bits[:, None] != bits[None]).sum(axis=2) + 64 * np.eye(len(done), dtype=int)
    assert distances.min() > 8, [done[i] for i in np.unravel_index(distances.argmin(), distances.shape)]


def test_upright_the_red_corner_is_at_the_top_left_and_nowhere_else(corpus):
    folder, expected = corpus
    for name in [name for name in expected if name.startswith("orientation")]:
        picture = images.decode((folder / name).read_bytes())
        assert picture.pixels.shape == (hostile.HEIGHT, hostile.WIDTH, 3), name
        red = np.abs(picture.pixels.astype(int) - hostile.RED).max(axis=2) < 30
        side = hostile.CORNER
        assert red[: side - 1, : side - 1].all() and red.sum() < (side + 1) ** 2, name


def test_no_bomb_costs_memory(corpus):
    folder, _ = corpus
    tracemalloc.start()
    for name in ("60000 by 60000.png", "60000 by 60000.gif", "65000 by 65000.jpg"):
        assert outcome(folder / name) == "too_large"
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 5_000_000


def test_the_corpus_is_the_same_bytes_every_time(corpus, tmp_path):
    folder, expected = corpus
    assert hostile.make(tmp_path) == expected
    for name in readable(expected):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def converted(rgb: tuple[int, ...], profile: bytes, *, mode: str = "RGB") -> tuple[int, ...]:
    """Return a colour in sRGB, by LittleCMS with its own sRGB profile."""
    image = Image.new(mode, (1, 1), rgb)
    target = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    out = ImageCms.profileToProfile(image, io.BytesIO(profile), target, renderingIntent=1, outputMode="RGB")
    assert out is not None
    return tuple(int(value) for value in np.asarray(out)[0, 0])


@pytest.mark.parametrize(("name", "rgb", "srgb"), [
    ("sRGB", (12, 130, 250), (12, 130, 250)),
    ("Display P3", (234, 51, 35), (255, 0, 0)),  # CSS Color 4: color(display-p3 0.9175 0.2003 0.1386) is sRGB red
    ("Display P3", (128, 128, 128), (128, 128, 128)),  # the same curve and white
    ("Adobe RGB", (219, 0, 0), (255, 0, 0)),  # sRGB red is 219 of its red: (0.7152) ^ (1 / 2.2) * 255, by the matrices
    ("Adobe RGB", (128, 128, 128), (128, 128, 128)),  # 0.502 ^ 2.2 = 0.2195, in the sRGB curve 0.5058: 129 at most
])  # fmt: skip
def test_a_made_profile_means_the_colours_of_its_space(name, rgb, srgb):
    np.testing.assert_allclose(converted(rgb, icc.rgb_profile(name)), srgb, atol=2)


@pytest.mark.parametrize(("inks", "lightness"), [((0, 0, 0), 100), ((255, 255, 255), 23)])
def test_the_made_press_prints_paper_and_the_overprint_of_three_inks_as_their_lab_says(inks, lightness):
    grey = np.array(converted((*inks, 0), icc.cmyk_profile(), mode="CMYK"))
    np.testing.assert_allclose(116 * icc.srgb_curve(grey / 255) ** (1 / 3) - 16, lightness, atol=0.5)
    assert max(converted((*inks, 255), icc.cmyk_profile(), mode="CMYK")) < grey.min() / 2


@pytest.mark.parametrize("tile", [0, 16])
@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("bands", [1, 3])
def test_a_made_tiff_is_read_back_by_pillow(tmp_path, tile, deflate, bands):
    pixels = np.random.default_rng(3).integers(0, 256, (40, 56, bands), dtype=np.uint8)
    padded = np.pad(pixels, ((0, 8), (0, 8), (0, 0)))
    tiles = [padded[y : y + 16, x : x + 16] for y in range(0, 40, 16) for x in range(0, 56, 16)]
    blocks = tiles if tile else [pixels[y : y + 12] for y in range(0, 40, 12)]
    tiff.write_tiff(tmp_path / "a.tif", blocks, height=40, width=56, tile=tile, deflate=deflate)
    with Image.open(tmp_path / "a.tif") as image:
        np.testing.assert_array_equal(np.asarray(image).reshape(pixels.shape), pixels)
    with pytest.raises(ValueError, match="blocks"):
        tiff.write_tiff(tmp_path / "b.tif", blocks[:-1], height=40, width=56, tile=tile)


@needs_rasterio
@pytest.mark.parametrize("name", ["rgb 16 bit.tif", "rgb 16 bit.png", "grey 16 bit.png", "float.tif"])
def test_the_deep_files_hold_the_samples_that_they_claim(corpus, name):
    import rasterio

    with pytest.warns(rasterio.errors.NotGeoreferencedWarning), rasterio.open(corpus[0] / name) as raster:
        assert (raster.height, raster.width) == (hostile.HEIGHT, hostile.WIDTH)
        assert set(raster.dtypes) == {"float32" if name == "float.tif" else "uint16"}
        samples = raster.read()
    assert len(np.unique(samples[:, ::3, ::3])) > 400
    if name.startswith("rgb"):
        corner = samples[:, : hostile.CORNER, : hostile.CORNER].reshape(3, -1) // 257
        np.testing.assert_array_equal(corner.T, np.broadcast_to(hostile.RED, (hostile.CORNER**2, 3)))

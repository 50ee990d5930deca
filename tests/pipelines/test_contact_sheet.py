"""Laws of pipelines.contact_sheet: the worst and a fair sample are chosen, and each crop shows the same place truly."""

import heapq
import io
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
import tifffile
from nights import dead, done, skipped, table
from PIL import Image, ImageCms

from pipelines import contact_sheet, storage
from pipelines.contact_sheet import CROP_PX, DOUBT_LEVELS, choose, draw, draw_groups, most_detailed
from pipelines.profiles import WorkingSpace
from pipelines.scenes import SceneSettings
from tests.icc import rgb_profile

NATIVE = SceneSettings(space=WorkingSpace("native"), first_page=True)
RANDOM = np.random.default_rng(8)


def random_table(count=400):
    values = RANDOM.normal(50, 3, count), RANDOM.gamma(2, 1, count), RANDOM.random(count)
    made = [
        done(f"k{i:03d}", lr_psnr=round(float(a)), colour_drift=float(b), seconds=float(c))
        for i, (a, b, c) in enumerate(zip(*values, strict=True))
    ]
    made[3] = done("k003", lr_psnr=float("nan"), colour_drift=float("inf"))
    return made + [dead("dead", "decode", "corrupt"), skipped("s", "large_enough"), done("bare", seconds=0.0)]


def test_the_worst_by_each_metric_are_those_that_a_sort_gives():
    receipts = random_table()
    groups = {
        title: [row["key"] for row in rows] for title, _, rows in choose(table(receipts), worst=4, sample=0, seed=0)
    }
    measured = [r for r in receipts if r.status == "done" and r.key not in ("k003", "bare")]
    assert groups == {
        "Lowest LR-PSNR": [r.key for r in sorted(measured, key=lambda r: (r.metrics["lr_psnr"], r.key))[:4]],
        "Largest colour drift": [r.key for r in sorted(measured, key=lambda r: -r.metrics["colour_drift"])[:4]],
        "Slowest": [r.key for r in sorted(receipts[:400], key=lambda r: (-r.seconds, r.key))[:4]],
    }


def test_the_sample_is_of_the_smallest_hashes_of_seed_and_key_of_what_was_done():
    receipts = random_table()
    keys = [r.key for r in receipts if r.status == "done"]
    for seed in (0, 1):
        expected = heapq.nsmallest(12, keys, key=lambda k: blake2b(f"{seed}\0{k}".encode(), digest_size=8).digest())
        title, _, rows = choose(table(receipts), worst=0, sample=12, seed=seed)[-1]
        assert title == "A sample" and [row["key"] for row in rows] == expected


def test_what_is_shown_does_not_depend_on_the_order_of_the_receipts():
    rows = table(random_table())
    turned = rows.take(np.random.default_rng(2).permutation(rows.num_rows))
    first, second = ([(t, [r["key"] for r in found]) for t, _, found in choose(r, worst=4, sample=12, seed=3)]
                     for r in (rows, turned))  # fmt: skip
    assert first == second and sum(len(keys) for _, keys in first) == 24


class Place:
    """A source and an output with one asset in each."""

    def __init__(self, root: Path) -> None:
        self.source, self.output = root / "in", root / "out"
        self.source.mkdir(parents=True)
        self.output.mkdir()

    def add(self, key: str, lr: bytes, sr: bytes, uncertainty: np.ndarray | None = None) -> None:
        (self.source / key).write_bytes(lr)
        (self.output / key).write_bytes(sr)
        if uncertainty is not None:
            Image.fromarray(uncertainty).save(self.output / f"{key}.uncertainty.png", "PNG")

    def draw(self, key: str, *, reason: str = "", settings: SceneSettings = NATIVE, **metrics: float):
        etag = storage.content_etag((self.source / key).read_bytes())
        row = {
            "key": key,
            "etag": etag,
            "size": 1,
            "out_key": key,
            "reason": reason,
            "metrics": metrics,
            "seconds": 1.0,
        }
        return draw(str(self.source), str(self.output), row, settings=settings)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def file(pixels: np.ndarray, format: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[-1] == 1 else pixels).save(out, format, **options)
    return out.getvalue()


def tiles(strip) -> dict[str, np.ndarray]:
    assert strip.message == ""
    return {tile.label: np.asarray(Image.open(io.BytesIO(tile.png))) for tile in strip.tiles}


def test_the_tiles_are_the_same_place_at_the_same_size(place):
    lr = RANDOM.integers(113, 143, (70, 90, 3), np.uint8)
    lr[20:68, 31:79] = RANDOM.integers(0, 256, (48, 48, 3))  # the detail is here
    sr = RANDOM.integers(0, 256, (280, 360, 3), np.uint8)
    place.add("a.png", file(lr), file(sr))
    strip = place.draw("a.png")
    found = tiles(strip)
    y, x, height, width = strip.place
    assert (height, width) == (CROP_PX, CROP_PX) and abs(y - 20) <= 2 and abs(x - 31) <= 2
    assert list(found) == ["LR", "bicubic", "SR"] and {tile.shape for tile in found.values()} == {(192, 192, 3)}
    np.testing.assert_array_equal(found["LR"], lr[y : y + 48, x : x + 48].repeat(4, 0).repeat(4, 1))
    np.testing.assert_array_equal(found["SR"], sr[4 * y : 4 * y + 192, 4 * x : 4 * x + 192])
    whole = np.asarray(contact_sheet.bicubic(lr, 4))[4 * y : 4 * y + 192, 4 * x : 4 * x + 192]
    np.testing.assert_array_equal(found["bicubic"], whole)  # a margin makes the crop's that of the whole image


def test_the_place_is_that_of_the_highest_uncertainty_where_there_is_a_map(place):
    lr = RANDOM.integers(0, 256, (120, 150, 1), np.uint8)
    doubt = np.zeros((480, 600), np.uint16)
    doubt[4 * 60 : 4 * 108, 4 * 90 : 4 * 138] = 256 * DOUBT_LEVELS
    place.add("a.png", file(lr), file(lr.repeat(4, 0).repeat(4, 1)), doubt)
    strip = place.draw("a.png", uncertainty=3.0)
    assert strip.place == (60, 90, 48, 48)
    brightest = tiles(strip)["uncertainty"]
    assert (brightest == brightest[0, 0]).all() and brightest[0, 0].tolist() == [252, 255, 164]
    assert "uncertainty" not in tiles(place.draw("a.png"))  # not measured this night: an old map is not shown
    (place.output / "a.png.uncertainty.png").unlink()
    assert "uncertainty" not in tiles(place.draw("a.png", uncertainty=3.0))


@pytest.mark.parametrize(("height", "width", "scale"), [(1, 1, 4), (7, 3, 4), (60, 20, 2), (50, 60, 3), (40, 40, 8)])
def test_any_size_and_scale_gives_tiles_of_one_size_that_can_be_seen(place, height, width, scale):
    lr = RANDOM.integers(0, 256, (height, width, 3), np.uint8)
    sr = lr.repeat(scale, 0).repeat(scale, 1)
    place.add("a.png", file(lr), file(sr.reshape(height * scale, width * scale, 3)))
    found = tiles(place.draw("a.png"))
    assert len({tile.shape for tile in found.values()}) == 1
    assert 128 < max(found["SR"].shape) <= 256
    np.testing.assert_array_equal(found["LR"], found["SR"])  # repeated pixels beside repeated pixels


def test_sixteen_bits_are_shown_by_their_upper_byte(place):
    lr = RANDOM.integers(0, 65536, (20, 24, 3), np.uint16)
    sr = lr.repeat(4, 0).repeat(4, 1)
    for key, data in (("in/a.tif", lr), ("out/a.tif", sr)):
        tifffile.imwrite(place.source.parent / key, data, photometric="rgb")
    found = tiles(place.draw("a.tif"))
    shown = (lr >> 8).astype(np.uint8).repeat(8, 0).repeat(8, 1)
    np.testing.assert_array_equal(found["LR"], shown)
    np.testing.assert_array_equal(found["SR"], shown)


def test_colours_are_those_of_the_profile(place):
    icc = rgb_profile("Display P3")
    lr = RANDOM.integers(0, 256, (24, 24, 3), np.uint8)
    sr = lr.repeat(4, 0).repeat(4, 1)
    place.add("a.png", file(lr, icc_profile=icc), file(sr, icc_profile=icc))
    found = tiles(place.draw("a.png"))
    srgb = ImageCms.createProfile("sRGB")
    expected = ImageCms.profileToProfile(Image.fromarray(lr), io.BytesIO(icc), srgb, outputMode="RGB")
    assert np.abs(np.asarray(expected).astype(int) - lr).max() > 20  # it is another picture without
    for name in ("LR", "SR"):
        difference = found[name][::8, ::8].astype(int) - np.asarray(expected)
        assert np.abs(difference).max() <= 1, name


def test_what_is_transparent_is_shown_over_grey_in_every_tile(place):
    lr = np.zeros((24, 24, 4), np.uint8)
    lr[:, :, 0], lr[:, 12:, 3] = 255, 255
    place.add("a.png", file(lr), file(lr.repeat(4, 0).repeat(4, 1)))
    for tile in tiles(place.draw("a.png")).values():
        assert tile[5, 5].tolist() == [128, 128, 128] and tile[5, -5].tolist() == [255, 0, 0]


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "TIFF", "AVIF"])
def test_every_format_of_results_is_shown(place, format):
    lr = np.full((30, 30, 3), (200, 100, 50), np.uint8)
    place.add("a.png", file(lr), file(lr.repeat(2, 0).repeat(2, 1), format))
    assert np.abs(tiles(place.draw("a.png"))["SR"].astype(int) - (200, 100, 50)).max() <= 3


def test_a_rejected_result_is_called_what_it_is(place):
    lr = np.zeros((8, 8, 1), np.uint8)
    place.add("a.png", file(lr), file(lr))
    assert list(tiles(place.draw("a.png", reason="rejected"))) == ["LR", "bicubic", "bicubic, published instead"]


def test_what_cannot_be_shown_says_why_and_is_no_error(place):
    lr = np.zeros((8, 8, 1), np.uint8)
    names = ("gone", "lost", "odd", "broken", "changed", "a.png[page=2]", "fine")
    for key in names:
        place.add(key, file(lr), file(lr.repeat(2, 0).repeat(2, 1)))
    etags = {key: storage.content_etag((place.source / key).read_bytes()) for key in names}
    (place.source / "gone").unlink()
    (place.output / "lost").unlink()
    (place.output / "odd").write_bytes(file(np.zeros((17, 16, 1), np.uint8)))
    (place.output / "broken").write_bytes(b"<html>")
    (place.source / "changed").write_bytes(file(lr + 1))
    receipts = [done(key, etag=etags[key], lr_psnr=1.0) for key in names]
    receipts.append(done("../up", lr_psnr=1.0))
    groups = draw_groups(str(place.source), str(place.output), table(receipts), worst=0, sample=20)
    strips = {strip.key: strip for strip in groups[-1].strips}
    assert len(strips) == 8
    said = {"gone": "missing", "lost": "No such file", "odd": "no multiple", "broken": "not in a known format",
            "changed": "source_changed", "../up": "bad_name"}  # fmt: skip
    for key, words in said.items():
        assert words in strips[key].message and not strips[key].tiles, key
    assert strips["fine"].tiles and strips["a.png[page=2]"].tiles  # of a name no option is read


def test_each_asset_is_drawn_once_and_named_where_it_belongs_too(place):
    lr = np.zeros((4, 4, 1), np.uint8)
    receipts = []
    for i in range(6):
        place.add(f"{i}.png", file(lr), file(lr))
        etag = storage.content_etag(file(lr))
        receipts.append(done(f"{i}.png", etag=etag, lr_psnr=40.0 + i, colour_drift=float(i), seconds=float(i)))
    groups = draw_groups(str(place.source), str(place.output), table(receipts), worst=4)
    assert [[strip.key for strip in group.strips] for group in groups] == [
        ["0.png", "1.png", "2.png", "3.png"], ["5.png", "4.png"], [], [],
    ]  # fmt: skip
    assert [sorted(group.again) for group in groups][1:3] == [["2.png", "3.png"], [f"{i}.png" for i in (2, 3, 4, 5)]]
    assert len(groups[-1].again) == 6


class Recorded:
    """A scene whose windows are counted: 10,000 x 9,000 px, all the detail in one cell."""

    height, width = 9_000, 10_000

    def __init__(self) -> None:
        self.read = 0

    def window(self, y, x, h, w):
        self.read += h * w
        flat = np.full((h, w, 1), 100, np.uint8)
        flat[::2] += 50 * (y > 8_000 and x < 100)
        return flat, None


def test_of_a_large_image_only_a_few_windows_are_read_to_find_detail():
    scene = Recorded()
    assert most_detailed(scene, 48, 48) == (8_952, 0) and scene.read <= 64 * 48 * 48


def test_results_of_a_store_are_copied_and_what_is_too_large_for_that_is_not(monkeypatch):
    pixels = RANDOM.integers(0, 256, (8, 8, 3), np.uint8)
    storage.publish("memory://sheet/in/a.png", file(pixels))
    storage.publish("memory://sheet/out/a.png", file(pixels.repeat(2, 0).repeat(2, 1)))
    row = {"key": "a.png", "etag": storage.look_up("memory://sheet/in/a.png").etag, "size": 1, "out_key": "a.png",
           "reason": "", "metrics": {}, "seconds": 1.0}  # fmt: skip
    found = tiles(draw("memory://sheet/in", "memory://sheet/out", row, settings=NATIVE))
    np.testing.assert_array_equal(found["SR"], pixels.repeat(32, 0).repeat(32, 1))
    monkeypatch.setattr(contact_sheet, "MAX_BYTES", 10)
    assert "too many to be copied" in draw("memory://sheet/in", "memory://sheet/out", row, settings=NATIVE).message

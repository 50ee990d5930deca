"""Laws of pipelines.card: everything that is known of a set is on one page, in words, and no name can break it."""

import contextlib
import hashlib
import io
import json
import re

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_report import HOSTILE, SHOWN, Page, chromium, needs_chromium, pictures, png

from pipelines.card import TILE_PX, DeadLetters, contact_sheet, reading_snippets, write_card
from pipelines.commit import Duplicates, Match
from pipelines.manifest import PAIR_SCHEMA, Manifest, Shard
from pipelines.recipes import recipe_in_words
from pipelines.statistics import BINS, Colours, SplitStatistics, Statistics, aggregate

RECIPE = {
    "format": 1, "scale": 4, "degradation": "bicubic", "patch": 256, "crops": "grid", "max_per_image": 64,
    "min_deviation": 2.0, "duplicates": "set", "hash_distance": 2, "val_share": 0.05, "test_share": 0.005,
    "codec": "webp", "seed": 7, "max_megapixels": 100.0, "max_raster_megapixels": 4000.0, "working_space": "srgb",
    "bands": [], "value_range": None, "lr_source": False, "lr_name": "{key}", "max_misalignment": 0.5,
}  # fmt: skip
SHARDS = [Shard(name=f"data/{n}.parquet", bytes=1_500_000, sha256="0" * 64, splits={"train": 500}) for n in "ab"]
MANIFEST = Manifest(recipe=RECIPE, shards=SHARDS)
RAMP = list(range(BINS))


def split(pairs, sources, **changes):
    sizes = {"hr_megapixels": pairs * 0.065536, "hr_bytes": pairs * 1000, "lr_bytes": pairs * 100}
    return SplitStatistics(pairs=pairs, sources=sources, **sizes | changes)


STATISTICS = Statistics(
    splits={"train": split(1000, 40), "val": split(30, 2), "test": split(4, 1)},
    sizes={"256x256": 1034},
    channels={"1": 1, "3": 1033},
    dtypes={"uint8": 1034},
    formats={"JPEG": 1000, "PNG": 34},
    profiles={"": 34, "Display P3": 1000},
    colours={
        "1": Colours(pixels=65_536, mean=[10.0], deviation=[30.0], histogram=[RAMP]),
        "3": Colours(pixels=67_698_688, mean=[100.04, 127.5, 250.0], deviation=[50.06, 0.0, 20.0],
                     histogram=[RAMP, RAMP[::-1], [62] * BINS]),
    },
)  # fmt: skip
NOTHING = {
    "sources": {},
    "drops": {},
    "dead": [],
    "duplicates": Duplicates({}, 0, []),
    "contact_sheet": b"",
    "provenance": {},
}


def card(**changes):
    arguments = {
        "title": "Pairs of the archive",
        "manifest": MANIFEST,
        "statistics": STATISTICS,
        "sources": {"done": 43, "skipped": 1, "dead": 6, "gone": 2},
        "drops": {"dropped_flat": 900, "dropped_over_limit": 60, "invalid": 0, "too_small": 1},
        "dead": [
            DeadLetters("odd", "sniff", 1, "b.bin", ""),
            DeadLetters("truncated", "decode", 5, "a.jpg", "ends early"),
        ],
        "duplicates": Duplicates({"train": 5, "val": 1}, 0, []),
        "contact_sheet": png(40),
        "provenance": {"source": "s3://archive"},
    }
    return write_card(**arguments | changes)


def words(html):
    return " ".join(Page(html).text.split())


def sections(html):
    return [section["aria-labelledby"] for section in Page(html).all("section")]


def test_the_page_asks_for_nothing_outside_itself():
    html = card(duplicates=Duplicates({}, 1, [Match(("1", "2"), ("a", "b"), ("train", "val"), 0)]))
    page = Page(html)
    assert page.stack == [] and page.scripts == []
    assert "http:" not in html and "https:" not in html and "@import" not in html and "url(" not in html
    for _, attrs in page.elements:
        assert not {"srcset", "action", "data", "poster", "background", "formaction"} & set(attrs)
        assert attrs.get("src", "data:").startswith("data:") and attrs.get("href", "#").startswith("#")
    assert {link["href"][1:] for link in page.all("a")} <= {attrs.get("id") for _, attrs in page.elements}
    assert page.all("meta")[1]["content"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_the_same_set_gives_the_same_bytes_whatever_the_order_of_its_parts():
    assert card() == card()
    turned = Manifest(recipe=dict(reversed(RECIPE.items())), shards=SHARDS[::-1])
    drops = {"too_small": 1, "dropped_over_limit": 60, "dropped_flat": 900}
    dead = [DeadLetters("truncated", "decode", 5, "a.jpg", "ends early"), DeadLetters("odd", "sniff", 1, "b.bin", "")]
    assert card(manifest=turned, drops=drops, dead=dead) == card()


def test_the_set_is_told_in_one_sentence_with_its_digest():
    text = words(card())
    assert "1,034 pairs at ×4 from 43 images: 67.8 megapixels of HR patches, each beside the LR that bicubic" in text
    assert "Of 52 images: 43 used, 1 without a usable patch, 6 refused, 2 gone from the source." in text
    assert MANIFEST.digest in text and "2 Parquet files, 3.0 MB" in text
    twins = Manifest(recipe=RECIPE | {"lr_source": True, "degradation": "twin"}, shards=SHARDS)
    assert "each beside its real LR twin." in words(card(manifest=twins))


def test_each_split_has_its_row():
    assert Page(card()).rows[:5] == [
        ["split", "pairs", "share", "images", "HR megapixels", "HR", "LR"],
        ["train", "1,000", "96.7 %", "40", "65.5", "1.0 MB", "100.0 kB"],
        ["val", "30", "2.9 %", "2", "2.0", "30.0 kB", "3.0 kB"],
        ["test", "4", "0.4 %", "1", "0.3", "4.0 kB", "400 Bytes"],
        ["all", "1,034", "", "43", "67.8", "1.0 MB", "103.4 kB"],
    ]
    unknown = {name: split(4, 1, hr_bytes=None, lr_bytes=None) for name in ("train", "val", "test")}
    page = Page(card(statistics=Statistics(**vars(STATISTICS) | {"splits": unknown})))
    assert page.rows[1] == ["train", "4", "33.3 %", "1", "0.3"]


def test_what_was_left_out_is_told_with_reason_count_and_share():
    page = Page(card())
    assert page.rows[5:] == [
        ["why", "patches", "share"],
        ["flat: next to nothing to see in them", "900", "45.0 %"],
        ["over the number of patches that one image may give", "60", "3.0 %"],
        ["near copy of a patch of another image", "6", "0.3 %"],
    ]
    text = words(card())
    assert "the 2,000 patches that the images hold" in text and "1 image is smaller than one patch." in text
    assert "5 × decode: truncated the data ends before the picture does for example a.jpg ends early" in text
    assert "1 × sniff: odd for example b.bin" in text
    assert text.index("5 × decode") < text.index("1 × sniff")
    assert "new_reason 4 0.4 %" in " ".join(" ".join(row) for row in Page(card(drops={"new_reason": 4})).rows)


def test_a_status_without_a_name_is_an_error_and_not_left_out():
    with pytest.raises(ValueError, match="status is 'lost'"):
        card(sources={"lost": 1})


def test_leaks_are_a_warning_only_where_there_are_some():
    assert "leaks" not in sections(card())
    html = card(duplicates=Duplicates({}, 1, [Match(("1", "2"), ("a.png", "b.png"), ("train", "test"), 2)]))
    assert sections(html)[0] == "leaks"
    assert "1 near copy lies across splits" in words(html)
    assert re.search(r"train: a\.png\s*test: b\.png\s*2 of 64 bits differ", words(html))
    assert "7 near copies lie across splits" in words(card(duplicates=Duplicates({}, 7, [])))


def test_what_is_empty_has_no_section():
    assert sections(card()) == ["splits", "sheet", "colours", "kinds", "recipe", "drops", "dead", "read", "provenance"]
    assert sections(card(**NOTHING)) == ["splits", "colours", "kinds", "recipe", "read"]
    empty = card(**NOTHING, statistics=aggregate([]), manifest=Manifest(recipe=RECIPE, shards=[]))
    assert sections(empty) == ["recipe"] and "0 pairs at ×4 from 0 images" in words(empty)


def test_a_chart_draws_the_histogram_the_mean_and_the_deviation():
    html = card()
    page = Page(html)
    paths = [path["d"] for path in page.all("path")]
    assert len(paths) == 4
    for path, counts, highest in zip(paths, [RAMP, RAMP, RAMP[::-1], [62] * BINS], [31, 62, 62, 62], strict=True):
        bars = re.findall(r"M(\d+) 100V([\d.]+)H(\d+)V100Z", path)
        assert [(int(a), int(b)) for a, _, b in bars] == [(i, i + 1) for i in range(BINS)]
        heights = [100 - float(top) for _, top, _ in bars]
        np.testing.assert_allclose(heights, [100 * n / highest for n in counts], atol=0.051)
    means = [float(line["x1"]) for line in page.all("line")]
    np.testing.assert_allclose(means, np.array([10, 100.04, 127.5, 250]) / 255 * BINS, atol=0.0051)
    bands = [(float(rect["x"]), float(rect["x"]) + float(rect["width"])) for rect in page.all("rect")]
    ends = np.array([(0, 40), (49.98, 150.1), (127.5, 127.5), (230, 255)]) / 255 * BINS  # cut off at black and white
    np.testing.assert_allclose(bands, ends, atol=0.011)
    assert "R100.0 ± 50.1" in html.replace("</b><span>", "").replace("<b>", "")
    assert "Grey, 0.1 megapixels" in words(html) and "RGB, 67.7 megapixels" in words(html)
    four = Colours(pixels=9, mean=[1.0] * 4, deviation=[0.0] * 4, histogram=[[0] * BINS] * 4)
    text = words(card(statistics=Statistics(**vars(STATISTICS) | {"colours": {"4": four}})))
    assert "4 bands, 0.0 megapixels" in text and "band 4" in text


def test_kinds_are_told_by_share_the_most_frequent_first():
    text = words(card())
    assert "HR size256 × 256 px 100 %" in text and "Samplesuint8 100 %" in text
    assert "Channels3 (RGB) > 99.9 % 1 (grey) < 0.1 %" in text
    assert "File formatJPEG 96.7 % PNG 3.3 %" in text and "Colour profileDisplay P3 96.7 % none 3.3 %" in text
    sizes = {f"{n}x9": n for n in range(1, 12)}
    assert "11 × 9 px" in (text := words(card(statistics=Statistics(**vars(STATISTICS) | {"sizes": sizes}))))
    assert "and 3 more" in text and "3 × 9 px" not in text


def test_the_recipe_is_told_in_words_and_no_setting_is_left_out():
    told = dict(recipe_in_words(RECIPE))
    assert told["Low resolution"] == "made from HR by bicubic"
    assert told["Splits"] == "94.5 % train, 5 % val, 0.5 % test, by a hash of each image's content"
    assert told["Patches"] == "256 × 256 px, cut in a grid without overlap; at most 64 of one image, chosen by hash"
    assert "Bands" not in told and not told.keys() & RECIPE.keys()
    noise = {"name": "noise", "settings": {"noise": [1.0, 30.0], "shot": [0.0, 0.0], "grey": 0.4}}
    other = RECIPE | {"degradation": json.dumps(noise), "bands": [4, 3], "value_range": [0, 10000], "new": [1]}
    told = dict(recipe_in_words(other))
    assert told["Low resolution"] == "made from HR by noise (grey 0.4, noise 1 to 30, shot 0)"
    assert told["Bands"] == "4, 3" and told["new"] == "[1]"
    assert told["Black and white"] == "0 is black and 10000 is white in samples of more than 8 bits"
    twins = dict(recipe_in_words(RECIPE | {"lr_source": True, "degradation": "twin", "lr_name": "{stem}x4.png"}))
    assert twins["Low resolution"].startswith("real twins named {stem}x4.png, refused when")
    assert dict(recipe_in_words({"scale": 2, "patch": 64})) == {
        "Scale": "2 HR pixels per LR pixel along each axis",
        "patch": "64",
    }


@pytest.fixture(scope="module")
def set_with_dropped_rows(tmp_path_factory):
    """Two shards: a source was replaced, and a pair is a near copy. Returns the folder and the ids that count."""
    folder = tmp_path_factory.mktemp("set")
    (folder / "data").mkdir()
    empty = dict.fromkeys(PAIR_SCHEMA.names)
    shards = []
    for name, sources, keys, ids in [("a", "xxyz", ["x"], []), ("b", "xwwv", [], ["b2"])]:
        rows = [empty | {"pair_id": f"{name}{i}", "source_key": key} for i, key in enumerate(sources)]
        path = folder / "data" / f"{name}.parquet"
        pq.write_table(pa.Table.from_pylist(rows, schema=PAIR_SCHEMA), path)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        shards.append(Shard(name=f"data/{name}.parquet", bytes=path.stat().st_size, sha256=sha256,
                            splits={"train": 4}, dropped_sources=keys, dropped_pairs=ids))  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows, schema=PAIR_SCHEMA), folder / "data" / "no_shard_of_the_set.parquet")
    (folder / "manifest.json").write_bytes(Manifest(recipe=RECIPE, shards=shards).to_bytes())
    return folder, ["a2", "a3", "b0", "b1", "b3"]


@pytest.mark.parametrize("dropped", ["some", "none"])
def test_the_lines_on_the_page_read_exactly_the_pairs_that_count(set_with_dropped_rows, tmp_path, dropped):
    folder, wanted = set_with_dropped_rows
    if dropped == "none":
        rows = pq.read_table(folder / "data" / "a.parquet")
        (tmp_path / "data").mkdir()
        pq.write_table(rows, tmp_path / "data" / "a.parquet")
        shard = Shard(name="data/a.parquet", bytes=1, sha256="0", splits={"train": 4})
        (tmp_path / "manifest.json").write_bytes(Manifest(recipe=RECIPE, shards=[shard]).to_bytes())
        folder, wanted = tmp_path, ["a0", "a1", "a2", "a3"]
    snippets = reading_snippets()
    text = Page(card()).text
    assert all(lines in text for lines in snippets.values())
    with contextlib.chdir(folder):
        names: dict = {}
        exec(snippets["pandas"], names)
        assert sorted(names["pairs"].pair_id) == wanted
        found = duckdb.sql(f"SELECT pair_id FROM ({snippets['DuckDB']}) ORDER BY pair_id").fetchall()
        assert [row[0] for row in found] == wanted


def sheet_of(pairs, **options):
    return np.asarray(Image.open(io.BytesIO(contact_sheet(pairs, **options))))


def test_a_contact_sheet_shows_lr_by_repeated_pixels_beside_hr():
    random = np.random.default_rng(3)
    hr, lr = random.integers(0, 256, (96, 96, 3), np.uint8), random.integers(0, 256, (24, 24, 3), np.uint8)
    sheet = sheet_of([(hr, lr)])
    assert sheet.shape == (TILE_PX, 2 * TILE_PX + 2, 4)
    np.testing.assert_array_equal(sheet[:, :TILE_PX, :3], lr.repeat(8, 0).repeat(8, 1))
    np.testing.assert_array_equal(sheet[:, -TILE_PX:, :3], hr.repeat(2, 0).repeat(2, 1))
    assert sheet[:, TILE_PX : TILE_PX + 2, 3].max() == 0 and (sheet[:, :TILE_PX, 3] == 255).all()


def test_large_patches_are_shown_by_the_same_middle_of_lr_and_hr():
    random = np.random.default_rng(4)
    hr, lr = random.integers(0, 256, (256, 320, 1), np.uint8), random.integers(0, 256, (64, 80, 1), np.uint8)
    sheet = sheet_of([(hr, lr)])
    np.testing.assert_array_equal(sheet[:, :TILE_PX, 0], lr.repeat(4, 0).repeat(4, 1)[32:224, 64:256, 0])
    np.testing.assert_array_equal(sheet[:, -TILE_PX:, :3], hr[32:224, 64:256].repeat(3, 2))


def test_pairs_keep_their_order_and_at_most_twenty_four_are_shown():
    pairs = [(np.full((64, 64, 1), 9 * i, np.uint8), np.full((16, 16, 1), 9 * i, np.uint8)) for i in range(27)]
    sheet = sheet_of(pairs)
    step_y, step_x = TILE_PX + 10, 2 * TILE_PX + 12
    assert sheet.shape[:2] == (8 * step_y - 10, 3 * step_x - 10)
    assert sheet[::step_y, ::step_x, 0].ravel().tolist() == [9 * i for i in range(24)]
    assert contact_sheet(pairs) == contact_sheet(pairs) and contact_sheet([]) == b""


@pytest.mark.parametrize(
    ("samples", "value_range", "shown"),
    [
        (np.uint16([0, 5000, 10_000, 60_000]), (0, 10_000), [0, 128, 255, 255]),
        (np.uint16([0, 257, 65_535, 0]), None, [0, 1, 255, 0]),
        (np.float32([-3, -1, 0, 1]), (-1, 1), [0, 0, 128, 255]),
        (np.uint8([0, 9, 200, 255]), (0, 10_000), [0, 9, 200, 255]),
    ],
)
def test_samples_of_other_types_are_shown_by_the_value_range(samples, value_range, shown):
    patch = samples.reshape(2, 2, 1)
    sheet = sheet_of([(patch, patch)], value_range=value_range)
    half = TILE_PX // 2
    assert sheet[::half, :TILE_PX:half, 0].ravel().tolist() == shown


def test_of_many_bands_the_first_three_are_shown_and_of_two_the_first():
    for bands, shown in [(2, [10, 10, 10]), (5, [10, 20, 30])]:
        patch = np.tile(np.uint8([10, 20, 30, 40, 50])[:bands], (4, 4, 1))
        assert sheet_of([(patch, patch)])[0, 0].tolist() == [*shown, 255]


def test_the_contact_sheet_is_embedded_byte_for_byte():
    assert pictures(Page(card())) == [png(40)]


def hostile_card():
    odd = {HOSTILE: 1000, "b": 34}
    return card(
        title=HOSTILE,
        manifest=Manifest(recipe=RECIPE | {"lr_source": True, "lr_name": HOSTILE, HOSTILE: 1}, shards=SHARDS),
        statistics=Statistics(**vars(STATISTICS) | {"formats": odd, "profiles": odd}),
        drops={HOSTILE: 3},
        dead=[DeadLetters(HOSTILE, HOSTILE, 5, HOSTILE, HOSTILE), DeadLetters("odd", "read", 1, "\ud800 lone", "")],
        duplicates=Duplicates({}, 3, [Match(("1", "2"), (HOSTILE, HOSTILE), ("train", "val"), 1)]),
        provenance={HOSTILE: HOSTILE},
    )


def test_hostile_names_stay_text():
    html = hostile_card()
    plain = Page(card(duplicates=Duplicates({}, 1, [Match(("1", "2"), ("a", "b"), ("train", "val"), 0)])))
    page = Page(html)
    assert page.stack == [] and page.scripts == []
    assert {tag for tag, _ in page.elements} == {tag for tag, _ in plain.elements}
    assert {name for _, attrs in page.elements for name in attrs} == {name for _, a in plain.elements for name in a}
    assert page.text.count(SHOWN) == 15
    assert "\u202e" not in html and "\\ud800 lone" in page.text
    assert html.encode()  # a lone surrogate would not encode


@needs_chromium
def test_the_page_is_drawn_in_the_scheme_that_the_reader_prefers(tmp_path):
    shots = {}
    for scheme, number in {"dark": 0, "light": 1}.items():
        to = tmp_path / f"{scheme}.png"
        chromium(tmp_path, card(), f"--blink-settings=preferredColorScheme={number}",
                 "--window-size=900,1600", f"--screenshot={to}")  # fmt: skip
        shots[scheme] = np.asarray(Image.open(to).convert("L")).astype(int)
    dark, light = shots["dark"], shots["light"]
    assert dark[2, 2] < 60 and light[2, 2] > 200
    for shot in (dark, light):
        assert 0.01 < np.mean(np.abs(shot - shot[2, 2]) > 100) < 0.5  # text and pictures, on a background


@needs_chromium
@pytest.mark.parametrize("width", [390, 1200])
def test_no_name_makes_the_page_wider_than_the_window(tmp_path, width):
    tell = "<script>parent.postMessage(document.documentElement.scrollWidth, '*')</script></body>"
    html = hostile_card().replace("</body>", tell).replace("default-src 'none';", "script-src 'unsafe-inline';")
    (tmp_path / "card.html").write_text(html, encoding="utf-8")
    frame = f"""<body><iframe src="card.html" style="border:0;width:{width}px;height:900px"></iframe><script>
      onmessage = event => document.title = event.data</script></body>"""
    printed = chromium(tmp_path, frame, "--window-size=1300,900", "--virtual-time-budget=2000", "--dump-dom")
    assert re.search(r"<title>(\d+)</title>", printed).group(1) == str(width)

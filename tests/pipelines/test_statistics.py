"""Laws of pipelines.statistics: the numbers of a set are those of all its pixels, however it is cut into shards."""

import json

import numpy as np
import pyarrow as pa
import pytest

from pipelines.blobs import encode_blob
from pipelines.manifest import PAIR_SCHEMA
from pipelines.statistics import BINS, COLUMNS, SAMPLE_COLUMNS, aggregate, choose, measure

RANDOM = np.random.default_rng(11)
RANGES = {"uint8": (0, 255), "uint16": (100, 10_000), "float32": (-1.5, 2.5)}


def noise(height, width, channels, dtype="uint8"):
    if dtype == "float32":
        return RANDOM.normal(0.5, 1.5, (height, width, channels)).astype(np.float32)
    top = 12_000 if dtype == "uint16" else 256
    return RANDOM.integers(0, top, (height, width, channels)).astype(dtype)


def oracle(pixels, low, high):
    """NumPy's mean, deviation and histogram of (N, C) samples in levels of 255."""
    levels = (pixels.astype(np.float64) - low) / (high - low) * 255
    histogram = [np.histogram(np.clip(column, 0, 255), BINS, (0, 255))[0] for column in levels.T]
    return levels.mean(axis=0), levels.std(axis=0), np.array(histogram)


@pytest.mark.parametrize("dtype", RANGES)
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 13])
def test_a_patch_is_measured_as_numpy_measures_it(dtype, channels):
    pixels = noise(37, 29, channels, dtype)
    for view in (pixels, pixels[::2, 3:], pixels[:, ::-1], pixels[:1, :1]):
        found = measure(view, value_range=RANGES[dtype])
        mean, deviation, histogram = oracle(view.reshape(-1, channels), *RANGES[dtype])
        np.testing.assert_allclose(found["mean"], mean, rtol=1e-12)
        np.testing.assert_allclose(found["deviation"], deviation, rtol=1e-9, atol=1e-9)
        np.testing.assert_array_equal(np.reshape(found["histogram"], (channels, BINS)), histogram)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_every_level_of_a_whole_range_falls_into_an_equal_part_of_it(dtype):
    top = np.iinfo(dtype).max
    every = np.arange(top + 1, dtype=dtype).reshape(1, -1, 1)
    found = measure(every, value_range=(0, top))
    assert found["histogram"] == [(top + 1) // BINS] * BINS
    assert found["mean"] == [127.5]
    assert found["deviation"] == pytest.approx([255 / top * np.sqrt(((top + 1) ** 2 - 1) / 12)], rel=1e-14)


def test_a_flat_patch_deviates_by_nothing_and_not_by_a_rounding_error():
    for level in (0, 77, 255):
        found = measure(np.full((64, 64, 3), level, np.uint8), value_range=(0, 255))
        assert found["mean"] == [level] * 3 and found["deviation"] == [0.0] * 3


def test_samples_outside_of_the_range_fall_into_the_end_bins():
    pixels = np.float32([-7, 0, 0.5, 1, 9]).reshape(1, 5, 1)
    histogram = measure(pixels, value_range=(0, 1))["histogram"]
    assert (histogram[0], histogram[BINS // 2], histogram[-1], sum(histogram)) == (2, 1, 2, 5)
    histogram = measure(np.uint16([0, 99, 201, 900]).reshape(1, 4, 1), value_range=(100, 200))["histogram"]
    assert (histogram[0], histogram[-1]) == (2, 2)


@pytest.mark.parametrize("value_range", [(1, 1), (2, 1), (0, float("inf")), (float("nan"), 1)])
def test_what_is_no_range_is_a_value_error(value_range):
    with pytest.raises(ValueError, match="value_range"):
        measure(noise(4, 4, 1), value_range=value_range)


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8), np.zeros((4, 4, 3)), np.full((2, 2, 1), np.nan, "f4")],
    ids=["HW", "empty", "float64", "nan"],
)
def test_pixels_that_cannot_be_measured_are_a_value_error(pixels):
    with pytest.raises(ValueError, match="pixels: "):
        measure(pixels, value_range=(0, 1))


def pair(number, pixels, *, split="train", **columns):
    row = dict.fromkeys(PAIR_SCHEMA.names)
    low, high = RANGES[pixels.dtype.name]
    row |= {"pair_id": f"{number * 7919 % 1000:03d}", "source_key": f"{number // 2}.png", "split": split}
    row |= {"hr": encode_blob(pixels, "png"), "lr": b"12345", "hr_h": pixels.shape[0], "hr_w": pixels.shape[1]}
    row |= {"hr_dtype": pixels.dtype.name, "hr_channels": pixels.shape[2], "source_format": "PNG", "source_profile": ""}
    return row | measure(pixels, value_range=(low, high)) | columns


def table(rows):
    return pa.Table.from_pylist(rows, schema=PAIR_SCHEMA)


@pytest.fixture(scope="module")
def pixels():
    """Patches of several sizes, types and numbers of channels, light and dark, so that their means are far apart."""
    sizes = [(16, 16), (8, 24), (40, 4)]
    light = [noise(*sizes[i % 3], 3) // 2 + np.uint8(60 * (i % 3)) for i in range(20)]
    return light + [noise(*sizes[i % 3], 1, "uint16") for i in range(6)] + [noise(9, 9, 4, "float32")]


@pytest.fixture(scope="module")
def rows(pixels):
    return [pair(i, x, split=("train", "val", "test")[0 if i < 20 else 1 + i % 2]) for i, x in enumerate(pixels)]


def test_pooled_colours_are_those_of_all_pixels_together(pixels, rows):
    found = aggregate([table(rows[:3]), table(rows[3:22]), table([]), table(rows[22:])]).colours
    assert list(found) == ["1", "3", "4"]
    for channels, colours in found.items():
        chosen = [x for x in pixels if x.shape[2] == int(channels)]
        every = np.concatenate([x.reshape(-1, int(channels)) for x in chosen])
        mean, deviation, histogram = oracle(every, *RANGES[chosen[0].dtype.name])
        assert colours.pixels == len(every)
        np.testing.assert_allclose(colours.mean, mean, rtol=1e-6)  # a shard keeps float32
        np.testing.assert_allclose(colours.deviation, deviation, rtol=1e-6)
        np.testing.assert_array_equal(colours.histogram, histogram)


def test_counts_are_those_of_the_rows(rows):
    found = aggregate([table(rows[:20]), table(rows[20:])])
    train, val, test = (found.splits[name] for name in ("train", "val", "test"))
    assert (train.pairs, val.pairs, test.pairs, found.pairs) == (20, 4, 3, 27)
    assert (train.sources, val.sources, test.sources) == (10, 4, 3)
    assert train.hr_megapixels == pytest.approx((7 * 256 + 7 * 192 + 6 * 160) / 1e6)
    assert train.hr_bytes == sum(len(row["hr"]) for row in rows[:20]) and test.lr_bytes == 15
    assert found.sizes == {"16x16": 9, "40x4": 8, "8x24": 9, "9x9": 1}
    assert found.channels == {"1": 6, "3": 20, "4": 1}
    assert found.dtypes == {"float32": 1, "uint16": 6, "uint8": 20}
    assert found.formats == {"PNG": 27} and found.profiles == {"": 27}


def test_bytes_are_unknown_without_the_blobs_and_everything_else_is_the_same(rows):
    whole, light = aggregate([table(rows)]).to_json(), aggregate([table(rows).select(COLUMNS)]).to_json()
    for split in light["splits"].values():
        assert split.pop("hr_bytes") is None and split.pop("lr_bytes") is None
    for split in whole["splits"].values():
        assert split.pop("hr_bytes") > 0 and split.pop("lr_bytes") > 0
    assert light == whole


def test_a_row_in_many_chunks_counts_once(rows):
    chunked = pa.concat_tables([table(rows[i : i + 1]) for i in range(len(rows))])
    found, whole = aggregate([chunked]), aggregate([table(rows)])
    assert (found.splits, found.sizes, found.channels) == (whole.splits, whole.sizes, whole.channels)
    for channels in whole.colours:
        np.testing.assert_allclose(found.colours[channels].deviation, whole.colours[channels].deviation, rtol=1e-12)


def test_an_empty_set_is_one_of_zeros_that_json_holds():
    found = aggregate([])
    assert found.pairs == 0 and found.colours == {} and found.splits["train"].hr_bytes == 0
    assert json.loads(json.dumps(found.to_json())) == found.to_json()


def test_a_split_that_there_is_not_is_a_value_error(rows):
    with pytest.raises(ValueError, match=r"split \('extra'\)"):
        aggregate([table([rows[0] | {"split": "extra"}])])


def test_the_chosen_pairs_are_the_smallest_ids_of_the_split_for_any_cut_into_shards(rows):
    wanted = sorted(row["pair_id"] for row in rows if row["split"] == "train")
    for cut in (1, 5, 27):
        shards = [table(rows[i : i + cut]) for i in range(0, len(rows), cut)]
        chosen = choose(iter(shards[::-1]), num=7)
        assert chosen["pair_id"].to_pylist() == wanted[:7] and chosen.column_names == PAIR_SCHEMA.names
    assert choose([table(rows).select(SAMPLE_COLUMNS)])["pair_id"].to_pylist() == wanted
    assert choose([table(rows[20:])]) is None and choose([]) is None

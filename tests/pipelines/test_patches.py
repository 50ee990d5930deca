"""Laws of degradations in pair sets and in scoring: any recipe, recorded, made again from what is recorded."""

import io
import json
from hashlib import sha256

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffsr_core.degradation import DEGRADATIONS, Degradation
from pipelines.blobs import decode_blob
from pipelines.config import fingerprint
from pipelines.crops import shuffled
from pipelines.datasets import Loader, open_dataset
from pipelines.evaluation import EvaluateConfig
from pipelines.images import jpeg_codec
from pipelines.pairs import PairsConfig, make_pairs
from pipelines.promotion import PromoteConfig


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    y, x = np.mgrid[:48, :48]
    for index in range(4):
        waves = 128 + 60 * np.sin((index + 2) * (x + 2 * y) / 9)[..., None] * np.array([1.0, 0.6, -0.8])
        pixels = np.clip(waves + np.random.default_rng(index).normal(0, 12, (48, 48, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels if index else pixels[..., 0]).save(folder / f"{index}.png")
    return folder


def rows_of(source, output, **changes):
    fields = {
        "source": str(source),
        "output": str(output),
        "patch": 16,
        "max_per_image": 3,
        "engine": "local",
        "track": False,
    }
    make_pairs(PairsConfig(**fields, **changes))
    return [row for path in sorted((output / "data").iterdir()) for row in pq.read_table(path).to_pylist()]


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("name", ["blur-bicubic", "noise", "jpeg", "real"])
def test_pairs_of_every_recipe_are_made_again_from_their_columns(source, tmp_path, name, scale):
    rows = rows_of(source, tmp_path / "pairs", degradation=name, scale=scale)
    assert len(rows) == 4 * 3 and {row["scale"] for row in rows} == {scale}
    changed = 0
    for row in rows:
        hr, lr = decode_blob(row["hr"]), decode_blob(row["lr"])
        recipe = Degradation(**json.loads(row["degradation"]))
        assert recipe == Degradation(name, scale)
        assert np.array_equal(recipe.apply(hr, seed=row["degradation_seed"], jpeg=jpeg_codec), lr)
        assert lr.shape == (16 // scale, 16 // scale, hr.shape[2])
        changed += scale > 1 or not np.array_equal(lr, hr)
    assert changed > 9  # a weak blur may leave a patch as it is


def test_settings_reach_the_pairs_and_are_part_of_the_recipe(source, tmp_path):
    text = '{"name": "jpeg", "settings": {"quality": 7}}'
    rows = rows_of(source, tmp_path / "pairs", degradation=text, scale=1)
    assert {row["degradation"] for row in rows} == {'{"name":"jpeg","scale":1,"settings":{"quality":[7.0,7.0]}}'}
    for row in rows:
        assert np.array_equal(jpeg_codec(decode_blob(row["hr"]), 7), decode_blob(row["lr"]))
    recorded = json.loads((tmp_path / "pairs/manifest.json").read_text())["recipe"]["degradation"]
    assert json.loads(recorded) == {"name": "jpeg", "settings": {"quality": [7.0, 7.0]}}


def test_the_recipe_of_bicubic_pairs_has_a_fingerprint_that_stays():
    # Sets that exist hold this fingerprint: another one would make them all again.
    config = PairsConfig(source="a", output="b")
    assert fingerprint(config.recipe(config.space())) == "67f15888d3ce6e0f4b960fb1d12d006b"


@pytest.mark.parametrize("channels", [1, 3])
def test_the_codec_is_that_of_pillow_and_loses_more_at_a_lower_quality(channels):
    y, x = np.mgrid[:24, :31]
    wave = (128 + 90 * np.sin(x * y / 40)).astype(np.uint8)
    pixels = np.repeat(wave[:, :, None], channels, axis=2)
    sink = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(sink, "JPEG", quality=40)
    assert np.array_equal(jpeg_codec(pixels, 40).squeeze(), np.asarray(Image.open(sink)))
    errors = [np.abs(jpeg_codec(pixels, quality).astype(int) - pixels).mean() for quality in (5, 40, 100)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1
    assert jpeg_codec(pixels, 40).shape == pixels.shape and jpeg_codec(pixels, 40).dtype == np.uint8


def test_wrong_recipes_are_refused_by_name_in_each_job():
    for config in (
        lambda text: PairsConfig(source="a", output="b", degradation=text),
        lambda text: EvaluateConfig(model="a", dataset="b", output="c", degradation=text),
        lambda text: PromoteConfig(model="a", dataset="b", degradation=text),
    ):
        for name in DEGRADATIONS:
            config(name)
        with pytest.raises(ValueError, match="degradation is 'jpg': it must be one of"):
            config("jpg")
        with pytest.raises(ValueError, match=r"quality is \[9, 101\]: it must be"):
            config('{"name": "jpeg", "settings": {"quality": [9, 101]}}')
    for scale in (0, 1):
        with pytest.raises(ValueError, match="^scale "):
            PairsConfig(source="a", output="b", scale=scale)


@pytest.mark.parametrize("name", sorted(DEGRADATIONS))
def test_scoring_makes_the_same_lr_for_whoever_asks_and_another_for_other_content(source, name):
    dataset = open_dataset(str(source), split="", degradation=name, scale=2, limit=2)
    recipe = Degradation(name, 2)
    assert dataset.degradation == recipe.to_json()
    seeds = set()
    for item in reversed(dataset.items):
        data = (source / item.key).read_bytes()
        hr = np.atleast_3d(np.asarray(Image.open(io.BytesIO(data))))
        seeds.add(seed := int(sha256(data).hexdigest()[:14], 16))
        lr = Loader(**dataset.loader())({"key": item.key, "etag": item.etag, "place": ""}).lr
        assert np.array_equal(lr, recipe.apply(hr, seed=seed, jpeg=jpeg_codec))
    assert len(seeds) == len(dataset.items) == 2


@pytest.mark.parametrize("count", [1, 2, 3, 16, 17, 100, 1000])
def test_a_shuffle_names_each_number_once_in_an_order_of_its_key(count):
    orders = [list(shuffled(count, key)) for key in ("a", "b")]
    for order in orders:
        assert sorted(order) == list(range(count))
    assert count < 16 or orders[0] != orders[1] != list(range(count))
    assert list(shuffled(count, "a")) == orders[0]


def test_a_shuffle_is_even_and_begins_at_once():
    first = [next(shuffled(4, f"key {index}")) for index in range(4000)]
    assert all(abs(first.count(value) - 1000) < 150 for value in range(4))  # 5 deviations of a binomial
    assert next(shuffled(10**12, "key")) < 10**12

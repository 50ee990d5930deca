"""Pair sets in other hands: pandas, DuckDB, Hugging Face datasets and Pillow read a shard without any code of ours.

The manifest is plain JSON. What they need to know of it is in each test: the names of the shards, and that rows of
`dropped_sources` and `dropped_pairs` do not count.
"""

import io
import json

import datasets
import duckdb
import numpy as np
import pandas
import pyarrow as pa
import pytest
from PIL import Image

from pipelines import shards as module
from pipelines.commit import build_manifest, publish_manifest
from pipelines.ledger import GONE
from pipelines.manifest import PAIR_SCHEMA, SPLITS
from pipelines.shards import ShardWriter
from tests.pipelines.tiny_sets import RECIPE, SCALE, SIDE, HandSet, make_row, noise

SOURCES = {
    "colour.png": {"split": "train"},
    "grey.png": {"split": "train", "channels": 1},
    "scan.tif": {"split": "val", "dtype": np.uint16},
    "bands.tif": {"split": "val", "channels": 5, "dtype": np.float32},
    "gone.png": {"split": "train"},
}


@pytest.fixture(scope="module")
def pixels():
    """HR and LR by pair_id, as they went in."""
    return {}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, pixels):
    """A set of two shards of several row groups, as the job writes them: of each kind of blob, with rows dropped."""
    root = tmp_path_factory.mktemp("set")
    hand = HandSet(root, {**RECIPE, "value_range": [0, 1]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ROW_GROUP_BYTES", 3_000)
        for name in "ab":
            rows = []
            for number, (key, kind) in enumerate(SOURCES.items()):
                options = {key: value for key, value in kind.items() if key != "split"}
                for n in range(3):
                    alike = [number, n, n and ord(name)]  # the first patches of the two shards are copies
                    phash = int(np.random.default_rng(alike).integers(-(2**63), 2**63))
                    hr, lr = noise(number, **options), noise(n, side=SIDE // SCALE, **options)
                    row = make_row(f"{name}-{key}", n, split=kind["split"], hr=hr, lr=lr, phash=phash)
                    pixels[row["pair_id"]] = (hr, lr)
                    rows.append(row)
            with ShardWriter(hand.recipe) as writer:
                writer.add(rows)
                published = writer.publish(f"{root}/data/{name}.parquet")
            fields = {"out_key": f"data/{name}.parquet", "out_bytes": published.bytes, "out_sha256": published.sha256}
            hand.receipts(*[f"{name}-{key}" for key in SOURCES], **fields)
    hand.receipts("a-gone.png", "b-gone.png", status="skipped", stage="list", reason=GONE)
    manifest, _ = build_manifest(str(root), hand.ledger, hand.recipe)
    publish_manifest(str(root), manifest)
    assert all(pa.parquet.ParquetFile(root / shard.name).num_row_groups >= 2 for shard in manifest.shards)
    assert all(shard.dropped_sources for shard in manifest.shards) and manifest.shards[1].dropped_pairs
    return root


@pytest.fixture
def manifest(pairs):
    return json.loads((pairs / "manifest.json").read_bytes())


def counting(frame, shard):
    dropped = frame["source_key"].isin(shard["dropped_sources"]) | frame["pair_id"].isin(shard["dropped_pairs"])
    return frame[~dropped]


def test_pandas_counts_what_the_manifest_counts(pairs, manifest):
    frames = [pandas.read_parquet(pairs / shard["name"]) for shard in manifest["shards"]]
    assert all(list(frame.columns) == PAIR_SCHEMA.names for frame in frames)
    frame = pandas.concat(map(counting, frames, manifest["shards"]))
    counts = frame["split"].value_counts()
    assert {split: counts.get(split, 0) for split in SPLITS} == manifest["pairs"]
    assert frame["pair_id"].is_unique and set(frame["crop"].map(lambda crop: crop["h"])) == {SIDE}


def test_duckdb_counts_what_the_manifest_counts_with_nothing_but_the_json(pairs, manifest):
    rows = duckdb.sql(
        f"""with shard as (select unnest(shards) as s from read_json('{pairs}/manifest.json')),
                 pair as (select * from read_parquet('{pairs}/data/*.parquet', filename = true))
            select split, count(*), min(hr_h), max(crop.x), sum(octet_length(hr)), sum(list_sum(histogram))
            from pair join shard on filename = '{pairs}/' || s.name
            where not list_contains(s.dropped_sources::varchar[], source_key)
              and not list_contains(s.dropped_pairs::varchar[], pair_id) group by all"""
    ).fetchall()
    frame = pandas.concat([counting(pandas.read_parquet(pairs / s["name"]), s) for s in manifest["shards"]])
    assert sorted(rows) == sorted(
        (split, manifest["pairs"][split], of["hr_h"].min(), max(crop["x"] for crop in of["crop"]),
         of["hr"].map(len).sum(), of["histogram"].map(sum).sum()) for split, of in frame.groupby("split")
    )  # fmt: skip


def test_hugging_face_datasets_reads_every_column_and_counts_what_the_manifest_counts(pairs, manifest, tmp_path):
    names = [str(pairs / shard["name"]) for shard in manifest["shards"]]
    dataset = datasets.Dataset.from_parquet(names, cache_dir=str(tmp_path))
    assert dataset.column_names == PAIR_SCHEMA.names
    dropped = {
        name for shard in manifest["shards"] for kind in ("sources", "pairs") for name in shard[f"dropped_{kind}"]
    }
    kept = dataset.filter(lambda row: row["source_key"] not in dropped and row["pair_id"] not in dropped)
    assert {split: kept["split"][:].count(split) for split in SPLITS} == manifest["pairs"]
    stored = pa.concat_tables([pa.parquet.read_table(name) for name in names]).to_pylist()
    assert [dict(row) for row in dataset] == stored


def test_hugging_face_datasets_streams_a_shard(pairs, manifest, tmp_path):
    name = str(pairs / manifest["shards"][0]["name"])
    stream = datasets.load_dataset("parquet", data_files=name, split="train", streaming=True, cache_dir=str(tmp_path))
    assert [row["pair_id"] for row in stream] == pa.parquet.read_table(name)["pair_id"].to_pylist()


def test_blobs_are_pictures_for_pillow_or_arrays_for_numpy_behind_zstd(pairs, manifest, pixels):
    codecs = set()
    for shard in manifest["shards"]:
        for row in pandas.read_parquet(pairs / shard["name"]).to_dict("records"):
            for side, expected in zip(("hr", "lr"), pixels[row["pair_id"]], strict=True):
                blob, codec = row[side], row[f"{side}_codec"]
                if codec == "npy+zstd":
                    found = np.load(io.BytesIO(pa.input_stream(io.BytesIO(blob), compression="zstd").read()))
                else:
                    picture = Image.open(io.BytesIO(blob))
                    assert picture.format.lower() == codec
                    found = np.asarray(picture).reshape(*picture.size[::-1], -1)
                assert found.dtype == expected.dtype and np.array_equal(found, expected)
                assert found.shape[:2] == (row[f"{side}_h"], row[f"{side}_w"])
                codecs.add(codec)
    assert codecs == {"webp", "png", "npy+zstd"}

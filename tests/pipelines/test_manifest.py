"""Laws of pipelines.manifest: it names one content, is found in each of its forms, and is refused when edited."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pytest

from pipelines.commit import publish_manifest
from pipelines.manifest import (
    Manifest,
    Shard,
    columns_that_decide,
    load_manifest,
    manifest_uri,
    root_of,
    rows_that_count,
)

SHARD = Shard(name="data/a.parquet", bytes=9, sha256="0", splits={"train": 2, "val": 1}, dropped_sources=["x", "y"],
              dropped_pairs=["p", "q"])  # fmt: skip
OTHER = dataclasses.replace(SHARD, name="data/b.parquet", dropped_pairs=[])
DIGEST = "0123456789abcdef" * 4


def test_the_digest_changes_with_anything_that_the_manifest_says():
    base = Manifest(recipe={"scale": 4}, shards=[SHARD])
    changes = {"name": "data/b.parquet", "bytes": 8, "sha256": "1", "splits": {"train": 3, "val": 1}}
    changes |= {"dropped_sources": ["x"], "dropped_pairs": ["p"]}
    assert set(changes) == {field.name for field in dataclasses.fields(Shard)}
    others = [Manifest(recipe={"scale": 4}, shards=[dataclasses.replace(SHARD, **{k: v})]) for k, v in changes.items()]
    others += [Manifest(recipe={"scale": 2}, shards=[SHARD]), Manifest(recipe={"scale": 4}, shards=[])]
    others += [Manifest(recipe={"scale": 4}, shards=[SHARD, OTHER])]
    swapped = dataclasses.replace(SHARD, dropped_sources=SHARD.dropped_pairs, dropped_pairs=SHARD.dropped_sources)
    others += [Manifest(recipe={"scale": 4}, shards=[swapped])]
    assert len({base.digest, *(other.digest for other in others)}) == len(others) + 1


def test_neither_the_digest_nor_the_bytes_depend_on_any_order():
    flipped = Shard(name="data/a.parquet", bytes=9, sha256="0", splits={"val": 1, "train": 2},
                    dropped_sources=["y", "x"], dropped_pairs=["q", "p"])  # fmt: skip
    one, two = (
        Manifest(recipe={"a": 1, "b": 2}, shards=[SHARD, OTHER]),
        Manifest(recipe={"b": 2, "a": 1}, shards=[OTHER, flipped]),
    )
    assert one.digest == two.digest and one.to_bytes() == two.to_bytes()


@pytest.mark.parametrize(
    ("pairs", "root", "uri"),
    [
        ("sets/a", "sets/a", "sets/a/manifest.json"),
        ("sets/a/", "sets/a/", "sets/a/manifest.json"),
        ("sets/a/manifest.json", "sets/a", "sets/a/manifest.json"),
        ("manifest.json", ".", "manifest.json"),
        ("/manifest.json", "/", "/manifest.json"),
        (f"manifests/{DIGEST}.json", ".", f"manifests/{DIGEST}.json"),
        (f"s3://b/x/manifests/{DIGEST}.json", "s3://b/x", f"s3://b/x/manifests/{DIGEST}.json"),
        (f"s3://b/manifests/{DIGEST}.json", "s3://b", f"s3://b/manifests/{DIGEST}.json"),
        ("sets/manifests", "sets/manifests", "sets/manifests/manifest.json"),
        ("sets/a.json", "sets/a.json", "sets/a.json/manifest.json"),
        (f"sets/{DIGEST}.json", f"sets/{DIGEST}.json", f"sets/{DIGEST}.json/manifest.json"),
        ("manifests/abc.json", "manifests/abc.json", "manifests/abc.json/manifest.json"),
        ("sets/no-manifest.json", "sets/no-manifest.json", "sets/no-manifest.json/manifest.json"),
    ],
)
def test_a_set_is_its_folder_or_one_of_its_manifests(pairs, root, uri):
    assert (root_of(pairs), manifest_uri(pairs)) == (root, uri)


def test_every_committed_manifest_stays_readable_and_the_folder_means_the_newest(tmp_path):
    old, new = Manifest(recipe={"scale": 4}, shards=[SHARD]), Manifest(recipe={"scale": 2}, shards=[SHARD, OTHER])
    root = str(tmp_path)
    uris = [publish_manifest(root, manifest) for manifest in (old, new)]
    assert uris == [f"{root}/manifests/{manifest.digest}.json" for manifest in (old, new)]
    for form in (root, f"{root}/", f"{root}/manifest.json", uris[1]):
        assert load_manifest(form) == new
    assert load_manifest(uris[0]) == old
    assert (tmp_path / "manifest.json").read_bytes() == new.to_bytes()


def test_a_manifest_is_refused_when_anything_in_it_was_edited(tmp_path):
    manifest = Manifest(recipe={"scale": 4}, shards=[SHARD, OTHER])
    kept = publish_manifest(str(tmp_path), manifest)
    text = (tmp_path / "manifest.json").read_text()
    document = json.loads(text)
    edits = [("recipe", {"scale": 4, "seed": 9}), ("shards", document["shards"][1:]), ("format", 1)]
    edits += [("shards", 3), ("shards", [3]), ("shards", [{}]), ("digest", "0"), ("recipe", None)]
    values = {"splits": {"train": 1}, "sha256": "0000", "dropped_sources": ["0"], "bytes": 1, "dropped_pairs": ["z"]}
    for field, value in {**values, "name": "b", "unknown": 1}.items():
        edits.append(("shards", [{**document["shards"][0], field: value}, *document["shards"][1:]]))
    for name, value in edits:
        for path in (tmp_path / "manifest.json", tmp_path / "manifests" / f"{manifest.digest}.json"):
            path.write_text(json.dumps({**document, name: value}))
            with pytest.raises(ValueError, match="make the set again"):
                load_manifest(str(path))
    for broken in ("", "[]", "3", "{}", text[:-1], "\0"):
        (tmp_path / "manifest.json").write_text(broken)
        with pytest.raises(ValueError, match="must be one that make_pairs.py wrote"):
            load_manifest(str(tmp_path))
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ValueError, match="must hold a manifest.json"):
        load_manifest(str(tmp_path))
    (tmp_path / "manifests" / f"{manifest.digest}.json").unlink()
    with pytest.raises(ValueError, match="must exist"):
        load_manifest(kept)


def test_a_manifest_under_the_name_of_another_is_refused(tmp_path):
    manifest = Manifest(recipe={"scale": 4}, shards=[SHARD])
    publish_manifest(str(tmp_path), manifest)
    (tmp_path / "manifests" / f"{DIGEST}.json").write_bytes(manifest.to_bytes())
    with pytest.raises(ValueError, match=f"{DIGEST}.json does not match"):
        load_manifest(f"{tmp_path}/manifests/{DIGEST}.json")


def test_rows_count_that_are_of_the_split_of_no_dropped_source_and_no_dropped_pair():
    generator = np.random.default_rng(0)
    for _ in range(50):
        draw = {name: generator.choice(list(of), 40).tolist() for name, of in
                (("split", ("train", "val")), ("source_key", "xyzw"), ("pair_id", "pqrs"))}  # fmt: skip
        sources, pairs = (generator.choice(list(of), generator.integers(3)).tolist() for of in ("xyzw", "pqrs"))
        shard = dataclasses.replace(SHARD, dropped_sources=sources, dropped_pairs=pairs)
        table = pa.table(draw).select(sorted(columns_that_decide(shard)))
        rows = list(enumerate(zip(*draw.values(), strict=True)))
        for split in (None, "train", "val", "test"):
            wanted = [
                n for n, (s, key, pair) in rows if split in (None, s) and key not in sources and pair not in pairs
            ]
            assert rows_that_count(table, shard, split=split).tolist() == wanted

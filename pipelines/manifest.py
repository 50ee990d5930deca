"""A committed pair set: the Parquet schema of LR-HR pairs, and the manifest that says which shards and rows count.

Readers read `<output>/manifest.json`, never a glob: a shard that no manifest names does not exist, and a source that
was replaced is listed under its old shard's `dropped_sources`.
"""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipelines import storage

FORMAT = 1
SPLITS = ("train", "val", "test")
PAIR_SCHEMA = pa.schema(
    [
        ("pair_id", pa.string()),
        ("source_key", pa.string()),
        ("source_etag", pa.string()),
        ("crop", pa.struct([(name, pa.int32()) for name in ("y", "x", "h", "w")])),
        ("hr", pa.binary()),
        ("lr", pa.binary()),
        ("hr_codec", pa.string()),
        ("lr_codec", pa.string()),
        *[(name, pa.int32()) for name in ("hr_h", "hr_w", "lr_h", "lr_w", "scale")],
        ("degradation", pa.string()),
        ("degradation_seed", pa.int64()),
        ("split", pa.string()),
        ("hr_sha256", pa.string()),
        ("phash", pa.int64()),
        ("hr_dtype", pa.string()),
        ("hr_channels", pa.int32()),
        ("source_format", pa.string()),
        ("source_profile", pa.string()),
        ("mean", pa.list_(pa.float32())),
        ("deviation", pa.list_(pa.float32())),
        ("histogram", pa.list_(pa.int32())),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One Parquet file: name relative to the set, rows by split, and sources whose rows no longer count."""

    name: str
    bytes: int
    sha256: str
    splits: dict[str, int]
    dropped_sources: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A committed pair set; recipe holds every setting that decides its bytes."""

    recipe: dict[str, Any]
    shards: list[Shard]

    @property
    def digest(self) -> str:
        """The name of exactly this data: sha256 of the recipe and all that is said of each shard."""
        parts = [
            [s.name, s.bytes, s.sha256, s.splits, sorted(s.dropped_sources)]
            for s in sorted(self.shards, key=lambda s: s.name)
        ]
        return hashlib.sha256(json.dumps([self.recipe, parts], sort_keys=True).encode()).hexdigest()

    def num_pairs(self, split: str) -> int:
        """Pairs of a split."""
        return sum(shard.splits.get(split, 0) for shard in self.shards)

    def to_bytes(self) -> bytes:
        """Canonical JSON: equal sets are equal bytes."""
        shards = [vars(shard) for shard in sorted(self.shards, key=lambda s: s.name)]
        counts = {split: self.num_pairs(split) for split in SPLITS}
        document = {"format": FORMAT, "digest": self.digest, "recipe": self.recipe, "pairs": counts, "shards": shards}
        return json.dumps(document, indent=1, sort_keys=True).encode()


def load_manifest(pairs: str) -> Manifest:
    """Return the manifest of a pair set; raises ValueError when there is none or it is of another format."""
    uri = storage.join(pairs, "manifest.json")
    if not storage.exists(uri):
        raise ValueError(f"pairs ({pairs}) must hold a manifest.json; make the set with make_pairs.py first")
    document = json.loads(storage.read_bytes(uri))
    if document.get("format") != FORMAT:
        raise ValueError(f"manifest format ({document.get('format')}) must be {FORMAT}; make the set again")
    manifest = Manifest(recipe=document["recipe"], shards=[Shard(**shard) for shard in document["shards"]])
    if manifest.digest != document["digest"]:
        raise ValueError(f"manifest digest of {pairs} does not match its content; make the set again")
    return manifest

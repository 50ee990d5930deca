"""A committed pair set: the Parquet schema of LR-HR pairs, and the manifest that says which shards and rows count.

Readers read a manifest, never a glob: a shard that no manifest names does not exist, a source that was replaced is
listed under its old shard's `dropped_sources`, and a near copy of another pair under `dropped_pairs`.

    <set>/manifests/<digest>.json   every manifest that was ever committed; never changed
    <set>/manifest.json             a copy of the one committed last
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import storage

FORMAT = 2
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


_MANIFEST = re.compile(r"(?P<root>.*/)?(?:manifests/(?P<digest>[0-9a-f]{64})|manifest)\.json", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One Parquet file: name relative to the set, rows that count by split, and what in it does not count.

    dropped_sources: source_keys that were replaced or are gone. dropped_pairs: pair_ids of near copies of other pairs.
    """

    name: str
    bytes: int
    sha256: str
    splits: dict[str, int]
    dropped_sources: list[str] = field(default_factory=list)
    dropped_pairs: list[str] = field(default_factory=list)

    def canonical(self) -> dict[str, Any]:
        """Return the fields, their lists sorted: what is equal looks equal."""
        lists = {name: sorted(getattr(self, name)) for name in ("dropped_sources", "dropped_pairs")}
        return {**vars(self), **lists}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A committed pair set; recipe holds every setting that decides its bytes."""

    recipe: dict[str, Any]
    shards: list[Shard]

    @property
    def digest(self) -> str:
        """The name of exactly this data: sha256 of the recipe and all that is said of each shard."""
        parts = [shard.canonical() for shard in self.sorted_shards()]
        return hashlib.sha256(json.dumps([self.recipe, parts], sort_keys=True).encode()).hexdigest()

    def sorted_shards(self) -> list[Shard]:
        """The shards by name: the order in which every reader goes through them."""
        return sorted(self.shards, key=lambda shard: shard.name)

    def num_pairs(self, split: str) -> int:
        """Pairs of a split that count."""
        return sum(shard.splits.get(split, 0) for shard in self.shards)

    def to_bytes(self) -> bytes:
        """Canonical JSON: equal sets are equal bytes."""
        shards = [shard.canonical() for shard in self.sorted_shards()]
        counts = {split: self.num_pairs(split) for split in SPLITS}
        document = {"format": FORMAT, "digest": self.digest, "recipe": self.recipe, "pairs": counts, "shards": shards}
        return json.dumps(document, indent=1, sort_keys=True).encode()


def root_of(pairs: str) -> str:
    """Return the folder that the shards' names are relative to: `pairs` itself, or that of the manifest it names."""
    match = _MANIFEST.fullmatch(pairs)
    return pairs if match is None else (match["root"] or "./").rstrip("/") or "/"


def manifest_uri(pairs: str) -> str:
    """Return the URI of the manifest that `pairs` means: of a set's folder the newest, or the very one it names."""
    return pairs if _MANIFEST.fullmatch(pairs) else storage.join(pairs, "manifest.json")


def load_manifest(pairs: str) -> Manifest:
    """Return the manifest of a pair set: its folder (the newest), its manifest.json or a manifests/<digest>.json.

    Raises ValueError when there is none, it is of another format, or it is not what its digest says.
    """
    uri = manifest_uri(pairs)
    if not storage.exists(uri):
        what = f"manifest ({pairs}) must exist" if uri == pairs else f"pairs ({pairs}) must hold a manifest.json"
        raise ValueError(f"{what}; make the set with make_pairs.py first")
    try:
        document = json.loads(storage.read_bytes(uri))
        found = document["format"]
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"manifest ({uri}) must be one that make_pairs.py wrote; make the set again") from None
    if found != FORMAT:
        raise ValueError(f"manifest format ({found}) of {uri} must be {FORMAT}; make the set again")
    try:
        manifest = Manifest(recipe=document["recipe"], shards=[Shard(**shard) for shard in document["shards"]])
        matches = manifest.digest == document["digest"] == (_named_digest(uri) or manifest.digest)
    except (LookupError, TypeError, AttributeError):  # fields that are missing, too many or of another type
        matches = False
    if not matches:
        raise ValueError(f"manifest digest of {uri} does not match its content; make the set again")
    return manifest


def pinned_uri(pairs: str, manifest: Manifest) -> str:
    """Return the place where this very manifest stays, whatever is committed later."""
    return storage.join(root_of(pairs), "manifests", f"{manifest.digest}.json")


def _named_digest(uri: str) -> str | None:
    match = _MANIFEST.fullmatch(uri)
    return match and match["digest"]


def rows_that_count(table: pa.Table, shard: Shard, *, split: str | None = None) -> np.ndarray:
    """Return the numbers of the rows of `table`, read from `shard`, that count: int64, ascending.

    split: only of this one. table has the columns of `columns_that_decide`.
    """
    keep = np.ones(table.num_rows, bool)
    for column, dropped in (("source_key", shard.dropped_sources), ("pair_id", shard.dropped_pairs)):
        if dropped:
            keep &= ~pc.is_in(table[column], value_set=pa.array(dropped, pa.string())).to_numpy()
    if split is not None:
        keep &= pc.equal(table["split"], split).to_numpy()
    return np.flatnonzero(keep)


def columns_that_decide(shard: Shard) -> set[str]:
    """Return the columns by which `rows_that_count` judges the rows of this shard."""
    decided_by = {"split": True, "source_key": shard.dropped_sources, "pair_id": shard.dropped_pairs}
    return {column for column, used in decided_by.items() if used}

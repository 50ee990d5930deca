"""Pair sets made by hand, for the tests of what commits and reads them: no job, no worker, no crop."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.blobs import codec_of, encode_blob
from pipelines.config import fingerprint
from pipelines.ledger import Ledger, Receipt
from pipelines.manifest import PAIR_SCHEMA, SPLITS, Manifest, Shard

SIDE, SCALE = 16, 4
RECIPE = {"scale": SCALE, "degradation": "bicubic", "duplicates": "set", "hash_distance": 2, "value_range": None}


def noise(seed, *, side=SIDE, channels=3, dtype=np.uint8):
    """Return HWC noise: over all of an integer type, 0 to 1 of a float."""
    generator = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return generator.random((side, side, channels), dtype)
    return generator.integers(0, np.iinfo(dtype).max, (side, side, channels), dtype, endpoint=True)


def make_row(key, number=0, *, split="train", phash=None, hr=None, lr=None, etag="etag"):
    """Return a row of PAIR_SCHEMA: patch `number` of a source, noise unless pixels are given."""
    name = f"{key} {etag} {number}"
    seed = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)
    hr = noise(seed) if hr is None else hr
    lr = noise(seed + 1, side=SIDE // SCALE, channels=hr.shape[2], dtype=hr.dtype) if lr is None else lr
    return {
        "pair_id": hashlib.sha256(name.encode()).hexdigest()[:32],
        "source_key": key, "source_etag": etag,
        "crop": {"y": 0, "x": number * SIDE, "h": hr.shape[0], "w": hr.shape[1]},
        "hr": encode_blob(hr, "webp"), "lr": encode_blob(lr, "webp"),
        "hr_codec": codec_of(hr, "webp"), "lr_codec": codec_of(lr, "webp"),
        "hr_h": hr.shape[0], "hr_w": hr.shape[1], "lr_h": lr.shape[0], "lr_w": lr.shape[1], "scale": SCALE,
        "degradation": json.dumps({"name": "bicubic", "scale": SCALE}), "degradation_seed": seed,
        "split": split, "hr_sha256": hashlib.sha256(hr.tobytes()).hexdigest(), "phash": phash,
        "hr_dtype": str(hr.dtype), "hr_channels": hr.shape[2], "source_format": "PNG", "source_profile": "",
        "mean": [128.0] * hr.shape[2], "deviation": [74.0] * hr.shape[2], "histogram": [8] * 32 * hr.shape[2],
    }  # fmt: skip


def write_shard(root, name, rows, *, group_rows=4):
    """Write data/<name>.parquet below root; return what a manifest says of it, all rows counting."""
    path = Path(root) / "data" / f"{name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows, schema=PAIR_SCHEMA)
    pq.write_table(table, path, row_group_size=group_rows, write_page_checksum=True)
    data = path.read_bytes()
    splits = {split: sum(row["split"] == split for row in rows) for split in SPLITS}
    return Shard(name=f"data/{name}.parquet", bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), splits=splits)


class HandSet:
    """A set's folder with its ledger: shards and receipts are put into it one by one, as a run would."""

    def __init__(self, root, recipe=RECIPE):
        self.root, self.recipe, self.ledger = Path(root), recipe, Ledger(str(root))
        self.number = len(self.ledger.segments())

    def shard(self, name, rows, **options):
        """Write a shard and the receipts of its sources."""
        shard = write_shard(self.root, name, rows, **options)
        of_shard = {"out_key": shard.name, "out_sha256": shard.sha256, "out_bytes": shard.bytes}
        self.receipts(*dict.fromkeys(row["source_key"] for row in rows), **of_shard)
        return shard

    def receipts(self, *keys, status="done", **fields):
        """Append a segment with a receipt of each of these sources."""
        common = {"etag": "etag", "size": 1, "recipe": fingerprint(self.recipe), "status": status}
        self.number = len(self.ledger.segments())
        made = [Receipt(**{**common, "key": key, **fields}) for key in keys]
        self.ledger.append(made, fence=1, number=self.number)


def manifest_of(*shards, recipe=RECIPE):
    return Manifest(recipe=recipe, shards=list(shards))

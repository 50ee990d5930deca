"""One unit of the pairs job: sources in, one Parquet file of LR-HR patches out, a receipt per source."""

import hashlib
import math
import time
from collections import Counter
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from diffsr_core.degradation import Degradation, crop_to_multiple
from pipelines import storage
from pipelines.blobs import encode_blob
from pipelines.config import fingerprint
from pipelines.engine import Enter
from pipelines.images import Refused, decode, jpeg_codec
from pipelines.ledger import Receipt
from pipelines.manifest import PAIR_SCHEMA
from pipelines.work import read_source

ROW_GROUP_BYTES = 16 * 2**20


class PairsWorker:
    """Unit -> one Parquet file and a receipt per source."""

    def __init__(self, *, source: str, output: str, recipe: dict[str, Any]) -> None:
        self.source, self.output, self.recipe = source, output, recipe
        self.fingerprint = fingerprint(recipe)
        self.degradation = Degradation.parse(recipe["degradation"], recipe["scale"])

    def __call__(self, rows: list[dict[str, Any]], enter: Enter) -> list[Receipt]:
        unit_id = rows[0]["unit_id"]
        pairs: list[dict[str, Any]] = []
        receipts: list[dict[str, Any]] = []
        for row in rows:
            started = time.time()
            receipt: dict[str, Any] = {
                **row,
                "recipe": self.fingerprint,
                "status": "done",
                "started": started,
            }
            try:
                enter(row["key"])
                made, dropped = self.pairs_of(row)
                pairs += made
                counts = Counter(f"pairs_{pair['split']}" for pair in made)
                receipt["metrics"] = {**counts, **dropped}
                if not made:
                    receipt.update(
                        status="skipped", stage="crop", reason="no_patch", message=f"no patch left: {dropped}"
                    )
            except Refused as refused:
                receipt.update(status="dead", stage=refused.stage, reason=refused.reason, message=refused.message)
            receipts.append({**receipt, "seconds": time.time() - started})
        if pairs:
            name = f"data/{unit_id}.parquet"
            sha256, size = self._publish(name, pairs)
            for receipt in receipts:
                if receipt["status"] == "done":
                    receipt.update(out_key=name, out_sha256=sha256, out_bytes=size)
        return [Receipt(**receipt) for receipt in receipts]

    def pairs_of(self, row: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, int]]:
        """Return (rows of PAIR_SCHEMA, counts of dropped patches by reason) for one source. Raises Refused."""
        key, etag = row["key"], row["etag"]
        data = read_source(self.source, row)
        picture = decode(data, max_pixels=int(self.recipe["max_megapixels"] * 1e6))
        digest = storage.digest_bytes(data)
        split = split_of(digest, val_share=self.recipe["val_share"], test_share=self.recipe["test_share"])
        side = self.recipe["patch"]
        height, width = picture.pixels.shape[:2]
        corners = [(y, x) for y in range(0, height - side + 1, side) for x in range(0, width - side + 1, side)]
        corners.sort(key=lambda c: blake2b(f"{self.recipe['seed']} {digest} {c[0]} {c[1]}".encode()).digest())
        dropped: Counter[str] = Counter()
        made: list[dict[str, Any]] = []
        for y, x in corners:
            if len(made) == self.recipe["max_per_image"]:
                dropped["dropped_over_limit"] += 1
                continue
            hr = np.ascontiguousarray(picture.pixels[y : y + side, x : x + side])
            if float(hr.std()) < self.recipe["min_deviation"]:
                dropped["dropped_flat"] += 1
                continue
            made.append(self._pair(key, etag, digest, split, y, x, hr))
        made.sort(key=lambda pair: (pair["crop"]["y"], pair["crop"]["x"]))
        if not corners:
            dropped["dropped_too_small"] += 1
        return made, dict(dropped)

    def _pair(self, key: str, etag: str, digest: str, split: str, y: int, x: int, hr: np.ndarray) -> dict[str, Any]:
        seed = int.from_bytes(blake2b(f"{self.recipe['seed']} {digest} {y} {x}".encode(), digest_size=7).digest())
        lr = self.degradation.apply(crop_to_multiple(hr, self.degradation.scale), seed=seed, jpeg=jpeg_codec)
        hr_blob, lr_blob = encode_blob(hr, self.recipe["codec"]), encode_blob(lr, self.recipe["codec"])
        codec = "png" if hr.shape[2] == 1 else self.recipe["codec"]
        return {
            "pair_id": blake2b(f"{self.fingerprint} {digest} {y} {x}".encode(), digest_size=16).hexdigest(),
            "source_key": key,
            "source_etag": etag,
            "crop": {"y": y, "x": x, "h": hr.shape[0], "w": hr.shape[1]},
            "hr": hr_blob,
            "lr": lr_blob,
            "hr_codec": codec,
            "lr_codec": codec,
            "hr_h": hr.shape[0],
            "hr_w": hr.shape[1],
            "lr_h": lr.shape[0],
            "lr_w": lr.shape[1],
            "scale": self.degradation.scale,
            "degradation": self.degradation.to_json(),
            "degradation_seed": seed,
            "split": split,
            "hr_sha256": storage.digest_bytes(hr.tobytes()),
            "phash": difference_hash(hr),
        }

    def _publish(self, name: str, pairs: list[dict[str, Any]]) -> tuple[str, int]:
        """Write the shard atomically; return (sha256, bytes). Same rows, same bytes."""
        mean = sum(len(pair["hr"]) + len(pair["lr"]) for pair in pairs) / len(pairs)
        scalars = [n for n in PAIR_SCHEMA.names if n not in ("hr", "lr", "crop")]
        table = pa.Table.from_pylist(pairs, schema=PAIR_SCHEMA)
        with TemporaryDirectory(prefix="diffsr-") as folder:
            path = Path(folder) / "shard.parquet"
            pq.write_table(
                table,
                path,
                row_group_size=max(1, math.floor(ROW_GROUP_BYTES / mean)),
                compression={column: "NONE" if column in ("hr", "lr") else "ZSTD" for column in _leaves()},
                write_statistics=scalars,
                use_dictionary=["source_key", "source_etag", "hr_codec", "lr_codec", "degradation", "split"],
                write_page_checksum=True,
            )
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            storage.publish_file(storage.join(self.output, name), path)
            return sha256, path.stat().st_size


def _leaves() -> list[str]:
    return [name for name in PAIR_SCHEMA.names if name != "crop"] + [f"crop.{name}" for name in "yxhw"]


def split_of(digest: str, *, val_share: float, test_share: float) -> str:
    """Return the split of a source from its content's hash: stable as the corpus grows; copies land together."""
    position = int(digest[:12], 16) / 16**12
    if position < val_share:
        return "val"
    return "test" if position < val_share + test_share else "train"


def difference_hash(pixels: np.ndarray) -> int:
    """Return the 64-bit dHash of uint8 (H, W, C) as a signed integer: signs of the steps along 8 rows of 9 means."""
    grey = Image.fromarray(np.round(pixels.mean(axis=2)).astype(np.uint8)).resize((9, 8), Image.Resampling.BOX)
    bits = np.diff(np.asarray(grey, dtype=np.int16), axis=1) > 0
    return int.from_bytes(np.packbits(bits).tobytes(), "big", signed=True)

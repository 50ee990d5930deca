"""One unit of the pairs job: sources in, one Parquet shard of LR-HR patches out, a receipt per source.

A patch is dropped where it says nothing or what another one says: some of it is not valid (transparent, no data),
it is flat, or it is a near copy of another patch of its own image. Copies between images are dropped when the set is
committed, in the manifest: a unit then depends on no other, and a copy counts again when its original goes.
"""

import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from diffsr_core.degradation import Degradation
from diffsr_core.resize import downscale_pixels, round_pixels
from pipelines import storage
from pipelines.blobs import codec_of, encode_blob
from pipelines.config import fingerprint
from pipelines.corpus import Corpus, Original
from pipelines.crops import corners, hashed, num_cells, split_of
from pipelines.deadline import time_limit
from pipelines.duplicates import near_duplicates, perceptual_hash
from pipelines.engine import Enter
from pipelines.images import Refused, jpeg_codec
from pipelines.ledger import Receipt
from pipelines.profiles import WorkingSpace
from pipelines.scenes import Scene, SceneSettings, open_scene
from pipelines.shards import ShardWriter
from pipelines.statistics import measure
from pipelines.twins import check_transforms, check_twins, twin_window

Fetched = Original | Refused
FLAT_TWIN = 0.5  # levels of 255: a real LR that shows less is a sensor's gap, whatever HR shows
TWIN = "twin"  # the degradation of pairs whose LR is a source of its own


class PairsWorker:
    """Unit -> one Parquet shard and a receipt per source. Plain arguments; icc: the profile of the working space."""

    def __init__(
        self,
        *,
        corpus: dict[str, str],
        output: str,
        recipe: dict[str, Any],
        icc: bytes | None = None,
        max_seconds: float = 120.0,
    ) -> None:
        torch.set_num_threads(1)  # one worker, one CPU: patches are small, and workers are the parallelism
        self.corpus, self.output, self.recipe, self.max_seconds = Corpus(**corpus), output, recipe, max_seconds
        self.fingerprint = fingerprint(recipe)
        self.twins = bool(self.corpus.lr_source)
        self.degradation = None if self.twins else Degradation.parse(recipe["degradation"], recipe["scale"])
        self.settings = SceneSettings(
            max_pixels=int(recipe["max_megapixels"] * 1e6),
            max_raster_pixels=int(recipe["max_raster_megapixels"] * 1e6),
            space=WorkingSpace.parse(recipe["working_space"], icc),
            bands=tuple(recipe["bands"]),
        )

    def _originals(self, rows: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], Fetched, Fetched | None]]:
        """Yield each row with its original and its twin."""
        twins = self.corpus.fetch_all(rows, twin=True) if self.twins else ((row, None) for row in rows)
        for (row, original), (_, twin) in zip(self.corpus.fetch_all(rows), twins, strict=True):
            yield row, original, twin

    def preview(self, rows: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]] | None]]:
        """Yield each row with the pairs that it would give, None where it would be refused. Writes nothing."""
        for row, original, twin in self._originals(rows):
            try:
                yield row, self.pairs_of(row, original, twin)[0]
            except Refused:
                yield row, None

    def __call__(self, rows: list[dict[str, Any]], enter: Enter) -> list[Receipt]:
        name = f"data/{rows[0]['unit_id']}.parquet"
        receipts: list[dict[str, Any]] = []
        with ShardWriter(self.recipe) as shard:
            for row, original, twin in self._originals(rows):
                receipts.append(self._source(row, original, twin, shard, enter))
            if shard.num_rows:
                published = shard.publish(storage.join(self.output, name))
                for receipt in receipts:
                    if receipt["status"] == "done":
                        receipt.update(out_key=name, out_sha256=published.sha256, out_bytes=published.bytes)
        return [Receipt(**receipt) for receipt in receipts]

    def _source(
        self,
        row: dict[str, Any],
        original: Fetched,
        twin: Fetched | None,
        shard: ShardWriter,
        enter: Enter,
    ) -> dict[str, Any]:
        started = time.time()
        receipt: dict[str, Any] = {**row, "recipe": self.fingerprint, "status": "done", "started": started}
        try:
            enter(row["key"])
            made, measured = self.pairs_of(row, original, twin)
            shard.add(made)
            receipt["metrics"] = {**Counter(f"pairs_{pair['split']}" for pair in made), **measured}
            if not made:
                why = "too_small" if "dropped_too_small" in measured else "no_patch"
                dropped = {name: count for name, count in measured.items() if name.startswith("dropped_")}
                receipt.update(status="skipped", stage="crop", reason=why, message=f"no patch is left: {dropped}")
        except Refused as refused:
            receipt.update(status="dead", stage=refused.stage, reason=refused.reason, message=refused.message)
        except MemoryError as error:
            receipt.update(status="dead", stage="decode", reason="oom", message=f"MemoryError: {error}"[:300])
        return {**receipt, "seconds": time.time() - started}

    def pairs_of(
        self, row: dict[str, Any], original: Fetched, twin: Fetched | None = None
    ) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """Return (rows of PAIR_SCHEMA, measures of the source: megapixels and patches dropped by reason).

        Raises Refused, also what it is given in the place of an original.
        """
        for given in (original, twin):
            if isinstance(given, Refused):
                raise given
        assert isinstance(original, Original)
        with time_limit(self.max_seconds), ExitStack() as stack:
            scene = stack.enter_context(open_scene(original, settings=self.settings))
            measured: dict[str, float] = {"megapixels": scene.height * scene.width / 1e6}
            low = None
            if isinstance(twin, Original):
                low = stack.enter_context(open_scene(twin, settings=self.settings))
                measured["misalignment_px"] = self._check_twin(scene, low)
            made, dropped = self._patches(row, original, scene, low)
        return made, {**measured, **dropped}

    def _patches(
        self, row: dict[str, Any], original: Original, scene: Scene, twin: Scene | None
    ) -> tuple[list[dict[str, Any]], Counter[str]]:
        """Return the pairs of one source in reading order, and how many patches were dropped, by reason."""
        value_range = self._value_range(scene)
        if twin is not None:
            self._value_range(twin)  # raises where a reader would not know how to show it
        elif scene.channels > 16:
            raise Refused("degrade", "too_many_channels", f"{scene.channels} bands, at most 16; choose them by --bands")
        source = {
            "source_key": row["key"],
            "source_etag": row["etag"],
            "split": split_of(
                original.digest, val_share=self.recipe["val_share"], test_share=self.recipe["test_share"]
            ),
            "source_format": scene.format,
            "source_profile": scene.profile,
        }
        dropped: Counter[str] = Counter()
        made: list[dict[str, Any]] = []
        for reduction in self.recipe.get("reductions", (1,)):
            more, left = self._cut(row["key"], original, scene, twin, value_range=value_range, reduction=reduction)
            made += [{**source, **pair} for pair in more]
            dropped += left
        if not made and not dropped:
            dropped["dropped_too_small"] = 1
        made.sort(key=lambda pair: tuple(pair["crop"].values()))
        unique = self._without_copies(made)
        if len(unique) < len(made):
            dropped["dropped_duplicate"] += len(made) - len(unique)
        return unique, dropped

    def _cut(
        self,
        key: str,
        original: Original,
        scene: Scene,
        twin: Scene | None,
        *,
        value_range: tuple[float, float],
        reduction: int,
    ) -> tuple[list[dict[str, Any]], Counter[str]]:
        """Return the pairs cut from the source reduced by this factor, and how many patches were dropped, by reason."""
        dropped: Counter[str] = Counter()
        made: list[dict[str, Any]] = []
        side, most, tried = self.recipe["patch"], self.recipe["max_per_image"], 0
        height, width = scene.height // reduction, scene.width // reduction
        digest = original.digest if reduction == 1 else f"{original.digest} reduced {reduction}"
        for y, x in corners(height, width, self.recipe, digest=digest):
            if len(made) == most:
                break
            tried += 1
            hr, valid = scene.window(*(value * reduction for value in (y, x, side, side)))
            lr, usable = None, valid is None or bool(valid.all())
            if twin is not None:
                s = self.recipe["scale"]
                lr, lr_valid = twin.window(y // s, x // s, side // s, side // s)
                usable = all(mask is None or mask.all() for mask in (valid, lr_valid))
            if not usable:
                dropped["dropped_invalid"] += 1
                continue
            if lr is not None and twin is not None:
                seen = measure(lr, value_range=self._value_range(twin))
                if max(seen["deviation"]) < min(FLAT_TWIN, self.recipe["min_deviation"]):
                    dropped["dropped_flat_twin"] += 1
                    continue
            hr = _reduced(hr, reduction)
            measures = measure(hr, value_range=value_range)
            if max(measures["deviation"]) < self.recipe["min_deviation"]:
                dropped["dropped_flat"] += 1
                continue
            pair = self._pair(key, digest, y, x, hr, lr, value_range=value_range)
            pair["crop"] = {name: value * reduction for name, value in pair["crop"].items()}
            whole = reduction == 1 and (scene.height, scene.width) == (side, side)
            if scene.kept and whole and original.size <= hr.nbytes:  # no pixel changed: nor do the bytes
                pair |= {"hr": original.read(), "hr_codec": scene.format.lower()}
            made.append({**measures, **pair})
        if tried and self.recipe["crops"] == "grid" and (left := num_cells(height, width, side) - tried):
            dropped["dropped_over_limit"] = left
        return made, dropped

    def _pair(
        self,
        key: str,
        digest: str,
        y: int,
        x: int,
        hr: np.ndarray,
        lr: np.ndarray | None,
        *,
        value_range: tuple[float, float],
    ) -> dict[str, Any]:
        """Return the columns of one pair that its pixels decide; lr: of a twin, None where the recipe makes it."""
        recipe, seed = {"name": TWIN, "scale": self.recipe["scale"]}, 0
        degradation = json.dumps(recipe, sort_keys=True, separators=(",", ":"))
        if self.degradation is not None:
            degradation = self.degradation.to_json()
            seed = int.from_bytes(hashed(f"{self.recipe['seed']} {digest} {y} {x}")[:7])
            try:
                lr = self.degradation.apply(hr, seed=seed, jpeg=jpeg_codec)
            except ValueError as error:  # the recipe was checked: these pixels are not for it
                raise Refused("degrade", "unsupported_mode", str(error)) from error
        assert lr is not None
        codec = self.recipe["codec"]
        return {
            "pair_id": hashed(f"{self.fingerprint} {key} {digest} {y} {x}").hex()[:32],
            "crop": {"y": y, "x": x, "h": hr.shape[0], "w": hr.shape[1]},
            "hr": encode_blob(hr, codec),
            "lr": encode_blob(lr, codec),
            "hr_codec": codec_of(hr, codec),
            "lr_codec": codec_of(lr, codec),
            "hr_h": hr.shape[0],
            "hr_w": hr.shape[1],
            "lr_h": lr.shape[0],
            "lr_w": lr.shape[1],
            "scale": self.recipe["scale"],
            "degradation": degradation,
            "degradation_seed": seed,
            "hr_sha256": storage.digest_bytes(hr.tobytes()),
            "phash": perceptual_hash(hr, value_range=value_range),
            "hr_dtype": hr.dtype.name,
            "hr_channels": hr.shape[2],
        }

    def _without_copies(self, made: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the pairs without near copies of an earlier one of the same image; no hash is nobody's copy."""
        if self.recipe["duplicates"] == "keep" or not made:
            return made
        hashed = [pair for pair in made if pair["phash"] is not None]
        hashes = np.array([pair["phash"] for pair in hashed], np.int64)
        copies = near_duplicates(hashes, self.recipe["hash_distance"]) >= 0
        dropped = {pair["pair_id"] for pair, copy in zip(hashed, copies, strict=True) if copy}
        return [pair for pair in made if pair["pair_id"] not in dropped]

    def _value_range(self, scene: Scene) -> tuple[float, float]:
        """Return the samples that mean black and white. Raises Refused for floats of which nobody has said it."""
        if scene.dtype == np.uint8:
            return (0.0, 255.0)
        if self.recipe["value_range"] is not None:
            low, high = self.recipe["value_range"]
            return (low, high)
        if scene.dtype == np.uint16:
            return (0.0, 65535.0)
        raise Refused("decode", "no_value_range", f"{scene.dtype} samples; say what is black and white: --value-range")

    def _check_twin(self, scene: Scene, twin: Scene) -> float:
        """Return how far the twins are apart, in LR px: by their pixels, and by their grids where both have one.

        Raises Refused where they are no pair.
        """
        scale, most = self.recipe["scale"], self.recipe["max_misalignment"]
        y, x, height, width = twin_window((scene.height, scene.width), (twin.height, twin.width), scale=scale)
        grids = (0.0, 0.0)
        if scene.transform is not None and twin.transform is not None:
            size = (twin.height, twin.width)
            grids = check_transforms(scene.transform, twin.transform, scale=scale, lr_size=size, max_shift=most)
        hr, hr_valid = scene.window(y * scale, x * scale, height * scale, width * scale)
        lr, lr_valid = twin.window(y, x, height, width)
        found = check_twins(hr, lr, scale=scale, max_shift=most, hr_valid=hr_valid, lr_valid=lr_valid)
        return max(math.hypot(*grids), math.hypot(found.dy, found.dx))


def _reduced(pixels: np.ndarray, reduction: int) -> np.ndarray:
    """Return pixels HWC downscaled by bicubic, in their own type."""
    if reduction == 1:
        return pixels
    low = downscale_pixels(pixels, reduction)
    return low.astype(pixels.dtype) if pixels.dtype.kind == "f" else round_pixels(low, pixels.dtype)

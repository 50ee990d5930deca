"""The frozen images that models are scored on, and how each is loaded.

A data set is a folder (or a list) of HR images, whose LR a degradation makes or a second folder holds, or a split of a
pair set. Its digest names exactly this content and protocol: scores of one digest may be compared.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffsr_core.degradation import Degradation, crop_to_multiple
from pipelines import storage
from pipelines.blobs import decode_blob
from pipelines.config import check
from pipelines.corpus import Corpus
from pipelines.images import Refused, decode, jpeg_codec
from pipelines.manifest import load_manifest, manifest_uri
from pipelines.protocols import Framing, framed
from pipelines.rows import iter_pairs, read_pair

SSIM_WINDOW_PX = 11


@dataclass(frozen=True, kw_only=True)
class Item:
    """One image of a data set: a key of the source, or with a `place` a row of a pair set."""

    key: str
    etag: str
    place: str = ""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A frozen list of images. degradation: JSON of what makes the LR, or a sentence that names where it comes from."""

    source: str
    scale: int
    split: str = ""
    degradation: str = ""
    lr_source: str = ""
    lr_name: str = "{key}"
    framing: Framing | None = None
    items: tuple[Item, ...]

    @property
    def digest(self) -> str:
        """sha256 over the protocol and every (key, etag)."""
        how = [self.split, self.degradation]
        if self.framing is not None:
            how.append(json.dumps(asdict(self.framing)))
        parts = [*how, *(f"{item.key}\0{item.etag}" for item in self.items)]
        return sha256("\0".join(parts).encode()).hexdigest()

    def loader(self) -> dict[str, Any]:
        """Return the plain arguments of its Loader."""
        return {item.name: getattr(self, item.name) for item in fields(Loader) if item.name != "framing"} | {
            "framing": None if self.framing is None else asdict(self.framing)
        }


class Loaded(NamedTuple):
    """LR and HR, uint8 (h, w, C) and (scale h, scale w, C), and the digest of the content, which keys the noise."""

    lr: NDArray[np.uint8]
    hr: NDArray[np.uint8]
    digest: str


def open_dataset(
    source: str,
    *,
    scale: int,
    split: str = "test",
    degradation: str = "bicubic",
    lr_source: str = "",
    lr_name: str = "{key}",
    framing: Framing | None = None,
    limit: int | None = None,
) -> Dataset:
    """Return the data set; raises ValueError when it is empty or does not fit the model's scale."""
    if storage.exists(manifest_uri(source)):
        given = "lr_source" if lr_source else "protocol" if framing else ""
        check(not given, given, lr_source or framing, "must be left out for a pair set", "its LR is in it")
        manifest = load_manifest(source)
        found = manifest.recipe["scale"]
        check(found == scale, "dataset scale", found, f"must be that of the model ({scale})", "make other pairs")
        rows = iter_pairs(source, manifest, split, columns=["pair_id", "hr_sha256"])
        items = [Item(key=row["pair_id"], etag=row["hr_sha256"], place=row["place"]) for row in rows]
        made = Dataset(
            source=source, scale=scale, split=split, degradation=f"pairs {manifest.digest}", items=tuple(items[:limit])
        )
    else:
        check(not (lr_source and framing), "lr_source", lr_source, "cannot be framed by a protocol", "leave one out")
        listing = Corpus(source=source, lr_source=lr_source, lr_name=lr_name).listing()
        rows_of = zip(listing["key"].to_pylist(), listing["etag"].to_pylist(), strict=True)
        made = Dataset(
            source=source,
            scale=scale,
            degradation="its LR twin" if lr_source else Degradation.parse(degradation, scale).to_json(),
            lr_source=lr_source,
            lr_name=lr_name,
            framing=framing,
            items=tuple(Item(key=key, etag=etag) for key, etag in rows_of)[:limit],
        )
    if not made.items:
        raise ValueError(f"dataset ({source}, split {split!r}) must hold images; it holds none: give another")
    return made


@dataclass(frozen=True, kw_only=True)
class Loader:
    """Loads the images of a data set; built in each worker from `Dataset.loader()`."""

    source: str
    scale: int
    degradation: str
    lr_source: str
    lr_name: str
    framing: Mapping[str, Any] | None

    def __call__(self, item: Mapping[str, str]) -> Loaded:
        """Return an item's images. Raises Refused."""
        if item["place"]:
            blobs = read_pair(self.source, item["place"])
            hr, lr = (decode_blob(blob) for blob in blobs)
            if {hr.dtype, lr.dtype} != {np.dtype(np.uint8)}:
                raise Refused("score", "unsupported_mode", f"{hr.dtype} and {lr.dtype} samples; 8 bits are scored")
            self._check_size(hr)
            return self._checked(Loaded(lr, hr, storage.digest_bytes(blobs[1])))
        corpus = Corpus(source=self.source, lr_source=self.lr_source, lr_name=self.lr_name)
        with corpus.fetch(dict(item)) as original:
            data = original.read()
        hr = self._opaque(data)
        if self.framing:
            hr = framed(hr, Framing(**self.framing))
        self._check_size(hr)
        hr = crop_to_multiple(hr, self.scale)
        if self.lr_source:
            with corpus.fetch_twin(dict(item)) as twin:
                twin_data = twin.read()
            return self._checked(Loaded(self._opaque(twin_data), hr, storage.digest_bytes(twin_data)))
        seed = int(storage.digest_bytes(data)[:14], 16)  # of the content: whoever scores it makes the same LR
        lr = Degradation(**json.loads(self.degradation)).apply(hr, seed=seed, jpeg=jpeg_codec)
        return Loaded(lr, hr, storage.digest_bytes(data))

    @staticmethod
    def _opaque(data: bytes) -> NDArray[np.uint8]:
        picture = decode(data)
        if picture.alpha is not None and (picture.alpha < 255).any():
            raise Refused("score", "unsupported_mode", "transparent pixels, whose colour nobody sees; flatten it")
        return picture.pixels

    def _checked(self, loaded: Loaded) -> Loaded:
        lr, hr = loaded.lr.shape, loaded.hr.shape
        if (lr[0] * self.scale, lr[1] * self.scale, lr[2]) != hr:
            message = f"LR {lr[0]}x{lr[1]}x{lr[2]}, HR {hr[0]}x{hr[1]}x{hr[2]}: HR must be {self.scale} times the LR"
            raise Refused("score", "scale_mismatch", message)
        return loaded

    def _check_size(self, hr: NDArray[np.uint8]) -> None:
        least = SSIM_WINDOW_PX + 2 * self.scale
        if min(hr.shape[:2]) < least:
            size = f"{hr.shape[0]}x{hr.shape[1]} px"
            raise Refused("score", "too_small", f"{size}: each side must be at least {least} px to be scored")

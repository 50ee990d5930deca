"""How a model scores on a data set: the machinery that evaluation and promotion share.

A data set is a folder of HR images (LR is made by the degradation) or a pair set (its LR is used). Each image is one
asset: an image that cannot be read is a row with a reason, never the end of the job.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

import numpy as np

from diffsr_core.checkpoint import model_from_files
from diffsr_core.degradation import Degradation, crop_to_multiple
from diffsr_core.metrics import lr_psnr, psnr, rgb_to_y, ssim
from diffsr_core.pixels import bicubic
from diffsr_core.sampling import SamplingRecipe
from diffsr_core.upscaler import Upscaler
from pipelines import storage
from pipelines.blobs import decode_blob, encode_blob
from pipelines.corpus import read_source
from pipelines.engine import check_engine, map_actors, progress
from pipelines.images import SUFFIXES, Refused, decode, jpeg_codec
from pipelines.manifest import load_manifest, manifest_uri
from pipelines.models import ResolvedModel, load_files, publish_model
from pipelines.rows import iter_pairs, read_pair
from pipelines.stills import check_channels

BASELINES = ("bicubic", "regression")
METRICS = ("psnr", "ssim", "psnr_y", "ssim_y", "lr_psnr")
STRIP_PX = 192
SSIM_WINDOW_PX = 11


@dataclass(frozen=True, kw_only=True)
class Item:
    """One image of a data set: a key below the source, or with a `place` a row of a pair set."""

    key: str
    etag: str
    place: str = ""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A frozen list of images with a digest that names exactly this content and protocol."""

    source: str
    split: str
    degradation: str
    items: tuple[Item, ...]

    @property
    def digest(self) -> str:
        """sha256 over the protocol and every (key, etag)."""
        parts = [self.split, self.degradation, *(f"{item.key}\0{item.etag}" for item in self.items)]
        return sha256("\0".join(parts).encode()).hexdigest()


def open_dataset(source: str, *, split: str, degradation: str, scale: int, limit: int | None = None) -> Dataset:
    """Return the data set; raises ValueError when it is empty or does not fit the model's scale."""
    if storage.exists(manifest_uri(source)):
        manifest = load_manifest(source)
        found = manifest.recipe["scale"]
        if found != scale:
            raise ValueError(f"dataset scale ({found}) must be that of the model ({scale}); make other pairs")
        rows = iter_pairs(source, manifest, split, columns=["pair_id", "hr_sha256"])
        items = [Item(key=row["pair_id"], etag=row["hr_sha256"], place=row["place"]) for row in rows]
        recipe = f"pairs {manifest.digest}"
    else:
        items = [Item(key=o.key, etag=o.etag) for o in storage.list_objects(source, suffixes=SUFFIXES)]
        recipe = Degradation.parse(degradation, scale).to_json()
        split = ""
    if not items:
        raise ValueError(f"dataset ({source}, split {split!r}) must hold images; it holds none: give another")
    return Dataset(source=source, split=split, degradation=recipe, items=tuple(items[:limit]))


class Scorer:
    """Scores images with one model and its baselines; built once per process from plain arguments."""

    def __init__(
        self, *, model: str, recipe: dict[str, Any], baselines: Sequence[str], source: str, degradation: str
    ) -> None:
        network, _ = model_from_files(load_files(model))
        self.upscaler = Upscaler(network, SamplingRecipe(**recipe))
        self.baselines, self.source, self.degradation = tuple(baselines), source, degradation
        self.scale = network.config.scale

    def images(self, item: dict[str, str]) -> dict[str, np.ndarray]:
        """Return lr, hr and each method's output, uint8 HWC. Raises Refused."""
        if item["place"]:
            hr_blob, data = read_pair(self.source, item["place"])
            hr, lr = decode_blob(hr_blob), decode_blob(data)
            if {hr.dtype, lr.dtype} != {np.dtype(np.uint8)}:
                raise Refused("score", "unsupported_mode", f"{hr.dtype} and {lr.dtype} samples; 8 bits are scored")
        else:
            data = read_source(self.source, item)
            pixels = decode(data).pixels
            least = SSIM_WINDOW_PX + 2 * self.scale
            if min(pixels.shape[:2]) < least:
                size = f"{pixels.shape[0]}x{pixels.shape[1]} px"
                raise Refused("score", "too_small", f"{size}: each side must be at least {least} px to be scored")
            hr = crop_to_multiple(pixels, self.scale)
            seed = int(storage.digest_bytes(data)[:14], 16)  # of the content: whoever scores it makes the same LR
            lr = Degradation(**json.loads(self.degradation)).apply(hr, seed=seed, jpeg=jpeg_codec)
        check_channels(self.upscaler, lr.shape[2])
        result = self.upscaler(lr, digest=storage.digest_bytes(data))
        made = {"bicubic": bicubic(lr, self.scale), "model": result.sr}
        if result.regression is not None:
            made["regression"] = result.regression
        return {"lr": lr, "hr": hr, **{name: made[name] for name in (*self.baselines, "model")}}

    def __call__(self, item: dict[str, str]) -> dict[str, Any]:
        """Return one row: key, reason (empty when scored), seconds, and `<method>_<metric>` values.

        An item with a `strip` has its crops written there: pictures never pass through the driver.
        """
        started = time.monotonic()
        row: dict[str, Any] = {"key": item["key"], "reason": "", "message": ""}
        try:
            images = self.images(item)
        except Refused as refused:
            return {**row, "reason": refused.reason, "message": refused.message, "seconds": time.monotonic() - started}
        row["seconds"] = time.monotonic() - started
        for method in (*self.baselines, "model"):
            scores = score(images["hr"], images[method], images["lr"], scale=self.scale)
            row |= {f"{method}_{name}": value for name, value in scores.items()}
        if item["strip"]:
            storage.publish(item["strip"], strip(images, scale=self.scale, side=STRIP_PX))
        return row


def score(hr: np.ndarray, sr: np.ndarray, lr: np.ndarray, *, scale: int) -> dict[str, float]:
    """Return PSNR and SSIM in all channels and in Y (border = scale), and LR-PSNR; dB, -, dB, -, dB."""
    y_hr, y_sr = (rgb_to_y(x) if x.shape[2] == 3 else x[:, :, 0].astype(np.float64) for x in (hr, sr))
    return {
        "psnr": psnr(hr, sr, border=scale),
        "ssim": ssim(hr, sr, border=scale),
        "psnr_y": psnr(y_hr, y_sr, border=scale),
        "ssim_y": ssim(y_hr, y_sr, border=scale),
        "lr_psnr": lr_psnr(lr, sr, scale=scale),
    }


class ScoringActor:
    """The Ray Data face of a Scorer."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.scorer = Scorer(**arguments)

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        return {"row": json.dumps(self.scorer(row))}


def score_dataset(
    dataset: Dataset,
    model: ResolvedModel,
    recipe: SamplingRecipe,
    *,
    baselines: Sequence[str],
    output: str,
    engine: str,
    num_workers: int,
    label: str,
    num_strips: int = 0,
) -> list[dict[str, Any]]:
    """Return one row per image, sorted by key. The model's files are copied below the output for the workers.

    The first num_strips images leave their crops in `<output>/strips/NN.png`, in the data set's order.
    """
    arguments = {
        "model": publish_model(model, output),
        "recipe": asdict(recipe),
        "baselines": list(baselines),
        "source": dataset.source,
        "degradation": dataset.degradation,
    }
    work = [
        {**asdict(item), "strip": storage.join(output, "strips", f"{index:02d}.png") if index < num_strips else ""}
        for index, item in enumerate(dataset.items)
    ]
    rows = progress(_rows(work, arguments, engine, num_workers), total=len(work), label=label)
    return sorted(rows, key=lambda row: str(row["key"]))


def _rows(
    work: list[dict[str, Any]], arguments: dict[str, Any], engine: str, num_workers: int
) -> Iterator[dict[str, Any]]:
    check_engine(engine, num_workers)
    if engine == "local":
        scorer = Scorer(**arguments)
        for item in work:
            yield scorer(item)
        return
    for row in map_actors(work, ScoringActor, {"arguments": arguments}, num_workers=num_workers):
        yield json.loads(row["row"])


def strip(images: dict[str, np.ndarray], *, scale: int, side: int) -> bytes:
    """Return a PNG of the most detailed square crop (HR pixels), methods side by side: LR first, HR last."""
    hr = images["hr"]
    side = min(side // scale * scale, *(size // scale * scale for size in hr.shape[:2]))
    y, x = _detailed_corner(hr, side, scale)
    tiles = [np.kron(images["lr"][y // scale : (y + side) // scale, x // scale : (x + side) // scale], _square(scale))]
    tiles += [images[name][y : y + side, x : x + side] for name in images if name not in ("lr", "hr")]
    tiles += [hr[y : y + side, x : x + side]]
    return encode_blob(np.ascontiguousarray(np.concatenate(tiles, axis=1).astype(np.uint8)), "png")


def _square(scale: int) -> np.ndarray:
    return np.ones((scale, scale, 1), np.uint8)


def _detailed_corner(hr: np.ndarray, side: int, scale: int) -> tuple[int, int]:
    step = max(scale, side // 4 // scale * scale)
    corners = [(y, x) for y in range(0, hr.shape[0] - side + 1, step) for x in range(0, hr.shape[1] - side + 1, step)]
    return max(corners, key=lambda c: float(hr[c[0] : c[0] + side, c[1] : c[1] + side].std()))

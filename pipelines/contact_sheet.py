"""The pictures of a night: crops of its worst assets by each metric and of a fair sample, LR | bicubic | SR | doubt.

Everything is shown in sRGB, of 16 bits the upper byte, what is transparent over grey. Sources are read as the workers
read them (`Corpus`, `Scene`), results by pyvips, whose streaming decoders reach a crop of a file of any size.
"""

import heapq
import io
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from diffsr_core.pixels import bicubic
from pipelines import storage
from pipelines.corpus import Corpus
from pipelines.images import Refused
from pipelines.profiles import WorkingSpace
from pipelines.receipts import metric
from pipelines.scenes import Scene, SceneSettings, open_scene
from pipelines.sidecars import uncertainty_key
from pipelines.stills import UNCERTAINTY_STEPS

CROP_PX = 48  # side of a crop, in LR pixels, at most
TILE_PX = 256  # side of a crop enlarged by the scale, at most; a smaller one is repeated to no more than this
MARGIN_PX = 4  # LR around a crop, so that its bicubic is that of the whole image
SEARCH_PX = 2**22  # of an LR image that is searched whole; of a larger one, GRID x GRID places are
GRID = 8
MAX_BYTES = 2**29  # of a result that is copied from a store; it is not worth more
GREY = 128  # behind what is transparent
DOUBT_LEVELS = 32  # of 255: the uncertainty that is drawn brightest
RANKS = (
    ("lr_psnr", "ascending", "Lowest LR-PSNR", "Least faithful to their input."),
    ("colour_drift", "descending", "Largest colour drift", "The colours moved most."),
    ("uncertainty", "descending", "Most uncertain", "The samples differ most from one another."),
    ("seconds", "descending", "Slowest", "They took the longest."),
)
_DOUBT = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], np.float64)
Place = tuple[int, int, int, int]  # y, x, height and width in LR pixels


@dataclass(frozen=True)
class Tile:
    """One picture of a strip: what it is, and its PNG."""

    label: str
    png: bytes


@dataclass(frozen=True)
class Strip:
    """One asset: its tiles, of equal size, or the message that says why there are none."""

    key: str
    reason: str
    numbers: dict[str, float]
    place: Place | None = None
    tiles: list[Tile] = field(default_factory=list)
    message: str = ""


@dataclass(frozen=True)
class Group:
    """Assets that were chosen for one reason. again: keys of those that an earlier group shows."""

    title: str
    note: str
    strips: list[Strip]
    again: list[str]


def draw_groups(
    source: str,
    output: str,
    rows: pa.Table,
    *,
    worst: int = 4,
    sample: int = 12,
    seed: int = 0,
    settings: SceneSettings | None = None,
) -> list[Group]:
    """Return the worst assets by each metric, then a sample; each asset is drawn once. rows: RECEIPT_SCHEMA.

    What cannot be shown says why, and is no error. settings: how the sources are opened; the default reads first pages.
    """
    opened = replace(settings or SceneSettings(first_page=True), space=WorkingSpace("native"))
    groups, shown = [], set[str]()
    for title, note, chosen in choose(rows, worst=worst, sample=sample, seed=seed):
        strips = [draw(source, output, row, settings=opened) for row in chosen if row["key"] not in shown]
        groups.append(Group(title, note, strips, [row["key"] for row in chosen if row["key"] in shown]))
        shown |= {strip.key for strip in strips}
    return groups


def choose(rows: pa.Table, *, worst: int, sample: int, seed: int) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """Return (title, note, rows) of the done assets to show, whatever the order of the rows.

    A sample is of the smallest hashes of seed and key.
    """
    done = rows.filter(pc.equal(rows["status"], "done"))
    groups = []
    for name, order, title, note in RANKS:
        values = done["seconds"] if name == "seconds" else metric(done, name)
        ranked = pa.table({"value": values, "key": done["key"], "index": np.arange(done.num_rows)})
        ranked = ranked.filter(pc.fill_null(pc.is_finite(values), False))
        keys = [("value", order), ("key", "ascending")]
        if found := min(worst, ranked.num_rows):
            places = ranked["index"].take(pc.select_k_unstable(ranked, found, sort_keys=keys))
            groups.append((title, note, _plain(done.take(places))))
    if drawn := _sample(done["key"], sample, seed):
        groups.append(("A sample", f"Drawn by a hash of key and seed {seed}.", _plain(done.take(pa.array(drawn)))))
    return groups


def draw(source: str, output: str, row: dict[str, Any], *, settings: SceneSettings) -> Strip:
    """Return the strip of one row of `choose`."""
    import pyvips

    strip = Strip(row["key"], row["reason"], row["metrics"] | {"seconds": row["seconds"]})
    try:
        with Corpus(source=source).fetch(row) as original, open_scene(original, settings=settings) as scene:
            place, tiles = _tiles(scene, output, row)
    except Refused as refused:
        return replace(strip, message=f"{refused.reason}: {refused.message}")
    except (OSError, ValueError, pyvips.Error) as error:  # a result that has gone, a name that no store takes
        return replace(strip, message=f"{type(error).__name__}: {error}"[:300])
    return replace(strip, place=place, tiles=tiles)


def most_detailed(scene: Scene, height: int, width: int) -> tuple[int, int]:
    """Return y and x of the crop of this size whose brightness varies most, in LR pixels."""
    down, across = scene.height - height, scene.width - width
    if scene.height * scene.width <= SEARCH_PX:
        light = _light(scene.window(0, 0, scene.height, scene.width)[0])
        return _peak(_boxes(light**2, height, width) - _boxes(light, height, width) ** 2)
    steps = np.linspace(0, 1, GRID)
    places = [(round(down * v), round(across * u)) for v in steps for u in steps]
    return max(places, key=lambda at: float(_light(scene.window(at[0], at[1], height, width)[0]).var()))


def _tiles(scene: Scene, output: str, row: dict[str, Any]) -> tuple[Place, list[Tile]]:
    with _opened(storage.join(output, row["out_key"])) as file:
        result = _image(file)
        scale = max(1, result.height // scene.height)
        if (result.height, result.width) != (scale * scene.height, scale * scene.width):
            raise ValueError(f"{result.width} x {result.height} px is no multiple of {scene.width} x {scene.height} px")
        side = min(CROP_PX, max(1, TILE_PX // scale))
        height, width = min(side, scene.height), min(side, scene.width)
        uncertainty = storage.join(output, uncertainty_key(row["out_key"]))
        if "uncertainty" in row["metrics"] and storage.exists(uncertainty):
            with _opened(uncertainty) as doubt_file:
                y, x = _most_uncertain(doubt_file, scale, height, width)
                levels = _crop(_image(doubt_file), y, x, height, width, scale)[:, :, 0] / UNCERTAINTY_STEPS
                doubt = [Tile("uncertainty", _png(in_colours(levels)))]
        else:
            doubt, (y, x) = [], most_detailed(scene, height, width)
        samples = _crop(result, y, x, height, width, scale)
        colours, alpha = (samples[:, :, :-1], samples[:, :, -1:]) if result.hasalpha() else (samples, None)
        icc = result.get("icc-profile-data") if result.get_typeof("icc-profile-data") else None
        sr = _shown(colours, alpha, icc)
    lr, enlarged = _lr_and_bicubic(scene, y, x, height, width, scale)
    sr_label = "bicubic, published instead" if row["reason"] == "rejected" else "SR"
    tiles = [Tile("LR", _png(lr)), Tile("bicubic", _png(enlarged)), Tile(sr_label, _png(sr)), *doubt]
    return (y, x, height, width), tiles


def _lr_and_bicubic(scene: Scene, y: int, x: int, height: int, width: int, scale: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the crop enlarged by repeating its pixels, and by bicubic."""
    top, left = max(0, y - MARGIN_PX), max(0, x - MARGIN_PX)
    bottom, right = min(scene.height, y + height + MARGIN_PX), min(scene.width, x + width + MARGIN_PX)
    around = (top, left, bottom - top, right - left)
    colours, alpha = scene.window(*around)[0], scene.alpha(*around)
    smooth = None if alpha is None else bicubic(alpha[:, :, None], scale)
    enlarged = _shown(bicubic(colours, scale), smooth, scene.icc)[(y - top) * scale :, (x - left) * scale :]
    lr = _shown(colours, None if alpha is None else alpha[:, :, None], scene.icc)[y - top :, x - left :]
    return lr[:height, :width].repeat(scale, 0).repeat(scale, 1), enlarged[: height * scale, : width * scale]


@contextmanager
def _opened(uri: str) -> Iterator[IO[bytes]]:
    """Give a published file, opened on this machine. Raises OSError, also for what is too large to be copied here."""
    file = storage.open_file(uri)
    with file:
        try:
            file.fileno()
        except (OSError, AttributeError):  # an object of a store
            pass
        else:
            yield file
            return
    size = storage.size(uri) or 0
    if size > MAX_BYTES:
        raise OSError(f"{size:,} bytes are too many to be copied for one crop")
    with tempfile.TemporaryFile(prefix="diffsr-") as copy:
        for piece in storage.stream_listed(uri, None):
            copy.write(piece)
        copy.flush()
        yield copy


def _image(file: IO[bytes]) -> Any:
    """Return a pyvips image of an open file, to be read once from top to bottom; of its name no option is read."""
    import pyvips

    file.seek(0)
    return pyvips.Image.new_from_source(
        pyvips.Source.new_from_descriptor(file.fileno()), "", access=pyvips.Access.SEQUENTIAL
    )


def _crop(image: Any, y: int, x: int, height: int, width: int, scale: int) -> np.ndarray:
    """Return HWC samples of a result as they are stored."""
    return np.atleast_3d(image.crop(x * scale, y * scale, width * scale, height * scale).numpy())


def _most_uncertain(file: IO[bytes], scale: int, height: int, width: int) -> tuple[int, int]:
    """Return y and x, in LR pixels, of the crop whose uncertainty is highest in the mean."""
    image = _image(file)
    lr_height, lr_width = image.height // scale, image.width // scale
    coarse = max(1, math.ceil(math.sqrt(lr_height * lr_width / SEARCH_PX)))
    means = np.atleast_3d(image.shrink(scale * coarse, scale * coarse).numpy()).mean(axis=2)
    box = (min(max(1, height // coarse), means.shape[0]), min(max(1, width // coarse), means.shape[1]))
    y, x = _peak(_boxes(means, *box))
    return min(y * coarse, lr_height - height), min(x * coarse, lr_width - width)


def _boxes(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the mean over each box of this size inside HW values, by an integral image."""
    total = np.zeros((values.shape[0] + 1, values.shape[1] + 1))
    total[1:, 1:] = values.cumsum(0, dtype=np.float64).cumsum(1)
    sums = total[height:, width:] - total[:-height, width:] - total[height:, :-width] + total[:-height, :-width]
    return np.asarray(sums / (height * width))


def _peak(values: np.ndarray) -> tuple[int, int]:
    y, x = np.unravel_index(int(values.argmax()), values.shape)
    return int(y), int(x)


def _light(pixels: np.ndarray) -> np.ndarray:
    return np.asarray(pixels.mean(axis=2, dtype=np.float64))


def _shown(pixels: np.ndarray, alpha: np.ndarray | None, icc: bytes | None) -> np.ndarray:
    """Return HWC samples as uint8 RGB in sRGB: of many bands the first three, of two the first, over grey."""
    bands = pixels[:, :, : 3 if pixels.shape[2] >= 3 else 1]
    colours = WorkingSpace().convert(np.ascontiguousarray(_bytes(bands)), icc)
    if colours.shape[2] == 1:
        colours = colours.repeat(3, axis=2)
    if alpha is None:
        return colours
    part = _bytes(alpha) / 255
    return np.round(colours * part + GREY * (1 - part)).astype(np.uint8)


def _bytes(samples: np.ndarray) -> np.ndarray:
    if samples.dtype == np.uint16:
        return (samples >> 8).astype(np.uint8)
    if samples.dtype != np.uint8:
        raise ValueError(f"{samples.dtype} samples have no white; only those of 8 and 16 bits are shown")
    return samples


def in_colours(levels: np.ndarray) -> np.ndarray:
    """Return levels (HW) as uint8 RGB from dark for 0 to bright for DOUBT_LEVELS and more."""
    at = np.minimum(levels / DOUBT_LEVELS, 1) * (len(_DOUBT) - 1)
    bands = [np.interp(at, np.arange(len(_DOUBT)), _DOUBT[:, band]) for band in range(3)]
    return np.round(np.stack(bands, axis=2)).astype(np.uint8)


def _png(pixels: np.ndarray) -> bytes:
    zoom = max(1, TILE_PX // max(pixels.shape[:2]))
    out = io.BytesIO()
    Image.fromarray(pixels.repeat(zoom, 0).repeat(zoom, 1)).save(out, "PNG", compress_level=6)
    return out.getvalue()


def _sample(keys: pa.ChunkedArray, count: int, seed: int) -> Sequence[int]:
    """Return the places of the keys with the smallest hashes; Python objects exist for one batch at a time."""

    def hashes() -> Iterator[tuple[bytes, int]]:
        place = 0
        for batch in pa.table({"key": keys}).to_batches(max_chunksize=2**16):
            for key in batch["key"].to_pylist():
                yield blake2b(f"{seed}\0{key}".encode(), digest_size=8).digest(), place
                place += 1

    return [place for _, place in heapq.nsmallest(count, hashes())]


def _plain(rows: pa.Table) -> list[dict[str, Any]]:
    names = ["key", "etag", "size", "out_key", "reason", "metrics", "seconds"]
    return [row | {"metrics": dict(row["metrics"])} for row in rows.select(names).to_pylist()]

"""The card of a pair set: one HTML file that says what is in the set, what was left out and why, and how to read it.

Like the report it needs nothing else, asks for nothing, and carries no time: the same set gives the same bytes.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.commit import Duplicates
from pipelines.images import REASONS
from pipelines.manifest import Manifest
from pipelines.pages import pages
from pipelines.recipes import degradation_of, recipe_in_words
from pipelines.statistics import BINS, SAMPLE_PAIRS, Colours, Statistics

TILE_PX = 192  # a pair of tiles is as wide as a phone, three pairs are as wide as the page
GAP_PX, PAIR_GAP_PX, PAIRS_IN_A_ROW = 2, 10, 3
MOST_KINDS = 8  # of one kind that are named; the others are counted
IN_SET = "duplicate_in_set"  # found by the commit, not by a unit
# What became of patches, by the code in a receipt's metrics.
DROPS = {
    "flat": "flat: next to nothing to see in them",
    "flat_twin": "flat in the real LR",
    "invalid": "not valid everywhere: transparent, or without data",
    "duplicate": "near copy of another patch of its own image",
    IN_SET: "near copy of a patch of another image",
    "over_limit": "over the number of patches that one image may give",
}
TOO_SMALL = "too_small"  # counts images, not patches
STATUSES = {"done": "used", "skipped": "without a usable patch", "dead": "refused", "gone": "gone from the source"}


@dataclass(frozen=True)
class DeadLetters:
    """The sources that were refused for one reason: how many, and one of them as the example."""

    reason: str
    stage: str
    count: int
    key: str
    message: str


def write_card(
    *,
    title: str,
    manifest: Manifest,
    statistics: Statistics,
    sources: Mapping[str, int],
    drops: Mapping[str, int],
    dead: Sequence[DeadLetters],
    duplicates: Duplicates,
    contact_sheet: bytes,
    provenance: Mapping[str, str],
) -> str:
    """Return the HTML text. What is empty has no section.

    sources: number of sources by STATUSES. drops: those of the receipts: number of patches by DROPS, and of images by
    TOO_SMALL; a code may begin with "dropped_", and one without words here is shown as it is. duplicates: what the
    commit found; the copies that it dropped are added to the drops. contact_sheet: PNG, or empty. Raises ValueError
    for a status that has no name here.
    """
    for status in sorted(sources.keys() - STATUSES.keys()):
        raise ValueError(f"status is {status!r}: it must be one of {', '.join(STATUSES)}; it would be left out")
    environment = pages()
    environment.filters |= {"count": "{:,}".format, "share": _share}
    dropped = {code.removeprefix("dropped_"): number for code, number in drops.items() if number}
    too_small = dropped.pop(TOO_SMALL, 0)
    if copies := sum(duplicates.dropped.values()):
        dropped[IN_SET] = copies
    return environment.get_template("card.html").render(
        title=title,
        sentence=_sentence(manifest.recipe, statistics),
        digest=manifest.digest,
        shards=len(manifest.shards),
        bytes=sum(shard.bytes for shard in manifest.shards),
        statistics=statistics,
        sources={STATUSES[status]: sources[status] for status in STATUSES if sources.get(status)},
        recipe=recipe_in_words(manifest.recipe),
        kinds=_kinds(statistics),
        charts=[_charts(int(channels), colours) for channels, colours in statistics.colours.items()],
        drops=sorted(
            ((DROPS.get(code, code), number) for code, number in dropped.items()), key=lambda d: (-d[1], d[0])
        ),
        cut=statistics.pairs + sum(dropped.values()),
        too_small=too_small,
        dead=sorted(dead, key=lambda found: (-found.count, found.stage, found.reason)),
        reasons=REASONS,
        leaks=duplicates,
        sheet=contact_sheet,
        snippets=reading_snippets(),
        provenance=provenance,
    )


def reading_snippets() -> dict[str, str]:
    """Return, by library, the lines that read exactly the pairs that count, in the folder of the set."""
    return {
        "pandas": (
            "import json, pandas as pd\n"
            'shards = [(s, pd.read_parquet(s["name"])) for s in json.load(open("manifest.json"))["shards"]]\n'
            'pairs = pd.concat(t[~(t.source_key.isin(s["dropped_sources"]) | t.pair_id.isin(s["dropped_pairs"]))]\n'
            "                  for s, t in shards)"
        ),
        "DuckDB": (
            "SELECT p.* FROM read_parquet('data/*.parquet', filename = true, union_by_name = true) p\n"
            "JOIN (SELECT unnest(shards) s FROM 'manifest.json') ON suffix(filename, s.name)\n"
            "WHERE NOT list_contains(s.dropped_sources::VARCHAR[], source_key)\n"
            "  AND NOT list_contains(s.dropped_pairs::VARCHAR[], pair_id)"
        ),
    }


def _sentence(recipe: Mapping[str, Any], statistics: Statistics) -> str:
    images = sum(split.sources for split in statistics.splits.values())
    megapixels = sum(split.hr_megapixels for split in statistics.splits.values())
    if recipe.get("lr_source"):
        made = "each beside its real LR twin"
    else:
        made = f"each beside the LR that {degradation_of(recipe)[0]} makes of it"
    return (
        f"{_number(statistics.pairs, 'pair')} at ×{recipe['scale']} from {_number(images, 'image')}: "
        f"{megapixels:,.1f} megapixels of HR patches, {made}."
    )


def _kinds(statistics: Statistics) -> list[tuple[str, list[tuple[str, int]], int]]:
    """Return (what, the most frequent kinds with their pairs, how many kinds more there are)."""
    words: dict[str, tuple[dict[str, int], Callable[[str], str]]] = {
        "HR size": (statistics.sizes, lambda size: size.replace("x", " × ") + " px"),
        "Channels": (statistics.channels, lambda count: {"1": "1 (grey)", "3": "3 (RGB)"}.get(count, count)),
        "Samples": (statistics.dtypes, str),
        "File format": (statistics.formats, str),
        "Colour profile": (statistics.profiles, lambda name: name or "none"),
    }
    found = []
    for label, (counts, word) in words.items():
        kinds = sorted(((word(name), count) for name, count in counts.items()), key=lambda kind: (-kind[1], kind[0]))
        if kinds:
            found.append((label, kinds[:MOST_KINDS], max(0, len(kinds) - MOST_KINDS)))
    return found


def _charts(channels: int, colours: Colours) -> dict[str, Any]:
    """Return what the page draws of one number of channels: per channel a path of BINS bars in a box of BINS x 100."""
    names = {1: ["grey"], 3: ["R", "G", "B"]}.get(channels, [f"band {band + 1}" for band in range(channels)])
    highest = max(1, max(max(counts) for counts in colours.histogram))  # one scale: the channels can be compared
    rows = zip(names, colours.mean, colours.deviation, colours.histogram, strict=True)
    return {
        "channels": channels,
        "megapixels": f"{colours.pixels / 1e6:,.1f}",
        "charts": [
            {
                "name": name,
                "mean": f"{mean:.1f}",
                "deviation": f"{deviation:.1f}",
                "at": f"{min(max(mean, 0), 255) / 255 * BINS:.2f}",
                "low": f"{max(mean - deviation, 0) / 255 * BINS:.2f}",
                "width": f"{max(0, min(mean + deviation, 255) - max(mean - deviation, 0)) / 255 * BINS:.2f}",
                "bars": "".join(f"M{i} 100V{100 - 100 * n / highest:.1f}H{i + 1}V100Z" for i, n in enumerate(counts)),
            }
            for name, mean, deviation, counts in rows
        ],
    }


def contact_sheet(
    pairs: Sequence[tuple[NDArray[Any], NDArray[Any]]], *, value_range: tuple[float, float] | None = None
) -> bytes:
    """Return a PNG of up to SAMPLE_PAIRS pairs in their order, LR left and HR right, or nothing for none.

    pairs: (hr, lr) HWC. LR is enlarged to the size of HR by repeating pixels; both are cut to the middle TILE_PX, or
    enlarged by a whole factor while they stay below it. More than three bands are shown by the first three, fewer by
    the first. value_range: what is black and white in samples that are not uint8; None: all of uint16, and 0 to 1.
    """
    shown = [_tiles(hr, lr, value_range) for hr, lr in pairs[:SAMPLE_PAIRS]]
    if not shown:
        return b""
    height, width = (max(tile.shape[axis] for both in shown for tile in both) for axis in (0, 1))
    columns = min(PAIRS_IN_A_ROW, len(shown))
    rows = -(-len(shown) // columns)
    across = 2 * width + GAP_PX
    size = (rows * (height + PAIR_GAP_PX) - PAIR_GAP_PX, columns * (across + PAIR_GAP_PX) - PAIR_GAP_PX, 4)
    sheet = np.zeros(size, np.uint8)  # what nothing is drawn on stays transparent, for light and dark pages
    for index, (lr, hr) in enumerate(shown):
        y, x = index // columns * (height + PAIR_GAP_PX), index % columns * (across + PAIR_GAP_PX)
        for tile, left in ((lr, x), (hr, x + width + GAP_PX)):
            sheet[y : y + tile.shape[0], left : left + tile.shape[1], :3] = tile
            sheet[y : y + tile.shape[0], left : left + tile.shape[1], 3] = 255
    out = io.BytesIO()
    Image.fromarray(sheet).save(out, "PNG", compress_level=9)
    return out.getvalue()


def _tiles(hr: NDArray[Any], lr: NDArray[Any], value_range: tuple[float, float] | None) -> list[NDArray[np.uint8]]:
    """Return LR and HR as RGB tiles of one size."""
    height, width = hr.shape[:2]
    zoom = max(1, TILE_PX // max(height, width))
    tiles = []
    for pixels in (lr, hr):
        y = np.arange(zoom * height) * pixels.shape[0] // (zoom * height)
        x = np.arange(zoom * width) * pixels.shape[1] // (zoom * width)
        tiles.append(_rgb(pixels, value_range)[_middle(y)[:, None], _middle(x)])
    return tiles


def _middle(indices: NDArray[Any]) -> NDArray[Any]:
    start = max(0, (len(indices) - TILE_PX) // 2)
    return indices[start : start + TILE_PX]


def _rgb(pixels: NDArray[Any], value_range: tuple[float, float] | None) -> NDArray[np.uint8]:
    """Return HWC samples as uint8 RGB: the first three bands, or the first as grey."""
    bands = pixels[:, :, :3] if pixels.shape[2] >= 3 else np.repeat(pixels[:, :, :1], 3, axis=2)
    if bands.dtype == np.uint8:
        return bands
    low, high = value_range or ((0, 65535) if bands.dtype == np.uint16 else (0, 1))
    return np.round(np.clip((bands.astype(np.float64) - low) / (high - low), 0, 1) * 255).astype(np.uint8)


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _share(count: int, whole: int) -> str:
    """Return such as "4.2 %": never 0 % or 100 % for what is some or not all."""
    share = 100 * count / whole if whole else 0.0
    if 0 < share < 0.1:
        return "< 0.1 %"
    if 99.9 < share < 100:
        return "> 99.9 %"
    return f"{share:.0f} %" if share in (0, 100) else f"{share:.1f} %"

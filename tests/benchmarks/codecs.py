"""The lossless codecs of pair sets, on real patches: time to write, time to read, bytes; prints codecs.md.

    python -m tests.benchmarks.codecs > tests/benchmarks/codecs.md

Seconds are CPU time of one thread, each patch by each codec in turn and the better of two: on a shared machine they
leave out what others took.
"""

import argparse
import datetime
import io
import math
import textwrap
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

DATA = Path(__file__).resolve().parents[2] / "../shared/data"
PATCH_PX = 256
SOURCES = {  # what the patches are of: the folder below --data and the files in it
    "photographs, reduced": ("train/photos_open", "*.jpg"),
    "JPEG photographs, as they are": ("train/bsds200", "*.jpg"),
    "damaged film": ("video/old_film_frames_001", "*.png"),
}
CODECS: dict[str, tuple[str, dict[str, Any]]] = {
    "WebP method 0": ("WEBP", {"lossless": True, "method": 0, "exact": True}),
    "WebP method 1": ("WEBP", {"lossless": True, "method": 1, "exact": True}),
    "WebP method 4": ("WEBP", {"lossless": True, "method": 4, "exact": True}),
    "PNG level 1": ("PNG", {"compress_level": 1}),
    "PNG level 6": ("PNG", {"compress_level": 6}),
}
CHOSEN, RIVAL = "WebP method 0", "PNG level 1"
_READERS = {"WEBP": WebPImageFile, "PNG": PngImageFile}


class Cost(NamedTuple):
    """Of one patch: milliseconds to write and to read it, and its bytes."""

    write_ms: float
    read_ms: float
    num_bytes: int


def patches(files: Sequence[Path], limit: int) -> Iterator[np.ndarray]:
    """Yield at most `limit` RGB patches, uint8 (PATCH_PX, PATCH_PX, 3), spread evenly over all that the files hold."""
    places = []
    for path in files:
        with Image.open(path) as image:
            width, height = image.size
        places += [
            (path, y, x)
            for y in range(0, height - PATCH_PX + 1, PATCH_PX)
            for x in range(0, width - PATCH_PX + 1, PATCH_PX)
        ]
    for index in range(min(limit, len(places))):
        path, y, x = places[index * len(places) // min(limit, len(places))]
        with Image.open(path) as image:
            yield np.asarray(image.convert("RGB").crop((x, y, x + PATCH_PX, y + PATCH_PX)))


def cost(pixels: np.ndarray, codec: str) -> Cost:
    """Return what a codec costs on one patch, the better of two. Raises AssertionError if it does not give it back."""
    format, options = CODECS[codec]
    write_s = read_s = math.inf
    for _ in range(2):
        out = io.BytesIO()
        started = time.thread_time()
        Image.fromarray(pixels).save(out, format, **options)
        written = time.thread_time()
        found = np.asarray(_READERS[format](io.BytesIO(out.getvalue())))
        write_s, read_s = min(write_s, written - started), min(read_s, time.thread_time() - written)
        assert np.array_equal(found, pixels), codec
    return Cost(write_s * 1e3, read_s * 1e3, len(out.getvalue()))


def mean(costs: Sequence[Cost]) -> Cost:
    """Return the means."""
    return Cost(*(sum(values) / len(costs) for values in zip(*costs, strict=True)))


def row(what: str, num: int, codec: str, found: Cost, rival: Cost) -> str:
    """Return the row of a kind of picture and a codec; raw pixels are 3 bytes."""
    share = found.num_bytes / (3 * PATCH_PX**2)
    return (
        f"| {what} | {num} | {codec} | {found.write_ms:.1f} | {found.read_ms:.1f} | {found.num_bytes / 1e3:.1f} | "
        f"{share:.0%} | {found.num_bytes / rival.num_bytes:.2f} |"
    )


def main() -> None:
    """Print codecs.md."""
    parser = argparse.ArgumentParser(description="The lossless codecs of pair sets.")
    parser.add_argument("--patches", type=int, default=300, help="of each kind of picture, at most")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the folders in SOURCES")
    arguments = parser.parse_args()
    costs: dict[str, dict[str, list[Cost]]] = {}
    for what, (folder, pattern) in SOURCES.items():
        files = sorted((arguments.data / folder).glob(pattern))
        costs[what] = {codec: [] for codec in CODECS}
        for pixels in patches(files, arguments.patches):
            for codec in CODECS:
                costs[what][codec].append(cost(pixels, codec))
    costs["all"] = {codec: [c for of_kind in list(costs.values()) for c in of_kind[codec]] for codec in CODECS}
    means = {what: {codec: mean(found) for codec, found in kinds.items()} for what, kinds in costs.items()}
    rows = [
        row(what, len(costs[what][codec]), codec, means[what][codec], means[what][RIVAL])
        for what in costs
        for codec in CODECS
    ]
    ours, rival = means["all"][CHOSEN], means["all"][RIVAL]
    conclusion = (
        f"{CHOSEN} takes {ours.num_bytes / rival.num_bytes:.2f} of the bytes of {RIVAL}, "
        f"{ours.write_ms / rival.write_ms:.2f} of its time to write and {ours.read_ms / rival.read_ms:.2f} of its time "
        "to read; a set is written once, and read in every epoch."
    )
    from tests.benchmarks.steps import cpu_name  # here: it brings torch

    print(f"""# The lossless codec of a patch

Printed by `python -m tests.benchmarks.codecs` on {datetime.date.today()}.
{cpu_name()}, 1 thread, Pillow {version("pillow")}.

Patches of {PATCH_PX} px, RGB, 8 bits; CPU time of writing and of reading one, and its size: means. Every patch was
read back and compared.

| pictures | patches | codec | write, ms | read, ms | kB | of raw | of {RIVAL} |
|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

{textwrap.fill(conclusion, 120)}""")


if __name__ == "__main__":
    main()

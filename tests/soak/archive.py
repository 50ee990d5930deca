"""What lies in the source of the simulated nights, what happens to it in between, and what must become of it."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from tests import hostile
from tests.hostile import DONE, SKIPPED, Expected
from tests.soak.bucket import Bucket

# What the hostile corpus says of pairs holds for upscaling, but for: what gives no patch is a picture all the same;
# 32-bit floats are none that can be published.
OTHERWISE: dict[str, Expected] = {"float.tif": frozenset({"unsupported_mode"})}
ONLY_FILES = ("a link to itself.png", "a link to nowhere.png", "unreadable.png", "no utf-8 \\udcff.png")
BAD_NAME = frozenset({"bad_name"})
# Names that a bucket can hold and a file system cannot.
KEYS: dict[str, Expected] = {
    "../up.png": BAD_NAME, "deep/../../up.png": BAD_NAME, "/leading.png": DONE, "double//slash.png": DONE,
    "control \x01\x1f.png": DONE, "k" * 1000 + ".png": DONE, "k" * 1016 + ".png": BAD_NAME, "./dot.png": DONE,
}  # fmt: skip
CHANGED = {  # what the later nights change, there with any `every`
    "rgb.png", "rgb.jpg", "rgb.tif", "rgb.bmp", "rgb.webp", "noise.png", "grey.jpg", "empty.png",
}  # fmt: skip
KEPT_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "AVIF")


class Archive:
    """The source prefix of a bucket. truth: what must become of each object in it; told: what was done to it, by key;
    formats: of the pictures, as Pillow reads them, which decides where a result lies."""

    def __init__(self, bucket: Bucket, prefix: str) -> None:
        self.bucket, self.prefix = bucket, prefix
        self.truth: dict[str, Expected] = {}
        self.formats: dict[str, str] = {}
        self.data: dict[str, bytes] = {}
        self.told: dict[str, str] = {}

    def put(self, key: str, data: bytes, expected: Expected, what: str) -> None:
        """Write an object and say what must become of it."""
        self.bucket.put(self.prefix + key, data)
        self.truth[key], self.data[key], self.told[key] = expected, data, what
        if expected == DONE:
            self.formats[key] = format_of(data)

    def remove(self, key: str) -> None:
        """Take an object away."""
        self.bucket.delete(self.prefix + key)
        del self.truth[key]
        self.told[key] = "removed"

    def outputs(self) -> set[str]:
        """Return the keys of all that must lie in the output, results and sidecars."""
        found = set[str]()
        for key, expected in self.truth.items():
            if expected == DONE:
                kept = self.formats[key] in KEPT_FORMATS
                found |= {name := key if kept else f"{key}.png", f"{name}.json"}
        return found


def format_of(data: bytes) -> str:
    """Return the format of a picture, as Pillow names it; 16-bit PNG and TIFF included."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        with open(file.name, "rb") as start:
            if start.read(4) in (b"II*\0", b"MM\0*"):
                return "TIFF"
        with Image.open(file.name) as image:
            return str(image.format)


def fill(archive: Archive, *, every: int) -> None:
    """Put the hostile corpus (every n-th file), names of buckets, and good pictures into an empty archive."""
    archive.told.clear()
    with tempfile.TemporaryDirectory(prefix="diffsr-archive-") as name:
        expected = {**hostile.make(Path(name)), **OTHERWISE}
        for index, key in enumerate(sorted(expected)):
            if (index % every == 0 or key in CHANGED) and key not in ONLY_FILES:
                outcome = expected[key] if expected[key] != SKIPPED else DONE
                archive.put(key, (Path(name) / key).read_bytes(), outcome, "new")
    for index, (key, outcome) in enumerate(KEYS.items()):
        archive.put(key, hostile.png(20_000 + index, 24, 32), outcome, "new")
    for index, (key, data) in enumerate(good(21_000, 12)):
        archive.put(f"album {index % 3}/{key}", data, DONE, "new")


def good(seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of small pictures: PNG, JPEG, 16-bit PNG, grey and with alpha, in turn."""
    for index in range(count):
        picture = hostile.picture(seed + index, 32, 48)
        kind = index % 5
        if kind == 2:
            rows = np.asarray(picture, np.uint16) * 257 + index
            packed = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)
            yield f"{seed + index} 16 bit.png", hostile.png_of(48, 32, bits=16, colour=2, rows=packed)
        elif kind == 4:
            picture.putalpha(Image.linear_gradient("L").resize((48, 32)))
            yield f"{seed + index} alpha.png", hostile.save(picture, "PNG")
        else:
            format, mode = {0: ("PNG", "RGB"), 1: ("JPEG", "RGB"), 3: ("PNG", "L")}[kind]
            yield f"{seed + index}.{format.lower()}", hostile.save(picture.convert(mode), format)


def second_night(archive: Archive, result: tuple[str, bytes]) -> str:
    """Change the archive before the second night; result: one of our own, which somebody drops into it."""
    archive.told.clear()
    for key, data in good(22_000, 5):
        archive.put(f"album 1/{key}", data, DONE, "added")
    archive.put(
        f"album 1/{result[0]}", result[1], frozenset({"already_upscaled"}), "added: a result of the night before"
    )
    done = sorted(key for key in archive.truth if key.startswith("album 0/") and archive.truth[key] == DONE)
    archive.put(done[0], hostile.save(hostile.picture(23_000, 40, 28), "PNG"), DONE, "changed")
    archive.put("rgb.jpg", hostile.save(hostile.picture(23_001), "JPEG"), DONE, "changed")
    archive.put("rgb.tif", b"<html>404</html>", frozenset({"not_an_image"}), "broken: a web page now")
    archive.put(done[1], archive.data[done[1]][: len(archive.data[done[1]]) // 2],
                frozenset({"truncated", "corrupt"}), "broken: cut in half")  # fmt: skip
    archive.put(done[2], archive.data[done[2]], DONE, "written again, the same content")
    for key in (done[3], "rgb.bmp", "noise.png"):
        archive.remove(key)
    return "6 objects added, 2 changed, 2 broken, 1 written again with the same content, 3 removed"


def third_night(archive: Archive) -> str:
    """Change the archive before the third night."""
    broken = sorted(key for key, what in archive.told.items() if what == "broken: cut in half")[0]
    archive.told.clear()
    for key, data in good(24_000, 2):
        archive.put(f"album 2/{key}", data, DONE, "added")
    archive.put(broken, hostile.save(hostile.picture(25_000, 28, 36), "PNG"), DONE, "mended")
    archive.put("rgb.bmp", archive.data["rgb.bmp"], DONE, "came back")
    archive.put("rgb.jpg", hostile.save(hostile.picture(25_001), "JPEG"), DONE, "changed again")
    archive.put("grey.jpg", b"", frozenset({"empty_file"}), "broken: empty now")
    archive.remove("empty.png")
    archive.remove("rgb.webp")
    return "2 objects added, 1 changed, 1 mended, 1 came back, 1 broken, 2 removed"

"""How large an image is, by its header alone: for gates and forecasts, before anything is decoded."""

from typing import IO

from pipelines import images, storage
from pipelines.headers import read_header
from pipelines.images import Refused

_BLOCK_BYTES = 64 * 2**10  # of one request to a store: a header is nearly always in the first


def megapixels(file: IO[bytes]) -> float | None:
    """Return the size of the image in an open file in 1e6 px, None where it has no header that tells."""
    file.seek(0)
    format = images.identify(file.read(64))
    try:
        if format == "JPEG 2000":
            header = read_header(file, format, max_pixels=0)
            return header.height * header.width / 1e6
        height, width = images.dimensions(file, format)
        return height * width / 1e6
    except Refused:
        return None


def megapixels_at(uri: str) -> float | None:
    """`megapixels` of an object; None also where it cannot be read."""
    try:
        with storage.open_file(uri, block_bytes=_BLOCK_BYTES) as file:
            return megapixels(file)
    except (OSError, ValueError):
        return None

"""Samples <-> blobs: the lossless encodings of pixels inside pair sets, previews and logged pictures.

uint8 of 1 or 3 channels is WebP or PNG, which every image library opens; anything else is an npy file (NumPy's own
format, no pickle) in a standard zstd frame.
"""

import io
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from pipelines.images import Refused, decode

CODECS = ("webp", "png")
NPY = "npy+zstd"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


def codec_of(pixels: np.ndarray, codec: str) -> str:
    """Return the codec that `encode_blob` will use: WebP has no grey, and neither holds more than 8 bits or 3 bands."""
    if pixels.dtype != np.uint8 or pixels.shape[2] not in (1, 3):
        return NPY
    return "png" if pixels.shape[2] == 1 else codec


def encode_blob(pixels: np.ndarray, codec: str) -> bytes:
    """Return HWC `pixels` as a lossless blob of `codec_of(pixels, codec)`; `decode_blob` gives the samples back.

    codec: "webp" (smaller, faster to read) or "png" (faster to write), for uint8 of 3 channels. Raises ValueError for
    another codec, for pixels that are empty or not HWC, and for samples that are neither integers nor floats.
    """
    if codec not in CODECS:
        raise ValueError(f"codec={codec!r}: must be 'webp' or 'png'")
    if pixels.ndim != 3 or 0 in pixels.shape or pixels.dtype.kind not in "uif":
        raise ValueError(f"pixels: {pixels.dtype} {pixels.shape}; must be numbers, HWC, and not empty")
    pixels = np.ascontiguousarray(pixels)
    chosen = codec_of(pixels, codec)
    if chosen == NPY:
        return _encode_npy(pixels)
    out = io.BytesIO()
    options: dict[str, Any] = {"lossless": True, "method": 0, "exact": True} if chosen == "webp" else {}
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    image.save(out, chosen.upper(), **(options or {"compress_level": 1}))
    return out.getvalue()


def decode_blob(data: bytes) -> np.ndarray:
    """Return the HWC samples of a blob of `encode_blob`, or the uint8 ones of an image file kept as it was.

    Raises `Refused` for a damaged one.
    """
    if not data.startswith(_ZSTD_MAGIC):
        return decode(data).pixels
    try:
        with pa.CompressedInputStream(io.BytesIO(data), "zstd") as stream:
            return np.lib.format.read_array(io.BytesIO(stream.read()), allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise Refused("decode", "corrupt", f"{type(error).__name__}: {error}"[:300]) from error


def _encode_npy(pixels: np.ndarray) -> bytes:
    plain = io.BytesIO()
    np.lib.format.write_array(plain, pixels, version=(1, 0), allow_pickle=False)
    packed: bytes = pa.Codec("zstd", compression_level=3).compress(plain.getvalue(), asbytes=True)
    return packed

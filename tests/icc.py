"""ICC profiles made from their definitions: matrix profiles of any RGB space, and a CMYK press of sixteen colours.

Nothing of a vendor's profile is in them, and no time: the same call gives the same bytes. ICC.1:2001-04 (version 2.4).
"""

import struct
from collections.abc import Callable

import numpy as np

D50 = np.array([0.9642, 1.0, 0.8249])  # the profile connection space's white, as the standard rounds it
D65_XY = (0.3127, 0.3290)
PRIMARIES_XY = {
    "Display P3": ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
    "Adobe RGB": ((0.640, 0.330), (0.210, 0.710), (0.150, 0.060)),
    "sRGB": ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),
}
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
# CIELAB, relative to the paper, of the overprints of C, M and Y; with K on top all is nearly black.
_INKS_LAB = {
    "": (100, 0, 0), "Y": (89, -5, 93), "M": (48, 74, -3), "MY": (47, 68, 48),
    "C": (55, -37, -50), "CY": (50, -65, 27), "CM": (24, 22, -46), "CMY": (23, 0, 0),
}  # fmt: skip


def srgb_curve(encoded: np.ndarray) -> np.ndarray:
    """Return the linear light of encoded values, both in [0, 1] (IEC 61966-2-1)."""
    return np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)


def rgb_profile(name: str) -> bytes:
    """Return the profile of a space of `PRIMARIES_XY`: white D65, gamma 563/256 for Adobe RGB, else the sRGB curve."""
    curve = (lambda v: v ** (563 / 256)) if name == "Adobe RGB" else srgb_curve
    columns = rgb_to_xyz_d50(PRIMARIES_XY[name])
    tags = {f"{c}XYZ".encode(): _xyz(columns[:, i]) for i, c in enumerate("rgb")}
    tags |= {f"{c}TRC".encode(): _curve(curve) for c in "rgb"}
    return _profile(b"mntr", b"RGB ", b"XYZ ", name, tags)


def cmyk_profile() -> bytes:
    """Return the profile of a made-up press: 16 corners in CIELAB, linear between them."""
    corners = []  # C varies slowest, K fastest
    for inks in _corners("CMY"):
        lightness, a, b = _INKS_LAB[inks]
        corners += [(lightness, a, b), (lightness * 0.15, a * 0.1, b * 0.1)]  # without and with K
    lab = np.array(corners) * (2.55, 1, 1) + (0, 128, 128)
    ramp = bytes(range(256))
    lut = struct.pack(">4sI4B9i", b"mft1", 0, 4, 3, 2, 0, *(np.eye(3).ravel() * 65536).astype(int))
    lut += ramp * 4 + np.round(lab).astype(np.uint8).tobytes() + ramp * 3
    return _profile(b"prtr", b"CMYK", b"Lab ", "Sixteen colours", {b"A2B0": lut})


def rgb_to_xyz_d50(primaries: tuple[tuple[float, float], ...]) -> np.ndarray:
    """Return the 3x3 matrix from linear RGB with white D65 to XYZ, adapted to D50 by Bradford's transform."""
    unscaled = np.array([_xyz_of(x, y) for x, y in primaries]).T
    white = _xyz_of(*D65_XY)
    to_xyz = unscaled * np.linalg.solve(unscaled, white)
    gain = (_BRADFORD @ D50) / (_BRADFORD @ white)
    adapted: np.ndarray = np.linalg.inv(_BRADFORD) @ np.diag(gain) @ _BRADFORD @ to_xyz
    return adapted


def _corners(inks: str) -> list[str]:
    """Return the subsets of inks, the first ink varying slowest."""
    return _corners(inks[:-1]) and [s + e for s in _corners(inks[:-1]) for e in ("", inks[-1])] if inks else [""]


def _xyz_of(x: float, y: float) -> np.ndarray:
    return np.array([x / y, 1.0, (1 - x - y) / y])


def _xyz(values: np.ndarray) -> bytes:
    return struct.pack(">4sI3i", b"XYZ ", 0, *np.round(values * 65536).astype(int))


def _curve(function: Callable[[np.ndarray], np.ndarray], size: int = 1024) -> bytes:
    table = np.round(function(np.linspace(0, 1, size)) * 65535).astype(">u2")
    return struct.pack(">4sII", b"curv", 0, size) + table.tobytes()


def _profile(kind: bytes, space: bytes, pcs: bytes, name: str, tags: dict[bytes, bytes]) -> bytes:
    """Return header, tag table and tags, each tag at a multiple of 4 bytes. The date in the header is zero."""
    text = name.encode() + b"\0"
    description = struct.pack(">4sII", b"desc", 0, len(text)) + text + bytes(78)
    tags = {b"desc": description, b"cprt": b"text\0\0\0\0" + b"CC0\0", b"wtpt": _xyz(D50), **tags}
    offset = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for signature, data in tags.items():
        table += struct.pack(">4sII", signature, offset + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    size = offset + len(body)
    header = struct.pack(">I4sI4s4s4s12s4s", size, bytes(4), 0x02400000, kind, space, pcs, bytes(12), b"acsp")
    header += bytes(28) + struct.pack(">3i", *np.round(D50 * 65536).astype(int)) + bytes(48)
    assert len(header) == 128
    return header + table + body

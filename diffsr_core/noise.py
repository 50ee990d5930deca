"""Counter-based Gaussian noise: a field that is computed where it is looked at, never drawn from a stream.

A generator with state gives other noise for another batch position, tile order or retry. Here each value is a pure
function of (key, channel, y, x, step): a tile computes its own window of one endless field, and a retry computes the
same window again.
"""

import hashlib
import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_NUM_ROUNDS = 10

# Of four numbers each: about 20 float64 temporaries of this size stay in a cache, or fill a GPU.
_BAND_PX = {"cpu": 1 << 16, "cuda": 1 << 21}

# Minimax polynomials of fdlibm (e_log.c, k_sin.c, k_cos.c), highest power first.
_LOG = (
    1.479819860511658591e-01,
    1.531383769920937332e-01,
    1.818357216161805012e-01,
    2.222219843214978396e-01,
    2.857142874366239149e-01,
    3.999999999940941908e-01,
    6.666666666666735130e-01,
)
_SIN = (
    1.58969099521155010221e-10,
    -2.50507602534068634195e-08,
    2.75573137070700676789e-06,
    -1.98412698298579493134e-04,
    8.33333333332248946124e-03,
    -1.66666666666666324348e-01,
)
_COS = (
    -1.13596475577881948265e-11,
    2.08757232129817482790e-09,
    -2.75573143513906633035e-07,
    2.48015872894767294178e-05,
    -1.38888888888741095749e-03,
    4.16666666666666019037e-02,
)


def philox4x32(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Return Philox4x32-10 of each counter: int64 (..., 4) holding uint32 values, on the counter's device.

    counter: int64 (..., 4) holding uint32 values; key: two uint32 values.
    Raises ValueError for another dtype, a last dimension that is not 4, or a key outside uint32.
    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; constants of Random123.
    """
    if counter.dtype != torch.int64 or counter.ndim < 1 or counter.shape[-1] != 4:
        raise ValueError(
            f"counter is {counter.dtype} of shape {tuple(counter.shape)}: it must be int64 with a last dimension of 4; "
            "convert with .to(torch.int64) and stack the four words last"
        )
    c0, c1, c2, c3 = counter.unbind(-1)
    return torch.stack(_philox_words(c0, c1, c2, c3, key), dim=-1)


def noise_key(seed: int, digest: bytes | str, sample: int) -> tuple[int, int]:
    """Return the Philox key, two uint32 values, of one sample of one asset.

    seed: any integer, the recipe's; digest: what names the asset's content (text counts as its UTF-8 bytes);
    sample: 0, 1, ... for the several results of one asset. Raises ValueError for a negative sample.
    """
    if sample < 0:
        raise ValueError(f"sample is {sample}: it must be 0 or more; number the samples of an asset from 0")
    content = digest.encode() if isinstance(digest, str) else digest
    # Decimal numbers with a separator that no number holds: no two triples write the same text.
    text = b"%d|%d|%b" % (seed, sample, content)
    word = int.from_bytes(hashlib.blake2b(text, digest_size=8, person=b"diffsr-noise").digest(), "little")
    return word & _MASK, word >> 32


def gaussian(
    key: tuple[int, int],
    *,
    channels: int,
    height: int,
    width: int,
    step: int,
    y0: int = 0,
    x0: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return standard normal noise, float32 (1, channels, height, width), |value| < 6.7.

    The value at (channel, y, x, step) is a function of the key and those four alone; y0 and x0 are the absolute
    coordinates of the first pixel in px, taken modulo 2**32, so they may be negative.
    Raises ValueError for an empty window, a side over 2**32, a step outside uint32, or a key outside uint32.
    Source: Philox words (x, y, channel // 4, step), four words to four normals by Box and Muller in float64.
    """
    for name, value in (("channels", channels), ("height", height), ("width", width)):
        if not 1 <= value <= _MASK:
            raise ValueError(f"{name} is {value}: it must be between 1 and {_MASK}; ask for a window that is not empty")
    if not 0 <= step <= _MASK:
        raise ValueError(f"step is {step}: it must be between 0 and {_MASK}; number the steps of the sampler from 0")
    groups = -(-channels // 4)
    out = torch.empty((groups, 4, height, width), dtype=torch.float32, device=device)
    x = (torch.arange(width, dtype=torch.int64, device=device) + x0 % (_MASK + 1)) & _MASK
    y = (torch.arange(height, dtype=torch.int64, device=device) + y0 % (_MASK + 1)) & _MASK
    numbers = torch.arange(groups, dtype=torch.int64, device=device)[:, None, None]
    # A band of some groups of four channels at a time bounds the memory; the values do not know of either.
    most = _BAND_PX["cuda" if out.is_cuda else "cpu"]
    rows = min(height, max(1, most // width))
    count = max(1, most // (rows * width))
    for top in range(0, height, rows):
        band = y[top : top + rows, None]
        for first in range(0, groups, count):
            group = numbers[first : first + count]
            w0, w1, w2, w3 = _philox_words(x, band, group, torch.full_like(group, step), key)
            part = out[first : first + count, :, top : top + rows]
            part[:, 0], part[:, 1] = _box_muller(w0, w1)
            part[:, 2], part[:, 3] = _box_muller(w2, w3)
    return out.view(1, 4 * groups, height, width)[:, :channels]


def _philox_words(
    c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four output words of Philox4x32-10 for counter words that broadcast against one another."""
    k0, k1 = key
    if not (0 <= k0 <= _MASK and 0 <= k1 <= _MASK):
        raise ValueError(f"key is {key}: both words must be between 0 and {_MASK}; make it with noise_key")
    for _ in range(_NUM_ROUNDS):
        # The product of two uint32 may wrap the sign of int64; its 64 bits are right, and the mask drops the sign.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, ((p0 >> 32) & _MASK) ^ c3 ^ k1
        c1, c3 = p1 & _MASK, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _box_muller(word1: Tensor, word2: Tensor) -> tuple[Tensor, Tensor]:
    """Return two independent standard normals, float64, from two uint32 words of one shape.

    Made of IEEE additions, multiplications and divisions only. torch.log, cos and sqrt were rejected: their last bit
    is the library's (MKL's float64 sqrt misses the correct rounding in 1.3 % of values), and a published output may
    not depend on which library serves a machine or a loop's tail. Within 3e-15 of the exact value.
    """
    radius = _square_root(-2.0 * _log_unit(word1))
    # The quarter turn is taken off as an integer, so that the rest, within an eighth of a turn, is exact.
    quarter = (word2 + (1 << 29)) >> 30
    angle = (word2 - (quarter << 30)).to(torch.float64) * (2 * math.pi / 2**32)
    square = angle * angle
    sine = angle + angle * square * _polynomial(square, _SIN)
    cosine = 1.0 - 0.5 * square + square * square * _polynomial(square, _COS)
    odd = (quarter & 1).bool()
    sign_cosine = (1 - ((quarter + 1) & 2)).to(torch.float64)
    sign_sine = (1 - (quarter & 2)).to(torch.float64)
    return (
        radius * torch.where(odd, sine, cosine) * sign_cosine,
        radius * torch.where(odd, cosine, sine) * sign_sine,
    )


def _log_unit(word: Tensor) -> Tensor:
    """Return log((word + 1) / 2**32), float64, at most 0 and at least -32 log 2: never the log of 0."""
    bits = (word + 1).to(torch.float64).view(torch.int64)
    # fdlibm's split into 2**exponent * mantissa with mantissa in [sqrt(1/2), sqrt(2)), in integer arithmetic.
    root_half = 0x3FE6A09E << 32
    bits = bits + ((0x3FF00000 << 32) - root_half)
    exponent = ((bits >> 52) - 1023 - 32).to(torch.float64)
    mantissa = ((bits & 0x000FFFFFFFFFFFFF) + root_half).view(torch.float64)
    f = mantissa - 1.0
    s = f / (f + 2.0)
    square = s * s
    return exponent * math.log(2.0) + (2.0 * s + s * square * _polynomial(square, _LOG))


def _square_root(x: Tensor) -> Tensor:
    """Return the square root of x, float64, 0 or a normal positive number, within 2 units of its last place."""
    x = x + 0.0  # turns -0.0 into 0.0, whose bits are not negative
    # The guess of 1 / sqrt(x) is off by 3.5 % at most; each Newton step squares that, so four are enough.
    inverse = (0x5FE6EB50C7B537A9 - (x.view(torch.int64) >> 1)).view(torch.float64)
    for _ in range(4):
        inverse = inverse * (1.5 - 0.5 * x * inverse * inverse)
    return x * inverse


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """Return Horner's value of the polynomial; multiply and add stay two roundings (a fused one is lane-dependent)."""
    value = x * coefficients[0] + coefficients[1]
    for coefficient in coefficients[2:]:
        value.mul_(x).add_(coefficient)
    return value

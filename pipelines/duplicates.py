"""Which patches show the same thing: a 64-bit perceptual hash, and the search for hashes that differ in few bits.

The hash is the field's DCT pHash (Zauner 2010; ImageHash's `phash`): grey, 32 x 32, DCT-II, the 8 x 8 lowest
frequencies, one bit each for "above their median". Sums are of integers here, so the same pixels have the same hash on
every machine, and the 32 x 32 are exact area means, where ImageHash uses Pillow's Lanczos. It is blind to colour and to
contrast. Half of the bits are set unless frequencies tie, so distances are even: 2 and 3 are nearly the same threshold.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import combinations
from math import comb

import numpy as np

MAX_DISTANCE = 16
_SIDE, _LOW = 32, 8
_LUMA = (299, 587, 114)  # ITU-R BT.601, in thousandths
_FRACTION = 256  # grey is in 1/256 of the 255 levels of an 8-bit sample
_COSINE = 2**14
_LEVEL = _FRACTION * _COSINE**2 * (_SIDE // 2) ** 2  # the coefficient of a wave with an amplitude of one level
_MIN_AMPLITUDE = 1 / 32  # measured: below it patches of one colour collide, and copies as JPEG are not found again
_CHUNK = 2**16  # candidates compared at a time: 512 KiB an array, which the cache holds
_MAX_PAIRS = 2**22  # pairs held at a time, 64 MiB
_FIRST_BLOCK = 2048  # has fewer pairs than _MAX_PAIRS, whatever it holds


def perceptual_hash(pixels: np.ndarray, *, value_range: tuple[float, float]) -> int | None:
    """Return the pHash of HWC `pixels` (uint8, uint16 or float32, any size, any C) as a signed 64-bit integer, or None.

    None means too smooth to be told from others: half of its frequencies are within 1/32 of a level of 255 of their
    median, and their bits would be noise, or alike for all of one colour. The bits are in ImageHash's order, the mean's
    first. C = 3 is weighed as RGB, other channels equally. `value_range` gives black and white; floats are rounded to
    65,536 steps within it (NaN is black). Raises ValueError for other samples, an empty array, or not lo < hi.
    """
    coefficients = low_frequencies(pixels, value_range=value_range).ravel()
    above = 2 * coefficients - np.sort(coefficients)[31:33].sum()  # twice how far above the median
    if np.sort(np.abs(above))[32] < 2 * _MIN_AMPLITUDE * _LEVEL:
        return None
    return int.from_bytes(np.packbits(above > 0).tobytes(), "big", signed=True)


def low_frequencies(pixels: np.ndarray, *, value_range: tuple[float, float]) -> np.ndarray:
    """Return int64 (8, 8): the lowest coefficients of the DCT-II of the 32 x 32 grey means, vertical frequency first.

    Unnormalised; a wave with an amplitude of one level of 255 has 2**44. Takes and raises what `perceptual_hash` does.
    """
    low, high = value_range
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        raise ValueError(f"value_range={value_range}: must be two finite numbers, the lower first")
    if pixels.ndim != 3 or 0 in pixels.shape or pixels.dtype not in (np.uint8, np.uint16, np.float32):
        raise ValueError(f"pixels: {pixels.dtype} {pixels.shape}; must be uint8, uint16 or float32, HWC, not empty")
    cosines = _cosines()
    coefficients: np.ndarray = cosines @ _grey(pixels, low, high) @ cosines.T
    return coefficients


def near_duplicates(hashes: np.ndarray, distance: int) -> np.ndarray:
    """Return int64 (N,): for each of int64 `hashes` (N,) the first kept one within `distance` bits, or -1: it is kept.

    Greedy in order: an element is kept unless an earlier kept one is within the distance; a copy of a dropped one
    only is kept, so nothing drifts away in small steps. Memory: about 150 bytes an element, and 200 MB. Raises
    ValueError for a distance not in 0..16 (above 8 it is slow) and for other arrays.
    """
    values = _as_bits(hashes, distance)
    unique, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    first, mine = first[order], rank[inverse]
    target = _greedy(unique[order], distance)[mine]
    leader = first[np.where(target < 0, mine, target)]
    return np.where(leader == np.arange(len(values)), -1, leader)


def matches_across(hashes: np.ndarray, groups: np.ndarray, distance: int) -> np.ndarray:
    """Return int64 (M, 2): all index pairs i < j of different `groups` (N,) within `distance` bits, in rising order.

    Memory: as `near_duplicates`, and 48 bytes a pair; give equal hashes of a group once, their pairs multiply. Raises
    ValueError as `near_duplicates` does.
    """
    values = _as_bits(hashes, distance)
    if groups.shape != values.shape:
        raise ValueError(f"groups: {groups.shape}; must be one for each of the hashes, {values.shape}")
    found = [np.empty((0, 2), np.int64)]
    for i, j in _close_pairs(values, values, distance, masks=_masks(values, distance), same=True):
        across = groups[i] != groups[j]
        found.append(np.stack([np.minimum(i, j), np.maximum(i, j)], axis=1)[across])
    pairs = np.concatenate(found)
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def _grey(pixels: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return int64 (32, 32), the means of equal boxes in 1/256 levels of 255."""
    height, width, channels = pixels.shape
    if pixels.dtype == np.float32:
        levels = (np.fmin(np.fmax(pixels, low), high) - low) * (65535 / (high - low))  # fmax: of NaN and low it is low
        pixels, low, high = np.rint(np.fmin(levels, 65535)).astype(np.uint16), 0.0, 65535.0
    rows = _box_sums(pixels.reshape(height, -1)).reshape(_SIDE, width, channels)
    columns = np.ascontiguousarray(rows.swapaxes(0, 1)).reshape(width, -1)
    sums = _box_sums(columns).reshape(_SIDE, _SIDE, channels).swapaxes(0, 1)
    weights = np.array(_LUMA if channels == 3 else (1,) * channels)
    # Up to here all is exact; from here each number is rounded by itself, by the rules of IEEE 754.
    means = (sums @ weights) / float(height * width * weights.sum())
    grey: np.ndarray = np.rint((means - low) * (255 * _FRACTION / (high - low))).astype(np.int64)
    return grey


def _box_sums(samples: np.ndarray) -> np.ndarray:
    """Return int64 (32, K) for integers (N, K): 32 times the sums of 32 equal boxes of N / 32 rows, cutting rows."""
    count = len(samples)
    sums: np.ndarray
    if count % _SIDE:  # whole numbers below 2**53: exact in float64, in any order
        sums = (_box_weights(count) @ samples.astype(np.float64)).astype(np.int64)
    else:
        wide = np.uint32 if samples.dtype == np.uint8 else np.int64
        sums = samples.reshape(_SIDE, count // _SIDE, -1).sum(axis=1, dtype=wide) * np.int64(_SIDE)
    return sums


@lru_cache
def _box_weights(count: int) -> np.ndarray:
    """Return float64 (32, count): how many 32nds of each row lie in each box."""
    row, box = np.arange(count) * _SIDE, np.arange(_SIDE)[:, None] * count
    shared: np.ndarray = np.minimum(row + _SIDE, box + count) - np.maximum(row, box)
    return shared.clip(min=0).astype(np.float64)


@lru_cache
def _cosines() -> np.ndarray:
    """Return int64 (8, 32): the DCT-II in units of 2**-14. No entry is so near to a half that libm could flip it."""
    angles = np.pi / (2 * _SIDE) * np.outer(np.arange(_LOW), 2 * np.arange(_SIDE) + 1)
    cosines: np.ndarray = np.rint(np.cos(angles) * _COSINE).astype(np.int64)
    return cosines


def _as_bits(hashes: np.ndarray, distance: int) -> np.ndarray:
    if not 0 <= distance <= MAX_DISTANCE:
        raise ValueError(f"distance={distance}: must be 0 to {MAX_DISTANCE} of the 64 bits; 2 is usual")
    if hashes.dtype != np.int64 or hashes.ndim != 1:
        raise ValueError(f"hashes: {hashes.dtype} {hashes.shape}; must be int64 (N,)")
    return np.ascontiguousarray(hashes).view(np.uint64)  # NumPy counts the bits of a negative number's magnitude


def _greedy(values: np.ndarray, distance: int) -> np.ndarray:
    """Return int64 (N,) as `near_duplicates` for N different values.

    In blocks that grow: each is compared with what is kept before it, then what is left of it with itself. So a dense
    cluster shrinks to its few leaders before its pairs are counted.
    """
    num_values, masks = len(values), _masks(values, distance)
    target = np.full(num_values, -1)
    start, size = 0, _FIRST_BLOCK
    while start < num_values:
        block = np.arange(start, min(start + size, num_values))
        kept = np.flatnonzero(target[:start] < 0)
        leader = np.full(len(block), num_values)
        for i, j in _close_pairs(values[block], values[kept], distance, masks=masks):
            np.minimum.at(leader, i, kept[j])
        target[block] = np.where(leader < num_values, leader, -1)
        left = block[leader == num_values]
        pairs = _pairs_within(values[left], distance, masks)
        if pairs is None:
            size //= 2
            continue
        earlier, bounds = np.unique(pairs[0], return_index=True)
        copies = np.split(left[pairs[1]], bounds[1:])
        for leads, later in zip(left[earlier].tolist(), copies, strict=len(earlier) > 0):
            if target[leads] < 0:
                target[later[target[later] < 0]] = leads
        start += len(block)
        size *= 2
    return target


def _pairs_within(values: np.ndarray, distance: int, masks: list[int]) -> tuple[np.ndarray, np.ndarray] | None:
    """Return all pairs (i, j), i < j, within the distance, by i; None if there are more than are held at a time."""
    found, num_pairs = [], 0
    for i, j in _close_pairs(values, values, distance, masks=masks, same=True):
        found.append(np.stack([np.minimum(i, j), np.maximum(i, j)]))
        num_pairs += len(i)
        if num_pairs > _MAX_PAIRS:
            return None
    pairs = np.concatenate([np.empty((2, 0), np.int64), *found], axis=1)
    i, j = pairs[:, np.argsort(pairs[0])]
    return i, j


def _masks(values: np.ndarray, distance: int) -> list[int]:
    """Return sets of bits so chosen that two values within the distance agree in all bits of at least one.

    The bits that vary are dealt to distance + k bands; whatever `distance` bits differ, k bands agree. A greater k
    means more tables with longer keys: fewer candidates, more sorting. The costs in ns are measured.
    """
    varying = int(np.bitwise_or.reduce(values ^ values[:1], initial=np.uint64(0)))
    bits = [bit for bit in range(64) if varying >> bit & 1]

    def cost(agreeing: int) -> float:
        num_bands = distance + agreeing
        candidates = len(values) ** 2 / 2 / 2 ** (len(bits) * agreeing / num_bands)
        return comb(num_bands, agreeing) * (200 * len(values) + 15 * candidates)

    agreeing = min((1, 2, 3), key=cost)
    num_bands = distance + agreeing
    bands = [sum(1 << bit for bit in bits[band::num_bands]) for band in range(num_bands)]
    return [sum(chosen) for chosen in combinations(bands, agreeing)]


def _close_pairs(
    a: np.ndarray, b: np.ndarray, distance: int, *, masks: list[int], same: bool = False
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield arrays (i, j) of all a[i] and b[j] within the distance, each pair once; `same`: b is a, and i is not j."""
    for number, mask in enumerate(masks):
        order_a, keys_a = _sorted(a & np.uint64(mask))
        order_b, keys_b = (order_a, keys_a) if same else _sorted(b & np.uint64(mask))
        sorted_a, sorted_b = a[order_a], b[order_b]
        begin = np.arange(1, len(a) + 1) if same else np.searchsorted(keys_b, keys_a, "left")
        lengths = np.searchsorted(keys_b, keys_a, "right") - begin
        some = np.flatnonzero(lengths)
        begin, lengths, ends = begin[some], lengths[some], np.cumsum(lengths[some])
        position = 0
        while position < len(some):
            done = ends[position] - lengths[position]
            stop = max(position + 1, int(np.searchsorted(ends, done + _CHUNK, "right")))
            here = slice(position, stop)
            left = np.repeat(some[here], lengths[here])
            right = np.arange(len(left)) + np.repeat(begin[here] - (ends[here] - lengths[here] - done), lengths[here])
            different = sorted_a[left] ^ sorted_b[right]
            close = np.flatnonzero(np.bitwise_count(different) <= distance)
            for earlier in masks[:number]:  # a pair that agrees there was found there
                close = close[(different[close] & np.uint64(earlier)) != 0]
            yield order_a[left[close]], order_b[right[close]]
            position = stop


def _sorted(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(keys)
    return order, keys[order]

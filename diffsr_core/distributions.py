"""Distances between sets of images by their features: Frechet (FID), kernel (KID), and the inception score.

The features come from the caller: (N, D) of any network for the distances, class probabilities (N, D) for the score.
The published numbers are those of the pool3 and softmax outputs of the 2015 Inception network.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_BLOCK_ROWS = 1024


class Moments(NamedTuple):
    """The mean (D,) and the covariance (D, D) of a set of features; all that a published FID reference holds."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]


class Score(NamedTuple):
    """An inception score: its mean and its deviation over the splits."""

    mean: float
    deviation: float


def moments(features: NDArray[Any]) -> Moments:
    """Return the mean and the unbiased covariance of features (N, D).

    With N below some ten times D the distance is biased upwards: compare sets of one size.
    Raises ValueError for another shape, fewer than two rows, or values that are not finite.
    """
    rows = _rows(features)
    return Moments(rows.mean(axis=0), np.atleast_2d(np.cov(rows, rowvar=False)))


def frechet_distance(a: Moments, b: Moments) -> float:
    """Return |m_a - m_b|^2 + Tr(C_a + C_b - 2 (C_a C_b)^(1/2)), 0 or more: FID, of the moments of two sets.

    The root's trace is the sum of the singular values of C_a^(1/2) C_b^(1/2): real and stable where a covariance is
    singular, so nothing is added to the diagonal. Raises ValueError for sizes that differ.
    Source: Heusel et al., "GANs trained by a two time-scale update rule", 2017, equation 6.
    """
    if a.mean.shape != b.mean.shape or a.covariance.shape != b.covariance.shape:
        raise ValueError(f"means have shapes {a.mean.shape} and {b.mean.shape}: both must be of one network's features")
    root = np.linalg.svd(_square_root(a.covariance) @ _square_root(b.covariance), compute_uv=False).sum()
    square = np.square(a.mean - b.mean).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2.0 * root
    return max(0.0, float(square))


def kernel_distance(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Return the unbiased squared MMD of features (N, D) and (M, D) with the kernel (x.y / D + 1)^3: KID.

    It may be slightly negative. Over the whole sets: no draw of subsets, whose mean has the same expectation.
    Raises ValueError as moments does, and for D that differ.
    Source: Binkowski et al., "Demystifying MMD GANs", 2018.
    """
    first, second = _rows(a), _rows(b)
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"features have {first.shape[1]} and {second.shape[1]} columns: both must be of one network")
    n, m = len(first), len(second)
    within = _kernel_sum(first, first, pairs_only=True) / (n * (n - 1))
    within += _kernel_sum(second, second, pairs_only=True) / (m * (m - 1))
    return within - 2.0 * _kernel_sum(first, second, pairs_only=False) / (n * m)


def inception_score(probabilities: NDArray[Any], *, splits: int = 10) -> Score:
    """Return exp of the mean divergence of p(y|x) from p(y), in 1 .. D: mean and deviation over consecutive splits.

    probabilities: (N, D), rows that sum to 1. The deviation is that of the population. The published numbers
    take 10 splits of the images in random order: shuffle first.
    Raises ValueError for rows that are no probabilities, or fewer rows than splits.
    Source: Salimans et al., "Improved techniques for training GANs", 2016.
    """
    rows = _rows(probabilities)
    if (rows < 0).any() or not np.allclose(rows.sum(axis=1), 1.0, rtol=0, atol=1e-4):
        raise ValueError("probabilities must be 0 or more and sum to 1 in each row; pass the softmax of the logits")
    if not 1 <= splits <= len(rows):
        raise ValueError(f"splits is {splits}: it must be 1 to the number of images, {len(rows)}; 10 is usual")
    scores = []
    for k in range(splits):
        part = rows[k * len(rows) // splits : (k + 1) * len(rows) // splits]
        # 0 log 0 is 0; where a class never occurs, so are both of its logarithms.
        logs = np.log(np.where(part > 0, part, 1.0)) - np.log(np.where(part > 0, part.mean(axis=0), 1.0))
        scores.append(np.exp((part * logs).sum(axis=1).mean()))
    return Score(float(np.mean(scores)), float(np.std(scores)))


def _rows(features: NDArray[Any]) -> NDArray[np.float64]:
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features has shape {features.shape}: it must be (N, D), one row per image, N at least 2")
    if not np.isfinite(features).all():
        raise ValueError("features holds values that are not finite; find the images that they came from")
    return features.astype(np.float64)


def _square_root(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the symmetric root of a covariance; eigenvalues that rounding made negative count as 0."""
    values, vectors = np.linalg.eigh(covariance)
    root: NDArray[np.float64] = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    return root


def _kernel_sum(a: NDArray[np.float64], b: NDArray[np.float64], *, pairs_only: bool) -> float:
    """Return the sum of the kernel over all pairs, without each row's pair with itself if told; memory is a block's."""
    total = 0.0
    for start in range(0, len(a), _BLOCK_ROWS):
        total += float(((a[start : start + _BLOCK_ROWS] @ b.T / a.shape[1] + 1.0) ** 3).sum())
    if pairs_only:
        total -= float(((np.square(a).sum(axis=1) / a.shape[1] + 1.0) ** 3).sum())
    return total

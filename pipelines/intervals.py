"""How sure a mean is: intervals of means, of paired differences and of rates."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest, bootstrap

LEVEL = 0.95
RESAMPLES = 9999
SEED = 0  # the same scores have the same interval wherever they are judged


class Interval(NamedTuple):
    """A mean and the ends of its interval, of 95 % unless told."""

    mean: float
    low: float
    high: float


def mean_interval(values: Sequence[float], *, level: float = LEVEL) -> Interval:
    """Return the mean of values and its bootstrap interval: BCa (Efron, "Better bootstrap confidence intervals", 1987),
    of more than 5000 values the percentiles.

    One value, or values that are all equal, say nothing of their spread: the interval is the value alone. Raises
    ValueError for none, and for one that is not finite.
    """
    found = np.asarray(values, np.float64)
    if not found.size or not np.isfinite(found).all():
        raise ValueError(f"values ({found.size}) must be finite numbers, one or more; leave out what was not measured")
    mean = float(found.mean())
    if found.size == 1 or np.ptp(found) <= 1e-12 * max(1.0, abs(mean)):
        return Interval(mean, mean, mean)
    low, high = bootstrap(
        (found,),
        np.mean,
        confidence_level=level,
        n_resamples=RESAMPLES,
        batch=max(1, 2**22 // found.size),  # 32 MiB of resamples at a time
        rng=np.random.default_rng(SEED),
        method="BCa" if 2 < found.size <= 5000 else "percentile",  # the jackknife of BCa takes the square of them
    ).confidence_interval
    return Interval(mean, float(low), float(high))


def paired_interval(first: Sequence[float], second: Sequence[float], *, level: float = LEVEL) -> Interval:
    """Return the mean of first - second, image by image, and its bootstrap interval. Raises ValueError.

    The images' own differences, which both share, cancel: that is why both must be of the same images, in order.
    """
    if len(first) != len(second):
        raise ValueError(
            f"first ({len(first)}) and second ({len(second)}) must be of the same images; pair them by key"
        )
    return mean_interval(np.subtract(first, second).tolist(), level=level)


def rate_interval(successes: int, trials: int, *, level: float = LEVEL) -> Interval:
    """Return a rate and its interval (Wilson, "Probable inference", 1927). Raises ValueError for impossible counts."""
    if not 0 <= successes <= trials or not trials:
        raise ValueError(f"successes ({successes}) must be from 0 to trials ({trials}), which must be above 0")
    found = binomtest(successes, trials).proportion_ci(level, method="wilson")
    return Interval(successes / trials, float(found.low), float(found.high))

"""The search of an inference schedule: which sampler, grid and number of steps serve a trained model best, and at what
cost.

SR3 is trained once, told the noise level, and its schedule for inference is found afterwards: up to 100 steps, by FID
on held-out images, as PSNR did not tell the schedules apart (Saharia et al. 2021, sec. 2.4).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from diffsr_core.sampler import SAMPLERS
from diffsr_core.schedule import GRIDS

Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class GridChoice:
    """One point of the search: a sampler, the family of its grid, and how many steps. Raises ValueError if unknown."""

    sampler: str
    grid: str
    num_steps: int

    def __post_init__(self) -> None:
        for name, value, known in (("sampler", self.sampler, SAMPLERS), ("grid", self.grid, GRIDS)):
            if value not in known:
                raise ValueError(f"{name} ({value!r}) is unknown; use one of: {', '.join(known)}")
        if self.num_steps < 1:
            raise ValueError(f"num_steps ({self.num_steps}) must be at least 1; SR3 searched up to 100")


@dataclass(frozen=True)
class Candidate(GridChoice):
    """A choice and where it starts: 0 from noise, above 0 from the regression noised to that level."""

    start_level: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.start_level < 1:
            raise ValueError(f"start_level ({self.start_level}) must be from 0 to below 1; use 0 or about 0.5")


def choices(samplers: Iterable[str], grids: Iterable[str], lengths: Iterable[int]) -> list[GridChoice]:
    """Return every choice that makes sense, each once, in the order given. Raises ValueError when none does.

    dpmpp-2m is left out off log_snr and karras: it draws a line through two predictions, which wants steps that are
    nearly even in log(a / b). Against an ideal denoiser it diverges on `linear`, whose last steps are huge, and gains
    little over ddim on `uniform` and `resshift` (tests/benchmarks/solvers.md).
    """
    grids, lengths = list(grids), list(lengths)
    every = [GridChoice(s, g, n) for s in samplers for g in grids for n in lengths]
    sensible = [c for c in dict.fromkeys(every) if c.sampler != "dpmpp-2m" or c.grid in ("log_snr", "karras")]
    if not sensible:
        raise ValueError(
            f"choices ({len(every)} in all) must hold one that makes sense; dpmpp-2m needs log_snr or karras"
        )
    return sensible


def with_starts(found: Iterable[GridChoice], start_levels: Iterable[float]) -> list[Candidate]:
    """Return each choice begun at each level, each once, in the order given."""
    levels = list(dict.fromkeys(start_levels))
    return [Candidate(c.sampler, c.grid, c.num_steps, level) for c in found for level in levels]


def rank(found: Sequence[GridChoice], scores: Sequence[float], *, better: Better) -> list[int]:
    """Return the indices of the choices, best score first; of equal scores the fewer steps, then the one given first.

    Raises ValueError for none, and for a score that is not a number: it has no place in an order.
    """
    if not found or len(found) != len(scores):
        raise ValueError(f"scores ({len(scores)}) must be one for each of the choices ({len(found)}), one or more")
    for choice, score in zip(found, scores, strict=True):
        if math.isnan(score):
            raise ValueError(f"score ({score}) of {choice} must be a number; leave the choice out or mend the measure")
    sign = _sign(better)
    return sorted(range(len(found)), key=lambda i: (-sign * scores[i], found[i].num_steps))


def front(costs: Sequence[float], values: Sequence[float], *, better: Better) -> list[int]:
    """Return the indices of the Pareto front, cheapest first: what nothing beats at its cost or below.

    Cost and value both rise along it, strictly: of equal points only the first is on it. Raises ValueError for no
    points, costs that are not above 0, and what is not finite.
    """
    if not costs or len(costs) != len(values):
        raise ValueError(f"values ({len(values)}) must be one for each of the costs ({len(costs)}), one or more")
    for cost, value in zip(costs, values, strict=True):
        if not (0 < cost < math.inf and math.isfinite(value)):
            raise ValueError(f"point ({cost}, {value}) must have a cost above 0 and a finite value; leave it out")
    sign = _sign(better)
    found: list[int] = []
    for index in sorted(range(len(costs)), key=lambda i: (costs[i], -sign * values[i])):
        if not found or sign * values[index] > sign * values[found[-1]]:
            found.append(index)
    return found


def knee(costs: Sequence[float], values: Sequence[float], *, better: Better) -> int:
    """Return the index of the knee: from there on, better costs more than it did before.

    It is the point of the Pareto front that lies farthest above the line between the front's ends, in (log cost,
    value), each from 0 to 1 (Kneedle in its offline form: Satopaa et al. 2011, "Finding a Kneedle in a Haystack").
    Only the side where a knee can be counts: below the line lies what is a bad buy. Where nothing lies above, as with
    two points or a straight line, there is no bend to find, and it is the cheapest of the front; of equals too.
    Raises ValueError as `front` does.
    """
    ends = front(costs, values, better=better)
    first, last = ends[0], ends[-1]
    if first == last:
        return first

    def above(index: int) -> float:
        ratio, whole = ((costs[i] - costs[first]) / costs[first] for i in (index, last))
        x = math.log1p(ratio) / math.log1p(whole)
        y = (values[index] - values[first]) / (values[last] - values[first])
        return round(y - x, 9)  # on a straight line rounding errors would choose

    return max(ends, key=above)  # the first of equals


def _sign(better: Better) -> int:
    if better not in ("higher", "lower"):
        raise ValueError(f"better ({better!r}) must be higher or lower; a measure that is neither cannot rank")
    return 1 if better == "higher" else -1

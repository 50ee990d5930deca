"""The search of an inference schedule: which sampler, grid and number of steps serve a trained model best.

SR3 is trained once, told the noise level, and its schedule for inference is found afterwards: up to 100 steps, by FID
on held-out images, as PSNR did not tell the schedules apart (Saharia et al. 2021, sec. 2.4).
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from diffsr_core.sampler import SAMPLERS
from diffsr_core.schedule import GRIDS


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


class Scored(NamedTuple):
    """A choice and what the objective said of it."""

    choice: GridChoice
    score: float


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


def search(
    objective: Callable[[GridChoice], float], candidates: Iterable[GridChoice], *, maximise: bool
) -> list[Scored]:
    """Return every candidate with its score, best first; of equal scores the fewer steps, then the one given first.

    objective: called once a candidate, on held-out data. maximise: True for PSNR, False for FID, LPIPS and a loss.
    Raises ValueError for no candidates, and at once for a score that is not a number: it has no place in an order.
    """
    scored = []
    for choice in candidates:
        score = float(objective(choice))
        if math.isnan(score):
            raise ValueError(
                f"score ({score}) of {choice} must be a number; leave the choice out or mend the objective"
            )
        scored.append(Scored(choice, score))
    if not scored:
        raise ValueError("candidates (none) must hold at least one choice; make them with `choices`")
    return sorted(scored, key=lambda each: (-each.score if maximise else each.score, each.choice.num_steps))

"""The sampling settings that evaluate, promote and upscale share, checked once."""

from diffsr_core.sampler import SAMPLERS
from pipelines.config import check


def check_sampling(sampler: str, steps: int, num_threads: int, *, seed: int) -> None:
    """Raise ValueError for sampling settings that no model could take."""
    check(sampler in SAMPLERS, "sampler", sampler, f"must be one of {', '.join(SAMPLERS)}", "use one of them")
    check(steps >= 1, "steps", steps, "must be at least 1", "use 4 to 100")
    check(num_threads >= 1, "num_threads", num_threads, "must be at least 1", "use 1")
    check_seed(seed)


def check_seed(seed: int) -> None:
    """Raise ValueError for a seed that a generator could not take."""
    check(0 <= seed < 2**63, "seed", seed, "must be from 0 to 2**63 - 1", "use 0")

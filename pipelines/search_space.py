"""The file of a hyper-parameter search: which settings are tried, how many trials, and what decides between them."""

import difflib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import yaml

from pipelines import storage
from pipelines.config import EXPONENT, check, fingerprint, from_mapping, to_mapping
from pipelines.training_config import TrainConfig

KINDS = ("choice", "grid", "uniform", "log_uniform", "integer")
_OWN, _OF_WORKERS, _OF_JUDGES, _NEITHER = (
    "every trial has its own, and the search one",
    "a trial is one worker, and all have the same",
    "all trials are judged by the same",
    "it changes no weights",
)
FIXED = {  # settings that no search varies, and why
    **dict.fromkeys(("output", "tune", "register", "dry_run"), _OWN),
    **dict.fromkeys(("engine", "num_workers", "min_workers", "cpus_per_worker", "data_workers", "use_gpu",
                     "wait_for_nodes", "strategy", "max_failures"), _OF_WORKERS),
    **dict.fromkeys(("pairs", "val_pairs", "lpips", "checkpoint_every", "result"), _OF_JUDGES),
    **dict.fromkeys(("keep", "log_every", "licence", "data_licence"), _NEITHER),
}  # fmt: skip
_METRIC = re.compile(
    r"loss|gradient_norm|images_per_s|data_wait_share|gpu_memory_gib|train_s|val_loss(_ema_\d+)?|val_x0_error"
    r"|val_(psnr|ssim|lr_psnr|lpips)_(regression|sample)"
)
_HIGHER_IS_BETTER = re.compile(r"images_per_s|val_(psnr|ssim|lr_psnr)_")


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """What the file says. space: by setting of a training, {kind: values}; kind one of KINDS.

    choice and the ranges uniform, log_uniform and integer are drawn `trials` times; each draw is tried with every
    combination of the grids, as in Ray Tune. mode: None for the metric's own direction. stop: asha ends a trial whose
    metric, grace_steps (default: checkpoint_every) and then each reduction_factor times as many steps into the last
    stage, is not among the best 1 / reduction_factor so far (Li et al. 2020, arXiv:1810.05934).
    """

    space: dict[str, Any]
    metric: str = "val_loss"
    mode: Literal["min", "max"] | None = None
    trials: int = 1
    max_concurrent: int = 1
    seed: int = 0
    stop: Literal["none", "asha"] = "none"
    grace_steps: int | None = None
    reduction_factor: float = 3.0

    def __post_init__(self) -> None:
        check(_METRIC.fullmatch(self.metric) is not None, "metric", self.metric, "must be one of a report",
              "use val_loss, or val_psnr_, val_ssim_, val_lr_psnr_ or val_lpips_ with sample")  # fmt: skip
        for name in ("trials", "max_concurrent", "grace_steps"):
            value = getattr(self, name)
            check(value is None or value >= 1, name, value, "must be at least 1", "use 1 or more")
        check(0 <= self.seed < 2**32, "seed", self.seed, "must be from 0 to 2**32 - 1", "use 0")
        check(self.reduction_factor > 1, "reduction_factor", self.reduction_factor, "must be above 1", "use 3")
        check(self.stop == "asha" or self.grace_steps is None, "grace_steps", self.grace_steps, "is of stop: asha",
              "write that line, or leave it out")  # fmt: skip
        check(
            bool(self.space), "space", self.space, "must hold a setting", "write learning_rate: {choice: [1e-4, 3e-4]}"
        )
        for name, dimension in self.space.items():
            _check_dimension(str(name), dimension)
        check(self.trials == 1 or any(kind_of(given) != "grid" for given in self.space.values()), "trials", self.trials,
              "must be 1 where the space is all grid, of which every point is tried once", "leave it out")  # fmt: skip

    @property
    def direction(self) -> Literal["min", "max"]:
        """Whether a low or a high metric is better."""
        return self.mode or ("max" if _HIGHER_IS_BETTER.match(self.metric) else "min")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One point of a space. name: of the point alone. config: None where the settings refuse it; refusal says why."""

    name: str
    point: dict[str, Any]
    config: TrainConfig | None
    refusal: str = ""


def read_search(uri: str) -> SearchConfig:
    """Return the search of a YAML file. Raises ValueError."""
    try:
        document = yaml.load(storage.read_bytes(uri), Loader=_Loader)
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        why = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise ValueError(f"--tune ({uri!r}) must be a file of plain YAML: {why}; correct it") from None
    check(isinstance(document, dict), "--tune", document, "must hold a mapping", "write space: and under it settings")
    return from_mapping(SearchConfig, document)


class _Loader(yaml.SafeLoader):
    pass


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))


def kind_of(dimension: Mapping[str, Any]) -> str:
    """Return a dimension's kind."""
    return next(iter(dimension))


def _check_dimension(name: str, dimension: object) -> None:
    where, names = f"space: {name}", [field.name for field in fields(TrainConfig)]
    close = (difflib.get_close_matches(name, names, n=1) or ["one that train.py --help lists"])[0]
    check(name in names, where, dimension, "is not a setting of a training", f"did you mean {close}?")
    check(name not in FIXED, where, dimension, "cannot be searched", f"leave it out: {FIXED.get(name)}")
    shaped = isinstance(dimension, dict) and len(dimension) == 1 and kind_of(dimension) in KINDS
    check(shaped, where, dimension, f"must be one of {', '.join(KINDS)} with its values", "write {choice: [a, b]}")
    ((kind, values),) = dimension.items()  # type: ignore[attr-defined]
    check(
        isinstance(values, list) and bool(values),
        where,
        values,
        "must be a list of values",
        f"write {{{kind}: [a, b]}}",
    )
    if kind in ("choice", "grid"):
        check(len({json.dumps(value) for value in values}) == len(values), where, values, "must name each value once",
              "leave out the others")  # fmt: skip
        return
    known = int if kind == "integer" else (int, float)
    numbers = [value for value in values if isinstance(value, known) and not isinstance(value, bool)]
    check(len(numbers) == len(values) == 2 and math.isfinite(sum(numbers)) and numbers[0] < numbers[1], where, values,
          "must be " + ("two whole numbers" if kind == "integer" else "two numbers") + ", the lower first",
          f"write {{{kind}: [1, 4]}}")  # fmt: skip
    check(kind != "log_uniform" or numbers[0] > 0, where, values, "must be above 0 for log_uniform", "use uniform")


def points(search: SearchConfig) -> list[dict[str, Any]]:
    """Return the points in their order, each once: draws times grids. More trials leave the first ones as they are.

    Ranges give numbers of four significant digits.
    """
    from ray import tune  # seconds
    from ray.tune.search.variant_generator import generate_variants

    def dimension(kind: str, values: list[Any]) -> Any:
        if kind in ("choice", "grid"):  # of places in the list: a value may be anything, a list as well
            places = list(range(len(values)))
            return tune.choice(places) if kind == "choice" else tune.grid_search(places)
        low, high = values
        if kind == "integer":
            return tune.randint(low, high + 1)
        return tune.uniform(low, high) if kind == "uniform" else tune.loguniform(low, high)

    def value_of(name: str, drawn: Any) -> Any:
        ((kind, values),) = search.space[name].items()
        if kind in ("choice", "grid"):
            return values[drawn]
        return int(drawn) if kind == "integer" else min(max(float(f"{drawn:.4g}"), values[0]), values[1])

    space = {name: dimension(*next(iter(given.items()))) for name, given in search.space.items()}
    generator = np.random.default_rng(search.seed)
    found: dict[str, dict[str, Any]] = {}
    for _ in range(search.trials):
        for _, variant in generate_variants(space, random_state=generator):
            point = {name: value_of(name, variant[name]) for name in search.space}
            found.setdefault(fingerprint(point), point)
    return list(found.values())


def trials_of(config: TrainConfig, search: SearchConfig) -> list[Trial]:
    """Return the trials of a search over these settings. Raises ValueError for a value that none of them could have.

    A value is good where it is beside the settings themselves, or in a point that is; ranges are judged by their ends.
    """
    trials = [_trial(config, point) for point in points(search)]
    good = [trial.point for trial in trials if trial.config is not None]
    for name, dimension in search.space.items():
        for value in dimension[kind_of(dimension)]:
            refusal = _trial(config, {name: value}).refusal
            if refusal and not any(point[name] == value for point in good):
                raise ValueError(f"space: {refusal}")
    return trials


def trial_output(config: TrainConfig, name: str) -> str:
    """Return where a search keeps a trial."""
    return storage.join(config.output, "trials", name)


def _trial(config: TrainConfig, point: dict[str, Any]) -> Trial:
    name = fingerprint(point)[:12]
    own: dict[str, object] = {"tune": None, "register": None, "engine": "local", "dry_run": False}
    own["output"] = trial_output(config, name)
    try:
        return Trial(name=name, point=point, config=from_mapping(TrainConfig, {**to_mapping(config), **own, **point}))
    except ValueError as error:
        return Trial(name=name, point=point, config=None, refusal=str(error))

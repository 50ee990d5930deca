"""The settings of the evaluate job."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from diffsr_core.degradation import Degradation
from diffsr_core.sampler import SAMPLERS
from diffsr_core.sampling import ONE_STEP, SamplingRecipe
from diffsr_core.schedule import GRIDS
from diffsr_core.search import Candidate, GridChoice, choices, with_starts
from pipelines.config import check
from pipelines.curve import check_pick
from pipelines.measures import DEFAULT, MEASURES, MeterSettings
from pipelines.protocols import PROTOCOLS, Protocol
from pipelines.sampling import SamplingConfig
from pipelines.scoring import BASELINES, Running


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(SamplingConfig):
    """Score models and baselines on a data set. The same evaluation again is read, not computed.

    First word: run (the default), or fool-rate, which counts the answers of a study's respondents.
    """

    model: str | None = field(default=None, metadata={"unit": "REF"})
    """Model: a folder or URI, models:/name@alias or models:/name/version."""
    against: tuple[str, ...] = field(default=(), metadata={"unit": "REFS"})
    """Other models to score beside it, each with its own name in the rows."""
    dataset: str | None = field(default=None, metadata={"unit": "URI"})
    """Folder or list of HR images, or a pair set."""
    lr_source: str | None = field(default=None, metadata={"unit": "URI"})
    """Folder of the LR images of a folder of HR images; no LR is made then. Their sizes are checked, no more."""
    lr_name: str = "{key}"
    """Where the LR of an image lies below lr_source: {key}, or made of {folder} {stem} {suffix}, as {stem}x4.png."""
    output: str = field(metadata={"unit": "URI"})
    """Where rows.parquet, summary.json, summary.md and report.html are written."""
    protocol: str | None = None
    """A table's way: sr3-faces-16-128, sr3-64-256, srdiff-celeba-x8, srdiff-df2k-x4, classic-x4-y (x2, x3)."""
    split: str = "test"
    """Split of a pair set that is scored."""
    degradation: str = "bicubic"
    """Recipe that makes LR from a folder's HR images: a name or JSON, as for make_pairs."""
    baselines: tuple[str, ...] = ("bicubic", "regression")
    """What the model is compared with: bicubic, lanczos, regression (the model's own regression network)."""
    limit: int | None = None
    """Score only the first images of the set."""
    metrics: tuple[str, ...] = field(default=(), metadata={"group": "measures"})
    """Measures per image; left out, all that need no file, or the protocol's, and those whose files are given."""
    border: int | None = None
    """Pixels left out at each side; left out, the scale, or the protocol's."""
    niqe: str | None = field(default=None, metadata={"unit": "FILE"})
    """NIQE's niqe_pris_params.npz: adds niqe."""
    lpips: str | None = field(default=None, metadata={"unit": "FOLDER"})
    """Folder with LPIPS' alexnet backbone and linear layers: adds lpips."""
    classifier: str | None = field(default=None, metadata={"unit": "FILE"})
    """Weights of torchvision's resnet50: adds top1 and top5 where the keys' folders, or labels.json, are classes."""
    inception: str | None = field(default=None, metadata={"unit": "FILE"})
    """Weights of the FID network: adds fid, kid and inception_score of the whole set."""
    reference: str | None = field(default=None, metadata={"unit": "FILE"})
    """Features or moments that fid and kid compare with; left out, those of the HR images."""
    samples: int = 1
    """Samples drawn of each image; of more than one, sigma and uncertainty maps come with them."""
    choice: Literal["first", "mean", "best"] = "first"
    """What of them is scored: the first, their mean, or the one that keeps to the input most by itself."""
    search_steps: tuple[int, ...] = field(default=(), metadata={"group": "quality-cost curve and schedule search"})
    """Numbers of steps to try, on the split val of a pair set; drawn as a curve, and the one picked is evaluated.

    A model of one step has only --search-start-levels.
    """
    search_samplers: tuple[str, ...] = ("ddim", "dpmpp-2m")
    """Samplers to try."""
    search_grids: tuple[str, ...] = ("uniform", "log_snr", "karras")
    """Families of noise levels to try."""
    objective: str = "psnr_y"
    """Measure that the search looks at."""
    search_start_levels: tuple[float, ...] = ()
    """Noise levels to begin at from the regression, 0 for pure noise; left out, the start_level of the sampling."""
    pick: str = "best"
    """What is evaluated: the best by the objective, the knee of the curve, or the cheapest within this of the best."""
    store: bool = False
    """Store the point that was picked in the model's folder; of a registered model, as its next version."""
    study: bool = field(default=False, metadata={"group": "fool-rate study"})
    """Write study.html: people say which of two pictures is the photograph. Each image is of one method, in turn."""
    study_images: int = 50
    """Images in the study."""
    study_seconds: float = 3.0
    """How long the two pictures are seen."""
    study_task: Literal["unaided", "lr-shown", "both"] = "unaided"
    """Whether the low-resolution image is shown beside them (SR3's task 1), or not (its task 2)."""
    answers: tuple[str, ...] = field(default=(), metadata={"unit": "FILES"})
    """fool-rate: the JSON files that respondents sent."""
    engine: Literal["ray", "local"] = field(default="ray", metadata={"group": "running"})
    """Ray Data actors, or a plain loop in this process."""
    num_workers: int = 1
    """Actors, one CPU each."""
    use_gpu: bool = False
    """One GPU per actor."""
    max_dead_share: float = 0.2
    """Error budget: the job fails (exit 3) when more of the images, and more than one, have no score."""
    dry_run: bool = False
    """Say what would be scored, and stop."""

    def __post_init__(self) -> None:
        super().__post_init__()
        Degradation.parse(self.degradation, 2)  # the scale is the model's, not known yet
        known = (
            ("baselines", BASELINES), ("metrics", MEASURES), ("search_samplers", SAMPLERS), ("search_grids", GRIDS),
        )  # fmt: skip
        for name, words in known:
            for value in getattr(self, name):
                check(value in words, name, value, f"must be among {', '.join(words)}", "leave it out")
        check(self.protocol is None or self.protocol in PROTOCOLS, "protocol", self.protocol,
              f"must be one of {', '.join(PROTOCOLS)}", "leave it out")  # fmt: skip
        check(self.objective in MEASURES and MEASURES[self.objective].better != "none", "objective", self.objective,
              f"must be one of {', '.join(n for n, m in MEASURES.items() if m.better != 'none')}",
              "use psnr_y")  # fmt: skip
        for number in self.search_steps:
            check(number >= 1, "search_steps", number, "must be at least 1 each", "use 4,8,16")
        choices(self.search_samplers, self.search_grids, self.search_steps or (1,))
        for level in self.search_start_levels:
            check(0 <= level < 1, "search_start_levels", level, "must be from 0 to below 1 each", "use 0,0.5")
        check_pick(self.pick)
        check("sigma" not in self.metrics or self.num_samples() > 1, "metrics", "sigma", "needs several samples",
              "give --samples 4")  # fmt: skip
        check(not self.store or self.searches, "store", self.store, "needs a search",
              "give --search-steps, or --search-start-levels of a model of one step")  # fmt: skip
        for name in ("num_workers", "samples", "study_images"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1", "use 1 or more")
        check(self.study_seconds > 0, "study_seconds", self.study_seconds, "must be above 0", "use 3")
        check(0 <= self.max_dead_share <= 1, "max_dead_share", self.max_dead_share, "must be from 0 to 1", "use 0.2")
        check(self.limit is None or self.limit >= 1, "limit", self.limit, "must be at least 1", "leave it out for all")
        check(self.border is None or self.border >= 0, "border", self.border, "must be at least 0", "leave it out")

    @property
    def preset(self) -> Protocol | None:
        """The protocol, None where none is asked for."""
        return None if self.protocol is None else PROTOCOLS[self.protocol]

    def meter(self) -> MeterSettings:
        """Return what is measured of each image."""
        preset = self.preset
        names: tuple[str, ...] = self.metrics or (preset.metrics if preset else tuple(DEFAULT))
        if not self.metrics:
            added = {"niqe": self.niqe, "lpips": self.lpips, "top1": self.classifier, "top5": self.classifier}
            names += tuple(name for name, path in added.items() if path is not None)
            names += ("sigma",) if self.num_samples() > 1 and "sigma" not in names else ()
        border = self.border if self.border is not None or preset is None else preset.border
        return MeterSettings(
            names=names, border=border, niqe=self.niqe, lpips=self.lpips, classifier=self.classifier,
            inception=self.inception,
        )  # fmt: skip

    def num_samples(self) -> int:
        """Return how many samples are drawn of each image."""
        return max(self.samples, self.preset.samples if self.preset else 1)

    @property
    def searches(self) -> bool:
        """Whether a curve is asked for."""
        return bool(self.search_steps or self.search_start_levels)

    def candidates(self, recipe: SamplingRecipe, *, one_step: bool) -> list[Candidate]:
        """Return the points of the curve, none where none is asked for. recipe: what the model is sampled with.

        one_step: such a model has its start level to search, and no other schedule. Raises ValueError.
        """
        if not self.searches:
            return []
        if one_step:
            check(self.pick == "best", "pick", self.pick, "must be best for a model of one step, which costs the same "
                  "from every level", "leave it out")  # fmt: skip
            check(set(self.search_steps) <= {1}, "search_steps", self.search_steps, "must be 1 for a model of one step",
                  "leave it out, and give --search-start-levels")  # fmt: skip
            found = [GridChoice(**ONE_STEP)]
        else:
            check(bool(self.search_steps), "search_start_levels", self.search_start_levels, "needs numbers of steps "
                  "with a model of several", "give --search-steps")  # fmt: skip
            found = choices(self.search_samplers, self.search_grids, self.search_steps)
        return with_starts(found, self.search_start_levels or (recipe.start_level,))

    def sampling(self, own: Mapping[str, Any] | None = None) -> SamplingRecipe:
        """Return the sampling recipe; own: what a model's folder says of it."""
        return replace(super().sampling(own), num_samples=self.num_samples(), choice=self.choice)

    def running(self) -> Running:
        """Return where it is done."""
        return Running(engine=self.engine, num_workers=self.num_workers, use_gpu=self.use_gpu)

    def asked(self) -> dict[str, Any]:
        """Return the settings of search and study, for the evaluation's identity."""
        names: list[str] = []
        if self.searches:
            names = [
                "search_steps",
                "search_samplers",
                "search_grids",
                "search_start_levels",
                "objective",
                "pick",
                "store",
            ]
        if self.study:
            names += ["study_images", "study_seconds", "study_task"]
        return {name: getattr(self, name) for name in names}

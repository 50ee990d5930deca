"""Job 4: champion and challenger on the same images, seeds and steps; the alias moves only on evidence."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from diffsr_core.checkpoint import model_from_files
from diffsr_core.degradation import Degradation
from pipelines import storage
from pipelines.config import check
from pipelines.engine import say
from pipelines.gate import Rules, Verdict, judge
from pipelines.models import ResolvedModel, resolve
from pipelines.runs import Summary
from pipelines.sampling import SamplingConfig
from pipelines.scoring import METRICS, Dataset, open_dataset, score_dataset

REFUSED_EXIT = 4


@dataclass(frozen=True, kw_only=True)
class PromoteConfig(SamplingConfig):
    """Compare a registered version with the champion and move the alias, or roll the alias back."""

    model: str = field(metadata={"unit": "NAME"})
    """Name of the registered model."""
    challenger: int | None = None
    """Version to promote; default: the newest that was not rolled back."""
    dataset: str | None = field(default=None, metadata={"unit": "URI"})
    """Folder of HR images, or a pair set; needed unless --rollback."""
    output: str = field(default="diffsr-promotion", metadata={"unit": "URI"})
    """Where the verdict is written (workers read the models from below it)."""
    rollback: bool = False
    """Give the alias back to the previous champion; the version that loses it is only promoted again by its number."""
    split: str = "test"
    """Split of a pair set that is scored."""
    degradation: str = "bicubic"
    """Recipe that makes LR from a folder's HR images: a name or JSON, as for make_pairs."""
    primary: str = field(default="psnr_y", metadata={"group": "rules"})
    """Metric that must improve: psnr, ssim, psnr_y, ssim_y or lr_psnr."""
    min_gain: float = 0.0
    """The primary metric must improve by more than this."""
    ssim_margin: float = 0.005
    """SSIM may fall by this at most."""
    lr_psnr_floor: float = 45.0
    """Every image's LR-PSNR must reach this, in dB."""
    max_latency_ratio: float = 2.0
    """Seconds per image may grow by this factor at most."""
    engine: Literal["ray", "local"] = field(default="ray", metadata={"group": "running"})
    """Ray Data actors, or a plain loop in this process."""
    num_workers: int = 1
    """Actors, one CPU each."""
    dry_run: bool = False
    """Say what would be compared, and stop."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.rollback or self.dataset is not None, "dataset", self.dataset, "must be given", "use --dataset URI")
        check(self.primary in METRICS, "primary", self.primary, f"must be one of {', '.join(METRICS)}", "use psnr_y")
        check(self.challenger is None or self.challenger >= 1, "challenger", self.challenger,
              "must be a version, 1 or more", "leave it out for the newest")  # fmt: skip
        Degradation.parse(self.degradation, 2)  # the scale is the model's, not known yet
        check(self.ssim_margin >= 0, "ssim_margin", self.ssim_margin, "must be at least 0", "use 0.005")
        check(self.max_latency_ratio > 0, "max_latency_ratio", self.max_latency_ratio, "must be above 0", "use 2")
        check(self.num_workers >= 1, "num_workers", self.num_workers, "must be at least 1", "use 1 or more")

    def rules(self) -> Rules:
        """Return the rules of the gate."""
        return Rules(
            primary=self.primary,
            min_gain=self.min_gain,
            guarded={} if self.primary == "ssim" else {"ssim": self.ssim_margin},
            lr_psnr_floor=self.lr_psnr_floor,
            max_latency_ratio=self.max_latency_ratio,
        )


def promote(config: PromoteConfig) -> Summary:
    """Run the job; return its summary, exit code 4 when the gate refuses. Raises ValueError."""
    from pipelines import tracking

    client = tracking.connect()
    champion = tracking.alias_version(client, config.model, tracking.CHAMPION)
    if config.rollback:
        return _rollback(config, client, champion)
    version = config.challenger or tracking.newest_version(client, config.model)
    if version == champion:
        say(f"promote: nothing to do, {config.model} v{version} is the champion")
        return Summary(job="promote", run_id="none", status="done", unchanged=1)
    challenger = resolve(f"models:/{config.model}/{version}")
    holder = None if champion is None else resolve(f"models:/{config.model}/{champion}")
    configs = [model_from_files(model.files)[0].config for model in (challenger, holder) if model is not None]
    for each in configs:
        config.sampling().check_fits(each)  # before any work is planned
    scale = configs[0].scale
    if scale != configs[-1].scale:
        raise ValueError(
            f"challenger (x{scale}) must be of the champion's scale (x{configs[-1].scale}) to be compared with it; "
            "register it under another name"
        )
    assert config.dataset is not None
    dataset = open_dataset(config.dataset, split=config.split, degradation=config.degradation, scale=scale)
    against = "bicubic, as there is no champion yet" if holder is None else holder.label
    say(f"promote: {challenger.label} against {against}, {len(dataset.items)} images")
    if config.dry_run:
        return Summary(job="promote", run_id="none", status="planned", inputs=1)
    rows = _score(config, dataset, challenger)
    verdict = judge(rows, None if holder is None else _score(config, dataset, holder), config.rules())
    for line in verdict.lines():
        say(f"promote: {line}")
    report = storage.join(config.output, f"{config.model}-v{version}.json")
    storage.publish(report, _document(config, dataset, version, champion, verdict).encode())
    with tracking.run(f"promote {challenger.label}", params=asdict(config)) as run_id:
        metrics = {"promoted": float(verdict.promoted)}
        tracking.log_evaluation(metrics, digest=dataset.digest, source=dataset.source, artifacts=[report])
    if verdict.promoted:
        tracking.move_champion(client, config.model, version, expected=champion, evidence=run_id)
        say(f"promote: {config.model} v{version} is the champion now")
    else:
        say(f"promote: refused; the champion stays {'none' if champion is None else f'v{champion}'}")
    return Summary(job="promote", run_id=run_id, status="done" if verdict.promoted else "refused", inputs=1,
                   done=int(verdict.promoted), outputs=[report], metrics={"promoted": float(verdict.promoted)},
                   exit_code=0 if verdict.promoted else REFUSED_EXIT)  # fmt: skip


def _rollback(config: PromoteConfig, client: Any, champion: int | None) -> Summary:
    from pipelines import tracking

    previous = tracking.alias_version(client, config.model, tracking.PREVIOUS)
    if previous is None or champion is None:
        raise ValueError(
            f"model ({config.model}) must have a previous champion to roll back to; it has none: to move the alias "
            "further, promote a version with --challenger"
        )
    if previous == champion:  # a promotion or a rollback was killed between its two writes
        raise ValueError(
            f"model ({config.model}) must have a previous champion other than the champion, v{champion}: an earlier "
            "promotion or rollback was cut short; promote the version that you want with --challenger"
        )
    if not config.dry_run:
        tracking.restore_champion(client, config.model, previous, expected=champion)
    verb = "would be" if config.dry_run else "is"
    say(f"promote: {config.model} v{previous} {verb} the champion again, not v{champion}")
    return Summary(job="promote", run_id="none", status="planned" if config.dry_run else "done", inputs=1,
                   done=int(not config.dry_run))  # fmt: skip


def _score(config: PromoteConfig, dataset: Dataset, model: ResolvedModel) -> list[dict[str, Any]]:
    return score_dataset(
        dataset,
        model,
        config.sampling(),
        baselines=("bicubic",),
        output=config.output,
        engine=config.engine,
        num_workers=config.num_workers,
        label=f"promote {model.label}",
    )


def _document(config: PromoteConfig, dataset: Dataset, version: int, champion: int | None, verdict: Verdict) -> str:
    document = {
        "model": config.model,
        "challenger": version,
        "champion": champion,
        "dataset": {"source": dataset.source, "digest": dataset.digest, "images": len(dataset.items)},
        "promoted": verdict.promoted,
        "checks": [check._asdict() for check in verdict.checks],
    }
    return json.dumps(document, indent=1)

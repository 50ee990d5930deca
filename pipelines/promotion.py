"""Job 4: champion and challenger on the same images, seeds and steps; the alias moves only on evidence.

Two promotions of one model in one output keep each other out by a lease; elsewhere the champion that was read first is
read again just before the alias moves (`registry.move_champion`). A rollback asks for no lease: it must not wait.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from diffsr_core.checkpoint import model_from_files
from diffsr_core.degradation import Degradation
from diffsr_core.family import ModelConfig
from pipelines import storage
from pipelines.config import check
from pipelines.datasets import Dataset, open_dataset
from pipelines.engine import say
from pipelines.gate import BICUBIC, CHALLENGER, CHAMPION, Facts, Signature, judge
from pipelines.lease import Lease
from pipelines.measures import FROM_ROWS, MEASURES, MeterSettings, check_settings
from pipelines.models import resolve
from pipelines.rules import Floor, Rules, parse_rules, to_yaml
from pipelines.runs import Summary, new_run_id
from pipelines.sampling import SamplingConfig
from pipelines.scoring import Contender, Running, score_dataset, to_parquet
from pipelines.summaries import summarise
from pipelines.verdict import Evidence
from pipelines.webhook import check_webhook, place_of, send

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
    """Where each verdict is written, such as NAME/v2-against-v1-0a1b2c3d (workers read the models from below it)."""
    rollback: bool = False
    """Give the alias back to the previous champion; the version that loses it is only promoted again by its number."""
    split: str = "test"
    """Split of a pair set that is scored."""
    degradation: str = "bicubic"
    """Recipe that makes LR from a folder's HR images: a name or JSON, as for make_pairs."""
    webhook: str | None = field(default=None, metadata={"unit": "URL"})
    """http(s) address that gets the verdict as JSON by POST, signed with DIFFSR_WEBHOOK_SECRET where that is set."""
    rules: str | None = field(default=None, metadata={"unit": "URI", "group": "rules"})
    """YAML file of the rules; default: those that --dry-run shows. The flags below win over it."""
    primary: str | None = None
    """Metric that must improve, such as psnr_y."""
    min_gain: float | None = None
    """The primary metric must improve by more than this."""
    ssim_margin: float | None = None
    """SSIM may fall by this at most."""
    lr_psnr_floor: float | None = None
    """Every image's LR-PSNR must reach this, in dB."""
    max_latency_ratio: float | None = None
    """Device seconds per megapixel may grow by this factor at most."""
    niqe: str | None = field(default=None, metadata={"unit": "FILE", "group": "weights of metrics"})
    """NIQE's parameters, where a rule names niqe."""
    lpips: str | None = field(default=None, metadata={"unit": "FOLDER"})
    """Folder of LPIPS's weights, where a rule names lpips."""
    engine: Literal["ray", "local"] = field(default="ray", metadata={"group": "running"})
    """Ray Data actors, or a plain loop in this process."""
    num_workers: int = 1
    """Actors, one CPU each."""
    use_gpu: bool = False
    """One GPU per actor."""
    dry_run: bool = False
    """Say what would be compared and by which rules, and stop."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.rollback or self.dataset is not None, "dataset", self.dataset, "must be given", "use --dataset URI")
        check(self.challenger is None or self.challenger >= 1, "challenger", self.challenger,
              "must be a version, 1 or more", "leave it out for the newest")  # fmt: skip
        fits = self.model.strip() not in ("", ".", "..") and not set("/:'\\") & set(self.model)
        check(fits and self.model.isprintable(), "model", self.model,
              "must be the name of a registered model, without / : ' and \\",
              "leave out models:/ and the version, or register it under a plain name")  # fmt: skip
        Degradation.parse(self.degradation, 2)  # the scale is the model's, not known yet
        check_webhook(self.webhook)
        self.with_flags(Rules())
        check(self.num_workers >= 1, "num_workers", self.num_workers, "must be at least 1", "use 1 or more")

    def with_flags(self, rules: Rules) -> Rules:
        """Return the rules with those that flags give in their place. Raises ValueError for a flag that is no rule."""
        given = {"metric": self.primary, "min_gain": self.min_gain}
        primary = replace(rules.primary, **{k: v for k, v in given.items() if v is not None})  # type: ignore[arg-type]
        guarded, floors, latency = dict(rules.guarded), dict(rules.floors), rules.latency
        if self.ssim_margin is not None:
            guarded["ssim"] = self.ssim_margin
        if self.lr_psnr_floor is not None:
            floors["lr_psnr"] = Floor(per_image_min=self.lr_psnr_floor)
        if self.max_latency_ratio is not None:
            latency = replace(latency, max_ratio=self.max_latency_ratio)
        return replace(rules, primary=primary, guarded=guarded, floors=floors, latency=latency)

    def resolved_rules(self) -> Rules:
        """Return the rules of the file, or the default ones, and of the flags. Raises ValueError."""
        rules = Rules()
        if self.rules is not None:
            try:
                text = storage.read_bytes(self.rules).decode(errors="replace")
            except OSError as error:
                raise ValueError(
                    f"rules ({self.rules}) must be a YAML file that can be read: {error.strerror or error}; correct "
                    "the path, or leave it out for the rules that --dry-run shows"
                ) from error
            rules = parse_rules(text, name=f"rules ({self.rules})")
        return self.with_flags(rules)

    def meter(self, rules: Rules) -> MeterSettings:
        """Return what is measured: what needs no file, and what a file is given for. Raises ValueError, as for a rule
        on a metric that is not among them."""
        meter = MeterSettings(niqe=self.niqe, lpips=self.lpips)
        measured = (*meter.measures, *FROM_ROWS)
        for name in rules.metrics():
            place = "--primary" if name == self.primary else f"rules ({self.rules}): metric"
            check(name in measured, place, name, "is not measured without its weights",
                  f"give them with --{name}, or ask for one of {', '.join(measured)}")  # fmt: skip
        check_settings(meter)
        return meter


def promote(config: PromoteConfig) -> Summary:
    """Run the job; return its summary, exit code 4 when the gate refuses. Raises ValueError, LeaseHeld."""
    from pipelines import registry, tracking

    client = tracking.connect()
    champion = registry.alias_version(client, config.model, registry.CHAMPION)
    if config.rollback:
        return _rollback(config, client, champion)
    rules = config.resolved_rules()
    meter = config.meter(rules)
    version = config.challenger or registry.newest_version(client, config.model)
    if version == champion:
        say(f"promote: nothing to do, {config.model} v{version} is the champion")
        return Summary(job="promote", run_id="none", status="done", unchanged=1)
    challenger = resolve(f"models:/{config.model}/{version}")
    holder = None if champion is None else resolve(f"models:/{config.model}/{champion}")
    models = {CHALLENGER: challenger} | ({} if holder is None else {CHAMPION: holder})
    configs = {method: model_from_files(model.files)[0].config for method, model in models.items()}
    recipes = {method: config.sampling(model.sampling) for method, model in models.items()}
    for method, recipe in recipes.items():
        models[method].check_fits(recipe, configs[method])  # before any work is planned
    assert config.dataset is not None
    scale = next(reversed(configs.values())).scale  # the champion's, where there is one
    dataset = open_dataset(config.dataset, split=config.split, degradation=config.degradation, scale=scale)
    facts = Facts(
        num_images=len(dataset.items),
        challenger=_signature(configs[CHALLENGER]),
        champion=None if holder is None else _signature(configs[CHAMPION]),
    )
    against = "bicubic, as there is no champion yet" if holder is None else holder.label
    say(f"promote: {challenger.label} against {against}, {len(dataset.items)} images")
    if config.dry_run:
        say(to_yaml(rules))
        return Summary(job="promote", run_id="none", status="planned", inputs=1)
    with Lease(storage.join(config.output, config.model), run_id=new_run_id("promote")):
        contenders = [
            Contender.of(model, recipes[method], method=method, output=config.output)
            for method, model in models.items()
        ]
        rows = _score(config, dataset, [*contenders, Contender(method=BICUBIC)], meter, facts)
        evidence = Evidence(
            model=config.model,
            challenger=challenger,
            champion=holder,
            dataset={"source": dataset.source, "digest": dataset.digest, "images": len(dataset.items)},
            sampling={method: asdict(recipe) for method, recipe in recipes.items()},
            facts=facts,
            rules=rules,
            verdict=judge(rows, rules, facts),
            summary=summarise(rows, (CHALLENGER, CHAMPION, BICUBIC), list(MEASURES)),
        )
        return _conclude(config, client, evidence, rows, dataset)


def _score(
    config: PromoteConfig, dataset: Dataset, contenders: list[Contender], meter: MeterSettings, facts: Facts
) -> list[dict[str, Any]]:
    """Return the rows of all; none for a challenger of another signature, which is refused without any work."""
    if facts.champion not in (None, facts.challenger):
        return []
    running = Running(engine=config.engine, num_workers=config.num_workers, use_gpu=config.use_gpu)
    return score_dataset(dataset, contenders, meter=meter, running=running, label="promote").rows


def _conclude(
    config: PromoteConfig, client: Any, evidence: Evidence, rows: list[dict[str, Any]], dataset: Dataset
) -> Summary:
    """Publish the evidence, log it, move the alias where every rule holds, and tell the webhook what happened.

    That the rules hold and that the alias moved are two facts: what is written before the move claims the first alone.
    A champion that changed meanwhile raises Overtaken, when tag, run and webhook know that nothing was promoted.
    """
    from pipelines import registry, tracking

    passed, version = evidence.verdict.passed, evidence.challenger.version
    now = version
    expected = None if evidence.champion is None else evidence.champion.version
    assert version is not None
    for line in evidence.verdict.lines():
        say(f"promote: {line}")
    outputs = _publish(storage.join(config.output, config.model, evidence.folder), evidence, rows)
    params = {**asdict(config), "webhook": config.webhook and place_of(config.webhook)}  # its path may be a secret
    params |= {"challenger_digest": evidence.challenger.digest, "challenger_version": version}
    if evidence.champion is not None:
        params |= {"champion_digest": evidence.champion.digest, "champion_version": expected}
    with tracking.run(f"promote {evidence.challenger.label}", params=params) as run_id:
        tracking.log_evaluation(
            evidence.metrics(),
            digest=dataset.digest,
            source=dataset.source,
            artifacts=outputs,
            model=evidence.challenger,
        )
        told = {registry.VERDICT: registry.PASSED if passed else registry.REFUSED, registry.EVIDENCE: run_id}
        tracking.tag_version(client, config.model, version, told)
        try:
            if passed:
                registry.move_champion(client, config.model, version, expected=expected, evidence=run_id)
        except registry.Overtaken as error:
            tracking.tag_version(client, config.model, version, {registry.VERDICT: registry.OVERTAKEN})
            client.log_metric(run_id, "promoted", 0.0)
            _tell(config, _news("overtaken", evidence, run_id=run_id, now=error.found))
            raise
        client.log_metric(run_id, "promoted", float(passed))
    if passed:
        say(f"promote: {config.model} v{version} is the champion now")
    else:
        now = registry.alias_version(client, config.model, registry.CHAMPION)  # it may have moved meanwhile
        say(f"promote: refused; the champion stays {'none' if now is None else f'v{now}'}")
    _tell(config, _news("promoted" if passed else "refused", evidence, run_id=run_id, now=now))
    return Summary(job="promote", run_id=run_id, status="done" if passed else "refused", inputs=1,
                   done=int(passed), outputs=outputs, metrics=evidence.metrics() | {"promoted": float(passed)},
                   exit_code=0 if passed else REFUSED_EXIT)  # fmt: skip


def _news(event: str, evidence: Evidence, *, run_id: str, now: int | None) -> dict[str, Any]:
    """Return what the webhook is told. now: the version that is champion; promoted: whether that is this challenger."""
    return {"event": event, "run_id": run_id, "now": now, "promoted": event == "promoted", **evidence.document()}


def _publish(folder: str, evidence: Evidence, rows: list[dict[str, Any]]) -> list[str]:
    """Write the evidence's files and the rows; return their URIs."""
    files = evidence.files()
    if rows:
        files["rows.parquet"] = to_parquet(rows)
    for name, data in files.items():
        storage.publish(storage.join(folder, name), data)
    return [storage.join(folder, name) for name in files]


def _rollback(config: PromoteConfig, client: Any, champion: int | None) -> Summary:
    from pipelines import registry

    previous = registry.alias_version(client, config.model, registry.PREVIOUS)
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
        registry.restore_champion(client, config.model, previous, expected=champion)
        _tell(config, {"event": "rolled_back", "model": config.model, "from": champion, "now": previous})
    verb = "would be" if config.dry_run else "is"
    say(f"promote: {config.model} v{previous} {verb} the champion again, not v{champion}")
    return Summary(job="promote", run_id="none", status="planned" if config.dry_run else "done", inputs=1,
                   done=int(not config.dry_run))  # fmt: skip


def _tell(config: PromoteConfig, document: Mapping[str, Any]) -> None:
    if config.webhook is not None:
        send(config.webhook, document)


def _signature(config: ModelConfig) -> Signature:
    encoder = config.encoder
    takes = "image and maps" if encoder.extra_channels else "image"
    if encoder.condition_channels == 0 and not encoder.regresses:
        takes = "noise alone"
    return Signature(scale=config.scale, channels_in=encoder.lr_channels, channels_out=encoder.channels, takes=takes)

"""What an evaluation is going to score, resolved before any work."""

from dataclasses import asdict, dataclass, replace

from diffsr_core.checkpoint import model_from_files
from diffsr_core.sampling import SamplingRecipe
from diffsr_core.search import Candidate
from pipelines.classifiers import Classifier, labels_of
from pipelines.config import check, fingerprint
from pipelines.datasets import Dataset, open_dataset
from pipelines.engine import say
from pipelines.evaluation_config import EvaluateConfig
from pipelines.measures import FROM_ROWS, SET_MEASURES, MeterSettings, check_settings, files_digest
from pipelines.models import ResolvedModel, resolve


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is scored, resolved before any work: models with their recipes, images, measures, points of the curve."""

    model: ResolvedModel
    recipe: SamplingRecipe
    rivals: tuple[tuple[ResolvedModel, SamplingRecipe], ...]
    baselines: tuple[str, ...]
    dataset: Dataset
    meter: MeterSettings
    labels: dict[str, int] | None
    candidates: list[Candidate]
    preset: str

    def identity(self, config: EvaluateConfig) -> str:
        """Return what names this evaluation: with all of it the same, its files are what they would be again."""
        own = replace(self.recipe, **asdict(self.candidates[0])) if self.candidates else self.recipe
        models = [(self.model, own), *self.rivals]
        return fingerprint(
            {
                "models": [[model.digest, asdict(recipe)] for model, recipe in models],
                "baselines": list(self.baselines),
                "data": self.dataset.digest,
                "meter": self.meter.identity(),
                "labels": self.labels,
                "reference": files_digest([config.reference]),
                "asked": config.asked(),
            }
        )


def planned(config: EvaluateConfig) -> Plan:
    """Return the plan. Raises ValueError for what the models, the files or the data set do not allow."""
    check(config.model is not None, "model", config.model, "must be given", "use --model REF")
    check(config.dataset is not None, "dataset", config.dataset, "must be given", "use --dataset URI")
    models = [resolve(ref) for ref in (str(config.model), *config.against)]
    documents = [model_from_files(model.files) for model in models]
    networks = [network.config for network, _ in documents]
    scale, baselines = networks[0].scale, config.baselines
    check_settings(meter := config.meter(), reference=config.reference)
    measured = (*meter.measures, *FROM_ROWS, *(SET_MEASURES if meter.inception else ()))
    check(not config.searches or config.objective in measured, "objective", config.objective, "must be measured",
          "name it in --metrics, or give its file")  # fmt: skip
    dataset = dataset_of(config, scale, split=config.split)
    if config.searches and networks[0].denoiser is None:
        raise ValueError(f"model ({models[0].label}) is a regression, it has no schedule; leave out --search-steps "
                         "and --search-start-levels")  # fmt: skip
    recipes = []
    for model, network in zip(models, networks, strict=True):
        check(network.scale == scale, "against", model.label, f"must be of the model's scale ({scale})", "leave it out")
        recipe = config.sampling(model.sampling)
        recipes.append(recipe if network.denoiser is not None else replace(recipe, num_samples=1, choice="first"))
        model.check_fits(recipes[-1], network)
    candidates = config.candidates(recipes[0], one_step=networks[0].one_step)
    for candidate in candidates:
        models[0].check_fits(replace(recipes[0], **asdict(candidate)), networks[0])
    if "regression" in baselines and not networks[0].encoder.regresses:
        say(f"evaluate: {models[0].label} has no regression network of its own, so that baseline is left out")
        baselines = tuple(name for name in baselines if name != "regression")
    return Plan(
        model=models[0],
        recipe=recipes[0],
        rivals=tuple(zip(models[1:], recipes[1:], strict=True)),
        baselines=baselines,
        dataset=dataset,
        meter=meter,
        labels=labels_for(config, dataset),
        candidates=candidates,
        preset=str(documents[0][1]["preset"]),
    )


def dataset_of(config: EvaluateConfig, scale: int, *, split: str) -> Dataset:
    """Return the images of a split. Raises ValueError."""
    protocol = config.preset
    if protocol is not None:
        check(protocol.scale == scale, "protocol", config.protocol, f"is of scale {protocol.scale}, not the model's "
              f"({scale})", "choose another, or another model")  # fmt: skip
    return open_dataset(
        str(config.dataset),
        scale=scale,
        split=split,
        degradation=config.degradation,
        lr_source=config.lr_source or "",
        lr_name=config.lr_name,
        framing=protocol.framing if protocol else None,
        limit=config.limit,
    )


def labels_for(config: EvaluateConfig, dataset: Dataset) -> dict[str, int] | None:
    """Return the class of each image; None without a classifier, or, said aloud, without classes. Raises ValueError."""
    if config.classifier is None:
        return None
    whole = dataset_of(replace(config, limit=None), dataset.scale, split=dataset.split)  # a folder's place is its class
    keys, num_classes = [item.key for item in whole.items], Classifier(config.classifier).num_classes
    found = labels_of(keys, source_uri=dataset.source, num_classes=num_classes)
    if found is None:
        say("evaluate: the images are in no class folders and have no labels.json, so there is no top1 and no top5")
    return found

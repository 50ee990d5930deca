"""The card of a model: the README.md of its folder, Markdown with Hugging Face's front matter.

It says what the model is, what it is not for, and what it was made from. Nothing in it is part of the model's digest.
What a person or a file has said is shown as text, on one line: it forms no heading, table, image, code or HTML.
"""

import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from diffsr_core.family import DenoiserSettings, ModelConfig
from diffsr_core.networks.edsr import EDSRConfig
from diffsr_core.networks.film import FiLMConfig
from diffsr_core.networks.interpolation import InterpolationConfig
from diffsr_core.networks.rrdb import RRDBConfig
from diffsr_core.networks.seed3 import Seed3Config
from diffsr_core.recipe import StageRecipe, TrainingRecipe
from pipelines.manifest import SPLITS, Manifest
from pipelines.pages import visible
from pipelines.recipes import recipe_in_words

# In a report's metrics as val_<code>_<method>: heading and decimals.
_SCORES = {
    "psnr": ("PSNR (dB) ↑", 2),
    "ssim": ("SSIM ↑", 4),
    "lr_psnr": ("LR-PSNR (dB) ↑", 2),
    "lpips": ("LPIPS ↓", 4),
}
_METHODS = ("bicubic", "regression", "sample")
_TOLD = {"noise_level": "the noise level", "amplitude": "the amplitude of the signal", "step": "the step t"}
_DATA_LABELS = ("Low resolution", "Patches", "Colours")
# Those of https://huggingface.co/docs/hub/repositories-licenses that are usual; any other is called "other" there.
_LICENCE_IDS = frozenset(
    {"apache-2.0", "mit", "bsd-3-clause", "gpl-3.0", "mpl-2.0", "openrail", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0"}
    | {"cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-4.0"}
)
# Within a line; all else that Markdown reads, such as #, is a mark only where a line begins, and no value is put there.
_MARKS = re.compile(r"([\\`*_\[\]<>|~&$])")


@dataclass(frozen=True)
class Cost:
    """What the training has taken so far, on how many workers of which device; images_per_s of all of them together."""

    seconds: float
    device: str
    workers: int
    images_per_s: float


def write_model_card(
    *,
    preset: str,
    config: ModelConfig,
    recipe: TrainingRecipe,
    manifest: Manifest,
    num_weights: int,
    step: int,
    metrics: Mapping[str, float],
    cost: Cost | None = None,
    weights_licence: str | None = None,
    data_licence: str | None = None,
    num_sources: int | None = None,
    parent: str | None = None,
    teacher: str | None = None,
    name: str | None = None,
) -> str:
    """Return the Markdown text.

    step: steps done. metrics: those of the report, of which the validation's are shown. Licences as the person gave
    them; None is "not stated". num_sources: images that the pairs were cut from. parent, teacher: digests of the models
    that were fine-tuned or distilled. name: under which the model is to be registered in MLflow.
    """
    scores = _scores(metrics)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        undefined=StrictUndefined,
        finalize=plain,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"count": "{:,}".format}
    distilled = recipe.stages[-1].in_one_step
    words = dict(recipe_in_words(manifest.recipe))
    return environment.get_template("model_card.md").render(
        front_matter=Markup(_front_matter(preset, config, manifest, scores, weights_licence)),
        preset=preset,
        sentence=_sentence(config),
        facts={**_facts(config), "Weights": f"{num_weights:,} parameters"},
        invents=config.denoiser is not None,
        reads_lr=config.encoder.condition_channels > 0,
        digest=manifest.digest,
        pairs=", ".join(f"{manifest.num_pairs(split):,} {split}" for split in SPLITS),
        num_sources=num_sources,
        data=[(label, words[label]) for label in _DATA_LABELS if label in words],
        data_licence=data_licence,
        weights_licence=weights_licence,
        stages=[_stage(stage) for stage in recipe.stages],
        recipe=recipe,
        averages=", ".join(f"{images:,}" for images in recipe.ema_half_lives_images[1:]),
        step=step,
        images=step * recipe.batch_size,
        parent=parent,
        teacher=teacher,
        cost=cost,
        time=None if cost is None else _duration(cost.seconds),
        scores=scores,
        headings=[heading for code, (heading, _) in _SCORES.items() if any(code in row for row in scores.values())],
        cells={method: _cells(row, scores) for method, row in scores.items()},
        val_loss=metrics.get("val_loss"),
        num_val=manifest.num_pairs("val"),
        named=name is not None,
        command=Markup(_command(name, distilled=distilled)),
    )


def plain(value: Any) -> str:
    """Return the text with all that Markdown or HTML would read as a mark escaped, on one line; Markup as it is."""
    return str(value) if isinstance(value, Markup) else _MARKS.sub(r"\\\1", visible(value))


def _front_matter(
    preset: str,
    config: ModelConfig,
    manifest: Manifest,
    scores: Mapping[str, Mapping[str, float]],
    licence: str | None,
) -> str:
    """Return the YAML between the dashes, as https://huggingface.co/docs/hub/model-cards reads it."""
    method = "sample" if "sample" in scores else "regression"
    results = [
        {"type": code, "name": f"{code.upper().replace('_', '-')} ({method})", "value": round(value, 4)}
        for code, value in scores.get(method, {}).items()
        if math.isfinite(value)
    ]
    document: dict[str, Any] = {"library_name": "diffsr", "pipeline_tag": "image-to-image"}
    if licence is None:
        document["license"] = "unknown"
    elif licence.lower() in _LICENCE_IDS:
        document["license"] = licence.lower()
    else:
        document |= {"license": "other", "license_name": visible(licence)}
    kind = "regression" if config.denoiser is None else "diffusion"
    document["tags"] = ["super-resolution", kind, f"x{config.scale}"]
    document["datasets"] = [f"sha256:{manifest.digest}"]
    if results:
        document["metrics"] = [result["type"] for result in results]
        task = {"type": "image-to-image", "name": f"super-resolution x{config.scale}"}
        dataset = {"type": "diffsr-pairs", "name": f"pair set {manifest.digest[:12]}", "split": "val"}
        document["model-index"] = [
            {"name": visible(preset), "results": [{"task": task, "dataset": dataset, "metrics": results}]}
        ]
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=10_000)


def _sentence(config: ModelConfig) -> str:
    does = f"makes images {config.scale} times larger along each side" if config.scale > 1 else "restores images"
    if config.denoiser is None:
        return f"A regression that {does} in one pass, the same result each time."
    if not config.encoder.condition_channels:
        return "A diffusion model that makes images out of noise; it reads none."
    return f"A diffusion model that {does}. What the pixels do not tell it draws from what it has learned."


def _facts(config: ModelConfig) -> dict[str, str]:
    """Return what the network is, in the order of the family's four places."""
    encoder, denoiser = config.encoder, config.denoiser
    bands = {1: "grey", 3: "RGB"}.get(encoder.channels, f"{encoder.channels} bands")
    extra = f" and {encoder.extra_channels} extra maps of the LR" if encoder.extra_channels else ""
    facts = {"Image": f"{bands}, ×{config.scale}{extra}"}
    if isinstance(encoder, RRDBConfig | EDSRConfig):
        facts["Encoder"] = f"{encoder.kind.upper()}, {encoder.num_blocks} blocks of {encoder.num_features} features"
    elif isinstance(encoder, InterpolationConfig):
        facts["Encoder"] = "none" if encoder.kernel == "none" else f"{encoder.kernel} interpolation"
    else:
        facts["Encoder"] = f"{_network(encoder.network)}, run once on the LR enlarged by {encoder.kernel}"
    if denoiser is None:
        return {**facts, "Denoiser": "none"}
    anchor = {"zero": "the image itself", "bicubic": "the image less the bicubic LR"}
    diffused = anchor.get(config.anchor, "the image less the encoder's own")
    diffused += f", times {config.residual_scale:g}" if config.residual_scale != 1 else ""
    diffused += f", in space-to-depth by {config.space_to_depth}" if config.space_to_depth > 1 else ""
    return {
        **facts,
        "Denoiser": _network(denoiser),
        "Anchor": f"{config.anchor}: what is diffused is {diffused}",
        "Prediction": f"{config.prediction}, told {_TOLD[config.told]}",
        "Schedule": f"{config.schedule.name}, {config.schedule.num_timesteps:,} steps",
        **_one_step(config),
    }


def _one_step(config: ModelConfig) -> dict[str, str]:
    """Return how a model is sampled that was trained for one step."""
    if not config.one_step:
        return {}
    if config.start_level is None:
        return {"Sampling": "in one step, from noise"}
    dial = f"unless --start-level says otherwise from {config.start_level:g}"
    return {"Sampling": f"in one step from any noise level, {dial}: 0 has the most texture, towards 1 the least"}


def _network(network: DenoiserSettings) -> str:
    if isinstance(network, FiLMConfig):
        return f"residual network, {network.num_blocks} blocks of {network.hidden} channels"
    if isinstance(network, Seed3Config):
        kind, widths = f"U-Net of {network.blocks} blocks", network.widths
    else:
        kind = {"srdiff": "SRDiff U-Net", "sr3": "SR3 U-Net"}[network.kind]
        widths = tuple(network.hidden * multiplier for multiplier in network.multipliers)
    return f"{kind}, {', '.join(map(str, widths))} channels"


def _stage(stage: StageRecipe) -> tuple[str, str]:
    """Return the stage's name and what it does."""
    weighted = " weighted by min-SNR" if stage.weighting == "min_snr" else ""
    taught = f", from {stage.teacher_steps} steps of the teacher" if stage.name == "distillation" else ""
    loss = f"{stage.loss.upper()} loss{weighted}"
    if stage.name == "energy":
        loss = "energy score" + (f" of diversity {stage.diversity:g}" if stage.diversity != 1 else "")
    what = f"{stage.num_steps:,} steps, {loss}, learning rate {stage.learning_rate:g}"
    return stage.name, f"{what} ({stage.decay}){taught}"


def _scores(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Return the validation's scores by method, then by code; a method without any is left out."""
    rows = {
        method: {code: metrics[key] for code in _SCORES if (key := f"val_{code}_{method}") in metrics}
        for method in _METHODS
    }
    return {method: row for method, row in rows.items() if row}


def _cells(row: Mapping[str, float], scores: Mapping[str, Mapping[str, float]]) -> list[str]:
    shown = [code for code in _SCORES if any(code in other for other in scores.values())]
    return [f"{row[code]:.{_SCORES[code][1]}f}" if code in row else "–" for code in shown]


def _duration(seconds: float) -> str:
    """Return such as "1 h 23 min"."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60:,} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _command(name: str | None, *, distilled: bool) -> str:
    """Return the line that upscales with the model, whose name may be anything: quoted for a shell, on one line."""
    model = "FOLDER" if name is None else shlex.quote(visible(f"models:/{name}@champion"))
    steps = " --steps 1" if distilled else ""
    return f"python jobs/upscale.py --source photos --output upscaled --model {model}{steps}"

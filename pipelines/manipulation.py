"""A tool beside the jobs: what one LR image may have been, images between two, one image's content in another."""

import json
from dataclasses import asdict, dataclass, field, fields

import numpy as np

from diffsr_core.checkpoint import model_from_files
from diffsr_core.manipulation import draw, fuse_content, interpolate
from diffsr_core.metrics import diversity, lr_psnr
from diffsr_core.pixels import Pixels
from diffsr_core.upscaler import Upscaler
from pipelines import storage
from pipelines.blobs import encode_blob
from pipelines.config import check
from pipelines.engine import say
from pipelines.images import Refused, decode
from pipelines.models import resolve
from pipelines.runs import Summary, new_run_id
from pipelines.sampling import SamplingConfig

# Each verb and the settings that are its own.
VERBS = {
    "samples": ("samples",),
    "interpolate": ("first", "second", "weights", "level"),
    "fuse": ("base", "donor", "mask", "level"),
}


IMAGES = ("first", "second", "base", "donor", "mask")


@dataclass(frozen=True, kw_only=True)
class ManipulateConfig(SamplingConfig):
    """Look into the space of a model's results for one LR image.

    First word: samples (several results of it, their mean and deviation), interpolate (images between two of its
    results) or fuse (a region of one image denoised into another).
    """

    lr: str = field(metadata={"unit": "URI"})
    """The LR image that every result must agree with."""
    output: str = field(metadata={"unit": "URI"})
    """Folder for the results, PNG."""
    model: str = field(default="models:/diffsr@champion", metadata={"unit": "REF"})
    """Model: a folder or URI, models:/name@alias or models:/name/version."""
    samples: int = 8
    """samples: how many."""
    first: str | None = field(default=None, metadata={"unit": "URI"})
    """interpolate: HR image at weight 0; default: the first sample of the LR."""
    second: str | None = field(default=None, metadata={"unit": "URI"})
    """interpolate: HR image at weight 1; default: the second sample of the LR."""
    weights: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """interpolate: where between the two, 0 to 1 each."""
    base: str | None = field(default=None, metadata={"unit": "URI"})
    """fuse: HR image that receives; default: the first sample of the LR."""
    donor: str | None = field(default=None, metadata={"unit": "URI"})
    """fuse: HR image of the same size whose region is taken."""
    mask: str | None = field(default=None, metadata={"unit": "URI"})
    """fuse: image of the same size, bright where the donor is taken."""
    level: float = 0.3
    """interpolate and fuse: noise level at which images are mixed, above 0 (all noise) and below 1 (no change)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.samples >= 2, "samples", self.samples, "must be at least 2", "use 8")
        check(0 < self.level < 1, "level", self.level, "must be between 0 and 1", "use 0.3")
        check(len(self.weights) > 0, "weights", self.weights, "must hold one or more", "use 0,0.5,1")
        names = {_name(weight) for weight in self.weights}
        check(len(names) == len(self.weights), "weights", self.weights, "must differ by 0.001 or more", "leave one out")
        for weight in self.weights:
            check(0 <= weight <= 1, "weights", weight, "must be from 0 to 1 each", "use 0,0.5,1")


def manipulate(config: ManipulateConfig, *, verb: str) -> Summary:
    """Run one verb; return its summary. Raises ValueError."""
    for item in fields(config):
        of = [name for name, own in VERBS.items() if item.name in own]
        if of and verb not in of and getattr(config, item.name) != item.default:
            raise ValueError(f"{item.name} ({getattr(config, item.name)}) is of {' and '.join(of)}; leave it out")
    model = resolve(config.model)
    network, _ = model_from_files(model.files)
    if network.denoiser is None:
        raise ValueError(f"model ({model.label}) is a regression, it has one result only; give a diffusion model")
    if network.config.one_step and verb != "samples":
        raise ValueError(
            f"model ({model.label}) draws in one step from its own regression, and {verb} starts from images; give "
            "a diffusion model of several steps"
        )
    lr, digest = _read("lr", config.lr)
    upscaler = Upscaler(network, config.sampling(model.sampling))
    upscaler.check_channels(lr.shape[2])
    if verb != "samples":
        try:
            upscaler.grid_from(config.level)
        except ValueError as error:
            raise ValueError(
                f"level ({config.level}) must suit the model and the steps; choose another: {error}"
            ) from None
    recipe = upscaler.recipe
    say(f"manipulate: {verb} with {model.label}, {recipe.label}")
    settings = {item.name: getattr(config, item.name) for item in fields(config) if item.name in VERBS[verb]}
    images = {name: _read(name, settings[name]) for name in IMAGES if settings.get(name) is not None}
    pictures = {name: image for name, (image, _) in images.items()}
    made, metrics = {"samples": _samples, "interpolate": _interpolate, "fuse": _fuse}[verb](
        config, upscaler, lr, digest, pictures
    )
    measured = [
        lr_psnr(lr, pixels, scale=network.config.scale)
        for name, pixels in made.items()
        if name not in ("base", "deviation", "pasted")
    ]
    outputs = [storage.join(config.output, f"{name}.png") for name in made]
    for uri, pixels in zip(outputs, made.values(), strict=True):
        storage.publish(uri, encode_blob(pixels, "png"))
    record = {
        "verb": verb,
        "settings": settings | {name: found for name, (_, found) in images.items()},  # what an image was, not where
        "lr": digest,
        "model": model.digest,
        "sampling": asdict(upscaler.recipe),
        "outputs": [f"{name}.png" for name in made],
    }
    storage.publish(storage.join(config.output, f"{verb}.json"), json.dumps(record, indent=1).encode())
    return Summary(job="manipulate", run_id=new_run_id("manipulate"), status="done", inputs=1, done=1,
                   outputs=outputs, metrics={**metrics, "lr_psnr_min": min(measured)})  # fmt: skip


def _samples(
    config: ManipulateConfig, upscaler: Upscaler, lr: Pixels, digest: str, images: dict[str, Pixels]
) -> tuple[dict[str, Pixels], dict[str, float]]:
    drawn = draw(upscaler, lr, count=config.samples, digest=digest)
    stack = np.stack(drawn).astype(np.float64)
    # The deviation of each pixel, 8 times as bright: 32 levels, far more than a good model's, are white.
    deviation = (8 * stack.std(axis=0, ddof=1)).clip(0, 255)
    made = {f"sample-{index:02d}": image for index, image in enumerate(drawn)}
    made |= {"mean": stack.mean(axis=0).round().astype(np.uint8), "deviation": deviation.round().astype(np.uint8)}
    return made, {"diversity": diversity(np.stack(drawn))}


def _interpolate(
    config: ManipulateConfig, upscaler: Upscaler, lr: Pixels, digest: str, images: dict[str, Pixels]
) -> tuple[dict[str, Pixels], dict[str, float]]:
    drawn = [] if {"first", "second"} <= images.keys() else draw(upscaler, lr, count=2, digest=digest)
    first = images["first"] if "first" in images else drawn[0]
    second = images["second"] if "second" in images else drawn[1]
    between = interpolate(upscaler, lr, first, second, weights=config.weights, level=config.level, digest=digest)
    return {_name(weight): image for weight, image in zip(config.weights, between, strict=True)}, {}


def _name(weight: float) -> str:
    return f"weight-{weight:.3f}"


def _fuse(
    config: ManipulateConfig, upscaler: Upscaler, lr: Pixels, digest: str, images: dict[str, Pixels]
) -> tuple[dict[str, Pixels], dict[str, float]]:
    if not {"donor", "mask"} <= images.keys():
        raise ValueError("donor and mask must be given to fuse; use --donor URI --mask URI")
    base = images["base"] if "base" in images else draw(upscaler, lr, count=1, digest=digest)[0]
    donor, mask = images["donor"], images["mask"].mean(axis=2) >= 128
    fused = fuse_content(upscaler, lr, base, donor, mask, level=config.level, digest=digest)
    return {"base": base, "pasted": np.where(mask[:, :, None], donor, base), "fused": fused}, {}


def _read(name: str, uri: str) -> tuple[Pixels, str]:
    """Return an image's pixels and the digest of its bytes. Raises ValueError for what cannot be read."""
    try:
        data = storage.read_bytes(uri)
        return decode(data).pixels, storage.digest_bytes(data)
    except (OSError, Refused) as error:
        raise ValueError(f"{name} ({uri}) must be an image that can be read: {error}; give another") from None

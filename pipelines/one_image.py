"""A tool beside the jobs: one image upscaled here and now, without a cluster, by the means of the nightly job."""

import hashlib
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from diffsr_core.checkpoint import model_from_files
from diffsr_core.sampling import SamplingRecipe
from diffsr_core.upscaler import Upscaler
from pipelines import encoders, storage
from pipelines.config import check
from pipelines.corpus import SPOOL_BYTES, Original
from pipelines.engine import say
from pipelines.images import Refused, identify
from pipelines.kinds import Result
from pipelines.models import resolve
from pipelines.pictures import upscaled
from pipelines.runs import Summary, new_run_id
from pipelines.sampling import SamplingConfig
from pipelines.sidecars import uncertainty_key
from pipelines.stills import StillSettings

STDIN = "-"
HEAD_BYTES = 1 << 16  # of a file, which tell its format
# Endings of the names that people give; encoders.extension says the one that we give.
ENDINGS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG", ".webp": "WEBP",
           ".tif": "TIFF", ".tiff": "TIFF", ".avif": "AVIF"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ImageConfig(SamplingConfig):
    """Upscale one image, without a cluster: diffsr image IN OUT.

    The result has the bytes that the upscale job publishes for that image with the same settings.
    """

    input: str = field(metadata={"unit": "IN"})
    """The image: a file, a URI, or - for stdin; or the first word that is no flag."""
    output: str = field(metadata={"unit": "OUT"})
    """Where the result goes, a file or a URI; or the second word."""
    model: str = field(default="pretrained:diffsr-x4", metadata={"unit": "REF"})
    """Model: one that ships (pretrained:NAME), a folder or URI, models:/name@alias or models:/name/version."""
    format: Literal["auto", "keep", "png", "jpeg", "webp", "tiff", "avif"] = field(
        default="auto", metadata={"group": "result"}
    )
    """Format of the result; auto: what the ending of OUT says."""
    quality: int = 95
    """Quality of a JPEG, AVIF or lossy WebP, 1 to 100; WebP of 100 is lossless."""
    samples: int = 1
    """Samples drawn; of more than one the deviation is written beside the result, as OUT.uncertainty.png."""
    choice: Literal["first", "mean", "best"] = "first"
    """What of them is published: the first, their mean, or the one that keeps to the input most by itself."""
    first_page: bool = False
    """Take the first page or frame of what has several, which is refused otherwise."""
    max_megapixels: float = 100.0
    """Larger inputs are refused, unless they can be read by window (TIFF, JPEG 2000)."""
    force: bool = False
    """Replace what is at OUT."""
    use_gpu: bool = False
    """Compute on the GPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(1 <= self.quality <= 100, "quality", self.quality, "must be from 1 to 100", "use 95")
        check(1e-6 <= self.max_megapixels <= 1e6, "max_megapixels", self.max_megapixels, "must be from 1e-06 to 1e+06",
              "use 100")  # fmt: skip

    def sampling(self, own: Mapping[str, Any] | None = None) -> SamplingRecipe:
        """Return the sampling recipe. own: the model's sampling.json; a setting that was given wins over it."""
        return replace(super().sampling(own), num_samples=self.samples, choice=self.choice)


def split_words(argv: Sequence[str]) -> list[str]:
    """Return a command line whose first two words that are no flags, nor values of flags, are --input and --output.

    What is no part of that is left as it is, for the parser to judge; a second pass changes nothing.
    """
    switches = {item.name for item in fields(ImageConfig) if isinstance(item.default, bool)} | {"help", "print_config"}
    left, found, names = list(argv), list[str](), ["input", "output"]
    names = [name for name in names if not any(word.partition("=")[0] == f"--{name}" for word in left)]
    while left:
        word = left.pop(0)
        if not word.startswith("-") or word == STDIN:
            found.append(f"--{names.pop(0)}={word}" if names else word)
            continue
        found.append(word)
        name = word.removeprefix("--").removeprefix("no-").replace("-", "_")
        if word.startswith("--") and "=" not in word and name not in switches and left:
            found.append(left.pop(0))
    return found


def upscale_image(config: ImageConfig) -> Summary:
    """Upscale the image and publish it; return the summary. Raises ValueError or OSError, before any work if it can."""
    started = time.monotonic()
    outputs = [config.output] + [uncertainty_key(config.output)] * (config.samples > 1)
    _check_places(config, outputs)
    check(not config.use_gpu or torch.cuda.is_available(), "use_gpu", config.use_gpu, "needs a GPU, and there is none",
          "leave it out")  # fmt: skip
    original = _original(config)
    settings = StillSettings(
        format=_format(config, original),
        quality=config.quality,
        first_page=config.first_page,
        max_megapixels=config.max_megapixels,
    )
    model = resolve(config.model)
    network, _ = model_from_files(model.files)
    recipe = config.sampling(model.sampling)
    lanes = 1 if config.use_gpu else max(1, len(os.sched_getaffinity(0)) // recipe.num_threads)
    upscaler = Upscaler(network, recipe, device="cuda" if config.use_gpu else "cpu", lanes=lanes, regression=False)
    say(f"image: {model.label}, digest {model.digest[:12]}, {recipe.label}")
    try:
        with upscaled(upscaler, original, settings=settings, model=model.digest, label="image") as result:
            for key, path in result.files.items():
                _publish(config, outputs[0] if key == result.out_key else outputs[1], path)
    except Refused as refused:
        raise ValueError(f"input ({config.input}) cannot be upscaled: {refused}") from None
    for note in result.notes:
        say(f"image: {note}")
    say(_one_line(config, result, seconds=time.monotonic() - started))
    made = [uri for uri in outputs if uri == config.output or len(result.files) > 1]
    return Summary(job="image", run_id=new_run_id("image"), status="done", inputs=1, done=1,
                   outputs=[storage.absolute(uri) for uri in made], metrics=result.metrics)  # fmt: skip


def _one_line(config: ImageConfig, result: Result, *, seconds: float) -> str:
    source, made = result.source, result.output
    sizes = f"{source['width']} x {source['height']} -> {made['width']} x {made['height']} px"
    verdict = ""
    if result.verdict != "pass":
        verdict = (
            f"; {'look at it' if result.verdict == 'review' else 'bicubic is published instead'}: {result.message}"
        )
    lr_psnr = f"LR-PSNR {result.metrics['lr_psnr']:.1f} dB"
    return f"image: {config.output}: {sizes}, {result.format}, {seconds:.1f} s, {lr_psnr}{verdict}"


def _check_places(config: ImageConfig, outputs: Sequence[str]) -> None:
    """Raise ValueError for an output that cannot be, or may not be replaced."""
    check(config.output != STDIN, "output", config.output, "must be a file: stdout is the summary's", "name one")
    if config.input != STDIN:
        check(not storage.is_folder(config.input), "input", config.input, "must be one image, it is a folder",
              "use diffsr upscale for folders")  # fmt: skip
    for uri in outputs:
        is_folder = uri.endswith("/") or storage.is_folder(uri)
        check(not is_folder, "output", uri, "must be a file, it is a folder", "name the file in it")
        check(not _is_same(config.input, uri), "output", uri, "must not be the input", "choose another name")
        if not config.force:
            check(not storage.exists(uri), "output", uri, "is there already", "use --force to replace it")
        if storage.is_local(uri):
            _check_writable(uri)


def _is_same(first: str, second: str) -> bool:
    if first == STDIN or not (storage.is_local(first) and storage.is_local(second)):
        return first == second
    paths = [storage.open_filesystem(uri)[1] for uri in (first, second)]
    return all(map(os.path.exists, paths)) and os.path.samefile(*paths)  # also by another name, or linked


def _check_writable(uri: str) -> None:
    """Raise ValueError for a local place that nothing can be written to: known now, not after the work."""
    folder = Path(storage.open_filesystem(uri)[1]).parent
    while not folder.exists():
        folder = folder.parent
    check(folder.is_dir() and os.access(folder, os.W_OK | os.X_OK), "output", uri,
          f"must be in a folder that can be written, {folder} cannot", "choose another place")  # fmt: skip


def _original(config: ImageConfig) -> Original:
    """Return the content of the input; a large file of this machine stays where it is. Raises ValueError, OSError."""
    if config.input == STDIN:
        data = sys.stdin.buffer.read()
        return Original(storage.digest_bytes(data), len(data), data, None)
    size = storage.size(config.input)
    if size is None:
        raise ValueError(f"input ({config.input}) must be an image file; there is none of this name")
    if size > SPOOL_BYTES and storage.is_local(config.input):
        path = storage.open_filesystem(config.input)[1]
        with open(path, "rb") as file:
            return Original(hashlib.file_digest(file, "sha256").hexdigest(), size, None, path)
    data = storage.read_bytes(config.input)
    return Original(storage.digest_bytes(data), len(data), data, None)


def _format(config: ImageConfig, original: Original) -> str:
    """Return the format as StillSettings takes it. Raises ValueError for a name that would say another one."""
    own = encoders.output_format(identify(original.head(HEAD_BYTES)))  # what is no image is refused when it is opened
    ending = os.path.splitext(config.output)[1].lower()
    said = ENDINGS.get(ending)
    if config.format == "auto":
        check(said is not None, "output", config.output, f"must end in one of {', '.join(ENDINGS)}",
              "use such a name, or say --format")  # fmt: skip
        return "keep" if said == own else str(said).lower()
    wanted = own if config.format == "keep" else config.format.upper()
    check(said in (None, wanted), "output", config.output, f"must not end in {ending}, it would be {wanted}",
          f"use {encoders.extension(wanted)}, or leave --format out")  # fmt: skip
    return config.format


def _publish(config: ImageConfig, uri: str, path: str) -> None:
    """Publish a file, whole or not at all. Raises ValueError where something has come to lie there meanwhile."""
    if config.force:
        storage.publish_file(uri, path)
        return
    large = os.path.getsize(path) > storage.CREATE_BYTES and not storage.is_local(uri)
    made = not storage.exists(uri) if large else storage.create_file(uri, path)
    check(made, "output", uri, "is there now, and was not before", "use --force to replace it")
    if large:
        storage.publish_file(uri, path)

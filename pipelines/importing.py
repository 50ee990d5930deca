"""A tool beside the jobs: a released weight file becomes a model folder."""

from dataclasses import dataclass, field
from pathlib import Path

from diffsr_core.checkpoint import model_files
from diffsr_core.importers import released_model
from pipelines import storage
from pipelines.config import check
from pipelines.engine import say
from pipelines.models import publish_files
from pipelines.runs import Summary, new_run_id


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Turn a weight file of the public SR3 code or of SRDiff into a model folder, its quirks kept.

    The folder serves wherever a model is named; the registry takes it by promotion like any other.
    """

    weights: str = field(metadata={"unit": "FILE"})
    """The released file: *_gen.pth of SR3, a checkpoint of SRDiff, or either as .safetensors."""
    output: str = field(metadata={"unit": "URI"})
    """Where the model folder is written."""
    scale: int | None = None
    """Output pixels per input pixel; SR3's files do not tell it (8 for both released ones), SRDiff's do."""
    num_groups: int | None = None
    """Groups of SR3's normalisation, which its files do not tell; default: those of the released file."""

    def __post_init__(self) -> None:
        check(self.scale is None or self.scale >= 1, "scale", self.scale, "must be at least 1", "use 8")
        check(
            self.num_groups is None or self.num_groups >= 1,
            "num_groups",
            self.num_groups,
            "must be at least 1",
            "use 32 or 16",
        )


def import_weights(config: ImportConfig) -> Summary:
    """Run the tool; return its summary. Raises ValueError for a file that is not such a model, OSError."""
    if storage.exists(storage.join(config.output, "config.json")):
        raise ValueError(f"output ({config.output}) must not hold a model yet; choose another --output")
    path = Path(config.weights)
    model, weights = released_model(path, scale=config.scale, num_groups=config.num_groups)
    assert model.denoiser is not None
    card = (
        f"# {path.stem}\n\nImported from {path.name}, sha256 {storage.digest_bytes(path.read_bytes())}.\n\n"
        f"* Scale x{model.scale}, {sum(value.numel() for value in weights.values()):,} weights.\n"
        "* Licence and training data are those of whoever released the file: read them before you publish results.\n"
        "* Output is synthetic detail: a plausible picture, not a measurement.\n"
    )
    publish_files(config.output, model_files(model, weights, weights, preset=path.stem, card=card))
    say(f"import: {path.name} is a {model.denoiser.kind} model, x{model.scale}, in {config.output}")
    return Summary(job="import", run_id=new_run_id("import"), status="done", inputs=1, done=1, outputs=[config.output])

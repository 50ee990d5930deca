"""An encoded image in, an encoded SR image out, by the job's own means: for the served model and `diffsr image`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

from diffsr_core.checkpoint import model_from_files, own_schedule
from diffsr_core.consistency import Consistency
from diffsr_core.family import ModelConfig
from diffsr_core.sampling import SamplingRecipe
from diffsr_core.upscaler import Upscaler
from pipelines import storage
from pipelines.config import check, fingerprint
from pipelines.corpus import Original
from pipelines.engine import progress
from pipelines.kinds import Result, draw, out_of_memory
from pipelines.sampling import SamplingConfig
from pipelines.stills import DECISIVE, Stills, StillSettings

Format = Literal["keep", "png", "jpeg", "webp", "tiff", "avif"]
OPERATOR = {"device": "cpu", "max_megapixels": 4.0}  # MLflow's model_config: settings of who serves, not of who asks
MOST_STEPS = 1000  # of one request: a caller waits for it, and others do behind it


class UpscaledPicture(NamedTuple):
    """The encoded result, its format, and metrics (lr_psnr in dB, colour_drift in levels of 255)."""

    data: bytes
    format: str
    metrics: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class PictureRequest:
    """What one request to a served model may choose; the defaults are those of a model that says nothing itself.

    Raises ValueError that names what is wrong; what only the model can tell is found by `recipe`.
    """

    sampler: str = "ddim"
    grid: str = "auto"
    steps: int = 8
    start_level: float = 0.0
    seed: int = 0
    consistency: Consistency = "exact"
    format: Format = "keep"
    quality: int = 95

    def __post_init__(self) -> None:
        check(self.steps <= MOST_STEPS, "steps", self.steps, f"must be at most {MOST_STEPS}", "use 4 to 100")
        check(1 <= self.quality <= 100, "quality", self.quality, "must be from 1 to 100", "use 95")
        self._config()

    def _config(self) -> SamplingConfig:
        # One image at a time: the nightly job's batch of tiles would compute mostly padding.
        return SamplingConfig(
            sampler=self.sampler,
            grid=self.grid,
            steps=self.steps,
            start_level=self.start_level,
            seed=self.seed,
            consistency=self.consistency,
            micro_batch=1,
        )

    def recipe(self, config: ModelConfig) -> SamplingRecipe:
        """Return the recipe, tiles and windows fitted to a model. Raises ValueError for what it cannot do."""
        usual, stride = self._config().sampling(), config.lr_stride

        def fitted(pixels: int) -> int:
            return -(-pixels // stride) * stride

        tile = max(config.lr_smallest, fitted(usual.tile))
        halo = usual.halo // stride * stride or (stride if tile > 2 * stride else 0)
        window = max(tile, fitted(usual.window))
        recipe = replace(usual, tile=tile, halo=halo, window=window, margin=fitted(usual.margin))
        recipe.check_fits(config)
        return recipe


def usual_request(own: Mapping[str, Any] | None, config: ModelConfig) -> PictureRequest:
    """Return what a model is asked for unless a request says otherwise. own: its own schedule, None without one."""
    recipe = SamplingConfig().sampling(own)
    return PictureRequest(
        sampler=recipe.sampler,
        grid=recipe.grid,
        steps=recipe.num_steps,
        start_level=recipe.start_level,
        consistency=recipe.consistency if config.scale > 1 else "off",  # at scale 1 exact would give the input back
    )


def usual_params(files: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the parameters that a model folder is served with, and their defaults: the schema of its `params`."""
    model, _ = model_from_files(files)
    return asdict(usual_request(own_schedule(files, model.config), model.config))


def recipe_fingerprint(recipe: SamplingRecipe, settings: StillSettings) -> str:
    """Return the fingerprint that the upscale job gives to these settings; it goes into the files."""
    known = asdict(settings) | asdict(settings.thresholds)
    return fingerprint({"sampling": asdict(recipe), "still": {name: known[name] for name in DECISIVE}})


@contextmanager
def upscaled(
    upscaler: Upscaler, original: Original, *, settings: StillSettings, model: str, label: str = ""
) -> Iterator[Result]:
    """Give the result of one image for the time of the body: its files go with it. Raises Refused.

    model: digest of the model. label: of the line that counts the windows of a large image on stderr; "" for none.
    An image that says itself that it is a result is upscaled like any other: somebody asked for this one.
    """
    settings = replace(settings, skip_upscaled=False)
    kind = Stills(settings, model=model, recipe=recipe_fingerprint(upscaler.recipe, settings))
    with out_of_memory(), kind.open(original, {"key": "picture"}) as asset:
        windows = asset.windows(upscaler)
        for window in progress(windows, total=len(windows), label=label) if label and len(windows) > 1 else windows:
            asset.assemble(window, draw(upscaler, asset.read(window), window, noise=asset.noise))
        yield asset.finish(upscaler)


def upscale_picture(upscaler: Upscaler, data: bytes, *, settings: StillSettings, model: str) -> UpscaledPicture:
    """Return the SR of an encoded image: the bytes that the job would publish. model: its digest. Raises Refused."""
    original = Original(storage.digest_bytes(data), len(data), data, None)
    with (
        upscaled(upscaler, original, settings=settings, model=model) as result,
        open(result.files[result.out_key], "rb") as file,
    ):
        return UpscaledPicture(file.read(), result.format, result.metrics)

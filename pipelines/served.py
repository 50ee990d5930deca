"""The pyfunc face of a model in MLflow, as models-from-code: image bytes in, image bytes out. No object is pickled.

MLflow's scoring server answers JSON only, so over HTTP images are base64, both ways:
`{"inputs": ["<base64>"], "params": {"steps": 8}}` -> `{"predictions": ["<base64>"]}`.
"""

from functools import lru_cache
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST, INTERNAL_ERROR
from mlflow.pyfunc.model import PythonModel

from diffsr_core.checkpoint import model_from_files
from diffsr_core.sampling import SamplingRecipe
from diffsr_core.upscaler import Upscaler
from pipelines.config import from_mapping
from pipelines.images import Refused
from pipelines.models import resolve
from pipelines.pictures import OPERATOR, PictureRequest, upscale_picture, usual_request
from pipelines.stills import StillSettings

KEPT = 4  # upscalers, one for each of the last recipes: each has a copy of the weights


class Rejected(MlflowException):
    """A request that is answered with our reason: status 400 for what the caller can mend, else 500.

    MLflow's server puts the whole request in front of the message of what a model raises: images of any size.
    """

    @property
    def message(self) -> str:
        """What is wrong, one line."""
        return self._message

    @message.setter
    def message(self, text: str) -> None:
        if not hasattr(self, "_message"):
            self._message = text


class ServedUpscaler(PythonModel):
    """Upscales encoded images with the folder that was logged beside it."""

    def load_context(self, context: Any) -> None:
        """Load the model folder; refuses a damaged one."""
        found = resolve(str(context.artifacts["model"]))
        model, _ = model_from_files(found.files)
        self.digest, self.config = found.digest, model.config
        self.usual = usual_request(found.sampling, model.config)
        operator = OPERATOR | (context.model_config or {})
        self.max_megapixels = float(operator["max_megapixels"])

        @lru_cache(maxsize=KEPT)
        def upscaler_of(recipe: SamplingRecipe) -> Upscaler:
            return Upscaler(model, recipe, device=str(operator["device"]), regression=False)

        self.upscaler_of = upscaler_of
        upscaler_of(self.usual.recipe(model.config))

    def predict(self, context: Any, model_input: list[bytes], params: dict[str, Any] | None = None) -> list[bytes]:
        """Return each image upscaled, in its own format, or in the one that is asked for.

        params: any of the fields of PictureRequest. Raises Rejected, with the reason, for settings that are wrong and
        for what is not an image: then none is answered. Any number of threads may call it.
        """
        try:
            chosen = {name: _plain(value) for name, value in (params or {}).items() if value is not None}
            asked = from_mapping(PictureRequest, vars(self.usual) | chosen)
            upscaler = self.upscaler_of(asked.recipe(self.config))
        except ValueError as error:
            raise Rejected(f"params: {error}", BAD_REQUEST) from None
        settings = StillSettings(
            format=asked.format,
            quality=asked.quality,
            max_megapixels=self.max_megapixels,
            max_raster_megapixels=self.max_megapixels,
        )
        made = []
        for number, data in enumerate(model_input, 1):
            try:
                made.append(upscale_picture(upscaler, data, settings=settings, model=self.digest).data)
            except Refused as refused:
                ours = refused.reason in ("oom", "nan", "time_limit")
                text = f"image {number} of {len(model_input)}: {refused}"
                raise Rejected(text, INTERNAL_ERROR if ours else BAD_REQUEST) from None
        return made


def _plain(value: Any) -> Any:
    """Return a setting as Python's own number: MLflow's schema makes some of numpy."""
    return value.item() if hasattr(value, "item") else value


mlflow.models.set_model(ServedUpscaler())

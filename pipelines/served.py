"""The pyfunc face of a model in MLflow, as models-from-code: image bytes in, image bytes out. No object is pickled."""

from pathlib import Path
from typing import Any

import mlflow
from mlflow.pyfunc.model import PythonModel

from diffsr_core.checkpoint import load_model
from diffsr_core.sampling import SamplingRecipe
from diffsr_core.upscaler import Upscaler
from pipelines.pictures import upscale_picture
from pipelines.stills import StillSettings


class ServedUpscaler(PythonModel):
    """Upscales encoded images with the folder that was logged beside it."""

    def load_context(self, context: Any) -> None:
        """Load the model folder; refuses a damaged one."""
        model, document = load_model(Path(context.artifacts["model"]))
        self.digest = str(document["digest"])
        # One image at a time: the nightly job's batch of large windows would compute mostly padding.
        self.upscaler = Upscaler(model, SamplingRecipe(tile=32, micro_batch=1), regression=False)

    def predict(self, context: Any, model_input: list[bytes], params: dict[str, Any] | None = None) -> list[bytes]:
        """Return each image upscaled, in its own format. Raises Refused (with a reason) for what is not an image."""
        made = (
            upscale_picture(self.upscaler, data, settings=StillSettings(), model=self.digest) for data in model_input
        )
        return [picture.data for picture in made]


mlflow.models.set_model(ServedUpscaler())

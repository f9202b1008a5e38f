"""The MLflow model: a checkpoint that answers requests with text.

MLflow copies this file into the model and runs it when the model is loaded ("models from code"), so it
is never pickled. ``raytrain.tracking.log_model`` makes such a model.
"""

from __future__ import annotations

from typing import Any

import pandas as pd  # type: ignore[import-untyped]
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext


class TextGenerator(PythonModel):
    """Draws texts; what to draw is said by the parameters alone, the input (of any form) is not read."""

    def load_context(self, context: PythonModelContext) -> None:
        """Build the model from the checkpoint that lies in the artifact."""
        from raytrain import models

        self._model = models.load(context.artifacts["checkpoint"])

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[str]:
        """``num_samples`` texts; the signature gives the defaults of the parameters."""
        from raytrain import models

        chosen: dict[str, Any] = params or {}
        return models.sample_text(
            self._model,
            chosen["num_samples"],
            temperature=chosen["temperature"],
            max_length=chosen["max_length"],
            seed=chosen["seed"],
        )


set_model(TextGenerator())

"""The MLflow model: a checkpoint that answers requests with text.

MLflow copies this file into the model and runs it when the model is loaded ("models from code"), so it is never
pickled. ``raytrain.tracking.log_model`` creates such a model.
"""

from __future__ import annotations

import json
import math
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

TASKS = ("sample", "reconstruct", "score")
MOST_TEXTS = 10_000
"""Most texts that one request may ask for or contain: some seconds of work, and megabytes of memory."""


class TextGenerator(PythonModel):
    """MLflow model that samples, reconstructs or scores, by the parameter ``task``; it returns a list of strings.

    A request may ask for, or contain, at most ``MOST_TEXTS`` texts.

    - ``sample``: ``num_texts`` new texts; the input is ignored, so a single empty string will do.
    - ``reconstruct``: for each input text, the text that a VAE decodes from its code (``temperature`` 0 is greedy).
    - ``score``: for each input text, a JSON object with ``reconstruction`` and ``kl`` in nats, whose sum
      is the bound on -log p(text) that evaluation reports (exact for a byte LSTM, where ``kl`` is 0),
      and ``bits_per_byte``. ``seed`` seeds the noise of z.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Build the model from the checkpoint in the artifact."""
        from raytrain.runs.checkpoint import load
        from raytrain.runs.trained_model import TrainedModel

        self._model = TrainedModel(load(context.artifacts["checkpoint"]))

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[str]:
        """Return the answer; the signature gives the defaults of the parameters.

        Raises:
            MlflowException: the model refuses a parameter or a text (status 400 when served).
        """
        from raytrain.utils.errors import UserError

        try:
            if len(model_input) > MOST_TEXTS:
                raise UserError(f"{len(model_input):,} texts: a request takes at most {MOST_TEXTS:,}")
            texts = model_input.iloc[:, 0].tolist()
            for row, text in enumerate(texts):
                if not isinstance(text, str):
                    raise UserError(f"row {row} is {text!r}: must be a text")
            return self._answer([text.encode() for text in texts], params or {})
        except UserError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None

    def _answer(self, texts: list[bytes], params: dict[str, Any]) -> list[str]:
        from raytrain.utils.errors import UserError

        how = {name: params[name] for name in ("temperature", "top_p", "max_length", "seed")}
        match params["task"]:
            case "sample":
                if not 0 < params["num_texts"] <= MOST_TEXTS:
                    raise UserError(f"num_texts is {params['num_texts']}: must be between 1 and {MOST_TEXTS:,}")
                return [str(item) for item in self._model.sample(params["num_texts"], **how)]
            case "reconstruct":
                return [str(item) for item in self._model.reconstruct(texts, **how)]
            case "score":
                return [_as_json(item) for item in self._model.score(texts, seed=params["seed"])]
            case task:
                raise UserError(f"task is {task!r}: must be one of {', '.join(TASKS)}")


def _as_json(score: Any) -> str:
    values = {"reconstruction": score.reconstruction, "kl": score.kl}
    return json.dumps(values | ({"bits_per_byte": score.bits_per_byte} if math.isfinite(score.bits_per_byte) else {}))


set_model(TextGenerator())

"""Train small text generators, distributed, and find their best settings.

The public Python API; each name is imported when it is first used, so that ``import raytrain`` takes no time:

    import raytrain

    run = raytrain.train("hybrid", name="first", steps=500)
    search = raytrain.tune("hybrid", num_samples=4)
    model = raytrain.load_model("models:/raytrain-hybrid@champion")
    for sample in model.sample(5):
        print(sample)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from raytrain.cluster.environment import set_up_imports

if TYPE_CHECKING:
    from raytrain.api import SearchResult, train, tune
    from raytrain.config.schema import RunConfig
    from raytrain.runs.references import load_model
    from raytrain.runs.trained_model import TextScore, TrainedModel
    from raytrain.training.launch import TrainedRun
    from raytrain.utils.errors import UserError

__version__ = "0.1.0"
__all__ = [
    "RunConfig",
    "SearchResult",
    "TextScore",
    "TrainedModel",
    "TrainedRun",
    "UserError",
    "load_model",
    "train",
    "tune",
]

_HOMES = {
    "RunConfig": "raytrain.config.schema",
    "SearchResult": "raytrain.api",
    "TextScore": "raytrain.runs.trained_model",
    "TrainedModel": "raytrain.runs.trained_model",
    "TrainedRun": "raytrain.training.launch",
    "UserError": "raytrain.utils.errors",
    "load_model": "raytrain.runs.references",
    "train": "raytrain.api",
    "tune": "raytrain.api",
}

set_up_imports()


def __getattr__(name: str) -> Any:
    """Import a name of the public API when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

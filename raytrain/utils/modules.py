"""Modules that are commands and, under the same name, functions of the public API."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """A module that stands in for a function of ``raytrain.api``."""

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        """Call the API function with the name of this module."""
        function = getattr(import_module("raytrain.api"), self.__name__.rpartition(".")[2])
        return function(*arguments, **settings)


def make_callable(module: str) -> None:
    """Make a loaded module callable, as the function of ``raytrain.api`` with its name.

    ``raytrain.train`` is that function until somebody imports the command ``raytrain.train``. Python then replaces it
    by the module.
    """
    sys.modules[module].__class__ = _Callable

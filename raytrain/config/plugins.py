"""Plugins: modules outside the package that register models, schedules, samplers, schedulers and metrics.

The environment variable ``RAYTRAIN_PLUGINS`` names them, separated by commas: importable modules, or paths of ``.py``
files. A plugin fills the registries when it is imported::

    MODELS["toy"] = ModelSpec(config=ToyConfig, implementation="toy:Toy", ...)

Child processes and Ray workers inherit the variable, so they know what the driver knows. Nothing that is stored names
a plugin: reading a checkpoint or a config never runs code that the environment did not ask for.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_file_location
from pathlib import Path
from threading import RLock
from types import ModuleType

from raytrain.utils.errors import UserError

VARIABLE = "RAYTRAIN_PLUGINS"
_lock = RLock()
_loaded = ""
"""Value of the variable whose plugins have been loaded."""
_loading = False


class PluginFinder(MetaPathFinder):
    """Finds plugin files by their stem, so that ``toy:Toy`` and pickled objects of ``toy`` resolve.

    It comes after all other finders: a file never hides an installed module.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of the plugin file with the stem ``fullname``, if there is one."""
        for entry in plugins():
            if _is_file(entry) and Path(entry).stem == fullname and os.path.isfile(entry):
                return spec_from_file_location(fullname, entry)
        return None


def plugins() -> list[str]:
    """Return the plugins that the environment names: module names and absolute paths of files.

    Relative paths in the environment are replaced: a worker may run in another folder.
    """
    value = os.environ.get(VARIABLE, "")
    entries = [entry.strip() for entry in value.split(",") if entry.strip()]
    entries = [os.path.abspath(os.path.expanduser(entry)) if _is_file(entry) else entry for entry in entries]
    if value and (absolute := ",".join(entries)) != value:
        os.environ[VARIABLE] = absolute
    return entries


def install_finder() -> None:
    """Make plugin files importable in this process, without importing them."""
    plugins()
    if not any(isinstance(finder, PluginFinder) for finder in sys.meta_path):
        sys.meta_path.append(PluginFinder())


def plugin_environment() -> dict[str, str]:
    """Return the variable for processes on other nodes, where the same files and modules must exist."""
    plugins()
    return {VARIABLE: os.environ[VARIABLE]} if os.environ.get(VARIABLE) else {}


def load_plugins() -> None:
    """Import the plugins that have not been imported in this process yet.

    Every look-up in a registry calls this first. The import waits until then because a plugin imports the registries.

    Raises:
        UserError: a plugin cannot be imported, or raises.
    """
    global _loaded, _loading
    if os.environ.get(VARIABLE, "") == _loaded:
        return
    with _lock:
        entries = plugins()
        if _loading or os.environ.get(VARIABLE, "") == _loaded:
            return  # a plugin looks something up during its own import, or another thread has imported them all
        _loading = True
        try:
            for entry in entries:
                _load(entry)
            _loaded = os.environ.get(VARIABLE, "")
        finally:
            _loading = False


def _is_file(entry: str) -> bool:
    return entry.endswith(".py") or os.sep in entry


def _load(entry: str) -> None:
    """Import one plugin.

    Raises:
        UserError: see ``load_plugins``.
    """
    name = _check_file(entry) if _is_file(entry) else entry
    try:
        importlib.import_module(name)
    except (Exception, SystemExit) as error:  # anything that a user's module raises is the user's mistake
        raise UserError(f"{VARIABLE}: cannot load the plugin {entry}: {type(error).__name__}: {error}") from None


def _check_file(entry: str) -> str:
    """Return the module name of a plugin file.

    Raises:
        UserError: there is no such file, or its name cannot be that of a module.
    """
    if not os.path.isfile(entry):
        raise UserError(f"{VARIABLE}: there is no file {entry}")
    name = Path(entry).stem
    if not (entry.endswith(".py") and name.isidentifier()):
        raise UserError(f"{VARIABLE}: {entry} must be called like a Python module, letters, digits and _ before .py")
    loaded = sys.modules.get(name)
    found = getattr(find_spec(name), "origin", None) if loaded is None else getattr(loaded, "__file__", None)
    if not found or os.path.realpath(found) != os.path.realpath(entry):
        raise UserError(f"{VARIABLE}: {entry} is called like the module {name!r} of {found}: rename the file")
    return name

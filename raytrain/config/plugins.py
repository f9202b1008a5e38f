"""Modules of the user's own that register models, schedules, samplers, schedulers and metrics."""

from __future__ import annotations


def load_plugins() -> None:
    """Import the modules that ``RAYTRAIN_PLUGINS`` names."""

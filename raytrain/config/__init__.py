"""Configuration: run configs, models, schedules, presets, plugins and command lines."""

from raytrain.config.plugins import install_finder

install_finder()

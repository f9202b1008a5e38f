"""Train small text generators, distributed, and find their best settings."""

__version__ = "0.1.0"

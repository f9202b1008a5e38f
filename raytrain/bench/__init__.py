"""Benchmarks of a model's training on this machine, compared with the machine's peak rates."""

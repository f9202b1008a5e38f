"""Machines of a cluster: resources, draining nodes, spot notices, Ray's environment and internals; ``check``."""

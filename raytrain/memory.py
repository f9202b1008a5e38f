"""Memory that ended runs leave in a process that goes on with others."""

from __future__ import annotations

import ctypes

from raytrain.models import scratch


def give_back() -> None:
    """Give the system what nothing in this process uses.

    glibc keeps what was freed for later use, apart in each of its arenas, eight for every core, and each run's threads
    are given other arenas than those of the run before: in time the process would hold what a run needs many times.
    """
    scratch.clear()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
    if trim is not None:
        trim(0)

"""``raytrain.tune`` that is killed at a moment that it is told: when a function is called for the nth time.

python -m tests.support.killed raytrain.tracking.runs:Run.log_parameters:4 hybrid --space space.py
"""

from __future__ import annotations

import functools
import importlib
import os
import signal
import sys
from typing import Any


def kill_at(moment: str) -> None:
    """Make the call that ``moment`` names the last thing that this process does."""
    module, path, count = moment.split(":")
    owner: Any = importlib.import_module(module)
    *names, last = path.split(".")
    for name in names:
        owner = getattr(owner, name)
    function, calls = getattr(owner, last), [0]

    @functools.wraps(function)
    def counted(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == int(count):
            print(f"killed at {moment}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)

    setattr(owner, last, counted)


if __name__ == "__main__":
    from raytrain.tune import main
    from raytrain.utils.errors import run_command

    kill_at(sys.argv.pop(1))
    run_command(main)

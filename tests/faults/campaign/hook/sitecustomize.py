"""First on the path of every process of a campaign: writes down each step of training, and slows it down.

``RAYTRAIN_STEPS`` is the folder of the step logs; its file ``pace`` says how many seconds a step lasts at least.
Nothing else of the product is touched.
"""

import functools
import importlib.util
import os
import struct
import sys
import time
from importlib.abc import MetaPathFinder
from pathlib import Path


class Watcher(MetaPathFinder):
    """Wraps the trainer's step when the module is imported."""

    def find_spec(self, name, path, target=None):
        if name != "raytrain.training.loop":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_watch(module):
            execute(module)
            watch(module.Trainer)

        spec.loader.exec_module = execute_and_watch
        return spec


def watch(trainer_class):
    """Write a record of rank 0's steps, each as soon as it is done; every trainer has a file of its own."""
    train_step = trainer_class.train_step
    folder = Path(os.environ["RAYTRAIN_STEPS"])
    pace = float((folder / "pace").read_text())

    @functools.wraps(train_step)
    def watched(self, step, *arguments, **named):
        began = time.monotonic()
        result = train_step(self, step, *arguments, **named)
        time.sleep(max(0.0, pace - (time.monotonic() - began)))
        if self.world.rank == 0:
            if not hasattr(self, "steps_file"):
                from raytrain.config.schema import fingerprint

                name = f"{fingerprint(self.config, '')[:16]}-{os.uname().nodename}-{os.getpid()}-{time.time_ns()}.steps"
                self.steps_file = (folder / name).open("ab", buffering=0)
            self.steps_file.write(struct.pack("<dq", time.time(), step + 1))
        return result

    trainer_class.train_step = watched


if "RAYTRAIN_STEPS" in os.environ:
    sys.meta_path.insert(0, Watcher())

"""Measurement of all parts of a benchmark, in turns, and the combined result."""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch

from raytrain.bench.checkpointing import Sampling, Saving
from raytrain.bench.machine import Machine, NoiseWatch, describe, pinned
from raytrain.bench.options import BenchOptions
from raytrain.bench.peak import Ceiling, ceilings
from raytrain.bench.rounds import Contender, Measured, take_turns
from raytrain.bench.scaling import Scaling, measure_memory
from raytrain.bench.steps import Data, Evaluation, Steps
from raytrain.config.schema import override, to_dict
from raytrain.data.corpus import Corpus
from raytrain.data.prepare import prepare
from raytrain.search.estimate import run_seconds
from raytrain.storage import open_storage_root
from raytrain.training.checks import check_samples

NEEDED = ("ray", "mlflow")


class Part(Protocol):
    """Something that takes part in the rounds."""

    def contenders(self) -> list[Contender]:
        """Return the contenders, which take turns with all others."""

    def result(self, measured: Measured) -> dict[str, Any]:
        """Return sections of the result, from the measurements of all contenders."""


def missing() -> str | None:
    """Return as text why Ray Train cannot be measured here; ``None`` if it can."""
    lacking = [name for name in NEEDED if find_spec(name) is None]
    return f"{' and '.join(lacking)} not installed" if lacking else None


def measure_all(options: BenchOptions, show: Callable[[str], None]) -> dict[str, Any]:
    """Prepare the corpus, check it, and measure on the pinned cores of this machine; return the result as JSON.

    Raises:
        UserError: the corpus is not available, or is too short for the config.
    """
    config = options.config
    corpus = prepare(config.data, path=config.data_path, field=config.data_field)
    check_samples(config, corpus, max(options.workers))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = Machine(threads=options.threads, cores=options.cores, device=device)
    with pinned(machine.threads, machine.cores):
        return measure(options, corpus, machine, show)


def measure(options: BenchOptions, corpus: Corpus, machine: Machine, show: Callable[[str], None]) -> dict[str, Any]:
    """Measure all chosen sections and return them as JSON; ``show`` is called with the progress as text."""
    watch = NoiseWatch()
    result: dict[str, Any] = {
        "model": options.config.model_name,
        "config": to_dict(options.config),
        "command": " ".join(sys.argv[1:]),
        "machine": describe(machine.device, machine.threads),
        "rounds": options.rounds,
        "seconds": options.seconds,
    }
    with ExitStack() as stack:
        parts: list[Part] = [
            *in_this_process(options, corpus, machine.device, stack),
            *in_others(options, corpus, machine, stack, show),
        ]
        contenders = [contender for part in parts for contender in part.contenders()]
        measured = take_turns(contenders, options.rounds, show)
        for part in parts:
            result |= part.result(measured)
    result["noise"] = watch.report(ceilings(measured))
    if "ray" in options.sections and (reason := missing()) is not None:
        result["ray"] = {"skipped": reason}
    if "memory" in options.sections:
        show("memory")
        configs = [
            override(options.config, {"batch_size": size, "precision": name})
            for size in options.batch_sizes
            for name in options.precisions
        ]
        result["memory"] = measure_memory(configs, corpus, machine)
    if "step" in options.sections:
        result["run"] = estimate_run(options, result)
    return result


def in_this_process(options: BenchOptions, corpus: Corpus, device: torch.device, stack: ExitStack) -> list[Part]:
    """Return the parts that need no other process; ``stack`` removes their leftovers."""
    config, chosen, seconds = options.config, set(options.sections), options.seconds
    parts: list[Part] = []
    if "ceiling" in chosen:
        parts.append(Ceiling(config, options.precisions, device, seconds, options.quick))
    if chosen & {"step", "plain"}:
        precisions = options.precisions if "step" in chosen else []
        parts.append(Steps(config, corpus, device, options.batch_sizes, precisions, seconds, "plain" in chosen))
    if "step" in chosen:
        parts.append(Evaluation(config, corpus, device))
    if "data" in chosen:
        parts.append(Data(config, corpus, seconds))
    if "checkpoint" in chosen:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="raytrain-bench-")))
        root = open_storage_root(options.storage or str(folder))
        stack.callback(root.delete_prefix, folder.name)
        saving = Saving(config, corpus, device, root.child(folder.name), seconds)
        stack.callback(saving.writer.close)
        parts.append(saving)
    if "sampling" in chosen:
        parts.append(Sampling(config, device, options.samples, seconds))
    return parts


def in_others(
    options: BenchOptions, corpus: Corpus, machine: Machine, stack: ExitStack, show: Callable[[str], None]
) -> list[Part]:
    """Return the parts that have workers in other processes, which ``stack`` ends."""
    config, seconds = options.config, options.seconds
    parts: list[Part] = []
    if "ddp" in options.sections:
        show("starting workers")
        parts.append(Scaling(config, corpus, options.workers, machine, seconds, stack))
    if "ray" in options.sections and missing() is None:
        from raytrain.bench.ray_train import OnRay  # needs Ray and MLflow

        show("starting Ray")
        parts.append(OnRay(config, corpus, max(options.workers), machine, seconds, stack))
    return parts


def estimate_run(options: BenchOptions, result: dict[str, Any]) -> dict[str, Any]:
    """Estimate the time of a whole run of the config on this machine."""
    config = options.config
    (step,) = (
        row["step_seconds"]["median"]
        for row in result["step"]
        if (row["batch_size"], row["precision"]) == (config.batch_size, config.precision)
    )
    evaluation = result["evaluation"]
    training, evaluating = run_seconds(config, step, evaluation["samples"], evaluation["seconds_per_sample"]["median"])
    seconds = training + evaluating
    return {
        "steps": config.steps,
        "batch_size": config.batch_size,
        "precision": config.precision,
        "training_seconds": training,
        "evaluations": math.ceil(config.steps / config.evaluate_every),
        "evaluation_seconds": evaluating,
        "seconds": seconds,
        "hours": seconds / 3600,
    }

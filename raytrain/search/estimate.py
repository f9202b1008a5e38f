"""Estimate of a search's hours and cost, from benchmarks that ``python -m raytrain.bench`` has written."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raytrain.config.cli import Choice, default_config
from raytrain.config.presets import PRESET_NAMES
from raytrain.config.schema import RunConfig, differences, flatten, from_dict, to_dict
from raytrain.config.workers import WorkerSpec
from raytrain.data.batches import EvaluationBatches
from raytrain.data.corpus import Corpus
from raytrain.data.pools import part_of
from raytrain.models import model_size
from raytrain.search.plan import Plan
from raytrain.storage import open_file
from raytrain.storage.base import StorageError
from raytrain.utils.errors import UserError
from raytrain.utils.validation import parse_json

TIMED = ("model", "data", "vocabulary", "sampling", "length", "group_size")
"""Fields that determine how long a step takes, besides the batch size and the precision."""

PROCESS_BYTES, PARAMETER_BYTES, ACTIVATION_BYTES = 480e6, 40.0, 8.0
"""Memory of a worker on CPUs. Its process, including what it imports and compiles. Per parameter: the weight, its
gradient, moments and average, and copies that wait to be saved. Per position of a batch and row of a weight matrix:
the activations. docs/performance.md compares the estimate with measured peaks."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Measured times of one config on one machine."""

    reference: str
    config: RunConfig[Any]
    machine: str
    """Name of the machine's GPU or CPU."""
    on_gpu: bool
    threads: int
    step_seconds: dict[tuple[int, str], float]
    """(batch size, precision) -> seconds per step of one worker."""
    sample_seconds: float
    """Seconds per validation sample."""
    speedup: dict[tuple[int, int], float]
    """(batch size, DDP workers) -> their speed relative to one worker."""

    def key(self, config: RunConfig[Any]) -> tuple[int, str]:
        """Return the key of a step of ``config``; ``auto`` means the precision that the benchmark's machine chose."""
        return config.batch_size, self.config.precision if config.precision == "auto" else config.precision

    def lacks(self, config: RunConfig[Any], worker_spec: WorkerSpec) -> list[str]:
        """Return why this benchmark does not apply to a run of ``config`` by ``worker_spec``; empty if it does."""
        there, here = ({name: to_dict(each)[name] for name in TIMED} for each in (self.config, config))
        lacking = differences(there, here)
        batch_size, precision = self.key(config)
        if (batch_size, precision) not in self.step_seconds:
            lacking.append(f"it has no step of {batch_size} samples in {precision}")
        if self.on_gpu != worker_spec.on_gpus:
            lacking.append(f"it was measured on a {'GPU' if self.on_gpu else 'CPU'}")
        elif not worker_spec.on_gpus and max(1, self.threads // worker_spec.workers) != max(1, int(worker_spec.cpus)):
            lacking.append(f"its {self.threads} threads are not those of {worker_spec}")
        if worker_spec.workers > 1 and (batch_size, worker_spec.workers) not in self.speedup:
            lacking.append(f"it has no DDP of {worker_spec.workers} workers")
        return lacking

    def seconds(self, config: RunConfig[Any], worker_spec: WorkerSpec, num_samples: int, draws: int) -> float:
        """Return the seconds of a whole run, for a config to which the benchmark applies.

        Args:
            num_samples: validation samples per evaluation.
            draws: draws of z with which each evaluation estimates the likelihood. Each costs about as much as another
                evaluation.
        """
        training, evaluating = run_seconds(
            config, self.step_seconds[self.key(config)], num_samples * (1 + draws), self.sample_seconds
        )
        return (training + evaluating) / self.speedup.get((config.batch_size, worker_spec.workers), 1.0)


def worker_bytes(config: RunConfig[Any], workers: int) -> int:
    """Return an estimate of the memory, in bytes, that one of ``workers`` needs to train ``config`` on CPUs."""
    size = model_size(config)
    positions = math.ceil(config.batch_size / workers) * config.length
    return int(PROCESS_BYTES + PARAMETER_BYTES * size.parameters + ACTIVATION_BYTES * positions * size.rows)


def run_seconds(
    config: RunConfig[Any], step_seconds: float, num_samples: int, sample_seconds: float
) -> tuple[float, float]:
    """Return the seconds of training and of evaluation in a whole run of one worker.

    Args:
        num_samples: validation samples per evaluation.
    """
    evaluations = math.ceil(config.steps / config.evaluate_every)
    return config.steps * step_seconds, evaluations * num_samples * sample_seconds


def read_benchmark(reference: str) -> Benchmark:
    """Read the benchmark at a path or ``s3://`` address.

    Raises:
        UserError: it cannot be read, or is not a benchmark.
    """
    location, name = open_file(reference)
    try:
        values = parse_json(location.read(name))
        machine, ddp = values["machine"], values.get("ddp", {"batch_size": 0, "workers": []})
        return Benchmark(
            reference=reference,
            config=from_dict(values["config"]),
            machine=str(machine.get("gpu", machine["cpu"])),
            on_gpu=machine["device"] == "cuda",
            threads=int(machine["threads"]),
            step_seconds={
                (int(row["batch_size"]), row["precision"]): _median(row["step_seconds"]) for row in values["step"]
            },
            sample_seconds=_median(values["evaluation"]["seconds_per_sample"]),
            speedup={
                (int(ddp["batch_size"]), int(row["workers"])): _median(row["fixed_batch_efficiency"])
                for row in ddp["workers"]
            },
        )
    except StorageError as error:
        raise UserError(f"--bench {reference}: {error}") from None
    except (UserError, ValueError, TypeError, KeyError, AttributeError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"--bench {reference} is not what python -m raytrain.bench MODEL --only step --output writes: {what}"
        ) from None


def _median(series: dict[str, Any]) -> float:
    value = float(series["median"])
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"a median is {value:g}")
    return value


def bench_command(config: RunConfig[Any], worker_spec: WorkerSpec) -> str:
    """Return the command that makes a benchmark applicable to a run of ``config`` by ``worker_spec``."""
    choices = [_options(config, name) for name in PRESET_NAMES]
    options = min((chosen for chosen in choices if chosen is not None), key=len)
    options += ["--batch-size", str(config.batch_size)]
    if config.precision not in ("auto", "tf32"):  # tf32 is set for the whole process, so it cannot be switched
        options += ["--precision", config.precision]
    if not worker_spec.on_gpus:
        options += ["--threads", str(worker_spec.workers * max(1, int(worker_spec.cpus)))]
    options += ["--only", "step", *(["ddp", "--workers", str(worker_spec.workers)] if worker_spec.workers > 1 else [])]
    return shlex.join(["python", "-m", "raytrain.bench", config.model_name, *options, "--output", "bench.json"])


def _options(config: RunConfig[Any], name: Any) -> list[str] | None:
    """Return the options that turn the preset ``name`` into the config, as far as they affect the time of a step.

    The result is ``None`` if the model has no such preset.
    """
    try:
        default = default_config(Choice(config.model_name, name, config.data, None), name)
    except UserError:
        return None
    options = ["--preset", name, "--data", config.data]
    before = flatten(default)
    for field, value in flatten(config).items():
        timed = field.partition(".")[0] in (*TIMED, "data_path", "data_field")
        if timed and field != "data" and value != before[field]:
            values = value if isinstance(value, list) else [value]
            options += [f"--{field.replace('_', '-')}", *map(str, values)]
    return options


def trial_seconds(
    plan: Plan, corpus: Corpus, worker_spec: WorkerSpec, benches: Sequence[str]
) -> tuple[float | None, list[str]]:
    """Return the seconds of a trial that is not stopped early, the longest over all models, and the benchmarks used.

    If no benchmark applies, return ``None``, the reasons, and the commands that make one.

    Args:
        benches: paths and addresses of benchmarks.

    Raises:
        UserError: one of them is not a benchmark.
    """
    benchmarks = [read_benchmark(reference) for reference in benches]
    if worker_spec.on_gpus and worker_spec.gpus < 1:
        return None, ["trials that share a GPU are slower than the one of a benchmark, by a factor that is not known"]
    known: dict[str, float] = {}
    unknown: list[str] = []
    for config in plan.bases.values():
        samples = EvaluationBatches(part_of(corpus, "valid", config), config, config.evaluate_samples).num_samples
        fit = next((each for each in benchmarks if not each.lacks(config, worker_spec)), None)
        if fit is not None:
            source = f"{fit.machine} in {fit.reference}"
            known[source] = max(
                known.get(source, 0.0), fit.seconds(config, worker_spec, samples, plan.search_objective.draws)
            )
        else:
            unknown += [
                f"{each.reference} does not apply: {'; '.join(each.lacks(config, worker_spec))}" for each in benchmarks
            ]
            unknown.append(f"to benchmark, run on a machine of the workers: {bench_command(config, worker_spec)}")
    return (None, unknown) if unknown else (max(known.values()), list(known))


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Upper bounds on the hours and the cost of all trials of a search, as far as known."""

    num_trials: int
    """Trials that have not ended yet, excluding those that confirm."""
    concurrent: int
    """Trials at once."""
    most: int | None = None
    """Limit on concurrent trials, excluding those that confirm: members of a population; ``None`` without a limit."""
    workers: int
    """Workers of each trial."""
    trial_seconds: float | None = None
    """Seconds of a trial that is not stopped early; ``None`` where no benchmark applies."""
    time_budget: float | None = None
    """Seconds."""
    price: float | None = None
    """Price of one worker per hour."""
    num_repeats: int = 0
    """Confirming trials that have not ended yet; they start once all others have ended."""
    repeat_share: float = 1.0
    """Steps of a confirming trial as a share of those of the others."""

    @property
    def hours(self) -> float | None:
        """Hours until the last trial has ended."""
        rounds = math.ceil(
            self.num_trials / min(self.concurrent, self.most or self.concurrent)
        ) + self.repeat_share * math.ceil(self.num_repeats / self.concurrent)
        known = [] if self.trial_seconds is None else [rounds * self.trial_seconds / 3600]
        return min([*known, *([] if self.time_budget is None else [self.time_budget / 3600])], default=None)

    @property
    def worker_hours(self) -> float | None:
        """Hours summed over all workers."""
        if self.hours is None:
            return None
        most = self.concurrent * self.hours
        if self.trial_seconds is not None:
            trials = self.num_trials + self.repeat_share * self.num_repeats
            most = min(most, trials * self.trial_seconds / 3600)
        return self.workers * most

    def lines(self, sources: Sequence[str], asked: bool = True) -> list[str]:
        """Return hours and cost as text.

        Args:
            sources: the second result of ``trial_seconds``.
            asked: whether the user wants to know before the search starts. Otherwise unknown hours are not mentioned:
                the search shows the time left once it has measured its trials.
        """
        if self.trial_seconds is None:
            limit = "" if self.hours is None else f"at most {self.hours:.2f} by --time-budget"
            known = ", ".join(filter(None, ("no estimate without a benchmark" if asked else "", limit)))
            lines = [f"hours: {known}"] * bool(known) + list(sources) * asked
        else:
            lines = [
                f"hours: at most {self.hours:.2f}, {self.trial_seconds / 3600:.2f} per trial of these sizes "
                f"({', '.join(sources)}), plus the start of nodes"
            ]
        return lines if self.price is None else [*lines, self._cost(self.price)]

    def _cost(self, price: float) -> str:
        busy = self.concurrent * self.workers
        hourly = f"cost: {busy * price:,.2f} per hour for {busy} worker{'s' * (busy != 1)} at {price:g}"
        return hourly if self.worker_hours is None else f"{hourly}, at most {self.worker_hours * price:,.2f} in total"

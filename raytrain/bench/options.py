"""Options of ``python -m raytrain.bench``, parsed and checked."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from typing import Any

from raytrain.config.cli import Choice, OneLineParser, default_config, parse_choice, parse_options
from raytrain.config.presets import full_size
from raytrain.config.schema import RunConfig, override
from raytrain.storage import check_output, open_file, open_storage_root
from raytrain.storage.check import check_writable
from raytrain.utils.files import expanded

SECTIONS = ("ceiling", "step", "plain", "ddp", "ray", "checkpoint", "sampling", "data", "memory")
PRECISIONS = ("float32", "bfloat16", "float16")
QUICK = {"rounds": 2, "seconds": 0.05, "samples": 8}
FULL = {"rounds": 5, "seconds": 2.0, "samples": 1024}


@dataclass(frozen=True)
class BenchOptions:
    """A benchmark to be run."""

    config: RunConfig[Any]
    """Config with the first of the measured batch sizes, and one of the measured precisions."""
    batch_sizes: list[int]
    precisions: list[str]
    """Compute types, none of them ``auto``."""
    workers: list[int]
    """Numbers of DDP workers."""
    threads: int
    """Threads of all workers together."""
    cores: list[int]
    """Cores that the processes are pinned to."""
    rounds: int
    seconds: float
    """Seconds of a block."""
    samples: int
    """Texts that are drawn together."""
    sections: list[str]
    quick: bool
    storage: str | None
    output: str | None
    """Path or s3:// address."""
    experiment: str | None


def parse_command(arguments: list[str]) -> BenchOptions:
    """Parse a command line.

    Raises:
        UserError: an unknown model, preset, option or section, or a number out of range.
    """
    choice, rest = parse_choice("raytrain.bench", arguments)
    values, fields = _parser(choice).parse_known_args(rest)

    import torch

    from raytrain.data.batches import rank_groups
    from raytrain.training.precision import resolve_precision

    cuda = torch.cuda.is_available()
    config = default_config(choice, full_size(choice.model) if cuda else "laptop")
    if fields:
        kind: Any = RunConfig[type(config.model)]  # type: ignore[misc]
        config = parse_options(f"raytrain.bench {choice.model}", kind, fields, default=config)
    defaults = QUICK if values.quick else FULL
    numbers = {name: getattr(values, name) or defaults[name] for name in defaults}
    batch_sizes = values.batch_size or [config.batch_size, 4 * config.batch_size]
    # time does not depend on where weights start
    config = override(config, {"batch_size": batch_sizes[0], "encoder_from": None})
    for size in batch_sizes[1:]:
        override(config, {"batch_size": size})  # refuses an impossible one
    device = torch.device("cuda" if cuda else "cpu")
    precisions = [resolve_precision(name, device) for name in values.precision or ("float32", "auto")]
    chosen = resolve_precision(config.precision, device)
    config = override(config, {"precision": chosen if chosen in precisions else precisions[0]})
    available = sorted(os.sched_getaffinity(0))
    threads = values.threads or min(len(available), torch.get_num_threads())
    workers = values.workers or _powers_of_two(torch.cuda.device_count() if cuda else threads, config)
    for size in workers:
        rank_groups(config, 0, size)
    return BenchOptions(
        config=config,
        batch_sizes=list(dict.fromkeys(batch_sizes)),
        precisions=list(dict.fromkeys(precisions)),
        workers=sorted(set(workers)),
        threads=threads,
        cores=available[:threads],
        rounds=int(numbers["rounds"]),
        seconds=numbers["seconds"],
        samples=int(numbers["samples"]),
        sections=[name for name in SECTIONS if name in (values.only or SECTIONS)],
        quick=values.quick,
        storage=_checked(values.storage),
        output=_writable(values.output),
        experiment=values.experiment,
    )


def _parser(choice: Choice) -> OneLineParser:
    parser = OneLineParser(
        prog=f"python -m raytrain.bench {choice.model}",
        description="Measure the cost of training a model on this machine, beside the machine's peak rates.",
        epilog="--preset, --config and every field of the config are options too, as those of python -m raytrain.train "
        f"{choice.model}: --data ptb --length 60 --model.hidden 500.",
        allow_abbrev=False,
    )
    count, length = _number(int, 1), _number(float, 0.001)
    add = parser.add_argument
    add(
        "--batch-size",
        type=count,
        nargs="+",
        metavar="N",
        help="batch sizes; default: the preset's, and 4 x that",
    )
    add(
        "--precision",
        choices=PRECISIONS,
        nargs="+",
        help="compute types; default: float32, and what --precision auto is here",
    )
    add(
        "--workers",
        type=count,
        nargs="+",
        metavar="N",
        help="DDP workers; default: 1, 2, 4 ... up to the threads (GPUs)",
    )
    add("--threads", type=count, metavar="N", help="threads of all workers together; default: the cores")
    add(
        "--rounds",
        type=count,
        metavar="N",
        help=f"rounds that measure everything; default: {FULL['rounds']}",
    )
    add("--seconds", type=length, metavar="S", help=f"seconds of a measurement; default: {FULL['seconds']:g}")
    add("--samples", type=count, metavar="N", help=f"texts that are drawn together; default: {FULL['samples']}")
    add("--only", choices=SECTIONS, nargs="+", help="sections to measure; default: all")
    add("--quick", action="store_true", help="two short rounds, to test that everything works")
    add("--storage", metavar="URI", help="folder or s3:// address where checkpoints are written; default: a new folder")
    add("--output", metavar="FILE", help="JSON file or s3:// address for all results; default: none")
    add("--experiment", metavar="NAME", help="MLflow experiment to log to; default: none")
    return parser


def _number(kind: type[int] | type[float], least: float) -> Any:
    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = kind(-1)
        if not value >= least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least {least:g}")
        return value

    return read


def _powers_of_two(most: int, config: RunConfig[Any]) -> list[int]:
    """Return 1, 2, 4 ... up to ``most`` workers, and up to as many as can share a batch."""
    most = max(1, min(most, config.batch_size // config.group_size))
    return [2**power for power in range(most.bit_length())]


def _checked(storage: str | None) -> str | None:
    """Return ``storage`` after a test that it can be written."""
    if storage is not None:
        check_writable(open_storage_root(storage))
    return storage


def _writable(output: str | None) -> str | None:
    """Return ``output`` after a test that it can be written, before anything is measured."""
    if output is not None:
        location, _ = open_file(output)
        if location.folder is None:
            check_writable(location)
        else:
            check_output(expanded(output))
    return output

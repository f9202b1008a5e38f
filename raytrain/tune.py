"""Search a model's best settings: Ray Tune over gangs of Ray Train workers, tracked in MLflow.

    python -m raytrain.tune hybrid
    python -m raytrain.tune lstm_vae --data tweets --data-path tweets.txt.gz --num-samples 12
    python -m raytrain.tune hybrid --space my_space.py --workers-per-trial 2

Without a GPU the defaults are a search of a few minutes on a laptop; on a cluster with GPUs they are the
sizes of the literature. The choice is printed.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytrain.cli import Choice, default_config, parse_choice, parse_fields
from raytrain.config import RunConfig, flatten, to_dict
from raytrain.errors import UserError, run_command
from raytrain.presets import full_size
from raytrain.resources import Cluster, Gang, connect, read_cluster
from raytrain.session import Session, check_name, check_samples, open_session
from raytrain.space import Space, check_space, find_space, load_space

if TYPE_CHECKING:
    from raytrain.search import Search, Trial


@dataclass
class TuneOptions:
    """Options of the command; all else is a field of every trial's config that the space does not set."""

    num_samples: int = 8
    """Trials."""
    space: Path | None = None
    """Python file of the search space; by default search_spaces/MODEL.py."""
    time_budget: float | None = None
    """Seconds after which running trials are stopped."""
    max_concurrent: int | None = None
    """Most trials at once; by default as many as fit."""
    workers_per_trial: int = 1
    """DDP workers of each trial."""
    cpus_per_worker: float = 1.0
    """CPUs of each worker."""
    gpus_per_worker: float | None = None
    """GPUs of each worker; default 1 if the cluster has any, otherwise 0. Fractions only with one worker."""
    name: str | None = None
    """Name of the search; by default the model and the time."""
    storage: str | None = None
    """Folder or s3://bucket/prefix for all that is kept; default $RAYTRAIN_STORAGE or ./runs."""
    address: str | None = None
    """Ray cluster to use; by default the one that is found, or a new one on this machine."""
    experiment: str = "raytrain"
    """MLflow experiment."""


def main() -> None:
    """Check everything, then search, then report."""
    choice, rest = parse_choice("raytrain.tune", sys.argv[1:])
    options, config = parse_fields("raytrain.tune", TuneOptions, default_config(choice, "laptop"), rest)
    file = options.space or find_space(choice.model)
    space = load_space(file)
    check_options(options)
    points = check_space(space, config, file, config.seed)
    session = open_session(config, options.storage)
    check_all(points, session, options.workers_per_trial)

    connect(options.address)
    cluster = read_cluster()
    if cluster.has_gpus:
        options, config = parse_fields(
            "raytrain.tune", TuneOptions, default_config(choice, full_size(choice.model)), rest
        )
        check_all(check_space(space, config, file, config.seed), session, options.workers_per_trial)
    search_and_report(options, choice, config, space, session, cluster)


def check_options(options: TuneOptions) -> None:
    """Refuse what no search can be made of."""
    if options.name is not None:
        check_name(options.name)
    if options.num_samples < 1:
        raise UserError(f"--num-samples is {options.num_samples}: a search needs at least one trial")
    if options.max_concurrent is not None and options.max_concurrent < 1:
        raise UserError(f"--max-concurrent is {options.max_concurrent}: at least one trial must run")
    if options.time_budget is not None and not options.time_budget > 0:
        raise UserError(f"--time-budget is {options.time_budget:g}: give a number of seconds above 0")


def check_all(points: list[RunConfig[Any]], session: Session, workers: int) -> None:
    """Make sure that the trials that the space may draw have samples."""
    shapes = {(point.sampling, point.length, point.batch_size, point.group_size): point for point in points}
    for point in shapes.values():
        check_samples(point, session.corpus, workers)


def search_and_report(
    options: TuneOptions, choice: Choice, config: RunConfig[Any], space: Space, session: Session, cluster: Cluster
) -> None:
    """Run the search on the cluster and print what it found."""
    from raytrain.search import Search, run_search
    from raytrain.tables import LiveTable
    from raytrain.tracking import Experiment, check_tracking

    check_tracking(session.tracking_uri, cluster.num_nodes)
    gang = make_gang(options, cluster)
    concurrent = min(options.num_samples, cluster.admit(gang, options.max_concurrent, head_memory()))
    name = options.name or f"{config.model_name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if session.storage.list(name):
        raise UserError(
            f"--name {name}: there is something at {session.storage.uri(name)} already; choose another name"
        )
    describe(options, choice, config, session, gang, concurrent, cluster)
    experiment = Experiment.open(session.tracking_uri, options.experiment, session.artifact_root())
    parent = experiment.open_run(
        f"search-{name}",
        name,
        config=to_dict(config),
        parameters=flatten(config) | {"search.num_samples": options.num_samples, "search.gang": str(gang)},
        tags={"corpus": session.corpus.digest, "seed": str(config.seed), "kind": "search"},
    )
    session.log_corpus(parent)
    parent.log_file((options.space or find_space(choice.model)).resolve(), "space")
    search = Search(
        name,
        config,
        space,
        session,
        experiment,
        parent,
        gang,
        options.num_samples,
        concurrent,
        options.time_budget,
        config.seed,
    )
    started = time.monotonic()
    try:
        with LiveTable(options.num_samples) as table:
            trials = run_search(search, table.show)
    except BaseException as error:
        parent.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED", repr(error))
        raise
    report(search, trials, time.monotonic() - started)


def make_gang(options: TuneOptions, cluster: Cluster) -> Gang:
    """The workers of a trial: on GPUs if the cluster has or may get any, wherever this command runs."""
    gpus = options.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if cluster.has_gpus else 0.0
    return Gang(options.workers_per_trial, options.cpus_per_worker, gpus)


def head_memory() -> float:
    """Bytes of memory that are free where the trials' small processes will run: on this machine."""
    import psutil

    return float(psutil.virtual_memory().available)


def describe(
    options: TuneOptions,
    choice: Choice,
    config: RunConfig[Any],
    session: Session,
    gang: Gang,
    concurrent: int,
    cluster: Cluster,
) -> None:
    """Say what is about to be done, and why at this size."""
    from raytrain.models import build_empty

    parameters = sum(parameter.numel() for parameter in build_empty(config).parameters())
    device = "GPUs" if gang.gpus else "CPUs"
    if choice.file is not None:
        size = f"config {choice.file}"
    elif choice.preset is not None:
        size = f"preset {choice.preset}"
    elif cluster.has_gpus:
        size = f"preset {full_size(choice.model)} (the cluster has GPUs)"
    else:
        size = "preset laptop (no GPU)"
    corpus = session.corpus
    print(
        f"{config.model_name}, {size}: {parameters:,} parameters, {config.steps} steps of {config.batch_size} "
        f"{config.sampling} of {config.length}\n"
        f"corpus {corpus.name}: {corpus.split('train').num_bytes:,} bytes, digest {corpus.digest[:12]}\n"
        f"{options.num_samples} trials, {concurrent} at a time, each {gang} on {device}",
        flush=True,
    )


def report(search: Search, trials: list[Trial], seconds: float) -> None:
    """Print the best trial, log its checkpoint to the parent run as the search's model, and say where all is.

    Raises:
        UserError: no trial left a checkpoint.
    """
    from raytrain import checkpoint
    from raytrain.models import from_checkpoint, sample_text
    from raytrain.progress import duration
    from raytrain.storage import open_storage
    from raytrain.tables import summary
    from raytrain.tracking import log_model
    from raytrain.workers import read_outcome

    print(summary(trials))
    ranked = sorted((trial for trial in trials if trial.figures), key=lambda trial: trial.figures["bound"])
    for best in ranked:
        stored = checkpoint.best(open_storage(best.place).child("checkpoints"))
        if stored is not None:
            break
    else:
        reasons = {trial.status for trial in trials}
        search.parent.finish("FAILED", "no trial left a checkpoint")
        raise UserError(f"no trial left a checkpoint ({', '.join(sorted(reasons))}); see {search.experiment.ui_hint()}")

    figures = best.figures
    samples = sample_text(from_checkpoint(stored), 10, seed=search.seed)
    print(f"best trial {best.name} of {len(trials)} in {duration(seconds)}:")
    for name, value in best.fields.items():
        print(f"  {name} = {value}")
    print(
        f"bound {figures['bits_per_byte']:.3f} bits/byte ({figures['bound']:.1f} nats a sample), "
        f"KL {figures['kl']:.2f} nats, {figures['active_units']:.0f} active units"
    )
    # one that was stopped has no outcome, and one that failed later has only its error
    if (outcome := read_outcome(best.place)) is not None and "error" not in outcome:
        print(f"computed in {outcome['precision']} on {outcome['device']}")
    print("samples:")
    print("\n".join(f"  {sample!r}" for sample in samples))
    with tempfile.TemporaryDirectory() as scratch:
        folder = checkpoint.export(stored, Path(scratch))
        log_model(search.parent, folder, card=card(search, best, samples), figures=_finite(figures), step=stored.step)
    search.parent.log_text("\n".join(samples) + "\n", "samples.txt")
    search.parent.log_dict(to_dict(best.config), "best_config.json")
    search.parent.finish("FINISHED")
    print(f"checkpoint: {stored.uri}")
    print(f"see it: {search.experiment.ui_hint()}")


def card(search: Search, best: Trial, samples: list[str]) -> str:
    """The model card of the search's best model, in Markdown."""
    figures, config = best.figures, best.config
    lines = [
        f"# {config.model_name} on {search.session.corpus.name}",
        "",
        f"The best of the search `{search.name}`: bound {figures['bits_per_byte']:.3f} bits per byte on the "
        f"validation split, KL {figures['kl']:.2f} nats, {figures['active_units']:.0f} active units.",
        "",
        "## Config",
        "",
        *(f"- {name}: {value}" for name, value in flatten(config).items()),
        "",
        "## Samples",
        "",
        *(f"    {sample!r}" for sample in samples),
        "",
        "## Limits",
        "",
        "The text is drawn from a small model and is often false or meaningless; a model trained on public "
        "tweets may write what is offensive.",
    ]
    return "\n".join(lines) + "\n"


def _finite(figures: dict[str, float]) -> dict[str, float]:
    return {f"best/{name}": value for name, value in figures.items() if math.isfinite(value)}


if __name__ == "__main__":
    run_command(main)

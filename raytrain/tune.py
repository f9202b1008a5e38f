"""Search a model's best settings: Ray Tune over gangs of Ray Train workers, tracked in MLflow.

    python -m raytrain.tune hybrid
    python -m raytrain.tune lstm_vae --data tweets --data-path tweets.txt.gz --num-samples 12
    python -m raytrain.tune hybrid --space my_space.py --workers-per-trial 2
    python -m raytrain.tune --space paper_fig4 --budget small --data ptb
    python -m raytrain.tune hybrid --min-kl 2 --start-from config.json
    python -m raytrain.tune hybrid --dry-run --bench bench.json --price-per-hour 1.2
    python -m raytrain.tune --resume NAME

Without a GPU the defaults are a search of a few minutes on a laptop; on a cluster with GPUs they are the
sizes of the literature. The choice is printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raytrain.cli import OneLineParser, default_config, parse_choice, parse_fields, parse_options
from raytrain.config import ModelName, RunConfig, flatten, override, to_dict
from raytrain.errors import UserError, run_command
from raytrain.forecast import Forecast, read_figures, trial_seconds
from raytrain.goal import Goal, Objective
from raytrain.json_text import typed_fields
from raytrain.plan import PLAN, Plan, read_plan
from raytrain.presets import full_size
from raytrain.resources import Cluster, Device, Gang, connect, read_cluster
from raytrain.session import (
    EXPERIMENT,
    Session,
    at_first,
    check_name,
    check_samples,
    open_session,
    open_storage_root,
    reopen_session,
)
from raytrain.space import Algorithm, Space, check_space, grid, load_space
from raytrain.start import read_starts
from raytrain.trials import Records

if TYPE_CHECKING:
    from raytrain.search import Search

NUM_SAMPLES = 8
"""Trials of a search that does not say how many."""


@dataclass
class TuneOptions:
    """Options of the command; all else is a field of every trial's config that the space does not set."""

    num_samples: int | None = None
    """Trials; default 8, or every point of a grid. A resumed search can be given more."""
    space: str | None = None
    """Search space: a Python file, or a name in search_spaces/; by default that of the model."""
    budget: str | None = None
    """One of the space's budgets, where it has any; default its first."""
    algorithm: Algorithm | None = None
    """How points are chosen; default what the space says, otherwise tpe."""
    objective: Objective = "bound"
    """What is looked for: the lowest bound, the lowest importance-weighted likelihood estimate (nll), or the trials
    that none beats in both bound and KL (pareto: no trial is stopped for others)."""
    min_kl: float = 0.0
    """KL in nats per sample without which a trial is no winner."""
    start_from: tuple[str, ...] = ()
    """Configs that are tried first: config.json files, run folders, MLflow run ids, models:/NAME@ALIAS."""
    time_budget: float | None = None
    """Seconds after which running trials are interrupted; --resume goes on with them."""
    max_concurrent: int | None = None
    """Most trials at once; by default as many as fit."""
    workers_per_trial: int = 1
    """DDP workers of each trial."""
    cpus_per_worker: float = 1.0
    """CPUs of each worker."""
    gpus_per_worker: float | None = None
    """GPUs of each worker; default 1 if the cluster has any, otherwise 0. Fractions only with one worker."""
    device: Device = "auto"
    """What workers compute on: cpu leaves the GPUs that they reserve unused."""
    dry_run: bool = False
    """Check everything, say what the search would be, and stop. Nothing is recorded."""
    bench: tuple[str, ...] = ()
    """What ``python -m raytrain.bench MODEL --output`` has written, by which hours are foretold: files or s3://
    addresses, one for each model."""
    price_per_hour: float | None = None
    """Price of one worker's part of a machine for an hour, in any currency, by which the cost is foretold."""
    name: str | None = None
    """Name of the search; by default the model or space and the time. The same name and config resume it."""
    resume: str | None = None
    """Name of a search to go on with; nothing else is needed but where its storage is."""
    storage: str | None = None
    """Folder or s3://bucket/prefix for all that is kept; default $RAYTRAIN_STORAGE or ./runs."""
    address: str | None = None
    """Ray cluster to use; by default the one that is found, or a new one on this machine."""
    experiment: str = EXPERIMENT
    """MLflow experiment."""


WORKERS = ("time_budget", "max_concurrent", "workers_per_trial", "cpus_per_worker", "gpus_per_worker", "device")
"""The options that say how a trial runs, not what comes of it: a resumption may change them."""


def main() -> None:
    """Check everything, then search, then say what was found."""
    arguments = sys.argv[1:]
    search = resumed_search(arguments) if first_look(arguments).resume is not None else new_search(arguments)
    if search is None:
        return

    from raytrain.results import finish
    from raytrain.search import run_search
    from raytrain.tables import LiveTable

    started = time.monotonic()
    try:
        with LiveTable(search.plan.num_samples) as table:
            trials = run_search(search, table.show)
        finish(search, trials, time.monotonic() - started)
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        search.parent.finish("KILLED" if interrupted else "FAILED", "interrupted" if interrupted else repr(error))
        print(f"go on with it: {search.resume_command}", flush=True)
        raise


def first_look(arguments: list[str]) -> argparse.Namespace:
    """The options that decide how all others are read."""
    parser = OneLineParser(prog="python -m raytrain.tune", add_help=False, allow_abbrev=False)
    for name in ("--resume", "--space", "--budget", "--storage"):
        parser.add_argument(name)
    return parser.parse_known_args(arguments)[0]


# ----------------------------------------------------------------------------------------- a new one


def new_search(arguments: list[str]) -> Search | None:
    """The search that the command line describes, checked and recorded; one that is known already is resumed.

    ``None`` if it is only to be described.
    """
    options, space, bases, size = read_command(arguments, has_gpus=False)
    check_options(options)
    budget, algorithm = space.budget(options.budget), options.algorithm or space.algorithm
    check_goal(Goal(options.objective, options.min_kl), bases)
    points = check_space(space, bases, budget, algorithm, next(iter(bases.values())).seed)
    session = open_session(next(iter(bases.values())), options.storage, published=not options.dry_run)
    starts = read_starts(options.start_from, bases)
    larger = read_command(arguments, has_gpus=True)[2].values()
    check_all([*points, *(start.config for start in starts)], session, at_first(options.workers_per_trial, larger))

    connect(options.address)
    cluster = read_cluster()
    if cluster.has_gpus and options.device != "cpu":
        options, space, bases, size = read_command(arguments, has_gpus=True)
        points = check_space(space, bases, budget, algorithm, next(iter(bases.values())).seed)
        starts = read_starts(options.start_from, bases)
    check_all([*points, *(start.config for start in starts)], session, options.workers_per_trial)
    num_samples = options.num_samples or (
        len(grid(space, budget)) + len(starts) if algorithm == "grid" else max(NUM_SAMPLES, len(starts))
    )
    first = next(iter(bases.values()))
    plan = Plan(
        space, bases, budget, algorithm, session.corpus.digest, num_samples, first.seed,
        {name: getattr(options, name) for name in WORKERS}, options.experiment, str(session.corpus.path),
        options.objective, options.min_kl, starts,
    )  # fmt: skip
    kind = first.model_name if len(bases) == 1 else space.name
    name = options.name or f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}"
    check_known(name, plan, session)
    return admit(name, plan, session, cluster, options, size)


def read_command(
    arguments: list[str], has_gpus: bool
) -> tuple[TuneOptions, Space, dict[ModelName, RunConfig[Any]], str]:
    """The options, the space, the config that each of its models starts from, and where that is from, in words."""
    looked = first_look(arguments)
    space = load_space(looked.space) if looked.space else None
    implied = space.models[0] if space is not None and space.models else None
    choice, rest = parse_choice("raytrain.tune", arguments, implied)
    space = space or load_space(choice.model)
    if space.models and choice.model not in space.models:
        raise UserError(f"search space {space.name} is for {', '.join(space.models)}, not for {choice.model}")
    models = space.models if implied == choice.model else (choice.model,)
    changes = space.budgets.get(looked.budget or next(iter(space.budgets), ""), {})
    options, bases = TuneOptions(), {}
    for model in models:
        start = dataclasses.replace(choice, model=model, preset=choice.preset or space.preset)
        default = default_config(start, full_size(model) if has_gpus else "laptop")
        options, bases[model] = parse_fields("raytrain.tune", TuneOptions(), override(default, changes), rest)
    if choice.file is not None:
        size = f"config {choice.file}"
    elif choice.preset or space.preset:
        size = f"preset {choice.preset or space.preset}"
    elif has_gpus:
        size = f"preset {full_size(choice.model)} (the cluster has GPUs)"
    else:
        size = f"preset laptop ({'no GPU' if options.device != 'cpu' else '--device cpu'})"
    return options, space, bases, size


def check_options(options: TuneOptions) -> None:
    """Refuse what no search can be made of."""
    if options.name is not None:
        check_name(options.name)
    if options.num_samples is not None and options.num_samples < 1:
        raise UserError(f"--num-samples is {options.num_samples}: a search needs at least one trial")
    if options.num_samples is not None and options.num_samples < len(options.start_from):
        raise UserError(
            f"--num-samples is {options.num_samples}: the {len(options.start_from)} of --start-from count among them"
        )
    if not (options.min_kl >= 0 and math.isfinite(options.min_kl)):
        raise UserError(f"--min-kl is {options.min_kl:g}: give nats of at least 0")
    if options.max_concurrent is not None and options.max_concurrent < 1:
        raise UserError(f"--max-concurrent is {options.max_concurrent}: at least one trial must run")
    for reference in options.bench:
        read_figures(reference)
    if options.price_per_hour is not None and not (
        options.price_per_hour >= 0 and math.isfinite(options.price_per_hour)
    ):
        raise UserError(f"--price-per-hour is {options.price_per_hour:g}: give a price of at least 0")
    if options.time_budget is not None and not options.time_budget > 0:
        raise UserError(f"--time-budget is {options.time_budget:g}: give a number of seconds above 0")


def check_goal(goal: Goal, bases: dict[ModelName, RunConfig[Any]]) -> None:
    """Refuse to look for a KL where no model has a latent code."""
    if set(bases) == {"byte_lstm"} and (goal.objective == "pareto" or goal.min_kl):
        option = "--objective pareto" if goal.objective == "pareto" else f"--min-kl {goal.min_kl:g}"
        raise UserError(f"{option}: byte_lstm has no latent code, so its KL is 0")


def check_all(points: list[RunConfig[Any]], session: Session, workers: int) -> None:
    """Make sure that the trials that the space may draw have samples."""
    shapes = {(point.sampling, point.length, point.batch_size, point.group_size): point for point in points}
    for point in shapes.values():
        check_samples(point, session.corpus, workers)


def check_known(name: str, plan: Plan, session: Session) -> None:
    """Make sure that ``name`` is free, or that of this very search.

    Raises:
        UserError: it belongs to something else.
    """
    place = session.storage.child(name)
    known = read_plan(place)
    if known is None and session.storage.list(name):
        raise UserError(f"--name {name}: there is something else at {place.uri()} already; choose another name")
    if known is not None and (changed := plan.differences(known)):
        raise UserError(
            f"--name {name} belongs to a search with other settings ({'; '.join(changed)}); choose another name, "
            f"or go on with that one by --resume {name}"
        )


# ------------------------------------------------------------------------------------------- resumed


def resumed_search(arguments: list[str]) -> Search | None:
    """The search that ``--resume`` names, as its storage records it; ``None`` if it is only to be described.

    Raises:
        UserError: there is no such search, or an option that would make it another.
    """
    looked = first_look(arguments)
    check_name(looked.resume)
    storage = open_storage_root(looked.storage)
    plan = read_plan(storage.child(looked.resume))
    if plan is None:
        raise UserError(f"--resume {looked.resume}: there is no such search in {storage.uri()}")
    try:
        if unknown := plan.workers.keys() - set(WORKERS):
            raise ValueError(f"workers.{min(unknown)}")
        workers = typed_fields(TuneOptions, plan.workers, "workers.")
    except ValueError as error:
        raise UserError(f"{storage.uri(looked.resume)}/{PLAN} is not a search's plan: {error}") from None
    default = TuneOptions(
        num_samples=plan.num_samples,
        experiment=plan.experiment,
        objective=plan.objective,
        min_kl=plan.min_kl,
        start_from=tuple(start.reference for start in plan.starts),
        **workers,
    )
    options = parse_options("raytrain.tune", TuneOptions, arguments, default)
    check_options(options)
    for option in ("space", "budget", "algorithm", "name", "objective", "min_kl", "start_from"):
        if getattr(options, option) != getattr(default, option):
            name = option.replace("_", "-")
            raise UserError(f"--resume {looked.resume} takes no --{name}: the search goes on as it was begun")
    if options.experiment != plan.experiment:
        raise UserError(f"--resume {looked.resume}: the search is in experiment {plan.experiment}")
    session = reopen_session(looked.storage, plan.corpus, plan.corpus_path)
    connect(options.address)
    plan = dataclasses.replace(plan, num_samples=max(plan.num_samples, options.num_samples or 0))
    return admit(looked.resume, plan, session, read_cluster(), options, "as recorded")


# ---------------------------------------------------------------------------------------------- both


def admit(name: str, plan: Plan, session: Session, cluster: Cluster, options: TuneOptions, size: str) -> Search | None:
    """Size the search to the cluster and say so; then, unless that is all, record it and open its MLflow run."""
    from raytrain.search import Search
    from raytrain.tracking import Experiment, check_tracking

    check_tracking(session.tracking_uri, cluster.num_nodes)
    gang = make_gang(options, cluster)
    num_left = plan.num_samples - sum(trial.ended for trial in Records(session.storage.child(name)).read())
    concurrent = min(max(1, num_left), cluster.admit(gang, options.max_concurrent, head_memory()))
    describe(name, plan, session, gang, concurrent, size)
    limited = concurrent < min(num_left, cluster.admit(gang, options.max_concurrent, math.inf))
    memory = "; the memory of this machine carries no more trials" if limited else ""
    print(f"at once: {cluster.usage(gang, concurrent)}{memory}")
    seconds, sources = trial_seconds(plan, session.corpus, gang, options.bench)
    forecast = Forecast(num_left, concurrent, gang.workers, seconds, options.time_budget, options.price_per_hour)
    print("\n".join(forecast.lines(sources)), flush=True)
    if options.dry_run:
        print("dry run: nothing was started")
        return None
    session.storage.child(name).write(PLAN, plan.to_json())
    experiment = Experiment.open(session.tracking_uri, plan.experiment, session.artifact_root())
    first = next(iter(plan.bases.values()))
    parent = experiment.open_run(
        f"search-{name}",
        name,
        config=to_dict(first),
        parameters=flatten(first)
        | {
            "search.num_samples": plan.num_samples,
            "search.algorithm": plan.algorithm,
            "search.objective": plan.objective,
            "search.min_kl": plan.min_kl,
        },
        tags={
            "corpus": plan.corpus,
            "seed": str(plan.seed),
            "kind": "search",
            "space": plan.space.name,
            "place": session.storage.uri(name),
            "gang": str(gang),
        },
    )
    session.log_corpus(parent)
    parent.log_text(plan.space.source, f"space/{plan.space.name}.py")
    print(f"see it: {parent.ui_hint()}", flush=True)
    return Search(name, plan, session, experiment, parent, gang, concurrent, options.time_budget)


def make_gang(options: TuneOptions, cluster: Cluster) -> Gang:
    """The workers of a trial: with GPUs if the cluster has or may get any, wherever this command runs."""
    gpus = options.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if cluster.has_gpus else 0.0
    return Gang(options.workers_per_trial, options.cpus_per_worker, gpus, device=options.device)


def head_memory() -> float:
    """Bytes of memory that are free where the trials' small processes will run: on this machine."""
    import psutil

    return float(psutil.virtual_memory().available)


def describe(name: str, plan: Plan, session: Session, gang: Gang, concurrent: int, size: str) -> None:
    """Say what is about to be done, and why at this size."""
    from raytrain.models import build_empty

    corpus = session.corpus
    for model, config in plan.bases.items():
        parameters = sum(parameter.numel() for parameter in build_empty(config).parameters())
        print(
            f"{model}, {size}: {parameters:,} parameters, {config.steps} steps of {config.batch_size} "
            f"{config.sampling} of {config.length}"
        )
    print(
        f"corpus {corpus.name}: {corpus.split('train').num_bytes:,} bytes, digest {corpus.digest[:12]}\n"
        f"search {name}: {plan.num_samples} trials ({plan.space.name}, {plan.algorithm}), {concurrent} at a time, "
        f"each {gang} on {'GPUs' if gang.on_gpus else 'CPUs'}, kept in {session.storage.uri(name)}\n"
        f"looked for: {plan.goal}" + "".join(f"\nstarts from {start.reference}" for start in plan.starts),
        flush=True,
    )


if __name__ == "__main__":
    run_command(main)

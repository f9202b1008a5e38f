"""Search a model's best settings: Ray Tune over gangs of Ray Train workers, tracked in MLflow.

    python -m raytrain.tune hybrid
    python -m raytrain.tune lstm_vae --data tweets --data-path tweets.txt.gz --num-samples 12
    python -m raytrain.tune hybrid --space my_space.py --workers-per-trial 2
    python -m raytrain.tune --space paper_fig4 --budget small --data ptb
    python -m raytrain.tune hybrid --min-kl 2 --warm-start config.json
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
from typing import TYPE_CHECKING, Any

from raytrain.cluster.resources import connect, read_cluster
from raytrain.config.cli import OneLineParser, default_config, parse_choice, parse_fields, parse_options
from raytrain.config.models import ModelName
from raytrain.config.presets import full_size
from raytrain.config.schema import RunConfig, override
from raytrain.metrics import SearchObjective
from raytrain.runs.records import PLAN, check_name
from raytrain.runs.workspace import open_workspace, reopen_workspace
from raytrain.search.algorithms import check_algorithms, resolve_algorithm, resolve_scheduler
from raytrain.search.forecast import read_benchmark
from raytrain.search.options import NUM_SAMPLES, WORKERS, SearchOptions
from raytrain.search.plan import Plan, read_plan
from raytrain.search.setup import admit, check_all, check_known, check_search_objective
from raytrain.search.space import GRID, Space, check_space, grid, load_space
from raytrain.search.warm_start import read_warm_starts
from raytrain.storage import open_storage_root
from raytrain.training.checks import at_first
from raytrain.utils.errors import UserError, run_command
from raytrain.utils.validation import validate_fields

if TYPE_CHECKING:
    from raytrain.search.searcher import Search


def main() -> None:
    """Check everything, then search, then say what was found."""
    arguments = sys.argv[1:]
    search = resumed_search(arguments) if first_look(arguments).resume is not None else new_search(arguments)
    if search is None:
        return

    from raytrain.analysis.tables import LiveTable
    from raytrain.search.finish import finish
    from raytrain.search.runner import run_search

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
    budget, algorithm = space.budget(options.budget), resolve_algorithm(options.algorithm, space)
    scheduler = resolve_scheduler(options.scheduler, algorithm, options.objective)
    check_search_objective(SearchObjective(options.objective, options.min_kl), bases)
    points = check_space(space, bases, budget, algorithm, next(iter(bases.values())).seed)
    workspace = open_workspace(next(iter(bases.values())), options.storage, published=not options.dry_run)
    warm_starts = read_warm_starts(options.warm_start, bases)
    larger = read_command(arguments, has_gpus=True)[2].values()
    check_all(
        [*points, *(start.config for start in warm_starts)], workspace, at_first(options.workers_per_trial, larger)
    )

    connect(options.address)
    cluster = read_cluster()
    if cluster.has_gpus and options.device != "cpu":
        options, space, bases, size = read_command(arguments, has_gpus=True)
        points = check_space(space, bases, budget, algorithm, next(iter(bases.values())).seed)
        warm_starts = read_warm_starts(options.warm_start, bases)
    check_all([*points, *(start.config for start in warm_starts)], workspace, options.workers_per_trial)
    num_samples = options.num_samples or (
        len(grid(space, budget)) + len(warm_starts) if algorithm == GRID else max(NUM_SAMPLES, len(warm_starts))
    )
    first = next(iter(bases.values()))
    plan = Plan(
        space=space,
        bases=bases,
        budget=budget,
        algorithm=algorithm,
        scheduler=scheduler,
        corpus=workspace.corpus.digest,
        num_samples=num_samples,
        seed=first.seed,
        workers={name: getattr(options, name) for name in WORKERS},
        experiment=options.experiment,
        corpus_path=str(workspace.corpus.path),
        objective=options.objective,
        min_kl=options.min_kl,
        warm_starts=warm_starts,
    )
    kind = first.model_name if len(bases) == 1 else space.name
    name = options.name or f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}"
    check_known(name, plan, workspace)
    return admit(name, plan, workspace, cluster, options, size)


def read_command(
    arguments: list[str], has_gpus: bool
) -> tuple[SearchOptions, Space, dict[ModelName, RunConfig[Any]], str]:
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
    options, bases = SearchOptions(), {}
    for model in models:
        start = dataclasses.replace(choice, model=model, preset=choice.preset or space.preset)
        default = default_config(start, full_size(model) if has_gpus else "laptop")
        options, bases[model] = parse_fields("raytrain.tune", SearchOptions(), override(default, changes), rest)
    if choice.file is not None:
        size = f"config {choice.file}"
    elif choice.preset or space.preset:
        size = f"preset {choice.preset or space.preset}"
    elif has_gpus:
        size = f"preset {full_size(choice.model)} (the cluster has GPUs)"
    else:
        size = f"preset laptop ({'no GPU' if options.device != 'cpu' else '--device cpu'})"
    return options, space, bases, size


def check_options(options: SearchOptions) -> None:
    """Refuse what no search can be made of."""
    if options.name is not None:
        check_name(options.name)
    if options.num_samples is not None and options.num_samples < 1:
        raise UserError(f"--num-samples is {options.num_samples}: a search needs at least one trial")
    if options.num_samples is not None and options.num_samples < len(options.warm_start):
        raise UserError(
            f"--num-samples is {options.num_samples}: the {len(options.warm_start)} of --warm-start count among them"
        )
    if not (options.min_kl >= 0 and math.isfinite(options.min_kl)):
        raise UserError(f"--min-kl is {options.min_kl:g}: give nats of at least 0")
    if options.max_concurrent is not None and options.max_concurrent < 1:
        raise UserError(f"--max-concurrent is {options.max_concurrent}: at least one trial must run")
    for reference in options.bench:
        read_benchmark(reference)
    if options.price_per_hour is not None and not (
        options.price_per_hour >= 0 and math.isfinite(options.price_per_hour)
    ):
        raise UserError(f"--price-per-hour is {options.price_per_hour:g}: give a price of at least 0")
    if options.time_budget is not None and not options.time_budget > 0:
        raise UserError(f"--time-budget is {options.time_budget:g}: give a number of seconds above 0")


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
    check_algorithms(plan)
    try:
        if unknown := plan.workers.keys() - set(WORKERS):
            raise ValueError(f"workers.{min(unknown)}")
        workers = validate_fields(SearchOptions, plan.workers, "workers.")
    except ValueError as error:
        raise UserError(f"{storage.uri(looked.resume)}/{PLAN} is not a search's plan: {error}") from None
    default = SearchOptions(
        num_samples=plan.num_samples,
        experiment=plan.experiment,
        objective=plan.objective,
        min_kl=plan.min_kl,
        warm_start=tuple(start.reference for start in plan.warm_starts),
        **workers,
    )
    options = parse_options("raytrain.tune", SearchOptions, arguments, default)
    check_options(options)
    for option in ("space", "budget", "algorithm", "scheduler", "name", "objective", "min_kl", "warm_start"):
        if getattr(options, option) != getattr(default, option):
            name = option.replace("_", "-")
            raise UserError(f"--resume {looked.resume} takes no --{name}: the search goes on as it was begun")
    if options.experiment != plan.experiment:
        raise UserError(f"--resume {looked.resume}: the search is in experiment {plan.experiment}")
    workspace = reopen_workspace(looked.storage, plan.corpus, plan.corpus_path)
    connect(options.address)
    plan = dataclasses.replace(plan, num_samples=max(plan.num_samples, options.num_samples or 0))
    return admit(looked.resume, plan, workspace, read_cluster(), options, "as recorded")


if __name__ == "__main__":
    run_command(main)

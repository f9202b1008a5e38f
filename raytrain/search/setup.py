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

import math
from typing import TYPE_CHECKING, Any

import psutil

from raytrain.cluster.resources import Cluster
from raytrain.config.models import ModelName
from raytrain.config.schema import RunConfig, flatten, to_dict
from raytrain.config.workers import WorkerSpec
from raytrain.metrics import SearchObjective
from raytrain.models import build_empty
from raytrain.runs.records import PLAN
from raytrain.runs.trials import TrialStore
from raytrain.runs.workspace import Workspace
from raytrain.search.forecast import Estimate, trial_seconds
from raytrain.search.options import SearchOptions
from raytrain.search.plan import Plan, read_plan
from raytrain.search.searcher import Search
from raytrain.tracking.client import check_tracking
from raytrain.tracking.runs import Experiment
from raytrain.training.checks import check_samples
from raytrain.utils.errors import UserError

if TYPE_CHECKING:
    from raytrain.search.searcher import Search


def check_search_objective(search_objective: SearchObjective, bases: dict[ModelName, RunConfig[Any]]) -> None:
    """Refuse to look for a KL where no model has a latent code."""
    if set(bases) == {"byte_lstm"} and (search_objective.objective == "pareto" or search_objective.min_kl):
        option = (
            "--objective pareto" if search_objective.objective == "pareto" else f"--min-kl {search_objective.min_kl:g}"
        )
        raise UserError(f"{option}: byte_lstm has no latent code, so its KL is 0")


def check_all(points: list[RunConfig[Any]], workspace: Workspace, workers: int) -> None:
    """Make sure that the trials that the space may draw have samples."""
    shapes = {(point.sampling, point.length, point.batch_size, point.group_size): point for point in points}
    for point in shapes.values():
        check_samples(point, workspace.corpus, workers)


def check_known(name: str, plan: Plan, workspace: Workspace) -> None:
    """Make sure that ``name`` is free, or that of this very search.

    Raises:
        UserError: it belongs to something else.
    """
    location = workspace.storage.child(name)
    known = read_plan(location)
    if known is None and workspace.storage.list(name):
        raise UserError(f"--name {name}: there is something else at {location.uri()} already; choose another name")
    if known is not None and (changed := plan.differences(known)):
        raise UserError(
            f"--name {name} belongs to a search with other settings ({'; '.join(changed)}); choose another name, "
            f"or go on with that one by --resume {name}"
        )


# ---------------------------------------------------------------------------------------------- both


def admit(
    name: str, plan: Plan, workspace: Workspace, cluster: Cluster, options: SearchOptions, size: str
) -> Search | None:
    """Size the search to the cluster and say so; then, unless that is all, record it and open its MLflow run."""
    check_tracking(workspace.tracking_uri, cluster.num_nodes)
    worker_spec = make_worker_spec(options, cluster)
    num_left = plan.num_samples - sum(trial.ended for trial in TrialStore(workspace.storage.child(name)).read())
    concurrent = min(max(1, num_left), cluster.admit(worker_spec, options.max_concurrent, head_memory()))
    print_plan(name, plan, workspace, worker_spec, concurrent, size)
    limited = concurrent < min(num_left, cluster.admit(worker_spec, options.max_concurrent, math.inf))
    memory = "; the memory of this machine carries no more trials" if limited else ""
    print(f"at once: {cluster.usage(worker_spec, concurrent)}{memory}")
    seconds, sources = trial_seconds(plan, workspace.corpus, worker_spec, options.bench)
    forecast = Estimate(num_left, concurrent, worker_spec.workers, seconds, options.time_budget, options.price_per_hour)
    print("\n".join(forecast.lines(sources)), flush=True)
    if options.dry_run:
        print("dry run: nothing was started")
        return None
    workspace.storage.child(name).write(PLAN, plan.to_json())
    experiment = Experiment.open(workspace.tracking_uri, plan.experiment, workspace.artifact_root())
    first = next(iter(plan.bases.values()))
    parent = experiment.open_run(
        f"search-{name}",
        name,
        config=to_dict(first),
        parameters=flatten(first)
        | {
            "search.num_samples": plan.num_samples,
            "search.algorithm": plan.algorithm,
            "search.scheduler": plan.scheduler,
            "search.objective": plan.objective,
            "search.min_kl": plan.min_kl,
        },
        tags={
            "corpus": plan.corpus,
            "seed": str(plan.seed),
            "kind": "search",
            "space": plan.space.name,
            "location": workspace.storage.uri(name),
            "worker_group": str(worker_spec),
        },
    )
    workspace.log_corpus(parent)
    parent.log_text(plan.space.source, f"space/{plan.space.name}.py")
    print(f"see it: {parent.ui_hint()}", flush=True)
    return Search(name, plan, workspace, experiment, parent, worker_spec, concurrent, options.time_budget)


def make_worker_spec(options: SearchOptions, cluster: Cluster) -> WorkerSpec:
    """The workers of a trial: with GPUs if the cluster has or may get any, wherever this command runs."""
    gpus = options.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if cluster.has_gpus else 0.0
    return WorkerSpec(options.workers_per_trial, options.cpus_per_worker, gpus, device=options.device)


def head_memory() -> float:
    """Bytes of memory that are free where the trials' small processes will run: on this machine."""
    return float(psutil.virtual_memory().available)


def print_plan(
    name: str, plan: Plan, workspace: Workspace, worker_spec: WorkerSpec, concurrent: int, size: str
) -> None:
    """Say what is about to be done, and why at this size."""
    corpus = workspace.corpus
    for model, config in plan.bases.items():
        parameters = sum(parameter.numel() for parameter in build_empty(config).parameters())
        print(
            f"{model}, {size}: {parameters:,} parameters, {config.steps} steps of {config.batch_size} "
            f"{config.sampling} of {config.length}"
        )
    print(
        f"corpus {corpus.name}: {corpus.split('train').num_bytes:,} bytes, digest {corpus.digest[:12]}\n"
        f"search {name}: {plan.num_samples} trials ({plan.space.name}, {plan.algorithm}), {concurrent} at a time, "
        f"each {worker_spec} on {'GPUs' if worker_spec.on_gpus else 'CPUs'}, kept in {workspace.storage.uri(name)}\n"
        f"looked for: {plan.search_objective}"
        + "".join(f"\nstarts from {start.reference}" for start in plan.warm_starts),
        flush=True,
    )

"""Setting up a search: the checks, the plan, admission to the cluster, and the MLflow run."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from raytrain.cluster.connection import connect
from raytrain.cluster.resources import Cluster, read_cluster, reserve_memory, traffic, worker_spec
from raytrain.config.schema import RunConfig, flatten, to_dict
from raytrain.config.workers import WorkerSpec
from raytrain.data.corpus import Corpus
from raytrain.metrics import SearchObjective
from raytrain.models import num_parameters
from raytrain.models.ladder import validation_ladder
from raytrain.runs.encoders import Encoder, find_encoder
from raytrain.runs.records import PLAN, check_name, holds_something, is_run, new_identity, read_values
from raytrain.runs.repeats import searched
from raytrain.runs.trials import TrialStore
from raytrain.runs.workspace import Workspace, open_workspace, reopen_workspace
from raytrain.search.algorithms import check_algorithms, resolve_algorithm, resolve_scheduler
from raytrain.search.confirmation import repeat_share, repeats_left
from raytrain.search.earlier import NewSearch, WarmStarts, read_references
from raytrain.search.estimate import Estimate, read_benchmark, trial_seconds, worker_bytes
from raytrain.search.options import NUM_SAMPLES, RESUMABLE, SearchOptions, SearchRequest
from raytrain.search.plan import Plan, WarmStart, grid_points, read_plan
from raytrain.search.population import check_population, find_parts, fit_start, part_steps
from raytrain.search.searcher import Search
from raytrain.search.space import GRID, PBT, check_space
from raytrain.storage import open_storage_root
from raytrain.storage.base import Storage
from raytrain.storage.lease import find_free, take
from raytrain.tracking.client import check_tracking
from raytrain.tracking.runs import Experiment, Run
from raytrain.training.checks import check_samples
from raytrain.utils.errors import UserError
from raytrain.utils.memory import free_memory
from raytrain.utils.validation import validate_fields

# ----------------------------------------------------------------------------------------- a new one


def new_search(without_gpus: SearchRequest, with_gpus: SearchRequest) -> Search | None:
    """Check and record the requested search; return ``None`` if it is a dry run.

    A known name with the same settings resumes that search. The two requests differ if no preset or config was given:
    machines with GPUs then get other sizes. What both requests refuse is refused before joining Ray.

    Raises:
        UserError: an option, a field of the space, a corpus or a cluster cannot be used.
    """
    options = without_gpus.options
    options.check()
    for reference in options.bench:
        read_benchmark(reference)
    if without_gpus.corpus is not None:
        workspace = reopen_workspace(options.storage, *without_gpus.corpus)
    else:
        workspace = open_workspace(without_gpus.first, options.storage, published=not options.dry_run)
    free = 0
    if options.name is not None and not options.dry_run:
        free = find_free(workspace.storage.child(options.name), f"--name {options.name}: the search")
    encoder = find_encoder(without_gpus.first, workspace.storage)
    if encoder is not None:
        without_gpus, with_gpus = (with_encoder(each, encoder) for each in (without_gpus, with_gpus))
    largest = max(config.batch_size // config.group_size for config in with_gpus.bases.values())
    # an encoder may fit the sizes for machines with GPUs but not the others
    fits_now = encoder if without_gpus.bases == with_gpus.bases else None
    checked = check_request(without_gpus, workspace, 1 if options.workers_per_trial <= largest else None, fits_now)

    connect(options.address)
    cluster = read_cluster()
    request = with_gpus if cluster.has_gpus and options.device != "cpu" else without_gpus
    if request is with_gpus or options.workers_per_trial > 1 or encoder is not None:
        checked = check_request(request, workspace, encoder=encoder)
    if encoder is not None:
        print(f"every trial starts from the encoder of {encoder.reference}, digest {encoder.digest[:12]}")
        if not options.dry_run:
            encoder.publish(workspace.storage)
    plan = make_plan(request, workspace, checked)
    kind = request.first.model_name if len(request.bases) == 1 else request.space.name
    name = options.name or f"{kind}-{time.strftime('%Y%m%d-%H%M%S')}-{plan.identity[:4]}"
    plan = known_or_new(name, plan, workspace)
    return admit(name, plan, workspace, cluster, options, request.size, free)


def with_encoder(request: SearchRequest, encoder: Encoder) -> SearchRequest:
    """Return the request of a search whose trials all start from ``encoder``."""
    bases = {model: encoder.named(config) for model, config in request.bases.items()}
    return dataclasses.replace(request, bases=bases)


def check_request(
    request: SearchRequest, workspace: Workspace, workers: int | None = None, encoder: Encoder | None = None
) -> WarmStarts:
    """Check every config that the space may draw, and read the references of ``--warm-start``.

    Args:
        request: the search.
        workspace: its corpus.
        workers: workers per trial; the number in the options if ``None``.
        encoder: the encoder that every trial starts from.

    Raises:
        UserError: a field, a value or a combination cannot be trained.
    """
    options, space = request.options, request.space
    budget, algorithm = space.budget(options.budget), resolve_algorithm(options.algorithm, space)
    resolve_scheduler(options.scheduler, algorithm, options.search_objective)
    search_objective = SearchObjective(options.search_objective, options.min_used)
    check_search_objective(search_objective, request.bases)
    if options.parts is not None and algorithm != PBT:
        raise UserError(f"--parts needs --algorithm {PBT}, not {algorithm}")
    if options.search_objective == "pareto" and algorithm == PBT:
        raise UserError(f"--algorithm {PBT} replaces the worst by one number: --search-objective pareto has two")
    points = check_space(space, request.bases, budget, algorithm, request.first.seed)
    new = NewSearch(
        space=space,
        bases=request.bases,
        budget=budget,
        algorithm=algorithm,
        search_objective=search_objective,
        corpus=workspace.corpus.digest,
        max_parameters=options.max_parameters,
    )
    warm_starts = read_references(options.warm_start, new, workspace.storage)
    if algorithm == PBT:
        starts = tuple(fit_start(start, space, request.bases, budget) for start in warm_starts.starts)
        warm_starts = dataclasses.replace(warm_starts, starts=starts)
    check_starts(options, points, warm_starts.starts)
    configs = [*points, *(start.config for start in warm_starts.starts)]
    if algorithm == PBT:
        find_parts(options.parts, request.first)
        check_population(wanted_trials(options, warm_starts), space.name, request.bases, points)
    shapes = {
        (each.sampling, each.pool_bytes, each.length, each.batch_size, each.group_size, each.vocabulary): each
        for each in configs
    }
    for config in shapes.values():
        check_samples(config, workspace.corpus, workers or options.workers_per_trial)
    if any(config.encoder_from != request.first.encoder_from for config in points):
        raise UserError(f"search space {space.name} sets encoder_from: give it by --encoder-from, for all trials")
    if encoder is not None:
        for config in {(each.model, each.length): each for each in configs}.values():
            encoder.check(config)
    return warm_starts


def check_starts(options: SearchOptions, points: Sequence[RunConfig[Any]], starts: Sequence[WarmStart]) -> None:
    """Refuse more start points than trials, and a parameter limit that a start or every checked point exceeds.

    Raises:
        UserError: one of these holds; the message gives the numbers.
    """
    if options.num_samples is not None and options.num_samples < len(starts):
        raise UserError(f"--num-samples is {options.num_samples}: the {len(starts)} of --warm-start count among them")
    if (most := options.max_parameters) is None:
        return
    for start in starts:
        if (found := num_parameters(start.config)) > most:
            raise UserError(f"--max-parameters {most}: --warm-start {start.reference} has {found:,}")
    if (fewest := min(map(num_parameters, points))) > most:
        raise UserError(
            f"--max-parameters {most}: none of {len(points)} points of the space has so few; the least is {fewest:,}"
        )


def check_search_objective(search_objective: SearchObjective, bases: dict[str, RunConfig[Any]]) -> None:
    """Refuse an objective that needs a KL if no model has a latent code."""
    if any(config.has_latent for config in bases.values()):
        return
    pareto = search_objective.objective == "pareto"
    if pareto or search_objective.min_used:
        option = "--search-objective pareto" if pareto else f"--min-used {search_objective.min_used:g}"
        raise UserError(f"{option}: {' and '.join(bases)} has no latent code")


def make_plan(request: SearchRequest, workspace: Workspace, warm_starts: WarmStarts) -> Plan:
    """Return the plan of a request: everything that determines which trials the search has."""
    options, space = request.options, request.space
    budget, algorithm = space.budget(options.budget), resolve_algorithm(options.algorithm, space)
    points = len(grid_points(space, request.bases, budget, options.max_parameters)) if algorithm == GRID else 0
    parts = find_parts(options.parts, request.first) if algorithm == PBT else 0
    return Plan(
        identity=new_identity(),
        space=space,
        bases=request.bases,
        budget=budget,
        algorithm=algorithm,
        scheduler=resolve_scheduler(options.scheduler, algorithm, options.search_objective),
        corpus=workspace.corpus.digest,
        num_samples=wanted_trials(options, warm_starts, points) * max(1, parts),
        parts=parts,
        seed=request.first.seed,
        workers={name: getattr(options, name) for name in RESUMABLE},
        experiment=options.experiment,
        corpus_path=str(workspace.corpus.path),
        objective=options.search_objective,
        min_used=options.min_used,
        max_parameters=options.max_parameters,
        warm_starts=warm_starts.starts,
        earlier=warm_starts.earlier,
        ablates=options.ablate or "",
        confirm=options.confirmation(request.first.seed),
    )


def wanted_trials(options: SearchOptions, warm_starts: WarmStarts, points: int = 0) -> int:
    """Return the number of trials, or of members of a population, that the options ask for.

    Args:
        options: options of the search.
        warm_starts: the configs that it starts with, all of which are trained by default.
        points: number of points of a grid, all of which are trained by default; 0 without a grid.
    """
    if options.num_samples is not None:
        return options.num_samples
    return points + len(warm_starts.starts) if points else max(NUM_SAMPLES, len(warm_starts.starts))


def known_or_new(name: str, plan: Plan, workspace: Workspace) -> Plan:
    """Return ``plan`` with the identity of the existing search of this name; unchanged if the name is free.

    The existing search keeps its number of trials unless it is to have more, its confirmation unless another is given,
    and what it knew of earlier searches when it was begun.

    Raises:
        UserError: the name belongs to something else.
    """
    location = workspace.storage.child(name)
    known = read_plan(location, compared_with=plan.space)
    if known is None and holds_something(location):
        raise UserError(f"--name {name}: there is something else at {location.uri()} already; choose another name")
    if known is not None and (changed := plan.differences(known)):
        raise UserError(
            f"--name {name} belongs to a search with other settings ({'; '.join(changed)}); choose another name, "
            f"or resume that search by --resume {name}"
        )
    if known is None:
        return plan
    return dataclasses.replace(
        plan,
        identity=known.identity,
        num_samples=max(plan.num_samples, known.num_samples),
        confirm=plan.confirm or known.confirm,
        earlier=known.earlier,
    )


# ------------------------------------------------------------------------------------------- resumed


def stored_plan(name: str, storage: str | None) -> tuple[Plan, SearchOptions]:
    """Return the plan of the search ``name`` in the storage, and the options with which it was begun.

    Raises:
        UserError: there is no such search, or its plan cannot be read.
    """
    check_name(name)
    root = open_storage_root(storage)
    location = root.child(name)
    if read_values(location) is not None:
        print(f"running the search space as {location.uri(PLAN)} has it", flush=True)
    plan = read_plan(location)
    if plan is None:
        run = is_run(location)
        hint = f"; {name} is a run: python -m raytrain.train --resume {name}" if run else ""
        raise UserError(f"--resume {name}: there is no such search in {root.uri()}{hint}")
    check_algorithms(plan)
    return plan, SearchOptions(
        num_samples=plan.members,
        parts=plan.parts or None,
        experiment=plan.experiment,
        search_objective=plan.objective,
        min_used=plan.min_used,
        max_parameters=plan.max_parameters,
        warm_start=plan.references,
        ablate=plan.ablates or None,
        **confirm_settings(plan),
        **worker_settings(plan, location),
    )


def worker_settings(plan: Plan, location: Storage) -> dict[str, Any]:
    """Return the options that determine how the trials of a stored plan run.

    Raises:
        UserError: the stored options are invalid.
    """
    try:
        if unknown := plan.workers.keys() - set(RESUMABLE):
            raise ValueError(f"workers.{min(unknown)}")
        return validate_fields(SearchOptions, plan.workers, "workers.")
    except ValueError as error:
        raise UserError(f"{location.uri(PLAN)} is not a search's plan: {error}") from None


def confirm_settings(plan: Plan) -> dict[str, Any]:
    """Return the options that determine how a plan's winner is confirmed; empty if it is not."""
    if plan.confirm is None:
        return {}
    return {"confirm": plan.confirm.option, "confirm_steps": plan.confirm.steps, "confirm_share": plan.confirm.share}


def resumed_search(name: str, plan: Plan, begun: SearchOptions, options: SearchOptions) -> Search | None:
    """Check that ``options`` resume the search of ``plan`` unchanged, and open it; return ``None`` for a dry run.

    Raises:
        UserError: an option would make it another search, or its corpus or cluster is unavailable.
    """
    options.check()
    for reference in options.bench:
        read_benchmark(reference)
    settled = (
        "space",
        "budget",
        "algorithm",
        "parts",
        "scheduler",
        "name",
        "search_objective",
        "min_used",
        "max_parameters",
        "ablate",
    )
    for field in (*settled, "warm_start"):
        if getattr(options, field) != getattr(begun, field):
            raise UserError(
                f"--resume {name} takes no --{field.replace('_', '-')}: the search continues as it was begun"
            )
    if plan.parts and options.num_samples != begun.num_samples:
        raise UserError(f"--resume {name} takes no --num-samples: its population keeps its {begun.num_samples} members")
    if options.experiment != plan.experiment:
        raise UserError(f"--resume {name}: the search is in experiment {plan.experiment}")
    free = 0
    if not options.dry_run:
        free = find_free(open_storage_root(options.storage).child(name), f"--resume {name}: the search")
    workspace = reopen_workspace(options.storage, plan.corpus, plan.corpus_path)
    connect(options.address)
    plan = dataclasses.replace(
        plan,
        num_samples=max(plan.num_samples, options.num_samples or 0),
        confirm=options.confirmation(plan.seed),
    )
    return admit(name, plan, workspace, read_cluster(), options, "as recorded", free)


# ---------------------------------------------------------------------------------------------- both


def admit(
    name: str, plan: Plan, workspace: Workspace, cluster: Cluster, options: SearchOptions, size: str, free: int
) -> Search | None:
    """Size the search to the cluster and print the plan; unless it is a dry run, lease it and open its MLflow run.

    ``free`` is the number of the search's newest lease, which nobody holds.
    """
    check_tracking(workspace.tracking_uri, cluster.num_nodes)
    spec = worker_spec(options.worker_options(), cluster)
    need = largest_worker(plan, spec.workers)
    spec = reserve_memory(spec, cluster, need)
    known = tuple(TrialStore(workspace.storage.child(name)).read())
    num_left = plan.num_samples - sum(trial.ended for trial in searched(known))
    num_repeats = repeats_left(plan, known)
    most = max(min(num_left, plan.members), num_repeats)
    concurrent = min(max(1, most), cluster.admit(spec, options.max_concurrent, free_memory()))
    print_plan(name, plan, workspace, spec, size)
    limited = concurrent < min(most, cluster.admit(spec, options.max_concurrent, math.inf))
    memory = "; the memory of this machine carries no more" if limited else ""
    print(f"concurrent trials: {concurrent}, {cluster.usage(spec, concurrent)}{memory}")
    if need and spec.gpus == 0:
        reason = "a node has no room for that twice, or does not say how much it has"
        kept = "is reserved" if spec.memory else f"may be used; none is reserved: {reason}"
        print(f"memory: about {need / 1e9:.1f} GB a worker {kept}")
    largest = max(plan.bases.values(), key=num_parameters)
    if said := traffic(cluster, spec, num_parameters(largest), largest.gradients):
        print(said)
    seconds, sources = trial_seconds(plan, workspace.corpus, spec, options.bench)
    estimate = Estimate(
        num_trials=num_left,
        num_repeats=num_repeats,
        repeat_share=repeat_share(plan) * max(1, plan.parts),
        concurrent=concurrent,
        most=plan.members,
        workers=spec.workers,
        trial_seconds=None if seconds is None else seconds / max(1, plan.parts),
        time_budget=options.time_budget,
        price=options.price_per_hour,
    )
    asked = options.dry_run or bool(options.bench) or options.price_per_hour is not None
    if lines := estimate.lines(sources, asked):
        print("\n".join(lines), flush=True)
    if options.dry_run:
        print("dry run: nothing was started")
        return None
    with ExitStack() as failed:
        lease = take(workspace.storage.child(name), free, f"the search {name}")
        failed.callback(lease.release)
        # check once more, now that nobody else can record anything there
        plan = known_or_new(name, plan, workspace)
        lease.fence.guard(workspace.storage.child(name)).write(PLAN, plan.to_json())
        experiment, parent = open_tracking(name, plan, workspace, spec)
        failed.pop_all()
    budget, price = options.time_budget, options.price_per_hour
    return Search(name, plan, workspace, lease, experiment, parent, spec, concurrent, budget, known, price)


def largest_worker(plan: Plan, workers: int) -> int:
    """Return an estimate of the memory, in bytes, of one worker of the largest trial; 0 if none may be trained."""
    points = check_space(plan.space, plan.bases, plan.budget, plan.algorithm, plan.seed)
    configs = [*points, *(start.config for start in plan.warm_starts)]
    shapes = {(each.model, each.vocabulary, each.length, each.batch_size): each for each in configs}
    return max((worker_bytes(config, workers) for config in shapes.values() if plan.fits(config)), default=0)


def open_tracking(name: str, plan: Plan, workspace: Workspace, spec: WorkerSpec) -> tuple[Experiment, Run]:
    """Return the experiment and the MLflow run of a search; reopen an existing run, but leave a deleted one deleted."""
    experiment = Experiment.open(workspace.tracking_uri, plan.experiment, workspace.artifact_root())
    if (deleted := experiment.deleted_run(plan.identity)) is not None:
        print(f"view: {experiment.ui_hint()}", flush=True)
        return experiment, deleted
    first = next(iter(plan.bases.values()))
    parent = experiment.open_run(
        plan.identity,
        name,
        config=to_dict(first),
        parameters=flatten(first)
        | {
            "search.num_samples": plan.num_samples,
            "search.algorithm": plan.algorithm,
            "search.scheduler": plan.scheduler,
            "search.objective": plan.objective,
            "search.min_used": plan.min_used,
        },
        tags={
            "corpus": plan.corpus,
            "seed": str(plan.seed),
            "kind": "search",
            "space": plan.space.name,
            "location": workspace.storage.uri(name),
            "worker_group": str(spec),
        },
    )
    if plan.parts:
        parent.log_parameters({"search.parts": plan.parts})
    if plan.max_parameters is not None:
        parent.log_parameters({"search.max_parameters": plan.max_parameters})
    if plan.confirm is not None:
        parent.log_parameters({"search.confirm": plan.confirm.option})
    workspace.log_corpus(parent)
    parent.log_text(plan.space.source, f"space/{plan.space.name}.py")
    print(f"view: {parent.ui_hint()}", flush=True)
    return experiment, parent


def print_plan(name: str, plan: Plan, workspace: Workspace, spec: WorkerSpec, size: str) -> None:
    """Print what is about to be searched, and where the sizes come from."""
    corpus = workspace.corpus
    for model, config in plan.bases.items():
        print(
            f"{model}, {size}: {num_parameters(config):,} parameters, {config.steps} steps of {config.batch_size} "
            f"{config.samples_noun} of {config.length}"
        )
    print(
        f"corpus {corpus.name}: {corpus.split('train').num_bytes:,} bytes, digest {corpus.digest[:12]}\n"
        f"search {name}: {plan.num_samples} trials ({plan.space.name}, {plan.algorithm}"
        + (f": {plan.members} members in {plan.parts} parts of {part_steps(plan)} steps" if plan.parts else "")
        + "), "
        f"each {spec} on {'GPUs' if spec.on_gpus else 'CPUs'}, kept in {workspace.storage.uri(name)}\n"
        f"objective: {plan.search_objective}"
        + ("" if plan.max_parameters is None else f", at most {plan.max_parameters:,} parameters")
        + ("" if plan.confirm is None else f"\nconfirmation: {plan.confirm}")
        + "".join(f"\nwarm start: {each.note}" for each in plan.earlier)
        + "".join(f"\nwarm start: the config of {start.reference} is trained" for start in plan.warm_starts)
    )
    print("\n".join(reference_lines(plan, corpus)), flush=True)


def reference_lines(plan: Plan, corpus: Corpus) -> list[str]:
    """Return what n-grams reach on the validation samples: one line, or one for each kind of samples of the models."""
    kinds = {_kind_of_samples(config): config for config in plan.bases.values()}
    lines = {kind: str(validation_ladder(corpus, config, quick=True)) for kind, config in kinds.items()}
    if len(lines) == 1:
        return list(lines.values())
    return [line.replace("reference", f"reference on {kind}", 1) for kind, line in lines.items()]


def _kind_of_samples(config: RunConfig[Any]) -> str:
    kind = f"{config.sampling} of {config.length}"
    return kind if config.vocabulary == "byte" else f"{kind} in {config.vocabulary}"

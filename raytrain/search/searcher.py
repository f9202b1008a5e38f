"""Searcher of Ray Tune: draws each trial from Optuna, and prepares everything that the trial needs."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import optuna
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from raytrain.config.schema import RunConfig, flatten, in_force, to_dict
from raytrain.config.workers import WorkerSpec
from raytrain.metrics import METRIC
from raytrain.models.ladder import Ladder, validation_ladder
from raytrain.runs.records import new_identity, write_failure, write_run_address
from raytrain.runs.repeats import searched
from raytrain.runs.trials import Trial, TrialStore
from raytrain.runs.workspace import Workspace
from raytrain.search.algorithms import Recalls, add_to_study, make_study, optuna_result, set_constraints
from raytrain.search.confirmation import new_repeats, wanted_repeats
from raytrain.search.plan import Plan, grid_points
from raytrain.search.population import ExtinctError, Part, next_part
from raytrain.search.space import GRID, check_choices
from raytrain.search.warm_start import point_of
from raytrain.storage import open_storage_root
from raytrain.storage.lease import LeaseLostError
from raytrain.tracking.client import LOG, TRACKING_ERRORS, explain, is_gone, is_transient, patience
from raytrain.training.worker import Job
from raytrain.utils.errors import UserError

if TYPE_CHECKING:
    from raytrain.storage.base import Storage
    from raytrain.storage.lease import Lease
    from raytrain.tracking.runs import Experiment, Run

AWAY_S = 3600.0
"""How long new trials wait for MLflow."""
DRAWS_OF_SAMPLER, MOST_DRAWS = 10, 1000
"""Most draws of a point until its model fits ``--max-parameters``: by the sampler, and in all (the rest at random)."""
ASK_AGAIN_S = 5.0
"""Pause between two attempts to create the MLflow run of a new trial."""


@dataclass(frozen=True)
class Search:
    """A search that is set up: its plan, its workers and its records."""

    name: str
    plan: Plan
    workspace: Workspace
    lease: Lease
    experiment: Experiment
    parent: Run
    worker_spec: WorkerSpec
    concurrent: int
    time_budget: float | None
    known: tuple[Trial, ...]
    """Its trials shortly before this driver took it over."""
    price: float | None = None
    """Price of one worker per hour; ``None`` if not given."""

    @property
    def location(self) -> Storage:
        """Return the storage of the search, which refuses changes once another driver has taken the search over."""
        return self.lease.fence.guard(self.workspace.storage.child(self.name))

    @property
    def resume_command(self) -> str:
        """Return the command that resumes the search."""
        root = self.workspace.storage.uri()
        storage = "" if root == open_storage_root(None).uri() else f" --storage {root}"
        return f"python -m raytrain.tune --resume {self.name}{storage}"


class OptunaSearcher(Searcher):
    """Draws the next point and prepares everything that its trial needs.

    It runs in the driver, the only process that creates MLflow runs. Workers receive the runs' addresses.
    """

    def __init__(self, search: Search, records: TrialStore, known: list[Trial], scheduler: TrialScheduler) -> None:
        super().__init__(metric=METRIC, mode="min")
        self.search = search
        self.records = records
        self.scratch = ""
        own = searched(known)
        self.study = make_study(search.plan, len(own))
        for earlier in search.plan.earlier:
            for trial in earlier.trials:
                add_to_study(self.study, trial, search.plan.search_objective)
        self.trials = list(known)
        """All trials of the search, by number."""
        self.scheduler = scheduler
        self.repeats: list[Trial] | None = None
        """The trials that confirm the winner; ``None`` until they are known."""
        self.failure: Exception | None = None
        """Error of the sampler or of MLflow, which ends the search."""
        self.extinct = ""
        """Why no member of a population can continue; empty as long as one can."""
        self._random = optuna.samplers.RandomSampler(seed=search.plan.seed + len(own))
        self._points: dict[str, optuna.Trial] = {}
        """Optuna's trial for each of ours, by identity. A config that is not a point of the space has none."""
        self._reported: set[tuple[str, int]] = set()
        """Identity and step of each evaluation that Optuna has; a trial that continues elsewhere repeats some."""
        self._baselines: dict[tuple[Any, ...], float] = {}
        """Baseline of early stopping for each kind of validation samples, as in the trials' records."""
        self._ladders: dict[tuple[Any, ...], Ladder] = {}
        self._by_tune: dict[str, Trial] = {}
        self._next: Trial | None = None
        """Trial that was drawn and waits for its MLflow run."""
        self._ask_again, self._away_since = -math.inf, math.inf
        self._again = [trial for trial in own if not trial.ended]
        plan = search.plan
        self._grid = None
        if plan.algorithm == GRID:
            self._grid = grid_points(plan.space, plan.bases, plan.budget, plan.max_parameters)
        for trial in own:
            if trial.baseline is not None:
                self._baselines[_samples_of(trial.config)] = trial.baseline
            if trial.ended:
                add_to_study(self.study, trial, search.plan.search_objective)
                self._recall(f"known-{trial.name}", trial)

    def trial(self, trial_id: str) -> Trial:
        """Return our trial for one of Tune's trial ids."""
        return self._by_tune[trial_id]

    def location(self, trial: Trial) -> Storage:
        """Return the storage of a trial."""
        return self.records.location(trial.identity)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the arguments of the trainable for Tune's next trial.

        Return ``FINISHED`` if the sampler fails. Return None while MLflow is unavailable, or while the next trial
        depends on a running one: Tune asks again, and running trials continue.
        """
        if time.monotonic() < self._ask_again:
            return None
        trial = self._next = self._next or self._drawn_trial()
        if trial is None:
            return self.FINISHED if self.failure is not None or self.extinct else None
        try:
            with patience(0):
                run = self._open_run(trial)
        except TRACKING_ERRORS as error:
            self._wait_for_tracking(error)
            return None if self.failure is None else self.FINISHED
        self._next, self._away_since = None, math.inf
        self._by_tune[trial_id] = trial
        self._recall(trial_id, trial)
        search, location = self.search, self.location(trial)
        trial.run = run.address()
        write_run_address(location, run)
        if refused := trial.ended:
            write_failure(location, trial.reason)
        job = Job(
            config=to_dict(trial.config),
            corpus=search.workspace.corpus_address(trial.config),
            storage=location.uri(),
            tracking=asdict(run),
            cpus=search.worker_spec.cpus,
            draws=search.plan.search_objective.draws,
            baseline=trial.baseline,
            fence=search.lease.fence.address(),
            reported=trial.step,
            losses=trial.confirms is not None,
            end=trial.end,
            origin=self.records.location(trial.continues).uri() if trial.continues else None,
        )
        return {
            "job": asdict(job),
            "worker_spec": asdict(search.worker_spec),
            "name": search.name,
            "scratch": self.scratch,
            "refused": refused,
        }

    def begin_confirmation(self) -> int:
        """Make the confirming trials the next ones; return how many of them have not ended.

        Call it when all other trials have ended, since these decide which configs are confirmed. Confirming trials that
        were begun before the search was resumed are included, unless their config can no longer win.
        """
        plan = self.search.plan
        self.trials += new_repeats(plan, self.trials)
        self.repeats = wanted_repeats(plan, self.trials)
        self._again = [trial for trial in self.repeats if not trial.ended]
        return len(self._again)

    def ladder(self, config: RunConfig[Any]) -> Ladder:
        """Return the byte n-grams on the validation samples of a trial of ``config``, as far as they are fast."""
        samples = _samples_of(config)
        if samples not in self._ladders:
            in_bytes = replace(config, vocabulary="byte")  # n-grams of pieces are counted once the trials have ended
            self._ladders[samples] = validation_ladder(self.search.workspace.corpus, in_bytes, quick=True)
        return self._ladders[samples]

    def _drawn_trial(self) -> Trial | None:
        """Return the next trial after recording it: a trial that was drawn is never drawn differently.

        Return None if drawing fails, or if other trials must end first.
        """
        try:
            if self._again:
                trial = self._resume(self._again.pop(0))
            elif not self.search.plan.parts:
                trial = self._draw()
            elif (part := next_part(self.search.plan, self.trials)) is not None:
                trial = self._draw_part(part)
            else:
                return None
            self.search.workspace.share_vocabulary(trial.config)
        except LeaseLostError:
            raise
        except ExtinctError as error:
            if not self.extinct:
                self.extinct = str(error)
                LOG.warning("%s; the search ends with what it has", error)
            return None
        except Exception as error:  # whatever the sampler of a plugin raises
            self.failure = self.failure or error
            return None
        self.records.add(trial)
        return trial

    def _open_run(self, trial: Trial) -> Run:
        """Return the MLflow run of a trial; a run that somebody has deleted stays deleted."""
        search = self.search
        parent = search.parent.run_id
        if trial.run and (deleted := search.experiment.deleted_run(trial.identity, parent)) is not None:
            return deleted
        run = search.experiment.open_run(
            trial.identity,
            f"{trial.name} {search.name}",
            parent=parent,
            config=to_dict(trial.config),
            parameters=flatten(trial.config),
            tags={
                "kind": "trial",
                "corpus": search.workspace.corpus.digest,
                "seed": str(trial.config.seed),
                "trial": str(trial.number),
                "location": self.location(trial).uri(),
            }
            | ({"started_from": trial.origin} if trial.origin else {})
            | ({} if trial.confirms is None else {"confirms": str(trial.confirms)})
            | ({} if trial.member is None else {"member": str(trial.member)}),
        )
        search.workspace.log_corpus(run)
        return run

    def _wait_for_tracking(self, error: Exception) -> None:
        """Hold back new trials while MLflow is unavailable, up to ``AWAY_S``; end the search if MLflow refuses them."""
        now = time.monotonic()
        if is_gone(error):
            experiment = self.search.experiment
            self.failure = UserError(
                f"experiment {experiment.name!r} has been deleted in MLflow: restore it with "
                f"`mlflow experiments restore --experiment-id {experiment.experiment_id}`"
            )
        elif not is_transient(error):
            self.failure = UserError(f"MLflow refuses a new trial: {explain(error)}")
        elif now > self._away_since + AWAY_S:
            self.failure = UserError(f"MLflow was away for {AWAY_S / 60:.0f} minutes: {explain(error)}")
        elif self._away_since == math.inf:
            self._away_since = now
            LOG.warning("MLflow cannot be used now (%s); new trials wait for it", explain(error))
        self._ask_again = time.monotonic() + ASK_AGAIN_S

    def _baseline(self, config: RunConfig[Any]) -> float:
        """Return the bits per byte of the n-gram that a trial of ``config`` must beat in time.

        A resumed search takes it from the records of its trials. It therefore stops the same ones, even if the ladder
        is measured differently now.
        """
        samples = _samples_of(config)
        if samples not in self._baselines:
            self._baselines[samples] = self.ladder(config).baseline
        return self._baselines[samples]

    def _draw(self) -> Trial:
        """Return a new trial: first one for each warm-start config, then at the next point of the space."""
        plan, number = self.search.plan, len(searched(self.trials))
        if number < len(plan.warm_starts):
            start = plan.warm_starts[number]
            values = point_of(start, plan.space, plan.bases, plan.budget)
            return self._add(start.config, None if values is None else self._known_point(values), start.reference)
        number -= len(plan.warm_starts)
        for attempt in range(MOST_DRAWS):
            values = self._given_point(number, attempt)
            with self._at_random() if attempt >= DRAWS_OF_SAMPLER else contextlib.nullcontext():
                point = self._ask(values)
                try:
                    config = plan.space.resolve(plan.bases, point, plan.budget)
                    check_choices(point.distributions)
                except (Exception, SystemExit) as error:  # anything that a user's file raises is the user's mistake
                    raised = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
                    return self._add_refused(point, f"search space {plan.space.name}: {raised}{error}")
            if plan.fits(config):
                return self._add(config, point)
            self.study.tell(point, state=optuna.trial.TrialState.FAIL)  # samplers ignore failed trials
        raise UserError(
            f"--max-parameters {plan.max_parameters}: none of {MOST_DRAWS} points that were drawn one after the other "
            "has so few"
        )

    def _given_point(self, number: int, attempt: int) -> dict[str, Any] | None:
        """Return the parameters of a trial that no sampler draws: a point of the grid, or the start of the space.

        Args:
            number: number of trials before it, without warm starts.
            attempt: number of points already drawn for it whose models had too many parameters.
        """
        if self._grid is not None:
            return self._grid[number % len(self._grid)]
        plan = self.search.plan
        begins = not plan.warm_starts and not plan.earlier  # the start may be known, or be worse than known points
        return plan.space.start if begins and number == attempt == 0 else None

    def _draw_part(self, part: Part) -> Trial:
        """Return the next part of a member of a population."""
        if (successor := part.successor) is None:
            # seeded by the member alone: a resumed search then draws the others like the search before it
            self.study.sampler = self._random = optuna.samplers.RandomSampler(seed=self.search.plan.seed + part.member)
            trial = self._draw()
        else:
            trial = self._add(successor.config, None)
            trial.params, trial.distributions = successor.params, successor.parent.distributions
            trial.continues, trial.step = successor.parent.identity, successor.step
        trial.member, trial.end = part.member, part.end
        return trial

    @contextlib.contextmanager
    def _at_random(self) -> Iterator[None]:
        """Draw at random inside the block: a sampler may insist on a region that it knows nothing against."""
        sampler = self.study.sampler
        self.study.sampler = self._random
        try:
            yield
        finally:
            self.study.sampler = sampler

    def _ask(self, values: dict[str, Any] | None) -> optuna.Trial:
        """Return Optuna's next trial, at ``values`` if given."""
        if values is not None:
            self.study.enqueue_trial(values)
        return self.study.ask()

    def _known_point(self, values: dict[str, Any]) -> optuna.Trial:
        """Return Optuna's trial at the point of an already known config."""
        plan, point = self.search.plan, self._ask(values)
        with contextlib.suppress(Exception, SystemExit):  # called only so that it asks for its parameters
            plan.space.resolve(plan.bases, point, plan.budget)
        return point

    def _add_refused(self, point: optuna.Trial, reason: str) -> Trial:
        """Return a failed trial in place of one at a point from which the space makes no config."""
        trial = self._add(next(iter(self.search.plan.bases.values())), None)
        # failed from the start: if the search dies now, nothing is trained under its name
        trial.status, trial.reason = "failed", " ".join(reason.split())
        self._points[trial.identity] = point
        return trial

    def _add(self, config: RunConfig[Any], point: optuna.Trial | None, origin: str = "") -> Trial:
        # the same point can be drawn again, so each run has its own identity
        own = new_identity()
        base = self.search.plan.bases[config.model_name]
        before, after = flatten(in_force(base, base.steps)), flatten(in_force(config, config.steps))
        kinds = {} if point is None else point.distributions
        trial = Trial(
            number=len(self.trials),
            identity=own,
            config=config,
            params={} if point is None else dict(point.params),
            distributions={name: optuna.distributions.distribution_to_json(kind) for name, kind in kinds.items()},
            fields={name: value for name, value in after.items() if value != before[name]},
            baseline=self._baseline(config),
            origin=origin,
        )
        self.trials.append(trial)
        if point is not None:
            self._points[own] = point
        return trial

    def _resume(self, trial: Trial) -> Trial:
        """Return a trial that was begun before the search was resumed, at its own point."""
        if trial.on_the_space:
            self._points[trial.identity] = self._known_point(trial.params)
        return trial

    def _recall(self, trial_id: str, trial: Trial) -> None:
        if isinstance(self.scheduler, Recalls) and trial.confirms is None:
            self.scheduler.recall(trial_id, trial.history)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Pass an evaluation on to Optuna. Tune also calls this when a trial ends without one."""
        if METRIC not in result:
            return
        identity, search_objective = self._by_tune[trial_id].identity, self.search.plan.search_objective
        point, evaluation = self._points.get(identity), (identity, int(result["step"]))
        # Optuna accepts no intermediate values with two objectives, and warns of one that it has
        if point is not None and len(search_objective.directions) == 1 and evaluation not in self._reported:
            self._reported.add(evaluation)
            point.report(search_objective.score(result), evaluation[1])

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Do nothing: ``TrialRecorder`` calls ``ended`` once the trial's record says how it ended."""

    def ended(self, trial: Trial) -> None:
        """Report the result of a trial to Optuna."""
        point = self._points.get(trial.identity)
        if point is not None and trial.ended:
            search_objective = self.search.plan.search_objective
            state, values = optuna_result(trial, search_objective)
            try:
                set_constraints(point, trial, search_objective)
                self.study.tell(point, values, state=state)
            except Exception as error:  # anything that a plugin's sampler raises: Tune would wait for ever
                self.failure = self.failure or error

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its settings for snapshots, which are not used

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the trials' records hold all that a search knows, and Tune's snapshots are not used."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a search is not restored from Tune's snapshots")


def _samples_of(config: RunConfig[Any]) -> tuple[Any, ...]:
    """Return the settings that determine the validation samples of a run."""
    return config.sampling, config.pool_bytes, config.length, config.evaluate_samples

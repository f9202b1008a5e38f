"""End of a search: the table of its trials, its report, its best model, and that model's registration."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError
from mlflow.exceptions import MlflowException

from raytrain.analysis.figures.records import CURVE
from raytrain.analysis.search_report import CONFIRMATION, LADDER, write_search_report
from raytrain.analysis.tables import (
    confirmation_summary,
    markdown_confirmation,
    markdown_table,
    remarks,
    search_summary,
    short,
)
from raytrain.config.schema import RunConfig, flatten, to_dict
from raytrain.metrics import (
    LIKELIHOOD,
    METRIC,
    METRICS,
    REQUIRED_METRICS,
    SearchObjective,
    code_use,
    headline,
    known_metrics,
    pareto_front,
    shown_metrics,
)
from raytrain.models.ladder import Ladder, validation_ladder
from raytrain.models.sampling import sample_text
from raytrain.runs import checkpoint
from raytrain.runs.checkpoint import Checkpoint
from raytrain.runs.records import BEST_CONFIG, CHECKPOINTS, read_outcome
from raytrain.runs.repeats import best_first, searched, winner
from raytrain.runs.trained_model import from_checkpoint
from raytrain.runs.trials import Trial, rank, trial_location
from raytrain.search.ablation import effects, effects_json
from raytrain.search.confirmation import Confirmation, confirmation_of, new_repeats, wanted_repeats
from raytrain.search.population import is_extinct
from raytrain.search.registry import Candidate, Score, VerificationError, register_and_compete
from raytrain.search.searcher import Search
from raytrain.search.winner import BEST_TRIAL
from raytrain.storage.base import retry_storage
from raytrain.tracking.client import TRACKING_ERRORS, explain, patience
from raytrain.tracking.logged_model import log_model
from raytrain.tracking.outbox import SAMPLES
from raytrain.tracking.views import share_view
from raytrain.utils.errors import UserError
from raytrain.utils.text import duration, one_line

WIDTH = 100
"""Line width when printing the best trial's fields."""
ABLATION = "ablation.json"
"""Artifact of an ablation: see ``search.ablation``."""
CARD_SAMPLES = 10
"""Number of texts sampled from the best model for the terminal, MLflow and the model card."""


def finish(search: Search, trials: list[Trial], seconds: float) -> None:
    """Print and log the result of a search, and let its best model compete for champion.

    Raises:
        UserError: no trial left a checkpoint, or registering the best model failed.
    """
    search_objective, confirm = search.plan.search_objective, search.plan.confirm
    confirmation = confirmation_of(search.plan, trials, search.location)
    won = winner(trials, search_objective, confirm)
    ladder = None if won is None else validation_ladder(search.workspace.corpus, won.config)
    print(search_summary(trials, search_objective, won, ladder))
    if confirmation is not None:
        print("\n".join([confirmation_summary(confirmation.configs, search_objective), *confirmation.lines()]))
        search.parent.log_dict(confirmation.to_json(), CONFIRMATION)
    if ladder is not None:
        search.parent.set_tags({LADDER: json.dumps(asdict(ladder))})
    with tempfile.TemporaryDirectory(prefix="raytrain-") as scratch:
        file = Path(scratch) / "trials.parquet"
        write_table(trials, search_objective, file)
        search.parent.log_file(file)
    if confirmation is not None and not confirmation.ended:
        finish_unconfirmed(search, trials)
        return
    if search.plan.ablates:
        finish_ablation(search, trials)
        return
    with reported_on_failure(search):
        found = best_checkpoint(search, trials)
    if found is None or ladder is None:
        finish_without_winner(search, trials, confirmation)
        return
    best, stored = found
    print(f"best trial {best.name} of {len(trials)} in {duration(seconds)}")
    comparison = ladder.comparison(best.best[METRIC])
    samples = print_best(search, best, stored, comparison)
    search.parent.log_text("".join(one_line(text) + "\n" for text in samples), SAMPLES)
    search.parent.log_dict(to_dict(best.config), BEST_CONFIG)
    search.parent.set_tags({BEST_TRIAL: best.name})
    card = model_card(search, best, samples, comparison, confirmation)
    with reported_on_failure(search):
        name, version, alias = register(search, best, stored, card)
    fields = list(dict.fromkeys(name for trial in trials for name in trial.fields))
    columns = [metric.key for metric in shown_metrics(trial.best for trial in trials)]
    view = share_view(search.parent, f"{search.name}: best trials first", columns, fields)
    link = view[view.index("#/") :]  # relative, since the page may be reached under several addresses
    model = f"models:/{name}@{alias} (version {version})"
    search.parent.describe(description(search, trials, best, ladder, model, link, seconds, confirmation))
    end(search, trials)
    print(f"model: {model}")
    print(f"checkpoint: {stored.uri}{computed_in(search, best)}")
    print(f"trials: {view}")
    print(f"view: {search.parent.ui_hint()}")


def best_checkpoint(search: Search, trials: list[Trial]) -> tuple[Trial, Checkpoint] | None:
    """Return the best trial that may win and left a checkpoint, and its best checkpoint; ``None`` if none may win.

    If the search confirms its winner, the trial is the best seed of the confirmed winner. The trial's metrics are those
    of that checkpoint, even if the checkpoint of a better evaluation was lost.

    Raises:
        UserError: no trial left a checkpoint.
    """
    search_objective = search.plan.search_objective
    confirm = search.plan.confirm
    evaluated = [trial for trial in best_first(trials, search_objective, confirm) if trial.best]
    if evaluated and confirm is not None and winner(trials, search_objective, confirm) is None:
        return None
    for trial in evaluated:
        location = trial_location(search.location, trial.identity).child(CHECKPOINTS)
        if (stored := retry_storage(partial(checkpoint.best, location))) is not None:
            trial = dataclasses.replace(trial, best=known_metrics(stored.evaluation))
            # the trials are ranked: if this one may not win, none may
            return (trial, stored) if search_objective.may_win(trial.best) else None
    reasons = sorted({trial.reason or trial.status for trial in trials})
    raise UserError(f"no trial left a checkpoint ({'; '.join(reasons)}); view: {search.parent.ui_hint()}")


def finish_unconfirmed(search: Search, trials: list[Trial]) -> None:
    """End a search that ran out of time before its winner was confirmed: no model is registered."""
    describe_unregistered(search, trials, "the winner is not confirmed: no model is registered")
    end(search, trials)
    print(f"view: {search.parent.ui_hint()}")


def finish_ablation(search: Search, trials: list[Trial]) -> None:
    """Print and log the effect of each field of the ablated winner; an ablation registers no model."""
    found = effects(search.plan, trials, search.location)
    heading = f"the winner of {search.plan.ablates} with the default in place of a field:"
    print("\n".join([heading, *map("  {}".format, found)]))
    search.parent.log_dict({"effects": effects_json(found)}, ABLATION)
    table_of_trials = markdown_table(rank(trials, search.plan.search_objective))
    search.parent.describe("\n".join([heading, "", *map("- {}".format, found), "", table_of_trials]))
    end(search, trials)
    print(f"view: {search.parent.ui_hint()}")


def finish_without_winner(search: Search, trials: list[Trial], confirmation: Confirmation | None = None) -> None:
    """End a search in which no trial, or no confirmed config, met the constraint: no model is registered."""
    largest = max(code_use(trial.best) for trial in trials if trial.best)
    text = (
        f"no trial uses at least {search.plan.min_used:g} nats of its code (the most is {largest:.2f}): "
        "no model is registered"
    )
    if confirmation is not None and confirmation.configs:
        text = f"{confirmation.sentence}: no model is registered"
    describe_unregistered(search, trials, text)
    end(search, trials)
    if not search.plan.parts and not unfinished(search, trials):
        print(f"try more trials with: {search.resume_command} --num-samples N")
    print(f"view: {search.parent.ui_hint()}")


def describe_unregistered(search: Search, trials: list[Trial], text: str) -> None:
    """Print why no model of a search is registered, and put it at the top of the search's page in MLflow."""
    print(text)
    why = unfinished(search, trials)
    lines = [_sentence(text), *([f"{_sentence(why)} Go on with `{search.resume_command}`."] if why else [])]
    table_of_trials = markdown_table(rank(trials, search.plan.search_objective))
    search.parent.describe("\n".join([*lines, "", table_of_trials]))


def log_report(search: Search) -> None:
    """Draw and log the report of a search; for a large search this takes longer than everything else."""
    with tempfile.TemporaryDirectory(prefix="raytrain-") as scratch:
        write_search_report(search.parent, Path(scratch) / "report")


@contextlib.contextmanager
def reported_on_failure(search: Search) -> Iterator[None]:
    """Log the report of a search even if the block raises ``UserError``; re-raise the error."""
    try:
        yield
    except UserError:
        # MLflow may be what failed: do not wait for it again, and do not let its error replace the first
        with contextlib.suppress(*TRACKING_ERRORS, UserError), patience(0):
            log_report(search)
        raise


def end(search: Search, trials: list[Trial]) -> None:
    """Log the report of a search and end its MLflow run; if its time ran out, print how to resume it."""
    log_report(search)
    if why := unfinished(search, trials):
        search.parent.finish("KILLED", f"{why}; go on with {search.resume_command}")
        print(f"{why}\ngo on with: {search.resume_command}")
    else:
        search.parent.finish("FINISHED")


def unfinished(search: Search, trials: list[Trial]) -> str:
    """Return what a search that ran out of time has left to do; empty if it has finished.

    Repeats that are no longer wanted need not end. The number of new repeats is known only once all other trials have
    ended, since their results decide it.
    """
    plan, own = search.plan, searched(trials)
    unended = [trial.name for trial in (*own, *wanted_repeats(plan, trials)) if not trial.ended]
    num_left = 0 if is_extinct(plan, trials) else plan.num_samples - len(own)
    if num_left <= 0 and all(trial.ended for trial in own):
        num_left = len(new_repeats(plan, trials))
    parts = [f"trials {', '.join(unended)} have not ended"] if unended else []
    parts += [f"{num_left} more {'has' if num_left == 1 else 'have'} not begun"] if num_left > 0 else []
    return f"the time budget is used up: {', '.join(parts)}" if parts else ""


def print_best(search: Search, best: Trial, stored: Checkpoint, comparison: str) -> list[str]:
    """Print the fields, metrics and samples of the best trial, and how it compares; return the samples."""
    samples = sample_text(from_checkpoint(stored), CARD_SAMPLES, seed=search.plan.seed)
    line = ""
    for name, value in best.fields.items():
        setting = f"{name} = {short(value)}"
        if line and len(line) + len(setting) > WIDTH:
            print(line)
            line = ""
        line += ("   " if line else "  ") + setting
    print("\n".join(filter(None, (line, headline(best.best), comparison))))
    print("\n".join(f"  {sample!r}" for sample in samples))
    return samples


def computed_in(search: Search, best: Trial) -> str:
    """Return the compute type and the device of a trial as text; empty if its outcome does not record them.

    A trial that ASHA stopped has no outcome. If it later failed or was stopped early, its outcome only has a reason.
    """
    outcome = read_outcome(trial_location(search.location, best.identity).uri())
    if outcome is None or "precision" not in outcome:
        return ""
    return f" (computed in {outcome['precision']} on {outcome['device']})"


def register(search: Search, best: Trial, stored: Checkpoint, card: str) -> tuple[str, int, str]:
    """Log the checkpoint as the search's model and register it; return the registered name, version and alias.

    Raises:
        UserError: the store was unavailable for too long, or the model loaded back differs from the checkpoint.
    """
    metrics = {name: value for name, value in best.best.items() if math.isfinite(value)}
    again = f"{search.resume_command} tries again"
    try:
        with tempfile.TemporaryDirectory(prefix="raytrain-") as scratch:
            folder = checkpoint.export(stored, Path(scratch))
            logged = {f"best/{name}": value for name, value in metrics.items()}
            model_id = log_model(search.parent, folder, card=card, metrics=logged, step=stored.step)
        return register_and_compete(
            Candidate(
                run=search.parent,
                model_id=model_id,
                stored=stored,
                corpus=search.workspace.corpus,
                score=score_of(best.config, search.plan.corpus, best.best[METRIC]),
                metrics=metrics,
                card=card,
            )
        )
    except VerificationError as error:
        raise UserError(f"the best model was not promoted: {error}; {again}") from None
    except (MlflowException, OSError, Boto3Error, BotoCoreError, ClientError) as error:
        raise UserError(
            f"the best model was not registered: {explain(error)}; its checkpoint is {stored.uri}; {again}"
        ) from None


def score_of(config: RunConfig[Any], corpus: str, value: float) -> Score:
    """Return the score of a model: bits per byte on the validation samples that its config specifies."""
    samples = f"{config.evaluate_samples} " if config.evaluate_samples else "all "
    part = f", pools of {config.pool_bytes}" if config.pool_bytes else ""
    return Score(corpus, f"valid/{METRIC}, {samples}{config.samples_noun} of {config.length}{part}", value)


def description(
    search: Search,
    trials: list[Trial],
    best: Trial,
    ladder: Ladder,
    model: str,
    view: str,
    seconds: float,
    confirmation: Confirmation | None = None,
) -> str:
    """Return the text at the top of the search's page in MLflow, in Markdown."""
    search_objective = search.plan.search_objective
    why = unfinished(search, trials)
    lines = [
        *([f"{_sentence(why)} Go on with `{search.resume_command}`."] if why else []),
        f"Best trial {best.name}: {headline(best.best)}; {model}.",
        f"Compared with counting: {ladder.comparison(best.best[METRIC])}.",
        f"[All {len(trials)} trials, best first]({view}); space `{search.plan.space.name}`, corpus "
        f"{search.workspace.corpus.name}, {duration(seconds)}.",
        f"Objective: {search_objective}.",
        *([] if confirmation is None else map(_sentence, confirmation.lines())),
        *remarks(trials, search_objective, ladder, best),
        "",
        markdown_table(rank(trials, search_objective)),
    ]
    if search_objective.objective == "pareto":
        front = pareto_front(searched(trials), Trial.point)
        lines += ["", "Pareto front of negative ELBO and use of the code:", "", markdown_table(front)]
    return "\n".join(lines)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def model_card(
    search: Search, best: Trial, samples: list[str], comparison: str, confirmation: Confirmation | None = None
) -> str:
    """Return the model card of the search's best model, in Markdown."""
    config, corpus = best.config, search.workspace.corpus
    metrics = [f"{metric.label}: {metric.format(best.best)} {metric.unit}" for metric in shown_metrics([best.best])]
    lines = [
        # plain words first: the registry's table shows only the beginning, without rendering Markdown
        f"{config.model_name} on {corpus.name}: {headline(best.best)} on the validation split. "
        f"The best model of the search `{search.name}`.",
        "",
        "## Data",
        "",
        f"Corpus {corpus.name}, digest {corpus.digest}: {corpus.split('train').num_documents:,} documents and "
        f"{corpus.split('train').num_bytes:,} bytes to train on.",
        "",
        "## Metrics",
        "",
        *(f"- {text}" for text in (*metrics, comparison)),
        "",
        *([] if confirmation is None else _confirmation_section(best, confirmation)),
        "## Limits",
        "",
        "The text is drawn from a small model and is often false or meaningless; a model trained on public "
        "tweets may write what is offensive.",
        "",
        "## Samples",
        "",
        *(f"    {sample!r}" for sample in samples),
        "",
        "## Config",
        "",
        *(f"- {name}: {value}" for name, value in flatten(config).items()),
    ]
    return "\n".join(lines) + "\n"


def _confirmation_section(best: Trial, confirmation: Confirmation) -> list[str]:
    """Return the lines of a model card that describe how the model was confirmed."""
    return [
        "## Confirmation",
        "",
        f"Of {confirmation.rule}. This model is the best seed of the winner, seed {best.config.seed}; the winner was "
        "chosen by the mean over its seeds.",
        "",
        *(f"- {line}" for line in confirmation.lines()),
        "",
        markdown_confirmation(confirmation.configs, confirmation.search_objective),
        "",
    ]


# --------------------------------------------------------------------------------------------- table


def table(trials: list[Trial], search_objective: SearchObjective) -> dict[str, list[Any]]:
    """Return the columns of ``trials.parquet``, which has one row per trial."""
    own = searched(trials)
    repeats = [trial for trial in trials if trial.confirms is not None]
    order = [*rank(own, search_objective), *rank(repeats, search_objective)]
    ranks = {trial.number: place for place, trial in enumerate(order, 1)}
    front = {trial.number for trial in pareto_front(own, Trial.point)}
    metrics = [key for key in METRICS if key in REQUIRED_METRICS or any(key in trial.best for trial in trials)]
    rows = [{**_row(trial, metrics), "rank": ranks[trial.number], "front": trial.number in front} for trial in trials]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _row(trial: Trial, metrics: list[str]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "number": trial.number,
        "name": trial.name,
        "run_id": trial.run.get("run_id", ""),
        "status": trial.status,
        "reason": trial.reason,
        "origin": trial.origin,
        "confirms": "" if trial.confirms is None else f"{trial.confirms:03}",
        "model": trial.config.model_name,
        "length": trial.config.length,
        "seed": trial.config.seed,
        "step": trial.step,
        "steps": trial.last_step,
        "seconds": trial.seconds,
        "started_at": trial.started_at,
        "ended_at": trial.ended_at,
    }
    row |= {} if trial.member is None else {"member": trial.member}
    row |= {key: trial.best.get(key) for key in metrics}
    # a column has one type: values of several kinds, and lists, go in as text
    row |= {f"{CURVE}{name}": [entry.get(name) for entry in trial.history] for name in _evaluated(trial)}
    row |= {f"param/{name}": value for name, value in trial.params.items()}
    return row | {f"field/{name}": _plain(value) for name, value in trial.fields.items()}


def _evaluated(trial: Trial) -> list[str]:
    """Return the keys that a trial's history records for each evaluation."""
    return [
        name for name in ("step", METRIC, LIKELIHOOD, "kl", "used") if any(name in entry for entry in trial.history)
    ]


def _plain(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (list, tuple, dict)) else value


def write_table(trials: list[Trial], search_objective: SearchObjective, file: Path) -> None:
    """Write a Parquet file with one row per trial. A column with values of several types is written as text."""
    import pyarrow
    import pyarrow.parquet

    columns = {}
    for name, values in table(trials, search_objective).items():
        kinds = {type(value) for value in values if value is not None}
        mixed = len(kinds) > 1 and not kinds <= {int, float}
        columns[name] = [None if value is None else json.dumps(value) for value in values] if mixed else values
    pyarrow.parquet.write_table(pyarrow.table(columns), file)

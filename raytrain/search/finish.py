"""What a search leaves behind: a table of its trials, its best model, and that model's place in the registry."""

from __future__ import annotations

import json
import math
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError
from mlflow.exceptions import MlflowException

from raytrain.analysis.search_report import write_search_report
from raytrain.analysis.tables import markdown_table, remarks, search_summary
from raytrain.config.schema import RunConfig, flatten, to_dict
from raytrain.metrics import LIKELIHOOD, METRIC, METRICS, REQUIRED_METRICS, SearchObjective, pareto_front, shown_metrics
from raytrain.models.sampling import sample_text
from raytrain.runs import checkpoint
from raytrain.runs.checkpoint import Checkpoint
from raytrain.runs.records import CHECKPOINTS, read_outcome
from raytrain.runs.references import from_checkpoint
from raytrain.runs.trials import Trial, rank, trial_location
from raytrain.search.registry import Score, VerificationError, register_and_compete
from raytrain.search.searcher import Search
from raytrain.search.winner import BEST_CONFIG, BEST_TRIAL
from raytrain.storage.base import retry_storage
from raytrain.tracking.client import explain
from raytrain.tracking.logged_model import log_model
from raytrain.tracking.views import share_view
from raytrain.utils.errors import UserError
from raytrain.utils.text import duration, one_line

CARD_SAMPLES = 10


def finish(search: Search, trials: list[Trial], seconds: float) -> None:
    """Say what was found, keep it in MLflow, and let the best model compete for champion.

    Raises:
        UserError: no trial left a checkpoint, or the best model could not be registered.
    """
    search_objective = search.plan.search_objective
    print(search_summary(trials, search_objective))
    with tempfile.TemporaryDirectory(prefix="raytrain-") as scratch:
        file = Path(scratch) / "trials.parquet"
        write_table(trials, search_objective, file)
        search.parent.log_file(file)
        write_search_report(search.parent, Path(scratch) / "report")
    found = best_checkpoint(search, trials)
    if found is None:
        finish_without_winner(search, trials)
        return
    best, stored = found
    print(f"best trial {best.name} of {len(trials)} in {duration(seconds)}:")
    samples = print_best(search, best, stored)
    search.parent.log_text("".join(one_line(text) + "\n" for text in samples), "samples.txt")
    search.parent.log_dict(to_dict(best.config), BEST_CONFIG)
    search.parent.set_tags({BEST_TRIAL: best.name})
    card = model_card(search, best, samples)
    read_score = register(search, best, stored, card)
    fields = list(dict.fromkeys(name for trial in trials for name in trial.fields))
    columns = [metric.key for metric in shown_metrics(trial.best for trial in trials)]
    view = share_view(search.parent, f"{search.name}: best trials first", columns, fields)
    link = view[view.index("#/") :]  # relative: the page may be reached under several addresses
    search.parent.describe(description(search, trials, best, read_score, link, seconds))
    end(search, trials)
    print(f"checkpoint: {stored.uri}")
    print(f"model: {read_score}")
    print(f"trials: {view}")
    print(f"see it: {search.parent.ui_hint()}")


def best_checkpoint(search: Search, trials: list[Trial]) -> tuple[Trial, Checkpoint] | None:
    """The best trial that may win and left a checkpoint, and the best one that it left; ``None`` if none may win.

    Raises:
        UserError: no trial left a checkpoint.
    """
    search_objective = search.plan.search_objective
    left = [trial for trial in rank(trials, search_objective) if trial.best]
    for trial in left:
        location = trial_location(search.location, trial.identity).child(CHECKPOINTS)
        if (stored := retry_storage(partial(checkpoint.best, location))) is not None:
            # they are in order: if this one may not win, none may
            return (trial, stored) if search_objective.may_win(trial.best) else None
    reasons = sorted({trial.reason or trial.status for trial in trials})
    raise UserError(f"no trial left a checkpoint ({'; '.join(reasons)}); see {search.parent.ui_hint()}")


def finish_without_winner(search: Search, trials: list[Trial]) -> None:
    """End a search in which no trial has the KL that was asked for: nothing is registered."""
    largest = max(trial.best["kl"] for trial in trials if trial.best)
    text = (
        f"no trial has a KL of at least {search.plan.min_kl:g} nats (the largest is {largest:.2f}): "
        "no model is registered"
    )
    search.parent.describe(f"{text}.\n\n{markdown_table(rank(trials, search.plan.search_objective))}")
    end(search, trials)
    print(f"{text}; {search.resume_command} --num-samples N tries more")
    print(f"see it: {search.parent.ui_hint()}")


def end(search: Search, trials: list[Trial]) -> None:
    """End the search's MLflow run."""
    unended = [trial.name for trial in trials if not trial.ended]
    if unended:
        search.parent.finish("KILLED", f"time was up; trials {', '.join(unended)} are not at their end")
    else:
        search.parent.finish("FINISHED")


def print_best(search: Search, best: Trial, stored: Checkpoint) -> list[str]:
    """Print the best trial's settings, figures and samples; returns the samples."""
    samples = sample_text(from_checkpoint(stored), CARD_SAMPLES, seed=search.plan.seed)
    metrics = best.best
    for name, value in best.fields.items():
        print(f"  {name} = {value}")
    print(
        f"bound {metrics['bits_per_byte']:.3f} bits/byte ({metrics['bound']:.1f} nats a sample), "
        f"KL {metrics['kl']:.2f} nats, {metrics.get('active_units', 0):.0f} active units"
        + (f"; likelihood {metrics[LIKELIHOOD]:.3f} bits/byte" if LIKELIHOOD in metrics else "")
    )
    # one that was stopped has no outcome, and one that failed or became hopeless later only the reason
    outcome = read_outcome(trial_location(search.location, best.identity).uri())
    if outcome is not None and "precision" in outcome:
        print(f"computed in {outcome['precision']} on {outcome['device']}")
    print("samples:")
    print("\n".join(f"  {sample!r}" for sample in samples))
    return samples


def register(search: Search, best: Trial, stored: Checkpoint, card: str) -> str:
    """Log the checkpoint as the search's model and enter it in the registry; returns where it stands, in words.

    Raises:
        UserError: the store was away for too long, or the model did not load back as it was.
    """
    metrics = {name: value for name, value in best.best.items() if math.isfinite(value)}
    again = f"{search.resume_command} tries again"
    try:
        with tempfile.TemporaryDirectory(prefix="raytrain-") as scratch:
            folder = checkpoint.export(stored, Path(scratch))
            model_id = log_model(
                search.parent,
                folder,
                card=card,
                metrics={f"best/{key}": metrics[key] for key in metrics},
                step=stored.step,
            )
        read_score = score_of(best.config, search.plan.corpus, best.best[METRIC])
        name, version, alias = register_and_compete(
            search.parent, model_id, stored, search.workspace.corpus, read_score, metrics, card
        )
    except VerificationError as error:
        raise UserError(f"the best model was not promoted: {error}; {again}") from None
    except (MlflowException, OSError, Boto3Error, BotoCoreError, ClientError) as error:
        raise UserError(
            f"the best model was not registered: {explain(error)}; its checkpoint is {stored.uri}; {again}"
        ) from None
    return f"models:/{name}/{version}, {alias} (models:/{name}@{alias})"


def score_of(config: RunConfig[Any], corpus: str, value: float) -> Score:
    """What a model competes with: bits per byte on the validation samples that its config names."""
    samples = f"{config.evaluate_samples} " if config.evaluate_samples else "all "
    return Score(corpus, f"valid/{METRIC}, {samples}{config.sampling} of {config.length}", value)


def description(search: Search, trials: list[Trial], best: Trial, read_score: str, view: str, seconds: float) -> str:
    """What the UI shows at the top of the search's run, in Markdown."""
    metrics, search_objective = best.best, search.plan.search_objective
    lines = [
        f"Best is trial {best.name} with {metrics['bits_per_byte']:.3f} bits/byte and KL {metrics['kl']:.2f} nats: "
        f"{read_score}.",
        f"[All {len(trials)} trials, best first]({view}); space `{search.plan.space.name}`, corpus "
        f"{search.workspace.corpus.name}, {duration(seconds)}.",
        f"Looked for: {search_objective}.",
        *remarks(trials, search_objective),
        "",
        markdown_table(rank(trials, search_objective)),
    ]
    if search_objective.objective == "pareto":
        lines += ["", "On the front of bound and KL:", "", markdown_table(pareto_front(trials, Trial.point))]
    return "\n".join(lines)


def model_card(search: Search, best: Trial, samples: list[str]) -> str:
    """The model card of the search's best model, in Markdown."""
    metrics, config = best.best, best.config
    corpus = search.workspace.corpus
    lines = [
        # plain words first: the registry's table shows the beginning, and no Markdown
        f"{config.model_name} on {corpus.name}: bound {metrics['bits_per_byte']:.3f} bits per byte on the validation "
        f"split, KL {metrics['kl']:.2f} nats, {metrics.get('active_units', 0):.0f} active units. "
        f"The best of the search `{search.name}`.",
        "",
        "## Data",
        "",
        f"Corpus {corpus.name}, digest {corpus.digest}: {corpus.split('train').num_documents:,} documents and "
        f"{corpus.split('train').num_bytes:,} bytes to train on.",
        "",
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


def table(trials: list[Trial], search_objective: SearchObjective) -> dict[str, list[Any]]:
    """One row a trial, as columns: what ``trials.parquet`` holds."""
    ranks = {trial.number: place for place, trial in enumerate(rank(trials, search_objective), 1)}
    on_front = {trial.number for trial in pareto_front(trials, Trial.point)}
    metrics = [key for key in METRICS if key in REQUIRED_METRICS or any(key in trial.best for trial in trials)]
    rows = [
        {**_row(trial, metrics), "rank": ranks[trial.number], "front": trial.number in on_front} for trial in trials
    ]
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
        "model": trial.config.model_name,
        "length": trial.config.length,
        "seed": trial.config.seed,
        "step": trial.step,
        "steps": trial.config.steps,
        "seconds": trial.seconds,
        "started_at": trial.started_at,
        "ended_at": trial.ended_at,
    }
    row |= {key: trial.best.get(key) for key in metrics}
    # a column has one type: values of several kinds, and lists, go in as text
    row |= {f"param/{name}": value for name, value in trial.params.items()}
    return row | {f"field/{name}": _plain(value) for name, value in trial.fields.items()}


def _plain(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (list, tuple, dict)) else value


def write_table(trials: list[Trial], search_objective: SearchObjective, file: Path) -> None:
    """Write one row a trial to a Parquet file; a column of several kinds of value is written as text."""
    import pyarrow
    import pyarrow.parquet

    columns = {}
    for name, values in table(trials, search_objective).items():
        kinds = {type(value) for value in values if value is not None}
        mixed = len(kinds) > 1 and not kinds <= {int, float}
        columns[name] = [None if value is None else json.dumps(value) for value in values] if mixed else values
    pyarrow.parquet.write_table(pyarrow.table(columns), file)

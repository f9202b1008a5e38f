"""What a search leaves behind: a table of its trials, its best model, and that model's place in the registry."""

from __future__ import annotations

import math
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from raytrain import checkpoint
from raytrain.best_of import BEST_CONFIG, BEST_TRIAL
from raytrain.checkpoint import Checkpoint
from raytrain.config import RunConfig, flatten, to_dict
from raytrain.errors import UserError
from raytrain.goal import LIKELIHOOD, METRIC
from raytrain.models import one_line
from raytrain.progress import duration
from raytrain.reference import CHECKPOINTS
from raytrain.registry import Standing, VerificationError, enter
from raytrain.search import Search
from raytrain.search_report import write_search_report
from raytrain.storage import patiently
from raytrain.tables import markdown_table, remarks, summary
from raytrain.tracking import log_model
from raytrain.tracking.view import share_view
from raytrain.trials import Trial, pareto_front, place_of, rank, write_table
from raytrain.workers import read_outcome

CARD_SAMPLES = 10


def finish(search: Search, trials: list[Trial], seconds: float) -> None:
    """Say what was found, keep it in MLflow, and let the best model compete for champion.

    Raises:
        UserError: no trial left a checkpoint, or the best model could not be registered.
    """
    goal = search.plan.goal
    print(summary(trials, goal))
    with tempfile.TemporaryDirectory(prefix="raytrain-") as scratch:
        file = Path(scratch) / "trials.parquet"
        write_table(trials, goal, file)
        search.parent.log_file(file)
        write_search_report(search.parent, Path(scratch) / "report")
    found = best_checkpoint(search, trials)
    if found is None:
        finish_without_winner(search, trials)
        return
    best, stored = found
    print(f"best trial {best.name} of {len(trials)} in {duration(seconds)}:")
    samples = say_best(search, best, stored)
    search.parent.log_text("".join(one_line(text) + "\n" for text in samples), "samples.txt")
    search.parent.log_dict(to_dict(best.config), BEST_CONFIG)
    search.parent.set_tags({BEST_TRIAL: best.name})
    card = model_card(search, best, samples)
    standing = register(search, best, stored, card)
    fields = list(dict.fromkeys(name for trial in trials for name in trial.fields))
    view = share_view(search.parent, f"{search.name}: best trials first", fields)
    link = view[view.index("#/") :]  # relative: the page may be reached under several addresses
    search.parent.describe(description(search, trials, best, standing, link, seconds))
    end(search, trials)
    print(f"checkpoint: {stored.uri}")
    print(f"model: {standing}")
    print(f"trials: {view}")
    print(f"see it: {search.parent.ui_hint()}")


def best_checkpoint(search: Search, trials: list[Trial]) -> tuple[Trial, Checkpoint] | None:
    """The best trial that may win and left a checkpoint, and the best one that it left; ``None`` if none may win.

    Raises:
        UserError: no trial left a checkpoint.
    """
    goal = search.plan.goal
    left = [trial for trial in rank(trials, goal) if trial.best]
    for trial in left:
        place = place_of(search.place, trial.identity).child(CHECKPOINTS)
        if (stored := patiently(partial(checkpoint.best, place))) is not None:
            # they are in order: if this one may not win, none may
            return (trial, stored) if goal.reached(trial.best) else None
    reasons = sorted({trial.reason or trial.status for trial in trials})
    raise UserError(f"no trial left a checkpoint ({'; '.join(reasons)}); see {search.parent.ui_hint()}")


def finish_without_winner(search: Search, trials: list[Trial]) -> None:
    """End a search in which no trial has the KL that was asked for: nothing is registered."""
    largest = max(trial.best["kl"] for trial in trials if trial.best)
    text = (
        f"no trial has a KL of at least {search.plan.min_kl:g} nats (the largest is {largest:.2f}): "
        "no model is registered"
    )
    search.parent.describe(f"{text}.\n\n{markdown_table(rank(trials, search.plan.goal))}")
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


def say_best(search: Search, best: Trial, stored: Checkpoint) -> list[str]:
    """Print the best trial's settings, figures and samples; returns the samples."""
    from raytrain.models import from_checkpoint, sample_text

    samples = sample_text(from_checkpoint(stored), CARD_SAMPLES, seed=search.plan.seed)
    figures = best.best
    for name, value in best.fields.items():
        print(f"  {name} = {value}")
    print(
        f"bound {figures['bits_per_byte']:.3f} bits/byte ({figures['bound']:.1f} nats a sample), "
        f"KL {figures['kl']:.2f} nats, {figures['active_units']:.0f} active units"
        + (f"; likelihood {figures[LIKELIHOOD]:.3f} bits/byte" if LIKELIHOOD in figures else "")
    )
    # one that was stopped has no outcome, and one that failed or became hopeless later only the reason
    outcome = read_outcome(place_of(search.place, best.identity).uri())
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
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError
    from mlflow.exceptions import MlflowException

    from raytrain.tracking.server import explain

    figures = {name: value for name, value in best.best.items() if math.isfinite(value)}
    again = f"{search.resume_command} tries again"
    try:
        with tempfile.TemporaryDirectory(prefix="raytrain-") as scratch:
            folder = checkpoint.export(stored, Path(scratch))
            model_id = log_model(
                search.parent,
                folder,
                card=card,
                figures={f"best/{key}": figures[key] for key in figures},
                step=stored.step,
            )
        standing = standing_of(best.config, search.plan.corpus, best.best[METRIC])
        name, version, alias = enter(search.parent, model_id, stored, search.session.corpus, standing, figures, card)
    except VerificationError as error:
        raise UserError(f"the best model was not promoted: {error}; {again}") from None
    except (MlflowException, OSError, Boto3Error, BotoCoreError, ClientError) as error:
        raise UserError(
            f"the best model was not registered: {explain(error)}; its checkpoint is {stored.uri}; {again}"
        ) from None
    return f"models:/{name}/{version}, {alias} (models:/{name}@{alias})"


def standing_of(config: RunConfig[Any], corpus: str, value: float) -> Standing:
    """What a model competes with: bits per byte on the validation samples that its config names."""
    samples = f"{config.evaluate_samples} " if config.evaluate_samples else "all "
    return Standing(corpus, f"valid/{METRIC}, {samples}{config.sampling} of {config.length}", value)


def description(search: Search, trials: list[Trial], best: Trial, standing: str, view: str, seconds: float) -> str:
    """What the UI shows at the top of the search's run, in Markdown."""
    figures, goal = best.best, search.plan.goal
    lines = [
        f"Best is trial {best.name} with {figures['bits_per_byte']:.3f} bits/byte and KL {figures['kl']:.2f} nats: "
        f"{standing}.",
        f"[All {len(trials)} trials, best first]({view}); space `{search.plan.space.name}`, corpus "
        f"{search.session.corpus.name}, {duration(seconds)}.",
        f"Looked for: {goal}.",
        *remarks(trials, goal),
        "",
        markdown_table(rank(trials, goal)),
    ]
    if goal.objective == "pareto":
        lines += ["", "On the front of bound and KL:", "", markdown_table(pareto_front(trials))]
    return "\n".join(lines)


def model_card(search: Search, best: Trial, samples: list[str]) -> str:
    """The model card of the search's best model, in Markdown."""
    figures, config = best.best, best.config
    corpus = search.session.corpus
    lines = [
        # plain words first: the registry's table shows the beginning, and no Markdown
        f"{config.model_name} on {corpus.name}: bound {figures['bits_per_byte']:.3f} bits per byte on the validation "
        f"split, KL {figures['kl']:.2f} nats, {figures['active_units']:.0f} active units. "
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

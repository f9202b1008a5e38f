"""Tables for the terminal and for descriptions in MLflow: the trials of a search, and the evaluation of a model."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from io import StringIO
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from raytrain.metrics import (
    METRIC,
    METRICS,
    REQUIRED_METRICS,
    SearchObjective,
    collapse_warning,
    headline,
    pareto_front,
    shown_metrics,
)
from raytrain.models.ladder import Ladder
from raytrain.runs.repeats import Repeated, searched
from raytrain.runs.trials import Trial, rank
from raytrain.utils.output import console
from raytrain.utils.text import table as markdown

BEST_ROWS = 10
"""Number of best trials that the live table shows below the running ones."""
FEWEST_RUNNING, FRAME_ROWS = 4, 7
"""Running trials that the live table shows on any terminal, and its lines that are not trials."""
SAY_EVERY_S = 60.0
"""Seconds between progress messages of a search without a terminal, besides the one at the end of each trial."""
MAX_ROWS = 12
"""Maximum number of positions and of latent dimensions that the terminal shows. The JSON has all of them."""
IN_OTHER_TABLES = (*REQUIRED_METRICS, "active_units", "used", "mutual_information")
"""Metrics of an evaluation that have a table of their own."""
GAP = "&nbsp;&nbsp;&nbsp;"
"""Space between the columns of a Markdown table: MLflow's page leaves none."""


# -------------------------------------------------------------------------------- trials of a search


def trial_table(trials: Sequence[Trial], title: str, first: int = 0) -> Table:
    """Return a table with a row for each trial: status, progress, metrics and the fields that the space sets.

    A line is drawn below the ``first`` trials.
    """
    metrics = shown_metrics(trial.best for trial in trials)
    columns = ("trial", "status", "step", *(metric.label for metric in metrics), "time")
    table = _table(title, *columns, left=("trial", "status"))
    table.add_column("fields", overflow="fold")
    for number, trial in enumerate(trials, 1):
        table.add_row(
            trial.name,
            trial.status,
            f"{trial.step}/{trial.last_step}",
            *(metric.format(trial.best) for metric in metrics),
            f"{trial.seconds:.0f} s",
            _fields(trial, "{}={}", "  "),
            end_section=number == first,
        )
    return table


def _fields(trial: Trial, form: str, separator: str) -> str:
    """Return the fields that the space has set, after a warm start's origin or the trial that this one confirms."""
    origin = f"(from {trial.origin})  " if trial.origin else ""
    if trial.confirms is not None:
        origin = f"(confirms {trial.confirms:03}, seed {trial.config.seed})  "
    fields = (form.format(name.rpartition(".")[2], short(value)) for name, value in trial.fields.items())
    return origin + separator.join(fields)


def short(value: Any) -> str:
    """Return a field's value as short text: three significant digits, lists without brackets."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def markdown_table(trials: Sequence[Trial]) -> str:
    """Return a Markdown table with a row for each trial, for a description in MLflow."""
    metrics = shown_metrics(trial.best for trial in trials)
    head = ("trial", "status", *(metric.label for metric in metrics), "fields")
    rows = [
        (trial.name, trial.status, *(metric.format(trial.best) for metric in metrics), _fields(trial, "{} {}", ", "))
        for trial in trials
    ]
    return markdown([name + GAP for name in head], [[cell + GAP for cell in row] for row in rows])


def trial_counts(trials: Sequence[Trial], num_trials: int) -> str:
    """Return as text how many of a search's trials have ended, and how many have each status."""
    counts = ", ".join(f"{count} {status}" for status, count in Counter(trial.status for trial in trials).items())
    return f"{sum(trial.ended for trial in trials)} of {num_trials} trials ended ({counts or 'none begun'})"


class LiveTable:
    """Shows the search while it runs: on a terminal as a table that refreshes, otherwise as a line for each event."""

    def __init__(self, num_samples: int, search_objective: SearchObjective) -> None:
        self.num_samples = num_samples
        self.search_objective = search_objective
        self.trials: dict[int, Trial] = {}
        self.outlook: Callable[[], str] = str
        """Gives the best so far, the time left and the cost so far, as text."""
        self._say_at = -math.inf
        self.console = console()
        self.live = Live(console=self.console, get_renderable=self.renderable, refresh_per_second=1)

    def __enter__(self) -> LiveTable:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def show(self, trial: Trial, outlook: Callable[[], str]) -> None:
        """Show the new state of ``trial``, and the resulting ``outlook`` of the search."""
        self.trials[trial.number], self.outlook = trial, outlook
        if self.console.is_terminal:
            return
        best = f", {headline(trial.best)}" if trial.best else ""
        print(f"trial {trial.name} {trial.status} at step {trial.step}/{trial.last_step}{best}", flush=True)
        now = time.monotonic()
        if (text := outlook()) and (trial.ended or now >= self._say_at):
            self._say_at = now + SAY_EVERY_S
            print(f"{trial_counts(list(self.trials.values()), self.num_samples)}; {text}", flush=True)

    def renderable(self) -> Table:
        """Return the table of the running trials and of the best of the others: as many as fit on the terminal."""
        trials = list(self.trials.values())
        running = [trial for trial in trials if trial.status == "running"]
        room = max(FEWEST_RUNNING, self.console.height - BEST_ROWS - FRAME_ROWS)
        best = rank([trial for trial in trials if trial.status != "running" and trial.best], self.search_objective)
        title = trial_counts(trials, self.num_samples)
        if len(running) > room:
            title += f"; {room} running ones"
        shown = running[:room]
        title = "\n".join(filter(None, (f"{title}; the best others below", self.outlook())))
        return trial_table([*shown, *best[:BEST_ROWS]], title, len(shown))


CONFIRMED = ("trial", "in the search", "mean", "spread", "held", "new seeds")
"""Columns of a table of confirmed configs."""


def confirmation_summary(configs: Sequence[Repeated], search_objective: SearchObjective) -> str:
    """Return the table of the configs that were trained again with new seeds, as text."""
    console = Console(record=True, width=160, file=StringIO())
    table = _table("confirmation: the best configs again with new seeds, bits per byte", *CONFIRMED, left=("trial",))
    table.add_column("fields", overflow="fold")
    for each in configs:
        table.add_row(*_confirmed(each, search_objective), _fields(each.trial, "{}={}", "  "))
    console.print(table)
    return console.export_text().rstrip("\n")


def markdown_confirmation(configs: Sequence[Repeated], search_objective: SearchObjective) -> str:
    """Return the table of ``confirmation_summary`` in Markdown, for a model card."""
    return markdown(list(CONFIRMED), [_confirmed(each, search_objective) for each in configs])


def _confirmed(each: Repeated, search_objective: SearchObjective) -> list[str]:
    metric = search_objective.metric
    numbers = [each.trial.best.get(metric, math.nan), each.mean(metric), each.spread(metric)]
    return [
        each.trial.name,
        *("" if math.isnan(number) else f"{number:.3f}" for number in numbers),
        f"{each.held(search_objective)} of {len(each.configs)}",
        " ".join("-" if math.isnan(value) else f"{value:.3f}" for value in each.values(metric)),
    ]


def search_summary(
    trials: list[Trial], search_objective: SearchObjective, won: Trial | None, ladder: Ladder | None = None
) -> str:
    """Return the table of the trials, best first, with the Pareto front if the search was for one, and remarks.

    ``won`` is the winner, ``None`` if no trial has won, and ``ladder`` is the ladder on its samples. Trials that
    confirm it are left out.
    """
    trials = searched(trials)
    console = Console(record=True, width=160, file=StringIO())
    console.print(trial_table(rank(trials, search_objective), f"trials, best first: {search_objective}"))
    if search_objective.objective == "pareto":
        front = pareto_front(trials, Trial.point)
        console.print(
            trial_table(front, "Pareto front: no trial beats these in both negative ELBO and use of the code")
        )
    return console.export_text() + "".join(f"{line}\n" for line in remarks(trials, search_objective, ladder, won))


def remarks(
    trials: list[Trial], search_objective: SearchObjective, ladder: Ladder | None, best: Trial | None
) -> list[str]:
    """Return what a user should know before trusting the winner.

    That is: infeasible trials, a collapsed posterior, and a model above the best n-gram of ``ladder``. ``best`` is the
    winner, and ``ladder`` is measured on its samples.
    """
    lines = []
    below = [trial for trial in searched(trials) if trial.best and not search_objective.may_win(trial.best)]
    if search_objective.min_used and below:
        names = ", ".join(trial.name for trial in below)
        lines.append(f"cannot win, since they use less than {search_objective.min_used:g} nats of the code: {names}")
    if best is not None and (warning := collapse_warning(best.best, best.config.has_latent, whose="the best trial's")):
        lines.append(f"warning: {warning}; --min-used or --search-objective pareto search for one that is used")
    if best is not None and ladder is not None and (warning := ladder.warning(best.best[METRIC], "the best trial's")):
        lines.append(f"warning: {warning}; give the trials more --steps")
    return lines


# ------------------------------------------------------------------------------ evaluation of a model


def evaluation_summary(result: dict[str, Any]) -> str:
    """Return the tables of an evaluation: likelihood, latent code, positions, lengths and texts; warn of a collapse."""
    console = Console(record=True, width=100, file=StringIO())
    metrics = result["metrics"]
    console.print(
        f"{result['model']} at step {result['step']} on {metrics['samples']} samples of "
        f"{result['corpus']['name']}, {result['split']} split ({metrics['text_bytes']} bytes of text)",
        highlight=False,
    )
    if result["over_long_left_out"]:
        console.print(f"{result['over_long_left_out']} documents are longer than the model takes and were left out")
    console.print(_likelihood(metrics))
    ladder = Ladder.from_json(result["ngrams"])
    for each in filter(None, (ladder, ladder.pieces)):
        orders = ", ".join(f"{bits:.3f}" for bits in each.bits)
        line = f"bits/byte of {each.vocabulary} n-grams, n = 1 to {len(each.bits)}: {orders}"
        console.print(line, highlight=False, soft_wrap=True)
    console.print(ladder.comparison(metrics[METRIC]), highlight=False)
    if "kl_by_dimension" in metrics:
        console.print(_latent(metrics))
    further = [metric for metric in METRICS.values() if metric.key in metrics and metric.key not in IN_OTHER_TABLES]
    if further:
        table = _table("further metrics", "", "value", "unit")
        for metric in further:
            table.add_row(metric.label, metric.format(metrics), metric.unit)
        console.print(table)
    console.print(_positions(metrics["by_position"]))
    console.print(_lengths(metrics["by_length"]))
    if result["texts"] is not None:
        console.print(_texts(result["texts"]))
        for name, texts in result["texts"].items():
            console.print(Text(f"longest copy ({name}): {texts['longest_copy']!r}"))
        texts = result["texts"]["model"]
        if texts["searched_bytes"] < texts["corpus_bytes"]:
            console.print(
                f"copies were searched in {texts['searched_bytes']} of {texts['corpus_bytes']} bytes of the train split"
            )
    for warning in (ladder.warning(metrics[METRIC]), collapse_warning(metrics, "kl_by_dimension" in metrics)):
        if warning is not None:
            console.print(f"warning: {warning}")
    return console.export_text()


def _table(title: str, *columns: str, left: Sequence[str] = ("",)) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", no_wrap=True)
    return table


def _likelihood(metrics: dict[str, Any]) -> Table:
    table = _table("likelihood", "", "nats/sample", "bits/byte")
    per_nat = metrics["bits_per_byte"] / metrics["bound"]
    rows = {"reconstruction": "reconstruction", "KL": "kl", "negative ELBO": "bound"}
    if "importance_weighted" in metrics:
        draws = metrics["iw_samples"]
        rows |= {
            f"Monte Carlo negative ELBO ({draws} draws)": "monte_carlo_bound",
            f"importance-weighted NLL ({draws} draws)": "importance_weighted",
        }
    for title, name in rows.items():
        table.add_row(title, f"{metrics[name]:.3f}", f"{metrics[name] * per_nat:.4f}")
    return table


def _latent(metrics: dict[str, Any]) -> Table:
    table = _table("latent code", "", "")
    kl = sorted(enumerate(metrics["kl_by_dimension"]), key=lambda item: -item[1])
    table.add_row("active units", f"{metrics['active_units']} of {len(kl)}")
    if "used" in metrics:
        table.add_row("nats lost when codes are swapped", f"{metrics['used']:.3f} nats")
    most = math.log(metrics["mixture_samples"])
    table.add_row("mutual information I(x; z)", f"{metrics['mutual_information']:.3f} nats")
    table.add_row(f"  the most that {metrics['mixture_samples']} samples can show", f"{most:.3f} nats")
    table.add_row("KL(q(z) || p(z))", f"{metrics['marginal_kl']:.3f} nats")
    for number, nats in kl[:MAX_ROWS]:
        table.add_row(f"KL of dimension {number}", f"{nats:.3f} nats")
    return table


def _positions(by_position: dict[str, list[Any]]) -> Table:
    table = _table("reconstruction by position", "position", "bits/prediction", "predictions")
    last = len(by_position["bits"]) - 1
    for position in sorted({round(number * last / (MAX_ROWS - 1)) for number in range(MAX_ROWS)}):
        bits, predictions = by_position["bits"][position], by_position["predictions"][position]
        table.add_row(str(position), f"{bits:.3f}", str(predictions))
    return table


def _lengths(by_length: list[dict[str, Any]]) -> Table:
    table = _table("negative ELBO by length", "bytes", "samples", "bits/byte", "reconstruction", "KL")
    for row in by_length:
        low, high = row["from_bytes"], row["to_bytes"]
        table.add_row(
            str(low) if low == high else f"{low}-{high}",
            str(row["samples"]),
            f"{row['bits_per_byte']:.3f}",
            f"{row['reconstruction']:.2f}",
            f"{row['kl']:.3f}",
        )
    return table


def _texts(texts: dict[str, dict[str, Any]]) -> Table:
    table = _table("texts", "", *texts)
    rows = {
        "texts": ("texts", "d"),
        "mean length, bytes": ("mean_bytes", ".1f"),
        "valid UTF-8": ("valid_utf8", ".1%"),
        **{f"distinct {order}-grams of words": (f"distinct_{order}", ".3f") for order in (1, 2, 3, 4)},
        "self-BLEU": ("self_bleu", ".3f"),
        "longest copy from train, mean bytes": ("copied_mean_bytes", ".1f"),
        "longest copy from train, max bytes": ("copied_max_bytes", "d"),
        "copied as a whole": ("copied_whole", ".1%"),
    }
    for title, (name, form) in rows.items():
        table.add_row(title, *(format(values[name], form) for values in texts.values()))
    return table

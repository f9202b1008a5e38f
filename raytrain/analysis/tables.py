"""Tables of trials for the terminal."""

from __future__ import annotations

from io import StringIO
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from raytrain.metrics import COLLAPSED_KL, LIKELIHOOD, SearchObjective
from raytrain.runs.trials import Trial, pareto_front, rank, winner
from raytrain.utils.text import table


def trial_table(trials: list[Trial], title: str) -> Table:
    """One row a trial: state, progress, figures and the fields that the space has set."""
    table = Table(title=title, title_justify="left")
    bits = {"bits_per_byte": "bits/byte"} | ({LIKELIHOOD: "NLL"} if any(LIKELIHOOD in t.best for t in trials) else {})
    for column in ("trial", "state", "step", *bits.values(), "bound", "KL", "active", "time"):
        table.add_column(column, justify="left" if column in ("trial", "state") else "right", no_wrap=True)
    table.add_column("fields", overflow="fold")
    for trial in trials:
        figures = trial.best
        table.add_row(
            trial.name,
            trial.status,
            f"{trial.step}/{trial.config.steps}",
            *(f"{figures[name]:.3f}" if name in figures else "" for name in bits),
            *(f"{figures[name]:.1f}" if name in figures else "" for name in ("bound", "kl")),
            f"{figures['active_units']:.0f}" if figures else "",
            f"{trial.seconds:.0f} s",
            _origin(trial)
            + "  ".join(f"{name.rpartition('.')[2]}={_short(value)}" for name, value in trial.fields.items()),
        )
    return table


def _origin(trial: Trial) -> str:
    """Marks a trial whose config the search was started from."""
    return f"(from {trial.origin})  " if trial.origin else ""


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def markdown_table(trials: list[Trial]) -> str:
    """The same, in Markdown, for a description in the MLflow UI."""
    rows = []
    for trial in trials:
        digits = {"bits_per_byte": 3, "kl": 2, "active_units": 0}
        figures = [
            f"{trial.best[name]:.{locations}f}" if name in trial.best else "" for name, locations in digits.items()
        ]
        fields = _origin(trial) + ", ".join(
            f"{name.rpartition('.')[2]} {_short(value)}" for name, value in trial.fields.items()
        )
        # MLflow's page leaves no space between columns
        rows.append([f"{text}&nbsp;&nbsp;&nbsp;" for text in (trial.name, trial.status, *figures, fields)])
    return table(
        [f"{name}&nbsp;&nbsp;&nbsp;" for name in ("trial", "state", "bits/byte", "KL", "active", "fields")], rows
    )


class LiveTable:
    """Shows the trials while they run: a table that renews itself on a terminal, otherwise a line per event."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples
        self.trials: dict[int, Trial] = {}
        self.console = Console()
        self.live = Live(console=self.console, get_renderable=self._render, refresh_per_second=1)

    def __enter__(self) -> LiveTable:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def show(self, trial: Trial) -> None:
        """Take note of a change of ``trial``."""
        self.trials[trial.number] = trial
        if not self.console.is_terminal:
            figures = trial.best
            best = f", bound {figures['bits_per_byte']:.3f} bits/byte, KL {figures['kl']:.2f}" if figures else ""
            print(f"trial {trial.name} {trial.status} at step {trial.step}/{trial.config.steps}{best}", flush=True)

    def _render(self) -> Group:
        ended = sum(trial.ended for trial in self.trials.values())
        return Group(trial_table(list(self.trials.values()), f"{ended} of {self.num_samples} trials ended"))


def summary(trials: list[Trial], search_objective: SearchObjective) -> str:
    """The trials from best to worst and, where it was looked for, the front; with a warning where nothing can win
    or the winner has collapsed."""
    console = Console(record=True, width=160, file=StringIO())
    console.print(trial_table(rank(trials, search_objective), f"trials, best first: {search_objective}"))
    if search_objective.objective == "pareto":
        console.print(trial_table(pareto_front(trials), "the front: no trial beats these in both bound and KL"))
    return console.export_text() + "".join(f"{line}\n" for line in remarks(trials, search_objective))


def remarks(trials: list[Trial], search_objective: SearchObjective) -> list[str]:
    """What a user should know before trusting the winner."""
    best, lines = winner(trials, search_objective), []
    below = [trial for trial in trials if trial.best and not search_objective.reached(trial.best)]
    if search_objective.min_kl and below:
        names = ", ".join(trial.name for trial in below)
        lines.append(f"no winners, since their KL is below {search_objective.min_kl:g} nats: {names}")
    if best is not None and best.config.has_latent and best.best["kl"] < COLLAPSED_KL:
        lines.append(
            f"warning: the best trial's posterior has collapsed (KL {best.best['kl']:.3f} nats): "
            "its latent code says nothing; --min-kl or --search-objective pareto look for one that does"
        )
    return lines

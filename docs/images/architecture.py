"""Draw the two pictures of docs/architecture.md: packages.png and processes.png, beside this file.

python docs/images/architecture.py
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

FOLDER = Path(__file__).parent
INK, GREY, LINE = "#222222", "#5F5F5F", "#767676"
BLUE, GREEN, ORANGE, VIOLET, PLAIN = "#DCEBF7", "#DDF1E8", "#FBEBD0", "#F3E3EE", "#F2F2F2"
TITLE, TEXT, NOTE = 13, 10.5, 10

LAYERS: list[list[tuple[str, str, str]]] = [
    [("commands", "tune · train · evaluate · sample · report · registry · loop · spot", PLAIN)],
    [("bench", "what training costs on a machine", ORANGE)],
    [("search", "spaces, samplers, schedulers, trials, results, champion", ORANGE)],
    [("analysis", "metrics on a split, tables, figures, reports", ORANGE)],
    [("training", "loop, step, loss, early stopping; worker group, coordinator", ORANGE)],
    [("runs", "records, checkpoints, model references, workspace", GREEN)],
    [("models", "networks, noise, likelihood, sampling", GREEN)],
    [
        ("data", "text, corpus, batches", BLUE),
        ("tracking", "MLflow", BLUE),
        ("cluster", "what fits, what is taken", BLUE),
    ],
    [("storage", "a folder or an S3 prefix", BLUE)],
    [("config", "schema, models, presets, schedules, command lines", BLUE)],
    [("utils", "errors, validation, files, text, retry", BLUE), ("metrics", "names, labels, search objective", BLUE)],
]
"""From top to bottom: name, content and colour of each package. A package imports only from the rows below its own."""


def main() -> None:
    """Write both pictures."""
    draw_packages().savefig(FOLDER / "packages.png", dpi=150)
    draw_processes().savefig(FOLDER / "processes.png", dpi=150)


def blank(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty picture of ``width`` x ``height`` inches, with coordinates in inches."""
    figure = Figure(figsize=(width, height), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.set_axis_off()
    return figure, axes


def box(axes: Axes, x: float, y: float, width: float, height: float, color: str, title: str, *lines: str) -> None:
    """A rounded box with a title and lines of text; ``x``, ``y`` are its lower left corner."""
    style = "round,pad=0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=color, edgecolor=LINE))
    step = 0.215
    top = y + height / 2 + step * len(lines) / 2
    axes.text(x + width / 2, top, title, ha="center", va="center", fontsize=TITLE, color=INK, weight="bold")
    for number, line in enumerate(lines, 1):
        axes.text(x + width / 2, top - step * number, line, ha="center", va="center", fontsize=TEXT, color=INK)


def arrow(
    axes: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    note: str = "",
    at: tuple[float, float] | None = None,
) -> None:
    """An arrow, and what travels along it, written at ``at`` or beside its middle."""
    axes.annotate(
        "", end, start, arrowprops={"arrowstyle": "-|>", "color": LINE, "lw": 1.3, "shrinkA": 0, "shrinkB": 0}
    )
    if note:
        x, y = at or ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
        axes.text(
            x, y, note, ha="center", va="center", fontsize=NOTE, color=GREY, linespacing=1.25,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
        )  # fmt: skip


def both(
    axes: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    note: str = "",
    at: tuple[float, float] | None = None,
) -> None:
    """An arrow with two heads."""
    arrow(axes, end, start)
    arrow(axes, start, end, note, at)


def area(axes: Axes, x: float, y: float, width: float, height: float, title: str, indent: float = 0.12) -> None:
    """A dashed frame, with a title ``indent`` inches from its left edge."""
    axes.add_patch(Rectangle((x, y), width, height, facecolor="#FAFAFA", edgecolor=LINE, linestyle=(0, (5, 4))))
    axes.text(x + indent, y + height - 0.2, title, ha="left", va="center", fontsize=TEXT, color=GREY, style="italic")


# ---------------------------------------------------------------------------------------- the pictures


def draw_packages() -> Figure:
    """The packages as layers."""
    height, gap, left, width = 0.62, 0.16, 0.95, 8.6
    figure, axes = blank(left + width + 0.3, len(LAYERS) * (height + gap) + 0.5)
    for number, layer in enumerate(LAYERS):
        y = (len(LAYERS) - 1 - number) * (height + gap) + 0.25
        each = (width - gap * (len(layer) - 1)) / len(layer)
        for place, (name, content, color) in enumerate(layer):
            box(axes, left + place * (each + gap), y, each, height, color, name, content)
    top = len(LAYERS) * (height + gap)
    arrow(axes, (0.55, top), (0.55, 0.3))
    axes.text(0.3, top / 2 + 0.15, "imports", rotation=90, ha="center", va="center", fontsize=TITLE, color=GREY)
    return figure


def draw_processes() -> Figure:
    """The processes of a search."""
    figure, axes = blank(13.2, 9.0)
    area(axes, 0.25, 5.0, 9.75, 3.75, "head node, or the only machine")
    area(axes, 0.25, 1.7, 9.75, 2.75, "worker nodes, or the same machine", indent=3.0)

    task = "python -m raytrain.tune"
    box(
        axes,
        0.55,
        7.1,
        9.15,
        1.1,
        BLUE,
        "driver",
        task,
        "draws trials, stops the poor ones, records all, registers the best",
    )
    box(axes, 0.55, 5.25, 1.4, 1.1, PLAIN, "Ray head", "places", "processes")
    box(axes, 3.6, 5.25, 2.1, 1.1, ORANGE, "trial, 2+ workers", "supervises its group,", "reserves no CPU")
    box(axes, 6.4, 5.25, 1.6, 1.1, ORANGE, "coordinator", "jobs out,", "evaluations in")
    box(axes, 8.3, 5.25, 1.4, 1.1, PLAIN, "Ray Train", "controller of", "the group")

    box(axes, 0.55, 2.0, 2.1, 1.5, GREEN, "trial, 1 worker", "trains in its own", "process, as worker 0", "does")
    box(axes, 3.55, 2.0, 1.75, 1.5, PLAIN, "spot watcher", "one on each node:", "tells Ray of EC2's", "notices")
    area(axes, 5.75, 1.85, 4.1, 2.1, "worker group")
    box(axes, 5.95, 2.0, 1.5, 1.5, GREEN, "worker 1 ...", "the loop on its", "share of a batch")
    box(axes, 8.2, 2.0, 1.5, 1.5, GREEN, "worker 0", "the loop, and", "all that is", "written")

    box(axes, 11.1, 2.0, 1.85, 6.2, VIOLET, "MLflow", "server or", "mlflow.db")
    box(
        axes,
        0.25,
        0.2,
        12.7,
        0.8,
        VIOLET,
        "storage",
        "S3 or a folder: plan, trial records, checkpoints, outcomes, corpora",
    )

    answers = "job, stop\nevaluations"
    both(axes, (1.25, 7.1), (1.25, 6.35))
    both(axes, (2.3, 7.1), (2.3, 3.5), answers, (2.3, 4.72))
    both(axes, (4.65, 7.1), (4.65, 6.35), answers, (5.25, 6.72))
    both(axes, (5.7, 5.8), (6.4, 5.8))
    both(axes, (7.2, 5.25), (7.2, 3.95), answers, (7.2, 4.72))
    arrow(axes, (9.0, 5.25), (9.0, 3.95), "starts,\nwatches", (9.0, 4.72))
    both(axes, (7.45, 2.75), (8.2, 2.75), "gradients", (7.83, 2.95))
    both(axes, (3.1, 7.1), (3.1, 1.0), "plan,\ntrial records", (3.1, 1.35))
    both(axes, (1.5, 2.0), (1.5, 1.0), "as worker 0", (1.5, 1.35))
    arrow(axes, (6.7, 1.0), (6.7, 2.0), "corpus", (6.7, 1.35))
    both(axes, (8.95, 2.0), (8.95, 1.0), "checkpoints,\noutcome, corpus", (8.95, 1.35))
    arrow(axes, (9.7, 7.65), (11.1, 7.65), "runs, models", (10.5, 7.65))
    arrow(axes, (9.7, 2.75), (11.1, 2.75), "metrics", (10.5, 2.75))
    arrow(axes, (12.0, 2.0), (12.0, 1.0), "artifacts", (12.0, 1.5))
    return figure


if __name__ == "__main__":
    main()

"""What ``python -m raytrain.evaluate`` says on the terminal."""

from __future__ import annotations

import math
from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from raytrain.metrics import COLLAPSED_KL

MAX_ROWS = 12
"""Positions and dimensions that are shown; all are in the JSON."""


def summary(result: dict[str, Any]) -> str:
    """Tables of a result: the bound, the latent code, positions and lengths, texts; and a warning after a collapse."""
    console = Console(record=True, width=100, file=StringIO())
    measures = result["measures"]
    console.print(
        f"{result['model']} at step {result['step']} on {measures['samples']} samples of "
        f"{result['corpus']['name']}, {result['split']} split ({measures['text_bytes']} bytes of text)",
        highlight=False,
    )
    if result["over_long_left_out"]:
        console.print(f"{result['over_long_left_out']} documents are longer than the model takes and were left out")
    console.print(_bound(measures))
    if "kl_by_dimension" in measures:
        console.print(_latent(measures))
    console.print(_positions(measures["by_position"]))
    console.print(_lengths(measures["by_length"]))
    if result["texts"] is not None:
        console.print(_texts(result["texts"]))
        for name, texts in result["texts"].items():
            console.print(Text(f"longest copy ({name}): {texts['longest_copy']!r}"))
        texts = result["texts"]["model"]
        if texts["searched_bytes"] < texts["corpus_bytes"]:
            console.print(
                f"copies were searched in {texts['searched_bytes']} of {texts['corpus_bytes']} bytes of the train split"
            )
    if "kl_by_dimension" in measures and measures["kl"] < COLLAPSED_KL:
        console.print(
            f"warning: the posterior has collapsed (KL {measures['kl']:.3f} nats): the latent code says nothing"
        )
    return console.export_text()


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column == "" else "right", no_wrap=True)
    return table


def _bound(measures: dict[str, Any]) -> Table:
    table = _table("likelihood", "", "nats/sample", "bits/byte")
    per_nat = measures["bits_per_byte"] / measures["bound"]
    rows = {"reconstruction": "reconstruction", "KL": "kl", "bound": "bound"}
    if "importance_weighted" in measures:
        draws = measures["iw_samples"]
        rows |= {
            f"Monte-Carlo bound ({draws} draws)": "monte_carlo_bound",
            f"importance-weighted NLL ({draws} draws)": "importance_weighted",
        }
    for title, name in rows.items():
        table.add_row(title, f"{measures[name]:.3f}", f"{measures[name] * per_nat:.4f}")
    return table


def _latent(measures: dict[str, Any]) -> Table:
    table = _table("latent code", "", "")
    kl = sorted(enumerate(measures["kl_by_dimension"]), key=lambda item: -item[1])
    table.add_row("active units", f"{measures['active_units']} of {len(kl)}")
    most = math.log(measures["mixture_samples"])
    table.add_row("mutual information I(x; z)", f"{measures['mutual_information']:.3f} nats")
    table.add_row(f"  the most that {measures['mixture_samples']} samples can show", f"{most:.3f} nats")
    table.add_row("KL(q(z) || p(z))", f"{measures['marginal_kl']:.3f} nats")
    for number, nats in kl[:MAX_ROWS]:
        table.add_row(f"KL of dimension {number}", f"{nats:.3f} nats")
    return table


def _positions(by_position: dict[str, list[Any]]) -> Table:
    table = _table("reconstruction by position", "position", "bits/prediction", "predictions")
    last = len(by_position["bits"]) - 1
    shown = sorted({round(number * last / (MAX_ROWS - 1)) for number in range(MAX_ROWS)})
    for position in shown:
        bits, predictions = by_position["bits"][position], by_position["predictions"][position]
        table.add_row(str(position), f"{bits:.3f}", str(predictions))
    return table


def _lengths(by_length: list[dict[str, Any]]) -> Table:
    table = _table("bound by length", "bytes", "samples", "bits/byte", "reconstruction", "KL")
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

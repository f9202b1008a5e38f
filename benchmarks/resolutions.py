"""Bytes, characters and pieces of text against each other: language models of equal width or of equal parameters.

    python benchmarks/resolutions.py --data bios --data-path DATA/bios --output bios.jsonl
    python benchmarks/resolutions.py --table bios.jsonl --picture FOLDER

Documents are read whole, by one LSTM on one thread, at a constant learning rate; what is measured is a moving average
of the weights, so that each point of a run counts as the end of a shorter one. Each vocabulary has the same rates to
choose from with the first seed, and keeps the best one for the others. Seconds are processor time of the training
steps. The table compares the vocabularies after equal time, after equal operations of matrix products, and after equal
text: as far as the run that came least far. What has its result in the output already is not trained again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raytrain.config.presets import for_source, preset
from raytrain.config.schema import RunConfig, override
from raytrain.config.vocabularies import longer_pieces
from raytrain.data.vocabulary import NUM_OUTPUTS

VOCABULARIES = ("byte", "char", "bpe:1024", "bpe:4096", "bpe:16384")
RATES = (5e-3, 1e-2)
MEASURES = ("seconds", "operations", "text_bytes")
LENGTH = 256
"""Of a source without a length of its own: lines of at most this many symbols, STOP included."""
POINTS = 7
"""Evaluations of a run, each after half as much time again as the one before, on 512 documents."""
EMA = 0.98


@dataclass(frozen=True)
class Curve:
    """One run: what had been spent at each evaluation, and the bits per byte."""

    data: str
    vocabulary: str
    size: str
    """``width`` or ``parameters``."""
    budget: tuple[float, int, int]
    """Seconds of a run, units of models of equal width, and parameters of those of equal parameters."""
    hidden: int
    parameters: int
    rate: float
    seed: int
    seconds: list[float]
    operations: list[float]
    text_bytes: list[float]
    bits: list[float]

    @property
    def cell(self) -> tuple[str, str, str]:
        return self.data, self.size, self.vocabulary

    def at(self, measure: str, spent: float) -> float:
        """Return the bits per byte after so much of a measure: between two evaluations, on a logarithmic axis.

        They are NaN before the first evaluation.
        """
        return float(np.interp(np.log(spent), np.log(getattr(self, measure)), self.bits, left=np.nan))


def curve_of(values: dict[str, Any]) -> Curve:
    """Return the curve that a line of JSON has."""
    return Curve(**values | {"budget": tuple(values["budget"])})


def config_of(data: str, path: str | None, vocabulary: str, hidden: int, rate: float, seed: int) -> RunConfig[Any]:
    """Return the config of a run; its steps end by the clock."""
    plain = for_source(preset("laptop", "byte_lstm"), data)
    length = plain.length if plain.sampling == "documents" else LENGTH
    fields = {"sampling": "documents", "length": length, "vocabulary": vocabulary, "seed": seed, "steps": 1_000_000}
    fields |= {"data_path": path, "evaluate_samples": 512, "model.hidden": hidden, "optimizer.ema": EMA}
    return override(plain, fields | {"optimizer.schedule": "constant", "optimizer.learning_rate": rate})


def width_for(parameters: int, config: RunConfig[Any]) -> int:
    """Return the number of units, a multiple of 8, with which the model has as many parameters or just fewer."""
    from raytrain.models import num_parameters

    widths = range(8, 4096, 8)
    fitting = bisect_right(
        widths, parameters, key=lambda width: num_parameters(override(config, {"model.hidden": width}))
    )
    return widths[max(0, fitting - 1)]


def operations_of(config: RunConfig[Any]) -> int:
    """Return the operations of a symbol's matrix products, forward and backward; look-ups are none."""
    hidden, longer = config.model.hidden, longer_pieces(config.vocabulary)
    inputs = hidden if longer else 0
    return 6 * (4 * hidden * (inputs + hidden) + hidden * (NUM_OUTPUTS + longer))


def train(config: RunConfig[Any], corpus: Any, size: str, budget: tuple[float, int, int]) -> Curve:
    """Train for as many seconds of processor time as the budget has."""
    from raytrain.models import num_parameters
    from raytrain.training.trainer import Trainer, World

    trainer = Trainer(config, corpus, World())
    each, step = operations_of(config), 0
    spent, done = dict.fromkeys(MEASURES, 0.0), {measure: [] for measure in (*MEASURES, "bits")}
    for goal in (budget[0] * 1.5 ** (point - POINTS + 1) for point in range(POINTS)):
        while spent["seconds"] < goal:
            began = time.process_time()
            batch, *_ = trainer.train_step(step)
            spent["seconds"] += time.process_time() - began
            spent["operations"] += each * batch.tokens.numel()
            spent["text_bytes"] += batch.text_bytes
            step += 1
        for measure, value in (spent | {"bits": trainer.evaluate()["bits_per_byte"]}).items():
            done[measure].append(value)
    model, rate = config.model, config.optimizer.learning_rate
    about = config.data, config.vocabulary, size, budget, model.hidden, num_parameters(config), rate, config.seed
    return Curve(*about, **done)


def chosen(curves: Iterable[Curve]) -> dict[tuple[str, str, str], list[Curve]]:
    """Return the curves with the best rate of each cell, by the last value with the lowest seed."""
    cells: dict[tuple[str, str, str], list[Curve]] = {}
    for curve in curves:
        cells.setdefault(curve.cell, []).append(curve)
    for cell, found in cells.items():
        first = min(curve.seed for curve in found)
        best = min((curve for curve in found if curve.seed == first), key=lambda curve: curve.bits[-1])
        cells[cell] = [curve for curve in found if curve.rate == best.rate]
    return cells


def table(curves: Sequence[Curve]) -> str:
    """Return the comparisons as a Markdown table: means over the seeds, the lowest and the highest in brackets."""
    head = ["text", "equal", "vocabulary", "units", "parameters", "rate", "seeds", "time", "operations", "text"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    cells = chosen(curves)
    for (data, size, vocabulary), found in sorted(cells.items()):
        rivals = [curve for cell, others in cells.items() if cell[:2] == (data, size) for curve in others]
        texts = []
        for measure in MEASURES:
            bits = [curve.at(measure, min(getattr(rival, measure)[-1] for rival in rivals)) for curve in found]
            texts.append(f"{statistics.fmean(bits):.3f} ({min(bits):.3f}-{max(bits):.3f})")
        one = found[0]
        about = f"{data} | {size} | `{vocabulary}` | {one.hidden} | {one.parameters:,} | {one.rate:g} | {len(found)}"
        lines.append(f"| {about} | {' | '.join(texts)} |")
    return "\n".join(lines)


def draw(curves: Sequence[Curve], folder: Path) -> None:
    """Draw the bits per byte over the processor time, for each text, of models of equal width."""
    from raytrain.analysis.figures import style

    cells = {cell: found for cell, found in chosen(curves).items() if cell[1] == "width"}
    texts = sorted({data for data, _, _ in cells})
    if not texts:
        return
    looks = dict(zip(VOCABULARIES, (style.INK, style.SKY, style.GREEN, style.BLUE, style.VERMILION), strict=True))
    figure = style.new_figure(3.2 * len(texts) + 1.4, 3.4)
    for axes, data in zip(figure.subplots(1, len(texts), squeeze=False)[0], texts, strict=True):
        style.dress(axes, "processor time in s", "bits per byte" if data == texts[0] else "", data)
        axes.set_xscale("log")
        for vocabulary, colour in looks.items():
            found = cells.get((data, "width", vocabulary), [])
            if not found:
                continue
            times = np.mean([curve.seconds for curve in found], axis=0)
            bits = np.array([curve.bits for curve in found])
            axes.plot(times, bits.mean(0), color=colour, label=vocabulary, marker="o", markersize=3)
            axes.fill_between(times, bits.min(0), bits.max(0), color=colour, alpha=0.2, linewidth=0)
    style.explain(axes, title="vocabulary")
    style.save(figure, folder, "resolutions", ("png",))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="source of text")
    parser.add_argument("--data-path", help="where the text is")
    parser.add_argument("--vocabularies", nargs="+", default=list(VOCABULARIES))
    parser.add_argument("--sizes", nargs="+", choices=("width", "parameters"), default=["width", "parameters"])
    parser.add_argument("--hidden", type=int, default=256, help="units of models of equal width")
    parser.add_argument("--parameters", type=int, default=1_000_000, help="of models of equal parameters")
    parser.add_argument("--seconds", type=float, default=120, help="processor time of a run's steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, help="file to which each run is added as a line of JSON")
    parser.add_argument("--table", type=Path, nargs="+", help="print the table of such files, and train nothing")
    parser.add_argument("--picture", type=Path, help="folder for a picture of them")
    options = parser.parse_args()
    if not options.table and None in (options.data, options.output):
        parser.error("give --data and --output, or --table")
    files = options.table or [options.output] * options.output.exists()
    curves = [curve_of(json.loads(line)) for file in files for line in file.read_text().splitlines()]
    if not options.table:
        if others := {curve.budget for curve in curves} - {(options.seconds, options.hidden, options.parameters)}:
            parser.error(
                f"{options.output} has runs of {others.pop()} seconds, units and parameters: give another file"
            )
        compare(options, curves)
    print(table(curves))
    if options.picture is not None:
        draw(curves, options.picture)


def compare(options: argparse.Namespace, curves: list[Curve]) -> None:
    """Train what is missing in ``curves``, and add it."""
    import torch

    from raytrain.data.prepare import prepare
    from raytrain.training.trainer import Trainer, World

    torch.set_num_threads(1)
    corpus, budget = (
        prepare(options.data, path=options.data_path),
        (options.seconds, options.hidden, options.parameters),
    )
    first = config_of(options.data, options.data_path, "byte", options.hidden, RATES[0], 0)
    Trainer(first, corpus, World()).train_step(0)  # what is loaded and compiled once is not timed
    cells = [(size, vocabulary) for size in options.sizes for vocabulary in options.vocabularies]
    for seed in options.seeds:  # so that an interrupted comparison has all vocabularies with a seed
        for size, vocabulary in cells:
            rates = RATES
            if seed != options.seeds[0]:
                rates = (chosen(curves)[options.data, size, vocabulary][0].rate,)
            for rate in rates:
                wanted = (options.data, size, vocabulary), rate, seed
                if any((curve.cell, curve.rate, curve.seed) == wanted for curve in curves):
                    continue
                config = config_of(options.data, options.data_path, vocabulary, options.hidden, rate, seed)
                if size == "parameters":
                    config = override(config, {"model.hidden": width_for(options.parameters, config)})
                curves.append(train(config, corpus, size, budget))
                with options.output.open("a") as out:
                    print(json.dumps(asdict(curves[-1])), file=out)
                print(f"{size} {vocabulary} rate {rate:g} seed {seed}: {curves[-1].bits[-1]:.4f}", flush=True)


if __name__ == "__main__":
    main()

"""Measure a trained model on a split of a corpus, and the texts that it writes.

    python -m raytrain.evaluate runs/NAME --split test
    python -m raytrain.evaluate models:/raytrain-hybrid@champion --iw-draws 500 --evaluate-samples 0 --workers 8

The corpus is the one that the model was trained on, unless --data names another.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from raytrain.config.cli import parse_options
from raytrain.storage import check_output
from raytrain.utils.errors import UserError, run_command


@dataclass
class EvaluateOptions:
    """Measure a trained model on a split of a corpus, and the texts that it writes."""

    checkpoint: tyro.conf.Positional[str]
    """Folder or s3:// address of a checkpoint, a run or a search; MLflow run id; or models:/NAME@ALIAS."""
    split: Literal["train", "valid", "test"] = "valid"
    """Split of the corpus."""
    data: str | None = None
    """Source of another corpus, as in raytrain.train; default: the corpus of training."""
    data_path: str | None = None
    """File or folder that holds the source; default: where training found it."""
    data_field: str | None = None
    """Field or column that holds the text in .jsonl and .parquet sources; default: that of training."""
    evaluate_samples: int = 1024
    """Samples of the split, evenly spaced; 0 takes all."""
    iw_draws: int = 100
    """Draws of z for each importance-weighted estimate (models with a latent code)."""
    num_texts: int = 256
    """Texts to draw from the model, and as many texts of the split beside them; 0 leaves this out."""
    seed: int = 0
    """Seed of the texts that are drawn."""
    storage: str | None = None
    """Folder or s3:// address of training, where the corpus may lie ready; default: $RAYTRAIN_STORAGE or ./runs."""
    workers: int = 1
    """Tasks on a Ray cluster that share the samples of the split; 1 computes in this process, without Ray."""
    address: str | None = None
    """Address of the Ray cluster; default: the one that is found, otherwise a new one on this machine."""
    output: Path | None = None
    """JSON file to write, replaced if it is there; default: a new evaluation-SPLIT.json in the working directory."""
    log_to_mlflow: bool = True
    """Whether to log to the MLflow run of the checkpoint, if it has one."""


def main() -> None:
    """Parse the command line, measure, and report on the terminal, in a file and to MLflow."""
    options = parse_options("raytrain.evaluate", EvaluateOptions, sys.argv[1:])
    check_options(options)
    output = output_file(options)

    from raytrain.analysis.measure import Measurement, log_result, measure
    from raytrain.analysis.tables import evaluation_summary

    asked = {field.name: getattr(options, field.name) for field in dataclasses.fields(Measurement)}
    result, found = measure(Measurement(**asked))
    print(evaluation_summary(result), end="")
    output.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", "utf-8")
    print(f"written: {output}")
    if options.log_to_mlflow and found.run is not None:
        log_result(found.run, result)
        print(f"logged: {found.run.ui_hint()}")


def check_options(options: EvaluateOptions) -> None:
    """Refuse numbers that are out of range.

    Raises:
        UserError: with the option's name.
    """
    for name, least in {"evaluate_samples": 0, "iw_draws": 1, "num_texts": 0, "seed": 0, "workers": 1}.items():
        if (value := getattr(options, name)) < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}: must be at least {least}")
    if options.num_texts == 1:
        raise UserError(
            "--num-texts is 1: texts are measured against each other; draw at least 2, or 0 to leave this out"
        )


def output_file(options: EvaluateOptions) -> Path:
    """Return the JSON file to write: the one that was named, or a new one in the working directory.

    Raises:
        UserError: it cannot be written.
    """
    path = options.output
    number = 1
    while path is None:
        name = Path(f"evaluation-{options.split}{'' if number == 1 else f'-{number}'}.json")
        path = None if name.exists() else name
        number += 1
    return check_output(path)


if __name__ == "__main__":
    run_command(main)

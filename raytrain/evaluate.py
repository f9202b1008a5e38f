"""Measure a trained model on a split of a corpus, and the texts that it writes.

    python -m raytrain.evaluate runs/NAME --split test
    python -m raytrain.evaluate models:/raytrain-hybrid@champion --iw-draws 500 --evaluate-samples 0 --workers 8

The corpus is the one that the model was trained on, unless --data names another.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from raytrain.analysis.options import EvaluateOptions
from raytrain.config.cli import parse_options
from raytrain.storage import check_output
from raytrain.utils.errors import run_command
from raytrain.utils.files import output_file


def main() -> None:
    """Parse the command line, measure, and report on the terminal, in a file and to MLflow."""
    options = parse_options("raytrain.evaluate", EvaluateOptions, sys.argv[1:])
    options.check()
    output = checked_output(options)

    from raytrain.analysis.measure import log_result, measure
    from raytrain.analysis.tables import evaluation_summary

    result, found = measure(options)
    print(evaluation_summary(result), end="")
    with output_file(output) as file:
        file.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", "utf-8")
    print(f"written: {output}")
    if options.log_to_mlflow and found.run is not None:
        log_result(found.run, result)
        print(f"logged: {found.run.ui_hint()}")


def checked_output(options: EvaluateOptions) -> Path:
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

"""Check of a device: are results right on it, do runs resume, and how fast is a step beside plain PyTorch?

python -m raytrain.bench --check                        # on the GPU if there is one
python -m raytrain.bench --check --device cpu --quick   # small nets and few steps
python -m raytrain.bench --check --only machine steps --output check.json
"""

from __future__ import annotations

import json
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from raytrain.bench.sections import FULL, SECTIONS, Check, Rows
from raytrain.config.cli import OneLineParser
from raytrain.data.corpus import Corpus
from raytrain.data.prepare import prepare
from raytrain.storage import check_output
from raytrain.utils.files import output_file

LARGEST_DIFFERENCE = 1e-3
"""Largest difference of float32 gradients from the CPU's that is allowed, as a share of their norm."""


def main(arguments: list[str]) -> None:
    """Run the chosen sections, print a table of each, and exit with status 1 if something is not right.

    Raises:
        UserError: an unknown option or section, no such device, or a file that cannot be written.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: there is no GPU that PyTorch can use")
    if options.output is not None:
        check_output(options.output)
    began, problems = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="raytrain-check-") as folder:
        corpus = Corpus.open(options.corpus) if options.corpus else prepare("synthetic", output=Path(folder, "corpus"))
        check = Check(device, options.quick, options.models, corpus)
        for name in SECTIONS:
            if name not in (options.only or SECTIONS):
                continue
            if time.monotonic() - began > options.seconds:
                print(f"left out after {options.seconds:g} s: {name}")
                continue
            check.found[name] = run_section(check, name)
            problems += [f"{name}: {problem}" for problem in find_problems(check.found[name])]
            if options.output is not None:
                with output_file(options.output) as file:
                    file.write_text(json.dumps(check.found, indent=2) + "\n")
    print("\n".join(f"NOT RIGHT: {problem}" for problem in problems) or "all right")
    if problems:
        raise SystemExit(1)


def run_section(check: Check, name: str) -> Rows:
    """Run a section and print its rows; a section that fails gets a row that says how."""
    section = getattr(check, name)
    began = time.monotonic()
    try:
        rows: Rows = section()
    except Exception as error:  # the other sections are as useful without it
        traceback.print_exc()
        rows = [{"failed": f"{type(error).__name__}: {error}"}]
    print(f"\n{section.__doc__} ({time.monotonic() - began:.1f} s)")
    print(table(rows), flush=True)
    return rows


def find_problems(rows: Rows) -> list[str]:
    """Return the problems in the rows of a section, one line each."""
    problems = []
    for row in rows:
        model = f"{row['model']}: " if "model" in row else ""
        problems += [f"{model}{name}: {value}" for name, value in row.items() if name == "failed"]
        problems += [f"{model}{name}: no" for name, value in row.items() if value is False and name in REQUIRED]
        if row.get("gradients", 0.0) > LARGEST_DIFFERENCE:
            problems.append(f"{model}gradients differ by {row['gradients']:.1e}")
    return problems


REQUIRED = ("same bits as the CPU's", "repeats", "resumes", "as without graphs", "right")
"""Columns that must be true."""


def table(rows: Rows) -> str:
    """Return rows as text, with a column for each key."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, *([_cell(row.get(key)) for key in columns] for row in rows)]
    widths = [max(len(line[number]) for line in lines) for number in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1000 else str(value)


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="python -m raytrain.bench --check",
        description="Check a device: results, resuming, and the speed of a step beside plain PyTorch.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: the GPU if there is one")
    add("--quick", action="store_true", help="small nets and few steps, to test that everything works")
    add("--only", choices=SECTIONS, nargs="+", help="sections; default: all")
    add("--models", choices=FULL, nargs="+", default=list(FULL), help="models; default: all")
    add("--seconds", type=float, default=330.0, metavar="S", help="no section begins after that; default: 330")
    add("--corpus", metavar="DIR", help="prepared corpus; default: the synthetic one, written for the check")
    add("--output", type=Path, metavar="FILE", help="JSON file, written anew after each section; default: none")
    return parser

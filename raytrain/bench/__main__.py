"""Measure what training a model costs on this machine, beside what the machine can do.

    python -m raytrain.bench hybrid --preset paper-tweets --batch-size 32 128
    python -m raytrain.bench byte_lstm --preset bios --only ceiling step plain --output bench.json
    python -m raytrain.bench --check    # is a GPU right, and how fast? needs PyTorch, NumPy and safetensors alone

Each round takes everything in turn: matrix products and copies at the machine's best; training steps by batch size
and compute type, and the plain PyTorch step; an evaluation; the data alone; a checkpoint; sampling; DDP by number of
workers; torchrun and Ray Train. Results are medians over the rounds, with their range.
"""

from __future__ import annotations

import json
import sys

from raytrain.bench.options import parse_command
from raytrain.storage import open_file
from raytrain.storage.base import StorageError
from raytrain.utils.errors import UserError, run_command


def main() -> None:
    """Parse the command line, measure, and report on the terminal, in a file and to MLflow."""
    if "--check" in sys.argv[1:]:
        from raytrain.bench import check

        check.main([argument for argument in sys.argv[1:] if argument != "--check"])
        return
    options = parse_command(sys.argv[1:])

    from raytrain.bench.measure import measure_all
    from raytrain.bench.table import summary

    result = measure_all(options, lambda line: print(line, flush=True))
    print(summary(result), end="")
    if options.output is not None:
        location, name = open_file(options.output)
        try:
            location.write(name, (json.dumps(result, indent=2) + "\n").encode())
        except StorageError as error:
            raise UserError(f"--output: {error}") from None
        print(f"written: {options.output}")
    if options.experiment is not None:
        from raytrain.bench.record import log_result

        print(f"logged: {log_result(result, options.experiment, options.storage)}")


if __name__ == "__main__":
    run_command(main)

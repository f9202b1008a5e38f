"""Search a model's best settings: Ray Tune over groups of Ray Train workers, tracked in MLflow.

    python -m raytrain.tune hybrid
    python -m raytrain.tune lstm_vae --data tweets --data-path tweets.txt.gz --num-samples 12
    python -m raytrain.tune hybrid --space my_space.py --workers-per-trial 2
    python -m raytrain.tune --space paper_fig4 --budget small --data ptb
    python -m raytrain.tune hybrid --min-used 2 --warm-start config.json
    python -m raytrain.tune hybrid --dry-run --bench bench.json --price-per-hour 1.2
    python -m raytrain.tune --ablate NAME
    python -m raytrain.tune --resume NAME

On a machine without GPUs the defaults are a search of a few minutes; on a cluster with GPUs they are the sizes of the
literature. The choice is printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys

from raytrain.config.cli import OneLineParser, default_config, parse_choice, parse_fields, parse_options
from raytrain.config.presets import full_size
from raytrain.config.schema import override
from raytrain.search.options import SearchOptions, SearchRequest
from raytrain.search.space import load_space
from raytrain.utils.errors import UserError, run_command
from raytrain.utils.modules import make_callable

make_callable(__name__)


def main() -> None:
    """Parse the command line, set the search up, run it and print its result."""
    arguments = sys.argv[1:]
    first = first_options(arguments)
    requests = []
    if first.resume is None and first.ablate is None:
        requests = [read_request(arguments, has_gpus) for has_gpus in (False, True)]

    from raytrain.search import ablation, runner, setup

    if first.resume is not None:
        plan, begun = setup.stored_plan(first.resume, first.storage)
        options = parse_options("raytrain.tune", SearchOptions, arguments, begun)
        search = setup.resumed_search(first.resume, plan, begun, options)
    elif first.ablate is not None:
        found = ablation.find_ablated(first.ablate, first.storage)
        options = parse_options("raytrain.tune", SearchOptions, arguments, found.defaults)
        request = ablation.ablation_request(found, options)
        search = setup.new_search(request, request)
    else:
        search = setup.new_search(*requests)
    if search is not None:
        runner.run_and_finish(search)


def first_options(arguments: list[str]) -> argparse.Namespace:
    """Return the options that decide how all others are read."""
    parser = OneLineParser(prog="python -m raytrain.tune", add_help=False, allow_abbrev=False)
    for name in ("--resume", "--ablate", "--space", "--budget", "--storage"):
        parser.add_argument(name)
    return parser.parse_known_args(arguments)[0]


def read_request(arguments: list[str], has_gpus: bool) -> SearchRequest:
    """Return the search that the command line describes, for machines with or without GPUs.

    Raises:
        UserError: an unknown model, space, preset, option or field, or a bad value.
    """
    first = first_options(arguments)
    space = load_space(first.space) if first.space else None
    implied = space.models[0] if space is not None and space.models else None
    choice, rest = parse_choice("raytrain.tune", arguments, implied)
    space = space or load_space(choice.model)
    if space.models and choice.model not in space.models:
        raise UserError(f"search space {space.name} is for {', '.join(space.models)}, not for {choice.model}")
    models = space.models if implied == choice.model else (choice.model,)
    changes = space.budgets.get(first.budget or next(iter(space.budgets), ""), {})
    options, bases = SearchOptions(), {}
    for model in models:
        start = dataclasses.replace(choice, model=model, preset=choice.preset or space.preset)
        default = default_config(start, full_size(model) if has_gpus else "laptop")
        options, bases[model] = parse_fields("raytrain.tune", SearchOptions(), override(default, changes), rest)
    if choice.file is not None:
        size = f"config {choice.file}"
    elif choice.preset or space.preset:
        size = f"preset {choice.preset or space.preset}"
    elif has_gpus:
        size = f"preset {full_size(choice.model)} (the cluster has GPUs)"
    else:
        size = f"preset laptop ({'no GPU' if options.device != 'cpu' else '--device cpu'})"
    return SearchRequest(options=options, space=space, bases=bases, size=size)


if __name__ == "__main__":
    run_command(main)

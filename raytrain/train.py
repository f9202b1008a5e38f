"""Train one model on a group of Ray Train workers.

    python -m raytrain.train hybrid
    python -m raytrain.train hybrid --preset paper-ptb --data-path PTB --workers 2 --name ptb
    python -m raytrain.train byte_lstm --config config.json
    python -m raytrain.train --best-of SEARCH --steps 10000 --seed 1
    python -m raytrain.train --resume NAME

The same --name, or --resume, continues a run from its newest checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from raytrain.config.cli import OneLineParser, default_config, parse_choice, parse_fields, parse_options
from raytrain.config.presets import full_size
from raytrain.config.schema import RunConfig
from raytrain.metrics import METRIC, collapse_warning
from raytrain.runs.records import check_name, read_claim
from raytrain.storage import open_storage_root
from raytrain.training.options import TrainOptions
from raytrain.utils.errors import UserError, run_command
from raytrain.utils.modules import make_callable

if TYPE_CHECKING:
    from raytrain.runs.records import Claim
    from raytrain.search.winner import Winner
    from raytrain.training.launch import TrainedRun

make_callable(__name__)


def main() -> None:
    """Parse the command line, train the run and print its outcome."""
    arguments = sys.argv[1:]
    first = first_options(arguments)
    if first.resume is not None:
        print_outcome(resume(first, arguments))
    elif first.best_of is not None:
        print_outcome(train_best_of(first, arguments))
    else:
        (options, small), (_, large) = (read_command(arguments, has_gpus) for has_gpus in (False, True))

        from raytrain.runs.workspace import open_workspace
        from raytrain.training.launch import train

        print_outcome(train(small, large, options, open_workspace(small, options.storage)))


def first_options(arguments: list[str]) -> argparse.Namespace:
    """Return the options that decide how all others are read."""
    parser = OneLineParser(prog="python -m raytrain.train", add_help=False, allow_abbrev=False)
    for name in ("--resume", "--storage", "--best-of"):
        parser.add_argument(name)
    parser.add_argument("--experiment", default=TrainOptions.experiment)
    return parser.parse_known_args(arguments)[0]


def read_command(
    arguments: list[str], has_gpus: bool, winner: Winner | None = None
) -> tuple[TrainOptions, RunConfig[Any]]:
    """Return the options and the config of a command line, as changes to the config of ``winner`` if given.

    Raises:
        UserError: an unknown model, preset, option or field, or a bad value.
    """
    choice, rest = parse_choice("raytrain.train", arguments, winner.config.model_name if winner is not None else None)
    if winner is None:
        default = default_config(choice, full_size(choice.model) if has_gpus else "laptop")
    elif choice.preset is not None or choice.file is not None:
        raise UserError(f"--best-of {winner.search} gives the config: give no --preset or --config beside it")
    elif choice.model != winner.config.model_name:
        raise UserError(f"--best-of {winner.search}: its winner is a {winner.config.model_name}, not a {choice.model}")
    else:
        default = winner.config
    options, config = parse_fields("raytrain.train", TrainOptions(), default, rest)
    if options.name is not None:
        check_name(options.name)
    return options, config


def train_best_of(first: argparse.Namespace, arguments: list[str]) -> TrainedRun:
    """Train the config of a search's winner, with the changes of the command line."""
    from raytrain.search.winner import find_winner
    from raytrain.training.launch import train

    winner = find_winner(first.best_of, first.storage, first.experiment)
    options, config = read_command(arguments, has_gpus=False, winner=winner)
    workspace = winner.open_workspace(config, options.storage)
    print(f"config of trial {winner.trial} of the search {winner.search}", flush=True)
    return train(config, config, options, workspace, f"{winner.parent} trial {winner.trial}")


def read_resumption(name: str, storage: str | None, arguments: list[str]) -> tuple[TrainOptions, Claim]:
    """Return the options of the command line, by default those that the run ``name`` was begun with, and its record.

    Raises:
        UserError: there is no such run, or an option that would make it another.
    """
    claim = read_claim(open_storage_root(storage), name)
    begun = TrainOptions(**asdict(claim.worker_options))
    options = parse_options("raytrain.train", TrainOptions, arguments, begun)
    if options.name is not None:
        raise UserError(f"--resume {name} takes no --name: the run keeps its own")
    if options.best_of is not None:
        raise UserError(f"--resume {name} takes no --best-of: the run continues as it was begun")
    return dataclasses.replace(options, name=name), claim


def resume(first: argparse.Namespace, arguments: list[str]) -> TrainedRun:
    """Resume a run as its storage records it."""
    options, claim = read_resumption(first.resume, first.storage, arguments)

    from raytrain.runs.workspace import reopen_workspace
    from raytrain.training.launch import train

    workspace = reopen_workspace(first.storage, claim.corpus, claim.corpus_path)
    return train(claim.config, claim.config, options, workspace)


def print_outcome(trained: TrainedRun) -> None:
    """Print the best evaluation, the samples and how to look at the run."""
    best, outcome = trained.outcome["best"], trained.outcome
    bits, has_latent = best[METRIC], trained.config.has_latent
    print(f"computed in {outcome['precision']} on {outcome['device']}")
    print(
        f"best at step {outcome['best_step']}: negative ELBO {bits:.3f} bits/byte "
        f"({best['bound']:.1f} nats a sample), KL {best['kl']:.2f} nats, {best['active_units']:.0f} active units"
    )
    print(trained.ladder.comparison(bits))
    if warning := trained.ladder.warning(bits):
        print(f"warning: {warning}; try more --steps")
    if warning := collapse_warning(best, has_latent):
        print(f"warning: {warning}; try {remedy(trained.config)}")
    print("\n".join(f"  {sample!r}" for sample in outcome["samples"]))
    print(f"view: {trained.view}")


def remedy(config: RunConfig[Any]) -> str:
    """Return the option that most likely makes a model read its code: docs/guides/search.md compares them."""
    mean_norm: float | None = getattr(config.model, "mean_norm", None)  # models of plugins may have none
    return "--objective.rate 3" if mean_norm is None else f"--model.mean-norm {1.5 * mean_norm or 0.4:.2g}"


if __name__ == "__main__":
    run_command(main)

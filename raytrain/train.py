"""Train one model on a gang of Ray Train workers.

    python -m raytrain.train hybrid
    python -m raytrain.train hybrid --preset paper-ptb --data-path PTB --workers 2 --name ptb
    python -m raytrain.train byte_lstm --config config.json
    python -m raytrain.train --best-of SEARCH --steps 10000 --seed 1
    python -m raytrain.train --resume NAME

Started again with the same --name, or with --resume, it goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import asdict
from typing import Any

from raytrain.cluster.resources import connect, read_cluster
from raytrain.config.cli import OneLineParser, default_config, parse_choice, parse_fields, parse_options
from raytrain.config.presets import full_size
from raytrain.config.schema import RunConfig
from raytrain.config.workers import parse_workers
from raytrain.runs.records import check_name, read_claim
from raytrain.runs.workspace import Workspace, open_workspace, reopen_workspace
from raytrain.search.winner import Winner, find_winner
from raytrain.storage import open_storage_root
from raytrain.tracking.client import check_tracking
from raytrain.training.checks import at_first, check_samples
from raytrain.training.launch import make_worker_spec, train
from raytrain.training.options import TrainOptions
from raytrain.utils.errors import UserError, run_command


def main() -> None:
    """Check everything, then train, then report."""
    arguments = sys.argv[1:]
    looker = OneLineParser(prog="python -m raytrain.train", add_help=False, allow_abbrev=False)
    for name in ("--resume", "--storage", "--best-of"):
        looker.add_argument(name)
    looker.add_argument("--experiment", default=TrainOptions.experiment)
    looked = looker.parse_known_args(arguments)[0]
    winner = None
    if looked.resume is not None:
        options, config, workspace = resumed_run(looked.resume, looked.storage, arguments)
    elif looked.best_of is not None:
        winner = find_winner(looked.best_of, looked.storage, looked.experiment)
        options, config = read_command(arguments, has_gpus=False, winner=winner)
        workspace = winner.open_workspace(config, options.storage)
        print(f"config of trial {winner.trial} of the search {winner.search}", flush=True)
    else:
        options, config = read_command(arguments, has_gpus=False)
        workspace = open_workspace(config, options.storage)
    settled = looked.resume is not None or winner is not None
    fewest, most = parse_workers(options.workers)
    larger = config if settled else read_command(arguments, has_gpus=True)[1]
    check_samples(config, workspace.corpus, at_first(most or fewest, [larger]))

    connect(options.address)
    cluster = read_cluster()
    if cluster.has_gpus and options.device != "cpu" and not settled:
        options, config = read_command(arguments, has_gpus=True)
    check_samples(config, workspace.corpus, most or fewest)
    check_tracking(workspace.tracking_uri, cluster.num_nodes)
    worker_spec = make_worker_spec(options, cluster)
    cluster.admit(worker_spec, 1, head_memory=float("inf"))
    train(
        options, config, workspace, worker_spec, f"{winner.parent} trial {winner.trial}" if winner is not None else None
    )


def read_command(
    arguments: list[str], has_gpus: bool, winner: Winner | None = None
) -> tuple[TrainOptions, RunConfig[Any]]:
    """The options and the config that the command line describes, as changes to the config of ``winner`` if given."""
    choice, rest = parse_choice("raytrain.train", arguments, winner.config.model_name if winner is not None else None)
    if winner is None:
        default = default_config(choice, full_size(choice.model) if has_gpus else "laptop")
    elif choice.preset is not None or choice.file is not None:
        raise UserError(f"--best-of {winner.search} says where to start from: give no --preset or --config beside it")
    elif choice.model != winner.config.model_name:
        raise UserError(f"--best-of {winner.search}: its winner is a {winner.config.model_name}, not a {choice.model}")
    else:
        default = winner.config
    options, config = parse_fields("raytrain.train", TrainOptions(), default, rest)
    if options.name is not None:
        check_name(options.name)
    return options, config


def resumed_run(name: str, storage: str | None, arguments: list[str]) -> tuple[TrainOptions, RunConfig[Any], Workspace]:
    """The run that ``--resume`` names, as its storage records it.

    Raises:
        UserError: there is no such run, or an option that would make it another.
    """
    claim = read_claim(open_storage_root(storage), name)
    begun = TrainOptions(**asdict(claim.worker_options))
    options = parse_options("raytrain.train", TrainOptions, arguments, begun)
    if options.name is not None:
        raise UserError(f"--resume {name} takes no --name: the run goes on under its own")
    if options.best_of is not None:
        raise UserError(f"--resume {name} takes no --best-of: the run goes on as it was begun")
    workspace = reopen_workspace(storage, claim.corpus, claim.corpus_path)
    return dataclasses.replace(options, name=name), claim.config, workspace


if __name__ == "__main__":
    run_command(main)

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
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from tempfile import TemporaryDirectory
from typing import Any

from raytrain.best_of import Winner, find_winner
from raytrain.cli import OneLineParser, default_config, parse_choice, parse_fields, parse_options
from raytrain.config import RunConfig, flatten, identity, to_dict
from raytrain.errors import UserError, run_command
from raytrain.goal import COLLAPSED_KL
from raytrain.presets import full_size
from raytrain.progress import Progress
from raytrain.reference import note_run
from raytrain.resources import Cluster, Gang, GangOptions, connect, parse_workers, read_cluster
from raytrain.session import (
    EXPERIMENT,
    Session,
    at_first,
    check_name,
    check_samples,
    claim_name,
    open_session,
    open_storage_root,
    read_claim,
    reopen_session,
)
from raytrain.tracking import Experiment, check_tracking
from raytrain.workers import UNSENT, GangLostError, Job, fit, read_outcome, serve


@dataclass
class TrainOptions(GangOptions):
    """Options of the command; all else is a field of the run's config."""

    name: str | None = None
    """Name of the run; the same name resumes it. By default one that follows from the config."""
    best_of: str | None = None
    """Search whose winner's config is trained, changed by the options; or an MLflow experiment: its newest search."""
    resume: str | None = None
    """Name of a run to go on with, by as many workers; nothing else is needed but where its storage is."""
    storage: str | None = None
    """Folder or s3://bucket/prefix for all that is kept; default $RAYTRAIN_STORAGE or ./runs."""
    address: str | None = None
    """Ray cluster to use; by default the one that is found, or a new one on this machine."""
    experiment: str = EXPERIMENT
    """MLflow experiment."""


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
        options, config, session = resumed_run(looked.resume, looked.storage, arguments)
    elif looked.best_of is not None:
        winner = find_winner(looked.best_of, looked.storage, looked.experiment)
        options, config = read_command(arguments, has_gpus=False, winner=winner)
        session = winner.open_session(config, options.storage)
        print(f"config of trial {winner.trial} of the search {winner.search}", flush=True)
    else:
        options, config = read_command(arguments, has_gpus=False)
        session = open_session(config, options.storage)
    settled = looked.resume is not None or winner is not None
    fewest, most = parse_workers(options.workers)
    larger = config if settled else read_command(arguments, has_gpus=True)[1]
    check_samples(config, session.corpus, at_first(most or fewest, [larger]))

    connect(options.address)
    cluster = read_cluster()
    if cluster.has_gpus and options.device != "cpu" and not settled:
        options, config = read_command(arguments, has_gpus=True)
    check_samples(config, session.corpus, most or fewest)
    check_tracking(session.tracking_uri, cluster.num_nodes)
    gang = make_gang(options, cluster)
    cluster.admit(gang, 1, head_memory=float("inf"))
    train(options, config, session, gang, winner)


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


def resumed_run(name: str, storage: str | None, arguments: list[str]) -> tuple[TrainOptions, RunConfig[Any], Session]:
    """The run that ``--resume`` names, as its storage records it.

    Raises:
        UserError: there is no such run, or an option that would make it another.
    """
    claim = read_claim(open_storage_root(storage), name)
    begun = TrainOptions(**asdict(claim.gang))
    options = parse_options("raytrain.train", TrainOptions, arguments, begun)
    if options.name is not None:
        raise UserError(f"--resume {name} takes no --name: the run goes on under its own")
    if options.best_of is not None:
        raise UserError(f"--resume {name} takes no --best-of: the run goes on as it was begun")
    session = reopen_session(storage, claim.corpus, claim.corpus_path)
    return dataclasses.replace(options, name=name), claim.config, session


def make_gang(options: TrainOptions, cluster: Cluster) -> Gang:
    """The workers to ask for: with GPUs if the cluster has or may get any, wherever this command runs."""
    fewest, most = parse_workers(options.workers)
    gpus = options.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if cluster.has_gpus else 0.0
    cpus = options.cpus_per_worker
    if cpus is None:
        cpus = 1.0 if gpus else max(1.0, cluster.total("CPU") // max(1, most or fewest))
    return Gang(fewest, cpus, gpus, most, options.device)


def train(
    options: TrainOptions, config: RunConfig[Any], session: Session, gang: Gang, winner: Winner | None = None
) -> None:
    """Run the training and print what came of it; ``winner`` is what the config is from."""
    from raytrain.gangs import HeldGang

    corpus = session.corpus
    name = options.name or f"{config.model_name}-{identity(config, corpus.digest)[:8]}"
    asked = GangOptions(options.workers, options.cpus_per_worker, options.gpus_per_worker, options.device)
    claim = claim_name(session.storage, name, config, corpus, options.experiment, asked)
    place = session.storage.uri(name)
    outcome = read_outcome(place)
    experiment = Experiment.open(session.tracking_uri, claim.experiment, session.artifact_root())
    print(f"run {name}: {config.model_name} on {corpus.name}, {gang}, kept in {place}", flush=True)
    run = experiment.find_run(claim.identity)
    if outcome is None:
        run = experiment.open_run(
            claim.identity,
            name,
            config=to_dict(config),
            parameters=flatten(config),
            tags={
                "kind": "run",
                "corpus": corpus.digest,
                "seed": str(config.seed),
                "workers": str(gang),
                "place": place,
            }
            | ({"best_of": f"{winner.parent} trial {winner.trial}"} if winner is not None else {}),
        )
        note_run(session.storage.child(name), run)
        progress = f"raytrain/progress/{name}"
        job = Job(to_dict(config), session.corpus_address(), place, asdict(run), gang.cpus, progress=progress)
        session.log_corpus(run)
        try:
            with shown_progress(progress, config.steps), TemporaryDirectory(prefix="raytrain-") as scratch:
                held = HeldGang(serve, gang, name, scratch)
                outcome = fit(job, held, send=lambda evaluation: None)
                held.dismiss()
        except BaseException as error:
            run.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED", repr(error))
            if isinstance(error, GangLostError):
                raise UserError(f"run {name}: {error}; --resume {name} goes on from there") from error
            raise
        reason = outcome.get("error") or outcome.get("hopeless")
        run.finish("FAILED" if reason else "FINISHED", reason)
    else:
        print("this run has ended already; choose another --name to train again")
    if outcome.get("unsent"):
        unsent = session.storage.child(name).uri(UNSENT)
        print(f"{outcome['unsent']} records did not reach MLflow: python -m raytrain.tracking send {unsent}")
    if reason := outcome.get("error") or outcome.get("hopeless"):
        raise UserError(f"run {name} failed: {reason}")
    best = outcome["best"]
    print(f"computed in {outcome['precision']} on {outcome['device']}")
    print(
        f"best at step {outcome['best_step']}: bound {best['bits_per_byte']:.3f} bits/byte "
        f"({best['bound']:.1f} nats a sample, KL {best['kl']:.2f}, {best['active_units']:.0f} active units)"
    )
    if config.model_name != "byte_lstm" and best["kl"] < COLLAPSED_KL:
        print(
            f"warning: its posterior has collapsed (KL {best['kl']:.3f} nats): the latent code says nothing; "
            "try --objective.free-bits 2, or a later --objective.end"
        )
    print("\n".join(f"  {sample!r}" for sample in outcome["samples"]))
    print(f"see it: {run.ui_hint() if run is not None else experiment.ui_hint()}")


@contextmanager
def shown_progress(key: str, steps: int) -> Iterator[None]:
    """Print a progress line whenever rank 0 has put new metrics under ``key``."""
    from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get

    progress = Progress(steps)
    ended = threading.Event()

    def watch() -> None:
        seen = None
        while not ended.wait(0.5):
            value = _internal_kv_get(key)
            if value is not None and value != seen:
                seen = value
                step, metrics = json.loads(value)
                print(progress.line(step, metrics), flush=True)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        _internal_kv_del(key)


if __name__ == "__main__":
    run_command(main)

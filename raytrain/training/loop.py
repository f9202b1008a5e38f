"""Training loop of one worker, from the first step to the last, in ruled sections.

The same code runs under Ray Train, under torchrun and in one process; it needs torch, NumPy and safetensors only.
Without Ray:

    torchrun --nproc-per-node 2 -m raytrain.loop config.json --corpus CORPUS --storage FOLDER
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from raytrain.config.schedules import kl_weight, learning_rate
from raytrain.config.schema import RunConfig, to_dict
from raytrain.data.batches import Batch
from raytrain.data.corpus import Corpus
from raytrain.runs import checkpoint as checkpoints
from raytrain.runs.checkpoint import Snapshot
from raytrain.runs.checkpoint_writer import CheckpointWriter
from raytrain.storage.base import Storage, retry_storage
from raytrain.training.divergence import DivergedError, check_finite
from raytrain.training.preemption import PreemptedError, Rounds
from raytrain.training.reporters import Reporter
from raytrain.training.trainer import Trainer, World
from raytrain.utils.errors import UserError
from raytrain.utils.validation import validate_type

STATE = {
    "best_step": int,
    "best": dict[str, float],
    "evaluations": list[dict[str, float]],
    "pending": list[list[Any]],
}
"""Fields of a checkpoint's state that a run resumes from, beside the tensors."""


@dataclass(frozen=True)
class Outcome:
    """Result of a finished run."""

    step: int
    best_step: int
    """The evaluated step with the best score."""
    best: dict[str, float]
    """Its validation metrics."""
    precision: str
    """The compute type that was chosen."""
    device: str


@dataclass(frozen=True)
class Part:
    """Part of a run: up to a step, from the state left by another run with the same earlier steps."""

    end: int
    """Step after which it ends."""
    origin: Storage | None
    """Checkpoints of that other run; ``None`` for a part that begins with the first step."""

    def before(self, config: RunConfig[Any], corpus: Corpus) -> checkpoints.Checkpoint | None:
        """Return the newest checkpoint of the other run; ``None`` if it has none: then all its steps are trained."""
        return None if self.origin is None else to_resume(self.origin, config, corpus)


def train(
    config: RunConfig[Any],
    corpus: Corpus,
    world: World,
    storage: Storage,
    report: Reporter,
    draws: int = 0,
    encoder: Callable[[], Mapping[str, Tensor]] | None = None,
    part: Part | None = None,
) -> Outcome:
    """Train until ``config.steps``, from the newest valid checkpoint under ``storage`` if there is one.

    The best checkpoint has the lowest negative ELBO or, if evaluations take ``draws`` of z, the lowest estimate of the
    negative log-likelihood. ``encoder`` reads the tensors of ``config.encoder_from``; rank 0 calls it if there is no
    checkpoint. ``part`` is the part of the run to train; without one, the whole run is trained.

    Raises:
        UserError: more workers than sample groups, a corpus shorter than one sample, checkpoints of another run, or a
            config with an encoder that the caller cannot read.
        DivergedError: on all workers: too many steps in a row were skipped because loss or gradients were not finite,
            or a validation metric or the state to be saved is not finite.
        StorageError: the storage was unreachable for longer than ``CheckpointWriter`` retries.
        PreemptedError: a worker's machine is about to be taken away; the newest checkpoint has every step.
    """
    if config.encoder_from is not None and encoder is None:
        raise UserError(f"encoder_from is {config.encoder_from!r}: only python -m raytrain.train and tune can read it")
    score, end = "nll" if draws else "bound", config.steps if part is None else part.end
    trainer = Trainer(config, corpus, world)
    trainer.rehearse()

    # ------------------------------------------------------------------------------------- resume
    step, best_step, best = 0, 0, {}
    evaluations: list[dict[str, float]] = []
    if world.rank == 0 and (stored := to_resume(storage, config, corpus)) is not None:
        trainer.load(stored)
        step, best_step, best = stored.step, stored.state["best_step"], stored.state["best"]
        evaluations = stored.state["evaluations"]
        report.replay(stored.state["pending"])
    elif world.rank == 0 and part is not None and (stored := part.before(config, corpus)) is not None:
        trainer.load(stored)  # its metrics and its best checkpoint belong to another run
        step, evaluations = stored.step, stored.state["evaluations"]
    elif world.rank == 0 and encoder is not None:
        trainer.load_encoder(encoder())
    step = trainer.share(step)
    evaluations = trainer.share_values(evaluations)
    report.resumed(evaluations)

    throughput, rounds = Throughput(world.size), Rounds(world, step)
    with saving(trainer, storage, step) as writer:
        while step < end:
            # ----------------------------------------------------------------------------------- step
            batch, terms, norm = trainer.train_step(step)
            throughput.count(batch)
            step += 1
            last = step == end
            logs = step % config.log_every == 0 or last
            evaluates = step % config.evaluate_every == 0 or last
            saves = evaluates or step % config.checkpoint_every == 0
            if logs or saves:  # otherwise the host need not wait for the device
                skipped = trainer.skipped.check(step)

            # ------------------------------------------------------------------------------------ log
            metrics: dict[str, float] = {}
            if logs:
                values = trainer.batch_metrics(batch, terms) | {"gradient_norm": norm.item()}
                # metrics of a skipped step may not be finite, and MLflow would store an infinity as 1.8e308
                metrics |= {
                    f"train/{name}": value
                    for name, value in values.items()
                    if name != "active_units" and math.isfinite(value)
                }
                metrics |= {
                    "train/kl_weight": kl_weight(trainer.current.objective, step - 1, config.steps),
                    "train/learning_rate": learning_rate(trainer.current.optimizer, step - 1, config.steps),
                    "train/skipped_steps": skipped,
                    "train/bytes_per_second": throughput.rate(),
                }
                if trainer.multiplier is not None:
                    metrics["train/multiplier"] = trainer.multiplier.value.abs().item()

            # ------------------------------------------------------------------------------- evaluate
            evaluation: dict[str, float] = {}
            if evaluates:
                with throughput.paused():
                    evaluation = trainer.evaluate(draws)
                # before saving: a checkpoint of such a state would be of no use
                check_finite("validation metrics are", evaluation, step)
                evaluations.append({"step": step, **evaluation})
                metrics |= {f"valid/{name}": value for name, value in evaluation.items()}
                if not best or evaluation[score] < best[score]:
                    best_step, best = step, evaluation
                    metrics |= {f"best/{name}": value for name, value in best.items()}
            if metrics and world.rank == 0:
                report.log(step, metrics)

            # ----------------------------------------------------------------------------- checkpoint
            leave = rounds.due(step) and rounds.ask(step, report.preemption_notice()) and not last
            if saves or leave:
                state = {
                    "best_step": best_step,
                    "best": best,
                    "evaluations": evaluations,
                    "skipped": trainer.skipped.counts(),
                    "pending": report.pending(),
                    "corpus": corpus.digest,
                }
                if not trainer.model.vocabulary.is_bytes:
                    state["vocabulary"] = trainer.model.vocabulary.values()
                save(trainer, writer, step, state, evaluation.get(score))
            if evaluation:
                report.evaluated(step, evaluation)
            if leave:
                if writer is not None:
                    writer.wait()
                raise PreemptedError(f"a machine under the run is about to be taken away; saved at step {step}")
    return Outcome(step, best_step, best, trainer.precision, world.device.type)


# --------------------------------------------------------------------------------------------- parts


def to_resume(storage: Storage, config: RunConfig[Any], corpus: Corpus) -> checkpoints.Checkpoint | None:
    """Return the newest valid checkpoint, if there is one.

    Raises:
        UserError: it is from another model or corpus, or holds no state of a run.
        StorageError: the storage does not answer.
    """
    stored = retry_storage(lambda: checkpoints.latest(storage))
    if stored is None:
        return None
    theirs, own = (stored.state.get("corpus"), stored.config.get("model")), (corpus.digest, to_dict(config)["model"])
    if theirs != own:
        raise UserError(f"{stored.uri} is of a run with another model or another corpus: give an empty --storage")
    try:
        for name, hint in STATE.items():
            validate_type(stored.state.get(name), hint, name)
    except ValueError as error:
        raise UserError(f"{stored.uri} does not hold the state of a run ({error}): delete it") from None
    return stored


@contextmanager
def saving(trainer: Trainer, storage: Storage, step: int) -> Iterator[CheckpointWriter | None]:
    """Yield the checkpoint writer on rank 0, ``None`` on others, for a run that continues from ``step``.

    If the run diverges inside the context, everything handed to the writer is saved first. The error then names the
    last good checkpoint on all ranks.
    """
    with CheckpointWriter(storage) if trainer.world.rank == 0 else nullcontext() as writer:
        try:
            yield writer
        except DivergedError as error:
            if writer is not None:
                writer.wait()
                step = writer.committed or step
            step = trainer.first(step)
            location = f"the last good checkpoint is that of step {step}" if step > 0 else "there is no good checkpoint"
            raise DivergedError(f"{error}; {location}", last_good=step or None) from None


def save(
    trainer: Trainer,
    writer: CheckpointWriter | None,
    step: int,
    state: dict[str, Any],
    score: float | None,
) -> None:
    """Hand the state after ``step`` to the writer; called on every rank.

    Raises:
        DivergedError: on all ranks: the state is not finite, so the writer refused it.
    """
    refusal = ""
    trainer.gather_lanes()
    if writer is not None:
        snapshot = Snapshot(step, trainer.tensors(), state, to_dict(trainer.config))
        try:
            writer.save(snapshot, score)
        except FloatingPointError as error:
            refusal = str(error)
    # only rank 0 has checked, and no rank may continue alone
    if trainer.first(bool(refusal)):
        raise DivergedError(refusal or f"the state after step {step} is not finite")


class Throughput:
    """Counter of text bytes per second over all workers, without the time of evaluations."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.bytes = 0
        self.started = time.perf_counter()

    def count(self, batch: Batch) -> None:
        """Count a step; the other ranks' shares are assumed to be as large as this one's."""
        self.bytes += batch.text_bytes * self.world_size

    def rate(self) -> float:
        """Return the rate since the last call."""
        now = time.perf_counter()
        rate = self.bytes / (now - self.started)
        self.bytes, self.started = 0, now
        return rate

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time spent inside the context."""
        began = time.perf_counter()
        yield
        self.started += time.perf_counter() - began

"""Registry of champions: the best verified model of each kind, under an alias in MLflow's model registry.

A search registers its best model as a new version, loads it back and scores it, and only then lets it compete. The
version becomes ``champion`` if it beats the current one on the same corpus and metric, and otherwise ``challenger``.
``promote`` and ``rollback`` move the alias by hand. Versions registered before that never take it back by themselves.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from mlflow.exceptions import MlflowException

from raytrain.config.schema import from_dict
from raytrain.metrics import shown_metrics
from raytrain.runs.references import load_logged_model
from raytrain.runs.trained_model import stored_vocabulary
from raytrain.tracking.client import check_tracking, connect, is_there, retry_tracking
from raytrain.tracking.logged_model import MODEL_ID, logged_model
from raytrain.training.trainer import Trainer, World
from raytrain.utils.errors import UserError

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

    from raytrain.data.corpus import Corpus
    from raytrain.runs.checkpoint import Checkpoint
    from raytrain.tracking.runs import Run

CHAMPION = "champion"
CHALLENGER = "challenger"
VERIFIED_SAMPLES = 64
"""Validation samples on which a registered model must reproduce the negative ELBO of its checkpoint."""
MAX_DESCRIPTION = 5000
"""Most characters that PostgreSQL's column for a version's description holds."""
_CORPUS, _METRIC, _VALUE = "raytrain.corpus", "raytrain.metric", "raytrain.value"
_VERIFIED = "raytrain.verified"
_SINCE = "raytrain.champion_since"
"""Tag of a version: the time at which it became champion. A rollback searches the versions that have it."""
_DECIDED = "raytrain.decided"
"""Tag of a registered model: the version that was made champion by hand, and the newest version at that time. Versions
up to that newest one do not become champion again by themselves."""
_METRICS = "raytrain.metrics"
"""Tag of a version: the metrics of its best evaluation, as JSON."""


@dataclass(frozen=True)
class Score:
    """The score with which a version competes."""

    corpus: str
    """Digest of the corpus."""
    metric: str
    """Name of the metric and of the samples. Only scores with the same name are compared."""
    value: float
    """Lower is better."""

    def comparable(self, other: Score) -> bool:
        return (self.corpus, self.metric) == (other.corpus, other.metric)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A logged model to register, and the checkpoint that it was made from."""

    run: Run
    """MLflow run of the search."""
    model_id: str
    """Id of the logged model."""
    stored: Checkpoint
    corpus: Corpus
    score: Score
    metrics: dict[str, float]
    """Metrics of its best evaluation."""
    card: str
    """Model card in Markdown."""


class VerificationError(Exception):
    """A registered model differs from the checkpoint that it was made from."""


def registered_name(model: str) -> str:
    """Return the registered name for models of one kind."""
    return f"raytrain-{model}"


def register_and_compete(candidate: Candidate) -> tuple[str, int, str]:
    """Register a model, verify it, and let it compete; calling it again gives the same version.

    Returns:
        The registered name, the version and its alias (``champion`` or ``challenger``).

    Raises:
        VerificationError: it does not load, or does not score like its checkpoint; it gets no alias.
        mlflow.exceptions.MlflowException: the store was unavailable for too long.
    """
    run, model_id, score = candidate.run, candidate.model_id, candidate.score
    client = connect(run.uri)
    name = registered_name(candidate.stored.config["model"]["name"])
    _make_registered(run.uri, name)
    tags = {MODEL_ID: model_id, _CORPUS: score.corpus, _METRIC: score.metric, _VALUE: repr(score.value)}
    tags |= {_METRICS: json.dumps(candidate.metrics)}

    def find_or_create() -> int:
        found = _find_version(run.uri, name, model_id)
        if found is not None:
            return found
        created = client.create_model_version(
            name,
            f"models:/{model_id}",
            run.run_id,
            tags=tags,
            description=candidate.card[:MAX_DESCRIPTION],
            await_creation_for=0,  # it exists at once; waiting would only log that
            model_id=model_id,
        )
        return int(created.version)

    # if several processes create a version at once, MLflow may refuse some of them
    version = retry_tracking(find_or_create)
    nats = verify(run.uri, model_id, candidate.stored, candidate.corpus)
    retry_tracking(
        lambda: client.set_model_version_tag(
            name, str(version), _VERIFIED, f"{nats:.6f} nats on {VERIFIED_SAMPLES} samples"
        )
    )
    champion = update_champion(run.uri, name)
    if champion == version:
        if _aliases(run.uri, name).get(CHALLENGER) == version:
            retry_tracking(lambda: client.delete_registered_model_alias(name, CHALLENGER))
        return name, version, CHAMPION
    retry_tracking(lambda: client.set_registered_model_alias(name, CHALLENGER, str(version)))
    return name, version, CHALLENGER


def verify(uri: str, model_id: str, stored: Checkpoint, corpus: Corpus) -> float:
    """Load a logged model back, score it on validation samples, and return its mean negative ELBO in nats.

    Raises:
        VerificationError: it does not load, or its negative ELBO differs from that of ``stored``.
    """
    try:
        loaded = load_logged_model(uri, model_id)
    except UserError as error:
        raise VerificationError(str(error)) from None
    found, expected = _negative_elbo(loaded, corpus), _negative_elbo(stored, corpus)
    if not math.isclose(found, expected, rel_tol=1e-6):
        raise VerificationError(
            f"model {model_id} has a negative ELBO of {found:.6f} nats on {VERIFIED_SAMPLES} validation samples, "
            f"its checkpoint {stored.uri} has {expected:.6f}"
        )
    return found


def _negative_elbo(stored: Checkpoint, corpus: Corpus) -> float:
    config = dataclasses.replace(from_dict(stored.config), evaluate_samples=VERIFIED_SAMPLES, precision="float32")
    trainer = Trainer(config, corpus, World())
    trainer.use_vocabulary(stored_vocabulary(stored))
    trainer.model.load_state_dict(stored.tensors("model"))
    return trainer.evaluate()["bound"]


# ------------------------------------------------------------------------------------------ the alias


def update_champion(uri: str, name: str) -> int | None:
    """Give the champion alias to the best eligible version; return the version that holds the alias.

    MLflow has no compare-and-set for aliases, so a process that has moved the alias checks again. A version competes
    as soon as it is tagged as verified. If several searches end at once, the last to check therefore sees all versions
    and leaves the alias on the best.
    """
    decision = _decision(uri, name)
    for _ in range(50):
        champion = _aliases(uri, name).get(CHAMPION)
        best = _best(versions(uri, name), champion, decision[1])
        if best is None or best == champion:
            return champion
        _mark(uri, name, best)
        _set_champion(uri, name, best)
        time.sleep(random.uniform(0.05, 0.3))  # desynchronise processes that check at the same moment
        before, decision = decision, _decision(uri, name)
        if decision != before:  # moved by hand meanwhile: that decision wins
            _set_champion(uri, name, decision[0])
    return _aliases(uri, name).get(CHAMPION)


def _best(known: list[ModelVersion], champion: int | None, decided: int) -> int | None:
    """Return the version that should be champion, if any.

    A version competes with the current champion if it is comparable, verified, and newer than the last manual decision.
    """
    scores = {int(version.version): read_score(version) for version in known}
    rivals = {
        number: score for number, score in scores.items() if number > decided and _VERIFIED in _tags(known, number)
    }
    if champion is None:
        # the first verified version defines the corpus and the metric of the comparison
        reference = scores[min(rivals)] if rivals else None
    else:
        reference = rivals[champion] = scores[champion]
    values = {number: score.value for number, score in rivals.items() if reference and score.comparable(reference)}
    return min(values, key=lambda number: (values[number], number), default=None)


def _tags(known: list[ModelVersion], number: int) -> dict[str, str]:
    return next(dict(version.tags) for version in known if int(version.version) == number)


def read_score(version: ModelVersion) -> Score:
    """Return the score of a version. A version that was not registered by a search never wins."""
    tags = version.tags
    return Score(tags.get(_CORPUS, ""), tags.get(_METRIC, ""), float(tags.get(_VALUE, math.inf)))


def versions(uri: str, name: str) -> list[ModelVersion]:
    """Return all versions of a registered model, oldest first."""
    client = connect(uri)
    found = retry_tracking(lambda: client.search_model_versions(f"name = '{name}'"))
    return sorted(found, key=lambda version: int(version.version))


def promote(uri: str, name: str, version: int) -> None:
    """Make a version champion by hand.

    Raises:
        UserError: there is no such version, or it does not load.
    """
    chosen = next((known for known in versions(uri, name) if int(known.version) == version), None)
    if chosen is None:
        raise UserError(f"{name} has no version {version}: python -m raytrain.registry list")
    load_logged_model(uri, logged_model(chosen))
    _mark(uri, name, version)
    _decide(uri, name, version)


def rollback(uri: str, name: str) -> tuple[int, int]:
    """Make the previous champion champion again; return the version it replaces, and its own.

    Raises:
        UserError: there is no champion, or no earlier one, or the earlier one no longer loads.
    """
    client = connect(uri)
    champion = _aliases(uri, name).get(CHAMPION)
    if champion is None:
        raise UserError(f"{name} has no champion: python -m raytrain.registry promote {name} VERSION makes one")
    past = {
        int(version.version): version
        for version in versions(uri, name)
        if _SINCE in version.tags and int(version.version) != champion
    }
    if not past:
        raise UserError(f"{name}: version {champion} is the only champion that there has been")
    before = max(past, key=lambda number: past[number].tags[_SINCE])
    load_logged_model(uri, logged_model(past[before]))
    # in this order, so that an interrupted rollback can be repeated
    retry_tracking(lambda: client.delete_model_version_tag(name, str(champion), _SINCE))
    _decide(uri, name, before)
    return champion, before


def _decide(uri: str, name: str, version: int) -> None:
    """Move the alias by hand: searches that end at this moment check again, and then see the decision."""
    client = connect(uri)
    newest = max(int(known.version) for known in versions(uri, name))
    retry_tracking(lambda: client.set_registered_model_tag(name, _DECIDED, f"{version} {newest}"))
    _set_champion(uri, name, version)


def _set_champion(uri: str, name: str, version: int) -> None:
    retry_tracking(lambda: connect(uri).set_registered_model_alias(name, CHAMPION, str(version)))


def _mark(uri: str, name: str, version: int) -> None:
    """Record the time at which a version became champion."""
    client, now = connect(uri), datetime.now(UTC).isoformat(timespec="microseconds")
    retry_tracking(lambda: client.set_model_version_tag(name, str(version), _SINCE, now))


def _aliases(uri: str, name: str) -> dict[str, int]:
    model = retry_tracking(lambda: connect(uri).get_registered_model(name))
    return {alias: int(version) for alias, version in model.aliases.items()}


def _decision(uri: str, name: str) -> tuple[int, int]:
    """Return the last decision by hand: the champion, and the newest version at that time; 0 and 0 if none."""
    model = retry_tracking(lambda: connect(uri).get_registered_model(name))
    champion, newest = map(int, model.tags.get(_DECIDED, "0 0").split())
    return champion, newest


def _make_registered(uri: str, name: str) -> None:
    description = (
        "Text generators trained by raytrain. Small models of public text: what they write may be false or rude."
    )

    def make() -> None:
        try:
            connect(uri).create_registered_model(name, description=description)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    retry_tracking(make)


def _find_version(uri: str, name: str, model_id: str) -> int | None:
    return next((int(known.version) for known in versions(uri, name) if known.tags.get(MODEL_ID) == model_id), None)


# -------------------------------------------------------------------------------------------- listing


def registered_names(uri: str) -> list[str]:
    """Return the names of raytrain's registered models; empty if there is no tracking store yet.

    Raises:
        UserError: the tracking store cannot be used.
    """
    if not is_there(uri):
        return []
    check_tracking(uri)
    found = retry_tracking(lambda: connect(uri).search_registered_models("name LIKE 'raytrain-%'"))
    return sorted(model.name for model in found)


def version_rows(uri: str, name: str) -> list[dict[str, str]]:
    """Return one row of text per version of a registered model, by column."""
    aliases: dict[int, list[str]] = {}
    for alias, number in _aliases(uri, name).items():
        aliases.setdefault(number, []).append(alias)
    known = versions(uri, name)
    evaluations: list[dict[str, float]] = [json.loads(version.tags.get(_METRICS, "{}")) for version in known]
    columns = shown_metrics(evaluations)
    rows = []
    for version, metrics in zip(known, evaluations, strict=True):
        tags: dict[str, Any] = dict(version.tags)
        rows.append(
            {
                "version": str(version.version),
                "alias": ", ".join(sorted(aliases.get(int(version.version), []))),
                **{metric.label: metric.format(metrics) for metric in columns},
                "measured on": tags.get(_METRIC, ""),
                "corpus": tags.get(_CORPUS, "")[:12],
                "verified": tags.get(_VERIFIED, "no"),
                "run": str(version.run_id or "")[:12],
            }
        )
    return rows

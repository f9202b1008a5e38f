"""Winner of an earlier search, to train for longer or at a larger size."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow.exceptions import MlflowException

from raytrain.config.schema import LOCATION, RunConfig, from_dict
from raytrain.runs.records import BEST_CONFIG, read_values, search_objective_of
from raytrain.runs.repeats import confirm_of, winner
from raytrain.runs.trials import TrialStore
from raytrain.runs.workspace import Workspace, open_workspace, reopen_workspace
from raytrain.storage import open_storage_root
from raytrain.storage.base import Storage
from raytrain.tracking.client import check_tracking, connect, is_there, is_usable, retry_tracking, tracking_uri
from raytrain.tracking.queries import CORPUS, download, searches
from raytrain.tracking.runs import PARENT
from raytrain.utils.errors import UserError
from raytrain.utils.validation import parse_json

if TYPE_CHECKING:
    from raytrain.tracking.queries import Child

BEST_TRIAL = "raytrain.best_trial"
"""Tag of a search: the number of its winner."""


@dataclass(frozen=True)
class Winner:
    """The best trial of a search."""

    config: RunConfig[Any]
    search: str
    """Name of the search."""
    trial: str
    parent: str
    """MLflow run id of the search, or its name if the tracking store does not know it."""
    corpus: str
    """Digest of its corpus."""
    corpus_path: str
    """Path of the corpus on the machine of the search; empty if not known."""

    def open_workspace(self, config: RunConfig[Any], storage: str | None) -> Workspace:
        """Open a workspace for ``config``: on the search's own corpus, unless ``config`` names other text.

        Raises:
            UserError: as for ``workspace.open_workspace``; or the text has changed since the search.
        """
        if any(getattr(config, name) != getattr(self.config, name) for name in LOCATION):
            return open_workspace(config, storage)
        try:
            return reopen_workspace(storage, self.corpus, self.corpus_path)
        except UserError:
            workspace = open_workspace(config, storage)  # preparing the text again may give the same corpus
        if workspace.corpus.digest != self.corpus:
            raise UserError(
                f"--best-of {self.search}: the text at {config.data} is not what the search was run on: name it "
                "by --data"
            )
        return workspace


def find_winner(name: str, storage: str | None, experiment: str) -> Winner:
    """Return the best trial of the search ``name`` in the storage or in MLflow, or of an experiment's newest search.

    Raises:
        UserError: there is no such search or experiment, or no trial there has won.
    """
    root = open_storage_root(storage)
    if re.fullmatch(r"[\w.-]+", name) and (values := read_values(root.child(name))) is not None:
        return _recorded(name, root.child(name), values)
    found = _tracked(name, experiment)
    if found is None:
        raise UserError(
            f"--best-of {name}: there is no such search in {root.uri()}, nor such a search or experiment in MLflow; "
            "--storage and MLFLOW_TRACKING_URI say where to look"
        )
    return found


def _recorded(name: str, location: Storage, values: dict[str, Any]) -> Winner:
    """Return the winner according to the search's own records; the search may still be running."""
    search_objective = search_objective_of(values)
    trials = TrialStore(location).read()
    best = winner(trials, search_objective, confirm_of(values))
    if best is None and winner(trials, search_objective) is not None:
        more = "" if values.get("parts") else f"; python -m raytrain.tune --resume {name} --num-samples N tries more"
        raise UserError(f"--best-of {name}: no config of the search was confirmed{more}")
    if best is None:
        least = search_objective.min_used
        lacks = f" that uses at least {least:g} nats of its code" if least else ""
        raise UserError(f"--best-of {name}: no trial of the search has been evaluated{lacks} yet")
    parent = _parent(best.run.get("run_id", "")) or name
    return Winner(best.config, name, best.name, parent, values["corpus"], values["corpus_path"])


def _parent(run_id: str) -> str | None:
    """Return the run id of the search if the current tracking store has the trial's run."""
    uri = tracking_uri()
    if not run_id or not is_usable(uri):
        return None
    try:
        tags: dict[str, str] = connect(uri).get_run(run_id).data.tags
    except MlflowException:
        return None
    return tags.get(PARENT)


def _tracked(name: str, experiment: str) -> Winner | None:
    """Return the winner of a search of ``experiment`` in MLflow, or of the newest one in the experiment ``name``."""
    uri = tracking_uri()
    if not is_there(uri):
        return None
    check_tracking(uri)
    known = {item.name: item.experiment_id for item in retry_tracking(lambda: connect(uri).search_experiments())}
    found = list(searches(uri, known[experiment], name=name)) if experiment in known else []
    if not found and name not in known:
        return None
    for search in found or searches(uri, known[name]):
        if BEST_TRIAL in search.tags:
            return _of_search(search)
    raise UserError(f"--best-of {name}: no search there has ended with a winner yet")


def _of_search(search: Child) -> Winner:
    with tempfile.TemporaryDirectory(prefix="raytrain-") as scratch:
        file = download(search.run, BEST_CONFIG, Path(scratch))
        if file is None:
            raise UserError(f"--best-of {search.name}: its run {search.run.run_id} has lost {BEST_CONFIG}")
        try:
            config = from_dict(parse_json(file.read_bytes()))
        except ValueError as error:
            raise UserError(f"--best-of {search.name}: its {BEST_CONFIG} is not JSON: {error}") from None
    return Winner(config, search.name, search.tags[BEST_TRIAL], search.run.run_id, search.tags.get(CORPUS, ""), "")

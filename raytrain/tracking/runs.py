"""Experiments and runs: one run per identity, whatever restarts, with its parameters, tags and files."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag, ViewType

from raytrain.tracking.client import LOG, connect, is_server, one_at_a_time, retry_tracking, ui_hint
from raytrain.tracking.system import code_tags, host_tags
from raytrain.utils.errors import UserError

MAX_PARAMETER = 6000
MAX_TAG = 8000
MAX_DATASET_DIGEST = 12
MOST_RUNS = 50_000
"""Most runs that MLflow lists in one answer."""
IDENTITY = "raytrain.identity"
PARENT = "mlflow.parentRunId"
REASON = "raytrain.reason"
DESCRIPTION = "mlflow.note.content"
Status = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class Run:
    """The address of one run: small, picklable, and valid in any process that can reach the store."""

    uri: str
    experiment_id: str
    run_id: str
    created_ms: int
    """Creation time of the run, in milliseconds since 1970."""

    def address(self) -> dict[str, Any]:
        """Return the fields that locate the run in its store, but not its address, which may hold a password."""
        return {"experiment_id": self.experiment_id, "run_id": self.run_id, "created_ms": self.created_ms}

    def finish(self, status: Status, reason: str | None = None) -> None:
        """End the run; ``reason`` (why it failed or was stopped) becomes a tag."""
        client = connect(self.uri)
        if reason is not None:
            self.set_tags({REASON: reason})
        retry_tracking(lambda: client.set_terminated(self.run_id, status))

    def is_running(self) -> bool:
        """Return whether the run has not been marked as ended."""
        return bool(retry_tracking(lambda: connect(self.uri).get_run(self.run_id)).info.status == "RUNNING")

    def set_tags(self, tags: dict[str, str]) -> None:
        """Set tags by their full names; values longer than MLflow allows are cut."""
        entries = [RunTag(key, _cut(value, MAX_TAG)) for key, value in tags.items()]
        retry_tracking(lambda: connect(self.uri).log_batch(self.run_id, tags=entries))

    def describe(self, markdown: str) -> None:
        """Set the description that the UI shows at the top of the run's page."""
        self.set_tags({DESCRIPTION: markdown})

    def log_parameters(self, parameters: dict[str, Any]) -> None:
        """Log parameters, nested ones under dotted names; a parameter that the run already has keeps its value."""
        client = connect(self.uri)
        known = retry_tracking(lambda: client.get_run(self.run_id)).data.params
        new = [Param(key, value) for key, value in flat(parameters).items() if key not in known]
        retry_tracking(lambda: client.log_batch(self.run_id, params=new))

    def log_dataset(self, name: str, digest: str, source: str, profile: dict[str, Any]) -> None:
        """Log the corpus as the run's dataset; ``profile`` describes it, as in ``{"train": {"documents": 10}}``."""
        kinds = {"s3": "s3", "http": "http", "https": "http"}
        dataset = Dataset(
            name=name,
            digest=digest[:MAX_DATASET_DIGEST],
            source_type=kinds.get(urlsplit(source).scheme, "local"),
            source=json.dumps({"uri": source}),
            profile=json.dumps(profile),
        )
        inputs = [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])]
        retry_tracking(lambda: connect(self.uri).log_inputs(self.run_id, datasets=inputs))

    def log_text(self, text: str, name: str) -> None:
        """Store ``text`` as artifact ``name``, which may include folders."""
        retry_tracking(lambda: connect(self.uri).log_text(self.run_id, text, name))

    def log_dict(self, values: dict[str, Any], name: str) -> None:
        """Store ``values`` as JSON in the artifact ``name``."""
        self.log_text(json.dumps(values, indent=2) + "\n", name)

    def log_file(self, path: Path, folder: str | None = None) -> None:
        """Store a local file under its own name, in ``folder`` of the run's artifacts."""
        retry_tracking(lambda: connect(self.uri).log_artifact(self.run_id, str(path), folder))

    def ui_hint(self) -> str:
        """Return how to view the run: its link or, without a server, the command that starts the UI."""
        return ui_hint(self.uri, self.experiment_id, self.run_id)


@dataclass(frozen=True)
class Experiment:
    """One experiment of the store; opened by the driver."""

    uri: str
    name: str
    experiment_id: str

    @classmethod
    def open(cls, uri: str, name: str, artifact_root: str) -> Experiment:
        """Find experiment ``name``, or create it.

        Without a server, the artifacts of a new experiment go under ``artifact_root`` (a folder or s3://...). A server
        has its own location. An existing experiment keeps its location.

        Raises:
            UserError: the experiment has been deleted.
        """
        client = connect(uri)
        location = None
        if not is_server(uri):
            location = artifact_root if "://" in artifact_root else str(Path(artifact_root).resolve())

        def find_or_create() -> str:
            found = client.get_experiment_by_name(name)
            if found is None:
                return client.create_experiment(name, location)
            if found.lifecycle_stage == "deleted":
                raise UserError(
                    f"tracking: experiment {name!r} was deleted; choose another name, or restore it with "
                    f"`mlflow experiments restore --experiment-id {found.experiment_id}`"
                )
            return found.experiment_id

        with one_at_a_time(uri):
            return cls(uri, name, retry_tracking(find_or_create))

    def find_run(self, identity: str, parent: str | None = None) -> Run | None:
        """Return the run of ``identity`` (under ``parent``), or ``None``; if there are several, the oldest.

        Raises:
            ValueError: the identity cannot be searched for.
        """
        found = self._search(identity, parent, ViewType.ACTIVE_ONLY)
        return self._address(found[0].info) if found else None

    def running(self, parent: str) -> dict[str, str]:
        """Return the runs under ``parent`` that have not been marked as ended: identity -> run id."""
        condition = f"tags.`{PARENT}` = '{parent}' AND attributes.status = 'RUNNING'"
        found = retry_tracking(
            lambda: list(connect(self.uri).search_runs([self.experiment_id], condition, max_results=MOST_RUNS))
        )
        return {run.data.tags[IDENTITY]: run.info.run_id for run in found if IDENTITY in run.data.tags}

    def deleted_run(self, identity: str, parent: str | None = None) -> Run | None:
        """Return the run of ``identity`` (under ``parent``) if it has been deleted, and log that; else ``None``."""
        found = self._search(identity, parent, ViewType.ALL)
        if not found or any(run.info.lifecycle_stage == "active" for run in found):
            return None
        run = self._address(found[0].info)
        LOG.warning("the MLflow run %s has been deleted, and stays so: nothing more of it is recorded", run.run_id)
        return run

    def open_run(
        self,
        identity: str,
        name: str,
        *,
        parent: str | None = None,
        config: dict[str, Any] | None = None,
        parameters: dict[str, Any],
        tags: dict[str, str],
    ) -> Run:
        """Find the run of ``identity`` and set it running again, or create it.

        If several processes of one machine call this at once, one creates the run and the others find it. (Drivers on
        several machines that start one identity in the same second may each create a run; the oldest is found from then
        on.)

        Args:
            identity: identity of the run, unique within the experiment and ``parent``.
            name: name of the run in the UI.
            parent: run id of the search that it belongs to.
            config: artifact ``config.json``, which ``raytrain.train --config`` accepts.
            parameters: nested or flat; values are cut to the length that MLflow allows.
            tags: each becomes tag ``raytrain.KEY``; code, versions and machine are added.
        """
        all_tags = {**code_tags(), **host_tags(), **{f"raytrain.{key}": value for key, value in tags.items()}}
        first_tags = {IDENTITY: identity} | ({PARENT: parent} if parent else {})

        def find_or_create() -> Run:
            run = self.find_run(identity, parent)
            if run is not None:
                return run
            created = connect(self.uri).create_run(
                self.experiment_id, tags={**first_tags, "mlflow.user": all_tags["mlflow.user"]}, run_name=name
            )
            return self._address(created.info)

        with one_at_a_time(self.uri):
            run = retry_tracking(find_or_create)
        self._set_running(run)
        run.set_tags(all_tags)
        run.log_parameters(parameters)
        if config is not None:
            run.log_dict(config, "config.json")
        return run

    def ui_hint(self) -> str:
        """Return how to view the experiment's runs: the link or, without a server, the command that starts the UI."""
        return ui_hint(self.uri, self.experiment_id)

    def _set_running(self, run: Run) -> None:
        client = connect(self.uri)
        state = retry_tracking(lambda: client.get_run(run.run_id))
        if state.info.status != "RUNNING":
            retry_tracking(lambda: client.update_run(run.run_id, status="RUNNING"))
        if REASON in state.data.tags:
            retry_tracking(lambda: client.delete_tag(run.run_id, REASON))

    def _search(self, identity: str, parent: str | None, view: int) -> list[Any]:
        """Return MLflow's runs of ``identity`` (under ``parent``), oldest first."""
        if not re.fullmatch(r"[\w.:/-]+", identity):
            raise ValueError(f"identity is {identity!r}: use letters, digits and _ . : / -")
        condition = f"tags.`{IDENTITY}` = '{identity}'" + (f" AND tags.`{PARENT}` = '{parent}'" if parent else "")
        return retry_tracking(
            lambda: list(
                connect(self.uri).search_runs(
                    [self.experiment_id], condition, view, max_results=10, order_by=["attributes.start_time ASC"]
                )
            )
        )

    def _address(self, info: Any) -> Run:
        return Run(self.uri, self.experiment_id, info.run_id, info.start_time)


def flat(parameters: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested parameters under dotted names, as MLflow keeps them."""
    values: dict[str, str] = {}
    for key, value in parameters.items():
        if isinstance(value, dict) and value:
            values.update(flat(value, f"{prefix}{key}."))
        else:
            text = json.dumps(value) if isinstance(value, (dict, list, tuple)) else str(value)
            values[prefix + str(key)] = _cut(text, MAX_PARAMETER)
    return values


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."

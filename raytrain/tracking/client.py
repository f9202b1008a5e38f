"""MLflow client: the address of the store, checking that it answers, retries, and how to view it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.s3_artifact_repo import _cached_get_s3_client
from sqlalchemy import create_engine
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from raytrain.storage.s3 import renew_default_session
from raytrain.utils.errors import UserError
from raytrain.utils.files import local_path, locked, private_folder
from raytrain.utils.retry import retry

LOG = logging.getLogger("raytrain.tracking")
SQLITE = "sqlite:///"
_SQLITE_HEAD = b"SQLite format 3\0"
PATIENCE_S = 120.0
"""How long repeatable calls are retried while the store is unavailable."""
TRACKING_ERRORS = (MlflowException, SQLAlchemyError, OSError, Boto3Error, BotoCoreError, ClientError)
"""Exceptions that calls to MLflow or to its artifact store raise."""
_REFUSED_CODES = ("UNAUTHENTICATED", "PERMISSION_DENIED")
_REFUSED = re.compile(r"unauthenticated|permission.denied|\b(400|401|403)\b|expired", re.IGNORECASE)
"""Matches MLflow's error messages when S3 refused the keys."""
_PATIENCE: ContextVar[float | None] = ContextVar("patience", default=None)
T = TypeVar("T")


DATABASES = ("postgresql", "mysql", "mssql")
"""Databases, besides sqlite, in which MLflow keeps runs."""
_PACKAGES = {"psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}
"""Module of a database's driver -> the package that provides it, if that has another name."""
_EXPECTED = "give sqlite:///FILE, http://HOST:PORT, or postgresql+psycopg2://USER:PASSWORD@HOST/DATABASE"


def tracking_uri() -> str:
    """Return the MLflow store to use: ``MLFLOW_TRACKING_URI``, or else ``mlflow.db`` in the working directory.

    The latter is MLflow's own default, so that ``mlflow ui`` there just works. A relative path is made absolute, since
    workers run in other directories.

    Raises:
        UserError: the variable names a plain folder, which MLflow no longer supports as a store; or as for
            ``check_address``.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}mlflow.db"
    if uri.startswith(SQLITE):
        uri = SQLITE + str(Path.cwd() / local_path(uri.removeprefix(SQLITE), "MLFLOW_TRACKING_URI"))
    elif "@" not in uri and ("://" not in uri or uri.startswith("file:")):
        path = urlsplit(uri).path.rstrip("/")
        raise UserError(
            f"MLFLOW_TRACKING_URI is {uri!r}: MLflow no longer keeps runs in a plain folder; "
            f"use sqlite:///{path}/mlflow.db or the address of an mlflow server"
        )
    uri = uri.rstrip("/")
    check_address(uri)
    return uri


def is_server(uri: str) -> bool:
    """Return whether ``uri`` is a tracking server, which then also owns the artifacts."""
    return urlsplit(uri).scheme in ("http", "https")


def check_address(uri: str) -> None:
    """Make sure that ``uri`` is the address of a store, without contacting it.

    Raises:
        UserError: it is not, or there is no driver for its database. The message never repeats a possible password.
    """
    scheme = uri.partition("://")[0]
    if uri.startswith(SQLITE):
        if sqlite_file(uri).name in ("", ":memory:"):
            raise UserError("MLFLOW_TRACKING_URI: a database in memory cannot be shared; give sqlite:///FILE")
    elif scheme in ("http", "https"):
        try:
            parts = urlsplit(uri)
            usable = bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise UserError(
                "MLFLOW_TRACKING_URI is no address of a server: write http://HOST:PORT; a password goes into "
                "MLFLOW_TRACKING_PASSWORD, or has %23 for # and %2F for /"
            )
    elif scheme.partition("+")[0] in DATABASES:
        _check_driver(uri)
    else:
        raise UserError(f"MLFLOW_TRACKING_URI is no address of a store that MLflow knows: {_EXPECTED}")


def _check_driver(uri: str) -> None:
    try:
        make_url(uri).get_dialect().import_dbapi()
    except ModuleNotFoundError as error:
        package = _PACKAGES.get(error.name or "", error.name)
        raise UserError(
            f"MLFLOW_TRACKING_URI: the database's driver is missing: pip install {package}, or name the one that is "
            "installed, as in postgresql+psycopg2:// or mysql+pymysql://"
        ) from None
    except (SQLAlchemyError, ValueError):
        raise UserError(f"MLFLOW_TRACKING_URI cannot be parsed: {_EXPECTED}") from None


def sqlite_file(uri: str) -> Path:
    """Return the file of a sqlite address."""
    return Path(uri.removeprefix(SQLITE).partition("?")[0])


def _check_file(file: Path) -> None:
    if file.is_dir():
        raise UserError(f"tracking: {file} is a folder: name a file in it, such as sqlite:///{file}/mlflow.db")
    try:
        with open(file, "rb") as opened:
            head = opened.read(len(_SQLITE_HEAD))
    except OSError:  # it will be created, or check_tracking reports why it cannot be
        return
    if head not in (b"", _SQLITE_HEAD):
        raise UserError(f"tracking: {file} is not a database; remove it or set MLFLOW_TRACKING_URI to another")


def check_tracking(uri: str, num_nodes: int = 1) -> None:
    """Make sure that runs can be logged to ``uri`` from ``num_nodes`` machines.

    Raises:
        UserError: the store does not answer or refuses access, is not a usable database, or is a sqlite file for
            several machines.
    """
    check_address(uri)
    if uri.startswith(SQLITE):
        _check_sqlite(uri, num_nodes)
    try:
        if not uri.startswith(SQLITE) and not is_server(uri):
            _check_database(uri)
        with one_at_a_time(uri):
            connect(uri).search_experiments(max_results=1)
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise UserError(f"tracking: {shown(uri)} cannot be used: {explain(error)}") from None


def _check_database(uri: str) -> None:
    """Connect to a database once: MLflow itself would retry for minutes, and print each failure.

    Raises:
        SQLAlchemyError, OSError: it does not answer, or refuses.
    """
    url = make_url(uri)
    port = url.port or {"postgresql": 5432, "mysql": 3306, "mssql": 1433}[url.get_backend_name()]
    if url.host and "," not in url.host:
        socket.create_connection((url.host, port), timeout=10).close()
    create_engine(url, poolclass=NullPool).connect().close()


def _check_sqlite(uri: str, num_nodes: int) -> None:
    if num_nodes > 1:
        raise UserError(
            f"tracking: {uri} is a file and cannot be shared by {num_nodes} nodes; "
            "start `mlflow server` and set MLFLOW_TRACKING_URI to its address"
        )
    path = sqlite_file(uri)
    _check_file(path)
    target = path if path.exists() else path.parent
    if not target.exists() or not os.access(target, os.W_OK):
        problem = "cannot be written" if target.exists() else "does not exist"
        raise UserError(f"tracking: {target} {problem}; set MLFLOW_TRACKING_URI to a location that can be written")


def older_store(uri: str) -> Path | None:
    """Return an older MLflow's folder beside the sqlite file at ``uri``; a plain ``mlflow ui`` there would use it."""
    if not uri.startswith(SQLITE):
        return None
    folder = sqlite_file(uri).parent / "mlruns"
    return folder if any(item.parent.name.isdigit() for item in folder.glob("*/meta.yaml")) else None


def explain(error: Exception) -> str:
    """Return, in one line, what went wrong and, if known, how to fix it."""
    status = error.get_http_status_code() if isinstance(error, MlflowException) else None
    if status == 401:
        return "not authorised (401): set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    if status == 403:
        return (
            "refused (403): the user that MLFLOW_TRACKING_USERNAME names may not do this, "
            "or the server was started without --allowed-hosts naming this address"
        )
    text = re.sub(r"(://)\S*@|(password=)[^\s&]*", r"\1\2", " ".join(str(error).split()))
    no_answer = "no answer; is the server running, and MLFLOW_TRACKING_URI right?"
    for sign, advice in {
        "error responses": "the server answers that it has failed; its log says why",
        "Max retries exceeded": no_answer,
        "Connection aborted": no_answer,
        "timed out": no_answer,
        "out-of-date database schema": "it was made by an older MLflow: run `mlflow db upgrade` on a copy of it first",
        "database is locked": "another program, such as a backup, keeps the database locked",
        "file is not a database": "the file is not a database; remove it or set MLFLOW_TRACKING_URI",
        "Can't locate revision": "it was made by a newer MLflow than the one installed here",
    }.items():
        if sign in text:
            return advice
    return text[:300]


def shown(uri: str) -> str:
    """Return ``uri`` without the user name and password that it may hold, whatever characters they contain."""
    if uri.startswith(SQLITE):
        return uri
    scheme, separator, rest = uri.partition("://")
    return (scheme + separator + rest.rpartition("@")[2]).partition("?")[0]


def ui_hint(uri: str, experiment_id: str, run_id: str | None = None) -> str:
    """Return how to view a run or, without ``run_id``, the experiment's table of runs.

    With a server, that is the link itself. Without one, it is the command that starts the UI, and the link.
    """
    page = f"#/experiments/{experiment_id}/runs" + (f"/{run_id}" if run_id else "")
    page += "?workflowType=machine_learning"  # otherwise a new browser is shown MLflow's pages for agents
    if is_server(uri):
        return f"{shown(uri)}/{page}"
    # A database's address may hold its password: such an address can only have come from the variable.
    store = uri if uri.startswith(SQLITE) else '"$MLFLOW_TRACKING_URI"'
    return f"mlflow ui --backend-store-uri {store}   then open http://127.0.0.1:5000/{page}"


@functools.lru_cache(maxsize=8)
def connect(uri: str) -> MlflowClient:
    """Return a client of the store at ``uri``; a process's first call sets the variables that MLflow's client reads."""
    # MLflow's own retries would resend a create_run whose answer was lost, and sleep for up to minutes
    # after the server is back. `retry_tracking` and MetricWriter retry instead.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    logging.getLogger("mlflow.pyfunc").setLevel(logging.WARNING)
    # MLflow logs every database error with two tracebacks: the caller gets the error too, and reports it in one line
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)

    return MlflowClient(uri)


def is_transient(error: Exception) -> bool:
    """Return whether repeating the call later may help: no answer, too busy, or a failure inside the server."""
    if isinstance(error, ClientError):
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    elif isinstance(error, MlflowException):
        # a server that has no free database connections reports it as if the request were wrong
        status = 503 if "QueuePool limit" in str(error) else error.get_http_status_code()
    else:
        return True
    return status >= 500 or status == 429


def is_gone(error: Exception) -> bool:
    """Return whether the run or its experiment is deleted; MLflow keeps it in that state until `mlflow gc`."""
    # not if the run does not exist at all: a server may have been started with another database by mistake
    return isinstance(error, MlflowException) and "must be in the 'active' state" in str(error)


def is_deleted(uri: str, run_id: str, error: Exception) -> bool:
    """Return whether ``error`` arose because somebody has deleted the run itself, so that its records may be dropped.

    If the whole experiment was deleted, restoring it also restores the run. Its records are then kept, as while MLflow
    is unavailable.
    """
    if not is_gone(error):
        return False
    try:
        run = connect(uri).get_run(run_id)
        experiment = connect(uri).get_experiment(run.info.experiment_id)
    except TRACKING_ERRORS:
        return False  # unknown for now: the next attempt asks again
    return bool(experiment.lifecycle_stage == "active")


@contextlib.contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Retry calls of MLflow in this thread for ``seconds`` inside the block, instead of ``PATIENCE_S``."""
    token = _PATIENCE.set(seconds)
    try:
        yield
    finally:
        _PATIENCE.reset(token)


def retry_tracking(action: Callable[[], T], patience_s: float | None = None) -> T:
    """Return what ``action`` returns; while MLflow or its artifact store is unavailable, retry for ``patience_s``.

    ``action`` must be safe to repeat. ``None`` means the value set by ``patience``, or else ``PATIENCE_S``. If the keys
    of the artifact store have changed, ``action`` is repeated at once.

    Raises:
        Exception: the last failure of MLflow or of the artifact store, when the time is up or if the failure is
            permanent.
    """

    def attempt() -> T:
        try:
            return action()
        except TRACKING_ERRORS as error:
            if not (_may_be_keys(error) and take_up_keys()):
                raise
        return action()

    stated = _PATIENCE.get() if patience_s is None else patience_s
    return retry(
        attempt,
        TRACKING_ERRORS,
        seconds=PATIENCE_S if stated is None else stated,
        log=lambda error: LOG.warning("MLflow cannot be used now (%s); trying again", explain(error)),
        transient=is_transient,
        longest_pause=10.0,
    )


def _may_be_keys(error: Exception) -> bool:
    """Return whether the artifact store may have refused the keys; checked first, as finding new ones takes seconds."""
    return isinstance(error, (ClientError, Boto3Error)) or (
        isinstance(error, MlflowException)
        and (error.error_code in _REFUSED_CODES or _REFUSED.search(str(error)) is not None)
    )


def take_up_keys() -> bool:
    """Let MLflow's S3 clients use the current keys; return False if the keys have not changed.

    The clients take keys from boto3's default session of the process, which reads them once. MLflow caches a client for
    minutes.
    """
    if not renew_default_session():
        return False
    _cached_get_s3_client.cache_clear()
    return True


def download(uri: str, location: str, folder: Path) -> Path:
    """Fetch the artifacts at ``location`` in the store at ``uri`` into ``folder``; return where they are."""
    return Path(download_artifacts(artifact_uri=location, dst_path=str(folder), tracking_uri=uri))


@contextlib.contextmanager
def one_at_a_time(uri: str) -> Iterator[None]:
    """Keep other processes of this machine from creating something in the same store inside the block.

    MLflow has no "create unless it exists" for runs, and two processes cannot both create a sqlite file.
    """
    name = hashlib.sha256(uri.encode()).hexdigest()[:16]
    with locked(private_folder() / f"{name}.lock"):
        yield


def is_there(uri: str) -> bool:
    """Return whether ``uri`` can be queried: querying a sqlite file that does not exist would create it."""
    return not uri.startswith(SQLITE) or sqlite_file(uri).exists()


def is_usable(uri: str) -> bool:
    """Return whether a store at ``uri`` answers, for callers that can do without: MLflow itself would wait."""
    try:
        if uri.startswith(SQLITE):
            _check_file(sqlite_file(uri))
        elif not is_server(uri):
            _check_database(uri)
    except (UserError, SQLAlchemyError, OSError):
        return False
    return is_there(uri)

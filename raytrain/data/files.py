"""Files of a source: local files and folders, ``s3://`` objects, and public files in the cache."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import secrets
import shutil
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from raytrain.data.readers import readable
from raytrain.utils.errors import UserError
from raytrain.utils.files import expanded, local_path

KINDS = ".txt, .jsonl, .json, .js, .csv, .tsv (each also .gz, .bz2, .xz or .zst), .parquet or .zip"
"""Endings of the files that are used in a folder; a file that is named may have any ending."""
_TIMEOUT = 60
T = TypeVar("T")


@dataclass(frozen=True)
class Input:
    """One file of text: local, or an object in S3."""

    name: str
    """Its path or s3:// address, as shown to the user."""
    size: int
    """Bytes."""
    stamp: str
    """Changes when the file does: its modification time, or its ETag."""
    found: bool = False
    """Whether it was found in a folder, rather than named."""

    @property
    def basename(self) -> str:
        return self.name.rpartition("/")[2]

    @contextlib.contextmanager
    def local(self) -> Iterator[Path]:
        """Yield the file on this machine; an S3 object is fetched to a temporary file, which is removed afterwards.

        Raises:
            UserError: the object cannot be fetched; or, at the end, the file changed while it was read.
        """
        if not is_s3(self.name):
            yield Path(self.name)
            if not os.path.exists(self.name) or _local(Path(self.name), self.found) != self:
                raise UserError(f"{self.name} changed while it was read: do it again when it is complete")
            return
        bucket, key = _bucket_and_key(self.name)
        with tempfile.TemporaryDirectory(prefix="raytrain-") as folder:
            path = Path(folder) / self.basename
            with _s3_errors(self.name):
                _ask_s3(lambda client: client.download_file(bucket, key, str(path)))
            yield path


def is_s3(path: str) -> bool:
    return path[:5].lower() == "s3://"


def default_cache() -> Path:
    """Return ``$RAYTRAIN_CACHE`` or ``~/.cache/raytrain``.

    Raises:
        UserError: the variable does not name a folder; or, without it, the user has no home folder, as in a container.
    """
    if cache := os.environ.get("RAYTRAIN_CACHE"):
        return local_path(cache, "RAYTRAIN_CACHE")
    home = os.path.expanduser("~")
    if not os.path.isabs(home) or os.environ.get("HOME") == "":
        raise UserError("there is no home folder for the cache of corpora: set RAYTRAIN_CACHE to a folder, or HOME")
    return Path(home) / ".cache" / "raytrain"


def find(path: str) -> list[Input]:
    """Return the files at ``path``, sorted: the file itself, or the readable ones below the folder or s3:// prefix.

    Raises:
        UserError: nothing is there, or nothing readable.
    """
    if is_s3(path):
        return _find_s3(path)
    root = expanded(path)
    if os.path.isfile(root):  # False if the name is too long
        return [_local(root)]
    if not os.path.isdir(root):
        raise UserError(f"{path}: no such file or folder")
    found = sorted(item for item in root.rglob("*") if _is_text(item.name) and item.is_file())
    visible = [item for item in found if not any(part.startswith(".") for part in item.relative_to(root).parts)]
    if not visible:
        raise UserError(f"{path}: no text in this folder; it needs files that end in {KINDS}")
    return [_local(item, found=True) for item in visible]


def download(url: str, sha256: str, cache: Path) -> Path:
    """Return the file at ``url``, from the cache if it was fetched before.

    Raises:
        UserError: there is no network, or the file does not have the known checksum.
    """
    path = cache / "downloads" / f"{sha256[:16]}-{url.rpartition('/')[2]}"
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as response, open(partial, "wb") as file:
            shutil.copyfileobj(response, file)
        with open(partial, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            raise UserError(
                f"{url} has changed: its SHA-256 sum is {found}, not {sha256}; give the text with --data-path"
            )
        os.replace(partial, path)
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"cannot download {url} ({error}); where there is no network give --data-path") from None
    finally:
        partial.unlink(missing_ok=True)
    return path


def _local(path: Path, found: bool = False) -> Input:
    status = path.stat()
    return Input(str(path), status.st_size, str(status.st_mtime_ns), found)


def _is_text(name: str) -> bool:
    return readable(name) or name.lower().endswith(".zip")


# ------------------------------------------------------------------------------------------------- S3


def _find_s3(path: str) -> list[Input]:
    bucket, prefix = _bucket_and_key(path)
    with _s3_errors(path):
        objects = _ask_s3(lambda client: _objects(client, bucket, prefix))
    # Consoles create an empty object "PREFIX/" for a folder, so an exact match is the named object only without it.
    below = prefix if not prefix or prefix.endswith("/") else prefix + "/"
    exact = [item for item in objects if item["Key"] == prefix != below]
    chosen = exact or [item for item in objects if item["Key"].startswith(below)]
    if not chosen:
        raise UserError(f"{path}: no such object or prefix")
    text = exact or [item for item in chosen if _is_text(item["Key"])]
    if not text:
        raise UserError(f"{path}: nothing to read; objects must end in {KINDS}")
    inputs = [Input(f"s3://{bucket}/{item['Key']}", item["Size"], item["ETag"], not exact) for item in text]
    return sorted(inputs, key=lambda item: item.name)


def _bucket_and_key(path: str) -> tuple[str, str]:
    bucket, _, key = path[len("s3://") :].partition("/")
    if not bucket:
        raise UserError(f"{path}: give s3://BUCKET/KEY or s3://BUCKET/PREFIX")
    return bucket, key


def _objects(client: Any, bucket: str, prefix: str) -> list[dict[str, Any]]:
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    return [item for page in pages for item in page.get("Contents", [])]


def _ask_s3(request: Callable[[Any], T]) -> T:
    """Return the result of ``request`` with a client; repeat it with changed keys if the first keys are refused."""
    from raytrain.storage.s3 import by_default_session

    return by_default_session(request)


@contextlib.contextmanager
def _s3_errors(path: str) -> Iterator[None]:
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError, Boto3Error) as error:
        raise UserError(f"{path}: {error}; check the address and the AWS_* variables") from None

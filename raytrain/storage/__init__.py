"""Opening a storage by its address, and the S3 settings that are passed to other nodes."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

from raytrain.storage.base import Storage, checked_key
from raytrain.storage.local import FolderStorage
from raytrain.utils.errors import UserError
from raytrain.utils.files import is_address, local_path

ARTIFACTS = "mlflow-artifacts"
"""Where MLflow keeps artifacts below the storage if there is no tracking server."""


def open_storage_root(storage: str | None) -> Storage:
    """Return the storage that ``--storage`` names, or else ``RAYTRAIN_STORAGE``, or else ``./runs``.

    Raises:
        UserError: the address is neither a folder nor s3://.
    """
    root = open_storage(storage or os.environ.get("RAYTRAIN_STORAGE") or "runs")
    return root if root.folder is None else FolderStorage(root.folder.resolve())


_SETTINGS = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_REQUEST_CHECKSUM_CALCULATION",
    "AWS_RESPONSE_CHECKSUM_VALIDATION",
    "MLFLOW_S3_ENDPOINT_URL",
)


def open_storage(uri: str | Path) -> Storage:
    """Return the storage at a folder or at ``s3://bucket/prefix``. Nothing is checked or created yet.

    Raises:
        UserError: the address is neither, the AWS settings cannot be read, or boto3 is missing.
    """
    text = str(uri)
    if not text:
        raise UserError("storage: give a folder or s3://bucket/prefix")
    if not is_address(text):
        return FolderStorage(local_path(text, "storage"))
    match = re.fullmatch(r"(?i:s3)://([A-Za-z0-9][A-Za-z0-9._-]+)(?:/([^?#\x00-\x1f\x7f]*))?(?<! )", text)
    if match is None:
        # The message does not repeat the address, which may hold keys.
        raise UserError(
            "storage: the address must be a folder or s3://bucket/prefix, without keys, options or control characters "
            "in it, or a space at its end"
        )
    prefix = "/".join(part for part in (match[2] or "").split("/") if part)
    try:
        from raytrain.storage.s3 import S3Storage
    except ModuleNotFoundError:
        raise UserError("storage: s3:// addresses need boto3: pip install boto3") from None
    try:
        return S3Storage(match[1], checked_key(prefix) if prefix else "")
    except ValueError as error:
        raise UserError(f"storage {text}: {error}") from None


def check_output(file: Path) -> Path:
    """Return ``file`` after checking that it can be written, before hours of work are done; leaves nothing behind.

    Raises:
        UserError: it cannot be written.
    """
    file = local_path(file, "--output")
    try:
        existed = file.exists()
        file.open("a").close()
        if not existed:
            file.unlink()
    except OSError as error:
        raise UserError(f"--output {file} cannot be written: {error.strerror}") from None
    return file


def open_file(address: str) -> tuple[Storage, str]:
    """Return the storage that contains the file at a path or ``s3://`` address, and the file's key there.

    Raises:
        UserError: it is not the address of a file.
    """
    folder, slash, name = address.rpartition("/")
    if not name:
        raise UserError(f"{address!r} is no file: give a path, or s3://bucket/prefix/name")
    return open_storage(folder or slash or "."), name


def storage_environment() -> dict[str, str]:
    """Return this process's endpoint, region and checksum settings, for workers on other nodes. Never includes a key.

    boto3 and MLflow read AWS_DEFAULT_REGION, but pyarrow reads AWS_REGION, and MLflow has its own endpoint variable.
    A setting under one name is therefore passed on under all of them.
    """
    settings = {name: os.environ[name] for name in _SETTINGS if os.environ.get(name)}
    endpoint = settings.get("AWS_ENDPOINT_URL_S3") or settings.get("AWS_ENDPOINT_URL")
    region = settings.get("AWS_REGION") or settings.get("AWS_DEFAULT_REGION")
    if endpoint:
        settings = {"AWS_ENDPOINT_URL_S3": endpoint, "MLFLOW_S3_ENDPOINT_URL": endpoint} | settings
    if region:
        settings |= {"AWS_REGION": region, "AWS_DEFAULT_REGION": region}
    for name, value in settings.items():
        if name.endswith(("ENDPOINT_URL", "ENDPOINT_URL_S3")) and "@" in urlsplit(value).netloc:
            raise UserError(f"{name}: an endpoint must not hold a user or a password; keys have variables of their own")
    return settings

"""The storage that is a prefix in an S3 bucket, and what its errors mean. Imported when an s3:// address is opened."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
from boto3.exceptions import Boto3Error
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    CredentialRetrievalError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
)

from raytrain.storage.base import NotFoundError, Storage, StorageError, checked_key
from raytrain.utils.errors import UserError
from raytrain.utils.files import complete_file

_NO_KEY = ("NoSuchKey", "404")
_TAKEN = ("PreconditionFailed", "412", "ConditionalRequestConflict", "409")
_UNKNOWN_CONDITION = ("NotImplemented", "501")
"""Answers of a server that refuses conditions."""
_NO_PERMISSION = "no permission: the keys in use are not allowed to do this there"
_TOKEN = "the session token has expired or is wrong: renew it"
_REGION = "wrong region: set AWS_REGION to the region of bucket {bucket!r}"
_CLOCK = "the clock of this machine is off: set it, e.g. by NTP"
_CHECKSUMS = (
    "the server does not know the checksums that current clients send: set "
    "AWS_REQUEST_CHECKSUM_CALCULATION=when_required and AWS_RESPONSE_CHECKSUM_VALIDATION=when_required"
)
_MEANING = {
    "NoSuchBucket": "there is no bucket {bucket!r}: create it, or check the address and the endpoint",
    "NoSuchKey": "there is no such key",
    "404": "there is no such key, or no bucket {bucket!r}",
    "AccessDenied": _NO_PERMISSION,
    "AllAccessDisabled": _NO_PERMISSION,
    "403": _NO_PERMISSION,
    "SignatureDoesNotMatch": "wrong secret: AWS_SECRET_ACCESS_KEY does not belong to AWS_ACCESS_KEY_ID",
    "InvalidAccessKeyId": "the server does not know the access key: check AWS_ACCESS_KEY_ID and the endpoint",
    "ExpiredToken": _TOKEN,
    "InvalidToken": _TOKEN,
    "AuthorizationHeaderMalformed": _REGION,
    "PermanentRedirect": _REGION,
    "301": _REGION,
    "IllegalLocationConstraintException": _REGION,
    "RequestTimeTooSkewed": _CLOCK,
    "RequestExpired": _CLOCK,
    "NotImplemented": _CHECKSUMS,
    "501": _CHECKSUMS,
    "MissingContentLength": _CHECKSUMS,
    "411": _CHECKSUMS,
    "XAmzContentSHA256Mismatch": _CHECKSUMS,
}
"""Error code (the HTTP status where the answer had none) -> what it means for the user."""


class S3Storage(Storage):
    """A prefix in a bucket of AWS or of any S3-compatible server, by the usual AWS variables and files."""

    def __init__(self, bucket: str, prefix: str = "", *, attempts: int = 8, client: Any = None) -> None:
        self._bucket = bucket
        self._prefix = prefix
        self._client = client or _connect(attempts)

    def __reduce__(self) -> tuple[Any, ...]:
        return S3Storage, (self._bucket, self._prefix)

    def write(self, key: str, data: bytes) -> None:
        name = self._name(key)
        with self._errors("write", key):
            self._client.upload_fileobj(BytesIO(data), self._bucket, name)

    def create(self, key: str, data: bytes) -> bool:
        name = self._name(key)
        with self._errors("write", key):
            try:
                self._client.put_object(Bucket=self._bucket, Key=name, Body=data, IfNoneMatch="*")
            except ClientError as error:
                if _code(error) in _TAKEN:
                    return False
                if _code(error) not in _UNKNOWN_CONDITION:
                    raise
                if self.exists(key):
                    return False
                self.write(key, data)
        return True

    def upload(self, key: str, file: Path) -> None:
        name = self._name(key)
        with self._errors("write", key), open(file, "rb") as stream:
            self._client.upload_fileobj(stream, self._bucket, name)

    def read(self, key: str) -> bytes:
        # Not get_object: the transfer manager also retries where the connection breaks within the body.
        stream, name = BytesIO(), self._name(key)
        with self._errors("read", key):
            self._client.download_fileobj(self._bucket, name, stream)
        return stream.getvalue()

    def download(self, key: str, file: Path) -> None:
        name = self._name(key)
        with self._errors("read", key), complete_file(file) as partial, open(partial, "wb") as stream:
            self._client.download_fileobj(self._bucket, name, stream)

    def exists(self, key: str) -> bool:
        name = self._name(key)
        try:
            with self._errors("read", key):
                self._client.head_object(Bucket=self._bucket, Key=name)
        except NotFoundError:
            return False
        return True

    def list(self, prefix: str = "") -> list[str]:
        start = f"{self._prefix}/" if self._prefix else ""
        # Names that end in "/" are the folders of other programs, not keys.
        return [name.removeprefix(start) for name in self._names(prefix) if not name.endswith("/")]

    def delete(self, key: str) -> None:
        name = self._name(key)
        with self._errors("delete", key):
            self._client.delete_object(Bucket=self._bucket, Key=name)

    def delete_prefix(self, prefix: str) -> None:
        # One by one: older servers refuse the bulk call of current clients.
        for name in self._names(checked_key(prefix)):
            with self._errors("delete", prefix):
                self._client.delete_object(Bucket=self._bucket, Key=name)

    def uri(self, key: str = "") -> str:
        return f"s3://{self._bucket}/{self._name(key) if key else self._prefix}".rstrip("/")

    def child(self, prefix: str) -> S3Storage:
        return S3Storage(self._bucket, self._name(prefix), client=self._client)

    def without_retries(self) -> S3Storage:
        return S3Storage(self._bucket, self._prefix, attempts=2)

    def _name(self, key: str) -> str:
        return f"{self._prefix}/{checked_key(key)}" if self._prefix else checked_key(key)

    def _names(self, prefix: str) -> tuple[str, ...]:
        start = self._name(prefix) if prefix else self._prefix
        names: set[str] = set()
        with self._errors("list", prefix):
            pages = self._client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._bucket, Prefix=f"{start}/" if start else ""):
                names.update(item["Key"] for item in page.get("Contents", ()))
        return tuple(sorted(names))

    @contextlib.contextmanager
    def _errors(self, action: str, key: str) -> Iterator[None]:
        try:
            yield
        except (BotoCoreError, ClientError, Boto3Error, OSError) as error:
            kind = NotFoundError if _code(error) in _NO_KEY else StorageError
            reason = _reason(error, self._bucket, self._client.meta.endpoint_url)
            # Not chained: what the client raised may quote the request.
            raise kind(f"cannot {action} {self.uri(key)}: {reason}") from None


def _connect(attempts: int) -> Any:
    """Return a client by the AWS variables and files, whose own settings of retries go before ours."""
    retries: dict[str, Any] = {}
    if "AWS_RETRY_MODE" not in os.environ:
        retries["mode"] = "standard"
    if "AWS_MAX_ATTEMPTS" not in os.environ:
        retries["total_max_attempts"] = attempts
    config = Config(connect_timeout=10, read_timeout=60, retries=retries or None)
    # boto3 by itself reads AWS_DEFAULT_REGION only; everything else on S3 reads AWS_REGION first.
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    try:
        return boto3.session.Session(region_name=region).client("s3", config=config)
    except (BotoCoreError, ValueError) as error:
        raise UserError(f"storage: the AWS settings cannot be used: {_one_line(error)}") from None


def _code(error: Exception) -> str:
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, ClientError) else ""


def _reason(error: Exception, bucket: str, endpoint: str) -> str:
    """Return what went wrong and what to set, in one line that quotes neither keys nor the request."""
    server = urlsplit(endpoint).netloc.rpartition("@")[2]
    if isinstance(error, ClientError):
        code = _code(error)
        if code in _MEANING:
            return f"{_MEANING[code].format(bucket=bucket)} ({code} from {server})"
        return f"{_one_line(error.response.get('Error', {}).get('Message', 'no message'))} ({code} from {server})"
    if isinstance(error, (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError)):
        return "no AWS keys found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or an instance profile"
    if isinstance(error, (ConnectionError, HTTPClientError)):
        return f"{server} cannot be reached ({type(error).__name__}): check AWS_ENDPOINT_URL_S3 and the network"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return _one_line(error)


def _one_line(error: object) -> str:
    return " ".join(str(error).split())

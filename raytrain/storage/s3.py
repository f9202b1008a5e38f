"""A storage that is a prefix in an S3 bucket, and the meaning of its errors. Imported to open an s3:// address."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import boto3
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
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
"""Error codes of a server that refuses conditional writes."""
_NO_PERMISSION = "no permission: the keys in use are not allowed to do this there"
_TOKEN = "the session token has expired or is wrong: renew it"
_MAYBE_TOKEN = "the session token may have expired: then renew it"
_REGION = "wrong region: set AWS_REGION to the region of bucket {bucket!r}"
_CLOCK = "the clock of this machine is off: set it, e.g. by NTP"
_CHECKSUMS = (
    "the server does not know the checksums that current clients send: set "
    "AWS_REQUEST_CHECKSUM_CALCULATION=when_required and AWS_RESPONSE_CHECKSUM_VALIDATION=when_required"
)
_MEANING = {
    "NoSuchBucket": "there is no bucket {bucket!r}: create it, or check the address and the endpoint",
    "NoSuchKey": "there is no such key",
    "400": _MAYBE_TOKEN,
    "404": "there is no such key, or no bucket {bucket!r}",
    "AccessDenied": _NO_PERMISSION,
    "AllAccessDisabled": _NO_PERMISSION,
    "403": _NO_PERMISSION,
    "SignatureDoesNotMatch": "wrong secret: AWS_SECRET_ACCESS_KEY does not belong to AWS_ACCESS_KEY_ID",
    "InvalidAccessKeyId": "the server does not know the access key: check AWS_ACCESS_KEY_ID and the endpoint",
    "ExpiredToken": _TOKEN,
    "InvalidToken": _TOKEN,
    "TokenRefreshRequired": _TOKEN,
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
"""Error code (the HTTP status if the answer has none) -> its meaning for the user."""
_STILL_EXPIRED = "refreshed credentials are still expired"
"""Text of the RuntimeError that botocore raises if a program or service provides keys that have already expired."""
_MAYBE_KEYS = (400, 401, 403)
"""HTTP statuses with which servers reject keys. The error codes differ between servers, and HEAD gets none at all."""
_PART = 8 * 2**20
"""Bytes of a part of a file that is sent in parts."""
_MOST_PARTS = 1000
"""Most parts of a file: OpenStack Swift takes no more by default, AWS ten times as many."""
_PARTS_AT_ONCE = 10
_SENT_AT_ONCE = 256 * 2**20
"""Bytes of parts that are sent at once, each of them in memory."""
T = TypeVar("T")


def _transfer(size: int) -> TransferConfig:
    """Return the settings by which a file of ``size`` bytes is sent: few enough parts, and few enough at once."""
    part = max(_PART, -(-size // _MOST_PARTS))
    return TransferConfig(multipart_chunksize=part, max_concurrency=max(1, min(_PARTS_AT_ONCE, _SENT_AT_ONCE // part)))


class S3Storage(Storage):
    """A prefix in a bucket of AWS or of any S3-compatible server, set up by the usual AWS variables and files."""

    def __init__(
        self, bucket: str, prefix: str = "", *, attempts: int = 8, connection: _Connection | None = None
    ) -> None:
        self._bucket = bucket
        self._prefix = prefix
        self._connection = connection or _Connection(attempts)

    def __reduce__(self) -> tuple[Any, ...]:
        return S3Storage, (self._bucket, self._prefix)

    def write(self, key: str, data: bytes) -> None:
        name = self._name(key)
        self._do("write", key, lambda client: client.upload_fileobj(BytesIO(data), self._bucket, name))

    def create(self, key: str, data: bytes) -> bool:
        name = self._name(key)

        def request(client: Any) -> bool | None:
            try:
                client.put_object(Bucket=self._bucket, Key=name, Body=data, IfNoneMatch="*")
            except ClientError as error:
                if _code(error) in _TAKEN:
                    return False
                if _code(error) not in _UNKNOWN_CONDITION:
                    raise
                return None
            return True

        created = self._do("write", key, request)
        if created is not None:
            return created
        if self.exists(key):
            return False
        self.write(key, data)
        return True

    def upload(self, key: str, file: Path) -> None:
        name = self._name(key)

        def request(client: Any) -> None:
            with open(file, "rb") as stream:
                client.upload_fileobj(stream, self._bucket, name, Config=_transfer(file.stat().st_size))

        self._do("write", key, request)

    def read(self, key: str) -> bytes:
        name = self._name(key)

        def request(client: Any) -> bytes:
            # Not get_object: the transfer manager also retries if the connection breaks within the body.
            stream = BytesIO()
            client.download_fileobj(self._bucket, name, stream)
            return stream.getvalue()

        return self._do("read", key, request)

    def read_range(self, key: str, start: int, size: int) -> bytes:
        name = self._name(key)

        def request(client: Any) -> bytes:
            found = client.get_object(Bucket=self._bucket, Key=name, Range=f"bytes={start}-{start + size - 1}")
            content: bytes = found["Body"].read()
            return content

        return self._do("read", key, request)

    def download(self, key: str, file: Path) -> None:
        name = self._name(key)

        def request(client: Any) -> None:
            with complete_file(file) as partial, open(partial, "wb") as stream:
                client.download_fileobj(self._bucket, name, stream)

        self._do("read", key, request)

    def exists(self, key: str) -> bool:
        name = self._name(key)
        try:
            self._do("read", key, lambda client: client.head_object(Bucket=self._bucket, Key=name))
        except NotFoundError:
            return False
        return True

    def list(self, prefix: str = "") -> list[str]:
        start = f"{self._prefix}/" if self._prefix else ""
        # Names that end in "/" are folder markers of other programs, not keys.
        return [name.removeprefix(start) for name in self._names(prefix) if not name.endswith("/")]

    def delete(self, key: str) -> None:
        self._delete("delete", key, self._name(key))

    def delete_prefix(self, prefix: str) -> None:
        # One by one: older servers refuse the bulk request of current clients.
        for name in self._names(checked_key(prefix)):
            self._delete("delete", prefix, name)

    def uri(self, key: str = "") -> str:
        return f"s3://{self._bucket}/{self._name(key) if key else self._prefix}".rstrip("/")

    def child(self, prefix: str) -> S3Storage:
        return S3Storage(self._bucket, self._name(prefix), connection=self._connection)

    def without_retries(self) -> S3Storage:
        return S3Storage(self._bucket, self._prefix, attempts=2)

    def _name(self, key: str) -> str:
        return f"{self._prefix}/{checked_key(key)}" if self._prefix else checked_key(key)

    def _delete(self, action: str, key: str, name: str) -> None:
        self._do(action, key, lambda client: client.delete_object(Bucket=self._bucket, Key=name))

    def _names(self, prefix: str) -> tuple[str, ...]:
        start = self._name(prefix) if prefix else self._prefix

        def request(client: Any) -> set[str]:
            pages = client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=f"{start}/" if start else ""
            )
            return {item["Key"] for page in pages for item in page.get("Contents", ())}

        return tuple(sorted(self._do("list", prefix, request)))

    def _do(self, action: str, key: str, request: Callable[[Any], T]) -> T:
        """Return the result of ``request`` with a client; repeat it once if the keys have changed meanwhile."""
        with self._errors(action, key):
            return self._connection.run(request)

    @contextlib.contextmanager
    def _errors(self, action: str, key: str) -> Iterator[None]:
        try:
            yield
        except (BotoCoreError, ClientError, Boto3Error, OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not _is_expired(error):
                raise
            kind = NotFoundError if _code(error) in _NO_KEY else StorageError
            reason = _reason(error, self._bucket, self._connection)
            # Not chained: the client's exception may quote the request.
            raise kind(f"cannot {action} {self.uri(key)}: {reason}") from None


class _Connection:
    """The client of a storage and of its children; it picks up changed keys.

    A boto3 session reads keys once. By itself it renews only keys with an expiry time, those of instance profiles and
    of some programs, but not those in a file.
    """

    def __init__(self, attempts: int) -> None:
        self._attempts = attempts
        self._lock = threading.Lock()
        try:
            self._session = _new_session()
            self._client = _new_client(self._session, attempts)
        except (BotoCoreError, ValueError) as error:
            raise UserError(f"storage: the AWS settings cannot be used: {_one_line(error)}") from None

    def run(self, request: Callable[[Any], T]) -> T:
        """Return the result of ``request`` with the client; repeat it once if the server refused outdated keys."""
        client = self._client
        try:
            return request(client)
        except ClientError as error:
            if not _may_be_keys(error) or not self._take_up_keys(client):
                raise
        return request(self._client)

    def _take_up_keys(self, refused: Any) -> bool:
        """Return whether there are now keys other than those of the client ``refused``."""
        with self._lock:
            if self._client is not refused:
                return True  # another thread picked them up
            if (session := changed_keys(self._session)) is None:
                return False
            self._session, self._client = session, _new_client(session, self._attempts)
            return True

    @property
    def server(self) -> str:
        """Host and port, without credentials."""
        return urlsplit(self._client.meta.endpoint_url).netloc.rpartition("@")[2]

    @property
    def source(self) -> str:
        """Origin of the keys, in botocore's words."""
        credentials = self._session.get_credentials()
        return "" if credentials is None else str(credentials.method)


def by_default_session(request: Callable[[Any], T]) -> T:
    """Return the result of ``request`` with a client of boto3's default session of the process.

    The request is repeated once if the keys have changed meanwhile.
    """
    try:
        return request(boto3.client("s3"))
    except ClientError as error:
        if not _may_be_keys(error) or not renew_default_session():
            raise
    return request(boto3.client("s3"))


def renew_default_session() -> bool:
    """Renew boto3's default session of the process if the keys have changed; return False if they have not."""
    if boto3.DEFAULT_SESSION is None or changed_keys(boto3.DEFAULT_SESSION) is None:
        return False
    boto3.setup_default_session()
    return True


def _may_be_keys(error: ClientError) -> bool:
    return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") in _MAYBE_KEYS


def changed_keys(session: boto3.session.Session) -> boto3.session.Session | None:
    """Return a session with the current keys; ``None`` if they equal those of ``session``, or if there are none.

    The keys are read from where a new process would find them.
    """
    try:
        new = _new_session()
        keys = _keys(new)
        return new if keys is not None and keys != _keys(session) else None
    except (BotoCoreError, ClientError):  # a program or service that provides keys fails, or a file is being written
        return None
    except RuntimeError as error:
        if not _is_expired(error):
            raise
        return None


def _is_expired(error: Exception) -> bool:
    """Return whether the keys that a program or service has just provided have already expired."""
    return isinstance(error, RuntimeError) and _STILL_EXPIRED in str(error)


def _keys(session: boto3.session.Session) -> Any:
    credentials = session.get_credentials()
    return None if credentials is None else credentials.get_frozen_credentials()


def _new_session() -> boto3.session.Session:
    # boto3 by itself reads only AWS_DEFAULT_REGION; all other S3 software here reads AWS_REGION first.
    return boto3.session.Session(region_name=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"))


def _new_client(session: boto3.session.Session, attempts: int) -> Any:
    """Return a client set up by the AWS variables and files, whose own retry settings take precedence over ours."""
    retries: dict[str, Any] = {}
    if "AWS_RETRY_MODE" not in os.environ:
        retries["mode"] = "standard"
    if "AWS_MAX_ATTEMPTS" not in os.environ:
        retries["total_max_attempts"] = attempts
    config = Config(connect_timeout=10, read_timeout=60, retries=retries or None)
    return session.client("s3", config=config)


def _code(error: Exception) -> str:
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, ClientError) else ""


def _reason(error: Exception, bucket: str, connection: _Connection) -> str:
    """Return what went wrong and what to set, in one line that quotes neither keys nor the request."""
    server = connection.server
    if isinstance(error, ClientError):
        code = _code(error)
        if code in _MEANING:
            meaning = _MEANING[code].format(bucket=bucket)
            if meaning in (_TOKEN, _MAYBE_TOKEN):
                meaning += _renewal(connection.source)
            return f"{meaning} ({code} from {server})"
        return f"{_one_line(error.response.get('Error', {}).get('Message', 'no message'))} ({code} from {server})"
    if _is_expired(error):
        return _TOKEN + _renewal(connection.source)
    if isinstance(error, (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError)):
        return "no AWS keys found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or an instance profile"
    if isinstance(error, (ConnectionError, HTTPClientError)):
        return f"{server} cannot be reached ({type(error).__name__}): check AWS_ENDPOINT_URL_S3 and the network"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return _one_line(error)


def _renewal(source: str) -> str:
    """Return how to renew an expired token, depending on where it comes from."""
    if source == "env":
        return (
            "; it is in AWS_SESSION_TOKEN, which a process keeps: start the command again with new keys, or keep them "
            "in a profile, which is read again"
        )
    return " at its source (profile, program or role); the run reads it again by itself"


def _one_line(error: object) -> str:
    return " ".join(str(error).split())

"""Fixtures of the tests of corpora."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from raytrain.storage import open_storage
from raytrain.storage.base import Storage

if TYPE_CHECKING:
    from tests.support.s3_server import S3Server


@pytest.fixture(params=["folder", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """A folder and, in the slow tests, a prefix of a real S3 server."""
    if request.param == "folder":
        return open_storage(tmp_path / "store")
    server: S3Server = request.getfixturevalue("s3_server")
    server.use(monkeypatch)
    return open_storage(f"s3://raytrain/{tmp_path.name}")

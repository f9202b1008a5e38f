"""A storage that can be taken away and brought back."""

from __future__ import annotations

import threading
from pathlib import Path

from raytrain.storage.base import StorageError
from raytrain.storage.local import FolderStorage


class Away(FolderStorage):
    """A folder that can be listed, but neither read nor written while ``away`` is set."""

    def __init__(self, root: Path, away: threading.Event) -> None:
        super().__init__(root)
        self.away = away

    def _refuse(self, key: str) -> None:
        if self.away.is_set():
            raise StorageError(f"cannot reach {key}: the disk is away")

    def write(self, key: str, data: bytes) -> None:
        self._refuse(key)
        super().write(key, data)

    def read(self, key: str) -> bytes:
        self._refuse(key)
        return super().read(key)

    def child(self, prefix: str) -> FolderStorage:
        return Away(self._path(prefix), self.away)

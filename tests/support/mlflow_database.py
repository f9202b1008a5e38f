"""MLflow databases in files: MLflow's migrations make their tables once, and later tests take copies."""

from __future__ import annotations

import sqlite3
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

MODULE = "mlflow.store.db.utils"


class Tables:
    """What MLflow calls to fill an empty database; hundreds of statements take seconds, a copy takes none."""

    def __init__(self, migrate: Callable[[Any], None]) -> None:
        self.migrate = migrate
        self.folder = tempfile.TemporaryDirectory(prefix="raytrain-tests-")
        self.made = Path(self.folder.name, "mlflow.db")

    def __call__(self, engine: Any) -> None:
        if engine.dialect.name != "sqlite" or not engine.url.database:
            self.migrate(engine)
        elif self.made.exists():
            _copy(self.made, engine.url.database)
        else:
            self.migrate(engine)
            _copy(engine.url.database, self.made)


def pytest_runtest_setup() -> None:
    """Copy tables from now on; a test alone that never uses MLflow need not import it for that."""
    module: Any = sys.modules.get(MODULE)
    # a thread that the test before left may be importing it yet
    if hasattr(module, "_initialize_tables") and not isinstance(module._initialize_tables, Tables):
        module._initialize_tables = Tables(module._initialize_tables)


def _copy(source: Path | str, target: Path | str) -> None:
    with closing(sqlite3.connect(source)) as read, closing(sqlite3.connect(target)) as written:
        read.backup(written)

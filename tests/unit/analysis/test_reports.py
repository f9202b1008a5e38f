from __future__ import annotations

import os
from pathlib import Path

import pytest

from raytrain.analysis.reports import writable_folder
from raytrain.utils.errors import UserError


def test_the_folder_of_a_report_is_one_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert writable_folder(Path("~/report")) == tmp_path / "report"
    with pytest.raises(UserError, match="--output: this is an address, not a file or folder"):
        writable_folder(Path("s3://bucket/report"))
    assert os.listdir() == ["report"]

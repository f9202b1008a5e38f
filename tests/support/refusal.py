"""Commands that must be refused, run in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from raytrain.utils.errors import run_command


def refusal(
    main: Callable[[], None],
    arguments: tuple[str | Path, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> str:
    """Run a command that must end with status 2 and print one line, to standard error alone; return the line."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        run_command(main)
    output = capsys.readouterr()
    assert ended.value.code == 2, output
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    return output.err

"""Retrying: which failures are repeated, for how long, and with what pauses."""

from __future__ import annotations

import pytest

from raytrain.utils import retry as retry_module
from raytrain.utils.retry import retry


class Clock:
    """Time that passes only while somebody waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.pauses = 0.0, []
        monkeypatch.setattr(retry_module.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(retry_module.time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


def failing(times: int, error: Exception) -> object:
    """An action that fails so many times, then returns how often it was tried."""
    tried = iter(range(times + 1))

    def act() -> int:
        number = next(tried)
        if number < times:
            raise error
        return number + 1

    return act


def test_pauses_double_up_to_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, seen = Clock(monkeypatch), []
    assert retry(failing(6, OSError("away")), OSError, seconds=60, log=seen.append, longest_pause=5) == 7
    assert clock.pauses == [0.5, 1, 2, 4, 5, 5]
    assert len(seen) == 6


def test_the_last_attempt_is_made_when_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    with pytest.raises(OSError, match="away"):
        retry(failing(100, OSError("away")), OSError, seconds=10, log=lambda error: None)
    assert clock.pauses == [0.5, 1, 2, 4, 2.5]


def test_other_errors_and_those_that_will_not_pass_are_raised_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    with pytest.raises(ValueError, match="wrong"):
        retry(failing(1, ValueError("wrong")), OSError, seconds=10, log=print)
    with pytest.raises(OSError, match="gone"):
        retry(failing(1, OSError("gone")), OSError, seconds=10, log=print, transient=lambda error: False)
    assert not clock.pauses


def test_a_wait_that_gives_up_ends_it() -> None:
    with pytest.raises(OSError, match="away"):
        retry(failing(1, OSError("away")), OSError, seconds=10, log=lambda error: None, wait=lambda seconds: True)

"""Retrying actions that may fail for a while: a store that is unavailable, a server that is too busy."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def retry(
    action: Callable[[], T],
    errors: type[Exception] | tuple[type[Exception], ...],
    *,
    seconds: float,
    log: Callable[[Exception], None],
    transient: Callable[[Exception], bool] = lambda error: True,
    first_pause: float = 0.5,
    longest_pause: float = 15.0,
    wait: Callable[[float], bool] | None = None,
) -> T:
    """Return what ``action`` returns; after a failure, try again with growing pauses for ``seconds``.

    Args:
        action: the action; it must be safe to repeat.
        errors: failures after which it is repeated.
        seconds: time for all attempts; the last one is made when the time is up.
        log: called with each failure that is followed by another attempt.
        transient: whether a failure may pass; one that may not is raised at once.
        first_pause: seconds after the first failure; each pause is twice as long as the one before.
        longest_pause: longest pause in seconds.
        wait: waits for a pause and returns whether to give up; ``None`` sleeps.

    Raises:
        Exception: the last failure, one of ``errors``.
    """
    deadline, pause = time.monotonic() + seconds, first_pause
    while True:
        try:
            return action()
        except errors as error:
            left = deadline - time.monotonic()
            if not transient(error) or left <= 0:
                raise
            log(error)
            if wait is None:
                time.sleep(min(pause, left))
            elif wait(min(pause, left)):
                raise
        pause = min(2 * pause, longest_pause)

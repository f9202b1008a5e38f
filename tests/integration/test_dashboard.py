"""A search's study in Optuna's own dashboard, looked at in a real browser."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from raytrain.data.corpus import Corpus
from raytrain.runs.records import STUDY
from tests.support.browser import page
from tests.support.postgres_server import REQUIRE_ALL
from tests.unit.search.test_search_objective import a_plan, figures
from tests.unit.search.test_study import Driven

if TYPE_CHECKING:
    from playwright.sync_api import Page

__all__ = ["page"]

# where its script is not on the path
START = "from optuna_dashboard._cli import main; main()"
START_S = 120


@contextmanager
def dashboard(file: Path) -> Iterator[str]:
    """The address of optuna-dashboard on a study's file, started as the guide says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = shutil.which("optuna-dashboard")
    start = [command] if command else [sys.executable, "-c", START]
    process = subprocess.Popen([*start, str(file), "--port", str(port)])
    try:
        deadline = time.monotonic() + START_S
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api/studies", timeout=START_S).close()
                break
            except urllib.error.URLError:
                assert process.poll() is None, "it has ended"
                assert time.monotonic() < deadline, "it does not answer"
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def installed() -> None:
    """Skips where optuna-dashboard is missing, unless everything must be there."""
    if find_spec("optuna_dashboard") is None:
        if os.environ.get(REQUIRE_ALL):
            pytest.fail("the Python package optuna-dashboard is not installed")
        pytest.skip("the Python package optuna-dashboard is not installed")


def open_trials(page: Page, address: str, num_trials: int) -> str:
    """Open the study's list of trials, the first of them in detail; return the text of the page."""
    page.goto("about:blank")
    page.goto(f"{address}/dashboard/studies/0/trials?numbers=0")
    page.get_by_text(f"Trial {num_trials - 1}", exact=False).first.wait_for()
    return re.sub(r"\s+", " ", page.locator("body").inner_text())


@pytest.mark.usefixtures("installed")
def test_the_dashboard_shows_a_running_and_then_the_finished_search(page: Page, corpus: Corpus, tmp_path: Path) -> None:
    search = Driven(a_plan(min_used=1.0), corpus, tmp_path)
    for number, (bits, kl) in enumerate([(2.25, 3.0), (1.75, 0.5)]):
        search.start(str(number))
        for step in (10, 20):
            search.report(str(number), step, figures(bits + 1 / step, kl))
    search.stop("0")
    search.study._thread.submit(lambda: None).result()
    with dashboard(Path(search.location.uri(STUDY))) as address:
        page.goto(f"{address}/dashboard")
        page.get_by_text("Direction: MINIMIZE").wait_for()
        assert "0. s" in page.locator("body").inner_text()
        text = open_trials(page, address, 2)
        assert "2 Trials Trial 0 Complete Best Trial Trial 1 Running" in text
        assert "Value 2.3 Intermediate Values 10 2.35 20 2.3 Parameter alpha" in text
        assert "status stopped" in text

        # the search goes on, and the same dashboard shows it
        search.stop("1")
        search.start("2")
        search.report("2", 10, figures(2.0, 2.0))
        search.stop("2")
        search.end()
        assert "3 Trials Trial 0 Complete Trial 1 Complete" in open_trials(page, address, 3)
        # it names the best trial without regard to a constraint, and marks those that miss it in its charts
        page.goto(f"{address}/dashboard/studies/0")
        page.locator("svg text", has_text="trial #1 (infeasible)").first.wait_for(state="attached")
    search.agrees()

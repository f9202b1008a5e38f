"""Debian's Chromium, and the pages of MLflow that a user of a search opens, each with the texts that must be there.

    python -m tests.support.browser http://127.0.0.1:5000 raytrain FOLDER

writes a picture of each page of the experiment's newest search that has ended. Tests import the fixture ``page``.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest

from tests.support.postgres_server import REQUIRE_ALL

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

OPTIONS = (
    "--no-sandbox --disable-gpu --disable-background-networking --disable-quic --disable-component-update "
    "--disable-sync"
)
SIZE = (1400, 900)
PATIENCE_MS = 60_000
"""A page takes two seconds on a quiet machine; on a loaded one many more."""
TRAINING = "?workflowType=machine_learning"
"""Shows MLflow's pages for trained models; without it a new browser gets those for agents."""
CLOSED = """
localStorage.setItem("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true");
localStorage.setItem("mlflow.assistant.panelOpen_v1", "false");
"""
"""Keeps the panel of MLflow's assistant, which covers a quarter of the first page, from opening by itself."""


@dataclass(frozen=True)
class Shown:
    """The search whose pages are opened."""

    uri: str
    experiment_id: str
    search: tuple[str, str]
    """Its name and run id."""
    trials: list[tuple[str, str]]
    """Name and run id of each trial, the best first."""
    model: tuple[str, str]
    """Registered name and version of its best model."""

    def link(self, page: str) -> str:
        return f"{self.uri}/#/{page}{TRAINING}"

    def run(self, run_id: str, tab: str = "") -> str:
        return self.link(f"experiments/{self.experiment_id}/runs/{run_id}{tab}")


def find(uri: str, experiment: str) -> Shown:
    """The newest search of an experiment.

    Raises:
        SystemExit: there is none that has ended with a model.
    """
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    if (known := client.get_experiment_by_name(experiment)) is None:
        sys.exit(f"there is no experiment {experiment} at {uri}")
    order = ["attributes.start_time DESC"]
    for search in client.search_runs([known.experiment_id], "tags.`raytrain.kind` = 'search'", order_by=order):
        run_id = search.info.run_id
        trials = client.search_runs(
            [known.experiment_id],
            f"tags.`mlflow.parentRunId` = '{run_id}'",
            order_by=["metrics.`best/bits_per_byte` ASC"],
        )
        if trials and (versions := client.search_model_versions(f"run_id = '{run_id}'")):
            return Shown(
                uri,
                known.experiment_id,
                (str(search.info.run_name), run_id),
                [(str(trial.info.run_name), trial.info.run_id) for trial in trials],
                (versions[0].name, str(versions[0].version)),
            )
    sys.exit(f"experiment {experiment} at {uri} has no search that has ended with a model")


# ------------------------------------------------------------------------------------------- the browser


@contextlib.contextmanager
def open_page() -> Iterator[Page]:
    """A page of a new browser with an empty profile.

    Raises:
        FileNotFoundError: Chromium is not installed.
    """
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium")
    if program is None:
        raise FileNotFoundError("Debian's package chromium is not installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, headless=True, args=OPTIONS.split())
        context = browser.new_context(viewport={"width": SIZE[0], "height": SIZE[1]})
        context.add_init_script(CLOSED)
        context.set_default_timeout(PATIENCE_MS)
        yield context.new_page()
        browser.close()


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    """One page for the tests of a module."""
    missing = [
        name
        for name, there in (
            ("Debian's package chromium", shutil.which("chromium") is not None),
            ("the Python package playwright", _has_playwright()),
        )
        if not there
    ]
    if missing:
        reason = f"not installed: {' and '.join(missing)}"
        if os.environ.get(REQUIRE_ALL):
            pytest.fail(reason)
        pytest.skip(reason)
    with open_page() as opened:
        yield opened


def _has_playwright() -> bool:
    from importlib.util import find_spec

    return find_spec("playwright") is not None


# --------------------------------------------------------------------------------------------- the pages


def open_runs(page: Page, shown: Shown) -> list[str]:
    """The experiment's table of runs with the search's trials under it; returns the cells' texts, row by row."""
    _go(page, shown.link(f"experiments/{shown.experiment_id}/runs"))
    row = page.get_by_role("row").filter(has=page.get_by_role("link", name=shown.search[0], exact=True))
    row.get_by_role("gridcell").nth(1).get_by_role("button").first.click()  # the expander has no name of its own
    for name, _ in shown.trials:
        _link(page, name).wait_for()
    return [text for text in page.get_by_role("gridcell").all_inner_texts() if text.strip()]


def open_trials(page: Page, shown: Shown, link: str) -> tuple[list[str], list[str]]:
    """The view of the search's trials that ``share_view`` has kept.

    Returns:
        The trials' names from top to bottom, and the columns' from left to right.
    """
    _go(page, link)
    names = [name for name, _ in shown.trials]
    _link(page, names[-1]).wait_for()
    rows = page.get_by_role("link", name=re.compile("|".join(re.escape(name) for name in names)))
    return _placed(rows, "y"), _placed(page.get_by_role("columnheader"), "x")


def open_search(page: Page, shown: Shown) -> str:
    """The search's own page; returns the text of its whole description."""
    _go(page, shown.run(shown.search[1]))
    page.get_by_role("heading", name=shown.search[0]).wait_for()
    description = page.get_by_test_id("note-editor-preview-content").first
    description.wait_for()
    more = page.get_by_role("button", name="Expand description")
    if more.count():
        more.click()
    return description.inner_text()


def open_chart(page: Page, shown: Shown) -> tuple[str, list[str]]:
    """The charts of the best trial's validation; returns title and tick texts of the x axis of bits per byte."""
    _go(page, shown.run(shown.trials[0][1], "/model-metrics"))
    page.get_by_placeholder("Search metric charts").fill("valid/")
    card = page.get_by_test_id("experiment-view-compare-runs-card").filter(
        has=page.locator('h4[title="valid/bits_per_byte"]')
    )
    card.locator(".scatterlayer .point, .scatterlayer .js-line").first.wait_for(state="attached")
    card.locator(".xtick text").first.wait_for()
    return card.locator(".xtitle").text_content() or "", card.locator(".xtick text").all_text_contents()


def open_image(page: Page, shown: Shown, artifact: str) -> tuple[int, int]:
    """An image among the search's artifacts; returns its own width and height in pixels."""
    _go(page, shown.run(shown.search[1], f"/artifacts/{artifact}"))
    image = page.locator(f'img[alt="{artifact}"]')
    image.wait_for()
    page.wait_for_function('name => document.querySelector(`img[alt="${name}"]`).naturalWidth > 0', arg=artifact)
    width, height = image.evaluate("image => [image.naturalWidth, image.naturalHeight]")
    return width, height


def open_text(page: Page, shown: Shown, artifact: str) -> str:
    """A text among the search's artifacts; returns what the page shows of it."""
    _go(page, shown.run(shown.search[1], f"/artifacts/{artifact}"))
    code = page.locator("code.language-txt").first
    code.wait_for()
    return code.inner_text()


def open_model(page: Page, shown: Shown) -> str:
    """The registered model with its versions; returns the text of the search's version's row."""
    name, version = shown.model
    _go(page, shown.link(f"models/{name}"))
    page.get_by_role("heading", name=name).wait_for()
    row = page.get_by_role("row").filter(has=page.get_by_role("link", name=f"Version {version}", exact=True))
    row.wait_for()
    return _text(row)


def open_version(page: Page, shown: Shown) -> str:
    """The page of the search's version, with its card; returns all of its text."""
    name, version = shown.model
    _go(page, shown.link(f"models/{name}/versions/{version}"))
    page.get_by_role("heading", name="Samples").wait_for()
    return _text(page.locator("body"))


def picture(page: Page, folder: Path, name: str) -> Path:
    """Write what the page shows to ``NAME.png`` in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    page.wait_for_timeout(1000)  # charts and panels move into place
    file = folder / f"{name}.png"
    page.screenshot(path=file, animations="disabled")
    return file


def _go(page: Page, link: str) -> None:
    page.goto("about:blank")  # a link that differs after the # only would not load the page again
    page.goto(link)


def _link(page: Page, name: str) -> Locator:
    return page.get_by_role("link", name=name, exact=True).first


def _text(element: Locator) -> str:
    return element.inner_text().replace("\xa0", " ")


def _placed(elements: Locator, axis: Literal["x", "y"]) -> list[str]:
    """The texts of what is seen, by its place on the page, which is not that in the document."""
    boxes = [(element.bounding_box(), element.inner_text().strip()) for element in elements.all()]
    placed = [(box["x"] if axis == "x" else box["y"], text) for box, text in boxes if box and text]
    return list(dict.fromkeys(text for _, text in sorted(placed)))  # a header is within another of the same text


# ------------------------------------------------------------------------------------------------ command


def main() -> None:
    """Write the pictures of the newest search's pages."""
    if len(sys.argv) != 4:
        sys.exit("usage: python -m tests.support.browser URL EXPERIMENT_NAME FOLDER")
    shown, folder = find(sys.argv[1].rstrip("/"), sys.argv[2]), Path(sys.argv[3])
    with open_page() as page:
        for name, opened in (
            ("runs", lambda: open_runs(page, shown)),
            ("search", lambda: open_search(page, shown)),
            ("chart", lambda: open_chart(page, shown)),
            ("artifact", lambda: open_image(page, shown, "report/best_so_far.png")),
            ("model", lambda: open_version(page, shown)),
        ):
            opened()
            print(picture(page, folder, name), flush=True)


if __name__ == "__main__":
    main()

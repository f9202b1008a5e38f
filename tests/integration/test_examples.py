"""The examples: the space draws what can be trained, and the script trains on a text file and writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from raytrain.config.presets import preset
from raytrain.config.schema import override
from raytrain.search.space import check_space, load_space
from tests.support.tiny import write_text

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("budget", ["minutes", "hours"])
def test_the_space_draws_what_can_be_trained(budget: str) -> None:
    space = load_space(str(EXAMPLES / "custom_space.py"))
    base = override(preset("laptop", "hybrid"), space.budgets[budget])
    points = check_space(space, {"hybrid": base}, budget, space.algorithm, 0)
    assert len({point.objective.alpha for point in points}) == len(points) > 10
    assert {point.steps for point in points} == {400 if budget == "minutes" else 20_000}
    assert {point.objective.annealing == "constant" for point in points} == {budget == "minutes"}


@pytest.mark.slow
def test_the_script_trains_on_a_text_file(ray_cpu: str, tmp_path: Path) -> None:
    write_text(tmp_path / "posts.txt")
    environment = {**os.environ, "RAY_ADDRESS": ray_cpu}
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, str(EXAMPLES / "custom_text.py"), "posts.txt", "--steps", "20", "--length", "64"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "best at step " in done.stdout
    assert "'line 0 of a text that says 0 in words': " in done.stdout

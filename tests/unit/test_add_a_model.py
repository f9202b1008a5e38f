"""The recipe for a new model, docs/develop/add-a-model.md, followed to the letter."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import raytrain
from raytrain.data.corpus import Corpus

ROOT = Path(raytrain.__file__).parent.parent
PAGE = ROOT / "docs" / "develop" / "add-a-model.md"
BLOCK = re.compile(r"<!-- (.+?) -->\n```python\n(.*?)```\n", re.DOTALL)
INSERT = re.compile(r'insert: (\S+), (before|after) the line "(.+)"')

USE = """
import runpy
import sys
from dataclasses import replace

import torch

from raytrain.analysis.evaluation import evaluate
from raytrain.config.presets import full_size, preset
from raytrain.config.schema import from_dict, to_dict
from raytrain.data.batches import EvaluationBatches
from raytrain.data.corpus import Corpus
from raytrain.models.sampling import sample, score
from raytrain.runs import checkpoint
from raytrain.runs.trained_model import load
from raytrain.search.space import check_space, load_space
from raytrain.storage import open_storage
from raytrain.training.loop import train
from raytrain.training.reporters import PrintReporter
from raytrain.training.trainer import World

assert preset(full_size("byte_gru"), "byte_gru").model.hidden == 500
base = preset("laptop", "byte_gru")
config = replace(
    base, model=replace(base.model, hidden=32, dropout=0.3), steps=6, log_every=2, evaluate_every=3,
    checkpoint_every=3, evaluate_samples=64, length=24, precision="float32", sampling="documents",
)
assert from_dict(to_dict(config)) == config and not config.has_latent
corpus = Corpus.open(sys.argv[1])
outcome = train(config, corpus, World(), open_storage("run"), PrintReporter(config))
stored = checkpoint.latest(open_storage("run"))
model = load(stored.uri)
texts = sample(model, 8, seed=1)
# advance, which sampled, and predict, which scores, agree
scores = score(model, [each.text for each in texts], torch.zeros(8, 0), [each.truncated for each in texts])
drawn = torch.tensor([each.log_probability for each in texts])
torch.testing.assert_close(scores, drawn, rtol=1e-4, atol=1e-3)
evaluate(model, EvaluationBatches(corpus.split("valid"), config, 64), 2)
check_space(load_space("byte_gru"), {"byte_gru": base}, None, "random", 0)
assert outcome.best["kl"] == 0
sys.argv[1:] = [str(stored.uri), "--num", "3"]
runpy.run_module("raytrain.sample", run_name="__main__", alter_sys=True)
sys.argv[1:] = [str(stored.uri), "--interpolate", "a", "b"]
runpy.run_module("raytrain.sample", run_name="__main__", alter_sys=True)
"""


def blocks() -> Iterator[tuple[str, str]]:
    """The page's marked Python blocks: the mark, and the text."""
    yield from BLOCK.findall(PAGE.read_text(encoding="utf-8"))


def apply(mark: str, text: str, folder: Path) -> str:
    """Do to the copy of the repository in ``folder`` what the page says; returns the file that it changed."""
    if mark.startswith("new file: "):
        name = mark.removeprefix("new file: ")
        assert not (folder / name).exists()
        (folder / name).write_text(text, encoding="utf-8")
        return name
    match = INSERT.fullmatch(mark)
    assert match is not None, f"the mark says neither where to insert nor a new file: {mark}"
    name, side, start = match.groups()
    lines = (folder / name).read_text(encoding="utf-8").splitlines(keepends=True)
    (found,) = [number for number, line in enumerate(lines) if line.strip().startswith(start)]
    place = found if side == "before" else found + 1
    # as one would paste a definition: two empty lines before what follows
    gap = "\n\n" if text.startswith(("@", "class ", "def ")) else ""
    lines.insert(place, text + gap)
    (folder / name).write_text("".join(lines), encoding="utf-8")
    return name


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package and its search spaces, changed as the page says."""
    folder = tmp_path_factory.mktemp("added")
    for name in ("raytrain", "search_spaces"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    changed = [apply(mark, text, folder) for mark, text in blocks()]
    assert changed
    product = {name for name in changed if name.startswith("raytrain/")}
    assert len(product) <= 3, f"the page touches {sorted(product)}"
    return folder


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder), "RAYTRAIN_PLUGINS": ""}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_model_of_the_page_trains_samples_and_is_searched(copy: Path, corpus: Corpus) -> None:
    done = python(copy, "-c", USE, str(corpus.path))
    # its last command wants a latent code
    line = "error: the model has no latent code: it can neither reconstruct nor interpolate, only sample\n"
    assert (done.returncode, done.stderr) == (2, line)
    texts = done.stdout.splitlines()[-3:]
    assert all(text and not text.startswith("step") for text in texts), done.stdout


def test_the_command_line_knows_the_model_of_the_page(copy: Path) -> None:
    page = python(copy, "-m", "raytrain.train", "byte_gru", "--help").stdout
    for option in ("--model.hidden", "--model.dropout"):
        assert option in page
    refused = python(copy, "-m", "raytrain.train", "byte_gru", "--model.hidden", "0")
    assert (refused.returncode, refused.stderr) == (2, "error: model.hidden is 0: must be positive\n")


def test_the_pages_blocks_pass_the_linter(copy: Path) -> None:
    ruff = shutil.which("ruff", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if ruff is None:
        pytest.skip("ruff is not installed")
    (copy / "ruff.toml").write_text(f"extend = {json.dumps(str(ROOT / 'pyproject.toml'))}\n")
    files = ["raytrain/config/models.py", "raytrain/models/byte_gru.py", "search_spaces/byte_gru.py"]
    done = subprocess.run([ruff, "check", *files], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout

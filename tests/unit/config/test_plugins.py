"""Plugins: a model and a schedule that a user's file registers, in processes of their own."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import raytrain
from raytrain.config import plugins
from raytrain.config.models import MODELS, ModelSpec, known_models
from raytrain.config.schedules import LEARNING_RATE_SCHEDULES, OptimizerConfig
from raytrain.data.corpus import Corpus
from raytrain.runs.trained_model import load
from raytrain.utils.errors import UserError

LIGHT = """
from dataclasses import dataclass

from raytrain.config.models import MODELS, ModelSpec
from raytrain.config.presets import PRESETS, laptop
from raytrain.config.schedules import KL_SCHEDULES, LEARNING_RATE_SCHEDULES


@dataclass(frozen=True)
class ToyConfig:
    hidden: int = 32


KL_SCHEDULES["square"] = lambda progress, config: progress**2
LEARNING_RATE_SCHEDULES["root"] = lambda progress, config: (1 - progress) ** 0.5
MODELS["toy"] = ModelSpec(config=ToyConfig, implementation="net:Toy", has_latent=False, label="toy", full_size="laptop")
PRESETS["laptop", "toy"] = laptop(ToyConfig())
"""
"""A plugin that imports no torch, whose command line is as quick as any other."""

PLUGIN = '''
"""A GRU language model without a latent code, and a KL schedule."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from raytrain.config.models import MODELS, ModelSpec
from raytrain.config.presets import PRESETS, laptop
from raytrain.config.schedules import KL_SCHEDULES
from raytrain.data.vocabulary import SIZE
from raytrain.data.vocabulary import NUM_OUTPUTS
from raytrain.models.dropout import drop_input
from raytrain.models.heads import negative_log_likelihood
from raytrain.models.symbols import OneHot, shift_right
from raytrain.models.terms import Terms

KL_SCHEDULES["square"] = lambda progress, config: progress**2


@dataclass(frozen=True)
class ToyConfig:
    """Sizes of the GRU."""

    hidden: int = 32
    """Units."""


@dataclass(frozen=True)
class ToyState:
    hidden: torch.Tensor

    def keep(self, rows):
        return ToyState(self.hidden[rows])


class Toy(nn.Module):
    latent = 0

    def __init__(self, config, length, documents):
        super().__init__()
        self.length = length
        self.documents = documents
        self.one_hot = OneHot()
        self.gru = nn.GRU(SIZE, config.hidden, batch_first=True)
        self.output = nn.Linear(config.hidden, NUM_OUTPUTS)

    @classmethod
    def from_config(cls, config):
        return cls(config.model, config.length, config.sampling == "documents")

    def forward(self, tokens, noise, input_dropout=0.0):
        logits = self.output(self.gru(self.one_hot(drop_input(shift_right(tokens), noise, input_dropout)))[0])
        return Terms.without_code(negative_log_likelihood(logits, tokens).sum(1))

    def predict(self, tokens, z):
        return self.output(self.gru(self.one_hot(shift_right(tokens)))[0])

    def begin(self, z):
        return ToyState(z.new_zeros(len(z), self.gru.hidden_size))

    @torch.no_grad()
    def advance(self, previous, state):
        _, hidden = self.gru(self.one_hot(previous)[:, None], state.hidden[None])
        return self.output(hidden[0]), ToyState(hidden[0])


MODELS["toy"] = ModelSpec(
    config=ToyConfig, implementation="toy:Toy", has_latent=False, label="toy GRU", full_size="laptop"
)
PRESETS["laptop", "toy"] = laptop(ToyConfig())
'''

TRAIN = """
import json, pickle, subprocess, sys
from dataclasses import replace

from raytrain.analysis.evaluation import evaluate
from raytrain.analysis.figures.style import model_look
from raytrain.config.presets import preset
from raytrain.config.schedules import ObjectiveConfig, kl_weight
from raytrain.config.schema import from_dict, to_dict
from raytrain.data.batches import EvaluationBatches
from raytrain.data.corpus import Corpus
from raytrain.models.sampling import sample
from raytrain.runs.trained_model import load
from raytrain.runs import checkpoint
from raytrain.storage import open_storage
from raytrain.training.loop import train
from raytrain.training.reporters import PrintReporter
from raytrain.training.trainer import World

corpus = Corpus.open(sys.argv[1])
config = replace(
    preset("laptop", "toy"), steps=6, log_every=2, evaluate_every=3, checkpoint_every=3, evaluate_samples=64,
    precision="float32", length=24, objective=ObjectiveConfig(annealing="square", start=0.0, end=0.5),
)
assert from_dict(to_dict(config)) == config and config.model_name == "toy" and not config.has_latent
assert kl_weight(config.objective, 1, 4) == 0.25
outcome = train(config, corpus, World(), open_storage("run"), PrintReporter(config))
stored = checkpoint.latest(open_storage("run"))
model = load(stored.uri)
texts = sample(model, 3, max_length=8)
totals = evaluate(model, EvaluationBatches(corpus.split("valid"), config, 64), 2)
# another process and another folder: as a worker unpickles the config of its run
code = "import pickle, sys; print(pickle.load(sys.stdin.buffer).model_name)"
worker = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(config), cwd="/", capture_output=True)
print(json.dumps({
    "best": outcome.best, "texts": len(texts), "look": model_look("toy"), "bound": totals.bound.metrics()["bound"],
    "worker": worker.stdout.decode() + worker.stderr.decode(), "uri": str(stored.uri),
}))
"""


def python(folder: Path, *arguments: str, plugins: str = "") -> subprocess.CompletedProcess[str]:
    root = str(Path(raytrain.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": root, "RAYTRAIN_PLUGINS": plugins}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def test_a_model_and_a_schedule_of_a_plugin_train(tmp_path: Path, corpus: Corpus) -> None:
    (tmp_path / "toy.py").write_text(PLUGIN)
    done = python(tmp_path, "-c", TRAIN, str(corpus.path), plugins="toy.py")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["texts"] == 3
    assert result["best"]["kl"] == 0
    assert result["bound"] == pytest.approx(result["best"]["bound"], rel=1e-5)
    assert result["look"][0] == "toy GRU"
    assert result["worker"] == "toy\n"
    # what is stored names no plugin, so this process does not know the model
    with pytest.raises(UserError) as caught:
        load(result["uri"])
    line = str(caught.value)
    assert "model.name must be one of hybrid, lstm_vae, byte_lstm, not 'toy'" in line
    assert "must be registered by a module that RAYTRAIN_PLUGINS names" in line
    assert "\n" not in line


def test_commands_know_the_names_of_a_plugin(tmp_path: Path) -> None:
    (tmp_path / "toy.py").write_text(LIGHT)
    assert (
        "models: hybrid, lstm_vae, byte_lstm, toy"
        in python(tmp_path, "-m", "raytrain.train", "--help", plugins="toy.py").stdout
    )
    page = python(tmp_path, "-m", "raytrain.train", "toy", "--help", plugins=str(tmp_path / "toy.py")).stdout
    assert "--model.hidden" in page
    assert "{constant,linear,sigmoid,cyclical,square}" in page
    assert "{exponential,constant,linear,cosine,root}" in page
    # an importable module: the working directory is on the path of ``python -m``
    page = python(tmp_path, "-m", "raytrain.train", "toy", "--help", plugins="json, toy").stdout
    assert "--model.hidden" in page


def test_an_unpickled_config_knows_the_schedule_of_a_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LEARNING_RATE_SCHEDULES, "root", LEARNING_RATE_SCHEDULES["linear"])
    pickled = pickle.dumps(OptimizerConfig(1.0, schedule="root"))
    (tmp_path / "toy.py").write_text(LIGHT)
    code = f"""
import pickle
from raytrain.config.schedules import learning_rate
print(learning_rate(pickle.loads({pickled!r}), 3, 4))
"""
    assert python(tmp_path, "-c", code, plugins="toy.py").stdout == "0.5\n"


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("broken.py", "1 / 0", "cannot load the plugin {path}: ZeroDivisionError: division by zero"),
        ("broken.py", "def", "cannot load the plugin {path}: SyntaxError: invalid syntax"),
        ("broken.py", "raise SystemExit(0)", "cannot load the plugin {path}: SystemExit: 0"),
        ("no-name.py", "", "{path} must be called like a Python module"),
        ("json.py", "", "{path} is called like the module 'json' of"),
        ("", "", "cannot load the plugin nowhere_at_all: ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("missing.py", None, "there is no file {path}"),
    ],
)
def test_a_bad_plugin_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str | None, line: str
) -> None:
    if name and text is not None:
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAYTRAIN_PLUGINS", name or "nowhere_at_all")
    for _ in range(2):  # the second look-up does not pass for a plugin that was loaded
        with pytest.raises(UserError) as caught:
            known_models()
        assert str(caught.value).startswith(f"RAYTRAIN_PLUGINS: {line.format(path=tmp_path / name)}")


@pytest.mark.parametrize("command", ["train", "sample"])
def test_a_bad_plugin_ends_a_command(tmp_path: Path, command: str) -> None:
    (tmp_path / "broken.py").write_text("1 / 0")
    done = python(tmp_path, "-m", f"raytrain.{command}", "--help", plugins="broken.py")
    assert (done.returncode, done.stdout) == (2, "")
    path = tmp_path / "broken.py"
    line = f"error: RAYTRAIN_PLUGINS: cannot load the plugin {path}: ZeroDivisionError: division by zero\n"
    assert done.stderr == line


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAYTRAIN_PLUGINS", "a/toy.py, some.module,/b/c.py,")
    expected = [str(tmp_path / "a/toy.py"), "some.module", "/b/c.py"]
    assert plugins.plugins() == expected
    assert plugins.plugin_environment() == {"RAYTRAIN_PLUGINS": ",".join(expected)}
    monkeypatch.setenv("RAYTRAIN_PLUGINS", "")
    assert plugins.plugin_environment() == {}


def test_a_plugin_runs_once_and_may_look_things_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plugin_of_test.py").write_text(
        "from raytrain.config.models import known_models\nRUNS = []\nRUNS.append(len(known_models()))\n"
    )
    monkeypatch.setenv("RAYTRAIN_PLUGINS", str(tmp_path / "plugin_of_test.py"))
    known_models()
    known_models()
    (seen,) = sys.modules.pop("plugin_of_test").RUNS
    assert seen == len(MODELS)


def test_two_models_do_not_share_a_config(monkeypatch: pytest.MonkeyPatch) -> None:
    twin = ModelSpec(
        config=MODELS["hybrid"].config, implementation="x:Y", has_latent=True, label="twin", full_size="laptop"
    )
    monkeypatch.setitem(MODELS, "twin", twin)
    with pytest.raises(UserError, match="models hybrid and twin share the config class HybridConfig"):
        known_models()

"""A checkpoint as an MLflow model: logged, loaded by other processes, served; nothing in it is pickled."""

from __future__ import annotations

import json
import math
import os
import pickletools
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas
import pytest
from mlflow import MlflowClient, active_run, get_tracking_uri
from mlflow.exceptions import MlflowException
from mlflow.pyfunc.model import PythonModelContext

from raytrain import models
from raytrain.config.models import HybridConfig
from raytrain.config.schema import RunConfig, to_dict
from raytrain.models import sampling
from raytrain.models.noise import Noise
from raytrain.runs import pyfunc_model, trained_model
from raytrain.runs.checkpoint import Snapshot
from raytrain.runs.checkpoint_writer import CheckpointWriter
from raytrain.storage import open_storage
from raytrain.tracking import logged_model
from raytrain.tracking.logged_model import log_model
from raytrain.tracking.runs import Experiment, Run
from raytrain.utils.text import readable
from tests.support.mlflow_server import new_store

CARD = "# A tiny model\n\nIts text is noise.\n"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    top = HybridConfig((4,), (4,), latent=2, hidden=8)
    config = RunConfig(model=top, sampling="documents", length=12, seed=5)
    with CheckpointWriter(open_storage(folder)) as writer:
        writer.save(Snapshot(40, {"model": models.build(config).state_dict()}, {}, to_dict(config)), 2.5)
    return folder / "step-00000040"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("store")
    experiment = Experiment.open(new_store(folder), "search", str(folder / "mlflow-artifacts"))
    return experiment.open_run("abc", "a name", parameters={"seed": 5}, tags={})


@pytest.fixture(scope="module")
def model_id(run: Run, checkpoint: Path) -> str:
    return log_model(run, checkpoint, card=CARD, metrics={"valid/bits_per_byte": 2.5}, step=40)


@pytest.fixture
def files(run: Run, model_id: str) -> Path:
    return Path(MlflowClient(run.uri).get_logged_model(model_id).artifact_location)


def test_it_is_one_model_of_the_run(run: Run, checkpoint: Path, model_id: str) -> None:
    client = MlflowClient(run.uri)
    cut_off = client.create_logged_model(run.experiment_id, "model", source_run_id=run.run_id)
    assert log_model(run, checkpoint, card=CARD, metrics={"valid/bits_per_byte": 2.5}, step=40) == model_id
    (model,) = client.search_logged_models([run.experiment_id])
    assert cut_off.model_id != model_id
    assert (model.model_id, str(model.status), model.source_run_id) == (model_id, "READY", run.run_id)
    assert model.tags["mlflow.note.content"] == CARD
    assert [(metric.key, metric.value, metric.step) for metric in model.metrics or []] == [
        ("valid/bits_per_byte", 2.5, 40)
    ]
    # those of the checkpoint: the run of a search has those that its trials start from
    assert (model.params["sampling"], model.params["length"]) == ("documents", "12")
    outputs = client.get_run(run.run_id).outputs
    assert outputs is not None
    assert [output.model_id for output in outputs.model_outputs] == [model_id]


@pytest.mark.parametrize("cut_off_at", ["finalize_logged_model", "log_outputs"])
def test_a_run_whose_model_was_cut_off_has_only_the_one_that_was_not(
    run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cut_off_at: str
) -> None:
    own = Experiment.open(run.uri, cut_off_at, str(tmp_path)).open_run(cut_off_at, "a name", parameters={}, tags={})
    monkeypatch.setattr(logged_model, "_save", lambda folder, *_: folder.mkdir())

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, cut_off_at, die)
        with pytest.raises(KeyboardInterrupt):
            log_model(own, checkpoint, card=CARD, metrics={"valid/bits_per_byte": 2.5}, step=40)
    found = log_model(own, checkpoint, card=CARD, metrics={"valid/bits_per_byte": 2.5}, step=40)
    client = MlflowClient(run.uri)
    assert [model.model_id for model in client.search_logged_models([own.experiment_id])] == [found]
    outputs = client.get_run(own.run_id).outputs
    assert outputs is not None
    assert [output.model_id for output in outputs.model_outputs] == [found]


def test_no_state_is_left_in_mlflow(run: Run, model_id: str) -> None:
    assert active_run() is None
    assert get_tracking_uri() != run.uri


def test_it_holds_safetensors_json_and_text_only(files: Path) -> None:
    paths = [path for path in files.rglob("*") if path.is_file()]
    own = {str(path.relative_to(files)) for path in paths if "code" not in path.relative_to(files).parts}
    assert own >= {"MLmodel", "README.md", "requirements.txt", "pyfunc_model.py"}
    assert {path.name for path in paths if path.suffix == ".safetensors"} == {"model.safetensors"}
    assert {path.suffix for path in paths} == {"", ".md", ".txt", ".py", ".typed", ".yaml", ".json", ".safetensors"}
    for path in paths:
        assert not zipfile.is_zipfile(path), f"{path}: torch.save writes zip files that hold pickles"
        assert not is_pickle(path.read_bytes()), path
        if path.suffix != ".safetensors":
            path.read_text()
    assert (files / "README.md").read_text() == CARD


def is_pickle(data: bytes) -> bool:
    """Whether ``data`` is a pickle: one of protocol 2 or later starts with PROTO; an older one must be read."""
    if data[:1] == b"\x80" and len(data) > 1 and data[1] <= 5:
        return True
    try:
        return sum(1 for _ in pickletools.genops(data)) > 1
    except Exception:  # whatever a parser that is given something else stumbles over
        return False


def test_the_scan_knows_a_pickle() -> None:
    import pickle

    assert all(is_pickle(pickle.dumps({"a": [1, 2]}, protocol=protocol)) for protocol in range(6))
    assert not is_pickle(b'{"a": [1, 2]}')


def test_the_requirements_are_pinned_and_an_index_has_them(files: Path) -> None:
    lines = (files / "requirements.txt").read_text().split()
    assert {line.partition("==")[0] for line in lines} == {"mlflow", "torch", "numpy", "safetensors"}
    assert all(line.partition("==")[2] and "+" not in line for line in lines)


ASK = """
import json, os, sys, time
import mlflow, pandas
start = time.process_time()
model = mlflow.pyfunc.load_model(sys.argv[1])
seconds = time.process_time() - start
ask = lambda **params: model.predict([""], params=params)
texts = ["one", "zwölf"]
def refusal(texts, **params):
    try:
        model.predict(texts, params=params)
    except mlflow.exceptions.MlflowException as error:
        return error.error_code + ": " + error.message
print(json.dumps({
    "seconds": seconds, "nucleus": ask(num_texts=3, top_p=0.3), "scores": model.predict(texts, {"task": "score"}),
    "column": model.predict(pandas.DataFrame({"any name": texts}), {"task": "score"}),
    "reconstructed": model.predict(texts, {"task": "reconstruct", "temperature": 0.0}),
    "too_long": refusal(["y" * 13], task="score"), "no_task": refusal([""], task="sing"),
    "too_cold": refusal([""], temperature=-1.0),
    "default": ask(), "three": ask(num_texts=3, seed=4), "again": ask(num_texts=3, seed=4),
    "cold": ask(num_texts=2, temperature=0.0), "short": ask(num_texts=4, max_length=3),
    "modules": sorted({"ray", "boto3"} & set(sys.modules)),
    "signature": model.metadata.signature.to_dict(), "example": model.input_example is not None,
}))
"""


def ask(tmp_path: Path, run: Run, model_id: str) -> dict[str, Any]:
    environment = {**os.environ, "MLFLOW_TRACKING_URI": run.uri, "MLFLOW_DISABLE_TELEMETRY": "true"}
    command = [sys.executable, "-c", ASK, f"models:/{model_id}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.mark.slow
def test_another_process_loads_it_and_gets_text(tmp_path: Path, run: Run, checkpoint: Path, model_id: str) -> None:
    answer = ask(tmp_path, run, model_id)
    model = trained_model.load(checkpoint)
    assert answer["three"] == answer["again"] == sampling.sample_text(model, 3, seed=4)
    assert answer["default"] == sampling.sample_text(model, 1)
    assert answer["cold"] == sampling.sample_text(model, 2, temperature=0.0)
    assert answer["short"] == sampling.sample_text(model, 4, max_length=3)
    assert answer["nucleus"] == [readable(item.text) for item in sampling.sample(model, 3, top_p=0.3)]
    assert answer["reconstructed"] == [
        readable(item.text) for item in sampling.reconstruct(model, [b"one", "zwölf".encode()])
    ]
    assert answer["too_long"].startswith("INVALID_PARAMETER_VALUE: the text 'yyy")
    assert answer["no_task"].endswith("task is 'sing': must be one of sample, reconstruct, score")
    assert "temperature is -1.0" in answer["too_cold"]
    assert answer["seconds"] < 5
    assert answer["modules"] == []
    names = [item["name"] for item in json.loads(answer["signature"]["params"])]
    assert names == ["task", "num_texts", "temperature", "top_p", "max_length", "seed"]
    assert answer["example"]

    assert answer["column"] == answer["scores"]
    for row, (text, line) in enumerate(zip([b"one", "zwölf".encode()], answer["scores"], strict=True)):
        terms = model(sampling.tokenise(model, [text]), Noise(0, 0, range(row, row + 1), 1))
        expected = {"reconstruction": terms.reconstruction.item(), "kl": terms.kl.sum().item()}
        expected["bits_per_byte"] = sum(expected.values()) / math.log(2) / len(text)
        assert json.loads(line) == pytest.approx(expected, rel=1e-5)


def test_a_request_for_more_than_a_server_should_do_is_refused_at_once(checkpoint: Path) -> None:
    """MLflow's code 400: a request of fifty million texts took 10 GB."""
    generator = pyfunc_model.TextGenerator()
    generator.load_context(PythonModelContext({"checkpoint": str(checkpoint)}, {}))
    defaults = {"task": "sample", "num_texts": 1, "temperature": 0.0, "top_p": 1.0, "max_length": 2, "seed": 0}

    def ask(num: int, **params: Any) -> int:
        return len(generator.predict(None, pandas.DataFrame({"text": ["a"] * num}), defaults | params))

    assert (ask(1, num_texts=10_000), ask(10_000, task="reconstruct")) == (10_000, 10_000)
    for num, params, words in (
        (1, {"num_texts": 10_001}, "num_texts is 10001: must be between 1 and 10,000"),
        (1, {"num_texts": 0}, "num_texts is 0"),
        (10_001, {"task": "score"}, "10,001 texts: a request takes at most 10,000"),
        (1, {"max_length": 13}, "max_length is 13"),
    ):
        with pytest.raises(MlflowException, match=words) as refused:
            ask(num, **params)  # type: ignore[arg-type]
        assert refused.value.get_http_status_code() == 400


@pytest.mark.parametrize("value", [None, math.nan, 3, b"a"])
def test_what_is_no_text_is_refused(checkpoint: Path, value: Any) -> None:
    generator = pyfunc_model.TextGenerator()
    generator.load_context(PythonModelContext({"checkpoint": str(checkpoint)}, {}))
    rows = pandas.DataFrame({"text": pandas.Series(["a", value], dtype=object)})
    with pytest.raises(MlflowException, match=r"row 1 is .*: must be a text") as refused:
        generator.predict(None, rows, {"task": "score", "seed": 0})
    assert refused.value.get_http_status_code() == 400


@pytest.fixture
def served(tmp_path: Path, run: Run, model_id: str) -> Iterator[str]:
    """The address of an ``mlflow models serve`` process that serves the model."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", f"models:/{model_id}"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    # the command starts the server by the name of its program, which is beside the interpreter
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "MLFLOW_TRACKING_URI": run.uri, "MLFLOW_DISABLE_TELEMETRY": "true"}
    with open(tmp_path / "serve.log", "wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, cwd=tmp_path, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=2).close()
                break
            except (urllib.error.URLError, OSError):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError((tmp_path / "serve.log").read_text()[-3000:]) from None
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def post(address: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


@pytest.mark.slow
def test_a_server_answers_with_text(served: str, checkpoint: Path) -> None:
    model = trained_model.load(checkpoint)
    assert post(served, {"inputs": [""]}) == {"predictions": sampling.sample_text(model, 1)}
    drawn = post(served, {"inputs": [""], "params": {"num_texts": 2, "temperature": 0.5, "seed": 3}})
    assert drawn == {"predictions": sampling.sample_text(model, 2, temperature=0.5, seed=3)}
    split = {"columns": ["text"], "data": [["one"], ["two"]]}
    scores = post(served, {"dataframe_split": split, "params": {"task": "score"}})["predictions"]
    assert [set(json.loads(item)) for item in scores] == [{"reconstruction", "kl", "bits_per_byte"}] * 2
    greedy = {"task": "reconstruct", "temperature": 0.0}
    texts = post(served, {"inputs": ["one", "two"], "params": greedy})["predictions"]
    assert texts == [readable(item.text) for item in sampling.reconstruct(model, [b"one", b"two"])]
    for words, body in {
        "has 13 bytes": {"inputs": ["y" * 13], "params": greedy},
        "num_texts is 50000000: must be between 1 and 10,000": {"inputs": [""], "params": {"num_texts": 50_000_000}},
        "num_texts is -1": {"inputs": [""], "params": {"num_texts": -1}},
        "10,001 texts": {"inputs": [""] * 10_001, "params": {"task": "score"}},
        "max_length is 1000000000000": {"inputs": [""], "params": {"max_length": 10**12}},
        "top_p is 0.0": {"inputs": [""], "params": {"top_p": 0.0}},
        "temperature is inf": {"inputs": [""], "params": {"temperature": math.inf}},
        "surrogates not allowed": {"inputs": ["a", "\ud800"], "params": {"task": "score"}},
        "row 1 is nan: must be a text": {
            "dataframe_split": {"columns": ["text"], "data": [["a"], [None]]},
            "params": {"task": "score"},
        },
    }.items():
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(served, body)
        answer = refused.value.read().decode()
        assert refused.value.code == 400, answer
        assert words in answer

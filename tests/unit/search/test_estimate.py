"""What a search says before it starts: how much at once, how long, how much; and that a dry run is only that."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

import raytrain.tune as tune
from raytrain.bench import __main__ as bench
from raytrain.bench.options import parse_command
from raytrain.cluster.resources import HEAD_MEMORY_PER_TRIAL, UNLIMITED, Cluster
from raytrain.config.presets import preset
from raytrain.config.schema import RunConfig, override, to_dict
from raytrain.config.workers import WorkerSpec
from raytrain.data.corpus import Corpus
from raytrain.runs.records import PLAN
from raytrain.runs.trials import Trial, TrialStore
from raytrain.search import setup
from raytrain.search.estimate import Estimate, bench_command, read_benchmark, trial_seconds, worker_bytes
from raytrain.search.plan import Plan
from raytrain.search.space import read_space
from raytrain.storage import open_storage
from raytrain.storage.local import FolderStorage
from raytrain.utils.errors import UserError, run_command
from tests.conftest import tiny_config
from tests.support.s3_server import S3Server

HEAD = {"CPU": 0.0}
CLUSTERS = {
    1: Cluster(({"CPU": 8.0, "GPU": 1.0},)),
    8: Cluster((HEAD, {"CPU": 8.0, "GPU": 1.0}), (({"CPU": 8.0, "GPU": 1.0}, 8),)),
    64: Cluster((HEAD,), (({"CPU": 48.0, "GPU": 8.0}, 8), (HEAD, 0))),
}
"""By their GPUs: a machine; a head and nodes of one GPU, one of them up; a head and nodes of eight, none of them up."""


# ------------------------------------------------------------------------------------------- what fits


def placed(nodes: list[dict[str, float]], worker_spec: WorkerSpec) -> int:
    """Workers that fit, one after the other, each on the first node that has room."""
    free, workers = [dict(node) for node in nodes], 0
    while True:
        room = (node for node in free if all(node.get(k, 0) + 1e-6 >= v for k, v in worker_spec.per_worker.items()))
        node = next(room, None)
        if node is None:
            return workers
        for name, amount in worker_spec.per_worker.items():
            node[name] -= amount
        workers += 1


NODES = st.lists(
    st.fixed_dictionaries({"CPU": st.integers(0, 8).map(float), "GPU": st.integers(0, 4).map(float)}), max_size=4
)
GANGS = st.builds(
    WorkerSpec,
    st.integers(1, 5),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.integers(0, 2).map(float),
)


@given(NODES, NODES, st.integers(0, 3), GANGS, st.none() | st.integers(1, 20), st.floats(0, 20))
def test_no_more_is_admitted_than_fits(
    up: list[dict[str, float]],
    kinds: list[dict[str, float]],
    count: int,
    worker_spec: WorkerSpec,
    wanted: int | None,
    groups_in_memory: float,
) -> None:
    cluster = Cluster(tuple(up), tuple((kind, count) for kind in kinds))
    most = max(placed(up, worker_spec), placed([kind for kind in kinds for _ in range(count)], worker_spec))
    try:
        runs = cluster.admit(worker_spec, wanted, groups_in_memory * HEAD_MEMORY_PER_TRIAL)
    except UserError:
        assert most < worker_spec.workers
        return
    assert 1 <= runs <= (wanted or UNLIMITED)
    assert runs * worker_spec.workers <= most
    if worker_spec.workers > 1:
        assert runs <= max(1, groups_in_memory)


# --------------------------------------------------------------------------------------------- dry runs


@pytest.fixture
def dry_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Runs ``tune ... --dry-run`` on one of ``CLUSTERS``; returns its status and what it said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAYTRAIN_CACHE", str(tmp_path / "cache"))
    for name in ("MLFLOW_TRACKING_URI", "RAYTRAIN_STORAGE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("raytrain.search.setup.connect", lambda address: None)
    monkeypatch.setattr("raytrain.search.setup.free_memory", lambda: 32.0 * 2**30)
    # the clusters of more than one node would need a server
    for module in ("raytrain.search.setup", "raytrain.runs.workspace"):
        monkeypatch.setattr(f"{module}.check_tracking", lambda *arguments: None)
    lines = (f"line {number} of a text that is longer than one window of 64 bytes\n" for number in range(300))
    (tmp_path / "text.txt").write_text("".join(lines))
    (tmp_path / "space.py").write_text("def space(trial):\n    return {'model.latent': trial.suggest_int('z', 2, 9)}\n")

    usual = ["hybrid", "--data", "text.txt", "--space", "space.py", "--dry-run"]

    def run(gpus: int, *arguments: str, command: list[str] = usual) -> tuple[int, str]:
        monkeypatch.setattr("raytrain.search.setup.read_cluster", lambda: CLUSTERS[gpus])
        monkeypatch.setattr(sys, "argv", ["tune", *command, *arguments])
        try:
            run_command(tune.main)
        except SystemExit as ended:
            output = capsys.readouterr()
            return int(ended.code or 0), output.out + output.err
        return 0, capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    ("gpus", "arguments", "at_a_time", "taken"),
    [
        (1, ["--num-samples", "128"], 1, "1 of 8 CPUs and 1 of 1 GPUs (8 CPUs and 1 GPUs online)"),
        (8, ["--num-samples", "128"], 8, "8 of 64 CPUs and 8 of 8 GPUs (8 CPUs and 1 GPUs online)"),
        (64, ["--num-samples", "128"], 64, "64 of 384 CPUs and 64 of 64 GPUs (0 CPUs and 0 GPUs online)"),
        (64, ["--num-samples", "12"], 12, "12 of 384 CPUs and 12 of 64 GPUs"),
        (64, ["--num-samples", "128", "--workers-per-trial", "3"], 21, "63 of 384 CPUs and 63 of 64 GPUs"),
        (
            64,
            ["--num-samples", "128", "--workers-per-trial", "2", "--gpus-per-worker", "0"],
            40,
            "80 of 384 CPUs (0 CPUs online); the memory of this machine carries no more",
        ),
        # 40 worker groups fit into the head's memory, but 24 workers with 5 GPUs never fit on 8 nodes with 8
        (64, ["--num-samples", "9", "--gpus-per-worker", "5", "--workers-per-trial", "2"], 4, "8 of 384 CPUs and 40"),
        (64, ["--num-samples", "128", "--gpus-per-worker", "0.5"], 128, "128 of 384 CPUs and 64 of 64 GPUs"),
        (64, ["--num-samples", "128", "--workers-per-trial", "1", "--max-concurrent", "5"], 5, "5 of 384 CPUs"),
    ],
)
def test_a_plan_asks_for_no_more_than_there_may_be(
    dry_run: Callable[..., tuple[int, str]], gpus: int, arguments: list[str], at_a_time: int, taken: str
) -> None:
    status, output = dry_run(gpus, *arguments)
    assert status == 0, output
    assert f"concurrent trials: {at_a_time}, {taken}" in output, output
    assert "preset paper-ptb (the cluster has GPUs)" in output
    assert "hours: no estimate without a benchmark\n" in output
    for used, most in re.findall(r"(\d+) of (\d+) [CG]PUs", output):
        assert int(used) <= int(most)


REAL = """
import sys, unittest.mock
from unittest.mock import DEFAULT
import ray
from ray._private.worker import global_worker
from ray.core.generated.autoscaler_pb2 import ClusterConfig, NodeGroupConfig
import raytrain.tune as tune

ray.init(address="local", num_cpus=0, include_dashboard=False)
sys.argv[1:] = "hybrid --data text.txt --space space.py --dry-run --num-samples 128".split()
for gpus, nodes in ((1, 1), (1, 8), (8, 8)):
    group = NodeGroupConfig(resources={"CPU": 6 * gpus, "GPU": gpus}, min_count=0, max_count=nodes, name="gpu")
    config = ClusterConfig(node_group_configs=[group]).SerializeToString()
    global_worker.gcs_client.report_cluster_config(config)
    with unittest.mock.patch.multiple("raytrain.search.setup", connect=DEFAULT, check_tracking=DEFAULT):
        tune.main()
assert ray.available_resources().get("GPU", 0) == 0
assert not ray.util.placement_group_table()
"""


@pytest.mark.slow
def test_plans_on_a_real_head_that_may_grow_to_1_8_and_64_gpus(dry_run: object, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", REAL], capture_output=True, text=True, timeout=600, check=False,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    for gpus in (1, 8, 64):
        assert "128 trials (space, tpe), each 1 x (1 CPU and 1 GPU) on GPUs" in done.stdout
        assert f"concurrent trials: {gpus}, {gpus} of {6 * gpus} CPUs and {gpus} of {gpus} GPUs (" in done.stdout
    assert done.stdout.count("dry run: nothing was started") == 3
    assert [path.name for path in tmp_path.glob("runs/*")] == [".cache"]


def test_what_never_fits_is_refused(dry_run: Callable[..., tuple[int, str]]) -> None:
    status, output = dry_run(8, "--gpus-per-worker", "2")
    assert status == 2
    assert "a run needs 1 x (1 CPU and 2 GPU), but only 0 of these workers fit" in output


def test_trials_that_share_a_gpu_are_not_estimated(dry_run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    """A bench has its GPU alone."""
    file = write_bench(tmp_path / "bench.json", tiny_config("hybrid"))
    status, output = dry_run(8, "--gpus-per-worker", "0.25", "--num-samples", "40", "--bench", file)
    assert status == 0, output
    assert "hours: no estimate without a benchmark\ntrials that share a GPU are slower" in output
    assert "concurrent trials: 32" in output


def test_a_dry_run_starts_and_records_nothing(dry_run: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    before = ray.is_initialized()  # the tests may share an instance
    status, output = dry_run(8, "--name", "mine")
    assert status == 0, output
    assert output.endswith("dry run: nothing was started\n")
    assert ray.is_initialized() == before
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [".cache"]  # the corpus, which a search would use
    assert not (tmp_path / "mlflow.db").exists()


def test_a_dry_run_puts_no_corpus_into_s3(
    dry_run: Callable[..., tuple[int, str]], s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_server.use(monkeypatch)
    status, output = dry_run(8, "--storage", "s3://raytrain/dry")
    assert status == 0, output
    assert open_storage("s3://raytrain/dry").list() == []


def test_a_dry_run_of_a_search_that_is_known_counts_what_is_left(
    dry_run: Callable[..., tuple[int, str]], corpus: Corpus, tmp_path: Path
) -> None:
    location = FolderStorage(tmp_path / "runs" / "mine")
    config = tiny_config("hybrid")
    workers = {"workers_per_trial": 2, "device": "cpu", "time_budget": 1800.0}
    known = replace(make_plan(corpus, config), num_samples=5, workers=workers)
    location.write(PLAN, known.to_json())
    records = TrialStore(location)
    for number, status in enumerate(("finished", "stopped", "interrupted")):
        trial = Trial(number=number, identity=f"{number}", config=config, params={}, distributions={}, fields={})
        records.add(replace(trial, status=status))  # type: ignore[arg-type]
    before = location.list()
    status, output = dry_run(8, "--resume", "mine", "--dry-run", command=[])
    assert status == 0, output
    assert "search mine: 5 trials (mine, tpe), each 2 x (1 CPU and 1 GPU) on CPUs" in output
    assert "concurrent trials: 3" in output
    assert "hours: no estimate without a benchmark, at most 0.50 by --time-budget" in output
    assert location.list() == before


def test_two_searches_that_begin_within_a_second_have_two_names(
    dry_run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup.time, "strftime", lambda form: "20260101-000000")
    monkeypatch.setattr(setup, "new_identity", iter(["0123456789abcdef", "f" * 16]).__next__)
    for digits in ("0123", "ffff"):
        assert f"\nsearch hybrid-20260101-000000-{digits}: 8 trials" in dry_run(8)[1]


def test_computing_on_the_cpu_takes_the_gpus_and_the_small_preset(dry_run: Callable[..., tuple[int, str]]) -> None:
    status, output = dry_run(8, "--device", "cpu", "--num-samples", "8")
    assert status == 0, output
    assert "preset laptop (--device cpu)" in output
    assert "each 1 x (1 CPU and 1 GPU) on CPUs" in output
    assert "concurrent trials: 8" in output


# ------------------------------------------------------------------------------------- hours and money

CPU = WorkerSpec(1, 2.0, 0.0)
GPU = WorkerSpec(1, 1.0, 1.0)


def make_plan(corpus: Corpus, config: RunConfig[Any]) -> Plan:
    space = read_space("mine", "def space(trial):\n    return {}")
    return Plan(
        identity="0" * 16,
        space=space, bases={config.model_name: config}, budget=None, algorithm="tpe", corpus=corpus.digest,
        num_samples=8, seed=0, workers={}, experiment="raytrain", corpus_path=str(corpus.path),
    )  # fmt: skip


def write_bench(file: Path, config: RunConfig[Any], /, **changes: Any) -> str:
    """What a bench of ``config`` would write: 0.1 s a step of 64 samples, 0.07 s in bfloat16, 0.2 s of 128."""
    rows = [(64, "float32", 0.1), (64, "bfloat16", 0.07), (128, "float32", 0.2)]
    values = {
        "config": to_dict(override(config, {"precision": "float32"})),
        "machine": {"cpu": "EPYC", "device": "cpu", "threads": 2},
        "step": [
            {"batch_size": size, "precision": name, "step_seconds": {"median": value}} for size, name, value in rows
        ],
        "evaluation": {"samples": 64, "seconds_per_sample": {"median": 0.01}},
        "ddp": {"batch_size": 64, "workers": [{"workers": 4, "fixed_batch_efficiency": {"median": 2.5}}]},
    }
    file.write_text(json.dumps(values | changes))
    return str(file)


@pytest.mark.parametrize(
    ("changes", "objective", "worker_spec", "seconds"),
    [
        # 1,000 steps and 4 evaluations of 64 samples
        ({}, "bound", CPU, 1000 * 0.1 + 4 * 64 * 0.01),
        ({}, "nll", CPU, 1000 * 0.1 + 4 * 64 * 0.01 * 9),
        ({"precision": "bfloat16"}, "bound", CPU, 1000 * 0.07 + 4 * 64 * 0.01),
        ({"batch_size": 128, "steps": 300}, "bound", CPU, 300 * 0.2 + 64 * 0.01),
        ({}, "bound", WorkerSpec(4, 0.5, 0.0), (1000 * 0.1 + 4 * 64 * 0.01) / 2.5),
        ({}, "bound", WorkerSpec(1, 2.0, 1.0, device="cpu"), 1000 * 0.1 + 4 * 64 * 0.01),
    ],
)
def test_a_trial_takes_its_steps_and_its_evaluations(
    corpus: Corpus, tmp_path: Path, changes: dict[str, Any], objective: Any, worker_spec: WorkerSpec, seconds: float
) -> None:
    config = tiny_config("hybrid", steps=1000, evaluate_every=300, precision="auto")
    file = write_bench(tmp_path / "bench.json", config)
    plan = replace(make_plan(corpus, override(config, changes)), objective=objective)
    found, sources = trial_seconds(plan, corpus, worker_spec, [file])
    assert found == pytest.approx(seconds)
    assert sources == [f"EPYC in {file}"]


@pytest.mark.parametrize(
    ("changes", "worker_spec", "line"),
    [
        ({"model.hidden": 48}, CPU, "model.hidden was 32, is 48"),
        ({"length": 32, "data": "ptb"}, CPU, "data was synthetic, is ptb; length was 24, is 32"),
        ({"batch_size": 32}, CPU, "it has no step of 32 samples in float32"),
        ({}, GPU, "it was measured on a CPU"),
        ({}, WorkerSpec(1, 1.0, 0.0), "its 2 threads are not those of 1 x (1 CPU)"),
        ({}, WorkerSpec(2, 1.0, 0.0), "it has no DDP of 2 workers"),
    ],
)
def test_a_benchmark_of_something_else_does_not_apply(
    corpus: Corpus, tmp_path: Path, changes: dict[str, Any], worker_spec: WorkerSpec, line: str
) -> None:
    config = tiny_config("hybrid", steps=1000, evaluate_every=300, precision="auto")
    file = write_bench(tmp_path / "bench.json", config)
    found, lines = trial_seconds(make_plan(corpus, override(config, changes)), corpus, worker_spec, [file])
    assert found is None
    assert lines[0] == f"{file} does not apply: {line}"
    assert lines[1].startswith(
        "to benchmark, run on a machine of the workers: python -m raytrain.bench hybrid --preset "
    )


def test_of_two_models_the_longer_trial_counts(corpus: Corpus, tmp_path: Path) -> None:
    configs = [tiny_config("hybrid", steps=100), tiny_config("lstm_vae", steps=200)]
    files = [write_bench(tmp_path / f"{config.model_name}.json", config) for config in configs]
    plan = replace(make_plan(corpus, configs[0]), bases={config.model_name: config for config in configs})
    assert trial_seconds(plan, corpus, CPU, files)[0] == pytest.approx(200 * 0.1 + 20 * 64 * 0.01)
    found, lines = trial_seconds(plan, corpus, CPU, files[:1])
    assert found is None
    assert "raytrain.bench lstm_vae" in lines[-1]


def an_estimate(
    num_trials: int, concurrent: int, workers: int, seconds: float | None, time_budget: float | None, price: float
) -> Estimate:
    return Estimate(
        num_trials=num_trials, concurrent=concurrent, workers=workers, trial_seconds=seconds, time_budget=time_budget,
        price=price,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("estimate", "lines"),
    [
        (Estimate(num_trials=10, concurrent=4, workers=2), ["hours: no estimate without a benchmark", "why"]),
        (
            an_estimate(10, 4, 2, None, 7200.0, 1.5),
            ["hours: no estimate without a benchmark, at most 2.00 by --time-budget", "why",
             "cost: 12.00 per hour for 8 workers at 1.5, at most 24.00 in total"],
        ),
        # three rounds of half an hour; ten trials of two workers are ten worker-hours
        (
            an_estimate(10, 4, 2, 1800.0, None, 1.5),
            ["hours: at most 1.50, 0.50 per trial of these sizes (why), plus the start of nodes",
             "cost: 12.00 per hour for 8 workers at 1.5, at most 15.00 in total"],
        ),
        (
            an_estimate(10, 4, 2, 1800.0, 3600.0, 1.5),
            ["hours: at most 1.00, 0.50 per trial of these sizes (why), plus the start of nodes",
             "cost: 12.00 per hour for 8 workers at 1.5, at most 12.00 in total"],
        ),
        (
            an_estimate(1, 1, 1, None, None, 0.25),
            ["hours: no estimate without a benchmark", "why", "cost: 0.25 per hour for 1 worker at 0.25"],
        ),
    ],
)  # fmt: skip
def test_what_all_trials_take(estimate: Estimate, lines: list[str]) -> None:
    assert estimate.lines(["why"]) == lines


def test_a_search_that_was_not_asked_says_nothing_of_hours_that_it_does_not_know() -> None:
    known = an_estimate(10, 4, 2, 1800.0, None, 1.5)
    assert known.lines(["why"], asked=False) == known.lines(["why"])
    assert Estimate(num_trials=10, concurrent=4, workers=2).lines(["why"], asked=False) == []
    limited = Estimate(num_trials=10, concurrent=4, workers=2, time_budget=7200.0)
    assert limited.lines(["why"], asked=False) == ["hours: at most 2.00 by --time-budget"]


@pytest.mark.parametrize(
    ("name", "model", "changes", "worker_spec"),
    [
        ("paper-ptb", "hybrid", {}, GPU),
        ("laptop", "byte_lstm", {"batch_size": 48, "precision": "float32"}, WorkerSpec(1, 1.0, 0.0)),
        ("laptop", "hybrid", {"vocabulary": "bpe:300"}, CPU),
        ("paper-tweets", "lstm_vae", {"sampling": "windows", "length": 77, "model.hidden": 33}, WorkerSpec(2, 3.0, 0.0)),  # noqa: E501
        ("laptop", "hybrid", {"data": "my text.txt", "model.feature_maps": [8, 16], "model.decoder_maps": [4, 4]}, CPU),
        ("bios", "byte_lstm", {"data_path": "here", "objective.alpha": 0.5, "steps": 7}, WorkerSpec(4, 1.0, 1.0)),
    ],
)  # fmt: skip
def test_the_command_measures_what_is_lacking(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: Any,
    model: Any,
    changes: dict[str, Any],
    worker_spec: WorkerSpec,
) -> None:
    monkeypatch.chdir(tmp_path)
    config = override(preset(name, model), changes)
    command = shlex.split(bench_command(config, worker_spec))
    assert command[:3] == ["python", "-m", "raytrain.bench"]
    options = parse_command(command[3:])
    assert options.config.data_path == config.data_path
    assert options.config.vocabulary == config.vocabulary
    assert set(options.sections) == ({"step", "ddp"} if worker_spec.workers > 1 else {"step"})
    assert worker_spec.workers == 1 or options.workers == [worker_spec.workers]
    machine = {"cpu": "EPYC", "device": "cuda" if worker_spec.on_gpus else "cpu", "threads": options.threads}
    (precision,) = {options.config.precision, *([] if config.precision == "auto" else [config.precision])}
    step = {"batch_size": options.batch_sizes[0], "precision": precision, "step_seconds": {"median": 1.0}}
    workers = [{"workers": size, "fixed_batch_efficiency": {"median": 1.0}} for size in options.workers]
    file = write_bench(
        tmp_path / "bench.json", config, config=to_dict(options.config), machine=machine, step=[step],
        ddp={"batch_size": options.config.batch_size, "workers": workers},
    )  # fmt: skip
    assert read_benchmark(file).lacks(config, worker_spec) == []


def test_hours_are_those_of_a_bench(
    dry_run: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    sizes = "--model.feature-maps 8 16 --model.decoder-maps 16 8 --model.hidden 16 --length 16 --steps 4000".split()
    status, output = dry_run(8, "--device", "cpu", *sizes)
    assert status == 0, output
    command = re.search(r"run on a machine of the workers: python -m (raytrain.bench .*)", output)
    assert command is not None
    monkeypatch.setattr(sys, "argv", [*shlex.split(command[1]), "--quick"])
    bench.main()
    measured = json.loads((tmp_path / "bench.json").read_text())
    capsys.readouterr()
    status, output = dry_run(8, "--device", "cpu", *sizes, "--bench", "bench.json", "--price-per-hour", "0.5")
    assert status == 0, output
    # the bench's own run has the preset's steps
    config = preset("laptop", "hybrid")
    evaluation = measured["run"]["evaluation_seconds"] / measured["run"]["evaluations"] * 4000 / config.evaluate_every
    hours = (measured["run"]["training_seconds"] / config.steps * 4000 + evaluation) / 3600
    assert f"hours: at most {hours:.2f}, {hours:.2f} per trial of these sizes (" in output
    assert "in bench.json), plus the start of nodes" in output
    assert f"cost: 4.00 per hour for 8 workers at 0.5, at most {8 * hours * 0.5:.2f} in total" in output


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (None, "there is no such file"),
        ("{", "--output writes: Expecting"),
        ("[]", "--output writes: list indices"),
        ('{"machine": {}}', "--output writes: lacks 'config'"),
        ('{"machine": {"cpu": "x", "device": "cpu", "threads": 1}, "config": {}}', "model.name must be one of"),
    ],
)
def test_what_is_no_bench_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "bench.json").write_text(text)
    with pytest.raises(UserError, match=r"^--bench bench\.json") as refused:
        read_benchmark("bench.json")
    assert line in str(refused.value)


def test_medians_that_are_none_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    for value in (0.0, -1.0, math.nan):
        evaluation = {"samples": 1, "seconds_per_sample": {"median": value}}
        with pytest.raises(UserError, match="a median is"):
            read_benchmark(write_bench(tmp_path / "bench.json", tiny_config("hybrid"), evaluation=evaluation))


@pytest.mark.parametrize(
    ("model", "name", "batch_size", "peak"),
    [("hybrid", "laptop", 64, 505), ("byte_lstm", "laptop", 256, 656), ("hybrid", "paper-tweets", 32, 808)],
)
def test_a_worker_reserves_more_than_the_peak_that_was_measured(
    model: str, name: Any, batch_size: int, peak: int
) -> None:
    """By benchmarks/worker_memory.py; and less than twice of it. Of two workers each has half of the batch."""
    config = replace(preset(name, model), batch_size=batch_size)
    need = worker_bytes(config, 1) / 1e6
    assert 1.1 * peak < need < 2 * peak
    assert worker_bytes(replace(config, batch_size=batch_size // 2), 1) == worker_bytes(config, 2) < 1e6 * need

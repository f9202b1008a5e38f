"""The loop on one and several gloo workers: same samples, exact resume, and the known limit of the text."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from raytrain.config.models import ByteLstmConfig
from raytrain.config.schema import ObjectiveConfig, OptimizerConfig, RunConfig, to_dict
from raytrain.data.corpus import Corpus, CorpusWriter
from raytrain.models import num_parameters
from raytrain.runs import checkpoint
from raytrain.storage import open_storage
from raytrain.training.loop import train
from raytrain.training.trainer import Trainer, World
from raytrain.utils.errors import UserError
from tests.conftest import tiny_config
from tests.support.away import Away

RATE = ObjectiveConfig(annealing="constant", rate=1.0)
"""Below the KL of eight dimensions that are normalised to 0.6, and above half of it."""
RECIPE = OptimizerConfig(schedule="cosine", warmup=0.1, weight_decay=0.1, ema=0.9)
HALVES: dict[str, Any] = {"steps": 40, "evaluate_every": 20, "checkpoint_every": 20}
RESUMED = {
    "hybrid": tiny_config("hybrid", **HALVES),
    "hybrid, averaged": tiny_config("hybrid, normalised", optimizer=RECIPE, **HALVES),
    "lstm_vae, normalised": tiny_config("lstm_vae, normalised", objective=RATE, **HALVES),
    "byte_lstm, regularised": tiny_config("byte_lstm, regularised", **HALVES),
}
"""Runs that are stopped and resumed. A rate has a multiplier that belongs to the run's state."""
SHARED: dict[str, dict[str, Any]] = {
    "hybrid": {},
    "hybrid, normalised": {},
    "lstm_vae": {},
    "lstm_vae, normalised": {"objective": RATE},
    "byte_lstm": {},
    "byte_lstm, regularised": {},
}
"""Models and the changes to their configs."""
"""A normalised code has statistics of the batch of all workers, with gradients that cross them."""


class Stop(Exception):
    """Ends a run from outside, as a lost machine would."""


class Recorder:
    """Keeps what the loop reports; stops the run after the checkpoint of one step."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at
        self.records: dict[int, dict[str, float]] = {}
        self.heard: list[dict[str, float]] = []
        """The evaluations that the newest checkpoint had after a resume."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.records[step] = metrics

    def pending(self) -> list[Any]:
        return list(self.records.items())

    def replay(self, records: list[Any]) -> None:
        self.records = dict(records)

    def resumed(self, evaluations: list[dict[str, float]]) -> None:
        self.heard = list(evaluations)

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        if step == self.stop_at:
            raise Stop

    def preemption_notice(self) -> bool:
        return False


def run(
    config: RunConfig[Any],
    corpus: Corpus,
    world: World,
    folder: Path,
    stop_at: int | None = None,
    encoder: Callable[[], dict[str, torch.Tensor]] | None = None,
) -> Recorder:
    recorder = Recorder(stop_at)
    try:
        train(config, corpus, world, open_storage(folder), recorder, encoder=encoder)
    except Stop:
        assert stop_at is not None
    return recorder


def final(folder: Path) -> checkpoint.Checkpoint:
    stored = checkpoint.latest(open_storage(folder))
    assert stored is not None
    return stored


def on_workers(size: int, body: Callable[..., None], *arguments: Any) -> None:
    """Run ``body(world, *arguments)`` in ``size`` processes that form a gloo group."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_worker, (size, port, body, arguments), nprocs=size)


def _worker(rank: int, size: int, port: int, body: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    body(World(rank=rank, size=size), *arguments)
    dist.barrier()
    dist.destroy_process_group()
    # a thread of gloo's can outlive the group and abort the process in the destructors that run at exit
    os._exit(0)


def _undisturbed_and_resumed(world: World, corpus_path: str, out: str, models: Sequence[str] = tuple(RESUMED)) -> None:
    corpus = Corpus.open(corpus_path)
    for model in models:
        config = RESUMED[model]
        run(config, corpus, world, Path(out, model, "whole"))
        run(config, corpus, world, Path(out, model, "parts"), stop_at=20)
        resumed = run(config, corpus, world, Path(out, model, "parts"))
        assert [evaluation["step"] for evaluation in resumed.heard] == [20]  # on every rank


def assert_same_run(folder: Path, models: Sequence[str] = tuple(RESUMED)) -> None:
    for model in models:
        whole, parts = final(folder / model / "whole"), final(folder / model / "parts")
        assert whole.step == parts.step == 40
        for stem in ("model", "optimizer"):
            for name, tensor in whole.tensors(stem).items():
                assert torch.equal(tensor, parts.tensors(stem)[name]), f"{model} {stem} {name}"


@pytest.mark.parametrize("model", RESUMED)
def test_a_resumed_run_is_bit_identical_on_1_worker(corpus: Corpus, tmp_path: Path, model: str) -> None:
    _undisturbed_and_resumed(World(), str(corpus.path), str(tmp_path), [model])
    assert_same_run(tmp_path, [model])


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.long)])
def test_a_resumed_run_is_bit_identical_on_several_workers(corpus: Corpus, tmp_path: Path, size: int) -> None:
    on_workers(size, _undisturbed_and_resumed, str(corpus.path), str(tmp_path))
    assert_same_run(tmp_path)


def _train_once(world: World, corpus_path: str, out: str) -> None:
    for model, changes in SHARED.items():
        config = tiny_config(model, steps=5, log_every=1, evaluate_every=5, **changes)
        records = run(config, Corpus.open(corpus_path), world, Path(out, model)).records
        if world.rank == 0:
            Path(out, f"{model}.json").write_text(json.dumps(records))


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_another_number_of_workers_gives_the_same_result(corpus: Corpus, tmp_path: Path, size: int) -> None:
    """Up to the order of float sums; three workers get uneven shares of the four groups."""
    for folder in ("one", "several"):
        (tmp_path / folder).mkdir()
    _train_once(World(), str(corpus.path), str(tmp_path / "one"))
    on_workers(size, _train_once, str(corpus.path), str(tmp_path / "several"))
    for model in SHARED:
        one, several = (json.loads((tmp_path / folder / f"{model}.json").read_text()) for folder in ("one", "several"))
        for step, metrics in one.items():
            # Adam turns the rounding of gradients near 0 into full steps: differences grow with the steps
            tolerance = 1e-5 if step == "1" else 1e-2
            for name, value in metrics.items():
                if name != "train/bytes_per_second":
                    # what is used is a difference of two large sums; a normalised code's KL is near 0 yet
                    small = name.endswith(("/used", "/mutual_information"))
                    small = small or (name.endswith("/kl") and "normalised" in model)
                    least = 1e-3 if small else 1e-5
                    assert several[step][name] == pytest.approx(value, rel=tolerance, abs=least), (
                        f"{model} {step} {name}"
                    )


def _send_gradients(world: World, corpus_path: str, out: str) -> None:
    """Train with each type of gradients, and once more with the shorter one; count what they send: DDP
    rehearses a step first."""
    sent: list[int] = []
    norms: list[float] = []
    reduce = dist.all_reduce

    def counted(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        if tensor.dtype == torch.bfloat16:
            sent.append(tensor.numel())
        return reduce(tensor, *arguments, **options)

    dist.all_reduce = counted
    for number, gradients in enumerate(["float32", "bfloat16", "bfloat16"]):
        config = tiny_config("byte_lstm", steps=5, checkpoint_every=5, evaluate_every=5, gradients=gradients)
        trained = run(config, Corpus.open(corpus_path), world, Path(out, str(number)))
        if world.rank == 0:
            norms.append(trained.records[5]["train/gradient_norm"])
        size = num_parameters(config)
        assert sum(sent) == (0 if number == 0 else 6 * number * size)
    assert norms == pytest.approx([*norms[:1]] * len(norms), rel=0.02), "a mean, not a sum"


@pytest.mark.slow
def test_gradients_are_sent_as_bfloat16_where_that_is_asked_for(corpus: Corpus, tmp_path: Path) -> None:
    on_workers(2, _send_gradients, str(corpus.path), str(tmp_path))
    plain, short, again = (final(tmp_path / str(number)).tensors("model") for number in range(3))
    for name, tensor in short.items():
        assert torch.equal(tensor, again[name])
        torch.testing.assert_close(tensor, plain[name], rtol=0, atol=0.02)
    assert any(not torch.equal(tensor, plain[name]) for name, tensor in short.items())


@pytest.mark.parametrize("model", ["hybrid", "lstm_vae", "byte_lstm", "byte_lstm, regularised"])
@pytest.mark.parametrize("held", [{"free_bits": 1.0}, {"rate": 2.0}])
def test_gradients_of_slices_add_up_to_those_of_the_batch(corpus: Corpus, model: str, held: dict[str, float]) -> None:
    config = tiny_config(model, objective=ObjectiveConfig(annealing="constant", input_dropout=0.2, **held))  # type: ignore[arg-type]

    def gradients(size: int) -> list[torch.Tensor]:
        trainer = Trainer(config, corpus, World())
        trainer.network.train()
        for rank in range(size):
            trainer.forward_backward(trainer.step_inputs(trainer.train_batches.batch(3, rank, size), 3))
        return [parameter.grad for parameter in trainer.model.parameters() if parameter.grad is not None]

    for whole, summed in zip(gradients(1), gradients(3), strict=True):
        torch.testing.assert_close(summed, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()) + 1e-7)


def test_checkpoints_of_another_run_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    config = tiny_config("byte_lstm", steps=4)
    run(config, corpus, World(), tmp_path)
    with pytest.raises(UserError, match="is of a run with another model or another corpus"):
        run(tiny_config("hybrid", steps=4), corpus, World(), tmp_path)
    with CorpusWriter(tmp_path / "other", name="other", source="here") as writer:
        for split in ("train", "valid"):
            writer.add(split, b"another text " * 1000)
    with pytest.raises(UserError, match="is of a run with another model or another corpus"):
        run(config, Corpus.open(tmp_path / "other"), World(), tmp_path)


def test_metrics_of_a_resumed_run_are_those_of_an_undisturbed_one(corpus: Corpus, tmp_path: Path) -> None:
    config = tiny_config("hybrid", checkpoint_every=5)
    whole = run(config, corpus, World(), tmp_path / "whole").records
    first = run(config, corpus, World(), tmp_path / "parts", stop_at=10).records
    second = run(config, corpus, World(), tmp_path / "parts").records
    assert sorted(whole) == [5, 10, 15, 20]
    assert sorted({**first, **second}) == sorted(whole)
    for step, metrics in {**first, **second}.items():
        for name, value in metrics.items():
            if name != "train/bytes_per_second":
                assert value == whole[step][name], f"{name} at {step}"


def test_a_checkpoint_keeps_what_was_logged_and_has_not_arrived(corpus: Corpus, tmp_path: Path) -> None:
    config = tiny_config("byte_lstm", log_every=2, checkpoint_every=10)
    run(config, corpus, World(), tmp_path, stop_at=10)
    assert [record[0] for record in final(tmp_path).state["pending"]] == [2, 4, 6, 8, 10]
    assert sorted(run(config, corpus, World(), tmp_path).records) == list(range(2, 21, 2))


def test_a_resumed_run_tells_of_every_evaluation_that_its_checkpoint_has(corpus: Corpus, tmp_path: Path) -> None:
    """Whoever is told of one may die before it is written down, also of the last."""
    config = tiny_config("hybrid", steps=30)
    run(config, corpus, World(), tmp_path / "whole")
    run(config, corpus, World(), tmp_path / "parts", stop_at=20)
    run(config, corpus, World(), tmp_path / "parts", stop_at=30)
    ended = run(config, corpus, World(), tmp_path / "parts")
    assert ended.heard == final(tmp_path / "whole").state["evaluations"]
    assert [evaluation["step"] for evaluation in ended.heard] == [10, 20, 30]
    assert final(tmp_path / "parts").evaluation == {
        name: value for name, value in ended.heard[-1].items() if name != "step"
    }
    for step in checkpoint.steps_in(open_storage(tmp_path / "parts")):
        stored = checkpoint.load(tmp_path / "parts" / checkpoint.folder_of(step))
        assert stored.evaluation["bound"] == stored.score
    folder = checkpoint.export(stored, tmp_path / "exported")
    assert checkpoint.load(folder).evaluation == stored.evaluation


def test_a_damaged_checkpoint_costs_one_interval_only(corpus: Corpus, tmp_path: Path) -> None:
    config = tiny_config("hybrid", steps=30)
    run(config, corpus, World(), tmp_path / "whole")
    run(config, corpus, World(), tmp_path / "hurt", stop_at=20)
    weights = tmp_path / "hurt" / "step-00000020" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    run(config, corpus, World(), tmp_path / "hurt")
    whole, hurt = final(tmp_path / "whole"), final(tmp_path / "hurt")
    assert all(torch.equal(tensor, hurt.tensors("model")[name]) for name, tensor in whole.tensors("model").items())


@pytest.fixture
def misleading(tmp_path: Path) -> Corpus:
    """A corpus whose training text makes a model worse at the validation text with every step."""
    with CorpusWriter(tmp_path / "misleading", name="misleading", source="tests") as writer:
        for number in range(100):
            writer.add("train", b"a" * 100)
            writer.add("valid", bytes(range(97 + number % 10, 107 + number % 10)) * 10)
    return Corpus.open(tmp_path / "misleading")


def test_the_best_checkpoint_is_kept(misleading: Corpus, tmp_path: Path) -> None:
    config = tiny_config("byte_lstm", steps=60)
    records = run(config, misleading, World(), tmp_path / "run").records
    bounds = {step: metrics["valid/bound"] for step, metrics in records.items() if "valid/bound" in metrics}
    best = checkpoint.best(open_storage(tmp_path / "run"))
    assert best is not None
    assert best.step == min(bounds, key=bounds.__getitem__) < 60
    assert best.score == pytest.approx(min(bounds.values()))


def test_a_loss_that_is_not_finite_ends_the_run(corpus: Corpus, tmp_path: Path) -> None:
    config = tiny_config("byte_lstm", optimizer=OptimizerConfig(learning_rate=1e39))
    with pytest.raises(FloatingPointError, match=r"^9 steps in a row had a loss or gradients not finite at step 10"):
        run(config, corpus, World(), tmp_path)


def test_training_goes_on_while_the_storage_is_away(misleading: Corpus, tmp_path: Path) -> None:
    """The first evaluation is the best, so its checkpoint has to wait beside the newest."""
    corpus = misleading
    config = tiny_config("byte_lstm", steps=80, checkpoint_every=5)
    whole = run(config, corpus, World(), tmp_path / "whole")
    away = threading.Event()
    there: list[checkpoint.Checkpoint | None] = []

    class Observer(Recorder):
        def evaluated(self, step: int, metrics: dict[str, float]) -> None:
            if step == 70:
                there.append(checkpoint.latest(open_storage(tmp_path / "away")))
                away.clear()

    away.set()
    observer = Observer()
    train(config, corpus, World(), Away(tmp_path / "away", away), observer)
    assert there == [None]  # 70 steps were taken with nothing saved
    ended, undisturbed = final(tmp_path / "away"), final(tmp_path / "whole")
    assert ended.step == undisturbed.step == 80
    for name, tensor in undisturbed.tensors("model").items():
        assert torch.equal(tensor, ended.tensors("model")[name])
    best = checkpoint.best(open_storage(tmp_path / "away"))
    assert best is not None
    assert best.step == ended.state["best_step"] == undisturbed.state["best_step"] < 70
    assert sorted(observer.records) == sorted(whole.records)


def test_bfloat16_changes_the_bound_by_less_than_half_a_percent(corpus: Corpus, tmp_path: Path) -> None:
    bounds = []
    for precision in ("float32", "bfloat16"):
        config = tiny_config("hybrid", steps=50, evaluate_every=50, precision=precision)
        run(config, corpus, World(), tmp_path / precision)
        bounds.append(final(tmp_path / precision).state["best"]["bound"])
    assert bounds[1] == pytest.approx(bounds[0], rel=0.005)


@pytest.mark.slow
def test_torchrun_runs_the_same_loop(corpus: Corpus, tmp_path: Path) -> None:
    config = tiny_config("hybrid")
    run(config, corpus, World(), tmp_path / "here")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(to_dict(config)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "-m", "raytrain.loop"]
    done = subprocess.run(
        [*command, str(file), "--corpus", str(corpus.path), "--storage", str(tmp_path / "there")],
        capture_output=True, text=True, timeout=120, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    here = final(tmp_path / "here")
    assert json.loads(done.stdout.strip().splitlines()[-1])["best"]["bound"] == pytest.approx(
        here.state["best"]["bound"], rel=1e-6
    )


@pytest.mark.slow
def test_of_the_processes_of_torchrun_one_learns_the_vocabulary(corpus: Corpus, tmp_path: Path) -> None:
    shutil.copytree(corpus.path, tmp_path / "mine", ignore=shutil.ignore_patterns("vocabulary*"))
    (tmp_path / "counts_learning.py").write_text(
        "import os\nfrom raytrain.data import pieces\nlearn = pieces.learn\n"
        "def counted(train, name):\n"
        f"    open(f'{tmp_path}/learnt-{{os.getpid()}}', 'a').write(name)\n    return learn(train, name)\n"
        "pieces.learn = counted\n"
    )
    file = tmp_path / "config.json"
    file.write_text(json.dumps(to_dict(tiny_config("byte_lstm", vocabulary="bpe:280", steps=2))))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "raytrain.loop"]
    subprocess.run(
        [*command, str(file), "--corpus", str(tmp_path / "mine"), "--storage", str(tmp_path / "there")],
        capture_output=True, text=True, timeout=120, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "RAYTRAIN_PLUGINS": "counts_learning", "PYTHONPATH": os.pathsep.join(
            [str(tmp_path), str(Path.cwd())]
        )},
    )  # fmt: skip
    assert [path.read_text() for path in tmp_path.glob("learnt-*")] == ["bpe:280"]


def test_the_loop_needs_no_ray_and_no_mlflow() -> None:
    forbidden = "ray", "mlflow", "optuna", "tyro", "rich", "boto3", "pyarrow", "matplotlib"
    code = f"import sys, raytrain.loop; print([name for name in {forbidden!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_a_trained_model_comes_near_the_limit_and_never_below_it(tmp_path: Path) -> None:
    """Fair coin flips of two bytes, 6 to a document: 1 bit per byte, and nothing to learn beyond it."""
    generator = torch.Generator().manual_seed(0)
    with CorpusWriter(tmp_path / "coins", name="coins", source="test") as writer:
        for split, num in (("train", 4000), ("valid", 1000)):
            for row in torch.randint(2, (num, 6), generator=generator):
                writer.add(split, bytes((row + ord("a")).tolist()))  # type: ignore[arg-type]
    config = replace(
        tiny_config("byte_lstm", sampling="documents", length=7, steps=300, evaluate_every=300, evaluate_samples=1000),
        model=ByteLstmConfig(layers=1, hidden=32, dropout=0.0),
        objective=ObjectiveConfig(),
        optimizer=OptimizerConfig(learning_rate=2e-2),
    )
    run(config, Corpus.open(tmp_path / "coins"), World(), tmp_path / "run")
    bits = final(tmp_path / "run").state["best"]["bits_per_byte"]
    # the length is fixed, so STOP costs nothing: the limit is the coins' 1 bit
    assert 1.0 <= bits < 1.05

"""Twelve trials of two workers on two CPUs, some of which are stopped, raise, die or diverge; nothing may be left.

python -m tests.faults.stress --repeat 10
python -m tests.faults.stress --repeat 10 --second-instance
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import psutil

from raytrain.runs.trials import Trial, TrialStore
from raytrain.storage.local import FolderStorage
from tests.faults.scripted import ENDS, SCRIPT, SPACE, STEPS
from tests.support.ray_instance import assert_nothing_left, ray_instance

LIMIT_S = 1800
"""A search that takes longer hangs; alone on the machine it takes a tenth of that."""
ARGUMENTS = (
    f"hybrid --model.feature-maps 8 16 --model.decoder-maps 16 8 --model.latent 4 --model.hidden 16 --length 16 "
    f"--batch-size 32 --steps {STEPS} --log-every 2 --evaluate-every 2 --evaluate-samples 32 "
    f"--checkpoint-every {STEPS} --precision float32 --data text.txt --space space.py --algorithm random "
    f"--name s --num-samples {len(SCRIPT)} --workers-per-trial 2 --cpus-per-worker 0.5"
).split()  # fmt: skip
SECOND = "import ray, time; ray.init(address='local', num_cpus=1, include_dashboard=True); print('up', flush=True)"


@contextmanager
def second_instance() -> Iterator[None]:
    """Another Ray instance on the same machine, of another process."""
    code = f"{SECOND}\nwhile True: time.sleep(1)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            while (line := process.stdout.readline()) != "up\n":
                assert line, "the second instance did not start"
            yield
        finally:
            process.terminate()
            process.wait(60)


def search(address: str, home: Path) -> float:
    """Run the scripted search in ``home`` and check how each trial ended and what is left; returns its seconds."""
    lines = (f"line {number} of a text that says {number * 7919 % 1000} in words\n" for number in range(2000))
    (home / "text.txt").write_text("".join(lines))
    (home / "space.py").write_text(SPACE)
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "RAY_ADDRESS": address, "PYTHONPATH": root}
    environment.pop("MLFLOW_TRACKING_URI", None)
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.scripted", *ARGUMENTS],
        cwd=home, capture_output=True, text=True, timeout=LIMIT_S, check=False, env=environment,
    )  # fmt: skip
    seconds = time.monotonic() - started
    said = done.stdout[-5000:] + done.stderr[-3000:]
    assert done.returncode == 0, said
    assert "concurrent trials: 2" in done.stdout, said
    trials = TrialStore(FolderStorage(home / "runs" / "s")).read()
    assert len(trials) == len(SCRIPT), said
    wrong = [line for trial in trials if (line := difference(trial))]
    assert not wrong, "\n".join(wrong)
    check_mlflow(home, trials)
    assert_nothing_left(address)
    assert not processes()
    return seconds


def difference(trial: Trial) -> str:
    """What is not as the script says, in words; empty if all is."""
    status, step, reason = ENDS[SCRIPT[trial.number]]
    if trial.status == status and trial.step == step and reason in trial.reason:
        return ""
    return f"{trial.name} ({SCRIPT[trial.number]}) is {trial.status} at {trial.step}: {trial.reason!r}"


def check_mlflow(home: Path, trials: list[Trial]) -> None:
    """One run of each trial, ended as the trial has."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    ends = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED", "early_stopped": "KILLED"}
    experiment = client.get_experiment_by_name("raytrain")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    children: dict[str, Any] = {run.info.run_id: run for run in runs if "mlflow.parentRunId" in run.data.tags}
    assert children.keys() == {trial.run["run_id"] for trial in trials}
    assert all(children[trial.run["run_id"]].info.status == ends[trial.status] for trial in trials)


def processes() -> list[str]:
    """Ray's processes below this one that work on something."""
    idle = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::_AutoscalingCoordinator")
    lines = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # one that has ended meanwhile
            lines.append(" ".join(process.cmdline()).strip())
    return [line for line in lines if line.startswith("ray::") and not line.startswith(idle)]


def main() -> None:
    """Run the search again and again on one instance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--second-instance", action="store_true", help="run another Ray instance meanwhile")
    options = parser.parse_args()
    with ray_instance() as address, second_instance() if options.second_instance else nullcontext():
        for number in range(options.repeat):
            with tempfile.TemporaryDirectory(prefix="raytrain-stress-") as home:
                seconds = search(address, Path(home))
            print(f"{number + 1} of {options.repeat}: {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()

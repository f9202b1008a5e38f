"""Configs, search spaces, and what searches and runs write down."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import yaml

import raytrain.train as train
import raytrain.tune as tune
from raytrain import report, sample
from raytrain.analysis.figures.records import read_trials
from raytrain.analysis.search_report import search_figures
from raytrain.cluster import __main__ as cluster_command
from raytrain.config.cli import read_config
from raytrain.config.schema import to_dict
from raytrain.runs.records import OUTCOME, read_outcome, read_values
from raytrain.runs.trials import TrialStore
from raytrain.search.algorithms import add_to_study, make_study
from raytrain.search.plan import read_plan
from raytrain.search.space import check_space, load_space
from raytrain.storage import lease as lease_module
from raytrain.storage import open_storage
from raytrain.tracking import __main__ as tracking_command
from tests.faults.malformed.mutate import damaged, restructured, written
from tests.faults.malformed.oracle import command
from tests.faults.malformed.stock import SPACE, TRIALS, Stock
from tests.faults.malformed.stock import config as whole_config

Act = Callable[[], None]
ROOT = Path(__file__).parents[3]
SPACES = ROOT / "search_spaces"


def config(stock: Stock, given: Path, random: Random) -> Act:
    """A config.json; if it is taken, each of its values must be what the config says."""
    path = given / "config.json"
    values = restructured(json.loads((stock.folder / "config.json").read_bytes()), random)
    data = written(values, random)
    path.write_bytes(data)
    if random.random() < 0.25:
        return command(train.main, "hybrid", "--config", str(path), "--storage", "runs")

    def act() -> None:
        agrees(to_dict(read_config(path)), json.loads(data))

    return act


def agrees(found: Any, told: Any) -> None:
    """Every member of ``told`` is in ``found``."""
    if isinstance(told, dict):
        for name, value in told.items():
            agrees(found[name], value)
    elif isinstance(told, list):
        assert len(found) == len(told)
        for one, other in zip(found, told, strict=True):
            agrees(one, other)
    else:
        assert found == told, f"{told!r} was read as {found!r}"


def space(stock: Stock, given: Path, random: Random) -> Act:
    """A search space's file; whatever is drawn from one that is taken is a config."""
    path = given / "space.py"
    names = ("low", "high", "step", "0", "-1", "10**12", "1e-12", "float('nan')", "None", "'x'", "[]",
             "raise SystemExit", "raise KeyError", "()", "{}", "1/0", "lambda: 0", "import nothing", "\\d", "print(1)",
             "yield")  # fmt: skip
    source = random.choice((SPACE, *(file.read_text() for file in sorted(SPACES.glob("*.py")))))
    for _ in range(random.randint(1, 2)):
        tokens = source.split(" ")
        tokens[random.randrange(len(tokens))] = random.choice((*names, random.choice(tokens)))
        source = " ".join(tokens)
    data = source.encode() if random.random() < 0.7 else damaged(source.encode(), random)
    path.write_bytes(data)
    algorithm: Any = random.choice(("tpe", "random", "grid"))
    if random.random() < 0.4:
        arguments = ("--algorithm", algorithm, "--data", str(stock.corpus), "--storage", "runs")
        return command(tune.main, "hybrid", "--space", str(path), *arguments)

    def act() -> None:
        loaded = load_space(str(path))
        points = check_space(loaded, {"hybrid": whole_config()}, loaded.budget(None), algorithm, 0)
        assert points
        assert all(to_dict(point)["model"]["name"] == "hybrid" for point in points)

    return act


def plan(stock: Stock, given: Path, random: Random) -> Act:
    """A search's ``search.json``."""
    shutil.copytree(stock.runs / "search", given / "search")
    path = given / "search" / "search.json"
    values = json.loads(path.read_bytes())
    path.write_bytes(written(restructured(values, random), random))
    match random.randrange(5):
        case 0:
            return lambda: none_or(read_values(open_storage(given / "search")))
        case 1:
            return lambda: none_or(read_plan(open_storage(given / "search")))
        case 2:
            return command(sample.main, str(given / "search"), "--num", "1")
        case 3:
            return command(train.main, "--best-of", "search", "--storage", str(given))
    return command(tune.main, "--resume", "search", "--storage", str(given))


def none_or(value: object) -> None:
    assert value is not None


def trial(stock: Stock, given: Path, random: Random) -> Act:
    """The record of a trial."""
    shutil.copytree(stock.runs / "search", given / "search")
    path = given / "search" / "trials" / random.choice(TRIALS) / "trial.json"
    before = json.loads(path.read_bytes())
    path.write_bytes(written(restructured(before, random), random))
    match random.randrange(4):
        case 0:
            return command(sample.main, str(given / "search"), "--num", "1")
        case 1:
            return command(train.main, "--best-of", "search", "--storage", str(given))
    known = read_plan(open_storage(given / "search"))
    assert known is not None

    def act() -> None:
        read = TrialStore(open_storage(given / "search")).read()
        assert len(read) == 2
        study = make_study(known, len(read))
        for item in read:
            add_to_study(study, item, known.search_objective)
        assert all(math.isfinite(item.number) and to_dict(item.config) for item in read)
        assert all(item.from_json(item.to_json()).to_json() == item.to_json() for item in read)

    return act


def lease(stock: Stock, given: Path, random: Random) -> Act:
    """The lease of the driver of a search or run: this process, until it is altered."""
    path = given / lease_module.LEASES / "00000001.json"
    path.parent.mkdir()
    path.write_bytes(written(restructured(asdict(lease_module.Holder.here()), random), random))

    def act() -> None:
        lease_module.TAKEOVER_S = 0.01
        assert lease_module.find_free(open_storage(given), "it") == 1

    return act


def claim(stock: Stock, given: Path, random: Random) -> Act:
    """What says whose a name is: a run's ``run.json``."""
    (given / "run").mkdir()
    path = given / "run" / "run.json"
    path.write_bytes(written(restructured(json.loads((stock.runs / "run" / "run.json").read_bytes()), random), random))
    return command(train.main, "--resume", "run", "--storage", str(given))


def outcome(stock: Stock, given: Path, random: Random) -> Act:
    """What a run says at its end: ``outcome.json``."""
    figures = {"bound": 30.0, "bits_per_byte": 3.0, "reconstruction": 29.0, "kl": 1.0, "active_units": 1.0}
    trained: dict[str, Any] = {"step": 20, "best_step": 20, "best": figures, "precision": "float32", "device": "cpu"}
    whole = random.choice(
        (
            {**trained, "unsent": 2, "samples": ["a", "b"]},
            {"error": "so", "unsent": 0},
            {"early_stopped": "so", "unsent": 0},
        )
    )
    data = written(restructured(whole, random), random)
    (given / OUTCOME).write_bytes(data)

    def act() -> None:
        found = read_outcome(str(given))
        assert found is not None
        assert repr(found) == repr(json.loads(data))
        assert {"error", "early_stopped"} & found.keys() or f"{found['best']['kl']:.2f} {found['best_step']:d}"

    return act


MANY = ", ".join(f"&{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in itertools.pairwise("abcdefghij"))
YAML = (
    "2024-13-45", "2024-01-01", "&a [*a]", "&a {b: *a}", "1" * 5000, "0o7", "{1: 2}", "{on: 2}", "{? [a]: 2}", "=", "@",
    "{a: 1, a: 2}", "!!python/object/apply:os.getcwd []", "!!binary x", "!!set {a, b}", ".nan", "-.inf", "~", "*nobody",
    "|", "{<<: 1}", "{<<: [{1: 2}]}", '"\\0"', '"~\\0/x"', "[" * 3000, f"[&a [x], {MANY}]",
)  # fmt: skip
"""What YAML makes of a few words."""


def cluster_file(stock: Stock, given: Path, random: Random) -> Act:
    """A file for ``ray up``: each of its mistakes is a line."""
    source = random.choice((ROOT / "cluster.yaml", ROOT / "docs" / "onprem.yaml")).read_text()
    data = source.replace("CHANGE-ME", random.choice(("bucket", "10.0.0.1"))).encode()
    match random.randrange(4):
        case 0:
            data = damaged(data, random)
        case 1:
            values = [match.start() for match in re.finditer(rb"(?<=: )\S", data)]
            location = random.choice(values)
            data = data[:location] + random.choice(YAML).encode() + b"\n" + data[location:].partition(b"\n")[2]
        case _:
            data = yaml.safe_dump(restructured(yaml.safe_load(data), random)).encode("utf-8", "surrogatepass")
    path = given / "cluster.yaml"
    path.write_bytes(data)
    for name in ("raytrain", "search_spaces", "pyproject.toml", "README.md", "LICENSE", "cluster-requirements.txt"):
        (given.parent / "work" / name).symlink_to(ROOT / name)
    token = Path.home() / ".ray" / "auth_token"
    token.parent.mkdir(parents=True, exist_ok=True)
    token.touch(0o600)
    return command(lambda: cluster_command.main(["check", str(path)]))


def unsent(stock: Stock, given: Path, random: Random) -> Act:
    """Metrics that were not sent."""
    run_id = (stock.folder / "run_id").read_text()
    records: list[Any] = [
        {"run_id": run_id, "step": step, "timestamp_ms": 1_700_000_000_000 + step, "metrics": {"a": 1.5, "b": "nan"}}
        for step in range(4)
    ]
    location = random.randrange(len(records))
    records[location] = restructured(records[location], random)
    data = b"".join(json.dumps(item).encode() + b"\n" for item in records)
    path = given / "unsent_metrics.jsonl"
    path.write_bytes(data if random.random() < 0.6 else damaged(data, random))
    arguments = random.choice(((), (), ("--timeout", random.choice(("-1", "nan", "1e400", "x")))))
    return command(lambda: tracking_command.main(["send", str(path), *arguments]))


def trials_table(stock: Stock, given: Path, random: Random) -> Act:
    """The table of a search's trials, from which its report is drawn."""
    import pyarrow
    import pyarrow.parquet

    path = given / "trials.parquet"
    shutil.copyfile(stock.folder / "trials.parquet", path)
    if random.random() < 0.5:
        path.write_bytes(damaged(path.read_bytes(), random))
    else:
        table = pyarrow.parquet.read_table(path)
        column = random.randrange(table.num_columns)
        name = table.column_names[column]
        values = random.choice((["x", "y"], [None, None], [1.5, float("nan")], [[1], [2]], [2**62, -5], [b"\xff", b""]))
        table = table.remove_column(column)
        pyarrow.parquet.write_table(table.append_column(name, [values]) if random.random() < 0.8 else table, path)
    draw = random.random() < 0.15

    def act() -> None:
        rows = read_trials(path)
        assert all(isinstance(row.number, int) and isinstance(row.bits_per_byte, float) for row in rows)
        if draw:
            search_figures(rows, {})

    return act


def report_of(stock: Stock, given: Path, random: Random) -> Act:
    """A report of a search or experiment that is not there."""
    words = ("search", "paper_fig4", "run", "bios", "raytrain", "x", "", "--experiment", "--output", "'", "[red]", "é")
    return command(report.main, *(random.choice(words) for _ in range(random.randint(0, 4))))

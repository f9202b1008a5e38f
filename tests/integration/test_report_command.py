"""python -m raytrain.report on a real store: what it draws, writes and logs, and what it refuses."""

from __future__ import annotations

import base64
import io
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from raytrain import report
from raytrain.analysis.figures.records import Record
from raytrain.analysis.paper_report import collect, find_searches, record_table
from raytrain.analysis.run_report import interpolation_table, portray, properties
from raytrain.analysis.search_report import CONFIRMATION, LADDER, write_search_report
from raytrain.config.schema import RunConfig, flatten, override, to_dict
from raytrain.data.batches import EvaluationBatches
from raytrain.data.corpus import Corpus
from raytrain.data.vocabulary import STOP
from raytrain.metrics import METRIC
from raytrain.models import build
from raytrain.models.ladder import Ladder
from raytrain.runs.records import write_run_address
from raytrain.runs.trained_model import load
from raytrain.storage import open_storage
from raytrain.tracking.metric_writer import MetricWriter
from raytrain.tracking.queries import CONFIRMS, children, find_search, history
from raytrain.tracking.runs import Experiment, Run
from raytrain.training.loop import train
from raytrain.training.trainer import World
from raytrain.utils.errors import run_command
from raytrain.utils.text import cell, table
from tests.conftest import tiny_config
from tests.support.mlflow_server import new_store
from tests.support.refusal import refusal

PAGES = [
    *("best_so_far", "learning_curves", "code_curves", "bound_against_use", "importance", "parallel_coordinates"),
    *("annealing", "top_trials"),
]


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    """An empty experiment in the store that MLFLOW_TRACKING_URI names; the working directory is empty, too."""
    uri = new_store(tmp_path / "store")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("RAYTRAIN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return Experiment.open(uri, "raytrain", str(tmp_path / "artifacts"))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command; returns what it prints."""

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["raytrain.report", *words])
        run_command(report.main)
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command, which must be refused; returns its one line."""

    def run(*words: str) -> str:
        return refusal(report.main, words, monkeypatch, capsys)

    return run


def fake_search(
    experiment: Experiment,
    name: str,
    trials: Sequence[tuple[RunConfig[Any], float, float]],
    *,
    space: str = "hybrid",
    corpus: str = "c" * 64,
    with_table: bool = True,
) -> Run:
    """A search in the store: (config, bits per byte, KL) of each trial; NaN is one that was never evaluated."""
    parent = experiment.open_run(
        f"search-{name}", name, parameters={}, tags={"kind": "search", "space": space, "corpus": corpus}
    )
    rows = []
    for number, (config, bits, kl) in enumerate(trials):
        trial = experiment.open_run(
            f"trial-{number}",
            f"{name}-{number:03}",
            parent=parent.run_id,
            parameters=flatten(config),
            tags={"kind": "trial", "corpus": corpus},
        )
        bound = bits * config.length * math.log(2)
        if math.isfinite(bits):
            writer = MetricWriter(trial.uri, trial.run_id)
            for step in (config.steps // 2, config.steps):
                figures = {"bits_per_byte": bits, "bound": bound, "kl": kl, "reconstruction": bound - kl}
                metrics = {
                    f"valid/{key}": value * 2 * config.steps / (config.steps + step) for key, value in figures.items()
                }
                writer.log(step, metrics | {"train/reconstruction": bound})
            assert writer.close() == 0
            trial.log_text("".join(f"sample {location} of {name}-{number}\n" for location in range(12)), "samples.txt")
        status = "finished" if math.isfinite(bits) else "failed"
        trial.finish("FINISHED" if status == "finished" else "FAILED")
        rows.append(
            {
                "number": number,
                "name": f"{number:03}",
                "run_id": trial.run_id,
                "status": status,
                "reason": "" if status == "finished" else "<the worker died>",
                "step": config.steps,
                "steps": config.steps,
                "seconds": 5.0,
                "started_at": 1e9 + number,
                "ended_at": 1e9 + 5 + number,
                **dict.fromkeys(("bits_per_byte",), bits if math.isfinite(bits) else None),
                "bound": bound,
                "reconstruction": bound - kl,
                "kl": kl,
                "active_units": 3.0,
                "param/alpha": config.objective.alpha,
                "model": config.model_name,
                "length": config.length,
            }
        )
    if with_table:
        file = experiment_folder(experiment) / "trials.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        parent.log_file(file)
    return parent


def experiment_folder(experiment: Experiment) -> Path:
    return Path(experiment.uri.removeprefix("sqlite:///")).parent


def artifacts(run: Run, folder: str) -> set[str]:
    return {entry.path.removeprefix(f"{folder}/") for entry in MlflowClient(run.uri).list_artifacts(run.run_id, folder)}


def some_trials(num: int = 10) -> list[tuple[RunConfig[Any], float, float]]:
    return [
        (override(tiny_config("hybrid"), {"objective.alpha": number / 10}), 2.5 - number / 20, float(number))
        for number in range(num)
    ]


# ------------------------------------------------------------------------------------------- search


def test_the_report_of_a_search_is_one_page_that_needs_no_network(
    experiment: Experiment, command: Callable[..., str]
) -> None:
    parent = fake_search(experiment, "one", [*some_trials(), (tiny_config("hybrid"), math.nan, math.nan)])
    output = command("search", "one")
    folder = Path("report-one")
    assert {path.name for path in folder.iterdir()} == {*(f"{name}.png" for name in PAGES), "report.html"}
    assert artifacts(parent, "report") == {path.name for path in folder.iterdir()}
    assert parent.ui_hint() in output
    page = (folder / "report.html").read_text()
    assert not re.search(r"https?:|<script|<link|@import|url\(", page)
    images = [base64.b64decode(data) for data in re.findall(r"src='data:image/png;base64,([^']+)'", page)]
    assert images == [(folder / f"{name}.png").read_bytes() for name in PAGES]
    for data in images:
        low, high = Image.open(io.BytesIO(data)).convert("L").getextrema()
        assert low != high
    assert "Best: trial 009 with negative ELBO 2.050 bits/byte" in page
    assert "11 trials (10 finished, 1 failed)" in page
    assert "&lt;the worker died&gt;" in page
    assert "collapsed:" not in page


def test_the_page_warns_of_a_collapsed_winner(experiment: Experiment, tmp_path: Path) -> None:
    parent = fake_search(
        experiment, "one", [(tiny_config("hybrid"), 2.0, 0.01), (tiny_config("hybrid", seed=1), 2.2, 4)]
    )
    *_, page = write_search_report(parent, tmp_path / "report")
    assert "posterior has collapsed" in page.read_text()


def test_the_page_holds_the_winner_against_counting(
    experiment: Experiment, tmp_path: Path, refused: Callable[..., str]
) -> None:
    parent = fake_search(experiment, "one", some_trials(1))
    ladder = Ladder((5.0, 4.0, 3.0, 2.0, 2.1, 2.2, 2.3, 2.4), 9, 9, 0.5)
    *_, page = write_search_report(parent, tmp_path / "before")
    assert "counting" not in page.read_text()
    parent.set_tags({LADDER: json.dumps(asdict(ladder))})
    *_, page = write_search_report(parent, tmp_path / "report")
    text = page.read_text()
    assert "<p>Compared with counting: model 2.500, byte 4-gram 2.000, entropy 0.500 bits per byte.</p>" in text
    warning = "The best trial&#x27;s model has learnt less than counting: it needs 25.0% more than a byte 4-gram."
    assert f"<p class='warning'>{warning}</p>" in text
    parent.set_tags({LADDER: "[]"})
    assert "search one: its tag raytrain.ladder is not a ladder: it must be an object" in refused("search", "one")


CONFIRMED = {"searched": 2.4, "held": 2, "seeds": [1000, 1001], "mean": 2.45, "spread": 0.0707, "values": [2.4, 2.5]}


def test_the_report_shows_how_far_the_mean_of_a_confirmed_config_may_be_off(
    experiment: Experiment, tmp_path: Path, refused: Callable[..., str]
) -> None:
    parent = fake_search(experiment, "one", some_trials(1))
    configs = [
        {"trial": "000", "interval": [1.815, 3.085], **CONFIRMED},
        {"trial": "001", "interval": None, **CONFIRMED},
    ]
    values = {"sentence": "trial 000 before trial 001", "winner": "000", "metric": METRIC, "configs": configs}
    parent.log_dict(values, CONFIRMATION)
    first, *_, page = write_search_report(parent, tmp_path / "report")
    assert first.name == "confirmation.png"
    text = page.read_text()
    assert "alt='Confirmation, drawn'" in text
    assert "<td>000</td><td>2.400</td><td>2.450</td><td>1.815 to 3.085</td><td>0.071</td><td>2 of 2</td>" in text
    assert "<td>001</td><td>2.400</td><td>2.450</td><td>-</td>" in text
    configs[0]["interval"] = [1.0]
    parent.log_dict(values, CONFIRMATION)
    assert "not the confirmation of a search: configs.interval has no two ends" in refused("search", "one")
    del configs[0]["interval"]
    parent.log_dict(values, CONFIRMATION)
    assert "not the confirmation of a search: configs has no interval" in refused("search", "one")


@pytest.mark.parametrize(
    "trials", [[], [(tiny_config("hybrid"), 2.0, 1.0)], [(tiny_config("hybrid"), math.nan, math.nan)] * 2]
)
def test_a_poor_search_has_a_report_too(
    experiment: Experiment, tmp_path: Path, trials: list[tuple[RunConfig[Any], float, float]]
) -> None:
    # the table of a search without trials has no columns
    paths = write_search_report(fake_search(experiment, "poor", trials), tmp_path / "report")
    assert [path.stem for path in paths] == [*PAGES, "report"]
    assert all(path.stat().st_size > 1000 for path in paths)
    assert ("No trial has been evaluated." in paths[-1].read_text()) == (len(trials) != 1)


def test_the_newest_search_of_a_name_is_drawn_and_others_are_named(
    experiment: Experiment, capsys: pytest.CaptureFixture[str]
) -> None:
    first, last = (
        experiment.open_run(identity, "same", parameters={}, tags={"kind": "search", "location": f"/{identity}/same"})
        for identity in ("a", "b")
    )
    experiment.open_run("c", "same", parameters={}, tags={"kind": "trial"})
    assert find_search(experiment.uri, "raytrain", "same").run == last
    assert capsys.readouterr().out == (
        "note: 2 searches are called same: this is the newest, in /b/same; name an earlier one by its run id: "
        f"{first.run_id} in /a/same\n"
    )
    assert find_search(experiment.uri, "raytrain", first.run_id).run == first
    assert capsys.readouterr().out == ""


def test_children_come_with_all_that_is_known_of_them(experiment: Experiment) -> None:
    parent = fake_search(experiment, "one", some_trials(2))
    fake_search(experiment, "two", some_trials(1))
    first, second = children(parent)
    assert (first.name, second.name) == ("one-000", "one-001")
    assert first.status == "FINISHED"
    assert second.parameters["objective.alpha"] == "0.1"
    assert second.tags["raytrain.kind"] == "trial"
    assert second.metrics["valid/bits_per_byte"] == pytest.approx(2.45)
    assert history(second.run, "valid/bits_per_byte") == [(10, pytest.approx(2.45 * 4 / 3)), (20, pytest.approx(2.45))]
    assert history(second.run, "no/such") == []


# ---------------------------------------------------------------------------------------- the paper


def grid(model: str, lengths: Sequence[int], kl: float, **changes: Any) -> list[tuple[RunConfig[Any], float, float]]:
    return [(tiny_config(model, length=length, **changes), 2.0, kl) for length in lengths]


def test_a_figure_of_the_paper_is_drawn_from_the_newest_search_of_its_space(
    experiment: Experiment, command: Callable[..., str]
) -> None:
    fake_search(experiment, "old", grid("hybrid", (24,), 9.0), space="paper_fig4", with_table=False)
    newest = fake_search(
        experiment,
        "new",
        grid("hybrid", (24, 48), 5.0) + grid("lstm_vae", (24, 48), 0.02),
        space="paper_fig4",
        with_table=False,
    )
    output = command("paper_fig4", "--experiment", "raytrain")
    assert "drawn from new\n" in output
    files = {path.name for path in Path("report").iterdir()}
    assert files == {"paper_fig4.png", "paper_fig4.svg", "paper_fig4_samples.md", "paper_fig4_table.md"}
    assert artifacts(newest, "report") == files
    samples = Path("report/paper_fig4_samples.md").read_text()
    zero, above = samples.split("### ")[1:]
    assert zero.startswith(
        "KL near zero\n\nLSTM VAE, samples of 24, alpha 0.2, linear annealing, input dropout 0: KL 0.02"
    )
    assert above.startswith("KL above zero\n\nhybrid VAE, samples of")
    assert "KL 5.00 nats" in above
    assert zero.count("| `sample") == above.count("| `sample") == 10
    assert "of new-2`" in zero
    values = Path("report/paper_fig4_table.md").read_text().splitlines()
    assert values[0] == "| model | length | seeds | bits per byte | reconstruction, nats | KL, nats | used, nats |"
    assert "| hybrid | 48 | 1 | 2.000 | 61.5 | 5.00 | |" in [line.replace("  ", " ") for line in values]


def test_older_searches_add_only_the_models_that_are_missing(experiment: Experiment) -> None:
    for name, model, changes in (
        ("elsewhere", "byte_lstm", {}),
        ("short", "byte_lstm", {"steps": 10}),
        ("language", "byte_lstm", {}),
        ("older", "hybrid", {}),
        ("newest", "hybrid", {}),
    ):
        corpus = "d" * 64 if name == "elsewhere" else "c" * 64
        trials = grid(model, (24,), 0.0 if model == "byte_lstm" else 3.0, **changes)
        fake_search(experiment, name, trials, space="paper_fig4", corpus=corpus, with_table=False)
    found = find_searches(experiment.uri, "raytrain", "paper_fig4")
    assert [search.name for search in found] == ["newest", "older", "language", "short"]
    collected = collect(found, "paper_fig4", everything=False)
    assert [search.name for search in collected.searches] == ["newest", "language"]
    assert [one.model for one in collected.records] == ["hybrid", "byte_lstm"]
    named = find_searches(experiment.uri, "raytrain", "paper_fig4", ["older", "newest"])
    assert len(collect(named, "paper_fig4", everything=True).records) == 2


def test_the_table_of_a_figure_has_the_mean_and_the_range_over_seeds() -> None:
    told = {"model": "hybrid", "length": 60, "alpha": 0.2, "reconstruction": 80.0, "kl": 4.0}
    records = [Record(**told, bits_per_byte=bits, used=2.5, seed=seed) for seed, bits in enumerate((2.0, 2.2, 2.1))]
    other = Record(**told | {"alpha": 0.5}, bits_per_byte=1.9, receptive_field=4)
    head, _, *rows = record_table([*records, other]).splitlines()
    assert head.startswith("| alpha | receptive field | seeds | bits per byte |")
    assert rows == [
        "| 0.2 | all | 3 | 2.100 (2.000 to 2.200) | 80.0 (80.0 to 80.0) | 4.00 (4.00 to 4.00) | 2.50 (2.50 to 2.50) |",
        "| 0.5 | 4 | 1 | 1.900 | 80.0 | 4.00 |  |",
    ]


def test_a_trial_that_confirms_is_in_no_figure_of_the_paper(experiment: Experiment) -> None:
    configs = [tiny_config("hybrid", seed=seed) for seed in (0, 1000)]
    parent = fake_search(experiment, "one", [(config, 2.0, 5.0) for config in configs], with_table=False)
    found = [find_search(experiment.uri, "raytrain", "one")]
    assert [record.seed for record in collect(found, "paper_fig4", everything=True).records] == [0, 1000]
    children(parent)[1].run.set_tags({CONFIRMS: "0"})
    assert [record.seed for record in collect(found, "paper_fig4", everything=True).records] == [0]


def test_records_hold_what_the_figures_compare(experiment: Experiment) -> None:
    config = override(
        tiny_config("hybrid", length=48, seed=3),
        {
            "objective.alpha": 0.5,
            "objective.annealing": "constant",
            "objective.input_dropout": 0.1,
            "model.decoder": "bytenet",
            "model.decoder_layers": 5,
        },
    )
    parent = fake_search(experiment, "one", [(config, 2.0, 5.0), (config, math.nan, math.nan)], with_table=False)
    found = [find_search(experiment.uri, "raytrain", "one")]
    (record,) = collect(found, "paper_fig3", everything=True).records
    bound = 2.0 * 48 * math.log(2)
    assert (record.model, record.length, record.alpha, record.annealing) == ("hybrid", 48, 0.5, "constant")
    assert (record.input_dropout, record.receptive_field, record.seed) == (0.1, 6, 3)
    assert (record.step, record.steps) == (20, 20)
    assert (record.kl, record.bound, record.bits_per_byte) == pytest.approx((5.0, bound, 2.0))
    assert record.curve == [(10, pytest.approx(bound)), (20, pytest.approx(bound))]
    assert record.bits(bound) == pytest.approx(2.0)
    assert record.run_id == children(parent)[0].run.run_id


@pytest.mark.parametrize("figure", report.PAPER)
def test_every_figure_of_the_paper_has_its_command(
    experiment: Experiment, command: Callable[..., str], figure: str
) -> None:
    fake_search(experiment, "mine", grid("hybrid", (24,), 3.0), with_table=False)
    command(figure, "--search", "mine", "--output", "docs/pictures")
    assert Image.open(f"docs/pictures/{figure}.png").size[0] > 500
    assert Path(f"docs/pictures/{figure}.svg").exists()
    samples = Path(f"docs/pictures/{figure}_samples.md").read_text()
    assert "no trial of this figure has a KL below 0.1" in samples


# -------------------------------------------------------------------------------------- one run


class Reporting:
    """A report of a loop that goes to MLflow, as a worker's does."""

    def __init__(self, run: Run) -> None:
        self.writer = MetricWriter(run.uri, run.run_id)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.writer.log(step, metrics)

    def pending(self) -> list[Any]:
        return []

    def replay(self, records: list[Any]) -> None: ...

    def resumed(self, evaluations: list[dict[str, float]]) -> None: ...

    def evaluated(self, step: int, metrics: dict[str, float]) -> None: ...

    def preemption_notice(self) -> bool:
        return False


def trained(experiment: Experiment, corpus: Corpus, folder: Path, model: str) -> tuple[Run, Path]:
    """A run of a tiny model on documents, with its checkpoints under ``folder``."""
    config = tiny_config(model, sampling="documents", length=64, data=str(corpus.path))
    run = experiment.open_run("own", model, parameters=flatten(config), config=to_dict(config), tags={})
    location = open_storage(folder)
    write_run_address(location, run)
    reporting = Reporting(run)
    train(config, corpus, World(), location.child("checkpoints"), reporting)
    assert reporting.writer.close() == 0
    return run, folder / "checkpoints" / "step-00000020"


@pytest.mark.slow
def test_the_report_of_a_run_is_written_beside_its_checkpoints(
    experiment: Experiment, corpus: Corpus, tmp_path: Path, command: Callable[..., str]
) -> None:
    run, checkpoint = trained(experiment, corpus, tmp_path / "runs" / "mine", "hybrid")
    output = command("run", str(checkpoint))
    folder = tmp_path / "runs" / "mine" / "figures"
    names = {"losses", "bits_by_position", "kl_by_dimension", "latent_space"}
    files = {f"{name}.{form}" for name in names for form in ("png", "svg")} | {"interpolation.md"}
    assert {path.name for path in folder.iterdir()} == files
    assert artifacts(run, "figures") == files
    assert run.ui_hint() in output


def test_a_portrait_agrees_with_the_evaluation_of_training(
    experiment: Experiment, corpus: Corpus, tmp_path: Path
) -> None:
    run, checkpoint = trained(experiment, corpus, tmp_path / "mine", "lstm_vae")
    model = load(checkpoint)
    assert model.latent > 0
    config = tiny_config("lstm_vae", sampling="documents", length=64, data=str(corpus.path))
    portrait = portray(model, config, corpus)
    valid = corpus.split("valid")
    documents = [valid.document(number) for number in valid.by_length[EvaluationBatches(valid, config, 64).positions]]
    assert portrait.texts == documents
    ((_, kl), (_, reconstruction)) = (history(run, f"valid/{name}")[-1] for name in ("kl", "reconstruction"))
    assert portrait.kl.sum() == pytest.approx(kl, rel=1e-4)
    nats = (portrait.bits * portrait.counts).sum() * math.log(2) / len(documents)
    assert nats == pytest.approx(reconstruction, rel=1e-4)
    assert portrait.counts[0] == len(documents)
    assert portrait.means.shape == (64, 8)
    for number in (0, 17, 63):
        tokens = torch.tensor([[*documents[number], STOP]])
        assert torch.from_numpy(portrait.means[number]).float().allclose(model.encode(tokens)[0][0], atol=1e-5)
    assert portrait.active.tolist() == (np.var(portrait.means, axis=0) > 0.01).tolist()


def test_a_language_model_has_no_figures_of_a_code(
    experiment: Experiment, corpus: Corpus, tmp_path: Path, command: Callable[..., str]
) -> None:
    _, checkpoint = trained(experiment, corpus, tmp_path / "mine", "byte_lstm")
    (tmp_path / "mine" / "mlflow.json").unlink()
    output = command("run", str(checkpoint), "--output", "elsewhere")
    assert "without its metrics there is no figure of the losses" in output
    assert {path.name for path in Path("elsewhere").iterdir()} == {
        "bits_by_position.png",
        "bits_by_position.svg",
    }


def test_the_table_of_bios_has_both_temperatures(
    experiment: Experiment, corpus: Corpus, tmp_path: Path, command: Callable[..., str], refused: Callable[..., str]
) -> None:
    run, checkpoint = trained(experiment, corpus, tmp_path / "mine", "byte_lstm")
    output = command("bios", str(checkpoint), "--num", "3", "--output", "bios")
    lines = Path("bios/bios.md").read_text().splitlines()
    assert "\n".join(lines) in output
    assert lines[0] == "| T = 1 | log p | T = 0.05 | log p |"
    assert len(lines) == 5
    assert artifacts(run, "figures") == {"bios.md"}
    assert "--num is 0" in refused("bios", str(checkpoint), "--num", "0")


def test_what_colours_the_latent_space_differs_over_the_texts() -> None:
    assert properties([b"hi @ann you", b"no mention@", b"a b c d e f"]) == {
        "words": [3, 2, 6],
        "has a mention": [True, False, False],
    }
    assert properties([b"short", b"longer"]) == {"length (bytes)": [5, 6]}


def test_an_interpolation_begins_and_ends_at_its_texts() -> None:
    model = build(tiny_config("hybrid")).eval()
    texts = [f"text {number}|`".encode() for number in range(6)]
    means = np.random.default_rng(0).normal(size=(6, 8))
    lines = interpolation_table(model, texts, means).splitlines()
    assert lines[2] == "|  | pair 1 | pair 2 | pair 3 |"
    rows = lines[4:]
    assert [row.split(" | ")[0] for row in rows] == [
        *("| text", "| 0.00", "| 0.17", "| 0.33", "| 0.50", "| 0.67", "| 0.83", "| 1.00", "| text")
    ]
    shown = re.findall(r"text \d", rows[0] + rows[-1])
    assert len(set(shown)) == 6  # no text twice
    assert "not two different texts" in interpolation_table(model, texts[:1] * 2, means)


def test_cells_hold_any_text() -> None:
    assert cell(b"a|b\xff\nc") == "`a\\|b  c`"
    assert cell("`x``y") == "``` `x``y ```"
    assert cell(" \n") == ""
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n"


# --------------------------------------------------------------------------------------- mistakes


def test_mistakes_have_one_line(experiment: Experiment, refused: Callable[..., str], tmp_path: Path) -> None:
    fake_search(experiment, "bare", some_trials(1), with_table=False)
    fake_search(experiment, "nothing", [(tiny_config("hybrid"), math.nan, math.nan)], space="paper_fig5")
    (tmp_path / "file").write_text("")
    for words, line in {
        (): "name a figure: python -m raytrain.report takes run, search, paper_fig3",
        ("fig4",): "unknown figure 'fig4': python -m raytrain.report takes run, search, paper_fig3",
        ("search",): "missing: name",
        ("search", "none"): "experiment raytrain has no search 'none'; its newest: nothing, bare",
        ("search", "it's"): 'has no search "it\'s"',
        ("search", "bare"): "search bare has no trials.parquet yet",
        ("search", "bare", "--experiment", "other"): "has no such experiment; it has Default, raytrain",
        ("search", "bare", "--output", str(tmp_path / "file")): "file exists",
        ("paper_fig4",): "experiment raytrain has no search of paper_fig4; run it first",
        ("paper_fig4", "--search", "none"): "has no search 'none'",
        ("paper_fig5",): "nothing: no trial has been evaluated yet",
        ("paper_fig4", "--serach", "x"): "unknown option '--serach'",
        ("run", str(tmp_path / "nowhere")): "does not exist or is empty",
        ("bios", "models:/none@champion"): "there is no models:/none@champion",
    }.items():
        assert line in refused(*words), words


def test_the_table_of_bios_is_of_a_byte_lstm(
    experiment: Experiment, corpus: Corpus, tmp_path: Path, refused: Callable[..., str]
) -> None:
    _, checkpoint = trained(experiment, corpus, tmp_path / "mine", "hybrid")
    assert "is a hybrid: the table of bios is of a language model" in refused("bios", str(checkpoint))


def test_help_needs_nothing(command: Callable[..., str]) -> None:
    output = command("--help")
    assert "python -m raytrain.report run CHECKPOINT" in output
    assert "paper_tweets" in output

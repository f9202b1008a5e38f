"""Figures: what they show of plain data, and that no data makes them fail."""

from __future__ import annotations

import io
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

from raytrain.analysis.figures import curves, paper, parallel, run, search
from raytrain.analysis.figures.confirmation import confirmation
from raytrain.analysis.figures.importance import (
    MIN_TRIALS,
    MOST_IN_SUBSET,
    MOST_TRIALS,
    SUBSETS,
    importance,
    importances,
    rebuild_study,
)
from raytrain.analysis.figures.records import Curve, Record, TrialRow, is_logarithmic, ranked, read_trials
from raytrain.analysis.figures.style import DPI, VERMILION, message, png, save, upper_limit
from raytrain.analysis.figures.tables import top_trials, trial_cells
from raytrain.analysis.search_report import objective_of, search_figures
from raytrain.config.schedules import kl_weight
from raytrain.config.schema import ObjectiveConfig
from raytrain.metrics import METRIC, pareto_front
from raytrain.models.ladder import Ladder
from raytrain.utils.errors import UserError


def row(number: int, bits: float = 2.0, kl: float = 5.0, **changes: Any) -> TrialRow:
    values: dict[str, Any] = {
        "name": f"{number:03}",
        "run_id": f"run{number}",
        "step": 100,
        "steps": 100,
        "seconds": 10.0,
        "started_at": 1000.0 + 10 * number,
        "ended_at": 1010.0 + 10 * number,
        "metrics": {"bits_per_byte": bits, "bound": bits * 44.36, "kl": kl, "active_units": 4.0},
        "model": "hybrid",
        "length": 64,
    }
    return TrialRow(number=number, **{**values, **changes})


def record(model: str = "hybrid", length: int = 60, kl: float = 5.0, bits: float = 2.0, **changes: Any) -> Record:
    bound = bits * length * math.log(2)
    return Record(
        model=model,
        length=length,
        bits_per_byte=bits,
        reconstruction=bound - kl,
        kl=kl,
        **{"step": 100, "steps": 100, **changes},
    )


def lines(figure: Figure, panel: int = 0) -> dict[str, tuple[list[float], list[float]]]:
    """The lines that a legend names, as x and y values."""
    return {
        str(line.get_label()): (list(map(float, line.get_xdata())), list(map(float, line.get_ydata())))  # type: ignore[arg-type]
        for line in figure.axes[panel].get_lines()
    }


def words(figure: Figure) -> str:
    return " ".join(text.get_text() for axes in figure.axes for text in axes.texts)


def is_blank(data: bytes) -> bool:
    low, high = Image.open(io.BytesIO(data)).convert("L").getextrema()
    return low == high  # type: ignore[no-any-return]


# -------------------------------------------------------------------------------------------- files


def test_a_saved_figure_is_an_image_of_the_figure_s_size(tmp_path: Path) -> None:
    figure = search.best_so_far([row(0), row(1, 1.9)])
    image, drawing = save(figure, tmp_path, "best")
    assert Image.open(image).size == tuple(round(inches * DPI) for inches in figure.get_size_inches())
    assert not is_blank(image.read_bytes())
    assert drawing.read_text().startswith("<?xml")
    assert "<dc:date>" not in drawing.read_text()


def test_a_figure_without_data_says_why() -> None:
    assert words(search.best_so_far([])) == search.NOTHING
    assert not is_blank(png(message("A sentence with $ signs $ in it.")))


def test_outliers_do_not_set_the_scale() -> None:
    assert upper_limit([2.0, 2.1, 2.2, 50.0, math.nan, math.inf]) == pytest.approx(2.8)
    assert upper_limit([2.0, 2.1, 2.2]) == 2.2
    assert upper_limit([]) == 1.0


# ------------------------------------------------------------------------------------------- search


def test_best_so_far_falls_at_the_time_a_better_trial_ended() -> None:
    rows = [row(0, 2.5), row(1, 2.7, status="stopped"), row(2, 2.1), row(3, math.nan, status="failed")]
    figure = search.best_so_far(rows)
    axes = figure.axes[0]
    times, best = lines(figure)["best so far"]
    assert (times, best) == ([10, 20, 30, 40], [2.5, 2.5, 2.1, 2.1])
    assert axes.get_xlabel() == "time since the first trial began (seconds)"
    assert axes.get_ylabel() == "negative ELBO (bits per byte)"
    assert lines(figure)["never evaluated"][0] == [40]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12))
def test_the_front_is_what_no_trial_beats(points: list[tuple[int, int]]) -> None:
    rows = [row(number, float(bits), float(kl)) for number, (bits, kl) in enumerate(points)]

    def beaten(a: TrialRow) -> bool:
        return any(
            b.bits_per_byte <= a.bits_per_byte and b.kl >= a.kl and (b.bits_per_byte, b.kl) != (a.bits_per_byte, a.kl)
            for b in rows
        )

    front = {(one.bits_per_byte, one.kl) for one in pareto_front(rows, TrialRow.point)}
    assert front == {(one.bits_per_byte, one.kl) for one in rows if not beaten(one)}


def test_bound_against_use_shows_every_trial_and_the_front() -> None:
    rows = [row(0, 2.0, 1.0), row(1, 2.2, 6.0), row(2, 2.3, 3.0, status="stopped"), row(3, math.nan, math.nan)]
    figure = search.bound_against_use(rows)
    axes = figure.axes[0]
    points = {tuple(point) for dots in axes.collections for point in dots.get_offsets().tolist()}  # type: ignore[union-attr]
    assert {(1.0, 2.0), (6.0, 2.2), (3.0, 2.3)} <= points
    assert lines(figure)["Pareto front"] == ([1.0, 6.0], [2.0, 2.2])
    assert axes.get_xlabel() == "used of the code (nats per sample)"
    assert axes.get_ylabel() == "negative ELBO (bits per byte)"
    assert words(figure) == "000 001"


def test_a_language_model_has_no_front() -> None:
    assert "no latent code" in words(search.bound_against_use([row(0, kl=0.0, model="byte_lstm")]))


LADDER = Ladder((4.0, 3.0, 2.5, 1.5, 1.6), 9, 9, 0.5)


def curved(number: int, bits: Curve, **changes: Any) -> TrialRow:
    """A trial with these negative ELBOs at its evaluations, and a code of which it uses half."""
    kl = [(step, 10 * value) for step, value in bits]
    used = [(step, value / 2) for step, value in kl]
    return row(number, min(value for _, value in bits), curves={METRIC: bits, "kl": kl, "used": used}, **changes)


def test_learning_curves_show_the_best_in_front_of_all_and_what_ngrams_reach() -> None:
    rows = [curved(number, [(50, 3 + number / 10), (100, 2 + number / 10)]) for number in range(12)]
    rows.append(row(12, math.nan, status="failed"))
    figure = curves.learning_curves(rows, LADDER)
    assert lines(figure)["best: 000"] == ([50, 100], [3.0, 2.0])
    assert lines(figure)["next 9"][0] == [50, 100]
    levels = {name: values[1][0] for name, values in lines(figure).items() if name.startswith(("byte", "entropy"))}
    assert levels == {
        "byte 2-gram 3.000": 3.0,
        "byte 3-gram 2.500": 2.5,
        "byte 4-gram (best) 1.500": 1.5,
        "entropy 0.500": 0.5,
    }
    faint, ends = figure.axes[0].collections
    assert [path.vertices.tolist() for path in faint.get_paths()] == [  # type: ignore[union-attr]
        [[50, 3 + number / 10], [100, 2 + number / 10]] for number in (10, 11)
    ]
    assert ends.get_offsets().tolist() == [[100, 3.0], [100, 3.1]]  # type: ignore[union-attr]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [  # type: ignore[union-attr]
        *("best: 000", "next 9", "2 others"),
        *levels,
    ]
    low, high = figure.axes[0].get_ylim()
    assert low < 0.5
    assert high > 3.0


def test_learning_curves_need_neither_ngrams_nor_many_trials() -> None:
    figure = curves.learning_curves([curved(0, [(50, 3.0), (100, 2.0)])])
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["best: 000"]  # type: ignore[union-attr]
    assert words(curves.learning_curves([row(0)])) == curves.NO_CURVES


def test_trials_far_above_the_others_do_not_set_the_scale_of_learning_curves() -> None:
    rows = [curved(number, [(50, 9.0), (100, 2 + number / 10), (150, 2 + number / 10)]) for number in range(5)]
    figure = curves.learning_curves([*rows, curved(5, [(50, 8.0)])])
    assert 2.4 < figure.axes[0].get_ylim()[1] < 5.0
    assert words(figure).startswith("1 trial above ")
    assert "not shown" not in words(curves.learning_curves(rows))


def test_of_a_large_search_no_more_curves_are_drawn_than_can_be_seen() -> None:
    rows = [curved(number, [(100, 2 + number / 1000)]) for number in range(1000)]
    figure = curves.learning_curves(rows)
    drawn = figure.axes[0].collections[1].get_offsets().tolist()  # type: ignore[union-attr]
    assert len(drawn) == curves.MOST_OTHERS
    assert drawn[0][1] == pytest.approx(2.010)
    assert drawn[-1][1] > 2.990
    assert f"{curves.MOST_OTHERS} of 990 others" in {
        text.get_text()
        for text in figure.axes[0].get_legend().get_texts()  # type: ignore[union-attr]
    }


def test_kl_and_use_of_the_code_have_a_panel_each() -> None:
    rows = [curved(0, [(50, 0.3), (100, 0.2)]), curved(1, [(50, 0.5)], status="stopped", step=50)]
    figure = curves.code_curves([*rows, row(2, 9.0, model="byte_lstm")])
    assert lines(figure)["best: 000"] == ([50, 100], [3.0, 2.0])
    assert lines(figure, 1)["best: 000"] == ([50, 100], [1.5, 1.0])
    assert lines(figure, 1)["collapsed below 0.1"][1] == [0.1, 0.1]
    assert figure.axes[1].get_ylim()[0] < 0
    below = replace(rows[0], curves=rows[0].curves | {"used": [(50, -0.2), (100, 1.0)]})
    assert curves.code_curves([below]).axes[1].get_ylim()[0] <= -0.2
    assert [axes.get_ylabel() for axes in figure.axes] == [
        *("KL (nats per sample)", "used of the code (nats per sample)")
    ]
    assert "No trial with a latent code" in words(curves.code_curves([row(0, model="byte_lstm")]))


def test_a_confirmation_is_drawn_config_by_config() -> None:
    entry = {"searched": 1.9, "mean": 2.1, "interval": [2.0, 2.2], "values": [2.05, None, 2.15]}
    configs = [{"trial": "004", **entry}, {"trial": "001", **entry, "interval": None, "values": [2.1]}]
    figure = confirmation({"configs": configs, "winner": "004", "metric": METRIC})
    assert lines(figure)["in the search"] == ([1.9], [0])
    assert lines(figure)["new seeds"] == ([2.05, 2.15], [0, 0])
    assert lines(figure)["their mean, 95% interval"] == ([2.1], [0])
    drawn = [(line.get_xdata(), line.get_ydata(), line.get_color()) for line in figure.axes[0].get_lines()]
    assert ([2.0, 2.2], [0, 0], VERMILION) in [(list(x), list(y), colour) for x, y, colour in drawn]  # type: ignore[arg-type]
    assert len(drawn) == 3 + 1 + 3, "an interval needs two seeds"
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["trial 004", "trial 001"]
    nothing = {"configs": [{**configs[0], "values": [None], "mean": None}]}
    assert "No config has a result" in words(confirmation(nothing))


def test_annealing_curves_are_the_weights_that_were_trained_with() -> None:
    linear, cyclical = ObjectiveConfig("linear", 0.1, 0.5), ObjectiveConfig("cyclical", 0.0, 0.4)
    rows = [row(0, 2.0), row(1, 2.6, status="stopped", step=50)]
    figure = search.annealing_curves(rows, {"run0": linear, "run1": cyclical})
    curves = lines(figure)
    steps, weights = curves["000  2.000  linear"]
    assert steps[-1] == 100
    assert weights == [kl_weight(linear, int(step), 100) for step in steps]
    steps, weights = curves["001  2.600  cyclical"]
    assert steps[-1] == 50  # where it was stopped
    assert weights == [kl_weight(cyclical, int(step), 100) for step in steps]


def test_annealing_shows_five_of_each_end_and_none_twice() -> None:
    for num_trials, expected in ((30, 10), (7, 7), (1, 1)):
        rows = [row(number, 2 + number / 10) for number in range(num_trials)]
        figure = search.annealing_curves(rows, {one.run_id: ObjectiveConfig() for one in rows})
        names = [name[:3] for name in lines(figure) if name.endswith("linear")]
        assert len(names) == len(set(names)) == expected
        assert names[0] == "000"
        assert names[-1] == f"{num_trials - 1:03}"


def test_parallel_coordinates_place_every_value() -> None:
    parameters = [
        {"rate": 1e-4, "kind": "a", "alpha": 0.0},
        {"rate": 1e-3, "kind": "b", "alpha": 0.25},
        {"rate": 1e-2, "kind": "b", "alpha": 1.0, "cycles": 3},
    ]
    rows = [row(number, 2 + number / 2, parameters=chosen) for number, chosen in enumerate(parameters)]
    figure = parallel.parallel_coordinates(rows)
    drawn = [list(line.get_ydata()) for line in figure.axes[0].get_lines() if len(line.get_xdata()) == 5]  # type: ignore[arg-type]
    absent = parallel._Column.ABSENT
    expected = [[0, 0.25, 0, absent, 0], [0.5, 0.75, 0.25, absent, 0.5], [1, 0.75, 1, 0.5, 1]]
    assert np.allclose(sorted(drawn), sorted(expected))  # type: ignore[type-var]
    assert {"rate", "kind", "alpha", "cycles", "bits per byte", "not drawn"} <= {
        text.get_text() for text in figure.axes[0].texts
    }


def test_of_many_trials_parallel_coordinates_colour_only_the_best() -> None:
    rows = [
        row(number, 2 + number / 1000, parameters={"rate": number / 1000, "kind": "ab"[number % 2]})
        for number in range(1000)
    ]
    figure = parallel.parallel_coordinates(rows)
    axes = figure.axes[0]
    coloured = [list(line.get_ydata()) for line in axes.get_lines() if len(line.get_xdata()) == 3]  # type: ignore[arg-type]
    (grey,) = axes.collections
    assert (len(coloured), len(grey.get_paths())) == (parallel.MOST_COLOURED, parallel.MOST_OTHERS)
    assert coloured[-1][0] == coloured[-1][2] == 0  # the best is in front
    # lines through one value are beside each other
    kinds = [line[1] for line in coloured]
    assert len(set(kinds)) == len(kinds)
    assert all(abs(abs(kind - 0.5) - 0.25) <= parallel.SPREAD / 2 + 1e-9 for kind in kinds)
    assert f"in colour: the best {parallel.MOST_COLOURED} of 1000 trials; grey: 200 of 950 others" in words(figure)
    assert "in colour" not in words(parallel.parallel_coordinates(rows[: parallel.MOST_COLOURED]))


def test_a_scale_is_that_on_which_the_values_are_spread() -> None:
    chance = random.Random(0)
    assert is_logarithmic([10 ** chance.uniform(-4, -1) for _ in range(1000)])
    assert not is_logarithmic([chance.uniform(1e-4, 0.5) for _ in range(1000)])
    assert is_logarithmic([1e-4, 1e-3, 1e-2])
    assert not is_logarithmic([8.0, 16.0, 32.0])
    assert not is_logarithmic([0.0, 1.0, 100.0])


def test_importance_finds_the_parameter_that_matters() -> None:
    chance = random.Random(0)
    rows = []
    for number in range(30):
        chosen: dict[str, Any] = {"alpha": chance.random(), "kind": chance.choice("abc"), "rate": chance.random()}
        bits = 2 + 2 * chosen["rate"] + 0.01 * chance.random()
        if number % 2:
            chosen["cycles"] = chance.randint(2, 4)
        rows.append(row(number, bits, parameters=chosen))
    rows.append(row(30, 9.0, parameters={}))  # started from a config outside the space
    found = importances(rebuild_study(rows))
    assert found[0].name == "rate"
    assert found[0].share > 0.8
    for entry in found:
        low, high = entry.interval
        assert 0 <= low <= entry.share <= high <= 1
        assert 0 < entry.error < 0.3
    assert found[0].interval[0] > found[1].interval[1], "the one that matters is told apart"
    assert {entry.name: (entry.num_trials, entry.conditional) for entry in found} == {
        "alpha": (30, False),
        "kind": (30, False),
        "rate": (30, False),
        "cycles": (15, True),
    }
    figure = importance(rows)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [entry.name for entry in found]
    assert "fANOVA, 30 trials" in figure.axes[0].get_xlabel()


def test_subsets_of_trials_at_one_point_say_nothing_of_an_importance(monkeypatch: pytest.MonkeyPatch) -> None:
    """As about half of them here: no tree finds anything to split there, of which Optuna makes an error."""
    rows = [row(number, 2 + number / 10, parameters={"rate": 1.0 if number == 7 else 0.5}) for number in range(8)]
    (found,) = importances(rebuild_study(rows))
    assert (found.name, found.share, found.error) == ("rate", 1.0, 0.0)
    assert words(importance(rows)) == "1.00 (1.00 to 1.00)"
    # and where too few of them say anything, there is no interval
    monkeypatch.setattr("raytrain.analysis.figures.importance.SUBSETS", 0)
    (found,) = importances(rebuild_study(rows))
    assert found.interval == (1.0, 1.0)
    assert words(importance(rows)) == "1.00"


def test_importance_takes_the_search_s_own_study() -> None:
    study = optuna.create_study()
    study.optimize(lambda trial: trial.suggest_float("own", 0, 1), n_trials=MIN_TRIALS)
    figure = importance([row(number, parameters={"other": number}) for number in range(MIN_TRIALS)], study)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["own"]


def test_importance_of_a_large_search_is_computed_from_some_of_its_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time grows with the square of their number; they are spread over the whole search."""
    chance, assessed = random.Random(0), list[list[int]]()
    rows = [row(number, 2 + (rate := chance.random()), parameters={"rate": rate}) for number in range(3 * MOST_TRIALS)]
    monkeypatch.setattr(
        "raytrain.analysis.figures.importance.get_param_importances",
        lambda study, **_: assessed.append([trial.params["rate"] for trial in study.trials]) or {"rate": 1.0},
    )
    figure = importance(rows)
    assert assessed[0] == [one.parameters["rate"] for one in ranked(rows)[::3]]
    # an interval needs no more than some of those
    assert len(assessed) == 1 + SUBSETS
    assert all(len(subset) == MOST_IN_SUBSET and set(subset) < set(assessed[0]) for subset in assessed[1:])
    assert f"fANOVA, {MOST_TRIALS} of {3 * MOST_TRIALS} trials; 95% interval" in figure.axes[0].get_xlabel()


def test_importance_says_what_it_lacks() -> None:
    few = [row(number, parameters={"alpha": number}) for number in range(MIN_TRIALS - 1)]
    failed = row(99, status="failed", parameters={"alpha": 2})
    assert f"needs at least {MIN_TRIALS} evaluated trials; there are {MIN_TRIALS - 1}" in words(
        importance([*few, failed])
    )
    same = [row(number, parameters={"alpha": number}) for number in range(MIN_TRIALS)]
    assert "Nothing varies" in words(importance(same))


def test_the_table_has_the_ten_best() -> None:
    rows = [row(number, 3 - number / 10, parameters={"alpha": number / 100}) for number in range(15)]
    cells = {
        location: cell.get_text().get_text()
        for location, cell in top_trials(rows).axes[0].tables[0].get_celld().items()
    }
    assert [cells[line, 0] for line in range(1, 11)] == [f"{number:03}" for number in range(14, 4, -1)]
    head, body = trial_cells(ranked(rows)[:1])
    assert dict(zip(head, body[0], strict=True)) == {
        "trial": "014",
        "status": "finished",
        "bits/byte": "1.600",
        "-ELBO": "71.0",
        "KL": "5.00",
        "active": "4",
        "step": "100/100",
        "time": "10 s",
        "alpha": "0.14",
    }


# figures are float32: nothing is beyond its range
NUMBERS = st.one_of(st.floats(width=32), st.floats(0, 5), st.just(2.0))
VALUES = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False, width=32),
    st.integers(-5, 5),
    st.booleans(),
    st.text("ab$_{}\\^", max_size=20),
)
ROWS = st.builds(
    lambda number, bits, kl, **rest: row(number, bits, kl, **rest),
    st.integers(0, 50),
    NUMBERS,
    NUMBERS,
    status=st.sampled_from(["finished", "stopped", "failed", "early_stopped", "running", "waiting", "interrupted"]),
    step=st.integers(0, 100),
    steps=st.sampled_from([0, 100]),
    started_at=st.one_of(st.just(math.nan), st.floats(1e9, 2e9)),
    ended_at=st.one_of(st.just(math.nan), st.floats(1e9, 2e9)),
    model=st.sampled_from(["hybrid", "lstm_vae", "byte_lstm", ""]),
    parameters=st.dictionaries(st.sampled_from(["a", "$b$", "_c", "d" * 30]), VALUES),
    curves=st.dictionaries(
        st.sampled_from(["bits_per_byte", "kl", "used"]),
        st.lists(st.tuples(st.integers(0, 100), st.floats(-1e6, 1e6)), max_size=3).map(sorted),
    ),
)


@settings(max_examples=5, deadline=None)
@given(st.lists(ROWS, max_size=14))
# one has no bound, and it alone a parameter
@example([row(0, 2.0, 0.0), row(1, math.inf, 2.0, parameters={"a": 0.5})])
def test_no_table_of_trials_breaks_a_figure(rows: list[TrialRow]) -> None:
    objectives = {one.run_id: ObjectiveConfig() for one in rows[::2]}
    for name, figure in search_figures(rows, objectives, LADDER).items():
        figure.draw_without_rendering()
        assert figure.axes, name


# ---------------------------------------------------------------------------------- table of trials


def test_a_table_of_trials_is_read_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "trials.parquet"
    columns = {
        "number": [1, 0],
        "name": ["001", "000"],
        "run_id": ["b", "a"],
        "status": ["failed", "finished"],
        "step": [0, 100],
        "steps": [100, 100],
        "started_at": [0.0, 5.0],
        "ended_at": [0.0, 9.0],
        "bits_per_byte": [None, 2.0],
        "kl": [math.inf, 3.0],
        "seed": [0, 0],
        "param/alpha": [0.5, None],
        "param/kind": [None, "x"],
        "field/model.feature_maps": ["[64, 128]", None],
        "curve/step": [[], [50, 100]],
        "curve/bits_per_byte": [[], [2.5, 2.0]],
        "curve/used": [None, [math.nan, 1.0]],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    first, second = read_trials(file)
    assert (first.number, first.bits_per_byte, first.kl, first.ended_at) == (0, 2.0, 3.0, 9.0)
    assert (first.parameters, first.fields) == ({"kind": "x"}, {})
    assert first.curves == {"bits_per_byte": [(50, 2.5), (100, 2.0)], "used": [(100, 1.0)]}
    assert second.curves == {"bits_per_byte": []}
    assert (second.parameters, second.fields) == ({"alpha": 0.5}, {"model.feature_maps": "[64, 128]"})
    assert all(map(math.isnan, (second.bits_per_byte, second.kl, second.started_at, second.ended_at)))
    assert ranked([first, second]) == [first]


def test_what_is_no_table_of_trials_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "trials.parquet"
    file.write_text("no parquet")
    with pytest.raises(UserError, match="is not a table of trials"):
        read_trials(file)
    pyarrow.parquet.write_table(pyarrow.table({"x": [1]}), file)
    with pytest.raises(UserError, match="no column 'number'"):
        read_trials(file)
    for wrong in ({"kl": [[1.0, 2.0]]}, {"step": [[5]], "kl": [1.0]}, {"step": [["a"]]}, {"step": [[math.inf]]}):
        columns = {"number": [0], **{f"curve/{name}": values for name, values in wrong.items()}}
        pyarrow.parquet.write_table(pyarrow.table(columns), file)
        with pytest.raises(UserError, match="is not a table of trials"):
            read_trials(file)


def test_an_objective_is_read_from_the_parameters_of_a_run() -> None:
    parameters = {"objective.annealing": "cyclical", "objective.cycles": "3", "objective.end": "0.4", "length": "60"}
    assert objective_of(parameters) == ObjectiveConfig("cyclical", cycles=3, end=0.4)


# ------------------------------------------------------------------------------------------ one run


HISTORIES = {
    "train/reconstruction": [(20, 90.0), (40, 80.0)],
    "valid/reconstruction": [(40, 81.0)],
    "valid/bound": [(40, 84.0)],
    "valid/bits_per_byte": [(40, 2.1)],
    "train/bound": [(20, 91.0), (40, 83.0), (60, 80.0)],
    "train/bits_per_byte": [(20, 9.1), (40, 4.15)],
    "train/auxiliary": [(20, 95.0), (40, 90.0)],
    "train/kl": [(20, 1.0), (40, 3.0)],
    "valid/kl": [(40, 3.0)],
    "train/kl_weight": [(20, 0.5), (40, 1.0)],
}


def test_losses_show_their_parts_over_the_steps() -> None:
    figure = run.losses(HISTORIES)
    assert lines(figure)["reconstruction, train"] == ([20, 40], [9, 4])
    assert lines(figure)["negative ELBO, valid"] == ([40], [2.1])
    assert lines(figure)["auxiliary, train"][1] == pytest.approx([9.5, 4.5])
    assert lines(figure, 1)["KL, train"] == ([20, 40], [1, 3])
    (weights,) = figure.axes[2].get_lines()
    assert list(weights.get_ydata()) == [0.5, 1.0]  # type: ignore[arg-type]
    assert [axes.get_ylabel() for axes in figure.axes] == ["bits per byte", "KL (nats per sample)", "KL weight"]
    assert figure.axes[2].get_xlabel() == "training step"


def test_losses_of_a_language_model_have_one_panel() -> None:
    nats = {"train/reconstruction": [(20, 90.0)], "train/bound": [(20, 90.0)], "train/bits_per_byte": [(20, 3.0)]}
    figure = run.losses({**nats, "train/kl": [(20, 0.0)], "train/auxiliary": [(20, 0.0)]})
    assert len(figure.axes) == 1
    assert list(lines(figure)) == ["reconstruction, train"]
    assert words(run.losses({})) == "The run has no metrics."


def test_bits_by_position_leave_out_what_no_sample_reaches() -> None:
    figure = run.bits_by_position(np.array([4.0, 2.0, 0.0]), np.array([10.0, 5.0, 0.0]))
    drawn = lines(figure)
    assert drawn["mean at the position"] == ([1, 2], [4, 2])
    assert figure.axes[0].get_xlim() == (0, 3)
    assert "mean of all 3.333" in drawn
    assert len(figure.axes) == 2  # the share of samples has an axis of its own
    assert len(run.bits_by_position(np.array([4.0, 2.0]), np.array([10.0, 10.0])).axes) == 1


def test_kl_by_dimension_is_in_order() -> None:
    figure = run.kl_by_dimension(np.array([0.0, 2.0, 1.0]), np.array([False, True, True]))
    bars = figure.axes[0].patches
    assert [bar.get_height() for bar in bars] == [2, 1, 0]  # type: ignore[attr-defined]
    assert bars[0].get_facecolor() == bars[1].get_facecolor() != bars[2].get_facecolor()
    assert figure.axes[0].get_title("left") == "3.00 nats in total, 2 of 3 dimensions active"


def test_latent_space_is_projected_on_its_widest_directions() -> None:
    chance = np.random.default_rng(0)
    wide = chance.normal(size=(400, 2)) * [5.0, 2.0]
    rotation, _ = np.linalg.qr(chance.normal(size=(6, 6)))
    means = np.hstack([wide, 0.01 * chance.normal(size=(400, 4))]) @ rotation
    points, names = run.project(means)
    for location in range(2):
        assert abs(np.corrcoef(points[:, location], wide[:, location])[0, 1]) > 0.99
    assert names[0].startswith("component 1 (8")
    same, names = run.project(wide)
    assert np.array_equal(same, wide)
    assert names == ("z1", "z2")
    assert run.project(np.zeros((5, 3)))[0].tolist() == [[0.0, 0.0]] * 5
    assert run.project(np.ones((1, 3)))[0].shape == (1, 2)


def test_latent_space_is_coloured_by_each_property() -> None:
    means = np.arange(12.0).reshape(6, 2)
    figure = run.latent_space(
        means, {"length (bytes)": [1.0, 2, 3, 4, 5, 6], "has a mention": [True] * 2 + [False] * 4}
    )
    length, mention = figure.axes[:2]
    assert length.collections[0].get_array().tolist() == [1, 2, 3, 4, 5, 6]  # type: ignore[union-attr]
    groups = {dots.get_label(): dots.get_offsets().tolist() for dots in mention.collections}  # type: ignore[union-attr]
    assert groups == {"no": means[2:].tolist(), "yes": means[:2].tolist()}
    assert mention.get_title("left") == "has a mention"


# ---------------------------------------------------------------------------------------- the paper


def test_fig4_draws_each_model_over_the_lengths() -> None:
    records = [record("hybrid", 24, 2.0, 2.2), record("hybrid", 60, 6.0, 2.0), record("lstm_vae", 60, 0.0, 1.9)]
    records += [record("lstm_vae", 60, 0.2, 2.1, seed=1), record("byte_lstm", 60, 0.0, 1.95)]
    figure = paper.fig4(records)
    bits, kl, share = figure.axes
    assert [axes.get_ylabel() for axes in (bits, kl, share)] == [paper.BITS, paper.KL, "KL / reconstruction"]
    assert bits.get_xlabel() == "sample length (characters)"

    def means(axes: Any) -> list[tuple[list[float], list[float]]]:
        return [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines() if len(line.get_xdata())]

    assert means(bits) == [([24, 60], [2.2, 2.0]), ([60], [2.0]), ([60], [1.95])]
    assert means(kl) == [([24, 60], [2.0, 6.0]), ([60], [0.1])]
    assert means(share)[0][1] == pytest.approx([one.kl / one.reconstruction for one in records[:2]])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["hybrid VAE", "LSTM VAE", "LSTM language model"]


def test_a_run_that_was_cut_short_is_hollow() -> None:
    axes = paper.fig4([record(), record(length=24, step=50)]).axes[0]
    faces = [tuple(dots.get_facecolor()[0]) for dots in axes.collections]  # type: ignore[union-attr]
    assert (1.0, 1.0, 1.0, 1.0) in faces
    assert len(set(faces)) == 2


def test_fig3_draws_the_course_of_training_in_bits() -> None:
    curve = [(10, 60 * math.log(2) * 4), (20, 60 * math.log(2) * 3)]
    records = [record("hybrid", 60, curve=curve), record("lstm_vae", 60, curve=curve), record("lstm_vae", 30, bits=2.5)]
    figure = paper.fig3(records)
    assert [axes.get_title("left") for axes in figure.axes] == ["convolutional autoencoder", "LSTM autoencoder"]
    steps, bits = lines(figure, 1)["60"]
    assert steps == [10, 20]
    assert bits == pytest.approx([4.0, 3.0])
    assert figure.axes[0].get_ylabel() == "reconstruction (bits per character)"


def test_fig5_tells_annealing_from_none() -> None:
    records = [record(alpha=0.1, annealing="linear", kl=3.0), record(alpha=0.1, annealing="constant", kl=1.0)]
    figure = paper.fig5([*records, record(alpha=0.5, annealing="sigmoid", kl=6.0)])
    drawn = [list(line.get_ydata()) for line in figure.axes[0].get_lines() if len(line.get_xdata())]  # type: ignore[arg-type]
    assert drawn == [[3.0, 6.0], [1.0]]


def test_fig6_has_a_line_for_each_alpha() -> None:
    records = [record(alpha=alpha, receptive_field=field, kl=alpha * field) for alpha in (0.0, 0.5) for field in (2, 4)]
    figure = paper.fig6([*records, record(alpha=0.9)])  # the last has a recurrent top net
    drawn = [
        (list(line.get_xdata()), list(line.get_ydata()))  # type: ignore[arg-type]
        for line in figure.axes[0].get_lines()
        if len(line.get_xdata())  # type: ignore[arg-type]
    ]
    assert drawn == [([2, 4], [0, 0]), ([2, 4], [1, 2])]
    assert {"alpha = 0", "alpha = 0.5"} <= lines(figure).keys()


def test_tweets_show_rec_and_kl_by_dropout() -> None:
    records = [record(model, 128, kl=10 * p, input_dropout=p) for model in ("hybrid", "lstm_vae") for p in (0.0, 0.4)]
    rec, kl, bound = paper.tweets(records).axes
    assert [axes.get_xlabel() for axes in (rec, kl, bound)] == ["input dropout"] * 3
    assert list(kl.get_lines()[0].get_ydata()) == [0.0, 4.0]  # type: ignore[arg-type]
    total = 2.0 * 128 * math.log(2)
    assert list(rec.get_lines()[0].get_ydata()) == pytest.approx([total, total - 4])  # type: ignore[arg-type]
    assert list(bound.get_lines()[0].get_ydata()) == pytest.approx([total, total])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", list(paper.DRAWN))
def test_every_figure_of_the_paper_bears_no_data_and_one_run(name: str) -> None:
    for records in ([], [record()], [record("byte_lstm", kl=0.0)], [record(receptive_field=3, curve=[(1, 5.0)])]):
        assert not is_blank(png(paper.DRAWN[name](records)))

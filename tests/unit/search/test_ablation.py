"""Ablation of a winner: which configs are trained, what is refused, and what its result says of each field."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest

from raytrain.config.schema import RunConfig, flatten, override
from raytrain.runs.records import OUTCOME, PLAN
from raytrain.runs.repeats import Confirm
from raytrain.runs.trials import Trial, TrialStore, trial_location
from raytrain.search import ablation
from raytrain.search.ablation import Effect, ablation_request, effects, effects_json, find_ablated
from raytrain.search.confirmation import Difference, new_repeats
from raytrain.search.options import SearchOptions, SearchRequest
from raytrain.search.plan import Plan
from raytrain.search.space import read_space
from raytrain.storage import open_storage_root
from raytrain.utils.errors import UserError
from tests.conftest import tiny_config
from tests.unit.search.test_search_objective import a_plan, a_trial, figures

BASE = tiny_config("hybrid")
WON = {
    "objective.alpha": 0.7,
    "optimizer.learning_rate": 0.004,
    "model.feature_maps": [8, 8, 16],
    "model.decoder_maps": [16, 8, 8],
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def searched(plan: Plan, *trials: Trial, name: str = "s") -> None:
    """Leave a search in the storage."""
    location = open_storage_root(None).child(name)
    location.write(PLAN, plan.to_json())
    records = TrialStore(location)
    for trial in trials:
        records.add(trial)
    records.close()


def a_winner(config: RunConfig[Any], **changes: Any) -> Trial:
    return replace(a_trial(0, figures(2.0, 3.0)), config=config, **changes)


def requested(name: str = "s", **options: Any) -> SearchRequest:
    found = find_ablated(name, None)
    return ablation_request(found, replace(found.defaults, **options))


def test_each_field_of_the_winner_goes_back_alone_or_with_those_that_it_needs(home: Path) -> None:
    searched(a_plan(), a_winner(override(BASE, WON | {"seed": 3})), replace(a_trial(1, figures(2.5, 3.0))))
    request = requested()
    assert (request.options.name, request.options.confirm, request.options.scheduler) == ("s-ablation", "4:3", "none")
    assert (request.bases, request.corpus) == ({"hybrid": BASE}, ("0123456789abcdef", "/somewhere/corpus"))
    space, maps = request.space, "model.feature_maps and model.decoder_maps"
    assert space.algorithm == "grid"
    found = {}
    for without in ("nothing", "objective.alpha", "optimizer.learning_rate", maps):
        config = space.resolve(request.bases, optuna.trial.FixedTrial({"without": without}), None)
        flat, known = flatten(config), flatten(BASE)
        found[without] = {name for name in flat if flat[name] != known[name]}
    everything = set(WON)
    assert found == {
        "nothing": everything,
        "objective.alpha": everything - {"objective.alpha"},
        "optimizer.learning_rate": everything - {"optimizer.learning_rate"},
        maps: {"objective.alpha", "optimizer.learning_rate"},
    }
    # the same from its text, which a resumed ablation runs
    assert read_space("ablation", space.source).source == space.source


def test_the_code_of_the_ablated_search_is_not_run(home: Path) -> None:
    plan = a_plan(space=read_space("mine", "import os\nos.environ['RAN'] = '1'\ndef space(trial):\n    return {}\n"))
    os.environ.pop("RAN")
    searched(plan, a_winner(override(BASE, WON)))
    requested()
    assert "RAN" not in os.environ


def test_a_confirmed_winner_is_ablated_with_its_own_steps(home: Path) -> None:
    rule = Confirm(configs=1, seeds=1, first_seed=1000, steps=2 * BASE.steps)
    plan, first = a_plan(confirm=rule), a_winner(override(BASE, WON))
    (repeat,) = new_repeats(plan, [first])
    repeat = replace(repeat, status="finished", best=figures(1.9, 3.0), step=repeat.config.steps)
    searched(plan, first, repeat)
    space = requested().space
    drawn = space.resolve({"hybrid": BASE}, optuna.trial.FixedTrial({"without": "nothing"}), None)
    assert drawn == override(BASE, WON)


def test_a_field_that_needs_another_goes_back_with_it(home: Path) -> None:
    """The default end of annealing lies before this start, and the maps of two depths do not fit each other."""
    base = override(BASE, {"objective.annealing": "linear", "objective.start": 0.01, "objective.end": 0.08})
    won = override(base, WON | {"objective.start": 0.09, "objective.end": 0.2})
    searched(a_plan(bases={"hybrid": base}), a_winner(won))
    assert requested().options.confirm == "6:3"
    groups: dict[str, Any] = {}
    exec(requested().space.source, groups)
    assert set(groups["GROUPS"]) == {
        "nothing", "objective.start", "objective.start and objective.end", "objective.alpha", "optimizer.learning_rate",
        "model.feature_maps and model.decoder_maps",
    }  # fmt: skip


def test_what_the_search_was_begun_with_holds(home: Path) -> None:
    plan = a_plan(experiment="mine", workers={"workers_per_trial": 2, "device": "cpu", "time_budget": 60.0})
    searched(plan, a_winner(override(BASE, WON)))
    options = requested(confirm="9:2").options
    assert (options.experiment, options.workers_per_trial, options.device) == ("mine", 2, "cpu")
    assert (options.time_budget, options.confirm) == (None, "4:2")
    # begun with another number of seeds, it goes on with that number
    searched(a_plan(confirm=Confirm(configs=4, seeds=1, first_seed=1000), ablates="s"), name="s-ablation")
    assert requested().options.confirm == "4:1"


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("gone", {}, "--ablate gone: there is no such search in "),
        ("s", {"num_samples": 4}, "--ablate s takes no --num-samples"),
        ("s", {"min_used": 1.0}, "--ablate s takes no --min-used"),
        ("s", {"confirm": "three"}, "--confirm is 'three': give K:S"),
        ("../s", {}, r"\.\./s"),
        ("same", {}, "trial 000, its winner, has the default values in all fields"),
        ("none", {}, "--ablate none: no trial of the search has won"),
        ("running", {}, "--ablate running: it has not ended; python -m raytrain.tune --resume running"),
        ("changing", {}, "the fields of its winner change while it is trained"),
    ],
)
def test_what_cannot_be_ablated_is_one_line(home: Path, name: str, options: dict[str, Any], words: str) -> None:
    searched(a_plan(), a_winner(override(BASE, WON)))
    searched(a_plan(), a_winner(override(BASE, {"seed": 9})), name="same")
    searched(a_plan(min_used=50.0), a_winner(override(BASE, WON)), name="none")
    searched(a_plan(), a_winner(override(BASE, WON), status="running"), name="running")
    searched(a_plan(algorithm="pbt", parts=2), a_winner(override(BASE, WON)), name="changing")
    with pytest.raises(UserError, match=words):
        requested(name, **options)


def an_ablation(home: Path) -> tuple[Plan, list[Trial]]:
    """The trials of an ablation: without alpha it is 0.5 worse, without the rate 0.25 better, and the maps diverge."""
    searched(a_plan(), a_winner(override(BASE, WON)))
    request = requested(confirm="4:2")
    rule = Confirm(configs=4, seeds=2, first_seed=1000)
    plan = a_plan(space=request.space, bases=request.bases, algorithm="grid", confirm=rule, ablates="s")
    nats = {"nothing": 10.0, "objective.alpha": 15.0, "optimizer.learning_rate": 7.5}
    location, trials = open_storage_root(None).child("s-ablation"), []
    for number, without in enumerate([*nats, "model.feature_maps and model.decoder_maps"]):
        config = request.space.resolve(request.bases, optuna.trial.FixedTrial({"without": without}), None)
        bits = nats.get(without, 20.0) / 10 / math.log(2)
        trials.append(
            replace(a_trial(number, figures(bits, 3.0)), config=config, params={"without": without}, status="finished")
        )
    for repeat in new_repeats(plan, trials):
        without = trials[repeat.confirms or 0].params["without"]
        if without not in nats:
            trials.append(replace(repeat, status="early_stopped", best={}, reason="diverged"))
            continue
        losses = {"nats": [nats[without] + 0.001 * sample for sample in range(8)], "bytes": [10.0] * 8}
        best = figures(nats[without] / 10 / math.log(2), 3.0) | {"used": 3.0}
        ended = {"step": 20, "best_step": 20, "best": best, "precision": "float32", "device": "cpu", "samples": []}
        trial_location(location, repeat.identity).write(OUTCOME, json.dumps(ended | {"losses": losses}).encode())
        trials.append(replace(repeat, status="finished", best=best))
    return plan, trials


def test_its_result_says_what_each_field_brings(home: Path) -> None:
    plan, trials = an_ablation(home)
    location = open_storage_root(None).child("s-ablation")
    alpha, rate, maps = effects(plan, trials, location)
    assert alpha.values == {"objective.alpha": (0.7, BASE.objective.alpha)}
    assert alpha.gain is not None
    assert alpha.gain.bits == pytest.approx(0.5 / math.log(2), rel=1e-3)
    assert alpha.gain.samples == 8
    assert str(alpha).startswith(f"objective.alpha {BASE.objective.alpha:.3g} instead of 0.7: worse by 0.721 bits per")
    assert str(alpha).endswith("; 3.00 nats of the code used")
    assert str(rate).startswith("optimizer.learning_rate 0.001 instead of 0.004: better by 0.361 bits per byte (95% ")
    assert maps.gain is None
    assert str(maps).endswith("no result in common (diverged)")
    assert list(maps.values) == ["model.feature_maps", "model.decoder_maps"]
    texts = json.loads(json.dumps(effects_json([alpha, maps]), allow_nan=False))
    assert (texts[1]["mean"], texts[1]["gain"]) == (None, None)


def test_a_default_that_diverges_is_told_too(home: Path) -> None:
    plan, trials = an_ablation(home)
    diverged = [
        replace(trial, status="early_stopped", best={}, reason="NaN") if trial.number == 1 else trial
        for trial in trials
    ]
    found = effects(plan, diverged, open_storage_root(None).child("s-ablation"))
    (alpha,) = [effect for effect in found if effect.without == "objective.alpha"]
    assert (alpha.gain, alpha.mean, alpha.reason) == (None, None, "NaN")
    assert len(found) == 3


@pytest.mark.parametrize(
    ("bits", "low", "high", "words"),
    [
        (0.03, 0.01, 0.05, "a 1 instead of 2: worse by 0.030 bits per byte (95% interval 0.010 to 0.050)"),
        (0.03, -0.01, 0.07, "not told apart: worse by 0.030 bits per byte (95% interval -0.010 to 0.070)"),
        (-0.03, -0.05, -0.01, "better by 0.030 bits per byte (95% interval 0.010 to 0.050)"),
        (-0.03, -0.07, 0.01, "not told apart: better by 0.030 bits per byte (95% interval -0.010 to 0.070)"),
    ],
)
def test_an_effect_in_words(bits: float, low: float, high: float, words: str) -> None:
    gain = Difference(bits=bits, low=low, high=high, seeds=3, samples=8)
    assert str(Effect(without="a", values={"a": (2, 1)}, mean=1.0, used=None, gain=gain)).endswith(words)


def test_every_option_that_it_refuses_is_one() -> None:
    assert set(ablation.FROM_THE_SEARCH) <= vars(SearchOptions()).keys()

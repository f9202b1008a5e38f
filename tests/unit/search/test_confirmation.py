"""Confirmation of a winner: which configs are trained again, which of them wins, and how far two are apart."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytrain.analysis.search_report import read_confirmation
from raytrain.config.schema import override
from raytrain.data.corpus import Corpus
from raytrain.metrics import METRIC, RUNG, SearchObjective
from raytrain.runs.records import OUTCOME, PLAN
from raytrain.runs.repeats import Confirm, confirmed, repeated, searched, winner
from raytrain.runs.trials import Trial, TrialStore, trial_location
from raytrain.search import finish
from raytrain.search.algorithms import Halving
from raytrain.search.confirmation import (
    Losses,
    compare,
    confirmation_of,
    difference,
    mean_interval,
    new_repeats,
    repeat_share,
    repeats_left,
)
from raytrain.search.estimate import Estimate
from raytrain.search.finish import best_checkpoint, description, model_card, table
from raytrain.search.plan import Plan, read_plan
from raytrain.search.setup import stored_plan
from raytrain.storage import open_storage
from raytrain.storage.base import Storage
from raytrain.utils.errors import UserError
from tests.conftest import tiny_config
from tests.unit.search.test_search_objective import FakeRun, a_plan, a_trial, end, figures, refused, searcher

__all__ = ["refused"]

RULE = Confirm(configs=2, seeds=2, first_seed=1003)
BASE = tiny_config("hybrid")


def a_search(*bits: float) -> list[Trial]:
    """Trials of different configs with these negative ELBOs, each with 3 nats of its code used."""
    return [a_config(number, value, number / 100) for number, value in enumerate(bits)]


def a_config(number: int, bits: float, alpha: float, seed: int = 0) -> Trial:
    config = override(BASE, {"objective.alpha": alpha, "seed": seed})
    return replace(a_trial(number, figures(bits, 3.0)), config=config)


def with_repeats(plan: Plan, trials: list[Trial], *results: tuple[float, float]) -> list[Trial]:
    """The trials, and all repeats that the plan wants, with (bits per byte, KL) as they are begun."""
    made = new_repeats(plan, trials)
    for trial, (bits, kl) in zip(made, results, strict=True):
        trial.best, trial.status = figures(bits, kl), "finished"
    return [*trials, *made]


# ---------------------------------------------------------------------------------- what is repeated


def test_the_best_configs_are_repeated_seed_by_seed_with_seeds_that_are_new() -> None:
    trials = a_search(2.0, 1.8, 1.9)
    made = new_repeats(a_plan(confirm=RULE), trials)
    assert [(trial.confirms, trial.config.seed) for trial in made] == [(1, 1003), (2, 1003), (1, 1004), (2, 1004)]
    assert [trial.number for trial in made] == [3, 4, 5, 6]
    for trial in made:
        assert replace(trial.config, seed=0) == trials[trial.confirms or 0].config
        assert (trial.baseline, trial.on_the_space, trial.params) == (None, False, {})
    assert new_repeats(a_plan(), trials) == []


def test_a_config_that_may_not_win_is_not_repeated_and_one_that_differs_in_the_seed_is_one_config() -> None:
    trials = a_search(2.0, 1.8, 1.9)
    trials[1].best = figures(1.8, 0.5)  # its code is not used
    trials.append(a_config(3, 1.95, 0.02, seed=1003))
    found = repeated(trials, SearchObjective(min_used=1.0), RULE)
    assert [each.trial.number for each in found] == [2, 0]
    assert [[config.seed for config in each.configs] for each in found] == [[1004, 1005]] * 2
    assert repeated(trials, SearchObjective(min_used=5.0), RULE) == []


def test_what_has_been_begun_is_not_begun_again_and_more_trials_change_what_is_repeated() -> None:
    plan, trials = a_plan(confirm=RULE), a_search(2.0, 1.8, 1.9)
    begun = [*trials, *new_repeats(plan, trials)[:3]]
    assert [(trial.number, trial.confirms, trial.config.seed) for trial in new_repeats(plan, begun)] == [(6, 2, 1004)]
    # a better trial after the search was given more: the third best is no longer confirmed
    begun.append(a_config(7, 1.0, 0.5))
    assert [trial.confirms for trial in new_repeats(plan, begun)] == [7, 7]
    longer = a_plan(confirm=replace(RULE, steps=7))
    assert {trial.config.steps for trial in new_repeats(longer, begun)} == {7}


def test_the_searcher_draws_as_if_there_were_no_repeats(corpus: Corpus, tmp_path: Path) -> None:
    plan = a_plan(confirm=RULE, num_samples=3)
    found = searcher(plan, corpus, tmp_path)
    for number in range(3):
        found.suggest(str(number))
        end(found, found.trials[number], figures(2.0 - number / 10, 3.0))
    asked = len(found.study.trials)
    assert found.begin_confirmation() == 4
    job = found.suggest("repeat")["job"]
    assert (job["config"]["seed"], job["losses"], job["baseline"]) == (1003, True, None)
    assert found.search.experiment.tags[-1]["confirms"] == "2"  # type: ignore[attr-defined]
    found.on_trial_result("repeat", {"step": 10, RUNG: 10, **figures(1.0, 3.0)})
    end(found, found.trials[3], figures(1.0, 3.0))
    assert len(found.study.trials) == asked

    # the driver dies while the second repeat runs
    identity = found.suggest("running")["job"]["storage"]
    resumed = searcher(plan, corpus, tmp_path)
    assert len(resumed.study.trials) == 3
    assert resumed.begin_confirmation() == 3
    assert resumed.suggest("again")["job"]["storage"] == identity
    assert [(trial.confirms, trial.config.seed) for trial in resumed.trials[3:]] == [
        (2, 1003), (1, 1003), (2, 1004), (1, 1004),
    ]  # fmt: skip

    # the search is given more trials: they are drawn as if nothing had been confirmed
    for trial in resumed.trials[3:]:
        end(resumed, trial, figures(1.5, 3.0))
    more, never = searcher(plan, corpus, tmp_path), searcher(a_plan(num_samples=3), corpus, tmp_path / "never")
    for trial in searched(more.trials):
        never.records.add(trial)
    never = searcher(never.search.plan, corpus, tmp_path / "never")
    job = more.suggest("next")["job"]
    assert (job["config"], job["losses"]) == (never.suggest("next")["job"]["config"], False)
    assert (more.trials[-1].number, more.trials[-1].confirms) == (7, None)


def test_a_repeat_of_what_cannot_win_any_more_is_not_run_and_not_waited_for(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = searcher(a_plan(confirm=replace(RULE, configs=1), num_samples=2), corpus, tmp_path)
    found.suggest("0")
    end(found, found.trials[0], figures(2.0, 3.0))
    found.begin_confirmation()
    found.suggest("repeat")
    found.records.add(found.trials[1])

    # one of its repeats has begun when the search is given a better trial
    resumed = searcher(found.search.plan, corpus, tmp_path)
    resumed.suggest("better")
    end(resumed, resumed.trials[2], figures(1.0, 3.0))
    assert resumed.begin_confirmation() == 2
    for number in range(2):
        resumed.suggest(f"new {number}")
    assert [(trial.confirms, bool(trial.run)) for trial in resumed.trials] == [
        (None, True), (0, True), (None, True), (2, True), (2, True),
    ]  # fmt: skip
    ends: list[tuple[str, ...]] = []
    monkeypatch.setattr(FakeRun, "finish", lambda self, *said: ends.append(said), raising=False)
    monkeypatch.setattr("raytrain.search.finish.log_report", lambda search: None)
    finish.end(resumed.search, resumed.trials)
    for trial in resumed.trials[3:]:
        trial.status = "finished"
    finish.end(resumed.search, resumed.trials)
    reason = f"the time budget is used up: trials 003, 004 have not ended; go on with {found.search.resume_command}"
    assert ends == [("KILLED", reason), ("FINISHED",)]


def test_asha_is_not_reminded_of_repeats(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = searcher(a_plan(confirm=RULE, num_samples=1), corpus, tmp_path)
    found.suggest("0")
    end(found, found.trials[0], figures(2.0, 3.0))
    found.begin_confirmation()
    found.suggest("repeat")
    found.records.add(found.trials[1])
    recalled: list[str] = []
    monkeypatch.setattr(Halving, "recall", lambda self, trial_id, history: recalled.append(trial_id))
    resumed = searcher(found.search.plan, corpus, tmp_path)
    resumed.begin_confirmation()
    resumed.suggest("again")
    assert recalled == ["known-000"]


# ------------------------------------------------------------------------------------------ who wins


def test_the_best_mean_wins_and_its_best_seed_is_the_model() -> None:
    plan = a_plan(confirm=RULE)
    trials = with_repeats(plan, a_search(2.0, 1.8, 1.9), (2.1, 3), (1.9, 3), (2.3, 3), (2.0, 3))
    won = winner(trials, plan.search_objective, RULE)
    assert won is not None
    assert (won.confirms, won.config.seed, won.number) == (2, 1003, 4)
    # before the last repeat has ended it is the best trial of the search
    trials[-1].status = "running"
    unconfirmed = winner(trials, plan.search_objective, RULE)
    assert unconfirmed is not None
    assert unconfirmed.number == 1
    best = winner(trials, plan.search_objective)
    assert best is unconfirmed


@pytest.mark.parametrize(("share", "number"), [(1.0, 2), (0.5, 1)])
def test_a_config_whose_code_is_used_in_too_few_seeds_does_not_win(share: float, number: int) -> None:
    rule = replace(RULE, share=share)
    plan = a_plan(confirm=rule, min_used=1.0)
    trials = with_repeats(plan, a_search(2.0, 1.8, 1.9), (1.6, 3), (1.9, 3), (1.5, 0.2), (2.0, 3))
    found = repeated(trials, plan.search_objective, rule)
    assert [each.held(plan.search_objective) for each in found] == [1, 2]
    assert confirmed(found, plan.search_objective, rule)[0].trial.number == number
    won = winner(trials, plan.search_objective, rule)
    assert won is not None
    assert (won.confirms, won.best["kl"]) == (number, 3)  # the best seed is one that may win


def test_a_share_of_the_seeds_is_not_missed_by_rounding() -> None:
    rule = Confirm(configs=1, seeds=25, first_seed=1003, share=0.28)
    plan = a_plan(confirm=rule, min_used=1.0)
    for held, winners in ((7, 1), (6, 0)):
        trials = with_repeats(plan, a_search(2.0), *[(1.9, 3.0)] * held, *[(1.9, 0.0)] * (25 - held))
        found = repeated(trials, plan.search_objective, rule)
        assert len(confirmed(found, plan.search_objective, rule)) == winners


def test_there_may_be_no_winner(tmp_path: Path) -> None:
    plan = a_plan(confirm=RULE, min_used=1.0)
    trials = with_repeats(plan, a_search(2.0, 1.8, 1.9), (1.6, 0), (1.9, 0), (1.5, 3), (2.0, 3))
    trials[-1].status, trials[-1].best = "early_stopped", {}  # it has diverged
    assert winner(trials, plan.search_objective, RULE) is None
    found = confirmation_of(plan, trials, open_storage(tmp_path))
    assert found is not None
    assert found.lines() == ["no config kept the constraint in all of its new seeds"]
    assert found.to_json()["configs"][1]["values"] == [1.9, None]


def test_what_is_said_without_a_confirmed_winner_is_true(tmp_path: Path) -> None:
    location = open_storage(tmp_path)

    def sentence(plan: Plan, trials: list[Trial]) -> str:
        found = confirmation_of(plan, trials, location)
        assert found is not None
        return found.sentence

    constrained, free = a_plan(confirm=RULE, min_used=1.0), a_plan(confirm=RULE)
    unused = a_search(2.0, 1.8)
    for trial in unused:
        trial.best = figures(1.8, 0.5)
    assert sentence(constrained, unused) == "no config can be confirmed: none may win"
    trials = with_repeats(free, a_search(2.0, 1.8), *[(1.9, 3.0)] * 4)
    trials[-1].status = "running"
    for plan in (constrained, free):
        assert sentence(plan, trials) == "the winner is not confirmed yet: not all trials that confirm have ended"
    for trial in trials[2:]:
        trial.status, trial.best = "early_stopped", {}
    assert sentence(constrained, trials) == "no config kept the constraint in all of its new seeds"
    assert sentence(free, trials) == "no config had a result in all of its new seeds"


# ---------------------------------------------------------------------------------------- difference


def losses(nats: Any, text_bytes: Any = None) -> Losses:
    array = np.array(nats, dtype=float)
    return Losses(nats=array, text_bytes=np.full(array.shape[1], 10.0) if text_bytes is None else np.array(text_bytes))


def test_the_difference_is_that_of_bits_per_byte() -> None:
    better, worse = losses([[10, 20], [12, 22]], [10.0, 30.0]), losses([[14, 28], [16, 26]], [10.0, 30.0])
    bits, low, high = difference(better, worse, seed=0)
    assert bits == pytest.approx((42 - 32) / math.log(2) / 40)
    assert low < bits < high
    assert difference(better, worse, seed=0) == (bits, low, high)


@pytest.mark.parametrize(("own", "noise"), [(0.5, 1.0), (0.5, 3.0), (0.0, 1.0)])
def test_the_interval_holds_the_truth_about_as_often_as_it_says(own: float, noise: float) -> None:
    """Of three seeds: with seeds that differ much, somewhat, or not at all beside the noise of single samples."""
    generator = np.random.Generator(np.random.Philox(1))
    inside = 0
    for number in range(100):
        shared = generator.normal(0, 3, (3, 1)) + generator.normal(30, 4, (1, 40))
        found = [shared + generator.normal(0, own, (3, 1)) + generator.normal(0, noise, (3, 40)) for _ in range(2)]
        _, low, high = difference(losses(found[0]), losses(found[1] + 0.7), seed=number)
        inside += low <= 0.7 / math.log(2) / 10 <= high
    assert inside >= 88


def test_seeds_that_agree_are_told_apart_where_seeds_alone_are_not() -> None:
    """What a seed makes better or worse for both is no difference."""
    generator = np.random.Generator(np.random.Philox(2))
    seeds = np.array([[0.0], [8.0], [20.0]])
    first = seeds + generator.normal(30, 4, (1, 100)) + generator.normal(0, 1, (3, 100))
    _, low, high = difference(losses(first), losses(first + 1 + generator.normal(0, 0.1, (3, 1))), seed=0)
    assert 0 < low < 1 / math.log(2) / 10 < high
    _, low, high = difference(losses(first), losses(first[[1, 2, 0]] + 1), seed=0)
    assert low < 0 < high


def test_one_seed_says_what_the_samples_say() -> None:
    generator = np.random.Generator(np.random.Philox(3))
    first = generator.normal(30, 4, (1, 400))
    second = first + 1 + generator.normal(0, 2, (1, 400))
    bits, low, high = difference(losses(first), losses(second), seed=0)
    error = (second - first).std(ddof=1) / 20 / math.log(2) / 10
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.1)
    assert (high + low) / 2 == pytest.approx(bits)


def leave_losses(location: Storage, trial: Trial, nats: list[float], text_bytes: list[float]) -> None:
    best = {name: float(value) for name, value in trial.best.items()}
    outcome = {"best_step": 20, "best": best, "precision": "float32", "device": "cpu", "samples": []}
    outcome["losses"] = {"nats": nats, "bytes": text_bytes}
    trial_location(location, trial.identity).write(OUTCOME, json.dumps(outcome).encode())


def test_configs_are_compared_on_their_samples_or_else_on_their_seeds(tmp_path: Path) -> None:
    plan, location = a_plan(confirm=RULE), open_storage(tmp_path)
    trials = with_repeats(plan, a_search(2.0, 1.8, 1.9), (2.0, 3), (1.9, 3), (2.2, 3), (2.0, 3))
    for trial in trials[3:]:
        nats = 10 * math.log(2) * trial.best[METRIC]
        leave_losses(location, trial, [nats - 1, nats + 1], [10.0, 10.0])
    found = confirmation_of(plan, trials, location)
    assert found is not None
    assert found.difference is not None
    assert found.difference.bits == pytest.approx(0.15)
    assert (found.difference.seeds, found.difference.samples) == (2, 2)
    assert found.sentence.startswith(
        "trial 002 before trial 001: not told apart: 0.150 bits per byte between them (95%"
    )
    assert found.lines()[0] == (
        "confirmed: trial 002, mean 1.950 bits per byte, standard deviation 0.071, over 2 of 2 new seeds"
    )
    # samples of another length are not the same samples
    leave_losses(location, trials[3], [1.0], [10.0])
    order = confirmed(found.configs, plan.search_objective, RULE)
    on_seeds = compare(order[0], order[1], plan.search_objective, location, seed=0)
    assert on_seeds is not None
    assert (on_seeds.samples, on_seeds.seeds) == (None, 2)
    assert on_seeds.bits == pytest.approx(0.15)
    # from two differences of 0.1 and 0.2: 0.15 +- 12.7 x 0.05, as Student's t has it
    assert (on_seeds.high - on_seeds.low) / 2 == pytest.approx(12.706 * 0.05, rel=0.1)
    assert "over 2 seeds)" in str(on_seeds)


def test_what_is_told_apart_is_said_plainly(tmp_path: Path) -> None:
    plan, location = a_plan(confirm=RULE), open_storage(tmp_path)
    trials = with_repeats(plan, a_search(2.0, 1.8, 1.9), (2.0, 3), (1.9, 3), (2.1, 3), (2.0, 3))
    for trial in trials[3:]:
        leave_losses(location, trial, [10 * math.log(2) * trial.best[METRIC]] * 4, [10.0] * 4)
    found = confirmation_of(plan, trials, location)
    assert found is not None
    assert found.sentence == (
        "trial 002 before trial 001: better by 0.100 bits per byte "
        "(95% interval 0.100 to 0.100, over 2 seeds and 4 validation samples)"
    )
    file = tmp_path / "confirmation.json"
    file.write_text(json.dumps(found.to_json()))
    values = read_confirmation(file)
    assert (values["winner"], values["sentence"]) == ("002", found.sentence)
    assert values["configs"][0]["values"] == [1.9, 2.0]
    # 1.95 +- 12.7 x 0.05, as Student's t has it with one degree of freedom
    assert values["configs"][0]["interval"] == pytest.approx([1.95 - 0.635, 1.95 + 0.635], abs=1e-3)
    assert mean_interval([1.9, math.nan]) is None
    assert mean_interval([2.0, 2.0, 2.0]) == [2.0, 2.0]


# -------------------------------------------------------------------------------- plan, estimate, end


def test_the_rule_is_part_of_the_plan_and_may_be_given_later(tmp_path: Path) -> None:
    storage, rule = open_storage(tmp_path / "s"), replace(RULE, steps=40, share=0.5)
    plan = a_plan(confirm=rule)
    storage.write(PLAN, plan.to_json())
    found = read_plan(storage)
    assert found is not None
    assert found.confirm == rule
    assert a_plan().differences(found) == []
    _, begun = stored_plan("s", str(tmp_path))
    assert (begun.confirm, begun.confirm_steps, begun.confirm_share) == ("2:2", 40, 0.5)
    assert begun.confirmation(plan.seed) == rule
    storage.write(PLAN, json.dumps(json.loads(plan.to_json()) | {"confirm": {"configs": 0}}).encode())
    with pytest.raises(UserError, match=r"search\.json is not a search's plan: confirm"):
        read_plan(storage)


def test_the_estimate_counts_what_confirms() -> None:
    plan, trials = a_plan(confirm=replace(RULE, steps=10), num_samples=3), a_search(2.0, 1.8, 1.9)
    assert repeat_share(plan) == 0.5
    assert repeats_left(plan, trials[:2]) == 4
    assert repeats_left(plan, [*trials, *new_repeats(plan, trials)[:1]]) == 4
    assert repeats_left(plan, with_repeats(plan, trials, *[(2.0, 3.0)] * 4)) == 0
    assert repeats_left(a_plan(), trials) == 0
    estimate = Estimate(
        num_trials=8, num_repeats=4, repeat_share=0.5, concurrent=3, workers=2, trial_seconds=3600.0, price=1.0
    )
    assert (estimate.hours, estimate.worker_hours) == (3 + 2 * 0.5, 2 * (8 + 4 * 0.5))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--confirm", "3"], "--confirm is '3': give K:S, the number of configs and of new seeds for each"),
        (["--confirm", "0:3"], "--confirm is 0:3: give at least 1 config and 1 to 1000 new seeds"),
        (["--confirm", "3:0"], "--confirm is 3:0: give at least 1 config"),
        (["--confirm", "3:3", "--confirm-steps", "0"], "--confirm-steps is 0: must be positive"),
        (["--confirm", "3:3", "--confirm-share", "1.5"], "--confirm-share is 1.5: must be in (0, 1]"),
        (["--confirm-steps", "100"], "--confirm-steps needs --confirm K:S"),
        (["--confirm-share", "0.5"], "--confirm-share needs --confirm K:S"),
    ],
)
def test_a_rule_that_cannot_be_is_one_line(refused: Callable[..., str], arguments: list[str], line: str) -> None:
    assert line in refused("tune", "hybrid", *arguments)


def test_card_description_and_table_say_how_it_was_confirmed(corpus: Corpus, tmp_path: Path) -> None:
    found = searcher(a_plan(confirm=RULE, min_used=1.0), corpus, tmp_path)
    plan = found.search.plan
    trials = with_repeats(plan, a_search(2.0, 1.8, 1.9), (2.0, 3), (1.9, 3), (2.2, 3), (2.0, 0.1))
    confirmation = confirmation_of(plan, trials, found.search.location)
    assert confirmation is not None
    best = winner(trials, plan.search_objective, RULE)
    assert best is not None
    card = model_card(found.search, best, [], "", confirmation)
    assert "This model is the best seed of the winner, seed 1003" in card
    assert "mean 2.100 bits per byte, standard deviation 0.141; the constraint held in 2 of 2 new seeds\n" in card
    assert "- no other config kept the constraint in all of its new seeds\n" in card
    assert "| 002 | 1.900 | 1.950 | 0.071 | 1 of 2 | 1.900 2.000 |" in card
    ladder: Any = type("L", (), {"comparison": lambda *_: "", "warning": lambda *_: None})()
    text = description(found.search, trials, best, ladder, "m", "#", 1.0, confirmation)
    assert "\nNo other config kept the constraint in all of its new seeds.\n" in text
    columns = table(trials, plan.search_objective)
    assert columns["confirms"] == ["", "", "", "001", "002", "001", "002"]
    assert sorted(columns["rank"][:3]) == [1, 2, 3]
    assert columns["seed"][3:] == [1003, 1003, 1004, 1004]
    # nothing is registered where no config has held
    trials[3].best = figures(2.0, 0.1)
    assert best_checkpoint(found.search, trials) is None


def test_records_keep_what_a_repeat_confirms(tmp_path: Path) -> None:
    plan, records = a_plan(confirm=RULE), TrialStore(open_storage(tmp_path))
    (first, *_) = new_repeats(plan, a_search(2.0, 1.8, 1.9))
    records.add(first)
    assert records.read() == [first]
    damaged = json.loads(first.to_json()) | {"confirms": -1}
    with pytest.raises(ValueError, match="confirms is -1"):
        Trial.from_json(json.dumps(damaged).encode())

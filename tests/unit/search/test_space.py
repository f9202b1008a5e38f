"""Search spaces: what they may define, every point of a grid, and that a mistake in one is one line."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest

from raytrain.config.models import MODELS, ModelName
from raytrain.config.presets import full_size, preset
from raytrain.config.schema import RunConfig, flatten, override
from raytrain.search import space as spaces
from raytrain.search.space import Space, check_space, find_space, grid, load_space, read_space
from raytrain.utils.errors import UserError
from tests.conftest import tiny_config

SHIPPED = sorted(path.stem for path in (Path(__file__).parents[3] / "search_spaces").glob("*.py"))


def defined(body: str, *rest: str) -> Space:
    """The space whose function has ``body``, beside what ``rest`` defines."""
    return read_space("mine", "\n".join([*rest, "def space(trial, budget=None):", f"    {body}"]))


def bases(*models: ModelName) -> dict[ModelName, RunConfig[Any]]:
    return {model: tiny_config(model) for model in models or ("hybrid",)}


# ---------------------------------------------------------------------------------------------- grid


def test_a_grid_has_every_point_once_and_the_last_parameter_changes_first() -> None:
    space = defined(
        "return {'seed': trial.suggest_int('seed', 1, 5, step=2), 'alpha': trial.suggest_float('a', 0, 0.3, step=0.1),"
        " 'x': trial.suggest_categorical('x', ['p', None])}"
    )
    points = grid(space, None)
    expected = [
        {"seed": seed, "a": index / 10, "x": x} for seed in (1, 3, 5) for index in range(4) for x in ("p", None)
    ]
    assert points == expected
    assert [type(points[0][name]) for name in ("seed", "a")] == [int, float]


def test_the_branches_of_a_grid_ask_different_questions() -> None:
    space = defined(
        "kind = trial.suggest_categorical('kind', ['plain', 'cyclical', 'deep'])\n"
        "    if kind == 'cyclical':\n"
        "        trial.suggest_int('cycles', 2, 3)\n"
        "        trial.suggest_categorical('kind', ['asked', 'again'])\n"
        "    if kind == 'deep':\n"
        "        for layer in range(trial.suggest_int('layers', 1, 2)):\n"
        "            trial.suggest_categorical(f'width-{layer}', [8, 16])\n"
        "    return {}"
    )
    assert grid(space, None) == [
        {"kind": "plain"},
        {"kind": "cyclical", "cycles": 2},
        {"kind": "cyclical", "cycles": 3},
        {"kind": "deep", "layers": 1, "width-0": 8},
        {"kind": "deep", "layers": 1, "width-0": 16},
        {"kind": "deep", "layers": 2, "width-0": 8, "width-1": 8},
        {"kind": "deep", "layers": 2, "width-0": 8, "width-1": 16},
        {"kind": "deep", "layers": 2, "width-0": 16, "width-1": 8},
        {"kind": "deep", "layers": 2, "width-0": 16, "width-1": 16},
    ]


def test_a_grid_without_questions_is_one_point() -> None:
    assert grid(defined("return {}"), None) == [{}]


def test_every_point_of_a_grid_is_drawn_by_optuna_as_it_stands() -> None:
    """A search enqueues them one by one: none may be refused or come out as another."""
    space = defined(
        "kind = trial.suggest_categorical('annealing', ['constant', 'linear'])\n"
        "    alpha = trial.suggest_float('alpha', 0, 0.6, step=0.2)\n"
        "    fields = {'objective.annealing': kind, 'objective.alpha': alpha}\n"
        "    if kind == 'linear':\n"
        "        fields['objective.end'] = trial.suggest_float('end', 0.15, 0.45, step=0.15)\n"
        "    return fields | {'model.latent': trial.suggest_int('latent', 4, 12, step=4)}"
    )
    points = grid(space, None)
    assert len(points) == 4 * 3 + 4 * 3 * 3
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = []
    for point in points:
        study.enqueue_trial(point)
        trial = study.ask()
        drawn.append(space.resolve(bases(), trial, None))
        assert trial.params == point
        assert all(kind._contains(kind.to_internal_repr(point[name])) for name, kind in trial.distributions.items())
    assert drawn == check_space(space, bases(), None, "grid", 0)
    assert len({str(config) for config in drawn}) == len(points)


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("trial.suggest_float('a', 0.0, 1.0)", "a grid needs a step for 'a'"),
        ("trial.suggest_float('a', 1e-3, 1.0, log=True)", "a grid needs a step for 'a'"),
        ("trial.suggest_int('a', 1, 64, log=True)", "a grid cannot have 'a' on a logarithmic scale"),
        ("[trial.suggest_int(str(i), 0, 9) for i in range(5)]", "the grid has more than 10,000 points"),
    ],
)
def test_what_is_no_grid_is_refused(question: str, words: str) -> None:
    space = defined(f"{question}\n    return {{}}")
    with pytest.raises(UserError, match=words):
        grid(space, None)
    with pytest.raises(UserError, match=f"search space mine: {words}"):
        check_space(space, bases(), None, "grid", 0)
    assert len(check_space(space, bases(), None, "tpe", 0)) == spaces.CHECKED_POINTS


def test_the_largest_grid_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spaces, "LARGEST_GRID", 12)
    assert len(grid(defined("return {'seed': trial.suggest_int('s', 1, 12)}"), None)) == 12
    with pytest.raises(UserError, match="more than 12 points"):
        grid(defined("return {'seed': trial.suggest_int('s', 1, 13)}"), None)


# ----------------------------------------------------------------------------------- what it defines


def test_a_space_is_told_its_budget() -> None:
    space = defined(
        "return {'seed': trial.suggest_int('s', 0, {'small': 1, 'full': 3}[budget])}",
        "BUDGETS = {'small': {'steps': 10}, 'full': {'steps': 1000}}",
    )
    assert space.budget(None) == "small"
    assert space.budget("full") == "full"
    with pytest.raises(UserError, match=r"--budget huge: search space mine has no such budget; it has small, full"):
        space.budget("huge")
    assert [len(grid(space, budget)) for budget in ("small", "full")] == [2, 4]
    assert {config.seed for config in check_space(space, bases(), "full", "grid", 0)} == {0, 1, 2, 3}
    plain = defined("return {}")
    assert plain.budget(None) is None
    with pytest.raises(UserError, match=r"--budget small: .* it has none"):
        plain.budget("small")


def test_a_space_chooses_the_model_of_a_trial() -> None:
    space = defined(
        "model = trial.suggest_categorical('model', ['hybrid', 'lstm_vae'])\n"
        "    return {'model': model, 'model.latent': 6, 'seed': trial.suggest_int('s', 0, 1)}",
        "MODELS = ['hybrid', 'lstm_vae']",
    )
    assert space.models == ("hybrid", "lstm_vae")
    configs = check_space(space, bases("hybrid", "lstm_vae"), None, "grid", 0)
    assert [(config.model_name, config.seed) for config in configs] == [
        ("hybrid", 0),
        ("hybrid", 1),
        ("lstm_vae", 0),
        ("lstm_vae", 1),
    ]
    assert {config.model.latent for config in configs} == {6}
    with pytest.raises(UserError, match="chose model 'lstm_vae': MODELS names hybrid"):
        check_space(space, bases("hybrid"), None, "grid", 0)
    first = defined("return {}", "MODELS = ('byte_lstm',)")
    assert check_space(first, bases("byte_lstm"), None, "grid", 0)[0].model_name == "byte_lstm"


def test_what_a_space_may_define() -> None:
    space = defined("return {}", "PRESET = 'paper-ptb'", "ALGORITHM = 'grid'", "MODELS = ['hybrid']")
    assert (space.preset, space.algorithm, space.models) == ("paper-ptb", "grid", ("hybrid",))
    plain = defined("return {}")
    assert (plain.preset, plain.algorithm, plain.models, plain.budgets) == (None, "tpe", (), {})


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("MODELS = ['hybrid', 'gpt']", "MODELS has 'gpt': must be one of hybrid, lstm_vae, byte_lstm"),
        ("MODELS = 'hybrid'", "MODELS must be a list of names"),
        ("MODELS = 3", "MODELS must be a list of names"),
        ("PRESET = 'huge'", "PRESET has 'huge': must be one of laptop"),
        ("PRESET = ['laptop']", "PRESET has .'laptop'.: must be one of laptop"),
        ("ALGORITHM = 3", "ALGORITHM has 3: must be a name"),
        ("START = [0.5]", "START must be a dict of the values"),
        ("BUDGETS = ['small']", "BUDGETS must be a dict"),
        ("BUDGETS = {'small': 100}", "BUDGETS must be a dict"),
    ],
)
def test_what_a_space_may_not_define(line: str, words: str) -> None:
    with pytest.raises(UserError, match=f"search space mine: {words}"):
        defined("return {}", line)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("", "has no function space"),
        ("space = 5", "has no function space"),
        ("def space(trial:\n", "SyntaxError"),
        ("import nothing_of_that_name", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("1 / 0", "ZeroDivisionError"),
        ("a\0b", "cannot be loaded"),
    ],
)
def test_a_file_that_is_no_space_is_one_line(source: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(source)
    with pytest.raises(UserError, match=words) as caught:
        load_space(str(tmp_path / "bad.py"))
    assert "\n" not in str(caught.value)
    assert "bad" in str(caught.value)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return None", "returned NoneType: must return a dict"),
        ("return {'model.latnet': 4}", "unknown field 'model.latnet' for hybrid; known: "),
        ("return {'model.latent': 'four'}", "model.latent is 'four': must be int"),
        ("return {'model.latent': 0}", "latent"),
        ("return {'model': 'gpt'}", "chose model 'gpt': MODELS names hybrid"),
        ("return trial.suggest_nothing('x')", "AttributeError"),
        ("return {'seed': trial.suggest_int('s', 5, 1)}", "search space mine: "),
        ("return {'seed': trial.suggest_categorical('s', [])}", "search space mine: "),
    ],
)
@pytest.mark.parametrize("algorithm", ["random", "grid"])
def test_a_space_that_draws_what_cannot_be_is_one_line(body: str, words: str, algorithm: Any) -> None:
    with pytest.raises(UserError, match=words) as caught:
        check_space(defined(body), bases(), None, algorithm, 0)
    assert "\n" not in str(caught.value)


START_BODY = "return {'objective.alpha': trial.suggest_float('a', 0.0, 1.0), 'seed': trial.suggest_int('s', 0, 9)}"


@pytest.mark.parametrize("start", [{"a": 0.25, "s": 7}, {"s": 7}])
def test_a_space_is_checked_at_its_start_first(start: dict[str, Any]) -> None:
    space = defined(START_BODY, f"START = {start}")
    first, *others = check_space(space, bases(), None, "tpe", 0)
    assert first.seed == 7
    assert (first.objective.alpha == 0.25) == ("a" in start)
    assert len({config.seed for config in others}) > 1


@pytest.mark.parametrize(
    ("start", "words"),
    [
        ({"b": 1.0}, "START has 'b', for which space.trial. does not ask there"),
        ({"a": 1.5}, "START: .*1.5.*'a'.*FloatDistribution"),
        ({"s": "three"}, "'three' is not a valid type"),
    ],
)
def test_a_start_that_is_no_point_of_the_space_is_one_line(start: dict[str, Any], words: str) -> None:
    space = defined(START_BODY, f"START = {start}")
    with pytest.raises(UserError, match=f"search space mine: .*{words}") as caught:
        check_space(space, bases(), None, "tpe", 0)
    assert "\n" not in str(caught.value)
    grid = defined("return {'seed': trial.suggest_categorical('s', [1, 2])}", f"START = {start}")
    assert len(check_space(grid, bases(), None, "grid", 0)) == 2  # which begins with its own first point


@pytest.mark.parametrize(
    "choices",
    ["[(1, 8), (2, 16)]", "[[1], [2]]", "[{'a': 1}]", "[1, float('nan')]", "[b'x']", "[__import__('numpy').int64(8)]"],
)
@pytest.mark.parametrize("algorithm", ["tpe", "grid"])
def test_a_choice_that_a_record_changes_is_refused_before_the_search(choices: str, algorithm: Any) -> None:
    """A tuple would be a list when the search is resumed, and no known trial a point of the space."""
    body = f"trial.suggest_categorical('shape', {choices}); return {{}}"
    with pytest.raises(UserError, match=r"search space mine: 'shape' has the choice .*give texts, numbers"):
        check_space(defined(body), bases(), None, algorithm, 0)


def test_a_choice_that_a_record_keeps_is_not() -> None:
    choices = "['a', 1, 0.5, True, None, float('inf'), __import__('numpy').float64(2)]"
    body = f"trial.suggest_categorical('x', {choices}); return {{}}"
    assert len(check_space(defined(body), bases(), None, "grid", 0)) == 7


def test_a_branch_that_is_entered_seldom_is_checked_too() -> None:
    space = defined(
        "rare = trial.suggest_int('rare', 0, 15)\n    return {'no_such': 1} if rare == 15 else {'seed': rare}"
    )
    with pytest.raises(UserError, match="unknown field 'no_such'"):
        check_space(space, bases(), None, "tpe", 0)


def test_a_space_may_hold_dataclasses() -> None:
    source = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Point:\n    seed: int\n\ndef space(trial):\n    return {'seed': Point(3).seed}\n"
    )
    assert [config.seed for config in check_space(read_space("mine", source), bases(), None, "grid", 0)] == [3]


# ------------------------------------------------------------------------------------------- finding


def test_a_space_is_found_by_name_here_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_space("hybrid") == Path(__file__).parents[3] / "search_spaces" / "hybrid.py"
    (tmp_path / "search_spaces").mkdir()
    (tmp_path / "search_spaces" / "hybrid.py").write_text("def space(trial):\n    return {'seed': 7}\n")
    mine = load_space("hybrid")
    assert (mine.name, mine.source) == ("hybrid", (tmp_path / "search_spaces" / "hybrid.py").read_text())
    assert mine.resolve(bases(), None, None).seed == 7
    with pytest.raises(UserError, match=r"no search space 'nothing': looked for nothing\.py in search_spaces, "):
        load_space("nothing")
    with pytest.raises(UserError, match=r"--space nothing\.py: there is no such file"):
        load_space("nothing.py")
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(UserError, match=r"--space folder\.py: is a directory"):
        load_space("folder.py")
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"--space binary\.py: not a Python file"):
        load_space("binary.py")


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_spaces_draw_what_can_be_run(name: str) -> None:
    space = load_space(name)
    models = space.models or (name,)
    assert set(models) <= set(MODELS), f"{name}: neither MODELS nor its own name says which models it is for"
    presets = [space.preset] if space.preset else ["laptop", *{full_size(model) for model in models}]
    for chosen in presets:
        for budget in space.budgets or [None]:
            changes = space.budgets[budget] if budget is not None else {}
            warm_starts: dict[ModelName, RunConfig[Any]] = {
                model: override(preset(chosen, model), changes) for model in models
            }
            configs = check_space(space, warm_starts, budget, space.algorithm, 0)
            if space.start and chosen == "laptop":  # the newcomer's search has what is known to work
                first, known = flatten(configs[0]), flatten(warm_starts[name])
                if name == "hybrid":
                    capacity = math.sqrt(1 - math.exp(-2 * space.start["least_kl"] / known["model.latent"]))
                    known |= {"model.fixed_variance": True, "model.mean_norm": capacity}
                assert first.pop("model.mean_norm", 0.0) == pytest.approx(known.pop("model.mean_norm", 0.0))
                assert first == known
            assert len({str(config) for config in configs}) > 1
            assert {config.model_name for config in configs} == set(models)


def test_importing_it_loads_nothing_heavy() -> None:
    code = "import sys, raytrain.search.space; assert not {'optuna', 'torch', 'ray', 'mlflow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

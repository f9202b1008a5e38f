"""JSON that somebody else has written: what is refused, and what is made of the rest."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from raytrain.utils.validation import DEEPEST, parse_json, validate_object, validate_type


def test_json_that_could_be_read_but_not_copied_is_refused() -> None:
    for depth, good in ((DEEPEST, True), (DEEPEST + 1, False), (900, False), (100_000, False)):
        for start, inner, end in (("[", "[]", "]"), ('{"a":', "{}", "}")):
            text = start * (depth - 1) + inner + end * (depth - 1)
            if good:
                copy.deepcopy(parse_json(text))
            else:
                with pytest.raises(ValueError, match="nested"):
                    parse_json(text)


@pytest.mark.parametrize(
    ("value", "hint", "line"),
    [
        ([1, "2"], tuple[int, ...], "x is '2': must be int"),
        ({"a": [True]}, dict[str, list[float]], r"x\.a is True: must be a number"),
        (
            {"gpt": 1},
            dict[Literal["hybrid", "lstm_vae"], int],
            "x is 'gpt': must be one of hybrid, lstm_vae",
        ),
        ([], dict[str, Any], r"x is \[\]: must be an object"),
        ({}, list[str], "x is {}: must be a list"),
        (2**63, int | None, "x is a number of 64 bits: must fit in 63"),
    ],
)
def test_a_value_of_another_type_is_named(value: Any, hint: Any, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        validate_type(value, hint, "x")


def test_values_are_made_what_their_types_say() -> None:
    found = validate_type({"a": [1, 2.5], "b": [10**400]}, dict[str, tuple[float, ...]], "x")
    assert found == {"a": (1.0, 2.5), "b": (math.inf,)}
    assert [type(value) for value in found["a"]] == [float, float]
    assert validate_type(None, int | None, "x") is None
    assert validate_type({"a": [None, "x"]}, dict[str, Any], "x") == {"a": [None, "x"]}


@dataclass(frozen=True)
class Point:
    """A record with one field that must be there."""

    x: float
    tags: list[str] = field(default_factory=list)
    name: str = ""


def test_an_object_becomes_a_dataclass_or_is_refused_by_a_line_that_names_the_field() -> None:
    assert validate_object(Point, {"x": 1}) == Point(1.0)
    assert validate_object(Point, {"x": 2.5, "tags": ["a"]}) == Point(2.5, ["a"])
    for values, line in (
        ({}, "it has no x"),
        ({"x": "1"}, "x is '1': must be a number"),
        ({"x": 1, "y": 2}, "unknown field y; known: x, tags, name"),
        ([], "it must be an object, got list"),
    ):
        with pytest.raises(ValueError, match=line):
            validate_object(Point, values)
    with pytest.raises(ValueError, match="point has no x"):
        validate_object(Point, {}, "point.")

"""The Python API: what belongs to the command line alone is refused."""

from __future__ import annotations

from typing import Any

import pytest

from raytrain import api
from raytrain.utils.errors import UserError


@pytest.mark.parametrize(
    ("call", "settings"),
    [
        (api.tune, {"resume": "s"}),
        (api.tune, {"ablate": "s"}),
        (api.train, {"resume": "s"}),
        (api.train, {"best_of": "s"}),
    ],
)
def test_options_of_the_command_line_are_refused(call: Any, settings: dict[str, str]) -> None:
    with pytest.raises(UserError, match="resume, best_of and ablate are options of the command line"):
        call("hybrid", **settings)

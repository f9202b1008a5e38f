from __future__ import annotations

import json
from pathlib import Path

import pytest

from raytrain.data.corpus import Corpus
from raytrain.errors import UserError
from raytrain.session import RUN, claim_name, read_claim
from raytrain.storage import FolderStorage
from tests.conftest import tiny_config


def test_a_name_keeps_its_run_and_the_experiment_that_it_was_begun_in(corpus: Corpus, tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path)
    first = claim_name(storage, "mine", tiny_config("hybrid"), corpus, "tweets")
    assert (
        claim_name(storage, "mine", tiny_config("hybrid"), corpus, "raytrain") == first == read_claim(storage, "mine")
    )
    assert first.experiment == "tweets"
    with pytest.raises(UserError, match="belongs to a run with another config"):
        claim_name(storage, "mine", tiny_config("hybrid", steps=7), corpus, "tweets")


@pytest.mark.parametrize(
    "change", [{"experiment": 3}, {"experiment": "\ud800"}, {"identity": 1}, {"corpus": "../.."}, {"unheard": 1}]
)
def test_a_claim_that_cannot_be_read_is_one_line(corpus: Corpus, tmp_path: Path, change: dict[str, object]) -> None:
    storage = FolderStorage(tmp_path)
    claim_name(storage, "mine", tiny_config("hybrid"), corpus, "raytrain")
    values = json.loads(storage.read(f"mine/{RUN}"))
    storage.write(f"mine/{RUN}", json.dumps(values | change).encode())
    with pytest.raises(UserError, match="does not say whose the name is"):
        read_claim(storage, "mine")


def test_a_run_that_was_begun_before_experiments_were_noted_is_resumed(corpus: Corpus, tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path)
    claim_name(storage, "mine", tiny_config("hybrid"), corpus, "tweets")
    values = json.loads(storage.read(f"mine/{RUN}"))
    del values["experiment"]
    storage.write(f"mine/{RUN}", json.dumps(values).encode())
    assert read_claim(storage, "mine").experiment == "raytrain"

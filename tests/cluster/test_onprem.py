"""docs/onprem.yaml on three hosts with a laptop in another network: ``tests/cluster/onprem_story.py`` does it, once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cluster.onprem_story import STAYS, TRIALS, Story
from tests.support.lab import NETWORK
from tests.support.onprem import HOSTS
from tests.support.story import played

DOCS = (Path(__file__).parents[2] / "docs" / "guides" / "cluster.md").read_text()
pytestmark = pytest.mark.long
LOOPBACK = ("127.0.0.1", "::1")


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """What was seen."""
    return Story(**played("tests.cluster.onprem_story", tmp_path_factory.mktemp("onprem")))


def test_the_filled_in_file_has_no_mistake(story: Story) -> None:
    assert "no mistake found. A head and at most 2 workers" in story.check


def test_a_search_is_finished_though_a_hosts_raylet_dies(story: Story) -> None:
    assert story.worker_spec == {"head": 0, "one": 1, "two": 1}
    code, said = story.search
    assert code == 0, said[-3000:]
    assert [trial for trial, _ in story.runs] == ["", *map(str, range(TRIALS))]
    statuses = [status for _, status in story.runs]
    assert statuses[:2] == ["FINISHED", "FINISHED"]
    assert set(statuses) <= {"FINISHED", "KILLED"}  # killed: others were better


def test_its_champion_is_in_the_bucket_and_outlives_the_cluster(story: Story) -> None:
    assert re.search(r"models:/raytrain-hybrid@champion \(version 1\)", story.search[1])
    names = [Path(name) for name in story.objects]
    assert any("mlflow-artifacts" in name.parts and name.suffix == ".safetensors" for name in names)
    assert "raytrain/mlflow.db" in story.objects
    assert story.sample.strip()


def test_no_cpu_is_held_after_it(story: Story) -> None:
    assert "LEFT []" in story.left


def test_down_leaves_nothing_but_what_the_documentation_names(story: Story) -> None:
    for name in HOSTS:
        others = [line for line in story.after_down[name] if not line.startswith("sshd")]
        stays = ("mlflow", "raytrain.tracking serve") if name == "head" else (STAYS,)
        assert all(any(sign in line for sign in stays) for line in others), others
        assert name != "head" or others


def test_only_ssh_answers_from_another_network(story: Story) -> None:
    assert story.answering["firewall"] == {name: [22] for name in HOSTS}


def test_it_is_the_firewall_that_keeps_others_out(story: Story) -> None:
    """The other way round: each port that listens on more than the loopback card answers without it."""
    for name in HOSTS:
        reached = {port for _, address, port in story.listening[name] if not is_loopback(address)}
        assert len(reached) > 5
        assert set(story.answering["none"][name]) == reached


@pytest.mark.parametrize("what", ["job", "driver"])
def test_without_the_token_nothing_is_done(story: Story, what: str) -> None:
    code, said = story.joined[f"{what} with the token"]
    assert code == 0, said
    for who in ("without a token", "with another token"):
        code, said = story.joined[f"{what} {who}"]
        assert code != 0
        assert re.search("(?i)unauthenticated|unauthorized|authentication", said), said
        assert "inside" not in said


def test_what_listens_is_what_the_documentation_says(story: Story) -> None:
    table = DOCS.partition("<!-- listening -->")[2].partition("\n\n")[0]
    documented = re.findall(r"^\| `([^`]+)`[^|]*\|[^|]*\| ([a-z, ]+) \|", table, re.M)
    assert len(documented) > 5
    for name in HOSTS:
        for line, address, port in story.listening[name]:
            where = "localhost" if is_loopback(address) else "private" if f"{NETWORK}." in address else "all"
            allowed = next((cards for sign, cards in documented if sign in line), "")
            assert where in allowed.split(", "), f"{line} listens on {address}, port {port}"


def is_loopback(address: str) -> bool:
    return address.removeprefix("::ffff:") in LOOPBACK

"""cluster.yaml from an empty account to a search and back to nothing: ``tests/cluster/aws_story.py`` does it, once.

Against moto's EC2 and IAM, in a lab without a way out: moto gives out public addresses that really exist.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from raytrain.cluster.check.file import at, read_file
from tests.cluster.aws_story import TRIALS, Story
from tests.support.aws_box import BUCKET, FILE, WORKERS, filled_in
from tests.support.site import ROOT
from tests.support.story import played

pytestmark = pytest.mark.long

KINDS = read_file(ROOT / FILE).types


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """What was seen."""
    return Story(**played("tests.cluster.aws_story", tmp_path_factory.mktemp("aws")))


def asked(story: Story, action: str) -> list[dict[str, str]]:
    """The parameters of all that the head asked of AWS by ``action``, and was not refused."""
    found = [request for request in story.requests if request[0] == "raytrain-head"]
    return [parameters for _, name, refused, parameters in found if name == action and not refused]


def numbered(parameters: dict[str, str], name: str) -> list[str]:
    """The values of a list in a request: InstanceId.1, InstanceId.2 and so on."""
    return [value for key, value in parameters.items() if re.fullmatch(rf"{name}\.\d+", key)]


def test_the_file_is_the_one_that_ships() -> None:
    """But for what is marked CHANGE, and the minutes without work."""
    shipped, filled = ((text.splitlines()) for text in ((ROOT / FILE).read_text(), filled_in()))
    differ = [(old, new) for old, new in zip(shipped, filled, strict=True) if old != new]
    assert len(differ) == 5
    assert all(old.endswith("# CHANGE") or old.startswith("idle_timeout_minutes:") for old, _ in differ)


def test_it_has_no_mistake(story: Story) -> None:
    assert "no mistake found. At most, in us-west-2:" in story.check
    assert "3 x g5.2xlarge, spot, 1 GPUs each (gpu_spot)" in story.check


def test_instances_are_what_the_file_says(story: Story) -> None:
    replacements = [one for one in (*story.after_notice, *story.after_cut) if one not in story.first]
    assert [one["kind"] for one in story.first] == ["gpu_spot", "gpu_spot"]
    for one in (story.head, *story.first, *replacements):
        node = KINDS[one["kind"]]["node_config"]
        assert one["type"] == node["InstanceType"]
        assert one["profile"] == node["IamInstanceProfile"]["Name"]
        assert one["image"] == node["ImageId"]
        assert one["market"] == (at(node, "InstanceMarketOptions", "MarketType") or "on-demand")
        assert one["zone"] == "us-west-2a"


def test_the_workers_gpus_are_counted(story: Story) -> None:
    assert story.gpus["first"] == 2
    assert story.gpus["after notice"] >= 2
    assert story.gpus["after cut"] >= 2


def test_nothing_starts_before_it_is_needed(story: Story) -> None:
    """By the file of the autoscaler on the head: Ray publishes nowhere what may come."""
    most = sum(WORKERS.values())
    assert "3 trials (quick, tpe), each 2 x (1 CPU and 1 GPU) on CPUs" in story.dry_run
    assert "concurrent trials: 1, " in story.dry_run
    assert f"2 of {most} GPUs (0 CPUs and 0 GPUs online)" in story.dry_run


def test_a_worker_that_is_given_notice_is_left_and_replaced_by_a_spot_instance(story: Story) -> None:
    assert "EC2 will terminate this instance" in story.noticed["watcher"]
    assert "is drained" in story.noticed["watcher"]
    after = {one["id"]: one["kind"] for one in story.after_notice}
    assert story.noticed["id"] not in after
    assert list(after.values()) == ["gpu_spot", "gpu_spot"]
    assert len(after.keys() - {one["id"] for one in story.first}) >= 1


def test_without_spot_instances_an_on_demand_one_comes_when_the_file_says_so(story: Story) -> None:
    """Autoscaler v2 asks for spot instances again and again, whatever else the file has."""
    assert not story.without_spot
    assert sorted(one["kind"] for one in story.after_cut) == ["gpu_on_demand", "gpu_spot"]
    refused = [parameters for _, name, why, parameters in story.requests if why == "InsufficientInstanceCapacity"]
    assert refused
    assert all(parameters["InstanceMarketOptions.MarketType"] == "spot" for parameters in refused)


def test_the_search_is_finished_in_spite_of_all_that(story: Story) -> None:
    code, said = story.search
    assert code == 0, said[-3000:]
    # ASHA may stop some of them
    assert [trial for trial, _ in story.runs] == ["", *map(str, range(TRIALS))]
    statuses = dict(story.runs)
    assert statuses.pop("") == "FINISHED"
    assert "FINISHED" in statuses.values()
    assert set(statuses.values()) <= {"FINISHED", "KILLED"}
    assert "LEFT []" in story.left


def test_its_champion_is_in_the_bucket_and_outlives_the_cluster(story: Story) -> None:
    assert re.search(r"models:/raytrain-hybrid@champion \(version 1\)", story.search[1])
    names = [Path(name) for name in story.objects]
    assert any("mlflow-artifacts" in name.parts and name.suffix == ".safetensors" for name in names)
    assert "raytrain/mlflow.db" in story.objects
    assert story.sample.strip()


def test_after_down_nothing_runs(story: Story) -> None:
    assert list(story.instances) == ["terminated"]
    assert len(story.instances["terminated"]) >= 5
    assert json.loads(story.running) == []
    assert story.other == "running"


def test_the_policies_are_enough_and_no_more(story: Story) -> None:
    """What the instances asked for was never refused; what the head may do with EC2, it did."""
    assert not [request for request in story.requests if request[2] == "UnauthorizedOperation"]
    used = {action for role, action, _, _ in story.requests if role == "raytrain-head"}
    assert used == {action for action in story.account["head"] if action.startswith("ec2:")}
    assert not [action for role, action, _, _ in story.requests if role == "raytrain-worker"]
    assert not [action for action in story.account["worker"] if not action.startswith("s3:")]


def test_the_head_asks_within_the_conditions_of_its_policies(story: Story) -> None:
    """moto looks at none: each instance is tagged as it starts, and no other one is touched."""
    for parameters in asked(story, "ec2:RunInstances"):
        tags = {parameters[key]: parameters[key.replace("Key", "Value")] for key in parameters if key.endswith(".Key")}
        assert tags["ray-cluster-name"] == "raytrain"
        assert parameters["IamInstanceProfile.Name"] == "raytrain-worker"
        assert parameters["TagSpecification.1.ResourceType"] == "instance"
    own = set(story.instances["terminated"])
    for action, name in (("ec2:TerminateInstances", "InstanceId"), ("ec2:CreateTags", "ResourceId")):
        touched = {one for parameters in asked(story, action) for one in numbered(parameters, name)}
        assert touched
        assert touched <= own


def test_only_ssh_answers_from_outside(story: Story) -> None:
    assert len(story.listening) > 5
    assert story.answering == [22]


def test_the_storage_is_the_documented_bucket(story: Story) -> None:
    assert all(name.startswith("raytrain/") for name in story.objects)
    assert f"s3://{BUCKET}/raytrain/first" in story.search[1]

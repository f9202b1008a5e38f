"""The cluster files that ship, and what the check of them refuses: each mistake by one line that names it."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from importlib.metadata import requires, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from raytrain.cluster.check import check, summary
from raytrain.cluster.check.aws import GPUS
from raytrain.cluster.check.file import read_file
from raytrain.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
AWS = (ROOT / "cluster.yaml").read_text().replace("CHANGE-ME", "my-bucket")
ONPREM = (
    (ROOT / "docs" / "onprem.yaml")
    .read_text()
    .replace("CHANGE-ME-HEAD", "10.0.0.11")
    .replace("CHANGE-ME-1, CHANGE-ME-2", "10.0.0.12, 10.0.0.13")
    .replace("CHANGE-ME", "bucket")
)


@pytest.fixture
def laptop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a key and Ray's token; the working directory is the project's."""
    key = tmp_path / ".ssh" / "id_ed25519"
    key.parent.mkdir()
    key.touch()
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("0123456789abcdef")
    token.chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(ROOT)
    return tmp_path


def mistakes_in(text: str, folder: Path) -> list[str]:
    file = folder / "cluster.yaml"
    file.write_text(text)
    return check(read_file(file))


def changed(text: str, old: str, new: str) -> str:
    assert old in text, old
    return text.replace(old, new, 1)


# ------------------------------------------------------------------------------------- as they ship


@pytest.mark.parametrize("text", [AWS, ONPREM], ids=["aws", "onprem"])
def test_filled_in_it_has_no_mistake(text: str, laptop: Path) -> None:
    assert mistakes_in(text, laptop) == []


@pytest.mark.parametrize(("name", "count"), [("cluster.yaml", 1), ("docs/onprem.yaml", 6)])
def test_as_it_ships_only_the_placeholders_are_wrong(name: str, count: int, laptop: Path) -> None:
    found = check(read_file(ROOT / name))
    assert len(found) == count
    assert all("CHANGE-ME is still there" in line for line in found)


@pytest.mark.parametrize("name", ["cluster.yaml", "docs/onprem.yaml"])
def test_every_placeholder_is_marked(name: str) -> None:
    lines = (ROOT / name).read_text().splitlines()
    assert all("# CHANGE" in line for line in lines if "CHANGE-ME" in line)


@pytest.mark.parametrize("text", [AWS, ONPREM], ids=["aws", "onprem"])
def test_ray_takes_it(text: str) -> None:
    """As `ray up` reads it, before it asks AWS anything."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load(text))
    validate_config(config)
    assert config["head_setup_commands"] == config["worker_setup_commands"] == yaml.safe_load(text)["setup_commands"]


@pytest.mark.parametrize("text", [AWS, ONPREM], ids=["aws", "onprem"])
def test_the_set_up_can_be_done_twice_and_leads_to_the_shipped_project(text: str, tmp_path: Path) -> None:
    """In an empty home with Ubuntu's profile; what is installed is left out."""
    (tmp_path / ".profile").write_text(". ~/.bashrc\n")
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "raytrain").symlink_to(ROOT / "raytrain")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)

    def run(command: str) -> str:
        # as Ray does it; not from a folder in which raytrain is found anyway
        return subprocess.run(
            ["bash", "--login", "-c", "-i", command], cwd="/", capture_output=True, text=True, check=True, timeout=60,
            env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}, stdin=subprocess.DEVNULL, start_new_session=True,
        ).stdout  # fmt: skip

    for command in 2 * [command for command in yaml.safe_load(text)["setup_commands"] if "pip install" not in command]:
        run(command)
    assert (tmp_path / ".bashrc").read_text().count("raytrain.env") == 1
    assert run("python -c 'import raytrain; print(raytrain.__file__)'").strip().startswith(str(tmp_path / "project"))
    said = run("echo $RAY_AUTH_MODE $RAYTRAIN_STORAGE $MLFLOW_TRACKING_URI")
    assert re.fullmatch(r"token s3://(my-)?bucket/raytrain http://[\d.]+:5000\n", said), said


def test_ec2_knows_every_field() -> None:
    """Names and kinds of all that a node's request holds, by the model of EC2 that boto3 has."""
    from botocore.loaders import Loader
    from botocore.model import ServiceModel
    from botocore.validate import ParamValidator

    shape = ServiceModel(Loader().load_service_model("ec2", "service-2")).operation_model("RunInstances").input_shape
    for kind in yaml.safe_load(AWS)["available_node_types"].values():
        report = ParamValidator().validate({**kind["node_config"], "MinCount": 1, "MaxCount": 1}, shape)
        assert not report.has_errors(), report.generate_report()


def test_gpus_of_the_table_are_those_of_ec2() -> None:
    import moto

    (data,) = Path(moto.__file__).parent.glob("ec2/resources/instance_types.json*")
    types = json.loads(gzip.decompress(data.read_bytes()) if data.suffix == ".gz" else data.read_text())
    known = {name for name in GPUS if name in types}
    assert len(known) > 30
    for name in known:
        assert sum(gpu["Count"] for gpu in types[name]["GpuInfo"]["Gpus"]) == GPUS[name], name


def test_requirements_are_exact_and_those_of_the_project() -> None:
    from packaging.requirements import Requirement

    lines = [line for line in (ROOT / "cluster-requirements.txt").read_text().splitlines() if not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert pins["ray"] == version("ray")
    for wanted in map(Requirement, requires("raytrain") or []):
        if wanted.marker is None:
            assert wanted.specifier.contains(pins[wanted.name]), wanted


def test_the_summary_says_what_there_may_be(laptop: Path) -> None:
    (laptop / "cluster.yaml").write_text(AWS)
    said = summary(read_file(laptop / "cluster.yaml"))
    assert "1 x m6i.2xlarge, on-demand" in said
    assert "8 x g5.2xlarge, spot, 1 GPUs each" in said
    assert "2 x g5.2xlarge, on-demand, 1 GPUs each" in said
    assert "\nwarning: gpu_spot is one instance type in one zone, us-west-2a: while EC2 has none left there" in said
    for zones in ("us-west-2a,us-west-2b", ""):  # none are all of the region's
        (laptop / "cluster.yaml").write_text(
            AWS.replace("availability_zone: us-west-2a", f"availability_zone: {zones}")
        )
        assert "warning" not in summary(read_file(laptop / "cluster.yaml"))


# ---------------------------------------------------------------------------------- what is refused

HEAD_PROFILE, WORKER_PROFILE = "{Name: raytrain-head}", "{Name: raytrain-worker}"
SPOT_INSTANCE = "g5.2xlarge # CHANGE ("
SPOT_IMAGE = "      InstanceMarketOptions: {MarketType: spot}\n"
PROFILE_LINE = f"IamInstanceProfile: {WORKER_PROFILE}\n      "
SPOT_TYPE = "  gpu_spot:\n    resources: {GPU: 1}\n    min_workers: 0"
RULE = "security_group:\n    IpPermissions: [{FromPort: %s, ToPort: %s, IpProtocol: tcp, IpRanges: [{CidrIp: %s}]}]"
MLFLOW = '--host "$(hostname -I | cut -d" " -f1)"'

AWS_MISTAKES: dict[str, tuple[str, str, str]] = {
    "placeholder": ("s3://my-bucket", "s3://CHANGE-ME", r"setup_commands\[0\]: CHANGE-ME is still there"),
    "zone": (
        "availability_zone: us-west-2a",
        "availability_zone: eu-west-1a",
        r"availability_zone: eu-west-1a is not in",
    ),
    "no region": ("  region: us-west-2 # CHANGE\n", "", r"provider\.region: missing"),
    "region of the bucket": (
        "AWS_REGION=us-west-2",
        "AWS_REGION=us-east-1",
        "AWS_REGION=us-east-1, but provider.region",
    ),
    "no profile": (PROFILE_LINE + "Inst", "Inst", r"gpu_spot.*IamInstanceProfile: raytrain-head"),
    "head's profile": (WORKER_PROFILE, HEAD_PROFILE, "gpu_spot.*IamInstanceProfile: raytrain-head is the head's"),
    "empty profile": (WORKER_PROFILE, "{}", "gpu_spot.*IamInstanceProfile: missing"),
    "head works": ("{CPU: 0}", "{CPU: 8}", r"head\.resources: trials would run on the head"),
    "head's cores": ("{CPU: 0}", "{}", r"head\.resources: trials would run on the head"),
    "more heads": ("max_workers: 0", "max_workers: 3", r"head\.max_workers: 3"),
    "dashboard open": ("--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0", "dashboard-host=0.0.0.0 is open"),
    "dashboard public": ("--dashboard-host=127.0.0.1", "--dashboard-host 8.8.8.8", "dashboard-host=8.8.8.8 is open"),
    "port open": ("security_group:", RULE % (8265, 8265, "0.0.0.0/0"), "ports 8265 to 8265 are open to the world"),
    "all ports open": ("security_group:", RULE % (-1, -1, "0.0.0.0/0"), "all ports are open to the world"),
    "unpinned": ("-r ~/project", "rich -r ~/project", "rich has no exact version"),
    "loosely pinned": ("-r ~/project", "'rich>=15' -r ~/project", "rich>=15 has no exact version"),
    "workers differ": (
        "worker_setup_commands: []",
        "worker_setup_commands: [pip install rich==14.0.0]",
        "rich .* but 14.0.0 on workers",
    ),
    "only workers": (
        "worker_setup_commands: []",
        "worker_setup_commands: [pip install vllm==0.9]",
        "vllm is missing on the head",
    ),
    "another Ray": ("-r ~/project/cluster-requirements.txt", "ray==2.50.0", "Ray 2.50.0, but ray up would run with"),
    "not shipped": ("-r ~/project/cluster", "-r ~/elsewhere/cluster", "~/elsewhere/.* is not shipped"),
    "spot cached": ("cache_stopped_nodes: false", "cache_stopped_nodes: true", r"cache_stopped_nodes: must be false"),
    "spot cached by default": ("  cache_stopped_nodes: false\n", "", r"cache_stopped_nodes: must be false"),
    "least above most": (SPOT_TYPE, SPOT_TYPE[:-1] + "9", r"gpu_spot\.min_workers: 9 is more than max_workers, 8"),
    "sum": ("max_workers: 10", "max_workers: 9", "max_workers: 9, but a search is sized by .* 10 in all"),
    "head type": ("head_node_type: head", "head_node_type: haed", "head_node_type: there is no node type 'haed'"),
    "no token": ("  ~/.ray/auth_token: ~/.ray/auth_token\n", "", "token reaches no node"),
    "no token mode": ("RAY_AUTH_MODE=token ", "", "without RAY_AUTH_MODE=token"),
    "tokens off": ("ray start --head", "RAY_AUTH_MODE=disabled ray start --head", "without RAY_AUTH_MODE=token"),
    "access key": ("RAY_AUTH_MODE", "AWS_ACCESS_KEY_ID=AKIAIOSFODNN7EXAMPLE RAY_AUTH_MODE", "holds an AWS access key"),
    "secret key": ("RAY_AUTH_MODE", "AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI RAY_AUTH_MODE", "holds an AWS secret key"),
    "token in the file": ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN=0123456789 RAY_AUTH_MODE", "holds a token, secret or key"),
    "MLflow's token": ("RAY_AUTH_MODE", "MLFLOW_TRACKING_TOKEN=eyJhbGci RAY_AUTH_MODE", "holds a token, secret or key"),
    "password": ("export AWS", "export X=postgresql://u:pw@h/db AWS", "holds an address with a password"),
    "password with a dollar": (
        "export AWS",
        "export X=postgresql://u:p$$w@h/db AWS",
        "holds an address with a password",
    ),
    "password alone": ("export AWS", "export X=redis://:pw@h AWS", "holds an address with a password"),
    "disk": ("VolumeSize: 150", "VolumeSize: 40", "a system disk of 40 GiB is too small"),
    "another disk": ("/dev/sda1", "/dev/sdf", "a system disk of 0 GiB is too small; .* for /dev/sda1"),
    "ARM": ("m6i.2xlarge #", "m7g.2xlarge #", "m7g.2xlarge is arm64, but the ImageId is x86_64"),
    "ARM with a GPU": (SPOT_INSTANCE, "g5g.2xlarge # CHANGE (", "g5g.2xlarge is arm64, but the ImageId is x86_64"),
    "ARM's image": ("ami/x86_64", "ami/arm64", "m6i.2xlarge is x86_64, but the ImageId is arm64"),
    "no GPU": ("{GPU: 1}", "{}", r"gpu_spot\.resources: GPU is not given, but g5.2xlarge has 1"),
    "too many GPUs": ("{GPU: 1}", "{GPU: 4}", r"gpu_spot\.resources: GPU is 4, but g5.2xlarge has 1"),
    "no GPU on a new type": ("{GPU: 1}", "{}", r"gpu_spot\.resources: GPU is not given, but g9.large has some"),
    "idle": ("idle_timeout_minutes: 5", "idle_timeout_minutes: 0", "idle_timeout_minutes: 0"),
    "missing path": ("search_spaces: search_spaces", "search_spaces: no/search_spaces", "there is no no/search_spaces"),
    "project not shipped": ("  ~/project/raytrain: raytrain\n", "", "raytrain is not shipped"),
    "storage": ("=s3://my-bucket/raytrain", "=/home/ubuntu/runs", "RAYTRAIN_STORAGE=/home/ubuntu/runs is not a bucket"),
    "no storage": ("RAYTRAIN_STORAGE=", "STORAGE=", "RAYTRAIN_STORAGE is not set"),
    "MLflow open": (MLFLOW, "--host 0.0.0.0", "--host 0.0.0.0 lets everyone in"),
    "MLflow's database": ("raytrain.tracking serve", "mlflow server", "database would end with the head"),
    "no MLflow": ("MLFLOW_TRACKING_URI=", "MLFLOW=", "MLFLOW_TRACKING_URI is not set"),
    "MLflow in a file": ("URI=http://", "URI=sqlite://", "MLFLOW_TRACKING_URI is not set to http"),
    "no watcher": ("-m raytrain.spot", "-m http.server", "nothing tells Ray"),
    "no autoscaling": (" --autoscaling-config=~/ray_bootstrap_config.yaml", "", "no worker would start"),
    "lost workers": ("--address=$RAY_HEAD_IP:6379", "--address=$RAY_HEAD_IP:6380", "no worker would find the head"),
    "default image": ("      ImageId: ", "      ImageID: ", "ImageId: missing, and Ray would take Ubuntu 18.04"),
    "key without name": (
        "  ssh_user: ubuntu",
        "  ssh_user: ubuntu\n  ssh_private_key: cluster.yaml",
        "KeyName: missing",
    ),
    "head on spot": (
        f"IamInstanceProfile: {HEAD_PROFILE}",
        f"IamInstanceProfile: {HEAD_PROFILE}\n      InstanceMarketOptions: {{MarketType: spot}}",
        "head.node_config.InstanceMarketOptions: the cluster ends",
    ),
    "unknown field": ("upscaling_speed", "upscaling_spede", "'upscaling_spede' was unexpected"),
    "size in words": ("VolumeSize: 150", "VolumeSize: large", "VolumeSize: 'large' is not of type 'integer'"),
    "mount of a number": ("raytrain: raytrain", "raytrain: 7", "file_mounts.*raytrain: 7 is not of type 'string'"),
    "wrong kind": ("max_workers: 10", "max_workers: ten", "max_workers: 'ten' is not of type 'integer'"),
    "quotes": ("-r ~/project", "'rich==15 -r ~/project", "pip install .*: No closing quotation"),
    "Ray's own start": ("ray start --head", "ray start", "no ray start --head"),
    "fewer than none": (SPOT_TYPE, SPOT_TYPE[:-1] + "-1", "gpu_spot: min_workers and max_workers must be at least 0"),
    "GPU on a CPU type": ("g5.2xlarge", "m6i.xlarge", "GPU is 1, but m6i.xlarge has none"),
    "no type": ("      InstanceType: m6i.2xlarge", "      EbsOptimized: true", "head.*InstanceType: missing"),
    "images differ": (SPOT_IMAGE, SPOT_IMAGE + "      ImageId: ami-0123456789abcdef0\n", "the ImageIds differ"),
    "no key": ("  ssh_user: ubuntu", "  ssh_user: ubuntu\n  ssh_private_key: none.pem", "there is no none.pem here"),
    "provider": ("type: aws", "type: gcp", "provider.type: 'gcp' is not known here"),
}
"""What is changed in the file that ships, into what, and the line that must come of it."""

SEVERAL_NODES = {
    "no key",
    "no type",
    "quotes",
    "disk",
    "another disk",
    "ARM's image",
    "default image",
    "key without name",
    "no profile",
    "head on spot",
    "size in words",
}
"""The mistakes that stand in a field which other node types take over."""


@pytest.mark.parametrize("name", AWS_MISTAKES)
def test_a_mistake_on_aws_is_named(name: str, laptop: Path) -> None:
    old, new, expected = AWS_MISTAKES[name]
    text = AWS.replace(SPOT_INSTANCE, "g9.large # CHANGE (") if name == "no GPU on a new type" else AWS
    found = mistakes_in(changed(text, old, new), laptop)
    assert any(re.search(expected, line) for line in found), found
    assert len(found) == 1 or name in SEVERAL_NODES, found
    assert all("\n" not in line and re.match(r"[\w.\[\]~/-]+(, line \d+)?: ", line) for line in found)


ONPREM_MISTAKES = {
    "twice": ("10.0.0.13", "10.0.0.12", "10.0.0.12 is named 2 times"),
    "head too": ("10.0.0.13", "10.0.0.11", "10.0.0.11 is named 2 times"),
    "public": ("10.0.0.13", "8.8.8.8", "8.8.8.8 is a public address"),
    "no head": ("  head_ip: 10.0.0.11 # CHANGE\n", "", "head_ip and worker_ips are needed"),
    "too few": ("10.0.0.13]", "10.0.0.13, 10.0.0.14]", "max_workers: 2, but there are 3 worker_ips; write 3"),
    "no key": ("id_ed25519", "id_none", "there is no ~/.ssh/id_none here"),
    "too many": ("max_workers: 2", "max_workers: 3", "max_workers: 3, but there are 2 worker_ips"),
    "least above most": ("min_workers: 2", "min_workers: 3", "min_workers: 3 is below 0 or more than max_workers, 2"),
    "fewer than none": ("min_workers: 2", "min_workers: -1", "min_workers: -1 is below 0"),
    "number for a name": ("10.0.0.13", "13", r"provider\.worker_ips\.1: 13 is not of type 'string'"),
    "least in words": ("min_workers: 2", "min_workers: two", "min_workers: 'two' is not of type 'integer'"),
    "two heads": ("HEAD_IP=10.0.0.11", "HEAD_IP=10.0.0.12", "HEAD_IP=10.0.0.12, but provider.head_ip is 10.0.0.11"),
    "no user": ("  ssh_user: ubuntu # CHANGE\n", "", "auth.ssh_user: missing"),
    "tokens off": ("RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled", "without RAY_AUTH_MODE=token"),
}


@pytest.mark.parametrize("name", ONPREM_MISTAKES)
def test_a_mistake_on_machines_of_ones_own_is_named(name: str, laptop: Path) -> None:
    old, new, expected = ONPREM_MISTAKES[name]
    (line,) = mistakes_in(changed(ONPREM, old, new), laptop)
    assert re.search(expected, line), line


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("setup_commands", [], "setup_commands: there are none"),
        ("available_node_types", {}, "available_node_types: missing"),
        (
            "available_node_types",
            {"head": yaml.safe_load(AWS)["available_node_types"]["head"]},
            "there can be no worker",
        ),
    ],
)
def test_a_mistake_of_what_is_left_out_is_named(field: str, value: Any, expected: str, laptop: Path) -> None:
    found = mistakes_in(yaml.safe_dump({**yaml.safe_load(AWS), field: value}), laptop)
    assert any(expected in line for line in found), found


def test_a_name_for_the_head_is_refused(laptop: Path) -> None:
    (line,) = mistakes_in(ONPREM.replace("10.0.0.11", "head.lab"), laptop)
    assert "head_ip: head.lab is a name" in line


def test_a_mistake_of_types_with_machines_of_ones_own_is_named(laptop: Path) -> None:
    types = {"gpu": {"resources": {}, "node_config": {}}}
    found = mistakes_in(yaml.safe_dump({**yaml.safe_load(ONPREM), "available_node_types": types}), laptop)
    assert any("available_node_types: Ray refuses them" in line for line in found), found


def test_a_secret_is_not_repeated(laptop: Path) -> None:
    (line,) = mistakes_in(AWS + "# AKIAIOSFODNN7EXAMPLE\n", laptop)
    assert "AKIA" not in line
    assert f"line {AWS.count(chr(10)) + 1}" in line


KEY = "0123456789abcdef0123456789abcdef01234567"
"""Made up, as all that follow."""
WRITTEN_OUT = [
    f"wandb login {KEY}",
    f"wandb login --relogin --host=https://wandb.example {KEY}",
    f"wandb login <<< {KEY}",
    f"echo {KEY} | wandb login",
    f"hf auth login --token hf_{'MadeUp' * 5}0123",
    f"~/venv/bin/huggingface-cli login --add-to-git-credential --token={KEY}",
    f"git clone https://ghp_{'MadeUp' * 5}0123@github.com/me/private.git",
    f"git clone https://{KEY}@git.example/private.git",
    f"git clone https://oauth2:glpat-{'MadeUp' * 3}0@gitlab.com/me/private.git",
    f"git config --global http.extraheader 'Authorization: Basic {KEY}'",
    f"pip install git+https://github_pat_{'MadeUp' * 5}@github.com/me/private",
    f"pip install --extra-index-url https://me:{KEY}@pypi.example/simple x==1",
    f"aws configure set aws_secret_access_key {'MadeUp' * 6}0123",
    f"aws configure set aws_secret_access_key {'MadeUp' * 6}0123 --profile me",
    f"aws configure set aws_session_token {KEY}",
    "aws configure set aws_access_key_id AKIAABCDEFGHIJKLMNOP",
    "docker login -u me -p made-up-password registry.example",
    "docker login --username me --password made-up registry.example",
    "echo made-up | docker login -u me --password-stdin registry.example",
    "printf 'made-up' | gh auth login --with-token",
    "az login --service-principal -u me -p made-up --tenant x",
    "echo machine git.example login me password made-up > ~/.netrc",
    "printf 'machine git.example\\nlogin me\\npassword made-up\\n' > ~/.netrc",
    f"export KAGGLE_USERNAME=me KAGGLE_KEY={KEY}",
    f"""echo '{{"username":"me","key":"{KEY}"}}' > ~/.kaggle/kaggle.json""",
    f"kaggle config set -n key -v {KEY}",
    f"export WANDB_API_KEY={KEY}",
    f"export HF_TOKEN={KEY}",
    f"OPENAI_API_KEY=sk-proj-{KEY} python x.py",
    f"echo sk-ant-{KEY} > ~/.key",
    "export PGPASSWORD=made-up DB_PASS=x",
    "PGPASS_FILE=x DB_PASS=made-up psql",
    "sshpass -p made-up ssh me@host",
    "mysql -u me -pmade-up db",
    "curl -u me:made-up https://host/x",
    f"curl -H 'Authorization: Bearer {KEY}' https://host/x",
    f"curl -H 'PRIVATE-TOKEN: {KEY}' https://host/x",
    f"wget 'https://store.example/x?sv=2026&sig={KEY}'",
    f"wget 'https://bucket.s3.amazonaws.com/x?X-Amz-Expires=9&X-Amz-Signature={KEY}'",
    f"ngrok config add-authtoken {KEY}",
    f"sudo tailscale up --auth-key=tskey-auth-{KEY}",
    "ray start --head --redis-password made-up",
    "echo ubuntu:made-up | sudo chpasswd",
    "echo made-up | sudo -S apt-get update",
    f"mc alias set store https://s3.example me {KEY}",
    f"npm config set //registry.example/:_authToken {KEY}",
    f"export GOOGLE_API_KEY=AIza{KEY}",
    f"cat > key <<< eyJhbGciOiJIUzI1NiIsInR5cCI6.eyJzdWIiOiIxMjM0NTY3ODkw.{KEY}",
]
LOOKED_UP = [
    "wandb login $(cat ~/.wandb_key)",
    'wandb login "$WANDB_API_KEY"',
    "wandb login --host=https://wandb.example",
    "hf auth login --token $HF_TOKEN",
    'hf auth login --token "$(cat ~/.hf_token)"',
    "hf auth login --token-file ~/.hf_token",
    "export HF_TOKEN=$(cat ~/.hf_token) HF_TOKEN_PATH=~/.hf_token",
    "export WANDB_API_KEY=$(<~/.wandb_key)",
    "docker login -u me -p $REGISTRY_PASSWORD registry.example",
    "docker login registry.with-a-long-name-2026.example.com",
    "cat ~/.password | docker login -u me --password-stdin registry.example",
    "gh auth login --with-token < ~/.gh_token",
    "aws sso login --profile research-of-2026",
    "aws configure set region us-west-2",
    "aws configure set aws_secret_access_key $AWS_SECRET",
    "az login --identity --tenant 01234567-89ab-cdef-0123-456789abcdef",
    "git clone https://github.com/me/public.git",
    "git clone git@github.com:me/private.git && git checkout 0123456789abcdef0123456789abcdef01234567",
    "git clone ssh://git@github.com/me/private.git",
    "git clone https://$GH_TOKEN@github.com/me/private.git",
    "pip install git+https://github.com/me/x@0123456789abcdef0123456789abcdef01234567",
    "pip install --extra-index-url https://me:$PYPI_TOKEN@pypi.example/simple -r ~/project/cluster-requirements.txt",
    "gcloud auth activate-service-account --key-file=/home/ubuntu/key.json",
    "export GOOGLE_APPLICATION_CREDENTIALS=~/key.json SSH_KEY=~/.ssh/id_ed25519 MONKEY=business",
    "ssh-keygen -t ed25519 -f ~/.ssh/id_ed25519",
    "echo login at https://wandb.example",
    "echo 'the token is shipped by file_mounts'",
    "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=~/.ray/auth_token",
    "curl -fsSL https://host/key.gpg | sudo apt-key add -",
    "wget -q https://host/x?version=2026",
    "mysql -u me db",
    "sha256sum -c <<< '0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef  file'",
]


@pytest.mark.parametrize("command", WRITTEN_OUT)
def test_a_secret_that_is_written_out_is_refused(command: str, laptop: Path) -> None:
    text = AWS.replace("setup_commands:\n", "setup_commands:\n  - |\n    " + command + "\n", 1)
    found = mistakes_in(text, laptop)
    assert any(", line " in line and "holds a" in line and "every node keeps a copy" in line for line in found), found
    assert not any(KEY in line or "made-up" in line for line in found)


@pytest.mark.parametrize("command", LOOKED_UP)
def test_what_is_looked_up_on_the_node_is_no_secret(command: str, laptop: Path) -> None:
    text = AWS.replace("setup_commands:\n", "setup_commands:\n  - |\n    " + command + "\n", 1)
    assert not [line for line in mistakes_in(text, laptop) if "holds a" in line]


def test_a_secret_in_a_command_of_several_lines_is_found(laptop: Path) -> None:
    """YAML makes one line of them."""
    text = AWS.replace("setup_commands:\n", f"setup_commands:\n  - wandb\n    login\n    {KEY}\n", 1)
    (line,) = mistakes_in(text, laptop)
    assert line.startswith("setup_commands[0]: holds a secret in a command")


@pytest.mark.parametrize("text", [AWS, ONPREM], ids=["aws", "onprem"])
@pytest.mark.parametrize("name", ["image", "head_image", "worker_image"])
def test_an_image_that_is_not_looked_at_is_refused(text: str, name: str, laptop: Path) -> None:
    section = f"docker:\n  {name}: rayproject/ray-ml:latest-gpu\n  container_name: ray\n"
    (line,) = mistakes_in(changed(text, "\nauth:", f"\n{section}auth:"), laptop)
    assert line.startswith(f"docker.{name}: the nodes would run in rayproject/ray-ml:latest-gpu")


def test_an_image_of_one_node_type_is_refused(laptop: Path) -> None:
    section = "  gpu_spot:\n    docker:\n      worker_image: rayproject/ray:2.60.0-gpu\n"
    (line,) = mistakes_in(changed(AWS, "  gpu_spot:\n", section), laptop)
    assert line.startswith("available_node_types.gpu_spot.docker.worker_image: the nodes would run in")
    assert mistakes_in(changed(AWS, "\nauth:", '\ndocker: {image: ""}\nauth:'), laptop) == []


def test_a_token_that_others_can_read_is_refused(laptop: Path) -> None:
    (laptop / ".ray" / "auth_token").chmod(0o644)
    (line,) = mistakes_in(AWS, laptop)
    assert "chmod 600" in line


def test_a_token_that_is_not_there_is_refused(laptop: Path) -> None:
    (laptop / ".ray" / "auth_token").unlink()
    (line,) = mistakes_in(AWS, laptop)
    assert "ray get-auth-token --generate" in line


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cluster_name: a\ncluster_name: b\n", "line 1: cluster_name is given twice"),
        ("a: [", "is not YAML"),
        ("- a\n", "is not a cluster file"),
        ("!!python/object/apply:os.system ['true']\n", "is not YAML"),
        ("\x00", "is not YAML"),
        ("a:\n  1: b\n", "line 2: the name 1 is not text"),
        ("a: {<<: [{1: 2}]}\n", "line 1: the name 1 is not text"),
        ("a: 2024-13-45\n", "is not YAML: month must be in"),
        ("a: &a [*a]\n", "is nested more than 100 deep"),
        ("a: " + "[" * 3000, "is not YAML"),
        (
            "a: [&a [x], " + ", ".join(f"&{new} [{f'*{old}, ' * 9}]" for old, new in pairwise("abcdefghij")) + "]",
            "more than 100,000 values",
        ),
    ],
)
def test_what_is_no_cluster_file_is_refused(text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=expected):
        read_file(tmp_path / "c.yaml")


def test_the_command_lists_all_mistakes_and_ends_with_status_2(laptop: Path) -> None:
    text = changed(changed(AWS, "idle_timeout_minutes: 5", "idle_timeout_minutes: 0"), "{CPU: 0}", "{}")
    (laptop / "bad.yaml").write_text(text)
    (laptop / "good.yaml").write_text(AWS)

    def run(name: str) -> Any:
        command = [sys.executable, "-m", "raytrain.cluster", "check", str(laptop / name)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    bad, good, none = run("bad.yaml"), run("good.yaml"), run("none.yaml")
    assert (bad.returncode, good.returncode, none.returncode) == (2, 0, 2)
    lines = bad.stderr.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("error: ") for line in lines)
    assert "start it: ray up" in good.stdout
    assert none.stderr.startswith("error: ")
    assert len(none.stderr.splitlines()) == 1


# -------------------------------------------------------------------------------------- Kubernetes

SPEC = {"headGroupSpec", "workerGroupSpecs", "rayVersion", "enableInTreeAutoscaling", "autoscalerOptions"}
GROUP = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
"""Fields of ray.io/v1 that are used, by the Go types from which KubeRay makes its schema."""


def test_the_kuberay_manifest_has_known_fields_and_the_same_ray() -> None:
    text = (ROOT / "docs" / "kuberay.yaml").read_text()
    manifest = yaml.safe_load(text)
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayCluster")
    spec = manifest["spec"]
    assert spec.keys() == SPEC
    assert spec["rayVersion"] == version("ray")
    assert spec["headGroupSpec"].keys() == {"rayStartParams", "template"}
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (workers,) = spec["workerGroupSpecs"]
    assert workers.keys() == GROUP
    assert workers["replicas"] == workers["minReplicas"] == 0
    for group in (spec["headGroupSpec"], workers):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        (container,) = group["template"]["spec"]["containers"]
        environment = {entry["name"]: entry for entry in container["env"]}
        assert environment["RAY_AUTH_MODE"]["value"] == "token"
        assert "value" not in environment["RAY_AUTH_TOKEN"]
    assert spec["autoscalerOptions"]["version"] == "v2"  # by it KubeRay never restarts a worker that Ray has ended
    resources = workers["template"]["spec"]["containers"][0]["resources"]
    asked = {"num-cpus": resources["requests"]["cpu"], "num-gpus": resources["limits"]["nvidia.com/gpu"]}
    assert workers["rayStartParams"] == asked
    (kind,) = json.loads(environment["RAYTRAIN_WORKER_NODES"]["value"])
    assert kind == {"nodes": workers["maxReplicas"], "CPU": int(asked["num-cpus"]), "GPU": int(asked["num-gpus"])}
    assert all("# CHANGE" in line for line in text.splitlines() if "CHANGE-ME" in line)


# ----------------------------------------------------------------------------------------- policies


def statements(name: str) -> list[dict[str, Any]]:
    policy = json.loads((ROOT / "docs" / "aws" / name).read_text())
    assert policy["Version"] == "2012-10-17"
    return list(policy["Statement"])


def test_the_policies_name_each_action_and_one_prefix_of_one_bucket() -> None:
    for name in ("storage.json", "head.json"):
        for statement in statements(name):
            actions = statement["Action"]
            assert not any("*" in action for action in ([actions] if isinstance(actions, str) else actions))
            assert statement["Resource"] != "*" or actions == "ec2:DescribeInstances"
    objects, listing = statements("storage.json")
    assert objects["Resource"] == "arn:aws:s3:::BUCKET/raytrain/*"
    assert listing["Condition"] == {"StringLike": {"s3:prefix": ["raytrain", "raytrain/*"]}}


def test_the_head_may_pass_the_workers_role_alone_and_end_its_own_instances_alone() -> None:
    config = yaml.safe_load(AWS)
    by_action = {str(statement["Action"]): statement for statement in statements("head.json")}
    worker = config["available_node_types"]["gpu_spot"]["node_config"]["IamInstanceProfile"]["Name"]
    assert by_action["iam:PassRole"]["Resource"] == f"arn:aws:iam::ACCOUNT:role/{worker}"
    own = {"ec2:ResourceTag/ray-cluster-name": config["cluster_name"]}
    (ends,) = [statement for action, statement in by_action.items() if "TerminateInstances" in action]
    assert ends["Condition"] == {"StringEquals": own}

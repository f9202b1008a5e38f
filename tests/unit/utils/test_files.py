from __future__ import annotations

import errno
import os
import re
import stat
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

import raytrain
import raytrain.evaluate as evaluate
import raytrain.sample as sample
import raytrain.train as train
import raytrain.tune as tune
from raytrain.cluster import __main__ as cluster_command
from raytrain.data import __main__ as data_command
from raytrain.data.files import default_cache
from raytrain.storage import open_storage_root
from raytrain.tracking import __main__ as tracking_command
from raytrain.tracking.client import one_at_a_time
from raytrain.utils.errors import UserError
from raytrain.utils.files import expanded, local_path, locked, output_file, private_folder
from tests.support.refusal import refusal


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder; the working directory is another, empty one."""
    for name in ("home", "work"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    for name in ("RAYTRAIN_CACHE", "RAYTRAIN_STORAGE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "home"


def test_a_tilde_is_the_home_folder_wherever_it_comes_from(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert expanded("~/x") == local_path("~/x", "--output") == home / "x"
    assert open_storage_root("~/x").uri() == str(home / "x")
    monkeypatch.setenv("RAYTRAIN_STORAGE", "~/y")
    assert open_storage_root(None).uri() == str(home / "y")
    monkeypatch.setenv("RAYTRAIN_CACHE", "~/z")
    assert default_cache() == home / "z"
    for name in ("~root/x", "~/x"):
        assert "~" not in str(local_path(name, "--output"))


@pytest.mark.parametrize("path", ["a b", "a:b", "./s3:/x", "a/s3:/x", "$", "a$b", "-x", "ü", "'x", "~x/../y"[1:], "x~"])
def test_any_other_name_is_a_path(path: str) -> None:
    assert local_path(path, "--output") == Path(path)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        *((path, "address") for path in ("s3://b/x", "s3:/b/x", "S3:b", "s3//b/x", "gs://b", "http:/h", "file:///x")),
        *((path, "quotes or white space") for path in ('"s3://b/x"', "'~/x'", " s3://b", "x ", "x\r", "x\ny")),
        *((path, "variable") for path in ("$HOME/x", "${HOME}/x", "/data/$USER/x", "$(pwd)/x")),
        ("~nobody-has-this-name/x", "no such home folder"),
    ],
)  # fmt: skip
def test_a_slip_does_not_become_a_folder(home: Path, path: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=f"^--output: .*{words}|^~.*{words}") as caught:
        local_path(path, "--output")
    assert "\n" not in str(caught.value)
    if path.lower().startswith("s3://"):
        return
    with pytest.raises(UserError):
        open_storage_root(path)
    monkeypatch.setenv("RAYTRAIN_CACHE", path)
    with pytest.raises(UserError):
        default_cache()


def test_a_name_with_a_dollar_that_is_there_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "$x").mkdir()
    assert local_path("$x", "--output") == Path("$x")


SLIPS: dict[str, tuple[Callable[[], None], tuple[str, ...]]] = {
    "prepare --output": (data_command.main, ("prepare", "text.txt", "--output", "{}")),
    "evaluate --output": (evaluate.main, ("absent", "--output", "{}.json")),
    "serve --folder": (lambda: tracking_command.main(sys.argv[1:]), ("serve", "--folder", "{}", "--host", "10.0.0.5")),
    "train --config": (train.main, ("byte_lstm", "--config", "{}/config.json")),
    "tune --space": (tune.main, ("byte_lstm", "--space", "{}/space.py")),
    "sample --reconstruct": (sample.main, ("absent", "--reconstruct", "{}")),
    "cluster check": (lambda: cluster_command.main(sys.argv[1:]), ("check", "{}")),
    "data info": (data_command.main, ("info", "{}")),
}


@pytest.mark.parametrize("path", ["s3:/bucket/x", '"s3://bucket/x"', "$HOME/x", "~nobody-has-this-name/x"])
@pytest.mark.parametrize("command", SLIPS)
def test_no_command_makes_a_folder_of_a_slip(
    home: Path, command: str, path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("text.txt").write_text("".join(f"line {number}\n" for number in range(300)))
    main, arguments = SLIPS[command]
    refusal(main, tuple(argument.format(path) for argument in arguments), monkeypatch, capsys)
    assert os.listdir() == ["text.txt"]
    assert not list(home.iterdir())


def test_the_output_of_prepare_may_be_in_the_home_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("text.txt").write_text("".join(f"line {number}\n" for number in range(300)))
    monkeypatch.setattr(sys, "argv", ["data", "prepare", "text.txt", "--output=~/corpus"])
    data_command.main()
    assert (home / "corpus" / "corpus.json").is_file()
    assert (home / ".cache" / "raytrain").is_dir()
    assert os.listdir() == ["text.txt"]


@pytest.mark.parametrize("home", ["", "~", None])
def test_without_a_home_the_cache_asks_for_a_folder(home: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYTRAIN_CACHE", raising=False)
    if home is None:  # as in a container whose user is not in the password file
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    else:
        monkeypatch.setenv("HOME", home)
    with pytest.raises(UserError, match="set RAYTRAIN_CACHE to a folder, or HOME"):
        default_cache()
    monkeypatch.setenv("RAYTRAIN_CACHE", "/tmp/cache")
    assert default_cache() == Path("/tmp/cache")


# ---------------------------------------------------------------------------------------- written files


def write_half(target: Path, error: BaseException) -> None:
    with output_file(target) as file:
        file.write_text("tw")
        raise error


def test_an_output_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "new" / "out.json"
    with output_file(target) as file:
        file.write_text("one")
        assert not target.exists()
    assert target.read_text() == "one"
    with pytest.raises(UserError, match=r"out.json cannot be written: No space left on device"):
        write_half(target, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(KeyboardInterrupt):
        write_half(target, KeyboardInterrupt())
    assert target.read_text() == "one"
    assert os.listdir(target.parent) == ["out.json"]


def test_an_output_may_be_a_device_a_pipe_or_a_link(tmp_path: Path) -> None:
    """None of them may be replaced by a file."""
    with output_file(Path("/dev/null")) as file:
        file.write_text("x")
    assert not os.path.isfile("/dev/null")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with output_file(tmp_path / "pipe") as file:
        file.write_text("x")
    assert os.read(reader, 9) == b"x"
    os.close(reader)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real/file")
    with output_file(tmp_path / "link") as file:
        file.write_text("x")
    assert (tmp_path / "real" / "file").read_text() == "x"
    assert (tmp_path / "link").is_symlink()


def test_no_module_writes_a_file_in_place() -> None:
    """Only below a folder of its own that is removed, or of which a name of its own says that it is not complete."""
    allowed = {"storage/local.py", "storage/s3.py", "data/corpus.py", "data/files.py", "data/parts.py",
               "data/node_cache.py", "data/pools.py", "data/unpacking.py", "tracking/logged_model.py",
               "tracking/metric_writer.py", "utils/files.py", "bench/torchrun.py", "storage/__init__.py"}  # fmt: skip
    package = Path(raytrain.__file__).parent
    found = set()
    for path in package.rglob("*.py"):
        lines = path.read_text("utf-8").splitlines()
        for number, line in enumerate(lines):
            writes = re.search(r"\.write_(text|bytes)\(|savefig\((?!buffer)|open\([^)]*[\"'][wax]b?[\"']", line)
            if writes and not re.search(r"(output|complete)_file\(", "".join(lines[max(0, number - 2) : number])):
                found.add(str(path.relative_to(package)))
    assert found <= allowed


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for temporary files in which anyone may make names."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    folder.chmod(0o1777)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder / f"raytrain-{os.getuid()}"


def test_locks_are_in_a_folder_of_the_users_own(temporary: Path) -> None:
    assert private_folder() == temporary
    assert stat.S_IMODE(temporary.stat().st_mode) == 0o700
    assert private_folder() == temporary
    uri = f"sqlite:///{temporary.parent}/mlflow.db"
    with one_at_a_time(uri):
        (lock,) = temporary.iterdir()
        with pytest.raises(BlockingIOError), locked(lock, wait=False):
            pytest.fail("two held it")
    assert [path.name for path in temporary.parent.iterdir()] == [temporary.name], "what lies beside can be anyone's"


def test_a_folder_that_others_have_made_or_may_write_to_is_refused(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_link() -> None:
        (tmp_path / "elsewhere").mkdir()
        temporary.symlink_to(tmp_path / "elsewhere")

    def make_open() -> None:
        temporary.mkdir()
        temporary.chmod(0o777)

    for make, clear in (
        (make_link, temporary.unlink),
        (temporary.touch, temporary.unlink),
        (make_open, temporary.rmdir),
    ):
        make()
        with pytest.raises(UserError, match=f"^{temporary} is not a folder that only this user .*TMPDIR"):
            private_folder()
        clear()
    monkeypatch.setattr(os, "getuid", lambda: os.geteuid() + 1)
    other = temporary.with_name(f"raytrain-{os.getuid()}")
    other.mkdir(mode=0o700)
    with pytest.raises(UserError, match=str(other)):
        private_folder()


def test_a_lock_neither_follows_a_link_nor_empties_a_file(tmp_path: Path) -> None:
    precious, link = tmp_path / "precious", tmp_path / "link"
    precious.write_text("precious")
    link.symlink_to(precious)
    with pytest.raises(OSError, match="symbolic links"), locked(link):
        pytest.fail("it followed the link")
    with locked(precious):
        pass
    assert precious.read_text() == "precious"

"""What is saved is read back the same, or refused with its name and the reason; the newest whole one is found."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raytrain.runs.checkpoint import Checkpoint, Snapshot, best, latest, load, manifest_of
from raytrain.runs.checkpoint_writer import CheckpointWriter
from raytrain.storage import open_storage
from raytrain.storage.base import NotFoundError, Storage, StorageError
from raytrain.storage.local import FolderStorage
from raytrain.utils.errors import UserError
from tests.support.away import Away
from tests.support.examples import examples

if TYPE_CHECKING:
    from tests.support.s3_server import S3Server


@pytest.fixture(params=["folder", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    if request.param == "folder":
        return open_storage(tmp_path / "checkpoints")
    request.getfixturevalue("s3_server").use(monkeypatch)
    return open_storage(f"s3://raytrain/{tmp_path.name}/checkpoints")


def snapshot(step: int, size: int = 4) -> Snapshot:
    generator = torch.Generator().manual_seed(step)
    model = {
        "w": torch.randn(size, 3, generator=generator),
        "half": torch.ones(2).bfloat16(),
        "none": torch.empty(0, 3),
    }
    optimizer = {"w.exp_avg": torch.randn(size, 3, generator=generator).T, "step": torch.tensor(step)}
    state = {"records": [[step, {"loss": 0.1 + step, "worst": math.inf}, 17]], "best": None}
    return Snapshot(step, {"model": model, "optimizer": optimizer}, state, {"seed": 3, "model": {"name": "hybrid"}})


def assert_same(read: Checkpoint | None, saved: Snapshot) -> None:
    assert read is not None
    assert (read.step, read.state, read.config) == (saved.step, saved.state, saved.config)
    for stem, tensors in saved.tensors.items():
        found = read.tensors(stem)
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)


def save(storage: Storage, *steps: int, **options: Any) -> None:
    with CheckpointWriter(storage, keep_last=100, **options) as writer:
        for step in steps:
            writer.save(snapshot(step), score=float(step % 7))
            writer.wait()


def folders(storage: Storage) -> list[str]:
    return sorted({key.partition("/")[0] for key in storage.list()})


# -------------------------------------------------------------------------------------- save and read


def test_what_is_saved_is_read_back(storage: Storage) -> None:
    assert latest(storage) is None
    assert best(storage) is None
    committed: list[int] = []
    with CheckpointWriter(storage, on_commit=committed.append) as writer:
        assert writer.committed is None
        writer.save(snapshot(250), score=1.5)
        writer.wait()
        assert writer.committed == 250
        assert committed == [250]
    keys = ["config.json", "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    assert storage.list() == [f"step-00000250/{key}" for key in keys]
    found = latest(storage)
    assert_same(found, snapshot(250))
    assert found is not None
    assert found.score == 1.5
    assert found.uri == storage.uri("step-00000250")
    assert_same(load(found.uri), snapshot(250))
    with pytest.raises(UserError, match=r"no average.safetensors; it has model, optimizer"):
        found.tensors("average")


def test_the_last_and_the_best_are_kept_also_after_a_restart(storage: Storage) -> None:
    def steps() -> list[int]:
        return [int(folder.removeprefix("step-")) for folder in folders(storage)]

    scores = {10: 5.0, 20: 1.0, 30: 1.0, 40: None, 50: math.nan, 60: 0.5, 70: 3.0, 80: 2.0}
    with CheckpointWriter(storage, keep_last=2, keep_best=1) as writer:
        for step in (10, 20, 30, 40):
            writer.save(snapshot(step), score=scores[step])
            writer.wait()
        assert steps() == [20, 30, 40]  # the first of two equal ones is the best
    with CheckpointWriter(storage, keep_last=2, keep_best=1) as writer:
        writer.save(snapshot(50), score=scores[50])
        writer.wait()
        assert steps() == [20, 40, 50]
        assert latest(storage).step == 50  # type: ignore[union-attr]
        assert best(storage).step == 20  # type: ignore[union-attr]
        for step in (60, 70, 80):
            writer.save(snapshot(step), score=scores[step])
            writer.wait()
    assert steps() == [60, 70, 80]
    assert best(storage).step == 60  # type: ignore[union-attr]
    assert latest(storage).step == 80  # type: ignore[union-attr]
    with CheckpointWriter(storage, keep_last=1, keep_best=2) as writer:
        writer.save(snapshot(90))
    assert steps() == [60, 80, 90]


def test_the_caller_may_go_on_with_its_dictionaries(tmp_path: Path) -> None:
    slow = Slow(tmp_path, 0.05)
    saved = snapshot(1)
    with CheckpointWriter(slow) as writer:
        writer.save(saved)
        saved.state["records"].append("later")
    assert_same(latest(slow), snapshot(1))


@pytest.mark.parametrize("changed", [Snapshot(1, {"../x": {}}, {}, {}), Snapshot(-1, {}, {}, {})])
def test_impossible_names_are_refused(tmp_path: Path, changed: Snapshot) -> None:
    with CheckpointWriter(open_storage(tmp_path)) as writer, pytest.raises(ValueError):
        writer.save(changed)
    with CheckpointWriter(open_storage(tmp_path)) as writer, pytest.raises(TypeError):
        writer.save(Snapshot(1, {}, {"value": object()}, {}))


def test_the_same_step_again_is_harmless(storage: Storage) -> None:
    save(storage, 7)
    save(storage, 7)
    assert_same(latest(storage), snapshot(7))
    changed = snapshot(8)
    changed.step = 7
    with CheckpointWriter(storage) as writer:
        writer.save(changed)
    assert_same(latest(storage), changed)


# ----------------------------------------------------------------------------------- faults of a store


class Slow(FolderStorage):
    """Takes its time for every write, and notes the order of what is done."""

    def __init__(self, root: Path, seconds: float) -> None:
        super().__init__(root)
        self.seconds, self.order = seconds, list[str]()

    def write(self, key: str, data: bytes) -> None:
        time.sleep(self.seconds)
        self.order.append(f"write {key}")
        super().write(key, data)

    def delete(self, key: str) -> None:
        self.order.append(f"delete {key}")
        super().delete(key)

    def child(self, prefix: str) -> FolderStorage:
        child = Slow(self._path(prefix), self.seconds)
        child.order = self.order
        return child


class Failing(FolderStorage):
    """Fails when ``fails(action, key)`` says so."""

    def __init__(self, root: Path, fails: Callable[[str, str], bool]) -> None:
        super().__init__(root)
        self.fails = fails

    def write(self, key: str, data: bytes) -> None:
        if self.fails("write", key):
            raise StorageError(f"cannot write {key}: the disk is away")
        super().write(key, data)

    def list(self, prefix: str = "") -> list[str]:
        if self.fails("list", prefix):
            raise StorageError("cannot list: the disk is away")
        return super().list(prefix)

    def child(self, prefix: str) -> FolderStorage:
        return Failing(self._path(prefix), self.fails)


def test_a_slow_store_does_not_stop_the_caller_and_waiting_is_counted(tmp_path: Path) -> None:
    with CheckpointWriter(Slow(tmp_path, 0.1)) as writer:
        begin = time.monotonic()
        for step in range(1, 6):
            writer.save(snapshot(step))
        assert time.monotonic() - begin < 0.1
        assert writer.seconds_waiting < 0.05
        assert writer.committed is None
    assert writer.committed == 5
    assert 0.4 < writer.seconds_waiting < 4  # the last at least, of five files


def test_the_manifest_is_written_last_and_taken_away_first(tmp_path: Path) -> None:
    slow = Slow(tmp_path, 0)
    save(slow, 5)
    assert slow.order[-1] == "write manifest.json"
    assert len(slow.order) == 6
    slow.order.clear()
    changed = snapshot(6)
    changed.step = 5
    with CheckpointWriter(slow, keep_last=1) as writer:
        writer.save(changed)
        writer.wait()
        writer.save(snapshot(9))
    assert slow.order[0] == "delete manifest.json"
    assert slow.order[5] == "write manifest.json"
    assert slow.order[-1] == "delete step-00000005/manifest.json"


def test_a_save_that_fails_is_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    failures = iter([True, False, True])

    def fails(action: str, key: str) -> bool:
        return key == "optimizer.safetensors" and next(failures, False)

    storage = Failing(tmp_path, fails)
    with CheckpointWriter(storage) as writer:
        writer.save(snapshot(1))
        assert latest(storage) is None
    assert_same(latest(storage), snapshot(1))
    assert "the checkpoint of step 1 is not saved yet, trying again: cannot write optimizer" in caplog.text


def test_a_store_that_stays_away_is_an_error_in_the_end(tmp_path: Path) -> None:
    writer = CheckpointWriter(Failing(tmp_path, lambda action, key: key == "manifest.json"), retry_seconds=0.2)
    writer.save(snapshot(1))
    writer.save(snapshot(2))
    time.sleep(1)
    with pytest.raises(StorageError, match=r"step 1 could not be saved within 0 s: cannot write manifest.json"):
        writer.save(snapshot(3))
    writer.save(snapshot(4))
    with pytest.raises(StorageError, match="step 4"):  # 2 gave way to it
        writer.close()
    assert writer.committed is None
    assert latest(open_storage(tmp_path)) is None


@pytest.fixture
def away(tmp_path: Path) -> Away:
    return Away(tmp_path / "checkpoints", threading.Event())


SCORES = st.lists(st.one_of(st.none(), st.integers(0, 5).map(float)), min_size=1, max_size=12)


@settings(max_examples=examples(40), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scores=SCORES, keep_best=st.integers(0, 2))
def test_what_waits_for_the_store_is_the_newest_and_the_best(
    tmp_path_factory: pytest.TempPathFactory, scores: list[float | None], keep_best: int
) -> None:
    committed: list[int] = []
    held = threading.Event()

    class Held(FolderStorage):
        def write(self, key: str, data: bytes) -> None:
            held.wait()
            super().write(key, data)

        def child(self, prefix: str) -> FolderStorage:
            return Held(self._path(prefix))

    storage = Held(tmp_path_factory.mktemp("held"))
    with CheckpointWriter(storage, keep_best=keep_best, on_commit=committed.append) as writer:
        try:
            for step, score in enumerate(scores):
                writer.save(snapshot(step), score)
            assert len(writer._waiting) <= keep_best + 1
        finally:
            held.set()
    ranked = sorted((score, step) for step, score in enumerate(scores) if score is not None)[:keep_best]
    # the first was in the thread's hands, or waited as the others did
    wanted = {len(scores) - 1, *(step for _, step in ranked)}
    assert wanted <= set(committed) <= wanted | {0}
    assert committed == sorted(committed)
    assert latest(storage).step == len(scores) - 1  # type: ignore[union-attr]
    found = best(storage)
    if keep_best > 0 and ranked:
        assert found is not None
        assert (found.score, found.step) == ranked[0]


def test_what_waited_while_the_store_was_away_arrives(away: Away, caplog: pytest.LogCaptureFixture) -> None:
    with CheckpointWriter(away, retry_seconds=30) as writer:
        writer.save(snapshot(10), score=3.0)
        writer.wait()
        away.away.set()
        for step, score in ((20, None), (30, 1.0), (40, 2.0), (50, None)):
            writer.save(snapshot(step), score)
        time.sleep(0.2)
        assert writer.committed == 10
        with pytest.raises(StorageError):
            latest(away)  # not "there is none"
        away.away.clear()
    assert_same(latest(away), snapshot(50))
    assert_same(best(away), snapshot(30))
    assert writer.committed == 50
    assert "is not saved yet, trying again: cannot reach" in caplog.text


def test_the_end_of_a_run_waits_for_the_store_only_so_long(away: Away) -> None:
    writer = CheckpointWriter(away, retry_seconds=0.3)
    away.away.set()
    for step in (1, 2, 3):
        writer.save(snapshot(step), score=float(step))
    begin = time.monotonic()
    with pytest.raises(StorageError, match=r"step 1 could not be saved within 0 s: cannot reach .*: the disk is away"):
        writer.close()
    assert 0.1 < time.monotonic() - begin < 5


def test_a_caller_that_is_stopped_still_leaves_what_waited(tmp_path: Path) -> None:
    storage = Slow(tmp_path, 0.05)

    def run() -> None:
        with CheckpointWriter(storage) as writer:
            for step, score in ((1, 3.0), (2, 1.0), (3, 2.0)):
                writer.save(snapshot(step), score)
            raise SystemExit

    with pytest.raises(SystemExit):
        run()
    assert_same(latest(storage), snapshot(3))
    assert_same(best(storage), snapshot(2))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_state_that_is_not_finite_is_refused_by_name(tmp_path: Path, value: float) -> None:
    storage = open_storage(tmp_path)
    for stem, name in (("model", "half"), ("optimizer", "w.exp_avg")):
        poisoned = snapshot(2)
        poisoned.tensors[stem][name][-1] = value
        with CheckpointWriter(storage) as writer:
            writer.save(snapshot(1))
            with pytest.raises(
                FloatingPointError, match=f"after step 2 is not finite and is not saved: {name} of {stem}"
            ):
                writer.save(poisoned)
    assert_same(latest(storage), snapshot(1))


def test_an_exception_of_the_caller_does_not_wait_for_the_store(tmp_path: Path) -> None:
    begin = time.monotonic()
    storage = Failing(tmp_path, lambda action, key: True)

    def run() -> None:
        with CheckpointWriter(storage, retry_seconds=20) as writer:
            writer.save(snapshot(1))
            time.sleep(0.1)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    assert time.monotonic() - begin < 5


def test_old_ones_that_cannot_be_deleted_stay_until_later(tmp_path: Path) -> None:
    away = threading.Event()
    storage = Failing(tmp_path, lambda action, key: action == "list" and away.is_set())
    with CheckpointWriter(storage, keep_last=1) as writer:
        writer.save(snapshot(1))
        writer.wait()
        away.set()
        writer.save(snapshot(2))
        writer.wait()
        with pytest.raises(StorageError):
            latest(storage)  # not "there is none"
        away.clear()
        assert folders(storage) == ["step-00000001", "step-00000002"]
        writer.save(snapshot(3))
    assert folders(storage) == ["step-00000003"]


def test_an_outage_in_the_middle_of_an_upload(
    s3_server: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    s3_server.use(monkeypatch)
    storage = open_storage(f"s3://raytrain/{tmp_path.name}")
    saved = snapshot(10, size=2**21)  # twice 24 MiB, several parts each
    with CheckpointWriter(storage) as writer:
        writer.save(snapshot(5))
        writer.wait()
        writer.save(saved)
        deadline = time.monotonic() + 20
        uploads: list[Any] = []
        while not uploads and time.monotonic() < deadline:
            uploads = s3_server.client().list_multipart_uploads(Bucket="raytrain").get("Uploads", [])
        s3_server.kill()
        assert uploads, "the server was to be killed while parts were under way"
        time.sleep(5)
        assert writer.committed == 5
        s3_server.start()
        found = latest(storage)
        assert found is not None
        if writer.committed == 5:
            assert_same(found, snapshot(5))
    assert writer.committed == 10
    assert_same(latest(storage), saved)


# --------------------------------------------------------------------------- altered and half-written


def alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "config.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["alter", "shorten", "remove"])
def test_a_damaged_one_is_skipped_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    storage = open_storage(tmp_path)
    save(storage, 14, 21, 28)
    file = tmp_path / "step-00000028" / name
    if damage == "alter":
        alter(file)
    elif damage == "shorten":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
    with caplog.at_level(logging.WARNING):
        assert_same(latest(storage), snapshot(21))
    assert f"checkpoint {file.parent} is not used: " in caplog.text
    assert name in caplog.text
    with pytest.raises(UserError, match=name) as caught:
        load(file.parent)
    assert str(file.parent) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert best(storage).step == 14  # type: ignore[union-attr]
    alter(tmp_path / "step-00000014" / "model.safetensors")
    assert best(storage).step == 21  # type: ignore[union-attr]


class AltersOnTheWay(FolderStorage):
    """What is read arrives with one bit altered, the first time of each key."""

    seen: ClassVar[set[str]] = set()

    def read(self, key: str) -> bytes:
        data = super().read(key)
        if self.uri(key) in self.seen:
            return data
        self.seen.add(self.uri(key))
        return bytes([data[0] ^ 1]) + data[1:]

    def child(self, prefix: str) -> FolderStorage:
        return AltersOnTheWay(self.folder / prefix)


def test_what_is_altered_on_its_way_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(FolderStorage(tmp_path), 1, 2)
    monkeypatch.setattr(AltersOnTheWay, "seen", set())
    assert_same(latest(AltersOnTheWay(tmp_path)), snapshot(2))
    assert len(AltersOnTheWay.seen) >= 4
    monkeypatch.setattr("raytrain.runs.checkpoint.PAUSES_S", ())
    monkeypatch.setattr(AltersOnTheWay, "seen", set())
    assert latest(AltersOnTheWay(tmp_path)) is None


def test_a_damaged_one_does_not_push_out_a_good_one(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    save(storage, 14, 21, 28)
    alter(tmp_path / "step-00000028" / "model.safetensors")
    (tmp_path / "step-00000025").mkdir()
    (tmp_path / "step-00000025" / "model.safetensors").write_bytes(b"half")
    with CheckpointWriter(storage, keep_last=2, keep_best=0) as writer:  # resumed from 21
        writer.save(snapshot(22))
        writer.wait()
        assert folders(storage) == ["step-00000021", "step-00000022", "step-00000025", "step-00000028"]
        writer.save(snapshot(28), score=0.0)  # what lies there claims to be the very same
    assert folders(storage) == ["step-00000022", "step-00000028"]
    assert_same(latest(storage), snapshot(28))


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    for location in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=f"checkpoint {location}: it has no manifest.json"):
            load(location)
    with pytest.raises(UserError, match="s3://bucket/prefix"):
        load("gs://x/y")


def test_one_in_the_folder_of_another_step_is_refused(tmp_path: Path) -> None:
    save(open_storage(tmp_path), 1)
    (tmp_path / "step-00000001").rename(tmp_path / "step-00000002")
    assert latest(open_storage(tmp_path)) is None
    assert_same(load(tmp_path / "step-00000002"), snapshot(1))


def forge(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest and seal it again, as someone would who knows the form."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    del manifest["sha256"]
    for name, entry in manifest["files"].items():
        data = (folder / name).read_bytes()
        entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    change(manifest)
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    manifest["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


ENTRY = {"size": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(format=2), "upgrade raytrain"),
        (lambda m: m.update(format=True), "not one of a checkpoint"),
        (lambda m: m.update(step="1"), "step or score"),
        (lambda m: m.update(score=math.nan), "step or score"),
        (lambda m: m.update(files=[]), "does not name"),
        (lambda m: m["files"].pop("state.json"), "does not name"),
        (lambda m: m["files"].update({"../x": ENTRY}), r"names '\.\./x'"),
        (lambda m: m["files"].update({"/etc/passwd": ENTRY}), "names '/etc/passwd'"),
        (lambda m: m["files"].update({"a/b.safetensors": ENTRY}), "names 'a/b.safetensors'"),
        (lambda m: m["files"].update({"x.pt": ENTRY}), "names 'x.pt'"),
        (lambda m: m["files"].update({"manifest.json": ENTRY}), "names 'manifest.json'"),
        (lambda m: m["files"].update({"more.safetensors": ENTRY}), "more.safetensors is missing"),
        (lambda m: m["files"]["state.json"].update(size=-1), "has [0-9]+ bytes instead of -1"),
        (lambda m: m["files"]["state.json"].pop("size"), "no size and sum"),
        (lambda m: m["files"].update({"state.json": None}), "no size and sum"),
        (lambda m: m["files"]["state.json"].update(sha256=["0"]), "was altered"),
    ],
)
def test_a_forged_manifest_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], None], words: str) -> None:
    save(open_storage(tmp_path), 1)
    forge(tmp_path / "step-00000001", change)
    with pytest.raises(UserError, match=words):
        load(tmp_path / "step-00000001")


def header(text: bytes, length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 8,
        header(b"{}", 2**63),
        header(b"[" * 100_000),
        header(b'{"w":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}'),
        header(b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4000000000]}}'),
        header(b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}') + b"1234",
        header(b'{"w":{"dtype":"X","shape":[1],"data_offsets":[0,4]}}') + b"1234",
        header(b'{"w":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}') + b"1",
        header(b'{"w":{"dtype":"F32","shape":[0,9223372036854775807,3],"data_offsets":[0,0]}}'),
    ],
)
def test_absurd_tensor_files_are_refused(tmp_path: Path, data: bytes) -> None:
    folder = tmp_path / "step-00000001"
    save(open_storage(tmp_path), 1)
    (folder / "model.safetensors").write_bytes(data)
    forge(folder, lambda manifest: None)
    with pytest.raises(UserError, match=r"model.safetensors is not a valid safetensors file"):
        load(folder)


@pytest.mark.parametrize("data", [b"", b"[]", b"\xff\xfe", b"[" * 200_000, b"9" * 10_000, b'{"a":1', b"null"])
def test_absurd_json_is_refused(tmp_path: Path, data: bytes) -> None:
    folder = tmp_path / "step-00000001"
    save(open_storage(tmp_path), 1)
    (folder / "state.json").write_bytes(data)
    forge(folder, lambda manifest: None)
    with pytest.raises(UserError, match=r"state.json is not"):
        load(folder)
    (folder / "manifest.json").write_bytes(data)
    with pytest.raises(UserError, match=r"manifest.json is not"):
        load(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    save(open_storage(folder), 3)
    return {path.name: path.read_bytes() for path in (folder / "step-00000003").iterdir()}


class InMemory(FolderStorage):
    """The files of one checkpoint."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(Path("/in-memory"))
        self.files = files

    def read(self, key: str) -> bytes:
        if key not in self.files:
            raise NotFoundError(key)
        return self.files[key]


def refusal(files: dict[str, bytes]) -> tuple[Checkpoint | None, str]:
    """What is read, or the one line of why it is not; any other exception is the test's failure."""
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("raytrain.runs.checkpoint.PAUSES_S", ())  # memory alters nothing on the way
            return load(InMemory(files)), ""
    except UserError as error:
        line = str(error)
    assert "\n" not in line
    return None, line


@settings(max_examples=examples(400), deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_damage_is_refused_or_harmless(whole: dict[str, bytes], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(whole)))
    content = bytearray(whole[name])
    kind = data.draw(st.sampled_from(["flip", "cut", "grow", "replace", "swap"]))
    if kind == "flip":
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    elif kind == "grow":
        content += data.draw(st.binary(min_size=1, max_size=20))
    elif kind == "replace":
        content = bytearray(data.draw(st.binary(max_size=200)))
    else:
        content = bytearray(whole[data.draw(st.sampled_from(sorted(whole)))])
    files = {**whole, name: bytes(content), "extra.safetensors": b"not named by the manifest"}
    read, line = refusal(files)
    if read is not None:
        assert_same(read, snapshot(3))
    else:
        assert files[name] != whole[name]
        assert "/in-memory" in line


@settings(max_examples=examples(300), deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_tensor_files_with_the_right_sums_never_crash(whole: dict[str, bytes], data: st.DataObject) -> None:
    content = bytearray(whole["model.safetensors"])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    files = {name: whole[name] for name in ("state.json", "config.json")} | {"model.safetensors": bytes(content)}
    manifest = manifest_of(3, None, files)
    files["manifest.json"] = json.dumps(manifest).encode()
    read, _ = refusal(files)
    assert read is None or "model" in read._tensors

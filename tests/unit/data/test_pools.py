"""Text larger than a disk: pools of shards, the same from a folder and from a storage, within the cache's limit."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raytrain.config.schema import RunConfig
from raytrain.data import node_cache, shards
from raytrain.data.batches import EvaluationBatches, TrainingBatches
from raytrain.data.cache import CORPORA, address, open_anywhere, publish
from raytrain.data.corpus import Corpus, CorpusWriter
from raytrain.data.pools import Pools, StoredCorpus, _Copies, part_of, pools_of, room_of
from raytrain.data.vocabulary import PAD, STOP
from raytrain.models.ladder import validation_ladder
from raytrain.storage import open_storage
from raytrain.storage.base import Storage, StorageError
from raytrain.storage.local import FolderStorage
from raytrain.training.trainer import Trainer, World
from raytrain.utils.errors import UserError
from tests.conftest import tiny_config
from tests.unit.training.test_loop import final, run

SHARD = 4096
SMALLEST = 4 * SHARD
POOL = 40_000
WINDOWS = {"sampling": "windows", "length": 64}
DOCUMENTS = {"sampling": "documents", "length": 200}
SAMPLINGS = pytest.mark.parametrize("sampling", [WINDOWS, DOCUMENTS], ids=["windows", "documents"])
FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def small_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Shards of 4 KiB, and a cache of the test's own."""
    monkeypatch.setattr(shards, "SHARD_BYTES", SHARD)
    monkeypatch.setenv("RAYTRAIN_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache" / "fetched"
    wait_for_copies()


def wait_for_copies() -> None:
    for thread in threading.enumerate():
        if thread.name == "next pool":
            thread.join(30)
            assert not thread.is_alive()


def config(**changes: Any) -> RunConfig[Any]:
    return tiny_config("byte_lstm", **{"pool_bytes": POOL, "steps": 10_000, **changes})


def elsewhere(corpus: Corpus, storage: Storage, run: RunConfig[Any]) -> Corpus:
    """The corpus as a machine opens it that does not have it."""
    publish(corpus, storage)
    where = address(corpus, storage, in_pools=run.pool_bytes > 0)
    return open_anywhere({**where, "path": "/nowhere"})


# ------------------------------------------------------------------------------------- shards and pools


def test_shards_are_consecutive_whole_documents(corpus: Corpus) -> None:
    split = corpus.split("train")
    found = shards.cut(split)
    assert len(found) > 50
    assert (found.documents[0], found.documents[-1]) == (0, split.num_documents)
    assert (found.starts[0], found.starts[-1]) == (0, len(split.stream))
    assert np.array_equal(split.offsets[found.documents], found.starts)
    longest = int(np.diff(split.offsets).max())
    assert (np.diff(found.starts)[:-1] < SHARD + longest).all()
    assert SHARD / 2 <= np.diff(found.starts)[-1] < 1.5 * SHARD + longest


def test_a_document_longer_than_a_shard_is_one_of_its_own(tmp_path: Path) -> None:
    texts = [b"a", b"b" * 3 * SHARD, b"c", b"d" * 2 * SHARD]
    with CorpusWriter(tmp_path / "made", name="long", source="tests") as writer:
        for text in texts:
            writer.add("train", text)
        writer.add("valid", b"v")
    found = shards.cut(Corpus.open(tmp_path / "made").split("train"))
    assert found.documents.tolist() == [0, 2, 4]
    assert found.starts[-1] == sum(map(len, texts)) + 4


def test_each_pass_has_every_document_once_and_mixes_anew(corpus: Corpus) -> None:
    split, pools = corpus.split("train"), Pools(corpus, "train", POOL)
    everything = sorted(split.document(number) for number in range(split.num_documents))
    assert pools.count == -(-len(split.stream) // POOL)
    orders = []
    for turn in range(2):
        found: list[bytes] = []
        for number in range(turn * pools.count, (turn + 1) * pools.count):
            part = pools.open(number)
            assert len(part.stream) <= POOL + SHARD
            assert part.by_length.tolist() == np.argsort(np.diff(part.offsets) - 1, kind="stable").tolist()
            found += [part.document(each) for each in range(part.num_documents)]
        assert sorted(found) == everything
        orders.append(found)
    assert orders[0] != orders[1]
    # of which shards a pool consists never changes: a run that goes on needs the same
    assert pools.chosen(0).tolist() == [1, 4, 7, 10, 15, 16, 31, 32, 45]
    assert pools.chosen(pools.count).tolist() == [4, 15, 18, 25, 32, 37, 43, 45, 49]


def test_small_text_is_read_whole(corpus: Corpus, small_shards: Path) -> None:
    size = len(corpus.split("train").stream)
    assert pools_of(corpus, "train", config(pool_bytes=size)) is None
    assert pools_of(corpus, "train", config(pool_bytes=0)) is None
    assert pools_of(corpus, "train", config(pool_bytes=size - 1)) is not None
    assert part_of(corpus, "train", config(pool_bytes=size)) is corpus.split("train")
    whole, pooled = (TrainingBatches(corpus, config(pool_bytes=number)) for number in (0, size))
    assert torch.equal(whole.batch(7).tokens, pooled.batch(7).tokens)
    assert not small_shards.exists()


# -------------------------------------------------------------------------------------------- batches


@SAMPLINGS
def test_batches_are_the_same_from_a_folder_and_from_a_storage(
    corpus: Corpus, storage: Storage, small_shards: Path, sampling: dict[str, Any]
) -> None:
    wanted = config(**sampling)
    here = TrainingBatches(corpus, wanted)
    steps = [0, 1, 2, 3 * here._steps_of_pool, 12 * here._steps_of_pool + 1, 1]
    expected = [here.batch(step).tokens for step in steps]
    wait_for_copies()
    shutil.rmtree(small_shards)
    far = elsewhere(corpus, storage, wanted)
    assert isinstance(far, StoredCorpus)
    batches = TrainingBatches(far, wanted)
    assert all(torch.equal(batches.batch(step).tokens, tokens) for step, tokens in zip(steps, expected, strict=True))
    for step in steps:
        parts = [TrainingBatches(far, wanted).batch(step, rank, 2) for rank in range(2)]
        assert torch.equal(torch.cat([part.tokens for part in parts]), batches.batch(step).tokens)
    valid = [EvaluationBatches(part_of(each, "valid", wanted), wanted, 64) for each in (corpus, far)]
    assert torch.equal(*(next(each.batches()).tokens for each in valid))
    assert not (small_shards / corpus.digest).exists()


@SAMPLINGS
def test_a_step_draws_from_its_pool_alone_and_every_pool_is_used(corpus: Corpus, sampling: dict[str, Any]) -> None:
    wanted = config(**sampling)
    batches, pools = TrainingBatches(corpus, wanted), Pools(corpus, "train", POOL)
    share = batches._steps_of_pool
    mean = 64 if sampling is WINDOWS else len(corpus.split("train").stream) / corpus.split("train").num_documents
    assert share == int(len(corpus.split("train").stream) / pools.count / mean) // 64
    for number in range(pools.count):
        text = pools.open(number).stream.tobytes()
        for step in (number * share, (number + 1) * share - 1):
            rows = batches.batch(step).tokens
            assert all(bytes(row[(row != PAD) & (row != STOP)].tolist()) in text for row in rows)


def test_what_is_measured_on_the_machine_itself_is_of_the_same_part(corpus: Corpus, storage: Storage) -> None:
    wanted = config(**DOCUMENTS, pool_bytes=SMALLEST)
    far = elsewhere(corpus, storage, wanted)
    assert len(part_of(corpus, "valid", wanted).stream) < SMALLEST + SHARD < len(corpus.split("valid").stream)
    assert np.array_equal(part_of(far, "valid", wanted).stream, part_of(corpus, "valid", wanted).stream)
    models = [Trainer(wanted, each, World()).model.state_dict() for each in (corpus, far)]
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())
    other = validation_ladder(corpus, replace(wanted, pool_bytes=0))
    assert validation_ladder(corpus, wanted).bits != other.bits
    assert np.array_equal(far.split("valid").stream, corpus.split("valid").stream)


def test_a_run_that_goes_on_in_another_pool_is_bit_identical(corpus: Corpus, tmp_path: Path) -> None:
    wanted = config(**WINDOWS, pool_bytes=SMALLEST, steps=20)
    assert TrainingBatches(corpus, wanted)._steps_of_pool == 3
    run(wanted, corpus, World(), tmp_path / "whole")
    run(wanted, corpus, World(), tmp_path / "parts", stop_at=10)
    run(wanted, corpus, World(), tmp_path / "parts")
    whole, parts = (final(tmp_path / name).tensors("model") for name in ("whole", "parts"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


# ------------------------------------------------------------------------------------------ the cache


def sizes(root: Path) -> int:
    """The bytes below a folder in which files come and go."""
    total = 0
    for folder, _, names in os.walk(root):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(Path(folder, name)).st_size
    return total


def test_the_cache_keeps_its_limit_and_the_next_pool_is_there_in_time(
    corpus: Corpus, storage: Storage, small_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 2 * POOL * 2 + 20_000
    monkeypatch.setenv("RAYTRAIN_CACHE_BYTES", str(limit))
    wanted = config(**WINDOWS, pool_bytes=POOL)
    far = elsewhere(corpus, storage, wanted)
    batches, peak = TrainingBatches(far, wanted), 0
    share = batches._steps_of_pool
    for step in range(12 * share):
        if step and step % share == 0:  # by then the thread has ended: nothing is copied any more
            pool = batches._pools
            assert pool is not None
            assert pool._ahead is not None
            pool._ahead[1].join(30)
            before = set(small_shards.iterdir())
            batches.batch(step)
            assert batches.samples.split._folder in before
        batches.batch(step)
        peak = max(peak, sizes(small_shards))
    assert POOL < peak <= limit
    assert len(corpus.split("train").stream) > limit


def test_the_smallest_cache_that_is_accepted_suffices(
    corpus: Corpus,
    tmp_path: Path,
    small_shards: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    wanted = config(**DOCUMENTS, pool_bytes=SMALLEST)
    far = elsewhere(corpus, open_storage(tmp_path / "store"), wanted)
    limit = 2 * Pools(far, "train", SMALLEST).most + room_of(far, "valid", wanted) + sizes(small_shards)
    monkeypatch.setenv("RAYTRAIN_CACHE_BYTES", str(limit - sizes(small_shards) - 1))
    with pytest.raises(UserError, match=r"two pools of the train split .* take .* bytes, and the cache may") as caught:
        TrainingBatches(far, wanted)
    assert "--pool-bytes" in str(caught.value)
    assert "\n" not in str(caught.value)
    monkeypatch.setenv("RAYTRAIN_CACHE_BYTES", str(limit))
    trainer = Trainer(wanted, far, World())
    for number in range(20):
        for step in range(2):
            trainer.train_batches.batch(number * trainer.train_batches._steps_of_pool + step + 1)
        wait_for_copies()
        assert sizes(small_shards) <= limit
    assert "more than RAYTRAIN_CACHE_BYTES" not in caplog.text


def test_processes_that_copy_at_once_keep_the_limit_together(
    corpus: Corpus, small_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools, barrier = Pools(corpus, "train", SMALLEST), FORK.Barrier(4)
    limit = 4 * pools.most
    monkeypatch.setenv("RAYTRAIN_CACHE_BYTES", str(limit))
    plain = _Copies._read

    def slow(self: _Copies, number: int, patient: bool) -> tuple[bytes, bytes]:
        time.sleep(0.02)
        return plain(self, number, patient)

    def work(first: int) -> None:
        for number in range(first, 12, 4):
            barrier.wait(30)
            Pools(corpus, "train", SMALLEST).open(number)

    monkeypatch.setattr(_Copies, "_read", slow)
    children = [FORK.Process(target=work, args=(number,)) for number in range(4)]
    for child in children:
        child.start()
    peak = 0
    while any(child.is_alive() for child in children):
        peak = max(peak, sizes(small_shards))
        time.sleep(0.002)
    assert [child.exitcode for child in children] == [0] * 4
    assert pools.most < peak <= limit


def test_pools_of_too_few_shards_are_refused(corpus: Corpus) -> None:
    with pytest.raises(UserError, match=f"--pool-bytes is {SMALLEST - 1}: must be at least {SMALLEST}, for 4 shards"):
        TrainingBatches(corpus, config(pool_bytes=SMALLEST - 1))


def test_a_pool_in_use_stays_and_one_that_is_left_goes(
    corpus: Corpus, small_shards: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RAYTRAIN_CACHE_BYTES", "60000")
    monkeypatch.setattr(node_cache, "ROOM_S", 0.3)
    pools = Pools(corpus, "train", POOL)
    first = pools.open(0)
    expected = first.stream.tobytes()
    second = pools.open(1)
    assert "more than RAYTRAIN_CACHE_BYTES: all of it is being read" in caplog.text
    assert len(folders(small_shards)) == 2
    assert first.stream.tobytes() == expected
    del first
    gc.collect()
    third = pools.open(2)
    assert len(folders(small_shards)) == 2
    assert third.num_documents + second.num_documents > 0


def folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def test_a_process_that_dies_while_it_copies_leaves_nothing_for_good(
    corpus: Corpus, small_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        calls, plain = iter(range(100)), _Copies._read

        def die(self: _Copies, number: int, patient: bool) -> tuple[bytes, bytes]:
            if next(calls) == 5:
                os._exit(9)
            return plain(self, number, patient)

        patch.setattr(_Copies, "_read", die)
        child = FORK.Process(target=Pools(corpus, "train", POOL).open, args=(0,))
        child.start()
        child.join(30)
    assert child.exitcode == 9
    assert len(folders(small_shards)) == 1
    pools = Pools(corpus, "train", POOL)
    assert pools.open(0).num_documents == int(
        np.diff(shards.cut(corpus.split("train")).documents)[pools.chosen(0)].sum()
    )
    assert len(folders(small_shards)) == 1


def test_four_processes_copy_a_pool_once(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    barrier, log, plain = FORK.Barrier(4), tmp_path / "log", _Copies._read

    def noted(self: _Copies, number: int, patient: bool) -> tuple[bytes, bytes]:
        with open(log, "a") as file:
            file.write(f"{number}\n")
        time.sleep(0.01)
        return plain(self, number, patient)

    def work() -> None:
        barrier.wait(30)
        assert Pools(corpus, "train", POOL).open(3).num_documents > 0

    monkeypatch.setattr(_Copies, "_read", noted)
    children = [FORK.Process(target=work) for _ in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 4
    lines = log.read_text().splitlines()
    assert len(lines) == len(set(lines)) == len(Pools(corpus, "train", POOL).chosen(3))


# ------------------------------------------------------------------------------------------- mistakes


def test_an_altered_shard_is_refused_by_name(corpus: Corpus, storage: Storage, small_shards: Path) -> None:
    wanted = config(**WINDOWS)
    far = elsewhere(corpus, storage, wanted)
    location = storage.child(f"{CORPORA}/{corpus.digest}")
    for key in ("train.bin", "train.offsets"):
        content = location.read(key)
        chosen, table = Pools(far, "train", POOL).chosen(0), shards.cut(corpus.split("train"))
        place = int(table.starts[chosen[1]]) if key == "train.bin" else 8 * int(table.documents[chosen[1]] + 1)
        location.write(key, content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(UserError, match=f"offsets were altered: the SHA-256 sum of shard {chosen[1]} is") as caught:
            TrainingBatches(far, wanted)
        assert location.uri("train.bin") in str(caught.value)
        assert [name for name in folders(small_shards) if ".info" not in name] == []
        location.write(key, content[: place + 1])
        with pytest.raises((UserError, StorageError)) as caught:
            TrainingBatches(far, wanted)
        assert "\n" not in str(caught.value)
        location.write(key, content)
    TrainingBatches(far, wanted)


def test_a_table_of_shards_that_is_damaged_or_missing_is_one_line(
    corpus: Corpus, storage: Storage, small_shards: Path
) -> None:
    publish(corpus, storage)
    where = {**address(corpus, storage, in_pools=True), "path": "/nowhere"}
    location = storage.child(f"{CORPORA}/{corpus.digest}")
    whole = json.loads(location.read("shards.json"))
    damages: list[Callable[[dict[str, Any]], Any]] = [
        lambda entry: entry.pop("starts"),
        lambda entry: entry["documents"].reverse(),
        lambda entry: entry["sha256"].pop(),
        lambda entry: entry.update(starts="0"),
    ]
    for damage in damages:
        altered = json.loads(json.dumps(whole))
        damage(altered["train"])
        location.write("shards.json", json.dumps(altered).encode())
        with pytest.raises(UserError, match=r"is damaged .*: delete it there, and prepare it again") as caught:
            open_anywhere(where)
        assert "\n" not in str(caught.value)
        assert folders(small_shards) == []
    location.delete("shards.json")
    with pytest.raises(UserError, match="has no table of shards: start the run again where its text is"):
        open_anywhere(where)
    publish(corpus, storage)  # as that run does
    assert json.loads(location.read("shards.json")) == whole
    assert open_anywhere(where).digest == corpus.digest
    with pytest.raises(UserError, match="is neither on this machine nor in"):
        open_anywhere({**where, "digest": "0" * 64})


def test_a_storage_that_fails_for_long_ends_the_step_that_needs_the_pool(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYTRAIN_STORAGE_PATIENCE", "0.2")
    wanted = config(**WINDOWS, pool_bytes=SMALLEST)
    far = elsewhere(corpus, open_storage(tmp_path / "store"), wanted)
    batches = TrainingBatches(far, wanted)
    share = batches._steps_of_pool
    failing = fail(monkeypatch, math.inf)
    for step in range(share):  # the copy of the next pool fails, which these steps do not need
        batches.batch(step)
    wait_for_copies()
    assert failing == [0]
    with pytest.raises(StorageError, match=r"the train split cannot be read: it is away") as caught:
        batches.batch(share)
    assert not isinstance(caught.value, UserError)  # a run goes on from its checkpoint when the storage is back
    assert len(failing) > 2


def fail(monkeypatch: pytest.MonkeyPatch, times: float) -> list[int]:
    """Let the next reads of parts fail; return the numbers of those that did."""
    failed: list[int] = []
    plain = FolderStorage.read_range

    def away(self: FolderStorage, key: str, start: int, size: int) -> bytes:
        if len(failed) < times:
            failed.append(len(failed))
            raise StorageError("it is away")
        return plain(self, key, start, size)

    monkeypatch.setattr(FolderStorage, "read_range", away)
    return failed


def test_a_storage_that_fails_for_a_moment_is_asked_again(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = config(**WINDOWS)
    far = elsewhere(corpus, open_storage(tmp_path / "store"), wanted)
    failed = fail(monkeypatch, 2)
    assert torch.equal(TrainingBatches(far, wanted).batch(0).tokens, TrainingBatches(corpus, wanted).batch(0).tokens)
    assert failed == [0, 1]


def test_a_corpus_that_is_replaced_on_this_machine_stays_as_it_was_opened(
    corpus: Corpus, tmp_path: Path, small_shards: Path
) -> None:
    wanted = config(**WINDOWS)
    mine = Corpus.open(shutil.copytree(corpus.path, tmp_path / "mine"))
    batches = TrainingBatches(mine, wanted)
    shutil.rmtree(mine.path)
    with CorpusWriter(mine.path, name="other", source="tests") as writer:
        for number in range(len(corpus.split("train").stream) // 64):
            writer.add("train", b"%063d" % number)
        writer.add("valid", b"v")
    step = batches._steps_of_pool
    assert torch.equal(batches.batch(step).tokens, TrainingBatches(corpus, wanted).batch(step).tokens)


def test_one_that_is_altered_on_this_machine_is_refused(corpus: Corpus, tmp_path: Path, small_shards: Path) -> None:
    mine = Corpus.open(shutil.copytree(corpus.path, tmp_path / "mine"))
    pools = Pools(mine, "train", POOL)
    with open(mine.path / "train.bin", "r+b") as file:
        file.write(b"?")
    with pytest.raises(UserError, match="was altered while it was in use"):
        pools.open(0)
    assert folders(small_shards) == []


def test_a_pool_that_a_disk_has_lost_is_copied_again(corpus: Corpus, small_shards: Path) -> None:
    expected = Pools(corpus, "train", POOL).open(0).stream.tobytes()
    for kind in ("bin", "offsets", "by_length"):
        (name,) = folders(small_shards)
        os.truncate(small_shards / name / f"train.{kind}", 0)
        assert Pools(corpus, "train", POOL).open(0).stream.tobytes() == expected
        (small_shards / name / f"train.{kind}").unlink()
        assert Pools(corpus, "train", POOL).open(0).stream.tobytes() == expected


def test_streams_and_negative_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="pool_bytes is 40000: a stream reads all text in its order"):
        config(sampling="stream")
    with pytest.raises(ValueError, match="pool_bytes is -1: must not be negative"):
        config(pool_bytes=-1)

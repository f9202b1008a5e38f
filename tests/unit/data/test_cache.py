"""Corpora in a storage: put there once, fetched once by each machine, and never half or altered."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from raytrain.data import cache as store
from raytrain.data import pieces
from raytrain.data.cache import CORPORA, address, fetch, open_anywhere, publish, share_vocabulary
from raytrain.data.corpus import Corpus, CorpusWriter
from raytrain.storage import open_storage
from raytrain.storage.base import Storage
from raytrain.storage.local import FolderStorage
from raytrain.utils.errors import UserError

if TYPE_CHECKING:
    from tests.support.s3_server import S3Server


FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def free() -> Iterator[None]:
    """What a test holds in a cache is let go at its end, as by a process that ends."""
    yield
    release()


def release() -> None:
    for descriptor in store._IN_USE.values():
        os.close(descriptor)
    store._IN_USE.clear()


def small(folder: Path, word: str) -> Corpus:
    """A corpus of its own digest, of about 100 KB."""
    with CorpusWriter(folder / word, name=word, source="tests") as writer:
        for number in range(1000):
            writer.add("train", f"{word} {number:04} {'x' * 80}".encode())
        writer.add("valid", word.encode())
    return Corpus.open(folder / word)


@pytest.fixture
def mine(tmp_path: Path) -> Corpus:
    return small(tmp_path / "made", "one")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def uploads(monkeypatch: pytest.MonkeyPatch, storage: Storage) -> list[str]:
    """The keys that are uploaded from now on."""
    keys: list[str] = []
    kind = type(storage)
    upload = kind.upload

    def noted(self: Storage, key: str, file: Path) -> None:
        keys.append(key)
        upload(self, key, file)  # type: ignore[arg-type]

    monkeypatch.setattr(kind, "upload", noted)
    return keys


def texts(corpus: Corpus) -> list[bytes]:
    return [corpus.split(name).stream.tobytes() for name in corpus.splits]


# --------------------------------------------------------------------------------- publish and fetch


def test_what_is_published_is_fetched(
    storage: Storage, mine: Corpus, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = uploads(monkeypatch, storage)
    publish(mine, storage)
    assert len(keys) == 7  # and shards.json, which is written
    assert keys[-1] == "corpus.json"
    publish(mine, storage)
    assert len(keys) == 7
    assert len(storage.list(f"{CORPORA}/{mine.digest}")) == 8

    found = fetch(storage, mine.digest, cache)
    assert found.digest == mine.digest
    assert found.path == cache / "fetched" / mine.digest
    assert texts(found) == texts(mine)
    found.verify()
    storage.delete_prefix(CORPORA)
    assert texts(fetch(storage, mine.digest, cache)) == texts(mine)


def test_one_that_was_not_published_to_the_end_does_not_count(
    storage: Storage, mine: Corpus, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = type(storage)
    upload = kind.upload

    def dies(self: Storage, key: str, file: Path) -> None:
        if key == "corpus.json":
            raise KeyboardInterrupt
        upload(self, key, file)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(kind, "upload", dies)
        with pytest.raises(KeyboardInterrupt):
            publish(mine, storage)
    with pytest.raises(UserError, match=f"corpus {mine.digest[:12]} is neither on this machine nor in"):
        fetch(storage, mine.digest, cache)
    publish(mine, storage)
    assert texts(fetch(storage, mine.digest, cache)) == texts(mine)


def test_an_altered_object_is_refused_by_name(storage: Storage, mine: Corpus, cache: Path) -> None:
    publish(mine, storage)
    location = storage.child(f"{CORPORA}/{mine.digest}")
    whole = location.read("train.bin")
    other = bytearray(whole)
    other[50] ^= 1
    for damage, words in ((bytes(other), "was altered"), (whole[:-5], "is damaged: train.bin has")):
        location.write("train.bin", damage)
        with pytest.raises(UserError, match=words) as caught:
            fetch(storage, mine.digest, cache)
        assert location.uri() in str(caught.value)
        assert "train.bin" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert str(cache) not in str(caught.value)
        assert folders(cache) == []
    location.delete("train.bin")
    with pytest.raises(UserError, match=r"is incomplete: train\.bin is missing"):
        fetch(storage, mine.digest, cache)
    location.write("train.bin", whole)
    assert texts(fetch(storage, mine.digest, cache)) == texts(mine)


def folders(cache: Path) -> list[str]:
    """What is in the cache beside the files of locks."""
    return sorted(path.name for path in (cache / "fetched").iterdir() if path.is_dir())


def test_another_corpus_in_its_place_is_refused(storage: Storage, mine: Corpus, tmp_path: Path, cache: Path) -> None:
    other = small(tmp_path / "made", "two")
    publish(other, storage)
    for key in storage.list(f"{CORPORA}/{other.digest}"):
        storage.write(key.replace(other.digest, mine.digest), storage.read(key))
    with pytest.raises(UserError, match=f"holds another corpus, {other.digest[:12]}"):
        fetch(storage, mine.digest, cache)
    assert folders(cache) == []


def test_a_corpus_is_opened_where_it_is(mine: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYTRAIN_CACHE", str(tmp_path / "cache"))
    storage = open_storage(tmp_path / "store")
    found = open_anywhere(address(mine, storage))
    assert found.path == mine.path
    assert not (tmp_path / "cache").exists()
    publish(mine, storage)
    where = address(mine, storage)
    shutil.rmtree(mine.path)
    assert open_anywhere(where).path == tmp_path / "cache" / "fetched" / mine.digest
    small(tmp_path / "made", "two").path.rename(mine.path)  # another at the same path
    assert open_anywhere(where).digest == mine.digest
    with pytest.raises(UserError, match="is neither on this machine nor in"):
        open_anywhere({**where, "digest": "0" * 64})


# ------------------------------------------------------------------------------------------ processes


def process(function: Callable[..., None], *arguments: Any) -> Any:
    """A child that runs ``function``; it starts with nothing held, as a worker does."""

    def run() -> None:
        release()
        function(*arguments)

    child = FORK.Process(target=run, daemon=True)
    child.start()
    return child


def test_four_processes_download_once(
    mine: Corpus, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, log, barrier = FolderStorage(tmp_path / "store"), tmp_path / "log", FORK.Barrier(4)
    publish(mine, storage)
    download = store._download

    def noted(*arguments: Any) -> None:
        with open(log, "a") as file:
            file.write("download\n")
        time.sleep(0.3)
        download(*arguments)

    def work() -> None:
        barrier.wait(30)
        assert texts(fetch(storage, mine.digest, cache)) == texts(mine)

    monkeypatch.setattr(store, "_download", noted)
    children = [process(work) for _ in range(4)]
    for child in children:
        child.join(30)
    assert [child.exitcode for child in children] == [0] * 4
    assert log.read_text() == "download\n"
    assert folders(cache) == [mine.digest]


def test_one_that_dies_while_it_downloads_leaves_nothing_for_good(
    mine: Corpus, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = FolderStorage(tmp_path / "store")
    publish(mine, storage)

    def die(self: Storage, key: str, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"half")
        os._exit(9)

    with monkeypatch.context() as patch:
        patch.setattr(FolderStorage, "download", die)
        child = process(fetch, storage, mine.digest, cache)
        child.join(30)
    assert child.exitcode == 9
    assert len(folders(cache)) == 1
    assert texts(fetch(storage, mine.digest, cache)) == texts(mine)
    assert folders(cache) == [mine.digest]


# ------------------------------------------------------------------------------------------- eviction


@pytest.fixture
def three(tmp_path: Path) -> tuple[Storage, list[Corpus]]:
    storage = open_storage(tmp_path / "store")
    corpora = [small(tmp_path / "made", word) for word in ("one", "two", "six")]
    for corpus in corpora:
        publish(corpus, storage)
    return storage, corpora


def room(monkeypatch: pytest.MonkeyPatch, corpus: Corpus, number: float) -> None:
    """Give the cache room for so many corpora of this size."""
    size = sum(file.stat().st_size for file in corpus.path.iterdir())
    monkeypatch.setenv("RAYTRAIN_CACHE_BYTES", str(int(number * size)))


def used(storage: Storage, corpora: list[Corpus], cache: Path) -> None:
    """Fetch each in turn, in processes that have ended, a while ago."""
    for number, corpus in enumerate(corpora):
        fetch(storage, corpus.digest, cache)
        release()
        os.utime(cache / "fetched" / corpus.digest, (1000 + number, 1000 + number))


def test_the_least_recently_used_leave(
    three: tuple[Storage, list[Corpus]], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, corpora = three
    room(monkeypatch, corpora[0], 2.5)
    used(storage, corpora[:2], cache)
    assert folders(cache) == sorted(corpus.digest for corpus in corpora[:2])
    fetch(storage, corpora[0].digest, cache)  # the older one is used again: the other goes
    release()
    fetch(storage, corpora[2].digest, cache)
    assert folders(cache) == sorted([corpora[0].digest, corpora[2].digest])
    assert texts(fetch(storage, corpora[1].digest, cache)) == texts(corpora[1])


def test_what_a_living_process_reads_stays(
    three: tuple[Storage, list[Corpus]], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, corpora = three
    room(monkeypatch, corpora[0], 1.5)
    ready, done = FORK.Event(), FORK.Event()

    def read() -> None:
        corpus = fetch(storage, corpora[0].digest, cache)
        ready.set()
        assert done.wait(30)
        assert texts(corpus) == texts(corpora[0])
        assert (corpus.path / "train.bin").exists()

    child = process(read)
    assert ready.wait(30)
    os.utime(cache / "fetched" / corpora[0].digest, (1000, 1000))
    used(storage, corpora[1:], cache)
    # the second had to go for the third, the first is older still but held; what was just fetched stays too
    assert folders(cache) == sorted([corpora[0].digest, corpora[2].digest])
    done.set()
    child.join(30)
    assert child.exitcode == 0
    fetch(storage, corpora[1].digest, cache)
    assert folders(cache) == [corpora[1].digest]


def test_a_file_that_is_being_written_beside_a_corpus_disturbs_no_eviction(
    three: tuple[Storage, list[Corpus]], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, corpora = three
    used(storage, corpora[:2], cache)
    for corpus in corpora[:2]:  # it is listed, and gone when it is asked for its size
        (cache / "fetched" / corpus.digest / ".partial-0").symlink_to("gone")
    room(monkeypatch, corpora[0], 2.5)
    fetch(storage, corpora[2].digest, cache)
    assert folders(cache) == sorted(corpus.digest for corpus in corpora[1:])


def test_an_eviction_that_is_cut_off_is_ended_by_the_next(
    three: tuple[Storage, list[Corpus]], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, corpora = three
    used(storage, corpora[:1], cache)
    room(monkeypatch, corpora[0], 1.5)

    rmtree = shutil.rmtree

    def die(folder: Path, **options: Any) -> None:
        if (Path(folder) / "train.bin").exists():  # not the scratch folder of the download
            (Path(folder) / "train.bin").unlink()
            os._exit(9)
        rmtree(folder, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", die)
        child = process(fetch, storage, corpora[1].digest, cache)
        child.join(30)
    assert child.exitcode == 9
    assert texts(fetch(storage, corpora[0].digest, cache)) == texts(corpora[0])
    release()
    fetch(storage, corpora[1].digest, cache)
    assert folders(cache) == [corpora[1].digest]


def test_many_processes_that_fetch_and_evict_do_not_disturb_each_other(
    three: tuple[Storage, list[Corpus]], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, corpora = three
    room(monkeypatch, corpora[0], 0.5)

    def work(first: int) -> None:
        for turn in range(12):
            wanted = corpora[(first + turn) % 3]
            assert texts(fetch(storage, wanted.digest, cache)) == texts(wanted)
            release()

    children = [process(work, number) for number in range(3)]
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * 3


# ------------------------------------------------------------------------------------------- mistakes


def test_a_cache_that_cannot_be_written_is_one_line(
    mine: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(tmp_path / "store")
    publish(mine, storage)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("RAYTRAIN_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot write to the cache .*/file/fetched: .*; set RAYTRAIN_CACHE") as caught:
        fetch(storage, mine.digest)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("limit", ["50GB", "-1", "1e9"])
def test_a_limit_that_is_no_number_is_one_line(
    mine: Corpus, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setenv("RAYTRAIN_CACHE_BYTES", limit)
    with pytest.raises(UserError, match=f"RAYTRAIN_CACHE_BYTES is '{limit}': must be a number of bytes"):
        fetch(open_storage(tmp_path / "store"), mine.digest, cache)


def test_a_storage_that_fails_is_one_line(
    s3_server: S3Server, mine: Corpus, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_server.use(monkeypatch, AWS_SECRET_ACCESS_KEY="not-the-secret")
    with pytest.raises(UserError, match=f"corpus {mine.digest[:12]} cannot be fetched: .*no permission"):
        fetch(open_storage("s3://raytrain/x"), mine.digest, cache)


# ------------------------------------------------------------------------------------- vocabularies


@pytest.fixture
def learnt(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The vocabularies that this process has learnt."""
    names: list[str] = []
    learn = pieces.learn

    def counted(train: Any, name: str) -> Any:
        names.append(name)
        return learn(train, name)

    monkeypatch.setattr(pieces, "learn", counted)
    return names


def test_a_vocabulary_is_learnt_once_and_found_by_every_node(
    storage: Storage, mine: Corpus, cache: Path, monkeypatch: pytest.MonkeyPatch, learnt: list[str]
) -> None:
    monkeypatch.setenv("RAYTRAIN_CACHE", str(cache))
    publish(mine, storage)
    elsewhere = fetch(storage, mine.digest)  # a node that had the corpus before the vocabulary was learnt
    share_vocabulary(mine, storage, "byte")
    assert not list(mine.path.glob("vocabulary*"))
    share_vocabulary(mine, storage, "bpe:270")
    share_vocabulary(Corpus.open(mine.path), storage, "bpe:270")
    where = address(mine, storage, "bpe:270")
    assert open_anywhere(where).vocabulary("bpe:270").digest == mine.vocabulary("bpe:270").digest
    assert learnt == ["bpe:270"]
    if storage.folder is not None:  # whose nodes see the corpus at its own path
        return
    mine.path.rename(mine.path.with_name("away"))
    found = open_anywhere(where)
    assert found.path == elsewhere.path
    assert found.vocabulary("bpe:270").digest == mine.vocabulary("bpe:270").digest
    assert found.has_vocabulary("bpe:270")
    # another driver takes the one in the storage
    (found.path / "vocabulary-bpe-270.json").unlink()
    share_vocabulary(Corpus.open(found.path), storage, "bpe:270")
    assert learnt == ["bpe:270"]


def test_a_vocabulary_of_a_corpus_that_cannot_be_written_is_kept_in_the_storage(
    storage: Storage, mine: Corpus, learnt: list[str]
) -> None:
    # whoever runs the tests may write to any folder, but not replace one by a file
    (mine.path / "vocabulary-bpe-270.json").mkdir()
    share_vocabulary(mine, storage, "bpe:270")
    again = open_anywhere(address(mine, storage, "bpe:270"))
    assert again.vocabulary("bpe:270").digest == mine.vocabulary("bpe:270").digest
    assert learnt == ["bpe:270"]


def test_a_vocabulary_is_shared_once_by_a_process(
    storage: Storage, mine: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    share_vocabulary(mine, storage, "bpe:270")
    monkeypatch.setattr(type(storage), "read", lambda *_: pytest.fail("it is known to be there"))
    monkeypatch.setattr(Corpus, "has_vocabulary", lambda *_: pytest.fail("it is known to be there"))
    share_vocabulary(mine, storage, "bpe:270")


def test_the_vocabulary_of_the_storage_takes_the_place_of_ones_own(mine: Corpus) -> None:
    """Workers read the file beside the corpus where there is one: it must be the one that all others read."""
    own = mine.vocabulary("bpe:270")
    values = own.values()
    other = pieces.Vocabulary.from_values(values | {"tokenizer": values["tokenizer"] + " "})
    mine.add_vocabulary(other)
    assert Corpus.open(mine.path).vocabulary("bpe:270").digest == other.digest != own.digest


def test_a_damaged_vocabulary_in_the_storage_is_learnt_and_put_there_again(
    storage: Storage, mine: Corpus, learnt: list[str]
) -> None:
    (mine.path / "vocabulary-bpe-270.json").mkdir()
    key = f"{CORPORA}/{mine.digest}/vocabulary-bpe-270.json"
    for number, damaged in enumerate((b"{", b'{"format": 1}', b"\xff"), 1):
        storage.write(key, damaged)
        opened = Corpus.open(mine.path)
        share_vocabulary(opened, storage, "bpe:270")
        assert learnt == ["bpe:270"] * number
        assert (
            pieces.Vocabulary.from_values(json.loads(storage.read(key))).digest == opened.vocabulary("bpe:270").digest
        )

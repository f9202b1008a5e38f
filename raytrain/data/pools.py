"""Pools: the text of a run's steps, pool after pool, so that no machine needs a whole copy of a large corpus.

A pool is a choice of ``--pool-bytes`` of a split's shards, copied to the cache of the machine, where all of its
processes read it. A pass over the split has every shard in one pool; the next pass mixes the shards anew. The pools are
the same whoever reads them, from a folder or from a storage.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytrain.config.schema import RunConfig
from raytrain.data import shards as shards_module
from raytrain.data.corpus import INFO, Corpus, Split, read_info, write_by_length
from raytrain.data.node_cache import NodeCache
from raytrain.data.shards import FILE, Shards, checksum, cut, from_table
from raytrain.storage.base import NotFoundError, Storage, StorageError, retry_storage
from raytrain.utils.errors import UserError
from raytrain.utils.validation import parse_json

FEWEST = 4
"""Fewest shards of a pool, so that it is a mixture of the text."""


class StoredCorpus(Corpus):
    """A corpus in a storage, of which this machine copies only what it reads."""

    def __init__(self, location: Storage, path: Path, info: dict[str, Any], table: Any) -> None:
        """``path``: a folder of this machine for its vocabularies; ``table``: the values of ``shards.json``."""
        super().__init__(path, info)
        self.location = location
        self._table = table

    @staticmethod
    def find(location: Storage, digest: str) -> StoredCorpus:
        """Return the corpus with this digest that ``cache.publish`` has put into ``location``.

        Raises:
            UserError: it is not there, or not complete.
        """

        def fill(folder: Path) -> None:
            for file in (FILE, INFO):
                retry_storage(partial(location.download, file, folder / file))
            read(folder)  # what is damaged must not stay in the cache

        def read(folder: Path) -> StoredCorpus:
            try:
                corpus = StoredCorpus(location, folder, read_info(folder), parse_json((folder / FILE).read_bytes()))
                for split in corpus.splits:
                    corpus.shards(split)
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"{location.uri()} is damaged ({error}): delete it there, and prepare it again"
                ) from None
            if corpus.digest != digest:
                raise UserError(f"{location.uri()} holds another corpus, {corpus.digest[:12]}: delete it there")
            return corpus

        try:
            return NodeCache().open(f"{digest}.info", fill, read)
        except NotFoundError:
            raise UserError(f"{location.uri()} has no table of shards: start the run again where its text is") from None
        except StorageError as error:
            raise UserError(f"corpus {digest[:12]} cannot be fetched: {error}") from None

    def shards(self, name: str) -> Shards:
        """Return the shards of a split."""
        return from_table(self._table, name)

    def split(self, name: str) -> Split:
        """Return one split, copied whole to the cache of this machine.

        Raises:
            UserError: the corpus has no such split, it was altered, or the cache cannot be written.
            StorageError: the storage has failed for too long.
        """
        if name not in self._open and name in self.splits:
            shards = self.shards(name)
            self._open[name] = _Copies(self, name).open(np.arange(len(shards)))
        return super().split(name)


class Pools:
    """The pools of a split, by their number in the order in which a run reads them."""

    def __init__(self, corpus: Corpus, name: str, pool_bytes: int) -> None:
        """Divide the shards of a split into pools of at most about ``pool_bytes``.

        Raises:
            UserError: ``pool_bytes`` is too small.
        """
        if pool_bytes < (least := FEWEST * shards_module.SHARD_BYTES):
            raise UserError(f"--pool-bytes is {pool_bytes}: must be at least {least}, for {FEWEST} shards")
        self._name = name
        self._copies = _Copies(corpus, name)
        self._shards = shards = self._copies.shards
        self.count = min(len(shards), -(-int(shards.starts[-1]) // pool_bytes))
        """Pools of a pass over the split."""
        self._ahead: tuple[int, threading.Thread] | None = None

    def steps(self, config: RunConfig[Any]) -> int:
        """Return how many steps draw from a pool before the next one: as many as it has samples for, on average."""
        stream = float(self._shards.starts[-1])
        mean = stream / self._shards.documents[-1] if config.sampling == "documents" else config.length
        return max(1, int(stream / self.count / mean) // config.batch_size)

    def chosen(self, number: int) -> NDArray[np.int64]:
        """Return the numbers of the shards of a pool, in their order."""
        turn, place = divmod(number, self.count)
        key = hashlib.blake2b(f"{self._name}/{turn}".encode(), digest_size=16).digest()
        # only random() is used, because its stream is stable across NumPy versions
        mixed = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).random(len(self._shards))
        return np.sort(np.array_split(np.argsort(mixed, kind="stable"), self.count)[place])

    def open(self, number: int) -> Split:
        """Return a pool, copied to the cache of this machine unless it is there.

        Raises:
            UserError: it was altered, or the cache cannot be written.
            StorageError: the storage has failed for too long.
        """
        if self._ahead is not None and self._ahead[0] == number:
            self._ahead[1].join()
        self._ahead = None
        return self._copies.open(self.chosen(number))

    def fetch_ahead(self, number: int) -> None:
        """Copy a pool in a thread while others are read."""

        def fetch() -> None:
            # the step that needs it tries again, waits for a storage that fails, and says why it cannot go on
            with contextlib.suppress(UserError, StorageError):
                self._copies.open(self.chosen(number), patient=False)

        thread = threading.Thread(target=fetch, daemon=True, name="next pool")
        thread.start()
        self._ahead = number, thread

    @property
    def most(self) -> int:
        """Bytes that the largest possible pool takes in the cache."""
        shards = -(-len(self._shards) // self.count)
        return int(np.sort(self._shards.sizes)[-shards:].sum())

    def require_room(self, more: int) -> None:
        """Check that two pools, one in use and one on its way, and ``more`` bytes fit the cache.

        Raises:
            UserError: they do not.
        """
        need = 2 * self.most + more
        if need > (limit := NodeCache().limit):
            raise UserError(
                f"two pools of the {self._name} split and the validation text take {need:,} bytes, and the cache may "
                f"hold {limit:,}: give a smaller --pool-bytes, or a larger RAYTRAIN_CACHE_BYTES"
            )


class _Copies:
    """Copies of the shards of a split in the cache of this machine."""

    def __init__(self, corpus: Corpus, name: str) -> None:
        self._corpus = corpus
        self._name = name
        self.shards = corpus.shards(name) if isinstance(corpus, StoredCorpus) else cut(corpus.split(name))

    def open(self, chosen: NDArray[np.int64], patient: bool = True) -> Split:
        """Return a split of the documents of these shards; if ``patient``, wait for a storage that fails.

        Raises:
            UserError: they were altered, or the cache cannot be written.
            StorageError: the storage fails.
        """
        identity = hashlib.sha256(self.shards.starts.tobytes() + chosen.tobytes()).hexdigest()[:16]
        name = f"{self._corpus.digest}.{self._name}.{identity}"
        sizes = {
            "bin": int(np.diff(self.shards.starts)[chosen].sum()),
            "by_length": 8 * int(np.diff(self.shards.documents)[chosen].sum()),
        }
        sizes["offsets"] = sizes["by_length"] + 8

        def read(folder: Path) -> Split:
            return Split(folder, self._name, {}, self._corpus.vocabulary)

        fill, is_whole = partial(self._copy, chosen, patient), partial(self._has, sizes)
        try:
            return NodeCache().open(name, fill, read, sum(sizes.values()), is_whole)
        except StorageError as error:
            raise StorageError(f"the {self._name} split cannot be read: {error}") from None

    def _has(self, sizes: dict[str, int], folder: Path) -> bool:
        """Return whether ``folder`` has files of these sizes."""
        try:
            return all((folder / f"{self._name}.{kind}").stat().st_size == size for kind, size in sizes.items())
        except FileNotFoundError:
            return False

    def _copy(self, chosen: NDArray[np.int64], patient: bool, folder: Path) -> None:
        folder.mkdir()
        paths = {kind: folder / f"{self._name}.{kind}" for kind in ("bin", "offsets", "by_length")}
        end = 0
        with open(paths["bin"], "wb") as stream, open(paths["offsets"], "wb") as positions:
            positions.write(bytes(8))
            for number in chosen.tolist():
                text, packed = self._read(number, patient)
                offsets = np.frombuffer(packed, dtype="<i8")
                stream.write(text)
                positions.write((offsets[1:] + (end - offsets[0])).astype("<i8").tobytes())
                end += len(text)
        if not isinstance(self._corpus, StoredCorpus):
            self._corpus.split(self._name).check()
        write_by_length(paths["offsets"], paths["by_length"])

    def _read(self, number: int, patient: bool) -> tuple[bytes, bytes]:
        """Return the bytes of a shard and of the offsets of its documents, with the end of the last one."""
        first, last = self.shards.documents[number : number + 2].tolist()
        start, stop = self.shards.starts[number : number + 2].tolist()
        if not isinstance(self._corpus, StoredCorpus):
            split = self._corpus.split(self._name)  # stays mapped as it was opened, even if its files are replaced
            return split.stream[start:stop].tobytes(), split.offsets[first : last + 1].tobytes()
        location = self._corpus.location

        def read(kind: str, start: int, size: int) -> bytes:
            request = partial(location.read_range, f"{self._name}.{kind}", start, size)
            return retry_storage(request) if patient else request()

        text, packed = read("bin", start, stop - start), read("offsets", 8 * first, 8 * (last - first + 1))
        if checksum(text, packed) != self.shards.sums[number]:
            raise UserError(
                f"{location.uri(f'{self._name}.bin')} or its offsets were altered: the SHA-256 sum of shard {number} "
                "is not the recorded one; delete the corpus there, and prepare it again"
            )
        return text, packed


def pools_of(corpus: Corpus, name: str, config: RunConfig[Any]) -> Pools | None:
    """Return the pools in which a run reads a split; ``None`` if it reads the whole split."""
    if not config.pool_bytes or name not in corpus.splits or corpus.stream_size(name) <= config.pool_bytes:
        return None
    return Pools(corpus, name, config.pool_bytes)


def room_of(corpus: Corpus, name: str, config: RunConfig[Any]) -> int:
    """Return the bytes that ``part_of`` takes in the cache of a machine without the corpus."""
    pools = pools_of(corpus, name, config)
    if pools is not None:
        return pools.most
    split = corpus.info["splits"][name]
    return sum(entry["size"] for entry in split["files"].values())


def part_of(corpus: Corpus, name: str, config: RunConfig[Any]) -> Split:
    """Return the part of a split that stands for all of it in a run: its first pool, or the split.

    Raises:
        UserError: the corpus has no such split, or it cannot be copied.
    """
    pools = pools_of(corpus, name, config)
    return corpus.split(name) if pools is None else pools.open(0)

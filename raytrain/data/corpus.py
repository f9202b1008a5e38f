"""The corpus format: documents as bytes in a few flat files that are memory-mapped. It knows only bytes.

A corpus is a folder with ``corpus.json`` and, for each of ``train``, ``valid`` and (optionally) ``test``:

``SPLIT.bin``
    uint8: every document followed by one newline byte, whatever the document contains.
``SPLIT.offsets``
    little-endian int64, documents + 1: where each document starts; the last is the size of ``SPLIT.bin``.
    Document i is ``bin[offsets[i] : offsets[i + 1] - 1]``.
``SPLIT.by_length``
    little-endian int64: document numbers sorted by (length, number), so that a range of lengths is a slice.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import json
import mmap
import os
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from raytrain.data.pieces import Vocabulary, file_of, keep, vocabulary_of
from raytrain.utils.errors import UserError
from raytrain.utils.files import complete_file, locked
from raytrain.utils.memory import free_memory
from raytrain.utils.validation import parse_json, validate_type

FORMAT = 1
INFO = "corpus.json"
"""File that describes a corpus; without it, a folder is none."""
SplitName = Literal["train", "valid", "test"]
SPLITS: tuple[SplitName, ...] = get_args(SplitName)
PARTS = ("bin", "offsets", "by_length")
SEPARATOR = b"\n"
HELD_SHARE = 0.5
"""Share of the free memory up to which a stream counts as staying in memory."""
Bytes = np.memmap[Any, np.dtype[np.uint8]]
Numbers = np.memmap[Any, np.dtype[np.int64]]
_AGAIN = "delete the folder and prepare it again"
_CHUNK = 1 << 20
_OFFSETS_BUFFERED = 1 << 16
_SORTED_AT_ONCE = 1 << 20
"""Documents whose lengths are sorted in memory at a time."""


class Split:
    """One split of a corpus, memory-mapped, so that its memory does not grow with the corpus."""

    def __init__(self, folder: Path, name: str, files: dict[str, Any], vocabulary: Callable[[str], Vocabulary]) -> None:
        """``files``: their entries in corpus.json; ``vocabulary``: see ``Corpus.vocabulary``."""
        self.name = name
        self.vocabulary = vocabulary
        self._folder = folder
        self._pieces: dict[str, NDArray[np.uint32]] = {}
        self._sums = {folder / file: recorded["sha256"] for file, recorded in files.items()}
        self._stamps = _stamps(self._sums)  # before they are mapped
        self.stream: Bytes = np.memmap(folder / f"{name}.bin", dtype=np.uint8, mode="r")
        self.scattered = self.stream
        """The stream for random access: if it exceeds the memory, the kernel does not read ahead."""
        if len(self.stream) > HELD_SHARE * free_memory():
            # mapped twice, since others read it sequentially; by default the kernel reads 128 KB for a few bytes
            self.scattered = np.memmap(folder / f"{name}.bin", dtype=np.uint8, mode="r")
            advise(self.scattered, mmap.MADV_RANDOM)
        self.offsets: Numbers = np.memmap(folder / f"{name}.offsets", dtype="<i8", mode="r")
        self.by_length: Numbers = np.memmap(folder / f"{name}.by_length", dtype="<i8", mode="r")

    def check(self) -> None:
        """Make sure that the mapped files are those that were opened; takes microseconds while no file is written to.

        Raises:
            UserError: a file was altered since.
        """
        stamps = _stamps(self._sums)
        for path, (node, *stamp) in stamps.items():
            before, *opened = self._stamps[path]
            # a file that was removed or replaced stays mapped as it was
            if node == before and stamp != opened and _sha256(path) != self._sums[path]:
                raise UserError(f"{path} was altered while it was in use: restore it, or {_AGAIN}")
        self._stamps |= {path: stamp for path, stamp in stamps.items() if stamp[0] == self._stamps[path][0]}

    @property
    def num_documents(self) -> int:
        """Number of documents, none of them empty."""
        return len(self.by_length)

    @property
    def num_bytes(self) -> int:
        """Bytes of text, excluding the separators."""
        return len(self.stream) - self.num_documents

    def document(self, number: int) -> bytes:
        """Return the text of one document, 0 <= number < num_documents."""
        if not 0 <= number < self.num_documents:
            raise IndexError(f"document {number} of {self.num_documents}")
        return self.stream[self.offsets[number] : self.offsets[number + 1] - 1].tobytes()

    def lengths(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the bytes of the documents with these numbers: int64, in the shape of ``numbers``."""
        return np.asarray(self.offsets[numbers + 1] - self.offsets[numbers] - 1)

    def in_pieces(self, vocabulary: Vocabulary) -> NDArray[np.uint32]:
        """Return the stream in a vocabulary's pieces, which may span the ends of documents.

        They are cut once, stored beside the corpus, and memory-mapped from there; if nothing can be written, they are
        kept in memory.
        """
        if (digest := vocabulary.digest) not in self._pieces:
            path = self._folder / f"{self.name}.{digest[:16]}.pieces"
            try:
                if not (self._folder / "corpus.json").is_file():  # removed meanwhile: it must not be recreated
                    raise FileNotFoundError(self._folder)
                with locked(self._folder / f".{path.name}.lock"):
                    if (kept := self._kept_pieces(path, vocabulary)) is None:
                        with complete_file(path) as partial, open(partial, "wb") as file:
                            for symbols in vocabulary.encode_stream(self.stream):
                                file.write(symbols.astype("<u4").tobytes())
                        kept = np.memmap(path, dtype="<u4", mode="r")
                self._pieces[digest] = kept
            except OSError:
                cut = [symbols.astype(np.uint32) for symbols in vocabulary.encode_stream(self.stream)]
                self._pieces[digest] = np.concatenate(cut)
        return self._pieces[digest]

    def _kept_pieces(self, path: Path, vocabulary: Vocabulary) -> NDArray[np.uint32] | None:
        """Return the pieces in the file at ``path``; ``None`` if it is not there, or is for another stream."""
        if not path.is_file() or path.stat().st_size % 4 or path.stat().st_size == 0:
            return None
        pieces = np.memmap(path, dtype="<u4", mode="r")
        num_bytes = 0
        for start in range(0, len(pieces), _CHUNK):
            block = pieces[start : start + _CHUNK]
            if block.max() >= len(vocabulary.lengths):
                return None
            num_bytes += int(vocabulary.lengths[block].sum())
        return pieces if num_bytes == len(self.stream) else None

    def length_range(self, low: int, high: int) -> tuple[int, int]:
        """Return the positions [first, last) in ``by_length`` of the documents with low <= bytes < high."""
        positions = range(self.num_documents)

        def length(position: int) -> int:
            number = self.by_length[position]
            return int(self.offsets[number + 1] - self.offsets[number] - 1)

        first = bisect.bisect_left(positions, low, key=length)
        return first, max(first, bisect.bisect_left(positions, high, key=length))


class Corpus:
    """A prepared corpus, open for reading."""

    def __init__(self, path: Path, info: dict[str, Any]) -> None:
        self.path = path
        self.info = info
        self.name: str = info["name"]
        self.digest: str = info["digest"]
        self.splits: tuple[str, ...] = tuple(name for name in SPLITS if name in info["splits"])
        self._open: dict[str, Split] = {}
        self._vocabularies: dict[str, Vocabulary] = {}
        self.shared: set[tuple[str, str]] = set()
        """(name, storage address) of vocabularies that each node finds there: see ``share_vocabulary``."""

    @staticmethod
    def open(folder: str | Path) -> Corpus:
        """Open a corpus and check that its files exist and have their recorded sizes.

        Raises:
            UserError: the folder is not a corpus, is incomplete, or has another format.
        """
        folder = Path(folder)
        info = read_info(folder)
        for split, values in info["splits"].items():
            _check_sizes(folder, split, values)
        return Corpus(folder, info)

    def stream_size(self, name: str) -> int:
        """Return the bytes of a split's text, separators included."""
        size: int = self.info["splits"][name]["files"][f"{name}.bin"]["size"]
        return size

    def split(self, name: str) -> Split:
        """Return one split, opened once.

        Raises:
            UserError: the corpus has no such split.
        """
        if name not in self.splits:
            raise UserError(f"corpus {self.name} has no split {name!r}; it has {', '.join(self.splits)}")
        if name not in self._open:
            self._open[name] = Split(self.path, name, self.info["splits"][name]["files"], self.vocabulary)
        return self._open[name]

    def vocabulary(self, name: str) -> Vocabulary:
        """Return the vocabulary ``name``, learnt from the training split once and stored beside the corpus.

        Raises:
            UserError: the library that learns it is not installed.
        """
        if name not in self._vocabularies:
            # the split is opened only to learn from it: a corpus in a storage would have to be copied
            self._vocabularies[name] = vocabulary_of(lambda: self.split("train"), name, self.path)
        return self._vocabularies[name]

    def has_vocabulary(self, name: str) -> bool:
        """Return whether the vocabulary ``name`` is stored beside the corpus, for every process that opens it there."""
        return (self.path / file_of(name)).is_file()

    def add_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Use a vocabulary that was learnt from the same corpus elsewhere."""
        self._vocabularies[vocabulary.name] = vocabulary
        keep(vocabulary, self.path)  # replaces one that was learnt here: all processes must have the same

    def verify(self) -> None:
        """Read every file: its SHA-256 checksum must match, and its numbers must be those of documents.

        Raises:
            UserError: a file was altered.
        """
        for values in self.info["splits"].values():
            for file, recorded in values["files"].items():
                if _sha256(self.path / file) != recorded["sha256"]:
                    raise UserError(
                        f"{self.path / file} was altered: its SHA-256 sum is not the recorded one; {_AGAIN}"
                    )
        if _digest(self.info["splits"]) != self.digest:
            raise UserError(f"{self.path}/corpus.json was altered: its digest does not follow from its sums; {_AGAIN}")
        for name in self.splits:
            if not _fits(self.split(name)):
                raise UserError(f"corpus {self.path} is damaged: the numbers of {name} are not its documents; {_AGAIN}")


class CorpusWriter:
    """Writes a corpus as a context manager, document by document, in constant memory.

    The corpus is written beside ``folder`` and moved there when it is complete; an exception leaves nothing behind. An
    existing corpus with the same digest is kept as it is.

    Raises:
        UserError: ``folder`` holds something else, a split that must not be empty is, or nothing can be written.
    """

    def __init__(self, folder: str | Path, *, name: str, source: str, cleaning: Iterable[str] = ()) -> None:
        self.folder = Path(folder)
        self._info: dict[str, Any] = {
            "format": FORMAT,
            "name": name,
            "source": source,
            "cleaning": list(cleaning),
            "empty_dropped": 0,
        }
        self._split_notes: dict[str, dict[str, Any]] = {split: {} for split in SPLITS}
        self._files: dict[str, _SplitFiles] = {}
        self._partial = self.folder.parent / f"{partial_prefix(self.folder)}{os.getpid()}-{secrets.token_hex(4)}"

    def __enter__(self) -> CorpusWriter:
        if self.folder.exists() and not (self.folder / "corpus.json").is_file() and not _is_empty_folder(self.folder):
            raise UserError(f"{self.folder} exists and is not a corpus; choose another folder")
        self._partial.mkdir(parents=True)
        return self

    def add(self, split: SplitName, document: bytes) -> None:
        """Append a document; an empty one is not stored but counted as ``empty_dropped``."""
        if not document:
            self._info["empty_dropped"] += 1
            return
        self._files_of(split).add(document)

    def extend(self, split: SplitName, stream: NDArray[np.uint8], lengths: NDArray[np.int64]) -> None:
        """Append non-empty documents in the format of the stream, each followed by a separator.

        Args:
            split: the split to which they belong.
            stream: their bytes, uint8[sum of lengths + number of documents].
            lengths: bytes of each document, int64[number of documents].
        """
        if len(lengths):
            self._files_of(split).extend(stream, lengths)

    def _files_of(self, split: SplitName) -> _SplitFiles:
        if split not in self._files:
            if split not in SPLITS:
                raise ValueError(f"split is {split!r}: must be one of {', '.join(SPLITS)}")
            self._files[split] = _SplitFiles(self._partial, split)
        return self._files[split]

    def annotate(self, values: dict[str, Any], split: SplitName | None = None) -> None:
        """Record further JSON values in corpus.json, for the whole corpus or for one split."""
        (self._info if split is None else self._split_notes[split]).update(values)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            for files in self._files.values():
                files.discard()
            shutil.rmtree(self._partial, ignore_errors=True)

    def _finish(self) -> None:
        documents = {split: files.num_documents for split, files in self._files.items()}
        for split in ("train", "valid"):
            if split not in documents:
                raise UserError(
                    f"{self._info['source']}: no document for the {split} split (non-empty documents: "
                    f"{sum(documents.values())}); give more text, or more lines: each is a document"
                )
        splits: dict[str, Any] = {
            split: {**self._files[split].finish(), **self._split_notes[split]}
            for split in SPLITS
            if split in self._files
        }
        info = {**self._info, "digest": _digest(splits), "splits": splits}
        if (self.folder / "corpus.json").is_file():
            if Corpus.open(self.folder).digest == info["digest"]:
                return
            raise UserError(f"{self.folder} holds another corpus; choose another folder or delete it")
        (self._partial / "corpus.json").write_text(json.dumps(info, indent=2, ensure_ascii=False) + "\n", "utf-8")
        os.rename(self._partial, self.folder)


def partial_prefix(folder: Path) -> str:
    """Return the prefix of the names of half-written siblings of ``folder``."""
    return f".{folder.name}.partial-"


class _SplitFiles:
    """The three files of a split while they are being written."""

    def __init__(self, folder: Path, split: str) -> None:
        self._paths = {part: folder / f"{split}.{part}" for part in PARTS}
        self._bin: BinaryIO = open(self._paths["bin"], "wb", buffering=_CHUNK)  # noqa: SIM115 (closed by close)
        self._offsets: BinaryIO = open(self._paths["offsets"], "wb")  # noqa: SIM115
        self._pending = [0]
        self._end = 0
        self.num_documents = 0

    def add(self, document: bytes) -> None:
        self._bin.write(document)
        self._bin.write(SEPARATOR)
        self._end += len(document) + 1
        self.num_documents += 1
        self._pending.append(self._end)
        if len(self._pending) >= _OFFSETS_BUFFERED:
            self._flush_offsets()

    def extend(self, stream: NDArray[np.uint8], lengths: NDArray[np.int64]) -> None:
        self._flush_offsets()
        self._bin.write(stream.data)
        ends = self._end + np.cumsum(lengths + 1)
        self._offsets.write(ends.astype("<i8").tobytes())
        self._end = int(ends[-1])
        self.num_documents += len(lengths)

    def finish(self) -> dict[str, Any]:
        """Write the data derived from the documents; return the entry of the split in corpus.json."""
        self._flush_offsets()
        self.close()
        return {
            "documents": self.num_documents,
            "bytes": self._end - self.num_documents,
            "longest": write_by_length(self._paths["offsets"], self._paths["by_length"]),
            "files": {
                path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in self._paths.values()
            },
        }

    def close(self) -> None:
        """Write what is still buffered.

        Raises:
            OSError: the disk is full.
        """
        self._bin.close()
        self._offsets.close()

    def discard(self) -> None:
        """Close the files, whether or not their buffers can still be written."""
        for file in (self._bin, self._offsets):
            with contextlib.suppress(OSError):
                file.close()

    def _flush_offsets(self) -> None:
        self._offsets.write(np.asarray(self._pending, dtype="<i8").tobytes())
        self._pending.clear()


def write_by_length(offsets_path: Path, path: Path) -> int:
    """Write the numbers of the documents sorted by (length, number), and return the greatest length.

    A counting sort of blocks of documents: memory grows with the number of different lengths, not of documents.

    Raises:
        OSError: the disk is full.
    """
    offsets: Numbers = np.memmap(offsets_path, dtype="<i8", mode="r")
    starts = range(0, len(offsets) - 1, _SORTED_AT_ONCE)

    def block_lengths(start: int) -> NDArray[np.int64]:
        return np.asarray(np.diff(offsets[start : start + _SORTED_AT_ONCE + 1])) - 1

    counts: Counter[int] = Counter()
    for start in starts:
        lengths, numbers = np.unique(block_lengths(start), return_counts=True)
        counts.update(dict(zip(lengths.tolist(), numbers.tolist(), strict=True)))
    known = np.array(sorted(counts), dtype=np.int64)
    next_positions = np.cumsum([0, *(counts[length] for length in known.tolist())])[:-1]
    with open(path, "wb") as file:  # preallocates: a mapped page without disk space would end the process by SIGBUS
        os.posix_fallocate(file.fileno(), 0, 8 * (len(offsets) - 1))
    by_length = np.memmap(path, dtype="<i8", mode="r+", shape=(len(offsets) - 1,))
    for start in starts:
        kinds = np.searchsorted(known, block_lengths(start))
        order = np.argsort(kinds, kind="stable")
        numbers = np.bincount(kinds, minlength=len(known))
        firsts = np.cumsum(numbers) - numbers  # position of each length's first document in the sorted block
        by_length[(next_positions - firsts)[kinds[order]] + np.arange(len(order))] = start + order
        next_positions += numbers
    by_length.flush()
    return int(known[-1])


def read_info(folder: Path) -> dict[str, Any]:
    """Return the values in the ``corpus.json`` of a folder.

    Raises:
        UserError: there is none, it is incomplete, or it is of another format.
    """
    try:
        info = parse_json((folder / INFO).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} is not a prepared corpus: it has no corpus.json") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}/corpus.json cannot be read ({error}); {_AGAIN}") from None
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        raise UserError(f"{folder} is not a corpus of format {FORMAT}; prepare it again with this version")
    try:
        _check_info(info)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder}/corpus.json is incomplete ({error}); {_AGAIN}") from None
    return info


def _check_info(info: dict[str, Any]) -> None:
    """Check that corpus.json has the form that its readers expect.

    Raises:
        ValueError, KeyError: it does not; the message names the field.
    """
    kinds: dict[str, Any] = {"name": str, "source": str, "digest": str, "cleaning": list[str]}
    kinds |= {"splits": dict[SplitName, dict[str, Any]]}
    counts = ("empty_dropped", "duplicates_dropped", "pieces_of_longer", "invalid_replaced")
    optional = {**dict.fromkeys(counts, int), "entropy_bits_per_byte": float}
    kinds |= {name: kind for name, kind in optional.items() if name in info}
    for name, kind in kinds.items():
        validate_type(info[name], kind, name)
    for text in (info["name"], info["source"], *info["cleaning"]):
        if "\0" in text:
            raise ValueError("name, source and cleaning must be texts")
        text.encode()
    _check_report(info.get("report", {"read": 0}))
    if not re.fullmatch("[0-9a-f]{64}", info["digest"]):
        raise ValueError("digest is not a SHA-256 sum")
    if not {"train", "valid"} <= info["splits"].keys():
        raise ValueError("splits must be train, valid and test")
    for split, values in info["splits"].items():
        if set(values["files"]) != {f"{split}.{part}" for part in PARTS}:
            raise ValueError(f"files of {split} must be its {', '.join(PARTS)}")
        for name in ("documents", "bytes"):
            validate_type(values[name], int, f"splits.{split}.{name}")
        for file, entry in values["files"].items():
            validate_type(entry["sha256"], str, f"the sum of {file}")
            validate_type(entry["size"], int, f"the size of {file}")
        validate_type(values.get("nll_bits_per_byte", 0.0), float, f"splits.{split}.nll_bits_per_byte")
    if len({"nll_bits_per_byte" in values for values in info["splits"].values()}) > 1:
        raise ValueError("nll_bits_per_byte must be of every split")


def _check_report(report: dict[str, Any]) -> None:
    """Check that the report in corpus.json about reading the source has the form of ``reading.Report``.

    Raises:
        ValueError, KeyError: it does not; the message names the field.
    """
    counts = dict.fromkeys(("formats", "dropped", "remarks"), dict[str, int])
    kinds: dict[str, Any] = {"read": int, **counts, "guesses": list[str], "skipped": dict[str, str]}
    for name, kind in kinds.items():
        validate_type(report["read"] if name == "read" else report.get(name, kind()), kind, f"report.{name}")


def advise(stream: Bytes, advice: int) -> None:
    """Tell the kernel how a mapped stream is going to be accessed."""
    assert isinstance(stream.base, mmap.mmap)
    stream.base.madvise(advice)


def _fits(split: Split) -> bool:
    """Return whether the offsets cut the stream into documents, none empty, and ``by_length`` sorts these by length."""
    offsets, order = split.offsets, split.by_length
    lengths = np.diff(offsets) - 1
    if (
        offsets[0] != 0
        or offsets[-1] != len(split.stream)
        or offsets.max() > len(split.stream)
        or offsets.min() < 0
        or lengths.min() < 1
    ):
        return False
    if not (split.stream[offsets[1:] - 1] == ord(SEPARATOR)).all():
        return False
    return bool(np.array_equal(order, np.argsort(lengths, kind="stable")))


def _check_sizes(folder: Path, split: str, values: dict[str, Any]) -> None:
    """Check that a split's files have their recorded sizes, and that these fit each other."""
    sizes = {}
    for part in PARTS:
        path = folder / f"{split}.{part}"
        recorded = values["files"][path.name]["size"]
        if not path.is_file():
            raise UserError(f"corpus {folder} is incomplete: {path.name} is missing; {_AGAIN}")
        sizes[part] = path.stat().st_size
        if sizes[part] != recorded:
            raise UserError(
                f"corpus {folder} is damaged: {path.name} has {sizes[part]} bytes, not {recorded}; {_AGAIN}"
            )
    documents = values["documents"]
    expected = {"bin": values["bytes"] + documents, "offsets": 8 * (documents + 1), "by_length": 8 * documents}
    if sizes != expected or documents < 1:
        raise UserError(f"corpus {folder} is damaged: the files of {split} do not fit each other; {_AGAIN}")


def _digest(splits: dict[str, Any]) -> str:
    """Return one SHA-256 over everything that determines training: the checksums of the split files."""
    sums = {file: recorded["sha256"] for values in splits.values() for file, recorded in values["files"].items()}
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stamps(paths: Iterable[Path]) -> dict[Path, tuple[int, int, int]]:
    """Return the inode, size and modification time of each file; missing files are left out."""
    found = {}
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            found[path] = status.st_ino, status.st_size, status.st_mtime_ns
    return found


def _is_empty_folder(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())

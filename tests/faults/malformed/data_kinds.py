"""Sources of text, and prepared corpora."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from raytrain.data import __main__ as data_command
from raytrain.data import sources
from raytrain.data.corpus import Corpus
from raytrain.data.cutting import pieces
from raytrain.data.prepare import prepare
from raytrain.data.reading import Reading, Selection
from tests.faults.malformed.mutate import PIECES, damaged, restructured, written
from tests.faults.malformed.oracle import command
from tests.faults.malformed.stock import DOCUMENTS, Stock

Act = Callable[[], None]
FIELDS = ("text", "bio", "other")


def text(stock: Stock, given: Path, random: Random) -> Act:
    """Plain text, whole or packed, with anything in it."""
    likely = [piece for piece in PIECES if b"\0" not in piece or random.random() < 0.1]
    pieces = [random.choice((*likely, *DOCUMENTS, b"\n", b"\n")) for _ in range(random.randint(0, 80))]
    data = b"".join(pieces) if random.random() < 0.5 else damaged(b"\n".join(DOCUMENTS) + b"\n", random)
    path = given / random.choice(("a.txt", "A.TXT", "a b[red].txt"))
    path.write_bytes(data)
    return reads(path, lambda: lines(data), random)


def packed(stock: Stock, given: Path, random: Random) -> Act:
    """A gzip file that is damaged."""
    data = damaged(gzip.compress(b"\n".join(DOCUMENTS) + b"\n", mtime=0), random)
    path = given / random.choice(("a.txt.gz", "a.jsonl.gz", "a.TXT.GZ"))
    path.write_bytes(data)

    def known() -> list[bytes]:
        try:
            return lines(gzip.decompress(data))
        except (EOFError, OSError, zlib.error) as error:
            raise AssertionError(f"gzip itself refuses it: {error}") from None

    return reads(path, known, random)


def json_lines(stock: Stock, given: Path, random: Random) -> Act:
    """JSON lines of which some are not."""
    items: list[Any] = [{"text": item.decode(), "n": number} for number, item in enumerate(DOCUMENTS[:80])]
    for _ in range(random.randint(0, 2)):
        location = random.randrange(len(items))
        items[location] = restructured(items[location], random)
    data = b"".join(json.dumps(item, ensure_ascii=bool(random.randrange(2))).encode("utf-8", "surrogatepass") + b"\n"
                    for item in items)  # fmt: skip
    if random.random() < 0.5:
        data = damaged(data, random)
    path = given / "a.jsonl"
    path.write_bytes(data)
    field = random.choice((None, None, *FIELDS, ""))

    def known() -> list[bytes]:
        rows = [json.loads(line.decode("utf-8", "surrogateescape")) for line in lines(data) if line.strip()]
        name = field if field is not None else "text"
        return [(row[name] or "").encode("utf-8", "surrogatepass") for row in rows]

    return reads(path, known, random, field)


def parquet(stock: Stock, given: Path, random: Random) -> Act:
    """A damaged Parquet file, or one of other columns than it should have."""
    path = given / "a.parquet"
    texts: list[Any] = [item.decode() for item in DOCUMENTS]
    columns: dict[str, Any] = {
        "text": random.choice((texts, [None, *texts[1:]], [item.encode() for item in texts], [1.5] * 240, [[1]] * 240)),
        "n": list(range(240)),
    }
    if random.random() < 0.2:
        columns = random.choice(({}, {"text": []}, {"n": columns["n"]}, {"bio": texts, "a\0b": texts, "": texts}))
    table = pyarrow.table(columns)
    if random.random() < 0.2:
        table = pyarrow.table({"text": pyarrow.array(texts).dictionary_encode()})
    options: dict[str, Any] = {"compression": random.choice(("none", "snappy", "zstd")), "row_group_size": 100}
    pyarrow.parquet.write_table(table, path, **options, write_page_checksum=bool(random.randrange(2)))
    if random.random() < 0.7:
        path.write_bytes(damaged(path.read_bytes(), random))
    field = random.choice((None, None, "text", "bio"))

    def known() -> list[bytes]:
        file = pyarrow.parquet.ParquetFile(path)
        name = field or ("text" if "text" in file.schema_arrow.names else "bio")
        # that column alone, and as bytes: the damage may be in another, or in the middle of a character
        values = file.read(columns=[name])[name].cast(pyarrow.string()).cast(pyarrow.large_binary()).to_pylist()
        return [value or b"" for value in values]

    return reads(path, known, random, field)


def folders(stock: Stock, given: Path, random: Random) -> Act:
    """Folders with names, links and kinds of file that nobody expects."""
    root = given / random.choice(("folder", "a[b]*", "ä\N{SNOWMAN}", "line\nbreak", "-x", "x" * 200, "\udcff\udcfe"))
    root.mkdir()
    known: dict[Path, list[bytes]] = {}
    for number in range(random.randint(1, 4)):
        name = random.choice(("a", "\udce9", "[red]", "a\nb", " ", "x..", "x" * 180, "ptb.train")) + f"{number}.txt"
        match random.randrange(8):
            case 0:
                (root / name).symlink_to(random.choice((".", "/nowhere/at/all", name, "..")))
            case 1:
                os.mkfifo(root / name)
            case 2:
                (root / name).mkdir()
            case 3:
                (root / f".{name}").write_bytes(b"hidden\n")
            case 4:
                (root / name).with_suffix(random.choice((".csv", ".parquet", ".jsonl"))).write_bytes(b"text,\0")
            case _:
                known[root / name] = random.sample(DOCUMENTS, 100)
                (root / name).write_bytes(b"\n".join(known[root / name]))
    if random.random() < 0.1:
        return command(data_command.main, "prepare", "ptb", "--data-path", str(root), "--output", "out")
    return reads(root, lambda: [item for path in sorted(known) for item in known[path]], random)


def reads(path: Path, known: Callable[[], list[bytes]], random: Random, field: str | None = None) -> Act:
    """Reads a source, or prepares it as a corpus or by the command; what comes must be what is ``known``."""
    way = random.randrange(4)
    cleaned = random.choice(("tweets", "bios"))
    options = [] if field is None else ["--field", field]

    def act() -> None:
        if way == 0:
            # an invalid byte of JSON is a surrogate in what is known
            same(
                [valid(item) for _, item in sources.documents(str(path), reading=Reading(Selection(field)))],
                map(valid, known()),
            )
        elif way == 1:
            command(data_command.main, "prepare", str(path), "--output", "out", *options)()
            same(contents(Corpus.open("out")), stored(known()), in_order=False)
        elif way == 2:
            found = contents(prepare(cleaned, path=str(path), field=field))
            assert len(set(found)) == len(found), "a duplicate was kept"
            assert all(item.decode("utf-8") == item.decode("utf-8").strip() != "" for item in found)
        else:
            same(contents(prepare(str(path), field=field)), stored(known()), in_order=False)

    return act


# ---------------------------------------------------------------------------------------------- prepared


def corpus(stock: Stock, given: Path, random: Random) -> Act:
    """A prepared corpus with a file that was damaged; now and then with all sums made right again."""
    folder = given / "corpus"
    shutil.copytree(stock.corpus, folder)
    names = sorted(path.name for path in folder.iterdir())
    name = random.choice((*names, "corpus.json", "train.offsets", "valid.by_length"))
    path, numbers = folder / name, name.endswith(("offsets", "by_length"))
    info = json.loads((folder / "corpus.json").read_bytes())
    resealed = random.random() < 0.5
    if name == "corpus.json":
        path.write_bytes(written(restructured(info, random), random))
    else:
        match random.randrange(6):
            case 0:
                path.unlink()
            case 1 if numbers:
                values = np.fromfile(path, "<i8")
                values[random.randrange(len(values))] = random.choice((0, -1, 1, 10**6, 2**62, -(2**63)))
                values.tofile(path)
            case 2:
                shutil.copyfile(folder / random.choice(names), path.with_name("copy"))
                path.with_name("copy").replace(path)
            case _:
                data = path.read_bytes()
                changed = damaged(data, random)
                path.write_bytes(changed[: len(data)].ljust(len(data), b"\n") if random.random() < 0.6 else changed)
        if resealed:
            reseal(folder, info, random)
    way = random.randrange(4)

    def act() -> None:
        if way == 0:
            command(data_command.main, "info", str(folder))()
        else:
            opened = prepare(str(folder))
            same(contents(opened), known_contents(folder) if resealed else DOCUMENTS, in_order=False)
            if not resealed:
                assert opened.digest == Corpus.open(stock.corpus).digest, "another digest"

    return act


def reseal(folder: Path, info: dict[str, Any], random: Random) -> None:
    """Write corpus.json anew, with sums, sizes and the digest of what there is."""
    sums = {}
    for split, values in info["splits"].items():
        for file, entry in values["files"].items():
            if (folder / file).is_file():
                data = (folder / file).read_bytes()
                entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            sums[file] = entry["sha256"]
        sizes = {file.rpartition(".")[2]: entry["size"] for file, entry in values["files"].items()}
        values["documents"] = sizes["by_length"] // 8
        values["bytes"] = sizes["bin"] - values["documents"]
        assert split in ("train", "valid", "test")
    info["digest"] = hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()
    (folder / "corpus.json").write_text(json.dumps(info))


def known_contents(folder: Path) -> list[bytes]:
    """The documents of a corpus, read anew from what the format says."""
    found = []
    for split in ("train", "valid"):
        stream, offsets = (folder / f"{split}.bin").read_bytes(), np.fromfile(folder / f"{split}.offsets", "<i8")
        found += [stream[a : b - 1] for a, b in zip(offsets.tolist(), offsets[1:].tolist(), strict=False)]
    return found


# ------------------------------------------------------------------------------------ known otherwise


def contents(corpus: Corpus) -> list[bytes]:
    """Every document of a corpus, as a run reads them."""
    splits = [corpus.split(name) for name in corpus.splits]
    numbers = [split.by_length[:].tolist() for split in splits]
    return [split.document(number) for split, own in zip(splits, numbers, strict=True) for number in own]


def same(found: Iterable[bytes], known: Iterable[bytes], in_order: bool = True) -> None:
    """Both are the same documents; where the order does not count, empty ones do not either."""
    first, second = list(found), list(known)
    if not in_order:
        assert Counter(filter(None, first)) == Counter(filter(None, second)), "other documents than there are"
    assert not in_order or first == second, "other documents than there are"


def stored(documents: list[bytes]) -> list[bytes]:
    """The documents of a corpus that is prepared from ``documents``."""
    return [valid(piece) for document in documents for piece in pieces(document)]


def lines(data: bytes) -> list[bytes]:
    """The lines of plain text, without their ends."""
    data = data.removeprefix(b"\xef\xbb\xbf")
    parts = data.split(b"\n" if b"\n" in data else b"\r")
    return [part.removesuffix(b"\r") if location < len(parts) - 1 else part for location, part in enumerate(parts)
            if part or location < len(parts) - 1]  # fmt: skip


def valid(data: bytes) -> bytes:
    """``data`` with each run of invalid bytes a space, decoded bit by bit."""
    parts, invalid = [], False
    while data:
        try:
            data.decode()
            parts.append(data)
            break
        except UnicodeDecodeError as error:
            if error.start:
                parts.append(data[: error.start])
                invalid = False
            parts += [] if invalid else [b" "]
            invalid, data = True, data[error.end :]
    return b"".join(parts)

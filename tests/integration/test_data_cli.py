from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from raytrain.data import synthetic
from raytrain.data.corpus import SPLITS, Corpus
from raytrain.models.ladder import FILE


def run(tmp_path: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "raytrain.data", *map(str, arguments)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "RAYTRAIN_CACHE": str(tmp_path / "cache"), "COLUMNS": "100", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def table_of(output: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.split("\n")]
    return {row[0]: row[1:] for row in rows if row}


@pytest.mark.slow
def test_prepare_and_info(tmp_path: Path) -> None:
    prepared = run(tmp_path, "prepare", "synthetic", "--output", tmp_path / "corpus")
    assert (prepared.returncode, prepared.stderr) == (0, "")
    info = run(tmp_path, "info", tmp_path / "corpus")
    assert (info.returncode, info.stderr) == (0, "")
    assert info.stdout.startswith(prepared.stdout)
    windows, documents = (float(cell) for cell in table_of(info.stdout)["byte 8-gram"])
    assert 0.8 < windows < 0.9
    assert 0.6 < documents < 0.75
    kept = (tmp_path / "corpus" / FILE).read_bytes()
    assert run(tmp_path, "info", tmp_path / "corpus").stdout == info.stdout
    assert (tmp_path / "corpus" / FILE).read_bytes() == kept
    pieces = table_of(run(tmp_path, "info", tmp_path / "corpus", "--vocabulary", "bpe:400").stdout)
    assert pieces["byte 8-gram"] == [f"{windows:.3f}", f"{documents:.3f}"]
    assert float(pieces["bpe:400 4-gram"][1]) < float(pieces["bpe:400 1-gram"][1])
    rows = table_of(info.stdout)
    assert rows["documents"] == ["60,000", "4,000", "4,000"]
    corpus = Corpus.open(tmp_path / "corpus")
    texts = {name: [corpus.split(name).document(i) for i in range(corpus.split(name).num_documents)] for name in SPLITS}
    lengths = {name: sorted(map(len, texts[name])) for name in SPLITS}
    assert rows["bytes of text"] == [f"{sum(lengths[name]):,}" for name in SPLITS]
    assert rows["distinct bytes"] == [str(len(set(b"".join(texts[name])))) for name in SPLITS]
    assert rows["length, quantile 0%"] == [str(lengths[name][0]) for name in SPLITS]
    assert rows["length, quantile 50%"] == [str(lengths[name][len(lengths[name]) // 2]) for name in SPLITS]
    assert rows["length, quantile 100%"] == [str(lengths[name][-1]) for name in SPLITS]
    assert f"entropy bits per byte: {synthetic.bits_per_byte():.4f}" in info.stdout
    limits = [float(cell) for cell in rows["limit, bits per byte"]]
    assert limits == pytest.approx([synthetic.bits_per_byte()] * 3, rel=0.02)
    for split in ("train", "valid", "test"):
        samples = prepared.stdout.split(f"\n{split}\n")[1].split("\n\n")[0].rstrip("\n").split("\n")
        assert len(samples) == 5
        assert all(sample.startswith("  ") for sample in samples)


def test_info_shows_text_without_what_a_terminal_would_obey(tmp_path: Path) -> None:
    odd = "[red]\x1b[31mred\r :smile:😀"
    (tmp_path / "a.txt").write_text("".join(f"{odd} {number}\n" for number in range(200)), newline="")
    shown = run(tmp_path, "prepare", tmp_path / "a.txt")
    assert shown.returncode == 0
    assert "[red]\ufffd[31mred\ufffd :smile:😀" in shown.stdout
    assert "\x1b" not in shown.stdout
    assert "\r" not in shown.stdout
    rows = table_of(shown.stdout)
    assert sum(map(int, rows["documents"])) == 200
    assert int(rows["distinct bytes"][0]) == len(set((odd + " 0123456789").encode()))


def test_what_was_kept_dropped_and_guessed_is_said_and_kept(tmp_path: Path) -> None:
    posts = [
        {"id": str(number), "author_id": "1", "text": f"{'RT @ann: ' * (number % 2)}post {number}", "lang": "en"}
        for number in range(400)
    ]
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("posts.jsonl", "".join(json.dumps(post) + "\n" for post in posts))
        archive.writestr("note.json", '{"title": "x", "body": "y"}')
    options = ("--no-reposts", "--language", "en", "--take", "text", "--output", tmp_path / "out")
    shown = run(tmp_path, "prepare", tmp_path / "all.zip", *options)
    assert shown.returncode == 0, shown.stderr
    assert shown.stderr == f"{tmp_path}/all.zip/posts.jsonl: X API v2, posts, posts\n"
    for line in (
        "texts taken: 200; files: X API v2, posts (1)",
        "  dropped: 200 reposts",
        f"  not read: {tmp_path}/all.zip/note.json: JSON without posts",
    ):
        assert line in shown.stdout.split("\n")
    info = run(tmp_path, "info", tmp_path / "out")
    assert f"  guessed: {tmp_path}/all.zip/posts.jsonl: X API v2, posts, posts\n" in info.stdout
    assert "  dropped: 200 reposts" in info.stdout.split("\n")


MISTAKES = {
    "another kind of text": (["prepare", "TMP/lines.txt", "--take", "both"], "invalid choice: 'both'"),
    "languages of lines": (["prepare", "TMP/lines.txt", "--language", "en"], "nothing says the language of a text"),
    "no command": ([], "arguments are required"),
    "unknown command": (["prepaer", "ptb"], "invalid choice: 'prepaer'"),
    "unknown option": (["prepare", "ptb", "--fast"], "unrecognized arguments: --fast"),
    "unknown source": (["prepare", "tweeets"], "no source 'tweeets'"),
    "missing path": (["prepare", "tweets", "--data-path", "TMP/absent.txt"], "absent.txt: no such file or folder"),
    "empty file": (["prepare", "TMP/empty.txt"], "empty.txt is empty"),
    "binary file": (["prepare", "TMP/binary.txt"], "binary.txt is not text"),
    "not UTF-8": (["prepare", "TMP/latin.txt"], "latin.txt is not UTF-8 text"),
    "damaged gzip": (["prepare", "TMP/damaged.txt.gz"], "damaged.txt.gz is damaged after line 0"),
    "damaged parquet": (["prepare", "TMP/damaged.parquet"], "damaged.parquet is damaged or not Parquet"),
    "damaged json line": (["prepare", "TMP/damaged.jsonl"], "damaged.jsonl line 2 is not JSON"),
    "no such field": (["prepare", "TMP/damaged.jsonl", "--field", "bio"], "line 1 has no field 'bio'; it has a"),
    "no document": (["prepare", "TMP/blank.txt"], "blank.txt: no document for the train split"),
    "bios without a path": (["prepare", "bios"], "bios has no public address: give --data-path"),
    "a table of unknown columns": (
        ["prepare", "TMP/table.csv"],
        "which column holds the text? Its first line has a, b",
    ),
    "not a corpus": (["info", "TMP"], "is not a prepared corpus"),
    "no such vocabulary": (["info", "TMP", "--vocabulary", "bpe:7"], "'bpe:7': a vocabulary has from 257"),
    "output in use": (["prepare", "TMP/lines.txt", "--output", "TMP"], "exists and is not a corpus"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line_and_status_2(tmp_path: Path, mistake: str) -> None:
    for name, content in {
        "empty.txt": b"",
        "binary.txt": b"\x7fELF\0\0",
        "latin.txt": b"\xe9\xe8\xe0" * 100,
        "damaged.txt.gz": b"\x1f\x8b\x08nothing",
        "damaged.parquet": b"PAR1",
        "damaged.jsonl": b'{"a": "b"}\n{"a": \n',
        "blank.txt": b"\n\n",
        "table.csv": b"a,b\n",
        "lines.txt": b"".join(b"line %d\n" % number for number in range(500)),
    }.items():
        (tmp_path / name).write_bytes(content)
    arguments, message = MISTAKES[mistake]
    result = run(tmp_path, *(argument.replace("TMP", str(tmp_path)) for argument in arguments))
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


def test_without_a_network_the_way_out_is_named(tmp_path: Path) -> None:
    result = run(tmp_path, "prepare", "ptb", https_proxy="http://127.0.0.1:9", no_proxy="")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "give --data-path" in result.stderr


def test_importing_needs_nothing_heavy(tmp_path: Path) -> None:
    heavy = {"torch", "boto3", "pyarrow", "rich", "tyro", "ray", "mlflow"}
    code = f"import sys, raytrain.data.prepare, raytrain.data.__main__; print([*({heavy} & set(sys.modules))])"
    result = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr

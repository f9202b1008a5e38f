"""Prepare a corpus, say what is in one, or collect posts for one.

python -m raytrain.data prepare SOURCE [--data-path P] [--data-field F] [--take text|bio] [--language L]
                                       [--no-reposts] [--output DIR] [--distributed [--address HOST:PORT]]
python -m raytrain.data info CORPUS [--vocabulary V]
python -m raytrain.data collect x QUERY --output FILE --most N [--bios] [--token-file F]
python -m raytrain.data collect bluesky --output FILE --most N [--take text|bio] [--endpoint URI]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from raytrain.config.cli import OneLineParser
from raytrain.config.models import ByteLstmConfig
from raytrain.config.schema import RunConfig
from raytrain.config.vocabularies import parse_vocabulary
from raytrain.data.corpus import Corpus, CorpusWriter, Split
from raytrain.data.documents import Source, Taken
from raytrain.data.prepare import prepare
from raytrain.data.reading import Selection
from raytrain.utils import output
from raytrain.utils.errors import UserError, run_command
from raytrain.utils.files import expanded, local_path
from raytrain.utils.text import one_line

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
NUM_SAMPLES = 5
NGRAM_SAMPLES = 4096
"""Validation samples of each kind on which n-grams are measured."""
JETSTREAM = "wss://jetstream2.us-east.bsky.network/subscribe"
"""One of the public servers that Bluesky runs."""
_SHOWN = 200
_CHUNK = 1 << 20


def main() -> None:
    options = _parser().parse_args()
    if options.command == "prepare":
        selection = Selection(options.field, options.take, options.language, not options.no_reposts)
        if options.address is not None and not options.distributed:
            raise UserError("--address goes with --distributed")
        fill = partial(_fill_on_ray, options.address) if options.distributed else None
        path, output = options.data_path, options.output
        _show_info(prepare(options.source, path=path, selection=selection, output=output, fill=fill))
    elif options.command == "collect":
        values = {name: value for name, value in vars(options).items() if name not in ("command", "network")}
        values["output"] = local_path(options.output, "--output")
        # nothing else needs the packages that this imports
        import_module(f"raytrain.data.collect_{options.network}").collect(**values)
    else:
        corpus = Corpus.open(expanded(options.corpus))
        corpus.verify()
        _show_info(corpus, guesses=True)
        _show_ngrams(corpus, options.vocabulary)


def _fill_on_ray(address: str | None, source: Source, writer: CorpusWriter) -> Taken:
    # Ray takes seconds to import, and nothing else here needs it
    import_module("raytrain.cluster.connection").connect(address)
    taken: Taken = import_module("raytrain.data.distributed").fill(source, writer)
    return taken


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m raytrain.data", description="Prepare a corpus, say what is in one, or collect posts for one."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{prepare,info,collect}")
    command = commands.add_parser("prepare", help="text to corpus")
    command.add_argument("source", help="synthetic, ptb, ptb_characters, tweets, bios, a file, a folder or s3://...")
    command.add_argument("--data-path", metavar="P", help="file or folder of a named source instead of a download")
    command.add_argument(
        "--field", "--data-field", metavar="F", help="field or column with the text; A.B is B within A"
    )
    command.add_argument("--take", choices=("text", "bio"), help="posts, or what their authors say of themselves")
    command.add_argument("--language", metavar="L", help="only texts that are said to be in it, as en")
    command.add_argument("--no-reposts", action="store_true", help="without texts that repeat another one")
    command.add_argument("--output", metavar="DIR", type=Path, help="folder of the corpus; default: one in the cache")
    command.add_argument("--distributed", action="store_true", help="on all cores of a Ray cluster or of this machine")
    command.add_argument("--address", metavar="HOST:PORT", help="Ray cluster; default: one that is found, or a new one")
    command = commands.add_parser("info", help="what is in a corpus")
    command.add_argument("corpus", help="folder of a prepared corpus")
    command.add_argument(
        "--vocabulary", metavar="V", type=_vocabulary, default="byte", help="n-grams of char or bpe:N beside bytes"
    )
    _add_networks(commands.add_parser("collect", help="posts of a network, as a file for prepare"))
    return parser


def _add_networks(parser: argparse.ArgumentParser) -> None:
    networks = parser.add_subparsers(dest="network", required=True, metavar="{x,bluesky}")
    command = networks.add_parser("x", help="posts that match a search, by the API of X; it costs money")
    command.add_argument("query", metavar="QUERY", help="a search, as 'lang:en -is:retweet birds'")
    command.add_argument("--bios", action="store_true", help="the accounts of the authors too")
    command.add_argument("--token-file", metavar="F", type=Path, help="file with the token; default: X_BEARER_TOKEN")
    other = networks.add_parser("bluesky", help="posts or profiles, as they are written, by Jetstream")
    other.add_argument("--take", choices=("text", "bio"), default="text", help="posts or profiles; default: posts")
    other.add_argument("--endpoint", metavar="URI", default=JETSTREAM, help="Jetstream server; default: %(default)s")
    for each in (command, other):
        each.add_argument("--output", metavar="FILE", required=True, help="JSONL file; one that is there is continued")
        each.add_argument("--most", metavar="N", type=int, required=True, help="posts that it holds at most in the end")


def _vocabulary(name: str) -> str:
    try:
        parse_vocabulary(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{name!r}: {error}") from None
    return name


def _show_info(corpus: Corpus, guesses: bool = False) -> None:
    """Print what a corpus contains; include the guesses if preparing has not just printed them."""
    from rich.markup import escape

    console = output.console(highlight=False)
    console.print(f"[bold]{escape(corpus.name)}[/bold]  {escape(str(corpus.path))}", soft_wrap=True)
    console.print(f"source: {escape(corpus.info['source'])}", soft_wrap=True)
    for rule in corpus.info["cleaning"]:
        console.print(f"  {escape(rule)}", soft_wrap=True)
    console.print(f"digest: {corpus.digest}", soft_wrap=True)
    for line in _report_lines(corpus.info["report"]) if "report" in corpus.info else ():
        console.print(escape(line), soft_wrap=True)
    for line in corpus.info.get("report", {}).get("guesses", ()) if guesses else ():
        console.print(escape(f"  guessed: {one_line(line)}"), soft_wrap=True)
    for key in ("pieces_of_longer", "invalid_replaced"):
        if corpus.info.get(key):
            console.print(f"{key.replace('_', ' ')}: {_figure(corpus.info[key])}")
    for key in ("empty_dropped", "duplicates_dropped", "entropy_bits_per_byte"):
        if key in corpus.info:
            console.print(f"{key.replace('_', ' ')}: {_figure(corpus.info[key])}")
    console.print(_table(corpus))
    for name in corpus.splits:
        console.print(f"\n[bold]{name}[/bold]")
        for text in _samples(corpus.split(name)):
            console.print(f"  {escape(text)}", soft_wrap=True, emoji=False)


def _report_lines(report: dict[str, Any]) -> Iterator[str]:
    """Yield lines about what was read, kept and dropped, and why."""
    formats = ", ".join(f"{name} ({count:,})" for name, count in report.get("formats", {}).items())
    yield f"texts taken: {report['read']:,}; files: {formats or 'none'}"
    for title, counts in (("dropped", report.get("dropped", {})), ("taken", report.get("remarks", {}))):
        yield from (f"  {title}: {count:,} {reason}" for reason, count in counts.items())
    yield from (f"  not read: {one_line(name)}: {reason}" for name, reason in report.get("skipped", {}).items())


def _show_ngrams(corpus: Corpus, vocabulary: str) -> None:
    """Print the reference ladder for the usual samples of each kind, which a model should beat."""
    from rich.table import Table

    from raytrain.data.batches import EvaluationBatches
    from raytrain.models.ladder import reference_ladder
    from raytrain.models.ngrams import MAX_ORDER

    windows = RunConfig(model=ByteLstmConfig(), sampling="windows", length=60, vocabulary=vocabulary)
    documents = RunConfig(model=ByteLstmConfig(), sampling="documents", length=128, vocabulary=vocabulary)
    ladders = {}
    for name, config in {"windows of 60": windows, "documents < 128": documents}.items():
        try:
            samples = EvaluationBatches(corpus.split("valid"), config, NGRAM_SAMPLES)
        except UserError:  # the split has no such samples
            continue
        ladders[name] = reference_ladder(corpus, samples)
    table = Table("bits per byte", *ladders)
    for kind in dict.fromkeys(("byte", vocabulary)):
        chosen = [ladder if ladder.pieces is None or kind == "byte" else ladder.pieces for ladder in ladders.values()]
        for order in range(MAX_ORDER + 1):
            table.add_row(f"{kind} {order + 1}-gram", *(f"{ladder.bits[order]:.3f}" for ladder in chosen))
    if any(ladder.fit for ladder in ladders.values()):
        table.add_row("", *(ladder.fit for ladder in ladders.values()))
    if ladders:
        output.console(highlight=False).print("", table)


def _table(corpus: Corpus) -> object:
    from rich.table import Table

    table = Table("", *corpus.splits)
    splits = [corpus.split(name) for name in corpus.splits]
    table.add_row("documents", *(f"{split.num_documents:,}" for split in splits))
    table.add_row("bytes of text", *(f"{split.num_bytes:,}" for split in splits))
    table.add_row("distinct bytes", *(str(_distinct_bytes(split)) for split in splits))
    columns = [_length_quantiles(split) for split in splits]
    for row, share in enumerate(QUANTILES):
        table.add_row(f"length, quantile {share:.0%}", *(str(column[row]) for column in columns))
    if any("nll_bits_per_byte" in corpus.info["splits"][name] for name in corpus.splits):
        limits = (_figure(corpus.info["splits"][name]["nll_bits_per_byte"]) for name in corpus.splits)
        table.add_row("limit, bits per byte", *limits)
    return table


def _figure(value: float) -> str:
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}"


def _length_quantiles(split: Split) -> list[int]:
    positions = np.array([round(share * (split.num_documents - 1)) for share in QUANTILES])
    return [int(length) for length in split.lengths(split.by_length[positions])]


def _distinct_bytes(split: Split) -> int:
    """Return the number of distinct byte values in the text, without the separators."""
    counts = np.zeros(256, dtype=np.int64)
    for start in range(0, len(split.stream), _CHUNK):
        counts += np.bincount(split.stream[start : start + _CHUNK], minlength=256)
    counts[ord("\n")] -= split.num_documents
    return int(np.count_nonzero(counts))


def _samples(split: Split) -> list[str]:
    """Return documents from all over the split, without characters that a terminal would obey."""
    numbers = np.linspace(0, split.num_documents - 1, min(NUM_SAMPLES, split.num_documents)).astype(int)
    texts = (split.document(int(number))[:_SHOWN].decode("utf-8", "replace") for number in numbers)
    return ["".join(char if char.isprintable() or char == "\u200d" else "\ufffd" for char in text) for text in texts]


if __name__ == "__main__":
    run_command(main)

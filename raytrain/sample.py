"""Write texts with a trained model.

    python -m raytrain.sample runs/NAME --num 20 --temperature 0.7
    python -m raytrain.sample models:/hybrid@champion --interpolate "good morning" "see you tomorrow"
    python -m raytrain.sample runs/NAME --reconstruct texts.txt --format jsonl

The checkpoint is a folder, an s3:// address, an MLflow run id or models:/NAME@ALIAS. ``--format text``
writes one sample a line, for the eye: invalid byte sequences are spaces, line breaks and other control
characters are escaped. ``--format jsonl`` writes objects with ``text`` (readable, not escaped),
``bytes`` (the exact bytes in base64), ``log_probability``, ``entropy`` and ``truncated``.
"""

from __future__ import annotations

import base64
import json
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import tyro

from raytrain.config.cli import parse_options
from raytrain.utils.errors import UserError, run_command
from raytrain.utils.files import expanded
from raytrain.utils.output import CONTROL
from raytrain.utils.text import one_line

if TYPE_CHECKING:
    from raytrain.models.sampling import Sample
    from raytrain.runs.trained_model import TrainedModel


@dataclass
class SampleOptions:
    """Write texts with a trained model."""

    checkpoint: tyro.conf.Positional[str]
    """Folder or s3:// address of a checkpoint, a run or a search; MLflow run id; or models:/NAME@ALIAS."""
    num: int = 10
    """Samples to draw."""
    temperature: float | None = None
    """Divides the logits; 0 takes the most likely byte each time. Default: 1 for samples, otherwise 0."""
    top_p: float = 1.0
    """Draw from the fewest most likely bytes that have this probability together."""
    max_length: int | None = None
    """Longest text in symbols, its end included; default: the length that the model was trained for."""
    seed: int = 0
    """Seed of everything that is drawn."""
    prefix: str = ""
    """Text that every sample starts with."""
    interpolate: tuple[str, str] | None = None
    """Two texts: write those between them in the latent space of a VAE; default: no interpolation."""
    steps: int = 7
    """Texts of an interpolation, both ends included."""
    reconstruct: str | None = None
    """File of one text a line, or - for standard input: encode each and write it again; empty lines are left out."""
    format: Literal["text", "jsonl"] = "text"
    """One readable sample a line, or JSON with the exact bytes."""


def main() -> None:
    """Parse the command line, load the model and print what it writes."""
    options = parse_options("raytrain.sample", SampleOptions, sys.argv[1:])
    check(options)
    texts = [] if options.reconstruct is None else read_texts(options.reconstruct)

    from raytrain.runs.references import load_model

    line = as_json if options.format == "jsonl" else as_line
    for item in draw(load_model(options.checkpoint), options, texts):
        print(line(item))


def check(options: SampleOptions) -> None:
    """Refuse what is wrong whatever the model.

    Raises:
        UserError: with the option's name.
    """
    if options.num < 1:
        raise UserError(f"--num is {options.num}: must be at least 1")
    if options.temperature is not None and not 0 <= options.temperature < float("inf"):
        raise UserError(f"--temperature is {options.temperature}: must be 0 (greedy) or above")
    if not 0 < options.top_p <= 1:
        raise UserError(f"--top-p is {options.top_p}: must be above 0 and at most 1")
    if options.max_length is not None and options.max_length < 1:
        raise UserError(f"--max-length is {options.max_length}: must be at least 1")
    if options.interpolate is not None and options.reconstruct is not None:
        raise UserError("--interpolate and --reconstruct both say what to write: give one of them")
    if options.interpolate is not None and options.steps < 2:
        raise UserError(f"--steps is {options.steps}: an interpolation has at least 2, its ends")
    if options.prefix and (options.interpolate is not None or options.reconstruct is not None):
        raise UserError("--prefix is for samples: leave it out with --interpolate and --reconstruct")


def read_texts(location: str) -> list[bytes]:
    """The lines of a file, or of standard input if it is ``-``; empty ones are left out.

    Raises:
        UserError: the file cannot be read, or holds no text.
    """
    try:
        data = sys.stdin.buffer.read() if location == "-" else expanded(location).read_bytes()
    except OSError as error:
        raise UserError(f"--reconstruct cannot read {location}: {error.strerror}") from None
    texts = [text for line in data.split(b"\n") if (text := line.removesuffix(b"\r"))]
    if not texts:
        raise UserError(f"--reconstruct {location} holds no text: give one text a line")
    return texts


def draw(model: TrainedModel, options: SampleOptions, texts: list[bytes]) -> list[Sample]:
    """Draw the samples that were asked for.

    Raises:
        UserError: the model has no latent code, or a length or text does not fit.
    """
    greedy = options.interpolate is not None or bool(texts)
    how: dict[str, Any] = {
        "temperature": (0.0 if greedy else 1.0) if options.temperature is None else options.temperature,
        "top_p": options.top_p,
        "max_length": options.max_length,
        "seed": options.seed,
    }
    if options.interpolate is not None:
        return model.interpolate(*options.interpolate, options.steps, **how)
    if texts:
        return model.reconstruct(texts, **how)
    return model.sample(options.num, prefix=options.prefix, **how)


def as_line(item: Sample) -> str:
    """Return a sample as one line for the eye."""
    return one_line(str(item))


def as_json(item: Sample) -> str:
    """Return a sample as a JSON object in one line."""
    text = json.dumps(
        {
            "text": str(item),
            "bytes": base64.b64encode(item.text).decode(),
            "log_probability": item.log_probability,
            "entropy": item.entropy,
            "truncated": item.truncated,
        },
        ensure_ascii="utf" not in (sys.stdout.encoding or "").lower(),
    )
    # as JSON escapes them, not as the output would: all of them are within strings
    return CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


if __name__ == "__main__":
    run_command(main)

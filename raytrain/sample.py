"""Let a trained model write.

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
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from raytrain.config.cli import parse_options
from raytrain.utils.errors import UserError, run_command

if TYPE_CHECKING:
    from raytrain.models import Model
    from raytrain.models.sampling import Sample


@dataclass
class SampleOptions:
    """Write texts with a trained model."""

    checkpoint: tyro.conf.Positional[str]
    """Folder or s3:// address of a checkpoint or a run, MLflow run id, or models:/NAME@ALIAS."""
    num: int = 10
    """Samples to draw."""
    temperature: float | None = None
    """Divides the logits; 0 takes the most likely byte each time. Default 1 for samples, otherwise 0."""
    top_p: float = 1.0
    """Draw from the fewest most likely bytes that have this probability together."""
    max_length: int | None = None
    """Symbols of a text at most, its end included; by default the length the model was trained for."""
    seed: int = 0
    """Seed of all that is drawn."""
    prefix: str = ""
    """Text that every sample starts with."""
    interpolate: tuple[str, str] | None = None
    """Two texts: write those between them, in the latent space of a VAE."""
    steps: int = 7
    """Texts of an interpolation, both ends included."""
    reconstruct: str | None = None
    """File of one text a line, or - for standard input: encode and write each; empty lines are left out."""
    format: Literal["text", "jsonl"] = "text"
    """One readable sample a line, or JSON with the exact bytes."""


def main() -> None:
    """Check the request, load the model, write."""
    options = parse_options("raytrain.sample", SampleOptions, sys.argv[1:])
    check(options)
    texts = [] if options.reconstruct is None else read_texts(options.reconstruct)

    import torch

    from raytrain.runs import references as models
    from raytrain.runs.references import resolve

    model = models.from_checkpoint(resolve(options.checkpoint).stored)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    line = as_json if options.format == "jsonl" else as_line
    for item in draw(model, options, texts):
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
        data = sys.stdin.buffer.read() if location == "-" else Path(location).read_bytes()
    except OSError as error:
        raise UserError(f"--reconstruct cannot read {location}: {error.strerror}") from None
    texts = [text for line in data.split(b"\n") if (text := line.removesuffix(b"\r"))]
    if not texts:
        raise UserError(f"--reconstruct {location} holds no text: give one text a line")
    return texts


def draw(model: Model, options: SampleOptions, texts: list[bytes]) -> list[Sample]:
    """The samples that were asked for.

    Raises:
        UserError: the model has no latent code, or a length or text does not fit.
    """
    from raytrain.models.sampling import interpolate, reconstruct, sample

    greedy = options.interpolate is not None or bool(texts)
    temperature = (0.0 if greedy else 1.0) if options.temperature is None else options.temperature
    top_p, max_length, seed = options.top_p, options.max_length, options.seed
    if options.interpolate is not None:
        a, b = (text.encode() for text in options.interpolate)
        return interpolate(
            model, a, b, options.steps, temperature=temperature, top_p=top_p, max_length=max_length, seed=seed
        )
    if texts:
        return reconstruct(model, texts, temperature=temperature, top_p=top_p, max_length=max_length, seed=seed)
    return sample(
        model,
        options.num,
        temperature=temperature,
        top_p=top_p,
        max_length=max_length,
        prefix=options.prefix.encode(),
        seed=seed,
    )


def as_line(item: Sample) -> str:
    """A sample as one line for the eye."""
    from raytrain.utils.text import one_line, readable

    return one_line(readable(item.text))


def as_json(item: Sample) -> str:
    """A sample as a JSON object in one line."""
    from raytrain.utils.text import readable

    return json.dumps(
        {
            "text": readable(item.text),
            "bytes": base64.b64encode(item.text).decode(),
            "log_probability": item.log_probability,
            "entropy": item.entropy,
            "truncated": item.truncated,
        },
        ensure_ascii=False,
    )


if __name__ == "__main__":
    run_command(main)

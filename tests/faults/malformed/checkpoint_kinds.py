"""Checkpoints, and what refers to them."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import safetensors.torch
import torch

from raytrain import evaluate, report, sample
from raytrain.config.schema import to_dict
from raytrain.data.corpus import Corpus
from raytrain.runs import checkpoint as checkpoints
from raytrain.runs.references import resolve
from raytrain.storage import open_storage
from raytrain.training import torchrun as loop
from raytrain.training.trainer import Trainer, World
from tests.faults.malformed.mutate import damaged, restructured, written
from tests.faults.malformed.oracle import command
from tests.faults.malformed.stock import Stock, config

Act = Callable[[], None]


def altered(stock: Stock, given: Path, random: Random) -> Act:
    """A checkpoint of which a file was damaged, exchanged, taken away or added: it is refused or as it was."""
    folder = given / "run" / "checkpoints" / stock.checkpoint.name
    shutil.copytree(stock.checkpoint.parent, folder.parent)
    alter(stock, folder, random)
    way = random.randrange(5)
    whole, before = (checkpoints.load(stock.checkpoint.with_name(f"step-000000{step}")) for step in (20, 10))

    def act() -> None:
        if way == 0:
            found = resolve(str(given / "run")).stored
            assert equal(found, whole) or equal(found, before)
        elif way == 1:
            latest = checkpoints.latest(open_storage(folder.parent))
            assert latest is not None
            assert equal(latest, whole) or equal(latest, before)
        else:
            assert equal(checkpoints.load(folder), whole)

    return act


def alter(stock: Stock, folder: Path, random: Random) -> None:
    """Damage, exchange, take away or add a file of a checkpoint."""
    path = random.choice(sorted(folder.iterdir()))
    match random.randrange(6):
        case 0:
            path.unlink()
        case 1:
            shutil.copyfile(random.choice(sorted(folder.iterdir())), path.with_name("copy"))
            path.with_name("copy").replace(path)
        case 2:
            shutil.copyfile(folder.with_name("step-00000010") / path.name, path)
        case 3:
            other = stock.runs / "other" / "checkpoints" / folder.name
            shutil.copyfile(other / path.name, path)
        case _:
            path.write_bytes(damaged(path.read_bytes(), random))


def resealed(stock: Stock, given: Path, random: Random) -> Act:
    """A checkpoint with another config, state or tensors, and sums that are right: what reads it must look closer."""
    folder = given / "step-00000020"
    shutil.copytree(stock.checkpoint, folder)
    alter_sealed(folder, random)
    arguments = random.choice(
        (
            ("sample", "--num", "2"),
            ("sample", "--interpolate", "a", "b", "--format", "jsonl"),
            ("evaluate", "--num-texts", "0", "--iw-draws", "1", "--evaluate-samples", "16", "--output", "out.json"),
            ("bios", "--num", "2", "--output", "out"),
            ("evaluate", "--data", str(stock.corpus), "--num-texts", "2", "--iw-draws", "1", "--evaluate-samples", "2"),
        )
    )
    mains = {"sample": sample.main, "evaluate": evaluate.main, "bios": report.main}
    first = ("bios", str(folder)) if arguments[0] == "bios" else (str(folder),)
    return command(mains[arguments[0]], *first, *arguments[1:])


def alter_sealed(folder: Path, random: Random) -> None:
    """Give a checkpoint another config, state or tensors, and sums that are right."""
    name = random.choice(("config.json", "state.json", "config.json", "state.json", "model.safetensors"))
    if random.random() < 0.1:
        name = "optimizer.safetensors"
    path = folder / name
    if name.endswith(".json"):
        path.write_bytes(written(restructured(json.loads(path.read_bytes()), random), random))
    else:
        path.write_bytes(other_tensors(path.read_bytes(), random))
    seal(folder, random)


def resumed(stock: Stock, given: Path, random: Random) -> Act:
    """A run whose newest checkpoint was altered: it goes on from that as it was, from the one before, or not at all."""
    steps = config(data=str(stock.corpus), steps=21)
    (given / "config.json").write_text(json.dumps(to_dict(steps)))
    location = given.parent / "work" / "checkpoints"
    shutil.copytree(stock.checkpoint.parent, location)
    sealed = random.random() < 0.6
    if sealed:
        alter_sealed(location / stock.checkpoint.name, random)
    else:
        alter(stock, location / stock.checkpoint.name, random)

    def act() -> None:
        arguments = (str(given / "config.json"), "--corpus", str(stock.corpus), "--storage", "checkpoints")
        command(loop.main, *arguments)()
        found = checkpoints.load(location / "step-00000021").tensors("model")
        ends = [ended(stock.corpus, stock.checkpoint.with_name(f"step-000000{step}")) for step in (20, 10)]
        assert sealed or any(all(torch.equal(found[name], end[name]) for name in end) for end in ends)

    return act


@functools.cache
def ended(corpus: Path, start: Path) -> dict[str, torch.Tensor]:
    """The weights after step 21 of a run that goes on from a checkpoint which nobody has altered."""
    trainer = Trainer(config(data=str(corpus), steps=21), Corpus.open(corpus), World())
    trainer.rehearse()
    stored = checkpoints.load(start)
    trainer.load(stored)
    for step in range(stored.step, 21):
        trainer.train_step(step)
    return trainer.tensors()["model"]


def other_tensors(data: bytes, random: Random) -> bytes:
    """A safetensors file with damage behind its header, in it, or with tensors of other names, shapes and types."""
    tensors = safetensors.torch.load(data)
    name = random.choice(sorted(tensors))
    match random.randrange(6):
        case 0:
            del tensors[name]
        case 1:
            tensors[name] = tensors[name][..., None].contiguous()
        case 2:
            tensors[name] = tensors[name].to(random.choice((torch.float16, torch.int64, torch.bool, torch.float64)))
        case 3:
            tensors[random.choice(("", "x" * 5000, "a\nb"))] = torch.zeros(random.choice(((), (0,), (3, 0, 2))))
        case 4:
            size = int.from_bytes(data[:8], "little")
            header = written(restructured(json.loads(data[8 : 8 + size]), random), random)
            return random.choice((len(header), size, 2**63, 2**40)).to_bytes(8, "little") + header + data[8 + size :]
        case _:
            tensors[name] = (
                torch.full_like(tensors[name], float("nan"))
                if tensors[name].is_floating_point()
                else (tensors[name] - 1)
            )
    return safetensors.torch.save(tensors)


def seal(folder: Path, random: Random) -> None:
    """Write the manifest anew, with sizes and sums of what there is, now and then with other fields."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    del manifest["sha256"]
    for name, entry in manifest["files"].items():
        data = (folder / name).read_bytes()
        entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    if random.random() < 0.1:
        manifest = restructured(manifest, random)
    if isinstance(manifest, dict):  # what stands in for the whole of it has no place for a sum
        text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
        manifest["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


def equal(one: Any, other: Any) -> bool:
    """Whether two checkpoints hold the same."""
    if (one.step, one.score, one.state, one.config) != (other.step, other.score, other.state, other.config):
        return False
    return one._tensors.keys() == other._tensors.keys() and all(
        tensors.keys() == other._tensors[stem].keys()
        and all(torch.equal(tensor, other._tensors[stem][name]) for name, tensor in tensors.items())
        for stem, tensors in one._tensors.items()
    )


def reference(stock: Stock, given: Path, random: Random) -> Act:
    """What a model is called by: names that mean nothing, and places with a damaged ``mlflow.json``."""
    run_id = (stock.folder / "run_id").read_text()
    if random.random() < 0.5:
        shutil.copytree(stock.runs / "run", given / "run")
        path = given / "run" / "mlflow.json"
        path.write_bytes(written(restructured(json.loads(path.read_bytes()), random), random))
        name = str(given / "run")
    else:
        words = ("models:/", "raytrain-hybrid", "@champion", "/1", run_id, "x", "..", "/", "~", "~nobody/", "s3://",
                 "b", "\udcff", " ", "'", '"', "%", "\n", ".", "0" * 32, "/dev/null", "/proc/self/mem", "file://",
                 "é")  # fmt: skip
        name = "".join(random.choice(words) for _ in range(random.randint(1, 4)))
    way = random.randrange(4)
    if way < 2:
        return lambda: found_it(resolve(name))
    return command(sample.main, "--num", "1", "--", name) if way == 2 else command(sample.main, name, "--num", "1")


def found_it(found: Any) -> None:
    assert found.stored.config["model"]["name"] in ("hybrid", "byte_lstm")

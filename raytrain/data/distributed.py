"""Preparing a corpus on Ray Data: gives the same files and digest as a single process, whatever the parallelism.

1. Each read task writes its part: read, cleaned, cut, and split by hash (``parts``). Ray reruns a task whose process or
   node died; a part is the same whoever writes it.
2. If texts, or bios of an account, are deduplicated, their digests and positions are shuffled by digest, so that each
   group sees all possible duplicates. The repeats are then shuffled back to their parts. Texts are never shuffled.
3. This process joins the parts in the order of the source, and removes them.

Ray must have been joined before; see ``cluster.connection``.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import ray
import ray.data
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytrain.data.corpus import CorpusWriter, partial_prefix
from raytrain.data.documents import Source, Taken
from raytrain.data.files import is_s3
from raytrain.data.parts import Kind, Parts, Rows, repeated
from raytrain.data.read_tasks import SIZE, ReadTask, read_tasks
from raytrain.data.sources import File
from raytrain.utils.errors import UserError

_ROWS_OF_A_GROUP = 1 << 20
"""Digests compared in one process at a time: 40 MB, and a few copies of them."""
_DEATHS = 5
"""Processes that may die on one read task; Ray itself would restart it for ever."""
_FILES_NAMED = 3
"""Files of a read task that a message lists."""


def fill(source: Source, writer: CorpusWriter, size: int = SIZE) -> Taken:
    """Add the documents of a source to a corpus like ``documents.fill``, but in tasks of about ``size`` bytes.

    Raises:
        UserError: see ``sources``; there is too little disk space; or a node does not find the files.
        OSError: a part cannot be written.
    """
    files = source.files()
    folder = writer.folder.parent.absolute() / f"{partial_prefix(writer.folder)}parts-{secrets.token_hex(4)}"
    _check_space(source, files, folder.parent)
    folder.mkdir()
    try:
        parts = Parts(folder, source, read_tasks(files, size))
        _check_nodes(parts)
        return _filled(parts, writer)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _filled(parts: Parts, writer: CorpusWriter) -> Taken:
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    reading = parts.source.reading()
    numbers = list(range(len(parts.tasks)))
    tasks = _quiet(ray.data.from_items(_items(numbers), override_num_blocks=len(numbers)))
    tasks.context.execution_options.preserve_order = True  # so that the first mistake is the one reported
    for row in tasks.map(partial(_write, parts)).iter_rows():
        if row["mistake"]:
            raise UserError(row["mistake"])
        if row["failure"]:
            raise OSError(row["failure"])
        parts.check(row["task"], reading)
    if reading.bios:
        _drop_repeated(parts, "bios")
    if parts.source.is_cleaned:
        _drop_repeated(parts, "texts")
    return parts.join(writer)


def _write(parts: Parts, row: dict[str, Any]) -> dict[str, Any]:
    mistake = failure = ""
    number = int(row["task"])
    try:
        if not parts.folder.is_dir():  # on a node that joined after the nodes were checked
            raise _not_shared(ray.util.get_node_ip_address(), str(parts.folder))
        if parts.unfinished(number) >= _DEATHS:
            raise _deadly(parts.tasks[number])
        parts.write(number)
    except UserError as error:
        mistake = _text(error)
    except OSError as error:
        failure = _text(error)
    return {"task": row["task"], "mistake": mistake, "failure": failure}


def _text(error: Exception) -> str:
    return str(error).encode("utf-8", "backslashreplace").decode()


# ------------------------------------------------------------------------------------------- duplicates


def _drop_repeated(parts: Parts, kind: Kind) -> None:
    """Note in each part which of its bios or texts an earlier part already has."""
    width = {"bios": 64, "texts": 24}[kind]
    paths = [parts.part(number) / kind for number in range(len(parts.tasks))]
    sizes = [path.stat().st_size if path.is_file() else 0 for path in paths]
    numbers = [number for number, size in enumerate(sizes) if size]
    if not numbers:
        return
    groups = -(-sum(sizes) // width // _ROWS_OF_A_GROUP) or 1
    tasks = _quiet(ray.data.from_items(_items(numbers), override_num_blocks=min(len(numbers), max(groups, 64))))
    digests = tasks.map_batches(partial(_digests, parts, kind, groups), batch_size=1, batch_format="pyarrow")
    found = digests.groupby("group", num_partitions=groups).map_groups(_repeated, batch_format="pyarrow").materialize()
    if found.count():
        noted = found.groupby("task", num_partitions=min(len(numbers), groups))
        for row in noted.map_groups(partial(_note, parts, kind), batch_format="pyarrow").iter_rows():
            if row["failure"]:
                raise OSError(row["failure"])


def _digests(parts: Parts, kind: Kind, groups: int, tasks: pyarrow.Table) -> Iterator[pyarrow.Table]:
    """Yield the rows of the parts to compare; a failure is also a row, whose value is the negated error number.

    An exception would take many lines in Ray Data's output.
    """
    for number in tasks["task"].to_pylist():
        try:
            for rows in parts.rows(number, kind):
                yield _compared(rows, number, groups)
        except OSError as error:
            yield _compared(np.array([[0, 0, -(error.errno or errno.EIO)]]), number, groups)


def _compared(rows: Rows, number: int, groups: int) -> pyarrow.Table:
    columns = {"group": rows[:, 0] % groups, "high": rows[:, 0], "low": rows[:, 1]}
    return pyarrow.table({**columns, "task": np.full(len(rows), number), "value": rows[:, 2]})


def _repeated(group: pyarrow.Table) -> pyarrow.Table:
    rows = np.column_stack([group[name].to_numpy() for name in ("high", "low", "task", "value")])
    rows = np.concatenate([rows[rows[:, 3] < 0], repeated(rows)])
    return pyarrow.table({"task": rows[:, 2], "value": rows[:, 3]})


def _note(parts: Parts, kind: Kind, group: pyarrow.Table) -> pyarrow.Table:
    number, values = group["task"][0].as_py(), group["value"].to_numpy()
    failure = ""
    try:
        if (lowest := int(values.min())) < 0:
            raise OSError(-lowest, os.strerror(-lowest), str(parts.part(number)))
        parts.note_repeated(number, kind, values)
    except OSError as error:
        failure = _text(error)
    return pyarrow.table({"task": [number], "failure": [failure]})


def _items(numbers: list[int]) -> list[dict[str, int]]:
    return [{"task": number} for number in numbers]


def _quiet(dataset: Any) -> Any:
    dataset.context.enable_progress_bars = False
    return dataset


# ------------------------------------------------------------------------------------------- before the start


def _check_space(source: Source, files: list[File], folder: Path) -> None:
    """Refuse a source whose plain-text files alone exceed the free disk space.

    The text size of other formats is unknown in advance, as is the number of documents, each of which takes 16 more
    bytes.

    Raises:
        UserError: they do.
    """
    need = sum(item.size for _, item in files if item.name.lower().endswith(".txt"))
    if need > (free := shutil.disk_usage(folder).free):
        raise UserError(
            f"{folder} has {free / 1e9:.1f} GB free, and the text of {source.described} takes {need / 1e9:.1f} GB: "
            "set RAYTRAIN_CACHE or --output to a folder with more"
        )


def _check_nodes(parts: Parts) -> None:
    """Make sure that every working node finds the scratch folder and the source, which must be on a shared disk.

    If only the node of this process works, nothing needs to be shared.

    Raises:
        UserError: a node does not find them.
    """
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    names = [item.name for task in parts.tasks for _, item in task.files if not is_s3(item.name)]
    wanted = [str(parts.folder), *(str(parts.working_folder / name) for name in names[:1])]
    if {node["NodeID"] for node in nodes} <= {ray.get_runtime_context().get_node_id()}:
        return
    missing = ray.remote(num_cpus=0)(_missing)
    asked = [
        missing.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(wanted)
        for node in nodes
    ]
    for node, absent in zip(nodes, ray.get(asked), strict=True):
        if absent:
            raise _not_shared(node["NodeManagerAddress"], absent[0])


def _not_shared(address: str, path: str) -> UserError:
    return UserError(
        f"the node {address} does not find {path}: with --distributed, the source and --output must be in folders that "
        "all nodes share, or the source in S3"
    )


def _deadly(task: ReadTask) -> UserError:
    names = [item.name for _, item in task.files]
    more = f" and {len(names) - _FILES_NAMED} more files" if len(names) > _FILES_NAMED else ""
    return UserError(
        f"{_DEATHS} processes that read {', '.join(names[:_FILES_NAMED])}{more} have died, as they do where memory "
        "does not suffice: give the text as smaller files, use machines with more memory, or leave --distributed out"
    )


def _missing(paths: list[str]) -> list[str]:
    return [path for path in paths if not os.path.exists(path)]

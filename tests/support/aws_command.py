"""The part of the ``aws`` command that docs/guides/cluster.md uses: ``aws SERVICE OPERATION --NAME VALUE ...``."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import boto3
import jmespath
from botocore import xform_name


def main() -> None:
    """Make one request, and print the answer or the part of it that ``--query`` names."""
    service, operation, *words = sys.argv[1:]
    options = read_options(words)
    region, query, output = (options.pop(name, [""])[0] for name in ("region", "query", "output"))
    client = boto3.client({"s3api": "s3"}.get(service, service), region_name=region or None)
    method = operation.replace("-", "_")
    shape = client.meta.service_model.operation_model(client.meta.method_to_api_mapping[method]).input_shape
    parameters = {}
    for name, kind in shape.members.items() if shape else ():
        if (values := options.pop(xform_name(name, "-"), None)) is not None:
            parameters[name] = read_value(values, kind)
    if options:
        sys.exit(f"aws {service} {operation} has no --{', --'.join(options)}")
    answer = getattr(client, method)(**parameters)
    answer.pop("ResponseMetadata")
    found = jmespath.search(query, answer) if query else answer
    print(found if output == "text" else json.dumps(found, default=str))


def read_options(words: list[str]) -> dict[str, list[str]]:
    """Name -> the words that follow it."""
    options: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            values = options.setdefault(word[2:], [])
        else:
            values.append(word)
    return options


def read_value(words: list[str], kind: Any) -> Any:
    """The value of a parameter: a text, a file's, JSON, or ``Name=a,Values=b,c``, one word for each of a list."""
    text = words[0]
    if text.startswith("file://"):
        text = Path(text[7:]).read_text()
    if kind.type_name == "string":
        return text
    if text.lstrip().startswith(("{", "[")):
        return json.loads(text)
    if kind.type_name == "list":
        return [read_short(word, kind.member) for word in words]
    return read_short(text, kind)


def read_short(text: str, kind: Any) -> dict[str, Any]:
    """A structure as the command's shorthand has it."""
    pairs = (pair.split("=", 1) for pair in re.split(r",(?=\w+=)", text))
    return {name: value.split(",") if kind.members[name].type_name == "list" else value for name, value in pairs}


if __name__ == "__main__":
    main()

"""Cluster file as it is read: its text, its YAML, and the check by Ray's own schema."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytrain.utils.errors import UserError
from raytrain.utils.files import expanded
from raytrain.utils.validation import check_nesting

MOST_VALUES = 100_000
"""Limit on the values of a cluster file. One with more nests YAML aliases, which multiply as they are expanded."""
TEXT, WHOLE = {"type": "string"}, {"type": "integer"}
OPEN = {"properties": {"min_workers": WHOLE, "file_mounts": {"additionalProperties": TEXT}}}
"""JSON schema of the fields that the rules for every provider read and Ray's schema leaves open."""


@dataclass(frozen=True)
class ClusterFile:
    """Cluster file, parsed but not yet checked."""

    path: Path
    text: str
    config: dict[str, Any]

    @property
    def provider(self) -> str:
        """The type of provider; empty if none is named."""
        return str(at(self.config, "provider", "type") or "")

    @property
    def head(self) -> dict[str, Any]:
        """The head's node type; empty if there is none."""
        return self.types.get(str(self.config.get("head_node_type")), {})

    @property
    def types(self) -> dict[str, dict[str, Any]]:
        """The node types by name."""
        return {str(name): kind for name, kind in (self.config.get("available_node_types") or {}).items()}

    @property
    def workers(self) -> dict[str, dict[str, Any]]:
        """The node types by name, without the head's."""
        return {name: kind for name, kind in self.types.items() if name != self.config.get("head_node_type")}

    def commands(self, *sections: str) -> list[str]:
        """Return the commands of the sections, in order."""
        return [command for section in sections for command in self.config.get(section) or []]

    @property
    def mounts(self) -> dict[str, str]:
        """The shipped files and folders: path on the nodes -> path on this machine."""
        return {str(remote): str(local) for remote, local in (self.config.get("file_mounts") or {}).items()}

    def local_path(self, remote: str) -> Path | None:
        """Return the file of this machine that is shipped to ``remote`` on the nodes; ``None`` if none is."""
        for target, source in self.mounts.items():
            if remote == target or remote.startswith(f"{target.rstrip('/')}/"):
                return expanded(source) / remote[len(target) :].strip("/")
        return None


def at(value: Any, *path: str) -> Any:
    """Return the value at ``path`` in nested mappings; ``None`` if there is none."""
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def read_file(path: Path) -> ClusterFile:
    """Read a cluster file.

    Raises:
        UserError: it cannot be read, is not YAML, is not a mapping, gives a key twice, or has a key that is not text.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML loader that refuses a key that is not text, or given twice: YAML would silently take the last."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
            for key, _ in node.value:
                if keys.count(key.value) > 1:
                    raise UserError(f"{path}, line {key.start_mark.line + 1}: {key.value} is given twice; keep one")
            mapping = super().construct_mapping(node, deep)
            for name in mapping:
                if not isinstance(name, str):
                    raise UserError(f"{path}, line {node.start_mark.line + 1}: the name {name} is not text; quote it")
            return mapping

    try:
        text = expanded(path).read_text("utf-8")
        # a subclass of SafeLoader: it makes plain values only
        config = yaml.load(text, Loader)
        check_nesting(config, MOST_VALUES)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an impossible date or number
        raise UserError(f"{path} is not YAML: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a cluster file: it must be a mapping with cluster_name and provider")
    return ClusterFile(path, text, config)


def schema_mistakes(
    file: ClusterFile, schema_of_provider: Mapping[str, Any], ignored: tuple[str, ...]
) -> Iterator[str]:
    """Yield what Ray's own schema refuses, and values of another type than the rules here expect.

    Args:
        schema_of_provider: JSON schema of the fields that the provider's rules read and Ray's schema leaves open.
        ignored: fields that Ray removes before it checks the file.
    """
    import jsonschema

    spec = importlib.util.find_spec("ray")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("Ray is not installed: pip install 'ray[default]'")
    # found without importing Ray, which takes a second
    schema = json.loads(
        (Path(spec.submodule_search_locations[0]) / "autoscaler" / "ray-schema.json").read_text("utf-8")
    )
    config = {name: value for name, value in file.config.items() if name not in ignored}
    for looked_at, rules, whose in (
        (config, schema, "Ray's schema of cluster files says"),
        (file.config, OPEN, "Ray reads it"),
        (file.config, schema_of_provider, "the provider or Ray reads it"),
    ):
        for error in sorted(
            jsonschema.Draft7Validator(rules).iter_errors(looked_at), key=lambda error: list(error.path)
        ):
            location = ".".join(map(str, error.absolute_path)) or str(file.path)
            yield f"{location}: {error.message[:300]}; correct it as {whose}"

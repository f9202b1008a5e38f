"""A cluster file as it is read: its text, what YAML makes of it, and what Ray's own schema says."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytrain.errors import UserError
from raytrain.storage import expanded


@dataclass(frozen=True)
class ClusterFile:
    """The file, parsed but not yet checked."""

    path: Path
    text: str
    config: dict[str, Any]

    @property
    def provider(self) -> str:
        """The kind of provider, empty where none is named."""
        return str(at(self.config, "provider", "type") or "")

    @property
    def head(self) -> dict[str, Any]:
        """The head's node type; empty where there is none."""
        return self.types.get(str(self.config.get("head_node_type")), {})

    @property
    def types(self) -> dict[str, dict[str, Any]]:
        """The node types by name."""
        return {str(name): kind for name, kind in (self.config.get("available_node_types") or {}).items()}

    @property
    def workers(self) -> dict[str, dict[str, Any]]:
        """The node types that are not the head's."""
        return {name: kind for name, kind in self.types.items() if name != self.config.get("head_node_type")}

    def commands(self, *sections: str) -> list[str]:
        """The commands of the sections, in order."""
        return [command for section in sections for command in self.config.get(section) or []]

    @property
    def mounts(self) -> dict[str, str]:
        """Path on the nodes -> path here."""
        return {str(remote): str(local) for remote, local in (self.config.get("file_mounts") or {}).items()}

    def local_path(self, remote: str) -> Path | None:
        """The file here that stands at ``remote`` on the nodes, if it is shipped."""
        for target, source in self.mounts.items():
            if remote == target or remote.startswith(f"{target.rstrip('/')}/"):
                return expanded(source) / remote[len(target) :].strip("/")
        return None


def at(value: Any, *path: str) -> Any:
    """What is at ``path`` in nested mappings, ``None`` where nothing is."""
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def read_file(path: Path) -> ClusterFile:
    """Read a cluster file.

    Raises:
        UserError: it cannot be read, is no YAML, or no mapping, or says something twice.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that is given twice, of which YAML silently takes the last."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
            for key, _ in node.value:
                if keys.count(key.value) > 1:
                    raise UserError(f"{path}, line {key.start_mark.line + 1}: {key.value} is given twice; keep one")
            return super().construct_mapping(node, deep)

    try:
        text = path.read_text()
        # a subclass of SafeLoader: it makes plain values only
        config = yaml.load(text, Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path} is not YAML: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a cluster file: it must be a mapping with cluster_name and provider")
    return ClusterFile(path, text, config)


def schema_mistakes(file: ClusterFile) -> Iterator[str]:
    """What Ray's own schema refuses."""
    import jsonschema

    spec = importlib.util.find_spec("ray")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("Ray is not installed: pip install 'ray[default]'")
    # found without importing Ray, which takes a second
    schema = json.loads((Path(spec.submodule_search_locations[0]) / "autoscaler" / "ray-schema.json").read_text())
    config = dict(file.config)
    if file.provider == "local":
        config.pop("min_workers", None)  # Ray takes it out before it looks
    for error in sorted(jsonschema.Draft7Validator(schema).iter_errors(config), key=lambda error: list(error.path)):
        place = ".".join(map(str, error.absolute_path)) or str(file.path)
        yield f"{place}: {error.message[:300]}; correct it as Ray's schema of cluster files says"

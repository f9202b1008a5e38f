"""The import order of the packages: one imports only those below it, and no module is in a cycle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import raytrain

ROOT = Path(raytrain.__file__).parent
LAYERS = (
    ("utils", "metrics"),
    ("config",),
    ("storage",),
    ("data", "tracking", "cluster"),
    ("models",),
    ("runs",),
    ("training",),
    ("analysis",),
    ("search",),
    ("bench",),
)
"""From the bottom to the top; what is not named is a command and may import all of them."""
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
MOST_FILES = 12
MOST_INSIDE = 80


def modules() -> dict[str, Path]:
    """Every module by its dotted name below ``raytrain``; a package by its own name."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: set[str], *, top_only: bool = False) -> Iterator[tuple[str, int]]:
    """The modules below ``raytrain`` that a file imports, wherever in it, with the line."""
    tree = ast.parse(path.read_text())
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "raytrain":
            module = node.module.removeprefix("raytrain").lstrip(".")
            for alias in node.names:
                longer = f"{module}.{alias.name}".lstrip(".")
                yield (longer if longer in known else module), node.lineno
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("raytrain."):
                    yield alias.name.removeprefix("raytrain."), node.lineno


def test_packages_import_only_packages_below() -> None:
    known = modules()
    wrong = []
    for name, path in known.items():
        package = name.partition(".")[0]
        if package not in RANK or name.endswith("__main__"):
            continue
        for target, line in imports(path, set(known)):
            other = target.partition(".")[0]
            if other and other != package and RANK.get(other, len(LAYERS)) >= RANK[package]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_itself_in_a_circle() -> None:
    known = modules()
    graph = {name: {target for target, _ in imports(path, set(known))} - {name, ""} for name, path in known.items()}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way[way.index(name) :], name))
        if name not in done:
            for target in sorted(graph.get(name, ())):
                visit(target, (*way, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_few_files_stand_beside_the_packages() -> None:
    files = [path.name for path in ROOT.glob("*.py")]
    assert len(files) <= MOST_FILES, files


def test_few_imports_stand_inside_functions() -> None:
    """They hide what a module needs: only ``--help`` and optional packages are reasons for one."""
    found = {
        (path, node.lineno)
        for path in modules().values()
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
        if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    assert len(found) <= MOST_INSIDE, f"{len(found)} imports inside functions"

"""The champion: the best verified model of each kind, by name, in MLflow's model registry.

    python -m raytrain.registry list
    python -m raytrain.registry promote raytrain-hybrid 3
    python -m raytrain.registry rollback raytrain-hybrid

A search registers its best model as a new version, loads it back and scores it, and only then lets it compete: it
becomes ``champion`` if it beats the present one on the same corpus and metric, else ``challenger``. ``promote`` and
``rollback`` move the alias by hand; what the registry held until then does not take it back by itself.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from raytrain.config.cli import OneLineParser
from raytrain.metrics import shown_metrics
from raytrain.search.registry import _CORPUS, _METRIC, _METRICS, _VERIFIED, _aliases, promote, rollback, versions
from raytrain.tracking.client import check_tracking, connect, patiently, tracking_uri
from raytrain.utils.errors import UserError, run_command

# -------------------------------------------------------------------------------------------- command


def main(arguments: list[str] | None = None) -> None:
    """List the registered models, or move the alias by hand."""
    parser = OneLineParser(prog="python -m raytrain.registry", description="Registered models and their champions.")
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("list", help="versions with their metrics and aliases")
    show.add_argument("name", nargs="?", help="registered model; all of raytrain's if it is left out")
    choose = commands.add_parser("promote", help="make a version champion")
    choose.add_argument("name")
    choose.add_argument("version", type=int)
    back = commands.add_parser("rollback", help="go back to the champion before")
    back.add_argument("name")
    options = parser.parse_args(arguments)
    uri = tracking_uri()
    known = _registered(uri)
    if options.name and options.name not in known:
        raise UserError(f"there is no registered model {options.name!r}; there are {', '.join(known) or 'none'}")
    if options.command == "promote":
        promote(uri, options.name, options.version)
        print(f"{options.name}: version {options.version} is champion")
    elif options.command == "rollback":
        before, now = rollback(uri, options.name)
        print(f"{options.name}: version {now} is champion again, in place of {before}")
    else:
        if not known:
            print("no model is registered yet: a search registers its best one")
        for name in [options.name] if options.name else known:
            _print_versions(uri, name)


def _registered(uri: str) -> list[str]:
    from raytrain.tracking.client import is_there

    if not is_there(uri):
        return []
    check_tracking(uri)
    found = patiently(lambda: connect(uri).search_registered_models("name LIKE 'raytrain-%'"))
    return sorted(model.name for model in found)


def _print_versions(uri: str, name: str) -> None:
    from rich.console import Console
    from rich.table import Table

    aliases: dict[int, list[str]] = {}
    for alias, number in _aliases(uri, name).items():
        aliases.setdefault(number, []).append(alias)
    shown = Table(title=name, title_justify="left")
    known = versions(uri, name)
    metrics = {version.version: json.loads(version.tags.get(_METRICS, "{}")) for version in known}
    columns = shown_metrics(metrics.values())
    labels = (metric.label for metric in columns)
    for column in ("version", "alias", *labels, "measured on", "corpus", "verified", "run"):
        shown.add_column(column, overflow="fold")
    for version in known:
        tags: dict[str, Any] = dict(version.tags)
        shown.add_row(
            str(version.version),
            ", ".join(sorted(aliases.get(int(version.version), []))),
            *(metric.format(metrics[version.version]) for metric in columns),
            tags.get(_METRIC, ""),
            tags.get(_CORPUS, "")[:12],
            tags.get(_VERIFIED, "no"),
            str(version.run_id or "")[:12],
        )
    Console(width=None if sys.stdout.isatty() else 160).print(shown)


if __name__ == "__main__":
    run_command(main)

"""The champion: the best verified model of each kind, by name, in MLflow's model registry.

    python -m raytrain.registry list
    python -m raytrain.registry promote raytrain-hybrid 3
    python -m raytrain.registry rollback raytrain-hybrid

A search registers its best model as a new version, loads it back and scores it, and only then lets it compete: it
becomes ``champion`` if it beats the present one on the same corpus and metric, else ``challenger``. ``promote`` and
``rollback`` move the alias by hand; what the registry held until then does not take it back by itself.
"""

from __future__ import annotations

import sys

from raytrain.config.cli import OneLineParser
from raytrain.utils.errors import UserError, run_command
from raytrain.utils.output import console


def main(arguments: list[str] | None = None) -> None:
    """List the registered models, or move the alias by hand."""
    parser = OneLineParser(prog="python -m raytrain.registry", description="Registered models and their champions.")
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("list", help="versions with their metrics and aliases")
    show.add_argument("name", nargs="?", help="registered model; default: all of raytrain's")
    choose = commands.add_parser("promote", help="make a version champion")
    choose.add_argument("name")
    choose.add_argument("version", type=int)
    back = commands.add_parser("rollback", help="make the champion before this one champion again")
    back.add_argument("name")
    options = parser.parse_args(arguments)

    from raytrain.search import registry
    from raytrain.tracking.client import tracking_uri

    uri = tracking_uri()
    known = registry.registered_names(uri)
    if options.name and options.name not in known:
        raise UserError(f"there is no registered model {options.name!r}; there are {', '.join(known) or 'none'}")
    if options.command == "promote":
        registry.promote(uri, options.name, options.version)
        print(f"{options.name}: version {options.version} is champion")
    elif options.command == "rollback":
        before, now = registry.rollback(uri, options.name)
        print(f"{options.name}: version {now} is champion again, in place of {before}")
    else:
        if not known:
            print("no model is registered yet: a search registers its best one")
        for name in [options.name] if options.name else known:
            print_versions(name, registry.version_rows(uri, name))


def print_versions(name: str, rows: list[dict[str, str]]) -> None:
    """Print the versions of a registered model as a table."""
    from rich.table import Table

    table = Table(title=name, title_justify="left")
    for column in rows[0] if rows else ():
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row.values())
    console(width=None if sys.stdout.isatty() else 160).print(table)


if __name__ == "__main__":
    run_command(main)

"""``python -m flash_plugin ls`` and ``cp``: find and copy the configs and recipes that come with the package."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from flash_plugin.shipped import copy, described, names


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m flash_plugin", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("ls", help="list configs, with what launches each, and recipes")
    cp = commands.add_parser("cp", help="copy a config or a recipe, with what it needs or its header prepares with")
    cp.add_argument("name", metavar="NAME", help="such as flash_debug, or plot_loss.py for the recipe alone")
    cp.add_argument(
        "destination", metavar="DESTINATION", nargs="?", default=".", help="folder, or new path (default: .)"
    )
    cp.add_argument(
        "--force", action="store_true", help="replace files that are there, but for those it is only prepared with"
    )
    chosen = parser.parse_args(arguments)
    if chosen.command == "ls":
        _list()
        return 0
    try:
        copies = copy(chosen.name, Path(chosen.destination), overwrite=chosen.force)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    for path, written in copies.items():
        print(f"{'Copied' if written else 'Kept'} {path}")
    return 0


def _list() -> None:
    rows = [(Path(name).stem if name.startswith("configs/") else Path(name).name, *described(name)) for name in names()]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for name, launch, summary in rows:
        print(f"{name:{widths[0]}}  {launch:{widths[1]}}  {summary}".rstrip())


if __name__ == "__main__":
    sys.exit(main())

"""The command `htv`, as far as it goes without typer: the commands are in commands.py."""

import sys

from htv.errors import MissingExtraError, require


def main() -> None:
    """Run the command line; exits with 1 and one line if a package of an extra is missing."""
    try:
        require("htv", "cli", "typer")
        from htv.cli.commands import app

        app(prog_name="htv")
    except MissingExtraError as error:
        sys.exit(str(error))

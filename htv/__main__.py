"""`python -m htv` is the command `htv`."""

from htv.cli import main

main()

"""Let `python -m launcher` stand for `halfstep`."""

from launcher.cli import console

console()

"""Let `python -m halfstep` stand for `halfstep`."""

from halfstep.launcher.cli.console import main

main()

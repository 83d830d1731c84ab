"""Let `python -m launcher` stand for `halfstep`."""

from launcher.console import main

main()

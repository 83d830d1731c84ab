"""The console script `halfstep`, quiet from its first moment: on Ctrl-C, on a full disk, on an old screen."""

import io
import os
import signal
import sys


def main() -> None:
    """Run the command and end the process with its exit code."""
    heard = signal.getsignal(signal.SIGINT)
    if heard is signal.default_int_handler:  # and not ignored, as for a job in a shell's background
        # While modules are imported nothing is running: Ctrl-C ends this process as it does one written in C.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a screen that lacks a letter gets its number
            stream.reconfigure(errors="backslashreplace")
    from halfstep.launcher.cli.main import main as run

    signal.signal(signal.SIGINT, heard)
    try:
        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except SystemExit as end:  # argparse
        code = end.code
    if heard is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    _flush()
    sys.exit(code)


def _flush() -> None:
    """Write what is left; where that cannot be, drop it: Python would say so at length when it ends."""
    for number, stream in enumerate((sys.stdout, sys.stderr), 1):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)

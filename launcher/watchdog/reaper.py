"""A small process tied to `halfstep run`: when that dies, it ends what the launch has on this host.

Ranks that were started over ssh cannot see `halfstep run`. With pdsh, mpirun and ssh gone, their own sessions end, and
their watchdogs see that. Started with the number of the process to watch and the mark of the launch.
"""

import os
import select
import signal
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    above = Path(__file__).resolve().parents
    sys.path.insert(0, next(str(folder) for folder in above if (folder / "halfstep" / "__init__.py").is_file()))

from halfstep.launcher.system import processes

_SECONDS = 10.0


def main(parent: int, mark: str) -> None:
    """Wait for the parent's end, and kill what bears the launch's mark."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    fd = processes.pidfd(parent)
    while os.getppid() == parent:
        if fd is not None:
            select.select([fd], [], [])
        else:
            time.sleep(0.5)
        if not processes.is_alive(parent):
            break
    end = time.monotonic() + _SECONDS
    while (left := processes.marked(mark)) and time.monotonic() < end:
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.1)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])

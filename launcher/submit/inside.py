"""What a job script asks from inside its allocation: where the ranks may meet, and whether the run is to resume.

python inside.py begin RUN            prints a free port
python inside.py end RUN STATUS USED  ends with 0 (done), 75 (put the job back into the queue) or the run's own code

USED is empty, or what the job had used of its time when SLURM told it to end, and the limit: `1:02:03 2:00:00`.
"""

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Started as a script, Python puts launcher/submit/ itself on the path, where `site` would not be Python's.
    sys.path[0] = next(str(f) for f in Path(__file__).resolve().parents if (f / "halfstep" / "__init__.py").is_file())

from halfstep.launcher.errors import (
    EXIT_NUMERICS,
    EXIT_REFUSED,
    EXIT_REQUEST,
    EXIT_STOPPED,
    HalfstepError,
    NumericsError,
    RequestError,
    TopologyError,
)
from halfstep.launcher.rundir import layout
from halfstep.launcher.rundir.exits import attempt_of_this_start, read_exit, read_refusal, start_of_job
from halfstep.launcher.submit.times import seconds
from halfstep.launcher.system import files, foreign
from halfstep.launcher.system.terminal import say

STUCK = 3
"""So many starts in a row may end by themselves without a newer checkpoint; of others there is no limit."""
_FIRST_PORT, _PORTS = 20000, 12000  # below 32768, where Linux takes ports for outgoing connections
_STARTS = "starts.jsonl"
"""In the run directory: a line for every start of a job that ended by itself, with the newest checkpoint then."""
_FOR_GOOD = (0, EXIT_REQUEST, EXIT_REFUSED, EXIT_NUMERICS)


def begin(run: Path, environ: Mapping[str, str] = os.environ) -> int:
    """Return a port for the ranks to meet at; raises RequestError where this host does not see the run directory."""
    if not (run / "plan.json").is_file():
        raise RequestError(
            f"{run} is not a run directory on {socket.gethostname()}",
            where="the job script, on the first node of the job",
            fix="put out= on a file system that every node sees",
        )
    return free_port(_number(environ, "SLURM_JOB_ID"), _number(environ, "SLURM_ARRAY_TASK_ID"))


def _number(environ: Mapping[str, str], name: str) -> int:
    # It only chooses a port: whatever SLURM calls its jobs, one is found.
    text = environ.get(name, "0")
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else 0


def free_port(job: int, index: int) -> int:
    """Return the port that belongs to a job, or the next one that nothing on this host uses."""
    first = (job * 16 + index) % _PORTS
    for offset in range(_PORTS):
        port = _FIRST_PORT + (first + offset) % _PORTS
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise TopologyError("no port is free", where=socket.gethostname(), fix="look for what holds them: ss -ltn")


def end(run: Path, status: int, used: str = "") -> int:
    """Return what the job has to do after its ranks have ended with `status`, and say why."""
    attempt = attempt_of_this_start(run)
    ending = read_refusal(run) or (read_exit(attempt) if attempt else None)
    code = ending.code if ending else status
    if code == 0 and not (run / "summary.json").is_file():
        code = 1  # the ranks never began
    why = f"{ending.cause} (exit code {code})" if ending else f"the ranks ended with exit code {code}"
    if code in _FOR_GOOD:
        say("--- the run is done" if code == 0 else f"--- the run ends: {why}")
        return code
    if used and not _limit_reached(used):
        say(f"--- {why}; the job was cancelled, or SLURM puts it back by itself")
        return 128 + signal.SIGTERM
    newest = layout.newest_checkpoint(run) or 0
    starts = [*_starts(run), {**start_of_job(), "newest": newest, "code": code, "time": time.time()}]
    with contextlib.suppress(OSError):
        files.append(run / _STARTS, json.dumps(starts[-1]) + "\n")
    if count := stuck(starts):
        at = f"step {starts[-1]['newest']}" if starts[-1]["newest"] else "the start"
        cause = NumericsError(
            f"{count} starts in a row came no further than {at}: {why}",
            where=str(attempt or run),
            fix="fix the cause and submit it again; where a time limit is too short for one checkpoint, more --time",
        )
        say(*str(cause).splitlines())
        return cause.exit_code
    say(f"--- {why}; there is more to do")
    return EXIT_STOPPED


def stuck(starts: Sequence[Mapping[str, Any]]) -> int:
    """Return how many of the last starts of a job ended where its newest checkpoint stands, 0 if fewer than STUCK.

    The start that wrote that checkpoint is one of them if it then failed; if it was stopped, it got somewhere.
    """
    trail = list(itertools.takewhile(lambda start: start["newest"] == starts[-1]["newest"], reversed(starts)))
    first = trail[-1]
    if first["code"] == EXIT_STOPPED and first["newest"]:
        trail.pop()
    return len(trail) if len(trail) >= STUCK else 0


def _starts(run: Path) -> list[dict[str, Any]]:
    """Return what `end` wrote of earlier starts of this job; starts that SLURM cut off are not among them."""
    job = start_of_job()["job"]
    rows = foreign.objects(run / _STARTS)  # a full disk cuts lines short
    return [row for row in rows if row.get("job") == job and _whole(row.get("newest")) and _whole(row.get("code"))]


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _limit_reached(times: str) -> bool:
    """Tell whether the time that a job had used was all of its limit, as squeue writes both."""
    used, _, limit = times.partition(" ")
    try:
        return seconds(used) >= seconds(limit)
    except ValueError:  # UNLIMITED, or nothing
        return False


def main(arguments: list[str]) -> int:
    """Do one of the two, and return the exit code."""
    try:
        if arguments[0] == "begin":
            say(str(begin(Path(arguments[1]))))
            return 0
        return end(Path(arguments[1]), int(arguments[2]), " ".join(arguments[3:]))
    except HalfstepError as error:
        say(*str(error).splitlines(), error=True)
        return error.exit_code
    except OSError as error:  # the file server may be away for a moment; how the ranks ended is known all the same
        cause = files.explained(error, arguments[1])
        say(*str(cause).splitlines(), error=True)
        if arguments[0] == "begin":
            return cause.exit_code
        return int(arguments[2]) if int(arguments[2]) in _FOR_GOOD else EXIT_STOPPED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

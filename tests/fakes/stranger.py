"""Another user's process that tries to join, read and forge a start on this host; standard library only.

stranger.py RUN STOP REPORT: until the file STOP is there, then write what it got hold of into REPORT.
"""

import contextlib
import json
import os
import pickle
import socket
import struct
import sys
import time
from pathlib import Path

MARK = "/tmp/halfstep-a-stranger-was-here"


class Payload:
    """What would run as whoever reads it."""

    def __reduce__(self):
        return os.system, (f"id > {MARK}",)


PICKLE = pickle.dumps(Payload())
REPORT = json.dumps({"report": {"rank": 1, "host": "\x1b[2Jevil", "problem": "forged"}}).encode()
# None begins with a small number in eight bytes: gloo, which knows no passwords either, would take whoever sends it for
# the next rank that it waits for, and the start would stall (docs/reliability.md says what a host has to guarantee).
GREETINGS = [
    b"",
    b"\xff" + os.urandom(64),
    b"\xff" * 64,
    struct.pack("<I", 2**31) + b"x" * 100,
    struct.pack("<I", len(PICKLE)) + PICKLE,
    os.urandom(32) + os.urandom(32) + struct.pack("<I", len(REPORT)) + os.urandom(32) + REPORT,
    # torch's store: validate, then set a key to a pickle.
    b"\x09" + struct.pack("<I", 0x3C85F7CE) + struct.pack("<BQ", 0, 8) + b"report/1" + PICKLE,
    PICKLE,
    b"GET / HTTP/1.1\r\n\r\n",
]


def listening() -> set:
    """Return the TCP ports that something listens at, and the abstract sockets of this host."""
    seen = set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                seen.add(int(fields[1].rpartition(":")[2], 16))
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        name = line.split()[-1]
        if name.startswith("@halfstep"):
            seen.add("\0" + name[1:])
    return seen


def annoy(place, held: list) -> None:
    """Connect to a place in every way, and keep some of the connections."""
    for greeting in GREETINGS:
        with contextlib.suppress(OSError):
            family = socket.AF_UNIX if isinstance(place, str) else socket.AF_INET
            stream = socket.socket(family)
            stream.settimeout(0.5)
            stream.connect(place if isinstance(place, str) else ("127.0.0.1", place))
            stream.sendall(greeting)
            if len(held) < 100:
                held.append(stream)


def look(run: Path, got: dict) -> None:
    """Read and write whatever lets us."""
    for file in [run / ".secret", *Path("/tmp").glob("halfstep-[0-9]*"), *Path("/tmp").glob("halfstep-[0-9]*/*")]:
        with contextlib.suppress(OSError):
            got.setdefault("read", {})[str(file)] = (
                sorted(os.listdir(file)) if file.is_dir() else file.read_bytes().decode(errors="replace")
            )
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if b"HALFSTEP_SECRET" in (process / "environ").read_bytes() and process.stat().st_uid != os.getuid():
                got.setdefault("environ", []).append(process.name)
    for name in ("STOP", "plan.json", "attempts/evil"):
        with contextlib.suppress(OSError):
            (run / name).write_text("x")
            got.setdefault("wrote", []).append(name)


def main(run: Path, stop: Path, report: Path) -> None:
    before, held, got, visited = listening(), [], {}, {}
    (stop.parent / "ready").touch()
    while not stop.exists():
        for place in listening() - before:
            visited[str(place)] = visited.get(str(place), 0) + 1
            if visited[str(place)] < 20:
                annoy(place, held)
        look(run, got)
        time.sleep(0.02)
    report.write_text(json.dumps({"got": got, "visited": visited}))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

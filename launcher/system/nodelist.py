"""The nodes of a job, as SLURM lists them."""

import itertools
import math
import re
from collections.abc import Iterator

from halfstep.launcher.errors import TopologyError

MOST_HOSTS = 2**20
"""Of one list: what names more is no such list."""


def hosts(nodelist: str) -> list[str]:
    """Return the hosts of a SLURM node list: `n[03-04,9],m1` -> n03, n04, n9, m1; raises TopologyError for no list."""
    names: list[str] = []
    for text in _names(nodelist):
        parts = re.split(r"\[([^\]]*)\]", text)
        choices = [_numbers(part, nodelist) if odd % 2 else [part] for odd, part in enumerate(parts)]
        if len(names) + math.prod(map(len, choices)) > MOST_HOSTS:
            raise _no_list(nodelist)
        names += ["".join(letters) for letters in itertools.product(*choices)]
    if any(not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.:-]*", name) for name in names):
        raise _no_list(nodelist)
    return names


def _names(nodelist: str) -> Iterator[str]:
    """Yield what stands between commas outside of brackets."""
    inside, begin = False, 0
    for place, letter in enumerate(nodelist):
        if letter == ("[" if inside else "]"):
            raise _no_list(nodelist)
        if letter in "[]":
            inside = not inside
        elif letter == "," and not inside:
            yield nodelist[begin:place]
            begin = place + 1
    if inside:
        raise _no_list(nodelist)
    if nodelist:
        yield nodelist[begin:]


def _numbers(ranges: str, nodelist: str) -> list[str]:
    numbers: list[str] = []
    for text in ranges.split(","):
        match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", text)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if match is None or last < first or len(numbers) + last - first >= MOST_HOSTS:
            raise _no_list(nodelist)
        numbers += [str(number).zfill(len(match[1])) for number in range(first, last + 1)]
    return numbers


def _no_list(nodelist: str) -> TopologyError:
    return TopologyError(
        f"{nodelist[:80]!r} is no list of nodes",
        where="what SLURM says in SLURM_STEP_NODELIST",
        fix="let srun set it, or set MASTER_ADDR to the first node",
    )

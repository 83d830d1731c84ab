"""Times as SLURM writes them."""

import re


def seconds(limit: str) -> int:
    """Return the seconds of a SLURM time: minutes, minutes:seconds, h:m:s, days-h, days-h:m or days-h:m:s.

    Raises ValueError for anything else.
    """
    match = re.fullmatch(r"(?:(\d{1,9})-)?(\d{1,9})(?::(\d{1,9}))?(?::(\d{1,9}))?", limit, re.ASCII)
    if not match:
        raise ValueError(f"{limit!r} is no SLURM time, such as 90, 12:00:00 or 2-12")
    days, *rest = match.groups()
    numbers = [int(number) for number in rest if number is not None]
    if days is not None:
        hours, minutes, left = (*numbers, 0, 0)[:3]
    elif len(numbers) == 3:
        hours, minutes, left = numbers
    else:
        hours, (minutes, left) = 0, (*numbers, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + left


def clock(count: int) -> str:
    """Return seconds as SLURM writes them."""
    days, rest = divmod(count, 86400)
    return f"{days}-" * bool(days) + f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"

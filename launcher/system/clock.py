"""The time of day as one process counts it: whoever sets the machine's clock meanwhile does not turn it back.

What a process writes down, row after row, is compared with itself; a clock that is set back by an hour would make of an
attempt one that took less than no time.
"""

import time

_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)  # a machine that sleeps does not stop the first


def _counted() -> float:
    return time.clock_gettime(_CLOCK)


_BEGAN = time.time() - _counted()


def now() -> float:
    """Return seconds since the epoch: the clock's when this process began, and what has passed since."""
    return _BEGAN + _counted()


def since_boot(seconds: float) -> float:
    """Return when the system had been up for so many seconds, on the same scale."""
    return _BEGAN + seconds

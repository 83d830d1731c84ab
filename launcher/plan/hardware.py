"""Know a device's peak arithmetic, for MFU, and its memory; a device that is not in the table has none."""

import re
import tomllib
from importlib import resources
from typing import Any

from launcher.errors import RequestError, nearest


def peak_flops(hardware: str | None, device_name: str, precision: str) -> float | None:
    """Return the dense peak FLOP/s of one device in a precision, or None where it is not known.

    `hardware` is a name in the table and wins over `device_name`, which is what the device calls itself.
    """
    row = _row(hardware, device_name)
    return row.get("fp32" if precision == "fp32" else "half")


def memory_bytes(hardware: str | None, device_name: str) -> int | None:
    """Return the memory of one device, or None where it is not known; what the device's own name says comes first."""
    said = re.search(r"(\d+) ?GB", device_name)
    if said is not None:
        return int(said[1]) * 10**9
    size = _row(hardware, device_name).get("memory")
    return int(size) if size is not None else None


def _row(hardware: str | None, device_name: str) -> dict[str, Any]:
    table = tomllib.loads(resources.files("launcher.plan").joinpath("hardware.toml").read_text("utf-8"))
    if hardware is not None and hardware not in table:
        close = nearest(hardware, table)
        raise RequestError(
            f"hardware={hardware} is not in the table",
            where="run key hardware",
            fix=f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(table)}",
        )
    name = hardware or next((key for key, row in table.items() if any(m in device_name for m in row["match"])), None)
    return table.get(name, {}) if name else {}

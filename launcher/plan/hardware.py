"""Know a device's peak arithmetic, for MFU; a device that is not in the table has none."""

import tomllib
from importlib import resources

from launcher.errors import RequestError, nearest


def peak_flops(hardware: str | None, device_name: str, precision: str) -> float | None:
    """Return the dense peak FLOP/s of one device in a precision, or None where it is not known.

    `hardware` is a name in the table and wins over `device_name`, which is what the device calls itself.
    """
    table = tomllib.loads(resources.files("launcher.plan").joinpath("hardware.toml").read_text("utf-8"))
    if hardware is not None and hardware not in table:
        close = nearest(hardware, table)
        raise RequestError(
            f"hardware={hardware} is not in the table",
            where="run key hardware",
            fix=f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(table)}",
        )
    name = hardware or next((key for key, row in table.items() if any(m in device_name for m in row["match"])), None)
    row = table.get(name, {}) if name else {}
    return row.get("fp32" if precision == "fp32" else "half")

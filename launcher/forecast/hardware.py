"""Know a device: its peak arithmetic, its memory and its links, from a table that users extend."""

import functools
import math
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any

from halfstep.launcher.config import precisions
from halfstep.launcher.config.legal import shown
from halfstep.launcher.config.text_file import read_toml
from halfstep.launcher.errors import RequestError, nearest

THIS_CPU = "this-cpu"
"""The row that `halfstep doctor --measure` writes into a file of its own beside the user's table."""

Rows = Mapping[str, Mapping[str, Any]]
"""Devices by name, as TOML has them."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One device, its node and its network; None where a number is not known."""

    name: str
    match: tuple[str, ...] = ()
    """Words of the name that the device gives itself."""
    labels: tuple[str, ...] = ()
    """Other spellings."""
    half: float | None = None
    """Dense peak FLOP/s of fp16 and bf16."""
    fp16: float | None = None
    """Where it differs from bf16: CPUs."""
    fp32: float | None = None
    tf32: float | None = None
    fp8: float | None = None
    fp4: float | None = None
    matmul: float | None = None
    """Share of the peak that large matrix products reach."""
    bandwidth: float | None = None
    """Of the device's memory, bytes/s."""
    memory: int | None = None
    """Bytes."""
    link: float | None = None
    """Between the devices of a node, bytes/s in one direction."""
    link_latency: float | None = None
    """Seconds a message; None: as calibrated."""
    node: int = 8
    """Devices of the usual node."""
    domain: int | None = None
    """Devices that the link joins, where it leaves the node."""
    pcie: float | None = None
    """To the host, bytes/s in one direction."""
    network: float | None = None
    """Between nodes, bytes/s in one direction and device."""
    storage: float | None = None
    """What one node writes to its storage, bytes/s."""
    measured_ranks: int | None = None
    """A CPU's numbers are of one rank of so many on the machine."""
    host: str = ""
    """Where a CPU was measured."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What else the table says."""

    def peak(self, precision: str) -> float | None:
        """Return the dense peak FLOP/s of what matrices are multiplied in.

        `precision` is a run key's value, or fp8 (also `fp8-mx` and the like) or fp4.
        """
        if precision in precisions.PRECISIONS:
            precision = precisions.of(precision).products
        if precision in ("fp16", "bf16"):
            return (self.fp16 if precision == "fp16" else None) or self.half
        return {"fp32": self.fp32, "tf32": self.tf32, "fp8": self.fp8, "fp4": self.fp4}.get(precision.partition("-")[0])

    def shared(self, ranks: int) -> "Hardware":
        """Return what one of so many ranks of a measured CPU has; a GPU is no rank's but its own."""
        if not self.measured_ranks or ranks == self.measured_ranks:
            return self
        share = self.measured_ranks / ranks
        rates = ("half", "fp16", "fp32", "bandwidth", "link")
        now = {name: value * share for name in rates if (value := getattr(self, name)) is not None}
        memory = None if self.memory is None else int(self.memory * share)
        return replace(self, **now, memory=memory, measured_ranks=ranks)


def folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the user's configuration folder."""
    return Path(environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "halfstep"


def read_own(environ: Mapping[str, str] = os.environ) -> dict[str, dict[str, Any]]:
    """Read the user's table, empty where there is none; raises RequestError where it is no table of devices."""
    return {**_read(folder(environ) / "this-cpu.toml"), **_read(folder(environ) / "hardware.toml")}


def _read(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    table = read_toml(path, "the table of devices", str(path))
    for name, row in table.items():
        _device(name, row, str(path))
    return table


def find(label: str, own: Rows | None = None, *, where: str = "run key hardware") -> Hardware:
    """Return the device of a name, another spelling of it, or a name that a device gave itself.

    Raises RequestError that names the nearest where there is none.
    """
    table = _table(own)
    device = table.get(label) or _spelt(label, table) or described(label, own)
    if device is not None:
        return device
    spellings = [*table, *(spelling for device in table.values() for spelling in device.labels)]
    close = nearest(label, spellings)
    raise RequestError(
        f"hardware={shown(label)} is not in the table",
        where=where,
        fix=f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(table)}",
    )


def described(device_name: str, own: Rows | None = None) -> Hardware | None:
    """Return the device that calls itself so, or None."""
    matching = [
        (len(word), device)
        for device in _table(own).values()
        for word in device.match
        if re.search(rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])", device_name)
    ]
    # The longest wins: an `H100 PCIe` is one before it is an `H100`.
    return max(matching, key=lambda pair: pair[0])[1] if matching else None


def of(hardware: str | None, device_name: str, accelerator: str, own: Rows | None = None) -> Hardware | None:
    """Return what a plan's ranks run on, or None where that is not known.

    `hardware`, a name in the table, wins over what the device calls itself; CPU ranks are what `doctor --measure` saw.
    """
    if hardware is not None:
        return find(hardware, own)
    if accelerator == "cpu":
        return _table(own).get(THIS_CPU)
    return described(device_name, own)


def peak_flops(hardware: str | None, device_name: str, precision: str, own: Rows | None = None) -> float | None:
    """Return the dense peak FLOP/s of one device in a precision, or None where it is not known.

    `hardware` is a name in the table and wins over `device_name`, which is what the device calls itself.
    """
    device = find(hardware, own) if hardware is not None else described(device_name, own)
    return device.peak(precision) if device else None


def memory_bytes(hardware: str | None, device_name: str, own: Rows | None = None) -> int | None:
    """Return the memory of one device, or None where it is not known; what the device's own name says comes first."""
    said = re.search(r"(\d+) ?GB", device_name)
    if said is not None:
        return int(said[1]) * 10**9
    device = find(hardware, own) if hardware is not None else described(device_name, own)
    return None if device is None or device.memory is None else int(device.memory)


def _spelt(label: str, table: Mapping[str, Hardware]) -> Hardware | None:
    folded = label.casefold()
    for device in table.values():
        if folded in (device.name, *(spelling.casefold() for spelling in device.labels)):
            return device
    return None


def _table(own: Rows | None) -> dict[str, Hardware]:
    if not own:
        return _shipped()
    mine = {name: _device(name, row, "the user's hardware.toml") for name, row in own.items()}
    return {**mine, **{name: device for name, device in _shipped().items() if name not in mine}}


@functools.cache
def _shipped() -> dict[str, Hardware]:
    text = resources.files("halfstep.launcher.forecast").joinpath("hardware.toml").read_text("utf-8")
    return {name: _device(name, row, "hardware.toml") for name, row in tomllib.loads(text).items()}


def _device(name: str, row: Any, where: str) -> Hardware:
    if not isinstance(row, dict):
        raise RequestError(f"{name} is no table", where=where, fix=f"write [{name}] and its numbers below")
    known = {field.name for field in fields(Hardware)} - {"name", "extra"}
    strings, lists = {"host"}, {"match", "labels"}
    values: dict[str, Any] = {}
    for key, value in row.items():
        if key not in known:
            close = nearest(key, known)
            if close:
                raise RequestError(f"{name}.{key} is no key of a device", where=where, fix=f"did you mean {close[0]}?")
            values.setdefault("extra", {})[key] = value
        elif key in lists or key in strings:
            if key in lists and not isinstance(value, list):
                raise RequestError(f"{name}.{key} is no list", where=where, fix=f'{key} = ["..."]')
            values[key] = tuple(map(str, value)) if key in lists else str(value)
        elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise RequestError(f"{name}.{key} = {value!r} is not a number above zero", where=where, fix="correct it")
        else:
            values[key] = value
    return Hardware(name=name, **values)

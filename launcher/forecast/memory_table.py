"""Show a plan's memory to a person: the terms at the peak with a bar each, the verdict, and what to change first."""

from typing import Any

from halfstep.launcher.forecast.fit import NOTHING

_GIB = 2**30
_BAR = 24
"""Characters of the longest bar."""
_CHANGES = 6
"""Changes shown at most; `--json` has all."""


def lines(memory: dict[str, Any], activation_checkpointing: bool) -> list[str]:
    """Return the table of a rank's memory."""
    text = [f"memory       {_headline(memory)}"]
    largest = max(term["bytes"] for term in memory["device_terms"])
    for term in sorted(memory["device_terms"], key=lambda term: -term["bytes"]):
        text.append(_line(term, largest))
    if memory["host_terms"]:
        text.append(f"host memory  {memory['predicted_host_bytes'] / _GIB:.2f} GiB a rank")
        text += [_line(term, largest) for term in memory["host_terms"]]
    if memory["excludes"] != NOTHING:
        text.append(f"             not counted: {memory['excludes']}")
    if memory["largest_micro"] is not None:
        way = "with" if activation_checkpointing else "without"
        micro = memory["largest_micro"]
        which = f"batch.micro={micro}" if micro else "none"
        text.append(f"             largest micro-batch that fits, {way} activation checkpointing: {which}")
    for change in memory["changes"][:_CHANGES]:
        outcome = f"{change['peak_bytes'] / _GIB:.2f} GiB, {change['verdict']}"
        text.append(f"             change: {change['words']} -> {outcome}")
    return text


def _headline(memory: dict[str, Any]) -> str:
    peak, low, high = (memory[f"predicted_{name}_bytes"] / _GIB for name in ("peak", "low", "high"))
    said = f"{peak:.2f} GiB a rank at its peak, the {memory['peak_at']} ({low:.2f} to {high:.2f})"
    if memory["outside_bytes"]:
        said += f" + {memory['outside_bytes'] / _GIB:.2f} that torch does not count"
    if memory["capacity_bytes"] is None:
        return f"{said}; what a rank has is not known here"
    return f"{said}; a rank has {memory['capacity_bytes'] / _GIB:.2f}: {memory['verdict'].upper()}"


def _line(term: dict[str, Any], largest: int) -> str:
    bar = "#" * max(1, round(_BAR * term["bytes"] / largest))
    return f"  {term['name']:<24} {term['bytes'] / _GIB:8.3f}  {bar:<{_BAR}}  {term['note']}"

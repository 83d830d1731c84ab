"""Score the planner against published runs, and fit the calibration it ships with.

python benchmarks/planner_score.py --rows throughput.csv vtrain.csv            error by split, stack and device
python benchmarks/planner_score.py --rows throughput.csv vtrain.csv --fit      and write launcher/plan/calibration.toml
python benchmarks/planner_score.py --runs runs/time/* --fit                    the constants of this CPU's ranks in it

The columns are those of `halfstep plan score --rows`. Needs numpy and nothing else; two runs give the same file.
"""

import argparse
import dataclasses
import json
import math
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from planner_report import Known, errors, memory_report, predict, report, scaling

from halfstep.launcher.forecast import hardware
from halfstep.launcher.forecast.calibration import CPU_STACK, Calibration, factor_keys
from halfstep.launcher.forecast.hardware import Hardware
from halfstep.launcher.forecast.parallelism import Layout
from halfstep.launcher.forecast.published import published_runs, score
from halfstep.launcher.forecast.published.published_runs import Row
from halfstep.launcher.plan import estimate
from halfstep.launcher.plan.plan import Plan

TARGET = Path(__file__).resolve().parents[1] / "launcher" / "forecast" / "calibration.toml"
# How far a constant may move from where physics or a guess puts it, as the standard deviation of its logarithm.
FREEDOM = {
    "matmul": 0.15,
    "narrow": 0.7,
    "attention": 0.2,
    "attention_early": 0.2,
    "attention_lag": 0.3,
    "attention_small": 0.2,
    "low_precision": 0.2,
    "weight_passes": 0.5,
    "elementwise": 0.5,
    "compiled": 0.3,
    "scores": 0.7,
    "loss": 0.4,
    "host": 0.5,
    "host_tensor": 0.3,
    "host_compiled": 0.5,
    "link": 0.2,
    "network": 0.2,
    "link_latency": 0.7,
    "network_latency": 0.3,
    "pipeline_latency": 0.7,
    "stage3": 0.4,
    "shown": 0.4,
    "optimizer": 0.3,
    "host_adam": 0.3,
    "straggling": 0.4,
}
# The same for factors, by how special they are.
FACTOR_FREEDOM = {
    "device": 0.05,
    "precision": 0.1,
    "stack": 0.3,
    "stack device": 0.08,
    "stack precision": 0.1,
    "stack device precision": 0.05,
}
CPU_FREEDOM = {
    "matmul": 0.5,
    "elementwise": 1.5,
    "converted": 0.7,
    "copied": 0.7,
    "host": 1.5,
    "stage3": 1.5,
    "optimizer": 1.0,
    "weight_passes": 1.0,
    "loss": 1.0,
    "link_latency": 1.0,
}
"""The constants that CPU ranks have of their own."""
HUBER = 0.12
"""Residuals beyond this (in logarithms) pull no harder than at it: single cluster runs are off by tens of percent."""


def load(paths: Iterable[Path]) -> Known:
    """Read the rows; a group of n weighs as the root of n, so that no grid of one model decides."""
    rows: list[tuple[Row, float]] = []
    for path in paths:
        for row in published_runs.read(path):
            speed = score.measured_speed(row.text)
            if speed and row.device and predict(row, Calibration()) is not None:
                rows.append((row, math.log(speed)))
    sizes = Counter(row.group for row, _ in rows)
    weights = np.array([sizes[row.group] ** -0.5 for row, _ in rows])
    return Known([row for row, _ in rows], np.array([value for _, value in rows]), weights)


def load_runs(paths: Iterable[Path], device: Hardware) -> Known:
    """Read run directories of CPU ranks; runs of the same model and batch, in all cells, are a group."""
    rows = []
    for path in paths:
        plan = Plan.from_dict(json.loads((path / "plan.json").read_text()))
        workload, tokens = estimate.workload_of(plan), plan.batch.global_ * plan.sequence
        seconds = json.loads((path / "summary.json").read_text())["step_seconds"]
        group = f"{plan.model.name} {workload.micro} x {workload.sequence}"
        row = Row(row_id=path.name, group=group, source="runs", stack=CPU_STACK, device=device, workload=workload,
                  layout=Layout(compiled=plan.compile), text={})  # fmt: skip
        rows.append((row, math.log(tokens / seconds / workload.ranks)))
    return Known([row for row, _ in rows], np.array([value for _, value in rows]), np.ones(len(rows)))


def fit(
    known: Known, start: Calibration | None = None, iterations: int = 12, freedom: dict[str, float] | None = None
) -> Calibration:
    """Return the calibration that explains the rows best: Gauss-Newton on logarithms, Huber, Gaussian priors."""
    prior = Calibration() if freedom is None else start or Calibration()
    now = start or prior
    names, keys = list(freedom or FREEDOM), sorted({key for row in known.rows for key in _keys(row)})
    if freedom:
        keys = []  # one machine and one trainer
    freedom = freedom or FREEDOM
    place = {key: index for index, key in enumerate(keys)}
    indicator = np.zeros((len(known.rows), len(keys)))
    for index, row in enumerate(known.rows):
        for key in _keys(row) if keys else ():
            indicator[index, place[key]] = -1.0  # a factor multiplies seconds
    precision = np.array([freedom[name] ** -2 for name in names] + [_freedom(key) ** -2 for key in keys])
    for _ in range(iterations):
        base = _predictions(known.rows, now)
        slopes = np.empty((len(known.rows), len(names)))
        for column, name in enumerate(names):
            nudged = now.replace(**{name: getattr(now, name) * math.exp(0.01)})
            slopes[:, column] = (_predictions(known.rows, nudged) - base) / 0.01
        jacobian = np.hstack([slopes, indicator])
        residual = known.measured - base
        pull = known.weights * np.minimum(1.0, HUBER / np.maximum(np.abs(residual), 1e-9)) / HUBER**2
        moved = [math.log(getattr(now, name) / getattr(prior, name)) for name in names]
        moved += [now.factors.get(key, 0.0) for key in keys]
        normal = jacobian.T @ (pull[:, None] * jacobian) + np.diag(precision)
        step = np.linalg.solve(normal, jacobian.T @ (pull * residual) - precision * np.array(moved))
        step = np.clip(step, -0.5, 0.5)
        changes = {name: getattr(now, name) * math.exp(step[i]) for i, name in enumerate(names)}
        factors = {key: now.factors.get(key, 0.0) + float(step[len(names) + i]) for i, key in enumerate(keys)}
        now = dataclasses.replace(now, **changes, factors=factors)
        if np.max(np.abs(step)) < 1e-4:
            break
    return now


def _predictions(chosen: Sequence[Row], known: Calibration) -> np.ndarray:
    return np.array([predict(row, known) for row in chosen], dtype=float)


def _keys(row: Row) -> tuple[str, ...]:
    assert row.device is not None
    return factor_keys(row.stack, row.device.name, row.layout.arithmetic or row.workload.precision)


def _freedom(key: str) -> float:
    return FACTOR_FREEDOM[" ".join(part.partition(":")[0] for part in key.split(" "))]


def left_out(
    known: Known,
    by: Callable[[Row], str],
    start: Calibration,
    iterations: int = 2,
    freedom: dict[str, float] | None = None,
) -> np.ndarray:
    """Return every row's prediction by a calibration that has not seen what `by` says it belongs to."""
    predicted = np.empty(len(known.rows))
    names = [by(row) for row in known.rows]
    for name in sorted(set(names)):
        inside = [is_inside == name for is_inside in names]
        seen = known.subset([not is_inside for is_inside in inside])
        without = fit(seen, dataclasses.replace(start, factors=_without(start, seen)), iterations, freedom)
        predicted[np.array(inside)] = _predictions(
            [row for row, is_inside in zip(known.rows, inside, strict=True) if is_inside], without
        )
    return predicted


def _without(start: Calibration, seen: Known) -> dict[str, float]:
    keys = {key for row in seen.rows for key in _keys(row)}
    return {key: value for key, value in start.factors.items() if key in keys}


def write(known: Calibration, spread: tuple[float, float], count: int) -> str:
    """Return calibration.toml."""
    lines = [
        "# Fitted by `python benchmarks/planner_score.py --rows FILE... --fit`; what each is stands in calibration.py,",
        f"# on what it was fitted and with which error in docs/planner.md. {count} published runs.",
        "",
        "[constants]",
    ]
    lines += [f"{name} = {getattr(known, name):.4g}" for name in FREEDOM]
    lines += [f"spread_seen = {spread[0]:.3g}", f"spread_unseen = {spread[1]:.3g}", "", "[factors]"]
    lines += [f'"{key}" = {value:.4f}' for key, value in sorted(known.factors.items()) if abs(value) >= 5e-5]
    return "\n".join(lines) + "\n"


def _ninth(predicted: np.ndarray, known: Known) -> float:
    wrong = sorted(abs(a - b) for a, b in zip(predicted, known.measured, strict=True))
    return math.exp(wrong[math.ceil(0.9 * len(wrong)) - 1])


def _runs(paths: Sequence[Path], write_it: bool) -> int:
    device = hardware.of(None, "", "cpu", hardware.read_own())
    if device is None:
        sys.exit("this CPU was not measured: halfstep doctor --measure")
    known = load_runs(paths, device)
    start = Calibration(**{**tomllib.loads(TARGET.read_text(encoding="utf-8"))["constants"], "link": 1.0})
    fitted = fit(known, start, freedom=CPU_FREEDOM)
    predicted = _predictions(known.rows, fitted)
    apart = left_out(known, lambda row: row.group, start, 12, CPU_FREEDOM)
    for row, near, far, seen in zip(known.rows, predicted, apart, known.measured, strict=True):
        both = (f"{100 * math.expm1(seen - value):+6.1f} %" for value in (near, far))
        print(f"  {row.row_id:<48} {' '.join(both)}")
    print("seconds predicted against measured; second column: model and batch left out")
    print(f"  nothing left out {errors(predicted, known, [True] * len(known.rows))}")
    print(f"  one left out     {errors(apart, known, [True] * len(known.rows))}")
    lines = ["[cpu]", *(f"{name} = {getattr(fitted, name):.4g}" for name in CPU_FREEDOM), "link = 1.0"]
    lines.append(f"spread_unseen = {_ninth(apart, known):.3g}")
    print("\n".join(lines))
    if write_it:
        shipped_text = TARGET.read_text(encoding="utf-8").partition("\n[cpu]")[0]
        TARGET.write_text(shipped_text.rstrip() + "\n\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return 0


def main() -> int:
    """Score, and with --fit write the calibration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=Path, metavar="FILE")
    parser.add_argument(
        "--runs", nargs="+", type=Path, metavar="RUN", help="runs of CPU ranks: fit their own constants"
    )
    parser.add_argument("--fit", action="store_true", help="write launcher/plan/calibration.toml")
    parser.add_argument("--quick", action="store_true", help="leave nothing out: the error on what was fitted")
    arguments = parser.parse_args()
    if arguments.runs:
        return _runs(arguments.runs, arguments.fit)
    if not arguments.rows:
        parser.error("give --rows FILE... or --runs RUN...")
    print("\n".join(memory_report(arguments.rows)))
    known = load(arguments.rows)
    fitted = fit(known)
    print(f"{len(known.rows)} rows of {len({row.group for row in known.rows})} groups")
    print("\n".join(f"  {name:<16} {getattr(fitted, name):.4g}" for name in FREEDOM))
    print("\n".join(report(_predictions(known.rows, fitted), known, "nothing left out")))
    print("\n".join(scaling(fitted)))
    if arguments.quick:
        return 0
    by_group = left_out(known, lambda row: row.group, fitted)
    print("\n".join(report(by_group, known, "one group (source, model, device) left out")))
    by_source = left_out(known, lambda row: row.source, fitted)
    print("\n".join(report(by_source, known, "one source left out")))
    if arguments.fit:
        spread = (_ninth(by_group, known), _ninth(by_source, known))
        cpu = TARGET.read_text(encoding="utf-8").partition("\n[cpu]")[2]  # fitted to runs, not to rows
        text = write(fitted, spread, len(known.rows)) + (f"\n[cpu]{cpu}" if cpu else "")
        TARGET.write_text(text, encoding="utf-8")
        print(f"written: {TARGET}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Show forecasts of time to a person: a plan's step and run, and what a search found."""

from collections.abc import Sequence
from typing import Any

from halfstep.launcher.forecast.search import Candidate, frontier

_GIB = 2**30
_BAR = 24
_NAMES = {
    "matmul": "matrix products",
    "attention": "attention",
    "memory_bound": "memory-bound kernels",
    "host_bound": "waiting for the host",
    "tensor_parallel": "sending inside layers",
    "pipeline": "pipeline",
    "communication": "gradients and weights",
    "optimizer": "optimizer step",
}


def lines(forecast: dict[str, Any], *, answers: bool = False) -> list[str]:
    """Return a plan's `time` as lines: a step by term with bars, then the run, of which it says what is not counted.

    `answers`: whether tasks are answered at evaluations.
    """
    if not forecast:
        return []
    if forecast["unknown"]:
        return [f"time         not known: {forecast['unknown']}"]
    step = forecast["step_seconds"]
    text = [
        f"time         {seconds(step)} a step "
        f"({seconds(forecast['low_seconds'])} to {seconds(forecast['high_seconds'])}), "
        f"{forecast['tokens_per_second']:,.0f} tokens/s, {forecast['tokens_per_second_per_gpu']:,.0f} a device",
        f"             MFU {100 * forecast['mfu']:.1f} % ({forecast['flops_convention']}: 6 (N - V h) + 6 L h s); "
        f"{forecast['communication_bytes_per_rank'] / 1e9:,.2f} GB sent a rank and step, "
        f"{seconds(forecast['hidden_communication_seconds'])} of that hidden",
    ]
    for name, value in forecast["terms"].items():
        share = value / step if step else 0.0
        if share >= 0.0005:
            bar = "#" * round(_BAR * share)
            text.append(f"               {_NAMES[name]:<22} {seconds(value):>10} {100 * share:5.1f} %  {bar}")
    text.append(f"             {_run(forecast, answers)}")
    return text


def seconds(value: float) -> str:
    """Return a duration as a person says it."""
    if value < 0.9995:
        return f"{1000 * value:.3g} ms"
    if value < 300:
        return f"{value:.3g} s"
    return f"{value / 60:.0f} min" if value < 3 * 3600 else f"{value / 3600:.1f} h"


def _run(forecast: dict[str, Any], answers: bool) -> str:
    length = f"{forecast['days']:.1f} days" if forecast["hours"] >= 48 else f"{forecast['hours']:.2f} hours"
    missing = [
        *(["saving"] if forecast["checkpoint_seconds"] is None else []),
        *(["evaluation, which needs data="] if forecast["evaluation_seconds"] is None else []),
        *(["answers to tasks"] if answers else []),
    ]
    unsaid = f" without the time of {' and of '.join(missing)}" if missing else ""
    parts = [f"whole run {length}{unsaid}, {forecast['device_hours']:,.1f} device-hours"]
    if forecast["jobs"] is not None:
        limit = forecast["time_limit_seconds"] / 3600
        parts.append(f"{forecast['jobs']:,} job{'s' * (forecast['jobs'] != 1)} of {limit:g} h")
    if forecast["price"] is not None:
        parts.append(f"costs {forecast['price']:,.2f} at {forecast['price_per_device_hour']:g} a device-hour")
    return ", ".join(parts)


def candidates(tried: Sequence[Candidate], shown: int = 12) -> list[str]:
    """Return a search as a table of its fastest, those on the frontier marked, and the frontier's own rows."""
    best = frontier(tried)
    listed = [candidate for candidate in tried if candidate.fits][:shown]
    text = ["  nodes ranks zero offload        micro x acc  checkpointing    step  tokens/s   MFU    memory"]
    text += [_candidate(candidate, candidate in best) for candidate in listed]
    rest = [candidate for candidate in best if candidate not in listed]
    if rest:
        text += ["further down the frontier: less memory or fewer devices for more time"]
        text += [_candidate(candidate, True) for candidate in rest[:shown]]
    if rest[shown:]:
        text += [f"  and {len(rest[shown:])} more, all in --json"]
    return text


def _candidate(candidate: Candidate, best: bool) -> str:
    how = candidate.workload
    mark, checkpointing = "*" if best else " ", "yes" if how.activation_checkpointing else "no"
    return (
        f"{mark} {candidate.nodes:5d} {how.ranks:5d} {how.zero:4d} {candidate.offload:<13} {how.micro:6d} x "
        f"{how.accumulation:<5d} {checkpointing:<13} {seconds(candidate.step_seconds):>8} "
        f"{candidate.tokens_per_second:9,.0f} {100 * candidate.mfu:5.1f} {candidate.peak_bytes / _GIB:7.2f} GiB"
    )

"""What may be concluded from a study: differences with their noise, and which cell to use.

Cells share seeds, and with them initial weights and data, so a cell is compared with the reference seed by seed. Two
bands matter. The noise band is the 95 % confidence interval of that paired difference: a difference beyond it is called
real (of equal cells, one in twenty). The seeds' band says how much the reference itself moves when only the seed
changes: a loss within it costs no quality that another seed would not cost as well.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from halfstep.launcher.study.collect import Result, name_of
from halfstep.launcher.study.noise import Noise, between_seeds

# Rounding alone moves a loss by this share, relative; what the parity gate tolerates between equal algorithms
# (parity/distance.py): below it no difference is called real, however regular it is.
_ROUNDING = {"fp32": 1e-5}


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One cell, all its seeds together."""

    values: dict[str, str]
    results: tuple[Result, ...]
    quality: float | None = None
    """Mean over the seeds that are done, nats per token."""
    band: float | None = None
    """Two standard deviations over the seeds; None with one seed."""
    difference: float | None = None
    """Mean over the seeds that both have, this cell less the reference."""
    noise: float | None = None
    """What the difference has to exceed; None where it cannot be said."""
    noisy: bool = False
    """Whether its own scatter is far beyond the others'."""
    verdict: str = "not judged"
    """`reference`, `identical`, `within noise`, `real`, or `not judged`."""
    tokens_per_second: float | None = None
    """Median over the seeds."""
    speeds: tuple[float, ...] = ()
    """Tokens per second with each seed."""
    step_seconds: float | None = None
    step_spread: float | None = None
    """Distance of the quartiles over the median."""
    peak_memory_bytes: float | None = None
    wall_seconds: float | None = None
    device_seconds_per_token: float | None = None

    @property
    def name(self) -> str:
        """Return how it is called."""
        return name_of(self.values)

    @property
    def done(self) -> bool:
        """Whether all its seeds ran to their end."""
        return all(result.done for result in self.results)

    @property
    def proved(self) -> bool | None:
        """Whether the gate holds for it wherever it ran; None where that is not known of every run."""
        verdicts = [result.proved for result in self.results]
        return False if False in verdicts else None if None in verdicts else True


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """All of a study."""

    cells: tuple[Summary, ...]
    reference: Summary
    seeds: int
    freedom: int
    """The fewest degrees of freedom that a noise band rests on; 0 where there is none."""
    compared: int
    """How many cells have a noise band."""
    speed_noise: dict[str, Noise]
    """By cell, of the logarithm of its speed; empty with one seed."""
    usable: tuple[Summary, ...]
    """Done, proved, and of a quality that the reference's own seeds would also give."""
    fastest: Summary | None
    smallest: Summary | None
    cheapest: Summary | None
    frontier: tuple[Summary, ...]
    """Usable cells that no other usable one beats in both speed and memory; fastest first."""

    @property
    def best(self) -> Summary | None:
        """Return the cell to use."""
        return self.fastest

    def ratio(self, cell: Summary, other: Summary) -> tuple[float, float, float] | None:
        """Return how many times as fast a cell is as another, and the 95 % confidence interval of that.

        None where a speed is missing; with one seed, whose noise nobody knows, the interval is the ratio itself.
        """
        if not cell.speeds or not other.speeds:
            return None
        apart = statistics.fmean(map(math.log, cell.speeds)) - statistics.fmean(map(math.log, other.speeds))
        known = [self.speed_noise[side.name] for side in (cell, other) if side.name in self.speed_noise]
        widest = max((noise.interval(1) for noise in known), default=0.0)
        half = widest * math.sqrt(1 / len(cell.speeds) + 1 / len(other.speeds))
        return math.exp(apart), math.exp(apart - half), math.exp(apart + half)

    @property
    def as_fast(self) -> tuple[Summary, ...]:
        """Return the usable cells whose speed cannot be told from the fastest one's."""
        if self.fastest is None or not self.speed_noise:
            return ()
        cells = []
        for cell in self.usable:
            ratio = self.ratio(cell, self.fastest)
            if cell is not self.fastest and ratio is not None and ratio[2] >= 1:
                cells.append(cell)
        return tuple(cells)


def judge(results: Sequence[Result], reference: dict[str, str]) -> Verdict:
    """Summarise every cell, compare it with the reference, and choose."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.name, []).append(result)
    theirs = groups[name_of(reference)]
    paired = {name: differences(own, theirs, lambda result: result.quality) for name, own in groups.items()}
    noise = by_precision(groups, {name: some for name, some in paired.items() if name != name_of(reference)})
    cells = tuple(_summary(own, theirs, paired[name], noise.get(name)) for name, own in groups.items())
    (chosen,) = [cell for cell in cells if cell.values == reference]
    usable = tuple(cell for cell in cells if _usable(cell, chosen))
    compared = [noise[cell.name] for cell in cells if cell.noise and cell.name in noise]
    return Verdict(
        cells=cells,
        reference=chosen,
        seeds=len({result.seed for result in results}),
        freedom=min((cell.freedom for cell in compared), default=0),
        compared=len(compared),
        speed_noise=between_seeds({cell.name: [math.log(speed) for speed in cell.speeds] for cell in cells}),
        usable=usable,
        fastest=_least(usable, lambda cell: -cell.tokens_per_second),
        smallest=_least(usable, lambda cell: cell.peak_memory_bytes),
        cheapest=_least(usable, lambda cell: cell.device_seconds_per_token),
        frontier=_frontier(usable),
    )


def differences(
    own: Sequence[Result], theirs: Sequence[Result], value_of: Callable[[Result], float | None]
) -> list[float]:
    """Return by how much a cell's value differs from the reference's, seed by seed that both have."""
    reference = {result.seed: value_of(result) for result in theirs if result.done}
    return [
        value - there
        for result in own
        if result.done and (value := value_of(result)) is not None and (there := reference.get(result.seed)) is not None
    ]


def by_precision(groups: dict[str, list[Result]], paired: dict[str, list[float]]) -> dict[str, Noise]:
    """Return the noise of every cell's difference; cells of one precision round alike and are pooled.

    A cell that does the same arithmetic as the reference differs by nothing, and tells nothing of noise.
    """
    noise: dict[str, Noise] = {}
    for precision in {own[0].precision for own in groups.values()}:
        alike = {name: some for name, some in paired.items() if any(some) and groups[name][0].precision == precision}
        noise |= between_seeds(alike)
    return noise


def _summary(own: Sequence[Result], theirs: Sequence[Result], paired: Sequence[float], noise: Noise | None) -> Summary:
    done = [result for result in own if result.done]
    qualities = [result.quality for result in done if result.quality is not None]
    middle = _median([result.step_seconds for result in done])
    spans = [
        result.step_seconds_high - result.step_seconds_low
        for result in done
        if result.step_seconds_high and result.step_seconds_low
    ]
    speed = _median([result.tokens_per_second for result in done])
    devices = max((result.devices or 1 for result in done), default=1)
    about: dict[str, Any] = {
        "values": own[0].values,
        "results": tuple(own),
        "quality": statistics.fmean(qualities) if qualities else None,
        "band": 2 * statistics.stdev(qualities) if len(qualities) > 1 else None,
        "tokens_per_second": speed,
        "speeds": tuple(result.tokens_per_second for result in done if result.tokens_per_second),
        "step_seconds": middle,
        "step_spread": statistics.median(spans) / middle if spans and middle else None,
        "peak_memory_bytes": _median([result.peak_memory_bytes for result in done]),
        "wall_seconds": _median([result.wall_seconds for result in done]),
        "device_seconds_per_token": devices / speed if speed else None,
    }
    if own[0].values == theirs[0].values:
        return Summary(**about, verdict="reference")
    if not paired:
        return Summary(**about)
    difference = statistics.fmean(paired)
    if not any(paired):
        return Summary(**about, difference=0.0, noise=0.0, verdict="identical")
    about["difference"] = difference
    if noise is None:
        return Summary(**about)  # one seed has no noise that could be known
    band = max(noise.interval(len(paired)), _rounding([*own, *theirs]) * abs(about["quality"]))
    verdict = "real" if abs(difference) > band else "within noise"
    return Summary(**about, noise=band, noisy=noise.own, verdict=verdict)


def _usable(cell: Summary, reference: Summary) -> bool:
    """Tell whether a cell may be recommended: it is done, proved, and no worse than the reference's own noise."""
    if not cell.done or cell.proved is not True or cell.tokens_per_second is None or cell.quality is None:
        return False
    if cell.verdict in ("reference", "identical"):
        return True
    if cell.difference is None:
        return False
    least = _rounding([*cell.results, *reference.results]) * abs(cell.quality)
    # A cell's own scatter is no licence to be worse.
    margin = 0.0 if cell.noisy else cell.noise or 0.0
    return cell.difference <= max(margin, reference.band or 0.0, least)


def _rounding(results: Sequence[Result]) -> float:
    return max(_ROUNDING.get(result.precision or "", 3e-4) for result in results)


def _least(cells: Sequence[Summary], key: Any) -> Summary | None:
    known = [cell for cell in cells if cell.tokens_per_second and cell.peak_memory_bytes]
    return min(known, key=key, default=None)


def _frontier(cells: Sequence[Summary]) -> tuple[Summary, ...]:
    frontier, least = [], math.inf
    known = [cell for cell in cells if cell.tokens_per_second and cell.peak_memory_bytes]
    for cell in sorted(known, key=lambda cell: (-(cell.tokens_per_second or 0.0), cell.peak_memory_bytes or 0.0)):
        if (cell.peak_memory_bytes or math.inf) < least:
            frontier.append(cell)
            least = cell.peak_memory_bytes or math.inf
    return tuple(frontier)


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None

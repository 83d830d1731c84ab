"""What the parity gate says of a run here without being run again: proved, another model, or not known, and why."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from halfstep.launcher import topology
from halfstep.launcher.parity import verdict
from halfstep.launcher.parity.cell import question_of
from halfstep.launcher.plan.plan import Plan

_ANOTHER = "the parity gate found that it trains another model"


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What is known of a run's cell on this hardware and with these versions."""

    proved: bool | None
    """None where the gate was not run for it, or does not know all of it."""
    reason: str
    """Why it is not proved; empty where it is."""
    cases: int
    """How many have to hold."""


def standing(plan: Plan, fresh: Iterable[Mapping[str, Any]] = ()) -> Standing:
    """Return how a plan's cell stands; `fresh` are results that count beside the stored ones."""
    asked = question_of(plan)
    proved, reason = None, ""
    if not plan.repairs_on:
        proved, reason = False, "stage 0 in half precision without its repairs (numerics.repairs=false)"
    elif asked.unknown:
        reason = f"the parity gate does not know {', '.join(asked.unknown)}"
    else:
        here, cases, results = topology.describe(1, 1), [vars(case) for case in asked.cases], list(fresh)
        proved = verdict.proved(here, cases, results)
        if proved is None:
            reason = "the parity gate was not run for it here"
        elif not proved:
            ended = verdict.error(here, cases, results)
            reason = f"the parity gate could not run it: {ended}" if ended else _ANOTHER
    return Standing(proved=proved, reason=reason, cases=len(asked.cases))

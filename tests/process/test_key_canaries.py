"""Canaries of the ledger of keys: what it says does nothing does nothing, on real engines of every stage.

Run by itself, this file is the one rank that trains: a line for each training, with its losses to the last bit, and one
for what each canary of `ledger_canaries.py` saw. A newer DeepSpeed that begins to read a key, or mends one, changes a
line.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from process import synthetic
from process.ledger_canaries import CHANGED, FATAL, GPU_ONLY, pair
from ranks import printed_alone

from halfstep.launcher.parity import cases
from halfstep.launcher.plan.ds import effects

pytestmark = pytest.mark.process
STAGES = (0, 1, 2, 3)
NUMERICS = {
    "communication_data_type": (2, "bf16", "fp16"),
    "data_types.grad_accum_dtype": (2, "bf16", "bf16"),
    "optimizer.params.eps": (1, "fp32", 1e-3),
}
"""Keys of which one rank shows that they change what is trained: a stage, a precision and a value."""
_CPU_ADAM = (
    "the gate has bf16's, which is read alike; it needs DeepSpeed's own CPU Adam, a minute's work for a compiler"
)
_GPU = "its quantiser has no implementation for CPU ranks"
UNPROVED = {
    "fp16.fp16_master_weights_and_grads": _CPU_ADAM,
    "zero_optimization.zero_quantized_gradients": _GPU,
    "zero_optimization.zero_quantized_nontrainable_weights": _GPU,
    "zero_optimization.zero_quantized_weights": _GPU,
}
"""Keys that change what is trained and have no canary, each with the reason."""
UNTRIED = ("expert_parallel.", "zero_optimization.zenflow", "autotuning.")
"""Sections that are read as a whole where one of their keys is set, and whose switch a rule refuses."""


def other_value(key: str) -> Any:
    """Return a legal value of a key that is not its default, None where the table of keys does not tell one."""
    from halfstep.launcher.plan.ds import dskeys

    entry = dskeys.KEYS[key]
    default, kind = entry.get("default"), entry["type"]
    if kind == "bool":
        return not default
    if kind in ("int", "float"):
        least = entry.get("minimum", entry.get("above", 0))
        return type(default or 1)(max(default or 0, least) + 2)
    return "other" if kind == "str" else None


def inert_keys() -> dict[str, Any]:
    """Return the keys that do nothing in any run with values that are not their defaults, as far as they agree."""
    from halfstep.launcher.config.dotted import flatten, unflatten
    from halfstep.launcher.plan.ds import dskeys

    chosen: dict[str, Any] = {}
    composed = flatten(plan_of(3, "bf16", {}).deepspeed)
    for key, row in effects.rows().items():
        value = other_value(key)
        if value is None or row["effect"] != effects.INERT or row.get("cases") or key.startswith(UNTRIED):
            continue
        if not dskeys.problems(unflatten({**composed, **chosen, key: value})):
            chosen[key] = value
    return chosen


def plan_of(zero: int, precision: str, keys: dict[str, Any]) -> Any:
    asked_for = [f"ds.{key}={json.dumps(value)}" for key, value in keys.items()]
    return synthetic.plan_of("model.layers=1", "steps=3", f"zero={zero}", f"precision={precision}", *asked_for)


def losses(plan: Any) -> dict[str, Any]:
    from halfstep.launcher.parity import trial

    series = trial.on_deepspeed(plan, 0)
    return {"loss": [value.hex() if value else None for value in series.loss], "norm": series.grad_norm}


def rank_main() -> None:
    from halfstep.launcher import topology

    rank = topology.from_environment()
    topology.prepare_environment(rank)
    from halfstep.launcher.engine.ranks import distributed

    distributed.join(rank, plan_of(1, "fp32", {}), torch.distributed.HashStore())
    inert = inert_keys()
    print("\n" + json.dumps(["keys", inert]), flush=True)
    for zero in STAGES:
        for name, keys in (("plain", {}), ("inert", inert)):
            print("\n" + json.dumps([f"{name} {zero}", losses(plan_of(zero, "bf16", keys))]), flush=True)
    for key, (zero, precision, value) in NUMERICS.items():
        for name, keys in (("without", {}), ("with", {key: value})):
            print("\n" + json.dumps([f"{name} {key}", losses(plan_of(zero, precision, keys))]), flush=True)
    for key, (look, _) in FATAL.items():
        print("\n" + json.dumps([f"fatal {key}", look()]), flush=True)
    for key, looks in CHANGED.items():
        print("\n" + json.dumps([f"changed {key}", pair(looks)]), flush=True)
    distributed.leave()


@pytest.fixture(scope="module")
def seen(scratch: Path) -> dict[str, Any]:
    return dict(json.loads(line) for line in printed_alone(__file__, scratch) if line.startswith("["))


@pytest.mark.parametrize("zero", STAGES)
def test_all_keys_that_do_nothing_together_do_nothing(seen: dict[str, Any], zero: int) -> None:
    assert len(seen["keys"]) > 60
    assert seen[f"inert {zero}"] == seen[f"plain {zero}"]


@pytest.mark.parametrize("key", NUMERICS)
def test_a_key_that_changes_what_is_trained_does(seen: dict[str, Any], key: str) -> None:
    assert seen[f"with {key}"] != seen[f"without {key}"]


@pytest.mark.parametrize("key", FATAL)
def test_a_key_that_ends_or_breaks_a_run_still_does(seen: dict[str, Any], key: str) -> None:
    assert re.search(FATAL[key][1], seen[f"fatal {key}"], re.DOTALL), seen[f"fatal {key}"]


@pytest.mark.parametrize("key", CHANGED)
def test_a_key_that_changes_what_is_computed_does(seen: dict[str, Any], key: str) -> None:
    without, with_it = seen[f"changed {key}"]
    assert without != with_it, without


def test_every_row_that_breaks_a_run_has_a_canary_or_a_reason_why_not() -> None:
    fatal = {key for key, row in effects.rows().items() if row["effect"] == effects.FATAL}
    assert set(FATAL) | set(GPU_ONLY) == fatal
    assert all(effects.rows()[key]["gpu_only"] for key in GPU_ONLY)


def test_every_row_that_changes_numbers_has_a_canary_a_case_of_the_gate_or_a_reason_why_not() -> None:
    numerics = {key for key, row in effects.rows().items() if row["effect"] == effects.NUMERICS}
    gate = {word.removeprefix("ds.").partition("=")[0] for case in cases.conditional_cases() for word in case.keys}
    if {case.optimizer for case in cases.conditional_cases()} - {"adamw", "sgd"}:
        gate.add("optimizer.type")
    canaries = {*map(effects.row_path, NUMERICS), *CHANGED}
    assert canaries | (gate & numerics) | set(UNPROVED) == numerics
    assert not (canaries | gate) & set(UNPROVED)


if __name__ == "__main__":
    rank_main()
    os._exit(0)  # as in launcher/train.py: taking Python down beside gloo's threads can abort

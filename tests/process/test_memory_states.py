"""What two real DeepSpeed ranks hold and send in every cell is what the planner says, byte for byte.

Run by torchrun, this file is the program of a rank: it writes what it held to rank-N.json in the folder it is given.
"""

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import reported_by_two

from halfstep.launcher.forecast import communication, states
from halfstep.launcher.forecast.parallelism import Layout
from halfstep.launcher.plan import estimate
from halfstep.launcher.plan.plan import Plan

pytestmark = pytest.mark.process
ROOT = Path(__file__).resolve().parents[2]
FAMILIES = ("gpt2-nano", "llama-nano")
CELLS = [(zero, precision) for precision in ("fp32", "fp16", "bf16") for zero in range(4)]
CASES = [
    (family, zero, precision, accumulation)
    for family in FAMILIES
    for zero, precision in CELLS
    for accumulation in (1, 2)
]
OPTIMIZERS = [
    (1, "bf16", ("ds.optimizer.type=Muon", "ds.optimizer.params.torch_adam=true", "optimizer.clip=0")),
    (0, "bf16", ("ds.optimizer.type=Muon", "ds.optimizer.params.torch_adam=true")),
    (0, "fp32", ("ds.optimizer.type=Adagrad",)),
    (2, "bf16", ("ds.optimizer.type=Adadelta",)),
    (3, "bf16", ("ds.optimizer.type=Adafactor",)),
    (1, "fp32", ("ds.optimizer.type=Adamax",)),
    (2, "fp16", ("ds.optimizer.type=ASGD",)),
    (3, "fp32", ("ds.optimizer.type=NAdam",)),
    (1, "bf16", ("ds.optimizer.type=RAdam",)),
    (2, "fp32", ("ds.optimizer.type=Rprop",)),
    (3, "fp16", ("ds.optimizer.type=RMSprop", "ds.optimizer.params.centered=true", "ds.optimizer.params.momentum=0.9")),
    (2, "bf16", ("optimizer.kind=sgd", "optimizer.momentum=0.9")),
    (2, "bf16", ("ds.optimizer.params.torch_adam=true", "ds.optimizer.params.amsgrad=true")),
]
"""Every other optimizer of the table that CPU ranks can make, each in one cell."""
LORA = [("gpt2-nano", zero, precision, 2) for zero, precision in CELLS] + [("llama-nano", 3, "bf16", 1)]
"""The cells in which adapters are trained."""
SMALL = 64 * 1024
"""Bytes of what is no model state: step counters, rotary frequencies, scalars."""


def rank_main(folder: Path) -> None:
    """Hold every case's engine once, in one start of the ranks."""
    from halfstep.launcher.engine.ranks import distributed
    from halfstep.launcher.engine.ranks.places import file_store
    from halfstep.launcher.topology import from_environment

    rank = from_environment()
    plans = [Plan.from_dict(tree) for tree in json.loads((folder / "plans.json").read_text())]
    distributed.join(rank, plans[0], file_store(folder / "store", rank))
    distributed.quiet_deepspeed(folder / f"log-{rank.rank}")
    measured = [held(plan) for plan in plans]
    (folder / f"rank-{rank.rank}.json").write_text(json.dumps(measured))
    distributed.leave()


def held(plan: Plan) -> dict[str, int]:
    """Return the bytes of tensors that live between micro-steps, before the step and after it."""
    import torch

    from halfstep.launcher.engine.build import build, learn_gathering_anew
    from halfstep.launcher.engine.ranks.traffic import Traffic

    gc.collect()
    gc.freeze()  # what is there already is not looked at again: walking over all that was imported takes long
    before = _bytes()
    engine, repairs = build(plan)
    seen = {"built": _bytes() - before}
    engine.eval()
    with torch.no_grad():  # as every run does; stage 3 would send more from then on (docs/deepspeed.md, 9)
        engine(input_ids=torch.zeros(1, plan.sequence, dtype=torch.long))
    learn_gathering_anew(engine)
    engine.train()
    _train(engine, plan, repairs, lambda moment: seen.update({moment: _bytes() - before}))
    seen["at rest"] = _bytes() - before
    _train(engine, plan, repairs, lambda moment: None)
    with Traffic() as sent:
        _train(engine, plan, repairs, lambda moment: None)
    seen["sent"] = sent.bytes
    engine.destroy()
    del engine
    gc.collect()
    return seen


def _train(engine: Any, plan: Plan, repairs: Any, look: Callable[[str], None]) -> None:
    """Train one optimizer step."""
    import torch

    from halfstep.models.loss import next_token_loss

    tokens = torch.arange(plan.sequence + 1)[None] % plan.model.vocabulary
    for micro_step in range(1, plan.batch.accumulation + 1):
        loss = next_token_loss(engine(input_ids=tokens[:, :-1]).logits, tokens[:, 1:])
        engine.backward(loss)
        del loss
        if repairs.sums:
            repairs.sums.collect()
        last = micro_step == plan.batch.accumulation
        look("before the step" if last else "between micro-steps")
        if last and repairs.fp32_gradients:
            engine.optimizer.loss_scale_config.cur_scale = 1.0
        engine.step()
        if last and repairs.sums:
            repairs.sums.end()


def _bytes() -> int:
    """Return the bytes of all tensors; gloo's threads let go of what they have reduced a moment later."""
    seen = []
    for _ in range(3):
        seen.append(_bytes_now())
        time.sleep(0.03)
    return min(seen)


def _bytes_now() -> int:
    import torch

    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            for tensor in (
                thing,
                thing.grad if thing.is_leaf else None,
            ):  # a gradient nobody looked at is no Python object
                if tensor is not None and tensor.device.type == "cpu":
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, scratch: Path) -> Callable[..., Any]:
    cache: dict[str, Any] = {}

    def measured(plans: list[Plan]) -> list[list[dict[str, int]]]:
        if "found" not in cache:
            folder = tmp_path_factory.mktemp("states")
            (folder / "plans.json").write_text(json.dumps([plan.to_dict() for plan in plans]))
            # What Muon compiles keeps no bytes, and takes long.
            cache["found"] = reported_by_two(__file__, folder, scratch, TORCHDYNAMO_DISABLE="1")
        return cache["found"]

    return measured


def test_every_byte_of_model_state_is_predicted(ranks: Callable[..., Any], plan: Callable[..., Plan]) -> None:
    plans = _plans(plan)
    wrong = []
    for rank, measured in enumerate(ranks(plans)):
        for case, made, seen in zip(CASES, plans, measured, strict=False):
            expected = _expected(made, rank)
            for moment in seen.keys() & expected.keys():
                if not 0 <= seen[moment] - expected[moment] < SMALL:
                    wrong.append((rank, case, moment, seen[moment], expected[moment], seen[moment] - expected[moment]))
    assert not wrong, "\n".join(map(str, wrong))


def test_every_byte_that_an_optimizer_keeps_is_predicted(ranks: Callable[..., Any], plan: Callable[..., Plan]) -> None:
    plans = _plans(plan)
    wrong = []
    for rank, measured in enumerate(ranks(plans)):
        for case, made, seen in list(zip([*CASES, *OPTIMIZERS], plans, measured, strict=False))[len(CASES) :]:
            assert states.states(estimate.workload_of(made), rank).moments > SMALL, "the states are what is looked at"
            more = seen["at rest"] - _expected(made, rank)["at rest"]
            if not 0 <= more < SMALL:
                wrong.append((rank, case, more))
    assert not wrong, "\n".join(map(str, wrong))


def test_every_byte_of_a_run_that_trains_adapters_is_predicted(
    ranks: Callable[..., Any], plan: Callable[..., Plan]
) -> None:
    plans = _plans(plan)[-len(LORA) :]
    wrong = []
    for rank, measured in enumerate(ranks(_plans(plan))):
        for case, made, seen in zip(LORA, plans, measured[-len(LORA) :], strict=True):
            expected = _expected(made, rank)
            sent = communication.volume(estimate.workload_of(made), Layout()).total_bytes
            for moment in seen.keys() & expected.keys():
                if not 0 <= seen[moment] - expected[moment] < SMALL:
                    wrong.append((rank, case, moment, seen[moment], expected[moment], seen[moment] - expected[moment]))
            if not abs(seen["sent"] - sent) <= (64 if made.zero < 3 else 0.01 * sent):
                wrong.append((rank, case, "sent", seen["sent"], sent, seen["sent"] - sent))
    assert not wrong, "\n".join(map(str, wrong))


def test_every_byte_that_a_step_sends_is_predicted(ranks: Callable[..., Any], plan: Callable[..., Plan]) -> None:
    plans = _plans(plan)
    wrong = []
    for rank, measured in enumerate(ranks(plans)):
        for case, made, seen in zip(CASES, plans, measured, strict=False):
            expected = communication.volume(estimate.workload_of(made), Layout()).total_bytes
            more = seen["sent"] - expected
            allowed = 64 if made.zero < 3 else 0.01 * expected  # norms and flags; padding and small tensors that stay
            if not abs(more) <= allowed or (made.zero < 3 and more < 0):
                wrong.append((rank, case, seen["sent"], expected, more, made.model.parameters))
    assert not wrong, "\n".join(map(str, wrong))


def _plans(plan: Callable[..., Plan]) -> list[Plan]:
    made = []
    for family, zero, precision, accumulation in CASES:
        arguments = [f"model={family}", "batch.micro=1", f"batch.global={2 * accumulation}", "sequence=8"]
        made.append(plan(*arguments, f"zero={zero}", f"precision={precision}"))
    for zero, precision, keys in OPTIMIZERS:
        arguments = ["model=gpt2-nano", "batch.micro=1", "batch.global=2", "sequence=8", *keys]
        consent = ["ds.zero_allow_untested_optimizer=true"] if "type=" in keys[0] else []
        made.append(plan(*arguments, *consent, f"zero={zero}", f"precision={precision}"))
    for family, zero, precision, accumulation in LORA:
        arguments = [f"model={family}", "batch.micro=1", f"batch.global={2 * accumulation}", "sequence=8", "train=lora"]
        made.append(plan(*arguments, f"zero={zero}", f"precision={precision}"))
    return made


def _expected(plan: Plan, rank: int) -> dict[str, int]:
    made = estimate.workload_of(plan)
    planned = states.states(made, rank)
    bucket = 4 * made.reduce_bucket
    built = planned.weights + planned.masters + planned.resting_gradients + (bucket if made.zero == 3 else 0)
    # Stage 1's bucket is made with the first gradient of a step, and in fp16 the gradients that other ranks step with
    # stay views of it until the step is over.
    ready = bucket if made.zero == 1 and made.precision != "bf16" else 0
    views = bucket if made.zero == 1 and made.precision == "fp16" else 0
    return {
        "built": built,
        "between micro-steps": built + ready + planned.gradients - planned.resting_gradients,
        "before the step": built + views + planned.reduced_gradients - planned.resting_gradients,
        "at rest": built + planned.moments + planned.persistent,
    }


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]))
    os._exit(0)  # taking Python down beside threads of gloo can abort

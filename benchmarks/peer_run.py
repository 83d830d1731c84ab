"""Time what Halfstep is compared with, in a process of its own: python benchmarks/peer_run.py JOB.json.

`plain`: a model of plain_models.py, compiled whole, fused AdamW, autocast: what nanoGPT does. `deepspeed`: the smallest
DeepSpeed loop one can write, transformers' model with its own loss, fused AdamW. Neither reads anything from the device
between its steps, and their batches lie there before the first: they are measured at their best.

The job names `who`, `config` (the plan's model as transformers has it), `micro`, `sequence`, `zero`, `precision`,
`steps`, `compiler` and `result`, where the seconds of each step, the losses and the peak of memory are written.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.random_corpus import tokens
from halfstep.launcher import topology
from halfstep.models.shapes import from_hf_config

BATCHES = 8
"""Different batches, taken in turn."""
LEARNING_RATE = 6e-4
CLIP = 1.0
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def main(job: dict[str, Any]) -> None:
    """Run one peer and write what was seen of it; running out of the device's memory is a result."""
    try:
        seen = measure(job, PEERS[job["who"]](job))
    except torch.OutOfMemoryError as error:
        seen = {"outcome": "out of device memory", "detail": str(error).splitlines()[0]}
    Path(job["result"]).write_text(json.dumps(seen))


def measure(job: dict[str, Any], step: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    """Take all steps and return their seconds by the device's own clock, the first one's end, losses and the peak."""
    device, losses, first = _device(), [], None
    count = BATCHES * job["micro"] * (job["sequence"] + 1)
    drawn = torch.from_numpy(tokens(count, job["tokens_below"]).astype("int64")).to(device)
    batches = drawn.view(BATCHES, job["micro"], job["sequence"] + 1)
    clock = _Clock(device)
    for number in range(job["steps"]):
        losses.append(step(batches[number % BATCHES]).detach())
        clock.mark()
        if number == 0:
            losses[0].item()
            first = time.time()
    seconds = clock.seconds()
    on_gpu = device.type == "cuda"
    return {
        "outcome": "done",
        "first_step_at": first,
        "step_seconds": seconds,
        "losses": [float(loss) for loss in losses],
        "peak_reserved_bytes": torch.cuda.max_memory_reserved() if on_gpu else None,
        "peak_allocated_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
    }


class _Clock:
    """Marks the ends of steps without waiting for them."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu, self._marks = device.type == "cuda", []
        self.mark()

    def mark(self) -> None:
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        else:
            event = time.perf_counter()
        self._marks.append(event)

    def seconds(self) -> list[float]:
        """Return the seconds between neighbouring marks."""
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        if not self._on_gpu:
            return [after - before for before, after in pairs]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in pairs]


def _device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def _plain(job: dict[str, Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    from benchmarks.plain_models import plain

    device, shape = _device(), from_hf_config(job["config"])
    assert shape is not None, "the benchmark's models are families whose arithmetic is known"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    with device:
        model = plain(shape)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    compiled = torch.compile(model, backend=job["compiler"])
    scaler = torch.amp.GradScaler(device.type, enabled=job["precision"] == "fp16")
    half, dtype = job["precision"] != "fp32", _DTYPES[job["precision"]]

    def step(batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, dtype=dtype if half else None, enabled=half):
            loss = compiled(batch[:, :-1], batch[:, 1:])
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def _bare_deepspeed(job: dict[str, Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    from transformers import AutoConfig, AutoModelForCausalLM

    topology.prepare_environment(topology.from_environment())  # before DeepSpeed is imported
    import deepspeed

    # On a CPU DeepSpeed builds an operator for messages between ranks, and waits for whoever else builds it. There is
    # one rank here.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    device = _device()
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, init_method=f"file://{job['result']}.store", rank=0, world_size=1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**job["config"])).to(device)
    config = {
        "train_micro_batch_size_per_gpu": job["micro"],
        "gradient_accumulation_steps": 1,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": job["zero"]},
        "fp16": {"enabled": job["precision"] == "fp16"},
        "bf16": {"enabled": job["precision"] == "bf16"},
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.train()

    def step(batch: torch.Tensor) -> torch.Tensor:
        # transformers shifts the labels itself; with the last token left out both models see as many tokens.
        loss = engine(input_ids=batch[:, :-1], labels=batch[:, :-1]).loss
        engine.backward(loss)
        engine.step()
        return loss

    return step


PEERS = {"plain": _plain, "deepspeed": _bare_deepspeed}

if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
    sys.stdout.flush()
    os._exit(0)  # as launcher/train.py: taking Python down beside threads of gloo or NCCL can abort

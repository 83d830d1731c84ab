"""The micro-batch that nobody asked for: on a GPU what surely fits and fills it, on a CPU up to 8, in a study one."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from halfstep.launcher.config.load import Request, load
from halfstep.launcher.plan import batch, facts, present
from halfstep.launcher.plan.decide import planned_topology
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.plan.resolve import resolve
from halfstep.launcher.study import grid, study_file
from halfstep.launcher.topology import Topology

Make = Callable[..., Plan]


def planned(*arguments: str) -> Plan:
    """Plan without data for a device that the table names, as on a login node."""
    request = load(arguments, data=False)
    return resolve(request, planned_topology(request.spec), facts.read(request.spec))


@pytest.mark.parametrize(
    ("arguments", "micro", "because"),
    [
        # 32 sequences of 1,024 tokens are 32,768: an H200 would hold more.
        ("model=gpt2-124m hardware=h200", 32, "the largest divisor of 480 up to 32,768 tokens, which fill the device"),
        ("model=llama-1b sequence=2048 hardware=h200", 16, "the largest divisor of 480 up to 32,768 tokens"),
        ("model=gpt2-1.5b hardware=h200", 30, "the largest divisor of 480 that is sure to fit"),
        ("model=gpt2-1.5b hardware=h100", 12, "the largest divisor of 480 that is sure to fit"),
        ("model=gpt2-1.5b hardware=a100", 12, "the largest divisor of 480 that is sure to fit"),
        ("model=gpt2-1.5b hardware=a100-40gb", 1, "one sequence, and not even that is sure to fit in 37.3 GiB"),
        ("model=gpt2-124m hardware=h200 batch.global=7", 7, "all of a rank's share"),
        ("model=gpt2-124m hardware=h200 batch.global=509", 1, "the largest divisor of 509 up to 32,768 tokens"),
        ("model=gpt2-124m hardware=h100 batch.global=999999999", 27, "the largest divisor of 999999999"),
    ],
)
def test_a_gpu_takes_the_largest_micro_batch_that_surely_fits_and_is_not_more_than_fills_it(
    arguments: str, micro: int, because: str
) -> None:
    plan = planned("batch.global=480", "gpus_per_node=1", *arguments.split())
    assert (plan.batch.micro, plan.micro_because[: len(because)]) == (micro, because)
    assert plan.deepspeed["train_micro_batch_size_per_gpu"] == micro
    assert f"             micro-batch {micro}: {plan.micro_because}" in present.lines(plan)


def test_what_is_chosen_fits_by_the_upper_end_of_its_band_and_the_next_larger_does_not() -> None:
    arguments = ("model=gpt2-1.5b", "hardware=h100", "gpus_per_node=1", "batch.global=480")
    chosen = planned(*arguments)
    larger = planned(*arguments, "batch.micro=15")
    assert (chosen.memory["verdict"], larger.memory["verdict"]) == ("fits", "tight")
    bound = (chosen.memory["predicted_high_bytes"] + chosen.memory["outside_bytes"]) / 2**30
    assert chosen.micro_because.endswith(f"its peak, at most {bound:.1f} GiB, fits in 74.5")


def test_a_micro_batch_that_was_asked_for_is_taken_and_needs_no_reason() -> None:
    plan = planned("model=gpt2-124m", "hardware=h200", "gpus_per_node=1", "batch.micro=2")
    assert (plan.batch.micro, plan.micro_because) == (2, "")


def test_where_the_devices_memory_is_not_known_it_is_at_most_8(plan: Make) -> None:
    unknown = Topology(world_size=1, ranks_per_node=1, accelerator="cuda", device_name="a GPU of next year")
    made = plan("model=gpt2-124m", "batch.global=64", topology=unknown)
    assert made.batch.micro == 8
    assert made.micro_because == "the largest divisor of 64 up to 8, since the device's memory is not known"


def test_cpu_ranks_take_at_most_8_as_ever(plan: Make) -> None:
    made = plan("batch.global=480")
    assert (made.batch.micro, made.micro_because) == (8, "")


def test_the_reason_makes_no_other_run(plan: Make) -> None:
    gpu = Topology(world_size=1, ranks_per_node=1, accelerator="cuda", device_name="NVIDIA H200")
    assert plan(topology=gpu).run_id == plan("batch.micro=32", topology=gpu).run_id


def test_no_more_sizes_are_tried_than_tokens_fill_a_device() -> None:
    assert batch.micro_sizes(10**12, 32_768)[-3:] == [25_600, 31_250, 32_000]
    assert batch.micro_sizes(12, 0) == [1]
    assert batch.micro_sizes(12, 5) == [1, 2, 3, 4]


def test_a_study_on_gpus_gives_all_cells_of_a_batch_the_smallest_of_their_micro_batches(
    tmp_path: Path, corpus: Path
) -> None:
    text = f'[base]\nmodel = "gpt2-1.5b"\ndata = "{corpus}"\nsequence = 1024\nbatch.global = 64\nsteps = 4\n'
    text += "[axes]\nactivation_checkpointing = [false, true]\n[seeds]\nvalues = [0]\n"
    file = tmp_path / "mine.toml"
    file.write_text(text)
    gpu = Topology(world_size=1, ranks_per_node=1, accelerator="cuda", device_name="NVIDIA H100 80GB HBM3")

    def decide(request: Request) -> Plan:
        return resolve(request, gpu, facts.read(request.spec))

    def micros(cells: Sequence[grid.Cell]) -> list[int]:
        return [cell.plan.batch.micro for cell in cells if cell.plan]

    cells = grid.cells(study_file.read(str(file)), decide)
    alone = [decide(load([word for word in cell.arguments if "batch.micro" not in word])) for cell in cells]
    assert [plan.batch.micro for plan in alone] == [8, 32]
    assert micros(cells) == [8, 8]
    assert all("batch.micro=8" in cell.arguments for cell in cells)
    cells = grid.cells(study_file.read(str(file), ["batch.micro=4"]), decide)
    assert micros(cells) == [4, 4]

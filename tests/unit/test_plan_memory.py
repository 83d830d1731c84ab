"""The forecast of memory: numbers worked out by hand, what must hold for every workload, the verdict."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import measure_memory
from halfstep.launcher.cli import main
from halfstep.launcher.config.load import load
from halfstep.launcher.errors import EXIT_REFUSED, RefusedError, RequestError
from halfstep.launcher.forecast import fit, hardware, states, tensors
from halfstep.launcher.forecast.memory import FITS, TIGHT, TOO_LARGE, forecast
from halfstep.launcher.forecast.workload import Workload
from halfstep.launcher.plan import cautions, estimate, facts, present
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.plan.resolve import resolve
from halfstep.launcher.system import machine
from halfstep.launcher.topology import Topology
from halfstep.models import shapes
from halfstep.models.loss import CHUNK_ELEMENTS
from halfstep.models.presets import PRESETS

Make = Callable[..., Plan]
GPUS = Topology(
    world_size=8, ranks_per_node=8, accelerator="cuda", fused_adam=True, device_name="NVIDIA H100 80GB HBM3"
)
MEASURED = json.loads((Path(__file__).parents[2] / "benchmarks/results/memory-nvidia-h200.json").read_text())
CELLS = st.tuples(st.integers(0, 3), st.sampled_from(["fp32", "fp16", "bf16"]))


def workload(preset: str = "gpt2-nano", layers: int = 2, **more: object) -> Workload:
    shape = shapes.shape_of(PRESETS[preset], layers=layers, vocabulary=512)
    base = {"zero": 2, "precision": "bf16", "ranks": 4, "ranks_per_node": 4, "micro": 2, "accumulation": 1}
    base |= {"sequence": 64, "accelerator": "cuda", "reduce_bucket": 2**20}
    return Workload(shape=shape, parameters=shapes.parameters(shape), **{**base, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize("preset", ["gpt2-nano", "llama-nano", "gpt2-124m", "llama-8b"])
def test_the_tensors_of_a_shape_add_up_to_its_parameters(preset: str) -> None:
    shape = shapes.shape_of(PRESETS[preset], vocabulary=PRESETS[preset].vocabulary or 512)
    every = tensors.of(shape, shapes.parameters(shape))
    assert every.elements == shapes.parameters(shape) == sum(every.matrices) + sum(every.vectors)
    assert every.largest == shapes.largest_tensor(shape)


def test_model_states_by_hand() -> None:
    # gpt2-nano on 512 tokens: 512 x 128 + 128 x 128 + 2 (12 x 128^2 + 13 x 128) + 2 x 128 = 478,720 parameters, of
    # which 475,136 in matrices and 3,584 in vectors; both divide by 2 x 4 ranks.
    bf16 = {zero: states.states(workload(zero=zero)) for zero in range(4)}
    assert bf16[0].totals() == {
        "weights": 2 * 478_720,
        "gradients": 4 * 478_720,
        "fp32_masters": 4 * 478_720,
        "optimizer_moments": 8 * 478_720,
    }
    assert bf16[1].gradients == (4 + 2) * 478_720, "BF16_Optimizer: fp32 sums of everything, bf16 gradients beside them"
    assert (bf16[1].masters, bf16[1].moments) == (478_720, 2 * 478_720)
    assert (bf16[2].weights, bf16[2].gradients, bf16[2].masters) == (2 * 478_720, 478_720, 478_720)
    assert (bf16[3].weights, bf16[3].gradients) == (478_720 // 2, 478_720)
    assert states.states(workload(zero=0, precision="fp32")).masters == 0
    assert states.states(workload(zero=1, precision="fp32")).masters == 478_720, "a second copy of the shard"
    assert states.states(workload(zero=2, optimizer="SGD")).moments == 0
    assert states.states(workload(zero=2, optimizer="SGD", momentum=0.9)).moments == 478_720
    # Of the matrices, 2 x 12 x 128^2 = 393,216 elements are hidden.
    assert states.states(workload(zero=0, optimizer="Muon")).moments == 4 * 393_216 + 8 * (478_720 - 393_216)
    assert states.states(workload(zero=0, optimizer="AdamW", optimizer_switches=("amsgrad",))).moments == 12 * 478_720


def test_offloaded_states_lie_on_the_host() -> None:
    two = states.states(workload(zero=2, offload_optimizer="cpu"))
    assert (two.masters, two.moments, two.gradients) == (0, 0, 478_720), "the fp32 shard is made on the device first"
    assert (two.host_masters, two.host_moments, two.host_gradients) == (478_720, 2 * 478_720, 478_720)
    three = states.states(workload(zero=3, offload_optimizer="cpu", offload_param="cpu"))
    assert (three.weights, three.gradients, three.host_weights) == (0, 0, 478_720 // 2)
    needed = forecast(workload(zero=2, offload_optimizer="cpu"))
    assert {"offloaded masters", "offloaded moments"} <= {term.name for term in needed.host}
    assert forecast(workload(zero=2, offload_optimizer="cpu", accelerator="cpu")).host == ()


def test_fp32_gradients_of_stage_2_are_those_of_every_tensor_a_shard_touches() -> None:
    every = tensors.Tensors(sizes=(6, 10, 4), matrices=(6, 10), vectors=(4,))
    # Shards of 8 and of 2: rank 0 has all of the 6 and some of the 10, rank 1 the rest of the 10; both have some 4.
    assert tensors.touched(every, 2) == (6 + 10 + 4, 10 + 4)
    assert (tensors.flat(every, 2), tensors.split(every, 2)) == (20, 10)
    assert tensors.split(every, 4) == 2 + 3 + 1
    assert tensors.persistent(every, 6) == 10


@given(CELLS, st.booleans(), st.sampled_from(["cpu", "cuda"]), st.integers(1, 4), st.integers(1, 3))
def test_terms_add_up_and_every_moment_is_below_the_peak(
    cell: tuple[int, str], checkpointing: bool, accelerator: str, micro: int, accumulation: int
) -> None:
    zero, precision = cell
    more = {"activation_checkpointing": checkpointing, "accelerator": accelerator, "accumulation": accumulation}
    needed = forecast(workload(zero=zero, precision=precision, micro=micro, **more))
    assert sum(term.bytes for term in needed.device) == needed.peak_bytes + needed.outside_bytes
    assert max(needed.by_phase.values()) == needed.by_phase[needed.peak_at] == needed.peak_bytes
    assert needed.low_bytes < needed.peak_bytes < needed.high_bytes
    assert all(term.bytes > 0 and term.note for term in needed.device)


@given(CELLS, st.sampled_from(["cpu", "cuda"]), st.sampled_from(["gpt2-nano", "llama-nano"]), st.booleans())
def test_more_of_anything_never_needs_less(
    cell: tuple[int, str], accelerator: str, preset: str, checkpointing: bool
) -> None:
    zero, precision = cell
    more = {"zero": zero, "precision": precision, "accelerator": accelerator}
    small = workload(preset, activation_checkpointing=checkpointing, **more)
    peak = forecast(small).peak_bytes
    for larger in (
        dataclasses.replace(small, micro=small.micro * 3),
        dataclasses.replace(small, sequence=small.sequence + 17),
        dataclasses.replace(small, accumulation=2),
        workload(preset, layers=5, activation_checkpointing=checkpointing, **more),
    ):
        assert forecast(larger).peak_bytes >= peak
    assert forecast(dataclasses.replace(small, activation_checkpointing=False)).peak_bytes >= peak


@given(st.sampled_from(["fp32", "fp16", "bf16"]), st.integers(1, 2), st.integers(0, 6), st.integers(1, 8))
def test_a_higher_stage_and_more_ranks_never_hold_more_state(
    precision: str, zero: int, power: int, layers: int
) -> None:
    def total(stage: int, ranks: int) -> int:
        small = workload(layers=layers, zero=stage, precision=precision, ranks=ranks, persistence_threshold=0)
        return sum(states.states(small).totals().values())

    ranks = 2**power
    assert total(zero + 1, ranks) <= total(zero, ranks)
    assert total(zero, 2 * ranks) <= total(zero, ranks)


def test_an_unknown_family_has_its_states_and_a_wider_band() -> None:
    known = forecast(workload())
    unknown = forecast(dataclasses.replace(workload(), shape=None))
    assert "activations" not in {term.name for term in unknown.device}
    assert unknown.states.totals()["weights"] == known.states.totals()["weights"]
    assert unknown.high_bytes / unknown.peak_bytes > known.high_bytes / known.peak_bytes
    needed = fit.described(dataclasses.replace(workload(), shape=None), 10**12)
    assert needed["excludes"] == "activations: a family whose arithmetic is not known"
    assert needed["largest_micro"] is None


def test_the_verdict_is_about_the_whole_band() -> None:
    needed = forecast(workload())
    assert needed.verdict(needed.high_bytes + needed.outside_bytes) == FITS
    assert needed.verdict(needed.high_bytes + needed.outside_bytes - 1) == TIGHT
    assert needed.verdict(needed.low_bytes + needed.outside_bytes - 1) == TOO_LARGE
    assert needed.verdict() is None
    assert forecast(workload(), capacity_bytes=needed.high_bytes + needed.outside_bytes).verdict() == FITS


def test_the_largest_micro_batch_fits_and_the_next_does_not() -> None:
    small = workload("gpt2-nano", layers=12, sequence=128)
    capacity = forecast(dataclasses.replace(small, micro=37)).high_bytes + forecast(small).outside_bytes
    largest = fit.largest_micro(small, capacity)
    assert largest is not None
    assert forecast(dataclasses.replace(small, micro=largest)).verdict(capacity) == FITS
    assert forecast(dataclasses.replace(small, micro=largest + 1)).verdict(capacity) != FITS
    assert fit.largest_micro(small, 2**20) == 0


def test_what_fits_is_started_and_what_cannot_is_refused_with_what_to_change(plan: Make) -> None:
    small = plan("model=gpt2-124m", topology=GPUS)
    assert small.memory["verdict"] == FITS
    estimate.require_fit(small)
    large = plan("model=gpt3-6.7b", "zero=1", "sequence=1024", "batch.micro=4", topology=GPUS)
    assert large.memory["verdict"] == TOO_LARGE
    with pytest.raises(RefusedError) as caught:
        estimate.require_fit(large)
    assert caught.value.exit_code == EXIT_REFUSED
    assert str(caught.value).count("\n") == 2
    assert "--force" in caught.value.fix
    assert "zero=3" in caught.value.fix
    assert all(change["verdict"] in (FITS, TIGHT, TOO_LARGE) for change in large.memory["changes"])
    estimate.require_fit(large, force=True)


def test_run_and_submit_refuse_before_anything_is_written(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "node_memory_bytes", lambda: 2**29)
    monkeypatch.setattr(machine, "gpu_count", lambda *_: 0)
    arguments = [
        "run",
        "model=gpt2-nano",
        "model.layers=24",
        "model.width=512",
        f"data={corpus}",
        f"out={tmp_path / 'run'}",
    ]
    assert main.main(arguments) == EXIT_REFUSED
    screen = capsys.readouterr().err
    assert screen.count("\n") == 3
    assert "it cannot fit" in screen
    assert "framework" in screen
    assert not (tmp_path / "run").exists()
    assert main.main([*arguments, "--force", "--dry-run"]) == 0
    gpus = ["submit", "--site", "gpu", "--dry-run", "model=gpt3-175b", "zero=0", "gpus_per_node=8", "hardware=h100"]
    gpus += ["sequence=1024", f"data={corpus}", f"out={tmp_path / 'job'}"]
    assert main.main(gpus) == EXIT_REFUSED
    assert "zero=3" in capsys.readouterr().err
    assert main.main([*gpus, "--force"]) == 0


def test_nothing_is_refused_where_the_capacity_is_not_known(plan: Make) -> None:
    made = plan("model=gpt3-175b", "sequence=1024")
    assert (made.memory["capacity_bytes"], made.memory["verdict"]) == (None, None)
    estimate.require_fit(made)


def test_the_hosts_memory_changes_the_verdict_and_not_the_run(corpus: Path) -> None:
    request = load(["model=gpt2-nano", f"data={corpus}"])
    world = Topology(world_size=2, ranks_per_node=2, accelerator="cpu")
    plans = [resolve(request, world, facts.read(request.spec, memory)) for memory in (None, 2**30 // 4, 2**40)]
    assert [plan.memory["verdict"] for plan in plans] == [None, TOO_LARGE, FITS]
    assert len({plan.run_id for plan in plans}) == 1
    assert cautions.memory_warning(plans[0], None) is None
    assert "does not fit" in (cautions.memory_warning(plans[0], 2**27) or "")
    assert cautions.memory_warning(plans[0], 2**40) is None


def test_a_plan_shows_its_memory_and_survives_json(plan: Make) -> None:
    made = plan("zero=3", "model=llama-1b", "sequence=1024", topology=GPUS)
    assert Plan.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    text = "\n".join(present.lines(made))
    for said in ("GiB a rank at its peak", "FITS", "optimizer moments", "###", "largest micro-batch that fits"):
        assert said in text
    assert set(made.memory["model_states_bytes_per_rank"]) == {
        "weights",
        "gradients",
        "fp32_masters",
        "optimizer_moments",
    }


def test_175b_on_1024_gpus_is_planned(plan: Make) -> None:
    many = dataclasses.replace(GPUS, world_size=1024)
    made = plan("model=gpt3-175b", "zero=3", "activation_checkpointing=true", "batch.global=1024", topology=many)
    # 174.6e9 x 16 bytes / 1024 ranks of states, give or take the padding of every tensor.
    assert made.memory["model_states_total_bytes"] == pytest.approx(made.model.parameters * 14 / 1024, rel=0.3)


def test_a_sequence_beyond_the_positions_of_a_models_config_is_refused(tmp_path: Path, corpus: Path) -> None:

    config = shapes.hf_config(shapes.shape_of(PRESETS["llama-nano"], vocabulary=4096))
    (tmp_path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    request = load([f"model=hf:{tmp_path}", f"data={corpus}", "sequence=65"])
    world = Topology(world_size=2, ranks_per_node=2, accelerator="cpu")
    with pytest.raises(RequestError, match="longer than the model's 64 positions"):
        resolve(request, world, facts.read(request.spec))


def test_the_memory_of_a_device_is_what_its_name_says_or_the_table() -> None:
    assert hardware.memory_bytes(None, "NVIDIA A100-SXM4-40GB") == 40 * 10**9
    assert hardware.memory_bytes("h200", "") == 141 * 10**9
    assert hardware.memory_bytes(None, "a card nobody knows") is None


def test_the_memory_of_a_host_is_what_its_control_group_leaves(tmp_path: Path) -> None:
    assert machine.node_memory_bytes(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:       1000 kB\nMemFree: 5 kB\n")
    assert machine.node_memory_bytes(tmp_path) == 1_024_000
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert machine.node_memory_bytes(tmp_path) == 1_024_000
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("500000\n")
    assert machine.node_memory_bytes(tmp_path) == 500_000


def test_the_measured_runs_are_predicted() -> None:
    rows = json.loads(measure_memory.RESULTS.read_text())["rows"]
    for row, made in zip(rows, measure_memory.workloads_of(rows), strict=True):
        needed = forecast(made)
        assert needed.low_bytes < row["peak_memory_bytes"] < needed.high_bytes, (row["size"], row["words"])
    errors = [
        forecast(made).peak_bytes / row["peak_memory_bytes"] - 1
        for row, made in zip(rows, measure_memory.workloads_of(rows), strict=True)
    ]
    assert sum(abs(error) <= 0.05 for error in errors) >= 0.95 * len(errors)
    assert abs(sum(errors) / len(errors)) < 0.02, "neither above nor below on the whole"


@pytest.mark.parametrize("row", MEASURED["rows"], ids=[row["name"] for row in MEASURED["rows"]])
def test_the_band_holds_every_row_of_an_h200_and_the_forecast_is_within_three_percent(plan: Make, row: dict) -> None:
    topology = Topology(world_size=1, ranks_per_node=1, accelerator="cuda", device_name=MEASURED["device"])
    keys = [f"{key}={row[key]}" for key in ("zero", "precision")]
    keys += [f"batch.micro={row['micro']}", f"batch.global={row['micro'] * row['accumulation']}", *row["keys"]]
    sequence = f"sequence={MEASURED['sequence']}"
    memory = plan(f"model={MEASURED['model']}", sequence, *keys, topology=topology).memory
    peak = row["peak_reserved_bytes"] - 4 * CHUNK_ELEMENTS  # they computed the loss by chunks
    assert memory["predicted_low_bytes"] < peak < memory["predicted_high_bytes"]
    assert memory["predicted_peak_bytes"] == pytest.approx(peak, rel=0.03)

"""The forecast of time: devices, volumes and collectives by hand, and what must hold for every workload."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfstep.launcher.errors import RequestError
from halfstep.launcher.forecast import communication, compute, hardware, run_estimate, step_time
from halfstep.launcher.forecast.calibration import Calibration, factor_keys, shipped
from halfstep.launcher.forecast.communication import Group
from halfstep.launcher.forecast.hardware import Hardware
from halfstep.launcher.forecast.parallelism import Layout
from halfstep.launcher.forecast.workload import Workload
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.topology import Topology
from halfstep.models.presets import PRESETS
from halfstep.models.shapes import parameters, shape_of

Make = Callable[..., Plan]
H100 = hardware.find("H100")
IDEAL = Calibration(
    narrow=0.0,
    link=1.0,
    network=1.0,
    link_latency=0.0,
    network_latency=0.0,
    shown=0.5,
    straggling=0.0,
    stage3=1.0,
    operator=0.0,
    factors={},
)


def workload(**changes: object) -> Workload:
    shape = shape_of(PRESETS["gpt3-6.7b"])
    base = Workload(
        shape=shape,
        parameters=parameters(shape),
        zero=1,
        precision="bf16",
        ranks=8,
        ranks_per_node=8,
        micro=2,
        accumulation=4,
        sequence=2048,
        accelerator="cuda",
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def step(small: Workload, device: Hardware = H100, **more: object) -> float:
    predicted = step_time.forecast(small, device, **more)  # type: ignore[arg-type]
    assert predicted is not None
    return predicted.step_seconds


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("A100-80GB", "a100"),
        ("A100(8/node)", "a100"),
        ("A100-40GB", "a100-40gb"),
        ("H100-96GB(HBM2e,500W)", "h100-96gb"),
        ("V100-16GB", "v100-16gb"),
        ("V100-32GB(DGX-2)", "v100-dgx2"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("gb200", "gb200"),
    ],
)
def test_a_device_is_known_by_its_name_its_label_and_what_it_calls_itself(label: str, name: str) -> None:
    assert hardware.find(label).name == name


def test_an_unknown_device_names_the_nearest() -> None:
    with pytest.raises(RequestError) as caught:
        hardware.find("H1000")
    assert caught.value.what == "hardware=H1000 is not in the table"
    assert "h100" in caught.value.fix.lower()


def test_devices_of_the_users_own_win_and_are_checked(tmp_path: Path) -> None:
    environ = {"XDG_CONFIG_HOME": str(tmp_path)}
    assert hardware.read_own(environ) == {}
    file = tmp_path / "halfstep" / "hardware.toml"
    file.parent.mkdir()
    file.write_text('[mine]\nmatch = ["My GPU"]\nhalf = 1e12\n[h100]\nmatch = ["H100"]\nhalf = 5e14\n')
    own = hardware.read_own(environ)
    assert hardware.find("mine", own).peak("bf16") == 1e12
    assert hardware.find("H100", own).half == 5e14
    file.write_text("[mine]\nbandwith = 1e12\n")
    with pytest.raises(RequestError, match=r"mine\.bandwith is no key") as caught:
        hardware.read_own(environ)
    assert caught.value.fix == "did you mean bandwidth?"
    file.write_text("[mine]\nhalf = -1\n")
    with pytest.raises(RequestError, match="not a number above zero"):
        hardware.read_own(environ)
    file.write_text("[mine\n")
    with pytest.raises(RequestError, match="not TOML"):
        hardware.read_own(environ)


@pytest.mark.parametrize(
    ("zero", "accumulation", "elements"),
    # Counted on real ranks in tests/process: stage 0 2 psi, stage 1 3 psi, stage 2 (2g + 1) psi, stage 3 3g psi.
    [(0, 16, 2), (1, 16, 3), (2, 16, 33), (3, 16, 48), (2, 1, 3), (3, 1, 3)],
)
def test_the_volume_of_a_step_is_what_deepspeed_sends(zero: int, accumulation: int, elements: int) -> None:
    small = workload(zero=zero, accumulation=accumulation, communication_dtype="bf16")
    sent = communication.volume(small, Layout())
    assert sent.total_bytes == pytest.approx(elements * small.parameters * 2)


def test_gradients_in_fp32_are_twice_as_many_bytes() -> None:
    small = workload(zero=2, accumulation=3)  # fp32 is Halfstep's communication_data_type
    psi = small.parameters
    assert communication.volume(small, Layout()).total_bytes == pytest.approx(2 * 3 * psi * 4 + psi * 2)
    assert communication.volume(workload(precision="fp32", zero=1), Layout()).total_bytes == pytest.approx(3 * psi * 4)


def test_other_trainers_and_zeropp_have_their_own_volumes() -> None:
    small = workload(zero=3, accumulation=2, communication_dtype="bf16")
    psi = small.parameters * 2.0
    assert communication.volume(small, Layout(collectives="fsdp")).total_bytes == pytest.approx(6 * psi)
    shard_grad_op = dataclasses.replace(small, zero=2)
    assert communication.volume(shard_grad_op, Layout(collectives="fsdp")).total_bytes == pytest.approx(4 * psi)
    assert communication.volume(small, Layout(collectives="ddp")).total_bytes == pytest.approx(2 * psi)
    quantized = communication.volume(small, Layout(quantized=True))
    # Between nodes: 0.5 forward in int8, nothing backward (a second copy in the node), 0.25 of gradients in int4.
    assert quantized.hidden_bytes == pytest.approx(2 * 0.75 * psi)
    assert communication.volume(dataclasses.replace(small, ranks=1), Layout()).total_bytes == 0


def test_a_ring_in_a_node_and_between_nodes_by_hand() -> None:
    inside = communication.seconds(8e9, 0, Group(ranks=8, local=8), H100, Layout(), IDEAL)
    assert inside == pytest.approx(8e9 * 7 / 8 / 450e9)
    # 8 adapters of 50 GB/s are slower than a link of 450: 400 GB/s for a group of 8 a node, 50 where it has one there.
    between = communication.seconds(8e9, 0, Group(ranks=16, local=8), H100, Layout(), IDEAL)
    assert between == pytest.approx(8e9 * 15 / 16 / 400e9)
    alone = communication.seconds(8e9, 0, Group(ranks=2, local=1), H100, Layout(), IDEAL)
    assert alone == pytest.approx(8e9 / 2 / 50e9)
    slow = dataclasses.replace(IDEAL, network_latency=1e-5, link_latency=1e-6)
    waits = communication.seconds(0, 10, Group(ranks=32, local=8), H100, Layout(), slow)
    assert waits == pytest.approx(10 * (4 * 1e-6 + 3 * 1e-5))
    assert communication.seconds(8e9, 1, Group(ranks=1, local=1), H100, Layout(), slow) == 0


def test_a_matrix_product_takes_its_flops_over_what_the_device_reaches() -> None:
    small = workload(micro=1, accumulation=1)
    shape = small.shape
    assert shape is not None
    known = dataclasses.replace(IDEAL, matmul=0.5)
    stage = compute.stage(small, Layout(), H100, known)
    # 12 h^2 weights a layer, 6 FLOPs for each and token, on half of 80.3 % of 989 TFLOP/s.
    flops = 6 * 2048 * 12 * shape.width**2 * shape.layers
    assert stage.matmul == pytest.approx(flops / (0.5 * 0.803 * 989e12))
    head = compute.head(small, Layout(), H100, known)
    assert head.matmul == pytest.approx(6 * 2048 * shape.vocabulary * shape.width / (0.5 * 0.803 * 989e12))
    again = compute.stage(dataclasses.replace(small, activation_checkpointing=True), Layout(), H100, known)
    assert again.matmul == pytest.approx(stage.matmul * 4 / 3)
    # A causal fused kernel: 2 s h forward, 2.5 times that backward.
    attention = 3.5 * 2 * 2048 * 2048 * shape.width * shape.layers
    assert stage.attention == pytest.approx(attention / (known.attention * 0.803 * 989e12))


def test_the_slower_of_host_and_device_decides() -> None:
    quick = dataclasses.replace(IDEAL, host=1e-9)
    slow = dataclasses.replace(IDEAL, host=1.0)
    small = workload(micro=1, sequence=128)
    assert compute.stage(small, Layout(), H100, quick).seconds == pytest.approx(
        compute.stage(small, Layout(), H100, quick).device
    )
    layers = small.shape.layers if small.shape else 0
    assert compute.stage(small, Layout(), H100, slow).seconds == pytest.approx(2.0 * layers, rel=1e-3)


def test_the_host_launches_what_deepspeed_adds_for_each_parameter() -> None:
    known = dataclasses.replace(IDEAL, host=0.0, operator=1e-3)
    counts = {0: 1 + 24 / 4, 1: 6 + 4 / 4, 2: 14 + 23 / 4, 3: 13 + 7 / 4}
    for zero, operators in counts.items():
        small = workload(zero=zero, micro=1, sequence=128)
        assert small.shape is not None
        parameters_of_gpt = 12 * small.shape.layers + 4
        assert compute.launched(small) == operators * parameters_of_gpt
        assert compute.stage(small, Layout(), H100, known).host == pytest.approx(1e-3 * operators * parameters_of_gpt)
    on_cpus = workload(accelerator="cpu")
    assert compute.stage(on_cpus, Layout(), H100, known).host == 0, "their own constants have it"
    slow = dataclasses.replace(known, operator=1.0)
    assert step(workload(), known=slow) > 20
    assert step(workload(), known=slow, stack="nanogpt") < 20, "counted were DeepSpeed's"


def test_a_pipeline_waits_for_its_bubble() -> None:
    # 30 layers and 2 for embedding and head share 4 stages equally: 3 of 8 micro-steps more.
    shape = dataclasses.replace(shape_of(PRESETS["gpt3-6.7b"]), layers=30)
    known = dataclasses.replace(IDEAL, pipeline_latency=0.0, optimizer=0.0)
    small = workload(shape=shape, ranks=1, accumulation=8)
    infinite = dataclasses.replace(H100, link=math.inf)
    flat = step_time.forecast(small, infinite, known=known)
    piped = step_time.forecast(small, infinite, layout=Layout(pipeline=4), known=known)
    assert flat is not None
    assert piped is not None
    stage = compute.stage(small, Layout(pipeline=4), infinite, known).seconds
    assert piped.step_seconds == pytest.approx(flat.step_seconds / 4 + 3 * stage, rel=1e-6)
    assert piped.devices == 4


def test_terms_add_up_and_derived_numbers_follow() -> None:
    predicted = step_time.forecast(workload(), H100)
    assert predicted is not None
    tree = predicted.to_dict()
    assert sum(tree["terms"].values()) == pytest.approx(predicted.step_seconds)
    assert predicted.tokens == 2 * 2048 * 4 * 8
    assert tree["tokens_per_second"] == pytest.approx(predicted.tokens / predicted.step_seconds)
    assert tree["tokens_per_second_per_gpu"] * 8 == pytest.approx(tree["tokens_per_second"])
    assert tree["mfu"] == pytest.approx(tree["tokens_per_second_per_gpu"] * predicted.flops_per_token / 989e12)
    assert tree["flops_convention"] == "causal"
    assert predicted.low_seconds < predicted.step_seconds < predicted.high_seconds


def test_what_is_not_known_has_no_time() -> None:
    assert step_time.forecast(workload(shape=None), H100) is None
    untold = dataclasses.replace(hardware.find("B200"), fp32=None)
    assert step_time.forecast(workload(precision="fp32"), untold) is None


@given(
    st.sampled_from(["gpt2-124m", "gpt2-1.5b", "gpt3-13b", "llama-8b", "llama-70b"]),
    st.integers(0, 3),
    st.integers(0, 5),
    st.integers(1, 16),
    st.sampled_from([1, 2, 4, 8]),
)
def test_a_step_of_equal_micro_steps_never_gets_faster_with_more_ranks(
    model: str, zero: int, doublings: int, micro: int, accumulation: int
) -> None:
    shape = shape_of(PRESETS[model], vocabulary=50304)
    few = workload(
        shape=shape, parameters=parameters(shape), zero=zero, ranks=2**doublings, micro=micro, accumulation=accumulation
    )
    more = dataclasses.replace(few, ranks=2 ** (doublings + 1))
    # The optimizer's share shrinks with sharding; everything else can only grow.
    known = dataclasses.replace(shipped(), optimizer=1e-6)
    assert step(more, known=known) >= step(few, known=known) * (1 - 1e-6)


@given(st.integers(1, 64), st.integers(1, 64), st.sampled_from(["A100", "H100", "V100", "L40S"]))
def test_more_work_takes_longer_and_a_checkpointed_step_longest(micro: int, accumulation: int, device: str) -> None:
    small = workload(micro=micro, accumulation=accumulation)
    chosen = hardware.find(device)
    base = step(small, chosen)
    assert step(dataclasses.replace(small, micro=micro + 1), chosen) > base
    assert step(dataclasses.replace(small, accumulation=accumulation + 1), chosen) > base
    assert step(dataclasses.replace(small, activation_checkpointing=True), chosen) > base
    assert step(dataclasses.replace(small, offload_optimizer="cpu"), chosen) > base


def test_a_calibrated_factor_multiplies_the_step() -> None:
    known = dataclasses.replace(shipped(), factors={"stack:x": math.log(2)})
    assert step(workload(), known=known, stack="x") == pytest.approx(2 * step(workload(), known=known, stack="y"))
    assert factor_keys("x", "h100", "fp16") == factor_keys("x", "h100", "bf16")


def test_one_of_four_ranks_of_a_cpu_measured_with_two_has_half() -> None:
    cpu = Hardware(name="this-cpu", fp32=8e10, half=4e10, bandwidth=1e10, memory=8, measured_ranks=2)
    assert cpu.shared(4).fp32 == 4e10
    assert cpu.shared(4).memory == 4
    assert cpu.shared(2) is cpu
    assert H100.shared(4) is H100


def test_a_plan_says_how_long_it_takes_or_why_it_cannot(plan: Make) -> None:
    unknown = plan().time
    assert unknown["step_seconds"] is None
    assert "doctor --measure" in unknown["unknown"]
    gpus = Topology(world_size=8, ranks_per_node=8, accelerator="cuda", device_name="NVIDIA H100 80GB HBM3")
    planned = plan("model=gpt2-124m", "batch.global=64", "steps=1000", topology=gpus)
    assert planned.time["unknown"] is None
    assert planned.time["hardware"] == "h100"
    assert planned.time["training_seconds"] == pytest.approx(1000 * planned.time["step_seconds"])
    assert planned.time["device_hours"] == pytest.approx(8 * planned.time["hours"])
    assert planned.time["price"] is None
    strange = dataclasses.replace(gpus, device_name="Graphcore")
    assert "hardware=NAME" in plan("model=gpt2-124m", "batch.global=64", topology=strange).time["unknown"]


def test_the_time_of_a_plan_is_no_part_of_its_name(plan: Make) -> None:
    gpus = Topology(world_size=8, ranks_per_node=8, accelerator="cuda", device_name="NVIDIA H100 80GB HBM3")
    here = plan("model=gpt2-124m", "batch.global=64", "hardware=H100", topology=gpus)
    there = plan("model=gpt2-124m", "batch.global=64", "hardware=A100", topology=gpus)
    assert here.time["step_seconds"] < there.time["step_seconds"]
    assert here.run_id == there.run_id


def test_jobs_and_money_by_hand() -> None:
    work = run_estimate.Work(steps=1000, evaluations=0, evaluation_sequences=0, checkpoints=0)
    estimate = run_estimate.of(
        workload(), H100, "", work, run_estimate.Terms(limit_seconds=900, notice_seconds=300, price=2.5)
    )
    seconds = 1000 * estimate["step_seconds"]
    assert estimate["jobs"] == math.ceil(seconds / 600)
    assert estimate["price"] == pytest.approx(seconds / 3600 * 8 * 2.5)
    saved = run_estimate.of(
        workload(), dataclasses.replace(H100, storage=1e9), "", dataclasses.replace(work, checkpoints=2)
    )
    assert saved["checkpoint_seconds"] == pytest.approx(2 * workload().parameters * 14 / 1e9)
    assert run_estimate.of(workload(), H100, "", dataclasses.replace(work, checkpoints=2))["checkpoint_seconds"] is None


@pytest.mark.parametrize("text", ["cheap", "", "-1", "nan", "inf"])
def test_a_price_that_is_no_price_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="is not a price"):
        run_estimate.price(text)

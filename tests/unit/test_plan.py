"""Plans: the batch equation, the learning rate, the DeepSpeed config and its origins, rules and run ids."""

import dataclasses
import itertools
import json
import os
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfstep.launcher.config import optimizers
from halfstep.launcher.config.dotted import flatten
from halfstep.launcher.config.schema import OptimizerKeys, ScheduleKeys
from halfstep.launcher.errors import RequestError
from halfstep.launcher.parity import cases
from halfstep.launcher.plan import batch, present, rules, schedule
from halfstep.launcher.plan.ds import dsconfig
from halfstep.launcher.plan.plan import Plan, run_id_of
from halfstep.launcher.system import assets
from halfstep.launcher.topology import Topology
from tools import catalogue

Make = Callable[..., Plan]
GPUS = Topology(
    world_size=8, ranks_per_node=8, accelerator="cuda", fused_adam=True, device_name="NVIDIA H100 80GB HBM3"
)


@given(st.integers(1, 4096), st.none() | st.integers(1, 64), st.integers(1, 64))
def test_the_batch_equation_holds_exactly_or_is_refused(global_: int, micro: int | None, ranks: int) -> None:
    try:
        solved = batch.solve(global_, micro, ranks)
    except RequestError:
        assert global_ % (ranks * (micro or 1)) != 0
        return
    assert solved.micro * solved.accumulation * solved.ranks == global_ == solved.global_
    assert micro in (None, solved.micro)


def test_a_batch_that_does_not_divide_is_explained_with_ones_that_do(plan: Make) -> None:
    with pytest.raises(RequestError) as caught:
        plan("batch.global=33")
    assert caught.value.what == "batch.global=33 cannot be shared by 2 ranks: 33 / 2 is not whole"
    assert caught.value.fix.startswith("take batch.global=32 or 34")
    with pytest.raises(RequestError) as caught:
        plan("batch.global=32", "batch.micro=5")
    assert caught.value.fix == "take batch.global=30 or 40, or batch.micro=2, 4 or 8"


@given(st.integers(0, 50), st.integers(51, 400), st.sampled_from(sorted(schedule.SHAPES)), st.floats(0, 1))
def test_the_learning_rate_warms_up_peaks_and_ends_where_it_should(
    warmup: int, steps: int, kind: str, ratio: float
) -> None:
    curve = schedule.Schedule(kind=kind, peak=1.0, warmup=warmup, steps=steps, min_ratio=ratio, decay=1)
    rates = [curve.learning_rate(step) for step in range(1, steps + 1)]
    assert rates[max(warmup, 1) - 1] == 1.0
    assert all(a < b for a, b in itertools.pairwise(rates[:warmup]))
    assert all(a >= b for a, b in itertools.pairwise(rates[max(warmup, 1) - 1 :]))
    assert rates[-1] == pytest.approx(1.0 if kind == "constant" else ratio)


def test_five_steps_of_the_learning_rate_by_hand() -> None:
    curve = schedule.Schedule(kind="linear", peak=8.0, warmup=2, steps=6, min_ratio=0.0)
    assert [curve.learning_rate(step) for step in range(1, 7)] == [4.0, 8.0, 6.0, 4.0, 2.0, 0.0]


def test_warm_up_stable_and_decay_by_hand() -> None:
    curve = schedule.Schedule(kind="wsd", peak=8.0, warmup=2, steps=10, min_ratio=0.0, decay=4)
    rates = [curve.learning_rate(step) for step in range(1, 11)]
    assert rates == [4.0, 8.0, 8.0, 8.0, 8.0, 8.0, 6.0, 4.0, 2.0, 0.0]
    assert curve.learning_rate(12) == 0.0
    long = dataclasses.replace(curve, warmup=8, min_ratio=0.5)  # the warm-up takes precedence over the decay
    assert [long.learning_rate(step) for step in (8, 9, 10)] == [8.0, 6.0, 4.0]


@given(st.integers(0, 50), st.integers(51, 400), st.integers(1, 400), st.floats(0, 1))
def test_wsd_stays_at_the_peak_until_it_falls_by_equal_amounts(
    warmup: int, steps: int, decay: int, ratio: float
) -> None:
    curve = schedule.Schedule(kind="wsd", peak=1.0, warmup=warmup, steps=steps, min_ratio=ratio, decay=decay)
    start = max(warmup, steps - decay, 1)
    rates = [curve.learning_rate(step) for step in range(start, steps + 1)]
    assert {curve.learning_rate(step) for step in range(max(warmup, 1), start + 1)} == {1.0}
    falls = [before - after for before, after in itertools.pairwise(rates)]
    assert falls == pytest.approx([(1 - ratio) / (steps - start)] * (steps - start), abs=1e-12)


def test_a_run_of_another_schedule_knows_nothing_of_the_decay(plan: Make) -> None:
    for kind in ("cosine", "linear", "constant"):
        made = plan(f"schedule.kind={kind}")
        assert made.run_id == plan(f"schedule.kind={kind}", "schedule.decay=0.5").run_id
        assert "schedule.decay" not in made.identity
        assert made.schedule.decay == 0
        tree = made.to_dict()
        del tree["schedule"]["decay"]  # as it was written before there was one
        assert run_id_of(tree) == made.run_id
        assert Plan.from_dict(tree) == made
    made = plan("schedule.kind=wsd", "steps=100")
    assert made.schedule.decay == 20
    assert made.run_id != plan("schedule.kind=wsd", "steps=100", "schedule.decay=0.5").run_id
    assert made.identity["schedule.decay"] == 0.2
    assert [line for line in present.lines(made) if line.startswith("schedule")] == [
        "schedule     wsd, peak 0.001, 10 steps of warm-up, down to 0.0001 in the last 20 steps"
    ]


def test_every_schedule_and_optimizer_that_can_be_asked_for_has_a_row() -> None:
    assert set(typing.get_args(ScheduleKeys.model_fields["kind"].annotation)) == set(schedule.SHAPES)
    assert set(typing.get_args(OptimizerKeys.model_fields["kind"].annotation)) == set(optimizers.BY_KIND)
    assert set(cases.OPTIMIZERS) >= set(optimizers.BY_KIND), "the gate proves every optimizer"
    for row in optimizers.BY_KIND.values():
        for run_keys in row.parameters.values():
            assert set(run_keys) <= OptimizerKeys.model_fields.keys()


@pytest.mark.parametrize(
    ("type_", "parameters", "bytes_"),
    [
        ("AdamW", {}, 8),
        ("adam", {}, 8),
        ("SGD", {}, 0),
        ("SGD", {"momentum": 0.9}, 4),
        ("Lion", {}, 4),
        ("NAdam", {}, 8),
        ("AdamW", {"amsgrad": True}, 12),
        ("RMSprop", {}, 4),
        ("RMSprop", {"momentum": 0.9, "centered": True}, 12),
        ("ASGD", {}, 4),
        ("Adadelta", {}, 8),
        ("Muon", {}, 4),
    ],
)
def test_the_bytes_an_optimizer_keeps_of_each_element(type_: str, parameters: dict[str, Any], bytes_: int) -> None:
    assert optimizers.state_bytes(type_, parameters) == bytes_


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_the_resolved_config_is_as_recorded(
    plan: Make, zero: int, precision: str, request: pytest.FixtureRequest
) -> None:
    made = plan(f"zero={zero}", f"precision={precision}", "steps=100")
    golden = Path(__file__).parents[1] / "golden" / f"ds_config-z{zero}-{precision}.json"
    text = json.dumps({"config": made.deepspeed, "origins": dict(sorted(made.origins.items()))}, indent=2) + "\n"
    if os.environ.get("ACCEPT_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text(), "if the change is meant: ACCEPT_GOLDEN=1 make test ARGS=tests/unit/test_plan.py"


def test_every_key_of_every_cell_has_an_origin_and_none_is_auto(plan: Make) -> None:
    for zero in range(4):
        for precision in ("fp32", "fp16", "bf16"):
            made = plan(f"zero={zero}", f"precision={precision}")
            leaves = flatten(made.deepspeed)
            assert leaves.keys() == made.origins.keys()
            assert "auto" not in leaves.values()


def test_cells_of_a_comparison_share_their_arithmetic(plan: Make) -> None:
    for zero in range(4):
        for precision in ("fp32", "fp16", "bf16"):
            config = flatten(plan(f"zero={zero}", f"precision={precision}").deepspeed)
            assert config["communication_data_type"] == "fp32"
            assert config.get("data_types.grad_accum_dtype") == ("fp32" if zero else None)
            assert config["gradient_clipping"] == 1.0


def test_buckets_are_scaled_to_the_model(plan: Make) -> None:
    small = flatten(plan("zero=2").deepspeed)
    assert small["zero_optimization.reduce_bucket_size"] == plan().model.parameters
    big = flatten(plan("zero=2", "model=gpt2-124m", topology=GPUS).deepspeed)
    assert big["zero_optimization.reduce_bucket_size"] == 2**26


def test_a_key_that_two_files_decide_differently_names_both() -> None:
    leaves, origins = {}, {}
    dsconfig.merge(leaves, origins, {"a.b": 1, "c": 2}, "zero/1.json")
    dsconfig.merge(leaves, origins, {"c": 2}, "base.json")
    assert origins == {"a.b": "zero/1.json", "c": "zero/1.json"}
    with pytest.raises(RequestError) as caught:
        dsconfig.merge(leaves, origins, {"a.b": 3}, "precision/fp16.json")
    assert caught.value.what == "a.b is 1 in zero/1.json and 3 in precision/fp16.json"


def test_a_misspelt_deepspeed_key_is_refused_with_the_right_one(plan: Make) -> None:
    with pytest.raises(RequestError) as caught:
        plan("ds.gradient_cliping=0.5")
    assert "gradient_cliping" in caught.value.what
    assert "gradient_clipping" in caught.value.fix
    assert caught.value.where == "ds.gradient_cliping from the command line"


@pytest.mark.parametrize("value", ["auto", '"auto"'])
def test_auto_never_reaches_deepspeed(plan: Make, value: str) -> None:
    with pytest.raises(RequestError) as caught:
        plan(f"ds.zero_optimization.overlap_comm={value}")
    assert "auto" in caught.value.what


def test_a_users_deepspeed_key_wins_and_says_so(plan: Make) -> None:
    made = plan("zero=2", "ds.zero_optimization.overlap_comm=true")
    assert made.deepspeed["zero_optimization"]["overlap_comm"] is True
    assert made.origins["zero_optimization.overlap_comm"] == "ds.zero_optimization.overlap_comm from the command line"


def test_an_own_config_replaces_the_composition_and_is_completed(plan: Make, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(
        json.dumps({"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}, "gradient_clipping": 0.5})
    )
    made = plan(f"--ds-config={file}", "zero=2", "optimizer.clip=0.5")
    assert made.refused_by == []
    assert made.deepspeed["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000}
    assert made.origins["zero_optimization.reduce_bucket_size"] == "--ds-config mine.json"
    assert made.deepspeed["train_batch_size"] == 32
    assert made.clip == 0.5


def test_offload_is_added_to_an_own_config(plan: Make, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    made = plan(f"--ds-config={file}", "zero=3", "offload=cpu")
    assert made.deepspeed["zero_optimization"]["offload_param"] == {"device": "cpu"}
    assert made.refused_by == []


def test_every_disagreement_of_an_own_config_is_listed(plan: Make, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}, "train_batch_size": 64, "fp16": {"enabled": True}}))
    made = plan(f"--ds-config={file}", "zero=2", "batch.global=32", "precision=bf16")
    assert {violation["rule"] for violation in made.refused_by} == {"config-agrees-with-run-keys"}
    assert len(made.refused_by) == 3
    with pytest.raises(RequestError):
        made.require_allowed()


_NVME = {"nvme-needs-a-disk", "nvme-states-are-not-saved"}


@pytest.mark.parametrize(
    ("arguments", "broken"),
    [
        (["offload=cpu", "zero=2"], {"param-offload-needs-stage-3"}),
        (["offload=nvme", "zero=1"], _NVME | {"param-offload-needs-stage-3", "nvme-needs-stage-3"}),
        (["zero=2", "ds.zero_optimization.offload_param.device=cpu"], {"param-offload-needs-stage-3"}),
        (["ds.pipeline.stages=2"], {"no-pipeline-or-tensor-parallelism"}),
        (["offload=optimizer-cpu", "zero=0"], {"optimizer-offload-needs-sharding"}),
        (["offload=nvme", "zero=3"], _NVME),
        (
            ["offload=nvme", "zero=3", "checkpoint.every=0", "checkpoint.at_end=false"],
            {"nvme-needs-a-disk"},
        ),
        (["nvme_path=/disk"], {"nvme-path-needs-nvme"}),
        (["ds.scheduler.type=WarmupLR"], {"no-second-scheduler"}),
        (
            ["precision=fp32", "ds.torch_autocast.enabled=true", "ds.torch_autocast.dtype=float16", "zero=2"],
            {"config-agrees-with-run-keys"},
        ),
        (
            ["precision=bf16", "ds.torch_autocast.enabled=true", "ds.torch_autocast.dtype=bfloat16"],
            {"config-agrees-with-run-keys"},
        ),
        (["precision=bf16", "zero=0", "ds.data_types.grad_accum_dtype=fp32"], {"no-fp32-accumulation-at-stage-0"}),
        (["ds.tensor_parallel.autotp_size=2"], {"no-pipeline-or-tensor-parallelism"}),
        (["ds.train_batch_size=64"], {"config-agrees-with-run-keys"}),
        (["optimizer.beta1=0.5", "ds.optimizer.params.betas=[0.9,0.99]"], {"config-agrees-with-run-keys"}),
        (
            ["optimizer.beta1=0.5", "ds.optimizer.type=Lamb"],
            {"config-agrees-with-run-keys", "untested-optimizer-needs-consent"},
        ),
        (["ds.zero_optimization.compute_grad_norm=false"], {"gradient-norm-is-needed"}),
        (["precision=bf16", "ds.bf16.check_grad_overflow=false"], {"overflow-check-is-needed"}),
        (["precision=bf16-autocast", "ds.torch_autocast.dtype=float16"], {"config-agrees-with-run-keys"}),
        (["precision=bf16-autocast", "ds.bf16.enabled=true"], {"config-agrees-with-run-keys"}),
        (["precision=fp16-autocast", "zero=2"], set()),
        (["precision=fp16-autocast", "numerics.repairs=false"], {"fp16-autocast-needs-repairs"}),
        (["precision=bf16-autocast", "numerics.repairs=false"], set()),
        (["precision=tf32"], set()),
        (["precision=bf16", "keep_fp32=ln_f"], {"fp32-modules-need-autocast"}),
        (["lora.rank=8"], {"lora-keys-need-lora"}),
        (["offload=nvme", "zero=3", "ema.decay=0.9"], _NVME | {"no-average-on-nvme"}),
        (["precision=bf16-autocast", "keep_fp32=[ln_f,lm_head]"], set()),
        (["zero=1", "ds.zero_optimization.allgather_bucket_size=5001"], {"allgather-bucket-is-even"}),
        (["zero=2", "ds.zero_optimization.allgather_bucket_size=0"], {"allgather-bucket-is-even"}),
        (["zero=3", "ds.zero_optimization.zero_hpz_partition_size=3"], {"hpz-divides-the-ranks"}),
        (["ds.data_efficiency.data_routing.random_ltd=null"], {"key-is-fatal"}),
        (["ds.autotuning.enabled=true"], {"no-autotuning"}),
        (["zero=2", "ds.prescale_gradients=true"], {"no-scaling-before-a-reduce-scatter"}),
        (["zero=3", "ds.gradient_predivide_factor=2.0"], {"no-scaling-before-a-reduce-scatter"}),
        (["zero=2", "ds.bf16.bf16_master_weights_and_grads=true"], {"half-masters-need-cpu-adam"}),
        (["ds.optimizer.params.bias_correction=true"], {"adam-takes-its-own-parameters"}),
        (["ds.optimizer.params.torch_adam=false", "ds.optimizer.params.fused=true"], {"adam-takes-its-own-parameters"}),
        (["ds.optimizer.params.torch_adam=false", "ds.optimizer.params.bias_correction=true"], set()),
        (["ds.optimizer.type=Adam", "ds.optimizer.params.foreach=true"], {"adam-takes-its-own-parameters"}),
        (["ds.optimizer.params.fused=true", "ds.optimizer.params.foreach=true"], {"fused-or-foreach"}),
        (["ds.optimizer.params.foreach=true"], set()),
        (
            ["zero=2", "ds.bf16.bf16_optimizer_states=true", "offload=optimizer-cpu"],
            {"half-states-need-half-masters"},
        ),
        (["ds.zero_optimization.legacy_stage1=true"], {"no-legacy-stage-1"}),
        (["ds.optimizer.type=Adagrad", "zero=2"], {"adagrad-is-not-sharded"}),
        (["ds.optimizer.type=Adagrad", "zero=1", "precision=fp16"], {"adagrad-is-not-sharded"}),
        (["ds.optimizer.type=Adagrad", "zero=1", "precision=bf16"], set()),
        (["ds.optimizer.type=Adagrad", "zero=3", "offload=optimizer-cpu"], set()),
        (["ds.optimizer.type=LBFGS", "zero=0"], {"optimizer-takes-gradients-as-they-are"}),
        (["ds.optimizer.type=SparseAdam", "zero=0"], {"optimizer-takes-gradients-as-they-are"}),
        (["ds.optimizer.type=Muon", "zero=2"], {"no-clipping-after-muon"}),
        (["ds.optimizer.type=Muon", "zero=3"], {"no-clipping-after-muon"}),
        (["ds.optimizer.type=Muon", "zero=1", "precision=fp16"], {"no-clipping-after-muon"}),
        (["ds.optimizer.type=muon", "zero=1", "offload=optimizer-cpu"], {"no-clipping-after-muon"}),
        (["ds.optimizer.type=Muon", "zero=1", "ds.data_types.grad_accum_dtype=bf16"], {"no-clipping-after-muon"}),
        (["ds.optimizer.type=Muon", "zero=1", "precision=bf16"], set()),
        (["ds.optimizer.type=Muon", "zero=0", "precision=fp16"], set()),
        (["ds.optimizer.type=MuSGD", "zero=0"], {"mup-needs-base-shapes"}),
        (["ds.hybrid_engine.enabled=true"], {"no-hybrid-engine"}),
        (["zero=2", "ds.zero_optimization.zenflow.topk_ratio=0.1"], {"no-zenflow"}),
        (["ds.checkpoint.writer.type=fast"], {"halfstep-saves-checkpoints"}),
        (["ds.datastates_ckpt={}"], {"halfstep-saves-checkpoints"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_each_rule_refuses_what_it_is_for(plan: Make, arguments: list[str], broken: set[str]) -> None:
    assert {violation["rule"] for violation in plan(*arguments, topology=GPUS).refused_by} == broken


def test_a_users_own_optimizer_wins_over_defaults_and_not_over_run_keys(plan: Make) -> None:
    made = plan("ds.optimizer.params.lr=0.5")
    assert (made.schedule.peak, made.refused_by) == (0.5, [])
    assert [violation["rule"] for violation in plan("optimizer.lr=0.1", "ds.optimizer.params.lr=0.5").refused_by] == [
        "config-agrees-with-run-keys"
    ]
    lamb = plan("ds.optimizer.type=Lamb", topology=GPUS).deepspeed["optimizer"]
    assert (lamb["type"], set(lamb["params"])) == ("Lamb", {"lr", "weight_decay"})


def test_an_optimizer_that_deepspeed_has_not_tested_is_planned_with_consent_as_the_rule_says(plan: Make) -> None:
    lamb = plan("ds.optimizer.type=Lamb", topology=GPUS)
    assert [violation["fix"] for violation in lamb.refused_by] == [
        "add ds.zero_allow_untested_optimizer=true, or take zero=0"
    ]
    assert plan("ds.optimizer.type=Lamb", "ds.zero_allow_untested_optimizer=true", topology=GPUS).refused_by == []
    assert plan("ds.optimizer.type=Lamb", "zero=0", "precision=fp32", topology=GPUS).refused_by == []


def test_an_own_config_without_a_learning_rate_gets_the_planned_one(plan: Make, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 1}}))
    made = plan(f"--ds-config={file}")
    assert made.schedule.peak == 1e-3
    assert made.deepspeed["optimizer"]["params"]["torch_adam"] is True


def test_every_rule_is_tripped_by_a_test() -> None:
    tripped = {
        name for rule in test_each_rule_refuses_what_it_is_for.pytestmark for case in rule.args[1] for name in case[1]
    }
    tripped |= {"nvme-unproved-on-cpu", "gpu-only", "fused-optimizers-need-a-gpu", "tf32-needs-a-gpu"}
    assert tripped >= {rule.name for rule in rules.RULES}


def test_on_cpu_ranks_host_offload_is_allowed_and_nvme_and_tf32_are_not(plan: Make) -> None:
    assert [violation["rule"] for violation in plan("precision=tf32").refused_by] == ["tf32-needs-a-gpu"]
    assert plan("offload=optimizer-cpu", "zero=2").refused_by == []
    assert plan("offload=cpu", "zero=3").refused_by == []
    assert [violation["rule"] for violation in plan("offload=nvme", "zero=3", "nvme_path=/disk").refused_by] == [
        "nvme-unproved-on-cpu",
        "nvme-states-are-not-saved",
    ]


def test_what_only_gpus_can_do_is_refused_on_cpu_ranks(plan: Make) -> None:
    arguments = ["zero=3", "ds.zero_optimization.zero_quantized_weights=true", "batch.global=32"]
    (broken,) = plan(*arguments).refused_by
    assert broken["rule"] == "gpu-only"
    assert broken["where"].startswith("zero_optimization.zero_quantized_weights from ds.zero_optimization.zero_")
    assert plan(*arguments, topology=GPUS).refused_by == []
    assert plan("zero=2", *arguments[1:]).refused_by == [], "without effect below stage 3"


def test_optimizers_without_a_build_for_cpu_ranks_are_refused_there(plan: Make) -> None:
    untested = "ds.zero_allow_untested_optimizer=true"
    for arguments in (["ds.optimizer.type=Lamb", untested], ["ds.optimizer.type=Lion"]):
        assert [violation["rule"] for violation in plan(*arguments).refused_by] == ["fused-optimizers-need-a-gpu"]
        assert plan(*arguments, topology=GPUS).refused_by == []
    assert plan("ds.optimizer.type=Lion", "offload=optimizer-cpu").refused_by == []


def test_an_optimizer_is_given_no_parameter_that_it_does_not_take(plan: Make) -> None:
    made = plan("ds.optimizer.type=Rprop", "zero=0")
    assert made.deepspeed["optimizer"] == {"type": "Rprop", "params": {"lr": 1e-3}}
    assert made.refused_by == []
    assert set(plan("ds.optimizer.type=MuAdamW").deepspeed["optimizer"]["params"]) == {"lr", "weight_decay"}


def test_what_deepspeed_does_only_at_other_stages_is_allowed_there(plan: Make) -> None:
    assert plan("zero=3", "ds.zero_optimization.allgather_bucket_size=5001").refused_by == []
    assert plan("zero=1", "ds.prescale_gradients=true").refused_by == []
    assert plan("zero=2", "ds.prescale_gradients=true", "ds.zero_optimization.reduce_scatter=false").refused_by == []
    masters = ["ds.bf16.bf16_master_weights_and_grads=true", "ds.optimizer.params.torch_adam=false"]
    assert plan("zero=2", "offload=optimizer-cpu", *masters).refused_by == []


def test_half_precision_at_stage_0_is_warned_of_where_it_is_not_mended(plan: Make) -> None:
    for precision, fault in (("fp16", "never scales the loss"), ("bf16", "starts Adam one step late")):
        said = plan("zero=0", f"precision={precision}", "numerics.repairs=false").warnings
        (warning,) = [warning for warning in said if "TRUST" in warning]
        assert warning.startswith(f"DO NOT TRUST numerics.repairs=false with zero=0 precision={precision}")
        assert fault in warning
        assert not any("TRUST" in warning for warning in plan("zero=0", f"precision={precision}").warnings)
    for cell in (["zero=0", "precision=fp32"], ["zero=1", "precision=fp16"]):
        assert not any("TRUST" in warning for warning in plan(*cell, "numerics.repairs=false").warnings)


def test_the_run_id_is_the_question_not_its_place(plan: Make) -> None:
    assert plan().run_id == plan("out=/elsewhere", "log.every=3", "numerics.every=5", "numerics.max_skips=9").run_id
    others = [
        plan(*arguments).run_id
        for arguments in (
            ["seed=1"],
            ["zero=2"],
            ["steps=7"],
            ["optimizer.lr=1e-4"],
            ["batch.micro=4"],
            ["numerics.repairs=false"],
        )
    ]
    assert len({plan().run_id, *others}) == 7


def test_a_plan_survives_json(plan: Make) -> None:
    made = plan("zero=3", "precision=fp16")
    assert Plan.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def adam(made: Plan) -> tuple[bool, bool | None]:
    params = made.deepspeed["optimizer"]["params"]
    return params["torch_adam"], params.get("fused")


def test_adam_is_torchs_own_and_on_a_gpu_its_fused_one(plan: Make) -> None:
    assert adam(plan()) == (True, None)
    for zero in range(4):
        assert adam(plan(f"zero={zero}", topology=GPUS)) == (True, True)
    bare = dataclasses.replace(GPUS, fused_adam=False)
    assert adam(plan(topology=bare)) == (True, True), "it needs no compiler"
    assert "fused" not in plan("optimizer.kind=sgd", topology=GPUS).deepspeed["optimizer"]["params"]


def test_a_host_that_holds_the_states_steps_them_with_deepspeeds_adam_where_it_can_be_built(plan: Make) -> None:
    assert adam(plan("offload=optimizer-cpu", "zero=2", topology=GPUS)) == (False, None)
    bare = dataclasses.replace(GPUS, fused_adam=False)
    assert adam(plan("offload=optimizer-cpu", "zero=2", topology=bare)) == (True, None)
    assert adam(plan("offload=optimizer-cpu", "zero=2")) == (True, None)


def test_another_adam_on_a_gpu_is_had_by_asking_for_it(plan: Make, tmp_path: Path) -> None:
    assert adam(plan("ds.optimizer.params.torch_adam=false", topology=GPUS)) == (False, None)
    assert adam(plan("ds.optimizer.params.foreach=true", topology=GPUS)) == (True, None)
    assert adam(plan("ds.optimizer.params.fused=false", topology=GPUS)) == (True, False)
    file = tmp_path / "mine.json"
    for said, planned in (
        ({}, (True, True)),
        ({"torch_adam": False}, (False, None)),
        ({"fused": "auto"}, (True, True)),
    ):
        file.write_text(json.dumps({"optimizer": {"type": "AdamW", "params": said}}))
        assert adam(plan(f"--ds-config={file}", topology=GPUS)) == planned
    assert adam(plan(f"--ds-config={file}", "ds.optimizer.params.torch_adam=false", topology=GPUS)) == (False, None)


def test_peak_arithmetic_is_known_for_an_h100_and_unknown_for_a_cpu(plan: Make) -> None:
    assert plan(topology=GPUS).peak_flops == 989e12
    assert plan().peak_flops is None
    with pytest.raises(RequestError, match="hardware=h10"):
        plan("hardware=h10")


@pytest.mark.parametrize(("arguments", "what"), [
    (["sequence=200000"], "sequence=200000 is longer than the corpus, which has 100000 training tokens"),
    (["sequence=6000"], "sequence=6000 is longer than the validation split, which has 5000 tokens"),
    (["model.vocabulary=99"], "the data holds token id 99, and the model's embedding has only 99 rows"),
])  # fmt: skip
def test_a_corpus_that_does_not_fit_the_model_is_refused(plan: Make, arguments: list[str], what: str) -> None:
    with pytest.raises(RequestError) as caught:
        plan(*arguments)
    assert caught.value.what == what


def test_the_fragments_page_is_up_to_date() -> None:
    assert (assets.folder("ds_configs") / "README.md").read_text() == catalogue.page()


@pytest.mark.parametrize(
    "keys",
    [
        ("precision=bf16-autocast", "keep_fp32=ln_f,lm_head"),
        ("train=lora", "lora.targets=c_attn,c_fc"),
        ("documents=masked", "ema.decay=0.9", "ds.optimizer.params.betas=[0.9,0.99]"),
    ],
)
def test_a_run_is_the_same_run_when_it_comes_back_from_its_plan(
    plan: Callable[..., Plan], keys: tuple[str, ...]
) -> None:
    """What is a tuple in a request is a list in JSON: a resume compares both."""
    planned = plan(*keys)
    read = Plan.from_dict(json.loads(json.dumps(planned.to_dict())))
    assert planned.changed_from(read.identity) == []
    assert read.run_id == planned.run_id

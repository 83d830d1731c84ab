"""What may not be combined: a table of named rules, one sentence each, all violations reported together."""

from halfstep.launcher.config import optimizers, precisions
from halfstep.launcher.plan import rules_deepspeed
from halfstep.launcher.plan.ds import effects
from halfstep.launcher.plan.ds.dsconfig import OFFLOADS, PARALLELISM, UNDIVIDED, named
from halfstep.launcher.plan.rule import Case, Rule, Violation, keys, offload, offloaded, set_by

__all__ = ["RULES", "Case", "Rule", "Violation", "violations"]


def _divided(case: Case) -> list[str]:
    return [path for path in PARALLELISM if case.leaves.get(path) not in UNDIVIDED]


RULES: tuple[Rule, ...] = (
    Rule(
        name="param-offload-needs-stage-3",
        sentence="weights can move off the device only where they are sharded, at ZeRO stage 3",
        broken=lambda c: bool(offload(c, "param")) and c.spec.zero != 3,
        where=offloaded("param"),
        fix="take zero=3, or offload=optimizer-cpu at stages 1 to 3",
    ),
    Rule(
        name="optimizer-offload-needs-sharding",
        sentence="optimizer states can move to the host only at ZeRO stages 1 to 3",
        broken=lambda c: bool(offload(c, "optimizer")) and c.spec.zero == 0,
        where=offloaded("optimizer"),
        fix="take zero=1 or higher, or offload=none",
    ),
    Rule(
        name="nvme-needs-a-disk",
        sentence="NVMe offload has to know the folder it may fill",
        broken=lambda c: any(
            offload(c, what) == "nvme" and not c.leaves.get(f"zero_optimization.offload_{what}.nvme_path")
            for what in ("param", "optimizer")
        ),
        where=keys("offload", "nvme_path"),
        fix="give nvme_path=/FOLDER on a local NVMe disk",
    ),
    Rule(
        name="nvme-needs-stage-3",
        sentence="states can move to NVMe only at ZeRO stage 3",
        broken=lambda c: offload(c, "optimizer") == "nvme" and c.spec.zero in (1, 2),
        where=offloaded("optimizer"),
        fix="take zero=3, or offload=optimizer-cpu",
    ),
    Rule(
        name="nvme-path-needs-nvme",
        sentence="nvme_path does nothing without offload=nvme",
        broken=lambda c: c.spec.nvme_path is not None and c.spec.offload != "nvme",
        where=keys("offload", "nvme_path"),
        fix="add offload=nvme, or drop nvme_path",
    ),
    Rule(
        name="nvme-unproved-on-cpu",
        sentence="NVMe offload is unproved on CPU ranks (offload to host memory works there)",
        broken=lambda c: "nvme" in (offload(c, "param"), offload(c, "optimizer")) and c.topology.accelerator == "cpu",
        where=keys("offload"),
        fix="take offload=cpu, or plan for GPUs with hardware=NAME",
    ),
    Rule(
        name="nvme-states-are-not-saved",
        sentence="states that lie on NVMe cannot be saved yet, so that such a run cannot be resumed",
        broken=lambda c: (
            "nvme" in (offload(c, "param"), offload(c, "optimizer"))
            and (c.spec.checkpoint.every > 0 or c.spec.checkpoint.at_end)
        ),
        where=keys("offload"),
        fix="say that you want none: checkpoint.every=0 checkpoint.at_end=false; or take offload=cpu",
    ),
    Rule(
        name="no-second-scheduler",
        sentence="Halfstep writes the learning rate; a DeepSpeed scheduler would overwrite it",
        broken=lambda c: any(path.startswith("scheduler.") for path in c.leaves),
        where=lambda c: next(f"{p} from {c.origins[p]}" for p in c.leaves if p.startswith("scheduler.")),
        fix="drop it; use schedule.kind, schedule.warmup and schedule.min_ratio",
    ),
    Rule(
        name="fp32-modules-need-autocast",
        sentence="modules can stay in fp32 only where the weights are in fp32 and autocast multiplies in 16 bits",
        broken=lambda c: bool(c.spec.keep_fp32) and not precisions.of(c.spec.precision).autocast,
        where=lambda c: f"keep_fp32={','.join(c.spec.keep_fp32)} precision={c.spec.precision}",
        fix="take precision=bf16-autocast or fp16-autocast, or drop keep_fp32",
    ),
    Rule(
        name="no-average-on-nvme",
        sentence="the average of the masters is kept beside them, and cannot be where they lie on NVMe",
        broken=lambda c: bool(c.spec.ema.decay) and "nvme" in (offload(c, "param"), offload(c, "optimizer")),
        where=lambda c: f"ema.decay={c.spec.ema.decay:g} offload={c.spec.offload}",
        fix="take offload=cpu, or ema.decay=0",
    ),
    Rule(
        name="lora-keys-need-lora",
        sentence="lora.* does nothing where every parameter is trained",
        broken=lambda c: c.spec.train == "full" and any(key.startswith("lora.") for key in c.asked),
        where=lambda c: ", ".join(f"{key} from {c.asked[key]}" for key in c.asked if key.startswith("lora.")),
        fix="add train=lora, or drop it",
    ),
    Rule(
        name="tf32-needs-a-gpu",
        sentence="TF32 is arithmetic of NVIDIA's GPUs from Ampere on",
        broken=lambda c: c.spec.precision == "tf32" and c.topology.accelerator != "cuda",
        where=keys("precision"),
        fix="take precision=fp32, or plan for GPUs with hardware=NAME",
    ),
    Rule(
        name="fp16-autocast-needs-repairs",
        sentence="DeepSpeed 0.19.8 clips the gradients of fp16 autocast while they are still scaled at ZeRO 1 to 3 "
        "and hides their scale at stage 0; Halfstep scales them itself",
        broken=lambda c: c.spec.precision == "fp16-autocast" and not c.spec.numerics.repairs,
        where=lambda c: f"numerics.repairs=false precision={c.spec.precision}",
        fix="take numerics.repairs=true, or precision=fp16, whose faults at ZeRO 1 to 3 are none",
    ),
    Rule(
        name="no-fp32-accumulation-at-stage-0",
        sentence="fp32 gradient accumulation in half precision is not implemented at ZeRO stage 0 in DeepSpeed 0.19.8",
        broken=lambda c: (
            c.leaves.get("data_types.grad_accum_dtype") == "fp32"
            and c.spec.zero == 0
            and precisions.of(c.spec.precision).half_weights
        ),
        where=set_by("data_types.grad_accum_dtype"),
        fix="drop the key, or take zero=1",
    ),
    Rule(
        name="untested-optimizer-needs-consent",
        sentence="at ZeRO 1 to 3 DeepSpeed takes Adam, AdamW, Adagrad, Lion and Muon only, unless told otherwise",
        broken=lambda c: (
            c.spec.zero > 0
            and not optimizers.of(str(c.leaves.get("optimizer.type"))).tested_with_zero
            and not c.leaves.get("zero_allow_untested_optimizer")
        ),
        where=set_by("optimizer.type"),
        fix="add ds.zero_allow_untested_optimizer=true, or take zero=0",
    ),
    Rule(
        name="gradient-norm-is-needed",
        sentence="every step's record holds the gradient norm",
        broken=lambda c: c.leaves.get("zero_optimization.compute_grad_norm") is False,
        where=set_by("zero_optimization.compute_grad_norm"),
        fix="drop the key",
    ),
    Rule(
        name="overflow-check-is-needed",
        sentence="a step with a non-finite gradient is skipped in every cell, which needs DeepSpeed to look",
        broken=lambda c: c.leaves.get("bf16.check_grad_overflow") is False,
        where=set_by("bf16.check_grad_overflow"),
        fix="drop the key",
    ),
    Rule(
        name="no-pipeline-or-tensor-parallelism",
        sentence="Halfstep's batch equation and data order count data-parallel ranks only",
        broken=lambda c: bool(_divided(c)),
        where=lambda c: set_by(*_divided(c))(c),
        fix="leave it at 1",
    ),
    *rules_deepspeed.RULES,
)


def violations(case: Case) -> list[Violation]:
    """Return every rule a request breaks, then every key on which the DeepSpeed config and the run keys disagree."""
    broken = [
        Violation(rule=rule.name, sentence=rule.sentence, where=rule.where(case), fix=rule.fix)
        for rule in RULES
        if rule.broken(case)
    ]
    broken += _disagreements(case) + _offloaded_otherwise(case) + _dropped(case)
    return broken + _without_use(case, " ".join(violation.where for violation in broken))


def _without_use(case: Case, named_already: str) -> list[Violation]:
    """Return the keys that somebody set and that end a run, and those that do nothing.

    What does nothing in any run is refused where it is asked for as this one's own. A file may be shared with other
    programs, and a study pins what matters to some of its cells: those keys are warned of (cautions.py).
    """
    return [
        Violation(
            rule=f"key-is-{effect.kind}",
            sentence=f"{effect.path} {_USELESS[effect.kind]}: {effect.because}",
            where=origin,
            fix=effect.instead or "drop the key",
        )
        for effect, origin, in_a_file in effects.said(setting_of(case), case.origins)
        if effect.because and effect.path not in named_already
        if effect.kind == effects.FATAL or (effect.kind == effects.INERT and effect.always and not in_a_file)
    ]


def setting_of(case: Case) -> effects.Setting:
    """Return what the effect of a key depends on."""
    return effects.Setting(
        zero=case.spec.zero, precision=case.spec.precision, topology=case.topology, leaves=case.leaves
    )


_USELESS = {effects.FATAL: "ends or breaks a run", effects.INERT: "does nothing"}


def _dropped(case: Case) -> list[Violation]:
    """Return the run keys that were asked for and have no place beside the user's own optimizer."""
    return [
        Violation(
            rule="config-agrees-with-run-keys",
            sentence=f"{origin} has no place in the optimizer {case.leaves.get('optimizer.type')}",
            where=case.origins.get("optimizer.type", "the DeepSpeed config"),
            fix=f"drop the {origin}, or set ds.optimizer.params.* directly",
        )
        for path, (_, origin) in case.demanded.items()
        if path not in case.leaves and path != "optimizer.type" and _was_asked_for(case, path, origin)
    ]


def _offloaded_otherwise(case: Case) -> list[Violation]:
    """Return where something stays or goes that the run key `offload`, which somebody set, has elsewhere."""
    if "offload" not in case.asked:
        return []
    paths = [f"zero_optimization.offload_{what}.device" for what in ("optimizer", "param")]
    return [
        Violation(
            rule="config-agrees-with-run-keys",
            sentence=f"{path} is {case.leaves[path]!r} in the DeepSpeed config, but run key offload makes it "
            f"{device!r}",
            where=f"{case.origins[path]} and offload from {case.asked['offload']}",
            fix=f"change offload, which decides it, and drop {path}",
        )
        for path, device in zip(paths, OFFLOADS[case.spec.offload], strict=True)
        if path not in case.demanded and case.leaves.get(path, device) != device
    ]


def _disagreements(case: Case) -> list[Violation]:
    violated = []
    for path, (value, origin) in case.demanded.items():
        if case.leaves.get(path, value) == value or not _was_asked_for(case, path, origin):
            continue
        keys = ["batch.global", "batch.micro"] if origin == "the batch equation" else named(origin)
        asked = [f"{key} from {case.asked[key]}" for key in keys if key in case.asked]
        default = "" if asked else ", left at its default,"
        violated.append(
            Violation(
                rule="config-agrees-with-run-keys",
                sentence=f"{path} is {case.leaves[path]!r} in the DeepSpeed config, but {origin}{default} makes it "
                f"{value!r}",
                where=" and ".join([case.origins[path], *asked]),
                fix=f"change {' or '.join(keys)}, which decides it, and drop {path}",
            )
        )
    return violated


def _was_asked_for(case: Case, path: str, origin: str) -> bool:
    """Tell whether a disagreement is one: an optimizer key of the user's own wins over a mere default of ours."""
    return not path.startswith("optimizer.") or any(key in case.asked for key in named(origin))

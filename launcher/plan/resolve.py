"""Turn a request into a Plan: pure, so that every rank and every machine works out the same one."""

import dataclasses
from typing import Any

from halfstep.launcher.config import task_file
from halfstep.launcher.config.bucket_sizes import Sizes
from halfstep.launcher.config.digest import digest, identity
from halfstep.launcher.config.load import Request
from halfstep.launcher.config.schema import RunSpec
from halfstep.launcher.corpus.description import DataFacts
from halfstep.launcher.errors import RequestError
from halfstep.launcher.forecast import hardware
from halfstep.launcher.plan import adapter_plan, data_plan, estimate, routers, rules, schedule
from halfstep.launcher.plan import batch as batch_equation
from halfstep.launcher.plan.cautions import of_beginnings, warnings_of, without_effect
from halfstep.launcher.plan.data_plan import DataPlan
from halfstep.launcher.plan.ds import adopt, dsconfig
from halfstep.launcher.plan.ds.dsfile import Own
from halfstep.launcher.plan.facts import Facts
from halfstep.launcher.plan.plan import CheckpointPlan, ModelPlan, NumericsPlan, Plan, TaskPlan, WatchPlan, run_id_of
from halfstep.launcher.plan.pretrained import ModelFacts
from halfstep.launcher.topology import Topology
from halfstep.models import shapes
from halfstep.models.presets import PRESETS

_DEFAULT_STEPS = 1000
_LONGEST_DEFAULT_SEQUENCE = 8192
_DEFAULT_SEQUENCE = 1024
"""Tokens, of an `hf:` model that can look at more."""


def resolve(request: Request, topology: Topology, facts: Facts) -> Plan:
    """Decide everything about a run; raises RequestError for what cannot be decided, lists broken rules in the plan."""
    asked = request.spec
    request, own = adopt.adopt(request, facts.ds_config, topology)
    spec = request.spec
    plan = _decided(asked, request, own, topology, facts, spec.batch.micro)
    if spec.batch.micro is None and topology.accelerator == "cuda":
        # What fits can be told of a whole plan only; nothing else in it depends on the micro-batch.
        micro, because = estimate.micro_of(plan, facts, spec.hardware)
        plan = dataclasses.replace(_decided(asked, request, own, topology, facts, micro), micro_because=because)
    plan = dataclasses.replace(
        plan,
        memory=estimate.memory_of(plan, facts, spec.hardware),
        time=estimate.time_of(plan, facts, spec.hardware),
    )
    return dataclasses.replace(plan, run_id=run_id_of(plan.to_dict())) if plan.data.known else plan


def _decided(
    asked: RunSpec, request: Request, own: Own | None, topology: Topology, facts: Facts, micro: int | None
) -> Plan:
    """Return the plan with a micro-batch, without what is predicted of it and without its id."""
    spec = request.spec
    model, sizes, sequence = _model(spec, facts)
    lora = adapter_plan.decide(spec, facts, model)
    if lora is not None:
        model = dataclasses.replace(model, flops_per_token=adapter_plan.flops_per_token(model, facts, lora, sequence))
    router_loss = routers.coefficient(spec, facts)
    data = _data(spec, facts, sequence, model.vocabulary)
    batch = batch_equation.solve(
        spec.batch.global_, micro, topology.ranks.data, request.origins.get("batch.global", "batch.global")
    )
    tokens_per_step = batch.global_ * sequence
    steps = spec.steps or (-(-spec.tokens // tokens_per_step) if spec.tokens else _DEFAULT_STEPS)
    learning_rate = spec.optimizer.lr or schedule.default_peak(model.parameters)
    composed = dsconfig.compose(
        spec,
        batch=batch,
        learning_rate=learning_rate,
        sizes=sizes,
        topology=topology,
        own=own,
        request_origins=request.origins,
    )
    curve = _schedule(spec, float(composed.leaves["optimizer.params.lr"]), steps)
    default_peak = curve.peak if composed.origins["optimizer.params.lr"] == schedule.BY_SIZE else None
    demanded = dsconfig.demanded_by_run_keys(spec, batch, learning_rate, topology)
    case = rules.Case(
        spec=spec,
        topology=topology,
        leaves=composed.leaves,
        origins=composed.origins,
        demanded=demanded,
        asked=request.origins,
    )
    decided: dict[str, Any] = {
        "identity": _identity(asked, facts, batch, data, model, router_loss),
        "model": model,
        "data": data,
        "batch": batch,
        "topology": topology,
        "sequence": sequence,
        "steps": steps,
        "tokens": steps * tokens_per_step,
        "zero": spec.zero,
        "precision": spec.precision,
        "seed": spec.seed,
        "activation_checkpointing": spec.activation_checkpointing,
        "compile": spec.compile,
        "fused_head": spec.fused_head,
        "documents": spec.documents,
        "keep_fp32": list(spec.keep_fp32),
        "router_loss": router_loss,
        "lora": lora,
        "ema_decay": spec.ema.decay,
        "trust_remote_code": spec.trust_remote_code,
        "schedule": curve,
        "clip": float(composed.leaves["gradient_clipping"]),
        "numerics": NumericsPlan(**spec.numerics.model_dump()),
        "checkpoint": CheckpointPlan(**spec.checkpoint.model_dump()),
        "watch": WatchPlan(**spec.watch.model_dump()),
        "eval_every": spec.eval.every,
        "tasks": _tasks(facts, shapes.from_hf_config(model.config)),
        "tasks_every": spec.eval.tasks_every,
        "log_every": spec.log.every,
        "peak_flops": hardware.peak_flops(spec.hardware, topology.device_name, spec.precision, facts.hardware),
        "deepspeed": composed.config(),
        "origins": composed.origins,
        "memory": {},
        "warnings": [
            *warnings_of(spec, batch, data, curve, sequence),
            *of_beginnings(spec, model.weights, facts.data, _division(spec, sequence), default_peak),
            *routers.warnings(spec, facts, router_loss),
            *(own.warnings if own else ()),
            *composed.left_out,
            *without_effect(rules.setting_of(case), composed.origins),
        ],
        "refused_by": [dataclasses.asdict(violation) for violation in rules.violations(case)],
    }
    return Plan(run_id="", time={}, **decided)


def _identity(
    asked: RunSpec, facts: Facts, batch: batch_equation.Batch, data: DataPlan, model: ModelPlan, router_loss: float
) -> dict[str, Any]:
    """Return what makes two plans the same run."""
    mixed = {"data.weights": data.weights} if data.parts else {}
    packed = {"packing": asked.packing, "too_long": asked.too_long} if data.has_examples else {}
    return {
        **identity(asked),
        **({"model.router_loss": router_loss} if router_loss else {}),  # runs without one are older than this key
        # The file's digest stands for the rest of what it says; a global batch may follow from the ranks as well.
        "batch.global": batch.global_,
        "data": digest([part.digest for part in data.parts]) if data.parts else data.digest,
        **mixed,
        **packed,
        "weights": model.weights_digest,
        "ds_config": digest(facts.ds_config) if facts.ds_config else None,
    }


def _schedule(spec: RunSpec, peak: float, steps: int) -> schedule.Schedule:
    keys = spec.schedule
    return schedule.Schedule(
        kind=keys.kind,
        peak=peak,
        warmup=schedule.default_warmup(steps) if keys.warmup is None else keys.warmup,
        steps=steps,
        min_ratio=keys.min_ratio,
        decay=max(1, round(keys.decay * steps)) if keys.kind == "wsd" else 0,
    )


def _model(spec: RunSpec, facts: Facts) -> tuple[ModelPlan, Sizes, int]:
    keys = spec.model
    where = f"model={keys.name}"
    try:
        if facts.model is None:
            preset = PRESETS[keys.name]
            sequence = spec.sequence or min(preset.context, _LONGEST_DEFAULT_SEQUENCE)
            vocabulary = keys.vocabulary or preset.vocabulary or (facts.data.vocabulary if facts.data else None)
            if vocabulary is None:
                raise _no_vocabulary(keys.name, facts)
            shape: shapes.Shape | None = shapes.shape_of(
                preset,
                layers=keys.layers,
                width=keys.width,
                heads=keys.heads,
                dropout=keys.dropout,
                vocabulary=vocabulary,
                sequence=sequence,
            )
            config, weights, network = shapes.hf_config(shape), None, None
        else:
            config, weights, network = facts.model.config, facts.model.weights, facts.model.network
            shape, vocabulary = shapes.from_hf_config(config), network.vocabulary
            longest = network.positions
            sequence = spec.sequence or min(_DEFAULT_SEQUENCE, longest or _DEFAULT_SEQUENCE)
            if longest is not None and sequence > longest:
                raise ValueError(f"sequence={sequence} is longer than the model's {longest} positions")
            _same_tokenizer(facts, where)
    except ValueError as error:
        raise RequestError(
            str(error), where=where, fix="change model.layers, model.width, model.heads or sequence"
        ) from None
    if shape is not None:
        parameters, flops = shapes.parameters(shape), shapes.flops_per_token(shape, sequence, "causal")
        active: int | None = parameters
        sizes = Sizes(parameters=parameters, largest_tensor=shapes.largest_tensor(shape), width=shape.width)
    else:
        assert network is not None, "facts construct a model whose family the formulas do not know"
        parameters, flops, active = network.parameters, network.flops_per_token(sequence), network.active_parameters
        # From the config's own words where it has them: other bucket sizes would give a run that is known another id.
        width = int(
            config.get("hidden_size", config.get("d_model", network.width if "text_config" in config else 1024))
        )
        sizes = Sizes(parameters=parameters, largest_tensor=vocabulary * width, width=width)
    model = ModelPlan(
        name=keys.name,
        config=config,
        weights=weights,
        weights_digest=facts.model.weights_digest if facts.model else None,
        parameters=parameters,
        flops_per_token=flops,
        vocabulary=vocabulary,
        active_parameters=active,
    )
    return model, sizes, sequence


def _no_vocabulary(name: str, facts: Facts) -> RequestError:
    if facts.data is None:
        return RequestError(
            f"{name} takes the vocabulary of the data's tokenizer, and no data was named",
            where=f"model={name}",
            fix="give data=DIR, or model.vocabulary=N",
        )
    return RequestError(
        f"{name} takes the tokenizer's vocabulary, and this corpus does not say it",
        where=f"data={facts.data.path}",
        fix="give model.vocabulary=N, larger than the largest token id",
    )


def _same_tokenizer(facts: Facts, where: str) -> None:
    model, data = facts.model, facts.data
    if model and data and data.has_tokenizer and model.tokenizer.same(data.tokenizer) is False:
        raise RequestError(
            "the data was made with another tokenizer than the model's own",
            where=f"{where} and data={data.path}",
            fix=f"prepare the data again with --tokenizer {model.tokenizer_place or 'DIR'}",
        )


def _data(spec: RunSpec, facts: Facts, sequence: int, vocabulary: int) -> DataPlan:
    data = facts.data
    if data is None:
        return DataPlan.unknown()
    _require_rows(spec, data, facts.model, vocabulary)
    return data_plan.divided(data, _division(spec, sequence))


def _division(spec: RunSpec, sequence: int) -> data_plan.Division:
    return data_plan.Division(
        sequence=sequence, evaluated=spec.eval.sequences, packing=spec.packing, too_long=spec.too_long
    )


def _tasks(facts: Facts, shape: shapes.Shape | None) -> list[TaskPlan]:
    if shape is not None:
        for task in facts.tasks:
            task_file.require_room(task, shape.positions)
    if facts.tasks and facts.data is not None and not facts.data.has_tokenizer:
        raise RequestError(
            "a bare token pair says nothing of its tokenizer, without which a task is no tokens",
            where=f"eval.tasks and data={facts.data.path}",
            fix="prepare the data with `halfstep data prepare`, or judge an export by the task with `halfstep eval`",
        )
    return [TaskPlan(name=task.spec.name, path=str(task.path), digest=task.digest) for task in facts.tasks]


def _require_rows(spec: RunSpec, data: DataFacts, model: ModelFacts | None, vocabulary: int) -> None:
    """Refuse tokens for which the embedding has no row; a token of the tokenizer that no text uses needs none."""
    largest = data.max_token_id
    needed = data.vocabulary if largest is None else largest + 1
    if needed is None or needed <= vocabulary:
        return
    if model is None or model.weights is None:
        fix = f"give model.vocabulary={data.vocabulary}, or prepare the data with a tokenizer of {vocabulary} tokens"
    elif model.tokenizer.same(data.tokenizer):
        fix = f"give the model a row for each of its tokens (transformers: resize_token_embeddings({data.vocabulary}))"
    else:
        fix = f"prepare the data again with the model's own tokenizer, or with another of {vocabulary} tokens or less"
    raise RequestError(
        f"the data's tokenizer has {data.vocabulary} tokens, the model's embedding only {vocabulary} rows"
        if largest is None
        else f"the data holds token id {largest}, and the model's embedding has only {vocabulary} rows",
        where=f"data={data.path} and model={spec.model.name}",
        fix=fix,
    )

"""Show a Plan to a person."""

from halfstep.launcher.config.dotted import flatten
from halfstep.launcher.forecast import memory_table, time_table
from halfstep.launcher.plan.data_plan import DataPlan
from halfstep.launcher.plan.ds import effects
from halfstep.launcher.plan.plan import Plan


def headline(plan: Plan) -> list[str]:
    """Return the two lines with which a run introduces itself."""
    topology = plan.topology
    return [
        f"{plan.model.name}: {_parameters(plan)}, zero={plan.zero} precision={plan.precision} on "
        f"{topology.world_size} x {topology.device_name or topology.accelerator}",
        f"{plan.steps:,} steps of {plan.batch.global_} x {plan.sequence} tokens; batch {plan.batch.equation()}",
    ]


def warnings(plan: Plan) -> list[str]:
    """Return the plan's warnings, each as a loud line."""
    return [f"WARNING: {warning}" for warning in plan.warnings]


def lines(plan: Plan) -> list[str]:
    """Return the plan as text: shape, batch equation, data, memory, the resolved config with origins, and refusals."""
    model, data = plan.model, plan.data
    text = [
        f"model        {model.name}: {_parameters(plan)}, {_shape(model.config)}, vocabulary {model.vocabulary:,}",
        f"             {f'weights from {model.weights}' if model.weights else 'fresh weights'}, seed {plan.seed}",
        *_adapters(plan),
        *([f"average      of the masters, {plan.ema_decay:g} of it stays at each step"] if plan.ema_decay else []),
        *([f"routers      their auxiliary loss x {plan.router_loss:g} is added"] if plan.router_loss else []),
        f"cell         zero={plan.zero} precision={plan.precision}"
        + (f", {', '.join(plan.keep_fp32)} in fp32" if plan.keep_fp32 else ""),
        f"batch        {plan.batch.equation()}",
        *([f"             micro-batch {plan.batch.micro}: {plan.micro_because}"] if plan.micro_because else []),
        f"sequence     {plan.sequence} tokens; {plan.batch.global_ * plan.sequence:,} tokens a step",
        f"length       {plan.steps:,} steps, {plan.tokens:,} tokens",
        f"data         {_data(data)}",
        *_parts(data, plan.batch.global_ * plan.steps),
        *(f"examples     {line}" for line in examples(data)),
        *(["documents    apart: attention and positions stay within each"] if plan.documents_apart else []),
        *(f"task         {task.name}: {task.path}{_judging(plan)}" for task in plan.tasks),
        f"schedule     {plan.schedule.kind}, peak {plan.schedule.peak:g}, {plan.schedule.warmup} steps of warm-up, "
        f"down to {plan.schedule.peak * plan.schedule.min_ratio:g}"
        + (f" in the last {plan.schedule.decay} steps" if plan.schedule.decay else ""),
        f"ranks        {plan.topology.world_size} on {plan.topology.nodes} node(s), "
        f"{plan.topology.device_name or plan.topology.accelerator}",
        *memory_table.lines(plan.memory, plan.activation_checkpointing),
        *time_table.lines(plan.time, answers=bool(plan.tasks)),
        f"checkpoints  {_checkpoints(plan)}",
        f"run id       {plan.run_id or 'needs data='}",
        "",
        "DeepSpeed config, what each key does (docs/deepspeed-keys.md), and where it comes from",
    ]
    leaves, setting = flatten(plan.deepspeed), plan.setting()
    width = max(len(key) for key in leaves) + max(len(_value(value)) for value in leaves.values()) + 2
    for key in sorted(leaves):
        effect = effects.of(key, setting).kind
        text.append(f"  {f'{key} {_value(leaves[key]):>{width - len(key) - 1}}'}  # {effect:<8}  {plan.origins[key]}")
    text += ["", *warnings(plan)]
    for broken in plan.refused_by:
        text.append(f"REFUSED by rule {broken['rule']}: {broken['sentence']}")
        text += [f"     from: {broken['where']}", f"      try: {broken['fix']}"]
    return text if text[-1] else text[:-1]


def _parameters(plan: Plan) -> str:
    model, active = plan.model, plan.model.active_parameters
    part = "" if active in (None, model.parameters) else f", {active:,} of them active per token"
    if plan.lora is None:
        return f"{model.parameters:,} parameters{part}"
    every = model.parameters + plan.lora.parameters
    share = plan.lora.parameters / every
    return f"{plan.lora.parameters:,} trained of {every:,} parameters ({share:.2%}){part}"


def _adapters(plan: Plan) -> list[str]:
    lora = plan.lora
    if lora is None:
        return []
    dropout = f", dropout {lora.dropout:g}" if lora.dropout else ""
    return [
        f"adapters     rank {lora.rank}, alpha {lora.alpha:g}{dropout}, in {lora.layers} layers: "
        f"{', '.join(lora.targets)}; all else is frozen"
    ]


def _data(data: DataPlan) -> str:
    if not data.known:
        return "none named: how often it is read and what evaluation takes need data="
    what = f"{len(data.parts)} corpora by weight" if data.parts else data.path
    return (
        f"{what}: {data.train_tokens:,} training tokens in {data.train_windows:,} sequences; "
        f"{data.validation_windows} validation sequences"
    )


def examples(data: DataPlan) -> list[str]:
    """Return a line on the examples of each corpus that has some: how they become sequences, and what is lost."""
    said = []
    for corpus in data.corpora:
        if (about := corpus.examples) is None:
            continue
        name = f"{corpus.path}: " if data.parts else ""
        how = "whole beside each other" if about.packing else "one in each sequence"
        line = f"{name}{about.train:,} for training and {about.validation:,} for validation, {how}; "
        line += f"{100 * about.padding:.1f} % of an epoch is padding; the longest has {about.longest:,} tokens"
        if about.longer:
            line += f"; {about.longer:,} longer than the sequence are {'cut' if about.too_long == 'cut' else 'dropped'}"
        said.append(line)
    return said


def _parts(data: DataPlan, sequences: int) -> list[str]:
    """Return the table of a mixture: of a run of so many sequences, how often each part is read."""
    if not data.parts:
        return []
    rows = [("part", "weight", "tokens", "windows", "validation", "epochs")]
    for part, epochs in zip(data.parts, data.epochs(sequences), strict=True):
        counts = (f"{part.train_tokens:,}", f"{part.train_windows:,}", f"{part.validation_windows:,}")
        rows.append((part.path, f"{part.weight:.4g}", *counts, f"{epochs:.3g}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        f"             {row[0]:<{widths[0]}}"
        + "".join(f"  {text:>{width}}" for text, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]


def _judging(plan: Plan) -> str:
    if plan.tasks_every is None:
        return ", at every evaluation"
    return (
        f", at evaluations after multiples of {plan.tasks_every} steps, and at the end"
        if plan.tasks_every
        else ", at the end"
    )


def _checkpoints(plan: Plan) -> str:
    keep, when = plan.checkpoint, []
    if keep.every:
        when.append(f"every {keep.every} steps")
    if keep.at_end:
        when.append("at the end")
    kept = f"the newest {keep.keep}" + (f" and every {keep.keep_every}th step's" if keep.keep_every else "")
    return f"{' and '.join(when)}, {kept} are kept" if when else "none, unless the run is stopped"


def _value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:,}".replace(",", "_") if isinstance(value, int) else str(value)


def _shape(config: dict) -> str:
    text = config.get("text_config")
    config = {**config, **text} if isinstance(text, dict) else config

    def first(*names: str) -> object:
        return next((config[name] for name in names if name in config), "?")

    layers, width, heads = (
        first("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"),
        first("hidden_size", "n_embd", "d_model"),
        first("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"),
    )
    return f"{layers} layers x {width} wide, {heads} heads"

"""The verb plan: decide about one run, search for the fastest way to make it, score what was predicted."""

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from halfstep.launcher import topology
from halfstep.launcher.config import legal
from halfstep.launcher.config.load import Request, load
from halfstep.launcher.config.schema import run_keys
from halfstep.launcher.errors import HalfstepError, RefusedError, RequestError
from halfstep.launcher.forecast import hardware, memory, run_estimate, search, time_table
from halfstep.launcher.plan import estimate, facts, present
from halfstep.launcher.plan import plan as plans
from halfstep.launcher.plan.ds import adopt, packages
from halfstep.launcher.plan.pretrained import Network, Source
from halfstep.launcher.plan.resolve import resolve
from halfstep.launcher.rundir import prediction_errors
from halfstep.launcher.system.terminal import say, say_json
from halfstep.launcher.topology import Topology

_OFFLOADS = ("none", "optimizer-cpu", "cpu")
_MOST_TRIED = 64
"""Node counts, or GPU counts, of one search."""


def add(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verb to the command."""
    keys = "\n".join(f"  {name:<28} {sentence}" for name, sentence in run_keys().items())
    text = "decide everything about a run, show it, and start nothing"
    parser = verbs.add_parser(
        "plan",
        help=text,
        description=f"{text}; `plan score` compares predictions with what was measured",
        parents=[common],
        epilog=f"run keys:\n{keys}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="*", metavar="RUN.toml | key=value | score RUN...")
    parser.add_argument("--ds-config", metavar="FILE", help="a DeepSpeed JSON used instead of the composition")
    parser.set_defaults(verb=run)
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument("--price", metavar="P", help="of one device-hour: print what the run costs")
    parser.add_argument("--time-limit", metavar="T", help="of one SLURM job, such as 12:00:00: print how many it takes")
    parser.add_argument(
        "--search",
        action="store_true",
        help="rank stage, offload, micro-batch and checkpointing by predicted time among those that fit; "
        "nodes=1,2,4 gpus=8 name what to try",
    )
    parser.add_argument("--rows", type=Path, metavar="IN.csv", help="with `plan score`: published runs to predict")
    parser.add_argument("--predict", type=Path, metavar="OUT.csv", help="with `plan score`: where predictions go")


def run(arguments: argparse.Namespace, words: list[str]) -> int:
    """Decide and show, search, or score."""
    if words[:1] == ["score"]:
        return _score(arguments, words[1:])
    for name in ("rows", "predict"):
        if getattr(arguments, name):
            raise RequestError(
                f"--{name} belongs to `plan score`", where="the command line", fix="halfstep plan score --rows IN.csv"
            )
    terms = _terms(arguments)
    if arguments.search:
        return _search(arguments, words)
    request = _request(arguments, words)
    world = _world(request)
    read = _facts(request, world)
    plan = resolve(request, world, read)
    missing = [dataclasses.asdict(rule) for rule in packages.missing(plan.deepspeed, plan.origins)]
    plan = dataclasses.replace(
        plan,
        time=estimate.time_of(plan, read, request.spec.hardware, terms),
        refused_by=[*plan.refused_by, *missing],
    )
    if arguments.json:
        say_json(plan.to_dict())
    else:
        say(*present.lines(plan))
    return HalfstepError.exit_code if plan.refused_by else 0


def _request(arguments: argparse.Namespace, words: list[str]) -> Request:
    own = [] if arguments.ds_config is None else [f"--ds-config={arguments.ds_config}"]
    return load([*words, *own], data=False)


def _world(request: Request) -> Topology:
    """Return the ranks that the request names: on the devices found here, or on those it names."""
    spec = request.spec
    ranks_per_node = spec.gpus_per_node or topology.default_ranks_per_node()
    world = topology.describe((spec.nodes or 1) * ranks_per_node, ranks_per_node)
    if spec.hardware and spec.hardware != hardware.THIS_CPU and world.accelerator == "cpu":
        # Planned on a login node for the GPUs of another.
        return dataclasses.replace(world, accelerator="cuda", device_name=spec.hardware)
    return world


def _facts(request: Request, world: Topology) -> facts.Facts:
    """Read what a plan depends on; the memory of CPU ranks is this host's where it is the only one."""
    here = topology.node_memory_bytes() if world.accelerator == "cpu" and world.nodes == 1 else None
    return facts.read(request.spec, _construct, here)


def _construct(source: Source, config: dict[str, Any], trust_remote_code: bool) -> Network:
    from halfstep.launcher.engine.construct import construct

    return construct(source, config, trust_remote_code)


def _terms(arguments: argparse.Namespace) -> run_estimate.Terms:
    from halfstep.launcher.submit.times import seconds

    limit = None
    if arguments.time_limit is not None:
        try:
            limit = seconds(arguments.time_limit)
        except ValueError as error:
            raise RequestError(
                f"--time-limit: {legal.shown(error)}", where="the command line", fix="--time-limit 12:00:00"
            ) from None
        if limit == 0:
            raise RequestError("--time-limit is zero", where="the command line", fix="--time-limit 12:00:00")
    return run_estimate.Terms(
        limit_seconds=limit,
        price=None if arguments.price is None else run_estimate.price(arguments.price),
    )


def _search(arguments: argparse.Namespace, words: list[str]) -> int:
    device, capacity, starts, refused, world = None, None, [], [], None
    for request, start_world in _requests(arguments, words):
        read = _facts(request, start_world)
        plan = resolve(request, start_world, read)
        world = start_world
        device = hardware.of(request.spec.hardware, start_world.device_name, start_world.accelerator, read.hardware)
        capacity = plan.memory["capacity_bytes"]
        if plan.refused_by:
            refused.append(plan)
            continue
        asked = adopt.adopt(request, read.ds_config, start_world.world_size)[0].origins
        starts.append(
            search.Start(
                nodes=start_world.nodes,
                offload=request.spec.offload,
                setting=estimate.workload_of(plan),
                micro=plan.batch.micro if "batch.micro" in asked else None,
                checkpointing=plan.activation_checkpointing if "activation_checkpointing" in asked else None,
            )
        )
    if device is None:
        raise RequestError(
            "there is no time to rank by: the device is not known",
            where="the devices found here" if world and world.accelerator == "cuda" else "this machine's CPU",
            fix="name it with hardware=NAME, or let `halfstep doctor --measure` measure this CPU",
        )
    if not starts:
        _refuse(refused)
    found = search.search(starts, device, capacity, memory.forecast)
    if not found:
        raise RequestError(
            "no time can be told for this model or precision on this device",
            where=f"hardware {device.name}",
            fix="take a model whose configuration is complete, or another precision",
        )
    fitting = [one for one in found if one.fits]
    if arguments.json:
        tree = {"hardware": device.name, "searched": len(found), "fitting": len(fitting)}
        tree |= {"candidates": [one.to_dict() for one in found]}
        tree |= {"frontier": [one.to_dict() for one in search.frontier(found)]}
        say_json(tree)
        return 0 if fitting else RefusedError.exit_code
    if not fitting:
        least = min(found, key=lambda one: one.peak_bytes)
        raise RefusedError(
            f"none of {len(found)} candidates fits a {device.name}; the least needs {least.peak_bytes / 2**30:.1f} GiB",
            where=" ".join(least.words()),
            fix="take more nodes, a shorter sequence, or a device with more memory",
        )
    say(f"{len(found)} candidates on {device.name}, {len(fitting)} fit; * nothing is faster with less memory")
    say(*time_table.found(found))
    say(f"the fastest: {' '.join(fitting[0].words())}")
    return 0


def _refuse(refused: list[plans.Plan]) -> None:
    for plan in refused:
        plan.require_allowed()
    raise RequestError("there is nothing to search", where="the command line", fix="name nodes=1 gpus=8")


def _requests(arguments: argparse.Namespace, words: list[str]) -> Iterator[tuple[Request, Topology]]:
    """Return one request for every node count, GPU count, stage and offload that the words leave open."""
    fixed, axes = _axes(words)
    for nodes in axes["nodes"]:
        for gpus in axes["gpus_per_node"]:
            sized = [*fixed, *([f"nodes={nodes}"] if nodes else []), *([f"gpus_per_node={gpus}"] if gpus else [])]
            first = _request(arguments, sized)
            world = _world(first)
            known, _ = adopt.adopt(first, facts.ds_config(first.spec), world.world_size)
            if "batch.global" not in known.origins:  # the default need not divide by so many ranks
                share = -(-known.spec.batch.global_ // world.world_size)
                sized.append(f"batch.global={share * world.world_size}")
            stages = [known.spec.zero] if "zero" in known.origins else [0, 1, 2, 3]
            offloads = [known.spec.offload] if "offload" in known.origins else list(_OFFLOADS)
            for zero in stages:
                for offload in offloads if world.accelerator == "cuda" else ["none"]:
                    yield _request(arguments, [*sized, f"zero={zero}", f"offload={offload}"]), world


def _axes(words: list[str]) -> tuple[list[str], dict[str, list[str | None]]]:
    """Take `nodes=1,2` and `gpus=8` (or gpus_per_node) out of the words; raises RequestError for no whole number."""
    axes: dict[str, list[str | None]] = {"nodes": [None], "gpus_per_node": [None]}
    fixed = []
    for word in words:
        key, given, text = word.partition("=")
        name = "gpus_per_node" if key == "gpus" else key
        if not given or name not in axes:
            fixed.append(word)
            continue
        values = text.split(",")
        for value in values:
            if not value.isdecimal() or len(value) > 9 or int(value) == 0:
                raise RequestError(
                    f"{key}={legal.shown(text)}: {legal.shown(value)!r} is not a whole number from 1 on",
                    where="the command line",
                    fix=f"write {key}=8, or {key}=1,2,4 to try several",
                )
        if len(values) > _MOST_TRIED:
            raise RequestError(
                f"{key} has {len(values)} values to try", where="the command line", fix=f"try at most {_MOST_TRIED}"
            )
        axes[name] = list(values)
    return fixed, axes


def _score(arguments: argparse.Namespace, words: list[str]) -> int:
    own = hardware.read_own()
    if arguments.rows is None:
        if arguments.predict is not None or not words:
            raise RequestError(
                "there is nothing to score",
                where="the command line",
                fix="halfstep plan score RUNS..., or halfstep plan score --rows IN.csv --predict OUT.csv",
            )
        compared = [prediction_errors.run(Path(word)) for word in words]
        if arguments.json:
            say_json([dataclasses.asdict(one) for one in compared])
        else:
            say(*prediction_errors.table(compared))
        return 0
    if words:
        raise RequestError(
            f"{words[0]!r} and --rows at once", where="the command line", fix="score runs, or rows, one at a time"
        )
    from halfstep.launcher.forecast.published import score  # read by no other command

    predictions = score.predict(arguments.rows, own)
    if arguments.predict is not None:
        score.write(predictions, arguments.predict)
    told = sum(one.tokens_per_s_per_gpu is not None for one in predictions)
    if arguments.json:
        say_json([dataclasses.asdict(one) for one in predictions])
    else:
        where = f" in {arguments.predict}" if arguments.predict else ""
        say(f"{len(predictions)} rows, a speed for {told}{where}")
    return 0

"""The verbs that start runs: run, submit."""

import argparse
import dataclasses
import itertools
import shlex
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from halfstep.launcher import topology
from halfstep.launcher.cli import request as requests
from halfstep.launcher.config.load import Request
from halfstep.launcher.errors import RequestError
from halfstep.launcher.plan import estimate
from halfstep.launcher.plan.decide import decide
from halfstep.launcher.plan.ds import packages
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.rundir import run_directory, trust
from halfstep.launcher.rundir.lease import reserved
from halfstep.launcher.rundir.run_reader import Run
from halfstep.launcher.submit import argv, hostfile, local, spread
from halfstep.launcher.submit.job import STARTERS, Array, Job
from halfstep.launcher.system.terminal import say, say_json, say_text


def add(verbs: Any, common: argparse.ArgumentParser) -> None:
    """Add the verbs to the command."""
    for name, verb, text in (
        ("run", _run, "start a run on this host, or over a hostfile"),
        ("submit", _submit, "send a run to SLURM, as a job that saves, requeues and resumes by itself"),
    ):
        parser = requests.add(verbs, common, name, text)
        parser.set_defaults(verb=verb)
        parser.add_argument("--force", action="store_true", help="start also where the plan says that it cannot fit")
        parser.add_argument(
            trust.CONSENT, action="store_true", help="take a run directory that others own or may write as it is"
        )
        _run_options(parser) if name == "run" else _submit_options(parser)


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--with", dest="starter", choices=argv.STARTERS, default="deepspeed", help="what starts the ranks"
    )
    parser.add_argument("--hostfile", type=Path, metavar="FILE", help="start on these hosts, `host slots=N` a line")
    parser.add_argument(
        "--launcher", choices=spread.BACKENDS, default="pdsh", help="how deepspeed reaches them (default: pdsh)"
    )
    parser.add_argument("--ssh-port", type=int, metavar="N", help="where their sshd listens (default: 22)")
    parser.add_argument("--dry-run", action="store_true", help="print the command and start nothing")


def _submit_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--site", metavar="NAME", help="the cluster: a name, or a TOML file (default: yours, or `gpu`)")
    for name, text in (
        ("time", "limit of one job, such as 12:00:00 or 2-00"),
        ("partition", "where it is queued"),
        ("account", "who pays"),
        ("qos", "quality of service"),
        ("constraint", "features of the nodes"),
        ("memory", "of a node; 0 = all"),
    ):
        parser.add_argument(f"--{name}", metavar=name.upper(), help=f"{text} (default: the site's)")
    parser.add_argument(
        "--with", dest="starter", choices=STARTERS, default="srun", help="one srun task a rank, or one torchrun a node"
    )
    parser.add_argument(
        "--after",
        metavar="JOB | RUN",
        action="append",
        default=[],
        help="begin when that job has ended; when it is of another run, only if it ended well",
    )
    parser.add_argument(
        "--each",
        metavar="KEY=A,B,...",
        action="append",
        default=[],
        help="an array: one run for each value, for each combination where --each is given more than once",
    )
    parser.add_argument("--at-once", type=int, metavar="N", default=0, help="how many of an array may run at a time")
    parser.add_argument("--dry-run", action="store_true", help="print the script and the sbatch line, submit nothing")
    parser.add_argument("--json", action="store_true", help="print the job as JSON")


def _run(options: argparse.Namespace, arguments: list[str]) -> int:
    request = requests.read(options, arguments)
    spec, hosts = request.spec, None
    world = topology.local_topology(spec.nodes, spec.gpus_per_node)
    if options.hostfile is not None:
        hosts = hostfile.read(options.hostfile.absolute(), spec.nodes, spec.gpus_per_node, options.ssh_port)
        world = topology.describe(len(hosts.names) * hosts.slots, hosts.slots)
    elif (spec.nodes or 1) > 1:
        raise RequestError(
            f"`halfstep run` starts ranks on this host, not on {spec.nodes}",
            where=f"nodes from {request.origins['nodes']}",
            fix="name the hosts with --hostfile FILE, or send the run to a cluster with `halfstep submit`",
        )
    plan = decide(request, world, on_this_host=hosts is None)
    plan.require_allowed()
    if hosts is None:
        packages.require(plan.deepspeed, plan.origins)
    estimate.require_fit(plan, options.force)
    path = run_directory.location(request, plan).absolute()
    run_directory.refuse_another_run(path, plan)
    if hosts is None:
        command, remote = argv.STARTERS[options.starter](plan, path), None
    else:
        command = spread.STARTERS[options.starter](plan, path, hosts, options.launcher)
        remote = spread.environment_file(path)
        program = spread.needed(options.starter, options.launcher)
        if shutil.which(program) is None and not options.dry_run:
            raise RequestError(f"{program} is not installed here", where="--hostfile", fix=f"install {program}")
    shown = "$ " + shlex.join(command)
    if options.dry_run:
        say(shown)
        return 0
    trust.require_own(path, consent=options.trust)
    launch = uuid.uuid4().hex
    with reserved(path, launch):
        run_directory.write_plan(path, request, plan)
        say(shown)
        ranks = plan.topology.ranks_per_node
        return local.start(command, path, ranks, remote, launch=launch, trusted=options.trust)


def _submit(options: argparse.Namespace, arguments: list[str]) -> int:
    from halfstep.launcher.submit import render, send, site_file, slurm  # Jinja takes a while to load

    names = ("time", "partition", "account", "qos", "constraint", "memory")
    chosen = site_file.read(options.site, {name: getattr(options, name) for name in names})
    decided = []
    for more in _combinations(options.each):
        request = requests.read(options, [*arguments, *more])
        plan = decide(request, site_file.site_topology(chosen, request.spec))
        plan.require_allowed()
        estimate.require_fit(plan, options.force)
        path = run_directory.location(request, plan).absolute()
        trust.require_own(path, consent=options.trust)
        if more and request.spec.out:
            path /= ",".join(more).replace("/", "_")
        decided.append((path, request, plan))
    path, _, plan = decided[0]
    array = _array(decided, options.at_once) if options.each else None
    job = Job(run=path, plan=plan, site=chosen, starter=options.starter, array=array, trusted=options.trust)
    if options.after:
        after, behind = _before(options.after, {path for path, _, _ in decided}, asking=not options.dry_run)
        job = dataclasses.replace(job, behind=behind, after=after)
    line = shlex.join(slurm.sbatch_line(job))
    if options.dry_run:
        job.check()
        text = render.script(job)
        if options.json:
            say_json({"script": str(job.script), "text": text, "command": slurm.sbatch_line(job)})
        else:
            say_text(f"{text}\n$ {line}\n")
        return 0
    number = send.send(job, decided)
    if options.json:
        say_json({"job": number, "script": str(job.script), "runs": [str(run) for run, _, _ in decided]}, indent=None)
        return 0
    say(f"$ {line}", f"job {number}: {len(decided)} run{'s' * (len(decided) > 1)}, {job.folder}")
    say(f"`halfstep jobs` shows how it does, `halfstep jobs logs -f {path}` what it says")
    return 0


def _before(named: list[str], own: set[Path], *, asking: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the jobs of other runs that must have ended well, and those of the same runs that must have ended."""
    from halfstep.launcher.submit import jobs

    after: list[str] = []
    behind: list[str] = []
    for name in named:
        if not asking:
            after.append(name)
            continue
        run, numbers = jobs.find(name)
        if not numbers and Run(run).finished is None:
            raise RequestError(
                f"{name} has no job that could still end well",
                where="--after",
                fix="submit that one first, or leave it out",
            )
        (behind if run in own else after).extend(numbers)
    return tuple(after), tuple(behind)


def _combinations(each: list[str]) -> Iterable[tuple[str, ...]]:
    """Return the arguments of every run of an array; of a single run, none."""
    axes = []
    for axis in each:
        key, given, values = axis.partition("=")
        if not given or not all(values.split(",")):
            raise RequestError(f"--each {axis} names no values", where="the command line", fix="--each seed=0,1,2")
        axes.append([f"{key}={value}" for value in values.split(",")])
    return itertools.product(*axes)


def _array(decided: list[tuple[Path, Request, Plan]], at_once: int) -> Array:
    runs = tuple(path for path, _, _ in decided)
    plans = [plan for _, _, plan in decided]
    if len({plan.topology for plan in plans}) > 1:
        raise RequestError(
            "the runs of an array start the same ranks on the same nodes",
            where="--each, for nodes or gpus_per_node",
            fix="submit those one by one",
        )
    if len(set(runs)) < len(runs):
        raise RequestError("two runs of the array are the same", where="--each", fix="name every value once")
    out = decided[0][1].spec.out
    folder = Path(out) if out else Path.cwd() / "runs" / f"array-{plans[0].run_id}-{len(runs)}"
    return Array(folder=folder.absolute(), runs=runs, at_once=min(at_once or len(runs), len(runs)))

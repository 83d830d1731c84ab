"""Make the plan of a request: read here what it depends on, then resolve it."""

import dataclasses

from halfstep.launcher import topology
from halfstep.launcher.config.load import Request
from halfstep.launcher.config.schema import RunSpec
from halfstep.launcher.forecast import hardware
from halfstep.launcher.plan import facts
from halfstep.launcher.plan.plan import Plan
from halfstep.launcher.plan.resolve import resolve
from halfstep.launcher.system import machine
from halfstep.launcher.topology import Topology


def decide(request: Request, world: Topology, *, on_this_host: bool = False) -> Plan:
    """Return the plan; `on_this_host`: for ranks on this host, whose memory is then what CPU ranks have to do with."""
    return resolve(request, world, read_facts(request.spec, world, on_this_host=on_this_host))


def read_facts(spec: RunSpec, world: Topology, *, on_this_host: bool) -> facts.Facts:
    """Read what the plan of a request depends on."""
    return facts.read(spec, machine.node_memory_bytes() if on_this_host and world.accelerator == "cpu" else None)


def planned_topology(spec: RunSpec) -> Topology:
    """Return the ranks that a request names, on the devices of this host or on those that `hardware` names."""
    world = topology.local_topology(spec.nodes, spec.gpus_per_node)
    if spec.hardware and spec.hardware != hardware.THIS_CPU and world.accelerator == "cpu":
        # Planned on a login node for the GPUs of another.
        return dataclasses.replace(world, accelerator="cuda", device_name=spec.hardware)
    return world

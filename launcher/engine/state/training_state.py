"""The training state as fp32 tensors by parameter name, whichever of DeepSpeed's wrappers holds it.

Every wrapper keeps masters and optimizer states in flat tensors of its own cut: whole parameters at stage 0, a slice of
all parameters at stages 1 and 2, a slice of each at stage 3. A fragment names a piece of one parameter in them.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halfstep.launcher.checkpoint.shards import AVERAGE, MASTER
from halfstep.launcher.config import optimizers
from halfstep.launcher.engine.untyped import Engine

_MUONS = "momentum_buffer"
"""The one state that Muon keeps of what it orthogonalizes."""


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """The part of one flattened parameter that this rank holds, as views: what is written to them is trained on."""

    name: str
    shape: tuple[int, ...]
    """Of the whole parameter."""
    start: int
    """First element, in the flattened parameter."""
    flat: Tensor
    """The tensor of the wrapper that it lies in: the optimizer's key."""
    offset: int
    """First element, in `flat` flattened."""
    length: int

    def view(self, tensor: Tensor) -> Tensor:
        """Return this piece of `flat`, or of an optimizer state of the same shape."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.length)


def fragments(engine: Engine) -> list[Fragment]:
    """Return what this rank holds of every trained parameter, in the model's order."""
    return [piece for piece in _pieces(engine) if piece.length > 0]


def shapes(engine: Engine) -> dict[str, list[int]]:
    """Return the whole shape of every trained parameter, in the model's order."""
    trained = ((name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad)
    return {name: list(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in trained}


def _pieces(engine: Engine) -> Iterator[Fragment]:
    wrapper = engine.optimizer
    own = _stage_0(engine)
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if own is not None:
            flat, offset = own[parameter]
            yield Fragment(name=name, shape=shape, start=0, flat=flat, offset=offset, length=parameter.numel())
        elif hasattr(parameter, "ds_id"):
            group, offset, length = wrapper.grad_position[wrapper.get_param_id(parameter)]
            start = parameter.partition_numel() * torch.distributed.get_rank(parameter.ds_process_group)
            flat = wrapper.fp32_partitioned_groups_flat[group]
            held = min(length, parameter.ds_numel - start)  # the last rank's part is padded
            yield Fragment(name=name, shape=shape, start=start, flat=flat, offset=offset, length=held)
        elif parameter._hp_mapping is not None:
            inside, flat_place = parameter._hp_mapping.lp_fragment_address, parameter._hp_mapping.hp_fragment_address
            flats = getattr(wrapper, "single_partition_of_fp32_groups", None) or wrapper.fp32_groups_flat_partition
            yield Fragment(
                name=name,
                shape=shape,
                start=inside.start,
                flat=flats[parameter._hp_mapping.param_group_index],
                offset=flat_place.start,
                length=inside.numel,
            )


def _stage_0(engine: Engine) -> dict[Tensor, tuple[Tensor, int]] | None:
    """Return where stage 0 keeps each parameter's master, or None at other stages."""
    if engine.zero_optimization():
        return None
    wrapper = engine.optimizer
    if hasattr(wrapper, "fp32_groups_flat"):  # a fused Adam's
        return {
            weight: (flat, sum(earlier.numel() for earlier in weights[:place]))
            for flat, weights in zip(wrapper.fp32_groups_flat, wrapper.fp16_groups, strict=True)
            for place, weight in enumerate(weights)
        }
    if hasattr(wrapper, "fp32_groups"):
        groups = zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True)
        return {
            weight: (master, 0) for masters, weights in groups for master, weight in zip(masters, weights, strict=True)
        }
    return {parameter: (parameter, 0) for parameter in engine.module.parameters()}


@torch.no_grad()
def checksum(engine: Engine) -> int:
    """Return this rank's part of a checksum of all masters; the parts of all ranks add up to it, modulo 2^64.

    Every element's bits are weighed by a number that depends on its parameter's name and its place in it, so that the
    sum is the same however stages and ranks cut the parameters up.
    """
    total = 0
    if not engine.zero_optimization() and torch.distributed.get_rank():
        return total  # at stage 0 every rank holds all
    for piece in fragments(engine):
        name = int.from_bytes(hashlib.blake2b(piece.name.encode(), digest_size=7).digest())
        for values, start in _slices(piece):
            places = torch.arange(start, start + len(values), device=values.device)
            weights = (places + name) * 0x9E3779B97F4A7C1 | 1
            weights ^= weights >> 29
            total += int((values.view(torch.int32).long() * weights).sum())
    return total % 2**64


def _slices(piece: Fragment, most: int = 1 << 22) -> Iterator[tuple[Tensor, int]]:
    """Yield a fragment's master in pieces small enough to copy, each with its place in the whole parameter."""
    whole = piece.view(piece.flat)
    for first in range(0, piece.length, most):
        yield whole[first : first + most].float().contiguous(), piece.start + first


def base_optimizer(engine: Engine) -> torch.optim.Optimizer:
    """Return torch's or DeepSpeed's optimizer under the wrapper."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def tensors(engine: Engine, piece: Fragment) -> dict[str, Tensor]:
    """Return a fragment's master, optimizer states and average, as views."""
    state = base_optimizer(engine).state.get(piece.flat, {})
    kept = {key: value for key, value in state.items() if torch.is_tensor(value) and value.shape == piece.flat.shape}
    average = average_of(engine)
    beside = {} if average is None else {AVERAGE: average.of(piece.flat)}
    return {MASTER: piece.view(piece.flat), **{key: piece.view(value) for key, value in {**kept, **beside}.items()}}


def average_of(engine: Engine) -> Any:
    """Return the moving average that an engine keeps of its masters (average.py); None where it keeps none."""
    return vars(engine).get(AVERAGE)


def step_count(engine: Engine, piece: Fragment) -> float | None:
    """Return the optimizer's own step count for a fragment; None where it keeps none."""
    step = base_optimizer(engine).state.get(piece.flat, {}).get("step")
    return None if step is None else float(step)


def left_out(engine: Engine) -> list[str]:
    """Return the optimizer states that `tensors` and `step_count` do not show, such as NAdam's running product."""
    optimizer, missing = base_optimizer(engine), set()
    for piece in fragments(engine):
        state = optimizer.state.get(piece.flat, {})
        kept = {key for key, value in state.items() if value is None or getattr(value, "shape", 0) == piece.flat.shape}
        missing |= set(state) - kept
    return sorted(missing - {"step"})


def create_optimizer_states(engine: Engine, kinds: list[str], steps: float) -> None:
    """Give an optimizer that has not stepped its states, zero, as after `steps` steps; the values are written later."""
    optimizer, kinds = base_optimizer(engine), [kind for kind in kinds if kind != AVERAGE]
    if not kinds and not steps:
        return
    for flat in {id(piece.flat): piece.flat for piece in _pieces(engine)}.values():
        state, orthogonalized = optimizer.state[flat], _orthogonalized(optimizer, flat)
        for kind in kinds:
            if orthogonalized is None or orthogonalized == (kind == _MUONS):
                state.setdefault(kind, torch.zeros_like(flat, requires_grad=False))
        if steps and not orthogonalized and optimizers.of(type(optimizer).__name__).counts_steps:
            state["step"] = _counted(getattr(optimizer, "aux_optimizer", None) or optimizer, flat, steps)
    if hasattr(optimizer, "ds_opt_adam"):
        _count_up(optimizer, int(steps))
    if type(optimizer).__name__ == "FusedAdam":
        for group in optimizer.param_groups:
            group["step"] = int(steps)


def _orthogonalized(optimizer: torch.optim.Optimizer, flat: Tensor) -> bool | None:
    """Tell whether Muon steps a tensor by its momentum, rather than as Adam does; None for any other optimizer."""
    for group in optimizer.param_groups:
        if "use_muon" in group and any(flat is member for member in group["params"]):
            return bool(group["use_muon"])
    return None


def _counted(optimizer: torch.optim.Optimizer, flat: Tensor, steps: float) -> Tensor | int:
    """Return a step count as an optimizer keeps it: torch's own in a tensor, DeepSpeed's two Adams in an int.

    Torch's fused kernel reads it on the device of the parameter, all others on the host (optim/adam.py, _init_group).
    """
    if not type(optimizer).__module__.startswith("torch.optim"):
        return int(steps)
    beside = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
    return torch.tensor(steps, dtype=torch.float32, device=flat.device if beside else "cpu")


def _count_up(optimizer: Any, steps: int) -> None:
    """Let DeepSpeed's Adam for the host count `steps` steps.

    It multiplies its betas step by step, and from a later step on would take their power instead, which differs in the
    last digits (csrc/includes/cpu_adam.h, IncrementStep).
    """
    group = optimizer.param_groups[0]
    beta1, beta2 = group["betas"]
    dummies = [torch.zeros(1) for _ in range(4)]
    for step in range(1, steps + 1):
        optimizer.ds_opt_adam.adam_update(
            optimizer.opt_id, step, 0.0, beta1, beta2, group["eps"], 0.0, group["bias_correction"], *dummies
        )


def refresh_weights(engine: Engine) -> None:
    """Round the weights that the network computes with from their masters, on every rank. A collective call."""
    wrapper = engine.optimizer
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):  # stage 3: as its own step does (stage3.py, step)
        wrapper.checkpoint_event_prologue()
        for group in range(len(wrapper.fp16_groups)):
            wrapper._reassign_or_swap_out_partitioned_parameters(group)
        wrapper.checkpoint_event_epilogue()
    elif engine.zero_optimization():
        wrapper.update_lp_params()
        if base_optimizer(engine).state:
            wrapper._lazy_init_hp_params_optimizer_state()
    elif hasattr(wrapper, "fp32_groups_flat"):
        for halves, masters in zip(wrapper.fp16_groups_flat, wrapper.fp32_groups_flat, strict=True):
            halves.data.copy_(masters.data)
    elif hasattr(wrapper, "fp32_groups"):
        for halves, masters in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True):
            for half, master in zip(halves, masters, strict=True):
                half.data.copy_(master.data)

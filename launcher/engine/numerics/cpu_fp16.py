"""fp16 on a CPU that has no instructions for it: DeepSpeed refuses, and torch multiplies fifty times slower."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = {getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm", "baddbmm")}


class _Widened(TorchDispatchMode):
    """Multiply fp16 matrices in fp32 and round the result once, as hardware does that sums in fp32.

    torch's own kernels for such a CPU do the same element by element: 1.8 against 78 GFLOP/s in fp32 on one core.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS and args[0].dtype is torch.float16 and args[0].device.type == "cpu":
            wide = (argument.float() if isinstance(argument, torch.Tensor) else argument for argument in args)
            return func(*wide, **kwargs).half()
        return func(*args, **kwargs)


_entered: list[_Widened] = []


def prepare(precision: str, accelerator: str, *, compiled: bool) -> None:
    """Let this process train in a precision on its CPU, at a bearable speed; undoes what another precision needed.

    DeepSpeed asks whether oneDNN has fp16 kernels for this processor (accelerator/cpu_accelerator.py,
    is_fp16_supported) and ends where it has none (runtime/engine.py, _do_sanity_check). torch computes on any. What is
    compiled is left to the compiler, which has no use for a mode.
    """
    while _entered:
        _entered.pop().__exit__(None, None, None)
    from deepspeed.accelerator import get_accelerator

    vars(get_accelerator()).pop("is_fp16_supported", None)
    if accelerator != "cpu" or precision != "fp16" or torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return
    get_accelerator().is_fp16_supported = lambda: True  # pyright: ignore[reportOptionalMemberAccess]
    if not compiled:
        mode = _Widened()
        mode.__enter__()
        _entered.append(mode)

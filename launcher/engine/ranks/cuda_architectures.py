"""Write TORCH_CUDA_ARCH_LIST as DeepSpeed's builder reads it: for as long as it builds, and in this process alone.

The builder takes each piece apart at its dots and makes whole numbers of them (op_builder/builder.py,
compute_capability_args): at `9.0a`, which torch reads and images for NVIDIA's cards set, it ends in a ValueError.
"""

import contextlib
import os
import re
from collections.abc import Iterator, MutableMapping

from halfstep.launcher.errors import RefusedError

VARIABLE = "TORCH_CUDA_ARCH_LIST"
_PIECE = re.compile(r"([0-9]+\.[0-9]+)[a-z]?(\+PTX)?")
# As torch reads them (utils/cpp_extension.py, _get_cuda_arch_flags).
_NAMED = {
    "Volta": "7.0+PTX",
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}


def readable(value: str) -> str:
    """Return a list of architectures in DeepSpeed's spelling; empty where it is to ask the GPUs of this host.

    A suffix asks for instructions of one generation alone, which no operator of DeepSpeed's needs: `9.0a` is 9.0.
    Raises RefusedError for what names no architecture.
    """
    if value.strip() == "native":
        return ""
    pieces = []
    for piece in re.split(r"[;,\s]+", value.strip(";, \t\n")):
        number = _PIECE.fullmatch(piece)
        if number is not None:
            pieces.append(number[1] + (number[2] or ""))
        elif piece in _NAMED:
            pieces.append(_NAMED[piece])
        elif piece:
            raise RefusedError(
                f"{VARIABLE}={value[:80]!r} names no GPU architecture with {piece[:40]!r}",
                where="the environment of this process, which DeepSpeed builds its operators by",
                fix=f"unset {VARIABLE}, to build for the GPUs of this host, or set it to numbers: '9.0', '8.0;9.0+PTX'",
            )
    return ";".join(pieces)


@contextlib.contextmanager
def in_deepspeeds_spelling(environ: MutableMapping[str, str] = os.environ) -> Iterator[None]:
    """Let DeepSpeed and the compilers it starts see the readable list, and give the user's back."""
    users = environ.get(VARIABLE)
    if users is None:
        yield
        return
    environ[VARIABLE] = readable(users)
    try:
        yield
    finally:
        environ[VARIABLE] = users

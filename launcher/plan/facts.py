"""Read, before planning, what a plan depends on besides the request, so that `resolve` can be pure."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.errors import RequestError
from launcher.plan import hardware
from launcher.plan.corpus import DataFacts, read_data
from launcher.plan.pretrained import CountParameters, ModelFacts, read_model
from launcher.spec.schema import RunSpec


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All that was read for one plan."""

    data: DataFacts
    model: ModelFacts | None
    """None for a preset."""
    ds_config: dict[str, Any] | None
    """The content of --ds-config FILE."""
    node_memory_bytes: int | None = None
    """Memory of a host of CPU ranks; None where it is another host than this one, or any of several."""
    hardware: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The user's own table of devices, this CPU among them."""


def read(spec: RunSpec, count_parameters: CountParameters, node_memory_bytes: int | None = None) -> Facts:
    """Read the facts for a request; `count_parameters` (which may load torch) is called for unknown families only.

    `node_memory_bytes` is asked for by who plans for one host: ranks that plan by themselves have to plan alike, and
    two hosts seldom have the same memory to the byte.
    """
    return Facts(
        data=read_data(spec.data),
        model=read_model(spec, count_parameters) if spec.model.name.startswith("hf:") else None,
        ds_config=_read_ds_config(Path(spec.ds_config)) if spec.ds_config else None,
        hardware=hardware.read_own(),
        node_memory_bytes=node_memory_bytes,
    )


def _read_ds_config(path: Path) -> dict[str, Any]:
    where = str(path)
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise RequestError(f"cannot be read: {error.strerror}", where=where, fix="check the path") from None
    except ValueError as error:
        raise RequestError(f"the DeepSpeed config is not JSON: {error}", where=where, fix="mend that line") from None
    if not isinstance(content, dict):
        raise RequestError("the DeepSpeed config is not a JSON object", where=where, fix="wrap it in { }")
    return content

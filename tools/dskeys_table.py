"""Read every configuration key that the installed DeepSpeed understands: `python -m tools.dskeys_table [--write]`.

DeepSpeed has no list of its keys: part of them are pydantic models, the rest are read out of a dictionary here and
there, and a key that nobody reads is silently accepted. So a dictionary that remembers what it was asked for is given
to `DeepSpeedConfig`, section by section; a section that is a pydantic model betrays itself by its own error and is then
described by its fields. `launcher/plan/deepspeed_keys.json` is the result and `launcher/plan/ds/dskeys.py` its reader.
"""

import argparse
import contextlib
import importlib.metadata
import json
import logging
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.dskeys_params import ABSENT, Entry, described, dtype_entries, expert_parallel, optimizers, schedulers

TABLE = Path(__file__).resolve().parent.parent / "launcher" / "plan" / "ds" / "deepspeed_keys.json"

_MARK = "halfstep_mark"
_DTYPES = ["fp16", "bf16", "fp32"]

# What reading cannot show: the type of a key whose default is null, and the values that are checked by hand.
# Each line names its source, relative to the deepspeed package. Everything else below is found, not listed.
_HINTS: dict[str, Entry] = {
    "train_batch_size": {"type": "int", "minimum": 1},  # runtime/config.py:_batch_assertion
    "train_micro_batch_size_per_gpu": {"type": "int", "minimum": 1},
    "gradient_accumulation_steps": {"type": "int", "minimum": 1},
    "steps_per_print": {"type": "int", "minimum": 1},  # runtime/engine.py: the step is taken modulo this
    "gradient_clipping": {"minimum": 0},  # 0 is off: runtime/constants.py
    "gradient_predivide_factor": {"above": 0},  # runtime/engine.py: a divisor
    "gradient_allreduce_op": {"type": "enum", "any_case": ["mean", "sum"]},  # runtime/config.py
    "communication_data_type": {"type": "enum", "any_case": _DTYPES},  # runtime/config.py
    "seq_parallel_communication_data_type": {"type": "enum", "any_case": _DTYPES},
    "sequence_parallel_size": {"type": "int", "default": 1, "minimum": 1},  # runtime/config.py:468, compile/init_sp.py
    "vocabulary_size": {"type": "int", "minimum": 1},  # runtime/config.py:_do_warning_check
    "log_level": {"type": "enum", "any_case": ["debug", "info", "warning", "error", "critical"]},  # utils/logging.py
    "bfloat16": {"deprecated": True, "successor": "bf16"},  # runtime/precision_config.py
    "fp16.loss_scale": {"minimum": 0},  # runtime/precision_config.py: 0 is dynamic
    "fp16.loss_scale_window": {"minimum": 1},
    "fp16.min_loss_scale": {"minimum": 1},
    "optimizer.legacy_fusion": {"type": "bool", "default": False},  # runtime/constants.py
    "optimizer.params": {"type": "open"},  # checked against `optimizers`
    "scheduler.params": {"type": "open"},  # checked against `schedulers`
    "datastates_ckpt": {"type": "open"},  # datastates/config.py copies it whole
    "checkpoint.tag_validation": {"type": "enum", "any_case": ["warn", "ignore", "fail"]},  # model_checkpointing/
    "checkpoint.writer.type": {"type": "enum", "any_case": ["mock", "python", "fast"]},
    "checkpoint.writer.data_parallel": {"type": "enum", "any_case": ["replica", "socket", "machine"]},
    "data_types.keep_in_fp32_modules": {"type": "list"},  # runtime/config.py; its other value is "auto"
    "torch_autocast.lower_precision_safe_modules": {"type": "list"},  # runtime/config.py
    "activation_checkpointing.number_checkpoints": {"type": "int", "minimum": 1},
    "flops_profiler.output_file": {"type": "str"},  # profiling/config.py
    "pipeline.stages": {"type": "int|str"},
    "pipeline.use_reentrant": {"type": "bool", "default": True},  # runtime/pipe/engine.py
    "autotuning.arg_mappings": {"type": "open"},  # autotuning/config.py, from here on
    "autotuning.max_train_batch_size": {"type": "int"},
    "autotuning.metric_path": {"type": "str"},
    "autotuning.model_info_path": {"type": "str"},
    "autotuning.model_info.num_params": {"type": "int"},
    "autotuning.model_info.hidden_size": {"type": "int"},
    "autotuning.model_info.num_layers": {"type": "int"},
    "data_efficiency.data_sampling.dynamic_batching.max_batch_size": {"type": "int"},  # data_pipeline/config.py
    "data_efficiency.data_sampling.dynamic_batching.max_tokens": {"type": "int"},
    "data_efficiency.data_sampling.dynamic_batching.metrics_path": {"type": "str"},  # data_pipeline/constants.py
    # Copied whole by data_pipeline/config.py and read by the sampler and the layer-dropping modules.
    "data_efficiency.data_sampling.curriculum_learning": {"type": "open"},
    "data_efficiency.data_routing.random_ltd": {"type": "open"},
}
# A section whose other keys are read only once these are set.
_SEEDS: dict[str, Entry] = {
    "optimizer": {"type": "AdamW"},
    "scheduler": {"type": "WarmupLR"},
    "data_efficiency.data_sampling.dynamic_batching": {"enabled": True},
}
# Refused by runtime/engine.py:_configure_basic_optimizer; the other removals are DeepSpeed's own lists.
_REFUSED = {
    "optimizer.params.max_grad_norm": "DeepSpeed refuses it as an optimizer parameter. Use 'gradient_clipping'."
}


class _Probe(dict):
    """A configuration section that remembers which keys it was asked for, and with which default."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reads: dict[str, Any] = {}

    def get(self, key: str, default: Any = None) -> Any:
        self.reads[key] = default
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.reads.setdefault(str(key), ABSENT)
        return super().__contains__(key)

    def keys(self) -> Any:
        return self

    def __copy__(self) -> "_Probe":
        return self


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep DeepSpeed's banner off stdout and its warnings about probes off everything."""
    level = logging.root.manager.disable
    with contextlib.redirect_stdout(sys.stderr):
        import deepspeed  # noqa: F401  (prints and logs while it is imported)

        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(level)


def _read(path: tuple[str, ...]) -> tuple[dict[str, Any], type | None]:
    """Let DeepSpeed read a configuration of this one section: return the keys it asked for, or the section's model."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError

    section = _Probe({_MARK: 0} | _SEEDS.get(".".join(path), {})) if path else _Probe(train_batch_size=1)
    config = section
    for depth in range(len(path) - 1, -1, -1):
        config = _Probe({path[depth]: config} | _SEEDS.get(".".join(path[:depth]), {}))
    config.setdefault("train_batch_size", 1)
    try:
        DeepSpeedConfig(config)
    except ValidationError as error:
        for problem in error.errors():
            if problem["type"] == "extra_forbidden" and problem["loc"][-1] == _MARK:
                return {}, _model(error.title, problem["loc"][:-1])
    except Exception:  # what a probe in place of a number breaks is of any kind, and says nothing
        pass
    return {key: default for key, default in section.reads.items() if key != _MARK}, None


def _model(title: str, location: tuple[int | str, ...]) -> type:
    """Find the pydantic class of that name, and from it the class of the field at `location`."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    matches, queue = [], [DeepSpeedConfigModel]
    while queue:
        queue += (children := queue.pop().__subclasses__())
        matches += [child for child in children if child.__name__ == title]
    assert len(matches) == 1, f"DeepSpeed has {len(matches)} models named {title}"
    model: Any = matches[0]
    for name in location:
        model = model.model_fields[name].annotation
    return model


def _fields(model: Any, path: str, keys: dict[str, Entry]) -> None:
    """Describe every field of a pydantic model, and the models within it, under `path`."""
    for name, field in model.model_fields.items():
        spelling = f"{path}.{field.alias or name}"
        nested = [
            option
            for option in (field.annotation, *typing.get_args(field.annotation))
            if hasattr(option, "model_fields")
        ]
        default = field.get_default(call_default_factory=True)
        if nested:
            keys[spelling] = {"type": "section", "default": None if default is None else {}}
            _fields(nested[0], spelling, keys)
        else:
            keys[spelling] = described(field.annotation, default)
            bounds = {"ge": "minimum", "gt": "above", "le": "maximum", "lt": "below"}
            for rule in field.metadata:
                keys[spelling] |= {word: getattr(rule, kind) for kind, word in bounds.items() if hasattr(rule, kind)}
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("deprecated"):
            successor = str(extra.get("new_param", ""))
            alias = getattr(model.model_fields.get(successor), "alias", None)
            keys[spelling] |= {"deprecated": True, "successor": f"{path}.{alias or successor}"}
        if field.alias:  # populate_by_name: DeepSpeed takes either spelling, and the last one silently wins
            keys[f"{path}.{name}"] = keys[spelling] | {"same_as": spelling}


def _explore(path: tuple[str, ...], keys: dict[str, Entry]) -> None:
    """Describe the keys under `path`, trying each of them as a section of its own."""
    reads, model = _read(path)
    prefix = ".".join(path)
    if prefix and (reads or model):
        keys[prefix] = {"type": "section", "default": {}}
    if model:
        _fields(model, prefix, keys)
    for name, default in reads.items():
        here = (*path, name)
        spelling = ".".join(here)
        keys[spelling] = described(ABSENT, default)
        if keys[spelling]["type"] == "int":
            keys[spelling]["exact"] = True  # read as it stands: 8.0 would stay a float
        hint = _HINTS.get(spelling, {})
        if hint.get("type") != "open" and "values" not in hint and "any_case" not in hint:
            _explore(here, keys)
            if default is None:  # DeepSpeed takes null for an absent section here
                keys[spelling]["default"] = None


def _removed() -> dict[str, str]:
    """Return what DeepSpeed says about each key it no longer takes."""
    from deepspeed.runtime import config

    said = dict(getattr(config, "_REMOVED_TOP_LEVEL_CONFIG_KEYS", {}))
    removed = getattr(config, "_REMOVED_ZERO_CONFIG_KEYS", {})  # 0.18 has neither list
    said |= {f"zero_optimization.{key}": text for key, text in removed.items()}
    return {key: re.sub(r" See https?://\S+", "", text).strip() for key, text in said.items()} | _REFUSED


def table() -> dict[str, Any]:
    """Return the key table of the installed DeepSpeed: `deepspeed keys optimizers removed schedulers`.

    Each key maps to `type` (words joined by "|": bool int float str list enum section, open for a free table, any, and
    object for what no file can hold), `default`, and where they apply `values`, `any_case`, `items`, `minimum`,
    `above`, `maximum`, `below`, `deprecated`, `successor`, `same_as` (the other spelling of one setting) and `exact`
    (an int that DeepSpeed does not convert).
    """
    with _quiet():
        from deepspeed.runtime.config import get_pipeline_config

        removed = _removed()
        keys: dict[str, Entry] = {}
        _explore((), keys)
        keys |= {f"pipeline.{name}": described(ABSENT, default) for name, default in get_pipeline_config({}).items()}
        keys["pipeline"] = {"type": "section", "default": {}}
        of_optimizers, keys["optimizer.type"] = optimizers()
        of_schedulers, keys["scheduler.type"] = schedulers()
        keys |= expert_parallel() | dtype_entries()
    for path, hint in _HINTS.items():
        exact = {"exact": True} if hint.get("type") == "int" else {}
        keys[path] = {"default": None} | keys.get(path, {}) | hint | exact
    return {
        "deepspeed": importlib.metadata.version("deepspeed"),
        "keys": {path: entry for path, entry in keys.items() if path not in removed},
        "optimizers": of_optimizers,
        "removed": removed,
        "schedulers": of_schedulers,
    }


def rendered(content: dict[str, Any]) -> str:
    """Return the table as sorted JSON, one key a line, so that a change of DeepSpeed reads as a diff."""

    def lines(block: dict[str, Any]) -> str:
        rows = [f"{json.dumps(key)}: {json.dumps(block[key], sort_keys=True)}" for key in sorted(block)]
        return "{\n" + ",\n".join(rows) + "\n}"

    blocks = [
        f"{json.dumps(name)}: {lines(block) if isinstance(block, dict) else json.dumps(block)}"
        for name, block in content.items()
    ]
    return "{" + ",\n".join(blocks) + "}\n"


def main() -> None:
    """Print the table, or write it into the package."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--write", action="store_true", help=f"write launcher/plan/{TABLE.name} instead of printing")
    text = rendered(table())
    if parser.parse_args().write:
        TABLE.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()

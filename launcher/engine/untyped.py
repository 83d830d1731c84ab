"""The one name under which DeepSpeed's engine is passed around, for a reader and for a type checker."""

from typing import Any, TypeAlias

Engine: TypeAlias = Any
"""A `deepspeed.runtime.engine.DeepSpeedEngine`.

DeepSpeed has no types: its engine is an `nn.Module` for which a checker takes `module` for a Tensor, and the optimizer
inside is one of eight wrappers without a common base, of which this code asks what only one of them has.
"""

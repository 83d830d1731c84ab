"""Load an exported folder with transformers, spread over what devices there are, and read what it says of itself."""

import contextlib
import inspect
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from halfstep.launcher.errors import HalfstepError, RefusedError, RequestError
from halfstep.launcher.system import foreign
from halfstep.models.hf_config import one_line, positions

NOTE = "halfstep.json"
KIND = "halfstep-export"


def load(folder: Path, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """Return the model of a folder in evaluation mode, in `dtype` or in the one it was written in.

    Without a GPU it lies in the processor's memory; otherwise accelerate spreads it over the GPUs and, where they are
    too small, over what else there is. Raises RequestError for a folder that holds no model or half of one.
    """
    _expect_model(folder)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options: dict[str, Any] = {"device_map": "auto"} if torch.cuda.is_available() else {}
    with _loading(folder, f"transformers cannot load {folder}"):
        # False, not None: transformers would ask at the terminal whether code in the folder may run.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True, trust_remote_code=False, **options
        )
        model, report = loaded
    wrong = {key: sorted(map(str, report[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    for kind, names in wrong.items():
        if names:
            raise RefusedError(
                f"the weights in {folder} are not those of its config.json: {kind.replace('_', ' ')}, such as "
                f"{names[0]}",
                where=str(folder),
                fix="export it again with the transformers that trained it",
            )
    return model.eval()


@contextlib.contextmanager
def _loading(folder: Path, heading: str) -> Iterator[None]:
    """Turn whatever a library raises while it reads a folder that somebody made into a RequestError."""
    try:
        yield
    except HalfstepError:
        raise
    except Exception as error:  # of any kind: `tokenizers` raises no class of its own, configs check their own fields
        if _has_own_code(folder) and "trust_remote_code" in str(error):
            raise RequestError(
                f"{folder} brings Python code of its own (auto_map in config.json), which is never run",
                where=f"DIR {folder}",
                fix="use it with transformers, where you decide on trust_remote_code, if you trust who made it",
            ) from error
        raise RequestError(f"{heading}: {one_line(error)}", where=str(folder), fix="export it again") from error


def _has_own_code(folder: Path) -> bool:
    try:
        return "auto_map" in foreign.read_json(folder / "config.json", follow=True)
    except (OSError, ValueError, TypeError):
        return False


def logits(network: PreTrainedModel, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
    """Return a model's logits for token ids, without filling a cache where it knows the word.

    `positions`, of the tokens' shape, begin anew with every document; the model has to take them.
    """
    known = "use_cache" in inspect.signature(network.forward).parameters
    places = {} if positions is None else {"position_ids": positions}
    return network(input_ids=tokens, **places, **({"use_cache": False} if known else {})).logits


def _expect_model(folder: Path) -> None:
    if (folder / "config.json").is_file():
        return
    if (folder / "plan.json").is_file() or (folder / "checkpoints").is_dir():
        target = folder.with_name(f"{folder.resolve().name}-export")
        raise RequestError(
            f"{folder} is a run directory, not an exported model",
            where=f"DIR {folder}",
            fix=f"{shlex.join(['halfstep', 'checkpoint', 'export', str(folder), '--to', str(target)])}, then name that",
        )
    if (folder / "adapter_config.json").is_file():
        raise RequestError(
            f"{folder} holds adapters alone, without the model that they belong to",
            where=f"DIR {folder}",
            fix="export the run without --adapter, which merges them, and name that",
        )
    what = "holds no config.json, so it is no exported model" if folder.is_dir() else "does not exist"
    raise RequestError(f"{folder} {what}", where=f"DIR {folder}", fix="name a folder that `checkpoint export` made")


def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder; raises RequestError where it has none."""
    _expect_model(folder)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        written = note(folder)
        corpus = (written or {}).get("data", {}).get("path", "CORPUS")
        raise RequestError(
            f"{folder} has no tokenizer: the corpus was not there when it was exported",
            where=f"DIR {folder}",
            fix=f"bring {corpus} back, or say where it is with --data, and export again",
        )
    with _loading(folder, "the tokenizer cannot be loaded"):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def note(folder: Path) -> dict[str, Any] | None:
    """Return what `checkpoint export` wrote about an export; None for a folder that others made."""
    file = folder / NOTE
    if not file.exists():
        return None
    try:
        tree = foreign.read_json(file, follow=True)
        if tree["kind"] != KIND:
            raise ValueError(f"its kind is {tree['kind']!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(f"{NOTE} is damaged: {error}", where=str(file), fix="export it again") from None
    return tree


def context(model: PreTrainedModel) -> int | None:
    """Return the most tokens that the model can look at; None where nothing limits them."""
    return positions(model)

"""Measure an exported model on the validation split of a corpus, over the windows that training evaluates."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from halfstep.launcher.config import mixture
from halfstep.launcher.corpus import packing
from halfstep.launcher.corpus.description import DataFacts, read_data
from halfstep.launcher.corpus.vocabulary import of_folder
from halfstep.launcher.data.packed import PackedExamples
from halfstep.launcher.data.tokens import TokenFile
from halfstep.launcher.errors import RefusedError, RequestError
from halfstep.launcher.export import exported
from halfstep.launcher.export.weights import DTYPES
from halfstep.launcher.metrics import derive
from halfstep.models import hf_config, observe
from halfstep.models.causality import LENGTH, look_across
from halfstep.models.micro_batch import MicroBatch

_SEQUENCE = 1024
"""Tokens, for a folder that does not say what it was trained with."""


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What was measured, and on what."""

    loss: float | None
    """Nats a token; None where it is not finite."""
    perplexity: float | None
    tokens: int
    sequences: int
    sequence: int
    data: str
    documents: str
    """`masked` where each document was read by itself, as examples always are; else `plain`."""
    tokenizer: str
    """`same`, or `not known` where one of the two does not say."""
    step: int | None
    dtype: str
    device: str

    def to_dict(self) -> dict[str, Any]:
        """Return it as programs read it."""
        return asdict(self)


def evaluate(
    folder: Path,
    data: str,
    *,
    sequences: int | None = None,
    batch: int = 8,
    sequence: int | None = None,
    dtype: str | None = None,
    documents: str | None = None,
) -> Evaluated:
    """Return loss and perplexity over the first `sequences` windows of the validation split; 0 = all of them.

    By default as many as the run's own evaluations read, of as many tokens, with documents apart or not as the run had
    them (`documents`: plain or masked), in the type that the weights were written in; the run's own precision gives
    what training measured. Of a corpus of examples it is the targets of all of them, or of the first `sequences`, each
    by itself, those that are too long cut or dropped as in the run. Raises RequestError where corpus and model do not
    belong together.
    """
    for option, value, least in (("--batch", batch, 1), ("--sequence", sequence, 1), ("--sequences", sequences, 0)):
        if value is not None and value < least:
            raise RequestError(f"{value} is too few", where=f"{option} {value}", fix=f"{option} {least} or more")
    note = exported.note(folder) or {}
    facts, prefix = _corpus(data, documents)
    match = _match(folder, note, facts)
    network: Any = exported.load(folder, DTYPES[dtype] if dtype else "auto")
    context = exported.context(network)
    length = sequence or note.get("sequence") or min(context or _SEQUENCE, _SEQUENCE)
    if context is not None and length > context:
        raise RequestError(
            f"the model looks at {context} tokens at most", where=f"--sequence {length}", fix=f"--sequence {context}"
        )
    vocabulary = hf_config.vocabulary(network)
    how = "masked" if facts.has_examples else documents or note.get("documents") or "plain"
    if facts.validation_lengths is None:
        if how == "masked":
            _require_apart(network, folder)
        file = TokenFile(prefix, vocabulary=vocabulary)
        count = _count(file.windows(length), sequences, note, length, facts)
        batches = _batches(file, count, batch, length, apart=how == "masked")
    else:
        too_long = note.get("too_long") or "refuse"
        _require_room(facts, length, context, too_long)
        examples = PackedExamples(prefix, length, pack=False, too_long=too_long, seed=0, vocabulary=vocabulary)
        count = min(len(examples), sequences or len(examples))
        batches = _examples(examples, count, batch)
    loss, tokens = _loss(network, batches)
    return Evaluated(
        loss=derive.finite(loss),
        perplexity=derive.perplexity(loss),
        tokens=tokens,
        sequences=count,
        sequence=length,
        data=facts.path,
        documents=how,
        tokenizer=match,
        step=note.get("step"),
        dtype=str(network.dtype).removeprefix("torch."),
        device=str(network.device),
    )


def _corpus(data: str, documents: str | None) -> tuple[DataFacts, str]:
    """Return a corpus and the pair of its validation split; raises RequestError for what cannot be measured so."""
    if mixed := mixture.parts(data):
        raise RequestError(
            "one corpus is measured at a time, and this is a mixture",
            where=f"--data {data}",
            fix=f"--data {mixed[0].path}, and the others one after the other",
        )
    facts = read_data(data)
    if facts.has_examples and documents == "plain":
        raise RequestError(
            "examples are always read each by itself, whatever else is asked for",
            where=f"--documents plain and --data {facts.path}",
            fix="leave --documents out",
        )
    if facts.validation_prefix is None:
        raise RequestError(
            "the corpus has no validation split",
            where=f"--data {data}",
            fix="prepare it with a larger --validation-fraction or with more text, or name a prepared folder",
        )
    return facts, facts.validation_prefix


def _match(folder: Path, note: dict[str, Any], facts: DataFacts) -> str:
    """Tell whether the corpus was made with the export's tokenizer; raises RequestError where it was not."""
    trained_on = note.get("data")
    if isinstance(trained_on, dict) and trained_on.get("digest") == facts.digest:
        return "same"
    own = of_folder(folder)
    same = own.same(facts.tokenizer) if facts.has_tokenizer else None
    if same is not False:
        return "same" if same else "not known"
    raise RequestError(
        f"the corpus was made with another tokenizer ({facts.vocabulary} tokens, {facts.tokenizer.short}) than the "
        f"model was trained with ({own.short}): its ids mean other words to it",
        where=f"{folder} and --data {facts.path}",
        fix=f"prepare the corpus again with --tokenizer {folder}",
    )


def _count(windows: int, asked: int | None, note: dict[str, Any], length: int, facts: DataFacts) -> int:
    if windows == 0:
        raise RequestError(
            f"the validation split has {facts.validation_tokens} tokens, too few for one sequence of {length}",
            where=f"--data {facts.path}",
            fix=f"--sequence {max(1, facts.validation_tokens - 1)} or less",
        )
    wanted = note.get("evaluation_sequences") if asked is None else asked
    return min(windows, wanted) if wanted else windows


def _require_room(facts: DataFacts, length: int, context: int | None, too_long: str) -> None:
    """Refuse examples that are too long where the run refused them, and where dropping them leaves none."""
    lengths = facts.validation_lengths or ()
    longest = max(each for each, _ in lengths)
    if not packing.fitted(lengths, length, too_long) and too_long != "refuse":
        raise RequestError(
            f"all validation examples are longer than the sequence of {length} tokens, and the run dropped such",
            where=f"--data {facts.path}",
            fix="prepare a corpus with shorter ones" if context == length else "a longer --sequence",
        )
    if too_long == "refuse" and (longer := packing.longer(lengths, length)) > 0:
        raise RequestError(
            f"{longer:,} validation examples are longer than the sequence of {length} tokens",
            where=f"--data {facts.path}",
            fix="prepare the corpus without them"
            if context is not None and longest > context
            else f"--sequence {longest}, or prepare the corpus without them",
        )


def _require_apart(network: Any, folder: Path) -> None:
    """Refuse a model that does not keep documents apart, as training does, by looking at what it makes of two."""
    reason = "it takes no positions"
    if observe.takes_positions(network):
        seen = look_across(
            lambda tokens, positions: exported.logits(network, tokens, positions),
            vocabulary=hf_config.vocabulary(network),
            longest=exported.context(network) or LENGTH,
            device=network.device,
        )
        if seen.apart:
            return
        reason = f"a change of the first one moves what it makes of the second by up to {seen.across:.3g}"
    raise RequestError(
        f"the model does not keep documents apart: {reason}",
        where=f"--documents masked and {folder}",
        fix="--documents plain",
    )


def _batches(file: TokenFile, count: int, batch: int, length: int, *, apart: bool) -> Iterator[MicroBatch]:
    for start in range(0, count, batch):
        windows = range(start, min(start + batch, count))
        ids = file.batch(windows, length)
        if apart:
            yield MicroBatch.of_documents(ids, file.document_starts(windows, length))
        else:
            yield MicroBatch.of_windows(ids)


def _examples(file: PackedExamples, count: int, batch: int) -> Iterator[MicroBatch]:
    for start in range(0, count, batch):
        # Behind its example a row holds padding alone, which a causal model does not see: positions are needed nowhere.
        rows = MicroBatch.of_documents(*file.rows(range(start, min(start + batch, count))))
        yield MicroBatch(rows.inputs, rows.targets)


def _loss(network: Any, batches: Iterator[MicroBatch]) -> tuple[float, int]:
    total, tokens = 0.0, 0
    try:
        with torch.no_grad():
            for batch in batches:
                positions = None if batch.positions is None else batch.positions.to(network.device)
                logits = exported.logits(network, batch.inputs.to(network.device), positions)
                total += float(batch.to(logits.device).loss(logits, reduction="sum"))
                tokens += int(batch.target_count)
    except torch.OutOfMemoryError as error:
        raise RefusedError(
            f"the batch does not fit in the GPU's memory: {str(error).splitlines()[0]}",
            where="--batch",
            fix="take a smaller --batch",
        ) from None
    if not tokens:
        raise RequestError(
            "none of these examples has a target", where="--sequences", fix="take more of them: --sequences 0 is all"
        )
    return total / tokens, tokens

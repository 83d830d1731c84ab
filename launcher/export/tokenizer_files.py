"""Give an export its corpus's tokenizer, in a form that transformers loads, and check that it gives the same ids."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from halfstep.launcher.corpus import corpus_manifest as manifests
from halfstep.launcher.corpus.description import read_data
from halfstep.launcher.corpus.pieces import META_SPACE
from halfstep.launcher.data import tokenizer as data_tokenizer
from halfstep.launcher.errors import RequestError
from halfstep.launcher.export.sentencepiece_files import from_sentencepiece

_SAMPLE_TOKENS = 100_000
SAMPLES = (
    "The quick brown fox jumps over the lazy dog. It's 12:30, isn't it?",
    "  two  spaces,\tand\t\ttabs \n\n\n and  lines\r\nof\rall kinds   ",
    " " * 37 + "def f(x):\n" + "\t" * 5 + "return x ** 2  # deep\n" + " " * 64,
    "naïve façade, Straße, Þórður, Đặng, Ω≈ç√∫; a\u0301 is not á; ﬁ, Ⅷ, ½",
    "Москва, Київ; Αθήνα; Երևան; თბილისი; עברית; العربية مَرحَبًا; فارسی",
    "हिन्दी, বাংলা, தமிழ், ไทย, 中文\uff0c日本語のテキスト、한국어; ភាសាខ្មែរ",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 \U0001d518\U0001d52b \U00020bb7 \u200b\u200d\u00a0\u3000\u2028\ufeff\x00\x7f",
    f"{META_SPACE} the lower block {META_SPACE}{META_SPACE}, <0x41>, <unk>, </s>, <s>",
    "aaaaaaaaaaaaaaaaaaaaa ababababababa ======== ---- .... \u2581a",
    "",
)


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What came of a corpus's tokenizer."""

    kind: str
    """`sentencepiece` (converted) or `huggingface` (copied)."""
    sha256: str
    """Of the corpus's tokenizer folder."""
    vocabulary: int
    vocabulary_digest: str | None
    end_of_text: int
    checked_tokens: int
    """How many token ids were compared with those of the corpus's own tokenizer."""
    differs: str | None
    """The first text that gets other ids, None where all get the same."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as it stands in the export's own note."""
        return asdict(self)


def export(corpus: Path, digests: Sequence[str], folder: Path, context: int | None) -> Exported:
    """Write the tokenizer of a prepared corpus into a folder, and compare its ids on the corpus's text and others'.

    Raises RequestError where the corpus has gone, is another one than was trained on, or came without a tokenizer.
    """
    facts = read_data(str(corpus))
    if facts.digest not in digests:
        raise RequestError(
            f"{corpus} holds another corpus than the run was trained on",
            where=f"its digest is {facts.digest}, the checkpoint's {' or '.join(digests)}",
            fix="name the folder of the run's corpus with --data",
        )
    if not facts.has_tokenizer:
        raise RequestError(
            f"{corpus} is a bare token pair and says nothing of its tokenizer",
            where=f"data={corpus}",
            fix="save the tokenizer that made it into the export: AutoTokenizer.from_pretrained(...).save_pretrained()",
        )
    about = manifests.read(corpus)[0].tokenizer
    home = corpus / about.path
    own = data_tokenizer.load(home, about.kind)
    if isinstance(own, data_tokenizer.SentencePiece):
        _save_sentencepiece(own.model, folder, context)
    else:
        shutil.copytree(home, folder, dirs_exist_ok=True)
    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    checked, differs = compare(own, theirs, [*SAMPLES, *_texts(corpus, own)])
    return Exported(
        kind=about.kind,
        sha256=about.sha256,
        vocabulary=about.vocabulary,
        vocabulary_digest=facts.vocabulary_digest,
        end_of_text=about.end_of_text,
        checked_tokens=checked,
        differs=differs,
    )


def _save_sentencepiece(model: bytes, folder: Path, context: int | None) -> None:
    tokenizer, end_of_text = from_sentencepiece(model)
    # As in GPT-2, what ends a document also begins one: it is what a model has seen before a first word.
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), end_of_text)
    length = {"model_max_length": context} if context else {}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **special, **length, clean_up_tokenization_spaces=False
    ).save_pretrained(folder)


def compare(own: data_tokenizer.Tokenizer, theirs: PreTrainedTokenizerBase, texts: list[str]) -> tuple[int, str | None]:
    """Return how many ids were compared, and the first text that gets other ids or does not come back."""
    checked = 0
    for text in texts:
        ids = own.encode(text)
        # As training read it: special tokens spelled out in a text are text.
        theirs_ids = theirs(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        checked += len(ids)
        if list(theirs_ids) != ids:
            place = next(
                (at for at, pair in enumerate(zip(ids, theirs_ids, strict=False)) if pair[0] != pair[1]), len(ids)
            )
            return checked, repr(own.decode(ids[max(0, place - 8) : place + 8]))
        # What is unknown has no text, and each library its own sign for it.
        if own.unknown not in ids and theirs.decode(ids, clean_up_tokenization_spaces=False) != own.decode(ids):
            return checked, f"{text[:40]!r}, when it is decoded"
    return checked, None


def _texts(corpus: Path, own: data_tokenizer.Tokenizer) -> list[str]:
    """Return the documents at the start of the corpus, as text."""
    about = manifests.read(corpus)[0]
    file = corpus / f"{about.splits.train.prefix}.bin"
    tokens = np.fromfile(file, dtype=about.token_dtype, count=_SAMPLE_TOKENS)
    ends = np.flatnonzero(tokens == own.end_of_text)
    return [own.decode(part[part != own.end_of_text].tolist()) for part in np.split(tokens, ends)]

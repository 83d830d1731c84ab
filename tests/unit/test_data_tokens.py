"""Token files: what is written is read back, foreign pairs work, damaged ones are refused with the reason."""

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfstep.launcher.data.tokens import TokenFile, TokenWriter, open_writer
from halfstep.launcher.errors import RequestError


def write(prefix: Path, documents: list[list[int]], dtype: type = np.uint16) -> Path:
    with open_writer(prefix, np.dtype(dtype)) as writer:
        for document in documents:
            writer.add_document(np.array(document, dtype=dtype))
    return prefix


def write_foreign(prefix: Path, tokens: list[int], code: int, dtype: type) -> Path:
    """Write a pair as Megatron-LM does, with its own table of codes."""
    np.array(tokens, dtype=dtype).tofile(f"{prefix}.bin")
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, code, 1, 2)
    Path(f"{prefix}.idx").write_bytes(header + struct.pack("<iqqq", len(tokens), 0, 0, 1))
    return prefix


def test_documents_come_back_as_one_stream(tmp_path: Path) -> None:
    file = TokenFile(write(tmp_path / "a", [[1, 2, 3], [4], [5, 6, 65535]]))
    assert (file.tokens, len(file), file.documents) == (7, 7, 3)
    assert file.slice(0, 7) == [1, 2, 3, 4, 5, 6, 65535]


@settings(max_examples=50, deadline=None)
@given(tokens=st.integers(2, 200), sequence=st.integers(1, 40))
def test_window_i_starts_at_i_times_the_sequence(
    tokens: int, sequence: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = TokenFile(write(tmp_path_factory.mktemp("w") / "a", [list(range(tokens))]))
    count = file.windows(sequence)
    assert count == (tokens - 1) // sequence
    indices = list(reversed(range(count)))
    batch = file.batch(indices, sequence)
    assert batch.shape == (count, sequence + 1)
    assert batch.tolist() == [list(range(i * sequence, i * sequence + sequence + 1)) for i in indices]


def test_a_corpus_shorter_than_the_sequence_has_no_windows(tmp_path: Path) -> None:
    assert TokenFile(write(tmp_path / "a", [[1, 2, 3]])).windows(3) == 0


def test_a_window_beyond_the_last_is_our_mistake(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="below 2"):
        TokenFile(write(tmp_path / "a", [[1, 2, 3]])).batch([2], 1)


@pytest.mark.parametrize(
    ("code", "dtype"),
    [
        (1, np.uint8),
        (2, np.int8),
        (3, np.int16),
        (4, np.int32),
        (5, np.int64),
        (6, np.uint16),
        (7, np.uint32),
        (8, np.uint16),
        (8, np.uint64),
    ],
)
def test_every_integer_of_deepspeed_and_of_megatron_is_read(tmp_path: Path, code: int, dtype: type) -> None:
    file = TokenFile(write_foreign(tmp_path / "a", [7, 0, 99, 3, 5], code, dtype), vocabulary=100)
    assert file.dtype is dtype
    assert file.batch([0, 1], 2).tolist() == [[7, 0, 99], [99, 3, 5]]


@pytest.mark.parametrize(("bad", "dtype"), [(100, np.uint16), (-1, np.int32)])
def test_a_token_outside_the_vocabulary_is_named_with_its_place(tmp_path: Path, bad: int, dtype: type) -> None:
    file = TokenFile(write(tmp_path / "a", [[1, 2, 3, 4, 5, bad, 7]], dtype), vocabulary=100)
    assert file.batch([0], 2).tolist() == [[1, 2, 3]]
    with pytest.raises(RequestError) as refused:
        file.batch([0, 2], 2)
    assert refused.value.what == f"token id {bad} at position 5 is outside the vocabulary of 100"
    assert refused.value.where == str(tmp_path / "a.bin")


def test_a_document_longer_than_an_item_holds_stays_one_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TokenWriter, "_ITEM_TOKENS", 4)
    file = TokenFile(write(tmp_path / "a", [list(range(10)), [10]]))
    assert file.documents == 2
    assert file.slice(0, 11) == list(range(11))


def test_a_writer_that_fails_leaves_no_index(tmp_path: Path) -> None:
    with pytest.raises(AttributeError), open_writer(tmp_path / "a", np.dtype(np.uint16)) as writer:
        writer.add_document("not an array")  # type: ignore[arg-type]
    assert not (tmp_path / "a.idx").exists()


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda p: p.with_suffix(".idx").unlink(), "the token index cannot be read: No such file or directory"),
        (lambda p: p.with_suffix(".bin").unlink(), "the tokens cannot be read: No such file or directory"),
        (lambda p: p.with_suffix(".idx").write_bytes(b""), "a.idx is not a Megatron index of version 1"),
        (lambda p: p.with_suffix(".idx").write_bytes(b"x" * 80), "a.idx is not a Megatron index of version 1"),
        (
            lambda p: p.with_suffix(".idx").write_bytes(p.with_suffix(".idx").read_bytes()[:-1]),
            "a.idx has 61 bytes where its header promises 62: it is half-written",
        ),
        (
            lambda p: p.with_suffix(".bin").write_bytes(b"1234"),
            "a.bin has 4 bytes, its index speaks of 3 tokens, which take 6 or 24",
        ),
    ],
)
def test_a_damaged_pair_is_refused_with_the_reason(tmp_path: Path, damage: object, what: str) -> None:
    prefix = write(tmp_path / "a", [[1, 2, 3]])
    damage(prefix)  # type: ignore[operator]
    with pytest.raises(RequestError) as refused:
        TokenFile(prefix)
    assert refused.value.what == what


def test_a_pair_without_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="there are no tokens in it"):
        TokenFile(write(tmp_path / "a", []))


def test_opening_a_pair_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    TokenFile(write(tmp_path / "a", [[1, 2, 3]]))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("dtype", "code"), [(np.uint16, 8), (np.int32, 4)])
def test_what_is_written_carries_megatrons_own_code_for_its_type(tmp_path: Path, dtype: type, code: int) -> None:
    with open_writer(tmp_path / "a", np.dtype(dtype)) as writer:
        writer.add_document(np.array([1, 2, 3], dtype=dtype))
    assert (tmp_path / "a.idx").read_bytes()[17] == code
    assert TokenFile(tmp_path / "a").slice(0, 3) == [1, 2, 3]

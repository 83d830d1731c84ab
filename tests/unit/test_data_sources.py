"""Sources: what is found, how it is read in pieces, and how exactly a bad file is named."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from halfstep.launcher.data import readers, sources
from halfstep.launcher.errors import RequestError


def documents(source: str | Path, field: str = "text") -> tuple[list[str], sources.Tally]:
    tally, texts, parts = sources.Tally(), [], []
    for piece in sources.pieces(sources.find(str(source), field), tally):
        parts.append(piece.text)
        if piece.ends_document:
            texts.append("".join(parts))
            parts = []
    assert not parts
    return texts, tally


def refusal(source: str | Path, field: str = "text") -> RequestError:
    with pytest.raises(RequestError) as refused:
        documents(source, field)
    error = refused.value
    assert all("\n" not in line for line in (error.what, error.where, error.fix))
    return error


def write_rows(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_text_file_is_a_document_to_the_byte(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("é\r\n\tx \n".encode())
    texts, tally = documents(tmp_path / "a.txt")
    assert texts == ["é\r\n\tx \n"]
    assert (tally.documents, tally.text_bytes) == (1, 8)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert documents(tmp_path / "a.txt")[0] == ["hello"]


@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet="ab \né🎉", min_size=1, max_size=120).filter(str.strip), size=st.integers(5, 40))
def test_pieces_of_a_long_file_join_to_the_file(text: str, size: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("t") / "a.txt"
    path.write_text(text, newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "PIECE_CHARACTERS", size)
        from_file = list(readers.file_pieces(path, "text"))
        from_text = list(readers.cut(text))
    for pieces in (from_file, from_text):
        assert "".join(piece.text for piece in pieces) == text
        assert [piece.ends_document for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(len(piece.text) <= size for piece in from_text)
    assert all(len(piece.text.encode()) <= 3 * size for piece in from_file)


def test_pieces_end_after_line_breaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "PIECE_CHARACTERS", 64)
    (tmp_path / "a.txt").write_text("one line of words\n" * 100)
    pieces = list(readers.file_pieces(tmp_path / "a.txt", "text"))
    assert len(pieces) > 20
    assert {piece.text[-6:] for piece in pieces} <= {"words\n", ""}


def test_a_folder_is_read_whole_in_sorted_order_with_mixed_kinds(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.md").write_text("third")
    (tmp_path / ".hidden").write_text("never")
    write_rows(tmp_path / "b.jsonl", [{"text": "first"}, {"text": "second"}])
    pyarrow.parquet.write_table(pyarrow.table({"text": ["fourth"]}), tmp_path / "z.parquet")
    (tmp_path / "empty.txt").write_text(" \n")
    texts, tally = documents(tmp_path)
    assert texts == ["first", "second", "third", "fourth"]
    assert tally.empty_documents == 1


def test_a_glob_names_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "c.log"):
        (tmp_path / name).write_text(name)
    assert documents(tmp_path / "*.txt")[0] == ["a.txt", "b.txt"]
    assert refusal(tmp_path / "*.nothing").what == "there are no files in it"


def test_compressed_json_lines_are_read(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write('{"body": "x"}\n\n{"body": "y"}\n')
    assert documents(tmp_path / "a.jsonl.gz", "body")[0] == ["x", "y"]
    cut = (tmp_path / "a.jsonl.gz").read_bytes()[:-9]
    (tmp_path / "a.jsonl.gz").write_bytes(cut)
    assert refusal(tmp_path / "a.jsonl.gz", "body").what.startswith("a.jsonl.gz is not a whole gzip file")


@pytest.mark.parametrize("before", [b"", b"ok \xc3\xa9\n" * 50])
def test_invalid_utf8_is_reported_with_file_and_offset(
    tmp_path: Path, before: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "PIECE_CHARACTERS", 64)
    (tmp_path / "a.txt").write_bytes(before + b"caf\xe9 here\n" + b"more\n" * 50)
    error = refusal(tmp_path / "a.txt")
    assert error.what == f"a.txt is not UTF-8 text: invalid continuation byte 0xe9 at byte {len(before) + 3}"
    assert error.where == str(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"body": 1}', "line 3 has no field 'text'; it has 'body'"),
        ("{}", "line 3 has no field 'text'; it has none at all"),
        ('{"text": }', "line 3 is not JSON: Expecting value at column 10"),
        ('{"text": null}', "the field 'text' of line 3 holds null, not text"),
        ("[1]", "line 3 is a JSON list, not an object with a field 'text'"),
        (
            '{"text": "\\ud800"}',
            "the field 'text' of line 3 holds half a surrogate pair at character 0, which is no text",
        ),
        ("[" * 100_000, "line 3 is JSON that cannot be read: maximum recursion depth exceeded"),
    ],
)
def test_a_bad_json_line_is_reported_with_file_and_line(tmp_path: Path, line: str, what: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n\n' + line + "\n")
    error = refusal(path)
    assert error.what.startswith(what)
    assert error.where == f"{path}, line 3"


def test_a_misnamed_field_is_answered_with_the_right_one(tmp_path: Path) -> None:
    assert refusal(write_rows(tmp_path / "a.jsonl", [{"id": 1, "texts": "x"}])).fix == "--field texts"


def test_invalid_utf8_in_json_lines_has_the_offset_in_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n{"text": "\xff"}\n')
    assert refusal(tmp_path / "a.jsonl").what == "a.jsonl is not UTF-8 text: invalid start byte 0xff at byte 24"


def test_one_json_array_over_many_lines_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[\n {"text": "x"}\n]\n')
    assert refusal(tmp_path / "a.json").fix == (
        "JSON lines hold one object a line, not one array over many: jq -c '.[]' a.json"
    )


def test_bad_parquet_is_reported_with_file_or_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"texts": ["x"]}), path)
    assert refusal(path).what == "a.parquet has no field 'text'; it has 'texts'"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", None]}), path)
    assert refusal(path).what == "the field 'text' of row 2 holds null, not text"
    path.write_bytes(b"this is no parquet")
    assert refusal(path).what.startswith("a.parquet is not a readable parquet file")


def test_a_missing_file_is_not_taken_for_a_hub_name() -> None:
    assert refusal("corpus/missing.jsonl").what == "there is no file or folder 'corpus/missing.jsonl'"
    assert refusal("missing").what == "there is no file or folder 'missing'"


def test_a_hub_name_without_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for name in ("hub:owner/name:train", "owner/name"):
        error = refusal(name)
        assert error.what.startswith("'owner/name' is no file here, and the hub does not answer")
        assert "name their folder" in error.fix
    assert refusal("hub:owner").what == "this is not the name of a hub data set"


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("owner/name", ("owner/name", None, "train")),
        ("hub:owner/name:test", ("owner/name", None, "test")),
        ("hub:owner/name/config:train[:5%]", ("owner/name", "config", "train[:5%]")),
    ],
)
def test_a_hub_name_may_carry_configuration_and_split(asked: str, expected: tuple[str, str | None, str]) -> None:
    assert sources._hub_name(asked) == expected


def test_the_standard_library_is_read_as_python_reads_it() -> None:
    source = sources.find("stdlib")
    names = [file.as_posix() for file in source.files]
    assert names == sorted(names)
    assert not any(part in ("test", "tests", "site-packages") for file in source.files for part in file.parts[-3:])
    assert any(name.endswith("/json/decoder.py") for name in names)
    texts, tally = documents("stdlib")
    assert 8e6 < tally.text_bytes < 20e6
    assert tally.documents + tally.empty_documents + len(tally.undecodable_files) == len(source.files)
    # Open to Python's own rules: a file with a PEP 263 line, decoded, holds no replacement and no stray bytes.
    assert any("class JSONDecoder" in text for text in texts)


def test_a_python_file_is_decoded_by_its_own_declaration(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"# -*- coding: latin-1 -*-\nx = '\xe9'\n")
    (tmp_path / "b.py").write_bytes(b"x = '\xe9'\n")
    assert readers.python_source(tmp_path / "a.py") == "# -*- coding: latin-1 -*-\nx = 'é'\n"
    assert readers.python_source(tmp_path / "b.py") is None


def test_the_fingerprint_follows_names_and_sizes_not_the_place(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for name in ("a.txt", "b.txt"):
            (tmp_path / folder / name).write_text("same")
    first, second = (sources.find(str(tmp_path / folder)).fingerprint for folder in ("one", "two"))
    (tmp_path / "two" / "b.txt").write_text("longer")
    assert first == second != sources.find(str(tmp_path / "two")).fingerprint

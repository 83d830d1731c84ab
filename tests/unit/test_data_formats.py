"""What a file is: names in any case, compressions, tables, and files that are not what their names say."""

import bz2
import gzip
import io
import json
import lzma
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from test_data_sources import documents, refusal, write_rows

from halfstep.launcher.cli import main
from halfstep.launcher.data import formats, readers, sources, streams, text_rows
from halfstep.launcher.data.prepare import prepare
from halfstep.launcher.errors import RequestError

ROWS = [{"id": 1, "text": "first é"}, {"id": 2, "text": "second\nof two lines"}]
TEXTS = [row["text"] for row in ROWS]
JSON_LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CSV = 'id,text\r\n1,first é\r\n2,"second\nof two lines"\r\n'.encode()


def zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as out:
        out.write(data)
    return sink.getvalue().to_pybytes()


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstd,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", JSON_LINES),
        ("a.JSONL", JSON_LINES),
        ("a.ndjson", JSON_LINES),
        ("a.NDJson", JSON_LINES),
        ("a.jsonlines", JSON_LINES),
        ("a.json", JSON_LINES),
        ("a.csv", CSV),
        ("a.CSV", CSV),
        ("a.tsv", CSV.replace(b",", b"\t")),
    ],
)
def test_every_table_is_read_by_its_name_in_any_case_and_compression(
    tmp_path: Path, name: str, content: bytes, suffix: str
) -> None:
    for file in (tmp_path / f"{name}{suffix}", tmp_path / f"{name}{suffix.upper()}"):
        file.write_bytes(COMPRESS[suffix](b"\xef\xbb\xbf" + content))
        assert documents(file)[0] == TEXTS


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a.md", "a", "a.log"])
def test_text_is_one_document_in_any_compression(tmp_path: Path, name: str, suffix: str) -> None:
    (tmp_path / f"{name}{suffix}").write_bytes(COMPRESS[suffix]("é and\n\nmore".encode() * 1000))
    assert documents(tmp_path / f"{name}{suffix}")[0] == ["é and\n\nmore" * 1000]


def test_parquet_is_known_in_any_case_and_not_inside_gzip(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.PARQUET")
    assert documents(tmp_path / "a.PARQUET")[0] == TEXTS
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress((tmp_path / "a.PARQUET").read_bytes()))
    assert refusal(tmp_path / "a.parquet.gz").what == "a.parquet.gz is a parquet file inside gzip"


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".xz", ".bz2"])
def test_several_streams_in_one_file_are_all_read(tmp_path: Path, suffix: str) -> None:
    compress = COMPRESS[suffix]
    first, second = (json.dumps(row).encode() + b"\n" for row in ROWS)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(compress(first) + compress(b"") + compress(second))
    assert documents(path)[0] == TEXTS
    if suffix == ".xz":
        path.write_bytes(compress(first) + bytes(8) + compress(second) + bytes(4))
        assert documents(path)[0] == TEXTS


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".xz", ".bz2"])
@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda good: good[:-3], "is not a whole"),
        (lambda good: good[: len(good) // 2], "is not a whole"),
        (lambda good: good + b"and what is behind", "is not a whole"),
        (lambda good: good + good[:-3], "is not a whole"),
        (lambda good: good + b"\x01" + good[1:], "is not a whole"),
        (lambda good: b"", "has 0 bytes, and a whole"),
        (lambda good: JSON_LINES, "is not a whole"),
    ],
)
def test_a_compressed_file_that_is_not_whole_is_refused(
    tmp_path: Path, suffix: str, damage: Callable[[bytes], bytes], what: str
) -> None:
    for name, content in (("a.jsonl", JSON_LINES), ("a.txt", b"text"), ("a.csv", b"text\nx\n")):
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(damage(COMPRESS[suffix](content * 2**18 if name == "a.txt" else content)))
        assert refusal(path).what.startswith(f"{path.name} {what}")


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".xz", ".bz2"])
def test_a_compression_that_the_name_does_not_say_is_told(tmp_path: Path, suffix: str) -> None:
    for name in ("a.txt", "a.jsonl", "a.csv"):
        (tmp_path / name).write_bytes(COMPRESS[suffix](JSON_LINES))
        error = refusal(tmp_path / name)
        assert "and its name does not say so" in error.what
        assert error.fix == f"add {suffix} to it"
    (tmp_path / f"b.txt{'.gz' if suffix != '.gz' else '.xz'}").write_bytes(COMPRESS[suffix](JSON_LINES))
    assert "it is compressed with" in refusal(tmp_path / "b.txt.*").what


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.zip", b"PK\x03\x04", "a.zip is an archive, which is not read"),
        ("a.TAR", b"", "a.TAR is an archive, which is not read"),
        ("a.tar.gz", gzip.compress(b"x"), "a.tar.gz is an archive, which is not read"),
        ("a.tgz", b"", "a.tgz is an archive, which is not read"),
        ("a.arrow", b"ARROW1", "a.arrow is a table of a kind that is not read"),
        ("a.xlsx", b"PK\x03\x04", "a.xlsx is a table of a kind that is not read"),
        ("a.pdf", b"%PDF", "a.pdf is a document, not plain text"),
        ("a.txt.lz4", b"", "a.txt.lz4 is compressed in a way that is not read"),
        ("a.txt", b"PK\x03\x04....", "a.txt is an archive, which is not read"),
        ("a.gz", gzip.compress(b"x" * 257 + b"ustar" + bytes(300)), "a.gz is an archive, which is not read"),
        ("a.gz", gzip.compress(gzip.compress(b"x")), "a.gz is compressed twice"),
        ("a.txt", b"PAR1....", "a.txt is a parquet file, and its name does not say so"),
        ("a.txt", "x".encode("utf-16"), "a.txt is UTF-16LE, not UTF-8 text"),
        ("a.jsonl", b"\xfe\xff\x00{", "a.jsonl is UTF-16BE, not UTF-8 text"),
        ("a.csv", "x".encode("utf-32"), "a.csv is UTF-32LE, not UTF-8 text"),
        ("a.txt", b"text\x00", "a.txt has a NUL byte at byte 4: it is binary, or text in UTF-16 or UTF-32"),
        ("a.txt", b"x" * 5000 + b"\x00", "a.txt has a NUL byte at byte 5000: it is binary"),
        ("a.txt.gz", gzip.compress(b"x" * 5000 + b"\x00"), "a.txt.gz has a NUL byte at byte 5000: it is binary"),
        ("a.csv", b"text\nx\ny\x00\n", "a.csv has a NUL byte at byte 8: it is binary"),
    ],
)
def test_a_file_that_is_no_text_is_refused_by_name(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    (tmp_path / name).write_bytes(content)
    error = refusal(tmp_path / name)
    assert error.what.startswith(what)
    assert error.where in (str(tmp_path / name), f"--source {tmp_path / name}")
    # In a folder it is refused as well, not passed over.
    (tmp_path / "good.txt").write_text("good")
    assert refusal(tmp_path).what.startswith(what)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.parquet", "a.txt.gz", "a.JSONL.ZST"])
@pytest.mark.parametrize(
    ("content", "what", "fix"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n", "git-LFS", "git lfs pull"),
        (b"/annex/objects/SHA256E-s12--0.txt\n", "git-annex", "git annex get"),
    ],
)
def test_a_pointer_to_a_file_that_was_not_fetched_is_refused(
    tmp_path: Path, name: str, content: bytes, what: str, fix: str
) -> None:
    (tmp_path / name).write_bytes(content)
    error = refusal(tmp_path / name)
    assert error.what == f"{name} is a {what} pointer: the file itself was not fetched"
    assert fix in error.fix


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", ["a.txt", "a", "a.log"])
def test_text_whose_lines_are_json_objects_is_told(tmp_path: Path, name: str, suffix: str) -> None:
    path = tmp_path / f"{name}{suffix}"
    path.write_bytes(COMPRESS[suffix](b"\n" + JSON_LINES))
    error = refusal(path)
    assert error.what == f"{path.name} would be read as plain text, and its lines are JSON objects"
    assert "--format jsonl" in error.fix
    tally = sources.Tally()
    for kind, expected in (("jsonl", 2), ("text", 1)):
        source = sources.find(str(path), format=kind)
        assert sum(piece.ends_document for piece in sources.pieces(source, tally)) == expected


@pytest.mark.parametrize(
    "content",
    [
        '{"text": "x"}',  # one object with the field
        '{"other": 1}\n{"other": 2}\n',  # several without it
        '{"text": "x"}\n' * 100_000,  # beyond the first piece
    ],
)
def test_json_lines_are_told_by_one_object_with_the_field_or_by_several(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.txt").write_text(content)
    assert "its lines are JSON objects" in refusal(tmp_path / "a.txt").what


@pytest.mark.parametrize(
    "content",
    ['{"version": 3}', '{"a": 1}\nand then text\n', "{\n  1\n}\n", "{not json\n{not json\n", '[1]\n{"a": 1}\n'],
)
def test_text_with_a_brace_at_its_start_stays_text(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.txt").write_text(content)
    assert documents(tmp_path / "a.txt")[0] == [content]


# --- rows


def test_a_csv_field_may_hold_quotes_commas_and_line_breaks(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('\n"id","te""xt"\n1,"say ""a, b""\r\nand c"\n\n2,plain\n')
    assert documents(tmp_path / "a.csv", 'te"xt')[0] == ['say "a, b"\r\nand c', "plain"]


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ";"), ("a.csv", "\t"), ("a.tsv", "\t")])
def test_the_delimiter_is_the_one_that_makes_the_field_a_column(tmp_path: Path, name: str, delimiter: str) -> None:
    (tmp_path / name).write_text(f"id{delimiter}text\n1{delimiter}a, b\n")
    assert documents(tmp_path / name)[0] == ["a, b"]


def test_one_column_needs_no_delimiter(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\nfirst\nsecond\n")
    assert documents(tmp_path / "a.csv")[0] == ["first", "second"]


@pytest.mark.parametrize(
    ("name", "content", "what", "line"),
    [
        ("a.csv", "id,body\n1,x\n", "a.csv has no field 'text'; it has 'id', 'body'", 1),
        ("a.csv", "text,text\n1,x\n", "a.csv has 2 columns 'text'", 1),
        ("a.csv", "id,text\n1,x,y\n", "the row that begins in line 2 has 3 columns, and the table 2", 2),
        ("a.csv", 'id,text\n1,"x\ny"\n2\n', "the row that begins in line 4 has 1 columns, and the table 2", 4),
        ("a.csv", 'id,text\n1,"x" y\n', "line 2 is no row of a table: ',' expected after '\"'", 2),
        ("a.csv", 'id,text\n1,x\n2,"never\nclosed\n', "a quotation mark in the row that begins in line 3 is never", 3),
        (
            "a.tsv",
            'id\ttext\n1\t"So\n2\tit is"\n',
            "the row that begins in line 2 has quotation marks around tabs and line breaks",
            2,
        ),
    ],
)
def test_a_bad_table_is_reported_with_file_and_line(
    tmp_path: Path, name: str, content: str, what: str, line: int
) -> None:
    (tmp_path / name).write_text(content)
    error = refusal(tmp_path / name)
    assert error.what.startswith(what)
    assert error.where == f"{tmp_path / name}, line {line}"


def test_a_large_field_is_read_and_one_without_end_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.csv").write_text("id,text\n1," + "x" * 500_000 + "\n")
    assert len(documents(tmp_path / "a.csv")[0][0]) == 500_000
    monkeypatch.setattr(streams, "LONGEST_LINE", 1000)
    (tmp_path / "a.jsonl").write_bytes(json.dumps({"text": "x" * 980}).encode() + b"\n" + b"x" * 1001)
    error = refusal(tmp_path / "a.jsonl")
    assert error.where == f"{tmp_path / 'a.jsonl'}, line 2"
    assert "is longer than" in error.what


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_field_inside_another_is_named_with_a_dot(tmp_path: Path, kind: str) -> None:
    table = [{"id": n, "meta": {"text": text, "more": {"text": f"in {text}"}}} for n, text in enumerate(TEXTS)]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        write_rows(path, list(table))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path)
    assert documents(path, "meta.text")[0] == TEXTS
    assert documents(path, "meta.more.text")[0] == [f"in {text}" for text in TEXTS]
    error = refusal(path, "meta.tex")
    assert error.what.endswith("has no field 'meta.tex'; it has 'id', 'meta.text', 'meta.more.text'")
    assert error.fix == "--field meta.text"
    assert refusal(path, "meta").what.endswith(("holds dict, not text", "holds dict, not text"))


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_a_field_whose_name_has_a_dot_is_a_field(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        write_rows(path, [{"meta.text": "x", "meta": {"text": "y"}}])
    elif kind == "csv":
        path.write_text("meta.text\nx\n")
    else:
        pyarrow.parquet.write_table(pyarrow.table({"meta.text": ["x"]}), path)
    assert documents(path, "meta.text")[0] == ["x"]


def test_the_same_key_twice_in_a_row_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x", "n": {"text": "\\"text\\""}}\n{"text": "a", "text": "b"}\n')
    error = refusal(tmp_path / "a.jsonl")
    assert error.what == "line 2 is JSON that cannot be read: it has 'text' twice"


@pytest.mark.parametrize(
    ("content", "fix"),
    [
        ('[{"text": "x"}]', "not one array over many: jq -c '.[]' a.json"),
        ('[\n{"text": "x"}\n]', "not one array over many: jq -c '.[]' a.json"),
        ('{"text": "x"}{"text": "y"}\n', "JSON lines hold one object a line: jq -c . a.json"),
        ('{"text": "x"} {"text": "y"}\n', "JSON lines hold one object a line: jq -c . a.json"),
        ('{\n  "text": "x"\n}\n', "JSON lines hold one object a line: jq -c . a.json"),
    ],
)
def test_json_that_is_not_one_object_a_line_is_answered_with_what_makes_it_so(
    tmp_path: Path, content: str, fix: str
) -> None:
    (tmp_path / "a.json").write_text(content)
    assert refusal(tmp_path / "a.json").fix.endswith(fix)


BAD = [
    '{"text": null}', '{"text": 3}', '{"text": ["x"]}', '{"body": "x"}', "{", "null", '"x"', "[]",
    '{"text": "\\ud800"}', '{"text": "a", "text": "b"}', "[" * 100_000, '{"text": "x\x00"}', "{}",
]  # fmt: skip


def test_bad_rows_are_skipped_and_counted_where_that_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [line.encode() for bad in BAD for line in (bad, '{"text": "good"}')]
    path.write_bytes(b"\n".join([*lines, b'{"text": "\xff"}', b'{"text": "good"}', b""]))
    tally = sources.Tally()
    source = sources.find(str(path), skip_bad=True)
    assert [piece.text for piece in sources.pieces(source, tally)] == ["good"] * (len(BAD) + 1)
    assert (tally.bad_rows, tally.documents) == (len(BAD) + 1, len(BAD) + 1)
    assert tally.bad_examples[0] == f"{path}, line 1: the field 'text' of line 1 holds null, not text"
    assert len(tally.bad_examples) == 5
    error = refusal(path)
    assert (error.where, error.fix) == (f"{path}, line 1", text_rows.SKIP)


def test_null_rows_of_parquet_and_odd_rows_of_csv_are_skipped_too(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["x", None, "y"], "m": [{"t": "p"}, None, {"t": None}]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "b.csv").write_text('text,id\nz,1\nw\n"q"r,2\nv,3\n')
    for file, field, good, bad in (
        ("a.parquet", "text", ["x", "y"], 1),
        ("a.parquet", "m.t", ["p"], 2),
        ("b.csv", "text", ["z", "v"], 2),
    ):
        tally = sources.Tally()
        source = sources.find(str(tmp_path / file), field, skip_bad=True)
        assert [piece.text for piece in sources.pieces(source, tally)] == good
        assert tally.bad_rows == bad
    assert refusal(tmp_path / "a.parquet").where == f"{tmp_path / 'a.parquet'}, row 2"


# --- folders


def test_links_to_folders_and_files_are_followed_once(tmp_path: Path) -> None:
    elsewhere, top = tmp_path / "elsewhere", tmp_path / "top"
    (elsewhere / "deep").mkdir(parents=True)
    (elsewhere / "deep" / "a.txt").write_text("linked")
    (elsewhere / "up").symlink_to(elsewhere)
    top.mkdir()
    (top / "a.txt").write_text("own")
    (top / "b.txt").symlink_to("a.txt")
    (top / "c.txt").hardlink_to(top / "a.txt")
    (top / "data").symlink_to(elsewhere)
    (top / "again").symlink_to(elsewhere)
    (top / "loop").symlink_to(top)
    (top / "gone.txt").symlink_to("nowhere")
    (top / "round").symlink_to("round")
    (top / ".hidden").write_text("never")
    os.mkfifo(top / "pipe")
    source = sources.find(str(top))
    assert [file.relative_to(top).as_posix() for file in source.files] == ["a.txt", "again/deep/a.txt"]
    assert {kind: said["names"] for kind, said in source.left_out.to_dict().items()} == {
        "further names of the same files": ["b.txt", "c.txt"],
        "further names of the same folders": ["again/up", "data", "loop"],
        "hidden files or folders": [".hidden"],
        "links to nothing": ["gone.txt", "round"],
        "pipes, sockets or devices": ["pipe"],
    }


def test_of_several_names_the_one_that_says_what_it_holds_is_read(tmp_path: Path) -> None:
    """As the hub's cache has it: content under a hash, and a link with the file's name."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots").mkdir()
    write_rows(tmp_path / "blobs" / "0a1b", list(ROWS))
    (tmp_path / "snapshots" / "train.jsonl").symlink_to("../blobs/0a1b")
    assert documents(tmp_path)[0] == TEXTS


def test_a_glob_reads_no_file_twice_and_says_what_it_passed_over(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("once")
    (tmp_path / "b.txt").symlink_to("a.txt")
    (tmp_path / "c.txt").symlink_to("nowhere")
    source = sources.find(str(tmp_path / "*"))
    assert [file.name for file in source.files] == ["a.txt"]
    assert {kind: said["count"] for kind, said in source.left_out.to_dict().items()} == {
        "folders": 1,
        "further names of the same files": 1,
        "links to nothing": 1,
    }


def test_a_folder_nested_deeper_than_python_calls_is_read(tmp_path: Path) -> None:
    chain = [tmp_path / "top"]
    while len(chain) < 1200:
        chain.append(chain[-1] / "d")
    for folder in chain:
        folder.mkdir()
    file = chain[-1] / "a.txt"
    file.write_text("deep")
    try:
        assert documents(tmp_path)[0] == ["deep"]
    finally:  # who clears away after tests calls itself for each folder
        file.unlink()
        for folder in reversed(chain):
            folder.rmdir()


@pytest.mark.parametrize("locked", ["sub", "sub/a.txt"])
def test_what_may_not_be_read_is_refused_before_anything_is(
    tmp_path: Path, locked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("secret")
    # Root may read everything, so the system's answers are made up.
    real_scan, real_access = os.scandir, os.access

    def scandir(path: Path) -> object:
        if Path(path) == tmp_path / locked:
            raise PermissionError(13, "Permission denied", str(path))
        return real_scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / locked and real_access(path, mode))
    error = refusal(tmp_path)
    assert error.what == f"{tmp_path / locked} cannot be read: Permission denied"


def test_a_pipe_or_a_device_is_no_source(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in (tmp_path / "pipe", "/dev/zero"):
        assert refusal(name).what == f"{name} is a pipe or a device, and a source is read more than once"


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", f"{'y/' * 3000}z"])
def test_a_name_that_no_system_takes_is_refused(name: str) -> None:
    assert refusal(name).where.startswith("--source ")


def test_an_overridden_format_still_refuses_what_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.dat").write_bytes(b"\x00\x01")
    with pytest.raises(RequestError, match="NUL byte"):
        list(readers.file_pieces(tmp_path / "a.dat", "text", kind="jsonl"))


# --- mutations


def test_mutated_files_are_refused_by_name_and_no_checksum_is_passed_over(tmp_path: Path) -> None:
    draw = random.Random(0)
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS * 50), buffer)
    good = {"a.parquet": buffer.getvalue()}
    for suffix, compress in COMPRESS.items():
        tsv = CSV.replace(b",", b"\t")
        for name, content in (("a.jsonl", JSON_LINES * 20), ("a.csv", CSV), ("a.tsv", tsv), ("a.txt", b"text\n" * 200)):
            good[f"{name}{suffix}"] = compress(content)
    for name, content in good.items():
        (tmp_path / name).write_bytes(content)
    texts = {name: documents(tmp_path / name)[0] for name in good}
    refused = 0
    for _ in range(1500):
        name = draw.choice(list(good))
        (tmp_path / name).write_bytes(damaged(draw, good[name]))
        try:
            read = documents(tmp_path / name)[0]
        except RequestError as error:
            refused += name in error.where
        else:
            assert read == texts[name] or not name.endswith((".gz", ".xz", ".bz2"))
    assert refused > 1000


def damaged(draw: random.Random, content: bytes) -> bytes:
    """Cut, lengthen, blank, overwrite or flip some bytes, often near the start."""
    kind, at = draw.randrange(5), draw.randrange(min(len(content), 200) if draw.random() < 0.5 else len(content))
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content + bytes(draw.randrange(1, 40))
    if kind == 2:
        return content[:at] + bytes(draw.randrange(1, 9)) + content[at + 1 :]
    if kind == 3:
        return content[:at] + draw.randbytes(8) + content[at + 8 :]
    return content[:at] + bytes([content[at] ^ (1 << draw.randrange(8))]) + content[at + 1 :]


def test_the_command_takes_every_format_and_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.dat").write_bytes(JSON_LINES * 200)
    arguments = ["data", "prepare", "--source", str(tmp_path / "a.dat"), "--out", str(tmp_path / "out"), "--vocab-size"]
    with pytest.raises(SystemExit):
        main.main([*arguments, "300", "--format", "nothing"])
    said = capsys.readouterr().err
    assert all(repr(choice) in said or choice in said for choice in formats.CHOICES)
    with pytest.raises(RequestError, match="there is no format 'nothing'"):
        sources.find(str(tmp_path / "a.dat"), format="nothing")
    assert main.main([*arguments, "290", "--format", "jsonl", "--workers", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["source"]["documents"] == 400


def test_what_is_left_out_stands_in_the_manifest_and_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.jsonl").write_bytes(JSON_LINES * 100 + b'{"text": null}\n{"text": " "}\n' * 3)
    (source / "b.jsonl").symlink_to("a.jsonl")
    (source / "gone\x1b[31m.txt").symlink_to("nowhere")
    arguments = ["data", "prepare", "--source", str(source), "--out", str(tmp_path / "out"), "--vocab-size", "290"]
    assert main.main([*arguments, "--workers", "1"]) == 2
    assert "or leave such rows out: --skip-bad" in capsys.readouterr().err
    assert main.main([*arguments, "--workers", "1", "--skip-bad"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:5] == [
        "left out    3 empty documents",
        "left out    1 further names of the same files: b.jsonl",
        "left out    1 links to nothing: gone\\x1b[31m.txt",
        f"left out    3 bad rows, the first: {source / 'a.jsonl'}, line 201: "
        "the field 'text' of line 201 holds null, not text",
    ]
    kept = json.loads((tmp_path / "out" / "manifest.json").read_text())["source"]
    assert kept["bad_rows"]["count"] == 3
    assert kept["left_out"]["links to nothing"] == {"count": 1, "names": ["gone\x1b[31m.txt"]}


def test_rows_that_are_all_bad_are_refused_with_what_is_wrong_with_them(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [{"body": "x"}] * 20)
    with pytest.raises(RequestError) as refused:
        prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", vocab_size=300, skip_bad=True, progress=False)
    assert refused.value.what.startswith("all 20 rows were left out as bad, the first: ")
    assert refused.value.fix == "--field body"


def test_a_name_that_is_no_utf8_is_kept_as_far_as_it_goes(tmp_path: Path) -> None:
    source = tmp_path / os.fsdecode(b"caf\xe9")
    source.mkdir()
    (source / "a.txt").write_bytes(JSON_LINES.replace(b"{", b"<") * 200)
    options: dict[str, Any] = {"vocab_size": 290, "workers": 1, "progress": False}
    made = prepare(str(source), tmp_path / "out", **options)
    assert made["source"]["asked"] == f"{tmp_path}/caf?"
    assert prepare(str(source), tmp_path / "out", **options) == made

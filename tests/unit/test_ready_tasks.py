"""Ready tasks: real text where a machine has it, no source in two splits, the same files for the same seed."""

import io
import json
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from halfstep.launcher.cli.main import main
from halfstep.launcher.config import task_file
from halfstep.launcher.ready_tasks import catalogues
from halfstep.launcher.tasks import task_rows

VERBS = ("read", "write", "open", "close", "copy", "move", "find", "show")
GERMAN = {
    "file": "Datei",
    "folder": "Ordner",
    "line": "Zeile",
    "page": "Seite",
    "image": "Bild",
    "table": "Tabelle",
    "word": "Wort",
    "key": "Taste",
    "window": "Fenster",
    "menu": "Liste",
}
MESSAGES = {f"cannot {verb} this {thing}": f"{GERMAN[thing]} {verb}en geht nicht" for verb in VERBS for thing in GERMAN}


def mo(file: Path, entries: dict[str, str]) -> None:
    """Write a catalogue as msgfmt does: sorted, its header under the empty message."""
    file.parent.mkdir(parents=True, exist_ok=True)
    entries = {"": "Content-Type: text/plain; charset=UTF-8\n", **entries}
    pairs = sorted((key.encode(), text.encode()) for key, text in entries.items())
    at, tables, strings = 28 + 16 * len(pairs), [b"", b""], b""
    for side in (0, 1):
        for pair in pairs:
            tables[side] += struct.pack("<II", len(pair[side]), at + len(strings))
            strings += pair[side] + b"\0"
    head = struct.pack("<7I", 0x950412DE, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, 0)
    file.write_bytes(head + tables[0] + tables[1] + strings)


@pytest.fixture
def messages(tmp_path: Path) -> Path:
    """A folder of catalogues as a system has them, with much in it that is no short sentence."""
    folder = tmp_path / "locale"
    odd = {
        "cannot read %s": "kann %s nicht lesen",
        "--version": "--version",
        "cannot read": "cannot read",
        "menu\x04_Open file\n": "_Öffnen\n",
        "cannot read this file": "ein anderes Wort",
    }
    mo(
        folder / "de" / "LC_MESSAGES" / "tool.mo",
        {**MESSAGES, **odd, "cannot read this file": "Datei lesen geht nicht"},
    )
    for number in (1, 2):
        mo(folder / "de" / "LC_MESSAGES" / f"other{number}.mo", {"cannot read this file": "Datei ist unlesbar"})
    mo(folder / "de" / "LC_MESSAGES" / "iso_3166-1.mo", {"cannot read this image": "Frankreich"})
    (folder / "de" / "LC_MESSAGES" / "damaged.mo").write_bytes(b"\xde\x12\x04\x95 nonsense")
    mo(folder / "fr" / "LC_MESSAGES" / "tool.mo", {key: f"{text} fr" for key, text in MESSAGES.items()})
    return folder


def _make(out: Path, kind: str, *more: str) -> dict[str, list[dict[str, str]]]:
    assert main(["task", "make", kind, "--out", str(out), *more]) == 0
    splits = {split: out / f"{split}.jsonl" for split in ("train", "validation", "test")}
    return {
        split: [json.loads(line) for line in file.read_text("utf-8").splitlines()] for split, file in splits.items()
    }


def _contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_messages_are_translated_as_most_catalogues_do(messages: Path, tmp_path: Path) -> None:
    rows = _make(tmp_path / "out", "translation", "--source", str(messages))
    pairs = {row["prompt"]: row["completion"] for split in rows.values() for row in split}
    expected = {f"{message} =": f" {text}" for message, text in MESSAGES.items()}
    assert pairs == expected | {"cannot read this file =": " Datei ist unlesbar", "Open file =": " Öffnen"}
    about = json.loads((tmp_path / "out" / "about.json").read_text())
    assert about["catalogues"] == ["other1", "other2", "tool"]
    assert about["rows"] == {split: len(some) for split, some in rows.items()}
    assert sum(about["rows"].values()) == len(MESSAGES) + 1


def test_two_other_languages_meet_in_their_messages(messages: Path, tmp_path: Path) -> None:
    rows = _make(tmp_path / "out", "translation", "--source", str(messages), "--pair", "de-fr")
    pairs = {row["prompt"]: row["completion"] for split in rows.values() for row in split}
    text = MESSAGES["cannot move this page"]
    assert pairs[f"{text} ="] == f" {text} fr"
    # "Datei lesen geht nicht" has a word that stands nowhere else.
    assert len(pairs) == len(MESSAGES) - 1


def test_catalogues_of_translators_are_read_without_what_is_unsure(tmp_path: Path) -> None:
    (tmp_path / "po").mkdir()
    (tmp_path / "po" / "de.po").write_text(
        'msgid ""\nmsgstr "Content-Type: text/plain; charset=UTF-8\\n"\n\n'
        '# a comment\n#: file.c:1\nmsgid "open "\n"file"\nmsgstr ""\n"Datei \\"öffnen\\""\n\n'
        '#, fuzzy\nmsgid "close file"\nmsgstr "Datei"\n\n'
        'msgctxt "menu"\nmsgid "move file"\nmsgstr "Datei verschieben"\n\n'
        'msgid "file"\nmsgid_plural "files"\nmsgstr[0] "Datei"\nmsgstr[1] "Dateien"\n\n'
        '#~ msgid "old"\n#~ msgstr "alt"\n\nmsgid "new"\nmsgstr ""\n',
        "utf-8",
    )
    (file,) = catalogues.files(tmp_path, "de")
    assert catalogues.messages(file) == {"open file": 'Datei "öffnen"', "move file": "Datei verschieben"}


def test_a_language_that_is_not_there_names_packages_that_have_it(
    messages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, said, advice in (
        (["--pair", "en-xx"], "no message catalogues of language 'xx'", "libc-l10n"),
        (["--pair", "german"], "is no pair of languages", "en-de"),
        (["--pair", "de-de"], "nothing to translate", "en-de"),
        (["--rows", "0"], "that many rows are none", "1 or more"),
    ):
        assert (
            main(["task", "make", "translation", "--out", str(tmp_path / "o"), "--source", str(messages), *arguments])
            == 2
        )
        what, _, fix = capsys.readouterr().err.splitlines()
        assert said in what
        assert advice in fix
    mo(messages / "nl" / "LC_MESSAGES" / "tool.mo", {"cannot read": "kan niet lezen"})
    out = ["--out", str(tmp_path / "o"), "--source", str(messages)]
    assert main(["task", "make", "translation", *out, "--pair", "en-nl"]) == 2
    assert "0 rows are too few" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    assert main(["task", "make", "sentiment", "--out", str(tmp_path / "out")]) == 2
    assert f"error: {tmp_path / 'out'} exists" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("kind", ["sentiment", "translation", "generation"])
def test_no_source_is_in_two_splits_and_the_same_seed_makes_the_same_files(
    kind: str, messages: Path, tmp_path: Path
) -> None:
    more = ["--source", str(messages)] if kind == "translation" else []
    rows = _make(tmp_path / "first", kind, *more)
    _make(tmp_path / "second", kind, *more)
    assert _contents(tmp_path / "first") == _contents(tmp_path / "second")
    prompts = {split: {row["prompt"].lower() for row in some} for split, some in rows.items()}
    if kind != "generation":  # where files are what is split, and files begin alike
        assert not prompts["test"] & (prompts["train"] | prompts["validation"])
        assert not prompts["validation"] & prompts["train"]
    _make(tmp_path / "third", kind, "--seed", "1", *more)
    assert (tmp_path / "third" / "test.jsonl").read_bytes() != (tmp_path / "first" / "test.jsonl").read_bytes()
    fewer = _make(tmp_path / "fewer", kind, "--rows", "10", *more)
    assert fewer == {**rows, "train": rows["train"][:10]}


@pytest.mark.parametrize("kind", ["sentiment", "translation", "generation"])
def test_a_ready_task_is_one_that_can_be_judged_by(kind: str, messages: Path, tmp_path: Path) -> None:
    more = ["--source", str(messages)] if kind == "translation" else []
    rows = _make(tmp_path / "out", kind, *more)
    for split, file in (("test", "task.toml"), ("validation", "validation.toml")):
        read = task_rows.read(task_file.read(tmp_path / "out" / file))
        assert [(example.prompt, example.reference) for example in read] == [
            (row["prompt"], row["completion"]) for row in rows[split]
        ]
    texts = [json.loads(line)["text"] for line in (tmp_path / "out" / "text.jsonl").read_text("utf-8").splitlines()]
    if kind == "generation":
        assert all(any(row["prompt"] + row["completion"] in text for text in texts) for row in rows["train"][:20])
        assert not any(row["prompt"] + row["completion"] in text for text in texts for row in rows["test"][:20])
    else:
        assert texts == [row["prompt"] + row["completion"] for row in rows["train"]]


def test_sentences_from_templates_say_what_their_label_says(tmp_path: Path) -> None:
    rows = _make(tmp_path / "out", "sentiment")
    held_out = [*rows["test"], *rows["validation"]]
    for row in (row for row in held_out if ", but " in row["prompt"] or row["prompt"].startswith("although")):
        last = row["prompt"].partition("\n")[0].split(",")[-1]
        if " great" in last:  # the last clause decides, and a "not" in it turns it around
            assert row["completion"] == (" negative" if "was not" in last else " positive")
    labels = [row["completion"] for row in held_out]
    assert 0.4 < labels.count(" positive") / len(labels) < 0.6


def _archive(file: Path, lines: list[str]) -> Path:
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as files:
        content = "".join(lines).encode()
        member = tarfile.TarInfo("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        member.size = len(content)
        files.addfile(member, io.BytesIO(content))
    with zipfile.ZipFile(file, "w") as outer:
        outer.writestr("vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())
    return file


def test_rated_sentences_are_taken_where_their_rating_is_clear(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ratings: list[Any] = [(number, 2.5 if number % 3 else -1.0) for number in range(60)]
    lines = [f"{number}\t{rating}\tfilm  {number} is as it is\r\n" for number, rating in ratings]
    archive = _archive(tmp_path / "a.zip", [*lines, "60\t0.9\tneither\n", "61\t3\tFILM 1 is as it is\n"])
    rows = _make(tmp_path / "out", "sentiment", "--source", str(archive))
    pairs = {row["prompt"]: row["completion"] for split in rows.values() for row in split}
    assert pairs == {
        f"film {number} is as it is\nsentiment:": " positive" if rating > 0 else " negative"
        for number, rating in ratings
    }
    (tmp_path / "b.zip").write_bytes(b"no archive")
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as other:
        other.writestr("a", "b")
    for name, said in (("b.zip", "holds no movieReview"), ("c.zip", "holds no movieReview"), ("d", "cannot be read")):
        assert main(["task", "make", "sentiment", "--out", str(tmp_path / "o"), "--source", str(tmp_path / name)]) == 2
        what, _, fix = capsys.readouterr().err.splitlines()
        assert said in what
        assert "vaderSentiment==0.5" in fix or "check the path" in fix

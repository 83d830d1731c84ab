"""Files of others are read without waiting and without following, files of ours are written where nobody can plant."""

import errno
import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halfstep.launcher.errors import Fault, HalfstepError, RefusedError, RequestError
from halfstep.launcher.metrics.sinks import JsonLines
from halfstep.launcher.rundir import exits
from halfstep.launcher.rundir.records import Damaged
from halfstep.launcher.rundir.run_reader import Attempt
from halfstep.launcher.system import fields, files, foreign, terminal

# --- reading


def fifo(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def linked(path: Path) -> None:
    path.symlink_to("/etc/hostname")


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as ear:
        here = Path.cwd()
        os.chdir(path.parent)  # such a name may not be long
        try:
            ear.bind(path.name)
        finally:
            os.chdir(here)


@pytest.mark.parametrize(
    ("plant", "why"),
    [
        (fifo, "it is no regular file"),
        (endless, "it is a symbolic link"),
        (linked, "it is a symbolic link"),
        (listening, "it is no regular file"),
        (Path.mkdir, "Is a directory"),
        (lambda path: None, "No such file or directory"),
    ],
)
def test_only_a_regular_file_is_read_and_nothing_is_waited_for(
    tmp_path: Path, plant: Callable[[Path], object], why: str
) -> None:
    path = tmp_path / "record.json"
    plant(path)
    began = time.monotonic()
    with pytest.raises(OSError, match=why) as caught:
        foreign.read_json(path)
    assert caught.value.strerror == why
    assert time.monotonic() - began < 5


def test_what_a_user_names_may_be_a_link_but_no_device(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("x")
    (tmp_path / "link").symlink_to("real")
    assert foreign.read_text(tmp_path / "link", follow=True) == "x"
    (tmp_path / "zero").symlink_to("/dev/zero")
    with pytest.raises(OSError, match="no regular file"):
        foreign.read_text(tmp_path / "zero", follow=True)


def test_a_file_beyond_its_limit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"x" * 101)
    assert len(foreign.read_bytes(tmp_path / "large", 101)) == 101
    with pytest.raises(OSError, match="larger than 100 bytes"):
        foreign.read_bytes(tmp_path / "large", 100)
    with pytest.raises(OSError, match="null byte"):
        foreign.read_bytes(tmp_path / "a\0b")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"{", "it is no JSON"),
        (b"", "it is no JSON"),
        (b'{"a": NaN}', "it holds NaN"),
        (b'{"a": -Infinity}', "it holds -Infinity"),
        (b'{"a": 1e999}', "it holds 1e999, which is no finite number"),
        (b'{"a": 1, "b": 2, "a": 3}', "it has 'a' twice"),
        (b"[" * 200_000, "it is nested too deep"),
        (b'{"a":' * 200_000, "it is nested too deep"),
        (b'"\xff"', "it is not UTF-8 at byte 1"),
        (b"1" * 5000, "it is no JSON|integer string conversion"),
    ],
    ids=lambda value: value[:12].decode(errors="replace") if isinstance(value, bytes) else None,
)
def test_json_that_means_two_things_or_nothing_is_refused(text: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        foreign.loads(text)


def test_many_keys_of_which_one_stands_twice_take_no_time() -> None:
    text = "{" + ",".join(f'"k{n}": 1' for n in range(200_000)) + ', "k7": 2}'
    began = time.monotonic()
    with pytest.raises(ValueError, match="it has 'k7' twice"):
        foreign.loads(text)
    assert time.monotonic() - began < 5


def test_rows_that_are_none_are_passed_over_from_either_end(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"n": 1}\n[2]\n\xff\n{"n": 3}\n{"n": 4')
    assert list(foreign.objects(file)) == [{"n": 1}, {"n": 3}]
    assert list(foreign.last_objects(file)) == [{"n": 3}, {"n": 1}]
    assert list(foreign.last_objects(file, tail=10)) == []
    assert list(foreign.objects(tmp_path / "none")) == []


def test_toml_is_refused_like_json(tmp_path: Path) -> None:
    file = tmp_path / "site.toml"
    for content, why in (
        (b"a = " + b"[" * 5000, "nested too deep"),
        (b"a = \xff", "not UTF-8"),
        (b"a =", "Invalid value"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=why):
            foreign.read_toml(file)


# --- writing


@pytest.mark.parametrize("write", [files.write_atomic, files.write_once])
def test_no_name_of_a_temporary_file_can_be_foreseen_and_no_link_is_followed(
    tmp_path: Path, write: Callable[[Path, str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    opened = []
    really = os.open

    def watching(path: Any, flags: int, mode: int = 0o777, **more: Any) -> int:
        opened.append((os.fspath(path), flags))
        return really(path, flags, mode, **more)

    for name in (f".plan.json.{os.getpid()}", f".exit.json.{os.uname().nodename}.{os.getpid()}"):
        (tmp_path / name).symlink_to(victim)
    monkeypatch.setattr(os, "open", watching)
    write(tmp_path / "plan.json", "{}")
    write(tmp_path / "other.json", "{}")
    monkeypatch.undo()
    assert victim.read_text() == "mine"
    names = [path for path, flags in opened if flags & os.O_CREAT]
    assert len(set(names)) == len(names) == 2
    assert all(flags & os.O_EXCL and flags & os.O_NOFOLLOW for _, flags in opened if flags & os.O_CREAT)
    assert sorted(item.name for item in tmp_path.iterdir() if not item.is_symlink()) == [
        "other.json",
        "plan.json",
        "victim",
    ]


def test_a_replaced_link_is_replaced_itself_and_the_mode_is_what_the_umask_leaves(tmp_path: Path) -> None:
    victim, file = tmp_path / "victim", tmp_path / "summary.json"
    victim.write_text("mine")
    file.symlink_to(victim)
    old = os.umask(0o027)
    try:
        files.write_atomic(file, "{}")
        files.write_atomic(tmp_path / "job.sbatch", "#!", mode=0o600)
    finally:
        os.umask(old)
    assert (victim.read_text(), file.read_text()) == ("mine", "{}")
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "job.sbatch").stat().st_mode) == 0o600


def test_names_may_be_long_and_of_any_bytes(tmp_path: Path) -> None:
    files.write_atomic(tmp_path / ("n" * 250), "x")
    files.write_json(tmp_path / ("ü" * 120), {"path": os.fsdecode(b"/a\xff")})
    assert json.loads((tmp_path / ("ü" * 120)).read_text()) == {"path": os.fsdecode(b"/a\xff")}


@pytest.mark.parametrize("plant", [linked, fifo, endless])
def test_records_are_not_appended_to_what_is_no_regular_file(tmp_path: Path, plant: Callable[[Path], object]) -> None:
    plant(tmp_path / "jobs.jsonl")
    with pytest.raises(OSError, match=r".+"):
        files.append(tmp_path / "jobs.jsonl", "{}\n")
    with pytest.raises(HalfstepError) as caught:
        JsonLines(tmp_path / "jobs.jsonl")
    assert len(str(caught.value).splitlines()) == 3


def test_half_a_line_is_ended_before_the_next_one(tmp_path: Path) -> None:
    file = tmp_path / "starts.jsonl"
    file.write_text('{"a": 1}\n{"b"')
    files.append(file, '{"c": 3}\n')
    assert file.read_text() == '{"a": 1}\n{"b"\n{"c": 3}\n'


def test_the_first_to_write_how_an_attempt_ended_wins_among_many(tmp_path: Path) -> None:
    codes: list[int | None] = []
    threads = [
        threading.Thread(target=lambda n=n: codes.append(exits.write_exit(tmp_path, n, "x", n))) for n in range(1, 17)
    ]
    for item in threads:
        item.start()
    for item in threads:
        item.join()
    (winner,) = {code for code in codes if code is not None}
    assert codes.count(None) == 1
    assert exits.read_exit(tmp_path).code == winner  # type: ignore[union-attr]
    assert [item.name for item in tmp_path.iterdir()] == ["exit.json"]


def test_an_end_is_not_written_through_a_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "exit.json").symlink_to(victim)
    (tmp_path / "refused.json").symlink_to(victim)
    exits.write_exit(tmp_path, 3, "the disk is full", 0)
    exits.write_refusal(tmp_path, RequestError("wrong", where="x", fix="y"))
    assert victim.read_text() == "mine"


@pytest.mark.parametrize(
    "content",
    [
        *("[]", "{", "", '{"cause": "x"}', '{"code": "2"}', '{"code": true}', '{"code": -1}', '{"code": 1e3}'),
        *('{"code": 2, "cause": 5}', '{"code": 2, "rank": "x"}', '{"code": 2, "time": "now"}'),
        '{"code": 2, "time": 1e300}',
    ],
)
def test_an_end_that_nobody_could_have_written_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "exit.json").write_text(content)
    (tmp_path / "refused.json").write_text(content.replace("{", '{"job": "", "start": "0", ', 1))
    assert exits.read_exit(tmp_path) is None
    with pytest.raises(Damaged, match=r"exit\.json is damaged: "):
        _ = Attempt(tmp_path).exit
    assert exits.read_refusal(tmp_path) is None
    assert exits.write_exit(tmp_path, 1, "x", 0) is None


# --- what the operating system refuses


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EFBIG, errno.ENOSPC, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_record_that_cannot_be_written_ends_with_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    rows = JsonLines(tmp_path / "metrics.jsonl")
    rows.write({"step": 1})

    def refuse(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(RefusedError) as caught:
        rows.write({"step": 2}) if call == "write" else rows.sync()
    monkeypatch.undo()
    assert caught.value.where == str(tmp_path / "metrics.jsonl")
    expected = "the disk is full" if number in (errno.ENOSPC, errno.EDQUOT) else os.strerror(number)
    assert expected in caught.value.what
    assert caught.value.exit_code == 3
    rows.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_limit_on_the_size_of_files_ends_with_words(tmp_path: Path) -> None:
    program = (
        "import resource, sys\nfrom pathlib import Path\nfrom halfstep.launcher.metrics.sinks import JsonLines\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "rows = JsonLines(Path(sys.argv[1]))\n"
        "try:\n    [rows.write({'step': n}) for n in range(50)]\nexcept Exception as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "m.jsonl")], capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[0] == "error: the operating system refused: File too large", done.stderr
    assert "ulimit -f" in done.stdout


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (OSError(errno.EIO, "Input/output error", "/x"), RefusedError, "Input/output error"),
        (OSError(errno.EMFILE, "Too many open files"), RefusedError, "ulimit -n"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), RefusedError, "Permission denied"),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset"), Fault, "ConnectionResetError"),
        (TimeoutError("timed out"), Fault, "TimeoutError: timed out"),
        (OSError("odd"), Fault, "OSError: odd"),
        (KeyError("x"), Fault, "KeyError"),
        (RequestError("w", where="x", fix="y"), RequestError, "error: w"),
    ],
)
def test_whatever_is_raised_becomes_three_lines(error: Exception, kind: type[HalfstepError], said: str) -> None:
    seen = files.explained(error, "here")
    assert type(seen) is kind
    assert said in str(seen)
    assert len(str(seen).splitlines()) == 3


# --- the screen

EVIL = "\x1b[2J\x1b]0;pwned\x07 \x9b31m \u202e \x00 \x7f \ud800 tail"


def test_what_a_terminal_would_obey_is_written_out() -> None:
    shown = terminal.printable(EVIL)
    assert shown == "\\x1b[2J\\x1b]0;pwned\\x07 \\u009b31m \\u202e \\x00 \\u007f \\ud800 tail"
    assert terminal.printable("a\tb\nc\rd") == "a\\tb\\nc\\rd"
    assert terminal.printable("a\tb\nc\rd", keep="\t\n") == "a\tb\nc\\rd"
    assert terminal.printable("Ünïcødé 😀 中文 ‍") == "Ünïcødé 😀 中文 ‍"


def test_colours_of_a_log_are_dropped_and_nothing_else_is() -> None:
    assert terminal.of_log("\x1b[1;32mok\x1b[0m\t1\n\x1b[3Ax") == "ok\t1\n\\x1b[3Ax"


def test_json_with_foreign_text_in_it_stays_json(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.say(json.dumps({"reason": EVIL}, ensure_ascii=False))
    assert json.loads(capsys.readouterr().out) == {"reason": EVIL}


def test_a_table_has_a_line_for_each_row_whatever_its_cells_hold() -> None:
    assert terminal.table([["a", "b"], ["x\ny", "\x1b[1m"]]) == ["a     b", "x\\ny  \\x1b[1m"]


def test_an_error_is_three_lines_whatever_is_in_it() -> None:
    error = RequestError(f"no {EVIL}", where="a\nb", fix="c\r\nd").with_more(
        [RequestError("e", where="f", fix="g\x07")]
    )
    lines = str(error).splitlines()
    assert len(lines) == 6
    assert not any(ord(letter) < 32 for line in lines for letter in line)
    assert lines[1] == " from: a\\nb"


def test_a_fault_of_another_language_is_one_line_and_not_its_stack() -> None:
    error = Fault.of(RuntimeError("it broke\n\nframe #0: f\n" + "frame\n" * 500), where="here")
    assert error.what.startswith("RuntimeError: it broke; frame #0: f; frame")
    assert len(str(error).splitlines()) == 3
    assert len(error.what) < 1100
    assert Fault.of(MemoryError(), where="here").what == "MemoryError"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_screen_that_lacks_a_letter_gets_its_number(encoding: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "halfstep", "checkpoint", "list", str(tmp_path / "中文")],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2
    text = done.stderr.decode(encoding)
    assert "Traceback" not in text
    assert ("中文" if encoding == "utf-8" else "\\u4e2d\\u6587") in text


def test_a_full_screen_is_no_traceback() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [Path(sys.executable).parent / "halfstep", "plan", "--help"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize("arguments", [["plan", "model=gpt2-124m"], ["checkpoint", "list", "/nowhere"]])
@pytest.mark.parametrize("after", [0.12, 0.2, 0.3, 0.4])
def test_an_interrupt_at_any_moment_is_no_traceback(arguments: list[str], after: float) -> None:
    with subprocess.Popen(
        [Path(sys.executable).parent / "halfstep", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        time.sleep(after)
        process.send_signal(2)
        _, said = process.communicate(timeout=60)
    if "Python runtime state: core initialized" in said:  # on a busy machine: the interpreter itself was not there yet
        assert "halfstep" not in said, said
    else:
        assert "Traceback" not in said, said
        assert process.returncode in (-2, 130, 0, 2)


# --- kinds


def test_a_name_leads_nowhere_else() -> None:
    assert fields.plain_name("rank-00000.json") == "rank-00000.json"
    for name in ("..", ".", "", "/etc/passwd", "a/b", "a\n", "a\0", ".hidden", "-rf", "a b", "ä", "n" * 202):
        with pytest.raises(ValueError, match="no plain name"):
            fields.plain_name(name)

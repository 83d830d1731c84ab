"""Ways to damage a file or a word, each from a seed: bytes, values, rows, words, and what stands in a file's place."""

import json
import os
import random
import re
import shutil
import socket
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

EVIL = "\x1b[2J\x1b]0;t\x07\x9b31m"
MARKER = "HALFSTEP_MARKER"
"""No line of a script may begin with it, no file may be named by it."""
TEXTS = (
    "", " ", "x", "0", "1e999", "٣", "²", "Ünïcødé 中文 😀", EVIL, "a\x00b", "a\nb", "a\r\nb", f"x\n{MARKER}\n",
    f"x;{MARKER}", f"$({MARKER})", f"`{MARKER}`", f"'; {MARKER} #", "..", "../../etc/passwd", "/etc/passwd",
    "/dev/zero", "/proc/self/mem", "~nosuchuser/x", "~", "-rf", "--help", "a" * 300, "a" * 20_000, "\ud800",
    "\u202egnp.exe", "{{ 7*7 }}", "%s%n", "=1+1", "@x", "null", "true", "NaN", "inf", "None",
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 3, 7, 8, 255, 256, 65536, 2**31 - 1, 2**31, 2**32, 2**53, 2**53 + 1, 2**63, 2**64, 10**18, 10**30,
    0.0, -0.0, 0.5, 1.5, -1.5, 1e-9, 1e-300, 5e-324, 1e30, 1e300, 1.7e308, 1e18,
)  # fmt: skip
RAW = ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 400, "9" * 5000, "-" + "9" * 400, "01", "+1", ".5",
       "1.", "'x'", "0x10", "undefined", "[" * 30 + "]" * 30, "[" * 100_000, '{"a":' * 100_000, "//x")  # fmt: skip
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], [None], [0], ["x"], {"a": 1}, {"": {}}, [[[[[[1]]]]]])

Mutation = tuple[str, bytes]
"""What was done, and the content that came of it."""


def of_bytes(content: bytes, draw: random.Random) -> Mutation:
    """Damage a file without looking at what it means."""
    place = draw.randrange(len(content) + 1)
    length = draw.choice((1, 2, 7, 64, max(1, len(content) // 2)))
    junk = bytes(draw.randrange(256) for _ in range(draw.choice((1, 3, 40))))
    ways: dict[str, Callable[[], bytes]] = {
        "flip": lambda: flip(content, draw),
        "byte": lambda: content[:place] + junk[:1] + content[place + 1 :],
        "cut": lambda: content[:place],
        "head": lambda: content[place:],
        "insert": lambda: content[:place] + junk + content[place:],
        "delete": lambda: content[:place] + content[place + length :],
        "repeat": lambda: content[:place] + content[place : place + length] * 2 + content[place + length :],
        "twice": lambda: content + content,
        "append": lambda: content + junk,
        "empty": lambda: b"",
        "zeros": lambda: b"\0" * draw.choice((1, len(content), 100_000)),
        "random": lambda: bytes(draw.randrange(256) for _ in range(min(len(content), 2000) + 1)),
        "nul": lambda: content[:place] + b"\0" + content[place:],
        "not utf-8": lambda: content[:place] + draw.choice((b"\xff", b"\xc3", b"\xed\xa0\x80")) + content[place:],
        "bom": lambda: b"\xef\xbb\xbf" + content,
        "utf-16": lambda: content.decode("utf-8", errors="replace").encode("utf-16"),
        "crlf": lambda: content.replace(b"\n", b"\r\n"),
        "cr": lambda: content.replace(b"\n", b"\r"),
        "deep": lambda: b"[" * 100_000,
        "escape": lambda: content[:place] + EVIL.encode() + content[place:],
        "digits": lambda: re.sub(rb"\d+", b"9" * 5000, content, count=1),
        "long line": lambda: content[:place] + b"x" * 200_000 + content[place:],
    }  # fmt: skip
    way = draw.choice([name for name in ways if content or name not in ("flip",)])
    return way, ways[way]()


def flip(content: bytes, draw: random.Random) -> bytes:
    """Change one bit."""
    place = draw.randrange(len(content))
    return content[:place] + bytes([content[place] ^ (1 << draw.randrange(8))]) + content[place + 1 :]


def of_json(content: bytes, draw: random.Random) -> Mutation:
    """Change one value of a JSON file, or its bytes."""
    if draw.random() < 0.2:
        return of_bytes(content, draw)
    what, text = of_tree(json.loads(content), draw)
    return what, text.encode("utf-8", errors="surrogatepass")


def of_rows(content: bytes, draw: random.Random) -> Mutation:
    """Change one row of a file of JSON lines, or their order, or its bytes."""
    if draw.random() < 0.15 or not content.strip():
        return of_bytes(content, draw)
    lines = content.splitlines(keepends=True)
    place = draw.randrange(len(lines))
    way = draw.choice(("value", "value", "value", "value", "drop", "twice", "swap", "cut", "garbage", "list"))
    if way == "value":
        what, text = of_tree(json.loads(lines[place]), draw)
        lines[place] = text.encode("utf-8", errors="surrogatepass") + b"\n"
        return f"row {place}: {what}", b"".join(lines)
    other = draw.randrange(len(lines))
    if way == "drop":
        del lines[place]
    elif way == "twice":
        lines.insert(other, lines[place])
    elif way == "swap":
        lines[place], lines[other] = lines[other], lines[place]
    elif way == "cut":
        lines[place] = lines[place][: draw.randrange(len(lines[place]))]
    elif way == "garbage":
        lines.insert(place, draw.choice((b"\n", b"5\n", b"null\n", b"\xff\n", b"{}\n", b"[]\n", b'"x"\n', b"{{\n")))
    else:
        lines[place] = b"[" + lines[place].strip() + b"]\n"
    return f"row {place}: {way}", b"".join(lines)


def of_tree(tree: Any, draw: random.Random) -> tuple[str, str]:
    """Change one value somewhere in a tree, and return what and the JSON text."""
    raw = {}

    def literal(text: str) -> str:
        raw[name := f"@raw{len(raw)}@"] = text
        return name

    paths = list(_paths(tree))
    path = draw.choice(paths) if paths else ()
    owner, key = _owner(tree, path)
    way = draw.choice(("value", "value", "value", "number", "text", "drop", "rename", "more", "twice", "raw", "type"))
    if owner is None:
        tree = draw.choice((*OTHERS, *NUMBERS, *TEXTS))
        return f"whole = {tree!r}"[:80], _dump(tree, raw)
    old = owner[key]
    if way == "value":
        owner[key] = draw.choice((*OTHERS, *NUMBERS, *TEXTS))
    elif way == "number":
        number = old if isinstance(old, int | float) and not isinstance(old, bool) else 1
        owner[key] = draw.choice((number + 1, number - 1, -number, number * 10, number * 2, float(number), number / 3))
    elif way == "text":
        owner[key] = f"{old}{draw.choice(TEXTS)}" if isinstance(old, str) else draw.choice(TEXTS)
    elif way == "drop":
        del owner[key]
    elif way == "rename" and isinstance(owner, dict):
        owner[draw.choice(TEXTS)] = owner.pop(key)
    elif way == "more" and isinstance(owner, dict):
        owner[draw.choice(("unknown", *TEXTS))] = draw.choice((*OTHERS, *NUMBERS))
    elif way == "twice" and isinstance(owner, dict):
        owner[literal(f'{json.dumps(key)}: {json.dumps(draw.choice(NUMBERS))}, "and"')] = 0
    elif way == "raw":
        owner[key] = literal(draw.choice(RAW))
    else:
        owner[key] = str(old) if isinstance(old, int | float) else [old]
    return f"{way} at {'.'.join(map(str, path))}"[:80], _dump(tree, raw)


def _dump(tree: Any, raw: dict[str, str]) -> str:
    text = json.dumps(tree)
    for name, literal in raw.items():
        text = text.replace(f'"{name}"', literal)
    return text


def _paths(tree: Any, above: tuple[Any, ...] = ()) -> Any:
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield (*above, key)
        yield from _paths(value, (*above, key))


def _owner(tree: Any, path: tuple[Any, ...]) -> tuple[Any, Any]:
    if not path:
        return None, None
    for key in path[:-1]:
        tree = tree[key]
    return tree, path[-1]


TOML_VALUES = (
    "nan", "inf", "-inf", "true", "false", "0", "-1", "1", "1.5", "1e18", "1e300", "0x10", "1_000", "9" * 30,
    "9" * 5000, "[]", "[[]]", "[1]", '["x"]', "{}", "{ a = 1 }", "1979-05-27T07:32:00Z", "07:32:00", '""', '"x"',
    "'''a\nb'''", '"a\\nb"', '"\\u001b[2J"', '"../../etc/passwd"', '"/dev/zero"', '"a;b"', f'"x\\n{MARKER}"',
    f'"x;{MARKER}"', '"~nosuchuser/x"', f'"{"a" * 5000}"', "[" * 5000, "{ a =" * 3000, "", "x", "\x00", "#",
)  # fmt: skip


def of_toml(content: bytes, draw: random.Random) -> Mutation:
    """Change one line of a TOML file, or its bytes."""
    if draw.random() < 0.2:
        return of_bytes(content, draw)
    lines = content.decode("utf-8").splitlines()
    keyed = [place for place, line in enumerate(lines) if "=" in line and not line.lstrip().startswith("#")]
    place = draw.choice(keyed)
    key, _, value = lines[place].partition("=")
    way = draw.choice(("value", "value", "value", "rename", "drop", "twice", "section", "inside", "move"))
    if way == "value":
        lines[place] = f"{key}= {draw.choice(TOML_VALUES)}"
    elif way == "rename":
        name = draw.choice(
            ("x", f"{key.strip()}x", '""', '"a b"', '"\\n"', f'"{MARKER}"', '"a;b"', key.strip()[:-1] or "k")
        )
        lines[place] = f"{name} ={value}"
    elif way == "drop":
        del lines[place]
    elif way == "twice":
        lines.insert(place, lines[place])
    elif way == "section":
        lines.insert(place, draw.choice(("[x]", "[[slurm]]", "[slurm", "[a.b.c]", '[""]', f"[{key.strip()}]")))
    elif way == "inside":
        lines[place] = f"{key}= {value.strip()[:-1]}{draw.choice(TEXTS)}{value.strip()[-1:]}"
    else:
        lines.append(lines.pop(place))
    return f"{way} in line {place + 1}: {lines[min(place, len(lines) - 1)][:50]!r}", "\n".join(lines).encode(
        "utf-8", errors="surrogatepass"
    )


def of_lines(content: bytes, draw: random.Random) -> Mutation:
    """Change one field of a text of lines and columns, or its bytes."""
    if draw.random() < 0.4:
        return of_bytes(content, draw)
    lines = content.decode("utf-8").splitlines()
    place = draw.randrange(len(lines))
    parts = re.split(r"([,\s=|:]+)", lines[place])
    which = draw.randrange(0, len(parts), 2)
    parts[which] = draw.choice((*TEXTS, *map(str, NUMBERS), "9" * 5000))
    lines[place] = "".join(parts)
    return f"line {place + 1}, field {which // 2} = {parts[which][:30]!r}", "\n".join([*lines, ""]).encode(
        "utf-8", errors="surrogatepass"
    )


def parsed_toml(content: bytes) -> dict[str, Any] | None:
    """Return what Python's own parser makes of a file, None where it makes nothing of it."""
    try:
        return tomllib.loads(content.decode("utf-8"))
    except (ValueError, RecursionError):
        return None


def parsed_json(content: bytes) -> Any:
    """Return what a strict parser makes of a file; ValueError where it means nothing, or two things."""

    def pairs(seen: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in seen}) < len(seen):
            raise ValueError("twice")
        return dict(seen)

    def nothing(word: str) -> Any:
        raise ValueError(word)

    try:
        tree = json.loads(content.decode("utf-8"), object_pairs_hook=pairs, parse_constant=nothing)
        json.dumps(tree, allow_nan=False)  # 1e999
        return tree
    except RecursionError:
        raise ValueError("deep") from None


KINDS = ("missing", "folder", "pipe", "device", "loop", "dangling", "link", "socket")


def put_kind(file: Path, kind: str) -> None:
    """Put something else in a file's place."""
    remove(file)
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "socket":
        _socket(file)
    elif kind != "missing":
        target = {"device": "/dev/zero", "loop": file.name, "dangling": "nowhere", "link": "/etc/passwd"}[kind]
        file.symlink_to(target)


def _socket(file: Path) -> None:
    here = os.open(".", os.O_RDONLY)
    try:
        os.chdir(file.parent)  # the name of a socket may not be long
        with socket.socket(socket.AF_UNIX) as ear:
            ear.bind(file.name)
    finally:
        os.fchdir(here)
        os.close(here)


def remove(file: Path) -> None:
    """Take away whatever is there."""
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    else:
        file.unlink(missing_ok=True)

"""Compare the ledger of keys with the installed DeepSpeed: `python -m tools.new_deepspeed [--write] [--no-canaries]`.

For a new version: prints which keys came, went and changed, which cited lines no longer name their key, and what the
canaries say; `--write` writes the new table of keys and gives each new key a row `unknown`. Exit code 1 where anything
is not as the ledger has it.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halfstep.launcher.plan.ds import dskeys, effects
from tools import dskeys_table

_ROOT = Path(__file__).resolve().parent.parent
LEDGER = Path(effects.__file__).with_name("deepspeed_effects.json")
_CANARIES = (["-m", "tools.canaries"], ["-m", "pytest", "-q", "tests/process/test_key_canaries.py"])
_NEAR = 12
"""Lines: a key that is named so close to its citation is where it was."""


def main(arguments: list[str]) -> int:
    """Print what is not as the ledger has it, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.new_deepspeed", description=main.__doc__)
    parser.add_argument("--write", action="store_true", help="write the table of keys, and rows for the new ones")
    parser.add_argument("--no-canaries", action="store_true", help="look at the keys alone")
    options = parser.parse_args(arguments)
    table = dskeys_table.table()
    changes = differences(dskeys.KEYS, table["keys"])
    package = Path(str(importlib.util.find_spec("deepspeed").submodule_search_locations[0]))  # type: ignore[union-attr,index]
    moved = [line for key in effects.rows() if key in table["keys"] for line in misplaced(key, package)]
    print(f"DeepSpeed {importlib.metadata.version('deepspeed')}; the ledger is of {dskeys.DEEPSPEED_VERSION}")
    for heading, lines in (*changes.items(), ("cited where the key is not named", moved)):
        print(f"\n{heading}: {len(lines)}", *lines, sep="\n  ")
    failed = [] if options.no_canaries else [command for command in _CANARIES if not _passes(command)]
    if options.write:
        dskeys_table.TABLE.write_text(dskeys_table.rendered(table), encoding="utf-8")
        _write_rows(table)
    return 1 if any(changes.values()) or moved or failed else 0


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the keys that came, that went and that changed, each with what is known of it."""
    single = {key for key, entry in (*old.items(), *new.items()) if entry["type"] != "section"}
    both = sorted(single & set(old) & set(new))
    return {
        "new, unknown": [
            f"{key} = {json.dumps(new[key].get('default'))}" for key in sorted(single & set(new) - set(old))
        ],
        "gone": sorted(single & set(old) - set(new)),
        "another default": [
            f"{key}: {json.dumps(old[key].get('default'))} -> {json.dumps(new[key].get('default'))}"
            for key in both
            if old[key].get("default") != new[key].get("default")
        ],
        "other values": [
            f"{key}: {_rest(old[key])} -> {_rest(new[key])}" for key in both if _rest(old[key]) != _rest(new[key])
        ],
    }


def _rest(entry: Mapping[str, Any]) -> str:
    return json.dumps({name: value for name, value in entry.items() if name != "default"}, sort_keys=True)


def misplaced(key: str, package: Path) -> list[str]:
    """Return where a row's first citation holds no longer: its file is gone, or does not name the key there."""
    reads = effects.rows()[key]["reads"]
    cited = re.search(r"([\w/]+\.(?:py|cpp)):(\d+)", reads)
    if cited is None:
        return []
    file, number = package / cited[1], int(cited[2])
    if not file.is_file():
        return [f"{key}: {cited[1]} is gone"]
    lines = file.read_text("utf-8").splitlines()
    near = "\n".join(lines[max(0, number - _NEAR) : number + _NEAR]).lower()
    name = key.rpartition(".")[2].lower()
    names = {name, name.partition("_")[2] or name, name.rpartition("_")[0] or name, name.replace("_", "")}
    names |= {word.lower() for word in re.findall(r"[A-Za-z]+_[A-Za-z_]+", reads)}
    return [] if any(part in near for part in names) else [f"{key}: {cited[0]}"]


def _passes(command: list[str]) -> bool:
    print(f"\n$ python {' '.join(command)}", flush=True)
    return subprocess.run([sys.executable, *command], cwd=_ROOT, check=False).returncode == 0


def _write_rows(table: Mapping[str, Any]) -> None:
    """Write the ledger with a row for each key there is; a new one's effect is unknown until somebody has looked."""
    blank = {"effect": effects.UNKNOWN, "because": "New in this version, and not looked at.", "reads": ""}
    keys = [key for key, entry in table["keys"].items() if entry["type"] != "section"]
    rows = {key: effects.rows().get(key, blank) for key in sorted(keys)}
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(row, ensure_ascii=False)}" for key, row in rows.items())
    LEDGER.write_text(
        f'{{"deepspeed": {json.dumps(table["deepspeed"])},\n"rows": {{\n{lines}\n}}}}\n', encoding="utf-8"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

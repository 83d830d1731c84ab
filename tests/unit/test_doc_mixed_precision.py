"""The page docs/mixed-precision.md is true: its sessions print its numbers, and its list quotes the reference."""

import doctest
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "mixed-precision.md"


def test_every_number_of_the_page_is_what_its_session_prints() -> None:
    assert "doctest: +" not in PAGE.read_text(encoding="utf-8")  # an option that skips or loosens a line
    result = doctest.testfile(str(PAGE), module_relative=False, encoding="utf-8")
    assert result.failed == 0, "each difference is in the captured output"
    assert result.attempted > 100


def test_the_list_of_the_whole_step_quotes_the_reference() -> None:
    source = (ROOT / "launcher" / "parity" / "reference.py").read_text(encoding="utf-8")
    (steps,) = re.findall(r"^1\. Once.*?^9\. .*?$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    quoted = re.findall(r"`([^`]+)`", steps)
    assert len(quoted) == 19
    assert [line for line in quoted if line not in source] == []

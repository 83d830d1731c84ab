"""Time the report of a study of many finished runs: python benchmarks/report.py [RUNS] [STEPS].

It writes RUNS finished runs into a temporary folder, starts `halfstep study report` on it, and prints the seconds that
takes and the most memory it has needed.
"""

import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fakes import studied  # noqa: E402

GRID = """
[base]
model.name = "gpt2-nano"
model.vocabulary = 4096
data = "{data}"
sequence = 64
batch.global = 16

[axes]
zero = [0, 1, 2, 3]
precision = ["fp32", "fp16", "bf16"]
optimizer.lr = [{rates}]

[seeds]
values = [0, 1, 2]

[compare]
reference = {{ zero = 1, precision = "fp32", optimizer.lr = 0.001 }}
"""


def main(runs: int, steps: int) -> None:
    """Write the runs, report on them, and print what that took."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        corpus = folder / "corpus"
        corpus.mkdir()
        _pair(corpus / "train", 100_000)
        rates = [0.001 * (1 + 0.1 * place) for place in range(math.ceil(runs / 36))]
        file = folder / "many.toml"
        file.write_text(GRID.format(data=corpus / "train", rates=", ".join(f"{rate:g}" for rate in rates)))
        where = folder / "study"
        _, cells = studied.started(where, file)
        for place, cell in enumerate(cells[:runs]):
            studied.finish(where, cell, 5 + place / 1e4, speed=1000 + place, steps=steps)
        for cell in cells[runs:]:
            studied.fail(where, cell, 137, "rank 0 was killed by signal 9 (SIGKILL)")
        began = time.perf_counter()
        subprocess.run([Path(sys.executable).parent / "halfstep", "study", "report", where], check=True)
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        size = (where / "report.html").stat().st_size / 1e6
        print(f"{len(cells)} runs of {steps} steps: {seconds:.1f} s, {peak:.2f} GiB at most, page {size:.1f} MB")


def _pair(prefix: Path, tokens: int) -> None:
    """Write a Megatron pair of one document."""
    import struct

    prefix.with_suffix(".bin").write_bytes(struct.pack("<H", 1) * tokens)
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, 1, 2)
    prefix.with_suffix(".idx").write_bytes(header + struct.pack("<iqqq", tokens, 0, 0, 1))


if __name__ == "__main__":
    main(*(int(number) for number in (sys.argv[1:] + ["500", "1000"][len(sys.argv) - 1 :])))

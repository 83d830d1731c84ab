"""Time the planner as a user meets it: a whole command, from the shell's prompt to its output.

python benchmarks/plan_speed.py --data data/stdlib

A plan of 175B on 1,024 GPUs is to take less than 0.5 s, a search over 1,000 candidates less than 3 s.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

HALFSTEP = Path(sys.executable).parent / "halfstep"
LARGE = ["model=gpt3-175b", "hardware=H100", "nodes=128", "gpus_per_node=8", "batch.global=2048", "zero=3"]
SEARCH = ["--search", "--json", "model=llama-8b", "sequence=2048", "hardware=H100", "batch.global=15360", "gpus=8"]


def timed(keys: list[str], times: int) -> tuple[float, str]:
    """Return the median seconds of a command and what it printed last."""
    taken, out = [], ""
    for _ in range(times):
        start = time.perf_counter()
        out = subprocess.run([HALFSTEP, "plan", *keys], capture_output=True, text=True, check=True).stdout
        taken.append(time.perf_counter() - start)
    return statistics.median(taken), out


def main() -> int:
    """Print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a folder made by `halfstep data prepare`")
    parser.add_argument("--times", type=int, default=5)
    arguments = parser.parse_args()
    data = f"data={arguments.data}"
    seconds, _ = timed([*LARGE, data], arguments.times)
    print(f"175B on 1,024 GPUs        {seconds:.2f} s")
    seconds, out = timed([*SEARCH, "nodes=1,2,3,4,5,6", data], arguments.times)
    print(f"search of {json.loads(out)['searched']:,} candidates {seconds:.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

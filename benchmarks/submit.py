"""Time `halfstep submit` for many nodes against two: deciding, checking, writing the script, and SLURM's own answer.

    python benchmarks/submit.py [--rounds 10]

Starts the test cluster (slurmctld with 1,024 nodes of eight GPUs that are only asked about; needs root and Debian's
slurm-wlm), submits runs for 1,024 nodes and for two in alternation, and prints the seconds of each and their ratio.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from slurm.cluster import Cluster, missing  # noqa: E402

HALFSTEP = str(Path(sys.executable).parent / "halfstep")


def main() -> int:
    """Start the cluster, submit, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--data", type=Path, help="a prepared corpus (default: the standard library's sources)")
    arguments = parser.parse_args()
    if reason := missing():
        sys.exit(f"no SLURM here: {reason}")
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        data = arguments.data or scratch / "data"
        if arguments.data is None:
            prepare = ["data", "prepare", "--source", "stdlib", "--out", str(data), "--vocab-size", "4096"]
            subprocess.run([HALFSTEP, *prepare], check=True)
        site = scratch / "site.toml"
        site.write_text('[slurm]\npartition = "big"\ntime = "1-00"\n[node]\ngpus = 8\ncpus_per_task = 8\n')
        cluster = Cluster(scratch / "slurm")
        try:
            cluster.start()
            _measure(cluster, site, data, scratch, arguments.rounds)
        finally:
            cluster.stop()
    return 0


def _measure(cluster: Cluster, site: Path, data: Path, scratch: Path, rounds: int) -> None:
    seconds: dict[int, list[float]] = {1024: [], 2: []}
    for number in range(rounds + 1):
        for nodes, taken in seconds.items():
            keys = ["model=gpt2-1.5b", f"data={data}", "batch.global=8192", f"nodes={nodes}", f"seed={number}"]
            began = time.perf_counter()
            subprocess.run(
                [HALFSTEP, "submit", "--site", str(site), *keys, f"out={scratch}/run-{nodes}-{number}"],
                env={**os.environ, **cluster.environment()},
                stdout=subprocess.DEVNULL,
                check=True,
            )
            if number:  # the first fills the disk's cache
                taken.append(time.perf_counter() - began)
    for nodes, taken in seconds.items():
        low, middle, high = statistics.quantiles(taken, n=4)
        print(f"{nodes:>5} nodes: {middle:.2f} s (quartiles {low:.2f} to {high:.2f}, {len(taken)} submissions)")
    ratios = [many / few for many, few in zip(seconds[1024], seconds[2], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"ratio: {middle:.2f} (quartiles {low:.2f} to {high:.2f})")


if __name__ == "__main__":
    sys.exit(main())

"""Run real cells on this machine's CPU ranks and compare their step times with the plan's forecast.

python benchmarks/measure_time.py --data data/stdlib --out runs/time [--cells zero=0,1,2,3 precision=fp32,bf16,fp16]

`halfstep doctor --measure` comes first. Other work on the machine shows in both: measure and run when it is quiet.
"""

import argparse
import itertools
import subprocess
import sys
from pathlib import Path

from halfstep.launcher.rundir import prediction_errors

HALFSTEP = Path(sys.executable).parent / "halfstep"
MODELS = (("gpt2-nano", 8, 128), ("llama-nano", 8, 128), ("gpt2-nano", 2, 128), ("gpt2-nano", 8, 64))
"""Model, micro-batch, sequence."""


def main() -> int:
    """Run what is not there yet, and print every run's step time beside its forecast."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a folder made by `halfstep data prepare`")
    parser.add_argument("--out", type=Path, required=True, help="where the runs go")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--cells", nargs="*", default=["zero=0,1,2,3", "precision=fp32,bf16,fp16"])
    arguments = parser.parse_args()
    axes = [
        [f"{key}={value}" for value in values.split(",")]
        for key, _, values in (c.partition("=") for c in arguments.cells)
    ]
    done = []
    for (model, micro, sequence), *cell in itertools.product(MODELS, *axes):
        out = arguments.out / f"{model}-{micro}x{sequence}-{'-'.join(cell)}"
        keys = [f"model={model}", f"data={arguments.data}", f"out={out}", f"steps={arguments.steps}", *cell]
        keys += [f"batch.micro={micro}", f"batch.global={4 * micro}", f"sequence={sequence}", "eval.every=0"]
        keys += ["eval.sequences=1", "checkpoint.every=0", "checkpoint.at_end=false"]
        if not (out / "summary.json").exists():
            ended = subprocess.run([HALFSTEP, "run", *keys], capture_output=True, text=True)
            if ended.returncode:
                print(f"{out.name}: exit code {ended.returncode}\n{ended.stderr[-500:]}", file=sys.stderr)
                continue
        done.append(prediction_errors.run(out))
        print(prediction_errors.table([done[-1]])[1], flush=True)
    print("\n".join(prediction_errors.table(done)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Run launcher/train.py with torch's profiler over its last steps: profile_run.py TRACE.json STEPS key=value ...

The steps between two records of the run's recorder are what is profiled; the last STEPS records end it.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from halfstep.launcher import train


def profiled(arguments: list[str], trace: Path, steps: int, last: int) -> int:
    """Train as launcher/train.py does and write a Chrome trace of `steps` steps up to number `last`."""
    decide = train.decide

    def decided(*given):
        # torch may be imported from here on: the ranks' environment stands.
        watch_steps(trace, last - steps, last)
        return decide(*given)

    train.decide = decided
    return train.main(arguments)


def watch_steps(trace: Path, first: int, last: int) -> None:
    """Profile what comes after the record of step `first`, up to that of step `last`."""
    import torch

    from halfstep.launcher.engine.recorder import Recorder

    on_gpu = torch.cuda.is_available()
    kinds = [torch.profiler.ProfilerActivity.CPU] + ([torch.profiler.ProfilerActivity.CUDA] if on_gpu else [])
    profiler, record_step = torch.profiler.profile(activities=kinds), Recorder.step

    def step(self: Recorder, record) -> None:
        if record.step in (first, last) and on_gpu:
            torch.cuda.synchronize()
        if record.step == last:
            profiler.stop()
            profiler.export_chrome_trace(str(trace))
        record_step(self, record)
        if record.step == first:
            profiler.start()

    Recorder.step = step


if __name__ == "__main__":
    trace, steps, *arguments = sys.argv[1:]
    last = next(int(argument.partition("=")[2]) for argument in arguments if argument.startswith("steps="))
    code = profiled(arguments, Path(trace), int(steps), last)
    sys.stdout.flush()
    os._exit(code)

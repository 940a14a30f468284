"""A stand-in for the program in tests of what runs it: it learns nothing, and leaves the same files."""

import os
import signal
import sys
import time
from itertools import pairwise
from pathlib import Path

flags = sys.argv[1:]
values = dict(pairwise(flags))
with open("calls", "a") as calls:
    print(os.environ.get("CUDA_VISIBLE_DEVICES"), *flags, file=calls)
if "--evaluate" in flags:
    print(f"game 1: 7\n7.00 ± 1.50 over {values['--eval-episodes']} games of {values['--env-id']}")
    sys.exit()
if "--gamma" in flags:
    sys.exit(f"error: --gamma {values['--gamma']}: must lie between 0 and 1")

run = Path(values.get("--resume", f"runs/{values.get('--env-id')}__fake__1"))
buffer = values.get("--teacher-buffer")
run.mkdir(parents=True, exist_ok=True)
if buffer and not Path(buffer).exists():
    Path(buffer).write_text(f"made by {Path.cwd().name}")
if (
    "--resume" not in flags and "--slow" in flags and "--save-model" in flags
):  # until it is told to stop
    numbers = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    (run / "checkpoint.pt").touch()
    Path("pid").write_text(str(os.getpid()))
    number = signal.sigtimedwait(numbers, 100).si_signo
    time.sleep(0.5)  # as a checkpoint takes its time
    Path("signals").write_text(" ".join(str(int(each)) for each in (number, *signal.sigpending())))
    sys.exit(128 + number)
if "--save-model" in flags or "--resume" in flags:
    (run / "fake.cleanrl_model").touch()

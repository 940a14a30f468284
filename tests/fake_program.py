"""A stand-in for the program, for tests of what runs it: it learns nothing, leaves the same files.

What it must do is told by flags: with --gamma it refuses to work, and with --slow and --save-model
it trains until it is stopped, unless it is resumed.
"""

import os
import signal
import sys
import time
from itertools import pairwise
from pathlib import Path


def train_until_stopped(run: Path) -> None:
    """Notes its process and the signals that come, and exits as the program does."""
    stopping = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
    signal.pthread_sigmask(signal.SIG_BLOCK, stopping)
    (run / "checkpoint.pt").touch()
    Path("pid").write_text(str(os.getpid()))

    first = signal.sigtimedwait(stopping, 100).si_signo
    time.sleep(0.5)  # as a checkpoint takes its time
    numbers = [first, *signal.sigpending()]
    Path("signals").write_text(" ".join(str(int(number)) for number in numbers))
    sys.exit(128 + first)


def main() -> None:
    flags = sys.argv[1:]
    values = dict(pairwise(flags))  # a flag's value is what follows it

    with open("calls", "a") as calls:
        print(os.environ.get("CUDA_VISIBLE_DEVICES"), *flags, file=calls)

    env_id = values.get("--env-id")
    if "--evaluate" in flags:
        games = f"{values['--eval-episodes']} games of {env_id}"
        print("game 1: 7")
        print(f"7.00 ± 1.50 over {games}")
        return
    if "--gamma" in flags:
        sys.exit(f"error: --gamma {values['--gamma']}: must lie between 0 and 1")

    resumed = "--resume" in flags
    if resumed:
        run = Path(values["--resume"])
        _, _, name_and_seed = run.name.partition("__")
        name, _, _ = name_and_seed.rpartition("__")
    else:
        name = values.get("--exp-name", "fake")
        run = Path(f"runs/{env_id}__{name}__1")
    run.mkdir(parents=True, exist_ok=True)
    (run / "lock").touch()
    (run / "checkpoint.pt.1.part").touch()  # as a power cut leaves it

    if "--teacher-buffer" in flags:
        buffer = Path(values["--teacher-buffer"])
        if not buffer.exists():
            buffer.write_text(f"made by {Path.cwd().name}")

    saves_model = "--save-model" in flags and "--no-save-model" not in flags
    if "--slow" in flags and saves_model and not resumed:
        train_until_stopped(run)
    if saves_model or resumed:
        (run / f"{name}.best.cleanrl_model").touch()
        (run / f"{name}.cleanrl_model").touch()


if __name__ == "__main__":
    main()

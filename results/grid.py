"""Trains a grid of runs, several at a time; what is cut off goes on when it is started again.

    python results/grid.py --workers 4 DIRECTORY ...

Each directory is one run and holds its `flags`, one a line. There the program writes `runs/RUN`, its output goes to
`log`, the time when it began to `began`, the seconds at work to `seconds`, and in the end the scores of some games of
the final network to `score`: a run that has one is finished. SIGINT, SIGTERM, SIGUSR1 and the end of --seconds ask
every run for a checkpoint.

Exit code: 0 if all are finished; 1 if some failed, each of which is named with its log; 128 + signal if it was stopped.
"""

import argparse
import fcntl
import os
import queue
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TextIO

PROGRAM = Path(__file__).resolve().parent.parent / "qdagger_dqn_atari_impalacnn.py"
GPU_MEGABYTES = 13_000  # of a default run: 10.6 GB of replays, networks and kernels
STOPPED = [128 + number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]


def gpu_memories() -> list[int]:
    """Free megabytes of every GPU."""
    query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        return [int(line) for line in subprocess.run(query, capture_output=True, text=True).stdout.split()]
    except (OSError, ValueError):
        return []


def default_workers() -> int:
    """As many as the GPUs have memory for, or two cores each without one; and cores for games on either."""
    cores, memories = os.cpu_count() or 1, gpu_memories()
    return max(1, min(sum(free // GPU_MEGABYTES for free in memories), cores // 4) if memories else cores // 2)


def last_line(file: Path) -> str:
    """What a progress bar, or the last message, says there."""
    lines = file.read_text(errors="replace").replace("\r", "\n").split("\n") if file.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


class Run:
    """One run: a process that trains, then one that plays the final network."""

    def __init__(self, directory: Path, games: int):
        self.directory, self.games, self.name = directory.resolve(), games, directory.name
        self.log, self.score = self.directory / "log", self.directory / "score"
        self.process: subprocess.Popen | None = None
        self.told = 0  # signals that were passed on to it

    def training(self) -> list[str]:
        """Flags that start it, or that go on with it."""
        for run in self.directory.glob("runs/*"):
            if any(run.glob("checkpoints/*.checkpoint")):
                return ["--resume", str(run)]
            shutil.rmtree(run)  # cut off before its first checkpoint
        return (self.directory / "flags").read_text().split()

    def games_of_final_network(self) -> list[str]:
        (model,) = self.directory.glob("runs/*/*.cleanrl_model")
        env_id = model.parent.name.split("__")[0]
        return ["--evaluate", str(model), "--env-id", env_id, "--eval-episodes", str(self.games)]

    def execute(self, flags: list[str], output: Path, lock: TextIO, variables: dict[str, str]) -> int:
        """Run the program in a session of its own, so that Ctrl-C reaches us alone; its exit code."""
        began, self.told = time.time(), 0
        with output.open("a") as out, self.log.open("a") as err:
            self.process = subprocess.Popen(
                [sys.executable, PROGRAM, *flags],
                cwd=self.directory,
                env=os.environ | variables,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                pass_fds=[lock.fileno()],  # held by the program too, in case that we are killed
                start_new_session=True,
            )
        code = self.process.wait()
        code = 128 - code if code < 0 else code  # as a shell has it for who dies of a signal
        with (self.directory / "seconds").open("a") as file:
            file.write(f"{time.time() - began:.1f}\n")
        return code

    def finish(self, variables: dict[str, str], say: Callable, asked: list[int]) -> int:
        """Do what is left to do; 0, or the exit code of what failed or was stopped."""
        trained, part = self.directory / "trained", self.directory / "score.part"
        with (self.directory / "lock").open("w") as lock:
            if not take(lock):
                say(f"{self.name}: another process is at work there, waiting for it")
                while not take(lock):
                    time.sleep(1)
                    if asked:
                        return 128 + asked[0]
            if self.score.exists():  # the other one has finished it
                return 0
            say(f"{self.name}: begins")
            if not (self.directory / "began").exists():
                (self.directory / "began").write_text(f"{time.time():.1f}\n")
            if not trained.exists():
                code = self.execute(self.training(), self.log, lock, variables)
                if code or asked:
                    return code or 128 + asked[0]
                trained.touch()
            part.unlink(missing_ok=True)
            code = self.execute(self.games_of_final_network(), part, lock, variables)
            if code == 0:
                part.rename(self.score)
            return code


def take(lock: TextIO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def train(runs: list[Run], workers: int, seconds: float, say: Callable) -> int:
    """Finish all runs, so many at a time; the exit code."""
    cores, end = os.cpu_count() or 1, time.time() + seconds
    gpus = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    gpus = gpus or [str(gpu) for gpu in range(len(gpu_memories()))]
    slots: queue.SimpleQueue[int] = queue.SimpleQueue()
    for slot in range(workers):
        slots.put(slot)
    asked: list[int] = []
    times = [0.0]

    def ask(number: int, _) -> None:
        if time.time() - times[-1] > 1:  # Ctrl-C may come from the terminal and from the script that called us
            times.append(time.time())
            asked.append(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, ask)

    def work(run: Run) -> bool:
        """Whether `run` is finished, or can be when it is started again."""
        if asked:
            return True
        slot = slots.get()
        variables = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // workers)))}
        if gpus:
            variables["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
        try:
            code = run.finish(variables, say, asked)
        except Exception as error:  # no flags, no model, no room for a log
            say(f"{run.name}: {type(error).__name__}: {error}")
            code = 1
        run.process = None
        slots.put(slot)
        ended = "stopped" if code in STOPPED else f"FAILED with exit code {code}. {last_line(run.log)}"
        say(f"{run.name}: {ended if code else last_line(run.score)}")
        return code == 0 or code in STOPPED

    with ThreadPoolExecutor(workers) as pool:
        left = [run for run in runs if not run.score.exists()]
        futures = [pool.submit(work, run) for run in left]
        told = time.time()
        while not all(future.done() for future in futures):
            time.sleep(0.2)
            if time.time() > end and not asked:
                asked.append(signal.SIGTERM)
            at_work = [run for run in left if run.process and run.process.poll() is None]
            for run in at_work:
                for number in asked[run.told :]:
                    say(f"{run.name}: asked to stop")
                    run.process.send_signal(number)
                    run.told += 1
            if time.time() - told > 60:
                told = time.time()
                for run in at_work:
                    say(f"{run.name}: {last_line(run.log)}")
    failed = [run for run, future in zip(left, futures) if not future.result()]
    for run in failed:
        say(f"FAILED: {run.name}, see {run.log}")
    return 128 + asked[0] if asked else int(bool(failed))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="+", type=Path)
    parser.add_argument("--workers", type=int, help="runs at a time; unset: what memory and cores allow")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="then everything is stopped")
    parser.add_argument("--games", type=int, default=30, help="played by the final network")
    parser.add_argument("--log", type=Path, help="append what is said here to this file as well")
    args = parser.parse_args()

    def say(message: str) -> None:
        line = f"{time.strftime('%F %T')} {message}"
        print(line + "\n", end="", flush=True)  # in one piece, since several runs speak
        if args.log:
            with args.log.open("a") as file:
                file.write(line + "\n")

    runs = [Run(directory, args.games) for directory in args.directories]
    return train(runs, args.workers or default_workers(), args.seconds, say)


if __name__ == "__main__":
    sys.exit(main())

"""Trains a grid of runs, several at a time: what is finished is skipped, what was cut off resumed.

    python tools/run.py benchmark/runs.txt --workers 2
    # this one alone: a task of a Slurm job array
    python tools/run.py benchmark/runs.txt --line 3
    python tools/run.py benchmark/other.txt --program OTHER.py --python ITS/bin/python \\
        --hub-teacher teachers/PongNoFrameskip-v4.cleanrl_model

A line of the list is a run: its name, KIND-ENV_ID-SEED, and its flags. The program works in the
directory of that name beside the list, which then holds

    runs/RUN   event files, checkpoint, and the model of a run with --save-model
    log        all that the program said
    start      when it began and with which flags; with others it would be another run, and is
               refused
    score      the scores of some games of the model; empty without one. A run that has this file
               is finished

Another script of the same flags that finds its teacher on the hub alone is given ours by
--hub-teacher. A run that saves no model and writes no checkpoint is neither scored nor resumed: so
it is with such a script.

SIGINT, SIGTERM and SIGUSR1 are passed on; the program then writes a checkpoint. Exit code: 0 if
every run is finished, 1 if some failed, each of which is named with its log, 2 for a run with other
flags, 128 + signal if it was stopped.
"""

import argparse
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "qdagger_dqn_atari_impalacnn.py"
SCORE = re.compile(r"-?[\d.]+ ± [\d.]+ over \d+ games.*")  # the last line of --evaluate


def say(message: str) -> None:
    print(time.strftime("%F %T"), message, flush=True)


class Run:
    """A line of the list. What is left to do is told by the files of its directory."""

    def __init__(self, directory: Path, flags: list[str], args: argparse.Namespace):
        self.directory = directory
        self.name = directory.name
        self.flags = flags
        self.args = args
        self.process: subprocess.Popen | None = None

        self.start_file = directory / "start"
        self.trained = directory / "trained"
        self.score = directory / "score"
        self.log = directory / "log"

    @property
    def finished(self) -> bool:
        return self.score.exists()

    def model(self) -> Path | None:
        return next(self.directory.glob("runs/*/*.cleanrl_model"), None)

    @property
    def command(self) -> list[str]:
        return [self.args.program.name, *self.flags]

    def is_another(self) -> bool:
        """Whether the run in this directory was started with other flags."""
        if not self.start_file.exists():
            return False
        return json.loads(self.start_file.read_text())["command"] != self.command

    def next_flags(self) -> list[str]:
        """Flags that play the final network, resume the run, or start it."""
        if self.trained.exists():
            return self.evaluation_flags()
        for checkpoint in self.directory.glob("runs/*/checkpoint*"):
            if checkpoint.suffix in (".pt", ".npz"):
                return ["--resume", str(checkpoint.parent)]
        # What was cut off before its first checkpoint begins anew.
        shutil.rmtree(self.directory / "runs", ignore_errors=True)
        return self.flags

    def evaluation_flags(self) -> list[str]:
        model = self.model()
        env_id = model.parent.name.split("__")[0].replace("ALE-", "ALE/")
        flags = ["--evaluate", str(model), "--env-id", env_id]
        flags += ["--eval-episodes", str(self.args.games)]
        sticky = re.findall(r"(--repeat.action.probability)[ =](\S+)", " ".join(self.flags))
        if sticky:
            flags += sticky[-1]
        return flags

    def start(self, variables: dict[str, str]) -> bool:
        """Begin the next thing; False if another process is at work here."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with self.log.open("a") as log, (self.directory / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"{self.name}: another process is at work there")
                return False

            if not self.start_file.exists():
                content = {"time": time.time(), "command": self.command}
                self.start_file.write_text(json.dumps(content))

            flags = self.next_flags()
            say(f"{self.name}: {shlex.join(flags)}")
            self.process = subprocess.Popen(
                [self.args.python.absolute(), self.args.program.resolve(), *flags],
                cwd=self.directory,
                env=os.environ | variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[lock.fileno()],  # the program keeps the lock, in case that we are killed
                start_new_session=True,  # so that Ctrl-C reaches it only through us
            )
        return True

    def ended(self) -> bool:
        """Note what its process has done; whether there is something left to do."""
        if self.process.returncode != 0:
            say(f"{self.name}: ended with exit code {self.process.returncode}")
            return False
        if self.trained.exists():
            scores = SCORE.findall(self.log.read_text(errors="replace"))
            self.score.write_text(scores[-1] + "\n")
        else:
            self.trained.touch()
            if self.model() is None:
                self.score.touch()
        if self.finished:
            say(f"{self.name}: finished. {self.score.read_text().strip()}")
        return not self.finished


def read_list(path: Path, args: argparse.Namespace) -> list[Run]:
    lines = path.read_text().splitlines()
    if args.line:
        lines = lines[args.line - 1 : args.line]
    runs = []
    for line in lines:
        name, *flags = shlex.split(line)
        runs.append(Run(path.resolve().parent / name, flags, args))
    return runs


def visible_gpus() -> list[str]:
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu]
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True).stdout
    return [line for line in answer.split() if line.isdigit()]


def local_hub(home: Path, teacher: Path) -> dict[str, str]:
    """Put `teacher` where the hub's default one of its game would be cached.

    Returns the variables with which a script finds it there.
    """
    repository = home / "hub" / f"models--cleanrl--{teacher.stem}-dqn_atari-seed1"
    references = repository / "refs"
    snapshot = repository / "snapshots" / "local"
    references.mkdir(parents=True, exist_ok=True)
    snapshot.mkdir(parents=True, exist_ok=True)
    (references / "main").write_text("local")
    shutil.copy(teacher, snapshot / "dqn_atari.cleanrl_model")
    return {"HF_HOME": str(home.resolve()), "HF_HUB_OFFLINE": "1"}


def train(runs: list[Run], workers: int, variables: dict[str, str], stops: list[int]) -> int:
    """Finish all runs, so many at a time; the exit code. `stops` grows by the signals that come."""
    gpus = visible_gpus()
    cores = os.cpu_count() or 1
    workers = workers or len(gpus) or max(1, cores // 2)
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, cores // workers)))
    variables = {"OMP_NUM_THREADS": threads} | variables

    waiting = [run for run in runs if not run.finished]
    slots: list[Run | None] = [None] * workers
    passed_on = 0
    while any(slots) or (waiting and not stops):
        for slot, run in enumerate(slots):
            if run and run.process.poll() is not None:
                slots[slot] = None
                if run.ended():
                    waiting.insert(0, run)
            if not slots[slot] and waiting and not stops:
                of_slot = dict(variables)
                if gpus:
                    of_slot["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
                run = waiting.pop(0)
                if run.start(of_slot):
                    slots[slot] = run

        for number in stops[passed_on:]:
            for run in slots:
                if run:
                    run.process.send_signal(number)
            passed_on += 1
        time.sleep(0.1)

    unfinished = [run for run in runs if not run.finished]
    if unfinished and stops:
        return 128 + stops[0]
    for run in unfinished:
        say(f"FAILED: {run.name}, see {run.log}")
    return 1 if unfinished else 0


def parse_flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "lists", nargs="+", type=Path, help="the next begins when all runs of one are finished"
    )
    parser.add_argument("--line", type=int, help="only this one, counted from 1")
    parser.add_argument(
        "--workers", type=int, help="runs at a time; unset: one per GPU, without one per two cores"
    )
    parser.add_argument("--games", type=int, default=30, help="that the final network plays")
    parser.add_argument("--program", type=Path, default=PROGRAM)
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="that runs it")
    parser.add_argument(
        "--hub-teacher", type=Path, help="ENV_ID.cleanrl_model, for a script that asks the hub"
    )
    return parser.parse_args()


def main() -> int:
    args = parse_flags()

    stops: list[int] = []

    def note(number, _) -> None:
        stops.append(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, note)

    variables = {}
    if args.hub_teacher:
        variables = local_hub(args.lists[0].parent / "hub", args.hub_teacher)

    lists = [read_list(path, args) for path in args.lists]
    for runs in lists:
        for run in runs:
            if run.is_another():
                advice = "delete it, or take another list"
                message = f"error: {run.directory} was started with other flags; {advice}"
                print(message, file=sys.stderr)
                return 2

    for runs in lists:
        code = train(runs, args.workers, variables, stops)
        if code != 0:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())

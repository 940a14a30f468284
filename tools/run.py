"""Trains a grid of runs, several at a time: what is finished is skipped, what was cut off resumed.

    python tools/run.py benchmark/runs.txt --workers 2
    # this one alone: a task of a Slurm job array
    python tools/run.py benchmark/runs.txt --line 3
    python tools/run.py benchmark/other.txt --program OTHER.py --python ITS/bin/python \\
        --hub-teacher teachers/PongNoFrameskip-v4.cleanrl_model

A line of the list is a run: its name, KIND-ENV_ID-SEED, and its flags. Empty lines, and those that
begin with #, are none. The program works in the directory of that name beside the list, which then
holds

    runs/RUN   event files, checkpoint, and the model of a run with --save-model
    log        all that the program said
    start      when it began and with which flags; with others it would be another run, and is
               refused
    trained    that the program has ended by itself
    score      the scores of some games of the model, played with the run's own flags; empty without
               a model. A run that has this file is finished
    lock       who is at work there; another tools/run.py waits until nobody is

Another script of the same flags that finds its teacher on the hub alone is given ours by
--hub-teacher. A run that saves no model and writes no checkpoint is neither scored nor resumed: so
it is with such a script.

SIGINT, SIGTERM and SIGUSR1 are passed on; the program then writes a checkpoint. Exit code: 0 if
every run is finished, 1 if some failed, each of which is named with its log, 2 for a run with other
flags, a list or a flag that cannot be, 128 + signal if it was stopped.
"""

import argparse
import errno
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "qdagger_dqn_atari_impalacnn.py"
SCORE = re.compile(r"-?[\d.]+ ± [\d.]+ over \d+ games.*")  # the last line of --evaluate
CHECKPOINT = re.compile(r"checkpoint(\.previous)?\.(pt|npz)")
TRAINED = "exit code 0\n"
HAS_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # what such a file system answers


class UserError(Exception):
    """What the user can put right: `main` shows its one line and exits with code 2."""


def say(message: str) -> None:
    print(time.strftime("%F %T"), message, flush=True)


@cache
def say_once(message: str) -> None:
    say(message)


def write(path: Path, text: str) -> None:
    """To the disk under another name, then renamed: a power cut leaves all of it, or nothing."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)  # what a full disk has left of it

    directory = os.open(path.parent, os.O_RDONLY)
    with suppress(OSError):  # not every file system can
        os.fsync(directory)
    os.close(directory)


class Run:
    """A line of the list. What is left to do is told by the files of its directory.

    Such a file that is empty or broken counts as absent.
    """

    def __init__(self, directory: Path, flags: list[str], args: argparse.Namespace):
        self.directory = directory
        self.name = directory.name
        self.flags = flags
        self.args = args
        self.command = [args.program.name, *flags]

        self.start_file = directory / "start"
        self.trained_file = directory / "trained"
        self.score_file = directory / "score"
        self.lock_file = directory / "lock"
        self.log = directory / "log"

        self.process: subprocess.Popen | None = None
        self.lock = None  # kept open, and so locked, until it is noted what the process has done
        self.log_begin = 0  # where in the log the process begins to speak
        self.next_try = 0.0

    def started(self) -> dict | None:
        """When it began and with which flags; None if it has not begun."""
        try:
            content = json.loads(self.start_file.read_text())
        except (FileNotFoundError, ValueError):
            return None
        if not isinstance(content, dict) or "time" not in content or "command" not in content:
            return None
        return content

    def is_another(self) -> bool:
        """Whether the run in this directory was started with other flags."""
        started = self.started()
        return started is not None and started["command"] != self.command

    def trained(self) -> bool:
        if not self.trained_file.exists():
            return False
        return self.trained_file.read_text(errors="replace") == TRAINED

    def finished(self) -> bool:
        if not self.score_file.exists():
            return False
        text = self.score_file.read_text(errors="replace").strip()
        if text == "":
            return self.model() is None
        return SCORE.fullmatch(text) is not None

    def model(self) -> Path | None:
        """The last network, {exp_name}.cleanrl_model.

        That of the best evaluation lies beside it, {exp_name}.best.cleanrl_model.
        """
        for path in self.directory.glob("runs/*/*.cleanrl_model"):
            name_of_run = path.parent.name  # {env_id}__{exp_name}__{seed}__{time}
            if f"__{path.stem}__" in name_of_run:
                return path
        return None

    def checkpoint(self) -> Path | None:
        for path in sorted(self.directory.glob("runs/*/checkpoint*")):
            if CHECKPOINT.fullmatch(path.name):
                return path
        return None

    def next_flags(self) -> list[str]:
        """Flags that play the final network, resume the run, or start it."""
        model = self.model()
        if self.trained():
            games = str(self.args.games)
            return [*self.flags, "--evaluate", str(model), "--eval-episodes", games]
        checkpoint = self.checkpoint()
        if checkpoint is not None:
            return ["--resume", str(checkpoint.parent)]
        if (self.directory / "runs").exists():
            self.put_away(model)
        return self.flags

    def put_away(self, model: Path | None) -> None:
        """What was cut off before its first checkpoint begins anew."""
        runs = self.directory / "runs"
        if model is None:
            shutil.rmtree(runs)
            return
        kept = self.directory / f"runs.{time.strftime('%Y-%m-%d.%H-%M-%S')}"
        runs.rename(kept)
        say(f"{self.name}: begins anew, without a checkpoint; its model is kept in {kept}")

    def take_lock(self) -> bool:
        """False if another process is at work here."""
        lock = self.lock_file.open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if self.next_try == 0:
                who = self.lock_file.read_text().strip()
                say(f"{self.name}: another process is at work there ({who}); waiting for it")
            self.next_try = time.monotonic() + 1
            lock.close()
            return False
        except OSError as error:
            if error.errno not in HAS_NO_LOCKS:
                lock.close()
                raise
            advice = "no locks on this file system; start nothing there twice"
            say_once(f"{self.directory.parent}: {advice}")
        self.lock = lock
        return True

    def release_lock(self) -> None:
        if self.lock is not None:
            self.lock.close()
            self.lock = None

    def start(self, environment: dict[str, str]) -> bool:
        """Begin the next thing, or wait for who is at work here; False if there is nothing to do.

        While it waits there is no `process`.
        """
        self.process = None
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if not self.take_lock():
                return True
            if self.trained() and self.model() is None:
                write(self.score_file, "")
            if self.is_another():  # it has begun since `check`
                say(f"{self.name}: has been started with other flags")
            elif not self.finished():  # while we waited, another may have done it
                self.start_process(environment)
        except OSError as error:
            say(f"{self.name}: cannot start: {error}")
        if self.process is None:
            self.release_lock()
        return self.process is not None

    def start_process(self, environment: dict[str, str]) -> None:
        if self.started() is None:
            began = time.time()
            if self.start_file.exists():  # emptied by a power cut, but it has a date
                began = self.start_file.stat().st_mtime
            write(self.start_file, json.dumps({"time": began, "command": self.command}))

        flags = self.next_flags()
        say(f"{self.name}: {shlex.join(flags)}")
        with self.log.open("a") as log:
            self.log_begin = log.tell()
            self.process = subprocess.Popen(
                [self.args.python, self.args.program.resolve(), *flags],
                cwd=self.directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[self.lock.fileno()],  # it keeps the lock, in case that we are killed
                start_new_session=True,  # so that Ctrl-C reaches it only through us
            )
        self.lock.truncate(0)
        self.lock.write(f"process {self.process.pid} on {socket.gethostname()}\n")
        self.lock.flush()

    def goes_on(self, environment: dict[str, str], stopped: bool) -> bool:
        """Whether its process is at work, or that of another is waited for."""
        if self.process is not None:
            return self.process.poll() is None
        if stopped:
            return False
        if time.monotonic() < self.next_try:
            return True
        return self.start(environment)

    def ended(self) -> bool:
        """Note what its process has done; whether there is something left to do."""
        if self.process is None:  # another's, or it did not start
            return False
        try:
            self.note_end()
        except OSError as error:
            say(f"{self.name}: cannot note its end: {error}")
            return False
        finally:
            self.release_lock()
        return self.process.returncode == 0 and not self.finished()

    def note_end(self) -> None:
        if self.process.returncode != 0:
            say(f"{self.name}: ended with exit code {self.process.returncode}")
            return

        if not self.trained():
            write(self.trained_file, TRAINED)
            if self.model() is None:
                write(self.score_file, "")
        else:
            with self.log.open(errors="replace") as log:
                log.seek(self.log_begin)
                scores = SCORE.findall(log.read())
            if not scores:
                raise OSError("--evaluate has printed no score")
            write(self.score_file, scores[-1] + "\n")
        if self.finished():
            say(f"{self.name}: finished. {self.score_file.read_text().strip()}")


def read_list(path: Path, args: argparse.Namespace) -> list[Run]:
    """Its runs, or that of --line."""
    try:
        lines = path.read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); name a list of runs") from error

    runs = {}
    for number, line in enumerate(lines, 1):
        if line.strip() == "" or line.lstrip().startswith("#"):
            continue
        try:
            name, *flags = shlex.split(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}; see its quotes") from error
        if name != Path(name).name or name.startswith((".", "-")):
            rule = "a line is a name, which becomes a directory, and flags"
            raise UserError(f"{path}, line {number}: {name} is no name; {rule}")
        runs[number] = Run(path.resolve().parent / name, flags, args)

    if not runs:
        raise UserError(f"{path}: no run in it; a line is a run's name and its flags")
    if args.line is None:
        return list(runs.values())
    if args.line not in runs:
        raise UserError(f"--line {args.line}: no run there in {path}; its last is {max(runs)}")
    return [runs[args.line]]


def check(runs: list[Run]) -> None:
    """UserError if two runs of one name differ, in the lists or from what is on the disk."""
    commands = {}
    for run in runs:
        command = commands.setdefault(run.directory, run.command)
        if command != run.command:
            raise UserError(f"{run.name} is in the lists with other flags too; rename one of them")
        if run.is_another():
            advice = "delete it, or take another list"
            raise UserError(f"{run.directory} was started with other flags; {advice}")


# The program has the same function, which a test compares; to import it from there would take all
# of torch.
def cores(root: Path = Path("/")) -> int:
    """How many this process may use: a cluster or a container may grant few of the machine's.

    `root` is that of the file system.
    """
    granted = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # on Linux
        granted = len(os.sched_getaffinity(0))

    membership = root / "proc/self/cgroup"
    groups = root / "sys/fs/cgroup"
    lines = membership.read_text().splitlines() if membership.exists() else []
    for line in lines:
        _, controllers, path = line.split(":", maxsplit=2)
        if controllers == "":  # version 2 of control groups
            parent = groups
            names = ["cpu.max"]
        elif "cpu" in controllers.split(","):  # version 1
            parent = groups / "cpu"
            names = ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue

        own = parent / path.lstrip("/")
        for group in [own, *own.parents]:  # the limits of those around it hold too
            files = [group / name for name in names]
            if all(file.exists() for file in files):
                quota, period = " ".join(file.read_text() for file in files).split()
                if quota not in ("max", "-1"):
                    granted = min(granted, int(quota) // int(period))
    return max(1, granted)


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
    write(references / "main", "local")
    cached = snapshot / "dqn_atari.cleanrl_model"
    part = cached.with_name(f"{cached.name}.{os.getpid()}.part")
    shutil.copy(teacher, part)
    part.replace(cached)  # whole, also for runs of another start that are reading it
    return {"HF_HOME": str(home.resolve()), "HF_HUB_OFFLINE": "1"}


def train(runs: list[Run], workers: int | None, variables: dict, stops: list[int]) -> int:
    """Finish all runs, so many at a time; the exit code. `stops` grows by the signals that come."""
    gpus = visible_gpus()
    workers = workers or len(gpus) or max(1, cores() // 2)
    defaults = {
        "OMP_NUM_THREADS": str(max(1, cores() // workers)),
        "TQDM_MININTERVAL": "30",  # seconds; nobody watches the progress bar in a log
        "TQDM_MAXINTERVAL": "30",
    }
    environment = defaults | os.environ | variables

    waiting = [run for run in runs if not run.finished()]
    slots: list[Run | None] = [None] * workers
    passed_on = 0
    while any(slots) or (waiting and not stops):
        for slot, run in enumerate(slots):
            of_slot = dict(environment)
            if gpus:
                of_slot["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]

            if run is not None and not run.goes_on(of_slot, stopped=len(stops) > 0):
                slots[slot] = None
                if run.ended():
                    waiting.insert(0, run)
            if slots[slot] is None and waiting and not stops:
                run = waiting.pop(0)
                if run.start(of_slot):
                    slots[slot] = run

        for number in stops[passed_on:]:
            for run in slots:
                if run is not None and run.process is not None:
                    run.process.send_signal(number)
            passed_on += 1
        time.sleep(0.1)

    unfinished = [run for run in runs if not run.finished()]
    if unfinished and stops:
        return 128 + stops[0]
    for run in unfinished:
        say(f"FAILED: {run.name}, see {run.log}")
    return 1 if unfinished else 0


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"error: {message}; see --help\n")


def at_least_1(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of 1 or more")
    return int(text)


def parse_flags() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "lists", nargs="+", type=Path, help="the next begins when all runs of one are finished"
    )
    parser.add_argument(
        "--line", type=at_least_1, help="only the run of this line of the list, counted from 1"
    )
    parser.add_argument(
        "--workers",
        type=at_least_1,
        help="runs at a time; unset: one per GPU, without one per two cores",
    )
    parser.add_argument("--games", type=at_least_1, default=30, help="that the final network plays")
    parser.add_argument("--program", type=Path, default=PROGRAM)
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="that runs it")
    parser.add_argument(
        "--hub-teacher", type=Path, help="ENV_ID.cleanrl_model, for a script that asks the hub"
    )
    args = parser.parse_intermixed_args()  # a list may follow a flag

    for flag, path in (("--program", args.program), ("--hub-teacher", args.hub_teacher)):
        if path is not None and not path.is_file():
            raise UserError(f"{flag} {path}: there is no such file")
    python = shutil.which(args.python)
    if python is None:
        raise UserError(f"--python {args.python}: nothing that can be run; name an interpreter")
    args.python = Path(python).absolute()  # not resolved: that would leave a virtual environment
    return args


def main() -> int:
    stops: list[int] = []

    def note(number, _) -> None:
        stops.append(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, note)

    try:
        args = parse_flags()
        lists = [read_list(path, args) for path in args.lists]
        check([run for runs in lists for run in runs])
        variables = {}
        if args.hub_teacher:
            variables = local_hub(args.lists[0].parent / "hub", args.hub_teacher)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    for runs in lists:
        code = train(runs, args.workers, variables, stops)
        if code != 0:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How fast every phase runs here, for each way of running it, and beside other scripts.

    python tools/speed.py --out results/speed/NAME.json
    python tools/speed.py --against "other script=ITS/bin/python PATH/TO/OTHER.py"
    python tools/speed.py --against "JAX=python qdagger_dqn_atari_jax_impalacnn.py" \\
        --variants=--no-amp --variants=--amp

The other scripts take the same flags. Each run is a short training of all three phases in a process
and a directory of its own. Steps per second come from the wall-clock times in its event file, so
that start, evaluations and warm-up are left out. The numbers are medians over `repeats`; all take
turns, so that a machine that slows down slows all of them. Peak memory is that of its process on
the host, and what torch has reserved, or JAX has used, on the GPU.
`python tools/plot.py results/speed --readme` writes the table into the page that has the markers
of that NAME: docs/speed.md, or the README.md beside it.
"""

import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import tyro
from run import PROGRAM, cores, local_hub
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PHASES = {"teacher buffer": "steps/s", "offline": "updates/s", "online": "steps/s"}
VARIANTS = {
    "cpu": ("--no-amp", "--amp"),
    "cuda": ("--no-capture --no-amp", "--no-amp", "--amp", "--no-amp --compile", "--amp --compile"),
}
MEMORY = ("host", "device")  # peaks in GB

# Runs the script that is its first argument, then says how much of the GPU that took.
RUNNER = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    if "jax" in sys.modules:
        memory = sys.modules["jax"].local_devices()[0].memory_stats() or {}
        peak = memory.get("peak_bytes_in_use", 0)
    else:
        peak = sys.modules["torch"].cuda.max_memory_reserved()
    print("peak device bytes:", peak)
"""

# Of the intervals between two logged points: first calls compile, allocate and warm caches.
SKIPPED = 2


@dataclass
class Args:
    env_id: str = "BreakoutNoFrameskip-v4"
    teacher: Path | None = None  # a Nature CNN's state dict, ENV_ID.cleanrl_model; unset: bundled
    variants: tuple[str, ...] = ()  # flags of this program, one run each; unset: by the device
    against: tuple[str, ...] = ()  # "NAME=PYTHON SCRIPT FLAG ..."; ratios are to the first of them
    teacher_steps: int = 4000
    offline_steps: int = 1000
    total_timesteps: int = 4000
    learning_starts: int = 400  # of these, the steps that only fill the replay
    buffer_size: int = 20_000
    repeats: int = 3
    out: Path | None = None  # write the table and every single number here, as JSON


PASSED_ON = (
    "env_id",
    "teacher_steps",
    "offline_steps",
    "total_timesteps",
    "learning_starts",
    "buffer_size",
)


def commands(args: Args) -> dict[str, list]:
    """What is run for each row of the table: this program's variants, then the other scripts."""
    variants = args.variants
    if not variants:
        variants = VARIANTS["cuda" if torch.cuda.is_available() else "cpu"]

    result = {}
    for flags in variants:
        command = [sys.executable, "-c", RUNNER, PROGRAM, "--eval-episodes=1", *shlex.split(flags)]
        result[f"this program {flags}".strip()] = command
    for other in args.against:
        name, _, command = other.partition("=")
        python, script, *flags = shlex.split(command)
        if "/" in python:  # it will run in another directory
            python = Path(python).absolute()
        result[name] = [python, "-c", RUNNER, Path(script).resolve(), *flags]
    return result


def rate(events: EventAccumulator, tag: str) -> float:
    """Steps per second along the points of `tag`, but for the first few."""
    points = events.Scalars(tag)[SKIPPED:]
    steps = points[-1].step - points[0].step
    return steps / (points[-1].wall_time - points[0].wall_time)


def teacher_buffer_rate(events: EventAccumulator, progress: str, teacher_steps: int) -> float:
    """As its progress bar says in the end.

    For a script without one, from the teacher's score to the first update.
    """
    full_bar = rf"teacher buffer: 100%.*?{teacher_steps}/{teacher_steps} \[.*?, *([\d.]+)step/s"
    rates = re.findall(full_bar, progress)
    if rates:
        return float(rates[-1])
    begin = events.Scalars("charts/teacher/avg_episodic_return")[0].wall_time
    end = events.Scalars("charts/offline/loss")[0].wall_time
    return teacher_steps / (end - begin)


def measure(command: list, args: Args) -> dict[str, float]:
    """One short training: steps or updates per second of each phase, and peak memory in GB."""
    flags = ["--teacher-eval-episodes=1"]
    for name in PASSED_ON:
        flags.append(f"--{name.replace('_', '-')}={getattr(args, name)}")
    teacher = args.teacher or PROGRAM.parent / "teachers" / f"{args.env_id}.cleanrl_model"

    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory, "log")
        variables = os.environ | local_hub(Path(directory, "home"), teacher)
        with log.open("w") as file:
            process = subprocess.Popen(
                [*command, *flags], cwd=directory, env=variables, stdout=file, stderr=file
            )
            _, status, usage = os.wait4(process.pid, 0)
        progress = log.read_text()
        if status:
            raise SystemExit(f"{command} failed:\n{progress[-2000:]}")
        (run,) = Path(directory, "runs").iterdir()
        events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()

    device_bytes = re.findall(r"peak device bytes: (\d+)", progress)[-1]
    return {
        "teacher buffer": teacher_buffer_rate(events, progress, args.teacher_steps),
        "offline": rate(events, "charts/offline/loss"),
        "online": rate(events, "losses/td_loss"),
        "host": usage.ru_maxrss * 1024 / 1e9,
        "device": int(device_bytes) / 1e9,
    }


def medians_of(runs: list[dict]) -> dict[str, float]:
    return {column: statistics.median(run[column] for run in runs) for column in runs[0]}


def table_of(runs: dict[str, list[dict]], baseline: str = "") -> str:
    """Medians of the runs of each row, and their ratios to those of `baseline`."""
    columns = [f"{phase}, {unit}" for phase, unit in PHASES.items()]
    columns.append("ms per offline update")
    columns += [f"{kind}, GB" for kind in MEMORY]
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]

    medians = {name: medians_of(of_name) for name, of_name in runs.items()}
    other = medians.get(baseline)
    for name, median in medians.items():
        cells = []
        for phase in PHASES:
            cell = f"{median[phase]:.1f}"
            if other:
                cell += f" ({median[phase] / other[phase]:.1f}×)"
            cells.append(cell)
        cells.append(f"{1000 / median['offline']:.1f}")
        for kind in MEMORY:
            cells.append(f"{median[kind]:.2f}" if median[kind] else "–")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def machine() -> dict[str, str | None]:
    """Hardware and versions."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = re.findall(r"model name\s*: (.*)", info.read_text())
        if names:
            cpu = names[0]

    facts = {"cpu": f"{cores()} cores of {cpu}", "gpu": None}
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    facts["python"] = platform.python_version()
    for package in ("torch", "gymnasium", "ale-py"):
        facts[package] = version(package)
    return facts


def settings_of(args: Args) -> dict:
    """The flags, without what only this machine knows: of a path its name, of a command its row."""
    settings = dict(vars(args))
    for name, value in settings.items():
        if isinstance(value, Path):
            settings[name] = value.name
    settings["against"] = [other.partition("=")[0] for other in args.against]
    return settings


def main() -> None:
    args = tyro.cli(Args, description=__doc__, config=(tyro.conf.UseAppendAction,))
    rows = commands(args)
    runs: dict[str, list[dict]] = {name: [] for name in rows}
    for repeat in range(args.repeats):
        for name, command in rows.items():
            measured = measure(command, args)
            runs[name].append(measured)
            print(f"{repeat + 1}/{args.repeats} {name}: {measured}", file=sys.stderr)

    baseline = ""
    if args.against:
        baseline = args.against[0].partition("=")[0]
    table = table_of(runs, baseline)
    print(table)

    if args.out:
        content = {
            "machine": machine(),
            "settings": settings_of(args),
            "table": table,
            "runs": runs,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()

"""How fast every phase runs on this machine, for each way of running it, and beside other scripts of the same flags.

    python tools/speed.py --out results/speed/NAME.json
    python tools/speed.py --against "other script=ITS/bin/python PATH/TO/OTHER.py"
    python tools/speed.py --against "JAX=python qdagger_dqn_atari_jax_impalacnn.py" --variants=--no-amp --variants=--amp

Each run is a short training of all three phases in a process and a directory of its own. Steps per second come from the
wall-clock times in its event file, so that start, evaluations and warm-up are left out. The numbers are medians over
`repeats`; all take turns, so that a machine that slows down slows all of them. Peak memory is that of its process on
the host, and what torch has reserved, or JAX has used, on the GPU. `python tools/plot.py results/speed --readme` writes
the table into README.md, between the markers of that NAME.
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
from run import PROGRAM, local_hub
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
        peak = (sys.modules["jax"].local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    else:
        peak = sys.modules["torch"].cuda.max_memory_reserved()
    print("peak device bytes:", peak)
"""
SKIPPED = (
    2  # of the intervals between two logged points: first calls compile, allocate and warm caches
)


@dataclass
class Args:
    env_id: str = "BreakoutNoFrameskip-v4"
    teacher: Path | None = (
        None  # a Nature-CNN state dict called ENV_ID.cleanrl_model; unset: the bundled one
    )
    variants: tuple[
        str, ...
    ] = ()  # flags of this program, one run each; unset: VARIANTS of the device
    against: tuple[str, ...] = ()  # "NAME=PYTHON SCRIPT FLAG ..."; ratios are to the first of them
    teacher_steps: int = 4000
    offline_steps: int = 1000
    total_timesteps: int = 4000
    learning_starts: int = 400  # of these, the steps that only fill the replay
    buffer_size: int = 20_000
    repeats: int = 3
    out: Path | None = None  # write the table and every single number here, as JSON


def commands(args: Args) -> dict[str, list]:
    """What is run for each row of the table: first this program's variants, then the other scripts."""
    result = {}
    for flags in args.variants or VARIANTS["cuda" if torch.cuda.is_available() else "cpu"]:
        command = [sys.executable, "-c", RUNNER, PROGRAM, "--eval-episodes=1", *shlex.split(flags)]
        result[f"this program {flags}".strip()] = command
    for other in args.against:
        name, _, command = other.partition("=")
        python, script, *flags = shlex.split(command)
        python = Path(python).absolute() if "/" in python else python
        result[name] = [python, "-c", RUNNER, Path(script).resolve(), *flags]
    return result


def rate(events: EventAccumulator, tag: str) -> float:
    """Steps per second along the points of `tag`, but for the first few."""
    points = events.Scalars(tag)[SKIPPED:]
    return (points[-1].step - points[0].step) / (points[-1].wall_time - points[0].wall_time)


def teacher_buffer_rate(events: EventAccumulator, progress: str, teacher_steps: int) -> float:
    """As its progress bar says in the end; for a script without one, from the teacher's score to the first update."""
    bar = re.findall(
        rf"teacher buffer: 100%.*?{teacher_steps}/{teacher_steps} \[.*?, *([\d.]+)step/s", progress
    )
    if bar:
        return float(bar[-1])
    start = events.Scalars("charts/teacher/avg_episodic_return")[0].wall_time
    return teacher_steps / (events.Scalars("charts/offline/loss")[0].wall_time - start)


def measure(command: list, args: Args) -> dict[str, float]:
    """One short training: steps or updates per second of each phase, and peak memory in GB."""
    names = [
        "env_id",
        "teacher_steps",
        "offline_steps",
        "total_timesteps",
        "learning_starts",
        "buffer_size",
    ]
    flags = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in names] + [
        "--teacher-eval-episodes=1"
    ]
    teacher = args.teacher or PROGRAM.parent / "teachers" / f"{args.env_id}.cleanrl_model"
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "log"
        with log.open("w") as file:
            variables = os.environ | local_hub(Path(directory) / "home", teacher)
            process = subprocess.Popen(
                [*command, *flags], cwd=directory, env=variables, stdout=file, stderr=file
            )
            _, status, usage = os.wait4(process.pid, 0)
        progress = log.read_text()
        if status:
            raise SystemExit(f"{command} failed:\n{progress[-2000:]}")
        (run,) = (Path(directory) / "runs").iterdir()
        events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    return {
        "teacher buffer": teacher_buffer_rate(events, progress, args.teacher_steps),
        "offline": rate(events, "charts/offline/loss"),
        "online": rate(events, "losses/td_loss"),
        "host": usage.ru_maxrss * 1024 / 1e9,
        "device": int(re.findall(r"peak device bytes: (\d+)", progress)[-1]) / 1e9,
    }


def table_of(runs: dict[str, list[dict]], baseline: str = "") -> str:
    """Medians of the runs of each row, and their ratios to those of `baseline`."""
    columns = [f"{phase}, {unit}" for phase, unit in PHASES.items()]
    columns += ["ms per offline update", *(f"{kind}, GB" for kind in MEMORY)]
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    medians = {
        name: {column: statistics.median(run[column] for run in of_name) for column in of_name[0]}
        for name, of_name in runs.items()
    }
    other = medians.get(baseline)
    for name, median in medians.items():
        cells = [
            f"{median[p]:.1f}" + (f" ({median[p] / other[p]:.1f}×)" if other else "")
            for p in PHASES
        ]
        cells += [f"{1000 / median['offline']:.1f}"]
        cells += [f"{median[kind]:.2f}" if median[kind] else "–" for kind in MEMORY]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def machine() -> dict[str, str | None]:
    """Hardware and versions."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    facts = {
        "cpu": f"{os.cpu_count()} cores of {names[0] if names else platform.processor() or platform.machine()}"
    }
    facts["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    facts["python"] = platform.python_version()
    return facts | {package: version(package) for package in ("torch", "gymnasium", "ale-py")}


def main() -> None:
    args = tyro.cli(Args, description=__doc__, config=(tyro.conf.UseAppendAction,))
    rows = commands(args)
    runs: dict[str, list[dict]] = {name: [] for name in rows}
    for repeat in range(args.repeats):
        for name, command in rows.items():
            runs[name].append(measure(command, args))
            print(f"{repeat + 1}/{args.repeats} {name}: {runs[name][-1]}", file=sys.stderr)

    table = table_of(runs, args.against[0].partition("=")[0] if args.against else "")
    print(table)
    if args.out:
        settings = {name: getattr(value, "name", value) for name, value in vars(args).items()}
        settings["against"] = [other.partition("=")[0] for other in args.against]
        args.out.parent.mkdir(parents=True, exist_ok=True)
        content = {"machine": machine(), "settings": settings, "table": table, "runs": runs}
        args.out.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()

"""From event files to CSV, and from CSV to the README's figures (extra `plot`).

python results/plot.py export runs/RUN results/pong_cpu/NAME.csv   # the scalars of a run
python results/plot.py figure                                      # results/pong_cpu/*.csv to pong_cpu.png
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PONG = Path(__file__).parent / "pong_cpu"
RANDOM_PONG = -20.7  # mean return of random play


def export(run_dir: Path, csv: Path) -> None:
    """Write every scalar of a run: tag, step, value, and seconds since the run's first scalar."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    start = events.FirstEventTimestamp()
    rows = [
        (tag, scalar.step, round(scalar.value, 6), round(scalar.wall_time - start, 1))
        for tag in events.Tags()["scalars"]
        for scalar in events.Scalars(tag)
    ]
    csv.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows, columns=["tag", "step", "value", "seconds"]).to_csv(csv, index=False)


def curve(scalars: pd.DataFrame, tag: str) -> pd.DataFrame:
    return scalars[scalars.tag == tag].sort_values("seconds")


def figure() -> None:
    """Evaluations of the student and of DQN from scratch, against online steps and against wall-clock."""
    student, scratch = (pd.read_csv(PONG / f"{name}.csv") for name in ("student", "scratch"))
    teacher_return = curve(student, "charts/teacher/avg_episodic_return").value.iloc[0]
    offline_steps = curve(student, "charts/offline/avg_episodic_return").step.max()

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    fig, (by_step, by_time) = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
    runs = [
        ("QDagger student", student, offline_steps, {"color": "#0072B2", "marker": "o", "linestyle": "-"}),
        ("DQN from scratch", scratch, 0, {"color": "#D55E00", "marker": "s", "linestyle": "--"}),
    ]
    for label, scalars, first_step, style in runs:
        online = curve(scalars, "eval/episodic_return")
        offline = curve(scalars, "charts/offline/avg_episodic_return")
        last_offline = offline.tail(1).assign(step=first_step)
        by_step_points = pd.concat([last_offline, online])
        by_step.plot((by_step_points.step - first_step) / 1000, by_step_points.value, label=label, **style)
        by_time_points = pd.concat([offline, online])
        by_time.plot(by_time_points.seconds / 60, by_time_points.value, label=label, **style)
    for axes, label in ((by_step, "online steps (thousands)"), (by_time, "minutes on 2 cores, everything included")):
        axes.axhline(teacher_return, color="black", linewidth=1, linestyle=":", label="teacher")
        axes.axhline(RANDOM_PONG, color="grey", linewidth=1, linestyle="-.", label="random play")
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    by_step.set_ylabel("mean return of 10 games")
    by_step.set_title("Pong, one seed")
    by_time.legend(loc="center right", frameon=False)
    fig.tight_layout()
    fig.savefig(PONG / "pong_cpu.png", dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    exporting = commands.add_parser("export")
    exporting.add_argument("run_dir", type=Path)
    exporting.add_argument("csv", type=Path)
    commands.add_parser("figure")
    args = parser.parse_args()
    if args.command == "export":
        export(args.run_dir, args.csv)
    else:
        figure()


if __name__ == "__main__":
    main()

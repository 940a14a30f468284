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
    """Left: evaluations of the student and of DQN from scratch by online step. Right: the student's by wall-clock."""
    student, scratch = (pd.read_csv(PONG / f"{name}.csv") for name in ("student", "scratch"))
    teacher_return = curve(student, "charts/teacher/avg_episodic_return").value.iloc[0]
    offline = curve(student, "charts/offline/avg_episodic_return")
    offline_steps = offline.step.max()
    online = curve(student, "eval/episodic_return")
    blue = {"color": "#0072B2", "marker": "o", "linestyle": "-"}
    orange = {"color": "#D55E00", "marker": "s", "linestyle": "--"}

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    fig, (by_step, by_time) = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
    points = pd.concat([offline.tail(1), online])
    by_step.plot((points.step - offline_steps) / 1000, points.value, label="QDagger student (Impala-CNN)", **blue)
    control = curve(scratch, "eval/episodic_return")
    by_step.plot(control.step / 1000, control.value, label="DQN from scratch (Impala-CNN)", **orange)
    points = pd.concat([offline, online])
    by_time.plot(points.seconds / 60, points.value, **blue)
    offline_end = offline.seconds.max() / 60
    by_time.axvline(offline_end, color="grey", linewidth=1)
    by_time.annotate("offline ", (offline_end, -10), ha="right")
    by_time.annotate(" online", (offline_end, -10))

    titles = {by_step: "online steps (thousands)", by_time: "minutes of the student's run, everything included"}
    for axes, label in titles.items():
        axes.axhline(teacher_return, color="black", linewidth=1, linestyle=":", label="its teacher (Nature CNN)")
        axes.axhline(RANDOM_PONG, color="grey", linewidth=1, linestyle="-.", label="random play")
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    by_step.set_ylabel("mean return of 10 games of Pong")
    by_step.legend(loc="center right", frameon=False)
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

"""Makes few and small files of the runs that results/grid.py trains: scalars, weights in half precision, a summary.

    python results/collect.py OUT --stage NAME DIRECTORY ...   # NAME.csv, weights.zip
    python results/collect.py OUT --check JUNIT.xml            # check.json
    python results/collect.py OUT                              # SUMMARY.md, of all that OUT holds

NAME.csv has the columns run, tag, step, value, seconds (since the run was started; may be left empty). Of each of
TensorBoard's tags at most 500 points are kept. A finished run also has `score/mean`, `score/std` and `score/games` of
its final network, and every run `run/seconds`, the time it was at work. Runs that OUT knows and that are not given
again stay in it.
"""

import argparse
import csv
import io
import json
import re
import subprocess
import zipfile
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

import torch
from speed import machine
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

POINTS = 500  # of a tag; the episodes and losses of ten million steps would be a gigabyte
WEIGHTS = 16_000_000  # bytes of weights.zip
STAGES = ("teachers", "students", "controls")
SCORE = re.compile(r"(-?[\d.]+) ± ([\d.]+) over (\d+) games")
Row = tuple[str, str, int, float, float]  # run, tag, step, value, seconds


def rows_of(directory: Path) -> list[Row]:
    """All that is told about one run; nothing if it has not begun to log."""
    rows: list[Row] = []
    for run in directory.glob("runs/*"):
        events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
        tags = events.Tags()["scalars"]
        start = float((directory / "began").read_text())
        for tag in tags:
            scalars = events.Scalars(tag)
            every = -(-len(scalars) // POINTS)
            for scalar in scalars[::-1][::every][::-1]:  # the last one stays
                rows.append(
                    (directory.name, tag, scalar.step, round(scalar.value, 5), round(scalar.wall_time - start, 1))
                )
    if not rows:
        return []
    seconds = round(sum(map(float, (directory / "seconds").read_text().split())), 1)
    last = max(row[2] for row in rows)
    rows.append((directory.name, "run/seconds", last, seconds, seconds))
    if (directory / "score").exists():
        mean, std, games = map(float, SCORE.findall((directory / "score").read_text())[-1])
        for name, value in {"mean": mean, "std": std, "games": games}.items():
            rows.append((directory.name, f"score/{name}", last, value, seconds))
    return rows


def read(path: Path) -> dict[str, list[Row]]:
    """The rows of a stage's CSV by run."""
    rows = defaultdict(list)
    if path.exists():
        with path.open(newline="") as file:
            for run, tag, step, value, seconds in list(csv.reader(file))[1:]:
                rows[run].append((run, tag, int(step), float(value), float(seconds or "nan")))
    return rows


def finished(rows: list[Row]) -> bool:
    return any(tag == "score/mean" for _, tag, *_ in rows)


def collect(out: Path, stage: str, directories: list[Path]) -> None:
    """Write what these runs have come to into the stage's CSV, and their last networks into weights.zip."""
    rows = read(out / f"{stage}.csv")
    rows |= {directory.name: of_run for directory in directories if (of_run := rows_of(directory))}
    with (out / f"{stage}.csv.part").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "tag", "step", "value", "seconds"])
        writer.writerows(row for run in sorted(rows) for row in rows[run])
    (out / f"{stage}.csv.part").rename(out / f"{stage}.csv")

    archive, models = out / "weights.zip", {}
    if archive.exists():
        with zipfile.ZipFile(archive) as file:
            models = {name: file.read(name) for name in file.namelist()}
    for directory in directories:
        for model in directory.glob("runs/*/*.cleanrl_model"):
            state = torch.load(model, map_location="cpu", weights_only=True)
            content = io.BytesIO()
            torch.save({name: value.half() for name, value in state.items()}, content)
            models[f"{directory.name}.cleanrl_model"] = content.getvalue()
    size = 0
    with zipfile.ZipFile(out / "weights.zip.part", "w", zipfile.ZIP_DEFLATED) as file:
        for name in sorted(models, key=lambda name: ("teacher student scratch offline".find(name.split("-")[0]), name)):
            if size + len(models[name]) < WEIGHTS:
                file.writestr(name, models[name])
                size += len(models[name])
    (out / "weights.zip.part").rename(archive)


def commit() -> str:
    command = ["git", "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return result.stdout.strip() or "unknown"


def summary(out: Path) -> str:
    """What was run, for how long, with what result."""
    lines = ["# What `results/reproduce.sh` has measured", ""]
    lines += [
        "The machine that wrote this page; earlier stages may be from another one, see `log.txt`.",
        "",
        "| | |",
        "|---|---|",
    ]
    lines += [f"| {name} | {value} |" for name, value in (machine() | {"commit": commit()}).items()]
    lines += ["", "## check", ""]
    check, speed = out / "check.json", out / "speed.json"
    if check.exists():
        lines += [", ".join(f"{name} {value}" for name, value in json.loads(check.read_text()).items())]
    else:
        lines += ["not run"]
    lines += ["", "## speed", ""]
    lines += [json.loads(speed.read_text())["table"] if speed.exists() else "not run"]
    for stage in STAGES:
        lines += ["", f"## {stage}", ""]
        runs = read(out / f"{stage}.csv")
        if not runs:
            lines += ["not run"]
            continue
        lines += [
            "| run | state | steps and updates | hours at work | score | last evaluation while training |",
            "|---|---|---|---|---|---|",
        ]
        for run, rows in sorted(runs.items()):
            last = {tag: (step, value) for _, tag, step, value, _ in rows}
            score = "–"
            if finished(rows):
                score = (
                    f"{last['score/mean'][1]:.1f} ± {last['score/std'][1]:.1f} over {last['score/games'][1]:.0f} games"
                )
            evaluation = last.get("eval/episodic_return") or last.get("charts/offline/avg_episodic_return")
            evaluation = f"{evaluation[1]:.1f} at {evaluation[0]:,}" if evaluation else "–"
            state = "finished" if finished(rows) else "cut off"
            step, seconds = last["run/seconds"]
            lines += [f"| {run} | {state} | {step:,} | {seconds / 3600:.2f} | {score} | {evaluation} |"]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--stage", help="the CSV that the runs go to")
    parser.add_argument("--check", type=Path, help="what pytest's --junitxml wrote, for check.json")
    parser.add_argument("directories", nargs="*", type=Path)
    args = parser.parse_intermixed_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.stage:
        collect(args.out, args.stage, args.directories)
    elif args.check:
        suite = ElementTree.parse(args.check).getroot().find("testsuite")
        counts = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
        (args.out / "check.json").write_text(json.dumps(counts | {"seconds": float(suite.get("time"))}))
    else:
        (args.out / "SUMMARY.md").write_text(summary(args.out))


if __name__ == "__main__":
    main()

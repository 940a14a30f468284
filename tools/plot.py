"""From event files to curves, final scores, interquartile means and the README's tables (extra `plot`).

    python tools/plot.py benchmark                          # what tools/run.py has run there
    python tools/plot.py benchmark --out results/pong_cpu   # the same, with the files written there
    python tools/plot.py results/pong_cpu --readme          # again from its results.csv, the table into its README
    python tools/plot.py results/speed --readme             # the tables of tools/speed.py there

Written are results.csv (run, tag, step, value, and seconds since the run began), curves.png, scores.csv, and, where a
kind has several seeds, aggregates.csv and aggregates.png. A run is called KIND-GAME-SEED. Beside the CSV, labels.json
takes the place of LABELS; teachers.csv has returns of a teacher's games, for each GAME, and counts before the
few by which each run measured it.

Curves are evaluations, or, of a run that has none online, means of ten training games in turn, of fewer if there are
not thirty; thin lines are single seeds. Scores are those of the final network. Intervals are 95%: of the mean over
seeds (Student's t), and of interquartile means by a bootstrap stratified by game (Agarwal et al., 2021).
"""

import argparse
import json
import re
from itertools import cycle
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

README = Path(__file__).resolve().parent.parent / "README.md"
COLUMNS = ["run", "tag", "step", "value", "seconds"]
POINTS = (
    500  # of a tag in the CSV; the episodes and losses of ten million steps would be a gigabyte
)
LABELS = {
    "student": "QDagger student",
    "scratch": "DQN from scratch, same network",
    "kickstart": "no offline phase",
    "offline": "offline phase only",
    "known": "widely used implementation",
    "teacher": "Nature DQN",
}
STYLES = [  # colours that the colour-blind tell apart (Okabe and Ito); marker and line for print in grey
    ("#0072B2", "o", "-"),
    ("#D55E00", "s", "--"),
    ("#009E73", "^", "-."),
    ("#CC79A7", "D", ":"),
    ("#E69F00", "v", "--"),
    ("#000000", "x", ":"),
    ("#56B4E9", "P", "-."),
]
RANDOM = {"Breakout": 1.7, "Pong": -20.7, "BeamRider": 363.9}  # returns in Mnih et al., 2015
HUMAN = {"Breakout": 30.5, "Pong": 14.6, "BeamRider": 16926.5}
TEACHER = "charts/teacher/avg_episodic_return"
MEASURES = ("human_normalised", "teacher_normalised")


# ---- From event files to the CSV


def run_rows(directory: Path) -> list[tuple]:
    """All scalars of one run of tools/run.py, thinned, and the scores of its final network."""
    rows, start = [], json.loads((directory / "start").read_text())["time"]
    for run in directory.glob("runs/*"):
        events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            scalars = events.Scalars(tag)
            every = -(-len(scalars) // POINTS)
            for scalar in scalars[::-1][::every][::-1]:  # the last one stays
                seconds = round(scalar.wall_time - start, 1)
                rows.append((directory.name, tag, scalar.step, round(scalar.value, 5), seconds))
    score = directory / "score"
    if rows and score.exists() and score.read_text().strip():
        values = re.match(r"(\S+) ± (\S+) over (\d+) games", score.read_text()).groups()
        step, seconds = max(row[2] for row in rows), max(row[4] for row in rows)
        for name, value in zip(("mean", "std", "games"), values):
            rows.append((directory.name, f"score/{name}", step, float(value), seconds))
    return rows


def write_csv(benchmark: Path, path: Path) -> None:
    directories = sorted(start.parent for start in benchmark.glob("*-v[45]-*/start"))
    rows = [row for directory in directories for row in run_rows(directory)]
    pd.DataFrame(rows, columns=COLUMNS).to_csv(path, index=False)


def read_csv(path: Path) -> pd.DataFrame:
    """All rows, with the columns kind, game and seed."""
    rows = pd.read_csv(path, dtype={"run": str})
    if rows.empty:
        raise SystemExit(f"error: {path}: no run has logged anything yet")
    rows[["kind", "game", "seed"]] = rows.run.str.extract(
        r"(\w+)-(?:ALE-)?(\w+?)(?:NoFrameskip-v4|-v5)-(\d+)"
    )
    teachers = path.with_name("teachers.csv")
    if teachers.exists():
        rows.update(
            rows.game.map(pd.read_csv(teachers).mean()).rename("value")[rows.tag == TEACHER]
        )
    return rows


# ---- Curves


def training_games(games: pd.DataFrame) -> pd.DataFrame:
    """Of a run that is not evaluated online: means of training games in turn, each where the last of them ended."""
    together = int(np.clip(len(games) // 3, 1, 10))
    return games.assign(value=games.value.rolling(together).mean()).iloc[together - 1 :: together]


def evaluations(rows: pd.DataFrame) -> pd.DataFrame:
    """The points of the curves: step is in online steps, offline evaluations are at 0 and before."""
    points = []
    for _, run in rows.groupby("run"):
        offline = run[run.tag == "charts/offline/avg_episodic_return"]
        online = run[run.tag == "eval/episodic_return"]
        if online.empty:
            online = training_games(run[run.tag == "charts/episodic_return"].sort_values("step"))
        updates = run[run.tag.str.startswith("charts/offline/")].step.max() if len(offline) else 0
        of_run = pd.concat([offline, online]).sort_values("seconds")
        points.append(of_run.assign(step=of_run.step - updates, minutes=of_run.seconds / 60))
    return pd.concat(points)


def teacher_return(rows: pd.DataFrame, game: str) -> float:
    return rows[(rows.game == game) & (rows.tag == TEACHER)].value.mean()


def draw_curve(axes: plt.Axes, points: pd.DataFrame, x: str, label: str, style: tuple) -> None:
    """The mean over seeds of one kind, its interval, and single seeds."""
    color, marker, line = style
    # The n-th evaluations of all seeds belong together; their time is the mean over seeds.
    table = points.assign(nth=points.groupby("run").cumcount()).pivot(
        index="nth", columns="seed", values=["value", x]
    )
    values = table["value"]
    mean, half = (
        values.mean(axis=1),
        stats.t.ppf(0.975, values.count(axis=1) - 1) * values.sem(axis=1),
    )
    position = table[x].mean(axis=1)
    if x == "step" and (points.step == 0).all():  # offline only: its level, for comparison
        axes.axhline(mean.iloc[-1], label=label, color=color, linestyle=line)
        return
    axes.plot(position, mean, label=label, color=color, marker=marker, linestyle=line, markersize=5)
    axes.plot(position, values, color=color, linewidth=0.6, alpha=0.6)
    if values.shape[1] > 2:  # of two seeds it says nothing
        axes.fill_between(position, mean - half, mean + half, color=color, alpha=0.2, linewidth=0)


def curves(rows: pd.DataFrame, labels: dict[str, str], path: Path) -> None:
    """A row of two panels per game: returns by online step and by wall-clock."""
    points, games = evaluations(rows), sorted(rows.game.unique())
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = plt.subplots(
        len(games), 2, figsize=(10, 3.4 * len(games)), squeeze=False, sharey="row"
    )
    for game, (by_step, by_time) in zip(games, panels):
        of_game = points[points.game == game]
        for (kind, label), style in zip(labels.items(), cycle(STYLES)):
            of_kind = of_game[of_game.kind == kind]
            if not of_kind.empty:
                draw_curve(by_step, of_kind[of_kind.step >= 0], "step", label, style)
            if of_kind.minutes.notna().any():
                draw_curve(by_time, of_kind, "minutes", label, style)
        teacher, chance = teacher_return(rows, game), RANDOM.get(game, np.nan)
        for axes in (by_step, by_time):
            axes.axhline(
                teacher, color="black", linewidth=1, linestyle=(0, (1, 1)), label="the teacher"
            )
            axes.axhline(
                chance, color="grey", linewidth=1, linestyle=(0, (5, 2, 1, 2)), label="random play"
            )
            axes.grid(alpha=0.3)
        shown = pd.Series([*of_game.value, teacher, chance]).dropna()
        margin = 0.05 * (shown.max() - shown.min())
        if margin > 0:  # an interval of few seeds can be far wider
            by_step.set_ylim(shown.min() - margin, shown.max() + margin)
        by_step.set_ylabel(f"return, {game}")
        by_step.xaxis.set_major_formatter(
            lambda x, _: f"{x / 1e6:g}M" if abs(x) >= 1e6 else f"{x / 1e3:g}k"
        )
    panels[-1][0].set_xlabel("online steps")
    panels[-1][1].set_xlabel("minutes since the program began")
    legend = {
        name: handle for row in panels for handle, name in zip(*row[0].get_legend_handles_labels())
    }
    figure.legend(
        legend.values(), legend.keys(), frameon=False, loc="lower center", ncols=3, fontsize=9
    )
    figure.tight_layout(rect=(0, 0.22 * -(-len(legend) // 3) / figure.get_figheight(), 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ---- Scores


def scores(rows: pd.DataFrame) -> pd.DataFrame:
    """The final score of every finished run, raw and normalised by human and by the teacher, both above random."""
    table = rows[rows.tag == "score/mean"][["kind", "game", "seed", "value"]].rename(
        columns={"value": "score"}
    )
    chance, human = table.game.map(RANDOM).astype(float), table.game.map(HUMAN).astype(float)
    teacher = table.game.map(lambda game: teacher_return(rows, game)).astype(float)
    table["human_normalised"] = (table.score - chance) / (human - chance)
    table["teacher_normalised"] = ((table.score - chance) / (teacher - chance)).where(
        teacher > chance
    )
    return table.sort_values(["game", "kind", "seed"]).reset_index(drop=True)


def interquartile_mean(*games: np.ndarray, axis: int = -1) -> np.ndarray:
    """Of the scores of all games together."""
    return stats.trim_mean(np.concatenate(games, axis=axis), 0.25, axis=axis)


def aggregates(table: pd.DataFrame) -> pd.DataFrame:
    """Interquartile mean over games and seeds of each kind that has several seeds, and its bootstrap interval.

    A resample takes as many seeds as there are of each game, with replacement.
    """
    result = []
    for kind, of_kind in table.groupby("kind"):
        for measure in MEASURES:
            known = of_kind.dropna(subset=measure)
            games = [of_game[measure].to_numpy() for _, of_game in known.groupby("game")]
            if not games or min(map(len, games)) < 2:
                continue
            settings = {"n_resamples": 5000, "method": "percentile", "vectorized": True, "rng": 0}
            interval = stats.bootstrap(games, interquartile_mean, **settings).confidence_interval
            result.append(
                (kind, measure, len(games), len(known), interquartile_mean(*games), *interval)
            )
    return pd.DataFrame(result, columns=["kind", "measure", "games", "runs", "iqm", "low", "high"])


def aggregate_figure(table: pd.DataFrame, labels: dict[str, str], path: Path) -> None:
    """Interquartile means and their intervals, one panel per normalisation."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 2.6), sharey=True)
    styles = {kind: style for kind, style in zip(labels, cycle(STYLES)) if kind in set(table.kind)}
    for axes, measure in zip(panels, MEASURES):
        of_measure = table[table.measure == measure].set_index("kind")
        for y, (kind, (color, marker, _)) in enumerate(styles.items()):
            if kind in of_measure.index:
                row = of_measure.loc[kind]
                axes.plot([row.low, row.high], [-y, -y], color=color, linewidth=4, alpha=0.4)
                axes.plot(row.iqm, -y, marker, color=color)
        axes.set_yticks([-y for y in range(len(styles))], [labels[kind] for kind in styles])
        axes.set_xlabel(f"interquartile mean, {measure.replace('_', ' ')}")
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ---- Tables


def cell(runs: pd.DataFrame) -> str:
    """The scores of all seeds of one kind in one game: mean, 95% interval of three or more, share of the teacher's."""
    if runs.empty:
        return "–"
    interval = (
        f" ± {stats.t.ppf(0.975, len(runs) - 1) * runs.score.sem():.1f}" if len(runs) > 2 else ""
    )
    share = runs.teacher_normalised.mean()
    return f"{runs.score.mean():.1f}{interval}" + ("" if np.isnan(share) else f", {share:.0%}")


def markdown(rows: pd.DataFrame, labels: dict[str, str]) -> str:
    """The README's table: a row for each kind, a column for each game."""
    table = scores(rows)
    games, head = (
        sorted(table.game.unique()),
        "mean score, 95% interval, share of the teacher's above random play",
    )
    teachers = [f"{teacher_return(rows, game):.1f}".replace("nan", "–") for game in games]
    lines = [[head, *games, "seeds"], ["---"] * (len(games) + 2), ["the teacher", *teachers, "–"]]
    for kind, label in labels.items():
        of_kind = table[table.kind == kind]
        if len(of_kind):
            seeds = " or ".join(map(str, sorted(set(of_kind.groupby("game").size()))))
            lines.append([label, *(cell(of_kind[of_kind.game == game]) for game in games), seeds])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def into_readme(name: str, table: str, directory: Path) -> None:
    """Replace what stands between the markers of `name`, in README.md or in the directory's own."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    for readme in (README, directory / "README.md"):
        before, found, rest = (readme.read_text() if readme.exists() else "").partition(begin)
        if found:
            readme.write_text(f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}")
            return
    raise SystemExit(
        f"error: --readme: neither {README} nor {directory}/README.md has a marker {begin}"
    )


def labels_of(out: Path, rows: pd.DataFrame) -> dict[str, str]:
    """A label for every kind, in the order of the tables."""
    own = out / "labels.json"
    labels = json.loads(own.read_text()) if own.exists() else LABELS
    return labels | {kind: kind for kind in rows.kind.unique() if kind not in labels}


def json_tables(directory: Path) -> dict[str, str]:
    """Those of tools/speed.py, by the names of their files."""
    contents = {
        path.stem: json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))
    }
    return {name: content["table"] for name, content in contents.items() if "table" in content}


def tables_of(directory: Path, out: Path) -> dict[str, str]:
    """Write the figures of a directory's runs; every table that it holds, by its marker's name."""
    tables = json_tables(directory)
    if any(directory.glob("*/start")):
        write_csv(directory, out / "results.csv")
    if not (out / "results.csv").exists():
        return tables
    rows = read_csv(out / "results.csv")
    labels = labels_of(out, rows)
    curves(rows, labels, out / "curves.png")
    table = scores(rows)
    table.to_csv(out / "scores.csv", index=False, float_format="%.4f")
    summary = aggregates(table)
    if len(summary):
        summary.to_csv(out / "aggregates.csv", index=False, float_format="%.4f")
        aggregate_figure(summary, labels, out / "aggregates.png")
    return tables | {out.resolve().name: markdown(rows, labels)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "directory", type=Path, help="of tools/run.py's runs, or with a results.csv"
    )
    parser.add_argument("--out", type=Path, help="for what is written; unset: the same")
    parser.add_argument(
        "--readme", action="store_true", help="write the tables into README.md, or the directory's"
    )
    args = parser.parse_args()
    out = args.out or args.directory
    out.mkdir(parents=True, exist_ok=True)
    tables = tables_of(args.directory, out)
    if not tables:
        raise SystemExit(
            f"error: {args.directory}: neither runs of tools/run.py nor a results.csv in it"
        )
    for name, table in tables.items():
        print(f"{name}\n{table}\n")
        if args.readme:
            into_readme(name, table, out)


if __name__ == "__main__":
    main()

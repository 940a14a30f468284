"""From the CSV files of results/collect.py to figures, numbers and the README's tables (extra `plot`).

    python results/plot.py results/pong_cpu            # curves.png, scores.csv, aggregates.csv, aggregates.png there
    python results/plot.py results/pong_cpu --readme   # and the table between that directory's markers in README.md
    python results/plot.py results/speed --readme      # the tables of results/speed.py and results/tricks.py there

Every CSV of the directory with the columns run, tag, step, value, seconds is read; a run is called KIND-GAME-SEED.
Curves are evaluations of `eval_episodes` games, or, of a run that has none online, means of ten training games in turn,
of fewer if there are not thirty; thin lines are single seeds. Scores are those of the final network. Intervals are 95%:
of the mean over seeds in curves (Student's t), and of interquartile means by a bootstrap stratified by game (Agarwal et
al., 2021).
"""

import argparse
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy import stats

README = Path(__file__).resolve().parent.parent / "README.md"
KINDS = {  # colours that the colour-blind tell apart (Okabe and Ito); line and marker for print in grey
    "student": ("QDagger student", "#0072B2", "o", "-"),
    "scratch": ("DQN from scratch, same network", "#D55E00", "s", "--"),
    "kickstart": ("no offline phase", "#009E73", "^", "-."),
    "offline": ("offline phase only", "#CC79A7", "D", ":"),
    "teacher": ("Nature DQN", "#000000", "x", ":"),
    "known": ("widely used implementation", "#E69F00", "v", "--"),
    # results/ablation.sh
    "coef1_n1": ("distill_coef 1, temperature 1, n_step 1", "#999999", "x", ":"),
    "coef1_n3": ("distill_coef 1, temperature 1, n_step 3", "#999999", "+", "--"),
    "coef32_n1": ("distill_coef 32, temperature 1, n_step 1", "#E69F00", "v", ":"),
    "coef32_n3": ("distill_coef 32, temperature 1, n_step 3", "#D55E00", "^", "--"),
    "coef3sharp_n1": ("distill_coef 3, temperature 0.1, n_step 1", "#56B4E9", "s", ":"),
    "coef3sharp_n3": ("distill_coef 3, temperature 0.1, n_step 3", "#0072B2", "o", "-"),
    "coef3sharp_n3_float32": ("the same in float32", "#000000", "D", "-."),
}
RANDOM_AND_HUMAN = {"Breakout": (1.7, 30.5), "Pong": (-20.7, 14.6), "BeamRider": (363.9, 16926.5)}  # Mnih et al., 2015
PUBLISHED = {  # after ten million steps: the widely used file in torch and JAX, and plain DQN of the same authors
    "Breakout": {"v": 295.55, "^": 335.08, "P": 366.93},
    "Pong": {"v": 19.72, "^": 18.75, "P": 20.25},
    "BeamRider": {"v": 9284.99, "^": 8024.75, "P": 6673.24},
}
GAMES, POINTS = 10, 3  # training games to a point, fewer if that leaves fewer points
PUBLISHED_NAMES = {"v": "known file, torch", "^": "known file, JAX", "P": "plain DQN, torch"}


def read(directory: Path) -> pd.DataFrame:
    """All rows, with the columns kind, game and seed."""
    tables = [pd.read_csv(path) for path in sorted(directory.glob("*.csv"))]
    tables = [table for table in tables if list(table.columns) == ["run", "tag", "step", "value", "seconds"]]
    if not tables:
        raise SystemExit(f"error: {directory}: no CSV of results/collect.py in it")
    rows = pd.concat(tables)
    rows[["kind", "game", "seed"]] = rows.run.str.extract(r"(\w+)-(\w+?)NoFrameskip-v4-(\d+)")
    return rows.dropna(subset="kind")


def training_games(rows: pd.DataFrame) -> pd.DataFrame:
    """Of runs that were not evaluated online: means of up to ten training games, where the last of them ended."""
    evaluated = rows[rows.tag == "eval/episodic_return"].run.unique()
    games = rows[(rows.tag == "charts/episodic_return") & ~rows.run.isin(evaluated)].sort_values(["run", "step"])
    of_run = games.groupby("run")
    games = games.assign(together=(of_run.run.transform("size") // POINTS).clip(1, GAMES))
    groups = games.groupby(["run", (of_run.cumcount() // games.together).rename("nth")])
    means = groups.agg({"value": "mean", **dict.fromkeys(("tag", "step", "seconds", "kind", "game", "seed"), "last")})
    return means[groups.size() == groups.together.first()].reset_index("run")


def evaluations(rows: pd.DataFrame) -> pd.DataFrame:
    """Columns kind, game, seed, step (online steps; offline evaluations at 0 and before), value, minutes."""
    offline = rows[rows.tag == "charts/offline/avg_episodic_return"]
    updates = rows[rows.tag.str.startswith("charts/offline/")].groupby("run").step.max()
    online = rows[rows.tag == "eval/episodic_return"]
    points = pd.concat([offline, online, training_games(rows)])
    points = points.assign(
        step=points.step - points.run.map(updates).fillna(0),
        minutes=points.seconds / 60,
        offline=points.tag.str.contains("offline"),
    )
    return points.sort_values(["run", "seconds"])


def teacher_return(rows: pd.DataFrame, game: str) -> float:
    values = rows[(rows.game == game) & (rows.tag == "charts/teacher/avg_episodic_return")].value
    return values.mean() if len(values) else np.nan


def mean_and_interval(values: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    """Over the columns: mean, and half the width of its 95% interval; nan for a single seed."""
    count = values.notna().sum(axis=1)
    half = stats.t.ppf(0.975, (count - 1).clip(lower=1)) * values.std(axis=1) / np.sqrt(count)
    return values.mean(axis=1), half.where(count > 1)


def curves(rows: pd.DataFrame, path: Path) -> None:
    """A row of two panels per game: returns by online step and by wall-clock."""
    points, games = evaluations(rows), sorted(rows.game.unique())
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = plt.subplots(len(games), 2, figsize=(10, 3.4 * len(games)), squeeze=False, sharey="row")
    for game, (by_step, by_time) in zip(games, panels):
        of_game = points[points.game == game]
        for kind, (label, color, marker, line) in KINDS.items():
            of_kind = of_game[of_game.kind == kind]
            style = {"color": color, "marker": marker, "linestyle": line, "markersize": 5}
            for axes, x, chosen in (
                (by_step, "step", of_kind[of_kind.step >= 0]),
                (by_time, "minutes", of_kind),
            ):
                if chosen.empty:
                    continue
                # The n-th evaluation of each seed belongs together; its time is the mean over seeds.
                chosen = chosen.assign(nth=chosen.groupby("run").cumcount())
                table = chosen.pivot(index="nth", columns="seed", values=["value", x])
                mean, half = mean_and_interval(table["value"])
                position = table[x].mean(axis=1)
                if x == "step" and (chosen.step == 0).all():  # offline only: its level, for comparison
                    axes.axhline(mean.iloc[-1], label=label, color=color, linestyle=line)
                    continue
                axes.plot(position, mean, label=label, **style)
                for seed in table["value"]:
                    axes.plot(position, table["value"][seed], color=color, linewidth=0.6, alpha=0.6)
                if len(table["value"].columns) > 2:  # of two seeds it says nothing
                    axes.fill_between(position, mean - half, mean + half, color=color, alpha=0.2, linewidth=0)
        teacher, (chance, _) = teacher_return(rows, game), RANDOM_AND_HUMAN.get(game, (np.nan, np.nan))
        for axes in (by_step, by_time):
            if not np.isnan(teacher):
                axes.axhline(teacher, color="black", linewidth=1, linestyle=(0, (1, 1)), label="the teacher")
            axes.axhline(chance, color="grey", linewidth=1, linestyle=(0, (5, 2, 1, 2)), label="random play")
            axes.grid(alpha=0.3)
        if of_game.step.max() >= 5e6:
            for marker, value in PUBLISHED.get(game, {}).items():
                by_step.plot(1e7, value, marker, color="grey", label=PUBLISHED_NAMES[marker], linestyle="none")
        shown = [value for value in (*of_game.value, teacher, chance) if not np.isnan(value)]
        margin = 0.05 * (max(shown) - min(shown))
        by_step.set_ylim(min(shown) - margin, max(shown) + margin)  # an interval of few seeds can be far wider
        by_step.set_ylabel(f"return, {game}")
        by_step.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:g}M" if abs(x) >= 1e6 else f"{x / 1e3:g}k")
    panels[-1][0].set_xlabel("online steps")
    panels[-1][1].set_xlabel("minutes, everything included")
    handles = panels[0][0].get_legend_handles_labels()
    rows_of_legend = -(-len(handles[0]) // 3)
    figure.legend(*handles, frameon=False, loc="lower center", ncols=3, fontsize=9)
    figure.tight_layout(rect=(0, 0.22 * rows_of_legend / figure.get_figheight(), 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def scores(rows: pd.DataFrame) -> pd.DataFrame:
    """The final score of every finished run, raw and normalised by human and by the teacher, both above random."""
    table = rows[rows.tag == "score/mean"][["kind", "game", "seed", "value"]].rename(columns={"value": "score"})
    limits = table.game.map(RANDOM_AND_HUMAN)
    chance = limits.str[0].astype(float)
    table["human_normalised"] = (table.score - chance) / (limits.str[1].astype(float) - chance)
    teacher = table.game.map({game: teacher_return(rows, game) for game in table.game.unique()})
    table["teacher_normalised"] = ((table.score - chance) / (teacher - chance)).where(teacher > chance)
    return table.sort_values(["game", "kind", "seed"]).reset_index(drop=True)


def interquartile_mean(values: np.ndarray) -> float:
    return float(stats.trim_mean(values, 0.25))


def aggregates(table: pd.DataFrame, draws: int = 5000) -> pd.DataFrame:
    """Interquartile mean over games and seeds of each kind, with the bootstrap's 2.5th and 97.5th percentiles.

    A draw takes as many seeds as there are of each game, with replacement.
    """
    generator, result = np.random.default_rng(0), []
    for kind, of_kind in table.groupby("kind"):
        for measure in ("human_normalised", "teacher_normalised"):
            games = [of_game[measure].dropna().to_numpy() for _, of_game in of_kind.groupby("game")]
            games = [values for values in games if len(values)]
            if not games:
                continue
            drawn = [
                interquartile_mean(np.concatenate([generator.choice(values, len(values)) for values in games]))
                for _ in range(draws)
            ]
            low, high = np.percentile(drawn, [2.5, 97.5])
            runs = sum(map(len, games))
            result.append((kind, measure, len(games), runs, interquartile_mean(np.concatenate(games)), low, high))
    return pd.DataFrame(result, columns=["kind", "measure", "games", "runs", "iqm", "low", "high"])


def aggregate_figure(table: pd.DataFrame, path: Path) -> None:
    """Interquartile means and their intervals, one panel per normalisation."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 2.6), sharey=True)
    kinds = [kind for kind in KINDS if kind in set(table.kind)]
    for axes, measure in zip(panels, ("human_normalised", "teacher_normalised")):
        for row in table[table.measure == measure].itertuples():
            _, color, marker, _ = KINDS[row.kind]
            y = -kinds.index(row.kind)
            axes.plot([row.low, row.high], [y, y], color=color, linewidth=4, alpha=0.4)
            axes.plot(row.iqm, y, marker, color=color)
        axes.set_yticks([-i for i in range(len(kinds))], [KINDS[kind][0] for kind in kinds])
        axes.set_xlabel(f"interquartile mean, {measure.replace('_', ' ')}")
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def markdown(table: pd.DataFrame, rows: pd.DataFrame) -> str:
    """The README's table: a row for each game and kind."""
    lines = [
        "| game | | score, mean over seeds | of the teacher's, above random play | seeds |",
        "|---|---|---|---|---|",
    ]
    for game in sorted(table.game.unique()):
        teacher = teacher_return(rows, game)
        if not np.isnan(teacher):
            lines.append(f"| {game} | the teacher | {teacher:.1f} | 100% | – |")
        for kind in KINDS:
            runs = table[(table.game == game) & (table.kind == kind)]
            if runs.empty:
                continue
            spread = f" ± {runs.score.std():.1f}" if len(runs) > 1 else ""
            share = runs.teacher_normalised.mean()
            share = "–" if np.isnan(share) else f"{share:.0%}"
            lines.append(f"| {game} | {KINDS[kind][0]} | {runs.score.mean():.1f}{spread} | {share} | {len(runs)} |")
    return "\n".join(lines)


def speed_tables(directory: Path) -> dict[str, str]:
    """The tables in the JSON files of results/speed.py and results/tricks.py, by the names of these."""
    contents = {path.stem: json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))}
    return {name: content["table"].strip() for name, content in contents.items() if "table" in content}


def into_readme(name: str, table: str) -> None:
    """Replace what stands between the markers of `name`."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    text = README.read_text()
    if begin not in text:
        raise SystemExit(f"error: --readme: README.md has no marker {begin}")
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    README.write_text(pattern.sub(lambda _: f"{begin}\n{table}\n{end}", text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--readme", action="store_true", help="write the table into README.md")
    args = parser.parse_args()
    tables = speed_tables(args.directory)
    for name, text in tables.items():
        print(f"{name}\n{text}\n")
        if args.readme:
            into_readme(name, text)
    if tables and not any(args.directory.glob("*.csv")):
        return
    rows = read(args.directory)
    curves(rows, args.directory / "curves.png")
    table = scores(rows)
    if table.empty:
        print("no run is finished: curves only")
        return
    table.to_csv(args.directory / "scores.csv", index=False, float_format="%.4f")
    summary = aggregates(table)
    summary.to_csv(args.directory / "aggregates.csv", index=False, float_format="%.4f")
    aggregate_figure(summary, args.directory / "aggregates.png")
    print(markdown(table, rows))
    if args.readme:
        into_readme(args.directory.resolve().name, markdown(table, rows))


if __name__ == "__main__":
    main()

"""From event files to curves, final scores, interquartile means and the README's tables.

    python tools/plot.py benchmark                          # what tools/run.py has run there
    python tools/plot.py benchmark --out results/pong_cpu   # the same, with the files written there
    python tools/plot.py results/pong_cpu --readme          # again from its results.csv, the table
                                                            # into its README
    python tools/plot.py results/speed --readme             # the tables of tools/speed.py there
    # front.png, a panel per game by online step, and a table of these kinds alone, called front
    python tools/plot.py results/atari_cpu --front student scratch --readme

Tables go between their markers, wherever these are: in README.md, a page of docs, or the README.md
of the directory.

It needs `pip install -e ".[plot]"`. Written are results.csv (run, tag, step, value, and seconds
since the run began), curves.png, scores.csv, and, where a kind has several seeds, aggregates.csv
and aggregates.png. A run is called KIND-ENV_ID-SEED. A game goes by its short name, Pong, or, where
a directory has several environments of it, by theirs: PongNoFrameskip-v4 and ALE/Pong-v5. Beside
the CSV, labels.json takes the place of LABELS; teachers.csv has returns of a teacher's games, a
column for each game, and counts before the few by which each run measured it.

Curves are evaluations, or, of a run that has none online, means of ten training games in turn, of
fewer if there are not thirty; thin lines are single seeds. Scores are those of the final network.
Intervals are 95%: of the mean over seeds (Student's t), and of interquartile means by a bootstrap
stratified by game (Agarwal et al., 2021). Exit code: 2, with a line that says why, if there is
nothing to draw.
"""

import argparse
import json
import re
import sys
from itertools import cycle
from pathlib import Path
from typing import NamedTuple, NoReturn

try:
    import matplotlib.pyplot as plt
    import numpy as np
    import pandas as pd
    from scipy import stats
except ModuleNotFoundError as missing:
    print(f'error: there is no {missing.name} here: pip install -e ".[plot]"', file=sys.stderr)
    sys.exit(2)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

README = Path(__file__).resolve().parent.parent / "README.md"

# What a run is called, KIND-ENV_ID-SEED. A kind may have hyphens of its own: no-latch.
NAME = r"^(.+?)-((?:ALE-)?(\w+?)(?:NoFrameskip-v4|-v5))-(\d+)$"

# Of a tag in the CSV; the episodes and losses of ten million steps would be a gigabyte.
POINTS = 500

LABELS = {
    "student": "QDagger student",
    "scratch": "DQN from scratch, same network",
    "kickstart": "no offline phase",
    "offline": "offline phase only",
    "known": "widely used implementation",
    "teacher": "Nature DQN",
}

# Colours that the colour-blind tell apart (Okabe and Ito); marker and line for print in grey.
STYLES = [
    ("#0072B2", "o", "-"),
    ("#D55E00", "s", "--"),
    ("#009E73", "^", "-."),
    ("#CC79A7", "D", ":"),
    ("#E69F00", "v", "--"),
    ("#000000", "x", ":"),
    ("#56B4E9", "P", "-."),
]
TEACHER_LINE = {"color": "black", "linewidth": 1, "linestyle": (0, (1, 1))}
CHANCE_LINE = {"color": "grey", "linewidth": 1, "linestyle": (0, (5, 2, 1, 2))}

TEACHER = "charts/teacher/avg_episodic_return"
OFFLINE_RETURN = "charts/offline/avg_episodic_return"
ONLINE_RETURN = "eval/episodic_return"
TRAINING_RETURN = "charts/episodic_return"

MEASURES = ("human_normalised", "teacher_normalised")


class Reference(NamedTuple):
    """Mean returns in a game of what others are measured by."""

    random: float  # of random play
    human: float  # of a professional tester of games


# Both columns, of all 57 games that most papers report, are from one table, that of DQN Zoo:
# dqn_zoo/atari_data.py at 359945d, github.com/google-deepmind/dqn_zoo. Its games begin with 1 to 30
# no-ops and end after 30 minutes. Scores for random play are those that QDagger's authors use as
# well, but for VideoPinball, where they have 0: reincarnating_rl/atari_scores.py,
# github.com/google-research/reincarnating_rl. Other papers measured another human otherwise: in
# Mnih et al., 2015, with 49 games, Pong 9.3 and BeamRider 5,775. Shares of the human's score can
# only be compared with those that were made with this table.
REFERENCES = {
    "Alien": Reference(227.8, 7127.7),
    "Amidar": Reference(5.8, 1719.5),
    "Assault": Reference(222.4, 742.0),
    "Asterix": Reference(210.0, 8503.3),
    "Asteroids": Reference(719.1, 47388.7),
    "Atlantis": Reference(12850.0, 29028.1),
    "BankHeist": Reference(14.2, 753.1),
    "BattleZone": Reference(2360.0, 37187.5),
    "BeamRider": Reference(363.9, 16926.5),
    "Berzerk": Reference(123.7, 2630.4),
    "Bowling": Reference(23.1, 160.7),
    "Boxing": Reference(0.1, 12.1),
    "Breakout": Reference(1.7, 30.5),
    "Centipede": Reference(2090.9, 12017.0),
    "ChopperCommand": Reference(811.0, 7387.8),
    "CrazyClimber": Reference(10780.5, 35829.4),
    "Defender": Reference(2874.5, 18688.9),
    "DemonAttack": Reference(152.1, 1971.0),
    "DoubleDunk": Reference(-18.6, -16.4),
    "Enduro": Reference(0.0, 860.5),
    "FishingDerby": Reference(-91.7, -38.7),
    "Freeway": Reference(0.0, 29.6),
    "Frostbite": Reference(65.2, 4334.7),
    "Gopher": Reference(257.6, 2412.5),
    "Gravitar": Reference(173.0, 3351.4),
    "Hero": Reference(1027.0, 30826.4),
    "IceHockey": Reference(-11.2, 0.9),
    "Jamesbond": Reference(29.0, 302.8),
    "Kangaroo": Reference(52.0, 3035.0),
    "Krull": Reference(1598.0, 2665.5),
    "KungFuMaster": Reference(258.5, 22736.3),
    "MontezumaRevenge": Reference(0.0, 4753.3),
    "MsPacman": Reference(307.3, 6951.6),
    "NameThisGame": Reference(2292.3, 8049.0),
    "Phoenix": Reference(761.4, 7242.6),
    "Pitfall": Reference(-229.4, 6463.7),
    "Pong": Reference(-20.7, 14.6),
    "PrivateEye": Reference(24.9, 69571.3),
    "Qbert": Reference(163.9, 13455.0),
    "Riverraid": Reference(1338.5, 17118.0),
    "RoadRunner": Reference(11.5, 7845.0),
    "Robotank": Reference(2.2, 11.9),
    "Seaquest": Reference(68.4, 42054.7),
    "Skiing": Reference(-17098.1, -4336.9),
    "Solaris": Reference(1236.3, 12326.7),
    "SpaceInvaders": Reference(148.0, 1668.7),
    "StarGunner": Reference(664.0, 10250.0),
    "Surround": Reference(-10.0, 6.5),
    "Tennis": Reference(-23.8, -8.3),
    "TimePilot": Reference(3568.0, 5229.2),
    "Tutankham": Reference(11.4, 167.6),
    "UpNDown": Reference(533.4, 11693.2),
    "Venture": Reference(0.0, 1187.5),
    "VideoPinball": Reference(16256.9, 17667.9),
    "WizardOfWor": Reference(563.5, 4756.5),
    "YarsRevenge": Reference(3092.9, 54576.9),
    "Zaxxon": Reference(32.5, 9173.3),
}
UNKNOWN = Reference(np.nan, np.nan)  # of a game outside that table


def fail(message: str) -> NoReturn:
    """For what the user can put right."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        fail(f"{path}: not JSON ({error}); correct or delete it")
    if not isinstance(content, dict):
        fail(f"{path}: not a JSON object; correct or delete it")
    return content


def reference(game: str) -> Reference:
    """Of a game, which may go by its environment."""
    name = game.removeprefix("ALE/").removesuffix("NoFrameskip-v4").removesuffix("-v5")
    return REFERENCES.get(name, UNKNOWN)


# ---- From event files to the CSV


class Row(NamedTuple):
    run: str
    tag: str
    step: int
    value: float
    seconds: float  # since the run began


def run_rows(directory: Path) -> list[Row]:
    """All scalars of one run of tools/run.py, thinned, and the scores of its final network."""
    name = directory.name
    began = time_of_start(directory)
    rows = []
    for run in sorted({file.parent for file in directory.glob("runs/**/events.*")}):
        events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            for scalar in thinned(events.Scalars(tag)):
                value = round(scalar.value, 5)
                seconds = round(scalar.wall_time - began, 1)
                rows.append(Row(name, tag, scalar.step, value, seconds))

    last_step = max([row.step for row in rows], default=0)
    last_second = max([row.seconds for row in rows], default=0)
    if rows:
        for measure, value in score_of(directory).items():
            rows.append(Row(name, f"score/{measure}", last_step, value, last_second))
    return rows


def time_of_start(directory: Path) -> float:
    """As tools/run.py has noted it. A power cut may have emptied the note, but it has a date."""
    note = directory / "start"
    try:
        return float(json.loads(note.read_text(errors="replace"))["time"])
    except (ValueError, KeyError, TypeError):
        return note.stat().st_mtime


def score_of(directory: Path) -> dict[str, float]:
    """What the final network has scored; nothing if it has not played, or if there is none."""
    score = directory / "score"
    if not score.exists():
        return {}
    pattern = r"(-?[\d.]+) ± ([\d.]+) over (\d+) games"
    found = re.match(pattern, score.read_text(errors="replace"))
    if found is None:  # the run saves no model, or a power cut has emptied the file
        return {}
    mean, std, games = found.groups()
    return {"mean": float(mean), "std": float(std), "games": float(games)}


def thinned(points: list) -> list:
    """At most POINTS of them, evenly spaced; the last one stays."""
    every = -(-len(points) // POINTS)
    backwards = points[::-1][::every]
    return backwards[::-1]


def write_csv(benchmark: Path, path: Path) -> None:
    directories = sorted(start.parent for start in benchmark.glob("*/start"))
    rows = []
    for directory in directories:
        if re.match(NAME, directory.name):
            rows += run_rows(directory)
        elif not directory.name.startswith("buffer-"):
            advice = "left out, it is not called KIND-ENV_ID-SEED"
            print(f"{directory}: {advice}", file=sys.stderr)
    pd.DataFrame(rows, columns=Row._fields).to_csv(path, index=False)


def read_csv(path: Path) -> pd.DataFrame:
    """All rows, with the columns kind, env_id, game and seed."""
    rows = read_table(path)
    if list(rows.columns) != list(Row._fields):
        fail(f"{path}: its columns are not {', '.join(Row._fields)}; delete it, or take another")
    if rows.empty:
        fail(f"{path}: no run has logged anything yet; wait for the first evaluation")
    rows["run"] = rows.run.astype(str)
    rows[["kind", "env_id", "game", "seed"]] = rows.run.str.extract(NAME)
    unnamed = rows.run[rows.kind.isna()]
    if len(unnamed) > 0:
        fail(f"{path}: the run {unnamed.iloc[0]} is not called KIND-ENV_ID-SEED; rename it there")

    # Several environments of a game are not one game.
    environments = rows.groupby("game").env_id.transform("nunique")
    env_ids = rows.env_id.str.replace("ALE-", "ALE/")
    rows["game"] = rows.game.where(environments == 1, env_ids)

    teachers = path.with_name("teachers.csv")
    if teachers.exists():
        means = read_table(teachers).mean(numeric_only=True)
        for game, mean in means.items():
            measured = (rows.game == game) & (rows.tag == TEACHER)
            rows.loc[measured, "value"] = mean
    return rows


def read_table(path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(path)
    except ValueError as error:
        fail(f"{path}: not a table ({error}); correct or delete it")


# ---- Curves


def training_games(games: pd.DataFrame) -> pd.DataFrame:
    """Of a run that is not evaluated online: means of training games in turn.

    Each is where the last of its games ended.
    """
    together = int(np.clip(len(games) // 3, 1, 10))
    means = games.assign(value=games.value.rolling(together).mean())
    return means.iloc[together - 1 :: together]


def evaluations(rows: pd.DataFrame) -> pd.DataFrame:
    """The points of the curves: steps are online ones, offline evaluations at 0 and before."""
    points = []
    for _, run in rows.groupby("run"):
        offline = run[run.tag == OFFLINE_RETURN]
        online = run[run.tag == ONLINE_RETURN]
        if online.empty:
            online = training_games(run[run.tag == TRAINING_RETURN].sort_values("step"))

        updates = 0
        if len(offline) > 0:
            updates = run[run.tag.str.startswith("charts/offline/")].step.max()
        of_run = pd.concat([offline, online]).sort_values("seconds")
        of_run["step"] -= updates
        of_run["minutes"] = of_run.seconds / 60
        points.append(of_run)
    return pd.concat(points)


def teacher_return(rows: pd.DataFrame, game: str) -> float:
    measured = (rows.game == game) & (rows.tag == TEACHER)
    return rows[measured].value.mean()


def half_interval(values: pd.DataFrame | pd.Series, **options) -> pd.Series | float:
    """Half of the 95% interval of a mean."""
    count = values.count(**options)
    return stats.t.ppf(0.975, count - 1) * values.sem(**options)


def draw_curve(axes: plt.Axes, points: pd.DataFrame, x: str, label: str, style: tuple) -> None:
    """The mean over seeds of one kind, its interval, and single seeds."""
    color, marker, line = style

    # The n-th evaluations of all seeds belong together; their time is the mean over seeds.
    points = points.assign(nth=points.groupby("run").cumcount())
    table = points.pivot(index="nth", columns="seed", values=["value", x])
    position = table[x].mean(axis=1)
    values = table["value"]
    mean = values.mean(axis=1)

    if x == "step" and (points.step == 0).all():  # offline only: its level, for comparison
        axes.axhline(mean.iloc[-1], label=label, color=color, linestyle=line)
        return
    shape = {"marker": marker, "markersize": 5, "linestyle": line}
    axes.plot(position, mean, label=label, color=color, **shape)
    axes.plot(position, values, color=color, linewidth=0.6, alpha=0.6)
    if values.shape[1] > 2:  # of two seeds it says nothing
        half = half_interval(values, axis=1)
        low = mean - half
        high = mean + half
        axes.fill_between(position, low, high, color=color, alpha=0.2, linewidth=0)


def steps_label(steps: float, _position: int) -> str:
    if abs(steps) >= 1e6:
        return f"{steps / 1e6:g}M"
    return f"{steps / 1e3:g}k"


def limit_height(axes: plt.Axes, values: list[float]) -> None:
    """To all that was measured: the interval of few seeds can be far wider."""
    shown = pd.Series(values).dropna()
    margin = 0.05 * (shown.max() - shown.min())
    if margin > 0:
        axes.set_ylim(shown.min() - margin, shown.max() + margin)


def draw_game(panels: tuple, points: pd.DataFrame, labels: dict, teacher: float, chance: float):
    """Two panels: returns in one game by online step and by wall-clock."""
    by_step, by_time = panels
    for (kind, label), style in zip(labels.items(), cycle(STYLES)):
        of_kind = points[points.kind == kind]
        if len(of_kind) > 0:
            draw_curve(by_step, of_kind[of_kind.step >= 0], "step", label, style)
        if of_kind.minutes.notna().any():
            draw_curve(by_time, of_kind, "minutes", label, style)

    for axes in panels:
        axes.axhline(teacher, label="the teacher", **TEACHER_LINE)
        axes.axhline(chance, label="random play", **CHANCE_LINE)
        axes.grid(alpha=0.3)

    limit_height(by_step, [*points.value, teacher, chance])
    by_step.xaxis.set_major_formatter(steps_label)


def front_figure(rows: pd.DataFrame, labels: dict[str, str], kinds: list[str], path: Path) -> None:
    """One row for the front page, a panel per game: returns of these kinds by online step."""
    points = evaluations(rows[rows.kind.isin(kinds)])
    points = points[points.step >= 0]
    games = sorted(points.game.unique())
    styles = dict(zip(labels, cycle(STYLES)))
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    size = (3.4 * len(games), 3.4)
    figure, panels = plt.subplots(1, len(games), figsize=size, squeeze=False)

    for axes, game in zip(panels[0], games):
        of_game = points[points.game == game]
        for kind in kinds:
            of_kind = of_game[of_game.kind == kind]
            if len(of_kind) > 0:
                draw_curve(axes, of_kind, "step", labels[kind], styles[kind])
        teacher = teacher_return(rows, game)
        axes.axhline(teacher, label="the teacher", **TEACHER_LINE)
        limit_height(axes, [*of_game.value, teacher])
        axes.set_title(game, fontsize=11)
        axes.set_xlabel("online steps")
        axes.xaxis.set_major_formatter(steps_label)
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("mean score")

    handles, names = panels[0][0].get_legend_handles_labels()
    style = {"frameon": False, "loc": "lower center", "ncols": len(names)}
    figure.legend(handles, names, **style)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def curves(rows: pd.DataFrame, labels: dict[str, str], path: Path) -> None:
    """A row of two panels per game: returns by online step and by wall-clock."""
    points = evaluations(rows)
    games = sorted(rows.game.unique())
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    size = (10, 3.4 * len(games))
    figure, panels = plt.subplots(len(games), 2, figsize=size, squeeze=False, sharey="row")

    legend = {}
    for game, of_game in zip(games, panels):
        teacher = teacher_return(rows, game)
        chance = reference(game).random
        draw_game(of_game, points[points.game == game], labels, teacher, chance)
        by_step = of_game[0]
        by_step.set_ylabel(f"return, {game}")
        for handle, label in zip(*by_step.get_legend_handles_labels()):
            legend[label] = handle
    panels[-1][0].set_xlabel("online steps")
    panels[-1][1].set_xlabel("minutes since the program began")

    style = {"frameon": False, "loc": "lower center", "ncols": 3, "fontsize": 9}
    figure.legend(legend.values(), legend.keys(), **style)
    legend_lines = -(-len(legend) // 3)
    below = 0.22 * legend_lines / figure.get_figheight()
    figure.tight_layout(rect=(0, below, 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ---- Scores


def scores(rows: pd.DataFrame) -> pd.DataFrame:
    """The final score of every finished run: raw, and as a share of the human's and the teacher's.

    Shares are of what lies above random play.
    """
    table = rows[rows.tag == "score/mean"][["kind", "game", "seed", "value"]]
    table = table.rename(columns={"value": "score"})
    human = table.game.map(lambda game: reference(game).human).astype(float)
    teacher = table.game.map(lambda game: teacher_return(rows, game)).astype(float)
    chance = table.game.map(lambda game: reference(game).random).astype(float)

    score = table.score - chance
    human -= chance
    teacher -= chance
    table["human_normalised"] = score / human
    table["teacher_normalised"] = (score / teacher).where(teacher > 0)
    return table.sort_values(["game", "kind", "seed"]).reset_index(drop=True)


def interquartile_mean(*games: np.ndarray, axis: int = -1) -> np.ndarray:
    """Of the scores of all games together."""
    return stats.trim_mean(np.concatenate(games, axis=axis), 0.25, axis=axis)


def aggregates(table: pd.DataFrame) -> pd.DataFrame:
    """Interquartile means over games and seeds, and their bootstrap intervals.

    There is one for each kind that has several seeds of each game. A resample takes as many seeds
    as there are of each game, with replacement.
    """
    settings = {"n_resamples": 5000, "method": "percentile", "vectorized": True, "rng": 0}
    result = []
    for kind, of_kind in table.groupby("kind"):
        for measure in MEASURES:
            known = of_kind.dropna(subset=measure)
            games = [of_game[measure].to_numpy() for _, of_game in known.groupby("game")]
            fewest = min([len(game) for game in games], default=0)
            if fewest < 2:
                continue
            mean = interquartile_mean(*games)
            interval = stats.bootstrap(games, interquartile_mean, **settings).confidence_interval
            result.append((kind, measure, len(games), len(known), mean, *interval))
    return pd.DataFrame(result, columns=["kind", "measure", "games", "runs", "iqm", "low", "high"])


def aggregate_figure(table: pd.DataFrame, labels: dict[str, str], path: Path) -> None:
    """Interquartile means and their intervals, one panel per normalisation."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 2.6), sharey=True)
    styles = dict(zip(labels, cycle(STYLES)))
    kinds = [kind for kind in labels if kind in set(table.kind)]
    heights = [-nth for nth in range(len(kinds))]  # from top to bottom
    for axes, measure in zip(panels, MEASURES):
        of_measure = table[table.measure == measure].set_index("kind")
        for kind, y in zip(kinds, heights):
            if kind in of_measure.index:
                color, marker, _ = styles[kind]
                row = of_measure.loc[kind]
                axes.plot([row.low, row.high], [y, y], color=color, linewidth=4, alpha=0.4)
                axes.plot(row.iqm, y, marker, color=color)
        axes.set_yticks(heights, [labels[kind] for kind in kinds])
        axes.set_xlabel(f"interquartile mean, {measure.replace('_', ' ')}")
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ---- Tables


def cell(runs: pd.DataFrame) -> str:
    """The scores of all seeds of one kind in one game.

    Their mean, 95% interval if they are three or more, and share of the teacher's.
    """
    if runs.empty:
        return "–"
    text = f"{runs.score.mean():.1f}"
    if len(runs) > 2:
        text += f" ± {half_interval(runs.score):.1f}"
    share = runs.teacher_normalised.mean()
    if not np.isnan(share):
        text += f", {share:.0%}"
    return text


def markdown(rows: pd.DataFrame, labels: dict[str, str]) -> str:
    """The README's table: a row for each kind, a column for each game."""
    table = scores(rows)
    games = sorted(table.game.unique())

    teachers = []
    for game in games:
        mean = teacher_return(rows, game)
        teachers.append("–" if np.isnan(mean) else f"{mean:.1f}")
    what = "mean score ± 95% interval, and % of what the teacher has above random play"
    lines = [
        [what, *games, "seeds"],
        ["---"] * (len(games) + 2),
        ["the teacher", *teachers, "–"],
    ]
    for kind, label in labels.items():
        of_kind = table[table.kind == kind]
        if of_kind.empty:
            continue
        cells = [cell(of_kind[of_kind.game == game]) for game in games]
        counts = sorted(set(of_kind.groupby("game").size()))
        seeds = " or ".join(str(count) for count in counts)
        lines.append([label, *cells, seeds])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def into_readme(name: str, table: str, directory: Path) -> None:
    """Replace what stands between the markers of `name`: in README.md, docs or the directory's."""
    begin = f"<!-- {name}: begin -->"
    end = f"<!-- {name}: end -->"
    docs = README.parent / "docs"
    for readme in (README, *sorted(docs.glob("*.md")), directory / "README.md"):
        if not readme.exists():
            continue
        before, found, rest = readme.read_text().partition(begin)
        if found:
            _, _, after = rest.partition(end)
            readme.write_text(f"{before}{begin}\n{table}\n{end}{after}")
            return
    pages = f"none of {README}, {docs} and {directory}/README.md"
    fail(f"--readme: {pages} has a marker {begin}; write it where the table shall be")


def labels_of(out: Path, rows: pd.DataFrame) -> dict[str, str]:
    """A label for every kind, in the order of the tables."""
    labels = dict(LABELS)
    own = out / "labels.json"
    if own.exists():
        labels = read_json(own)
    for kind in rows.kind.unique():
        labels.setdefault(kind, kind)
    return labels


def json_tables(directory: Path) -> dict[str, str]:
    """Those of tools/speed.py, by the names of their files."""
    tables = {}
    for path in sorted(directory.glob("*.json")):
        content = read_json(path)
        if "table" in content:
            tables[path.stem] = content["table"]
    return tables


def front_of(out: Path, kinds: list[str]) -> str:
    """Write front.png of a directory's results.csv; the table of these kinds."""
    rows = read_csv(out / "results.csv")
    labels = labels_of(out, rows)
    for kind in kinds:
        if kind not in set(rows.kind):
            fail(f"--front {kind}: no such kind in {out / 'results.csv'}")
    front_figure(rows, labels, kinds, out / "front.png")
    return markdown(rows, {kind: labels[kind] for kind in kinds})


def tables_of(directory: Path, out: Path) -> dict[str, str]:
    """Write the figures of a directory's runs; every table that it holds, by its marker's name."""
    tables = json_tables(directory)
    results = out / "results.csv"
    if any(directory.glob("*/start")):
        write_csv(directory, results)
    if not results.exists():
        return tables

    rows = read_csv(results)
    labels = labels_of(out, rows)
    curves(rows, labels, out / "curves.png")
    table = scores(rows)
    table.to_csv(out / "scores.csv", index=False, float_format="%.4f")
    summary = aggregates(table)
    if len(summary) > 0:
        summary.to_csv(out / "aggregates.csv", index=False, float_format="%.4f")
        aggregate_figure(summary, labels, out / "aggregates.png")
    tables[out.resolve().name] = markdown(rows, labels)
    return tables


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "directory", type=Path, help="of tools/run.py's runs, or with a results.csv"
    )
    parser.add_argument("--out", type=Path, help="for what is written; unset: the same")
    parser.add_argument(
        "--readme",
        action="store_true",
        help="write the tables into README.md, docs or DIR/README.md",
    )
    parser.add_argument(
        "--front", nargs="+", metavar="KIND", help="front.png and a table of these kinds as well"
    )
    args = parser.parse_args()

    out = args.out or args.directory
    if not args.directory.is_dir():
        fail(f"{args.directory}: there is no such directory; name that of the runs, or of a CSV")
    try:
        out.mkdir(parents=True, exist_ok=True)
        tables = tables_of(args.directory, out)
        if args.front and tables:
            tables["front"] = front_of(out, args.front)
    except OSError as error:
        fail(f"{error}; name another --out")
    if not tables:
        fail(f"{args.directory}: neither runs of tools/run.py nor a results.csv in it")
    for name, table in tables.items():
        print(f"{name}\n{table}\n")
        if args.readme:
            into_readme(name, table, out)


if __name__ == "__main__":
    main()

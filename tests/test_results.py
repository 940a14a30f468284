"""results/collect.py and results/plot.py: what they make of known runs."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import collect
import matplotlib
import numpy as np
import pandas as pd
import plot
import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

matplotlib.use("agg")


def made_up_run(directory: Path, evaluations: list[float], score: float | None, teacher: float | None = 20.0) -> Path:
    """A run's directory as results/grid.py leaves it: 1,000 offline updates, an evaluation every 100 online steps."""
    run = directory / "runs" / "RUN"
    with SummaryWriter(run) as log:
        if teacher is not None:
            log.add_scalar("charts/teacher/avg_episodic_return", teacher, 0)
            log.add_scalar("charts/offline/avg_episodic_return", evaluations[0], 1000)
        for nth, value in enumerate(evaluations[1:], 1):
            log.add_scalar("eval/episodic_return", value, 100 * nth + 1000 * (teacher is not None))
        for step in range(3000):
            log.add_scalar("charts/episodic_return", step, step)
    (directory / "seconds").write_text("10.5\n20.0\n")
    (directory / "began").write_text(f"{time.time() - 100}\n")
    if score is not None:
        (directory / "score").write_text(f"game 1: {score}\n{score:.2f} ± 1.50 over 30 games of PongNoFrameskip-v4\n")
    torch.save({"weight": torch.full((3,), 1 / 3)}, run / "qdagger.cleanrl_model")
    return directory


@pytest.fixture
def collected(tmp_path) -> Path:
    """Pong and Breakout, two seeds of students and one of scratch runs, the last of which is not finished."""
    runs = []
    for game, level in (("Pong", 10.0), ("Breakout", 200.0)):
        for seed in (1, 2):
            run = tmp_path / "work" / f"student-{game}NoFrameskip-v4-{seed}"
            runs.append(made_up_run(run, [level - 5, level, level + 2 * seed], level + seed))
        run = tmp_path / "work" / f"scratch-{game}NoFrameskip-v4-1"
        runs.append(made_up_run(run, [0, -20, -19], None if game == "Breakout" else -19.5, teacher=None))
    out = tmp_path / "out"
    out.mkdir()
    collect.collect(out, "students", runs)
    return out


def test_collected_rows_are_those_of_the_event_files(collected):
    rows = pd.read_csv(collected / "students.csv")
    run = rows[rows.run == "student-PongNoFrameskip-v4-2"]
    assert run[run.tag == "eval/episodic_return"][["step", "value"]].values.tolist() == [[1100, 10], [1200, 14]]
    assert run[run.tag == "score/mean"].value.item() == 12 and run[run.tag == "score/std"].value.item() == 1.5
    assert run[run.tag == "run/seconds"].value.item() == 30.5
    assert run[run.tag == "eval/episodic_return"].seconds.between(90, 160).all()  # since the run began
    thinned = run[run.tag == "charts/episodic_return"]
    assert len(thinned) <= collect.POINTS and thinned.step.max() == 2999
    assert (thinned.step == thinned.value).all()


def test_a_second_collection_keeps_what_it_is_not_given(collected, tmp_path):
    before = (collected / "students.csv").read_text()
    other = made_up_run(tmp_path / "work" / "student-QbertNoFrameskip-v4-1", [1, 2, 3], 4.0)
    collect.collect(collected, "students", [other])
    after = (collected / "students.csv").read_text()
    assert set(before.splitlines()) < set(after.splitlines()) and "student-QbertNoFrameskip-v4-1,score/mean" in after


def test_online_steps_begin_after_the_offline_updates(collected):
    points = plot.evaluations(plot.read(collected))
    student = points[(points.kind == "student") & (points.game == "Pong") & (points.seed == "1")]
    assert student[["step", "value"]].values.tolist() == [[0, 5], [100, 10], [200, 12]]
    scratch = points[(points.kind == "scratch") & (points.game == "Pong")]
    assert scratch[["step", "value"]].values.tolist() == [[100, -20], [200, -19]]


def test_scores_are_normalised_above_random(collected):
    table = plot.scores(plot.read(collected)).set_index(["kind", "game", "seed"])
    assert len(table) == 5  # the unfinished one is none
    assert table.loc["student", "Pong", "1"].human_normalised == pytest.approx((11 + 20.7) / (14.6 + 20.7))
    assert table.loc["student", "Pong", "1"].teacher_normalised == pytest.approx((11 + 20.7) / (20 + 20.7))
    assert table.loc["scratch", "Pong", "1"].teacher_normalised == pytest.approx(1.2 / 40.7)


def test_interquartile_mean_and_its_bootstrap_by_game():
    scores = np.arange(8.0)
    assert plot.interquartile_mean(scores) == scores[2:6].mean()
    table = pd.DataFrame(
        [
            ("student", game, seed, value)
            for game, level in (("A", 0.0), ("B", 1.0))
            for seed, value in enumerate(level + np.linspace(-0.1, 0.1, 6))
        ],
        columns=["kind", "game", "seed", "human_normalised"],
    ).assign(teacher_normalised=np.nan)
    (row,) = plot.aggregates(table).itertuples()
    assert (row.games, row.runs, row.iqm) == (2, 12, pytest.approx(0.5))
    # Drawn game by game, each stays at its level; drawn from the heap, some draws would take far more of one game.
    assert 0.4 < row.low < 0.5 < row.high < 0.6


def test_interval_over_seeds_is_student_s():
    mean, half = plot.mean_and_interval(pd.DataFrame([[1.0, 2.0, 3.0], [5.0, np.nan, np.nan]]))
    assert mean.tolist() == [2, 5]
    assert half[0] == pytest.approx(4.302653 / np.sqrt(3)) and np.isnan(half[1])


def test_figures_and_the_readme_s_table(collected, tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- out: begin -->\nold\n<!-- out: end -->\nafter\n")
    monkeypatch.setattr(plot, "README", readme)
    monkeypatch.setattr(sys, "argv", ["plot.py", str(collected), "--readme"])
    plot.main()
    for name in ("curves.png", "aggregates.png"):
        assert plot.plt.imread(collected / name).std() > 0.05
    text = readme.read_text()
    assert "| Pong | QDagger student | 11.5 ± 0.7 | 79% | 2 |" in text and "old" not in text
    assert text.startswith("before\n") and text.endswith("after\n")
    plot.main()  # from the same numbers the same again, now that it has written CSVs of its own
    assert readme.read_text() == text


def test_speed_tables_in_the_readme_are_those_of_the_results():
    """plot.py remakes them: what a reader sees is what was measured."""
    tables = plot.speed_tables(plot.README.parent / "results" / "speed")
    assert len(tables) >= 3
    for name, table in tables.items():
        assert f"<!-- {name}: begin -->\n{table}\n<!-- {name}: end -->" in plot.README.read_text()


@pytest.mark.parametrize("name", ["pong_cpu", "ablation"])
def test_scores_in_the_readme_are_those_of_the_results(name):
    rows = plot.read(plot.README.parent / "results" / name)
    table = plot.markdown(plot.scores(rows), rows)
    assert f"<!-- {name}: begin -->\n{table}\n<!-- {name}: end -->" in plot.README.read_text()


def test_numbers_about_checkpoints_and_teachers_are_those_of_their_sources():
    readme, root = plot.README.read_text(), plot.README.parent
    first, new, _ = json.loads((root / "results" / "checkpoint_cost.json").read_text())["saves"]
    assert f"{new['seconds']} s" in readme and f"{first['seconds']} s ({first['MB']} MB)" in readme
    for card in (root / "teachers").glob("*.md"):
        score = re.search(r"^\| score \| (-?[\d.]+ ± [\d.]+)", card.read_text(), re.MULTILINE)[1]
        assert f"[{score}](teachers/{card.name})" in readme


def test_speed_of_a_gpu_goes_into_the_readme_beside_its_scores(collected, tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    readme.write_text("<!-- speed: begin --><!-- speed: end -->\n<!-- out: begin -->\n<!-- out: end -->\n")
    (collected / "speed.json").write_text(json.dumps({"table": "| a | b |\n|---|---|\n| 1 | 2 |\n"}))
    (collected / "check.json").write_text('{"tests": 3}')
    monkeypatch.setattr(plot, "README", readme)
    monkeypatch.setattr(sys, "argv", ["plot.py", str(collected), "--readme"])
    plot.main()
    assert "begin -->\n| a | b |\n|---|---|\n| 1 | 2 |\n<!--" in readme.read_text()
    assert "| Pong | QDagger student |" in readme.read_text()


@pytest.mark.parametrize("count, together", [(3, 1), (25, 8), (32, 10), (75, 10)])
def test_a_run_without_evaluations_is_drawn_by_its_training_games(count, together):
    columns = ["run", "tag", "step", "value", "seconds", "kind", "game", "seed"]
    games = [
        ("known", "charts/episodic_return", 10 * nth, nth, 2.0 * nth, "known", "Pong", "1") for nth in range(count)
    ]
    games += [("ours", "charts/episodic_return", 10 * nth, 5, nth, "student", "Pong", "1") for nth in range(count)]
    evaluation = ("ours", "eval/episodic_return", 2000, 7.0, 30.0, "student", "Pong", "1")
    points = plot.evaluations(pd.DataFrame([*games, evaluation], columns=columns))
    known, ours = points[points.run == "known"], points[points.run == "ours"]
    last = [nth for nth in range(count) if nth % together == together - 1]  # those that are left over make no point
    assert known.step.tolist() == [10 * nth for nth in last] and known.minutes.tolist() == [nth / 30 for nth in last]
    assert known.value.tolist() == [nth - (together - 1) / 2 for nth in last]
    assert ours[["step", "value"]].values.tolist() == [[2000, 7]]


def test_runs_without_times_stay_when_others_are_collected(collected, tmp_path):
    """Of a run that was paused the seconds are left empty: it is kept, and drawn by its steps."""
    path = collected / "students.csv"
    rows = pd.read_csv(path)
    rows.loc[rows.run.str.startswith("scratch"), "seconds"] = np.nan
    rows.to_csv(path, index=False)
    other = made_up_run(tmp_path / "work" / "student-PongNoFrameskip-v4-3", [0, 1, 2], 3.0)
    collect.collect(collected, "students", [other])
    again = pd.read_csv(path)
    assert set(again.run) == {*rows.run, other.name}
    assert again[again.run.str.startswith("scratch")].seconds.isna().all()
    assert len(again) == len(rows) + (again.run == other.name).sum()
    plot.curves(plot.read(collected), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_another_script_trains_where_collect_reads_it(tmp_path):
    """results/known.py: its flags, its hub with our teacher in it, its log, its seconds, its exit code."""
    script = tmp_path / "other.py"
    script.write_text(
        "import os, sys, pathlib\n"
        "from torch.utils.tensorboard import SummaryWriter\n"
        "hub = pathlib.Path(os.environ['HF_HOME'], 'hub', 'models--cleanrl--PongNoFrameskip-v4-dqn_atari-seed1')\n"
        "assert os.environ['HF_HUB_OFFLINE'] == '1' and (hub / 'snapshots/local/dqn_atari.cleanrl_model').exists()\n"
        "with SummaryWriter('runs/RUN') as log:\n"
        "    log.add_scalar('charts/episodic_return', len(sys.argv), 7)\n"
        "print(sys.argv[1:])\n"
        "sys.exit(3 * ('--seed=1' not in sys.argv))\n"
    )
    command = [sys.executable, plot.README.parent / "results" / "known.py"]
    for seed, code in ((1, 0), (2, 3)):
        run = tmp_path / f"known-PongNoFrameskip-v4-{seed}"
        ended = subprocess.run([*command, run, "--script", script, "--total-timesteps", "60"], stderr=subprocess.PIPE)
        assert ended.returncode == code
        flags = f"['--env-id=PongNoFrameskip-v4', '--seed={seed}', '--total-timesteps', '60']"
        assert flags in (run / "log").read_text()
    again = subprocess.run([*command, run, "--script", script], capture_output=True, text=True)
    assert again.returncode == 2 and again.stderr.startswith("error: ") and again.stderr.count("\n") == 1
    rows = {row[1]: row for row in collect.rows_of(run)}
    assert rows["charts/episodic_return"][2:4] == (7, 5.0) and 0 < rows["run/seconds"][3] < 60

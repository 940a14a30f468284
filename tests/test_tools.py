"""tools/run.py, tools/plot.py, tools/speed.py and their numbers in the README; benchmark.sh.

benchmark.sh is tried on a real Slurm as well, where there is one.
"""

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import ale_py
import gymnasium
import matplotlib
import numpy as np
import pandas as pd
import plot
import pytest
import run as run_tool
import speed
from torch.utils.tensorboard import SummaryWriter

import qdagger_dqn_atari_impalacnn as qdagger

matplotlib.use("agg")

ROOT = Path(plot.__file__).parents[1]
FAKE = Path(__file__).parent / "fake_program.py"
GAME = "BreakoutNoFrameskip-v4"
TEACHER = ROOT / "teachers" / "PongNoFrameskip-v4.cleanrl_model"
SLOW = "--save-model --slow"  # the stand-in trains until it is told to stop


def start(*command, **variables) -> subprocess.Popen:
    return subprocess.Popen(
        [str(word) for word in command],
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end(process: subprocess.Popen) -> tuple[int, str]:
    said, _ = process.communicate(timeout=100)
    return process.returncode, said


def wait_for(condition) -> None:
    until = time.time() + 180  # on a busy machine the program needs a minute to begin
    while not condition():
        assert time.time() < until, "it never came"
        time.sleep(0.05)


def pid_of(run: Path) -> int:
    """Of its program, once it trains."""
    file = run / "pid"
    wait_for(lambda: file.exists() and file.read_text())
    return int(file.read_text())


def calls(run: Path) -> list[str]:
    return (run / "calls").read_text().splitlines()


# ---- tools/run.py


@pytest.fixture
def grid(tmp_path):
    """grid(flags of each run, *options) starts tools/run.py.

    grid.runs are the directories of three runs.
    """
    runs = [tmp_path / f"student-PongNoFrameskip-v4-{seed}" for seed in (1, 2, 3)]

    def start_grid(lines, *options, **variables) -> subprocess.Popen:
        text = ""
        for run, flags in zip(runs, lines):
            text += f"{run.name} --env-id PongNoFrameskip-v4 {flags}\n"
        list_of_runs = tmp_path / "runs.txt"
        list_of_runs.write_text(text)
        command = [sys.executable, ROOT / "tools/run.py", list_of_runs]
        command += ["--program", FAKE, "--games=2", "--workers=1", *options]
        return start(*command, **variables)

    start_grid.runs = runs
    return start_grid


def test_every_run_is_trained_and_scored_and_what_is_finished_is_skipped(grid):
    sticky, named, without_model = grid.runs
    lines = [
        "--save-model --repeat-action-probability=0.25",
        "--save-model --exp-name 'a b'",
        "--seed 3",
    ]
    code, _ = end(grid(lines, "--line=3"))
    assert code == 0
    assert not sticky.exists()

    code, said = end(grid(lines, "--workers=2", CUDA_VISIBLE_DEVICES="2,5"))
    assert code == 0
    assert said.count("finished") == 2
    for run, gpu in ((sticky, "2"), (named, "5")):
        trained, evaluated = calls(run)
        assert trained.startswith(gpu)
        assert "--env-id PongNoFrameskip-v4" in evaluated
        assert evaluated.endswith("--eval-episodes 2")
        assert (run / "score").read_text() == "7.00 ± 1.50 over 2 games of PongNoFrameskip-v4\n"
    assert "--exp-name a b" in calls(named)[0]
    assert "--repeat-action-probability=0.25" in calls(sticky)[1]
    assert len(calls(without_model)) == 1  # without a model there is nothing to play with
    assert end(grid(lines)) == (0, "")

    code, said = end(grid(["--save-model --gamma 0.9"]))
    assert code == 2
    assert "other flags" in said
    assert len(said.splitlines()) == 1
    assert len(calls(sticky)) == 2


def test_the_final_network_plays_with_the_flags_of_its_run(grid):
    flags = "--save-model --end-e 0.05 --no-cuda --seed=4 --eval-episodes 9"
    code, _ = end(grid([flags]))
    assert code == 0
    _, evaluated = calls(grid.runs[0])
    assert f"{flags} --evaluate {grid.runs[0]}/runs/" in evaluated
    assert (grid.runs[0] / "score").read_text().startswith("7.00 ± 1.50 over 2 games")


def test_what_was_killed_is_resumed_once_nobody_is_at_work_there(grid):
    run = grid.runs[0]
    before_its_first_checkpoint = run / "runs" / "old"
    before_its_first_checkpoint.mkdir(parents=True)
    process = grid([SLOW])
    program = pid_of(run)
    process.kill()  # the program goes on, without anybody who waits for it
    end(process)

    stopped = grid([SLOW])
    waiting = grid([SLOW])
    time.sleep(3)
    assert waiting.poll() is None
    stopped.send_signal(signal.SIGINT)
    code, said = end(stopped)
    assert code == 130
    assert "FAILED" not in said
    assert len(calls(run)) == 1
    assert not (run / "signals").exists()

    os.kill(program, signal.SIGKILL)
    code, said = end(waiting)
    assert code == 0
    assert said.count(f"another process is at work there (process {program} on ") == 1
    assert "FAILED" not in said
    began, resumed, evaluated = calls(run)
    assert "--slow" in began
    assert "--resume" in resumed
    assert "--evaluate" in evaluated
    assert not before_its_first_checkpoint.exists()


def test_two_at_the_same_list_finish_it_together(grid):
    lines = ["--save-model", "--save-model", "--seed 3"]
    together = [grid(lines), grid(lines), grid(lines, "--workers=3")]
    for process in together:
        code, said = end(process)
        assert code == 0
        assert "FAILED" not in said
    for run, number in zip(grid.runs, (2, 2, 1)):
        assert len(calls(run)) == number


def kill_while_it_trains(grid, flags: str) -> Path:
    """A run that has left a checkpoint, and nobody at work there."""
    process = grid([flags])
    program = pid_of(grid.runs[0])
    process.kill()
    end(process)
    os.kill(program, signal.SIGKILL)
    return grid.runs[0]


@pytest.mark.parametrize("name", ["fake", "a b", "a.b", "_b+=-", "a__b", "a.best"])
def test_the_last_network_plays_and_not_that_of_the_best_evaluation(grid, name):
    flags = f"{SLOW} --exp-name '{name}'"
    run = kill_while_it_trains(grid, flags)
    code, _ = end(grid([flags]))
    assert code == 0
    directory = run / "runs" / f"PongNoFrameskip-v4__{name}__1"
    _, resumed, evaluated = calls(run)
    assert resumed.endswith(f"--resume {directory}")
    assert f"--evaluate {directory}/{name}.cleanrl_model --eval-episodes" in evaluated
    assert (directory / f"{name}.best.cleanrl_model").exists()


def test_a_run_that_another_has_begun_with_other_flags_is_left_alone(grid):
    run = grid.runs[0]
    run.mkdir()
    with (run / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = grid(["--save-model"])
        said = process.stdout.readline()
        assert "another process is at work there" in said
        (run / "start").write_text('{"time": 1000, "command": ["other.py"]}')
    code, said = end(process)
    assert code == 1
    assert "has been started with other flags" in said
    assert not (run / "calls").exists()


def test_a_model_is_kept_when_a_run_without_a_checkpoint_begins_anew(grid):
    run = kill_while_it_trains(grid, SLOW)
    (checkpoint,) = run.glob("runs/*/checkpoint.pt")
    checkpoint.with_name("fake.cleanrl_model").write_text("weights")
    checkpoint.rename(checkpoint.with_name("checkpoint.pt.123.part"))
    process = grid([SLOW])
    wait_for(lambda: len(calls(run)) == 2)
    process.kill()
    os.kill(pid_of(run), signal.SIGKILL)
    (kept,) = run.glob("runs.*/*/*.cleanrl_model")
    assert kept.read_text() == "weights"


@pytest.mark.parametrize("left", ["", "\0\0\0", '{"time": 1'])
@pytest.mark.parametrize(
    "emptied, next_call",
    [(["score"], "--evaluate"), (["score", "trained"], "--resume"), (["start"], None)],
)
def test_a_file_that_a_power_cut_has_emptied_counts_as_absent(grid, emptied, next_call, left):
    run = grid.runs[0]
    line = "--save-model --seed 1"
    assert end(grid([line]))[0] == 0
    (run / "runs" / "PongNoFrameskip-v4__fake__1" / "checkpoint.npz").touch()
    score = (run / "score").read_text()
    for name in emptied:
        (run / name).write_text(left)

    code, _ = end(grid([line]))
    assert code == 0
    assert (run / "score").read_text() == score
    if next_call is None:
        assert len(calls(run)) == 2
    else:
        assert next_call in calls(run)[2]
    assert not list(run.glob("*.part"))


def test_a_run_keeps_its_beginning_when_the_note_of_it_is_emptied(grid):
    run = kill_while_it_trains(grid, SLOW)
    (run / "start").write_text("")
    os.utime(run / "start", (1000, 1000))
    assert end(grid([SLOW]))[0] == 0
    assert json.loads((run / "start").read_text())["time"] == 1000
    code, said = end(grid([SLOW + " --seed 2"]))
    assert code == 2
    assert "other flags" in said


def test_a_file_is_replaced_when_all_of_the_new_one_is_on_the_disk(tmp_path, monkeypatch):
    path = tmp_path / "score"
    path.write_text("old")

    def full_disk(_) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        run_tool.write(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]

    monkeypatch.undo()
    run_tool.write(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def without_locks(number: int) -> str:
    """A script that runs tools/run.py where the file system answers so to who asks for a lock."""
    return f"""
import fcntl, runpy
def flock(*_):
    raise OSError({number}, "no locks")
fcntl.flock = flock
runpy.run_path("{ROOT}/tools/run.py", run_name="__main__")
"""


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_locks_is_named_once_and_used(tmp_path, number):
    runs = tmp_path / "runs.txt"
    runs.write_text("a --save-model --env-id P\nb --save-model --env-id P\n")
    command = [sys.executable, "-c", without_locks(number), runs, "--program", FAKE]
    code, said = end(start(*command, "--workers=2"))
    if number == errno.EIO:  # is no such answer
        assert code == 1
        assert said.count("FAILED") == 2
    else:
        assert code == 0
        assert said.count("no locks on this file system") == 1
        assert len(calls(tmp_path / "a")) == 2


LIST = """
# these are trained one by one
first --seed 1

  # and this one at last
second --seed '2' # --seed 3
"""


def test_empty_lines_and_comments_are_no_runs_but_are_counted(tmp_path):
    runs = tmp_path / "runs.txt"
    runs.write_text(LIST)
    command = [sys.executable, ROOT / "tools/run.py", runs, "--program", FAKE]
    code, _ = end(start(*command, "--line=6"))
    assert code == 0
    assert not (tmp_path / "first").exists()
    assert calls(tmp_path / "second")[0].endswith("--seed 2 # --seed 3")

    code, _ = end(start(*command))
    assert code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"runs.txt", "first", "second"}


@pytest.mark.parametrize(
    "text, options, words",
    [
        (LIST, "--workers -1", "--workers: -1 is not a whole number"),
        (LIST, "--workers 0", "--workers: 0 is not a whole number"),
        (LIST, "--workers two", "--workers: two is not a whole number"),
        (LIST, "--games -3", "--games: -3 is not a whole number"),
        (LIST, "--line 0", "--line: 0 is not a whole number"),
        (LIST, "--line -1", "--line: -1 is not a whole number"),
        (LIST, "--line 2", "--line 2: no run there"),  # a comment
        (LIST, "--line 7", "--line 7: no run there"),
        (LIST, "--program none.py", "--program none.py: there is no such file"),
        (LIST, "--python none", "--python none: nothing that can be run"),
        (LIST, "--hub-teacher none", "--hub-teacher none: there is no such file"),
        (LIST, "another.txt", "another.txt: cannot be read"),
        (LIST, "--gamma=3", "unrecognized arguments: --gamma=3"),
        ("", "", "no run in it"),
        ("# nothing\n", "", "no run in it"),
        ("a --exp-name 'b\n", "", "line 1: No closing quotation"),
        ("--seed 1\n", "", "line 1: --seed is no name"),
        ("../a --seed 1\n", "", "line 1: ../a is no name"),
        (". --seed 1\n", "", "line 1: . is no name"),
        ("a --seed 1\na --seed 2\n", "", "a is in the lists with other flags too"),
    ],
)
def test_a_list_or_a_flag_that_cannot_be_gets_one_line(tmp_path, text, options, words):
    runs = tmp_path / "runs.txt"
    runs.write_text(text)
    command = [sys.executable, ROOT / "tools/run.py", runs, "--program", FAKE]
    code, said = end(start(*command, *options.split()))
    assert code == 2
    assert said.startswith("error: ")
    assert words in said
    assert len(said.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [runs]


PROGRESS = """
import time
from tqdm import tqdm

for _ in tqdm(range(200), desc="online"):
    time.sleep(0.01)
"""


@pytest.mark.parametrize(
    "variables, fewest, most", [({}, 2, 3), ({"TQDM_MININTERVAL": "0"}, 100, 300)]
)
def test_the_progress_bar_does_not_fill_the_log(tmp_path, variables, fewest, most):
    program = tmp_path / "program.py"
    program.write_text(PROGRESS)
    runs = tmp_path / "runs.txt"
    runs.write_text("a\n")
    command = [sys.executable, ROOT / "tools/run.py", runs, "--program", program]
    code, _ = end(start(*command, **variables))
    assert code == 0
    log = (tmp_path / "a" / "log").read_text()
    assert "200/200" in log
    assert fewest <= log.count("online:") <= most


def test_failed_runs_are_named_with_their_logs_and_stop_no_other(grid):
    failed, killed, fine = grid.runs
    process = grid(["--gamma 3", SLOW, "--save-model"])
    os.kill(pid_of(killed), signal.SIGKILL)
    code, said = end(process)
    assert code == 1
    assert (fine / "score").exists()
    assert "exit code -9" in said
    for line, run in zip(said.splitlines()[-2:], (failed, killed)):
        assert line.endswith(f"FAILED: {run.name}, see {run / 'log'}")
    assert (failed / "log").read_text() == "error: --gamma 3: must lie between 0 and 1\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_passed_on_once_and_the_next_start_resumes(grid, number):
    stopped, waiting, _ = grid.runs
    process = grid([SLOW, "--seed 2"])
    pid_of(stopped)
    process.send_signal(number)
    code, said = end(process)
    assert code == 128 + number
    assert "FAILED" not in said
    assert (stopped / "signals").read_text() == str(int(number))
    assert not waiting.exists()

    code, _ = end(grid([SLOW, "--seed 2"]))
    assert code == 0
    assert "--resume" in calls(stopped)[1]
    assert len(calls(waiting)) == 1


# What a machine says of eight cores, and how many of them are granted.
GROUPS_2 = "0::/job/task\n"
GROUPS_1 = "5:memory:/elsewhere\n4:cpu,cpuacct:/job/task\n0::/\n"
CORES = {
    "no control groups": ({}, 8),
    "no limit": ({"proc/self/cgroup": GROUPS_2, "sys/fs/cgroup/job/task/cpu.max": "max 100000"}, 8),
    "own limit": (
        {"proc/self/cgroup": GROUPS_2, "sys/fs/cgroup/job/task/cpu.max": "350000 100000\n"},
        3,
    ),
    "limit of a group around it": (
        {
            "proc/self/cgroup": GROUPS_2,
            "sys/fs/cgroup/job/task/cpu.max": "max 100000\n",
            "sys/fs/cgroup/job/cpu.max": "200000 100000\n",
            "sys/fs/cgroup/other/cpu.max": "100000 100000\n",
        },
        2,
    ),
    "container": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4),
    "less than a core": (
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "20000 100000\n"},
        1,
    ),
    "more than there are": (
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "9900000 100000\n"},
        8,
    ),
    "version 1": (
        {
            "proc/self/cgroup": GROUPS_1,
            "sys/fs/cgroup/cpu/job/task/cpu.cfs_quota_us": "500000\n",
            "sys/fs/cgroup/cpu/job/task/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu/elsewhere/cpu.cfs_quota_us": "100000\n",
            "sys/fs/cgroup/cpu/elsewhere/cpu.cfs_period_us": "100000\n",
        },
        5,
    ),
    "version 1, no limit": (
        {
            "proc/self/cgroup": GROUPS_1,
            "sys/fs/cgroup/cpu/job/task/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/job/task/cpu.cfs_period_us": "100000\n",
        },
        8,
    ),
    "version 1, container": (
        {
            "proc/self/cgroup": GROUPS_1,
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "150000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "50000\n",
        },
        3,
    ),
}


@pytest.mark.parametrize("case", CORES)
@pytest.mark.parametrize("has_affinity", [True, False])
def test_cores_are_those_that_are_granted(tmp_path, monkeypatch, case, has_affinity):
    files, expected = CORES[case]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    if has_affinity:
        monkeypatch.setattr(os, "cpu_count", lambda: 64)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    else:
        monkeypatch.setattr(os, "cpu_count", lambda: 8)
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert run_tool.cores(tmp_path) == expected


def test_workers_and_their_threads_follow_from_the_cores(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("import os; print(os.environ['OMP_NUM_THREADS'])")
    runs = tmp_path / "runs.txt"
    runs.write_text("a\n")
    command = [sys.executable, ROOT / "tools/run.py", runs, "--program", program, "--workers=1"]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    subprocess.run(command, env=environment, check=True)
    assert (tmp_path / "a" / "log").read_text() == f"{run_tool.cores()}\n"


# ---- tools/plot.py


def made_up_run(run: Path, evaluations: list[float], score: str, updates: int) -> None:
    """A run as tools/run.py leaves it, with so many offline updates.

    Its evaluations are 100 steps and 10 s apart.
    """
    run.mkdir(parents=True)
    (run / "start").write_text(json.dumps({"time": 1000.0, "command": []}))
    (run / "score").write_text(f"{score} ± 1.50 over 30 games of Pong")
    with SummaryWriter(run / "runs" / "RUN") as log:
        if updates:
            log.add_scalar(plot.TEACHER, 20, 0, walltime=1000)
            log.add_scalar(
                "charts/offline/avg_episodic_return", evaluations[0], updates, walltime=1000
            )
        for nth in range(1, len(evaluations)):
            step = updates + 100 * nth
            second = 1000 + 10 * nth
            log.add_scalar("eval/episodic_return", evaluations[nth], step, walltime=second)
        for step in range(1200):
            log.add_scalar("losses/loss", step, step, walltime=1000 + step)


def test_event_files_and_the_csv_give_the_same_tables_and_figures(tmp_path, monkeypatch):
    benchmark = tmp_path / "benchmark"
    out = tmp_path / "made_up"
    readme = tmp_path / "README.md"
    first, second, third = (f"student-PongNoFrameskip-v4-{seed}" for seed in (1, 2, 3))
    scratch = "scratch-PongNoFrameskip-v4-1"
    made_up_run(benchmark / first, [5, 10, 12], "11.00", updates=1000)
    made_up_run(benchmark / second, [5, 10, 14], "12.00", updates=1000)
    made_up_run(benchmark / third, [5, 10, 13], "13.00", updates=1000)
    made_up_run(benchmark / scratch, [0, -20, -19], "-19.50", updates=0)
    made_up_run(benchmark / "buffer-PongNoFrameskip-v4", [0], "0.00", updates=1)
    readme.write_text("before\n<!-- made_up: begin -->\nold\n<!-- made_up: end -->\nafter\n")
    monkeypatch.setattr(plot, "README", readme)

    def plotted(*arguments) -> tuple[str, dict[str, bytes]]:
        words = [str(word) for word in arguments]
        monkeypatch.setattr(sys, "argv", ["plot.py", *words, "--readme"])
        plot.main()
        files = {path.name: path.read_bytes() for path in out.iterdir()}
        return readme.read_text(), files

    text, files = plotted(benchmark, "--out", out)
    assert plotted(out) == (text, files)  # from the CSV alone
    tables = {"results.csv", "scores.csv", "aggregates.csv"}
    figures = {"curves.png", "aggregates.png"}
    assert set(files) == tables | figures
    for name in figures:
        assert plot.plt.imread(out / name).std() > 0.05  # something is drawn

    assert text.startswith("before\n<!--")
    assert text.endswith("-->\nafter\n")
    assert "old" not in text
    assert "| Pong | seeds |\n" in text
    body = "| the teacher | 20.0 | – |\n"
    body += "| QDagger student | 12.0 ± 2.5, 80% | 3 |\n"
    body += "| DQN from scratch, same network | -19.5, 3% | 1 |\n"
    assert body in text

    rows = plot.read_csv(out / "results.csv")
    loss = rows[(rows.run == second) & (rows.tag == "losses/loss")]
    assert len(loss) == 400
    assert loss.step.max() == 1199
    assert (loss.step == loss.value).all()
    points = plot.evaluations(rows).set_index("run")[["step", "value", "minutes"]]
    assert points.loc[second].values.tolist() == [[0, 5, 0], [100, 10, 1 / 6], [200, 14, 1 / 3]]
    assert points.loc[scratch, "step"].tolist() == [100, 200]

    table = plot.scores(rows).set_index(["kind", "seed"])
    human_share = table.loc["student", "1"].human_normalised
    teacher_share = table.loc["scratch", "1"].teacher_normalised
    assert human_share == pytest.approx((11 + 20.7) / (14.6 + 20.7))
    assert teacher_share == pytest.approx(1.2 / 40.7)

    (out / "teachers.csv").write_text("Pong,Breakout\n9.0,7\n9.6,7\n")
    table = plot.scores(plot.read_csv(out / "results.csv")).set_index(["kind", "seed"])
    assert table.loc["scratch", "1"].teacher_normalised == pytest.approx(1.2 / 30)


def test_the_front_figure_has_a_panel_per_game_and_its_table_the_named_kinds(tmp_path, monkeypatch):
    made_up_run(tmp_path / "student-PongNoFrameskip-v4-1", [5, 10], "11.00", updates=1000)
    made_up_run(tmp_path / "student-BreakoutNoFrameskip-v4-1", [5, 10], "12.00", updates=1000)
    made_up_run(tmp_path / "scratch-PongNoFrameskip-v4-1", [0, 10], "13.00", updates=0)
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text("before\n<!-- front: begin -->\n<!-- front: end -->\nafter\n")
    monkeypatch.setattr(plot, "README", tmp_path / "README.md")  # there is none

    def panels_of(*kinds) -> list:
        drawn = []
        with monkeypatch.context() as patch:
            patch.setattr(plot.plt, "close", drawn.append)
            plot.write_csv(tmp_path, tmp_path / "results.csv")
            table = plot.front_of(tmp_path, list(kinds))
        plot.into_readme("front", table, tmp_path)
        assert (tmp_path / "front.png").stat().st_size > 0
        return drawn[0].axes

    breakout, pong = panels_of("student", "scratch")
    assert breakout.get_title() == "Breakout"
    assert breakout.get_xlabel() == "online steps"
    assert breakout.get_ylim()[1] > 20  # the teacher's
    labels = pong.get_legend_handles_labels()[1]
    assert labels == ["QDagger student", "DQN from scratch, same network", "the teacher"]
    assert "| DQN from scratch, same network | – | 13.0, 83% | 1 |\n" in page.read_text()

    _, pong = panels_of("student")
    assert len(pong.get_legend_handles_labels()[1]) == 2
    assert "scratch" not in page.read_text()

    with pytest.raises(SystemExit):
        plot.front_of(tmp_path, ["students"])


def test_human_and_random_scores_of_all_games_are_those_of_one_table():
    assert len(plot.REFERENCES) == 57
    # These tell the table from those of other papers.
    assert plot.REFERENCES["Pong"] == (-20.7, 14.6)
    assert plot.REFERENCES["BeamRider"] == (363.9, 16926.5)
    assert plot.REFERENCES["VideoPinball"] == (16256.9, 17667.9)

    gymnasium.register_envs(ale_py)
    for game, (by_chance, by_a_human) in plot.REFERENCES.items():
        assert by_chance < by_a_human
        if game != "Surround":  # in the table, but no game of ale-py's
            assert f"{game}NoFrameskip-v4" in gymnasium.registry
        for name in (f"{game}NoFrameskip-v4", f"ALE/{game}-v5"):
            assert plot.reference(name) is plot.reference(game)


def plotted_tables(directory: Path) -> str:
    out = directory / "tables"
    out.mkdir(exist_ok=True)
    (table,) = plot.tables_of(directory, out).values()
    return table


def test_runs_that_differ_are_never_taken_for_one(tmp_path):
    made_up_run(tmp_path / "student-PongNoFrameskip-v4-1", [5, 10], "11.00", updates=1000)
    made_up_run(tmp_path / "student-ALE-Pong-v5-1", [5, 10], "12.00", updates=1000)
    made_up_run(tmp_path / "no-latch-BreakoutNoFrameskip-v4-1", [5, 10], "13.00", updates=1000)
    made_up_run(tmp_path / "no-latch-ALE-Pong-v5-1", [5, 10], "14.00", updates=1000)
    made_up_run(tmp_path / "final-latch-ALE-Pong-v5-1", [5, 10], "15.00", updates=1000)
    assert (
        plotted_tables(tmp_path)
        .splitlines()[0]
        .endswith("| ALE/Pong-v5 | Breakout | PongNoFrameskip-v4 | seeds |")
    )

    rows = plot.read_csv(tmp_path / "tables" / "results.csv")
    table = plot.scores(rows).set_index(["kind", "game", "seed"])
    assert table.score.to_dict() == {
        ("student", "PongNoFrameskip-v4", "1"): 11,
        ("student", "ALE/Pong-v5", "1"): 12,
        ("no-latch", "Breakout", "1"): 13,
        ("no-latch", "ALE/Pong-v5", "1"): 14,
        ("final-latch", "ALE/Pong-v5", "1"): 15,
    }
    assert table.human_normalised.notna().all()


def test_a_game_that_no_table_has_is_drawn_without_shares(tmp_path):
    made_up_run(tmp_path / "student-AdventureNoFrameskip-v4-1", [1, 2], "1.50", updates=1000)
    assert "| QDagger student | 1.5 | 1 |" in plotted_tables(tmp_path)
    assert (tmp_path / "tables" / "curves.png").exists()


@pytest.mark.parametrize("left", ["", "{", "7", "\0\0\0"])
def test_a_file_that_a_power_cut_has_emptied_hides_no_run(tmp_path, left):
    run = tmp_path / "student-PongNoFrameskip-v4-1"
    made_up_run(run, [5, 10, 12], "11.00", updates=1000)
    (run / "start").write_text(left)
    (run / "score").write_text(left)
    os.utime(run / "start", (1000, 1000))
    plotted_tables(tmp_path)
    points = plot.evaluations(plot.read_csv(tmp_path / "tables" / "results.csv"))
    assert points.minutes.tolist() == [0, 1 / 6, 1 / 3]


def wrong_csv(directory: Path) -> None:
    (directory / "results.csv").write_text("game,score\nPong,7\n")


def empty_csv(directory: Path) -> None:
    (directory / "results.csv").write_text("")


def run_without_a_seed(directory: Path) -> None:
    (directory / "results.csv").write_text("run,tag,step,value,seconds\nstudent-Pong,a,1,2,3\n")


def run_without_points(directory: Path) -> None:
    (directory / "student-PongNoFrameskip-v4-1").mkdir()
    (directory / "student-PongNoFrameskip-v4-1" / "start").write_text("{}")


def wrong_labels(directory: Path) -> None:
    made_up_run(directory / "student-PongNoFrameskip-v4-1", [5, 10], "11.00", updates=1000)
    (directory / "labels.json").write_text("student: ours")


def nothing(directory: Path) -> None:
    pass


def no_directory(directory: Path) -> None:
    directory.rmdir()


@pytest.mark.parametrize(
    "prepare, words",
    [
        (wrong_csv, "its columns are not run, tag"),
        (empty_csv, "not a table"),
        (run_without_a_seed, "not called KIND-ENV_ID-SEED"),
        (run_without_points, "no run has logged anything yet"),
        (wrong_labels, "labels.json: not JSON"),
        (nothing, "neither runs"),
        (no_directory, "no such directory"),
    ],
)
def test_what_cannot_be_plotted_gets_one_line(tmp_path, monkeypatch, capsys, prepare, words):
    directory = tmp_path / "benchmark"
    directory.mkdir()
    prepare(directory)
    monkeypatch.setattr(sys, "argv", ["plot.py", str(directory)])
    with pytest.raises(SystemExit) as stop:
        plot.main()
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert words in message
    assert len(message.splitlines()) == 1


def test_interquartile_mean_and_intervals_are_the_known_ones():
    assert plot.interquartile_mean(np.arange(8.0) ** 2) == np.mean([4, 9, 16, 25])

    games = {
        "A": np.linspace(-0.1, 0.1, 6),
        "B": np.linspace(0.9, 1.1, 6),
    }
    rows = []
    for game, of_seeds in games.items():
        for seed, score in enumerate(of_seeds):
            rows.append(("student", game, seed, score, np.nan))
    table = pd.DataFrame(rows, columns=["kind", "game", "seed", *plot.MEASURES])
    (row,) = plot.aggregates(table).itertuples()
    assert row.games == 2
    assert row.runs == 12
    assert row.iqm == pytest.approx(0.5)

    rng = np.random.default_rng(1)
    drawn = []
    for _ in range(5000):
        resample = np.concatenate([rng.choice(of_seeds, 6) for of_seeds in games.values()])
        drawn.append(np.sort(resample)[3:9].mean())
    expected = np.percentile(drawn, [2.5, 97.5])
    assert [row.low, row.high] == pytest.approx(expected, abs=0.005)

    assert plot.aggregates(table.query("seed == 0")).empty  # one seed has no interval


def test_tables_of_readme_and_docs_are_remade_from_what_is_committed():
    made = {}
    for directory in (ROOT / "results").iterdir():
        made |= plot.json_tables(directory)
        results = directory / "results.csv"
        if results.exists():
            rows = plot.read_csv(results)
            labels = plot.labels_of(directory, rows)
            made[directory.name] = plot.markdown(rows, labels)
            # The front page's, by the command that its results name.
            command = r"plot\.py [^\n]* --front ([\w ]+) --readme"
            for kinds in re.findall(command, (directory / "README.md").read_text()):
                made["front"] = plot.markdown(rows, {kind: labels[kind] for kind in kinds.split()})

    shown = {}
    pages = [plot.README, *(ROOT / "docs").glob("*.md")]
    for page in (*pages, *(ROOT / "results").glob("*/README.md")):
        marked = r"<!-- (\w+): begin -->\n(.*?)\n?<!-- \1: end -->"
        for name, table in re.findall(marked, page.read_text(), flags=re.DOTALL):
            if re.search(r"\d", table):  # others wait for their numbers
                shown[name] = table
    assert made
    assert made == shown

    for path in (ROOT / "results" / "speed").glob("*.json"):
        content = json.loads(path.read_text())
        if "runs" in content:
            assert speed.table_of(content["runs"], "other script") == content["table"]


# ---- tools/speed.py

SCRIPT = f"""
import sys
from huggingface_hub import hf_hub_download as download
from torch.utils.tensorboard import SummaryWriter

assert "--env-id=PongNoFrameskip-v4" in sys.argv
assert "--learning-starts=400" in sys.argv
teacher = download("cleanrl/PongNoFrameskip-v4-dqn_atari-seed1", "dqn_atari.cleanrl_model")
assert open(teacher, "rb").read() == open("{TEACHER}", "rb").read()

faster = 1 + ("--amp" in sys.argv)
with SummaryWriter("runs/RUN") as log:
    log.add_scalar("charts/teacher/avg_episodic_return", 20, 0, walltime=1000)
    for nth in range(10):
        log.add_scalar("charts/offline/loss", 1, 100 * nth, walltime=1010 + 2 * nth / faster)
        second = 2000 - 100  # the first two points are slow
        if nth > 1:
            second = 2000 + 4 * nth / faster
        log.add_scalar("losses/td_loss", 1, 100 * nth, walltime=second)
"""


def test_speed_of_variants_and_of_another_script(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    out = tmp_path / "speed.json"
    script.write_text(SCRIPT)
    monkeypatch.setattr(speed, "PROGRAM", script)
    options = [
        "--env-id=PongNoFrameskip-v4",
        f"--teacher={TEACHER}",
        "--variants=--amp",
        "--repeats=1",
        f"--out={out}",
        f"--against=other script={sys.executable} {script}",
    ]
    monkeypatch.setattr(sys, "argv", ["speed.py", *options])
    speed.main()

    content = json.loads(out.read_text())
    (other,) = content["runs"]["other script"]
    (ours,) = content["runs"]["this program --amp"]
    assert [other[phase] for phase in speed.PHASES] == pytest.approx([400, 50, 25])
    assert [ours[phase] for phase in speed.PHASES] == pytest.approx([400, 100, 50])
    assert other["host"] > 0.05
    row = "| this program --amp | 400.0 (1.0×) | 100.0 (2.0×) | 50.0 (2.0×) | 10.0 |"
    assert row in content["table"]
    assert str(tmp_path) not in out.read_text()


# ---- benchmark.sh


def benchmark(out: Path, *options, **variables) -> subprocess.Popen:
    command = ["bash", ROOT / "benchmark.sh", "--env-ids", GAME, "--out", out, "--games", 2]
    return start(*command, *options, PYTHON=sys.executable, **variables)


def test_games_seeds_and_kinds_make_the_grid_and_share_a_buffer(tmp_path):
    options = ["--program", FAKE, "--seeds", 1, 2, "--", "--teacher", os.path.relpath(TEACHER)]
    code, said = end(benchmark(tmp_path, *options))
    assert code == 0
    assert said.index(f"buffer-{GAME}: finished") < said.index("student")
    buffer = tmp_path / "buffers" / f"{GAME}.pt"
    assert buffer.read_text() == f"made by buffer-{GAME}"

    of_kind = {
        "student": f"--teacher-buffer {buffer}",
        "scratch": "--teacher none",
        "kickstart": "--offline-steps 0",
        "offline": f"--teacher-buffer {buffer} --total-timesteps 0",
    }
    expected = []
    for kind, flags in of_kind.items():
        for seed in (1, 2):
            common = f"--env-id {GAME} --teacher {TEACHER}"
            expected.append(f"{kind}-{GAME}-{seed} {common} {flags} --seed {seed} --save-model")
    (runs,) = tmp_path.glob("runs.*.txt")
    lines = runs.read_text().splitlines()
    assert [line.rstrip() for line in lines] == expected

    assert end(benchmark(tmp_path, *options)) == (0, "")
    code, _ = end(benchmark(tmp_path, *options, "--gamma", 3))
    assert code == 2


def test_two_at_the_same_grid_finish_it_together(tmp_path):
    options = ["--program", FAKE, "--seeds", 1, 2, "--kinds", "student"]
    together = [benchmark(tmp_path, *options) for _ in range(3)]
    for process in together:
        code, said = end(process)
        assert code == 0
        assert "FAILED" not in said
    assert len(calls(tmp_path / f"buffer-{GAME}")) == 1
    for seed in (1, 2):
        assert len(calls(tmp_path / f"student-{GAME}-{seed}")) == 2
    assert not list(tmp_path.glob("*.part"))


def command_of(run: Path) -> list[str]:
    return json.loads((run / "start").read_text())["command"]


@pytest.mark.parametrize("together", [False, True])
def test_of_all_values_only_the_path_of_a_teacher_is_changed(tmp_path, monkeypatch, together):
    monkeypatch.chdir(tmp_path)
    for name in ("1", "0.5", "teacher", GAME):  # values, and names of files
        Path(name).touch()
    teacher = ["--teacher", "teacher"]
    found = ["--teacher", f"{tmp_path}/teacher"]
    if together:
        teacher = ["--teacher=teacher"]
        found = [f"--teacher={tmp_path}/teacher"]

    out = tmp_path / "it's é"
    name = ["--exp-name", "its 'é'"]
    options = ["--program", os.path.relpath(FAKE), "--seeds", 1, "--kinds", "kickstart", "--"]
    options += ["--tau", 0.5, *teacher, *name]
    code, _ = end(benchmark(out, *options, LC_ALL="C"))
    assert code == 0
    common = ["--env-id", GAME, "--tau", "0.5", *found, *name]
    own = ["--offline-steps", "0", "--seed", "1", "--save-model"]
    assert command_of(out / f"kickstart-{GAME}-1") == [FAKE.name, *common, *own]


def test_the_buffers_run_has_no_flags_that_want_a_finished_student(tmp_path, monkeypatch):
    flags = ["--save-model", "--upload-model", "--track", "--capture-video"]
    options = ["--program", FAKE, "--seeds", 1, "--kinds", "student", "--", *flags]
    code, _ = end(benchmark(tmp_path, *options))
    assert code == 0

    monkeypatch.setattr(sys, "argv", command_of(tmp_path / f"student-{GAME}-1"))
    args = qdagger.parse_flags()
    assert args.save_model
    assert args.upload_model
    assert args.track
    assert args.capture_video

    monkeypatch.setattr(sys, "argv", command_of(tmp_path / f"buffer-{GAME}"))
    args = qdagger.parse_flags()
    assert not args.save_model
    assert not args.upload_model
    assert not args.track
    assert not args.capture_video
    qdagger.validate(args)


# Notes how it was called.
SBATCH = """#!/bin/sh
echo "$@" >>"$SUBMITTED"
echo "77;cluster"
"""


def test_lists_that_were_submitted_are_never_changed(tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "sbatch").write_text(SBATCH)
    (programs / "sbatch").chmod(0o755)
    submitted = tmp_path / "submitted"
    variables = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "SUBMITTED": str(submitted),
    }

    def submit(*seeds) -> list[Path]:
        options = ["--seeds", *seeds, "--kinds", "student", "--slurm", ROOT / "benchmark.slurm"]
        code, said = end(benchmark(tmp_path / "out", *options, **variables))
        assert code == 0
        lists = re.findall(r"runs of (.*): job 77$", said, flags=re.MULTILINE)
        return [Path(name) for name in lists]

    first_buffers, first_runs = submit(1, 2)
    text = first_runs.read_text()
    assert len(text.splitlines()) == 2
    second_buffers, second_runs = submit(2, 3, 4)
    assert second_buffers == first_buffers
    assert second_runs != first_runs
    assert first_runs.read_text() == text
    assert submit(1, 2) == [first_buffers, first_runs]

    of_buffers, of_runs = submitted.read_text().splitlines()[2:4]
    assert "--array=1-1 " in of_buffers
    assert "--dependency" not in of_buffers
    assert of_buffers.endswith(str(second_buffers))
    assert "--array=1-3 " in of_runs
    assert "--dependency=afterok:77" in of_runs
    assert of_runs.endswith(str(second_runs))


def test_the_scripts_need_no_newer_bash_than_that_of_macos():
    newer = ["realpath", "readarray", "mapfile", "declare -A", "local -n", "wait -n", "|&", "&>>"]
    for script in ("benchmark.sh", "benchmark.slurm"):
        text = re.sub(r"(^| )#.*", "", (ROOT / script).read_text(), flags=re.MULTILINE)
        for word in newer:
            assert word not in text
        assert re.search(r"\$\{\w+(\^|,|@)", text) is None  # upper and lower case, and others
        for array in re.findall(r"(\w+)=\(\)", text):  # 3.2 expands none that is empty
            expanded = f'"${{{array}[@]}}"'
            guarded = f"${{{array}[@]+{expanded}}}"
            assert guarded in text
            assert expanded not in text.replace(guarded, "")


@pytest.mark.parametrize(
    "options, words",
    [
        ("--seed 1", "--seed: no such option"),
        ("--seeds", "--seeds: a value is missing"),
        ("--kinds teacher", "--kinds teacher: none of"),
        ("--program x.py", "--program x.py: there is no such file"),
    ],
)
def test_wrong_options_get_one_line(tmp_path, options, words):
    code, said = end(benchmark(tmp_path, *options.split()))
    assert code == 2
    assert words in said
    assert len(said.splitlines()) == 1


def test_the_program_is_stopped_and_finishes(tmp_path, make_model):
    options = ["--env-ids", "ALE/Breakout-v5", "--seeds", 1, "--kinds", "student", "--"]
    options += [
        "--network=nature",
        "--teacher-steps=224",
        "--offline-steps=20",
        "--total-timesteps=400",
        "--learning-starts=200",
        "--buffer-size=2000",
        "--teacher-eval-episodes=1",
        "--eval-episodes=1",
        "--teacher",
        make_model(4, action=1),
    ]
    run = tmp_path / "student-ALE-Breakout-v5-1"
    log = run / "log"
    process = benchmark(tmp_path, *options)
    wait_for(lambda: log.exists() and "online:   " in log.read_text())
    process.terminate()
    code, _ = end(process)
    assert code == 143

    code, said = end(benchmark(tmp_path, *options))
    assert code == 0
    assert "--resume" in said
    plot.write_csv(tmp_path, tmp_path / "results.csv")
    rows = plot.read_csv(tmp_path / "results.csv")
    assert set(rows.run) == {run.name}
    assert set(rows.game) == {"Breakout"}
    assert rows[rows.tag == "score/games"].value.item() == 2
    assert plot.evaluations(rows).step.tolist() == [-20, 0, 400]


def free_ports(count: int) -> list[int]:
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    return ports


SLURM_CONF = """
ClusterName=test
SlurmUser=root
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={home}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MailProg=/bin/true
SlurmctldPidFile={home}/slurmctld.pid
SlurmctldLogFile={home}/slurmctld.log
StateSaveLocation={home}/state
SlurmdPidFile={home}/slurmd.pid
SlurmdLogFile={home}/slurmd.log
SlurmdSpoolDir={home}/spool
NodeName={host} NodeAddr=127.0.0.1 CPUs=2
PartitionName=main Nodes={host} Default=YES State=UP
"""


@pytest.fixture
def slurm(tmp_path):
    """A Slurm cluster of this machine alone.

    Gives the variables that lead to it, and what runs a command there.
    """
    installed = all(shutil.which(program) for program in ("munged", "slurmctld", "slurmd"))
    if os.geteuid() != 0 or not installed:
        pytest.skip("wants root and Slurm (Debian: slurm-wlm, munge)")

    home = tmp_path / "slurm"
    host = socket.gethostname().split(".")[0]
    (home / "state").mkdir(parents=True)
    configuration = SLURM_CONF.format(home=home, host=host, ports=free_ports(2))
    (home / "slurm.conf").write_text(configuration)
    variables = {"SLURM_CONF": str(home / "slurm.conf")}

    def run(*command) -> str:
        environment = os.environ | variables
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        return done.stdout

    files = [f"--{name}-file={home}/munge.{name}" for name in ("key", "log", "pid", "seed")]
    run("mungekey", "--create", f"--keyfile={home}/munge.key")
    try:
        run("munged", "--force", f"--socket={home}/munge.socket", *files)
        run("slurmctld")
        run("slurmd", "-N", host)
        wait_for(lambda: "idle" in run("sinfo", "-h", "-o", "%T"))
        yield variables, run
    finally:
        for name in ("slurmd", "slurmctld", "munge"):
            pid_file = home / f"{name}.pid"
            if pid_file.exists():
                os.kill(int(pid_file.read_text()), signal.SIGTERM)
        time.sleep(1)


@pytest.fixture
def template(tmp_path) -> Path:
    """benchmark.slurm, edited for a cluster without GPUs and with few cores."""
    text = (ROOT / "benchmark.slurm").read_text()
    text = text.replace("--cpus-per-task=4", "--cpus-per-task=1")
    text = re.sub("#SBATCH --(gpus|mem).*\n", "", text)
    edited = tmp_path / "edited.slurm"
    edited.write_text(text)
    return edited


def test_slurm_runs_warns_requeues_and_finishes(slurm, template, tmp_path):
    variables, run = slurm
    out = tmp_path / "out"
    student = out / f"student-{GAME}-1"
    offline = out / f"offline-{GAME}-1"
    options = ["--program", FAKE, "--seeds", 1, "--kinds", "student", "offline"]
    options += ["--slurm", template, "--", "--slow"]
    code, said = end(benchmark(out, *options, **variables))
    assert code == 0
    counts = re.findall(r"(\d) runs of ", said)
    assert counts == ["1", "2"]

    job = said.split(": job ")[-1].strip()
    for task, directory in enumerate((student, offline), 1):
        pid_of(directory)
        run("scancel", "--signal=USR1", "--batch", f"{job}_{task}")  # as before its time is over
    # Then both have written a checkpoint.
    wait_for(lambda: run("squeue", "-h", "-o", "%T").split() == ["PENDING"] * 2)
    time.sleep(5)  # a node takes no job whose end it has seen within the same second
    run("scontrol", "update", f"JobId={job}", "StartTime=now")  # Slurm would wait for two minutes
    wait_for(lambda: not run("squeue", "-h"))

    for directory in (student, offline):
        assert (directory / "signals").read_text() == str(int(signal.SIGUSR1))
        assert (directory / "score").exists()
        began, resumed, evaluated = calls(directory)
        assert "--resume" not in began
        assert "--resume" in resumed
        assert "--resume" not in evaluated
    buffer = out / "buffers" / f"{GAME}.pt"
    assert buffer.read_text() == f"made by buffer-{GAME}"

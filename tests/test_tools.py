"""tools/run.py, tools/plot.py, tools/speed.py and their numbers in the README; benchmark.sh, also on a real Slurm."""

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

import matplotlib
import numpy as np
import pandas as pd
import plot
import pytest
import speed
from torch.utils.tensorboard import SummaryWriter

matplotlib.use("agg")
ROOT, FAKE = Path(plot.__file__).parents[1], Path(__file__).parent / "fake_program.py"
GAME, TEACHER = "BreakoutNoFrameskip-v4", ROOT / "teachers" / "PongNoFrameskip-v4.cleanrl_model"
SLOW = "--save-model --slow"  # the stand-in trains until it is told to stop


def start(*command, **variables) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([str(word) for word in command], env=os.environ | variables, **pipes)


def end(process: subprocess.Popen) -> tuple[int, str]:
    said, _ = process.communicate(timeout=100)
    return process.returncode, said


def wait_for(condition) -> None:
    until = time.time() + 60
    while not condition():
        assert time.time() < until, "it never came"
        time.sleep(0.05)


def pid_of(run: Path) -> int:
    """Of its program, once it trains."""
    wait_for(lambda: (run / "pid").exists() and (run / "pid").read_text())
    return int((run / "pid").read_text())


def calls(run: Path) -> list[str]:
    return (run / "calls").read_text().splitlines()


@pytest.fixture
def grid(tmp_path):
    """grid(flags of each run, *options) starts tools/run.py; grid.runs are the directories of three runs."""

    def start_grid(lines, *options, **variables) -> subprocess.Popen:
        text = [
            f"{run.name} --env-id PongNoFrameskip-v4 {flags}\n"
            for run, flags in zip(start_grid.runs, lines)
        ]
        (tmp_path / "runs.txt").write_text("".join(text))
        options = "--program", FAKE, "--games=2", "--workers=1", *options
        return start(
            sys.executable, ROOT / "tools/run.py", tmp_path / "runs.txt", *options, **variables
        )

    start_grid.runs = [tmp_path / f"student-PongNoFrameskip-v4-{seed}" for seed in (1, 2, 3)]
    return start_grid


def test_every_run_is_trained_and_scored_and_what_is_finished_is_skipped(grid):
    lines = [
        "--save-model --repeat-action-probability=0.25",
        "--save-model --exp-name 'a b'",
        "--seed 3",
    ]
    assert end(grid(lines, "--line=3"))[0] == 0 and not grid.runs[0].exists()
    code, said = end(grid(lines, "--workers=2", CUDA_VISIBLE_DEVICES="2,5"))
    assert code == 0 and said.count("finished") == 2
    for run, gpu in zip(grid.runs, "25"):
        trained, evaluated = calls(run)
        assert (
            trained.startswith(gpu) and "--env-id PongNoFrameskip-v4 --eval-episodes 2" in evaluated
        )
        assert (run / "score").read_text() == "7.00 ± 1.50 over 2 games of PongNoFrameskip-v4\n"
    assert "--exp-name a b" in calls(grid.runs[1])[0]
    assert calls(grid.runs[0])[1].endswith("--repeat-action-probability 0.25")
    assert len(calls(grid.runs[2])) == 1  # without a model there is nothing to play with
    assert end(grid(lines)) == (0, "")
    code, said = end(grid(["--save-model --gamma 0.9"]))
    assert (
        code == 2
        and "other flags" in said
        and len(said.splitlines()) == 1
        and len(calls(grid.runs[0])) == 2
    )


def test_what_was_killed_is_resumed_once_nobody_is_at_work_there(grid):
    run, before_its_first_checkpoint = grid.runs[0], grid.runs[0] / "runs" / "old"
    before_its_first_checkpoint.mkdir(parents=True)
    process, program = grid([SLOW]), pid_of(run)
    process.kill()  # the program goes on, without anybody who waits for it
    end(process)
    code, said = end(grid([SLOW]))
    assert code == 1 and "another process is at work there" in said and len(calls(run)) == 1
    os.kill(program, signal.SIGKILL)
    wait_for(lambda: end(grid([SLOW]))[0] == 0)
    assert [re.findall("--slow|--resume|--evaluate", call)[0] for call in calls(run)[::2]] == [
        "--slow",
        "--evaluate",
    ]
    assert "--resume" in calls(run)[1] and not before_its_first_checkpoint.exists()


def test_failed_runs_are_named_with_their_logs_and_stop_no_other(grid):
    process, (failed, killed, fine) = grid(["--gamma 3", SLOW, "--save-model"]), grid.runs
    os.kill(pid_of(killed), signal.SIGKILL)
    code, said = end(process)
    assert code == 1 and (fine / "score").exists() and "exit code -9" in said
    for line, run in zip(said.splitlines()[-2:], (failed, killed)):
        assert line.endswith(f"FAILED: {run.name}, see {run / 'log'}")
    assert (failed / "log").read_text() == "error: --gamma 3: must lie between 0 and 1\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_passed_on_once_and_the_next_start_resumes(grid, number):
    process, (stopped, waiting, _) = grid([SLOW, "--seed 2"]), grid.runs
    pid_of(stopped)
    process.send_signal(number)
    code, said = end(process)
    assert code == 128 + number and "FAILED" not in said
    assert (stopped / "signals").read_text() == str(int(number)) and not waiting.exists()
    assert end(grid([SLOW, "--seed 2"]))[0] == 0
    assert "--resume" in calls(stopped)[1] and len(calls(waiting)) == 1


def made_up_run(run: Path, evaluations: list[float], score: str, updates: int) -> None:
    """A run as tools/run.py leaves it, with so many offline updates, and an evaluation every 100 steps and 10 s."""
    run.mkdir(parents=True)
    (run / "start").write_text(json.dumps({"time": 1000.0, "command": []}))
    (run / "score").write_text(f"{score} ± 1.50 over 30 games of Pong")
    with SummaryWriter(run / "runs" / "RUN") as log:
        if updates:
            log.add_scalar("charts/teacher/avg_episodic_return", 20, 0, walltime=1000)
            log.add_scalar(
                "charts/offline/avg_episodic_return", evaluations[0], updates, walltime=1000
            )
        for nth in range(1, len(evaluations)):
            log.add_scalar(
                "eval/episodic_return",
                evaluations[nth],
                updates + 100 * nth,
                walltime=1000 + 10 * nth,
            )
        for step in range(1200):
            log.add_scalar("losses/loss", step, step, walltime=1000 + step)


def test_event_files_and_the_csv_give_the_same_tables_and_figures(tmp_path, monkeypatch):
    benchmark, out, readme = tmp_path / "benchmark", tmp_path / "made_up", tmp_path / "README.md"
    made_up_run(benchmark / "student-PongNoFrameskip-v4-1", [5, 10, 12], "11.00", updates=1000)
    made_up_run(benchmark / "student-PongNoFrameskip-v4-2", [5, 10, 14], "12.00", updates=1000)
    made_up_run(benchmark / "student-PongNoFrameskip-v4-3", [5, 10, 13], "13.00", updates=1000)
    made_up_run(benchmark / "scratch-PongNoFrameskip-v4-1", [0, -20, -19], "-19.50", updates=0)
    made_up_run(benchmark / "buffer-PongNoFrameskip-v4", [0], "0.00", updates=1)
    readme.write_text("before\n<!-- made_up: begin -->\nold\n<!-- made_up: end -->\nafter\n")
    monkeypatch.setattr(plot, "README", readme)

    def plotted(*arguments) -> tuple[str, dict[str, bytes]]:
        monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, arguments), "--readme"])
        plot.main()
        return readme.read_text(), {path.name: path.read_bytes() for path in out.iterdir()}

    text, files = plotted(benchmark, "--out", out)
    assert plotted(out) == (text, files)  # from the CSV alone
    assert set(files) == {
        "results.csv",
        "scores.csv",
        "aggregates.csv",
        "curves.png",
        "aggregates.png",
    }
    assert all(
        plot.plt.imread(out / name).std() > 0.05 for name in ("curves.png", "aggregates.png")
    )
    assert text.startswith("before\n<!--") and text.endswith("-->\nafter\n") and "old" not in text
    table = (
        "the teacher | 20.0 | –",
        "QDagger student | 12.0 ± 2.5, 80% | 3",
        "DQN from scratch, same network | -19.5, 3% | 1",
    )
    assert "| Pong | seeds |\n" in text and "".join(f"| {row} |\n" for row in table) in text
    rows = plot.read_csv(out / "results.csv")
    loss = rows[(rows.run == "student-PongNoFrameskip-v4-2") & (rows.tag == "losses/loss")]
    assert len(loss) == 400 and loss.step.max() == 1199 and (loss.step == loss.value).all()
    points = plot.evaluations(rows).set_index("run")[["step", "value", "minutes"]]
    assert points.loc["student-PongNoFrameskip-v4-2"].values.tolist() == [
        [0, 5, 0],
        [100, 10, 1 / 6],
        [200, 14, 1 / 3],
    ]
    assert points.loc["scratch-PongNoFrameskip-v4-1", "step"].tolist() == [100, 200]
    table = plot.scores(rows).set_index(["kind", "seed"])
    assert table.loc["student", "1"].human_normalised == pytest.approx((11 + 20.7) / (14.6 + 20.7))
    assert table.loc["scratch", "1"].teacher_normalised == pytest.approx(1.2 / 40.7)
    (out / "teachers.csv").write_text("Pong,Breakout\n9.0,7\n9.6,7\n")
    table = plot.scores(plot.read_csv(out / "results.csv")).set_index(["kind", "seed"])
    assert table.loc["scratch", "1"].teacher_normalised == pytest.approx(1.2 / 30)


def test_interquartile_mean_and_intervals_are_the_known_ones():
    assert plot.interquartile_mean(np.arange(8.0) ** 2) == np.mean([4, 9, 16, 25])
    games, rng = (
        [level + np.linspace(-0.1, 0.1, 6) for level in (0.0, 1.0)],
        np.random.default_rng(1),
    )
    rows = [
        ("student", "AB"[nth], seed, value, np.nan)
        for nth in (0, 1)
        for seed, value in enumerate(games[nth])
    ]
    table = pd.DataFrame(rows, columns=["kind", "game", "seed", *plot.MEASURES])
    (row,) = plot.aggregates(table).itertuples()
    assert (row.games, row.runs, row.iqm) == (2, 12, pytest.approx(0.5))
    drawn = [
        np.sort(np.concatenate([rng.choice(game, 6) for game in games]))[3:9].mean()
        for _ in range(5000)
    ]
    assert [row.low, row.high] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.005)
    assert plot.aggregates(table.query("seed == 0")).empty  # one seed has no interval


def test_tables_of_the_readme_are_remade_from_what_is_committed():
    made, pattern = {}, r"<!-- (\w+): begin -->\n(.*?)\n?<!-- \1: end -->"
    for directory in (ROOT / "results").iterdir():
        made |= plot.json_tables(directory)
        if (directory / "results.csv").exists():
            rows = plot.read_csv(directory / "results.csv")
            made[directory.name] = plot.markdown(rows, plot.labels_of(directory, rows))
    pages = [plot.README, *(ROOT / "results").glob("*/README.md")]
    shown = dict(
        re.findall(pattern, "\n".join(page.read_text() for page in pages), flags=re.DOTALL)
    )
    assert made and made == {
        name: table for name, table in shown.items() if re.search(r"\d", table)
    }
    for path in (ROOT / "results" / "speed").glob("*.json"):
        content = json.loads(path.read_text())
        if "runs" in content:
            assert speed.table_of(content["runs"], "other script") == content["table"]


SCRIPT = f"""
import sys
from huggingface_hub import hf_hub_download as download
from torch.utils.tensorboard import SummaryWriter
assert "--env-id=PongNoFrameskip-v4" in sys.argv and "--learning-starts=400" in sys.argv
teacher = download("cleanrl/PongNoFrameskip-v4-dqn_atari-seed1", "dqn_atari.cleanrl_model")
assert open(teacher, "rb").read() == open("{TEACHER}", "rb").read()
faster = 1 + ("--amp" in sys.argv)
with SummaryWriter("runs/RUN") as log:
    log.add_scalar("charts/teacher/avg_episodic_return", 20, 0, walltime=1000)
    for nth in range(10):
        log.add_scalar("charts/offline/loss", 1, 100 * nth, walltime=1010 + 2 * nth / faster)
        log.add_scalar("losses/td_loss", 1, 100 * nth, walltime=2000 + (4 * nth / faster if nth > 1 else -100))
"""


def test_speed_of_variants_and_of_another_script(tmp_path, monkeypatch):
    script, out = tmp_path / "script.py", tmp_path / "speed.json"
    script.write_text(SCRIPT)
    monkeypatch.setattr(speed, "PROGRAM", script)
    options = [
        "--env-id=PongNoFrameskip-v4",
        f"--teacher={TEACHER}",
        "--variants=--amp",
        "--repeats=1",
        f"--out={out}",
    ]
    monkeypatch.setattr(
        sys, "argv", ["speed.py", *options, f"--against=other script={sys.executable} {script}"]
    )
    speed.main()
    content = json.loads(out.read_text())
    (other,), (ours,) = content["runs"]["other script"], content["runs"]["this program --amp"]
    assert [other[phase] for phase in speed.PHASES] == pytest.approx([400, 50, 25]) and other[
        "host"
    ] > 0.05
    assert [ours[phase] for phase in speed.PHASES] == pytest.approx([400, 100, 50])
    assert (
        "| this program --amp | 400.0 (1.0×) | 100.0 (2.0×) | 50.0 (2.0×) | 10.0 |"
        in content["table"]
    )
    assert str(tmp_path) not in out.read_text()


def benchmark(out: Path, *options, **variables) -> subprocess.Popen:
    command = [
        "bash",
        ROOT / "benchmark.sh",
        "--env-ids",
        GAME,
        "--out",
        out,
        "--games",
        2,
        *options,
    ]
    return start(*command, PYTHON=sys.executable, **variables)


def test_games_seeds_and_kinds_make_the_grid_and_share_a_buffer(tmp_path):
    buffer, flags = tmp_path / "buffers" / f"{GAME}.pt", f"--env-id {GAME} --teacher {TEACHER} "
    options = ["--program", FAKE, "--seeds", 1, 2, "--", "--teacher", os.path.relpath(TEACHER)]
    code, said = end(benchmark(tmp_path, *options))
    assert code == 0 and said.index(f"buffer-{GAME}: finished") < said.index("student")
    assert buffer.read_text() == f"made by buffer-{GAME}"
    of_kind = {
        "student": f"--teacher-buffer {buffer}",
        "scratch": "--teacher none",
        "kickstart": "--offline-steps 0",
    }
    of_kind["offline"] = f"--teacher-buffer {buffer} --total-timesteps 0"
    assert (tmp_path / "runs.txt").read_text().replace(" \n", "\n").splitlines() == [
        f"{kind}-{GAME}-{seed} {flags}{of_kind[kind]} --seed {seed} --save-model"
        for kind in of_kind
        for seed in (1, 2)
    ]
    assert end(benchmark(tmp_path, *options)) == (0, "")
    assert end(benchmark(tmp_path, *options, "--gamma", 3))[0] == 2


def test_wrong_options_get_one_line(tmp_path):
    wrong = {"--seed 1": "--seed: no such option", "--seeds": "--seeds: a value is missing"}
    wrong |= {
        "--kinds teacher": "--kinds teacher: none of",
        "--program x.py": "--program x.py: there is no such file",
    }
    for options, words in wrong.items():
        code, said = end(benchmark(tmp_path, *options.split()))
        assert code == 2 and words in said and len(said.splitlines()) == 1


def test_the_program_is_stopped_and_finishes(tmp_path, make_model):
    flags = "--network=nature --teacher-steps=224 --offline-steps=20 --total-timesteps=400 --learning-starts=200 "
    flags += "--buffer-size=2000 --teacher-eval-episodes=1 --eval-episodes=1 --teacher"
    options = [
        "--env-ids",
        "ALE/Breakout-v5",
        "--seeds",
        1,
        "--kinds",
        "student",
        "--",
        *flags.split(),
    ]
    options.append(make_model(4, action=1))
    process, log = benchmark(tmp_path, *options), tmp_path / "student-ALE-Breakout-v5-1" / "log"
    wait_for(lambda: log.exists() and "online:   " in log.read_text())
    process.terminate()
    assert end(process)[0] == 143
    code, said = end(benchmark(tmp_path, *options))
    assert code == 0 and "--resume" in said
    plot.write_csv(tmp_path, tmp_path / "results.csv")
    rows = plot.read_csv(tmp_path / "results.csv")
    assert set(rows.run) == {log.parent.name} and set(rows.game) == {"Breakout"}
    assert rows[rows.tag == "score/games"].value.item() == 2
    assert plot.evaluations(rows).step.tolist() == [-20, 0, 400]


@pytest.fixture
def slurm(tmp_path):
    """A Slurm cluster of this machine alone: the variables that lead to it, and what runs a command there."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("munged", "slurmctld", "slurmd"))):
        pytest.skip("wants root and Slurm (Debian: slurm-wlm, munge)")
    home, host = tmp_path / "slurm", socket.gethostname().split(".")[0]
    (home / "state").mkdir(parents=True)
    with (
        socket.create_server(("127.0.0.1", 0)) as one,
        socket.create_server(("127.0.0.1", 0)) as other,
    ):
        ports = one.getsockname()[1], other.getsockname()[1]
    settings = f"""
ClusterName=test, SlurmUser=root, SlurmctldHost={host}(127.0.0.1), SlurmctldPort={ports[0]}, SlurmdPort={ports[1]}
AuthType=auth/munge, AuthInfo=socket={home}/munge.socket, ProctrackType=proctrack/linuxproc, TaskPlugin=task/none
SelectType=select/cons_tres, SelectTypeParameters=CR_Core, MailProg=/bin/true
SlurmctldPidFile={home}/slurmctld.pid, SlurmctldLogFile={home}/slurmctld.log, StateSaveLocation={home}/state
SlurmdPidFile={home}/slurmd.pid, SlurmdLogFile={home}/slurmd.log, SlurmdSpoolDir={home}/spool
NodeName={host} NodeAddr=127.0.0.1 CPUs=2
PartitionName=main Nodes={host} Default=YES State=UP
"""
    (home / "slurm.conf").write_text(settings.replace(", ", "\n"))
    variables = {"SLURM_CONF": str(home / "slurm.conf")}

    def run(*command) -> str:
        return subprocess.run(
            command, env=os.environ | variables, check=True, capture_output=True, text=True
        ).stdout

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
            if (home / f"{name}.pid").exists():
                os.kill(int((home / f"{name}.pid").read_text()), signal.SIGTERM)
        time.sleep(1)


def test_slurm_runs_warns_requeues_and_finishes(slurm, tmp_path):
    variables, run = slurm
    template = (
        (ROOT / "benchmark.slurm").read_text().replace("--cpus-per-task=4", "--cpus-per-task=1")
    )
    out, edited = tmp_path / "out", tmp_path / "edited.slurm"  # for a cluster without GPUs
    edited.write_text(re.sub("#SBATCH --(gpus|mem).*\n", "", template))
    student, offline = out / f"student-{GAME}-1", out / f"offline-{GAME}-1"
    options = ["--program", FAKE, "--seeds", 1, "--kinds", "student", "offline"]
    code, said = end(benchmark(out, *options, "--slurm", edited, "--", "--slow", **variables))
    assert (
        code == 0
        and f"1 runs of {out}/buffers.txt: job" in said
        and f"2 runs of {out}/runs.txt: job" in said
    )
    job = said.split("runs.txt: job ")[1].strip()
    for task, directory in enumerate((student, offline), 1):
        pid_of(directory)
        run("scancel", "--signal=USR1", "--batch", f"{job}_{task}")  # as before its time is over
    wait_for(
        lambda: run("squeue", "-h", "-o", "%T").split() == ["PENDING"] * 2
    )  # both have written a checkpoint
    time.sleep(5)  # a node takes no job whose end it has seen within the same second
    run("scontrol", "update", f"JobId={job}", "StartTime=now")  # Slurm would wait for two minutes
    wait_for(lambda: not run("squeue", "-h"))
    for directory in (student, offline):
        assert (directory / "signals").read_text() == str(int(signal.SIGUSR1)) and (
            directory / "score"
        ).exists()
        assert ["--resume" in call for call in calls(directory)] == [False, True, False]
    assert (out / "buffers" / f"{GAME}.pt").read_text() == f"made by buffer-{GAME}"

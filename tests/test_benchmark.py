"""benchmark.sh and results/reproduce.sh with tiny numbers: cut off and gone on with, here and on a real Slurm."""

import csv
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from contextlib import closing
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
TEACHER = ROOT / "teachers" / "BreakoutNoFrameskip-v4.cleanrl_model"
TINY = ["--teacher", TEACHER, "--network", "nature", "--total-timesteps", 600, "--learning-starts", 200]
TINY += ["--buffer-size", 2000, "--eval-episodes", 1, "--teacher-eval-episodes", 1]
TINY += ["--teacher-steps", 200, "--offline-steps", 20]
GAME = "BreakoutNoFrameskip-v4"


def start(script: str, *options, flags=(), **variables) -> subprocess.Popen:
    command = ["bash", ROOT / script, *options, *(["--", *flags] if flags else [])]
    return subprocess.Popen(
        [str(part) for part in command],
        env=os.environ | {"PYTHON": sys.executable} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen, seconds: float = 300) -> tuple[int, str]:
    said, _ = process.communicate(timeout=seconds)
    return process.returncode, said


def wait_for(condition, seconds: float = 200) -> None:
    until = time.time() + seconds
    while not condition():
        assert time.time() < until, "it never came"
        time.sleep(0.2)


def steps_in(log: Path, phase: str) -> bool:
    """Whether a progress bar of that phase has moved."""
    text = log.read_text() if log.exists() else ""
    return any(line.startswith(f"{phase}:") and " 0/" not in line for line in text.replace("\r", "\n").split("\n"))


def scores(out: Path, stage: str) -> dict[str, float]:
    with (out / f"{stage}.csv").open() as file:
        return {row["run"]: float(row["value"]) for row in csv.DictReader(file) if row["tag"] == "score/mean"}


def test_a_benchmark_is_stopped_killed_and_finished(tmp_path):
    long = [*TINY, "--total-timesteps", 3000]
    options = ["--env-ids", GAME, "--seeds", 1, "--kinds", "student", "scratch", "--workers", 2, "--games", 1]
    options += ["--out", tmp_path]
    student, scratch = (tmp_path / f"{kind}-{GAME}-1" for kind in ("student", "scratch"))

    first = start("benchmark.sh", *options, flags=long)
    wait_for(lambda: steps_in(student / "log", "online"))
    first.terminate()
    code, said = end(first)
    assert code == 143 and f"{student.name}: stopped" in said
    assert any(student.glob("runs/*/checkpoints/*.checkpoint")) and not (student / "score").exists()

    second = start("benchmark.sh", *options, flags=long)
    wait_for(lambda: "--resume" in (student / "log").read_text() and steps_in(scratch / "log", "online"))
    os.killpg(second.pid, signal.SIGKILL)  # the runs themselves go on, without anybody who waits for them
    second.wait()

    code, said = end(start("benchmark.sh", *options, flags=long))
    assert code == 0, said
    assert set(scores(tmp_path, "results")) == {student.name, scratch.name}
    assert len(list(student.glob("runs/*"))) == 1
    before = (tmp_path / "log.txt").read_text()
    code, said = end(start("benchmark.sh", *options, flags=long))  # nothing is left to do
    assert code == 0 and "begins" not in said and (tmp_path / "log.txt").read_text() == before

    code, said = end(start("benchmark.sh", *options, flags=[*long, "--gamma", 0.9]))
    assert code == 2 and "other flags" in said


def test_what_another_process_has_finished_meanwhile_is_left_alone(tmp_path):
    run = tmp_path / f"scratch-{GAME}-1"
    run.mkdir()
    (run / "flags").write_text("--no-such-flag\n")
    with (run / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [sys.executable, ROOT / "results" / "grid.py", run, "--log", tmp_path / "log"]
        grid = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        wait_for(lambda: (tmp_path / "log").exists() and "waiting for it" in (tmp_path / "log").read_text())
        (run / "score").write_text("1.00 ± 0.00 over 1 games")
    assert end(grid)[0] == 0 and "begins" not in (tmp_path / "log").read_text()
    assert not (run / "runs").exists() and not (run / "seconds").exists()


def test_a_failed_run_is_named_with_its_log(tmp_path):
    options = ["--env-ids", GAME, "--kinds", "scratch", "--seeds", 1, 2, "--out", tmp_path, "--workers", 2]
    code, said = end(start("benchmark.sh", *options, flags=["--gamma", 3]))
    assert code == 1
    for seed in (1, 2):
        run = tmp_path / f"scratch-{GAME}-{seed}"
        assert f"FAILED: {run.name}, see {run / 'log'}" in said
        assert "--gamma 3.0: must lie between 0 and 1" in (run / "log").read_text()


@pytest.mark.parametrize(
    ("script", "options", "words"),
    [
        ("benchmark.sh", ["--seed", "1"], "--seed: no such option"),
        ("benchmark.sh", ["--seeds", "one"], "one: not a number"),
        ("benchmark.sh", ["--kinds", "teacher"], "--kinds teacher"),
        ("results/reproduce.sh", ["--only", "learning"], "--only learning: no such stage"),
        ("results/reproduce.sh", ["--minutes", "x"], "x: not a number"),
        ("results/reproduce.sh", ["--out"], "--out: a value is missing"),
        ("results/ablation.sh", ["--out"], "--out: a value is missing"),
        ("results/ablation.sh", ["--seed", "1"], "--seed: no such option"),
    ],
)
def test_wrong_options_get_one_line(script, options, words, tmp_path):
    code, said = end(start(script, *options))
    assert code == 2 and words in said and len(said.splitlines()) == 1


def test_every_stage_of_reproduce(tmp_path):
    out = tmp_path / "out"
    options = ["--small", "--env-ids", GAME, "--seeds", 1, "--workers", 2, "--out", out]

    code, said = end(start("results/reproduce.sh", *options, "--only", "teachers", "--minutes", 1))
    assert code == 0, said  # a minute is short: 45 s of it are kept for checkpoints and summary
    assert "stopped" in said or "begins" in said
    code, said = end(start("results/reproduce.sh", *options, "--only", "teachers", "students", "controls"))
    assert code == 0, said
    assert set(scores(out, "teachers")) == {f"teacher-{GAME}-1"}
    assert set(scores(out, "students")) == {f"student-{GAME}-1"}
    assert set(scores(out, "controls")) == {f"scratch-{GAME}-1", f"offline-{GAME}-1"}
    summary = (out / "SUMMARY.md").read_text()
    assert f"| teacher-{GAME}-1 | finished | 1,200 |" in summary and torch.__version__.split("+")[0] in summary
    files = list(out.iterdir())
    assert len(files) <= 8 and all(file.is_file() and file.stat().st_size < 16e6 for file in files)
    with zipfile.ZipFile(out / "weights.zip") as archive, archive.open(f"teacher-{GAME}-1.cleanrl_model") as file:
        assert {value.dtype for value in torch.load(file, weights_only=True).values()} == {torch.float16}

    shutil.rmtree(f"{out}.work")  # as on another machine, which has the small files alone
    began = time.time()
    code, said = end(start("results/reproduce.sh", *options, "--only", "teachers", "students", "controls"))
    assert code == 0 and ": begins" not in said and time.time() - began < 100
    assert scores(out, "students") and (out / "SUMMARY.md").read_text().count("finished") == 4


def test_the_check_and_the_speed_stage_of_reproduce(tmp_path):
    code, said = end(start("results/reproduce.sh", "--small", "--out", tmp_path / "out", "--only", "check", "speed"))
    assert code == 0, said
    check = json.loads((tmp_path / "out" / "check.json").read_text())
    assert check["tests"] >= 5 and check["failures"] == check["errors"] == 0
    speed = json.loads((tmp_path / "out" / "speed.json").read_text())
    assert all(run["online"] > 0 for runs in speed["runs"].values() for run in runs)
    assert speed["table"] in (tmp_path / "out" / "SUMMARY.md").read_text()


@pytest.fixture
def slurm(tmp_path):
    """A Slurm cluster of this machine alone: munge, controller and node; the variables that lead to it."""
    programs = ["munged", "mungekey", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel", "sinfo"]
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        pytest.skip(f"there is no {', '.join(missing)} (Debian: slurm-wlm)")
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons want root")
    ports = []
    for _ in range(2):
        with closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    home, host = tmp_path / "slurm", socket.gethostname().split(".")[0]
    for name in ("state", "spool"):
        (home / name).mkdir(parents=True)
    settings = f"""
        ClusterName=test
        SlurmctldHost={host}(127.0.0.1)
        SlurmctldPort={ports[0]}
        SlurmdPort={ports[1]}
        SlurmUser=root
        AuthType=auth/munge
        AuthInfo=socket={home}/munge.socket
        ProctrackType=proctrack/linuxproc
        TaskPlugin=task/none
        SelectType=select/cons_tres
        SelectTypeParameters=CR_Core
        StateSaveLocation={home}/state
        SlurmdSpoolDir={home}/spool
        SlurmctldPidFile={home}/slurmctld.pid
        SlurmdPidFile={home}/slurmd.pid
        SlurmctldLogFile={home}/slurmctld.log
        SlurmdLogFile={home}/slurmd.log
        MailProg=/bin/true
        NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
        PartitionName=main Nodes={host} Default=YES State=UP
    """
    (home / "slurm.conf").write_text("\n".join(line.strip() for line in settings.splitlines()))
    variables = {"SLURM_CONF": str(home / "slurm.conf")}

    def run(*command) -> str:
        return subprocess.run(command, env=os.environ | variables, check=True, capture_output=True, text=True).stdout

    munge = {name: f"{home}/munge.{name}" for name in ("key", "log", "pid", "seed", "socket")}
    run("mungekey", "--create", f"--keyfile={munge['key']}")
    try:
        run("munged", "--force", *(f"--{name}{'' if name == 'socket' else '-file'}={munge[name]}" for name in munge))
        run("slurmctld")
        run("slurmd", "-N", host)
        wait_for(lambda: "idle" in run("sinfo", "-h", "-o", "%T"), 60)
        yield variables, run
    finally:
        for name in ("slurmd", "slurmctld", "munge"):
            pid = home / f"{name}.pid"
            if pid.exists():
                os.kill(int(pid.read_text()), signal.SIGTERM)
        time.sleep(1)


def test_slurm_runs_warns_requeues_and_finishes(slurm, tmp_path):
    variables, run = slurm
    out = tmp_path / "out"
    options = ["--env-ids", GAME, "--kinds", "student", "scratch", "--seeds", 1, "--out", out, "--games", 1]
    options += ["--gpus-per-task", 0]
    code, said = end(
        start("benchmark.sh", *options, "--slurm", "--time=30", flags=[*TINY, "--total-timesteps", 2000], **variables)
    )
    assert code == 0, said
    assert "teacher buffers: job" in said and "2 runs: job" in said
    job = said.split("runs: job ")[1].split(";")[0]

    student, scratch = (out / f"{kind}-{GAME}-1" for kind in ("student", "scratch"))
    wait_for(lambda: steps_in(student / "log", "online"))
    task = (out / "runs").read_text().split("\n").index(str(student))
    run("scancel", "--signal=USR1", "--batch", f"{job}_{task}")  # as before its time is over
    wait_for(lambda: "--resume" in (student / "log").read_text())  # it has written a checkpoint
    wait_for(lambda: "PENDING" in run("squeue", "-h", "-o", "%T") or (student / "score").exists())
    time.sleep(5)  # a node takes no job whose end it has seen within the same second
    run("scontrol", "update", f"JobId={job}_{task}", "StartTime=now")  # Slurm would wait for two minutes
    wait_for(lambda: (student / "score").exists() and (scratch / "score").exists())
    wait_for(lambda: not run("squeue", "-h"))
    assert len(list(student.glob("runs/*"))) == 1 and len((student / "seconds").read_text().split()) == 3
    assert (out / "buffers" / f"{GAME}.pt").exists()

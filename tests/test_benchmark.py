"""benchmark.sh: its grid, with a stand-in and with the program, and on a real Slurm."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import plot
import pytest
from test_tools import FAKE, ROOT, calls, end, pid_of, start, wait_for

GAME = "BreakoutNoFrameskip-v4"
TEACHER = ROOT / "teachers" / f"{GAME}.cleanrl_model"


def benchmark(out: Path, *options, **variables) -> subprocess.Popen:
    command = ["bash", ROOT / "benchmark.sh", "--env-ids", GAME, "--out", out, "--games", 2, *options]
    return start(*command, PYTHON=sys.executable, **variables)


def test_games_seeds_and_kinds_make_the_grid_and_share_a_buffer(tmp_path):
    buffer, flags = tmp_path / "buffers" / f"{GAME}.pt", f"--env-id {GAME} --teacher {TEACHER} "
    options = ["--program", FAKE, "--seeds", 1, 2, "--", "--teacher", os.path.relpath(TEACHER)]
    code, said = end(benchmark(tmp_path, *options))
    assert code == 0 and said.index(f"buffer-{GAME}: finished") < said.index("student")
    assert buffer.read_text() == f"made by buffer-{GAME}"
    of_kind = {"student": f"--teacher-buffer {buffer}", "scratch": "--teacher none", "kickstart": "--offline-steps 0"}
    of_kind["offline"] = f"--teacher-buffer {buffer} --total-timesteps 0"
    assert (tmp_path / "runs.txt").read_text().replace(" \n", "\n").splitlines() == [
        f"{kind}-{GAME}-{seed} {flags}{of_kind[kind]} --seed {seed} --save-model" for kind in of_kind for seed in (1, 2)
    ]
    assert end(benchmark(tmp_path, *options)) == (0, "")
    assert end(benchmark(tmp_path, *options, "--gamma", 3))[0] == 2


def test_wrong_options_get_one_line(tmp_path):
    wrong = {"--seed 1": "--seed: no such option", "--seeds": "--seeds: a value is missing"}
    wrong |= {"--kinds teacher": "--kinds teacher: none of", "--program x.py": "--program x.py: there is no such file"}
    for options, words in wrong.items():
        code, said = end(benchmark(tmp_path, *options.split()))
        assert code == 2 and words in said and len(said.splitlines()) == 1


def test_the_program_is_stopped_and_finishes(tmp_path, make_model):
    flags = "--network=nature --teacher-steps=224 --offline-steps=20 --total-timesteps=400 --learning-starts=200 "
    flags += "--buffer-size=2000 --teacher-eval-episodes=1 --eval-episodes=1 --teacher"
    options = ["--seeds", 1, "--kinds", "student", "--", *flags.split(), make_model(4, action=1)]
    process, log = benchmark(tmp_path, *options), tmp_path / f"student-{GAME}-1" / "log"
    wait_for(lambda: log.exists() and "online:   " in log.read_text())
    process.terminate()
    assert end(process)[0] == 143
    code, said = end(benchmark(tmp_path, *options))
    assert code == 0 and "--resume" in said
    plot.write_csv(tmp_path, tmp_path / "results.csv")
    rows = plot.read_csv(tmp_path / "results.csv")
    assert set(rows.run) == {log.parent.name} and rows[rows.tag == "score/games"].value.item() == 2
    assert plot.evaluations(rows).step.tolist() == [-20, 0, 400]


@pytest.fixture
def slurm(tmp_path):
    """A Slurm cluster of this machine alone: the variables that lead to it, and what runs a command there."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("munged", "slurmctld", "slurmd"))):
        pytest.skip("wants root and Slurm (Debian: slurm-wlm, munge)")
    home, host = tmp_path / "slurm", socket.gethostname().split(".")[0]
    (home / "state").mkdir(parents=True)
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
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
        return subprocess.run(command, env=os.environ | variables, check=True, capture_output=True, text=True).stdout

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
    template = (ROOT / "benchmark.slurm").read_text().replace("--cpus-per-task=4", "--cpus-per-task=1")
    out, edited = tmp_path / "out", tmp_path / "edited.slurm"  # for a cluster without GPUs
    edited.write_text(re.sub("#SBATCH --(gpus|mem).*\n", "", template))
    student, offline = out / f"student-{GAME}-1", out / f"offline-{GAME}-1"
    options = ["--program", FAKE, "--seeds", 1, "--kinds", "student", "offline"]
    code, said = end(benchmark(out, *options, "--slurm", edited, "--", "--slow", **variables))
    assert code == 0 and f"1 runs of {out}/buffers.txt: job" in said and f"2 runs of {out}/runs.txt: job" in said
    job = said.split("runs.txt: job ")[1].strip()
    for task, directory in enumerate((student, offline), 1):
        pid_of(directory)
        run("scancel", "--signal=USR1", "--batch", f"{job}_{task}")  # as before its time is over
    wait_for(lambda: run("squeue", "-h", "-o", "%T").split() == ["PENDING"] * 2)  # both have written a checkpoint
    time.sleep(5)  # a node takes no job whose end it has seen within the same second
    run("scontrol", "update", f"JobId={job}", "StartTime=now")  # Slurm would wait for two minutes
    wait_for(lambda: not run("squeue", "-h"))
    for directory in (student, offline):
        assert (directory / "signals").read_text() == str(int(signal.SIGUSR1)) and (directory / "score").exists()
        assert ["--resume" in call for call in calls(directory)] == [False, True, False]
    assert (out / "buffers" / f"{GAME}.pt").read_text() == f"made by buffer-{GAME}"

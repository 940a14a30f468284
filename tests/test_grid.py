"""results/grid.py with a stand-in for the program: who is started, with what, and who is told to stop."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import grid
import pytest

# Notes how it was called. Trains until it is told to stop, if it is to be slow; evaluates at once.
STAND_IN = """
import os, pathlib, signal, sys, time
here = pathlib.Path.cwd()
with (here / "calls").open("a") as calls:
    calls.write(os.environ.get("CUDA_VISIBLE_DEVICES", "none") + " " + " ".join(sys.argv[1:]) + "\\n")
if "--evaluate" in sys.argv:
    print("game 1: 7")
    print("7.00 ± 0.00 over 1 games of PongNoFrameskip-v4")
    sys.exit()
if "--fail" in sys.argv:
    sys.exit("error: --fail: as it was told")
run = here / "runs" / "PongNoFrameskip-v4__x__1__2"
(run / "checkpoints").mkdir(parents=True, exist_ok=True)
(run / "m.cleanrl_model").touch()
signals = []
signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
print("online: 50%", flush=True)
if "--slow" in sys.argv:
    while not signals:
        time.sleep(0.05)
    time.sleep(1.5)
    (run / "checkpoints" / "000001.checkpoint").touch()
    (here / "signals").write_text(str(len(signals)))
    sys.exit(128 + signals[0])
"""


@pytest.fixture
def run_grid(tmp_path, monkeypatch):
    """run_grid(flags of each run, *options) starts results/grid.py on them, with the stand-in."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    source = Path(grid.__file__).read_text()
    assert source.count('/ "qdagger_dqn_atari_impalacnn.py"') == 1
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "grid.py").write_text(source.replace("qdagger_dqn_atari_impalacnn.py", "stand_in.py"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def start(flags: list[str], *options) -> tuple[subprocess.Popen, list[Path]]:
        directories = [tmp_path / f"run-{nth}" for nth in range(len(flags))]
        for directory, of_run in zip(directories, flags):
            directory.mkdir(exist_ok=True)
            (directory / "flags").write_text(of_run)
        command = [sys.executable, tmp_path / "results" / "grid.py", "--games", "1", *options, *directories]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen([str(part) for part in command], **pipes), directories

    return start


def calls(directory: Path) -> list[str]:
    return (directory / "calls").read_text().splitlines()


def wait_for(path: Path) -> None:
    until = time.time() + 30
    while not path.exists():
        assert time.time() < until
        time.sleep(0.05)


def test_every_run_is_trained_and_scored_once(run_grid):
    for _ in range(2):
        process, directories = run_grid(["--seed\n1", "--seed\n2", "--seed\n3"], "--workers", "2")
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 0
    assert "begins" not in said
    for seed, directory in enumerate(directories, 1):
        trained, evaluated = calls(directory)
        assert trained == f"none --seed {seed}"
        assert "--evaluate" in evaluated and "--env-id PongNoFrameskip-v4 --eval-episodes 1" in evaluated
        assert "7.00 ± 0.00" in (directory / "score").read_text()
        assert len((directory / "seconds").read_text().split()) == 2


def test_runs_spread_over_the_gpus(run_grid, tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nprintf '40000\\n20000\\n'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    process, directories = run_grid(["--slow"] * 4, "--workers", "4")
    for directory in directories:
        wait_for(directory / "runs")
    process.terminate()
    process.communicate(timeout=60)
    assert sorted(calls(directory)[0].split()[0] for directory in directories) == ["0", "0", "1", "1"]

    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert grid.gpu_memories() == [40000, 20000] and grid.default_workers() == 3 + 1  # 13 GB each
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert grid.default_workers() == 2


def test_without_a_gpu_there_are_two_cores_for_each_run(monkeypatch):
    monkeypatch.setattr(grid, "gpu_memories", list)
    for cores, workers in ((1, 1), (2, 1), (8, 4)):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        assert grid.default_workers() == workers


@pytest.mark.parametrize("how", ["signal", "twice", "deadline"])
def test_a_stop_is_passed_on_once_and_the_next_start_resumes(run_grid, how):
    process, (slow, waiting) = run_grid(
        ["--slow", "--seed\n2"], "--workers", "1", *["--seconds", "3"][: 2 * (how == "deadline")]
    )
    wait_for(slow / "runs")
    for _ in range({"signal": 1, "twice": 2, "deadline": 0}[how]):
        process.send_signal(signal.SIGTERM)  # from the terminal and from a script, say
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "run-0: stopped" in said
    assert (slow / "signals").read_text() == "1" and not (waiting / "calls").exists()

    process, _ = run_grid(["--slow", "--seed\n2"], "--workers", "1")
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert [call.split()[1] for call in calls(slow)] == ["--slow", "--resume", "--evaluate"]
    assert calls(waiting)[0] == "none --seed 2"


def test_a_run_without_a_checkpoint_begins_anew(run_grid, tmp_path):
    left = tmp_path / "run-0" / "runs" / "old"
    left.mkdir(parents=True)
    process, (directory,) = run_grid(["--seed\n1"])
    process.communicate(timeout=60)
    assert process.returncode == 0 and not left.exists() and calls(directory)[0] == "none --seed 1"


def test_failures_do_not_stop_the_others_and_are_named(run_grid):
    process, (failing, fine) = run_grid(["--fail", "--seed\n2"], "--workers", "1")
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and (fine / "score").exists()
    assert "run-0: FAILED with exit code 1. error: --fail: as it was told" in said
    assert said.strip().split("\n")[-1].endswith(f"FAILED: run-0, see {failing / 'log'}")


def test_nobody_begins_where_somebody_is_still_at_work(run_grid):
    first, (slow,) = run_grid(["--slow"])
    wait_for(slow / "runs")
    first.kill()  # the program itself goes on
    first.communicate()
    second, _ = run_grid(["--slow"])
    assert "another process is at work there" in second.stdout.readline()
    assert len(calls(slow)) == 1
    second.terminate()
    second.communicate(timeout=60)
    assert second.returncode == 143 and len(calls(slow)) == 1
    subprocess.run(["pkill", "-TERM", "-f", str(slow.parent / "stand_in.py")])

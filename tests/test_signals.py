"""Seen from outside: runs that are interrupted or killed; and the memory of one that goes on for long."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import points

import qdagger_dqn_atari_impalacnn as qdagger

FLAGS = ["--teacher-steps=80", "--offline-steps=20", "--total-timesteps=160", "--learning-starts=60"]
FLAGS += ["--buffer-size=100", "--network=nature", "--batch-size=4", "--teacher-eval-episodes=1", "--eval-episodes=1"]
FLAGS += ["--num-envs=2", "--checkpoint-frequency=8", "--no-cuda", "--save-model"]


def start(cwd: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, qdagger.__file__, *flags]
    return subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def wait_for(pattern: str, cwd: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not list(cwd.glob(pattern)):
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.02)


@pytest.mark.parametrize("number, to_all", [(signal.SIGINT, True), (signal.SIGTERM, True), (signal.SIGUSR1, False)])
def test_a_signal_ends_with_a_checkpoint_and_the_command_that_goes_on(make_model, tmp_path, number, to_all):
    """Whether it comes from the terminal, to all processes, or from a scheduler, to one."""
    process = start(tmp_path, "--teacher", str(make_model(4, action=1)), *FLAGS, "--total-timesteps=100000")
    wait_for("runs/*/checkpoints/*.checkpoint", tmp_path, process)
    (os.killpg if to_all else os.kill)(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert "Traceback" not in output
    (run,) = (tmp_path / "runs").iterdir()
    assert output.splitlines()[-1].endswith(f"--resume {run.relative_to(tmp_path)}")


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.long)])
def test_a_run_that_is_killed_again_and_again_arrives(make_model, tmp_path, kills):
    """SIGKILL to everything at random moments of all phases, while it writes too: each step is done and logged once."""
    rng, pattern = random.Random(0), "runs/*/checkpoints/*.checkpoint"
    counts = {"teacher-steps": 40 * kills, "offline-steps": 10 * kills, "total-timesteps": 200 * kills}
    flags = [*FLAGS, *(f"--{name}={count}" for name, count in counts.items())]
    process = start(tmp_path, "--teacher", str(make_model(4, action=1)), *flags)
    for _ in range(kills):
        before, deadline = set(tmp_path.glob(pattern)), time.monotonic() + 120
        while set(tmp_path.glob(pattern)) <= before:  # it has come further
            assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
            time.sleep(0.02)
        time.sleep(rng.random() * 2)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        (run,) = (tmp_path / "runs").iterdir()
        process = start(tmp_path, "--resume", str(run))
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    first, last = counts["offline-steps"], counts["offline-steps"] + counts["total-timesteps"]
    assert [step for step, _ in points(run)["charts/distill_coeff"]] == list(range(first + 100, last + 1, 100))
    assert len(list(run.glob("*.cleanrl_model"))) == 1


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from /proc")
@pytest.mark.parametrize("seconds", [15, pytest.param(1200, marks=pytest.mark.long)])
def test_memory_stays_flat(tmp_path, seconds):
    """Once the replay is full, neither the learner nor its games grow: less than 2% in the second half."""
    flags = ["--teacher=none", "--network=nature", "--batch-size=4", "--buffer-size=400", "--learning-starts=100"]
    process = start(tmp_path, *flags, "--no-cuda", "--checkpoint-frequency=2000", "--total-timesteps=10000000")
    wait_for("runs/*/checkpoints/*.checkpoint", tmp_path, process)

    def resident() -> int:
        """Bytes of all processes of the run."""
        pages = 0
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.getpgid(int(path.name)) == process.pid:
                    pages += int((path / "statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    sizes = []
    for _ in range(30):
        time.sleep(seconds / 30)
        sizes.append(resident())
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    print(f"{seconds} s: {[size >> 20 for size in sizes]} MiB")
    first, second = np.median(sizes[10:20]), np.median(sizes[20:])
    assert first > 1e8 and second < 1.02 * first

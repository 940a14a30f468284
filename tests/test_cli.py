"""The program as its users meet it: refusals of one line before any work, a saved model played, --help, the README."""

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields

import cv2
import numpy as np
import pytest
import torch
import tyro
from conftest import PROGRAM

import qdagger_dqn_atari_impalacnn as qdagger
from qdagger_dqn_atari_impalacnn import Args, load_network


@pytest.fixture
def refused(command_line, tmp_path):
    """refused(*flags): the one line of a refusal before any work, which exits with 2 and writes nothing."""

    def run(*flags) -> str:
        before = sorted(tmp_path.rglob("*"))
        code, _, err = command_line(*flags)
        assert code == 2 and re.fullmatch("error: .+\n", err), err
        assert sorted(tmp_path.rglob("*")) == before
        return err.removeprefix("error: ")

    return run


POSITIVE = "num_envs buffer_size batch_size n_step train_frequency target_network_frequency learning_rate adam_eps "
POSITIVE += "temperature eval_episodes teacher_eval_episodes"
FLOATS = (float, float | None)
SHARES = "gamma tau start_e end_e exploration_fraction repeat_action_probability"


@pytest.mark.parametrize(
    "field", [field for field in fields(Args) if field.type in (int, int | None, *FLOATS)]
)
def test_a_number_that_cannot_work_is_refused_by_its_flag(refused, field):
    flag, values = (
        f"--{field.name.replace('_', '-')}",
        ["-1", str(2**31)] + ["nan", "inf"] * (field.type in FLOATS),
    )
    for value in (
        values + ["0"] * (field.name in POSITIVE.split()) + ["1.5"] * (field.name in SHARES.split())
    ):
        assert re.match(rf"{flag} {value}(\.0)?: ", refused(f"{flag}={value}"))


OTHERS = {
    "--env-id ALE/Breakout-v4": "PongNoFrameskip-v4",
    "--env-id CartPole-v1": "PongNoFrameskip-v4",
    "--buffer-size 55 --num-envs 8": "56 or more",  # an n-step return and a stack in each
    "--teacher-steps 143 --num-envs 2 --n-step 5": "144 or more",  # eight times as many games
    "--upload-model": "--save-model",
    "--capture-video": "pip install moviepy",
    "--track": "pip install wandb",
    "--teacher-buffer missing/buffer.pt": "",
    "--resume missing": "checkpoint",
    "--evaluate missing": "No such file",
    "--evaluate of_pong": "actions",
    "--teacher .": "",
    "--teacher of_pong": "actions",
}


@pytest.mark.parametrize("flags", OTHERS)
def test_what_cannot_work_is_refused_before_any_work(
    refused, make_model, monkeypatch, tmp_path, flags
):
    """With the flag's name first, and what would do."""
    shutil.copy(make_model(6), tmp_path / "of_pong")
    for package in ("moviepy", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)  # not installed
    line = refused(*flags.split())
    flag, _, value = flags.partition(" --")[0].partition(" ")
    assert line.startswith(f"{flag} {value or True}: ") and OTHERS[flags] in line


def test_a_directory_or_a_replay_that_cannot_be_made_is_refused(refused, tmp_path):
    line = refused("--teacher=none", "--no-cuda", f"--buffer-size={2 * 10**9}")
    assert line.startswith("--buffer-size") and "memory" in line
    (tmp_path / "runs").write_text("in the way")
    assert "runs" in refused("--teacher=none", "--no-cuda")


@pytest.mark.parametrize(
    "baseline, score, chance", [("zero", 0.0, -9.0), ("random", 3.0, 3.0), ("random", 3.0, 5.0)]
)
def test_a_teacher_that_is_not_above_the_baseline_is_refused(
    refused, make_model, monkeypatch, baseline, score, chance
):
    monkeypatch.setattr(
        qdagger, "evaluate", lambda *_, epsilon=None, **__: [chance if epsilon == 1.0 else score]
    )
    teacher, little = (
        make_model(4),
        ["--teacher-steps=224", "--offline-steps=1", "--total-timesteps=0", "--no-cuda"],
    )
    line = refused("--teacher", teacher, "--return-baseline", baseline, *little)
    assert (
        line.startswith(f"--teacher {teacher}: ")
        and f"{score:.2f}" in line
        and "--return-baseline random" in line
    )


def test_evaluate_prints_every_game_and_their_mean_and_films_one(
    command_line, make_model, tmp_path
):
    """On the processor if there is no GPU."""
    model = shutil.copy(make_model(4, action=1), tmp_path)
    flags = [
        "--evaluate",
        model,
        "--eval-episodes",
        3,
        "--end-e",
        0.05,
        "--no-cuda",
        "--seed",
        4,
        "--capture-video",
    ]
    code, out, _ = command_line(*flags)
    args, network = Args(end_e=0.05, seed=4), load_network(model, 4, "--evaluate")
    returns = qdagger.evaluate(network, args, 3, torch.device("cpu"))  # not all the same
    *games, last = out.splitlines()
    assert code == 0 and games == [
        f"game {number}: {score:g}" for number, score in enumerate(returns, 1)
    ]
    assert (
        last
        == f"{np.mean(returns):.2f} ± {np.std(returns):.2f} over 3 games of BreakoutNoFrameskip-v4"
    )
    video = cv2.VideoCapture(str(tmp_path / "videos" / "evaluation.mp4"))
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) > 20 and video.read()[1].shape == (210, 160, 3)
    assert not (tmp_path / "runs").exists()


def test_the_file_works_alone_and_without_the_signals_of_other_systems(tmp_path):
    """Started anywhere, by itself; and what it imports later on is nothing of the project either."""
    shutil.copy(PROGRAM, tmp_path / "program.py")
    script = "import runpy, signal, sys; del signal.SIGUSR1; sys.argv[1:] = ['--env-id', 'CartPole-v1']\n"
    script += "runpy.run_path('program.py', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-I", "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "") and re.fullmatch(
        "error: --env-id CartPole-v1: .+\n", done.stderr
    )
    assert list(tmp_path.iterdir()) == [tmp_path / "program.py"]
    imported = set(
        re.findall(r"^\s*(?:from|import) (\w+)", PROGRAM.read_text(), flags=re.MULTILINE)
    )
    own = {path.stem for path in [*PROGRAM.parent.glob("*.py"), *PROGRAM.parent.glob("t*s/*.py")]}
    assert {"conftest", "plot"} < own and not imported & (own | {"tests", "tools", "results"})


README, SOURCE = (PROGRAM.parent / "README.md").read_text(), PROGRAM.read_text()
COMMENTS = re.findall(
    r"^    (\w+): .+?  # (.+)$", SOURCE.split("class Args:")[1].split("class ")[0], re.MULTILINE
)
COMMAND = r"(?<!`)python qdagger_dqn_atari_impalacnn.py ((?:.*\\\n)*.*)"


def test_help_shows_every_flag_with_its_comment(command_line, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    code, out, _ = command_line("--help")
    assert code == 0 and [name for name, _ in COMMENTS] == [field.name for field in fields(Args)]
    for name, comment in COMMENTS:
        assert re.search(
            rf"--{name.replace('_', '-')}\b[^#]{{,200}}{re.escape(comment)}", " ".join(out.split())
        ), name


@pytest.mark.parametrize("command", re.findall(COMMAND, README + qdagger.__doc__, re.MULTILINE))
def test_every_documented_command_works(command):
    words = shlex.split(command.replace("\\\n", " "), comments=True)
    qdagger.validate(tyro.cli(Args, args=words))

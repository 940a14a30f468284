"""The program as its users meet it.

Refusals of one line before any work, a saved model that is played, --help, the README's commands.
"""

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

ROOT = PROGRAM.parent
SOURCE = PROGRAM.read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTATION = "\n".join(page.read_text() for page in PAGES)


@pytest.fixture
def refused(command_line, tmp_path, monkeypatch):
    """refused(*flags): the one line of a refusal, without "error: ".

    The program exits with code 2 before any work, and writes nothing.
    """
    # Work that begins all the same fails at once, instead of going on for days.
    for work in ("evaluate", "fill_teacher_buffer", "learn_offline", "learn_online"):
        monkeypatch.setattr(qdagger, work, None)

    def run(*flags) -> str:
        before = sorted(tmp_path.rglob("*"))

        code, _, err = command_line(*flags)

        assert code == 2
        assert re.fullmatch("error: .+\n", err), err
        assert sorted(tmp_path.rglob("*")) == before
        return err.removeprefix("error: ")

    return run


# Said once more, so that a flag that is lost from the program's own sets is noticed.
POSITIVE = {
    "num_envs",
    "buffer_size",
    "batch_size",
    "n_step",
    "train_frequency",
    "target_network_frequency",
    "learning_rate",
    "adam_eps",
    "temperature",
    "eval_episodes",
    "teacher_eval_episodes",
}
SHARES = {"gamma", "tau", "start_e", "end_e", "exploration_fraction", "repeat_action_probability"}

INTEGERS = (int, int | None)
FLOATS = (float, float | None)
NUMBERS = [field for field in fields(Args) if field.type in INTEGERS + FLOATS]


@pytest.mark.parametrize("field", NUMBERS, ids=[field.name for field in NUMBERS])
def test_a_number_that_cannot_work_is_refused_by_its_flag(refused, field):
    values = ["-1", str(2**31)]
    if field.type in FLOATS:
        values += ["nan", "inf"]
    if field.name in POSITIVE:
        values.append("0")
    if field.name in SHARES:
        values.append("1.5")

    flag = f"--{field.name.replace('_', '-')}"
    for value in values:
        line = refused(f"{flag}={value}")
        assert re.match(rf"{flag} {value}(\.0)?: ", line)


# What cannot work, and what the refusal must name.
OTHERS = {
    "--env-id ALE/Breakout-v4": "PongNoFrameskip-v4",
    "--env-id CartPole-v1": "PongNoFrameskip-v4",
    "--buffer-size 111 --num-envs 8": "112 or more",  # twice an n-step return and a stack in each
    "--teacher-steps 143 --num-envs 2 --n-step 5": "144 or more",  # eight times as many games
    "--learning-starts 100 --total-timesteps 100": "below the 100 of --total-timesteps",
    "--total-timesteps 0 --offline-steps 0": "nothing to do",
    "--total-timesteps 0 --teacher none": "nothing to do",
    "--temperature 1e-12": "float32",
    "--exp-name a/b": "a name for files",
    "--exp-name ../up": "a name for files",
    "--exp-name .hidden": "a name for files",
    "--exp-name a:b": "a name for files",
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
    """The line begins with the first flag and its value, and says what would do."""
    shutil.copy(make_model(6), tmp_path / "of_pong")
    for package in ("moviepy", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    words = flags.split()
    value = words[1] if len(words) > 1 else "True"

    line = refused(*words)

    assert line.startswith(f"{words[0]} {value}: ")
    assert OTHERS[flags] in line


def test_a_directory_or_a_replay_that_cannot_be_made_is_refused(refused, tmp_path):
    too_large = refused("--teacher=none", "--no-cuda", f"--buffer-size={2 * 10**9}")
    assert too_large.startswith("--buffer-size")
    assert "memory" in too_large

    (tmp_path / "runs").write_text("in the way")
    assert "runs" in refused("--teacher=none", "--no-cuda")


@pytest.mark.parametrize(
    "baseline, score, chance",
    [
        ("zero", 0.0, -9.0),
        ("random", 3.0, 3.0),
        ("random", 3.0, 5.0),
    ],
)
def test_a_teacher_that_is_not_above_the_baseline_is_refused(
    refused, make_model, monkeypatch, baseline, score, chance
):
    """The teacher's games have the return `score`, those of random play the return `chance`."""

    def evaluate(*_, epsilon=None, **__) -> list[float]:
        return [chance] if epsilon == 1.0 else [score]

    monkeypatch.setattr(qdagger, "evaluate", evaluate)
    teacher = make_model(4)

    line = refused(
        f"--teacher={teacher}",
        f"--return-baseline={baseline}",
        "--teacher-steps=224",
        "--offline-steps=1",
        "--total-timesteps=0",
        "--no-cuda",
    )

    assert line.startswith(f"--teacher {teacher}: ")
    assert f"{score:.2f}" in line
    # Who has the other baseline already is not sent there.
    assert ("--return-baseline random" in line) == (baseline == "zero")


def test_evaluate_prints_every_game_and_their_mean_and_films_one(
    command_line, make_model, tmp_path
):
    """On the processor if there is no GPU."""
    model = shutil.copy(make_model(4, action=1), tmp_path)

    code, out, _ = command_line(
        "--evaluate",
        model,
        "--eval-episodes=3",
        "--end-e=0.05",
        "--no-cuda",
        "--seed=4",
        "--capture-video",
    )

    args = Args(end_e=0.05, seed=4)
    network = load_network(model, 4, "--evaluate")
    scores = qdagger.evaluate(network, args, 3, torch.device("cpu"))  # not all the same
    mean = f"{np.mean(scores):.2f} ± {np.std(scores):.2f} over 3 games of BreakoutNoFrameskip-v4"
    assert code == 0
    assert out.splitlines() == [
        f"game 1: {scores[0]:g}",
        f"game 2: {scores[1]:g}",
        f"game 3: {scores[2]:g}",
        mean,
    ]

    film = cv2.VideoCapture(str(tmp_path / "videos" / "evaluation.mp4"))
    _, image = film.read()
    assert film.get(cv2.CAP_PROP_FRAME_COUNT) > 20
    assert image.shape == (210, 160, 3)
    assert not (tmp_path / "runs").exists()


# Started as `python -c`: it runs program.py where there is no SIGUSR1, as on Windows.
WITHOUT_SIGUSR1 = """
import runpy, signal, sys
del signal.SIGUSR1
sys.argv[1:] = ["--env-id", "CartPole-v1"]
runpy.run_path("program.py", run_name="__main__")
"""


def test_the_file_works_alone_and_without_the_signals_of_other_systems(tmp_path):
    """It starts anywhere, by itself. What it imports later on is nothing of the project either."""
    program = shutil.copy(PROGRAM, tmp_path / "program.py")

    command = [sys.executable, "-I", "-c", WITHOUT_SIGUSR1]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch("error: --env-id CartPole-v1: .+\n", done.stderr)
    assert list(tmp_path.iterdir()) == [program]

    own = {"tests", "tools", "results"}
    for directory in (ROOT, ROOT / "tests", ROOT / "tools"):
        own |= {path.stem for path in directory.glob("*.py")}
    imported = set(re.findall(r"^\s*(?:from|import) (\w+)", SOURCE, re.MULTILINE))
    assert {"conftest", "plot"} < own
    assert not imported & own


def test_help_shows_every_flag_with_its_comment(command_line, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    text_of_args = SOURCE[SOURCE.index("class RunArgs:") : SOURCE.index("class Args(")]
    comments = re.findall(r"^    (\w+): .+?  # (.+)$", text_of_args, re.MULTILINE)

    code, out, _ = command_line("--help")

    assert code == 0
    assert [name for name, _ in comments] == [field.name for field in fields(Args)]
    shown = " ".join(out.split())
    for name, comment in comments:
        flag = f"--{name.replace('_', '-')}"
        # The values that it takes and its default stand in between.
        assert re.search(rf"{flag}\b[^#]{{,200}}{re.escape(comment)}", shown), name


# The flags, which a backslash may carry on to the next line. Code within a sentence is left out.
COMMAND = r"(?<!`)python qdagger_dqn_atari_impalacnn.py ((?:.*\\\n)*.*)"
DOCUMENTED_COMMANDS = re.findall(COMMAND, DOCUMENTATION + qdagger.__doc__, re.MULTILINE)


@pytest.mark.parametrize("command", DOCUMENTED_COMMANDS)
def test_every_documented_command_works(command):
    words = shlex.split(command.replace("\\\n", " "), comments=True)
    qdagger.validate(tyro.cli(Args, args=words))

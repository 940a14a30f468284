"""The tests' power: each small wrong change to the program in mutants.py turns the default suite red."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mutants import MUTANTS

ROOT = Path(__file__).parent.parent
PROGRAM = "qdagger_dqn_atari_impalacnn.py"
# Those that notice most for the least time first; those of the tools know nothing of the program's insides.
TESTS = ["method", "replay", "games", "accelerated", "train", "resume", "teacher", "cli"]


def test_what_is_wrong_is_one_place_of_the_program():
    for name, (right, wrong) in MUTANTS.items():
        assert (ROOT / PROGRAM).read_text().count(right) == 1 and right != wrong, name


@pytest.mark.long
@pytest.mark.parametrize("name", ["nothing", *MUTANTS])
def test_the_suite_turns_red_if_something_is_wrong_and_only_then(name, tmp_path):
    for each in ("tests", "tools", "teachers"):
        shutil.copytree(ROOT / each, tmp_path / each)
    for each in ("README.md", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / each, tmp_path)
    (tmp_path / PROGRAM).write_text(
        (ROOT / PROGRAM).read_text().replace(*MUTANTS.get(name, ("", "")))
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-n",
        "0",
        *(f"tests/test_{each}.py" for each in TESTS),
    ]
    suite = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert suite.returncode == (name in MUTANTS), suite.stdout[-2000:]

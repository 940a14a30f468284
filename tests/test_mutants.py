"""The tests' power: each small wrong change to the program in mutants.py turns the suite red."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mutants import MUTANTS

ROOT = Path(__file__).parent.parent
PROGRAM = "qdagger_dqn_atari_impalacnn.py"
# Those that notice most for the least time first; those of the tools know nothing of the program's
# insides.
TESTS = [
    "tests/test_method.py",
    "tests/test_replay.py",
    "tests/test_games.py",
    "tests/test_accelerated.py",
    "tests/test_outside.py",
    "tests/test_train.py",
    "tests/test_resume.py",
    "tests/test_teacher.py",
    "tests/test_cli.py",
]


def test_what_is_wrong_is_one_place_of_the_program():
    program = (ROOT / PROGRAM).read_text()
    for name, (right, wrong) in MUTANTS.items():
        assert program.count(right) == 1, name
        assert wrong != right, name


@pytest.mark.long
@pytest.mark.parametrize("name", ["nothing", *MUTANTS])
def test_the_suite_turns_red_if_something_is_wrong_and_only_then(name, tmp_path):
    for directory in ("tests", "tools", "teachers", "docs"):
        shutil.copytree(ROOT / directory, tmp_path / directory)
    for file in ("README.md", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / file, tmp_path)
    program = (ROOT / PROGRAM).read_text()
    if name in MUTANTS:
        right, wrong = MUTANTS[name]
        program = program.replace(right, wrong)
    (tmp_path / PROGRAM).write_text(program)

    command = [sys.executable, "-m", "pytest", "-x", "-n", "0", *TESTS]
    suite = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    expected_code = 1 if name in MUTANTS else 0
    assert suite.returncode == expected_code, suite.stdout[-2000:]

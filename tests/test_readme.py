"""README, --help and code name the same flags, defaults, meanings and tags, and the documented commands work."""

import re
import shlex
from dataclasses import fields

import pytest
import tyro
from conftest import PROGRAM

import qdagger_dqn_atari_impalacnn as qdagger
from qdagger_dqn_atari_impalacnn import Args

README, SOURCE = (PROGRAM.parent / "README.md").read_text(), PROGRAM.read_text()
COMMENTS = re.findall(r"^    (\w+): .+?  # (.+)$", SOURCE.split("class Args:")[1].split("class ")[0], re.MULTILINE)
COMMAND = r"(?<!`)python qdagger_dqn_atari_impalacnn.py ((?:.*\\\n)*.*)"


def test_the_table_of_flags_has_each_with_its_default_and_its_comment():
    rows = re.findall(r"^\| `--([a-z-]+)` \| (.+?) \| (.+) \|$", README, re.MULTILINE)
    assert [(name.replace("-", "_"), meaning) for name, _, meaning in rows] == COMMENTS
    words = {"True": "on", "False": "off", "None": "–", "": "–"}
    for (name, shown, _), field in zip(rows, fields(Args), strict=True):
        default = False if name == "amp" else field.default
        literal = words.get(str(default)) or type(default)(shown.strip("`"))
        assert literal == (shown if str(default) in words else default), name


def test_help_shows_every_flag_with_its_comment(command_line, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    code, out, _ = command_line("--help")
    assert code == 0 and [name for name, _ in COMMENTS] == [field.name for field in fields(Args)]
    for name, comment in COMMENTS:
        assert re.search(rf"--{name.replace('_', '-')}\b[^#]{{,200}}{re.escape(comment)}", " ".join(out.split())), name


@pytest.mark.parametrize("command", re.findall(COMMAND, README + qdagger.__doc__, re.MULTILINE))
def test_every_documented_command_works(command):
    words = shlex.split(command.replace("\\\n", " "), comments=True)
    qdagger.validate(tyro.cli(Args, args=words), {})


def test_the_test_command_is_the_one_that_ci_runs():
    assert "<!-- test command -->" in (PROGRAM.parent / ".ci" / "run").read_text()
    assert '<!-- test command -->\n```bash\npip install -e ".[test]" && pytest\n```' in README

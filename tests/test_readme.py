"""README, --help and code name the same flags, defaults and tags."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import tyro

import qdagger_dqn_atari_impalacnn as program
from qdagger_dqn_atari_impalacnn import Args

ROOT = Path(program.__file__).parent
README = (ROOT / "README.md").read_text()
SOURCE = Path(program.__file__).read_text()
FLAGS = dict(re.findall(r"^\| `(--[a-z-]+)` \| (.+?) \| .+ \|$", README, flags=re.MULTILINE))


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def test_the_table_has_every_flag_and_no_other():
    assert set(FLAGS) == {flag(field.name) for field in fields(Args)}


@pytest.mark.parametrize("field", fields(Args), ids=lambda field: field.name)
def test_the_table_has_the_default(field):
    shown, default = FLAGS[flag(field.name)], field.default
    if field.name == "amp":
        assert shown == "off" and default == program.FAST_BFLOAT16
    elif isinstance(default, bool):
        assert shown == ("on" if default else "off")
    elif default in (None, ""):
        assert shown == "–"
    else:
        assert type(default)(shown.strip("`")) == default


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as stopped:
        tyro.cli(Args, args=["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for field in fields(Args):
        assert flag(field.name) in text
        assert re.search(rf"^    {field.name}: .+  # \w", SOURCE, flags=re.MULTILINE), f"{field.name} has no comment"


def test_every_tag_of_the_code_is_defined_and_every_defined_tag_is_in_the_code():
    """The table of tags against the literal tags that the source hands to the writer."""
    defined = set(re.findall(r"^\| `((?:charts|losses|eval)/[\w/]+|hyperparameters)` \|", README, flags=re.MULTILINE))
    written = set(re.findall(r'"((?:charts|eval)/[\w/]+)"', SOURCE)) | {"hyperparameters"}
    written |= {f"charts/offline/{name}" for name in ("loss", "q_loss", "distill_loss")}
    written |= {f"losses/{name}" for name in ("loss", "td_loss", "distill_loss", "q_values")}
    assert defined == written


@pytest.mark.parametrize("command", re.findall(r"python qdagger_dqn_atari_impalacnn.py ((?:.*\\\n)*.*)", README))
def test_every_command_of_the_readme_parses(command):
    words = shlex.split(re.split(r"`|\s+#", command.replace("\\\n", " "))[0])
    if "--help" not in words:
        program.validate(tyro.cli(Args, args=words))


def test_the_test_command_is_the_one_that_ci_runs():
    ci = (ROOT / ".ci" / "run").read_text()
    assert "<!-- test command -->" in README and "<!-- test command -->" in ci
    assert re.search(r'<!-- test command -->\n```bash\npip install -e "\.\[test\]" && pytest\n```', README)


def test_the_file_imports_nothing_of_the_project():
    modules = {path.stem for path in ROOT.glob("*.py")} | {"tests", "results"}
    imported = set(re.findall(r"^\s*(?:from|import) (\w+)", SOURCE, flags=re.MULTILINE))
    assert not imported & modules

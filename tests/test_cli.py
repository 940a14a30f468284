"""The program as its users meet it: refusals of one line, evaluation of a saved model, Ctrl-C, uploads."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

import qdagger_dqn_atari_impalacnn as qdagger
from qdagger_dqn_atari_impalacnn import Args, load_model, main

BREAKOUT, PONG = "BreakoutNoFrameskip-v4", "PongNoFrameskip-v4"
PLAIN = ["--teacher", "none", "--network", "nature", "--batch-size", "4", "--eval-episodes", "1"]
TINY = [*PLAIN, "--num-envs", "1", "--total-timesteps", "60", "--learning-starts", "20", "--buffer-size", "60"]


@pytest.fixture
def refused(tmp_path, monkeypatch, capfd):
    """refused(*flags): the one line of an early refusal, which exits with 2 and leaves no run behind."""

    def run(*flags) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["program", *map(str, flags)])
        with pytest.raises(SystemExit) as stop:
            main()
        lines = capfd.readouterr().err.splitlines()
        assert stop.value.code == 2
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        assert not (tmp_path / "runs").is_dir()
        return lines[0]

    return run


# --- What is refused before any work ---


@pytest.mark.parametrize(
    "env_id, advice",
    [
        ("BrekoutNoFrameskip-v4", BREAKOUT),
        ("breakout", BREAKOUT),
        ("BreakoutNoFrameskip-v0", BREAKOUT),
        ("ALE/Breakout-v5", "NoFrameskip-v4"),
        ("CartPole-v1", "NoFrameskip-v4"),
        ("", "NoFrameskip-v4"),
    ],
)
def test_an_unknown_game_is_refused_with_a_near_one(refused, env_id, advice):
    line = refused("--env-id", env_id)
    assert line.startswith(f"error: --env-id {env_id}: ") and advice in line.removeprefix(f"error: --env-id {env_id}: ")


COUNTS = ["num_envs", "buffer_size", "batch_size", "n_step", "train_frequency", "target_network_frequency"]
COUNTS += ["teacher_eval_episodes", "eval_episodes"]
PHASES = ["total_timesteps", "learning_starts", "teacher_steps", "offline_steps", "distill_steps", "eval_frequency"]
POSITIVE = ["learning_rate", "adam_eps", "temperature"]
SHARES = ["gamma", "tau", "start_e", "end_e", "exploration_fraction", "repeat_action_probability"]
BAD_VALUES = [
    *((flag, value) for flag in COUNTS for value in ("0", "-1")),
    *((flag, "-1") for flag in [*PHASES, "seed", "distill_coef"]),
    *((flag, value) for flag in POSITIVE for value in ("0", "-1", "nan", "inf")),
    *((flag, value) for flag in SHARES for value in ("1.5", "-0.1", "nan")),
    *(("distill_coef", value) for value in ("nan", "inf")),
]


@pytest.mark.parametrize("flag, value", BAD_VALUES)
def test_a_number_that_cannot_work_is_refused_by_its_flag(refused, flag, value):
    flag = f"--{flag.replace('_', '-')}"
    assert refused("--teacher", "none", f"{flag}={value}").startswith(f"error: {flag} ")


@pytest.mark.parametrize("flag", PHASES)
def test_a_phase_may_be_skipped(flag):
    qdagger.validate(Args(**{flag: 0, "offline_steps": 0}))


@pytest.mark.parametrize("flag", ["buffer_size", "teacher_steps"])
def test_a_replay_that_cannot_fill_a_batch_is_refused(refused, flag):
    """By name, with what would do: and that does."""
    option = f"--{flag.replace('_', '-')}"
    line = refused("--teacher", "some/where", option, "31", "--batch-size", "32", "--n-step", "3", "--num-envs", "8")
    assert line.startswith(f"error: {option} 31: ") and "--batch-size 32" in line
    enough = int(re.search(r"(\d+) or more", line)[1])
    assert 32 < enough < 200
    qdagger.validate(Args(batch_size=32, n_step=3, num_envs=8, **{flag: enough}))


def test_teacher_steps_do_not_matter_where_no_buffer_is_made():
    qdagger.validate(Args(teacher="none", teacher_steps=0))
    qdagger.validate(Args(offline_steps=0, teacher_steps=0))


def test_an_upload_without_a_model_is_refused(refused):
    line = refused("--upload-model")
    assert line.startswith("error: --upload-model") and "--save-model" in line


@pytest.mark.parametrize("flag, package", [("--capture-video", "moviepy"), ("--track", "wandb")])
def test_a_missing_package_is_refused_with_its_name(refused, monkeypatch, flag, package):
    monkeypatch.setitem(sys.modules, package, None)
    line = refused(flag)
    assert line.startswith(f"error: {flag}") and f"pip install {package}" in line


@pytest.mark.parametrize("flag", ["--teacher", "--evaluate"])
def test_a_missing_model_or_one_of_another_game_is_refused(refused, make_model, tmp_path, flag):
    missing, of_pong = tmp_path / "missing", make_model(6)
    assert refused(flag, missing).startswith(f"error: {flag} {missing}: ")
    line = refused(flag, of_pong, "--env-id", BREAKOUT)
    assert line.startswith(f"error: {flag} {of_pong}: ") and "6 actions" in line and "has 4" in line


def test_more_memory_than_there_is_is_refused(refused):
    line = refused("--teacher", "none", "--buffer-size", 10**13)
    assert "--buffer-size" in line and "memory" in line


def test_a_run_that_cannot_be_written_is_refused(refused, tmp_path):
    (tmp_path / "runs").write_text("in the way")
    assert "runs/" in refused(*TINY)
    assert (tmp_path / "runs").read_text() == "in the way"


def test_the_program_itself_exits_with_2_and_a_line(run_program, tmp_path):
    done = run_program("--env-id", "CartPole-v1", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"error: --env-id CartPole-v1: .+\n", done.stderr)
    assert list(tmp_path.iterdir()) == []


# --- A teacher that is none ---


def teaching_refused(monkeypatch, capfd, *flags) -> str:
    """The last line of a run that stops once its teacher has been measured, before that teacher plays on."""
    monkeypatch.setattr(sys, "argv", ["program", *map(str, flags), "--teacher-steps", "80", "--batch-size", "4"])
    with pytest.raises(SystemExit) as stop:
        main()
    text = capfd.readouterr().err
    assert stop.value.code == 2
    assert "teacher buffer" not in text and "offline" not in text and "Traceback" not in text
    return text.splitlines()[-1]


def test_a_teacher_that_loses_its_games_stops_before_training(make_model, tmp_path, monkeypatch, capfd):
    """Real games of Pong, in which doing nothing sensible ends at -21 or little above."""
    monkeypatch.chdir(tmp_path)
    teacher = make_model(6, action=0)
    line = teaching_refused(
        monkeypatch, capfd, "--env-id", PONG, "--teacher", teacher, "--teacher-eval-episodes", 1, "--buffer-size", 40
    )
    assert line.startswith(f"error: --teacher {teacher}: ") and "--return-baseline random" in line
    assert -21 <= float(re.search(r"mean return (\S+)", line)[1]) <= -15


@pytest.mark.parametrize("baseline, score, chance", [("zero", 0.0, -9.0), ("random", 3.0, 3.0), ("random", 3.0, 5.0)])
def test_a_teacher_must_be_above_the_baseline(make_model, tmp_path, monkeypatch, capfd, baseline, score, chance):
    """At it is not enough; and a flag that is already given is no advice."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(qdagger, "evaluate", lambda *_, epsilon=None, **__: [chance if epsilon == 1.0 else score])
    teacher = make_model(4)
    flags = ("--teacher", teacher, "--return-baseline", baseline, "--buffer-size", 40)
    line = teaching_refused(monkeypatch, capfd, *flags)
    assert line.startswith(f"error: --teacher {teacher}: ")
    assert ("--return-baseline random" in line) == (baseline == "zero")


# --- Evaluation ---


def test_evaluate_prints_every_game_and_their_mean(make_model, run_program, tmp_path):
    """From the command line, with a video if that can be made, on the processor if there is no GPU."""
    pytest.importorskip("moviepy")
    model = tmp_path / "a" / "model"
    model.parent.mkdir()
    model.write_bytes(make_model(4, action=1).read_bytes())
    flags = ("--evaluate", model, "--env-id", BREAKOUT, "--eval-episodes", 3, "--end-e", 0.05, "--capture-video")
    done = run_program(*flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    games = re.findall(r"^game (\d+): (\S+)$", done.stdout, flags=re.MULTILINE)
    assert [int(number) for number, _ in games] == [1, 2, 3]
    scores = [float(score) for _, score in games]
    assert f"{np.mean(scores):.2f} ± {np.std(scores):.2f}" in done.stdout
    (video,) = (tmp_path / "a").rglob("*.mp4")
    assert video.stat().st_size > 1000 and str(video.parent) in done.stdout
    assert "Traceback" not in done.stderr and not (tmp_path / "runs").exists()
    if not torch.cuda.is_available():
        assert [line for line in done.stdout.splitlines() if "--cuda" in line and "CPU" in line]


# --- Ctrl-C ---


def wait_until(condition, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.mark.skipif(os.name != "posix", reason="process groups")
def test_ctrl_c_ends_the_run_and_its_workers_quietly(tmp_path):
    """As a terminal sends it: to every process of the group, while the student plays."""
    flags = [
        *PLAIN,
        "--num-envs",
        "2",
        "--total-timesteps",
        "1000000",
        "--learning-starts",
        "20",
        "--buffer-size",
        "99",
    ]
    with open(tmp_path / "stderr", "w") as stderr:
        process = subprocess.Popen(
            [sys.executable, Path(qdagger.__file__).resolve(), *flags],
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    try:

        def playing() -> bool:
            text = (tmp_path / "stderr").read_text(errors="replace")
            assert process.poll() is None, text
            return re.search(r"online:.*\s[1-9]\d+/1000000", text) is not None

        def gone() -> bool:
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                return True
            return False

        wait_until(playing, 200, "the student never played")
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) == 130
        wait_until(gone, 30, "a process was left behind")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    text = (tmp_path / "stderr").read_text()
    assert re.fullmatch(r"stopped; go on with: python .+ --resume runs/\S+", text.splitlines()[-1])
    assert "Traceback" not in text and "Error" not in text


# --- Uploads ---

UPLOAD = [*TINY, "--save-model", "--upload-model"]
RIGHT = {"HF_TOKEN": "hf_right"}


def test_an_upload_without_a_login_is_refused_before_the_run(hub, hub_client, tmp_path):
    """Nobody logged in while the hub is out of reach, and a token that the hub does not know."""
    hub.close()
    without = hub_client(main=UPLOAD, cwd=tmp_path)
    hub.start()
    wrong = hub_client(main=UPLOAD, cwd=tmp_path, environment={"HF_TOKEN": "hf_wrong"})
    for answer in (without, wrong):
        assert answer["code"] == 2, answer
        assert len(answer["err"].splitlines()) == 1
        assert answer["err"].startswith("error: --upload-model") and "hf auth login" in answer["err"]
    assert list(tmp_path.iterdir()) == []


def test_an_upload_to_a_strange_organisation_is_refused_before_the_run(hub, hub_client, tmp_path):
    answer = hub_client(main=[*UPLOAD, "--hf-entity", "strangers"], cwd=tmp_path, environment=RIGHT)
    assert answer["code"] == 2 and len(answer["err"].splitlines()) == 1
    assert answer["err"].startswith("error: --hf-entity strangers: ")
    assert list(tmp_path.iterdir()) == []


def test_an_upload_holds_model_card_settings_and_events(hub, hub_client, tmp_path):
    """A whole run: what the hub was sent is what the directory holds, and the card says what it scored."""
    answer = hub_client(main=[*UPLOAD, "--hf-entity", "lab", "--seed", "7"], cwd=tmp_path, environment=RIGHT)
    assert answer.get("code") == 0, answer
    name = Path(qdagger.__file__).stem
    ((repo, files),) = hub.commits.items()
    assert repo == f"lab/{BREAKOUT}-{name}-seed7"

    (run_dir,) = (tmp_path / "runs").iterdir()
    assert files == {path.name: path.read_bytes() for path in run_dir.iterdir() if path.is_file()}
    (events,) = [file for file in files if file.startswith("events.out.tfevents")]
    assert set(files) == {f"{name}.cleanrl_model", "README.md", "hyperparameters.json", events}
    assert json.loads(files["hyperparameters.json"])["seed"] == 7
    load_model(run_dir / f"{name}.cleanrl_model", 4, "--evaluate")

    mean, std = re.search(r"(\S+) ± (\S+) over 1 games", answer["out"]).groups()
    (result,) = ModelCard(files["README.md"].decode()).data.eval_results
    assert result.metric_value == f"{mean} +/- {std}" and result.dataset_name == BREAKOUT


def test_an_upload_that_fails_keeps_the_files_and_says_where(hub, hub_client, tmp_path):
    """The hub takes everything but the commit."""
    hub.fault = "/commit/"
    answer = hub_client(main=UPLOAD, cwd=tmp_path, environment=RIGHT)
    assert answer["code"] == 2, answer
    (run_dir,) = (tmp_path / "runs").iterdir()
    line = answer["err"].splitlines()[-1]
    assert line.startswith("error: --upload-model") and f"runs/{run_dir.name}" in line
    assert "Traceback" not in answer["err"]
    assert (run_dir / f"{Path(qdagger.__file__).stem}.cleanrl_model").stat().st_size > 1_000_000
    assert any("/commit/" in path for _, path in hub.requests)

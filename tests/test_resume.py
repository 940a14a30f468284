"""No run is lost.

Stopped, killed, damaged or tampered with, it goes on from its last good checkpoint.
"""

import errno
import math
import os
import random
import shutil
import signal
from contextlib import suppress
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from conftest import PROGRAM, Malicious, interrupted, points, refusal, saved
from test_train import SETTINGS, Clockwork, same, seeds_in_a_row, time_with, tiny

import qdagger_dqn_atari_impalacnn as qdagger
from qdagger_dqn_atari_impalacnn import (
    Args,
    Learner,
    Run,
    Stopped,
    check_unchanged,
    load_checkpoint,
    train,
)

NEW = SETTINGS | dict(
    num_envs=8,
    teacher_steps=512,  # 8 rows of 64 games
    total_timesteps=320,  # 40 rows of 8 games
    learning_starts=160,
    buffer_size=240,  # 30 rows
    train_frequency=8,
    target_network_frequency=40,
    eval_frequency=100,
    checkpoint_frequency=0,
    final_learning_rate=1e-5,
)


class Interruption:
    """Keeps a list of events, and ends a run at one of them."""

    def __init__(self):
        self.events = []
        self.signals: list[int] = []  # what `train` is given as `stop`

    def plan(self, at: int, what, kill: bool) -> None:
        """A signal comes at the `at`-th event from now on, or the `at`-th of the kind `what`.

        With `kill` everything ends at once instead.
        """
        self.left = at
        self.what = what
        self.kill = kill
        self.signals.clear()

    def happens(self, event) -> None:
        self.events.append(event)
        if self.what not in (None, event):
            return
        self.left -= 1
        if self.left == 0:
            if self.kill:
                raise SystemExit
            self.signals.append(signal.SIGTERM)

    def spy(self, monkeypatch, owner, name: str, event_of) -> None:
        """From now on every call of this method is the event `event_of(its arguments)`."""
        method = getattr(owner, name)

        def spied(*args):
            self.happens(event_of(*args))
            return method(*args)

        monkeypatch.setattr(owner, name, spied)


@pytest.fixture
def go(make_model, tmp_path_factory, monkeypatch):
    """go(run, at, what, kill, **changes): train on Clockwork, or resume `run`.

    It returns the directory, or None if there is none. `at`, `what` and `kill` are those of
    Interruption.plan. `go.events` are a row of games in "evaluation" or "training", an "update",
    and (phase, step) of each checkpoint that is about to be written.
    """
    interruption = Interruption()
    real_log = Run.log

    def kind_of_row(games: Clockwork) -> str:
        return "evaluation" if games.clock > 20_000 else "training"  # see seeds_in_a_row

    def update(*_) -> str:
        return "update"

    def place(run: Run, *_) -> tuple[str, int]:
        return run.progress.phase, run.progress.step

    def log(run: Run, scalars: dict) -> None:
        real_log(run, scalars)
        run.writer.flush()  # so that nothing logged is lost when all ends at once

    interruption.spy(monkeypatch, Clockwork, "step_wait", kind_of_row)
    interruption.spy(monkeypatch, Learner, "gradient_step", update)
    interruption.spy(monkeypatch, Run, "checkpoint", place)
    monkeypatch.setattr(Run, "log", log)
    monkeypatch.setattr(qdagger, "AtariGames", Clockwork)
    monkeypatch.setattr(qdagger, "seeds_for", seeds_in_a_row)
    monkeypatch.setitem(qdagger.NETWORKS, "nature", tiny)
    teacher = make_model(4, action=1)  # tiny as well

    def go(
        run: Path | None = None, at: int = -1, what=None, kill: bool = False, **changes
    ) -> Path | None:
        interruption.plan(at, what, kill)
        if run is None:
            monkeypatch.chdir(tmp_path_factory.mktemp("run"))
            flags = NEW | {"teacher": str(teacher)}
        else:
            flags = load_checkpoint(run)["args"] | {"resume": str(run)}

        with suppress(Stopped, SystemExit):
            train(Args(**flags | changes), interruption.signals)

        if run is None:
            return next(Path("runs").absolute().glob("*"), None)
        return run

    go.events = interruption.events
    return go


def state(run: Path) -> dict:
    """The last checkpoint, but for what may differ."""
    content = load_checkpoint(run)
    del content["args"]
    del content["progress"]["seconds"]
    return content


def steps(run: Path) -> dict[str, list[int]]:
    """At which steps there is a point, for each tag."""
    return {tag: [step for step, _ in logged] for tag, logged in points(run).items()}


def checkpoints(events: list) -> list[tuple[str, int]]:
    return [event for event in events if isinstance(event, tuple)]


def exactly_restored(content: dict) -> bool:
    """Whether a run that goes on from here has lost nothing.

    It does not play; or it has not played yet; or the last row of its replay is excluded anyway.
    """
    phase = content["progress"]["phase"]
    replay = content["replay"]
    if phase == "offline" or replay["written"] == 0:
        return True
    if phase == "teacher buffer":
        num_envs = 64
        rows = 8
    else:
        num_envs = 8
        rows = 30
    last_row = (replay["written"] - 1) % rows
    excluded = np.asarray(replay["excluded"]).reshape(-1, num_envs)
    return bool(excluded[last_row].all())


@pytest.mark.parametrize("kill", [False, True])
def test_a_run_stopped_at_any_moment_goes_on_as_if_nothing_had_happened(go, kill):
    """In games, updates, evaluations, checkpoints; also if it is killed soon after.

    Then steps are done again, but no point is seen twice. Offline, and where no row is cut off
    whose games are lost, the run ends the same bit for bit.
    """
    whole = go()
    whole_state = state(whole)
    whole_points = points(whole)
    events = go.events.copy()
    assert events.count("evaluation") == 7 * 5  # seven of five rows each
    assert events.count("training") == 8 + 40  # teacher's buffer, online
    assert events.count("update") == 20 + 20  # offline, online
    assert go(at=3) is None  # in the teacher's evaluation there is no run yet

    exact_phases = set()
    exact_events = set()
    for at in range(9, len(events) + 1, 6):
        go.events.clear()
        run = go(at=at)
        stops = [state(run)]
        if kill:
            go(run, at=7, kill=True)
            stops.append(state(run))
        assert go(run) == run

        end = state(run)
        assert end["progress"]["step"] == 320
        assert end["replay"]["written"] == 40
        assert steps(run) == steps(whole), at
        if not kill:
            assert go.events.count("update") == 40, at
        if all(exactly_restored(stop) for stop in stops):
            exact_phases.add(stops[0]["progress"]["phase"])
            exact_events.add(events[at - 1])
            assert same(end, whole_state), at
            assert points(run) == whole_points, at

    assert exact_phases == {"teacher buffer", "offline", "online"}
    assert exact_events >= {"evaluation", "update"}


@pytest.mark.parametrize(
    "at, what, phase, step",
    [
        (1, ("offline", 20), "offline", 20),  # in the last checkpoint offline
        (9, "training", "online", 8),  # in the first row online, the ninth of all
    ],
)
def test_lambda_is_informed_after_a_resume_at_the_first_online_step(go, at, what, phase, step):
    ten_games = dict(eval_episodes=10, eval_frequency=0)
    whole = go(**ten_games)

    run = go(at=at, what=what, **ten_games)
    progress = load_checkpoint(run)["progress"]
    assert progress["phase"] == phase
    assert progress["step"] == step
    assert len(progress["scores"]) == 10
    assert sum(progress["scores"]) > 0

    go(run)
    lambdas = points(run)["charts/distill_coeff"]
    _, first_lambda = lambdas[0]
    assert lambdas == points(whole)["charts/distill_coeff"]
    assert first_lambda < 1


SIGNALS = [signal.SIGINT, signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1]


@pytest.mark.parametrize("numbers", [SIGNALS, pytest.param(SIGNALS * 5, marks=pytest.mark.long)])
def test_real_signals_end_a_run_with_the_command_that_goes_on_and_kills_do_no_harm(
    make_model, tmp_path, numbers
):
    """To all its processes, as from a terminal.

    They come at random moments after a checkpoint, while one is written, too.
    """
    command = [
        PROGRAM,
        "--num-envs=1",
        "--teacher-steps=112",
        "--offline-steps=20",
        "--learning-starts=60",
        "--buffer-size=100",
        "--no-cuda",
        "--network=nature",
        "--batch-size=4",
        "--teacher-eval-episodes=1",
        "--eval-episodes=1",
        "--checkpoint-frequency=20",
        f"--teacher={make_model(4, action=1)}",
    ]
    rng = random.Random(0)

    run = interrupted(command, "checkpoint.pt", numbers, tmp_path, pause=rng.random)

    last = 20 + load_checkpoint(run)["progress"]["step"]
    logged_at = steps(run)
    assert logged_at["charts/distill_coeff"] == list(range(120, last + 1, 100))
    assert logged_at["charts/offline/avg_episodic_return"] == [0, 20]
    assert logged_at["eval/episodic_return"] == [last]


@pytest.fixture
def stopped(go) -> Path:
    """A run that was stopped in its 12th offline update; the checkpoint before is of the tenth."""
    run = go(at=12, what="update", checkpoint_frequency=10)
    assert checkpoints(go.events)[-2:] == [("offline", 10), ("offline", 12)]
    return run


@pytest.mark.parametrize("kind", ["cut", "garbage", "malicious"])
def test_a_damaged_checkpoint_costs_the_way_back_to_the_one_before(
    go, stopped, tmp_path, capfd, monkeypatch, kind
):
    """Nor is that one lost before the next is whole; if both are damaged, nothing is left.

    No damage runs code.
    """
    path = stopped / "checkpoint.pt"
    victim = tmp_path / "victim"
    if kind == "cut":
        damaged = path.read_bytes()[:-5000]
    elif kind == "garbage":
        damaged = bytes(5000)
    else:
        damaged = saved(state(stopped) | {"facts": Malicious(victim)})
    path.write_bytes(damaged)
    copied = shutil.copytree(stopped, tmp_path / "copy")

    # It goes on from the checkpoint before.
    whole = go()
    capfd.readouterr()
    assert go(stopped) == stopped
    assert f"--resume: {path} cannot be read: " in capfd.readouterr().out
    assert same(state(stopped), state(whole))
    assert steps(stopped) == steps(whole)

    # The next one cannot be written.
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", None)
        message = refusal(go, copied, at=1, save_model=False)
    assert message.startswith(f"cannot write {copied}")
    assert load_checkpoint(copied)["progress"]["step"] == 10

    # Both are damaged.
    (copied / "checkpoint.pt").write_bytes(damaged)
    (copied / "checkpoint.previous.pt").write_bytes(damaged)
    message = refusal(load_checkpoint, copied)
    assert message.startswith(f"--resume {copied}: no checkpoint")
    assert not victim.exists()


def test_a_checkpoint_of_another_version_is_refused_in_a_line(stopped, command_line):
    """A part is missing, or is another."""
    content = load_checkpoint(stopped)

    def check(damaged: dict, part: str) -> None:
        torch.save(damaged, stopped / "checkpoint.pt")
        code, _, errors = command_line("--resume", stopped)
        assert code == 2, part
        assert f"error: --resume {stopped}: " in errors, part
        assert "Traceback" not in errors, part

    for part in content:
        without = content.copy()
        del without[part]
        check(without, part)
    for part in content.keys() - {"facts", "optimizer"}:  # which may be anything
        check(content | {part: {"new": torch.zeros(1)}}, part)


# Said once more, so that a flag that is lost from the program's own set is noticed.
MAY_CHANGE = {
    "resume",
    "cuda",
    "total_timesteps",
    "checkpoint_frequency",
    "eval_frequency",
    "eval_episodes",
    "evaluate",
    "teacher_buffer",
    "track",
    "wandb_project_name",
    "wandb_entity",
    "capture_video",
    "save_model",
    "upload_model",
    "hf_entity",
    "capture",
    "compile",
}


def test_only_flags_that_change_no_result_may_change_and_a_run_may_be_longer(go, stopped):
    flags = load_checkpoint(stopped)["args"]
    for flag in flags:
        before = flags | {flag: "another"}
        if flag in MAY_CHANGE:
            check_unchanged(Args(**flags), before)
        else:
            message = refusal(check_unchanged, Args(**flags), before)
            assert message.endswith(
                "the run to be resumed has another; leave out this flag, or --resume"
            )
    message = refusal(go, stopped, learning_rate=1e-3)
    assert message.startswith("--learning-rate 0.001: the run to be resumed has ")

    logged = points(go(stopped))
    longer = points(go(stopped, total_timesteps=480))
    for tag, at_first in logged.items():
        assert longer[tag][: len(at_first)] == at_first
    evaluated_at = [step for step, _ in longer["eval/episodic_return"]]
    assert evaluated_at == [124, 220, 324, 340, 420, 500]


SCRATCH = dict(teacher="none", learning_starts=99, eval_frequency=0, save_model=False)


def test_checkpoints_come_every_so_many_steps_or_every_ten_minutes(go, monkeypatch):
    """By a clock in which a row takes 100 s, and a checkpoint 15 to compress and 5 to write."""
    go(checkpoint_frequency=24, total_timesteps=100, **SCRATCH)
    assert [step for _, step in checkpoints(go.events)] == [24, 48, 72, 96, 104]

    go.events.clear()
    costs = []

    def timed(function, seconds: int):
        def call(*args, **options):
            costs.append(seconds)
            return function(*args, **options)

        return call

    def monotonic() -> float:
        return 100.0 * go.events.count("training") + sum(costs)

    monkeypatch.setattr(qdagger, "pack", timed(qdagger.pack, seconds=15))
    monkeypatch.setattr(qdagger, "write", timed(qdagger.write, seconds=5))
    monkeypatch.setattr(qdagger, "time", time_with(monotonic=monotonic))
    go(checkpoint_frequency=None, total_timesteps=480, **SCRATCH)

    every_seventh_row = [8 * row for row in range(7, 57, 7)]
    assert [step for _, step in checkpoints(go.events)] == [*every_seventh_row, 480]


def test_a_new_phase_counts_its_steps_and_checkpoints_anew():
    progress = qdagger.Progress(phase="offline", step=300, saved_step=300, evaluated=True)
    progress.begin("online")
    assert progress == qdagger.Progress(phase="online")


def test_a_loss_that_is_no_number_stops_the_run_and_no_checkpoint_has_it(go, monkeypatch):
    real_loss = qdagger.qdagger_loss

    def loss(*args) -> list:
        losses = real_loss(*args)
        if go.events.count("update") > 12:
            return [value * math.nan for value in losses]
        return losses

    monkeypatch.setattr(qdagger, "qdagger_loss", loss)

    message = refusal(go, checkpoint_frequency=1)

    assert message.startswith("the loss is nan")
    (run,) = Path("runs").iterdir()
    for path in run.glob("*.pt"):
        for value in torch.load(path)["networks"].values():
            assert value.isfinite().all()
    assert load_checkpoint(run)["progress"]["step"] == 12


def test_a_full_disk_ends_the_run_in_a_line_and_its_last_checkpoint_goes_on(go, monkeypatch):
    whole = go()
    full = OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", MagicMock(side_effect=[None] * 9 + [full]))
        message = refusal(go, checkpoint_frequency=5)

    assert message.startswith("cannot write runs/")
    assert "No space left on device" in message
    (run,) = Path("runs").absolute().iterdir()
    assert not list(run.glob("*.part"))  # half a file is no use, and its room is needed
    assert load_checkpoint(run)["progress"]["step"] > 0
    go(run)
    assert steps(run) == steps(whole)


def test_the_model_is_written_at_each_evaluation(go):
    """So it is that of the last one, at step 104, when the run is killed three rows later."""
    rows_of_the_teacher = 8
    rows_to_the_evaluation = 104 // 8
    at = rows_of_the_teacher + rows_to_the_evaluation + 3

    run = go(at=at, what="training", kill=True)

    content = load_checkpoint(run)
    assert content["progress"]["step"] == 104
    assert content["progress"]["evaluated"]
    weights = {
        name.removeprefix("q_network."): value
        for name, value in content["networks"].items()
        if "target" not in name
    }
    model = run / f"{content['args']['exp_name']}.cleanrl_model"
    assert same(torch.load(model), weights)

"""No run is lost: stopped, killed, damaged or tampered with, it goes on from its last good checkpoint."""

import errno
import math
import os
import random
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from conftest import PROGRAM, Malicious, interrupted, points, refusal, saved
from test_train import SETTINGS, Clockwork, same, seeds_in_a_row, tiny

import qdagger_dqn_atari_impalacnn as qdagger
from qdagger_dqn_atari_impalacnn import Args, Learner, Run, load_checkpoint, train

NEW = SETTINGS | dict(
    teacher_steps=512, total_timesteps=320, learning_starts=160, buffer_size=240, num_envs=8
)
NEW |= dict(
    target_network_frequency=40, eval_frequency=100, train_frequency=8, checkpoint_frequency=0
)
NEW["final_learning_rate"] = 1e-5


@pytest.fixture
def go(make_model, tmp_path_factory, monkeypatch):
    """go(run, at, what, kill, **changes): train on Clockwork, or resume `run`; the directory, or None if there is none.

    At the `at`-th event, or the `at`-th of the kind `what`, a signal comes, or all ends at once. `go.events`: a row of
    games in "evaluation" or "training", an "update", and (phase, step) of each checkpoint that is about to be written.
    """
    events, stop, plan, log = [], [], {"at": -1, "what": None}, Run.log

    def spy(owner, name, event_of):
        method = getattr(owner, name)

        def spied(*args):
            events.append(event_of(*args))
            plan["at"] -= plan["what"] in (None, events[-1])
            if plan["at"] == 0 and plan["kill"]:
                raise SystemExit
            stop.extend([signal.SIGTERM] if plan["at"] == 0 else [])
            return method(*args)

        monkeypatch.setattr(owner, name, spied)

    spy(Clockwork, "step_wait", lambda games: "evaluation" if games.clock > 20_000 else "training")
    spy(Learner, "gradient_step", lambda *_: "update")
    spy(Run, "checkpoint", lambda run, *_: (run.progress.phase, run.progress.step))
    monkeypatch.setattr(
        Run, "log", lambda run, *args: (log(run, *args), run.writer.flush())
    )  # nothing logged is lost
    monkeypatch.setattr(qdagger, "AtariGames", Clockwork)
    monkeypatch.setattr(qdagger, "seeds_for", seeds_in_a_row)
    monkeypatch.setitem(qdagger.NETWORKS, "nature", tiny)
    new = NEW | {"teacher": str(make_model(4, action=1))}

    def go(
        run: Path | None = None, at: int = -1, what=None, kill: bool = False, **changes
    ) -> Path | None:
        if not run:
            monkeypatch.chdir(tmp_path_factory.mktemp("run"))
        plan.update(at=at, what=what, kill=kill)
        stop.clear()
        before = load_checkpoint(run)["args"] | {"resume": str(run)} if run else new
        with suppress(qdagger.Stopped, SystemExit):
            train(Args(**before | changes), stop)
        return run or next(Path("runs").absolute().glob("*"), None)

    go.events = events
    return go


def state(run: Path) -> dict:
    """The last checkpoint, but for what may differ."""
    content = load_checkpoint(run)
    content["progress"].pop("seconds")
    return {name: part for name, part in content.items() if name != "args"}


def exactly_restored(content: dict) -> bool:
    """Whether the run does not play, or the last row of its replay is truncated anyway."""
    phase, replay = content["progress"]["phase"], content["replay"]
    envs, rows = (64, 8) if phase == "teacher buffer" else (8, 30)
    return (
        phase == "offline"
        or replay["excluded"].view(-1, envs)[(replay["written"] - 1) % rows :][:1].all().item()
    )


def steps(run: Path) -> dict[str, list[int]]:
    return {tag: [step for step, _ in logged] for tag, logged in points(run).items()}


@pytest.mark.parametrize("kill", [False, True])
def test_a_run_stopped_at_any_moment_goes_on_as_if_nothing_had_happened(go, kill):
    """In games, updates, evaluations, checkpoints; also if it is killed soon after, when steps are done again, but no
    point is seen twice. Offline, and where no row is cut off whose games are lost, it ends the same bit for bit."""
    whole, events, exact = go(), go.events.copy(), set()
    assert [events.count(what) for what in ("evaluation", "training", "update")] == [
        7 * 5,
        8 + 40,
        20 + 20,
    ]
    assert not go(at=3)  # in the teacher's evaluation there is no run yet
    for at in range(9, len(events) + 1, 6):
        go.events.clear()
        run = go(at=at)
        stops = [state(run)]
        if kill:
            stops.append(state(go(run, at=7, kill=True)))
        assert (
            go(run) == run
            and steps(run) == steps(whole)
            and (kill or go.events.count("update") == 40)
        ), at
        assert state(run)["progress"]["step"] == 320 and state(run)["replay"]["written"] == 40
        if all(map(exactly_restored, stops)):
            exact.add((stops[0]["progress"]["phase"], events[at - 1]))
            assert same(state(run), state(whole)) and points(run) == points(whole), at
    assert {phase for phase, _ in exact} == {"teacher buffer", "offline", "online"} and {
        what for _, what in exact
    } >= {"evaluation", "update"}


@pytest.mark.parametrize("what", [("offline", 20), "training"])
def test_lambda_is_informed_after_a_resume_at_the_first_online_step(go, what):
    """Stopped in the last checkpoint offline, or in the first row of games online, the ninth of all."""
    ten_games = dict(eval_episodes=10, eval_frequency=0)
    whole = go(**ten_games)
    run = go(at=9 if what == "training" else 1, what=what, **ten_games)
    progress = load_checkpoint(run)["progress"]
    assert (progress["phase"], progress["step"]) == (("online", 8) if what == "training" else what)
    assert len(progress["scores"]) == 10 and sum(progress["scores"]) > 0
    go(run)
    lambdas = points(run)["charts/distill_coeff"]
    assert lambdas == points(whole)["charts/distill_coeff"] and lambdas[0][1] < 1


SIGNALS = [signal.SIGINT, signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1]


@pytest.mark.parametrize("numbers", [SIGNALS, pytest.param(SIGNALS * 5, marks=pytest.mark.long)])
def test_real_signals_end_a_run_with_the_command_that_goes_on_and_kills_do_no_harm(
    make_model, tmp_path, numbers
):
    """To all processes, as from a terminal, at random moments after a checkpoint, while one is written, too."""
    flags = "--num-envs 1 --teacher-steps 112 --offline-steps 20 --learning-starts 60 --buffer-size 100 --no-cuda "
    flags += "--network nature --batch-size 4 --teacher-eval-episodes 1 --eval-episodes 1 --checkpoint-frequency 20"
    command, rng = [PROGRAM, *flags.split(), "--teacher", make_model(4, action=1)], random.Random(0)
    run = interrupted(command, "checkpoint.pt", numbers, tmp_path, pause=rng.random)
    last = 20 + load_checkpoint(run)["progress"]["step"]
    assert steps(run)["charts/distill_coeff"] == list(range(120, last + 1, 100))
    assert steps(run)["charts/offline/avg_episodic_return"] == [0, 20] and steps(run)[
        "eval/episodic_return"
    ] == [last]


@pytest.fixture
def stopped(go) -> Path:
    """A run that was stopped in its 12th offline update; its checkpoint before that is of the tenth."""
    run = go(at=12, what="update", checkpoint_frequency=10)
    assert [event for event in go.events if isinstance(event, tuple)][-2:] == [
        ("offline", 10),
        ("offline", 12),
    ]
    return run


@pytest.mark.parametrize("kind", ["cut", "garbage", "malicious"])
def test_a_damaged_checkpoint_costs_the_way_back_to_the_one_before(
    go, stopped, tmp_path, capfd, monkeypatch, kind
):
    """Nor is that lost before the next one is whole. Of two damaged ones nothing is left. No damage runs code."""
    path, victim, copied = stopped / "checkpoint.pt", tmp_path / "victim", tmp_path / "copy"
    good, bad = path.read_bytes(), saved(state(stopped) | {"facts": Malicious(victim)})
    bad = {"cut": good[:-5000], "garbage": bytes(5000), "malicious": bad}[kind]
    path.write_bytes(bad)
    shutil.copytree(stopped, copied)
    whole, _ = go(), capfd.readouterr()
    assert go(stopped) == stopped and f"--resume: {path} cannot be read: " in capfd.readouterr().out
    assert same(state(stopped), state(whole)) and steps(stopped) == steps(whole)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", None)  # like a disk that takes nothing
        assert refusal(go, copied, at=1, save_model=False).startswith(f"cannot write {copied}")
    assert load_checkpoint(copied)["progress"]["step"] == 10
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        (copied / name).write_bytes(bad)
    assert (
        refusal(load_checkpoint, copied).startswith(f"--resume {copied}: no checkpoint")
        and not victim.exists()
    )


def test_a_checkpoint_of_another_version_is_refused_in_a_line(stopped, command_line):
    """A part is missing, or is another."""
    content, new = load_checkpoint(stopped), {"new": torch.zeros(1)}
    damages = [(key, {}) for key in content] + [
        (key, {key: new}) for key in content.keys() - {"facts", "optimizer"}
    ]
    for key, part in damages:
        torch.save(
            {name: value for name, value in content.items() if name != key} | part,
            stopped / "checkpoint.pt",
        )
        code, _, errors = command_line("--resume", stopped)
        assert (
            code == 2 and f"error: --resume {stopped}: " in errors and "Traceback" not in errors
        ), (key, part)


def test_only_flags_that_change_no_result_may_change_and_a_run_may_be_longer(go, stopped):
    free = "resume total_timesteps checkpoint_frequency eval_frequency eval_episodes evaluate teacher_buffer track "
    free += "wandb_project_name wandb_entity capture_video save_model upload_model hf_entity capture compile"
    args = load_checkpoint(stopped)["args"]
    for flag in args:
        before = Args(**args), args | {flag: "another"}
        check = qdagger.check_unchanged
        message = check(*before) if flag in free.split() else refusal(check, *before)
        assert message is None or message.endswith(
            "the run to be resumed has another; leave out --resume"
        )
    assert refusal(go, stopped, learning_rate=1e-3).startswith(
        "--learning-rate 0.001: the run to be resumed has "
    )
    logged, longer = points(go(stopped)), points(go(stopped, total_timesteps=480))
    assert all(longer[tag][: len(logged[tag])] == logged[tag] for tag in logged)
    assert [step for step, _ in longer["eval/episodic_return"]] == [124, 220, 324, 340, 420, 500]


def test_checkpoints_come_every_so_many_steps_or_every_ten_minutes(go, monkeypatch):
    """By a clock in which a vector step takes 100 s, and a checkpoint 15 to compress and 5 to write."""
    scratch = dict(teacher="none", learning_starts=1000, eval_frequency=0, save_model=False)
    go(checkpoint_frequency=24, total_timesteps=100, **scratch)
    assert [event[1] for event in go.events if isinstance(event, tuple)] == [24, 48, 72, 96, 104]
    cost, write, pack = [], qdagger.write, qdagger.pack
    go.events.clear()
    monkeypatch.setattr(
        qdagger, "write", lambda *args, **before: cost.append(5) or write(*args, **before)
    )
    monkeypatch.setattr(qdagger, "pack", lambda replay: cost.append(15) or pack(replay))
    clock = {"monotonic": lambda: 100.0 * go.events.count("training") + sum(cost)}
    monkeypatch.setattr(qdagger, "time", SimpleNamespace(**vars(time) | clock))
    go(checkpoint_frequency=None, total_timesteps=480, **scratch)
    assert [event[1] for event in go.events if isinstance(event, tuple)] == [
        8 * row for row in range(7, 57, 7)
    ] + [480]


def test_a_loss_that_is_no_number_stops_the_run_and_no_checkpoint_has_it(go, monkeypatch):
    loss, factor = qdagger.qdagger_loss, lambda: math.nan if go.events.count("update") > 12 else 1
    monkeypatch.setattr(
        qdagger, "qdagger_loss", lambda *args: [value * factor() for value in loss(*args)]
    )
    assert refusal(go, checkpoint_frequency=1).startswith("the loss is nan")
    (run,) = Path("runs").iterdir()
    for path in run.glob("*.pt"):
        assert all(value.isfinite().all() for value in torch.load(path)["networks"].values())
    assert load_checkpoint(run)["progress"]["step"] == 12


def test_a_full_disk_ends_the_run_in_a_line_and_its_last_checkpoint_goes_on(go, monkeypatch):
    whole, full = go(), OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", MagicMock(side_effect=[None] * 9 + [full]))
        message = refusal(go, checkpoint_frequency=5)
    (run,) = Path("runs").absolute().iterdir()
    assert message.startswith("cannot write runs/") and "No space left on device" in message
    assert not list(run.glob("*.part")), "what is half written is no use, and its room is needed"
    assert load_checkpoint(run)["progress"]["step"] > 0 and steps(go(run)) == steps(whole)


def test_the_model_is_written_at_each_evaluation(go):
    """So it is that of the last one, at step 104, when the run is killed 3 rows later."""
    run = go(at=8 + 104 // 8 + 3, what="training", kill=True)
    content, (model,) = load_checkpoint(run), run.glob("*.cleanrl_model")
    networks = {
        name.removeprefix("q_network."): value for name, value in content["networks"].items()
    }
    assert same(
        torch.load(model), {name: value for name, value in networks.items() if "target" not in name}
    )
    assert content["progress"]["step"] == 104 and content["progress"]["evaluated"]
